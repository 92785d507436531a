"""T-GATE (Zhang et al. 2024): after the gate step, cross-attention is a constant and guidance is not run.

The mean of the unconditional and the conditional cross-attention output of the last step before the gate replaces
cross-attention, and only the conditional rows go through the U-Net. Both halves of the answer are then that one
prediction, so any guidance scale returns it unchanged. Without guidance it is the cross-attention cache alone.
Shared between the branches of one candidate: the kept mean. Between candidates: nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from obclip_core.accelerate.request import Call, Forward, attentions

NAME = "tgate"


def modules(unet: torch.nn.Module, schedule: Any) -> Iterable[str]:
    cross = attentions(unet, "attn2")
    return ["", *cross] if cross else []


def forward(call: Call, name: str, module: torch.nn.Module, inner: Forward, *args: Any, **kwargs: Any) -> Any:
    if name == "":
        return _conditional_only(call, inner, *args, **kwargs)
    if call.on(NAME):
        return call.kept(NAME, name)
    output = inner(*args, **kwargs)
    if call.later(NAME):
        call.keep(NAME, name, output.reshape(call.branches, call.rows, *output.shape[1:]).mean(0))
    return output


def _conditional_only(call: Call, inner: Forward, *args: Any, **kwargs: Any) -> Any:
    if not call.on(NAME) or call.branches == 1:
        return inner(*args, **kwargs)
    size, n = call.branches * call.rows, call.rows

    def half(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: half(item) for key, item in value.items()}
        return value[-n:] if isinstance(value, torch.Tensor) and value.ndim and len(value) == size else value

    with call.halved():
        output = inner(*map(half, args), **half(kwargs))
    if isinstance(output, tuple):
        return tuple(torch.cat([part] * call.branches) for part in output)
    return type(output)(sample=torch.cat([output.sample] * call.branches))
