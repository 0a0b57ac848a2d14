"""The API reference, read from the sources without importing them."""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Callable, Iterator
from pathlib import Path

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example|Examples|Yields|Note):\s*$")
ITEM = re.compile(r"^(?P<name>[\w*]+(?:, [\w*]+)*)(?: \([^)]*\))?:\s+(?P<text>.*)$", re.S)

Formula = Callable[[str], str]
Definition = ast.FunctionDef | ast.ClassDef


def modules(package: Path) -> dict[str, ast.Module]:
    """The public modules of a package by dotted name; `__init__` of a subpackage stands for its private parts."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts == (package.name,) or "book" in parts or any(part.startswith("_") for part in parts):
            continue
        found[".".join(parts)] = ast.parse(path.read_text("utf-8"))
    return found


def definitions(module: ast.Module) -> list[Definition]:
    """Public functions and classes with a docstring, in the order of the source."""
    found = [node for node in module.body if isinstance(node, Definition)]
    return [node for node in found if not node.name.startswith("_") and ast.get_docstring(node)]


def signature(node: Definition) -> str:
    """`name(arguments) -> result`, without `self`; a class has the arguments of its `__init__`, or its fields."""
    if isinstance(node, ast.ClassDef):
        init = next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)
        if init is None:
            fields = [ast.unparse(part) for part in node.body if isinstance(part, ast.AnnAssign)]
            return f"{node.name}({', '.join(field for field in fields if not field.startswith('_'))})"
        return re.sub(r"\(self(, )?", "(", f"{node.name}({ast.unparse(init.args)})", count=1)
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return re.sub(r"\((self|cls)(, )?", "(", f"{node.name}({ast.unparse(node.args)}){result}", count=1)


def _display(latex: str, formula: Formula) -> str:
    markup = formula(r"\displaystyle " + latex.strip())
    return f'<span class="kexue-scroll kexue-display">{markup}</span>'


def _text(source: str, formula: Formula) -> str:
    out = []
    for i, piece in enumerate(re.split(r"(``[^`]+``|`[^`]+`|\$\$[^$]+\$\$|\$[^$\n]+\$)", source)):
        if piece.startswith("$$"):
            out.append(_display(piece[2:-2], formula))
        elif piece.startswith("$"):
            out.append(formula(piece[1:-1]))
        elif i % 2:
            out.append(f"<code>{html.escape(piece.strip('`'), quote=False)}</code>")
        else:
            out.append(re.sub(r"\*([^*\s][^*\n]*)\*", r"<em>\1</em>", html.escape(piece, quote=False)))
    return "".join(out)


def _blocks(source: str, formula: Formula) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", source.strip("\n")):
        if not block.strip():
            continue
        if block.lstrip().startswith(">>>") or all(line.startswith("    ") for line in block.split("\n")):
            yield f"<pre>{html.escape(block)}</pre>"
        else:
            yield f"<p>{_text(block, formula)}</p>"


def _items(source: str, formula: Formula) -> str:
    items = re.split(r"\n(?! )", source.strip("\n"))
    if not all(ITEM.match(item) for item in items):
        return "".join(_blocks(source, formula))
    rows = [f"<dt><code>{row['name']}</code></dt><dd>{_text(row['text'], formula)}</dd>" for row in map(ITEM.match, items) if row]
    return f"<dl>{''.join(rows)}</dl>"


def docstring(source: str, formula: Formula) -> str:
    """A docstring as HTML: paragraphs, formulas, examples, and its sections as lists."""
    out: list[str] = []
    name, lines = "", list[str]()

    def close() -> None:
        text = "\n".join(lines)
        if not name:
            out.extend(_blocks(text, formula))
            return
        inside = "\n".join(line[4:] for line in lines)
        body = f"<pre>{html.escape(inside.strip())}</pre>" if name.startswith("Example") else _items(inside, formula)
        out.append(f'<div class="kexue-section"><p>{name}</p>{body}</div>')

    for line in source.split("\n"):
        section = SECTION.match(line)
        if section or (name and line and not line.startswith(" ")):
            close()
            name, lines = (section[1], []) if section else ("", [line])
        else:
            lines.append(line)
    close()
    return "".join(out)


def page(package: Path, formula: Formula) -> str:
    """The whole reference as HTML, formulas by `formula`, with an anchor `module.name` at each definition."""
    sections = []
    for module, tree in modules(package).items():
        entries = []
        for node in definitions(tree):
            parts = [(f"{module}.{node.name}", node)]
            if isinstance(node, ast.ClassDef):
                methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
                parts += [
                    (f"{module}.{node.name}.{method.name}", method)  # type: ignore[misc]
                    for method in methods if not method.name.startswith("_") and ast.get_docstring(method)
                ]
            for anchor, part in parts:
                kind = "class " if isinstance(part, ast.ClassDef) else ""
                level = ' class="kexue-method"' if part is not node else ""
                text = docstring(ast.get_docstring(part) or "", formula)
                heading = f'<h3 class="kexue-signature"><code>{kind}{html.escape(signature(part))}</code></h3>'
                entries.append(f'<div id="{anchor}"{level}>{heading}{text}</div>')
        if entries:
            about = docstring(ast.get_docstring(tree) or "", formula)
            body = f"<h2>{module}</h2>{about}{''.join(entries)}"
            sections.append(f'<section class="kexue-reference" id="{module}">{body}</section>')
    return "".join(sections)
