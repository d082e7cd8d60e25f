"""What a context licenses: the nouns, counts and relations of its texts, and the labels of its boxes."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from filters.instruct.leaks import without_demands
from filters.instruct.vocabulary import Name, Noun, plural, vocabulary
from filters.instruct.words import (
    CONJUNCTIONS,
    DETERMINERS,
    FUNCTION,
    PREPOSITIONS,
    PRONOUNS,
    VERBS,
    number,
    sentences,
    tamed,
    words_of,
)
from pairmill.boxes import Box
from pairmill.instructions import Context


@dataclass(frozen=True)
class Labelled:
    """A box and what its label says."""

    box: Box
    concepts: frozenset[str]
    adjectives: frozenset[str]

    def is_a(self, concepts: frozenset[str]) -> bool:
        """Whether the thing is one of these."""
        kinds = vocabulary().kinds
        return any(not kinds.get(own, frozenset({own})).isdisjoint(concepts) for own in self.concepts)

    def may_be(self, concepts: frozenset[str]) -> bool:
        """Whether the thing may be one of these, its label being the more general (``person`` for a woman)."""
        kinds = vocabulary().kinds
        return any(not kinds.get(concept, frozenset()).isdisjoint(self.concepts) for concept in concepts)


@dataclass(frozen=True)
class Evidence:
    """Of one context; see `evidence_of`."""

    labelled: tuple[Labelled, ...]
    names: dict[str, Name]
    """Of labels that the vocabulary does not know."""
    texts: tuple[tuple[tuple[str, ...], tuple[Noun, ...]], ...]
    """Sentences of the texts and the nouns in them."""
    words: frozenset[str]
    licensed: frozenset[str]
    """Concepts that may be named."""
    mentioned: frozenset[str]
    """Concepts that the texts name as present, and what these are kinds of."""
    plurals: frozenset[str]
    """Concepts that the texts name in the plural, and what these are kinds of."""
    crowded: frozenset[str]
    adjectives: frozenset[str]
    """Of the labels."""
    known: dict[str, list[Any]] = field(default_factory=dict)
    """What other modules found in the texts, found once."""

    def nouns(self, tokens: Sequence[str]) -> list[Noun]:
        """The nouns of a sentence that name a thing: no verbs, no words that qualify the noun behind them."""
        found = vocabulary().find(tokens, self.names)
        nouns = [noun for noun in found if _is_noun(noun, tokens, found)]
        return [noun for at, noun in enumerate(nouns) if at + 1 == len(nouns) or not _qualifies(noun, nouns[at + 1])]

    def licenses(self, name: Name) -> bool:
        """Whether something of this name may be said to be in the picture."""
        return name.free or not name.concepts.isdisjoint(self.licensed)

    def licenses_kind(self, name: Name) -> bool:
        """Whether something that this name is a kind of may be said to be in the picture."""
        kinds = vocabulary().kinds
        return any(not kinds.get(concept, frozenset()).isdisjoint(self.licensed) for concept in name.concepts)

    def is_crowded(self, concepts: frozenset[str]) -> bool:
        """Whether instances of these are unboxed or lumped together."""
        kinds = vocabulary().kinds
        return any(
            not kinds.get(crowd, frozenset({crowd})).isdisjoint(concepts)
            or any(crowd in kinds.get(concept, ()) for concept in concepts)
            for crowd in self.crowded
        )


def _qualifies(noun: Noun, behind: Noun) -> bool:
    """``pizza`` in ``pizza box``; ``man`` and ``waves`` in ``the man waves`` are
    no such pair, nor ``elephant family``."""
    return (
        behind.words not in _GROUPS
        and noun.end == behind.start
        and not noun.name.plural
        and not (behind.name.homograph and behind.name.plural)
    )


def _goes_on(noun: Noun, tokens: Sequence[str], found: Sequence[Noun]) -> bool:
    """``uniform`` in ``a uniform background``: an adjective, for a noun that is not listed follows."""
    behind = tokens[noun.end] if noun.end < len(tokens) else ","
    if (
        behind in FUNCTION
        or behind in ("left", "right")
        or not behind.isalpha()
        or behind.endswith(("ing", "ed", "s", "ly"))
    ):
        return False
    return all(other.start != noun.end for other in found)


def _is_noun(noun: Noun, tokens: Sequence[str], found: Sequence[Noun]) -> bool:
    if not noun.name.homograph:
        return True
    before = tokens[noun.start - 1] if noun.start else None
    if noun.words in VERBS and before not in ("a", "the", "his", "her", "its", "their"):
        return False  # "one can see"
    if not noun.name.plural and _goes_on(noun, tokens, found):
        return False
    behind = tokens[noun.end] if noun.end < len(tokens) else None
    ends = {other.end for other in found if other.words != "orange"}
    at = noun.start
    for _ in range(4):
        word = tokens[at - 1] if at else None
        if word is None:
            break
        if word in DETERMINERS or number(word) is not None:
            return True
        if word in FUNCTION or at in ends:
            break
        at -= 1
    if not noun.name.plural or behind in DETERMINERS or behind in PRONOUNS or behind in ("at", "to"):
        return False
    while at < noun.start and before not in FUNCTION and at not in ends:
        return at == 0 or tokens[at - 1] in PREPOSITIONS or tokens[at - 1] in CONJUNCTIONS or tokens[at - 1] == ","
    return before is None or before in PREPOSITIONS - {"to"} or before in ("and", "or", ",", "are")


_GROUPS = words_of("family families baby babies cub cubs calf calves couple crowd mother people herd")
MAX_TEXT_CHARS = 2000
"""Characters of a text that license anything."""
NEGATIONS = words_of("no not n't without neither nor never none nobody cannot lack lacks lacking absence absent")
_BREAKS = words_of("; but while whereas only except just however though although although")


def negated(tokens: Sequence[str]) -> frozenset[int]:
    """Positions of a sentence that its negations reach: from each to the end of its clause."""
    if NEGATIONS.isdisjoint(tokens) and "instead" not in tokens and "rather" not in tokens:
        return frozenset()
    reached: set[int] = set()
    inside = False
    for at, word in enumerate(tokens):
        if word in NEGATIONS or (word in ("instead", "rather") and tokens[at + 1 : at + 2] in (["of"], ["than"])):
            inside = not (at == 0 and word == "no" and tokens[1:2] == [","]) and tokens[at + 1 : at + 2] != ["only"]
        elif word in _BREAKS:
            inside = False
        elif word == "," and inside:
            rest = tokens[at + 1 :]
            inside = not any(verb in rest for verb in ("is", "are", "has", "have", "sits", "stands")) or (
                "or" in rest and "and" not in rest
            )
        if inside:
            reached.add(at)
    return frozenset(reached)


@functools.lru_cache(maxsize=512)
def evidence_of(context: Context) -> Evidence:
    """What the texts and boxes of a context license; a demand inside a text (``say ...``) licenses nothing."""
    book = vocabulary()
    extra: dict[str, Name] = {}
    labelled = []
    for box in context.boxes:
        concepts, adjectives = _label(box.label, extra)
        labelled.append(Labelled(box, concepts, frozenset(adjectives)))
    bare = Evidence((), extra, (), frozenset(), frozenset(), frozenset(), frozenset(), frozenset(), frozenset())
    texts: list[tuple[tuple[str, ...], tuple[Noun, ...]]] = []
    plurals: set[str] = set()
    single: set[str] = set()
    named: set[str] = set()
    words: set[str] = set()
    for text in context.texts:
        for tokens in sentences(re.sub('["\u201c\u201d]', " ", without_demands(tamed(text, MAX_TEXT_CHARS)))):
            absent = negated(tokens)
            nouns = [noun for noun in book.find(tokens, extra) if noun.start not in absent]
            texts.append((tuple(tokens), tuple(bare.nouns(tokens))))
            words.update(tokens)
            for noun in nouns:
                named |= noun.name.concepts
                if noun.name.plural or (noun.name.both and not _singular(tokens, noun)):
                    plurals |= noun.name.concepts
                if noun.name.both and _singular(tokens, noun):
                    single |= noun.name.concepts
    mentioned = _with_kinds(named)
    of_labels = {concept for thing in labelled for concept in thing.concepts}
    base = named | of_labels
    company = {
        concept
        for word in words | {part for box in context.boxes for part in box.label.lower().split()}
        for concept in book.company.get(word, ())
    }
    parts = {part for concept in base for part in book.parts.get(concept, ())}
    crowded = {concept for label in context.crowded for concept in _label(label, {})[0]}
    return Evidence(
        tuple(labelled),
        extra,
        tuple(texts),
        frozenset(words),
        _with_kinds(base | company | parts),
        mentioned,
        _with_kinds(plurals - single),
        frozenset(crowded),
        frozenset(adjective for thing in labelled for adjective in thing.adjectives),
    )


def _singular(tokens: Sequence[str], noun: Noun) -> bool:
    """Whether a noun that is its own plural (``sheep``) stands for one."""
    return not {"a", "an", "one", "single", "lone", "itself"}.isdisjoint(
        tokens[max(noun.start - 3, 0) : noun.start]
    ) or ("itself" in tokens)


def _label(label: str, extra: dict[str, Name]) -> tuple[frozenset[str], tuple[str, ...]]:
    concepts, adjectives = vocabulary().of_label(label)
    if concepts:
        return concepts, adjectives
    words = label.lower().replace("_", " ").replace("-", " ").split()
    own = frozenset({f"label {' '.join(words)}"})
    for start in range(len(words)):
        name = " ".join(words[start:])
        for form, many in ((name, False), (plural(name), True)):
            known = extra.get(form)
            extra[form] = Name((known.concepts if known else frozenset()) | own, many, False, False, False)
    return own, ()


def _with_kinds(concepts: set[str]) -> frozenset[str]:
    kinds = vocabulary().kinds
    return frozenset(kind for concept in concepts for kind in kinds.get(concept, frozenset({concept})))
