"""Events in time: gaps and their dispersion, renewal and thinning, breaks of a rate, forecasts, and counting what is not seen.

Times are real numbers in one unit (days), sorted; the unit of every answer follows from theirs. An event process is
*renewal* if its gaps are independent and alike, with mean $\\mu$, standard deviation $s$ and $c=s/\\mu$; the Poisson
process has $c=1$, a metronome $c=0$. Everything is computed in float64.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import gammaln
from torch import Tensor

from kexue import _validate


class Dispersion(NamedTuple):
    """Mean of the gaps, their coefficient of variation and its standard error, each of shape (...)."""

    mean: Tensor
    cv: Tensor
    se: Tensor


class Estimate(NamedTuple):
    """An estimate and its standard deviation, in the unit of what is estimated."""

    value: float
    sd: float


class ChangePoint(NamedTuple):
    """The likeliest single change of a rate: when, the likelihood ratio, its p-value, events per unit before and after."""

    time: float
    statistic: float
    p: float
    before: float
    after: float


# ------------------------------------------------------------------------------------------------ gaps


def gaps(times: Tensor, *, ties: bool = False) -> Tensor:
    """The times between neighbouring events, $x_i=t_{i+1}-t_i$.

    Args:
        times: (..., n) sorted, n >= 2, integer or floating.
        ties: allow events at one time, as in a record of whole days; a simple point process has none.

    Returns:
        (..., n - 1) in float64.

    Raises:
        TypeError, ValueError: not such a tensor, non-finite, not sorted, or equal times without `ties`.

    Example:
        >>> gaps(torch.tensor([0, 7, 13, 20]))
        tensor([7., 6., 7.], dtype=torch.float64)
    """
    return _sorted("times", times, ties=ties, least=2).diff(dim=-1)


def dispersion(gaps: Tensor) -> Dispersion:
    """Mean and coefficient of variation $c$ of gaps, with the standard error of $c$ for independent gaps.

    $$\\operatorname{Var}\\hat c\\approx\\frac{c^2}{n}\\Bigl(\\frac{\\kappa-1}4-\\gamma c+c^2\\Bigr)$$

    with the skewness $\\gamma$ and the kurtosis $\\kappa$ of the gaps (2 and 9 for exponential ones, where it is $1/n$).

    Source: the delta method for a ratio of moments (Cramér, Mathematical Methods of Statistics, 27.7).

    Args:
        gaps: (..., n) not negative, n >= 3, not all zero.

    Raises:
        TypeError, ValueError: not such a tensor, non-finite or negative entries, n < 3, a mean of zero.
    """
    x = _reals("gaps", gaps, least=3)
    if bool((x < 0).any()):
        raise ValueError(f"gaps should be >= 0, got a smallest one of {float(x.min()):g}: are the times sorted?")
    n, mean = x.shape[-1], x.mean(-1)
    if bool((mean == 0).any()):
        raise ValueError("gaps are all 0; expected a positive mean")
    sd = x.std(-1)
    cv = sd / mean
    deviation = (x - mean[..., None]) / sd.clamp_min(torch.finfo(x.dtype).tiny)[..., None]
    third, fourth = (deviation**3).mean(-1), (deviation**4).mean(-1)
    return Dispersion(mean, cv, (cv**2 / n * ((fourth - 1) / 4 - third * cv + cv**2)).clamp_min(0).sqrt())


def fano(times: Tensor, window: float, *, start: float, end: float) -> Tensor:
    """Variance over mean of the counts in successive windows `[start + j window, start + (j + 1) window)`.

    It is 1 for a Poisson process and tends to $c^2$ for a renewal process in long windows; a drift of the rate adds to it.
    A last window that is not full is left out.

    Args:
        times: (..., n) sorted; equal times are allowed.
        window: > 0. start, end: the time that was watched; it should hold two windows at least. Events outside are not counted.

    Returns:
        (...) in float64.

    Raises:
        TypeError, ValueError: times not sorted, a bad window, or no event in it.
    """
    t = _sorted("times", times, ties=True, least=1)
    _validate.number("window", window, low=0.0, open_low=True, high=math.inf, open_high=True)
    _validate.number("end", end, low=start, open_low=True, high=math.inf, open_high=True)
    windows = int((end - start) / window + 1e-9)
    if windows < 2:
        raise ValueError(f"window should fit twice at least between start and end, got {window} in [{start}, {end}]")
    edges = (start + window * torch.arange(windows + 1, dtype=torch.float64)).expand(*t.shape[:-1], -1).contiguous()
    counts = torch.searchsorted(t.contiguous(), edges).double().diff(dim=-1)
    if bool((counts.sum(-1) == 0).any()):
        raise ValueError(f"times has no event in [{start}, {end})")
    return counts.var(-1) / counts.mean(-1)


# --------------------------------------------------------------------------------- thinning and renewal


def thin_cv(cv: float, p: float) -> float:
    """Coefficient of variation of the gaps when each event is kept independently with probability p.

    $$c_p^2=p\\,c^2+1-p$$

    Args:
        cv: of the whole renewal process, >= 0. p: in (0, 1].

    Raises:
        ValueError: out of range.
    """
    _validate.number("cv", cv, low=0.0, high=math.inf, open_high=True)
    _validate.number("p", p, low=0.0, high=1.0, open_low=True)
    return math.sqrt(p * cv**2 + 1 - p)


def unthin_cv(cv: float, p: float) -> float:
    """The inverse of `thin_cv`: the whole process' cv from that of a part, *if* events were lost independently.

    Args:
        cv: of the gaps between the events kept. p: share that was kept, in (0, 1].

    Raises:
        ValueError: out of range, or a cv below $\\sqrt{1-p}$, which no independent thinning leaves.
    """
    _validate.number("cv", cv, low=0.0, high=math.inf, open_high=True)
    _validate.number("p", p, low=0.0, high=1.0, open_low=True)
    square = cv**2 - 1 + p
    if square < -1e-12:
        least = math.sqrt(1 - p)
        raise ValueError(f"cv should be at least sqrt(1 - p) = {least:.4g} if events were lost independently, got {cv}")
    return math.sqrt(max(square, 0.0) / p)


def renewal_counts(t: float, mean: float, cv: float, *, skewness: float | None = None) -> tuple[float, float]:
    """Mean and variance of the number of events in (0, t], the first gap beginning at 0.

    $$\\mathbb EN=\\frac t\\mu+\\frac{c^2-1}2,\\qquad
      \\operatorname{Var}N=\\frac{c^2t}\\mu+\\frac1{12}+\\frac{5c^4}4-\\frac{2\\gamma c^3}3,$$

    up to terms that vanish as $t\\to\\infty$. For gamma gaps, whose skewness is $2c$, the constant is $(1-c^4)/12$.

    Source: Cox, Renewal Theory (1962), sections 4.2 and 4.5.

    Args:
        t, mean: > 0. cv: >= 0. skewness: of the gaps; default 2 cv.

    Raises:
        ValueError: out of range.
    """
    _validate.number("t", t, low=0.0, open_low=True, high=math.inf, open_high=True)
    _validate.number("mean", mean, low=0.0, open_low=True, high=math.inf, open_high=True)
    _validate.number("cv", cv, low=0.0, high=math.inf, open_high=True)
    third = (2 * cv if skewness is None else skewness) * cv**3
    return t / mean + (cv**2 - 1) / 2, cv**2 * t / mean + 1 / 12 + 5 * cv**4 / 4 - 2 * third / 3


def arrival(k: int, n: int, end: float, *, cv: float = 1.0) -> Estimate:
    """When event k came, if event n came at `end` and nothing else is known: the bridge of a renewal process.

    $$\\mathbb E[T_k\\mid T_n=T]=\\frac knT,\\qquad \\operatorname{sd}\\approx cT\\sqrt{\\frac{k(n-k)}{n^2(n+1)}},$$

    exact for a Poisson process (c = 1), where the n - 1 earlier events are uniform; for other gaps the mean is exact and the
    spread asymptotic.

    Args:
        k: 1 to n. end: > 0. cv: >= 0.

    Raises:
        ValueError: out of range.
    """
    _validate.integer("n", n, low=1)
    _validate.integer("k", k, low=1, high=n)
    _validate.number("end", end, low=0.0, open_low=True, high=math.inf, open_high=True)
    _validate.number("cv", cv, low=0.0, high=math.inf, open_high=True)
    return Estimate(end * k / n, cv * end * math.sqrt(k * (n - k) / (n**2 * (n + 1))))


def forecast(gaps: Tensor, n: int) -> Estimate:
    """The time that the next n events will take, from the gaps of the past.

    $$n\\hat\\mu\\pm\\hat c\\hat\\mu\\sqrt{n(1+n/k)}$$

    after k gaps: the first term under the root is the luck of the future, the second that of the past, in $\\hat\\mu$.

    Args:
        gaps: (k,) not negative, k >= 3. n: >= 1.

    Raises:
        TypeError, ValueError: see `dispersion`; n out of range.

    Example:
        >>> value, sd = forecast(torch.tensor([6.0, 7.0, 8.0, 7.0]), 52)
        >>> f"{value:.0f} ± {sd:.1f} days"
        '364 ± 22.0 days'
    """
    _validate.shape("gaps", gaps, "k")
    _validate.integer("n", n, low=1)
    mean, cv, _ = dispersion(gaps)
    return Estimate(n * float(mean), float(cv * mean) * math.sqrt(n * (1 + n / len(gaps))))


def gamma_poisson(n: int, exposure: float, horizon: float) -> tuple[float, float]:
    """Mean and variance of the next count of a Poisson process after n events in `exposure`.

    With the prior $d\\lambda/\\lambda$ the rate is Gamma(n, exposure), and the count in `horizon` negative binomial:
    $$\\mathbb EN=\\frac{nh}T,\\qquad\\operatorname{Var}N=\\frac{nh}T\\Bigl(1+\\frac hT\\Bigr).$$

    Args:
        n: >= 1. exposure, horizon: > 0, in one unit.

    Raises:
        ValueError: out of range.
    """
    _validate.integer("n", n, low=1)
    _validate.number("exposure", exposure, low=0.0, open_low=True, high=math.inf, open_high=True)
    _validate.number("horizon", horizon, low=0.0, open_low=True, high=math.inf, open_high=True)
    mean = n * horizon / exposure
    return mean, mean * (1 + horizon / exposure)


# ------------------------------------------------------------------------------------- rates that change


def power_law(times: Tensor, end: float | None = None) -> Estimate:
    """The exponent of a rate $\\lambda(t)=\\frac\\beta\\theta(t/\\theta)^{\\beta-1}$, without bias.

    $$\\hat\\beta=\\frac{n-1}{\\sum_i\\log(T/t_i)},\\qquad \\operatorname{sd}=\\frac\\beta{\\sqrt{n-2}},$$

    where T was fixed beforehand. If watching stopped *at* the last event (`end=None`), T is that event, and n is one less. The
    answer depends on where the clock was started: zero is a parameter too.

    Source: Crow, SIAM 1974 (the AMSAA model); the sum is Gamma(n, 1/β) given n.

    Args:
        times: (n,) sorted, > 0, n >= 4; equal times are allowed. end: at least the last time.

    Raises:
        TypeError, ValueError: times not sorted or not positive, too few, an end before the last.
    """
    _validate.shape("times", times, "n")
    t = _sorted("times", times, ties=True, least=4)
    if float(t[0]) <= 0:
        raise ValueError(f"times should be > 0, the start of the clock, got {float(t[0]):g}")
    if end is None:
        t, end = t[:-1], float(t[-1])
    _validate.number("end", end, low=float(t[-1]), high=math.inf, open_high=True)
    total = float((end / t).log().sum())
    if total == 0:
        raise ValueError(f"times are all {end:g}: a power law needs events before the end")
    beta = (len(t) - 1) / total
    return Estimate(beta, beta / math.sqrt(len(t) - 2))


def change_point(times: Tensor, *, start: float, end: float, cv: float = 1.0) -> ChangePoint:
    """The split of [start, end] into two constant rates that raises the likelihood most, and how surprising it is.

    $$L=\\max_u\\,2n\\,\\mathrm{KL}\\bigl(\\tfrac{N(u)}n\\,\\big\\|\\,u\\bigr),\\qquad
      u=\\frac{t-\\mathrm{start}}{\\mathrm{end}-\\mathrm{start}},$$

    with the divergence of two coins. Under one rate the dates are uniform, and L is the statistic of Berk and Jones, not
    $\\chi^2_1$; see `change_point_p`. O(n) for the statistic.

    Args:
        times: (n,) sorted, inside [start, end], n >= 10; equal times are allowed.
        cv: of the gaps; L is divided by its square before the p-value, which is exact for cv = 1 and asymptotic else.

    Raises:
        TypeError, ValueError: times not sorted, outside, or fewer than 10; a bad cv.
    """
    _validate.shape("times", times, "n")
    t = _sorted("times", times, ties=True, least=10)
    _validate.number("start", start, high=float(t[0]))
    _validate.number("end", end, low=float(t[-1]), high=math.inf, open_high=True)
    _validate.number("cv", cv, low=0.0, open_low=True, high=math.inf, open_high=True)
    if end <= start:
        raise ValueError(f"end should be after start, got [{start}, {end}]")
    n = len(t)
    u = (t.numpy() - start) / (end - start)
    counts = np.concatenate([np.arange(n), np.arange(1, n + 1)])  # just before an event, just after it
    places = np.concatenate([u, u])
    inside = (places > 0) & (places < 1)
    if not inside.any():
        raise ValueError("times lie at start and end alone; expected events between them")
    counts, places = counts[inside], places[inside]
    ratio = 2 * n * _coins(counts / n, places)
    best = int(ratio.argmax())
    time, before = start + float(places[best]) * (end - start), float(counts[best])
    return ChangePoint(
        time, float(ratio[best]), change_point_p(float(ratio[best]) / cv**2, n),
        before / (time - start), (n - before) / (end - time),
    )


def change_point_p(statistic: float, n: int) -> float:
    """Probability that n uniform dates give a likelihood ratio of `change_point` above `statistic`.

    Exact up to an absolute 1e-10: what is below that is returned as 0. The counts are propagated as a Poisson process
    between the times where a path would leave the band (Moscovich and Nadler 2017). O(n) steps of the band's width,
    some 0.2 s for n = 1000.

    Args:
        statistic: >= 0. n: >= 1.

    Raises:
        ValueError: out of range.

    Example:
        >>> round(change_point_p(3.841, 1000), 2)      # 0.05 if the split had been fixed beforehand
        0.88
    """
    _validate.number("statistic", statistic, low=0.0)
    _validate.integer("n", n, low=1)
    share = np.arange(n + 1) / n
    outer = (np.zeros(n + 1), np.ones(n + 1))
    limits = []
    for edge in outer:  # bisection between i/n and either end of [0, 1]
        near, far = share.copy(), edge.copy()
        for _ in range(60):
            middle = (near + far) / 2
            with np.errstate(divide="ignore", invalid="ignore"):
                inside = 2 * n * _coins(share, middle) <= statistic
            near, far = np.where(inside, middle, near), np.where(inside, far, middle)
        limits.append(near)
    lower, upper = limits  # i events are allowed from lower[i] to upper[i]
    moments = np.concatenate([lower[1:], upper[:-1]])
    kinds = np.concatenate([np.zeros(n, int), np.ones(n, int)])
    index = np.concatenate([np.arange(1, n + 1), np.arange(n)])
    alive, first, now = np.ones(1), 0, 0.0  # probabilities of first, first + 1, ... events
    highest = -1
    for j in np.lexsort((kinds, moments)):
        if kinds[j] == 0:
            highest = index[j] - 1  # at most this many before lower[index]
            alive = _propagate(alive, n * (moments[j] - now), highest - first + 1)
        else:
            alive = _propagate(alive, n * (moments[j] - now), highest + 1 - first + 1)
            drop = index[j] + 1 - first  # more than index[j] by now
            if drop > 0:
                alive, first = alive[drop:], index[j] + 1
        now = max(now, float(moments[j]))
        if alive.size == 0:
            return 1.0
    alive = _propagate(alive, n * (1 - now), n - first + 1)
    survive = alive[-1] / math.exp(n * math.log(n) - n - gammaln(n + 1)) if alive.size == n - first + 1 else 0.0
    p = 1 - float(survive)
    return 0.0 if p < 1e-10 else min(p, 1.0)


def _propagate(alive: np.ndarray, rate: float, size: int) -> np.ndarray:
    """Distribution of the count after a Poisson number of further events, cut to `size` states."""
    size = max(size, 0)
    if rate <= 0 or size == 0:
        return np.concatenate([alive, np.zeros(max(size - len(alive), 0))])[:size]
    k = np.arange(size)
    return np.convolve(alive, np.exp(k * math.log(rate) - rate - gammaln(k + 1)))[:size]


def _coins(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Kullback–Leibler divergence of two coins, in nats, elementwise; 0 log 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        one = np.where(p > 0, p * np.log(p / q), 0.0)
        two = np.where(p < 1, (1 - p) * np.log((1 - p) / (1 - q)), 0.0)
    return one + two


# -------------------------------------------------------------------------------- counting what is not seen


def chapman(first: int, second: int, both: int) -> Estimate:
    """Size of a population from two lists drawn independently of each other, and how many are on both.

    $$\\hat N=\\frac{(a+1)(b+1)}{m+1}-1,\\qquad
      \\widehat{\\operatorname{Var}}=\\frac{(a+1)(b+1)(a-m)(b-m)}{(m+1)^2(m+2)},$$

    both unbiased if $a+b\\ge N$. Lists that prefer the same members make it too small, and its sd does not show it.

    Source: Chapman, Univ. California Publ. Statist. 1 (1951); Seber, Biometrika 57 (1970) for the variance.

    Args:
        first, second: sizes of the lists, >= 1. both: members on both, 0 to the shorter one's size.

    Raises:
        ValueError: out of range.

    Example:
        >>> round(chapman(40, 60, 8).value, 1)
        276.9
    """
    _validate.integer("first", first, low=1)
    _validate.integer("second", second, low=1)
    _validate.integer("both", both, low=0, high=min(first, second))
    product = (first + 1) * (second + 1)
    variance = product * (first - both) * (second - both) / ((both + 1) ** 2 * (both + 2))
    return Estimate(product / (both + 1) - 1, math.sqrt(variance))


def german_tank(numbers: Tensor) -> Estimate:
    """The last serial number M from k different ones drawn at random from 1 to M.

    $$\\hat M=m\\Bigl(1+\\frac1k\\Bigr)-1,\\qquad \\operatorname{Var}\\hat M=\\frac{(M-k)(M+1)}{k(k+2)},$$

    with the largest number seen m: unbiased, and of least variance among the unbiased. It estimates the last *number*;
    how many things carry one is another question. The sd is that at $M=\\hat M$.

    Source: Goodman, JASA 47 (1952); Ruggles and Brodie, JASA 42 (1947).

    Args:
        numbers: (k,) integers >= 1, all different.

    Raises:
        TypeError, ValueError: not an integer tensor, a number below 1, or one that comes twice (drawn with replacement).

    Example:
        >>> german_tank(torch.tensor([3, 10])).value
        14.0
    """
    _validate.shape("numbers", numbers, "k")
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise TypeError(f"numbers should have an integer dtype, got {numbers.dtype}")
    k = len(numbers)
    if k == 0:
        raise ValueError("numbers is empty; expected at least one")
    if int(numbers.min()) < 1:
        raise ValueError(f"numbers should be >= 1, got {int(numbers.min())}")
    values, times = numbers.unique(return_counts=True)
    if len(values) < k:
        raise ValueError(f"numbers has {int(values[times.argmax()])} more than once: expected draws without replacement")
    largest = int(numbers.max()) * (1 + 1 / k) - 1
    return Estimate(largest, math.sqrt(max(largest - k, 0.0) * (largest + 1) / (k * (k + 2))))


# ------------------------------------------------------------------------------------------------ input


def _reals(name: str, values: Any, *, least: int) -> Tensor:
    """A real tensor (..., n) with n >= least and finite entries, in float64."""
    _validate.shape(name, values, "...", "n")
    if values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} should hold real numbers, got {values.dtype}")
    if values.shape[-1] < least:
        raise ValueError(f"{name} has {values.shape[-1]} entries; expected at least {least}")
    values = values.double()
    _validate.finite(**{name: values})
    return values


def _sorted(name: str, times: Any, *, ties: bool, least: int) -> Tensor:
    """`_reals` that do not decrease, or, without `ties`, increase."""
    values = _reals(name, times, least=least)
    steps = values.diff(dim=-1).reshape(-1, max(values.shape[-1] - 1, 0))
    for wrong, what in ((steps < 0, "be sorted"), (steps == 0, "differ (ties=True allows equal ones)")):
        if bool(wrong.any()) and not (ties and "differ" in what):
            row, at = (int(i) for i in wrong.nonzero()[0])
            pair = values.reshape(-1, values.shape[-1])[row, at : at + 2].tolist()
            raise ValueError(f"{name} should {what}, got {pair[0]:g} then {pair[1]:g} at places {at} and {at + 1}")
    return values
