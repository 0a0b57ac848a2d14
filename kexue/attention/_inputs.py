"""Checks and masks that all kinds of attention share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kexue import _validate


def check(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int]:
    """Check shapes (..., n, d), (..., m, d), (..., m, d_v), dtypes and values; return n and m."""
    sizes = _validate.shape("q", q, "...", "n", "d")
    keys = _validate.shape("k", k, "...", "m", "d", d=sizes["d"])
    _validate.shape("v", v, "...", "m", "d_v", m=keys["m"])
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.numel() == 0:
            raise ValueError(f"{name} is empty: shape {tuple(x.shape)}")
    try:
        torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"leading axes do not broadcast: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        ) from None
    _validate.floating(q=q, k=k, v=v)
    _validate.finite(q=q, k=k, v=v)
    return sizes["n"], keys["m"]


def join_masks(
    shape: Sequence[int], mask: Tensor | None, causal: bool, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """What a mask and causality mean for logits (..., n, m): who may attend (None: all), and what is added (None: nothing).

    The last query sees all keys (m > n: a cache). A mask that leaves a query without any key is refused.
    """
    n, m = shape[-2:]
    if causal and m < n:
        raise ValueError(f"causal attention needs at least as many keys as queries, got {m} keys and {n} queries")
    past = torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n) if causal else None
    if mask is None:
        return past, None
    _validate.broadcasts("mask", mask, shape)
    if mask.dtype == torch.bool:
        allowed, added = mask, None
    elif mask.is_floating_point():
        if not bool((mask < math.inf).all()):
            raise ValueError("mask has NaN or +infinity; a floating mask is added to the logits: finite, or -inf to hide")
        allowed, added = mask > -math.inf, mask
    else:
        raise TypeError(f"mask should be boolean or floating, got {mask.dtype}")
    if past is not None:
        allowed = allowed & past
    if empty := int((~allowed).all(-1).sum()):
        raise ValueError(f"mask leaves {empty} queries without any key to attend to")
    return allowed, added


def masked(logits: Tensor, mask: Tensor | None, causal: bool, shape: Sequence[int]) -> Tensor:
    """Logits, which may lack leading axes of `shape`, with the mask added and what may not be seen at -inf."""
    allowed, added = join_masks(shape, mask, causal, logits.device)
    if added is not None:
        logits = logits + added
    return logits if allowed is None else torch.where(allowed, logits, -math.inf)


def refuse_zero(vanishes: Tensor) -> None:
    if count := int(vanishes.sum()):
        first = tuple(vanishes.squeeze(-1).nonzero()[0].tolist())
        raise ValueError(
            f"{count} of {vanishes.numel()} denominators vanish (zero, negative or lost in rounding), the first for query "
            f"{first}: its similarities sum to nothing; use a positive feature map, eps > 0 or normalize=False"
        )
