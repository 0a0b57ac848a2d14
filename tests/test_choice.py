"""Perturbed argmax against quadrature, orthants, closed forms and samples; extremes, derivatives, bad input."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import cross_entropy

from kexue import choice
from kexue.choice import (
    EXPONENTIAL,
    GUMBEL,
    LAPLACE,
    LOGISTIC,
    NOISES,
    NORMAL,
    UNIFORM,
    Noise,
    expected_max,
    fenchel_young_loss,
    perturbed_log_prob,
    sample_argmax,
)

F64 = torch.float64
PEERS = {
    "Gumbel": stats.gumbel_r, "normal": stats.norm, "logistic": stats.logistic, "Laplace": stats.laplace,
    "exponential": stats.expon, "uniform": stats.uniform,
}
every_noise = pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.name)
smooth_noise = pytest.mark.parametrize("noise", (GUMBEL, NORMAL, LOGISTIC), ids=lambda noise: noise.name)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, dtype=F64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------- the noises


@every_noise
def test_noises_are_scipys(noise):
    peer = PEERS[noise.name]
    x = torch.linspace(-6, 12, 145, dtype=F64)
    inside = (x > peer.ppf(0)) & (x < peer.ppf(1))
    assert noise.log_cdf(x[inside]).numpy() == pytest.approx(peer.logcdf(x[inside]), rel=1e-9, abs=1e-14)
    assert noise.log_pdf(x[inside]).numpy() == pytest.approx(peer.logpdf(x[inside]), rel=1e-9, abs=1e-12)
    assert bool((noise.log_pdf(x[(x < peer.ppf(0)) | (x > peer.ppf(1))]) == -math.inf).all())
    t = torch.linspace(0.01, 0.99, 50, dtype=F64)
    assert noise.icdf(t).numpy() == pytest.approx(peer.ppf(t), rel=1e-9, abs=1e-12)
    assert (noise.mean, noise.variance) == pytest.approx((peer.mean(), peer.var()))
    draws = noise.draw((20_000,), {"dtype": F64}, torch.Generator().manual_seed(0))
    assert stats.kstest(draws, peer.cdf).pvalue > 1e-4
    again = noise.draw((20_000,), {"dtype": F64}, torch.Generator().manual_seed(0))
    assert torch.equal(draws, again) and repr(noise) == f"Noise({noise.name!r})"


# ------------------------------------------------------------------------------- the probabilities


def by_quad(mu: list[float], noise: Noise) -> list[float]:
    """The integral of the article, by an adaptive rule on the pieces between the kinks."""
    peer = PEERS[noise.name]
    kinks = sorted({m + k for m in mu for k in (0.0, 1.0)})
    pieces = [np.linspace(a, b, 4) for a, b in itertools.pairwise([kinks[0] - 8, *kinks, kinks[-1] + 8])]
    cuts = sorted({float(c) for c in np.hstack([min(mu) - 45, *pieces, max(mu) + 45])})

    def integrand(t: float, i: int) -> float:
        return peer.pdf(t - mu[i]) * math.prod(peer.cdf(t - m) for j, m in enumerate(mu) if j != i)

    return [
        sum(integrate.quad(integrand, a, b, args=(i,), epsabs=0, epsrel=1e-11)[0] for a, b in itertools.pairwise(cuts))
        for i in range(len(mu))
    ]


@every_noise
@pytest.mark.parametrize("mu", [[1.0, 0.3, -0.5, 2.0], [0.0, 0.0, 0.4], [0.2], [0.1, 0.8]])
@pytest.mark.filterwarnings("ignore::scipy.integrate.IntegrationWarning")
def test_probabilities_equal_quad(noise, mu):
    assert perturbed_log_prob(tensor(*mu), noise).exp().tolist() == pytest.approx(by_quad(mu, noise), rel=1e-9, abs=1e-12)


def test_gumbel_is_softmax_and_normal_an_orthant():
    mu = 4 * random(50, 7)
    torch.testing.assert_close(perturbed_log_prob(mu, GUMBEL), mu.log_softmax(-1), rtol=0, atol=1e-13)
    mu = tensor(1, 0.3, -0.5, 2)
    for i in range(4):
        d = mu[i] - torch.cat([mu[:i], mu[i + 1 :]])
        normal = stats.multivariate_normal(cov=np.eye(3) + 1, abseps=1e-9, releps=1e-9, maxpts=2_000_000, seed=0)
        orthant = normal.cdf(d.numpy())
        assert math.exp(perturbed_log_prob(mu, NORMAL)[i]) == pytest.approx(orthant, abs=2e-6)


def pair(noise: Noise, d: torch.Tensor) -> torch.Tensor:
    """log P(the lower of two scores d apart wins)."""
    return {
        "Gumbel": lambda: -torch.nn.functional.softplus(d),
        "normal": lambda: torch.special.log_ndtr(-d / math.sqrt(2)),
        "Laplace": lambda: -d + torch.log((1 + d / 2) / 2),
        "exponential": lambda: -d - math.log(2),
        "logistic": lambda: -d + torch.log((d - 1 + (-d).exp()) / torch.expm1(-d) ** 2),
    }[noise.name]()


@pytest.mark.parametrize("noise", (GUMBEL, NORMAL, LAPLACE, EXPONENTIAL, LOGISTIC), ids=lambda noise: noise.name)
def test_tails_of_pairs_to_1e_13(noise):
    d = tensor(0.5, 1, 2, 5, 10, 20, 30)
    low = torch.cat([perturbed_log_prob(torch.stack([x, 0 * x]), noise)[1:] for x in d])
    assert low.numpy() == pytest.approx(pair(noise, d).numpy(), rel=1e-14, abs=1e-13)
    together = perturbed_log_prob(torch.stack([d, 0 * d], 1), noise)
    assert together[:, 1].numpy() == pytest.approx(low.numpy(), abs=1e-13)


def test_uniform_pairs_and_zeros():
    d = tensor(0, 0.3, 0.9999, 1, 1.0001, 5)
    low = perturbed_log_prob(torch.stack([d, 0 * d], 1), UNIFORM)[:, 1].exp()
    assert low.tolist() == pytest.approx(((1 - d).clamp(min=0) ** 2 / 2).tolist(), rel=1e-10, abs=1e-300)
    mu = tensor(0, 2, 5).requires_grad_()
    p = perturbed_log_prob(mu, UNIFORM)
    assert p.tolist() == [-math.inf, -math.inf, 0]
    assert torch.autograd.grad(p[2], mu)[0].tolist() == [0, 0, 0]


def test_exponential_is_permute_and_flip():
    mu = random(6, seed=3)
    q = (mu - mu.max()).tolist()
    for i in range(6):
        others = [q[j] for j in range(6) if j != i]
        exact = sum((-1) ** k / (k + 1) * math.exp(sum(s)) for k in range(6) for s in itertools.combinations(others, k))
        assert math.exp(perturbed_log_prob(mu, EXPONENTIAL)[i]) == pytest.approx(math.exp(q[i]) * exact, rel=1e-12)


@every_noise
@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 12), spread=st.floats(0.01, 6))
def test_sum_order_shift_scale_and_permutation(noise, seed, n, spread):
    mu = spread * random(n, seed=seed)
    log_p = perturbed_log_prob(mu, noise)
    assert float(log_p.logsumexp(0)) == pytest.approx(0, abs=1e-12)
    order = mu.argsort()
    assert bool((log_p[order].exp().diff() >= -1e-13).all())
    assert perturbed_log_prob(mu + 3.7, noise).exp().tolist() == pytest.approx(log_p.exp().tolist(), abs=1e-12)
    assert perturbed_log_prob(5 * mu, noise, scale=5.0).exp().tolist() == pytest.approx(log_p.exp().tolist(), abs=1e-12)
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert perturbed_log_prob(mu[shuffled], noise).exp().tolist() == pytest.approx(log_p[shuffled].exp().tolist(), abs=1e-12)


@smooth_noise
@pytest.mark.parametrize("n", [2, 3, 5, 10, 30, 60, 300, 3000])
def test_the_default_step_keeps_1e_13_however_many_classes(noise, n):
    for mu in (torch.zeros(n, dtype=F64), 0.5 * random(n), torch.cat([tensor(-8.0), torch.zeros(n - 1, dtype=F64)])):
        fine = choice._log_prob(mu[None], noise, noise.step(n) / 2.3)[0]
        assert perturbed_log_prob(mu, noise).numpy() == pytest.approx(fine.numpy(), rel=1e-14, abs=4e-13)


def log_below(x: torch.Tensor) -> torch.Tensor:
    return torch.log(-torch.expm1(-torch.exp(x)))


MIRRORED = Noise(
    "Gumbel of the minimum", log_below, lambda x: x - torch.exp(x) - log_below(x), lambda t: torch.log(-torch.log1p(-t)),
    GUMBEL.draw, -GUMBEL.mean, GUMBEL.variance, left=-40, right=6, step=lambda n: 0.14 / max(1.0, math.log(n) / 2),
)


@pytest.mark.parametrize("noise", (GUMBEL, NORMAL, LOGISTIC, MIRRORED), ids=lambda noise: noise.name)
@pytest.mark.parametrize("n", [2, 10, 64, 65, 300])
def test_interpolants_equal_the_rule_with_their_gradients(noise, n):
    for spread in (0.1, 1.0, 3.0, 7.0, 20.0):
        wide = random(3, n)
        wide = spread * (wide - wide.amin(1, keepdim=True)) / (wide.amax(1, keepdim=True) - wide.amin(1, keepdim=True))
        tied = spread / 2 * torch.randint(3, (3, n), generator=torch.Generator().manual_seed(0)).double()
        lone = 0.05 * random(2, n, seed=1)
        lone[:, 0] += spread * tensor(1, -1)
        mu = torch.cat([wide, tied, lone, torch.zeros(1, n)]).repeat(1 if n >= 64 else 30, 1).requires_grad_()
        fast, slow = choice._grouped(mu, noise, noise.step(n)), choice._exact(mu, noise, noise.step(n))
        allowed = 1e-11 if n >= 64 else 1e-13 * slow.detach().abs().clamp(min=1)
        assert bool(((fast - slow).detach().abs() <= allowed).all())
        up = random(*mu.shape, seed=2) / n
        fast_grad, slow_grad = (torch.autograd.grad((x * up).sum(), mu)[0] for x in (fast, slow))
        torch.testing.assert_close(fast_grad, slow_grad, rtol=1e-9, atol=1e-10)
        if noise is GUMBEL:
            torch.testing.assert_close(fast, mu.log_softmax(-1), rtol=0, atol=1e-11)
        if n == 300:
            torch.testing.assert_close(perturbed_log_prob(mu.float(), noise), slow.float(), rtol=1e-5, atol=4e-6)


@smooth_noise
def test_interpolants_have_second_derivatives_and_give_way_in_the_tails(noise):
    mu = random(30, 12).requires_grad_()
    assert choice._interpolated(mu, noise, noise.step(12), 4.0) is not None
    values = (perturbed_log_prob(mu, noise), choice._log_prob(mu, noise, noise.step(12)))
    seconds = []
    for value in values:
        (first,) = torch.autograd.grad((value * random(30, 12, seed=1)).sum(), mu, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), mu)[0])
    torch.testing.assert_close(*seconds, rtol=1e-9, atol=1e-9)
    far = torch.cat([random(600), tensor(-60.0)])
    assert float(perturbed_log_prob(far, noise).logsumexp(0)) == pytest.approx(0, abs=1e-12)
    with torch.inference_mode():
        inferred = perturbed_log_prob(random(9, 100), noise)
    torch.testing.assert_close(inferred, perturbed_log_prob(random(9, 100).requires_grad_(), noise).detach(), rtol=0, atol=0)


@every_noise
def test_chunks_of_rows_change_nothing(noise, monkeypatch):
    mu = random(11, 4).requires_grad_()
    whole = perturbed_log_prob(mu, noise)
    monkeypatch.setattr(choice, "_ENTRIES", 3 * choice._count(mu, noise, noise.step(4)) * 4)
    parts = perturbed_log_prob(mu, noise)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-13)
    ok = whole.isfinite()
    grads = [torch.autograd.grad(x[ok].square().sum(), mu)[0] for x in (parts, whole)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------- derivatives


@every_noise
def test_derivatives_potential_and_loss(noise):
    mu = tensor(0.3, -0.2, 0.55, 0.1)  # all within reach of each other
    assert gradcheck(lambda m: perturbed_log_prob(m, noise), mu.requires_grad_())
    assert gradcheck(lambda m: expected_max(m, noise, scale=0.7), mu)
    assert gradgradcheck(lambda m: expected_max(m, noise), mu)
    target = torch.tensor(3)
    (grad,) = torch.autograd.grad(fenchel_young_loss(mu, target, noise), mu)
    p = perturbed_log_prob(mu, noise).exp()
    torch.testing.assert_close(grad, p - torch.eye(4, dtype=F64)[3])
    J = torch.autograd.functional.jacobian(lambda m: perturbed_log_prob(m, noise).exp(), mu)
    torch.testing.assert_close(J, J.T, rtol=0, atol=1e-11)
    assert float(J.sum(1).abs().max()) < 1e-11 and float(torch.linalg.eigvalsh(J).min()) > -1e-11
    assert bool((J - torch.diag(J.diag()) <= 1e-12).all())


@every_noise
def test_gradients_where_scores_are_equal(noise):
    mu = tensor(0.3, 0.3, 0.1, 0.3).requires_grad_()
    (grad,) = torch.autograd.grad(perturbed_log_prob(mu, noise)[2], mu)
    step = 1e-5 * torch.eye(4, dtype=F64)
    ends = [perturbed_log_prob(mu.detach() + s * step, noise)[:, 2] for s in (1, -1)]
    assert grad.tolist() == pytest.approx(((ends[0] - ends[1]) / 2e-5).tolist(), abs=1e-4)


@every_noise
def test_expected_maximum_of_equal_scores_is_that_of_order_statistics(noise):
    n, peer = 5, PEERS[noise.name]
    exact = integrate.quad(lambda t: n * peer.ppf(t) * t ** (n - 1), 0, 1, epsabs=1e-12, limit=500)[0]
    assert expected_max(torch.zeros(n, dtype=F64), noise).item() == pytest.approx(exact, abs=1e-9)
    alone = expected_max(tensor(2.5), noise, scale=3.0).item()
    assert alone == pytest.approx(2.5 + 3 * noise.mean, abs=1e-12)


def test_fenchel_young_loss_of_gumbel_noise_is_cross_entropy():
    mu, target = random(6, 5).requires_grad_(), torch.tensor([0, 1, 2, 3, 4, 0])
    ours = fenchel_young_loss(mu, target, GUMBEL)
    torch.testing.assert_close(ours, cross_entropy(mu, target), rtol=0, atol=1e-13)
    for kind in ("none", "sum"):
        ours = fenchel_young_loss(mu, target, GUMBEL, reduction=kind)
        torch.testing.assert_close(ours, cross_entropy(mu, target, reduction=kind))
    half = fenchel_young_loss(mu, target, GUMBEL, scale=0.5)
    torch.testing.assert_close(half, 0.5 * cross_entropy(2 * mu, target))


def test_fenchel_young_loss_of_bounded_noise_pulls_where_the_log_is_dead():
    mu = tensor(0, 9).requires_grad_()
    loss = fenchel_young_loss(mu[None], torch.tensor([0]), UNIFORM)
    assert loss.item() == pytest.approx(9)
    assert torch.autograd.grad(loss, mu)[0].tolist() == [-1, 1]


# ------------------------------------------------------------------------------------------ samples


@every_noise
def test_samples_follow_the_probabilities(noise):
    mu = tensor(0.9, 0.3, -0.1, 1.1)
    draws = sample_argmax(mu.expand(2, 4), noise, 20_000, scale=1.5, generator=torch.Generator().manual_seed(0))
    assert draws.shape == (20_000, 2) and draws.dtype == torch.int64
    p = perturbed_log_prob(mu, noise, scale=1.5).exp()
    counts = torch.bincount(draws.flatten(), minlength=4)
    assert stats.chisquare(counts, 40_000 * p / p.sum()).pvalue > 1e-4
    again = sample_argmax(mu.expand(2, 4), noise, 20_000, scale=1.5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draws, again)
    assert sample_argmax(mu.half(), noise, 3).shape == (3,)


# ------------------------------------------------------------------------------------------ extremes


@every_noise
def test_extreme_scores_give_right_values_and_finite_gradients(noise):
    mu = tensor(1e4, -1e4).requires_grad_()
    log_p = perturbed_log_prob(mu, noise)
    d = tensor(2e4)
    exact = -math.inf if noise is UNIFORM else float(pair(noise, d)[0])
    assert log_p.tolist() == pytest.approx([0, exact], rel=1e-12, abs=1e-12)
    if noise is not UNIFORM:
        (grad,) = torch.autograd.grad(log_p[1], mu)
        (slope,) = torch.autograd.grad(pair(noise, d.requires_grad_()).sum(), d)
        assert grad.tolist() == pytest.approx([float(slope), -float(slope)], rel=2e-8)  # eps d^2
    loss = fenchel_young_loss(mu, torch.tensor(1), noise)
    assert loss.item() == pytest.approx(2e4, rel=1e-12)
    assert torch.autograd.grad(loss, mu)[0].tolist() == pytest.approx([1, -1])


@every_noise
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes_and_empty_batches(noise, dtype):
    mu = torch.tensor([[0.5, 0.25, -0.5]], dtype=dtype)
    p = perturbed_log_prob(mu, noise)
    assert p.dtype == dtype
    assert p.float().exp().sum().item() == pytest.approx(1, abs=2e-6 if dtype == torch.float32 else 1e-2)
    assert expected_max(mu, noise).dtype == dtype
    assert perturbed_log_prob(mu[:0], noise).shape == (0, 3)
    assert perturbed_log_prob(torch.zeros(0, 200), noise).shape == (0, 200)


# ----------------------------------------------------------------------------------------- bad input

M, T = torch.zeros(2, 3), torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: perturbed_log_prob([0.0], NORMAL), TypeError, r"mu should be a torch tensor"),
        (lambda: perturbed_log_prob(T, NORMAL), TypeError, r"mu should have a floating dtype, got torch.int64"),
        (lambda: perturbed_log_prob(torch.tensor(0.0), NORMAL), ValueError, r"mu: expected shape"),
        (lambda: perturbed_log_prob(M[:, :0], NORMAL), ValueError, r"mu should have at least one class, got shape \(2, 0\)"),
        (lambda: perturbed_log_prob(M * math.nan, NORMAL), ValueError, r"mu has 6 non-finite entries"),
        (lambda: perturbed_log_prob(M, "normal"), TypeError, r"noise should be a Noise such as GUMBEL, NORMAL, .* got str"),
        (lambda: perturbed_log_prob(M, NORMAL, scale=0.0), ValueError, r"scale should be a number in \(0.0, inf\), got 0.0"),
        (lambda: perturbed_log_prob(M, NORMAL, scale=-1.0), ValueError, r"scale should be"),
        (lambda: perturbed_log_prob(M, NORMAL, step=0.0), ValueError, r"step should be a number in \(0.0, inf\), got 0.0"),
        (lambda: perturbed_log_prob(M, LAPLACE, step=0.1), ValueError, r"step should be None for Laplace noise"),
        (lambda: expected_max(M, NORMAL, scale=math.nan), ValueError, r"scale should be"),
        (lambda: sample_argmax(M, NORMAL, 0), ValueError, r"draws should be an integer >= 1, got 0"),
        (lambda: sample_argmax(M, NORMAL, 5, scale=0), ValueError, r"scale should be"),
        (lambda: fenchel_young_loss(M, T[:1], NORMAL), ValueError, r"target: expected shape \(2\), got \(1,\)"),
        (lambda: fenchel_young_loss(M, T.float(), NORMAL), TypeError, r"target should be int64"),
        (lambda: fenchel_young_loss(M, T + 1, NORMAL), ValueError, r"target should be in \[0, 2\], got 3"),
        (lambda: fenchel_young_loss(M, T - 1, NORMAL), ValueError, r"target should be in \[0, 2\], got -1"),
        (lambda: fenchel_young_loss(M[:0], T[:0], NORMAL), ValueError, r"target should have at least one sample"),
        (lambda: fenchel_young_loss(M, T, NORMAL, reduction="max"), ValueError, r"reduction should be one of"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@every_noise
def test_scores_far_apart_in_single_precision_have_the_gradients_of_double(noise):
    mu = tensor(1e4, -1e4, 0.0, 3.0)
    grads = []
    for dtype in (torch.float32, torch.float64):
        x = mu.to(dtype).requires_grad_()
        log_p = perturbed_log_prob(x, noise)
        seen = log_p[log_p.detach() > -math.inf].sum() + fenchel_young_loss(x, torch.tensor(1), noise)
        grads.append(torch.autograd.grad(seen, x)[0].double())
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("noise", (NORMAL, LAPLACE), ids=lambda noise: noise.name)
def test_nodes_that_do_not_fit_in_memory_are_taken_in_pieces(noise, monkeypatch):
    def run() -> tuple[torch.Tensor, ...]:
        mu = (30 * random(2, 20)).requires_grad_()
        log_p, potential = perturbed_log_prob(mu, noise), expected_max(mu, noise)
        return log_p.detach(), potential.detach(), *torch.autograd.grad(log_p.sum() + potential.sum(), mu)

    whole = run()
    monkeypatch.setattr(choice, "_ENTRIES", 500)
    torch.testing.assert_close(run(), whole, rtol=1e-12, atol=1e-12)
