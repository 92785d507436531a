"""A tiny random world in the folder layout of real checkpoints: it draws nothing sensible, in milliseconds."""

from __future__ import annotations

import tomllib
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from obclip_core import metrics, worlds
from obclip_core.prompts import ATTRIBUTES, DATA

WORDS = """a an photo portrait of the young middle aged old male female caucasian african asian indian european man
woman person smiling happy serious wearing red blue green scarf hat glasses coat by sea in garden park city with his her
their hair eyes standing at beach night library""".split()
CANDIDATES = tuple(f"a portrait of a {age} {gender} person by the sea"
                   for age in ("young", "middle-aged", "old") for gender in ("male", "female"))


SMALL = dict(block_out_channels=(8, 16), norm_num_groups=4)  # of a U-Net alone, where many are made
CONTEXT = tomllib.loads((DATA / "portraits.toml").read_text("utf-8"))["context"]


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows WORDS whole and spells all others letter by letter."""
    letters = sorted(ByteLevel.alphabet())
    merges = {}
    for word in WORDS:
        head, *tail = [*word[:-1], word[-1] + "</w>"]
        for letter in tail:
            merges[head, letter] = head = head + letter
    vocab = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters), *merges.values(),
                           "<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=list(merges), model_max_length=77)


def text_model(words: CLIPTokenizer, projected: bool = False) -> torch.nn.Module:
    cls = CLIPTextModelWithProjection if projected else CLIPTextModel
    return cls(CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=32, max_position_embeddings=77, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id))


def unet(sdxl: bool = False, device: bool = False, **options) -> UNet2DConditionModel:
    """The cloud's U-Net has two layers a block and a mid block; the device's, as BK-SDM's, one and none."""
    extra = dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
                 cross_attention_dim=64, transformer_layers_per_block=(1, 2),
                 use_linear_projection=True) if sdxl else {}
    small = dict(layers_per_block=1, mid_block_type=None) if device else dict(layers_per_block=2)
    return UNet2DConditionModel(**{**dict(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), norm_num_groups=8,
        cross_attention_dim=32, attention_head_dim=(2, 4), down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2), **small, **extra, **options})


def save(folder: Path, sdxl: bool = False, prediction: str = "v_prediction", seed: int = 0) -> Path:
    """Write a whole world with its world.toml under ``folder``, every part with its own save_pretrained."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        words = tokenizer()
        vae = AutoencoderKL(block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3,
                            up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=4,
                            layers_per_block=1, sample_size=32, scaling_factor=0.5)
        parts = {
            "tokenizer": words, "text_encoder": text_model(words), "vae": vae, "cloud": unet(sdxl),
            "device": unet(sdxl, device=True), "cloud_lcm": unet(sdxl, time_cond_proj_dim=16),
            "scheduler": DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                                     prediction_type=prediction, steps_offset=1),
        }
        if sdxl:
            parts |= {"tokenizer_2": words, "text_encoder_2": text_model(words, projected=True)}
    for name, part in parts.items():
        part.save_pretrained(str(folder / name))
    two = ', "./{0}_2"' if sdxl else ""
    (folder / "world.toml").write_text(f"""
name = "tiny{'-sdxl' if sdxl else ''}"
T = 25
guidance = 5.0
[text]
tokenizers = ["./tokenizer"{two.format("tokenizer")}]
encoders = ["./text_encoder"{two.format("text_encoder")}]
empty_is_zero = {str(sdxl).lower()}
[vae]
source = "./vae"
[scheduler]
source = "./scheduler"
[cloud]
unet = "./cloud"
[cloud_lcm]
unet = "./cloud_lcm"
T = 8
guidance = 8.0
scheduler = {{ source = "./scheduler", class = "LCMScheduler" }}
[device]
unet = "./device"
""", "utf-8")
    return folder


def save_judged(folder: Path, T: int = 12) -> str:
    """A world of T steps with a scorer beside it, which knows the words of portraits' prompts: its folder."""
    save(folder)
    heads = {name: list(values) for name, values in {**ATTRIBUTES, **CONTEXT}.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        metrics.ScorerNet({"heads": heads, "vocabulary": WORDS, "widths": [8, 8], "dim": 8, "layers": 1,
                           "attention_heads": 2}).save(folder / "scorer")
    file = folder / "world.toml"
    file.write_text(file.read_text("utf-8").replace("T = 25\n", f'T = {T}\nscorer = "./scorer"\n', 1), "utf-8")
    return str(folder)


def world(folder: Path, **options) -> worlds.World:
    return worlds.load(save(folder, **options))
