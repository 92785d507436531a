"""What every notebook must have, as sentences about what is missing."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator

SECTIONS = (
    "Question", "What the paper claims", "Inputs and outputs", "Runtime", "Try it", "Checks", "Where ours differs",
)  # fmt: skip
CHECKED = "nbval-check-output"
UNTESTED = {"nbval-skip", "nbval-raises-exception", "raises-exception", "skip-execution"}
ABSOLUTE = re.compile(r"(?<![\w.:/<])/(?:home|root|work|tmp|Users|usr|opt|var|mnt|private)/|\b[A-Z]:\\\\")
LARGEST = 1_500_000


def problems(book) -> Iterator[str]:
    """Everything that is wrong with a notebook as it is stored, one sentence each."""
    headings = re.findall(r"^#+ +(.+?) *$", "\n".join(c.source for c in book.cells if c.cell_type == "markdown"), re.M)
    places = [headings.index(name) if name in headings else None for name in SECTIONS]
    yield from (f"it has no section {name!r}" for name, place in zip(SECTIONS, places, strict=True) if place is None)
    if None not in places and places != sorted(places):
        yield f"its sections come in another order than {', '.join(SECTIONS)}"
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        yield "its cells were not all executed once, in order"
    if not any(CHECKED in cell.metadata.get("tags", []) for cell in code):
        yield f"no cell is tagged {CHECKED}, so none of its facts is tested"
    for number, cell in enumerate(code, 1):
        yield from (f"code cell {number} {problem}" for problem in _problems_of(cell))
    size = len(json.dumps(book))
    if size > LARGEST:
        yield f"it has {size / 1e6:.1f} MB, more than {LARGEST / 1e6} MB: smaller or fewer pictures"


def _problems_of(cell) -> Iterator[str]:
    tags = set(cell.metadata.get("tags", []))
    if not cell.source.strip():
        yield "is empty"
    if tags & UNTESTED or re.search(r"^\s*#\s*(NBVAL_SKIP|NBVAL_RAISES_EXCEPTION)\b", cell.source, re.M):
        yield "is not tested"
    if CHECKED in tags and not any(output.output_type in ("stream", "execute_result") for output in cell.outputs):
        yield "is to be checked and shows nothing"
    if any(output.output_type == "error" for output in cell.outputs):
        yield "failed"
    if ABSOLUTE.search(json.dumps([_text(output) for output in cell.outputs])):
        yield "shows a path of the machine that it ran on"
    try:
        tree = ast.parse(cell.source)
    except SyntaxError:
        yield "is no plain Python"
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield f"defines {node.name}: what has a body belongs in obclip_core"
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and isinstance(node.value, ast.Lambda):
            yield "assigns a lambda: what has a body belongs in obclip_core"


def _text(output) -> object:
    """An output without its pictures, whose letters mean nothing."""
    data = output.get("data", {})
    return [output.get("text", ""), {kind: text for kind, text in data.items() if not kind.startswith("image/")}]
