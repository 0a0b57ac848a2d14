"""Run the races: `python -m benchmarks [topic ...]`. Each topic module offers `rows()`; output is a table."""

from __future__ import annotations

import argparse
import pkgutil
import platform
import re
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.common import print_rows


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
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{date.today()}, {_machine()}, torch threads: {arguments.threads}, {versions}\n")
    print("| task | peer | kexue | peer's | peer / kexue | note |\n|---|---|---:|---:|---:|---|", flush=True)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for topic in arguments.topics or topics:
            pool.submit(print_rows, topic, arguments.threads).result()


if __name__ == "__main__":
    main()
