"""A small natural-language-inference task in MNLI's format, made by a deterministic generator.

A sentence, such as ``Not every black dog ran in the garden.``, bounds one of two counts: how many
members of a class *R* (``black dog``) did *V* (``ran in the garden``), or how many did not.

=========================================  ==================================
wording                                    meaning
=========================================  ==================================
some, at least one                         at least 1 *R* did
no, not one                                at most 0 *R* did
every, each, all                           at most 0 *R* did not
not every, not all,                        at least 1 *R* did not
some / at least one ... did not
at least N, more than N, fewer than N      the bound named, on the *R* that did
exactly N, only N                          at least N and at most N *R* did
=========================================  ==================================

A premise and a hypothesis are compared over all worlds in which

1. a member of a narrower class is one of the wider (a poodle is a dog, a dog is an animal, a black
   dog is a dog), and who did something somewhere did it;
2. each class that either sentence names has a member (existential import), so that ``Every dog
   ran.`` entails ``Some poodles ran.``.

The label is "entailment" if the hypothesis holds in every such world in which the premise holds,
"contradiction" if in none of them, else "neutral".

Pairs are made in blocks of four premises and four hypotheses in which each sentence is in one pair
of every label, so nothing in one sentence alone tells the label. The mismatched split has nouns,
qualifiers, verbs, places and wordings of the quantifiers that training has not.
"""

import random
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any, NamedTuple

LABELS: tuple[str, ...] = ("entailment", "neutral", "contradiction")
SPLITS: tuple[str, ...] = ("train", "validation_matched", "validation_mismatched")

ENTAILMENT, NEUTRAL, CONTRADICTION = range(3)

_BLOCKS = {"train": 1000, "validation_matched": 125, "validation_mismatched": 125}
_NUMBERS = ("two", "three", "four", "five", "six")
_FORM_BLOCKS = 320
# In so many blocks, a neutral pair has the quantities of a pair with another label, so that the
# quantifiers do not give the label away.
_SAME_QUANTITIES = 0.75
_PLURALS = {"person": "people"}
_QUANTIFIERS = ("some", "no", "every", "not every")
_NUMBERED = ("at least", "more than", "fewer than", "exactly")
_QUANTITIES = (*((q, 0) for q in _QUANTIFIERS), *((q, n) for q in _NUMBERED for n in (0, 1)))


class Pair(NamedTuple):
    """A premise, a hypothesis and the index in `LABELS` of the relation between them."""

    premise: str
    hypothesis: str
    label: int


class _Claim(NamedTuple):
    """A bound on the number of members of a class that did an action, or that did not."""

    at_least: bool
    bound: int
    negated: bool
    wide: bool
    qualified: bool
    placed: bool


class _Form(NamedTuple):
    """A sentence without its words: its quantity, and which words of its block it uses."""

    quantifier: str
    number: int
    wide: bool
    qualified: bool
    placed: bool


_Quantity = tuple[str, int]
_Signature = tuple[_Quantity, _Quantity, _Quantity, _Quantity]
_Rows = tuple[tuple[_Form, _Form], ...]


class _Domain(NamedTuple):
    """Words that make plausible sentences together.

    nouns: chains of nouns, each a case of the next. qualifiers: templates for a narrower class.
    verbs: past tense and infinitive. places: adverbials that narrow an action.
    """

    nouns: tuple[tuple[str, ...], ...]
    qualifiers: tuple[str, ...]
    verbs: tuple[tuple[str, str], ...]
    places: tuple[str, ...]


class _Style(NamedTuple):
    """The words and sentence patterns of a split."""

    domains: tuple[_Domain, ...]
    patterns: dict[str, tuple[str, ...]]


def _chains(top: str, **families: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple((name, family, top) for family, names in families.items() for name in names)


_TRAIN_STYLE = _Style(
    domains=(
        _Domain(
            nouns=_chains(
                "animal",
                dog=("poodle", "beagle", "terrier", "guide dog"),
                bird=("sparrow", "robin", "parrot", "garden bird"),
                horse=("racehorse", "stallion", "mare", "farm horse"),
            ),
            qualifiers=("black {}", "white {}", "brown {}", "hungry {}", "muddy {}"),
            verbs=(("ran", "run"), ("slept", "sleep"), ("drank", "drink"), ("ate", "eat")),
            places=("in the garden", "near the river", "behind the house", "before noon"),
        ),
        _Domain(
            nouns=_chains(
                "person",
                musician=("pianist", "violinist", "drummer", "jazz musician"),
                doctor=("surgeon", "dentist", "pediatrician", "eye doctor"),
                athlete=("swimmer", "runner", "skater", "college athlete"),
            ),
            qualifiers=("tired {}", "cheerful {}", "French {}", "Italian {}", "bearded {}"),
            verbs=(("smiled", "smile"), ("waited", "wait"), ("sang", "sing"), ("danced", "dance")),
            places=("at the station", "in the hall", "after lunch", "on the stairs"),
        ),
        _Domain(
            nouns=_chains(
                "vehicle",
                car=("taxi", "limousine", "convertible", "sports car"),
                truck=("tanker", "pickup", "tow truck", "fire truck"),
                boat=("canoe", "kayak", "yacht", "river boat"),
            ),
            qualifiers=("red {}", "blue {}", "yellow {}", "rented {}", "electric {}"),
            verbs=(
                ("stopped", "stop"),
                ("arrived", "arrive"),
                ("turned", "turn"),
                ("left", "leave"),
            ),
            places=("near the bridge", "at midnight", "in the fog", "before dawn"),
        ),
    ),
    patterns={
        "some": ("some {many} {did}", "at least one {one} {did}"),
        "no": ("no {many} {did}", "no {one} {did}"),
        "every": ("every {one} {did}", "all {many} {did}"),
        "not every": (
            "not every {one} {did}",
            "not all {many} {did}",
            "some {many} did not {do}",
        ),
        "at least": ("at least {number} {many} {did}",),
        "more than": ("more than {number} {many} {did}",),
        "fewer than": ("fewer than {number} {many} {did}",),
        "exactly": ("exactly {number} {many} {did}",),
    },
)

_MISMATCHED_STYLE = _Style(
    domains=(
        _Domain(
            nouns=_chains(
                "animal",
                dog=("lap dog", "pet dog", "farm dog"),
                bird=("sea bird", "pet bird", "river bird"),
                horse=("cart horse", "war horse", "guide horse"),
            ),
            qualifiers=("wet {}", "brown {}", "hungry {}", "muddy {}"),
            verbs=(("hid", "hide"), ("ran", "run"), ("slept", "sleep"), ("ate", "eat")),
            places=("in the hut", "near the bridge", "in the fog"),
        ),
        _Domain(
            nouns=_chains(
                "person",
                musician=("pop musician", "folk musician", "college musician"),
                doctor=("ship doctor", "camp doctor", "college doctor"),
                athlete=("pro athlete", "teen athlete", "ice athlete"),
            ),
            qualifiers=("shy {}", "tired {}", "cheerful {}", "hungry {}"),
            verbs=(("won", "win"), ("smiled", "smile"), ("sang", "sing"), ("waited", "wait")),
            places=("in the pub", "in the garden", "before noon"),
        ),
        _Domain(
            nouns=_chains(
                "vehicle",
                car=("race car", "mail car", "farm car"),
                truck=("oil truck", "mail truck", "farm truck"),
                boat=("tug boat", "ice boat", "fire boat"),
            ),
            qualifiers=("wet {}", "blue {}", "yellow {}", "muddy {}"),
            verbs=(("slid", "slide"), ("stopped", "stop"), ("turned", "turn"), ("left", "leave")),
            places=("near the inn", "near the river", "after lunch"),
        ),
    ),
    patterns={
        "some": ("some {many} {did}", "at least one {one} {did}"),
        "no": ("not one {one} {did}", "no {one} {did}", "no {many} {did}"),
        "every": ("each {one} {did}", "every {one} {did}", "all {many} {did}"),
        "not every": (
            "at least one {one} did not {do}",
            "not every {one} {did}",
            "not all {many} {did}",
        ),
        "at least": ("at least {number} {many} {did}",),
        "more than": ("more than {number} {many} {did}",),
        "fewer than": ("fewer than {number} {many} {did}",),
        "exactly": ("exactly {number} {many} {did}", "only {number} {many} {did}"),
    },
)

_STYLES = {
    "train": _TRAIN_STYLE,
    "validation_matched": _TRAIN_STYLE,
    "validation_mismatched": _MISMATCHED_STYLE,
}


def generate(split: str) -> list[Pair]:
    """Return the pairs of a split, the same in every process, with equally many of each label.

    Raises:
        ValueError: `split` is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; valid splits: {', '.join(SPLITS)}")
    return list(_generate(split))


def rows(split: str) -> list[dict[str, Any]]:
    """The pairs of a split as `generate` makes them, a dict each."""
    return [pair._asdict() for pair in generate(split)]


def features() -> Any:
    """The columns' types, the labels' names among them."""
    from datasets import ClassLabel, Features, Value

    text = Value("string")
    return Features(premise=text, hypothesis=text, label=ClassLabel(names=list(LABELS)))


@cache
def _generate(split: str) -> tuple[Pair, ...]:
    rng = random.Random(f"nli_mini/{split}")
    earlier = SPLITS[: SPLITS.index(split)]
    taken = {pair for other in earlier for pair in _generate(other)}
    pairs: list[Pair] = []
    while len(pairs) < 12 * _BLOCKS[split]:
        block = _block(_STYLES[split], rng)
        if taken.isdisjoint(block):
            taken.update(block)
            pairs.extend(block)
    rng.shuffle(pairs)
    return tuple(pairs)


def _block(style: _Style, rng: random.Random) -> list[Pair]:
    """Return four premises and four hypotheses on one topic, each paired once per label."""
    forms, neutral = rng.choice(_balanced_forms())
    write = _writer(style, rng)
    premises = [write(premise) for premise, _ in forms]
    hypotheses = [write(hypothesis) for _, hypothesis in forms]
    partners = {ENTAILMENT: (0, 1, 2, 3), NEUTRAL: neutral, CONTRADICTION: (1, 0, 3, 2)}
    return [
        Pair(premises[i], hypotheses[j], label)
        for label, row in partners.items()
        for i, j in enumerate(row)
    ]


@cache
def _balanced_forms() -> list[tuple[_Rows, tuple[int, ...]]]:
    """Return many two `_opposites`, each with the neutral hypothesis of each of its premises."""
    rng = random.Random("nli_mini/forms")
    found: list[tuple[_Rows, tuple[int, ...]]] = []
    while len(found) < _FORM_BLOCKS:
        first = _signature(rng)
        second = first if rng.random() < _SAME_QUANTITIES else _signature(rng)
        if not _opposites(*first) or not _opposites(*second):
            continue
        for _ in range(40):
            rows = rng.choice(_opposites(*first)) + rng.choice(_opposites(*second))
            neutral = rng.choice(((2, 3, 0, 1), (3, 2, 1, 0)))
            if all(_relate(rows[i][0], rows[j][1]) == NEUTRAL for i, j in enumerate(neutral)):
                found.append((rows, neutral))
                break
    return found


def _signature(rng: random.Random) -> _Signature:
    """Choose the quantities of two entailing pairs that contradict each other."""
    while True:
        first, second = _quantity(rng), _quantity(rng)
        kept = _answers(first, ENTAILMENT) & _answers(second, CONTRADICTION)
        denied = _answers(second, ENTAILMENT) & _answers(first, CONTRADICTION)
        if kept and denied:
            return first, rng.choice(sorted(kept)), second, rng.choice(sorted(denied))


def _quantity(rng: random.Random) -> _Quantity:
    quantifier = rng.choice(_QUANTIFIERS + _NUMBERED)
    return quantifier, rng.randrange(2) if quantifier in _NUMBERED else 0


@cache
def _answers(quantity: _Quantity, label: int) -> frozenset[_Quantity]:
    """Return the quantities of hypotheses that can have this label with such a premise."""
    return frozenset(
        other
        for other in _QUANTITIES
        for premise, hypothesis in product(_forms(quantity), _forms(other))
        if premise != hypothesis and _relate(premise, hypothesis) == label
    )


@cache
def _opposites(
    first: _Quantity, kept: _Quantity, second: _Quantity, denied: _Quantity
) -> list[_Rows]:
    """Return all two entailing (premise, hypothesis), each contradicting the other's hypothesis."""
    return [
        ((a, b), (c, d))
        for a, b in product(_forms(first), _forms(kept))
        if a != b and _relate(a, b) == ENTAILMENT
        for c in _forms(second)
        if _relate(c, b) == CONTRADICTION
        for d in _forms(denied)
        if c != d and _relate(c, d) == ENTAILMENT and _relate(a, d) == CONTRADICTION
    ]


def _writer(style: _Style, rng: random.Random) -> Callable[[_Form], str]:
    """Choose the words of a block; return what makes a sentence of a form with them."""
    domain = rng.choice(style.domains)
    chain = rng.choice(domain.nouns)
    narrow = rng.randrange(len(chain) - 1)
    nouns = chain[narrow], rng.choice(chain[narrow + 1 :])
    qualifier, place = rng.choice(domain.qualifiers), rng.choice(domain.places)
    did, do = rng.choice(domain.verbs)
    first_number = rng.randrange(len(_NUMBERS) - 1)

    def write(form: _Form) -> str:
        noun = nouns[form.wide]
        template = qualifier if form.qualified else "{}"
        clause = rng.choice(style.patterns[form.quantifier]).format(
            one=template.format(noun),
            many=template.format(_PLURALS.get(noun, noun + "s")),
            number=_NUMBERS[first_number + form.number],
            did=did,
            do=do,
        )
        text = f"{clause} {place}" if form.placed else clause
        return text[0].upper() + text[1:] + "."

    return write


@cache
def _forms(quantity: _Quantity) -> list[_Form]:
    return [_Form(*quantity, *flags) for flags in product((False, True), repeat=3)]


@cache
def _relate(premise: _Form, hypothesis: _Form) -> int:
    known = _claims(premise)
    asked = _claims(hypothesis)
    known_all = known + _imports(known, (premise, hypothesis))
    asked_all = asked + _imports(asked, (premise, hypothesis))
    if any(_excludes(k, a) for k in known_all for a in asked_all):
        return CONTRADICTION
    if all(any(_implies(k, a) for k in known_all) for a in asked):
        return ENTAILMENT
    return NEUTRAL


def _claims(form: _Form) -> list[_Claim]:
    # The two numbers of a block are n and n + 1 with n > 1, and all such n give equal relations.
    n = 2 + form.number
    bounds = {
        "some": [(True, 1, False)],
        "no": [(False, 0, False)],
        "every": [(False, 0, True)],
        "not every": [(True, 1, True)],
        "at least": [(True, n, False)],
        "more than": [(True, n + 1, False)],
        "fewer than": [(False, n - 1, False)],
        "exactly": [(True, n, False), (False, n, False)],
    }[form.quantifier]
    return [_Claim(*bound, form.wide, form.qualified, form.placed) for bound in bounds]


def _imports(claims: list[_Claim], named: tuple[_Form, ...]) -> list[_Claim]:
    """Return what `claims` imply of the named classes because none of these is empty."""
    return [
        _Claim(True, 1, not claim.negated, form.wide, form.qualified, claim.placed)
        for claim in claims
        for form in named
        if claim.bound == 0 and form.wide <= claim.wide and form.qualified >= claim.qualified
    ]


def _within(inner: _Claim, outer: _Claim) -> bool:
    """Tell whether all that `inner` counts is among what `outer` counts."""
    classes = inner.wide <= outer.wide and inner.qualified >= outer.qualified
    narrow, broad = (outer, inner) if inner.negated else (inner, outer)
    return classes and inner.negated == outer.negated and narrow.placed >= broad.placed


def _implies(known: _Claim, asked: _Claim) -> bool:
    if known.at_least != asked.at_least:
        return False
    if known.at_least:
        return _within(known, asked) and known.bound >= asked.bound
    return _within(asked, known) and known.bound <= asked.bound


def _excludes(one: _Claim, other: _Claim) -> bool:
    lower, upper = (one, other) if one.at_least else (other, one)
    if not lower.at_least or upper.at_least:
        return False
    return _within(lower, upper) and lower.bound > upper.bound
