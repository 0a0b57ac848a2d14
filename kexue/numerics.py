"""Numbers about matrices, computations and measurements: effective rank, peak memory, power laws."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kexue import _validate


def effective_rank(A: Tensor, energy: float = 0.99) -> Tensor:
    r"""Number of singular values that hold a share of the energy.

    $$ \min\{m : \sum_{i\le m}\sigma_i^2 \ge \text{energy}\cdot\sum_i\sigma_i^2\} $$

    By Eckart and Young's theorem this is the least rank of an approximation whose squared Frobenius
    error is at most `(1 - energy)` times ``|A|^2``.

    Source: article 7546 of kexue.fm, where it decides how many summary tokens Linformer (arXiv:2006.04768) needs.

    Args:
        A: (..., n, m), finite.
        energy: share in (0, 1].

    Returns:
        int64 (...), between 1 and min(n, m); 0 for a zero matrix.

    Raises:
        TypeError, ValueError: not a floating tensor, fewer than two axes, non-finite entries, `energy` out of range.

    Complexity: O(n m min(n, m)), one singular value decomposition per matrix.

    Example:
        >>> effective_rank(torch.diag(torch.tensor([3.0, 1.0, 0.1])), energy=0.99)
        tensor(2)
    """
    _validate.shape("A", A, "...", "n", "m")
    _validate.floating(A=A)
    _validate.finite(A=A)
    _validate.number("energy", energy, low=0.0, high=1.0, open_low=True)
    held = torch.linalg.svdvals(A.detach()).square().cumsum(-1)
    return (held < energy * held[..., -1:]).sum(-1) + (held[..., -1] > 0)


class PeakMemory(TorchDispatchMode):
    """Count the bytes that torch tensors made inside the block occupy at one time.

    `peak` is the largest sum of the sizes of the storages made inside the block and still alive after
    some operation; tensors that autograd keeps count, scratch memory inside one operation does not. It
    is a count, so it is the same on every machine; `torch.utils.flop_counter.FlopCounterMode` is its
    counterpart for arithmetic.

    Example:
        >>> with PeakMemory() as memory:
        ...     _ = torch.zeros(1000).exp().sum()
        >>> memory.peak
        8000
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._held = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in known:
                known.add(storage._cdata)
                self._sizes[storage._cdata] = storage.nbytes()
                self._held += storage.nbytes()
                weakref.finalize(storage, self._release, storage._cdata).atexit = False
        self.peak = max(self.peak, self._held)
        return out

    def _release(self, storage: int) -> None:
        self._held -= self._sizes.pop(storage)


class PowerLaw(NamedTuple):
    """y = scale * x^exponent: least squares in the logarithms, and the standard error of the exponent."""

    exponent: Tensor
    scale: Tensor
    stderr: Tensor


def fit_power_law(x: Tensor, y: Tensor) -> PowerLaw:
    r"""Exponent and scale of a power law, by least squares in the logarithms.

    $$ \log y \approx \log\text{scale} + \text{exponent}\cdot\log x $$

    The standard error takes the residuals as independent; of the states of one run they are not, so compare runs.

    Args:
        x: (..., n), positive, at least 3 distinct values in each row.
        y: (..., n), positive; leading axes broadcast with those of `x`.

    Returns:
        PowerLaw of three tensors (...).

    Raises:
        TypeError, ValueError: not floating, lengths that differ, fewer than 3 distinct x, entries <= 0 or not finite.

    Complexity: O(n) for each row.

    Example:
        >>> fit_power_law(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([3.0, 12.0, 48.0, 192.0])).exponent
        tensor(2.)
    """
    sizes = _validate.shape("x", x, "...", "n")
    _validate.shape("y", y, "...", "n", n=sizes["n"])
    _validate.floating(x=x, y=y)
    _validate.finite(x=x, y=y)
    for name, values in {"x": x, "y": y}.items():
        if bad := int((values <= 0).sum()):
            raise ValueError(f"{name} has {bad} entries <= 0, which have no logarithm")
    distinct = (x.sort(-1).values.diff(dim=-1) > 0).sum(-1) + 1
    if sizes["n"] < 3 or int(distinct.min()) < 3:
        raise ValueError(f"x has {min(sizes['n'], int(distinct.min()))} distinct values; a standard error needs at least 3")
    u, v = x.log(), y.log()
    du, dv = u - u.mean(-1, keepdim=True), v - v.mean(-1, keepdim=True)
    spread = du.square().sum(-1)
    exponent = (du * dv).sum(-1) / spread
    rest = (dv - exponent[..., None] * du).square().sum(-1) / (sizes["n"] - 2)
    return PowerLaw(exponent, (v.mean(-1) - exponent * u.mean(-1)).exp(), (rest / spread).sqrt())
