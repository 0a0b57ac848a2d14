"""Reading chapters: equations, records, parameters, order, content hash."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import nbformat
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from kexue.book import notebooks


def markdown(*sources):
    return new_notebook(cells=[new_markdown_cell(source) for source in sources])


def tagged(source):
    return new_notebook(cells=[new_code_cell(source, metadata={"tags": ["parameters"]})])


@pytest.fixture
def book(tmp_path):
    """A root with three empty chapters, two of them in its catalog."""
    for key in ("b/two", "a/one", "a/stray"):
        path = tmp_path / "chapters" / f"{key}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(nbformat.writes(tagged("seed = 0")), "utf-8")
    entries = [{"part": "b", "slug": "two"}, {"part": "b", "slug": "unwritten"}, {"part": "a", "slug": "one"}]
    (tmp_path / "chapters" / "catalog.yml").write_text(yaml.safe_dump({"chapters": entries}), "utf-8")
    return tmp_path


def test_chapters_come_in_the_catalogs_order_and_strays_last(book):
    assert [chapter.key for chapter in notebooks.chapters(book)] == ["b/two", "a/one", "a/stray"]
    (book / "chapters" / "catalog.yml").unlink()
    assert [chapter.key for chapter in notebooks.chapters(book)] == ["a/one", "a/stray", "b/two"]


def test_select(book):
    assert [chapter.slug for chapter in notebooks.select(book, [])] == ["two", "one", "stray"]
    assert [chapter.slug for chapter in notebooks.select(book, ["a/one", "chapters/b/two.ipynb", "a/one"])] == ["one", "two"]
    with pytest.raises(ValueError, match="no chapter 'a/three'; there are: b/two, a/one, a/stray"):
        notebooks.select(book, ["a/three"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {part: a, slug: b}", "under the key 'chapters'"),
        ("chapters: 3", "under the key 'chapters'"),
        ("chapters: [{part: a}]", "entry 1 should have the keys"),
        ("chapters: [{part: a, slug: b}, {part: a, slug: b}]", "entered twice"),
    ],
)
def test_a_bad_catalog_is_named(book, text, message):
    (book / "chapters" / "catalog.yml").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        notebooks.chapters(book)


@pytest.mark.parametrize("text", ["", "{}", "[]", "print(1)", '{"cells": [], "nbformat": 4}'])
def test_a_file_that_is_no_notebook_is_named(tmp_path, text):
    path = tmp_path / "x.ipynb"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"x\.ipynb: not a notebook"):
        notebooks.read(path)


def test_code_in_prose():
    source = "a\n```{note}\nb\n```\nc\n````python\n```\nd\n````\n~~~~{tip}\n~~~\ne\n~~~\n~~~~\nf"
    assert notebooks.split_code(source) == ("a\nb\nc\n\nf", ["```\nd", "e"])
    assert notebooks.split_code("a\n```\nopen to the end") == ("a", ["open to the end"])


def test_equations():
    nb = markdown(
        "Costs $5, or $$ a = b $$ without a label.\n\n$$\nc\n= d\n$$ (eq-one)\n\n$$ e $$ (def-two) and $$ f $$\n\n(eq-no)",
        "````{prf:theorem}\n```{note}\n$$ g $$ (eq-three)\n```\n````\n"
        "```python\n$$ h $$ (eq-code)\n```\n~~~\n$$ i $$ (eq-tilde)\n~~~",
        "```{note}\nA remark.\n```\n\n$$ j $$ (eq-between)\n\n```{tip}\n$$ k $$ (eq-last)\n```",
    )
    found = notebooks.equations(nb)
    assert {label: (e.cell, e.latex) for label, e in found.items()} == {
        "eq-one": (0, "c\n= d"), "def-two": (0, "e"), "eq-three": (1, "g"),
        "eq-between": (2, "j"), "eq-last": (2, "k"),
    }
    with pytest.raises(ValueError, match="label 'eq-a' is given twice, in cells 0 and 1"):
        notebooks.equations(markdown("$$ a $$ (eq-a)", "$$ b $$ (eq-a)"))


def test_records_of_the_good_chapter(fixtures):
    nb = notebooks.read(fixtures / "good.ipynb")
    checks = notebooks.checks(nb)
    assert [(check["label"], check["cell"], check["kind"]) for check in checks] == [
        ("eq-average-mean", 4, "mean"), ("eq-average-sum", 6, "equal"),
    ]
    assert [(c["article"], c["check"], c["cell"]) for c in notebooks.corrections(nb)] == [("(1)", "eq-average-sum", 6)]
    summary = notebooks.summary(nb)
    assert summary["ledger"] == "averages" and summary["seed"] == 0 and len(summary["checks"]) == 2
    assert notebooks.summary(markdown("no ledger")) is None


LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    st.lists, max_leaves=5,
)


@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9]{0,5}_", fullmatch=True), LITERALS))
def test_parameters_are_what_python_would_assign(values):
    source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    assert notebooks.parameters(tagged(source)) == values


def test_content_hash_sees_code_and_the_modules_it_reaches(tmp_path):
    package = tmp_path / "kexue"
    texts = {
        "__init__.py": "", "used.py": "def f():\n    from . import lazy", "lazy.py": "import kexue.sub.deep",
        "sub/__init__.py": "",
        "sub/deep.py": "from ..last import x", "last.py": "", "other.py": "import kexue.used", "book/__init__.py": "",
        "book/used.py": "", "notes.txt": "",
    }
    for name, text in texts.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text, "utf-8")
    path = tmp_path / "x.ipynb"

    def digest(source="from kexue import used, book\nimport numpy", text="text", outputs=()):
        cells = [new_markdown_cell(text), new_code_cell(source, outputs=list(outputs))]
        path.write_text(nbformat.writes(new_notebook(cells=cells)), "utf-8")
        return notebooks.content_hash(path, package)

    first = digest()
    shown = nbformat.v4.new_output("stream", text="3")
    assert digest(text="other") == digest(outputs=[shown]) == first
    assert digest("from kexue import used, book\nimport numpy as np") != first
    for name, text in texts.items():
        (package / name).write_text(text + "\nx = 2", "utf-8")
        assert (digest() == first) == (name in ("other.py", "book/__init__.py", "book/used.py", "notes.txt")), name
        (package / name).write_text(text, "utf-8")
    (package / "last.py").unlink()
    assert digest() != first


def test_imports_read_are_those_that_python_makes():
    """Oracle: the modules that are loaded after the import statements of a chapter, or of a topic, were run."""
    sources = {path.stem: f"import kexue.{path.stem}" for path in notebooks.PACKAGE.glob("[a-z]*.py")}
    for chapter in notebooks.chapters(notebooks.ROOT):
        cells = [cell for cell in notebooks.read(chapter.path).cells if cell.cell_type == "code"]
        nodes = [node for cell in cells for node in ast.parse(cell.source).body]
        imports = [ast.unparse(node) for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
        sources[chapter.key] = "\n".join(line for line in imports if "kexue" in line)
    code = """if True:
        import json, sys
        for source in json.load(sys.stdin):
            for name in [name for name in sys.modules if name.split(".")[0] == "kexue"]:
                del sys.modules[name]
            exec(source, {})
            print(json.dumps([module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "kexue"]))
    """
    ran = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(list(sources.values())), env=notebooks.environment(notebooks.ROOT),
        capture_output=True, text=True, check=False,
    )
    assert ran.returncode == 0, ran.stderr
    for (name, source), line in zip(sources.items(), ran.stdout.splitlines(), strict=True):
        assert set(json.loads(line)) <= {str(path) for path in notebooks.imported([source])}, name


def test_reading_chapters_does_not_import_torch():
    code = "import sys; from kexue.book import notebooks, regress, contract; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
