"""Softmax attention, and the O(n m) reference for any other similarity."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from kexue import _validate
from kexue.attention import _inputs


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | Tensor | None = None, mask: Tensor | None = None, causal: bool = False,
    return_weights: Literal[False] = False,
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | Tensor | None = None, mask: Tensor | None = None, causal: bool = False,
    return_weights: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention.

    $$ O = \operatorname{softmax}(\text{scale}\cdot QK^\top + \text{mask})\,V $$

    Source: Vaswani et al., arXiv:1706.03762, eq. (1). It makes the weights and is differentiable twice;
    where neither is needed, `torch.nn.functional.scaled_dot_product_attention` saves their memory.

    Args:
        q: (..., n, d) queries. k: (..., m, d) keys. v: (..., m, d_v) values.
        scale: factor of the logits, a number or broadcastable to (..., n, 1); default 1 / sqrt(d).
        mask: broadcastable to (..., n, m); boolean (True: may attend) or floating (added to the logits, in nats).
        causal: let query i see keys j <= i + m - n, so that the last query sees all keys (m > n: a cache).
        return_weights: also return the weights.

    Returns:
        (..., n, d_v), or with `return_weights` also the weights (..., n, m), whose rows sum to 1.

    Raises:
        TypeError, ValueError: mismatched shapes or dtypes, non-finite input, a query that may attend to nothing.

    Complexity: O(n m (d + d_v)) time, O(n m) memory.
    """
    n, _ = _inputs.check(q, k, v)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if isinstance(scale, Tensor):
        _validate.broadcasts("scale", scale, (*torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]), n, 1))
        _validate.floating(q=q, scale=scale)
        _validate.finite(scale=scale)
    else:
        _validate.number("scale", scale)
    logits = scale * q @ k.mT
    logits = _inputs.masked(logits, mask, causal, logits.shape)  # the name goes over, so that only one stays in memory
    weights = logits.softmax(-1)
    out = weights @ v
    return (out, weights) if return_weights else out


def similarity_attention(similarity: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Attention for any similarity, the O(n m) reference of every linear form.

    $$ O_i = \sum_j s_{ij} v_j \Big/ \sum_j s_{ij} $$

    It is an average of the values where $s \ge 0$. With the identity matrix as `v` it returns the weights.

    Source: article 7546 of kexue.fm; Wang et al., *Non-local neural networks*, arXiv:1711.07971, eq. (1).

    Args:
        similarity: (..., n, m). v: (..., m, d_v).
        mask: boolean, broadcastable to (..., n, m); False leaves a pair out.

    Returns:
        (..., n, d_v).

    Raises:
        TypeError, ValueError: mismatched shapes or dtypes, non-finite input, a row whose sum vanishes.
    """
    sizes = _validate.shape("similarity", similarity, "...", "n", "m")
    _validate.shape("v", v, "...", "m", "d_v", m=sizes["m"])
    _validate.floating(similarity=similarity, v=v)
    _validate.finite(similarity=similarity, v=v)
    if mask is not None:
        _validate.broadcasts("mask", mask, similarity.shape)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask should be boolean, got {mask.dtype}")
        similarity = similarity * mask
    total = similarity.sum(-1, keepdim=True)
    floor = 4 * torch.finfo(total.dtype).eps * similarity.detach().abs().sum(-1, keepdim=True)
    _inputs.refuse_zero(total.detach().abs() <= floor)
    return (similarity @ v) / total
