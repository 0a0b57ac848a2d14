"""A chapter as a notebook that reads well in plain Jupyter: MyST roles and directives become Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat.v4 import new_markdown_cell

from kexue.book import notebooks

_ROLE = re.compile(r"\{(?P<name>[a-z][\w:.-]*)\}(?P<ticks>`+)(?P<text>.+?)(?P=ticks)", re.S)
_TARGET = re.compile(r"^\([\w:.-]+\)=\n", re.M)
_EXPLICIT = re.compile(r"^(?P<text>.*?)\s*<(?P<target>[^>]+)>$", re.S)


@dataclass(frozen=True)
class Work:
    """One entry of the bibliography."""

    authors: str
    year: str
    title: str
    venue: str
    url: str

    def line(self) -> str:
        """The work as an item of a list."""
        venue = f" {self.venue}." if self.venue else ""
        return f"- {self.authors} ({self.year}). [{self.title}]({self.url}).{venue}" if self.url else (
            f"- {self.authors} ({self.year}). {self.title}.{venue}"
        )

    def mention(self, *, textual: bool) -> str:
        """Author and year, linked where the work has an address: `Ho et al. (2020)` or `Ho et al., 2020`."""
        text = f"{self.authors} ({self.year})" if textual else f"{self.authors}, {self.year}"
        return f"[{text}]({self.url})" if self.url else text


def bibliography(path: Path) -> dict[str, Work]:
    """The works in a BibTeX file, by key."""
    from pybtex.database import parse_file
    from pybtex.richtext import Text

    def plain(latex: str) -> str:
        return str(Text.from_latex(latex)) if latex else ""

    works = {}
    for key, entry in parse_file(str(path), "bibtex").entries.items():
        names = [plain(" ".join(person.prelast_names + person.last_names)) for person in entry.persons.get("author", [])]
        others = names and names[-1] == "others"
        names = names[:-1] if others else names
        authors = f"{names[0]} et al." if len(names) > 2 or others else " and ".join(names)
        fields = entry.fields
        venue = next((fields[name] for name in ("journal", "booktitle", "publisher") if name in fields), "")
        homes = {"url": "", "eprint": "https://arxiv.org/abs/", "doi": "https://doi.org/"}
        url = next((home + fields[name] for name, home in homes.items() if name in fields), "")
        works[key] = Work(authors or "Anonymous", fields.get("year", "n.d."), plain(fields.get("title", "")), plain(venue), url)
    return works


@dataclass
class Writer:
    """Turns the MyST Markdown of one chapter into plain Markdown.

    Attributes:
        numbers: equation and figure labels to their numbers.
        works: the bibliography by key.
        cited: keys met so far, in order.
    """

    numbers: Mapping[str, str]
    works: Mapping[str, Work]
    cited: dict[str, None]

    def text(self, source: str) -> str:
        """Blocks of Markdown, directives included."""
        out: list[str] = []
        plain: list[str] = []

        def flush() -> None:
            if plain:
                out.append(self.inline("\n".join(plain)))
                plain.clear()

        for part in notebooks.blocks(source):
            if isinstance(part, str):
                plain.append(part)
                continue
            flush()
            if part.name:
                out.append(self.directive(part.name, part.argument, part.inside))
            else:
                out.append("\n".join([part.fence + part.argument, *part.inside, part.fence]))
        flush()
        return "\n".join(out)

    def directive(self, name: str, argument: str, inside: Sequence[str]) -> str:
        """One directive as Markdown."""
        while inside and re.match(r"^:[\w-]+:", inside[0]):
            inside = inside[1:]
        raw = "\n".join(inside).strip("\n")
        if name in notebooks.CODE:
            return f"```{argument}\n{raw}\n```"
        if name == "bibliography":
            return "\n".join(self.works[key].line() for key in self.cited if key in self.works)
        if name == "math":
            return f"$$\n{raw}\n$$"
        body = self.text(raw)
        if name.startswith("solution"):
            return f"<details><summary><b>Solution</b></summary>\n\n{body}\n\n</details>"
        kind = {"admonition": ""}.get(name, name.removeprefix("prf:").replace("-", " ").capitalize())
        title = self.inline(argument)
        heading = f"**{kind} ({title}).**" if kind and title else f"**{kind or title}.**"
        return f"{heading} {body}" if body and not body.startswith(("$$", "```", "-", "|")) else f"{heading}\n\n{body}"

    def inline(self, source: str) -> str:
        """Text without fences: roles, targets and labelled formulas."""
        source = _TARGET.sub("", source)
        source = notebooks._DISPLAY.sub(self._tag, source)
        return _ROLE.sub(lambda role: self._role(role["name"], role["text"]), source)

    def _tag(self, formula: re.Match[str]) -> str:
        number = self.numbers.get(formula["label"] or "")
        latex = formula["latex"].rstrip()
        return f"$${latex} \\tag{{{number}}}\n$$" if number else f"$${formula['latex']}$$"

    def _role(self, name: str, text: str) -> str:
        explicit = _EXPLICIT.match(text)
        shown, target = (explicit["text"], explicit["target"]) if explicit else ("", text)
        if name in ("eq", "math:numref"):
            return f"({self.numbers.get(target, target)})"
        if name.startswith("cite"):
            keys = [key.strip() for key in target.split(",")]
            self.cited.update(dict.fromkeys(keys))
            textual = name.endswith(":t")
            mentions = [self.works[key].mention(textual=textual) if key in self.works else key for key in keys]
            return " and ".join(mentions) if textual else f"({'; '.join(mentions)})"
        if name == "numref":
            return f"Figure {self.numbers[target]}" if target in self.numbers else shown or "the figure"
        if name == "math":
            return f"${target}$"
        if name in ("prf:ref", "ref"):
            return shown or target.replace("-", " ")
        if name == "doc":
            return shown or target.rsplit("/", 1)[-1].replace("-", " ")
        return shown or (f"`{target}`" if name.startswith("py:") or name == "code" else target)


def plain(path: Path, numbers: Mapping[str, str], works: Mapping[str, Work]) -> str:
    """The notebook at `path`, as text, with equation numbers instead of labels and no MyST syntax left.

    Args:
        path: a chapter's notebook.
        numbers: equation and figure labels to the numbers they have on the site.
        works: the bibliography, see `bibliography`.
    """
    nb = notebooks.read(path)
    writer = Writer(numbers, works, {})
    for cell in nb.cells:  # a first pass, for the bibliography lists what is cited after it too
        if cell.cell_type == "markdown":
            writer.text(cell.source)
    cells = []
    for cell in nb.cells:
        cells.append(cell)
        if cell.cell_type == "markdown":
            cell.source = writer.text(cell.source)
            continue
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "kexue" in output.get("metadata", {}) and "text/html" in data:
                data["text/html"] = re.sub(
                    r"\(?<code>(eq-[a-z0-9-]+)</code>\)?", lambda code: f"({numbers.get(code[1], code[1])})", data["text/html"]
                )
        figure = cell.metadata.get("mystnb", {}).get("figure", {})
        if figure.get("caption"):
            number = numbers.get(figure.get("name", ""), "")
            caption = writer.inline(figure["caption"])
            cells.append(new_markdown_cell(f"*Figure {number}.* {caption}" if number else f"*Figure.* {caption}"))
    nb.cells = cells
    if nb.nbformat_minor < 5:
        for cell in nb.cells:
            cell.pop("id", None)
    return nbformat.writes(nb) + "\n"
