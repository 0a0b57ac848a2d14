"""Storing a chapter: pictures, ids, metadata, failures; starting one from the template; nbval on what was stored."""

from __future__ import annotations

import base64
import copy
import io
import shutil
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image

from kexue.book import cli, contract, new, notebooks, pictures, store

ROOT = notebooks.ROOT


def draw(change=None, seed=0, **options):
    """A figure in the book's style: points with error bars around a curve; `change` acts on the data."""
    import matplotlib.pyplot as plt

    from kexue import plot

    generator = np.random.default_rng(seed)
    x = np.linspace(1, 10, 12)
    data = [np.log(x) * (k + 1) + 0.3 * generator.normal(size=12) for k in range(3)]
    theory = np.log(x)
    if change:
        data, theory = change(data, theory)
    with plt.rc_context(plot.STYLE):
        fig, ax = plot.figure()
        for k, y in enumerate(data):
            ax.errorbar(x, y, yerr=0.2, linestyle="none", **options.get(f"line{k}", {}))
        ax.plot(x, theory, **plot.THEORY)
        ax.set(xlabel="$n$", ylabel="loss (nats)", ylim=(-1, 9))
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", bbox_inches="tight")
        plt.close(fig)
    return buffer.getvalue()


def shade(level, size=(200, 120)):
    ramp = np.linspace(0, level, size[0])[None, :].repeat(size[1], 0)
    buffer = io.BytesIO()
    Image.fromarray(ramp.round().astype(np.uint8)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def jitter(size):
    noise = np.random.default_rng(1)
    return lambda data, theory: ([y * (1 + size * noise.normal(size=12)) for y in data], theory)


@pytest.fixture(scope="module")
def figure():
    return draw()


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 3e-3])
def test_the_same_picture_up_to_rounding_passes(figure, size):
    assert pictures.difference(figure, draw(jitter(size))) == ""


@pytest.mark.parametrize(
    "change",
    [
        lambda data, theory: (data, 1.3 * theory),
        lambda data, theory: (data, theory + 0.3),
        lambda data, theory: ([data[0] + 0.5, *data[1:]], theory),
        lambda data, theory: ([*data[:2], data[2][::-1]], theory),
        lambda data, theory: (data[:2], theory),
        jitter(0.1),
    ],
    ids=["theory's slope", "theory's height", "a series", "reversed", "a series missing", "noise"],
)
def test_another_curve_is_seen(figure, change):
    assert "have no like" in pictures.difference(figure, draw(change))


def test_another_seed_colour_shade_or_size_is_seen(figure):
    assert pictures.difference(figure, draw(seed=1))
    assert pictures.difference(figure, draw(line0={"color": "#CC79A7"}))
    assert pictures.difference(shade(200), shade(201)) == ""
    assert "grey levels" in pictures.difference(shade(200), shade(206))
    assert "size 210 x 120 pixels, stored 200 x 120" in pictures.difference(shade(200), shade(200, (210, 120)))


def test_optimised_pictures_are_smaller_and_look_the_same(figure):
    for data, lossless in ((figure, False), (shade(255), True)):
        small = pictures.decode(pictures.optimise(base64.b64encode(data).decode()))
        assert len(small) < len(data) and pictures.difference(data, small) == ""
        assert not lossless or (pictures._pixels(data) == pictures._pixels(small)).all()


def test_photographs_keep_their_shades():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    small = pictures.optimise(base64.b64encode(buffer.getvalue()).decode())
    assert (pictures._pixels(pictures.decode(small)) == noise).all()


@pytest.mark.parametrize("data", [b"GIF89a", b""])
def test_what_is_no_png_is_refused(data):
    with pytest.raises(ValueError, match="expected a PNG"):
        pictures.decode(base64.b64encode(data).decode())


def test_clean_leaves_no_trace_of_the_run_and_keeps_the_stored_picture(figure):
    def chapter(png):
        data = {"image/png": base64.b64encode(png).decode()}
        shown = nbformat.v4.new_output("display_data", data, metadata={"kexue": {"a": 1}, "b": 2})
        traces = {"execution": {"a": "b"}, "tags": ["thumbnail"]}
        cell = new_code_cell("draw()", outputs=[shown], execution_count=1, metadata=traces)
        cells = [cell, new_markdown_cell("a"), new_markdown_cell("a")]
        return new_notebook(cells=cells, metadata={"widgets": {}, "jupytext": {}})

    first = store.clean(chapter(figure))
    nbformat.validate(first)
    assert first.metadata == store.METADATA and first.cells[0].metadata == {"tags": ["thumbnail"]}
    assert first.cells[0].outputs[0].metadata == {"kexue": {"a": 1}}
    assert len({each.id for each in first.cells}) == 3
    again = store.clean(chapter(draw(jitter(1e-3))), first)
    assert nbformat.writes(again) == nbformat.writes(first)
    other = store.clean(chapter(draw(seed=1)), first)
    assert other.cells[0].outputs[0].data != first.cells[0].outputs[0].data
    assert store.clean(chapter(figure)).cells[1].id == first.cells[1].id


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A root of its own with the catalog, and a chapter started from the template."""
    root = tmp_path_factory.mktemp("book")
    (root / "chapters").mkdir()
    shutil.copy(ROOT / "chapters" / "catalog.yml", root / "chapters")
    key = next(iter(notebooks.catalog(ROOT)))
    return root, key, new.create(root, key)


def test_the_template_executes_and_keeps_the_contract(book):
    root, key, path = book
    assert any("was not executed" in text for text in contract.book(root)[key])
    stored = store.store(path, ROOT)
    assert contract.book(root) == {key: []}
    assert stored.size == path.stat().st_size < 60_000 and "too" not in str(stored)
    with pytest.raises(FileExistsError, match="exists already"):
        new.create(root, key)
    with pytest.raises(ValueError, match="no chapter 'losses/unheard-of'"):
        new.create(root, "losses/unheard-of")


def test_a_cell_that_raises_leaves_the_file_as_it_was(tmp_path):
    from nbclient.exceptions import CellExecutionError

    path = tmp_path / "x.ipynb"
    path.write_text(nbformat.writes(new_notebook(cells=[new_code_cell("raise RuntimeError('the reason')")])), "utf-8")
    before = path.read_bytes()
    with pytest.raises(CellExecutionError, match="the reason"):
        store.store(path, ROOT)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_file_that_was_saved_meanwhile_is_left_alone(tmp_path):
    path = tmp_path / "x.ipynb"
    path.write_text(nbformat.writes(new_notebook(cells=[new_code_cell("open('x.ipynb', 'a').write(' ');")])), "utf-8")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="saved by somebody else"):
        store.store(path, ROOT)
    assert path.read_bytes() == before + b" " and list(tmp_path.iterdir()) == [path]


def test_what_is_too_slow_or_too_large_is_said():
    assert str(store.Stored(12.34, 99_000)) == "12.3 s of 40, 99 kB of 400"
    assert str(store.Stored(50.0, 500_000)).endswith(": too slow and too large")


PLAIN = new_notebook(
    metadata=store.METADATA,
    cells=[
        new_code_cell("seed = 0", metadata={"tags": ["parameters"]}),
        new_code_cell(
            "from IPython.display import display\n"
            "html = f'error <span class=\"kexue-number\">{seed + 0.5}</span> of 2'\n"
            "display({'text/plain': '✓ eq-a · holds', 'text/html': html}, raw=True, metadata={'kexue': {'label': 'eq-a'}})"
        ),
        new_code_cell(
            "import base64, io\nimport numpy as np\nfrom PIL import Image\n"
            "y, x = np.mgrid[:120, :200]\nbuffer = io.BytesIO()\n"
            "Image.fromarray(np.where(abs(x - y) < 3, 0, 255).astype(np.uint8)).save(buffer, 'PNG')\n"
            "png = base64.b64encode(buffer.getvalue()).decode()\n"
            "display({'text/plain': 'a line', 'image/png': png}, raw=True)"
        ),
    ],
)


def swap(kind, words, new):
    def change(nb):
        data = nb.cells[1].outputs[0].data
        data[kind] = data[kind].replace(words, new)

    return change


def other_line(nb):
    y, x = np.mgrid[:120, :200]
    buffer = io.BytesIO()
    Image.fromarray(np.where(abs(x - 2 * y) < 3, 0, 255).astype(np.uint8)).save(buffer, "PNG")
    nb.cells[2].outputs[0].data["image/png"] = base64.b64encode(buffer.getvalue()).decode()


VARIANTS = {
    "as-stored": (lambda nb: None, ""),
    "another-seed": (lambda nb: nb.cells[0].update(source="seed = 7"), ""),
    "changed-verdict": (swap("text/plain", "holds", "fails"), "Cell outputs differ"),
    "number-outside-the-markup": (swap("text/html", "of 2", "of 3"), "Cell outputs differ"),
    "wrong-picture": (other_line, "stored picture 1 is not what the cell draws"),
    "no-picture": (lambda nb: nb.cells[2].outputs[0].data.pop("image/png"), "draws 1 pictures, stored are 0"),
    "unexecuted": (lambda nb: nb.cells[1].update(execution_count=None, outputs=[]), "the stored cell was not executed"),
    "ignored": (lambda nb: nb.cells[1].metadata.update(tags=["nbval-ignore-output"]), "nbval's comparison (check)"),
    "skipped": (lambda nb: nb.cells[1].metadata.update(tags=["nbval-skip"]), "nbval's comparison (skip)"),
    "raises": (lambda nb: nb.cells[1].metadata.update(tags=["raises-exception"]), "nbval's comparison (check_exception)"),
}


def nbval(folder, *options):
    command = [sys.executable, "-m", "pytest", "-p", "tests.nbval_plugin", "--nbval", "--nbval-sanitize-with"]
    command += ["tests/nbval_sanitize.cfg", "--rootdir", ".", "-c", "pyproject.toml", "--color=no", *options, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_nbval_compares_all_but_the_numbers(tmp_path):
    stored = store.clean(store.execute(PLAIN, tmp_path, ROOT))
    for name, (change, _) in VARIANTS.items():
        nb = copy.deepcopy(stored)
        change(nb)
        (tmp_path / f"{name}.ipynb").write_text(nbformat.writes(nb), "utf-8")
    ran = nbval(tmp_path, "-n", "2", "--dist", "loadscope")
    reports, summary = ran.stdout.split("short test summary info")
    failures = [line for line in summary.splitlines() if line.startswith("FAILED")]
    assert ran.returncode == 1
    for name, (_, reason) in VARIANTS.items():
        mine = [line for line in failures if f"{name}.ipynb" in line]
        assert len(mine) == bool(reason), (name, ran.stdout)
        assert reason in ran.stdout
    assert reports.count("Cell outputs differ") == 2


def test_a_suite_without_checks_fails(tmp_path):
    nb = new_notebook(metadata=store.METADATA, cells=[new_code_cell("x = 1", execution_count=1)])
    (tmp_path / "x.ipynb").write_text(nbformat.writes(nb), "utf-8")
    ran = nbval(tmp_path)
    assert ran.returncode == 1 and "1 passed" in ran.stdout and "a suite in which no check ran has failed" in ran.stdout


def test_command_line_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for arguments, words in {
        ("check", "losses/unheard-of"): "no chapter 'losses/unheard-of'",
        ("store", "losses/unheard-of"): "no chapter 'losses/unheard-of'",
        ("new", "losses/unheard-of"): "no chapter 'losses/unheard-of'",
        ("regress", "losses/unheard-of"): "no chapter 'losses/unheard-of'",
        ("regress", "--seeds", "3:1"): "empty range",
    }.items():
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check"]) == 2
    assert "is not inside a copy of the book" in capsys.readouterr().err
    (tmp_path / "chapters").mkdir()
    (tmp_path / "kexue").mkdir()
    (tmp_path / "kexue" / "__init__.py").touch()
    assert cli.main(["check"]) == 2
    assert "pip install -e ." in capsys.readouterr().err
