"""Absorbing Markov chains: does decoding stop, after how many tokens, and how much does it repeat."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kexue import _validate


def termination_probability(P: Tensor, absorbing: int | Sequence[int]) -> Tensor:
    r"""Probability that a Markov chain is ever absorbed, from each state: the smallest solution h >= 0 of

    .. math:: h = Qh + b, \qquad h_{\text{absorbing}} = 1,

    with Q the transitions among the other states and b those into the absorbing ones. States that cannot reach one get
    0 and are left out of the linear system, which would be singular with them.

    Source: Kemeny and Snell, *Finite Markov chains*, ch. 3. A bigram model with truncation is such a chain.

    Args:
        P: (..., n, n) transition probabilities, rows sum to 1. The rows of absorbing states are not used.
        absorbing: their indices; for a language model, eos.

    Returns:
        (..., n), 1 at the absorbing states.

    Raises:
        TypeError, ValueError: rows that are not stochastic, indices outside, a system singular up to rounding.

    Complexity: O(n^3) per matrix.
    """
    P, ends, reach = _chain(P, absorbing)
    into = P[..., ends].sum(-1)
    return _solve(P, reach & ~ends, into[..., None])[..., 0].clamp(0, 1).masked_fill(ends, 1.0)


def expected_length(P: Tensor, absorbing: int | Sequence[int]) -> Tensor:
    r"""Mean number of steps to absorption, from each state: (I - Q)^{-1} 1, infinite where absorption is not certain.

    Arguments, errors and cost as of `termination_probability`. Returns (..., n), 0 at the absorbing states. For a
    language model it is the mean number of tokens, eos included, after a given token.
    """
    P, ends, reach = _chain(P, absorbing)
    lost = _reach(P.masked_fill(ends[:, None], 0), ~reach)
    steps = _solve(P, ~lost & ~ends, torch.ones_like(P[..., :1]))[..., 0]
    return steps.masked_fill(lost, math.inf)


def fundamental_matrix(P: Tensor, absorbing: int | Sequence[int]) -> Tensor:
    r"""Mean number of visits to each transient state before absorption, :math:`N = (I-Q)^{-1} = \sum_t Q^t`.

    Arguments and cost as of `termination_probability`. Returns (..., m, m), the transient states in their order, the
    start included in the count.

    Raises:
        ValueError: also if some state cannot reach an absorbing one.
    """
    P, ends, reach = _chain(P, absorbing)
    if not bool(reach.all()):
        raise ValueError(f"I - Q is singular: {int((~reach).sum())} states cannot reach an absorbing one")
    inner = (~ends).nonzero()[:, 0]
    return _solve(P, reach & ~ends, torch.eye(P.shape[-1], dtype=P.dtype, device=P.device).expand_as(P))[
        ..., inner[:, None], inner
    ]


def survival(P: Tensor, absorbing: int | Sequence[int], steps: int) -> Tensor:
    r"""P(T > t) for t = 0, ..., steps: the probability not to be absorbed by then, :math:`Q^t 1`, from each state.

    Arguments and errors as of `termination_probability`; `steps` >= 0. Returns (..., n, steps + 1), 0 at the absorbing
    states, in O(steps n^2).
    """
    _validate.integer("steps", steps, low=0)
    P, ends, _ = _chain(P, absorbing)
    alive = torch.ones_like(P[..., :1]).masked_fill(ends[:, None], 0)
    Q = P.masked_fill(ends[:, None] | ends, 0)
    out = [alive]
    for _ in range(steps):
        out.append(Q @ out[-1])
    return torch.cat(out, -1)


def repetition_index(P: Tensor) -> Tensor:
    r"""How much a bigram model repeats itself: expected number of immediate repetitions, summed over starting tokens.

    .. math:: R = \sum_{k\ge1}\operatorname{tr}(P\circ P)^k = \operatorname{tr}\,M(I-M)^{-1}, \qquad M = P\circ P

    with the entrywise product: :math:`[(P\circ P)^k]_{ww}` is the probability that k tokens from w on come twice, and w
    again. R is no probability and may exceed 1; R / n is the expected count from a uniform start. Infinite where a cycle
    of sure transitions exists.

    Source: article 8128 of kexue.fm; Fu et al., arXiv:2012.14660, who write P^{2k} for the entrywise square.

    Args:
        P: (..., n, n) >= 0, rows sum to at most 1 (eos left out).

    Returns:
        (...) R >= 0.

    Raises:
        TypeError, ValueError: entries or row sums that are no probabilities, a system singular up to rounding.
    """
    n = _validate.shape("P", P, "...", "n", "n")["n"]
    _validate.stochastic("P", P, sub=True)
    sure = (P >= 1).to(P.dtype)
    path = torch.ones_like(P[..., :1])
    for _ in range(n):
        path = sure @ path
    cyclic = path.amax((-2, -1)) > 0
    M = (P * P).masked_fill(cyclic[..., None, None], 0)
    eye = torch.eye(n, dtype=P.dtype, device=P.device)
    R = torch.linalg.solve(eye - M, M).diagonal(dim1=-2, dim2=-1).sum(-1)
    return R.masked_fill(cyclic, math.inf)


def _chain(P: Tensor, absorbing: int | Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix, which states are absorbing (n,), and which can reach one (..., n)."""
    n = _validate.shape("P", P, "...", "n", "n")["n"]
    _validate.stochastic("P", P)
    indices = [absorbing] if isinstance(absorbing, int) else list(absorbing)
    if not indices:
        raise ValueError("absorbing is empty")
    for index in indices:
        _validate.integer("absorbing", index, low=0, high=n - 1)
    ends = torch.zeros(n, dtype=torch.bool, device=P.device)
    ends[indices] = True
    return P, ends, _reach(P, ends.expand(P.shape[:-1]))


def _reach(P: Tensor, target: Tensor) -> Tensor:
    """Which states (..., n) have a path of positive probability to the target (..., n), or lie in it."""
    edges = (P > 0).to(P.dtype)
    while True:
        further = target | ((edges @ target[..., None].to(P.dtype))[..., 0] > 0)
        if torch.equal(further, target):
            return target
        target = further


def _solve(P: Tensor, inner: Tensor, right: Tensor) -> Tensor:
    """(I - Q)^{-1} right on the states `inner` (..., n), 0 elsewhere; the diagonal 1 - P_ii from what leaves i."""
    Q = P.masked_fill(~(inner[..., None] & inner[..., None, :]), 0)
    own = torch.eye(P.shape[-1], dtype=torch.bool, device=P.device)
    leaves = P.masked_fill(own, 0).sum(-1).masked_fill(~inner, 1)
    A = torch.diag_embed(leaves) - Q.masked_fill(own, 0)
    out, info = torch.linalg.solve_ex(A, right.masked_fill(~inner[..., None], 0))
    if bool(info.any()) or not bool(torch.isfinite(out).all()):
        raise ValueError("P: absorption is so slow that the linear system is singular up to rounding")
    return out
