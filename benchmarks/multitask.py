"""Directions for several tasks against torchjd: the min-norm point, the projection on the dual cone, a power mean."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
from scipy.stats import pmean
from torchjd.aggregation import MGDA, DualProj
from torchjd.aggregation._mgda import MGDAWeighting

from benchmarks.common import Row, race
from kexue.multitask import min_norm_point, power_mean, project_on_dual_cone

TASKS, WIDTH = 8, 100_000


def rows() -> Iterator[Row]:
    gen = torch.Generator().manual_seed(0)
    G = torch.randn(TASKS, WIDTH, dtype=torch.float64, generator=gen) + 0.3
    G[0] *= 3
    yield from _min_norm(G)
    if importlib.util.find_spec("quadprog"):
        yield _dual_cone(torch.randn(TASKS + 1, WIDTH, dtype=torch.float64, generator=gen))
    yield _mean(gen)


def _gap(gram: torch.Tensor, alpha: torch.Tensor) -> float:
    return float(alpha @ gram @ alpha - (gram @ alpha).min())


def _min_norm(G: torch.Tensor) -> Iterator[Row]:
    gram, frank_wolfe = G @ G.mT, MGDAWeighting()
    ours, theirs = _gap(gram, min_norm_point(gram).alpha), _gap(gram, frank_wolfe(gram))
    assert abs(ours) < 1e-6 * theirs
    task = f"min-norm point of {TASKS} tasks x {WIDTH:,} parameters"
    note = f"relative gap {abs(ours) / float(gram.diagonal().min()):.0e} against {theirs / float(gram.diagonal().min()):.0e}"
    yield race(
        f"{task}, weights from the Gram matrix (x 20)", lambda: [min_norm_point(gram) for _ in range(20)],
        lambda: [frank_wolfe(gram) for _ in range(20)], "torchjd MGDA", note=note, repeats=21,
    )

    def direction() -> torch.Tensor:
        return min_norm_point(G @ G.mT).alpha @ G

    yield race(f"{task}, direction from the gradients", direction, lambda: MGDA()(G), "torchjd MGDA", note=note, repeats=21)
    patient = MGDA(epsilon=1e-12, max_iters=3000)
    theirs = _gap(gram, patient.gramian_weighting(gram))
    assert abs(ours) < 1e-6 * theirs
    yield race(
        f"{task}, direction, a patient peer", direction, lambda: patient(G), "torchjd MGDA, 3000 steps",
        note=f"relative gap of the peer still {theirs / float(gram.diagonal().min()):.0e}", repeats=5,
    )


def _dual_cone(rows: torch.Tensor) -> Row:
    g, helpers = rows[0].clone(), rows[1:].clone()
    peer = DualProj(torch.eye(TASKS + 1, dtype=torch.float64)[0])
    ours, theirs = (_violation(u, g, helpers) for u in (project_on_dual_cone(g, helpers).u, peer(rows)))
    assert ours < 1e-6 * theirs
    return race(
        f"dual cone of {TASKS} helpers x {WIDTH:,} parameters", lambda: project_on_dual_cone(g, helpers), lambda: peer(rows),
        "torchjd DualProj", repeats=41, note=f"KKT residual {ours:.0e} against {theirs:.0e}",
    )


def _violation(u: torch.Tensor, g: torch.Tensor, helpers: torch.Tensor) -> float:
    """Largest cosine by which a helper is harmed, or the main loss' u·(g - u) fails to vanish."""
    harmed = -(helpers @ u / helpers.norm(dim=1)).min() / g.norm()
    return max(float(harmed), float((u @ (g - u)).abs() / g.square().sum()))


def _mean(gen: torch.Generator) -> Row:
    losses = torch.rand(100_000, TASKS, dtype=torch.float64, generator=gen) + 0.1
    array = losses.numpy()
    assert abs(power_mean(losses, 2.5).numpy() - pmean(array, 2.5, axis=1)).max() < 1e-12
    return race(
        f"power mean of {TASKS} losses (x 100,000)", lambda: power_mean(losses, 2.5), lambda: pmean(array, 2.5, axis=1),
        "scipy pmean",
    )
