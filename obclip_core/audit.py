"""Attacks on, and exact checks of, what the cloud sees: the bytes, not the idea.

A transcript is everything that leaves the device in one request: a tuple of messages in order, each the envelope that
travels (`envelope`). The number of calls, retries among them, and their sizes are part of it; what the cloud answers
follows from what it was sent. A client turns the text that a user typed into a distribution of transcripts
(transcript -> probability). The cloud can tell two texts apart as far as their distributions differ:

    advantage = max over pairs of the total variation distance      (0: nobody can do better than guessing)
    epsilon   = max over pairs and transcripts of the log ratio      (must not exceed what the mechanism promises)

Both are computed, not estimated, where the distributions can be written out; `sampled_audit` bounds them where not.
"""

from __future__ import annotations

import hashlib
import json
import math
import random as random_module
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random

import numpy as np

from . import privacy
from .accelerate import Schedule
from .messages import Offer, Split
from .privacy import Mechanism, Offered
from .prompts import (
    ATTRIBUTES,
    DATA,
    Prompt,
    Slot,
    attribute_of,
    candidate_values,
    candidates,
    clopper_pearson,
    cue_table,
    detector_table,
    parse,
    real_index,
    render,
)
from .service import wire

Transcript = tuple[bytes, ...]
Client = Callable[[str], Mapping[Transcript, float]]
Serialise = Callable[[Mapping], bytes]
OFFERED = frozenset(Offer.__dataclass_fields__)
SPLIT = asdict(Split())


def offer_fields(
    texts: Sequence[str], seed: int = 0, split: Mapping = SPLIT, acceleration: Mapping | None = None
) -> dict:
    """The fields of an offer as plain data; there is no field for the real one."""
    return {"candidates": list(texts), "seed": seed, "split": dict(split), "acceleration": acceleration}


def canonical_json(fields: Mapping) -> bytes:
    """Fields without an envelope: JSON with sorted keys."""
    return json.dumps(fields, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()


def envelope(fields: Mapping) -> bytes:
    """The bytes that travel: `wire.pack_offer` of an offer's fields, and behind it what else is sent (a mutant's header
    or second request) as JSON; ValueError where the offer's fields make no Offer."""
    own = {name: value for name, value in fields.items() if name in OFFERED}
    beside = {name: value for name, value in fields.items() if name not in OFFERED}
    return (_packed(**own) if own else b"") + (canonical_json(beside) if beside else b"")


def _packed(candidates: Sequence[str], seed: int, split: Mapping, acceleration: Mapping | None) -> bytes:
    schedule = None if acceleration is None else Schedule.from_dict(acceleration)
    return wire.pack_offer(Offer(tuple(candidates), seed, Split(**split), schedule))


def honest_client(
    mechanism: Callable[[int], Mechanism] = privacy.enumerate_all,
    serialise: Serialise = envelope,
    protect: Iterable[str] = tuple(ATTRIBUTES),
) -> Client:
    """The client as it should be: parse, choose, send one serialised offer; mechanism makes a Mechanism for n."""

    def client(text: str) -> dict[Transcript, float]:
        prompt = parse(text, protect)
        texts, chosen = candidates(prompt), mechanism(prompt.count)
        offers = chosen.distribution(real_index(prompt))
        return {(serialise(offer_fields([texts[i] for i in offer])),): p for offer, p in offers.items()}

    return client


# -------------------------------------------------------------------------------------------------------------- audits


@dataclass(frozen=True)
class Audit:
    """What an audit found: the best distinguisher's advantage, the epsilon of the transcripts, what was promised, and
    the pair of texts that differ most."""

    texts: int
    transcripts: int
    advantage: float
    epsilon: float
    promised: float
    worst: tuple[str, str]

    @property
    def holds(self) -> bool:
        """Whether the transcripts keep the promise."""
        return self.epsilon <= self.promised + 1e-9


def spellings(prompt: Prompt) -> tuple[str, ...]:
    """Texts that users could type for the prompt's candidates: each canonical text, and the same with a trailing
    space, capitals, a wrong article, an invisible character, and other words for its values."""
    texts = []
    for text in candidates(prompt):
        other = text
        for word, synonym in (("old", "elderly"), ("woman", "lady"), ("man", "gentleman"), ("african", "kenyan")):
            other = " ".join(synonym if token == word else token for token in other.split(" "))
        swapped = {"a": "an", "an": "a"}
        articles = " ".join(swapped.get(token, token) for token in text.split(" "))
        variants = (text, text + " ", text.upper(), "\u200b" + text, articles, other)
        texts += [variant for variant in dict.fromkeys(variants) if _same(variant, text)]
    return tuple(texts)


def _same(variant: str, text: str) -> bool:
    try:
        return parse(variant).text == text
    except ValueError:
        return False


def exact_audit(client: Client, texts: Sequence[str], promised: float = 0.0) -> Audit:
    """Compare the transcripts' distributions of all texts pairwise. texts are the candidates of one prompt, and
    spellings of them: with promised = 0 the cloud must not be able to tell any of them from any other."""
    rows = [client(text) for text in texts]
    seen = sorted(set().union(*rows))
    where = {transcript: j for j, transcript in enumerate(seen)}
    matrix = np.zeros((len(texts), len(seen)))
    for i, row in enumerate(rows):
        for transcript, p in row.items():
            matrix[i, where[transcript]] += p
    distances = np.stack([np.abs(row[None] - matrix).sum(axis=1) / 2 for row in matrix])
    i, j = np.unravel_index(np.argmax(distances), distances.shape)
    epsilon = privacy.exact_epsilon(matrix)
    return Audit(len(texts), len(seen), float(distances.max()), epsilon, promised, (texts[i], texts[j]))


def contains(first: str, second: str) -> Callable[[Transcript], Hashable]:
    """The feature that tells two candidates apart under a subset mechanism: which of the two texts were sent."""

    def bare(text: bytes) -> bytes:
        return text.replace(b"\\", b"")  # an envelope quotes its JSON once more

    quoted = [bare(json.dumps(text).encode()) for text in (first, second)]
    return lambda transcript: tuple(any(text in bare(message) for message in transcript) for text in quoted)


def sampled_audit(
    draw: Callable[[str, Random], Transcript],
    first: str,
    second: str,
    trials: int = 20_000,
    seed: int = 0,
    feature: Callable[[Transcript], Hashable] | None = None,
    confidence: float = 0.95,
) -> dict:
    """Tell two texts apart from sampled transcripts. Half of the trials choose the event that separates them best, the
    other half measure it. Returns a row (trials, epsilon, epsilon_low, advantage, advantage_low): low are confidence
    bounds by Clopper-Pearson; a client that keeps epsilon has epsilon_low <= epsilon with that confidence."""
    feature = feature or contains(first, second)
    random = random_module.Random(seed)
    halves = [[[feature(draw(text, random)) for _ in range(trials // 2)] for text in (first, second)] for _ in range(2)]
    learn, test = halves
    counts = [{event: side.count(event) for event in set(side)} for side in learn]
    ratios = {e: (counts[0].get(e, 0) + 1) / (counts[1].get(e, 0) + 1) for e in set(counts[0]) | set(counts[1])}
    likely = {event for event, ratio in ratios.items() if ratio > 1}
    sharpest = {max(ratios, key=ratios.get)}
    n = trials // 2

    def shares(event: set) -> list[tuple[float, float, float]]:
        hits = [sum(1 for seen in side if seen in event) for side in test]
        return [(h / n, *clopper_pearson(h, n, confidence)) for h in hits]

    (p, p_low, _), (q, _, q_high) = shares(sharpest)
    (a, a_low, _), (b, _, b_high) = shares(likely)
    return {
        "trials": trials,
        "epsilon": math.log(p / q) if p and q else math.inf if p else 0.0,
        "epsilon_low": max(0.0, math.log(p_low / q_high)) if p_low else 0.0,
        "advantage": a - b,
        "advantage_low": max(0.0, a_low - b_high),
    }


def drawing_client(mechanism: Mechanism, serialise: Serialise = envelope) -> Callable[[str, Random], Transcript]:
    """A client for `sampled_audit`: one transcript of a text, drawn with the given randomness."""
    known: dict[str, tuple[tuple[str, ...], int]] = {}

    def draw(text: str, random: Random) -> Transcript:
        if text not in known:
            prompt = parse(text)
            known[text] = candidates(prompt), real_index(prompt)
        texts, real = known[text]
        return (serialise(offer_fields([texts[i] for i in mechanism.draw(real, random)])),)

    return draw


# ------------------------------------------------------------------------------------------------------------- attacks


def guess_by_position(mechanism: Mechanism) -> float:
    """How often the best fixed place in the list is the real one, under a uniform prior."""
    places: dict[int, float] = {}
    for real in range(mechanism.n):
        for offer, p in mechanism.distribution(real).items():
            if real in offer:
                place = offer.index(real)
                places[place] = places.get(place, 0.0) + p / mechanism.n
    return max(places.values(), default=0.0)


def guess_by_prior(mechanism: Mechanism, prior: Sequence[float]) -> float:
    """How often the Bayes guess is right when the population is `prior`."""
    return privacy.success(privacy.channel(mechanism)[1], prior)


def posterior_bound(prior: Sequence[float], epsilon: float) -> float:
    """The most that an epsilon-LDP offer can make the likeliest candidate: p e^eps / (p e^eps + 1 - p)."""
    p = max(prior)
    return 1.0 if math.isinf(epsilon) else p / (p + (1 - p) * math.exp(-epsilon))


def guess_by_intersection(
    mechanism: Mechanism, times: int, trials: int = 2000, memoised: bool = False, seed: int = 0
) -> tuple[int, int]:
    """(hits, trials) of guessing from t answers to one prompt: the candidate that was offered most often (for
    subset mechanisms that is the likeliest one). Memoised answers are all the same and add nothing."""
    random, hits = random_module.Random(seed), 0
    for _ in range(trials):
        real = random.randrange(mechanism.n)
        counts = [0] * mechanism.n
        answers = 1 if memoised else times
        for _ in range(answers):
            for i in mechanism.draw(real, random):
                counts[i] += 1
        most = max(counts)
        hits += random.choice([i for i, c in enumerate(counts) if c == most]) == real
    return hits, trials


def cue_prior(values: Sequence[Mapping[str, str]], reveals: Mapping[str, Sequence[str]], strength: float) -> np.ndarray:
    """The prior of somebody who has read a cue: for each attribute it reveals, its likely values share `strength`."""
    weights = np.ones(len(values))
    for i, row in enumerate(values):
        for key, value in row.items():
            likely = reveals.get(attribute_of(key))
            if likely:
                rest = len(ATTRIBUTES[attribute_of(key)]) - len(likely)
                weights[i] *= strength / len(likely) if value in likely else (1 - strength) / max(rest, 1)
    return weights / weights.sum()


def publication_attack(candidate_features: np.ndarray, published: np.ndarray) -> int:
    """Which of N candidates a published picture came from, as the cloud would guess: the nearest one.

    candidate_features (N, ...) are what the cloud has or can make: its latents at step k, image features of them, or
    features of the pictures it gets by finishing all of them itself; published (...) is the same kind of array of the
    published picture. Distance: Euclidean.
    """
    candidate_features, published = np.asarray(candidate_features, float), np.asarray(published, float)
    if candidate_features.shape[1:] != published.shape:
        raise ValueError(f"features of shape {candidate_features.shape[1:]} against a published {published.shape}")
    squares = (candidate_features - published[None]) ** 2
    return int(np.argmin(squares.reshape(len(squares), -1).sum(axis=1)))


def publication_row(guesses: Sequence[int], reals: Sequence[int], candidates: int, k: int, features: str) -> dict:
    """A row of the attack table from many runs of `publication_attack`; no mechanism bounds it."""
    hits = sum(g == r for g, r in zip(guesses, reals, strict=True))
    return _row("enumerate_all", f"publication ({features}, k={k})", candidates, hits, len(reals), bound=1.0)


def _row(mechanism: str, attack: str, n: int, hits: float, trials: int | None, bound: float) -> dict:
    """A row of attacks.csv; without trials, hits is an exact success and so are its bounds."""
    success = hits if trials is None else hits / trials
    low, high = (success, success) if trials is None else clopper_pearson(int(hits), trials)
    row = {"mechanism": mechanism, "attack": attack, "candidates": n, "success": float(success)}
    return row | {"low": float(low), "high": float(high), "bound": float(bound)}


def skewed(n: int) -> np.ndarray:
    """A population in which candidate i is twice as frequent as candidate i + 2: for the attack by prior."""
    weights = 0.5 ** (np.arange(n) / 2)
    return weights / weights.sum()


def standard_mechanisms(prompt: Prompt, epsilons: Sequence[float] = (1.0, 4.0, 16.0)) -> list[Mechanism]:
    """The mechanisms of the attack table for a prompt: what reveals everything, the paper's, subsets, words."""
    n, values = prompt.count, candidate_values(prompt)
    genders = [value.get("gender", "") for value in values]
    groups = [sorted(set(genders)).index(gender) for gender in genders]
    distances = privacy.word_distances(values)
    m = max(1, n // 6)
    return [
        privacy.plain(n),
        privacy.random_replacement(n),
        privacy.enumerate_all(n),
        privacy.enumerate_some(groups),
        *(privacy.subset(n, m, epsilon) for epsilon in (0.5, 1.0, 2.0, 4.0)),
        privacy.truth_plus_others(n, m),
        *(privacy.santext(distances, epsilon) for epsilon in epsilons),
        *(privacy.cape(distances, np.zeros(n), epsilon) for epsilon in epsilons),
    ]


def attack_table(
    text: str = "an old asian woman smiling by the sea",
    mechanisms: Sequence[Mechanism] | None = None,
    repeats: Sequence[int] = (5, 20),
    trials: int = 1000,
    cue: str = "beard",
    cue_strength: float = 0.9,
) -> list[dict]:
    """Rows of attacks.csv (mechanism, attack, candidates, success, low, high, bound) for one prompt.

    success is how often the attack names the real candidate; exact where low = high. bound is what the mechanism
    promises against this attack: the prior's maximum for full enumeration, posterior_bound for an epsilon, 1 for no
    promise. The attack by publication needs pictures and is added by `publication_row`.
    """
    prompt = parse(text)
    n, uniform, values = prompt.count, np.full(prompt.count, 1 / prompt.count), candidate_values(prompt)
    priors = {"prior (uniform)": uniform, "prior (skewed)": skewed(n)}
    priors[f"cue ({cue})"] = cue_prior(values, cue_table()[cue][0], cue_strength)
    missed = next(row for row in detector_table(("held-out",)) if row["measure"] == "prompts without a miss")
    rows = []
    for mechanism in mechanisms if mechanisms is not None else standard_mechanisms(prompt):
        name, epsilon = mechanism.name, mechanism.epsilon
        exact = mechanism.distribution is not None
        if exact:
            bound = posterior_bound(uniform, epsilon)
            rows.append(_row(name, "position", n, guess_by_position(mechanism), None, bound))
            for attack, prior in priors.items():
                bound = posterior_bound(prior, epsilon)
                rows.append(_row(name, attack, n, guess_by_prior(mechanism, prior), None, bound))
        for t in repeats:
            hits, done = guess_by_intersection(mechanism, t, trials)
            rows.append(_row(name, f"intersection ({t} fresh)", n, hits, done, posterior_bound(uniform, t * epsilon)))
        if name.startswith("subset"):
            hits, done = guess_by_intersection(mechanism, repeats[-1], trials, memoised=True)
            attack = f"intersection ({repeats[-1]} memoised)"
            rows.append(_row(name, attack, n, hits, done, posterior_bound(uniform, epsilon)))
        if name == "enumerate_all":  # a missed word names the value for certain; the rest is guessed
            share, low, high = (m + (1 - m) / n for m in (1 - missed[key] for key in ("share", "high", "low")))
            row = _row(name, "detector miss", n, share, None, 1.0)
            rows.append(row | {"low": low, "high": high})
    return rows


def utility_table(
    text: str = "an old asian woman smiling by the sea", epsilons: Sequence[float] = (1, 4, 16)
) -> list[dict]:
    """Rows (mechanism, epsilon, success, attribute, match): privacy (the Bayes guess under a uniform prior) against how
    often the text that the picture is finished from states the real value of an attribute. Exact, over the lexicon;
    what pictures show is measured on a world."""
    prompt = parse(text)
    values, n = candidate_values(prompt), prompt.count
    rows = []
    for mechanism in standard_mechanisms(prompt, epsilons):
        if mechanism.distribution is None:
            continue
        matches = dict.fromkeys(prompt.enumerated, 0.0)
        for real in range(n):
            for offer, p in mechanism.distribution(real).items():
                used = _used(values, real, offer)
                for key in matches:
                    matches[key] += p / n * (values[used][key] == values[real][key])
        success = guess_by_prior(mechanism, np.full(n, 1 / n))
        for key, match in matches.items():
            row = {"mechanism": mechanism.name, "epsilon": mechanism.epsilon, "success": success}
            rows.append(row | {"attribute": key, "match": match})
    return rows


def _used(values: Sequence[Mapping[str, str]], real: int, offer: Offered) -> int:
    """The candidate whose latent the device finishes."""
    return real if real in offer else offer[0] if len(offer) == 1 else privacy.nearest(values, real, offer)


# ------------------------------------------------------------------------------------------------------------- mutants

Messages = list[tuple[float, list[dict]]]  # (probability, the messages' fields)
MUTANT_PROMPT = "an old woman in her garden"


def _all(prompt: Prompt) -> dict:
    return offer_fields(candidates(prompt))


def _real_first(text: str, prompt: Prompt) -> Messages:
    fields = _all(prompt)
    return [(1.0, [fields | {"candidates": sorted(fields["candidates"], key=lambda c: c != prompt.text)}])]


def _ordered_by_similarity(text: str, prompt: Prompt) -> Messages:
    distances = privacy.word_distances(candidate_values(prompt))[real_index(prompt)]
    texts = candidates(prompt)
    return [(1.0, [offer_fields([texts[i] for i in np.argsort(distances, kind="stable")])])]


def _real_as_pivot(text: str, prompt: Prompt) -> Messages:
    schedule = Schedule(reuse=(0, 1, 2), pivot=real_index(prompt))
    return [(1.0, [_all(prompt) | {"acceleration": schedule.to_dict()}])]


def _spelling_kept(text: str, prompt: Prompt) -> Messages:
    return [(1.0, [offer_fields([text.strip() if c == prompt.text else c for c in candidates(prompt)])])]


def _trailing_space(text: str, prompt: Prompt) -> Messages:
    tail = text[len(text.rstrip()) :]
    return [(1.0, [offer_fields([c + tail if c == prompt.text else c for c in candidates(prompt)])])]


def _seed_from_prompt(text: str, prompt: Prompt) -> Messages:
    seed = int.from_bytes(hashlib.sha256(prompt.text.encode()).digest()[:4], "big")
    return [(1.0, [_all(prompt) | {"seed": seed}])]


def _retry_on_a_miss(text: str, prompt: Prompt) -> Messages:
    mechanism, texts, real = _small(prompt), candidates(prompt), real_index(prompt)
    out = []
    for offer, p in mechanism.distribution(real).items():
        once = offer_fields([texts[i] for i in offer])
        out.append((p, [once] if real in offer else [once, _all(prompt)]))
    return out


def _real_first_in_subset(text: str, prompt: Prompt) -> Messages:
    mechanism, texts, real = _small(prompt), candidates(prompt), real_index(prompt)
    offers = mechanism.distribution(real).items()
    return [(p, [offer_fields([texts[i] for i in sorted(offer, key=lambda i: i != real)])]) for offer, p in offers]


def _small(prompt: Prompt) -> Mechanism:
    return privacy.subset(prompt.count, 2, 1.0)


def _frozen(prompt: Prompt, frozen: Callable[[Slot], bool]) -> list[str]:
    """Candidates in which some slots keep the real prompt's words."""
    real = dict(prompt.values)
    slots = {piece for piece in prompt.pieces if isinstance(piece, Slot) and piece.key and frozen(piece)}
    own = [render([piece], real) if piece in slots else piece for piece in prompt.pieces]
    return [render(own, values) for values in candidate_values(prompt)]


def _article_kept(text: str, prompt: Prompt) -> Messages:
    words = prompt.text.split(" ")
    kept = next(word for word in words if word in ("a", "an"))
    texts = [" ".join(kept if word in ("a", "an") else word for word in c.split(" ")) for c in candidates(prompt)]
    return [(1.0, [offer_fields(texts)])]


def _pronoun_kept(text: str, prompt: Prompt) -> Messages:
    return [(1.0, [offer_fields(_frozen(prompt, lambda slot: slot.form in ("he", "his", "him", "hers", "himself")))])]


def _batch_by_secret(text: str, prompt: Prompt) -> Messages:
    texts, size = candidates(prompt), real_index(prompt) + 1
    return [(1.0, [offer_fields(texts[i : i + size]) for i in range(0, len(texts), size)])]


def _early_stop(text: str, prompt: Prompt) -> Messages:
    k = 5 if dict(prompt.values).get("age") == "old" else 10
    return [(1.0, [_all(prompt) | {"split": SPLIT | {"k": k}}])]


def _cache_keyed_by_real(text: str, prompt: Prompt) -> Messages:
    return [(1.0, [_all(prompt) | {"cache": hashlib.sha256(prompt.text.encode()).hexdigest()}])]


def _fetches_its_own(text: str, prompt: Prompt) -> Messages:
    return [(1.0, [_all(prompt), {"fetch": real_index(prompt)}])]


def _implausible_dropped(text: str, prompt: Prompt) -> Messages:
    near = privacy.word_distances(candidate_values(prompt))[real_index(prompt)] < 1
    return [(1.0, [offer_fields([c for c, keep in zip(candidates(prompt), near, strict=True) if keep])])]


def _request_id_from_text(text: str, prompt: Prompt) -> Messages:
    return [(1.0, [_all(prompt) | {"request": hashlib.md5(text.encode()).hexdigest()}])]


def _padded_to_typed_length(text: str, prompt: Prompt) -> Messages:
    return [(1.0, [_all(prompt) | {"padding": " " * len(text)}])]


def _cached_answer_not_asked_again(text: str, prompt: Prompt) -> Messages:
    return [(1.0, [] if real_index(prompt) == 0 else [_all(prompt)])]


MUTANTS: Mapping[str, tuple[Callable[[str, Prompt], Messages], float]] = {
    "real one first": (_real_first, 0.0),
    "order by similarity to the real one": (_ordered_by_similarity, 0.0),
    "pivot is the real one": (_real_as_pivot, 0.0),
    "real one's exact spelling kept": (_spelling_kept, 0.0),
    "trailing space kept": (_trailing_space, 0.0),
    "seed from the prompt": (_seed_from_prompt, 0.0),
    "retry only on a miss": (_retry_on_a_miss, 1.0),
    "real one first in a subset": (_real_first_in_subset, 1.0),
    "a/an kept": (_article_kept, 0.0),
    "his/her kept": (_pronoun_kept, 0.0),
    "batch size by secret": (_batch_by_secret, 0.0),
    "early stop": (_early_stop, 0.0),
    "cache keyed by the real one": (_cache_keyed_by_real, 0.0),
    "only its own latent fetched": (_fetches_its_own, 0.0),
    "implausible candidates dropped": (_implausible_dropped, 0.0),
    "request id from the typed text": (_request_id_from_text, 0.0),
    "padded to the typed length": (_padded_to_typed_length, 0.0),
    "known picture not asked for again": (_cached_answer_not_asked_again, 0.0),
}


def mutant_client(name: str, serialise: Serialise = envelope) -> Client:
    """A client with one seeded leak."""
    leak, _ = MUTANTS[name]

    def client(text: str) -> dict[Transcript, float]:
        out: dict[Transcript, float] = {}
        for p, messages in leak(text, parse(text)):
            transcript = tuple(serialise(fields) for fields in messages)
            out[transcript] = out.get(transcript, 0.0) + p
        return out

    return client


def mutant_table(text: str = MUTANT_PROMPT, serialise: Serialise = envelope) -> list[dict]:
    """Rows of mutants.csv (mutant, found, advantage, epsilon, promised, distinguished): every seeded leak audited over
    all candidates of a prompt and their spellings. Two honest clients come first and must not be accused."""
    prompt = parse(text)
    texts = spellings(prompt)
    subset = honest_client(lambda n: privacy.subset(n, 2, 1.0), serialise)
    clients = {"none (all candidates)": (honest_client(serialise=serialise), 0.0), "none (subset)": (subset, 1.0)}
    clients |= {name: (mutant_client(name, serialise), promised) for name, (_, promised) in MUTANTS.items()}
    rows = []
    for name, (client, promised) in clients.items():
        audit = exact_audit(client, texts, promised)
        row = {"mutant": name, "found": not audit.holds, "advantage": audit.advantage, "epsilon": audit.epsilon}
        rows.append(row | {"promised": promised, "distinguished": " | ".join(audit.worst) if not audit.holds else ""})
    return rows


def closure_table(texts: Iterable[str], serialise: Serialise = envelope) -> list[dict]:
    """Rows (prompt, candidates, advantage): the exact audit of full enumeration over all candidates of each prompt;
    prompts that are refused have advantage 0 and no candidates, as nothing is sent."""
    rows = []
    for text in texts:
        try:
            prompt = parse(text)
        except ValueError:
            rows.append({"prompt": text, "candidates": 0, "advantage": 0.0})
            continue
        audit = exact_audit(honest_client(serialise=serialise), candidates(prompt))
        rows.append({"prompt": prompt.template, "candidates": prompt.count, "advantage": audit.advantage})
    return rows


def corpus() -> tuple[str, ...]:
    """The prompts of data/prompts/corpus.txt."""
    lines = (DATA / "corpus.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))
