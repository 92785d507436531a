"""Two runs are told apart where they differ by more than the stated tolerance, and nowhere else."""

import subprocess

import pandas as pd
import pytest

from obclip_core.compare import ABSOLUTE, RELATIVE, committed, compare, main, tell
from obclip_core.sweep import save_table

OLD = pd.DataFrame(
    {
        "method": ["a", "b"], "value": [1.0, 40.0], "low": [0.5, 30.0], "high": [1.5, 50.0], "n": [3, 4],
        "verdict": ["holds", "holds"], "cloud_seconds": [1.0, 2.0], "why": ["1.0", "40"],
    }
)  # fmt: skip


def left(**changed):
    found = compare({"t": OLD}, {"t": OLD.assign(**changed)})
    return list(found[["row", "column"]].itertuples(index=False, name=None))


def test_equal_runs_differ_nowhere():
    assert compare({"t": OLD}, {"t": OLD.copy()}).empty


def test_a_number_may_move_inside_its_interval_or_its_tolerance_and_no_further():
    assert left(value=[1.4, 40.0]) == []
    assert left(value=[1.6, 40.0]) == [(0, "value")]
    bare = OLD.drop(columns=["low", "high"])
    step = ABSOLUTE + RELATIVE * 40
    assert compare({"t": bare}, {"t": bare.assign(value=[1.0, 40 + 0.99 * step])}).empty
    assert len(compare({"t": bare}, {"t": bare.assign(value=[1.0, 40 + 1.01 * step])})) == 1
    assert left(value=[float("nan"), 40.0]) == [(0, "value")]


def test_verdicts_and_counts_must_be_equal():
    assert left(verdict=["holds", "does not hold"]) == [(1, "verdict")]
    assert left(n=[3, 5]) == [(1, "n")]


def test_the_size_of_coded_latents_is_measured_and_that_of_the_offer_is_exact():
    sizes = pd.DataFrame({"bytes_up": [2798], "bytes_down": [521902]})
    assert compare({"t": sizes}, {"t": sizes.assign(bytes_down=[521918])}).empty
    assert list(compare({"t": sizes}, {"t": sizes + 16}).column) == ["bytes_up"]
    assert list(compare({"t": sizes}, {"t": sizes.assign(bytes_down=[600000])}).column) == ["bytes_down"]


def test_what_a_clock_measured_and_what_a_sentence_quotes_are_not_compared():
    assert left(cloud_seconds=[9.0, 9.0], why=["2.0", "41"]) == []
    timed = pd.DataFrame({"metric": ["latency", "kid"], "value": [1.0, 1.0]})
    found = compare({"t": timed}, {"t": timed.assign(value=[5.0, 5.0])})
    assert list(found.row) == [1]


def test_a_missing_table_and_other_rows_are_named():
    assert "missing" in set(compare({"t": OLD}, {}).new)
    assert compare({"t": OLD}, {"t": OLD[:1]}).iloc[0].new == "1 rows, 8 columns"


def test_the_sentence_counts_tables_and_verdicts():
    found = compare({"t": OLD, "u": OLD}, {"t": OLD, "u": OLD.assign(verdict=["holds", "broken"])})
    said = tell(found, 2, "the last commit")
    assert "1 of 2 tables" in said and "u: 1 left it" in said and "verdicts that changed: 1" in said


def test_the_last_commit_is_what_counts(tmp_path):
    folder = tmp_path / "results" / "quick"
    save_table(OLD, "t", folder)
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    save_table(OLD.assign(n=[7, 7]), "t", folder)
    assert list(committed(folder, tmp_path)["t"].n) == [3, 4]


def test_without_a_commit_there_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="no git checkout"):
        committed(tmp_path / "results" / "quick", tmp_path)


def test_two_folders_on_the_command_line(tmp_path, capsys):
    for name, table in (("a", OLD), ("b", OLD.assign(n=[7, 7]))):
        save_table(table, "t", tmp_path / name)
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "0 of 1 tables" in capsys.readouterr().out
