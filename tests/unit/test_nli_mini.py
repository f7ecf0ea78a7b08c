"""The labels of `nli_mini` are confirmed here from the English text alone.

A sentence is parsed with this file's own grammar and lexicon, and the two sentences of a pair are
compared over every world: a world is a multiset of entities, and an entity matters only through the
sets that the sentences count, which it is or is not a member of.
"""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import chain, combinations, product
from typing import NamedTuple

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from forgelm.tasks.nli_mini import LABELS, SPLITS, Pair, generate

VALIDATIONS = SPLITS[1:]
PARENTS = {
    **dict.fromkeys(("dog", "bird", "horse"), "animal"),
    **dict.fromkeys(("musician", "doctor", "athlete"), "person"),
    **dict.fromkeys(("car", "truck", "boat"), "vehicle"),
    **dict.fromkeys(("poodle", "beagle", "terrier"), "dog"),
    **dict.fromkeys(("sparrow", "robin", "parrot"), "bird"),
    **dict.fromkeys(("racehorse", "stallion", "mare"), "horse"),
    **dict.fromkeys(("pianist", "violinist", "drummer"), "musician"),
    **dict.fromkeys(("surgeon", "dentist", "pediatrician"), "doctor"),
    **dict.fromkeys(("swimmer", "runner", "skater"), "athlete"),
    **dict.fromkeys(("taxi", "limousine", "convertible"), "car"),
    **dict.fromkeys(("tanker", "pickup"), "truck"),
    **dict.fromkeys(("canoe", "kayak", "yacht"), "boat"),
}
NOUNS = {*PARENTS, *PARENTS.values()}
INFINITIVES = {
    **{"ran": "run", "slept": "sleep", "drank": "drink", "ate": "eat", "hid": "hide"},
    **{"smiled": "smile", "waited": "wait", "sang": "sing", "danced": "dance", "won": "win"},
    **{"stopped": "stop", "arrived": "arrive", "turned": "turn", "left": "leave", "slid": "slide"},
}
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
PREPOSITION = r"(?:in|on|at|near|by|behind|before|after)"
NUMBER = rf"(?:{'|'.join(NUMBERS)})"
QUANTIFIER = (
    rf"(?:at least|more than|fewer than|exactly|only) {NUMBER}"
    r"|not every|not all|not one|some|no|every|each|all"
)
SENTENCE = re.compile(
    rf"(?P<quantifier>{QUANTIFIER}) (?P<noun>[a-z ]+?) "
    rf"(?P<verb>{'|'.join(INFINITIVES)}|did not (?:{'|'.join(INFINITIVES.values())}))"
    rf"(?: (?P<place>{PREPOSITION} [a-z ]+))?"
)


class Quantity(NamedTuple):
    """How many did something, or with `negated` did not."""

    quantifier: str
    number: int
    negated: bool


class Topic(NamedTuple):
    """The `head`s with all of `modifiers`, and an action at a place, or anywhere if that is ""."""

    head: str
    modifiers: frozenset[str]
    verb: str
    place: str


Counts = tuple[int, ...]


def singular_of(noun: str) -> tuple[str, bool]:
    """Return the singular of a noun and whether the noun is one."""
    if noun in NOUNS:
        return noun, True
    assert noun == "people" or noun.endswith("s"), noun
    return ("person" if noun == "people" else noun[:-1]), False


@cache
def parse(sentence: str) -> tuple[Quantity, Topic]:
    assert sentence.endswith(".")
    assert sentence[0].isupper()
    match = SENTENCE.fullmatch(sentence[:-1].lower())
    assert match, sentence
    quantifier, _, number = match["quantifier"].rpartition(" ")
    if number not in NUMBERS or quantifier == "not":
        quantifier, number = match["quantifier"], "one"  # "some dogs" is at least one.
    *modifiers, last = match["noun"].split()
    head, is_singular = singular_of(last)
    assert head in NOUNS, sentence
    takes_singular = quantifier in ("every", "each", "not every", "not one") or (
        quantifier == "at least" and number == "one"
    )
    assert quantifier == "no" or takes_singular == is_singular, sentence
    verb = INFINITIVES.get(match["verb"], match["verb"].split()[-1])
    return (
        Quantity(quantifier, NUMBERS[number], match["verb"].startswith("did not ")),
        Topic(head, frozenset(modifiers), verb, match["place"] or ""),
    )


def holds(quantity: Quantity, did: int, did_not: int) -> bool:
    """Tell whether a sentence is true when so many members of its class did and did not act."""
    if quantity.negated:
        did, did_not = did_not, did
    match quantity.quantifier:
        case "some" | "at least":
            return did >= quantity.number
        case "more than":
            return did > quantity.number
        case "fewer than":
            return did < quantity.number
        case "exactly" | "only":
            return did == quantity.number
        case "no" | "not one":
            return did == 0
        case "every" | "each" | "all":
            return did_not == 0
        case "not every" | "not all":
            return did_not > 0
    raise AssertionError(quantity)


def is_a(kind: str | None, head: str) -> bool:
    while kind is not None and kind != head:
        kind = PARENTS.get(kind)
    return kind == head


def subsets(items: frozenset[str]) -> list[frozenset[str]]:
    sizes = range(len(items) + 1)
    return [frozenset(c) for c in chain.from_iterable(combinations(items, n) for n in sizes)]


def census(
    topic: Topic, kind: str | None, modifiers: frozenset[str], deeds: frozenset[str]
) -> Counts:
    """Return what an entity adds to the numbers of those who did and who did not."""
    if not (is_a(kind, topic.head) and topic.modifiers <= modifiers):
        return 0, 0
    acted = {topic.verb, topic.place} - {""} <= deeds
    return int(acted), int(not acted)


@cache
def possible_entities(first: Topic, second: Topic) -> frozenset[Counts]:
    """Return what each possible entity adds to the two counts of either sentence.

    A deed is the action itself, or its having taken place somewhere, which implies the action.
    """
    assert first.verb == second.verb
    kinds = (first.head, second.head, None)
    modifiers = subsets(first.modifiers | second.modifiers)
    places = subsets(frozenset({first.place, second.place} - {""}))
    deeds = [frozenset(), *(place | {first.verb} for place in places)]
    return frozenset(
        census(first, *entity) + census(second, *entity)
        for entity in product(kinds, modifiers, deeds)
    )


@cache
def possible_worlds(entities: frozenset[Counts], limit: int) -> list[Counts]:
    """Return the counts in every world, of any size, where counts above `limit` read `limit`."""
    empty: Counts = (0, 0, 0, 0)
    worlds, fresh = {empty}, [empty]
    while fresh:
        world = fresh.pop()
        for entity in entities:
            larger = tuple(min(x + y, limit) for x, y in zip(world, entity, strict=True))
            if larger not in worlds:
                worlds.add(larger)
                fresh.append(larger)
    # Existential import: neither class is empty.
    return [world for world in worlds if world[0] + world[1] and world[2] + world[3]]


@cache
def decide(premise: Quantity, hypothesis: Quantity, entities: frozenset[Counts]) -> str:
    # No sentence tells counts above the largest number from each other.
    worlds = possible_worlds(entities, max(premise.number, hypothesis.number) + 1)
    outcomes = {holds(hypothesis, c, d) for a, b, c, d in worlds if holds(premise, a, b)}
    assert outcomes, "no world makes the premise true"
    return "neutral" if len(outcomes) == 2 else LABELS[0] if True in outcomes else LABELS[2]


def relation(pair: Pair) -> str:
    (premise, first), (hypothesis, second) = parse(pair.premise), parse(pair.hypothesis)
    return decide(premise, hypothesis, possible_entities(first, second))


def patterns(pair: Pair) -> set[tuple[str, bool]]:
    """Return the wordings of the sentences without numbers, nouns, modifiers, verbs and places."""
    quantities = [parse(text)[0] for text in (pair.premise, pair.hypothesis)]
    return {(quantity.quantifier, quantity.negated) for quantity in quantities}


def words(pair: Pair) -> set[str]:
    return set(re.findall(r"[a-z]+", f"{pair.premise} {pair.hypothesis}".lower()))


def accuracy_of_one_side(side: Callable[[Pair], str], split: str) -> float:
    train, test = generate("train"), generate(split)
    model = make_pipeline(
        CountVectorizer(ngram_range=(1, 3), token_pattern=r"\S+", min_df=2),
        LogisticRegression(max_iter=60),
    )
    model.fit([side(pair) for pair in train], [pair.label for pair in train])
    return float(model.score([side(pair) for pair in test], [pair.label for pair in test]))


@pytest.mark.parametrize(
    ("premise", "hypothesis", "expected"),
    [
        ("Every dog ran.", "Some poodles ran.", "entailment"),
        ("Some poodles ran.", "Some dogs ran.", "entailment"),
        ("Some dogs ran.", "Some poodles ran.", "neutral"),
        ("No animals ran.", "No dog ran in the garden.", "entailment"),
        ("No dog ran in the garden.", "No animals ran.", "neutral"),
        ("Exactly three black dogs ran.", "Fewer than three animals ran.", "contradiction"),
        ("Not all dogs ran.", "Some dogs ran.", "neutral"),
        ("Each dog ran.", "At least one animal did not run.", "neutral"),
        ("Not one wet dog ran.", "All dogs ran in the garden.", "contradiction"),
        ("Only two dogs ran.", "At least three poodles ran.", "contradiction"),
        ("At least three dogs ran.", "More than two animals ran.", "entailment"),
    ],
)
def test_oracle_on_pairs_judged_by_hand(premise: str, hypothesis: str, expected: str) -> None:
    assert relation(Pair(premise, hypothesis, 0)) == expected


@pytest.mark.parametrize("split", SPLITS)
def test_every_label_holds_in_all_worlds(split: str) -> None:
    wrong = [pair for pair in generate(split) if relation(pair) != LABELS[pair.label]]
    assert wrong == []


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="validation_mismatched"):
        generate("test")


def test_the_answer_is_the_callers_own() -> None:
    generate("train").clear()
    assert generate("train")


def test_same_pairs_in_every_process() -> None:
    code = (
        "import hashlib; from forgelm.tasks.nli_mini import SPLITS, generate;"
        "print(hashlib.sha256(repr([generate(s) for s in SPLITS]).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "1", "4242")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_balanced_for_each_sentence_of_either_side(split: str) -> None:
    pairs = generate(split)
    assert len(set(Counter(pair.label for pair in pairs).values())) == 1
    for side in ("premise", "hypothesis"):
        by_label = [
            Counter(getattr(pair, side) for pair in pairs if pair.label == label)
            for label in range(len(LABELS))
        ]
        assert by_label[0] == by_label[1] == by_label[2]


def test_sizes() -> None:
    assert 8_000 <= len(generate("train")) <= 12_000
    assert all(1_000 <= len(generate(split)) <= 2_000 for split in VALIDATIONS)


def test_no_pair_occurs_twice() -> None:
    pairs = [(pair.premise, pair.hypothesis) for split in SPLITS for pair in generate(split)]
    assert len(set(pairs)) == len(pairs)


def test_matched_has_the_words_and_patterns_of_train() -> None:
    train, pairs = generate("train"), generate("validation_matched")
    for features in (words, patterns):
        assert set().union(*map(features, pairs)) <= set().union(*map(features, train))


@pytest.mark.parametrize(("features", "share"), [(words, 0.6), (patterns, 0.25)])
def test_mismatched_has_unseen_words_and_patterns(
    features: Callable[[Pair], set[object]], share: float
) -> None:
    train, pairs = generate("train"), generate("validation_mismatched")
    known = set().union(*map(features, train))
    assert sum(not features(pair) <= known for pair in pairs) > share * len(pairs)


@pytest.mark.parametrize("split", VALIDATIONS)
@pytest.mark.parametrize("side", ["premise", "hypothesis"])
def test_one_sentence_alone_does_not_tell_the_label(side: str, split: str) -> None:
    accuracy = accuracy_of_one_side(lambda pair: getattr(pair, side), split)
    assert abs(accuracy - 1 / len(LABELS)) < 0.03
