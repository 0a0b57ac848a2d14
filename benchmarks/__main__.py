"""Run the races: `python -m benchmarks [topic ...]`. Each topic module offers `rows()`; output is a table."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import platform
import re
from datetime import date
from pathlib import Path

import torch


def _machine() -> str:
    """The processor's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", info.read_text("utf-8"), re.MULTILINE) if info.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


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
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{date.today()}, {_machine()}, torch threads: {arguments.threads}, {versions}\n")
    print("| task | peer | kexue | peer's | peer / kexue | note |\n|---|---|---:|---:|---:|---|")
    for topic in arguments.topics or topics:
        for row in importlib.import_module(f"benchmarks.{topic}").rows():
            times = f"{row.ours_s:.3g} s | {row.peer_s:.3g} s | {row.ratio:.2f}"
            print(f"| {row.task} | {row.peer} | {times} | {row.note} |", flush=True)


if __name__ == "__main__":
    main()
