"""F1 and its optimum against scikit-learn and brute force; 0-1 optima against enumeration in exact arithmetic."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, linprog
from scipy.stats import norm
from sklearn.datasets import load_breast_cancer
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, precision_recall_curve
from sklearn.preprocessing import StandardScaler
from torch.autograd import gradcheck

from kexue.metrics import dinkelbach_f1, f1_weights, smooth_f1, zero_one_1d, zero_one_2d

F64 = torch.float64

# ------------------------------------------------------------------------------------------------- F1


def test_smooth_f1_of_decisions_is_scikit_learns_f1_and_its_gradient_is_the_articles():
    gen = torch.Generator().manual_seed(0)
    y = (torch.rand(4, 50, generator=gen) < 0.3).double()
    h = (torch.rand(4, 50, generator=gen) < 0.4).double()
    assert smooth_f1(h, y).tolist() == pytest.approx([f1_score(a, b) for a, b in zip(y.numpy(), h.numpy())], rel=1e-12)
    p = torch.rand(4, 50, dtype=F64, generator=gen).requires_grad_()
    f1 = smooth_f1(p, y)
    (grad,) = torch.autograd.grad(f1.sum(), p)
    torch.testing.assert_close(grad, (2 * (y - f1[:, None] / 2) / (y + p).sum(-1, keepdim=True)).detach())
    positive, negative = f1_weights(f1)  # y w+ - (1 - y) w- is the same up to the factor 2
    assert not positive.requires_grad
    signed = y * positive[:, None] - (1 - y) * negative[:, None]
    torch.testing.assert_close(grad, (signed / (y + p).sum(-1, keepdim=True)).detach())
    assert gradcheck(lambda q: smooth_f1(q, y), p)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=9).filter(any))
def test_dinkelbach_equals_brute_force_over_all_decisions(eighths):
    eta = torch.tensor(eighths, dtype=F64) / 8
    mass = sum(eighths)
    best = max(
        Fraction(2 * sum(e for e, h in zip(eighths, hs) if h), mass + 8 * sum(hs))
        for hs in itertools.product((0, 1), repeat=len(eighths))
    )
    found = dinkelbach_f1(eta)
    assert found.f1 == pytest.approx(float(best), rel=1e-14)
    assert found.threshold == found.f1 / 2
    decided = smooth_f1((eta > found.threshold).double(), eta)
    assert float(decided) == pytest.approx(found.f1, rel=1e-14)
    assert list(found.history) == sorted(found.history) and found.history[-1] == found.f1
    excess = 2 * float((eta - found.threshold).clamp(min=0).sum())
    assert excess == pytest.approx(found.f1 * float(eta.sum()), rel=1e-12)


def quantiles(n: int) -> torch.Tensor:
    return (torch.arange(n, dtype=F64) + 0.5) / n


def test_dinkelbach_finds_the_closed_form_of_two_gaussians_and_the_best_threshold_of_the_curve():
    prior, d = 0.1, 1.5

    def excess(f):  # 2 E(eta - f/2)+ - f prior, where eta > f/2 is x > cut
        cut = d / 2 + (math.log((f / 2) / (1 - f / 2)) - math.log(prior / (1 - prior))) / d
        hit, alarm = norm.sf(cut - d), norm.sf(cut)
        return 2 * (prior * hit - f / 2 * (prior * hit + (1 - prior) * alarm)) - f * prior

    closed = brentq(excess, 0.01, 0.99)
    assert closed == pytest.approx(0.47666, abs=1e-5)
    x = torch.cat([torch.special.ndtri(quantiles(20_000)) + d, torch.special.ndtri(quantiles(180_000))])
    eta = torch.sigmoid(d * x - d * d / 2 + math.log(prior / (1 - prior)))
    found = dinkelbach_f1(eta)
    assert found.f1 == pytest.approx(closed, abs=1e-4)
    assert len(found.history) <= 8
    gen = torch.Generator().manual_seed(1)
    y = torch.rand(len(eta), dtype=F64, generator=gen) < eta
    precision, recall, _ = precision_recall_curve(y.numpy(), eta.numpy())
    assert found.f1 == pytest.approx(float((2 * precision * recall / (precision + recall + 1e-300)).max()), abs=0.01)


def test_dinkelbach_at_the_edges():
    assert dinkelbach_f1(torch.tensor([1.0])).f1 == 1
    assert dinkelbach_f1(torch.tensor([1e-12, 0.0], dtype=F64)).f1 == pytest.approx(2e-12)
    assert dinkelbach_f1(torch.tensor([1.0, 0.0])) == (1.0, 0.5, dinkelbach_f1(torch.tensor([1.0, 0.0])).history)


# -------------------------------------------------------------------------------------- 0-1 error


@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=1, max_size=12))
def test_thresholds_by_brute_force(pairs):
    xs, ys = zip(*pairs)
    x, y = torch.tensor(xs, dtype=F64), torch.tensor(ys)
    cuts = [c + half for c in range(-6, 6) for half in (0.0, 0.5)]
    best = min(sum((s * a > s * c) != b for a, b in pairs) for c in cuts for s in (1, -1))
    found = zero_one_1d(x, y)
    assert found.errors == best == int(((x * found.normal[0] > found.threshold) != y).sum())
    assert abs(float(found.normal[0])) == 1
    assert zero_one_1d(x, y.long()) == found


def test_thresholds_between_neighbouring_numbers_and_beyond_the_last_digit():
    one = 1.0
    for labels in ([0, 1], [1, 0]):
        x = torch.tensor([one, np.nextafter(one, 2)], dtype=F64)
        found = zero_one_1d(x, torch.tensor(labels))
        assert found.errors == 0 and ((x * found.normal > found.threshold).long() == torch.tensor(labels)).all()
    huge = torch.tensor([1e300, -1e300], dtype=F64)
    for labels in ([1, 1], [0, 0], [0, 1]):
        found = zero_one_1d(huge, torch.tensor(labels))
        assert found.errors == 0 and ((huge * found.normal > found.threshold).long() == torch.tensor(labels)).all()


def separable(points, labels) -> bool:
    """Whether some line has exactly these samples strictly on its positive side: a linear programme."""
    rows = [[-s * a, -s * b, -s] for (a, b), s in zip(points, [1 if label else -1 for label in labels])]
    return linprog([0, 0, 0], A_ub=rows, b_ub=[-1] * len(rows), bounds=[(None, None)] * 3, method="highs").status == 0


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), min_size=1, max_size=7))
def test_lines_by_linear_programmes_on_a_grid_with_many_collinear_and_equal_points(samples):
    points, y = [(a, b) for a, b, _ in samples], torch.tensor([c for *_, c in samples])
    distinct = sorted(set(points))
    best = len(samples)
    for side in itertools.product((False, True), repeat=len(distinct)):
        wrong = sum(side[distinct.index(p)] != bool(label) for p, label in zip(points, y))
        if wrong < best and separable(distinct, side):
            best = wrong
    x = torch.tensor(points, dtype=F64)
    found = zero_one_2d(x, y)
    assert found.errors == best == int(((x @ found.normal > found.threshold) != y).sum())
    assert float(found.normal.norm()) == pytest.approx(1)


def test_lines_are_no_worse_than_any_of_many_random_lines_and_invariant():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, dtype=F64, generator=gen)
    y = torch.rand(60, generator=gen) < torch.sigmoid(2 * x[:, 0] - x[:, 1]).float()
    found = zero_one_2d(x, y)
    angle = torch.linspace(0, 2 * math.pi, 2000, dtype=F64)
    best = min(zero_one_1d(x @ torch.stack([a.cos(), a.sin()]), y).errors for a in angle)
    assert 0 < found.errors <= best <= found.errors + 1
    assert zero_one_2d(x, ~y).errors == found.errors
    assert zero_one_2d(1e6 + 1e4 * x[torch.randperm(60, generator=gen)].flip(1), y).errors >= 0
    moved = 100 + x @ torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=F64) * 1e-3
    assert zero_one_2d(moved, y).errors == found.errors
    assert zero_one_2d(torch.stack([x[:, 0], 0 * x[:, 0]], 1), y).errors == zero_one_1d(x[:, 0], y).errors


def test_optima_of_real_data_beat_logistic_regression_by_known_counts():
    data = load_breast_cancer()
    x = StandardScaler().fit_transform(data.data)
    x = torch.tensor(PCA(2, svd_solver="full").fit_transform(x))
    y = torch.tensor(data.target)
    errors = [zero_one_1d(x[:, 0], y).errors, zero_one_2d(x, y).errors]
    fits = [LogisticRegression(C=1e8).fit(x[:, :d].numpy(), y.numpy()).predict(x[:, :d].numpy()) for d in (1, 2)]
    assert errors == [45, 23]
    assert [int((fit != data.target).sum()) for fit in fits] == [49, 25]


# ---------------------------------------------------------------------------------------- bad input

Y = torch.tensor([1.0, 0.0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: smooth_f1(Y, Y[:1]), ValueError, r"y: expected shape \(\.\.\., N=2\), got \(1,\)"),
        (lambda: smooth_f1(Y, Y.bool()), TypeError, r"y should have a floating dtype, got torch.bool"),
        (lambda: smooth_f1(Y + 0.5, Y), ValueError, r"p has 1 entries outside \[0, 1\] or NaN"),
        (lambda: smooth_f1(Y * math.nan, Y), ValueError, r"p has 2 entries outside"),
        (lambda: smooth_f1(Y, -Y), ValueError, r"y has 1 entries outside"),
        (lambda: smooth_f1(Y, 0 * Y), ValueError, r"y has 1 rows without positives"),
        (lambda: f1_weights(torch.tensor(1.5)), ValueError, r"f1 has 1 entries outside"),
        (lambda: dinkelbach_f1(Y + 1), ValueError, r"eta has 1 entries outside"),
        (lambda: dinkelbach_f1(0 * Y), ValueError, r"eta has no positive mass"),
        (lambda: dinkelbach_f1(Y[:0]), ValueError, r"eta has no positive mass"),
        (lambda: dinkelbach_f1(Y[None]), ValueError, r"eta: expected shape \(N\), got \(1, 2\)"),
        (lambda: dinkelbach_f1(Y.long()), TypeError, r"eta should have a floating dtype"),
        (lambda: zero_one_1d(Y[:, None], Y.long()), ValueError, r"x: expected shape \(N\), got \(2, 1\)"),
        (lambda: zero_one_1d(Y, Y), TypeError, r"y should be bool or int64 labels in \{0, 1\}, got torch.float32"),
        (lambda: zero_one_1d(Y, 2 * Y.long()), ValueError, r"y should hold 0 and 1 only, got values from 0 to 2"),
        (lambda: zero_one_1d(Y * math.inf, Y.long()), ValueError, r"x has 2 non-finite entries"),
        (lambda: zero_one_1d(Y[:0], Y[:0].long()), ValueError, r"x has no samples"),
        (lambda: zero_one_2d(torch.zeros(2, 3), Y.long()), ValueError, r"x: expected shape \(N, 2\), got \(2, 3\)"),
        (lambda: zero_one_2d(torch.zeros(3, 2), Y.long()), ValueError, r"y: expected shape \(N=3\), got \(2,\)"),
        (lambda: zero_one_2d(torch.zeros(2, 2).long(), Y.long()), TypeError, r"x should have a floating dtype"),
        (lambda: zero_one_2d(torch.full((2, 2), math.nan), Y.long()), ValueError, r"x has 4 non-finite"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
