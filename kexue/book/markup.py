"""HTML of what the site adds to the text: verdict lines, chapter headers, the ledger, cards, corrections."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from kexue.book.contents import Book, Entry

Link = Callable[[str], str]
"""From a page's name to its address, relative to the page being written."""
Number = Callable[[str, str], str]
"""From a page's name and a label to the equation's number."""

CJK = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef][\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\u3000-\u303f“”·—…:,、]*")


def count(n: int, noun: str) -> str:
    """`3 checks`, `1 check`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def number(value: float | str) -> str:
    """A measured number to two digits: `0.31`, `2.2 × 10<sup>−16</sup>`; text as it is."""
    if isinstance(value, str):
        return html.escape(value)
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return (f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}").replace("-", "−")
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}×10<sup>{int(exponent)}</sup>".replace("-", "−")


def scientific(text: str) -> str:
    """A number written by the ledger, `2.5e-05`, as `2.5×10<sup>−5</sup>`; other text as it is."""
    split = re.fullmatch(r"(-?[\d.]+)e([+-]\d+)", text)
    return f"{split[1]}×10<sup>{int(split[2])}</sup>".replace("-", "−") if split else text


def title(entry: Entry) -> str:
    """Number and English title."""
    return f'<span class="kexue-no">{entry.number}</span> {html.escape(entry.about["title"])}'


def inline(text: str, formula: Callable[[str], str]) -> str:
    """A sentence as HTML: `$math$` by `formula`, `code` in backquotes, the rest escaped."""
    pieces = re.split(r"(\$[^$]+\$|`[^`]+`)", text)
    return "".join(
        formula(piece[1:-1]) if piece.startswith("$") and len(piece) > 2
        else f"<code>{html.escape(piece[1:-1])}</code>" if piece.startswith("`") and len(piece) > 2
        else html.escape(piece, quote=False)
        for piece in pieces
    )


def _seeds(entry: Entry, checks: Iterable[dict[str, Any]]) -> str:
    checks = list(checks)
    if not entry.seeds.runs:
        return "held at the stored seed"
    text = f"held at {entry.seeds.worst(checks)} of {count(entry.seeds.runs, 'seed')}"
    if entry.sizes.runs:
        text += f", {entry.sizes.worst(checks)} of {count(entry.sizes.runs, 'other size')}"
    return text


def _broken(entry: Entry, checks: Iterable[dict[str, Any]]) -> bool:
    checks = list(checks)
    return any(trials.worst(checks) < trials.runs for trials in (entry.seeds, entry.sizes))


def verdict(entry: Entry, label: str) -> str:
    """The quiet line under an equation: error against tolerance, rivals rejected, seeds held; it leads to the cell."""
    checks = entry.of(label)
    if not checks:
        return ""
    tightest = max(checks, key=lambda check: check["error"] / check["tolerance"] if check["tolerance"] else check["error"])
    what = {"ordering": "p-value", "bound": "excess"}.get(tightest["kind"], "error")
    measured = f"{what} {number(tightest['error'])} ≤ {number(tightest['tolerance'])}"
    if len(checks) > 1:
        measured = f"{len(checks)} checks, tightest {measured}"
    rivals = [rival["name"] for check in checks for rival in check["rivals"] if rival["rejected"]]
    facts = " · ".join([measured, f"{count(len(rivals), 'rival')} rejected", _seeds(entry, checks)])
    mark = "!" if _broken(entry, checks) else "✓"
    rejects = html.escape("Rejected: " + "; ".join(rivals))
    return (
        f'<p class="kexue-verdict{" kexue-broken" if mark == "!" else ""}">'
        f'<a href="#cell-{checks[0]["cell"]}" title="{rejects}"><span class="kexue-mark" aria-hidden="true">{mark}</span>'
        f'<span class="visually-hidden">Checked: </span>{facts}</a></p>\n'
    )


def paper(about: dict[str, Any]) -> str:
    """One paper of the catalog: authors and year, linked to arXiv where it is, the title on hover."""
    text = f"{html.escape(about['authors'])} {about['year']}"
    title = html.escape(about["title"])
    if "arxiv" in about:
        return f'<a class="reference external" href="https://arxiv.org/abs/{about["arxiv"]}" title="{title}">{text}</a>'
    return f'<span title="{title}">{text} ({html.escape(about["venue"])})</span>'


def header(book: Book, entry: Entry, link: Link) -> str:
    """What stands between a chapter's title and its text: part, original, papers, related chapters, counts."""
    about = entry.about
    rows = [(
        "After",
        f'<a class="reference external" href="https://kexue.fm/archives/{about["archive"]}" lang="zh">'
        f'{html.escape(about["title_zh"])}</a>, <time datetime="{about["date"]}">{about["date"]:%-d %B %Y}</time>',
    )]
    if about.get("papers"):
        rows.append(("Papers" if len(about["papers"]) > 1 else "Paper", ", ".join(paper(item) for item in about["papers"])))
    related = [book.by_slug[slug] for slug in about.get("related", []) if slug in book.by_slug]
    if related:
        links = ", ".join(f'<a href="{link(other.docname)}">{html.escape(other.about["title"])}</a>' for other in related)
        rows.append(("Related", links))
    rows.append((
        "Checked",
        f'<a href="#the-ledger">{count(len(entry.results), "result")}, {count(len(entry.checks), "check")}, '
        f'{count(entry.rivals, "rival")} rejected, {_seeds(entry, entry.checks)}</a>',
    ))
    body = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows)
    return f'<div class="kexue-header"><p class="kexue-part">{html.escape(book.part(about["part"]))}</p><dl>{body}</dl></div>\n'


def totals(book: Book) -> str:
    """The book in numbers."""
    sums = book.totals()
    coverage = f"{100 * sums['covered'] / sums['results']:.0f} %" if sums["results"] else "–"
    share = math.floor(1000 * sums["held"] / sums["trials"]) / 10 if sums["trials"] else 0  # never rounded up to 100 %
    facts = [
        ("chapters", sums["chapters"], "chapter" if sums["chapters"] == 1 else "chapters"),
        ("results", sums["results"], "results derived"),
        ("coverage", coverage, "of them checked"),
        ("checks", sums["checks"], "checks"),
        ("rivals", sums["rivals"], "rivals rejected"),
        ("seeds", f"{share:g} %", f"of {sums['trials']} checks run again at other seeds held")
        if sums["trials"]
        else ("seeds", "stored", "seed; no reruns reported"),
    ]
    cells = "".join(f'<div><dt>{name}</dt><dd data-total="{key}">{value}</dd></div>' for key, value, name in facts)
    return f'<dl class="kexue-totals">{cells}</dl>\n'


def ledger(book: Book, link: Link, eqno: Number) -> str:
    """Every check in one table, a body of rows per chapter."""
    kinds = sorted({check["kind"] for entry in book.entries for check in entry.checks})
    chapters = "".join(
        f'<option value="{entry.chapter.slug}">{entry.number} {html.escape(entry.about["title"])}</option>'
        for entry in book.entries
    )
    options = "".join(f'<option value="{kind}">{kind}</option>' for kind in kinds)
    form = (
        '<form class="kexue-filter" hidden>'
        f'<label>Chapter <select name="chapter"><option value="">all</option>{chapters}</select></label>'
        f'<label>Kind <select name="kind"><option value="">all</option>{options}</select></label>'
        '<output aria-live="polite"></output></form>'
    )
    bodies = []
    for entry in book.entries:
        page = link(entry.docname)
        rows = []
        for check in entry.checks:
            name = f" {html.escape(check['name'])}" if check["name"] else ""
            rivals = "; ".join(html.escape(rival["name"]) for rival in check["rivals"])
            seeds = f"{entry.seeds.worst([check])} of {entry.seeds.runs}" if entry.seeds.runs else "stored"
            broken = ' class="kexue-broken"' if _broken(entry, [check]) else ""
            rows.append(
                f'<tr data-kind="{check["kind"]}"{broken}>'
                f'<th scope="row"><a href="{page}#equation-{check["label"]}">'
                f'({eqno(entry.docname, check["label"])})</a>{name}</th>'
                f'<td><a href="{page}#cell-{check["cell"]}">{check["kind"]}</a></td>'
                f"<td>{number(check['error'])}</td><td>{number(check['tolerance'])}</td><td>{check['n']}</td>"
                f'<td data-rivals="{len(check["rivals"])}">{rivals}</td><td>{seeds}</td></tr>'
            )
        bodies.append(
            f'<tbody data-chapter="{entry.chapter.slug}"><tr class="kexue-chapter"><th colspan="7" scope="rowgroup">'
            f'<a href="{page}">{title(entry)}</a></th></tr>{"".join(rows)}</tbody>'
        )
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("Result", "Kind", "Error", "Tolerance", "n", "Rivals rejected", "Seeds held")
    )
    table = f'<table class="kexue-book"><thead><tr>{head}</tr></thead>{"".join(bodies)}</table>'
    return f'{form}<div class="kexue-scroll" tabindex="0" role="region" aria-label="All checks">{table}</div>\n'


def corrections(book: Book, link: Link, eqno: Number, formula: Callable[[str], str]) -> str:
    """Every correction, by chapter."""
    sections = []
    for entry in book.entries:
        if not entry.corrections:
            continue
        about, page = entry.about, link(entry.docname)
        items = "".join(
            f'<li><p class="kexue-claim"><b>In {inline(item["article"], formula)}:</b> {inline(item["claims"], formula)}</p>'
            f'<p class="kexue-finding"><b>We find:</b> {inline(item["finds"], formula)} '
            f'<a href="{page}#equation-{item["check"]}">({eqno(entry.docname, item["check"])})</a></p></li>'
            for item in entry.corrections
        )
        sections.append(
            f'<section class="kexue-corrections"><h2><a href="{page}">{title(entry)}</a></h2>'
            f'<p>After <a class="reference external" href="https://kexue.fm/archives/{about["archive"]}" lang="zh">'
            f'{html.escape(about["title_zh"])}</a></p><ul>{items}</ul></section>'
        )
    return "".join(sections) or "<p>No chapter has entered a correction yet.</p>\n"


def cards(book: Book, link: Link, image: Callable[[Entry], str | None]) -> str:
    """The chapters by part, each with its memorable figure and its sentence."""
    sections = []
    for part in book.parts:
        entries = [entry for entry in book.entries if entry.chapter.part == part["folder"]]
        if not entries:
            continue
        items = []
        for entry in entries:
            source = image(entry)
            alt = html.escape(entry.alt)
            picture = f'<img src="{source}" alt="{alt}" loading="lazy">' if source else '<span class="kexue-blank"></span>'
            about = entry.about
            items.append(
                f'<li><a class="kexue-card" href="{link(entry.docname)}">{picture}<span class="kexue-card-text">'
                f'<span class="kexue-card-title">{title(entry)}</span>'
                f'<span class="kexue-card-original" lang="zh">{html.escape(about["title_zh"])}</span>'
                f'<span class="kexue-card-summary">{html.escape(about["summary"], quote=False)}</span>'
                f'<span class="kexue-card-counts">✓ {count(len(entry.checks), "check")}, '
                f'{count(entry.rivals, "rival")} rejected</span></span></a></li>'
            )
        sections.append(f'<section class="kexue-cards"><h2>{html.escape(part["title"])}</h2><ul>{"".join(items)}</ul></section>')
    return f'<div class="kexue-parts">{"".join(sections)}</div>\n'
