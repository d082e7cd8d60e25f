"""What can be said of an image for sure, from its kept texts and boxes alone.

`read` finds the facts and, with them, what makes them so. What licenses what:

- **A count** of a label is its number of boxes. It is given only where the label is not crowded, boxes of a detector
  are borne out by a text, and no text says otherwise: none states another number for the label or for a word that means
  the same, none speaks of several where there is one box, and, where there are several boxes and texts name the
  thing, one of them does so in the plural. Without boxes of it a number that a text states is a count, if every text
  that gives one gives that one, and without an adjective ("two green shapes" are not all shapes).
- **The one** of a label: its count is 1; or it was not looked for, has no box, and every text that names it does so
  in the singular.
- **A colour or a material** is that of a text's adjectives right before the noun of the one of its label; no text gives
  it another one. Of what has no box, "a red bus" in one text alone says it of some bus only. In a label ("large red
  circle") size and colour are part of the label.
- **Left, right, above, below** hold between things that are each the one of their label, when the centres of their
  boxes differ by `things.MARGIN` of the image's side and the boxes share at most `things.SHARED` of the smaller one's
  extent on that axis. **Place in the picture**: see `Thing.side`, `Thing.level` and `Thing.central`.
- **Larger in the picture**: twice the box area. **More**: both are counts.
- **Yes**: there is a box, or two texts (or the only one) name it. **No**: the label was looked for in every image
  (`Context.labels`), has no box, is not crowded, and no text has a word for it or near it.
- **What a text says** is taken from the first sentence of texts that `texts.sentence` could clean and that agree with
  the counts. A text is left out that gives a thing a colour which another text denies (two thirds of those that give
  one outvote the others), that says "behind" where another says "in front of", or "man" where as many say "woman", or
  that names a looked-for label which has no box, unless another text does so too and no like thing has a box (a
  "chair" that is a couch). Texts left out, or that could not be cleaned, say nothing, but may still contradict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from captioners.instruct.offline import nouns
from captioners.instruct.offline import texts as reading
from captioners.instruct.offline.nouns import Form
from captioners.instruct.offline.quotable import mistaken, quotable
from captioners.instruct.offline.texts import Mention, Text
from captioners.instruct.offline.things import Thing, judge
from pairmill.boxes import Box
from pairmill.instructions import Context


@dataclass
class Facts:
    """All that a conversation may be made of."""

    context: Context
    texts: tuple[Text, ...]
    order: tuple[int, ...]
    """Texts that may be quoted, those first that share most with the others."""
    things: dict[str, Thing]
    """By label or noun; those with boxes first, the largest first."""
    absent: tuple[str, ...]
    """Labels of which there is none."""

    def names(self, thing: Thing) -> bool:
        """Whether texts name a thing without boxes surely enough: two of them, or the only one."""
        return len({mention.text for mention in thing.told}) >= min(2, len(self.texts))

    def names_one(self, thing: Thing) -> bool:
        """Whether "the bus" can be only one: "a red bus" in one text alone leaves room for another bus."""
        definite = all(self.texts[mention.text].low[mention.start] == "the" for mention in thing.told)
        return bool(thing.boxes) or definite or len({mention.text for mention in thing.told}) > 1


def read(context: Context) -> Facts:
    """The facts of an image."""
    things: dict[str, Thing] = {}
    keys: dict[str, str] = {}
    for place, box in enumerate(context.boxes):
        key = keys.get(box.label)
        if key is None:
            key = keys[box.label] = " ".join(box.label.split())
        thing = things.get(key)
        if thing is None:
            things[key] = thing = _thing(key, context)
        thing.boxes += (place,)
    labels = _label_forms(things)
    texts = tuple(reading.read(index, text, labels) for index, text in enumerate(context.texts))
    for text in texts:
        for mention in text.mentions:
            if not mention.head:
                continue
            for key in _named(mention, things, labels):
                things[key].mentions.append(mention)
    looked_for = frozenset(context.labels)
    known = {nouns.canonical(key) for key in things}
    loose: dict[str, list[Mention]] = {}
    for text in texts:
        for mention in text.mentions:
            key = mention.form.key
            if mention.head and mention.form.same and key not in known and key not in things:
                loose.setdefault(key, []).append(mention)
    for key, mentions in loose.items():
        if key in looked_for or key in context.crowded or mistaken(key, texts, things):
            continue
        thing = _thing(key, context)
        thing.mentions = mentions
        words = {mention.form.word for mention in mentions}
        if len(words) == 1 and words.isdisjoint(("cattle", "people", "aircraft")):
            word = words.pop()  # without a box of it a phone need be no cell phone
            thing.noun = replace(thing.noun, one=word, many=nouns.plural(word))
        things[key] = thing
    for thing in things.values():
        thing.told = [mention for mention in thing.mentions if texts[mention.text].said is not None]
        judge(thing, context, things)
    ordered = dict(sorted(things.items(), key=lambda item: (not item[1].boxes, -_area(item[1], context.boxes))))
    return Facts(context, texts, quotable(context, texts, ordered), ordered, _absent(context, texts, ordered))


def _area(thing: Thing, boxes: Sequence[Box]) -> float:
    return max((boxes[place].area for place in thing.boxes), default=0.0)


def _thing(key: str, context: Context) -> Thing:
    parts = nouns.described(key)
    colour = (parts.colour,) if parts.colour else ()
    return Thing(
        key,
        nouns.noun(key),
        (),
        colour=colour,
        colour_in_label=bool(colour),
        width=context.width,
        height=context.height,
    )


def _label_forms(things: dict[str, Thing]) -> dict[str, tuple[Form, ...]]:
    """The forms of labels that the lexicon lacks, and of the heads of those that are described, by first word."""
    found: dict[str, list[Form]] = {}
    kinds = nouns.lexicon()
    for key in things:
        low = key.lower()
        if low in kinds.keys:
            continue
        parts = nouns.described(key)
        for word in dict.fromkeys((low, parts.head)):
            for form, many in ((word, False), (nouns.plural(word), True)):
                words = tuple(form.split(" "))
                found.setdefault(words[0], []).append(Form(words, word, key, many, True))
    return {first: tuple(sorted(forms, key=lambda form: -len(form.words))) for first, forms in found.items()}


def _named(mention: Mention, things: dict[str, Thing], labels: dict[str, tuple[Form, ...]]) -> list[str]:
    """The labels that a mention may mean."""
    form = mention.form
    if form.key in things:
        return [form.key]
    return [key for key in things if nouns.canonical(key) == form.key] if not labels or form.same else []


def _absent(context: Context, texts: Sequence[Text], things: dict[str, Thing]) -> tuple[str, ...]:
    if not context.labels:
        return ()
    near = nouns.lexicon().near
    words = {word for text in texts for word in text.words}
    named = {key.lower() for key in (*things, *context.crowded)}
    there = {nouns.canonical(key) for key in named} | {nouns.described(key).head for key in named}
    for word in words:
        there |= near.get(word, _NOTHING)
    return tuple(
        label
        for label, key, heads in _looked_for(context.labels)
        if key not in there
        and label not in things
        and label not in context.crowded
        and nouns.described(label).head not in named  # what is called a circle may be a red one
        and heads.isdisjoint(words)
    )


_NOTHING: frozenset[str] = frozenset()


@lru_cache(maxsize=64)
def _looked_for(labels: tuple[str, ...]) -> tuple[tuple[str, str, frozenset[str]], ...]:
    """Each label, its key, and the words of its noun, where it is none of COCO's."""
    found = []
    for label in labels:
        key = nouns.canonical(label)
        head = nouns.described(label).head
        known = key in nouns.COCO
        found.append((label, key, _NOTHING if known else frozenset((head, nouns.plural(head), *head.split()))))
    return tuple(found)
