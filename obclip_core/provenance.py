"""What a result depends on: sources by following their imports, files by their contents."""

from __future__ import annotations

import ast
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "obclip_core"


def digest(*parts: str | bytes | Path) -> str:
    """The SHA-256 of the parts in order: text, bytes, a file's contents, or a folder's names and contents."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            files = sorted(p for p in part.rglob("*") if p.is_file()) if part.is_dir() else [part]
            sums = {p.relative_to(part).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
            piece = repr(sums)
        else:
            piece = part
        raw = piece.encode() if isinstance(piece, str) else piece
        total.update(len(raw).to_bytes(8, "big") + raw)
    return total.hexdigest()


def write_whole(path: Path, data: bytes) -> Path:
    """Write the file whole or not at all: a reader sees the old contents or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        new.write_bytes(data)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    return path


def imports(source: str, module: str = "") -> Iterator[str]:
    """The names that a source imports, absolute, functions and all: whoever asks knows which of them are modules.

    module is the dotted name of the source itself (of its package, for an __init__.py), for relative imports.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join(above + (node.module.split(".") if node.module else []))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def sources(modules: Iterable[str], root: Path = ROOT) -> tuple[Path, ...]:
    """The files behind these modules of the package and all modules of it that they import, sorted.

    A package's __init__.py counts for every module in it, but what it imports counts only where the package itself is
    imported. A file beside a module that is no Python and whose name the module mentions (a style sheet) counts too.
    """
    found: set[Path] = set()
    todo, seen = list(modules), set()
    while todo:
        name = todo.pop()
        if name in seen or name.split(".")[0] != PACKAGE:
            continue
        seen.add(name)
        parts = name.split(".")
        found.update(
            init for n in range(1, len(parts)) if (init := root.joinpath(*parts[:n], "__init__.py")).is_file()
        )
        path = root.joinpath(*parts[:-1], parts[-1] + ".py")
        if not path.is_file():
            path = root.joinpath(*parts, "__init__.py")
        if not path.is_file():  # a function or a class, whose module was named as well
            continue
        text = path.read_text(encoding="utf-8")
        found.add(path)
        found.update(p for p in path.parent.iterdir() if p.is_file() and p.suffix not in {".py", ""} and p.name in text)
        todo += imports(text, f"{name}.__init__" if path.name == "__init__.py" else name)
    return tuple(sorted(found))
