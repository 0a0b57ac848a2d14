"""Sphinx extension of the book's site.

It numbers chapters by their place in the catalog, writes a verdict under every checked equation and a header under
every chapter's title, fills the pages about the whole book, offers notebooks that read well without the site, and
leaves out what the theme loads and no page uses.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from kexue.book import contents, download, formulas, markup, reference

HERE = Path(__file__).parent
logger = logging.getLogger(__name__)

UNUSED = {
    "thebe": "", "togglebutton": "toggle-hidden", "sphinx-design": 'class="sd-', "design-tabs": 'class="sd-', "proof": "proof ",
    "exercise": "exercise ", "mystnb": 'class="cell', "copybutton": "highlight", "clipboard": "highlight", "translations": "",
    "katex": 'class="katex',
}
"""Assets by a part of their name, with what the body of a page has to contain for the page to need them ("" is never)."""
CITATION = re.compile(r"^cite-\d+-")


class live(nodes.General, nodes.Element):
    """A place that is filled when the page is written, because what it shows depends on the other pages."""


class Live(SphinxDirective):
    """`{kexue} totals | chapters | ledger | corrections | reference`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        what = self.arguments[0]
        if what not in (known := ("totals", "chapters", "ledger", "corrections", "reference")):
            raise self.error(f"nothing is called {what!r} here; expected one of {', '.join(known)}")
        return [live(what=what)]


def _book(app: Sphinx) -> contents.Book:
    if not hasattr(app, "kexue_book"):
        app.kexue_book = contents.load(Path(app.srcdir))  # type: ignore[attr-defined]
    return app.kexue_book  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------- numbers and titles


def _assign_section_numbers(collector: Any, env: BuildEnvironment) -> list[str]:
    """Number each chapter by its place in the catalog, so that (13.4) is (13.4) whichever chapters exist."""
    old, env.toc_secnumbers = env.toc_secnumbers, {}
    book = _book(env.app)
    for docname, toc in env.tocs.items():
        entry = book.by_docname.get(docname)
        if entry is None:
            continue
        env.toc_secnumbers[docname] = {}
        for depth, heading in enumerate(toc.findall(nodes.reference)):
            secnumber = (entry.number,) if depth == 0 else None
            env.toc_secnumbers[docname][heading["anchorname"]] = secnumber  # type: ignore[assignment]
            heading["secnumber"] = secnumber
        env.titles[docname]["secnumber"] = (entry.number,)
    return [docname for docname in env.tocs if env.toc_secnumbers.get(docname) != old.get(docname)]


def _shorten_titles(app: Sphinx, doctree: nodes.document) -> None:
    """In menus a chapter goes by its English title; its original title stands on its page."""
    env = app.env
    entry = _book(app).by_docname.get(env.docname)
    if entry is None:
        return
    title = entry.about["title"]
    env.titles[env.docname] = nodes.title("", title)
    env.longtitles[env.docname] = env.titles[env.docname]
    _set_text(next(env.tocs[env.docname].findall(nodes.reference)), title)


def _number(env: BuildEnvironment, docname: str, label: str) -> str:
    numbers = env.toc_fignumbers.get(docname, {}).get("displaymath", {}).get(nodes.make_id(f"equation-{label}"), ())
    return ".".join(map(str, numbers))


def _stale(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Pages to write again because what they show of the book has changed."""
    book = _book(app)
    shown = {
        entry.docname: [entry.about, entry.checks, entry.corrections, vars(entry.seeds).__repr__(), vars(entry.sizes).__repr__()]
        for entry in book.entries
    }
    whole = {page: [list(shown.values()), book.parts] for page in ("index", "ledger", "corrections")}
    whole["reference"] = [reference.page(Path(app.srcdir) / "kexue", _formula)]
    titles = {slug: entry.about["title"] for slug, entry in book.by_slug.items()}
    new = {
        name: hashlib.sha256(json.dumps([facts, titles], default=str, sort_keys=True).encode()).hexdigest()
        for name, facts in {**shown, **whole}.items()
    }
    old = getattr(env, "kexue_shown", {})
    env.kexue_shown = new  # type: ignore[attr-defined]
    return [name for name, digest in new.items() if old.get(name) != digest and name in env.found_docs]


def _caption_pictures_alone(render: Callable[..., None]) -> Callable[..., None]:
    """MyST-NB makes a figure of every output of a figure cell; here only a picture becomes one, not the checks beside it."""

    def render_outputs(self: Any, token: Any, outputs: list[Any]) -> None:
        metadata = token.meta["metadata"]
        options = metadata.get("mystnb", {})
        bare = {**metadata, "mystnb": {name: value for name, value in options.items() if name != "figure"}}
        for output in outputs:
            picture = any(kind.startswith("image/") for kind in output.get("data", {}))
            token.meta["metadata"] = metadata if picture else bare
            render(self, token, [output])
        token.meta["metadata"] = metadata

    return render_outputs


# ------------------------------------------------------------------------------------------------------- formulas


def _formula(latex: str, *, display: bool = False, location: Any = None) -> str:
    """A formula as HTML and MathML; one that KaTeX rejects is a warning, and so an error of the build."""
    try:
        return formulas.render(latex, display)
    except formulas.FormulaError as error:
        logger.warning("%s, in the formula %s", error, latex.strip(), location=location)
        return f"<code>{html.escape(latex)}</code>"


def _visit_math(self: Any, node: nodes.math) -> None:
    self.body.append(f'<span class="math">{_formula(node.astext(), location=node)}</span>')
    raise nodes.SkipNode


def _visit_math_block(self: Any, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math"))
    if node["number"]:
        ids = node["ids"][0]
        numbers = self.builder.fignumbers.get("displaymath", {}).get(ids, ())
        self.body.append(f'<span class="eqno">({".".join(map(str, numbers))})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    latex = node.astext()
    if r"\\" in latex and r"\begin" not in latex:
        latex = rf"\begin{{gathered}}{latex}\end{{gathered}}"
    self.body.append(f'<div class="kexue-scroll">{_formula(latex, display=True, location=node)}</div></div>\n')
    raise nodes.SkipNode


# ---------------------------------------------------------------------------------------------------------- pages


def _raw(markup: str) -> nodes.raw:
    return nodes.raw("", markup, format="html")


def _set_text(node: nodes.Element, text: str) -> None:
    node.clear()
    node += nodes.Text(text)


def _mark_chinese(doctree: nodes.document) -> None:
    for text in list(doctree.findall(nodes.Text)):
        if not markup.CJK.search(text) or isinstance(text.parent, (nodes.FixedTextElement, nodes.literal, nodes.raw, nodes.math)):
            continue
        pieces: list[nodes.Node] = []
        end = 0
        for run in markup.CJK.finditer(text):
            pieces += [nodes.Text(text[end : run.start()]), nodes.inline("", run.group(), classes=["language-zh"])]
            end = run.end()
        pieces.append(nodes.Text(text[end:]))
        text.parent.replace(text, [piece for piece in pieces if piece.astext()])


def _fold(doctree: nodes.document) -> None:
    """Admonitions of class `dropdown` become <details>, which fold without a script."""
    for box in list(doctree.findall(nodes.Admonition)):
        if not isinstance(box, nodes.Element) or "dropdown" not in box["classes"] or not isinstance(box[0], nodes.title):
            continue
        ids = "".join(f'<span id="{name}"></span>' for name in box["ids"])
        box.parent.replace(box, [
            _raw(f'{ids}<details class="kexue-fold"><summary>'), nodes.inline("", box[0].astext()), _raw("</summary>"),
            *box.children[1:], _raw("</details>\n"),
        ])


def _own_references(doctree: nodes.document) -> None:
    """A citation leads to the references of its own page, also where an earlier chapter cites the same work."""
    own = {CITATION.sub("", name): name for citation in doctree.findall(nodes.citation) for name in citation["ids"]}
    for link in doctree.findall(nodes.reference):
        anchor = (link.get("refid") or link.get("refuri", "")).rpartition("#")[2]
        if CITATION.match(anchor) and CITATION.sub("", anchor) in own:
            link["refuri"] = "#" + own[CITATION.sub("", anchor)]
            link.attributes.pop("refid", None)


def _chapter(app: Sphinx, doctree: nodes.document, entry: contents.Entry) -> None:
    env, book = app.env, _book(app)
    link = lambda target: app.builder.get_relative_uri(entry.docname, target)  # noqa: E731

    title = next(doctree.findall(nodes.title))
    _set_text(title, entry.about["title"])
    first = title.parent[1]
    if isinstance(first, nodes.paragraph) and f"kexue.fm/archives/{entry.about['archive']}" in "".join(
        target.get("refuri", "") for target in first.findall(nodes.reference)
    ):
        title.parent.remove(first)
    title.parent.insert(1, _raw(markup.header(book, entry, link)))

    for label, equation in entry.equations.items():
        if label not in env.get_domain("math").equations:  # type: ignore[attr-defined]
            hint = "cell %d: the formula labelled %s is not displayed; leave a blank line before its $$"
            logger.warning(hint, equation.cell, label, location=entry.docname)
    for block in list(doctree.findall(nodes.math_block)):
        line = markup.verdict(entry, block.get("label") or "")
        if line:
            block.parent.insert(block.parent.index(block) + 1, _raw(line))
    for cell in doctree.findall(nodes.container):
        if cell.get("nb_element") == "cell_code":
            cell["ids"].append(f"cell-{cell['cell_index']}")
    for output in doctree.findall(nodes.raw):
        text = output.astext()
        if "kexue-" not in text or "html" not in output.get("format", ""):
            continue
        text = re.sub(
            r"\(?<code>(eq-[a-z0-9-]+)</code>\)?",
            lambda code: f'<a href="#equation-{code[1]}" title="{code[1]}">({_number(env, entry.docname, code[1])})</a>', text,
        )
        text = re.sub(
            r'(<span class="kexue-number">)([^<]*)', lambda measured: measured[1] + markup.scientific(measured[2]), text
        )
        if "kexue-correction" in text:
            text = re.sub(r"\$([^$]+)\$", lambda latex: _formula(html.unescape(latex[1])), text)
        if "<table" in text:
            text = f'<div class="kexue-scroll" tabindex="0">{text}</div>'
        _set_text(output, text)


def _resolve(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    book = _book(app)
    if app.builder.format != "html":
        return
    entry = book.by_docname.get(docname)
    if entry is not None:
        _chapter(app, doctree, entry)
        _own_references(doctree)
    _mark_chinese(doctree)
    _fold(doctree)

    link = lambda target: app.builder.get_relative_uri(docname, target)  # noqa: E731
    number = lambda page, label: _number(app.env, page, label)  # noqa: E731
    for place in list(doctree.findall(live)):
        content = {
            "totals": lambda: markup.totals(book),
            "chapters": lambda: markup.cards(book, link, lambda entry: _thumbnail(app, entry)),
            "ledger": lambda: markup.ledger(book, link, number),
            "corrections": lambda: markup.corrections(book, link, number, _formula),
            "reference": lambda: reference.page(Path(app.srcdir) / "kexue", _formula),
        }[place["what"]]()
        place.replace_self(_raw(content))
    for table in list(doctree.findall(nodes.table)):
        table.replace_self([_raw('<div class="kexue-scroll" tabindex="0">'), table.deepcopy(), _raw("</div>")])


def _thumbnail(app: Sphinx, entry: contents.Entry) -> str | None:
    """Write the chapter's memorable figure, small, and return its address relative to the front page."""
    if entry.picture is None:
        return None
    from PIL import Image

    name = f"thumbnail-{entry.chapter.slug}.webp"
    folder = Path(app.outdir) / "_images"
    folder.mkdir(exist_ok=True)
    picture = Image.open(io.BytesIO(entry.picture)).convert("RGB")
    picture.thumbnail((640, 640))
    picture.save(folder / name, "WEBP", quality=80)
    return f"_images/{name}"


# ---------------------------------------------------------------------------------------------------------- shell


def _shell(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Leave out assets that the page does not use; one plain button downloads the notebook."""
    body = context.get("body", "")

    def needed(asset: Any) -> bool:
        if "THEBE" in getattr(asset, "attributes", {}).get("body", ""):
            return False
        name = str(getattr(asset, "filename", asset)).rsplit("/", 1)[-1]
        return all(bool(token) and token in body for part, token in UNUSED.items() if part in name)

    for kind in ("css_files", "script_files"):
        context[kind] = [asset for asset in context[kind] if needed(asset)]
    buttons = [button for button in context.get("header_buttons", []) if button.get("label") != "download-buttons"]
    context["kexue_dropdown"] = any(button.get("type") == "group" for button in buttons)
    if pagename in _book(app).by_docname:
        source = f"{context['pathto']('_sources', 1)}/{context['sourcename']}"
        buttons.append({
            "type": "link", "url": source, "text": "Notebook", "icon": "fas fa-download", "label": "download",
            "tooltip": "Download this chapter as a notebook that reads well in plain Jupyter",
        })
        app.kexue_written.add(pagename)  # type: ignore[attr-defined]
    context["header_buttons"] = buttons


def _downloads(app: Sphinx, error: Exception | None) -> None:
    """Replace the copies of the sources by notebooks that read well in plain Jupyter."""
    if error or app.builder.format != "html":
        return
    book = _book(app)
    works = download.bibliography(Path(app.srcdir) / "references.bib")
    numbers = {label: _number(app.env, entry.docname, label) for entry in book.entries for label in entry.equations}
    for docname in book.by_docname:
        for name, number in app.env.toc_fignumbers.get(docname, {}).get("figure", {}).items():
            numbers[name] = ".".join(map(str, number))
    for docname in sorted(app.kexue_written):  # type: ignore[attr-defined]
        entry = book.by_docname[docname]
        target = Path(app.outdir) / "_sources" / f"{docname}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(download.plain(entry.chapter.path, numbers, works), "utf-8")


def _templates(app: Sphinx, config: Any) -> None:
    config.templates_path.insert(0, str(HERE / "templates"))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    from myst_nb.sphinx_ import SphinxNbRenderer
    from sphinx_external_toc.collectors import TocTreeCollectorWithStyles

    TocTreeCollectorWithStyles.assign_section_numbers = _assign_section_numbers  # type: ignore[method-assign]
    original = SphinxNbRenderer._render_nb_cell_code_outputs
    SphinxNbRenderer._render_nb_cell_code_outputs = _caption_pictures_alone(original)  # type: ignore[method-assign]
    code = b"".join(path.read_bytes() for path in sorted([*HERE.glob("*.py"), *HERE.glob("templates/**/*.html")]))
    app.add_config_value("kexue_site", hashlib.sha256(code).hexdigest(), "html")
    app.kexue_written = set()  # type: ignore[attr-defined]
    app.add_node(live)
    app.add_directive("kexue", Live)
    app.add_css_file("../katex/katex.min.css")
    app.add_html_math_renderer("kexue", (_visit_math, None), (_visit_math_block, None))
    app.connect("config-inited", _templates, priority=900)
    app.connect("doctree-read", _shorten_titles, priority=900)
    app.connect("env-updated", _stale)
    app.connect("doctree-resolved", _resolve, priority=900)
    app.connect("html-page-context", _shell, priority=900)
    app.connect("build-finished", _downloads)
    return {"parallel_read_safe": True, "parallel_write_safe": False}
