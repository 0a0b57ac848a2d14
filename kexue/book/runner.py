"""Running chapters with papermill, each in a process of its own that can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast

import psutil
from nbformat import NotebookNode
from tqdm import tqdm

from kexue.book import notebooks
from kexue.book.regress import Job, Result, append, load


def _end(process: psutil.Process) -> None:
    """Kill a process after all its descendants: a kernel is a session of its own and outlives its parent's group."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for member in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


class _Run:
    """A job in a process of its own, which executes the notebook and dies with this one."""

    def __init__(self, job: Job, root: Path, folder: Path):
        self.job, self.folder = job, folder
        self.start = time.perf_counter()
        with open(folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kexue.book.runner"], stdin=subprocess.PIPE, stdout=log, stderr=log,
                cwd=folder, env=notebooks.environment(root), start_new_session=True,
            )
        self.family = psutil.Process(self.process.pid)
        self.stdin = cast(IO[bytes], self.process.stdin)
        order = {"path": str(job.chapter.path.resolve()), "parameters": job.inject, "folder": str(folder)}
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write(json.dumps(order).encode() + b"\n")
            self.stdin.flush()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @property
    def outcome(self) -> Path:
        return self.folder / "outcome.json"

    @property
    def executed(self) -> Path:
        return self.folder / "executed.ipynb"

    def kill(self) -> None:
        _end(self.family)
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        self.process.wait()

    def result(self, late: str) -> Result:
        """What came of it; `late` says so if the time-out ended it."""
        nb, memory, seconds, error = None, None, self.seconds, ""
        with contextlib.suppress(FileNotFoundError, ValueError):
            nb = notebooks.read(self.executed)
        if late:
            error = (_where(nb) if nb else "") + late
        elif self.outcome.exists():
            report = json.loads(self.outcome.read_text("utf-8"))
            error, memory, seconds = report["error"], report["memory"], report["seconds"]
        else:
            log = (self.folder / "log").read_text("utf-8", "replace")
            error = f"{log}\nthe process ended with status {self.process.returncode}"
        error = error or _complaint(self.job, nb)
        found = tuple((check["label"], check["name"]) for check in notebooks.checks(nb) if check["held"]) if nb else ()
        job = self.job
        return Result(job.chapter.key, job.parameters, job.hash, not error, found, round(seconds, 2), memory, error)


def _where(nb: NotebookNode) -> str:
    for index, cell in enumerate(nb.cells):
        if cell.metadata.get("papermill", {}).get("status") == "running":
            return f"in cell {index}:\n{cell.source}\n"
    return ""


def _complaint(job: Job, nb: NotebookNode | None) -> str:
    """What is wrong with a run that came to its end."""
    if nb is None:
        return "it left no notebook"
    summary, shown = notebooks.summary(nb), notebooks.checks(nb)
    if summary is None or not shown:
        return "it came to its end without showing a ledger with checks"
    if summary["ledger"] != job.chapter.slug:
        return f"its ledger is that of {summary['ledger']!r}, expected {job.chapter.slug!r}"
    arrived = {summary["seed"], *(check["seed"] for check in shown)}
    if arrived != {job.inject["seed"]}:
        return f"the seed {job.inject['seed']} did not arrive: the ledger says {', '.join(map(str, sorted(arrived)))}"
    missing = {label for label in notebooks.equations(nb) if label.startswith("eq-")} - {check["label"] for check in shown}
    if missing:
        return f"no check of {', '.join(sorted(missing))} was made"
    if notebooks.content_hash(job.chapter.path) != job.hash:
        return "the chapter or the package changed while it ran"
    return ""


def run(
    jobs: Sequence[Job], *, root: Path, workers: int, timeout: float, keep: Path | None = None
) -> Iterator[Result]:
    """Run the jobs, `workers` at a time, and yield each result as it comes.

    A run that crashes, or is not done after `timeout` seconds and is killed, is a result like any other.

    Args:
        jobs: what to run; see `plan`.
        root: the repository.
        workers: processes at a time, each with a kernel and one thread.
        timeout: seconds for one run.
        keep: a folder for the executed notebooks, if they are wanted.
    """
    if workers < 1:
        raise ValueError(f"jobs should be at least 1, got {workers}")
    if not timeout > 0:
        raise ValueError(f"timeout should be a positive number of seconds, got {timeout}")
    waiting = deque(jobs)
    running: list[_Run] = []
    with tempfile.TemporaryDirectory(prefix="kexue-regress-") as scratch:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    running.append(_Run(waiting.popleft(), root, Path(tempfile.mkdtemp(dir=scratch))))
                time.sleep(0.05)
                for each in list(running):
                    done = each.outcome.exists() or each.process.poll() is not None
                    late = not done and each.seconds > timeout
                    if not (done or late):
                        continue
                    each.kill()
                    running.remove(each)
                    result = each.result(f"it did not end within {timeout:g} s" if late else "")
                    if keep is not None and each.executed.exists():
                        name = " ".join(f"{k}={v}" for k, v in each.job.inject.items()).replace("/", "_")
                        target = keep / each.job.chapter.key / f"{name}.ipynb"
                        target.parent.mkdir(parents=True, exist_ok=True)
                        shutil.move(each.executed, target)
                    yield result
        finally:
            for each in running:
                each.kill()


def sweep(
    jobs: Sequence[Job], *, root: Path, report: Path, workers: int, timeout: float,
    keep: Path | None = None, retry: bool = False,
) -> list[Result]:
    """Run what the report does not know yet and append each result as it comes; the results of all jobs.

    An interrupt leaves the report with all that was finished.

    Args:
        jobs, root, workers, timeout, keep: see `run`.
        report: file of JSON lines, made if there is none.
        retry: run what failed before again.
    """
    known = {result.key: result for result in load(report) if result.held or not retry}
    todo = [job for job in jobs if job.key not in known]
    failed = 0
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc="regress", unit="run", disable=None) as bar:
        for result in run(todo, root=root, workers=workers, timeout=timeout, keep=keep):
            append(report, result)
            known[result.key] = result
            if not result.held:
                failed += 1
                bar.set_postfix(failed=failed)
                bar.write(f"{result.chapter} {result.parameters}: {result.error.strip().splitlines()[-1]}")
            bar.update()
    return [known[job.key] for job in jobs]


def _work() -> None:
    """Execute the one job that arrives on standard input; when that closes, the parent is gone and this ends too."""
    import papermill

    order = json.loads(sys.stdin.readline())

    def follow_parent() -> None:
        while os.read(0, 1):
            pass
        _end(psutil.Process())

    threading.Thread(target=follow_parent, daemon=True).start()
    folder, path = Path(order["folder"]), Path(order["path"])
    start, error = time.perf_counter(), ""
    nb = notebooks.read(path)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    try:
        papermill.execute_notebook(
            nb, folder / "executed.ipynb", order["parameters"], kernel_name="python3", progress_bar=False, cwd=path.parent,
            start_timeout=120, extra_arguments=["--log-level=ERROR"],
        )
    except Exception:
        error = re.sub(r"\x1b\[[0-9;]*m", "", traceback.format_exc(chain=False))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)
    outcome = {"error": error, "seconds": time.perf_counter() - start, "memory": round(peak, 1)}
    (folder / "outcome.new").write_text(json.dumps(outcome), "utf-8")
    os.replace(folder / "outcome.new", folder / "outcome.json")


if __name__ == "__main__":
    _work()
