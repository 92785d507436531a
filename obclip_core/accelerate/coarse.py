"""Fewer, larger steps on the cloud: the same stretch of noise levels in less work, before the device takes over.

The cloud walks its first k of T steps as k' < k larger ones, on a schedule of T k' / k steps whose noise level after k'
is exactly that of T's after k. The device joins at step k. Their schedules differ, so the hand-over restarts: the
scheduler's memory stays behind. Only the split changes, so every other technique applies to what is left.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any


def coarse(split: Any, steps: int) -> Any:
    """The ``split`` with its first k steps taken in ``steps`` larger ones. ValueError where the levels do not meet."""
    if split.cloud_T is not None or split.first != "cloud" or split.shift:
        raise ValueError("larger steps are for a cloud that goes first on the device's own schedule: start from a "
                         "split without cloud_T and shift")
    if steps not in (fit := fitting(split)):
        raise ValueError(f"{steps} larger steps do not end at the noise level of {split.k} of {split.T}, expected one "
                         f"of {', '.join(map(str, fit)) or 'none'}")
    return replace(split, k=steps, cloud_T=split.T * steps // split.k, shift=split.k - steps)


def fitting(split: Any) -> tuple[int, ...]:
    """The numbers of larger steps that end at the noise level of the split's own k."""
    return tuple(steps for steps in range(1, split.k) if split.T * steps % split.k == 0)
