"""Captions and pictures of the world `portraits`, drawn in parallel and kept in data/portraits/cache/.

Each part of the world sees its own range of seeds: what trains the generator never trains the scorer, and neither
sees the held-out pictures on which both are judged.
"""

from __future__ import annotations

import random
import tomllib
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from draw import SIZE, draw
from tqdm import tqdm

from obclip_core.prompts import ATTRIBUTES, fill

HERE = Path(__file__).resolve().parent
CACHE = HERE / "cache"
FIRST_SEED = {"generator": 0, "scorer": 10_000_000, "held_out": 20_000_000, "reference": 30_000_000}

with open(HERE.parent / "prompts" / "portraits.toml", "rb") as file:
    PROMPTS = tomllib.load(file)
CONTEXT = {name: tuple(values) for name, values in PROMPTS["context"].items()}
VALUES = {**{name: tuple(values) for name, values in ATTRIBUTES.items()}, **CONTEXT}


def record(seed: int) -> dict[str, str]:
    """The attribute and context values of one picture, drawn independently and evenly."""
    rng = random.Random(f"values {seed}")
    return {name: rng.choice(values) for name, values in VALUES.items()}


def caption(values: dict[str, str], rng: random.Random) -> str:
    """One caption of these values; which template decides how much of them it tells."""
    kind = rng.choices(("n30", "n6", "n2", "short", "general"), (60, 10, 7, 18, 5))[0]
    return fill(rng.choice(PROMPTS["templates"][kind]), values)


def _draw(first: int, i: int) -> np.ndarray:
    return draw(record(first + i), first + i)


def pictures(part: str, count: int, workers: int = 2) -> tuple[np.ndarray, list[dict[str, str]]]:
    """Pictures (count, 64, 64, 3) uint8 and their values, of one part; drawn once, then read from the cache."""
    first, path = FIRST_SEED[part], CACHE / f"{part}-{count}.npy"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        with get_context("fork").Pool(workers) as pool:
            drawn = pool.imap(partial(_draw, first), range(count), chunksize=64)
            images = np.stack(list(tqdm(drawn, f"drawing {part}", count, disable=None)))
        half_written = path.with_suffix(".tmp.npy")
        np.save(half_written, images)
        half_written.rename(path)
    images = np.load(path, mmap_mode="r")
    assert images.shape == (count, SIZE, SIZE, 3)
    return images, [record(first + i) for i in range(count)]
