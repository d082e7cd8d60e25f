"""What kind of place an image shows, from its texts alone.

A room or a place outdoors is the setting where two texts name it (or the only one does), none is about a picture within
the picture, and no word of any text speaks of the other: a kitchen is none beside a street. A hill is no setting.
"""

from __future__ import annotations

from captioners.instruct.offline import nouns
from captioners.instruct.offline.facts import Facts
from filters.instruct.words import words_of

_OUTDOORS = frozenset(word.replace("/", " ") for word in nouns.OUTDOORS) - {"river", "lake", "ocean", "sky", "mountain"}
PLACES = words_of("beach park forest woods garden farm meadow street") | {"parking lot"}
"""Answers to where one is; a hill is none."""
_NOT_INSIDE = words_of("outside outdoor outdoors patio street beach field park")
_NOT_OUTSIDE = words_of("inside indoor indoors room window restaurant")


def a_setting(name: str) -> str:
    """With its article."""
    return "the woods" if name == "woods" else f"{nouns.article(name)} {name}"


def setting(facts: Facts) -> str | None:
    """The room, or what shows that it is outdoors, that texts agree on."""
    if any(not nouns.UNREAL.isdisjoint(text.low) for text in facts.texts):
        return None
    things = facts.things
    rooms = [key for key in nouns.ROOMS if key in things and facts.names(things[key])]
    outdoors = [key for key in sorted(_OUTDOORS) if key in things and facts.names(things[key])]
    words = {word for text in facts.texts for word in text.low}
    if len(rooms) == 1 and not outdoors and words.isdisjoint(_NOT_INSIDE):
        return rooms[0]
    if outdoors and not any(key in things for key in nouns.ROOMS) and words.isdisjoint(_NOT_OUTSIDE):
        single = [key for key in outdoors if not things[key].several]
        return single[0] if single else None
    return None
