"""Counts that an answer states, against the boxes and the counts of the texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from filters.instruct.evidence import Evidence, negated
from filters.instruct.vocabulary import Noun, vocabulary
from filters.instruct.words import DETERMINERS, FUNCTION, number, words_of

Kind = Literal["all", "some", "least", "many", "one"]

_LEAST = (("at", "least"), ("more", "than"), ("no", "fewer", "than"), ("no", "less", "than"), ("over",), ("least",))
_ABOUT = words_of("about around approximately roughly nearly almost perhaps maybe most fewer")
_MANY = frozenset(["several", "many", "multiple", "various", "numerous", "few"])
_MORE = words_of("another other others third second more additional further remaining rest fourth")
_PLACES = words_of(
    "left right top bottom foreground background front center centre middle corner side closest nearest farthest "
    "who that which whose behind"
)
_PAIRED = words_of(
    "scissors shears glasses pants trousers jeans shorts leggings skis ski shoe shoes boots boot gloves glove "
    "socks sock headphones sunglasses eyeglasses goggles pliers tongs slippers sandals sneakers earrings"
)
_HOW_MANY = ("how", "many")
_PICTURE = words_of("image picture photo photograph scene view frame shot")


@dataclass(frozen=True)
class Count:
    """A stated number of things."""

    value: int
    concepts: frozenset[str]
    kind: Kind
    """``all`` of them, ``some`` (perhaps of more), at ``least``, ``many`` (two or more), or the only ``one``."""
    words: str
    adjectives: frozenset[str]


def counts(tokens: Sequence[str], nouns: Sequence[Noun]) -> Iterator[Count]:
    """The counts that a sentence states."""
    for noun in nouns:
        at = noun.start
        while at and noun.start - at < 5 and (tokens[at - 1] not in FUNCTION or _joins(tokens, at - 1)):
            if number(tokens[at - 1]) is not None:
                break
            at -= 1
        if not at:
            continue
        modifiers = frozenset(word for word in tokens[at : noun.start] if word not in (",", "and"))
        found = _count(tokens, at - 1, noun, modifiers)
        if found:
            yield found


def _joins(tokens: Sequence[str], at: int) -> bool:
    return tokens[at] in (",", "and") and at > 0 and tokens[at - 1] not in FUNCTION


def _count(tokens: Sequence[str], at: int, noun: Noun, modifiers: frozenset[str]) -> Count | None:
    word = tokens[at]
    before = tokens[at - 1] if at else ""
    words = " ".join(tokens[at : noun.end])
    value = number(word)
    many = noun.name.plural or noun.name.both
    behind = tokens[noun.end : noun.end + 12]
    some = bool(modifiers) or (not _PLACES.isdisjoint(behind[:7]) and _PICTURE.isdisjoint(behind[:5]))

    def count(value: int, kind: Kind, words: str = words) -> Count:
        return Count(value, noun.name.concepts, kind, words, modifiers)

    if value is not None:
        if (value > 1 and not many) or (value == 1 and noun.name.plural):
            return None
        if before in _ABOUT or before in ("number", "no", "to", "bus", "train"):
            return None
        if any(tuple(tokens[at - len(words) : at]) == words for words in _LEAST if at >= len(words)):
            return count(value + (before == "than" and tokens[at - 2] == "more"), "least", f"{before} {words}")
        if value == 0:
            return None
        if value == 1:
            only = before in ("only", "just", "exactly") or (
                before in ("is", "'s") and tokens[at - 2 : at - 1] == ["there"]
            )
            return count(1, "one", f"{before} {words}") if only else None
        if before in _MORE or tokens[at + 1 : at + 2] in (["more"], ["other"], ["others"], ["additional"]):
            return count(value, "least")
        return count(value, "some" if some else "all")
    if word == "of" and before in ("pair", "couple") and tokens[at - 2 : at - 1] == ["a"] and many:
        if noun.words.split()[-1] in _PAIRED:
            return None
        return count(2, "some" if some or before == "couple" else "all", f"a {before} of {noun.words}")
    if word == "of" and number(before) is not None:
        return count(number(before) or 0, "least", f"{before} {words}")
    if word in DETERMINERS and before == "of":
        value = number(tokens[at - 2]) if at >= 2 else None
        return count(value, "least", f"{tokens[at - 2]} of {words}") if value and value > 1 and many else None
    if word == "both" and many:
        return count(2, "least")
    if word in _MANY and many and before not in ("a", "very", "how"):
        return count(2, "many")
    if (
        word in ("a", "the", "only")
        and modifiers & {"single", "lone", "solitary", "sole", "only"}
        and not noun.name.plural
    ):
        rest = modifiers - {"single", "lone", "solitary", "sole", "only"}
        return Count(1, noun.name.concepts, "one", words, rest)
    return None


def count_faults(sentences: Sequence[list[str]], evidence: Evidence) -> Iterator[str]:
    """Counts of an answer that neither boxes nor texts agree with, in words."""
    stated: list[Count] = []
    for tokens in sentences:
        absent = negated(tokens)
        nouns = [noun for noun in evidence.nouns(tokens) if noun.start not in absent]
        stated.extend(counts(tokens, nouns))
    if not stated:
        return
    said = {token for tokens in sentences for token in tokens}
    for claim in stated:
        fault = count_fault(claim, evidence, stated, said)
        if fault:
            yield fault


def count_fault(
    claim: Count, evidence: Evidence, stated: Sequence[Count], said: frozenset[str] | set[str]
) -> str | None:
    """What is wrong with a count; null where boxes or texts agree or nothing is known."""
    concepts = claim.concepts
    if evidence.is_crowded(concepts):
        return None
    told = [count for count in text_counts(evidence) if _related(count.concepts, concepts)]
    if any(count.value == claim.value for count in told):
        return None
    asked = claim.adjectives & evidence.adjectives
    fitting = [thing for thing in evidence.labelled if not asked or not thing.adjectives or asked <= thing.adjectives]
    sure = [thing for thing in fitting if thing.is_a(concepts)]
    perhaps = [thing for thing in fitting if thing not in sure and thing.may_be(concepts)]
    n, most = len(sure), len(sure) + len(perhaps)
    least = sum(not thing.concepts.isdisjoint(concepts) for thing in sure) or n  # without what is only a kind of them
    if not n:
        if claim.value > most > 0:
            return f"{claim.words}: {most} {'box' if most == 1 else 'boxes'}"
        if told and claim.kind == "all" and all(count.kind in ("all", "some") for count in told):
            if not any(count.concepts & concepts for count in told):
                return None
            return f"{claim.words}: the texts say {', '.join(sorted({str(count.value) for count in told}))}"
        return None
    boxes = f"{claim.words}: {most} {'box' if most == 1 else 'boxes'}"
    plural = not evidence.plurals.isdisjoint(concepts)
    if claim.kind == "many":
        return boxes if most < 2 and not plural and all(count.value < 2 for count in told) else None
    if claim.kind == "one":
        if not plural and not evidence.mentioned.isdisjoint(concepts):
            return None
        return boxes if n > 1 and (not claim.adjectives or claim.adjectives <= evidence.adjectives) else None
    if claim.value > most:
        return boxes
    if (claim.value < least and claim.kind == "all") or (
        asked and claim.adjectives <= asked and claim.value < least and claim.kind == "some"
    ):
        same = [count for count in stated if count.concepts & concepts]
        if (len(same) > 1 and sum(count.value for count in same) >= n) or not _MORE.isdisjoint(said):
            return None
        return boxes
    return None


def text_counts(evidence: Evidence) -> list[Count]:
    """The counts that the texts state."""
    if "counts" not in evidence.known:
        evidence.known["counts"] = [
            count for tokens, nouns in evidence.texts for count in counts(tokens, nouns) if count.kind != "many"
        ]
    return evidence.known["counts"]


def asked_count(question: Sequence[Sequence[str]], evidence: Evidence) -> Noun | None:
    """The noun of a question ``how many ...?`` that restricts it by nothing."""
    for tokens in question:
        for at in range(len(tokens) - 2):
            if tuple(tokens[at : at + 2]) == _HOW_MANY:
                nouns = [noun for noun in evidence.nouns(tokens) if noun.start >= at + 2]
                if nouns and nouns[0].start <= at + 4:
                    return nouns[0]
    return None


def _related(one: frozenset[str], other: frozenset[str]) -> bool:
    kinds = vocabulary().kinds
    return any(a == b or a in kinds.get(b, ()) or b in kinds.get(a, ()) for a in one for b in other)
