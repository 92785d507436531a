"""Notebook 02's computations: a batch of prompts equals Algorithm 1 prompt by prompt; tables say what they hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from obclip_core import worlds
from obclip_core.accelerate import Schedule
from obclip_core.denoise import Offer, Secret, Split, finish, run
from obclip_core.experiments import hybrid_split as split
from obclip_core.experiments.hybrid_split import noise, taken, walk

TEXTS, SEEDS = tiny.CANDIDATES[:3], (5, 0, 9)


def apart(a, b):
    return float((a - b).abs().max())


def test_a_walk_of_many_prompts_is_algorithm_1_of_each(tiny_world):
    T, k = 6, 4
    cloud = walk(tiny_world, "cloud", TEXTS, SEEDS, noise(tiny_world, "cloud", T, SEEDS), [2, k, T])
    ends = walk(tiny_world, "device", TEXTS, SEEDS, taken(tiny_world, "device", cloud[k]), [T])[T].latents
    again = walk(tiny_world, "device", TEXTS, SEEDS, taken(tiny_world, "device", cloud[k], "restart"), [T])[T].latents
    for i, (text, seed) in enumerate(zip(TEXTS, SEEDS, strict=True)):
        for mode, latents in (("exact", ends), ("restart", again)):
            offer = Offer((text,), seed, Split(T, k, hand_over=mode))
            one = finish(tiny_world, offer, run(tiny_world, offer), Secret(0))
            assert apart(latents[i], one[0]) < 1e-5, (text, mode)
        whole = run(tiny_world, Offer((text,), seed, Split(T, T))).latents[0]
        assert apart(cloud[T].latents[i], whole) < 1e-5
    assert apart(ends, again) > 1e-3


def test_the_device_first_walk_is_algorithm_1_too(tiny_world):
    T, k = 5, 2
    device = walk(tiny_world, "device", TEXTS, SEEDS, noise(tiny_world, "device", T, SEEDS), [k, T])
    ends = walk(tiny_world, "cloud", TEXTS, SEEDS, taken(tiny_world, "cloud", device[k]), [T])[T].latents
    offer = Offer(TEXTS[1:2], SEEDS[1], Split(T, k, first="device"))
    assert apart(ends[1:2], finish(tiny_world, offer, run(tiny_world, offer), Secret(0))) < 1e-5


def test_a_distilled_cloud_that_draws_noise_walks_as_run_does(judged_world):
    world = split.few_steps(judged_world)
    assert world.cloud_T == 8 and split.loaded(judged_world).cloud_T is None
    one = Split(25, 4, cloud_T=8, shift=8)
    given = walk(world, "cloud", TEXTS, SEEDS, noise(world, "cloud", 8, SEEDS), [4])[4]
    joined = taken(world, "device", given, T=25, join=12)
    assert joined.mode == "restart" and joined.step == 12
    ends = walk(world, "device", TEXTS, SEEDS, joined, [25])[25].latents
    for i, (text, seed) in enumerate(zip(TEXTS, SEEDS, strict=True)):
        offer = Offer((text,), seed, one)
        handed = run(world, offer)
        assert apart(given.latents[i], handed.latents[0]) < 1e-5
        assert apart(ends[i], finish(world, offer, handed, Secret(0))[0]) < 1e-5


def test_an_accelerated_walk_keeps_prompts_apart_and_refuses_batch_reuse(tiny_world):
    schedule = Schedule.points(4, 2, reuse=False)
    begin = noise(tiny_world, "cloud", 6, SEEDS)
    fast = walk(tiny_world, "cloud", TEXTS, SEEDS, begin, [4], schedule)[4].latents
    offer = Offer(TEXTS[2:], SEEDS[2], Split(6, 4), schedule)
    assert apart(fast[2:], run(tiny_world, offer).latents) < 1e-5
    with pytest.raises(ValueError, match="batch reuse"):
        walk(tiny_world, "cloud", TEXTS, SEEDS, begin, [4], Schedule.points(4, 2))


def test_a_world_without_a_distilled_cloud_walks_its_own_in_few_steps(tmp_path):
    tiny.save(tmp_path)
    text = (tmp_path / "world.toml").read_text("utf-8")
    start = text.index("[cloud_lcm]")
    (tmp_path / "world.toml").write_text(text[:start] + text[text.index("[device]"):], "utf-8")
    world = split.few_steps(str(tmp_path))
    assert world.cloud_T == 8 and world.guidance["cloud"] == 5.0


@pytest.fixture(scope="module")
def swept(judged_world):
    cells = split.sweep_grid(judged_world, 5, (0, 1, 2, 5), prompts=3, seeds=2, block=2, restarts=(2,), shown=1)
    return cells, [split.sweep_cell(cell) for cell in cells]


def test_the_sweep_has_one_picture_a_prompt_seed_order_and_share(swept):
    cells, results = swept
    assert [(cell.first, cell.count, cell.seed, cell.shown) for cell in cells] == [
        (0, 2, 0, 1), (2, 1, 0, 0), (0, 2, 1, 0), (2, 1, 1, 0)]
    whole = split.gathered(cells, results, ("features", *split.SCORES))
    assert whole["features"].shape == (2, 4, 3, 2, 8) and whole["attribute_accuracy"].shape == (2, 4, 3, 2)
    assert results[0]["pictures"].shape[:3] == (2, 4, 1)
    for end in (0, 3):  # who goes first does not matter when one side takes all steps
        assert np.array_equal(whole["features"][0, end], whole["features"][1, end])
    assert not np.array_equal(whole["features"][0, 1], whole["features"][1, 1])
    assert not np.array_equal(whole["features"][0, 0, :, 0], whole["features"][0, 0, :, 1])  # the seeds differ


def test_the_sweep_picture_is_the_offers_own(judged_world, swept):
    world, cells = split.loaded(judged_world), swept[0]
    _, texts, _ = split.asked(world, 0, 1)
    offer = Offer(tuple(texts), 0, Split(5, 2))
    image = split._picture(world, offer, 0)
    kept = split.pictures(swept[1][0]["pictures"])[0, cells[0].cloud_steps.index(2), 0]
    assert apart(image, kept) <= 0.51 / 255 + 1e-4


def test_the_split_table_pairs_orders_and_names_its_numbers(swept):
    cells, results = swept
    real = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
    table = split.split_table(cells, results, real)
    single = table[table.against_order.isna() & table.against_share.isna()]
    assert len(single) == 8 and set(single.share) == {0.0, 20.0, 40.0, 100.0} and set(single.n) == {6}
    row = single[(single.order == "cloud-first") & (single.k == 2)].iloc[0]
    whole = split.gathered(cells, results, split.SCORES)
    assert row.attribute_accuracy == pytest.approx(whole["attribute_accuracy"][0, 2].mean())
    assert row.attribute_accuracy_low <= row.attribute_accuracy <= row.attribute_accuracy_high
    assert row.fid > 0 and "biased" in row.fid_note
    pair = table[table.against_order == "device-first"]
    assert list(pair.share) == [20.0, 40.0]
    context = whole["context_accuracy"]
    assert pair.context_accuracy.iloc[1] == pytest.approx((context[0, 2] - context[1, 2]).mean())
    kid = {order: single[(single.order == order) & (single.k == 2)].kid.iloc[0] for order in split.ORDERS}
    assert pair.kid.iloc[1] == pytest.approx(kid["cloud-first"] - kid["device-first"], abs=1e-9)
    assert "up to 40 %" in split.finding(table) and len(split.restart_table(cells, results)) == 4


def test_the_favoured_order_follows_the_interval_and_the_metrics_direction():
    row = {"share": 20.0, "against_order": "device-first"}
    row |= {f"{name}{end}": value for name in split.NAMES for end, value in (("", -1), ("_low", -2), ("_high", -0.5))}
    better = split.differences(pd.DataFrame([row])).set_index("metric").better
    assert better["KID"] == "cloud-first" and better["CLIP score"] == "device-first"
    row["kid_high"] = 0.1
    assert split.differences(pd.DataFrame([row])).set_index("metric").better["KID"] == "undecided"


def test_exact_hand_overs_lose_nothing_and_restarts_only_what_a_multistep_solver_remembers(judged_world):
    cells = [split.HandOvers(judged_world, "device", name, 16, (1, 8, 15)) for name in split.SCHEDULERS]
    table = split.hand_over_table(cells, [split.hand_over_cell(cell) for cell in cells])
    assert list(table) == ["scheduler", "k", "mode", "max_abs_diff", "picture_rms_255"] and len(table) == 18
    assert (table[table["mode"] == "exact"].max_abs_diff < 1e-4).all()
    lost = table[(table["mode"] == "restart") & (table.scheduler == "dpmsolver++")].set_index("k").max_abs_diff
    assert lost[8] > 1e-4 and lost[15] < 1e-4  # the last step is of first order, and remembers nothing
    assert (table[(table["mode"] == "restart") & (table.scheduler != "dpmsolver++")].max_abs_diff < 1e-4).all()


def test_shifts_are_measured_as_in_table_4(judged_world):
    cells = split.shift_grid(judged_world, 25, 4, (0, 8), (8,), prompts=2, seeds=1, block=2, shown=1)
    results = [split.shift_cell(cell) for cell in cells]
    assert cells[0].methods == ("cloud-only", "device-only", "obclip shift=8", "obclip+cache shift=0",
                                "obclip+cache shift=8")
    real = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
    table = split.shift_table(cells, results, real, derived=8)
    pairs = table[table.against.notna()]
    assert set(zip(pairs.method, pairs.against, strict=True)) == {
        ("obclip+cache shift=8", "obclip+cache shift=0"), ("obclip shift=8", "cloud-only")}
    scored = table[table.metric == "inception_score"]
    assert set(scored.method) == set(cells[0].methods) and (scored.value >= 1).all()
    found = split.shift_finding(table, 8).set_index("metric")
    assert set(found.best) <= {0, 8} and (found["derived is"] != "").all()


def test_the_rule_finds_the_step_of_equal_noise(judged_world):
    world = split.few_steps(judged_world)
    rule = split.shift_rule(world, 25)
    assert list(rule.k) == list(range(1, 8)) and (rule["join"] == rule.k + rule["shift"]).all()
    gap = (rule.cloud_log_snr - rule.device_log_snr).abs()
    levels = split.noise_levels(world, 25)
    device = levels[levels.schedule == "device, 25 steps"].log_snr.to_numpy()
    for row, own in zip(rule.itertuples(), gap, strict=True):
        assert own == pytest.approx(np.abs(device - row.cloud_log_snr).min())
        assert abs(row.shift - row.shift_between) <= 1
    assert split.around(8, 25, 4, near=1) == (0, 4, 7, 8, 9, 10) and max(split.around(20, 25, 4)) == 20


def test_envelopes_are_measured_in_every_coding(judged_world):
    cells = [split.Envelope(judged_world, N, 5, 2, 0) for N in (1, 2)]
    results = [split.envelope_cell(cell) for cell in cells]
    table = split.envelope_table(cells, results)
    assert len(table) == 16
    at = table.set_index(["N", "mode", "coding"])
    assert at.picture_rms_255[2, "exact", "raw"] == 0 and at.fewer_than_fp16[2, "exact", "fp16"] == 1
    assert at.bytes_a_candidate[2, "restart", "int8"] < at.bytes_a_candidate[2, "restart", "fp16"]
    assert at.latent_rms[2, "exact", "int8"] > at.latent_rms[2, "exact", "fp16"] > 0
    sent = split.traffic(table, split.loaded(judged_world))
    assert set(sent.world) == {"sd", "sdxl", "tiny"} and set(sent.N) == {1, 2} and set(sent["mode"]) == set(split.MODES)


def test_a_picture_starts_the_cloud_and_leaks_less_the_more_it_is_noised(judged_world):
    cell = split.FromPicture(judged_world, 6, (1, 4), 1, count=2, shown=1)
    result = split.from_picture_cell(cell)
    assert result["pictures"].shape[:2] == (5, 1) and result["read"].shape == (2, 2)
    table = split.from_picture_table(cell, result)
    assert list(table.step) == [1, 4] and table.noised_share.iloc[0] > table.noised_share.iloc[1]
    assert result["ssim"][1].mean() > result["ssim"][0].mean()  # starting later keeps more of the picture


@pytest.mark.parametrize("distilled", [False, True])
def test_the_grid_shows_the_cloud_every_k_and_the_device(judged_world, distilled):
    cell = split.Grid(judged_world, 25 if distilled else 6, (4, 2), "n6", 1, distilled=distilled)
    shown = split.grid_cell(cell)["pictures"]
    assert shown.shape[:3] == (2, 1, 4)
    plain, fast = shown[:, 0].float()
    assert torch.equal(plain[0], fast[0]) and torch.equal(plain[3], fast[3])
    assert not torch.equal(plain[1], fast[1])


def test_wrong_sweeps_are_refused():
    with pytest.raises(ValueError, match="expected numbers from 0 to T = 5"):
        split.Sweep("portraits", 5, (0, 6), 0, 1, 0)
    with pytest.raises(ValueError, match="expected some of cloud_steps"):
        split.Sweep("portraits", 5, (0, 5), 0, 1, 0, restarts=(5,))


def test_the_two_copies_share_model_and_scheduler(tiny_world):
    world = split.two_copies(tiny_world, "device", "ddim")
    assert world.cloud is world.device is tiny_world.device and world.schedulers["cloud"] is world.schedulers["device"]
    assert world.schedulers["cloud"].config.prediction_type == "v_prediction"
    with pytest.raises(ValueError, match="expected one of"):
        split.two_copies(tiny_world, "device", "heun")
    assert isinstance(replace(world, name="other"), worlds.World)
