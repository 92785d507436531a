"""Notebooks run when something they depend on changed, and not otherwise; a failure leaves the old results alone."""

from __future__ import annotations

import base64
import io
import json
import shutil
import sys

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from obclip_core import notebooks
from obclip_core.notebooks import NotebookError
from obclip_core.provenance import ROOT
from obclip_core.sweep import Setting

PARAMETERS = 'preset = "quick"\nworld = "portraits"\nseed = 0'
OPEN = """import pandas as pd
from obclip_core import sweep, technique
setting = sweep.setting(preset, world, seed)"""
FIRST = 'sweep.save_table(technique.measure(setting.pick(1, 2, 3), seed), "first", setting.out)'
SECOND = """table = sweep.load_table("first", setting.folder)
sweep.save_table(table * 2, "second", setting.out)
print("first has", len(table), "row")"""

BOTH = {"reads": ["tables/first.csv"], "writes": ["tables/second.csv"]}


def write(path, *cells, reads=(), writes=(), parameters=PARAMETERS):
    book = nbformat.v4.new_notebook(metadata={"obclip": {"reads": list(reads), "writes": list(writes)}})
    book.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    book.cells += [nbformat.v4.new_code_cell(source) for source in cells]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(book, path)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A small project of its own: two notebooks, one after the other, over one technique."""
    root = tmp_path / "project"
    (root / "obclip_core").mkdir(parents=True)
    for name in ("__init__", "sweep", "provenance"):
        shutil.copy(ROOT / "obclip_core" / f"{name}.py", root / "obclip_core")
    (root / "obclip_core" / "technique.py").write_text(
        "import pandas as pd\ndef measure(n, seed):\n    return pd.DataFrame({'n': [n], 'seed': [seed]})\n"
    )
    (root / "obclip_core" / "other.py").write_text("")
    (root / "data" / "worlds").mkdir(parents=True)
    (root / "data" / "worlds" / "portraits.toml").write_text("")
    (root / "data" / "portraits" / "weights").mkdir(parents=True)
    (root / "data" / "portraits" / "weights" / "unet").write_text("1")
    (root / "requirements.txt").write_text("")
    write(root / "notebooks" / "00_first.ipynb", OPEN, FIRST, writes=["tables/first.csv"])
    write(root / "notebooks" / "01_second.ipynb", OPEN, SECOND, **BOTH)
    monkeypatch.setenv("OBCLIP_RESULTS", str(root / "results"))
    return root


def ran(capsys) -> list[str]:
    return [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if "running" in line]


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_notebook_runs_again_when_something_it_depends_on_changed_and_not_otherwise(project, capsys):
    setting = Setting("smoke")
    both = ["00_first", "01_second"]

    def run():
        notebooks.run(setting, root=project)
        return ran(capsys)

    assert run() == both
    assert (setting.folder / "tables" / "second.csv").read_text() == "n,seed\n2,0\n"
    results = tree(setting.folder)
    assert set(results) == {
        "tables/first.csv", "tables/second.csv", "notebooks/00_first.ipynb", "notebooks/01_second.ipynb",
        ".stamps/00_first.json", ".stamps/01_second.json", "run.json",
    }  # fmt: skip
    said = json.loads(results["run.json"])
    assert list(said) == both
    assert said["01_second"]["parameters"] == {"preset": "smoke", "world": "portraits", "seed": 0}
    assert said["00_first"]["versions"]["torch"] == torch.__version__ and said["00_first"]["seconds"] >= 0
    assert str(project) not in results["notebooks/00_first.ipynb"].decode()
    assert run() == []
    assert tree(setting.folder) == results

    # what no notebook imports, an output that a reader stored, a new time of a file
    (project / "obclip_core" / "other.py").write_text("changed = True")
    stored = nbformat.read(project / "notebooks" / "00_first.ipynb", as_version=4)
    stored.cells[0].outputs = [nbformat.v4.new_output("stream", text="hello")]
    nbformat.write(stored, project / "notebooks" / "00_first.ipynb")
    (project / "obclip_core" / "technique.py").touch()
    assert run() == []

    # a module, with no effect on the first table: the second notebook imports it too
    technique = project / "obclip_core" / "technique.py"
    technique.write_text(technique.read_text() + "# a comment\n")
    assert run() == both
    # an input: the first table, changed behind the back, is made again, and is as before
    (setting.folder / "tables" / "first.csv").write_text("n,seed\n7,7\n")
    assert run() == ["00_first"]
    assert tree(setting.folder)["tables/second.csv"] == results["tables/second.csv"]
    # an output that is gone
    (setting.folder / "tables" / "second.csv").unlink()
    assert run() == ["01_second"]
    # the weights, the prompts, the pins, the notebook itself
    (project / "data" / "portraits" / "weights" / "unet").write_text("2")
    assert run() == both
    write(project / "notebooks" / "01_second.ipynb", OPEN, SECOND + "\n1", **BOTH)
    assert run() == ["01_second"]


def test_prompts_pins_and_inputs_are_dependencies(project):
    setting = Setting("smoke")
    book = notebooks.load(project / "notebooks" / "01_second.ipynb")
    before = notebooks.depends(book, setting, project)
    for name in ("data/prompts/portraits.toml", "requirements.txt", "results/smoke/tables/first.csv"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("changed")
        after = notebooks.depends(book, setting, project)
        assert after != before, name
        before = after
    assert notebooks.depends(book, Setting("smoke", seed=1), project) != before
    assert "obclip_core/provenance.py" in before and "obclip_core/other.py" not in before


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("\n1 / 0", r"00_first failed in code cell 4 \(1 / 0\): ZeroDivisionError: division by zero"),
        ("import os; os._exit(1)", r"00_first failed in code cell 4 \(import os; os._exit\(1\)\): .*Kernel died"),
        ('sweep.save_table(pd.DataFrame(), "more", setting.out)', "00_first wrote tables/more.csv, which"),
    ],
)
def test_a_failed_run_names_the_cell_and_leaves_the_old_results(project, cell, message):
    setting = Setting("smoke")
    (setting.folder / "tables").mkdir(parents=True)
    (setting.folder / "tables" / "first.csv").write_text("old")
    write(project / "notebooks" / "00_first.ipynb", OPEN, FIRST, cell, writes=["tables/first.csv"])
    with pytest.raises(NotebookError, match=message):
        notebooks.run(setting, ["00"], root=project)
    assert tree(setting.folder) == {"tables/first.csv": b"old"}


def test_a_declared_table_that_is_not_written_is_an_error(project):
    write(project / "notebooks" / "00_first.ipynb", OPEN, writes=["tables/first.csv"])
    with pytest.raises(NotebookError, match="00_first did not write tables/first.csv"):
        notebooks.run(Setting("smoke"), ["00"], root=project)
    assert tree(Setting("smoke").folder) == {}


@pytest.mark.parametrize(
    "parameters",
    [PARAMETERS + "\nsteps = 25", 'preset = "quick"', PARAMETERS.replace("quick", "full"), "preset = f()", "x ="],
)
def test_other_parameters_are_refused_before_anything_runs(project, parameters, capsys):
    write(project / "notebooks" / "01_second.ipynb", OPEN, parameters=parameters)
    with pytest.raises(NotebookError, match="01_second: it needs one cell tagged parameters that says preset ="):
        notebooks.run(Setting("smoke"), root=project)
    assert ran(capsys) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "fast"], "invalid choice: 'fast'"),
        (["--steps", "3"], "unrecognized arguments: --steps"),
        (["--world", "atlantis"], "world is 'atlantis'"),
        (["--seed", "-1"], "seed is -1"),
        (["77"], "there is no notebook 77"),
    ],
)
def test_an_unknown_preset_parameter_or_notebook_is_an_error(arguments, message, capsys):
    try:
        code = notebooks.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code != 0 and message in capsys.readouterr().err


def test_order_and_declarations_are_checked_before_anything_runs(project, capsys):
    def refused(match, name, **said):
        write(project / "notebooks" / name, OPEN, **said)
        with pytest.raises(NotebookError, match=match):
            notebooks.run(Setting("smoke"), root=project)
        (project / "notebooks" / name).unlink()

    refused("00_a: it reads tables/second.csv, which only 01_second writes, later", "00_a.ipynb", reads=BOTH["writes"])
    refused("02_b: it reads tables/none.csv, which is not there", "02_b.ipynb", reads=["tables/none.csv"])
    refused("02_b: it writes tables/first.csv, and so does 00_first", "02_b.ipynb", writes=BOTH["reads"])
    refused("results go to tables/ or figures/", "02_b.ipynb", writes=["../x.csv"])
    with pytest.raises(NotebookError, match="01_second: it reads tables/first.csv, which is not there"):
        notebooks.run(Setting("smoke"), ["01"], root=project)
    book = nbformat.v4.new_notebook()
    nbformat.write(book, project / "notebooks" / "02_b.ipynb")
    with pytest.raises(NotebookError, match="02_b: its metadata must say"):
        notebooks.run(Setting("smoke"), root=project)
    assert ran(capsys) == []


def test_outputs_are_published_from_an_up_to_date_run_of_the_default_parameters(project):
    notebooks.run(Setting(), root=project)
    notebooks.publish(Setting(), root=project)
    book = nbformat.read(project / "notebooks" / "01_second.ipynb", as_version=4)
    assert [cell.execution_count for cell in book.cells] == [1, 2, 3]
    assert book.cells[2].outputs[0].text == "first has 1 row\n"
    assert json.dumps(book).count(str(project)) == 0
    for path in (project / "notebooks").iterdir():
        assert notebooks.outdated(notebooks.load(path), Setting(), project) is None
    before = tree(project / "notebooks")
    notebooks.publish(Setting(), root=project)
    assert tree(project / "notebooks") == before
    with pytest.raises(NotebookError, match="default parameters"):
        notebooks.publish(Setting("smoke"), root=project)
    (project / "requirements.txt").write_text("new")
    with pytest.raises(NotebookError, match="requirements.txt changed; run it before"):
        notebooks.publish(Setting(), root=project)


def test_tests_do_not_write_into_results():
    assert not Setting("smoke").folder.is_relative_to(ROOT)
    assert sys.version_info[:2] == (3, 11)


def test_a_stored_picture_is_the_figure_in_fewer_bytes():
    grain = np.random.default_rng(0).integers(0, 12, (200, 300, 3))
    grain += np.linspace(0, 240, 300).astype(int)[None, :, None]
    buffer = io.BytesIO()
    Image.fromarray(grain.astype(np.uint8)).save(buffer, "png")
    figure = base64.b64encode(buffer.getvalue()).decode()
    shown = Image.open(io.BytesIO(base64.b64decode(notebooks._small(figure))))
    assert shown.size == (300, 200) and len(notebooks._small(figure)) < 0.6 * len(figure)
    assert np.abs(np.asarray(shown.convert("RGB")).astype(int) - grain).mean() < 8
