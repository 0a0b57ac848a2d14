"""Checks: pure functions from numbers to a frozen record.

Each function takes what was measured, what was predicted, and *rivals*: plausible wrong predictions
that the very same test has to reject. Nothing here raises because a claim is false; `Ledger` does.
Input that cannot be judged (NaN, infinity, empty, mismatched shape or dtype, complex) raises at once.

Arrays may be torch tensors, numpy arrays or numbers. A bare Python number takes the dtype and shape
of its counterpart; anything else has to match exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import sympy
import torch
from scipy import stats

Array = Any
Z = 6.0
"""Half-width of a stochastic band in standard errors: a false alarm in 5e8 checks."""


@dataclass(frozen=True)
class Rival:
    """A wrong prediction put to the same test: `rejected` says whether the test saw the difference."""

    name: str
    rejected: bool
    error: float
    tolerance: float
    reason: str = ""

    def __post_init__(self) -> None:
        _plain(self)


@dataclass(frozen=True)
class Check:
    """The outcome of one test: `held` iff `error <= tolerance`; numbers are those of the worst component."""

    kind: str
    held: bool
    predicted: float | str
    measured: float | str
    error: float
    tolerance: float
    n: int
    rivals: tuple[Rival, ...]
    unit: str = ""

    def __post_init__(self) -> None:
        _plain(self)

    def record(self) -> dict[str, Any]:
        """The check as plain JSON data."""
        return asdict(self)

    def _ipython_display_(self) -> None:
        """Nothing: in a cell that ends with a check, the ledger has shown it, in text that is the same everywhere."""


def _plain(record: Rival | Check) -> None:
    """Numpy scalars (a tolerance may come as one) become Python's, which JSON knows."""
    for name, value in vars(record).items():
        if isinstance(value, np.generic):
            object.__setattr__(record, name, value.item())


# ---------------------------------------------------------------------------------------------- input


@dataclass(frozen=True)
class _Values:
    data: np.ndarray
    dtype: str
    eps: float
    weak: bool


def _values(name: str, value: Array) -> _Values:
    weak = isinstance(value, (bool, int, float, complex, sympy.Number)) and not isinstance(value, np.generic)
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        eps = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
        tensor = value.detach().cpu()
        data = (tensor.double() if value.is_floating_point() else tensor).numpy()
    else:
        data = np.asarray(float(value) if isinstance(value, sympy.Number) else value)
        dtype = str(data.dtype)
        eps = float(np.finfo(data.dtype).eps) if data.dtype.kind == "f" else 0.0
    if data.dtype.kind == "c":
        raise TypeError(f"{name} is complex ({dtype}); expected real numbers: check the real and imaginary parts")
    if data.dtype.kind not in "biuf":
        raise TypeError(f"{name} has dtype {dtype}; expected real numbers")
    if data.size == 0:
        raise ValueError(f"{name} is empty (shape {data.shape}); there is nothing to check")
    bad = int((~np.isfinite(data)).sum())
    if bad:
        raise ValueError(f"{name} has {bad} non-finite entries (NaN or infinity) of {data.size}")
    return _Values(data.astype(np.float64) if data.dtype.kind == "f" else data, dtype, eps, weak)


def _match(name: str, value: _Values, other_name: str, other: _Values) -> _Values:
    """`value` brought to the dtype and shape of `other`, if it is a bare number; else proof that it has them."""
    if value.weak:
        kind = np.float64 if value.data.dtype.kind == "f" or other.data.dtype.kind == "f" else other.data.dtype
        data = np.broadcast_to(value.data.astype(kind), other.data.shape)
        return _Values(data, other.dtype, other.eps, True)
    if not other.weak:
        if value.dtype != other.dtype:
            raise TypeError(f"{name} has dtype {value.dtype}, {other_name} has {other.dtype}; expected the same")
        if value.data.shape != other.data.shape:
            raise ValueError(f"{name} has shape {value.data.shape}, {other_name} has {other.data.shape}; expected the same")
    return value


def _nonnegative(**numbers: float) -> None:
    for name, number in numbers.items():
        if not (isinstance(number, (int, float)) and math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} should be a finite number >= 0, got {number!r}")


def _named(rivals: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(rivals, Mapping) or not rivals:
        raise ValueError("rivals should be a non-empty dict {name: wrong version}: a check that could not fail is no check")
    for name in rivals:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"each rival needs a name that says what is wrong with it, got {name!r}")
    return rivals


def rounding(ops: int = 4096, dtype: torch.dtype = torch.float64) -> float:
    """Relative rounding error to allow for, `8 eps sqrt(ops)`, after `ops` accumulated operations."""
    if ops < 1:
        raise ValueError(f"ops should be at least 1, got {ops}")
    return 8 * torch.finfo(dtype).eps * math.sqrt(ops)


# ---------------------------------------------------------------------------------------------- equal


def equal(
    measured: Array,
    predicted: Array,
    *,
    rivals: Mapping[str, Array],
    rtol: float | None = None,
    atol: float = 0.0,
    ops: int = 4096,
) -> Check:
    """Arrays agree in the max norm: `max|measured - predicted| <= atol + rtol max|predicted|`.

    Without `rtol` the tolerance is rounding alone, `8 eps sqrt(ops)` of the measured dtype (zero for
    integers and booleans). A rival is an array in the place of `predicted`; it is rejected when it does
    not agree with `measured` under the same rule *and* differs from `predicted` by at least both
    tolerances together, so that no measurement could agree with both.

    Args:
        measured: real array of any shape.
        predicted: array of the same shape and dtype, or a number.
        rivals: wrong versions of `predicted`, by name.
        rtol, atol: relative (to the largest predicted magnitude) and absolute tolerance, >= 0.
        ops: accumulated operations behind each entry, for the default `rtol`.

    Raises:
        TypeError, ValueError: non-finite or empty input, mismatch of shape or dtype, complex numbers,
            negative tolerance, no rivals.
    """
    got = _values("measured", measured)
    want = _match("predicted", _values("predicted", predicted), "measured", got)
    got = _match("measured", got, "predicted", want)
    eps = max(got.eps, want.eps) or (np.finfo(np.float64).eps if "f" in got.data.dtype.kind + want.data.dtype.kind else 0.0)
    if rtol is None:
        _nonnegative(ops=ops)
        rtol = 8 * eps * math.sqrt(ops)
    _nonnegative(rtol=rtol, atol=atol)

    def compare(reference: np.ndarray) -> tuple[float, float, int]:
        difference = np.abs(got.data.astype(np.float64) - reference.astype(np.float64))
        return float(difference.max()), atol + rtol * float(np.abs(reference).max()), int(difference.argmax())

    error, tolerance, worst = compare(want.data)
    outcomes = []
    for name, value in _named(rivals).items():
        rival = _match(f"rival {name!r}", _values(f"rival {name!r}", value), "measured", got)
        rival_error, rival_tolerance, _ = compare(rival.data)
        apart = float(np.abs(rival.data.astype(np.float64) - want.data.astype(np.float64)).max()) >= tolerance + rival_tolerance
        agrees = rival_error <= rival_tolerance
        reason = "it agrees with the measurement" if agrees else "it is too close to the prediction for this tolerance"
        outcomes.append(Rival(name, apart and not agrees, rival_error, rival_tolerance, reason))
    return Check(
        "equal", error <= tolerance, float(np.broadcast_to(want.data, got.data.shape).flat[worst]), float(got.data.flat[worst]),
        error, tolerance, got.data.size, tuple(outcomes),
    )


# ------------------------------------------------------------------------------------------- identity


def identity(
    left: sympy.Expr,
    right: sympy.Expr,
    *,
    rivals: Mapping[str, sympy.Expr],
    domain: Mapping[sympy.Symbol, tuple[float, float]] | None = None,
    trials: int = 24,
    seed: int = 0,
) -> Check:
    """Two SymPy expressions are identically equal on a domain.

    Both sides are evaluated to 60 digits at `trials` random rational points; they have to agree to 40.
    A rival is an expression in the place of `right`; one point of difference rejects it.

    Args:
        left, right: expressions; integer symbols are drawn as integers.
        domain: bounds `(low, high)` of each free symbol, drawn uniformly; default (1/8, 8).
        trials: number of points, >= 1.

    Raises:
        TypeError: not SymPy expressions.
        ValueError: an empty domain, a value that is not a real number, no rivals.
    """
    domain = dict(domain or {})
    if trials < 1:
        raise ValueError(f"trials should be at least 1, got {trials}")
    wrong = {f"rival {name!r}": value for name, value in _named(rivals).items()}
    for name, value in {"left": left, "right": right, **wrong}.items():
        if not isinstance(value, sympy.Expr):
            raise TypeError(f"{name} should be a SymPy expression, got {type(value).__name__}")
    symbols = sorted(left.free_symbols | right.free_symbols | {s for r in rivals.values() for s in r.free_symbols}, key=str)
    rng = np.random.default_rng(seed)

    def draw(symbol: sympy.Symbol) -> sympy.Rational:
        low, high = domain.get(symbol, (sympy.Rational(1, 8), 8))
        if not low < high:
            raise ValueError(f"domain of {symbol} should be (low, high) with low < high, got ({low}, {high})")
        if symbol.is_integer:
            return sympy.Integer(int(rng.integers(int(low), int(high) + 1)))
        low, high = sympy.nsimplify(low), sympy.nsimplify(high)
        return low + (high - low) * sympy.Rational(int(rng.integers(1, 2**31)), 2**31)

    points = [{symbol: draw(symbol) for symbol in symbols} for _ in range(trials)]

    def at(name: str, expression: sympy.Expr, point: dict) -> sympy.Float:
        number = expression.subs(point).doit().evalf(60)
        if not (number.is_Float or number.is_Rational) or not number.is_finite:
            raise ValueError(f"{name} is not a real number at {point}: {number}")
        return number

    def distance(name: str, expression: sympy.Expr) -> float:
        worst = 0.0
        for point in points:
            a, b = at("left", left, point), at(name, expression, point)
            worst = max(worst, float(abs(a - b) / max(abs(a), abs(b), sympy.Float("1e-30"))))
        return worst

    tolerance = 1e-40
    error = distance("right", right)
    outcomes = []
    for name, expression in rivals.items():
        gap = distance(f"rival {name!r}", expression)
        outcomes.append(Rival(name, gap > tolerance, gap, tolerance, "it is identically equal too"))
    return Check("identity", error <= tolerance, str(right), str(left), error, tolerance, trials, tuple(outcomes))


# ----------------------------------------------------------------------------------------------- mean


def _half_width(samples: np.ndarray, z: float, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean over axis 0 and the half-width of its band.

    `z` names the false-alarm rate of the whole check, 2 Phi(-z), shared among the components. Student's
    quantile replaces the normal one, and the first Edgeworth term of the Studentised mean,
    `|skewness| (2 z^2 + 1) / (6 sqrt n)` (Hall 1992), widens it for skewed samples.
    """
    n = samples.shape[0]
    mean = samples.mean(0)
    centred = samples - mean
    scale = np.abs(samples).max(0)
    spread = centred.std(0, ddof=1)
    flat = int((spread <= 4 * eps * scale).sum())
    if flat:
        raise ValueError(f"samples have no spread in {flat} of {mean.size} components; use equal")
    skewness = np.abs(((centred / spread) ** 3).mean(0))
    tail = stats.norm.sf(z) / mean.size
    z_each = stats.norm.isf(tail)
    student = stats.t.isf(tail, n - 1)
    edgeworth = skewness * (2 * z_each**2 + 1) / (6 * math.sqrt(n))
    if (edgeworth > student).any():
        need = math.ceil(float((skewness.max() * (2 * z_each**2 + 1) / (6 * student)) ** 2))
        raise ValueError(
            f"samples are too skewed for n = {n} (sample skewness {skewness.max():.3g}): a normal band "
            f"would need n >= {need}; draw more, or average in batches of lighter tails"
        )
    return mean, (student + edgeworth) * spread / math.sqrt(n) + 8 * eps * scale


def mean(
    samples: Array,
    predicted: Array,
    *,
    rivals: Mapping[str, Array],
    bias: float = 0.0,
    z: float = Z,
) -> Check:
    """The mean of `samples` over axis 0 lies within `z` standard errors (+ `bias`) of the prediction.

    `z` fixes the false-alarm rate of the check as a whole, `2 Phi(-z)`: the band uses Student's quantile
    for small n, a skewness term, and Bonferroni's share for each component of a batch. A rival is
    rejected when it lies outside the same band *and* at least two half-widths from the prediction, so
    that it would be rejected at any other seed as well.

    By simulation (tests/test_verify_statistics.py) the rate is at most nominal for symmetric samples of
    any size and any tail, and for skewed ones from n of some hundreds; below that it can be ten times
    nominal, since a small sample does not show its own skewness.

    Args:
        samples: (n, ...) independent draws, n >= 2.
        predicted: (...), or a number for all components.
        rivals: wrong predictions, by name; one component outside rejects a rival.
        bias: stated systematic error of the estimator, >= 0, in the unit of the samples.

    Raises:
        TypeError, ValueError: see `equal`; also when the samples have no spread or are too skewed for their number.
    """
    draws = _values("samples", samples)
    if draws.data.ndim == 0 or draws.data.shape[0] < 2:
        raise ValueError(f"samples should have shape (n, ...) with n >= 2, got {draws.data.shape}")
    _nonnegative(bias=bias)
    if not z > 0:
        raise ValueError(f"z should be positive, got {z}")
    eps = draws.eps or float(np.finfo(np.float64).eps)
    shaped = _Values(draws.data[0].astype(np.float64), draws.dtype if draws.eps else "float64", eps, False)
    want = _match("predicted", _values("predicted", predicted), "the mean of samples", shaped)
    centre, half = _half_width(draws.data.astype(np.float64), z, eps)
    half = half + bias
    ratio = np.abs(centre - want.data) / np.maximum(half, np.finfo(np.float64).tiny)
    worst = int(ratio.argmax())
    outcomes = []
    for name, value in _named(rivals).items():
        rival = _match(f"rival {name!r}", _values(f"rival {name!r}", value), "the mean of samples", shaped)
        outside = np.abs(centre - rival.data) > half
        apart = np.abs(rival.data - want.data) >= 2 * half
        where = int((np.abs(rival.data - want.data) / np.maximum(half, np.finfo(np.float64).tiny)).argmax())
        reason = (
            "it lies inside the band" if not outside.any()
            else f"it lies within 2z standard errors of the prediction ({np.abs(rival.data - want.data).flat[where]:.3g} < "
            f"{2 * half.flat[where]:.3g}): another seed might accept it; draw more samples"
        )
        outcomes.append(Rival(
            name, bool((outside & apart).any()), float(np.abs(centre - rival.data).flat[where]), float(half.flat[where]), reason,
        ))
    return Check(
        "mean", bool(ratio.flat[worst] <= 1), float(want.data.flat[worst]), float(centre.flat[worst]),
        float(np.abs(centre - want.data).flat[worst]), float(half.flat[worst]), draws.data.shape[0], tuple(outcomes),
    )


# ---------------------------------------------------------------------------------------------- slope

_AXES = {"loglog": (True, True), "semilogx": (True, False), "semilogy": (False, True), "linear": (False, False)}


def slope(
    x: Array,
    y: Array,
    predicted: float,
    *,
    tol: float,
    rivals: Mapping[str, float],
    axes: str = "loglog",
    z: float = Z,
) -> Check:
    """The least-squares slope of y against x, by default the exponent of a power law, is within `tol`.

    With `y` of shape (trials, n) each trial is fitted, and the mean slope has to lie within `z` standard
    errors plus `tol`, which is then the stated bias (a finite range, a next-order term). A rival slope is
    rejected when it lies outside the same band and at least two half-widths from the prediction.

    Args:
        x: (n,), at least 3 distinct values; y: (n,) or (trials, n).
        axes: "loglog", "semilogx" (y against log x), "semilogy" or "linear".
        tol: >= 0.

    Raises:
        TypeError, ValueError: see `equal`; also for values <= 0 on a logarithmic axis, or fewer than 3 points.
    """
    if axes not in _AXES:
        raise ValueError(f"axes should be one of {', '.join(_AXES)}, got {axes!r}")
    _nonnegative(tol=tol)
    xs, ys = _values("x", x), _values("y", y)
    if xs.data.ndim != 1 or ys.data.ndim not in (1, 2) or ys.data.shape[-1] != xs.data.shape[0]:
        raise ValueError(f"expected x (n,) and y (n,) or (trials, n), got {xs.data.shape} and {ys.data.shape}")
    if len(np.unique(xs.data)) < 3:
        raise ValueError(f"x has {len(np.unique(xs.data))} distinct values; a slope needs at least 3")
    sides = []
    for name, values, logarithmic in (("x", xs, _AXES[axes][0]), ("y", ys, _AXES[axes][1])):
        if logarithmic and (values.data <= 0).any():
            raise ValueError(f"{name} has values <= 0, which have no logarithm (axes={axes!r})")
        sides.append(np.log(values.data) if logarithmic else values.data.astype(np.float64))
    centred = sides[0] - sides[0].mean()
    fits = (np.atleast_2d(sides[1]) * centred).sum(1) / (centred**2).sum()
    centre, half = float(fits[0]), tol
    if len(fits) > 1:
        mean_slope, band = _half_width(fits, z, float(np.finfo(np.float64).eps))
        centre, half = float(mean_slope), float(band) + tol
    want = float(_values("predicted", predicted).data)
    outcomes = []
    for name, value in _named(rivals).items():
        rival = float(_values(f"rival {name!r}", value).data)
        distance = abs(centre - rival)
        reason = "the fitted slope allows it" if distance <= half else "it is within two tolerances of the prediction"
        outcomes.append(Rival(name, distance > half and abs(rival - want) >= 2 * half, distance, half, reason))
    error = abs(centre - want)
    return Check("slope", error <= half, want, centre, error, half, ys.data.size, tuple(outcomes), unit=axes)


# ---------------------------------------------------------------------------------------------- bound


def bound(
    lower: Array,
    upper: Array,
    *,
    rivals: Mapping[str, tuple[Array, Array]],
    rtol: float | None = None,
    atol: float = 0.0,
    fixed: bool = False,
    z: float = Z,
) -> Check:
    """`lower <= upper` for every trial, up to rounding.

    A rival is a sharper, false bound, given as a pair `(lower, upper)`. Trials are taken to be random
    draws: a rival then has to be violated so often that another seed would violate it too (at least
    `-log(2 Phi(-z))`, that is 21 trials for z = 6). With `fixed=True` the trials are chosen examples, and
    one violation is enough.

    Args:
        lower, upper: arrays of one shape (a number is compared with every trial).
        rtol: rounding allowed relative to the larger magnitude of each trial; default `64 eps`.
        atol: absolute allowance, >= 0.

    Raises:
        TypeError, ValueError: see `equal`; also when there are fewer random trials than a rejection needs.
    """
    need = 1 if fixed else math.ceil(-math.log(2 * stats.norm.sf(z)))

    def judge(name: str, low: Array, high: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        a, b = _values(f"lower{name}", low), _values(f"upper{name}", high)
        a = _match(f"lower{name}", a, f"upper{name}", b)
        b = _match(f"upper{name}", b, f"lower{name}", a)
        eps = max(a.eps, b.eps, float(np.finfo(np.float64).eps))
        x, y = a.data.astype(np.float64), b.data.astype(np.float64)
        slack = atol + (64 * eps if rtol is None else rtol) * np.maximum(np.abs(x), np.abs(y))
        return np.atleast_1d(x), np.atleast_1d(y), np.atleast_1d(x - y), np.atleast_1d(slack)

    _nonnegative(atol=atol, **({} if rtol is None else {"rtol": rtol}))
    x, y, excess, slack = judge("", lower, upper)
    if not fixed and excess.size < need:
        raise ValueError(
            f"{excess.size} random trials cannot show that a rival fails at any seed; give at least {need}, "
            "or fixed=True for chosen examples"
        )
    worst = int((excess - slack).argmax())
    outcomes = []
    for name, pair in _named(rivals).items():
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"rival {name!r} should be a pair (lower, upper), got {type(pair).__name__}")
        _, _, rival_excess, rival_slack = judge(f" of rival {name!r}", *pair)
        if not fixed and rival_excess.size < need:
            raise ValueError(f"rival {name!r} has {rival_excess.size} trials; expected at least {need}")
        violations = int((rival_excess > rival_slack).sum())
        at = int((rival_excess - rival_slack).argmax())
        outcomes.append(Rival(
            name, violations >= need, float(rival_excess.flat[at]), float(rival_slack.flat[at]),
            f"{violations} of {rival_excess.size} trials violate it; at least {need} are needed",
        ))
    return Check(
        "bound", bool((excess <= slack).all()), float(y.flat[worst]), float(x.flat[worst]),
        float(excess.flat[worst]), float(slack.flat[worst]), excess.size, tuple(outcomes),
    )


# ------------------------------------------------------------------------------------------- ordering


def ordering(
    greater: Array,
    less: Array,
    *,
    rivals: Mapping[str, tuple[Array, Array]],
    by: float = 0.0,
    confidence: float = 0.9999,
) -> Check:
    """`greater` exceeds `less` by more than `by` on average: a one-sided paired t test.

    A rival is a control pairing `(greater, less)` for which the same test must *not* find the order: two
    runs of the same method, the placebo, the shuffled input. The claim's own pair reversed is none: it is
    rejected wherever the claim holds. The error shown is the p-value, the tolerance `1 - confidence`: a
    control without any effect passes by luck at that rate.

    Args:
        greater, less: (n,) paired results (the same seed, the same test items), n >= 2.
        by: margin in the unit of the results, >= 0.
        confidence: in (1/2, 1).

    Raises:
        TypeError, ValueError: see `equal`; also for `confidence` out of range, n < 2, or a rival that is the claim reversed.
    """
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence should be in (1/2, 1), got {confidence}")
    _nonnegative(by=by)

    def judge(name: str, high: Array, low: Array) -> tuple[np.ndarray, float]:
        a, b = _values(f"greater{name}", high), _values(f"less{name}", low)
        b = _match(f"less{name}", b, f"greater{name}", a)
        a = _match(f"greater{name}", a, f"less{name}", b)
        if a.data.ndim != 1 or a.data.shape[0] < 2:
            raise ValueError(f"greater{name} should have shape (n,) with n >= 2, got {a.data.shape}")
        difference = a.data.astype(np.float64) - b.data.astype(np.float64)
        spread = float(difference.std(ddof=1))
        excess = float(difference.mean()) - by
        if spread <= 8 * np.finfo(np.float64).eps * np.abs(difference).max():
            return difference, 0.0 if excess > 0 else 1.0
        return difference, float(stats.t.sf(excess / (spread / math.sqrt(difference.size)), difference.size - 1))

    alpha = 1 - confidence
    difference, p = judge("", greater, less)
    outcomes = []
    for name, pair in _named(rivals).items():
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"rival {name!r} should be a pair (greater, less), got {type(pair).__name__}")
        rival_difference, rival_p = judge(f" of rival {name!r}", *pair)
        if np.array_equal(rival_difference, -difference):
            raise ValueError(f"rival {name!r} is the claim reversed, which fails wherever the claim holds; name a control")
        outcomes.append(Rival(name, rival_p > alpha, rival_p, alpha, "it shows the same order"))
    return Check("ordering", p <= alpha, by, float(difference.mean()), p, alpha, difference.size, tuple(outcomes), unit="p")


KINDS = (equal, identity, mean, slope, bound, ordering)
