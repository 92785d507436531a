"""Notebook 05's measurements: batches equal Algorithm 1, controls are controls, and what is told is in the tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from obclip_core import cost, figures, sweep
from obclip_core.accelerate import NONE, Schedule, compose
from obclip_core.denoise import Offer, Secret, Split, finish, run
from obclip_core.experiments import beyond as study


@pytest.fixture(scope="module")
def measured(judged_world, shape):
    """Every method at N = 6 on two prompts, and the frontier of them."""
    axes = study.grid(judged_world, 6)
    cells = [study.Frontier(judged_world, method, 2, 2) for method in study.methods(axes, 5, 12, short=True)]
    results = [study.measure(cell) for cell in cells]
    return cells, results, study.frontier(shape, cells, results, np.random.default_rng(0).normal(size=(6, 8)), 12)


def test_grids_are_those_of_the_prompt_sets(judged_world):
    assert [study.grid(judged_world, N) for N in (2, 6, 30)] == [(2,), (3, 2), (3, 2, 5)]
    assert all(wrong % 5 != i % 5 and wrong // 10 != i // 10 for i, wrong in enumerate(study.wrong((3, 2, 5))))
    assert study.chosen(30, 3) == (5, 15, 25) and study.chosen(2, 6) == (0, 1)


@pytest.mark.parametrize("axes, k", [((2,), 5), ((3, 2), 3), ((3, 2, 5), 10), ((3, 2, 5), 5)])
def test_methods_have_one_name_each_and_all_cost_less_than_exact(axes, k):
    sd = cost.shape("sd14")
    found = study.methods(axes, k)
    assert len({method.name for method in found}) == len(found)
    bills = {method.name: study.work(sd, method) for method in found}
    assert bills.pop("exact") > max(bills.values()) and bills["one for all"] == pytest.approx(k / 25)
    assert {method.name for method in study.methods(axes, k, short=True)} <= {method.name for method in found}
    assert all(Schedule.from_dict(method.schedule.to_dict()) == method.schedule for method in found)


def test_on_stable_diffusion_the_targets_of_work_are_within_reach():
    table = study.shapes_table(["sd14"], k=(5,))
    for N, most in study.TARGETS.items():
        able = table[(table.candidates == N) & (table.method != "one for all")]
        assert able.cloud_work_ratio.min() <= most
    paper = table[(table.candidates == 30) & (table.method == "paper")].cloud_work_ratio.item()
    assert 4 < paper < 6  # what this is about: the paper's own settings cost this many plain generations


def test_finishing_in_batches_is_algorithm_1(world, judged_world):
    case = study.cases(world, "n6", 1)[0]
    plan = compose.composed((3, 2))
    for split, schedule in ((Split(12, 5), Schedule(plan=plan)), (Split(12, 2, cloud_T=8, shift=1), NONE)):
        offer = Offer(case.candidates, case.seed, split, schedule)
        hand_over = run(world, offer)
        recipe = schedule.plan.recipe(split.k) if schedule.plan else None
        given = [hand_over.pick(Secret(i), recipe) for i in (0, 3, 5)]
        texts = [case.candidates[i] for i in (0, 3, 5)]
        batch = study.finished(world, split, given, texts, [case.seed] * 3, most=2)
        one = torch.cat([finish(world, offer, hand_over, Secret(i)) for i in (0, 3, 5)])
        assert torch.allclose(batch, one, atol=1e-4)


def test_the_frontier_has_its_columns_and_honest_controls(measured):
    cells, results, table = measured
    columns = ["method", "candidates", "k", "cloud_work_ratio", "cloud_seconds_ratio", "accuracy_drop_points", "kid",
               "latent_error", "bytes"]
    assert set(columns) <= set(table) and len(table) == len(cells) + len(study.CONTROLS)
    for name in ("accuracy_drop_points", "kid", "latent_error", "cloud_seconds_ratio"):
        assert (table[f"{name}_low"] <= table[name] + 1e-9).all()
        assert (table[name] <= table[f"{name}_high"] + 1e-9).all()
    by_name = table.set_index("method")
    assert by_name.latent_error["exact"] == 0 == by_name.distance["exact"] == by_name.accuracy_drop_points["exact"]
    assert by_name.latent_error["mean latent"] == pytest.approx(1, abs=1e-4)
    assert by_name.latent_error["wrong candidate"] > 1 and by_name.latent_error["one for all"] > 0.5
    assert 0 < by_name.latent_error["compose 4"] < 1 and by_name.trajectories["compose 4"] == 4
    assert by_name.bytes["compose 4"] < by_name.bytes["exact"]
    assert by_name.cloud_work_ratio["exact"] == pytest.approx(6 * 5 / 12)
    assert study.picture_rows(cells, results, ["exact", "mean latent"], 6, 5, 2).shape[:2] == (2, 2)


def test_controls_take_no_candidates_own_latent(world, measured):
    cells, results, _ = measured
    exact = next(result for cell, result in zip(cells, results, strict=True) if cell.method.name == "exact")
    case, picks = study.cases(world, "n6", 1)[0], study.chosen(6, 2)
    offer = Offer(case.candidates, case.seed, Split(12, 5))
    hand_over = run(world, offer)
    other = hand_over.pick(Secret(study.wrong((3, 2))[picks[0]]))
    image = study.decode(world, study.finished(world, offer.split, [other], [case.candidates[picks[0]]], [case.seed]))
    shown = torch.as_tensor(exact["wrong candidate/pictures"][0]).float()
    assert (shown - (image[0] * 255).round()).abs().max() <= 1


def test_verdicts_follow_from_the_numbers(measured):
    table = measured[2].copy()
    assert study.targets(table).empty or (study.targets(table).candidates == 6).all()
    part = table[table.method.isin(["exact", "mean latent", "wrong candidate", "one for all", "compose 4 + share"])]
    part = part.assign(distance=part.latent_error)
    best = part.method == "compose 4 + share"

    def verdict(low, high, error=0.2):
        changed = part.copy()
        changed.loc[best, ["accuracy_drop_points_low", "accuracy_drop_points_high", "latent_error", "distance",
                           "cloud_work_ratio"]] = low, high, error, error, 0.3
        return study.targets(changed).verdict.item()

    assert (verdict(-1, 2), verdict(-1, 4), verdict(3.5, 5)) == ("kept", "undecided", "broken")
    assert verdict(-1, 2, error=1.2) == "broken"


def test_the_correction_is_measured_against_exact(judged_world):
    cell = study.Gain(judged_world, 2, 2, (1.0, 3.0), 2)
    result = study.corrected(cell)
    table = study.gain_table([cell], [{key: np.asarray(value) for key, value in result.items()}])
    assert list(table.correction) == ["none", "s = 1", "s = 3"]
    assert table.latent_error[0] == pytest.approx(table.latent_error[1]) != table.latent_error[2]  # v-prediction
    assert "error" in study.tell_gains(table)


def test_designs_with_more_runs_or_a_better_choice_amplify_less():
    table = study.designs((3, 2, 5)).set_index(["model", "runs"])
    main = table.loc["main effects"].amplification
    assert main["base and changes"] > main["D-optimal"] > main["D-optimal, 4 more"]
    assert table.trajectories["main effects", "D-optimal"] == 8
    assert table.trajectories["main effects + gender pairs", "D-optimal"] == 14


def test_every_method_is_audited_and_seeded_leaks_are_found():
    table = study.audits("an old woman in her garden")
    assert (table.holds == table.expected).all() and (~table.expected).sum() == 2
    assert set(table.method[table.expected]) == {method.name for method in study.methods((3, 2), 5)}


def test_one_prompt_can_be_tried(judged_world, tmp_path):
    schedule = Schedule(share=(0,), plan=compose.composed((3, 2)))
    tried = study.attempt(judged_world, "an old woman by the sea", schedule, k=3)
    assert tried.pictures.shape[0] == 2 and list(tried.bill.trajectories) == [6, 4]
    assert tried.bill.cloud_work_ratio[1] < tried.bill.cloud_work_ratio[0]


def test_the_tables_are_told_and_drawn(measured, tmp_path):
    table = measured[2]
    assert "N = 6, k = 5" in study.tell_frontier(table) and "mean latent loses" in study.tell_controls(table)
    assert study.tell_targets(study.targets(pd.concat([table, table.assign(candidates=2)]))) is not None
    gains = pd.DataFrame({"candidates": 6, "k": 5, "correction": ["none", "s = 2"], "latent_error": [0.3, 0.2],
                          "latent_error_low": 0.1, "latent_error_high": 0.4})
    assert "s = 2, 0.200" in study.tell_gains(gains)
    shapes = study.shapes_table(["sd14"], (2, 6), (5,))
    for name, figure in (("a", figures.beyond_frontier(table, study.TARGETS)), ("b", figures.beyond_gains(gains)),
                         ("c", figures.beyond_shapes(shapes)),
                         ("d", figures.beyond_pictures(np.zeros((2, 3, 3, 8, 8)), ["exact", "paper"]))):
        figures.save_figure(figure, name, tmp_path)
    sweep.save_table(table, "frontier", tmp_path)
