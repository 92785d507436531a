"""Figures: what they are built from, then one function a figure. Each is a function of a table or of pictures."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from obclip_core.provenance import write_whole

STYLE = Path(__file__).with_name("obclip.mplstyle")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
# Nothing of the moment or the machine, so that the same data gives the same bytes.
METADATA = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


@dataclass(frozen=True)
class Saved:
    """A figure on disk; as the last line of a notebook's cell, it shows the picture."""

    path: Path

    def __repr__(self) -> str:
        return self.path.name

    def _repr_png_(self) -> tuple[bytes, dict[str, int]] | None:
        if self.path.suffix != ".png":
            return None
        raw = self.path.read_bytes()
        return raw, {"width": int.from_bytes(raw[16:20], "big") // 2}


def save_figure(figure: Figure, name: str, folder: Path, kind: str = "png") -> Saved:
    """Write folder/figures/<name>.<kind> (png, svg or pdf), whole or not at all, the same bytes for the same data."""
    if kind not in METADATA:
        raise ValueError(f"kind is {kind!r}, but figures are written as {', '.join(METADATA)}; choose one of them")
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format=kind, metadata=METADATA[kind])
    return Saved(write_whole(folder / "figures" / f"{name}.{kind}", buffer.getvalue()))


@contextmanager
def styled() -> Iterator[None]:
    """The project's style, for the time in which a figure is made."""
    with style.context(["default", STYLE]):
        yield


def new_figure(width: float = 5.0, height: float = 3.2) -> Figure:
    """An empty figure, sizes in inches, that no pyplot keeps; call it inside styled()."""
    return Figure(figsize=(width, height), layout="constrained")


# What figures are built from


def picture_grid(
    images: Any,
    rows: Sequence[str] = ("",),
    columns: Sequence[str] = ("",),
    *,
    title: str = "",
    row_title: str = "",
    column_title: str = "",
    inch: float = 0.8,
) -> Figure:
    """Pictures in rows and columns with their labels.

    images: array or tensor (..., 3, H, W) in [0, 1], one a place, row by row; NaN leaves a place empty. inch is the
    width of a picture on paper. Raises ValueError when their number is not rows x columns.
    """
    pictures = _array(images)
    pictures = pictures.reshape(-1, *pictures.shape[-3:])
    count, _, height, width = pictures.shape
    if count != len(rows) * len(columns):
        raise ValueError(
            f"there are {count} pictures for {len(rows)} rows x {len(columns)} columns; give one picture a place"
        )
    gap = max(1, width // 24)
    canvas = np.ones((len(rows) * (height + gap) - gap, len(columns) * (width + gap) - gap, 3))
    for place, picture in enumerate(np.nan_to_num(pictures, nan=1.0).clip(0, 1)):
        y, x = place // len(columns) * (height + gap), place % len(columns) * (width + gap)
        canvas[y : y + height, x : x + width] = picture.transpose(1, 2, 0)
    with styled():
        labels = max(len(line) for row in rows for line in row.split("\n"))
        above = max(column.count("\n") + 1 for column in columns) * any(columns) + bool(title) + bool(column_title)
        w = inch * canvas.shape[1] / width + 0.07 * labels + 0.2 * bool(row_title) + 0.1
        figure = new_figure(w, inch * canvas.shape[0] / width + 0.16 * above + 0.1)
        axes = figure.add_subplot()
        axes.imshow(canvas, interpolation="none")
        axes.set_xticks([(width + gap) * c + width / 2 for c in range(len(columns))], columns)
        axes.set_yticks([(height + gap) * r + height / 2 for r in range(len(rows))], rows)
        axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
        axes.xaxis.set_label_position("top")
        _bare(axes)
        axes.set(xlabel=column_title, ylabel=row_title)
        if title:
            figure.suptitle(title, fontsize="medium")
    return figure


def lines(
    table: pd.DataFrame, x: str, y: str, *, xlabel: str, ylabel: str, by: str | None = None, low: str | None = None,
    high: str | None = None, panel: str | None = None, log: str = "", width: float | None = None,
) -> Figure:  # fmt: skip
    """One line a value of the column by, with the band between the columns low and high; one panel a value of panel.

    Axis labels name the quantity and its unit. log: "x", "y" or "xy". Rows without a y are left out.
    """
    with styled():
        figure, panels = _panels(table, panel, ylabel, width)
        for axes, part in panels:
            for name, group in _groups(part.dropna(subset=[y]), by):
                group = group.sort_values(x)
                (line,) = axes.plot(group[x], group[y], label=name)
                if low and high:
                    axes.fill_between(group[x], group[low], group[high], alpha=0.2, color=line.get_color(), lw=0)
            axes.set_xlabel(xlabel)
            _scales(axes, log)
        _legend(panels[0][0], by)
    return figure


def dots(
    table: pd.DataFrame, x: str, category: str, *, xlabel: str, low: str | None = None, high: str | None = None,
    by: str | None = None, reference: float | None = None, panel: str | None = None, width: float = 5.0,
) -> Figure:  # fmt: skip
    """Measured values with their intervals: a row a category, a colour a value of by, a dashed line at reference."""
    names = list(dict.fromkeys(table[category]))
    with styled():
        figure, panels = _panels(table, panel, "", width)
        figure.set_figheight(max(1.6, 0.8 + 0.28 * len(names)))
        for axes, part in panels:
            groups = list(_groups(part, by))
            for number, (name, group) in enumerate(groups):
                at = np.array([names.index(value) for value in group[category]])
                at = at + (number - (len(groups) - 1) / 2) * 0.6 / len(groups)
                error = None
                if low and high:
                    error = np.maximum(0, [group[x] - group[low], group[high] - group[x]])
                marker = "os^DvPXh"[number % 8]
                axes.errorbar(group[x], at, xerr=error, fmt=marker, lw=1.2, capsize=2, label=name)
            if reference is not None:
                axes.axvline(reference, color="0.3", ls="--", lw=1)
            axes.set_yticks(range(len(names)), names)
            axes.set(xlabel=xlabel, ylim=(len(names) - 0.5, -0.5))
        _legend(panels[0][0], by)
    return figure


def shaded_bars(
    table: pd.DataFrame, x: str, used: str, full: str, *, xlabel: str, ylabel: str, by: str | None = None,
    width: float = 5.0,
) -> Figure:  # fmt: skip
    """Bars of what is used, and above them, hatched, what was saved of the full height; one panel a value of by."""
    with styled():
        figure, panels = _panels(table, by, ylabel, width)
        for axes, part in panels:
            places = range(len(part))
            axes.bar(places, part[used], color=COLOURS[0], label="used")
            saved = part[full] - part[used]
            axes.bar(places, saved, bottom=part[used], color="white", edgecolor=COLOURS[0], hatch="////", label="saved")
            axes.set_xticks(places, part[x])
            axes.set_xlabel(xlabel)
            axes.grid(axis="x", visible=False)
        panels[-1][0].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def heat_maps(
    maps: Any, rows: Sequence[str] = ("",), columns: Sequence[str] = ("",), *, label: str, inch: float = 1.1,
    low: float | None = None, high: float | None = None,
) -> Figure:  # fmt: skip
    """Maps (..., h, w), one a place, row by row, on one scale of colours; label names the quantity and its unit."""
    values = _array(maps)
    values = values.reshape(-1, *values.shape[-2:])
    if len(values) != len(rows) * len(columns):
        raise ValueError(f"there are {len(values)} maps for {len(rows)} rows x {len(columns)} columns; give each one")
    low = np.nanmin(values) if low is None else low
    high = np.nanmax(values) if high is None else high
    with styled():
        figure = new_figure(inch * len(columns) + 1.4, inch * len(rows) + 0.4)
        grid = figure.subplots(len(rows), len(columns), squeeze=False)
        for axes, value in zip(grid.flat, values, strict=True):
            image = axes.imshow(value, vmin=low, vmax=high, interpolation="none")
            axes.set(xticks=[], yticks=[])
            _bare(axes)
        for axes, name in zip(grid[0], columns, strict=True):
            axes.set_title(name)
        for axes, name in zip(grid[:, 0], rows, strict=True):
            axes.set_ylabel(name)
        figure.colorbar(image, ax=grid, label=label, shrink=0.9)
    return figure


def front(costs: Any, values: Any) -> np.ndarray:
    """Which points are on the Pareto front (bool, one a point): none other costs no more, is no worse, and differs.

    Both are better when smaller; negate what is better when larger.
    """
    c, v = np.asarray(costs, float), np.asarray(values, float)
    beaten = [(c <= a) & (v <= b) & ((c < a) | (v < b)) for a, b in zip(c, v, strict=True)]
    return ~np.array([mask.any() for mask in beaten], dtype=bool)


def pareto(
    table: pd.DataFrame, x: str, y: str, *, xlabel: str, ylabel: str, by: str | None = None, label: str | None = None,
    low: str | None = None, high: str | None = None, larger_is_better: bool = False, log: str = "", width: float = 5.0,
) -> Figure:  # fmt: skip
    """Cost x against quality y, a point a row, coloured by one column and named by another, with the Pareto front."""
    with styled():
        figure = new_figure(width, 3.6)
        axes = figure.add_subplot()
        for number, (name, group) in enumerate(_groups(table, by)):
            error = np.maximum(0, [group[y] - group[low], group[high] - group[y]]) if low and high else None
            marker = "os^DvPXh"[number % 8]
            axes.errorbar(group[x], group[y], yerr=error, fmt=marker, lw=0.8, capsize=1.5, label=name)
        best = table[front(table[x], -table[y] if larger_is_better else table[y])].sort_values(x)
        axes.plot(best[x], best[y], color="0.4", ls="--", lw=1, marker="", zorder=0, label="Pareto front")
        if label:
            for _, row in table.iterrows():
                axes.annotate(str(row[label]), (row[x], row[y]), (3, 3), textcoords="offset points", fontsize=7)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        _scales(axes, log)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)


def _bare(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)


def _groups(table: pd.DataFrame, by: str | None) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of each value of by, in the order in which the values first appear."""
    for value in dict.fromkeys(table[by]) if by else [None]:
        yield ("" if value is None else str(value)), table if value is None else table[table[by] == value]


def _panels(table: pd.DataFrame, by: str | None, ylabel: str, width: float | None):
    groups = list(_groups(table, by))
    figure = new_figure(width or 1.2 + 3.2 * len(groups), 3.0)
    grid = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for axes, (name, _) in zip(grid, groups, strict=True):
        axes.set_title(name)
    grid[0].set_ylabel(ylabel)
    return figure, [(axes, group) for axes, (_, group) in zip(grid, groups, strict=True)]


def _scales(axes: Axes, log: str) -> None:
    axes.set(xscale="log" if "x" in log else "linear", yscale="log" if "y" in log else "linear")


def _legend(axes: Axes, by: str | None) -> None:
    if by:
        figure = axes.get_figure()
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, title=by.replace("_", " "), loc="outside right upper")


# One function a figure


def quickstart_bill(bill: pd.DataFrame) -> Figure:
    """What each system of notebook 00 costs: multiply-adds of both sides, and bytes up and down, a row a system."""
    with styled():
        figure = new_figure(7.2, 2.6)
        work, traffic = figure.subplots(1, 2, sharey=True)
        places = np.arange(len(bill))
        work.barh(places - 0.2, bill["cloud_gmacs"], 0.38, label="cloud")
        work.barh(places + 0.2, bill["device_gmacs"], 0.38, label="device", hatch="///")
        traffic.barh(places - 0.2, bill["bytes_up"] / 1000, 0.38, label="up")
        traffic.barh(places + 0.2, bill["bytes_down"] / 1000, 0.38, label="down", hatch="///")
        for axes in (work, traffic):
            axes.legend()
            axes.grid(axis="y", visible=False)
        work.set_yticks(places, bill["system"])
        work.set(xlabel="multiply-adds of one picture (billions)", xscale="symlog", ylim=(len(bill) - 0.5, -0.5))
        traffic.set(xlabel="on the wire (kB)")
    return figure
