"""Means, gradients and directions of several tasks against independent solvers, closed forms and their invariances."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize_scalar, nnls
from torchjd.aggregation import MGDA, PCGrad

from kexue import multitask as M

F64 = torch.float64
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 6)
KINDS = ("plain", "scaled", "duplicated", "nearly parallel", "opposed", "zero", "integer", "flat")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(n: int, d: int, seed: int, kind: str = "plain") -> torch.Tensor:
    """Rows that are easy, or hard in one of several legal ways."""
    gen = generator(seed)
    G = torch.randn(n, d, dtype=F64, generator=gen)
    if kind == "scaled":
        G = G * 10.0 ** torch.randint(-15, 16, (n, 1), generator=gen)
    elif kind == "duplicated":
        G[n // 2 :] = G[: n - n // 2].clone()
    elif kind == "nearly parallel":
        G = G[:1] + 1e-7 * G
    elif kind == "opposed":
        G[-1] = -G[0] * (1 + 1e-9)
    elif kind == "zero":
        G[n // 2] = 0
    elif kind == "integer":
        G = G.round()
    elif kind == "flat":
        G = G + 0.9
    return G


def close(a: torch.Tensor, b: torch.Tensor | float, tol: float = 1e-12) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype).expand_as(a), rtol=tol, atol=tol)


def shortest(G: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """Point of conv{rows of G} + cone{rows of H} nearest to 0: the best of all supports, each an equality-constrained problem."""
    n, rows = len(G), torch.cat([G, H]).numpy()
    best = None
    for mask in itertools.product([False, True], repeat=len(rows)):
        held = np.flatnonzero(mask)
        if not (held < n).any():
            continue
        A, s = rows[held], (held < n).astype(float)
        kkt = np.block([[A @ A.T, s[:, None]], [s[None], np.zeros((1, 1))]])
        w = np.linalg.lstsq(kkt, np.r_[np.zeros(len(held)), 1.0], rcond=1e-13)[0][:-1]
        u = w @ A
        if w.min() > -1e-9 and abs(w @ s - 1) < 1e-9 and (best is None or u @ u < best @ best):
            best = u
    assert best is not None
    return torch.from_numpy(best)


# ------------------------------------------------------------------------------------------- power mean


@given(n=sizes, seed=seeds, gamma=st.floats(-50, 50))
def test_power_mean_equals_scipy_and_lies_between_the_extremes(n, seed, gamma):
    losses = torch.rand(n, dtype=F64, generator=generator(seed)) + 0.05
    mean = M.power_mean(losses, gamma)
    if gamma == 0 or abs(gamma) > 1e-3:  # scipy's own formula loses digits below
        close(mean, scipy.stats.pmean(losses.numpy(), gamma), 1e-10)
    assert losses.min() * (1 - 1e-14) <= mean <= losses.max() * (1 + 1e-14)
    assert M.power_mean(losses, gamma + 0.5) >= mean * (1 - 1e-14)


@given(seed=seeds, gamma=st.sampled_from([-math.inf, -3.0, -1.0, 0.0, 1e-9, 0.5, 1.0, 2.0, 40.0, math.inf]))
def test_power_mean_is_homogeneous_and_its_derivatives_say_so(seed, gamma):
    losses = (torch.rand(4, dtype=F64, generator=generator(seed)) + 0.05).requires_grad_()
    mean = M.power_mean(losses, gamma)
    close(M.power_mean(7 * losses, gamma), 7 * mean.detach())
    (slope,) = torch.autograd.grad(mean, losses)
    close(losses.detach() @ slope, mean.detach())
    if math.isfinite(gamma):
        close(slope, losses.detach() ** (gamma - 1) * mean.detach() ** (1 - gamma) / 4, 1e-9)
        assert torch.autograd.gradcheck(lambda x: M.power_mean(x, gamma), losses)


def test_power_mean_near_zero_gamma_is_the_geometric_mean_with_its_first_order_term():
    losses = torch.tensor([0.3, 5.0, 120.0], dtype=F64)
    logs = losses.log()
    for gamma in (1e-3, 1e-7, -1e-7, 1e-13, 1e-99, -1e-99, 1e-320):
        expected = logs.mean() + gamma * logs.var(correction=0) / 2
        close(M.power_mean(losses, gamma).log(), expected, max(1e-14, 5 * gamma**2))


def test_power_mean_at_zero_losses():
    losses = torch.tensor([0.0, 2.0, 7.0], dtype=F64, requires_grad=True)
    for gamma, slope in ((0.5, math.inf), (1.0, 1 / 3), (3.0, 0.0), (math.inf, 0.0)):
        mean = M.power_mean(losses, gamma)
        close(mean.detach(), 7.0 if gamma == math.inf else ((2**gamma + 7**gamma) / 3) ** (1 / gamma))
        gradient = torch.autograd.grad(mean, losses)[0]
        assert gradient[0] == pytest.approx(slope) and gradient[1:].isfinite().all()
        nothing = torch.zeros(3, dtype=F64, requires_grad=True)
        mean = M.power_mean(nothing, gamma)
        assert mean == 0
        close(torch.autograd.grad(mean, nothing)[0], 1 / 3)
    assert M.power_mean(losses, -math.inf) == 0


def test_power_mean_of_extreme_losses():
    losses = torch.tensor([1e-300, 1e300, 1.0], dtype=F64)
    for gamma, expected in ((0.0, 1.0), (1.0, 1e300 / 3), (-1.0, 3e-300), (500.0, 1e300 * 3 ** (-1 / 500)), (1e308, 1e300)):
        close(M.power_mean(losses, gamma) / expected, 1.0, 1e-11)
    assert M.power_mean(torch.tensor([3.5]), -2.0) == 3.5
    batch = torch.rand(2, 5, 3, generator=generator(0)) + 0.1
    for dim in (0, 1, -1):
        got = M.power_mean(batch, 2.0, dim=dim)
        assert got.dtype == torch.float32
        close(got, batch.square().mean(dim).sqrt(), 1e-6)
    mixed = torch.tensor([[0.0, 0.0], [0.0, 4.0], [1.0, 4.0]])
    close(M.power_mean(mixed, 0.5), torch.tensor([0.0, 1.0, 2.25]), 1e-6)


# ------------------------------------------------------------------------------------------ references


def test_reference_losses_are_the_best_that_a_constant_can_do():
    gen = generator(1)
    y = torch.randn(200, dtype=F64, generator=gen) ** 3
    x = y.numpy()
    for kind, loss in (("squared_error", np.square), ("absolute_error", np.abs)):
        best = minimize_scalar(lambda c, loss=loss: loss(x - c).mean(), bracket=(-1, 1), tol=1e-12).fun
        close(M.reference_loss(kind, y), best, 1e-9)
    bits = torch.rand(200, generator=gen) < 0.3
    p = bits.double().mean().item()
    for target in (bits, bits.double(), bits.long()):
        close(M.reference_loss("binary_cross_entropy", target).double(), scipy.stats.entropy([p, 1 - p]), 1e-6)
    soft = torch.rand(50, dtype=F64, generator=gen)
    best = torch.nn.functional.binary_cross_entropy(soft.mean().expand(50), soft)
    close(M.reference_loss("binary_cross_entropy", soft), best)
    classes = torch.multinomial(torch.tensor([0.1, 0.2, 0.7]), 300, replacement=True, generator=gen) + 5
    frequencies = np.bincount(classes.numpy())
    close(M.reference_loss("cross_entropy", classes).double(), scipy.stats.entropy(frequencies), 1e-6)


def test_reference_losses_of_several_outputs_and_of_equal_targets():
    y = torch.randn(31, 2, 3, dtype=F64, generator=generator(2)) * torch.tensor([1.0, 5.0, 25.0], dtype=F64)
    close(M.reference_loss("squared_error", y), torch.nn.functional.mse_loss(y.mean(0).expand_as(y), y))
    close(M.reference_loss("absolute_error", y), (y - y.quantile(0.5, 0)).abs().mean())
    for kind, target in (
        ("squared_error", torch.tensor([4.0])), ("absolute_error", torch.full((3,), 2.0)),
        ("cross_entropy", torch.tensor([3, 3])), ("binary_cross_entropy", torch.ones(4, dtype=torch.bool)),
    ):
        assert M.reference_loss(kind, target) == 0


# ------------------------------------------------------------------------------------------- gradients


def model(seed: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(seed)
    w, b, head = (torch.randn(*size, dtype=F64, requires_grad=True) for size in ((3, 2), (3,), (3,)))
    h = torch.tanh(w @ torch.randn(2, dtype=F64) + b)
    return [w, b], {"first": (h @ head).square(), "second": h.sum(), "bias": b.prod()}, [head]


def test_task_gradients_equal_one_backward_pass_per_task():
    for as_given in (lambda losses: losses, lambda losses: list(losses.values()), lambda losses: torch.stack([*losses.values()])):
        shared, losses, heads = model(3)
        G = M.task_gradients(as_given(losses), shared, retain_graph=True)
        assert G.shape == (3, 9) and not G.requires_grad
        assert all(p.grad is None for p in shared + heads)
        for i, loss in enumerate(losses.values()):
            for p in shared:
                p.grad = None
            loss.backward(retain_graph=True)
            expected = [torch.zeros_like(p) if p.grad is None else p.grad for p in shared]
            close(G[i], torch.cat([g.flatten() for g in expected]))
    assert (G[2, :6] == 0).all()


def test_task_gradients_free_the_graph_unless_told():
    shared, losses, _ = model(4)
    M.task_gradients(losses, iter(shared), retain_graph=True)
    M.task_gradients([losses["first"], losses["second"]], shared)
    with pytest.raises(RuntimeError, match="second time"):
        losses["first"].backward()


def test_apply_flat_gradient_is_what_an_optimiser_descends():
    shared, losses, _ = model(5)
    G = M.task_gradients(losses, shared)
    before = torch.cat([p.detach().flatten() for p in shared])
    shared[0].grad = torch.full_like(shared[0], 9.0)
    u = G.sum(0)
    M.apply_flat_gradient(shared, u)
    u += 1  # a copy was written
    torch.optim.SGD(shared, lr=0.5).step()
    close(torch.cat([p.detach().flatten() for p in shared]), before - 0.5 * G.sum(0))


def test_normalise_rows():
    G = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-1e-30, 0.0], [1e300, 1e300]], dtype=F64)
    root = math.sqrt(0.5)
    close(M.normalise_rows(G), torch.tensor([[0.6, 0.8], [0, 0], [-1, 0], [root, root]], dtype=F64))
    close(M.normalise_rows(G, eps=10.0), torch.tensor([[0.3, 0.4], [0, 0], [-1e-31, 0], [root, root]], dtype=F64))
    close(M.normalise_rows(G[None, :1].float() * 1e-30), torch.tensor([[[0.6, 0.8]]]), 1e-6)
    assert M.normalise_rows(torch.zeros(0, 3)).shape == (0, 3)


# ------------------------------------------------------------------------------------------ directions


@given(n=sizes, d=sizes, seed=seeds, kind=st.sampled_from(KINDS))
def test_min_norm_point_satisfies_its_optimality_conditions(n, d, seed, kind):
    G = gradients(n, d, seed, kind)
    alpha, gap = M.min_norm_point(G @ G.T)
    assert (alpha >= 0).all()
    close(alpha.sum(), 1.0)
    u, length = alpha @ G, G.norm(dim=1)
    share = (alpha * length).sum()
    excess = G @ u - u @ u
    assert (excess >= -1e-14 * length * share).all()
    assert (alpha * length * excess.abs() <= 1e-14 * length * share**2).all()
    assert 0 <= gap <= 1e-14 * length.max() * max(share, length.min())
    assert u.norm() <= length.min() * (1 + 1e-14)


@given(n=st.integers(1, 5), d=sizes, seed=seeds, kind=st.sampled_from(["plain", "duplicated", "zero", "integer", "flat"]))
def test_min_norm_point_is_the_best_of_all_supports(n, d, seed, kind):
    G = gradients(n, d, seed, kind)
    close(M.min_norm_point(G @ G.T).alpha @ G, shortest(G, G[:0]), 1e-6)


@pytest.mark.parametrize("n", [1, 2, 5, 40, 100])
def test_min_norm_point_equals_augmented_least_squares_on_the_gradients(n):
    G = gradients(n, 60, n, "flat")
    weights, _ = nnls(np.vstack([G.T.numpy(), np.full((1, n), 50.0)]), np.r_[np.zeros(60), 50.0])
    close(M.min_norm_point(G @ G.T).alpha, torch.from_numpy(weights / weights.sum()), 1e-9)


def test_min_norm_point_of_two_tasks_has_a_closed_form():
    for seed in range(20):
        g, h = gradients(2, 3, seed)
        weight = ((h - g) @ h / (g - h).square().sum()).clamp(0, 1)
        close(M.min_norm_point(torch.stack([g, h]) @ torch.stack([g, h]).T).alpha, torch.stack([weight, 1 - weight]))


def test_min_norm_point_is_where_frank_wolfe_goes():
    G = gradients(8, 100, 6, "flat")
    slow = MGDA(epsilon=1e-12, max_iters=3000)(G)
    alpha, gap = M.min_norm_point(G @ G.T)
    u = alpha @ G
    peer = slow @ slow - (G @ slow).min()
    assert (u - slow).norm() < 2e-3 * u.norm() and gap < 1e-6 * peer and u @ u < slow @ slow


def test_frozen_exactly_when_no_direction_lowers_every_loss():
    frozen = 0
    for seed in range(40):
        G = gradients(5, 3, seed)
        u = M.min_norm_point(G @ G.T).alpha @ G
        possible = linprog(np.zeros(3), A_ub=-G.numpy(), b_ub=-np.ones(5), bounds=(None, None), method="highs").status == 0
        assert possible == bool(u.norm() > 1e-9)
        frozen += not possible
    assert 5 < frozen < 35


@given(n=sizes, d=sizes, seed=seeds, scale=st.sampled_from([1e-30, 1e-3, 1e9, 1e30]))
def test_min_norm_point_ignores_unit_and_order(n, d, seed, scale):
    G = gradients(n, d, seed, "flat")
    gram, order = G @ G.T, torch.randperm(n, generator=generator(seed))
    u = M.min_norm_point(gram).alpha @ G
    close(M.min_norm_point(gram * scale).alpha @ G, u, 1e-7)
    close(M.min_norm_point(gram[order][:, order]).alpha @ G[order], u, 1e-7)


def test_min_norm_point_in_batches_and_in_float32():
    G = torch.randn(3, 2, 4, 6, dtype=F64, generator=generator(7))
    batch = M.min_norm_point(G @ G.mT)
    assert batch.alpha.shape == (3, 2, 4) and batch.gap.shape == (3, 2)
    for i, j in itertools.product(range(3), range(2)):
        close(batch.alpha[i, j], M.min_norm_point(G[i, j] @ G[i, j].T).alpha)
    small = M.min_norm_point((G @ G.mT).float())
    assert small.alpha.dtype == small.gap.dtype == torch.float32
    close(small.alpha.double(), batch.alpha, 1e-4)
    assert M.min_norm_point(torch.zeros(0, 2, 2)).alpha.shape == (0, 2)
    duplicated = torch.randn(4, 50_000, generator=generator(8))[[0, 1, 2, 3, 0, 1]]  # singular: eigenvalues around 0
    weights = M.min_norm_point(duplicated @ duplicated.T)
    assert weights.alpha.isfinite().all() and weights.gap < 1e-2


@given(m=st.integers(0, 6), d=sizes, seed=seeds, kind=st.sampled_from(KINDS), size=st.sampled_from([1e-15, 1.0, 1e15]))
def test_cone_projection_satisfies_its_optimality_conditions(m, d, seed, kind, size):
    g = size * torch.randn(d, dtype=F64, generator=generator(seed + 1))
    G = gradients(max(m, 1), d, seed, kind)[:m]
    u, weights, residual = M.project_on_dual_cone(g, G)
    assert (weights >= 0).all() and residual <= 1e-13 * max(1.0, float((weights * G.norm(dim=1)).sum() / g.norm()))
    terms = g.norm() + (weights * G.norm(dim=1)).sum()
    close((u - g - weights @ G) / terms, 0.0, 1e-14)
    assert (G @ u >= -1e-14 * G.norm(dim=1) * terms).all()
    assert (weights * (G @ u).abs() <= 1e-13 * terms**2).all()
    assert abs(u @ u - u @ g) <= 1e-13 * terms**2  # Moreau: u is orthogonal to g - u
    assert u.norm() <= g.norm() + 1e-13 * terms


@given(m=st.integers(0, 5), d=sizes, seed=seeds, kind=st.sampled_from(["plain", "duplicated", "zero", "integer", "flat"]))
def test_cone_projection_is_the_best_of_all_supports(m, d, seed, kind):
    g, G = torch.randn(d, dtype=F64, generator=generator(seed + 1)), gradients(max(m, 1), d, seed, kind)[:m]
    found = M.project_on_dual_cone(g, G)
    close(found.u, shortest(g[None], G), 1e-6)
    close(M.project_on_dual_cone(found.u, G).u, found.u, 1e-7)


@pytest.mark.parametrize("m", [1, 3, 30, 100])
def test_cone_projection_equals_least_squares_on_the_gradients(m):
    g, G = torch.randn(40, dtype=F64, generator=generator(m)), gradients(m, 40, m + 1)
    weights, distance = nnls(G.T.numpy(), -g.numpy())
    found = M.project_on_dual_cone(g, G)
    close(found.u, g + torch.from_numpy(weights) @ G, 1e-10)
    if m < 40:
        close(found.weights, torch.from_numpy(weights), 1e-8)
    assert abs(found.u.norm() - distance) < 1e-12


def test_cone_projection_of_the_article_and_of_one_helper():
    g, G = torch.tensor([2.0, 1.0, 1.0], dtype=F64), torch.tensor([[-1.0, 0.0, -1.0], [-1.0, -2.0, 0.0]], dtype=F64)
    found = M.project_on_dual_cone(g, G)
    close(9 * found.u, torch.tensor([2.0, -1.0, -2.0], dtype=F64))
    close(9 * found.weights, torch.tensor([11.0, 5.0], dtype=F64))
    for seed in range(20):
        g, h = gradients(2, 4, seed)
        weight = torch.relu(-(g @ h)) / h.square().sum()
        close(M.project_on_dual_cone(g, h[None]).u, g + weight * h)
        # torchjd's PCGrad projects each of two gradients on the other's half-space, and adds
        both = torch.stack([g, h])
        close(M.project_on_dual_cone(g, h[None]).u + M.project_on_dual_cone(h, g[None]).u, PCGrad()(both), 1e-10)


def test_cone_projection_agrees_with_torchjd_up_to_its_regularisation():
    pytest.importorskip("quadprog")
    from torchjd.aggregation import DualProj

    for seed in range(10):
        rows = gradients(5, 30, seed)
        peer = DualProj(torch.eye(5, dtype=F64)[0])(rows)
        ours = M.project_on_dual_cone(rows[0], rows[1:])
        assert (ours.u - peer).norm() < 2e-3 * rows[0].norm()
        worst = (-(rows[1:] @ peer) / rows[1:].norm(dim=1) / rows[0].norm()).max()
        assert ours.residual <= 1e-15 or ours.residual < 1e-6 * worst


@given(m=sizes, d=sizes, seed=seeds)
def test_cone_projection_ignores_the_scale_of_helpers(m, d, seed):
    g, G = torch.randn(d, dtype=F64, generator=generator(seed + 1)), gradients(m, d, seed)
    scale = 10.0 ** torch.randint(-15, 16, (m, 1), generator=generator(seed))
    u = M.project_on_dual_cone(g, G).u
    close(M.project_on_dual_cone(g, scale * G).u, u, 1e-7)
    close(M.project_on_dual_cone(1e15 * g, G).u * 1e-15, u, 1e-7)
    doubled = M.project_on_dual_cone(g, torch.cat([G, G, 0 * G])).u
    close(doubled, u, 1e-7)


@given(n=st.integers(1, 3), m=st.integers(0, 3), d=sizes, seed=seeds)
def test_mixed_direction_is_the_best_of_all_supports(n, m, d, seed):
    G, H = gradients(n, d, seed, "flat"), gradients(max(m, 1), d, seed + 1)[:m]
    u, alpha, weights, residual = M.mixed_direction(G, H)
    close(u, shortest(G, H), 1e-6)
    close(u, alpha @ G + weights @ H, 1e-10)
    close(alpha.sum(), 1.0)
    assert (alpha >= 0).all() and (weights >= 0).all()
    assert 0 <= residual <= 1e-13 * max(1.0, float((weights * H.norm(dim=1)).sum()))
    slack = 1e-12 * (1 + float(weights @ H.norm(dim=1))) ** 2 * (1 + G.norm())
    assert (G @ u >= u @ u - slack).all() and (H @ u >= -slack * H.norm(dim=1)).all()


def test_mixed_direction_contains_both_others():
    G = gradients(4, 7, 9)
    close(M.mixed_direction(G, G[:0]).alpha, M.min_norm_point(G @ G.T).alpha)
    one, many = M.mixed_direction(G[:1], G[1:]), M.project_on_dual_cone(G[0], G[1:])
    assert one.alpha == 1
    close(one.u, many.u)
    close(one.weights, many.weights)


def test_gap_sees_weights_that_are_wrong(monkeypatch):
    G = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=F64)
    monkeypatch.setattr(M, "_weights", lambda gram, mains, tol: np.array([0.5, 0.5]))
    close(M.min_norm_point(G @ G.T).gap, 0.75)  # u = (1, 1/2): its square is 5/4, the slowest task gets 1/2


def test_residual_sees_weights_that_are_wrong(monkeypatch):
    G = gradients(4, 3, 10)
    monkeypatch.setattr(M, "_weights", lambda gram, mains, tol: np.array([1.0, 0.0, 0.0, 0.0]))
    violation = (-(G[1:] @ G[0]) / (G[1:].norm(dim=1) * G[0].norm())).max()
    close(M.project_on_dual_cone(G[0], G[1:]).residual, violation)
    monkeypatch.setattr(M, "_weights", lambda gram, mains, tol: np.array([1.0, 2.0, 0.0, 0.0]))
    u = G[0] + 2 * G[1]
    share = 2 * G[1].norm() / G[0].norm() * (G[1] @ u).abs() / (G[1].norm() * G[0].norm())
    assert M.project_on_dual_cone(G[0], G[1:]).residual >= share - 1e-12


def test_directions_in_batches_and_in_float32_beyond_one_block():
    gen = generator(11)
    g, G = torch.randn(3, 2, 5, dtype=F64, generator=gen), torch.randn(3, 2, 4, 5, dtype=F64, generator=gen)
    batch = M.project_on_dual_cone(g, G)
    assert batch.u.shape == (3, 2, 5) and batch.weights.shape == (3, 2, 4) and batch.residual.shape == (3, 2)
    close(batch.u[2, 1], M.project_on_dual_cone(g[2, 1], G[2, 1]).u)
    g, G = torch.randn(150_000, dtype=F64, generator=gen), torch.randn(3, 150_000, dtype=F64, generator=gen)
    G = G - 0.5 * g
    exact, single = M.project_on_dual_cone(g, G), M.project_on_dual_cone(g.float(), G.float())
    assert single.u.dtype == torch.float32 and (exact.weights > 0).any()
    close(single.u.double(), exact.u, 1e-5)
    tiny = M.project_on_dual_cone(1e15 * g.float(), 1e-15 * G.float())
    close(tiny.u.double() * 1e-15, exact.u, 1e-5)


def test_a_main_task_at_its_optimum_stops_the_step():
    zero = torch.zeros(1, 3, dtype=F64)
    G = gradients(2, 3, 12)
    assert M.mixed_direction(torch.cat([G[:1], zero]), G[1:]).alpha.tolist() == [0, 1]
    found = M.project_on_dual_cone(zero[0], G)
    assert (found.u == 0).all() and (found.weights == 0).all() and found.residual == 0


# --------------------------------------------------------------------------------------------- errors

ROWS = torch.ones(2, 3)
W = torch.ones(2, requires_grad=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: M.power_mean([1.0], 1.0), TypeError, r"losses should be a torch tensor, got list"),
        (lambda: M.power_mean(torch.tensor([1, 2]), 1.0), TypeError, r"losses should have a floating dtype, got torch.int64"),
        (lambda: M.power_mean(torch.tensor(1.0), 1.0), ValueError,
         r"losses: expected at least one loss along axis -1, got shape \(\)"),
        (lambda: M.power_mean(torch.ones(2, 0), 1.0), ValueError, r"at least one loss along axis -1, got shape \(2, 0\)"),
        (lambda: M.power_mean(torch.tensor([1.0, -0.5]), 1.0), ValueError, r"losses should be >= 0, got -0.5"),
        (lambda: M.power_mean(torch.tensor([1.0, 0.0]), 0.0), ValueError, r"losses should be > 0 for gamma = 0 <= 0, got 0"),
        (lambda: M.power_mean(torch.tensor([1.0, 0.0]), -1.0), ValueError, r"losses should be > 0 for gamma = -1"),
        (lambda: M.power_mean(torch.tensor([1.0, math.nan]), 1.0), ValueError, r"losses has 1 non-finite entries"),
        (lambda: M.power_mean(torch.ones(2), math.nan), ValueError, r"gamma should be a number"),
        (lambda: M.power_mean(torch.ones(2), "0"), ValueError, r"gamma should be a number"),
        (lambda: M.reference_loss("hinge", ROWS), ValueError, r"kind should be one of 'cross_entropy', .*, got 'hinge'"),
        (lambda: M.reference_loss("squared_error", [1.0]), TypeError, r"target should be a torch tensor"),
        (lambda: M.reference_loss("squared_error", torch.ones(0)), ValueError, r"target: expected shape \(N, \.\.\.\)"),
        (lambda: M.reference_loss("squared_error", torch.tensor(1.0)), ValueError, r"target: expected shape \(N, \.\.\.\)"),
        (lambda: M.reference_loss("squared_error", torch.tensor([math.nan])), ValueError, r"target has 1 non-finite"),
        (lambda: M.reference_loss("cross_entropy", ROWS.long()), ValueError, r"target: expected shape \(N\), got \(2, 3\)"),
        (lambda: M.reference_loss("cross_entropy", ROWS[0]), TypeError, r"target should hold integer classes, got torch.float32"),
        (lambda: M.reference_loss("cross_entropy", torch.tensor([0, -1])), ValueError,
         r"target should hold classes >= 0, got -1"),
        (lambda: M.reference_loss("binary_cross_entropy", 2 * ROWS), ValueError,
         r"target should lie in \[0, 1\], got .* from 2 to 2"),
        (lambda: M.task_gradients([W.sum()], W), TypeError, r"params should be an iterable of tensors, got one tensor"),
        (lambda: M.task_gradients([W.sum()], []), ValueError, r"params is empty"),
        (lambda: M.task_gradients([], [W]), ValueError, r"losses is empty"),
        (lambda: M.task_gradients({"a": W}, [W]), ValueError, r"losses\['a'\]: expected shape \(\), got \(2,\)"),
        (lambda: M.task_gradients([1.0], [W]), TypeError, r"losses\[0\] should be a torch tensor"),
        (lambda: M.task_gradients([W.sum()], [W.detach()]), ValueError,
         r"params\[0\] of shape \(2,\) does not require a gradient"),
        (lambda: M.task_gradients({"a": W.sum(), "b": torch.ones(2, requires_grad=True).sum()}, [W]), ValueError,
         r"losses\['b'\] does not depend on the shared parameters"),
        (lambda: M.task_gradients([W.sum(), torch.tensor(1.0)], [W]), ValueError, r"losses\[1\] does not depend on the shared"),
        (lambda: M.apply_flat_gradient([W], torch.ones(3)), ValueError, r"u: expected shape \(d=2\), got \(3,\)"),
        (lambda: M.apply_flat_gradient([W], torch.ones(2).double()), TypeError,
         r"u is torch.float64 on cpu, params is torch.float32"),
        (lambda: M.normalise_rows(ROWS[0]), ValueError, r"G: expected shape"),
        (lambda: M.normalise_rows(ROWS * math.inf), ValueError, r"G has 6 non-finite entries"),
        (lambda: M.normalise_rows(ROWS, eps=-1.0), ValueError, r"eps should be a number in \[0.0, inf\), got -1.0"),
        (lambda: M.min_norm_point(ROWS), ValueError, r"gram: expected shape \(\.\.\., n, n\), got \(2, 3\)"),
        (lambda: M.min_norm_point(torch.ones(0, 0)), ValueError, r"gram is empty"),
        (lambda: M.min_norm_point(torch.eye(2) * math.nan), ValueError, r"gram has 2 non-finite|gram has 4 non-finite"),
        (lambda: M.min_norm_point(torch.tensor([[1.0, 0.5], [0.4, 1.0]])), ValueError, r"symmetric, got 0.5 at \(0, 1\) and 0.4"),
        (lambda: M.min_norm_point(torch.tensor([[1.0, 2.0], [2.0, 1.0]])), ValueError, r"semi-definite, got the eigenvalue -1"),
        (lambda: M.min_norm_point(torch.diag(torch.tensor([1.0, -1.0]))), ValueError,
         r"semi-definite, got a diagonal entry of -1"),
        (lambda: M.min_norm_point(torch.eye(2).long()), TypeError, r"gram should have a floating dtype"),
        (lambda: M.project_on_dual_cone(ROWS[0], ROWS[0]), ValueError, r"G: expected shape"),
        (lambda: M.project_on_dual_cone(ROWS[0, :2], ROWS), ValueError, r"G: expected shape \(\.\.\., m, d=2\), got \(2, 3\)"),
        (lambda: M.project_on_dual_cone(ROWS[0].double(), ROWS), TypeError, r"G is torch.float32 on cpu, g is torch.float64"),
        (lambda: M.project_on_dual_cone(ROWS[0] * math.nan, ROWS), ValueError, r"g has 3 non-finite entries"),
        (lambda: M.project_on_dual_cone(ROWS[0], ROWS * math.inf), ValueError, r"G has 6 non-finite entries"),
        (lambda: M.project_on_dual_cone(ROWS, ROWS), ValueError, r"batch axes should be equal, got g \(2,\) and G \(\)"),
        (lambda: M.project_on_dual_cone(torch.ones(0), torch.ones(2, 0)), ValueError, r"g is empty"),
        (lambda: M.project_on_dual_cone(ROWS[0].double() * 1e200, ROWS.double()), ValueError, r"g or G has rows of norm outside"),
        (lambda: M.project_on_dual_cone(ROWS[0].double(), ROWS.double() * 1e-200), ValueError,
         r"g or G has rows of norm outside"),
        (lambda: M.mixed_direction(ROWS[:0], ROWS), ValueError, r"mains: expected at least one main task, got shape \(0, 3\)"),
        (lambda: M.mixed_direction(ROWS, ROWS * math.nan), ValueError, r"helpers has 6 non-finite entries"),
        (lambda: M.mixed_direction(ROWS, ROWS[:, :2]), ValueError, r"helpers: expected shape \(\.\.\., m, d=3\), got \(2, 2\)"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
