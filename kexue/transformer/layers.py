"""Sub-layers and what they need: feed-forward, multi-head attention, positions, masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kexue import _validate
from kexue.attention import attention
from kexue.attention._inputs import join_masks

activations: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": torch.positive,
}
"""Pointwise functions by name; "gelu_tanh" is the tanh form of GPT-2 and T5."""

Core = Callable[..., Tensor]
"""core(q, k, v, causal=...) or core(q, k, v, mask=..., causal=...), as `kexue.attention.attention` is."""
Scale = float | Callable[[Tensor], Tensor] | None


# ------------------------------------------------------------------------------------------ feed-forward


class FeedForward(nn.Module):
    r"""Two matrices with a pointwise function between them, optionally gated.

    .. math:: F(x) = \varphi(x W_1) W_2, \qquad F_\text{gated}(x) = \bigl(\varphi(x W_g) \odot x W_1\bigr) W_2

    Source: Vaswani et al., arXiv:1706.03762, eq. (2); Shazeer, *GLU variants*, arXiv:2002.05202.

    Args:
        d, d_ff: widths outside and inside, >= 1. activation: name in `activations`. gated: the second form, whose
            `up` holds [W_g, W_1]. bias: add biases. dropout: probability on the inner layer.
    """

    def __init__(
        self, d: int, d_ff: int, *, activation: str = "gelu", gated: bool = False, bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        _validate.integer("d", d, low=1)
        _validate.integer("d_ff", d_ff, low=1)
        _validate.choice("activation", activation, activations)
        self.d, self.d_ff, self.activation, self.gated = d, d_ff, activation, gated
        self.up = nn.Linear(d, 2 * d_ff if gated else d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        h, phi = self.up(x), activations[self.activation]
        if self.gated:
            gate, h = h.chunk(2, -1)
            h = phi(gate) * h
        else:
            h = phi(h)
        return self.down(self.dropout(h))

    @staticmethod
    def parallel(layers: Sequence[FeedForward]) -> FeedForward:
        r"""One wide layer that computes the sum of the given ones: the inner widths add.

        .. math:: \sum_k \varphi(x W_1^{(k)}) W_2^{(k)} = \varphi\bigl(x\,[W_1^{(1)} | W_1^{(2)} | \dots]\bigr)\,
                  [W_2^{(1)}; W_2^{(2)}; \dots]

        Source: article 9009 of kexue.fm. Dropout is not carried over.

        Raises:
            ValueError: no layers, or layers that differ in width, activation, gate or bias.
        """
        if not layers:
            raise ValueError("layers is empty: nothing to put in parallel")
        first = layers[0]
        kinds = {(f.d, f.activation, f.gated, f.up.bias is not None) for f in layers}
        if len(kinds) > 1:
            raise ValueError(f"layers should share (d, activation, gated, bias), got {sorted(kinds)}")
        wide = FeedForward(
            first.d, sum(f.d_ff for f in layers), activation=first.activation, gated=first.gated, bias=first.up.bias is not None
        ).to(first.up.weight)
        parts = 2 if first.gated else 1
        with torch.no_grad():
            wide.up.weight.copy_(torch.cat([f.up.weight.chunk(parts)[p] for p in range(parts) for f in layers]))
            wide.down.weight.copy_(torch.cat([f.down.weight for f in layers], -1))
            if first.up.bias is not None:
                wide.up.bias.copy_(torch.cat([f.up.bias.chunk(parts)[p] for p in range(parts) for f in layers]))
                wide.down.bias.copy_(torch.stack([f.down.bias for f in layers]).sum(0))
        return wide


# --------------------------------------------------------------------------------------------- positions


def sinusoids(positions: Tensor, d: int) -> Tensor:
    r"""Fixed position codes.

    .. math:: P_{t,2i} = \sin(t / 10000^{2i/d}), \qquad P_{t,2i+1} = \cos(t / 10000^{2i/d})

    Source: Vaswani et al., arXiv:1706.03762, section 3.5.

    Args:
        positions: (..., n), integers or floats. d: even, >= 2.

    Returns:
        (..., n, d) in the dtype of `positions` if that is floating, else in torch's default.
    """
    return torch.view_as_real(_phases(positions, d)).flip(-1).flatten(-2)


def rotary(x: Tensor, positions: Tensor) -> Tensor:
    r"""Rotary position embedding: pair i of the vector at position t turns by the angle t / 10000^(2i/d).

    .. math:: (x_{2i} + \mathrm i\,x_{2i+1}) \mapsto (x_{2i} + \mathrm i\,x_{2i+1})\,e^{\mathrm i t / 10000^{2i/d}}

    A product of two vectors so turned depends on their distance alone. Neighbouring entries form the pairs, as in the
    source (Llama's code pairs entry i with i + d/2: the same up to a permutation of the entries).

    Source: Su et al., *RoFormer*, arXiv:2104.09864, eq. (34).

    Args:
        x: (..., n, d), d even. positions: broadcastable to (..., n).

    Returns:
        (..., n, d).
    """
    turn = _phases(positions.to(x.dtype), x.shape[-1])
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def _phases(positions: Tensor, d: int) -> Tensor:
    """e^(i t w) for the d/2 frequencies w: (..., n) -> (..., n, d/2), complex."""
    _validate.integer("d", d, low=2)
    if d % 2:
        raise ValueError(f"sinusoids and rotations need an even width, got {d}")
    if not positions.is_floating_point():
        positions = positions.to(torch.get_default_dtype())
    w = 10000.0 ** (-torch.arange(0, d, 2, dtype=positions.dtype, device=positions.device) / d)
    angles = positions.unsqueeze(-1) * w
    return torch.polar(torch.ones_like(angles), angles)


def relative_bucket(distance: Tensor, *, bidirectional: bool, buckets: int = 32, max_distance: int = 128) -> Tensor:
    r"""T5's bucket of a signed distance key - query: exact near by, logarithmic far away.

    With B = buckets (half of them for each sign if `bidirectional`), E = B // 2 and n = \|distance\|:

    .. math:: b = n \text{ for } n < E, \qquad
              b = \min\Bigl(B - 1,\; E + \Bigl\lfloor (B - E) \frac{\ln(n/E)}{\ln(\text{max\_distance}/E)} \Bigr\rfloor\Bigr)
              \text{ else.}

    Keys ahead (distance > 0) take the second half of the buckets, or bucket 0 if not `bidirectional`.

    Source: Raffel et al., arXiv:1910.10683, section 2.1, and the code published with it.

    Args:
        distance: integers of any shape. buckets: >= 2, even and >= 4 if `bidirectional`. max_distance: > E.

    Returns:
        int64 of the same shape, in [0, buckets).

    Raises:
        ValueError: an odd number of buckets, a max_distance that the exact buckets already reach.
    """
    _validate.integer("buckets", buckets, low=4 if bidirectional else 2)
    if bidirectional and buckets % 2:
        raise ValueError(f"buckets should be even for both directions, got {buckets}")
    half = buckets // 2 if bidirectional else buckets
    exact = half // 2
    _validate.integer("max_distance", max_distance, low=exact + 1)
    n = distance.abs() if bidirectional else (-distance).clamp(min=0)
    share = torch.log(n.clamp(min=1).float() / exact) / math.log(max_distance / exact)  # float32, as T5's weights were trained
    far = exact + (share * (half - exact)).long()
    bucket = torch.where(n < exact, n, far.clamp(max=half - 1))
    return bucket + half * (distance > 0) if bidirectional else bucket


class RelativeBias(nn.Module):
    """One learned number per head and bucket of the distance, added to the logits; see `relative_bucket`.

    Args:
        heads: >= 1. bidirectional, buckets, max_distance: as in `relative_bucket`.
    """

    def __init__(self, heads: int, *, bidirectional: bool, buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__()
        self.bucket = partial(relative_bucket, bidirectional=bidirectional, buckets=buckets, max_distance=max_distance)
        self.bucket(torch.zeros(1, dtype=torch.long))
        self.table = nn.Embedding(buckets, heads)

    def forward(self, n: int, m: int) -> Tensor:
        """(heads, n, m) for the last n of m positions as queries."""
        device = self.table.weight.device
        bucket = self.bucket(torch.arange(1 - m, n, device=device))  # of each diagonal
        keys, queries = torch.arange(m, device=device), torch.arange(m - n, m, device=device)
        return self.table(bucket[keys - queries[:, None] + m - 1]).permute(2, 0, 1)


# ------------------------------------------------------------------------------------------------- masks


def causal_mask(n: int, m: int | None = None) -> Tensor:
    """(n, m) boolean: query i of the last n of m positions sees the keys up to its own; m = n by default."""
    _validate.integer("n", n, low=1)
    m = n if m is None else m
    _validate.integer("m", m, low=n)
    return torch.ones(n, m, dtype=torch.bool).tril(m - n)


def prefix_mask(n: int, prefix: int) -> Tensor:
    """(n, n) boolean: the first `prefix` positions see each other, the others also their past (a prefix language model)."""
    _validate.integer("prefix", prefix, low=0, high=n)
    mask = causal_mask(n)
    mask[:, :prefix] = True
    return mask


def padding_mask(tokens: Tensor, pad: int) -> Tensor:
    """(..., 1, n, n) boolean from (..., n) tokens: nobody sees the padding, but each padded position sees itself.

    So no row is empty, even under a causal mask with the padding on the left.
    """
    _validate.shape("tokens", tokens, "...", "n")
    own = torch.eye(tokens.shape[-1], dtype=torch.bool, device=tokens.device)
    return ((tokens != pad).unsqueeze(-2) | own).unsqueeze(-3)


class View(NamedTuple):
    """Who sees whom and how sharply, prepared once for all layers.

    Args:
        mask: None, boolean or floating, broadcastable to (..., heads, n, m). causal: the core itself has to hide the future.
        scale: factor of the logits, a number or (..., n, 1); None: the core's own, 1 / sqrt(d_head).
    """

    mask: Tensor | None = None
    causal: bool = False
    scale: float | Tensor | None = None


def view(
    shape: torch.Size, *, like: Tensor, mask: Tensor | None = None, bias: Tensor | None = None, causal: bool = False,
    scale: Scale = None, kind: str | Core = "softmax",
) -> View:
    """Join a mask, a bias and causality for logits of the given shape (..., heads, n, m), and refuse empty rows.

    With softmax attention causality goes into the mask, unless it is all there is; another kind sees to it itself.
    """
    n, m = shape[-2:]
    allowed, added = join_masks(shape, mask, causal and n > 1, like.device)
    if added is not None:
        bias = added if bias is None else bias + added
    factor: float | Tensor | None
    if callable(scale):
        factor = scale(like.new_full((1, 1), m) if allowed is None else allowed.sum(-1, keepdim=True).to(like.dtype))
    else:
        factor = scale
    if callable(kind):
        allowed, _ = join_masks(shape, mask, False, like.device)
    elif mask is None and bias is None and allowed is not None and n == m:
        return View(None, True, factor)
    if bias is not None:
        allowed = (bias if allowed is None else bias.masked_fill(~allowed, -math.inf)).to(like.dtype)
    return View(allowed, causal and callable(kind), factor)


# --------------------------------------------------------------------------------------------- attention


class Attended(NamedTuple):
    """What `MultiHeadAttention.attend` gives: (..., n, d), the keys and values (..., heads, m, d_head), the weights."""

    out: Tensor
    keys: Tensor
    values: Tensor
    weights: Tensor | None


class MultiHeadAttention(nn.Module):
    r"""Projections to several heads, attention in each, and one projection back.

    .. math:: \text{MHA}(x, y) = \big[\operatorname{softmax}(s\, x W_q^h (y W_k^h)^\top + M)\, y W_v^h\big]_{h}\, W_o

    with y = x, or the memory of another stack (`cross`). Softmax attention goes through torch's fused kernels, which
    do not make the weights and are differentiable once; pass `kind=kexue.attention.attention` for higher derivatives.

    Source: Vaswani et al., arXiv:1706.03762, section 3.2.

    Args:
        d: width, >= 1; divisible by `heads` unless `d_head` is given. heads: >= 1.
        d_head: width of a head; default d / heads.
        bias: add biases. cross: keys and values come from a memory. causal: hide the future. rotary: turn queries and keys.
        kind: "softmax", or a function core(q, k, v, causal=..., [mask=...]) from (..., heads, n, d_head) to the same, such
            as `linear_attention`; `mask` is passed where there is one.
        scale: factor s of the logits; default 1 / sqrt(d_head); or a function from the number of keys that each query
            sees, (..., n, 1), to its factors (for example log n / sqrt(d_head)).
        dropout: probability on the weights (softmax only).

    Raises:
        ValueError: numbers out of range, d not divisible by heads, an unknown kind.
    """

    def __init__(
        self,
        d: int,
        heads: int,
        *,
        d_head: int | None = None,
        bias: bool = True,
        cross: bool = False,
        causal: bool = False,
        rotary: bool = False,
        kind: str | Core = "softmax",
        scale: Scale = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _validate.integer("d", d, low=1)
        _validate.integer("heads", heads, low=1)
        if d_head is None and d % heads:
            raise ValueError(f"d should be divisible by heads, got d = {d} and heads = {heads}; or give d_head")
        self.heads, self.d_head = heads, d // heads if d_head is None else d_head
        _validate.integer("d_head", self.d_head, low=1)
        if not callable(kind):
            _validate.choice("kind", kind, ("softmax",))
        if not callable(scale) and scale is not None:
            _validate.number("scale", scale)
        _validate.number("dropout", dropout, low=0.0, high=1.0)
        if dropout and callable(kind):
            raise ValueError("dropout on the weights is for softmax attention only")
        self.d, self.cross, self.causal, self.rotary = d, cross, causal, rotary
        self.kind, self.scale, self.dropout = kind, scale, dropout
        inner = heads * self.d_head
        if cross:
            self.q = nn.Linear(d, inner, bias=bias)
            self.kv = nn.Linear(d, 2 * inner, bias=bias)
        else:
            self.qkv = nn.Linear(d, 3 * inner, bias=bias)
        self.out = nn.Linear(inner, d, bias=bias)

    def forward(self, x: Tensor, memory: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """(..., n, d), and with `cross` a memory (..., m, d), -> (..., n, d); `mask` broadcasts to (..., heads, n, m)."""
        n = _validate.shape("x", x, "...", "n", "d", d=self.d)["n"]
        if self.cross is (memory is None):
            raise ValueError("memory should be given for cross-attention" if self.cross else "memory is for cross-attention only")
        m = n if memory is None else _validate.shape("memory", memory, *x.shape[:-2], "m", "d", d=self.d)["m"]
        shape = torch.Size([*x.shape[:-2], self.heads, n, m])
        seen = view(shape, like=x, mask=mask, causal=self.causal, scale=self.scale, kind=self.kind)
        return self.attend(x, memory, seen).out

    def attend(
        self,
        x: Tensor,
        memory: Tensor | None,
        seen: View,
        *,
        past: tuple[Tensor, Tensor] | None = None,
        positions: Tensor | None = None,
        return_weights: bool = False,
    ) -> Attended:
        """Attention with a prepared `View` and a cache: nothing is checked here.

        Args:
            x: (..., n, d). memory: (..., m, d) with `cross`, unless `past` has its keys and values.
            past: keys and values of the earlier positions (or of the memory). positions: (..., n) for `rotary`.
        """
        if self.cross:
            q = self._split(self.q(x), 1)[0]
            k, v = past if past is not None else self._split(self.kv(memory), 2)  # type: ignore[arg-type]
        else:
            q, k, v = self._split(self.qkv(x), 3)
            if self.rotary:
                at = torch.arange(x.shape[-2], device=x.device) if positions is None else positions.unsqueeze(-2)
                q, k = rotary(q, at), rotary(k, at)
            if past is not None:
                k, v = torch.cat([past[0], k], -2), torch.cat([past[1], v], -2)
        scale = seen.scale
        if scale is not None and (callable(self.kind) or isinstance(scale, Tensor)):
            q, scale = q * (scale * math.sqrt(self.d_head)), None
        weights = None
        if return_weights:
            mixed, weights = attention(q, k, v, scale=scale, mask=seen.mask, causal=seen.causal, return_weights=True)
        elif callable(self.kind):
            mixed = self.kind(q, k, v, causal=seen.causal, **({} if seen.mask is None else {"mask": seen.mask}))
        else:
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen.mask, dropout_p=self.dropout if self.training else 0.0, is_causal=seen.causal, scale=scale
            )
        return Attended(self.out(mixed.transpose(-3, -2).flatten(-2)), k, v, weights)

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(..., n, parts heads d_head) -> `parts` of (..., heads, n, d_head)."""
        return tuple(part.transpose(-3, -2) for part in x.unflatten(-1, (parts, self.heads, self.d_head)).unbind(-3))
