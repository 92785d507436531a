"""Cells are computed once, kept whole, and never trusted blindly; tables are the same bytes for the same data."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from obclip_core import provenance, sweep


@dataclass(frozen=True)
class Cell:
    k: int
    method: str = "plain"
    seed: int = 0


CALLS: list[Cell] = []


def compute(cell: Cell) -> dict:
    CALLS.append(cell)
    if cell.method == "broken":
        raise RuntimeError("no such method")
    rng = np.random.default_rng(cell.seed)
    return {"kid": cell.k / 3, "n": np.int64(cell.k), "note": "é", "latent": rng.random((2, cell.k), dtype=np.float32)}


@pytest.fixture(autouse=True)
def fresh():
    CALLS.clear()


GRID = sweep.cells(Cell, k=range(1, 4), method=["plain", "reuse"])


def test_a_grid_is_the_product_of_its_axes():
    assert len(GRID) == 6
    assert GRID[0] == Cell(1, "plain") and GRID[1] == Cell(1, "reuse") and GRID[-1] == Cell(3, "reuse")
    assert sweep.cells(Cell, k=5) == (Cell(5),)


def test_each_cell_is_computed_once_and_read_back_the_same(tmp_path):
    first = sweep.run(GRID, compute, tmp_path)
    assert CALLS == list(GRID)
    again = sweep.run(GRID, compute, tmp_path)
    assert len(CALLS) == 6
    assert [r["kid"] for r in first] == [c.k / 3 for c in GRID]
    for a, b in zip(first, again, strict=True):
        assert {k: v for k, v in a.items() if k != "latent"} == {k: v for k, v in b.items() if k != "latent"}
        assert a["latent"].dtype == b["latent"].dtype == np.float32
        assert np.array_equal(a["latent"], b["latent"])


def test_an_interrupted_sweep_resumes_and_a_failure_names_its_cell(tmp_path):
    broken = (*GRID[:2], Cell(9, "broken"), *GRID[2:])
    with pytest.raises(RuntimeError, match="no such method") as failure:
        sweep.run(broken, compute, tmp_path)
    assert "k=9" in failure.value.__notes__[0]
    assert len(list(tmp_path.iterdir())) == 2
    CALLS.clear()
    sweep.run(GRID, compute, tmp_path)
    assert CALLS == list(GRID[2:])


def test_an_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sweep.run(GRID, compute, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [0, 9, 200, -1])
def test_a_damaged_cell_is_named_and_computed_again(tmp_path, place):
    sweep.run(GRID[:1], compute, tmp_path)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    bad = bytearray(good)
    bad[place] ^= 1
    path.write_bytes(bad)
    with pytest.warns(UserWarning, match=path.name):
        (result,) = sweep.run(GRID[:1], compute, tmp_path)
    assert len(CALLS) == 2 and path.read_bytes() == good and result["kid"] == 1 / 3


def test_a_truncated_and_a_foreign_cell_are_named_and_computed_again(tmp_path):
    sweep.run(GRID[:2], compute, tmp_path)
    one, two = sorted(tmp_path.iterdir())
    one.write_bytes(two.read_bytes())
    two.write_bytes(two.read_bytes()[:-7])
    with pytest.warns(UserWarning) as seen:
        results = sweep.run(GRID[:2], compute, tmp_path)
    text = " ".join(str(w.message) for w in seen)
    assert one.name in text and "another cell" in text and two.name in text
    assert len(CALLS) == 4 and [r["kid"] for r in results] == [1 / 3, 1 / 3]


def test_a_cell_is_computed_again_when_what_it_depends_on_changes(tmp_path):
    weights, other = tmp_path / "weights", tmp_path / "other"
    for folder in (weights, other):
        folder.mkdir()
        (folder / "unet.safetensors").write_bytes(b"1")
    depends = {"plain": [weights], "reuse": [other]}
    cells = tmp_path / "cells"

    sweep.run(GRID, compute, cells, depends=lambda c: depends[c.method])
    (weights / "unet.safetensors").write_bytes(b"2")
    CALLS.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep.run(GRID, compute, cells, depends=lambda c: depends[c.method])
    assert CALLS == [c for c in GRID if c.method == "plain"]


def test_seed_and_configuration_make_different_cells(tmp_path):
    a, b = sweep.run([Cell(3, seed=0), Cell(3, seed=1)], compute, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 and not np.array_equal(a["latent"], b["latent"])


def test_processes_give_what_one_worker_gives(tmp_path):
    import cells_for_processes as module

    grid = sweep.cells(module.Cell, k=[1, 2, 3])
    one = sweep.run(grid, module.compute, tmp_path / "one")
    two = sweep.run(grid, module.compute, tmp_path / "two", workers=2)
    assert [r["kid"] for r in one] == [r["kid"] for r in two]
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(p.name for p in (tmp_path / "two").iterdir())
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    with pytest.raises(ValueError, match="k is -1") as failure:
        sweep.run([module.Cell(-1)], module.compute, tmp_path / "two", workers=2)
    assert "Cell(k=-1)" in failure.value.__notes__[0]


def test_what_is_no_plain_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="frozen dataclass of plain data"):
        sweep.run([{"k": 1}], compute, tmp_path)
    with pytest.raises(ValueError, match="frozen dataclass of plain data"):
        sweep.run([Cell(object())], compute, tmp_path)


def test_a_frame_has_a_row_a_cell(tmp_path):
    table = sweep.frame(GRID, sweep.run(GRID, compute, tmp_path))
    assert list(table.columns) == ["k", "method", "seed", "kid", "n", "note"]
    assert table.kid.tolist() == [c.k / 3 for c in GRID]


def test_progress_is_shown_on_terminals_only(tmp_path, capfd):
    sweep.run(GRID, compute, tmp_path)
    assert capfd.readouterr() == ("", "")


# settings


def test_a_setting_knows_its_folder_and_refuses_what_does_not_exist(tmp_path, monkeypatch):
    monkeypatch.setenv("OBCLIP_RESULTS", str(tmp_path))
    monkeypatch.delenv("OBCLIP_PRESET", raising=False)
    monkeypatch.delenv("OBCLIP_OUT", raising=False)
    assert sweep.Setting("quick", "portraits").folder == tmp_path / "quick" == sweep.Setting().out
    assert sweep.Setting("full", "someone/a-model").folder == tmp_path / "full-someone-a-model"
    assert sweep.Setting("smoke").pick(smoke=1, quick=2, full=3) == 1
    with pytest.raises(ValueError, match="preset is 'fast', but only smoke, quick, full"):
        sweep.Setting("fast")
    with pytest.raises(ValueError, match="world is 'atlantis'"):
        sweep.Setting("quick", "atlantis")
    for seed in (-1, 1.5, "1", True):
        with pytest.raises(ValueError, match="seed is"):
            sweep.Setting(seed=seed)


def test_the_environment_overrides_the_preset_of_a_notebook_only(monkeypatch):
    monkeypatch.setenv("OBCLIP_PRESET", "smoke")
    assert sweep.setting("quick", "portraits", 0).preset == "smoke"
    assert sweep.Setting("quick").preset == "quick"
    monkeypatch.setenv("OBCLIP_PRESET", "")
    assert sweep.setting("quick", "portraits", 0).preset == "quick"


# tables


def test_the_same_table_is_the_same_bytes(tmp_path):
    table = pd.DataFrame({"k": [1, 2], "fid": [1 / 3, 1e-12], "method": ["a,b", None]})
    sweep.save_table(table, "x", tmp_path)
    path = tmp_path / "tables" / "x.csv"
    assert path.read_bytes() == b'k,fid,method\n1,0.333333,"a,b"\n2,1e-12,\n'
    sweep.save_table(table.copy(), "y", tmp_path)
    assert (tmp_path / "tables" / "y.csv").read_bytes() == path.read_bytes()
    assert sweep.load_table("x", tmp_path).fid[0] == 0.333333
    with pytest.raises(FileNotFoundError, match="no z.csv; run the notebook that writes it"):
        sweep.load_table("z", tmp_path)


# provenance


@pytest.fixture
def package(tmp_path):
    files = {
        "__init__.py": "from obclip_core import everything",
        "everything.py": "",
        "a.py": "import obclip_core.b\nSTYLE = 'look.mplstyle'",
        "b.py": "def f():\n    from .tools import hammer",
        "look.mplstyle": "",
        "unused.mplstyle": "",
        "c.py": "import numpy",
        "tools/__init__.py": "from obclip_core.c import f",
        "tools/hammer.py": "from ..d import nail",
        "tools/saw.py": "",
        "d.py": "",
    }
    for name, text in files.items():
        path = tmp_path / "obclip_core" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def names(root: Path, *modules: str) -> set[str]:
    return {p.relative_to(root / "obclip_core").as_posix() for p in provenance.sources(modules, root)}


def test_sources_follow_imports_and_nothing_else(package):
    assert names(package, "obclip_core.c") == {"__init__.py", "c.py"}
    assert names(package, "obclip_core.tools.saw") == {"__init__.py", "tools/__init__.py", "tools/saw.py"}
    assert names(package, "obclip_core.a") == {
        "__init__.py", "a.py", "look.mplstyle", "b.py", "tools/__init__.py", "c.py", "tools/hammer.py", "d.py",
    }  # fmt: skip
    assert "everything.py" in names(package, "obclip_core")
    assert names(package, "numpy", "obclip_core.no_such") == {"__init__.py"}


def test_a_digest_tells_contents_names_and_boundaries_apart(tmp_path):
    (tmp_path / "one").write_text("1")
    assert provenance.digest("ab", "c") != provenance.digest("a", "bc")
    before = provenance.digest(tmp_path)
    assert provenance.digest(tmp_path) == before
    (tmp_path / "one").rename(tmp_path / "two")
    renamed = provenance.digest(tmp_path)
    (tmp_path / "two").write_text("2")
    assert len({before, renamed, provenance.digest(tmp_path)}) == 3
