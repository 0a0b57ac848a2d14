"""Argument checks shared by the topic modules: each error names the argument, what came and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def shape(name: str, tensor: Any, *axes: str | int, **sizes: int) -> dict[str, int]:
    """Match a tensor's shape against axis names; the first axis may be "...".

    Axes named alike must have one size; integers and sizes given by keyword are required. Returns the
    sizes by name.

    >>> sizes = shape("q", torch.zeros(2, 5, 4), "...", "n", "d")
    >>> shape("k", torch.zeros(2, 5, 4), "...", "n", "d", d=sizes["d"])
    {'d': 4, 'n': 5}
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} should be a torch tensor of shape {_expected(axes, sizes)}, got {type(tensor).__name__}")
    named = axes[1:] if axes and axes[0] == "..." else axes
    got = tuple(tensor.shape)
    fits = len(got) >= len(named) if len(named) < len(axes) else len(got) == len(named)
    found = dict(sizes)
    if fits:
        for axis, size in zip(named, got[len(got) - len(named) :], strict=True):
            want = axis if isinstance(axis, int) else found.setdefault(axis, size)
            fits = fits and want == size
    if not fits:
        raise ValueError(f"{name}: expected shape {_expected(axes, sizes)}, got {got}")
    return found


def _expected(axes: tuple[str | int, ...], sizes: dict[str, int]) -> str:
    return "(" + ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else str(axis) for axis in axes) + ")"  # type: ignore[index]


def finite(**tensors: Tensor) -> None:
    """Raise unless every entry of every tensor is finite."""
    for name, tensor in tensors.items():
        if math.isfinite(tensor.detach().sum().item()):  # one fast pass; a sum of finite numbers may overflow, so count below
            continue
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise ValueError(f"{name} has {bad} non-finite entries (NaN or infinity) of {tensor.numel()}")


def broadcasts(name: str, tensor: Any, shape: Sequence[int]) -> None:
    """Raise unless `tensor` broadcasts to `shape`, of which it may add leading axes but none of the last two."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} should be a torch tensor, got {type(tensor).__name__}")
    try:
        fits = torch.broadcast_shapes(tensor.shape, shape)[-2:] == tuple(shape[-2:])
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{name}: expected a shape that broadcasts to {tuple(shape)}, got {tuple(tensor.shape)}")


def floating(**tensors: Tensor) -> None:
    """Raise unless every tensor has a floating dtype, the same for all, on one device."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} should be a torch tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} should have a floating dtype, got {tensor.dtype}")
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device}, {first_name} is {first.dtype} on {first.device}; expected the same"
            )


def choice(name: str, value: Any, known: Any) -> None:
    """Raise unless `value` is one of `known`, which the error lists."""
    if value not in known:
        raise ValueError(f"{name} should be one of {', '.join(map(repr, known))}, got {value!r}")


def classes(name: str, target: Any, shape_: Sequence[int], count: int) -> None:
    """Raise unless `target` holds int64 class numbers in [0, count), at least one, in the given shape."""
    shape(name, target, *shape_)
    if target.dtype != torch.int64:
        raise TypeError(f"{name} should be int64 class numbers, got {target.dtype}")
    if not target.numel():
        raise ValueError(f"{name} should have at least one sample, got shape {tuple(target.shape)}")
    low, high = (int(extreme) for extreme in target.aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"{name} should be in [0, {count - 1}], got {low if low < 0 else high}")


def number(
    name: str, value: Any, *, low: float = float("-inf"), high: float = float("inf"), open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise unless `value` is a real number in [low, high], without low if `open_low` and without high if `open_high`."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (real and (low < value if open_low else low <= value) and (value < high if open_high else value <= high)):
        opens, closes = "(" if open_low else "[", ")" if open_high else "]"
        raise ValueError(f"{name} should be a number in {opens}{low}, {high}{closes}, got {value!r}")


def integer(name: str, value: Any, *, low: int, high: int | None = None) -> None:
    """Raise unless `value` is an integer in [low, high]."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise ValueError(f"{name} should be an integer {f'>= {low}' if high is None else f'in [{low}, {high}]'}, got {value!r}")


def stochastic(name: str, tensor: Any, *, sub: bool = False) -> None:
    """Raise unless the last axis holds probabilities that sum to 1 up to rounding, or with `sub` to at most 1."""
    floating(**{name: tensor})
    finite(**{name: tensor})
    if bool((tensor < 0).any()):
        raise ValueError(f"{name} has {int((tensor < 0).sum())} negative entries; expected probabilities")
    excess = tensor.detach().sum(-1) - 1
    worst = excess.max() if sub else excess.abs().max()
    if float(worst) > 8 * torch.finfo(tensor.dtype).eps * tensor.shape[-1]:
        total = float(1 + excess.flatten()[(excess if sub else excess.abs()).argmax()])
        raise ValueError(f"{name}: rows should sum to {'at most ' if sub else ''}1, found a sum of {total:.9g}")
