"""Numbers about matrices, computations and measurements: effective rank, peak memory, power laws, small smooth fits."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kexue import _validate


def effective_rank(A: Tensor, energy: float = 0.99) -> Tensor:
    r"""Number of singular values that hold a share of the energy.

    $$ \min\{m : \sum_{i\le m}\sigma_i^2 \ge \text{energy}\cdot\sum_i\sigma_i^2\} $$

    By Eckart and Young's theorem this is the least rank of an approximation whose squared Frobenius
    error is at most `(1 - energy)` times ``|A|^2``.

    Source: article 7546 of kexue.fm, where it decides how many summary tokens Linformer (arXiv:2006.04768) needs.

    Args:
        A: (..., n, m), finite.
        energy: share in (0, 1].

    Returns:
        int64 (...), between 1 and min(n, m); 0 for a zero matrix.

    Raises:
        TypeError, ValueError: not a floating tensor, fewer than two axes, non-finite entries, `energy` out of range.

    Complexity: O(n m min(n, m)), one singular value decomposition per matrix.

    Example:
        >>> effective_rank(torch.diag(torch.tensor([3.0, 1.0, 0.1])), energy=0.99)
        tensor(2)
    """
    _validate.shape("A", A, "...", "n", "m")
    _validate.floating(A=A)
    _validate.finite(A=A)
    _validate.number("energy", energy, low=0.0, high=1.0, open_low=True)
    held = torch.linalg.svdvals(A.detach()).square().cumsum(-1)
    return (held < energy * held[..., -1:]).sum(-1) + (held[..., -1] > 0)


class PeakMemory(TorchDispatchMode):
    """Count the bytes that torch tensors made inside the block occupy at one time.

    `peak` is the largest sum of the sizes of the storages made inside the block and still alive after
    some operation; tensors that autograd keeps count, scratch memory inside one operation does not. It
    is a count, so it is the same on every machine; `torch.utils.flop_counter.FlopCounterMode` is its
    counterpart for arithmetic.

    Example:
        >>> with PeakMemory() as memory:
        ...     _ = torch.zeros(1000).exp().sum()
        >>> memory.peak
        8000
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._held = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in known:
                known.add(storage._cdata)
                self._sizes[storage._cdata] = storage.nbytes()
                self._held += storage.nbytes()
                weakref.finalize(storage, self._release, storage._cdata).atexit = False
        self.peak = max(self.peak, self._held)
        return out

    def _release(self, storage: int) -> None:
        self._held -= self._sizes.pop(storage)


class PowerLaw(NamedTuple):
    """y = scale * x^exponent: least squares in the logarithms, and the standard error of the exponent."""

    exponent: Tensor
    scale: Tensor
    stderr: Tensor


def fit_power_law(x: Tensor, y: Tensor) -> PowerLaw:
    r"""Exponent and scale of a power law, by least squares in the logarithms.

    $$ \log y \approx \log\text{scale} + \text{exponent}\cdot\log x $$

    The standard error takes the residuals as independent; of the states of one run they are not, so compare runs.

    Args:
        x: (..., n), positive, at least 3 distinct values in each row.
        y: (..., n), positive; leading axes broadcast with those of `x`.

    Returns:
        PowerLaw of three tensors (...).

    Raises:
        TypeError, ValueError: not floating, lengths that differ, fewer than 3 distinct x, entries <= 0 or not finite.

    Complexity: O(n) for each row.

    Example:
        >>> fit_power_law(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([3.0, 12.0, 48.0, 192.0])).exponent
        tensor(2.)
    """
    sizes = _validate.shape("x", x, "...", "n")
    _validate.shape("y", y, "...", "n", n=sizes["n"])
    _validate.floating(x=x, y=y)
    _validate.finite(x=x, y=y)
    for name, values in {"x": x, "y": y}.items():
        if bad := int((values <= 0).sum()):
            raise ValueError(f"{name} has {bad} entries <= 0, which have no logarithm")
    distinct = (x.sort(-1).values.diff(dim=-1) > 0).sum(-1) + 1
    if sizes["n"] < 3 or int(distinct.min()) < 3:
        raise ValueError(f"x has {min(sizes['n'], int(distinct.min()))} distinct values; a standard error needs at least 3")
    u, v = x.log(), y.log()
    du, dv = u - u.mean(-1, keepdim=True), v - v.mean(-1, keepdim=True)
    spread = du.square().sum(-1)
    exponent = (du * dv).sum(-1) / spread
    rest = (dv - exponent[..., None] * du).square().sum(-1) / (sizes["n"] - 2)
    return PowerLaw(exponent, (v.mean(-1) - exponent * u.mean(-1)).exp(), (rest / spread).sqrt())


def minimize(loss: Callable[[Tensor], Tensor], start: Tensor, *, steps: int = 500) -> Tensor:
    """A local minimum of a smooth function of a few variables.

    Torch's L-BFGS with a line search by the strong Wolfe conditions; the gradient comes from autograd.

    Args:
        loss: from a tensor like `start` to a scalar.
        start: floating, finite, not empty.
        steps: iterations allowed, >= 1.

    Returns:
        Like `start`, detached; where the curvature is not degenerate, right to about the root of the dtype's eps.

    Raises:
        TypeError, ValueError: a start that is not floating or not finite; a loss that is no finite scalar there.
        ArithmeticError: no minimum within `steps` iterations, or a loss that is not finite on the way.

    Example:
        >>> minimize(lambda w: (w - 3).square().sum(), torch.zeros(2))
        tensor([3., 3.])
    """
    _validate.floating(start=start)
    _validate.finite(start=start)
    _validate.integer("steps", steps, low=1)
    if not start.numel():
        raise ValueError(f"start is empty (shape {tuple(start.shape)})")
    point = start.detach().clone().requires_grad_()
    _validate.shape("loss(start)", value := loss(point))
    if not bool(value.isfinite()):
        raise ValueError(f"loss(start) should be finite, got {value.item()}")

    def closure() -> Tensor:
        value = loss(point)
        if not bool(value.isfinite()):
            raise ArithmeticError(f"the loss became {value.item()} on the way")
        (point.grad,) = torch.autograd.grad(value, point)
        return value

    solver = torch.optim.LBFGS(
        [point], max_iter=steps, max_eval=10 * steps, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )
    solver.step(closure)
    if solver.state[point]["n_iter"] >= steps:
        raise ArithmeticError(f"no minimum within {steps} steps; the loss is {float(loss(point.detach())):.6g} there")
    return point.detach()


def softmax_regression(
    inputs: Tensor, target: Tensor, classes: int, *, offset: Tensor | None = None, weight: Tensor | None = None,
    ridge: float = 1e-9, steps: int = 100,
) -> Tensor:
    r"""Multinomial logistic regressions, a batch of them at once, by Newton's method.

    $$ \min_\beta\ -\sum_i w_i\log\operatorname{softmax}(x_i\beta+o)_{y_i} + \tfrac12\,\text{ridge}\,\|\beta\|^2,
       \qquad \beta_{\cdot 0}=0 $$

    The column of class 0 stays zero, which fixes what softmax cannot see; for two classes column 1 is logistic regression.
    Steps are halved until the loss falls, so it converges from 0 on any data. On data that a plane separates, the answer
    is finite because of the ridge, and of a length that depends on it.

    Args:
        inputs: (..., N, d), finite; a constant column makes an intercept.
        target: int64 (..., N), in [0, classes).
        classes: K >= 2.
        offset: (K,), added to the logits of every sample, in nats.
        weight: (..., N), >= 0; default 1.
        ridge: > 0, beside the summed loss.
        steps: iterations allowed, >= 1.

    Returns:
        (..., d, K), solved in float64, given in the dtype of `inputs`: logits are inputs @ result (+ offset).

    Raises:
        TypeError, ValueError: wrong shapes or dtypes, non-finite or negative entries, targets or numbers out of range.
        ArithmeticError: no convergence within `steps` iterations.

    Complexity: O(N d² K²) for each of some 5 to 20 steps.

    Example:
        >>> softmax_regression(torch.ones(4, 1), torch.tensor([0, 1, 1, 1]), 2)  # log 3
        tensor([[0.0000, 1.0986]])
    """
    n, d = _validate.shape("inputs", inputs, "...", "n", "d").values()
    _validate.floating(inputs=inputs)
    _validate.finite(inputs=inputs)
    _validate.integer("classes", classes, low=2)
    _validate.classes("target", target, inputs.shape[:-1], classes)
    _validate.number("ridge", ridge, low=0.0, open_low=True, open_high=True)
    _validate.integer("steps", steps, low=1)
    shift = inputs.new_zeros(classes) if offset is None else offset
    w = inputs.new_ones(target.shape) if weight is None else weight
    _validate.shape("offset", shift, "K", K=classes)
    _validate.shape("weight", w, *target.shape)
    _validate.floating(inputs=inputs, offset=shift, weight=w)
    _validate.finite(offset=shift, weight=w)
    if bool((w < 0).any()):
        raise ValueError(f"weight has {int((w < 0).sum())} negative entries; expected weights >= 0")
    X, y, w = inputs.detach().double().reshape(-1, n, d), target.reshape(-1, n), w.detach().double().reshape(-1, n)
    free = classes - 1
    hit = torch.nn.functional.one_hot(y, classes)[..., 1:].to(X)

    def log_probs(beta: Tensor) -> Tensor:
        return (torch.cat([X.new_zeros(*y.shape, 1), X @ beta], -1) + shift.detach().double()).log_softmax(-1)

    def objective(beta: Tensor, log_p: Tensor) -> Tensor:
        return ridge / 2 * beta.square().sum((1, 2)) - (w * log_p.gather(-1, y[..., None])[..., 0]).sum(1)

    beta = X.new_zeros(len(X), d, free)
    log_p = log_probs(beta)
    value = first = objective(beta, log_p)
    eps = torch.finfo(torch.float64).eps
    for _ in range(steps):
        p = log_p[..., 1:].exp()
        gradient = X.mT @ (w[..., None] * (p - hit)) + ridge * beta
        bend = w[..., None, None] * (torch.diag_embed(p) - p[..., :, None] * p[..., None, :])
        hessian = torch.einsum("bnd,bnkl,bne->bdkel", X, bend, X).reshape(len(X), d * free, d * free)
        hessian = hessian + ridge * torch.eye(d * free).to(X)
        move = torch.linalg.solve(hessian, gradient.flatten(1)).view_as(beta)
        small = (move * gradient).sum((1, 2)) <= eps * first.abs()  # twice what one more step gains
        length = torch.ones_like(value)
        while True:
            trial = beta - length[:, None, None] * move
            log_p = log_probs(trial)
            reached = objective(trial, log_p)
            worse = ~(reached <= value) & ~small & (length > eps)
            if not bool(worse.any()):
                break
            length = torch.where(worse, length / 2, length)
        beta, value = trial, reached
        if bool(small.all()):
            return torch.cat([torch.zeros_like(beta[..., :1]), beta], -1).to(inputs).reshape(*inputs.shape[:-2], d, classes)
    raise ArithmeticError(f"no convergence within {steps} steps")
