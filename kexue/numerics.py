"""Numbers about matrices and computations: effective rank, peak memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
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
        self.peak = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {StorageWeakRef(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **kwargs)
        self._alive = {ref: size for ref, size in self._alive.items() if not ref.expired()}
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                ref = StorageWeakRef(storage)
                if ref not in given:
                    self._alive[ref] = storage.nbytes()
        self.peak = max(self.peak, sum(self._alive.values()))
        return out
