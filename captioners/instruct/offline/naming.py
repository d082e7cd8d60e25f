"""What the things of an image are called, so that a name means one of them only.

"The dog" is said where there is one dog (`captioners.instruct.offline.facts`, "The one"); of a large red circle and a
large blue one, "the red circle". A person is a woman where the texts agree on it. What would share its name with
another thing has none, and nothing is said that needs one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from captioners.instruct.offline import nouns
from captioners.instruct.offline.facts import Facts
from captioners.instruct.offline.things import Thing
from filters.instruct.words import words_of


class Picture:
    """An image's facts, and what its things are called."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.context = facts.context
        self.boxed = [thing for thing in facts.things.values() if thing.boxes]
        self.names = _names(facts)
        """Of the one of each label."""
        self.groups = _groups(self.boxed)
        """Things of several labels that differ in size or colour alone, taken together: the circles."""
        self.soles = [thing for thing in self.boxed if thing.sole and thing.key in self.names]
        """Those with one box and a name."""


def _groups(boxed: Sequence[Thing]) -> list[Thing]:
    heads: dict[str, list[Thing]] = {}
    for thing in boxed:
        heads.setdefault(nouns.described(thing.key).head, []).append(thing)
    return [
        Thing(
            head,
            nouns.noun(head),
            tuple(place for thing in alike for place in thing.boxes),
            sum(thing.count or 0 for thing in alike),
        )
        for head, alike in heads.items()
        if len(alike) > 1 and all(thing.count is not None and not nouns.described(thing.key).plain for thing in alike)
    ]


def _names(facts: Facts) -> dict[str, str]:
    found: dict[str, str] = {}
    context = facts.context
    labels = [nouns.described(label) for label in (*(box.label for box in context.boxes), *sorted(context.crowded))]
    heads = Counter(label.head for label in labels)
    coloured = Counter((label.colour, label.head) for label in labels)
    for thing in facts.things.values():
        if not thing.sole:
            continue
        parts = nouns.described(thing.key)
        if thing.key == "person":
            found[thing.key] = _person(thing)
        elif not thing.boxes:
            found[thing.key] = " ".join((*_sizes(thing), thing.noun.one))
        elif parts.plain:
            found[thing.key] = thing.noun.one
        elif heads[parts.head] == 1:
            found[thing.key] = parts.head
        elif parts.colour and coloured[parts.colour, parts.head] == 1:
            found[thing.key] = f"{parts.colour} {parts.head}"
        else:
            found[thing.key] = thing.noun.one
    times = Counter(found.values())
    return {key: name for key, name in found.items() if times[name] == 1}


def _sizes(thing: Thing) -> list[str]:
    """The size that all texts give what has no box: "the large star" leaves room for another star."""
    said = {tuple(word for word in mention.adjectives if word in nouns.SIZES) for mention in thing.mentions}
    return list(said.pop()) if len(said) == 1 else []


def _person(thing: Thing) -> str:
    """``woman`` where the texts agree that it is one."""
    named = {mention.form.word for mention in thing.mentions if mention.head and not mention.several}
    for word, alike in _PEOPLE.items():
        if word in named and named <= alike | _NEUTRAL:
            return word
    return "person"


_NEUTRAL = words_of(
    """person player skier surfer snowboarder skateboarder rider pitcher batter passenger worker friend catcher
    pedestrian adult cyclist biker skater"""
) | {"tennis player", "baseball player", "skate boarder", "surf boarder"}
_PEOPLE = {
    "man": words_of("man guy gentleman male businessman"),
    "woman": words_of("woman lady female businesswoman"),
    "boy": words_of("boy child kid male toddler youngster"),
    "girl": words_of("girl child kid female toddler youngster"),
    "child": words_of("child kid toddler youngster baby"),
}
"""Words for one person that agree with each other."""
