"""Effective rank by its definition, peak memory by sizes known by hand and the allocator, fits against scipy and statsmodels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import linregress

from kexue.numerics import PeakMemory, effective_rank, fit_power_law, minimize, softmax_regression


@given(st.integers(1, 7), st.integers(1, 7), st.floats(0.01, 1.0), st.integers(0, 2**31))
def test_effective_rank_is_the_least_rank_of_a_good_approximation(n, m, energy, seed):
    A = torch.randn(n, m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rank = int(effective_rank(A, energy))
    u, s, vh = torch.linalg.svd(A)

    def missed(r: int) -> float:
        return float((A - (u[:, :r] * s[:r]) @ vh[:r]).square().sum() / A.square().sum())

    assert missed(rank) <= 1 - energy + 1e-12
    assert missed(rank - 1) > 1 - energy - 1e-12


def test_effective_rank_of_known_spectra_in_a_batch():
    spectra = torch.tensor([[3.0, 0.0, 0.0], [1.0, 1.0, 1.0], [10.0, 1.0, 0.1], [0.0, 0.0, 0.0]])
    assert effective_rank(torch.diag_embed(spectra)).tolist() == [1, 3, 1, 0]
    assert effective_rank(torch.diag_embed(spectra), energy=0.999).tolist() == [1, 3, 2, 0]
    assert effective_rank(torch.eye(100), energy=0.5).item() == 50


@pytest.mark.parametrize("energy", [0.0, -1.0, 1.5, float("nan"), "0.9"])
def test_effective_rank_refuses_a_share_out_of_range(energy):
    with pytest.raises(ValueError, match="energy"):
        effective_rank(torch.eye(3), energy)


def test_effective_rank_refuses_bad_matrices():
    with pytest.raises(ValueError, match=r"A: expected shape"):
        effective_rank(torch.ones(3))
    with pytest.raises(ValueError, match="non-finite"):
        effective_rank(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(TypeError, match="floating"):
        effective_rank(torch.ones(2, 2, dtype=torch.int64))


def test_peak_memory_counts_what_is_alive_together():
    given_before = torch.zeros(1000)
    with PeakMemory() as memory:
        a = given_before + 1  # 4000 bytes
        b = a.double()  # 8000 more
        del a
        c = b[:10]  # a view
        b += 1  # in place
        del b, c
        _ = torch.zeros(100)
    assert memory.peak == 12000


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peak_memory_agrees_with_the_allocator():
    x = torch.randn(200, 64)

    def softmax_attention() -> torch.Tensor:
        logits = x @ x.T
        weights = logits.softmax(-1)
        del logits
        return weights @ x

    with PeakMemory() as memory:
        softmax_attention()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        softmax_attention()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert memory.peak == pytest.approx(peak, rel=0.01)


def test_peak_memory_of_a_long_chain_that_autograd_keeps():
    w = torch.ones(100, requires_grad=True)
    with PeakMemory() as memory:
        x = w
        for _ in range(3000):
            x = x.exp().reciprocal()  # each keeps its result: 2 x 400 bytes a turn
        x.sum().backward()
    assert memory.peak == pytest.approx(3000 * 800, rel=0.01)


@given(st.integers(3, 30), st.floats(-3, 3), st.floats(0.01, 100), st.floats(0.01, 1), st.integers(0, 2**31))
def test_fit_power_law_is_scipys_regression(n, exponent, scale, noise, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(4, n, dtype=torch.float64, generator=g).mul(5).exp()
    y = scale * x**exponent * torch.randn(4, n, dtype=torch.float64, generator=g).mul(noise).exp()
    got = fit_power_law(x, y)
    for i in range(4):
        want = linregress(x[i].log(), y[i].log())
        assert got.exponent[i].item() == pytest.approx(want.slope, rel=1e-7, abs=1e-9)
        assert got.scale[i].log().item() == pytest.approx(want.intercept, rel=1e-7, abs=1e-8)
        assert got.stderr[i].item() == pytest.approx(want.stderr, rel=1e-6, abs=1e-7)
    assert fit_power_law(x[0], y).exponent.shape == (4,)


def test_fit_power_law_refuses_bad_points():
    x = torch.tensor([1.0, 2.0, 3.0])
    for bad, words in {
        (x, torch.tensor([1.0, -2.0, 0.0])): "y has 2 entries <= 0",
        (x, torch.ones(4)): "y: expected shape",
        (x[[0, 0, 1]], x): "x has 2 distinct values",
        (x[:2], x[:2]): "x has 2 distinct values",
        (x, torch.tensor([1.0, float("nan"), 1.0])): "y has 1 non-finite",
    }.items():
        with pytest.raises(ValueError, match=words):
            fit_power_law(*bad)
    with pytest.raises(TypeError, match="floating"):
        fit_power_law(torch.arange(1, 4), x)


# ------------------------------------------------------------------------------------------- small fits


def rosenbrock(w: torch.Tensor) -> torch.Tensor:
    return (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-7), (torch.float32, 2e-3)])
def test_minimize_ends_at_minima_known_by_hand(dtype, atol):
    start = torch.tensor([-1.2, 1.0], dtype=dtype)
    found = minimize(rosenbrock, start)
    assert found.dtype == dtype and not found.requires_grad
    torch.testing.assert_close(found, torch.ones(2, dtype=dtype), rtol=0, atol=atol)
    assert start.tolist() == torch.tensor([-1.2, 1.0], dtype=dtype).tolist()
    bowl = torch.arange(6, dtype=dtype).view(2, 3)
    torch.testing.assert_close(minimize(lambda w: (w - bowl).square().sum(), torch.zeros(2, 3, dtype=dtype)), bowl)


@pytest.mark.parametrize(("loss", "start", "error", "words"), [
    (rosenbrock, torch.zeros(2, dtype=torch.int64), TypeError, "start should have a floating dtype"),
    (rosenbrock, torch.tensor([0.0, math.nan]), ValueError, "start has 1 non-finite"),
    (rosenbrock, torch.zeros(0), ValueError, "start is empty"),
    (lambda w: w, torch.zeros(2), ValueError, r"loss\(start\): expected shape \(\)"),
    (lambda w: w.sum().log(), torch.zeros(2), ValueError, r"loss\(start\) should be finite, got -inf"),
    (lambda w: w.sum().sqrt() + 5 * w.sum(), torch.ones(1), ArithmeticError, "became nan"),
])
def test_minimize_refuses(loss, start, error, words):
    with pytest.raises(error, match=words):
        minimize(loss, start)


def test_minimize_says_when_it_did_not_arrive():
    with pytest.raises(ArithmeticError, match="no minimum within 3 steps; the loss is"):
        minimize(rosenbrock, torch.tensor([-1.2, 1.0], dtype=torch.float64), steps=3)


def draws(seed: int, *size: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs with a constant, and labels that depend on them."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(*size, dtype=torch.float64, generator=rng)
    x[..., -1] = 1
    scores = x @ torch.randn(size[-1], classes, dtype=torch.float64, generator=rng)
    return x, scores.softmax(-1).flatten(0, -2).multinomial(1, generator=rng).view(size[:-1])


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_softmax_regression_agrees_with_statsmodels(classes):
    x, y = draws(classes, 2, 3, 150, 4, classes=classes)
    beta = softmax_regression(x, y, classes)
    assert beta.shape == (2, 3, 4, classes)
    for i in np.ndindex(2, 3):
        theirs = sm.MNLogit(y[i].numpy(), x[i].numpy()).fit(disp=0, tol=1e-12, maxiter=100).params
        np.testing.assert_allclose(beta[i][:, 1:].numpy(), theirs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(softmax_regression(x.float(), y, classes), beta.float(), rtol=1e-4, atol=1e-4)


@given(st.integers(2, 4), st.integers(1, 3), st.integers(0, 2**31))
def test_softmax_regression_is_stationary_with_weights_and_offset(classes, d, seed):
    x, y = draws(seed, 60, d, classes=classes)
    rng = np.random.default_rng(seed)
    weight, offset = torch.from_numpy(rng.uniform(0, 3, 60)), torch.from_numpy(rng.normal(size=classes))
    beta = softmax_regression(x, y, classes, weight=weight, offset=offset, ridge=0.1).numpy()
    p = softmax(x.numpy() @ beta + offset.numpy(), axis=1)
    gradient = x.numpy().T @ (weight.numpy()[:, None] * (p - np.eye(classes)[y.numpy()])) + 0.1 * beta
    np.testing.assert_allclose(gradient[:, 1:], 0, atol=1e-7)
    assert not beta[:, 0].any()


def test_softmax_regression_of_separable_and_of_far_off_data_ends():
    x = torch.tensor([[-1.0, 1.0], [-2.0, 1.0], [1.0, 1.0], [3.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([0, 0, 1, 1])
    loose, tight = (softmax_regression(x, y, 2, ridge=ridge) for ridge in (1e-3, 1e-9))
    assert bool(((x @ tight).argmax(1) == y).all()) and float(tight[0, 1]) > 2 * float(loose[0, 1]) > 0
    far = torch.cat([1e3 * x[:, :1], x[:, 1:]], 1)  # a full first step of Newton overshoots
    assert bool(((far @ softmax_regression(far, y, 2)).argmax(1) == y).all())


def test_softmax_regression_counts_weights_as_copies():
    x, y = draws(0, 40, 2, classes=3)
    times = torch.arange(40) % 4
    torch.testing.assert_close(
        softmax_regression(x, y, 3, weight=times.double()),
        softmax_regression(x.repeat_interleave(times, 0), y.repeat_interleave(times), 3), rtol=1e-6, atol=1e-7,
    )


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"inputs": torch.ones(5, dtype=torch.float64)}, ValueError, "inputs: expected shape"),
    ({"inputs": torch.full((5, 2), math.inf)}, ValueError, "inputs has 10 non-finite"),
    ({"target": torch.tensor([0, 1, 2, 3, 0])}, ValueError, r"target should be in \[0, 2\], got 3"),
    ({"target": torch.zeros(5)}, TypeError, "target should be int64"),
    ({"target": torch.zeros(4, dtype=torch.int64)}, ValueError, "target: expected shape"),
    ({"classes": 1}, ValueError, "classes"),
    ({"offset": torch.zeros(2, dtype=torch.float64)}, ValueError, "offset: expected shape"),
    ({"offset": torch.zeros(3)}, TypeError, "offset is torch.float32"),
    ({"weight": -torch.ones(5, dtype=torch.float64)}, ValueError, "weight has 5 negative"),
    ({"weight": torch.ones(4, dtype=torch.float64)}, ValueError, "weight: expected shape"),
    ({"ridge": 0.0}, ValueError, "ridge"),
    ({"steps": 1}, ArithmeticError, "no convergence within 1 steps"),
])
def test_softmax_regression_refuses(change, error, words):
    x, y = draws(1, 5, 2, classes=3)
    arguments = {"inputs": x, "target": y, "classes": 3} | change
    with pytest.raises(error, match=words):
        softmax_regression(arguments.pop("inputs"), arguments.pop("target"), arguments.pop("classes"), **arguments)
