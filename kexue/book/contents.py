"""What the site shows, gathered from catalog, notebooks and regression report: nothing is typed twice."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from kexue.book import notebooks, regress
from kexue.book.notebooks import Chapter, Equation


@dataclass(frozen=True)
class Trials:
    """Reruns of a chapter: how many there were, and at how many of them each check, by (label, name), held."""

    runs: int = 0
    held: dict[tuple[str, str], int] = field(default_factory=dict)

    def worst(self, checks: Iterable[dict[str, Any]]) -> int:
        """At how many runs all of `checks` are known to have held: the count of the one that held least often."""
        return min((self.held.get((check["label"], check["name"]), 0) for check in checks), default=0)


@dataclass(frozen=True)
class Entry:
    """One chapter as the site shows it.

    Attributes:
        chapter: the notebook.
        number: the place in the catalog, the same whichever chapters exist.
        about: the catalog's entry.
        equations: labelled formulas by label.
        checks: records of the checks, in order, with `cell`.
        corrections: records of the corrections, in order, with `cell`.
        picture: the PNG of the cell tagged `thumbnail`, if any, and its alternative text.
        seeds, sizes: the reruns that changed the seed alone, and those that changed other parameters.
    """

    chapter: Chapter
    number: int
    about: dict[str, Any]
    equations: dict[str, Equation]
    checks: list[dict[str, Any]]
    corrections: list[dict[str, Any]]
    picture: bytes | None
    alt: str
    seeds: Trials = Trials()
    sizes: Trials = Trials()

    @property
    def docname(self) -> str:
        """The page's name in Sphinx."""
        return f"chapters/{self.chapter.key}"

    @property
    def results(self) -> list[str]:
        """Labels of the displayed results."""
        return [label for label in self.equations if label.startswith("eq-")]

    @property
    def covered(self) -> int:
        """Number of results with a check."""
        return len(set(self.results) & {check["label"] for check in self.checks})

    @property
    def rivals(self) -> int:
        """Number of rivals that the checks rejected."""
        return sum(rival["rejected"] for check in self.checks for rival in check["rivals"])

    def of(self, label: str) -> list[dict[str, Any]]:
        """The checks of one equation."""
        return [check for check in self.checks if check["label"] == label]


@dataclass(frozen=True)
class Book:
    """The chapters that exist, in the catalog's order, and the parts they belong to."""

    entries: list[Entry]
    parts: list[dict[str, str]]

    @cached_property
    def by_docname(self) -> dict[str, Entry]:
        """Entries by page."""
        return {entry.docname: entry for entry in self.entries}

    @cached_property
    def by_slug(self) -> dict[str, Entry]:
        """Entries by slug."""
        return {entry.chapter.slug: entry for entry in self.entries}

    def part(self, folder: str) -> str:
        """The title of a part."""
        return next(part["title"] for part in self.parts if part["folder"] == folder)

    def totals(self) -> dict[str, int]:
        """Counts over the whole book; `seeds` is the number of seeds at which every chapter was run, 0 for the stored one alone.

        `trials` counts checks times seeds, `held` those of them that held.
        """
        return {
            "chapters": len(self.entries),
            "results": sum(len(entry.results) for entry in self.entries),
            "covered": sum(entry.covered for entry in self.entries),
            "checks": sum(len(entry.checks) for entry in self.entries),
            "rivals": sum(entry.rivals for entry in self.entries),
            "corrections": sum(len(entry.corrections) for entry in self.entries),
            "seeds": min((entry.seeds.runs for entry in self.entries), default=0),
            "trials": sum(entry.seeds.runs * len(entry.checks) for entry in self.entries),
            "held": sum(entry.seeds.worst([check]) for entry in self.entries for check in entry.checks),
        }


def _picture(nb: Any) -> tuple[bytes | None, str]:
    for cell in nb.cells:
        if cell.cell_type == "code" and notebooks.has_tag(cell, "thumbnail"):
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
                    return base64.b64decode(output["data"]["image/png"]), alt
    return None, ""


def _trials(results: list[regress.Result]) -> Trials:
    return Trials(len(results), dict(Counter(check for result in results for check in result.checks)))


def _reruns(results: list[regress.Result], key: str, parameters: dict[str, Any]) -> tuple[Trials, Trials]:
    """The runs of one chapter at other seeds, and those at other sizes."""
    mine = [result for result in results if result.chapter == key]
    at_seeds = [result for result in mine if {**result.parameters, "seed": None} == {**parameters, "seed": None}]
    return _trials(at_seeds), _trials([result for result in mine if result not in at_seeds])


def parts(root: Path) -> list[dict[str, str]]:
    """The book's parts in order: `folder` and `title` of each."""
    return yaml.safe_load((Path(root) / "chapters" / "catalog.yml").read_text("utf-8"))["parts"]


def load(root: Path) -> Book:
    """The book as it stands in `root`.

    Raises:
        ValueError: a chapter that the catalog does not have, or a broken notebook or report.
    """
    root = Path(root)
    catalog = notebooks.catalog(root)
    numbers = {key: number for number, key in enumerate(catalog, 1)}
    results = regress.fresh(regress.load(root / "reports" / "regress.jsonl"), root)
    entries = []
    for chapter in notebooks.chapters(root):
        if chapter.key not in catalog:
            raise ValueError(f"{chapter.path}: {chapter.key} is not in chapters/catalog.yml")
        nb = notebooks.read(chapter.path)
        picture, alt = _picture(nb)
        seeds, sizes = _reruns(results, chapter.key, notebooks.parameters(nb)) if results else (Trials(), Trials())
        entries.append(Entry(
            chapter, numbers[chapter.key], catalog[chapter.key], notebooks.equations(nb), notebooks.checks(nb),
            notebooks.corrections(nb), picture, alt, seeds, sizes,
        ))
    return Book(entries, parts(root))


def toc(root: Path) -> str:
    """The table of contents, `_toc.yml`: the chapters that exist, by part, and the pages about the whole book."""
    existing = notebooks.chapters(root)
    lines = ["# Written by `make book` from chapters/catalog.yml and the chapters that exist."]
    lines += ["format: jb-book", "root: index", "parts:"]
    for part in parts(root):
        files = [f"      - file: chapters/{chapter.key}" for chapter in existing if chapter.part == part["folder"]]
        if files:
            lines += [f"  - caption: {part['title']}", "    chapters:", *files]
    lines += ["  - caption: The whole book", "    chapters:"]
    lines += [f"      - file: {page}" for page in ("ledger", "corrections", "reference")]
    return "\n".join(lines) + "\n"
