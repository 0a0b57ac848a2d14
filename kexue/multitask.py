r"""Several losses, one set of shared parameters: means of losses, gradients task by task, directions that harm no task.

Two kinds of rule. Rules that see loss *values* (`power_mean`, `reference_loss`) cost one backward pass and cannot be
invariant to both the unit and the zero of a loss. Rules that see *gradients* (`task_gradients`, then `normalise_rows`,
`min_norm_point`, `project_on_dual_cone`, `mixed_direction`) cost one backward pass per task, and everything after that
works on the small Gram matrix of the gradients.

Shapes: n tasks or m helpers, d parameters; "..." are batch axes. Directions u are descended: θ ← θ − η u.

Source: 苏剑林, 多任务学习漫谈, articles 8870, 8896 and 8907 of kexue.fm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from kexue import _validate

__all__ = [
    "ConeProjection", "MinNorm", "MixedDirection", "apply_flat_gradient", "min_norm_point", "mixed_direction", "normalise_rows",
    "power_mean", "project_on_dual_cone", "reference_loss", "task_gradients",
]

REFERENCES = ("cross_entropy", "binary_cross_entropy", "squared_error", "absolute_error")
BLOCK = 1 << 16  # columns that are converted to float64 at a time


# --------------------------------------------------------------------------------------------- values


def power_mean(losses: Tensor, gamma: float, dim: int = -1) -> Tensor:
    r"""Power mean of losses: one knob from the easiest task to the hardest.

    $$ M_\gamma(L) = \Big(\frac1n\sum_i L_i^\gamma\Big)^{1/\gamma}, \qquad
       \frac{\partial M_\gamma}{\partial L_i} = \frac1n L_i^{\gamma-1} M_\gamma^{1-\gamma} $$

    Increasing in gamma: minimum (-inf), harmonic (-1), geometric (0), arithmetic (1), quadratic (2), maximum (inf).
    Computed as $m\exp\big(\frac1\gamma\log(1+\frac1n\sum_i(e^{\gamma\log(L_i/m)}-1))\big)$ with m the largest loss (the
    smallest if gamma < 0): nothing overflows, and small gammas lose no digits.
    Source: article 8870, (9)-(11).

    Args:
        losses: (..., n, ...) finite and >= 0; > 0 if gamma is finite and <= 0.
        gamma: any real number or ±inf.
        dim: the axis of the tasks.

    Returns:
        `losses` without that axis; differentiable. Between equal extremes ±inf divides the derivative evenly. At a
        zero loss the derivative is 0, 1/n or infinite for gamma above, at or below 1; where all losses of a mean are
        zero it is 1/n.

    Raises:
        TypeError, ValueError: no floating tensor, empty axis, negative or non-finite losses, zeros with a finite
            gamma <= 0, gamma not a number.

    Example:
        >>> power_mean(torch.tensor([1.0, 4.0]), 0.0)
        tensor(2.)
    """
    _validate.floating(losses=losses)
    _validate.number("gamma", gamma)
    if losses.ndim == 0 or losses.shape[dim] == 0:
        raise ValueError(f"losses: expected at least one loss along axis {dim}, got shape {tuple(losses.shape)}")
    _validate.finite(losses=losses)
    smallest = float(losses.detach().amin()) if losses.numel() else 1.0
    if smallest < 0:
        raise ValueError(f"losses should be >= 0, got {smallest:.6g}")
    if smallest == 0 and -math.inf < gamma <= 0:
        raise ValueError(f"losses should be > 0 for gamma = {gamma:g} <= 0, got 0")
    if math.isinf(gamma):
        return losses.amax(dim) if gamma > 0 else losses.amin(dim)
    flat = losses.detach()
    unit = flat.amax(dim, keepdim=True) if gamma > 0 else flat.amin(dim, keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)
    if smallest == 0:  # gamma > 0; powers, since a logarithm has no derivative here
        silent = (flat == 0).all(dim, keepdim=True)
        power = torch.where(silent, 1.0, losses / unit).pow(gamma).mean(dim).pow(1 / gamma)
        return torch.where(silent.squeeze(dim), losses.mean(dim), unit.squeeze(dim) * power)
    logs = losses.log() - unit.log()
    if abs(gamma) < 1e-100:
        return unit.squeeze(dim) * logs.mean(dim).exp()
    excess = torch.expm1(gamma * logs).mean(dim)
    return unit.squeeze(dim) * (torch.log1p(excess) / gamma).exp()


def reference_loss(kind: str, target: Tensor) -> Tensor:
    r"""Loss of the best constant predictor: what a model reaches that knows the labels' distribution and ignores the input.

    | kind | best constant | its loss |
    |---|---|---|
    | "cross_entropy" | class frequencies $\pi$ | entropy $-\sum_k\pi_k\log\pi_k$ |
    | "binary_cross_entropy" | frequency $\pi$ of ones | $-\pi\log\pi-(1-\pi)\log(1-\pi)$ |
    | "squared_error" | mean | variance, with denominator N |
    | "absolute_error" | median | mean absolute deviation from the median |

    Dividing a loss by it removes the unit, and starts all tasks near 1. Source: article 8870, (3)-(4).

    Args:
        kind: a row of the table.
        target: (N,) integer classes >= 0 for "cross_entropy"; (N, ...) floating, boolean or integer otherwise, in [0, 1]
            for "binary_cross_entropy". Each entry after the first axis gets a constant of its own.

    Returns:
        (), in nats or in the unit of the loss, averaged over entries as the losses of torch are: in the dtype of `target`
        if that is floating, else the default dtype. Zero if all targets are equal.

    Raises:
        TypeError, ValueError: unknown kind, empty, wrong dtype or shape, negative classes, targets outside [0, 1], NaN.

    Example:
        >>> reference_loss("squared_error", torch.tensor([0.0, 2.0]))
        tensor(1.)
    """
    _validate.choice("kind", kind, REFERENCES)
    if not isinstance(target, Tensor):
        raise TypeError(f"target should be a torch tensor, got {type(target).__name__}")
    if target.ndim == 0 or target.numel() == 0:
        raise ValueError(f"target: expected shape (N, ...) with N >= 1, got {tuple(target.shape)}")
    if kind == "cross_entropy":
        _validate.shape("target", target, "N")
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise TypeError(f"target should hold integer classes, got {target.dtype}")
        if int(target.min()) < 0:
            raise ValueError(f"target should hold classes >= 0, got {int(target.min())}")
        share = target.unique(return_counts=True)[1].to(torch.get_default_dtype()) / target.numel()
        return torch.special.entr(share).sum()
    value = target if target.is_floating_point() else target.to(torch.get_default_dtype())
    _validate.finite(target=value)
    if kind == "squared_error":
        return value.var(0, correction=0).mean()
    if kind == "absolute_error":
        return (value - value.median(0).values).abs().mean()
    if not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError(f"target should lie in [0, 1], got values from {float(value.min()):g} to {float(value.max()):g}")
    share = value.mean(0)
    return (torch.special.entr(share) + torch.special.entr(1 - share)).mean()


# ------------------------------------------------------------------------------------------ gradients


def task_gradients(
    losses: Mapping[str, Tensor] | Sequence[Tensor] | Tensor, params: Iterable[Tensor], *, retain_graph: bool = False
) -> Tensor:
    """One gradient per task with respect to the shared parameters, flat.

    One backward pass per task through the part that the losses share. Nothing is written to `.grad`.

    Args:
        losses: n scalars with a graph, as a mapping from names, a sequence, or a tensor (n,).
        params: shared parameters, d numbers in all, of one dtype and device; a parameter that only some tasks use
            contributes zeros to the others.
        retain_graph: keep the graph after the last task, to go on to the heads.

    Returns:
        (n, d), detached; columns in the order of `params`.

    Raises:
        TypeError, ValueError: no losses or parameters, a loss that is no scalar, a parameter that requires no gradient,
            a task that depends on no shared parameter (named).

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> task_gradients({"a": w.sum(), "b": w.square().sum()}, [w])
        tensor([[1., 1.],
                [2., 4.]])
    """
    shared = _parameters(params)
    for i, param in enumerate(shared):
        if not param.requires_grad:
            raise ValueError(f"params[{i}] of shape {tuple(param.shape)} does not require a gradient")
    if isinstance(losses, Mapping):
        named = [(f"losses[{name!r}]", loss) for name, loss in losses.items()]
    else:
        if isinstance(losses, Tensor):
            _validate.shape("losses", losses, "n")
        named = [(f"losses[{i}]", loss) for i, loss in enumerate(losses)]
    if not named:
        raise ValueError("losses is empty; expected at least one task")
    for name, loss in named:
        _validate.shape(name, loss)
    rows = []
    for i, (name, loss) in enumerate(named):
        keep = retain_graph or i + 1 < len(named)
        grads = torch.autograd.grad(loss, shared, retain_graph=keep, allow_unused=True) if loss.requires_grad else ()
        if all(grad is None for grad in grads):
            raise ValueError(f"{name} does not depend on the shared parameters")
        whole = (torch.zeros_like(param) if grad is None else grad for param, grad in zip(shared, grads, strict=True))
        rows.append(torch.cat([grad.reshape(-1) for grad in whole]))
    return torch.stack(rows)


def apply_flat_gradient(params: Iterable[Tensor], u: Tensor) -> None:
    """Write a flat direction into the `.grad` of parameters, replacing what is there, for an optimiser to descend.

    Args:
        params: d numbers in all, in the order given to `task_gradients`.
        u: (d,), of their dtype.

    Raises:
        TypeError, ValueError: no parameters, mixed dtypes, wrong length.
    """
    shared = _parameters(params)
    _validate.shape("u", u, "d", d=sum(param.numel() for param in shared))
    _validate.floating(params=shared[0], u=u)
    for param, piece in zip(shared, u.detach().split([param.numel() for param in shared]), strict=True):
        param.grad = piece.reshape(param.shape).clone()


def _parameters(params: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(params, Tensor):
        raise TypeError("params should be an iterable of tensors, got one tensor")
    shared = list(params)
    if not shared:
        raise ValueError("params is empty; expected at least one shared parameter")
    _validate.floating(**{f"params[{i}]": param for i, param in enumerate(shared)})
    return shared


def normalise_rows(G: Tensor, eps: float = 0.0) -> Tensor:
    r"""Rows as unit vectors, $g_i / \max(\|g_i\|, \varepsilon)$; zero rows stay zero.

    Their sum is the direction of article 8870, (13): indifferent to every increasing transformation of each loss.

    Args:
        G: (..., n, d), finite.
        eps: shorter rows are divided by this; guards against noise of a task at its optimum.

    Returns:
        (..., n, d). Norms neither overflow nor underflow.

    Raises:
        TypeError, ValueError: wrong shape or dtype, non-finite entries, eps negative.
    """
    _validate.floating(G=G)
    _validate.shape("G", G, "...", "n", "d")
    _validate.number("eps", eps, low=0.0, high=math.inf, open_high=True)
    _validate.finite(G=G)
    if 0 in G.shape:
        return G
    largest = G.abs().amax(-1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0)
    scaled = G / unit
    norm = scaled.norm(dim=-1, keepdim=True)
    return scaled / torch.where(norm > 0, norm, 1.0).maximum(eps / unit)


# ----------------------------------------------------------------------------------------- directions


class MinNorm(NamedTuple):
    """Result of `min_norm_point`: `alpha` (..., n) on the simplex, `gap` (...) its certificate."""

    alpha: Tensor
    gap: Tensor


class ConeProjection(NamedTuple):
    """Result of `project_on_dual_cone`: `u` (..., d) = g + weights @ G with `weights` (..., m) >= 0, `residual` (...)."""

    u: Tensor
    weights: Tensor
    residual: Tensor


class MixedDirection(NamedTuple):
    """Result of `mixed_direction`: `u` (..., d) = alpha @ mains + weights @ helpers, `alpha` (..., n), `weights` (..., m)."""

    u: Tensor
    alpha: Tensor
    weights: Tensor
    residual: Tensor


def min_norm_point(gram: Tensor) -> MinNorm:
    r"""Weights of the shortest vector in the convex hull of gradients, from their Gram matrix.

    $$ \min_{\alpha \ge 0,\; \sum_i\alpha_i = 1} \tfrac12\Big\|\sum_i\alpha_i g_i\Big\|^2, \qquad
       \text{gap} = \|u\|^2 - \min_i\langle g_i, u\rangle \ge \|u - u^*\|^2 $$

    With u = α @ G every task decreases, ⟨g_i, u⟩ >= ‖u‖² - gap, unless u = 0: then no direction lowers all losses.
    Exact up to rounding: because the hull's weights are found up to a factor, the simplex may be replaced by one more
    row of a non-negative least-squares problem, which scipy's active-set method ends in finitely many steps.
    Source: article 8896, (14)-(21), which iterates (Frank-Wolfe); Désidéri (2012).

    Args:
        gram: (..., n, n), entries ⟨g_i, g_j⟩; symmetric and positive semi-definite up to rounding of its dtype.

    Returns:
        `alpha` (..., n) and `gap` (...), solved in float64, given in the dtype of `gram`. Not differentiable. Where the
        weights are not unique (parallel gradients), one choice; the point always is.

    Raises:
        TypeError, ValueError: wrong shape or dtype, n = 0, non-finite, not symmetric, indefinite.

    Complexity: O(n³) per matrix in practice, on the CPU.

    Example:
        >>> G = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> min_norm_point(G @ G.T).alpha
        tensor([0.2000, 0.8000])
    """
    _validate.floating(gram=gram)
    n = _validate.shape("gram", gram, "...", "n", "n")["n"]
    if n == 0:
        raise ValueError(f"gram is empty (shape {tuple(gram.shape)})")
    _validate.finite(gram=gram)
    matrices = gram.detach().cpu().double().reshape(-1, n, n).numpy()
    tol = math.sqrt(torch.finfo(gram.dtype).eps)
    size = np.sqrt(np.abs(np.diagonal(matrices, axis1=-2, axis2=-1)))
    skew = np.abs(matrices - matrices.swapaxes(-1, -2)) > tol * size[:, :, None] * size[:, None, :]
    if skew.any():
        b, i, j = np.argwhere(skew)[0]
        a, c = matrices[b, i, j], matrices[b, j, i]
        raise ValueError(f"gram should be symmetric, got {a:.9g} at ({i}, {j}) and {c:.9g} at ({j}, {i})")
    alpha, gap = np.empty((len(matrices), n)), np.empty(len(matrices))
    for b, matrix in enumerate(matrices):
        alpha[b] = _weights(matrix, n, tol)
        products = matrix @ alpha[b]
        gap[b] = max(0.0, alpha[b] @ products - products.min())
    batch = gram.shape[:-2]
    return MinNorm(torch.from_numpy(alpha).to(gram).reshape(*batch, n), torch.from_numpy(gap).to(gram).reshape(batch))


def project_on_dual_cone(g: Tensor, G: Tensor) -> ConeProjection:
    r"""The step nearest to the main gradient that raises no helper to first order.

    $$ u = \arg\min_u \|u - g\|^2 \;\text{ subject to }\; G u \ge 0, \qquad u = g + G^\top\lambda, \quad
       \lambda = \arg\min_{\lambda \ge 0} \|g + G^\top\lambda\|^2 $$

    ⟨u, g⟩ = ‖u‖², so the main loss never rises either, and is frozen (u = 0) only if -g lies in the cone of the helpers.
    Indifferent to the scale of each helper. With one helper λ = relu(-⟨g, g_1⟩)/‖g_1‖². Exact also for several, where
    article 8907, (8), and adding corrections one at a time are not. Works on the Gram matrix, accumulated in float64.
    Source: article 8907, (3)-(7); GEM (arXiv:1706.08840).

    Args:
        g: (..., d) main gradient. G: (..., m, d) gradients of the helpers, m >= 0; zero rows are ignored. Batch axes equal.

    Returns:
        `u` (..., d), `weights` (..., m) and the KKT `residual` (...) of the weights: the largest of -⟨g_i, u⟩ and
        λ_i‖g_i‖ |⟨g_i, u⟩|/‖g‖, in units of ‖g_i‖‖g‖. In the dtype of `g`, not
        differentiable. Where the weights are not unique, one choice.

    Raises:
        TypeError, ValueError: wrong shape or dtype, d = 0, non-finite, rows neither zero nor of a norm in [1e-150, 1e150].

    Complexity: O(m² d + m³), on the device of `g` as far as d is concerned.

    Example:
        >>> project_on_dual_cone(torch.tensor([1.0, 0.0]), torch.tensor([[-1.0, 1.0]])).u
        tensor([0.5000, 0.5000])
    """
    _validate.floating(g=g, G=G)
    d = _validate.shape("g", g, "...", "d")["d"]
    _validate.shape("G", G, "...", "m", "d", d=d)
    result = _directions({"g": g[..., None, :], "G": G})
    return ConeProjection(result.u, result.weights, result.residual)


def mixed_direction(mains: Tensor, helpers: Tensor) -> MixedDirection:
    r"""The step that lowers the slowest main task fastest among those that raise no helper to first order.

    $$ \max_u \min_i \langle g_i, u\rangle - \tfrac12\|u\|^2 \;\text{ subject to }\; \langle h_j, u\rangle \ge 0, \qquad
       u = \sum_i\alpha_i g_i + \sum_j\lambda_j h_j $$

    with α on the simplex and λ >= 0: the point of conv{g_i} + cone{h_j} nearest to 0. One main task gives
    `project_on_dual_cone`, no helpers `min_norm_point`. ⟨g_i, u⟩ >= ‖u‖² with equality where α_i > 0.
    Source: article 8907, (9), which leaves the algorithm open.

    Args:
        mains: (..., n, d), n >= 1. helpers: (..., m, d), m >= 0; zero rows are ignored. Batch axes equal.

    Returns:
        `u` (..., d), `alpha` (..., n), `weights` (..., m) and the KKT `residual` (...), relative as in
        `project_on_dual_cone` with the largest of α_i‖g_i‖ in the place of ‖g‖. In the dtype of `mains`.

    Raises, complexity: as `project_on_dual_cone`, with n + m for m.

    Example:
        >>> mains, helpers = torch.eye(3)[:2], torch.tensor([[-1.0, 0.0, 1.0]])
        >>> mixed_direction(mains, helpers).alpha
        tensor([0.6667, 0.3333])
    """
    _validate.floating(mains=mains, helpers=helpers)
    sizes = _validate.shape("mains", mains, "...", "n", "d")
    _validate.shape("helpers", helpers, "...", "m", "d", d=sizes["d"])
    if sizes["n"] == 0:
        raise ValueError(f"mains: expected at least one main task, got shape {tuple(mains.shape)}")
    return _directions({"mains": mains, "helpers": helpers})


def _directions(named: dict[str, Tensor]) -> MixedDirection:
    """Shortest vectors of conv{rows of the first} + cone{rows of the second}, problem by problem."""
    (first, G), (second, H) = named.items()
    batch, (n, d), m = G.shape[:-2], G.shape[-2:], H.shape[-2]
    if H.shape[:-2] != batch:
        raise ValueError(f"batch axes should be equal, got {first} {tuple(batch)} and {second} {tuple(H.shape[:-2])}")
    if d == 0:
        raise ValueError(f"{first} is empty (shape {tuple(G.shape)})")
    problems = math.prod(batch)
    G, H = G.detach().reshape(problems, n, d), H.detach().reshape(problems, m, d)
    u, weights, residual = G.new_empty(problems, d), np.zeros((problems, n + m)), np.zeros(problems)
    for b in range(problems):
        gram = _gram(G[b], H[b])
        norms = np.sqrt(np.diagonal(gram))
        if not (np.isfinite(gram).all() and norms.max() < 1e150 and (norms.min() > 1e-150 or _vanish(norms, G[b], H[b]))):
            _validate.finite(**{first: G[b], second: H[b]})
            raise ValueError(f"{first} or {second} has rows of norm outside [1e-150, 1e150]; multiply those losses by a constant")
        weights[b] = _weights(gram, n, math.inf)
        u[b] = _combine(weights[b], G[b], H[b])
        share, products = weights[b] * norms, gram @ weights[b]
        size = share[:n].max()
        if size > 0:  # products in units of the rows' norms and of `size`
            products = np.divide(products, norms * size, out=np.zeros(n + m), where=norms > 0)
            level = share @ products / size
            slack = products[:n] - np.divide(level * size, norms[:n], out=np.zeros(n), where=norms[:n] > 0)
            wrong = np.concatenate([-slack, -products[n:], share / size * np.abs(np.concatenate([slack, products[n:]]))])
            residual[b] = max(0.0, wrong.max())
    found = torch.from_numpy(weights).to(G).reshape(*batch, n + m)
    return MixedDirection(
        u.reshape(*batch, d), found[..., :n], found[..., n:], torch.from_numpy(residual).to(G).reshape(batch)
    )


def _vanish(norms: np.ndarray, G: Tensor, H: Tensor) -> bool:
    """Whether all rows too short for a square are zero."""
    return not any(bool(row.any()) for row, norm in zip([*G, *H], norms, strict=True) if not norm > 1e-150)


def _blocks(d: int, dtype: torch.dtype) -> Iterable[slice]:
    """Columns to convert at a time: all of them where nothing is converted."""
    step = d if dtype == torch.float64 else BLOCK
    return (slice(start, start + step) for start in range(0, d, step))


def _gram(G: Tensor, H: Tensor) -> np.ndarray:
    """Gram matrix of the rows of G and H, accumulated in float64."""
    n, m = len(G), len(H)
    total = torch.zeros(n + m, n + m, dtype=torch.float64)
    for block in _blocks(G.shape[1], G.dtype):
        a, b = G[:, block].double(), H[:, block].double()
        total[:n, :n] += (a @ a.T).cpu()
        total[n:, n:] += (b @ b.T).cpu()
        total[n:, :n] += (b @ a.T).cpu()
    total[:n, n:] = total[n:, :n].T
    return total.numpy()


def _combine(weights: np.ndarray, G: Tensor, H: Tensor) -> Tensor:
    """weights @ [G; H], accumulated in float64, in the dtype of G."""
    first, second = torch.from_numpy(weights).to(G.device).split([len(G), len(H)])
    pieces = [
        torch.addmv(first @ G[:, block].double(), H[:, block].double().T, second).to(G.dtype)
        for block in _blocks(G.shape[1], G.dtype)
    ]
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _weights(gram: np.ndarray, mains: int, tol: float) -> np.ndarray:
    r"""Weights >= 0 of the shortest $\sum_i w_i g_i$, those of the first `mains` rows summing to 1.

    In units of the rows' norms, and with the sum as one more row: $\min_{y\ge0}\|\sum_i y_i\hat g_i\|^2 + (s^\top y - 1)^2$.
    On each ray the best length is a factor that normalising removes, so the extra row needs no large coefficient.
    """
    diagonal = np.diagonal(gram)
    if diagonal.min() < 0:
        raise ValueError(f"gram should be positive semi-definite, got a diagonal entry of {diagonal.min():.6g}")
    norms = np.sqrt(diagonal)
    weights = np.zeros(len(gram))
    shortest = norms[:mains].argmin()
    if norms[shortest] == 0:
        weights[shortest] = 1
        return weights
    alive = norms > 0
    norms = norms[alive]
    s = np.zeros(len(norms))
    s[:mains] = norms[shortest] / norms[:mains]
    inner = gram if alive.all() else gram[np.ix_(alive, alive)]
    values, vectors = np.linalg.eigh(inner / norms[:, None] / norms)
    if values[0] < -tol * len(norms):
        raise ValueError(f"gram should be positive semi-definite, got the eigenvalue {values[0]:.3g} of its matrix of cosines")
    rows = np.vstack([np.sqrt(np.maximum(values, 0))[:, None] * vectors.T, s])
    goal = np.zeros(len(rows))
    goal[-1] = 1
    y, _ = nnls(rows, goal)
    weights[alive] = y * (norms[shortest] / norms)
    return weights / weights[:mains].sum()
