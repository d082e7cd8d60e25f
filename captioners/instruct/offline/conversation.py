"""Conversations: two to five short questions, of different topics, each answered from one fact.

Claimed are what a text says, counts, colours, materials, what a thing does (from texts), places in the picture and
relations (from boxes), and that something is there, or is not; `captioners.instruct.offline.facts` says from what
evidence each. No answer repeats what an earlier one gave away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from captioners.instruct.offline import nouns, phrases, telling
from captioners.instruct.offline.composer import Composer, Pair, by_topic
from captioners.instruct.offline.phrases import capital, listed, number
from captioners.instruct.offline.setting import PLACES, a_setting, setting
from captioners.instruct.offline.texts import Mention
from captioners.instruct.offline.things import Thing, larger, relation

_UPRIGHT = ("above", "below")
_OPPOSITE = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}
_PAIRED = frozenset({"relation", "choice", "verify"})
"""Topics of which one conversation asks one for the same two things."""


@dataclass(frozen=True)
class _Idea:
    """A question that could be asked."""

    topic: str
    keys: tuple[str, ...]
    """Of the things that it is about."""
    write: Callable[[], Pair | None]


@dataclass
class _Talk:
    """A conversation that grows."""

    pairs: list[Pair] = field(default_factory=list)
    topics: list[str] = field(default_factory=list)
    counted: set[str] = field(default_factory=set)
    """The things of which answers gave the number."""
    asked: set[tuple[str, frozenset[str]]] = field(default_factory=set)
    """Topics, each with the things that it was asked of."""

    def allows(self, idea: _Idea) -> bool:
        """Whether it asks for something new."""
        if self.topics.count(idea.topic) >= 2:
            return False
        if idea.topic in ("count", "more") and not self.counted.isdisjoint(idea.keys):
            return False
        return _asked(idea.topic, idea.keys) not in self.asked

    def add(self, pair: Pair | None, keys: Iterable[str], topic: str) -> None:
        """Takes a question and its answer, unless they say what was said."""
        if pair is None:
            return
        words = _said(pair[1])
        for question, answer in self.pairs:
            old = _said(answer)
            if question == pair[0] or answer == pair[1] or len(words & old) > 0.55 * len(words | old):
                return
            if topic in ("count", "doing") and len(words - {"there", "are", "count", "see"} - old) < 1:
                return
        self.pairs.append(pair)
        self.topics.append(topic)
        if topic in ("count", "more", "present"):
            self.counted.update(keys)
        self.asked.add(_asked(topic, keys))


def _asked(topic: str, keys: Iterable[str]) -> tuple[str, frozenset[str]]:
    return "paired" if topic in _PAIRED else topic, frozenset(keys)


def _said(answer: str) -> set[str]:
    return set(answer.lower().replace(",", "").rstrip(".").split())


class Conversation(Composer):
    """Composes a conversation."""

    def compose(self) -> list[Pair] | str:
        """Two to five questions with their answers, no two of them alike."""
        most = 2 + self.choices.below(4)
        talk = _Talk()
        texts = list(self.facts.order[:3])
        opening: list[_Idea] = []
        present = self.presence() if self.choices.below(5) < 3 else None
        if texts and self.choices.below(4):
            place = texts.pop(self.choices.below(len(texts)))
            keys = tuple(telling.keys_of(self.facts, place))
            opening.append(_Idea("scene", keys, partial(self.ask_scene, place)))
        if present is not None:
            # "is there a dog" comes before what says that there is one
            first = bool(opening) and present.keys[0] in opening[0].keys
            opening.insert(0 if first else len(opening), present)
        for idea in opening:
            talk.add(idea.write(), idea.keys, idea.topic)
        held = by_topic((idea.topic, idea) for idea in self.ideas())
        queue = self.choices.shuffled(sorted(held))
        while queue and len(talk.pairs) < most:
            topic = queue.pop(0)
            idea = held[topic].pop(self.choices.below(len(held[topic])))
            if talk.allows(idea):
                talk.add(idea.write(), idea.keys, topic)
            if held[topic]:
                queue.append(topic)
        for place in self.choices.shuffled(texts):
            if len(talk.pairs) < most and talk.topics.count("scene") < 2:
                pair = self.ask_scene(place)
                if pair is not None and "scene" in talk.topics:
                    pair = (self.choices.of(phrases.MORE_SCENE), pair[1])
                talk.add(pair, telling.keys_of(self.facts, place), "scene")
        if len(talk.pairs) < 2 and "present" not in talk.topics:
            present = self.presence(ask=True)
            if present is not None and present.keys[0] not in talk.counted:
                talk.add(present.write(), present.keys, "present")
        return talk.pairs if len(talk.pairs) > 1 else "no two questions could be answered from its texts and boxes"

    # -- what may be asked ---------------------------------------------------------------------------------------------

    def ideas(self) -> Iterator[_Idea]:
        """All that facts answer, but for what a text says and what is there."""
        for thing in self.facts.things.values():
            key = (thing.key,)
            if thing.count is not None and thing.count > 1:
                yield _Idea("count", key, partial(self.ask_count, thing))
            if thing.sole:
                if thing.colour and self.has_colour(thing):
                    yield _Idea("color", key, partial(self.ask_colour, thing))
                if (
                    thing.material
                    and self.facts.names_one(thing)
                    and thing.key not in nouns.ROOMS
                    and thing.key not in nouns.OUTDOORS
                ):
                    yield _Idea("material", key, partial(self.ask_material, thing))
                if thing.placed:
                    yield _Idea("side", key, partial(self.ask_side, thing))
            if thing.sole or (thing.several and (thing.count is not None or not thing.boxes)):
                for deed in telling.deeds(self.facts, thing):
                    yield _Idea("doing", key, partial(self.ask_doing, thing, deed))
        for group in self.picture.groups:
            yield _Idea("count", (group.key,), partial(self.ask_count, group))
        for a, b in self.pairs():
            keys = (a.key, b.key)
            if relation(a, b):
                yield _Idea("relation", keys, partial(self.ask_relation, a, b))
                yield _Idea("choice", keys, partial(self.ask_which, a, b))
                yield _Idea("verify", keys, partial(self.ask_whether, a, b))
            if larger(a, b) and nouns.alike(a.key, b.key):
                yield _Idea("larger", keys, partial(self.ask_larger, a, b))
        for a, b in self.counts():
            yield _Idea("more", (a.key, b.key), partial(self.ask_more, a, b))
        place = setting(self.facts)
        if place in nouns.ROOMS or place in PLACES:
            yield _Idea("place", (place,), partial(self.ask_place, place))

    def presence(self, *, ask: bool = False) -> _Idea | None:
        """Whether something is there; as often, something that is not, where that can be known. Where it cannot, only
        every second time, if it need not be asked."""
        if self.context.labels:
            if self.choices.below(2) and self.facts.absent:
                label = self.absent()
                return _Idea("present", (label,), partial(self.ask_absent, label))
        elif not ask and self.choices.below(2):
            return None
        there = [
            thing
            for thing in self.facts.things.values()
            if (thing.boxes and (thing.sole or thing.count))
            or (
                not thing.boxes
                and self.facts.names(thing)
                and nouns.askable(thing.key)
                and (thing.several or any(self.determined(mention) for mention in thing.told))
            )
        ]
        if not there:
            return None
        thing = self.choices.of(there)
        return _Idea("present", (thing.key,), partial(self.ask_present, thing))

    def determined(self, mention: Mention) -> bool:
        """``a dog``, ``the dog``."""
        return mention.number == 1 or self.facts.texts[mention.text].low[mention.start] == "the"

    def absent(self) -> str:
        """A label to deny: half of the time one that is compared with something that is there (POPE asks for what is
        likely there, as well)."""
        boxed, absent = self.picture.boxed, self.facts.absent
        near = [label for label in absent if any(nouns.alike(label, thing.key) for thing in boxed)]
        return self.choices.of(near if near and self.choices.below(2) else absent)

    # -- questions and answers -----------------------------------------------------------------------------------------

    def ask_scene(self, place: int) -> Pair | None:
        """What a text says; null where it cannot be told."""
        told = telling.tell(self.facts, place, self.choices, bare=True)
        return (self.choices.of(phrases.SCENE), told) if told else None

    def ask_count(self, thing: Thing) -> Pair:
        """How many there are."""
        said = number(thing.count or 0)
        return self.ask(phrases.COUNT, phrases.COUNTED, many=thing.noun.many, number=said, Number=capital(said))

    def ask_colour(self, thing: Thing) -> Pair:
        """Its colour."""
        colour = listed(thing.colour)
        return self.ask(phrases.COLOR, phrases.COLORED, color=colour, Color=capital(colour), **self.words(thing))

    def ask_material(self, thing: Thing) -> Pair:
        """What it is made of."""
        return self.ask(phrases.MATERIAL, phrases.MADE, material=thing.material, **self.words(thing))

    def ask_doing(self, thing: Thing, deed: telling.Deed) -> Pair:
        """What it does, or where it is, in the words of a text."""
        text = self.facts.texts[deed.text]
        words = self.words(thing)
        several = not thing.sole
        if several:
            many, form = thing.noun.many, deed.subject.form
            if form.many and nouns.plural(form.word) in text.low:
                many = nouns.plural(form.word)
            words |= {"the": f"the {many}", "The": f"The {many}", "is": "are", "does": "do", "It": "They"}
        elif thing.key == "person" and words["the"] == "the person":
            words |= {"the": f"the {deed.subject.form.word}", "The": f"The {deed.subject.form.word}"}
        if not thing.noun.live:
            question = self.say(phrases.WHERE, **words)
        else:
            asked = phrases.DEEDS.get(deed.verb, phrases.DOING)
            if "Where" in asked[0] and deed.said.split(" ")[1] not in nouns.PLACES:
                asked = phrases.DOING
            question = self.say(asked, **words)
        answers = ("{The} {is} {said}", "{It} {is} {said}")[: 2 if several or thing.key != "person" else 1]
        return question, self.say(answers, said=deed.said, **words)

    def ask_side(self, thing: Thing) -> Pair:
        """Where in the picture it is."""
        answers = ("{The} {is} {place}.", "{It} {is} {place}.")[: 1 if thing.noun.live else 2]
        return self.ask(phrases.SIDE, answers, place=thing.position, **self.words(thing))

    def ask_relation(self, a: Thing, b: Thing) -> Pair:
        """How one is placed to the other."""
        a, b = self.choices.shuffled((a, b))
        words = {**self.words(a), "other": self.the(b), "how": relation(a, b) or ""}
        if words["how"] in _UPRIGHT:
            return self.ask(phrases.RELATION, ("{The} {is} {how} {other} in the picture.",), **words)
        return self.ask(phrases.BESIDE, ("{The} {is} {how} {other}.",), **words)

    def ask_which(self, a: Thing, b: Thing) -> Pair:
        """Which of the two is further left, right or up."""
        how = relation(a, b)
        first, last = (a, b) if how in ("to the left of", "above") else (b, a)
        one, two = self.choices.shuffled((first, last))
        words = {"the": self.the(one), "other": self.the(two)}
        if how in _UPRIGHT:
            return self.say(phrases.HIGHER, **words), f"{capital(self.the(first, plain=True))}."
        left = self.choices.below(2) == 0
        question = self.say(phrases.LEFTMOST if left else phrases.RIGHTMOST, **words)
        which = first if left else last
        answers = ("{The}.", "{The} {is} further {side}.")
        return question, self.say(answers, side="left" if left else "right", **self.words(which))

    def ask_whether(self, a: Thing, b: Thing) -> Pair:
        """Whether one is placed so to the other; half of the time, the opposite of what is so."""
        a, b = self.choices.shuffled((a, b))
        how = relation(a, b) or ""
        the, other, verb = self.the(a, plain=True), self.the(b, plain=True), a.noun.verb
        if self.choices.below(2):
            answer = self.choices.of((f"Yes, {the} {verb} {how} {other}.", "Yes."))
            return f"{capital(verb)} {the} {how} {other}?", answer
        return f"{capital(verb)} {the} {_OPPOSITE[how]} {other}?", f"No, {the} {verb} {how} {other}."

    def ask_larger(self, a: Thing, b: Thing) -> Pair:
        """Which of the two is larger in the picture."""
        one, two = self.choices.shuffled((a, b))
        question = self.say(phrases.LARGER, the=self.the(one), other=self.the(two))
        answers = ["{The}."]
        if a.noun.verb == "is":
            answers += ["{The} takes up more of the picture.", "{The} is larger in the picture."]
        return question, self.say(answers, **self.words(a))

    def ask_more(self, a: Thing, b: Thing) -> Pair:
        """Of which there are more."""
        one, two = self.choices.shuffled((a, b))
        question = self.say(phrases.MORE, many=one.noun.many, others=two.noun.many)
        many = a.noun.many
        return question, self.choices.of(
            (
                f"There are more {many} than {b.noun.many}.",
                f"{capital(many)}: there {self.be(a)} {self.exactly(a)} and {self.exactly(b)}.",
                f"There are more {many}, {self.exactly(a)} against {self.exactly(b)}.",
            )
        )

    def ask_place(self, place: str) -> Pair:
        """The setting."""
        a = a_setting(place)
        return self.choices.of(phrases.PLACE), self.choices.of((f"This is {a}.", f"It is {a}.", f"{capital(a)}."))

    def ask_present(self, thing: Thing) -> Pair:
        """Whether there is such a thing: yes."""
        many = thing.noun.many
        if thing.count is not None and thing.count > 1:
            answers = (
                "Yes, there are {number} {many}.",
                "Yes, {number} of them.",
                "Yes, there are {many} in the picture.",
            )
            return self.ask(phrases.PRESENT_MANY, answers, many=many, number=number(thing.count))
        if thing.noun.one in nouns.MASS:
            questions = ("Is there any {one} in the picture?", "Can you see any {one}?")
            return self.ask(questions, ("Yes, there is {one} in the picture.", "Yes, there is."), one=thing.noun.one)
        if thing.several:
            return self.ask(phrases.PRESENT_MANY, ("Yes, there are {many} in the picture.", "Yes."), many=many)
        a = self.a(thing)
        place = f" {thing.position}" if thing.side or thing.level else " in the picture"
        there = ["Yes, there is {a}{place}.", "Yes, there is {a}.", "Yes."]
        if thing.told_colour and thing.key not in nouns.CLOTHES:
            colour = " and ".join(thing.told_colour)
            there.append(f"Yes, there is {nouns.article(colour)} {colour} {thing.noun.one}.")
        return self.ask(phrases.PRESENT, there, a=a, place=place)

    def ask_absent(self, label: str) -> Pair:
        """Whether there is such a thing: no; sometimes with what there is."""
        noun = nouns.noun(label)
        if noun.one in nouns.MASS:
            question = self.choices.of((f"Is there any {noun.one} in the picture?", f"Can you see any {noun.one}?"))
            none = f"there is no {noun.one}"
        elif noun.verb == "are" or self.choices.below(3) == 0:
            question = self.say(phrases.PRESENT_MANY, many=noun.many)
            none = f"there are no {noun.many}"
        else:
            question = self.say(phrases.PRESENT, a=noun.a())
            none = f"there is no {noun.one}"
        answers = [f"No, {none} in the picture.", f"No, {none}.", "No."]
        if self.picture.soles:
            other = self.choices.of(self.picture.soles)
            answers.append(f"No, {none}, but there {self.be(other)} {self.a(other)}.")
        return question, self.choices.of(answers)
