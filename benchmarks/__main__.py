"""Run the races: `python -m benchmarks [topic ...]`. Each topic module offers `rows()`; output is a table."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from pathlib import Path

import torch


def main() -> None:
    topics = sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name not in {"common", "__main__"})
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("topics", nargs="*", help=f"of {', '.join(topics)}; default all")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    arguments = parser.parse_args()
    unknown = set(arguments.topics) - set(topics)
    if unknown:
        parser.error(f"unknown topics: {', '.join(sorted(unknown))}; known: {', '.join(topics)}")
    torch.set_num_threads(arguments.threads)
    print("| task | peer | kexue | peer's | peer / kexue | note |\n|---|---|---:|---:|---:|---|")
    for topic in arguments.topics or topics:
        for row in importlib.import_module(f"benchmarks.{topic}").rows():
            times = f"{row.ours_s:.3g} s | {row.peer_s:.3g} s | {row.ratio:.2f}"
            print(f"| {row.task} | {row.peer} | {times} | {row.note} |", flush=True)


if __name__ == "__main__":
    main()
