"""Notebook 01: what pictures add to the text's guarantee, and what weaker mechanisms cost in meaning.

A scene is one caption with all its N candidates and one noise. The cloud walks all of them once; every question is a
branch off that walk, so that a scene costs little more than one oblivious request:

    who governs the steps    another candidate's latent, finished under the real prompt (the paper's Figure 4)
    publication              every candidate in turn is the real one, finished by the device and published
    word replacement         the cloud worked on a candidate that a mechanism drew, the device knows the real one
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from obclip_core import audit, cost, metrics, privacy, worlds
from obclip_core.denoise import decode, take_steps
from obclip_core.metrics import bootstrap_ci, paired_difference_ci, proportion_ci
from obclip_core.prompts import (
    ATTRIBUTES,
    DATA,
    Prompt,
    attribute_of,
    candidate_values,
    candidates,
    clopper_pearson,
    fill,
    parse,
)
from obclip_core.schedulers import config, each, fresh
from obclip_core.sweep import run, setting
from obclip_core.worlds import World, condition

PROTECTED = {2: ("gender",), 6: ("age", "gender"), 30: ("age", "gender", "ethnicity")}  # N and what it protects
ATTACKS = {
    "reads the picture": "no latent needed: the attributes that the picture shows",
    "handed-over latents": "the picture's own latent beside what each latent was going to be",
    "features of previews": "the picture beside a preview of each candidate, in the scorer's features",
    "finishes all, cloud model": "the picture beside all candidates, finished by the cloud's own model",
    "finishes all, device model": "the same with the device's model, which is no secret",
}
AS_MADE, JPEG = "as made", "jpeg"


@dataclass(frozen=True)
class Scene:
    """One caption, all its candidates, one noise: `candidates` is N (2, 6 or 30), T a multiple of 5, `reals` how many
    of the candidates are tried as the real one where that costs steps of the cloud."""

    world: str = "portraits"
    candidates: int = 30
    T: int = 25
    reals: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.candidates not in PROTECTED:
            raise ValueError(f"a scene has {self.candidates} candidates, expected one of {sorted(PROTECTED)}")
        if self.T < 5 or self.T % 5:
            raise ValueError(f"T is {self.T}, expected a multiple of 5: the shares are fifths")
        if not 1 <= self.reals <= self.candidates:
            raise ValueError(f"reals is {self.reals}, expected 1 to {self.candidates}, the number of candidates")

    @property
    def points(self) -> tuple[int, ...]:
        """The switch points: after each fifth of the steps but the last."""
        return tuple(self.T // 5 * i for i in range(1, 5))

    @property
    def k(self) -> int:
        """The paper's switch point, two fifths of the steps (10 of 25)."""
        return self.points[1]


def scene_prompt(scene: Scene) -> Prompt:
    """The scene's caption: a template of its N, context words and values, all drawn from its seed."""
    path = _load(scene.world).prompts or DATA / "portraits.toml"
    told = tomllib.loads(path.read_text(encoding="utf-8"))
    random = Random(scene.seed)
    choices = {**told["context"], **{key: ATTRIBUTES[key] for key in PROTECTED[scene.candidates]}}
    values = {key: random.choice(words) for key, words in choices.items()}
    return parse(fill(random.choice(told["templates"][f"n{scene.candidates}"]), values))


def steps_of(scene: Scene) -> dict[str, int]:
    """How many denoising steps of one candidate a scene takes, by model: what its time follows from."""
    N, T, left = scene.candidates, scene.T, sum(scene.T - k for k in scene.points)
    classes = 2 ** len(PROTECTED[N]) - 1
    return {"cloud": N * T + scene.reals * left,
            "device": N * left + scene.reals * (T + classes * (T - scene.k))}


# --------------------------------------------------------------------------------------------- walks that branch


@dataclass(frozen=True, eq=False)
class Walk:
    """N latents (N, C, h, w) after `step` of T steps, with the scheduler's memory. Nobody changes it: `go` copies."""

    x: torch.Tensor
    scheduler: Any
    step: int
    T: int

    def pick(self, rows: Sequence[int] | slice = slice(None)) -> Walk:
        """The walk of some of the candidates, any of them several times."""
        scheduler = copy.copy(self.scheduler)
        memory = {key: value for key, value in vars(scheduler).items() if isinstance(value, (list, torch.Tensor))}
        vars(scheduler).update(each(memory, self.x.shape, lambda tensor: tensor[rows]))
        return replace(self, x=self.x[rows], scheduler=scheduler)

    @property
    def preview(self) -> torch.Tensor:
        """What the latents were going to be, as the last step saw it: DPM-Solver++ remembers it; else the latents."""
        memory = getattr(self.scheduler, "model_outputs", [None])[-1]
        clean = str(self.scheduler.config.get("algorithm_type", "")).endswith("dpmsolver++")
        return memory if clean and isinstance(memory, torch.Tensor) else self.x


def begin(world: World, N: int, T: int, seed: int) -> Walk:
    """The shared noise z_T of an offer with this seed, N times."""
    scheduler = fresh(world.schedulers["cloud"], T, 0, world.torch_device)
    noise = torch.Generator("cpu").manual_seed(seed)
    z = torch.randn(1, *world.shape, generator=noise, dtype=world.dtype).to(world.torch_device)
    return Walk((scheduler.init_noise_sigma * z).repeat(N, 1, 1, 1), scheduler, 0, T)


@torch.no_grad()
def go(world: World, walk: Walk, side: str, texts: Sequence[str], upto: int) -> Walk:
    """Take the steps up to `upto` with the model of `side`, each latent under its own text.

    Whatever came before, model or texts, may have been another: that is a hand-over, exact where both sides have one
    scheduler and a restart where not, as in `denoise.finish`.
    """
    walk = walk.pick()
    one = config(walk.scheduler) == config(world.schedulers[side])
    scheduler = walk.scheduler if one else fresh(world.schedulers[side], walk.T, walk.step, world.torch_device)
    noise = [torch.Generator("cpu").manual_seed(i) for i in range(len(texts))]  # for schedulers that draw
    text = condition(world, side, texts)
    x = take_steps(world.unet(side), scheduler, range(walk.step, upto), walk.x, text, noise)
    return Walk(x, scheduler, upto, walk.T)


# ------------------------------------------------------------------------------------------------- one scene


@cache
def _load(world: str) -> World:
    return worlds.load(world, torch_device="cuda" if torch.cuda.is_available() else "cpu")


def depends(scene: Scene) -> list[str | Path]:
    """What a scene's numbers depend on: this module with all it imports, the world's file, weights and captions."""
    world = _load(scene.world)
    weights = worlds.DATA / scene.world / "weights"
    return [__name__, *filter(None, (world.file, world.prompts)), *([weights] if weights.is_dir() else [])]


@torch.no_grad()
def compute(scene: Scene) -> dict[str, Any]:
    """All that a scene is asked for, as arrays; N candidates, R of them real, P switch points, A attributes.

    values (N, A) and reals (R,), replaced (R,) the candidate that stood in for each; found_* the scorer's values as
    numbers of ATTRIBUTES, fit_* the similarity (CLIP score) with the real text: cloud (N, A) and (N, N) with each text,
    hybrid (N, A), shares (P, R, A), device (R, A), classes (R, classes, A) with the candidates `stand_ins`.
    distance (attacks, pictures, P, N, N): how far candidate y lies from the published picture of x. pictures: the
    first four real ones, the share of steps under the real prompt from 0 to 100 %, as bytes.
    """
    world, random = _load(scene.world), Random(scene.seed)
    judge, prompt = metrics.scorer(world), scene_prompt(scene)
    texts, values, N, T = candidates(prompt), candidate_values(prompt), scene.candidates, scene.T
    keys = prompt.enumerated
    reals = sorted(random.sample(range(N), scene.reals))
    replaced = [random.choice([y for y in range(N) if y != x]) for x in reals]
    stand_ins = [[random.choice(members) for _, members in sorted(classes_of(values, x).items())[1:]] for x in reals]
    real_texts = [texts[x] for x in reals]

    walk, at = begin(world, N, T, scene.seed), {}
    for k in scene.points:
        at[k] = walk = go(world, walk, "cloud", texts, k)
    cloud = decode(world, go(world, walk, "cloud", texts, T).x)
    hybrid = {k: decode(world, go(world, at[k], "device", texts, T).x) for k in at}
    shares = [decode(world, go(world, at[k].pick(replaced), "cloud", real_texts, T).x) for k in at]
    device = decode(world, go(world, begin(world, len(reals), T, scene.seed), "device", real_texts, T).x)
    rows = list(itertools.chain(*stand_ins))
    asked = [text for text, few in zip(real_texts, stand_ins, strict=True) for _ in few]
    stood_in = decode(world, go(world, at[scene.k].pick(rows), "device", asked, T).x)

    def found(images: torch.Tensor) -> np.ndarray:
        heads = judge.heads(images)
        best = {key: [judge.values[key][i] for i in heads[key].argmax(-1)] for key in keys}
        return np.array([[ATTRIBUTES[key].index(v) for v in best[key]] for key in keys]).T

    def fit(images: torch.Tensor, wanted: Sequence[str]) -> np.ndarray:
        return judge.similarity(images, wanted).numpy()

    per = len(stand_ins[0])
    return {
        "prompt": prompt.text,
        "values": np.array([[ATTRIBUTES[key].index(v[key]) for key in keys] for v in values]),
        "reals": np.array(reals), "replaced": np.array(replaced), "stand_ins": np.array(stand_ins),
        "found_cloud": found(cloud), "fit_cloud": np.stack([fit(cloud, [text] * N) for text in texts]),
        "found_hybrid": found(hybrid[scene.k]), "fit_hybrid": fit(hybrid[scene.k], texts),
        "found_shares": np.stack([found(images) for images in shares]),
        "fit_shares": np.stack([fit(images, real_texts) for images in shares]),
        "found_device": found(device), "fit_device": fit(device, real_texts),
        "found_classes": found(stood_in).reshape(len(reals), per, -1),
        "fit_classes": fit(stood_in, asked).reshape(len(reals), per),
        "distance": _distances(world, judge, at, cloud, hybrid, values),
        "pictures": _bytes(torch.stack([cloud[replaced], *shares[::-1], cloud[reals]], 1)[:4]),
    }  # fmt: skip


def classes_of(values: Sequence[Mapping[str, str]], real: int) -> dict[tuple[bool, ...], list[int]]:
    """The candidates by which attributes differ from the real one's; the real one alone is the class of none."""
    found: dict[tuple[bool, ...], list[int]] = {}
    for y, other in enumerate(values):
        found.setdefault(tuple(other[key] != values[real][key] for key in other), []).append(y)
    return found


def _distances(world: World, judge: metrics.Scorer, at: Mapping[int, Walk], cloud: torch.Tensor,
               hybrid: Mapping[int, torch.Tensor], values: Sequence[Mapping[str, str]]) -> np.ndarray:
    """(attacks, pictures, P, N, N), in the order of ATTACKS: how far each candidate is from each published picture."""
    found = np.zeros((len(ATTACKS), 2, len(at), len(cloud), len(cloud)), dtype=np.float32)
    for p, (k, walk) in enumerate(at.items()):
        previews = decode(world, walk.preview)
        for i, posted in enumerate((_eight_bits(hybrid[k]), as_jpeg(hybrid[k]))):
            heads = judge.heads(posted)
            seen = {key: heads[key].clamp_min(1e-12).log() for key in values[0]}
            told = {key: [judge.values[key].index(v[key]) for v in values] for key in values[0]}
            found[:, i, p] = np.stack([
                -sum(seen[key][:, told[key]] for key in seen).numpy(),
                _apart(_encode(world, posted), walk.preview),
                _apart(judge.features(posted), judge.features(previews)),
                _apart(posted, cloud),
                _apart(posted, hybrid[k]),
            ])  # fmt: skip
    return found


def _apart(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """(N, M) Euclidean distances, computed pair by pair so that equal ones are exactly as far as rounding."""
    a, b = a.flatten(1).float().cpu(), b.flatten(1).float().cpu()
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").numpy()


def _encode(world: World, images: torch.Tensor) -> torch.Tensor:
    vae = world.vae
    latents = vae.encode(images.to(world.torch_device, vae.dtype) * 2 - 1).latent_dist.mean
    return (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


def _eight_bits(images: torch.Tensor) -> torch.Tensor:
    return (images.clamp(0, 1) * 255).round() / 255


def _bytes(images: torch.Tensor) -> np.ndarray:
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def as_jpeg(images: torch.Tensor, quality: int = 50) -> torch.Tensor:
    """Pictures (N, 3, H, W) in [0, 1] after a trip through a JPEG file, as a web page would post them."""
    found = []
    for picture in _bytes(images).transpose(0, 2, 3, 1):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
        found.append(np.asarray(Image.open(buffer).convert("RGB"), dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(found).transpose(0, 3, 1, 2))


# --------------------------------------------------------------------------------------------- tables from scenes


def _right(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Share of attributes that are as wanted, over the last axis."""
    return (found == wanted).mean(-1)


def _row(values: Sequence[float], seed: int = 0, **named: Any) -> dict[str, Any]:
    ci = bootstrap_ci(values, seed) if len(values) > 1 else None
    low, high = (ci.low, ci.high) if ci else (math.nan, math.nan)
    return {**named, "value": float(np.mean(values)), "low": low, "high": high, "n": len(values)}


def figure4_table(scenes: Sequence[Scene], results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Figure 4: attribute accuracy and CLIP score against the share of steps (percent) that the real prompt governs.

    Rows with against_share hold the paired difference to the picture that the real prompt governs alone, over the same
    prompts and noise. `chance` is the accuracy of the replacement's own values: what a picture of it would score.
    """
    first, rows = scenes[0], []
    scores: dict[tuple[str, int], list[float]] = {}
    chance = []
    for scene, r in zip(scenes, results, strict=True):
        wanted, reals, others = r["values"][r["reals"]], r["reals"], r["replaced"]
        chance += list(_right(r["values"][others], wanted))
        shown = [r["found_cloud"][others], *r["found_shares"], r["found_cloud"][reals]]
        fits = [r["fit_cloud"][reals, others], *r["fit_shares"], r["fit_cloud"][reals, reals]]
        # a replacement of the first k steps leaves the real prompt T - k of them
        shares = [0, *(100 * (scene.T - k) // scene.T for k in scene.points), 100]
        for share, found, fit in zip(shares, shown, fits, strict=True):
            scores.setdefault(("attribute_accuracy", share), []).extend(_right(found, wanted))
            scores.setdefault(("clip_score", share), []).extend(fit)
    for (metric, share), values in sorted(scores.items()):
        named = {"metric": metric, "share": share, "candidates": first.candidates}
        rows.append(_row(values, **named, against_share=math.nan))
        if share < 100 and len(values) > 1:
            ci = paired_difference_ci(values, scores[metric, 100])
            rows.append({**named, "against_share": 100, "value": ci.value, "low": ci.low, "high": ci.high, "n": ci.n})
    table = pd.DataFrame(rows)
    return table.assign(chance=np.where(table.metric == "attribute_accuracy", np.mean(chance), math.nan))


def publication_table(scenes: Sequence[Scene], results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """How often the cloud names the real candidate once its picture is public, by attack, k and N.

    Every candidate of every scene is the real one once. An offer of fewer candidates (a smaller N) is the part of the
    scene's that shares the values which are not protected: its latents are the same ones.
    """
    wins: dict[tuple, list[bool]] = {}
    for scene, r in zip(scenes, results, strict=True):
        keys = PROTECTED[scene.candidates]
        for N, protected in PROTECTED.items():
            if N > scene.candidates:
                continue
            open_ = [i for i, key in enumerate(keys) if key not in protected]
            offered = (r["values"][:, None, open_] == r["values"][None, :, open_]).all(-1)
            guess = np.where(offered, r["distance"], np.inf).argmin(-1)
            hit = guess == np.arange(scene.candidates)
            for a, i, p in np.ndindex(hit.shape[:3]):
                name = (list(ATTACKS)[a], (AS_MADE, JPEG)[i], scene.points[p], N)
                wins.setdefault(name, []).extend(hit[a, i, p])
    rows = []
    for (attack, picture, k, N), hits in wins.items():
        ci = proportion_ci(hits)
        rows.append({"attack": attack, "picture": picture, "k": k, "candidates": N, "success": ci.value, "low": ci.low,
                     "high": ci.high, "n": ci.n, "guess": 1 / N})
    return pd.DataFrame(rows).sort_values(["candidates", "picture"], kind="stable", ignore_index=True)


def used_instead(mechanism: privacy.Mechanism, values: Sequence[Mapping[str, str]], real: int, draws: int = 500,
                 seed: int = 0) -> np.ndarray:
    """(N,) how likely each candidate's latent is the one that the device finishes when `real` is the real one."""
    found, random = np.zeros(mechanism.n), Random(seed)
    distances = privacy.word_distances(values)[real]
    if mechanism.distribution is not None and math.comb(mechanism.n, mechanism.m) <= 1000:
        offers: Iterable = mechanism.distribution(real).items()
    else:
        offers = ((mechanism.draw(real, random), 1 / draws) for _ in range(draws))
    for offer, p in offers:
        found[min(offer, key=lambda i: (distances[i], i))] += p
    return found


def mechanisms(values: Sequence[Mapping[str, str]], epsilons: Sequence[float] = (1, 4, 16),
               sent: Sequence[int] | None = None) -> list[tuple[str, float, privacy.Mechanism]]:
    """(family, epsilon, mechanism): all that the notebook compares, over one prompt's candidates.

    CAPE's context term is level here: in the embedded world's captions context and attributes are independent.
    """
    n, distances = len(values), privacy.word_distances(values)
    sent = sorted({min(n, max(1, n // 5)), min(n, max(1, n // 2))}) if sent is None else sent
    found = [("plain prompt", math.inf, privacy.plain(n)), ("all candidates", 0.0, privacy.enumerate_all(n)),
             ("random replacement", 0.0, privacy.random_replacement(n))]
    for epsilon in epsilons:
        found += [("SANTEXT", epsilon, privacy.santext(distances, epsilon)),
                  ("CAPE", epsilon, privacy.cape(distances, np.zeros(n), epsilon))]
    found += [(f"subset, {m} of {n}", e, privacy.subset(n, m, e)) for m in sent for e in epsilons if m < n]
    return found


def attack_mechanisms(prompt: Prompt, sent: int = 3) -> list[privacy.Mechanism]:
    """The mechanisms of the attack table: `audit.standard_mechanisms` with few enough offers to enumerate quickly."""
    n, values = prompt.count, candidate_values(prompt)
    distances, m = privacy.word_distances(values), min(sent, n - 1)
    groups = [ATTRIBUTES["gender"].index(value.get("gender", "male")) for value in values]
    return [privacy.plain(n), privacy.random_replacement(n), privacy.enumerate_all(n), privacy.enumerate_some(groups),
            *(privacy.subset(n, m, epsilon) for epsilon in (0.5, 1.0, 4.0)), privacy.truth_plus_others(n, m),
            *(privacy.santext(distances, epsilon) for epsilon in (1.0, 4.0, 16.0)),
            *(privacy.cape(distances, np.zeros(n), epsilon) for epsilon in (1.0, 4.0, 16.0))]


def intersection_table(mechanism: privacy.Mechanism, times: Sequence[int], trials: int) -> pd.DataFrame:
    """Rows (answers, requests, success, low, high): naming the real candidate from t answers, fresh or memoised."""
    rows = []
    for answers, t in itertools.product(("fresh", "memoised"), times):
        hits, done = audit.guess_by_intersection(mechanism, t, trials, memoised=answers == "memoised")
        low, high = clopper_pearson(hits, done)
        rows.append({"answers": answers, "requests": t, "success": hits / done, "low": low, "high": high})
    return pd.DataFrame(rows)


def best_guess(mechanism: privacy.Mechanism) -> float:
    """How often the best guess from the offer is right, for a uniform prior; 1/n if the offer tells nothing."""
    if mechanism.distribution is None:
        return mechanism.keeps / mechanism.m
    return privacy.success(privacy.channel(mechanism)[1], np.full(mechanism.n, 1 / mechanism.n))


def utility_table(scenes: Sequence[Scene], results: Sequence[Mapping[str, Any]],
                  epsilons: Sequence[float] = (1, 4, 16)) -> pd.DataFrame:
    """Privacy against meaning: what each mechanism tells the cloud, and how much of what was asked is in the picture.

    A mechanism's score for a real candidate is the mean over the candidates whose latent it would make the device
    finish, each with its probability. where: "hybrid", k steps of the cloud on that candidate, the device under the
    real prompt; "cloud alone", the picture of that candidate (only where a single one is sent). Candidates that differ
    in the same attributes count as one in the hybrid, of which a random one was drawn.
    """
    prompt_values = candidate_values(scene_prompt(scenes[0]))
    rows = []
    for family, epsilon, mechanism in mechanisms(prompt_values, epsilons):
        told = {"mechanism": family, "epsilon": epsilon, "own_epsilon": mechanism.epsilon, "sent": mechanism.m,
                "candidates": mechanism.n, "success": best_guess(mechanism), "hit": mechanism.keeps}
        scores: dict[tuple[str, str], list[float]] = {}
        for scene, r in zip(scenes, results, strict=True):
            values = candidate_values(scene_prompt(scene))
            for i, x in enumerate(r["reals"]):
                weights = used_instead(mechanism, values, int(x))
                groups = [members for _, members in sorted(classes_of(values, int(x)).items())]
                by_class = np.array([weights[members].sum() for members in groups])
                wanted = r["values"][x]
                right = [_right(r["found_hybrid"][x], wanted), *_right(r["found_classes"][i], wanted)]
                fits = [r["fit_hybrid"][x], *r["fit_classes"][i]]
                scores.setdefault(("hybrid", "attribute_accuracy"), []).append(float(by_class @ right))
                scores.setdefault(("hybrid", "clip_score"), []).append(float(by_class @ fits))
                if mechanism.m == 1:
                    right = _right(r["found_cloud"], wanted)
                    scores.setdefault(("cloud alone", "attribute_accuracy"), []).append(float(weights @ right))
                    scores.setdefault(("cloud alone", "clip_score"), []).append(float(weights @ r["fit_cloud"][x]))
        rows += [_row(v, **told, where=where, metric=metric) for (where, metric), v in scores.items()]
    device = [(r["found_device"], r["values"][r["reals"]], r["fit_device"]) for r in results]
    n = scenes[0].candidates
    alone = {"mechanism": "device alone", "epsilon": 0.0, "own_epsilon": 0.0, "sent": 0, "candidates": n,
             "success": 1 / n, "hit": 1.0, "where": "device alone"}
    accuracy = list(itertools.chain(*(_right(found, wanted) for found, wanted, _ in device)))
    rows += [_row(accuracy, **alone, metric="attribute_accuracy"),
             _row(list(itertools.chain(*(fit for *_, fit in device))), **alone, metric="clip_score")]
    return pd.DataFrame(rows)


def systems_table(scene: Scene, utility: pd.DataFrame, publication: pd.DataFrame) -> pd.DataFrame:
    """Table 1: each system, what the cloud can guess from the messages, what is drawn, and what the cloud pays.

    low and high are the interval of attribute_accuracy, clip_low and clip_high that of clip_score.
    Rows measured here are marked so; the cryptographic ones are placed by the cost that the paper cites (more than a
    million seconds a picture), and their privacy is that of their own proofs.
    """
    n, T, k = scene.candidates, scene.T, scene.k
    world = _load(scene.world)
    shape = cost.shape(world.cloud, tokens=world.text_encoders[0].config.max_position_embeddings)
    one = cost.macs(shape, k=1, candidates=1, guided=world.guidance["cloud"] > 1)
    at = utility.set_index(["mechanism", "epsilon", "where", "metric"]).sort_index()
    public = publication[(publication.candidates == n) & (publication.k == k) & (publication.picture == AS_MADE)]
    worst = float(public.success.max())

    def row(system: str, mechanism: str, epsilon: float, where: str, hides: str, steps: int) -> dict[str, Any]:
        score = at.loc[(mechanism, epsilon, where)]
        accuracy, fit = score.loc["attribute_accuracy"], score.loc["clip_score"]
        return {"system": system, "attributes hidden": hides, "guess": float(accuracy.success),
                "attribute_accuracy": accuracy.value, "low": accuracy.low, "high": accuracy.high,
                "clip_score": fit.value, "clip_low": fit.low, "clip_high": fit.high,
                "cloud_gmacs": steps * one / 1e9, "source": "measured here"}

    largest = max(utility[utility.mechanism == "SANTEXT"].epsilon)
    rows = [
        row("Server-Only", "plain prompt", math.inf, "cloud alone", "no", T),
        row("Client-Only", "device alone", 0.0, "device alone", "yes: nothing is sent", 0),
        row("Hybrid SD", "plain prompt", math.inf, "hybrid", "no", k),
        *(row(f"{family}, epsilon {largest:g}", family, largest, "cloud alone", "in part: noise on words", T)
          for family in ("SANTEXT", "CAPE")),
        row("random replacement, hybrid", "random replacement", 0.0, "hybrid", "yes: the word is random", k),
        row("ObCLIP", "all candidates", 0.0, "hybrid", "yes: posterior = prior", n * k),
    ]
    for system, how in (("MPCViT", "yes: secret sharing"), ("HE-Diffusion", "yes: encryption")):
        rows.append({"system": system, "attributes hidden": how, "guess": 1 / n, "source": "cited: > 1e6 s a picture"})
    table = pd.DataFrame(rows)
    table.insert(3, "guess_if_published", [worst if name == "ObCLIP" else 1.0 if name in ("Server-Only", "Hybrid SD")
                                           else math.nan for name in table.system])
    return table


# -------------------------------------------------------------------------------------------------- text and priors


def prior_of(prompt: Prompt, weights: Mapping[str, Mapping[str, float]] = ()) -> np.ndarray:
    """(N,) what the cloud believes before it sees anything: independent attributes, uniform where nothing is said.

    weights: attribute -> value -> weight, such as {"gender": {"female": 3, "male": 1}}; unnamed values weigh 1.
    """
    weights = dict(weights)
    for attribute, said in weights.items():
        unknown = set(said) - set(ATTRIBUTES.get(attribute, ()))
        if attribute not in ATTRIBUTES or unknown:
            raise ValueError(f"the prior names {attribute} {sorted(unknown)}: known are {dict(ATTRIBUTES)}")
        if min(said.values(), default=1) < 0:
            raise ValueError(f"the prior of {attribute} is {said}: weights are at least 0")
    odds = [math.prod(weights.get(attribute_of(key), {}).get(values[key], 1.0) for key in prompt.enumerated)
            for values in candidate_values(prompt)]
    if not sum(odds) > 0:
        raise ValueError(f"no candidate is possible under the prior {weights}: give some value a weight above 0")
    return np.array(odds) / sum(odds)


def posteriors_table(prompt: Prompt, priors: Mapping[str, np.ndarray],
                     chosen: Sequence[privacy.Mechanism]) -> pd.DataFrame:
    """posterior_table of privacy for several named priors, with each candidate's text."""
    texts = candidates(prompt)
    rows = [{"prior_name": name, "text": texts[row["candidate"]], **row}
            for name, prior in priors.items() for row in privacy.posterior_table(prompt.count, prior, chosen)]
    return pd.DataFrame(rows)


def what_if(text: str, protect: Sequence[str], weights: Mapping[str, Mapping[str, float]], send: int | None = None,
            epsilon: float = 1.0, k: int = 10, T: int = 25) -> tuple[pd.DataFrame, list[str]]:
    """What one request would tell and cost: a row a candidate, and sentences. send: m candidates instead of all N."""
    prompt = parse(text, protect)
    n, prior, texts = prompt.count, prior_of(prompt, weights), candidates(prompt)
    if send is not None and not 1 <= send <= n:
        raise ValueError(f"send is {send}, expected 1 to {n}, the number of candidates, or None for all of them")
    m = n if send is None else send
    everything = privacy.enumerate_all(n)
    some = privacy.subset(n, m, epsilon) if m < n else everything
    table = pd.DataFrame({"candidate": texts, "prior": prior})
    table["posterior, all sent"] = privacy.posterior(prior, privacy.channel(everything)[1][:, 0])
    told = [f"the cloud sees: {prompt.template}", f"N = {n} candidates; best guess {prior.max():.3f} before and after"]
    if m < n:
        # the offer that says most about the likeliest candidate: it, and the m - 1 least likely others
        top = int(prior.argmax())
        offer = tuple(sorted([top, *[i for i in np.argsort(prior, kind="stable") if i != top][: m - 1]]))
        heavy = math.exp(epsilon)
        likelihood = np.array([heavy if i in offer else 1.0 for i in range(n)])
        table[f"posterior, {m} sent"] = privacy.posterior(prior, likelihood)
        table["offered"] = [i in offer for i in range(n)]
        told.append(f"{some.name}: the real candidate is sent with probability {some.keeps:.3f}; worst guess "
                    f"{table[f'posterior, {m} sent'].max():.3f}, at most {heavy:.2f} times its odds before")
    told.append(f"the cloud takes {m} x {k} steps = {m * k / T:.2f} times one whole picture; "
                f"{m * privacy.LATENT_BYTES // 1024} KB of latents come back at 512 pixels")
    told += [f"cue: {note.message}" for note in prompt.notes if note.kind == "cue"]
    return table, told


def measure(preset: str, world: str, seed: int) -> tuple[list[Scene], list[dict[str, Any]]]:
    """The scenes of a preset and their results, from the cells where they were computed before."""
    chosen = setting(preset, world, seed)
    shape: Mapping[str, int] = chosen.pick(
        smoke={"scenes": 1, "candidates": 6, "T": 5, "reals": 2},
        quick={"scenes": 2, "candidates": 30, "T": 25, "reals": 15},
        full={"scenes": 12, "candidates": 30, "T": 25, "reals": 30},
    )
    scenes = [Scene(world, shape["candidates"], shape["T"], shape["reals"], 1000 * seed + i)
              for i in range(shape["scenes"])]
    return scenes, run(scenes, compute, chosen.cells, depends=depends, workers=chosen.pick(1, 1, 2), label="scenes")


# ---------------------------------------------------------------------------- what the tables say, in sentences


def picture_rows(scene: Scene, result: Mapping[str, Any]) -> list[str]:
    """Names of the rows of a scene's pictures: the values that the real prompt asks for, one below the other."""
    keys = PROTECTED[scene.candidates]
    return ["\n".join(ATTRIBUTES[key][v] for key, v in zip(keys, result["values"][x], strict=True))
            for x in result["reals"][:len(result["pictures"])]]


def figure4_findings(table: pd.DataFrame, margin: float = 0.05) -> list[str]:
    """For each share, whether the meaning survived: whether the interval of the loss stays within `margin`."""
    rows = table[table.metric == "attribute_accuracy"]
    single, pairs = (rows[mask].set_index("share") for mask in (rows.against_share.isna(), rows.against_share.notna()))
    told = [f"real prompt from the start: {single.value[100]:.2f} of the attributes are right; "
            f"the other candidate's values would score {single.chance[100]:.2f}"]
    for share, row in pairs.sort_index(ascending=False).iterrows():
        verdict = ("meaning kept" if row.low >= -margin else "meaning lost" if row.high < -margin
                   else "not decided by this sample")
        told.append(f"real prompt governs {share:>2} % of the steps: {single.value[share]:.2f}, {row.value:+.2f} "
                    f"[{row.low:+.2f}, {row.high:+.2f}]: {verdict}")
    return told


def publication_findings(table: pd.DataFrame, k: int) -> list[str]:
    """What each attack on a published picture reaches at k for the largest N, beside guessing."""
    rows = table[(table.k == k) & (table.candidates == table.candidates.max())]
    told = []
    for attack in ATTACKS:
        made, posted = (rows[(rows.attack == attack) & (rows.picture == name)].iloc[0] for name in (AS_MADE, JPEG))
        verdict = "better than guessing" if made.low > made.guess else "not better than guessing, as far as this shows"
        told.append(f"{attack}: {made.success:.0%} [{made.low:.0%}, {made.high:.0%}] of the pictures as made, "
                    f"{posted.success:.0%} as JPEG; guessing {made.guess:.1%}: {verdict}")
    return told


def utility_findings(table: pd.DataFrame) -> list[str]:
    """Which word mechanism comes nearest to the full enumeration's accuracy, with its CLIP score and its price in
    privacy."""
    keys = ["mechanism", "epsilon", "where"]
    rows, fits = (table[table.metric == metric].set_index(keys) for metric in ("attribute_accuracy", "clip_score"))
    rows = rows.assign(fit=fits.value).reset_index()
    ours = rows[(rows.mechanism == "all candidates")].iloc[0]
    device = rows[rows.mechanism == "device alone"].iloc[0]
    told = [f"all candidates: accuracy {ours.value:.2f}, CLIP score {ours.fit:.3f}, "
            f"the cloud guesses {ours.success:.0%}",
            f"device alone: accuracy {device.value:.2f}, CLIP score {device.fit:.3f}, "
            f"nothing is sent, so the guess stays at {device.success:.0%}"]
    for family in ("random replacement", "SANTEXT", "CAPE"):
        for where in ("hybrid", "cloud alone"):
            best = rows[(rows.mechanism == family) & (rows["where"] == where)].sort_values("value").iloc[-1]
            relation = "above" if best.value > ours.value else "below" if best.value < ours.value else "equal to"
            told.append(f"{family}, {where}, at epsilon {best.epsilon:g}: accuracy {best.value:.2f} ({relation} ours), "
                        f"CLIP score {best.fit:.3f}, the cloud guesses {best.success:.0%}")
    return told


def publication_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The publication attacks as rows of attacks.csv; bound 1, as no mechanism bounds them."""
    made = table[table.picture == AS_MADE]
    return [{"mechanism": "enumerate_all", "attack": f"publication ({row.attack}, k={row.k})",
             "candidates": row.candidates, "success": row.success, "low": row.low, "high": row.high, "bound": 1.0}
            for row in made.itertuples()]
