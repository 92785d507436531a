"""Figures show every row of their table, refuse what does not fit, and are the same bytes for the same data."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib import rcParams
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from obclip_core import figures
from obclip_core.figures import save_figure

TABLE = pd.DataFrame(
    {
        "k": [0, 5, 10] * 2,
        "kid": [0.3, 0.2, 0.1, 0.4, 0.3, np.nan],
        "low": [0.2, 0.1, 0.0, 0.3, 0.2, np.nan],
        "high": [0.4, 0.3, 0.2, 0.5, 0.4, np.nan],
        "cost": [1.0, 2.0, 3.0, 1.5, 2.5, 3.5],
        "first": ["cloud"] * 3 + ["device"] * 3,
    }
)
RNG = np.random.default_rng(0)
PICTURES = RNG.random((2, 3, 3, 8, 8))


def all_figures():
    labels = {"xlabel": "k (steps)", "ylabel": "KID"}
    bounds = {"low": "low", "high": "high"}
    yield "picture_grid", figures.picture_grid(PICTURES, ["old", "young"], ["k = 0", "k = 5", "k = 10"], title="faces")
    yield "lines", figures.lines(TABLE, "k", "kid", by="first", **labels, **bounds)
    yield "lines_in_panels", figures.lines(TABLE, "k", "kid", panel="first", **labels)
    yield "dots", figures.dots(TABLE[:5], "kid", "k", by="first", xlabel="KID", reference=0.25, **bounds)
    yield "shaded_bars", figures.shaded_bars(TABLE[:3], "k", "kid", "cost", xlabel="step", ylabel="work (GMAC)")
    yield "heat_maps", figures.heat_maps(PICTURES[:, 0, 0], ["a"], ["x", "y"], label="difference")
    yield "pareto", figures.pareto(TABLE[:5], "cost", "kid", by="first", label="k", **bounds, **labels)


FIGURES = dict(all_figures())


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_data_is_the_same_bytes(name, tmp_path):
    first = save_figure(FIGURES[name], name, tmp_path).path.read_bytes()
    again = save_figure(dict(all_figures())[name], name, tmp_path).path.read_bytes()
    assert first == again and first.startswith(b"\x89PNG") and b"Software" not in first
    assert 0 < len(first) < 100_000


@pytest.mark.parametrize("rows, columns, options", [
    (["a photo of a\nyoung woman\nin the park"] * 2, "xyz", {}),
    (["one long label here\nb\nc"] * 3, "xy", {"inch": 0.4}),
    (["a"] * 2, ["a long\nlabel of\nthree lines"] * 3, {"title": "a title wider than all the pictures below it " * 2}),
])
def test_no_label_of_a_grid_reaches_over_the_edge(rows, columns, options):
    figure = figures.picture_grid(PICTURES.reshape(6, 3, 8, 8), rows, columns, **options)
    with figures.styled():
        figure.draw_without_rendering()
        axes, edge = figure.axes[0], figure.bbox
        texts = [*axes.get_xticklabels(), *axes.get_yticklabels(), *figure.findobj(Text)]
        boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert len(boxes) >= 5
    for box in boxes:
        assert edge.x0 <= box.x0 and box.x1 <= edge.x1 and edge.y0 <= box.y0 and box.y1 <= edge.y1


@pytest.mark.parametrize("kind", ["svg", "pdf"])
def test_vector_figures_bear_no_date_and_are_the_same_bytes(kind, tmp_path):
    first = save_figure(FIGURES["lines"], "x", tmp_path, kind).path.read_bytes()
    assert save_figure(dict(all_figures())["lines"], "x", tmp_path, kind).path.read_bytes() == first
    assert b"Date" not in first and b"date>" not in first
    with pytest.raises(ValueError, match="kind is 'gif'"):
        save_figure(FIGURES["lines"], "x", tmp_path, "gif")


def test_a_saved_figure_shows_itself_without_its_folder(tmp_path):
    saved = save_figure(FIGURES["lines"], "fig03", tmp_path)
    assert saved.path == tmp_path / "figures" / "fig03.png" and repr(saved) == "fig03.png"
    raw, look = saved._repr_png_()
    assert raw == saved.path.read_bytes() and 200 < look["width"] < 1000


def test_pictures_stand_where_their_labels_say():
    axes = FIGURES["picture_grid"].axes[0]
    canvas = axes.images[0].get_array()
    x, y = (int(ticks[i]) for ticks, i in ((axes.get_xticks(), 2), (axes.get_yticks(), 1)))
    assert np.allclose(canvas[y - 4 : y + 4, x - 4 : x + 4].transpose(2, 0, 1), PICTURES[1, 2])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["k = 0", "k = 5", "k = 10"]


def test_empty_places_are_white_and_a_wrong_number_is_refused():
    pictures = PICTURES.copy()
    pictures[0, 0] = np.nan
    canvas = figures.picture_grid(pictures, "ab", "xyz").axes[0].images[0].get_array()
    assert (canvas[:8, :8] == 1).all() and not (canvas[:8, 9:17] == 1).all()
    with pytest.raises(ValueError, match="6 pictures for 2 rows x 2 columns"):
        figures.picture_grid(PICTURES, "ab", "xy")
    with pytest.raises(ValueError, match="2 maps for 1 rows x 1 columns"):
        figures.heat_maps(np.zeros((2, 4, 4)), label="")


def test_a_tensor_is_as_good_as_an_array():
    torch = pytest.importorskip("torch")
    ours = figures.picture_grid(torch.tensor(PICTURES, requires_grad=True), "ab", "xyz").axes[0].images[0].get_array()
    assert np.allclose(ours, figures.picture_grid(PICTURES, "ab", "xyz").axes[0].images[0].get_array())


def test_lines_have_a_band_a_legend_and_no_missing_points():
    axes = FIGURES["lines"].axes[0]
    assert [len(line.get_xdata()) for line in axes.lines] == [3, 2]
    assert len(axes.collections) == 2
    legend = FIGURES["lines"].legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["cloud", "device"]
    assert axes.get_xlabel() == "k (steps)" and axes.get_ylabel() == "KID"


def test_shaded_bars_end_at_the_full_height():
    bars = FIGURES["shaded_bars"].axes[0].patches
    used, saved = bars[:3], bars[3:]
    assert np.allclose([bar.get_height() for bar in used], [0.3, 0.2, 0.1])
    assert np.allclose([bar.get_y() + bar.get_height() for bar in saved], [1, 2, 3])
    assert all(bar.get_hatch() for bar in saved)


def test_the_front_is_what_nothing_else_beats():
    #           both   worse  on it  beaten  the same point twice
    costs = [1, 2, 2, 3, 1]
    kid = [3, 3, 1, 2, 3]
    assert figures.front(costs, kid).tolist() == [True, False, True, False, True]


def test_the_palette_is_told_apart_in_grey_and_by_the_colour_blind():
    def grey(colour):
        return float(np.dot(to_rgb(colour), [0.299, 0.587, 0.114]))

    # Okabe and Ito 2008; the first four, which most figures use, also differ from white and in marker
    assert figures.COLOURS[:4] == ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
    assert all(grey(colour) < 0.75 for colour in figures.COLOURS[:7])
    with figures.styled():
        cycle = rcParams["axes.prop_cycle"].by_key()
        assert tuple(cycle["color"]) == figures.COLOURS
        assert len(set(cycle["marker"])) == 8


def test_the_style_is_not_left_behind_and_pyplot_is_not_used():
    before = dict(rcParams)
    figures.lines(TABLE, "k", "kid", xlabel="", ylabel="")
    assert dict(rcParams) == before
    code = "import sys; from obclip_core import figures; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("draw", [
    lambda table: figures.dots(table, "value", "what", by="method", panel="panel", xlabel=""),
    lambda table: figures.lines(table, "step", "value", by="method", panel="panel", xlabel="step", ylabel="value"),
])  # fmt: skip
def test_a_method_keeps_its_colour_in_a_panel_that_lacks_another(draw):
    rows = [(panel, method) for panel, some in (("left", "abc"), ("right", "bc")) for method in some]
    table = pd.DataFrame(rows, columns=["panel", "method"]).assign(value=1.0, what="x", step=0)
    figure = draw(table)
    colours = [{label: part[0].get_color() if isinstance(part, tuple) else part.get_color()
                for part, label in zip(*axes.get_legend_handles_labels(), strict=True)} for axes in figure.axes]
    assert colours[1] == {name: colours[0][name] for name in "bc"} and len(set(colours[0].values())) == 3
