"""Worlds load from folders as real checkpoints do, say in one sentence what is missing, and condition as diffusers."""

from __future__ import annotations

import shutil
from dataclasses import replace

import diffusers
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from obclip_core import denoise, worlds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("saved"))


def test_a_world_is_loaded_by_folder_or_by_file(folder):
    a, b = worlds.load(folder), worlds.load(folder / "world.toml")
    assert (a.name, a.shape, a.T, a.guidance) == ("tiny", (4, 8, 8), 25, {"cloud": 5.0, "device": 5.0})
    assert worlds.fingerprint(a) == worlds.fingerprint(b)
    assert not any(p.requires_grad for p in a.cloud.parameters()) and not a.cloud.training
    assert a.device.mid_block is None and len(a.device.down_blocks[0].resnets) == 1


def test_the_fingerprint_knows_every_weight_and_setting(folder):
    world = worlds.load(folder)
    before = worlds.fingerprint(world)
    assert worlds.fingerprint(replace(world, guidance={"cloud": 5.0, "device": 4.0})) != before
    with torch.no_grad():
        world.device.conv_out.bias[0] += 1e-3
    assert worlds.fingerprint(world) != before


def test_one_side_is_loaded_without_the_other(folder):
    cloud, device = worlds.load(folder, side="cloud"), worlds.load(folder, side="device")
    assert cloud.device is None and cloud.vae is None and device.cloud is None and device.vae is not None
    assert torch.equal(cloud.cloud.conv_in.weight, worlds.load(folder).cloud.conv_in.weight)


def test_another_cloud_brings_its_own_steps_guidance_and_scheduler(folder):
    world = worlds.load(folder, cloud="cloud_lcm", dtype=torch.bfloat16)
    assert (world.cloud_T, world.guidance["cloud"], world.guidance["device"]) == (8, 8.0, 5.0)
    assert isinstance(world.schedulers["cloud"], diffusers.LCMScheduler)
    assert isinstance(world.schedulers["device"], diffusers.DPMSolverMultistepScheduler)
    assert world.schedulers["cloud"].config.beta_end == 0.012, "the noise levels are those of the scheduler's folder"
    assert world.schedulers["cloud"].config.prediction_type == "v_prediction"
    assert world.dtype == torch.bfloat16
    assert not worlds.guided(world, "cloud") and worlds.guided(world, "device")


@pytest.mark.parametrize("layout", ["sd", "sdxl"])
def test_prompts_are_encoded_as_the_stock_pipelines_do(layout, tiny_world, tiny_sdxl):
    world = tiny_world if layout == "sd" else tiny_sdxl
    texts = list(tiny.CANDIDATES)
    text = worlds.condition(world, "cloud", texts)
    if layout == "sd":
        scheduler = diffusers.DDIMScheduler(steps_offset=1)
        pipe = diffusers.StableDiffusionPipeline(world.vae, world.text_encoders[0], world.tokenizers[0], world.cloud,
                                                 scheduler, None, None, requires_safety_checker=False)
        prompt, empty = pipe.encode_prompt(texts, "cpu", 1, True)
    else:
        pipe = diffusers.StableDiffusionXLPipeline(
            world.vae, *world.text_encoders, *world.tokenizers, world.cloud, diffusers.DDIMScheduler(),
            add_watermarker=False)
        prompt, empty, pooled, empty_pooled = pipe.encode_prompt(texts, device="cpu")
        added = text[slice(1, 4)]["added_cond_kwargs"]
        assert torch.allclose(added["text_embeds"], torch.cat([empty_pooled[1:4], pooled[1:4]]), atol=1e-6)
        assert added["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 6
    both = text[slice(1, 4)]["encoder_hidden_states"]
    assert torch.allclose(both, torch.cat([empty[1:4], prompt[1:4]]), atol=1e-6)


def test_the_embedding_of_a_guidance_scale_is_diffusers():
    pipe = diffusers.StableDiffusionXLPipeline
    for dim in (16, 17, 256):
        theirs = pipe.get_guidance_scale_embedding(None, torch.tensor([7.0]), dim)
        assert torch.allclose(worlds._scale_embedding(7.0, dim), theirs, atol=1e-4)


def test_a_prompt_that_is_cut_is_told(tiny_world):
    with pytest.warns(UserWarning, match="longer than the 77 tokens"):
        worlds.encode(tiny_world, ["sea " * 90])
    assert worlds.tokens(tiny_world) == 77


def edited(folder, tmp_path, old, new):
    """A copy of the world with one change in its .toml."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    text = (copy / "world.toml").read_text("utf-8")
    assert old in text
    (copy / "world.toml").write_text(text.replace(old, new), "utf-8")
    return copy


@pytest.mark.parametrize(("old", "new", "sentence"), [
    ('"./device"', '"./nowhere"', r"the device U-Net of world world is not at .*nowhere: fetch or train"),
    ('"./device"', "3", "has no source"),
    ("[device]", "[gadget]", r"no table \[device\]"),
    ("guidance = 5.0", "guidance = 0.5", "guidance scale is 0.5, expected a number from 1"),
    ('name = "tiny"', "name = ", "cannot read the world"),
    ("LCMScheduler", "NoScheduler", "'NoScheduler' is not one of diffusers'"),
    ('class = "LCMScheduler"', 'class = "LCMScheduler", tempo = 3', "LCMScheduler has no setting 'tempo'"),
])
def test_what_is_wrong_with_a_world_is_said_in_one_sentence(old, new, sentence, folder, tmp_path):
    with pytest.raises(worlds.WorldError, match=sentence) as refusal:
        worlds.load(edited(folder, tmp_path, old, new), cloud="cloud_lcm" if "Scheduler" in old else "cloud")
    assert "\n" not in str(refusal.value)


def test_a_damaged_part_is_named(folder, tmp_path):
    copy = edited(folder, tmp_path, "T = 25", "T = 25")
    (copy / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(worlds.WorldError, match="the VAE of world world from ./vae: it may be damaged"):
        worlds.load(copy)


def test_two_latent_spaces_make_no_world(tiny_world):
    with pytest.raises(worlds.WorldError, match=r"the cloud's latents are \(4, 8, 8\), the device's \(4, 16, 16\)"):
        replace(tiny_world, device=tiny.unet(device=True, sample_size=16))


def test_an_unknown_world_or_cloud_lists_the_known_ones(folder):
    with pytest.raises(worlds.WorldError, match="there is no world 'nowhere'.*use one of .*portraits"):
        worlds.load("nowhere")
    with pytest.raises(worlds.WorldError, match="its clouds are cloud, cloud_lcm"):
        worlds.load(folder, cloud="cloud_nine")
    with pytest.raises(worlds.WorldError, match="side is 'server'"):
        worlds.load(folder, side="server")


def test_an_unreachable_hub_is_one_sentence_at_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(worlds, "_reachable", lambda address: False)
    copy = edited(folder, tmp_path, '"./device"', '"owner/of-nothing/unet"')
    with pytest.raises(worlds.WorldError, match="from owner/of-nothing/unet: it is not in the Hugging Face cache"):
        worlds.load(copy)


def test_the_papers_worlds_are_declared_and_whole():
    assert set(worlds.names()) >= {"portraits", "sd14-bk-small", "sd14-bk-tiny", "rv40-small-sd", "sdxl-koala",
                                   "lcm-sdxl-koala"}
    import tomllib
    for name in worlds.names():
        spec = tomllib.loads((worlds.DATA / "worlds" / f"{name}.toml").read_text("utf-8"))
        assert spec["name"] == name and spec["T"] == 25
        assert {"text", "vae", "scheduler", "cloud", "device"} <= set(spec)
        assert len(spec["text"]["tokenizers"]) == len(spec["text"]["encoders"]) == (2 if "sdxl" in name else 1)


@pytest.mark.parametrize("part", ["cloud", "text_encoder"])
def test_missing_weights_are_refused_and_not_drawn_at_random(folder, tmp_path, part):
    broken = tmp_path / "world"
    shutil.copytree(folder, broken)
    (weights,) = (broken / part).glob("*.safetensors")
    kept = dict(sorted(load_file(weights).items())[3:])
    save_file(kept, weights, {"format": "pt"})
    with pytest.raises(worlds.WorldError, match="no weights for"):
        worlds.load(broken)


@pytest.mark.parametrize("sdxl", [False, True])
def test_a_cloud_with_random_weights_runs_as_a_real_one_does(sdxl):
    cloud = worlds.untrained(dict(tiny.unet(sdxl).config))
    handed = denoise.run(cloud, denoise.Offer(tiny.CANDIDATES[:2], seed=0, split=denoise.Split(T=4, k=2)))
    assert handed.latents.shape == (2, 4, 8, 8) and handed.latents.isfinite().all()
    with pytest.raises(worlds.WorldError, match="has no device"):
        cloud.unet("device")


def test_an_unknown_architecture_is_refused_by_name():
    with pytest.raises(ValueError, match="'sd9' is no U-Net of the paper: use one of bk-sdm-small"):
        worlds.untrained("sd9")
