"""Encoder propagation (Faster Diffusion, Li et al. 2023): the whole encoder runs at key steps only.

At the steps between, which are on, the skip connections and the mid block's output of the last key step feed the up
blocks: the first convolution is kept too, so such a step depends on the latent through the scheduler alone. It is block
skip with key steps that come back (early steps change fast, so they are all key steps), instead of one point s.
The original also decodes the steps between in parallel; here they run one after another, at the same work.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from obclip_core.accelerate.request import Call, Forward
from obclip_core.accelerate.skip import kept_or_run, lower

NAME = "encoder"


def modules(unet: torch.nn.Module, schedule: Any) -> Iterable[str]:
    return ["conv_in", *lower(unet)]


def forward(call: Call, name: str, module: torch.nn.Module, inner: Forward, *args: Any, **kwargs: Any) -> Any:
    return kept_or_run(NAME, call, name, inner, *args, **kwargs)
