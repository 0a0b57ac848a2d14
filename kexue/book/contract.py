"""The contract of a stored chapter: what a reader, the site and the tests rely on."""

from __future__ import annotations

import ast
import io
import itertools
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from kexue.book import notebooks, pictures
from kexue.book.store import BYTES, METADATA

CELLS = 26
"""Code cells in a chapter, at most."""
LINES = 40
"""Lines of a code cell that is not folded, at most."""
WIDTH = 90
"""Characters of a line of code, at most: what the page shows without scrolling."""
TAGS = {"parameters", "thumbnail", "hide-input", "full-width", "margin"}
SECTIONS = ("Where it breaks", "An experiment", "In practice", "Equation by equation", "Exercises", "References", "The ledger")
NETWORK = {
    "aiohttp", "asyncssh", "boto3", "datasets", "ftplib", "gdown", "http", "httpx", "huggingface_hub", "imaplib", "importlib",
    "kaggle", "kagglehub", "modelscope", "paramiko", "pip", "poplib", "pycurl", "requests", "smtplib", "socket", "ssl",
    "subprocess", "telnetlib", "tensorflow_datasets", "urllib", "urllib3", "webbrowser", "websockets", "wget", "xmlrpc",
}
"""Modules that fetch, or that run what fetches."""
FETCHING = re.compile(
    r"(fetch_\w+|urlopen|urlretrieve|hf_hub_download|snapshot_download|load_dataset|load_state_dict_from_url|"
    r"download(_url)?|system|popen|run_line_magic|run_cell_magic|__import__|import_module)"
)
COMPARING = {"allclose", "isclose", "array_equal", "array_equiv", "all", "any", "isfinite", "issubset", "startswith", "endswith"}
"""Calls whose answer is true or false: as a statement they check nothing."""


def violations(nb: NotebookNode, catalog_entry: Mapping[str, Any] | None) -> list[str]:
    """What is wrong with a stored chapter, one sentence each; empty if it keeps the contract.

    Args:
        nb: the notebook as stored.
        catalog_entry: its entry in `chapters/catalog.yml`, if it has one.
    """
    found: list[str] = []
    for rule in RULES:
        found += rule(nb, catalog_entry)
    return found


def book(root: Path, names: Iterable[str] = ()) -> dict[str, list[str]]:
    """The violations of each chapter named (all if none is), and labels that two chapters share."""
    catalog = notebooks.catalog(root)
    chosen = {chapter.key for chapter in notebooks.select(root, names)}
    found: dict[str, list[str]] = {}
    owners: dict[str, str] = {}
    for chapter in notebooks.chapters(root):
        try:
            nb = notebooks.read(chapter.path)
        except ValueError as error:
            found[chapter.key] = [str(error)]
            continue
        shared = [label for label in _labels(nb) if owners.setdefault(label, chapter.key) != chapter.key]
        found[chapter.key] = violations(nb, catalog.get(chapter.key)) + [
            f"label {label!r} is {owners[label]}'s already; labels are unique in the whole book" for label in sorted(shared)
        ]
    return {key: texts for key, texts in found.items() if key in chosen}


def _labels(nb: NotebookNode) -> set[str]:
    figures = {cell.metadata.get("mystnb", {}).get("figure", {}).get("name") for cell in nb.cells}
    try:
        return set(notebooks.equations(nb)) | figures - {None}
    except ValueError:
        return set()


def _code(nb: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    return ((index, cell) for index, cell in enumerate(nb.cells) if cell.cell_type == "code")


def _syntax(nb: NotebookNode) -> Iterator[tuple[int, ast.AST]]:
    for index, cell in _code(nb):
        try:
            tree = ast.parse(cell.source)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            yield index, node


def _name(function: ast.expr) -> str:
    """`f` of `f(...)` and of `a.b.f(...)`."""
    return function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""


# ------------------------------------------------------------------------------------------------ rules


def _heading(nb: NotebookNode, entry: Mapping[str, Any] | None) -> Iterator[str]:
    if entry is None:
        yield "it has no entry in chapters/catalog.yml"
        return
    text = nb.cells[0].source if nb.cells and nb.cells[0].cell_type == "markdown" else ""
    for line in (
        f"# {entry['title']} · {entry['title_zh']}",
        f"*After [{entry['title_zh']}](https://kexue.fm/archives/{entry['archive']}), {entry['date']}.*",
    ):
        if line not in text.splitlines():
            yield f"the first cell should have the line {line!r}, as chapters/catalog.yml says"


def _sections(nb: NotebookNode, _: Mapping[str, Any] | None) -> Iterator[str]:
    text = "\n\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    headings = re.findall(r"^## +(.+?) *$", text, re.M)
    places = [next((i for i, h in enumerate(headings) if h.startswith(section)), None) for section in SECTIONS]
    for section, place in zip(SECTIONS, places):
        if place is None:
            yield f"there is no section '## {section}'"
    known = [place for place in places if place is not None]
    if known != sorted(known):
        yield f"sections should come in the order {', '.join(SECTIONS)}"


def _parameters(nb: NotebookNode, _: Mapping[str, Any] | None) -> Iterator[str]:
    try:
        values = notebooks.parameters(nb)
    except ValueError as error:
        yield str(error)
        return
    if type(values.get("seed")) is not int:
        yield f"the parameters cell should set seed to an integer, it has {values!r}"
    first = next(cell for _, cell in _code(nb))
    if not notebooks.has_tag(first, "parameters"):
        yield "the parameters cell should be the first code cell"


def _executed(nb: NotebookNode, _: Mapping[str, Any] | None) -> Iterator[str]:
    for number, (index, cell) in enumerate(_code(nb), 1):
        if not cell.source.strip():
            yield f"code cell {index} is empty"
        elif cell.execution_count is None:
            yield f"code cell {index} was not executed"
        elif cell.execution_count != number:
            yield f"code cell {index} was executed out of order: its count is {cell.execution_count}, expected {number}"


def _stored(nb: NotebookNode, _: Mapping[str, Any] | None) -> Iterator[str]:
    loose = any(set(cell.metadata) - {"tags", "mystnb"} for cell in nb.cells)
    if nb.metadata != METADATA or loose:
        yield "its metadata hold more or less than a stored chapter's: run kexue store"
    size = len(nbformat.writes(nb).encode())
    if size > BYTES:
        yield f"it weighs {size / 1000:.0f} kB, at most {BYTES / 1000:.0f} are allowed"


def _sizes(nb: NotebookNode, _: Mapping[str, Any] | None) -> Iterator[str]:
    cells = list(_code(nb))
    if len(cells) > CELLS:
        yield f"it has {len(cells)} code cells, at most {CELLS} are allowed"
    for index, cell in cells:
        lines = len(cell.source.splitlines())
        if lines > LINES and not notebooks.has_tag(cell, "hide-input"):
            yield f"code cell {index} has {lines} lines, at most {LINES} are allowed unless it is tagged hide-input"
        yield from _wide(f"code cell {index}", cell.source)
    for index, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown":
            for block in notebooks.split_code(cell.source)[1]:
                yield from _wide(f"code in cell {index}", block)


def _wide(where: str, source: str) -> Iterator[str]:
    widest = max(map(len, source.splitlines()), default=0)
    if widest > WIDTH:
        yield f"{where} has a line of {widest} characters, at most {WIDTH} are allowed"


def _tags(nb: NotebookNode, _: Mapping[str, Any] | None) -> Iterator[str]:
    for index, cell in enumerate(nb.cells):
        for tag in set(cell.metadata.get("tags", [])) - TAGS:
            yield f"cell {index} is tagged {tag!r}; allowed are {', '.join(sorted(TAGS))}"
        if cell.cell_type == "code" and re.search(r"^\s*#\s*(PYTEST_VALIDATE|NBVAL)_", cell.source, re.M):
            yield f"code cell {index} has a comment that turns nbval off"


def _outputs(nb: NotebookNode, _: Mapping[str, Any] | None) -> Iterator[str]:
    for index, cell in _code(nb):
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"code cell {index} stores an error: {output.ename}: {output.evalue}"
                continue
            if output.output_type == "stream":
                if output.name != "stdout":
                    yield f"code cell {index} writes to {output.name}: {output.text.strip()[:80]!r}"
                texts = [output.text]
            else:
                odd = set(output.data) - {"text/plain", "text/html", "image/png"}
                if odd:
                    yield f"code cell {index} shows {', '.join(sorted(odd))}; expected PNG pictures, text and HTML"
                if output.output_type == "execute_result" and "kexue" not in output.metadata:
                    yield f"code cell {index} ends with a bare object: {output.data.get('text/plain', '')[:60]!r}"
                texts = [text for kind, text in output.data.items() if kind.startswith("text/")]
            if any(re.search(r"\b0x[0-9a-f]{6,}\b", text) for text in texts):
                yield f"code cell {index} shows a memory address"


def _pictures(nb: NotebookNode, _: Mapping[str, Any] | None) -> Iterator[str]:
    shown = 0
    for index, cell in _code(nb):
        images = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
        for png in images:
            try:
                pictures.decode(png)
            except ValueError as error:
                yield f"code cell {index} stores a bad picture: {error}"
        described = cell.metadata.get("mystnb", {})
        if images:
            if len(images) > 1:
                yield f"code cell {index} shows {len(images)} pictures, expected one"
            if not str(described.get("image", {}).get("alt") or "").strip():
                yield f"the picture of code cell {index} has no alt text (cell metadata mystnb: image: alt)"
            if not str(described.get("figure", {}).get("caption") or "").strip():
                yield f"the picture of code cell {index} has no caption (cell metadata mystnb: figure: caption)"
            if not str(described.get("figure", {}).get("name") or "").startswith("fig-"):
                yield f"the picture of code cell {index} has no name fig-... (cell metadata mystnb: figure: name)"
            shown += notebooks.has_tag(cell, "thumbnail")
    if shown != 1:
        yield f"{shown} cells with a picture are tagged 'thumbnail', expected one: the figure to remember"


def _python(nb: NotebookNode, _: Mapping[str, Any] | None) -> Iterator[str]:
    for index, cell in _code(nb):
        try:
            ast.parse(cell.source)
        except SyntaxError as error:
            yield f"code cell {index} is not plain Python (no magics, no shell): {error.msg}"
            continue
        tokens = list(tokenize.generate_tokens(io.StringIO(cell.source).readline))
        ends = (tokenize.NEWLINE, tokenize.COMMENT, tokenize.ENDMARKER)
        if any(token.string == ";" and after.type in ends for token, after in itertools.pairwise(tokens)):
            yield f"code cell {index} relies on a trailing ';', which nbval does not see: assign to _"


def _compares(node: ast.expr) -> bool:
    match node:
        case ast.Compare():
            return True
        case ast.BoolOp(values=parts):
            return any(map(_compares, parts))
        case ast.UnaryOp(op=ast.Not()):
            return True
        case ast.Call(func=function):
            return _name(function) in COMPARING or ast.unparse(function) == "torch.equal"
    return False


def _statements(nb: NotebookNode, _: Mapping[str, Any] | None) -> Iterator[str]:
    for index, node in _syntax(nb):
        if isinstance(node, ast.Expr) and _compares(node.value):
            yield f"code cell {index} has a bare comparison as a statement, which checks nothing: {ast.unparse(node)[:80]!r}"


def _network(nb: NotebookNode, _: Mapping[str, Any] | None) -> Iterator[str]:
    for index, node in _syntax(nb):
        what = ""
        match node:
            case ast.Import(names=names):
                what = next((name.name for name in names if name.name.split(".")[0] in NETWORK), "")
            case ast.ImportFrom(module=str(module), names=names):
                inside = next((name.name for name in names if FETCHING.fullmatch(name.name)), "")
                what = module if module.split(".")[0] in NETWORK else inside
            case ast.Call(func=function, args=arguments, keywords=keywords):
                local = any(k.arg == "local_files_only" and getattr(k.value, "value", None) is True for k in keywords)
                whole = ast.unparse(function)
                if FETCHING.fullmatch(_name(function)) or whole.startswith("torch.hub."):
                    what = whole
                elif _name(function) == "from_pretrained" and not local:
                    what = f"{whole} without local_files_only=True"
                urls = (a.value for a in arguments if isinstance(a, ast.Constant) and isinstance(a.value, str))
                what = what or next((url for url in urls if re.match(r"(https?|ftp|s3|hf)://", url)), "")
        if what:
            yield f"code cell {index} may use the network: {what}"
    for index, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown" and re.search(r"!\[[^\]]*\]\(\s*https?:|<(script|iframe|img|link)\b", cell.source):
            yield f"markdown cell {index} loads something from elsewhere: only links may leave the page"


def _coverage(nb: NotebookNode, _: Mapping[str, Any] | None) -> Iterator[str]:
    try:
        equations = notebooks.equations(nb)
    except ValueError as error:
        yield str(error)
        return
    checks = notebooks.checks(nb)
    if not checks:
        yield "no check ran"
    first = {check["label"]: check["cell"] for check in reversed(checks)}
    for label, equation in equations.items():
        if not re.fullmatch(r"(eq|def)(-[a-z0-9]+)+", label):
            yield f"label {label!r} should begin with eq- (a result) or def- (a definition); lower case, digits, hyphens"
        elif label.startswith("eq-") and label not in first:
            yield f"equation {label} has no check"
        elif label.startswith("eq-") and first[label] < equation.cell:
            yield f"equation {label} stands below its check"
    for label in first:
        if label not in equations:
            yield f"check {label} belongs to no equation of the text"
    for check in checks:
        title = " ".join(filter(None, (check["label"], check["name"])))
        if not check["held"]:
            yield f"check {title} does not hold"
        if not check["rivals"]:
            yield f"check {title} has no rival"
        for rival in check["rivals"]:
            if not rival["rejected"]:
                yield f"check {title} does not reject its rival {rival['name']!r}"
    for correction in notebooks.corrections(nb):
        if correction["check"] not in first:
            yield f"the correction of {correction['article']} points to check {correction['check']!r}, which did not run"


def _ledger(nb: NotebookNode, entry: Mapping[str, Any] | None) -> Iterator[str]:
    cells = list(_code(nb))
    summary = notebooks.summary(NotebookNode(cells=[cells[-1][1]])) if cells else None
    if summary is None:
        yield "the last code cell should show the ledger"
        return
    shown = [{key: value for key, value in check.items() if key != "cell"} for check in notebooks.checks(nb)]
    if summary["checks"] != shown:
        yield f"the ledger lists {len(summary['checks'])} checks, which are not the {len(shown)} that the cells show"
    corrections = [{key: value for key, value in c.items() if key != "cell"} for c in notebooks.corrections(nb)]
    if summary["corrections"] != corrections:
        yield "the ledger's corrections are not those that the cells show"
    if entry is not None and summary["ledger"] != entry["slug"]:
        yield f"the ledger is that of {summary['ledger']!r}, expected {entry['slug']!r}"
    try:
        seed = notebooks.parameters(nb)["seed"]
    except (ValueError, KeyError):
        return
    seeds = {summary["seed"], *(check["seed"] for check in shown)}
    if seeds != {seed}:
        yield f"it was run at seed {', '.join(map(str, sorted(seeds)))}, the parameters cell says {seed}"


RULES: Sequence[Callable[[NotebookNode, Mapping[str, Any] | None], Iterator[str]]] = (
    _heading, _sections, _parameters, _executed, _stored, _sizes, _tags, _outputs, _pictures, _python, _statements, _network,
    _coverage, _ledger,
)
