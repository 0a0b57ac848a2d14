"""Exact search with bounds against the full scan."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.neighbors import nearest
from kexue.transport import centroid_bound, pad, relaxed_bound, wmd

F64 = torch.float64


def scan(distances: torch.Tensor, k: int) -> tuple[list[int], list[float]]:
    order = sorted(range(len(distances)), key=lambda i: (float(distances[i]), i))[:k]
    return order, [float(distances[i]) for i in order]


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.integers(0, 6), min_size=1, max_size=30), data=st.data(), levels=st.integers(0, 3), batch=st.integers(1, 5)
)
def test_equals_the_full_scan_with_any_valid_bounds_and_many_ties(values, data, levels, batch):
    distances = torch.tensor(values, dtype=F64)
    k = data.draw(st.integers(1, len(values)))
    lower = [
        torch.tensor([data.draw(st.integers(-2, value)) for value in values], dtype=F64) for _ in range(levels)
    ]
    seen: list[int] = []

    def distance(i: torch.Tensor) -> torch.Tensor:
        seen.extend(i.tolist())
        return distances[i]

    found = nearest(distance, len(values), k, bounds=[lambda i, b=b: b[i] for b in lower], batch=batch)
    assert (found.indices.tolist(), found.distances.tolist()) == scan(distances, k)
    assert found.evaluations == len(seen) == len(set(seen))


def test_every_candidate_is_evaluated_at_most_once_and_only_if_needed():
    distances = torch.tensor([5.0, 1.0, 3.0, 2.0, 9.0, 4.0], dtype=F64)
    seen: list[int] = []

    def distance(i: torch.Tensor) -> torch.Tensor:
        seen.extend(i.tolist())
        return distances[i]

    found = nearest(distance, 6, 2, bounds=[lambda i: distances[i]])
    assert sorted(seen) == [1, 3] and found.evaluations == 2
    seen.clear()
    found = nearest(distance, 6, 2)
    assert sorted(seen) == list(range(6)) and found.evaluations == 6
    seen.clear()
    half = distances / 2
    found = nearest(distance, 6, 1, bounds=[lambda i: half[i]])
    assert seen == [1, 3] and found.indices.tolist() == [1]  # 2/2 <= 1 has to be looked at, 3/2 has not


def test_a_second_bound_is_asked_only_about_what_the_first_leaves():
    distances = torch.arange(1.0, 11.0, dtype=F64)
    asked: list[int] = []

    def second(i: torch.Tensor) -> torch.Tensor:
        asked.extend(i.tolist())
        return distances[i]

    found = nearest(lambda i: distances[i], 10, bounds=[lambda i: distances[i] - 4, second])
    assert asked == [1, 2, 3, 4] and found.evaluations == 1


def test_rounding_of_a_bound_does_not_lose_a_tie():
    distances = torch.tensor([1.0, 1.0], dtype=F64)
    bound = torch.tensor([1.0 + 1e-14, 0.5], dtype=F64)
    assert nearest(lambda i: distances[i], 2, bounds=[lambda i: bound[i]]).indices.tolist() == [0]
    zero, noise = torch.zeros(2, dtype=F64), torch.tensor([1e-16, 0.0], dtype=F64)
    assert nearest(lambda i: zero[i], 2, bounds=[lambda i: noise[i]], atol=1e-15).indices.tolist() == [0]
    assert nearest(lambda i: zero[i], 2, bounds=[lambda i: noise[i]]).indices.tolist() == [1]


@pytest.mark.parametrize("seed", range(4))
def test_documents_under_wmd(seed):
    gen = torch.Generator().manual_seed(seed)
    topics = 3 * torch.randn(8, 6, dtype=F64, generator=gen)

    def document() -> torch.Tensor:
        about = topics[torch.randint(8, (2,), generator=gen)]
        m = int(torch.randint(2, 7, (1,), generator=gen))
        return about[torch.randint(2, (m,), generator=gen)] + torch.randn(m, 6, dtype=F64, generator=gen)

    y, q = pad([document() for _ in range(60)])
    y[40:50], q[40:50] = y[:10], q[:10]  # exact ties
    for _ in range(5):
        x = document()
        p = torch.full((len(x),), 1 / len(x), dtype=F64)
        cost = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        found = nearest(
            lambda i, x=x: wmd(x, y[i], q=q[i]), 60, 5,
            bounds=[lambda i, x=x: centroid_bound(x, y[i], q=q[i]), lambda i, p=p, c=cost: relaxed_bound(p, q[i], c[i])],
        )
        indices, distances = scan(wmd(x, y, q=q), 5)
        assert found.indices.tolist() == indices
        assert found.distances.tolist() == distances
        assert found.evaluations < 40


ONES = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nearest(lambda i: ONES[i], 3, 0), ValueError, r"k should be an integer in \[1, 3\], got 0"),
        (lambda: nearest(lambda i: ONES[i], 3, 4), ValueError, r"k should be an integer in \[1, 3\], got 4"),
        (lambda: nearest(lambda i: ONES[i], 0), ValueError, r"n should be an integer >= 1"),
        (lambda: nearest(lambda i: ONES[i], 3, batch=0), ValueError, r"batch should be"),
        (lambda: nearest(lambda i: ONES[i], 3, atol=-1.0), ValueError, r"atol should be"),
        (lambda: nearest(lambda i: ONES[i] * math.nan, 3), ValueError, r"distance\(i\) has 1 NaN of 1"),
        (lambda: nearest(lambda i: ONES[i], 3, bounds=[lambda i: ONES[i] * math.nan]), ValueError, r"bounds\[0\]\(i\) has 3 NaN"),
        (lambda: nearest(lambda i: ONES[:2], 3), ValueError, r"distance\(i\): expected shape \(b=1\), got \(2,\)"),
        (lambda: nearest(lambda i: 1.0, 3), TypeError, r"distance\(i\) should be a torch tensor"),
        (lambda: nearest(lambda i: i, 3), TypeError, r"distance\(i\) should have a floating dtype"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
