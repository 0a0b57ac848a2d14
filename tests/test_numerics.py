"""Effective rank against its definition; peak memory against sizes known by hand and torch's own allocator trace."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kexue.numerics import PeakMemory, effective_rank


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
