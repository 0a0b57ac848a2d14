"""Optimal transport between weighted point clouds: exact, bounded, and as a distance between sentences.

The network simplex of POT solves each problem; this module checks the input, batches, differentiates and
bounds. Masses are never renormalised: unequal totals are an error.

Shapes: `m` and `n` points in `d` dimensions, "..." any batch axes, which broadcast. A point of mass zero
does not exist: it changes no distance and no bound, so batches of clouds of unequal size are padded with
massless points (`pad`).

Source: 苏剑林, 从EMD、WMD到WRD：文本向量序列的相似度计算 (https://kexue.fm/archives/7388).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from ot.lp.emd_wrap import emd_c
from torch import Tensor

from kexue import _validate

__all__ = [
    "Sinkhorn", "centroid_bound", "directions", "emd", "gelbrich_bound", "independent_bound", "pad",
    "relaxed_bound", "sinkhorn", "spread_bound", "wmd", "wrd",
]


# ---------------------------------------------------------------------------------------------- exact


@overload
def emd(
    p: Tensor, q: Tensor, cost: Tensor, *, return_plan: Literal[False] = False, return_potentials: Literal[False] = False
) -> Tensor: ...
@overload
def emd(
    p: Tensor, q: Tensor, cost: Tensor, *, return_plan: bool = False, return_potentials: bool = False
) -> tuple[Tensor, ...]: ...
def emd(
    p: Tensor, q: Tensor, cost: Tensor, *, return_plan: bool = False, return_potentials: bool = False
) -> Tensor | tuple[Tensor, ...]:
    r"""Earth mover's distance: the exact cost of the cheapest plan that carries masses `p` to masses `q`.

    $$ W(p, q; D) = \min_{\gamma \ge 0} \sum_{ij} \gamma_{ij} D_{ij}, \quad \gamma 1 = p, \; \gamma^\top 1 = q $$

    Differentiable once in all three arguments by the envelope theorem: the derivative is the optimal plan in
    `cost` and the dual potentials in `p` and `q`, which are defined up to a constant, so move masses along
    directions that keep their sums. Where the optimum is not unique this is one of the subgradients.

    Source: Rubner, Tomasi and Guibas (2000); Bonneel et al. (2011) for the network simplex used by POT.

    Args:
        p: (..., m) masses >= 0.
        q: (..., n) masses >= 0, with the same sum as `p` up to rounding of their dtype; that remainder, and
            nothing more, is spread over `q` in proportion.
        cost: (..., m, n), finite, any sign.
        return_plan: also return the optimal plan, (..., m, n).
        return_potentials: also return optimal potentials f (..., m) and g (..., n) with f + g <= cost everywhere
            and p·f = q·g = W/2.

    Returns:
        (...), solved in float64 and given in the dtype of `cost`; with options the tuple (value[, plan][, f, g]),
        of which only the value carries gradients.

    Raises:
        TypeError, ValueError: wrong shape or dtype, empty, negative or non-finite mass, no mass at all, unequal
            sums, non-finite cost.
        RuntimeError: the solver stopped before the optimum.

    Complexity: about O((m + n) m n) per problem in practice, exponential at worst; runs on the CPU.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> emd(p, q, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor(0.2500)
    """
    batch = _problem(p, q, cost)
    if batch:
        p, q, cost = p.expand(*batch, -1), q.expand(*batch, -1), cost.expand(*batch, -1, -1)
    wanted = [True, return_plan, return_potentials, return_potentials]
    if torch.is_grad_enabled() and (p.requires_grad or q.requires_grad or cost.requires_grad):
        results = _Emd.apply(p, q, cost)
    else:
        results = _solve(p, q, cost, return_plan, return_potentials)
    kept = tuple(result for result, keep in zip(results, wanted, strict=True) if keep)
    return kept if len(kept) > 1 else kept[0]


def _problem(p: Tensor, q: Tensor, cost: Tensor) -> torch.Size:
    """Batch axes of a transport problem whose shapes and dtypes agree."""
    sizes = _validate.shape("cost", cost, "...", "m", "n")
    _validate.shape("p", p, "...", "m", m=sizes["m"])
    _validate.shape("q", q, "...", "n", n=sizes["n"])
    _validate.floating(cost=cost, p=p, q=q)
    for name, tensor in (("p", p), ("q", q), ("cost", cost)):
        if tensor.numel() == 0:
            raise ValueError(f"{name} is empty (shape {tuple(tensor.shape)})")
    return _broadcast(p=p.shape[:-1], q=q.shape[:-1], cost=cost.shape[:-2])


def _broadcast(**shapes: torch.Size) -> torch.Size:
    try:
        return torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        listed = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"batch axes do not broadcast: {listed}") from None


def _masses(name: str, masses: np.ndarray) -> np.ndarray:
    """Totals over the last axis, which are finite and positive, of masses that are >= 0."""
    total = masses.sum(-1)
    if not masses.min() >= 0 or not math.isfinite(total.max()):
        raise ValueError(f"{name} should hold finite masses >= 0, got values from {masses.min()} to {masses.max()}")
    if not total.min() > 0:
        raise ValueError(f"{name} has no mass in {int((total <= 0).sum())} of {total.size} problems")
    return total


def _rounding(*masses: Tensor) -> float:
    """Relative rounding error of sums over the last axis."""
    return 4 * sum(t.shape[-1] for t in masses) * torch.finfo(masses[0].dtype).eps


def _balanced(total: np.ndarray, other: np.ndarray, *, tolerance: float) -> None:
    gap = np.abs(total - other) / total
    if gap.max() > tolerance:
        total, other = np.broadcast_arrays(total, other)
        worst = np.unravel_index(gap.argmax(), gap.shape)
        raise ValueError(
            f"p and q should have equal sums, got {total[worst]:.9g} and {other[worst]:.9g} "
            f"(relative difference {gap[worst]:.3g} > {tolerance:.3g}); normalise them yourself, in float64"
        )


def _solve(
    p: Tensor, q: Tensor, cost: Tensor, plans: bool, potentials: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Solve a batch whose axes agree already; plans and potentials only where they are wanted."""
    batch, (m, n) = cost.shape[:-2], cost.shape[-2:]
    a = p.detach().cpu().double().numpy().reshape(-1, m)
    b = q.detach().cpu().double().numpy().reshape(-1, n)
    d = cost.detach().cpu().double().numpy().reshape(-1, m, n)
    total, other = _masses("p", a), _masses("q", b)
    _balanced(total, other, tolerance=_rounding(p, q))
    size = max(-d.min(), d.max())
    if not math.isfinite(size):
        raise ValueError(f"cost has {int((~np.isfinite(d)).sum())} non-finite entries (NaN or infinity) of {d.size}")
    # The simplex compares with absolute tolerances: give it masses that sum to 1 and costs of order 1.
    unit = 2.0 ** math.frexp(size)[1] if size else 1.0
    a, b, d = a / total[:, None], b / other[:, None], np.ascontiguousarray(d / unit)

    value = np.empty(len(d))
    plan = np.empty_like(d) if plans else None
    f, g = (np.empty_like(a), np.empty_like(b)) if potentials else (None, None)
    limit = 100_000 + 64 * m * n
    for i in range(len(d)):
        flow, value[i], u, v, code = emd_c(a[i], b[i], d[i], limit, 1)
        if code != 1:
            raise RuntimeError(f"the network simplex stopped before the optimum (code {code}) on a problem of {m} x {n}")
        if plan is not None:
            plan[i] = flow
        if f is not None and g is not None:
            f[i], g[i] = _complete(a[i], b[i], d[i], u, v)

    def tensor(array: np.ndarray, *tail: int) -> Tensor:
        return torch.from_numpy(array).to(cost).reshape((*batch, *tail))

    return (
        tensor(value * total * unit),
        None if plan is None else tensor(plan * total[:, None, None], m, n),
        None if f is None else tensor(f * unit, m),
        None if g is None else tensor(g * unit, n),
    )


def _complete(p: np.ndarray, q: np.ndarray, cost: np.ndarray, f: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Potentials of massless points, which the solver leaves out, by c-transform; then p·f = q·g."""
    if not p.all() or not q.all():
        f = np.where(p > 0, f, (cost - g)[:, q > 0].min(1))
        g = np.where(q > 0, g, (cost - f[:, None]).min(0))
    shift = (q @ g - p @ f) / 2
    return f + shift, g - shift


class _Emd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor, cost: Tensor) -> tuple[Tensor, ...]:
        value, plan, f, g = _solve(p, q, cost, True, True)
        assert plan is not None and f is not None and g is not None
        ctx.save_for_backward(plan, f, g)
        ctx.mark_non_differentiable(plan, f, g)
        return value, plan, f, g

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        plan, f, g = ctx.saved_tensors
        return slope[..., None] * f, slope[..., None] * g, slope[..., None, None] * plan


# -------------------------------------------------------------------------------------------- entropic


class Sinkhorn(NamedTuple):
    """Result of `sinkhorn`: `cost` is <plan, cost> without the entropy, `error` the largest L1 error of a row sum."""

    cost: Tensor
    plan: Tensor
    f: Tensor
    g: Tensor
    error: Tensor
    iterations: int


def sinkhorn(
    p: Tensor, q: Tensor, cost: Tensor, eps: float, *, iterations: int = 10_000, tol: float = 1e-9
) -> Sinkhorn:
    r"""Entropic transport, by Sinkhorn's iteration in the log domain.

    $$ P_\varepsilon = \arg\min_{\gamma} \langle \gamma, D \rangle - \varepsilon H(\gamma), \qquad
       0 \le \langle P_\varepsilon, D \rangle - W \le \varepsilon \min(H(p), H(q)) \text{ for } \textstyle\sum p = \sum q = 1 $$

    Source: Cuturi, Sinkhorn Distances (arXiv:1306.0895). Every operation is torch's, so gradients flow through the
    iterations; for the gradient of the exact problem use `emd`.

    Args:
        p, q, cost: as for `emd`.
        eps: temperature > 0, in the unit of `cost`; the number of iterations needed grows like 1/eps.
        iterations: at most so many; >= 1.
        tol: stop when every row sum is within `tol` (L1 over a problem); `math.inf` runs all iterations silently.

    Returns:
        `Sinkhorn(cost (...), plan (..., m, n), f (..., m), g (..., n), error (...), iterations)`; the columns of the
        plan sum to `q` exactly, its rows to `p` within `error`. Potentials of massless points are -inf.

    Raises:
        TypeError, ValueError: as `emd`; also eps <= 0. Warns when `tol` was not reached.

    Complexity: O(mn) per problem and iteration.
    """
    _problem(p, q, cost)
    _validate.finite(cost=cost)
    _validate.number("eps", eps, low=0.0, open_low=True)
    _validate.number("tol", tol, low=0.0)
    _validate.integer("iterations", iterations, low=1)
    totals = [_masses(name, t.detach().cpu().double().numpy()) for name, t in (("p", p), ("q", q))]
    _balanced(totals[0], totals[1], tolerance=_rounding(p, q))

    log_p, log_q, kernel = _log(p), _log(q), -cost / eps
    g = torch.zeros_like(log_q)  # potentials in units of eps
    for step in range(1, iterations + 1):
        f = log_p - torch.logsumexp(kernel + g[..., None, :], -1)
        g = log_q - torch.logsumexp(kernel + f[..., :, None], -2)
        if step == iterations or (step % 10 == 0 and tol < math.inf):
            plan = torch.exp(kernel + f[..., :, None] + g[..., None, :])
            error = (plan.sum(-1) - p).abs().sum(-1)
            if (error <= tol).all() and tol < math.inf:
                break
    if (error > tol).any():
        warnings.warn(
            f"sinkhorn did not reach tol={tol:.3g} in {iterations} iterations (error {float(error.max()):.3g}); "
            "raise iterations or eps", stacklevel=2,
        )
    return Sinkhorn((plan * cost).sum((-2, -1)), plan, eps * f, eps * g, error, step)


def _log(masses: Tensor) -> Tensor:
    """log(masses), -inf at zero with gradient zero there."""
    alive = masses > 0
    return torch.where(alive, torch.where(alive, masses, 1.0).log(), -math.inf)


# ---------------------------------------------------------------------------------------------- bounds


def relaxed_bound(p: Tensor, q: Tensor, cost: Tensor) -> Tensor:
    r"""Relaxed transport (RWMD): a lower bound of `emd` that lets every mass go to its nearest target.

    $$ \max\Big(\sum_i p_i \min_j D_{ij},\; \sum_j q_j \min_i D_{ij}\Big) \le W(p, q; D) $$

    Source: Kusner et al., From Word Embeddings To Document Distances (2015). Strong where the clouds do not share
    points; near zero where they do.

    Args:
        p, q, cost: as for `emd` (equal sums are assumed); massless points attract nothing.

    Returns:
        (...) lower bounds. O(mn), differentiable.

    Raises:
        TypeError, ValueError: wrong shape or dtype.
    """
    _problem(p, q, cost)
    alive_p, alive_q = p > 0, q > 0
    if alive_p.all() and alive_q.all():
        to_q, to_p = cost.amin(-1), cost.amin(-2)
    else:
        to_q = cost.masked_fill(~alive_q[..., None, :], math.inf).amin(-1).where(alive_p, 0.0)
        to_p = cost.masked_fill(~alive_p[..., :, None], math.inf).amin(-2).where(alive_q, 0.0)
    return torch.maximum((p * to_q).sum(-1), (q * to_p).sum(-1))


def independent_bound(p: Tensor, q: Tensor, cost: Tensor) -> Tensor:
    r"""Upper bound of `emd`: the cost of the independent plan, $p^\top D q / \sum_i p_i$.

    Args, returns, raises: as `relaxed_bound`.
    """
    _problem(p, q, cost)
    return torch.einsum("...m,...mn,...n->...", p, cost, q) / p.sum(-1)


def centroid_bound(x: Tensor, y: Tensor, p: Tensor | None = None, q: Tensor | None = None) -> Tensor:
    r"""Distance of the centroids (WCD): a lower bound of transport with Euclidean costs.

    $$ \Big\| \sum_i p_i x_i - \sum_j q_j y_j \Big\| \le W(p, q; \|x_i - y_j\|) $$

    Equality iff all displacements of an optimal plan point one way. Its square bounds $W_2^2$ (see `spread_bound`).
    Source: archive 7388, the lower bound of WMD.

    Args:
        x: (..., m, d); y: (..., n, d).
        p: (..., m) and q: (..., n) masses that sum to 1; default uniform.

    Returns:
        (...) lower bounds, in the unit of the points. O((m + n) d).

    Raises:
        TypeError, ValueError: wrong shape or dtype, masses negative or not summing to 1.
    """
    p, q = _clouds(x, y, p, q)
    return (_mean(p, x) - _mean(q, y)).norm(dim=-1)


def spread_bound(x: Tensor, y: Tensor, p: Tensor | None = None, q: Tensor | None = None) -> Tensor:
    r"""Centroids and total variances: a lower bound of transport with squared Euclidean costs.

    $$ \|\bar x - \bar y\|^2 + (\sigma_x - \sigma_y)^2 \le W(p, q; \|x_i - y_j\|^2), \qquad
       \sigma_x^2 = \sum_i p_i \|x_i - \bar x\|^2 $$

    Args, raises: as `centroid_bound`. Returns: (...), in the squared unit of the points. O((m + n) d).
    """
    p, q = _clouds(x, y, p, q)
    centre_x, centre_y = _mean(p, x), _mean(q, y)
    sigma_x = (p.sqrt()[..., None] * (x - centre_x[..., None, :])).norm(dim=(-2, -1))
    sigma_y = (q.sqrt()[..., None] * (y - centre_y[..., None, :])).norm(dim=(-2, -1))
    return (centre_x - centre_y).square().sum(-1) + (sigma_x - sigma_y).square()


def gelbrich_bound(x: Tensor, y: Tensor, p: Tensor | None = None, q: Tensor | None = None) -> Tensor:
    r"""Means and covariances: Gelbrich's lower bound of transport with squared Euclidean costs.

    $$ \|\bar x - \bar y\|^2 + \operatorname{tr}\big(S + T - 2 (S^{1/2} T S^{1/2})^{1/2}\big) \le W(p, q; \|x_i - y_j\|^2) $$

    With centred, mass-weighted points A (m, d) and B (n, d), S = AᵀA and T = BᵀB, the last trace is the nuclear norm
    of A Bᵀ, which is how it is computed. At least as large as `spread_bound`; exact between Gaussians.
    Source: Gelbrich, On a formula for the L2 Wasserstein metric (1990).

    Args, raises: as `centroid_bound`. Returns: (...), in the squared unit of the points. O(mn (d + min(m, n))).
    """
    p, q = _clouds(x, y, p, q)
    centre_x, centre_y = _mean(p, x), _mean(q, y)
    a = p.sqrt()[..., None] * (x - centre_x[..., None, :])
    b = q.sqrt()[..., None] * (y - centre_y[..., None, :])
    shared = torch.linalg.svdvals(a @ b.mT).sum(-1)
    spread = a.square().sum((-2, -1)) + b.square().sum((-2, -1)) - 2 * shared
    return (centre_x - centre_y).square().sum(-1) + spread.clamp(min=0)


def _mean(p: Tensor, x: Tensor) -> Tensor:
    return (p[..., None, :] @ x)[..., 0, :]


def _clouds(x: Tensor, y: Tensor, p: Tensor | None, q: Tensor | None) -> tuple[Tensor, Tensor]:
    """The masses of two clouds, checked; uniform where none are given."""
    _validate.floating(x=x, y=y)
    d = _validate.shape("x", x, "...", "m", "d")["d"]
    _validate.shape("y", y, "...", "n", "d", d=d)
    masses = []
    for name, points, given in (("p", x, p), ("q", y, q)):
        if 0 in points.shape:
            raise ValueError(f"{'x' if name == 'p' else 'y'} is empty (shape {tuple(points.shape)})")
        size = points.shape[-2]
        if given is None:
            given = points.new_full((size,), 1 / size)
        else:
            _validate.shape(name, given, "...", "m" if name == "p" else "n", **{"m" if name == "p" else "n": size})
            _validate.floating(x=x, **{name: given})
            total = _masses(name, given.detach().cpu().double().numpy())
            if abs(total - 1).max() > _rounding(given):
                raise ValueError(f"{name} should sum to 1, got sums from {total.min():.9g} to {total.max():.9g}")
        masses.append(given)
    _broadcast(x=x.shape[:-2], y=y.shape[:-2], p=masses[0].shape[:-1], q=masses[1].shape[:-1])
    return masses[0], masses[1]


# ------------------------------------------------------------------------------------------- sentences


def wmd(x: Tensor, y: Tensor, p: Tensor | None = None, q: Tensor | None = None) -> Tensor:
    r"""Word Mover's Distance: transport between two sets of word vectors at Euclidean cost.

    $$ \mathrm{WMD}(x, y) = W(p, q; \|x_i - y_j\|), \qquad p_i = 1/m, \; q_j = 1/n \text{ by default} $$

    A metric between measures, so a pseudo-metric between sentences: order is ignored and "a b" equals "a b a b".
    Source: Kusner et al. (2015); archive 7388, the section on WMD, whose code divides by the square root of d.

    Args:
        x: (..., m, d) word vectors; y: (..., n, d). Batch axes broadcast: one query against many documents.
        p: (..., m) and q: (..., n) masses that sum to 1; default uniform. Zero marks padding (`pad`).

    Returns:
        (...), in the unit of the vectors; differentiable in vectors and masses.

    Raises:
        TypeError, ValueError: wrong shape or dtype, empty or non-finite, masses negative or not summing to 1.

    Example:
        >>> x, y = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0]])
        >>> wmd(x, y)
        tensor(4.7361)
    """
    p, q = _clouds(x, y, p, q)
    return emd(p, q, torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist"))


def wrd(x: Tensor, y: Tensor) -> Tensor:
    r"""Word Rotator's Distance: transport of norms between directions, at cosine cost.

    $$ \mathrm{WRD}(x, y) = W(p, q; 1 - u_i \cdot v_j), \quad x_i = \|x_i\| u_i, \; p_i = \|x_i\| / \textstyle\sum_k \|x_k\| $$

    and the same for y, q, v. In [0, 2]; indifferent to the scale of either argument. Half the squared 2-Wasserstein
    distance of two measures on the sphere, so its square root is a metric between those and it is not.
    Source: Yokoi et al., Word Rotator's Distance (arXiv:2004.15003); archive 7388, the section on WRD.

    Args:
        x: (..., m, d) word vectors; y: (..., n, d). A zero vector has no mass and no direction: it is padding.

    Returns:
        (...); differentiable wherever no vector is zero, and not through zero vectors.

    Raises:
        TypeError, ValueError: wrong shape or dtype, empty or non-finite, or a set whose vectors are all zero.
    """
    _validate.floating(x=x, y=y)
    d = _validate.shape("x", x, "...", "m", "d")["d"]
    _validate.shape("y", y, "...", "n", "d", d=d)
    (u, p), (v, q) = directions(x), directions(y)
    return emd(p, q, (1 - u @ v.mT).clamp(min=0))


def directions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split vectors into directions and masses: unit vectors, and norms as shares of their sum.

    Args:
        x: (..., m, d), finite.

    Returns:
        Unit vectors (..., m, d), zero where x is zero, and masses (..., m) that sum to 1.

    Raises:
        TypeError, ValueError: wrong shape or dtype, empty or non-finite, or a set whose vectors are all zero.
    """
    _validate.floating(x=x)
    _validate.shape("x", x, "...", "m", "d")
    if x.numel() == 0:
        raise ValueError(f"x is empty (shape {tuple(x.shape)})")
    _validate.finite(x=x)
    norms = x.norm(dim=-1)
    total = norms.sum(-1, keepdim=True)
    if (total == 0).any():
        raise ValueError(f"all vectors are zero in {int((total == 0).sum())} of {total.numel()} sets; they have no direction")
    return x / torch.where(norms > 0, norms, 1.0)[..., None], norms / total


def pad(clouds: Sequence[Tensor], masses: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Stack clouds of unequal size into one batch, filled up with massless points at the origin.

    Args:
        clouds: n tensors (m_i, d), m_i >= 1.
        masses: n tensors (m_i,); default uniform, 1/m_i each.

    Returns:
        Points (n, max m_i, d) and masses (n, max m_i).

    Raises:
        TypeError, ValueError: no clouds, an empty cloud, wrong shape or dtype.
    """
    if len(clouds) == 0:
        raise ValueError("clouds is empty; expected at least one tensor of shape (m, d)")
    if masses is not None and len(masses) != len(clouds):
        raise ValueError(f"expected as many masses as clouds, got {len(masses)} and {len(clouds)}")
    first = clouds[0]
    d = _validate.shape("clouds[0]", first, "m", "d")["d"]
    for i, cloud in enumerate(clouds):
        _validate.shape(f"clouds[{i}]", cloud, "m", "d", d=d)
        if cloud.dtype != first.dtype or i == 0:
            _validate.floating(**{"clouds[0]": first, f"clouds[{i}]": cloud})
        if len(cloud) == 0:
            raise ValueError(f"clouds[{i}] is empty (shape {tuple(cloud.shape)})")
        if masses is not None:
            _validate.shape(f"masses[{i}]", masses[i], "m", m=len(cloud))
            _validate.floating(**{f"clouds[{i}]": cloud, f"masses[{i}]": masses[i]})
    points = torch.nn.utils.rnn.pad_sequence(list(clouds), batch_first=True)
    if masses is not None:
        return points, torch.nn.utils.rnn.pad_sequence(list(masses), batch_first=True)
    sizes = torch.tensor([[len(cloud)] for cloud in clouds], device=first.device)
    return points, (torch.arange(points.shape[1], device=first.device) < sizes) / sizes.to(first.dtype)
