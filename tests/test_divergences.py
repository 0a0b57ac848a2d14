"""Energy distance against SciPy and brute force, Fréchet distance against scipy.linalg.sqrtm and closed forms."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.divergences import energy_distance, frechet_gaussian

DISTANCES = (energy_distance, frechet_gaussian)
seeds = st.integers(0, 2**31)


def normal(seed, *size):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 30), st.integers(1, 30))
def test_energy_distance_is_the_square_of_scipys(seed, n, m):
    x, y = normal(seed, n, 1), 2 * normal(seed + 1, m, 1) + 1
    peer = scipy.stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy()) ** 2
    assert energy_distance(x, y).item() == pytest.approx(peer, abs=1e-10)


def test_energy_distance_by_brute_force_in_several_dimensions():
    x, y = normal(0, 7, 3), normal(1, 5, 3) + 1

    def average(a, b):
        return sum(float(np.linalg.norm(p - q)) for p in a.numpy() for q in b.numpy()) / (len(a) * len(b))

    assert energy_distance(x, y).item() == pytest.approx(2 * average(x, y) - average(x, x) - average(y, y), rel=1e-12)


def test_energy_distance_does_not_depend_on_the_chunk():
    x, y = normal(0, 50, 4), normal(1, 33, 4)
    assert energy_distance(x, y, chunk=7) == pytest.approx(energy_distance(x, y).item(), rel=1e-12)


def test_frechet_distance_against_the_matrix_square_root():
    x, y = normal(0, 60, 5) @ normal(1, 5, 5), normal(2, 40, 5) @ normal(3, 5, 5) + 1
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    mean = ((x.mean(0) - y.mean(0)) ** 2).sum().item()
    peer = mean + np.trace(a + b - 2 * np.real(scipy.linalg.sqrtm(a @ b)))
    assert frechet_gaussian(x, y).item() == pytest.approx(peer, rel=1e-9)


def test_frechet_distance_of_a_scaled_and_shifted_sample():
    x = normal(0, 200, 4)
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    expected = ((2 * x.mean(0) + shift).square().sum()) + torch.cov(x.T).trace() * 4     # factor 3: (3 - 1)² tr C
    assert frechet_gaussian(x, 3 * x + shift).item() == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_with_fewer_points_than_dimensions():
    x = normal(0, 3, 8)
    assert frechet_gaussian(x, x + 2).item() == pytest.approx(32.0, rel=1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_both_are_symmetric_rigid_and_zero_on_the_diagonal(distance, seed):
    x, y = normal(seed, 12, 3), 1.5 * normal(seed + 1, 9, 3)
    rotation = torch.linalg.qr(normal(seed + 2, 3, 3)).Q
    value = distance(x, y).item()
    assert value >= 0
    assert distance(y, x).item() == pytest.approx(value, abs=1e-9)
    assert distance(x @ rotation + 5, y @ rotation + 5).item() == pytest.approx(value, abs=1e-9)
    assert distance(x, x).item() == pytest.approx(0, abs=1e-12)
    power = 1 if distance is energy_distance else 2
    assert distance(3 * x, 3 * y).item() == pytest.approx(3**power * value, abs=1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
def test_float32_far_from_the_origin_keeps_its_digits(distance):
    x, y = normal(0, 100, 3), normal(1, 100, 3) + 0.5
    far = distance((x + 1000).float(), (y + 1000).float())
    assert far.dtype == torch.float32
    assert far.item() == pytest.approx(distance(x, y).item(), rel=1e-3)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(3), torch.zeros(3, 2), r"x: expected shape \(n, d\), got \(3,\)"),
        (torch.zeros(3, 2), torch.zeros(3, 4), r"y: expected shape \(m, d=2\), got \(3, 4\)"),
        (torch.zeros(0, 2), torch.zeros(3, 2), "x should have at least"),
        (torch.zeros(3, 2), torch.full((3, 2), float("nan")), "y has 6 non-finite"),
        (torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.float64), "expected the same"),
        (torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long), "floating dtype"),
    ],
)
def test_bad_samples_are_named(distance, x, y, message):
    with pytest.raises((TypeError, ValueError), match=message):
        distance(x, y)


def test_a_covariance_needs_two_rows_and_a_chunk_one():
    with pytest.raises(ValueError, match="x should have at least 2 rows"):
        frechet_gaussian(torch.zeros(1, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="chunk should be an integer >= 1"):
        energy_distance(torch.zeros(3, 2), torch.zeros(3, 2), chunk=0)
