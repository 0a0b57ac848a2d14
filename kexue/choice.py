r"""Discrete choice: the law of the argmax of scores plus independent noise, its samples, and its Fenchel-Young loss.

$p_i = P(\mu_i+s\varepsilon_i > \mu_j+s\varepsilon_j\ \forall j\ne i)$. Gumbel noise gives softmax, normal noise the
multinomial probit with independent errors, exponential noise the permute-and-flip mechanism.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from kexue import _validate

__all__ = [
    "EXPONENTIAL", "GUMBEL", "LAPLACE", "LOGISTIC", "NOISES", "NORMAL", "UNIFORM", "Noise", "expected_max", "fenchel_young_loss",
    "perturbed_log_prob", "sample_argmax",
]

_ENTRIES = 2**23  # of one (nodes, rows, classes) array; larger problems go row by row
_HALF_LOG_2PI = math.log(2 * math.pi) / 2


@dataclass(frozen=True)
class Noise:
    r"""A law of noise with a density, as `perturbed_log_prob` needs it. All functions are elementwise.

    Attributes:
        name: for tables and figures.
        log_cdf: $x\mapsto\log F(x)$, accurate in both tails.
        log_ratio: $x\mapsto\log f(x)-\log F(x)$, without subtracting one from the other.
        icdf: quantiles, $(0,1)\to\mathbb R$.
        draw: (size, options of `torch.empty`, generator) to independent draws.
        mean, variance: moments of the law.
        rule: "trapezoid" for a density that is analytic on the whole line, or the name of its exact rule.
        left, right: the noise lies between them but for a mass of about 1e-17; only for the trapezoid.
        step: number of classes to the spacing of the nodes that keeps log-probabilities to 1e-13; only for the trapezoid.
    """

    name: str
    log_cdf: Callable[[Tensor], Tensor]
    log_ratio: Callable[[Tensor], Tensor]
    icdf: Callable[[Tensor], Tensor]
    draw: Callable[[Sequence[int], dict[str, Any], torch.Generator | None], Tensor]
    mean: float
    variance: float
    rule: Literal["trapezoid", "laplace", "exponential", "uniform"] = "trapezoid"
    left: float = -math.inf
    right: float = math.inf
    step: Callable[[int], float] = lambda n: 0.0

    def log_pdf(self, x: Tensor) -> Tensor:
        r"""$\log f$ (...), -inf outside the support."""
        return self.log_ratio(x) + self.log_cdf(x)

    def __repr__(self) -> str:
        return f"Noise({self.name!r})"


def _exponentials(size: Sequence[int], options: dict[str, Any], generator: torch.Generator | None) -> Tensor:
    return torch.empty(tuple(size), **options).exponential_(generator=generator).clamp(min=torch.finfo(options["dtype"]).tiny)


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


GUMBEL = Noise(
    "Gumbel", lambda x: -torch.exp(-x.clamp(min=-80)), lambda x: -x, lambda t: -torch.log(-torch.log(t)),
    lambda *a: -_exponentials(*a).log(), float(np.euler_gamma), math.pi**2 / 6, left=-6, right=40, step=lambda n: 0.28,
)
NORMAL = Noise(
    "normal", torch.special.log_ndtr, lambda x: -x.square() / 2 - _HALF_LOG_2PI - torch.special.log_ndtr(x), torch.special.ndtri,
    lambda size, options, generator: torch.randn(tuple(size), generator=generator, **options), 0.0, 1.0, left=-9, right=9,
    step=lambda n: max(0.5 * (2 / max(n, 2)) ** 0.45, 0.28 / math.sqrt(2 * math.log(max(n, 2)))),  # the maximum narrows with n
)
LOGISTIC = Noise(
    "logistic", logsigmoid, lambda x: logsigmoid(-x), torch.logit,
    lambda *a: _exponentials(*a).log() - _exponentials(*a).log(), 0.0, math.pi**2 / 3, left=-40, right=40, step=lambda n: 0.28,
)
LAPLACE = Noise(
    "Laplace",
    lambda x: torch.where(x < 0, x - math.log(2), torch.log1p(-torch.exp(-x.clamp(min=0)) / 2)),
    lambda x: torch.where(x < 0, 0, -x.clamp(min=0) - math.log(2) - torch.log1p(-torch.exp(-x.clamp(min=0)) / 2)),
    lambda t: torch.where(t < 0.5, torch.log(2 * t), -torch.log(2 - 2 * t)),
    lambda *a: _exponentials(*a) - _exponentials(*a), 0.0, 2.0, rule="laplace",
)
EXPONENTIAL = Noise(
    "exponential",
    lambda x: torch.where(x > 0, torch.log(-torch.expm1(-x.clamp(min=_tiny(x)))), -math.inf),
    lambda x: torch.where(x > 0, -x - torch.log(-torch.expm1(-x.clamp(min=_tiny(x)))), 0),
    lambda t: -torch.log1p(-t), _exponentials, 1.0, 1.0, rule="exponential",
)
UNIFORM = Noise(
    "uniform",
    lambda x: torch.where(x > 0, torch.log(x.clamp(min=_tiny(x), max=1)), -math.inf),
    lambda x: torch.where((x > 0) & (x <= 1), -torch.log(x.clamp(min=_tiny(x), max=1)), torch.where(x > 1, -math.inf, 0)),
    lambda t: t, lambda size, options, generator: torch.rand(tuple(size), generator=generator, **options),
    0.5, 1 / 12, rule="uniform",
)
NOISES = (GUMBEL, NORMAL, LOGISTIC, LAPLACE, EXPONENTIAL, UNIFORM)
"""All noises of this module; the variances differ, see `Noise.variance`."""


def perturbed_log_prob(mu: Tensor, noise: Noise, *, scale: float = 1.0, step: float | None = None) -> Tensor:
    r"""Log-probabilities of the argmax of $\mu+s\varepsilon$, to 1e-13 in float64, tails included.

    $$ \log p_i = \log\int \frac fF(t-\mu_i)\prod_j F(t-\mu_j)\,dt \qquad (s = 1) $$

    Nothing is multiplied or subtracted outside the logarithm: the error is rounding, a few eps of $\log p_i$, however
    unlikely the class. The rule:

    * Gumbel, normal, logistic: the trapezoid rule, exponentially accurate for analytic integrands.
    * exponential: $\lceil n/2\rceil$ Gauss nodes in $u=e^{\max\mu-t}$, in which the integrand is a polynomial: exact.
    * uniform: the same in every piece between the kinks: exact; $\log p=-\infty$ where p is 0.
    * Laplace: Gauss nodes between the kinks, the two tails exact.

    From 64 classes on, the trapezoid rule works on Chebyshev interpolants of the two functions of $\mu$ that it needs,
    if they are short enough: O(1) work per class instead of a row of nodes for each, for an error up to 1e-11.

    Source: article 9085 of kexue.fm, (8), whose quantile rule (11) this replaces.

    Args:
        mu: (..., n) scores, finite.
        noise: `GUMBEL`, `NORMAL`, `LOGISTIC`, `LAPLACE`, `EXPONENTIAL`, `UNIFORM`, or one of your own.
        scale: s > 0, in the unit of mu; the same as dividing mu by it.
        step: spacing of the trapezoid's nodes in units of the noise; default `noise.step(n)`.

    Returns:
        (..., n), of the dtype of mu (half precision is computed in float32); differentiable.

    Raises:
        TypeError, ValueError: mu not floating, non-finite or without classes; scale or step not positive; a step for a
            noise whose rule has none.

    Complexity: O(K n) per row with K = (max mu - min mu + width of the noise) / step nodes, some 100 to 400; exponential
    O(n²); uniform O(n³); Laplace O(n² (max mu - min mu + 16)). Memory O(K n) per row, rows in chunks.

    Example:
        >>> perturbed_log_prob(torch.tensor([0.0, 1.0]), EXPONENTIAL).exp()  # 1 - e^{-1} / 2 for the larger
        tensor([0.1839, 0.8161])
    """
    flat, n = _scores(mu, noise, scale)
    if step is not None:
        if noise.rule != "trapezoid":
            raise ValueError(f"step should be None for {noise.name} noise, whose rule has no step, got {step!r}")
        _validate.number("step", step, low=0.0, high=math.inf, open_low=True, open_high=True)
    if not len(flat):
        return mu.clone()
    work = flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat
    h = step or noise.step(n)
    result = None
    if noise.rule == "trapezoid" and n >= 64:
        result = _interpolated(work, noise, h)
    if result is None:
        result = _by_rows(lambda rows: _log_prob(rows, noise, h), work, _count(work, noise, h))
    return result.to(mu.dtype).reshape(mu.shape)


def expected_max(mu: Tensor, noise: Noise, *, scale: float = 1.0) -> Tensor:
    r"""$S(\mu)=\mathbb E\max_i(\mu_i+s\varepsilon_i)$, the convex potential whose gradient is p.

    For Gumbel noise it is $s\,(\operatorname{logsumexp}(\mu/s)+\gamma)$. The gradient that autograd sees is
    `perturbed_log_prob(mu, noise).exp()`, exactly.

    Source: Williams-Daly-Zachary; Berthet et al., arXiv:2002.08676.

    Args:
        mu: (..., n). noise, scale: as in `perturbed_log_prob`.

    Returns:
        (...).

    Raises:
        TypeError, ValueError: as `perturbed_log_prob`.

    Example:
        >>> expected_max(torch.zeros(3), EXPONENTIAL)  # 1 + 1/2 + 1/3
        tensor(1.8333)
    """
    flat, _ = _scores(mu, noise, scale)
    if not len(flat):
        return mu.sum(-1)
    work = flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat
    potential: Tensor = _Potential.apply(work, noise)
    return (scale * potential).to(mu.dtype).reshape(mu.shape[:-1])


def fenchel_young_loss(
    mu: Tensor, target: Tensor, noise: Noise, *, scale: float = 1.0, reduction: Literal["mean", "sum", "none"] = "mean"
) -> Tensor:
    r"""$\ell(\mu,y)=S(\mu)-\mu_y-s\,\mathbb E\varepsilon$, convex, with the gradient $p-e_y$; no logarithm of p.

    For Gumbel noise it is cross-entropy; for noise of bounded support, where $-\log p_y$ may be infinite and its gradient
    dead, it still pulls. It is >= 0 and tends to 0 as $\mu_y$ grows.

    Source: Berthet et al., arXiv:2002.08676; Blondel et al., arXiv:1901.02324.

    Args:
        mu: (..., n). target: int64 (...), in [0, n). noise, scale: as in `perturbed_log_prob`.
        reduction: "mean" over the samples, "sum" or "none".

    Returns:
        (), or (...) with "none".

    Raises:
        TypeError, ValueError: as `perturbed_log_prob`; targets of wrong shape or dtype or out of range; no samples.

    Example:
        >>> fenchel_young_loss(torch.tensor([[0.0, 3.0]]), torch.tensor([0]), UNIFORM)  # p = (0, 1), S = 3.5
        tensor(3.)
    """
    _, n = _scores(mu, noise, scale)
    _validate.choice("reduction", reduction, ("mean", "sum", "none"))
    _validate.classes("target", target, mu.shape[:-1], n)
    true = mu.gather(-1, target[..., None])
    losses = expected_max(mu - true, noise, scale=scale) - scale * noise.mean
    return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses


def sample_argmax(
    mu: Tensor, noise: Noise, draws: int, *, scale: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    r"""Independent winners of $\mu+s\varepsilon$.

    Args:
        mu: (..., n). noise, scale: as in `perturbed_log_prob`.
        draws: number of draws, >= 1.
        generator: source of randomness on the device of mu; default torch's global one.

    Returns:
        int64 (draws, ...).

    Raises:
        TypeError, ValueError: as `perturbed_log_prob`; draws < 1.

    Example:
        >>> sample_argmax(torch.tensor([0.0, 9.0]), UNIFORM, 3)
        tensor([1, 1, 1])
    """
    _validate.integer("draws", draws, low=1)
    _scores(mu, noise, scale)
    dtype = mu.dtype if mu.dtype in (torch.float32, torch.float64) else torch.float32
    eps = noise.draw((draws, *mu.shape), {"dtype": dtype, "device": mu.device}, generator)
    return (mu.detach() + scale * eps).argmax(-1)


# ------------------------------------------------------------------------------------------------ rules


def _scores(mu: Tensor, noise: Noise, scale: float) -> tuple[Tensor, int]:
    """Validate; (rows, n) scores in units of the noise."""
    n = _validate.shape("mu", mu, "...", "n")["n"]
    _validate.floating(mu=mu)
    if not isinstance(noise, Noise):
        names = ", ".join(known.name.upper() for known in NOISES)
        raise TypeError(f"noise should be a Noise such as {names}, got {type(noise).__name__}")
    _validate.number("scale", scale, low=0.0, high=math.inf, open_low=True, open_high=True)
    if n < 1:
        raise ValueError(f"mu should have at least one class, got shape {tuple(mu.shape)}")
    _validate.finite(mu=mu)
    return mu.reshape(-1, n) / scale, n


@functools.lru_cache(maxsize=32)
def _gauss(m: int) -> tuple[Tensor, Tensor]:
    """Nodes and log-weights of Gauss and Legendre on (0, 1), exact for polynomials of degree 2m - 1."""
    x, w = np.polynomial.legendre.leggauss(m)
    return torch.from_numpy((1 + x) / 2), torch.from_numpy(np.log(w / 2))


def _count(mu: Tensor, noise: Noise, h: float) -> int:
    """Number of nodes of the rule for these rows."""
    n = mu.shape[1]
    spread = float((mu.detach().amax(1) - mu.detach().amin(1)).max())
    if noise.rule == "trapezoid":
        return math.ceil((spread + noise.right - noise.left) / h) + 1
    half = -(-n // 2)
    if noise.rule == "laplace":
        return 1 + half + 16 * (n + _grid(n, spread))
    return half if noise.rule == "exponential" else half * n


def _grid(n: int, spread: float) -> int:
    return math.ceil(spread * max(1.0, n / 16))


def _by_rows(rule: Callable[[Tensor], Tensor], mu: Tensor, nodes: int) -> Tensor:
    """Apply a rule to chunks of rows that fit in memory, recomputing in the backward pass if there are several."""
    size = max(1, _ENTRIES // (nodes * mu.shape[1]))
    if len(mu) <= size:
        return rule(mu)
    return torch.cat([checkpoint(rule, rows, use_reentrant=False) for rows in mu.split(size)])  # type: ignore[misc]


def _nodes(mu: Tensor, noise: Noise, h: float) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes t and log-weights, (K, rows), and an anchor (rows,): up to it nodes integrate prod F, beyond it 1 - prod F."""
    n = mu.shape[1]
    top, low = mu.amax(1), mu.amin(1)
    if noise.rule == "trapezoid":
        count = _count(mu, noise, h)
        t = low.detach() + noise.left + h * torch.arange(count, dtype=mu.dtype, device=mu.device)[:, None]
        log_w = torch.full_like(t, math.log(h))
        log_w[-1] = math.log(h / 2)
        return t, log_w, t[-1]
    u, log_g = (x.to(mu)[:, None] for x in _gauss(-(-n // 2)))
    if noise.rule == "exponential":
        return *_right_tail(top, u, log_g), top
    if noise.rule == "uniform":
        ends = torch.cat([top[:, None], torch.maximum(mu + 1, top[:, None]).sort(1).values], 1)
    else:
        spread = float((top - low).detach().max())
        grid = torch.linspace(0, 1, _grid(n, spread) + 1, dtype=mu.dtype, device=mu.device)[1:-1]
        ends = torch.cat([mu, (low + grid[:, None] * (top - low)).mT.detach()], 1).sort(1).values
        low, top = ends[:, 0], ends[:, -1]  # of equal scores the one whose panel ends there: gradients follow it
        tail = _right_tail(top, u, log_g)
        u, log_g = (x.to(mu)[:, None] for x in _gauss(16))
    width = ends.diff(dim=1)
    t = (ends[:, :-1].T[:, None] + u * width.T[:, None]).flatten(0, 1)
    log_w = (log_g + (width + _tiny(mu) ** 0.6).log().T[:, None]).flatten(0, 1)  # ties: the ends still move
    if noise.rule == "uniform":
        return t, log_w, top
    left = (low[None], torch.full_like(low, -math.log(n))[None])  # below all scores the integrand is exp(n (t - low))
    return torch.cat([left[0], t, tail[0]]), torch.cat([left[1], log_w, tail[1]]), top


def _right_tail(top: Tensor, u: Tensor, log_g: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes beyond the largest score, from nodes and log-weights in u = exp(top - t)."""
    return top - u.log(), log_g - u.log() + 0 * top


def _log_prob(mu: Tensor, noise: Noise, h: float) -> Tensor:
    t, log_w, _ = _nodes(mu, noise, h)
    x = t[..., None] - mu
    total = noise.log_cdf(x).sum(-1)
    terms = noise.log_ratio(x) + (total + log_w)[..., None]
    dead = (terms.detach() == -math.inf).all(0)  # p = 0: no gradient, and none of the NaN of logsumexp
    if bool(dead.any()):
        return terms.masked_fill(dead, 0).logsumexp(0).masked_fill(dead, -math.inf)
    return terms.logsumexp(0)


def _expected_max(mu: Tensor, noise: Noise) -> Tensor:
    h = noise.step(mu.shape[1])

    def rule(rows: Tensor) -> Tensor:
        t, log_w, anchor = _nodes(rows, noise, h)
        total = noise.log_cdf(t[..., None] - rows).sum(-1)
        part = torch.where(t > anchor, -torch.expm1(total), -total.exp())
        return anchor + (log_w.exp() * part).sum(0)

    return _by_rows(rule, mu, _count(mu, noise, h))


class _Potential(torch.autograd.Function):
    """The expected maximum of unit noise, rows (rows, n) to (rows,), with the gradient p."""

    @staticmethod
    def forward(ctx: Any, mu: Tensor, noise: Noise) -> Tensor:
        ctx.save_for_backward(mu)
        ctx.noise = noise
        return _expected_max(mu, noise)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (mu,) = ctx.saved_tensors
        return grads[0][:, None] * perturbed_log_prob(mu, ctx.noise).exp(), None


# -------------------------------------------------------------------------------- many classes at once


@functools.lru_cache(maxsize=8)
def _chebyshev(small: int, large: int) -> tuple[Tensor, Tensor]:
    """Chebyshev points in (-1, 1), and the matrix from values there to coefficients of the products T_k(x) T_(k' small)(x)."""
    count = small * large
    angle = (torch.arange(count, dtype=torch.float64) + 0.5) * math.pi / count
    plain = torch.cos(torch.arange(count, dtype=torch.float64)[:, None] * angle) * 2 / count  # values to T_m coefficients
    plain[0] /= 2
    for k in range(large - 1, 0, -1):  # T_(k small + c) = 2 T_(k small) T_c - T_(k small - c)
        for c in range(small - 1, 0, -1):
            plain[k * small - c] -= plain[k * small + c]
            plain[k * small + c] *= 2
    return torch.cos(angle), plain


def _interpolated(mu: Tensor, noise: Noise, h: float) -> Tensor | None:
    """Trapezoid rule on interpolants in mu; None where they would be long, or a probability too small for a plain sum."""
    n, dtype = mu.shape[1], mu.dtype
    top, low = mu.detach().amax(1), mu.detach().amin(1)
    half = max(0.5, float((top - low).max()) / 2)
    small = 8
    large = 2 + math.ceil(14 * half / small)
    if small * large > n / 2:
        return None
    points, to_products = (x.to(mu.device) for x in _chebyshev(small, large))
    t = torch.arange(noise.left - half, noise.right + half + h, h, dtype=torch.float64, device=mu.device)
    table = t[:, None] - half * points
    log_f = noise.log_cdf(table) @ to_products.T
    ratio = noise.log_ratio(table)
    peak = ratio.amax()

    def rule(rows: Tensor) -> Tensor:
        x = (rows.double() - ((rows.detach().amax(1) + rows.detach().amin(1)) / 2).double()[:, None]) / half
        far = x
        for _ in range(3):  # T_8, by T_2m = 2 T_m^2 - 1
            far = 2 * far.square() - 1
        low_t, high_t = _polynomials(x, small), _polynomials(far, large)
        moments = high_t @ low_t.mT  # (rows, large, small): sums over the classes
        total = moments.flatten(1) @ log_f.T
        shift = total.detach().amax(1, keepdim=True)
        inner = (total - shift).exp() @ (ratio - peak).exp()
        values = inner.log() + shift + peak + math.log(h)
        products = (values @ to_products.T).unflatten(1, (large, small))
        return ((products.mT @ high_t) * low_t).sum(1)

    result = torch.cat([rule(rows) for rows in mu.split(max(1, 2**13 // n))])  # what one step makes stays in the cache
    if not bool((result.detach() > -500).all()):
        return None
    return result.to(dtype)


def _polynomials(x: Tensor, count: int) -> Tensor:
    """T_0, ..., T_(count - 1) at x (rows, n): (rows, count, n)."""
    kept, twice = [torch.ones_like(x), x][:count], 2 * x
    while len(kept) < count:
        kept.append(twice * kept[-1] - kept[-2])
    return torch.stack(kept, 1)
