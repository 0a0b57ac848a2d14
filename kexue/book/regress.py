"""Chapters at other seeds and sizes: the report of `kexue regress`, and the plan of a sweep."""

from __future__ import annotations

import ast
import fcntl
import itertools
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kexue.book import notebooks
from kexue.book.notebooks import Chapter


@dataclass(frozen=True)
class Result:
    """One run of one chapter.

    Attributes:
        chapter: `part/slug`.
        parameters: every parameter of the run by name, defaults included.
        hash: `notebooks.content_hash` of the chapter when it ran.
        held: it ran to its end with every check holding and the seed that was asked for.
        checks: (label, name) of the checks that held.
        seconds: wall-clock time, kernel start included.
        memory: peak resident memory of the kernel in MiB, or None where the system does not tell.
        error: the traceback, or what was wrong; its last line says it in short. Empty if held.
    """

    chapter: str
    parameters: dict[str, Any]
    hash: str
    held: bool
    checks: tuple[tuple[str, str], ...]
    seconds: float
    memory: float | None = None
    error: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """Chapter, parameters and content hash: a second run of the same key would repeat the first."""
        return self.chapter, json.dumps(self.parameters, sort_keys=True), self.hash

    def line(self) -> str:
        """The result as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"

    @classmethod
    def parse(cls, line: str) -> Result:
        """The inverse of `line`.

        Raises:
            ValueError: not such a line.
        """
        try:
            fields = json.loads(line)
            fields["checks"] = tuple((label, name) for label, name in fields["checks"])
            result = cls(**fields)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"not a result: {error}") from error
        kinds = {"chapter": str, "parameters": dict, "hash": str, "held": bool, "seconds": (int, float), "error": str}
        for name, kind in kinds.items():
            if not isinstance(getattr(result, name), kind):  # type: ignore[arg-type]
                raise ValueError(f"not a result: {name} is {getattr(result, name)!r}")
        return result


def _lines(path: Path) -> tuple[list[Result], bytes]:
    """The results in a report and its torn end: a last line without its newline that is no result."""
    *lines, end = path.read_bytes().split(b"\n")
    results = []
    for number, line in enumerate(lines, 1):
        try:
            results.append(Result.parse(line.decode()))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    try:
        return ([*results, Result.parse(end.decode())], b"") if end else (results, b"")
    except ValueError:
        return results, end


def load(path: Path) -> list[Result]:
    """The results in a report of JSON lines, in order; none if there is no such file.

    A last line that a kill has torn is left out, with a warning.

    Raises:
        ValueError: any other bad line, by file and number.
    """
    path = Path(path)
    if not path.exists():
        return []
    results, torn = _lines(path)
    if torn:
        warnings.warn(f"{path}:{len(results) + 1}: the last line is torn and left out: {torn[:60]!r}", stacklevel=2)
    return results


def append(path: Path, result: Result) -> None:
    """Add one line to a report, whole or not at all for whoever reads it next; a torn end is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                _, torn = _lines(path)
                file.truncate(file.tell() - len(torn))
                file.write(b"" if torn else b"\n")
        file.write(result.line().encode())
        file.flush()
        os.fsync(file.fileno())


def fresh(results: Iterable[Result], root: Path) -> list[Result]:
    """The results that are true of the chapters and the package as they are now, the last one of each key."""
    hashes = {chapter.key: notebooks.content_hash(chapter.path) for chapter in notebooks.chapters(root)}
    return list({result.key: result for result in results if hashes.get(result.chapter) == result.hash}.values())


def held(results: Iterable[Result]) -> dict[tuple[str, str, str], tuple[int, int]]:
    """(chapter, label, name) of each check: at how many runs it held, of how many.

    A run that failed counts against every check that it did not reach.
    """
    runs: dict[str, int] = {}
    counts: dict[tuple[str, str, str], int] = {}
    for result in results:
        runs[result.chapter] = runs.get(result.chapter, 0) + 1
        for label, name in result.checks:
            counts[result.chapter, label, name] = counts.get((result.chapter, label, name), 0) + 1
    return {check: (count, runs[check[0]]) for check, count in counts.items()}


def table(results: Sequence[Result]) -> str:
    """A line per chapter: runs held, the longest run, the largest kernel."""
    keys = list(dict.fromkeys(result.chapter for result in results))
    width = max(map(len, [*keys, "chapter"]))
    lines = [f"{'chapter':{width}}  held at     longest  memory"]
    for key in keys:
        runs = [result for result in results if result.chapter == key]
        memory = max((result.memory for result in runs if result.memory is not None), default=None)
        lines.append(
            f"{key:{width}}  {sum(result.held for result in runs):3d} of {len(runs):3d}  {max(r.seconds for r in runs):6.1f} s"
            + (f"  {memory:.0f} MiB" if memory is not None else "")
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- planning


@dataclass(frozen=True)
class Job:
    """One run to do: the parameters to inject, and the key under which its result is recorded."""

    chapter: Chapter
    inject: dict[str, Any]
    parameters: dict[str, Any]
    hash: str

    @property
    def key(self) -> tuple[str, str, str]:
        """The `Result.key` of this run."""
        return Result(self.chapter.key, self.parameters, self.hash, False, (), 0.0).key


def seeds(text: str) -> list[int]:
    """Seeds from `7`, `0:20` (0 to 19) or `1,3,10:13`.

    Raises:
        ValueError: anything else, an empty range, a negative or repeated seed.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?::(\d+))?", part.strip())
        if not match:
            raise ValueError(f"seeds should look like 7, 0:20 or 1,3,10:13, got {text!r}")
        low, high = int(match[1]), int(match[2]) if match[2] else int(match[1]) + 1
        if high <= low:
            raise ValueError(f"seeds {part.strip()!r} name an empty range; expected low:high with low < high")
        found += range(low, high)
    if len(set(found)) < len(found):
        raise ValueError(f"seeds {text!r} name a seed twice")
    return found


def values(name: str, text: str, default: Any) -> list[Any]:
    """The values `v1,v2,...` for a parameter, each of the type of its default.

    Text for a text parameter needs no quotes; an integer will do for a float.

    Raises:
        TypeError: a value of another type.
    """
    if isinstance(default, str):
        return text.split(",")
    try:
        found = list(ast.literal_eval(f"[{text}]"))
    except (SyntaxError, ValueError):
        found = list(text.split(","))
    if isinstance(default, float):
        found = [float(value) if type(value) is int else value for value in found]
    for value in found:
        if default is not None and type(value) is not type(default):
            raise TypeError(f"{name} should be {type(default).__name__} like its default {default!r}, got {value!r}")
    if not found:
        raise TypeError(f"{name} has no value; expected {name}=v1,v2,...")
    return found


def plan(chapters: Sequence[Chapter], seeds: Sequence[int], options: Mapping[str, str] | None = None) -> list[Job]:
    """Every run of the sweep: chapters x seeds x values of each option, refused as a whole if any cannot be.

    Args:
        chapters: what to run.
        seeds: a value for each chapter's `seed`.
        options: other parameters by name, as the text `v1,v2`; every chapter has to have them.

    Raises:
        ValueError: a chapter without such a parameter, or whose parameters cell cannot be read.
        TypeError: a value that is not of its default's type.
    """
    jobs: list[Job] = []
    for chapter in chapters:
        try:
            defaults = notebooks.parameters(notebooks.read(chapter.path))
        except ValueError as error:
            raise ValueError(f"{chapter.key}: {error}") from error
        grid: dict[str, list[Any]] = {"seed": list(seeds)}
        for name, text in {"seed": "", **(options or {})}.items():
            if name not in defaults:
                raise ValueError(f"{chapter.key} has no parameter {name!r}; it has: {', '.join(defaults)}")
            if name == "seed" and text:
                raise ValueError("the seed is given as --seeds, not among the parameters")
            if name != "seed":
                try:
                    grid[name] = values(name, text, defaults[name])
                except TypeError as error:
                    raise TypeError(f"{chapter.key}: {error}") from error
        if type(defaults["seed"]) is not int:
            raise TypeError(f"{chapter.key}: seed should be an integer, its default is {defaults['seed']!r}")
        content = notebooks.content_hash(chapter.path)
        for combination in itertools.product(*grid.values()):
            inject = dict(zip(grid, combination, strict=True))
            jobs.append(Job(chapter, inject, {**defaults, **inject}, content))
    return jobs
