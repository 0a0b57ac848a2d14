"""Plant known faults, one at a time, in a copy of the tree, and count how many the tests or the chapters catch.

    python tests/faults.py [NAME...] [--jobs N]

`tests/faults/<name>.yml` is a list of {file, find, replace, why}; `find` occurs exactly once in the file (of a
notebook: in the source of one code cell). A fault in a module is caught if `tests/test_<name>*.py` fail or, if
they pass, a chapter that imports the module fails; a fault in a chapter is caught if the chapter fails. First,
all of these have to pass without a fault.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nbformat
import yaml
from tqdm import tqdm

from kexue.book import notebooks, regress

ROOT = Path(__file__).resolve().parents[1]
KEYS = {"file", "find", "replace", "why"}
SHARE = 0.9
"""Faults that have to be caught, of those planted."""
TIMEOUT = 900


@dataclass(frozen=True)
class Fault:
    """A mistake that somebody would make, and where."""

    name: str
    file: str
    find: str
    replace: str
    why: str

    def planted(self, root: Path) -> str:
        """The text of the file in the tree at `root` with the mistake made.

        Raises:
            ValueError: `find` does not occur exactly once, or what comes of it is no Python.
        """
        path = root / self.file
        where = f"{self.name}.yml: {self.file}: find {self.find!r}"
        if not path.is_file():
            raise ValueError(f"{self.name}.yml: there is no file {self.file!r}")
        if path.suffix == ".ipynb":
            nb = notebooks.read(path)
            hits = [cell for cell in nb.cells if cell.cell_type == "code" and self.find in cell.source]
            count = sum(cell.source.count(self.find) for cell in hits)
            if count == 1:
                hits[0].source = source = hits[0].source.replace(self.find, self.replace)
                text = nbformat.writes(nb)
        else:
            text = path.read_text("utf-8")
            count = text.count(self.find)
            source = text = text.replace(self.find, self.replace)
        if count != 1:
            raise ValueError(f"{where} occurs {count} times, expected once")
        try:
            ast.parse(source)
        except SyntaxError as error:
            raise ValueError(f"{where}: the fault is no Python, so that anything would catch it: {error}") from error
        return text


def load(names: Sequence[str]) -> dict[str, list[Fault]]:
    """The faults of each list named, all lists if none is.

    Raises:
        ValueError: an unknown name or a bad entry.
    """
    paths = {path.stem: path for path in sorted((ROOT / "tests" / "faults").glob("*.yml"))}
    for name in names:
        if name not in paths:
            raise ValueError(f"no list tests/faults/{name}.yml; there are: {', '.join(paths) or 'none'}")
    found: dict[str, list[Fault]] = {}
    for name in names or paths:
        entries = yaml.safe_load(paths[name].read_text("utf-8"))
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{name}.yml: expected a list of faults, got {type(entries).__name__}")
        for number, entry in enumerate(entries, 1):
            if not isinstance(entry, dict) or set(entry) != KEYS or not all(isinstance(text, str) for text in entry.values()):
                raise ValueError(f"{name}.yml: entry {number} should have the texts file, find, replace, why; got {entry!r}")
            if entry["find"] == entry["replace"]:
                raise ValueError(f"{name}.yml: entry {number} changes nothing")
        found[name] = [Fault(name, **entry) for entry in entries]
    return found


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of what the tests and chapters need."""
    with tempfile.TemporaryDirectory(prefix="kexue-faults-") as scratch:
        root = Path(scratch)
        leave_out = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", ".hypothesis")
        for folder in ("kexue", "tests", "chapters"):
            shutil.copytree(ROOT / folder, root / folder, ignore=leave_out)
        shutil.copy(ROOT / "pyproject.toml", root)
        yield root


def run(root: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and output of `python ...` in the copy, with `kexue` from the copy."""
    env = {**notebooks.environment(root), "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=root, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return 124, f"it did not end within {TIMEOUT} s"
    return done.returncode, done.stdout + done.stderr


def imported_from(root: Path) -> Path:
    """Where a Python in the copy imports `kexue` from."""
    return Path(run(root, "-c", "import kexue; print(kexue.__file__)")[1].strip()).resolve().parents[1]


def modules(chapter: Path) -> set[str]:
    """The modules of `kexue` that a chapter imports, as file names without their suffix."""
    found: set[str] = set()
    for cell in notebooks.read(chapter).cells:
        if cell.cell_type != "code":
            continue
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("kexue.")}
            elif isinstance(node, ast.ImportFrom) and node.module == "kexue":
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kexue."):
                found.add(str(node.module).split(".")[1])
    return found


def unit_tests(name: str) -> list[str]:
    """The test modules of a topic: `test_<name>.py` and `test_<name>_*.py`."""
    paths = [*(ROOT / "tests").glob(f"test_{name}.py"), *(ROOT / "tests").glob(f"test_{name}_*.py")]
    return sorted(f"tests/{path.name}" for path in paths)


def judges(name: str, file: str) -> list[tuple[str, Callable[[Path], str]]]:
    """What may catch a fault of the list `name` in `file`: (title, what it says is wrong in a tree, or nothing)."""
    found: list[tuple[str, Callable[[Path], str]]] = []
    if file.endswith(".ipynb"):
        keys = [Path(file).relative_to("chapters").with_suffix("").as_posix()]
    else:
        topic = Path(file).parts[1].removesuffix(".py")
        keys = [chapter.key for chapter in notebooks.chapters(ROOT) if topic in modules(chapter.path)]
        tests = unit_tests(name) or unit_tests(topic)
        if tests:
            found.append((" ".join(tests), lambda root: by_tests(root, tests)))
    found += [(key, lambda root, key=key: by_chapter(root, key)) for key in keys]  # type: ignore[misc]
    if not found:
        raise ValueError(f"{name}.yml: {file}: no tests/test_{name}.py and no chapter that imports it")
    return found


def by_tests(root: Path, tests: Sequence[str]) -> str:
    """The first failure of the unit tests in a tree, if any."""
    status, output = run(root, "-m", "pytest", "-x", "-q", "--tb=line", *tests)
    if status in (0, 1, 2, 124):
        failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return (failed or output.strip().splitlines() or ["failed"])[-1] if status else ""
    raise ValueError(f"pytest {' '.join(tests)} ended with status {status}: {output.strip().splitlines()[-1:]}")


def by_chapter(root: Path, key: str) -> str:
    """What is wrong when the chapter is run in a tree as it is stored, if anything."""
    report = root / "report.jsonl"
    report.unlink(missing_ok=True)
    seed = notebooks.parameters(notebooks.read(root / "chapters" / f"{key}.ipynb"))["seed"]
    order = ["regress", key, "--seeds", str(seed), "--jobs", "1", "--timeout", str(TIMEOUT), "--report", str(report)]
    status, output = run(root, "-m", "kexue.book.cli", *order)
    if not report.exists():
        raise ValueError(f"kexue regress {key} did not run: {output.strip()}")
    (result,) = regress.load(report)
    return result.error.strip().splitlines()[-1] if status else ""


def sound(name: str, faults: Sequence[Fault]) -> None:
    """Raise unless everything that is to catch these faults passes without them, and imports `kexue` from its copy."""
    with copied() as root:
        if imported_from(root) != root.resolve():
            raise ValueError(f"kexue is imported from {imported_from(root)}, expected the copy {root}")
        for title, judge in dict(pair for file in {fault.file for fault in faults} for pair in judges(name, file)).items():
            wrong = judge(root)
            if wrong:
                raise ValueError(f"{name}: {title} fails without any fault: {wrong}")


def catch(fault: Fault) -> str:
    """Who catches a fault, and how; empty if nobody does."""
    with copied() as root:
        (root / fault.file).write_text(fault.planted(root), "utf-8")
        for title, judge in judges(fault.name, fault.file):
            wrong = judge(root)
            if wrong:
                return f"{title}: {wrong}"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Plant known faults and count how many are caught.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="lists tests/faults/NAME.yml; all if none is named")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="faults at a time; default %(default)s")
    options = parser.parse_args(arguments)
    try:
        lists = load(options.names)
        faults = [fault for each in lists.values() for fault in each]
        for fault in faults:
            fault.planted(ROOT)
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(sound, lists, lists.values()))
            outcomes = list(tqdm(pool.map(catch, faults), total=len(faults), desc="faults", unit="fault", disable=None))
    except ValueError as error:
        print(f"faults: {error}", file=sys.stderr)
        return 2
    enough = True
    for name, planted in lists.items():
        caught = 0
        for fault, outcome in zip(faults, outcomes):
            if fault.name == name:
                caught += bool(outcome)
                print(f"{'caught' if outcome else 'MISSED'}  {name}: {fault.why}" + (f"  ({outcome[:100]})" if outcome else ""))
        enough &= caught >= SHARE * len(planted)
        print(f"{name}: {caught} of {len(planted)} faults caught")
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
