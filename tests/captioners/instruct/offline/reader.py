"""Reads what the offline writer composes from boxes, sentence by sentence, and tries it on the boxes; it shares no code
with the writer."""

import re
from collections.abc import Sequence

import pytest

from pairmill.boxes import Box
from pairmill.instructions import Context, Mention, parts, plain

NUMBER_WORDS = (
    "no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
NUMBERS = {word: n for n, word in enumerate(NUMBER_WORDS)}
SINGULARS = {"people": "person", "knives": "knife", "buses": "bus"}
COUNTED = rf"(?:{'|'.join(NUMBERS)}|an?)"
THE = r"(the [a-z ]+?)"
WHERE = r"((?:on|at|in) the [a-z, ]+?)"


class Reader:
    """Tries each sentence on the boxes; a sentence that it cannot read is a failure."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def fitting(self, words: str) -> list[Box]:
        """Boxes that a phrase without its article fits."""
        *adjectives, noun = words.strip().lower().split()
        forms = {noun, noun.removesuffix("s"), SINGULARS.get(noun, noun)}
        return [
            box
            for box in self.context.boxes
            if box.label.split()[-1] in forms and set(adjectives) <= set(box.label.split()[:-1])
        ]

    def the(self, words: str) -> Box:
        found = self.fitting(words.removeprefix("the "))
        assert len(found) == 1, f"{words!r} names {len(found)}"
        return found[0]

    def counts(self, number: str, words: str) -> bool:
        """``two dogs``, and ``a dog`` of the one dog."""
        assert len(self.fitting(words)) == (1 if number in ("a", "an") else NUMBERS[number]), (number, words)
        return True

    def items(self, listed: str) -> bool:
        """``a dog, two cats and a bus``."""
        return all(self.counts(*item.split(" ", 1)) for item in re.split(r", | and ", listed))

    def placed(self, a: Box, how: str, b: Box) -> None:
        dx = (b.centre[0] - a.centre[0]) / self.context.width
        dy = (b.centre[1] - a.centre[1]) / self.context.height
        assert {"left": dx, "right": -dx, "above": dy, "below": -dy}[how] >= 0.1, (a, how, b)

    def within(self, box: Box, where: str) -> None:
        x, y = box.centre[0] / self.context.width, box.centre[1] / self.context.height
        middle = 0.35 < x < 0.65 and 0.3 < y < 0.7
        holds = {"left": x < 0.4, "right": x > 0.6, "top": y < 0.4, "bottom": y > 0.6, "middle": middle}
        for word in re.findall("left|right|top|bottom|middle", where):
            assert holds[word], (box, where)

    def topic(self, question: str) -> str:
        """What a question asks the number, the color or the place of."""
        found = re.search(
            r"(?:many|any|count the|number of|color of the|color (?:is|does) the|the two|"
            r"where (?:is|are) the|abouts is the|picture is the|look for the|more than one|only one) ([a-z ]+?)"
            r"(?: are there| can| do| are| in| have| here| visible|\?|\.)",
            question.lower(),
        )
        assert found, question
        return found[1]

    def other(self, question: str, words: str) -> Box:
        """The one of the two things of a question that the answer does not name."""
        found = re.search(r"(the [a-z ]+?) (?:or|and) (the [a-z ]+?)(?: appear|,|\?|\.)", question)
        assert found, question
        (other,) = [self.the(named) for named in found.groups() if self.the(named) is not self.the(words)]
        return other

    def chosen(self, question: str, words: str) -> None:
        """``The dog.``"""
        other = self.other(question, words)
        for word, how in (("left", "left"), ("right", "right"), ("higher", "above")):
            if word in question:
                self.placed(self.the(words), how, other)
                return
        assert self.the(words).area >= 1.5 * other.area

    def wider(self, words: str, than: str) -> None:
        a, b = self.the(words), self.the(than)
        assert a.area >= 1.5 * b.area and a.width > b.width and a.height > b.height

    def colour(self, question: str, colour: str) -> None:
        assert {box.label.split()[1] for box in self.fitting(self.topic(question))} == {colour}

    def total(self, number: str, listed: str) -> None:
        self.items(listed)
        assert sum(len(self.fitting(item.split(" ", 1)[1])) for item in listed.split(" and ")) == NUMBERS[number]

    def more(self, many: str, fewer: str, difference: str | None = None) -> None:
        a, b = len(self.fitting(many)), len(self.fitting(fewer))
        assert a > b and (difference is None or a - b == NUMBERS[difference])

    def each(self, yes: bool, listed: str, lack: str | None) -> None:
        people, things = (len(self.fitting(item.split(" ", 1)[1])) for item in listed.split(" and "))
        self.items(listed)
        assert yes == (things >= people)
        assert lack is None or NUMBERS[lack] == people - things

    def halves(self, side: str, all_: str, words: str, there: str, other: str) -> None:
        left = [box.centre[0] < self.context.width / 2 for box in self.fitting(words)]
        assert NUMBERS[all_] == len(left) and NUMBERS[there] == left.count(side == "left")
        assert NUMBERS[other] == len(left) - NUMBERS[there] < NUMBERS[there]

    def read(self, question: str, answer: str) -> None:
        """Reads the whole answer."""
        said = answer[:1].lower() + answer[1:]
        for start in ("yes", "no"):
            if re.match(rf"{start}\b[,.]", said):
                self.verdict(question, start == "yes", said[len(start) + 1 :].strip())
                return
        for sentence in re.split(r"(?<=\.) ", said):
            self.sentence(question, sentence[:1].lower() + sentence[1:])

    def verdict(self, question: str, yes: bool, rest: str) -> None:
        rest = rest[:1].lower() + rest[1:]
        low = question[:1].lower() + question[1:].rstrip("?")
        relation = re.fullmatch(rf"(?:is|are) {THE} (?:to the )?(left|right|above|below)(?: of)? {THE}", low)
        if relation:
            a, b = self.the(relation[1]), self.the(relation[3])
            how = (
                relation[2]
                if yes
                else {"left": "right", "right": "left", "above": "below", "below": "above"}[relation[2]]
            )
            self.placed(a, how, b)
        elif re.match("(?:could each|are there enough|is there an? .* for every)", low):
            found = re.fullmatch(
                r"there are (.+), (?:and|but) there (?:is|are) (.+?)(?:, so (\w+) would go without"
                r"|: (?:exactly|more than) one for each)\.",
                rest,
            )
            assert found, rest
            self.each(yes, f"{found[1]} and {found[2]}", found[3])
            return
        elif re.match("(?:are|do) the .* (?:same|share a) side", low):
            assert yes == ("both" in rest), rest
        elif not low.startswith("do the"):
            noun = re.search(
                r"(?:is there|see|show|is|are there|are) (?:an?|any) ([a-z ]+?)(?: in| here| visible| anywhere|$)", low
            )
            assert noun, question
            assert bool(self.fitting(noun[1])) == yes, question
        if rest:
            for sentence in re.split(r"(?<=\.) ", rest):
                self.sentence(question, sentence[:1].lower() + sentence[1:])

    def sentence(self, question: str, said: str) -> None:
        for pattern, judge in (
            (
                rf"{THE} and {THE} are both {WHERE}\.",
                lambda a, b, w: (self.within(self.the(a), w), self.within(self.the(b), w)),
            ),
            (
                r"(?:it is |the color of the [a-z ]+ is |the [a-z ]+ is )?(red|blue)\.",
                lambda colour: self.colour(question, colour),
            ),
            (
                rf"{THE} (?:is|are) (?:further )?to the (left|right) of {THE}\.",
                lambda a, h, b: self.placed(self.the(a), h, self.the(b)),
            ),
            (
                rf"{THE} (?:is|are) (above|below) {THE}(?: in the picture)?\.",
                lambda a, h, b: self.placed(self.the(a), h, self.the(b)),
            ),
            (
                rf"{THE} (?:is|are) further (left|right)\.",
                lambda a, h: self.placed(self.the(a), h, self.other(question, a)),
            ),
            (
                rf"{THE} (?:is|are) between the other two, to the right of {THE} and to the left of {THE}\.",
                self.between,
            ),
            (
                rf"the order is {THE}, {THE}, {THE}: {THE} (?:is|are) to the right of {THE} and to the left of {THE}\.",
                self.order,
            ),
            (
                (
                    rf"first {THE}, then {THE}, and last {THE}: {THE} (?:is|are) to the left of {THE}, "
                    rf"and {THE} (?:is|are) to the right of {THE}\."
                ),
                self.first,
            ),
            (
                rf"{THE} (?:is|are) {WHERE}, (?:and|while) {THE} (?:is|are) {WHERE}\.",
                lambda a, w, b, v: (self.within(self.the(a), w), self.within(self.the(b), v)),
            ),
            (rf"{THE} (?:is|are) {WHERE}\.", lambda a, w: self.within(self.the(a), w)),
            (rf"it is {WHERE}\.", lambda w: self.within(self.the(self.topic(question)), w)),
            (
                rf"{THE} (?:is|are) nearer to the (left|right) edge, because it is {WHERE}\.",
                lambda a, h, w: (self.within(self.the(a), h), self.within(self.the(a), w)),
            ),
            (rf"{THE} (?:takes up more of the picture|is larger in the picture)\.", lambda a: self.chosen(question, a)),
            (rf"{THE} takes up more of the picture: it appears both wider and taller than {THE}\.", self.wider),
            (
                rf"(?:here: )?{THE}(?: is here)?\.",
                lambda a: self.the(a) if re.search("oint|find|ocate|how me", question) else self.chosen(question, a),
            ),
            (rf"({COUNTED})\.", lambda n: self.counts(n, self.topic(question))),
            (rf"({COUNTED}) of them\.", lambda n: self.counts(n, self.topic(question))),
            (rf"({COUNTED}) ([a-z ]+) can be seen\.", self.counts),
            (rf"(?:i count|i see) ({COUNTED}) ([a-z ]+)\.", self.counts),
            (rf"there (?:is|are) ({COUNTED}) ([a-z ]+?) {WHERE}\.", self.one_there),
            (r"there is only one ([a-z ]+): no other [a-z ]+ can be seen\.", lambda words: self.counts("one", words)),
            (rf"there is more than one [a-z ]+, since I count ({COUNTED}) ([a-z ]+) in the picture\.", self.counts),
            (r"there are more ([a-z ]+) than ([a-z ]+)\.", self.more),
            (
                rf"there are more ([a-z ]+), ({COUNTED} [a-z ]+) against ({COUNTED} [a-z ]+)\.",
                lambda many, a, b: (self.items(f"{a} and {b}"), self.more(many, b.split(" ", 1)[1])),
            ),
            (
                rf"([a-z ]+): there are ({COUNTED} [a-z ]+) and ({COUNTED} [a-z ]+)\.",
                lambda many, a, b: (self.items(f"{a} and {b}"), self.more(many, b.split(" ", 1)[1])),
            ),
            (
                (
                    rf"there are more ([a-z ]+): I count ({COUNTED} [a-z ]+) and ({COUNTED} ([a-z ]+)), "
                    r"a difference of (\w+)\."
                ),
                lambda many, a, b, fewer, d: (self.items(f"{a} and {b}"), self.more(many, fewer, d)),
            ),
            (
                (
                    rf"the ([a-z ]+) outnumber the ([a-z ]+), since there are ({COUNTED} [a-z ]+) "
                    rf"but only ({COUNTED} [a-z ]+)\."
                ),
                lambda many, fewer, a, b: (self.items(f"{a} and {b}"), self.more(many, fewer)),
            ),
            (
                rf"there are ({COUNTED} [a-z ]+) and ({COUNTED} [a-z ]+), so there are more ([a-z ]+)\.",
                lambda a, b, many: (self.items(f"{a} and {b}"), self.more(many, b.split(" ", 1)[1])),
            ),
            (r"there (?:is|are) (.+), which makes (\w+) altogether\.", lambda listed, n: self.total(n, listed)),
            (r"(\w+) in all: (.+)\.", self.total),
            (r"i count (.+), so together there are (\w+)\.", lambda listed, n: self.total(n, listed)),
            (
                r"in the (left|right) half: all (\w+) ([a-z ]+) are there\.",
                lambda side, n, words: self.halves(side, n, words, n, "no"),
            ),
            (
                (
                    r"in the (left|right) half: of the (\w+) ([a-z ]+), (\w+) are there, "
                    r"and just (\w+) (?:is|are) in the other half\."
                ),
                self.halves,
            ),
            (
                r"there (?:is|are) (no [a-z ]+), but there (?:is|are) ([a-z ]+)\.",
                lambda none, there: (self.items(none), self.items(there)),
            ),
            (r"there (?:is|are) (no [a-z ]+?)(?: in the picture)?\.", self.items),
            (
                rf"there are (?!{COUNTED} )([a-z ]+) in the picture\.",
                lambda words: self.fitting(words) or pytest.fail(words),
            ),
            (
                r"(?:besides, there (?:is|are)|there (?:is|are)(?: also)?|the picture also shows) ([a-z, ]+)\.",
                self.items,
            ),
        ):
            found = re.fullmatch(pattern, said)
            if found:
                judge(*found.groups())
                return
        raise AssertionError(f"not read: {question!r} {said!r}")

    def one_there(self, number: str, words: str, where: str) -> None:
        self.counts(number, words)
        for box in self.fitting(words) if where != "in the picture" else ():
            self.within(box, where)

    def between(self, b: str, a: str, c: str) -> None:
        self.placed(self.the(a), "left", self.the(b))
        self.placed(self.the(b), "left", self.the(c))

    def order(self, a: str, b: str, c: str, *again: str) -> None:
        assert again == (b, a, c)
        self.between(b, a, c)

    def first(self, a: str, b: str, c: str, *again: str) -> None:
        assert again == (a, b, c, b)
        self.between(b, a, c)

    def grounded(self, question: str, said: str, boxes: Sequence[Box]) -> None:
        """An exchange that mentions boxes."""
        region = re.search(r"\[\]\(box:(\d+)\)", question)
        outermost = re.search(r"furthest to the (left|right)|(left|right)most", question)
        for part in (part for text in (question, said) for part in parts(text) if isinstance(part, Mention)):
            meant = [boxes[place] for place in part.boxes]
            words = re.sub(r"^the |^(left|right)most ", "", part.phrase.lower())
            words = re.sub(r"^(left|right)most ", "", words)
            number, _, rest = words.partition(" ")
            if number in NUMBERS:
                assert sorted(map(id, meant)) == sorted(map(id, self.fitting(rest))) and len(meant) == NUMBERS[number]
            elif words and words != "this one":
                assert all(any(box is fit for fit in self.fitting(words)) for box in meant)
        if outermost:
            (mention,) = [part for part in parts(said) if isinstance(part, Mention)]
            box = boxes[mention.boxes[0]]
            for other in self.context.boxes:
                if other.label == box.label and other is not box:
                    self.placed(box, outermost[1] or outermost[2], other)
        elif region and "relative" not in question:
            label = boxes[int(region[1])].label
            name = re.sub(r"^(?:it is |there is )?(?:an?) ", "", said.rstrip(".").lower())
            assert set(name.split()) <= set(label.split()), (name, label)
        else:
            for each in re.findall(r"^There are (\w+) ([a-z ]+): ((?:\[\]\(box:\d+\)(?:, | and |))+)\.", said):
                assert {boxes[int(place)] for place in re.findall(r"\d+", each[2])} == set(self.fitting(each[1]))
            self.read(plain(question), re.sub(r": .*", ".", plain(said)) if "[](" in said else plain(said))
