"""Formulas rendered by KaTeX at build time: HTML and MathML that need no script."""

from __future__ import annotations

import atexit
import json
import subprocess
from functools import cache
from pathlib import Path

from kexue.book.assets import node

SERVER = """
const katex = require(process.argv[1]);
require("readline").createInterface({ input: process.stdin }).on("line", (line) => {
  const [latex, displayMode] = JSON.parse(line);
  let answer;
  try { answer = [katex.renderToString(latex, { displayMode, throwOnError: true, strict: "error" }), ""]; }
  catch (error) { answer = ["", error.message]; }
  console.log(JSON.stringify(answer));
});
"""


class FormulaError(ValueError):
    """KaTeX does not accept a formula."""


@cache
def _server() -> subprocess.Popen[str]:
    """One node for the whole build, and no longer than this process."""
    import sphinxcontrib.katex

    script = Path(sphinxcontrib.katex.__file__).with_name("katex.min.js")
    server = subprocess.Popen(
        [node(), "-e", SERVER, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    atexit.register(server.communicate)  # closes its input, and waits
    return server


@cache
def render(latex: str, display: bool = False) -> str:
    """The formula as HTML with MathML inside.

    Args:
        latex: what stands between the dollars.
        display: whether it stands on its own line.

    Raises:
        FormulaError: an unknown macro, a syntax error, or something that KaTeX would draw only with a warning.
        FileNotFoundError: no node.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps([latex, display]) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    if not answer:
        raise RuntimeError("node ended before it answered; is its version 18 or later?")
    markup, error = json.loads(answer)
    if error:
        raise FormulaError(error)
    return markup
