"""Colours and sizes that an answer gives to things, against labels and texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from filters.instruct.evidence import Evidence, negated
from filters.instruct.vocabulary import Noun, vocabulary
from filters.instruct.words import FUNCTION, words_of

_COLOURS = {
    word: colour
    for colour, words in {
        "red": "red reddish crimson scarlet maroon",
        "orange": "orange",
        "yellow": "yellow yellowish golden gold blonde blond",
        "green": "green greenish",
        "blue": "blue bluish navy turquoise teal",
        "purple": "purple violet",
        "pink": "pink",
        "brown": "brown brownish tan beige",
        "black": "black",
        "white": "white whitish",
        "grey": "grey gray greyish grayish silver",
    }.items()
    for word in words.split()
}
_SIZES = {
    word: size
    for size, words in {"large": "large big huge giant", "small": "small little tiny"}.items()
    for word in words.split()
}
_BY_NATURE = {
    "green": words_of("grass tree plant bush leaf forest hill field flower broccoli lettuce vegetable vine"),
    "blue": words_of("sky ocean lake river water pool"),
    "white": words_of("snow cloud wave ice"),
    "yellow": words_of("banana sunflower lemon"),
    "red": words_of("strawberry tomato cherry"),
    "orange": words_of("carrot orange pumpkin"),
    "brown": words_of("tree branch path"),
}
"""Colours that go without saying."""


def attribute_faults(sentences: Sequence[Sequence[str]], evidence: Evidence) -> Iterator[str]:
    """Colours that no text and no label has, and colours and sizes that none of a thing's labels has, in words."""
    for words in sentences:
        if _COLOURS.keys().isdisjoint(words) and _SIZES.keys().isdisjoint(words):
            continue
        denied = negated(words)
        for noun in evidence.nouns(words):
            if noun.start in denied:
                continue
            given = list(_given(words, noun))
            if given and (wrong := _wrong(noun, given, evidence)):
                yield f"{wrong} {noun.words}: neither texts nor boxes have it"


def _given(words: Sequence[str], noun: Noun) -> Iterator[str]:
    at = noun.start
    while at and noun.start - at < 5 and (words[at - 1] not in FUNCTION or words[at - 1] in ("and", ",")):
        at -= 1
        if words[at] in _COLOURS or words[at] in _SIZES:
            yield words[at]
    at = noun.end + (words[noun.end : noun.end + 1] == ["that"])
    if words[at : at + 1] in (["is"], ["are"]):
        for word in words[at + 1 : at + 6]:
            if word in _COLOURS or word in _SIZES:
                yield word
            elif word not in ("and", ","):
                break


def _wrong(noun: Noun, given: Sequence[str], evidence: Evidence) -> str | None:
    things = [thing for thing in evidence.labelled if thing.is_a(noun.name.concepts)]
    fits = [True] * len(things)
    for word in given:
        kind = _COLOURS if word in _COLOURS else _SIZES
        values = [{kind[own] for own in thing.adjectives if own in kind} for thing in things]
        if values and all(values):
            fits = [fit and kind[word] in own for fit, own in zip(fits, values, strict=True)]
            if not any(fits):
                return word
        elif kind is _COLOURS and not any(kind[word] in own for own in values) and not _is_told(noun, word, evidence):
            return word
    return None


def _is_told(noun: Noun, word: str, evidence: Evidence) -> bool:
    value = _COLOURS[word]
    return any(_COLOURS.get(own) == value for own in evidence.words) or not _BY_NATURE.get(
        value, frozenset()
    ).isdisjoint(above for concept in noun.name.concepts for above in vocabulary().kinds.get(concept, ()))
