"""One unconditional branch for all candidates: N + 1 rows a step instead of 2 N under classifier-free guidance.

The unconditional prediction depends on a candidate only through its latent, and candidates' latents are still near each
other in the first steps. So it is computed once, at their mean, and corrected to first order:

    e(z_p, nothing) ~ e(z_m, nothing) + g (z_p - z_m),          z_m = mean of all candidates' latents

g is a public number a step (``share_gain``). Were the data Gaussian with variance s^2 in the directions in which
candidates differ, it would be exactly ``gain``: sigma (for s = 1) where noise is predicted, and nothing where v is.
Shared between candidates: this prediction, nothing else. The mean is one of the candidate set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from obclip_core.accelerate.request import Call, Forward, entered

NAME = "share"


def modules(unet: torch.nn.Module, schedule: Any) -> Iterable[str]:
    return [""]


def forward(call: Call, name: str, module: torch.nn.Module, inner: Forward, sample: torch.Tensor, *args: Any,
            **kwargs: Any) -> Any:
    if not call.on(NAME) or call.branches == 1:
        return inner(sample, *args, **kwargs)
    n, request, size = call.rows, call.request, call.branches * call.rows

    def part(value: Any, rows: slice) -> Any:
        if isinstance(value, dict):
            return {key: part(item, rows) for key, item in value.items()}
        return value[rows] if isinstance(value, torch.Tensor) and value.ndim and len(value) == size else value

    def ask(own: Call, z: torch.Tensor, rows: slice) -> torch.Tensor:
        with entered(own):
            output = inner(z, *(part(value, rows) for value in args), **part(kwargs, rows))
        return output[0] if isinstance(output, tuple) else output.sample

    z = sample[-n:]
    if NAME not in request.within:
        batch = request.batch if request.batch is not None else z
        if len(batch) != request.candidates:
            raise ValueError("share needs the latents of all candidates, not of a chunk: tell the request with see(z)")
        mean = batch.mean(0, keepdim=True)
        request.within[NAME] = (ask(Call(request.alone(), call.step, 0, 1, 1), mean, slice(0, 1)), mean)
    nothing, mean = request.within[NAME]
    prompt = ask(replace(call, branches=1), z, slice(-n, None))
    steps, gains = request.schedule.share, request.schedule.share_gain
    g = gains[steps.index(call.step)] if gains else 0.0
    both = torch.cat([nothing + g * (z - mean), prompt])
    if kwargs.get("return_dict") is False:
        return (both,)
    return UNet2DConditionOutput(sample=both)


def gain(scheduler: Any, timestep: Any, spread: float = 1.0) -> float:
    """g at a timestep for Gaussian data of standard deviation ``spread``; which it is depends on what is predicted.

    With alpha^2 + sigma^2 = 1 and s = spread: x_0 alpha s^2 / d, noise sigma / d, v alpha sigma (1 - s^2) / d, where
    d = alpha^2 s^2 + sigma^2.
    """
    a2 = float(scheduler.alphas_cumprod[int(timestep)])
    alpha, sigma, s2 = a2**0.5, (1 - a2) ** 0.5, spread**2
    d = a2 * s2 + sigma**2
    gains = {"sample": alpha * s2 / d, "epsilon": sigma / d, "v_prediction": alpha * sigma * (1 - s2) / d}
    if scheduler.config.prediction_type not in gains:
        raise ValueError(f"the scheduler predicts {scheduler.config.prediction_type!r}, expected one of "
                         f"{', '.join(gains)}")
    return gains[scheduler.config.prediction_type]


def gains(scheduler: Any, T: int, steps: Sequence[int], spread: float = 1.0) -> tuple[float, ...]:
    """``gain`` at these of T steps, for ``Schedule(share=steps, share_gain=...)``."""
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(T)
    return tuple(gain(scheduler, scheduler.timesteps[step], spread) for step in steps)
