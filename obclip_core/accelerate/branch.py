"""A branching tree: one trajectory for all candidates at first, split attribute by attribute at public steps.

The first steps place a figure and its background, which candidates share. Before an attribute's step all of its values
follow one base value; from then on each has a trajectory of its own, which begins where the common one was. It is a
plan whose stages have all terms of the attributes that are open: until an attribute opens, its trajectories ask the
U-Net one question and get one answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from obclip_core.accelerate.compose import Plan, Stage, Terms, everything, middle, optimal


def tree(axes: Sequence[int], opens: Sequence[int], base: int | None = None) -> Plan:
    """Axis i is split at step opens[i]; until then its value is that of candidate ``base`` (the middle one)."""
    axes, base = tuple(axes), middle(axes) if base is None else base
    if len(opens) != len(axes):
        raise ValueError(f"{len(opens)} steps are given for {len(axes)} attributes: name one step each")
    stages = []
    for step in sorted({0, *opens}):
        open_ = [axis for axis, at in enumerate(opens) if at <= step]
        stages.append(Stage(step, along(axes, open_, base), everything(open_)))
    return Plan(axes, tuple(stages))


def along(axes: Sequence[int], open_: Iterable[int], base: int) -> tuple[int, ...]:
    """All candidates that differ from ``base`` in the axes ``open_`` at most."""
    point, open_ = np.unravel_index(base, tuple(axes)), set(open_)
    grid = np.arange(int(np.prod(axes, dtype=int))).reshape(tuple(axes))
    return tuple(int(i) for i in np.sort(grid[tuple(slice(None) if axis in open_ else int(point[axis])
                                                    for axis in range(len(axes)))].ravel()))


def growing(axes: Sequence[int], models: Sequence[tuple[int, Terms]]) -> Plan:
    """A plan that composes with few terms at first and more later: ``models`` are (step, terms), each with the last
    one's terms among its own; the runs are D-optimal and contain the earlier ones."""
    axes, stages, runs = tuple(axes), [], ()
    for step, terms in models:
        runs = optimal(axes, terms, keep=runs)
        stages.append(Stage(step, runs, tuple(terms)))
    return Plan(axes, tuple(stages))
