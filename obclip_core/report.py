"""The paper's 16 artefacts beside ours, and the numbers of the README: python -m obclip_core.report --preset quick

Everything is read from results/<preset>/ and data/paper/; nothing is typed by hand. A result belongs to an artefact
when its name begins with the artefact's id (table2.csv, figure3_split.png), when artefacts.toml names it, or, row by
row, when the table has a column artefact.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd

from obclip_core.provenance import ROOT, write_whole
from obclip_core.sweep import Setting, add_arguments

PAPER = ROOT / "data" / "paper"
KEYS = ["world", "method", "k", "candidates"]
LONGEST = 60


def report(folder: Path, world: str) -> str:
    """The text of report.md for the results in folder."""
    artefacts = tomllib.loads((PAPER / "artefacts.toml").read_text(encoding="utf-8"))["artefact"]
    tables = {path.stem: pd.read_csv(path) for path in sorted((folder / "tables").glob("*.csv"))}
    figures = [path.name for path in sorted((folder / "figures").glob("*.png"))]
    printed = pd.read_csv(PAPER / "tables.csv", dtype={"value": str})  # as printed, zeros at the end and all
    printed = printed.rename(columns={"setting": "world", "switch_point": "k"})
    sections, summary, used = [], [], set()
    for artefact in artefacts:
        names = {name for name in [*tables, *figures] if belongs(name, artefact)}
        parts = {name: table for name, table in tables.items() if name in names}
        for name, table in tables.items():
            rows = table[table.artefact == artefact["title"]] if "artefact" in table else table[:0]
            if len(rows):
                parts[name] = rows.drop(columns="artefact").dropna(axis=1, how="all")
        pictures = [name for name in figures if name in names]
        used |= names | {name for name in parts if name != "claims"}
        paper = printed[printed.table.astype(str) == artefact["id"].removeprefix("table")].drop(columns="table")
        summary.append(_summary(artefact, parts, pictures))
        sections += _section(artefact, paper, parts, pictures)
    text = ["# The paper beside ours", "", f"Results in `results/{folder.name}/`, world `{world}`.", *_made(folder), ""]
    text += [markdown(pd.DataFrame(summary)), "", *sections]
    rest = [name for name in figures if name not in used]
    others = {name: table for name, table in tables.items() if name not in used}
    if "claims" in others:  # those of the 16 were shown with them
        others["claims"] = tables["claims"][~tables["claims"].artefact.isin([a["title"] for a in artefacts])]
    if rest or others:
        text += ["## Beyond the paper", "", *_pictures(rest)]
        text += [line for name, table in others.items() for line in _table(name, table)]
    return "\n".join(text).rstrip() + "\n"


def _made(folder: Path) -> Iterator[str]:
    """On which machines, with which seeds and which torch the notebooks ran, as run.json has it in full."""
    if not (folder / "run.json").is_file():
        return
    made = []
    for one in json.loads((folder / "run.json").read_text(encoding="utf-8")).values():
        on = one["machine"]
        parts = [on["processor"], f"{on['cores']} cores", on["instruction_set"], on["gpu"]]
        machine = ", ".join(part for part in parts if part)
        made.append(f"{machine}; seed {one['parameters']['seed']}; torch {one['versions']['torch']}")
    for said in dict.fromkeys(made):
        yield f"Made on: {said} ([run.json](run.json): parameters, versions and seconds of each notebook)."


def belongs(name: str, artefact: dict) -> bool:
    """Whether a result belongs to an artefact by its name: table2 and table2_n30 to table2, table20 not."""
    stem = name.removesuffix(".png")
    return bool(re.match(rf"{artefact['id']}(?!\d)", stem)) or stem in artefact.get("also", [])


def beside(paper: pd.DataFrame, ours: pd.DataFrame) -> pd.DataFrame:
    """The paper's rows and ours, one above the other, a column a metric, in the paper's order of methods.

    Both in long form: world, method, k, candidates, metric, value; ours may have low and high, and rows that compare
    with another method or k (columns against, against_k), which are left out here.
    """
    ours = ours[ours[[name for name in ours if name.startswith("against")]].isna().all(axis=1)]
    paper, ours = paper.assign(source="paper"), ours.assign(source="ours")
    long = pd.concat([paper, ours], ignore_index=True)
    long["value"] = [_interval(row) for row in long.to_dict("records")]
    long[["k", "candidates"]] = long[["k", "candidates"]].apply(pd.to_numeric).astype("Int64").astype("object")
    long[KEYS] = long[KEYS].map(lambda value: "" if pd.isna(value) else value)
    order = {name: place for place, name in reversed(list(enumerate(long.method)))}
    wide = long.pivot_table(index=[*KEYS, "source"], columns="metric", values="value", aggfunc="first", sort=False)
    wide = wide.reset_index().fillna("")
    rows = wide.to_dict("records")
    rows.sort(key=lambda r: (order[r["method"]], int(r["candidates"] or 0), int(r["k"] or 0), r["source"] == "ours"))
    return pd.DataFrame(rows, columns=["source", *KEYS, *dict.fromkeys(long.metric)])


def markdown(table: pd.DataFrame) -> str:
    """A table in markdown, numbers to four significant digits."""
    rows = [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    lines = [list(map(str, table.columns)), ["---"] * len(table.columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


MARK = re.compile(r"<!-- from (?P<path>\S+?)(?: \| (?P<query>.+?))? -->(?P<old>.*?)<!-- end -->", re.S)


def fill(text: str, root: Path = ROOT) -> str:
    """The text with what stands between its markers read anew from results/.

    <!-- from PATH --> ... <!-- end -->                                            a table
    <!-- from PATH | COLUMN where A=x B=y | FORMAT --> ... <!-- end -->              one number, such as {:.1f} dB
    What is not there yet reads "not measured yet"; ValueError for a column or a row that the table does not have.
    """

    def filled(match: re.Match) -> str:
        head = match[0][: match.start("old") - match.start()]
        path, query = root / match["path"], match["query"]
        if not path.is_file():
            new = "not measured yet"
        elif query:
            new = _number(pd.read_csv(path), query, match["path"])
        else:
            new = f"\n{markdown(pd.read_csv(path))}\n"
        return f"{head}{new}<!-- end -->"

    return MARK.sub(filled, text)


def _number(table: pd.DataFrame, query: str, path: str) -> str:
    what, _, form = query.partition(" | ")
    column, _, conditions = what.partition(" where ")
    missing = {column, *(part.split("=")[0] for part in conditions.split())} - set(table)
    if missing:
        raise ValueError(f"{path} has no column {', '.join(sorted(missing))}")
    for part in conditions.split():
        key, _, value = part.partition("=")
        table = table[table[key].map(_cell) == value]
    if len(table) != 1:
        raise ValueError(f"{path} has {len(table)} rows where {conditions}, and one is wanted")
    return (form or "{}").format(table[column].iloc[0])


def _section(
    artefact: dict, paper: pd.DataFrame, tables: dict[str, pd.DataFrame], figures: Sequence[str]
) -> Iterator[str]:
    yield from (f"## {artefact['title']}", "", artefact["shows"], "")
    if "note" in artefact:
        yield from (f"Note: {artefact['note']}", "")
    claims = tables.pop("claims", None)
    if claims is not None:
        kept = ["claim", "paper", "ours", "low", "high", "n", "world", "verdict", "why"]
        yield from (markdown(claims[[name for name in kept if name in claims]]), "")
    mergeable = [name for name, table in tables.items() if len(paper) and {*KEYS[1:], "metric", "value"} <= set(table)]
    if mergeable:
        both = beside(paper, pd.concat([tables[name] for name in mergeable]))
        yield from (f"Paper and ours ({', '.join(mergeable)}):", "", markdown(both), "")
    elif len(paper):
        yield from ("Printed in the paper:", "", markdown(beside(paper, paper[:0]).drop(columns="source")), "")
    yield from _pictures(figures)
    for name, table in tables.items():
        if name not in mergeable:
            yield from _table(name, table)
    if not figures and not tables:
        yield from (f"Ours: not made yet; it comes from notebook {artefact['notebook']}.", "")


def _summary(artefact: dict, tables: dict[str, pd.DataFrame], figures: Sequence[str]) -> dict[str, str]:
    verdicts = tables["claims"].verdict.value_counts(sort=False) if "claims" in tables else {}
    own = len(tables) - ("claims" in tables)
    return {
        "artefact": artefact["title"],
        "notebook": artefact["notebook"],
        "ours": f"{len(figures)} figures, {own} tables" if figures or own else "not made yet",
        "its claims": ", ".join(f"{count} x {verdict}" for verdict, count in verdicts.items()),
    }


def _pictures(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        yield from (f"![{Path(name).stem.replace('_', ' ')}](figures/{name})", "")


def _table(name: str, table: pd.DataFrame) -> Iterator[str]:
    more = f", its first {LONGEST} of {len(table)} rows" if len(table) > LONGEST else ""
    yield from (f"[{name}](tables/{name}.csv){more}:", "", markdown(table.head(LONGEST)), "")


def _interval(row: dict) -> str:
    value, low, high = _cell(row["value"]), row.get("low"), row.get("high")
    return value if low is None or pd.isna(low) or pd.isna(high) else f"{value} [{_cell(low)}, {_cell(high)}]"


def _cell(value: object) -> str:
    if isinstance(value, float):
        if pd.isna(value):
            return ""
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return "" if value is None or value is pd.NA else str(value).replace("|", "\\|").replace("\n", " ")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m obclip_core.report", description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--readme", type=Path, help="a text whose numbers are read anew from results/ too")
    chosen = parser.parse_args(arguments)
    try:
        setting = Setting(chosen.preset, chosen.world, chosen.seed)
        path = write_whole(setting.folder / "report.md", report(setting.folder, setting.world).encode())
        print(f"written: {path}")
        if chosen.readme:
            write_whole(chosen.readme, fill(chosen.readme.read_text(encoding="utf-8")).encode())
            print(f"written: {chosen.readme}")
    except (OSError, ValueError) as error:
        print(f"obclip: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
