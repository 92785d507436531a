"""Compare two runs, table by table: python -m obclip_core.compare [--preset quick | OLD NEW]

Without folders, the tables of results/<preset>/ are compared with those of the last commit, so a fresh run on another
machine tells where it left the committed one. Texts, counts and verdicts must be equal. A number, or the size of coded
latents, may differ by 0.01 + 5 % of the old one, or lie inside the old one's interval: another processor rounds
otherwise, and over 25 denoising steps that can tip the reading of a picture. What was measured by a clock is not
compared.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from obclip_core.provenance import ROOT
from obclip_core.sweep import Setting, add_arguments

ABSOLUTE, RELATIVE = 0.01, 0.05
TIMED = re.compile(r"second|latency|overhead|_s$", re.I)
SIZES = ("bytes_down",)  # of coded latents, whose last digits the coding follows; what goes up must be equal
REMARKS = ("why", "note")  # sentences, which quote numbers that are compared elsewhere
COLUMNS = ["table", "row", "column", "old", "new"]


def compare(old: Mapping[str, pd.DataFrame], new: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Where new left old: rows (table, row, column, old, new), empty when it did nowhere.

    A table that only one side has, or whose rows or columns are others, is one row with the column ``""``.
    """
    rows = []
    for name in sorted({*old, *new}):
        if name not in old or name not in new:
            rows.append((name, -1, "", *("there" if name in side else "missing" for side in (old, new))))
        elif list(old[name]) != list(new[name]) or len(old[name]) != len(new[name]):
            rows.append((name, -1, "", *(f"{len(side[name])} rows, {len(side[name].columns)} columns"
                                         for side in (old, new))))  # fmt: skip
        else:
            rows += [(name, *cell) for cell in _cells(name, old[name], new[name])]
    return pd.DataFrame(rows, columns=COLUMNS)


def _cells(name: str, old: pd.DataFrame, new: pd.DataFrame) -> Iterator[tuple[int, str, object, object]]:
    if TIMED.search(name):
        return
    texts = old.select_dtypes(exclude="number")
    timed = texts.apply(lambda column: column.astype(str).str.contains(TIMED)).any(axis=1).to_numpy(bool)
    for column in old:
        if TIMED.search(column) or column in REMARKS:
            continue
        a, b = old[column], new[column]
        same = (a == b) | (a.isna() & b.isna())
        measured = pd.api.types.is_float_dtype(a) or column in SIZES
        if measured and pd.api.types.is_numeric_dtype(b):
            same |= (a - b).abs() <= ABSOLUTE + RELATIVE * a.abs()
            low, high = _interval(old, column)
            same |= (low <= b) & (b <= high)
        for row in np.flatnonzero(~same.to_numpy(bool) & ~timed):
            yield int(row), column, a.iloc[row], b.iloc[row]


def _interval(table: pd.DataFrame, column: str) -> tuple[pd.Series, pd.Series]:
    """The bounds beside a number, or of which it is itself one; where there are none, missing ones."""
    stem = re.sub(r"_?(low|high)$", "", column)
    for low, high in ((f"{stem}_low", f"{stem}_high"), ("low", "high")):
        if low in table and high in table:
            return table[low], table[high]
    none = pd.Series(np.nan, index=table.index)
    return none, none


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables of a results folder, by name."""
    return {path.stem: pd.read_csv(path) for path in sorted((folder / "tables").glob("*.csv"))}


def committed(folder: Path, root: Path = ROOT) -> dict[str, pd.DataFrame]:
    """The tables of a results folder in the last commit; ValueError when there are none or root is no git checkout."""
    if not folder.is_relative_to(root):
        raise ValueError(f"results are written to {folder}, of which no commit knows; compare two folders instead")
    under = f"{folder.relative_to(root).as_posix()}/tables/"
    listed = _git(root, "ls-tree", "--name-only", "HEAD", under).split()
    if not listed:
        raise ValueError(f"the last commit has no tables in {under}, so there is nothing to compare with")
    return {Path(name).stem: pd.read_csv(io.StringIO(_git(root, "show", f"HEAD:{name}"))) for name in listed}


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError("this is no git checkout, so there is no committed run to compare with") from error
    return done.stdout


def tell(found: pd.DataFrame, count: int, against: str) -> str:
    """The comparison of count tables in words: how many agree, which do not, and which verdicts changed."""
    left = found.table.nunique()
    said = [f"compared with {against}: {count - left} of {count} tables within the tolerance"]
    for name, part in found.groupby("table", sort=True):
        first = part.iloc[0]
        where = f", first in row {first.row}, {first.column}" if first.column else ""
        said.append(f"  {name}: {len(part)} left it{where}: {first.old} became {first.new}")
    verdicts = found[found.column == "verdict"]
    if count:
        said.append(f"  verdicts that changed: {len(verdicts)}")
    return "\n".join(said)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m obclip_core.compare", description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="OLD NEW", help="two results folders")
    add_arguments(parser)
    chosen = parser.parse_args(arguments)
    if len(chosen.folders) not in (0, 2):
        parser.error("give two folders, OLD and NEW, or none")
    try:
        if chosen.folders:
            old, new = map(tables, chosen.folders)
            against = str(chosen.folders[0])
        else:
            folder = Setting(chosen.preset, chosen.world, chosen.seed).folder
            old, new, against = committed(folder), tables(folder), "the last commit"
        print(tell(compare(old, new), len({*old, *new}), against))
    except ValueError as error:
        print(f"obclip: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
