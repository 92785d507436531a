"""The mechanisms do what their guarantees say, exactly where the space is finite."""

from __future__ import annotations

import math
import random
import re
import sys
import tomllib
from pathlib import Path
from random import Random
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch

from obclip_core import privacy, prompts
from obclip_core.prompts import candidate_values, parse, real_index

SKEWED = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
PROMPT = "an old woman by the sea"


@pytest.mark.parametrize("n", [1, 2, 6, 30])
def test_enumerating_all_leaves_every_prior_as_it_is(n):
    offers, matrix = privacy.channel(privacy.enumerate_all(n))
    prior = np.random.default_rng(n).dirichlet(np.ones(n))
    assert offers == [tuple(range(n))]
    np.testing.assert_allclose(privacy.posterior(prior, matrix[:, 0]), prior)
    assert privacy.exact_epsilon(matrix) == 0 and privacy.exact_delta(matrix) == 0
    assert privacy.success(matrix, prior) == pytest.approx(prior.max())


@pytest.mark.parametrize("n,m,epsilon", [(2, 1, 0.5), (6, 1, 1.0), (6, 3, 1.0), (6, 5, 2.0), (9, 4, 0.1), (12, 3, 4)])
def test_subset_is_exactly_epsilon_private_and_its_probabilities_sum_to_one(n, m, epsilon):
    mechanism = privacy.subset(n, m, epsilon)
    _, matrix = privacy.channel(mechanism)
    np.testing.assert_allclose(matrix.sum(axis=1), 1)
    assert privacy.exact_epsilon(matrix) == pytest.approx(epsilon)
    assert privacy.exact_delta(matrix, epsilon) == pytest.approx(0, abs=1e-12)
    kept = sum(p for offer, p in mechanism.distribution(0).items() if 0 in offer)
    assert kept == pytest.approx(m * math.exp(epsilon) / (m * math.exp(epsilon) + n - m)) == mechanism.keeps
    assert privacy.success(matrix, np.full(n, 1 / n)) == pytest.approx(mechanism.keeps / m)


@pytest.mark.parametrize("n,m", [(6, 2), (6, 5), (10, 3)])
def test_truth_plus_others_has_no_epsilon_and_the_stated_delta(n, m):
    _, matrix = privacy.channel(privacy.truth_plus_others(n, m))
    assert privacy.exact_epsilon(matrix) == math.inf
    assert privacy.exact_delta(matrix) == pytest.approx((n - m) / (n - 1))


def test_drawing_follows_the_stated_distribution():
    mechanism, random = privacy.subset(5, 2, 1.0), Random(1)
    count = 40_000
    seen: dict = {}
    for _ in range(count):
        offer = mechanism.draw(3, random)
        seen[offer] = seen.get(offer, 0) + 1
    for offer, p in mechanism.distribution(3).items():
        assert abs(seen[offer] / count - p) < 5 * math.sqrt(p * (1 - p) / count)


def test_combination_keeps_the_enumerated_factor_exact():
    both = privacy.combined(privacy.enumerate_all(2), privacy.subset(15, 3, 1.0))
    assert (both.n, both.m, both.epsilon) == (30, 6, 1.0)
    offers, matrix = privacy.channel(both)
    assert privacy.exact_epsilon(matrix) == pytest.approx(1.0)
    np.testing.assert_allclose(matrix[:15].sum(axis=0), matrix[15:].sum(axis=0))  # the factor: the first or last 15
    joint = privacy.subset(30, 6, 1.0)
    assert both.keeps == pytest.approx(joint.keeps)
    rows = privacy.combination_table((1.0,), (6,))
    assert [row["epsilon_gender"] for row in rows] == [0.0, pytest.approx(math.log((6 * math.e + 9) / 15))]


def test_gender_epsilon_of_a_joint_subset_is_what_the_channel_says():
    _, matrix = privacy.channel(privacy.subset(6, 2, 1.5))
    by_gender = np.stack([matrix[:3].mean(axis=0), matrix[3:].mean(axis=0)])
    assert privacy.exact_epsilon(by_gender) == pytest.approx(math.log((2 * math.exp(1.5) + 1) / 3))


def test_enumerating_some_is_exact_within_the_group_and_reveals_the_group():
    groups = [int(values["gender"] == "female") for values in candidate_values(parse(PROMPT))]
    mechanism = privacy.enumerate_some(groups)
    _, matrix = privacy.channel(mechanism)
    assert mechanism.m == 3 and mechanism.epsilon == math.inf
    assert privacy.success(matrix, np.full(6, 1 / 6)) == pytest.approx(1 / 3)
    assert privacy.exact_epsilon(matrix[np.array(groups) == 1]) == 0


def test_word_mechanisms_state_the_epsilon_of_their_matrix():
    distances = privacy.word_distances(candidate_values(parse(PROMPT)))
    assert distances.max() == 1 and (distances == distances.T).all() and (np.diag(distances) == 0).all()
    for epsilon in (0.5, 2, 8):
        word = privacy.santext(distances, epsilon)
        _, matrix = privacy.channel(word)
        assert word.epsilon == pytest.approx(privacy.exact_epsilon(matrix))
        assert word.epsilon <= epsilon + 1e-9
        aware = privacy.cape(distances, np.zeros(6), epsilon)
        assert aware.epsilon == pytest.approx(privacy.exact_epsilon(privacy.channel(aware)[1]))
    assert privacy.santext(distances, 0.0).epsilon == 0
    blank = privacy.channel(privacy.random_replacement(6))[1]
    assert privacy.success(blank, SKEWED) == pytest.approx(SKEWED.max())


def test_a_miss_takes_the_nearest_candidate_and_never_asks_again():
    prompt = parse(PROMPT)
    values, real = candidate_values(prompt), real_index(prompt)
    same_gender = [i for i, v in enumerate(values) if v["gender"] == "female" and i != real]
    middle = next(i for i in same_gender if values[i]["age"] == "middle-aged")
    assert privacy.nearest(values, real, (0, middle, 2)) == middle
    assert privacy.nearest(values, real, tuple(range(6))) == real
    for seed in range(30):
        choice = privacy.choose(prompt, privacy.subset(6, 2, 0.5), Random(seed))
        assert len(choice.texts) == 2 and choice.hit == (choice.texts[choice.index] == prompt.text)


def test_seeds_of_the_experiment_do_not_decide_what_is_offered():
    prompt, mechanism, seen = parse(PROMPT), privacy.subset(6, 3, 1.0), set()
    for _ in range(40):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        seen.add(privacy.choose(prompt, mechanism).offered)
    assert len(seen) > 5


def test_permanent_answers_repeat_for_one_user_and_differ_between_users_and_prompts():
    prompt, mechanism = parse(PROMPT), privacy.subset(6, 3, 1.0)
    draw = lambda key, p: privacy.choose(p, mechanism, privacy.permanent_random(key, p)).offered  # noqa: E731
    key = privacy.new_user_secret()
    assert len({draw(key, prompt) for _ in range(20)}) == 1
    assert len({draw(privacy.new_user_secret(), prompt) for _ in range(40)}) > 5
    assert len({draw(key, parse(f"an old woman by the {place}")) for place in ("lake", "river", "gate", "oak")}) > 1
    with pytest.raises(ValueError, match="at least 32"):
        privacy.permanent_random(b"short", prompt)


def test_permanent_answers_follow_the_mechanism_over_users():
    prompt, mechanism = parse(PROMPT), privacy.subset(6, 2, 1.0)
    streams = (privacy.permanent_random(i.to_bytes(32, "big"), prompt) for i in range(1500))
    hits = [4 in mechanism.draw(4, stream) for stream in streams]
    assert abs(np.mean(hits) - mechanism.keeps) < 5 * math.sqrt(0.25 / 1500)


def test_ledger_counts_a_prompt_once_and_composes_the_rest():
    ledger, mechanism = privacy.Ledger(), privacy.subset(6, 2, 0.5)
    assert ledger.record(parse(PROMPT), mechanism) and not ledger.record(parse("an elderly lady by the sea"), mechanism)
    assert ledger.epsilon() == 0.5
    for place in ("lake", "river", "gate"):
        ledger.record(parse(f"an old woman by the {place}"), mechanism)
    assert ledger.epsilon() == pytest.approx(2.0)
    assert 0 < ledger.epsilon(1e-3) < 2.0
    with pytest.raises(ValueError, match="another mechanism"):
        ledger.record(parse(PROMPT), privacy.subset(6, 3, 0.5))


def test_composition_by_dp_accounting_is_no_better_than_the_exact_value():
    """Two answers, composed exactly by hand over the four kinds of subset."""
    mechanism = privacy.subset(6, 2, 1.0)
    real, other = ({k: math.exp(v) for k, v in side.items()} for side in privacy.loss_pair(mechanism))
    assert sum(real.values()) == pytest.approx(1) and sum(other.values()) == pytest.approx(1)
    epsilon = privacy.compose([mechanism] * 2, 1e-2)
    exact_delta = sum(
        max(0, real[a] * real[b] - math.exp(epsilon) * other[a] * other[b]) for a in real for b in real
    )
    assert exact_delta <= 1e-2 + 1e-6 and epsilon <= 2.0


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="1 <= m <= n"):
        privacy.subset(6, 7, 1.0)
    with pytest.raises(ValueError, match="for n = 3"):
        privacy.choose(parse(PROMPT), privacy.enumerate_all(3))
    with pytest.raises(ValueError, match="sampled_audit"):
        privacy.channel(privacy.subset(30, 10, 1.0))


def test_tables_have_their_columns_and_agree_with_the_mechanisms():
    rows = privacy.cost_table()
    full = next(row for row in rows if row["mechanism"] == "enumerate_all" and row["n"] == 30)
    assert full["posterior"] == pytest.approx(1 / 30) and full["download_kb"] == 32 * 30 and full["server_share"] == 1
    assert all(row["posterior"] <= math.exp(row["epsilon"]) / row["n"] + 1e-9 for row in rows if row["epsilon"] < 50)
    repeats = privacy.repeats_table(times=(1, 10))
    assert repeats[1]["sum_epsilon"] == 10 and repeats[1]["epsilon_at_delta"] < 10
    assert repeats[1]["memoised_epsilon"] == 1
    after = privacy.posterior_table(6, SKEWED, [privacy.enumerate_all(6), privacy.subset(6, 2, 1.0)])
    assert all(row["prior"] == row["posterior"] for row in after[:6])
    assert sum(row["posterior"] for row in after[6:]) == pytest.approx(1)


# ------------------------------------------------------------------------------- what is optional, and how it is missed

PYPROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PYPROJECT["project"]["optional-dependencies"]


def test_extras_are_exact_pins_and_never_installed_by_default():
    assert all(re.fullmatch(r"[a-z-]+==[\d.]+", pin) for pins in EXTRAS.values() for pin in pins)
    assert "dependencies" not in PYPROJECT["project"]
    default = (Path(__file__).parent.parent / "requirements.txt").read_text(encoding="utf-8")
    assert not [pin for pins in EXTRAS.values() for pin in pins if pin.split("==")[0] in default]


def test_a_detector_that_is_not_installed_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(prompts.PromptError, match="not installed") as refusal:
        prompts.presidio()
    (extra,) = re.findall(r"pip install -e '\.\[(\w+)\]'", str(refusal.value))
    assert extra in EXTRAS


@pytest.mark.parametrize("error", [OSError("no network"), SystemExit(1)])
def test_a_language_model_that_cannot_be_reached_is_a_sentence(monkeypatch, error):
    def engine():
        raise error

    monkeypatch.setitem(sys.modules, "presidio_analyzer", SimpleNamespace(AnalyzerEngine=engine))
    with pytest.raises(prompts.PromptError, match="cannot be loaded or reached: python -m spacy download"):
        prompts.presidio()


def test_an_installed_detector_asks_about_what_it_finds(monkeypatch):
    entity = SimpleNamespace(entity_type="NRP", start=2, end=9)
    engine = SimpleNamespace(analyze=lambda text, language, entities: [entity])
    monkeypatch.setitem(sys.modules, "presidio_analyzer", SimpleNamespace(AnalyzerEngine=lambda: engine))
    with pytest.raises(prompts.Question, match="martian"):
        parse("a martian woman", detectors=(prompts.presidio(),))


@pytest.mark.parametrize("what", ["no folder", "empty folder", "no model in it", "hub id out of reach"])
def test_a_token_classifier_that_cannot_be_reached_is_a_sentence(tmp_path, monkeypatch, what):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if what == "no model in it":
        (tmp_path / "config.json").write_text('{"model_type": "distilbert"}', encoding="utf-8")
    name = {"no folder": str(tmp_path / "none"), "hub id out of reach": "nobody/no-such-model"}.get(what, str(tmp_path))
    with pytest.raises(prompts.PromptError, match="give a folder that holds one, or a hub id"):
        prompts.token_classifier(name, {"AGE": "age"})
