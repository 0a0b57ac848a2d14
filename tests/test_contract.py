"""The contract bites: each bad chapter is one fault away from a good one, and is refused for that fault alone."""

from __future__ import annotations

import base64
import copy
import io

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output
from PIL import Image

from kexue.book import contract, notebooks

ENTRY = {"slug": "averages", "part": "sums", "title": "Averages", "title_zh": "平均", "date": "2020-01-02", "archive": 1}


@pytest.fixture(scope="module")
def stored(request):
    return notebooks.read(request.path.parent / "fixtures" / "good.ipynb")


@pytest.fixture
def good(stored):
    return copy.deepcopy(stored)


def code(nb, index):
    return [cell for cell in nb.cells if cell.cell_type == "code"][index]


def text(nb, words):
    return next(cell for cell in nb.cells if cell.cell_type == "markdown" and words in cell.source)


def swap(nb, words, new):
    cell = text(nb, words)
    cell.source = cell.source.replace(words, new)


def record(nb, index, output=0):
    return code(nb, index).outputs[output].metadata["kexue"]


def every_check(nb, label, change):
    """Change a check's record where it is shown and in the ledger alike."""
    shown = [r["metadata"]["kexue"] for cell in nb.cells for r in cell.get("outputs", []) if "kexue" in r.get("metadata", {})]
    for check in [r for r in shown if r.get("label")] + notebooks.summary(nb)["checks"]:
        if check["label"] == label:
            change(check)


def picture(kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def add_code(source):
    """A cell with this source, executed, before the ledger; the ledger's count moves up."""

    def change(nb):
        nb.cells.insert(len(nb.cells) - 2, new_code_cell(source, execution_count=6))
        code(nb, -1).execution_count = 7

    return change


def edit(index, **fields):
    return lambda nb: code(nb, index).update(fields)


def output(index, **fields):
    return lambda nb: code(nb, index).outputs.append(new_output(**fields))


def mystnb(section, field, value):
    return lambda nb: code(nb, 4).metadata["mystnb"][section].update({field: value})


PARAMETERS = {
    "no parameters cell": (lambda nb: code(nb, 0).metadata.pop("tags"), "0 code cells are tagged 'parameters'"),
    "two parameters cells": (lambda nb: code(nb, 1).metadata.update(tags=["parameters"]), "2 code cells are tagged"),
    "derived parameter": (edit(0, source="seed = 0\nn = 2 * 1000"), "'n = 2 * 1000'"),
    "typed parameter": (edit(0, source="seed: int = 0"), "'seed: int = 0'"),
    "parameter twice": (edit(0, source="seed = 0\nseed = 0"), "each name once"),
    "tuple of names": (edit(0, source="seed, n = 0, 1"), "plain literal"),
    "parameters no Python": (edit(0, source="seed ="), "the parameters cell is not Python"),
}
BAD = {
    **{name: (change, reason) for name, (change, reason) in PARAMETERS.items() if name != "parameters no Python"},
    "no seed": (edit(0, source="sead = 0"), "should set seed to an integer"),
    "seed no integer": (edit(0, source="seed = False"), "should set seed to an integer"),
    "parameters not first": (
        lambda nb: (
            code(nb, 0).update(execution_count=2), code(nb, 1).update(execution_count=1), nb.cells.insert(1, nb.cells.pop(2))
        ),
        "should be the first code cell",
    ),
    "another seed": (edit(0, source="seed = 3"), "it was run at seed 0, the parameters cell says 3"),
    "unexecuted cell": (edit(2, execution_count=None), "code cell 4 was not executed"),
    "out of order": (edit(2, execution_count=9), "executed out of order: its count is 9, expected 3"),
    "empty cell": (add_code(" "), "is empty"),
    "stored error": (
        output(1, output_type="error", ename="ValueError", evalue="no", traceback=[]), "stores an error: ValueError",
    ),
    "stderr": (output(1, output_type="stream", name="stderr", text="Warning: careful"), "writes to stderr"),
    "SVG": (output(1, output_type="display_data", data={"image/svg+xml": "<svg/>"}), "shows image/svg+xml"),
    "widget": (output(1, output_type="display_data", data={"application/vnd.jupyter.widget-view+json": {}}), "widget-view"),
    "bare object": (output(1, output_type="execute_result", data={"text/plain": "Text(0, 0)"}), "ends with a bare object"),
    "address": (output(1, output_type="stream", name="stdout", text="<Axes at 0x7f3a12bc>"), "memory address"),
    "two pictures": (
        output(4, output_type="display_data", data={"image/png": picture()}), "code cell 8 shows 2 pictures, expected one",
    ),
    "JPEG in disguise": (lambda nb: code(nb, 4).outputs[-1].data.update({"image/png": picture("JPEG")}), "expected a PNG"),
    "no alt text": (mystnb("image", "alt", " "), "no alt text"),
    "alt text left out": (lambda nb: code(nb, 4).metadata.mystnb.image.pop("alt"), "no alt text"),
    "no caption": (mystnb("figure", "caption", ""), "no caption"),
    "no figure name": (mystnb("figure", "name", "root"), "no name fig-..."),
    "no thumbnail": (lambda nb: code(nb, 4).metadata.pop("tags"), "0 cells with a picture are tagged 'thumbnail'"),
    "raises-exception that does not raise": (
        lambda nb: code(nb, 2).metadata.update(tags=["raises-exception"]), "raises-exception",
    ),
    "nbval skip": (add_code("# NBVAL_SKIP\nx = 1"), "turns nbval off"),
    "unchecked label": (
        lambda nb: nb.cells.insert(5, new_markdown_cell("$$ 1 = 1 $$ (eq-new)", id="new")), "equation eq-new has no check",
    ),
    "label of another kind": (
        lambda nb: nb.cells.insert(5, new_markdown_cell("$$ 1 = 1 $$ (thm-new)", id="new")), "'thm-new' should begin with eq-",
    ),
    "label twice": (
        lambda nb: nb.cells.insert(5, new_markdown_cell("$$ 1 $$ (eq-average-sum)", id="new")), "given twice, in cells 5 and 6",
    ),
    "check above its equation": (lambda nb: nb.cells.insert(3, nb.cells.pop(4)), "stands below its check"),
    "check without a rival": (lambda nb: every_check(nb, "eq-average-sum", lambda c: c.update(rivals=[])), "sum has no rival"),
    "check that does not hold": (lambda nb: every_check(nb, "eq-average-sum", lambda c: c.update(held=False)), "does not hold"),
    "rival that survives": (
        lambda nb: every_check(nb, "eq-average-sum", lambda c: c["rivals"][0].update(rejected=False)),
        "does not reject its rival",
    ),
    "ledger missing": (edit(-1, outputs=[]), "the last code cell should show the ledger"),
    "ledger of another run": (
        lambda nb: notebooks.summary(nb)["checks"][0].update(error=0.5), "are not the 2 that the cells show",
    ),
    "ledger without corrections": (lambda nb: notebooks.summary(nb)["corrections"].clear(), "corrections are not those"),
    "ledger of another chapter": (lambda nb: notebooks.summary(nb).update(ledger="sums"), "ledger is that of 'sums'"),
    "bare comparison": (add_code("x == 1"), "bare comparison as a statement, which checks nothing: 'x == 1'"),
    "bare chained comparison": (add_code("0 < x and x < 1"), "bare comparison"),
    "bare negation": (add_code("if x:\n    not x"), "bare comparison"),
    "bare allclose": (add_code("np.allclose(x, x)"), "bare comparison"),
    "bare torch.equal": (add_code("torch.equal(x, x)"), "bare comparison"),
    "bare all": (add_code("(x > 0).all()"), "bare comparison"),
    "trailing semicolon": (add_code("plt.plot(x);  # drawn"), "relies on a trailing ';'"),
    "network: requests": (add_code("import requests"), "may use the network: requests"),
    "network: urllib": (add_code("from urllib.request import Request"), "may use the network: urllib.request"),
    "network: openml": (add_code("from sklearn.datasets import fetch_openml"), "may use the network: fetch_openml"),
    "network: weights": (add_code("m = transformers.GPT2Model.from_pretrained('gpt2')"), "without local_files_only=True"),
    "network: hub": (add_code("m = torch.hub.load('a/b', 'c')"), "may use the network: torch.hub.load"),
    "network: address": (add_code("t = np.loadtxt('https://example.org/t.csv')"), "https://example.org/t.csv"),
    "network: shell": (add_code("os.system('curl example.org')"), "may use the network: os.system"),
    "network: hidden import": (add_code("r = __import__('requests')"), "may use the network: __import__"),
    "pip": (add_code("!pip install torch"), "not plain Python"),
    "magic": (add_code("%pip install torch"), "not plain Python"),
    "foreign picture": (lambda nb: swap(nb, "An average", "![](https://example.org/a.png)\nAn average"), "loads something from"),
    "long cell": (add_code("x = 1\n" * 41), "has 41 lines, at most 40"),
    "wide line": (add_code(f"x = {10**90}"), "has a line of 95 characters, at most 90"),
    "wide prose": (lambda nb: swap(nb, "An average", f"```\nx = {10**90}\n```\nAn average"), "code in cell 0 has a line of 95"),
    "heavy": (output(1, output_type="stream", name="stdout", text="x" * 400_000), "kB, at most 400"),
    "volatile metadata": (lambda nb: code(nb, 1).metadata.update(execution={"iopub.execute_input": "2020"}), "run kexue store"),
    "kernel version": (lambda nb: nb.metadata.language_info.update(version="3.11.7"), "run kexue store"),
    "title": (lambda nb: swap(nb, "# Averages", "# Means"), "'# Averages · 平均'"),
    "date": (lambda nb: swap(nb, "2020-01-02", "2020-01-03"), "2020-01-02.*'"),
    "link": (lambda nb: swap(nb, "archives/1", "archives/2"), "archives/1"),
    "section missing": (lambda nb: swap(nb, "## In practice", "## By the way"), "no section '## In practice'"),
    "sections out of order": (
        lambda nb: swap(nb, "## Exercises\n\n## References", "## References\n\n## Exercises"), "in the order",
    ),
}


def test_the_good_chapter_keeps_the_contract(good):
    assert contract.violations(good, ENTRY) == []


@pytest.mark.parametrize("name", BAD)
def test_one_fault_is_refused_for_that_fault_alone(good, name):
    change, reason = BAD[name]
    change(good)
    nbformat.validate(good)
    found = contract.violations(good, ENTRY)
    assert len(found) == 1 and reason in found[0]


@pytest.mark.parametrize(
    "source",
    [
        "assert x == 1", "same = x == 1", "ledger.equal('eq-a', 1, 1, rivals={'two': 2})", "x = 1; y = 2",
        "d = loader.load(path)",
        "m = GPT2Model.from_pretrained(folder, local_files_only=True)", "x = 'https://is.only/text'",
        "# requests; np.allclose(x, x);",
    ],
)
def test_honest_cells_pass(good, source):
    add_code(source)(good)
    assert contract.violations(good, ENTRY) == []


def test_faults_that_have_consequences(good, stored):
    def found(change):
        nb = copy.deepcopy(stored)
        change(nb)
        return " | ".join(contract.violations(nb, ENTRY))

    assert "the parameters cell is not Python" in found(PARAMETERS["parameters no Python"][0])
    assert "at most 26" in found(lambda nb: [add_code("x = 1")(nb) for _ in range(21)])
    no_checks = found(lambda nb: (code(nb, 2).outputs.clear(), code(nb, 3).outputs.clear(), code(nb, -1).outputs.clear()))
    assert "no check ran" in no_checks and "eq-average-sum has no check" in no_checks and "show the ledger" in no_checks
    after = found(lambda nb: nb.cells.append(new_code_cell("x = 1", execution_count=7, id="after")))
    assert after == "the last code cell should show the ledger"
    stray = found(lambda nb: swap(nb, "(eq-average-sum)", ""))
    assert "check eq-average-sum belongs to no equation of the text" in stray
    lost = found(lambda nb: record(nb, 3, 1)["correction"].update(check="eq-other"))
    assert "points to check 'eq-other', which did not run" in lost
    assert found(lambda nb: nb.cells.clear())  # an empty notebook is no chapter
    assert contract.violations(good, None) == ["it has no entry in chapters/catalog.yml"]


def test_a_fenced_formula_is_no_formula(good):
    good.cells.insert(5, new_markdown_cell("```latex\n$$ 1 $$ (eq-shown)\n```", id="new"))
    assert contract.violations(good, ENTRY) == []
    good.cells.insert(5, new_markdown_cell("```{prf:theorem}\n$$ 1 $$ (eq-stated)\n```", id="new-2"))
    assert contract.violations(good, ENTRY) == ["equation eq-stated has no check"]


def test_labels_are_unique_in_the_book(good, tmp_path):
    entries = []
    for slug in ("averages", "means"):
        path = tmp_path / "chapters" / "sums" / f"{slug}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nb = copy.deepcopy(good)
        notebooks.summary(nb)["ledger"] = slug
        path.write_text(nbformat.writes(nb), "utf-8")
        entries.append({**ENTRY, "slug": slug})
    (tmp_path / "chapters" / "catalog.yml").write_text(yaml.safe_dump({"parts": [], "chapters": entries}), "utf-8")
    found = contract.book(tmp_path)
    assert found["sums/averages"] == []
    assert len(found["sums/means"]) == 4 and all("is sums/averages's already" in text for text in found["sums/means"])
    assert list(contract.book(tmp_path, ["sums/averages"])) == ["sums/averages"]
    (tmp_path / "chapters" / "sums" / "means.ipynb").write_text("{}", "utf-8")
    broken = contract.book(tmp_path)
    assert broken["sums/averages"] == [] and "means.ipynb: not a notebook" in broken["sums/means"][0]
