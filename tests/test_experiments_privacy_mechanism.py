"""What notebook 01 measures on pictures: branches of one walk are Algorithm 1, and tables say what was measured."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from obclip_core import audit, figures, privacy
from obclip_core.denoise import Offer, Secret, Split, finish, generate, run
from obclip_core.experiments import privacy_mechanism as pm
from obclip_core.metrics import ScorerNet
from obclip_core.prompts import ATTRIBUTES, candidate_values, candidates, detector_table, parse

TEXTS = tiny.CANDIDATES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny world with a tiny scorer."""
    folder = tiny.save(tmp_path_factory.mktemp("judged"))
    heads = {key: list(values) for key, values in ATTRIBUTES.items()}
    torch.manual_seed(0)
    ScorerNet({"heads": heads, "vocabulary": tiny.WORDS, "widths": [8, 8], "dim": 16}).save(folder / "scorer")
    file = folder / "world.toml"
    file.write_text('scorer = "./scorer"\n' + file.read_text("utf-8"), "utf-8")
    return folder


@pytest.fixture(scope="module")
def scenes(folder):
    return [pm.Scene(str(folder), 6, 5, 2, seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def results(scenes):
    return [pm.compute(scene) for scene in scenes]


def test_a_branch_of_the_shared_walk_is_algorithm_1(tiny_world):
    offer = Offer(TEXTS, 3, Split(10, k=4))
    walk = pm.go(tiny_world, pm.begin(tiny_world, 6, 10, 3), "cloud", TEXTS, 4)
    hand_over = run(tiny_world, offer)
    torch.testing.assert_close(walk.x, hand_over.latents)
    later = pm.go(tiny_world, walk, "device", TEXTS, 10)
    for i in (0, 5):
        torch.testing.assert_close(later.x[i:i + 1], finish(tiny_world, offer, hand_over, Secret(i)), rtol=1e-4,
                                   atol=1e-5)
    torch.testing.assert_close(pm.go(tiny_world, walk, "cloud", TEXTS, 10).x,
                               run(tiny_world, Offer(TEXTS, 3, Split(10, k=10))).latents, rtol=1e-4, atol=1e-5)


def test_branches_leave_the_walk_as_it_was_and_may_take_rows_twice(tiny_world):
    walk = pm.go(tiny_world, pm.begin(tiny_world, 6, 10, 0), "cloud", TEXTS, 4)
    before = walk.x.clone()
    twice = pm.go(tiny_world, walk.pick([2, 2]), "cloud", [TEXTS[2], TEXTS[0]], 10).x
    whole = pm.go(tiny_world, walk, "cloud", TEXTS, 10).x
    torch.testing.assert_close(walk.x, before)
    torch.testing.assert_close(twice[:1], whole[2:3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(twice[1], twice[0]) and not torch.allclose(twice[1], whole[0])


def test_the_preview_is_the_schedulers_clean_latent(tiny_world):
    walk = pm.go(tiny_world, pm.begin(tiny_world, 2, 10, 0), "cloud", TEXTS[:2], 9)
    end = pm.go(tiny_world, walk, "cloud", TEXTS[:2], 10)
    assert walk.preview.shape == walk.x.shape and not torch.equal(walk.preview, walk.x)
    assert (end.preview - end.x).abs().max() < (walk.preview - walk.x).abs().max()


def test_a_hand_over_between_schedulers_restarts(tiny_world):
    from dataclasses import replace

    from diffusers import DDIMScheduler

    other = DDIMScheduler.from_config(tiny_world.schedulers["device"].config)
    world = replace(tiny_world, schedulers={**tiny_world.schedulers, "device": other})
    offer = Offer(TEXTS[:1], 3, Split(10, k=4))
    walk = pm.go(world, pm.begin(world, 1, 10, 3), "cloud", TEXTS[:1], 4)
    torch.testing.assert_close(pm.go(world, walk, "device", TEXTS[:1], 10).x, generate(world, offer, Secret(0)).latent)


def test_a_scene_names_every_attribute_it_protects_and_is_the_same_again(scenes):
    for scene in scenes:
        prompt = pm.scene_prompt(scene)
        assert prompt.enumerated == ("age", "gender") and prompt.count == 6
        assert prompt.text == pm.scene_prompt(scene).text
    assert pm.scene_prompt(scenes[0]).text != pm.scene_prompt(scenes[1]).text


def test_scenes_are_refused_in_words():
    for wrong in ({"candidates": 5}, {"T": 7}, {"reals": 31}, {"reals": 0}):
        with pytest.raises(ValueError, match="expected"):
            pm.Scene(**wrong)


def test_counted_steps_are_those_taken(scenes, folder, monkeypatch):
    world, taken = pm._load(str(folder)), {"cloud": 0, "device": 0}
    for side in taken:
        unet = world.unet(side)
        hook = unet.register_forward_pre_hook(
            lambda m, args, side=side: taken.__setitem__(side, taken[side] + len(args[0]) // 2))
        monkeypatch.setattr(unet, "_hook", hook, raising=False)
    pm.compute(scenes[0])
    for side in taken:
        world.unet(side)._hook.remove()
    assert taken == pm.steps_of(scenes[0])


def test_replacing_no_step_is_the_real_picture_and_all_steps_the_other_one(scenes, results):
    table = pm.figure4_table(scenes, results)
    shares = sorted(table.share.unique())
    assert shares == [0, 20, 40, 60, 80, 100]
    single = table[table.against_share.isna()].set_index(["metric", "share"])
    right = [(r["found_cloud"][r["reals"]] == r["values"][r["reals"]]).mean() for r in results]
    assert single.loc[("attribute_accuracy", 100)].value == pytest.approx(np.mean(right))
    lost = [(r["found_cloud"][r["replaced"]] == r["values"][r["reals"]]).mean() for r in results]
    assert single.loc[("attribute_accuracy", 0)].value == pytest.approx(np.mean(lost))
    pairs = table[table.against_share.notna()].set_index(["metric", "share"])
    for name in pairs.index:
        lost = single.loc[name].value - single.loc[(name[0], 100)].value
        assert pairs.loc[name].value == pytest.approx(lost, abs=1e-6)


def test_the_device_is_deterministic_so_whoever_has_it_finds_the_picture(scenes, results):
    table = pm.publication_table(scenes, results)
    assert set(table.candidates) == {2, 6} and set(table.attack) == set(pm.ATTACKS)
    sure = table[(table.attack == "finishes all, device model") & (table.picture == pm.AS_MADE)]
    assert (sure.success == 1).all() and (sure.n == 12).all()
    assert (table.low <= table.success).all() and (table.success <= table.high).all()


def test_an_attack_that_is_told_nothing_guesses(scenes, results):
    blind = [{**r, "distance": np.zeros_like(r["distance"])} for r in results]
    table = pm.publication_table(scenes, blind)
    assert table.success.to_numpy() == pytest.approx(table.guess.to_numpy())


def test_a_mechanism_is_scored_by_the_latents_it_makes_the_device_finish():
    values = candidate_values(parse("an old woman by the sea"))
    np.testing.assert_allclose(pm.used_instead(privacy.plain(6), values, 5), np.eye(6)[5])
    np.testing.assert_allclose(pm.used_instead(privacy.enumerate_all(6), values, 2), np.eye(6)[2])
    np.testing.assert_allclose(pm.used_instead(privacy.random_replacement(6), values, 2), np.full(6, 1 / 6))
    subset = privacy.subset(6, 3, 1.0)
    used = pm.used_instead(subset, values, 0)
    assert used.sum() == pytest.approx(1) and used[0] == pytest.approx(subset.keeps)
    distances = privacy.word_distances(values)
    np.testing.assert_allclose(pm.used_instead(privacy.santext(distances, 4.0), values, 3),
                               np.exp(-2 * distances[3]) / np.exp(-2 * distances[3]).sum())


def test_utility_at_the_ends_is_that_of_the_real_latent_and_privacy_that_of_the_channel(scenes, results):
    table = pm.utility_table(scenes, results, epsilons=(1, 1000))
    accuracy = table[table.metric == "attribute_accuracy"].set_index(["mechanism", "epsilon", "where"]).sort_index()
    plain, everything = (accuracy.loc[name] for name in (("plain prompt", math.inf, "hybrid"),
                                                        ("all candidates", 0, "hybrid")))
    assert plain.value == pytest.approx(everything.value)
    assert (plain.success, everything.success) == pytest.approx((1, 1 / 6))
    assert accuracy.loc[("SANTEXT", 1000, "hybrid")].value == pytest.approx(plain.value)
    assert accuracy.loc[("SANTEXT", 1000, "hybrid")].success == pytest.approx(1)
    assert accuracy.loc[("random replacement", 0, "hybrid")].success == pytest.approx(1 / 6)
    own = [(r["found_cloud"][r["reals"]] == r["values"][r["reals"]]).mean() for r in results]
    assert accuracy.loc[("plain prompt", math.inf, "cloud alone")].value == pytest.approx(np.mean(own))


def test_every_baseline_has_its_clip_score_beside_its_accuracy_with_an_interval_of_the_same_kind(scenes, results):
    table = pm.utility_table(scenes, results, epsilons=(1, 1000))
    keys = ["mechanism", "epsilon", "where"]
    accuracy, fit = (table[table.metric == name].set_index(keys) for name in ("attribute_accuracy", "clip_score"))
    assert list(accuracy.index) == list(fit.index) and (accuracy.n == fit.n).all()
    families = ("plain prompt", "random replacement", "SANTEXT", "CAPE")
    assert {(family, where) for family, _, where in fit.index} >= {
        (family, where) for family in families for where in ("hybrid", "cloud alone")}
    assert (fit.low <= fit.value).all() and (fit.value <= fit.high).all() and (fit.low < fit.high).all()
    own = [r["fit_cloud"][x, x] for r in results for x in r["reals"]]
    for name in (("plain prompt", math.inf, "cloud alone"), ("SANTEXT", 1000, "cloud alone")):
        assert fit.value[name] == pytest.approx(np.mean(own))
    blind = [r["fit_cloud"][x].mean() for r in results for x in r["reals"]]
    assert fit.value["random replacement", 0, "cloud alone"] == pytest.approx(np.mean(blind))
    told = pm.utility_findings(table)
    assert all("CLIP score" in line for line in told)
    assert f"CLIP score {fit.value['all candidates', 0, 'hybrid']:.3f}" in told[0]


def test_every_system_of_table_1_has_a_row_and_only_cryptography_is_cited(scenes, results):
    utility = pm.utility_table(scenes, results)
    table = pm.systems_table(scenes[0], utility, pm.publication_table(scenes, results)).set_index("system")
    assert list(table.index[[0, 1, 2, 6, 7, 8]]) == ["Server-Only", "Client-Only", "Hybrid SD", "ObCLIP", "MPCViT",
                                                     "HE-Diffusion"]
    assert table.guess[["ObCLIP", "Hybrid SD"]].tolist() == pytest.approx([1 / 6, 1])
    assert table.loc["ObCLIP"].cloud_gmacs == pytest.approx(6 * table.loc["Hybrid SD"].cloud_gmacs)
    measured = table[table.source == "measured here"]
    assert (measured.clip_low < measured.clip_score).all() and (measured.clip_score < measured.clip_high).all()
    cited = table[table.source != "measured here"]
    assert list(cited.index) == ["MPCViT", "HE-Diffusion"] and cited.attribute_accuracy.isna().all()


def test_a_jpeg_is_near_and_not_equal():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.4
    posted = pm.as_jpeg(images)
    assert posted.shape == images.shape and 0 < (posted - images).abs().mean() < 0.1


def test_priors_are_products_over_attributes():
    prompt = parse("an old woman by the sea")
    np.testing.assert_allclose(pm.prior_of(prompt), np.full(6, 1 / 6))
    prior = pm.prior_of(prompt, {"gender": {"female": 3}, "age": {"old": 2}})
    by_text = dict(zip(candidates(prompt), prior, strict=True))
    assert by_text["an old woman by the sea"] == pytest.approx(6 * by_text["a young man by the sea"])
    nobody = {"gender": {"male": 0, "female": 0}}
    for wrong in ({"height": {}}, {"gender": {"tall": 1}}, {"gender": {"male": -1}}, nobody):
        with pytest.raises(ValueError, match="prior"):
            pm.prior_of(prompt, wrong)


def test_what_if_leaves_the_prior_with_all_candidates_and_bounds_it_with_some():
    table, told = pm.what_if("an old woman by the sea", ("age", "gender"), {"gender": {"female": 9}}, 2, 1.0)
    np.testing.assert_allclose(table["posterior, all sent"], table.prior)
    odds = [column / (1 - column) for column in (table["posterior, 2 sent"], table.prior)]
    assert table.offered.sum() == 2 and (odds[0] <= math.e * odds[1] + 1e-9).all()
    assert "{age} {man} by the sea" in told[0] and "posterior" not in told[0]
    # the offer shown is the worst one for the likeliest candidate, by the exact channel
    offers, matrix = privacy.channel(privacy.subset(6, 2, 1.0))
    prior = table.prior.to_numpy()
    worst = max(privacy.posterior(prior, matrix[:, j]).max() for j in range(len(offers)))
    assert table["posterior, 2 sent"].max() == pytest.approx(worst)
    whole, _ = pm.what_if("an old woman by the sea", ("gender",), {})
    assert list(whole.columns) == ["candidate", "prior", "posterior, all sent"] and len(whole) == 2
    with pytest.raises(ValueError, match="send is 9"):
        pm.what_if("an old woman by the sea", ("gender",), {}, 9)


def test_sentences_say_what_the_numbers_say(scenes, results):
    table = pm.publication_table(scenes, results)
    told = pm.publication_findings(table, scenes[0].k)
    assert len(told) == len(pm.ATTACKS) and told[-1].startswith("finishes all, device model: 100%")
    assert told[-1].endswith("better than guessing") and "not" not in told[-1]
    rows = pm.publication_rows(table)
    assert {row["bound"] for row in rows} == {1.0} and all("publication (" in row["attack"] for row in rows)
    figure4 = pm.figure4_table(scenes, results)
    lost = figure4.assign(high=np.where(figure4.against_share.notna(), -0.2, figure4.high))
    assert all("lost" in line or "kept" in line for line in pm.figure4_findings(lost)[1:])
    assert len(pm.figure4_findings(figure4)) == 6
    assert len(pm.utility_findings(pm.utility_table(scenes, results))) == 8
    assert pm.picture_rows(scenes[0], results[0])[0].count("\n") == 1


def test_memoised_answers_give_intersection_nothing():
    table = pm.intersection_table(privacy.subset(6, 2, 1.0), (1, 30), 400).set_index(["answers", "requests"])
    assert table.success[("fresh", 30)] > 0.9
    bound = privacy.subset(6, 2, 1.0).keeps / 2
    assert table.low[("memoised", 30)] <= bound <= table.high[("memoised", 30)]


@pytest.mark.parametrize("text", ["an old woman by the sea", "an old asian woman by the sea"])
def test_attack_mechanisms_can_all_be_enumerated(text):
    prompt = parse(text)
    for mechanism in pm.attack_mechanisms(prompt):
        assert mechanism.n == prompt.count and len(privacy.channel(mechanism)[0]) <= 5000


def test_every_figure_of_the_notebook_is_drawn_from_its_table(scenes, results, tmp_path):
    prompt = parse("an old woman by the sea")
    shown = [privacy.enumerate_all(6), privacy.plain(6)]
    beliefs = pm.posteriors_table(prompt, {"uniform": pm.prior_of(prompt)}, shown)
    attacks = pd.DataFrame(audit.attack_table(prompt.text, shown, trials=20))
    utility = pm.utility_table(scenes, results)
    crossed = pm.intersection_table(privacy.subset(6, 2, 1.0), (1, 3), 20)
    made = pm.publication_table(scenes, results)
    drawn = [
        figures.posteriors(beliefs),
        figures.attack_success(attacks),
        figures.publication_attack(made[made.picture == pm.AS_MADE]),
        figures.privacy_price(pd.DataFrame(privacy.cost_table((6,), (1, 2), (1,)))),
        figures.repeats_cost(pd.DataFrame(privacy.repeats_table(6, 2, 1.0, (1, 2)))),
        figures.repeats_attack(crossed),
        figures.replaced_steps(pm.figure4_table(scenes, results)),
        figures.meaning_price(utility[utility.metric == "attribute_accuracy"]),
        figures.detector_recall(pd.DataFrame(detector_table())),
    ]
    assert [len(figure.axes) for figure in drawn] == [2, 2, 2, 1, 1, 1, 2, 1, 1]
    for number, figure in enumerate(drawn):
        assert figures.save_figure(figure, f"f{number}", tmp_path).path.stat().st_size > 5000
    grid = figures.picture_grid(results[0]["pictures"] / 255, pm.picture_rows(scenes[0], results[0]), ["x"] * 6)
    assert grid.axes[0].get_yticklabels()[0].get_text() == pm.picture_rows(scenes[0], results[0])[0]
