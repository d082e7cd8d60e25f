"""Complex reasoning: one question that takes several facts, and the answer with its reasons.

Sums, comparisons and orders rest on boxes alone. That a scene is indoors, a kitchen, or a sport needs a text that says
so, and is answered with the boxes that bear it out. Only where there is nothing to combine is it asked whether there is
only one of a thing, and to which edge it is nearer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from captioners.instruct.offline import nouns, telling
from captioners.instruct.offline.composer import Composer, Pair, by_topic
from captioners.instruct.offline.phrases import capital, listed, number
from captioners.instruct.offline.setting import a_setting, setting
from captioners.instruct.offline.things import Thing, larger, left_of, wider_and_taller

_EACH = frozenset(
    {"surfboard", "skateboard", "umbrella", "bicycle", "frisbee", "snowboard", "tennis racket", "baseball glove",
     "kite", "horse", "motorcycle", "chair", "backpack", "wine glass", "cup", "fork", "knife", "spoon", "banana",
     "sandwich", "donut", "cell phone", "laptop", "remote", "tie", "suitcase", "apple", "orange", "hot dog"}
)  # fmt: skip
"""Labels of which each person may have one."""
_USUAL = {
    "kitchen": ("oven", "microwave", "refrigerator", "sink", "toaster"),
    "bathroom": ("toilet", "sink", "toothbrush", "hair drier"),
    "bedroom": ("bed",),
    "living room": ("couch", "tv"),
    "office": ("laptop", "keyboard", "mouse"),
}
"""Rooms, and what one finds in them."""
_INSIDE = ("bed", "toilet", "sink", "oven", "microwave", "refrigerator", "couch", "toaster")
_OUTSIDE = ("traffic light", "fire hydrant", "stop sign", "parking meter", "car", "bus", "truck", "boat", "kite",
            "surfboard", "snowboard", "airplane")  # fmt: skip
_SPORTS = {
    "baseball": ("baseball bat", "baseball glove"),
    "tennis": ("tennis racket",),
    "skiing": ("skis",),
    "snowboarding": ("snowboard",),
    "surfing": ("surfboard",),
    "skateboarding": ("skateboard",),
    "frisbee": ("frisbee",),
}


class Complex(Composer):
    """Composes a question for complex reasoning."""

    def compose(self) -> list[Pair] | str:
        """One question that takes several facts, and the answer with its reasons."""
        ideas = by_topic(self.ideas()) or by_topic(self.plain_ideas())
        if not ideas:
            return "no question could be answered by combining facts of its texts and boxes"
        return [self.choices.of(ideas[self.choices.of(sorted(ideas))])()]

    def ideas(self) -> Iterator[tuple[str, Callable[[], Pair]]]:
        """What could be asked, by topic."""
        for a, b in self.counts():
            yield "more", partial(self.why_more, a, b)
        counted = [thing for thing in self.picture.boxed if thing.count is not None and thing.noun.counts]
        for place, a in enumerate(counted):
            for b in counted[place + 1 :]:
                if nouns.alike(a.key, b.key) and max(a.count or 0, b.count or 0) > 1:
                    yield "total", partial(self.why_total, a, b)
            halves = self.halves(a)
            if halves is not None:
                yield "halves", partial(self.why_halves, a, *halves)
        person = self.facts.things.get("person")
        if person is not None and person.boxes and (person.count or 0) > 1:
            for thing in counted:
                if thing.key in _EACH:
                    yield "each", partial(self.why_each, person, thing)
        for triple in self.triples():
            yield "order", partial(self.why_order, triple)
            yield "between", partial(self.why_between, triple)
        for thing in self.picture.soles:
            if thing.side and thing.noun.live:
                for deed in telling.deeds(self.facts, thing):
                    yield "who", partial(self.why_who, thing, deed)
        for a, b in self.pairs():
            if a.side and b.side and (a.noun.live or b.noun.live):
                yield "sides", partial(self.why_sides, a, b)
            if larger(a, b) and nouns.alike(a.key, b.key) and a.noun.verb == "is" and wider_and_taller(a, b):
                yield "larger", partial(self.why_larger, a, b)
        scene = setting(self.facts)
        if scene is not None:
            found = self.sure(_USUAL.get(scene, ()))
            if found:
                yield "room", partial(self.why_room, scene, found)
            yield "setting", partial(self.why_setting, scene)
        for sport, labels in _SPORTS.items():
            if any(sport in text.low for text in self.facts.texts) and (found := self.sure(labels)):
                yield "sport", partial(self.why_sport, sport, found)

    def plain_ideas(self) -> Iterator[tuple[str, Callable[[], Pair]]]:
        """What could be asked where there is nothing to combine."""
        for thing in self.picture.boxed:
            if thing.noun.counts and thing.count:
                yield "only", partial(self.why_only, thing)
            if thing.sole and thing.side and thing.key in self.picture.names:
                yield "edge", partial(self.why_edge, thing)

    def sure(self, labels: Sequence[str]) -> list[Thing]:
        """Things with boxes whose number is sure."""
        found = [self.facts.things[key] for key in labels if key in self.facts.things]
        return [thing for thing in found if thing.boxes and (thing.sole or thing.count)]

    def triples(self) -> list[tuple[Thing, Thing, Thing]]:
        """Three ones, each plainly to the left of the next."""
        row = [(thing.box, thing) for thing in self.picture.soles[:6] if thing.box is not None]
        row.sort(key=lambda item: item[0].centre[0])
        width = self.context.width
        return [
            (a, b, c)
            for first, (a_box, a) in enumerate(row)
            for second, (b_box, b) in enumerate(row[first + 1 :], first + 1)
            if left_of(a_box, b_box, width)
            for c_box, c in row[second + 1 :]
            if left_of(b_box, c_box, width)
        ]

    def halves(self, thing: Thing) -> tuple[int, int] | None:
        """How many are plainly in the left and in the right half; null where one is near the middle, or as many in
        both."""
        if thing.count is None or thing.count < 3:
            return None
        width = self.context.width
        shares = [self.context.boxes[place].centre[0] / width for place in thing.boxes]
        if any(0.45 <= share <= 0.55 for share in shares):
            return None
        left = sum(share < 0.5 for share in shares)
        return (left, len(shares) - left) if 2 * left != len(shares) else None

    def why_total(self, a: Thing, b: Thing) -> Pair:
        """How many of both."""
        total = number((a.count or 0) + (b.count or 0))
        questions = (
            "How many {many} and {others} are there altogether?",
            "If you count the {many} and the {others} together, how many are there?",
            "How many {many} and {others} does the picture show in all?",
        )
        answers = (
            "There {be} {a} and {b}, which makes {total} altogether.",
            "{Total} in all: {a} and {b}.",
            "I count {a} and {b}, so together there are {total}.",
        )
        return self.ask(
            questions,
            answers,
            many=a.noun.many,
            others=b.noun.many,
            a=self.exactly(a),
            b=self.exactly(b),
            be=self.be(a),
            total=total,
            Total=capital(total),
        )

    def why_more(self, a: Thing, b: Thing) -> Pair:
        """Of which there are more, and by how many."""
        difference = (a.count or 0) - (b.count or 0)
        questions = (
            "Are there more {many} or more {others}, and by how many?",
            "Which are there more of, {others} or {many}? Explain how you know.",
            "Do the {many} outnumber the {others}?",
        )
        answers = (
            "There are more {many}: I count {a} and {b}, a difference of {difference}.",
            "The {many} outnumber the {others}, since there are {a} but only {b}.",
            "There {be} {a} and {b}, so there are more {many}.",
        )
        question, answer = self.ask(
            questions,
            answers,
            many=a.noun.many,
            others=b.noun.many,
            a=self.exactly(a),
            b=self.exactly(b),
            be=self.be(a),
            difference=number(difference),
        )
        return question, f"Yes. {answer}" if question.startswith("Do ") else answer

    def why_each(self, person: Thing, thing: Thing) -> Pair:
        """Whether there is one for every person."""
        people, things = person.count or 0, thing.count or 0
        questions = (
            "Could each person in the picture have {a} of their own?",
            "Are there enough {many} for everyone in the picture?",
            "Is there {a} for every person?",
        )
        question = self.say(questions, a=thing.noun.a(), many=thing.noun.many)
        there = f"there {self.be(thing)} {self.exactly(thing)}"
        if things < people:
            lack = people - things
            rest = f"so {number(lack)} would go without"
            return question, f"No. There are {self.exactly(person)}, but {there}, {rest}."
        rest = "exactly one for each" if things == people else "one for each, and more"
        return question, f"Yes. There are {self.exactly(person)}, and {there}: {rest}."

    def why_order(self, triple: tuple[Thing, Thing, Thing]) -> Pair:
        """Their order from left to right."""
        a, b, c = (self.the(thing, plain=True) for thing in triple)
        questions = (
            "In which order do {items} follow each other from left to right?",
            "Put {items} in order from left to right.",
            "Going from left to right, in what order would you come across {items}?",
        )
        first, middle, last = (thing.noun.verb for thing in triple)
        answers = (
            f"First {a}, then {b}, and last {c}: {a} {first} to the left of {b}, and {c} {last} to the right of {b}.",
            f"The order is {a}, {b}, {c}: {b} {middle} to the right of {a} and to the left of {c}.",
        )
        return self.say(questions, items=listed(self.choices.shuffled((a, b, c)))), self.choices.of(answers)

    def why_between(self, triple: tuple[Thing, Thing, Thing]) -> Pair:
        """Which of them is between the others."""
        a, b, c = (self.the(thing, plain=True) for thing in triple)
        questions = (
            "Of {items}, which is in the middle, seen from left to right? Explain.",
            "Which of these is between the other two, going from left to right: {items}?",
        )
        words = self.words(triple[1])
        answer = f"{words['The']} {words['is']} between the other two, to the right of {a} and to the left of {c}."
        return self.say(questions, items=listed(self.choices.shuffled((a, b, c)))), answer

    def why_larger(self, a: Thing, b: Thing) -> Pair:
        """Which of the two is larger in the picture."""
        one, two = self.choices.shuffled((self.the(a, plain=True), self.the(b, plain=True)))
        questions = (
            "Which takes up more of the picture, {one} or {two}, and why do you think so?",
            "Compare how large {one} and {two} appear. Which one is larger here?",
        )
        words = self.words(a)
        answer = f"{words['The']} takes up more of the picture: it appears both wider and taller than {self.the(b)}."
        return self.say(questions, one=one, two=two), answer

    def why_halves(self, thing: Thing, left: int, right: int) -> Pair:
        """In which half of the picture there are more."""
        questions = (
            "Are most of the {many} in the left or in the right half of the picture?",
            "In which half of the picture are there more {many}, and how do you know?",
        )
        many = thing.noun.many
        side = "left" if left > right else "right"
        more, fewer = max(left, right), min(left, right)
        if not fewer:
            answer = f"In the {side} half: all {number(more)} {many} are there."
        else:
            answer = (
                f"In the {side} half: of the {number(more + fewer)} {many}, {number(more)} are there, "
                f"and just {number(fewer)} {'is' if fewer == 1 else 'are'} in the other half."
            )
        return self.say(questions, many=many), answer

    def why_room(self, room: str, found: Sequence[Thing]) -> Pair:
        """Which room it is, by what is in it."""
        a = a_setting(room)
        questions = (
            "What suggests that this is {a}?",
            "What kind of room is this, and what tells you so?",
            "Which room is shown here? Give your reasons.",
        )
        items = listed([self.counted(thing) for thing in found])
        answers = (
            f"This is {a}: there {self.be(found[0])} {items}, as one would expect there.",
            f"It is {a}, and it has what one finds in such a room: {items}.",
        )
        return self.ask(questions, answers, a=a)

    def why_setting(self, place: str) -> Pair:
        """Indoors or outdoors."""
        inside = place in nouns.ROOMS
        questions = (
            "Was this picture taken indoors or outdoors? How can you tell?",
            "Is this scene indoors or outdoors, and what makes you think so?",
            "Are we indoors or outdoors here? Give a reason.",
        )
        a = a_setting(place)
        found = [thing for thing in self.sure(_INSIDE if inside else _OUTSIDE) if thing.key != place][:2]
        where = "indoors" if inside else "outdoors"
        also = f", with {listed([self.counted(thing) for thing in found])}" if found else ""
        answers = (
            f"This is {where}: what we see is {a}{also}.",
            f"It must be {where}, since the picture shows {a}{also}.",
        )
        return self.ask(questions, answers)

    def why_sport(self, sport: str, found: Sequence[Thing]) -> Pair:
        """Which sport it is, by its gear."""
        questions = (
            "Which sport does the picture show, and what gives it away?",
            "What sport is this? How can you tell?",
        )
        items = listed([self.counted(thing) for thing in found])
        return self.ask(questions, (f"This is {sport}: there {self.be(found[0])} {items} in the picture.",))

    def why_only(self, thing: Thing) -> Pair:
        """Whether there is only one."""
        questions = (
            "Is there only one {one} in the picture, or are there more? Explain.",
            "Is there more than one {one} here? How do you know?",
        )
        if thing.count == 1:
            answer = f"There is only one {thing.noun.one}: no other {thing.noun.one} can be seen."
        else:
            answer = f"There is more than one {thing.noun.one}, since I count {self.exactly(thing)} in the picture."
        return self.say(questions, one=thing.noun.one), answer

    def why_who(self, thing: Thing, deed: telling.Deed) -> Pair:
        """Who does what a text says, and where in the picture."""
        said = deed.said.rstrip(".")
        who = "Who" if thing.key == "person" else "What"
        questions = (
            f"{who} is {said}, and where in the picture?",
            f"{who} is {said}? Say where in the picture, too.",
        )
        the = self.the(thing, plain=True)
        if the == "the person":
            the = f"the {deed.subject.form.word}"
        answers = (
            f"{capital(the)} is {said}, on the {thing.side} side of the picture.",
            f"It is {the}, on the {thing.side} side of the picture, that is {said}.",
        )
        return self.choices.of(questions), self.choices.of(answers[: 1 if "," in said else 2])

    def why_sides(self, a: Thing, b: Thing) -> Pair:
        """Whether the two are on one side of the picture."""
        a, b = self.choices.shuffled((a, b))
        the, other = self.the(a, plain=True), self.the(b, plain=True)
        questions = (
            f"Are {the} and {other} on the same side of the picture? Explain.",
            f"Do {the} and {other} share a side of the picture, left or right?",
        )
        if a.side == b.side:
            answer = f"Yes, {the} and {other} are both on the {a.side} side of the picture."
        else:
            answer = (
                f"No, {the} {a.noun.verb} on the {a.side} side of the picture, while {other} {b.noun.verb} on the "
                f"{b.side} side."
            )
        return self.choices.of(questions), answer

    def why_edge(self, thing: Thing) -> Pair:
        """To which edge of the picture it is nearer."""
        words = self.words(thing)
        questions = (capital(words["is"]) + " {the} nearer to the left or to the right edge of the picture? Explain.",)
        answer = "{The} {is} nearer to the {side} edge, because {it} {is} on the {side} side of the picture."
        return self.ask(questions, (answer,), side=thing.side, it=words["It"].lower(), **words)
