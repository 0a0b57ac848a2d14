"""Effective rank against its definition, peak memory against sizes known by hand and the allocator, fits against scipy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import linregress

from kexue.numerics import PeakMemory, effective_rank, fit_power_law


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
