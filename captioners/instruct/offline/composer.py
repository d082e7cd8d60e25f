"""What conversations of every kind are composed with: words for things, and which things go together.

A composer of a kind adds its questions and answers. Each is a claim that follows from facts; where one would need more
evidence than a thing has, it is not asked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TypeVar

from captioners.instruct.offline import nouns
from captioners.instruct.offline.naming import Picture
from captioners.instruct.offline.phrases import Choices, capital, number
from captioners.instruct.offline.things import Thing

Pair = tuple[str, str]
"""A question and its answer."""
T = TypeVar("T")


def by_topic(ideas: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    """What could be asked, by topic."""
    found: dict[str, list[T]] = {}
    for topic, idea in ideas:
        found.setdefault(topic, []).append(idea)
    return found


class Composer(ABC):
    """Composes one conversation of its kind.

    Args:
        picture: what it is about.
        choices: those among facts and among wordings.
    """

    def __init__(self, picture: Picture, choices: Choices) -> None:
        self.picture = picture
        self.choices = choices
        self.facts = picture.facts
        self.context = picture.context

    @abstractmethod
    def compose(self) -> list[Pair] | str:
        """The conversation, or why there is none."""

    # -- words for things ----------------------------------------------------------------------------------------------

    def ask(self, questions: Sequence[str], answers: Sequence[str], **words: object) -> Pair:
        """One of the questions and one of the answers, filled in."""
        return self.say(questions, **words), self.say(answers, **words)

    def say(self, templates: Sequence[str], **words: object) -> str:
        """One of the templates, filled in."""
        return self.choices.of(templates).format(**words)

    def words(self, thing: Thing) -> dict[str, str]:
        """What templates say of the one of a label."""
        the = f"the {self.one(thing)}"
        many = thing.noun.verb == "are"
        return {
            "the": the,
            "The": capital(the),
            "is": thing.noun.verb,
            "does": "do" if many else "does",
            "It": "They" if many else "It",
        }

    def one(self, thing: Thing) -> str:
        """``dog``, or what else tells it from the others."""
        return self.picture.names.get(thing.key, thing.noun.one)

    def the(self, thing: Thing, *, plain: bool = False) -> str:
        """``the dog``, sometimes with its colour."""
        name = self.one(thing)
        if thing.told_colour and not plain and self.choices.below(4) == 0:
            return f"the {' and '.join(thing.told_colour)} {name}"
        return f"the {name}"

    def a(self, thing: Thing) -> str:
        """``a dog``, ``a pair of scissors``."""
        name = self.one(thing)
        return thing.noun.a() if name == thing.noun.one else f"{nouns.article(name)} {name}"

    def counted(self, thing: Thing) -> str:
        """``three dogs``, ``a dog``."""
        count = thing.count or 1
        return f"{number(count)} {thing.noun.many}" if count > 1 else self.a(thing)

    def exactly(self, thing: Thing) -> str:
        """``three dogs``, ``one dog``."""
        count = thing.count or 0
        return f"{number(count)} {thing.noun.one if count == 1 else thing.noun.many}"

    def be(self, first: Thing) -> str:
        """The verb after "there", before the first thing of a list."""
        return "are" if (first.count or 1) > 1 else "is"

    # -- what goes together --------------------------------------------------------------------------------------------

    def pairs(self) -> list[tuple[Thing, Thing]]:
        """Of the ones with boxes, the larger first; at most 28."""
        few = self.picture.soles[:8]
        return [(a, b) for place, a in enumerate(few) for b in few[place + 1 :]]

    def counts(self) -> list[tuple[Thing, Thing]]:
        """Things that one may count against each other, the more numerous first."""
        counted = [thing for thing in self.picture.boxed if thing.count is not None and thing.noun.counts]
        # "red circles and dogs" might be red dogs
        if len({nouns.described(thing.key).plain for thing in counted}) > 1:
            return []
        return [
            (a, b)
            for a in counted
            for b in counted
            if (a.count or 0) > max(b.count or 0, 1) and (nouns.alike(a.key, b.key) or (b.count or 0) > 1)
        ]

    def has_colour(self, thing: Thing) -> bool:
        """Whether one would ask for its colour: no person, no part of one; clothes only of the one person, so that
        "the shirt" can be only one."""
        if thing.colour_in_label:
            name = self.picture.names.get(thing.key)
            return name is not None and thing.colour[0] not in name.split()
        person = self.facts.things.get("person")
        if thing.key in nouns.CLOTHES:
            return person is not None and person.sole
        if not self.facts.names_one(thing):
            return False
        return thing.key != "person" and (bool(thing.boxes) or nouns.askable(thing.key))
