"""Texts told as answers: whole sentences, with "is" put in where a text lacks it, with later mentions of a thing as
"the", with phrases linked to boxes; and what a thing does, as its texts say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from captioners.instruct.offline import nouns
from captioners.instruct.offline.facts import Facts
from captioners.instruct.offline.phrases import SHOWS, Choices
from captioners.instruct.offline.texts import Mention, Text
from captioners.instruct.offline.things import Thing
from filters.instruct.words import words_of

_FINITE = words_of(
    """is are was were has have do does appears seems gets sits stands lies lays walks rides runs holds eats drinks
    plays jumps flies drives looks watches hangs rests wears works carries pulls passes grazes graze swims sleeps smiles
    poses leans travels moves catches throws swings hits performs sit lie lay eat hold plans pecks feeds shows cuts
    takes makes uses talks waits stares winds tries sprays lead leads seen"""
)
"""Words that make a sentence of a phrase."""
_WITH = words_of(
    """with of in on at near by under behind next inside outside above below between beside from covered filled topped
    surrounded decorated stacked lined mounted placed located made dressed full that which who"""
)
"""Words after a noun that leave it a phrase."""
_PLURAL_GROUPS = words_of("group couple number bunch herd flock crowd lot family team handful pair")
"""``a group of people are``; but ``a pile of books is``."""
_RELATIVE = words_of("that which who whose while where as")
_COLLECTIVE = words_of("couple family crowd group audience team crew")
_POINTING = ("there", "this", "here")
_NOTHING: Mapping[str, str] = {}
_OBJECT = words_of("a an the his her its their up down off over out through")


Edit = tuple[int, int, str]
"""From which character to which one is replaced, and by what."""


@dataclass(frozen=True)
class Deed:
    """What a text says that a thing does, or where it is: ``sitting on a couch``."""

    text: int
    subject: Mention
    verb: str
    """``sitting``"""
    said: str
    """From the verb to the full stop."""


def key_of(facts: Facts, mention: Mention) -> str | None:
    """The thing that a mention is about."""
    if mention.form.key in facts.things:
        return mention.form.key
    for thing in facts.things.values():
        if any(found is mention for found in thing.mentions):
            return thing.key
    return None


def keys_of(facts: Facts, place: int) -> dict[str, str]:
    """All that a text is about, as labels or nouns, and the first word for each."""
    mentions = [mention for mention in facts.texts[place].mentions if mention.head]
    return {key_of(facts, mention) or mention.form.key: mention.form.word for mention in reversed(mentions)}


def touched(facts: Facts, place: int) -> set[str]:
    """All that a text has a word for, in a compound ("a skateboard ramp") or as a group ("a couple"), too."""
    text = facts.texts[place]
    keys = {key_of(facts, mention) or mention.form.key for mention in text.mentions}
    return keys if _COLLECTIVE.isdisjoint(text.low) else keys | {"person"}


def linked(facts: Facts, mention: Mention) -> tuple[int, ...]:
    """The boxes of a mention: that of the one, or all where the phrase names as many; else none."""
    key = key_of(facts, mention)
    if key is None or not mention.head:
        return ()
    thing = facts.things[key]
    if thing.sole and not mention.several:
        return thing.boxes
    return thing.boxes if thing.count is not None and thing.count > 1 and mention.stated == thing.count else ()


def posture(text: Text) -> tuple[str, str] | None:
    """The noun that a text begins with and how that holds itself: ``("person", "sit")``."""
    if not text.mentions:
        return None
    first = text.mentions[0]
    end = next(
        (mention.start for mention in text.mentions[1:] if nouns.noun(mention.form.key).live and mention.head),
        len(text.low),
    )
    for word in text.low[first.end : end]:
        if word in nouns.POSTURES:
            return first.form.key, nouns.POSTURES[word]
    return None


def tell(
    facts: Facts,
    place: int,
    choices: Choices,
    *,
    bare: bool,
    known: Mapping[str, str] = _NOTHING,
    link: bool = False,
) -> str | None:
    """A text as a statement.

    Args:
        facts: those of the image.
        place: the text's position.
        choices: for the words put before a phrase ("The picture shows").
        bare: whether a phrase without a verb will do.
        known: what was mentioned before, and by which word: "a dog" is "the dog" now.
        link: whether phrases become mentions of boxes.

    Returns:
        null where the text makes no statement, or where it is not sure that it speaks of the things mentioned before.
    """
    text = facts.texts[place]
    said, where = text.said, text.spans
    if said is None or where is None:
        return said if bare and not known and not link else None
    edits: list[Edit] = []
    shown = ""
    statement = text.low[0] in _POINTING or _finite(text)
    if not statement and ". " not in said:
        made = _as_statement(text, where, known, choices)
        if made is not None:
            statement = True
            shown, edits = made
    if (not statement and not bare) or (known and text.low[0] in _POINTING):
        return None
    if known:
        again = _mentioned_again(facts, text, where, known)
        if again is None:
            return None
        edits += [(start, end, "The" if start == 0 and not shown else "the") for start, end in again]
    if shown and not any(edit[0] == 0 for edit in edits):
        edits.append((0, 1, said[0].lower()))
    for mention in text.mentions if link else ():
        boxes = linked(facts, mention)
        if boxes:
            start, end = where[mention.start][0], where[mention.end - 1][1]
            edits.append((start, start, "["))
            edits.append((end, end, f"](box:{','.join(map(str, boxes))})"))
    for left, right, words in sorted(edits, key=lambda edit: (edit[0], edit[1] > edit[0]), reverse=True):
        said = said[:left] + words + said[right:]
    return shown + said


def _as_statement(
    text: Text, where: Sequence[tuple[int, int]], known: Mapping[str, str], choices: Choices
) -> tuple[str, list[Edit]] | None:
    """What makes a statement of a phrase: words put before it ("The picture shows"), or a verb within; null where
    nothing does."""
    if not text.mentions:
        return None
    first, group = text.mentions[0], _group(text)
    several = group in _PLURAL_GROUPS if group else first.several
    if not first.head or (first.start != 0 and (group is None or first.start != 3)):
        return None
    after = text.low[first.end] if first.end < len(text.low) else ""
    determined = several or group is not None or first.number is not None or text.low[0] in ("the", "some")
    if determined and after in nouns.PARTICIPLES:
        return "", [(where[first.end][0], where[first.end][0], "are " if several else "is ")]
    if known and after == "with" and first.form.key in nouns.ROOMS and first.form.key in known:
        return "", [(*where[first.end], "has")]
    if determined and after in _WITH and not known:
        return choices.of(SHOWS) + " ", []
    return None


def _mentioned_again(
    facts: Facts, text: Text, where: Sequence[tuple[int, int]], known: Mapping[str, str]
) -> list[tuple[int, int]] | None:
    """Where the articles are of things mentioned before; null where it is not sure that the same ones are meant."""
    first = text.mentions[0] if text.mentions else None
    if first is not None and first.start == 0 and not first.head and first.form.key in known:
        return None  # "A fire hydrant sprays": another one?
    found = []
    for mention in text.mentions:
        key = key_of(facts, mention) or mention.form.key
        if key not in known or not mention.head:
            continue
        thing = facts.things.get(key)
        if key != "person" and known[key] != mention.form.word and key not in (known[key], mention.form.word):
            return None  # "a canary" after "a parakeet"
        if text.low[mention.start] not in ("a", "an"):
            if mention.number is not None or mention.several or (mention is first and text.low[mention.start] != "the"):
                return None  # "two dogs" again, or a bare "dog": perhaps others
            continue
        if thing is None or not (thing.sole or key in nouns.ROOMS or key in nouns.OUTDOORS):
            return None
        found.append(where[mention.start])
    return found


def deeds(facts: Facts, thing: Thing) -> list[Deed]:
    """What a thing does or where it is, the surest first; none where texts differ in how it holds itself."""
    postures = set()
    found = []
    for place in facts.order:
        text = facts.texts[place]
        first = text.mentions[0] if text.mentions else None
        if first is None or not any(first is mention for mention in thing.mentions):
            continue
        group = _group(text)
        if first.start != (3 if group else 0) or (group is not None and group not in _PLURAL_GROUPS):
            continue
        held = posture(text)
        if held is not None:
            postures.add(held[1])
        at = first.end
        if at < len(text.low) and text.low[at] in ("is", "are"):
            at += 1
        where = text.spans
        if at + 2 >= len(text.low) or text.low[at] not in nouns.PARTICIPLES or where is None or text.said is None:
            continue
        if ". " in text.said or any(word in _FINITE for word in text.low[at + 1 :]):
            continue
        if thing.sole and (first.several or text.low[0] in ("his", "her", "their", "its", "my")):
            continue
        if not thing.sole and not (first.several and thing.several):
            continue
        if not thing.noun.live and text.low[at + 1] not in nouns.PLACES:
            continue
        found.append(Deed(place, first, text.low[at], text.said[where[at][0] :]))
    return found if len(postures) < 2 else []


def _group(text: Text) -> str | None:
    """The first noun of ``a group of people``."""
    low = text.low
    return low[1] if len(low) > 3 and low[0] in ("a", "an") and low[2] == "of" and low[1] in nouns.GROUPS else None


def _finite(text: Text) -> bool:
    """Whether a text has a verb other than in a clause ("a man that is ..."); also where some word may be one: it ends
    in s, is no known plural, and "the" or the like follows."""
    clause = next((place for place, word in enumerate(text.low) if word in _RELATIVE and place), len(text.low))
    if not _FINITE.isdisjoint(text.low[:clause]) or sum(word in _FINITE for word in text.low[clause:]) > 1:
        return True
    within = {place for mention in text.mentions for place in range(mention.noun, mention.end)}
    return any(
        word.endswith("s")
        and place not in within
        and len(word) > 3
        and word not in nouns.CLOSED
        and not word.endswith(("ss", "us", "'s"))
        and after in _OBJECT
        for place, (word, after) in enumerate(pairwise(text.low[: clause + 1]))
    )
