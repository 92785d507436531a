"""Another number of threads or an older instruction set: the same readings, and pictures that no eye tells apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

GREY = 2.0  # of 255 levels: the most that a pixel may move
PROGRAM = """
import json
from obclip_core import metrics, worlds
from obclip_core.accelerate import Schedule
from obclip_core.denoise import Offer, Secret, Split, decode, finish, run
from obclip_core.prompts import candidate_values, candidates, parse, real_index

world = worlds.load("portraits")
judge = metrics.scorer(world)
prompt = parse("an old woman by the sea, smiling, in a red hoodie, with glasses")
secret = Secret(real_index(prompt))
found = {}
for name, schedule in (("plain", Schedule()), ("accelerated", Schedule.points(5, 3, 3))):
    offer = Offer(candidates(prompt), seed=3, split=Split(T=25, k=5), acceleration=schedule)
    picture = decode(world, finish(world, offer, run(world, offer), secret))
    right = judge.correct(picture, [candidate_values(prompt)[secret.index]])
    found[name] = {"picture": (255 * picture).tolist(), "right": {key: bool(value[0]) for key, value in right.items()}}
print(json.dumps(found))
"""


def answers(**environment: str) -> dict:
    done = subprocess.run([sys.executable, "-c", PROGRAM], env={**os.environ, **environment}, capture_output=True,
                          text=True, check=True)  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def usual() -> dict:
    return answers()


@pytest.mark.parametrize("environment", [
    {"OMP_NUM_THREADS": "1"},
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
], ids=["one thread", "avx2"])  # fmt: skip
def test_another_processor_draws_the_same_picture(usual, environment):
    for name, other in answers(**environment).items():
        moved = np.abs(np.array(other["picture"]) - np.array(usual[name]["picture"])).max()
        assert moved <= GREY, f"{name}: a pixel moved by {moved:.2f} grey levels"
        assert other["right"] == usual[name]["right"]
