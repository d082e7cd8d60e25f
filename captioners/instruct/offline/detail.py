"""Detailed descriptions: one question, and all that is sure, in order: what happens, what there is, where it is.

What happens is told by texts that do not repeat each other and that are sure to speak of the same things
(`captioners.instruct.offline.telling.tell`); colours come from texts, numbers, places and relations from boxes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from captioners.instruct.offline import nouns, phrases, telling
from captioners.instruct.offline.composer import Composer, Pair
from captioners.instruct.offline.phrases import capital, listed, number
from captioners.instruct.offline.things import Thing, relation

_FEWEST = 12
"""Fewest words of a long description."""
_WORD = re.compile(r"[A-Za-z0-9]+(?:['\u2019][A-Za-z]+)*")


@dataclass
class _Told:
    """What texts have told."""

    sentences: list[str] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)
    """The things that they are about, each with the word for it."""
    touched: set[str] = field(default_factory=set)
    """Those that they have a word for."""
    content: set[str] = field(default_factory=set)
    """Their words but for the little ones."""


class Detail(Composer):
    """Composes a detailed description."""

    def compose(self) -> list[Pair] | str:
        """One question with a long answer."""
        told = self.told()
        said = [*told.sentences, *self.colours(told), *self.numbers(told)]
        said += self.others(told, also=bool(said))
        placed = self.placed()
        said += self.positions(placed)
        said += self.relations(placed, said)
        if len(_WORD.findall(" ".join(said))) < _FEWEST:
            return "its texts and boxes say too little for a long description"
        return [(self.choices.of(phrases.DETAIL), " ".join(said))]

    def told(self) -> _Told:
        """Up to three texts, each of which says something new; a phrase without a verb only where nothing else can be
        told. No two of them say how the same thing holds itself."""
        told = _Told()
        postures: set[str] = set()
        for bare in (False, True):
            for place in self.facts.order:
                text = self.facts.texts[place]
                new = text.content - told.content
                held = telling.posture(text)
                if len(told.sentences) == 3:
                    break
                if told.sentences and (bare or len(new) < 3 or 2 * len(new) < len(text.content)):
                    continue
                if held is not None and held[0] in postures:
                    continue
                sentence = telling.tell(self.facts, place, self.choices, bare=bare, known=told.known)
                if sentence is not None:
                    told.sentences.append(sentence)
                    told.content |= text.content
                    told.known = {**telling.keys_of(self.facts, place), **told.known}
                    told.touched |= telling.touched(self.facts, place)
                    if held is not None:
                        postures.add(held[0])
            if told.sentences:
                break
        return told

    def colours(self, told: _Told) -> Iterator[str]:
        """Of two things that were told of, without their colours."""
        coloured = [
            thing
            for thing in self.facts.things.values()
            if thing.sole and thing.colour and thing.key in told.known and self.has_colour(thing)
        ]
        each = [
            f"the {self.one(thing)} {thing.noun.verb} {listed(thing.colour)}"
            for thing in coloured
            if told.content.isdisjoint(thing.colour)
        ][:2]
        if each:
            yield f"{capital(', and '.join(each))}."

    def numbers(self, told: _Told) -> Iterator[str]:
        """How many there are of one thing that was told of, without its number."""
        for thing in self.picture.boxed:
            if (thing.count or 0) > 1 and thing.key in told.known and not any(m.stated for m in thing.mentions):
                yield f"There are {number(thing.count or 0)} {thing.noun.many}."
                return

    def others(self, told: _Told, *, also: bool) -> Iterator[str]:
        """Up to six things with boxes that the texts have no word for."""
        others = [
            thing for thing in self.picture.boxed if thing.key not in told.touched and (thing.sole or thing.count)
        ][:6]
        if others:
            # "two red circles and two dogs": the dogs might be red
            others.sort(key=lambda thing: not nouns.described(thing.key).plain)
            items = listed([self.counted(thing) for thing in others])
            templates = ("There {be} also {items}.", "The picture also shows {items}.", "Besides, there {be} {items}.")
            yield self.say(templates if also else ("There {be} {items}.",), be=self.be(others[0]), items=items)

    def placed(self) -> list[Thing]:
        """Up to two things in different parts of the picture."""
        placed = self.choices.shuffled([thing for thing in self.picture.soles[:6] if thing.side or thing.level])
        parts = {thing.side or thing.level: thing for thing in placed if thing.side or not placed[0].side}
        return list(parts.values())[:2]

    def positions(self, placed: Sequence[Thing]) -> Iterator[str]:
        """Where they are; where there are none, one thing that is in the middle."""
        if len(placed) == 2:
            first, second = (
                f"{self.the(thing)} {thing.noun.verb} "
                + (f"on the {thing.side} side" if thing.side else f"at the {thing.level}")
                for thing in placed
            )
            yield f"{capital(first)} of the picture{self.choices.of((', and ', ', while '))}{second}."
            return
        for thing in (placed or [thing for thing in self.picture.soles if thing.central])[:1]:
            yield f"{capital(self.the(thing))} {thing.noun.verb} {thing.position}."

    def relations(self, placed: Sequence[Thing], said: Sequence[str]) -> Iterator[str]:
        """Up to two, of different kinds, of things whose places do not say as much."""
        related = [(a, b) for a, b in self.pairs() if relation(a, b) and not (a in placed and b in placed)]
        last = said[-1] if said else ""
        found: set[str | None] = set()
        for pair in self.choices.shuffled(related)[:4]:
            a, b = self.choices.shuffled(pair)
            how = relation(a, b)
            sentence = f"{capital(self.the(a))} {a.noun.verb} {how} {self.the(b)}."
            if how not in found and len(found) < 2 and not f" {last}".endswith(f" {self.one(a)}."):
                yield sentence
                last = sentence
                found.add(how)
