"""The lists of planted faults fit the code they are planted in; and planting one tells caught from missed."""

from __future__ import annotations

import shutil

import faults
import jupytext
import nbformat
import pytest
import yaml

from kexue.book import notebooks

LISTS = faults.load([])
ENTRY = {
    "file": "chapters/sums/sums.ipynb",
    "find": "sum(range(n + 1))",
    "replace": "sum(range(n))",
    "why": "the last one is left out",
}


@pytest.fixture
def tree(tmp_path, fixtures, monkeypatch):
    """A tree with the package, the chapter sums/sums, and what `write` puts into tests/faults/sums.yml."""
    shutil.copytree(notebooks.PACKAGE, tmp_path / "kexue", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(notebooks.ROOT / "pyproject.toml", tmp_path)
    for folder in ("chapters/sums", "tests/faults"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "chapters" / "sums" / "sums.ipynb").write_text(nbformat.writes(jupytext.read(fixtures / "sums.md")), "utf-8")
    monkeypatch.setattr(faults, "ROOT", tmp_path)

    def write(entries):
        (tmp_path / "tests" / "faults" / "sums.yml").write_text(yaml.safe_dump(entries), "utf-8")

    return write


@pytest.mark.parametrize("name", LISTS)
def test_each_fault_fits_its_file_and_somebody_judges_it(name):
    for fault in LISTS[name]:
        assert fault.planted(faults.ROOT)
        assert faults.judges(name, fault.file)
    assert len({(fault.file, fault.find, fault.replace) for fault in LISTS[name]}) == len(LISTS[name])


def test_caught_and_missed(tree, capsys):
    tree([ENTRY, {**ENTRY, "find": 'name = "plain"', "replace": 'name = "other"', "why": "nobody looks at the name"}])
    assert faults.main(["sums", "--jobs", "2"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("caught  sums: the last one is left out  (sums/sums: AssertionError")
    assert shown[1:] == ["MISSED  sums: nobody looks at the name", "sums: 1 of 2 faults caught"]


def test_a_chapter_that_fails_anyway_catches_nothing(tree, capsys):
    path = faults.ROOT / "chapters" / "sums" / "sums.ipynb"
    path.write_text(path.read_text("utf-8").replace("n * (n + 1) // 2", "7"), "utf-8")
    tree([ENTRY])
    assert faults.main(["sums"]) == 2
    assert "sums/sums fails without any fault: AssertionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"find": "seed"}, "occurs 5 times, expected once"),
        ({"find": "unheard of"}, "occurs 0 times, expected once"),
        ({"replace": "sum(range("}, "no Python"),
        ({"replace": ENTRY["find"]}, "changes nothing"),
        ({"file": "chapters/sums/other.ipynb"}, "there is no file"),
        ({"because": "?"}, "should have the texts file, find, replace, why"),
    ],
)
def test_a_fault_that_cannot_be_planted_is_refused(tree, capsys, change, message):
    tree([{**ENTRY, **change}])
    assert faults.main(["sums"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert faults.main(["others"]) == 2
    assert "no list tests/faults/others.yml; there are: sums" in capsys.readouterr().err


def test_the_copy_is_what_is_imported():
    with faults.copied() as root:
        assert faults.imported_from(root) == root.resolve() != notebooks.ROOT


def test_modules_that_a_chapter_imports(tmp_path):
    source = "import kexue.plot\nfrom kexue import attention, losses\nfrom kexue.verify.checks import mean\nimport numpy as np"
    path = tmp_path / "x.ipynb"
    path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])), "utf-8")
    assert faults.modules(path) == {"plot", "attention", "losses", "verify"}
