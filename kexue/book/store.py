"""Executing a chapter and storing it with its outputs: small, and without what changes at every run."""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from tqdm import tqdm

from kexue.book import notebooks, pictures

SECONDS = 40
"""What a chapter may take at its default parameters, on one core."""
BYTES = 400_000
"""What a stored chapter may weigh."""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}


@dataclass(frozen=True)
class Stored:
    """What storing a chapter took and what it weighs."""

    seconds: float
    size: int

    def __str__(self) -> str:
        over = [text for text, bad in (("too slow", self.seconds > SECONDS), ("too large", self.size > BYTES)) if bad]
        figures = f"{self.seconds:.1f} s of {SECONDS}, {self.size / 1000:.0f} kB of {BYTES // 1000}"
        return f"{figures}: {' and '.join(over)}" if over else figures


def execute(nb: NotebookNode, folder: Path, root: Path) -> NotebookNode:
    """A copy of the notebook, run from top to bottom in a fresh kernel with one thread.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    fresh = copy.deepcopy(nb)
    code = [cell for cell in fresh.cells if cell.cell_type == "code"]
    for cell in code:
        cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        fresh, kernel_name="python3", timeout=None, record_timing=False, allow_errors=False, force_raise_errors=True,
        resources={"metadata": {"path": str(folder)}}, extra_arguments=["--log-level=ERROR"],
    )
    with tqdm(total=len(code), desc=folder.name, unit="cell", leave=False, disable=None) as bar:
        client.on_cell_executed = lambda **_: bar.update()
        client.execute(env=notebooks.environment(root))
    return fresh


def _images(nb: NotebookNode) -> Iterator[tuple[NotebookNode, str]]:
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                yield output.data, output.data["image/png"]


def clean(nb: NotebookNode, previous: NotebookNode | None = None) -> NotebookNode:
    """A copy with small pictures and stable ids, and without times, widgets, versions and other traces of the run.

    A cell's id derives from its source, so that a way through jupytext does not change it. Where a picture looks
    the same as one stored before, the stored one stays.
    """
    nb = nbformat.from_dict({**copy.deepcopy(nb), "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5})
    ids: dict[str, int] = {}
    for cell in nb.cells:
        digest = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        ids[digest] = ids.get(digest, 0) + 1
        cell.id = digest if ids[digest] == 1 else f"{digest}-{ids[digest]}"
        cell.metadata = {key: cell.metadata[key] for key in ("tags", "mystnb") if cell.metadata.get(key)}
        cell.pop("attachments", None)
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = {key: output.metadata[key] for key in ("kexue", "image/png") if key in output.metadata}
            output.pop("transient", None)
    before = [png for _, png in _images(previous)] if previous else []
    for data, png in _images(nb):
        fresh = pictures.decode(png)
        same = (old for old in before if not pictures.difference(pictures.decode(old), fresh))
        data["image/png"] = next(same, None) or pictures.optimise(png)
    return nbformat.from_dict(nb)


def store(path: Path, root: Path) -> Stored:
    """Execute the chapter at `path` and store it with its outputs; the file is replaced only when all went well.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised; the file is as it was.
        ValueError: the file is no notebook, or somebody saved it meanwhile; it is as they saved it.
    """
    nb, before = notebooks.read(path), path.read_bytes()
    start = time.perf_counter()
    executed = execute(nb, path.parent, root)
    seconds = time.perf_counter() - start
    text = nbformat.writes(clean(executed, nb)).rstrip("\n") + "\n"
    if path.read_bytes() != before:
        raise ValueError(f"{path} was saved by somebody else while it ran, and is as they saved it; store it again")
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, "utf-8")
    os.replace(fresh, path)
    return Stored(seconds, len(text.encode()))
