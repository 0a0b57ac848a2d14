"""pyproject.toml, constraints.txt and environment.yml agree; the package alone needs nothing but its run-time dependencies."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(name): version
    for name, version in (line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line)
}
REQUIREMENTS = [
    Requirement(text)
    for text in [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
]


def test_constraints_are_exact_pins_without_addresses():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!]*", line), line


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_each_requirement_is_pinned_within_its_range(requirement):
    assert requirement.url is None
    assert Version(PINS[canonicalize_name(requirement.name)]) in requirement.specifier


def test_environment_pins_what_constraints_pin():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"]
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["--constraint constraints.txt", "--editable .[book,test]"]
    assert {"pip", "nodejs", "python=3.11"} <= set(conda)
    pins = dict(entry.split("=") for entry in conda if "=" in entry and not entry.startswith("python="))
    assert {"pytorch-cpu", "jupyterlab-myst"} <= set(pins)
    for name, version in pins.items():
        assert PINS["torch" if name == "pytorch-cpu" else canonicalize_name(name)] == version, name


def test_installed_versions_are_the_pinned_ones():
    from importlib.metadata import version

    for requirement in REQUIREMENTS:
        assert Version(version(requirement.name)).public == PINS[canonicalize_name(requirement.name)], requirement.name


def imports(path: Path) -> list[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return names + [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]


def test_topic_modules_import_only_run_time_dependencies_and_never_the_instrument():
    allowed = {"torch", "numpy", "scipy", "sympy", "ot", "tqdm", *sys.stdlib_module_names}
    for path in sorted((ROOT / "kexue").rglob("*.py")):
        if path.relative_to(ROOT / "kexue").parts[0] in {"book", "verify"}:
            continue
        extra = {"matplotlib", "matplotlib_inline", "cycler"} if path.stem == "plot" else set()
        for module in imports(path):
            assert not module.startswith(("kexue.verify", "kexue.book")), f"{path.name} imports {module}"
            assert module.split(".")[0] in allowed | extra | {"kexue"}, f"{path.name} imports {module}"
    for path in sorted((ROOT / "kexue" / "verify").glob("*.py")):
        topics = [m for m in imports(path) if m.startswith("kexue") and not m.startswith("kexue.verify")]
        assert topics == [], f"{path.name} imports {topics}"


def test_the_package_imports_without_the_books_tools():
    """A process in which matplotlib, IPython and the book's tools cannot be imported still imports every topic module."""
    topics = [path.stem for path in (ROOT / "kexue").glob("[a-z]*.py") if path.stem != "plot"]
    modules = ["kexue.verify", "kexue.transformer", *(f"kexue.{topic}" for topic in topics)]
    script = (
        "import importlib, sys\n"
        "for name in ('matplotlib', 'IPython', 'papermill', 'nbformat', 'PIL', 'sklearn', 'diffusers'):\n"
        "    sys.modules[name] = None\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_repository_names_no_registry_and_no_machine_path():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    forbidden = ["py" + r"pi\.org", "python" + "hosted", "npm" + r"js\.org", "/wo" + "rk/", "/ro" + "ot/", "file:/" + "//"]
    words = re.compile("|".join(forbidden))
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.exists() and path.suffix not in {".png", ".woff2"}:
            found = words.search(path.read_text(errors="replace"))
            assert found is None, f"{name} contains {found.group(0) if found else ''}"
