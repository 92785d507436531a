"""Notebook 00: the paper's systems as arguments of one function, and what each of them costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch

from obclip_core import cost
from obclip_core.accelerate import Schedule
from obclip_core.denoise import Offer, Result, Secret, Split, decode, generate, run
from obclip_core.prompts import Prompt, candidates, real_index
from obclip_core.service import wire
from obclip_core.worlds import World


def systems(prompt: Prompt, T: int, k: int, seed: int, acceleration: Schedule) -> dict[str, tuple[Offer, Secret]]:
    """Each system that the paper compares, by name, as the offer and the secret that make it so."""
    own, everyone = (prompt.text,), candidates(prompt)
    alone, real = Secret(0), Secret(real_index(prompt))
    return {
        "cloud-only": (Offer(own, seed, Split(T, k=T)), alone),
        "Hybrid SD": (Offer(own, seed, Split(T, k=k)), alone),
        "vanilla OG": (Offer(everyone, seed, Split(T, k=T)), real),
        "ObCLIP": (Offer(everyone, seed, Split(T, k=k)), real),
        "ObCLIP + caches": (Offer(everyone, seed, Split(T, k=k), acceleration), real),
        "device-only": (Offer(own, seed, Split(T, k=0)), alone),
    }


def bill(world: World, offer: Offer, result: Result | None = None) -> dict[str, Any]:
    """What an offer costs each side: steps, multiply-adds (from shapes), bytes on the wire and, where run, seconds.

    Multiply-adds count both branches of guidance. A device that works alone sends nothing. Bytes are those of the
    envelopes: the offer up, the hand-over down in fp16.
    """
    split, tokens = offer.split, [encoder.config.max_position_embeddings for encoder in world.text_encoders][0]
    shapes = {side: cost.shape(world.unet(side), tokens=tokens) for side in ("cloud", "device")}
    guided = {side: world.guidance[side] > 1 for side in shapes}
    plain = cost.macs(shapes["cloud"], k=split.T, guided=guided["cloud"])
    schedule = offer.acceleration or Schedule()
    cloud = cost.macs(shapes["cloud"], schedule, split.cloud_steps, offer.N, guided=guided["cloud"])
    row = {
        "candidates": offer.N,
        "cloud_steps": split.cloud_steps,
        "device_steps": split.device_steps,
        "cloud_gmacs": cloud / 1e9,
        "device_gmacs": cost.macs(shapes["device"], k=split.device_steps, guided=guided["device"]) / 1e9,
        "plain_generations": cloud / plain,
    }
    if result is not None:
        used = split.cloud_steps > 0
        row["bytes_up"] = len(wire.pack_offer(offer)) if used else 0
        row["bytes_down"] = len(wire.pack_hand_over(result.hand_over)) if used else 0
        row["cloud_seconds"], row["device_seconds"] = result.seconds["cloud"], result.seconds["device"]
    return row


def compare(world: World, offers: Mapping[str, tuple[Offer, Secret]]) -> tuple[pd.DataFrame, torch.Tensor]:
    """Run each system once: its bill, a row a system, and its picture (N, 3, H, W)."""
    rows, images = [], []
    for name, (offer, secret) in offers.items():
        result = generate(world, offer, secret)
        rows.append({"system": name, **bill(world, offer, result)})
        images.append(result.image)
    return pd.DataFrame(rows), torch.stack(images)


def film(world: World, offer: Offer, steps: list[int]) -> torch.Tensor:
    """What the cloud's latents look like when decoded after some of its steps: (steps, N, 3, H, W)."""
    seen: dict[int, torch.Tensor] = {}
    run(world, offer, on_step=lambda step, z: seen.update({step + 1: z.clone()}))
    return torch.stack([decode(world, seen[step]) for step in steps])


def gallery(world: World, prompts: list[Prompt], T: int, k: int, seed: int) -> torch.Tensor:
    """Pictures (systems, prompts, 3, H, W) of cloud-only, ObCLIP and device-only, one noise a prompt.

    ObCLIP's picture is made from the real candidate alone: the other candidates change what the cloud sees, not what
    the device gets (a test holds this).
    """
    splits = [Split(T, k=T), Split(T, k=k), Split(T, k=0)]
    return torch.stack([
        torch.stack([generate(world, Offer((prompt.text,), seed + i, split), Secret(0)).image
                     for i, prompt in enumerate(prompts)])
        for split in splits
    ])  # fmt: skip
