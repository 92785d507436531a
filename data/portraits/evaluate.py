"""Measures the world `portraits` on 300 held-out prompts: the last part of ``make world``.

Writes data/portraits/quality.csv (every target beside what was measured), split_matters.csv (does it matter whose
latent the device is handed?) and samples.png. Everything is judged by the scorer, which never trained the generator.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL
from pictures import CONTEXT, HERE, PROMPTS, pictures, record
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from obclip_core import cost, metrics, worlds
from obclip_core.denoise import HandOver, Offer, Secret, Split, decode, finish, run
from obclip_core.prompts import ATTRIBUTES, candidate_values, candidates, fill, parse, real_index
from obclip_core.sweep import write_whole

KID_PICTURES = 2000  # held-out drawings that KID compares with


def held_out_prompts(count: int) -> tuple[list[str], list[dict[str, str]]]:
    """Prompts of the N = 30 templates, with the values of held-out pictures; no other part of the world saw them."""
    rng = random.Random("held-out prompts")
    values = [record(40_000_000 + i) for i in range(count)]
    return [fill(rng.choice(PROMPTS["templates"]["n30"]), row) for row in values], values


def drawings(part: str, count: int) -> tuple[Tensor, list[dict[str, str]]]:
    images, values = pictures(part, count)
    return torch.from_numpy(images[:]).permute(0, 3, 1, 2).float() / 255, values


def alone(world: worlds.World, side: str, prompts: list[str], steps: int) -> Tensor:
    """Pictures (N, 3, 64, 64) that one side makes by itself; five prompts at a time start from one noise."""
    # Either side's U-Net stands in the cloud's place, since the cloud's half takes many prompts in one call.
    one = replace(world, cloud=world.unet(side))
    found = []
    for i in tqdm(range(0, len(prompts), 5), f"{side} alone", disable=None):
        offer = Offer(tuple(prompts[i : i + 5]), seed=i, split=Split(T=steps, k=steps))
        found.append(run(one, offer).latents)
    return decode(world, torch.cat(found))


def shares(scorer: metrics.Scorer, images: Tensor, values: list[dict[str, str]]) -> dict[str, float]:
    """Share of pictures with the right value, for each attribute and context word, and the mean over context words."""
    right = {name: float(np.mean(found)) for name, found in scorer.correct(images, values).items()}
    return {**right, "context": float(np.mean([right[name] for name in CONTEXT]))}


def split_matters(world: worlds.World, scorer: metrics.Scorer, real: Tensor, count: int, ks: list[int]) -> list[dict]:
    """Accuracy and KID when the device finishes from the right, the mean, or a wrong candidate's latent.

    The wrong candidate differs from the real one in all three attributes. The mean is over ten of the thirty
    candidates, one of each gender and ethnicity with ages in turn, all from the same noise.
    """
    prompts, values = held_out_prompts(count)
    made: dict[tuple[int, str], list[Tensor]] = {(k, name): [] for k in ks for name in ("right", "mean", "wrong")}
    for i, text in enumerate(tqdm(prompts, "whose latent", disable=None)):
        prompt = parse(text)
        every, others, j = candidates(prompt), candidate_values(prompt), real_index(prompt)
        far = [n for n, v in enumerate(others) if all(v[a] != others[j][a] for a in ATTRIBUTES)]
        wrong = random.Random(f"wrong candidate {i}").choice(far)
        place = [[list(ATTRIBUTES[a]).index(v[a]) for a in ATTRIBUTES] for v in others]
        ten = [n for n, (age, gender, ethnicity) in enumerate(place) if (age + gender + ethnicity) % 3 == i % 3]
        chosen = list(dict.fromkeys([j, wrong, *ten]))
        offer = Offer(tuple(every[n] for n in chosen), seed=i, split=Split(T=world.T, k=max(ks), hand_over="restart"))
        seen: dict[int, Tensor] = {}
        handed = run(world, offer, on_step=lambda step, z, seen=seen: seen.update({step + 1: z.clone()}))
        for k in ks:
            own = Offer((text,), seed=i, split=Split(T=world.T, k=k, hand_over="restart"))
            mean = seen[k][[chosen.index(n) for n in ten]].mean(0)
            for name, z in {"right": seen[k][0], "mean": mean, "wrong": seen[k][1]}.items():
                one = HandOver(z[None], k, world.T, handed.scheduler, mode="restart")
                made[k, name].append(finish(world, own, one, Secret(0)))
    rows = []
    for (k, name), latents in made.items():
        images = decode(world, torch.cat(latents))
        found = shares(scorer, images, values)
        kept = {a: found[a] for a in (*ATTRIBUTES, "context")}
        kid = metrics.kid(scorer.features(images), scorer.features(real))
        rows.append({"k": k, "latent": name, "n": count, **kept, "kid": kid})
    return rows


def write_table(rows: list[dict], name: str) -> None:
    text = pd.DataFrame(rows).to_csv(index=False, float_format="%.4f", lineterminator="\n")
    write_whole(HERE / f"{name}.csv", text.encode())
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--split-prompts", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    world = worlds.load("portraits")
    scorer = metrics.scorer(world)
    real, truth = drawings("held_out", KID_PICTURES)
    rows: list[dict] = []

    def add(metric: str, target: str, measured: float, n: int) -> None:
        rows.append({"metric": metric, "target": target, "measured": round(float(measured), 4), "n": n})
        print(rows[-1], flush=True)

    drawn = shares(scorer, real, truth)
    for name in ATTRIBUTES:
        add(f"scorer on held-out drawings: {name}", ">=0.97", drawn[name], len(real))
    for name in CONTEXT:
        add(f"scorer on held-out drawings: {name}", ">=0.95", drawn[name], len(real))

    with torch.no_grad():
        vae: AutoencoderKL = world.vae
        x = real[:500] * 2 - 1
        error = torch.cat(
            [
                (vae.decode(vae.encode(p).latent_dist.mean).sample.clamp(-1, 1) - p).square().mean((1, 2, 3))
                for p in x.split(50)
            ]
        )
    add("VAE reconstruction, PSNR in dB", ">=25", float((10 * torch.log10(4 / error)).mean()), len(x))

    prompts, values = held_out_prompts(args.prompts)
    made = {side: alone(world, side, prompts, world.T) for side in ("cloud", "device")}
    kid = {}
    for side, least in (("cloud", ">=0.93"), ("device", ">=0.75")):
        found = shares(scorer, made[side], values)
        for name in ATTRIBUTES:
            add(f"{side} alone: {name}", least, found[name], len(prompts))
        add(f"{side} alone: context", ">=0.80" if side == "cloud" else "", found["context"], len(prompts))
        kid[side] = metrics.kid(scorer.features(made[side]), scorer.features(real))
        add(f"{side} alone: KID", "" if side == "cloud" else f">{kid['cloud']:.4f}", kid[side], len(prompts))

    lcm = worlds.load("portraits", cloud="cloud_lcm")
    few = alone(lcm, "cloud", prompts, lcm.cloud_T)
    found = shares(scorer, few, values)
    for name in (*ATTRIBUTES, "context"):
        add(f"step-distilled cloud, {lcm.cloud_T} steps: {name}", "", found[name], len(prompts))

    one = Offer((prompts[0],), seed=0, split=Split(T=world.T, k=world.T))
    run(world, one)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        decode(world, run(world, one).latents)
        seconds.append(time.perf_counter() - began)
    add(f"cloud picture of {world.T} steps, seconds on {args.threads} threads", "<=0.8", float(np.median(seconds)), 5)

    tokens = world.text_encoders[0].config.max_position_embeddings
    macs = {side: cost.step_macs(cost.shape(world.unet(side), tokens=tokens)) for side in ("cloud", "device")}
    add("device's multiply-adds a step over the cloud's", "<=0.40", macs["device"] / macs["cloud"], 1)
    size = sum(f.stat().st_size for f in (HERE / "weights").rglob("*.safetensors")) / 1e6
    add("all weights, MB", "<=60", size, 1)
    write_table(rows, "quality")

    matters = split_matters(world, scorer, real, args.split_prompts, [3, 5, 10, 15])
    write_table(matters, "split_matters")

    columns = [torch.stack([real[i], made["cloud"][i], made["device"][i], few[i]]) for i in range(12)]
    sheet = torch.cat([torch.cat(list(c), dim=1) for c in columns], dim=2)
    Image.fromarray((sheet * 255).round().byte().permute(1, 2, 0).numpy()).save(HERE / "samples.png")


if __name__ == "__main__":
    main()
