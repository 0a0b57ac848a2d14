"""Metrics and their optima: smooth F1, the F1-optimal rule, the exact minimum of the 0-1 error of a line."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kexue import _validate

__all__ = ["F1Optimum", "F1Weights", "ZeroOne", "dinkelbach_f1", "f1_weights", "smooth_f1", "zero_one_1d", "zero_one_2d"]


def smooth_f1(p: Tensor, y: Tensor) -> Tensor:
    r"""F1 with probabilities in the place of decisions.

    $$ F_s = \frac{2\sum yp}{\sum y+\sum p} $$

    With decisions p in {0, 1} it is F1; with probabilities y = P(positive | x) too, it is F1 in the population. A ratio
    of sums: its mean over batches is not its value on the whole. $1-F_s$ is the dice loss.

    Source: article 7708 of kexue.fm, (5).

    Args:
        p: (..., N), in [0, 1]. y: (..., N), in [0, 1], of the dtype of p, with a positive sum in each row.

    Returns:
        (...), in [0, 1], differentiable.

    Raises:
        TypeError, ValueError: shapes or dtypes that differ, values outside [0, 1], NaN, a row without positives.

    Example:
        >>> smooth_f1(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]))
        tensor(0.5000)
    """
    n = _validate.shape("p", p, "...", "N")["N"]
    _validate.shape("y", y, "...", "N", N=n)
    _validate.floating(p=p, y=y)
    _unit(p=p, y=y)
    positives = y.sum(-1)
    if bool((positives <= 0).any()):
        raise ValueError(f"y has {int((positives <= 0).sum())} rows without positives; F1 needs at least one")
    return 2 * (y * p).sum(-1) / (positives + p.sum(-1))


class F1Weights(NamedTuple):
    """Weights of the positive and the negative samples in a cross-entropy that follows F1."""

    positive: Tensor
    negative: Tensor


def f1_weights(f1: Tensor) -> F1Weights:
    r"""Weights $(2-F, F)$ of positives and negatives, without gradient.

    The gradient of smooth F1 is that of smooth accuracy with these weights, up to a positive factor. In a cross-entropy
    with these weights, refreshed with the *hard* F1 of the thresholded classifier, the fixed point is F1-optimal; with
    the smooth F1 it is not.

    Source: article 7708 of kexue.fm, (7) to (9), doubled (its text before April 2021 had (1 - F, F)).

    Raises:
        TypeError, ValueError: f1 not floating, or outside [0, 1].

    Example:
        >>> f1_weights(torch.tensor(0.5))
        F1Weights(positive=tensor(1.5000), negative=tensor(0.5000))
    """
    _validate.floating(f1=f1)
    _unit(f1=f1)
    return F1Weights(2 - f1.detach(), f1.detach())


class F1Optimum(NamedTuple):
    """Result of `dinkelbach_f1`: decide for positive iff eta > threshold = f1 / 2; `history` is F1 at each step."""

    f1: float
    threshold: float
    history: tuple[float, ...]


def dinkelbach_f1(eta: Tensor) -> F1Optimum:
    r"""The largest F1 that decisions can have, given each sample's probability of being positive.

    Maximises $F[h]=2\sum\eta h/\sum(\eta+h)$ over all $h\in\{0,1\}^N$. The optimum is $h=1[\eta>F^*/2]$ with
    $2\sum(\eta-F^*/2)_+=F^*\sum\eta$; the iteration $F\leftarrow F[1(\eta>F/2)]$ from 0 increases, and ends in finitely
    many steps (superlinearly). At equality $\eta=F^*/2$ both decisions have the same F1.

    Source: Dinkelbach (1967) for ratios; Lipton et al., arXiv:1402.1892, for the threshold F*/2.

    Args:
        eta: (N,), in [0, 1], not all zero.

    Returns:
        F1Optimum, computed in float64.

    Raises:
        TypeError, ValueError: eta not floating, not one-dimensional, outside [0, 1], or without positive mass.

    Complexity: O(N) for each of some 5 to 10 steps.

    Example:
        >>> dinkelbach_f1(torch.tensor([0.9, 0.4, 0.1], dtype=torch.float64)).threshold
        0.382...
    """
    _validate.shape("eta", eta, "N")
    _validate.floating(eta=eta)
    _unit(eta=eta)
    values = eta.detach().double()
    mass = float(values.sum())
    if not mass > 0:
        raise ValueError("eta has no positive mass; F1 needs at least one sample that may be positive")
    history: list[float] = []
    f1 = 0.0
    while True:
        h = values > f1 / 2
        reached = 2 * float(values[h].sum()) / (mass + int(h.sum()))
        if history and reached <= f1:
            return F1Optimum(f1, f1 / 2, tuple(history))
        history.append(f1 := reached)


class ZeroOne(NamedTuple):
    """A linear rule of least 0-1 error: positive iff x @ normal > threshold; `errors` of the given samples are wrong."""

    errors: int
    normal: Tensor
    threshold: float


def zero_one_1d(x: Tensor, y: Tensor) -> ZeroOne:
    """The exact minimum of the number of errors over all thresholds and both signs.

    The referee of surrogate losses in one dimension. Among several optima the leftmost threshold, positive to the right
    of it if both sides serve.

    Args:
        x: (N,), finite. y: (N,), bool or int64 in {0, 1}.

    Returns:
        ZeroOne; `normal` is (1,), +1 or -1, of the dtype of x, and x * normal > threshold is the rule.

    Raises:
        TypeError, ValueError: wrong shapes or dtypes, labels other than 0 and 1, non-finite x, N = 0.

    Complexity: O(N log N).

    Example:
        >>> zero_one_1d(torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0, 0, 1, 1]))
        ZeroOne(errors=0, normal=tensor([1.]), threshold=1.5)
    """
    n = _validate.shape("x", x, "N")["N"]
    positive = _samples(x, y, n)
    values, order = x.detach().double().sort()
    # With k of the sorted samples on the left: errors of "positive on the right", at k where the value changes.
    sign = 1 - 2 * positive[order].long()  # +1: an error if called positive
    left = torch.cat([sign.new_zeros(1), (-sign).cumsum(0)])
    errors = left + int((~positive).sum())
    ends = torch.ones(n + 1, dtype=torch.bool, device=x.device)
    ends[1:-1] = values[1:] > values[:-1]
    cuts = ends.nonzero().flatten()
    up, down = errors[cuts], n - errors[cuts]
    rising = int(up.min()) <= int(down.min())
    k = int(cuts[(up if rising else down).argmin()])
    low = float(values[k - 1]) if k else float(values[0]) - 1
    high = float(values[k]) if k < n else float(values[-1]) + 1
    if not low < high:  # beyond the last digit of a huge value
        low, high = (-math.inf, high) if k == 0 else (low, math.inf)
    middle = low + (high - low) / 2
    if rising:  # x > t with t in [low, high)
        return ZeroOne(int(up.min()), x.new_ones(1), middle if middle < high else low)
    return ZeroOne(int(down.min()), -x.new_ones(1), -(middle if middle > low else high))


def zero_one_2d(x: Tensor, y: Tensor) -> ZeroOne:
    """The exact minimum of the number of errors over all lines in the plane.

    Any dichotomy by a line is one by a line through a sample, that sample on either side, in a direction in which no
    other sample lies; around each sample the half-plane's count is swept by angle. Directions that agree to 1e-12 count
    as one (samples on one line), so a separation that needs a finer angle is not found. The rule that is returned has
    been counted again.

    Source: enumeration as in Nguyen and Sanner, ICML 2013, here with a sweep.

    Args:
        x: (N, 2), finite. y: (N,), bool or int64 in {0, 1}.

    Returns:
        ZeroOne; `normal` is (2,), float64, of length 1.

    Raises:
        TypeError, ValueError: wrong shapes or dtypes, labels other than 0 and 1, non-finite x, N = 0.
        ArithmeticError: rounding lets no line of the least count be written down.

    Complexity: O(N² log N) time, O(N) memory; 600 samples in a tenth of a second.

    Example:
        >>> zero_one_2d(torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 0, 1, 1])).errors
        1
    """
    n = _validate.shape("x", x, "N", 2)["N"]
    positive = _samples(x, y, n)
    points = x.detach().double()
    sign = 1 - 2 * positive.long()  # +1: an error if called positive
    positives = int(positive.sum())
    best: list[tuple[int, float, int, float, bool]] = []  # errors, minus the free angle, pivot, direction, pivot called positive
    for i in range(n):
        d = points - points[i]
        others = (d != 0).any(1)
        own = int(sign[~others].sum())  # the pivot and its copies
        errors, width, direction = positives + min(own, 0), 2 * math.pi, 0.0
        if bool(others.any()):
            s, angle = sign[others], torch.atan2(d[others, 1], d[others, 0])
            enter, leave = (torch.remainder(angle + turn, 2 * math.pi) for turn in (-math.pi / 2, math.pi / 2))
            at, order = torch.cat([enter, leave]).sort()
            inside = int(s[enter > leave].sum()) + torch.cat([s, -s])[order].cumsum(0)  # after each event
            free = torch.cat([at[1:], at[:1] + 2 * math.pi]) - at
            real = free > 1e-12
            least = int(inside[real].min())
            k = int(torch.where(real & (inside == least), free, 0).argmax())
            errors, width, direction = errors + least, float(free[k]), float(at[k] + free[k] / 2)
        best.append((errors, -width, i, direction, own < 0))
    best.sort()
    for errors, _, i, direction, called in best:
        if errors > best[0][0]:
            break
        normal = points.new_tensor([math.cos(direction), math.sin(direction)])
        along = points @ normal
        copies = (points == points[i]).all(1)
        if called:
            rest = along[~copies & (along < along[i])]
            threshold = float((along[copies].min() + rest.max()) / 2 if len(rest) else along[copies].min() - 1)
        else:
            rest = along[~copies & (along > along[i])]
            threshold = float((along[copies].max() + rest.min()) / 2 if len(rest) else along[copies].max() + 1)
        if int(((along > threshold) != positive).sum()) == errors:
            return ZeroOne(errors, normal, threshold)
    raise ArithmeticError(f"no line of {best[0][0]} errors survives rounding; scale the samples to the order of 1 around 0")


def _samples(x: Tensor, y: Tensor, n: int) -> Tensor:
    """Validate samples and labels; the labels as bool."""
    _validate.shape("y", y, "N", N=n)
    _validate.floating(x=x)
    if y.dtype not in (torch.bool, torch.int64):
        raise TypeError(f"y should be bool or int64 labels in {{0, 1}}, got {y.dtype}")
    if n < 1:
        raise ValueError("x has no samples; expected at least one")
    _validate.finite(x=x)
    if bool(((y != 0) & (y != 1)).any()):
        raise ValueError(f"y should hold 0 and 1 only, got values from {int(y.min())} to {int(y.max())}")
    return y.bool()


def _unit(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if bad := int((~((tensor >= 0) & (tensor <= 1))).sum()):
            raise ValueError(f"{name} has {bad} entries outside [0, 1] or NaN")
