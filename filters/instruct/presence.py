"""Things that an answer says are there, or are not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from filters.instruct.evidence import Evidence, negated
from filters.instruct.vocabulary import Noun, vocabulary
from filters.instruct.words import DETERMINERS, QUOTE, words_of

_HEDGES = words_of(
    "might may could would can should likely possibly perhaps probably maybe if typically usually often commonly "
    "generally sometimes potentially presumably suggest suggests suggesting imply implies indicate indicates "
    "help helps example instance e.g. such like need needs must require requires want wants plan plans prepare "
    "preparing ready expect avoid prevent protect ensure risk risks danger intended meant used use allow allows "
    "purpose will possible potential future later before after unless even whether"
)
_UNSURE = words_of("might may could likely possibly perhaps probably maybe seems suggesting suggests presumably")
_LIKENESS = words_of("like as resembling resembles resemble shaped themed style styled")
_POLAR = (
    ("is", "there"),
    ("are", "there"),
    ("do", "you", "see"),
    ("can", "you", "see"),
    ("can", "you", "spot"),
    ("is", "there", "a"),
    ("does", "the"),
    ("do", "we", "see"),
    ("can", "we", "see"),
)
_ANYBODY = words_of("people person someone somebody humans individual individuals")
_VIEWER = words_of("camera photographer")
_PICTURE = words_of("image picture photo photograph scene view frame shot")


def presence_faults(sentences: Sequence[list[str]], evidence: Evidence, hedged: bool) -> Iterator[str]:
    """Nouns that nothing licenses and that the sentences claim, and things denied that are there, in words.

    Args:
        sentences: of an answer.
        evidence: of its context.
        hedged: whether what hedged sentences name is no claim (kind ``complex``).
    """
    for words in sentences:
        nouns = evidence.nouns(words)
        absent = negated(words)
        if not (hedged and is_hedged(words)):
            for noun in nouns:
                if noun.start in absent or evidence.licenses(noun.name) or _likeness(words, noun):
                    continue
                unsure = not _UNSURE.isdisjoint(words)
                if unsure and (noun.words in _ANYBODY or evidence.licenses_kind(noun.name)):
                    continue  # "maybe a labrador" of a dog
                if not (hedged and noun.words in _ANYBODY) and not ("sign" in noun.name.concepts and QUOTE in words):
                    yield f"{noun.words}: neither texts nor boxes have it"
        if absent:
            for noun in nouns:
                if noun.start in absent and _denied(words, noun) and is_there(noun, evidence):
                    yield f"no {noun.words}: texts or boxes have it"
            yield from _nobody(words, evidence)


def premise_faults(
    question: Sequence[list[str]], answer: Sequence[list[str]], evidence: Evidence, hedged: bool
) -> Iterator[str]:
    """What a question takes for granted (``the dog``) and nothing licenses, unless the answer denies it; and what a
    plain yes or no to a question whether something is there claims, in words."""
    first = answer[0][0] if answer and answer[0] else ""
    denies = any(negated(words) for words in answer) or first == "no"
    for words in question:
        nouns = evidence.nouns(words)
        asked = asked_presence(words, nouns)
        if asked is not None:
            if first == "yes" and not evidence.licenses(asked.name):
                yield f"{asked.words}: neither texts nor boxes have it"
            if first == "no" and _ends(words, asked) and not _counted(words, asked) and is_there(asked, evidence):
                yield f"no {asked.words}: texts or boxes have it"
            continue
        if denies or (hedged and is_hedged(words)):
            continue
        for noun in nouns:
            definite = {"the", "this", "that", "these", "those"} & set(words[max(noun.start - 3, 0) : noun.start])
            if hedged and noun.words in _ANYBODY:
                continue
            if definite and not evidence.licenses(noun.name) and not _likeness(words, noun):
                yield f"{noun.words}: neither texts nor boxes have it"


def asked_presence(words: Sequence[str], nouns: Sequence[Noun]) -> Noun | None:
    """The noun of which a question asks whether it is there; null for another question."""
    for start in _POLAR:
        if tuple(words[: len(start)]) == start:
            if start[0] == "does" and words[2:3] and words[2] not in _PICTURE:
                return None
            asked = [noun for noun in nouns if noun.start >= len(start) - 1]
            return asked[0] if asked else None
    return None


def is_there(noun: Noun, evidence: Evidence) -> bool:
    """Whether a box or a text has such a thing."""
    concepts = noun.name.concepts
    if noun.name.free:
        return False
    if any(thing.is_a(concepts) for thing in evidence.labelled):
        return True
    return len(concepts) == 1 and not concepts.isdisjoint(evidence.mentioned)


def is_hedged(words: Sequence[str]) -> bool:
    """Whether a sentence tells what may be, not what is seen."""
    return not _HEDGES.isdisjoint(words)


def _likeness(words: Sequence[str], noun: Noun) -> bool:
    if noun.words in _VIEWER and words[max(noun.start - 1, 0) : noun.start] == ["the"]:
        return True  # who looks at the camera
    return not _LIKENESS.isdisjoint(words[max(noun.start - 3, 0) : noun.start]) or words[noun.end : noun.end + 1] in (
        ["shaped"],
        ["themed"],
        ["like"],
        ["style"],
        ["colored"],
        ["coloured"],
    )


def _denied(words: Sequence[str], noun: Noun) -> bool:
    before = list(words[max(noun.start - 4, 0) : noun.start])
    plain = before[-1:] == ["no"] or before[-2:] in (
        ["n't", "a"],
        ["n't", "any"],
        ["not", "a"],
        ["not", "any"],
        ["n't", "an"],
    )
    there = "there" in words[: noun.start] or "see" in words or "visible" in words or "has" in words or "shows" in words
    return plain and there and _ends(words, noun)


def _ends(words: Sequence[str], noun: Noun) -> bool:
    behind = list(words[noun.end : noun.end + 4])
    if not behind:
        return True
    if behind[0] in ("in", "at", "to"):
        return not _PICTURE.isdisjoint(behind) or behind[:2] == ["at", "all"] or behind[:3] == ["to", "be", "seen"]
    if behind[0] in ("and", "or", "nor", "but", ",", ";"):
        return True
    return (
        behind[0] in ("visible", "present", "here", "anywhere", "shown", "pictured", "depicted") and "on" not in behind
    )


def _counted(words: Sequence[str], noun: Noun) -> bool:
    before = words[max(noun.start - 4, 0) : noun.start]
    return any(
        word not in DETERMINERS and word not in ("is", "are", "there", "see", "you", "can", "do") for word in before
    ) or (bool({"other", "more", "another"} & set(before)))


def _nobody(words: Sequence[str], evidence: Evidence) -> Iterator[str]:
    for at, word in enumerate(words):
        nobody = word == "nobody" or (word == "no" and words[at + 1 : at + 2] == ["one"])
        if nobody and not {"else", "other"} & set(words):
            end = at + (1 if word == "nobody" else 2)
            person = Noun(at, end, "person", vocabulary().names["person"])
            behind = words[end : end + 3]
            if (
                (not behind or behind[:1] in (["in"], ["is"]))
                and (not behind or not _PICTURE.isdisjoint(words[end : end + 6]) or "visible" in words)
                and is_there(person, evidence)
            ):
                yield "nobody: texts or boxes have a person"
