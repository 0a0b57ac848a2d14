"""Races between kexue and a peer in one process: alternating runs, medians, ratios."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from timeit import timeit
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One race: seconds per call of ours and of the peer's (lower is better), and what the row shows."""

    task: str
    peer: str
    ours_s: float
    peer_s: float
    note: str = ""

    @property
    def ratio(self) -> float:
        """Peer's time over ours: above 1 we are faster."""
        return self.peer_s / self.ours_s


def race(
    task: str, ours: Callable[[], Any], peer: Callable[[], Any], peer_name: str, *, repeats: int = 7, note: str = ""
) -> Row:
    """Run both once to warm up, then alternately `repeats` times, and keep the medians; `timeit` stops garbage collection."""
    ours(), peer()
    times = [(timeit(ours, number=1), timeit(peer, number=1)) for _ in range(repeats)]
    return Row(task, peer_name, *map(median, zip(*times, strict=True)), note)


def print_rows(topic: str, threads: int) -> None:
    """Run the races of one topic module and print its rows; in a fresh process, which no other topic has left its mark on."""
    torch.set_num_threads(threads)
    for row in importlib.import_module(f"benchmarks.{topic}").rows():
        times = f"{row.ours_s:.3g} s | {row.peer_s:.3g} s | {row.ratio:.2f}"
        print(f"| {row.task} | {row.peer} | {times} | {row.note} |", flush=True)
