"""Figures: what they are built from, then one function a figure. Each is a function of a table or of pictures."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rcParams, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator

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
        _make_room(figure)
    return figure


def _make_room(figure: Figure) -> None:
    """Enlarge the figure until no text reaches over its edges: how wide a text is, only its font knows."""
    for _ in range(5):  # every size is laid out anew; once is mostly enough
        figure.draw_without_rendering()
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        over = np.maximum(0.0, [max(-box.x0, box.x1 - width), max(-box.y0, box.y1 - height)])
        if not over.any():
            return
        figure.set_size_inches(*(figure.get_size_inches() + 2 * over + 0.02 * (over > 0)))


def lines(
    table: pd.DataFrame, x: str, y: str, *, xlabel: str, ylabel: str, by: str | None = None, low: str | None = None,
    high: str | None = None, panel: str | None = None, log: str = "", width: float | None = None,
) -> Figure:  # fmt: skip
    """One line a value of the column by, with the band between the columns low and high; one panel a value of panel.

    Axis labels name the quantity and its unit. log: "x", "y" or "xy". Rows without a y are left out.
    """
    with styled():
        figure, panels = _panels(table, panel, ylabel, width)
        looks = _looks(table, by)
        for axes, part in panels:
            for name, group in _groups(part.dropna(subset=[y]), by):
                group = group.sort_values(x)
                (line,) = axes.plot(group[x], group[y], label=name, **looks[name])
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
        looks = _looks(table, by)
        for axes, part in panels:
            groups = list(_groups(part, by))
            for number, (name, group) in enumerate(groups):
                at = np.array([names.index(value) for value in group[category]])
                at = at + (number - (len(groups) - 1) / 2) * 0.6 / len(groups)
                error = None
                if low and high:
                    error = np.maximum(0, [group[x] - group[low], group[high] - group[x]])
                look = {"color": looks[name]["color"], "fmt": "os^DvPXh"[list(looks).index(name) % 8]}
                axes.errorbar(group[x], at, xerr=error, lw=1.2, capsize=2, label=name, **look)
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
        _make_room(figure)
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


def _looks(table: pd.DataFrame, by: str | None) -> dict[str, dict[str, Any]]:
    """Colour and marker of each value of by, the same in every panel, also where a panel lacks some of them."""
    cycle = list(rcParams["axes.prop_cycle"])
    return {name: cycle[number % len(cycle)] for number, (name, _) in enumerate(_groups(table, by))}


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
        pairs = [zip(*one.get_legend_handles_labels(), strict=True) for one in figure.axes]
        found = {label: handle for part in pairs for handle, label in part}
        figure.legend(found.values(), found.keys(), title=by.replace("_", " "), loc="outside right upper")


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


def cache_steps(table: pd.DataFrame, r: int, s: int) -> Figure:
    """Figure 6, curves: relative change of cross-attention maps and mid block from step to step; points r and s."""
    figure = lines(table, "step", "value", by="part", low="low", high="high", xlabel="denoising step",
                   ylabel="relative change since the step before", width=5.6)
    for at, name in ((r, "r"), (s, "s")):
        figure.axes[0].axvline(at, color="0.4", ls=":", lw=1)
        figure.axes[0].annotate(name, (at, 1), (2, -8), xycoords=("data", "axes fraction"), textcoords="offset points")
    return figure


def cache_words(heat: Any, words: Sequence[str], steps: Sequence[int]) -> Figure:
    """Figure 6, maps (steps, 2, words, h, w): where two candidates attend to single words, each on its own scale."""
    maps = _array(heat)
    low, high = maps.min((-1, -2), keepdims=True), maps.max((-1, -2), keepdims=True)
    rows = [f"{who}, step {step}" for step in steps for who in ("real", "other")]
    return heat_maps((maps - low) / np.maximum(high - low, 1e-12), rows, words, label="attention, least to most")


def cache_components(components: Any, step: int) -> Figure:
    """Figure 9, maps (2, c, h, w): leading components of two candidates' self-attention; each on its own scale."""
    maps = _array(components)
    maps = maps / np.maximum(np.abs(maps).max((-1, -2), keepdims=True), 1e-12)
    columns = [f"component {n + 1}" for n in range(maps.shape[1])]
    return heat_maps(maps, ["real candidate", "other"], columns, label=f"weight at step {step}", low=-1, high=1)


def cache_likeness(table: pd.DataFrame) -> Figure:
    """Figure 9, numbers: how much of the leading subspace two candidates, and two strangers, share at each step."""
    strangers = table.metric.str.contains("other prompt")
    table = table.assign(
        pair=np.where(strangers, "two prompts, two noises", "two candidates, one noise"),
        map=np.where(table.metric.str.contains("centred"), "mean taken off", "as it is"))
    return lines(table, "step", "value", by="pair", panel="map", low="low", high="high", xlabel="denoising step",
                 ylabel="shared part of leading subspace", width=7.2)


def flops_per_step(table: pd.DataFrame) -> Figure:
    """Figure 12: operations of every step by the paper's rule, the saved part hatched and its share above it."""
    figure = shaded_bars(table, "step", "spent", "plain", xlabel="denoising step", width=6.4,
                         ylabel="operations a candidate ($10^{12}$)")
    for place, row in enumerate(table.itertuples()):
        figure.axes[0].annotate(f"{row.spent / row.plain - 1:+.0%}", (place, row.plain), (0, 2), fontsize=7,
                                ha="center", textcoords="offset points")
    return figure


def cache_pictures(pictures: Any, columns: Sequence[str]) -> Figure:
    """Figure 8: pictures (columns, prompts, 3, H, W), a row a prompt, a column a set of techniques."""
    images = _array(pictures).swapaxes(0, 1)
    return picture_grid(images, [""] * images.shape[0], columns)


def cache_fronts(table: pd.DataFrame, metrics: Mapping[str, tuple[str, bool]]) -> Figure:
    """The ablation: multiply-adds left against each metric, coloured by what is asked, with the Pareto front."""
    shown = {name: told for name, told in metrics.items() if table[name].notna().any()}
    with styled():
        figure = new_figure(7.6, 2.6 * -(-len(shown) // 2))
        grid = figure.subplots(-(-len(shown) // 2), 2, squeeze=False)
        for axes, (name, (label, more)) in zip(grid.flat, shown.items(), strict=False):
            for number, (group, part) in enumerate(_groups(table, "group")):
                error = np.maximum(0, [part[name] - part[f"{name}_low"], part[f"{name}_high"] - part[name]])
                axes.errorbar(100 * part["macs_ratio"], part[name], yerr=error, fmt="os^DvPXh"[number % 8], lw=0.7,
                              color=COLOURS[number % len(COLOURS)], capsize=1.5, label=group)
            best = table[front(table["macs_ratio"], -table[name] if more else table[name])].sort_values("macs_ratio")
            axes.plot(100 * best["macs_ratio"], best[name], color="0.4", ls="--", lw=1, marker="", zorder=0,
                      label="Pareto front")
            axes.set(xlabel="multiply-adds left (%)", ylabel=fill(label, 24))
            axes.set_title(f"{'more' if more else 'less'} is better")
        for axes in list(grid.flat)[len(shown):]:
            axes.set_axis_off()
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def cache_sweeps(table: pd.DataFrame) -> Figure:
    """What one setting at a time does: distance from the unaccelerated picture and work left, a panel a setting."""
    with styled():
        figure, panels = _panels(table, "group", "distance from the unaccelerated picture", 7.6)
        for axes, part in panels:
            places = range(len(part))
            error = np.maximum(0, [part["distance"] - part["distance_low"], part["distance_high"] - part["distance"]])
            axes.errorbar(places, part["distance"], yerr=error, fmt="o-", lw=1.2, capsize=2)
            for place, row in zip(places, part.itertuples(), strict=True):
                axes.annotate(f"{row.macs_ratio:.0%}", (place, row.distance), (4, 4), textcoords="offset points",
                              fontsize=7)
            axes.set_xticks(places, part["setting_value"], rotation=30)
            axes.margins(x=0.15)
    return figure


def cache_competition(table: pd.DataFrame, metrics: Mapping[str, tuple[str, bool]]) -> Figure:
    """Theirs minus ours at equal multiply-adds, a panel a metric, each in units of its widest interval; 0 is a draw."""
    table = table[table["difference"].notna()].copy()
    for name in table["metric"].unique():
        at = table["metric"] == name
        unit = table.loc[at, ["low", "high"]].abs().to_numpy().max() or 1.0
        table.loc[at, ["difference", "low", "high"]] /= unit if metrics[name][1] else -unit
    table[["low", "high"]] = np.sort(table[["low", "high"]].to_numpy(), axis=1)
    table["what"] = table["metric"].map(lambda name: metrics[name][0])
    return dots(table, "difference", "what", by="method", low="low", high="high", panel="against", reference=0,
                xlabel="ours better  |  theirs better", width=7.6)


def cache_by_candidates(table: pd.DataFrame) -> Figure:
    """Which technique helps at which N: share of a plain step's multiply-adds and seconds that is left."""
    shown = table.assign(N=[f"N = {n}" for n in table["candidates"]], left=100 * table["ratio"],
                         left_low=100 * table["low"], left_high=100 * table["high"])
    return dots(shown, "left", "technique", by="what", low="left_low", high="left_high", panel="N", reference=100,
                xlabel="of a plain step (%)", width=7.6)


def cache_seconds(table: pd.DataFrame) -> Figure:
    """Seconds against multiply-adds, both as shares of no acceleration; on the line they agree."""
    with styled():
        figure = new_figure(4.6, 3.2)
        axes = figure.add_subplot()
        for number, (name, part) in enumerate(_groups(table.assign(N=table["candidates"]), "N")):
            error = 100 * np.maximum(0, [part["ratio"] - part["low"], part["high"] - part["ratio"]])
            axes.errorbar(100 * part["macs_ratio"], 100 * part["ratio"], yerr=error, fmt="os^D"[number % 4], capsize=2,
                          label=f"N = {name}")
            for row in part.itertuples():
                axes.annotate(f"k = {row.k}", (100 * row.macs_ratio, 100 * row.ratio), (5, -3), fontsize=7,
                              textcoords="offset points")
        ends = [0.95 * 100 * table["macs_ratio"].min(), 1.05 * 100 * table["macs_ratio"].max()]
        axes.plot(ends, ends, color="0.4", ls="--", lw=1, marker="", label="as predicted")
        axes.plot(ends, [end + 10 for end in ends], color="0.6", ls=":", lw=1, marker="", label="10 points worse")
        axes.set(xlabel="multiply-adds left (%)", ylabel="seconds left (%)")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def cache_memory(table: pd.DataFrame) -> Figure:
    """Bytes at every N: what is kept from step to step and the peak, predicted from shapes and measured."""
    with styled():
        figure, panels = _panels(table.assign(N=[f"N = {n}" for n in table["candidates"]]), "N", "megabytes", 7.6)
        for axes, part in panels:
            at = np.arange(len(part))
            for place, (name, label) in enumerate({"kept_predicted_mb": "kept, predicted", "kept_mb": "kept, measured",
                                                   "peak_predicted_mb": "peak, predicted",
                                                   "peak_mb": "peak, measured"}.items()):
                axes.bar(at + 0.2 * (place - 1.5), part[name], 0.2, label=label, color=COLOURS[place // 2],
                         hatch="///" if place % 2 == 0 else "", alpha=0.6 if place % 2 == 0 else 1.0)
            axes.set_xticks(at, part["technique"], rotation=30)
            axes.set_yscale("log")
            axes.grid(axis="x", visible=False)
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def posteriors(table: pd.DataFrame) -> Figure:
    """What the cloud believes of each candidate before (outline) and after (filled) the offer that tells most: a row a
    prior, a column a mechanism. Columns prior_name, mechanism, candidate, prior, posterior."""
    names, chosen = (list(dict.fromkeys(table[column])) for column in ("prior_name", "mechanism"))
    with styled():
        figure = new_figure(2.3 * len(chosen) + 0.6, 1.6 * len(names) + 0.3)
        grid = figure.subplots(len(names), len(chosen), squeeze=False, sharey="row", sharex=True)
        for row, name in zip(grid, names, strict=True):
            for axes, mechanism in zip(row, chosen, strict=True):
                part = table[(table.prior_name == name) & (table.mechanism == mechanism)].sort_values("candidate")
                axes.bar(part.candidate, part.posterior, color=COLOURS[0], width=0.8, label="after the offer")
                axes.bar(part.candidate, part.prior, width=0.8, fill=False, edgecolor="black", label="before")
                axes.grid(axis="x", visible=False)
            row[0].set_ylabel(f"probability\n({name} prior)")
        for axes, mechanism in zip(grid[0], chosen, strict=True):
            axes.set_title(mechanism)
        for axes in grid[-1]:
            axes.set_xlabel("candidate")
        grid[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def attack_success(table: pd.DataFrame) -> Figure:
    """How often each attack names the real candidate, a row a mechanism and a column an attack; empty where an attack
    does not apply. Columns mechanism, attack, success."""
    wide = table.pivot_table(index="mechanism", columns="attack", values="success", sort=False)
    wide = wide[list(dict.fromkeys(table.attack))]
    with styled():
        figure = new_figure(0.62 * len(wide.columns) + 2.6, 0.26 * len(wide) + 1.5)
        axes = figure.add_subplot()
        image = axes.imshow(wide, vmin=0, vmax=1, aspect="auto", interpolation="none")
        for (y, x), value in np.ndenumerate(wide.to_numpy()):
            if not np.isnan(value):
                colour = "white" if value < 0.5 else "black"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(len(wide.columns)), wide.columns, rotation=35, ha="left")
        axes.set_yticks(range(len(wide)), wide.index)
        axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
        _bare(axes)
        figure.colorbar(image, ax=axes, label="how often the guess is right", shrink=0.8)
    return figure


def privacy_price(table: pd.DataFrame) -> Figure:
    """The largest posterior that an offer gives a candidate, against the number m of candidates sent (uniform prior):
    a line an epsilon of the subset mechanism. Columns mechanism, n, m, epsilon, posterior."""
    table = table[table.mechanism.isin(["subset", "truth_plus_others", "enumerate_all"])]
    names = {"truth_plus_others": "real one + others\n(no epsilon)", "enumerate_all": "all candidates"}
    label = [names.get(row.mechanism, f"subset, epsilon {row.epsilon:g}") for row in table.itertuples()]
    panel = [f"N = {n}" for n in table.n]
    figure = lines(table.assign(offered=label, panel=panel), "m", "posterior", by="offered", panel="panel", log="xy",
                   xlabel="candidates sent, m", ylabel="largest posterior (1)")  # fmt: skip
    for axes, n in zip(figure.axes, dict.fromkeys(table.n), strict=True):
        _plain_ticks(axes, table.m[table.n == n])
    return figure


def repeats_cost(table: pd.DataFrame) -> Figure:
    """What t answers to one prompt cost: the plain sum, the tighter composition at a delta, and memoised answers."""
    delta = table.delta.iloc[0]
    names = {"sum_epsilon": "fresh answers, sum", "epsilon_at_delta": f"fresh answers, at delta = {delta:g}",
             "memoised_epsilon": "memoised answers"}  # fmt: skip
    long = table.melt("requests", list(names), "answers", "epsilon").replace({"answers": names})
    figure = lines(long, "requests", "epsilon", by="answers", log="xy", width=6.6,
                   xlabel="requests for one prompt", ylabel="epsilon spent (1)")  # fmt: skip
    _plain_ticks(figure.axes[0], table.requests)
    return figure


def repeats_attack(table: pd.DataFrame) -> Figure:
    """How often intersecting t answers names the real candidate. Columns answers, requests, success, low, high."""
    figure = lines(table, "requests", "success", by="answers", low="low", high="high", log="x", width=5.6,
                   xlabel="requests for one prompt", ylabel="how often the guess is right")  # fmt: skip
    _plain_ticks(figure.axes[0], table.requests)
    return figure


def _plain_ticks(axes: Axes, places: Sequence[int]) -> None:
    """Ticks at these whole numbers and nowhere between, also on a logarithmic axis."""
    places = sorted(set(places))
    axes.set_xticks(places, [str(place) for place in places])
    axes.set_xticks([], minor=True)


def publication_attack(table: pd.DataFrame) -> Figure:
    """How often the published picture gives the real candidate away, against k: a panel an N, a line an attack, dashed
    the guess without the picture. Columns attack, k, candidates, success, low, high, guess."""
    table = table.assign(panel=[f"N = {n}" for n in table.candidates])
    figure = lines(table, "k", "success", by="attack", panel="panel", low="low", high="high",
                   xlabel="switch point k (steps)", ylabel="how often the cloud is right")  # fmt: skip
    for axes, (_, part) in zip(figure.axes, _groups(table, "panel"), strict=True):
        axes.axhline(part.guess.iloc[0], color="0.3", ls="--", lw=1, marker="")
        axes.set_ylim(-0.03, 1.03)
        _plain_ticks(axes, part.k)
    return figure


def replaced_steps(table: pd.DataFrame) -> Figure:
    """Figure 4: attribute accuracy and CLIP score against the share of steps under the real prompt; the others, the
    first ones, are under another candidate. Grey: the paper's 80 %. Dashed: what the other one's values score."""
    single = table[table.against_share.isna()] if "against_share" in table else table
    with styled():
        figure = new_figure(7.0, 2.8)
        panels = figure.subplots(1, 2)
        named = (("attribute_accuracy", "attribute accuracy (share right)"), ("clip_score", "CLIP score (cosine)"))
        for axes, (metric, label) in zip(panels, named, strict=True):
            part = single[single.metric == metric].sort_values("share")
            axes.plot(part.share, part.value)
            axes.fill_between(part.share, part.low, part.high, alpha=0.2, lw=0)
            axes.axvline(80, color="0.7", lw=3, marker="", zorder=0)
            if part.chance.notna().any():
                axes.axhline(part.chance.iloc[0], color="0.3", ls="--", lw=1, marker="")
            axes.set(xlabel="steps under the real prompt (%)", ylabel=label)
    return figure


def meaning_price(table: pd.DataFrame) -> Figure:
    """Attribute accuracy of the picture against how well the cloud guesses the real candidate from what it is sent; a
    colour a mechanism, a number an epsilon. Columns mechanism, epsilon, success, value, low, high."""
    label = ["" if e in (0, float("inf")) else f"{e:g}" for e in table.epsilon]
    return pareto(table.assign(label=label), "success", "value", by="mechanism", label="label", low="low", high="high",
                  xlabel="how often the cloud's best guess is right", ylabel="attribute accuracy (share right)",
                  larger_is_better=True, width=6.4)  # fmt: skip


def detector_recall(table: pd.DataFrame) -> Figure:
    """What the detector finds and how precise it is, with 95 % bounds. Columns part, measure, share, low, high."""
    return dots(table, "share", "measure", by="part", low="low", high="high", xlabel="share (1)", width=6.4)


def split_sweep(table: pd.DataFrame, metrics: Mapping[str, str]) -> Figure:
    """Figure 3, our metrics (column: label): each against the cloud's share, with intervals, both orders."""
    table = _measured(table)
    with styled():
        figure = new_figure(6.6, 4.2)
        grid = figure.subplots(-(-len(metrics) // 2), 2, squeeze=False)
        for axes, (name, label) in zip(grid.flat, metrics.items(), strict=False):
            for order, part in _groups(table, "order"):
                part = part.sort_values("share")
                (line,) = axes.plot(part["share"], part[name], label=order)
                axes.fill_between(part["share"], part[f"{name}_low"], part[f"{name}_high"], alpha=0.2, lw=0,
                                  color=line.get_color())
            axes.axvline(40, color="0.4", ls=":", lw=1)
            better = "less" if name == "kid" else "more"
            axes.set_title(f"{label} ({better} is better)")
        for axes in grid[-1]:
            axes.set_xlabel("the cloud's share of the steps (%)")
        figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def split_fid_clip(table: pd.DataFrame) -> Figure:
    """Figure 3 on the paper's axes: FID against CLIP score, a line an order, a point a share; the paper's are named."""
    table = _measured(table)
    with styled():
        figure = new_figure(4.2, 3.0)
        axes = figure.add_subplot()
        for order, part in _groups(table, "order"):
            part = part.sort_values("share")
            axes.plot(part["clip_score"], part["fid"], label=order)
            for row in part[part["share"].isin([20, 40, 60, 80])].itertuples():
                axes.annotate(f"{row.share:g} %", (row.clip_score, row.fid), (4, 3), textcoords="offset points",
                              fontsize=7)
        note = next((text for text in table["fid_note"].dropna() if text), "")
        axes.set(xlabel="CLIP score (more is better)", ylabel="FID (less is better)")
        axes.set_title(note.replace(": ", ":\n").replace("; ", ";\n"), fontsize=7)
        axes.legend()
    return figure


def split_differences(table: pd.DataFrame) -> Figure:
    """Cloud-first less device-first at equal share, a panel a metric; right of the line cloud-first is better."""
    with styled():
        names = list(dict.fromkeys(table["metric"]))
        figure = new_figure(7.6, 1.0 + 0.24 * table["share"].nunique())
        grid = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
        for axes, name in zip(grid, names, strict=True):
            part, sign = table[table["metric"] == name], -1 if name == "KID" else 1
            ends = np.sort(sign * part[["low", "high"]].to_numpy(), axis=1)
            value, places = sign * part["difference"].to_numpy(), range(len(part))
            axes.errorbar(value, places, xerr=np.maximum(0, [value - ends[:, 0], ends[:, 1] - value]), fmt="o", lw=1.2,
                          capsize=2)
            axes.axvline(0, color="0.3", ls="--", lw=1)
            axes.set_yticks(places, [f"{share:g} %" for share in part["share"]])
            axes.set(title=name, ylim=(len(part) - 0.5, -0.5))
            axes.tick_params(axis="x", labelrotation=45)
        grid[0].set_ylabel("the cloud's share")
        figure.supxlabel("device-first better  |  cloud-first better", fontsize=8)
    return figure


def split_orders(pictures: Any, shares: Sequence[float], orders: Sequence[str]) -> Figure:
    """Figure 3, the row of pictures (orders, shares, 3, H, W): one prompt and noise, by order and the cloud's share."""
    return picture_grid(pictures, orders, [f"{share:g} %" for share in shares], column_title="the cloud's share")


def split_grid(pictures: Any, columns: Sequence[str], rows: Sequence[str]) -> Figure:
    """Figure 7: pictures (columns, rows, 3, H, W): a row a prompt, a column a switch point."""
    return picture_grid(_array(pictures).swapaxes(0, 1), rows, columns)


def split_accelerated(pictures: Any, columns: Sequence[str]) -> Figure:
    """Figures 10 and 11: pictures (2, prompts, columns, 3, H, W), two rows a prompt: without and with acceleration."""
    images = _array(pictures).swapaxes(0, 1)
    return picture_grid(images, ["without", "with"] * len(images), columns, row_title="acceleration")


def split_shifts(table: pd.DataFrame, metrics: Mapping[str, str], derived: int) -> Figure:
    """Table 4's lower part: each metric against the shift, with intervals; the derived shift is the dotted line."""
    table = table[table["method"].str.startswith("obclip+cache") & table["against"].isna()]
    table = table.assign(shift=table["method"].str.split("=").str[1].astype(int))
    with styled():
        figure = new_figure(7.2, 2.0)
        grid = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axes, (name, label) in zip(grid, metrics.items(), strict=True):
            part = table[table["metric"] == name].sort_values("shift")
            (line,) = axes.plot(part["shift"], part["value"])
            axes.fill_between(part["shift"], part["low"], part["high"], alpha=0.2, lw=0, color=line.get_color())
            axes.axvline(derived, color="0.3", ls=":", lw=1)
            axes.set(xlabel="shift (steps)", title=label)
    return figure


def split_noise_levels(levels: pd.DataFrame, rule: pd.DataFrame, k: int) -> Figure:
    """The rule behind the shift: noise left before every step of both schedules, and where the device joins after k."""
    figure = lines(levels, "step", "log_snr", by="schedule", xlabel="step of its own schedule",
                   ylabel="log signal-to-noise ratio", width=5.8)
    row, axes = rule[rule["k"] == k].iloc[0], figure.axes[0]
    axes.annotate("", (row["join"], row["device_log_snr"]), (k, row["cloud_log_snr"]),
                  arrowprops={"arrowstyle": "->", "color": "0.3"})
    axes.annotate(f"shift {row['shift']:g}", ((k + row["join"]) / 2, row["cloud_log_snr"]), (0, 5), ha="center",
                  textcoords="offset points", fontsize=8)
    return figure


def split_hand_over(table: pd.DataFrame) -> Figure:
    """What a hand-over loses against k, a line a scheduler, a panel a mode; the line is 1e-4, zeros stand at 1e-8."""
    shown = table.assign(error=table["max_abs_diff"].clip(lower=1e-8))
    figure = lines(shown, "k", "error", by="scheduler", panel="mode", log="y", xlabel="switch point k",
                   ylabel="largest difference of the latent", width=7.0)
    for axes in figure.axes:
        axes.axhline(1e-4, color="0.3", ls="--", lw=1)
    return figure


def split_codings(table: pd.DataFrame, reference: float) -> Figure:
    """Bytes a candidate against the picture's error, a panel an N and mode, a point a coding; dotted: fp16 latents."""
    shown = table[table["coding"] != "raw"]
    with styled():
        numbers, modes = list(dict.fromkeys(shown["N"])), list(dict.fromkeys(shown["mode"]))
        figure = new_figure(6.8, 1.7 * len(modes) + 0.4)
        grid = figure.subplots(len(modes), len(numbers), squeeze=False, sharex=True, sharey=True)
        for row, mode in zip(grid, modes, strict=True):
            for axes, N in zip(row, numbers, strict=True):
                part = shown[(shown["N"] == N) & (shown["mode"] == mode)]
                for number, (coding, one) in enumerate(_groups(part, "coding")):
                    axes.plot(one["bytes_a_candidate"] / 1000, one["picture_rms_255"], "os^D"[number % 4], label=coding)
                axes.axvline(reference / 1000, color="0.3", ls=":", lw=1)
                axes.set(title=f"N = {N}, {mode}", yscale="log")
        for axes in grid[-1]:
            axes.set_xlabel("kB a candidate")
        figure.supylabel("error of the picture (grey levels of 255)", fontsize=8)
        grid[0, 0].legend()
    return figure


def split_from_picture(table: pd.DataFrame, chance: float) -> Figure:
    """Image-to-image: what the result follows, and what the cloud can read, against the share of steps noised."""
    names = {"followed": "new attributes in the result", "read": "old attributes, read by the cloud"}
    long = pd.concat([pd.DataFrame({"noised": table["noised_share"], "what": label, "value": table[name],
                                    "low": table[f"{name}_low"], "high": table[f"{name}_high"]})
                      for name, label in names.items()])
    figure = lines(long, "noised", "value", by="what", low="low", high="high", xlabel="share of the steps noised (%)",
                   ylabel="attribute accuracy", width=6.4)
    figure.axes[0].axhline(chance, color="0.3", ls="--", lw=1)
    return figure


def _measured(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that hold measured values, not paired differences."""
    return table[table[[name for name in table if name.startswith("against")]].isna().all(axis=1)]


def quality_bias(table: pd.DataFrame) -> Figure:
    """FID and KID of a source with itself against the number n of pictures, with the extremes of repeated draws; the
    truth, 0, is dashed. Columns metric, n, value, low, high."""
    with styled():
        figure = new_figure(6.6, 2.6)
        names = list(dict.fromkeys(table["metric"]))
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            part = table[table["metric"] == name].sort_values("n")
            axes.plot(part["n"], part["value"])
            axes.fill_between(part["n"], part["low"], part["high"], alpha=0.2, lw=0)
            axes.axhline(0, color="0.3", ls="--", lw=1, marker="")
            axes.set(xlabel="pictures, n", ylabel=f"{name} of a source with itself", xscale="log")
    return figure


def quality_notices(table: pd.DataFrame, labels: Mapping[str, tuple[str, bool]]) -> Figure:
    """Which metric notices which fault: a row a metric, a column a fault. Columns metric, fault, value, notices."""
    colours = {"-": "white", "yes": COLOURS[2], "no": "0.85", "wrongly better": COLOURS[1]}
    metrics, faults = (list(dict.fromkeys(table[name])) for name in ("metric", "fault"))
    with styled():
        figure = new_figure(0.95 * len(faults) + 1.4, 0.42 * len(metrics) + 0.5)
        axes = figure.add_subplot()
        for row in table.itertuples():
            x, y = faults.index(row.fault), metrics.index(row.metric)
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colours[row.notices], edgecolor="white"))
            told = "" if row.notices == "-" else f"\n{row.notices}"
            axes.text(x, y, f"{row.value:.3g}{told}", ha="center", va="center", fontsize=7)
        axes.set(xlim=(-0.5, len(faults) - 0.5), ylim=(len(metrics) - 0.5, -0.5))
        axes.set_xticks(range(len(faults)), faults)
        axes.set_yticks(range(len(metrics)), [labels[name][0] for name in metrics])
        axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
        _bare(axes)
    return figure


def quality_methods(table: pd.DataFrame, metrics: Mapping[str, tuple[str, bool]]) -> Figure:
    """Tables 2, 3 and 6: a row a system and switch point, a colour an N, a panel a metric, with intervals."""
    single = _measured(table)
    single = single[single["metric"].isin(list(metrics))]
    system = [name if pd.isna(k) else f"{name}, k = {k:g}" for name, k in zip(single["method"], single["k"],
                                                                               strict=True)]
    panel = [f"{metrics[name][0]}\n({'more' if metrics[name][1] else 'less'} is better)" for name in single["metric"]]
    shown = single.assign(system=system, panel=panel, N=[f"N = {n}" for n in single["candidates"]])
    order = {name: place for place, name in enumerate(metrics)}
    shown = shown.sort_values("metric", key=lambda column: column.map(order), kind="stable")
    return dots(shown, "value", "system", by="N", low="low", high="high", panel="panel", xlabel="", width=9.6)


def quality_systems(table: pd.DataFrame) -> Figure:
    """Every system of Table 1: the cloud's multiply-adds against attribute accuracy, the colour how often the cloud
    names the real candidate. Systems that are only cited stand at the right edge. Columns of systems.csv."""
    measured, cited = table[table["attribute_accuracy"].notna()], table[table["attribute_accuracy"].isna()]
    with styled():
        figure = new_figure(7.6, 5.0)
        axes = figure.add_subplot()
        x, y = measured["cloud_gmacs"].clip(lower=0), measured["attribute_accuracy"]
        axes.errorbar(x, y, yerr=np.maximum(0, [y - measured["low"], measured["high"] - y]), fmt="none", lw=0.7,
                      color="0.6", zorder=1)
        dots_ = axes.scatter(x, y, c=measured["guess"], vmin=0, vmax=1, cmap="viridis_r", s=42, zorder=2,
                             edgecolor="black", lw=0.5)
        handles = []
        for number, row in enumerate(measured.itertuples(), 1):
            N = "" if pd.isna(row.candidates) else f" (N = {row.candidates:g})"
            axes.annotate(str(number), (max(row.cloud_gmacs, 0), row.attribute_accuracy), (4, 4), fontsize=6.5,
                          textcoords="offset points")
            handles.append(Line2D([], [], ls="", label=f"{number}  {row.system}{N}"))
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=6.5, handlelength=0)
        axes.set(xlabel="the cloud's multiply-adds a picture (billions)", ylabel="attribute accuracy (more is better)",
                 xscale="symlog")
        axes.set_xlim(-0.3, 12 * max(1.0, float(x.max())))
        for number, row in enumerate(cited.itertuples()):
            axes.annotate(f"{row.system}: cited, beyond the axis", (0.99, 0.03 + 0.045 * number), fontsize=6.5,
                          xycoords="axes fraction", ha="right", color="0.3")
        figure.colorbar(dots_, ax=axes, label="how often the cloud names the real candidate")
    return figure


def quality_fairness(table: pd.DataFrame) -> Figure:
    """Fairness: how often an attribute is drawn as asked, by the value that was asked for, and the paired change by
    acceleration. Columns attribute, asked, metric, method, value, low, high, against."""
    part = table[(table["metric"] == "right") & (table["asked"] != "gap")]
    ours = part[part["method"].str.startswith("obclip") | part["against"].notna()]
    panel = np.where(ours["against"].isna(), "as asked (share)", "change by acceleration")
    shown = ours.assign(panel=panel, what=ours["attribute"] + ": " + ours["asked"])
    return dots(shown, "value", "what", by="method", low="low", high="high", panel="panel", xlabel="", width=8.4)


def quality_pivot(table: pd.DataFrame) -> Figure:
    """Batch reuse: how many of the attributes that differ from the pivot's are drawn as the pivot has them, against
    their number. Columns candidates, k, apart, metric, method, value, low, high, against."""
    part = table[(table["metric"] == "pulled") & table["against"].isna()]
    part = part.assign(panel=[f"N = {n}, k = {k}" for n, k in zip(part["candidates"], part["k"], strict=True)],
                       shown=part["method"].str.replace("obclip+cache+reuse", "with reuse").str.replace(
                           "obclip+cache", "without reuse"))
    figure = lines(part, "apart", "value", by="shown", panel="panel", low="low", high="high",
                   xlabel="attributes apart", ylabel="drawn as the pivot's (share)",
                   width=max(4.4, 1.5 * part["panel"].nunique() + 1.4))
    for axes in figure.axes:
        axes.set(xticks=sorted(set(part["apart"])), xlim=(0.7, max(part["apart"]) + 0.3), ylim=(-0.05, 1.05))
    return figure


def quality_claims(table: pd.DataFrame) -> Figure:
    """The paper's claims and their verdicts: a bar an artefact, how many claims hold, fail or are open."""
    colours = {"holds": COLOURS[2], "does not hold": COLOURS[1], "cannot be decided here": "0.8"}
    names = list(dict.fromkeys(table["artefact"]))
    with styled():
        figure = new_figure(6.4, 0.6 + 0.22 * len(names))
        axes = figure.add_subplot()
        left = np.zeros(len(names))
        for verdict, colour in colours.items():
            counts = np.array([((table["artefact"] == name) & (table["verdict"] == verdict)).sum() for name in names])
            axes.barh(range(len(names)), counts, left=left, color=colour, label=verdict, edgecolor="white")
            left = left + counts
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="claims", ylim=(len(names) - 0.5, -0.5))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", visible=False)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def beyond_frontier(table: pd.DataFrame, most: Mapping[int, float]) -> Figure:
    """The cloud's work against the error of the latents, a panel a number of candidates; ``most`` is its target."""
    with styled():
        panels = sorted(set(table["candidates"]), reverse=True)
        figure = new_figure(1.4 + 3.1 * len(panels), 3.4)
        kinds = list(dict.fromkeys(table["kind"]))
        for axes, N in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
            part = table[table["candidates"] == N]
            for number, kind in enumerate(kinds):
                group = part[part["kind"] == kind]
                error = np.maximum(0, [group["latent_error"] - group["latent_error_low"],
                                       group["latent_error_high"] - group["latent_error"]])
                axes.errorbar(group["cloud_work_ratio"], group["latent_error"], yerr=error, fmt="os^DvPXh"[number % 8],
                              lw=0.7, capsize=1.5, color=COLOURS[number % len(COLOURS)], label=kind)
            best = part[front(part["cloud_work_ratio"], part["latent_error"])].sort_values("cloud_work_ratio")
            axes.plot(best["cloud_work_ratio"], best["latent_error"], color="0.4", ls="--", lw=1, marker="", zorder=0)
            axes.axhline(1, color="0.6", ls="--", lw=0.8)
            if N in most:
                axes.axvline(most[N], color="0.4", ls=":", lw=1)
            axes.set(xscale="log", xlabel="cloud's work (plain generations)", title=f"N = {N}")
            axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
        figure.axes[0].set_ylabel("latent error (multiples of the spread)")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper")
    return figure


def beyond_pictures(pictures: Any, methods: Sequence[str]) -> Figure:
    """The same candidates, a column each, served by each method, a row each; pictures (methods, count, 3, H, W)."""
    pictures = _array(pictures)
    return picture_grid(pictures, list(methods), [""] * pictures.shape[1], column_title="candidates")


def beyond_gains(table: pd.DataFrame) -> Figure:
    """The error of one shared unconditional branch without correction and with that of each spread."""
    with styled():
        figure = new_figure(5.0, 2.8)
        axes = figure.add_subplot()
        error = np.maximum(0, [table["latent_error"] - table["latent_error_low"],
                               table["latent_error_high"] - table["latent_error"]])
        places = np.arange(len(table))
        axes.errorbar(places, table["latent_error"], yerr=error, fmt="o", capsize=2)
        axes.set_xticks(places, table["correction"])
        axes.set(xlabel="correction", ylabel="latent error (multiples of the spread)", ylim=(0, None))
    return figure


def beyond_shapes(table: pd.DataFrame) -> Figure:
    """The work of every method on a cloud of the paper, a panel a number of candidates, one plain generation dotted."""
    with styled():
        panels = sorted(set(table["candidates"]))
        most = max(table[table["candidates"] == N].shape[0] for N in panels)
        figure = new_figure(4.0 * len(panels), 0.8 + 0.24 * most)
        for axes, N in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            part = table[table["candidates"] == N].sort_values("cloud_work_ratio", ascending=False)
            axes.barh(part["method"], part["cloud_work_ratio"], color=COLOURS[0])
            axes.axvline(1, color="0.3", ls=":", lw=1)
            axes.tick_params(axis="y", labelsize=7)
            axes.grid(axis="y", visible=False)
            axes.set(xlabel="cloud's work (plain generations)", title=f"N = {N}")
    return figure
