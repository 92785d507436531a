"""Trains the world `portraits`, part by part, from nothing: ``make world``, or for single parts
``.venv/bin/python data/portraits/train.py PART ...``.

Parts, in the order of what they need: vae, text, scorer, cloud, device, cloud_lcm. Each resumes from its last
checkpoint in data/portraits/cache/, logs its loss to data/portraits/curves/<part>.csv, and ends by writing its weights
to data/portraits/weights/<part>/ in the diffusers / transformers layout (fp16 safetensors).
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import os
import random
import time
import tomllib
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from pictures import CACHE, HERE, PROMPTS, VALUES, caption, pictures, word_weights
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from obclip_core.metrics import ScorerNet
from obclip_core.prompts import fill

SETTINGS = tomllib.loads((HERE / "settings.toml").read_text(encoding="utf-8"))
WEIGHTS, CURVES = HERE / "weights", HERE / "curves"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PARTS = ("vae", "text", "scorer", "cloud", "device", "cloud_lcm")


# ---------------------------------------------------------------------------------------------- one loop for every part


def mean_over_processes(parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one message."""
    if not dist.is_initialized():
        return
    flat = torch.cat([p.grad.reshape(-1) for p in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(grad.view_as(p))


def optimise(part: str, net: nn.Module, losses: Callable[[random.Random, int], dict[str, Tensor]]) -> nn.Module:
    """Train `net` by AdamW under a warm-up and cosine schedule, and return its moving average where one is kept.

    ``losses(rng, batch)`` gives the named terms of one batch; their sum is minimised. Every 250 steps a checkpoint is
    written; a run that was interrupted goes on from it.
    """
    s = SETTINGS[part]
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=s["learning_rate"], weight_decay=1e-3, betas=(0.9, 0.99), fused=True)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / s["steps"])))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    average = copy.deepcopy(net).eval().requires_grad_(False) if "ema" in s else None
    saved, first, spent = CACHE / f"{part}.pt", 0, 0.0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        first, spent = state["step"], state["seconds"]
        net.load_state_dict(state["net"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        if average is not None:
            average.load_state_dict(state["average"])
    began, sums, net = time.monotonic(), {}, net.train()
    bar = tqdm(range(first, s["steps"]), part, s["steps"], initial=first, disable=None if rank == 0 else True)
    for step in bar:
        # The stream of a step depends on its number alone, so a resumed run sees what an uninterrupted one sees.
        torch.manual_seed(SETTINGS["seed"] * 1_000_003 + step * processes + rank)
        terms = losses(random.Random(f"{part} {step} {rank}"), s["batch"] // processes)
        optimiser.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        mean_over_processes(trained)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        if average is not None:
            decay = min(s["ema"], (step + 1) / (step + 10))
            with torch.no_grad():
                for a, b in zip(average.parameters(), net.parameters(), strict=True):
                    a.lerp_(b, 1 - decay)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
        if rank == 0 and (step + 1) % 50 == 0:
            _log(part, step + 1, spent + time.monotonic() - began, {k: v / 50 for k, v in sums.items()})
        if (step + 1) % 50 == 0:
            sums = {}
        if rank == 0 and ((step + 1) % 250 == 0 or step + 1 == s["steps"]):
            state = {
                "step": step + 1,
                "seconds": spent + time.monotonic() - began,
                "net": net.state_dict(),
                "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
                "average": average.state_dict() if average is not None else None,
            }
            torch.save(state, saved.with_suffix(".tmp"))
            saved.with_suffix(".tmp").rename(saved)
            if part in ("cloud", "device", "cloud_lcm"):
                write(average, part)
    return (average if average is not None else net).eval().requires_grad_(False)


def _log(part: str, step: int, seconds: float, terms: dict[str, float]) -> None:
    CURVES.mkdir(exist_ok=True)
    path = CURVES / f"{part}.csv"
    rows = [r for r in csv.DictReader(path.open()) if int(r["step"]) < step] if path.exists() else []
    rows.append({"step": step, "seconds": round(seconds), **{k: f"{v:.5f}" for k, v in terms.items()}})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(part, rows[-1], flush=True)


def write(net: nn.Module, part: str) -> None:
    """Write a part's weights as fp16 safetensors, whole or not at all."""
    whole, half = WEIGHTS / part, WEIGHTS / f".{part}"
    copy.deepcopy(net).half().save_pretrained(half)
    config = half / "config.json"  # names the folder on this machine from which a model was loaded
    config.write_text("".join(line for line in config.open() if "_name_or_path" not in line))
    whole.mkdir(parents=True, exist_ok=True)
    for file in half.iterdir():
        file.rename(whole / file.name)
    half.rmdir()


def autocast() -> torch.autocast:
    """bfloat16 for the matrix products of the forward pass, on a GPU.

    A processor with avx512_bf16 but no matrix unit trains the U-Nets 1.8 times slower in it than in float32.
    """
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda")


def batch_of(rng: random.Random, images: np.ndarray, size: int) -> tuple[list[int], Tensor]:
    """Random picture numbers and their pictures (size, 3, 64, 64) in [0, 1]."""
    rows = [rng.randrange(len(images)) for _ in range(size)]
    x = torch.from_numpy(np.stack([images[i] for i in rows])).to(DEVICE)
    return rows, x.permute(0, 3, 1, 2).float() / 255


# ------------------------------------------------------------------------------------------------------------------ vae


def train_vae() -> None:
    """AutoencoderKL, 64 x 64 pictures to latents of 4 x 16 x 16, with an L1 and a squared error and a faint KL term."""
    s = SETTINGS["vae"]
    images, _ = pictures("generator", SETTINGS["pictures"]["generator"])
    channels = s["block_out_channels"]
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=64,
        mid_block_add_attention=False,
    ).to(DEVICE)

    def losses(rng: random.Random, size: int) -> dict[str, Tensor]:
        x = batch_of(rng, images, size)[1] * 2 - 1
        with autocast():
            latent = vae.encode(x).latent_dist
            y = vae.decode(latent.sample()).sample
        y, mean, logvar = y.float(), latent.mean.float(), latent.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
        return {"l1": 0.2 * F.l1_loss(y, x), "mse": F.mse_loss(y, x), "kl": s["kl_weight"] * kl}

    vae = optimise("vae", vae, losses)
    with torch.no_grad():
        x = torch.from_numpy(images[:1000]).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = torch.cat([vae.encode(part.to(DEVICE)).latent_dist.mean for part in x.split(50)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    write(vae, "vae")


# ----------------------------------------------------------------------------------------------------------------- text


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the vocabulary of the captions; a word outside it becomes <unk>."""
    split = pre_tokenizers.Split(Regex(r"[a-z0-9]+(?:-[a-z0-9]+)*|[^\sa-z0-9]"), "removed", invert=True)
    rng, found = random.Random(0), set()
    for template in (t for kind in PROMPTS["templates"].values() for t in kind):
        for _ in range(300):
            text = fill(template, {name: rng.choice(values) for name, values in VALUES.items()})
            found.update(word for word, _ in split.pre_tokenize_str(text.lower()))
    words = ["<|startoftext|>", "<|endoftext|>", "<unk>", *sorted(found)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.pre_tokenizer = split
    core.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=SETTINGS["text"]["max_tokens"],
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
    )


def answers_of(values: list[dict[str, str]]) -> dict[str, Tensor]:
    """For each attribute and word, the number of the right value of every picture, (N,)."""
    return {k: torch.tensor([v.index(row[k]) for row in values], device=DEVICE) for k, v in VALUES.items()}


def tokens_of(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(DEVICE)


def train_text() -> None:
    """CLIPTextModel, trained contrastively against a throw-away vision tower (as CLIP), then frozen.

    Place and colour are enough to tell a batch of pictures apart, so the contrast alone leaves mood and garment
    almost no part of the text states. Throw-away heads that read every word from the pooled state give them theirs.
    """
    s = SETTINGS["text"]
    images, values = pictures("generator", SETTINGS["pictures"]["generator"])
    tokenizer = make_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=s["width"],
        intermediate_size=4 * s["width"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        max_position_embeddings=s["max_tokens"],
        projection_dim=s["width"],
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        hidden_act="quick_gelu",
    )
    text = CLIPTextModel(config)
    vision = ScorerNet({"heads": {k: list(v) for k, v in VALUES.items()}, "vocabulary": ["a"], "dim": s["width"]})
    heads = nn.ModuleDict({name: nn.Linear(s["width"], len(found)) for name, found in VALUES.items()})
    both = nn.ModuleDict({"text": text, "vision": vision, "heads": heads}).to(DEVICE)
    answers = answers_of(values)
    # The scorer net's own text tower has no part in this: the text model takes its place.
    for name, p in vision.named_parameters():
        p.requires_grad_(not name.startswith(("token", "position", "encoder", "text_projection")))

    def losses(rng: random.Random, size: int) -> dict[str, Tensor]:
        rows, x = batch_of(rng, images, size)
        with autocast():
            t = text(tokens_of(tokenizer, [caption(values[i], rng) for i in rows])).pooler_output
            v = vision.image_projection(vision.features(x))
        logits = vision.logit_scale.exp() * F.normalize(v.float(), dim=-1) @ F.normalize(t.float(), dim=-1).T
        aim = torch.arange(size, device=DEVICE)
        # A caption that leaves a word out has no answer there; the heads then learn its base rate.
        words = sum(F.cross_entropy(head(t.float()), answers[k][rows]) for k, head in heads.items()) / len(heads)
        return {"image": F.cross_entropy(logits, aim) / 2, "text": F.cross_entropy(logits.T, aim) / 2, "words": words}

    both = optimise("text", both, losses)
    tokenizer.save_pretrained(WEIGHTS / "tokenizer")
    write(both["text"], "text_encoder")


# --------------------------------------------------------------------------------------------------------------- scorer


def train_scorer() -> None:
    """The judge: classifiers of every attribute and context word, and an image-text model, on pictures of its own."""
    images, values = pictures("scorer", SETTINGS["pictures"]["scorer"])
    vocabulary = sorted(make_tokenizer().get_vocab().keys() - {"<|startoftext|>", "<|endoftext|>", "<unk>"})
    net = ScorerNet({"heads": {k: list(v) for k, v in VALUES.items()}, "vocabulary": vocabulary}).to(DEVICE)
    answers = answers_of(values)

    def losses(rng: random.Random, size: int) -> dict[str, Tensor]:
        rows, x = batch_of(rng, images, size)
        # Colour noise and blur, so that the judge also reads pictures that are less crisp than drawings.
        x = (x + 0.04 * torch.randn_like(x) * torch.rand(size, 1, 1, 1, device=DEVICE)).clamp(0, 1)
        soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        x = torch.where(torch.rand(size, 1, 1, 1, device=DEVICE) < 0.3, soft, x)
        with autocast():
            logits, image, text = net(x, [caption(values[i], rng) for i in rows])
        image, text = image.float(), text.float()
        similar = net.logit_scale.exp() * image @ text.T
        aim = torch.arange(size, device=DEVICE)
        contrast = (F.cross_entropy(similar, aim) + F.cross_entropy(similar.T, aim)) / 2
        heads = sum(F.cross_entropy(logits[k].float(), answers[k][rows]) for k in VALUES) / len(VALUES)
        return {"contrast": 0.3 * contrast, "heads": heads}

    net = optimise("scorer", net, losses)
    net.save(WEIGHTS / "scorer")


# -------------------------------------------------------------------------------------------------- cloud, device, LCM


def make_unet(part: str) -> UNet2DConditionModel:
    """The U-Net of settings.toml's table `part`."""
    s = SETTINGS[part]
    down, up = s["cross_attention"], s.get("up_cross_attention", s["cross_attention"][::-1])
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=["CrossAttnDownBlock2D" if x else "DownBlock2D" for x in down],
        up_block_types=["CrossAttnUpBlock2D" if x else "UpBlock2D" for x in up],
        mid_block_type="UNetMidBlock2DCrossAttn" if s["mid_block"] else None,
        block_out_channels=s["block_out_channels"],
        layers_per_block=s["layers_per_block"],
        cross_attention_dim=SETTINGS["text"]["width"],
        attention_head_dim=4,
        norm_num_groups=32,
    ).to(DEVICE)


class Latents:
    """Every picture of the generator as a latent, encoded once, with its captions as token numbers."""

    def __init__(self) -> None:
        images, self.values = pictures("generator", SETTINGS["pictures"]["generator"])
        vae = AutoencoderKL.from_pretrained(WEIGHTS / "vae", low_cpu_mem_usage=False).to(DEVICE).eval()
        path = CACHE / f"latents-{len(images)}.pt"
        if not path.exists():
            with torch.no_grad():
                found = []
                for i in tqdm(range(0, len(images), 100), "encoding", disable=None):
                    x = torch.from_numpy(images[i : i + 100]).permute(0, 3, 1, 2).float() / 127.5 - 1
                    found.append(vae.encode(x.to(DEVICE)).latent_dist.mean * vae.config.scaling_factor)
                torch.save(torch.cat(found).half().cpu(), path.with_suffix(f".{os.getpid()}"))
            path.with_suffix(f".{os.getpid()}").rename(path)
        self.latents = torch.load(path, weights_only=True)
        self.tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "tokenizer")
        self.text = CLIPTextModel.from_pretrained(WEIGHTS / "text_encoder", dtype=torch.float32).to(DEVICE).eval()

    def rows(self, rng: random.Random, size: int) -> list[int]:
        """Random picture numbers."""
        return [rng.randrange(len(self.latents)) for _ in range(size)]

    def batch(self, rng: random.Random, rows: list[int], drop: float) -> tuple[Tensor, Tensor]:
        """Latents (N, 4, 16, 16) and text states (N, L, D) of `rows`; a share `drop` of the captions is empty."""
        texts = ["" if rng.random() < drop else caption(self.values[i], rng) for i in rows]
        z = self.latents[rows].float().to(DEVICE)
        # A mirrored picture would tell another place in the frame, so there is no flipping.
        return z, self.encode(texts)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        return self.text(tokens_of(self.tokenizer, texts)).last_hidden_state


def make_scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(**SETTINGS["scheduler"])


def alpha_sigma(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t, each (N, 1, 1, 1), of the training schedule."""
    bar = make_scheduler().alphas_cumprod.to(DEVICE)[timesteps].view(-1, 1, 1, 1)
    return bar.sqrt(), (1 - bar).sqrt()


def diffuse(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Random timesteps (stratified over the batch), noised latents and the v that the U-Net should predict."""
    n = len(z)
    spread = (torch.arange(n, device=DEVICE) + torch.rand(n, device=DEVICE)) / n
    t = (spread * 1000).long().clamp(max=999)
    noise = torch.randn_like(z)
    a, s = alpha_sigma(t)
    return t, a * z + s * noise, a * noise - s * z


def train_cloud() -> None:
    """The cloud's U-Net: v-prediction on latents, captions dropped at times for classifier-free guidance.

    Mood and garment are a few latent pixels and a small share of the mean error, so the places that show them weigh
    more. Which v is best at a pixel does not depend on its weight; how soon it is learned does.
    """
    s, data, net = SETTINGS["cloud"], Latents(), make_unet("cloud")
    weights = word_weights("generator", SETTINGS["pictures"]["generator"])

    def losses(rng: random.Random, size: int) -> dict[str, Tensor]:
        rows = data.rows(rng, size)
        z, states = data.batch(rng, rows, s["drop_caption"])
        weight = 1 + s["word_weight"] * torch.from_numpy(weights[rows]).float().to(DEVICE)[:, None]
        t, noisy, v = diffuse(z)
        with autocast():
            out = net(noisy, t, states).sample
        error = (out.float() - v).square()
        return {"v": (weight * error).mean() / weight.mean()}

    net = optimise("cloud", net, losses)
    if rank_zero():
        write(net, "cloud")
        make_scheduler().save_pretrained(WEIGHTS / "scheduler")


def features_of(unet: UNet2DConditionModel, kept: dict[str, Tensor]) -> None:
    """Keep what the levels that both U-Nets have give, by a name that both share: before and after the bottleneck."""
    last = [getattr(block, "attentions", block.resnets)[-1] for block in unet.down_blocks[:2]]
    pairs = {"down0": last[0], "down1": last[1], "up-2": unet.up_blocks[-2], "up-1": unet.up_blocks[-1]}

    def keep(name: str) -> Callable:
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor | tuple) -> None:
            kept[name] = output if isinstance(output, Tensor) else output[0]

        return hook

    for name, module in pairs.items():
        module.register_forward_hook(keep(name))


def copy_blocks(teacher: UNet2DConditionModel, student: UNet2DConditionModel) -> None:
    """Start the student from the teacher's weights, block by block, wherever a block is left in place (BK-SDM)."""
    theirs, ours = teacher.state_dict(), student.state_dict()
    removed = len(teacher.up_blocks) - len(student.up_blocks)
    for name, value in ours.items():
        where = name.split(".")
        if where[0] == "up_blocks":
            where[1] = str(int(where[1]) + removed)
        source = theirs.get(".".join(where))
        if source is not None and source.shape == value.shape:
            value.copy_(source)
    student.load_state_dict(ours)


def train_device() -> None:
    """The device's U-Net: blocks of the cloud's removed, then distilled by outputs and features (as BK-SDM)."""
    data, student = Latents(), make_unet("device")
    teacher = UNet2DConditionModel.from_pretrained(WEIGHTS / "cloud", low_cpu_mem_usage=False)
    teacher = teacher.float().to(DEVICE).eval().requires_grad_(False)
    copy_blocks(teacher, student)
    theirs, ours = {}, {}
    features_of(teacher, theirs)
    features_of(student, ours)

    def losses(rng: random.Random, size: int) -> dict[str, Tensor]:
        z, states = data.batch(rng, data.rows(rng, size), SETTINGS["device"]["drop_caption"])
        t, noisy, v = diffuse(z)
        with autocast():
            with torch.no_grad():
                goal = teacher(noisy, t, states).sample.float()
            out = student(noisy, t, states).sample.float()
        # A level where the student is narrower has nothing to compare.
        same = [k for k in ours if ours[k].shape == theirs[k].shape]
        feature = sum(
            F.mse_loss(ours[k].float(), theirs[k].float()) / theirs[k].float().square().mean() for k in same
        ) / len(same)
        return {"v": F.mse_loss(out, v), "output": F.mse_loss(out, goal), "feature": 0.1 * feature}

    net = optimise("device", student, losses)
    if rank_zero():
        write(net, "device")


def train_cloud_lcm() -> None:
    """The step-distilled cloud: latent consistency distillation of the guided cloud, guidance built in (LCM)."""
    data = Latents()
    teacher = UNet2DConditionModel.from_pretrained(WEIGHTS / "cloud", low_cpu_mem_usage=False)
    teacher = teacher.float().to(DEVICE).eval().requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    target = copy.deepcopy(teacher)
    scale, skip = SETTINGS["guidance"]["scale"], 20
    empty = data.encode([""])

    def boundary(t: Tensor) -> tuple[Tensor, Tensor]:
        # LCM's c_skip and c_out with sigma_data 0.5 and timestep scaling 10: the scheduler of the same name uses them.
        scaled = (t * 10.0).view(-1, 1, 1, 1)
        return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()

    def clean(v: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        a, s = alpha_sigma(t)
        return a * noisy - s * v

    def consistent(net: nn.Module, noisy: Tensor, t: Tensor, states: Tensor) -> Tensor:
        c_skip, c_out = boundary(t)
        return c_skip * noisy + c_out * clean(net(noisy, t, states).sample.float(), noisy, t)

    def losses(rng: random.Random, size: int) -> dict[str, Tensor]:
        z, states = data.batch(rng, data.rows(rng, size), 0.0)
        t = torch.randint(0, 1000 // skip, (size,), device=DEVICE) * skip + skip - 1
        before = (t - skip).clamp(min=0)
        a, s = alpha_sigma(t)
        noisy = a * z + s * torch.randn_like(z)
        with autocast():
            with torch.no_grad():
                texts = torch.cat([empty.expand_as(states), states])
                both = teacher(torch.cat([noisy, noisy]), torch.cat([t, t]), texts).sample.float()
                unled, led = both.chunk(2)
                v = unled + scale * (led - unled)
                # One DDIM step of the guided teacher, from t to `before`.
                a2, s2 = alpha_sigma(before)
                earlier = a2 * clean(v, noisy, t) + s2 * (s * noisy + a * v)
                goal = consistent(target, earlier, before, states)
            out = consistent(student, noisy, t, states)
        with torch.no_grad():
            for old, new in zip(target.parameters(), student.parameters(), strict=True):
                old.lerp_(new, 0.05)
        return {"huber": (((out - goal) ** 2 + 1e-6).sqrt() - 1e-3).mean()}

    net = optimise("cloud_lcm", student, losses)
    if rank_zero():
        write(net, "cloud_lcm")


# ----------------------------------------------------------------------------------------------------------------- main


def rank_zero() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _process(rank: int, processes: int, part: str, port: int) -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    if processes > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    torch.manual_seed(SETTINGS["seed"])
    globals()[f"train_{part}"]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "parts", nargs="*", choices=[*PARTS, []], help="which parts (default: all; a finished one is passed over)"
    )
    for part in parser.parse_args().parts or PARTS:
        if part in ("cloud", "device", "cloud_lcm"):
            Latents()  # draws and encodes the pictures, once for all processes
            word_weights("generator", SETTINGS["pictures"]["generator"])
        # Two processes of one thread each learn faster here than one of two; a GPU needs one.
        processes = 1 if DEVICE.type == "cuda" else SETTINGS[part]["processes"]
        if processes == 1:
            _process(0, 1, part, 0)
        else:
            torch.multiprocessing.spawn(_process, (processes, part, random.randrange(20000, 60000)), processes)


if __name__ == "__main__":
    main()
