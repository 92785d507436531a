"""From free text to the prompts that differ only in age, gender and ethnicity (the paper's steps 1 and 2).

    text --normalise--> words --scan--> marks --bind--> marks of persons --shape--> template of slots and their values

The property that everything rests on is closure: `candidates(c) == candidates(p)` for every c in candidates(p). It is
not hoped for: `parse` reads each candidate again and refuses a prompt with one that reads back differently.

Templates for `fill` are captions with placeholders; there is one way to write each:
    {age} {ethnicity}        the value itself: young, asian
    {man} {men} {actor} ...  gendered noun, named by its male form: man/woman, men/women, actor/actress (lexicon.toml)
    {male}                   male/female, before a noun of no gender: "a {male} doctor"
    {he} {his} {him} {hers} {himself}    pronouns: he/she, his/her, him/her, his/hers, himself/herself
    {a}                      a/an, agreeing with the next word
    {anything else}          taken from `values` as it stands: {garment}
"""

from __future__ import annotations

import itertools
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from types import MappingProxyType

from scipy.stats import beta

ATTRIBUTES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "age": ("young", "middle-aged", "old"),
        "gender": ("male", "female"),
        "ethnicity": ("caucasian", "african", "asian", "indian", "european"),
    }
)
DATA = Path(__file__).resolve().parent.parent / "data" / "prompts"
MOST_WORDS = 300
MOST_CANDIDATES = 100
MOST_CHECKED = 1024

# A detector beside the rules: normalised text -> (attribute, words of the text) that state it.
Detector = Callable[[str], Iterable[tuple[str, str]]]


class PromptError(ValueError):
    """A prompt that cannot be offered; the message says why and what to change. Nothing has left the device."""


class Question(PromptError):
    """A prompt that only its writer can decide: probably a misspelling of a sensitive word."""


@dataclass(frozen=True)
class Slot:
    """A place whose words depend on an attribute of a person (numbered from 1); form names the words, as in `fill`."""

    form: str
    person: int = 1

    def __post_init__(self) -> None:
        if self.form not in ("a", "age", "ethnicity") and self.form not in lexicon().gendered:
            raise PromptError(f"a slot is 'a', 'age', 'ethnicity' or a pair of lexicon.toml, not {self.form!r}")

    @property
    def attribute(self) -> str | None:
        """The attribute that decides the words: None for an article, which follows its neighbour."""
        return None if self.form == "a" else self.form if self.form in ATTRIBUTES else "gender"

    @property
    def key(self) -> str | None:
        """The name of its value: "gender" for the first person, "gender.2" for the second."""
        return self.attribute and (self.attribute if self.person == 1 else f"{self.attribute}.{self.person}")


@dataclass(frozen=True)
class Note:
    """Something the user should know; kind is "cue" (may reveal) or "left" (a doubtful word was not made a slot)."""

    kind: str
    words: str
    message: str
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A template (text and slots) and the values that fill it; `protect` says which attributes are enumerated."""

    pieces: tuple[str | Slot, ...]
    values: tuple[tuple[str, str], ...] = ()
    protect: tuple[str, ...] = tuple(ATTRIBUTES)
    notes: tuple[Note, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for name in self.protect:
            if name not in ATTRIBUTES:
                raise PromptError(f"cannot protect {name!r}: the attributes are {', '.join(ATTRIBUTES)}")
        for key, value in self.values:
            if value not in ATTRIBUTES.get(attribute_of(key), ()):
                raise PromptError(f"{key} cannot be {value!r}: it is one of {ATTRIBUTES.get(attribute_of(key))}")
        missing = {p.key for p in self.pieces if isinstance(p, Slot) and p.key} ^ {key for key, _ in self.values}
        if missing:
            raise PromptError(f"slots and values must name the same attributes; only one of them has {sorted(missing)}")

    @property
    def text(self) -> str:
        """The canonical text with its own values."""
        return render(self.pieces, dict(self.values))

    @property
    def template(self) -> str:
        """The text with its slots in braces: what the cloud can always see."""
        names = (p if isinstance(p, str) else f"{{{p.form}{p.person if p.person > 1 else ''}}}" for p in self.pieces)
        return "".join(names)

    @property
    def enumerated(self) -> tuple[str, ...]:
        """The keys whose values are enumerated: those that occur and are protected, person by person."""
        return tuple(key for key, _ in self.values if attribute_of(key) in self.protect)

    @property
    def count(self) -> int:
        """N, the number of candidates: the product of the numbers of values."""
        n = 1
        for key in self.enumerated:
            n *= len(ATTRIBUTES[attribute_of(key)])
        return n


def attribute_of(key: str) -> str:
    """The attribute of a key: "gender" of "gender.2"."""
    return key.split(".")[0]


# ------------------------------------------------------------------------------------------- the four public functions


def parse(
    text: str,
    protect: Iterable[str] = tuple(ATTRIBUTES),
    cues: str = "warn",
    keep: Iterable[str] = (),
    detectors: Iterable[Detector] = (),
) -> Prompt:
    """Read free English text as a template and its values; refuse, with a PromptError, what cannot be offered safely.

    protect names the attributes to enumerate; the others keep their value. cues is what happens to words that make
    some values likelier (a beard): "warn" notes them on the prompt, "neutralise" rewrites them, "refuse" raises.
    keep lists words that the user has confirmed are not misspellings of sensitive ones. detectors are asked after the
    rules (see `presidio`, `token_classifier`); what they find and the rules do not is a Question.
    """
    if cues not in ("warn", "neutralise", "refuse"):
        raise PromptError(f"cues is 'warn', 'neutralise' or 'refuse', not {cues!r}")
    if not isinstance(text, str):
        raise PromptError(f"a prompt is text, not {type(text).__name__}")
    return _parse(text, tuple(protect), cues, frozenset(word.lower() for word in keep), tuple(detectors))


@lru_cache(maxsize=4096)
def _parse(text: str, protect: tuple[str, ...], cues: str, keep: frozenset[str], detectors: tuple) -> Prompt:
    """`parse` of hashable arguments: one reading, and one of every candidate."""
    prompt = _read_checked(text, protect, cues, keep, detectors)
    if prompt.count > MOST_CHECKED:
        raise PromptError(f"the prompt has {prompt.count} candidates, too many to check: name fewer persons")
    _check_closure(_first(prompt), cues, keep, detectors)
    return prompt


def _first(prompt: Prompt) -> Prompt:
    """The first candidate of a prompt: the same for all of its candidates."""
    chosen = {key: ATTRIBUTES[attribute_of(key)][0] for key in prompt.enumerated}
    return replace(prompt, values=tuple((dict(prompt.values) | chosen).items()), notes=())


@lru_cache(maxsize=1024)
def _check_closure(first: Prompt, cues: str, keep: frozenset[str], detectors: tuple) -> None:
    """Raise PromptError unless every candidate is read as the same template: one that `parse` would refuse, or read as
    something else, could be ruled out by the cloud."""
    for values, candidate in zip(candidate_values(first), _texts(first), strict=True):
        try:
            again = _read_checked(candidate, first.protect, cues, keep, detectors)
        except PromptError as error:
            raise PromptError(f"the candidate '{candidate}' would be refused ({error}): rephrase the prompt") from error
        if again.pieces != first.pieces or dict(again.values) != values:
            raise PromptError(f"'{candidate}' would lead to other candidates ({again.template}): rephrase the prompt")


@lru_cache(maxsize=1024)
def _texts(first: Prompt) -> tuple[str, ...]:
    return tuple(render(first.pieces, values) for values in candidate_values(first))


@lru_cache(maxsize=4096)
def _read_checked(text: str, protect: tuple[str, ...], cues: str, keep: frozenset[str], detectors: tuple) -> Prompt:
    """One reading of one text, with every reason to refuse it but closure."""
    plain = normalise(text)
    if cues == "neutralise":
        plain = neutralise(plain)
    ask_about_misspellings(plain, keep)
    prompt = read(plain, protect)
    found = find_cues(prompt)
    if found and cues == "refuse":
        raise PromptError(f"{found[0].message}; drop the words or parse with cues='neutralise'")
    left = literal_words(prompt)
    for detector in detectors:
        for attribute, words in detector(plain):
            missed = [word for word in re.findall(r"\w+", words.lower()) if word in left and word not in keep]
            if attribute in protect and missed:
                raise Question(f"'{words}' may state {attribute} and is in no slot: rephrase, or keep={missed}")
    return replace(prompt, notes=prompt.notes + found)


def candidates(prompt: Prompt | str, limit: int = MOST_CANDIDATES) -> tuple[str, ...]:
    """All N texts that differ only in enumerated values, in the canonical order (itertools.product); at most limit."""
    prompt = parse(prompt) if isinstance(prompt, str) else prompt
    if prompt.count > limit:
        raise PromptError(
            f"the prompt has {prompt.count} candidates ({', '.join(prompt.enumerated)}) and the limit is {limit}: "
            "protect fewer attributes, name fewer persons, or raise the limit"
        )
    return _texts(_first(prompt))


def candidate_values(prompt: Prompt) -> tuple[dict[str, str], ...]:
    """The values of each candidate, in the order of `candidates`; keys such as "age", "gender", "gender.2"."""
    choices = [ATTRIBUTES[attribute_of(key)] for key in prompt.enumerated]
    chosen = itertools.product(*choices)
    return tuple(dict(prompt.values) | dict(zip(prompt.enumerated, values, strict=True)) for values in chosen)


def real_index(prompt: Prompt) -> int:
    """The position of the prompt's own text among its candidates: the secret."""
    return candidate_values(prompt).index(dict(prompt.values))


def fill(template: str, values: Mapping[str, str]) -> str:
    """Write a caption from a template (see the module's head) and values such as {"age": "old", "garment": "scarf"}."""
    pieces: list[str | Slot] = []
    for i, part in enumerate(re.split(r"\{(\w+)\}", template)):
        if i % 2 == 0:
            pieces.append(part)
        elif part in ("a", "age", "ethnicity") or part in lexicon().gendered:
            pieces.append(Slot(part))
        elif part in values:
            pieces.append(values[part])
        else:
            raise PromptError(f"template {template!r} wants {{{part}}}: it is no slot and not among {sorted(values)}")
    return render(pieces, values)


# ---------------------------------------------------------------------------------------------------- writing a prompt


def render(pieces: Iterable[str | Slot], values: Mapping[str, str]) -> str:
    """The text of pieces with these values; articles are chosen last, from the words that follow them."""
    words: list[str] = []
    for piece in pieces:
        if isinstance(piece, str):
            words.append(piece)
        elif piece.form == "a":
            words.append("\0")
        elif piece.key not in values:
            raise PromptError(f"no value for {piece.key}: give one of {ATTRIBUTES[piece.attribute]}")
        elif piece.form in ATTRIBUTES:
            words.append(values[piece.key])
        else:
            words.append(lexicon().gendered[piece.form][values[piece.key] == "female"])
    return re.sub(r"\0(?=[^\w]*(\w*))", lambda m: article(m.group(1)), "".join(words))


def article(word: str) -> str:
    """The indefinite article before a word."""
    vowel = word[:1].lower() in tuple("aeiou")
    exceptions = lexicon().article_exceptions
    return "an" if vowel != any(word.lower().startswith(start) for start in exceptions) else "a"


# ---------------------------------------------------------------------------------------------------- reading a prompt


@dataclass(frozen=True)
class Entry:
    """What a phrase of the lexicon means: kind, the slot or word it is written as, and the values it states."""

    kind: str  # strong | weak | noun | pronoun | either | not | outside | after (an age said after its noun)
    form: str = ""
    values: tuple[tuple[str, str], ...] = ()


@dataclass(eq=False)
class Item:
    """A word or phrase of the text with what stood before it, its entry if it has one, and the person it speaks of."""

    glue: str
    text: str
    entry: Entry | None = None
    person: int = 0
    head: int | None = None


@dataclass(frozen=True)
class Lexicon:
    """data/prompts/lexicon.toml, arranged for look-up: phrases by their first word, longest first."""

    phrases: Mapping[str, tuple[tuple[tuple[str, ...], tuple[Entry, ...]], ...]]
    gendered: Mapping[str, tuple[str, str]]
    grammar: Mapping[str, frozenset[str]]
    endings: tuple[str, ...]
    limits: Mapping[str, int]
    article_exceptions: tuple[str, ...]


@cache
def lexicon() -> Lexicon:
    """Load the lexicon once."""
    data = tomllib.loads((DATA / "lexicon.toml").read_text(encoding="utf-8"))
    table: dict[tuple[str, ...], list[Entry]] = {}

    def add(phrase: str, kind: str, form: str = "", **values: str) -> None:
        if phrase:
            table.setdefault(tuple(phrase.split()), []).append(Entry(kind, form, tuple(values.items())))

    for strength, attribute in itertools.product(("strong", "weak"), ("age", "ethnicity")):
        for value, words in data[attribute][strength].items():
            for word in words:
                add(word, strength, attribute, **{attribute: value})
    gendered = {form: (pair[0], pair[1]) for form, pair in data["gender"]["pronouns"].items()}
    for form, pair in gendered.items():
        for word, value in zip(pair, ATTRIBUTES["gender"], strict=True):
            add(word, "pronoun", form, gender=value)
    for male, female, males, females in data["gender"]["pairs"]:
        gendered |= {male: (male, female)} | ({males: (males, females)} if males else {})
    for form in gendered.keys() - data["gender"]["pronouns"].keys():
        others = data["gender"]["as"].get(form, [[], []])
        for value, own, more in zip(ATTRIBUTES["gender"], gendered[form], others, strict=True):
            for word in [own, *more]:
                add(word, "strong" if form == "male" else "noun", form, gender=value)
    for value, nouns in data["age_nouns"].items():
        for singular, plural in nouns:
            add(singular, "noun", "person", age=value)
            add(plural, "noun", "people", age=value)
    for singular, plural, stated in data["compounds"]["words"]:
        values = {a: v for v in stated.split() for a, known in ATTRIBUTES.items() if v in known}
        for word, gendered_form, plain_form in ((singular, "man", "person"), (plural, "men", "people")):
            add(word, "noun", gendered_form if "gender" in values else plain_form, **values)
    for form, words in data["gender"]["either"].items():
        for word in words:
            add(word, "either", form)
    for kind, words in (("not", data["not"]["phrases"]), ("outside", data["ethnicity"]["outside"])):
        for word in words:
            add(word, kind)
    by_first: dict[str, list] = {}
    for phrase, entries in sorted(table.items(), key=lambda row: -len(row[0])):
        by_first.setdefault(phrase[0], []).append((phrase, tuple(dict.fromkeys(entries))))
    return Lexicon(
        phrases={first: tuple(rows) for first, rows in by_first.items()},
        gendered=gendered,
        grammar={name: frozenset(words) for name, words in (data["grammar"] | data["script"]).items()},
        endings=tuple(data["grammar"]["person_endings"]),
        limits=data["age"]["limits"],
        article_exceptions=tuple(data["grammar"]["article_exceptions"]),
    )


@cache
def _script() -> dict[int, str]:
    table = tomllib.loads((DATA / "script.toml").read_text(encoding="utf-8"))["homoglyphs"]
    return {ord(odd): plain for plain, odds in table.items() for odd in odds}


def normalise(text: str) -> str:
    """The text as the detector sees it: NFKC, nothing invisible, no look-alike letters, lower case, single spaces.

    Raises PromptError for what cannot be English text of at most 300 words.
    """
    text = unicodedata.normalize("NFKC", text)
    text = "".join(c for c in text if unicodedata.category(c) != "Cf").lower().translate(_script())
    text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
    text = re.sub(r"\s+", " ", text).strip()
    for c in text:
        category = unicodedata.category(c)
        if category in ("Cc", "Cn", "Co", "Cs"):
            raise PromptError(f"the prompt holds the control character U+{ord(c):04X}: remove it")
        if category == "So":
            raise PromptError(f"the prompt holds the picture {c!r}, which may show a person: write it in words")
        if category.startswith("L") and not c.isascii():
            raise PromptError(f"the prompt holds {c!r}: only English in Latin letters can be read; translate it first")
    if not re.search(r"\w", text):
        raise PromptError("the prompt has no words: describe a picture")
    words = text.split()
    if len(words) > MOST_WORDS:
        raise PromptError(f"the prompt has {len(words)} words and at most {MOST_WORDS} can be read: shorten it")
    foreign = [word for word in re.findall(r"\w+", text) if word in lexicon().grammar["foreign"]]
    if len(foreign) >= 2:
        raise PromptError(f"the prompt seems not to be English ({', '.join(foreign[:3])}): translate it first")
    if spelled := re.search(r"(?:\b[a-z]\b[^\w]+){3,}", text):
        raise PromptError(f"the prompt spells out letters ({spelled.group().strip()!r}): write whole words")
    return re.sub(r" +([,.;:!?])", r"\1", text)


_WORD = re.compile(r"(?<=\w)'s\b|[^\W_]+")
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_ONES = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_ONES += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_ONE_WORD = rf"(?:{'|'.join(_TENS)})(?:[- ](?:{'|'.join(_ONES[:9])}))?|{'|'.join(reversed(_ONES))}|(?:a |one )?hundred"
_NUMBER = rf"(?:\d{{1,3}}|{_ONE_WORD})"
_DECADE = rf"(?:\d0s|\d0'?s|{'|'.join(t[:-1] + 'ies' for t in _TENS)}|teens)"
_PART = r"(?:very )?(?:(?:early|mid|middle|late)[- ](?:to[- ]late[- ])?)?"
# Ages in numbers: (pattern, said after its noun?). The named groups n and whose hold the age and the pronoun.
_AGES = (
    (re.compile(rf"(?P<n>{_NUMBER})[- ]?(?:years?|yrs?)[- ](?:of age\b|old\b|young\b)"), False),
    (re.compile(rf"(?P<n>{_NUMBER})[- ]?(?:y/?o|yo)\b"), False),
    (re.compile(rf"(?P<months>{_NUMBER})[- ](?:day|week|month)s?[- ]old\b"), False),
    (re.compile(rf"(?P<n>{_NUMBER})[- ]ish\b"), False),
    (re.compile(rf"(?:of )?age(?:d|s)? (?:of |about |around )?(?P<n>{_NUMBER})\b(?: years)?"), True),
    (re.compile(rf"at (?:the age of )?(?P<n>{_NUMBER})\b(?= ?[,.]|$)"), True),
    (re.compile(rf"(?:over|above|past|under|below) (?:the age of )?(?P<n>{_NUMBER})\b(?= ?[,.]|$)"), True),
    (re.compile(rf"in (?P<whose>his|her|their|the|my) {_PART}(?P<n>{_DECADE})(?!\w)"), True),
)
_AFTER_NOUN = re.compile(
    rf"of (?P<n>{_NUMBER})\b(?: years)?(?=[,.;]|$| (?:with|in|on|at|by|wearing|who|and)\b)"
    rf"|\(?(?P<m>{_NUMBER})\b\)?(?=[,.;]|$)"
)


def years(words: str) -> int:
    """A number of years from "18", "sixty-five", "60s" or "sixties"."""
    if digits := re.match(r"\d+", words):
        return int(digits.group())
    total = 0
    for word in re.findall(r"[a-z]+", words):
        word = re.sub(r"ies$", "y", word)
        if word in _TENS:
            total += 20 + 10 * _TENS.index(word)
        elif word in _ONES:
            total += 1 + _ONES.index(word)
        elif word == "hundred":
            total += 100
        elif word == "teens":
            total += 15
    return total


def age_of(number: int) -> str:
    """The age value of a number of years, by the limits in lexicon.toml."""
    limits = lexicon().limits
    return next((value for value, most in limits.items() if number <= most), ATTRIBUTES["age"][-1])


def _age_entry(text: str, start: int, after_noun: bool) -> tuple[int, Entry] | None:
    """An age in numbers that starts here: where it ends and what it means."""
    for pattern, after in (*_AGES, *(((_AFTER_NOUN, True),) if after_noun else ())):
        if m := pattern.match(text, start):
            found = m.groupdict()
            values = {"age": age_of(0 if found.get("months") else years(found.get("n") or found["m"]))}
            if found.get("whose") in ("his", "her"):
                values["gender"] = "male" if found["whose"] == "his" else "female"
            return m.end(), Entry("after" if after else "strong", "age", tuple(values.items()))
    return None


def scan(text: str) -> tuple[list[Item], str]:
    """Cut normalised text into items, longest phrase first, and the tail behind the last word."""
    words = list(_WORD.finditer(text))
    items: list[Item] = []
    i, end = 0, 0
    while i < len(words):
        start = words[i].start()
        glue, after_noun = text[end:start], bool(items) and _names_person(items[-1])
        if age := _age_entry(text, start, after_noun):
            end, entry = age
            items.append(Item(glue, text[start:end], entry))
            i += sum(1 for word in words[i:] if word.start() < end)
            continue
        phrase, entries = _phrase_at(text, words, i)
        end = words[i + len(phrase) - 1].end()
        items.append(Item(glue, text[start:end], _choose(entries, text, end)))
        i += len(phrase)
    return items, text[end:]


def _phrase_at(text: str, words: list[re.Match], i: int) -> tuple[tuple[str, ...], tuple[Entry, ...]]:
    """The longest phrase of the lexicon at word i, with its entries; the word alone, without any, if there is none."""
    for phrase, entries in lexicon().phrases.get(words[i].group(), ()):
        here = words[i : i + len(phrase)]
        joined = all(
            re.fullmatch(r" ?[-_/'’]? ?", text[a.end() : b.start()]) for a, b in zip(here, here[1:], strict=False)
        )
        if joined and tuple(word.group() for word in here) == phrase:
            return phrase, entries
    return (words[i].group(),), ()


def _choose(entries: tuple[Entry, ...], text: str, end: int) -> Entry | None:
    """One entry of several: a word that is adjective and noun is an adjective if a word for a person follows."""
    if not entries:
        return None
    kinds = {entry.kind: entry for entry in entries}
    if "pronoun" in kinds:
        return _case(entries, text[end:])
    adjective = kinds.get("strong") or kinds.get("weak")
    if adjective and "noun" in kinds:
        follows = re.match(r"[ -]+([^\W_]+)", text[end:])
        word = follows.group(1) if follows else ""
        described = word not in lexicon().grammar["boundary"] and (word in lexicon().phrases or is_person(word))
        return adjective if described else kinds["noun"]
    return entries[0]


def _case(entries: tuple[Entry, ...], rest: str) -> Entry:
    """The pronoun's case from what follows, so that "his", "him" and "her" are read alike whichever was typed."""
    forms = {entry.form for entry in entries}
    if not forms & {"his", "him"}:
        return entries[0]
    follows = re.match(r" ([^\W_]+)", rest)
    ends = not follows or follows.group(1) in lexicon().grammar["boundary"]
    return replace(entries[0], form="his" if not ends else "him" if "him" in forms else "hers")


def _head(items: list[Item], i: int) -> int | None:
    """The noun for a person that the adjective at i stands before, in the same noun phrase: "old" -> "man"."""
    grammar = lexicon().grammar
    for j in range(i + 1, min(i + 7, len(items))):
        item, first = items[j], j == i + 1
        if not re.fullmatch(r" |-|/| ?, ?" if first else r" |-|/", item.glue):
            return None
        if _names_person(item):
            return j
        if not item.entry and item.text in grammar["boundary"] and not (first and item.text == "and"):
            return None
        if item.entry and item.entry.kind in ("pronoun", "after", "not"):
            return None
    return None


def is_person(word: str) -> bool:
    """Whether a word that is in no phrase of the lexicon names a person (doctor, violinist)."""
    grammar = lexicon().grammar
    if word in grammar["persons"]:
        return True
    return len(word) > 5 and word.endswith(lexicon().endings) and word not in grammar["things"]


def _names_person(item: Item) -> bool:
    return item.entry.kind == "noun" if item.entry else is_person(item.text)


def _predicate(items: list[Item], i: int) -> bool:
    """Whether the adjective at i is said of a person by a verb: "she is old", "who looks asian"."""
    grammar, j = lexicon().grammar, i - 1
    while j >= 0 and items[j].text in ("very", "quite", "rather", "and", "so", "really"):
        j -= 1
    if j < 1 or items[j].text not in grammar["copulas"]:
        return False
    subject = items[j - 1]
    return subject.text in grammar["subjects"] or subject.text in grammar["persons"] or subject.entry is not None


def _speaks(items: list[Item], i: int) -> bool:
    """Whether the adjective at i, which no noun for a person follows, still speaks of a person: "a young asian"."""
    after = items[i + 1] if i + 1 < len(items) and items[i + 1].glue in " -" else None
    if after and after.entry and after.entry.kind in ("strong", "weak"):
        return _speaks(items, i + 1)
    thing = after is not None and after.text in lexicon().grammar["things"]
    listed = "," in items[i].glue and (i + 1 == len(items) or "," in items[i + 1].glue)
    person_before = any(item.person for item in items[:i])
    return _predicate(items, i) or listed and person_before or items[i].entry.kind == "strong" and not thing


def _nominal(items: list[Item], i: int) -> bool:
    """Whether the age at i stands for its person: "a ten-year-old on a swing", "the elderly"."""
    boundary = lexicon().grammar["boundary"]
    after = items[i + 1] if i + 1 < len(items) else None
    ends = after is None or after.glue != " " and after.glue != "-" or after.text in boundary
    return ends and i > 0 and items[i].glue == " " and items[i - 1].text in lexicon().grammar["determiners"]


def bind(items: list[Item]) -> tuple[Note, ...]:
    """Say of every marked item which person it speaks of; unmark what speaks of none. The rules look at places and
    kinds only, never at values, so that all candidates are bound alike."""
    notes: list[Note] = []
    persons, loose = 0, False  # loose: the latest person has been met in pronouns only
    for i, item in enumerate(items):
        kind = item.entry.kind if item.entry else None
        before = items[i - 1] if i else None
        if kind == "outside" and (_head(items, i) is not None or _predicate(items, i)):
            raise PromptError(
                f"'{item.text}' is outside the ethnicities that can be offered ({', '.join(ATTRIBUTES['ethnicity'])}): "
                "write one of them or leave it out"
            )
        if kind in ("outside", "not"):
            item.entry = None
            if kind == "outside":
                notes.append(Note("cue", item.text, f"'{item.text}' may reveal ethnicity", ("ethnicity",)))
        elif kind in ("strong", "weak"):
            item.head = _head(items, i)
            if kind == "strong" and item.entry.form == "age" and item.head is None and _nominal(items, i):
                kind, item.entry = "noun", replace(item.entry, kind="noun", form="person")
            elif item.head is None and not _speaks(items, i):
                attribute = item.entry.form if item.entry.form in ATTRIBUTES else "gender"
                message = f"'{item.text}' was not read as a person's {attribute}"
                notes.append(Note("left", item.text, message, (attribute,)))
                item.entry = None
            elif item.head is None:
                persons = max(persons, 1)
                item.person, loose = persons, False
        elif kind in ("pronoun", "after"):
            if kind == "after" and before and not before.entry and is_person(before.text) and not before.person:
                persons += 1
                before.person = persons
            loose = loose or not persons
            persons = max(persons, 1)
            item.person = persons
        if kind == "noun" or item.entry is None and any(other.head == i for other in items[:i]):
            adjectives = [other for other in items[:i] if other.entry and other.head == i]
            first = items.index(adjectives[0]) if adjectives else i
            opener = items[first - 1] if first else None
            owned = opener and opener.entry and opener.entry.form == "his"
            joined = before and before.entry and before.entry.kind == "noun" and item.glue in " -"
            again = persons and opener and opener.text == "the" and re.search(r"^$|[.;!?]", opener.glue)
            if not (joined or again or loose and not owned):
                persons += 1
            loose = False
            for other in (*adjectives, item):
                other.person = persons
    return tuple(notes)


_ORDER = {"age": 0, "ethnicity": 1, "male": 2}


def read(text: str, protect: tuple[str, ...]) -> Prompt:
    """Read normalised text: scan, bind, then shape the items into slots in canonical form and collect the values."""
    items, tail = scan(text)
    notes = bind(items)
    values = _collect(items)
    shaped = _shape(items)
    pieces: list[str | Slot] = []
    for i, (glue, piece) in enumerate(shaped):
        follows = shaped[i + 1][1] if i + 1 < len(shaped) else None
        if piece in ("a", "an") and isinstance(follows, Slot):
            piece = Slot("a", 0)
        for part in (glue, piece):
            if isinstance(part, str) and pieces and isinstance(pieces[-1], str):
                pieces[-1] += part
            elif part:
                pieces.append(part)
    if tail:
        pieces = [*pieces[:-1], pieces[-1] + tail] if isinstance(pieces[-1], str) else [*pieces, tail]
    ordered = sorted(values.items(), key=lambda row: (row[0][1], list(ATTRIBUTES).index(row[0][0])))
    named = tuple((name if person == 1 else f"{name}.{person}", value) for (name, person), value in ordered)
    return Prompt(tuple(pieces), named, protect, notes)


def _collect(items: list[Item]) -> dict[tuple[str, int], str]:
    """The values of each person, by (attribute, person); contradictions are refused."""
    values: dict[tuple[str, int], str] = {}
    said: dict[tuple[str, int], str] = {}
    for item in items:
        for attribute, value in item.entry.values if item.entry else ():
            key = (attribute, item.person)
            if values.setdefault(key, value) != value:
                raise PromptError(
                    f"'{said[key]}' and '{item.text}' contradict each other about one person's {attribute}: "
                    "keep one, or name the second person with a noun of its own"
                )
            said.setdefault(key, item.text)
    return values


def _shape(items: list[Item]) -> list[tuple[str, str | Slot]]:
    """The items as (glue, text or slot): each noun phrase gets its slots once, in the order age, ethnicity, gender; an
    age said behind its noun moves before it."""
    shaped: list[tuple[str, str | Slot]] = []
    phrase_at: dict[int, int] = {}  # person -> where the noun phrase that can take one more adjective starts
    phrase: list[Slot] = []  # the adjectives of the noun phrase under way
    begins = 0
    for i, item in enumerate(items):
        entry = item.entry
        if entry is None and not item.person:
            shaped.append((item.glue, item.text))
            continue
        if entry is None or entry.kind == "noun":
            stated = dict(entry.values) if entry else {}
            have = {slot.form for slot in phrase}
            if entry and entry.form in lexicon().gendered and Slot("male", item.person) in phrase:
                shaped = [pair for j, pair in enumerate(shaped) if j < begins or pair[1] != Slot("male", item.person)]
            missing = [Slot(form, item.person) for form in ("age", "ethnicity") if form in stated and form not in have]
            if not phrase:
                begins = len(shaped)
            noun = item.text if entry is None else Slot(entry.form, item.person) if "gender" in stated else entry.form
            glue = item.glue
            for piece in (*missing, noun):
                shaped.append((glue, piece))
                glue = " "
            phrase_at[item.person] = begins
            phrase = []
        elif entry.kind == "either":
            shaped.append((item.glue, entry.form))
        elif entry.kind == "pronoun":
            shaped.append((item.glue, Slot(entry.form, item.person)))
        elif item.head is None and entry.form == "age" and item.person in phrase_at and not _predicate(items, i):
            _move(shaped, phrase_at[item.person], entry, item.person)
        else:
            form = entry.form
            slot = Slot(form, item.person)
            if item.head is not None:
                if slot in phrase:
                    continue
                if not phrase:
                    begins = len(shaped)
                phrase.append(slot)
            shaped.append((item.glue, slot))
    return _sorted_adjectives(shaped)


def _noun_follows(shaped: list[tuple[str, str | Slot]], i: int) -> bool:
    """Whether shaped[i] is a noun for a person that the adjectives before it stand with."""
    if i == len(shaped) or shaped[i][0] not in (" ", "-"):
        return False
    piece = shaped[i][1]
    return is_person(piece) if isinstance(piece, str) else piece.attribute == "gender"


def _move(shaped: list[tuple[str, str | Slot]], start: int, entry: Entry, person: int) -> None:
    """Put the slots of an age said behind its noun before it, unless the person has them already."""
    have = {piece.attribute for _, piece in shaped if isinstance(piece, Slot) and piece.person == person}
    at = start
    for name, _ in entry.values:
        if name not in have:
            glue = shaped[at][0]
            shaped[at] = (" ", shaped[at][1])
            shaped.insert(at, (glue, Slot("male" if name == "gender" else name, person)))
            at += 1


def _sorted_adjectives(shaped: list[tuple[str, str | Slot]]) -> list[tuple[str, str | Slot]]:
    """Neighbouring adjective slots of one person in canonical order, with single spaces between slots of a phrase."""
    out: list[tuple[str, str | Slot]] = []
    i = 0
    while i < len(shaped):
        glue, piece = shaped[i]
        run = [piece]
        while isinstance(piece, Slot) and piece.form in _ORDER and i + len(run) < len(shaped):
            follows = shaped[i + len(run)][1]
            if not isinstance(follows, Slot) or follows.form not in _ORDER or follows.person != piece.person:
                break
            run.append(follows)
        i += len(run)
        if len(run) > 1:
            last = run[-1]
            run = sorted(dict.fromkeys(run), key=lambda slot: _ORDER[slot.form])
            if run[-1].form == "male" and last.form != "male" and not _noun_follows(shaped, i):
                run[-1] = Slot("man", run[-1].person)  # "an old male european" names a man
        for n, slot in enumerate(run):
            tight = glue == "-" and out and isinstance(out[-1][1], Slot) and isinstance(slot, Slot)
            out.append((" " if n or tight else glue, slot))
    return out


# -------------------------------------------------------------------------------------------------- cues and questions


@cache
def cue_table() -> Mapping[str, tuple[Mapping[str, tuple[str, ...]], str]]:
    """data/prompts/cues.toml: cue -> (the values it makes likelier, its neutral word)."""
    rows = tomllib.loads((DATA / "cues.toml").read_text(encoding="utf-8"))["cues"]
    return MappingProxyType({word: (row["reveals"], row["neutral"]) for row in rows for word in row["words"]})


@cache
def _cue_pattern() -> re.Pattern:
    longest_first = sorted(cue_table(), key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b")


def find_cues(prompt: Prompt) -> tuple[Note, ...]:
    """A note for each word that makes some values of a protected attribute likelier than others."""
    text = " ".join(piece for piece in prompt.pieces if isinstance(piece, str))
    notes = []
    for cue in dict.fromkeys(m.group() for m in _cue_pattern().finditer(text)):
        reveals = {a: values for a, values in cue_table()[cue][0].items() if a in prompt.protect}
        if reveals:
            what = "; ".join(f"{attribute}: {' or '.join(values)}" for attribute, values in reveals.items())
            notes.append(Note("cue", cue, f"'{cue}' makes some candidates likelier ({what})", tuple(reveals)))
    return tuple(notes)


def neutralise(text: str) -> str:
    """Normalised text with each cue replaced by its neutral word, or dropped."""
    text = _cue_pattern().sub(lambda m: cue_table()[m.group()][1], text)
    text = re.sub(r"\b(an?)(?= +(\w+))", lambda m: article(m.group(2)), re.sub(r" {2,}", " ", text))
    return re.sub(r" +([,.;:!?])", r"\1", text).strip()


def literal_words(prompt: Prompt) -> Counter:
    """How often each word stands in the text outside slots: what the cloud reads whichever candidate is real."""
    return Counter(w for piece in prompt.pieces if isinstance(piece, str) for w in re.findall(r"[^\W_]+", piece))


def ask_about_misspellings(text: str, keep: frozenset[str] = frozenset()) -> None:
    """Raise a Question for the first word that is probably a misspelling of a sensitive one."""
    known = single_words()
    tokens = list(_WORD.finditer(text))
    for token, following in itertools.zip_longest(tokens, tokens[1:]):
        word = token.group()
        if word in keep:
            continue
        joined = word + following.group() if following and word not in known else ""
        if joined in known and len(joined) > 4 and not split_phrase(word, following.group()):
            raise Question(f"'{word} {following.group()}': do you mean '{joined}'? Write it as one word")
        if word in known or word in ordinary_words() or len(word) < 4 or word.isdigit():
            continue
        if near := meant_perhaps(word):
            raise Question(f"'{word}' is one letter from '{near}': correct it, or confirm it with keep=['{word}']")


def split_phrase(first: str, second: str) -> bool:
    """Whether the lexicon has the two words as a phrase of their own."""
    return any(phrase[:2] == (first, second) for phrase, _ in lexicon().phrases.get(first, ()))


@cache
def single_words() -> frozenset[str]:
    """The one-word phrases of the lexicon."""
    return frozenset(phrase[0] for rows in lexicon().phrases.values() for phrase, _ in rows if len(phrase) == 1)


@cache
def ordinary_words() -> frozenset[str]:
    """data/prompts/ordinary_words.txt: English words one letter from a sensitive one, that are no misspellings."""
    lines = (DATA / "ordinary_words.txt").read_text(encoding="utf-8").splitlines()
    return frozenset(line.strip() for line in lines if not line.startswith("#")) | lexicon().grammar["boundary"]


@lru_cache(maxsize=8192)
def meant_perhaps(word: str) -> str | None:
    """The sensitive word that is one letter away, if there is one."""
    return min(single_words() & edits(word), default=None)


def edits(word: str) -> set[str]:
    """All strings one insertion, deletion, replacement or swap of neighbours away from word."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    return (
        {a + b[1:] for a, b in cuts if b}
        | {a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1}
        | {a + c + b[1:] for a, b in cuts if b for c in letters}
        | {a + c + b for a, b in cuts for c in letters}
    )


# ---------------------------------------------------------------------------------- optional detectors beside the rules


def presidio(kinds: Mapping[str, str] = MappingProxyType({"NRP": "ethnicity", "AGE": "age"})) -> Detector:
    """Microsoft Presidio as a second detector (installed by the extra `presidio`): its entity kinds, by attribute."""
    model = "python -m spacy download en_core_web_lg"
    try:
        from presidio_analyzer import AnalyzerEngine
    except ImportError as error:
        raise PromptError(f"Presidio is not installed: pip install -e '.[presidio]', then {model}") from error
    try:
        engine = AnalyzerEngine()
    except (OSError, ValueError, SystemExit) as error:  # spaCy's download of a missing model exits when it fails
        raise PromptError(f"Presidio's language model cannot be loaded or reached: {model}") from error

    def detect(text: str) -> list[tuple[str, str]]:
        found = engine.analyze(text=text, language="en", entities=list(kinds))
        return [(kinds[entity.entity_type], text[entity.start : entity.end]) for entity in found]

    return detect


def token_classifier(name_or_path: str, kinds: Mapping[str, str]) -> Detector:
    """A Hugging Face token classifier by hub id or local folder as a second detector (the paper used a DistilBERT);
    kinds maps its labels, without B- and I-, to attributes."""
    from transformers import pipeline  # slow to import and rarely needed

    try:
        classify = pipeline("token-classification", model=name_or_path, aggregation_strategy="simple")
    except (OSError, ValueError) as error:
        message = f"the token classifier {name_or_path!r} cannot be loaded: give a folder that holds one, or a hub id"
        raise PromptError(f"{message} that this machine can reach") from error

    def detect(text: str) -> list[tuple[str, str]]:
        found = [entity for entity in classify(text) if entity["entity_group"] in kinds]
        return [(kinds[entity["entity_group"]], text[entity["start"] : entity["end"]]) for entity in found]

    return detect


# ------------------------------------------------------------------------------------------ how much the detector finds


LABELLED = ("detector_held_out.txt", "detector_set.txt")
LABELLED_PARTS = ("held-out", "held-out hard", "development", "development hard", "no person")


@dataclass(frozen=True)
class Labelled:
    """A labelled prompt: its part of the labelled sets, its text and its mentions (words, stated values)."""

    part: str
    text: str
    mentions: tuple[tuple[str, tuple[str, ...]], ...]


@cache
def labelled_set() -> tuple[Labelled, ...]:
    """The frozen labelled prompts of data/prompts/detector_*.txt. The detector is judged by the parts "held-out" and
    "held-out hard" (rare words, misspellings), which it met only when it was finished; "development", "development
    hard" and "no person" were measured first, and the rules were then improved."""
    rows, part = [], ""
    lines = [line for name in LABELLED for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if line.startswith("## "):
            part = line[3:].strip()
        elif line.strip() and not line.startswith("#"):
            mentions = re.findall(r"\[([^\]]*)\]\(([^)]*)\)", line)
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line)
            rows.append(Labelled(part, text, tuple((words, tuple(values.split())) for words, values in mentions)))
    return tuple(rows)


def missed_mentions(row: Labelled) -> tuple[list[tuple[str, str]], str]:
    """The (words, value) of a labelled prompt that would reach the cloud as they are, and "read" or "refused".

    A mention is caught if its value is among the prompt's and its words stand in no literal text, or if the prompt is
    refused or asked about, so that nothing is sent.
    """
    try:
        prompt = parse(row.text)
    except PromptError:
        return [], "refused"
    left = literal_words(prompt)
    marked = Counter(w for words, _ in row.mentions for w in re.findall(r"[^\W_]+", normalise(words)))
    unmarked = Counter(re.findall(r"[^\W_]+", normalise(row.text))) - marked
    known = {value for _, value in prompt.values}
    missed = []
    for words, values in row.mentions:
        survives = all(left[w] > unmarked[w] for w in re.findall(r"[^\W_]+", normalise(words)))
        missed += [(words, value) for value in values if survives or value not in known]
    return missed, "read"


def detector_table(parts: Iterable[str] = LABELLED_PARTS) -> list[dict]:
    """Rows (part, measure, hits, n, share, low, high): recall by mention, by attribute and by whole prompt, the share
    of prompts refused, and precision by stated value; low and high are two-sided 95 % Clopper-Pearson bounds."""
    rows = []
    for part in parts:
        labelled = [row for row in labelled_set() if row.part == part]
        results = [missed_mentions(row) for row in labelled]
        attribute = {value: name for name, values in ATTRIBUTES.items() for value in values} | {"other": "ethnicity"}
        counts: dict[str, list[int]] = {}

        def count(measure: str, hit: bool, counts: dict[str, list[int]] = counts) -> None:
            pair = counts.setdefault(measure, [0, 0])
            pair[0] += hit
            pair[1] += 1

        for row, (missed, outcome) in zip(labelled, results, strict=True):
            for words, values in row.mentions:
                for value in values:
                    count("recall", (words, value) not in missed)
                    count(f"recall of {attribute[value]}", (words, value) not in missed)
            if row.mentions:
                count("prompts without a miss", not missed)
            count("prompts refused", outcome == "refused")
            if outcome == "read":
                stated = {value for _, values in row.mentions for value in values}
                for _, value in parse(row.text).values:
                    count("precision", value in stated)
        for measure, (hits, n) in counts.items():
            low, high = clopper_pearson(hits, n)
            bounds = {"share": hits / n, "low": low, "high": high}
            rows.append({"part": part, "measure": measure, "hits": hits, "n": n} | bounds)
    return rows


def clopper_pearson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact two-sided confidence interval of a share, from hits of n."""
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"{hits} hits of {n} are no share: need 0 <= hits <= n and n > 0")
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, n - hits + 1))
    high = 1.0 if hits == n else float(beta.ppf(1 - tail, hits + 1, n - hits))
    return low, high
