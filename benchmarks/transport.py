"""Transport against POT: one problem, a batch of sentence pairs, and a pruned search, each with identical results."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import ot
import torch

from benchmarks.common import Row, race
from kexue.neighbors import nearest
from kexue.transport import emd, pad, relaxed_bound, wmd, wrd

WIDTH = 50


def rows() -> Iterator[Row]:
    gen = torch.Generator().manual_seed(0)
    for m, n in ((10, 12), (60, 60), (200, 200)):
        yield _single(m, n, gen)
    for low, high in ((5, 15), (15, 25), (25, 40)):
        yield from _pairs(low, high, gen)
    yield _search(gen)


def _cloud(m: int, gen: torch.Generator) -> torch.Tensor:
    return torch.randn(m, WIDTH, dtype=torch.float64, generator=gen)


def _uniform(m: int) -> torch.Tensor:
    return torch.full((m,), 1 / m, dtype=torch.float64)


def _single(m: int, n: int, gen: torch.Generator) -> Row:
    p, q, cost = _uniform(m), _uniform(n), torch.cdist(_cloud(m, gen), _cloud(n, gen))
    a, b, d = p.numpy(), q.numpy(), cost.numpy()
    assert abs(emd(p, q, cost).item() - ot.emd2(a, b, d)) < 1e-12
    calls = max(1, 20_000 // (m * n))
    return race(
        f"one exact transport, {m} x {n} (x {calls})",
        lambda: [emd(p, q, cost) for _ in range(calls)], lambda: [ot.emd2(a, b, d) for _ in range(calls)], "ot.emd2", repeats=15,
    )


def _pairs(low: int, high: int, gen: torch.Generator, count: int = 200) -> Iterator[Row]:
    lengths = torch.randint(low, high + 1, (2, count), generator=gen).tolist()
    xs, ys = ([_cloud(m, gen) for m in side] for side in lengths)
    left, right = [x.numpy() for x in xs], [y.numpy() for y in ys]

    def ours_wmd() -> torch.Tensor:
        (x, p), (y, q) = pad(xs), pad(ys)
        return wmd(x, y, p, q)

    def peer_wmd() -> list[float]:
        return [
            ot.emd2(np.full(len(x), 1 / len(x)), np.full(len(y), 1 / len(y)), ot.dist(x, y, "euclidean"))
            for x, y in zip(left, right, strict=True)
        ]

    def ours_wrd() -> torch.Tensor:
        return wrd(pad(xs)[0], pad(ys)[0])

    def peer_wrd() -> list[float]:
        results = []
        for x, y in zip(left, right, strict=True):
            a, b = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
            results.append(ot.emd2(a / a.sum(), b / b.sum(), 1 - (x / a[:, None]) @ (y / b[:, None]).T))
        return results

    for name, ours, peer in (("WMD", ours_wmd, peer_wmd), ("WRD", ours_wrd, peer_wrd)):
        assert np.allclose(ours().numpy(), peer(), rtol=0, atol=1e-9)
        task = f"{name} of {count} pairs, {low} to {high} words, d = {WIDTH}"
        yield race(task, ours, peer, "loop over ot.emd2", note="padding included")


def _search(gen: torch.Generator, count: int = 400, queries: int = 10, k: int = 5) -> Row:
    topics = 3 * torch.randn(30, WIDTH, dtype=torch.float64, generator=gen)

    def document() -> torch.Tensor:
        m = int(torch.randint(6, 16, (1,), generator=gen))
        about = torch.randint(30, (3,), generator=gen)[torch.randint(3, (m,), generator=gen)]
        return topics[about] + _cloud(m, gen)

    documents, asked = [document() for _ in range(count)], [document() for _ in range(queries)]
    y, q = pad(documents)
    spent = []

    def ours() -> list[list[int]]:
        found = []
        for x in asked:
            p = _uniform(len(x))
            cost = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
            found.append(nearest(
                lambda i, p=p, c=cost: emd(p, q[i], c[i]), count, k, bounds=[lambda i, p=p, c=cost: relaxed_bound(p, q[i], c[i])],
            ))
        spent[:] = [f.evaluations for f in found]
        return [f.indices.tolist() for f in found]

    def peer() -> list[list[int]]:
        return [
            np.argsort([
                ot.emd2(np.full(len(x), 1 / len(x)), np.full(len(d), 1 / len(d)), ot.dist(x.numpy(), d.numpy(), "euclidean"))
                for d in documents
            ])[:k].tolist()
            for x in asked
        ]

    assert ours() == peer()
    return race(
        f"{k} nearest of {count} documents, {queries} queries, d = {WIDTH}", ours, peer, "loop over ot.emd2", repeats=3,
        note=f"same neighbours; {sum(spent) / (queries * count):.1%} of the transports solved",
    )
