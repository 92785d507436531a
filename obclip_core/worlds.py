"""Worlds: the only place that loads models.

A world is a cloud U-Net and a device U-Net that share text encoders, VAE and latent space (paper, section 5.1). It is
declared in ``data/worlds/<name>.toml``; every part is a hub id (``owner/name/subfolder``) or a local folder in the
standard diffusers / transformers layout, so that the embedded world and real checkpoints take the same road.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import re
import socket
import tomllib
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
import transformers

from obclip_core.cost import unet_config

DATA = Path(__file__).resolve().parent.parent / "data"
SIDES = ("cloud", "device")


class WorldError(ValueError):
    """A world that cannot be loaded, in one sentence: what, where it was looked for, what to do."""


@dataclass(frozen=True, eq=False)
class World:
    """A pair of models in one latent space, or one half of it (the other half's U-Net is then None).

    ``shape`` is (C, h, w) of one latent, ``T`` the usual number of steps. ``guidance`` maps a side to its guidance
    scale (1 switches guidance off), ``schedulers`` maps a side to a diffusers scheduler that is copied and never
    stepped. ``cloud_T`` is set where the cloud model is step-distilled and has its own number of steps.
    """

    name: str
    tokenizers: tuple[Any, ...]
    text_encoders: tuple[torch.nn.Module, ...]
    vae: torch.nn.Module | None
    cloud: torch.nn.Module | None
    device: torch.nn.Module | None
    schedulers: Mapping[str, Any]
    guidance: Mapping[str, float]
    T: int = 25
    cloud_T: int | None = None
    empty_is_zero: bool = False
    file: Path | None = None
    scorer: Path | None = None
    prompts: Path | None = None

    def __post_init__(self) -> None:
        if self.cloud is None and self.device is None:
            raise WorldError(f"world {self.name} has no U-Net: give it a cloud, a device or both")
        if self.cloud is not None and self.device is not None:
            ours, theirs = _latent(self.cloud), _latent(self.device)
            if ours != theirs:
                raise WorldError(f"world {self.name}: the cloud's latents are {ours}, the device's {theirs}; "
                                 "a hybrid run needs two U-Nets of one latent space")
        for side in SIDES:
            if not self.guidance[side] >= 1:
                raise WorldError(f"world {self.name}: the {side}'s guidance scale is {self.guidance[side]}, "
                                 "expected a number from 1 (no guidance) up")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        return _latent(self.cloud if self.cloud is not None else self.device)

    @property
    def dtype(self) -> torch.dtype:
        return (self.cloud if self.cloud is not None else self.device).dtype

    @property
    def torch_device(self) -> torch.device:
        return (self.cloud if self.cloud is not None else self.device).device

    def unet(self, side: str) -> torch.nn.Module:
        """The U-Net of ``side``; a half that lacks it says so (WorldError)."""
        unet = getattr(self, side)
        if unet is None:
            raise WorldError(f"this half of world {self.name} has no {side} model: load the world with side={side!r}")
        return unet

    def half(self, side: str) -> World:
        """What ``side`` holds: its own U-Net and the shared text encoders; the VAE stays on the device."""
        other = SIDES[1 - SIDES.index(side)]
        return replace(self, **{other: None}, **({"vae": None} if side == "cloud" else {}))


def names() -> tuple[str, ...]:
    """The worlds declared in data/worlds, in alphabetical order."""
    return tuple(sorted(path.stem for path in (DATA / "worlds").glob("*.toml")))


def load(
    name: str | Path,
    *,
    torch_device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    cloud: str = "cloud",
    side: str | None = None,
) -> World:
    """Load the world called ``name`` (data/worlds/<name>.toml), or a .toml file, or a folder that holds a world.toml.

    ``cloud`` names the table of the cloud model (``cloud_lcm`` is the step-distilled one of portraits), ``side`` loads
    one half only. WorldError where a part is missing, unreachable or does not fit.
    """
    file = _toml(name)
    try:
        spec = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as why:
        raise WorldError(f"cannot read the world {file}: {why}") from why
    if side not in (None, *SIDES):
        raise WorldError(f"side is {side!r}, expected 'cloud', 'device' or None for both")
    for table in (cloud, "device", "scheduler", "text", "vae"):
        if table not in spec:
            having = ", ".join(key for key in spec if key.startswith("cloud"))
            raise WorldError(f"world {file.stem} has no table [{table}] in {file}" +
                             (f"; its clouds are {having}" if table == cloud else ""))
    text, tables = spec["text"], {"cloud": spec[cloud], "device": spec["device"]}
    # without the package accelerate diffusers cannot load any other way, and says so at every part
    into = {"torch_dtype": dtype, "low_cpu_mem_usage": diffusers.utils.is_accelerate_available(),
            "output_loading_info": True}

    def part(what: str, cls: Any, where: Any, **options: Any) -> Any:
        found = _from_pretrained(f"the {what} of world {file.stem}", cls, where, file, options)
        return found.eval().requires_grad_(False).to(torch_device) if isinstance(found, torch.nn.Module) else found

    def unet(key: str) -> torch.nn.Module | None:
        if side not in (None, key):
            return None
        return part(f"{key} U-Net", diffusers.UNet2DConditionModel, tables[key].get("unet"), **into)

    def scheduler(key: str) -> Any:
        table = dict(tables[key].get("scheduler", spec["scheduler"]))
        cls, where = table.pop("class", "DPMSolverMultistepScheduler"), table.pop("source", None)
        if not hasattr(diffusers, cls):
            raise WorldError(f"world {file.stem}: scheduler class {cls!r} is not one of diffusers'")
        return part(f"{key} scheduler", _Scheduler(getattr(diffusers, cls)), where, **table)

    encoders = [transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection]
    return World(
        name=spec.get("name", file.stem),
        tokenizers=tuple(part("tokenizer", transformers.AutoTokenizer, where) for where in text["tokenizers"]),
        text_encoders=tuple(part("text encoder", cls, where, dtype=dtype, output_loading_info=True)
                            for cls, where in zip(encoders, text["encoders"], strict=False)),
        vae=None if side == "cloud" else part("VAE", diffusers.AutoModel, spec["vae"].get("source"),
                                              **{**into, "output_loading_info": False}),
        cloud=unet("cloud"),
        device=unet("device"),
        schedulers={key: scheduler(key) for key in SIDES},
        guidance={key: float(tables[key].get("guidance", spec.get("guidance", 7.5))) for key in SIDES},
        T=spec.get("T", 25),
        cloud_T=tables["cloud"].get("T"),
        empty_is_zero=text.get("empty_is_zero", False),
        file=file,
        scorer=_beside(file, spec.get("scorer")),
        prompts=_beside(file, spec.get("prompts")),
    )


def untrained(unet: str | Mapping[str, Any], torch_device: str | torch.device = "cpu") -> World:
    """A cloud with random weights: it costs what the real one costs, and draws nothing.

    ``unet`` is a name of data/paper/unets or a diffusers configuration. The text encoders are shallow and random as
    well; there is no device and no VAE. float16 on a GPU, float32 elsewhere. ValueError for a name that is not there.
    """
    name, config = (unet, unet_config(unet)) if isinstance(unet, str) else ("unet", dict(unet))
    with torch.device(torch_device):
        cloud = diffusers.UNet2DConditionModel.from_config(config)
        config, sizes = cloud.config, (cloud.config.cross_attention_dim,)
        if config.addition_embed_type == "text_time":  # SDXL: the states of two encoders, and the pooled one's beside
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            sizes = sizes[0] - pooled, pooled
        models = zip((transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection), sizes, strict=False)
        encoders = [model(transformers.CLIPTextConfig(hidden_size=size, intermediate_size=size, num_hidden_layers=2,
                                                      num_attention_heads=1, projection_dim=size))
                    for model, size in models]
    words = transformers.AutoTokenizer.from_pretrained(DATA / "portraits" / "weights" / "tokenizer")
    words.model_max_length = encoders[0].config.max_position_embeddings
    scheduler = diffusers.DPMSolverMultistepScheduler()
    ready = [(part.half() if cloud.device.type == "cuda" else part).eval().requires_grad_(False)
             for part in (cloud, *encoders)]
    return World(f"{name} with random weights", (words,) * len(encoders), tuple(ready[1:]), None, ready[0], None,
                 {side: scheduler for side in SIDES}, dict.fromkeys(SIDES, 7.5))


@torch.no_grad()
def encode(world: World, prompts: Sequence[str], empty: bool = False, side: str | None = None) -> dict[str, Any]:
    """The U-Net's keyword arguments for ``prompts``: encoder_hidden_states (N, L, D), and for SDXL added_cond_kwargs.

    One text encoder gives its last hidden state (SD); two give their last but one, side by side, with the second's
    pooled projection and the six picture-size numbers (SDXL). ``empty`` asks for guidance's other half: the embedding
    of no prompt. A prompt longer than the text model reads is cut, with a warning.
    """
    texts = [""] * len(prompts) if empty else list(prompts)
    hidden, pooled = [], None
    for tokenizer, encoder in zip(world.tokenizers, world.text_encoders, strict=True):
        length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        long = [text for text in texts if len(tokenizer(text).input_ids) > length]
        if long:
            warnings.warn(f"{len(long)} prompts are longer than the {length} tokens that the text model of "
                          f"{world.name} reads and are cut there, first: {long[0]!r}", stacklevel=2)
        ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        out = encoder(ids.to(encoder.device), output_hidden_states=True)
        pooled = out[0] if out[0].ndim == 2 else pooled
        hidden.append(out.last_hidden_state if len(world.text_encoders) == 1 else out.hidden_states[-2])
    kwargs: dict[str, Any] = {"encoder_hidden_states": torch.cat(hidden, dim=-1).to(world.dtype)}
    unet = world.unet(side) if side else (world.cloud if world.cloud is not None else world.device)
    if unet.config.addition_embed_type == "text_time":
        size = world.shape[1] * _pixels(world), world.shape[2] * _pixels(world)
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=world.dtype, device=world.torch_device)
        kwargs["added_cond_kwargs"] = {"text_embeds": pooled.to(world.dtype), "time_ids": ids.repeat(len(texts), 1)}
        if empty and world.empty_is_zero:
            kwargs["added_cond_kwargs"]["text_embeds"] = torch.zeros_like(pooled).to(world.dtype)
    if empty and world.empty_is_zero:
        kwargs["encoder_hidden_states"] = torch.zeros_like(kwargs["encoder_hidden_states"])
    return kwargs


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What one U-Net is told about N prompts, and its guidance scale w.

    ``conditioning[rows]`` are the keyword arguments of one call for these candidates.
    """

    prompt: Mapping[str, Any]
    empty: Mapping[str, Any] | None
    w: float

    @property
    def guided(self) -> bool:
        """Whether a call takes every latent twice: without and with the prompt, in this order."""
        return self.empty is not None

    def __getitem__(self, rows: slice) -> dict[str, Any]:
        return _join([half for half in (self.empty, self.prompt) if half is not None], rows)


def tokens(world: World) -> int:
    """Number of tokens that a prompt is padded or cut to."""
    return min(world.tokenizers[0].model_max_length, world.text_encoders[0].config.max_position_embeddings)


def guided(world: World, side: str) -> bool:
    """Whether a call of this side's U-Net takes every latent twice, for classifier-free guidance."""
    return world.guidance[side] > 1 and world.unet(side).config.time_cond_proj_dim is None


def condition(world: World, side: str, prompts: Sequence[str]) -> Conditioning:
    """Encode ``prompts`` for the U-Net of ``side``, with classifier-free guidance where its guidance scale is above 1.

    A U-Net with ``time_cond_proj_dim`` (LCM distilled over guidance scales) takes the scale as an embedding instead.
    """
    unet, w = world.unet(side), world.guidance[side]
    prompt = encode(world, prompts, side=side)
    if unet.config.time_cond_proj_dim is not None:
        scale = _scale_embedding(w - 1, unet.config.time_cond_proj_dim).to(world.torch_device, world.dtype)
        return Conditioning({**prompt, "timestep_cond": scale.repeat(len(prompts), 1)}, None, w)
    return Conditioning(prompt, encode(world, prompts, empty=True, side=side) if guided(world, side) else None, w)


def fingerprint(world: World) -> str:
    """A SHA-256 over all weights and configurations of the world: what a stored result depends on."""
    settings = (world.T, world.cloud_T, world.empty_is_zero, sorted(world.guidance.items()))
    digest = hashlib.sha256(repr(settings).encode())
    for scheduler in world.schedulers.values():
        digest.update(scheduler.to_json_string().encode())
    for module in (*world.text_encoders, world.vae, world.cloud, world.device):
        if module is None:
            digest.update(b"none")
            continue
        for key, tensor in sorted(module.state_dict().items()):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _latent(unet: torch.nn.Module) -> tuple[int, int, int]:
    size = unet.config.sample_size
    h, w = (size, size) if isinstance(size, int) else size
    return unet.config.in_channels, h, w


def _pixels(world: World) -> int:
    # SD's and SDXL's VAE both halve the side three times; a cloud half has no VAE to ask
    return 8 if world.vae is None else 2 ** (len(world.vae.config.block_out_channels) - 1)


def _join(halves: list[Mapping[str, Any]], rows: slice) -> dict[str, Any]:
    return {key: _join([half[key] for half in halves], rows) if isinstance(value, Mapping)
            else torch.cat([half[key][rows] for half in halves]) for key, value in halves[0].items()}


def _scale_embedding(w: float, dim: int) -> torch.Tensor:
    """Sinusoidal embedding (1, dim) of a guidance scale: the timestep embedding's frequencies, of 1000 w."""
    half = dim // 2
    angle = 1000.0 * w * torch.exp(torch.arange(half) * -(math.log(10000.0) / (half - 1)))
    return torch.nn.functional.pad(torch.cat([angle.sin(), angle.cos()]), (0, dim % 2))[None]


def _toml(name: str | Path) -> Path:
    path = Path(name).expanduser()
    if path.is_dir() and (path / "world.toml").is_file():
        return path / "world.toml"
    if path.suffix == ".toml" or len(path.parts) > 1:
        file = path
    else:
        file = DATA / "worlds" / f"{name}.toml"
    if not file.is_file():
        raise WorldError(f"there is no world {str(name)!r} ({file} does not exist): use one of {', '.join(names())}, "
                         "or give the path of a world's .toml file")
    return file


def _beside(file: Path, where: str | None) -> Path | None:
    return None if where is None else (file.parent / Path(where).expanduser()).resolve()


def _from_pretrained(what: str, cls: Any, where: Any, file: Path, options: Mapping[str, Any]) -> Any:
    """One part from its folder, the local cache or the hub, in this order; WorldError in one sentence otherwise."""
    if not isinstance(where, str) or not where:
        raise WorldError(f"{what} has no source in {file}: give a folder ('./…', '../…', '/…') or a hub id")
    if where[0] in "./~":
        folder = _beside(file, where)
        if not (folder.is_dir() and any(folder.iterdir())):
            raise WorldError(f"{what} is not at {folder}: fetch or train the world's weights, or name another place "
                             f"in {file}")
        tries, do = [(str(folder), {"local_files_only": True})], "it may be damaged: fetch or make it again"
    else:
        owner, repo, *sub = where.split("/", 2)
        inside = {"subfolder": sub[0]} if sub else {}
        tries = [(f"{owner}/{repo}", {**inside, "local_files_only": True})]
        if _reachable(huggingface_hub.constants.ENDPOINT):
            tries.append((f"{owner}/{repo}", inside))
        do = ("it is not in the Hugging Face cache, and the hub does not give it: download it once where there is a "
              f"network, or put a local folder in {file}")
    for source, how in tries:
        try:
            with _quiet():
                found = cls.from_pretrained(source, **options, **how)
            if isinstance(found, tuple):
                found, told = found
                if lacking := sorted(told["missing_keys"]):  # they would be drawn at random, and nobody would know
                    raise ValueError(f"there are no weights for {lacking[0]}")
            return found
        except Exception as error:  # hub, file system, parser: each library raises its own; the user needs a sentence
            why = error
    reason = re.sub(r"\s+", " ", str(why)).strip()[:160]
    raise WorldError(f"cannot load {what} from {where}: {do} ({type(why).__name__}: {reason})") from why


def _reachable(address: str) -> bool:
    """Whether the hub answers at all; asked first, since its client tries again for most of a minute."""
    if urllib.request.getproxies():
        return True
    try:
        socket.create_connection((urllib.parse.urlsplit(address).hostname, 443), timeout=5).close()
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class _Scheduler:
    """Loads a scheduler of one class from the configuration of another, and passes over what it does not know."""

    cls: Any

    def from_pretrained(self, source: str, subfolder: str | None = None, local_files_only: bool = False, **own: Any):
        found = self.cls.load_config(source, subfolder=subfolder, local_files_only=local_files_only)
        known = inspect.signature(self.cls.__init__).parameters
        unknown = [key for key in own if key not in known]
        if unknown:
            raise ValueError(f"{self.cls.__name__} has no setting {unknown[0]!r}")
        return self.cls.from_config({key: value for key, value in found.items() if key in known} | own)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of a library over the one picture that was asked for."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
