"""A schedule says which technique is on at which step: plain data that drives the cloud and the bill alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from obclip_core.accelerate import cache, deepcache, encoder, merge, reuse, share, skip, tgate
from obclip_core.accelerate.compose import Plan, plain_data
from obclip_core.accelerate.request import Request, hooked

# outermost first: what is kept whole hides what would be computed inside
TECHNIQUES = {module.NAME: module for module in (share, tgate, cache, reuse, merge, deepcache, skip, encoder)}
BLOCKS = ("skip", "encoder", "deepcache")
KEEPING = ("cache", "tgate", *BLOCKS)


@dataclass(frozen=True)
class Schedule:
    """The steps (0 .. k-1, ascending) at which each technique is on; a step that is named nowhere runs plainly.

    reuse      batch reuse from candidate ``pivot``'s maps (Algorithm 2), with the map written out if ``plain``
    cache      attention outputs kept from the last step at which it was off
    skip       down and mid blocks' features kept from the last step at which it was off
    tgate, encoder, deepcache, merge
               the competition: T-GATE, encoder propagation, DeepCache at ``branch``, Token Merging of
               ``merge_ratio`` of the tokens down to ``merge_depth`` halvings
    share      one unconditional branch for all candidates, corrected by ``share_gain`` (one number a step, or none)

    ``plan`` says which candidates are run at all, and which are composed from them (``compose.Plan``).
    The paper's points are ``points(k, r, s)``. ValueError where a technique has nothing to keep from.
    """

    reuse: tuple[int, ...] = ()
    cache: tuple[int, ...] = ()
    skip: tuple[int, ...] = ()
    tgate: tuple[int, ...] = ()
    encoder: tuple[int, ...] = ()
    deepcache: tuple[int, ...] = ()
    merge: tuple[int, ...] = ()
    share: tuple[int, ...] = ()
    share_gain: tuple[float, ...] = ()
    plan: Plan | None = None
    pivot: int = 0
    plain: bool = False
    branch: int = 0
    merge_ratio: float = 0.5
    merge_depth: int = 0

    def __post_init__(self) -> None:
        for name in TECHNIQUES:
            if not isinstance(getattr(self, name), (tuple, list, range)):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a list of steps")
            steps = tuple(getattr(self, name))
            object.__setattr__(self, name, steps)
            if any(isinstance(step, bool) or not isinstance(step, int) or step < 0 for step in steps):
                raise ValueError(f"{name} is {steps}, expected whole steps from 0 up")
            if list(steps) != sorted(set(steps)):
                raise ValueError(f"{name} is {steps}, expected each step once, in ascending order")
            if name in KEEPING and 0 in steps:
                raise ValueError(f"{name} is on at step 0, where nothing is kept yet: start it at step 1 or later")
        for name in ("pivot", "branch", "merge_depth"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} is {value!r}, expected a whole number from 0 up")
        if not isinstance(self.merge_ratio, (int, float)) or not 0 < self.merge_ratio < 1:
            raise ValueError(f"merge_ratio is {self.merge_ratio!r}, expected between 0 and 1")
        if not isinstance(self.plain, bool):
            raise ValueError(f"plain is {self.plain!r}, expected True or False")
        if sum(bool(getattr(self, name)) for name in BLOCKS) > 1:
            raise ValueError("skip, encoder and deepcache keep the same blocks: use one of them in a schedule")
        if both := sorted(set(self.reuse) & set(self.merge)):
            raise ValueError(f"reuse and merge are both on at steps {both}, but each candidate merges its own tokens, "
                             "which a pivot's map does not fit: keep their steps apart")
        if isinstance(self.plan, Mapping):
            try:
                object.__setattr__(self, "plan", Plan(**self.plan))
            except TypeError as why:
                raise ValueError(f"{self.plan!r} is no plan: expected its axes and stages") from why
        if self.plan is not None and not isinstance(self.plan, Plan):
            raise ValueError(f"plan is {self.plan!r}, expected a Plan")
        for stage in self.plan.stages if self.plan else ():
            if early := sorted(name for name in KEEPING if stage.step in getattr(self, name)):
                raise ValueError(f"{early[0]} is on at step {stage.step}, where other candidates begin to run, and "
                                 "nothing is kept of them yet: start it a step later")
        if not isinstance(self.share_gain, (tuple, list)) or any(
                isinstance(g, bool) or not isinstance(g, (int, float)) or not abs(g) < 1e6 for g in self.share_gain):
            raise ValueError(f"share_gain is {self.share_gain!r}, expected a list of numbers")
        object.__setattr__(self, "share_gain", tuple(map(float, self.share_gain)))
        if self.share_gain and len(self.share_gain) != len(self.share):
            raise ValueError(f"there are {len(self.share_gain)} gains for {len(self.share)} shared steps, expected one "
                             "a step, or none")
        if self.share and self.tgate:
            raise ValueError("share and tgate both decide on the unconditional branch: use one of them in a schedule")
        if self.tgate and self.tgate != tuple(range(self.tgate[0], self.tgate[0] + len(self.tgate))):
            raise ValueError(f"tgate is {self.tgate}, expected one run of steps: guidance does not come back after it")

    @classmethod
    def points(cls, k: int, r: int | None = None, s: int | None = None, *, refresh: int | None = 5, reuse: bool = True,
               cache: bool = True, skip: bool = True, **more: Any) -> Schedule:
        """The paper's schedule: reuse before r, attention cache from r, block skip from s, for k steps.

        ``refresh`` runs attention again on every such step after r (None: never). A point left out, or at k or beyond,
        switches its technique off; reuse too, which would otherwise be on throughout (name its steps for that).
        """
        r, s = k if r is None else r, k if s is None else s
        if k < 0 or r < 0 or s < 0:
            raise ValueError(f"the points are k={k}, r={r}, s={s}, expected steps from 0 up")
        if refresh is not None and refresh < 2:
            raise ValueError(f"refresh is {refresh}, expected at least 2: the steps from one attention to the next")
        cached = [t for t in range(r, k) if refresh is None or (t - r + 1) % refresh]
        return cls(reuse=tuple(range(r)) if reuse and r < k else (), cache=tuple(cached) if cache else (),
                   skip=tuple(range(s, k)) if skip else (), **more)

    @classmethod
    def gate(cls, k: int, m: int) -> Schedule:
        """T-GATE with its gate step at m."""
        return cls(tgate=tuple(range(m, k)))

    @classmethod
    def every(cls, technique: str, k: int, interval: int, first: int = 0, **more: Any) -> Schedule:
        """All steps before ``first`` in full, then every ``interval``-th; ``technique`` is on at the others."""
        if interval < 1:
            raise ValueError(f"interval is {interval}, expected at least 1")
        return cls(**{technique: tuple(t for t in range(first, k) if (t - first) % interval)}, **more)

    def steps(self, technique: str) -> tuple[int, ...]:
        return getattr(self, technique)

    def on(self, step: int) -> frozenset[str]:
        """Names of the techniques that are on at ``step``."""
        return frozenset(name for name in TECHNIQUES if step in getattr(self, name))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; ``from_dict`` is its inverse."""
        data = {key: list(value) if isinstance(value, tuple) else value for key, value in _shallow(self).items()}
        return data | {"plan": None if self.plan is None else plain_data(self.plan)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Schedule:
        known = {field.name for field in fields(cls)}
        if not isinstance(data, Mapping) or not set(data) <= known:
            raise ValueError(f"{data!r} is not a schedule: expected some of {', '.join(sorted(known))}")
        return cls(**data)

    @contextmanager
    def applied(self, unet: torch.nn.Module, *, candidates: int, guided: bool = True) -> Iterator[Request]:
        """Accelerate one request on ``unet``: yields ``at``, and ``with at(step, rows):`` brackets each U-Net call.

        Afterwards, also after an exception, the U-Net is as it was. Two requests may run on one U-Net in two threads.
        ValueError where a technique finds nothing to act on, or meets a custom attention processor.
        """
        if not isinstance(unet, UNet2DConditionModel):
            raise ValueError(f"the model is a {type(unet).__name__}, expected a UNet2DConditionModel")
        if candidates < 1 or (self.reuse and self.pivot >= candidates):
            raise ValueError(f"the pivot is {self.pivot} of {candidates} candidates, expected 0..{candidates - 1}")
        wanted: dict[str, tuple[Any, ...]] = {}
        for name in self.techniques:
            if not (found := list(TECHNIQUES[name].modules(unet, self))):
                raise ValueError(f"{name} finds nothing to act on in this U-Net: leave it out")
            for module in found:
                wanted[module] = (*wanted.get(module, ()), TECHNIQUES[name])
        with hooked(Request(unet, self, wanted, candidates, 2 if guided else 1)) as at:
            yield at

    def rows(self, step: int, candidates: int, guided: bool = True) -> tuple[int, int]:
        """How many (conditional, unconditional) rows the U-Net is given at ``step`` for N candidates."""
        n = candidates if self.plan is None else len(self.plan.at(step).runs)
        return n, 0 if not guided or step in self.tgate else 1 if step in self.share else n

    @property
    def techniques(self) -> tuple[str, ...]:
        """Techniques that are on at some step, outermost first."""
        return tuple(name for name in TECHNIQUES if getattr(self, name))

    @property
    def r(self) -> int | None:
        """The first step with cached attention."""
        return min(self.cache, default=None)

    @property
    def s(self) -> int | None:
        """The first step with skipped blocks."""
        return min(self.skip, default=None)


def _shallow(schedule: Schedule) -> dict[str, Any]:
    return {field.name: getattr(schedule, field.name) for field in fields(schedule)}


def union(schedules: Iterable[Schedule]) -> Schedule:
    """One schedule with all of theirs on; where settings differ from the usual, the last one's."""
    usual, both = _shallow(Schedule()), {}
    for schedule in schedules:
        for key, value in _shallow(schedule).items():
            if key in TECHNIQUES:
                both[key] = tuple(sorted({*both.get(key, ()), *value}))
            elif value != usual[key]:
                both[key] = value
    return Schedule(**both)


NONE = Schedule()
PAPER_K5 = Schedule.points(k=5, r=3, s=3)
PAPER_K10 = Schedule.points(k=10, r=4, s=6)
LCM = Schedule.points(k=4, r=2)
