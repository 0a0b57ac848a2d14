"""Linear attention against torch's fused softmax attention: time, and the memory of the n D d_v form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Row, race
from kexue.attention import efficient_attention, elu1, linear_attention
from kexue.numerics import PeakMemory

HEADS, D = 8, 64


def by_cumsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The prefix sums of all n outer products at once: the form of the paper before its CUDA kernel."""
    f, g = elu1(q), elu1(k)
    S = (g.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(-3)
    return torch.einsum("...nd,...nde->...ne", f, S) / (f * g.cumsum(-2)).sum(-1, keepdim=True)


def _peak(run: Callable[..., Tensor], *tensors: Tensor, **options: bool) -> float:
    with PeakMemory() as memory:
        run(*tensors, **options)
    return memory.peak / 2**20


@torch.no_grad()
def rows() -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    for n in (256, 512, 1024, 2048, 4096, 8192):
        q, k, v = torch.randn(3, 1, HEADS, n, D, generator=generator).unbind()
        repeats = 15 if n <= 2048 else 5
        yield race(
            f"linear_attention causal, n = {n}",
            partial(linear_attention, q, k, v, causal=True), partial(F.scaled_dot_product_attention, q, k, v, is_causal=True),
            "torch SDPA causal", repeats=repeats,
            note=f"peak {_peak(linear_attention, q, k, v, causal=True):.1f} MiB, "
                 f"n D d_v would be {HEADS * n * D * D * 4 / 2**20:.0f} MiB",
        )
    q, k, v = torch.randn(3, 1, HEADS, 1024, D, generator=generator).unbind()
    yield race(
        "linear_attention causal, n = 1024", lambda: linear_attention(q, k, v, causal=True), lambda: by_cumsum(q, k, v),
        "cumsum of outer products", repeats=5,
        note=f"peak {_peak(linear_attention, q, k, v, causal=True):.1f} against {_peak(by_cumsum, q, k, v):.1f} MiB",
    )
    for name in ("cos", "taylor2"):
        yield race(
            f"linear_attention causal {name}, n = 1024", partial(linear_attention, q, k, v, name, causal=True),
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), "torch SDPA causal", repeats=5,
        )
    yield race(
        "efficient_attention, n = 1024", lambda: efficient_attention(q, k, v),
        lambda: F.scaled_dot_product_attention(q, k, v), "torch SDPA",
    )
    yield race(
        "efficient_attention causal, n = 1024", lambda: efficient_attention(q, k, v, causal=True),
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), "torch SDPA causal", note="one normaliser per feature",
    )
