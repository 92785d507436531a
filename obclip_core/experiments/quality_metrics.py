"""Notebook 04: the paper's tables of quality on one world, what each metric sees, fairness, and the claims decided.

Four identities, each held by a test, make a table of systems cost little more than its pictures:

- without batch reuse a candidate's latent does not depend on the others: the real one is run alone;
- with it, it depends on the pivot alone: two are run, and the pivot's own is what the caches without reuse give it;
- vanilla generation of all candidates draws what the cloud alone draws; ObCLIP without acceleration is Hybrid SD;
- one walk of T steps passes every switch point k, and many prompts walk in one batch, each with its own noise.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import norm
from scipy.stats import t as student
from torch.nn import functional

from obclip_core import claims, cost, metrics, worlds
from obclip_core.accelerate import NONE, Schedule
from obclip_core.denoise import HandOver, Secret, Split, decode, now, run
from obclip_core.experiments import cache_ablations
from obclip_core.experiments.cache_ablations import PAPER, Case, drawings, few, pictures, portraits, request
from obclip_core.experiments.hybrid_split import loaded, noise, taken, together, walk
from obclip_core.metrics import Interval, bootstrap_ci, paired_difference_ci, proportion_ci
from obclip_core.prompts import ATTRIBUTES, candidate_values, candidates, fill, parse
from obclip_core.provenance import ROOT
from obclip_core.service import wire

__all__ = ["pictures"]  # besides what is defined here

SETS = {1: "general", 2: "n2", 6: "n6", 30: "n30"}
NAMED = {"general": (), "n2": ("gender",), "n6": ("age", "gender"), "n30": ("age", "gender", "ethnicity")}
SCORES = ("clip_score", "attribute_accuracy", "context_accuracy", "perceptual_distance", "ssim")  # one value a picture
VARIANTS = ("obclip", "obclip+cache", "obclip+cache+reuse")
# metric: (what it is, whether more is better)
METRICS = {"kid": ("KID", False), "clip_score": ("CLIP score", True),
           "attribute_accuracy": ("attribute accuracy", True), "context_accuracy": ("context accuracy", True),
           "perceptual_distance": ("distance to the cloud's picture", False), "fid": ("FID", False),
           "inception_score": ("Inception Score", True)}
LEAST = 5  # prompts below which a bootstrap tells nothing
EXTRAPOLATED = 100  # pictures from which on a line over 1 / n tells more than it makes up
BLOCK = 30  # requests over which every combination of values is real equally often


def depends(cell: Any) -> list[str | Path]:
    """What a cell's values depend on: this module and all it imports, the world's weights and prompts."""
    return [__name__, *cache_ablations.depends(cell)[1:]]


# ---------------------------------------------------------------------------------------------- requests and pictures


def caption(world: str, prompts: str, i: int, seed: int = 0) -> tuple[str, dict[str, str]]:
    """Request ``i`` of a prompt set with some values of the attributes, and its context words; the rest is drawn."""
    if prompts not in NAMED:
        raise ValueError(f"{prompts!r} is no prompt set, expected one of {', '.join(NAMED)}")
    file = loaded(world).prompts or ROOT / "data" / "prompts" / "portraits.toml"
    table, rng = tomllib.loads(file.read_text("utf-8")), random.Random(f"quality {seed} {prompts} {i}")
    told = {name: rng.choice(values) for name, values in table["context"].items()}
    some = {name: rng.choice(values) for name, values in ATTRIBUTES.items()}
    return fill(rng.choice(table["templates"][prompts]), told | some), told


@lru_cache(maxsize=16)
def requests(world: str, prompts: str, count: int, seed: int = 0) -> tuple[Case, ...]:
    """The first ``count`` requests of a prompt set (general, n2, n6, n30); the i-th is the same whatever the count.

    Templates and context are drawn at random. Which candidate is real is balanced: over each BLOCK of 30 requests all
    combinations of the named values are real equally often, so that groups are of one size.
    """
    found = []
    for i in range(count):
        text, told = caption(world, prompts, i, seed)
        prompt = parse(text)
        values = candidate_values(prompt)
        N = len(values)
        turns = [j % N for j in range(-(-BLOCK // N) * N)]
        random.Random(f"quality {seed} {prompts} block {i // len(turns)}").shuffle(turns)
        number = 10_000_000 * list(NAMED).index(prompts) + 100_000 * seed + i
        found.append(Case(candidates(prompt), tuple(told | one for one in values), turns[i % len(turns)], number))
    return tuple(found)


@dataclass(frozen=True)
class Batch:
    """``count`` requests of a prompt set from number ``first`` on, drawn by every system at every switch point of ks.

    ``shown`` of their pictures are kept.
    """

    world: str
    prompts: str
    first: int
    count: int
    T: int = 25
    ks: tuple[int, ...] = (10, 5)
    seed: int = 0
    shown: int = 0

    def __post_init__(self) -> None:
        if self.prompts not in NAMED:
            raise ValueError(f"{self.prompts!r} is no prompt set, expected one of {', '.join(NAMED)}")
        if not set(self.ks) <= set(PAPER) or max(self.ks) > self.T:
            raise ValueError(f"ks are {self.ks} of T = {self.T} steps, expected some of {', '.join(map(str, PAPER))}")

    @property
    def methods(self) -> tuple[tuple[str, int], ...]:
        """What is drawn: (method, k), named as in the paper's tables; k is 0 where it does not apply."""
        own = VARIANTS if NAMED[self.prompts] else VARIANTS[:2]  # one candidate has nobody to share a map with
        return (("cloud-only", 0), ("device-only", 0), *((name, k) for name in own for k in self.ks))


def batches(world: str, prompts: str, count: int, *, block: int = BLOCK, shown: int = 0,
            **more: Any) -> tuple[Batch, ...]:
    """All requests of a set in cells of ``block``; the first cell keeps pictures."""
    return tuple(Batch(world, prompts, first, min(block, count - first), shown=shown if first == 0 else 0, **more)
                 for first in range(0, count, block))


def rows(cell: Batch) -> dict[str, int]:
    """How many candidate steps a cell takes, by model: what its time follows from (reuse at most)."""
    per, ks, T = len(cell.methods), cell.ks, cell.T
    reuse = ("obclip+cache+reuse", ks[0]) in cell.methods
    cloud = T + sum(ks) * (1 + 2 * reuse)
    return {"cloud": cell.count * cloud,
            "device": cell.count * (T + sum(T - k for k in ks) * (per - 2) // len(ks))}


def batch(cell: Batch) -> dict[str, Any]:
    """What the judge says of M methods' pictures of B requests: SCORES (M, B), features (M, B, D),
    probabilities (M, B, C), right and found (M, B, 3): whether each attribute is as asked (nan: not asked), and the
    number of the value that was found; pictures (M, shown, 3, H, W), bytes.
    """
    world, T = loaded(cell.world), cell.T
    asked = requests(cell.world, cell.prompts, cell.first + cell.count, cell.seed)[cell.first:]
    texts, seeds = [case.candidates[case.index] for case in asked], [case.seed for case in asked]
    start = noise(world, "cloud", T, seeds)
    plain = walk(world, "cloud", texts, seeds, start, [*cell.ks, T])

    def join(given: HandOver) -> torch.Tensor:
        return walk(world, "device", texts, seeds, taken(world, "device", given), [T])[T].latents

    latents = {("cloud-only", 0): plain[T].latents, ("device-only", 0): join(noise(world, "device", T, seeds))}
    for k in cell.ks:
        cached = walk(world, "cloud", texts, seeds, start, [k], replace(PAPER[k], reuse=()))[k]
        latents["obclip", k], latents["obclip+cache", k] = join(plain[k]), join(cached)
        if ("obclip+cache+reuse", k) in cell.methods:
            latents["obclip+cache+reuse", k] = join(together([
                cached.pick(Secret(i)) if case.index == PAPER[k].pivot else pair(world, case, Split(T, k), PAPER[k])
                for i, case in enumerate(asked)]))
    found = [judged(world, latents[method], asked, latents["cloud-only", 0], cell.shown) for method in cell.methods]
    return {name: np.stack([one[name] for one in found]) for name in found[0]}


def pair(world: worlds.World, case: Case, split: Split, schedule: Schedule) -> HandOver:
    """The real candidate's hand-over under batch reuse, from a call on it and the pivot alone."""
    offer, secret = few(case, split, schedule)
    return run(world, offer).pick(secret)


def judged(world: worlds.World, latents: torch.Tensor, asked: Sequence[Case], clouds: torch.Tensor,
           shown: int) -> dict[str, np.ndarray]:
    """The judge on one method's pictures; see ``batch``. ``clouds`` are the cloud's own latents of these requests."""
    judge, images, theirs = metrics.scorer(world), decode(world, latents), decode(world, clouds)
    truth = [case.values[case.index] for case in asked]
    heads, nothing = judge.heads(images), np.full(len(asked), np.nan)
    right = metrics.correct(heads, judge.values, truth)
    return {
        **judge.judge(images, [case.candidates[case.index] for case in asked], truth),
        "perceptual_distance": metrics.perceptual_distance(judge, images, theirs),
        "ssim": metrics.ssim(images, theirs),
        "right": np.stack([right.get(name, nothing) for name in ATTRIBUTES], -1),
        "found": np.stack([heads[name].argmax(-1).numpy() if name in heads else nothing for name in ATTRIBUTES], -1),
        "pictures": (images[:shown] * 255).round().to(torch.uint8).cpu().numpy(),
    }


def gathered(results: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The arrays of all cells of one set, requests side by side; pictures are those of the first."""
    whole = {name: np.concatenate([one[name] for one in results], axis=1) for name in results[0] if name != "pictures"}
    return whole | {"pictures": results[0]["pictures"]}


# ---------------------------------------------------------------------------------------------- the paper's tables


def expanded(n: int, level: float = 0.95) -> float:
    """The level at which a percentile bootstrap over n prompts covers about ``level`` (Hesterberg, 2015).

    With few prompts the plain interval is too narrow: it divides by n, not n - 1, and takes normal quantiles.
    """
    return float(1 - 2 * norm.cdf(-(n / (n - 1)) ** 0.5 * student.ppf((1 + level) / 2, n - 1)))


def surely(ci: Callable[..., Interval], *values: Any) -> Interval:
    """An interval of ``ci`` over the rows of ``values``, expanded for few prompts; below LEAST there is none."""
    n = len(values[0])
    one = ci(*values, level=expanded(max(n, 2)))
    return one if one.n >= LEAST else replace(one, low=np.nan, high=np.nan)


def interval(whole: Mapping[str, np.ndarray], metric: str, i: int, j: int | None, real: np.ndarray) -> Interval:
    """A metric of method i over requests, or its paired difference to method j."""
    if metric == "kid":
        features = whole["features"]
        return (surely(metrics.kid_ci, features[i], real) if j is None
                else surely(metrics.kid_difference_ci, features[i], features[j], real))
    if metric == "inception_score":
        return surely(metrics.inception_score_ci, whole["probabilities"][i])
    if j is None:
        return surely(bootstrap_ci, whole[metric][i])
    return surely(paired_difference_ci, whole[metric][i], whole[metric][j])


def quality_table(cells: Sequence[Batch], results: Sequence[Mapping[str, Any]], real: np.ndarray) -> pd.DataFrame:
    """One set's rows of Tables 2, 3, 6 in long form, the derived methods and all paired differences among them.

    Columns world, method, k, candidates, metric, value, low, high, n, note, against, against_k. A row with ``against``
    is the difference to that method at the same k (or to one without k), one with ``against_k`` to that k.
    """
    cell, whole = cells[0], gathered(results)
    methods, n = list(cell.methods), sum(one.count for one in cells)
    N = len(requests(cell.world, cell.prompts, 1, cell.seed)[0].candidates)
    scores = [name for name in SCORES if not np.isnan(whole[name]).all()]
    found: list[dict[str, Any]] = []

    def add(method: tuple[str, int], metric: str, one: Interval | float, note: str = "", **against: Any) -> None:
        ends = one.row() if isinstance(one, Interval) else {"value": one}
        found.append({"world": cell.world, "method": method[0], "k": method[1] or np.nan, "candidates": N,
                      "metric": metric, **ends, "n": n, "note": note, **against})

    for i, method in enumerate(methods):
        features = whole["features"][i]
        for metric in ("kid", *scores, "inception_score"):
            add(method, metric, interval(whole, metric, i, None, real))
        add(method, "fid", metrics.fid(features, real), metrics.fid_note(n, features.shape[1]))
        if min(n, len(real)) >= EXTRAPOLATED:
            add(method, "fid_infinity", metrics.fid_infinity(features, real).value, "extrapolated over 1 / n")
        others = [other for other in (("cloud-only", 0), ("device-only", 0), ("obclip", method[1])) if method[1]]
        for other in others:
            if other != method:
                for metric in ("kid", *scores):
                    add(method, metric, interval(whole, metric, i, methods.index(other), real), against=other[0])
        for k in cell.ks if method[1] else ():
            if k < method[1]:
                for metric in ("kid", *scores):
                    j = methods.index((method[0], k))
                    add(method, metric, interval(whole, metric, i, j, real), against_k=k)
    for metric in ("kid", *scores):
        add(methods[1], metric, interval(whole, metric, 1, 0, real), against="cloud-only")
    table = pd.DataFrame(found)
    for name in ("against", "against_k"):
        table[name] = table.get(name)
    return derived(table, N)


def derived(table: pd.DataFrame, N: int) -> pd.DataFrame:
    """The table with the methods that draw another's picture: vanilla-og the cloud's, hybrid-sd unaccelerated ObCLIP's.

    With one candidate these are the same system, and are left out, as the paper does.
    """
    if N == 1:
        return table
    single = table[table.against.isna() & table.against_k.isna()]
    more = [single[single.method == own].assign(method=name, note="same picture as " + own)
            for name, own in (("vanilla-og", "cloud-only"), ("hybrid-sd", "obclip"))]
    return pd.concat([table, *more], ignore_index=True)


@lru_cache(maxsize=4)
def shapes_of(world: worlds.World) -> dict[str, cost.Shape]:
    """The shapes of both sides' U-Nets."""
    return {side: cache_ablations.shape_of(replace(world, cloud=world.unet(side))) for side in worlds.SIDES}


def work(world: worlds.World, N: int, method: str, k: int, T: int) -> tuple[int, int]:
    """(cloud's, device's) multiply-adds of one picture, both branches of guidance."""
    shapes = shapes_of(world)
    guided = {side: worlds.guided(world, side) for side in worlds.SIDES}
    steps, count, schedule = {
        "cloud-only": (T, 1, NONE), "vanilla-og": (T, N, NONE), "device-only": (0, 1, NONE), "hybrid-sd": (k, 1, NONE),
        "obclip": (k, N, NONE), "obclip+cache": (k, N, replace(PAPER.get(k, NONE), reuse=())),
        "obclip+cache+reuse": (k, N, PAPER.get(k, NONE)),
    }[method]
    cloud = cost.macs(shapes["cloud"], schedule, steps, count, guided=guided["cloud"])
    device = 0 if method in ("cloud-only", "vanilla-og") else T - steps
    return cloud, cost.macs(shapes["device"], NONE, device, 1, guided=guided["device"])


def cost_rows(table: pd.DataFrame, world: worlds.World, T: int, one_column: bool = False) -> pd.DataFrame:
    """Rows cloud_tflops and device_tflops (10^12 multiply-adds, from shapes) for every method, k and N of the table.

    ``one_column`` gives what Tables 3 and 4 print instead: tflops, the cloud's, or the device's where it works alone.
    """
    found = []
    keys = table.loc[table.against.isna() & table.against_k.isna(), ["world", "method", "k", "candidates"]]
    for key in keys.drop_duplicates().to_dict("records"):
        k = int(key["k"]) if pd.notna(key["k"]) else 0
        cloud, device = work(world, int(key["candidates"]), key["method"], k, T)
        both = {"tflops": cloud or device} if one_column else {"cloud_tflops": cloud, "device_tflops": device}
        found += [key | {"metric": metric, "value": value / 1e12, "note": "from shapes"}
                  for metric, value in both.items()]
    return pd.DataFrame(found)


def table4(n30: pd.DataFrame, lcm: pd.DataFrame, world: worlds.World, T: int) -> pd.DataFrame:
    """Table 4: the world's own pair over one candidate, and its step-distilled cloud.

    The upper part are Table 6's rows without reuse, whose pictures do not depend on the number of candidates; the lower
    part is what notebook 02 measured at every shift.
    """
    own = n30[n30.method.isin(["cloud-only", "device-only", *VARIANTS[:2]])
              & ~n30.metric.isin(["cloud_tflops", "device_tflops"]) & ~n30.metric.str.endswith("_s")]
    own = own.assign(candidates=1)
    return pd.concat([own, cost_rows(own, world, T, one_column=True), lcm], ignore_index=True)


def wide(table: pd.DataFrame, metrics_: Sequence[str] = tuple(METRICS)) -> pd.DataFrame:
    """Values without intervals, a row a method, for reading."""
    single = table[table.against.isna()]
    single = single[single.against_k.isna()] if "against_k" in single else single
    single = single[single.metric.isin(metrics_)].assign(k=single.k.fillna(0).astype(int))
    keys = ["world", "candidates", "method", "k"]
    keys = [key for key in keys if key in ("method", "k") or single[key].nunique() > 1]
    shown = single.pivot_table(index=keys, columns="metric", values="value", sort=False)
    return shown[[name for name in metrics_ if name in shown]].round(4)


# ---------------------------------------------------------------------------------------------- which metric to believe


@dataclass(frozen=True)
class Faults:
    """``count`` good pictures of a world, with their captions, and what is done to them to see which metric notices."""

    world: str
    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 8 or self.count % 4:
            raise ValueError(f"count is {self.count}, expected a multiple of 4 from 8 up: one fault keeps every fourth")


FAULTS = {"intact": "nothing", "soft": "each pixel averaged with its neighbours", "noisy": "5 % of white noise",
          "swapped": "each picture gets the next one's caption", "few": "a quarter of the pictures, each four times",
          "grey": "no colour"}


def faulty(images: torch.Tensor, fault: str) -> torch.Tensor:
    """The pictures (B, 3, H, W) with one of FAULTS; ``swapped`` rolls the pictures, the captions stay."""
    if fault == "soft":
        return functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    if fault == "noisy":
        grain = torch.randn(images.shape, generator=torch.Generator("cpu").manual_seed(0))
        return (images + 0.05 * grain).clamp(0, 1)
    if fault == "grey":
        return images.mean(1, keepdim=True).expand_as(images)
    if fault == "swapped":
        return images.roll(1, dims=0)
    if fault == "few":
        return images[repeated(len(images))]
    return images


def repeated(count: int) -> torch.Tensor:
    """0 0 0 0 4 4 4 4 ..: the pictures that are left of ``count``, a multiple of 4."""
    return torch.arange(count) // 4 * 4


def good(world: str, count: int, seed: int = 0) -> tuple[torch.Tensor, list[str], list[Mapping[str, str]]]:
    """Good pictures (count, 3, H, W), their captions and values: new drawings in `portraits`, else the cloud's own."""
    if world != "portraits":
        here, asked = loaded(world), requests(world, "n30", count, seed)
        texts, seeds = [case.candidates[case.index] for case in asked], [case.seed for case in asked]
        ends = walk(here, "cloud", texts, seeds, noise(here, "cloud", here.T, seeds), [here.T])[here.T].latents
        return decode(here, ends).cpu(), texts, [case.values[case.index] for case in asked]
    own = portraits()
    first = own.FIRST_SEED["reference"] + 1_000_000 * (seed + 1)  # other drawings than those that KID compares with
    numbers = range(first, first + count)
    truth = [own.record(number) for number in numbers]
    texts = [fill(random.Random(f"caption {number}").choice(own.PROMPTS["templates"]["n30"]), values)
             for values, number in zip(truth, numbers, strict=True)]
    return drawings(numbers), texts, truth


def faults(cell: Faults) -> dict[str, Any]:
    """Scores of the good pictures under each of FAULTS (F, B), features (F, B, D), probabilities (F, B, C), and three
    pictures of each (F, 3, 3, H, W), bytes."""
    judge = metrics.scorer(loaded(cell.world))
    images, texts, truth = good(cell.world, cell.count, cell.seed)
    found = []
    for fault in FAULTS:
        spoiled = faulty(images, fault)
        at = repeated(len(images)) if fault == "few" else torch.arange(len(images))  # a copy has its own caption
        found.append(judge.judge(spoiled, [texts[i] for i in at], [truth[i] for i in at])
                     | {"pictures": (spoiled[:3] * 255).round().to(torch.uint8).numpy()})
    return {name: np.stack([one[name] for one in found]) for name in found[0]}


def faults_table(result: Mapping[str, Any], real: np.ndarray) -> pd.DataFrame:
    """A row a fault and metric: value, low, high, worse (the paired change towards worse, with its interval), notices.

    ``notices`` is yes where the interval of the change leaves out 0 on the worse side, `wrongly better` on the other.
    FID has no interval here, the Inception Score none of its change: there the two intervals must not overlap.
    """
    found = []
    for metric in ("kid", "inception_score", "clip_score", "attribute_accuracy"):
        sign, before = (1 if METRICS[metric][1] else -1), interval(result, metric, 0, None, real)
        for i, fault in enumerate(FAULTS):
            one = interval(result, metric, i, None, real)
            if metric == "inception_score":
                low, high = one.low - before.high, one.high - before.low
            else:
                change = interval(result, metric, i, 0, real) if i else Interval(0.0, 0.0, 0.0, one.n)
                if fault == "few" and metric in result:  # the copies of one picture are one observation
                    change = surely(paired_difference_ci, *(result[metric][j].reshape(-1, 4) for j in (i, 0)))
                low, high = change.low, change.high
            low, high = sorted((sign * low, sign * high))
            told = "-" if not i else "yes" if high < 0 else "wrongly better" if low > 0 else "no"
            found.append({"fault": fault, "what": FAULTS[fault], "metric": metric, **asdict(one), "notices": told})
    return pd.DataFrame(found)


def bias_table(features: np.ndarray, sizes: Sequence[int], repeats: int = 5, seed: int = 0) -> pd.DataFrame:
    """FID and KID of n pictures against half of ``features``, of one and the same source: the true distance is 0.

    The n are drawn from the other half, ``repeats`` times. Rows (metric, n, value, low, high): mean and extremes.
    """
    order = np.random.default_rng(seed).permutation(len(features))
    mine, real = features[order[: len(order) // 2]], features[order[len(order) // 2:]]
    found = []
    for n in sizes:
        if not 2 <= n <= len(mine):
            raise ValueError(f"n is {n}, expected 2 to {len(mine)}, half of the {len(features)} reference pictures")
        draws = [np.random.default_rng([seed, n, r]).permutation(len(mine))[:n] for r in range(repeats)]
        for metric, of in (("FID", metrics.fid), ("KID", metrics.kid)):
            values = [of(mine[at], real) for at in draws]
            found.append({"metric": metric, "n": n, "value": float(np.mean(values)), "low": min(values),
                          "high": max(values)})
    return pd.DataFrame(found)


# ---------------------------------------------------------------------------------------------- fairness


def named(cell: Batch, cells: Sequence[Batch]) -> tuple[list[Case], tuple[str, ...]]:
    """All requests of a set's cells, and the attributes that they name."""
    last = cells[-1]
    return list(requests(cell.world, cell.prompts, last.first + last.count, cell.seed)), NAMED[cell.prompts]


def fairness_table(cells: Sequence[Batch], results: Sequence[Mapping[str, Any]], k: int = 10) -> pd.DataFrame:
    """Quality by the value that was asked for, of the cloud, the device, and ObCLIP before and after acceleration.

    Rows (attribute, asked, metric, method, k, value, low, high, n): metric `right`, the share of pictures in which this
    attribute is as asked (Clopper-Pearson), and `clip_score`; with ``against`` the paired change from that method.
    Rows with asked = `gap` hold the largest difference between the attribute's values.
    """
    asked, attributes = named(cells[0], cells)
    whole, methods = gathered(results), list(cells[0].methods)
    shown = [("cloud-only", 0), *((name, k) for name in VARIANTS), ("device-only", 0)]
    found = []
    for attribute in attributes:
        labels = np.array([case.values[case.index][attribute] for case in asked])
        for method in shown:
            i, base = methods.index(method), methods.index(("obclip", k))
            own = whole["right"][..., list(ATTRIBUTES).index(attribute)]
            scores = {"right": own, "clip_score": whole["clip_score"]}
            for metric, values in scores.items():
                head = {"attribute": attribute, "metric": metric, "method": method[0], "k": method[1] or np.nan}
                for value in ATTRIBUTES[attribute]:
                    at = labels == value
                    if not at.any():
                        continue
                    one = proportion_ci(values[i, at]) if metric == "right" else _mean(values[i, at])
                    found.append(head | {"asked": value} | asdict(one))
                    if method[0] in VARIANTS[1:] and at.sum() > 1:
                        change = surely(paired_difference_ci, values[i, at], values[base, at])
                        found.append(head | {"asked": value, "against": "obclip"} | asdict(change))
                if len(metrics.groups(values[i], labels)) > 1:
                    found.append(head | {"asked": "gap"} | asdict(metrics.gap_ci(values[i], labels)))
    table = pd.DataFrame(found)
    table["against"] = table.get("against")
    return table[["attribute", "asked", "metric", "method", "k", "value", "low", "high", "n", "against"]]


def _mean(values: np.ndarray) -> Interval:
    """The mean with its interval, which few values do not have."""
    return surely(bootstrap_ci, values) if len(values) > 1 else Interval(float(values[0]), np.nan, np.nan, 1)


def pivot_table(sets: Sequence[tuple[Sequence[Batch], Sequence[Mapping[str, Any]]]]) -> pd.DataFrame:
    """Does batch reuse drag the others towards the pivot? By the number of attributes in which the real one differs.

    Rows (candidates, k, apart, metric, method, value, low, high, n). Of the attributes that differ from the pivot's:
    `right`, how many are drawn as asked, and `pulled`, how many as the pivot has them; without reuse (obclip+cache) and
    with it. Rows with ``against`` hold the paired change by reuse. apart 0 is the pivot itself (all its attributes).
    """
    found = []
    for cells, results in sets:
        asked, attributes = named(cells[0], cells)
        if not attributes:
            continue
        whole, methods = gathered(results), list(cells[0].methods)
        columns = [list(ATTRIBUTES).index(name) for name in attributes]
        number = [[[ATTRIBUTES[name].index(case.values[j][name]) for name in attributes]
                   for j in (case.index, 0)] for case in asked]
        real, pivot = np.moveaxis(np.array(number), 1, 0)
        apart = (real != pivot).sum(1)
        for k in cells[0].ks:
            scores = {}
            for method in VARIANTS[1:]:
                got = whole["found"][methods.index((method, k))][:, columns]
                differs = real != pivot
                count = np.maximum(differs.sum(1), 1)
                scores["right", method] = np.where(apart, ((got == real) & differs).sum(1) / count,
                                                   (got == real).mean(1))
                scores["pulled", method] = np.where(apart, ((got == pivot) & differs).sum(1) / count, np.nan)
            for (metric, method), values in scores.items():
                for distance in range(len(attributes) + 1):
                    at = (apart == distance) & ~np.isnan(values)
                    if not at.any():
                        continue
                    head = {"candidates": len(asked[0].candidates), "k": k, "apart": distance, "metric": metric,
                            "method": method}
                    found.append(head | asdict(_mean(values[at])))
                    if method == VARIANTS[2] and at.sum() > 1:
                        change = surely(paired_difference_ci, values[at], scores[metric, VARIANTS[1]][at])
                        found.append(head | asdict(change) | {"against": VARIANTS[1]})
    columns = ["candidates", "k", "apart", "metric", "method", "value", "low", "high", "n", "against"]
    return pd.DataFrame(found, columns=columns)


# ---------------------------------------------------------------------------------------------- seconds


@dataclass(frozen=True)
class Alone:
    """Seconds of what a request takes besides the cloud's steps on all candidates; they depend on ``threads``."""

    world: str
    repeats: int
    threads: int
    steps: int = 3
    seed: int = 0


def seconds_alone(cell: Alone) -> dict[str, Any]:
    """Seconds (repeats,): cloud and device, a step of one candidate; decode, a picture; detect, one prompt parsed and
    its candidates written out (another prompt each time: parsing remembers)."""
    world, T = loaded(cell.world), loaded(cell.world).T
    found: dict[str, list[float]] = {"detect": [], "cloud": [], "device": [], "decode": []}

    def timed(name: str, run_: Callable[[], Any]) -> Any:
        begin = now(world)
        result = run_()
        found[name].append(now(world) - begin)
        return result

    for i in range(cell.repeats + 1):
        text, _ = caption(cell.world, "n30", i, 10_000 + cell.seed)  # one that nothing has parsed before
        timed("detect", lambda text=text: candidates(parse(text)))
        for side in worlds.SIDES:
            begin = noise(world, side, T, [i])
            ends = timed(side, lambda side=side, begin=begin, text=text, i=i: walk(
                world, side, [text], [i], begin, [cell.steps])[cell.steps].latents)
        timed("decode", lambda ends=ends: decode(world, ends))
    return {name: np.array(values[1:]) / (cell.steps if name in worlds.SIDES else 1)  # the first warms up
            for name, values in found.items()}


def latency_rows(world: str, timings: Sequence[cache_ablations.Timing], results: Sequence[Mapping[str, Any]],
                 one: Mapping[str, Any], T: int) -> pd.DataFrame:
    """Rows cloud_latency_s of Table 2: medians over repeats and their extremes, measured by notebook 03's whole runs.

    Vanilla generation is T times its plain step. As the paper prints it, device-only is the device's own time.
    """
    found = []

    def add(N: int, method: str, k: float, spent: np.ndarray) -> None:
        found.append({"world": world, "method": method, "k": k or np.nan, "candidates": N, "metric": "cloud_latency_s",
                      "value": float(np.median(spent)), "low": float(spent.min()), "high": float(spent.max()),
                      "n": len(spent), "note": "median and extremes of repeats"})

    for cell, result in zip(timings, results, strict=True):
        add(cell.N, "cloud-only", 0, T * one["cloud"])
        add(cell.N, "device-only", 0, T * one["device"])
        add(cell.N, "vanilla-og", 0, T * result["none"].mean(1))
        for k in PAPER:
            add(cell.N, "hybrid-sd", k, k * one["cloud"])
            add(cell.N, "obclip", k, result["none"][:, :k].sum(1))
            add(cell.N, "obclip+cache+reuse", k, result[f"k{k}"].sum(1))
    return pd.DataFrame(found)


def overhead_table(timings: Sequence[cache_ablations.Timing], results: Sequence[Mapping[str, Any]],
                   one: Mapping[str, Any], codings: pd.DataFrame, T: int, k: int = 10) -> pd.DataFrame:
    """What detecting and sending add to a request: rows (link, mode, candidates, seconds, overhead_ratio, low, high).

    Latents in fp16, their bytes as notebook 02 measured them; the request is the cloud's k accelerated steps on all
    candidates, the device's T - k, and decoding. low and high: with the slowest and the fastest repeat of these.
    """
    found = []
    for cell, result in zip(timings, results, strict=True):
        device = (T - k) * one["device"], one["decode"]
        spent = [float(how(result[f"k{k}"].sum(1)) + sum(how(part) for part in device))
                 for how in (np.median, np.max, np.min)]
        for row in codings[(codings.N == cell.N) & (codings.coding == "fp16")].itertuples():
            for link, mbps in wire.LINKS.items():
                sent = wire.seconds(round(cell.N * row.bytes_a_candidate), mbps)
                more = float(np.median(one["detect"])) + sent
                value, low, high = (more / base for base in spent)
                found.append({"link": link.split("_")[0], "mbps": mbps, "mode": row.mode, "candidates": cell.N, "k": k,
                              "detect_s": float(np.median(one["detect"])), "send_s": sent, "request_s": spent[0],
                              "overhead_ratio": value, "low": low, "high": high})
    return pd.DataFrame(found)


# ---------------------------------------------------------------------------------------------- the systems of Table 1


def systems_table(tables: Sequence[pd.DataFrame], privacy: pd.DataFrame, k: int = 10) -> pd.DataFrame:
    """Every system of Table 1 by utility, privacy and cost: rows measured here, and those of notebook 01.

    Columns system, candidates, guess (how often the cloud names the real candidate from the messages, uniform prior),
    attribute_accuracy, low, high, clip_score, cloud_gmacs, device_gmacs, source. ``tables`` are long tables with
    cloud_tflops; from ``privacy`` (table1_privacy.csv) come the systems that are not measured here.
    """
    found = []
    for table in tables:
        single = table[table.against.isna() & table.against_k.isna()]
        for (N, method), part in single.groupby(["candidates", "method"], sort=False):
            part = part[part.k.isna() | (part.k == k)].set_index("metric")
            seen = method in ("cloud-only", "hybrid-sd")
            found.append({"system": method, "candidates": N, "guess": 1.0 if seen else 1 / N,
                          "attribute_accuracy": part.value.get("attribute_accuracy"),
                          "low": part.low.get("attribute_accuracy"), "high": part.high.get("attribute_accuracy"),
                          "clip_score": part.value.get("clip_score"), "kid": part.value.get("kid"),
                          "cloud_gmacs": 1e3 * part.value["cloud_tflops"],
                          "device_gmacs": 1e3 * part.value["device_tflops"], "source": "measured here"})
    mine = {"server-only", "client-only", "hybrid-sd", "obclip"}
    for row in privacy.to_dict("records"):
        if row["system"].casefold().replace(" ", "-") not in mine:
            cited = str(row["source"]).startswith("cited")
            found.append({"system": row["system"], "guess": row["guess"],
                          **{name: row.get(name) for name in ("attribute_accuracy", "low", "high", "clip_score",
                                                              "cloud_gmacs")},
                          "source": row["source"] if cited else "measured in notebook 01"})
    return pd.DataFrame(found)


# ---------------------------------------------------------------------------------------------- claims


def verdicts(setting: Any) -> pd.DataFrame:
    """claims.csv: every claim of data/paper/claims.toml, decided on this run's tables and those of other notebooks.

    n is the number of prompts (pictures, repeats) behind the deciding rows.
    """
    with tempfile.TemporaryDirectory() as folder:
        tables = Path(folder) / "tables"
        tables.mkdir()
        known = {claim.table for claim in claims.load()}
        for place in (setting.folder, setting.out):  # this run's tables go before older ones of the same name
            for file in sorted((place / "tables").glob("*.csv")):
                if file.stem in known:
                    shutil.copy(file, tables / file.name)
        found = claims.frame(claims.evaluate(folder, world=setting.world))
        behind = [_behind(claim, tables / f"{claim.table}.csv", setting.world) for claim in claims.load()]
    found.insert(list(found).index("high") + 1, "n", pd.array(behind, dtype="Int64"))
    return found


def _behind(claim: claims.Claim, file: Path, world: str) -> int | None:
    """The fewest prompts, pictures or repeats behind the rows that a claim is decided on; None where none is told."""
    table = pd.read_csv(file) if file.is_file() else pd.DataFrame()
    if "n" not in table:
        return None
    asked = {"world": world} | dict(claim.where)
    rows_ = claims._select(table, {name: wanted for name, wanted in asked.items() if name in table}, world)
    return int(rows_.n.min()) if rows_.n.notna().any() else None


# ---------------------------------------------------------------------------------------------- what the tables say


def tell_bias(table: pd.DataFrame) -> str:
    """How far from 0 FID and KID are at the fewest and at the most pictures of one source."""
    said = []
    for metric, part in table.groupby("metric", sort=False):
        few_, many = part.sort_values("n").iloc[[0, -1]].itertuples()
        covers = "0 lies within the draws" if few_.low <= 0 <= few_.high else "0 lies outside the draws"
        said.append(f"{metric} of a source with itself: {few_.value:.3g} at n = {few_.n}, {many.value:.3g} at "
                    f"n = {many.n}; at n = {few_.n} {covers}")
    return "\n".join(said)


def tell_faults(table: pd.DataFrame) -> str:
    """Which metric notices which fault."""
    said = []
    for metric, part in table.groupby("metric", sort=False):
        told = {how: list(part[part.notices == how].fault) for how in ("yes", "no", "wrongly better")}
        line = f"{METRICS[metric][0]} notices {', '.join(told['yes']) or 'nothing'}"
        line += f"; does not notice {', '.join(told['no'])}" if told["no"] else ""
        line += f"; calls {', '.join(told['wrongly better'])} an improvement" if told["wrongly better"] else ""
        said.append(line)
    return "\n".join(said)


def tell_differences(table: pd.DataFrame, against: str, k: int = 10) -> str:
    """For each variant at k: on which metrics it is surely better or worse than another method, paired."""
    part, said = table[(table.against == against) & (table.k == k)], []
    for (N, method), own in part.groupby(["candidates", "method"], sort=False):
        told: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": []}
        for row in own[own.metric.isin(METRICS)].itertuples():
            label, more = METRICS[row.metric]
            up, down = row.low > 0, row.high < 0
            told["better" if (up if more else down) else "worse" if (down if more else up) else
                 "not told apart"].append(f"{label} ({row.value:+.3g})")
        said.append(f"N = {N}, {method}, k = {k}, against {against}: " +
                    "; ".join(f"{how}: {', '.join(names)}" for how, names in told.items() if names))
    return "\n".join(said)


def tell_fairness(table: pd.DataFrame) -> str:
    """Where acceleration surely changes a value's quality, and the largest gaps before and after."""
    change = table[table.against.notna() & (table.metric == "right")]
    sure = change[(change.low > 0) | (change.high < 0)]
    said = [f"{len(sure)} of {len(change)} changes by acceleration are surely not zero"]
    said += [f"  {row.method}, {row.attribute} {row.asked}: {row.value:+.2f} [{row.low:+.2f}, {row.high:+.2f}]"
             for row in sure.itertuples()]
    gaps = table[(table.asked == "gap") & (table.metric == "right")]
    for attribute, part in gaps.groupby("attribute", sort=False):
        said.append(f"largest gap between values of {attribute}: " + ", ".join(
            f"{row.method} {row.value:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in part.itertuples()))
    return "\n".join(said)


def tell_pivot(table: pd.DataFrame) -> str:
    """Whether reuse draws more of the pivot's values, at each distance."""
    part = table[table.against.notna() & (table.metric == "pulled")]
    if not len(part):
        return "too few requests differ from the pivot to tell"
    said = []
    for row in part.itertuples():
        verdict = ("reuse drags towards the pivot" if row.low > 0 else "reuse pushes away from it" if row.high < 0
                   else "no drag that this many pictures show")
        said.append(f"N = {row.candidates}, k = {row.k}, {row.apart} apart (n = {row.n}): the pivot's values "
                    f"{row.value:+.2f} [{row.low:+.2f}, {row.high:+.2f}]: {verdict}")
    return "\n".join(said)


def tell_claims(table: pd.DataFrame) -> str:
    """How many claims hold, and each that does not or is open, with the reason."""
    said = [", ".join(f"{count} {name}" for name, count in table.verdict.value_counts(sort=False).items())]
    said += [f"{row.verdict}: {row.claim} ({row.artefact}): {row.why}"
             for row in table.sort_values("verdict").itertuples() if row.verdict != claims.HOLDS]
    return "\n".join(said)


# ---------------------------------------------------------------------------------------------- try it


def compare(world: str, text: str, seed: int = 0, k: int = 10) -> tuple[torch.Tensor, pd.DataFrame]:
    """One prompt drawn by every system: pictures (M, 3, H, W), and a row a system with what the judge says of it."""
    here, case = loaded(world), request(text, seed)
    own, T = case.candidates[case.index], here.T
    walks = walk(here, "cloud", [own], [seed], noise(here, "cloud", T, [seed]), [k, T])
    ends = {"cloud-only": walks[T].latents}
    starts = {"obclip": walks[k], "obclip+cache+reuse": pair(here, case, Split(T, k), PAPER[k])}
    starts["device-only"] = noise(here, "device", T, [seed])
    for method, given in starts.items():
        ends[method] = walk(here, "device", [own], [seed], taken(here, "device", given), [T])[T].latents
    scores = [judged(here, z, [case], ends["cloud-only"], 1) for z in ends.values()]
    told = pd.DataFrame([{name: float(one[name][0]) for name in SCORES} for one in scores], index=list(ends))
    return decode(here, torch.cat(list(ends.values()))), told.dropna(axis=1, how="all")


def rows_of(cells: Iterable[Batch]) -> dict[str, int]:
    """Candidate steps of several cells, by model."""
    counted = [rows(cell) for cell in cells]
    return {side: sum(one[side] for one in counted) for side in worlds.SIDES}
