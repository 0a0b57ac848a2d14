"""Checks that softmax and linear attention share."""

from __future__ import annotations

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


def refuse_zero(vanishes: Tensor) -> None:
    if count := int(vanishes.sum()):
        first = tuple(vanishes.squeeze(-1).nonzero()[0].tolist())
        raise ValueError(
            f"{count} of {vanishes.numel()} denominators vanish (zero, negative or lost in rounding), the first for query "
            f"{first}: its similarities sum to nothing; use a positive feature map, eps > 0 or normalize=False"
        )
