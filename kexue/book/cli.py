"""The command `kexue`: regress, store, new, check."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kexue.book import notebooks


def find_root(start: Path | None = None) -> Path:
    """The repository around a folder, here by default: the nearest one with `chapters/` and `kexue/`.

    Raises:
        ValueError: there is none, or `kexue` is imported from somewhere else.
    """
    start = (start or Path.cwd()).resolve()
    for root in (start, *start.parents):
        if (root / "chapters").is_dir() and (root / "kexue" / "__init__.py").is_file():
            if not notebooks.PACKAGE.samefile(root / "kexue"):
                raise ValueError(f"kexue is imported from {notebooks.PACKAGE}, not from {root}: run pip install -e . there")
            return root
    raise ValueError(f"{start} is not inside a copy of the book: no folder above it has chapters/ and kexue/")


def _regress(options: argparse.Namespace, root: Path) -> int:
    from kexue.book import regress, runner

    given = [text.partition("=") for text in options.parameter]
    for name, equals, _ in given:
        if not equals or not name.isidentifier():
            raise ValueError(f"-p takes name=v1,v2,..., got {name + equals!r}")
        if [other for other, _, _ in given].count(name) > 1:
            raise ValueError(f"-p {name} is given twice; expected -p {name}=v1,v2,...")
    jobs = regress.plan(
        notebooks.select(root, options.chapters), regress.seeds(options.seeds), {name: text for name, _, text in given}
    )
    if not jobs:
        raise ValueError("there are no chapters to run")
    try:
        results = runner.sweep(
            jobs, root=root, report=options.report or root / "reports" / "regress.jsonl", workers=options.jobs,
            timeout=options.timeout, keep=options.keep, retry=options.retry,
        )
    except KeyboardInterrupt:
        print("interrupted: what was finished is in the report, and the same command goes on from there", file=sys.stderr)
        return 130
    for result in results:
        if not result.held:
            print(f"\n{result.chapter} failed at {result.parameters}:\n{result.error.rstrip()}", file=sys.stderr)
    print(regress.table(results))
    return 0 if all(result.held for result in results) else 1


def _store(options: argparse.Namespace, root: Path) -> int:
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    from kexue.book import store

    status = 0
    for chapter in notebooks.select(root, options.chapters):
        try:
            print(f"{chapter.key}: {store.store(chapter.path, root)}")
        except (CellExecutionError, DeadKernelError) as error:
            print(f"{chapter.key}: not stored, the file is as it was\n{error}", file=sys.stderr)
            status = 1
    return status


def _new(options: argparse.Namespace, root: Path) -> int:
    from kexue.book import new

    path = new.create(root, options.chapter).relative_to(root)
    print(f"{path}\nNow write it (jupyter lab {path}), then: kexue store {options.chapter} && kexue check {options.chapter}")
    return 0


def _check(options: argparse.Namespace, root: Path) -> int:
    from kexue.book import contract

    found = contract.book(root, options.chapters)
    for key, texts in found.items():
        for text in texts:
            print(f"{key}: {text}", file=sys.stderr)
    broken = sum(map(bool, found.values()))
    print(f"{len(found) - broken} of {len(found)} chapters keep the contract")
    return 1 if broken or not found else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="kexue", description="Run, store, start and check the chapters of the book.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("regress", help="run chapters at other seeds and sizes", description=(
        "Run chapters x seeds x parameters; results go to the report as they come, and what it has is not run again."))
    command.add_argument("chapters", nargs="*", metavar="CHAPTER", help="part/slug; all if none is named")
    command.add_argument("--seeds", default="0:20", help="7, 0:20 (0 to 19), or 1,3,10:13; default %(default)s")
    command.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=V1,V2", help="values of a parameter")
    command.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time; default %(default)s")
    command.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for one run; default %(default)g")
    command.add_argument("--report", type=Path, metavar="FILE", help="default reports/regress.jsonl")
    command.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the executed notebooks there")
    command.add_argument("--retry", action="store_true", help="run again what failed before")
    command.set_defaults(run=_regress)

    command = commands.add_parser("store", help="execute chapters and store them with their outputs")
    command.add_argument("chapters", nargs="+", metavar="CHAPTER", help="part/slug")
    command.set_defaults(run=_store)

    command = commands.add_parser("new", help="start a chapter from the template")
    command.add_argument("chapter", metavar="PART/SLUG", help="an entry of chapters/catalog.yml")
    command.set_defaults(run=_new)

    command = commands.add_parser("check", help="hold stored chapters against the contract")
    command.add_argument("chapters", nargs="*", metavar="CHAPTER", help="part/slug; all if none is named")
    command.set_defaults(run=_check)

    options = parser.parse_args(arguments)
    try:
        return options.run(options, find_root())
    except (ValueError, TypeError, FileExistsError) as error:
        print(f"kexue: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
