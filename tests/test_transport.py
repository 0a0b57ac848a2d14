"""Transport against independent solvers, closed forms, and its invariants."""

from __future__ import annotations

import itertools
import math

import numpy as np
import ot
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog
from scipy.stats import wasserstein_distance

from kexue import transport as T

F64 = torch.float64
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 7)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masses(m: int, gen: torch.Generator, zeros: bool = False) -> torch.Tensor:
    p = -torch.rand(m, dtype=F64, generator=gen).log()
    if zeros and m > 1:
        p[torch.randint(m, (1,), generator=gen)] = 0
    return p / p.sum()


def problem(m: int, n: int, seed: int, zeros: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gen = generator(seed)
    return masses(m, gen, zeros), masses(n, gen, zeros), torch.randn(m, n, dtype=F64, generator=gen)


def clouds(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


def by_linprog(p: torch.Tensor, q: torch.Tensor, cost: torch.Tensor) -> float:
    m, n = cost.shape
    rows = np.vstack([np.kron(np.eye(m), np.ones(n)), np.kron(np.ones(m), np.eye(n))])[:-1]
    answer = linprog(cost.numpy().ravel(), A_eq=rows, b_eq=np.r_[p.numpy(), q.numpy()][:-1], method="highs")
    assert answer.status == 0
    return answer.fun


def close(a: torch.Tensor, b: torch.Tensor | float, tol: float = 1e-12) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype).expand_as(a), rtol=tol, atol=tol)


# ----------------------------------------------------------------------------------------------- emd


@settings(max_examples=60, deadline=None)
@given(m=sizes, n=sizes, seed=seeds, zeros=st.booleans())
def test_emd_equals_linear_programme_and_its_dual(m, n, seed, zeros):
    p, q, cost = problem(m, n, seed, zeros)
    value, plan, f, g = T.emd(p, q, cost, return_plan=True, return_potentials=True)
    close(value, by_linprog(p, q, cost), 1e-9)
    assert (plan >= 0).all() and int((plan > 0).sum()) <= m + n - 1
    close(plan.sum(1), p)
    close(plan.sum(0), q)
    close((plan * cost).sum(), value)
    assert (f[:, None] + g <= cost + 1e-12).all()
    close(p @ f, value / 2)
    close(q @ g, value / 2)


@pytest.mark.parametrize("seed", range(5))
def test_emd_equals_pot_on_larger_problems(seed):
    p, q, cost = problem(60, 45, seed)
    close(T.emd(p, q, cost), ot.emd2(p.numpy(), q.numpy(), cost.numpy()))


def test_emd_on_the_line_equals_distribution_functions():
    gen = generator(1)
    x, y = (torch.randn(m, dtype=F64, generator=gen) for m in (9, 7))
    p, q = masses(9, gen), masses(7, gen)
    close(T.emd(p, q, (x[:, None] - y).abs()), wasserstein_distance(x, y, p, q))


def test_emd_of_equal_uniform_masses_is_an_assignment():
    cost = clouds(8, 8, seed=2)
    rows, columns = linear_sum_assignment(cost.numpy())
    u = torch.full((8,), 1 / 8, dtype=F64)
    value, plan = T.emd(u, u, cost, return_plan=True)
    close(value, cost.numpy()[rows, columns].mean())
    close((8 * plan).round(), 8 * plan)


def test_emd_by_enumeration_of_permutations():
    cost, u = clouds(5, 5, seed=3), torch.full((5,), 0.2, dtype=F64)
    best = min(sum(float(cost[i, s]) for i, s in enumerate(order)) for order in itertools.permutations(range(5)))
    close(T.emd(u, u, cost), best / 5)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_emd_is_homogeneous_in_cost_and_in_mass(scale):
    p, q, cost = problem(6, 7, 4)
    value, plan, f, g = T.emd(p, q, cost, return_plan=True, return_potentials=True)
    close(T.emd(p, q, cost * scale) / scale, value)
    scaled = T.emd(p * scale, q * scale, cost, return_plan=True, return_potentials=True)
    close(scaled[0] / scale, value)
    close(scaled[1] / scale, plan)
    close(scaled[2], f)
    close(scaled[3], g)


def test_emd_of_zero_cost_is_zero():
    p, q, cost = problem(3, 4, 5)
    assert T.emd(p, q, torch.zeros_like(cost)) == 0


@settings(max_examples=40, deadline=None)
@given(m=sizes, n=sizes, seed=seeds)
def test_emd_ignores_order_and_transposes(m, n, seed):
    p, q, cost = problem(m, n, seed)
    rows, columns = torch.randperm(m, generator=generator(seed)), torch.randperm(n, generator=generator(seed + 1))
    close(T.emd(p[rows], q[columns], cost[rows][:, columns]), T.emd(p, q, cost))
    close(T.emd(q, p, cost.T), T.emd(p, q, cost))
    shift_f, shift_g = cost[:, 0], cost[0]
    moved = cost + shift_f[:, None] + shift_g
    close(T.emd(p, q, moved), T.emd(p, q, cost) + p @ shift_f + q @ shift_g, 1e-11)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, k=st.integers(1, 5))
def test_emd_is_a_metric_when_its_cost_is(seed, k):
    gen = generator(seed)
    points = torch.randn(k, 2, dtype=F64, generator=gen)
    cost = torch.cdist(points, points)
    a, b, c = (masses(k, gen) for _ in range(3))
    ab, bc, ac = T.emd(a, b, cost), T.emd(b, c, cost), T.emd(a, c, cost)
    assert ab >= 0 and ac <= ab + bc + 1e-12
    close(T.emd(a, a, cost), 0.0)
    close(T.emd(b, a, cost), ab)


def test_emd_broadcasts_batches():
    gen = generator(6)
    cost = torch.rand(3, 2, 4, 5, dtype=F64, generator=gen)
    p, q = masses(4, gen), torch.stack([masses(5, gen) for _ in range(2)])
    value, plan, f, g = T.emd(p, q, cost, return_plan=True, return_potentials=True)
    assert (value.shape, plan.shape, f.shape, g.shape) == ((3, 2), (3, 2, 4, 5), (3, 2, 4), (3, 2, 5))
    for i, j in itertools.product(range(3), range(2)):
        close(value[i, j], by_linprog(p, q[j], cost[i, j]), 1e-9)
        close(plan[i, j].sum(0), q[j])


def test_emd_keeps_dtype_and_accepts_float32_normalisation():
    p, q, cost = problem(30, 40, 7)
    value = T.emd(p.float(), q.float(), cost.float())
    assert value.dtype == torch.float32
    close(value.double(), T.emd(p, q, cost), 1e-5)


@pytest.mark.parametrize("zeros", [False, True])
def test_emd_gradients_match_finite_differences(zeros):
    p, q, cost = problem(4, 5, 8)
    if zeros:
        q = torch.cat([q, torch.zeros(1, dtype=F64)])
        cost = torch.cat([cost, clouds(4, 1, seed=9)], 1)
    leaves = [t.clone().requires_grad_() for t in (p, q, cost)]
    value, plan = T.emd(*leaves, return_plan=True)
    gradients = torch.autograd.grad(3 * value, leaves)
    close(gradients[2], 3 * plan)
    h, gen = 1e-6, generator(10)
    for which, gradient in enumerate(gradients):
        direction = torch.randn(gradient.shape, dtype=F64, generator=gen)
        if which < 2:  # move along the simplex, and off a zero mass only inwards (there the derivative is one-sided)
            direction = direction * leaves[which].detach().sign()
            direction -= direction.sum() * leaves[which].detach()
        step = [[t + (s * h * direction if i == which else 0) for i, t in enumerate((p, q, cost))] for s in (1, -1)]
        numeric = 3 * (T.emd(*step[0]) - T.emd(*step[1])) / (2 * h)
        close((gradient * direction).sum(), numeric, 1e-7)


def test_potential_of_a_massless_point_is_the_one_sided_derivative():
    p, q, cost = problem(4, 5, 11)
    q = torch.cat([q, torch.zeros(1, dtype=F64)])
    cost = torch.cat([cost, clouds(4, 1, seed=12)], 1)
    _, _, g = T.emd(p, q, cost, return_potentials=True)
    h = 1e-7
    arriving = q * (1 - h)
    arriving[-1] = h
    numeric = (T.emd(p, arriving, cost) - T.emd(p, q, cost)) / h
    close(numeric, g[-1] - q @ g, 1e-6)


def test_emd_gradients_in_batches_and_with_broadcast_cost():
    cost = clouds(3, 4, seed=13).requires_grad_()
    gen = generator(14)
    p, q = torch.stack([masses(3, gen) for _ in range(5)]), torch.stack([masses(4, gen) for _ in range(5)])
    value, plan = T.emd(p, q, cost, return_plan=True)
    assert not plan.requires_grad
    weights = torch.arange(1.0, 6.0, dtype=F64)
    (value @ weights).backward()
    close(cost.grad, torch.einsum("b,bij->ij", weights, plan))


# ------------------------------------------------------------------------------------------ sinkhorn


def test_sinkhorn_equals_pot_and_has_its_marginals():
    p, q, cost = problem(5, 6, 15)
    ours = T.sinkhorn(p, q, cost, 0.1, tol=1e-12)
    peer = ot.sinkhorn(p.numpy(), q.numpy(), cost.numpy(), 0.1, method="sinkhorn_log", stopThr=1e-13)
    close(ours.plan, torch.from_numpy(peer), 1e-9)
    close(ours.plan.sum(0), q)
    close(ours.plan.sum(1), p, 1e-11)
    close(ours.cost, (ours.plan * cost).sum())
    close(ours.plan, torch.exp((ours.f[:, None] + ours.g - cost) / 0.1), 1e-10)
    assert ours.error <= 1e-12 and ours.iterations < 10_000


@settings(max_examples=25, deadline=None)
@given(m=sizes, n=sizes, seed=seeds, eps=st.sampled_from([0.1, 0.5, 2.0]))
def test_sinkhorn_gap_is_between_zero_and_the_entropy(m, n, seed, eps):
    p, q, cost = problem(m, n, seed)
    gap = T.sinkhorn(p, q, cost, eps, tol=1e-8).cost - T.emd(p, q, cost)
    entropy = min(float(-(t * t.log()).sum()) for t in (p, q))
    assert -1e-6 <= gap <= eps * entropy + 1e-6


def test_sinkhorn_batches_pads_and_differentiates():
    gen = generator(16)
    cost = torch.rand(3, 4, 5, dtype=F64, generator=gen)
    p, q = masses(4, gen), torch.stack([masses(5, gen, zeros=True) for _ in range(3)])
    batch = T.sinkhorn(p, q, cost, 0.2, tol=1e-11)
    for b in range(3):
        alive = q[b] > 0
        close(batch.cost[b], T.sinkhorn(p, q[b][alive], cost[b][:, alive], 0.2, tol=1e-11).cost, 1e-9)
    leaf = cost.clone().requires_grad_()
    T.sinkhorn(p, q, leaf, 0.2, iterations=5, tol=math.inf).cost.sum().backward()
    assert leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0


def test_sinkhorn_warns_when_it_stops_early():
    p, q, cost = problem(5, 6, 17)
    with pytest.warns(UserWarning, match=r"did not reach tol=1e-09 in 2 iterations"):
        T.sinkhorn(p, q, cost, 0.01, iterations=2)


# -------------------------------------------------------------------------------------------- bounds


@settings(max_examples=60, deadline=None)
@given(m=sizes, n=sizes, d=st.integers(1, 4), seed=seeds, zeros=st.booleans())
def test_bounds_enclose_the_exact_value(m, n, d, seed, zeros):
    x, y = clouds(m, d, seed=seed), clouds(n, d, seed=seed + 1)
    p, q = masses(m, generator(seed), zeros), masses(n, generator(seed + 2), zeros)
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    first, second = T.emd(p, q, distance), T.emd(p, q, distance.square())
    for exact, lower in (
        (first, T.centroid_bound(x, y, p, q)),
        (first, T.relaxed_bound(p, q, distance)),
        (second, T.relaxed_bound(p, q, distance.square())),
        (second, T.centroid_bound(x, y, p, q).square()),
        (second, T.spread_bound(x, y, p, q)),
        (second, T.gelbrich_bound(x, y, p, q)),
        (T.independent_bound(p, q, distance), first),
    ):
        assert lower <= exact + 1e-10
    assert T.centroid_bound(x, y, p, q).square() <= T.spread_bound(x, y, p, q) + 1e-10
    assert T.spread_bound(x, y, p, q) <= T.gelbrich_bound(x, y, p, q) + 1e-10


def test_bounds_are_tight_where_they_should_be():
    x, shift = clouds(6, 3, seed=18), torch.tensor([1.0, -2.0, 2.0], dtype=F64)
    close(T.centroid_bound(x, x + shift), 3.0)
    close(T.wmd(x, x + shift), 3.0)
    close(T.gelbrich_bound(x, x + shift), 9.0)
    scaled = 2.5 * x
    u = torch.full((6,), 1 / 6, dtype=F64)
    close(T.spread_bound(x, scaled), T.emd(u, u, torch.cdist(x, scaled).square()), 1e-10)
    line = torch.tensor([[0.0], [10.0]], dtype=F64)
    cost = torch.cdist(line, line + 10)
    half = torch.full((2,), 0.5, dtype=F64)
    values = T.centroid_bound(line, line + 10), T.relaxed_bound(half, half, cost), T.emd(half, half, cost)
    assert [float(value) for value in values] == [10, 5, 10]


def test_relaxed_bound_ignores_massless_points():
    p, q, cost = problem(4, 5, 19)
    wide = torch.cat([torch.full((4, 1), -9.0, dtype=F64), cost], 1)
    close(T.relaxed_bound(p, torch.cat([torch.zeros(1, dtype=F64), q]), wide), T.relaxed_bound(p, q, cost))
    tall = torch.cat([torch.full((1, 5), -9.0, dtype=F64), cost])
    close(T.relaxed_bound(torch.cat([torch.zeros(1, dtype=F64), p]), q, tall), T.relaxed_bound(p, q, cost))
    forth = sum(float(p[i]) * min(map(float, cost[i])) for i in range(4))
    back = sum(float(q[j]) * min(map(float, cost[:, j])) for j in range(5))
    close(T.relaxed_bound(p, q, cost), max(forth, back))


def test_independent_bound_is_the_product_plan():
    p, q, cost = problem(4, 5, 20)
    close(T.independent_bound(p, q, cost), float(sum(p[i] * q[j] * cost[i, j] for i in range(4) for j in range(5))))
    close(T.independent_bound(3 * p, 3 * q, cost), 3 * T.independent_bound(p, q, cost))


def test_gelbrich_bound_equals_its_covariance_formula():
    x, y = clouds(9, 3, seed=21), clouds(7, 3, seed=22) @ torch.diag(torch.tensor([1.0, 2.0, 0.5], dtype=F64))
    p, q = masses(9, generator(23)), masses(7, generator(24))
    s, t = (np.cov(z.numpy().T, aweights=w.numpy(), ddof=0) for z, w in ((x, p), (y, q)))
    root = scipy.linalg.sqrtm(s)
    shift = (p @ x - q @ y).square().sum()
    close(T.gelbrich_bound(x, y, p, q), float(shift + np.trace(s + t - 2 * scipy.linalg.sqrtm(root @ t @ root).real)), 1e-9)
    close(T.spread_bound(x, y, p, q), float(shift + (math.sqrt(np.trace(s)) - math.sqrt(np.trace(t))) ** 2))


# ----------------------------------------------------------------------------------------- sentences


@pytest.mark.parametrize("seed", range(5))
def test_wmd_equals_pot(seed):
    x, y = clouds(6, 4, seed=seed), clouds(9, 4, seed=seed + 100)
    close(T.wmd(x, y), ot.emd2([], [], ot.dist(x.numpy(), y.numpy(), "euclidean")), 1e-9)
    p, q = masses(6, generator(seed)), masses(9, generator(seed + 1))
    close(T.wmd(x, y, p, q), ot.emd2(p.numpy(), q.numpy(), ot.dist(x.numpy(), y.numpy(), "euclidean")), 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_wrd_is_half_the_squared_chord_transport(seed):
    x, y = clouds(6, 4, seed=seed), clouds(9, 4, seed=seed + 100)
    u, v = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    p, q = x.norm(dim=1) / x.norm(dim=1).sum(), y.norm(dim=1) / y.norm(dim=1).sum()
    close(T.wrd(x, y), 0.5 * ot.emd2(p.numpy(), q.numpy(), ot.dist(u.numpy(), v.numpy(), "sqeuclidean")), 1e-10)


def test_single_words_and_opposites_have_closed_forms():
    x, y = clouds(1, 5, seed=25), clouds(1, 5, seed=26)
    close(T.wmd(x, y), (x - y).norm())
    close(T.wrd(x, y), 1 - torch.nn.functional.cosine_similarity(x, y)[0])
    close(T.wrd(x, -x), 2.0)


@settings(max_examples=40, deadline=None)
@given(m=sizes, n=sizes, seed=seeds, scale=st.sampled_from([1e-6, 0.5, 3.0, 1e6]))
def test_distances_are_invariant(m, n, seed, scale):
    x, y = clouds(m, 3, seed=seed), clouds(n, 3, seed=seed + 1)
    rotation, _ = torch.linalg.qr(clouds(3, 3, seed=seed + 2))
    order = torch.randperm(m, generator=generator(seed))
    close(T.wmd(x[order] @ rotation + 7, y @ rotation + 7), T.wmd(x, y), 1e-11)
    close(T.wmd(torch.cat([x, x]), y), T.wmd(x, y), 1e-11)
    close(T.wrd(scale * x[order] @ rotation, y @ rotation), T.wrd(x, y), 1e-11)
    close(T.wrd(torch.cat([x, x]), y), T.wrd(x, y), 1e-11)
    assert 0 <= T.wrd(x, y) <= 2 + 1e-12


@settings(max_examples=40, deadline=None)
@given(seed=seeds, lengths=st.tuples(sizes, sizes, sizes))
def test_triangle_inequalities(seed, lengths):
    x, y, z = (clouds(m, 3, seed=seed + i) for i, m in enumerate(lengths))
    assert T.wmd(x, z) <= T.wmd(x, y) + T.wmd(y, z) + 1e-10
    assert T.wrd(x, z).sqrt() <= T.wrd(x, y).sqrt() + T.wrd(y, z).sqrt() + 1e-7
    assert T.wrd(x, z) <= 2 * (T.wrd(x, y) + T.wrd(y, z)) + 1e-10


def test_padding_changes_nothing():
    documents = [clouds(m, 4, seed=m) for m in (1, 5, 3)]
    query = clouds(4, 4, seed=27)
    y, q = T.pad(documents)
    assert y.shape == (3, 5, 4) and q.shape == (3, 5)
    cost = torch.cdist(query, y)
    u = torch.full((4,), 0.25, dtype=F64)
    for i, document in enumerate(documents):
        close(T.wmd(query, y, q=q)[i], T.wmd(query, document))
        close(T.wrd(query, y)[i], T.wrd(query, document))
        close(T.relaxed_bound(u, q, cost)[i], T.relaxed_bound(u, q[i][q[i] > 0], torch.cdist(query, document)))
        close(T.centroid_bound(query, y, q=q)[i], T.centroid_bound(query, document))
        close(T.spread_bound(query, y, q=q)[i], T.spread_bound(query, document))
        close(T.gelbrich_bound(query, y, q=q)[i], T.gelbrich_bound(query, document))
    own = [masses(len(d), generator(i)) for i, d in enumerate(documents)]
    close(T.wmd(query, y, q=T.pad(documents, own)[1])[1], T.wmd(query, documents[1], q=own[1]))


@pytest.mark.parametrize("distance", [T.wmd, T.wrd])
def test_sentence_distances_train_by_gradient(distance):
    x, y = clouds(3, 4, seed=28).requires_grad_(), clouds(5, 4, seed=29)
    (gradient,) = torch.autograd.grad(distance(x, y), x)
    direction, h = clouds(3, 4, seed=30), 1e-6
    with torch.no_grad():
        numeric = (distance(x + h * direction, y) - distance(x - h * direction, y)) / (2 * h)
    close((gradient * direction).sum(), numeric, 1e-7)


# -------------------------------------------------------------------------------------------- errors

HALF, COST = torch.full((2,), 0.5), torch.ones(2, 2)


@pytest.mark.parametrize("solve", [T.emd, lambda p, q, cost: T.sinkhorn(p, q, cost, 0.1)])
@pytest.mark.parametrize(
    ("p", "q", "cost", "error", "message"),
    [
        (torch.tensor([1.5, -0.5]), HALF, COST, ValueError, r"p should hold finite masses >= 0, got values from -0.5"),
        (HALF, torch.tensor([math.nan, 0.5]), COST, ValueError, r"q should hold finite masses"),
        (HALF, torch.tensor([math.inf, 0.5]), COST, ValueError, r"q should hold finite masses"),
        (HALF, 2 * HALF, COST, ValueError, r"p and q should have equal sums, got 1 and 2"),
        (HALF.double(), HALF.double() * (1 + 1e-7), COST.double(), ValueError, r"equal sums"),
        (0 * HALF, 0 * HALF, COST, ValueError, r"p has no mass in 1 of 1 problems"),
        (HALF, HALF, COST * math.nan, ValueError, r"cost has 4 non-finite entries"),
        (HALF, HALF, COST * -math.inf, ValueError, r"cost has 4 non-finite entries"),
        (HALF, HALF, torch.ones(2, 3), ValueError, r"q: expected shape \(\.\.\., n=3\), got \(2,\)"),
        (HALF, HALF, torch.ones(2), ValueError, r"cost: expected shape"),
        (torch.ones(0), torch.ones(0), torch.ones(0, 0), ValueError, r"p is empty \(shape \(0,\)\)"),
        (HALF.tolist(), HALF, COST, TypeError, r"p should be a torch tensor"),
        (HALF.long(), HALF, COST, TypeError, r"p should have a floating dtype"),
        (HALF.double(), HALF, COST, TypeError, r"p is torch.float64"),
        (HALF.expand(3, 2), HALF.expand(4, 2), COST, ValueError, r"batch axes do not broadcast: p \(3,\), q \(4,\)"),
    ],
)
def test_bad_problems_are_named(solve, p, q, cost, error, message):
    with pytest.raises(error, match=message):
        solve(p, q, cost)


def test_unequal_sums_name_the_worst_of_a_batch():
    p = torch.stack([HALF, HALF])
    with pytest.raises(ValueError, match=r"got 1 and 3"):
        T.emd(p, torch.stack([HALF, 3 * HALF]), COST)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: T.wmd(torch.ones(2, 3), torch.ones(2, 4)), ValueError, r"y: expected shape \(\.\.\., n, d=3\), got \(2, 4\)"),
        (lambda: T.wmd(torch.ones(0, 3), torch.ones(2, 3)), ValueError, r"x is empty"),
        (lambda: T.wmd(torch.ones(2, 3), torch.ones(2, 3) * math.nan), ValueError, r"cost has"),
        (lambda: T.wmd(torch.ones(2, 3), torch.ones(2, 3), p=torch.ones(2)), ValueError, r"p should sum to 1, got sums from 2"),
        (lambda: T.wmd(torch.ones(2, 3), torch.ones(2, 3), q=torch.ones(3) / 3), ValueError, r"q: expected shape"),
        (lambda: T.wrd(torch.zeros(2, 3), torch.ones(2, 3)), ValueError, r"all vectors are zero in 1 of 1 sets"),
        (lambda: T.wrd(torch.ones(2, 3) * math.inf, torch.ones(2, 3)), ValueError, r"x has 6 non-finite"),
        (lambda: T.wrd(torch.ones(2, 3), torch.ones(2, 4)), ValueError, r"y: expected shape"),
        (lambda: T.wrd(torch.ones(0, 3), torch.ones(2, 3)), ValueError, r"x is empty"),
        (lambda: T.pad([]), ValueError, r"clouds is empty"),
        (lambda: T.pad([torch.ones(2, 3), torch.ones(2, 4)]), ValueError, r"clouds\[1\]: expected shape"),
        (lambda: T.pad([torch.ones(2, 3), torch.ones(0, 3)]), ValueError, r"clouds\[1\] is empty"),
        (lambda: T.pad([torch.ones(2, 3)], []), ValueError, r"as many masses as clouds"),
        (lambda: T.pad([torch.ones(2, 3)], [torch.ones(3)]), ValueError, r"masses\[0\]: expected shape"),
        (lambda: T.sinkhorn(HALF, HALF, COST, 0.0), ValueError, r"eps should be a number in \(0"),
        (lambda: T.sinkhorn(HALF, HALF, COST, 0.1, iterations=0), ValueError, r"iterations should be an integer >= 1"),
        (lambda: T.relaxed_bound(HALF, HALF, torch.ones(2, 3)), ValueError, r"q: expected shape"),
        (lambda: T.directions(torch.ones(3)), ValueError, r"x: expected shape"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_solver_that_stops_early_is_an_error(monkeypatch):
    monkeypatch.setattr(T, "emd_c", lambda *a: (np.zeros((2, 2)), 0.0, np.zeros(2), np.zeros(2), 3))
    with pytest.raises(RuntimeError, match=r"stopped before the optimum \(code 3\) on a problem of 2 x 2"):
        T.emd(HALF, HALF, COST)
