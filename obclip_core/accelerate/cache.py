"""Attention cache: attention barely changes after the first steps, so its output is computed now and then and kept.

On a step that is on, self- and cross-attention return what the last step that was off returned, projections included.
The paper keeps the cross-attention *map* and multiplies it with V. V is a projection of the text, which is fixed for a
request, so the kept output is that same product, at no work and at fewer bytes than the map. Nothing is shared between
candidates or between the branches of guidance: each row keeps its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from obclip_core.accelerate.request import Call, Forward, attentions

NAME = "cache"


def modules(unet: torch.nn.Module, schedule: Any) -> Iterable[str]:
    return attentions(unet, "attn1", "attn2")


def forward(call: Call, name: str, module: torch.nn.Module, inner: Forward, *args: Any, **kwargs: Any) -> Any:
    if call.on(NAME):
        return call.kept(NAME, name)
    output = inner(*args, **kwargs)
    if call.later(NAME):
        call.keep(NAME, name, output)
    return output
