"""Token Merging (Bolya and Hoffman 2023): similar tokens are averaged before self-attention and copied back after it.

The matching is ``tomesd``'s bipartite one, on the tokens that enter the transformer block, at the finest resolution
only (``merge_depth`` 0) and without its random choice, so that a picture depends on its seed alone. ``merge_ratio`` is
the part of tokens removed. Each row merges by its own tokens: nothing is shared between candidates or branches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from obclip_core.accelerate.request import Call, Forward, attentions

NAME = "merge"
STRIDE = 2


def modules(unet: torch.nn.Module, schedule: Any) -> Iterable[str]:
    depth = {f"down_blocks.{i}": i for i in range(len(unet.down_blocks))}
    depth |= {f"up_blocks.{i}": len(unet.up_blocks) - 1 - i for i in range(len(unet.up_blocks))}
    depth["mid_block"] = len(unet.down_blocks) - 1
    fine = [name for name in attentions(unet, "attn1") if depth[name.split(".attentions")[0]] <= schedule.merge_depth]
    return ["", *fine, *(name.removesuffix(".attn1") for name in fine)] if fine else []


def grid(shape: tuple[int, int], tokens: int) -> tuple[int, int]:
    """Height and width of ``tokens`` tokens of a latent of ``shape``, which was halved (rounding up) some times."""
    height, width = shape
    while height * width > tokens:
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width


def merged(height: int, width: int, ratio: float) -> tuple[int, int]:
    """(tokens left, destination tokens) of height x width tokens."""
    targets = (height // STRIDE) * (width // STRIDE)
    return height * width - min(height * width - targets, int(height * width * ratio)), targets


def forward(call: Call, name: str, module: torch.nn.Module, inner: Forward, *args: Any, **kwargs: Any) -> Any:
    if not call.on(NAME):
        return inner(*args, **kwargs)
    if name == "":
        call.request.within["merge shape"] = (args[0] if args else kwargs["sample"]).shape[-2:]
        return inner(*args, **kwargs)
    if not name.endswith(".attn1"):
        call.request.within["merge tokens"] = args[0] if args else kwargs["hidden_states"]
        return inner(*args, **kwargs)
    from tomesd.merge import bipartite_soft_matching_random2d

    tokens = call.request.within.pop("merge tokens")
    height, width = grid(call.request.within["merge shape"], tokens.shape[1])
    left, _ = merged(height, width, call.request.schedule.merge_ratio)
    gone = height * width - left
    merge, unmerge = bipartite_soft_matching_random2d(tokens, width, height, STRIDE, STRIDE, gone, no_rand=True)
    return unmerge(inner(merge(args[0]), **kwargs))
