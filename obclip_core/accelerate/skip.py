"""Block skip: from point s on, the down blocks and the mid block are not run; their kept features feed the up blocks.

The first convolution still runs, so the last skip connection sees the current latent; time and text reach the up blocks
as ever. A U-Net without a mid block passes the kept output of its last down block. Nothing is shared between candidates
or branches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from obclip_core.accelerate.request import Call, Forward

NAME = "skip"


def modules(unet: torch.nn.Module, schedule: Any) -> Iterable[str]:
    return lower(unet)


def lower(unet: torch.nn.Module) -> list[str]:
    """Names of the blocks below the up blocks."""
    mid = ["mid_block"] if getattr(unet, "mid_block", None) is not None else []
    return [f"down_blocks.{i}" for i in range(len(getattr(unet, "down_blocks", ())))] + mid


def forward(call: Call, name: str, module: torch.nn.Module, inner: Forward, *args: Any, **kwargs: Any) -> Any:
    return kept_or_run(NAME, call, name, inner, *args, **kwargs)


def kept_or_run(technique: str, call: Call, name: str, inner: Forward, *args: Any, **kwargs: Any) -> Any:
    """The kept output of ``name`` where the technique is on, its own (kept for later) where it is off."""
    if call.on(technique):
        kept = call.kept(technique, name)
        return (kept[-1], kept) if isinstance(kept, tuple) else kept
    output = inner(*args, **kwargs)
    if call.later(technique):  # a down block returns (last, all), and last is among all
        call.keep(technique, name, tuple(output[1]) if isinstance(output, tuple) else output)
    return output
