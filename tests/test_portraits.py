"""The embedded world: its drawings, captions, weights, and the tables that say how good it is."""

from __future__ import annotations

import random
import sys
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open

from obclip_core import cost, metrics, worlds
from obclip_core.denoise import Offer, Secret, Split, decode, finish, run
from obclip_core.prompts import ATTRIBUTES, candidate_values, candidates, fill, parse, real_index

PORTRAITS = Path(__file__).resolve().parents[1] / "data" / "portraits"
sys.path.insert(0, str(PORTRAITS))

import draw  # noqa: E402
import pictures  # noqa: E402

WEIGHTS = sorted((PORTRAITS / "weights").rglob("*.safetensors"))


@pytest.fixture(scope="module")
def world():
    return worlds.load("portraits")


@pytest.fixture(scope="module")
def scorer(world):
    return metrics.scorer(world)


def drawn(count: int, first: int = 50_000_000) -> tuple[torch.Tensor, list[dict[str, str]]]:
    values = [pictures.record(first + i) for i in range(count)]
    images = np.stack([draw.draw(row, first + i) for i, row in enumerate(values)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, values


def test_a_drawing_is_a_function_of_values_and_seed():
    values = pictures.record(7)
    assert np.array_equal(draw.draw(values, 7), draw.draw(values, 7))
    assert not np.array_equal(draw.draw(values, 7), draw.draw(values, 8))


def test_every_value_of_every_word_is_drawn():
    for name, value in ((name, v) for name, values in pictures.VALUES.items() for v in values):
        picture = draw.draw({**pictures.record(3), name: value}, 3)
        assert picture.shape == (64, 64, 3) and picture.std() > 20


def test_what_another_garment_changes_lies_where_the_weights_say():
    for seed in range(12):
        values = pictures.record(seed)
        other = {**values, "garment": "apron" if values["garment"] == "hoodie" else "hoodie"}
        change = np.abs(draw.draw(values, seed).astype(int) - draw.draw(other, seed)).mean(2)
        change = change.reshape(16, 4, 16, 4).mean((1, 3))
        weights = draw.where_words_show(values, seed, 16)
        assert 0 == weights.min() < weights.max() <= 1
        assert change[weights > 0].sum() >= 0.75 * change.sum() > 0


def test_an_unknown_place_is_refused_by_name():
    with pytest.raises(ValueError, match="on the moon"):
        draw.background(random.Random(0), "on the moon")


def test_skin_tones_of_neighbouring_values_overlap_and_are_natural():
    def ends(name):
        return [np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c in draw.SKIN[name]]

    for name in ATTRIBUTES["ethnicity"]:
        for red, green, blue in ends(name):
            assert red > green > blue, f"{name} has a skin tone that nobody has"
    for light, dark in (("caucasian", "european"), ("european", "asian"), ("asian", "indian"), ("indian", "african")):
        assert ends(dark)[0].sum() > ends(light)[1].sum(), f"{light} and {dark} do not overlap"


def test_the_seeds_of_the_parts_do_not_meet():
    firsts = sorted(pictures.FIRST_SEED.values())
    assert min(b - a for a, b in zip(firsts, firsts[1:], strict=False)) > 1_000_000


@pytest.mark.parametrize("kind, number", [("n30", 30), ("n6", 6), ("n2", 2), ("general", 1)])
def test_each_set_of_prompts_has_its_number_of_candidates(kind, number):
    for template, row in product(pictures.PROMPTS["templates"][kind], range(4)):
        values = pictures.record(row)
        prompt = parse(fill(template, values))
        found = candidates(prompt)
        assert len(found) == number, f"{template!r} has {len(found)} candidates"
        mine = candidate_values(prompt)[real_index(prompt)]
        assert all(values[name] == value for name, value in mine.items())


def test_tokens_know_the_captions_and_map_other_words_to_unknown(world):
    (tokenizer,) = world.tokenizers
    unknown = tokenizer.unk_token_id
    rng = random.Random(1)
    for i in range(200):
        ids = tokenizer(pictures.caption(pictures.record(i), rng)).input_ids
        assert unknown not in ids and len(ids) <= tokenizer.model_max_length
    assert tokenizer("zeppelin").input_ids[1:-1] == [unknown]


def test_all_weights_together_are_small_and_half_precision():
    assert sum(path.stat().st_size for path in WEIGHTS) <= 60e6
    for path in WEIGHTS:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} <= {"F16", "I64"}, path.parent.name


def test_the_device_is_a_block_removed_student_of_the_cloud(world):
    cloud, device = world.cloud, world.device
    assert 8e6 <= sum(p.numel() for p in cloud.parameters()) <= 20e6
    assert cloud.mid_block is not None and device.mid_block is None
    blocks = [sum(type(part).__name__ == "ResnetBlock2D" for part in unet.modules()) for unet in (device, cloud)]
    assert blocks[0] < blocks[1]
    tokens = world.text_encoders[0].config.max_position_embeddings
    macs = [cost.step_macs(cost.shape(unet, tokens=tokens)) for unet in (device, cloud)]
    assert macs[0] / macs[1] <= 0.40


def test_the_scorer_reads_drawings(scorer):
    images, values = drawn(200)
    right = scorer.correct(images, values)
    for name in ATTRIBUTES:
        assert np.mean(right[name]) >= 0.94
    assert np.mean([np.mean(right[name]) for name in pictures.CONTEXT]) >= 0.92


def test_the_vae_keeps_drawings(world):
    images, _ = drawn(40)
    with torch.no_grad():
        again = world.vae.decode(world.vae.encode(images * 2 - 1).latent_dist.mean).sample.clamp(-1, 1) / 2 + 0.5
    error = (again - images).square().mean((1, 2, 3))
    assert float((10 * torch.log10(1 / error)).mean()) >= 25


def test_pictures_of_the_cloud_show_what_was_asked_for(world, scorer):
    values = [{**pictures.record(60_000_000 + i), "gender": ("male", "female")[i % 2]} for i in range(8)]
    prompts = tuple(fill(pictures.PROMPTS["templates"]["n30"][0], row) for row in values)
    handed = run(world, Offer(prompts, seed=1, split=Split(T=world.T, k=world.T)))
    right = scorer.correct(decode(world, handed.latents), values)
    # Chance is 1/3, 1/2 and 1/5; eight prompts are enough to tell a world that draws from one that does not.
    assert np.mean([np.mean(right[name]) for name in ATTRIBUTES]) >= 0.75


def test_the_device_finishes_what_the_cloud_began(world, scorer):
    values = [pictures.record(70_000_000 + i) for i in range(4)]
    made = []
    for row in values:
        prompt = parse(fill(pictures.PROMPTS["templates"]["n30"][1], row))
        offer = Offer(candidates(prompt), seed=2, split=Split(T=world.T, k=10))
        made.append(finish(world, offer, run(world, offer), Secret(real_index(prompt))))
    right = scorer.correct(decode(world, torch.cat(made)), values)
    assert np.mean([np.mean(right[name]) for name in ATTRIBUTES]) >= 0.7


def test_every_target_stands_in_the_table_with_what_was_measured():
    table = pd.read_csv(PORTRAITS / "quality.csv").fillna("")
    assert list(table.columns) == ["metric", "target", "measured", "n"]
    known = set(table.metric)
    wanted = {f"scorer on held-out drawings: {name}" for name in pictures.VALUES}
    wanted |= {f"{side} alone: {name}" for side, name in product(("cloud", "device"), (*ATTRIBUTES, "context", "KID"))}
    assert wanted <= known, f"quality.csv lacks {sorted(wanted - known)}"
    assert any("PSNR" in m for m in known) and any("seconds" in m for m in known) and any("MB" in m for m in known)


def test_the_table_of_the_split_has_all_latents_at_all_k():
    table = pd.read_csv(PORTRAITS / "split_matters.csv")
    assert set(product((3, 5, 10, 15), ("right", "mean", "wrong"))) == set(zip(table.k, table.latent, strict=True))
    assert table[[*ATTRIBUTES, "context"]].to_numpy().min() >= 0 and table.n.min() >= 50


def test_every_part_has_its_curve():
    for part in ("vae", "text", "scorer", "cloud", "device", "cloud_lcm"):
        curve = pd.read_csv(PORTRAITS / "curves" / f"{part}.csv")
        losses = curve.drop(columns=["step", "seconds"]).sum(axis=1)
        assert losses.iloc[-1] < losses.iloc[0] and curve.seconds.is_monotonic_increasing


def test_poses_of_the_values_differ():
    for a, b in combinations(draw.POSE.values(), 2):
        assert abs(a[0] - b[0]) >= 6 or abs(a[1] - b[1]) >= 8
