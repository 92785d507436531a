"""The report shows the paper's numbers as printed beside ours; the README says what the results say."""

from __future__ import annotations

import json
import re
import tomllib

import pandas as pd
import pytest

from obclip_core import report
from obclip_core.provenance import ROOT

ARTEFACTS = tomllib.loads((ROOT / "data" / "paper" / "artefacts.toml").read_text(encoding="utf-8"))["artefact"]
PRINTED = pd.read_csv(ROOT / "data" / "paper" / "tables.csv", dtype=str)


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "quick"
    (folder / "tables").mkdir(parents=True)
    (folder / "figures").mkdir()
    return folder


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_sixteen_artefacts_are_there_and_every_printed_number_is_shown(results):
    text = report.report(results, "portraits")
    assert len(ARTEFACTS) == 16 and len({a["id"] for a in ARTEFACTS}) == 16
    for artefact in ARTEFACTS:
        part = section(text, artefact["title"])
        assert artefact["shows"] in part and "not made yet" in part
        for value in PRINTED[PRINTED.table == artefact["id"].removeprefix("table")].value:
            assert re.search(rf"\| {re.escape(value)} \|", part), (artefact["id"], value)
    assert set(PRINTED.table) == {a["id"].removeprefix("table") for a in ARTEFACTS if a["id"].startswith("table")}
    assert not any(a["notebook"] not in text for a in ARTEFACTS)


def test_ours_stands_below_the_row_of_the_paper_that_it_answers(results):
    rows = [
        ("portraits", "obclip", 10, 6, "fid", 41.23456, 40, 42.5, None),
        ("portraits", "obclip", 10, 6, "kid", 0.01, None, None, None),
        ("portraits", "device-only", None, 6, "fid", 60, None, None, None),
        ("portraits", "obclip", 10, 6, "kid", -0.5, None, None, "device-only"),
        ("portraits", "subset", 5, 6, "fid", 77, None, None, None),
    ]
    columns = ["world", "method", "k", "candidates", "metric", "value", "low", "high", "against"]
    pd.DataFrame(rows, columns=columns).to_csv(results / "tables" / "table2.csv", index=False)
    lines = [x for x in section(report.report(results, "portraits"), "Table 2").splitlines() if x.startswith("|")]
    assert lines[0].startswith("| source | world | method | k | candidates | fid |") and lines[0].endswith("| kid |")
    ours = [place for place, line in enumerate(lines) if "| ours | portraits | obclip | 10 | 6 |" in line]
    assert len(ours) == 1 and "| 41.23 [40, 42.5] |" in lines[ours[0]] and "-0.5" not in lines[ours[0]]
    assert lines[ours[0] - 1].startswith("| paper | rv40+small-sd | obclip | 10 | 6 |")
    device = [place for place, line in enumerate(lines) if "| ours | portraits | device-only |  | 6 | 60 |" in line]
    assert lines[device[0] - 1].startswith("| paper | rv40+small-sd | device-only |  | 6 |")
    assert lines[-1].startswith("| ours | portraits | subset |")


def test_results_find_their_artefact_by_name_by_list_and_by_row(results):
    for name in ("figure3_pictures", "figure13_shift", "split_sweep", "frontier"):
        (results / "figures" / f"{name}.png").write_bytes(b"")
    flops = pd.DataFrame({"artefact": ["Table 5", "Table 7"], "world": ["sd14", "sdxl"], "full": [1.5, 2.5]})
    flops.to_csv(results / "tables" / "flops.csv", index=False)
    claims = {"claim": ["early wins", "no guess"], "artefact": ["Figure 3", "Theorem 1"], "verdict": ["holds"] * 2}
    pd.DataFrame(claims).to_csv(results / "tables" / "claims.csv", index=False)
    pd.DataFrame({"n": range(100)}).to_csv(results / "tables" / "attacks.csv", index=False)
    text = report.report(results, "portraits")
    assert re.findall(r"\(figures/(.*)\)", section(text, "Figure 3")) == ["figure3_pictures.png", "split_sweep.png"]
    assert "| early wins | holds |" in section(text, "Figure 3")
    assert "| Figure 3 | 02_hybrid_split | 2 figures, 0 tables | 1 x holds |" in text
    assert "figure13_shift" in section(text, "Figure 13") and "figure13" not in section(text, "Figure 3")
    assert "| sd14 | 1.5 |" in section(text, "Table 5") and "sdxl | 2.5" not in section(text, "Table 5")
    assert "| sdxl | 2.5 |" in section(text, "Table 7")
    beyond = section(text, "Beyond the paper")
    assert "frontier.png" in beyond and "its first 60 of 100 rows" in beyond and "flops" not in beyond
    assert "early wins" not in beyond and "| no guess | Theorem 1 | holds |" in beyond


def test_the_report_is_the_same_text_for_the_same_results(results):
    pd.DataFrame({"n": [1]}).to_csv(results / "tables" / "attacks.csv", index=False)
    assert report.report(results, "portraits") == report.report(results, "portraits")


def test_the_report_tells_each_machine_once(results):
    one = {"machine": {"processor": "A", "cores": 2, "instruction_set": "AVX2", "gpu": ""}, "parameters": {"seed": 3},
           "versions": {"torch": "2.13.0"}}
    other = one | {"machine": one["machine"] | {"gpu": "B"}}
    (results / "run.json").write_text(json.dumps({"00": one, "01": one, "02": other}))
    made = [line.split(" (")[0] for line in report.report(results, "portraits").splitlines() if line.startswith("Made")]
    assert made == [f"Made on: A, 2 cores, AVX2{gpu}; seed 3; torch 2.13.0" for gpu in ("", ", B")]


# README


def test_numbers_between_markers_are_read_from_tables(tmp_path):
    (tmp_path / "quality.csv").write_text("metric,target,measured\npsnr,>=25,27.345\nage,>=0.93,0.99\n")
    text = (
        "VAE: <!-- from quality.csv | measured where metric=psnr | {:.1f} dB -->1 dB<!-- end -->, later "
        "<!-- from none.csv | x where a=b -->3<!-- end -->\n<!-- from quality.csv -->\n<!-- end --> 25 steps"
    )
    new = report.fill(text, tmp_path)
    assert new == (
        "VAE: <!-- from quality.csv | measured where metric=psnr | {:.1f} dB -->27.3 dB<!-- end -->, later "
        "<!-- from none.csv | x where a=b -->not measured yet<!-- end -->\n<!-- from quality.csv -->\n"
        "| metric | target | measured |\n| --- | --- | --- |\n| psnr | >=25 | 27.34 |\n| age | >=0.93 | 0.99 |\n"
        "<!-- end --> 25 steps"
    )
    assert report.fill(new, tmp_path) == new
    for query, problem in (("speed where metric=age", "no column speed"), ("measured where metric=x", "0 rows where")):
        with pytest.raises(ValueError, match=problem):
            report.fill(f"<!-- from quality.csv | {query} --><!-- end -->", tmp_path)


README = (ROOT / "README.md").read_text(encoding="utf-8")


def without_seconds(text: str) -> list[list[str]]:
    """The cells of every line, less the columns of a table whose name tells seconds: each machine has its own."""
    lines, timed = [], None
    for line in text.splitlines():
        cells = line.split(" | ")
        if not line.startswith("|"):
            timed = None
        elif timed is None:
            timed = {place for place, name in enumerate(cells) if "seconds" in name}
        lines.append([cell.strip("| ") for place, cell in enumerate(cells) if place not in (timed or ())])
    return lines


def test_the_readme_says_what_the_results_say():
    assert without_seconds(report.fill(README)) == without_seconds(README), "run: make report"


def test_only_seconds_may_differ_between_the_readme_and_the_results():
    table = "| system | bytes | cloud_seconds |\n| --- | --- | --- |\n| a | {} | {} |\n"
    assert without_seconds(table.format(3, 1.0)) == without_seconds(table.format(3, 2.0))
    assert without_seconds(table.format(3, 1.0)) != without_seconds(table.format(4, 1.0))


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("[fq]*/report.md")), ids=lambda path: path.parent.name)
def test_a_stored_report_says_what_the_results_say(path):
    world = path.parent.name.partition("-")[2] or "portraits"
    assert report.report(path.parent, world) == path.read_text(encoding="utf-8"), "run: make report"


def test_no_measured_number_in_the_readme_is_typed_by_hand():
    text = report.MARK.sub("", README)
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|https?://\S+", "", text, flags=re.S)
    text = text.replace("Python 3.11", "").replace("Apache-2.0", "")
    assert re.findall(r"\d+\.\d+|\d+(?:\.\d+)? ?(?:%|dB|[KMG]B|×|points|times|ms\b)", text) == []
