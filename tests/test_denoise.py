"""Algorithm 1 against diffusers itself, and hand-overs against runs that were never split."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace

import diffusers
import pytest
import tiny
import torch

from obclip_core import worlds
from obclip_core.denoise import (
    HandOver,
    Offer,
    Secret,
    Split,
    call_bytes,
    decode,
    finish,
    generate,
    matching_shift,
    noised,
    run,
)

ONE = ("a portrait of a young male person by the sea",)
NOISE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
             steps_offset=1)
SCHEDULERS = {
    "dpmsolver++": diffusers.DPMSolverMultistepScheduler(**NOISE),
    "dpmsolver++ order 3": diffusers.DPMSolverMultistepScheduler(**NOISE, solver_order=3),
    "dpmsolver++ karras": diffusers.DPMSolverMultistepScheduler(**NOISE, use_karras_sigmas=True),
    "ddim": diffusers.DDIMScheduler(**NOISE, clip_sample=False),
    "euler": diffusers.EulerDiscreteScheduler(**NOISE),
    "unipc": diffusers.UniPCMultistepScheduler(**NOISE),
    "deis": diffusers.DEISMultistepScheduler(**NOISE),
    "sde-dpmsolver++": diffusers.DPMSolverMultistepScheduler(**NOISE, algorithm_type="sde-dpmsolver++"),
    "euler ancestral": diffusers.EulerAncestralDiscreteScheduler(**NOISE),
    "lcm": diffusers.LCMScheduler(**{key: NOISE[key] for key in NOISE if key != "steps_offset"}),
}


def with_scheduler(world, scheduler, **parts):
    return replace(world, schedulers={"cloud": scheduler, "device": scheduler}, **parts)


def pipeline(world, side):
    """The stock pipeline of one side's model, over the very same modules."""
    scheduler = copy.deepcopy(world.schedulers[side])  # the pipeline writes into the configuration it is given
    if len(world.tokenizers) == 1:
        pipe = diffusers.StableDiffusionPipeline(
            vae=world.vae, text_encoder=world.text_encoders[0], tokenizer=world.tokenizers[0], unet=world.unet(side),
            scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    else:
        pipe = diffusers.StableDiffusionXLPipeline(
            vae=world.vae, text_encoder=world.text_encoders[0], text_encoder_2=world.text_encoders[1],
            tokenizer=world.tokenizers[0], tokenizer_2=world.tokenizers[1], unet=world.unet(side),
            scheduler=scheduler, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def difference(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.mark.parametrize("layout", ["sd", "sdxl"])
@pytest.mark.parametrize(("side", "k"), [("cloud", 8), ("device", 0)])
def test_all_or_no_steps_on_the_cloud_are_the_stock_pipelines(layout, side, k, tiny_world, tiny_sdxl):
    world = tiny_world if layout == "sd" else tiny_sdxl
    ours = generate(world, Offer(ONE, 7, Split(8, k)), Secret(0))
    pipe = pipeline(world, side)
    common = dict(prompt=list(ONE), num_inference_steps=8, guidance_scale=5.0)
    assert difference(ours.latent, pipe(**common, generator=torch.Generator().manual_seed(7), output_type="latent")[0]
                      ) < 1e-5
    assert difference(ours.image[None], pipe(**common, generator=torch.Generator().manual_seed(7), output_type="pt")[0]
                      ) < 1e-5
    other = pipeline(world, "device" if side == "cloud" else "cloud")
    assert difference(ours.latent, other(**common, generator=torch.Generator().manual_seed(7), output_type="latent")[0]
                      ) > 1e-2


def test_all_candidates_on_the_cloud_are_the_stock_pipeline_from_one_noise(tiny_world):
    ours = run(tiny_world, Offer(tiny.CANDIDATES, 3, Split(6, 6))).latents
    z_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)).repeat(len(tiny.CANDIDATES), 1, 1, 1)
    theirs = pipeline(tiny_world, "cloud")(list(tiny.CANDIDATES), num_inference_steps=6, guidance_scale=5.0,
                                           latents=z_T, output_type="latent")[0]
    assert difference(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", ["lcm", "euler ancestral", "euler", "ddim"])
def test_other_schedulers_are_the_stock_pipeline_too(name, tiny_world):
    world = with_scheduler(tiny_world, SCHEDULERS[name])
    theirs = pipeline(world, "cloud")(list(ONE), num_inference_steps=6, guidance_scale=5.0, output_type="latent",
                                      generator=torch.Generator().manual_seed(1))[0]
    assert difference(run(world, Offer(ONE, 1, Split(6, 6))).latents, theirs) < 2e-5


def test_epsilon_prediction_is_the_stock_pipeline_too(tiny_world):
    world = with_scheduler(tiny_world, diffusers.DPMSolverMultistepScheduler(**NOISE | dict(prediction_type="epsilon")))
    theirs = pipeline(world, "cloud")(list(ONE), num_inference_steps=6, guidance_scale=5.0, output_type="latent",
                                      generator=torch.Generator().manual_seed(1))[0]
    ours = run(world, Offer(ONE, 1, Split(6, 6))).latents
    assert difference(ours, theirs) < 1e-5 * theirs.abs().max()
    assert difference(ours, run(tiny_world, Offer(ONE, 1, Split(6, 6))).latents) > 0.1


@pytest.mark.parametrize("sdxl", [False, True])
def test_an_embedded_guidance_scale_is_the_stock_pipelines(sdxl, tmp_path):
    tiny.save(tmp_path, sdxl=sdxl)
    world = worlds.load(tmp_path, cloud="cloud_lcm")
    theirs = pipeline(world, "cloud")(list(ONE), num_inference_steps=4, guidance_scale=8.0, output_type="latent",
                                      generator=torch.Generator().manual_seed(1))[0]
    assert difference(run(world, Offer(ONE, 1, Split(4, 4))).latents, theirs) < 1e-5


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_exact_hand_over_between_two_copies_changes_nothing(name, tiny_world):
    T = 16 if name == "dpmsolver++" else 6  # DPM-Solver++ lowers its order at the end of a walk below 15 steps
    world = with_scheduler(tiny_world, SCHEDULERS[name], device=tiny_world.cloud)
    texts, secret = tiny.CANDIDATES[:2], Secret(1)
    alone = run(world, Offer(texts[1:], 5, Split(T, T))).latents
    for k in range(1, T):
        offer = Offer(texts, 5, Split(T, k))
        assert difference(finish(world, offer, run(world, offer), secret), alone) < 1e-4, f"k = {k}"


def test_a_restart_loses_what_a_multistep_scheduler_remembers_and_nothing_else(tiny_world):
    world = replace(tiny_world, device=tiny_world.cloud)
    alone = run(world, Offer(ONE, 5, Split(8, 8))).latents
    for scheduler, loses in (("dpmsolver++", True), ("ddim", False), ("euler", False)):
        world = with_scheduler(world, SCHEDULERS[scheduler])
        alone = run(world, Offer(ONE, 5, Split(8, 8))).latents
        offer = Offer(ONE, 5, Split(8, 4, hand_over="restart"))
        hand_over = run(world, offer)
        assert not hand_over.state and hand_over.mode == "restart"
        assert (difference(finish(world, offer, hand_over, Secret(0)), alone) > 1e-3) == loses


@pytest.mark.parametrize(("name", "tensors"), [("dpmsolver++", 1), ("dpmsolver++ order 3", 2), ("ddim", 0),
                                               ("euler", 0)])
def test_the_state_is_no_more_than_later_steps_read(name, tensors, tiny_world):
    world = with_scheduler(tiny_world, SCHEDULERS[name])
    state = run(world, Offer(tiny.CANDIDATES, 0, Split(8, 4))).state
    kept = [x for value in state.values() for x in (value if isinstance(value, list) else [value])
            if isinstance(x, torch.Tensor)]
    assert len(kept) == tensors
    assert not any(isinstance(x, torch.Tensor) for value in run(world, Offer(ONE, 0, Split(4, 4))).state.values()
                   for x in (value if isinstance(value, list) else [value])), "after the last step nothing is read"


def test_pick_takes_the_latent_and_the_state_of_one_candidate(tiny_world):
    offer = Offer(tiny.CANDIDATES, 0, Split(8, 4))
    whole = run(tiny_world, offer)
    one = whole.pick(Secret(4))
    assert torch.equal(one.latents, whole.latents[4:5])
    assert torch.equal(one.state["model_outputs"][1], whole.state["model_outputs"][1][4:5])
    assert torch.equal(finish(tiny_world, offer, one, Secret(4)), finish(tiny_world, offer, whole, Secret(4)))
    with pytest.raises(ValueError, match="outside the 6 candidates"):
        whole.pick(Secret(6))


@pytest.mark.parametrize("name", ["dpmsolver++", "lcm"])
def test_same_seed_same_latent_whatever_the_candidates_and_the_memory(name, tiny_world):
    world = with_scheduler(tiny_world, SCHEDULERS[name])
    split, calls = Split(6, 6), []
    alone = run(world, Offer(tiny.CANDIDATES[2:3], 9, split)).latents
    among = run(world, Offer(tiny.CANDIDATES, 9, split)).latents
    handle = world.cloud.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    few = run(world, Offer(tiny.CANDIDATES, 9, split), memory_limit=4 * call_bytes(world.cloud, world.shape)).latents
    one = run(world, Offer(tiny.CANDIDATES, 9, split), memory_limit=1).latents
    handle.remove()
    assert calls == [8, 4] * 6 + [2] * 6 * 6, "a call carries every candidate twice: without and with its prompt"
    assert max(difference(few, among), difference(one, among), difference(alone, among[2:3])) < 1e-5
    assert difference(among[1], among[2]) > 1e-3, "the prompts matter"
    assert difference(run(world, Offer(ONE, 10, split)).latents, alone) > 0.1, "and so does the seed"


def test_client_first_is_the_mirror_of_cloud_first(tiny_world):
    mirror = replace(tiny_world, cloud=tiny_world.device, device=tiny_world.cloud)
    ours = generate(tiny_world, Offer(ONE, 2, Split(8, 3, first="device")), Secret(0))
    theirs = generate(mirror, Offer(ONE, 2, Split(8, 3)), Secret(0))
    assert torch.equal(ours.latent, theirs.latent)
    assert set(ours.seconds) == {"cloud", "device"} and min(ours.seconds.values()) > 0
    assert (Split(8, 3, first="device").cloud_steps, Split(8, 3).cloud_steps) == (5, 3)
    for alone in (Split(8, 0), Split(8, 8, first="device")):
        seconds = generate(tiny_world, Offer(ONE, 2, alone), Secret(0)).seconds
        assert seconds["cloud"] == 0 < seconds["device"], "a device that works alone never asks the cloud"


def test_each_half_has_only_its_own_model(tiny_world):
    cloud, device = tiny_world.half("cloud"), tiny_world.half("device")
    offer = Offer(tiny.CANDIDATES, 2, Split(6, 2))
    hand_over = run(cloud, offer)
    latent = finish(device, offer, hand_over, Secret(1))
    assert torch.equal(latent, generate(tiny_world, offer, Secret(1)).latent)
    for what in (lambda: run(device, offer), lambda: finish(cloud, offer, hand_over, Secret(1)),
                 lambda: decode(cloud, latent)):
        with pytest.raises(ValueError, match="this half of world tiny"):
            what()


def test_a_device_alone_needs_no_cloud_model_and_vanilla_no_device_model(tiny_world):
    alone, device = Offer(ONE, 2, Split(4, 0)), tiny_world.half("device")
    assert torch.equal(generate(device, alone, Secret(0)).latent, generate(tiny_world, alone, Secret(0)).latent)
    whole, no_device = Offer(tiny.CANDIDATES, 2, Split(4, 4)), replace(tiny_world, device=None)
    latents = run(tiny_world, whole).latents
    assert torch.equal(generate(no_device, whole, Secret(3)).latent, latents[3:4])


def test_every_step_is_told_in_order(tiny_world):
    told, offer = [], Offer(ONE, 2, Split(6, 2))
    first = run(tiny_world, offer, on_step=lambda step, x: told.append((step, x.shape)))
    finish(tiny_world, offer, first, Secret(0), on_step=lambda step, x: told.append((step, x.shape)))
    assert told == [(i, (1, 4, 8, 8)) for i in range(6)]


def test_an_acceleration_brackets_every_call_of_the_cloud_and_none_of_the_device(tiny_world):
    class Watch:
        said = []

        @contextmanager
        def applied(self, unet, candidates, guided):
            self.said.append((unet is tiny_world.cloud, candidates, guided))

            @contextmanager
            def at(step, rows):
                self.said.append((step, rows.start, rows.stop))
                yield
            yield at
            self.said.append("undone")

    offer = Offer(tiny.CANDIDATES, 2, Split(6, 2), Watch())
    hand_over = run(tiny_world, offer, memory_limit=3 * call_bytes(tiny_world.cloud, tiny_world.shape))
    finish(tiny_world, offer, hand_over, Secret(1))
    assert Watch.said == [(True, 6, True), (0, 0, 3), (0, 3, 6), (1, 0, 3), (1, 3, 6), "undone"]


def test_the_device_joins_a_distilled_clouds_latent_at_the_shifted_step(tmp_path):
    tiny.save(tmp_path)
    world, told = worlds.load(tmp_path, cloud="cloud_lcm"), []
    offer = Offer(tiny.CANDIDATES, 2, Split(25, 4, cloud_T=8, shift=8))
    hand_over = run(world, offer)
    assert (hand_over.step, hand_over.T, hand_over.mode) == (4, 8, "restart"), "two schedules share no state"
    finish(world, offer, hand_over, Secret(0), on_step=lambda step, x: told.append(step))
    assert told == list(range(12, 25))
    assert (offer.split.cloud_steps, offer.split.device_steps) == (4, 13)


def test_the_matching_shift_is_where_the_noise_levels_meet():
    sdxl = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading",
                steps_offset=1)
    lcm, dpm = diffusers.LCMScheduler(**sdxl), diffusers.DPMSolverMultistepScheduler(**sdxl)
    assert matching_shift(lcm, dpm, Split(25, 4, cloud_T=8)) == 8, "the best of 0, 4, 8, 10 in the paper's Table 4"
    assert [matching_shift(dpm, dpm, Split(25, k)) for k in (0, 5, 24)] == [0, 0, 0], "one schedule needs no shift"
    euler = diffusers.EulerDiscreteScheduler(**sdxl)
    assert matching_shift(lcm, euler, Split(25, 4, cloud_T=8)) == 8
    with pytest.raises(ValueError, match="no noise to match"):
        matching_shift(lcm, dpm, Split(25, 8, cloud_T=8))


def test_image_to_image_starts_from_a_noised_picture(tiny_world):
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    split, offer = Split(8, 5), Offer(tiny.CANDIDATES, 2, Split(8, 5))
    start = noised(tiny_world, picture, split, 3, seed=11)
    hand_over = run(tiny_world, offer, start=start)
    assert hand_over.latents.shape == (6, 4, 8, 8) and hand_over.step == 5
    # the same walk by hand, over diffusers' own parts
    scheduler, own = copy.deepcopy(tiny_world.schedulers["cloud"]), torch.Generator()
    scheduler.set_timesteps(8)
    clean = tiny_world.vae.encode(picture * 2 - 1).latent_dist.mean * tiny_world.vae.config.scaling_factor
    noise = torch.randn(1, 4, 8, 8, generator=own.manual_seed(11))
    x = scheduler.add_noise(clean, noise, scheduler.timesteps[3:4])
    assert difference(start.latents, x) < 1e-6
    scheduler.set_begin_index(3)
    text = worlds.condition(tiny_world, "cloud", tiny.CANDIDATES[:1])
    for t in scheduler.timesteps[3:5]:
        nothing, prompt = tiny_world.cloud(torch.cat([x, x]), t, **text[slice(None)]).sample.chunk(2)
        x = scheduler.step(nothing + 5.0 * (prompt - nothing), t, x).prev_sample
    assert difference(hand_over.latents[:1], x) < 1e-5
    assert not torch.equal(noised(tiny_world, picture, split, 3).latents, noised(tiny_world, picture, split, 3).latents)
    public = torch.randn(1, 4, 8, 8, generator=own.manual_seed(offer.seed))
    assert difference(start.latents, scheduler.add_noise(clean, public, scheduler.timesteps[3:4])) > 0.1


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda h: replace(h, scheduler=h.scheduler | {"solver_order": 3}), "whose solver_order is 3, here it is 2"),
    (lambda h: replace(h, scheduler=h.scheduler | {"_class_name": "DDIMScheduler"}), "class_name is 'DDIMScheduler'"),
    (lambda h: replace(h, T=7), "a schedule of 7 steps, here it is 6"),
    (lambda h: replace(h, step=3), "up to step 3, here it is 2"),
    (lambda h: replace(h, latents=h.latents[:, :, :4]), r"shape \(4, 4, 8\), here it is \(4, 8, 8\)"),
    (lambda h: replace(h, latents=h.latents.half()), "in float16, here it is float32"),
    (lambda h: replace(h, state={}, mode="restart"), "for restart hand-over, here it is exact"),
    (lambda h: replace(h, latents=h.latents[:3]), "for 3 candidates, here it is 6"),
])
def test_a_foreign_hand_over_is_refused_and_the_difference_named(change, sentence, tiny_world):
    offer = Offer(tiny.CANDIDATES, 0, Split(6, 2))
    with pytest.raises(ValueError, match=sentence):
        finish(tiny_world, offer, change(run(tiny_world, offer)), Secret(0))


@pytest.mark.parametrize(("make", "sentence"), [
    (lambda: Split(25, 26), r"k is 26, expected 0\.\.25"),
    (lambda: Split(25, -1), "k is -1"),
    (lambda: Split(25, 2.5), "k is 2.5, expected a whole number"),
    (lambda: Split(0, 0), "at least one step"),
    (lambda: Split(25, 9, cloud_T=8), r"k is 9, expected 0\.\.8"),
    (lambda: Split(25, 4, cloud_T=8, shift=22), r"k \+ shift is 26"),
    (lambda: Split(25, 4, first="server"), "first is 'server'"),
    (lambda: Split(25, 4, first="device", shift=2), "a cloud that goes first"),
    (lambda: Split(25, 4, hand_over="half"), "hand_over is 'half'"),
    (lambda: Offer((), 0), "at least one text"),
    (lambda: Offer(["a"], 0), "not a tuple"),
    (lambda: Offer(("a", "a"), 0), "offered twice"),
    (lambda: Offer(("a",), -1), "seed is -1"),
    (lambda: Offer(("a", "b"), 0, Split(first="device")), "offer one candidate"),
    (lambda: Secret(-1), "from 0 up"),
    (lambda: HandOver(torch.zeros(4, 8, 8), 2, 6, {}), r"expected floating point of shape \(N, C, h, w\)"),
    (lambda: HandOver(torch.zeros(1, 4, 8, 8), 7, 6, {}), r"step is 7, expected 0\.\.6"),
])
def test_what_makes_no_sense_is_refused_in_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence) as refusal:
        make()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("scheduler", [diffusers.HeunDiscreteScheduler(**NOISE), diffusers.PNDMScheduler()])
def test_schedulers_with_more_calls_than_steps_are_refused(scheduler, tiny_world):
    with pytest.raises(ValueError, match="needs one call a step"):
        run(with_scheduler(tiny_world, scheduler), Offer(ONE, 0, Split(6, 2)))


def test_a_secret_does_not_print(tiny_world):
    assert "3" not in repr(Secret(3))
    assert "secret" not in repr(Offer(ONE, 0)).lower() and "index" not in repr(Offer(ONE, 0))


def test_half_precision_walks_the_same_road(tmp_path):
    world = worlds.load(tiny.save(tmp_path), dtype=torch.bfloat16)
    hand_over = run(world, Offer(ONE, 0, Split(4, 2)))
    assert hand_over.latents.dtype == torch.bfloat16
    assert finish(world, Offer(ONE, 0, Split(4, 2)), hand_over, Secret(0)).isfinite().all()
