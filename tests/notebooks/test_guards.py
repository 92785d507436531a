"""Every notebook has the skeleton, is executed and tested; and the guards see what they are there to see."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from guards import CHECKED, SECTIONS, problems

from obclip_core import notebooks
from obclip_core.provenance import ROOT
from obclip_core.sweep import Setting

STORED = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_a_stored_notebook_has_all_it_must_have(path):
    assert list(problems(nbformat.read(path, as_version=4))) == []
    notebooks.load(path)


def test_the_notebooks_follow_one_another():
    books = [notebooks.load(path) for path in STORED]
    notebooks.check_order(books, Setting().folder, ROOT)
    assert [book.name[:2] for book in books] == [f"{n:02d}" for n in range(len(books))]


def example():
    """A notebook without problems."""
    book = nbformat.v4.new_notebook(metadata={"obclip": {"reads": [], "writes": []}})
    book.cells = [nbformat.v4.new_markdown_cell(f"## {name}\nSome words.") for name in SECTIONS]
    parameters = 'preset = "quick"\nworld = "portraits"\nseed = 0'
    book.cells.insert(3, nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    fact = "from obclip_core import sweep\nsize = sweep.setting(preset, world, seed).pick(1, 2, 3)\nprint('N =', 30)"
    book.cells.insert(6, nbformat.v4.new_code_cell(fact, metadata={"tags": [CHECKED]}))
    book.cells.append(nbformat.v4.new_code_cell("size"))
    for number, cell in enumerate([c for c in book.cells if c.cell_type == "code"], 1):
        cell.execution_count = number
    book.cells[6].outputs = [nbformat.v4.new_output("stream", text="N = 30\n")]
    book.cells[-1].outputs = [nbformat.v4.new_output("execute_result", {"text/plain": "2"}, execution_count=3)]
    return book


def test_the_example_has_no_problem():
    assert list(problems(example())) == []


def change(book, how):
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    cell = code[-1]
    match how:
        case "no section":
            del book.cells[0]
        case "order":
            book.cells[0], book.cells[1] = book.cells[1], book.cells[0]
        case "unexecuted":
            cell.execution_count = None
        case "executed twice":
            cell.execution_count = 7
        case "nothing checked":
            code[1].metadata.tags = []
        case "nothing shown":
            code[1].outputs = []
        case "skipped":
            cell.metadata["tags"] = ["nbval-skip"]
        case "skipped by comment":
            cell.source = "# NBVAL_SKIP\n1 / 0"
        case "error":
            cell.outputs = [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]
        case "path":
            cell.outputs = [nbformat.v4.new_output("stream", text="written to /home/me/x.csv")]
        case "function":
            cell.source = "if True:\n    def f(x):\n        return x"
        case "class":
            cell.source = "class A: pass"
        case "lambda":
            cell.source = "f = lambda x: x"
        case "magic":
            cell.source = "%timeit 1"
        case "empty":
            cell.source = " "
        case "large":
            cell.outputs = [nbformat.v4.new_output("display_data", {"image/png": "A" * 2_000_000})]


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("no section", "no section 'Question'"),
        ("order", "another order"),
        ("unexecuted", "not all executed"),
        ("executed twice", "not all executed"),
        ("nothing checked", "none of its facts is tested"),
        ("nothing shown", "code cell 2 is to be checked and shows nothing"),
        ("skipped", "code cell 3 is not tested"),
        ("skipped by comment", "code cell 3 is not tested"),
        ("error", "code cell 3 failed"),
        ("path", "code cell 3 shows a path"),
        ("function", "code cell 3 defines f"),
        ("class", "code cell 3 defines A"),
        ("lambda", "code cell 3 assigns a lambda"),
        ("magic", "code cell 3 is no plain Python"),
        ("empty", "code cell 3 is empty"),
        ("large", "2.0 MB, more than 1.5 MB"),
    ],
)
def test_a_guard_sees_what_is_wrong(how, problem):
    book = example()
    change(book, how)
    assert any(problem in found for found in problems(book)), list(problems(book))


def nbval(path: Path) -> tuple[int, str]:
    """The verdict of a test run over one stored notebook, with this project's own settings of pytest."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml"]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run([*command, path], capture_output=True, text=True, cwd=path.parent, env=environment)
    return done.returncode, done.stdout + done.stderr


def test_stored_facts_that_a_fresh_run_does_not_give_fail(tmp_path):
    book = example()  # stored with preset quick: the last cell shows 2, and with preset smoke it is 1, which is no fact
    right = tmp_path / "right.ipynb"
    nbformat.write(book, right)
    wrong = tmp_path / "wrong.ipynb"
    stale = copy.deepcopy(book)
    stale.cells[6].outputs[0].text = "N = 6\n"
    stale.cells[-1].source = "assert size == 1, 'the preset is smoke'\nraise RuntimeError('a later cell')"
    nbformat.write(stale, wrong)

    code, told = nbval(right)
    assert code == 0 and "3 passed" in told, told
    code, told = nbval(wrong)
    assert code == 1 and "N = 6" in told and "a later cell" in told and "2 failed, 1 passed" in told, told
