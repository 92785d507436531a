"""Captions and pictures of the world `portraits`, drawn in parallel and kept in data/portraits/cache/.

Each part of the world sees its own range of seeds: what trains the generator never trains the scorer, and neither
sees the held-out pictures on which both are judged.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from draw import SIZE, draw, where_words_show
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


def _weights(first: int, i: int) -> np.ndarray:
    return where_words_show(record(first + i), first + i, SIZE // 4).astype(np.float16)


def _made_once(path: Path, one: Callable[[int], np.ndarray], count: int, workers: int = 2) -> np.ndarray:
    """The array whose row i is ``one(i)``: made in parallel, written whole, then read from the cache."""
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        with get_context("fork").Pool(workers) as pool:
            rows = np.stack(list(tqdm(pool.imap(one, range(count), chunksize=64), path.stem, count, disable=None)))
        half_written = path.with_suffix(".tmp.npy")
        np.save(half_written, rows)
        half_written.rename(path)
    return np.load(path, mmap_mode="r")


def pictures(part: str, count: int) -> tuple[np.ndarray, list[dict[str, str]]]:
    """Pictures (count, 64, 64, 3) uint8 and their values, of one part."""
    first = FIRST_SEED[part]
    images = _made_once(CACHE / f"{part}-{count}.npy", partial(_draw, first), count)
    assert images.shape == (count, SIZE, SIZE, 3)
    return images, [record(first + i) for i in range(count)]


def word_weights(part: str, count: int) -> np.ndarray:
    """Where each picture of one part shows its mood and garment, (count, 16, 16) in [0, 1]: draw.where_words_show."""
    return _made_once(CACHE / f"{part}-weights-{count}.npy", partial(_weights, FIRST_SEED[part]), count)
