"""Diffusion against diffusers' schedulers, closed-form Gaussians, automatic differentiation and brute force."""

import math
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.diffusion import (
    DenoisingMLP,
    EmpiricalDenoiser,
    GaussianDenoiser,
    Schedule,
    ddim_sample,
    ddpm_loss,
    optimal_sigma,
    q_sample,
    sample,
    timestep_embedding,
)

T = 50
SCHEDULE = Schedule(T)
EMPIRICAL = EmpiricalDenoiser(torch.zeros(3, 2), SCHEDULE)
DOUBLE = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*size, seed=0):
    return torch.randn(size, generator=generator(seed), dtype=DOUBLE)


def curved(x, t):
    """A model without any symmetry."""
    return torch.tanh(x.flip(-1) + 0.1 * x**2) + t.to(x).view(-1, *[1] * (x.ndim - 1)) / 40


def peer(kind, **options):
    """The scheduler of diffusers with our betas."""
    return kind(
        num_train_timesteps=T, trained_betas=(SCHEDULE.beta**2).numpy(), clip_sample=False, prediction_type="epsilon", **options
    )


# ------------------------------------------------------------------------------------------- schedule


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.floats(0.01, 0.99), st.sampled_from(["linear_sqrt", "ho_linear", "cosine"]))
def test_amplitudes_belong_together(steps, top, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        s = Schedule(steps, top, kind)
    for series in (s.alpha, s.beta, s.abar, s.bbar, s.abar_prev, s.bbar_prev, s.sigma_tilde):
        assert series.shape == (steps,) and series.dtype == DOUBLE
    torch.testing.assert_close(s.alpha**2 + s.beta**2, torch.ones(steps, dtype=DOUBLE), rtol=0, atol=1e-12)
    torch.testing.assert_close(s.abar**2 + s.bbar**2, torch.ones(steps, dtype=DOUBLE), rtol=0, atol=1e-12)
    torch.testing.assert_close(s.abar, s.alpha.cumprod(0))
    torch.testing.assert_close(s.abar_prev * s.alpha, s.abar)
    torch.testing.assert_close((s.alpha * s.bbar_prev) ** 2 + s.beta**2, s.bbar**2)
    assert s.abar_prev[0] == 1 and s.bbar_prev[0] == 0
    assert s.beta.max() ** 2 <= top * (1 + 1e-12)
    assert (s.sigma_tilde <= s.beta * (1 + 1e-12)).all()


def test_the_default_keeps_the_end_of_the_chain():
    for steps, left in ((100, 0.0044), (1000, 0.006482), (4000, 0.006673)):
        assert Schedule(steps).abar[-1].item() == pytest.approx(left, rel=1e-3)
    assert Schedule(1000).alpha[499].item() == math.sqrt(1 - 0.02 * 500 / 1000)


def test_ho_linear_and_cosine_are_those_of_diffusers():
    theirs = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    torch.testing.assert_close(Schedule(1000, kind="ho_linear").beta ** 2, theirs.betas.double(), rtol=1e-5, atol=0)
    assert Schedule(1000, kind="ho_linear").abar[-1].item() == pytest.approx(0.006353, rel=1e-3)
    torch.testing.assert_close(Schedule(T, kind="cosine").beta ** 2, betas_for_alpha_bar(T).double(), rtol=1e-4, atol=0)


def test_first_steps_keep_their_digits():
    s = Schedule(100_000)
    assert s.bbar[0].item() == pytest.approx(s.beta[0].item(), rel=1e-14)     # 1 - abar² would be off by 1e-8


def test_data_left_at_the_end_are_reported():
    with pytest.warns(UserWarning, match=r"keeps 0\.601 of the data .*\(now 2\)"):
        Schedule(100, 0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Schedule(100, 0.2)
    assert repr(Schedule(100, 0.2)) == "Schedule(T=100, beta2_max=0.2, kind='linear_sqrt')"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "T should be an integer >= 1"),
        ((10.0,), "T should be an integer"),
        ((15,), r"beta2_max should be in \(0, 1\), got 1.33.*; its default is 20/T"),
        ((50, 1.0), r"beta2_max should be in \(0, 1\), got 1.0$"),
        ((50, 0.0), "beta2_max should be a number"),
        ((50, float("nan")), "beta2_max should be a number"),
        ((50, 0.1, "quadratic"), "kind should be one of"),
    ],
)
def test_bad_schedules_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(*arguments)


# ----------------------------------------------------------------------------------- noising and loss


def test_q_sample_is_add_noise():
    x0, noise, t = normal(6, 3, 2), normal(6, 3, 2, seed=1), torch.tensor([0, 1, 10, 25, 48, 49])
    theirs = peer(DDPMScheduler).add_noise(x0, noise, t)
    torch.testing.assert_close(q_sample(x0, t, noise, SCHEDULE), theirs, rtol=0, atol=1e-6)
    single = q_sample(x0.float(), t, noise.float(), SCHEDULE)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, theirs.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("noises", ["one", "two"])
def test_the_model_sees_noised_data_at_its_own_step(noises):
    """x_t at a given t has mean abar x0 and variance bbar², whichever way it was made."""
    n, x0 = 40_000, torch.tensor([[3.0, -1.0]], dtype=DOUBLE)
    for t in (0, 5, T - 1):
        seen = []

        def model(x, steps, seen=seen):
            seen.append((x, steps))
            return torch.zeros_like(x)

        ddpm_loss(model, x0.expand(n, 2), SCHEDULE, noises=noises, t=torch.full((n,), t), generator=generator())
        x, steps = seen[0]
        assert (steps == t).all()
        spread = SCHEDULE.bbar[t]
        torch.testing.assert_close(x.mean(0), SCHEDULE.abar[t] * x0[0], rtol=0, atol=6 * spread.item() / n**0.5)
        torch.testing.assert_close(x.var(0), (spread**2).expand(2), rtol=6 * (2 / n) ** 0.5, atol=0)


def test_one_noise_loss_of_the_exact_model_is_zero_and_the_other_is_its_constant():
    n, d = 40_000, 3
    x0 = torch.tensor([[1.0, 2.0, -1.0]], dtype=DOUBLE)
    exact = EmpiricalDenoiser(x0, SCHEDULE)
    for t in (0, 3, T - 1):
        steps = torch.full((n,), t)
        one = ddpm_loss(exact, x0.expand(n, d), SCHEDULE, t=steps, reduction="none", generator=generator())
        two = ddpm_loss(exact, x0.expand(n, d), SCHEDULE, noises="two", t=steps, reduction="none", generator=generator())
        ratio = (SCHEDULE.bbar[t] / SCHEDULE.beta[t]).item() ** 2 - 1
        assert one.max() < 1e-20
        assert two.mean().item() == pytest.approx(d * ratio, abs=6 * ratio * math.sqrt(2 * d / n) + 1e-12)


def test_reductions_belong_together():
    x0 = normal(16, 2, 3)
    losses = {r: ddpm_loss(curved, x0, SCHEDULE, reduction=r, generator=generator(4)) for r in ("none", "sum", "mean")}
    assert losses["none"].shape == (16,)
    torch.testing.assert_close(losses["none"].mean(), losses["sum"])
    torch.testing.assert_close(losses["sum"] / 6, losses["mean"])


def test_loss_by_hand_and_steps_drawn_uniformly():
    x0, t = normal(2, 3), torch.tensor([7, 31])
    noise = torch.randn(2, 3, generator=generator(5), dtype=DOUBLE)
    by_hand = []
    for row in range(2):
        k = int(t[row])
        x = SCHEDULE.abar[k] * x0[row] + SCHEDULE.bbar[k] * noise[row]
        by_hand.append(sum((noise[row] - curved(x[None], t[row : row + 1])[0]) ** 2))
    loss = ddpm_loss(curved, x0, SCHEDULE, t=t, reduction="none", generator=generator(5))
    torch.testing.assert_close(loss, torch.stack(by_hand))
    drawn = []
    ddpm_loss(lambda x, t: drawn.append(t) or x, torch.zeros(50_000, 1), SCHEDULE, generator=generator())
    counts = torch.bincount(drawn[0], minlength=T).double()
    assert len(counts) == T and ((counts - 1000).abs() < 6 * 1000**0.5).all()


def test_loss_has_a_gradient_and_is_repeatable():
    torch.manual_seed(0)
    net = DenoisingMLP(4, SCHEDULE, width=8)
    x0 = normal(8, 4).float()
    loss = ddpm_loss(net, x0, SCHEDULE, generator=generator(1))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert loss.item() == ddpm_loss(net, x0, SCHEDULE, generator=generator(1)).item()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: q_sample(torch.zeros(2, 3), torch.tensor([0, T]), torch.zeros(2, 3), SCHEDULE), r"t should lie in 0 … T-1 = 49"),
        (lambda: q_sample(torch.zeros(2, 3), torch.tensor([-1, 0]), torch.zeros(2, 3), SCHEDULE), "got values from -1 to 0"),
        (lambda: q_sample(torch.zeros(2, 3), torch.tensor([0]), torch.zeros(2, 3), SCHEDULE), r"t: expected shape \(B=2\)"),
        (lambda: q_sample(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 3), SCHEDULE), "t should have an integer dtype"),
        (lambda: q_sample(torch.zeros(2, 3), torch.tensor([0, 1]), torch.zeros(2, 1), SCHEDULE), "noise: expected shape"),
        (lambda: q_sample(torch.zeros(2, 3), torch.tensor([0, 1]), normal(2, 3), SCHEDULE), "expected the same"),
        (lambda: q_sample(torch.tensor(1.0), torch.tensor([0]), torch.tensor(1.0), SCHEDULE), "x: expected shape"),
        (lambda: ddpm_loss(curved, torch.zeros(2, 3, dtype=torch.long), SCHEDULE), "floating dtype"),
        (lambda: ddpm_loss(curved, torch.zeros(2, 3), SCHEDULE, noises="three"), "noises should be one of 'one', 'two'"),
        (lambda: ddpm_loss(curved, torch.zeros(2, 3), SCHEDULE, reduction="max"), "reduction should be one of"),
        (lambda: ddpm_loss(lambda x, t: x[:, :1], torch.zeros(2, 3), SCHEDULE), r"shape of x, \(2, 3\), got \(2, 1\)"),
        (lambda: ddpm_loss(lambda x, t: None, torch.zeros(2, 3), SCHEDULE), "got NoneType"),
    ],
)
def test_bad_noising_is_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


# ------------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize(("sigma", "variance"), [("beta", "fixed_large"), ("tilde", "fixed_small")])
def test_sample_is_the_loop_of_diffusers(sigma, variance):
    scheduler = peer(DDPMScheduler, variance_type=variance)
    x = start = normal(5, 2, 3)
    noise = generator(7)
    for t in scheduler.timesteps:
        x = scheduler.step(curved(x, t.expand(5)), t, x, generator=noise).prev_sample
    ours = sample(curved, (5, 2, 3), SCHEDULE, sigma=sigma, start=start, generator=generator(7))
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)     # theirs has float32 coefficients


@pytest.mark.parametrize("steps", [None, 1, 2, 7, 25, 50])
def test_ddim_is_the_loop_of_diffusers(steps):
    scheduler = peer(DDIMScheduler, timestep_spacing="trailing", set_alpha_to_one=True)
    scheduler.set_timesteps(steps or T)
    x = start = normal(5, 3)
    for t in scheduler.timesteps:
        prev = scheduler.timesteps[scheduler.timesteps < t].max().item() if (scheduler.timesteps < t).any() else -1
        if prev != t - T // (steps or T):       # their step length is rounded down when T is not divisible
            x = _ddim_by_hand(x, int(t), prev)
        else:
            x = scheduler.step(curved(x, t.expand(5)), int(t), x, eta=0.0).prev_sample
    torch.testing.assert_close(ddim_sample(curved, (5, 3), SCHEDULE, steps=steps, start=start), x, rtol=1e-4, atol=1e-4)


def _ddim_by_hand(x, t, prev):
    eps = curved(x, torch.full((len(x),), t))
    clean = (x - SCHEDULE.bbar[t] * eps) / SCHEDULE.abar[t]
    return clean if prev < 0 else SCHEDULE.abar[prev] * clean + SCHEDULE.bbar[prev] * eps


def test_sigma_may_be_a_tensor_and_the_last_step_is_silent():
    start, size = normal(4, 2), (4, 2)
    beta = sample(curved, size, SCHEDULE, start=start, generator=generator(1))
    assert torch.equal(sample(curved, size, SCHEDULE, sigma=SCHEDULE.beta, start=start, generator=generator(1)), beta)
    loud = SCHEDULE.beta.clone()
    loud[0] = 100.0
    assert torch.equal(sample(curved, size, SCHEDULE, sigma=loud, start=start, generator=generator(1)), beta)
    silent = sample(curved, size, SCHEDULE, sigma=torch.zeros(T), start=start)
    assert torch.equal(sample(curved, size, SCHEDULE, sigma="zero", start=start), silent)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.0, 9.0), st.floats(-3, 3), st.floats(-3, 3))
def test_greedy_sampling_of_a_gaussian_shrinks_every_start_by_the_closed_form(var, mean, start):
    model = GaussianDenoiser(torch.tensor([mean], dtype=DOUBLE), torch.tensor([var], dtype=DOUBLE), SCHEDULE)
    x = sample(model, (1, 1), SCHEDULE, sigma="zero", start=torch.tensor([[start]], dtype=DOUBLE))
    a = SCHEDULE.abar[-1].item()
    v = a**2 * var + 1 - a**2
    assert x.item() == pytest.approx(mean + a * var / v * (start - a * mean), rel=1e-9, abs=1e-12)


def test_samplers_of_a_gaussian_have_the_variance_of_the_recursion():
    n, var = 100_000, 0.25
    model = GaussianDenoiser(torch.tensor([1.0], dtype=DOUBLE), torch.tensor([var], dtype=DOUBLE), SCHEDULE)
    best = optimal_sigma(SCHEDULE, model.mse())
    for sigma, values in (("beta", SCHEDULE.beta), ("tilde", SCHEDULE.sigma_tilde), (best, best)):
        x = sample(model, (n, 1), SCHEDULE, sigma=sigma, generator=generator(), dtype=DOUBLE)
        v = 1.0
        for t in range(T - 1, -1, -1):
            now, before = (a**2 * var + b**2 for a, b in
                           ((SCHEDULE.abar[t], SCHEDULE.bbar[t]), (SCHEDULE.abar_prev[t], SCHEDULE.bbar_prev[t])))
            v = (SCHEDULE.alpha[t] * before / now) ** 2 * v + (values[t] ** 2 if t else 0)
        assert x.var().item() == pytest.approx(float(v), rel=6 * (2 / n) ** 0.5)
        assert x.mean().item() == pytest.approx(1.0, abs=6 * (float(v) / n) ** 0.5 + 1e-4)


def test_ddim_approaches_the_flow_of_a_gaussian_as_one_over_T():
    mean, var, start = 1.0, 0.25, torch.tensor([[1.5]], dtype=DOUBLE)
    errors = []
    for steps in (100, 200, 400):
        s = Schedule(steps)
        model = GaussianDenoiser(torch.tensor([mean], dtype=DOUBLE), torch.tensor([var], dtype=DOUBLE), s)
        flow = mean + math.sqrt(var) * (start - s.abar[-1] * mean) / (s.abar[-1] ** 2 * var + s.bbar[-1] ** 2).sqrt()
        errors.append((ddim_sample(model, (1, 1), s, start=start) - flow).abs().item())
    assert errors[0] < 0.03
    slope = np.polyfit(np.log([100, 200, 400]), np.log(errors), 1)[0]
    assert -1.1 < slope < -0.75


@pytest.mark.parametrize("draw", [sample, ddim_sample])
def test_a_single_data_point_is_returned_from_any_start(draw):
    point = torch.tensor([[2.0, -1.0, 0.5]], dtype=DOUBLE)
    x = draw(EmpiricalDenoiser(point, SCHEDULE), (20, 3), SCHEDULE, generator=generator(), dtype=DOUBLE)
    torch.testing.assert_close(x, point.expand(20, 3), rtol=0, atol=1e-9)


@pytest.mark.parametrize("draw", [sample, ddim_sample])
def test_samplers_leave_the_start_alone_and_record_no_gradient(draw):
    start = normal(3, 4).float()
    kept = start.clone()
    net = DenoisingMLP(4, SCHEDULE, width=8)
    x = draw(net, (3, 4), SCHEDULE, start=start, generator=generator(2))
    assert torch.equal(start, kept) and not x.requires_grad and x.dtype == torch.float32
    assert torch.equal(draw(net, (3, 4), SCHEDULE, start=start, generator=generator(2), show_progress=True), x)
    drawn = draw(net, (3, 4), SCHEDULE, generator=generator(3))
    first = torch.randn(3, 4, generator=(g := generator(3)))
    assert torch.equal(draw(net, (3, 4), SCHEDULE, start=first, generator=g), drawn)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample(curved, (2, 3), SCHEDULE, sigma="large"), "sigma should be one of 'beta', 'tilde', 'zero', got 'large'"),
        (lambda: sample(curved, (2, 3), SCHEDULE, sigma=torch.zeros(3)), r"sigma: expected shape \(T=50\), got \(3,\)"),
        (lambda: sample(curved, (2, 3), SCHEDULE, sigma=-SCHEDULE.beta), "sigma should be >= 0"),
        (lambda: sample(curved, (2, 3), SCHEDULE, sigma=SCHEDULE.beta * float("nan")), "sigma has 50 non-finite"),
        (lambda: sample(curved, (2, 3), SCHEDULE, start=torch.zeros(2, 4)), r"start: expected shape \(2, 3\), got \(2, 4\)"),
        (lambda: sample(curved, (2, 3), SCHEDULE, start=torch.zeros(2, 3, dtype=torch.long)), "start should have a floating"),
        (lambda: sample(lambda x, t: x * float("nan"), (2, 3), SCHEDULE), "samples has 6 non-finite"),
        (lambda: sample(lambda x, t: x[0], (2, 3), SCHEDULE), "should return the shape of x"),
        (lambda: ddim_sample(lambda x, t: x[0], (2, 3), SCHEDULE), "should return the shape of x"),
        (lambda: ddim_sample(curved, (2, 3), SCHEDULE, steps=0), r"steps should be an integer in \[1, 50\]"),
        (lambda: ddim_sample(curved, (2, 3), SCHEDULE, steps=51), r"steps should be an integer in \[1, 50\]"),
        (lambda: ddim_sample(lambda x, t: x / 0, (2, 3), SCHEDULE), "samples has 6 non-finite"),
        (lambda: optimal_sigma(SCHEDULE, torch.zeros(3)), r"mse: expected shape \(T=50\)"),
        (lambda: optimal_sigma(SCHEDULE, torch.full((T,), -1.0)), "mse should be >= 0"),
        (lambda: optimal_sigma(SCHEDULE, torch.full((T,), float("inf"))), "mse has 50 non-finite"),
        (lambda: optimal_sigma(SCHEDULE, torch.ones(T, dtype=torch.long)), "mse should have a floating dtype"),
    ],
)
def test_bad_sampling_is_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


# --------------------------------------------------------------------------------------- exact models


def test_gaussian_denoiser_is_the_score():
    mean, var = normal(3), normal(3, seed=1) ** 2
    t = torch.tensor([0, 9, T - 1])
    x = normal(3, 3, seed=2).requires_grad_()
    a, b = SCHEDULE.abar[t, None], SCHEDULE.bbar[t, None]
    law = torch.distributions.Normal(a * mean, (a**2 * var + b**2).sqrt())
    score = torch.autograd.grad(law.log_prob(x).sum(), x)[0]
    torch.testing.assert_close(GaussianDenoiser(mean, var, SCHEDULE)(x.detach(), t), -b * score)


def test_gaussian_error_is_what_the_loss_measures():
    model = GaussianDenoiser(torch.zeros(2, dtype=DOUBLE), torch.tensor([0.25, 4.0], dtype=DOUBLE), SCHEDULE)
    n = 100_000
    x0 = normal(n, 2) * model.var.sqrt()
    for t in (0, 10, T - 1):
        loss = ddpm_loss(model, x0, SCHEDULE, t=torch.full((n,), t), reduction="none", generator=generator(3)) / 2
        assert loss.mean().item() == pytest.approx(model.mse()[t].item(), abs=6 * loss.std().item() / n**0.5)


def test_empirical_denoiser_is_the_score_of_a_mixture_and_a_brute_force_mean():
    data, t = normal(9, 2, 2), torch.tensor([0, 5, 20, T - 1])
    x = (0.3 * normal(4, 2, 2, seed=3)).requires_grad_()
    model = EmpiricalDenoiser(data, SCHEDULE)
    for row, k in enumerate(t.tolist()):
        a, b = SCHEDULE.abar[k], SCHEDULE.bbar[k]
        parts = torch.distributions.Independent(torch.distributions.Normal(a * data, b), 2)
        log_p = parts.log_prob(x[row]).logsumexp(0)
        score = torch.autograd.grad(log_p, x)[0][row]
        torch.testing.assert_close(model(x.detach(), t)[row], -b * score)
        weights = parts.log_prob(x[row].detach()).softmax(0)
        torch.testing.assert_close(model.x0(x.detach(), t)[row], sum(w * p for w, p in zip(weights, data, strict=True)))


def test_empirical_denoiser_minimises_the_loss_on_its_data():
    data = normal(6, 3)
    model = EmpiricalDenoiser(data, SCHEDULE)
    items, t = data.repeat(3000, 1), torch.full((18_000,), 8)

    def loss(change):
        return ddpm_loss(lambda x, t: model(x, t) + change(x), items, SCHEDULE, t=t, generator=generator(1)).item()

    best = loss(lambda x: 0)
    for change in (lambda x: 0.05, lambda x: 0.05 * x, lambda x: -0.05 * x, lambda x: 0.05 * x.sin(), lambda x: -0.05 * x.sin()):
        assert loss(change) > best


def test_empirical_denoiser_in_float32_agrees_with_float64_at_every_step():
    data, t = normal(200, 24), torch.arange(T)
    x = q_sample(data[:T], t, normal(T, 24, seed=1), SCHEDULE)
    double = EmpiricalDenoiser(data, SCHEDULE)(x, t)
    single = EmpiricalDenoiser(data.float(), SCHEDULE)(x.float(), t)
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-3)


def test_perfect_denoising_returns_training_points():
    data, fine = normal(50, 5), Schedule(400)
    x = sample(EmpiricalDenoiser(data, fine), (40, 5), fine, generator=generator(), dtype=DOUBLE)
    nearest = torch.cdist(x, data).argmin(1)
    torch.testing.assert_close(x, data[nearest], rtol=0, atol=1e-6)
    assert len(nearest.unique()) > 20


def test_optimal_sigma_is_the_conditional_deviation():
    for var in (0.01, 0.25, 4.0):
        model = GaussianDenoiser(torch.zeros(1), torch.tensor([var]), SCHEDULE)
        before = SCHEDULE.abar_prev**2 * var + SCHEDULE.bbar_prev**2
        now = SCHEDULE.abar**2 * var + SCHEDULE.bbar**2
        schur = before - (SCHEDULE.alpha * before) ** 2 / now
        torch.testing.assert_close(optimal_sigma(SCHEDULE, model.mse()), schur.sqrt(), rtol=1e-6, atol=1e-12)
    ends = [optimal_sigma(SCHEDULE, GaussianDenoiser(torch.zeros(1), torch.tensor([v]), SCHEDULE).mse()) for v in (0.0, 1.0)]
    torch.testing.assert_close(ends[0], SCHEDULE.sigma_tilde)
    torch.testing.assert_close(ends[1], SCHEDULE.beta)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GaussianDenoiser(torch.zeros(2), -torch.ones(2), SCHEDULE), "var should be >= 0"),
        (lambda: GaussianDenoiser(torch.full((2,), float("inf")), torch.ones(2), SCHEDULE), "mean has 2 non-finite"),
        (lambda: GaussianDenoiser(torch.zeros(2), torch.ones(2, dtype=DOUBLE), SCHEDULE), "expected the same"),
        (lambda: EmpiricalDenoiser(torch.zeros(0, 2), SCHEDULE), r"data: expected shape \(n, ...\) with n >= 1"),
        (lambda: EmpiricalDenoiser(torch.zeros(3), SCHEDULE), r"data: expected shape \(n, ...\)"),
        (lambda: EMPIRICAL(torch.zeros(1, 4), torch.tensor([0])), r"x: expected features \(2,\)"),
        (lambda: EMPIRICAL(torch.zeros(1, 2), torch.tensor([T])), "t should lie in"),
    ],
)
def test_bad_exact_models_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


# ---------------------------------------------------------------------------------------- the network


def test_timestep_embedding_is_that_of_diffusers():
    t = torch.tensor([0, 1, 17, 999])
    for dim in (4, 64, 128):
        ours = timestep_embedding(t, dim)
        torch.testing.assert_close(ours, get_timestep_embedding(t, dim), rtol=0, atol=2e-4)
        assert ours.dtype == torch.float32 and ours.shape == (4, dim)
    fast = timestep_embedding(t.double(), 8, max_period=100)
    torch.testing.assert_close(fast, get_timestep_embedding(t, 8, max_period=100).double(), rtol=0, atol=2e-4)


def test_a_silent_network_is_the_exact_model_of_standard_normal_data():
    net = DenoisingMLP(6, SCHEDULE, width=16, blocks=3)
    assert len(net.layers) == 3 and net.layers[0].weight.shape == (16, 16)
    torch.nn.init.zeros_(net.out.weight)
    torch.nn.init.zeros_(net.out.bias)
    x, t = normal(T, 6).float(), torch.arange(T)
    exact = GaussianDenoiser(torch.zeros(6), torch.ones(6), SCHEDULE)
    torch.testing.assert_close(net(x, t), exact(x, t))
    net.skip = False
    assert (net(x, t) == 0).all()


def test_the_skip_is_v_prediction():
    torch.manual_seed(0)
    net = DenoisingMLP(6, SCHEDULE, width=16)
    x, t = normal(T, 6).float(), torch.arange(T)
    with_skip, net.skip = net(x, t), False
    torch.testing.assert_close(with_skip, SCHEDULE.bbar[:, None].float() * x + SCHEDULE.abar[:, None].float() * net(x, t))


def test_the_network_is_told_the_step_and_treats_rows_alone():
    torch.manual_seed(0)
    net = DenoisingMLP(6, SCHEDULE, width=16, skip=False)
    x, t = normal(1, 6).float().expand(T, 6), torch.arange(T)
    out = net(x, t)
    assert torch.pdist(out).min() > 1e-4
    torch.testing.assert_close(net(x[7:9], t[7:9]), out[7:9])
    assert not any("steps" in name or "bar" in name for name in net.state_dict())


def test_training_lowers_the_loss_below_the_linear_model():
    """Two points have a score that no linear model can express."""
    torch.manual_seed(0)
    points = torch.tensor([[-1.0], [1.0]])
    net, g = DenoisingMLP(1, SCHEDULE, width=32), generator()
    adam = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(300):
        adam.zero_grad()
        ddpm_loss(net, points.repeat(64, 1), SCHEDULE, generator=g).backward()
        adam.step()
    linear = GaussianDenoiser(torch.zeros(1), torch.ones(1), SCHEDULE)
    items = points.repeat(5000, 1)
    with torch.no_grad():
        trained, bound = (ddpm_loss(model, items, SCHEDULE, generator=generator(1)).item() for model in (net, linear))
    assert trained < 0.8 * bound


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DenoisingMLP(0, SCHEDULE), "d should be an integer >= 1"),
        (lambda: DenoisingMLP(3, SCHEDULE, blocks=0), "blocks should be an integer >= 1"),
        (lambda: DenoisingMLP(3, SCHEDULE)(torch.zeros(2, 4), torch.tensor([0, 1])), r"expected shape \(B, d=3\), got \(2, 4\)"),
        (lambda: DenoisingMLP(3, SCHEDULE)(torch.zeros(2, 3), torch.tensor([0, T])), "t should lie in 0"),
        (lambda: timestep_embedding(torch.zeros(2, 2), 8), r"t: expected shape \(B\)"),
        (lambda: timestep_embedding(torch.zeros(2), 7), "dim should be even"),
        (lambda: timestep_embedding(torch.zeros(2), 2), "dim should be an integer >= 4"),
        (lambda: timestep_embedding(torch.zeros(2), 8, max_period=1), "max_period should be a number"),
    ],
)
def test_bad_networks_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
