"""What nbval lets through, closed: pictures are compared, no cell is left out, and no suite is empty.

    pytest -p tests.nbval_plugin --nbval --nbval-sanitize-with tests/nbval_sanitize.cfg chapters
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from nbval.plugin import IPyNbCell

from kexue.book import notebooks, pictures

COUNTED = "kexue-compared"


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("nbval"):
        raise pytest.UsageError("tests.nbval_plugin needs --nbval: without it no notebook is compared")
    os.environ.pop("MPLBACKEND", None)
    os.environ.update(notebooks.environment(notebooks.ROOT))
    config.pluginmanager.register(_Total(), "kexue-total")


def _pngs(outputs: list[Any]) -> list[bytes]:
    data = [output["data"] for output in outputs if "image/png" in output.get("data", {})]
    return [pictures.decode(each["image/png"]) for each in data]


def _checks(outputs: list[Any]) -> int:
    return sum("label" in output.get("metadata", {}).get("kexue", {}) for output in outputs)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    if not isinstance(item, IPyNbCell):
        return (yield)
    if item.cell.execution_count is None:
        pytest.fail("the stored cell was not executed: nbval would compare nothing; run kexue store", pytrace=False)
    switched = [name for name, value in item.options.items() if bool(value) != (name == "check")]
    if switched:
        pytest.fail(f"tags or comments of the cell switch off nbval's comparison ({', '.join(switched)})", pytrace=False)
    yield
    stored, fresh = _pngs(item.cell.outputs), _pngs(item.test_outputs)
    if len(stored) != len(fresh):
        pytest.fail(f"the cell draws {len(fresh)} pictures, stored are {len(stored)}; run kexue store", pytrace=False)
    for number, pair in enumerate(zip(stored, fresh), 1):
        reason = pictures.difference(*pair)
        if reason:
            pytest.fail(f"stored picture {number} is not what the cell draws: {reason}; run kexue store", pytrace=False)
    counted = {"cells": 1, "pictures": len(stored), "checks": min(_checks(item.cell.outputs), _checks(item.test_outputs))}
    item.user_properties.append((COUNTED, counted))


class _Total:
    """Adds up, over all workers, what was compared."""

    def __init__(self) -> None:
        self.total: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            for name, counted in report.user_properties:
                if name == COUNTED:
                    self.total.update(counted)  # type: ignore[arg-type]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not hasattr(session.config, "workerinput") and not self.total["checks"]:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        total = self.total
        line = f"{total['cells']} cells, {total['checks']} checks and {total['pictures']} pictures agree with what is stored"
        terminalreporter.write_line(line if total["checks"] else f"{line}: a suite in which no check ran has failed")
