"""Point processes against scipy, statsmodels, brute force and simulation; the calendar of the blog."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kexue import pointprocess as pp
from kexue.datasets import blog_calendar

F64 = torch.float64


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


# ------------------------------------------------------------------------------------------------ gaps


@given(st.lists(st.integers(1, 1000), min_size=3, max_size=40))
def test_gaps_undo_the_sum_and_dispersion_is_scipys(steps):
    times = torch.tensor(steps).cumsum(0)
    x = pp.gaps(torch.cat([torch.zeros(1, dtype=torch.int64), times]))
    assert x.dtype == F64 and x.tolist() == [float(step) for step in steps]
    found = pp.dispersion(x)
    assert float(found.mean) == pytest.approx(np.mean(steps))
    assert float(found.cv) == pytest.approx(stats.variation(steps, ddof=1), abs=1e-12)


def test_dispersion_of_a_batch_is_that_of_each_row_and_scale_free():
    x = torch.rand(3, 4, 50, dtype=F64, generator=torch.Generator().manual_seed(0))
    found, scaled = pp.dispersion(x), pp.dispersion(1e9 * x)
    one = pp.dispersion(x[1, 2])
    assert found.cv.shape == (3, 4)
    assert (float(found.cv[1, 2]), float(found.se[1, 2])) == pytest.approx((float(one.cv), float(one.se)))
    torch.testing.assert_close(scaled.cv, found.cv)
    torch.testing.assert_close(scaled.se, found.se)
    still = pp.dispersion(torch.full((5,), 7.0))
    assert (float(still.mean), float(still.cv), float(still.se)) == (7.0, 0.0, 0.0)


@pytest.mark.parametrize("shape", [1.0, 4.76])
def test_the_standard_error_of_the_cv_is_its_spread(shape):
    x = torch.tensor(np.random.default_rng(0).gamma(shape, size=(4000, 400)))
    found = pp.dispersion(x)
    assert float(found.cv.mean()) == pytest.approx(shape**-0.5, rel=0.01)
    assert float(found.se.mean()) == pytest.approx(float(found.cv.std()), rel=0.06)  # the spread itself to 1.1 %


def test_fano_counts_by_hand_and_ignores_what_lies_outside():
    times = tensor(-3, 0, 0, 1, 2, 5, 6, 9.5, 11, 50)  # windows [0,4) [4,8) [8,12): 4, 2, 2
    assert float(pp.fano(times, 4, start=0, end=13)) == pytest.approx(np.var([4, 2, 2], ddof=1) / np.mean([4, 2, 2]))
    pairs = torch.stack([times, times + 1])
    both = pp.fano(pairs, 4, start=0, end=12)
    assert both.shape == (2,) and float(both[1]) == pytest.approx(float(pp.fano(pairs[1], 4, start=0, end=12)))


def test_fano_of_poisson_is_one_and_of_a_renewal_process_near_its_cv_squared():
    rng = np.random.default_rng(1)
    for shape, expected in ((1.0, 1.0), (4.0, 0.25)):
        times = torch.tensor(rng.gamma(shape, 1 / shape, size=(400, 2300)).cumsum(1))
        found = pp.fano(times, 40.0, start=100.0, end=2100.0)
        assert abs(float(found.mean()) - expected) < 6 * float(found.std()) / 20 + (0.02 if shape > 1 else 0)


# ----------------------------------------------------------------------------------- thinning, renewal


@given(st.floats(0, 3), st.floats(0.01, 1))
def test_thinning_and_its_inverse(cv, p):
    thinned = pp.thin_cv(cv, p)
    assert pp.unthin_cv(thinned, p) == pytest.approx(cv, abs=1e-5)
    assert min(cv, 1.0) - 1e-12 <= thinned <= max(cv, 1.0) + 1e-12
    assert pp.thin_cv(pp.thin_cv(cv, p), p) == pytest.approx(pp.thin_cv(cv, p * p), abs=1e-9)


def test_thinning_by_simulation():
    rng = np.random.default_rng(2)
    times = rng.gamma(4.0, size=400_000).cumsum()
    kept = torch.tensor(times[rng.random(400_000) < 0.3])
    found = pp.dispersion(pp.gaps(kept))
    assert abs(float(found.cv) - pp.thin_cv(0.5, 0.3)) < 6 * float(found.se)


@pytest.mark.parametrize(("draw", "cv", "skewness"), [
    (lambda rng, size: rng.gamma(4.0, 0.25, size), 0.5, None),
    (lambda rng, size: 2 * rng.random(size), 3**-0.5, 0.0),
])
def test_renewal_counts_by_simulation(draw, cv, skewness):
    rng = np.random.default_rng(3)
    mean, variance = pp.renewal_counts(8.0, 1.0, cv, skewness=skewness)
    count = (draw(rng, (400_000, 28)).cumsum(1) <= 8).sum(1)
    assert abs(count.mean() - mean) < 6 * math.sqrt(variance / 400_000)
    assert abs(count.var() - variance) < 6 * variance * math.sqrt(2 / 400_000) < 0.05
    assert pp.renewal_counts(5.0, 2.0, 1.0) == pytest.approx((2.5, 2.5))  # Poisson, exactly


def test_arrival_is_the_beta_law_of_order_statistics_for_poisson():
    for k, n in ((1, 2), (3, 10), (500, 1000)):
        law = stats.beta(k, n - k)  # k-th of n - 1 uniform dates
        assert pp.arrival(k, n, 7.0) == pytest.approx((7 * law.mean(), 7 * law.std()))
    assert pp.arrival(10, 10, 7.0) == (7.0, 0.0)
    rng = np.random.default_rng(4)
    path = rng.gamma(4.0, size=(20_000, 100)).cumsum(1)
    share = path[:, 49] / path[:, -1]
    value, sd = pp.arrival(50, 100, 1.0, cv=0.5)
    assert abs(share.mean() - value) < 6 * sd / 20_000**0.5
    assert share.std() == pytest.approx(sd, rel=0.03)


def test_forecast_covers_the_future_as_often_as_it_says():
    rng = np.random.default_rng(5)
    paths = torch.tensor(rng.gamma(4.0, 2.0, size=(3000, 150)))
    z = np.array([(float(row[100:].sum()) - value) / sd for row in paths for value, sd in [pp.forecast(row[:100], 50)]])
    assert abs(z.mean()) < 6 / 3000**0.5
    assert z.std() == pytest.approx(1.0, rel=0.06)


def test_gamma_poisson_is_scipys_negative_binomial():
    for n, exposure, horizon in ((157, 2.746, 1.0), (1, 3.0, 10.0)):
        law = stats.nbinom(n, exposure / (exposure + horizon))
        assert pp.gamma_poisson(n, exposure, horizon) == pytest.approx((law.mean(), law.var()))


# ------------------------------------------------------------------------------------- rates that change


@pytest.mark.parametrize("stopped_at_event", [False, True])
def test_power_law_is_unbiased_under_either_stopping_rule(stopped_at_event):
    rng = np.random.default_rng(6)
    t = np.sort(rng.random((20_000, 12)) ** (1 / 0.7), axis=1)
    if stopped_at_event:
        t = np.concatenate([t, np.ones((20_000, 1))], 1)
    found = [pp.power_law(torch.tensor(row), None if stopped_at_event else 1.0) for row in t]
    values = np.array([estimate.value for estimate in found])
    assert abs(values.mean() - 0.7) < 6 * values.std() / 20_000**0.5
    assert values.std() == pytest.approx(0.7 / math.sqrt(10), rel=0.08)


def test_the_change_point_is_the_best_of_all_poisson_regressions():
    rng = np.random.default_rng(7)
    times = np.sort(np.concatenate([rng.uniform(0, 4, 40), rng.uniform(4, 10, 20)]))
    found = pp.change_point(torch.tensor(times), start=0.0, end=10.0)
    best = max((_ratio(at, count), float(at)) for i, at in enumerate(times) for count in (i, i + 1))
    assert found.statistic == pytest.approx(best[0], rel=1e-9) and found.time == pytest.approx(best[1])
    cells = np.array([found.time / 2, found.time / 2, (10 - found.time) / 2, (10 - found.time) / 2])
    counts = np.array([20, found.before * found.time - 20, 8, 52 - found.before * found.time])  # any split within a side
    second = np.array([0.0, 0, 1, 1])
    one, two = (
        sm.GLM(counts, design, family=sm.families.Poisson(), offset=np.log(cells)).fit().llf
        for design in (np.ones((4, 1)), np.stack([1 - second, second], 1))
    )
    assert found.statistic == pytest.approx(2 * (two - one), rel=1e-7)
    assert found.before * found.time + found.after * (10 - found.time) == pytest.approx(60)
    assert found.before > found.after and found.p < 0.01


def _ratio(at: float, before: int) -> float:
    """Likelihood ratio of two rates to one: `before` of 60 events up to `at`, the others up to 10."""
    parts = ((before, at), (60 - before, 10 - at))
    return 2 * (sum(n * math.log(n / length) for n, length in parts if n) - 60 * math.log(6))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 99), min_size=10, max_size=30).map(sorted), st.sampled_from([0.5, 1.0, 2.0]))
def test_the_change_point_does_not_depend_on_unit_origin_or_direction(days, cv):
    found = pp.change_point(torch.tensor(days), start=0, end=100, cv=cv)
    moved = pp.change_point(torch.tensor(days) / 4.0 + 3, start=3.0, end=28.0, cv=cv)
    mirror = pp.change_point(100 - torch.tensor(days).flip(0), start=0, end=100, cv=cv)
    assert moved.statistic == pytest.approx(found.statistic) and moved.p == pytest.approx(found.p, abs=1e-9)
    assert mirror.statistic == pytest.approx(found.statistic) and mirror.p == pytest.approx(found.p, abs=1e-9)
    assert found.p == pytest.approx(pp.change_point_p(found.statistic / cv**2, len(days)), abs=1e-12)


@given(st.floats(1.5, 20))
def test_p_of_one_and_two_dates_in_closed_form(statistic):
    a = math.exp(-statistic / 2)  # one date: both coins at least a
    assert pp.change_point_p(statistic, 1) == pytest.approx(min(1.0, 2 * a), abs=1e-9)
    b = math.sqrt(a)  # two: first <= 1 - b, second >= b, and a middle from low to high with u (1 - u) >= a / 4
    root = math.sqrt(1 - a)
    low, high = (1 - root) / 2, (1 + root) / 2  # one event so far is allowed from low to high
    # the first between low and 1 - b, the second between max(first, b) and high
    first = np.linspace(low, max(min(1 - b, high), low), 20_001)
    room = np.clip(high - np.maximum(first, b), 0, None)
    assert pp.change_point_p(statistic, 2) == pytest.approx(1 - 2 * float(np.trapezoid(room, first)), abs=2e-6)


def test_p_by_simulation():
    rng = np.random.default_rng(8)
    for n in (10, 200):
        drawn = np.sort(rng.random((4000, n)), axis=1)
        paths = torch.tensor(drawn[: 300 if n == 200 else 600])
        top = np.array([pp.change_point(row, start=0.0, end=1.0).statistic for row in paths])
        for quantile in (0.3, 0.7, 0.95):
            at = float(np.quantile(top, quantile))
            assert abs(pp.change_point_p(at, n) - (1 - quantile)) < 6 * math.sqrt(quantile * (1 - quantile) / len(top))


def test_p_falls_and_stays_a_probability():
    for n in (1, 7, 300):
        values = [pp.change_point_p(x, n) for x in (0.0, 0.01, 0.5, 2.0, 6.0, 15.0, 40.0, 300.0)]
        assert values == sorted(values, reverse=True) and values[0] == 1.0 and values[-1] == 0.0


# -------------------------------------------------------------------------------- counting what is not seen


def test_chapman_is_unbiased_over_the_whole_hypergeometric_law():
    law = stats.hypergeom(90, 50, 45)
    found = [(pp.chapman(50, 45, m), law.pmf(m)) for m in range(law.support()[0], law.support()[1] + 1)]
    mean = sum(p * estimate.value for estimate, p in found)
    assert mean == pytest.approx(90, abs=1e-9)
    spread = sum(p * (estimate.value - 90) ** 2 for estimate, p in found)
    assert sum(p * estimate.sd**2 for estimate, p in found) == pytest.approx(spread, rel=1e-9)


@pytest.mark.parametrize(("last", "k"), [(9, 1), (9, 2), (12, 4), (7, 7)])
def test_german_tank_is_unbiased_over_all_samples(last, k):
    found = [pp.german_tank(torch.tensor(numbers)) for numbers in itertools.combinations(range(1, last + 1), k)]
    values = np.array([estimate.value for estimate in found])
    assert values.mean() == pytest.approx(last)
    assert values.var() == pytest.approx((last - k) * (last + 1) / (k * (k + 2)))
    estimate = pp.german_tank(torch.arange(1, last + 1).flip(0))
    assert estimate == pytest.approx((last, 0.0))


# ----------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("call", "error", "match"), [
    (lambda: pp.gaps([1, 2]), TypeError, "times"),
    (lambda: pp.gaps(torch.tensor([1, 5, 3])), ValueError, "times should be sorted, got 5 then 3 at places 1 and 2"),
    (lambda: pp.gaps(torch.tensor([1, 5, 5])), ValueError, "times should differ .* got 5 then 5 at places 1 and 2"),
    (lambda: pp.gaps(torch.tensor([1, 5, 3]), ties=True), ValueError, "sorted"),
    (lambda: pp.gaps(torch.tensor([[1, 2], [4, 3]])), ValueError, "got 4 then 3"),
    (lambda: pp.gaps(torch.tensor([1])), ValueError, "times has 1 entries"),
    (lambda: pp.gaps(tensor(1, math.nan)), ValueError, "times has 1 non-finite"),
    (lambda: pp.gaps(torch.tensor([True, False])), TypeError, "times"),
    (lambda: pp.dispersion(tensor(1, 2)), ValueError, "gaps has 2 entries; expected at least 3"),
    (lambda: pp.dispersion(tensor(1, 2, -1)), ValueError, "gaps should be >= 0"),
    (lambda: pp.dispersion(tensor(0, 0, 0)), ValueError, "all 0"),
    (lambda: pp.dispersion(tensor(1, 2, math.inf)), ValueError, "non-finite"),
    (lambda: pp.fano(tensor(2, 1), 1, start=0, end=9), ValueError, "sorted"),
    (lambda: pp.fano(tensor(1, 2), 0, start=0, end=9), ValueError, "window"),
    (lambda: pp.fano(tensor(1, 2), 6, start=0, end=9), ValueError, "fit twice"),
    (lambda: pp.fano(tensor(1, 2), 1, start=9, end=0), ValueError, "end"),
    (lambda: pp.fano(tensor(1, 2), 1, start=5, end=9), ValueError, "no event"),
    (lambda: pp.thin_cv(-0.1, 0.5), ValueError, "cv"),
    (lambda: pp.thin_cv(1.0, 0.0), ValueError, "p should"),
    (lambda: pp.thin_cv(1.0, 1.1), ValueError, "p should"),
    (lambda: pp.unthin_cv(0.5, 0.0), ValueError, "p should"),
    (lambda: pp.unthin_cv(0.5, 0.7), ValueError, r"cv should be at least sqrt\(1 - p\) = 0.5477"),
    (lambda: pp.renewal_counts(0.0, 1.0, 1.0), ValueError, "t should"),
    (lambda: pp.renewal_counts(1.0, 0.0, 1.0), ValueError, "mean"),
    (lambda: pp.renewal_counts(1.0, 1.0, -1.0), ValueError, "cv"),
    (lambda: pp.arrival(0, 5, 1.0), ValueError, "k should"),
    (lambda: pp.arrival(6, 5, 1.0), ValueError, "k should"),
    (lambda: pp.arrival(1, 5, 0.0), ValueError, "end"),
    (lambda: pp.arrival(1, 5, 1.0, cv=-1.0), ValueError, "cv"),
    (lambda: pp.forecast(tensor(1, 2, 3), 0), ValueError, "n should"),
    (lambda: pp.forecast(torch.ones(2, 3), 1), ValueError, "gaps"),
    (lambda: pp.gamma_poisson(0, 1.0, 1.0), ValueError, "n should"),
    (lambda: pp.gamma_poisson(1, 0.0, 1.0), ValueError, "exposure"),
    (lambda: pp.gamma_poisson(1, 1.0, 0.0), ValueError, "horizon"),
    (lambda: pp.power_law(tensor(0, 1, 2, 3), 4.0), ValueError, "times should be > 0"),
    (lambda: pp.power_law(tensor(1, 2, 3, 4), 3.5), ValueError, "end"),
    (lambda: pp.power_law(tensor(1, 2, 3)), ValueError, "at least 4"),
    (lambda: pp.power_law(tensor(2, 2, 2, 2)), ValueError, "all 2"),
    (lambda: pp.power_law(tensor(1, 3, 2, 4)), ValueError, "sorted"),
    (lambda: pp.change_point(torch.arange(9), start=0, end=9), ValueError, "at least 10"),
    (lambda: pp.change_point(torch.arange(12), start=1, end=12), ValueError, "start"),
    (lambda: pp.change_point(torch.arange(12), start=0, end=10), ValueError, "end"),
    (lambda: pp.change_point(torch.arange(12).flip(0), start=0, end=12), ValueError, "sorted"),
    (lambda: pp.change_point(torch.arange(12), start=0, end=12, cv=0.0), ValueError, "cv"),
    (lambda: pp.change_point(torch.full((12,), 3), start=3, end=3), ValueError, "end should be after start"),
    (lambda: pp.change_point(torch.full((12,), 3), start=3, end=4), ValueError, "between"),
    (lambda: pp.change_point_p(-1.0, 5), ValueError, "statistic"),
    (lambda: pp.change_point_p(math.nan, 5), ValueError, "statistic"),
    (lambda: pp.change_point_p(1.0, 0), ValueError, "n should"),
    (lambda: pp.chapman(0, 5, 0), ValueError, "first"),
    (lambda: pp.chapman(5, 0, 0), ValueError, "second"),
    (lambda: pp.chapman(5, 4, 5), ValueError, "both"),
    (lambda: pp.german_tank(torch.tensor([3, 7, 3])), ValueError, "numbers has 3 more than once"),
    (lambda: pp.german_tank(torch.tensor([0, 7])), ValueError, "numbers should be >= 1, got 0"),
    (lambda: pp.german_tank(tensor(1, 2)), TypeError, "integer"),
    (lambda: pp.german_tank(torch.tensor([], dtype=torch.int64)), ValueError, "empty"),
])
def test_bad_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


# --------------------------------------------------------------------------------------------- the calendar


def test_the_calendar_is_whole():
    days, ids, indexed = blog_calendar()
    assert days.dtype == ids.dtype == torch.int64 and days.shape == ids.shape == indexed.shape == (1295,)
    assert bool((days.diff() >= 0).all()) and len(ids.unique()) == 1295
    dates = days.numpy().astype("datetime64[D]")
    assert (str(dates[0]), str(dates[-1])) == ("2009-03-01", "2025-12-16")
    counts = np.bincount(dates.astype("datetime64[Y]").astype(int) + 1970)[2009:]
    assert counts.tolist() == [197, 157, 83, 75, 81, 83, 45, 69, 53, 53, 58, 63, 60, 54, 52, 52, 60]
    years = dates.astype("datetime64[Y]").astype(int) + 1970
    assert int(indexed.sum()) == 335 and set(years[indexed.numpy()]) == set(range(2018, 2025))
    for place, number, when in ((100, 103, "2009-08-27"), (1000, 7782, "2020-09-29")):
        assert int(ids[place - 1]) == number and str(dates[place - 1]) == when


def test_another_blog_is_read_and_its_bad_records_are_named(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("date,id,indexed\n1969-12-31,3,1\n1970-01-02,1,\n1970-01-02,2,0\n")
    found = blog_calendar(file)
    assert (found.days.tolist(), found.ids.tolist(), found.indexed.tolist()) == ([-1, 1, 1], [3, 1, 2], [True, False, False])
    for text, match in (
        ("", "mine.csv:1: expected the heading"), ("date,id\n", "mine.csv:1"), ("date,id,indexed\n", "no records"),
        ("date,id,indexed\n2020-01-01,1,\n2020-1-2,2,\n", "mine.csv:3: expected date,id,indexed"),
        ("date,id,indexed\n2020-02-30,1,\n", "mine.csv:2: 2020-02-30 is no date"),
        ("date,id,indexed\n2020-01-02,1,\n2020-01-01,2,\n", "mine.csv:3: 2020-01-01 comes before"),
        ("date,id,indexed\n2020-01-01,1,\n2020-01-01,2,\n2020-01-03,1,\n", "mine.csv:4: id 1 was in line 2"),
        ("date,id,indexed\n2020-01-01,0,\n", "mine.csv:2"), ("date,id,indexed\n2020-01-01,1,2\n", "mine.csv:2"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=match):
            blog_calendar(file)
