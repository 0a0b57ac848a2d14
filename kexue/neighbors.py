"""Nearest neighbours under dear distances: exact search that a cheap lower bound cuts short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kexue import _validate

__all__ = ["Neighbors", "nearest"]

Evaluate = Callable[[Tensor], Tensor]


class Neighbors(NamedTuple):
    """Result of `nearest`: k candidates, nearest first, and how many full distances were computed."""

    indices: Tensor
    distances: Tensor
    evaluations: int


def nearest(
    distance: Evaluate, n: int, k: int = 1, *, bounds: Sequence[Evaluate] = (), atol: float = 0.0, batch: int = 1
) -> Neighbors:
    """The k nearest of n candidates, exactly, with as few evaluations of the distance as the bounds allow.

    Prefetch and prune: candidates are visited in increasing order of the first bound; one whose bound exceeds the
    k-th best distance so far is never evaluated, and the search ends when all that remain do. Each further bound is
    computed only for the candidates that the earlier ones leave. Any function <= `distance` is a valid bound; the
    result then equals that of a full scan, ties going to the smaller index. Without bounds it is the full scan.

    Source: Kusner et al., From Word Embeddings To Document Distances (2015), section 4.2.

    Args:
        distance: maps candidate numbers, an int64 tensor (b,), to their distances, (b,).
        n: number of candidates, >= 1.
        k: number of neighbours, in [1, n].
        bounds: functions as `distance`, cheapest first.
        atol: absolute rounding error of the bounds, in the unit of the distance; a relative error of 256 eps is
            always allowed for.
        batch: candidates evaluated together, >= 1: more for a distance that is vectorised, at the price of up to
            batch - 1 needless evaluations.

    Returns:
        `Neighbors(indices (k,), distances (k,), evaluations)`.

    Raises:
        TypeError, ValueError: k, n or batch out of range; a distance or bound of wrong shape or dtype, or NaN.

    Complexity: n evaluations at worst; one sort, O(n log n).

    Example:
        >>> from kexue.transport import emd, relaxed_bound
        >>> p, q, cost = torch.full((2,), 0.5), torch.full((9, 3), 1 / 3), torch.rand(9, 2, 3)
        >>> found = nearest(lambda i: emd(p, q[i], cost[i]), 9, k=2, bounds=[lambda i: relaxed_bound(p, q[i], cost[i])])
    """
    _validate.integer("n", n, low=1)
    _validate.integer("k", k, low=1, high=n)
    _validate.integer("batch", batch, low=1)
    _validate.number("atol", atol, low=0.0)
    candidates = torch.arange(n)
    first, *others = [*bounds] or [lambda i: torch.full((len(i),), -torch.inf)]
    lower = _evaluate("bounds[0]", first, candidates)
    order = lower.argsort(stable=True)
    candidates, lower = candidates[order], lower[order]

    start = min(max(k, batch), n)  # nothing can be pruned before k distances are known
    indices, distances = _best(candidates[:start], _evaluate("distance", distance, candidates[:start]), k)
    evaluations = start
    candidates, lower = candidates[start:], lower[start:]
    for level, bound in enumerate(others, 1):
        keep = lower <= _limit(distances, atol)
        candidates, lower = candidates[keep], lower[keep]
        if len(candidates):
            lower = torch.maximum(lower, _evaluate(f"bounds[{level}]", bound, candidates).to(lower))
    if others:
        order = lower.argsort(stable=True)
        candidates, lower = candidates[order], lower[order]
    while len(candidates) and lower[0] <= (limit := _limit(distances, atol)):
        now = candidates[:batch][lower[:batch] <= limit]
        found = _evaluate("distance", distance, now)
        evaluations += len(now)
        indices, distances = _best(torch.cat([indices, now]), torch.cat([distances, found]), k)
        candidates, lower = candidates[batch:], lower[batch:]
    return Neighbors(indices, distances, evaluations)


def _evaluate(name: str, function: Evaluate, candidates: Tensor) -> Tensor:
    values = function(candidates)
    _validate.shape(f"{name}(i)", values, "b", b=len(candidates))
    _validate.floating(**{f"{name}(i)": values})
    if values.isnan().any():
        raise ValueError(f"{name}(i) has {int(values.isnan().sum())} NaN of {len(values)}")
    return values.detach()


def _best(indices: Tensor, distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest distances, ties by index."""
    order = indices.argsort()
    order = order[distances[order].argsort(stable=True)][:k]
    return indices[order], distances[order]


def _limit(distances: Tensor, atol: float) -> float:
    worst = float(distances[-1])
    return worst + atol + 256 * torch.finfo(distances.dtype).eps * abs(worst)
