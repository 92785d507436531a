"""A cell and its computation, importable by worker processes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Cell:
    k: int


def compute(cell: Cell) -> dict:
    if cell.k < 0:
        raise ValueError(f"k is {cell.k}")
    return {"kid": cell.k / 7, "latent": np.full(cell.k, 0.5)}
