"""Settings of a run, grids of cells that are computed once and kept on disk, and the tables they end in."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import safe_open
from safetensors.numpy import save
from tqdm import tqdm

from obclip_core.provenance import ROOT, digest, sources, write_whole

PRESETS = ("smoke", "quick", "full")


@dataclass(frozen=True)
class Setting:
    """What every notebook is run with: a preset, a world (a name in data/worlds, a folder or a hub id) and a seed."""

    preset: str = "quick"
    world: str = "portraits"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset is {self.preset!r}, but only {', '.join(PRESETS)} exist; choose one of them")
        known = sorted(path.stem for path in (ROOT / "data" / "worlds").glob("*.toml"))
        if not self.world or not (self.world in known or "/" in self.world or Path(self.world).exists()):
            raise ValueError(f"world is {self.world!r}, which is no folder and not one of {', '.join(known)}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed is {self.seed!r}, but must be a whole number from 0; give another one")

    @property
    def folder(self) -> Path:
        """Where results are read from: results/<preset>, with -<world> for worlds other than portraits."""
        world = Path(self.world).name if Path(self.world).is_absolute() else self.world
        slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", world).strip("-.")
        return _results() / (self.preset if self.world == "portraits" else f"{self.preset}-{slug}")

    @property
    def out(self) -> Path:
        """Where results are written to: the same folder, or the runner's, which keeps them only if all goes well."""
        return Path(os.environ.get("OBCLIP_OUT") or self.folder)

    @property
    def cells(self) -> Path:
        """Where sweeps keep their cells."""
        return self.folder / ".cells"

    def pick(self, smoke: Any, quick: Any, full: Any) -> Any:
        """The value that goes with this preset."""
        return {"smoke": smoke, "quick": quick, "full": full}[self.preset]


def _results() -> Path:
    return Path(os.environ.get("OBCLIP_RESULTS") or ROOT / "results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options --preset, --world and --seed, from which a command makes its Setting."""
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument("--world", default="portraits", help="a name in data/worlds, a folder or a hub id")
    parser.add_argument("--seed", type=int, default=0)


def setting(preset: str, world: str, seed: int) -> Setting:
    """The Setting of a notebook's parameters; OBCLIP_PRESET, which the tests set to smoke, goes before its preset."""
    return Setting(os.environ.get("OBCLIP_PRESET") or preset, world, seed)


def save_table(table: pd.DataFrame, name: str, folder: Path) -> None:
    """Write folder/tables/<name>.csv, six significant digits: whole or not at all, same table same bytes."""
    text = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    write_whole(folder / "tables" / f"{name}.csv", text.encode())


def load_table(name: str, folder: Path) -> pd.DataFrame:
    """Read folder/tables/<name>.csv, which another notebook wrote; FileNotFoundError when none did."""
    path = folder / "tables" / f"{name}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{folder.name}/tables has no {name}.csv; run the notebook that writes it first")
    return pd.read_csv(path)


def cells(kind: type, **axes: Any) -> tuple[Any, ...]:
    """All configurations of a grid: kind(**values) over the product of the axes; a list, tuple or range is an axis."""
    spread = [values if isinstance(values, (list, tuple, range)) else [values] for values in axes.values()]
    return tuple(kind(**dict(zip(axes, values, strict=True))) for values in product(*spread))


def frame(cells: Sequence[Any], results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row a cell: its configuration (nested fields as outer_inner) and the computed values; arrays are left out."""
    rows = pd.json_normalize([asdict(cell) for cell in cells], sep="_")
    values = [{k: v for k, v in result.items() if not isinstance(v, np.ndarray)} for result in results]
    return pd.concat([rows, pd.DataFrame(values)], axis=1)


def run(
    cells: Sequence[Any],
    compute: Callable[[Any], Mapping[str, Any]],
    folder: Path,
    *,
    depends: Callable[[Any], Iterable[str | Path]] | None = None,
    workers: int = 1,
    label: str = "cells",
) -> list[dict[str, Any]]:
    """Compute each cell once and return its values, in the order of cells.

    cells are frozen dataclasses of plain data; the seed is one of their fields. compute is a function of a module and
    returns numbers, texts, lists, and arrays or tensors (read back as arrays). depends(cell) names what the values
    depend on besides: modules of obclip_core, which stand for their sources and all they import, and files or folders
    (weights); without it, the module of compute. A cell's file bears the hash of all that, is written whole or not at
    all, and is read instead of computing it again; one that is damaged or belongs elsewhere is named in a warning and
    computed again. workers > 1 computes in as many processes. An exception in compute ends the sweep, names its cell
    and keeps what is done.
    """
    versions: dict[tuple[str | Path, ...], str] = {}
    files = []
    for cell in cells:
        on = tuple(depends(cell) if depends else [compute.__module__])
        if on not in versions:
            code = sources(part for part in on if isinstance(part, str))
            versions[on] = digest(*code, *(part for part in on if isinstance(part, Path)))
        about = _describe(cell, compute, versions[on])
        files.append((folder / f"{digest(about)}.safetensors", about))
    found: dict[Path, dict[str, Any]] = {}
    for path, about in files:
        if path.is_file():
            try:
                found[path] = _read(path, about)
            except Exception as error:
                warnings.warn(f"{path.name} in {folder} is computed again: {error}", stacklevel=2)
    todo = {path: (cell, about) for cell, (path, about) in zip(cells, files, strict=True) if path not in found}
    stream = _terminal()
    with tqdm(total=len(files), initial=len(files) - len(todo), desc=label, file=stream, disable=stream is None) as bar:
        if workers == 1:
            for path, (cell, about) in todo.items():
                _compute(compute, cell, path, about)
                bar.update()
        else:
            _compute_in_processes(compute, todo, workers, bar)
    return [found[path] if path in found else _read(path, about) for path, about in files]


def _compute_in_processes(compute: Callable, todo: dict[Path, tuple[Any, str]], workers: int, bar: tqdm) -> None:
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _threads, (threads,)) as pool:
        futures = [pool.submit(_compute, compute, cell, path, about) for path, (cell, about) in todo.items()]
        for future in futures:
            future.add_done_callback(lambda _: bar.update())
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _threads(number: str) -> None:
    os.environ["OMP_NUM_THREADS"] = number


def _terminal() -> Any:
    """Where progress is shown: standard error, or the terminal of the notebooks' runner; None without a terminal."""
    if sys.stderr.isatty():
        return sys.stderr
    terminal = os.environ.get("OBCLIP_TERMINAL")
    return open(terminal, "w") if terminal else None


def _describe(cell: Any, compute: Callable, version: str) -> str:
    config = {"kind": type(cell).__qualname__, "compute": f"{compute.__module__}.{compute.__qualname__}"}
    try:
        return json.dumps(config | {"cell": asdict(cell), "version": version}, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"{cell} is no cell: it must be a frozen dataclass of plain data ({error})") from error


def _compute(compute: Callable, cell: Any, path: Path, about: str) -> None:
    try:
        result = dict(compute(cell))
        arrays = {name: np.ascontiguousarray(v) for name, v in result.items() if getattr(v, "ndim", 0)}
        values = json.dumps({k: v.item() if hasattr(v, "item") else v for k, v in result.items() if k not in arrays})
    except Exception as error:
        error.add_note(f"while computing {cell}")
        raise
    header = json.dumps({"about": about, "values": values, "check": _check(about, values, arrays)})
    # one entry, because safetensors writes several in an order that changes
    write_whole(path, save(arrays, metadata={"cell": header}))


def _read(path: Path, about: str) -> dict[str, Any]:
    with safe_open(path, framework="np") as file:
        header = json.loads((file.metadata() or {}).get("cell", "{}"))
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    if header.get("about") != about:
        raise ValueError("it belongs to another cell")
    if header.get("check") != _check(about, header.get("values", ""), arrays):
        raise ValueError("it is damaged")
    return json.loads(header["values"]) | arrays


def _check(about: str, values: str, arrays: Mapping[str, np.ndarray]) -> str:
    parts = [part for name, a in sorted(arrays.items()) for part in (name, str(a.dtype), str(a.shape), a.tobytes())]
    return digest(about, values, *parts)
