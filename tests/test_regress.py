"""The runner: what it refuses, what it records, and that it loses nothing and leaves nothing running."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings

import jupytext
import nbformat
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kexue.book import cli, notebooks, regress, runner
from kexue.book.regress import Result

ROOT = notebooks.ROOT
DEFAULTS = {"seed": 0, "n": 8, "rate": 0.5, "name": "plain", "mood": "well"}


@pytest.fixture
def book(tmp_path, fixtures):
    """A root with the chapter sums/sums, whose `mood` makes it fail in one way or another."""
    path = tmp_path / "chapters" / "sums" / "sums.ipynb"
    path.parent.mkdir(parents=True)
    path.write_text(nbformat.writes(jupytext.read(fixtures / "sums.md")), "utf-8")
    return tmp_path


def sums(book, text="0:1", **options):
    return regress.plan(notebooks.chapters(book), regress.seeds(text), options)


def sweep(book, jobs, **options):
    options = {"workers": 2, "timeout": 600.0, **options}
    return runner.sweep(jobs, root=ROOT, report=book / "report.jsonl", **options)


def result(seed=0, held=True, **fields):
    given = {"chapter": "a/b", "hash": "c", "checks": (("eq-a", ""), ("eq-b", "one")), "seconds": 1.5, "memory": 80.0}
    return Result(**{**given, "parameters": {"seed": seed}, "held": held, "error": "" if held else "lost", **fields})


# What is refused before anything runs ---------------------------------------------------------------


@pytest.mark.parametrize(("text", "expected"), [("7", [7]), ("0:3", [0, 1, 2]), ("1,3,10:12", [1, 3, 10, 11])])
def test_seeds(text, expected):
    assert regress.seeds(text) == expected


@pytest.mark.parametrize("text", ["", "a", "-1", "3:3", "5:2", "0:2,1", "1.5", "0:9:2", "1,"])
def test_bad_seeds_are_refused(text):
    with pytest.raises(ValueError, match="seeds"):
        regress.seeds(text)


@pytest.mark.parametrize(
    ("text", "default", "expected"),
    [
        ("1,2", 0, [1, 2]), ("-4", 4, [-4]), ("1,2.5", 0.0, [1.0, 2.5]), ("1e-3", 1.0, [0.001]),
        ("cpu,cuda", "cpu", ["cpu", "cuda"]), ("3", "a", ["3"]), ("True,False", True, [True, False]),
        ("[1,2],[3]", [0], [[1, 2], [3]]), ("5", None, [5]), ("path/x.csv", None, ["path/x.csv"]),
    ],
)
def test_values(text, default, expected):
    found = regress.values("p", text, default)
    assert found == expected and [type(value) for value in found] == [type(value) for value in expected]


@pytest.mark.parametrize(
    ("text", "default"),
    [("1.5", 1), ("True", 1), ("1", True), ("x", 1), ("x", 0.5), ("1", [1]), ("", 3), ("__import__('os')", 3)],
)
def test_values_of_another_type_are_refused(text, default):
    with pytest.raises(TypeError, match="p "):
        regress.values("p", text, default)


def test_plan_is_the_product_and_records_every_parameter(book):
    jobs = sums(book, "4:6", n="8,16", name="a,b")
    assert [(job.inject["seed"], job.inject["n"], job.inject["name"]) for job in jobs] == [
        (seed, n, name) for seed in (4, 5) for n in (8, 16) for name in "ab"
    ]
    assert jobs[0].parameters == {**DEFAULTS, "seed": 4, "name": "a"}
    assert len({job.key for job in jobs}) == 8


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"m": "3"}, ValueError, "sums/sums has no parameter 'm'; it has: seed, n, rate, name, mood"),
        ({"n": "3.5"}, TypeError, "sums/sums: n should be int like its default 8, got 3.5"),
        ({"seed": "3"}, ValueError, "given as --seeds"),
    ],
)
def test_plan_refuses(book, options, error, message):
    with pytest.raises(error, match=message):
        sums(book, **options)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("seed = 0", "sead = 0", "has no parameter 'seed'"), ("seed = 0", "seed = 0.0", "should be an integer"),
     ("n = 8", "n = 2**3", "sums/sums: the parameters cell has 'n = 2")],
)
def test_plan_refuses_a_bad_parameters_cell(book, old, new, message):
    path = book / "chapters" / "sums" / "sums.ipynb"
    path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")
    with pytest.raises((ValueError, TypeError), match=message):
        sums(book)


@pytest.mark.parametrize("options", [{"workers": 0}, {"timeout": 0.0}, {"timeout": float("nan")}])
def test_sweep_refuses(book, options):
    with pytest.raises(ValueError, match="should be"):
        sweep(book, sums(book), **options)
    assert not (book / "report.jsonl").exists()


@pytest.mark.parametrize("parameter", ["n", "n 3", "=3", "2n=3"])
def test_command_line_refuses_a_parameter_without_a_value(parameter, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert cli.main(["regress", "-p", parameter]) == 2
    assert capsys.readouterr().err.startswith("kexue: -p takes name=v1,v2,...")


# The report -----------------------------------------------------------------------------------------

TEXT = st.text(max_size=8)


@given(
    st.builds(
        Result, chapter=TEXT, parameters=st.dictionaries(TEXT, st.integers() | TEXT | st.booleans() | st.none()), hash=TEXT,
        held=st.booleans(), checks=st.lists(st.tuples(TEXT, TEXT), max_size=3).map(tuple),
        seconds=st.floats(0, 1e6), memory=st.none() | st.floats(0, 1e6), error=TEXT,
    )
)
def test_a_line_is_read_as_it_was_written(original):
    line = original.line()
    assert line.endswith("\n") and line.count("\n") == 1 and "\r" not in line
    assert Result.parse(line) == original


def test_every_tear_of_the_last_line_loses_that_line_alone(tmp_path):
    path = tmp_path / "new" / "report.jsonl"
    first, second, third = (result(seed, error="é\n") for seed in range(3))
    regress.append(path, first)
    whole = path.read_bytes()
    regress.append(path, second)
    both = path.read_bytes()
    for cut in range(len(whole) + 1, len(both) - 1):
        path.write_bytes(both[:cut])
        with pytest.warns(UserWarning, match=r"report.jsonl:2: the last line is torn"):
            assert regress.load(path) == [first]
        regress.append(path, third)
        assert regress.load(path) == [first, third]
    for end in (both[:-1], both):
        path.write_bytes(end)
        assert regress.load(path) == [first, second]
        regress.append(path, third)
        assert regress.load(path) == [first, second, third]


@pytest.mark.parametrize("bad", ["{}", "[]", "nonsense", "", '{"chapter": 1}', result().line().strip().replace("true", '"yes"')])
def test_a_bad_line_is_named_by_file_and_number(tmp_path, bad):
    path = tmp_path / "report.jsonl"
    path.write_text(result().line() + bad + "\n" + result(1).line(), "utf-8")
    with pytest.raises(ValueError, match=r"report\.jsonl:2: not a result"):
        regress.load(path)


def test_no_report_is_no_results(tmp_path):
    assert regress.load(tmp_path / "none.jsonl") == []


def test_fresh_leaves_out_what_is_stale_and_keeps_the_last_of_a_key(book):
    (job,) = sums(book)
    now = {"chapter": "sums/sums", "hash": job.hash}
    failed, held, other = result(held=False, **now), result(**now), result(1, **now)
    stale, gone = result(chapter="sums/sums", hash="old"), result(chapter="sums/gone", hash=job.hash)
    assert regress.fresh([failed, stale, held, other, gone], book) == [held, other]


def test_a_failed_run_counts_against_the_checks_it_did_not_reach():
    runs = [result(0), result(1, held=False, checks=(("eq-a", ""),)), result(2, chapter="a/c", checks=(("eq-c", ""),))]
    assert regress.held(runs) == {("a/b", "eq-a", ""): (2, 2), ("a/b", "eq-b", "one"): (1, 2), ("a/c", "eq-c", ""): (1, 1)}


def test_table():
    lines = regress.table([result(0), result(1, held=False, seconds=12.34, memory=None), result(chapter="a/longer")]).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["a/b", "1", "of", "2", "12.3", "s", "80", "MiB"], ["a/longer", "1", "of", "1", "1.5", "s", "80", "MiB"],
    ]


# Running --------------------------------------------------------------------------------------------


def kernels(book):
    """The kernels at work in a book's folder, whoever started them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(book / "chapters" / "sums") and "ipykernel_launcher" in process.cmdline():
                found.append(process)
    return found


def test_every_way_to_fail_is_recorded_and_the_sweep_goes_on(book):
    endings = {
        "well": "", "crash": "RuntimeError: the sum is lost", "die": "DeadKernelError: Kernel died",
        "leave": "without showing a ledger with checks", "mute": "without showing a ledger with checks",
        "deaf": "the seed 3 did not arrive: the ledger says 0, 3",
    }
    jobs = sums(book, "3", mood=",".join(endings))
    found = {r.parameters["mood"]: r for r in sweep(book, jobs, keep=book / "kept")}
    assert not kernels(book)
    assert {mood for mood, r in found.items() if r.held} == {"well"}
    for mood, ending in endings.items():
        assert found[mood].error.strip().endswith(ending), found[mood].error
    assert 'raise RuntimeError("the sum is lost")' in found["crash"].error and "\x1b" not in found["crash"].error
    assert found["well"].checks == (("eq-sum", ""),) and found["crash"].checks == ()
    assert found["well"].parameters == {**DEFAULTS, "seed": 3} and 10 < found["well"].memory < 2000
    kept = notebooks.read(book / "kept" / "sums" / "sums" / "seed=3 mood=well.ipynb")
    assert notebooks.summary(kept)["seed"] == 3
    # A second sweep finds all in the report; a third tries again what failed.
    before = (book / "report.jsonl").read_bytes()
    assert sweep(book, jobs) == list(found.values()) and (book / "report.jsonl").read_bytes() == before
    mute = sums(book, "3", mood="mute,well")
    assert [r.held for r in sweep(book, mute, retry=True)] == [False, True]
    assert len(regress.load(book / "report.jsonl")) == len(jobs) + 1


def test_a_run_that_exceeds_its_time_is_killed_with_its_kernel(book):
    (well,) = sweep(book, sums(book))
    timeout = round(4 + 3 * well.seconds)
    (hung,) = sweep(book, sums(book, mood="hang"), timeout=timeout)
    assert not kernels(book) and hung.seconds < timeout + 20
    assert "sum(range(4 * 10**9))" in hung.error and hung.error.endswith(f"it did not end within {timeout} s")


def test_a_label_without_a_check_and_a_changed_chapter_are_failures(book):
    path = book / "chapters" / "sums" / "sums.ipynb"
    nb = notebooks.read(path)
    nb.cells.append(nbformat.v4.new_markdown_cell("$$ 1 = 1 $$ (eq-other)", id="new"))
    path.write_text(nbformat.writes(nb), "utf-8")
    (unchecked,) = sweep(book, sums(book))
    assert unchecked.error == "no check of eq-other was made"
    nb.cells.pop()
    nb.cells[2].source += "\nnb = open('sums.ipynb').read()\nopen('sums.ipynb', 'w').write(nb.replace('is lost', 'is gone'))"
    path.write_text(nbformat.writes(nb), "utf-8")
    (changed,) = sweep(book, sums(book))
    assert changed.error == "the chapter or the package changed while it ran"


COMMAND = """
import signal, sys
from pathlib import Path
from kexue.book import notebooks, regress, runner
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background would inherit that it is ignored
root = Path(sys.argv[1])
chapters = notebooks.chapters(root)
jobs = regress.plan(chapters, [0, 1], {"mood": "well"}) + regress.plan(chapters, [2], {"mood": "hang"})
runner.sweep(jobs, root=notebooks.ROOT, report=root / "report.jsonl", workers=2, timeout=600.0)
"""


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_or_killed_sweep_keeps_what_is_finished_and_leaves_no_kernel(book, sign):
    command = [sys.executable, "-c", COMMAND, str(book)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=notebooks.environment(ROOT))
    report = book / "report.jsonl"
    deadline = time.monotonic() + 300
    while not (report.exists() and report.read_text().count("\n") == 2):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    while not (family := kernels(book)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, sign)
    process.wait(60)
    assert psutil.wait_procs(family, timeout=60)[1] == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sorted(r.parameters["seed"] for r in regress.load(report) if r.held) == [0, 1]


def test_status_says_whether_everything_held(book, monkeypatch, capsys):
    def run(jobs, **_):
        for job in jobs:
            held = job.inject["seed"] != 1
            yield Result(job.chapter.key, job.parameters, job.hash, held, (), 1.0, None, "" if held else "x\nlost")

    monkeypatch.setattr(cli, "find_root", lambda: book)
    monkeypatch.setattr(runner, "run", run)
    assert cli.main(["regress", "--seeds", "0"]) == 0
    assert "sums/sums    1 of   1" in capsys.readouterr().out
    assert cli.main(["regress", "sums/sums", "--seeds", "0:3"]) == 1
    shown = capsys.readouterr()
    assert "sums/sums    2 of   3" in shown.out and "sums/sums failed at {'seed': 1" in shown.err
    lines = (book / "reports" / "regress.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["parameters"]["seed"] for line in lines] == [0, 1, 2]


def test_an_interrupt_is_no_success(book, monkeypatch, capsys):
    def interrupt(jobs, **_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(cli, "find_root", lambda: book)
    monkeypatch.setattr(runner, "run", interrupt)
    assert cli.main(["regress"]) == 130
    assert "goes on from there" in capsys.readouterr().err
