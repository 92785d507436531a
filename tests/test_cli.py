"""The command line: what it prints, what it writes, and one sentence for what it cannot do."""

from __future__ import annotations

import re

import pytest
import tiny
from PIL import Image

from obclip_core.__main__ import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("cli")))


def test_a_prompt_becomes_candidates_a_bill_and_a_picture(folder, tmp_path, capsys):
    out = tmp_path / "out.png"
    status = main(["a smiling old woman by the sea", "--protect", "age,gender,ethnicity", "-k", "2", "-T", "4",
                   "-o", str(out), "--world", folder, "--seed", "7"])
    said = capsys.readouterr()
    assert (status, said.err) == (0, "")
    assert Image.open(out).size == (32, 32)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"], "nothing half-written is left"
    number = int(re.search(r"candidates: (\d+)", said.out)[1])
    assert number in (6, 30) and len(re.findall(r"^ +\d+  a ", said.out, re.M)) + said.out.count("  an ") >= 6
    assert "split: 2 steps on the cloud for all of them, 2 on the device for one (seed 7)" in said.out
    up, down = map(int, re.search(r"bytes: (\d+) up, (\d+) down \(fp16\)", said.out).groups())
    assert up > 100 and down > number * 4 * 8 * 8 * 2
    assert re.search(r"cloud: [\d.]+ G multiply-adds, [\d.]+ s\ndevice: [\d.]+ G multiply-adds, [\d.]+ s", said.out)


def test_the_same_seed_writes_the_same_picture(folder, tmp_path, capsys):
    for name in ("a.png", "b.png"):
        assert main(["a woman", "--protect", "gender", "-k", "1", "-T", "2", "--seed", "3", "--world", folder,
                     "-o", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "candidates: 2" in capsys.readouterr().out


def test_a_distilled_cloud_is_joined_at_the_matching_step(folder, tmp_path, capsys):
    assert main(["a woman", "--protect", "gender", "-k", "4", "--seed", "3", "--world", folder, "--cloud", "cloud_lcm",
                 "--coding", "difference", "-o", str(tmp_path / "out.png")]) == 0
    steps = re.search(r"split: (\d+) steps on the cloud for all of them, (\d+) on the device", capsys.readouterr().out)
    assert steps.groups() == ("4", "12"), "4 of 8 LCM steps are as far as 13 of 25"


@pytest.mark.parametrize(("arguments", "sentence"), [
    ([], "the following arguments are required: prompt"),
    (["a woman", "-k", "many"], "invalid int value: 'many'"),
    (["a woman", "-o", "out.gif"], "expected one that ends in .png"),
    (["a woman", "-o", "no/such/folder/out.png"], "there is no folder no/such/folder"),
    (["a woman", "--protect", "shoe size"], "shoe size"),
    (["a woman", "--world", "nowhere"], "there is no world 'nowhere'"),
    (["a woman", "--coding", "morse"], "the coding is 'morse'"),
])
def test_bad_input_is_one_sentence_and_status_2(arguments, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and sentence in said.err
    assert not list(tmp_path.iterdir())


def test_a_split_that_makes_no_sense_writes_no_picture(folder, capsys, tmp_path):
    out = tmp_path / "out.png"
    out.write_bytes(b"an older picture")
    assert main(["a woman", "-k", "9", "-T", "4", "--world", folder, "-o", str(out)]) == 2
    assert "k is 9, expected 0..4" in capsys.readouterr().err
    assert out.read_bytes() == b"an older picture"
