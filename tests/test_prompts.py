"""Free text becomes a template whose candidates are the same whichever of them was typed."""

from __future__ import annotations

import hashlib
import itertools
import re
import tomllib

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from obclip_core import prompts
from obclip_core.audit import corpus
from obclip_core.prompts import (
    ATTRIBUTES,
    DATA,
    Prompt,
    PromptError,
    Question,
    Slot,
    candidate_values,
    candidates,
    fill,
    parse,
    real_index,
)

READS = [
    ("an elderly Asian lady in her coat, she smiles", "{a} {age} {ethnicity} {man} in {his} coat, {he} smiles", 30),
    ("an 18-year-old girl", "{a} {age} {man}", 6),
    ("a woman in her 60s with a kite", "{a} {age} {man} with a kite", 6),
    ("a man aged 70", "{a} {age} {man}", 6),
    ("a doctor in her sixties", "{a} {age} {male} doctor", 6),
    ("asian elderly woman", "{age} {ethnicity} {man}", 30),
    ("the actress bows", "the {actor} bows", 2),
    ("children playing", "{age} people playing", 3),
    ("two young women", "two {age} {men}", 6),
    ("look at him", "look at {him}", 2),
    ("the hat is hers", "the hat is {hers}", 2),
    ("she sees herself", "{he} sees {himself}", 2),
    ("a man and a woman", "{a} {man} and {a} {man2}", 4),
    ("an old car", "an old car", 1),
    ("a white woman in a white coat", "{a} {ethnicity} {man} in a white coat", 10),
    ("a bowl of plums", "a bowl of plums", 1),
    ("young asian woman", "{age} {ethnicity} {man}", 30),
    ("an old male european", "{a} {age} {ethnicity} {man}", 30),
    ("A  WOMAN ,  alone", "{a} {man}, alone", 2),
    ("\u200fan old m\u200ban", "{a} {age} {man}", 6),
    ("a wom\u0430n", "{a} {man}", 2),
    ("a ｗｏｍａｎ", "{a} {man}", 2),
]


@pytest.mark.parametrize("text,template,n", READS, ids=[row[0] for row in READS])
def test_reads_text_as_template(text, template, n):
    prompt = parse(text)
    assert (prompt.template, len(candidates(prompt))) == (template, n)
    assert candidates(prompt)[real_index(prompt)] == prompt.text


REFUSED = [
    ("", "no words"),
    ("  \n ", "no words"),
    ("?!", "no words"),
    ("word " * 10_000, "at most 300"),
    ("a wom\x07an", "control character U\\+0007"),
    ("une vieille femme avec un chien", "not to be English"),
    ("старая женщина", "Latin letters"),
    ("老人", "Latin letters"),
    ("\U0001f469 by the sea", "picture"),
    ("a w o m a n", "spells out letters"),
    ("a young old man", "contradict"),
    ("a boy, 70 years old", "contradict"),
    ("a Mexican woman", "outside the ethnicities"),
    ("an old asian woman, a young indian man and an old african woman", "too many to check"),
    (None, "is text"),
]


@pytest.mark.parametrize("text,message", REFUSED, ids=[str(row[1]) for row in REFUSED])
def test_refuses_with_a_clear_sentence(text, message):
    with pytest.raises(PromptError, match=message):
        parse(text)


@pytest.mark.parametrize("text,word", [("a womam", "woman"), ("an asain man", "asian"), ("a wo-man", "woman")])
def test_a_likely_misspelling_is_a_question(text, word):
    with pytest.raises(Question, match=word):
        parse(text)


def test_a_confirmed_word_and_ordinary_words_are_no_questions():
    assert parse("a statue of womam", keep=["womam"]).count == 1
    assert parse("cold gold, bold mold, then a hen").count == 1


def test_the_limit_is_named_with_its_reason():
    prompt = parse("a young asian man and an old woman")
    assert prompt.count == 180
    with pytest.raises(PromptError, match="180 candidates .*limit is 100"):
        candidates(prompt)


def test_only_protected_attributes_vary():
    prompt = parse("an elderly asian lady", protect=("gender",))
    assert candidates(prompt) == ("an old asian man", "an old asian woman")
    with pytest.raises(PromptError, match="cannot protect 'height'"):
        parse("a man", protect=("height",))


def test_candidates_are_in_canonical_order():
    prompt = parse("a young asian woman")
    expected = tuple(dict(zip(ATTRIBUTES, row, strict=True)) for row in itertools.product(*ATTRIBUTES.values()))
    assert candidate_values(prompt) == expected
    assert candidates(prompt)[:2] == ("a young caucasian man", "a young african man")
    assert candidates(prompt)[-1] == "an old european woman"


def test_cues_are_noted_neutralised_or_refused():
    text = "a man with a beard"
    assert [(n.kind, n.words) for n in parse(text).notes] == [("cue", "beard")]
    assert parse(text, cues="neutralise").text == "a man with a chin"
    with pytest.raises(PromptError, match="beard"):
        parse(text, cues="refuse")
    assert not parse(text, protect=("ethnicity",)).notes


def test_an_extra_detector_asks_about_what_the_rules_left():
    finds = lambda text: [("ethnicity", "martian")] if "martian" in text else []  # noqa: E731
    with pytest.raises(Question, match="martian"):
        parse("a martian woman", detectors=(finds,))
    assert parse("a martian woman", detectors=(finds,), keep=["martian"]).count == 2


def test_unreachable_detectors_say_so():
    with pytest.raises(PromptError, match="not installed"):
        prompts.presidio()
    with pytest.raises(PromptError, match="cannot be loaded"):
        prompts.token_classifier("/no/such/folder", {"AGE": "age"})


def test_types_refuse_what_they_cannot_mean():
    with pytest.raises(PromptError, match="a slot is"):
        Slot("height")
    with pytest.raises(PromptError, match="cannot be 'tall'"):
        Prompt((Slot("age"),), (("age", "tall"),))
    with pytest.raises(PromptError, match="same attributes"):
        Prompt((Slot("age"),), ())


# ------------------------------------------------------------------------------------------------------------- closure


def assert_closed(text: str, others: int | None = None) -> int:
    """Every candidate (or the first `others`) leads to the same candidates, byte for byte."""
    prompt = parse(text)
    own = tuple(c.encode() for c in candidates(prompt, limit=200))
    for candidate in candidates(prompt, limit=200)[:others]:
        assert tuple(c.encode() for c in candidates(parse(candidate), limit=200)) == own, candidate
    assert len(set(own)) == prompt.count
    return prompt.count


def test_orbits_of_the_corpus_are_closed():
    texts, refused = corpus(), 0
    assert len(texts) >= 500 and len(set(texts)) == len(texts)
    for text in texts:
        try:
            assert_closed(text)
        except PromptError:
            refused += 1
    assert refused <= 3  # nothing is sent for these


ADJECTIVES = ["", "young", "old", "elderly", "middle-aged", "smiling", "teenage", "70-year-old", "old, tired"]
ORIGINS = ["", "asian", "African", "Indian", "French", "white", "black", "Chinese", "caucasian"]
NOUNS = ["woman", "man", "lady", "boy", "grandmother", "actress", "child", "doctor", "females", "king", "person"]
TAILS = ["", " in her garden", " and his dog", ", 34,", " aged 61", " in his 40s", " who looks old", ", she smiles"]
FRAMES = ["{}", "a {}", "an {} by the sea", "The {} reads.", "portrait of a {}, ink", "old house, a {}"]
MORE = ["", " The woman waves.", " with a young man", ", his hat", " and him", ", oil on canvas", ". He hums"]


@settings(max_examples=2000, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(*(st.sampled_from(x) for x in (ADJECTIVES, ORIGINS, NOUNS, TAILS, FRAMES, MORE)), st.integers(0, 200))
def test_orbits_of_generated_prompts_are_closed(adjective, origin, noun, tail, frame, more, pick):
    text = frame.format(" ".join(f"{adjective} {origin} {noun}".split()) + tail) + more
    try:
        prompt = parse(text)
    except PromptError:
        reject()  # nothing is sent
    texts = tuple(prompts.render(prompt.pieces, values) for values in candidate_values(prompt))
    again = parse(texts[pick % len(texts)])
    assert tuple(prompts.render(again.pieces, values) for values in candidate_values(again)) == texts


GENDERS = [("man", "woman"), ("men", "women"), ("male", "female"), ("he", "she"), ("his", "her"), ("him", "her")]
GENDERS += [("his", "hers"), ("himself", "herself")]


def brute_force(text: str, slots: dict[str, str], chosen: dict[str, str]) -> set[str]:
    """All texts that somebody with a list of words and no grammar could mean by changing `slots` to `chosen`."""
    options: list[list[str]] = []
    for token in re.findall(r"[a-z]+(?:-[a-z]+)?|[^a-z]+", text):
        changed = [token]
        for attribute in ("age", "ethnicity"):
            if token == slots.get(attribute):
                changed = [chosen[attribute]]
        side = ["male", "female"].index(slots["gender"]) if "gender" in slots else None
        pairs = [pair for pair in GENDERS if side is not None and pair[side] == token]
        if pairs:
            changed = [pair[["male", "female"].index(chosen["gender"])] for pair in pairs]
        options.append(changed)
    known = "|".join([*itertools.chain(*ATTRIBUTES.values()), *itertools.chain(*GENDERS)])
    vowel = lambda m: "an" if m.group(1)[0] in "aeiou" and m.group(1) != "european" else "a"  # noqa: E731
    return {re.sub(rf"\ban?(?= ({known})\b)", vowel, "".join(words)) for words in itertools.product(*options)}


def test_candidates_agree_with_brute_force():
    compared = 0
    for text in corpus():
        try:
            prompt = parse(text)
        except PromptError:
            continue
        forms = {p.form for p in prompt.pieces if isinstance(p, Slot)}
        plain = forms <= {"a", "age", "ethnicity"} | {pair[0] for pair in GENDERS} | {"hers"}
        literal = set(prompts.literal_words(prompt)) & set(itertools.chain(*GENDERS, *ATTRIBUTES.values()))
        if not plain or literal or any("." in key for key, _ in prompt.values) or "middle" in str(prompt.pieces):
            continue
        values = dict(prompt.values)
        for candidate, chosen in zip(candidates(prompt), candidate_values(prompt), strict=True):
            assert candidate in brute_force(prompt.text, values, chosen)
        compared += 1
    assert compared >= 350


def test_parse_reads_back_what_fill_wrote():
    data = tomllib.loads((DATA / "portraits.toml").read_text(encoding="utf-8"))
    context = {name: words[0] for name, words in data["context"].items()}
    templates = [t for group in data["templates"].values() for t in group]
    assert templates
    for template in templates:
        slots = set(re.findall(r"\{(\w+)\}", template))
        gendered = {"gender"} if slots & set(prompts.lexicon().gendered) else set()
        used = [a for a in ATTRIBUTES if a in slots | gendered]
        for chosen in itertools.product(*(ATTRIBUTES[a] for a in used)):
            values = dict(zip(used, chosen, strict=True))
            text = fill(template, values | context)
            prompt = parse(text)
            assert dict(prompt.values) == values and prompt.text == text, text


def test_fill_names_what_is_missing():
    assert fill("{a} {age} {man} in {a} {colour} hat", {"age": "old", "gender": "female", "colour": "red"}) == (
        "an old woman in a red hat"
    )
    with pytest.raises(PromptError, match="wants {garment}"):
        fill("a {garment}", {})
    with pytest.raises(PromptError, match="no value for gender"):
        fill("{man}", {"age": "old"})


# ------------------------------------------------------------------------------------------------------------ detector

FROZEN = {
    "detector_held_out.txt": "dadc2f4bac536c7aef7c32779c500080c6ebac241a2db56efc548f2000b98eb2",
    "detector_set.txt": "d68138deb3959ef9e28d4ff9856c3287212b968aa73d579045141d537d458257",
}


@pytest.mark.parametrize("name", FROZEN)
def test_labelled_sets_are_frozen(name):
    assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == FROZEN[name]


def test_detector_recall_on_the_held_out_prompts():
    rows = {row["measure"]: row for row in prompts.detector_table(("held-out",))}
    assert rows["recall"]["n"] >= 300 and rows["recall"]["low"] >= 0.97
    assert rows["precision"]["share"] > 0.97


def test_a_missed_mention_is_counted_as_missed():
    row = prompts.Labelled("x", "a swain and a woman", (("swain", ("male",)), ("woman", ("female",))))
    assert prompts.missed_mentions(row) == ([("swain", "male")], "read")


@pytest.mark.parametrize("hits,n,low,high", [(0, 10, 0.0, 0.3085), (10, 10, 0.6915, 1.0), (5, 10, 0.1871, 0.8129)])
def test_clopper_pearson_bounds(hits, n, low, high):
    assert prompts.clopper_pearson(hits, n) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
