"""Notebook 00's functions, on a tiny world of random weights."""

from __future__ import annotations

import pytest
import torch

from obclip_core import cost
from obclip_core.accelerate import Schedule
from obclip_core.denoise import Offer, Split, decode, run
from obclip_core.experiments import quickstart
from obclip_core.prompts import candidates, parse


@pytest.fixture(scope="module")
def compared(tiny_world):
    offers = quickstart.systems(parse("an old woman"), T=4, k=2, seed=3, acceleration=Schedule.points(2, 1, 1))
    table, images = quickstart.compare(tiny_world, offers)
    return offers, table.set_index("system"), dict(zip(offers, images, strict=True))


def test_the_other_candidates_change_the_bill_and_not_the_picture(compared):
    offers, bill, images = compared
    assert torch.allclose(images["ObCLIP"], images["Hybrid SD"], atol=1e-4)
    assert torch.allclose(images["vanilla OG"], images["cloud-only"], atol=1e-4)
    assert bill.cloud_gmacs["ObCLIP"] == pytest.approx(6 * bill.cloud_gmacs["Hybrid SD"])
    assert offers["ObCLIP"][0].N == 6 and bill.plain_generations["vanilla OG"] == pytest.approx(6)


def test_the_systems_differ_where_they_should(compared):
    _, bill, images = compared
    for one, other in (("cloud-only", "device-only"), ("ObCLIP", "cloud-only"), ("ObCLIP + caches", "ObCLIP")):
        assert (images[one] - images[other]).abs().max() > 1e-4, f"{one} and {other} give one picture"
    assert bill.cloud_gmacs["ObCLIP + caches"] < bill.cloud_gmacs["ObCLIP"]
    assert bill.cloud_gmacs["device-only"] == bill.bytes_up["device-only"] == bill.bytes_down["device-only"] == 0
    assert bill.cloud_seconds["device-only"] == 0 < bill.cloud_seconds.drop("device-only").min()
    assert bill.device_gmacs["cloud-only"] == 0 and bill.bytes_down["ObCLIP"] > bill.bytes_down["Hybrid SD"]


def test_a_bill_needs_no_run(tiny_world):
    offer = Offer(candidates(parse("a man")), seed=0, split=Split(T=5, k=5))
    row = quickstart.bill(tiny_world, offer)
    tokens = tiny_world.text_encoders[0].config.max_position_embeddings
    step = cost.step_macs(cost.shape(tiny_world.cloud, tokens=tokens), guided=tiny_world.guidance["cloud"] > 1)
    assert row["cloud_gmacs"] * 1e9 == pytest.approx(2 * 5 * step) and "cloud_seconds" not in row


def test_a_film_shows_the_latents_of_the_steps_asked_for(tiny_world):
    offer = Offer(("a man", "a woman"), seed=0, split=Split(T=4, k=3))
    film = quickstart.film(tiny_world, offer, [1, 3])
    assert film.shape[:2] == (2, 2)
    assert torch.allclose(film[1], decode(tiny_world, run(tiny_world, offer).latents), atol=1e-6)


def test_a_gallery_has_a_row_a_system_and_a_noise_a_prompt(tiny_world):
    shown = quickstart.gallery(tiny_world, [parse("a man"), parse("a man")], T=3, k=1, seed=0)
    assert shown.shape[:2] == (3, 2)
    assert (shown[0, 0] - shown[0, 1]).abs().max() > 1e-3, "both prompts had the same noise"
