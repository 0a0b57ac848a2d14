"""Losses against torch's own, brute force and autograd of the plain formulas; extreme logits and priors; bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp
from torch.autograd import gradcheck, gradgradcheck

from kexue.losses import (
    CE,
    SMOOTH_ERROR,
    ProbabilityLoss,
    effective_weight,
    focal,
    logit_adjusted_cross_entropy,
    margin_cross_entropy,
    prob_loss,
    tsallis,
)

F64 = torch.float64
PLAIN = {  # name: (the loss, the formula as one would write it)
    "ce": (CE, lambda p: -p.log()),
    "smooth error": (SMOOTH_ERROR, lambda p: 1 - p),
    "gce": (tsallis(0.7), lambda p: (1 - p**0.7) / 0.7),
    "boost": (tsallis(-1), lambda p: 1 / p - 1),
    "tsallis 1e-3": (tsallis(1e-3), lambda p: (1 - p**1e-3) / 1e-3),
    "focal 2": (focal(2), lambda p: -((1 - p) ** 2) * p.log()),
    "focal 0.5": (focal(0.5), lambda p: -((1 - p) ** 0.5) * p.log()),
    "focal 0": (focal(0), lambda p: -p.log()),
}


def draw(seed: int, K: int = 5, n: int = 7, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, K, dtype=F64, generator=gen)
    return logits.requires_grad_(), torch.randint(K, (n,), generator=gen)


def log_prior(K: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(K, dtype=F64, generator=torch.Generator().manual_seed(seed)).log().log_softmax(0)


# ------------------------------------------------------------------------------------- logit adjustment


@given(st.integers(0, 2**31), st.integers(1, 6), st.floats(-2, 2))
def test_logit_adjustment_is_the_formula_of_the_article(seed, K, tau):
    logits, target = draw(seed, K)
    prior = log_prior(K, seed)
    ours = logit_adjusted_cross_entropy(logits, target, prior, tau, reduction="none").tolist()
    for f, y, loss in zip(logits.tolist(), target.tolist(), ours):
        pairs = [tau * float(prior[i] - prior[y]) + f[i] - f[y] for i in range(K) if i != y]
        assert loss == pytest.approx(math.log1p(sum(map(math.exp, pairs))), rel=1e-12, abs=1e-14)


def test_logit_adjustment_equals_torch_on_shifted_logits_with_weights_and_any_leading_axes():
    logits, target = draw(1)
    prior, weight = log_prior(5), torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0], dtype=F64)
    peer = F.cross_entropy(logits + 0.5 * prior, target, weight=weight, reduction="none")
    ours = [logit_adjusted_cross_entropy(logits, target, prior, 0.5, weight=weight, reduction=r) for r in ("none", "mean", "sum")]
    torch.testing.assert_close(ours[0], peer)
    torch.testing.assert_close(ours[1], peer.sum() / 7)  # torch divides by the sum of the weights
    torch.testing.assert_close(ours[2], peer.sum())
    f, y = logits[:6].view(2, 3, 5), target[:6].view(2, 3)
    batched = logit_adjusted_cross_entropy(f, y, prior, 0.5, weight=weight, reduction="none")
    torch.testing.assert_close(batched, peer[:6].view(2, 3))
    one = logit_adjusted_cross_entropy(logits[0], target[0], prior, 0.5, weight=weight)
    torch.testing.assert_close(one, peer[0])


def test_minimiser_in_the_population_is_the_posterior_over_the_prior():
    gen = torch.Generator().manual_seed(0)
    joint = torch.rand(6, 4, dtype=F64, generator=gen).square()
    joint = joint / joint.sum()
    prior, eta = joint.sum(0), joint / joint.sum(1, keepdim=True)
    rows, columns = (grid.reshape(-1) for grid in torch.meshgrid(torch.arange(6), torch.arange(4), indexing="ij"))
    wanted = (eta / prior).log()
    wanted = wanted - wanted.mean(1, keepdim=True)
    w = prior**-0.5
    pair = ((w * prior)[None] / (w * prior)[:, None]).log()
    for call in (
        lambda f: logit_adjusted_cross_entropy(f[rows], columns, prior.log(), reduction="none"),
        lambda f: margin_cross_entropy(f[rows], columns, pair, weight=w, reduction="none"),
    ):
        f = torch.zeros(6, 4, dtype=F64, requires_grad=True)
        solver = torch.optim.LBFGS([f], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe")

        def closure(f=f, call=call, solver=solver):
            solver.zero_grad()
            loss = (joint.flatten() * call(f)).sum()
            loss.backward()
            return loss

        solver.step(closure)
        got = f.detach() - f.detach().mean(1, keepdim=True)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_margins_by_brute_force_and_their_special_cases():
    logits, target = draw(2)
    margin = torch.randn(5, 5, dtype=F64, generator=torch.Generator().manual_seed(3))
    ours = margin_cross_entropy(logits, target, margin, reduction="none")
    for f, y, loss in zip(logits.tolist(), target.tolist(), ours.tolist()):
        shifted = [f[i] + float(margin[y, i]) for i in range(5)]
        assert loss == pytest.approx(float(logsumexp(shifted)) - shifted[y], rel=1e-12)
    prior = log_prior(5)
    torch.testing.assert_close(
        margin_cross_entropy(logits, target, 0.7 * prior.expand(5, 5)), logit_adjusted_cross_entropy(logits, target, prior, 0.7)
    )
    assert gradcheck(lambda f, m: margin_cross_entropy(f, target, m), (logits, margin.requires_grad_()))


# --------------------------------------------------------------------------------- losses of p_y


@pytest.mark.parametrize("name", PLAIN)
@given(seed=st.integers(0, 2**31), K=st.integers(1, 6))
def test_value_and_gradient_equal_the_plain_formula_and_the_weighted_cross_entropy(name, seed, K):
    g, plain = PLAIN[name]
    logits, target = draw(seed, K)
    ours = prob_loss(logits, target, g, reduction="none")
    p = logits.softmax(-1).gather(-1, target[:, None])[:, 0]
    torch.testing.assert_close(ours, plain(p), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(g(p.log()), plain(p), rtol=1e-9, atol=1e-13)
    (grad,) = torch.autograd.grad(ours.sum(), logits)
    weighted = effective_weight(p.detach(), g)[:, None] * (logits.softmax(-1) - F.one_hot(target, K))
    torch.testing.assert_close(grad, weighted.detach(), rtol=1e-9, atol=1e-13)
    if K > 1:
        torch.testing.assert_close(effective_weight(p.detach(), g), effective_weight(p.detach(), plain), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", PLAIN)
def test_two_derivatives(name):
    logits, target = draw(5)
    assert gradcheck(lambda f: prob_loss(f, target, PLAIN[name][0], reduction="none"), logits)
    assert gradgradcheck(lambda f: prob_loss(f, target, PLAIN[name][0], reduction="none"), logits)
    assert gradcheck(PLAIN[name][0], logits.detach().log_softmax(-1).requires_grad_())


def test_cross_entropy_and_two_classes_and_boosting():
    logits, target = draw(6)
    torch.testing.assert_close(prob_loss(logits, target), F.cross_entropy(logits, target), rtol=0, atol=0)
    assert tsallis(0) is CE
    f, label = torch.linspace(-3, 3, 13, dtype=F64), torch.arange(13) % 2
    two = torch.stack([torch.zeros_like(f), f], 1)
    signs = 2.0 * label - 1
    torch.testing.assert_close(prob_loss(two, label, tsallis(-1), reduction="none"), (-signs * f).exp())
    torch.testing.assert_close(prob_loss(two, label, SMOOTH_ERROR, reduction="none"), torch.sigmoid(-signs * f))


def test_the_focal_weight_exceeds_one_by_e_to_the_minus_two():
    p = torch.linspace(0, 1, 200_001, dtype=F64)
    w = effective_weight(p, focal(1))
    assert float(w.max()) == pytest.approx(1 + math.exp(-2), abs=1e-9)
    assert float(p[w.argmax()]) == pytest.approx(math.exp(-2), abs=1e-4)
    assert effective_weight(torch.tensor([0.0, 1.0], dtype=F64), focal(2)).tolist() == [1, 0]
    near = torch.tensor([1 - 1e-9], dtype=F64)
    assert float(effective_weight(near, focal(2)) / (1 - near) ** 2) == pytest.approx(3, rel=1e-6)


# ------------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("g", [CE, SMOOTH_ERROR, tsallis(0.7), tsallis(1e-9), focal(0.5), focal(2)], ids=lambda g: g.name)
def test_extreme_logits_give_finite_and_right_values_and_gradients(g, dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], dtype=dtype, requires_grad=True)
    losses = prob_loss(logits, torch.tensor([0, 0]), g, reduction="none")
    wrong = {"cross-entropy": 2e4, "smooth error": 1.0, "Tsallis, q = 0.7": 1 / 0.7}.get(g.name, 2e4)
    assert losses.tolist() == pytest.approx([0.0, wrong], rel=2e-5)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert bool(torch.isfinite(grad).all())
    weight = {"smooth error": 0.0, "Tsallis, q = 0.7": 0.0}.get(g.name, 1.0)
    assert grad.flatten().tolist() == pytest.approx([0, 0, 0, -weight, weight, 0], abs=3e-5)


def test_a_loss_beyond_the_largest_number_is_infinite_and_never_nan():
    logits = torch.tensor([[-1e4, 1e4]], dtype=F64)
    assert prob_loss(logits, torch.tensor([0]), tsallis(-1)).item() == math.inf


def test_extreme_priors_and_margins():
    prior = torch.tensor([1 - 1e-12, 1e-12], dtype=F64).log()
    logits = torch.tensor([[1e4, -1e4], [0.0, 0.0]], dtype=F64, requires_grad=True)
    losses = logit_adjusted_cross_entropy(logits, torch.tensor([1, 1]), prior, reduction="none")
    assert losses.tolist() == pytest.approx([2e4 - math.log(1e-12), -math.log(1e-12)], rel=1e-12)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert grad.flatten().tolist() == pytest.approx([1, -1, 1, -1], rel=1e-11)
    assert gradcheck(lambda f: logit_adjusted_cross_entropy(f, torch.tensor([1, 1]), prior), logits)
    alone = logit_adjusted_cross_entropy(torch.tensor([[7.0]]), torch.tensor([0]), torch.zeros(1))
    assert alone.item() == 0


def test_half_precision_and_float32_work():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        loss = prob_loss(torch.zeros(2, 4, dtype=dtype), torch.tensor([0, 3]), focal(2))
        assert loss.dtype == dtype and loss.item() == pytest.approx(0.5625 * math.log(4), rel=1e-2)


# ------------------------------------------------------------------------------------------ bad input

Z, T, P = torch.zeros(3, 2), torch.tensor([0, 1, 1]), torch.tensor([0.5, 0.5]).log()
LA = logit_adjusted_cross_entropy


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: prob_loss([[0.0]], T), TypeError, r"logits should be a torch tensor of shape \(\.\.\., K\), got list"),
        (lambda: prob_loss(torch.zeros(3, 2, dtype=torch.int64), T), TypeError, r"logits should have a floating dtype"),
        (lambda: prob_loss(Z, T[:2]), ValueError, r"target: expected shape \(3\), got \(2,\)"),
        (lambda: prob_loss(Z, T.float()), TypeError, r"target should be int64 class numbers, got torch.float32"),
        (lambda: prob_loss(Z, T.int()), TypeError, r"target should be int64"),
        (lambda: prob_loss(Z, T + 1), ValueError, r"target should be in \[0, 1\], got 2"),
        (lambda: prob_loss(Z, T - 100), ValueError, r"target should be in \[0, 1\], got -100"),
        (lambda: prob_loss(Z * math.nan, T), ValueError, r"logits has 6 non-finite entries"),
        (lambda: prob_loss(Z + math.inf, T), ValueError, r"logits has 6 non-finite entries"),
        (lambda: prob_loss(Z[:0], T[:0]), ValueError, r"at least one sample and one class, got shape \(0, 2\)"),
        (lambda: prob_loss(Z[:, :0], T), ValueError, r"at least one sample and one class"),
        (lambda: prob_loss(Z, T, reduction="avg"), ValueError, r"reduction should be one of 'mean', 'sum', 'none', got 'avg'"),
        (lambda: prob_loss(Z, T, lambda p: 1 - p), TypeError, r"g should be a ProbabilityLoss .* got function"),
        (lambda: tsallis(1.5), ValueError, r"q should be a number in \[-1.0, 1.0\], got 1.5"),
        (lambda: tsallis(math.nan), ValueError, r"q should be"),
        (lambda: focal(-1), ValueError, r"gamma should be a number in \[0.0, inf\), got -1"),
        (lambda: focal(math.inf), ValueError, r"gamma should be"),
        (lambda: CE(torch.tensor([0.5])), ValueError, r"log_p has 1 entries that are NaN or > 0"),
        (lambda: CE(torch.tensor([math.nan])), ValueError, r"log_p has 1 entries that are NaN or > 0"),
        (lambda: effective_weight(torch.tensor([1.5]), CE), ValueError, r"p has 1 entries outside \[0, 1\]"),
        (lambda: effective_weight(torch.tensor([0.0]), lambda p: -p.log()), ValueError, r"p has 1 entries outside \(0, 1\]"),
        (lambda: effective_weight(torch.tensor([0.5]), "ce"), TypeError, r"g should be a .* a function of p, got str"),
        (lambda: LA(Z, T, P[:1]), ValueError, r"log_prior: expected shape \(K=2\), got \(1,\)"),
        (lambda: LA(Z, T, P.double()), TypeError, r"log_prior is torch.float64 on cpu, logits is torch.float32"),
        (lambda: LA(Z, T, torch.tensor([1.0, 0.0]).log()), ValueError, r"the prior of class 1 is zero"),
        (lambda: LA(Z, T, P.exp()), ValueError, r"log_prior should normalise .* got logsumexp 1.19315"),
        (lambda: LA(Z, T, P * math.nan), ValueError, r"log_prior has 2 non-finite entries"),
        (lambda: LA(Z, T, P, tau=math.inf), ValueError, r"tau should be a number"),
        (lambda: LA(Z, T, P, weight=-P.exp()), ValueError, r"weight has 2 negative entries"),
        (lambda: LA(Z, T, P, weight=torch.ones(3)), ValueError, r"weight: expected shape \(K=2\), got \(3,\)"),
        (lambda: margin_cross_entropy(Z, T, torch.zeros(2, 3)), ValueError, r"margin: expected shape \(2, 2\), got \(2, 3\)"),
        (lambda: margin_cross_entropy(Z, T, torch.full((2, 2), math.inf)), ValueError, r"margin has 4 non-finite entries"),
        (lambda: margin_cross_entropy(Z, T, torch.zeros(2, 2), weight=P * math.nan), ValueError, r"weight has 2 non-finite"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_loss_of_ones_own():
    brier = ProbabilityLoss("half squared error", lambda log_p, rest: rest**2 / 2, lambda log_p, rest: log_p.exp() * rest)
    logits, target = draw(9)
    p = logits.softmax(-1).gather(-1, target[:, None])[:, 0]
    torch.testing.assert_close(prob_loss(logits, target, brier), ((1 - p) ** 2 / 2).mean())
    assert gradcheck(lambda f: prob_loss(f, target, brier), logits)
