"""Algorithm 1: k steps on all candidates by the cloud, one pick, the other T - k steps by the device.

Cloud-only is ``k=T`` with one candidate, device-only is ``k=0``, Hybrid SD is one candidate and k between, vanilla OG
is all candidates and ``k=T``: arguments of the same three functions ``run``, ``finish``, ``decode``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from obclip_core.messages import HandOver, Offer, Secret, Split
from obclip_core.schedulers import config, draws, fresh, matching_shift, resume, state_of
from obclip_core.worlds import Conditioning, World, condition

__all__ = ["HandOver", "Offer", "Result", "Secret", "Split", "accelerated", "decode", "draw_noise", "finish",
           "generate", "matching_shift", "noised", "now", "run", "take_steps"]

OnStep = Callable[[int, torch.Tensor], None]


@dataclass(frozen=True, eq=False)
class Result:
    """A picture (3, H, W) in [0, 1], its latent (1, C, h, w), the hand-over, and the seconds that each side took."""

    image: torch.Tensor
    latent: torch.Tensor
    hand_over: HandOver
    seconds: dict[str, float]


@torch.no_grad()
def run(world: World, offer: Offer, *, start: HandOver | None = None, memory_limit: int | None = None,
        on_step: OnStep | None = None) -> HandOver:
    """Lines 3 and 4 of Algorithm 1: repeat one noise z_T for all N candidates and take the first k steps on them.

    ``start`` (see ``noised``) begins from a picture instead of noise. ``memory_limit`` bounds the bytes of one U-Net
    call; ``on_step(step, latents)`` is told every step. The hand-over holds (N, C, h, w).
    """
    split, N, first, plan = offer.split, offer.N, start.step if start else 0, _plan(offer)
    scheduler = fresh(world.schedulers[split.first], split.steps, first, world.torch_device)
    noise = torch.Generator("cpu").manual_seed(offer.seed)
    z_T = scheduler.init_noise_sigma * draw_noise(world, noise)
    if start:
        start.check(world, split, step=first, N=1, mode="restart")

    M = len(plan.runs(split.k)) if plan else N
    x, own = (start.latents if start else z_T).repeat(M, 1, 1, 1), [noise.clone_state() for _ in range(M)]
    if steps := range(first, split.k):
        unet = world.unet(split.first)
        for part in plan.parts(steps) if plan else (_Whole(steps, tuple(range(N))),):
            text = condition(world, split.first, [offer.candidates[i] for i in part.asked])
            chunks = _chunks(unet, x[:len(part.asked)], text, memory_limit)
            with accelerated(offer.acceleration, unet, len(part.asked), text.guided) as at:
                x = take_steps(unet, scheduler, part.steps, x, text, own, chunks, at, on_step, part)

    mode = _mode(world, split)
    state = state_of(scheduler, split.steps, split.k, x) if mode == "exact" else {}
    return HandOver(x, split.k, split.steps, config(scheduler), state, mode)


@torch.no_grad()
def finish(world: World, offer: Offer, hand_over: HandOver, secret: Secret, *,
           on_step: OnStep | None = None) -> torch.Tensor:
    """Lines 5 and 6 of Algorithm 1: pick the real candidate's latent and take the other steps on it alone.

    A hand-over that was already picked is taken as it is. Returns (1, C, h, w); ValueError for a hand-over that was
    made under another configuration, shape, step or precision, naming the difference.
    """
    split = offer.split
    secret.check(offer.N)
    recipe = plan.recipe(split.k) if (plan := _plan(offer)) else None
    M = offer.N if recipe is None else recipe.shape[1]
    hand_over.check(world, split, step=split.k, N=M, mode=_mode(world, split))
    picked = (hand_over if hand_over.N == 1 else hand_over.pick(secret, recipe)).to(world.torch_device)
    scheduler = resume(fresh(world.schedulers[split.second], split.T, split.join, world.torch_device), picked.state)
    noise = torch.Generator("cpu").manual_seed(offer.seed)
    for _ in range(1 + split.k):  # pass over the first side's draws: z_T, and at most one a step
        draw_noise(world, noise)

    x = picked.latents
    if steps := range(split.join, split.T):
        unet, text = world.unet(split.second), condition(world, split.second, [offer.candidates[secret.index]])
        x = take_steps(unet, scheduler, steps, x, text, [noise], on_step=on_step)
    return x


@torch.no_grad()
def decode(world: World, latents: torch.Tensor, chunk: int = 8) -> torch.Tensor:
    """Line 7 of Algorithm 1: latents (N, C, h, w) to pictures (N, 3, H, W) in [0, 1], ``chunk`` at a time."""
    vae = world.vae
    if vae is None:
        raise ValueError(f"this half of world {world.name} has no VAE: pictures are decoded on the device")
    x = latents.to(world.torch_device, vae.dtype) / getattr(vae.config, "scaling_factor", 1.0)
    x = x + (getattr(vae.config, "shift_factor", None) or 0.0)
    return torch.cat([(vae.decode(few).sample / 2 + 0.5).clamp(0, 1).float() for few in x.split(chunk)])


def generate(world: World, offer: Offer, secret: Secret, *, memory_limit: int | None = None) -> Result:
    """Algorithm 1 as a whole, in one process: run, finish, decode, with the seconds that the cloud and device took.

    A cloud that takes no step is never asked: all seconds are then the device's.
    """
    clock = [now(world)]
    hand_over = run(world, offer, memory_limit=memory_limit)
    clock.append(now(world))
    latent = finish(world, offer, hand_over, secret)
    clock.append(now(world))
    image = decode(world, latent)[0]
    clock.append(now(world))
    split, seconds = offer.split, {"cloud": 0.0, "device": 0.0}
    for side, begin, end in zip((split.first, split.second, "device"), clock, clock[1:], strict=False):
        seconds[side if split.cloud_steps else "device"] += end - begin
    return Result(image, latent, hand_over, seconds)


@torch.no_grad()
def noised(world: World, picture: torch.Tensor, split: Split, step: int, seed: int | None = None) -> HandOver:
    """Image-to-image: a picture (1, 3, H, W) in [0, 1] as a start for ``run`` at ``step``, encoded and noised here.

    The noise is the device's own: with the offer's public seed the cloud could subtract it. Fewer than all its steps
    of noise leave something of the picture readable, the more the later ``step`` is.
    """
    scheduler = fresh(world.schedulers[split.first], split.steps, step, world.torch_device)
    vae, own = world.vae, torch.Generator("cpu")
    own.seed() if seed is None else own.manual_seed(seed)
    x = vae.encode(picture.to(world.torch_device, vae.dtype) * 2 - 1).latent_dist.mean
    x = (x - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor
    x = scheduler.add_noise(x.to(world.dtype), draw_noise(world, own), scheduler.timesteps[step:step + 1])
    return HandOver(x, step, split.steps, config(scheduler), mode="restart")


def take_steps(unet: Any, scheduler: Any, steps: range, x: torch.Tensor, text: Conditioning,
               noise: list[torch.Generator], chunks: tuple[slice, ...] = (slice(None),),
               at: Any = lambda i, rows: nullcontext(), on_step: OnStep | None = None,
               part: Any = None) -> torch.Tensor:
    """The loop of Algorithm 1: the U-Net sees the latents a chunk at a time, the scheduler steps all at once.

    Takes ``steps`` of the scheduler, which it changes, from latents x (N, C, h, w) to latents of the same shape, each
    under its row of ``text``; a scheduler that draws does so from ``noise``, one generator a latent. ``at`` comes from
    ``accelerated``, ``on_step`` is as in ``run``. A plan's ``part`` asks the U-Net about some of the rows only and
    composes the predictions of all from theirs.
    """
    spread = getattr(part, "spread", None)
    see = getattr(at, "see", lambda z: None)
    for i in steps:
        t = scheduler.timesteps[i]
        z = scheduler.scale_model_input(x, t)
        z = z if spread is None else z[list(part.rows)]
        see(z)
        predictions = []
        for rows in chunks:
            with at(i, rows):
                predictions.append(_predict(unet, z[rows], t, text, rows))
        e = torch.cat(predictions)
        e = e if spread is None else torch.einsum("mn,nchw->mchw", torch.as_tensor(spread).to(e), e)
        x = scheduler.step(e, t, x, return_dict=False, **draws(scheduler, noise))[0]
        if on_step is not None:
            on_step(i, x)
    return x


def _predict(unet: Any, z: torch.Tensor, t: torch.Tensor, text: Conditioning, rows: slice) -> torch.Tensor:
    """Classifier-free guidance: e = e(z, nothing) + w (e(z, prompt) - e(z, nothing)), both from one call."""
    if not text.guided:
        return unet(z, t, **text[rows]).sample
    nothing, prompt = unet(torch.cat([z, z]), t, **text[rows]).sample.chunk(2)
    return nothing + text.w * (prompt - nothing)


@dataclass(frozen=True)
class _Whole:
    """All steps, all candidates: what is run where no plan says otherwise."""

    steps: range
    asked: tuple[int, ...]


def _plan(offer: Offer) -> Any:
    """The offer's plan of which candidates are run, checked against their number; None where all are."""
    plan = getattr(offer.acceleration, "plan", None)
    if plan is not None:
        plan.check(offer.N)
    return plan


def draw_noise(world: World, noise: torch.Generator) -> torch.Tensor:
    """Gaussian noise (1, C, h, w) of the world's latents, drawn on the CPU: the same on every device."""
    return torch.randn(1, *world.shape, generator=noise, dtype=world.dtype).to(world.torch_device)


def _mode(world: World, split: Split) -> str:
    """A scheduler's state can only travel between two walks over one schedule; any other pair restarts."""
    one = split.steps == split.T and not split.shift and config(world.schedulers["cloud"]) == config(
        world.schedulers["device"])
    return split.hand_over if one else "restart"


@contextmanager
def accelerated(schedule: Any, unet: Any, N: int, guided: bool) -> Iterator[Any]:
    """The U-Net under a schedule (or None) for N candidates: a bracket around each of its calls, for ``take_steps``."""
    if schedule is None:
        yield lambda step, rows: nullcontext()
    else:
        with schedule.applied(unet, candidates=N, guided=guided) as at:
            yield at


def _chunks(unet: Any, x: torch.Tensor, text: Conditioning, memory_limit: int | None) -> tuple[slice, ...]:
    """Slices of candidates whose U-Net call stays within ``memory_limit`` bytes of activations; one at least."""
    N = len(x)
    most = N if memory_limit is None else max(1, int(memory_limit // call_bytes(unet, x.shape[1:], text.guided)))
    return tuple(slice(i, min(i + most, N)) for i in range(0, N, most))


def call_bytes(unet: Any, shape: tuple[int, ...], guided: bool = True) -> int:
    """Bytes of activations that one candidate takes in a U-Net call, estimated from shapes (weights not counted).

    The skip connections stay until the way up reads them; beside them the widest layer holds about twelve maps of its
    own size at once (a feed-forward of four times its width, gated, with its input and output).
    """
    sides = [shape[1] * shape[2] / 4**level for level in range(len(unet.config.block_out_channels))]
    maps = [channels * side for channels, side in zip(unet.config.block_out_channels, sides, strict=True)]
    layers = unet.config.layers_per_block
    depth = layers if isinstance(layers, (list, tuple)) else [layers] * len(maps)
    skips = sum((n + 1) * size for n, size in zip(depth, maps, strict=True))
    return int((skips + 12 * max(maps)) * unet.dtype.itemsize * (2 if guided else 1))


def now(world: World) -> float:
    """Seconds on a clock that waits until the world's GPU has done what it was asked."""
    if world.torch_device.type == "cuda":
        torch.cuda.synchronize(world.torch_device)
    return time.perf_counter()
