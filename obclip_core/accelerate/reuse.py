"""Batch reuse (Algorithm 2): one pivot candidate's attention map serves all; only the values are computed for each.

Candidates that differ in one word attend alike. Their values stand side by side behind the pivot's queries and keys,

    [O_1 | ... | O_N] = softmax(Q_p K_p^T / sqrt(d)) [V_1 | ... | V_N],

which is one attention call with a wide value, so a fused kernel that accepts it still applies (``plain`` writes the
map out). Each branch of guidance has a pivot map of its own; nothing else is shared. The pivot is a position in the
canonical order of the candidates, hence a function of the candidate set and never of the secret. Where the candidates
come in several chunks, the pivot's comes first and leaves its queries and keys (not the map: that is L x L) for the
other chunks of the same step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

from obclip_core.accelerate.request import Call, Forward, attentions

NAME = "reuse"


def modules(unet: torch.nn.Module, schedule: Any) -> Iterable[str]:
    return attentions(unet, "attn1", "attn2")


def forward(call: Call, name: str, attn: torch.nn.Module, inner: Forward, hidden: torch.Tensor,
            encoder_hidden_states: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
            **kwargs: Any) -> Any:
    if not call.on(NAME) or call.request.candidates == 1:
        return inner(hidden, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, **kwargs)
    if attention_mask is not None:
        raise ValueError(f"{name} got an attention mask, and reuse shares one map between prompts: leave the mask out")
    text = hidden if encoder_hidden_states is None else encoder_hidden_states
    query, key = _pivot(call, name, attn, hidden, text)
    value = attn.to_v(text)
    value = value.unflatten(0, (call.branches, call.rows)).unflatten(-1, (attn.heads, -1))  # (G, n, M, heads, d)
    wide = value.permute(0, 3, 2, 1, 4).flatten(-2)  # (G, heads, M, n d)
    output = (plain if call.request.schedule.plain else fused)(query, key, wide, attn.scale)
    output = output.unflatten(-1, (call.rows, -1)).permute(0, 3, 2, 1, 4).flatten(-2).flatten(0, 1)
    return attn.to_out[1](attn.to_out[0](output))


def _pivot(call: Call, name: str, attn: torch.nn.Module, hidden: torch.Tensor, text: torch.Tensor) -> Any:
    """Queries and keys (G, heads, L or M, d) of the pivot, from this chunk or from the one before it in this step."""
    pivot = call.request.schedule.pivot
    if not call.start <= pivot < call.stop:
        if name not in call.request.within:
            raise ValueError(f"pivot {pivot} is not among candidates {call.start}..{call.stop - 1} and has not run yet "
                             "in this step: run its chunk first, or raise the memory limit")
        return call.request.within[name]
    row = slice(pivot - call.start, None, call.rows)  # the pivot's row of each branch
    heads = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # noqa: E731
    maps = heads(attn.to_q(hidden[row])), heads(attn.to_k(text[row]))
    if call.rows < call.request.candidates:
        call.request.within[name] = maps
    return maps


def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """One attention call on (G, heads, L, d), (G, heads, M, d), (G, heads, M, n d)."""
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """The same with the map written out: Algorithm 2 to the letter."""
    return torch.softmax(query @ key.transpose(-1, -2) * scale, dim=-1) @ value
