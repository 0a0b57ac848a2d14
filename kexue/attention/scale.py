r"""How sharp an attention row is, and how the factor of its logits should follow the number of keys.

`softmax_entropy` measures, `attention_scale` prescribes; `vmf_kl` and its rate `sphere_entropy_rate` are what a row of random
directions has.
"""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor

from kexue import _validate

SCALES = ("sqrt", "logn", "sqrtlogn")


def softmax_entropy(logits: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    r"""Entropy of the softmax of each row, in nats, without making a logarithm of a weight.

    $$ H = \log\sum_i e^{l_i} - \sum_i p_i l_i, \qquad p = \operatorname{softmax}(l) $$

    Source: article 8823 of kexue.fm, for attention rows. Differentiable twice, also where logits are -inf.

    Args:
        logits: (..., n, ...), floating; -inf for a key that takes no part, no NaN or +inf.
        dim: the axis of the n keys.
        mask: boolean, broadcastable to `logits`, of which it may add leading axes; False leaves a key out.

    Returns:
        `logits` without axis `dim`: between 0 and log n.

    Raises:
        TypeError, ValueError: not floating, NaN or +inf, a mask that does not fit, a row without any key.

    Complexity: O(n) per row.

    Example:
        >>> softmax_entropy(torch.zeros(3, 8))                              # log 8, thrice
        tensor([2.0794, 2.0794, 2.0794])
    """
    _validate.floating(logits=logits)
    axes = logits.ndim
    if not axes or not isinstance(dim, int) or not -axes <= dim < axes:
        raise ValueError(f"dim should name one of the axes of logits, shape {tuple(logits.shape)}, got {dim!r}")
    dim = dim - axes if dim >= 0 else dim
    if not logits.shape[dim]:
        raise ValueError(f"logits have no keys along dim {dim}: shape {tuple(logits.shape)}")
    if bad := int((~(logits < math.inf)).sum()):
        raise ValueError(f"logits have {bad} entries that are NaN or +infinity, of {logits.numel()}")
    if mask is not None:
        _validate.broadcasts("mask", mask, logits.shape)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask should be boolean, got {mask.dtype}")
        logits = logits.masked_fill(~mask, -math.inf)
    absent = logits == -math.inf
    if empty := int(absent.all(dim).sum()):
        raise ValueError(f"{empty} rows have no key: all their logits are -infinity or masked")
    shifted = logits - logits.detach().amax(dim, keepdim=True)
    weights = shifted.softmax(dim)
    return shifted.logsumexp(dim) - (weights * shifted.masked_fill(absent, 0.0)).sum(dim)


@overload
def attention_scale(n: int, d: int, kind: str = "logn", *, n0: float = 512, clamp: bool = False) -> float: ...
@overload
def attention_scale(n: Tensor, d: int, kind: str = "logn", *, n0: float = 512, clamp: bool = False) -> Tensor: ...
def attention_scale(
    n: int | Tensor, d: int, kind: str = "logn", *, n0: float = 512, clamp: bool = False
) -> float | Tensor:
    r"""Factor of the logits of a row that sees n keys: 1/sqrt(d) times a function of n that is 1 at n0.

    $$ \text{sqrt}: 1, \qquad \text{logn}: \frac{\log n}{\log n_0}, \qquad
       \text{sqrtlogn}: \sqrt{\frac{\log n}{\log n_0}} $$

    "logn" keeps the weight of one signal among indistinct keys, "sqrtlogn" the share of the entropy of random
    scores; "sqrt" is the usual 1/sqrt(d). A row with one key gets 0 from the last two: it has nothing to choose.

    Source: articles 8823 and 9034 of kexue.fm, which have n0 = 512 and "logn".

    Args:
        n: number of keys that a row sees, >= 1: an integer, or a tensor of any shape, one entry per row, such as
            `torch.arange(1, m + 1)[:, None]` for causal rows. Take the row's own number, not the length of the batch.
        d: width of a head, >= 1.
        kind: "sqrt", "logn" or "sqrtlogn".
        n0: length of training, > 1, where the factor is 1/sqrt(d).
        clamp: never less than 1/sqrt(d): leave rows shorter than n0 alone.

    Returns:
        A number for an integer; for a tensor a tensor of its shape, in its dtype, or torch's default if it holds integers.

    Raises:
        TypeError, ValueError: n < 1, d < 1, n0 <= 1, an unknown kind (the message lists the known).

    Example:
        >>> from functools import partial
        >>> from kexue.transformer import Config
        >>> config = Config(d=64, layers=2, heads=4, vocab=50, causal=True, scale=partial(attention_scale, d=16, n0=128))
    """
    _validate.integer("d", d, low=1)
    _validate.choice("kind", kind, SCALES)
    _validate.number("n0", n0, low=1.0, open_low=True, high=math.inf, open_high=True)
    if isinstance(n, Tensor):
        if n.dtype == torch.bool or n.is_complex():
            raise TypeError(f"n should hold real numbers, got {n.dtype}")
        lengths = n if n.is_floating_point() else n.to(torch.get_default_dtype())
        if bad := int((~((lengths >= 1) & (lengths < math.inf))).sum()):
            raise ValueError(f"n has {bad} entries that are not finite numbers >= 1, of {n.numel()}")
        ratio = lengths.log() / math.log(n0)
        factor = {"sqrt": torch.ones_like(ratio), "logn": ratio, "sqrtlogn": ratio.sqrt()}[kind]
        return (factor.clamp(min=1.0) if clamp else factor) / math.sqrt(d)
    _validate.integer("n", n, low=1)
    share = math.log(n) / math.log(n0)
    number = {"sqrt": 1.0, "logn": share, "sqrtlogn": math.sqrt(share)}[kind]
    return (max(number, 1.0) if clamp else number) / math.sqrt(d)


# ------------------------------------------------------------------------------------ random directions


def sphere_entropy_rate(lam: float | Tensor) -> Tensor:
    r"""Entropy that random keys lose per dimension, in nats, in the limit of many dimensions and of more keys.

    $$ g(\lambda) = -\tfrac12\log(1-c^2) = \tfrac12\log\frac{1+\sqrt{1+4\lambda^2}}{2},
       \qquad c = \frac{\sqrt{1+4\lambda^2}-1}{2\lambda} $$

    With |q| = |k| = sqrt(d) and logits lambda q.k a row over n random directions has the entropy
    log n - d g(lambda) + O(1), as long as that is well above 0. g is lambda^2/2 for small lambda.

    Args:
        lam: factor of the logits, >= 0, of any shape.

    Returns:
        float64, of the shape of `lam`.

    Raises:
        TypeError, ValueError: not real, negative, infinite or NaN.

    Example:
        >>> sphere_entropy_rate(1.0)                        # half the logarithm of the golden ratio
        tensor(0.2406, dtype=torch.float64)
    """
    lam = _nonnegative("lam", lam)
    root = torch.hypot(torch.ones_like(lam), 2 * lam)
    return 0.5 * torch.log1p(2 * lam * (lam / (1 + root)))


def vmf_kl(kappa: float | Tensor, d: int) -> Tensor:
    r"""Divergence of the von Mises-Fisher law on the sphere in d dimensions from the uniform law, in nats.

    $$ \mathrm{KL} = \kappa A_d(\kappa) - \log\Bigl[\Gamma(\tfrac d2)\bigl(\tfrac2\kappa\bigr)^{d/2-1}
       I_{d/2-1}(\kappa)\Bigr], \qquad A_d = \frac{I_{d/2}}{I_{d/2-1}} $$

    It is log n minus the entropy of softmax(kappa cos) over n -> infinity random directions. To about ten digits
    throughout: by the power series of the Bessel function, all of whose terms are positive, and where that is long by the
    uniform expansion (Abramowitz and Stegun, 9.7.7), with which nothing underflows as `scipy.special.ive` does.

    Args:
        kappa: concentration >= 0, of any shape. d: dimensions, >= 2.

    Returns:
        float64, of the shape of `kappa`.

    Raises:
        TypeError, ValueError: not real, negative, infinite or NaN; d < 2.

    Complexity: O(min(kappa, 1000)) per entry.

    Example:
        >>> vmf_kl(torch.tensor([0.0, 8.0]), 64)
        tensor([0.0000, 0.4889], dtype=torch.float64)
    """
    kappa = _nonnegative("kappa", kappa)
    _validate.integer("d", d, low=2)
    nu = d / 2 - 1
    flat = kappa.flatten()
    mode = (torch.hypot(flat, torch.full_like(flat, nu)) - nu) / 2
    terms = mode + 12 * mode.sqrt() + 60
    out = torch.empty_like(flat)
    short = terms <= 1024
    for chunk in short.nonzero()[:, 0].split(256) if bool(short.any()) else ():
        out[chunk] = _series(flat[chunk], nu, int(terms[chunk].max()))
    out[~short] = _uniform(flat[~short], nu)
    return out.view(kappa.shape)


def _nonnegative(name: str, value: float | Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        _validate.number(name, value, low=0.0, high=math.inf, open_high=True)
    elif value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} should hold real numbers, got {value.dtype}")
    x = torch.as_tensor(value, dtype=torch.float64)
    if bad := int((~((x >= 0) & (x < math.inf))).sum()):
        raise ValueError(f"{name} has {bad} entries that are not finite numbers >= 0, of {x.numel()}")
    return x


def _series(kappa: Tensor, nu: float, terms: int) -> Tensor:
    """From sum_k t_k with t_k = (kappa/2)^2k / (k! (nu + 1)_k): kappa A = 2 E[k] under the weights t_k."""
    k = torch.arange(1, terms + 1, dtype=torch.float64, device=kappa.device)
    log_t = (2 * (kappa / 2).log().unsqueeze(-1) - (k * (k + nu)).log()).cumsum(-1)
    top = log_t.amax(-1, keepdim=True).clamp(min=0.0)
    t = (log_t - top).exp()
    rest = t.sum(-1)  # of the terms k >= 1, over e^top
    lead = (-top).exp().squeeze(-1)
    log_phi = torch.where(top.squeeze(-1) > 0, top.squeeze(-1) + (lead + rest).log(), rest.log1p())
    return 2 * (k * t).sum(-1) / (lead + rest) - log_phi


_DEBYE = (  # coefficients of (nu/r)^2j / r^m, r^2 = nu^2 + kappa^2, for m = 1, 2, 3
    (3 / 24, -5 / 24),
    (81 / 1152, -462 / 1152, 385 / 1152),
    (30375 / 414720, -369603 / 414720, 765765 / 414720, -425425 / 414720),
)


def _uniform(kappa: Tensor, nu: float) -> Tensor:
    """From log I_nu(kappa) for large r = sqrt(nu^2 + kappa^2), and its derivative, term by term."""
    r = torch.hypot(kappa, torch.full_like(kappa, nu))
    square = (nu / r) ** 2
    tail, slope = torch.ones_like(r), torch.zeros_like(r)
    for m, row in enumerate(_DEBYE, 1):
        for j, c in enumerate(row):
            term = c * square**j / r**m
            tail, slope = tail + term, slope - (2 * j + m) * (1 - square) * term
    log_phi = (
        math.lgamma(nu + 1) + nu * (math.log(2) - (nu + r).log()) + r - 0.5 * (2 * math.pi * r).log() + tail.log()
    )
    return kappa * (kappa / (nu + r)) - 0.5 * (1 - square) + slope / tail - log_phi
