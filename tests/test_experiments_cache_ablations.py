"""Notebook 03's measurements: the short cut is exact, what is watched happens, what is told is in the tables."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from obclip_core import cost, figures, metrics, worlds
from obclip_core.accelerate import NONE, PAPER_K5, PAPER_K10, Schedule
from obclip_core.denoise import Offer, Split, run
from obclip_core.experiments import cache_ablations as study
from obclip_core.prompts import ATTRIBUTES


@pytest.fixture(scope="module")
def measured(judged_world, shape):
    """A short ablation of two prompts: its lines, its results with distances, and reference features."""
    lines = study.variants(shape, r=(8,), pivots=(29,), short=True)
    results = [study.quality(line.cell(judged_world, 2, 0)) for line in lines]
    judge = metrics.scorer(study.loaded(judged_world))
    return lines, study.with_distance(judge, lines, results), np.random.default_rng(0).normal(size=(6, 8))


def test_a_case_is_the_same_whatever_the_count_and_names_its_values(world):
    for kind, N in (("n2", 2), ("n6", 6), ("n30", 30)):
        two, five = study.cases(world, kind, 2), study.cases(world, kind, 5)
        assert five[:2] == two and all(len(case.candidates) == len(set(case.candidates)) == N for case in five)
        assert study.cases(world, kind, 2, seed=1) != two
    case = five[0]
    assert set(case.values[0]) == {*ATTRIBUTES, *tiny.CONTEXT}
    assert case.values[case.index]["colour"] in case.candidates[case.index]
    assert case.apart(case.index) == 0 and max(map(case.apart, range(30))) == 3
    with pytest.raises(ValueError, match="'n7' is no prompt set"):
        study.cases(world, "n7", 1)


@pytest.mark.parametrize("schedule", [NONE, PAPER_K10, replace(PAPER_K10, pivot=29), Schedule.gate(10, 4),
                                      Schedule(reuse=tuple(range(10))), Schedule.every("deepcache", 10, 3)])
def test_few_candidates_give_the_real_one_the_latent_that_all_give_it(world, schedule):
    case, split = study.cases(world, "n30", 1)[0], Split(T=world.T, k=10)
    everyone = run(world, Offer(case.candidates, case.seed, split, schedule)).latents[case.index]
    offer, secret = study.few(case, split, schedule)
    assert offer.N <= 2 and offer.candidates[secret.index] == case.candidates[case.index]
    assert torch.allclose(run(world, offer).latents[secret.index], everyone, atol=1e-4)
    if schedule == PAPER_K10:  # and the pivot matters: another one gives another latent
        other, secret = study.few(case, split, replace(schedule, pivot=17))
        assert not torch.allclose(run(world, other).latents[secret.index], everyone, atol=1e-4)


def test_competitors_are_matched_in_multiply_adds_and_get_what_suits_them():
    shape, target = cost.shape("sd14"), cost.macs(cost.shape("sd14"), PAPER_K10, 10, 30)
    for technique in ("deepcache", "tgate", "encoder"):
        found = study.matched(shape, technique, 10, 30, target)
        assert found.techniques == (technique,)
        assert abs(cost.macs(shape, found, 10, 30) / target - 1) < 0.12
    found = study.matched(shape, "tgate", 10, 30, cost.macs(shape, Schedule.gate(10, 7), 10, 30))
    assert found == Schedule.gate(10, 7)
    half = Schedule.every("encoder", 10, 2)
    late = study.matched(shape, "encoder", 10, 30, cost.macs(shape, half, 10, 30))
    assert len(late.encoder) == len(half.encoder) == 5 and late.encoder == (5, 6, 7, 8, 9)
    thirds = Schedule.every("deepcache", 10, 2, branch=1)
    found = study.matched(shape, "deepcache", 10, 30, cost.macs(shape, thirds, 10, 30))
    assert found == thirds and study._longest(found.deepcache) == 1 and study._longest((1, 2, 4, 5, 6)) == 3
    with pytest.raises(ValueError, match="'skip' has no setting to match"):
        study.matched(shape, "skip", 10, 30, 1)


def test_the_ablation_asks_each_question_once(shape):
    lines = study.variants(shape, r=(2, 8), s=(8,), refresh=(2, None), pivots=(29,))
    names = [(line.name, line.group, line.N, line.k) for line in lines]
    assert len(set(names)) == len(names)
    assert {line.group for line in lines} == {"technique", "reach of reuse", "r", "s", "refresh", "pivot",
                                              "against cache+skip", "against cache+skip+reuse"}
    combined = {line.schedule.techniques for line in lines
                if (line.group, line.N, line.k) == ("technique", 30, 10)}
    assert combined == {(), ("reuse",), ("cache",), ("skip",), ("merge",), ("cache", "reuse"), ("cache", "skip"),
                        ("reuse", "skip"), ("cache", "reuse", "skip")}
    paper = next(line for line in lines if line.name == "cache+skip+reuse")
    assert paper.schedule == PAPER_K10
    assert [line.schedule.cache for line in lines if line.group == "refresh"] == [(4, 6, 8), (4, 5, 6, 7, 8, 9)]
    short = study.variants(shape, short=True)
    assert len(short) < 12 and {line.k for line in short} == {5, 10}


def test_no_acceleration_is_at_no_distance_and_every_metric_has_an_interval(measured, shape):
    lines, results, real = measured
    table = study.ablation(shape, lines, results, real)
    plain = table[table.method == "none"]
    assert (plain.distance == 0).all() and (plain.macs_ratio == 1).all()
    rest = table[table.method != "none"]
    assert (rest.distance > 0).all() and (rest.macs_ratio < 1).all()
    for name in study.METRICS:
        low, high = table[f"{name}_low"], table[f"{name}_high"]
        assert (low <= table[name] + 1e-12).all() and (table[name] <= high + 1e-12).all()
    paper = table[(table.method == "cache+skip+reuse") & (table.candidates == 30) & (table.k == 10)].iloc[0]
    assert paper.macs_ratio == cost.macs(shape, PAPER_K10, 10, 30) / cost.macs(shape, NONE, 10, 30)
    assert math.isnan(study.ablation(shape, lines, results, np.zeros((0, 1))).kid.iloc[0])


def test_a_competitor_that_is_ours_is_neither_better_nor_worse(measured, shape):
    lines, results, real = measured
    table = study.competition(shape, lines, results, real)
    assert len(table) == 3 * len(study.METRICS) and set(table.method) == {"deepcache", "tgate", "encoder"}
    assert (abs(table.value - table.ours - table.difference) < 1e-6).all()
    own = next(i for i, line in enumerate(lines) if line.schedule == PAPER_K10)
    same = [*lines, replace(lines[own], group="against cache+skip+reuse", name="ours again")]
    again = study.competition(shape, same, [*results, results[own]], real)
    again = again[again.method == "ours again"]
    assert (again.difference == 0).all() and (again.verdict == "undecided").all()
    worse = dict(results[own])
    worse |= {"clip_score": worse["clip_score"] - 0.1, "distance": worse["distance"] - 1}
    verdicts = study.competition(shape, same, [*results, worse], real).set_index(["method", "metric"]).verdict
    assert verdicts["ours again", "clip_score"] == "ours" and verdicts["ours again", "distance"] == "theirs"


def test_who_is_far_from_the_pivot_is_told_apart(measured):
    lines, results, _ = measured
    table = study.by_distance_to_pivot(lines, results)
    assert table.groupby("method").prompts.sum().eq(2).all() and table.apart.between(0, 3).all()
    assert {"cache+skip+reuse", "reuse throughout", "pivot 29"} == set(table.method)


def test_a_promise_is_kept_broken_or_undecided(measured):
    lines, results, _ = measured
    timed = pd.DataFrame([{"candidates": 6, "k": 5, "ratio": x, "low": x - 0.05, "high": x + 0.05, "macs_ratio": 0.7}
                          for x in (0.7, 0.82, 0.9)])
    table = study.kept_promises(lines, results, timed)
    seconds = table[table.promise == "seconds"]
    assert list(seconds.verdict) == ["kept", "undecided", "broken"] and seconds.bound.iloc[0] == pytest.approx(0.8)
    assert set(zip(table.candidates[:2], table.k[:2], strict=True)) == {(30, 10), (6, 5)}


def test_what_is_watched_is_what_the_unet_computes_and_nothing_stays(judged_world, world):
    found = study.trajectory(study.Trajectory(judged_world, "n30", 0, 0))
    assert found["cross"].shape == found["mid"].shape == (world.T - 1,) and (found["cross"] > 0).all()
    assert found["heat"].shape == (len(study.SHOWN), 2, len(study.WORDS), 8, 8)
    assert found["plain"].shape == found["centred"].shape == (len(study.SHOWN), 2, study.COMPONENTS, 64)
    products = np.einsum("sicx,sidx->sicd", found["plain"], found["plain"])
    assert np.allclose(products, np.eye(study.COMPONENTS), atol=1e-4)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in world.cloud.modules())

    case, name = study.cases(world, "n30", 1)[0], "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    attn, real = world.cloud.get_submodule(name), case.candidates[case.index]
    kept = {}
    from diffusers.models.attention_processor import AttnProcessor  # writes its maps out
    with study.watched(world.cloud, 1, (0,)) as seen:
        before, score = attn.processor, attn.get_attention_scores
        attn.set_processor(AttnProcessor())
        attn.get_attention_scores = lambda *args: kept.setdefault("map", score(*args))
        run(world, Offer((real,), case.seed, Split(T=world.T, k=1)))
        attn.set_processor(before)
        del attn.get_attention_scores
    assert torch.allclose(seen[name][0], kept["map"].unflatten(0, (2, attn.heads))[1], atol=1e-5)


def test_equal_candidates_would_share_all_components_and_strangers_fewer(judged_world):
    results = [study.trajectory(study.Trajectory(judged_world, "n30", i, 0)) for i in range(2)]
    steps = study.figure6(results, "tiny")
    assert list(steps.step[steps.part == "mid-block"]) == list(range(1, 12)) and (steps.low <= steps.high).all()
    table = study.figure9(results, "tiny")
    assert table.value.between(0, 1.0001).all() and len(table) == 4 * len(study.SHOWN)
    twins = [dict(one) | {"plain": np.stack([one["plain"][:, 0]] * 2, axis=1)} for one in results]
    same = study.figure9(twins, "tiny")
    assert np.allclose(same.value[same.metric == "subspace_similarity"], 1, atol=1e-4)


def test_words_are_found_where_they_are_read(world):
    text, values = "a portrait of a old african man in a red scarf by the sea", {"age": "old", "colour": "red",
                                                                             "place": "by the sea", "garment": "coat"}
    tokens = world.tokenizers[0].convert_ids_to_tokens(world.tokenizers[0](text).input_ids)
    age, _, colour, garment, place = study._positions(world, text, values)
    assert [tokens[i] for i in (age, colour, place)] == ["old</w>", "red</w>", "sea</w>"] and garment == 0


@pytest.mark.parametrize("technique", ["none", "cache", "skip", "cache+skip"])
def test_kept_bytes_are_as_predicted_and_peaks_hold_them(judged_world, technique):
    found = {N: study.memory(study.Memory(judged_world, N, technique)) for N in (2, 6)}
    assert all(one["kept"] == one["kept_predicted"] for one in found.values())
    assert found[6]["kept"] == 3 * found[2]["kept"]
    assert all(one["peak"] > one["kept"] for one in found.values()) and found[6]["peak"] > 2 * found[2]["peak"]


def test_seconds_come_with_what_was_predicted(judged_world, shape):
    cell = study.Timing(judged_world, 2, 2, torch.get_num_threads())
    table = study.seconds_table(shape, [cell], [study.whole_runs(cell)])
    assert list(table.k) == [5, 10] and (table.low <= table.ratio).all() and (table.ratio <= table.high).all()
    assert table.macs_ratio.iloc[0] == cost.macs(shape, PAPER_K5, 5, 2) / cost.macs(shape, NONE, 5, 2)
    steps = study.steps_table(shape, [cell], [study.single_steps(cell)], [cost.shape("sd14")])
    assert len(steps) == 3 * len(study.STEPS) and (steps.ratio[steps.technique == "none"] == 1).all()
    macs = steps[(steps.what == "multiply-adds")].set_index(["world", "technique"]).ratio
    assert macs[shape.name, "reuse"] == macs[shape.name, "reuse, map written out"] < 1


def test_tables_of_the_paper_come_from_shapes():
    flops = pd.DataFrame(cost.flops_table())
    table = study.table7(flops)
    assert set(table.metric) == {"tflops", "full_tmacs"} and len(table) == 2 * (flops.artefact == "Table 7").sum()
    bars = study.figure12()
    assert (bars.world == "sd14").all() and list(bars.on[:1]) == ["reuse"] and (bars.spent < bars.plain).all()


def test_an_attempt_shows_both_pictures_and_its_bill(judged_world, shape):
    found = study.attempt(judged_world, "a portrait of an old male person by the sea", Schedule.points(6, 2, 3), k=6)
    assert found.pictures.shape == (2, 3, 32, 32) and not torch.equal(*found.pictures)
    bill = found.bill.set_index("what").value
    assert bill["candidates"] == 6
    assert bill["share of the work left"] == cost.macs(shape, Schedule.points(6, 2, 3), 6, 6) / cost.macs(shape, k=6,
                                                                                                    candidates=6)


def test_an_acceleration_leaves_no_trace(judged_world):
    facts = study.untouched(judged_world)
    assert len(facts) == 5 and all(facts.values()), facts


def test_a_sweep_holds_the_papers_point_in_its_place(measured, shape):
    lines, results, real = measured
    swept = study.sweeps(study.ablation(shape, lines, results, real))
    assert list(zip(swept.group, swept.setting_value, strict=True)) == [("r", "4"), ("r", "8")]
    assert swept.macs_ratio.is_monotonic_increasing  # later caching leaves more work
    told = study.tell_sweeps(swept)
    assert told.startswith(f"r from 4 to 8: work left {swept.macs_ratio[0]:.0%} to {swept.macs_ratio[1]:.0%}")


def test_sentences_say_what_the_tables_say():
    steps = pd.DataFrame([{"part": "mid-block", "step": t, "value": 0.4 if t < 4 else 0.1} for t in range(1, 9)])
    assert study.tell_steps(steps) == "mid-block: 0.400 a step in steps 1 to 3, 0.100 after: 4.0 times as much early"
    flops = pd.DataFrame({"artefact": ["Table 2"] * 3 + ["Table 7"], "note": ["", "odd", None, "odd"]})
    assert study.tell_flops(flops).splitlines() == [
        "2 of 4 printed counts of operations follow from shapes within 1 %", "2 differ (Table 2, Table 7): odd"]
    seconds = pd.DataFrame([{"candidates": 6, "k": 5, "macs_ratio": 0.7, "ratio": x, "low": x, "high": x,
                             "apart": x - 0.7} for x in (0.8, 0.6)])
    more, less = study.tell_seconds(seconds).splitlines()
    assert "10% less saved" in more and "10% more saved" in less
    rows = [{"world": "w", "technique": t, "candidates": N, "what": "seconds", "ratio": x, "low": x, "high": x + 0.1}
            for N, t, x in ((2, "reuse", 0.95), (2, "skip", 0.5), (30, "reuse", 0.8), (30, "skip", 0.5))]
    assert study.tell_candidates(pd.DataFrame(rows)).splitlines() == [
        "N = 2, w, seconds of a plain step: skip 50%", "N = 30, w, seconds of a plain step: skip 50%, reuse 80%"]
    promises = pd.DataFrame([{"candidates": 6, "k": 5, "promise": "seconds", "value": 0.9, "low": 0.9, "high": 0.9,
                              "bound": 0.8, "verdict": "broken"}])
    assert study.tell_promises(promises).splitlines()[0] == "0 of 1 kept" and "broken: seconds" in study.tell_promises(
        promises)


def test_verdicts_are_told_by_who_is_better(measured, shape):
    lines, results, real = measured
    table = study.competition(shape, lines, results, real)
    table["verdict"] = ["ours" if name == "kid" else "theirs" if name == "distance" else "undecided"
                        for name in table.metric]
    told = study.tell_competition(table)
    assert told.count("ours better on KID") == 3 and "undecided on CLIP score, attribute accuracy" in told
    main = study.ablation(shape, lines, results, real).query("candidates == 30 and k == 10")
    fronts = study.tell_fronts(main, figures.front)
    assert fronts.count("none (100%)") >= 1 and fronts.startswith("distance from the unaccelerated picture: ")
    assert "cache+skip+reuse: " in study.tell_reuse(main, study.by_distance_to_pivot(lines, results))


def test_every_figure_draws_its_table(judged_world, measured, shape):
    lines, results, real = measured
    table = study.ablation(shape, lines, results, real)
    rng = np.random.default_rng(0)
    steps = pd.DataFrame([{"part": p, "step": t, "value": 1 / t, "low": 0.5 / t, "high": 2 / t}
                          for p in ("mid-block", "cross-attention") for t in range(1, 5)])
    alike = pd.DataFrame([{"metric": m, "step": t, "value": 0.5, "low": 0.4, "high": 0.6} for t in (0, 1) for m in (
        "subspace_similarity", "subspace_similarity, other prompt, centred")])
    ratios = pd.DataFrame([{"technique": t, "candidates": N, "what": w, "ratio": 0.8, "low": 0.7, "high": 0.9}
                           for t in ("reuse", "skip") for N in (2, 30) for w in ("seconds", "multiply-adds")])
    seconds = pd.DataFrame([{"candidates": N, "k": k, "ratio": 0.8, "low": 0.7, "high": 0.9, "macs_ratio": 0.75}
                            for N in (2, 30) for k in (5, 10)])
    bytes_ = pd.DataFrame([{"candidates": N, "technique": t, "kept_predicted_mb": 1, "kept_mb": 1,
                            "peak_predicted_mb": 5, "peak_mb": 6} for N in (2, 30) for t in ("cache", "skip")])
    drawn = {
        "steps": figures.cache_steps(steps, 4, 6),
        "words": figures.cache_words(rng.random((2, 2, 3, 8, 8)), "abc", (1, 9)),
        "parts": figures.cache_components(rng.normal(size=(2, 4, 8, 8)), 3), "likeness": figures.cache_likeness(alike),
        "bars": figures.flops_per_step(study.figure12()),
        "pictures": figures.cache_pictures([one["pictures"].numpy() / 255 for one in results[:3]], ["a", "b", "c"]),
        "fronts": figures.cache_fronts(table, study.METRICS), "sweeps": figures.cache_sweeps(study.sweeps(table)),
        "rivals": figures.cache_competition(study.competition(shape, lines, results, real), study.METRICS),
        "candidates": figures.cache_by_candidates(ratios), "seconds": figures.cache_seconds(seconds),
        "memory": figures.cache_memory(bytes_),
    }
    for name, figure in drawn.items():
        assert figure.axes and all(axes.has_data() or not axes.axison for axes in figure.axes), name
    left, right = (line.get_xdata()[0] for line in drawn["steps"].axes[0].lines[-2:])
    assert (left, right) == (4, 6)
    assert [text.get_text() for text in drawn["bars"].axes[0].texts][0].startswith("-")


def test_the_command_measures_a_world_and_refuses_what_is_none(capsys):
    assert study.main(["portraits", "-N", "2", "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["N = 2, k = 5", "N = 2, k = 10"]
    assert study.main(["sd9"]) == 1 and "'sd9' is no U-Net of the paper" in capsys.readouterr().err


def test_an_untrained_cloud_is_billed_and_run_as_a_world(monkeypatch):
    make, config = worlds.untrained, dict(tiny.unet().config)
    monkeypatch.setattr(worlds, "untrained", lambda name, device: make(config, device))
    timing = study.Timing(f"{study.UNTRAINED}tiny", 2, 1, torch.get_num_threads())
    table = study.seconds_table(study.shape_of(study.loaded(timing.world)), [timing], [study.whole_runs(timing)])
    assert (table.ratio > 0).all() and table.macs_ratio.between(0, 1).all()
