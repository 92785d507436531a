"""Notebook 02: who takes which steps, what the hand-over between them loses, and what it weighs on the wire.

``walk`` takes many prompts, each with a noise of its own, through one model in one batch, and keeps the hand-over at
every step that is asked for; another walk goes on from any of them. So one walk of T steps serves every switch point.
Row by row it is ``denoise.run`` and ``denoise.finish`` (a test holds this): the loop is theirs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pandas as pd
import torch

from obclip_core import denoise, metrics, worlds
from obclip_core.accelerate import Schedule
from obclip_core.denoise import HandOver, Offer, Secret, Split, decode, finish, noised, run
from obclip_core.experiments import cache_ablations
from obclip_core.experiments.cache_ablations import Case, cases, pictures
from obclip_core.schedulers import config, fresh, log_snr, matching_shift, put, resume, state_of, tensors_of
from obclip_core.service import wire
from obclip_core.worlds import World, condition

__all__ = ["pictures"]  # besides what is defined here

ORDERS = ("cloud-first", "device-first")
SCHEDULERS = {"dpmsolver++": (diffusers.DPMSolverMultistepScheduler, {}),
              "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),  # latents are not confined to [-1, 1]
              "euler": (diffusers.EulerDiscreteScheduler, {})}
SCORES = ("clip_score", "attribute_accuracy", "context_accuracy")  # one value a picture; more is better
NAMES = {"kid": "KID", "clip_score": "CLIP score", "attribute_accuracy": "attribute accuracy",
         "context_accuracy": "context accuracy"}
MODES = ("exact", "restart")


# ---------------------------------------------------------------------------------------------- worlds and walks


@lru_cache(maxsize=2)
def loaded(world: str, cloud: str = "cloud") -> World:
    """The world of this name or folder, with this cloud, loaded once a process."""
    return worlds.load(world, cloud=cloud)


def few_steps(world: str) -> World:
    """The world with its step-distilled cloud; where it has none, its own cloud walking 8 steps (not distilled)."""
    try:
        return loaded(world, "cloud_lcm")
    except worlds.WorldError as why:
        if "has no table" not in str(why):
            raise
    plain = loaded(world)
    return plain if plain.cloud_T else replace(plain, cloud_T=8)


def depends(cell: Any) -> list[str | Path]:
    """What a cell's values depend on: this module and all it imports, the world's weights and prompts."""
    return [__name__, *cache_ablations.depends(cell)[1:]]


def noise(world: World, side: str, T: int, seeds: Sequence[int]) -> HandOver:
    """Where a walk begins: before step 0 of T, one noise z_T for each seed, as an offer with that seed has it."""
    scheduler = fresh(world.schedulers[side], T, 0, world.torch_device)
    z = torch.cat([denoise.draw_noise(world, torch.Generator("cpu").manual_seed(seed)) for seed in seeds])
    return HandOver(scheduler.init_noise_sigma * z, 0, T, config(scheduler))


@torch.no_grad()
def walk(world: World, side: str, texts: Sequence[str], seeds: Sequence[int], given: HandOver, stops: Iterable[int],
         schedule: Schedule | None = None) -> dict[int, HandOver]:
    """Go on from ``given`` with the model of ``side``, a text and a seed for each latent: the hand-over at each stop.

    ``schedule`` accelerates the U-Net; under batch reuse the rows would share one map, so it must not reuse.
    """
    if schedule is not None and schedule.reuse:
        raise ValueError("batch reuse is for the candidates of one prompt: walk them with denoise.run")
    unet, T = world.unet(side), given.T
    scheduler = resume(fresh(world.schedulers[side], T, given.step, world.torch_device), given.state)
    text, draws = condition(world, side, texts), [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    for generator in draws:  # pass over what earlier steps drew: z_T, and at most one a step
        for _ in range(1 + given.step):
            denoise.draw_noise(world, generator)
    x, at, found = given.latents, given.step, {}
    with denoise.accelerated(schedule, unet, len(texts), text.guided) as bracket:
        for stop in sorted(set(stops)):
            x = denoise.take_steps(unet, scheduler, range(at, stop), x, text, draws, at=bracket)
            state = state_of(scheduler, T, stop, x) if stop < T else {}
            found[stop] = HandOver(x, stop, T, config(scheduler), copy.deepcopy(state))  # the walk goes on changing it
            at = stop
    return found


def taken(world: World, side: str, given: HandOver, mode: str = "exact", T: int | None = None,
          join: int | None = None) -> HandOver:
    """The hand-over as ``side`` takes it: as it is, or the latents alone, before step ``join`` of its own T steps.

    Exact is possible on one schedule only; between two, and where the mode is restart, the scheduler's memory is lost.
    """
    T, join = T or given.T, given.step if join is None else join
    here = config(world.schedulers[side])
    if mode == "exact" and (T, join, here) == (given.T, given.step, dict(given.scheduler)):
        return given
    return HandOver(given.latents, join, T, here, mode="restart")


def together(parts: Sequence[HandOver]) -> HandOver:
    """Hand-overs of one latent each, made alike, as one."""
    first = parts[0]
    state, shape = dict(first.state), first.latents.shape
    for name in tensors_of(state, shape):
        state = put(state, name, torch.cat([tensors_of(part.state, shape)[name] for part in parts]))
    return replace(first, latents=torch.cat([part.latents for part in parts]), state=state)


def asked(world: World, first: int, count: int) -> tuple[list[Case], list[str], list[Mapping[str, str]]]:
    """``count`` requests of the N = 30 prompt set from number ``first`` on, their real texts and what these say."""
    found = list(cases(world, "n30", first + count)[first:])
    return found, [case.candidates[case.index] for case in found], [case.values[case.index] for case in found]


def scores(world: World, latents: Sequence[torch.Tensor], texts: Sequence[str], truth: Sequence[Mapping[str, str]],
           shown: int) -> dict[str, np.ndarray]:
    """What the judge says of S sets of B latents: features (S, B, D), probabilities (S, B, classes), SCORES (S, B), and
    pictures (S, shown, 3, H, W)."""
    judge, found = metrics.scorer(world), []
    for z in latents:
        images = decode(world, z)
        found.append(judge.judge(images, texts, truth)
                     | {"pictures": (images[:shown] * 255).round().to(torch.uint8).cpu().numpy()})
    return {name: np.stack([one[name] for one in found]) for name in found[0]}


@dataclass(frozen=True)
class Reference:
    """Pictures that KID and FID compare with."""

    world: str
    count: int


def reference(cell: Reference) -> dict[str, Any]:
    """Scorer features (count, D): drawings that no model of `portraits` has seen; elsewhere the cloud's own pictures.

    The latter have other noise than any that is measured; the distance is then one to the cloud, not to the world.
    """
    if cell.world == "portraits":
        return cache_ablations.reference(cache_ablations.Drawings(cell.world, cell.count))
    world = loaded(cell.world)
    _, texts, _ = asked(world, 0, cell.count)
    found, T = [], world.cloud_T or world.T
    for at in range(0, cell.count, 16):
        few = texts[at:at + 16]
        seeds = range(10**9 + at, 10**9 + at + len(few))
        done = walk(world, "cloud", few, seeds, noise(world, "cloud", T, seeds), [T])
        found.append(metrics.scorer(world).features(decode(world, done[T].latents)))
    return {"features": torch.cat(found)}


# ---------------------------------------------------------------------------------------------- who goes first


@dataclass(frozen=True)
class Sweep:
    """``count`` prompts from number ``first`` on with one seed, at every number of cloud steps, in both orders.

    ``restarts`` are the numbers of cloud steps at which the device also restarts; ``shown`` pictures are kept.
    """

    world: str
    T: int
    cloud_steps: tuple[int, ...]
    first: int
    count: int
    seed: int
    restarts: tuple[int, ...] = ()
    shown: int = 0

    def __post_init__(self) -> None:
        if not all(0 <= k <= self.T for k in self.cloud_steps):
            raise ValueError(f"cloud_steps are {self.cloud_steps}: expected numbers from 0 to T = {self.T}")
        if not set(self.restarts) <= set(self.cloud_steps) - {0, self.T}:
            raise ValueError(f"restarts are {self.restarts}: expected some of cloud_steps, without 0 and T")


def sweep_cell(cell: Sweep) -> dict[str, Any]:
    """Scores of all pictures: SCORES (2, K, B) by order and number of cloud steps; the same of the R restarts.

    restart_distance (R, B) is the perceptual distance of a restarted picture from the exact one.
    """
    world, T = loaded(cell.world), cell.T
    _, texts, truth = asked(world, cell.first, cell.count)
    seeds = [100_000 * cell.seed + cell.first + i for i in range(cell.count)]

    def go(side: str, given: HandOver, stops: Iterable[int]) -> dict[int, HandOver]:
        return walk(world, side, texts, seeds, given, stops)

    inner = [k for k in cell.cloud_steps if 0 < k < T]
    cloud = go("cloud", noise(world, "cloud", T, seeds), [*inner, T])
    device = go("device", noise(world, "device", T, seeds), [*(T - k for k in inner), T])
    ends = {(order, end): side[T].latents for order in ORDERS for end, side in ((0, device), (T, cloud))}
    for k in inner:
        ends["cloud-first", k] = go("device", taken(world, "device", cloud[k]), [T])[T].latents
        ends["device-first", k] = go("cloud", taken(world, "cloud", device[T - k]), [T])[T].latents
    found = scores(world, [ends[order, k] for order in ORDERS for k in cell.cloud_steps], texts, truth, cell.shown)
    found = {name: value.reshape(2, len(cell.cloud_steps), *value.shape[1:]) for name, value in found.items()}
    if cell.restarts:
        again = [go("device", taken(world, "device", cloud[k], "restart"), [T])[T].latents for k in cell.restarts]
        found |= {f"restart_{name}": value for name, value in scores(world, again, texts, truth, 0).items()
                  if name in SCORES}
        found["restart_distance"] = np.stack([
            metrics.perceptual_distance(metrics.scorer(world), decode(world, z), decode(world, ends["cloud-first", k]))
            for z, k in zip(again, cell.restarts, strict=True)])
    return found


def sweep_grid(world: str, T: int, cloud_steps: Sequence[int], prompts: int, seeds: int, block: int, *,
               restarts: Sequence[int] = (), shown: int = 0, seed: int = 0) -> tuple[Sweep, ...]:
    """All cells: ``seeds`` noises for each prompt, a cell for ``block`` prompts; the first keeps pictures."""
    return tuple(Sweep(world, T, tuple(cloud_steps), restarts=tuple(restarts), **part)
                 for part in _blocks(prompts, seeds, block, shown, seed))


def _blocks(prompts: int, seeds: int, block: int, shown: int, seed: int) -> list[dict[str, int]]:
    """What tells the cells of a grid apart: first, count, seed and shown."""
    return [{"first": first, "count": min(block, prompts - first), "seed": seed + s,
             "shown": shown if s == first == 0 else 0} for s in range(seeds) for first in range(0, prompts, block)]


def gathered(cells: Sequence[Any], results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of all cells with prompts and seeds as the axes after the leading ones: (..., P, S) or (..., P, S, D)."""
    found = {}
    for name in names:
        at = results[0][name].ndim - (2 if name in ("features", "probabilities") else 1)
        pairs = list(zip(cells, results, strict=True))
        by_seed = [np.concatenate([result[name] for cell, result in pairs if cell.seed == seed], axis=at)
                   for seed in dict.fromkeys(cell.seed for cell in cells)]
        found[name] = np.stack(by_seed, axis=at + 1)
    return found


@dataclass(frozen=True)
class Judged:
    """One set of pictures, (P prompts, S seeds): features (P, S, D), probabilities (P, S, classes), SCORES (P, S)."""

    values: Mapping[str, np.ndarray]
    real: np.ndarray

    def interval(self, metric: str, other: Judged | None = None) -> metrics.Interval:
        """The metric and its interval over prompts; with ``other``, the paired difference to it."""
        if metric == "kid":
            flat = [one.values["features"].reshape(-1, self.real.shape[1]) for one in (self, other) if one]
            P, S = self.values["features"].shape[:2]
            of = metrics.kid_ci if other is None else metrics.kid_difference_ci
            return of(*flat, self.real, np.repeat(np.arange(P), S))
        if other is None:
            return metrics.bootstrap_ci(self.values[metric])
        return metrics.paired_difference_ci(self.values[metric], other.values[metric])

    def row(self, other: Judged | None = None) -> dict[str, float]:
        """All metrics with their bounds, as columns."""
        found = {}
        for metric in ("kid", *SCORES):
            found |= self.interval(metric, other).row(metric)
        return found

    def fid(self) -> dict[str, Any]:
        flat = self.values["features"].reshape(-1, self.real.shape[1])
        return {"fid": metrics.fid(flat, self.real), "fid_note": metrics.fid_note(len(flat), self.real.shape[1])}


def judged(cells: Sequence[Any], results: Sequence[Mapping[str, Any]], real: np.ndarray) -> Callable[..., Judged]:
    """The pictures at a place of the cells' leading axes, as a function of that place."""
    whole = gathered(cells, results, ("features", "probabilities", *SCORES))
    return lambda *at: Judged({name: value[at] for name, value in whole.items()}, real)


def split_table(cells: Sequence[Sweep], results: Sequence[Mapping[str, Any]], real: np.ndarray) -> pd.DataFrame:
    """Figure 3: a row an order and number of cloud steps k (share in %), each metric with its interval over prompts.

    Rows with against_order or against_share hold paired differences to that order, or to that share of the same order.
    n pictures are of `prompts` prompts with `seeds` noises each.
    """
    steps, T, at = cells[0].cloud_steps, cells[0].T, judged(cells, results, real)
    sets = {(order, k): at(i, j) for i, order in enumerate(ORDERS) for j, k in enumerate(steps)}
    P, S = sets[ORDERS[0], steps[0]].values["attribute_accuracy"].shape
    rows = []
    for (order, k), one in sets.items():
        head = {"order": order, "share": 100 * k / T, "k": k, "n": P * S, "prompts": P, "seeds": S}
        rows.append(head | one.row() | one.fid())
        if order == ORDERS[0] and 0 < k < T:
            rows.append(head | {"against_order": ORDERS[1]} | one.row(sets[ORDERS[1], k]))
        if order == ORDERS[0] and k and 0 in steps:
            rows.append(head | {"against_share": 0.0} | one.row(sets[order, 0]))
    columns = ["order", "share", "k", "n", "prompts", "seeds", "against_order", "against_share"]
    table = pd.DataFrame(rows)
    return table[[*(name for name in columns if name in table), *(name for name in table if name not in columns)]]


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """Cloud-first less device-first at equal share: a row a share and metric, and which order the interval favours."""
    rows = []
    for row in table[table.against_order.notna()].to_dict("records"):
        for metric, name in NAMES.items():
            # an error of rounding is no finding
            value, *ends = (round(row[f"{metric}{end}"], 12) for end in ("", "_low", "_high"))
            low, high = ends
            if metric == "kid":  # less is better
                low, high = -high, -low
            better = ORDERS[0] if low > 0 else ORDERS[1] if high < 0 else "undecided"
            rows.append({"share": row["share"], "metric": name, "difference": value, "low": ends[0], "high": ends[1],
                         "better": better})
    return pd.DataFrame(rows)


def finding(table: pd.DataFrame, below: float = 40) -> str:
    """Whether going first helps the cloud up to a share of ``below`` %, in words, from the paired differences."""
    found = differences(table)
    if not len(found):
        return "no share between 0 and 100 % was measured"
    told = []
    for name in dict.fromkeys(found.metric):
        part = found[found.metric == name]
        few, many = part[part.share <= below], part[part.share > below]
        won = {order: [f"{(rows.better == order).sum()} of {len(rows)}" for rows in (few, many)] for order in ORDERS}
        example = [f"; {row.difference:+.3g} [{row.low:+.3g}, {row.high:+.3g}] at {row.share:g} %"
                   for row in few.itertuples()]
        cloud, device = won[ORDERS[0]], won[ORDERS[1]]
        told.append(f"{name}: up to {below:g} % cloud-first is surely better at {cloud[0]} shares, device-first at "
                    f"{device[0]}; above, at {cloud[1]} and {device[1]}" + "".join(example[:2]))
    return "\n".join(told)


def restart_table(cells: Sequence[Sweep], results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """What a restart costs between the real pair: paired differences restart less exact, and the pictures' distance."""
    found = gathered(cells, results, (*SCORES, *(f"restart_{name}" for name in (*SCORES, "distance"))))
    rows = []
    for i, k in enumerate(cells[0].restarts):
        j = cells[0].cloud_steps.index(k)
        told = {name: metrics.paired_difference_ci(found[f"restart_{name}"][i], found[name][0, j]) for name in SCORES}
        told["distance"] = metrics.bootstrap_ci(found["restart_distance"][i])
        rows += [{"k": k, "metric": name, **one.row(), "prompts": one.n} for name, one in told.items()]
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------------------- pictures per k


@dataclass(frozen=True)
class Grid:
    """Pictures of some prompts at every k, without and with acceleration, under all candidates of a set (n6, n30)."""

    world: str
    T: int
    ks: tuple[int, ...]
    prompts: str
    count: int
    seed: int = 0
    distilled: bool = False


def grid_cell(cell: Grid) -> dict[str, Any]:
    """pictures (2, count, 2 + K, 3, H, W), bytes: without and with acceleration; the cloud alone, each k, the device.

    Acceleration is the paper's: the cache from the step r, block skip from s, batch reuse before r. A step-distilled
    cloud has no block skip, and the device joins at the shift that matches the noise.
    """
    world = few_steps(cell.world) if cell.distilled else loaded(cell.world)
    steps = world.cloud_T if cell.distilled else cell.T
    rows = []
    for case in cases(world, cell.prompts, cell.count, cell.seed):
        own = case.candidates[case.index]
        splits = [split_of(world, cell.T, k) if cell.distilled else Split(cell.T, k) for k in cell.ks]
        ends = [_picture(world, Offer((own,), case.seed, split), 0)
                for split in (Split(cell.T, steps, cloud_T=steps if cell.distilled else None,
                                    shift=cell.T - steps if cell.distilled else 0), Split(cell.T, 0))]
        plain = [_picture(world, Offer((own,), case.seed, split), 0) for split in splits]
        fast = [_picture(world, Offer(case.candidates, case.seed, split, points(split)), case.index)
                for split in splits]
        rows.append(torch.stack([torch.stack([ends[0], *few, ends[1]]) for few in (plain, fast)]))
    return {"pictures": (torch.stack(rows, dim=1) * 255).round().to(torch.uint8)}


def points(split: Split) -> Schedule:
    """The paper's schedule: (r, s) is (3, 3) below k = 10, (4, 6) from there on; a distilled cloud's (k / 2, none)."""
    k = split.k
    if split.cloud_T:
        return Schedule.points(k, k // 2 or None)
    return Schedule.points(k, min(k, 3), min(k, 3)) if k < 10 else Schedule.points(k, 4, 6)


def split_of(world: World, T: int, k: int, shift: int | None = None) -> Split:
    """The split of a step-distilled cloud after k of its steps; the shift that matches the noise, if none is given."""
    split = Split(T, k, cloud_T=world.cloud_T)
    shift = matching_shift(world.schedulers["cloud"], world.schedulers["device"], split) if shift is None else shift
    return replace(split, shift=shift)


def _picture(world: World, offer: Offer, index: int) -> torch.Tensor:
    return decode(world, finish(world, offer, run(world, offer), Secret(index)))[0].cpu()


# ---------------------------------------------------------------------------------------------- a distilled cloud


@dataclass(frozen=True)
class Shifts:
    """A step-distilled cloud that hands over after k of its steps, to the device's T steps at k + each of ``shifts``.

    ``plain`` are the shifts that are also taken without the attention cache.
    """

    world: str
    T: int
    k: int
    shifts: tuple[int, ...]
    plain: tuple[int, ...]
    first: int
    count: int
    seed: int
    shown: int = 0

    @property
    def methods(self) -> tuple[str, ...]:
        """What is measured, named as in the paper's Table 4."""
        return ("cloud-only", "device-only", *(f"obclip shift={shift}" for shift in self.plain),
                *(f"obclip+cache shift={shift}" for shift in self.shifts))


def shift_cell(cell: Shifts) -> dict[str, Any]:
    """Scores of the cell's methods, each an index of the leading axis."""
    world, T = few_steps(cell.world), cell.T
    _, texts, truth = asked(world, cell.first, cell.count)
    seeds = [100_000 * cell.seed + cell.first + i for i in range(cell.count)]
    begin = noise(world, "cloud", world.cloud_T, seeds)
    plain = walk(world, "cloud", texts, seeds, begin, [cell.k, world.cloud_T])
    half = Schedule.points(cell.k, cell.k // 2 or None, reuse=False)
    cached = walk(world, "cloud", texts, seeds, begin, [cell.k], half)[cell.k]
    alone = walk(world, "device", texts, seeds, noise(world, "device", T, seeds), [T])[T].latents

    def join(given: HandOver, shift: int) -> torch.Tensor:
        given = taken(world, "device", given, T=T, join=cell.k + shift)
        return walk(world, "device", texts, seeds, given, [T])[T].latents

    latents = [plain[world.cloud_T].latents, alone, *(join(plain[cell.k], shift) for shift in cell.plain),
               *(join(cached, shift) for shift in cell.shifts)]
    return scores(world, latents, texts, truth, cell.shown)


def shift_grid(world: str, T: int, k: int, shifts: Sequence[int], plain: Sequence[int], prompts: int, seeds: int,
               block: int, *, shown: int = 0, seed: int = 0) -> tuple[Shifts, ...]:
    """All cells, as ``sweep_grid``."""
    return tuple(Shifts(world, T, k, tuple(shifts), tuple(plain), **part)
                 for part in _blocks(prompts, seeds, block, shown, seed))


def around(derived: int, T: int, k: int, near: int = 2, printed: Sequence[int] = (0, 4, 8, 10)) -> tuple[int, ...]:
    """The shifts to try: the paper's, and all up to ``near`` beside the derived one."""
    return tuple(sorted({s for s in (*printed, *range(derived - near, derived + near + 1)) if 0 <= s and k + s < T}))


def shift_table(cells: Sequence[Shifts], results: Sequence[Mapping[str, Any]], real: np.ndarray,
                derived: int) -> pd.DataFrame:
    """Rows of Table 4's lower part in long form, and paired differences (a column `against`) to the other shifts.

    The differences are those of shift 8 and of the derived shift to every other, and of the uncached ones to the cloud.
    """
    cell, at = cells[0], judged(cells, results, real)
    sets = {method: at(i) for i, method in enumerate(cell.methods)}
    P, S = sets["cloud-only"].values["attribute_accuracy"].shape
    rows = []

    def add(method: str, against: str | None = None) -> None:
        k = cell.k if "shift" in method else np.nan
        head = {"world": f"{cell.world}-lcm", "method": method, "k": k, "candidates": 1}
        for metric in ("kid", *SCORES):
            one = sets[method].interval(metric, sets[against] if against else None)
            rows.append(head | {"metric": metric, **one.row(), "n": P * S, "against": against})
        if against is None:
            classes = sets[method].values["probabilities"].reshape(P * S, -1)
            found = metrics.inception_score_ci(classes, np.repeat(np.arange(P), S))
            rows.append(head | {"metric": "inception_score", **found.row(), "n": P * S, "against": None})
            rows.append(head | {"metric": "fid", "value": sets[method].fid()["fid"], "n": P * S})

    for method in cell.methods:
        add(method)
    for shift in dict.fromkeys((8, derived)):
        mine = f"obclip+cache shift={shift}"
        for other in cell.shifts if mine in sets else ():
            if other != shift:
                add(mine, f"obclip+cache shift={other}")
    for shift in cell.plain:
        add(f"obclip shift={shift}", "cloud-only")
    return pd.DataFrame(rows)


def shift_finding(table: pd.DataFrame, derived: int) -> pd.DataFrame:
    """By metric, the sweep's best shift beside the derived one, and the derived one's paired difference to the best."""
    rows = []
    cached = table[table.method.str.startswith("obclip+cache")]
    for metric in ("kid", *SCORES):
        part = cached[(cached.metric == metric) & cached.against.isna()]
        at = part.value.idxmin() if metric == "kid" else part.value.idxmax()
        best = int(part.method[at].split("=")[1])
        mine = cached[(cached.metric == metric) & (cached.method == f"obclip+cache shift={derived}")
                      & (cached.against == f"obclip+cache shift={best}")]
        low, high = (0.0, 0.0) if best == derived else (float(mine.low.iloc[0]), float(mine.high.iloc[0]))
        worse = low > 0 if metric == "kid" else high < 0
        rows.append({"metric": metric, "derived": derived, "best": best,
                     "difference": 0.0 if best == derived else float(mine.value.iloc[0]), "low": low, "high": high,
                     "derived is": "the best" if best == derived else "worse" if worse else "not told apart"})
    return pd.DataFrame(rows)


def shift_rule(world: World, T: int) -> pd.DataFrame:
    """For each number k of cloud steps, the noise level left, the device's step nearest to it, and the shift.

    shift_between is the shift to the place between two of the device's steps where the levels would be equal.
    """
    cloud, device = fresh(world.schedulers["cloud"], world.cloud_T), fresh(world.schedulers["device"], T)
    levels = [log_snr(device, t) for t in device.timesteps]
    rows = []
    for k in range(1, world.cloud_T):
        shift = split_of(world, T, k).shift
        t, joined = cloud.timesteps[k], device.timesteps[k + shift]
        rows.append({"k": k, "cloud_timestep": float(t), "cloud_log_snr": log_snr(cloud, t), "shift": shift,
                     "shift_between": float(np.interp(log_snr(cloud, t), levels, range(T))) - k,
                     "join": k + shift, "device_timestep": float(joined), "device_log_snr": log_snr(device, joined)})
    return pd.DataFrame(rows)


def noise_levels(world: World, T: int) -> pd.DataFrame:
    """Log SNR before every step of the two schedules: rows (schedule, step, log_snr)."""
    found = {f"cloud, {world.cloud_T} steps": fresh(world.schedulers["cloud"], world.cloud_T),
             f"device, {T} steps": fresh(world.schedulers["device"], T)}
    return pd.DataFrame([{"schedule": name, "step": i, "log_snr": log_snr(scheduler, t)}
                         for name, scheduler in found.items() for i, t in enumerate(scheduler.timesteps)])


# ---------------------------------------------------------------------------------------------- the hand-over


@dataclass(frozen=True)
class HandOvers:
    """Two copies of one model (``side``'s), one scheduler: the hand-over after each of ``ks`` of T steps."""

    world: str
    side: str
    scheduler: str
    T: int
    ks: tuple[int, ...]
    seed: int = 0


def two_copies(world: World, side: str, scheduler: str) -> World:
    """The world with one model on both sides, and the scheduler of this name (SCHEDULERS) on its own noise levels."""
    if scheduler not in SCHEDULERS:
        raise ValueError(f"the scheduler is {scheduler!r}, expected one of {', '.join(SCHEDULERS)}")
    trained = world.schedulers["device"].config
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "steps_offset",
            "timestep_spacing")
    cls, own = SCHEDULERS[scheduler]
    one = cls(**{key: trained[key] for key in kept if key in trained}, **own)
    model, w = world.unet(side), world.guidance[side]
    return replace(world, cloud=model, device=model, schedulers={"cloud": one, "device": one},
                   guidance={"cloud": w, "device": w}, cloud_T=None)


def hand_over_cell(cell: HandOvers) -> dict[str, Any]:
    """max_abs_diff (modes, ks) of the latents from those of one model alone, and rms (modes, ks) of the pictures.

    Pictures are in [0, 255]. One walk gives the hand-over at every k; ``denoise.finish`` goes on from each.
    """
    world = two_copies(loaded(cell.world), cell.side, cell.scheduler)
    _, texts, _ = asked(world, cell.seed, 1)
    alone = walk(world, "cloud", texts, [cell.seed], noise(world, "cloud", cell.T, [cell.seed]), [*cell.ks, cell.T])
    whole = alone[cell.T].latents
    ends = [[finish(world, Offer(tuple(texts), cell.seed, Split(cell.T, k, hand_over=mode)),
                    taken(world, "device", alone[k], mode), Secret(0)) for k in cell.ks] for mode in MODES]
    picture = decode(world, whole)
    return {"max_abs_diff": np.array([[float((z - whole).abs().max()) for z in row] for row in ends]),
            "rms": np.array([[_rms(decode(world, z), picture) for z in row] for row in ends])}


def hand_over_table(cells: Sequence[HandOvers], results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """handover.csv: scheduler, k, mode, max_abs_diff, and the picture's error (root mean square of 255 grey levels)."""
    return pd.DataFrame([
        {"scheduler": cell.scheduler, "k": k, "mode": mode, "max_abs_diff": result["max_abs_diff"][i, j],
         "picture_rms_255": result["rms"][i, j]}
        for cell, result in zip(cells, results, strict=True) for i, mode in enumerate(MODES)
        for j, k in enumerate(cell.ks)])


def _rms(images: torch.Tensor, others: torch.Tensor) -> float:
    return float((images - others).double().square().mean().sqrt() * 255)


# ---------------------------------------------------------------------------------------------- the wire


@dataclass(frozen=True)
class Envelope:
    """The hand-over of request ``index`` with N candidates (1, 2, 6, 30) after k of T steps, in every coding.

    ``reals`` of the candidates are taken in turn as the real one.
    """

    world: str
    N: int
    T: int
    k: int
    index: int
    reals: int = 2


def envelope_cell(cell: Envelope) -> dict[str, Any]:
    """By mode (exact, restart) and coding: bytes (2, C), latent_rms (2, C) in units of the latents' own, and rms
    (2, C, reals): the picture's error against the uncoded hand-over's, in 255 grey levels."""
    world = loaded(cell.world)
    case = cases(world, "n2" if cell.N == 1 else f"n{cell.N}", cell.index + 1)[cell.index]
    texts = case.candidates if cell.N > 1 else (case.candidates[case.index],)
    reals = np.linspace(0, cell.N - 1, min(cell.N, cell.reals)).round().astype(int)
    whole = run(world, Offer(texts, case.seed, Split(cell.T, cell.k)))
    sizes, latents, errors = [], [], []
    for mode in MODES:
        offer = Offer(texts, case.seed, Split(cell.T, cell.k, hand_over=mode))
        sent = whole if mode == "exact" == whole.mode else replace(whole, state={}, mode="restart")
        offer = replace(offer, split=replace(offer.split, hand_over=sent.mode))
        real = {j: decode(world, finish(world, offer, sent, Secret(int(j)))) for j in reals}
        for coding in wire.CODINGS:
            envelope = wire.pack_hand_over(sent, coding)
            back = wire.unpack_hand_over(envelope)
            sizes.append(len(envelope))
            latents.append(float((back.latents - sent.latents).square().mean().sqrt() / sent.latents.std()))
            errors.append([_rms(decode(world, finish(world, offer, back, Secret(int(j)))), real[j]) for j in reals])
    shape = (2, len(wire.CODINGS))
    return {"bytes": np.array(sizes).reshape(shape), "latent_rms": np.array(latents).reshape(shape),
            "rms": np.array(errors).reshape(*shape, -1)}


def envelope_table(cells: Sequence[Envelope], results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A row an N, mode and coding: bytes a candidate, as a part of fp16's, and the errors, over all requests."""
    rows = []
    for N in dict.fromkeys(cell.N for cell in cells):
        part = [result for cell, result in zip(cells, results, strict=True) if cell.N == N]
        size = np.mean([result["bytes"] for result in part], axis=0) / N
        for i, mode in enumerate(MODES):
            for j, coding in enumerate(wire.CODINGS):
                errors = np.concatenate([result["rms"][i, j] for result in part])
                rows.append({"N": N, "mode": mode, "coding": coding, "bytes_a_candidate": size[i, j],
                             "fewer_than_fp16": size[i, wire.CODINGS.index("fp16")] / size[i, j],
                             "latent_rms": np.mean([result["latent_rms"][i, j] for result in part]),
                             "picture_rms_255": errors.mean(), "worst_picture_rms_255": errors.max(), "n": len(errors)})
    return pd.DataFrame(rows)


def traffic(table: pd.DataFrame, world: World) -> pd.DataFrame:
    """Bytes up and down and seconds on three links for SD, SDXL and this world, at the measured rate of each coding.

    A difference coding's size depends on the latents. Its bits a value are those measured here (``table``), also for
    the two large worlds: there they are an estimate.
    """
    rows = []
    for (N, mode), part in table.groupby(["N", "mode"], sort=False):
        size = part.set_index("coding").bytes_a_candidate
        values = size["fp16"] - size["int8"]  # bytes that eight bits a value are, whatever the header weighs
        bits = 8 * (size["difference"] - (2 * size["int8"] - size["fp16"])) / values
        found = wire.traffic_table({"sd": (4, 64, 64), "sdxl": (4, 128, 128), world.name: world.shape}, (int(N),),
                                   {"difference": float(bits)})
        rows += [row for row in found if row["mode"] == mode]
    order = {name: i for i, name in enumerate(dict.fromkeys(row["world"] for row in rows))}
    return pd.DataFrame(sorted(rows, key=lambda row: (order[row["world"]], row["N"])))


# ---------------------------------------------------------------------------------------------- from a picture


@dataclass(frozen=True)
class FromPicture:
    """Image-to-image: ``count`` pictures, noised on the device up to each of ``steps``, changed in all attributes.

    The cloud takes ``k`` steps from there, the device the rest.
    """

    world: str
    T: int
    steps: tuple[int, ...]
    k: int
    count: int
    seed: int = 0
    shown: int = 0


def from_picture_cell(cell: FromPicture) -> dict[str, Any]:
    """What comes out and what the cloud could read, by start: followed, read, read_text (steps, B), ssim (steps, B).

    ``followed`` is the accuracy of the new attributes in the result, ``read`` that of the old ones in what the cloud's
    own model makes of the noised latent without any prompt. pictures (1 + 2 steps, shown, 3, H, W).
    """
    world, T = loaded(cell.world), cell.T
    found, texts, truth = asked(world, 0, cell.count)
    judge, seeds = metrics.scorer(world), [7_000_000 + cell.seed * 1000 + i for i in range(cell.count)]
    source = decode(world, walk(world, "cloud", texts, seeds, noise(world, "cloud", T, seeds), [T])[T].latents)
    others = [max(range(len(case.values)), key=case.apart) for case in found]
    wanted = [case.candidates[j] for case, j in zip(found, others, strict=True)]
    asks = [case.values[j] for case, j in zip(found, others, strict=True)]
    shown, values = [source], {"followed": [], "read": [], "ssim": []}
    for step in cell.steps:
        starts = [noised(world, one[None], Split(T, step), step, seed=10**6 + i) for i, one in enumerate(source)]
        given = replace(starts[0], latents=torch.cat([start.latents for start in starts]))
        guess = decode(world, walk(world, "cloud", [""] * cell.count, seeds, given, [T])[T].latents)
        k = min(step + cell.k, T)
        half = walk(world, "cloud", wanted, seeds, given, [k])[k]
        result = decode(world, walk(world, "device", wanted, seeds, taken(world, "device", half), [T])[T].latents)
        values["followed"].append(metrics.attribute_accuracy(judge.correct(result, asks)))
        values["read"].append(metrics.attribute_accuracy(judge.correct(guess, truth)))
        values["ssim"].append(metrics.ssim(result, source))
        shown += [guess, result]
    kept = torch.stack([images[:cell.shown] for images in shown])
    return {**{name: np.stack(rows) for name, rows in values.items()}, "pictures": (kept * 255).round().to(torch.uint8)}


def from_picture_table(cell: FromPicture, result: Mapping[str, Any]) -> pd.DataFrame:
    """A row a start: share of the steps that noise the picture, and each measure with its interval over pictures."""
    rows = []
    for i, step in enumerate(cell.steps):
        row = {"step": step, "noised_share": 100 * (1 - step / cell.T), "n": cell.count}
        for name in ("followed", "read", "ssim"):
            row |= metrics.bootstrap_ci(result[name][i]).row(name)
        rows.append(row)
    return pd.DataFrame(rows)
