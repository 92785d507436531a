"""What the two sides say to each other, and what stays unsaid: the types are the trust boundary.

An offer goes up to the cloud, a hand-over comes back; the secret is in neither, and no cloud function takes one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from obclip_core.schedulers import config, each


@dataclass(frozen=True)
class Split:
    """Who takes which of T steps: the first k on one side, the rest on the other (switch point k, 0..T).

    ``first`` names the side that begins: the cloud (the paper's order) or the device (the client-first order of
    Figure 3). A step-distilled cloud walks ``cloud_T`` steps of its own, and the device joins its T steps at k + shift
    (Figure 13). ``hand_over`` is "exact" (the scheduler's state travels too) or "restart" (the latent alone).
    """

    T: int = 25
    k: int = 10
    first: str = "cloud"
    cloud_T: int | None = None
    shift: int = 0
    hand_over: str = "exact"

    def __post_init__(self) -> None:
        for name in ("T", "k", "shift", *(("cloud_T",) if self.cloud_T is not None else ())):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a whole number")
        if self.T < 1 or (self.cloud_T is not None and self.cloud_T < 1):
            raise ValueError(f"T is {self.T} and cloud_T {self.cloud_T}, expected at least one step")
        if not 0 <= self.k <= self.steps:
            raise ValueError(f"k is {self.k}, expected 0..{self.steps}, the first side's number of steps")
        if not 0 <= self.join <= self.T:
            raise ValueError(f"k + shift is {self.join}, expected 0..{self.T}: the step at which the second side joins")
        if self.first not in ("cloud", "device"):
            raise ValueError(f"first is {self.first!r}, expected 'cloud' or 'device'")
        if self.first == "device" and (self.cloud_T is not None or self.shift):
            raise ValueError("cloud_T and shift are for a cloud that goes first: leave them out with first='device'")
        if self.hand_over not in ("exact", "restart"):
            raise ValueError(f"hand_over is {self.hand_over!r}, expected 'exact' or 'restart'")

    @property
    def steps(self) -> int:
        """Number of steps of the first side's schedule."""
        return self.cloud_T or self.T

    @property
    def join(self) -> int:
        """The step of the T at which the second side takes over."""
        return self.k + self.shift

    @property
    def second(self) -> str:
        return "device" if self.first == "cloud" else "cloud"

    @property
    def cloud_steps(self) -> int:
        return self.k if self.first == "cloud" else self.T - self.join

    @property
    def device_steps(self) -> int:
        return self.T - self.join if self.first == "cloud" else self.k


@dataclass(frozen=True)
class Offer:
    """All that the cloud is told: candidates, seed, split, acceleration. Never which candidate is real."""

    candidates: tuple[str, ...]
    seed: int
    split: Split = Split()
    acceleration: Any = None

    def __post_init__(self) -> None:
        if not (isinstance(self.candidates, tuple) and self.candidates
                and all(isinstance(text, str) for text in self.candidates)):
            raise ValueError("the candidates are not a tuple of at least one text: use prompts.candidates(prompt)")
        if len(set(self.candidates)) < len(self.candidates):
            raise ValueError("the same candidate is offered twice: every candidate may occur once")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"the seed is {self.seed!r}, expected a whole number from 0 to 2**63 - 1")
        if not isinstance(self.split, Split):
            raise ValueError(f"the split is {self.split!r}, expected a Split")
        if self.split.first == "device" and (self.N > 1 or self.acceleration is not None):
            raise ValueError("when the device goes first the cloud finishes the real prompt alone: offer one candidate "
                             "and no acceleration")

    @property
    def N(self) -> int:
        return len(self.candidates)


@dataclass(frozen=True)
class Secret:
    """The index of the real candidate. It stays on the device, and out of every printed representation."""

    index: int = field(repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.index, bool) or not isinstance(self.index, int) or self.index < 0:
            raise ValueError("a secret's index is a whole number from 0 up")

    def check(self, N: int) -> None:
        if self.index >= N:
            raise ValueError(f"the secret points outside the {N} candidates")


@dataclass(frozen=True, eq=False)
class HandOver:
    """One latent a candidate after ``step`` steps, and the scheduler's state (empty: the second side restarts it).

    ``latents`` is (N, C, h, w) in the precision it was computed in, ``T`` the number of steps of the schedule it was
    made on and ``scheduler`` that schedule's configuration, so that another one is refused by name.
    """

    latents: torch.Tensor
    step: int
    T: int
    scheduler: Mapping[str, Any]
    state: Mapping[str, Any] = field(default_factory=dict)
    mode: str = "exact"

    def __post_init__(self) -> None:
        if self.latents.ndim != 4 or not self.latents.is_floating_point():
            raise ValueError(f"a hand-over's latents are {self.latents.dtype} of shape {tuple(self.latents.shape)}, "
                             "expected floating point of shape (N, C, h, w)")
        if not 0 <= self.step <= self.T:
            raise ValueError(f"the hand-over's step is {self.step}, expected 0..{self.T}")
        if self.mode not in ("exact", "restart") or (self.mode == "restart" and self.state):
            raise ValueError(f"the hand-over's mode is {self.mode!r} with {len(self.state)} state entries, expected "
                             "'exact', or 'restart' and none")

    @property
    def N(self) -> int:
        return len(self.latents)

    def pick(self, secret: Any, recipe: Any = None) -> HandOver:
        """The hand-over of one candidate: line 5 of Algorithm 1. The choice happens here, on the device.

        With a ``recipe`` (candidates, N) there are more candidates than latents, and row by row it says of what
        multiples of the latents (and of the state, which follows them linearly) each candidate's are the sum.
        """
        if recipe is None:
            secret.check(self.N)
            return self._each(lambda tensor: tensor[secret.index:secret.index + 1])
        secret.check(len(recipe))
        weights = torch.tensor(recipe[secret.index], dtype=torch.float64)
        return self._each(lambda x: (weights.to(x.device).view(-1, 1, 1, 1) * x.double()).sum(0, keepdim=True).to(x))

    def to(self, torch_device: Any) -> HandOver:
        """The same hand-over, its tensors on ``torch_device``."""
        return self._each(lambda tensor: tensor.to(torch_device))

    def check(self, world: Any, split: Any, *, step: int, N: int, mode: str) -> None:
        """ValueError, with the difference named, unless this hand-over was made as ``world`` and ``split`` expect."""
        here = config(world.schedulers[split.first])
        for key in sorted({*here, *self.scheduler}, key=lambda key: (key != "_class_name", key)):
            if self.scheduler.get(key) != here.get(key):
                _refuse(f"with a scheduler whose {key.lstrip('_')} is {self.scheduler.get(key)!r}", repr(here.get(key)))
        for what, made, expected in (
            ("on a schedule of {} steps", self.T, split.steps),
            ("up to step {}", self.step, step),
            ("with latents of shape {}", tuple(self.latents.shape[1:]), tuple(world.shape)),
            ("in {}", str(self.latents.dtype).removeprefix("torch."), str(world.dtype).removeprefix("torch.")),
            ("for {} hand-over", self.mode, mode),
        ):
            if made != expected:
                _refuse(what.format(made), str(expected))
        if self.N not in (1, N):
            _refuse(f"for {self.N} candidates", str(N))

    def _each(self, do: Callable[[torch.Tensor], torch.Tensor]) -> HandOver:
        return replace(self, latents=do(self.latents), state=each(self.state, self.latents.shape, do))


def _refuse(made: str, here: str) -> None:
    raise ValueError(f"the hand-over was made {made}, here it is {here}: both sides must use one world and one split")
