"""What a split asks of a scheduler: start anywhere, give its memory away, take another's, compare noise levels.

A multistep scheduler remembers earlier predictions. They are found by asking the scheduler itself, not by knowing it:
its state is whatever differs from a fresh copy of it, less what no later step reads.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch


def config(scheduler: Any) -> dict[str, Any]:
    """A scheduler's class and settings as plain data: two schedulers with equal configurations walk equal steps."""
    values = json.loads(scheduler.to_json_string())
    return {key: values[key] for key in sorted(values) if key == "_class_name" or not key.startswith("_")}


def fresh(scheduler: Any, T: int, step: int = 0, torch_device: Any = None) -> Any:
    """A copy of ``scheduler``, set to T steps and about to take step ``step`` with no memory of earlier ones."""
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(T, device=torch_device)
    if len(scheduler.timesteps) != T:
        raise ValueError(f"{type(scheduler).__name__} makes {len(scheduler.timesteps)} model calls in {T} steps; "
                         "a split needs one call a step: use DPM-Solver++, DDIM or Euler")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(step)
    return scheduler


def state_of(scheduler: Any, T: int, step: int, latents: torch.Tensor) -> dict[str, Any]:
    """What ``scheduler`` remembers after ``step`` of T steps over ``latents``, as far as the steps left read it."""
    new = fresh(scheduler, T, 0, latents.device)
    state = {key: value for key, value in vars(scheduler).items() if not _same(value, vars(new).get(key))}
    corner = latents[:1, :, :1, :1]
    small = each(state, latents.shape, lambda tensor: tensor[:1, :, :1, :1])
    whole = _rest(new, small, step, corner)
    for name in tensors_of(state, latents.shape):
        less = put(small, name, None)
        if _same(_rest(new, less, step, corner), whole):
            small, state = less, put(state, name, None)
    return state


def resume(scheduler: Any, state: Mapping[str, Any]) -> Any:
    """Give ``scheduler``, fresh from the same configuration, the memory of the one that ``state`` was taken from."""
    if over := sorted(key for key in state if hasattr(type(scheduler), key)):
        raise ValueError(f"the hand-over would replace {over[0]!r} of the {type(scheduler).__name__}: refused")
    vars(scheduler).update(copy.deepcopy(dict(state)))
    return scheduler


def each(state: Any, shape: torch.Size, do: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``state`` with ``do`` done to every tensor of the latents' shape: all else belongs to all candidates alike."""
    if isinstance(state, Mapping):
        return {key: each(value, shape, do) for key, value in state.items()}
    if isinstance(state, list):
        return [each(value, shape, do) for value in state]
    return do(state) if isinstance(state, torch.Tensor) and state.shape == shape else state


def influence(scheduler: Any, T: int, step: int, state: Mapping[str, Any], latents: torch.Tensor) -> dict[str, float]:
    """How much an error in each remembered tensor weighs beside one of the same size in the latents.

    The steps left are walked twice more for each, with the tensor and with the latents shifted by one; keys are
    "name" or "name.index".
    """
    corner, weights = latents[:1, :, :1, :1].double(), {}
    small = each(state, latents.shape, lambda tensor: tensor[:1, :, :1, :1].double())
    new = fresh(scheduler, T)
    as_is, moved = _rest(new, small, step, corner) or [], _rest(new, small, step, corner + 1) or []
    for name, tensor in tensors_of(small, corner.shape).items():
        shifted = _rest(new, put(small, name, tensor + 1), step, corner) or []
        weights[name] = max((float((a - b).abs().max() / (c - b).abs().max())
                             for a, b, c in zip(shifted, as_is, moved, strict=True) if (c - b).abs().max() > 1e-9),
                            default=1.0)
    return weights


def tensors_of(state: Mapping[str, Any], shape: torch.Size) -> dict[str, torch.Tensor]:
    """The tensors of the latents' ``shape`` in a state, by "name" or "name.index"."""
    listed = {f"{key}.{i}": item for key, value in state.items() if isinstance(value, list)
              for i, item in enumerate(value)}
    return {name: value for name, value in {**state, **listed}.items()
            if isinstance(value, torch.Tensor) and value.shape == shape}


def put(state: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """``state`` with the tensor called ``name`` replaced."""
    key, _, at = name.partition(".")
    return {**state, key: [value if str(i) == at else item for i, item in enumerate(state[key])] if at else value}


def log_snr(scheduler: Any, timestep: Any) -> float:
    """Log signal-to-noise ratio of a latent about to take ``timestep``, which may lie between two trained ones."""
    a = scheduler.alphas_cumprod.double()
    t = float(timestep)
    low, high = int(t), min(int(t) + 1, len(a) - 1)
    snr = torch.log(a) - torch.log1p(-a)
    return float(snr[low] + (t - low) * (snr[high] - snr[low]))


def matching_shift(cloud_scheduler: Any, device_scheduler: Any, split: Any) -> int:
    """The shift that joins the device's schedule where its noise level is nearest to the cloud's after k steps.

    Nearest in log SNR: argmin_j |log SNR_device(t_j) - log SNR_cloud(t_k)| - k. ValueError for k = cloud_T, where no
    noise is left to match.
    """
    steps = split.cloud_T or split.T
    if not split.k < steps:
        raise ValueError(f"k is {split.k}, expected less than the cloud's {steps} steps: after the last there is "
                         "no noise to match")
    cloud, device = fresh(cloud_scheduler, steps), fresh(device_scheduler, split.T)
    level = log_snr(cloud, cloud.timesteps[split.k])
    gaps = [abs(log_snr(device, t) - level) for t in device.timesteps]
    return gaps.index(min(gaps)) - split.k


def _rest(scheduler: Any, state: Mapping[str, Any], step: int, x: torch.Tensor) -> list[torch.Tensor] | None:
    """The steps that are left, on a corner of the latents and with made-up predictions; None where they fail."""
    scheduler, walked = resume(copy.deepcopy(scheduler), state), []
    try:
        for i, t in enumerate(scheduler.timesteps[step:]):
            scheduler.scale_model_input(x, t)
            x = scheduler.step(torch.full_like(x, i % 7 - 3), t, x, **draws(scheduler, 0), return_dict=False)[0]
            walked.append(x)
    except (TypeError, AttributeError, ValueError, RuntimeError, IndexError):
        return None
    return walked


def draws(scheduler: Any, seed: int | list[torch.Generator]) -> dict[str, Any]:
    """The keyword argument with which a stochastic ``scheduler`` takes its noise from ``seed``; none for the others."""
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    return {"generator": torch.Generator("cpu").manual_seed(seed) if isinstance(seed, int) else seed}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and bool(torch.equal(a.cpu(), b.cpu()))
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and bool(a == b)
