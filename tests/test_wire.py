"""Envelopes: round trips, what a coding costs and loses, and that damage is always noticed."""

from __future__ import annotations

import json
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from obclip_core.accelerate import PAPER_K5
from obclip_core.denoise import HandOver, Offer, Secret, Split, finish, run
from obclip_core.schedulers import config
from obclip_core.service import wire

OFFER = Offer(tiny.CANDIDATES, 12, Split(25, 5), PAPER_K5)
NOISE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
DPM = diffusers.DPMSolverMultistepScheduler(**NOISE)
FIELDS = {"coding", "shape", "dtype", "step", "T", "mode", "scheduler", "state", "large"}
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def alike(N=30, shape=(4, 16, 16), spread=0.2, exact=True):
    """Candidates that share one noise and differ smoothly, as after a few steps, and the prediction that parts them."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(1, *shape, generator=g)
    m = torch.nn.functional.interpolate(torch.randn(N, shape[0], 4, 4, generator=g), size=shape[1:], mode="bicubic")
    x = noise + spread * m + 0.02 * torch.randn(N, *shape, generator=g)
    state = {"model_outputs": [None, m], "lower_order_nums": 2, "_step_index": 5} if exact else {}
    return HandOver(x, 5, 25, config(DPM), state, "exact" if exact else "restart")


@pytest.fixture(scope="module")
def hand_over(tiny_world):
    return run(tiny_world, Offer(tiny.CANDIDATES, 12, Split(6, 3)))


def rms(a, b):
    return (a - b).pow(2).mean().sqrt().item()


def sealed(header, tensors=None):
    """A whole envelope with a right checksum, whatever is in it."""
    return wire._seal(header.pop("kind"), header, tensors or {})


# ------------------------------------------------------------------------------------------------- round trips

@few
@given(st.lists(st.text(max_size=60), min_size=1, max_size=8, unique=True).filter(
    lambda texts: all(text.isascii() or text.encode("utf-8", "ignore").decode() == text for text in texts)),
    st.integers(0, 2**63 - 1), st.integers(1, 50), st.data())
def test_any_offer_comes_back_as_it_went(texts, seed, T, data):
    offer = Offer(tuple(texts), seed, Split(T, data.draw(st.integers(0, T)),
                                            hand_over=data.draw(st.sampled_from(["exact", "restart"]))))
    assert wire.unpack_offer(wire.pack_offer(offer)) == offer


def test_an_offer_is_its_own_fields_and_nothing_else():
    data = wire.pack_offer(OFFER)
    assert wire.unpack_offer(data) == OFFER
    body = data[wire.START:]
    header = json.loads(json.loads(body[8:8 + int.from_bytes(body[:8], "little")])["__metadata__"]["obclip"])
    assert header == {"kind": "offer", "candidates": list(tiny.CANDIDATES), "seed": 12,
                      "split": {"T": 25, "k": 5, "first": "cloud", "cloud_T": None, "shift": 0, "hand_over": "exact"},
                      "acceleration": PAPER_K5.to_dict()}
    for extra in ({"index": 3}, {"secret": 3}):
        with pytest.raises(wire.WireError, match="fields of one offer and nothing else"):
            wire.unpack_offer(sealed(header | extra))


def test_what_travels_does_not_depend_on_which_candidate_is_real():
    assert len({wire.pack_offer(Offer(tiny.CANDIDATES, 1)) for _ in tiny.CANDIDATES}) == 1
    one = [len(wire.pack_hand_over(alike(), coding)) for coding in wire.CODINGS]
    assert one == [len(wire.pack_hand_over(alike(), coding)) for coding in wire.CODINGS]


@pytest.mark.parametrize("coding", wire.CODINGS)
@pytest.mark.parametrize("mode", ["exact", "restart"])
def test_a_hand_over_comes_back_and_the_device_can_go_on(coding, mode, hand_over, tiny_world):
    if mode == "restart":
        hand_over = replace(hand_over, state={}, mode="restart")
    back = wire.unpack_hand_over(wire.pack_hand_over(hand_over, coding))
    assert (back.step, back.T, back.mode, back.scheduler) == (3, 6, mode, hand_over.scheduler)
    assert back.latents.dtype == torch.float32 and back.latents.shape == (6, 4, 8, 8)
    allowed = {"raw": 0, "fp16": 1e-3, "int8": 0.02, "difference": 0.02}[coding]
    assert (back.latents - hand_over.latents).abs().max() <= allowed
    offer = Offer(tiny.CANDIDATES, 12, Split(6, 3, hand_over=mode))
    error = rms(finish(tiny_world, offer, back, Secret(2)), finish(tiny_world, offer, hand_over, Secret(2)))
    assert error <= allowed


@pytest.mark.parametrize("scheduler", [
    diffusers.UniPCMultistepScheduler(**NOISE), diffusers.EulerDiscreteScheduler(**NOISE),
    diffusers.DDIMScheduler(**NOISE), diffusers.DPMSolverMultistepScheduler(**NOISE, solver_order=3),
    diffusers.DEISMultistepScheduler(**NOISE), diffusers.LCMScheduler(**NOISE)])
def test_every_schedulers_state_travels_exactly(scheduler, tiny_world):
    world = replace(tiny_world, schedulers={"cloud": scheduler, "device": scheduler}, device=tiny_world.cloud)
    offer = Offer(tiny.CANDIDATES[:2], 12, Split(6, 3))
    direct = run(world, offer)
    travelled = wire.unpack_hand_over(wire.pack_hand_over(direct, "raw"))
    assert torch.equal(finish(world, offer, direct, Secret(1)), finish(world, offer, travelled, Secret(1)))
    lossy = wire.unpack_hand_over(wire.pack_hand_over(direct, "difference"))
    largest = direct.latents.abs().max()
    assert rms(lossy.latents, direct.latents) < 0.004 * largest
    assert finish(world, offer, lossy, Secret(1)).isfinite().all()


def test_half_precision_comes_back_as_half_precision(hand_over):
    half = replace(hand_over, latents=hand_over.latents.half(), state={}, mode="restart")
    for coding in wire.CODINGS:
        assert wire.unpack_hand_over(wire.pack_hand_over(half, coding)).latents.dtype == torch.float16


# ------------------------------------------------------------------------------------------------- what it costs

def test_fp16_of_stable_diffusion_is_the_papers_32_kb_a_candidate():
    shape = (4, 64, 64)
    data = wire.pack_hand_over(alike(6, shape, exact=False), "fp16")
    assert 6 * 32 * 1024 < len(data) < 6 * 32 * 1024 + 1500
    assert round(wire.seconds(32 * 1024, 18.88), 4) == 0.0139


def test_differences_take_four_times_fewer_bytes_than_fp16_and_lose_less_than_int8():
    whole = alike()
    size = {coding: len(wire.pack_hand_over(whole, coding)) for coding in wire.CODINGS}
    back = {coding: wire.unpack_hand_over(wire.pack_hand_over(whole, coding)) for coding in wire.CODINGS}
    assert size["difference"] * 4 < size["fp16"] and size["difference"] * 2 < size["int8"]
    assert rms(back["difference"].latents, whole.latents) < rms(back["int8"].latents, whole.latents)
    # the state is coarser than int8's, and yet its share of the next latent's error is small: it weighs 0.02 there
    scheduler = diffusers.DPMSolverMultistepScheduler(**NOISE)
    steps = wire._steps(whole, "difference")
    assert steps["model_outputs.1"].min() > 5 * steps["latents"].max()
    after = {}
    for coding in ("raw", "int8", "difference"):
        scheduler.set_timesteps(25)
        scheduler.set_begin_index(5)
        vars(scheduler).update({**back[coding].state, "model_outputs": list(back[coding].state["model_outputs"])})
        after[coding] = scheduler.step(torch.zeros_like(whole.latents), scheduler.timesteps[5],
                                       back[coding].latents).prev_sample
    assert rms(after["difference"], after["raw"]) < rms(after["int8"], after["raw"])


def test_an_exact_hand_over_costs_little_more_than_a_restart_where_the_latents_follow_the_prediction():
    exact, restart = (len(wire.pack_hand_over(alike(exact=exact), "difference")) for exact in (True, False))
    fp16 = [len(wire.pack_hand_over(alike(exact=exact), "fp16")) for exact in (True, False)]
    assert exact < 1.5 * restart and fp16[0] > 1.9 * fp16[1]


def test_the_traffic_table_tells_what_the_envelopes_weigh():
    rows = wire.traffic_table(bits={"difference": 4.0})
    assert len(rows) == 3 * 4 * 2 * 3
    key = ("world", "N", "mode", "coding")
    row, = (row for row in rows if tuple(map(row.get, key)) == ("sd", 30, "restart", "fp16"))
    real = len(wire.pack_hand_over(alike(30, (4, 64, 64), exact=False), "fp16"))
    assert abs(row["bytes_down"] - real) < 300
    assert row["seconds_wifi_18.88"] == pytest.approx((row["bytes_up"] + row["bytes_down"]) * 8 / 18.88e6)
    assert {row["coding"] for row in rows} == {"fp16", "int8", "difference"}
    down = {tuple(map(row.get, key)): row["bytes_down"] for row in rows}
    for N in (1, 2, 6, 30):
        assert 1.9 < down["sdxl", N, "exact", "fp16"] / down["sdxl", N, "restart", "fp16"] < 2


# ------------------------------------------------------------------------------------------------- damage

@few
@given(st.data())
def test_a_flipped_bit_is_always_noticed(data):
    for whole, unpack in ((wire.pack_offer(OFFER), wire.unpack_offer),
                          (wire.pack_hand_over(alike(2, (4, 8, 8)), "difference"), wire.unpack_hand_over)):
        broken = bytearray(whole)
        broken[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        with pytest.raises(wire.WireError):
            unpack(bytes(broken))


@few
@given(st.data())
def test_whatever_is_cut_off_or_put_on_is_noticed(data):
    whole = wire.pack_hand_over(alike(2, (4, 8, 8)), "fp16")
    for broken in (whole[:data.draw(st.integers(0, len(whole) - 1))],
                   whole + data.draw(st.binary(min_size=1, max_size=9)), data.draw(st.binary(max_size=200)),
                   wire.MAGIC + b"\0\1" + data.draw(st.binary(max_size=200))):
        for unpack in (wire.unpack_offer, wire.unpack_hand_over):
            with pytest.raises(wire.WireError):
                unpack(broken)


def test_other_versions_kinds_and_sizes_are_refused_in_one_sentence(monkeypatch):
    whole = wire.pack_offer(OFFER)
    with pytest.raises(wire.WireError, match="version 0, this program reads version 1"):
        wire.unpack_offer(whole[:4] + b"\0\0" + whole[6:])
    with pytest.raises(wire.WireError, match="fields of one hand-over"):
        wire.unpack_hand_over(whole)
    with pytest.raises(wire.WireError, match="header has 1048"):
        body = (2**20 + 8).to_bytes(8, "little") + b" " * (2**20 + 8)
        start = wire.MAGIC + b"\0\1"
        wire.unpack_offer(start + wire._checksum(start + body) + body)
    monkeypatch.setattr(wire, "MOST_BYTES", 100)
    with pytest.raises(wire.WireError, match="expected at most 100"):
        wire.unpack_offer(whole)


JSON = st.recursive(st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
                    max_leaves=6)


@few
@given(st.sampled_from(sorted(FIELDS)), JSON)
def test_a_well_sealed_lie_is_refused_or_harmless(field, lie):
    whole = wire.pack_hand_over(alike(2, (4, 8, 8)), "difference")
    header, tensors = wire._open(whole, "hand-over", FIELDS)
    try:
        back = wire.unpack_hand_over(sealed({"kind": "hand-over", **header, field: lie}, tensors))
    except wire.WireError:
        return
    assert isinstance(back, HandOver) and back.latents.shape == (2, 4, 8, 8)


@few
@given(st.sampled_from(["candidates", "seed", "split", "acceleration"]), JSON)
def test_a_well_sealed_lie_in_an_offer_is_refused_or_harmless(field, lie):
    header, _ = wire._open(wire.pack_offer(OFFER), "offer", {"candidates", "seed", "split", "acceleration"})
    try:
        assert isinstance(wire.unpack_offer(sealed({"kind": "offer", **header, field: lie})), Offer)
    except wire.WireError:
        pass


@few
@given(st.binary(max_size=300), st.integers(0, 4))
def test_broken_streams_inside_a_well_sealed_envelope_are_refused(noise, where):
    whole = wire.pack_hand_over(alike(3, (4, 8, 8)), "difference")
    header, tensors = wire._open(whole, "hand-over", FIELDS)
    packed = tensors["latents/packed"].numpy().tobytes()
    broken = packed[:where] + noise + packed[where + len(noise):]
    tensors["latents/packed"] = torch.frombuffer(bytearray(broken or b"\0"), dtype=torch.uint8)
    try:
        back = wire.unpack_hand_over(sealed({"kind": "hand-over", **header}, tensors))
    except wire.WireError:
        return
    assert back.latents.shape == (3, 4, 8, 8) and back.latents.isfinite().all()


@few
@given(st.integers(1, 5), st.integers(0, 2**32 - 1), st.sampled_from([1, 40, 3000]))
def test_packing_loses_nothing(N, seed, spread):
    q = np.random.default_rng(seed).integers(-spread, spread + 1, (N, 2, 3, 5))
    assert (wire._unpack(wire._pack(q), q.shape) == q).all()


@pytest.mark.parametrize(("change", "coding", "sentence"), [
    (lambda x: x * float("nan"), "fp16", "not finite"),
    (lambda x: x * 1e6, "fp16", "beyond half precision"),
    (lambda x: x, "int4", "expected one of raw, fp16, int8, difference"),
])
def test_what_cannot_travel_well_is_not_sent(change, coding, sentence):
    whole = alike(2, (4, 8, 8), exact=False)
    with pytest.raises(ValueError, match=sentence):
        wire.pack_hand_over(replace(whole, latents=change(whole.latents)), coding)


def test_a_state_that_would_replace_the_scheduler_itself_is_refused(hand_over, tiny_world):
    with pytest.raises(ValueError, match="would replace 'step' of the DPMSolverMultistepScheduler"):
        finish(tiny_world, Offer(tiny.CANDIDATES, 12, Split(6, 3)),
               replace(hand_over, state={**hand_over.state, "step": 1}), Secret(0))
