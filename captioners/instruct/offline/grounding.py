"""Grounding: one to four questions whose words are linked to boxes, or that ask about a box.

A phrase is linked to a box only where it names the one of a label, or all of a label whose number is sure
(`captioners.instruct.offline.telling.linked`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from captioners.instruct.offline import nouns, telling
from captioners.instruct.offline.composer import Composer, Pair, by_topic
from captioners.instruct.offline.phrases import capital, listed, number
from captioners.instruct.offline.things import Thing, left_of, relation
from pairmill.instructions import Mention


class Grounding(Composer):
    """Composes questions about regions."""

    def compose(self) -> list[Pair] | str:
        """One to four questions about regions."""
        if not self.picture.boxed:
            return "it has no boxes"
        ideas = by_topic(self.ideas())
        most = 1 + self.choices.below(4)
        pairs: list[Pair] = []
        for topic in self.choices.shuffled(sorted(ideas))[:most]:
            pair = self.choices.of(ideas[topic])()
            if all(pair[0] != old[0] and pair[1] != old[1] for old in pairs):
                pairs.append(pair)
        return pairs

    def ideas(self) -> Iterator[tuple[str, Callable[[], Pair]]]:
        """What could be asked, by topic."""
        for thing in self.picture.boxed:
            if thing.sole and thing.key in self.picture.names:
                yield "locate", partial(self.locate, thing)
            if thing.count is not None and thing.count > 1:
                yield "all", partial(self.point_out, thing)
                for side, place in self.outermost(thing):
                    yield "outermost", partial(self.ask_outermost, thing, side, place)
            yield "region", partial(self.region, thing)
        for group in self.picture.groups:
            yield "all", partial(self.point_out, group)
        for a, b in self.pairs():
            if relation(a, b):
                yield "relation", partial(self.linked_relation, a, b)
        best = self.linked_scene()
        if best is not None:
            yield "scene", partial(self.describe_linked, best)

    def locate(self, thing: Thing) -> Pair:
        """Where the one is, as its box."""
        questions = (
            "Where {is} {the}? Please point it out." if thing.noun.verb == "is" else "Where are {the}?",
            "Point to {the}.",
            "Can you find {the} in the picture?",
            "Locate {the}.",
            "Show me {the}.",
        )
        link = _link(self.the(thing), thing.boxes)
        answers = ["Here: {link}.", "{Link} {is} here."]
        if thing.placed:
            answers = ["{Link} {is} {place}.", "{Link} {is} {place}.", "Here: {link}."]
        words = self.words(thing)
        return self.ask(questions, answers, link=link, Link=capital(link), place=thing.position, **words)

    def point_out(self, thing: Thing) -> Pair:
        """Where all of them are, as their boxes."""
        many, count = thing.noun.many, number(thing.count or 0)
        questions = (
            "Point out all {many}.",
            "Show me every {one} in the picture.",
            "Where are the {many}?",
            "Find all of the {many}.",
            "Mark each {one}.",
        )
        link = _link(f"{count} {many}", thing.boxes)
        each = listed([_link("", (place,)) for place in thing.boxes])
        answers = (f"There are {link}.", f"{capital(link)} can be seen.", f"There are {count} {many}: {each}.")
        return self.ask(questions, answers, many=many, one=thing.noun.one)

    def region(self, thing: Thing) -> Pair:
        """What is in a box."""
        questions = (
            "What is at {link} in this picture?",
            "What do you see in the region {link} of the picture?",
            "What is there at {link} in the picture?",
            "Name the thing at {link} in the picture.",
        )
        link = _link("", (self.choices.of(thing.boxes),))
        name = self.one(thing)
        if thing.told_colour:
            name = f"{' and '.join(thing.told_colour)} {name}"
        if thing.noun.verb == "are":
            return self.say(questions, link=link), f"{capital(thing.noun.a())}."
        a = name if thing.noun.one in nouns.MASS else f"{nouns.article(name)} {name}"
        return self.ask(questions, ("It is {a}.", "{A}.", "There is {a}."), link=link, a=a, A=capital(a))

    def outermost(self, thing: Thing) -> list[tuple[str, int]]:
        """The sides on which one of a few is plainly the outermost, and its place."""
        boxes, width = self.context.boxes, self.context.width
        if thing.count is None or not 2 <= thing.count <= 6:
            return []
        sides = []
        if left_of(boxes[thing.boxes[0]], boxes[thing.boxes[1]], width):
            sides.append(("left", thing.boxes[0]))
        if left_of(boxes[thing.boxes[-2]], boxes[thing.boxes[-1]], width):
            sides.append(("right", thing.boxes[-1]))
        return sides

    def ask_outermost(self, thing: Thing, side: str, place: int) -> Pair:
        """Which of them is furthest to a side."""
        questions = (
            "Which of the {number} {many} is furthest to the {side}?",
            "Point to the {one} that is furthest to the {side}.",
            "Where is the {side}most {one}?",
        )
        leftmost, this = _link(f"The {side}most {thing.noun.one}", (place,)), _link("this one", (place,))
        return self.ask(
            questions,
            (f"{leftmost} is here.", f"It is {this}."),
            number=number(thing.count or 0),
            many=thing.noun.many,
            one=thing.noun.one,
            side=side,
        )

    def linked_relation(self, a: Thing, b: Thing) -> Pair:
        """How one box is placed to another."""
        a, b = self.choices.shuffled((a, b))
        first, second = _link(self.the(a), a.boxes), _link(self.the(b), b.boxes)
        questions = (
            "Where {is} {first} in relation to {second}?",
            "How {is} {first} placed relative to {second}?",
            "How are {one} and {two} placed relative to each other?",
        )
        answer = f"{capital(first)} {a.noun.verb} {relation(a, b)} {second}."
        question = self.say(
            questions,
            first=first,
            second=second,
            one=_link("", a.boxes),
            two=_link("", b.boxes),
            **{"is": a.noun.verb},
        )
        return question, answer

    def linked_scene(self) -> int | None:
        """The text with most phrases that can be linked to boxes."""
        best, most = None, 0
        for place in self.facts.order:
            text = self.facts.texts[place]
            if text.spans is None:
                continue
            links = sum(bool(telling.linked(self.facts, mention)) for mention in text.mentions)
            if links > most:
                best, most = place, links
        return best

    def describe_linked(self, place: int) -> Pair:
        """What a text says, its phrases linked to boxes."""
        questions = (
            "Describe the picture and mark what you mention.",
            "What does the picture show? Point out the things that you mention.",
            "Tell me what is going on, and point out the things you name.",
            "Say what the picture shows, with the things in it marked.",
        )
        return self.choices.of(questions), telling.tell(self.facts, place, self.choices, bare=True, link=True) or ""


def _link(words: str, boxes: Sequence[int]) -> str:
    return str(Mention(words, tuple(boxes)))
