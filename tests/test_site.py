"""The built site in a real browser: nothing leaves the host, everything it promises is there."""

from __future__ import annotations

import functools
import gzip
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import nbformat
import pytest

from kexue.book import contents
from kexue.book.notebooks import ROOT, chapters

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
]
PAGE_BUDGET, SHELL_BUDGET = 150_000, 350_000
TOKENS = re.compile(r"\{(?:eq|cite(?::\w+)?|numref|prf:ref|ref|doc)\}`|^[`:]{3,}\{", re.M)


@pytest.fixture(scope="module")
def site() -> Path:
    """The site of this repository, built with warnings as errors."""
    done = subprocess.run([sys.executable, "-m", "kexue.book.build"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"the site does not build without warnings:\n{done.stderr[-3000:]}", pytrace=False)
    return ROOT / "_build" / "html"


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served, on loopback."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium through Playwright."""
    binary = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if binary is None:
        message = "no Chromium is installed: `apt-get install chromium` (Debian, Ubuntu), then run this again"
        if os.environ.get("KEXUE_REQUIRE_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=binary, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def pages(site: Path) -> list[str]:
    """Addresses of all pages that a reader can reach by the menu."""
    whole = [f"{name}.html" for name in ("index", "ledger", "corrections", "reference")]
    return whole + [f"chapters/{chapter.key}.html" for chapter in chapters(ROOT)]


@pytest.fixture
def essays() -> list[str]:
    """Addresses of the chapters' pages."""
    return [f"chapters/{chapter.key}.html" for chapter in chapters(ROOT)]


def recorded(path: Path) -> list[dict[str, Any]]:
    """Checks in the outputs of a notebook, read as JSON, without the code under test."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    found = [o.get("metadata", {}).get("kexue", {}) for cell in cells for o in cell.get("outputs", [])]
    return [record for record in found if "label" in record]


def settled(page: Any, url: str) -> None:
    page.goto(url, wait_until="load")
    page.evaluate("document.fonts.ready")


def test_toc_names_the_chapters_that_exist() -> None:
    assert (ROOT / "_toc.yml").read_text("utf-8") == contents.toc(ROOT), "run `make book`, which writes _toc.yml, and commit it"


def test_every_page_is_quiet_and_stays_at_home(browser: Any, address: str, pages: list[str]) -> None:
    context = browser.new_context()
    page = context.new_page()
    trouble: list[str] = []
    home = urlparse(address).netloc

    def guard(route: Any) -> None:
        request = urlparse(route.request.url)
        if request.scheme in ("http", "https", "ws", "wss") and request.netloc != home:
            trouble.append(f"{page.url} asks {route.request.url}")
            route.abort()
        else:
            route.continue_()

    context.route("**/*", guard)
    loud = ("error", "warning")
    page.on("console", lambda message: trouble.append(f"{page.url}: {message.text}") if message.type in loud else None)
    page.on("pageerror", lambda error: trouble.append(f"{page.url}: {error}"))
    page.on("response", lambda answer: trouble.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None)
    for name in [*pages, "search.html?q=attention", "genindex.html"]:
        settled(page, address + name)
        text = page.inner_text("body")
        assert "Traceback (most recent call last)" not in text, name
        assert page.locator("html").get_attribute("lang") == "en", name
        assert page.locator("h1:visible").count() == 1, name
        assert page.locator(".katex-error").count() == 0, name
    context.close()
    assert not trouble


def test_no_page_names_a_foreign_resource(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text("utf-8")
        for tag in re.findall(r"<(?:script|img|iframe|source|video|audio|object)\b[^>]*>|<link\b[^>]*>", text):
            foreign = re.search(r'(?:src|href|data)="(?:https?:)?//([^"]*)', tag)
            assert foreign is None or 'rel="canonical"' in tag, f"{path.relative_to(site)}: {tag}"
    for path in [*site.rglob("*.css"), *(site / "_static").glob("*.js")]:
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", path.read_text("utf-8", errors="replace")), path


def test_every_internal_link_lands(site: Path) -> None:
    ids: dict[Path, set[str]] = {}
    for path in site.rglob("*.html"):
        ids[path] = {html.unescape(name) for name in re.findall(r'\sid="([^"]+)"', path.read_text("utf-8"))}
    broken = []
    for path in ids:
        for target in re.findall(r'<a\b[^>]*\shref="([^"]+)"', path.read_text("utf-8")):
            link, fragment = urldefrag(html.unescape(target))
            if urlparse(link).scheme or link.startswith("//"):
                continue
            goal = (path.parent / unquote(urljoin("", link))).resolve() if link else path
            if not goal.exists() or (fragment and goal.suffix == ".html" and unquote(fragment) not in ids.get(goal, set())):
                broken.append(f"{path.relative_to(site)}: {target}")
    assert not broken


def test_formulas_fit_a_desktop(browser: Any, address: str, pages: list[str]) -> None:
    context = browser.new_context(viewport={"width": 1250, "height": 900})
    page = context.new_page()
    cut = []
    for name in pages:
        settled(page, address + name)
        cut += page.evaluate(
            "[...document.querySelectorAll('div.math')].filter(e => [...e.querySelectorAll('.kexue-scroll')]"
            ".some(s => s.scrollWidth > s.clientWidth + 1)).map(e => e.id)"
        )
    context.close()
    assert not cut


def test_a_phone_scrolls_in_one_direction(browser: Any, address: str, pages: list[str]) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    wide = {}
    for name in pages:
        settled(page, address + name)
        width = page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")
        if width > 390:
            wide[name] = width
    context.close()
    assert not wide


def test_text_formulas_and_ledger_need_no_script(browser: Any, address: str, essays: list[str]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    for chapter, name in zip(chapters(ROOT), essays):
        page.goto(address + name)
        cells = json.loads(chapter.path.read_text("utf-8"))["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        labels = re.findall(r"\$\$ \(((?:eq|def)-[\w-]+)\)", text)
        assert labels
        assert page.locator("div.math .katex-display").count() >= len(labels)
        for label in labels:
            formula = page.locator(f"#equation-{label} .katex-html")
            box = formula.first.bounding_box()
            assert box and box["width"] > 5 and box["height"] > 5, label
        checked = {record["label"] for record in recorded(chapter.path)}
        assert page.locator(".kexue-verdict").count() == len(checked)
        assert page.locator("article p").first.is_visible()
        assert page.locator("html").get_attribute("data-theme") == "light"
        assert not page.locator(".pst-js-only:visible").count()
    page.goto(address + "ledger.html")
    rows = page.locator(".kexue-book tr[data-kind]")
    assert rows.count() == sum(len(recorded(chapter.path)) for chapter in chapters(ROOT))
    assert rows.first.is_visible() and not page.locator(".kexue-filter").is_visible()
    context.close()


def test_links_to_equations_and_cells_jump(browser: Any, address: str, essays: list[str]) -> None:
    page = browser.new_page()
    in_view = """element => { const box = element.getBoundingClientRect();
        return box.bottom > 0 && box.top < innerHeight && box.height > 0 }"""
    for name in essays:
        settled(page, address + name)
        for selector in ('article a[href^="#equation-"]:not(.headerlink):visible', ".kexue-verdict a"):
            link = page.locator(selector).last
            target = link.get_attribute("href")
            link.click()
            assert page.url.endswith(target)
            landed = page.locator(f'[id="{target[1:]}"]')
            page.wait_for_function(f"id => ({in_view})(document.getElementById(id))", arg=target[1:], timeout=5000)
            assert landed.evaluate(in_view), f"{name}: {target} is out of sight"
            if target.startswith("#cell-"):
                assert "cell" in landed.get_attribute("class").split()
    page.close()


def test_ledger_totals_and_filter_agree_with_the_notebooks(browser: Any, address: str) -> None:
    books = {chapter.slug: recorded(chapter.path) for chapter in chapters(ROOT)}
    records = [record for found in books.values() for record in found]
    page = browser.new_page()
    for name in ("index.html", "ledger.html"):
        settled(page, address + name)
        keys = ("chapters", "results", "coverage", "checks", "rivals")
        shown = {key: page.locator(f'[data-total="{key}"]').inner_text() for key in keys}
        labels = {(slug, record["label"]) for slug, found in books.items() for record in found}
        assert shown == {
            "chapters": str(len(books)), "results": str(len(labels)), "coverage": "100 %", "checks": str(len(records)),
            "rivals": str(sum(len(record["rivals"]) for record in records)),
        }

    def visible() -> list[str]:
        rows = page.locator(".kexue-book tr[data-kind]")
        return rows.evaluate_all("rows => rows.filter(row => row.offsetParent !== null).map(row => row.dataset.kind)")

    assert Counter(visible()) == Counter(record["kind"] for record in records)
    kind = Counter(record["kind"] for record in records).most_common()[-1][0]
    page.select_option("[name=kind]", kind)
    assert visible() == [kind] * sum(record["kind"] == kind for record in records)
    page.select_option("[name=kind]", "")
    slug = next(iter(books))
    page.select_option("[name=chapter]", slug)
    assert Counter(visible()) == Counter(record["kind"] for record in books[slug])
    assert page.locator(".kexue-filter output").inner_text().startswith(f"{len(books[slug])} checks")
    page.close()


TEXTS = (
    "article p", "article p a:not(.headerlink)", "article h2", "article .katex", ".kexue-verdict a",
    ".kexue-check", ".kexue-check a", ".kexue-correction",
    "article td", "article th", "article pre", "article pre span", "figcaption", ".bd-sidebar-primary a", ".kexue-header dt",
    ".kexue-card-original", "summary", ".admonition-title", ".kexue-totals dt",
)
CONTRAST = """selector => {
  const parse = text => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ground = element => { for (; element; element = element.parentElement) {
    const colour = parse(getComputedStyle(element).backgroundColor);
    if (colour[3] > .5) return colour; } return [255, 255, 255]; };
  return [...document.querySelectorAll(selector)].filter(e => e.offsetParent && e.textContent.trim()).slice(0, 40).map(e => {
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))];
    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.className, e.textContent.slice(0, 40)]; });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(browser: Any, address: str, pages: list[str], scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    faint = []
    for name in pages:
        settled(page, address + name)
        assert page.locator("html").get_attribute("data-theme") == scheme
        for selector in TEXTS:
            faint += [(name, selector, *found) for found in page.evaluate(CONTRAST, selector) if found[0] < 4.5]
    context.close()
    assert not faint


def test_pages_are_light(browser: Any, address: str, essays: list[str], site: Path) -> None:
    for name in essays:
        page = browser.new_page()
        answers: list[Any] = []
        page.on("response", lambda answer, answers=answers: answers.append(answer))
        settled(page, address + name)
        sizes = {}
        for answer in answers:
            if not answer.headers.get("content-type", "").startswith("image/"):
                body = answer.body()
                sizes[answer.url] = len(body) if answer.url.endswith(".woff2") else len(gzip.compress(body, 6))
        page.close()
        assert sizes[address + name] <= PAGE_BUDGET, (name, sizes[address + name])
        assert sum(sizes.values()) <= SHELL_BUDGET, (name, sum(sizes.values()), sizes)


def test_search_finds_a_chapter(browser: Any, address: str) -> None:
    page = browser.new_page()
    chapter = contents.load(ROOT).entries[0]
    word = max(re.findall(r"[A-Za-z]{5,}", chapter.about["title"]), key=len)
    settled(page, address + "index.html")
    page.keyboard.press("Control+k")
    page.keyboard.type(word)
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=*")
    page.wait_for_selector(f'#search-results a[href*="{chapter.chapter.slug}"]', timeout=10_000)
    page.close()


def test_downloads_read_well_in_plain_jupyter(site: Path) -> None:
    for entry in contents.load(ROOT).entries:
        page = (site / f"{entry.docname}.html").read_text("utf-8")
        link = re.search(r'href="([^"]*_sources/[^"]*\.ipynb)"', page)
        assert link, entry.docname
        path = (site / f"{entry.docname}.html").parent / link[1]
        nb = nbformat.read(str(path), as_version=4)
        nbformat.validate(nb)
        text = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
        text = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
        assert not TOKENS.search(text), (entry.docname, TOKENS.search(text))
        for label in entry.equations:
            assert f"({label})" not in text
        assert text.count(rf"\tag{{{entry.number}.") == len(entry.equations)
        stored = nbformat.read(str(entry.chapter.path), as_version=4)
        code = [[cell.source for cell in book.cells if cell.cell_type == "code"] for book in (stored, nb)]
        assert code[0] == code[1]


def test_launch_buttons_only_where_they_lead_somewhere(site: Path) -> None:
    configured = re.search(r"^repository:", (ROOT / "_config.yml").read_text("utf-8"), re.M)
    for path in (site / "chapters").rglob("*.html"):
        assert bool(configured) == bool(re.search("mybinder|colab.research", path.read_text("utf-8")))


def test_a_warning_fails_the_build_and_is_not_forgotten(site: Path, tmp_path: Path) -> None:
    for name in ("_config.yml", "references.bib", "index.md", "ledger.md", "corrections.md", "reference.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "_static", tmp_path / "_static")
    shutil.copytree(site.parent / "vendor", tmp_path / "_build" / "vendor")
    chapter = tmp_path / "chapters" / "generative" / "ddpm.ipynb"
    chapter.parent.mkdir(parents=True)
    shutil.copy(ROOT / "chapters" / "catalog.yml", tmp_path / "chapters")
    text = "# A chapter\n\nglued to the text\n$$\na\n$$ (eq-glued)\n\n$$\n\\nosuchmacro\n$$ (eq-macro)"
    cells = [nbformat.v4.new_markdown_cell(text)]
    cells.append(nbformat.v4.new_code_cell("seed = 0", metadata={"tags": ["parameters"]}, execution_count=1))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), str(chapter))
    command = [sys.executable, "-m", "kexue.book.build", "--root", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "nosuchmacro" in done.stderr and "eq-glued is not displayed" in done.stderr
    assert not (tmp_path / "_build" / ".doctrees" / "environment.pickle").exists()
