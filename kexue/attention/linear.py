"""Linear attention: feature maps, and sums over keys that never make the n x m matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from kexue import _validate
from kexue.attention import _inputs

FeatureMap = Callable[[Tensor], Tensor]


def elu1(x: Tensor) -> Tensor:
    """elu(x) + 1 > 0, D = d; Katharopoulos et al., arXiv:2006.16236, eq. (7). Exact where `F.elu(x) + 1` rounds to 0."""
    return x.clamp(max=0).exp() + F.relu(x)


def relu(x: Tensor) -> Tensor:
    """max(x, 0), D = d: similarities may vanish."""
    return F.relu(x)


def cos(x: Tensor) -> Tensor:
    """[1; x/|x|], D = d + 1: the similarity 1 + cos(q, k) of article 7546; x = 0 counts as orthogonal to all."""
    unit = F.normalize(x, dim=-1)
    return torch.cat([torch.ones_like(x[..., :1]), unit], -1)


def taylor2(x: Tensor) -> Tensor:
    """[1; x; x_i x_j (i < j); x_i^2 / sqrt 2], D = 1 + d + d (d + 1) / 2: the similarity 1 + q.k + (q.k)^2 / 2 >= 1/2.

    The symmetrised second-order Taylor map of exp(q.k), about half as wide as [1; x; x (x) x / sqrt 2] of
    "Based" (arXiv:2402.18668). No scale is applied: pass q / sqrt(d) for scaled logits.
    """
    d = x.shape[-1]
    i, j = torch.triu_indices(d, d, device=x.device)
    weight = torch.ones(len(i), dtype=x.dtype, device=x.device).masked_fill_(i == j, math.sqrt(0.5))
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., i] * x[..., j] * weight], -1)


feature_maps: dict[str, FeatureMap] = {"elu1": elu1, "relu": relu, "cos": cos, "taylor2": taylor2}
"""Maps phi: (..., d) -> (..., D) by name; the similarity is phi(q).phi(k)."""
_NON_NEGATIVE = (elu1, relu)


class LinearAttentionState(NamedTuple):
    r"""What linear attention remembers of its past: the same size after any number of tokens.

    $$ S = \sum_j \varphi(k_j) v_j^\top, \qquad z = \sum_j \varphi(k_j) $$

    Both methods take *features*, `phi(k)` and `phi(q)`. The state is immutable: `update` returns a new one.

    Args:
        S: (..., D, d_v). z: (..., D).

    Source: Katharopoulos et al., *Transformers are RNNs*, arXiv:2006.16236, eqs. (18)-(20).
    """

    S: Tensor
    z: Tensor

    def update(self, features: Tensor, v: Tensor) -> LinearAttentionState:
        """The state after n more tokens, from their keys' features (..., n, D) and values (..., n, d_v), in O(n D d_v)."""
        return LinearAttentionState(self.S + features.mT @ v, self.z + features.sum(-2))

    def read(self, features: Tensor, *, eps: float = 0.0, normalize: bool = True) -> Tensor:
        """Attention (..., n, d_v) of n queries, given by their features (..., n, D), to the whole past, in O(n D d_v).

        Raises:
            ValueError: a denominator that is zero up to rounding (with eps = 0).
        """
        num, total = self._sums(features)
        if not normalize:
            return num
        total = total + eps
        _inputs.refuse_zero(total <= _noise(features, _norm(self.z.unsqueeze(-2)), self.z) if not eps else total <= 0)
        return num / total

    def _sums(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Numerators (..., n, d_v) and denominators (..., n, 1)."""
        return f @ self.S, (f * self.z.unsqueeze(-2)).sum(-1, keepdim=True)


@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, feature_map: str | FeatureMap = "elu1", *, causal: bool = False, chunk: int = 64,
    eps: float = 0.0, normalize: bool = True, state: LinearAttentionState | None = None, return_state: Literal[False] = False,
) -> Tensor: ...
@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, feature_map: str | FeatureMap = "elu1", *, causal: bool = False, chunk: int = 64,
    eps: float = 0.0, normalize: bool = True, state: LinearAttentionState | None = None, return_state: Literal[True],
) -> tuple[Tensor, LinearAttentionState]: ...
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str | FeatureMap = "elu1",
    *,
    causal: bool = False,
    chunk: int = 64,
    eps: float = 0.0,
    normalize: bool = True,
    state: LinearAttentionState | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, LinearAttentionState]:
    r"""Attention with a factorised similarity, in time linear in n.

    $$ O_i = \frac{\varphi(q_i)^\top S_i}{\varphi(q_i)^\top z_i + \epsilon}, \qquad
       S_i = \sum_j \varphi(k_j) v_j^\top, \quad z_i = \sum_j \varphi(k_j) $$

    with j over all keys, or j <= i if `causal`. The causal form goes through the tokens in chunks: the past
    through the state, the chunk itself through a masked chunk x chunk product. Nothing of size n D d_v is made.

    Source: article 7546 of kexue.fm; Katharopoulos et al., *Transformers are RNNs*, arXiv:2006.16236; the
    chunks as in Yang et al., arXiv:2312.06635, section 3. Differs from them: the denominator is never clamped in silence.

    Args:
        q: (..., n, d) queries. k: (..., m, d) keys; m = n if causal. v: (..., m, d_v) values.
        feature_map: name in `feature_maps`, or a function (..., d) -> (..., D). No scale is applied to q or k.
        causal: see only the past and the present.
        chunk: tokens per step, >= 1; it changes speed and memory, not the result.
        eps: added to the denominator, >= 0, in the unit of the similarity.
        normalize: divide by the denominator.
        state: the past to start from (a prefix, a cache); default: none.
        return_state: also return the state after the last key, for decoding: call again with one token.

    Returns:
        (..., n, d_v), or with `return_state` also a `LinearAttentionState`.

    Raises:
        TypeError, ValueError: mismatched shapes or dtypes, non-finite input, unknown map, `chunk` < 1, a
            denominator that is zero up to rounding (with eps = 0), features that overflow.

    Complexity: O(n D d_v + n chunk (D + d_v)) time, O(D d_v + chunk (D + d_v + chunk)) working memory per
    head beside the output; autograd keeps the features and n / chunk states.

    Example:
        >>> q, k, v = torch.randn(3, 2, 8, 100, 16).unbind()
        >>> prompt, state = linear_attention(q, k, v, causal=True, return_state=True)
        >>> token, state = linear_attention(*torch.randn(3, 2, 8, 1, 16).unbind(), causal=True, state=state, return_state=True)
    """
    n, m = _inputs.check(q, k, v)
    _validate.integer("chunk", chunk, low=1)
    _validate.number("eps", eps, low=0.0)
    if callable(feature_map):
        phi = feature_map
    else:
        _validate.choice("feature_map", feature_map, feature_maps)
        phi = feature_maps[feature_map]
    if causal and m != n:
        raise ValueError(f"causal linear attention needs one key per query, got {m} keys and {n} queries")

    def features(x: Tensor) -> Tensor:
        f = phi(x)
        if not isinstance(f, Tensor) or f.shape[:-1] != x.shape[:-1] or f.dtype != x.dtype:
            got = f"{f.dtype} {tuple(f.shape)}" if isinstance(f, Tensor) else type(f).__name__
            raise ValueError(f"feature_map should turn {x.dtype} {tuple(x.shape)} into (..., D) of the same dtype, got {got}")
        return f

    past = _start(state, features(k[..., :1, :]), v)
    outs: list[Tensor] = []
    vanishing: list[Tensor] = []

    def divide(num: Tensor, total: Tensor, noise: Tensor | float) -> None:
        if normalize:
            total = total + eps
            vanishing.append(total.detach() <= (0.0 if eps else noise))
            num = num / total
        outs.append(num)

    exact = phi in _NON_NEGATIVE  # sums of terms >= 0 do not cancel
    if causal:
        for q_c, k_c, v_c in zip(q.split(chunk, -2), k.split(chunk, -2), v.split(chunk, -2)):
            f, g = features(q_c), features(k_c)
            inner = (f @ g.mT).tril()
            num, total = past._sums(f)
            noise = 0.0 if exact else _noise(f, _norm(past.z.unsqueeze(-2)) + _norm(g).cumsum(-2), past.z, g)
            divide(num + inner @ v_c, total + inner.sum(-1, keepdim=True), noise)
            past = past.update(g, v_c)
    else:
        for k_c, v_c in zip(k.split(chunk, -2), v.split(chunk, -2)):
            past = past.update(features(k_c), v_c)
        for q_c in q.split(chunk, -2):
            f = features(q_c)
            num, total = past._sums(f)
            divide(num, total, 0.0 if exact else _noise(f, _norm(past.z.unsqueeze(-2)), past.z))
    if normalize:
        _inputs.refuse_zero(torch.cat(vanishing, -2))
    out = torch.cat(outs, -2)
    _validate.finite(**{"the result of linear_attention": out})
    return (out, past) if return_state else out


def efficient_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, chunk: int = 16) -> Tensor:
    r"""Efficient Attention: a softmax over the features of each query, another over the positions of all keys.

    $$ O_i = \sum_f \operatorname{softmax}_f(q_i)_f \;\sum_{j} \frac{e^{k_{jf}}}{\sum_{l} e^{k_{lf}}} v_j $$

    with j, l over all keys, or j, l <= i if `causal`. Each feature keeps its own normaliser: the causal form
    carries the running average of the values and the running log-normaliser per feature, so that no
    exponential exceeds 1 and logits of any size are safe.

    Source: Shen et al., *Efficient Attention*, arXiv:1812.01243; article 7546 of kexue.fm. The causal form is
    the only one that does not look ahead through the normalisers.

    Args:
        q: (..., n, d). k: (..., m, d), m = n if causal. v: (..., m, d_v). No scale is applied.
        causal: see only the past and the present.
        chunk: tokens per step of the causal form, >= 1.

    Returns:
        (..., n, d_v): averages of the values, with weights >= 0 that sum to 1.

    Raises:
        TypeError, ValueError: mismatched shapes or dtypes, non-finite input, `chunk` < 1.

    Complexity: O(n d d_v); the causal form O(n d d_v + n chunk (d + d_v)) with chunk^2 d numbers per head at a time.
    """
    n, m = _inputs.check(q, k, v)
    _validate.integer("chunk", chunk, low=1)
    mix = q.softmax(-1)
    if not causal:
        return mix @ (k.softmax(-2).mT @ v)
    if m != n:
        raise ValueError(f"causal efficient attention needs one key per query, got {m} keys and {n} queries")
    past = torch.full_like(k[..., :1, :], -math.inf)  # log-normaliser of each feature so far
    summary = torch.zeros((), dtype=v.dtype, device=v.device)  # running average of the values per feature, (..., d, d_v)
    parts = []
    for f, g, v_c in zip(mix.split(chunk, -2), k.split(chunk, -2), v.split(chunk, -2)):
        log_z = torch.logaddexp(past, g.logcumsumexp(-2))
        c = g.shape[-2]
        ahead = torch.ones(c, c, dtype=torch.bool, device=g.device).triu(1).unsqueeze(-1)
        share = (g.unsqueeze(-3) - log_z.unsqueeze(-2)).masked_fill(ahead, -math.inf).exp()
        inner = torch.einsum("...if,...ijf->...ij", f, share)
        kept = (past - log_z).exp()
        parts.append(inner @ v_c + (f * kept) @ summary if summary.ndim else inner @ v_c)
        summary = kept[..., -1, :, None] * summary + share[..., -1, :, :].mT @ v_c
        past = log_z[..., -1:, :]
    return torch.cat(parts, -2)


def _start(state: LinearAttentionState | None, features: Tensor, v: Tensor) -> LinearAttentionState:
    """The given past after a check, or an empty one."""
    d, d_v = features.shape[-1], v.shape[-1]
    if state is None:
        batch = torch.broadcast_shapes(features.shape[:-2], v.shape[:-2])
        return LinearAttentionState(v.new_zeros(*batch, d, d_v), v.new_zeros(*features.shape[:-2], d))
    _validate.shape("state.S", state.S, "...", "D", "d_v", D=d, d_v=d_v)
    _validate.shape("state.z", state.z, "...", "D", D=d)
    _validate.floating(v=v, **{"state.S": state.S, "state.z": state.z})
    return state


def _norm(features: Tensor) -> Tensor:
    """Euclidean norms of the last axis, without gradient: (..., n, D) -> (..., n, 1)."""
    return torch.linalg.vector_norm(features.detach(), dim=-1, keepdim=True)


def _noise(f: Tensor, size: Tensor, *others: Tensor) -> Tensor:
    """Rounding error of sums over g of f . g with sum of |g| = size; zero if no feature is negative: nothing cancels."""
    signed = torch.stack([(x.detach() < 0).any() for x in (f, *others)]).any()
    return 4 * torch.finfo(f.dtype).eps * _norm(f) * size * signed
