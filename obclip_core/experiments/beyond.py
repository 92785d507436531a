"""Notebook 05: how little the cloud can do for N candidates, at which quality, against honest controls.

Every method is a split and a schedule, so a function of the candidate set. One run of a prompt gives the latents of all
its candidates; ``reals`` of them, spread evenly over the set, are finished by the device and judged, as if each were
the real one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from obclip_core import cost, metrics
from obclip_core.accelerate import NONE, Schedule, branch, compose
from obclip_core.accelerate.coarse import coarse, fitting
from obclip_core.accelerate.share import gains
from obclip_core.audit import Audit, exact_audit, spellings
from obclip_core.denoise import HandOver, Offer, Secret, Split, decode, now, run
from obclip_core.experiments import cache_ablations
from obclip_core.experiments.cache_ablations import SETS, Attempt, Drawings, cases, loaded, reference, request, shape_of
from obclip_core.experiments.hybrid_split import taken, together, walk
from obclip_core.prompts import Prompt, candidate_values, candidates, parse, real_index
from obclip_core.service.wire import pack_hand_over, pack_offer
from obclip_core.worlds import World

__all__ = ["Drawings", "reference"]  # besides what is defined here

POINTS = {3: (2, 2), 5: (3, 3), 10: (4, 6)}  # k: (r, s); the paper names none for k = 3
CONTROLS = ("mean latent", "wrong candidate")
TARGETS = {30: 1.0, 6: 0.4, 2: 0.25}  # N: the most work, in plain generations of one picture by the cloud
DROP = 3.0  # points of attribute accuracy
SPREADS = (0.5, 1.0, 1.5, 2.0, 3.0)
AUDITED = "an old asian woman in her garden"


def depends(cell: Any) -> list[str | Path]:
    """What a cell's values depend on: this module and all it imports, the world's weights and prompts."""
    return [__name__, *cache_ablations.depends(cell)[1:]]


# ---------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Method:
    """A way to serve N candidates at switch point k: what it is called, its kind, its split and its schedule."""

    name: str
    kind: str
    N: int
    k: int
    split: Split
    schedule: Schedule = NONE


@lru_cache(maxsize=64)
def grid(world: str, N: int) -> tuple[int, ...]:
    """The numbers of values of the attributes that span N candidates, in canonical order."""
    return compose.axes_of(candidate_values(parse(cases(loaded(world), SETS[N], 1)[0].candidates[0])))


def methods(axes: Sequence[int], k: int, T: int = 25, short: bool = False) -> tuple[Method, ...]:
    """All lines of the frontier for these attributes and this k; ``short`` leaves out what teaches least.

    "exact" is ObCLIP without acceleration, "paper" its three caches, "one for all" a single trajectory that every
    candidate takes as its own. The names of the others say what they combine; the number is that of trajectories.
    """
    axes, N, steps = tuple(axes), int(np.prod(axes)), tuple(range(k))
    split, (r, s) = Split(T, k), POINTS[k]
    kept = Schedule.points(k, r, s, reuse=False)
    caches = {"cache": kept.cache, "skip": kept.skip}
    found = []

    def add(name: str, kind: str, schedule: Schedule = NONE, on: Split = split) -> None:
        found.append(Method(name, kind, N, k, on, schedule))

    add("exact", "the paper")
    add("paper", "the paper", Schedule.points(k, r, s))
    add("one for all", "control", Schedule(plan=branch.tree(axes, (k,) * len(axes))))
    add("share", "share", Schedule(share=steps))
    add("share + caches", "share", Schedule(share=steps, **caches))
    few = [steps_ for steps_ in fitting(split) if steps_ >= k - 2][:1]
    for m in few:
        add(f"{m} larger steps + share", "larger steps", Schedule(share=tuple(range(m))), coarse(split, m))
    if len(axes) > 1:
        main = compose.composed(axes)
        M = len(main.runs(k))
        add(f"compose {M}", "compose", Schedule(plan=main))
        add(f"compose {M} + share", "compose", Schedule(share=steps, plan=main))
        add(f"compose {M} + share + caches", "compose", Schedule(share=steps, plan=main, **caches))
        if not short:
            base = compose.composed(axes, runs=compose.one_at_a_time(axes, compose.middle(axes)))
            add(f"compose {M}, base and changes", "compose", Schedule(plan=base))
        for m in few:
            add(f"compose {M}, {m} larger steps + share", "larger steps",
                Schedule(share=tuple(range(m)), plan=main), coarse(split, m))
    if len(axes) > 2:
        pairs = compose.composed(axes, [(0, 1), (1, 2)])
        M2 = len(pairs.runs(k))
        add(f"compose {M2} + share + caches", "compose", Schedule(share=steps, plan=pairs, **caches))
        for m in few:
            add(f"compose {M2}, {m} larger steps + share", "larger steps",
                Schedule(share=tuple(range(m)), plan=pairs), coarse(split, m))
        terms = compose.main_effects(axes)
        late = branch.growing(axes, [(0, ()), (1, terms), (max(2, k - 2), (*terms, (0, 1), (1, 2)))])
        add(f"growing 1 {M} {M2} + share", "tree", Schedule(share=steps, plan=late))
        if not short:
            add(f"compose {M2}", "compose", Schedule(plan=pairs))
            add(f"compose {M2} + share", "compose", Schedule(share=steps, plan=pairs))
            full = compose.composed(axes, [(0, 1), (0, 2), (1, 2)])
            add(f"compose {len(full.runs(k))} + share + caches", "compose", Schedule(share=steps, plan=full, **caches))
    if len(axes) > 1:
        opens = (max(1, k // 3), 0, max(2, 2 * k // 3))[:len(axes)]
        add("tree + share", "tree", Schedule(share=steps, plan=branch.tree(axes, opens)))
    return tuple(found)


def trajectories(method: Method) -> int:
    """M: how many latents the cloud hands over."""
    return len(method.schedule.plan.runs(method.split.k)) if method.schedule.plan else method.N


def work(shape: cost.Shape, method: Method, T: int = 25) -> float:
    """The cloud's multiply-adds as multiples of one plain generation: T guided steps of one picture."""
    return cost.macs(shape, method.schedule, method.split.k, method.N) / cost.macs(shape, NONE, T, 1)


# ---------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Frontier:
    """The first ``count`` prompts of the set of N under one method, each finished for ``reals`` of its candidates."""

    world: str
    method: Method
    count: int
    reals: int
    seed: int = 0


def chosen(N: int, reals: int) -> tuple[int, ...]:
    """``reals`` of N candidates, spread evenly over the canonical order."""
    return tuple(sorted({int((i + 0.5) * N / min(reals, N)) for i in range(min(reals, N))}))


def wrong(axes: Sequence[int]) -> tuple[int, ...]:
    """For each candidate one that differs from it in every attribute."""
    points = np.stack(np.unravel_index(np.arange(int(np.prod(axes))), tuple(axes)))
    moved = tuple((points[i] + 1) % q for i, q in enumerate(axes))
    return tuple(int(i) for i in np.ravel_multi_index(moved, tuple(axes)))


def recipes(method: Method, axes: Sequence[int]) -> dict[str, np.ndarray | None]:
    """How the device makes its candidate's latent: the method's own way; for "exact", the two controls beside it."""
    plan = method.schedule.plan
    found = {"": plan.recipe(method.split.k) if plan else None}
    if method.name == "exact":
        N = method.N
        found |= {"mean latent": np.full((N, N), 1 / N), "wrong candidate": np.eye(N)[list(wrong(axes))]}
    return found


def measure(cell: Frontier) -> dict[str, Any]:
    """What a method gives: seconds of the cloud, bytes, latents of all candidates, and pictures of the real ones.

    latents (count, N, C, h, w); for each of ``recipes`` (its name and "/" before the key) and each pair of a prompt and
    a real candidate: pictures (bytes), features, attribute_accuracy, clip_score. ``seconds`` (count) are of the method,
    ``plain`` of one plain generation by the cloud, which takes its turn after every fourth prompt, the first among
    them; ``bytes`` up and down, fp16 down.
    """
    world, method = loaded(cell.world), cell.method
    axes, picks = grid(cell.world, method.N), chosen(method.N, cell.reals)
    asked = cases(world, SETS[method.N], cell.count, cell.seed)
    ways = recipes(method, axes)
    found: dict[str, Any] = {"seconds": [], "plain": [], "bytes": [], "latents": []}
    handed: dict[str, list[HandOver]] = {way: [] for way in ways}
    run(world, Offer(asked[0].candidates[:1], 0, Split(world.T, 1)))
    for number, case in enumerate(asked):
        offer = Offer(case.candidates, case.seed, method.split, method.schedule)
        begin = now(world)
        hand_over = run(world, offer)
        found["seconds"].append(now(world) - begin)
        if number % 4 == 0:
            begin = now(world)
            run(world, Offer(case.candidates[:1], case.seed, Split(world.T, world.T)))
            found["plain"].append(now(world) - begin)
        found["bytes"].append(len(pack_offer(offer)) + len(pack_hand_over(hand_over)))
        C = np.eye(method.N) if ways[""] is None else ways[""]
        found["latents"].append(torch.einsum("pm,mchw->pchw", torch.tensor(C).to(hand_over.latents), hand_over.latents))
        for way, recipe in ways.items():
            handed[way] += [hand_over.pick(Secret(i), recipe) for i in picks]
    judge = metrics.scorer(world)
    texts = [case.candidates[i] for case in asked for i in picks]
    truth = [case.values[i] for case in asked for i in picks]
    seeds = [case.seed for case in asked for _ in picks]
    for way, given in handed.items():
        images = decode(world, finished(world, method.split, given, texts, seeds))
        told = judge.judge(images, texts, truth)
        found[f"{way}/pictures"] = (images * 255).round().to(torch.uint8)
        found |= {f"{way}/{name}": told[name] for name in ("features", "attribute_accuracy", "clip_score")}
    found["latents"] = torch.stack(found["latents"])
    return {key: np.array(value) if isinstance(value, list) else value for key, value in found.items()}


def finished(world: World, split: Split, given: Sequence[HandOver], texts: Sequence[str], seeds: Sequence[int],
             most: int = 32) -> torch.Tensor:
    """The device's steps on many picked hand-overs at once: ``denoise.finish`` of each, in batches of ``most``."""
    latents = []
    for start in range(0, len(given), most):
        part = slice(start, start + most)
        batch = taken(world, "device", together(given[part]), given[0].mode, world.T, split.join)
        latents.append(walk(world, "device", texts[part], seeds[part], batch, [world.T])[world.T].latents)
    return torch.cat(latents)


# ---------------------------------------------------------------------------------------------- the tables


def frontier(shape: cost.Shape, cells: Sequence[Frontier], results: Sequence[Mapping[str, Any]],
             real: np.ndarray, T: int = 25) -> pd.DataFrame:
    """frontier.csv: one row a method, and two controls for each (N, k).

    cloud_work_ratio and cloud_seconds_ratio are multiples of one plain generation by the cloud. Against exact ObCLIP,
    over the same prompts, candidates and noise: accuracy_drop_points, distance (of pictures, in the scorer's features)
    and latent_error, the root mean square error of all candidates' latents as a multiple of their own spread about
    their mean, so that the mean latent has 1. kid is against drawings that no model has seen. Each with _low and
    _high, 95 % over prompts.
    """
    base = {(cell.method.N, cell.method.k): result for cell, result in zip(cells, results, strict=True)
            if cell.method.name == "exact"}
    judge = metrics.scorer(loaded(cells[0].world))
    rows = []
    for cell, result in zip(cells, results, strict=True):
        method = cell.method
        exact = base[method.N, method.k]
        for way in recipes(method, grid(cell.world, method.N)):
            row = {"method": way or method.name, "kind": "control" if way else method.kind, "candidates": method.N,
                   "k": method.k, "steps": method.split.k, "trajectories": trajectories(method),
                   "cloud_work_ratio": work(shape, method, T)}
            ratios = result["seconds"] / np.median(result["plain"])
            row |= {"cloud_seconds_ratio": float(np.median(ratios)), "cloud_seconds_ratio_low": float(ratios.min()),
                    "cloud_seconds_ratio_high": float(ratios.max())}
            row |= _scores(judge, result, exact, way, real, cell.count)
            row |= _error(_latents(result, way, method, cell.world), exact["latents"])
            row |= {"bytes": float(np.mean(result["bytes"])), "prompts": cell.count,
                    "pictures": len(result[f"{way}/features"])}
            rows.append(row)
    return pd.DataFrame(rows)


def _scores(judge: Any, result: Mapping[str, Any], exact: Mapping[str, Any], way: str,
            real: np.ndarray, prompts: int) -> dict[str, float]:
    """Accuracy, its drop, distance, CLIP score and KID of one set of pictures, with intervals over prompts."""
    def by_prompt(values: Any) -> np.ndarray:
        return np.reshape(values, (prompts, -1))

    own, against = by_prompt(result[f"{way}/attribute_accuracy"]), by_prompt(exact["/attribute_accuracy"])
    shown = [cache_ablations.pictures(one) for one in (result[f"{way}/pictures"], exact["/pictures"])]
    kid = metrics.Interval(*(float("nan"),) * 3, 0)
    if len(real):
        kid = metrics.kid_ci(result[f"{way}/features"], real, np.repeat(np.arange(prompts), own.shape[1]))
    return {
        **metrics.bootstrap_ci(own).row("attribute_accuracy"),
        **metrics.paired_difference_ci(100 * against, 100 * own).row("accuracy_drop_points"),
        **metrics.bootstrap_ci(by_prompt(result[f"{way}/clip_score"])).row("clip_score"),
        **metrics.bootstrap_ci(by_prompt(metrics.perceptual_distance(judge, *shown))).row("distance"),
        **kid.row("kid"),
    }


def _latents(result: Mapping[str, Any], way: str, method: Method, world: str) -> np.ndarray:
    latents = np.asarray(result["latents"])
    if way == "mean latent":
        return np.broadcast_to(latents.mean(1, keepdims=True), latents.shape)
    return latents[:, list(wrong(grid(world, method.N)))] if way == "wrong candidate" else latents


def _error(latents: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """latent_error with its interval over prompts."""
    latents, exact = np.asarray(latents), np.asarray(exact)
    off = ((latents - exact) ** 2).mean(axis=(1, 2, 3, 4))
    spread = ((exact - exact.mean(1, keepdims=True)) ** 2).mean(axis=(1, 2, 3, 4))
    return metrics.bootstrap_ci(np.sqrt(off / spread)).row("latent_error")


def targets(table: pd.DataFrame) -> pd.DataFrame:
    """For each N and k: the method nearest to exact ObCLIP within the target's work, and whether it keeps all of it.

    Rows (candidates, k, target, method, cloud_work_ratio, accuracy_drop_points with its interval, latent_error, the
    controls' drops, verdict). The drop decides by its interval; better than a control: a smaller latent error and a
    smaller distance. An (N, k) at which no method is within the work has no row.
    """
    rows = []
    for (N, most), k in product(TARGETS.items(), POINTS):
        part = table[(table.candidates == N) & (table.k == k)]
        able = part[(part.cloud_work_ratio <= most) & (part.kind != "control")]
        if able.empty:
            continue
        best, controls = able.loc[able.latent_error.idxmin()], part[part.kind == "control"]
        beats = bool((best.latent_error < controls.latent_error).all() and (best.distance < controls.distance).all())
        low, high = best.accuracy_drop_points_low, best.accuracy_drop_points_high
        verdict = "broken" if not beats or low > DROP else "kept" if high <= DROP else "undecided"
        rows.append({"candidates": N, "k": k, "target": most, "method": best.method,
                     "cloud_work_ratio": best.cloud_work_ratio, "accuracy_drop_points": best.accuracy_drop_points,
                     "low": low, "high": high, "latent_error": best.latent_error, "distance": best.distance,
                     "better_than_controls": beats, **{name.replace(" ", "_") + "_drop": _of(controls, name)
                                                       for name in (*CONTROLS, "one for all")}, "verdict": verdict})
    return pd.DataFrame(rows)


def _of(table: pd.DataFrame, method: str) -> float:
    found = table[table.method == method].accuracy_drop_points
    return float(found.iloc[0]) if len(found) else float("nan")


# ---------------------------------------------------------------------------------------------- one branch, corrected


@dataclass(frozen=True)
class Gain:
    """The shared unconditional branch without correction, and with that for data of each of these spreads."""

    world: str
    N: int
    k: int
    spreads: tuple[float, ...]
    count: int
    seed: int = 0


def corrected(cell: Gain) -> dict[str, Any]:
    """Latents (count, 2 + spreads, N, C, h, w) after k steps: exact, shared without correction, and with each."""
    world = loaded(cell.world)
    steps = tuple(range(cell.k))
    schedules = [NONE, Schedule(share=steps)]
    schedules += [Schedule(share=steps, share_gain=gains(world.schedulers["cloud"], world.T, steps, spread))
                  for spread in cell.spreads]
    return {"latents": torch.stack([
        torch.stack([run(world, Offer(case.candidates, case.seed, Split(world.T, cell.k), schedule)).latents
                     for schedule in schedules]) for case in cases(world, SETS[cell.N], cell.count, cell.seed)])}


def gain_table(cells: Sequence[Gain], results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows (candidates, k, correction, latent_error with its interval)."""
    return pd.DataFrame([
        {"candidates": cell.N, "k": cell.k, "correction": "none" if spread is None else f"s = {spread:g}",
         **_error(result["latents"][:, at], result["latents"][:, 0])}
        for cell, result in zip(cells, results, strict=True) for at, spread in enumerate((None, *cell.spreads), 1)])


# ---------------------------------------------------------------------------------------------- designs


def designs(axes: Sequence[int]) -> pd.DataFrame:
    """What composition asks for on a grid: rows (model, runs, trajectories, amplification).

    amplification is how much an error that is independent from run to run grows in a composed candidate: the mean and
    the greatest root of sum_m C[p, m]^2 over those that are not run.
    """
    axes, rows = tuple(axes), []
    pairs = [(i, j) for i in range(len(axes)) for j in range(i + 1, len(axes))]
    models = {"main effects": (), **({"main effects + gender pairs": [(0, 1), (1, 2)]} if len(axes) > 2 else {}),
              "all pairs": pairs}
    for name, with_pairs in models.items():
        terms = compose.main_effects(axes, with_pairs)
        least = len(compose.columns(axes, terms)[0])
        sets = {"D-optimal": compose.optimal(axes, terms)}
        if not with_pairs:
            sets["base and changes"] = compose.one_at_a_time(axes, compose.middle(axes))
        if least + 4 < int(np.prod(axes)):
            sets["D-optimal, 4 more"] = compose.optimal(axes, terms, least + 4)
        for how, runs in sets.items():
            C = compose.coefficients(axes, terms, runs)
            left = [i for i in range(len(C)) if i not in runs]
            size = np.sqrt((C[left] ** 2).sum(1)) if left else np.ones(1)
            rows.append({"model": name, "runs": how, "trajectories": len(runs), "amplification": float(size.mean()),
                         "greatest": float(size.max())})
    return pd.DataFrame(rows)


def shapes_table(names: Sequence[str] = ("sd14", "sdxl"), N: Sequence[int] = (2, 6, 30),
                 k: Sequence[int] = (3, 5, 10)) -> pd.DataFrame:
    """Every method's work on the paper's clouds, from shapes alone: rows (world, method, candidates, k, work)."""
    grids, rows = {2: (2,), 6: (3, 2), 30: (3, 2, 5)}, []
    for name in names:
        shape = cost.shape(name)
        for n in N:
            for at in k:
                rows += [{"world": name, "method": method.name, "candidates": n, "k": at,
                          "trajectories": trajectories(method), "cloud_work_ratio": work(shape, method)}
                         for method in methods(grids[n], at)]
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------------------- the audit


def audits(text: str = AUDITED, k: int = 5) -> pd.DataFrame:
    """Every method's bytes on the wire under the exact audit, and two that look at the real candidate.

    Rows (method, advantage, holds, expected): over all candidates of ``text`` and spellings of them, on the envelope
    of the offer that is sent.
    """
    axes = compose.axes_of(candidate_values(parse(text)))
    rows = []
    for method in methods(axes, k):
        found = _audit(lambda prompt, method=method: method.schedule, method.split, text)
        rows.append({"method": method.name, "advantage": found.advantage, "holds": found.holds, "expected": True})
    leaks = {"leak: the tree's base is the real one": lambda prompt: Schedule(
                 plan=branch.tree(axes, (1,) * len(axes), real_index(prompt))),
             "leak: changes around the real one": lambda prompt: Schedule(
                 plan=compose.composed(axes, runs=compose.one_at_a_time(axes, real_index(prompt))))}
    for name, schedule in leaks.items():
        found = _audit(schedule, Split(25, k), text)
        rows.append({"method": name, "advantage": found.advantage, "holds": found.holds, "expected": False})
    return pd.DataFrame(rows)


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Prompt:
    return parse(text)


def _audit(schedule: Any, split: Split, text: str) -> Audit:
    def client(typed: str) -> dict[tuple[bytes, ...], float]:
        prompt = _parsed(typed)
        return {(pack_offer(Offer(candidates(prompt), 1, split, schedule(prompt))),): 1.0}

    return exact_audit(client, _spelt(text))


@lru_cache(maxsize=8)
def _spelt(text: str) -> tuple[str, ...]:
    return spellings(_parsed(text))


# ---------------------------------------------------------------------------------------------- pictures, try it


def picture_rows(cells: Sequence[Frontier], results: Sequence[Mapping[str, Any]], names: Sequence[str], N: int, k: int,
                 count: int) -> torch.Tensor:
    """(methods, count, 3, H, W): the first pictures of some methods, the same candidates in each row."""
    found = []
    for name in names:
        way = name if name in CONTROLS else ""
        at = next(i for i, cell in enumerate(cells)
                  if (cell.method.name, cell.method.N, cell.method.k) == ("exact" if way else name, N, k))
        found.append(cache_ablations.pictures(results[at][f"{way}/pictures"][:count]))
    return torch.stack(found)


def attempt(world: str, text: str, schedule: Schedule, k: int = 5, seed: int = 0) -> Attempt:
    """One prompt served exactly and by any schedule: what the device draws, and what the cloud paid."""
    here, case = loaded(world), request(text, seed)
    shape, rows, images = shape_of(here), [], []
    for name, one in (("exact", NONE), ("yours", schedule)):
        method = Method(name, "", len(case.candidates), k, Split(here.T, k), one)
        offer = Offer(case.candidates, seed, method.split, one)
        begin = now(here)
        hand_over = run(here, offer)
        seconds = now(here) - begin
        picked = hand_over.pick(Secret(case.index), one.plan.recipe(k) if one.plan else None)
        images.append(decode(here, finished(here, method.split, [picked], [case.candidates[case.index]], [seed]))[0])
        rows.append({"method": name, "candidates": method.N, "trajectories": hand_over.N,
                     "cloud_work_ratio": work(shape, method, here.T), "cloud_seconds": seconds,
                     "bytes": len(pack_offer(offer)) + len(pack_hand_over(hand_over))})
    return Attempt(torch.stack(images), pd.DataFrame(rows))


# ---------------------------------------------------------------------------------------------- what the tables say


def tell_frontier(table: pd.DataFrame) -> str:
    """At each N and k, the methods that no other beats in both work and latent error."""
    said = []
    for (N, k), part in table[table.kind != "control"].groupby(["candidates", "k"], sort=True):
        ordered, best, least = part.sort_values(["cloud_work_ratio", "latent_error"]), [], np.inf
        for row in ordered.itertuples():
            if row.latent_error < least:
                least = row.latent_error
                best.append(f"{row.method} ({row.cloud_work_ratio:.2f}, error {row.latent_error:.2f})")
        said.append(f"N = {N}, k = {k}: " + "; ".join(best))
    return "\n".join(said)


def tell_targets(table: pd.DataFrame) -> str:
    """The promises, N by N."""
    said = []
    for row in table.itertuples():
        said.append(
            f"N = {row.candidates}, k = {row.k}, at most {row.target} plain generations: {row.method} with "
            f"{row.cloud_work_ratio:.2f}; accuracy drops by {row.accuracy_drop_points:.1f} [{row.low:.1f}, "
            f"{row.high:.1f}] points, latent error {row.latent_error:.2f}, "
            f"{'better' if row.better_than_controls else 'not better'} than every control: {row.verdict}")
    return "\n".join(said)


def tell_controls(table: pd.DataFrame) -> str:
    """What the controls lose: if it is nothing, no saving is to a method's credit."""
    said = []
    for (N, k), part in table[table.kind == "control"].groupby(["candidates", "k"], sort=True):
        said.append(f"N = {N}, k = {k}: " + "; ".join(
            f"{row.method} loses {row.accuracy_drop_points:.1f} [{row.accuracy_drop_points_low:.1f}, "
            f"{row.accuracy_drop_points_high:.1f}] points, latent error {row.latent_error:.2f}"
            for row in part.itertuples()))
        if (part.accuracy_drop_points_low <= 0).any():
            said[-1] += ": here accuracy does not tell a method from a control, the latent error must"
    return "\n".join(said)


def tell_gains(table: pd.DataFrame) -> str:
    """Which correction of the shared branch is best, and whether it is worth it."""
    said = []
    for (N, k), part in table.groupby(["candidates", "k"], sort=True):
        none, best = part[part.correction == "none"].iloc[0], part.loc[part.latent_error.idxmin()]
        helps = "no correction helps" if best.correction == "none" else (
            f"the best correction, {best.correction}, {best.latent_error:.3f}")
        said.append(f"N = {N}, k = {k}: error {none.latent_error:.3f} of the spread without correction; {helps}")
    return "\n".join(said)
