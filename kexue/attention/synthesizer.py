"""Attention whose logits need not compare two tokens: Dense, Random, factorised and mixed, and a layer that uses them.

A *logits module* turns tokens x (..., n, d) into logits (..., heads, n, n), or into (heads, n, n) where they do not
depend on x. Those with `max_len` have learned something per position: shorter inputs use its beginning, cut before the
softmax, longer ones are refused.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor, nn

from kexue import _validate
from kexue.attention import _inputs

LAYOUTS = ("kron", "tile")


def factor_logits(alpha: Tensor, beta: Tensor, layout: str = "kron") -> Tensor:
    r"""One row of a b logits from a row of a and a row of b.

    $$ B_j = \alpha_{\lfloor j/b \rfloor}\,\beta_{j \bmod b} \;(\text{"kron"}), \qquad
       B_j = \alpha_{j \bmod a}\,\beta_{j \bmod b} \;(\text{"tile"}) $$

    "kron" is the row-wise Kronecker (Khatri-Rao) product; all a b columns differ. "tile" repeats both rows alike, as the
    formula of the source reads: only lcm(a, b) columns differ, the rest are copies.

    Source: article 7430 of kexue.fm, (7); Tay et al., *Synthesizer*, arXiv:2005.00743.

    Args:
        alpha: (..., a). beta: (..., b), of the same leading axes.

    Returns:
        (..., a b).

    Raises:
        ValueError: leading axes that differ, an unknown layout.
    """
    _validate.choice("layout", layout, LAYOUTS)
    a = _validate.shape("alpha", alpha, "...", "a")["a"]
    b = _validate.shape("beta", beta, *alpha.shape[:-1], "b")["b"]
    if layout == "kron":
        return (alpha.unsqueeze(-1) * beta.unsqueeze(-2)).flatten(-2)
    lead = (1,) * (alpha.ndim - 1)
    return alpha.repeat(*lead, b) * beta.repeat(*lead, a)


class _Logits(nn.Module):
    """What all logits modules share: heads, the longest input, and the check of x."""

    heads: int
    max_len: int | None = None
    d: int | None = None

    def _length(self, x: Tensor) -> int:
        sizes = {} if self.d is None else {"d": self.d}
        n = _validate.shape("x", x, "...", "n", "d", **sizes)["n"]
        if n < 1:
            raise ValueError(f"x: expected n >= 1 positions, got shape {tuple(x.shape)}")
        if self.max_len is not None and n > self.max_len:
            raise ValueError(
                f"x has n = {n} positions, max_len is {self.max_len}: {type(self).__name__} learns each position and has "
                "nothing to say about a longer input"
            )
        return n


def _sizes(**numbers: int) -> None:
    for name, value in numbers.items():
        _validate.integer(name, value, low=1)


def _xavier(linear: nn.Linear, generator: torch.Generator | None) -> None:
    with torch.no_grad():
        nn.init.xavier_normal_(linear.weight, generator=generator)
        if linear.bias is not None:
            linear.bias.zero_()


class DotLogits(_Logits):
    r"""Both queries and keys from the tokens: the logits of ordinary attention.

    $$ B = \frac{X W_q (X W_k)^\top}{\sqrt{d_\text{head}}} $$

    Source: article 7430 of kexue.fm, (3). A row of rank <= d_head; no limit on the length.

    Args:
        d, heads: >= 1. d_head: width of queries and keys, default d / heads. bias: add biases.

    Raises:
        ValueError: numbers out of range, d not divisible by heads without `d_head`.
    """

    def __init__(
        self, d: int, heads: int, *, d_head: int | None = None, bias: bool = False, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.d, self.heads, self.d_head = d, heads, _head_width(d, heads, d_head)
        self.q, self.k = (nn.Linear(d, heads * self.d_head, bias=bias) for _ in range(2))
        for linear in (self.q, self.k):
            _xavier(linear, generator)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n, d) -> (..., heads, n, n)."""
        self._length(x)
        q, k = (_heads(linear(x), self.heads) for linear in (self.q, self.k))
        return q @ k.mT / math.sqrt(self.d_head)


class QueryLogits(_Logits):
    r"""Constant queries C and keys from the tokens: the pooling of set Transformers and of the Perceiver.

    $$ B = \frac{C (X W_k)^\top}{\sqrt{d_\text{head}}} $$

    The output does not change when the tokens are permuted.

    Source: Lee et al., *Set Transformer*, arXiv:1810.00825; the corner that article 7430 of kexue.fm does not list.

    Args:
        d, heads, max_len: >= 1. d_head: width of queries and keys, default d / heads. bias: add biases to the keys.

    Raises:
        ValueError: numbers out of range, d not divisible by heads without `d_head`.
    """

    def __init__(
        self, d: int, heads: int, max_len: int, *, d_head: int | None = None, bias: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _sizes(max_len=max_len)
        self.d, self.heads, self.max_len, self.d_head = d, heads, max_len, _head_width(d, heads, d_head)
        self.queries = nn.Parameter(torch.randn(heads, max_len, self.d_head, generator=generator))
        self.k = nn.Linear(d, heads * self.d_head, bias=bias)
        _xavier(self.k, generator)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n, d) -> (..., heads, n, n)."""
        n = self._length(x)
        return self.queries[:, :n] @ _heads(self.k(x), self.heads).mT / math.sqrt(self.d_head)


class DenseLogits(_Logits):
    r"""Each token names the slots that it wants to read: keys frozen to constants.

    $$ B = X W_a + c, \qquad\text{or with } \texttt{hidden}:\quad B = \operatorname{relu}(X W_1 + b_1)\,W_2 + c $$

    for each head. B_ij depends on x_i and on the *index* j, never on x_j.

    Source: article 7430 of kexue.fm, (4) and (5); Tay et al., arXiv:2005.00743, section 3.2. Every head here sees the whole
    token and has its own hidden layer; the paper's heads see d / heads entries of it.

    Args:
        d, heads, max_len: >= 1. hidden: width of the hidden layer of each head; None: one layer. bias: add biases.

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(
        self, d: int, heads: int, max_len: int, *, hidden: int | None = None, bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _sizes(max_len=max_len)
        self.max_len = max_len
        self.rows = _Rows(d, heads, (max_len,), hidden=hidden, bias=bias, generator=generator)
        self.d, self.heads = d, heads

    def forward(self, x: Tensor) -> Tensor:
        """(..., n, d) -> (..., heads, n, n)."""
        n = self._length(x)
        return self.rows(x)[0][..., :n]


class FactorizedDenseLogits(_Logits):
    r"""Dense with a b columns from two shorter rows, a + b in place of a b: see `factor_logits`.

    Source: article 7430 of kexue.fm, (7); Tay et al., arXiv:2005.00743, section 3.2. Differs from them by default: the
    row-wise Kronecker product in place of two rows tiled alike, which makes only lcm(a, b) different columns.

    Args:
        d, heads, a, b: >= 1; max_len = a b. hidden: as in `DenseLogits`. bias: add biases.
        layout: "kron" or "tile".

    Raises:
        ValueError: numbers out of range, an unknown layout.
    """

    def __init__(
        self, d: int, heads: int, a: int, b: int, *, hidden: int | None = None, bias: bool = True, layout: str = "kron",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _sizes(a=a, b=b)
        _validate.choice("layout", layout, LAYOUTS)
        self.max_len, self.layout = a * b, layout
        self.rows = _Rows(d, heads, (a, b), hidden=hidden, bias=bias, generator=generator)
        self.d, self.heads = d, heads

    def forward(self, x: Tensor) -> Tensor:
        """(..., n, d) -> (..., heads, n, n)."""
        n = self._length(x)
        alpha, beta = self.rows(x)
        return factor_logits(alpha, beta, self.layout)[..., :n]


class RandomLogits(_Logits):
    r"""A constant matrix per head, learned or (`trainable=False`) left as drawn: B = R.

    Source: article 7430 of kexue.fm, (6); Tay et al., arXiv:2005.00743, section 3.3.

    Args:
        heads, max_len: >= 1. trainable: False keeps R as a buffer ("Fixed Random").
        std: standard deviation of the first R, in nats, >= 0.

    Raises:
        ValueError: numbers out of range.
    """

    logits: Tensor

    def __init__(
        self, heads: int, max_len: int, *, trainable: bool = True, std: float = 1.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        _sizes(heads=heads, max_len=max_len)
        _validate.number("std", std, low=0.0)
        self.heads, self.max_len = heads, max_len
        drawn = std * torch.randn(heads, max_len, max_len, generator=generator)
        if trainable:
            self.logits = nn.Parameter(drawn)
        else:
            self.register_buffer("logits", drawn)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n, d) -> (heads, n, n): the same for every batch."""
        n = self._length(x)
        return self.logits[:, :n, :n]


class FactorizedRandomLogits(_Logits):
    r"""A constant matrix of rank <= k per head: B = R_1 R_2^T, 2 n k numbers in place of n^2.

    The softmax of it has full rank all the same; rank 2 is enough to point at one slot per row.

    Source: article 7430 of kexue.fm, (8); Tay et al., arXiv:2005.00743, section 3.3.

    Args:
        heads, max_len, rank: >= 1. std: standard deviation of the first logits, in nats, >= 0.

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(
        self, heads: int, max_len: int, rank: int, *, std: float = 1.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        _sizes(heads=heads, max_len=max_len, rank=rank)
        _validate.number("std", std, low=0.0)
        self.heads, self.max_len = heads, max_len
        scale = math.sqrt(std / math.sqrt(rank))
        self.left, self.right = (
            nn.Parameter(scale * torch.randn(heads, max_len, rank, generator=generator)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., n, d) -> (heads, n, n): the same for every batch."""
        n = self._length(x)
        return self.left[:, :n] @ self.right[:, :n].mT


class LogitMixture(_Logits):
    r"""A weighted sum of logits: a geometric mixture of the attention matrices, in which every part has a veto.

    $$ B = \sum_k \alpha_k B_k, \quad \sum_k \alpha_k = 1, \qquad \operatorname{softmax}(B) \propto \prod_k A_k^{\alpha_k} $$

    Source: article 7430 of kexue.fm, (9). The weights are a softmax of free numbers; with `signed` they only sum to 1.

    Args:
        parts: logits modules with the same number of heads. signed: let weights be negative.

    Raises:
        ValueError: no parts, numbers of heads that differ.
    """

    def __init__(self, *parts: nn.Module, signed: bool = False) -> None:
        super().__init__()
        if not parts:
            raise ValueError("parts is empty: a mixture needs at least one logits module")
        heads = {_heads_of("parts", part) for part in parts}
        if len(heads) > 1:
            raise ValueError(f"parts should have the same number of heads, got {sorted(heads)}")
        limits, widths = (
            [size for size in (getattr(part, name, None) for part in parts) if isinstance(size, int)] for name in ("max_len", "d")
        )
        if len(set(widths)) > 1:
            raise ValueError(f"parts should take tokens of one width d, got {widths}")
        self.parts = nn.ModuleList(parts)
        self.heads, self.max_len, self.signed = heads.pop(), min(limits) if limits else None, signed
        self.d = widths[0] if widths else None
        self.free = nn.Parameter(torch.zeros(len(parts)))

    @property
    def weights(self) -> Tensor:
        """The weights alpha, (parts,), which sum to 1; equal at first."""
        return self.free - self.free.mean() + 1 / len(self.free) if self.signed else self.free.softmax(0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n, d) -> (..., heads, n, n)."""
        self._length(x)
        total: Tensor | None = None
        for weight, part in zip(self.weights, self.parts):
            term = weight * part(x)
            total = term if total is None else total + term
        assert total is not None
        return total


class SynthesizerAttention(nn.Module):
    r"""Multi-head attention on the logits of any module: the layer to stand where `MultiHeadAttention` stood.

    $$ Y = \big[\operatorname{softmax}(B_h(X) + M)\,X W_v^h\big]_h W_o $$

    It is a sub-layer for `kexue.transformer.ResidualStack` (where there is a mask, close over it: `branches`), and may take
    the place of a self-attention in `Transformer.stack.sublayers`, which passes masks and causality on, but keeps no cache.

    Source: article 7430 of kexue.fm; Tay et al., *Synthesizer*, arXiv:2005.00743.

    Args:
        d: width, >= 1; divisible by the heads unless `d_head` is given. logits: a logits module; it says how many heads.
        d_head: width of the values of a head; default d / heads. bias: add biases. causal: hide the future.

    Raises:
        TypeError, ValueError: no logits module, logits for another width, d not divisible by the heads.

    Complexity: O(n^2 d) time whatever the logits cost, O(heads n^2) memory (times the batch if the logits depend on x).

    Example:
        >>> layer = SynthesizerAttention(32, DenseLogits(32, heads=4, max_len=12))
        >>> layer(torch.randn(8, 10, 32)).shape
        torch.Size([8, 10, 32])
    """

    def __init__(
        self,
        d: int,
        logits: nn.Module,
        *,
        d_head: int | None = None,
        bias: bool = True,
        causal: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.heads = _heads_of("logits", logits)
        width = getattr(logits, "d", None)
        if width not in (None, d):
            raise ValueError(f"logits take tokens of width {width}, the layer has d = {d}")
        self.d, self.d_head, self.causal = d, _head_width(d, self.heads, d_head), causal
        self.logits = logits
        self.v = nn.Linear(d, self.heads * self.d_head, bias=bias)
        self.out = nn.Linear(self.heads * self.d_head, d, bias=bias)
        for linear in (self.v, self.out):
            _xavier(linear, generator)

    @overload
    def forward(self, x: Tensor, *, mask: Tensor | None = None, return_weights: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, return_weights: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(..., n, d) -> (..., n, d), and with `return_weights` the weights, (heads, n, n) if they are the same for all x.

        Args:
            x: (..., n, d). mask: broadcastable to (..., heads, n, n), boolean (True: may attend) or floating (added to the
                logits, in nats); causality comes on top.

        Raises:
            TypeError, ValueError: a wrong shape, more positions than the logits know, a mask that does not broadcast or
                leaves a query without any key.
        """
        n = _validate.shape("x", x, "...", "n", "d", d=self.d)["n"]
        logits = self.logits(x)
        _validate.shape("logits", logits, "...", self.heads, n, n)
        logits = _inputs.masked(logits, mask, self.causal, (*x.shape[:-2], self.heads, n, n))
        weights = logits.softmax(-1)
        mixed = weights @ _heads(self.v(x), self.heads)
        out = self.out(mixed.transpose(-3, -2).flatten(-2))
        return (out, weights) if return_weights else out


# -------------------------------------------------------------------------------------------- plumbing


class _Rows(nn.Module):
    """For each head and each of some sizes s, a row of s numbers per token: (..., n, d) -> a list of (..., heads, n, s)."""

    def __init__(
        self, d: int, heads: int, sizes: tuple[int, ...], *, hidden: int | None, bias: bool, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        _sizes(d=d, heads=heads)
        self.heads, self.sizes = heads, sizes
        total = sum(sizes)
        self.down: nn.Parameter | None = None
        if hidden is None:
            self.up = nn.Linear(d, heads * total, bias=bias)
        else:
            _sizes(hidden=hidden)
            self.up = nn.Linear(d, heads * hidden, bias=bias)
            self.down = nn.Parameter(torch.randn(heads, hidden, total, generator=generator) * math.sqrt(2 / (hidden + total)))
        self.shift = nn.Parameter(torch.zeros(heads, 1, total)) if bias and hidden is not None else None
        _xavier(self.up, generator)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = _heads(self.up(x), self.heads)
        if self.down is not None:
            rows = rows.relu() @ self.down
        if self.shift is not None:
            rows = rows + self.shift
        return rows.split(self.sizes, -1)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(..., n, heads s) -> (..., heads, n, s)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def _heads_of(name: str, logits: nn.Module) -> int:
    heads = getattr(logits, "heads", None)
    if not isinstance(logits, nn.Module) or not isinstance(heads, int):
        raise TypeError(f"{name} should be a logits module such as DenseLogits (with `heads`), got {type(logits).__name__}")
    return heads


def _head_width(d: int, heads: int, d_head: int | None) -> int:
    _sizes(d=d, heads=heads)
    if d_head is None:
        if d % heads:
            raise ValueError(f"d should be divisible by heads, got d = {d} and heads = {heads}; or give d_head")
        return d // heads
    _sizes(d_head=d_head)
    return d_head
