"""The audit finds every seeded leak, accuses no honest client, and the attacks succeed as often as theory says."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import tiny

from obclip_core import audit, denoise, privacy
from obclip_core.messages import Offer, Secret, Split
from obclip_core.prompts import candidate_values, candidates, parse, real_index
from obclip_core.service import wire

TEXT = "an old woman in her garden"


@pytest.fixture(scope="module")
def mutants():
    return {row["mutant"]: row for row in audit.mutant_table(TEXT)}


def test_honest_clients_are_not_accused(mutants):
    assert not mutants["none (all candidates)"]["found"] and mutants["none (all candidates)"]["advantage"] == 0
    assert not mutants["none (subset)"]["found"]
    assert mutants["none (subset)"]["epsilon"] == pytest.approx(1.0)


@pytest.mark.parametrize("name", audit.MUTANTS)
def test_every_seeded_leak_is_found(mutants, name):
    assert mutants[name]["found"]


def test_there_are_at_least_twelve_leaks():
    assert len(audit.MUTANTS) >= 12


def test_spellings_are_other_texts_of_the_same_candidates():
    prompt = parse(TEXT)
    texts = audit.spellings(prompt)
    assert len(texts) > 4 * prompt.count and len(set(texts)) == len(texts)
    assert {parse(text).text for text in texts} == set(candidates(prompt))


def test_full_enumeration_gives_no_advantage_on_every_corpus_template():
    rows = audit.closure_table(audit.corpus())
    assert len(rows) >= 500 and max(row["advantage"] for row in rows) == 0
    assert sum(row["candidates"] == 0 for row in rows) <= 5


def test_the_bytes_that_are_audited_are_the_envelopes_that_travel(monkeypatch):
    sent = wire.pack_offer(Offer(candidates(TEXT), 0))
    assert [audit.honest_client()(text) for text in audit.spellings(parse(TEXT))[:3]] == [{(sent,): 1.0}] * 3
    first = audit.mutant_client("only its own latent fetched")(candidates(TEXT)[2])
    assert list(first) == [(sent, b'{"fetch":2}')]
    assert audit.drawing_client(privacy.enumerate_all(6))(TEXT, None) == (sent,)
    counter = itertools.count()
    monkeypatch.setattr(wire, "pack_offer", lambda offer: sent + bytes([next(counter)]))  # a leak in the packing
    assert not audit.exact_audit(audit.honest_client(), candidates(TEXT)).holds
    assert audit.closure_table([TEXT])[0]["advantage"] == 1


def test_fields_that_make_no_offer_are_not_packed():
    with pytest.raises(ValueError, match="offered twice"):
        audit.envelope(audit.offer_fields(["a", "a"]))


def seen_by_the_cloud(world, monkeypatch, times=lambda secret: 1):
    """A client that makes the picture, and writes down each call of the cloud with the size of its answer."""
    cloud = denoise.run

    def client(text):
        prompt, calls = parse(text), []

        def run(world, offer, **options):
            hand_over = cloud(world, offer, **options)
            calls.extend((wire.pack_offer(offer), str(len(wire.pack_hand_over(hand_over))).encode()))
            return hand_over

        monkeypatch.setattr(denoise, "run", run)
        offer, secret = Offer(candidates(prompt), 3, Split(4, 2)), Secret(real_index(prompt))
        for _ in range(times(secret)):
            denoise.generate(world, offer, secret)
        return {tuple(calls): 1.0}

    return client


def test_the_cloud_is_called_once_and_answers_in_one_size_whichever_candidate_is_real(tiny_world, monkeypatch):
    texts = candidates(parse(tiny.CANDIDATES[0]))
    client = seen_by_the_cloud(tiny_world, monkeypatch)
    assert len(texts) == 6 and [len(calls) for calls in client(texts[5])] == [2]
    found = audit.exact_audit(client, texts)
    assert found.holds and (found.advantage, found.transcripts) == (0, 1)
    retries = seen_by_the_cloud(tiny_world, monkeypatch, lambda secret: 1 + (secret.index == 4))
    assert not audit.exact_audit(retries, texts).holds


def test_the_serialiser_is_an_argument_and_its_bytes_are_what_is_compared():
    counter = itertools.count()
    numbered = lambda fields: json.dumps(fields).encode() + str(next(counter)).encode()  # noqa: E731
    assert audit.exact_audit(audit.honest_client(serialise=lambda f: json.dumps(f).encode()), candidates(TEXT)).holds
    assert not audit.exact_audit(audit.honest_client(serialise=numbered), candidates(TEXT)).holds


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0])
def test_subset_keeps_its_epsilon_in_bytes_and_reaches_it(epsilon):
    client = audit.honest_client(lambda n: privacy.subset(n, 2, epsilon))
    found = audit.exact_audit(client, candidates(TEXT), promised=epsilon)
    assert found.holds and found.epsilon == pytest.approx(epsilon)


def test_sampled_audit_comes_within_five_per_cent_and_below_the_bound():
    first, second = candidates(TEXT)[0], candidates(TEXT)[-1]
    draw = audit.drawing_client(privacy.subset(6, 2, 2.0))
    row = audit.sampled_audit(draw, first, second, trials=20_000, seed=1)
    assert row["epsilon_low"] <= 2.0 and row["epsilon"] == pytest.approx(2.0, rel=0.05)


def test_sampled_audit_finds_a_leak_and_no_other():
    first, second = candidates(TEXT)[0], candidates(TEXT)[-1]
    honest = audit.sampled_audit(audit.drawing_client(privacy.enumerate_all(6)), first, second, trials=2000)
    leak = audit.sampled_audit(audit.drawing_client(privacy.plain(6)), first, second, trials=2000)
    assert honest["epsilon_low"] == 0 and honest["advantage_low"] == 0
    assert leak["advantage_low"] > 0.95 and leak["epsilon_low"] > 3


@pytest.fixture(scope="module")
def attacks():
    return audit.attack_table(TEXT, trials=300)


def test_no_attack_beats_what_the_mechanism_promises(attacks):
    assert set(attacks[0]) == {"mechanism", "attack", "candidates", "success", "low", "high", "bound"}
    for row in attacks:
        assert row["low"] <= row["bound"] + 1e-9, row


def test_attacks_succeed_where_theory_says(attacks):
    at = {(row["mechanism"], row["attack"]): row["success"] for row in attacks}
    assert at["plain", "position"] == pytest.approx(1)
    assert at["enumerate_all", "prior (uniform)"] == pytest.approx(1 / 6)
    assert at["enumerate_all", "prior (skewed)"] == pytest.approx(audit.skewed(6).max())
    assert at["enumerate_some", "prior (uniform)"] == pytest.approx(1 / 3)
    assert at["truth_plus_others(m=1)", "prior (uniform)"] == pytest.approx(1)
    subset = privacy.subset(6, 1, 2.0)
    assert at[subset.name, "prior (uniform)"] == pytest.approx(subset.keeps)
    assert at[subset.name, "intersection (20 fresh)"] > 0.95 > at[subset.name, "intersection (20 memoised)"] + 0.2


def test_intersection_leaves_only_the_real_one_of_truth_plus_others():
    once = audit.guess_by_intersection(privacy.truth_plus_others(6, 3), 1, 400)
    often = audit.guess_by_intersection(privacy.truth_plus_others(6, 3), 12, 400)
    assert once[0] / once[1] == pytest.approx(1 / 3, abs=0.1) and often[0] / often[1] > 0.97


def test_a_cue_moves_the_prior_and_nothing_else():
    values = candidate_values(parse(TEXT))
    prior = audit.cue_prior(values, {"gender": ("male",)}, 0.9)
    assert prior.sum() == pytest.approx(1)
    men = sum(p for p, v in zip(prior, values, strict=True) if v["gender"] == "male")
    assert men == pytest.approx(0.9)


def test_publication_names_the_latent_that_the_picture_came_from():
    random = np.random.default_rng(0)
    latents = random.normal(size=(6, 4, 8, 8))
    guesses = [audit.publication_attack(latents, latents[i] + 0.3 * random.normal(size=(4, 8, 8))) for i in range(6)]
    assert guesses == list(range(6))
    row = audit.publication_row(guesses, range(6), 6, 10, "latent")
    assert row["success"] == 1 and row["bound"] == 1 and 0.5 < row["low"] < 1
    with pytest.raises(ValueError, match="against a published"):
        audit.publication_attack(latents, latents[0][:2])


def test_utility_and_privacy_pull_apart():
    rows = {(row["mechanism"], row["attribute"]): row for row in audit.utility_table(TEXT, epsilons=(1, 16))}
    assert rows["enumerate_all", "gender"]["match"] == rows["plain", "gender"]["match"] == pytest.approx(1)
    assert rows["random_replacement", "gender"]["match"] == pytest.approx(0.5)
    weak, strong = rows["santext(eps=16)", "gender"], rows["santext(eps=1)", "gender"]
    assert weak["success"] > strong["success"] and weak["match"] > strong["match"]
    assert math.isinf(rows["plain", "age"]["epsilon"])
