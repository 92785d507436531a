"""The paper's claims, as data: each is decided on a table of results by a test that data/paper/claims.toml states.

A claim compares selected rows of one table with a bound. Its verdict is

- `holds`: in every cell the whole interval keeps the bound;
- `does not hold`: in some cell the whole interval is beyond it;
- `cannot be decided here`: anything else, with the reason: no table, no such row, no interval, or one across the bound.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import pandas as pd

from obclip_core.provenance import ROOT

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be decided here"
NAMES = (
    "artefact",
    "world",
    "model",
    "mechanism",
    "attack",
    "method",
    "order",
    "k",
    "candidates",
    "share",
    "step",
    "metric",
)
PAPER = ROOT / "data" / "paper"
ARTEFACTS = tuple(f"Figure {n}" for n in (3, 4, 6, 7, 8, 9, 10, 11, 12, 13)) + tuple(f"Table {n}" for n in range(2, 8))


@dataclass(frozen=True)
class Claim:
    """One claim of the paper and the test that decides it; see the head of data/paper/claims.toml for each entry."""

    id: str
    claim: str
    artefact: str
    table: str
    statistic: str = "value"
    column: str = "value"
    right_column: str = ""
    where: Mapping = field(default_factory=dict)
    left: Mapping = field(default_factory=dict)
    right: Mapping = field(default_factory=dict)
    over: Mapping = field(default_factory=dict)
    each: bool = False
    mean: bool = False
    exact: bool = False
    min: float = -math.inf
    max: float = math.inf
    paper: str | float = ""
    paper_rows: Mapping = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        if self.statistic not in ("value", "difference", "ratio"):
            raise ValueError(f"{self.id}: statistic {self.statistic!r}: expected value, difference or ratio")
        if (self.statistic == "value") != (not self.right and not self.right_column):
            raise ValueError(
                f"{self.id}: a {self.statistic} needs {'no' if self.statistic == 'value' else 'a'} right side"
            )
        if not self.min <= self.max or (self.min == -math.inf and self.max == math.inf):
            raise ValueError(f"{self.id}: bounds {self.min} to {self.max}: give min, max or both, in order")
        if self.each and self.over:
            raise ValueError(f"{self.id}: each row is a cell already: leave out over")


@dataclass(frozen=True)
class Row:
    """One line of claims.csv: what the paper says, what we found in the deciding cell, and the verdict."""

    claim: str
    artefact: str
    paper: str
    ours: float
    low: float
    high: float
    verdict: str
    why: str
    id: str
    world: str
    table: str


@dataclass(frozen=True)
class _Cell:
    name: str
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    missing: str = ""

    def slack(self, claim: Claim) -> float:
        """How far the interval stays within the bounds; negative where it leaves them."""
        return min(self.low - claim.min, claim.max - self.high)

    def verdict(self, claim: Claim) -> str:
        if self.missing or not (math.isfinite(self.low) and math.isfinite(self.high)):
            return OPEN
        if claim.min <= self.low and self.high <= claim.max:
            return HOLDS
        return FAILS if self.high < claim.min or self.low > claim.max else OPEN


class _Missing(Exception):
    """What a table lacks, in words."""


def load(path: Path | None = None) -> tuple[Claim, ...]:
    """Read the claims of a TOML file, data/paper/claims.toml unless told; ValueError for an entry that is not right."""
    with open(path or PAPER / "claims.toml", "rb") as file:
        entries = tomllib.load(file)["claims"]
    try:
        claims = tuple(Claim(**entry) for entry in entries)
    except TypeError as error:
        raise ValueError(f"claims: {error}") from error
    twice = {c.id for c in claims if [d.id for d in claims].count(c.id) > 1}
    if twice:
        raise ValueError(f"claims named twice: {', '.join(sorted(twice))}; give each its own id")
    return claims


def evaluate(folder: str | Path, claims: Sequence[Claim] | None = None, world: str = "portraits") -> list[Row]:
    """Decide each claim on folder/tables/<table>.csv, on the rows of `world` unless the claim names another one."""
    found, tables = [], {}
    for claim in load() if claims is None else claims:
        try:
            if claim.table not in tables:
                path = Path(folder) / "tables" / f"{claim.table}.csv"
                tables[claim.table] = pd.read_csv(path) if path.is_file() else None
            if tables[claim.table] is None:
                raise _Missing(f"no table {claim.table}.csv here")
            cells = list(_cells(claim, tables[claim.table], world))
        except _Missing as error:
            found.append(_row(claim, _Cell("", missing=str(error)), OPEN, str(error), world))
            continue
        found.append(_decide(claim, cells, world))
    return found


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Return claims.csv: one line a claim."""
    return pd.DataFrame([asdict(row) for row in rows])


def paper_cells(claim: Claim, path: Path | None = None) -> list[tuple[str, float]]:
    """Return (cell, statistic) of the paper's own printed numbers for a claim with `paper_rows`, else nothing."""
    if not claim.paper_rows:
        return []
    printed = pd.read_csv(path or PAPER / "tables.csv").rename(columns={"setting": "world", "switch_point": "k"})
    asked = dict(claim.paper_rows)
    over = asked.pop("over", claim.over)
    found = []
    for at in _combinations(over):
        sides = [{**claim.where, **at, **side, **asked} for side in (claim.left, claim.right)][: 1 + bool(claim.right)]
        known = [{column: wanted for column, wanted in side.items() if column in printed} for side in sides]
        numbers = [_select(printed, side, "", over)["value"] for side in known]
        for one in numbers:
            if len(one) != 1:
                raise ValueError(f"{claim.id}: {len(one)} printed numbers for {_told(at) or 'the claim'}, expected one")
        found.append((_told(at), _statistic(claim.statistic, *(float(n.iloc[0]) for n in numbers))))
    return found


def _paper(claim: Claim) -> str:
    if claim.paper != "":
        return str(claim.paper)
    values = [value for _, value in paper_cells(claim)]
    if not values:
        return ""
    ends = [f"{v:.4g}" for v in (min(values), max(values))]
    metric = claim.paper_rows.get("metric", "")
    return (ends[0] if ends[0] == ends[1] else " to ".join(ends)) + (f" ({metric})" if metric else "")


def _statistic(kind: str, left: float, right: float = math.nan) -> float:
    return {"value": left, "difference": left - right, "ratio": left / right if right else math.nan}[kind]


def _plain(value) -> str:
    """Return names without the marks in which tables differ: 'rv40+small-sd' and 'rv40-small-sd' are one."""
    return re.sub(r"[^a-z0-9.]+", "-", str(value).casefold()).strip("-")


def _matches(column: pd.Series, wanted, world: str) -> pd.Series:
    if wanted == "any":
        return pd.Series(True, index=column.index)
    if isinstance(wanted, Mapping):
        numbers = pd.to_numeric(column, errors="coerce")
        return numbers.between(wanted.get("min", -math.inf), wanted.get("max", math.inf))
    if isinstance(wanted, list):
        return pd.concat([_matches(column, one, world) for one in wanted], axis=1).any(axis=1)
    if isinstance(wanted, str):
        return column.map(_plain) == _plain(wanted.replace("{world}", world))
    return pd.to_numeric(column, errors="coerce") == wanted


def _select(table: pd.DataFrame, conditions: Mapping, world: str, open_to: Mapping | Sequence = ()) -> pd.DataFrame:
    """Return the rows that meet all conditions; an empty field in a column of `open_to` meets any."""
    for name, wanted in conditions.items():
        if name == "world" and name not in table:
            continue  # a table without worlds tells of one, the one that is asked for
        if name not in table:
            raise _Missing(f"the table has no column {name}")
        fits = _matches(table[name], wanted, world)
        table = table[fits | table[name].isna() if name in open_to else fits]
    return table


def _combinations(over: Mapping) -> Iterator[dict]:
    for values in product(*over.values()):
        yield dict(zip(over, values, strict=True))


def _told(at: Mapping) -> str:
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in at.items()
    )


def _number(claim: Claim, rows: pd.DataFrame, column: str) -> tuple[float, float, float]:
    """Return value, low and high of the selected row, or of the mean of the selected rows."""
    if column not in rows:
        raise _Missing(f"the table has no column {column}")
    if not len(rows):
        raise _Missing("no such row")
    if len(rows) > 1 and not claim.mean:
        raise _Missing(f"{len(rows)} rows where one was expected")
    value = float(pd.to_numeric(rows[column], errors="coerce").mean(skipna=False))
    if not math.isfinite(value):
        raise _Missing(f"no number in column {column}")
    if claim.exact:
        return value, value, value
    ends = []
    for end in ("low", "high"):
        name = next((n for n in (f"{column}_{end}", end) if n in rows), None)
        ends.append(float(rows[name].mean(skipna=False)) if name else math.nan)
    if not all(map(math.isfinite, ends)):
        raise _Missing(f"no interval for {column}")
    return value, ends[0], ends[1]


def _combined(kind: str, a: tuple, b: tuple) -> tuple[float, float, float]:
    """Return a difference or ratio with its interval from two independent ones (Zou and Donner's MOVER)."""
    if kind == "difference":
        value = a[0] - b[0]
        return value, value - math.hypot(a[0] - a[1], b[2] - b[0]), value + math.hypot(a[2] - a[0], b[0] - b[1])
    if min(a[1], b[1]) <= 0:
        raise _Missing("a ratio of numbers whose interval reaches 0")
    value = a[0] / b[0]
    low = value * math.exp(-math.hypot(math.log(a[0] / a[1]), math.log(b[2] / b[0])))
    return value, low, value * math.exp(math.hypot(math.log(a[2] / a[0]), math.log(b[0] / b[1])))


def _cells(claim: Claim, table: pd.DataFrame, world: str) -> Iterator[_Cell]:
    where = dict(claim.where)
    if "world" in table and "world" not in {**where, **claim.left}:
        where["world"] = world
    against = [column for column in table if column.startswith("against")]
    paired = table[against].notna().any(axis=1)
    paired, single = table[paired], table[~paired]
    if claim.each:
        rows = _select(single, {**where, **claim.left}, world)
        rows = rows[rows[claim.right_column].notna()] if claim.right_column in rows else rows
        if not len(rows):
            raise _Missing("no such row")
        for i in range(len(rows)):
            one = rows.iloc[i : i + 1]
            told = {name: one[name].iloc[0] for name in NAMES if name in one and pd.notna(one[name].iloc[0])}
            right = one if claim.right_column else _select(single, {**where, **claim.right}, world)
            yield _cell(claim, _told(told), one, right, _pair(paired, told, {**told, **claim.right}, world))
        return
    for at in _combinations(claim.over):
        left, right = {**where, **at, **claim.left}, {**where, **at, **claim.right}
        sides = (_select(single, side, world, claim.over) for side in (left, right))
        yield _cell(claim, _told(at), *sides, _pair(paired, left, right, world))


def _pair(paired: pd.DataFrame, left: Mapping, right: Mapping, world: str) -> pd.DataFrame:
    """Return the row that holds the paired difference of left and right, where the table has one.

    It is left's own row, with right's method in the column `against`, or right's k in `against_k`, and so on.
    """
    asked = dict(left)
    for name in right:
        if left.get(name) != right[name]:
            asked["against" if name == "method" else f"against_{name}"] = right[name]
    return _select(paired, asked, world) if set(asked) <= set(paired) else paired.iloc[:0]


def _cell(claim: Claim, name: str, left: pd.DataFrame, right: pd.DataFrame, pair: pd.DataFrame | None = None) -> _Cell:
    try:
        a = _number(claim, left, claim.column)
        if claim.statistic == "value":
            return _Cell(name, *a)
        column = claim.right_column or claim.column
        if claim.right_column:  # a second column of the row, such as the printed number, has no interval of its own
            number = float(pd.to_numeric(right[column], errors="coerce").mean()) if column in right else math.nan
            if not math.isfinite(number):
                raise _Missing(f"no number in column {column}")
            b = (number,) * 3
        else:
            b = _number(claim, right, column)
        if pair is not None and len(pair) == 1 and not claim.exact and not claim.right_column:
            d = _number(claim, pair, claim.column)
            return _Cell(name, *(d if claim.statistic == "difference" else (1 + x / b[0] for x in d)))
        return _Cell(name, *_combined(claim.statistic, a, b))
    except _Missing as error:
        return _Cell(name, missing=str(error))


def _decide(claim: Claim, cells: Sequence[_Cell], world: str) -> Row:
    verdicts = [cell.verdict(claim) for cell in cells]
    verdict = FAILS if FAILS in verdicts else OPEN if OPEN in verdicts else HOLDS
    told = [cell for cell, v in zip(cells, verdicts, strict=True) if v == verdict and not cell.missing]
    lacking = [cell for cell in cells if cell.missing]
    if verdict == OPEN and lacking and not told:
        return _row(claim, lacking[0], OPEN, _lack(lacking), world)
    worst = min(told, key=lambda cell: cell.slack(claim))
    bounds = [f">= {claim.min:g}"] * (claim.min > -math.inf) + [f"<= {claim.max:g}"] * (claim.max < math.inf)
    why = f"{worst.name}: " * bool(worst.name) + f"{claim.statistic} {worst.value:.4g}"
    why += f" [{worst.low:.4g}, {worst.high:.4g}]" * (not claim.exact) + f", needed {' and '.join(bounds)}"
    why += "; the interval crosses the bound" * (verdict == OPEN)
    why += f"; {verdicts.count(verdict)} of {len(cells)} cells" * (len(cells) > 1)
    why += f"; {_lack(lacking)}" if lacking else ""
    return _row(claim, worst, verdict, why, world)


def _lack(cells: Sequence[_Cell]) -> str:
    first = cells[0]
    return f"{first.missing}{f' for {first.name}' * bool(first.name)}{f' and {len(cells) - 1} more' * (len(cells) > 1)}"


def _row(claim: Claim, cell: _Cell, verdict: str, why: str, world: str) -> Row:
    named = claim.where.get("world", claim.left.get("world", world))
    named = (named[0] if isinstance(named, list) else named).replace("{world}", world)
    why += f". {claim.note}" if claim.note else ""
    ours = (cell.value, cell.low, cell.high)
    return Row(claim.claim, claim.artefact, _paper(claim), *ours, verdict, why, claim.id, named, claim.table)
