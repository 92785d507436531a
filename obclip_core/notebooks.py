"""Run the notebooks that are out of date, in order: python -m obclip_core.notebooks --preset quick

A notebook says in its metadata what it reads and writes, {"obclip": {"reads": [...], "writes": [...]}}: files of the
results folder (tables/x.csv), or of the project (data/...) to read. Beside that, it depends on its own cells, on the
sources of the modules that it imports, on the pins, and on the world's prompts and weights.
"""

from __future__ import annotations

import argparse
import ast
import base64
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nbformat
from PIL import Image

from obclip_core.machine import machine, versions
from obclip_core.provenance import ROOT, digest, imports, sources, write_whole
from obclip_core.sweep import Setting, add_arguments

PARAMETERS = {"preset": "quick", "world": "portraits", "seed": 0}
UNUSED = "ignore:IProgress not found"  # tqdm's word, with a path of this machine, on a widget that nothing here uses


class NotebookError(Exception):
    """A notebook that cannot be run, or failed; the message names it and, where it ran, the cell."""


@dataclass(frozen=True)
class Notebook:
    """A notebook's file, its code, and what it says that it reads and writes."""

    path: Path
    code: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.stem


def load(path: Path) -> Notebook:
    """Read a notebook; NotebookError unless it has its declarations and exactly the parameters preset, world, seed."""
    book = nbformat.read(path, as_version=4)
    said = book.metadata.get("obclip", {})
    if set(said) != {"reads", "writes"}:
        raise NotebookError(f'{path.stem}: its metadata must say "obclip": {{"reads": [...], "writes": [...]}}')
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    try:
        found = {target.id: ast.literal_eval(line.value) for line in ast.parse("\n".join(tagged)).body
                 for target in line.targets}  # fmt: skip
    except (AttributeError, SyntaxError, ValueError):
        found = {}
    if len(tagged) != 1 or found != PARAMETERS:
        wanted = ", ".join(f"{name} = {value!r}" for name, value in PARAMETERS.items())
        raise NotebookError(f"{path.stem}: it needs one cell tagged parameters that says {wanted} and nothing else")
    code = "\n".join(cell.source for cell in cells)
    try:
        ast.parse(code)
    except SyntaxError as error:
        raise NotebookError(f"{path.stem}: its cells must be plain Python, without magics ({error.msg})") from error
    return Notebook(path, code, tuple(said["reads"]), tuple(said["writes"]))


def check_order(notebooks: Sequence[Notebook], folder: Path, root: Path) -> None:
    """NotebookError unless each file has one writer, and what is read exists or is written by an earlier notebook."""
    writer: dict[str, str] = {}
    for book in notebooks:
        for name in book.writes:
            if name in writer:
                raise NotebookError(f"{book.name}: it writes {name}, and so does {writer[name]}")
            if Path(name).parts[0] not in ("tables", "figures") or ".." in Path(name).parts:
                raise NotebookError(f"{book.name}: it writes {name}, but results go to tables/ or figures/")
            writer[name] = book.name
    names = [book.name for book in notebooks]
    for book in notebooks:
        for name in book.reads:
            if name in writer:
                if names.index(writer[name]) >= names.index(book.name):
                    raise NotebookError(f"{book.name}: it reads {name}, which only {writer[name]} writes, later")
            elif not _place(name, folder, root).exists():
                raise NotebookError(f"{book.name}: it reads {name}, which is not there; run what writes it first")


def depends(book: Notebook, setting: Setting, root: Path = ROOT) -> dict[str, str]:
    """What the notebook's results depend on and what they are, name -> hash; a name that is missing has the hash ''."""
    code = sources(imports(book.code), root)
    world = Path(setting.world) if Path(setting.world).exists() else root / "data" / setting.world / "weights"
    files = [*code, root / "requirements.txt", root / "data" / "prompts", world]
    files += [root / "data" / "worlds" / f"{setting.world}.toml"]
    named = {path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path): path for path in files}
    named |= {name: _place(name, setting.folder, root) for name in (*book.reads, *book.writes)}
    found = {"its cells": digest(book.code, *book.reads, *book.writes), "its parameters": digest(repr(setting))}
    return found | {name: digest(path) if path.exists() else "" for name, path in named.items()}


def outdated(book: Notebook, setting: Setting, root: Path = ROOT) -> str | None:
    """Why the notebook must be run, in a few words; None when its results are up to date."""
    try:
        before = json.loads(_stamp(book, setting).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "it was not run before"
    now = depends(book, setting, root)
    changed = [name for name in now | before if now.get(name) != before.get(name)]
    return f"{changed[0]} changed" if changed else None


def execute(book: Notebook, setting: Setting, root: Path = ROOT) -> None:
    """Run one notebook; its results replace the old ones only if it ends well and wrote exactly what it declares."""
    folder, stamp = setting.folder, _stamp(book, setting)
    folder.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".run-", dir=folder))
    output = staged / "notebooks" / book.path.name
    output.parent.mkdir()
    variables = {"OBCLIP_OUT": str(staged), "OBCLIP_PRESET": "", "PYTHONPATH": str(root), "PYTHONWARNINGS": UNUSED}
    if sys.stderr.isatty():
        variables["OBCLIP_TERMINAL"] = os.ttyname(sys.stderr.fileno())
    before = depends(book, setting, root)
    try:
        with _environment(variables):
            _execute(book, setting, output)
        wrote = {p.relative_to(staged).as_posix() for p in staged.rglob("*") if p.is_file() and p != output}
        if wrote != set(book.writes):
            missing, extra = sorted(set(book.writes) - wrote), sorted(wrote - set(book.writes))
            told = [f"did not write {', '.join(missing)}"] * bool(missing)
            told += [f"wrote {', '.join(extra)}, which its metadata does not declare"] * bool(extra)
            raise NotebookError(f"{book.name} {' and '.join(told)}")
        stamp.unlink(missing_ok=True)
        for name in (*book.writes, f"notebooks/{book.path.name}"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged / name, folder / name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    # Inputs as they were when the run began: a change during the run makes it out of date.
    after = depends(book, setting, root)
    now = before | {name: after[name] for name in book.writes}
    write_whole(stamp, json.dumps(now, indent=1, sort_keys=True).encode())


def _execute(book: Notebook, setting: Setting, output: Path) -> None:
    import papermill

    quiet = ["--log-level=50"]  # of the kernel's own chatter
    try:
        papermill.execute_notebook(
            str(book.path), str(output), asdict(setting), kernel_name="python3", language="python",
            cwd=str(book.path.parent), progress_bar=False, extra_arguments=quiet,
        )  # fmt: skip
    except Exception as error:
        name, value = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
        raise NotebookError(f"{book.name} failed{_where(output)}: {name}: {value}") from error
    write_whole(output, nbformat.writes(_tidy(nbformat.read(output, as_version=4))).encode() + b"\n")


def run(setting: Setting, only: Sequence[str] = (), root: Path = ROOT) -> None:
    """Run the notebooks that are out of date, all or those whose names begin with one of only ("02")."""
    notebooks = [load(path) for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))]
    unknown = [name for name in only if not any(book.name.startswith(name) for book in notebooks)]
    if unknown:
        raise NotebookError(f"there is no notebook {', '.join(unknown)} in notebooks/")
    check_order(notebooks, setting.folder, root)
    chosen = [book for book in notebooks if not only or book.name.startswith(tuple(only))]
    check_order(chosen, setting.folder, root)
    for book in chosen:
        why = outdated(book, setting, root)
        if why is None:
            print(f"{book.name}: up to date", flush=True)
            continue
        print(f"{book.name}: running, because {why}", flush=True)
        begin = time.monotonic()
        execute(book, setting, root)
        seconds = round(time.monotonic() - begin)
        record(book, setting, seconds)
        print(f"{book.name}: done in {seconds} s", flush=True)


def record(book: Notebook, setting: Setting, seconds: int) -> None:
    """Note in run.json of the results folder with what the notebook was run: parameters, seconds, versions, machine.

    The seconds are of this run: cells that an earlier one had computed were read.
    """
    path = setting.folder / "run.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        said = {}
    said[book.name] = {"parameters": asdict(setting), "seconds": seconds, "machine": machine(), "versions": versions()}
    write_whole(path, json.dumps(said, indent=1, sort_keys=True).encode() + b"\n")


def publish(setting: Setting, only: Sequence[str] = (), root: Path = ROOT) -> None:
    """Store the outputs of the last run in notebooks/; NotebookError when that run is out of date."""
    if asdict(setting) != PARAMETERS:
        raise NotebookError("notebooks/ shows what the default parameters give; publish without any")
    for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        if only and not path.stem.startswith(tuple(only)):
            continue
        why = outdated(load(path), setting, root)
        if why:
            raise NotebookError(f"{path.stem}: {why}; run it before its outputs are published")
        book = nbformat.read(path, as_version=4)
        ran = nbformat.read(setting.folder / "notebooks" / path.name, as_version=4)
        results = [c for c in ran.cells if "injected-parameters" not in c.metadata.get("tags", [])]
        count = 0
        for cell, result in zip(book.cells, results, strict=True):
            if cell.cell_type == "code":
                count += 1
                cell.execution_count, cell.outputs = count, result.outputs
                for output in cell.outputs:
                    if output.output_type == "execute_result":
                        output.execution_count = count
                    if "image/png" in output.get("data", {}):
                        output.data["image/png"] = _small(output.data["image/png"])
        write_whole(path, nbformat.writes(_tidy(book)).encode() + b"\n")
        print(f"{path.stem}: outputs stored")


def _small(picture: str) -> str:
    """A picture (base64 of a PNG) in 256 colours, a third of the bytes: what readers on the web see of the figure."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB").quantize(256, dither=0).save(buffer, "png")
    return min(base64.b64encode(buffer.getvalue()).decode(), picture, key=len)


def _place(name: str, folder: Path, root: Path) -> Path:
    return root / name if name.startswith("data/") else folder / name


def _stamp(book: Notebook, setting: Setting) -> Path:
    return setting.folder / ".stamps" / f"{book.name}.json"


def _tidy(book: Any) -> Any:
    """Without times, paths and versions of this machine."""
    for key in set(book.metadata) - {"kernelspec", "language_info", "obclip"}:
        del book.metadata[key]
    book.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book.metadata.language_info = {"name": "python"}
    for cell in book.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata.clear()
        if tags:
            cell.metadata["tags"] = tags
        if cell.cell_type == "code":  # torch's profiler tells the process number and the time of each start and stop
            cell.outputs = [output for output in cell.outputs if "SyncActivityProfiler" not in output.get("text", "")]
    return book


def _where(output: Path) -> str:
    """The code cell that was started last, as papermill left it in the half-written output."""
    try:
        cells = [cell for cell in nbformat.read(output, as_version=4).cells if cell.cell_type == "code"]
    except Exception:
        return ""
    cells = [cell for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    started = [n for n, cell in enumerate(cells, 1) if cell.metadata.get("papermill", {}).get("start_time")]
    return f" in code cell {started[-1]} ({cells[started[-1] - 1].source.strip().splitlines()[0]})" if started else ""


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m obclip_core.notebooks", description=__doc__.split("\n")[0])
    parser.add_argument("only", nargs="*", metavar="NN", help="beginnings of the names of those to run; else all")
    add_arguments(parser)
    parser.add_argument("--publish", action="store_true", help="store the last run's outputs in notebooks/ instead")
    chosen = parser.parse_args(arguments)
    try:
        world = str(Path(chosen.world).resolve()) if Path(chosen.world).is_dir() else chosen.world
        setting = Setting(chosen.preset, world, chosen.seed)
        (publish if chosen.publish else run)(setting, chosen.only)
    except (NotebookError, ValueError) as error:
        cause = error.__cause__
        if getattr(cause, "traceback", None):
            print("\n".join(cause.traceback), file=sys.stderr)
        print(f"obclip: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
