"""Mechanisms that choose which candidates are offered, and the accounting of what each of them reveals.

A mechanism is a channel: for every real candidate x a distribution P(o | x) over offers o, an offer being the sorted
tuple of the positions sent to the cloud. All that the cloud can infer follows: posterior(x) ~ prior(x) P(o | x).

The paper's mechanism offers all n candidates. P(o | x) is then the same for every x, and so the posterior equals the
prior, whatever the prior; 1/n is the special case of a uniform one. Nothing there is statistical, no epsilon is spent.
Fewer than all candidates are cheaper and reveal something: `subset` bounds it by differential privacy (epsilon-LDP).
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np

from .prompts import ATTRIBUTES, Prompt, attribute_of, candidate_values, candidates, real_index

MOST_OFFERS = 200_000  # channels with more offers are not written out
LATENT_BYTES = 4 * 64 * 64 * 2  # one fp16 latent of the paper's 512-pixel models: 32 KB

Offered = tuple[int, ...]


@dataclass(frozen=True)
class Mechanism:
    """A way to choose the offer among n candidates. draw(real, random) gives one; distribution(real) all of them with
    their probabilities (None where there are too many to write out); m is the number sent, epsilon the guarantee
    (0: the offer does not depend on the real one; inf: none)."""

    name: str
    n: int
    m: int
    epsilon: float
    draw: Callable[[int, Random], Offered] = field(repr=False, compare=False)
    distribution: Callable[[int], Mapping[Offered, float]] | None = field(default=None, repr=False, compare=False)
    delta: float = 0.0
    keeps: float = 1.0  # the probability that the real candidate is among those offered

    def __post_init__(self) -> None:
        if not 1 <= self.m <= self.n:
            raise ValueError(f"{self.name}: m = {self.m} of n = {self.n} candidates; need 1 <= m <= n")
        if self.epsilon < 0 or not 0 <= self.delta <= 1:
            raise ValueError(f"{self.name}: need epsilon >= 0 and 0 <= delta <= 1, not {self.epsilon}, {self.delta}")


def private_random() -> Random:
    """Randomness that decides privacy: the operating system's, never the experiment's seed."""
    return secrets.SystemRandom()


# ----------------------------------------------------------------------------------------------------- the mechanisms


def enumerate_all(n: int) -> Mechanism:
    """All n candidates, as in the paper (Algorithm 1): 0-LDP over the detected attributes, posterior = prior."""
    everything = tuple(range(n))
    return Mechanism("enumerate_all", n, n, 0.0, lambda real, random: everything, lambda real: {everything: 1.0})


def enumerate_some(groups: Sequence[int]) -> Mechanism:
    """All candidates that share the real one's group (its unprotected values): groups[i] is the group of candidate i.

    Exact within a group; the group itself is revealed. The groups must be of one size.
    """
    members: dict[int, Offered] = {}
    for i, group in enumerate(groups):
        members[group] = (*members.get(group, ()), i)
    if len({len(same) for same in members.values()}) != 1:
        raise ValueError(f"the groups have different sizes {sorted(map(len, members.values()))}; they must be equal")
    m = len(members[groups[0]])
    epsilon = 0.0 if len(members) == 1 else math.inf
    return Mechanism(
        "enumerate_some",
        len(groups),
        m,
        epsilon,
        lambda real, random: members[groups[real]],
        lambda real: {members[groups[real]]: 1.0},
        delta=0.0 if len(members) == 1 else 1.0,
    )


def plain(n: int) -> Mechanism:
    """The prompt itself, as in Hybrid SD and every ordinary service: no protection."""
    delta = 0.0 if n == 1 else 1.0
    return Mechanism("plain", n, 1, math.inf, lambda real, random: (real,), lambda real: {(real,): 1.0}, delta=delta)


def keep_probability(n: int, m: int, epsilon: float) -> float:
    """m e^eps / (m e^eps + n - m): how often k-subset selection sends the real candidate."""
    return m / (m + (n - m) * math.exp(-epsilon))


def subset(n: int, m: int, epsilon: float) -> Mechanism:
    """k-subset selection (Ye and Barg 2018; Wang et al. 2016): m of n candidates, exactly epsilon-LDP.

    With probability p = m e^eps / (m e^eps + n - m) the real one and m - 1 random others, else m random others. A
    subset with the real one is e^eps times as probable as one without.
    """
    p = keep_probability(n, m, epsilon)
    epsilon = 0.0 if m == n else epsilon
    return _subset(f"subset(m={m}, eps={epsilon:g})", n, m, p, epsilon, 0.0)


def truth_plus_others(n: int, m: int) -> Mechanism:
    """The real candidate and m - 1 random others. A warning: no finite epsilon, exactly (0, (n - m) / (n - 1)).

    Any candidate that is absent from the offer is ruled out for certain; repeats leave only the real one.
    """
    delta = (n - m) / (n - 1) if n > 1 else 0.0
    return _subset(f"truth_plus_others(m={m})", n, m, 1.0, 0.0 if n == m else math.inf, delta)


def _subset(name: str, n: int, m: int, p: float, epsilon: float, delta: float) -> Mechanism:
    def draw(real: int, random: Random) -> Offered:
        others = [i for i in range(n) if i != real]
        keep = random.random() < p
        return tuple(sorted(random.sample(others, m - 1) + [real] if keep else random.sample(others, m)))

    def distribution(real: int) -> dict[Offered, float]:
        with_real = p / math.comb(n - 1, m - 1)
        without = (1 - p) / math.comb(n - 1, m) if m < n else 0.0
        weights = {o: with_real if real in o else without for o in itertools.combinations(range(n), m)}
        return {o: weight for o, weight in weights.items() if weight > 0}

    small = math.comb(n, m) <= MOST_OFFERS
    return Mechanism(name, n, m, epsilon, draw, distribution if small else None, delta, p)


def combined(outer: Mechanism, inner: Mechanism) -> Mechanism:
    """Two mechanisms on the two factors of candidate = outer position * inner.n + inner position, independently.

    Enumerating the most sensitive attribute and subsetting the rest is combined(enumerate_all(2), subset(15, m, eps)):
    epsilon adds up, and a factor that is enumerated stays exact.
    """

    def product(a: Offered, b: Offered) -> Offered:
        return tuple(i * inner.n + j for i in a for j in b)

    def draw(real: int, random: Random) -> Offered:
        i, j = divmod(real, inner.n)
        return product(outer.draw(i, random), inner.draw(j, random))

    def distribution(real: int) -> dict[Offered, float]:
        i, j = divmod(real, inner.n)
        pairs = itertools.product(outer.distribution(i).items(), inner.distribution(j).items())
        return {product(a, b): p * q for (a, p), (b, q) in pairs}

    finite = outer.distribution is not None and inner.distribution is not None
    return Mechanism(
        f"{outer.name} x {inner.name}",
        outer.n * inner.n,
        outer.m * inner.m,
        outer.epsilon + inner.epsilon,
        draw,
        distribution if finite else None,
        delta=max(outer.delta, inner.delta),
        keeps=outer.keeps * inner.keeps,
    )


def _one_word(name: str, matrix: np.ndarray) -> Mechanism:
    """The mechanism that sends one candidate y with probability matrix[real, y]; epsilon is read off the matrix."""
    n = len(matrix)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(matrix)
    spread = logs.max(axis=0) - np.where(np.isneginf(logs.max(axis=0)), 0, logs.min(axis=0))
    epsilon = max(0.0, float(spread.max()))

    def draw(real: int, random: Random) -> Offered:
        return (random.choices(range(n), weights=matrix[real])[0],)

    def distribution(real: int) -> dict[Offered, float]:
        return {(y,): float(p) for y, p in enumerate(matrix[real]) if p > 0}

    return Mechanism(name, n, 1, epsilon, draw, distribution, keeps=float(np.diag(matrix).min()))


def random_replacement(n: int) -> Mechanism:
    """A uniformly random candidate instead of the real one, as in the paper's Figure 4: private and useless alone."""
    return _one_word("random_replacement", np.full((n, n), 1 / n))


def word_distances(values: Sequence[Mapping[str, str]]) -> np.ndarray:
    """(n, n) distances over the attribute lexicon, from 0 to 1: the mean over attributes of 0 or 1, for age of
    0, 1/2 or 1 (young, middle-aged, old are in order). Used where no embeddings are given."""
    distances = np.zeros((len(values), len(values)))
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            distances[i, j] = np.mean([_value_distance(key, a[key], b[key]) for key in a]) if a else 0.0
    return distances


def _value_distance(key: str, a: str, b: str) -> float:
    if attribute_of(key) != "age":
        return float(a != b)
    order = ATTRIBUTES["age"]
    return abs(order.index(a) - order.index(b)) / (len(order) - 1)


def embedding_distances(embeddings: np.ndarray) -> np.ndarray:
    """(n, n) Euclidean distances of (n, d) embeddings of the candidates' words, scaled to at most 1."""
    distances = np.linalg.norm(embeddings[:, None] - embeddings[None], axis=-1)
    return distances / distances.max()


def santext(distances: np.ndarray, epsilon: float) -> Mechanism:
    """Word-level exponential mechanism in the manner of SANTEXT (Yue et al. 2021): P(y | x) ~ exp(-eps d(x, y) / 2).

    epsilon is per unit of distance (metric differential privacy); the mechanism's own is the worst log ratio.
    """
    weights = np.exp(-epsilon * distances / 2)
    return _one_word(f"santext(eps={epsilon:g})", weights / weights.sum(axis=1, keepdims=True))


def cape(distances: np.ndarray, logits: np.ndarray, epsilon: float, share: float = 0.5, buckets: int = 5) -> Mechanism:
    """Context-aware word replacement in the manner of CAPE (Wu et al. 2025).

    Utility of y for x: u = fits(y)^share * (1 - d(x, y))^(1 - share), where fits, in [0, 1], are the scaled logits
    (n,) of the candidates in their context. The utilities of x are cut into buckets of equal width; a bucket is drawn
    with probability ~ exp(eps * mean utility / 2), and one of its words uniformly. The mechanism's own epsilon is the
    worst log ratio, which uneven buckets make larger than the nominal one.
    """
    fits = np.exp(logits - logits.max())
    utility = fits[None] ** share * np.clip(1 - distances, 0, 1) ** (1 - share)
    matrix = np.zeros_like(utility)
    for x, u in enumerate(utility):
        edges = np.linspace(u.min(), u.max(), buckets + 1)[1:-1]
        bucket = np.digitize(u, edges)
        present = np.unique(bucket)
        weight = np.array([math.exp(epsilon * u[bucket == b].mean() / 2) for b in present])
        for b, w in zip(present, weight / weight.sum(), strict=True):
            matrix[x, bucket == b] = w / (bucket == b).sum()
    return _one_word(f"cape(eps={epsilon:g})", matrix)


# --------------------------------------------------------------------------------------------- what a channel reveals


def channel(mechanism: Mechanism) -> tuple[list[Offered], np.ndarray]:
    """All offers and the matrix P(offer | real), (n, offers)."""
    if mechanism.distribution is None:
        raise ValueError(f"{mechanism.name} has more than {MOST_OFFERS} offers: sample it with audit.sampled_audit")
    rows = [mechanism.distribution(real) for real in range(mechanism.n)]
    offers = sorted(set().union(*rows))
    where = {offer: j for j, offer in enumerate(offers)}
    matrix = np.zeros((mechanism.n, len(offers)))
    for real, row in enumerate(rows):
        for offer, p in row.items():
            matrix[real, where[offer]] = p
    return offers, matrix


def posterior(prior: Sequence[float], likelihood: Sequence[float]) -> np.ndarray:
    """Bayes: prior(x) P(o | x) normalised over x, from the column P(o | .) of the channel."""
    joint = np.asarray(prior, float) * np.asarray(likelihood, float)
    if not joint.sum() > 0:
        raise ValueError("this offer cannot happen under this prior: nothing to condition on")
    return joint / joint.sum()


def success(matrix: np.ndarray, prior: Sequence[float]) -> float:
    """How often the best guess is right: sum over offers of max_x prior(x) P(o | x). Without an offer: max prior."""
    return float((np.asarray(prior, float)[:, None] * matrix).max(axis=0).sum())


def exact_epsilon(matrix: np.ndarray) -> float:
    """The smallest epsilon for which the channel is epsilon-LDP: the largest log P(o | x) / P(o | x'), inf if none."""
    top, bottom = matrix.max(axis=0), matrix.min(axis=0)
    if np.any((top > 0) & (bottom == 0)):
        return math.inf
    return max(0.0, float(np.log(top[top > 0] / bottom[top > 0]).max()))


def exact_delta(matrix: np.ndarray, epsilon: float = 0.0) -> float:
    """The smallest delta for which the channel is (epsilon, delta)-LDP; at epsilon = 0 the largest total variation."""
    worst = 0.0
    for row in matrix:
        worst = max(worst, float(np.clip(row[None] - math.exp(epsilon) * matrix, 0, None).sum(axis=1).max()))
    return min(1.0, worst)


def worst_posterior(mechanism: Mechanism, prior: Sequence[float] | None = None) -> float:
    """The largest posterior any offer gives to any candidate; uniform prior unless told."""
    prior = np.full(mechanism.n, 1 / mechanism.n) if prior is None else np.asarray(prior, float)
    if mechanism.distribution is None:  # only subsets are that large, and they treat all candidates alike
        return mechanism.keeps / mechanism.m
    _, matrix = channel(mechanism)
    joint = prior[:, None] * matrix
    return float((joint.max(axis=0) / joint.sum(axis=0)).max())


# -------------------------------------------------------------------------------------- one request, and its repeats


@dataclass(frozen=True)
class Choice:
    """What is offered for a prompt, and what stays on the device: the index into the offered texts of the latent to
    finish, whether that is the real candidate (hit) or the nearest offered one."""

    texts: tuple[str, ...]
    offered: Offered
    index: int
    hit: bool
    mechanism: Mechanism


def choose(prompt: Prompt, mechanism: Mechanism, random: Random | None = None, limit: int = 100) -> Choice:
    """Draw the offer for a prompt. On a miss the device takes the nearest offered candidate and never asks again."""
    texts, real = candidates(prompt, limit), real_index(prompt)
    if mechanism.n != len(texts):
        raise ValueError(f"{mechanism.name} is for n = {mechanism.n} candidates and the prompt has {len(texts)}")
    offered = mechanism.draw(real, random or private_random())
    nearest_one = nearest(candidate_values(prompt), real, offered)
    return Choice(tuple(texts[i] for i in offered), offered, offered.index(nearest_one), nearest_one == real, mechanism)


def nearest(values: Sequence[Mapping[str, str]], real: int, offered: Offered) -> int:
    """The offered candidate closest to the real one by `word_distances`, the first of equals."""
    distances = word_distances(values)[real]
    return min(offered, key=lambda i: (distances[i], i))


class _Stream(Random):
    """Random numbers from HMAC-SHA256 in counter mode: the same key and message give the same choices for ever."""

    def __new__(cls, key: bytes, message: bytes):
        return super().__new__(cls)

    def __init__(self, key: bytes, message: bytes) -> None:
        self._key, self._message, self._counter, self._pool = key, message, 0, b""
        super().__init__(0)

    def _take(self, count: int) -> bytes:
        while len(self._pool) < count:
            block = self._message + b"\0" + self._counter.to_bytes(8, "big")
            self._pool += hmac.new(self._key, block, hashlib.sha256).digest()
            self._counter += 1
        taken, self._pool = self._pool[:count], self._pool[count:]
        return taken

    def getrandbits(self, k: int) -> int:
        return int.from_bytes(self._take((k + 7) // 8), "big") >> (-k % 8)

    def random(self) -> float:
        return self.getrandbits(53) / 2**53

    def seed(self, *args, **kwargs) -> None:
        """Nothing to seed: the key decides."""


def new_user_secret() -> bytes:
    """A user's 256-bit key for permanent answers; it never leaves the device."""
    return secrets.token_bytes(32)


def permanent_random(user_secret: bytes, prompt: Prompt) -> Random:
    """Randomness that is always the same for one user, template and real candidate: a repeat gets the same offer.

    The message is the canonical template, what is enumerated and the real candidate's number. Without the last, two
    real candidates of one template would share their coins, and both answers could reveal more than their sum.
    """
    if len(user_secret) < 32:
        raise ValueError(f"the user's secret has {len(user_secret)} bytes; use at least 32, as from new_user_secret()")
    message = "\0".join((prompt.template, ",".join(prompt.enumerated), str(real_index(prompt))))
    return _Stream(user_secret, message.encode())


@dataclass
class Ledger:
    """What one user has spent over different prompts; a memoised repeat costs nothing.

    spent holds each (template, real candidate) once with its mechanism. Kept on the device: it names the prompts.
    """

    spent: dict[tuple[str, int], Mechanism] = field(default_factory=dict)

    def record(self, prompt: Prompt, mechanism: Mechanism) -> bool:
        """Add a request; True if it is new and costs something."""
        key = (prompt.template, real_index(prompt))
        new = key not in self.spent
        if self.spent.setdefault(key, mechanism) != mechanism:
            raise ValueError(f"'{prompt.template}' was answered by {self.spent[key].name}: another mechanism adds")
        return new

    def epsilon(self, delta: float = 0.0) -> float:
        """The epsilon that all requests together cost, at this delta (0: the plain sum)."""
        return compose(self.spent.values(), delta)


def compose(mechanisms: Iterable[Mechanism], delta: float = 0.0) -> float:
    """The epsilon of several requests together: the sum at delta = 0, else by dp-accounting's loss distributions."""
    mechanisms = list(mechanisms)
    total = sum(mechanism.epsilon for mechanism in mechanisms)
    if delta == 0 or total in (0, math.inf) and all(mechanism.delta == 0 for mechanism in mechanisms):
        return float(total)
    from dp_accounting.pld import privacy_loss_distribution as pld  # slow to import and rarely needed

    together = None
    for mechanism in mechanisms:
        real, other = loss_pair(mechanism)
        one = pld.from_two_probability_mass_functions(other, real)
        together = one if together is None else together.compose(one)
    return float(together.get_epsilon_for_delta(delta)) if together else 0.0


def loss_pair(mechanism: Mechanism) -> tuple[dict[str, float], dict[str, float]]:
    """Log probabilities, under the real candidate and under another one, of the four kinds of subset: with both, with
    the real one only, with the other only, with neither. All that two candidates' offers differ in."""
    n, m, p = mechanism.n, mechanism.m, mechanism.keeps
    if not mechanism.name.startswith(("subset", "truth_plus_others")):
        raise ValueError(f"loss_pair is for subset mechanisms, not {mechanism.name}")
    with_real, without = p / math.comb(n - 1, m - 1), (1 - p) / math.comb(n - 1, m) if m < n else 0.0
    number = {
        "both": math.comb(n - 2, m - 2) if m > 1 else 0,
        "real": math.comb(n - 2, m - 1),
        "other": math.comb(n - 2, m - 1),
        "neither": math.comb(n - 2, m),
    }
    real = {"both": with_real, "real": with_real, "other": without, "neither": without}
    other = {"both": with_real, "real": without, "other": with_real, "neither": without}
    logs = ({k: math.log(number[k] * v) for k, v in side.items() if number[k] * v > 0} for side in (real, other))
    return tuple(logs)


# ------------------------------------------------------------------------------------------------------------ tables


def cost_table(
    ns: Sequence[int] = (2, 6, 30),
    ms: Sequence[int] = (1, 2, 3, 6, 10, 15),
    epsilons: Sequence[float] = (0.5, 1, 2, 4),
) -> list[dict]:
    """Rows (mechanism, n, m, epsilon, delta, hit, posterior, server_share, download_kb): what each mechanism costs
    the cloud (m of n) and the download, how often the real latent comes back, and the worst posterior under a uniform
    prior."""
    rows = []
    for n in ns:
        mechanisms = [plain(n), enumerate_all(n), random_replacement(n)]
        for m in (m for m in ms if m < n):
            mechanisms += [subset(n, m, epsilon) for epsilon in epsilons] + [truth_plus_others(n, m)]
        rows += [_cost_row(mechanism) for mechanism in mechanisms]
    return rows


def _cost_row(mechanism: Mechanism) -> dict:
    return {
        "mechanism": mechanism.name.split("(")[0],
        "n": mechanism.n,
        "m": mechanism.m,
        "epsilon": mechanism.epsilon,
        "delta": mechanism.delta,
        "hit": mechanism.keeps,
        "posterior": worst_posterior(mechanism),
        "server_share": mechanism.m / mechanism.n,
        "download_kb": mechanism.m * LATENT_BYTES / 1024,
    }


def combination_table(epsilons: Sequence[float] = (0.5, 1, 2, 4), sent: Sequence[int] = (2, 6, 10, 20)) -> list[dict]:
    """Rows (rule, sent, epsilon, epsilon_gender, hit, posterior, gender_posterior) for n = 30 = 2 genders x 15 others
    at equal server cost: "enumerate gender, subset the rest" against one "joint subset" of all. The hit rates are
    equal; the first reveals nothing about gender, the second spends part of epsilon on it."""
    rows = []
    for epsilon, m in itertools.product(epsilons, sent):
        inner = subset(15, m // 2, epsilon)
        rules = {"enumerate gender, subset the rest": (inner, 0.0), "joint subset": (subset(30, m, epsilon), None)}
        for rule, (mechanism, gender) in rules.items():
            p, joint = mechanism.keeps, gender is None
            # the worst joint offer holds one gender only, if m <= 15: its e^eps-heavy members are all of that gender
            women = min(m, 15)
            heavy, light = math.exp(epsilon), 1.0
            ratio = (heavy * women + light * (15 - women)) / (heavy * (m - women) + light * (15 - m + women))
            rows.append(
                {
                    "rule": rule,
                    "sent": m,
                    "epsilon": epsilon,
                    "epsilon_gender": math.log(ratio) if joint else 0.0,
                    "hit": p,
                    "posterior": p / mechanism.m if joint else p / mechanism.m / 2,
                    "gender_posterior": ratio / (1 + ratio) if joint else 0.5,
                }
            )
    return rows


def repeats_table(
    n: int = 30, m: int = 6, epsilon: float = 1.0, times: Sequence[int] = (1, 2, 5, 10, 20, 50)
) -> list[dict]:
    """Rows (requests, sum_epsilon, epsilon_at_delta, memoised_epsilon, delta): what t fresh answers cost, by the plain
    sum and by dp-accounting at delta = 1e-6, and what memoised answers to one prompt cost."""
    delta, one = 1e-6, subset(n, m, epsilon)
    return [
        {
            "requests": t,
            "sum_epsilon": t * epsilon,
            "epsilon_at_delta": compose([one] * t, delta),
            "memoised_epsilon": epsilon,
            "delta": delta,
        }
        for t in times
    ]


def posterior_table(n: int, prior: Sequence[float], mechanisms: Sequence[Mechanism]) -> list[dict]:
    """Rows (mechanism, candidate, prior, posterior, offer): for each mechanism the offer that reveals most, and what
    it does to every candidate's probability. For full enumeration posterior = prior."""
    rows = []
    for mechanism in mechanisms:
        offers, matrix = channel(mechanism)
        joint = np.asarray(prior)[:, None] * matrix
        worst = int(np.argmax(joint.max(axis=0) / joint.sum(axis=0)))
        after = posterior(prior, matrix[:, worst])
        for i in range(n):
            row = {"mechanism": mechanism.name, "candidate": i, "prior": float(prior[i]), "posterior": float(after[i])}
            rows.append(row | {"offer": " ".join(map(str, offers[worst]))})
    return rows
