"""Chapters as data: where they are, which equations they state, and what their ledgers recorded."""

from __future__ import annotations

import ast
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
"""The repository this package is imported from (an editable install, or a copy on PYTHONPATH)."""
PACKAGE = ROOT / "kexue"

CODE = ("code", "code-block", "code-cell")
"""Directives whose content is code and no Markdown."""
_FENCE = re.compile(r"^(?P<fence> *(?:`{3,}|~{3,}|:{3,}(?=\{)))(?:\{(?P<name>[\w:.-]+)\})?\s*(?P<argument>.*?)\s*$")
_DISPLAY = re.compile(r"\$\$(?P<latex>.+?)\$\$(?:[ \t]*\((?P<label>[^()\s]+)\))?", re.S)


@dataclass(frozen=True)
class Chapter:
    """One chapter's notebook: `chapters/<part>/<slug>.ipynb`."""

    path: Path
    part: str
    slug: str

    @property
    def key(self) -> str:
        """`part/slug`: the chapter's name in commands and reports."""
        return f"{self.part}/{self.slug}"


@dataclass(frozen=True)
class Equation:
    """A labelled display formula: the index of its cell, and its source without the dollars."""

    cell: int
    latex: str


def catalog(root: Path) -> dict[str, dict[str, Any]]:
    """The chapters of `chapters/catalog.yml` by `part/slug`, in the book's order; empty if there is no such file.

    Raises:
        ValueError: the file has no list `chapters` of entries with `part` and `slug`, or it names a chapter twice.
    """
    path = Path(root) / "chapters" / "catalog.yml"
    if not path.exists():
        return {}
    data = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(data, dict) or not isinstance(data.get("chapters"), list):
        raise ValueError(f"{path}: expected a list of entries under the key 'chapters'")
    found: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(data["chapters"], 1):
        if not isinstance(entry, dict) or not {"part", "slug"} <= entry.keys():
            raise ValueError(f"{path}: entry {number} should have the keys part and slug, got {entry!r}")
        key = f"{entry['part']}/{entry['slug']}"
        if key in found:
            raise ValueError(f"{path}: {key} is entered twice")
        found[key] = entry
    return found


def select(root: Path, names: Iterable[str]) -> list[Chapter]:
    """The chapters named `part/slug` (or by their path), in the order given; all of them if none is named.

    Raises:
        ValueError: a name that is no chapter's; the error lists those that are.
    """
    known = {chapter.key: chapter for chapter in chapters(root)}
    keys = [str(name).removesuffix(".ipynb").removeprefix("./").removeprefix("chapters/") for name in names]
    for key in keys:
        if key not in known:
            raise ValueError(f"no chapter {key!r}; there are: {', '.join(known) or 'none'}")
    return [known[key] for key in dict.fromkeys(keys or known)]


def chapters(root: Path) -> list[Chapter]:
    """Every `chapters/*/*.ipynb` in the catalog's order; those that the catalog does not know come last."""
    root = Path(root)
    order = {key: i for i, key in enumerate(catalog(root))}
    found = [Chapter(path, path.parent.name, path.stem) for path in sorted((root / "chapters").glob("*/*.ipynb"))]
    return sorted(found, key=lambda chapter: (order.get(chapter.key, len(order)), chapter.key))


def read(path: Path) -> NotebookNode:
    """The notebook at `path`, format 4.

    Raises:
        ValueError: not a notebook; the error names the file.
    """
    try:
        return nbformat.read(str(path), as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, AttributeError, KeyError) as error:
        raise ValueError(f"{path}: not a notebook of format 4: {error}") from error


@dataclass(frozen=True)
class Block:
    """A fenced block of Markdown: a directive, or code.

    Attributes:
        fence: the marks that open it, indentation included.
        name: of the directive; empty for code.
        argument: the rest of its first line.
        inside: its lines.
    """

    fence: str
    name: str
    argument: str
    inside: tuple[str, ...]


def blocks(source: str) -> Iterator[str | Block]:
    """The lines of Markdown that stand in no fence, and the outermost fenced blocks, in order."""
    lines = iter(source.split("\n"))
    for line in lines:
        opened = _FENCE.match(line)
        if opened is None:
            yield line
            continue
        mark = opened["fence"].strip()
        not_closing = re.compile(rf"(?! *{mark}{mark[0]}*\s*$)")
        inside = tuple(itertools.takewhile(not_closing.match, lines))
        yield Block(opened["fence"], opened["name"] or "", opened["argument"], inside)


def split_code(source: str) -> tuple[str, list[str]]:
    """Markdown without its fenced code, and the code of each fence; what stands in directives such as `{note}` is prose."""
    prose: list[str] = []
    code: list[str] = []
    for part in blocks(source):
        if isinstance(part, str):
            prose.append(part)
        elif part.name in ("", *CODE):
            code.append("\n".join(part.inside))
        else:
            text, more = split_code("\n".join(part.inside))
            prose, code = [*prose, text], [*code, *more]
    return "\n".join(prose), code


def equations(nb: NotebookNode) -> dict[str, Equation]:
    """Every labelled `$$ ... $$ (label)` by label, in order (`eq-` results and `def-` definitions; any other label too).

    Formulas in fenced code are no formulas; those inside directives such as `{prf:theorem}` are.

    Raises:
        ValueError: a label given twice.
    """
    found: dict[str, Equation] = {}
    for index, cell in enumerate(nb.cells):
        if cell.cell_type != "markdown":
            continue
        for formula in _DISPLAY.finditer(split_code(cell.source)[0]):
            label = formula["label"]
            if label is None:
                continue
            if label in found:
                raise ValueError(f"label {label!r} is given twice, in cells {found[label].cell} and {index}")
            found[label] = Equation(index, formula["latex"].strip())
    return found


def _records(nb: NotebookNode) -> Iterator[tuple[int, dict[str, Any]]]:
    for index, cell in enumerate(nb.cells):
        for output in cell.get("outputs", []):
            record = output.get("metadata", {}).get("kexue")
            if isinstance(record, dict):
                yield index, record


def checks(nb: NotebookNode) -> list[dict[str, Any]]:
    """The record of each check shown, in order (see `Ledger`), with the index of its cell as `cell`."""
    return [{**record, "cell": index} for index, record in _records(nb) if "label" in record]


def corrections(nb: NotebookNode) -> list[dict[str, Any]]:
    """Each correction shown, in order: `article`, `claims`, `finds`, `check`, and the index of its cell as `cell`."""
    return [{**record["correction"], "cell": index} for index, record in _records(nb) if "correction" in record]


def summary(nb: NotebookNode) -> dict[str, Any] | None:
    """The record of the ledger that the notebook shows last (`ledger`, `seed`, `checks`, `corrections`), if it shows one."""
    shown = [record for _, record in _records(nb) if "ledger" in record]
    return shown[-1] if shown else None


def imported(sources: Iterable[str], package: Path = PACKAGE) -> list[Path]:
    """The modules of the package that Python sources import, and all that these import in turn, `kexue.book` left out.

    Read from the import statements, also those inside functions; what is imported by a computed name is not seen.
    """
    found: set[Path] = set()
    waiting: list[tuple[str, tuple[str, ...]]] = [(source, ()) for source in sources]
    while waiting:
        source, here = waiting.pop()
        for name in _import_names(source, package.name, here):
            for i in range(len(name) + 1):
                base = package.joinpath(*name[:i])
                for path in (base / "__init__.py", base.with_suffix(".py")):
                    if path.is_file() and path.is_relative_to(package) and name[:1] != ("book",) and path not in found:
                        found.add(path)
                        inner = path.relative_to(package).with_suffix("").parts
                        waiting.append((path.read_text("utf-8"), inner))
    return sorted(found)


@cache
def _import_names(source: str, package: str, here: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Dotted names below the package that a source may import; `here` is its own, for relative imports."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError:
        return []
    names = [tuple(alias.name.split(".")) for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            base = (package, *here)[: len(here) + 1 - node.level] if node.level else ()
            module = tuple(node.module.split(".")) if node.module else ()
            names += [(*base, *module, alias.name) for alias in node.names]
    return [name[1:] for name in names if name[0] == package]


def has_tag(cell: NotebookNode, tag: str) -> bool:
    """Whether a cell carries a tag."""
    return tag in cell.metadata.get("tags", [])


def parameters(nb: NotebookNode) -> dict[str, Any]:
    """The defaults in the cell tagged `parameters`, read without running it.

    Raises:
        ValueError: not exactly one such cell, or a statement in it that is no plain `name = literal`.
    """
    cells = [cell for cell in nb.cells if cell.cell_type == "code" and has_tag(cell, "parameters")]
    if len(cells) != 1:
        raise ValueError(f"{len(cells)} code cells are tagged 'parameters', expected exactly one")
    found: dict[str, Any] = {}
    try:
        statements = ast.parse(cells[0].source).body
    except SyntaxError as error:
        raise ValueError(f"the parameters cell is not Python: {error}") from error
    for statement in statements:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name not in found:
                try:
                    found[name] = ast.literal_eval(value)
                    continue
                except ValueError:
                    pass
        text = ast.unparse(statement)
        raise ValueError(f"the parameters cell has {text!r}, expected each name once as a plain literal such as 'seed = 0'")
    return found


def content_hash(path: Path, package: Path = PACKAGE) -> str:
    """What a chapter's results depend on: its code cells, and the modules of `kexue` that they import.

    Prose, outputs and metadata do not enter, nor do modules that the chapter does not reach: mending a sentence,
    or adding to another topic, leaves a report fresh.
    """
    sources = [cell.source for cell in read(path).cells if cell.cell_type == "code"]
    modules = imported(sources, package)
    parts = [*sources, *(module.relative_to(package).as_posix() + "\0" + module.read_text("utf-8") for module in modules)]
    return hashlib.sha256("".join(f"{len(part)}\0{part}" for part in parts).encode()).hexdigest()[:16]


def environment(root: Path) -> dict[str, str]:
    """The environment of a chapter's kernel: `kexue` from `root`, one thread, this Python, pictures inline."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    path = os.pathsep.join(filter(None, (str(Path(root).resolve()), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, **one_thread, "PYTHONPATH": path, "JUPYTER_PREFER_ENV_PATH": "1"}
    env.pop("MPLBACKEND", None)
    return env
