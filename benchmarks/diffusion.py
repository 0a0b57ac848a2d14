"""Sampling 1,000 digits: against the same network in a bare loop, and against the loops of diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler

from benchmarks.common import Row, race
from kexue.diffusion import DenoisingMLP, Schedule, ddim_sample, sample

T, SIZE = 200, (1000, 24)


def rows() -> Iterator[Row]:
    torch.manual_seed(0)
    schedule = Schedule(T)
    model = DenoisingMLP(SIZE[1], schedule).eval()
    start = torch.randn(SIZE)
    betas = (schedule.beta**2).numpy()
    options = {"num_train_timesteps": T, "trained_betas": betas, "clip_sample": False}
    ddpm: Any = DDPMScheduler(variance_type="fixed_large", **options)
    ddim: Any = DDIMScheduler(set_alpha_to_one=True, **options)
    ddim.set_timesteps(T)

    @torch.no_grad()
    def bare() -> torch.Tensor:
        x = start
        for t in range(T - 1, -1, -1):
            x = model(x, torch.full((len(x),), t))
        return x

    @torch.no_grad()
    def loop(scheduler: Any) -> torch.Tensor:
        x, noise = start, torch.Generator().manual_seed(0)
        for t in scheduler.timesteps:
            more = {"generator": noise} if scheduler is ddpm else {}
            x = scheduler.step(model(x, t.expand(len(x))), t, x, **more).prev_sample
        return x

    def ours() -> torch.Tensor:
        return sample(model, SIZE, schedule, start=start, generator=torch.Generator().manual_seed(0))

    def flow() -> torch.Tensor:
        return ddim_sample(model, SIZE, schedule, start=start)

    pairs: list[tuple[Callable[[], torch.Tensor], Any]] = [(ours, ddpm), (flow, ddim)]
    for draw, scheduler in pairs:
        torch.testing.assert_close(draw(), loop(scheduler), rtol=1e-3, atol=1e-3)
    what = f"{SIZE[0]} digits in {T} steps"
    yield race(f"sample, {what}", ours, bare, "the network in a bare loop", note="what sampling costs beside it")
    yield race(f"sample, {what}", ours, lambda: loop(ddpm), "diffusers.DDPMScheduler", note="identical samples")
    yield race(f"ddim_sample, {what}", flow, lambda: loop(ddim), "diffusers.DDIMScheduler", note="identical samples")
