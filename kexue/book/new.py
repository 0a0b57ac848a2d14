"""Starting a chapter from the template."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import jupytext
import nbformat

from kexue.book import notebooks
from kexue.book.store import clean


def create(root: Path, key: str) -> Path:
    """Write `chapters/<part>/<slug>.ipynb` from the template, with what the catalog says of it; returns its path.

    Raises:
        ValueError: the catalog has no such chapter.
        FileExistsError: the chapter is begun already.
    """
    catalog = notebooks.catalog(root)
    if key not in catalog:
        slug = key.rpartition("/")[2]
        near = [known for known in catalog if known.rpartition("/")[2] == slug] or list(catalog)
        raise ValueError(f"no chapter {key!r} in chapters/catalog.yml; there are: {', '.join(near) or 'none'}")
    path = root / "chapters" / f"{key}.ipynb"
    if path.exists():
        raise FileExistsError(f"{path.relative_to(root)} exists already; expected a chapter that is not begun")
    template = resources.files("kexue.book").joinpath("template.md").read_text("utf-8")
    text = re.sub(r"<<(\w+)>>", lambda match: str(catalog[key][match[1]]), template)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(nbformat.writes(clean(jupytext.reads(text, fmt="md:myst"))) + "\n", "utf-8")
    return path
