"""Losses of the true probability, forward and backward, against the same composed by hand of torch's fused cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Row, race
from kexue.losses import SMOOTH_ERROR, focal, logit_adjusted_cross_entropy, margin_cross_entropy, prob_loss, tsallis


def rows() -> Iterator[Row]:
    for n, K in ((4096, 10), (1024, 1000)):
        gen = torch.Generator().manual_seed(0)
        logits = torch.randn(n, K, generator=gen).requires_grad_()
        target = torch.randint(K, (n,), generator=gen)
        log_prior = torch.rand(K, generator=gen).log_softmax(0)
        margin = torch.randn(K, K, generator=gen)

        def log_p(f: Tensor, y: Tensor = target) -> Tensor:
            return -F.cross_entropy(f, y, reduction="none")

        pairs: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
            "cross-entropy": (lambda f, y=target: prob_loss(f, y), lambda f, y=target: F.cross_entropy(f, y)),
            "smooth error": (lambda f, y=target: prob_loss(f, y, SMOOTH_ERROR), lambda f, lp=log_p: (1 - lp(f).exp()).mean()),
            "Tsallis, q = 0.7": (
                lambda f, y=target: prob_loss(f, y, tsallis(0.7)), lambda f, lp=log_p: ((1 - (0.7 * lp(f)).exp()) / 0.7).mean(),
            ),
            "focal, gamma = 2": (
                lambda f, y=target: prob_loss(f, y, focal(2)), lambda f, lp=log_p: _focal(lp(f)),
            ),
            "logit adjustment": (
                lambda f, y=target, p=log_prior: logit_adjusted_cross_entropy(f, y, p),
                lambda f, y=target, p=log_prior: F.cross_entropy(f + p, y),
            ),
            "pairwise margins": (
                lambda f, y=target, m=margin: margin_cross_entropy(f, y, m),
                lambda f, y=target, m=margin: F.cross_entropy(f + m[y], y),
            ),
        }
        for name, (ours, peer) in pairs.items():
            results = [torch.autograd.grad(call(logits), logits)[0] for call in (ours, peer)]
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-7)
            yield race(
                f"{name}, {n} x {K}, forward and backward", lambda f=ours, x=logits: torch.autograd.grad(f(x), x),
                lambda f=peer, x=logits: torch.autograd.grad(f(x), x), "torch's cross_entropy, composed", repeats=101,
            )


def _focal(log_p: Tensor) -> Tensor:
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()
