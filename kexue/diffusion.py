r"""Diffusion models: schedules, losses, samplers, and two models that are exact.

The letters are those of the article series 生成扩散模型漫谈: $\alpha_t^2+\beta_t^2=1$,
$\bar\alpha_t=\prod_{s\le t}\alpha_s$, $\bar\alpha_t^2+\bar\beta_t^2=1$. Squared, they are the $\alpha_t$, $\beta_t$ and
$\bar\alpha_t$ of Ho et al. (arXiv 2006.11239). A *model* is any callable `model(x, t)` that takes x (B, ...) and
integer steps t (B,) and returns its guess of the noise $\varepsilon$ in $x_t=\bar\alpha_tx_0+\bar\beta_t\varepsilon$, in the
shape of x: the output of Ho et al., $\bar\beta_t/\beta_t$ times the one in the article.

Text counts steps t = 1 … T; code counts them 0 … T-1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue._validate import choice, finite, floating, integer, number, shape
from kexue.progress import progress

Model = Callable[[Tensor, Tensor], Tensor]


class Schedule:
    r"""How fast the noise comes: the coefficients of every step, in float64.

    Source: article 9119, the section on hyperparameters (`linear_sqrt`); Ho et al. 2020 (`ho_linear`); Nichol and
    Dhariwal, arXiv 2102.09672 (`cosine`).

    Args:
        T: number of steps, >= 1.
        beta2_max: the largest $\beta_t^2$, in (0, 1). By default 20/T for the linear kinds, which keeps $\bar\alpha_T$
            near $e^{-5}$, and 0.999, where `cosine` is cut off.
        kind: how $\beta_t^2$ grows. "linear_sqrt": beta2_max · t/T, so $\alpha_t=\sqrt{1-\beta_{max}^2t/T}$.
            "ho_linear": in equal steps from beta2_max/200 to beta2_max. "cosine": such that
            $\bar\alpha_t\propto\cos\bigl(\tfrac{t/T+.008}{1.008}\tfrac\pi2\bigr)$.

    Attributes:
        alpha, beta: (T,) share of $x_{t-1}$ and of new noise in $x_t$.
        abar, bbar: (T,) share of $x_0$ and of all noise in $x_t$.
        abar_prev, bbar_prev: (T,) the same one step earlier; they begin with 1 and 0.
        sigma_tilde: (T,) $\tilde\sigma_t=\beta_t\bar\beta_{t-1}/\bar\beta_t$, the sampling noise of a single data point.

    Raises:
        ValueError: T < 1, unknown kind, or a $\beta_t^2$ outside (0, 1).

    Warns:
        UserWarning: $\bar\alpha_T>0.02$: sampling starts from pure noise, which $x_T$ then is not.

    >>> s = Schedule(1000)
    >>> print(f"{s.abar[-1]:.5f}")
    0.00648
    """

    def __init__(self, T: int, beta2_max: float | None = None, kind: str = "linear_sqrt"):
        integer("T", T, low=1)
        choice("kind", kind, ("linear_sqrt", "ho_linear", "cosine"))
        top = (0.999 if kind == "cosine" else 20 / T) if beta2_max is None else beta2_max
        number("beta2_max", top, low=0, open_low=True)
        if top >= 1:
            raise ValueError(f"beta2_max should be in (0, 1), got {top}{'; its default is 20/T' if beta2_max is None else ''}")
        if kind == "linear_sqrt":
            beta2 = top * torch.arange(1, T + 1, dtype=torch.float64) / T
        elif kind == "ho_linear":
            beta2 = torch.linspace(top / 200, top, T, dtype=torch.float64)
        else:
            angle = (torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2
            beta2 = (1 - (angle[1:].cos() / angle[:-1].cos()).square()).clamp(max=top)
        self.T, self.kind = T, kind
        self.beta = beta2.sqrt()
        self.alpha = (1 - beta2).sqrt()
        # bbar² by its own recursion: 1 - abar² would lose digits at small t.
        abar, bbar2 = [1.0], [0.0]
        for a, b2 in zip(self.alpha.tolist(), beta2.tolist(), strict=True):
            abar.append(abar[-1] * a)
            bbar2.append(a * a * bbar2[-1] + b2)
        signal, noise = torch.tensor(abar, dtype=torch.float64), torch.tensor(bbar2, dtype=torch.float64).sqrt()
        self.abar, self.abar_prev = signal[1:], signal[:-1]
        self.bbar, self.bbar_prev = noise[1:], noise[:-1]
        self.sigma_tilde = self.beta * self.bbar_prev / self.bbar
        if self.abar[-1] > 0.02:
            warnings.warn(
                f"x_T keeps {self.abar[-1]:.3g} of the data (abar_T > 0.02), but sampling starts without any: "
                f"raise beta2_max or T until beta2_max * T is about 20 (now {top * T:.3g})",
                UserWarning, stacklevel=2,
            )

    def __repr__(self) -> str:
        return f"Schedule(T={self.T}, beta2_max={self.beta[-1] ** 2:.4g}, kind={self.kind!r})"


def _at(coefficients: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """The coefficient of each row's step, (B,), shaped to multiply x (B, ...)."""
    return coefficients.to(t.device)[t].to(x).view(-1, *[1] * (x.ndim - 1))


def _steps(t: Tensor, x: Tensor, schedule: Schedule) -> None:
    floating(x=x)
    shape("x", x, "B", *[f"n{i}" for i in range(1, x.ndim)])
    shape("t", t, "B", B=x.shape[0])
    if t.is_floating_point() or t.dtype == torch.bool or t.is_complex():
        raise TypeError(f"t should have an integer dtype, got {t.dtype}")
    if t.numel() and (t.min() < 0 or t.max() >= schedule.T):
        raise ValueError(f"t should lie in 0 … T-1 = {schedule.T - 1}, got values from {int(t.min())} to {int(t.max())}")


def q_sample(x0: Tensor, t: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    r"""Demolish t + 1 steps at once: $\bar\alpha_tx_0+\bar\beta_t\varepsilon$.

    Source: article 9119, the section on demolition; Ho et al. 2020, equation (4).

    Args:
        x0: (B, ...) data.
        t: (B,) integers in 0 … T-1.
        noise: in the shape and dtype of x0, standard normal.

    Returns:
        in the shape of x0.

    Raises:
        TypeError, ValueError: mismatch of shape, dtype or device, or a step out of range.

    >>> q_sample(torch.ones(1, 1), torch.tensor([0]), torch.zeros(1, 1), Schedule(25))
    tensor([[0.9839]])
    """
    _steps(t, x0, schedule)
    floating(x0=x0, noise=noise)
    if noise.shape != x0.shape:
        raise ValueError(f"noise: expected shape {tuple(x0.shape)} like x0, got {tuple(noise.shape)}")
    return _at(schedule.abar, t, x0) * x0 + _at(schedule.bbar, t, x0) * noise


def ddpm_loss(
    model: Model,
    x0: Tensor,
    schedule: Schedule,
    *,
    noises: str = "one",
    reduction: str = "sum",
    t: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The loss of DDPM at random steps: the network guesses the noise.

    "one": $\lVert\varepsilon-\epsilon_\theta(x_t,t)\rVert^2$. "two": the noise of the last step alone is the target,
    $\lVert\tfrac{\bar\beta_t}{\beta_t}\varepsilon_t-\epsilon_\theta(x_t,t)\rVert^2$ with
    $x_t=\bar\alpha_tx_0+\alpha_t\bar\beta_{t-1}\bar\varepsilon_{t-1}+\beta_t\varepsilon_t$; its gradient has the same mean and
    a larger variance, and its value is larger by $d(\bar\beta_t^2/\beta_t^2-1)$.

    Source: article 9119, the sections on building and on the reduction of variance, there with weights in front
    (multiply by $\beta_t^4/\alpha_t^2\bar\beta_t^2$ for them); Ho et al. 2020, equation (14).

    Args:
        model: see the module.
        x0: (B, ...) data.
        noises: "one" or "two".
        reduction: over the axes of an item: "sum" (squared norm) or "mean", then averaged over the batch; "none"
            leaves the squared norm of each item.
        t: (B,) integers in 0 … T-1; drawn uniformly if absent.
        generator: of the steps and the noise.

    Returns:
        (), or (B,) for "none".

    Raises:
        TypeError, ValueError: as `q_sample`; an unknown option; an output of the wrong shape.

    >>> x0 = torch.zeros(8, 2)
    >>> ddpm_loss(EmpiricalDenoiser(x0[:1], Schedule(25)), x0, Schedule(25)) < 1e-6
    tensor(True)
    """
    choice("noises", noises, ("one", "two"))
    choice("reduction", reduction, ("sum", "mean", "none"))
    if t is None:
        floating(x0=x0)
        t = torch.randint(schedule.T, x0.shape[:1], generator=generator, device=x0.device)

    def normal() -> Tensor:
        return torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)

    if noises == "one":
        target = normal()
        x = q_sample(x0, t, target, schedule)
    else:
        _steps(t, x0, schedule)
        last = normal()
        before = _at(schedule.abar_prev, t, x0) * x0 + _at(schedule.bbar_prev, t, x0) * normal()
        x = _at(schedule.alpha, t, x0) * before + _at(schedule.beta, t, x0) * last
        target = _at(schedule.bbar / schedule.beta, t, x0) * last
    error = (target - _predict(model, x, t)).square().flatten(1)
    if reduction == "none":
        return error.sum(1)
    return error.sum(1).mean() if reduction == "sum" else error.mean()


def _predict(model: Model, x: Tensor, t: Tensor) -> Tensor:
    noise = model(x, t)
    if not isinstance(noise, Tensor) or noise.shape != x.shape:
        got = tuple(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
        raise ValueError(f"model(x, t) should return the shape of x, {tuple(x.shape)}, got {got}")
    return noise


def optimal_sigma(schedule: Schedule, mse: Tensor) -> Tensor:
    r"""The best sampling noise for a model, from nothing but its loss.

    $\sigma_t^{*2}=\tilde\sigma_t^2+\frac{\beta_t^4}{\alpha_t^2\bar\beta_t^2}\,\mathrm{mse}_t$: the mean squared error of
    $\mu_\theta(x_t)$ as a guess of $x_{t-1}$, per dimension, which minimises the joint KL divergence over isotropic
    variances. A perfect guess (0) gives $\tilde\sigma_t$; standard normal data give $\beta_t$.

    Source: Bao et al., Analytic-DPM, arXiv 2201.06503, there for the exact score; article 9245.

    Args:
        mse: (T,) $\tfrac1d\mathbb E\lVert\varepsilon-\epsilon_\theta(x_t,t)\rVert^2$, on data not used in training; >= 0.

    Returns:
        (T,) float64 standard deviations for `sample`.

    Raises:
        TypeError, ValueError: not floating, wrong length, negative or non-finite.
    """
    shape("mse", mse, "T", T=schedule.T)
    floating(mse=mse)
    finite(mse=mse)
    if (mse < 0).any():
        raise ValueError(f"mse should be >= 0, got a smallest value of {mse.min():.3g}")
    gain = schedule.beta.square() / (schedule.alpha * schedule.bbar)
    return (schedule.sigma_tilde.square() + gain.square() * mse.detach().cpu().double()).sqrt()


def _sigmas(sigma: str | Tensor, schedule: Schedule) -> list[float]:
    if isinstance(sigma, Tensor):
        shape("sigma", sigma, "T", T=schedule.T)
        finite(sigma=sigma)
        if (sigma < 0).any():
            raise ValueError(f"sigma should be >= 0, got a smallest value of {sigma.min():.3g}")
        return sigma.tolist()
    known = {"beta": schedule.beta, "tilde": schedule.sigma_tilde, "zero": torch.zeros_like(schedule.beta)}
    choice("sigma", sigma, known)
    return known[sigma].tolist()


def _start(size: tuple[int, ...], start: Tensor | None, generator: torch.Generator | None, options: dict) -> Tensor:
    if start is None:
        return torch.randn(size, generator=generator, **options)
    floating(start=start)
    finite(start=start)
    if tuple(start.shape) != tuple(size):
        raise ValueError(f"start: expected shape {tuple(size)}, got {tuple(start.shape)}")
    return start.clone()


@torch.no_grad()
def sample(
    model: Model,
    size: tuple[int, ...],
    schedule: Schedule,
    *,
    sigma: str | Tensor = "beta",
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    show_progress: bool = False,
) -> Tensor:
    r"""Draw samples by rebuilding from noise, step by step.

    $x_{t-1}=\frac1{\alpha_t}\bigl(x_t-\frac{\beta_t^2}{\bar\beta_t}\epsilon_\theta(x_t,t)\bigr)+\sigma_tz_t$, from
    $x_T\sim\mathcal N(0,I)$; no noise is added in the last step.

    Source: article 9119, the section on generation; Ho et al. 2020, algorithm 2.

    Args:
        model: see the module; put a network into its evaluation mode first.
        size: (B, ...) shape of the samples.
        sigma: "beta" or "tilde", the two choices of Ho et al.; a tensor (T,) such as `optimal_sigma` gives; "zero",
            the noise-free recursion, which collapses and is here to show it.
        start: size, $x_T$; drawn if absent. It fixes dtype and device.
        generator: of the noise.

    Returns:
        (B, ...) samples.

    Raises:
        ValueError: unknown or ill-shaped sigma, an output of the wrong shape, samples that are not finite.

    Time: T calls of the model.

    >>> schedule = Schedule(50)
    >>> model = GaussianDenoiser(torch.tensor([3.0]), torch.tensor([0.25]), schedule)
    >>> x = sample(model, (1000, 1), schedule, generator=torch.Generator().manual_seed(0))
    >>> print(f"{x.mean():.1f} {x.std():.1f}")
    3.0 0.5
    """
    noise = _sigmas(sigma, schedule)
    x = _start(size, start, generator, {"dtype": dtype, "device": device})
    guess = (schedule.beta.square() / schedule.bbar).tolist()
    alpha = schedule.alpha.tolist()
    steps = range(schedule.T - 1, -1, -1)
    for t in progress(steps, "sampling") if show_progress else steps:
        eps = _predict(model, x, torch.full((len(x),), t, device=x.device))
        x = (x - guess[t] * eps) / alpha[t]
        if t > 0 and noise[t] > 0:
            x += noise[t] * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    finite(samples=x)
    return x


@torch.no_grad()
def ddim_sample(
    model: Model,
    size: tuple[int, ...],
    schedule: Schedule,
    *,
    steps: int | None = None,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    show_progress: bool = False,
) -> Tensor:
    r"""Draw samples without noise on the way: DDIM, a discretised flow from $x_T$ to data.

    $x_{t'}=\bar\alpha_{t'}\hat x_0+\bar\beta_{t'}\epsilon_\theta$ with
    $\hat x_0=(x_t-\bar\beta_t\epsilon_\theta)/\bar\alpha_t$, along `steps` equally spaced steps that end at the data.

    Source: Song et al., arXiv 2010.02502, equation (12) with η = 0; article 9181.

    Args:
        steps: calls of the model, 1 … T; T if absent.
        others: as `sample`.

    Returns:
        (B, ...) samples.

    Raises:
        ValueError: steps out of range, an output of the wrong shape, samples that are not finite.

    >>> schedule = Schedule(50)
    >>> one_point = EmpiricalDenoiser(torch.tensor([[3.0, 4.0]]), schedule)
    >>> ddim_sample(one_point, (1, 2), schedule, steps=10).round(decimals=3)
    tensor([[3., 4.]])
    """
    count = schedule.T if steps is None else steps
    integer("steps", count, low=1, high=schedule.T)
    x = _start(size, start, generator, {"dtype": dtype, "device": device})
    visited = [round(schedule.T * (k + 1) / count) - 1 for k in range(count)]
    path = list(zip(visited[::-1], [*visited[-2::-1], -1], strict=True))
    abar, bbar = [*schedule.abar.tolist(), 1.0], [*schedule.bbar.tolist(), 0.0]  # index -1: the data
    for t, then in progress(path, "sampling") if show_progress else path:
        eps = _predict(model, x, torch.full((len(x),), t, device=x.device))
        x = abar[then] * ((x - bbar[t] * eps) / abar[t]) + bbar[then] * eps
    finite(samples=x)
    return x


class GaussianDenoiser:
    r"""The exact model of Gaussian data $\mathcal N(m,\operatorname{diag}s^2)$, of every linear score.

    $\epsilon^*(x,t)=\bar\beta_t(x-\bar\alpha_tm)/v_t$ with $v_t=\bar\alpha_t^2s^2+\bar\beta_t^2$.

    Args:
        mean: features of an item, or broadcastable to them.
        var: the same; variances, >= 0.

    Raises:
        TypeError, ValueError: not floating, non-finite or negative.
    """

    def __init__(self, mean: Tensor, var: Tensor, schedule: Schedule):
        floating(mean=mean, var=var)
        finite(mean=mean, var=var)
        if (var < 0).any():
            raise ValueError(f"var should be >= 0, got a smallest value of {var.min():.3g}")
        self.mean, self.var, self.schedule = mean, var, schedule

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The noise expected in x (B, ...) at the steps t (B,)."""
        _steps(t, x, self.schedule)
        abar, bbar = _at(self.schedule.abar, t, x), _at(self.schedule.bbar, t, x)
        return bbar * (x - abar * self.mean.to(x)) / (abar.square() * self.var.to(x) + bbar.square())

    def mse(self) -> Tensor:
        r"""(T,) its error per dimension, the mean of $\bar\alpha_t^2s^2/v_t$: no model has a smaller one."""
        signal = self.schedule.abar.square()[:, None] * self.var.double().flatten().cpu()
        return (signal / (signal + self.schedule.bbar.square()[:, None])).mean(1)


class EmpiricalDenoiser:
    r"""The exact minimiser of the loss on a finite training set, in closed form.

    $\epsilon^*(x,t)=(x-\bar\alpha_t\hat x_0)/\bar\beta_t$, $\hat x_0=\sum_ix_i\operatorname{softmax}_i
    \bigl(-\lVert x-\bar\alpha_tx_i\rVert^2/2\bar\beta_t^2\bigr)$. Sampling with it returns training items.

    Args:
        data: (n, ...) the training set, n >= 1. float64 is advisable: with few steps of noise the softmax has
            a temperature of $\bar\beta_1^2$.

    Raises:
        TypeError, ValueError: not floating, non-finite, empty; x of other features.

    Time and memory O(B n) beside the product O(B n d).
    """

    def __init__(self, data: Tensor, schedule: Schedule):
        floating(data=data)
        finite(data=data)
        if data.ndim < 2 or len(data) == 0:
            raise ValueError(f"data: expected shape (n, ...) with n >= 1, got {tuple(data.shape)}")
        self.data, self.schedule = data, schedule

    def x0(self, x: Tensor, t: Tensor) -> Tensor:
        """The data expected behind x (B, ...) at the steps t (B,)."""
        _steps(t, x, self.schedule)
        if x.shape[1:] != self.data.shape[1:]:
            raise ValueError(f"x: expected features {tuple(self.data.shape[1:])} as in data, got {tuple(x.shape[1:])}")
        rows, data = x.flatten(1), self.data.to(x).flatten(1)
        abar, bbar = _at(self.schedule.abar, t, rows), _at(self.schedule.bbar, t, rows)
        # |x|² is the same for all i, and is left out before it can cancel.
        logits = (rows @ data.mT - abar * (data.square().sum(1) / 2)) * (abar / bbar.square())
        return (logits.softmax(1) @ data).view_as(x)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The noise expected in x (B, ...) at the steps t (B,)."""
        x0 = self.x0(x, t)
        return (x - _at(self.schedule.abar, t, x) * x0) / _at(self.schedule.bbar, t, x)


def timestep_embedding(t: Tensor, dim: int, *, max_period: float = 10_000.0) -> Tensor:
    r"""Sinusoidal features of a step: $\sin(t\omega_k)$, then $\cos(t\omega_k)$, k = 0 … dim/2-1.

    $\omega_k=\text{max\_period}^{-k/(dim/2-1)}$. Source: Ho et al. 2020, appendix B, after Vaswani et al. 2017.

    Args:
        t: (B,) steps; need not be integers.
        dim: even, >= 4.
        max_period: > 1; the slowest feature turns once in 2π · max_period steps.

    Returns:
        (B, dim) float32, or the dtype of t if floating.

    Raises:
        TypeError, ValueError: t not (B,), dim odd or too small.

    >>> timestep_embedding(torch.tensor([0]), 4)
    tensor([[0., 0., 1., 1.]])
    """
    shape("t", t, "B")
    integer("dim", dim, low=4)
    number("max_period", max_period, low=1, open_low=True)
    if dim % 2:
        raise ValueError(f"dim should be even, got {dim}")
    half = dim // 2
    rates = torch.exp(-math.log(max_period) / (half - 1) * torch.arange(half, dtype=torch.float64, device=t.device))
    angles = t.double()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1).to(t.dtype if t.is_floating_point() else torch.float32)


class DenoisingMLP(nn.Module):
    r"""A small network for vectors: residual SiLU layers that are told the step.

    With `skip` the output is $\bar\beta_tx+\bar\alpha_tF(x,t)$, so that a network that says nothing (F = 0) is the exact
    model of standard normal data, and F has a target of unit size at every t: v-prediction. Without it the output
    is F, which must learn $\epsilon\approx x$ at large t.

    Source: Salimans and Ho, arXiv 2202.00512, appendix D (v-prediction); Karras et al., arXiv 2206.00364.

    Args:
        d: width of the data, >= 1, of about unit variance.
        schedule: the steps that it will be trained for; they are scaled to 0 … 1000 in its embedding.
        width, blocks: of the layers, >= 1.
        skip: see above.

    Raises:
        ValueError: sizes below 1; at a call, x of another width or a step out of range.

    >>> model = DenoisingMLP(24, Schedule(200))
    >>> model(torch.zeros(5, 24), torch.arange(5)).shape
    torch.Size([5, 24])
    """

    def __init__(self, d: int, schedule: Schedule, *, width: int = 256, blocks: int = 2, skip: bool = True):
        super().__init__()
        for name, value in {"d": d, "width": width, "blocks": blocks}.items():
            integer(name, value, low=1)
        self.d, self.schedule, self.skip = d, schedule, skip
        steps = timestep_embedding(torch.arange(schedule.T, dtype=torch.float64) * (1000 / schedule.T), 64)
        self.register_buffer("steps", steps.float(), persistent=False)
        self.register_buffer("abar", schedule.abar.float()[:, None], persistent=False)
        self.register_buffer("bbar", schedule.bbar.float()[:, None], persistent=False)
        self.into = nn.Linear(d, width)
        self.time = nn.ModuleList(nn.Linear(64, width) for _ in range(blocks))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.out = nn.Linear(width, d)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Noise in x (B, d) at the steps t (B,)."""
        shape("x", x, "B", "d", d=self.d)
        _steps(t, x, self.schedule)
        features = F.embedding(t, self.get_buffer("steps"))
        h = self.into(x)
        for time, layer in zip(self.time, self.layers, strict=True):
            h = h + layer(F.silu(h + time(features)))
        out = self.out(F.silu(h))
        return self.get_buffer("bbar")[t] * x + self.get_buffer("abar")[t] * out if self.skip else out
