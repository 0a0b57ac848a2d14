r"""Discrete choice: the law of the argmax of scores plus independent noise, its samples, and its Fenchel-Young loss.

$p_i = P(\mu_i+s\varepsilon_i > \mu_j+s\varepsilon_j\ \forall j\ne i)$. Gumbel noise gives softmax, normal noise the
multinomial probit with independent errors, exponential noise the permute-and-flip mechanism.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
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

    For enough scores at once, the trapezoid rule works on Chebyshev interpolants of the two functions of $\mu$ that it
    needs: O(1) work per class instead of a row of nodes for each. From 64 classes on the error is up to 1e-11, relative
    where $-\log p>1$; in float64 with fewer classes only rows with scores at most 8 apart take this way, up to 1e-13.

    Source: article 9085 of kexue.fm, (8), whose quantile rule (11) this replaces.

    Args:
        mu: (..., n) scores, finite.
        noise: `GUMBEL`, `NORMAL`, `LOGISTIC`, `LAPLACE`, `EXPONENTIAL`, `UNIFORM`, or one of your own.
        scale: s > 0, in the unit of mu; the same as dividing mu by it.
        step: spacing of the trapezoid's nodes in units of the noise; default `noise.step(n)`.

    Returns:
        (..., n), of the dtype of mu but computed in float64; differentiable.

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
    h = step or noise.step(n)
    result = (_grouped if noise.rule == "trapezoid" else _exact)(flat, noise, h)
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
    potential: Tensor = _Potential.apply(flat, noise)
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
    return mu.reshape(-1, n).to(torch.promote_types(mu.dtype, torch.float32)) / scale, n


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


def _exact(mu: Tensor, noise: Noise, h: float) -> Tensor:
    """Log-probabilities node by node."""
    rule = functools.partial(_log_prob, noise=noise, h=h)
    return _by_rows(rule, mu.double(), _count(mu, noise, h)).to(mu.dtype)


def _log_prob(mu: Tensor, noise: Noise, h: float) -> Tensor:
    def part(t: Tensor, log_w: Tensor, mu: Tensor) -> Tensor:
        x = t[..., None] - mu
        total = noise.log_cdf(x).sum(-1)
        return _logsumexp(noise.log_ratio(x) + (total + log_w)[..., None])

    t, log_w, _ = _nodes(mu, noise, h)
    return _logsumexp(_by_nodes(part, mu, t, log_w))


def _logsumexp(terms: Tensor) -> Tensor:
    """Over the first axis; where all are -inf (p = 0) no gradient, and none of the NaN of `torch.logsumexp`."""
    dead = (terms.detach() == -math.inf).all(0)
    if bool(dead.any()):
        return terms.masked_fill(dead, 0).logsumexp(0).masked_fill(dead, -math.inf)
    return terms.logsumexp(0)


def _by_nodes(part: Callable[..., Tensor], mu: Tensor, *nodes: Tensor) -> Tensor:
    """Results (pieces, ...) of a function of nodes and mu on pieces of the nodes (K, rows) that fit in memory."""
    size = max(1, _ENTRIES // mu.numel())
    if len(nodes[0]) <= size:
        return part(*nodes, mu)[None]
    pieces = zip(*(x.split(size) for x in nodes), strict=True)
    return torch.stack([checkpoint(part, *piece, mu, use_reentrant=False) for piece in pieces])  # type: ignore[misc]


def _expected_max(mu: Tensor, noise: Noise) -> Tensor:
    h = noise.step(mu.shape[1])

    def rule(rows: Tensor) -> Tensor:
        def part(t: Tensor, log_w: Tensor, rows: Tensor) -> Tensor:
            total = noise.log_cdf(t[..., None] - rows).sum(-1)
            return (log_w.exp() * torch.where(t > anchor, -torch.expm1(total), -total.exp())).sum(0)

        t, log_w, anchor = _nodes(rows, noise, h)
        return anchor + _by_nodes(part, rows, t, log_w).sum(0)

    return _by_rows(rule, mu.double(), _count(mu, noise, h)).to(mu.dtype)


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


# -------------------------------------------------------------------------------- many scores at once

_LOW = 4  # the basis: products of the first polynomials with those of T_4(x)


@dataclass(frozen=True)
class _Table:
    """A noise between interpolants of functions of the score on (-half, half), in units of T_m or of `_products`."""

    half: float
    log_f: Tensor  # (nodes, count): log F(t - mu), in products
    slope_f: Tensor  # (nodes, count): its derivative in mu, in products
    ratio: Tensor  # (nodes, count): f/F at the Chebyshev points, over its maximum
    peak: float  # logarithm of that maximum times the spacing
    fit: Tensor  # (count, count): values at the points to T_m
    products: Tensor  # (count, count): T_m to products
    slope: Tensor  # (count, count): T_m to products of the derivative


def _chebyshev(count: int) -> tuple[Tensor, Tensor]:
    """Chebyshev points in (-1, 1), and the matrix from values there to the coefficients of T_0, ..., T_(count - 1)."""
    phase, unit = torch.arange(count)[:, None] * (odd := 2 * torch.arange(count) + 1) % (4 * count), math.pi / 2 / count
    fit = torch.cos(unit * phase.double()) * 2 / count
    fit[0] /= 2
    return torch.cos(unit * odd.double()), fit


def _to_products(plain: Tensor) -> Tensor:
    """Coefficients of T_0, T_1, ... (count, columns) to those of `_products`."""
    size = 1 << (len(plain) - 1).bit_length()
    out = torch.cat([plain, plain.new_zeros(size - len(plain), plain.shape[1])])
    while size > 1:
        size //= 2
        below, above = out.view(-1, 2, size, plain.shape[1])[:, :, 1:].unbind(1)
        below -= above.flip(1)  # T_(s + c) = 2 T_s T_c - T_(s - c)
        above *= 2
    return out[: len(plain)]


def _products(x: Tensor, out: Tensor) -> Tensor:
    """Fill out (rows, count, n) with products of T_1, T_2, T_4, ... by the binary digits of 0, ..., count - 1; x is lost."""
    out[:, 0] = 1
    size, minus = 1, x.new_tensor(-1.0)
    while size < out.shape[1]:
        torch.mul(out[:, : min(size, out.shape[1] - size)], x[:, None], out=out[:, size : 2 * size])
        x, size = torch.addcmul(minus, x, x, value=2, out=x), 2 * size
    return x


@functools.lru_cache(maxsize=16)
def _table(noise: Noise, n: int, h: float, half: float, device: torch.device) -> _Table | None:
    """None if singularities of the noise are so close that the interpolants would be long."""
    t = torch.arange(noise.left - half, noise.right + half + h, h, dtype=torch.float64)
    t = t[n * noise.log_cdf(t + half) > -600, None]  # left of these the product of all F is below exp(-600)
    functions, most = (noise.log_cdf, noise.log_ratio), 32 + 16 * math.ceil(half)
    points, fit = _chebyshev(most)
    tails = torch.stack([(f(t - half * points) @ fit.T).abs().flip(1).cummax(1).values for f in functions])
    scale = torch.maximum(tails[..., -1:], torch.tensor([1e-3, 1.0]).to(tails)[:, None, None])
    spare = int((tails < 3e-14 * scale).all(0).all(0).sum())
    if spare < _LOW:
        return None
    points, fit = _chebyshev(_LOW * math.ceil((most - spare) / _LOW))
    log_f, log_ratio = (f(t - half * points) for f in functions)
    products = _to_products(torch.eye(len(fit)).to(fit))
    derivative = torch.from_numpy(np.polynomial.chebyshev.chebder(np.eye(len(fit)))).to(fit) / half
    slope = products[:, :-1] @ derivative
    peak = float(log_ratio.amax())
    tables = log_f @ fit.T @ products.T, log_f @ fit.T @ slope.T, (log_ratio - peak).exp()
    log_f, slope_f, ratio, fit, products, slope = (x.to(device) for x in (*tables, fit, products, slope))
    return _Table(half, log_f, slope_f, ratio, peak + math.log(h), fit, products, slope)


def _grouped(mu: Tensor, noise: Noise, h: float) -> Tensor:
    """Trapezoid rule for rows with scores about equally far apart together, on interpolants where these will do."""
    level = (mu.detach().amax(1) - mu.detach().amin(1)).double().clamp(min=4).log2().mul(2).ceil()
    parts: list[Tensor] = []
    orders: list[Tensor] = []
    rest = torch.ones_like(level, dtype=torch.bool)
    for k in level.unique().tolist():
        rows = (level == k).nonzero()[:, 0]
        part = _interpolated(mu if len(rows) == len(mu) else mu.index_select(0, rows), noise, h, 2 ** (k / 2 - 1))
        if part is not None:
            parts, orders, rest[rows] = [*parts, part], [*orders, rows], False
    if not parts:
        return _exact(mu, noise, h)
    if bool(rest.any()):
        rows = rest.nonzero()[:, 0]
        parts, orders = [*parts, _exact(mu.index_select(0, rows), noise, h)], [*orders, rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts).index_select(0, torch.cat(orders).argsort())


def _interpolated(mu: Tensor, noise: Noise, h: float, half: float) -> Tensor | None:
    """None where the interpolants would be long or not exact enough, or a probability too small for a plain sum."""
    n = mu.shape[1]
    if mu.numel() < 32 * (half + 2) or half > (4 if n < 64 and mu.dtype == torch.float64 else 16):
        return None
    table = _table(noise, n, h, half, mu.device)
    if table is None:
        return None
    result: Tensor = _Interpolated.apply(mu.double(), noise, h, table)
    return result.to(mu.dtype) if bool(result.detach().min() > -500) else None


class _Interpolated(torch.autograd.Function):
    """Moments of the scores, then the integral at the points, then its interpolant at the scores."""

    @staticmethod
    def forward(ctx: Any, mu: Tensor, noise: Noise, h: float, table: _Table) -> Tensor:
        result, moments = torch.empty_like(mu), mu.new_empty(len(mu), len(table.fit))
        for sums, out, low, high, room in _chunks(table, mu, moments, result):
            torch.bmm(high, low.mT, out=sums.unflatten(1, (-1, _LOW)))
            out.copy_(_evaluate(_integral(sums, table)[2] @ table.products.T, low, high, room))
        ctx.save_for_backward(mu, moments)
        ctx.rule = noise, h, table
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        mu, moments = ctx.saved_tensors
        noise, h, table = ctx.rule
        if torch.is_grad_enabled():  # derivatives of this derivative are asked for
            return torch.autograd.grad(_exact(mu, noise, h), mu, grads[0], create_graph=True)[0], None, None, None
        result = torch.empty_like(mu)
        for up, sums, out, low, high, room in _chunks(table, mu, grads[0], moments, result):
            weights, inner, fitted = _integral(sums, table)
            at_points = (high @ torch.mul(up[:, None], low, out=room).mT).flatten(1) @ table.products @ table.fit
            at_nodes = weights * ((at_points / inner) @ table.ratio.T)
            torch.mul(_evaluate(fitted @ table.slope.T, low, high, room), up, out=out)
            out += _evaluate(at_nodes @ table.slope_f, low, high, room)
        return result, None, None, None


def _chunks(table: _Table, mu: Tensor, *others: Tensor) -> Iterator[list[Tensor]]:
    """Rows of the others, with the polynomials of their scores whose products are the basis, and room for as many."""
    n, count = mu.shape[1], len(table.fit) // _LOW
    size = max(1, 2**15 // max(n, 64))
    space = mu.new_empty(min(size, len(mu)), 2 * _LOW + count, n)  # small enough for the cache
    for rows, *rest in zip(*(x.split(size) for x in (mu, *others))):
        low, high, room = space[: len(rows)].split([_LOW, count, _LOW], 1)
        middle = (rows.amax(1, keepdim=True) + rows.amin(1, keepdim=True)) / 2
        _products(_products(torch.sub(rows, middle, out=room[:, 0]).div_(table.half), low), high)
        yield [*rest, low, high, room]


def _integral(moments: Tensor, table: _Table) -> tuple[Tensor, Tensor, Tensor]:
    """Product of all F at the nodes, its integral against f/F with the score at the points, the logarithm of that in T_m."""
    total = moments @ table.log_f.T
    shift = total.amax(1, keepdim=True)
    weights = total.sub_(shift).exp_()
    inner = weights @ table.ratio
    return weights, inner, (inner.log() + (shift + table.peak)) @ table.fit.T


def _evaluate(coefficients: Tensor, low: Tensor, high: Tensor, out: Tensor) -> Tensor:
    """Functions with these coefficients (rows, count) in products, at the scores."""
    torch.bmm(coefficients.unflatten(1, (-1, _LOW)).mT, high, out=out)
    size = _LOW
    while size > 1:
        size //= 2
        torch.addcmul(out[:, :size], out[:, size : 2 * size], low[:, size, None], out=out[:, :size])
    return out[:, 0]
