"""Which texts may be quoted: those that agree with the boxes and with what the other texts say.

What disqualifies a text is listed in `captioners.instruct.offline.facts`, under "What a text says".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

from captioners.instruct.offline import nouns
from captioners.instruct.offline.texts import Mention, Text
from captioners.instruct.offline.things import Thing
from filters.instruct.words import words_of
from pairmill.instructions import Context


def quotable(context: Context, texts: Sequence[Text], things: Mapping[str, Thing]) -> tuple[int, ...]:
    """The positions of texts that may be quoted, those first that share most words with the others."""
    numbers = {thing.key: {mention.stated for mention in thing.mentions if mention.stated} for thing in things.values()}
    doubted = _doubted(context, texts, things)
    fronts = [_fronts(text) for text in texts]
    sides = {side for found in fronts for side in found}
    disputed = {(side, key) for side, key in sides if (_BEHIND[side], key) in sides}
    contested = {mention.text for thing in things.values() if not thing.several for mention in _contested(thing)}
    outvoted = _outvoted(texts)
    scored: list[tuple[float, int]] = []
    for place, text in enumerate(texts):
        if text.said is None or place in contested or place in outvoted or not fronts[place].isdisjoint(disputed):
            continue
        if any(mention.head and mention.form.key in doubted for mention in text.mentions):
            continue
        if any(
            mention.text == place and mention.head and _miscounts(mention, thing, numbers[thing.key], context)
            for thing in things.values()
            if numbers[thing.key]
            for mention in thing.mentions
        ):
            continue
        if context.boxes and _overstates(text, place, context, things):
            continue
        others = [other.content for other in texts if other is not text]
        shared = sum(len(text.content & other) for other in others) / max(1, len(others) * len(text.content))
        scored.append((-shared, place))
    return tuple(place for _, place in sorted(scored))


def mistaken(key: str, texts: Sequence[Text], things: Mapping[str, Thing]) -> bool:
    """Whether a thing without boxes that one text alone names, of three or more, is probably another one, which has
    boxes."""
    naming = {place for place, text in enumerate(texts) for mention in text.mentions if mention.form.key == key}
    boxed = {nouns.canonical(other) for other, thing in things.items() if thing.boxes}
    return (
        len(texts) > 2
        and len(naming) == 1
        and any(key in alike and not alike.isdisjoint(boxed) for alike in nouns.MISTAKEN)
    )


def _doubted(context: Context, texts: Sequence[Text], things: Mapping[str, Thing]) -> set[str]:
    """Looked-for labels that have no box and that only one text names, or in whose place a like thing has one; and what
    is probably mistaken for another thing."""
    looked_for = frozenset(context.labels).difference(things)
    times: Counter[str] = Counter()
    for text in texts:
        times.update({mention.form.key for mention in text.mentions if mention.head and mention.form.key in looked_for})
    named = {mention.form.key for text in texts for mention in text.mentions if mention.head}
    return {
        key
        for key, number in times.items()
        if number == 1 or any(key in alike and not alike.isdisjoint(things) for alike in nouns.CLASSES)
    } | {key for key in named.difference(things) if mistaken(key, texts, things)}


def _outvoted(texts: Sequence[Text]) -> set[int]:
    """The texts that say "man" where as many say "woman", or the other way round, and none says both."""
    genders = [(not nouns.MALE.isdisjoint(text.low), not nouns.FEMALE.isdisjoint(text.low)) for text in texts]
    males, females = genders.count((True, False)), genders.count((False, True))
    if not males or not females or (True, True) in genders:
        return set()
    least = min(males, females)
    fewer = [gender for gender, times in (((True, False), males), ((False, True), females)) if times == least]
    return {place for place, gender in enumerate(genders) if gender in fewer}


_ANYTHING = words_of("shapes objects figures things items")


def _overstates(text: Text, place: int, context: Context, things: Mapping[str, Thing]) -> bool:
    """Whether a text counts all things otherwise than the boxes do ("two objects: ..."), or says "a red cross and
    a red cross" where there is one."""
    for number, noun in pairwise(text.low):
        if noun in _ANYTHING and nouns.NUMBERS.get(number, len(context.boxes)) != len(context.boxes):
            return True
    for thing in things.values():
        if thing.boxes and thing.key not in context.crowded and thing.noun.counts:
            ones = Counter(
                text.low[mention.start : mention.end]
                for mention in thing.mentions
                if mention.text == place and mention.number == 1 and text.low[mention.start] in ("a", "an")
            )
            if max(ones.values(), default=0) > len(thing.boxes):
                return True
    return False


def _miscounts(mention: Mention, thing: Thing, stated: set[int], context: Context) -> bool:
    """Whether a stated number is at odds with the boxes, or, where there are none, with other texts. "Two men" may be
    two of four people."""
    if mention.stated is None:
        return False
    if not thing.boxes or thing.key in context.crowded or not thing.noun.counts:
        return len(stated) > 1
    if thing.key == "person" and mention.form.word not in ("person", "people"):
        return mention.stated > len(thing.boxes)
    return mention.stated != len(thing.boxes)


def _contested(thing: Thing) -> list[Mention]:
    """The mentions that give a colour which others do not; where most by far agree, the few that do not."""
    given = [(mention, found) for mention in thing.mentions if (found := mention.colours)]
    times = Counter(found for _, found in given)
    if len(times) < 2:
        return []
    (first, most), *_ = times.most_common(1)
    agreed = first if most >= 2 and most >= 2 * (len(given) - most) else None
    return [mention for mention, found in given if found != agreed]


_BEHIND = {"behind": "front", "front": "behind"}


def _fronts(text: Text) -> set[tuple[str, str]]:
    """What the text has something in front of, or behind."""
    found = set()
    for mention in text.mentions:
        before = text.low[max(0, mention.start - 2) : mention.start]
        if before[-1:] == ("behind",) or before == ("front", "of"):
            found.add(("behind" if before[-1] == "behind" else "front", mention.form.key))
    return found
