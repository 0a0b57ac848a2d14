"""Distances between two samples: what generated data are measured with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kexue._validate import finite, floating, integer, shape


def energy_distance(x: Tensor, y: Tensor, *, chunk: int = 4096) -> Tensor:
    r"""Squared energy distance between two samples, the plug-in estimate.

    $D^2 = 2\,\mathbb E|X-Y| - \mathbb E|X-X'| - \mathbb E|Y-Y'|$, with Euclidean norms and means over all
    pairs, the pairs of a point with itself included. It is never negative, and zero iff the two empirical
    laws are the same. That inclusion costs a bias of $\mathbb E|X-X'|/n + \mathbb E|Y-Y'|/m$: compare
    values at equal sample sizes only.

    Source: Székely and Rizzo, Energy statistics, J. Stat. Plan. Inference 143 (2013). In one dimension
    `scipy.stats.energy_distance` is its square root.

    Args:
        x: (n, d), in any unit; y: (m, d), the same dtype and unit.
        chunk: rows of a distance matrix held at once; memory O(chunk · max(n, m)).

    Returns:
        () in the unit of x.

    Raises:
        TypeError, ValueError: not floating, non-finite, empty, or of different widths.

    Time O((n + m)² d).

    >>> energy_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0]]))
    tensor(1.)
    """
    _samples(x, y)
    integer("chunk", chunk, low=1)

    def mean_distance(a: Tensor, b: Tensor) -> Tensor:
        # The direct formula: the one by inner products loses half the digits of a small distance.
        rows = [torch.cdist(part, b, compute_mode="donot_use_mm_for_euclid_dist").sum() for part in a.double().split(chunk)]
        return torch.stack(rows).sum() / (len(a) * len(b))

    a, b = x, y.double()
    return (2 * mean_distance(a, b) - mean_distance(a, a.double()) - mean_distance(y, b)).clamp(min=0).to(x.dtype)


def frechet_gaussian(x: Tensor, y: Tensor) -> Tensor:
    r"""Squared Fréchet (2-Wasserstein) distance between the Gaussians fitted to two samples.

    $|m_x-m_y|^2 + \operatorname{tr}\bigl(C_x + C_y - 2(C_x^{1/2}C_yC_x^{1/2})^{1/2}\bigr)$ with the unbiased
    covariances. On the features of an Inception network this is the FID.

    Source: Dowson and Landau, J. Multivariate Anal. 12 (1982); Heusel et al., arXiv 1706.08500.

    Args:
        x: (n, d), n >= 2, in any unit; y: (m, d), m >= 2, the same dtype and unit. Covariances may be singular.

    Returns:
        () in the squared unit of x, >= 0; computed in float64.

    Raises:
        TypeError, ValueError: not floating, non-finite, fewer than two rows, or of different widths.

    Time O((n + m) d² + d³).

    >>> x = torch.tensor([[-1.0], [1.0]])
    >>> frechet_gaussian(x, 3 * x + 2)  # means 2 apart, deviations √2 and 3√2
    tensor(12.)
    """
    _samples(x, y, at_least=2)
    a, b = x.double(), y.double()
    # With C = RᵀR the cross term is the sum of the singular values of R_x R_yᵀ: no square root of a rounding error.
    roots = [torch.linalg.qr((s - s.mean(0)) / math.sqrt(len(s) - 1), mode="r").R for s in (a, b)]
    cross = torch.linalg.svdvals(roots[0] @ roots[1].mT).sum()
    trace = roots[0].square().sum() + roots[1].square().sum() - 2 * cross
    return ((a.mean(0) - b.mean(0)).square().sum() + trace).clamp(min=0).to(x.dtype)


def _samples(x: Tensor, y: Tensor, *, at_least: int = 1) -> None:
    shape("y", y, "m", "d", d=shape("x", x, "n", "d")["d"])
    floating(x=x, y=y)
    finite(x=x, y=y)
    for name, sample in {"x": x, "y": y}.items():
        if len(sample) < at_least or sample.shape[1] < 1:
            raise ValueError(f"{name} should have at least {at_least} rows and one column, got shape {tuple(sample.shape)}")
