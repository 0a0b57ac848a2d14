"""Losses of classification: margins and priors inside the logarithm, and every loss of the true class's probability.

Classes are the last axis of the logits: (..., K), targets (...).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kexue import _validate

__all__ = [
    "CE", "SMOOTH_ERROR", "ProbabilityLoss", "effective_weight", "focal", "logit_adjusted_cross_entropy", "margin_cross_entropy",
    "prob_loss", "tsallis",
]

Reduction = Literal["mean", "sum", "none"]


def logit_adjusted_cross_entropy(
    logits: Tensor, target: Tensor, log_prior: Tensor, tau: float = 1.0, *, weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy with the log prior added to the logits, in training only.

    $$ \ell = -w_y\log\operatorname{softmax}(f+\tau\log\pi)_y
            = w_y\log\Bigl[1+\sum_{i\ne y}(\pi_i/\pi_y)^\tau e^{f_i-f_y}\Bigr] $$

    At $\tau=1$, $w=1$ its population minimiser is $f=\log\eta-\log\pi$ up to a constant, whose argmax is optimal for
    balanced error. Predict with the logits as they are.

    Source: article 7708 of kexue.fm, (13); Menon et al., arXiv:2007.07314; at $\tau=1$ "balanced softmax", arXiv:2007.10740.

    Args:
        logits: (..., K), finite. target: int64 (...), in [0, K).
        log_prior: (K,) in nats, finite, normalised: exp(log_prior) sums to 1 up to 1e-4.
        tau: strength, any finite number.
        weight: (K,) factor of each class, >= 0; default 1.
        reduction: "mean" over the samples (weights do not enter the count, unlike torch's), "sum" or "none".

    Returns:
        (), or (...) with "none".

    Raises:
        TypeError, ValueError: wrong shapes or dtypes, non-finite logits, targets out of range, no samples, priors that
            are zero or do not normalise, negative weights.

    Complexity: O(samples · K).

    Example:
        >>> prior = torch.tensor([0.9, 0.1])
        >>> logit_adjusted_cross_entropy(torch.zeros(1, 2), torch.tensor([1]), prior.log())  # -log 0.1
        tensor(2.3026)
    """
    K = _check(logits, target, reduction)
    _validate.number("tau", tau, open_low=True, open_high=True)
    _validate.shape("log_prior", log_prior, "K", K=K)
    _validate.floating(logits=logits, log_prior=log_prior)
    prior = log_prior.detach()
    if not float(prior.min()) > -torch.inf:
        if zero := (prior == -torch.inf).nonzero().flatten().tolist():
            raise ValueError(f"log_prior: the prior of class {', '.join(map(str, zero))} is zero; expected positive priors")
        _validate.finite(log_prior=prior)
    if not abs(float(prior.exp().sum()) - 1) <= 1e-4:
        total = float(prior.double().logsumexp(0))
        raise ValueError(f"log_prior should normalise (logsumexp 0), got logsumexp {total:.6g}; expected log-probabilities")
    _check_weight(weight, logits)
    return _cross_entropy(logits + tau * log_prior, target, weight, reduction)


def margin_cross_entropy(
    logits: Tensor, target: Tensor, margin: Tensor, *, weight: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Cross-entropy with a margin for every pair of classes.

    $$ \ell = w_y\log\Bigl[1+\sum_{i\ne y}e^{\Delta_{yi}-\Delta_{yy}+f_i-f_y}\Bigr] $$

    Logit adjustment is $\Delta_{yi}=\tau\log\pi_i$ in every row; LDAM's one-sided margin is diagonal. With
    $\Delta_{yi}=\log\frac{w_i\pi_i}{w_y\pi_y}$ and any $w>0$ it is Fisher-consistent for balanced error.

    Source: article 7708 of kexue.fm, (12); the family of Menon et al., arXiv:2007.07314, eq. (11).

    Args:
        logits: (..., K), finite. target: int64 (...), in [0, K).
        margin: (K, K), row the true class, column its competitor, in nats, finite.
        weight: (K,), >= 0; default 1. reduction: as in `logit_adjusted_cross_entropy`.

    Returns:
        (), or (...) with "none".

    Raises:
        TypeError, ValueError: wrong shapes or dtypes, non-finite entries, targets out of range, negative weights.

    Complexity: O(samples · K).

    Example:
        >>> margin_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([[0.0, 5.0], [0.0, 0.0]]))
        tensor(5.0067)
    """
    K = _check(logits, target, reduction)
    _validate.shape("margin", margin, K, K)
    _validate.floating(logits=logits, margin=margin)
    _validate.finite(margin=margin)
    _check_weight(weight, logits)
    return _cross_entropy(logits + margin[target], target, weight, reduction)


@dataclass(frozen=True)
class ProbabilityLoss:
    r"""A loss $g(p_y)$ of the probability of the true class, in the log domain.

    Every such loss is cross-entropy with a weight that takes no gradient: $\nabla g(p_y) = w(p_y)\,\nabla(-\log p_y)$,
    $w(p)=-p\,g'(p)$. Calling it with $\log p_y$, from whatever model, gives the loss; its gradient is computed as
    $-w$, so it is finite where the formula's own derivative would be $0\cdot\infty$.

    Attributes:
        name: for tables and figures.
        value: $(\log p, 1-p) \mapsto g$. weight: $(\log p, 1-p) \mapsto w$. Elementwise, of differentiable torch operations.

    Example:
        >>> SMOOTH_ERROR(torch.tensor([0.25]).log())
        tensor([0.7500])
    """

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    weight: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, log_p: Tensor) -> Tensor:
        """The loss (...) at log-probabilities (...) in nats, <= 0 up to rounding."""
        _validate.floating(log_p=log_p)
        bad = ~(log_p.detach() <= 64 * torch.finfo(log_p.dtype).eps)
        if bool(bad.any()):
            raise ValueError(f"log_p has {int(bad.sum())} entries that are NaN or > 0; expected log-probabilities")
        result: Tensor = _OfLogProb.apply(log_p.clamp(max=0) if bool((log_p.detach() > 0).any()) else log_p, self)
        return result


class _OfLogProb(torch.autograd.Function):
    """g as a function of log p, with the derivative -w."""

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, g: ProbabilityLoss) -> Tensor:
        ctx.save_for_backward(log_p)
        ctx.g = g
        return g.value(log_p, -torch.expm1(log_p))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (log_p,) = ctx.saved_tensors
        return -grads[0] * ctx.g.weight(log_p, -torch.expm1(log_p)), None


CE = ProbabilityLoss("cross-entropy", lambda log_p, rest: -log_p, lambda log_p, rest: torch.ones_like(log_p))
r"""$-\log p$, weight 1."""
SMOOTH_ERROR = ProbabilityLoss("smooth error", lambda log_p, rest: rest, lambda log_p, rest: log_p.exp())
r"""$1-p$, weight $p$: one minus the accuracy of a classifier that draws its label from p."""


def tsallis(q: float) -> ProbabilityLoss:
    r"""$(1-p^q)/q$ with weight $p^q$: generalised cross-entropy.

    $q=1$ is the smooth error, $q\to0$ cross-entropy, $q=-1$, for two classes, AdaBoost's exponential loss. For $q<0$
    the loss of a sample with $\log p<-709/|q|$ (float64) exceeds every number and is returned as infinity.

    Source: Zhang and Sabuncu, arXiv:1805.07836 (q in (0, 1]); article 9098 of kexue.fm for the rule behind it.

    Raises:
        ValueError: q outside [-1, 1].

    Example:
        >>> tsallis(0.5)(torch.tensor([0.25]).log())
        tensor([1.])
    """
    _validate.number("q", q, low=-1.0, high=1.0)
    if q == 0:
        return CE
    return ProbabilityLoss(
        f"Tsallis, q = {q:g}", lambda log_p, rest: -torch.expm1(q * log_p) / q, lambda log_p, rest: (q * log_p).exp()
    )


def focal(gamma: float) -> ProbabilityLoss:
    r"""$-(1-p)^\gamma\log p$ with weight $(1-p)^\gamma\bigl(1-\gamma\frac{p\log p}{1-p}\bigr)$.

    The second term is no ornament: the weight exceeds 1 for hard samples, at most $1+e^{-2}$ for $\gamma=1$.

    Source: Lin et al., arXiv:1708.02002, without its class weight alpha.

    Raises:
        ValueError: gamma negative or not finite.

    Example:
        >>> focal(2.0)(torch.tensor([0.5]).log())
        tensor([0.1733])
    """
    _validate.number("gamma", gamma, low=0.0, high=float("inf"), open_high=True)

    def weight(log_p: Tensor, rest: Tensor) -> Tensor:
        limits = torch.finfo(rest.dtype)  # at p = 0, p log p is 0; at p = 1, -log p / (1 - p) is 1
        ratio = torch.where(rest > 0, -log_p.clamp(min=limits.min) / rest.clamp(min=limits.tiny), 1)
        return rest**gamma * (1 + gamma * log_p.exp() * ratio)

    return ProbabilityLoss(f"focal, gamma = {gamma:g}", lambda log_p, rest: -(rest**gamma) * log_p, weight)


def prob_loss(logits: Tensor, target: Tensor, g: ProbabilityLoss = CE, *, reduction: Reduction = "mean") -> Tensor:
    r"""A loss $g(p_y)$ of the softmax probability of the true class, with its gradient $w(p_y)(p-e_y)$.

    Source: article 7708 of kexue.fm, (1) to (4), for g = 1 - p and -log p; see `tsallis`, `focal`.

    Args:
        logits: (..., K), finite. target: int64 (...), in [0, K).
        g: `CE`, `SMOOTH_ERROR`, `tsallis(q)`, `focal(gamma)`, or a `ProbabilityLoss` of your own.
        reduction: "mean" over the samples, "sum" or "none".

    Returns:
        (), or (...) with "none".

    Raises:
        TypeError, ValueError: wrong shapes or dtypes, non-finite logits, targets out of range, no samples.

    Complexity: O(samples · K): one log-softmax. Twice differentiable.

    Example:
        >>> prob_loss(torch.zeros(1, 4), torch.tensor([2]), SMOOTH_ERROR)
        tensor(0.7500)
    """
    if not isinstance(g, ProbabilityLoss):
        raise TypeError(f"g should be a ProbabilityLoss (CE, SMOOTH_ERROR, tsallis(q), focal(gamma)), got {type(g).__name__}")
    _check(logits, target, reduction)
    if g is CE:
        return _cross_entropy(logits, target, None, reduction)
    losses: Tensor = _OfLogProb.apply(-_cross_entropy(logits, target, None, "none"), g)
    return _reduce(losses, reduction)


def effective_weight(p: Tensor, g: ProbabilityLoss | Callable[[Tensor], Tensor]) -> Tensor:
    r"""The weight $w(p)=-p\,g'(p)$ with which a loss $g(p_y)$ multiplies the gradient of cross-entropy.

    Args:
        p: (...), in [0, 1]; in (0, 1] if g is a plain function.
        g: a `ProbabilityLoss`, or any elementwise function of p, which is differentiated.

    Returns:
        (...), without gradient.

    Raises:
        TypeError, ValueError: p not floating or out of range, g not callable.

    Example:
        >>> effective_weight(torch.tensor([0.5]), lambda p: 1 / p - 1)
        tensor([2.])
    """
    _validate.floating(p=p)
    least = torch.finfo(p.dtype).tiny if not isinstance(g, ProbabilityLoss) else 0.0
    if bad := int((~((p >= least) & (p <= 1))).sum()):
        raise ValueError(f"p has {bad} entries outside {'(' if least else '['}0, 1]; expected probabilities")
    if isinstance(g, ProbabilityLoss):
        with torch.no_grad():
            return g.weight(p.log(), 1 - p)
    if not callable(g):
        raise TypeError(f"g should be a ProbabilityLoss or a function of p, got {type(g).__name__}")
    with torch.enable_grad():
        point = p.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(g(point).sum(), point)
    return -p.detach() * slope


def _check(logits: Tensor, target: Tensor, reduction: str) -> int:
    """Validate the common arguments; the number of classes."""
    K = _validate.shape("logits", logits, "...", "K")["K"]
    _validate.floating(logits=logits)
    _validate.choice("reduction", reduction, ("mean", "sum", "none"))
    if not logits.numel():
        raise ValueError(f"logits should have at least one sample and one class, got shape {tuple(logits.shape)}")
    _validate.classes("target", target, logits.shape[:-1], K)
    _validate.finite(logits=logits)
    return K


def _check_weight(weight: Tensor | None, logits: Tensor) -> None:
    if weight is None:
        return
    _validate.shape("weight", weight, "K", K=logits.shape[-1])
    _validate.floating(logits=logits, weight=weight)
    _validate.finite(weight=weight)
    if bool((weight < 0).any()):
        raise ValueError(f"weight has {int((weight < 0).sum())} negative entries; expected weights >= 0")


def _cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    fused = reduction if weight is None else "none"
    losses = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1), reduction=fused)
    if fused != "none":
        return losses
    losses = losses.reshape(target.shape)
    return _reduce(losses if weight is None else weight[target] * losses, reduction)


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses
