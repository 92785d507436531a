"""Notebook 03: how much each acceleration saves and costs, in multiply-adds, seconds, bytes and pictures.

A picture's quality under N candidates is measured on fewer: what the cloud does to a candidate depends on that
candidate and, under batch reuse, on the pivot, never on the others. So the real candidate and the pivot are run alone,
to the same picture (``few`` and its test), while multiply-adds, seconds and bytes are those of all N.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers.models.attention_processor import Attention

from obclip_core import cost, metrics, worlds
from obclip_core.accelerate import NONE, PAPER_K5, PAPER_K10, Schedule
from obclip_core.denoise import Offer, Secret, Split, call_bytes, decode, finish, now, run
from obclip_core.prompts import ATTRIBUTES, candidate_values, candidates, fill, parse, real_index
from obclip_core.provenance import ROOT

UNTRAINED = "untrained/"
SETS = {2: "n2", 6: "n6", 30: "n30"}
SHOWN = (0, 1, 2, 3, 9)  # steps whose attention maps are kept: those of batch reuse, and a late one
COMPONENTS = 4
WORDS = ("age", "ethnicity", "colour", "garment", "place")
# metric: (what it is, whether more is better)
METRICS = {"distance": ("distance from the unaccelerated picture", False), "kid": ("KID", False),
           "clip_score": ("CLIP score", True), "attribute_accuracy": ("attribute accuracy", True),
           "context_accuracy": ("context accuracy", True)}
# one step with a technique on (step 1), after a step without (step 0)
STEPS = {"none": NONE, "reuse": Schedule(reuse=(1,)), "reuse, map written out": Schedule(reuse=(1,), plain=True),
         "cache": Schedule(cache=(1,)), "skip": Schedule(skip=(1,)), "cache+skip": Schedule(cache=(1,), skip=(1,)),
         "tgate": Schedule.gate(2, 1), "encoder": Schedule(encoder=(1,)), "deepcache": Schedule(deepcache=(1,)),
         "merge": Schedule(merge=(1,))}  # at the U-Net's own depth: ``steps_of``
PAPER = {5: PAPER_K5, 10: PAPER_K10}


# ---------------------------------------------------------------------------------------------- worlds and prompts


@lru_cache(maxsize=2)
def loaded(world: str) -> worlds.World:
    """The world of this name or folder, loaded once a process, on a GPU where there is one.

    ``untrained/`` and a name of data/paper/unets is a cloud with random weights: enough for seconds and bytes.
    """
    at = "cuda" if torch.cuda.is_available() else "cpu"
    if world.startswith(UNTRAINED):
        return worlds.untrained(world.removeprefix(UNTRAINED), at)
    return worlds.load(world, torch_device=at)


def depends(cell: Any) -> list[str | Path]:
    """What a cell's values depend on: this module and all it imports, the world's weights, the prompts."""
    folder = Path(cell.world) if Path(cell.world).is_dir() else ROOT / "data" / cell.world / "weights"
    files = [ROOT / "data" / "worlds" / f"{cell.world}.toml", ROOT / "data" / "prompts" / "portraits.toml", folder]
    return [__name__, *(path for path in files if path.exists())]


def shape_of(world: worlds.World) -> cost.Shape:
    """The shape of the world's cloud, at the number of text tokens that it reads."""
    lengths = [min(words.model_max_length, net.config.max_position_embeddings)
               for words, net in zip(world.tokenizers, world.text_encoders, strict=True)]
    return replace(cost.shape(world.cloud, tokens=max(lengths)), name=world.name)


@dataclass(frozen=True)
class Case:
    """One request of a prompt set: its candidates with all values they name, which one is real, and a seed."""

    candidates: tuple[str, ...]
    values: tuple[Mapping[str, str], ...]
    index: int
    seed: int

    def apart(self, other: int) -> int:
        """In how many attributes the real candidate differs from another one."""
        return sum(self.values[self.index][name] != value for name, value in self.values[other].items())


@lru_cache(maxsize=8)
def cases(world: worlds.World, prompts: str, count: int, seed: int = 0) -> tuple[Case, ...]:
    """The first ``count`` requests of a prompt set (n2, n6, n30); the i-th is the same whatever the count."""
    file = world.prompts or ROOT / "data" / "prompts" / "portraits.toml"
    table = tomllib.loads(file.read_text("utf-8"))
    if prompts not in table["templates"]:
        raise ValueError(f"{prompts!r} is no prompt set, expected one of {', '.join(table['templates'])}")
    found = []
    for i in range(count):
        rng = random.Random(f"cache ablations {seed} {prompts} {i}")
        context = {name: rng.choice(values) for name, values in table["context"].items()}
        attributes = {name: rng.choice(values) for name, values in ATTRIBUTES.items()}
        prompt = parse(fill(rng.choice(table["templates"][prompts]), context | attributes))
        values = tuple(context | {name: value for name, value in one.items()} for one in candidate_values(prompt))
        found.append(Case(candidates(prompt), values, real_index(prompt), 1000 * seed + i))
    return tuple(found)


def request(text: str, seed: int) -> Case:
    """A prompt of one's own as a case."""
    prompt = parse(text)
    return Case(candidates(prompt), candidate_values(prompt), real_index(prompt), seed)


def few(case: Case, split: Split, schedule: Schedule) -> tuple[Offer, Secret]:
    """An offer of the real candidate (and the pivot, under batch reuse) alone that gives it the same latent."""
    if not schedule.reuse or schedule.pivot == case.index:
        return Offer((case.candidates[case.index],), case.seed, split, replace(schedule, pivot=0)), Secret(0)
    pair = case.candidates[schedule.pivot], case.candidates[case.index]
    return Offer(pair, case.seed, split, replace(schedule, pivot=0)), Secret(1)


# ---------------------------------------------------------------------------------------------- quality


@dataclass(frozen=True)
class Quality:
    """Pictures of the first ``count`` prompts of a set under one schedule, and what the scorer says of them."""

    world: str
    prompts: str
    count: int
    seed: int
    k: int
    schedule: Schedule = NONE


def quality(cell: Quality) -> dict[str, Any]:
    """Arrays, one row a prompt: what ``Scorer.judge`` gives, pictures (bytes), and apart, from the pivot."""
    world = loaded(cell.world)
    judge, asked, latents = metrics.scorer(world), cases(world, cell.prompts, cell.count, cell.seed), []
    for case in asked:
        offer, secret = few(case, Split(T=world.T, k=cell.k), cell.schedule)
        latents.append(finish(world, offer, run(world, offer), secret))
    images = decode(world, torch.cat(latents)).cpu()
    real = [(case.candidates[case.index], case.values[case.index]) for case in asked]
    return {
        **judge.judge(images, *zip(*real, strict=True)),
        "pictures": (images * 255).round().to(torch.uint8),
        "apart": np.array([case.apart(cell.schedule.pivot) for case in asked]),
    }


def pictures(array: Any) -> torch.Tensor:
    """Kept pictures (bytes) as they are drawn and compared: in [0, 1]."""
    return torch.from_numpy(np.array(array)).float() / 255


@dataclass(frozen=True)
class Drawings:
    """Reference pictures of a world, which no model of it has seen."""

    world: str
    count: int


def reference(cell: Drawings) -> dict[str, Any]:
    """Scorer features (count, D) of drawings of the world portraits, for KID; of none for every other world."""
    judge = metrics.scorer(loaded(cell.world))
    if cell.world != "portraits":
        return {"features": np.zeros((0, 1), dtype=np.float32)}
    first = portraits().FIRST_SEED["reference"]
    return {"features": judge.features(drawings(range(first, first + cell.count)))}


def portraits() -> Any:
    """The module that draws the world portraits, data/portraits/pictures.py."""
    folder = str(ROOT / "data" / "portraits")
    sys.path.insert(0, folder)
    try:
        return import_module("pictures")
    finally:
        sys.path.remove(folder)


def drawings(numbers: Sequence[int]) -> torch.Tensor:
    """The drawings of these numbers in the world portraits: (B, 3, H, W) in [0, 1]."""
    images = np.stack([portraits().draw(portraits().record(number), number) for number in numbers])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class Variant:
    """One line of the ablation: what it is called, which question it answers, and what is run."""

    name: str
    group: str
    N: int
    k: int
    schedule: Schedule

    def cell(self, world: str, count: int, seed: int) -> Quality:
        return Quality(world, SETS[self.N], count, seed, self.k, self.schedule)


def merging(shape: cost.Shape, steps: Sequence[int]) -> Schedule:
    """Token Merging in these steps, at the finest level of the U-Net that has self-attention."""
    finest = max(op.grid[0] for op in shape.ops if op.attention == "attn1")
    return Schedule(merge=tuple(steps), merge_depth=math.ceil(math.log2(shape.latent[1] / finest)))


def steps_of(shape: cost.Shape) -> dict[str, Schedule]:
    """STEPS, with Token Merging where this U-Net can merge."""
    return STEPS | {"merge": merging(shape, STEPS["merge"].merge)}


def variants(shape: cost.Shape, r: Sequence[int] = (), s: Sequence[int] = (), refresh: Sequence[int | None] = (),
             pivots: Sequence[int] = (), short: bool = False) -> tuple[Variant, ...]:
    """All lines of the ablation around the paper's points k = 10, r = 4, s = 6; ``short`` leaves most of them out."""
    def at(name: str, group: str, schedule: Schedule, N: int = 30, k: int = 10) -> Variant:
        return Variant(name, group, N, k, schedule)

    both = Schedule.points(10, 4, 6, reuse=False)
    reuse = Schedule(reuse=tuple(range(4)))
    found = [at("none", "technique", NONE), at("cache+skip", "technique", both),
             at("cache+skip+reuse", "technique", PAPER_K10)]
    if not short:
        found += [at("reuse", "technique", reuse), at("cache", "technique", Schedule.points(10, 4, reuse=False)),
                  at("skip", "technique", Schedule.points(10, 10, 6)),
                  at("cache+reuse", "technique", Schedule.points(10, 4)),
                  at("skip+reuse", "technique", replace(reuse, skip=both.skip)),
                  at("merge", "technique", merging(shape, range(10)))]
    throughout = tuple(range(10))
    found += [at("reuse throughout", "reach of reuse", Schedule(reuse=throughout))]
    if not short:
        found += [at("cache+skip, reuse throughout", "reach of reuse", replace(PAPER_K10, reuse=throughout))]
    found += [at(f"r = {x}", "r", Schedule.points(10, x, 6)) for x in r]
    found += [at(f"s = {x}", "s", Schedule.points(10, 4, x)) for x in s]
    found += [at(f"refresh {'never' if x is None else f'every {x}'}", "refresh", Schedule.points(10, 4, 6, refresh=x))
              for x in refresh]
    found += [at(f"pivot {x}", "pivot", replace(PAPER_K10, pivot=x)) for x in pivots]
    for name, schedule in {"cache+skip": both, "cache+skip+reuse": PAPER_K10}.items():
        if not (short and name == "cache+skip"):
            target = cost.macs(shape, schedule, 10, 30)
            found += [at(technique, f"against {name}", matched(shape, technique, 10, 30, target))
                      for technique in ("deepcache", "tgate", "encoder")]
    for N, k in ((30, 5), (6, 10), (6, 5), (2, 10)):
        if not short or (N, k) == (6, 5):
            found += [at("none", "technique", NONE, N, k), at("cache+skip+reuse", "technique", PAPER[k], N, k)]
    if not short:
        found += [at("reuse", "technique", reuse, 2)]
    return tuple(found)


def matched(shape: cost.Shape, technique: str, k: int, candidates: int, target: int) -> Schedule:
    """The setting of a competing technique whose multiply-adds over k steps are nearest to ``target``.

    Of settings as near to within 1 % of the target the competitor gets the one that suits it: DeepCache the most
    regular refresh, as its authors use it, the others the latest start, since early steps matter most.
    """
    starts = [(first, interval) for first in range(k - 1) for interval in range(2, k + 1 - first)]
    options = {
        "tgate": lambda: [Schedule.gate(k, m) for m in range(1, k)],
        "encoder": lambda: [Schedule.every("encoder", k, interval, first) for first, interval in starts],
        "deepcache": lambda: [Schedule.every("deepcache", k, interval, first, branch=branch)
                              for first, interval in starts for branch in range(shape.layers)],
    }
    if technique not in options:
        raise ValueError(f"{technique!r} has no setting to match, expected one of {', '.join(options)}")
    bills: dict[tuple[int, int], int] = {}

    def miss(schedule: Schedule) -> float:
        key = schedule.branch, len(schedule.steps(technique))
        if key not in bills:
            bills[key] = cost.macs(shape, schedule, k, candidates)
        return abs(bills[key] - target) / target

    found = options[technique]()
    least = min(map(miss, found))
    near = [schedule for schedule in found if miss(schedule) <= least + 0.01]
    if technique == "deepcache":
        return min(near, key=lambda schedule: (_longest(schedule.deepcache), -schedule.deepcache[0], miss(schedule)))
    return max(near, key=lambda schedule: (schedule.steps(technique)[0], -miss(schedule)))


def _longest(steps: tuple[int, ...]) -> int:
    """The longest run of consecutive steps."""
    return max(len(list(run_)) for _, run_ in groupby(enumerate(steps), lambda at: at[1] - at[0]))


def told(schedule: Schedule) -> str:
    """A schedule in a few words: what is on at which steps."""
    def span(steps: tuple[int, ...]) -> str:
        whole = steps == tuple(range(steps[0], steps[-1] + 1)) and len(steps) > 1
        return f"{steps[0]}-{steps[-1]}" if whole else " ".join(map(str, steps))

    extra = [f"branch {schedule.branch}"] * bool(schedule.deepcache)
    extra += [f"pivot {schedule.pivot}"] * bool(schedule.reuse and schedule.pivot)
    return ", ".join([f"{name} at {span(schedule.steps(name))}" for name in schedule.techniques] + extra) or "nothing"


Base = dict[tuple[int, int], Mapping[str, Any]]


def bases(lines: Sequence[Variant], results: Sequence[Mapping[str, Any]]) -> Base:
    """The unaccelerated result of every (N, k)."""
    return {(line.N, line.k): result for line, result in zip(lines, results, strict=True) if line.schedule == NONE}


def with_distance(judge: metrics.Scorer, lines: Sequence[Variant],
                  results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The results, each with ``distance`` (one a prompt): how far its picture is from the unaccelerated one."""
    plain = {at: pictures(result["pictures"]) for at, result in bases(lines, results).items()}
    return [dict(result) | {"distance": metrics.perceptual_distance(judge, pictures(result["pictures"]),
                                                                    plain[line.N, line.k])}
            for line, result in zip(lines, results, strict=True)]


def ablation(shape: cost.Shape, lines: Sequence[Variant], results: Sequence[Mapping[str, Any]],
             real: np.ndarray) -> pd.DataFrame:
    """One row a line: multiply-adds per candidate, as a share of the plain ones too, and all metrics with intervals.

    ``results`` come from ``with_distance``; ``real`` are features of reference pictures (none: no KID).
    """
    rows = []
    for line, result in zip(lines, results, strict=True):
        full, spent = (cost.macs(shape, one, line.k, line.N) for one in (NONE, line.schedule))
        row = {"world": shape.name, "method": line.name, "group": line.group, "candidates": line.N, "k": line.k,
               "setting": told(line.schedule), "macs_g": spent / line.N / 1e9, "macs_ratio": spent / full,
               "prompts": len(result["distance"])}
        for name in METRICS:
            row |= _interval(name, result, real).row(name)
        rows.append(row)
    return pd.DataFrame(rows)


def _interval(name: str, result: Mapping[str, Any], real: np.ndarray,
              other: Mapping[str, Any] | None = None) -> metrics.Interval:
    """A metric of one result with its interval over prompts, or its paired difference to another result."""
    if name == "kid":
        if not len(real):
            return metrics.Interval(*(float("nan"),) * 3, 0)
        if other is None:
            return metrics.kid_ci(result["features"], real)
        return metrics.kid_difference_ci(result["features"], other["features"], real)
    if other is None:
        return metrics.bootstrap_ci(result[name])
    return metrics.paired_difference_ci(result[name], other[name])


def competition(shape: cost.Shape, lines: Sequence[Variant], results: Sequence[Mapping[str, Any]],
                real: np.ndarray) -> pd.DataFrame:
    """Who is better on which metric at equal multiply-adds: competitor minus ours over the same prompts and noise.

    Columns: against (ours), method and setting (theirs), macs_ratio of both, metric, ours, value (theirs), difference
    with low and high, and verdict: ours, theirs or undecided (the interval holds 0).
    """
    own = {line.name: (line, result) for line, result in zip(lines, results, strict=True)
           if (line.group, line.N, line.k) == ("technique", 30, 10)}
    rows = []
    for line, result in zip(lines, results, strict=True):
        if not line.group.startswith("against "):
            continue
        name = line.group.removeprefix("against ")
        mine, ours = own[name]
        full = cost.macs(shape, NONE, 10, 30)
        for metric, (_, more) in METRICS.items():
            apart = _interval(metric, result, real, ours)
            sides = apart.low > 0, apart.high < 0
            verdict = "undecided" if not any(sides) else "theirs" if sides[0] == more else "ours"
            rows.append({
                "world": shape.name, "against": name, "method": line.name, "setting": told(line.schedule),
                "macs_ratio_ours": cost.macs(shape, mine.schedule, 10, 30) / full,
                "macs_ratio": cost.macs(shape, line.schedule, 10, 30) / full, "metric": metric,
                "ours": _interval(metric, ours, real).value, "value": _interval(metric, result, real).value,
                "difference": apart.value, "low": apart.low, "high": apart.high, "verdict": verdict})
    return pd.DataFrame(rows)


def by_distance_to_pivot(lines: Sequence[Variant], results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Batch reuse by how many attributes the real candidate shares with the pivot: the more apart, the more is lost?

    Rows (method, apart, prompts, distance, accuracy_change): means over the prompts that are so far from the pivot.
    """
    base, rows, groups = bases(lines, results), [], ("technique", "reach of reuse", "pivot")
    for line, result in zip(lines, results, strict=True):
        if line.schedule.reuse and (line.N, line.k) == (30, 10) and line.group in groups:
            change = result["attribute_accuracy"] - base[line.N, line.k]["attribute_accuracy"]
            for apart in range(len(ATTRIBUTES) + 1):
                at = result["apart"] == apart
                if at.any():
                    rows.append({"method": line.name, "apart": apart, "prompts": int(at.sum()),
                                 "distance": float(result["distance"][at].mean()),
                                 "accuracy_change": float(np.nanmean(change[at]))})
    return pd.DataFrame(rows)


def kept_promises(lines: Sequence[Variant], results: Sequence[Mapping[str, Any]], timed: pd.DataFrame) -> pd.DataFrame:
    """The paper's two settings: attribute accuracy within 3 points, and seconds within 10 points of multiply-adds.

    Rows (candidates, k, promise, value, low, high, bound, verdict): kept or broken if the whole interval says so.
    """
    base, rows = bases(lines, results), []
    for line, result in zip(lines, results, strict=True):
        if line.name == "cache+skip+reuse" and line.group == "technique":
            found = metrics.paired_difference_ci(result["attribute_accuracy"],
                                                 base[line.N, line.k]["attribute_accuracy"])
            rows.append({"candidates": line.N, "k": line.k, "promise": "attribute accuracy", **found.row(),
                         "bound": -0.03, "verdict": _verdict(found.low + 0.03, found.high + 0.03)})
    for one in timed.to_dict("records"):
        bound = one["macs_ratio"] + 0.10
        rows.append({"candidates": one["candidates"], "k": one["k"], "promise": "seconds", "value": one["ratio"],
                     "low": one["low"], "high": one["high"], "bound": bound,
                     "verdict": _verdict(bound - one["high"], bound - one["low"])})
    return pd.DataFrame(rows)


def _verdict(low: float, high: float) -> str:
    """Of a quantity that should not be negative."""
    return "kept" if low >= 0 else "broken" if high < 0 else "undecided"


# ---------------------------------------------------------------------------------------------- trajectories


@dataclass(frozen=True)
class Trajectory:
    """The ``number``-th prompt of a set, its real candidate and the one farthest from it, through all T steps."""

    world: str
    prompts: str
    number: int
    seed: int


def trajectory(cell: Trajectory) -> dict[str, Any]:
    """What the cloud's attention and mid block do from step to step, of two candidates from one noise.

    cross, mid (T - 1): relative change |x_t - x_(t-1)| / |x_t| of the cross-attention maps (mean over layers) and of
    the mid block's output; heat (steps SHOWN, 2, words, h, w): cross-attention to single words, at the finest layers;
    plain and centred (SHOWN, 2, COMPONENTS, h w): leading left singular vectors of the mean self-attention map there,
    as it is and with the mean over places taken off; pictures (2, 3, H, W); the two texts; words, what heat is of (an
    attribute by its name, since its value differs).
    """
    world = loaded(cell.world)
    case = cases(world, cell.prompts, cell.number + 1, cell.seed)[-1]
    far = max(range(len(case.candidates)), key=lambda i: (case.apart(i), -i))
    pair = case.index, far
    texts = tuple(case.candidates[i] for i in pair)
    places = [_positions(world, text, case.values[i]) for text, i in zip(texts, pair, strict=True)]
    shown = [step for step in SHOWN if step < world.T]
    rows: dict[str, list[Any]] = {name: [] for name in ("cross", "mid", "heat", "plain", "centred")}
    before: dict[str, torch.Tensor] = {}

    with watched(world.cloud, len(pair), shown) as seen:
        def look(step: int, _: torch.Tensor) -> None:
            now = {name: value for name, value in seen.items() if not name.endswith("attn1")}
            if before:
                moved = {name: _moved(value, before[name]) for name, value in now.items()}
                cross = [value for name, value in moved.items() if name.endswith("attn2")]
                rows["cross"].append(torch.stack(cross).mean(0).mean())
                rows["mid"].append(moved["mid"].mean())
            before.update(now)
            if step in shown:
                rows["heat"].append(_heat(now, places, world.shape))
                both = _components(seen)
                rows["plain"].append(both[0])
                rows["centred"].append(both[1])
            seen.clear()

        offer = Offer(texts, case.seed, Split(T=world.T, k=world.T))
        handed = run(world, offer, on_step=look)
    found = {name: torch.stack(value).cpu().numpy() for name, value in rows.items()}
    return found | {"pictures": decode(world, handed.latents).cpu(), "texts": list(texts),
                    "words": [name if name in ATTRIBUTES else case.values[case.index].get(name, "") for name in WORDS]}


@contextmanager
def watched(unet: torch.nn.Module, candidates: int, shown: Sequence[int]) -> Iterator[dict[str, torch.Tensor]]:
    """Note, at every U-Net call, the conditional rows' cross-attention maps and mid block; self-attention if shown."""
    seen: dict[str, torch.Tensor] = {}
    calls = [-1]

    def call(*_: Any) -> None:
        calls[0] += 1

    def attention(name: str) -> Callable[..., None]:
        def note(module: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = (args[0] if args else kwargs["hidden_states"])[-candidates:]
            text = kwargs.get("encoder_hidden_states")
            if text is None and calls[0] not in shown:
                return
            text = hidden if text is None else text[-candidates:]
            query, key = (to(x).unflatten(-1, (module.heads, -1)).transpose(1, 2)
                          for to, x in ((module.to_q, hidden), (module.to_k, text)))
            seen[name] = torch.softmax(query @ key.transpose(-1, -2) * module.scale, dim=-1)
        return note

    def middle(module: torch.nn.Module, args: Any, output: Any) -> None:
        seen["mid"] = (output[0] if isinstance(output, tuple) else output)[-candidates:]

    last = unet.mid_block if getattr(unet, "mid_block", None) is not None else unet.down_blocks[-1]
    with ExitStack() as stack:
        hooks = [unet.register_forward_pre_hook(call), last.register_forward_hook(middle)]
        hooks += [module.register_forward_pre_hook(attention(name), with_kwargs=True)
                  for name, module in unet.named_modules() if isinstance(module, Attention)]
        for hook in hooks:
            stack.callback(hook.remove)
        yield seen


def _moved(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Relative change of each row."""
    norm = lambda x: x.flatten(1).norm(dim=1)  # noqa: E731
    return norm(now - before) / norm(now)


def _finest(seen: Mapping[str, torch.Tensor], kind: str) -> torch.Tensor:
    """The maps of a kind with most places, averaged over heads and layers: (rows, places, keys)."""
    maps = [value for name, value in seen.items() if name.endswith(kind)]
    most = max(one.shape[2] for one in maps)
    return torch.stack([one.mean(1) for one in maps if one.shape[2] == most]).mean(0)


def _heat(now: Mapping[str, torch.Tensor], places: Sequence[Sequence[int]], latent: tuple[int, ...]) -> torch.Tensor:
    maps, side = _finest(now, "attn2"), latent[1:]
    side = side if side[0] * side[1] == maps.shape[1] else (int(maps.shape[1] ** 0.5),) * 2
    return torch.stack([one[:, list(at)].T.reshape(-1, *side) for one, at in zip(maps, places, strict=True)])


def _components(seen: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading left singular vectors (rows, COMPONENTS, places), as they are and of the centred map."""
    maps = _finest(seen, "attn1")
    found = [torch.linalg.svd(one)[0][..., :COMPONENTS].mT for one in (maps, maps - maps.mean(1, keepdim=True))]
    for one in found:  # a singular vector's sign is arbitrary
        one *= torch.sign(one.sum(-1, keepdim=True) + 1e-12)
    return found[0], found[1]


def _positions(world: worlds.World, text: str, values: Mapping[str, str]) -> list[int]:
    """The token at which each of WORDS' values is read (0, the start, where it is not there)."""
    words = world.tokenizers[0]
    read = [token.removesuffix("</w>") for token in words.convert_ids_to_tokens(words(text).input_ids)]
    wanted = [values.get(name, "").split()[-1:] or [""] for name in WORDS]
    return [next((i for i, token in enumerate(read) if token and token in (value, value.split("-")[0])), 0)
            for (value,) in wanted]


def figure6(results: Sequence[Mapping[str, Any]], world: str) -> pd.DataFrame:
    """Figure 6: rows (world, part, step, value, low, high, n), the relative change from step - 1 to step."""
    return pd.DataFrame([{"world": world, "part": part, "step": step, **asdict(metrics.bootstrap_ci(values))}
                         for part, name in (("cross-attention", "cross"), ("mid-block", "mid"))
                         for step, values in enumerate(np.stack([result[name] for result in results]).T, 1)])


def figure9(results: Sequence[Mapping[str, Any]], world: str) -> pd.DataFrame:
    """Figure 9: how much of the leading subspace of self-attention two candidates share, and two strangers.

    |U_a^T U_b|^2 / c for c = COMPONENTS, 1 for equal subspaces. ``subspace_similarity``: two candidates of one prompt;
    ``..., other prompt``: real candidates of two prompts with their own noise, what one would see without any relation;
    ``..., centred``: the mean taken off first, since every map shares its constant component.
    """
    rows = []
    for kind, suffix in (("plain", ""), ("centred", ", centred")):
        maps = np.stack([result[kind] for result in results])  # (prompts, steps, 2, c, places)
        pairs = {"subspace_similarity": (maps[:, :, 0], maps[:, :, 1]),
                 "subspace_similarity, other prompt": (maps[:, :, 0], np.roll(maps[:, :, 0], 1, axis=0))}
        for name, (a, b) in pairs.items():
            alike = (np.einsum("pscx,psdx->pscd", a, b) ** 2).sum((-1, -2)) / maps.shape[-2]
            rows += [{"world": world, "metric": name + suffix, "step": step, **asdict(metrics.bootstrap_ci(values))}
                     for step, values in zip(SHOWN, alike.T, strict=False)]
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------------------- seconds


@dataclass(frozen=True)
class Timing:
    """Seconds on N candidates; ``threads`` is part of the cell, since they depend on it."""

    world: str
    N: int
    repeats: int
    threads: int
    seed: int = 0


def whole_runs(cell: Timing) -> dict[str, Any]:
    """Seconds (repeats, k) of every step of the cloud: without acceleration and with the paper's two settings.

    One warm process; the three runs take turns, so that whatever else the machine does meets all of them.
    """
    world = loaded(cell.world)
    case = cases(world, SETS[cell.N], 1, cell.seed)[0]
    offers = {name: Offer(case.candidates, case.seed, Split(T=world.T, k=k), schedule)
              for name, k, schedule in (("none", 10, None), ("k10", 10, PAPER_K10), ("k5", 5, PAPER_K5))}
    run(world, replace(offers["none"], split=Split(T=world.T, k=1)))
    found: dict[str, list[Any]] = {name: [] for name in offers}
    for _ in range(cell.repeats):
        for name, offer in offers.items():
            clock: list[float] = []
            begin = now(world)
            run(world, offer, on_step=lambda i, x, clock=clock: clock.append(now(world)))
            found[name].append(np.diff([begin, *clock]))
    return {name: np.array(value) for name, value in found.items()}


def seconds_table(shape: cost.Shape, timings: Sequence[Timing], results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows (world, candidates, k, r, s, plain_s, seconds, ratio, low, high, macs_ratio, apart): measured and predicted.

    ratio: median over repeats of accelerated / plain seconds, low and high its extremes; apart: ratio - macs_ratio.
    """
    rows = []
    for cell, result in zip(timings, results, strict=True):
        for k, schedule in PAPER.items():
            plain, fast = result["none"][:, :k].sum(1), result[f"k{k}"].sum(1)
            ratios = fast / plain
            predicted = cost.macs(shape, schedule, k, cell.N) / cost.macs(shape, NONE, k, cell.N)
            rows.append({"world": shape.name, "candidates": cell.N, "k": k, "r": schedule.r, "s": schedule.s,
                         "threads": cell.threads, "repeats": cell.repeats, "plain_s": float(np.median(plain)),
                         "seconds": float(np.median(fast)), "ratio": float(np.median(ratios)),
                         "low": float(ratios.min()), "high": float(ratios.max()), "macs_ratio": predicted,
                         "apart": float(np.median(ratios)) - predicted})
    return pd.DataFrame(rows)


def single_steps(cell: Timing) -> dict[str, Any]:
    """Seconds of one step with each technique on, as a ratio to a plain step of the same round (lists, as STEPS)."""
    world = loaded(cell.world)
    unet, text = world.cloud, worlds.condition(world, "cloud", cases(world, SETS[cell.N], 1, cell.seed)[0].candidates)
    z = torch.randn(cell.N, *world.shape, generator=torch.Generator("cpu").manual_seed(cell.seed))
    z = (torch.cat([z, z]) if text.guided else z).to(world.torch_device, world.dtype)
    t, words = torch.tensor(500, device=world.torch_device), text[slice(None)]

    def step(at: Any, i: int) -> None:
        with at(i):
            unet(z, t, **words)

    with torch.no_grad(), ExitStack() as stack:
        runs = {}
        for name, schedule in steps_of(shape_of(world)).items():
            at = stack.enter_context(schedule.applied(unet, candidates=cell.N, guided=text.guided))
            step(at, 0)
            runs[name] = partial(step, at, 1)
        rows = cost.seconds(runs, cell.repeats, warm=0)
    return {key: [row[key] for row in rows] for key in ("name", "seconds", "ratio", "ratio_low", "ratio_high")}


def steps_table(shape: cost.Shape, timings: Sequence[Timing], results: Sequence[Mapping[str, Any]],
                others: Sequence[cost.Shape] = ()) -> pd.DataFrame:
    """Which technique helps at which N: share of a plain step's multiply-adds, and of its seconds where measured.

    Rows (world, technique, candidates, what, ratio, low, high), ``what`` one of multiply-adds and seconds.
    """
    rows = []
    for one in (shape, *others):
        for cell in timings:
            for name, schedule in steps_of(one).items():
                ratio = cost.step_macs(one, schedule, 1, cell.N) / cost.step_macs(one, NONE, 1, cell.N)
                rows.append({"world": one.name, "technique": name, "candidates": cell.N, "what": "multiply-adds",
                             "ratio": ratio, "low": ratio, "high": ratio})
    for cell, result in zip(timings, results, strict=True):
        for i, name in enumerate(result["name"]):
            rows.append({"world": shape.name, "technique": name, "candidates": cell.N, "what": "seconds",
                         "ratio": result["ratio"][i], "low": result["ratio_low"][i], "high": result["ratio_high"][i]})
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------------------- bytes


@dataclass(frozen=True)
class Memory:
    """Bytes of two steps on N candidates: a plain one, and one with ``technique`` on."""

    world: str
    N: int
    technique: str


def memory(cell: Memory) -> dict[str, Any]:
    """kept and peak bytes, measured while the steps run, and what shapes alone predict for both."""
    world = loaded(cell.world)
    unet, schedule = world.cloud, STEPS[cell.technique]
    text = worlds.condition(world, "cloud", cases(world, SETS[cell.N], 1)[0].candidates)
    z = torch.zeros((2 if text.guided else 1) * cell.N, *world.shape, dtype=world.dtype, device=world.torch_device)
    t, words, kept = torch.tensor(500, device=world.torch_device), text[slice(None)], []

    def steps() -> None:
        with torch.no_grad(), schedule.applied(unet, candidates=cell.N, guided=text.guided) as at:
            for step in (0, 1):
                with at(step):
                    unet(z, t, **words)
            kept.append(at.bytes())

    peak = cost.peak_bytes(steps)
    shape = shape_of(world)
    predicted = cost.kept_bytes(shape, schedule, cell.N, guided=text.guided, itemsize=world.dtype.itemsize)
    return {"kept": kept[0], "peak": peak, "kept_predicted": sum(predicted.values()),
            "peak_predicted": cell.N * call_bytes(unet, world.shape, text.guided) + sum(predicted.values())}


def memory_table(timed: Sequence[Memory], results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows (candidates, technique, and megabytes: kept and peak, predicted and measured)."""
    columns = ("kept_predicted", "kept", "peak_predicted", "peak")
    return pd.DataFrame([{"candidates": cell.N, "technique": cell.technique,
                          **{f"{name}_mb": result[name] / 1e6 for name in columns}}
                         for cell, result in zip(timed, results, strict=True)])


# ---------------------------------------------------------------------------------------------- the paper's tables


def figure12() -> pd.DataFrame:
    """Figure 12 from the shape of SD-v1.4: cost.figure_12 with the name of its world."""
    return pd.DataFrame(cost.figure_12()).assign(world="sd14")


def table7(flops: pd.DataFrame) -> pd.DataFrame:
    """Table 7's operations in the columns of data/paper/tables.csv, by the paper's rule and in full."""
    rows = flops[flops.artefact == "Table 7"].rename(columns={"ours_paper_rule": "tflops", "full": "full_tmacs"})
    keys = ["world", "method", "k", "candidates"]
    return rows.melt(keys, ["tflops", "full_tmacs"], "metric", "value")[[*keys, "metric", "value"]]


# ---------------------------------------------------------------------------------------------- try it


@dataclass(frozen=True)
class Attempt:
    """Pictures (2, 3, H, W), exact and under a schedule, and the bill."""

    pictures: torch.Tensor
    bill: pd.DataFrame


def attempt(world: str, text: str, schedule: Schedule, k: int = 10, seed: int = 0) -> Attempt:
    """One prompt under any schedule: what it draws, and what the cloud pays for all its candidates."""
    here, case, images = loaded(world), request(text, seed), []
    for one in (NONE, schedule):
        offer, secret = few(case, Split(T=here.T, k=k), one)
        images.append(decode(here, finish(here, offer, run(here, offer), secret)))
    shape, N = shape_of(here), len(case.candidates)
    plain = cost.macs(shape, NONE, k, N)
    kept = sum(cost.kept_bytes(shape, schedule, N, itemsize=here.dtype.itemsize).values())
    bill = pd.DataFrame([
        ("candidates", N), ("multiply-adds without acceleration, 10^9", plain / 1e9),
        ("multiply-adds, 10^9", cost.macs(shape, schedule, k, N) / 1e9),
        ("share of the work left", cost.macs(shape, schedule, k, N) / plain),
        ("kept from step to step, 10^6 bytes", kept / 1e6)], columns=["what", "value"])
    return Attempt(torch.cat(images).cpu(), bill)


def untouched(world: str, k: int = 4) -> dict[str, bool]:
    """What must hold of every acceleration, tried on this world's cloud: two candidates, k steps."""
    here = loaded(world)
    case = cases(here, "n2", 1)[0]
    offer = Offer(case.candidates, case.seed, Split(T=here.T, k=k))
    state = {name: value.clone() for name, value in here.cloud.state_dict().items()}
    plain = run(here, offer).latents
    never = run(here, replace(offer, acceleration=Schedule.points(k, k, k))).latents
    on = run(here, replace(offer, acceleration=Schedule.points(k, 2, 3))).latents
    after = run(here, offer).latents
    return {"with all points at k the latents are the same, bit for bit": torch.equal(plain, never),
            "with points before k they differ": not torch.equal(plain, on),
            "afterwards the plain run gives what it gave before": torch.equal(plain, after),
            "afterwards the weights are the same": all(torch.equal(value, state[name])
                                                       for name, value in here.cloud.state_dict().items()),
            "afterwards no module has a hook": not any(
                hasattr(module, "_diffusers_hook") or "forward" in vars(module) for module in here.cloud.modules())}


# ---------------------------------------------------------------------------------------------- what the tables say


def sweeps(table: pd.DataFrame) -> pd.DataFrame:
    """The lines that change one of r, s, refresh, in order, each with the paper's own point among them."""
    main = table[(table.candidates == 30) & (table.k == 10)]
    paper = main[main.method == "cache+skip+reuse"]
    found = []
    for group, point in (("r", "r = 4"), ("s", "s = 6"), ("refresh", "refresh every 5")):
        part = pd.concat([main[main.group == group], paper.assign(method=point, group=group)])
        value = part.method.str.split().str[-1]
        order = value.replace("never", "1000").astype(int)
        found.append(part.assign(setting_value=value, order=order).sort_values("order").drop(columns="order"))
    return pd.concat([part for part in found if len(part) > 1], ignore_index=True)


def tell_steps(table: pd.DataFrame) -> str:
    """Figure 6 in sentences."""
    said = []
    for part, rows in table.groupby("part", sort=False):
        early, late = rows[rows.step <= 3].value.mean(), rows[rows.step > 3].value.mean()
        said.append(f"{part}: {early:.3f} a step in steps 1 to 3, {late:.3f} after: "
                    f"{early / late:.1f} times as much early")
    return "\n".join(said)


def tell_likeness(table: pd.DataFrame) -> str:
    """Figure 9 in sentences."""
    mean = table.groupby("metric").value.mean()
    said = []
    for name, told_as in (("", "as it is"), (", centred", "with the mean taken off")):
        two = mean["subspace_similarity" + name]
        strangers = mean["subspace_similarity, other prompt" + name]
        said.append(f"the map {told_as}: two candidates share {two:.2f} of the leading subspace, two strangers "
                    f"{strangers:.2f}: the candidates' own likeness is {two - strangers:+.2f}")
    return "\n".join(said)


def tell_flops(flops: pd.DataFrame) -> str:
    """How many printed counts follow from shapes, and why the others do not."""
    off = flops[flops.note.fillna("") != ""]
    said = [f"{len(flops) - len(off)} of {len(flops)} printed counts of operations follow from shapes within 1 %"]
    said += [f"{len(rows)} differ ({', '.join(sorted(set(rows.artefact)))}): {note}"
             for note, rows in off.groupby("note", sort=False)]
    return "\n".join(said)


def tell_fronts(table: pd.DataFrame, front: Callable[..., np.ndarray]) -> str:
    """Which lines are on the Pareto front of each metric; ``front`` as in obclip_core.figures."""
    said = []
    for name, (label, more) in METRICS.items():
        if table[name].notna().all():
            best = table[front(table.macs_ratio, -table[name] if more else table[name])].sort_values("macs_ratio")
            said.append(f"{label}: " + ", ".join(f"{row.method} ({row.macs_ratio:.0%})" for row in best.itertuples()))
    return "\n".join(said)


def tell_sweeps(table: pd.DataFrame) -> str:
    """What each setting buys and costs from its first to its last value."""
    said = []
    for group, rows in table.groupby("group", sort=False):
        first, last = rows.iloc[0], rows.iloc[-1]
        said.append(f"{group} from {first.setting_value} to {last.setting_value}: work left {first.macs_ratio:.0%} to "
                    f"{last.macs_ratio:.0%}, distance {first.distance:.4f} to {last.distance:.4f}; nearest picture at "
                    f"{rows.loc[rows.distance.idxmin(), 'setting_value']}")
    return "\n".join(said)


def tell_reuse(table: pd.DataFrame, by_pivot: pd.DataFrame) -> str:
    """Batch reuse before r against throughout, the pivot's choice, and the distance to the pivot."""
    main = table[(table.candidates == 30) & (table.k == 10)].set_index("method")
    said = [f"{name}: {main.macs_ratio[name]:.0%} of the work, distance {main.distance[name]:.4f}, attribute accuracy "
            f"{main.attribute_accuracy[name]:.2f}" for name in main.index if "reuse" in name or "pivot" in name]
    for name, rows in by_pivot.groupby("method", sort=False):
        near, far = rows.iloc[0], rows.iloc[-1]
        if far.apart > near.apart:
            said.append(f"{name}: distance {near.distance:.4f} where the real candidate differs from the pivot in "
                        f"{near.apart} attributes, {far.distance:.4f} where in {far.apart}")
    return "\n".join(said)


def tell_candidates(table: pd.DataFrame) -> str:
    """Which techniques help at the fewest and at the most candidates."""
    said = []
    for N in sorted(set(table.candidates))[:: max(1, table.candidates.nunique() - 1)]:
        for (world, what), rows in table[(table.candidates == N)].groupby(["world", "what"], sort=False):
            rows = rows[rows.technique != "none"].sort_values("ratio")
            helps = [f"{row.technique} {row.ratio:.0%}" for row in rows.itertuples() if row.high < 1]
            said.append(f"N = {N}, {world}, {what} of a plain step: {', '.join(helps) or 'none helps'}")
    return "\n".join(said)


def tell_seconds(table: pd.DataFrame) -> str:
    """Measured beside predicted."""
    return "\n".join(
        f"N = {row.candidates}, k = {row.k}: {row.macs_ratio:.0%} of the multiply-adds, {row.ratio:.0%} of the seconds "
        f"[{row.low:.0%}, {row.high:.0%}]: {abs(row.apart):.0%} {'less' if row.apart > 0 else 'more'} saved than "
        "predicted"
        for row in table.itertuples())


def tell_competition(table: pd.DataFrame) -> str:
    """Who is better on which metric."""
    said = []
    for against, rows in table.groupby("against", sort=False):
        said.append(f"against {against} ({rows.macs_ratio_ours.iloc[0]:.0%} of the work):")
        for method, part in rows.groupby("method", sort=False):
            verdicts = {who: [METRICS[name][0] for name in part[part.verdict == who].metric]
                        for who in ("theirs", "ours", "undecided")}
            said.append(f"  {method} ({part.macs_ratio.iloc[0]:.0%}): " + "; ".join(
                f"{who if who == 'undecided' else who + ' better'} on {', '.join(names)}"
                for who, names in verdicts.items() if names))
    return "\n".join(said)


def tell_promises(table: pd.DataFrame) -> str:
    """How many of the promises are kept, and which are not."""
    said = [f"{(table.verdict == 'kept').sum()} of {len(table)} kept"]
    said += [f"{row.verdict}: {row.promise} at N = {row.candidates}, k = {row.k}: {row.value:.3f} "
             f"[{row.low:.3f}, {row.high:.3f}], bound {row.bound:.3f}"
             for row in table.itertuples() if row.verdict != "kept"]
    return "\n".join(said)


# ---------------------------------------------------------------------------------------------- by command

def main(arguments: Sequence[str] | None = None) -> int:
    """Seconds beside multiply-adds, of a world or of a U-Net of the paper with random weights, wherever it runs."""
    parser = argparse.ArgumentParser(prog="python -m obclip_core.experiments.cache_ablations", description=main.__doc__)
    parser.add_argument("model", help="a world of data/worlds, or a U-Net of data/paper/unets (meant for a GPU)")
    parser.add_argument("-N", type=int, nargs="+", choices=SETS, default=list(SETS), help="numbers of candidates")
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args(arguments)
    world = chosen.model if chosen.model in worlds.names() else UNTRAINED + chosen.model
    try:
        shape = shape_of(loaded(world))
        for N in chosen.N:
            timing = Timing(world, N, chosen.repeats, torch.get_num_threads())
            print(tell_seconds(seconds_table(shape, [timing], [whole_runs(timing)])), flush=True)
    except ValueError as error:
        print(f"obclip: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
