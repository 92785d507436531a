"""The wire: one versioned envelope for what goes up (an offer) and what comes back (a hand-over).

    envelope = magic (4 bytes), version (2), checksum (16), safetensors with a JSON header in its metadata

Every envelope is a function of what both sides may know: an offer's length depends on its candidates and settings, a
hand-over's on the candidates, the seed and the models. Neither can depend on the secret, which reaches neither.

Codings of the latents, and of the scheduler's tensors of the same shape:
    raw         the precision they were computed in
    fp16        half precision: the paper's 32 N KB for Stable Diffusion
    int8        255 even steps a channel
    difference  even steps, a little finer than int8's, of each candidate less the earlier one that is nearest to it:
                candidates share one noise, so little is left, and deflate packs it (see ``_pack``). In an exact
                hand-over the latents differ much as the scheduler's last prediction does, so they are told by it
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import diffusers
import numpy as np
import safetensors.torch
import torch

from obclip_core.messages import HandOver, Offer, Split
from obclip_core.schedulers import config, influence, put, tensors_of

MAGIC, VERSION = b"OBCL", 1
START = len(MAGIC) + 2 + 16
MOST_HEADER, MOST_BYTES, MOST_VALUES = 2**20, 2**30, 2**25
CODINGS = ("raw", "fp16", "int8", "difference")
FINER = 0.92  # a difference step in int8 steps: room for the share of the state in the error, and to spare
STATE_SHARE = 0.35  # what an error in the state may weigh beside one in the latents
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
LINKS = {"wifi_18.88": 18.88, "wired_100": 100.0, "5g_200": 200.0}  # Mbps: the paper's, a common line, a usual 5G cell


class WireError(ValueError):
    """Bytes that are not one whole, undamaged envelope of this version and kind."""


def pack_offer(offer: Offer) -> bytes:
    """The envelope of an offer: its own fields and nothing else."""
    acceleration = None if offer.acceleration is None else offer.acceleration.to_dict()
    return _seal("offer", {"candidates": list(offer.candidates), "seed": offer.seed, "split": asdict(offer.split),
                           "acceleration": acceleration}, {})


def unpack_offer(data: bytes) -> Offer:
    """The offer in an envelope; WireError for anything else."""
    header, tensors = _open(data, "offer", {"candidates", "seed", "split", "acceleration"})
    try:
        if tensors:
            raise ValueError("it carries tensors")
        schedule = header["acceleration"]
        if schedule is not None:
            from obclip_core.accelerate import Schedule
            schedule = Schedule.from_dict(schedule)
        return Offer(tuple(header["candidates"]), header["seed"], Split(**header["split"]), schedule)
    except (TypeError, ValueError, KeyError, AttributeError) as why:
        raise WireError(f"the envelope holds no valid offer: {why}") from why


def pack_hand_over(hand_over: HandOver, coding: str = "fp16") -> bytes:
    """The envelope of a hand-over in one of the codings of this module."""
    if coding not in CODINGS:
        raise ValueError(f"the coding is {coding!r}, expected one of {', '.join(CODINGS)}")
    x, state = hand_over.latents, dict(hand_over.state)
    large = {**tensors_of(state, x.shape), "latents": x}  # in this order, see ``_slope``
    if not all(tensor.isfinite().all() for tensor in large.values()):
        raise ValueError("the hand-over holds values that are not finite, so the picture is lost: try another seed or "
                         "a higher precision")
    steps = _steps(hand_over, coding)
    tensors: dict[str, torch.Tensor] = {}
    before = None
    for name, tensor in large.items():
        parts, before = _code(tensor.detach().cpu(), coding, steps.get(name), before)
        tensors |= {f"{name}/{part}": value for part, value in parts.items()}
        if name != "latents":
            state = put(state, name, {"large": name})
    header = {"coding": coding, "shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch."),
              "step": hand_over.step, "T": hand_over.T, "mode": hand_over.mode, "scheduler": dict(hand_over.scheduler),
              "state": _plain(state, tensors), "large": list(large)}
    return _seal("hand-over", header, tensors)


def unpack_hand_over(data: bytes) -> HandOver:
    """The hand-over in an envelope, in the precision it was computed in; WireError for anything else."""
    header, tensors = _open(data, "hand-over", {"coding", "shape", "dtype", "step", "T", "mode", "scheduler", "state",
                                                "large"})
    try:
        shape, dtype, coding = tuple(header["shape"]), DTYPES[header["dtype"]], header["coding"]
        if not (len(shape) == 4 and all(type(n) is int and n > 0 for n in shape) and math.prod(shape) <= MOST_VALUES
                and coding in CODINGS and isinstance(header["scheduler"], dict)):
            raise ValueError(f"coding {coding!r} of shape {shape}")
        large, before = {}, None
        for name in header["large"]:
            parts = {key.removeprefix(f"{name}/"): tensors[key] for key in tensors if key.startswith(f"{name}/")}
            x, before = _decode(parts, coding, shape, before)
            large[name] = x.to(dtype)

        def back(value: Any) -> Any:
            if isinstance(value, dict):
                (kind, name), = value.items()
                return {"large": large, "plain": tensors}[kind][name]
            return [back(item) for item in value] if isinstance(value, list) else value

        state = {key: back(value) for key, value in header["state"].items()}
        return HandOver(large["latents"], header["step"], header["T"], header["scheduler"], state, header["mode"])
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, RuntimeError, zlib.error) as why:
        raise WireError(f"the envelope holds no valid hand-over: {why}") from why


def seconds(count: int, mbps: float) -> float:
    """Seconds that ``count`` bytes take at ``mbps`` million bits a second."""
    return count * 8 / (mbps * 1e6)


def traffic_table(shapes: Mapping[str, tuple[int, int, int]] | None = None, numbers: Iterable[int] = (1, 2, 6, 30),
                  bits: Mapping[str, float] | None = None, remembered: int = 1, prompt: int = 80
                  ) -> list[dict[str, Any]]:
    """Rows of bytes up, bytes down and seconds, per world, N, hand-over mode and coding, from shapes alone.

    ``shapes`` maps a world to its latent (C, h, w). ``bits`` adds codings whose size depends on the latents, as
    measured bits a value. An exact hand-over carries ``remembered`` tensors beside the latents; ``prompt`` is the
    bytes of a prompt.
    """
    shapes = shapes or {"sd": (4, 64, 64), "sdxl": (4, 128, 128), "portraits": (4, 16, 16)}
    rows = []
    for world, shape in shapes.items():
        for N in numbers:
            up = len(pack_offer(Offer(tuple(f"{i:0{prompt}d}" for i in range(N)), 2**31, Split())))
            for mode in ("exact", "restart"):
                values = N * shape[0] * shape[1] * shape[2] * (1 + remembered * (mode == "exact"))
                for coding, size in {"fp16": 16.0, "int8": 8.0, **(bits or {})}.items():
                    down = round(values * size / 8) + _overhead()
                    rows.append({"world": world, "N": N, "mode": mode, "coding": coding, "bytes_up": up,
                                 "bytes_down": down, **{f"seconds_{link}": seconds(up + down, mbps)
                                                        for link, mbps in LINKS.items()}})
    return rows


def _overhead() -> int:
    """Bytes of a hand-over's envelope around its payload, for DPM-Solver++."""
    empty = HandOver(torch.zeros(1, 4, 8, 8), 10, 25, config(diffusers.DPMSolverMultistepScheduler()), {}, "restart")
    return len(pack_hand_over(empty, "fp16")) - 2 * 4 * 8 * 8


def _seal(kind: str, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bytes:
    text = json.dumps({"kind": kind, **header}, separators=(",", ":"), sort_keys=True)
    body = safetensors.torch.save({key: value.contiguous() for key, value in tensors.items()}, {"obclip": text})
    start = MAGIC + VERSION.to_bytes(2, "big")
    return start + _checksum(start + body) + body


def _open(data: bytes, kind: str, keys: set[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    data = bytes(data)
    if len(data) > MOST_BYTES:
        raise WireError(f"the envelope has {len(data)} bytes, expected at most {MOST_BYTES}")
    if len(data) < START + 8 or data[:4] != MAGIC:
        raise WireError("these bytes are not an envelope of this program, or were cut short")
    if (version := int.from_bytes(data[4:6], "big")) != VERSION:
        raise WireError(f"the envelope is of version {version}, this program reads version {VERSION}: bring both sides "
                        "to the same version")
    body = data[START:]
    if data[6:START] != _checksum(data[:6] + body):
        raise WireError("the envelope was damaged or cut short on its way: send it again")
    if (length := int.from_bytes(body[:8], "little")) > MOST_HEADER:
        raise WireError(f"the envelope's header has {length} bytes, expected at most {MOST_HEADER}")
    try:
        tensors = safetensors.torch.load(body)
        header = json.loads(json.loads(body[8:8 + length])["__metadata__"]["obclip"])
        if not isinstance(header, dict):
            raise TypeError("it is not an object")
    except Exception as why:  # each parser raises its own; whatever it is, this is no envelope
        raise WireError(f"the envelope's header cannot be read ({type(why).__name__})") from why
    if header.pop("kind", None) != kind or set(header) != keys:
        raise WireError(f"the envelope does not hold the fields of one {kind} and nothing else")
    return header, tensors


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _plain(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A state as JSON, with its small tensors put among ``tensors`` under names."""
    if isinstance(value, torch.Tensor):
        name = f"plain{len(tensors)}"
        tensors[name] = value.detach().cpu()
        return {"plain": name}
    if isinstance(value, dict):
        return {key: item if key == "large" else _plain(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"the scheduler remembers a {type(value).__name__}, which cannot travel: use hand_over='restart'")


def _steps(hand_over: HandOver, coding: str) -> dict[str, torch.Tensor]:
    """Width of a step (C,) by tensor: int8's spans a channel in 127 to each side.

    A difference's is a little finer for the latents, and for the state as coarse as its influence on them allows.
    """
    x = hand_over.latents.detach().cpu()
    large = {**tensors_of(hand_over.state, x.shape), "latents": x}
    even = {name: tensor.float().abs().amax((0, 2, 3)).clamp(min=1e-12) / 127 for name, tensor in large.items()}
    if coding != "difference":
        return even
    cls, finer = getattr(diffusers, hand_over.scheduler["_class_name"]), FINER * even["latents"]
    weights = influence(cls.from_config(dict(hand_over.scheduler)), hand_over.T, hand_over.step, hand_over.state, x)
    return {name: finer * STATE_SHARE / max(weights[name], 1e-2) for name in weights} | {"latents": finer}


# ------------------------------------------------------------------------------------------------ codings

def _code(x: torch.Tensor, coding: str, step: torch.Tensor, before: np.ndarray | None
          ) -> tuple[dict[str, torch.Tensor], np.ndarray | None]:
    """The parts of one tensor (N, C, h, w), and what its difference coding tells of the next (``before``)."""
    if coding == "raw":
        return {"raw": x}, None
    if coding == "fp16":
        if not (half := x.half()).isfinite().all():
            raise ValueError("the hand-over holds values beyond half precision: use the coding raw or int8")
        return {"fp16": half}, None
    q = (x.float() / step[:, None, None]).round()
    if coding == "int8":
        return {"step": step, "int8": q.to(torch.int8)}, None
    q = q.numpy().astype(np.int64)
    slope = _slope(q, before)
    packed = bytearray(_pack(q - _told(slope, before)))
    return {"step": step, "slope": slope, "packed": torch.frombuffer(packed, dtype=torch.uint8)}, q


def _decode(parts: dict[str, torch.Tensor], coding: str, shape: tuple[int, ...], before: np.ndarray | None
            ) -> tuple[torch.Tensor, np.ndarray | None]:
    q = None
    if coding in ("raw", "fp16"):
        x = parts[coding]
    else:
        for part in ("step", "slope")[:1 if coding == "int8" else 2]:
            if parts[part].shape != shape[1:2] or parts[part].dtype != torch.float32:
                raise ValueError(f"its {part} does not fit its channels")
        if coding == "int8":
            whole = parts["int8"]
        else:
            q = _unpack(parts["packed"].numpy().tobytes(), shape) + _told(parts["slope"], before)
            whole = torch.from_numpy(q)
        x = whole.float() * parts["step"][:, None, None]
    if tuple(x.shape) != shape or not x.isfinite().all():
        raise ValueError(f"its latents are of shape {tuple(x.shape)}, announced as {shape}, or not finite")
    return x, q


def _slope(q: np.ndarray, before: np.ndarray | None) -> torch.Tensor:
    """Least squares, channel by channel: how candidates differ here, in multiples of how they differ in ``before``."""
    if before is None:
        return torch.zeros(q.shape[1])
    a, b = before - before.mean(0), q - q.mean(0)
    return torch.from_numpy((a * b).sum((0, 2, 3)) / np.maximum((a * a).sum((0, 2, 3)), 1)).float()


def _told(slope: torch.Tensor, before: np.ndarray | None) -> Any:
    return 0 if before is None else np.rint(slope.numpy().astype(np.float64)[:, None, None] * before).astype(np.int64)


def _pack(q: np.ndarray) -> bytes:
    """Whole numbers (N, C, h, w), alike from one n to the next, as few bytes; ``_unpack`` is its inverse.

    Each candidate is told as the difference to the earlier one that is nearest (the first, the pivot, to nothing). The
    places are told in classes, by how much earlier differences changed around them, so that quiet places, which need a
    fraction of a bit, do not share a code with busy ones. Deflate's Huffman code does the rest, class by class.
    """
    flat, classes = q.reshape(len(q), -1), {}
    nearest = [0] + [int(np.log2(1.0 + np.abs(flat[:n] - flat[n])).sum(1).argmin()) for n in range(1, len(q))]
    activity = _Activity(q.shape[1:])
    for n, m in enumerate(nearest):
        difference = q[n] - (q[m] if n else 0)
        for name, places in activity.classes(n):
            classes.setdefault(name, []).append(difference.ravel()[places])
        activity.add(difference, n)
    streams = {name: _deflate(np.concatenate(told)) for name, told in sorted(classes.items())}
    head = np.array(nearest, "<u2").tobytes() + b"".join(
        name.to_bytes(1, "little") + len(stream).to_bytes(4, "little") for name, stream in streams.items())
    return len(streams).to_bytes(1, "little") + head + b"".join(streams.values())


def _unpack(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    N, count = shape[0], data[0]
    nearest = np.frombuffer(data[1:1 + 2 * N], "<u2")
    at = 1 + 2 * N
    table = [(data[at + 5 * i], int.from_bytes(data[at + 5 * i + 1:at + 5 * i + 5], "little")) for i in range(count)]
    at += 5 * count
    streams = {}
    for name, length in table:
        streams[name] = _inflate(data[at:at + length], N * shape[1] * shape[2] * shape[3])
        at += length
    q = np.zeros(shape, np.int64)
    activity = _Activity(shape[1:])
    for n in range(N):
        if n and nearest[n] >= n:
            raise ValueError("it refers to a candidate that comes later")
        difference = np.zeros(q[n].size, np.int64)
        for name, places in activity.classes(n):
            told, streams[name] = np.split(streams[name], [len(places)])
            difference[places] = told
        difference = difference.reshape(shape[1:])
        activity.add(difference, n)
        q[n] = difference + (q[nearest[n]] if n else 0)
    if at != len(data) or any(len(rest) for rest in streams.values()):
        raise ValueError("it holds more values than its shape")
    return q


class _Activity:
    """How much each place changed in the candidates told so far, in whole numbers that both ends compute alike."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.sum = np.zeros(shape, np.int64)

    def classes(self, n: int) -> list[tuple[int, np.ndarray]]:
        """(class, places) for candidate n: an octave of activity each; the pivot and the next candidate apart."""
        if n < 2:
            return [(255 - n, np.arange(self.sum.size))]
        padded = np.pad(self.sum, ((0, 0), (1, 1), (1, 1)), mode="edge")
        h, w = self.sum.shape[1:]
        around = sum(padded[:, i:i + h, j:j + w] for i in range(3) for j in range(3)).ravel()
        octave = np.frexp(around)[1]
        return [(int(name), np.flatnonzero(octave == name)) for name in np.unique(octave)]

    def add(self, difference: np.ndarray, n: int) -> None:
        if n:
            self.sum = self.sum * 7 // 8 + 16 * np.abs(difference)


def _deflate(values: np.ndarray) -> bytes:
    """Signed whole numbers below 2**15 as low bytes, then high bytes, by the better of deflate's two ways."""
    folded = np.where(values >= 0, 2 * values, -2 * values - 1)
    if folded.max(initial=0) >= 2**16:
        raise ValueError("the latents differ by more than the difference coding holds: use the coding int8")
    planes = (folded & 255).astype(np.uint8).tobytes() + (folded >> 8).astype(np.uint8).tobytes()
    ways = []
    for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY):
        packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
        ways.append(packer.compress(planes) + packer.flush())
    return min(ways, key=len)


def _inflate(stream: bytes, most: int) -> np.ndarray:
    unpacker = zlib.decompressobj(-15)
    planes = unpacker.decompress(stream, 2 * most + 1)
    if not unpacker.eof or unpacker.unused_data or len(planes) > 2 * most or len(planes) % 2:
        raise ValueError("one of its streams is broken")
    low, high = np.frombuffer(planes, np.uint8).astype(np.int64).reshape(2, -1)
    folded = low | high << 8
    return np.where(folded & 1, -(folded + 1) // 2, folded // 2)
