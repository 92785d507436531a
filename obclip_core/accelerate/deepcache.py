"""DeepCache (Ma et al. 2023): high-level features change slowly, so most steps run the outermost layers only.

At a step that is on, the first ``branch`` layers of the first down block and the last ``branch + 1`` of the last up
block run; the hidden state that enters the latter is the one of the last full step. ``branch`` 0 is the shallowest:
only the layer that consumes the first convolution. Nothing is shared between candidates or branches of guidance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from obclip_core.accelerate.request import Call, Forward
from obclip_core.accelerate.skip import lower

NAME = "deepcache"
TRANSFORMER = ("encoder_hidden_states", "attention_mask", "encoder_attention_mask", "cross_attention_kwargs")


def modules(unet: torch.nn.Module, schedule: Any) -> Iterable[str]:
    last = len(unet.up_blocks) - 1
    if schedule.branch > len(unet.down_blocks[0].resnets):
        raise ValueError(f"branch is {schedule.branch}, expected 0..{len(unet.down_blocks[0].resnets)}: the first down "
                         "block of this U-Net has no more layers")
    return [*lower(unet), *(f"up_blocks.{i}" for i in range(last + 1))]


def layers(block: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, torch.nn.Module | None]]:
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return zip(block.resnets, attentions, strict=True)


def layer(resnet: torch.nn.Module, attention: torch.nn.Module | None, hidden: torch.Tensor, temb: torch.Tensor,
          kwargs: dict[str, Any]) -> torch.Tensor:
    hidden = resnet(hidden, temb)
    if attention is None:
        return hidden
    return attention(hidden, return_dict=False, **{key: kwargs.get(key) for key in TRANSFORMER})[0]


def forward(call: Call, name: str, module: torch.nn.Module, inner: Forward, *args: Any, **kwargs: Any) -> Any:
    on, branch = call.on(NAME), call.request.schedule.branch
    if name == f"up_blocks.{len(call.request.unet.up_blocks) - 1}":
        return _last_up(call, name, module, **kwargs) if on or call.later(NAME) else inner(*args, **kwargs)
    if not on:
        return inner(*args, **kwargs)
    if name.startswith("down_blocks"):
        hidden = kwargs["hidden_states"]
        skips = []
        for resnet, attention in list(layers(module))[: branch if name == "down_blocks.0" else 0]:
            hidden = layer(resnet, attention, hidden, kwargs["temb"], kwargs)
            skips.append(hidden)
        count = len(module.resnets) + len(module.downsamplers or ())
        return hidden, (*skips, *[hidden] * (count - len(skips)))  # fillers: nothing reads them
    return args[0] if args else kwargs["hidden_states"]


def _last_up(call: Call, name: str, block: torch.nn.Module, *, hidden_states: torch.Tensor, temb: torch.Tensor,
             res_hidden_states_tuple: tuple[torch.Tensor, ...], **kwargs: Any) -> torch.Tensor:
    first = len(block.resnets) - 1 - call.request.schedule.branch
    hidden = call.kept(NAME, name) if call.on(NAME) else hidden_states
    for i, ((resnet, attention), skip) in enumerate(zip(layers(block), reversed(res_hidden_states_tuple), strict=True)):
        if i < first and call.on(NAME):
            continue
        if i == first and not call.on(NAME):
            call.keep(NAME, name, hidden)
        hidden = layer(resnet, attention, torch.cat([hidden, skip], dim=1), temb, kwargs)
    return hidden
