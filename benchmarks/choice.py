"""Perturbed-argmax log-probabilities against log-softmax, and the exact exponential rule against quadrature by scipy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor

from benchmarks.common import Row, race
from kexue.choice import GUMBEL, LOGISTIC, NORMAL, perturbed_log_prob


def rows() -> Iterator[Row]:
    gen = torch.Generator().manual_seed(0)
    for n, K in ((1078, 10), (128, 1000), (1024, 1000)):
        mu = torch.randn(n, K, dtype=torch.float64, generator=gen)
        graph = mu.clone().requires_grad_()
        up = torch.randn(n, K, dtype=torch.float64, generator=gen)
        gap = float((perturbed_log_prob(mu, GUMBEL) - mu.log_softmax(-1)).abs().max())
        assert gap < 1e-11
        for noise in (GUMBEL, NORMAL, LOGISTIC):
            note = f"largest difference {gap:.0e}" if noise is GUMBEL else "another law, the same shape of result"
            yield race(
                f"log p, {noise.name} noise, {n} x {K}, float64", lambda m=mu, e=noise: perturbed_log_prob(m, e),
                lambda m=mu: m.log_softmax(-1), "torch log_softmax", repeats=9, note=note,
            )
            yield race(
                f"log p, {noise.name} noise, {n} x {K}, forward and backward",
                lambda m=graph, e=noise, w=up: torch.autograd.grad(perturbed_log_prob(m, e), m, w),
                lambda m=graph, w=up: torch.autograd.grad(m.log_softmax(-1), m, w), "torch log_softmax", repeats=9,
            )
    yield _quad(torch.randn(10, dtype=torch.float64, generator=gen))


def _quad(mu: Tensor) -> Row:
    scores = mu.numpy()

    def one(i: int) -> float:
        others = np.delete(scores, i)
        return float(quad(lambda t: norm.pdf(t - scores[i]) * norm.cdf(t - others).prod(), -12, 12, epsrel=1e-10)[0])

    def peer() -> list[float]:
        return [one(i) for i in range(len(scores))]

    assert np.allclose(perturbed_log_prob(mu, NORMAL).exp().numpy(), peer(), rtol=1e-8)
    return race("p, normal noise, one row of 10", lambda: perturbed_log_prob(mu, NORMAL).exp(), peer, "scipy quad", repeats=3)
