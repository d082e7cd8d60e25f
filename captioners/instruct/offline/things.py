"""What can be said for sure of each thing in an image: how many, which one, its colour and material, its place.

`judge` decides from a thing's boxes and from the mentions in all texts; what licenses what is said in
`captioners.instruct.offline.facts`. Relations between things are those of their boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from captioners.instruct.offline import nouns
from captioners.instruct.offline.nouns import Noun
from captioners.instruct.offline.texts import Mention
from pairmill.boxes import Box
from pairmill.instructions import Context

MARGIN = 0.12
"""Of the image's width (height): the least distance between two centres for a relation."""
SHARED = 0.25
"""Of the smaller extent: how much two boxes may overlap on the axis of a relation."""
LARGER = 2.0
"""Ratio of two areas from which one is larger in the picture."""
MOST = 8
"""More boxes than this are seldom all that there are."""
FEW = 4
"""The same for what no text speaks of in the plural."""


@dataclass
class Thing:
    """All that has one label, or that the texts call by one noun."""

    key: str
    """The label; of a thing without boxes, the noun."""
    noun: Noun
    boxes: tuple[int, ...]
    """Positions in the context's boxes, from left to right."""
    count: int | None = None
    """How many there are, where that is sure."""
    sole: bool = False
    """There is just one, so "the dog" names it."""
    colour: tuple[str, ...] = ()
    material: str | None = None
    colour_in_label: bool = False
    mentions: list[Mention] = field(default_factory=list)
    told: list[Mention] = field(default_factory=list)
    """Those in texts that can be said (`Text.said`); only they say anything, the others may but contradict."""
    several: bool = False
    """Texts speak of it in the plural."""
    box: Box | None = None
    """Of the one."""
    width: int = 0
    height: int = 0

    @property
    def side(self) -> str | None:
        """``left`` or ``right`` of the picture: the centre lies in the outer 36% of its width, and the box does not
        reach over 55% of it."""
        if self.box is None:
            return None
        if self.box.centre[0] < 0.36 * self.width and self.box.x2 < 0.55 * self.width:
            return "left"
        return "right" if self.box.centre[0] > 0.64 * self.width and self.box.x1 > 0.45 * self.width else None

    @property
    def level(self) -> str | None:
        """``top`` or ``bottom`` of the picture, by the same shares of its height as `side`."""
        if self.box is None:
            return None
        if self.box.centre[1] < 0.36 * self.height and self.box.y2 < 0.55 * self.height:
            return "top"
        return "bottom" if self.box.centre[1] > 0.64 * self.height and self.box.y1 > 0.45 * self.height else None

    @property
    def central(self) -> bool:
        """In the middle of the picture: the centre lies in the middle fifth of its width and the middle third of its
        height, and the box covers no more than 70% of either."""
        if self.box is None:
            return False
        x, y = self.box.centre[0] / self.width, self.box.centre[1] / self.height
        small = self.box.width < 0.7 * self.width and self.box.height < 0.7 * self.height
        return small and 0.4 < x < 0.6 and 0.33 < y < 0.67

    @property
    def position(self) -> str:
        """``on the left side of the picture, towards the bottom``; ``in the middle`` of it without side and level."""
        if self.side:
            return f"on the {self.side} side of the picture" + (f", towards the {self.level}" if self.level else "")
        return f"at the {self.level} of the picture" if self.level else "in the middle of the picture"

    @property
    def placed(self) -> bool:
        """Whether `position` is sure."""
        return bool(self.side or self.level or self.central)

    @property
    def told_colour(self) -> tuple[str, ...]:
        """The colour of the one as texts tell it: not from its label, and of no person."""
        return self.colour if self.sole and not self.colour_in_label and self.key != "person" else ()


def relation(a: Thing, b: Thing) -> str | None:
    """How the one of `a` is placed to the one of `b`: ``to the left of``, ``above`` ...; null where that is not plain.
    Above and below are said only of what stands in one column: the boxes share half of the narrower one's width."""
    if a.box is None or b.box is None:
        return None
    if left_of(a.box, b.box, a.width):
        return "to the left of"
    if left_of(b.box, a.box, a.width):
        return "to the right of"
    if min(a.box.x2, b.box.x2) - max(a.box.x1, b.box.x1) < 0.5 * min(a.box.width, b.box.width):
        return None
    if _before(a.box.y1, a.box.y2, b.box.y1, b.box.y2, a.height):
        return "above"
    return "below" if _before(b.box.y1, b.box.y2, a.box.y1, a.box.y2, a.height) else None


def left_of(a: Box, b: Box, width: float) -> bool:
    """Whether `a` is plainly to the left of `b`."""
    return _before(a.x1, a.x2, b.x1, b.x2, width)


def _before(a1: float, a2: float, b1: float, b2: float, side: float) -> bool:
    if b1 + b2 - a1 - a2 < 2 * MARGIN * side:
        return False
    return min(a2, b2) - max(a1, b1) <= SHARED * min(a2 - a1, b2 - b1)


def larger(a: Thing, b: Thing) -> bool:
    """Whether the one of `a` plainly takes up more of the picture than that of `b`."""
    return a.box is not None and b.box is not None and a.box.area >= LARGER * b.box.area


def wider_and_taller(a: Thing, b: Thing) -> bool:
    """Whether the one of `a` is plainly larger either way."""
    if a.box is None or b.box is None:
        return False
    return a.box.width > 1.15 * b.box.width and a.box.height > 1.15 * b.box.height


def judge(thing: Thing, context: Context, things: Mapping[str, Thing]) -> None:
    """Fills in what is sure of a thing.

    Args:
        thing: with its boxes and the mentions of it.
        context: what the image is known by.
        things: all things of the image, by label or noun.
    """
    boxes = context.boxes
    thing.boxes = tuple(sorted(thing.boxes, key=lambda place: boxes[place].x1 + boxes[place].x2))
    by_text: dict[int, list[Mention]] = {}
    for mention in thing.mentions:
        by_text.setdefault(mention.text, []).append(mention)
    stated = {mention.stated for mention in thing.mentions if mention.stated}
    thing.several = any(mention.several for mention in thing.mentions) or bool(stated)
    # "A man and a woman", "a man ... another man": as many as there are phrases in one text
    named = max((_persons(found) for found in by_text.values()), default=0)
    if thing.boxes:
        _count_boxes(thing, context, things, stated, named)
    else:
        numbers = {mention.number for mention in thing.mentions if mention.number is not None}
        plain = any(mention.stated and not mention.adjectives and not mention.digits for mention in thing.told)
        if len(stated) == 1 and numbers == stated and plain:
            thing.count = next(iter(stated))
        thing.sole = bool(thing.told) and not thing.several and named == 1 and thing.key not in nouns.OUTDOORS
    if not thing.colour and any(mention.colours for mention in thing.told):
        thing.colour = _agreed([mention.colours for mention in thing.mentions])
    materials = {
        nouns.MATERIALS[mention.adjectives[-1]]
        for mention in thing.told
        if mention.adjectives and mention.adjectives[-1] in nouns.MATERIALS
    }
    if len(materials) == 1:
        thing.material = next(iter(materials))


def _count_boxes(thing: Thing, context: Context, things: Mapping[str, Thing], stated: set[int], named: int) -> None:
    """Fills in the count of what has boxes, and whether it is the one.

    Args:
        thing: with its boxes and mentions.
        context: what the image is known by.
        things: all things of the image.
        stated: numbers that texts give.
        named: how many one text names apart from each other, at most.
    """
    boxes = [context.boxes[place] for place in thing.boxes]
    count = len(boxes)
    key = nouns.canonical(thing.key)
    others = [other for other in things.values() if other is not thing]
    rivals = any(nouns.canonical(other.key) == key for other in others)
    detected = any(box.score is not None for box in boxes)
    crowded = thing.key in context.crowded
    sure = (
        not crowded
        and key not in context.crowded
        and thing.noun.counts
        and count <= (MOST if thing.several else FEW)
        and not rivals
        and not any(other.boxes and nouns.includes(key, other.key) for other in others)
        and not (detected and _doubled(boxes))
    )
    if not nouns.described(thing.key).plain:
        pass  # "two red circles" in a text is about several labels: the label itself is exact
    elif count == 1:
        sure = sure and not thing.several and named <= 1
    else:
        sure = sure and stated <= {count} and named <= count
        sure = sure and (not thing.mentions or thing.several or named == count)
    if detected:
        told = named == count and not any(mention.several and not mention.stated for mention in thing.mentions)
        sure = sure and bool(thing.mentions) and (count == 1 or count in stated or told)
    if sure:
        thing.count = count
    uncounted = not thing.noun.counts and not rivals and not thing.several
    if count == 1 and not crowded and (sure or uncounted):
        thing.sole = True
        thing.box = boxes[0]


def _persons(mentions: Sequence[Mention]) -> int:
    """How many one text names apart from each other: two different words, or "another"."""
    return sum({mention.form.word: mention.stated or (2 if mention.several else 1) for mention in mentions}.values())


def _doubled(boxes: Sequence[Box]) -> bool:
    return any(a.iou(b) > 0.5 for place, a in enumerate(boxes) for b in boxes[:place])


def _agreed(colours: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The colours that texts give, if no two differ."""
    given = {found for found in colours if found}
    return given.pop() if len(given) == 1 else ()
