"""The ledger of a chapter: collects checks, shows each one, and raises when a claim fails.

The `text/plain` shown is the same on every machine. Measured numbers travel in the output's metadata
(key `kexue`) and in the HTML, inside `<span class="kexue-number">` and nowhere else.
"""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Mapping
from typing import Any

import sympy

from kexue.verify import checks
from kexue.verify.checks import Array, Check

LABEL = re.compile(r"eq-[a-z0-9]+(-[a-z0-9]+)*")
CSS_NUMBER = "kexue-number"


class CheckFailed(AssertionError):
    """A claim was measured to be false."""


class RivalSurvived(CheckFailed):
    """A check that cannot tell the claim from a named wrong version of it."""


def _number(value: float | str) -> str:
    text = f"{value:.4g}" if isinstance(value, (int, float)) else value
    return f'<span class="{CSS_NUMBER}">{html.escape(text)}</span>'


def _plain(value: float | str) -> str:
    return f"{value:.6g}" if isinstance(value, (int, float)) else value


class Ledger:
    """The checks of one chapter.

    Args:
        chapter: the chapter's slug.
        seed: the seed in use; it is echoed in the ledger's record, so that a runner can see that it arrived.

    Every method named after a kind in `kexue.verify.checks` takes the label of the equation it checks
    (`eq-...`), the arguments of that function, and an optional `name` that tells apart several checks of
    one label. It raises `CheckFailed` if the claim is false, `RivalSurvived` if a rival passes.

    Example:
        >>> ledger = Ledger("addition", seed=0)
        >>> _ = ledger.equal("eq-sum", measured=1.0 + 2.0, predicted=3.0, rivals={"product": 2.0})
        ✓ eq-sum · equal · holds · rejects: product
    """

    def __init__(self, chapter: str, *, seed: int):
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ValueError(f"seed should be an integer >= 0, got {seed!r}")
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", chapter):
            raise ValueError(f"chapter should be a slug such as 'linear-attention', got {chapter!r}")
        self.chapter, self.seed = chapter, seed
        self.entries: dict[tuple[str, str], Check] = {}
        self.corrections: list[dict[str, str]] = []

    # The kinds ------------------------------------------------------------------------------------

    def equal(
        self, label: str, measured: Array, predicted: Array, *, rivals: Mapping[str, Array],
        rtol: float | None = None, atol: float = 0.0, ops: int = 4096, name: str = "",
    ) -> Check:
        """Arrays agree in the max norm; see `kexue.verify.checks.equal`."""
        self._open(label, name)
        return self._enter(label, name, checks.equal(measured, predicted, rivals=rivals, rtol=rtol, atol=atol, ops=ops))

    def identity(
        self, label: str, left: sympy.Expr, right: sympy.Expr, *, rivals: Mapping[str, sympy.Expr],
        domain: Mapping[sympy.Symbol, tuple[float, float]] | None = None, trials: int = 24, name: str = "",
    ) -> Check:
        """Two SymPy expressions are identically equal; see `kexue.verify.checks.identity`."""
        self._open(label, name)
        return self._enter(
            label, name, checks.identity(left, right, rivals=rivals, domain=domain, trials=trials, seed=self.seed)
        )

    def mean(
        self, label: str, samples: Array, predicted: Array, *, rivals: Mapping[str, Array],
        bias: float = 0.0, z: float = checks.Z, name: str = "",
    ) -> Check:
        """A Monte-Carlo mean agrees with its prediction; see `kexue.verify.checks.mean`."""
        self._open(label, name)
        return self._enter(label, name, checks.mean(samples, predicted, rivals=rivals, bias=bias, z=z))

    def slope(
        self, label: str, x: Array, y: Array, predicted: float, *, tol: float, rivals: Mapping[str, float],
        axes: str = "loglog", z: float = checks.Z, name: str = "",
    ) -> Check:
        """A fitted exponent agrees with its prediction; see `kexue.verify.checks.slope`."""
        self._open(label, name)
        return self._enter(label, name, checks.slope(x, y, predicted, tol=tol, rivals=rivals, axes=axes, z=z))

    def bound(
        self, label: str, lower: Array, upper: Array, *, rivals: Mapping[str, tuple[Array, Array]],
        rtol: float | None = None, atol: float = 0.0, fixed: bool = False, name: str = "",
    ) -> Check:
        """An inequality holds for every trial; see `kexue.verify.checks.bound`."""
        self._open(label, name)
        return self._enter(label, name, checks.bound(lower, upper, rivals=rivals, rtol=rtol, atol=atol, fixed=fixed))

    def ordering(
        self, label: str, greater: Array, less: Array, *, rivals: Mapping[str, tuple[Array, Array]],
        by: float = 0.0, confidence: float = 0.9999, name: str = "",
    ) -> Check:
        """Paired results are ordered; see `kexue.verify.checks.ordering`."""
        self._open(label, name)
        return self._enter(label, name, checks.ordering(greater, less, rivals=rivals, by=by, confidence=confidence))

    def correction(self, *, article: str, claims: str, finds: str, check: str) -> None:
        """Enter a claim of the article that this chapter corrects, sharpens or refutes.

        Args:
            article: where the article says it ("(7)", "section 3").
            claims: what it says; finds: what was found instead. One sentence each; `$math$` is rendered.
            check: label of the check, already entered, that shows it.
        """
        for field, text in {"article": article, "claims": claims, "finds": finds}.items():
            if not text.strip():
                raise ValueError(f"{field} is empty; expected a sentence")
        if check not in {label for label, _ in self.entries}:
            raise ValueError(f"check {check!r} was not entered in this ledger; a correction needs the check that shows it")
        entry = {"article": article, "claims": claims, "finds": finds, "check": check}
        self.corrections.append(entry)
        text = f"Correction of {article}: {claims} We find: {finds} ({check})"
        markup = (
            f'<div class="kexue-correction"><b>Correction of {html.escape(article)}.</b> {html.escape(claims)} '
            f"<b>We find:</b> {html.escape(finds)} (<code>{check}</code>)</div>"
        )
        _show(text, markup, {"correction": entry})

    # Collecting and showing -----------------------------------------------------------------------

    def _open(self, label: str, name: str) -> None:
        if not isinstance(label, str) or not LABEL.fullmatch(label):
            raise ValueError(f"label should look like 'eq-some-name' (lower case, digits, hyphens), got {label!r}")
        if (label, name) in self.entries:
            which = f"{label!r} with name {name!r}" if name else f"{label!r} without a name"
            raise ValueError(f"there is a check of {which} already; give this one another name=")

    def _enter(self, label: str, name: str, check: Check) -> Check:
        title = f"{label} ({name})" if name else label
        facts = (
            f"predicted {_plain(check.predicted)}, measured {_plain(check.measured)}, error {_plain(check.error)}, "
            f"tolerance {_plain(check.tolerance)}, n = {check.n}, seed = {self.seed}"
        )
        if not check.held:
            raise CheckFailed(f"{title}: {check.kind} does not hold: {facts}")
        for rival in check.rivals:
            if not rival.rejected:
                raise RivalSurvived(
                    f"{title}: rival {rival.name!r} is not rejected: {rival.reason}; its error {_plain(rival.error)}, "
                    f"tolerance {_plain(rival.tolerance)}; {facts}"
                )
        self.entries[label, name] = check
        rivals = "; ".join(rival.name for rival in check.rivals)
        _show(f"✓ {' · '.join(filter(None, (label, name, check.kind)))} · holds · rejects: {rivals}",
              _check_html(label, name, check), self._record(label, name, check))
        return check

    def _record(self, label: str, name: str, check: Check) -> dict[str, Any]:
        return {"chapter": self.chapter, "seed": self.seed, "label": label, "name": name, **check.record()}

    def record(self) -> dict[str, Any]:
        """The whole ledger as plain JSON data."""
        return {
            "ledger": self.chapter,
            "seed": self.seed,
            "checks": [self._record(label, name, check) for (label, name), check in self.entries.items()],
            "corrections": self.corrections,
        }

    def __repr__(self) -> str:
        lines = [f"Ledger of {self.chapter}: {len(self.entries)} checks, "
                 f"{sum(len(check.rivals) for check in self.entries.values())} rivals rejected"]
        lines += [f"✓ {' · '.join(filter(None, (label, name, check.kind)))} · {len(check.rivals)} rivals"
                  for (label, name), check in self.entries.items()]
        return "\n".join(lines)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, str], dict[str, Any]]:
        if not self.entries:
            raise ValueError(f"the ledger of {self.chapter} has no checks")
        rows = "".join(
            f"<tr><td><code>{label}</code> {html.escape(name)}</td><td>{check.kind}</td>"
            f"<td>{_number(check.error)}</td><td>{_number(check.tolerance)}</td>"
            f"<td>{'; '.join(html.escape(rival.name) for rival in check.rivals)}</td></tr>"
            for (label, name), check in self.entries.items()
        )
        table = (
            '<table class="kexue-ledger"><thead><tr><th>Result</th><th>Kind</th><th>Error</th><th>Tolerance</th>'
            f"<th>Rivals rejected</th></tr></thead><tbody>{rows}</tbody></table>"
        )
        return {"text/plain": repr(self), "text/html": table}, {"kexue": self.record()}


def _check_html(label: str, name: str, check: Check) -> str:
    rivals = "; ".join(f"{html.escape(rival.name)} ({_number(rival.error)})" for rival in check.rivals)
    error = "p-value" if check.kind == "ordering" else "error"
    return (
        f'<div class="kexue-check">✓ <code>{label}</code> {html.escape(name)} <i>{check.kind}</i>: '
        f"{error} {_number(check.error)}, tolerance {_number(check.tolerance)}, n = {_number(check.n)}; rejects {rivals}</div>"
    )


def _show(text: str, markup: str, record: dict[str, Any]) -> None:
    ipython = sys.modules.get("IPython")
    if ipython is None or ipython.get_ipython() is None or not hasattr(ipython.get_ipython(), "kernel"):
        print(text)
        return
    ipython.display.display({"text/plain": text, "text/html": markup}, raw=True, metadata={"kexue": record})


def table(rows: Mapping[str, Mapping[str, Any] | list[Any]], *, columns: list[str], corner: str = "") -> None:
    """Show a table of measured numbers: rows by name, numbers in the ledger's markup, so that text stays the same.

    Args:
        rows: name of each row to its cells, in the order of `columns` (a list) or by column name (a dict).
        columns: column headings.
        corner: heading of the column of names.

    Raises:
        ValueError: a row whose cells do not fit the columns.
    """
    body, record = [], {}
    for name, cells in rows.items():
        values = [cells[column] for column in columns] if isinstance(cells, Mapping) else list(cells)
        if len(values) != len(columns):
            raise ValueError(f"row {name!r} has {len(values)} cells, expected {len(columns)}: {columns}")
        texts = "".join(
            f"<td>{html.escape(value) if isinstance(value, str) else _number(float(value))}</td>" for value in values
        )
        body.append(f"<tr><th>{html.escape(name)}</th>{texts}</tr>")
        record[name] = {c: v if isinstance(v, str) else float(v) for c, v in zip(columns, values, strict=True)}
    head = "".join(f"<th>{html.escape(column)}</th>" for column in [corner, *columns])
    _show(
        f"Table of {len(rows)} rows ({', '.join(rows)}) by {', '.join(columns)}",
        f'<table class="kexue-table"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>',
        {"table": record},
    )
