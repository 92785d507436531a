"""Composition, branching, a shared unconditional branch, larger steps: right, billed, reversible, and public."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from test_accelerate import batch, trace
from test_cost import TOKENS, counted

from obclip_core import cost, denoise
from obclip_core.accelerate import NONE, PAPER_K5, Schedule, branch, coarse, compose, share
from obclip_core.audit import envelope, exact_audit, mutant_table, offer_fields, spellings
from obclip_core.denoise import Offer, Secret, Split, call_bytes, decode, finish, run
from obclip_core.prompts import candidate_values, candidates, parse, real_index
from obclip_core.service.wire import pack_hand_over, pack_offer, unpack_hand_over, unpack_offer

pytestmark = pytest.mark.usefixtures("no_grad")
AXES = (3, 2)
GRID = (3, 2, 5)
MAIN = compose.composed(AXES)
ALL = compose.Plan(AXES, (compose.Stage(0, tuple(range(6)), compose.everything((0, 1))),))
TREE = branch.tree(AXES, (2, 1))
GROWING = branch.growing(AXES, [(0, ()), (1, ((0,),)), (3, compose.main_effects(AXES))])
SHARED = Schedule(share=(0, 1, 2, 3, 4))
PLANS = {
    "share": SHARED, "share, corrected": replace(SHARED, share_gain=(0.1, 0.2, 0.3, 0.2, 0.1)),
    "share at first": Schedule(share=(0, 1)), "compose": Schedule(plan=MAIN), "tree": Schedule(plan=TREE),
    "growing": Schedule(plan=GROWING), "compose, share": replace(SHARED, plan=MAIN),
    "tree, share": replace(SHARED, plan=TREE),
    "compose, share, caches": Schedule.points(5, 3, 3, share=SHARED.share, plan=MAIN),
    "tree, share, caches": Schedule.points(5, 3, 3, share=SHARED.share, plan=TREE),
}


def offer(schedule=None, T=8, k=5, **split):
    return Offer(tiny.CANDIDATES, 7, Split(T, k, **split), schedule)


# -------------------- composition

def test_main_effects_are_told_exactly_by_one_plus_the_sum_of_q_minus_one_runs():
    assert len(compose.optimal(GRID, compose.main_effects(GRID))) == 8 == len(compose.one_at_a_time(GRID))
    assert len(compose.optimal(GRID, compose.main_effects(GRID, [(0, 1), (1, 2)]))) == 14
    g = np.random.default_rng(0)
    a, b, c, pair = g.normal(size=3), g.normal(size=2), g.normal(size=5), g.normal(size=(3, 5))
    values = (a[:, None, None] + b[:, None] + c).ravel()
    for runs in (compose.optimal(GRID, compose.main_effects(GRID)), compose.one_at_a_time(GRID, 13)):
        C = compose.coefficients(GRID, compose.main_effects(GRID), runs)
        assert np.allclose(C @ values[list(runs)], values) and np.allclose(C.sum(1), 1)
        assert np.array_equal(C[list(runs)], np.eye(8))
        with_pair = values + (pair[:, None, :] + np.zeros((1, 2, 1))).ravel()
        assert not np.allclose(C @ with_pair[list(runs)], with_pair)
    paired = compose.composed(GRID, [(0, 2)])
    assert np.allclose(paired.recipe(5) @ with_pair[list(paired.runs(5))], with_pair)


def test_the_base_and_its_changes_are_the_textbook_formula():
    base = compose.middle(GRID)
    runs = compose.one_at_a_time(GRID, base)
    C = compose.coefficients(GRID, compose.main_effects(GRID), runs)
    p = np.ravel_multi_index((0, 1, 4), GRID)
    expected = {base: -2.0, **{int(np.ravel_multi_index(q, GRID)): 1.0 for q in ((0, 0, 2), (1, 1, 2), (1, 0, 4))}}
    assert {m: round(float(c), 9) for m, c in zip(runs, C[p], strict=True) if abs(c) > 1e-9} == expected


def test_an_optimal_design_amplifies_less_and_more_runs_still_less():
    terms = compose.main_effects(GRID)
    noise = [(compose.coefficients(GRID, terms, runs) ** 2).sum(1).max()
             for runs in (compose.one_at_a_time(GRID), compose.optimal(GRID, terms), compose.optimal(GRID, terms, 12))]
    assert noise[0] > noise[1] > noise[2]
    F = compose.columns(GRID, terms)
    best = compose.optimal(GRID, terms)
    volume = np.linalg.det(F[list(best)])**2
    for other in np.random.default_rng(1).permuted(np.tile(np.arange(30), (200, 1)), axis=1)[:, :8]:
        assert np.linalg.det(F[other])**2 <= volume * 1.0001


@pytest.mark.parametrize("k", [0, 1, 5])
def test_composed_latents_are_the_recipes_sum_and_the_runs_their_own(tiny_world, k):
    whole, plan = run(tiny_world, offer(k=k)), MAIN
    some = run(tiny_world, offer(Schedule(plan=plan), k=k))
    runs = list(plan.runs(k))
    assert some.N == len(runs) == 4 and torch.allclose(some.latents, whole.latents[runs], atol=1e-5)
    for i in range(6):
        picked = some.pick(Secret(i), plan.recipe(k))
        expected = sum(c * z for c, z in zip(plan.recipe(k)[i], some.latents, strict=True))
        assert picked.N == 1 and torch.allclose(picked.latents[0], expected.float(), atol=1e-6)
    if k == 5:
        other = next(i for i in range(6) if i not in runs)
        picked, state = some.pick(Secret(other), plan.recipe(k)), some.state["model_outputs"][-1]
        assert torch.allclose(picked.state["model_outputs"][-1][0], sum(
            c * e for c, e in zip(plan.recipe(k)[other], state, strict=True)).float(), atol=1e-5)
        assert not torch.allclose(picked.latents[0], whole.latents[other], atol=1e-5)


def test_composing_the_predictions_at_every_step_is_composing_the_latents_at_last(tiny_world):
    """A plan whose last stage opens at the last step has walked the others by composed predictions until then."""
    late = compose.Plan(AXES, (MAIN.stages[0], replace(ALL.stages[0], step=4)))
    offered = offer(Schedule(plan=late), k=5)
    seen = {}
    run(tiny_world, offered, on_step=lambda i, x: seen.update({i: x}))
    some = run(tiny_world, offer(Schedule(plan=MAIN), k=4))
    composed = torch.cat([some.pick(Secret(i), MAIN.recipe(4)).latents for i in range(6)])
    assert torch.allclose(seen[3], composed, atol=1e-5)


def test_a_plan_of_all_is_no_plan(tiny_world):
    whole, planned = run(tiny_world, offer()), run(tiny_world, offer(Schedule(plan=ALL)))
    assert torch.allclose(whole.latents, planned.latents, atol=1e-5)
    for i in (0, 4):
        ours, theirs = (finish(tiny_world, offer(schedule), hand_over, Secret(i))
                        for schedule, hand_over in ((None, whole), (Schedule(plan=ALL), planned)))
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("mode", ["exact", "restart"])
def test_the_device_composes_its_own_from_what_the_wire_brings(tiny_world, mode):
    offered = offer(Schedule(plan=MAIN), hand_over=mode)
    assert unpack_offer(pack_offer(offered)) == offered
    whole = pack_hand_over(run(tiny_world, offer(hand_over=mode)))
    sent = pack_hand_over(run(tiny_world, unpack_offer(pack_offer(offered))))
    assert len(sent) < len(whole)
    latents = [finish(tiny_world, offered, unpack_hand_over(sent), Secret(i)) for i in range(6)]
    assert decode(tiny_world, torch.cat(latents)).isfinite().all()
    assert len({tuple(z.flatten().tolist()) for z in latents}) == 6
    with pytest.raises(ValueError, match="for 6 candidates, here it is 4"):
        finish(tiny_world, offered, unpack_hand_over(whole), Secret(0))


# -------------------- a tree

def test_a_tree_asks_one_question_a_group_and_splits_at_its_steps(tiny_world):
    asked = []
    hook = tiny_world.cloud.register_forward_pre_hook(lambda module, args: asked.append(len(args[0]) // 2))
    try:
        tree = run(tiny_world, offer(Schedule(plan=TREE)))
    finally:
        hook.remove()
    assert asked == [1, 2, 6, 6, 6] and tree.N == 6
    base = compose.middle(AXES)
    whole, one = run(tiny_world, offer(k=1)), run(tiny_world, offer(Schedule(plan=TREE), k=1))
    assert one.N == 1 and torch.allclose(one.latents[0], whole.latents[base], atol=1e-5)
    seen = {}
    run(tiny_world, offer(Schedule(plan=TREE)), on_step=lambda i, x: seen.update({i: x}))
    assert len({tuple(z.flatten().tolist()) for z in seen[1]}) == 2
    assert torch.equal(tree.latents[base], seen[4][base])
    assert torch.allclose(tree.latents[base], run(tiny_world, offer()).latents[base], atol=1e-5)


def test_a_growing_plan_keeps_what_it_ran_and_its_model_grows(tiny_world):
    sizes = [len(stage.runs) for stage in GROWING.stages]
    assert sizes == [1, 3, 4] and all(set(a.runs) <= set(b.runs) for a, b in
                                      zip(GROWING.stages, GROWING.stages[1:], strict=False))
    assert [part.steps for part in GROWING.parts(range(0, 5))] == [range(1), range(1, 3), range(3, 5)]
    assert [part.steps for part in GROWING.parts(range(2, 3))] == [range(2, 3)]
    assert run(tiny_world, offer(Schedule(plan=GROWING), k=3)).N == 3


# -------------------- share

def ask(unet, schedule, z, text, step=0, chunk=3):
    rows = len(z) // 2
    found = torch.zeros_like(z)
    with schedule.applied(unet, candidates=rows) as at:
        at.see(z[rows:])
        for start in range(0, rows, chunk):
            mine = [*range(start, min(start + chunk, rows)), *range(rows + start, rows + min(start + chunk, rows))]
            with at(step, slice(start, start + chunk)):
                found[mine] = unet(z[mine], 500, encoder_hidden_states=text[mine], return_dict=False)[0]
    return found


def test_share_takes_the_unconditional_branch_at_the_mean_and_corrects_it(unet):
    z, text = batch()
    plain, shared = ask(unet, NONE, z, text), ask(unet, SHARED, z, text)
    assert torch.allclose(shared[3:], plain[3:], atol=1e-5)
    mean = z[:3].mean(0, keepdim=True)
    nothing = unet(mean, 500, encoder_hidden_states=text[:1], return_dict=False)[0]
    assert torch.allclose(shared[:3], nothing.expand(3, -1, -1, -1), atol=1e-5)
    corrected = ask(unet, replace(SHARED, share_gain=(0.5,) * 5), z, text)
    assert torch.allclose(corrected[:3], nothing + 0.5 * (z[:3] - mean), atol=1e-5)
    assert torch.allclose(ask(unet, SHARED, z, text, chunk=2), shared, atol=1e-5)
    with pytest.raises(ValueError, match="not of a chunk"), SHARED.applied(unet, candidates=3) as at:
        with at(0, slice(0, 2)):
            unet(z[[0, 1, 3, 4]], 500, encoder_hidden_states=text[[0, 1, 3, 4]])


def test_share_changes_nothing_where_the_latents_are_one(unet, tiny_world):
    z, text = batch()
    z = z[:1].expand(6, -1, -1, -1)
    assert torch.allclose(ask(unet, SHARED, z, text), ask(unet, NONE, z, text), atol=1e-5)
    assert torch.allclose(run(tiny_world, offer(SHARED, k=1)).latents, run(tiny_world, offer(k=1)).latents, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_gain_is_that_of_gaussian_data(prediction, tiny_world):
    """x_0 = s a, z = alpha x_0 + sigma e: the least squares slope of what is predicted on z."""
    scheduler = type(tiny_world.schedulers["cloud"]).from_config(tiny_world.schedulers["cloud"].config,
                                                                 prediction_type=prediction)
    x, e = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t, s in ((900, 1.0), (500, 1.0), (300, 2.0)):
        alpha = scheduler.alphas_cumprod[t].double().sqrt()
        sigma = (1 - alpha**2).sqrt()
        z = alpha * s * x + sigma * e
        y = {"epsilon": e, "sample": s * x, "v_prediction": alpha * e - sigma * s * x}[prediction]
        assert share.gain(scheduler, t, s) == pytest.approx(float((z @ y) / (z @ z)), abs=0.02)
    found = share.gains(scheduler, 25, (0, 1, 2))
    assert len(found) == 3 and (prediction != "v_prediction" or np.allclose(found, 0))


# -------------------- larger steps

def test_larger_steps_end_at_the_same_noise_level_and_nothing_else_changes(tiny_world):
    split = Split(25, 5)
    assert coarse.fitting(split) == (1, 2, 3, 4) and coarse.fitting(Split(25, 3)) == ()
    few = coarse.coarse(split, 2)
    assert (few.k, few.cloud_T, few.join, few.cloud_steps) == (2, 10, 5, 2)
    cloud, device = (denoise.fresh(tiny_world.schedulers[side], T) for side, T in (("cloud", 10), ("device", 25)))
    assert abs(int(cloud.timesteps[2]) - int(device.timesteps[5])) <= 1
    assert denoise.matching_shift(cloud, device, few) == few.shift
    offered = Offer(tiny.CANDIDATES, 7, few, Schedule(plan=MAIN, share=(0, 1)))
    hand_over = run(tiny_world, offered)
    assert hand_over.mode == "restart" and finish(tiny_world, offered, hand_over, Secret(3)).isfinite().all()
    with pytest.raises(ValueError, match="one of 1, 2, 3, 4"):
        coarse.coarse(split, 5)
    with pytest.raises(ValueError, match="one of none"):
        coarse.coarse(Split(25, 3), 2)
    with pytest.raises(ValueError, match="start from a split without cloud_T"):
        coarse.coarse(few, 1)


# -------------------- the rules for all

@pytest.mark.parametrize("name", PLANS)
def test_it_leaves_the_model_as_it_was_and_chunks_make_no_difference(tiny_world, name):
    cloud = tiny_world.cloud
    before, weights = trace(cloud), {key: value.clone() for key, value in cloud.state_dict().items()}
    plain = run(tiny_world, offer())
    fast = run(tiny_world, offer(PLANS[name]))
    assert trace(cloud) == before and torch.equal(run(tiny_world, offer()).latents, plain.latents)
    assert all(torch.equal(value, weights[key]) for key, value in cloud.state_dict().items())
    rows = PLANS[name].plan.runs(5) if PLANS[name].plan else range(6)
    assert name == "compose" or not torch.allclose(fast.latents, plain.latents[list(rows)], atol=1e-4)
    chunked = run(tiny_world, offer(PLANS[name]), memory_limit=2 * call_bytes(cloud, tiny_world.shape))
    assert torch.allclose(fast.latents, chunked.latents, atol=1e-4)


@pytest.mark.parametrize("name", PLANS)
def test_predicted_multiply_adds_are_those_counted(name):
    schedule, net = PLANS[name], tiny.unet(**tiny.SMALL).eval()
    shape = cost.shape(net, tokens=TOKENS)
    parts = schedule.plan.parts(range(5)) if schedule.plan else (compose.Part(range(5), tuple(range(6)), (), None),)
    found = [count for part in parts for count in counted(net, schedule, part.steps, len(part.asked), len(part.asked))]
    assert found == [cost.step_macs(shape, schedule, step, 6) for step in range(5)]
    assert sum(found) == cost.macs(shape, schedule, 5, 6) < cost.macs(shape, NONE, 5, 6)


def test_predicted_multiply_adds_with_chunks_reuse_and_a_shared_branch():
    net = tiny.unet(**tiny.SMALL).eval()
    shape, schedule = cost.shape(net, tokens=TOKENS), Schedule(reuse=(0, 1), share=(1,))
    seen = batch()[0][:3]

    class Told(Schedule):
        def applied(self, *args, **options):
            from contextlib import contextmanager

            @contextmanager
            def told():
                with Schedule.applied(self, *args, **options) as at:
                    at.see(seen)
                    yield at
            return told()

    assert counted(net, Told(**vars(schedule)), range(3), 3, 2) == [
        cost.step_macs(shape, schedule, step, 3, chunks=2) for step in range(3)]


def test_kept_bytes_count_the_shared_branch_once(unet):
    schedule = Schedule(share=(0, 1), cache=(1,), skip=(1,))
    z, text = batch()
    with schedule.applied(unet, candidates=3) as at:
        for step in (0, 1):
            with at(step):
                unet(z, 500, encoder_hidden_states=text)
        held = at.bytes() - sum(t.untyped_storage().nbytes() for t in at.within["share"])
    assert held == sum(cost.kept_bytes(cost.shape(unet, tokens=TOKENS), schedule, 3, itemsize=4).values())


def test_thirty_candidates_for_less_than_one_plain_generation():
    """On SD-v1.4's shapes at k = 5: main effects, one unconditional branch, the paper's caches."""
    shape = cost.shape("sd14")
    one = cost.macs(shape, NONE, 25, 1)
    eight = Schedule.points(5, 3, 3, share=tuple(range(5)), plan=compose.composed(GRID))
    assert cost.macs(shape, eight, 5, 30) / one < 0.9 < cost.macs(shape, PAPER_K5, 5, 30) / one / 3
    assert cost.hand_over_bytes(shape, len(eight.plan.runs(5))) == 8 * 32 * 1024


@pytest.mark.parametrize("name", PLANS)
def test_a_schedule_with_a_plan_travels_as_plain_data(name):
    assert Schedule.from_dict(json.loads(json.dumps(PLANS[name].to_dict()))) == PLANS[name]


# -------------------- what the cloud sees

TEXT = "an old woman in her garden"
TECHNIQUES = {
    "share": lambda axes, real: Schedule(share=(0, 1)),
    "compose": lambda axes, real: Schedule(plan=compose.composed(axes)),
    "compose with pairs": lambda axes, real: Schedule(plan=compose.composed(axes, [(0, 1)])),
    "tree": lambda axes, real: Schedule(plan=branch.tree(axes, (1, 0)[:len(axes)])),
    "growing": lambda axes, real: Schedule(plan=branch.growing(axes, [(0, ()), (1, compose.main_effects(axes))])),
    "all, with the caches": lambda axes, real: Schedule.points(5, 3, 3, share=(0, 1, 2, 3, 4),
                                                              plan=compose.composed(axes)),
}
LEAKS = {
    "the real one is run": lambda axes, real: Schedule(plan=compose.composed(
        axes, runs=compose.optimal(axes, compose.main_effects(axes), keep=(real,)))),
    "the real one is the base": lambda axes, real: Schedule(plan=branch.tree(axes, (1, 1), base=real)),
    "changes around the real one": lambda axes, real: Schedule(plan=compose.composed(
        axes, runs=compose.one_at_a_time(axes, real))),
    "the real age splits early": lambda axes, real: Schedule(plan=branch.tree(axes, (real % 2, 1 - real % 2))),
    "shared steps by secret": lambda axes, real: Schedule(share=tuple(range(1 + real % 2))),
}


def client(make, split=None):
    def sends(text):
        prompt = parse(text)
        axes = compose.axes_of(candidate_values(prompt))
        schedule = make(axes, real_index(prompt))
        return {(pack_offer(Offer(candidates(prompt), 3, split or Split(), schedule)),): 1.0}

    return sends


def test_no_technique_tells_the_cloud_which_candidate_is_real():
    for make in TECHNIQUES.values():
        assert exact_audit(client(make), spellings(parse(TEXT))).holds
    assert exact_audit(client(lambda axes, real: None, coarse.coarse(Split(25, 5), 2)), candidates(parse(TEXT))).holds


def test_a_technique_that_looks_at_the_real_candidate_is_found():
    for make in LEAKS.values():
        found = exact_audit(client(make), candidates(parse(TEXT)))
        assert not found.holds and found.advantage == 1


def test_every_seeded_leak_of_the_audit_is_found_beside_every_technique():
    """The mutants of notebook 01, each with a plan, a shared branch and caches in its offer."""
    schedule = TECHNIQUES["all, with the caches"]((3, 2), 0).to_dict()

    def serialise(fields):
        more = {"acceleration": fields["acceleration"] or schedule} if "candidates" in fields else {}
        return envelope({**fields, **more})

    table = mutant_table(TEXT, serialise)
    assert [row["mutant"] for row in table if not row["found"]] == ["none (all candidates)", "none (subset)"]


def test_the_plan_as_plain_data_in_an_offers_fields_is_the_same_for_all():
    prompts = [parse(text) for text in candidates(parse(TEXT))]
    sent = {json.dumps(offer_fields(candidates(p), acceleration=Schedule(
        plan=compose.composed(compose.axes_of(candidate_values(p)))).to_dict())) for p in prompts}
    assert len(sent) == 1


def test_what_the_cloud_hands_over_does_not_depend_on_the_secret(tiny_world):
    offered = offer(PLANS["compose, share"])
    assert pack_hand_over(run(tiny_world, offered)) == pack_hand_over(run(tiny_world.half("cloud"), offered))


# -------------------- refusals

@pytest.mark.parametrize("wrong, words", [
    (dict(share=(0,), tgate=(1,)), "use one of them"), (dict(share=(0, 1), share_gain=(1.0,)), "expected one a step"),
    (dict(share=(0,), share_gain=("a",)), "list of numbers"), (dict(plan=3), "expected a Plan"),
    (dict(plan={"axes": [2]}), "no plan"), (dict(plan={"axes": [2], "stages": [3]}), "expected lists"),
    (dict(plan={"axes": [2], "stages": []}), "expected 0 and then later ones"),
    (dict(plan={"axes": [0], "stages": [{"step": 0, "runs": [0], "terms": []}]}), "numbers of values"),
    (dict(plan={"axes": [2], "stages": [{"step": 0, "runs": [2], "terms": []}]}), "some of 2"),
    (dict(plan={"axes": [2], "stages": [{"step": 0, "runs": [0], "terms": [[0]]}]}), "do not tell the 2 unknowns"),
    (dict(plan={"axes": [2], "stages": [{"step": 0, "runs": [0, 1], "terms": [[1]]}]}), "beyond the 1"),
    (dict(plan={"axes": [2], "stages": [{"step": 0, "runs": [1, 0], "terms": []}]}), "ascending"),
    (dict(plan={"axes": [2], "stages": [{"step": 0, "runs": [0], "terms": [[]]}]}), "always there"),
    (dict(plan={"axes": [2], "stages": [{"step": -1, "runs": [0], "terms": []}]}), "whole numbers"),
    (dict(plan={"axes": [5000], "stages": [{"step": 0, "runs": [0], "terms": []}]}), "at most 4096"),
    (dict(plan=TREE, cache=(2,)), "start it a step later"),
])
def test_what_cannot_work_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        Schedule(**wrong)


def test_a_plan_for_another_number_of_candidates_and_a_part_of_a_set_are_refused(tiny_world):
    with pytest.raises(ValueError, match="for 30 candidates .*, offered are 6"):
        run(tiny_world, offer(Schedule(plan=compose.composed(GRID))))
    values = candidate_values(parse(TEXT))
    assert compose.axes_of(values) == (3, 2)
    with pytest.raises(ValueError, match="not all combinations"):
        compose.axes_of(values[:5])
    with pytest.raises(ValueError, match="2 steps are given for 3"):
        branch.tree(GRID, (1, 2))
    with pytest.raises(ValueError, match="expected 4"):
        compose.optimal(AXES, compose.main_effects(AXES), 3)
