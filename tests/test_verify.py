"""What a check accepts, what it rejects, and what it refuses to judge."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.verify import CheckFailed, Ledger, RivalSurvived, bound, equal, identity, mean, ordering, rounding, slope, table

x, y = sympy.symbols("x y", real=True)
DRAWS = np.random.default_rng(0).normal(1.0, 1.0, 4000)
PAIR = (DRAWS[:500] + 1.0, DRAWS[500:1000] - 1.0)
CONTROL = (DRAWS[:500], DRAWS[500:1000] + 0.2)

GOOD = {
    "equal": lambda ledger, **o: ledger.equal("eq-a", 3.0, 3.0, rivals=o.pop("rivals", {"four": 4.0}), **o),
    "identity": lambda ledger, **o: ledger.identity(
        "eq-a", sympy.sin(x) ** 2 + sympy.cos(x) ** 2, sympy.Integer(1), rivals=o.pop("rivals", {"minus": sympy.cos(2 * x)}), **o
    ),
    "mean": lambda ledger, **o: ledger.mean("eq-a", DRAWS, 1.0, rivals=o.pop("rivals", {"zero": 0.0}), **o),
    "slope": lambda ledger, **o: ledger.slope(
        "eq-a", [1.0, 2.0, 4.0], [1.0, 4.0, 16.0], 2.0, tol=0.01, rivals=o.pop("rivals", {"linear": 1.0}), **o
    ),
    "bound": lambda ledger, **o: ledger.bound(
        "eq-a", np.abs(DRAWS), 9.0, rivals=o.pop("rivals", {"one": (np.abs(DRAWS), 1.0)}), **o
    ),
    "ordering": lambda ledger, **o: ledger.ordering("eq-a", *PAIR, rivals=o.pop("rivals", {"reversed control": CONTROL}), **o),
}
FALSE = {
    "equal": lambda ledger: ledger.equal("eq-false", 3.0, 3.1, rivals={"four": 4.0}),
    "identity": lambda ledger: ledger.identity("eq-false", x + y, x - y, rivals={"product": x * y}),
    "mean": lambda ledger: ledger.mean("eq-false", DRAWS, 2.0, rivals={"zero": 0.0}),
    "slope": lambda ledger: ledger.slope("eq-false", [1.0, 2.0, 4.0], [1.0, 2.0, 4.0], 2.0, tol=0.01, rivals={"cubic": 3.0}),
    "bound": lambda ledger: ledger.bound("eq-false", DRAWS, 1.0, rivals={"zero": (DRAWS, 0.0)}),
    "ordering": lambda ledger: ledger.ordering("eq-false", *CONTROL, rivals={"itself": (CONTROL[1], CONTROL[0] + 1.0)}),
}
SURVIVING = {
    "equal": {"the same": 3.0 + 1e-14},
    "identity": {"the same": sympy.cos(x) ** 2 + 1 - sympy.cos(x) ** 2},
    "mean": {"close": 1.01},
    "slope": {"close": 2.005},
    "bound": {"true as well": (np.abs(DRAWS), 8.0)},
    "ordering": {"the effect itself": PAIR},
}


@pytest.fixture
def ledger() -> Ledger:
    return Ledger("a-chapter", seed=7)


@pytest.mark.parametrize("kind", GOOD)
def test_true_claim_holds_and_is_recorded(ledger, kind, capsys):
    check = GOOD[kind](ledger)
    assert check.held and check.kind == kind and check.error <= check.tolerance
    assert all(rival.rejected for rival in check.rivals)
    assert capsys.readouterr().out.startswith(f"✓ eq-a · {kind} · holds · rejects: ")
    record = json.loads(json.dumps(ledger.record(), allow_nan=False))
    assert record["ledger"] == "a-chapter" and record["seed"] == 7
    assert record["checks"][0]["label"] == "eq-a" and record["checks"][0]["rivals"][0]["rejected"] is True


@pytest.mark.parametrize("kind", FALSE)
def test_false_claim_raises_with_the_facts(ledger, kind):
    with pytest.raises(CheckFailed, match=r"eq-false.*predicted.*measured.*tolerance.*n = \d+, seed = 7") as caught:
        FALSE[kind](ledger)
    assert not isinstance(caught.value, RivalSurvived)
    assert ledger.entries == {}


@pytest.mark.parametrize("kind", SURVIVING)
def test_surviving_rival_raises_by_name(ledger, kind):
    name = next(iter(SURVIVING[kind]))
    with pytest.raises(RivalSurvived, match=f"rival '{name}' is not rejected"):
        GOOD[kind](ledger, rivals=SURVIVING[kind])
    assert ledger.entries == {}


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("rivals", [{}, {"": 1.0}, None, ["four"]])
def test_check_without_named_rival_raises(ledger, kind, rivals):
    with pytest.raises(ValueError, match="rival"):
        GOOD[kind](ledger, rivals=rivals)


def test_mean_rival_too_close_to_the_prediction_raises_even_outside_the_band():
    draws = np.concatenate([np.full(500, 0.9), np.full(500, 1.1)])  # mean 1, standard error .0032, band about .019
    check = mean(draws, 0.99, rivals={"near": 1.02})
    assert check.held and abs(1.0 - 1.02) > check.tolerance, "the rival lies outside the band of this sample"
    assert not check.rivals[0].rejected and "another seed might accept it" in check.rivals[0].reason


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["measured", "predicted", "rival"])
def test_non_finite_never_passes(bad, where):
    values = {"measured": np.ones(3), "predicted": np.ones(3), "rival": np.zeros(3)}
    values[where] = np.array([1.0, bad, 1.0])
    with pytest.raises(ValueError, match=f"{where}.* has 1 non-finite"):
        equal(values["measured"], values["predicted"], rivals={"r": values["rival"]})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: equal(np.ones(0), np.ones(0), rivals={"a": 1.0}), ValueError, "measured is empty"),
        (lambda: equal(np.ones(3), np.ones(4), rivals={"a": 1.0}), ValueError, r"shape \(4,\).*\(3,\)"),
        (lambda: equal(np.ones((3, 1)), np.ones(3), rivals={"a": 1.0}), ValueError, "shape"),
        (lambda: equal(np.ones(3), np.ones(3), rivals={"a": np.ones(4)}), ValueError, "rival 'a' has shape"),
        (lambda: equal(torch.ones(3), torch.ones(3).double(), rivals={"a": 1.0}), TypeError, "float64.*float32"),
        (lambda: equal(torch.ones(3), torch.ones(3, dtype=torch.int64), rivals={"a": 1.0}), TypeError, "dtype"),
        (lambda: equal(np.ones(3) * 1j, np.ones(3) * 1j, rivals={"a": 1.0}), TypeError, "complex"),
        (lambda: equal(1.0, 1j, rivals={"a": 2.0}), TypeError, "complex"),
        (lambda: equal("one", 1.0, rivals={"a": 2.0}), TypeError, "dtype"),
        (lambda: equal(1.0, 1.0, rivals={"a": 2.0}, rtol=-1e-9), ValueError, "rtol should be a finite number >= 0"),
        (lambda: equal(1.0, 1.0, rivals={"a": 2.0}, atol=float("nan")), ValueError, "atol"),
        (lambda: mean(np.ones(1), 1.0, rivals={"a": 2.0}), ValueError, "n >= 2"),
        (lambda: mean(DRAWS, 1.0, rivals={"a": 2.0}, bias=-1.0), ValueError, "bias"),
        (lambda: mean(DRAWS, 1.0, rivals={"a": 2.0}, z=0.0), ValueError, "z should be positive"),
        (lambda: mean(np.ones((5, 2)), np.ones(3), rivals={"a": 2.0}), ValueError, "shape"),
        (lambda: mean(np.zeros(50), 0.0, rivals={"a": 2.0}), ValueError, "no spread in 1 of 1 components; use equal"),
        (lambda: mean(np.r_[np.zeros(999), 1e6], 1e3, rivals={"a": 0.0}), ValueError, "too skewed.*n >="),
        (lambda: slope([1.0, 2.0], [1.0, 2.0], 1.0, tol=0.1, rivals={"a": 2.0}), ValueError, "at least 3"),
        (lambda: slope([1.0, 2.0, 0.0], [1.0, 2.0, 3.0], 1.0, tol=0.1, rivals={"a": 2.0}), ValueError, "no logarithm"),
        (lambda: slope([1.0, 2.0, 3.0], [1.0, 2.0], 1.0, tol=0.1, rivals={"a": 2.0}), ValueError, "expected x"),
        (lambda: slope([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 1.0, tol=-0.1, rivals={"a": 2.0}), ValueError, "tol"),
        (lambda: slope([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 1.0, tol=0.1, axes="log", rivals={"a": 2.0}), ValueError, "axes"),
        (lambda: bound(np.ones(20), 2.0, rivals={"a": (np.ones(20), 0.5)}), ValueError, "20 random trials"),
        (lambda: bound(DRAWS, 9.0, rivals={"a": 0.5}), TypeError, "pair"),
        (lambda: bound(DRAWS, 9.0, rivals={"a": (DRAWS, 0.0)}, rtol=-1.0), ValueError, "rtol"),
        (lambda: ordering([1.0], [0.0], rivals={"a": ([0.0], [1.0])}), ValueError, "n >= 2"),
        (lambda: ordering(*PAIR, rivals={"a": CONTROL}, confidence=1.0), ValueError, "confidence"),
        (lambda: ordering(*PAIR, rivals={"a": PAIR[0]}), TypeError, "pair"),
        (lambda: ordering(*PAIR, rivals={"a": CONTROL, "b": PAIR[::-1]}), ValueError, "'b' is the claim reversed"),
        (lambda: identity(x, 1.0, rivals={"a": y}), TypeError, "right should be a SymPy expression"),
        (lambda: identity(x, x, rivals={"a": sympy.log(-x)}), ValueError, "not a real number"),
        (lambda: identity(x, x, rivals={"a": y}, domain={x: (1, 1)}), ValueError, "low < high"),
        (lambda: identity(x, x, rivals={"a": y}, trials=0), ValueError, "trials"),
        (lambda: rounding(0), ValueError, "ops"),
        (lambda: Ledger("a", seed=-1), ValueError, "seed"),
        (lambda: Ledger("a", seed=True), ValueError, "seed"),
        (lambda: Ledger("A chapter", seed=0), ValueError, "slug"),
        (lambda: table({"a": [1.0]}, columns=["x", "y"]), ValueError, "row 'a' has 1 cells, expected 2"),
    ],
)
def test_input_that_cannot_be_judged_raises(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("label", ["associativity", "def-a", "fig-a", "eq-", "eq-A", "eq-a_b", "eq-a-", 3])
def test_unknown_label_raises(ledger, label):
    with pytest.raises(ValueError, match="label should look like 'eq-some-name'"):
        ledger.equal(label, 1.0, 1.0, rivals={"two": 2.0})


def test_duplicate_label_needs_another_name(ledger):
    ledger.equal("eq-a", 1.0, 1.0, rivals={"two": 2.0})
    with pytest.raises(ValueError, match="check of 'eq-a' without a name already"):
        ledger.equal("eq-a", 1.0, 1.0, rivals={"two": 2.0})
    ledger.equal("eq-a", 1.0, 1.0, rivals={"two": 2.0}, name="again")
    assert len(ledger.entries) == 2


def test_correction_needs_its_check(ledger):
    with pytest.raises(ValueError, match="was not entered"):
        ledger.correction(article="(1)", claims="one", finds="two", check="eq-a")
    ledger.equal("eq-a", 1.0, 1.0, rivals={"two": 2.0})
    with pytest.raises(ValueError, match="finds is empty"):
        ledger.correction(article="(1)", claims="one", finds=" ", check="eq-a")
    ledger.correction(article="(1)", claims="one", finds="two", check="eq-a")
    assert ledger.record()["corrections"] == [{"article": "(1)", "claims": "one", "finds": "two", "check": "eq-a"}]


def test_empty_ledger_is_not_shown(ledger):
    with pytest.raises(ValueError, match="no checks"):
        ledger._repr_mimebundle_()


def test_text_is_the_same_whatever_was_measured():
    shown = []
    for seed in (0, 1):
        draws = np.random.default_rng(seed).normal(1.0, 1.0, 1000 + seed)
        ledger = Ledger("a-chapter", seed=seed)
        ledger.mean("eq-a", draws, 1.0, rivals={"zero < one": 0.0}, name="first")
        data, metadata = ledger._repr_mimebundle_()
        hidden = re.sub(r'(?<=<span class="kexue-number">)[^<]*(?=</span>)', "", data["text/html"])
        shown.append((data["text/plain"], hidden, data["text/html"], metadata["kexue"]["checks"][0]["measured"]))
    assert shown[0][:2] == shown[1][:2]
    assert shown[0][2] != shown[1][2] and shown[0][3] != shown[1][3]
    assert "zero &lt; one" in shown[0][1]


def test_batches_are_checked_in_one_call():
    draws = torch.randn(4000, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centre = torch.arange(6, dtype=torch.float64).reshape(3, 2)
    assert mean(draws + centre, centre, rivals={"transposed grid": centre.flip(0)}).held
    shifted = centre.clone()
    shifted[2, 1] += 1.0
    wrong = mean(draws + centre, shifted, rivals={"flipped": centre.flip(0)})
    assert not wrong.held and wrong.predicted == 6.0


def test_integers_and_booleans_are_compared_exactly():
    assert equal(torch.tensor([1, 2]), torch.tensor([1, 2]), rivals={"off by one": torch.tensor([1, 3])}).tolerance == 0.0
    assert equal(16, 16, rivals={"seventeen": 17}).held
    assert not equal(np.array([True]), np.array([False]), rivals={"not": np.array([False])}).held


def test_tolerance_follows_the_dtype():
    for dtype in (torch.float32, torch.float64):
        assert equal(torch.ones(2, dtype=dtype), 1.0, rivals={"two": 2.0}).tolerance == pytest.approx(rounding(dtype=dtype))
    third = (torch.ones(1, dtype=torch.float32) / 3) * 3
    assert equal(third, 1.0, rivals={"two": 2.0}).held


def test_equal_rejects_a_rival_only_if_no_measurement_could_agree_with_both():
    assert equal(1.08, 1.0, rtol=0.1, rivals={"near": 0.95}).rivals[0].rejected is False
    assert equal(1.08, 1.0, rtol=0.1, rivals={"far": 0.8}).rivals[0].rejected


def test_identity_draws_integers_and_respects_the_domain():
    n = sympy.symbols("n", integer=True)
    k = sympy.symbols("k", integer=True)
    triangle = sympy.Sum(k, (k, 1, n))
    assert identity(triangle, n * (n + 1) / 2, rivals={"off by one": n * (n - 1) / 2}, domain={n: (1, 30)}).held
    assert identity(sympy.Abs(x), -x, rivals={"x": x}, domain={x: (-3, -1)}).held
    assert not identity(sympy.Abs(x), x, rivals={"twice": 2 * x}, domain={x: (-3, 3)}).held


def test_bound_with_random_trials_needs_a_rival_that_fails_at_any_seed():
    draws = np.linspace(0.0, 1.0, 1000)
    twenty = (draws, 1.0 - 19.5 / 999)
    assert not bound(draws, 1.0, rivals={"slightly sharper": twenty}).rivals[0].rejected
    assert bound(draws, 1.0, rivals={"slightly sharper": twenty}, fixed=True).rivals[0].rejected
    assert bound(draws, 1.0, rivals={"sharper": (draws, 1.0 - 25 / 999)}).rivals[0].rejected


def test_bound_allows_rounding_only():
    value = np.full(30, 0.1) * 3
    assert (value > 0.3).all() and bound(value, 0.3, rivals={"half": (value, 0.15)}).held
    assert not bound(value * (1 + 1e-12), 0.3, rivals={"half": (value, 0.15)}).held


ARRAYS = st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=1, max_size=8).map(np.array)


@given(ARRAYS, st.integers(-200, 200), st.integers(0, 2**16))
def test_true_identity_never_fails_under_rescaling(values, exponent, seed):
    scale = 2.0**exponent
    direction = np.random.default_rng(seed).normal(size=(values.size, 5))
    left, right = (values @ direction) * scale, np.einsum("i,ij->j", values * scale, direction)
    size = np.abs(values).sum() * np.abs(direction).max() * scale
    rivals = {"shifted": right + np.abs(right).max() + scale}
    assert equal(left, right, rivals=rivals, atol=rounding() * size).held


@given(ARRAYS, st.sampled_from([1e-9, 1e-3, 0.5]), st.integers(0, 7), st.sampled_from([-1.0, 1.0]))
def test_claim_shifted_by_more_than_the_band_always_fails(values, rtol, index, sign):
    claim = values.copy()
    band = 1e-12 + rtol * np.abs(values).max()
    claim[index % values.size] += sign * 2.5 * band / (1 - rtol)
    assert not equal(values, claim, rivals={"far": values + 1e6}, rtol=rtol, atol=1e-12).held


@settings(max_examples=60)
@given(st.floats(-3, 3), st.floats(-5, 5), st.floats(0.01, 1.0), st.sampled_from(["loglog", "semilogx", "semilogy", "linear"]))
def test_slope_recovers_what_was_planted(exponent, constant, offset, axes):
    grid = np.array([1.0, 2.0, 3.0, 5.0])
    on_x = np.log(grid) if axes in ("loglog", "semilogx") else grid
    line = constant + exponent * on_x
    values = np.exp(line) if axes in ("loglog", "semilogy") else line
    held = slope(grid, values, exponent, tol=1e-9, axes=axes, rivals={"off": exponent + offset})
    assert held.held and held.rivals[0].rejected
    assert not slope(grid, values, exponent + offset, tol=1e-9, axes=axes, rivals={"true": exponent}).held


@pytest.mark.parametrize("check", [
    lambda half: equal(1.0, 1.25, rtol=0.0, atol=half, rivals={"two": 2.5}),
    lambda half: slope([1.0, 2.0, 4.0], [1.0, 2.0, 4.0], 1.0, tol=half, rivals={"cubic": 3.0}),
    lambda half: mean(DRAWS, 1.0, bias=half, rivals={"three": 3.0}),
    lambda half: ordering(*PAIR, by=half, rivals={"control": CONTROL}),
])
def test_a_tolerance_may_be_a_numpy_number(check):
    assert json.loads(json.dumps(check(np.float64(0.5)).record()))["held"] is True
