"""Heads that end, and how soon: self-terminating softmax layers and their explicit limits."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kexue import _validate


class SelfTerminatingHead(nn.Module):
    r"""Output layer whose eos probability has a floor that rises to 1, so that every decoder stops.

    .. math:: p_t(e) \ge 1-(1-\varepsilon)^t, \qquad p_t(v) = (1-p_t(e))\,\operatorname{softmax}(Wh_t+b)_v
              \quad (v \ne e,\ \text{softmax over } v \ne e)

    with :math:`a_t` the logit of eos, sigma the logistic function and t = 1 for the first position,

    .. math:: \text{st:}\quad 1-p_t(e) = \prod_{i\le t}(1-\varepsilon)\,\sigma(a_i), \qquad
              \text{nmst:}\quad 1-p_t(e) = (1-\varepsilon)^t\,\sigma(-a_t).

    st never lets the eos probability fall; nmst only keeps the floor. Note the sign: a large :math:`a_t` goes on in st
    and ends in nmst. Computed in the log domain, without cancellation.

    Source: article 7500 of kexue.fm, eqs. (3), (4), which counts positions from 0; Welleck et al., arXiv:2002.02492
    (st); Choi et al., arXiv:2210.00660 (nmst). The softmax over the other tokens leaves eos out; else nothing sums to 1.

    Args:
        d: width of the states. vocab: tokens, eos included. eos: its index. eps: in (0, 1).
        kind: "st" or "nmst".

    Raises:
        ValueError: eps outside (0, 1), eos outside the vocabulary, an unknown kind.
    """

    def __init__(
        self, d: int, vocab: int, eos: int, eps: float, kind: Literal["st", "nmst"] = "st", *,
        device: torch.device | None = None, dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _validate.integer("d", d, low=1)
        _validate.integer("vocab", vocab, low=2)
        _validate.integer("eos", eos, low=0, high=vocab - 1)
        _validate.choice("kind", kind, ("st", "nmst"))
        self.eos, self.kind, self._keep = eos, kind, _log_keep(eps)
        self.linear = nn.Linear(d, vocab, device=device, dtype=dtype)

    def forward(self, h: Tensor, carry: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the next token at each position.

        Args:
            h: (batch, n, d) states. carry: (batch,) from the call on the positions before; None: there are none.

        Returns:
            (batch, n, vocab) log-probabilities, and the carry to go on with (a state for `decode`: batch first).

        Raises:
            TypeError, ValueError: mismatched shapes or dtypes, non-finite states.
        """
        sizes = _validate.shape("h", h, "batch", "n", "d", d=self.linear.in_features)
        _validate.floating(h=h, weight=self.linear.weight)
        _validate.finite(h=h)
        if carry is None:
            carry = h.new_zeros(sizes["batch"])
        _validate.shape("carry", carry, "batch", batch=sizes["batch"])
        logits = self.linear(h)
        at_eos = torch.arange(logits.shape[-1], device=h.device) == self.eos
        others = logits.masked_fill(at_eos, -math.inf).log_softmax(-1)
        if self.kind == "st":
            survive = carry[:, None] + (self._keep + F.logsigmoid(logits[..., self.eos])).cumsum(1)
            carry = survive[:, -1]
        else:
            t = carry[:, None] + torch.arange(1, sizes["n"] + 1, device=h.device, dtype=h.dtype)
            survive = self._keep * t + F.logsigmoid(-logits[..., self.eos])
            carry = t[:, -1]
        ends = (-survive.expm1()).log()
        return torch.where(at_eos, ends[..., None], others + survive[..., None]), carry


def greedy_limit(eps: float) -> int:
    r"""Steps after which greedy decoding of a self-terminating head has ended, whatever the parameters.

    .. math:: t^* = \lfloor \ln 2 / (-\ln(1-\varepsilon)) \rfloor + 1,

    the first t with :math:`1-(1-\varepsilon)^t > 1/2`. A beam of width k that stops by "full" or "slots" needs k - 1
    more, by "best" (without length penalty) none. Article 7500 of kexue.fm counts from 0.

    Raises:
        ValueError: eps outside (0, 1).
    """
    return math.floor(math.log(2) / -_log_keep(eps)) + 1


def mean_length_limit(eps: float) -> float:
    r"""Largest mean length, eos included, of samples from a self-terminating head, whatever the parameters.

    .. math:: E\,T \le \sum_{t\ge0}(1-\varepsilon)^{t(t+1)/2} \approx \sqrt{\pi/2\varepsilon}

    From eps = 1 - 1/e downward the sum is taken on the other side of Poisson's formula, where two terms suffice:
    with :math:`\lambda = -\ln(1-\varepsilon)`, :math:`e^{\lambda/8}\sqrt{\pi/2\lambda}\,(1-2e^{-2\pi^2/\lambda}+\dots)`.

    Raises:
        ValueError: eps outside (0, 1).
    """
    rate = -_log_keep(eps)
    if rate >= 1:
        return math.fsum(math.exp(-rate * t * (t + 1) / 2) for t in range(12))
    return math.exp(rate / 8) * math.sqrt(math.pi / (2 * rate)) * (1 - 2 * math.exp(-2 * math.pi**2 / rate))


def eos_floor(weight: Tensor, bias: Tensor, eos: int, radius: float) -> Tensor:
    r"""Lower bound of a softmax layer's eos probability over all states of bounded norm, so that sampling stops.

    .. math:: p(e) \ge \varepsilon = \Big[\sum_v \exp\big(B\,\|w_v-w_e\| + b_v-b_e\big)\Big]^{-1}, \qquad \|h\|\le B

    Samples then end after 1 / eps tokens in the mean at most. A layer norm has B = sqrt(d); with gain g and shift s,
    B = max |g| sqrt(d) + |s|.

    Source: Welleck et al., arXiv:2002.02492, theorem 3.3, which shows by compactness that some eps exists.

    Args:
        weight: (..., vocab, d). bias: (..., vocab). eos: index. radius: B >= 0.

    Returns:
        (...) the bound.

    Raises:
        TypeError, ValueError: mismatched shapes or dtypes, non-finite entries, eos outside the vocabulary, radius < 0.
    """
    vocab = _validate.shape("weight", weight, "...", "vocab", "d")["vocab"]
    _validate.shape("bias", bias, "...", "vocab", vocab=vocab)
    _validate.floating(weight=weight, bias=bias)
    _validate.finite(weight=weight, bias=bias)
    _validate.integer("eos", eos, low=0, high=vocab - 1)
    _validate.number("radius", radius, low=0.0)
    gap = radius * (weight - weight[..., eos, None, :]).norm(dim=-1) + bias - bias[..., eos, None]
    return (-gap.logsumexp(-1)).exp()


def _log_keep(eps: float) -> float:
    """log(1 - eps)."""
    _validate.number("eps", eps, low=0.0, high=1.0, open_low=True, open_high=True)
    return math.log1p(-eps)
