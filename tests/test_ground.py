"""The pins come from one list; what is missing on a machine is said in one sentence; nothing needs git."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from obclip_core.provenance import ROOT

PINS = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
PIP = PINS[-1]["pip"]

FAKE_PYTHON = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in
    *version_info*) echo "${VERSION:-3.11}" ;;
    *ensurepip*) exit "${NO_VENV:-0}" ;;
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *"pip install"*) echo "${PIP_SAYS:-}"; exit "${PIP_FAILS:-0}" ;;
esac
"""
FAKE_DF = '#!/bin/sh\nprintf "Filesystem 1024-blocks Used Available\\nx 9 9 %s\\n" "${FREE:-99999999}"\n'


# pins


def test_the_pins_for_pip_are_made_from_the_one_list(tmp_path):
    for name in ("Makefile", "environment.yml"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run(["make", "-B", "requirements.txt"], cwd=tmp_path, check=True, capture_output=True)
    made = (tmp_path / "requirements.txt").read_bytes()
    assert made == (ROOT / "requirements.txt").read_bytes(), "run: make -B requirements.txt"
    assert made.decode().splitlines()[1:] == PIP
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Makefile", "environment.yml", "requirements.txt"]


def test_every_pin_is_exact_and_unique():
    assert "python=3.11" in PINS and "torch==2.13.0" in PIP
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", pin) for pin in PIP)
    names = [re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in PIP]
    assert len(names) == len(set(names))


def test_what_the_project_imports_is_pinned_with_a_reason():
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    reasons = {name.lower().replace("-", "_") for name in re.findall(r"^      - (\S+)==\S+ +# \S", text, re.M)}
    files = [p for folder in ("obclip_core", "tests", "data") for p in (ROOT / folder).rglob("*.py")]
    own = {"obclip_core"} | {p.stem for p in files} | {p.parent.name for p in files}
    found = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module)
    roots = {name.split(".")[0] for name in found} - own - set(sys.stdlib_module_names)
    called = {"PIL": "pillow", "yaml": "pyyaml"}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].values()
    optional = {re.match(r"[\w-]+", pin)[0].replace("-", "_") for pins in extras for pin in pins}
    assert {called.get(name, name) for name in roots} - reasons - optional == set()


# the environment


@pytest.fixture
def machine(tmp_path):
    """A bare machine: a folder of tools, a python 3.11 and a df that do as they are told, and what make needs."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in "sh awk cat cmp cp dirname echo grep make mkdir mv rm sed tail".split():
        (tools / name).symlink_to(shutil.which(name))
    for name, text in (("python3.11", FAKE_PYTHON), ("df", FAKE_DF)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    project = tmp_path / "a project"
    (project / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "tools" / "venv.sh", project / "tools")
    for name in ("Makefile", "environment.yml", "requirements.txt"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(ROOT / ".ci", project / ".ci")
    return project


def start(machine: Path, command: str, **told: str) -> tuple[int, str, list[str]]:
    """Exit code, what was said, and what python was asked to do."""
    calls = machine.parent / "calls"
    calls.write_text("")
    variables = {"PATH": str(machine.parent / "bin"), "CALLS": str(calls)} | told
    done = subprocess.run(["sh", "-c", command], cwd=machine, env=variables, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()


def installs(calls: list[str]) -> int:
    return sum("pip install" in call for call in calls)


def test_the_environment_is_made_once_and_again_when_the_pins_or_the_place_change(machine):
    code, told, calls = start(machine, "make env")
    assert code == 0 and installs(calls) == 2 and "Installing" in told, told
    assert "-r requirements.txt" in " ".join(calls) and "-e ." in " ".join(calls)
    code, told, calls = start(machine, "make env")
    assert code == 0 and installs(calls) == 0 and told == ""
    assert start(machine, "rm ../bin/python3.11 && make env")[:2] == (0, "")

    shutil.copy(machine / ".venv" / "bin" / "python", machine.parent / "bin" / "python3.11")
    with (machine / "requirements.txt").open("a") as pins:
        pins.write("one-more==1\n")
    assert installs(start(machine, "make env")[2]) == 2
    moved = machine.rename(machine.parent / "moved")
    assert installs(start(moved, "make env")[2]) == 2
    (moved / ".venv" / "bin" / "python").unlink()
    assert installs(start(moved, "make env")[2]) == 2


NETWORK = "NewConnectionError: Failed to establish a new connection: [Errno -3] Temporary failure in name resolution"


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"VERSION": "3.9"}, "Python 3.11 is needed and was not found (python3.11 is 3.9); install it, or name"),
        ({"PYTHON": "/none/python"}, "Python 3.11 is needed and was not found; install it"),
        ({"NO_VENV": "1"}, "python3.11 cannot make virtual environments; install its venv module"),
        ({"FREE": "1048576"}, "4 GB of free disk are needed for the environment and 1 GB are free"),
        ({"PIP_FAILS": "1", "PIP_SAYS": NETWORK}, "the package index cannot be reached; check the network"),
        ({"PIP_FAILS": "1", "PIP_SAYS": "OSError: [Errno 28] No space left on device"}, "the disk is full; 4 GB"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence_and_nothing_counts_as_made(machine, told, sentence):
    code, said, _ = start(machine, "sh tools/venv.sh", **told)
    errors = [line for line in said.splitlines() if not line.startswith("Installing")]
    assert code == 1 and len(errors) == 1 and errors[0].startswith(f"obclip: {sentence}"), said
    assert not (machine / ".venv" / "pins").exists()
    assert start(machine, "make env", **told)[0] != 0
    code, _, calls = start(machine, "make env")
    assert code == 0 and installs(calls) == 2


def test_another_failure_shows_the_end_of_the_log(machine):
    code, said, _ = start(machine, "sh tools/venv.sh", PIP_FAILS="1", PIP_SAYS="ERROR: no matching wheel")
    assert code == 1 and "ERROR: no matching wheel" in said and "the end of .venv/install.log" in said


def test_without_make_continuous_integration_says_so_and_with_it_runs_the_tests(machine):
    (machine.parent / "bin" / "make").unlink()
    code, said, _ = start(machine, ".ci/run")
    assert code == 1 and said.startswith("obclip: make is needed and was not found; install it")
    assert said.count("\n") == 1
    (machine.parent / "bin" / "make").write_text('#!/bin/sh\necho "make $*"\n')
    (machine.parent / "bin" / "make").chmod(0o755)
    assert start(machine, "cd / && ../.ci/run".replace("/ && ..", f"/ && '{machine}'"))[:2] == (0, "make test\n")


# make


def test_make_alone_explains_every_target(machine):
    code, said, calls = start(machine, "make")
    assert code == 0 and calls == []
    targets = re.findall(r"^([a-z.]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(targets) >= {"help", "reproduce", "test", "env", "lab", "clean", "world", "report"}
    for target in targets:
        assert re.search(rf"^  {re.escape(target)} +\S", said, re.M), target


@pytest.mark.parametrize("wrong", ["PRESETS=full", "preset=full", "STEPS=3"])
def test_an_unknown_parameter_of_make_is_an_error_before_anything_runs(machine, wrong):
    code, said, calls = start(machine, f"make reproduce {wrong}")
    assert code != 0 and f"unknown parameter {wrong}: known are PRESET, WORLD, SEED, PYTHON" in said and calls == []


def test_parameters_reach_the_runner_and_the_report(machine):
    _, said, calls = start(machine, "make reproduce PRESET=full WORLD=sd14-bk-small SEED=3")
    wanted = "--preset full --world sd14-bk-small --seed 3"
    modules = ("notebooks", "report", "compare")
    assert calls[-3:] == [f"-m obclip_core.{module} {wanted}" for module in modules], said


def test_the_last_words_of_the_tests_are_those_of_pytest():
    lines = (ROOT / "Makefile").read_text().split("\ntest:")[1].split("\n\n")[0].splitlines()
    assert lines[-1].strip() == "$(py) -m pytest"
    done = subprocess.run([sys.executable, "-m", "pytest", "--co", "-q", "-p", "no:cacheprovider", "--noconftest",
                           "tests/notebooks/test_guards.py"], cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert re.search(r"\d+ tests collected", done.stdout.splitlines()[-1])


# what else a project has


def test_licence_citation_and_executables():
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200] and len((ROOT / "LICENSE").read_text()) > 11_000
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == "Apache-2.0" and "2510.04153" in citation["preferred-citation"]["url"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
