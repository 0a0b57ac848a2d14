"""`python -m kexue.book.build`: the site, from the stored notebooks, with warnings as errors."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from kexue.book import assets, contents
from kexue.book.notebooks import ROOT


def build(root: Path = ROOT, *, quiet: bool = False) -> Path:
    """Write `_toc.yml`, fetch KaTeX's assets once, and build the site of `root` into `_build/html`.

    Returns:
        The folder of the site.

    Raises:
        RuntimeError: a warning or an error while building; it was printed.
    """
    from jupyter_book.sphinx import build_sphinx

    root = Path(root).resolve()
    toc = root / "_toc.yml"
    if not toc.exists() or toc.read_text("utf-8") != contents.toc(root):
        toc.write_text(contents.toc(root), "utf-8")
    assets.fetch_katex(root / "_build" / "vendor")
    out, cache = root / "_build" / "html", root / "_build" / ".doctrees"
    result = build_sphinx(
        str(root), str(out), noconfig=True, path_config=str(root / "_config.yml"), doctreedir=str(cache),
        confoverrides={"latex_individualpages": False, "html_extra_path": [str(root / "_build" / "vendor")]},
        warningiserror=True, keep_going=True, quiet=quiet,
    )
    if result != 0:
        (cache / "environment.pickle").unlink(missing_ok=True)  # the next build has to warn again
        raise RuntimeError(f"the site has errors: {result}" if isinstance(result, Exception) else "see the warnings above")
    return out


def main() -> int:
    """Build, and say how to open the site."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (default: this one)")
    root = parser.parse_args().root
    start = time.monotonic()
    try:
        site = build(root)
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        print(f"make book: {error}", file=sys.stderr)
        return 1
    print(f"Built in {time.monotonic() - start:.0f} s. Read it: open {site / 'index.html'}, or `make serve`.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
