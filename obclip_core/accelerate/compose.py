"""Axis composition: the cloud runs M of N trajectories, and the others are public linear combinations of them.

Candidates are the points of a grid, one axis an attribute (3 ages x 2 genders x 5 ethnicities). A linear model of the
grid, e.g. main effects, z_p = z_0 + (z_age - z_0) + (z_gender - z_0) + (z_ethnicity - z_0), has fewer unknowns than the
grid has points, so M trajectories tell it:

    z_p = sum_m C[p, m] z_m,   C = F F_R^+          F: the model's columns at all points, F_R: at the M that are run

with C[m, m] = 1 for those that are run, and rows that sum to 1, since all candidates share one noise. Every step of a
deterministic scheduler is linear in its latents and predictions, so to compose the M latents after the last step is to
compose the predictions at every step. The cloud hands over M latents, the device composes its own: work and download
both fall from N to M. Axes, model and M are a function of the candidate set, and travel in the schedule.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

NAME = "plan"
Terms = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Stage:
    """From ``step`` on the cloud runs the candidates ``runs``; ``terms`` (sets of axes) tell the others from them."""

    step: int
    runs: tuple[int, ...]
    terms: Terms

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "runs", tuple(self.runs))
            object.__setattr__(self, "terms", tuple(tuple(term) for term in self.terms))
        except TypeError as why:
            raise ValueError(f"a stage's runs are {self.runs!r} and its terms {self.terms!r}, expected lists") from why
        numbers = (self.step, *self.runs, *itertools.chain(*self.terms))
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
            raise ValueError(f"a stage has {numbers}, expected whole numbers from 0 up")
        if any(list(listed) != sorted(set(listed)) for listed in (self.runs, *self.terms)):
            raise ValueError(f"a stage's runs are {self.runs} and its terms {self.terms}, expected each number once, "
                             "in ascending order")
        if len(set(self.terms)) < len(self.terms) or () in self.terms:
            raise ValueError(f"a stage's terms are {self.terms}, expected each once; the constant is always there")


@dataclass(frozen=True)
class Part:
    """Some steps in which the U-Net is asked about the candidates ``asked``.

    ``rows`` are their places among the M trajectories that the hand-over will hold, ``spread`` (M, n) what all of them
    are told by the n predictions.
    """

    steps: range
    asked: tuple[int, ...]
    rows: tuple[int, ...]
    spread: np.ndarray


@dataclass(frozen=True)
class Plan:
    """Which candidates of a grid of ``axes`` the cloud runs, stage by stage, the first from step 0.

    Candidates are numbered in canonical order, the last axis fastest. A later stage runs all that an earlier one ran,
    and more. ValueError for anything else, and where the runs do not tell the model's terms.
    """

    axes: tuple[int, ...]
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "axes", tuple(self.axes))
            object.__setattr__(self, "stages", tuple(stage if isinstance(stage, Stage) else Stage(**stage)
                                                     for stage in self.stages))
        except TypeError as why:
            raise ValueError(f"a plan's axes are {self.axes!r} and its stages {self.stages!r}, expected lists") from why
        if any(isinstance(q, bool) or not isinstance(q, int) or q < 1 for q in self.axes) or self.N > 4096:
            raise ValueError(f"a plan's axes are {self.axes}, expected numbers of values, at most 4096 candidates")
        steps = [stage.step for stage in self.stages]
        if not steps or steps[0] != 0 or steps != sorted(set(steps)):
            raise ValueError(f"a plan's stages begin at steps {steps}, expected 0 and then later ones")
        before: set[int] = set()
        for stage in self.stages:
            if not before <= set(stage.runs) or not stage.runs or max(stage.runs) >= self.N:
                raise ValueError(f"the stage from step {stage.step} runs {stage.runs}, expected some of {self.N} "
                                 "candidates, all of the stage before among them")
            before = set(stage.runs)
            coefficients(self.axes, stage.terms, stage.runs)

    @property
    def N(self) -> int:
        return int(np.prod(self.axes, dtype=int))

    def check(self, N: int) -> None:
        """ValueError unless the plan is one for N candidates."""
        if N != self.N:
            raise ValueError(f"the plan is for {self.N} candidates (axes {self.axes}), offered are {N}")

    def at(self, step: int) -> Stage:
        """The stage that ``step`` belongs to."""
        return [stage for stage in self.stages if stage.step <= max(step, 0)][-1]

    def runs(self, k: int) -> tuple[int, ...]:
        """The candidates whose latents are handed over after k steps."""
        return self.at(k - 1).runs

    def recipe(self, k: int) -> np.ndarray:
        """C (N, M): all candidates' latents after k steps from those that are handed over."""
        stage = self.at(k - 1)
        return coefficients(self.axes, stage.terms, stage.runs)

    def parts(self, steps: range) -> tuple[Part, ...]:
        """The steps cut where a stage begins, each with what the cloud runs in it."""
        runs, found = self.runs(steps.stop), []
        for stage in self.stages:
            later = [other.step for other in self.stages if other.step > stage.step]
            part = range(max(stage.step, steps.start), min([steps.stop, *later]))
            if len(part):
                C = coefficients(self.axes, stage.terms, stage.runs)
                found.append(Part(part, stage.runs, tuple(runs.index(i) for i in stage.runs), C[list(runs)]))
        return tuple(found)


# -------------------- the model

def axes_of(values: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """The grid of some candidates from their attribute values (``prompts.candidate_values``), in canonical order.

    ValueError unless they are all combinations: a mechanism that offers some only has no grid.
    """
    kinds = {key: list(dict.fromkeys(one[key] for one in values)) for key in values[0]}
    varied = {key: found for key, found in kinds.items() if len(found) > 1}
    grid = [dict(zip(varied, point, strict=True)) for point in itertools.product(*varied.values())]
    if [{key: one[key] for key in varied} for one in values] != grid:
        raise ValueError(f"the {len(values)} candidates are not all combinations of their values in canonical order: "
                         "composition needs the whole set")
    return tuple(len(found) for found in varied.values())


def main_effects(axes: Sequence[int], pairs: Iterable[tuple[int, int]] = ()) -> Terms:
    """One term an axis, and one for each of the given pairs of axes."""
    return tuple((i,) for i in range(len(axes))) + tuple(tuple(sorted(pair)) for pair in pairs)


def everything(axes: Sequence[int]) -> Terms:
    """All terms of these axes (indices): a model that any values on their grid fit."""
    return tuple(term for size in range(1, len(axes) + 1) for term in itertools.combinations(sorted(axes), size))


@lru_cache(maxsize=256)
def columns(axes: tuple[int, ...], terms: Terms) -> np.ndarray:
    """The model's columns F (N, P), orthonormal: the constant, and each term's products of contrasts."""
    if any(axis >= len(axes) for term in terms for axis in term):
        raise ValueError(f"the terms {terms} name an axis beyond the {len(axes)} of the grid")
    found = [np.full((int(np.prod(axes, dtype=int)), 1), 1.0)]
    for term in terms:
        block = np.ones((1, 1))
        for axis, q in enumerate(axes):
            block = np.kron(block, contrasts(q) if axis in term else np.ones((q, 1)))
        found.append(block)
    F = np.concatenate(found, axis=1)
    return F / np.linalg.norm(F, axis=0)


def contrasts(q: int) -> np.ndarray:
    """Helmert's contrasts (q, q - 1): orthogonal columns that sum to nothing."""
    H = np.array([[1.0 if row < column else -float(column) if row == column else 0.0 for column in range(1, q)]
                  for row in range(q)]).reshape(q, q - 1)
    return H / np.linalg.norm(H, axis=0)


@lru_cache(maxsize=256)
def coefficients(axes: tuple[int, ...], terms: Terms, runs: tuple[int, ...]) -> np.ndarray:
    """C (N, M) by least squares; candidates that are run stay what they are. ValueError if the runs do not tell all."""
    F = columns(axes, terms)
    seen = F[list(runs)]
    if np.linalg.matrix_rank(seen, tol=1e-9) < F.shape[1]:
        raise ValueError(f"the {len(runs)} runs {runs} do not tell the {F.shape[1]} unknowns of the terms {terms}")
    C = F @ np.linalg.pinv(seen)
    C[list(runs)] = np.eye(len(runs))
    C[np.abs(C) < 1e-12] = 0.0
    C.setflags(write=False)
    return C


# -------------------- which M

def optimal(axes: Sequence[int], terms: Terms, count: int | None = None,
            keep: Iterable[int] = ()) -> tuple[int, ...]:
    """A D-optimal set of ``count`` runs (as many as unknowns if left out) that contains ``keep``.

    Greedy by det(F_R^T F_R), then exchanged one by one while that grows (Fedorov); ties go to the lower number, so it
    is a function of its arguments.
    """
    return _optimal(tuple(axes), tuple(terms), count, tuple(keep))


@lru_cache(maxsize=256)
def _optimal(axes: tuple[int, ...], terms: Terms, count: int | None, keep: tuple[int, ...]) -> tuple[int, ...]:
    F = columns(axes, terms)
    count = F.shape[1] if count is None else count
    if not F.shape[1] <= count <= len(F):
        raise ValueError(f"{count} runs are asked for, expected {F.shape[1]} (the model's unknowns) to {len(F)}")

    def score(rows: list[int]) -> float:
        return round(np.linalg.slogdet(F[rows].T @ F[rows] + 1e-9 * np.eye(F.shape[1]))[1], 9)

    rows = list(keep)
    while len(rows) < count:
        rows.append(max((i for i in range(len(F)) if i not in rows), key=lambda i: (score([*rows, i]), -i)))
    best, moved = score(rows), True
    while moved:
        moved = False
        for old in [row for row in rows if row not in keep]:
            rest = [row for row in rows if row != old]
            new = max((i for i in range(len(F)) if i not in rest), key=lambda i: (score([*rest, i]), -i))
            if score([*rest, new]) > best:
                rows, best, moved = [*rest, new], score([*rest, new]), True
    return tuple(sorted(rows))


def one_at_a_time(axes: Sequence[int], base: int = 0) -> tuple[int, ...]:
    """The base and all candidates that differ from it in one attribute: 1 + sum(q_i - 1) runs for the main effects."""
    point = np.unravel_index(base, tuple(axes))
    runs = {base}
    for axis, q in enumerate(axes):
        runs |= {int(np.ravel_multi_index((*point[:axis], value, *point[axis + 1:]), tuple(axes)))
                 for value in range(q)}
    return tuple(sorted(runs))


def middle(axes: Sequence[int]) -> int:
    """The candidate in the middle of every axis: a public base."""
    return int(np.ravel_multi_index(tuple((q - 1) // 2 for q in axes), tuple(axes)))


def composed(axes: Sequence[int], pairs: Iterable[tuple[int, int]] = (), count: int | None = None,
             runs: Sequence[int] | None = None) -> Plan:
    """A plan of one stage: main effects and these pairs, from the D-optimal ``count`` runs or from ``runs``."""
    axes = tuple(axes)
    terms = main_effects(axes, pairs)
    return Plan(axes, (Stage(0, optimal(axes, terms, count) if runs is None else tuple(runs), terms),))


def plain_data(plan: Plan) -> dict[str, Any]:
    """A plan as JSON data; ``Plan(**data)`` is the inverse."""
    return {"axes": list(plan.axes), "stages": [{"step": stage.step, "runs": list(stage.runs),
                                                 "terms": [list(term) for term in stage.terms]}
                                                for stage in plan.stages]}
