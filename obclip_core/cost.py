"""The bill: multiply-adds, bytes and parameters of any U-Net under any schedule, from shapes alone, never from a run.

One multiply-add is one multiplication with its addition, in convolutions, linear layers and the two products of
attention (Q K^T and map times V); norms, activations and softmax are left out. ``macs`` is what the code does, guidance
included.

The paper's rule (``paper_flops``) was derived from its printed numbers and reproduces them, see ``flops_table``:
- two operations a multiply-add, one branch (no guidance);
- Q K^T is not counted, in the cloud's U-Net; neither product of attention is, in the device's. A counter that hooks
  ``torch.bmm`` but neither ``torch.baddbmm`` nor the fused kernel sees exactly this, if the cloud's attention was
  written out to reach its maps and the device's was left fused;
- a cached attention costs nothing (projections included) and its refresh is not counted;
- under batch reuse the pivot alone pays for queries and keys, and map times V is not counted at all;
- parameters leave out group norms, and SDXL's embedding of the pooled text and picture size.
"""

from __future__ import annotations

import csv
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from obclip_core.accelerate import NONE, Schedule
from obclip_core.accelerate.merge import merged
from obclip_core.accelerate.schedule import KEEPING

DATA = Path(__file__).resolve().parent.parent / "data" / "paper"
KINDS = ("conv", "linear", "qk", "av")
LCM = "lcm-sdxl"
DEVICES = ("bk-sdm-small", "bk-sdm-tiny", "small-sd", "koala-700m")
POINTS = {5: (3, 3), 10: (4, 6), 4: (2, None)}  # k: (r, s)


@dataclass(frozen=True)
class Op:
    """One matrix product of a U-Net for one row of the batch: its multiply-adds and the elements of its output."""

    name: str
    kind: str
    macs: int
    out: int
    grid: tuple[int, int]

    @property
    def attention(self) -> str:
        """"attn1" (self), "attn2" (cross) or "" where it is not part of attention."""
        return next((part for part in self.name.split(".") if part in ("attn1", "attn2")), "")


@dataclass(frozen=True)
class Shape:
    """All products of one U-Net on latents (C, h, w), in module order; ``layers`` in the last of ``ups`` up blocks."""

    name: str
    ops: tuple[Op, ...]
    latent: tuple[int, int, int]
    parameters: int
    paper_parameters: int
    ups: int
    layers: int


def unet_config(name: str) -> dict[str, Any]:
    """The diffusers configuration of a U-Net of the paper, data/paper/unets; ValueError for a name not there."""
    file = DATA / "unets" / f"{name}.json"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.json")))
        raise ValueError(f"{name!r} is no U-Net of the paper: use one of {known}")
    return json.loads(file.read_text("utf-8"))


def shape(unet: str | Mapping[str, Any] | torch.nn.Module, size: int | tuple[int, int] | None = None,
          tokens: int = 77) -> Shape:
    """The shape of a ``UNet2DConditionModel``: a name of data/paper/unets, a diffusers configuration, or a model.

    ``size`` is the latent's height and width (one number: both), the configuration's own if left out. Configurations
    are laid out on the meta device: no weight is made. ValueError for a name that is not there.
    """
    name = unet if isinstance(unet, str) else "unet"
    unet = unet_config(unet) if isinstance(unet, str) else unet
    if not isinstance(unet, torch.nn.Module):
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(dict(unet))
    size = unet.config.sample_size if size is None else size
    height, width = (size, size) if isinstance(size, int) else size
    grids = [(height, width)]
    for _ in unet.down_blocks[1:]:
        grids.append(((grids[-1][0] + 1) // 2, (grids[-1][1] + 1) // 2))
    levels = len(unet.down_blocks)
    ops = [op for path, module in unet.named_modules() for op in _ops(path, module, grids, levels, tokens)]
    norms = sum(p.numel() for m in unet.modules() if isinstance(m, torch.nn.GroupNorm) for p in m.parameters())
    added = sum(p.numel() for path, p in unet.named_parameters() if path.startswith("add_embedding."))
    parameters = sum(p.numel() for p in unet.parameters())
    return Shape(name, tuple(ops), (unet.config.in_channels, height, width), parameters, parameters - norms - added,
                 len(unet.up_blocks), len(unet.up_blocks[-1].resnets))


def _ops(path: str, module: torch.nn.Module, grids: list[tuple[int, int]], levels: int, tokens: int) -> Iterable[Op]:
    """The products of one module for one row: weights times the places they are applied at."""
    parts = path.split(".")
    if not isinstance(module, (torch.nn.Conv2d, torch.nn.Linear, Attention)):
        return
    level = {"down_blocks": lambda: int(parts[1]), "mid_block": lambda: levels - 1,
             "up_blocks": lambda: levels - 1 - int(parts[1])}.get(parts[0], lambda: 0)()
    grid = grids[level + ("downsamplers" in parts) - ("upsamplers" in parts)]
    places = grid[0] * grid[1]
    if isinstance(module, Attention):
        keys = tokens if parts[-1] == "attn2" else places
        yield Op(f"{path}.qk", "qk", places * keys * module.inner_dim, 0, grid)
        yield Op(f"{path}.av", "av", places * keys * module.inner_dim, places * module.inner_dim, grid)
        return
    if parts[0] in ("time_embedding", "add_embedding") or parts[-1] == "time_emb_proj":
        places = 1
    elif parts[-2:] in (["attn2", "to_k"], ["attn2", "to_v"]):
        places = tokens
    kind = "conv" if isinstance(module, torch.nn.Conv2d) else "linear"
    yield Op(path, kind, module.weight.numel() * places, module.weight.shape[0] * places, grid)


# -------------------- multiply-adds

def step_macs(shape: Shape, schedule: Schedule = NONE, step: int = 0, candidates: int = 1, *, guided: bool = True,
              chunks: int = 1, kinds: Iterable[str] = KINDS) -> int:
    """Multiply-adds of one step on N candidates in ``chunks`` U-Net calls, of these kinds of product."""
    on, kinds = schedule.on(step), frozenset(kinds)
    asked = schedule.rows(step, candidates, guided)
    total = 0
    for op in shape.ops:
        if op.kind not in kinds or not _runs(op, on, schedule, shape):
            continue
        part, rows, macs = op.name.rpartition(".")[2], sum(asked), op.macs
        if "reuse" in on and asked[0] > 1 and op.attention and part in ("to_q", "to_k", "qk"):
            # the map is made again for each chunk, from kept Q and K
            rows = sum((chunks if part == "qk" and n > 1 else 1) for n in asked if n)
        if "merge" in on and op.attention == "attn1" and _depth(op, shape) <= schedule.merge_depth:
            macs = _merged(op, schedule, shape)
        total += rows * macs
    return total


def macs(shape: Shape, schedule: Schedule = NONE, k: int = 25, candidates: int = 1, **options: Any) -> int:
    """Multiply-adds of steps 0 .. k-1, as ``step_macs``."""
    return _over(schedule, k, lambda step: step_macs(shape, schedule, step, candidates, **options))


def _over(schedule: Schedule, k: int, count: Callable[[int], int]) -> int:
    """The sum of ``count`` over k steps; steps with the same techniques on cost the same."""
    alike = [(schedule.on(step), schedule.rows(step, 0)) for step in range(k)]
    each = {kind: count(step) for kind, step in zip(reversed(alike), reversed(range(k)), strict=True)}
    return sum(each[kind] for kind in alike)


def _runs(op: Op, on: frozenset[str], schedule: Schedule, shape: Shape) -> bool:
    """Whether any row of this product is computed with these techniques on."""
    parts = op.name.split(".")
    if op.attention and ("cache" in on or ("tgate" in on and op.attention == "attn2")):
        return False
    lower = parts[0] in ("down_blocks", "mid_block")
    if "deepcache" in on and (lower or parts[0] == "up_blocks"):
        layer = int(parts[3]) if parts[2] in ("resnets", "attentions") else None
        if layer is None or parts[:2] not in (["down_blocks", "0"], ["up_blocks", str(shape.ups - 1)]):
            return False
        return layer < schedule.branch if lower else layer >= shape.layers - 1 - schedule.branch
    return not (lower and {"skip", "encoder"} & on) and not (parts[0] == "conv_in" and "encoder" in on)


def _depth(op: Op, shape: Shape) -> int:
    """How often the latent was halved where this product is computed."""
    height, depth = shape.latent[1], 0
    while height > op.grid[0]:
        height, depth = (height + 1) // 2, depth + 1
    return depth


def _merged(op: Op, schedule: Schedule, shape: Shape) -> int:
    """A self-attention product on merged tokens; the matching of tokens is billed to Q K^T."""
    before = op.grid[0] * op.grid[1]
    left, targets = merged(*op.grid, schedule.merge_ratio)
    if op.kind == "linear":
        return op.macs // before * left
    width = op.macs // before**2
    return width * left**2 + (width * (before - targets) * targets if op.kind == "qk" else 0)


# -------------------- bytes

def kept_bytes(shape: Shape, schedule: Schedule, candidates: int, *, guided: bool = True,
               itemsize: int = 2) -> dict[str, int]:
    """Bytes that each technique keeps from step to step for N candidates (``Request.bytes`` while it runs)."""
    last = max((step for name in schedule.techniques if name in KEEPING for step in schedule.steps(name)), default=0)
    asked = replace(schedule, tgate=()).rows(last, candidates, guided)
    rows, ops = sum(asked), {op.name: op for op in shape.ops}
    attention = {kind: sum(op.out for op in shape.ops if op.attention == kind and op.name.endswith(".to_out.0"))
                 for kind in ("attn1", "attn2")}
    lower = sum(op.out for op in shape.ops if op.name.startswith("down_blocks.")
                and (op.name.endswith((".conv2", ".conv")) and "attentions" not in op.name))
    mid = [op.out for op in shape.ops if op.name.startswith("mid_block.") and op.name.endswith(".conv2")][-1:]
    first = shape.layers - 1 - schedule.branch
    last = shape.ups - 1
    up = f"up_blocks.{last}.resnets.{first - 1}.conv2" if first else f"up_blocks.{last - 1}.upsamplers.0.conv"
    elements = {"cache": rows * sum(attention.values()), "tgate": asked[0] * attention["attn2"],
                "skip": rows * (lower + sum(mid)), "encoder": rows * (lower + sum(mid) + ops["conv_in"].out),
                "deepcache": rows * ops[up].out if up in ops else 0}
    return {name: elements[name] * itemsize for name in schedule.techniques if name in elements}


def hand_over_bytes(shape: Shape, candidates: int, itemsize: int = 2) -> int:
    """Bytes of the N latents that travel back to the device."""
    channels, height, width = shape.latent
    return candidates * channels * height * width * itemsize


def peak_bytes(run: Callable[[], Any]) -> int:
    """Measured: the most bytes that ``run`` holds at once beyond what was held before it, on its GPU or else in memory.

    With a technique on, it grows by ``kept_bytes`` at most (what is kept may have been held at the peak anyway).
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0)


# -------------------- seconds

def seconds(runs: Mapping[str, Callable[[], Any]], repeats: int = 5, warm: int = 1) -> list[dict[str, Any]]:
    """Measured seconds of each run, interleaved, and their ratio to the first run of the same round, with its spread.

    Rows (name, seconds, ratio, ratio_low, ratio_high, repeats): medians, and the least and greatest ratio.
    """
    if not runs or repeats < 1:
        raise ValueError(f"{len(runs)} runs, {repeats} repeats, expected at least one of each")
    for run in list(runs.values()) * warm:
        run()
    rounds = [{name: _timed(run) for name, run in runs.items()} for _ in range(repeats)]
    first = next(iter(runs))
    rows = []
    for name in runs:
        ratios = [each[name] / each[first] for each in rounds]
        rows.append({"name": name, "seconds": statistics.median(each[name] for each in rounds),
                     "ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios),
                     "repeats": repeats})
    return rows


def _timed(run: Callable[[], Any]) -> float:
    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    wait()
    begin = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begin


# -------------------- the paper's numbers

def paper_step(shape: Shape, schedule: Schedule = NONE, step: int = 0, candidates: int = 1, *,
               device: bool = False) -> int:
    """Operations of one step by the paper's rule (see above); ``device`` takes the rule of its small U-Nets."""
    blind = device or ("reuse" in schedule.on(step) and candidates > 1)
    kinds = ("conv", "linear") if blind else ("conv", "linear", "av")
    return 2 * step_macs(shape, schedule, step, candidates, guided=False, kinds=kinds)


def paper_flops(shape: Shape, schedule: Schedule = NONE, k: int = 25, candidates: int = 1, *,
                device: bool = False) -> int:
    """Operations of steps 0 .. k-1 by the paper's rule."""
    return _over(schedule, k, lambda step: paper_step(shape, schedule, step, candidates, device=device))


def paper_schedule(k: int, *, reuse: bool = True, refresh: int | None = 5) -> Schedule:
    """The paper's points for k = 5, 10, and 4 (LCM). Its printed counts are those of ``refresh=None``."""
    r, s = POINTS[k]
    return Schedule.points(k, r, s, reuse=reuse, refresh=refresh)


def paper_rows() -> list[dict[str, str]]:
    """All printed numbers, as data/paper/tables.csv has them."""
    with open(DATA / "tables.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def flops_table() -> list[dict[str, Any]]:
    """Every printed count of operations (Tables 2, 3, 4, 5, 7) beside ours: rows of flops.csv.

    Columns: artefact, world, method, k, candidates; paper and ours_paper_rule in 10^12 operations; full in 10^12
    multiply-adds of the method as described, with guidance (LCM runs without), Q K^T and the refresh; note, the likely
    cause where paper and ours_paper_rule differ by more than 1 %.
    """
    shapes = {file.stem: shape(file.stem) for file in sorted((DATA / "unets").glob("*.json"))}
    rows = []
    for row in paper_rows():
        if "tflops" not in row["metric"]:
            continue
        ours, full = (round(count / 1e12, 4) for count in _bill(row, shapes))
        alone = row["table"] == "5"
        rows.append({"artefact": f"Table {row['table']}", "world": row["method"] if alone else row["setting"],
                     "method": "alone" if alone else row["method"] + " (device)" * (row["metric"] == "device_tflops"),
                     "k": int(row["switch_point"]) if row["switch_point"] else None,
                     "candidates": int(row["candidates"]), "paper": float(row["value"]), "ours_paper_rule": ours,
                     "full": full,
                     "note": _note(row, ours) if abs(ours - float(row["value"])) > 0.01 * float(row["value"]) else ""})
    return rows


def _bill(row: Mapping[str, str], shapes: Mapping[str, Shape]) -> tuple[int, int]:
    """(operations by the paper's rule, multiply-adds) of one printed row."""
    N, k, method = int(row["candidates"]), int(row["switch_point"] or 0), row["method"].split(" shift")[0]
    if row["table"] == "5":
        return _plain(shapes[method], N)
    cloud, device = (shapes[name] for name in row["setting"].split("+"))
    if row["metric"] == "device_tflops" or method == "device-only":
        steps = {"cloud-only": 0, "vanilla-og": 0, "device-only": 25}.get(method, 25 - k)
        return _plain(device, 1, 0 if row["metric"] == "cloud_tflops" else steps)
    if method in ("cloud-only", "vanilla-og"):
        return _plain(cloud, N if method == "vanilla-og" else 1)
    if method in ("hybrid-sd", "obclip"):
        return _plain(cloud, N if method == "obclip" else 1, k)
    total = method == "total(+device)"
    counted, run = (paper_schedule(k, reuse=total or "reuse" in method, refresh=refresh) for refresh in (None, 5))
    ours, full = _plain(device, 1, 25 - k) if total else (0, 0)
    return (ours + paper_flops(cloud, counted, k, N), full + macs(cloud, run, k, N, guided=cloud.name != LCM))


def _plain(shape: Shape, candidates: int, steps: int | None = None) -> tuple[int, int]:
    """Both counts of plain generation."""
    steps = (8 if shape.name == LCM else 25) if steps is None else steps
    return (paper_flops(shape, k=steps, candidates=candidates, device=shape.name in DEVICES),
            macs(shape, k=steps, candidates=candidates, guided=shape.name != LCM))


def _note(row: Mapping[str, str], ours: float) -> str:
    """The likely cause of a printed number that the rule does not give."""
    if row["metric"] == "device_tflops":
        return "15 steps of bk-sdm-small (10.9 x 15 / 25), not of small-sd"
    if row["table"] == "2" and row["switch_point"] == "10":
        return "exactly twice the k=5 row; Table 7 prints the count of k=10 for N=6, which the rule gives"
    if row["table"] == "2" and row["candidates"] == "2":
        return f"off the line through Table 7's N=4 and N=6 (11.13, 16.64), which gives 5.62; ours {ours:.2f}"
    return "unexplained"


def parameters_table() -> list[dict[str, Any]]:
    """Table 5's parameters (millions): printed, by the paper's rule, and all. Its last two rows are printed swapped."""
    swapped = {"koala-700m": "lcm-sdxl", "lcm-sdxl": "koala-700m"}
    rows = []
    for row in (row for row in paper_rows() if row["metric"] == "params_m"):
        one = shape(row["method"])
        rows.append({"artefact": "Table 5", "world": one.name, "paper": float(row["value"]),
                     "ours_paper_rule": round(one.paper_parameters / 1e6, 2), "full": round(one.parameters / 1e6, 2),
                     "note": f"printed in the row of {swapped[one.name]}" if one.name in swapped else ""})
    return rows


def figure_12(cloud: str = "sd14", k: int = 10, candidates: int = 6) -> list[dict[str, Any]]:
    """Figure 12: 10^12 operations per step and candidate by the paper's rule, spent and saved, technique by technique.

    Rows (step, on, plain, spent, saved, full_plain, full_spent); the last two in 10^12 multiply-adds, guidance and
    refresh included.
    """
    one, counted, run = shape(cloud), paper_schedule(k, refresh=None), paper_schedule(k)
    each = 1e12 * candidates
    return [{"step": step, "on": "+".join(sorted(counted.on(step))), "plain": paper_step(one) / 1e12,
             "spent": paper_step(one, counted, step, candidates) / each,
             "saved": paper_step(one) / 1e12 - paper_step(one, counted, step, candidates) / each,
             "full_plain": step_macs(one) / 1e12, "full_spent": step_macs(one, run, step, candidates) / each}
            for step in range(k)]
