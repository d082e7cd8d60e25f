"""The offline writer: questions and answers that follow from an image's texts and boxes, composed without a model.

Facts come first (`captioners.instruct.facts`, whose docstring says which evidence licenses which claim), words second
(`captioners.instruct.phrases`). An answer says nothing that is no fact, so it is as true as the texts and boxes are.
What cannot be said for sure is left out; where too little is left for a conversation of a kind, there is none, with
the reason ``writer.nothing_to_say``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, ClassVar

from captioners.instruct import facts as evidence
from captioners.instruct import nouns, phrases, telling
from captioners.instruct.facts import Facts, Mention, Thing, above, in_column, left_of
from captioners.instruct.nouns import words_of
from captioners.instruct.phrases import Choices, capital, listed, number
from pairmill.boxes import Box
from pairmill.instructions import Instruction, Task, Turn, render
from pairmill.instructions import Mention as MentionOfBoxes
from pairmill.stage import Resources
from schemas.config import InstructKind, RunConfig
from schemas.reasons import Reason

OFFLINE = "offline"
"""The name under which its conversations are stored."""


@dataclass(frozen=True)
class OfflineWriter:
    """Writes without a model.

    Args:
        seed: another one gives other wordings and other choices among the facts.
    """

    seed: int = 0
    version: ClassVar[int] = 1
    """Raised when it writes otherwise for the same tasks."""

    @classmethod
    def of(cls, config: RunConfig) -> OfflineWriter:
        """As the config has it."""
        return cls(config.seed)

    def identity(self) -> dict[str, Any]:
        """What determines its answers."""
        return {"writer": OFFLINE, "version": self.version, "seed": self.seed}

    @property
    def resources(self) -> Resources:
        """One core, no weights."""
        return Resources()

    def open(self) -> Callable[[Sequence[Task]], list[Instruction]]:
        """The function that writes: one conversation a task, in order."""
        nouns.lexicon()
        seed = self.seed

        def write(tasks: Sequence[Task]) -> list[Instruction]:
            composer: _Composer | None = None
            written = []
            for task in tasks:
                if composer is None or composer.context is not task.context:
                    composer = _Composer(evidence.read(task.context))
                written.append(composer.write(task.kind, seed))
            return written

        return write


def compose(facts: Facts, kind: InstructKind, seed: int = 0) -> Instruction:
    """One conversation of a kind, or why there is none."""
    return _Composer(facts).write(kind, seed)


def _renumbered(turns: Sequence[Turn], boxes: Sequence[Box]) -> tuple[list[Turn], tuple[Box, ...]]:
    """Mentions of the context's boxes as mentions of the conversation's own, numbered as they come."""
    places: dict[int, int] = {}
    renamed = []
    for turn in turns:
        content = render(
            turn.content,
            lambda mention: str(
                replace(mention, boxes=tuple(places.setdefault(place, len(places)) for place in mention.boxes))
            ),
        )
        renamed.append(replace(turn, content=content))
    return renamed, tuple(boxes[place] for place in places)


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
_OPPOSITE = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}
_DETAIL_WORDS = 12
"""Fewest words of a long description."""
_WORD = re.compile(r"[A-Za-z0-9]+(?:['\u2019][A-Za-z]+)*")
_PAIRED = frozenset({"relation", "choice", "verify"})
"""Topics of which one conversation asks one for the same two things."""
Pair = tuple[str, str]
"""A question and its answer."""


@dataclass(frozen=True)
class _Idea:
    """A question that could be asked."""

    topic: str
    keys: tuple[str, ...]
    """Of the things that it is about."""
    write: Callable[[], Pair | None]


class _Composer:
    """Composes from the facts of one image."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.choices = Choices()
        self.context = facts.context
        self.boxed = facts.boxed()
        self.names = names(facts)
        self.groups = groups(self.boxed)
        self.soles = [thing for thing in self.boxed if thing.sole and thing.key in self.names]

    def write(self, kind: InstructKind, seed: int) -> Instruction:
        """One conversation of a kind, or why there is none."""
        self.choices = Choices(seed, self.context.uid, kind)
        pairs = {
            "conversation": self.conversation,
            "detail": self.detail,
            "complex": self.complex,
            "grounding": self.grounding,
        }[kind]()
        if isinstance(pairs, str):
            return Instruction(kind, writer=OFFLINE, reason=Reason.WRITER_NOTHING_TO_SAY.value, detail=pairs)
        turns = [turn for asked, answered in pairs for turn in (Turn("user", asked), Turn("assistant", answered))]
        turns, boxes = _renumbered(turns, self.context.boxes)
        return Instruction(kind, tuple(turns), boxes, OFFLINE)

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
        return self.names.get(thing.key, thing.noun.one)

    def the(self, thing: Thing, *, plain: bool = False) -> str:
        """``the dog``, sometimes with its colour."""
        name = self.one(thing)
        coloured = thing.colour and not thing.colour_in_label and thing.sole and thing.key != "person"
        if coloured and not plain and self.choices.below(4) == 0:
            return f"the {' and '.join(thing.colour)} {name}"
        return f"the {name}"

    def a(self, thing: Thing) -> str:
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

    def are(self, things: Sequence[Thing]) -> str:
        """The verb after "there"."""
        first = things[0]
        return "are" if (first.count or 1) > 1 else "is"

    def named(self, thing: Thing) -> bool:
        """Whether texts name a thing without boxes surely enough: two of them, or the only one."""
        return len({mention.text for mention in thing.told}) >= min(2, len(self.facts.texts))

    # -- what may be asked ---------------------------------------------------------------------------------------------

    def ideas(self) -> Iterator[_Idea]:
        for thing in self.facts.things.values():
            key = (thing.key,)
            if thing.count is not None and thing.count > 1:
                yield _Idea("count", key, partial(self.ask_count, thing))
            if thing.sole:
                if thing.colour and self.has_colour(thing):
                    yield _Idea("color", key, partial(self.ask_colour, thing))
                if (
                    thing.material
                    and self.surely_one(thing)
                    and thing.key not in nouns.ROOMS
                    and thing.key not in nouns.OUTDOORS
                ):
                    yield _Idea("material", key, partial(self.ask_material, thing))
                if thing.side or thing.level or thing.central:
                    yield _Idea("side", key, partial(self.ask_side, thing))
            if thing.sole or (thing.several and (thing.count is not None or not thing.boxes)):
                for deed in telling.deeds(self.facts, thing):
                    yield _Idea("doing", key, partial(self.ask_doing, thing, deed))
        for group in self.groups:
            yield _Idea("count", (group.key,), partial(self.ask_count, group))
        for a, b in self.pairs():
            keys = (a.key, b.key)
            if self.relation(a, b):
                yield _Idea("relation", keys, partial(self.ask_relation, a, b))
                yield _Idea("choice", keys, partial(self.ask_which, a, b))
                yield _Idea("verify", keys, partial(self.ask_whether, a, b))
            if _larger(a, b) and _alike(a, b):
                yield _Idea("larger", keys, partial(self.ask_larger, a, b))
        for a, b in self.counts():
            yield _Idea("more", (a.key, b.key), partial(self.ask_more, a, b))
        place = self.place()
        if place in nouns.ROOMS or place in _PLACES:
            yield _Idea("place", (place,), partial(self.ask_place, place))

    def pairs(self) -> list[tuple[Thing, Thing]]:
        """Of the ones with boxes, the larger first; at most 28."""
        few = self.soles[:8]
        return [(a, b) for place, a in enumerate(few) for b in few[place + 1 :]]

    def counts(self) -> list[tuple[Thing, Thing]]:
        """Things that one may count against each other, the more numerous first."""
        counted = [thing for thing in self.boxed if thing.count is not None and thing.noun.counts]
        # "red circles and dogs" might be red dogs
        if len({nouns.described(thing.key).head == thing.key.lower() for thing in counted}) > 1:
            return []
        return [
            (a, b)
            for a in counted
            for b in counted
            if (a.count or 0) > (b.count or 0) and (a.count or 0) > 1 and (_alike(a, b) or (b.count or 0) > 1)
        ]

    def has_colour(self, thing: Thing) -> bool:
        """Whether one would ask for its colour: no person, no part of one; clothes only of the one person, so that
        "the shirt" can be only one."""
        if thing.colour_in_label:
            return thing.key in self.names and thing.colour[0] not in self.names[thing.key].split()
        person = self.facts.things.get("person")
        if thing.key in nouns.CLOTHES:
            return person is not None and person.sole
        if not self.surely_one(thing):
            return False
        return thing.key != "person" and (bool(thing.boxes) or nouns.askable(thing.key))

    def surely_one(self, thing: Thing) -> bool:
        """Whether "the bus" can be only one: "a red bus" in one text alone leaves room for another bus."""
        definite = all(self.facts.texts[mention.text].low[mention.start] == "the" for mention in thing.told)
        return bool(thing.boxes) or definite or len({mention.text for mention in thing.told}) > 1

    def relation(self, a: Thing, b: Thing) -> str | None:
        """How the first is placed to the second; null where that is not plain."""
        if a.box is None or b.box is None:
            return None
        if left_of(a.box, b.box, self.context.width):
            return "to the left of"
        if left_of(b.box, a.box, self.context.width):
            return "to the right of"
        if in_column(a.box, b.box):
            if above(a.box, b.box, self.context.height):
                return "above"
            if above(b.box, a.box, self.context.height):
                return "below"
        return None

    def place(self) -> str | None:
        """The room, or what shows that it is outdoors, that texts agree on."""
        if any(not nouns.UNREAL.isdisjoint(text.low) for text in self.facts.texts):
            return None
        things = self.facts.things
        rooms = [key for key in nouns.ROOMS if key in things and self.named(things[key])]
        outdoors = [key for key in sorted(_OUTDOORS) if key in things and self.named(things[key])]
        words = {word for text in self.facts.texts for word in text.low}
        if len(rooms) == 1 and not outdoors and words.isdisjoint(_NOT_INSIDE):
            return rooms[0]
        if outdoors and not any(key in things for key in nouns.ROOMS) and words.isdisjoint(_NOT_OUTSIDE):
            single = [key for key in outdoors if not things[key].several]
            return single[0] if single else None
        return None

    # -- questions and answers -----------------------------------------------------------------------------------------

    def ask_scene(self, place: int) -> Pair | None:
        told = telling.tell(self.facts, place, self.choices, bare=True)
        return (self.choices.of(phrases.SCENE), told) if told else None

    def ask_count(self, thing: Thing) -> Pair:
        said = number(thing.count or 0)
        return self.ask(phrases.COUNT, phrases.COUNTED, many=thing.noun.many, number=said, Number=capital(said))

    def ask_colour(self, thing: Thing) -> Pair:
        colour = listed(thing.colour)
        return self.ask(phrases.COLOR, phrases.COLORED, color=colour, Color=capital(colour), **self.words(thing))

    def ask_material(self, thing: Thing) -> Pair:
        return self.ask(phrases.MATERIAL, phrases.MADE, material=thing.material, **self.words(thing))

    def ask_doing(self, thing: Thing, deed: telling.Deed) -> Pair:
        text = self.facts.texts[deed.text]
        words = self.words(thing)
        several = not thing.sole
        if several:
            many = deed.subject.form.word if deed.subject.form.many else thing.noun.many
            many = nouns.plural(many) if deed.subject.form.many and nouns.plural(many) in text.low else thing.noun.many
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
        answers = (
            ("{The} {is} {said}", "{It} {is} {said}") if several or thing.key != "person" else ("{The} {is} {said}",)
        )
        return question, self.say(answers, said=deed.said, **words)

    def ask_side(self, thing: Thing) -> Pair:
        answers = ("{The} {is} {place}.", "{It} {is} {place}.") if not thing.noun.live else ("{The} {is} {place}.",)
        return self.ask(phrases.SIDE, answers, place=_place(thing), **self.words(thing))

    def ask_relation(self, a: Thing, b: Thing) -> Pair:
        a, b = self.choices.shuffled((a, b))
        relation = self.relation(a, b) or ""
        words = {**self.words(a), "other": self.the(b)}
        if relation in ("above", "below"):
            return self.ask(
                phrases.RELATION, ("{The} {is} {relation} {other} in the picture.",), relation=relation, **words
            )
        return self.ask(phrases.BESIDE, ("{The} {is} {relation} {other}.",), relation=relation, **words)

    def ask_which(self, a: Thing, b: Thing) -> Pair:
        relation = self.relation(a, b) or ""
        first, last = (a, b) if relation in ("to the left of", "above") else (b, a)
        one, two = self.choices.shuffled((first, last))
        words = {"the": self.the(one), "other": self.the(two)}
        if relation in ("above", "below"):
            return self.say(phrases.HIGHER, **words), f"{capital(self.the(first, plain=True))}."
        left = self.choices.below(2) == 0
        question = self.say(phrases.LEFTMOST if left else phrases.RIGHTMOST, **words)
        which = first if left else last
        answers = ("{The}.", "{The} {is} further {side}.")
        return question, self.say(answers, side="left" if left else "right", **self.words(which))

    def ask_whether(self, a: Thing, b: Thing) -> Pair:
        a, b = self.choices.shuffled((a, b))
        relation = self.relation(a, b) or ""
        the, other, verb = self.the(a, plain=True), self.the(b, plain=True), a.noun.verb
        if self.choices.below(2):
            answer = self.choices.of((f"Yes, {the} {verb} {relation} {other}.", "Yes."))
            return f"{capital(verb)} {the} {relation} {other}?", answer
        return f"{capital(verb)} {the} {_OPPOSITE[relation]} {other}?", f"No, {the} {verb} {relation} {other}."

    def ask_larger(self, a: Thing, b: Thing) -> Pair:
        one, two = self.choices.shuffled((a, b))
        question = self.say(phrases.LARGER, the=self.the(one), other=self.the(two))
        answers = ["{The}."]
        if a.noun.verb == "is":
            answers += ["{The} takes up more of the picture.", "{The} is larger in the picture."]
        return question, self.say(answers, **self.words(a))

    def ask_more(self, a: Thing, b: Thing) -> Pair:
        one, two = self.choices.shuffled((a, b))
        question = self.say(phrases.MORE, many=one.noun.many, others=two.noun.many)
        many = a.noun.many
        return question, self.choices.of(
            (
                f"There are more {many} than {b.noun.many}.",
                f"{capital(many)}: there {self.are([a])} {self.exactly(a)} and {self.exactly(b)}.",
                f"There are more {many}, {self.exactly(a)} against {self.exactly(b)}.",
            )
        )

    def ask_place(self, place: str) -> Pair:
        a = f"{nouns.article(place)} {place}" if place not in ("woods",) else "the woods"
        return self.choices.of(phrases.PLACE), self.choices.of((f"This is {a}.", f"It is {a}.", f"{capital(a)}."))

    def ask_present(self, thing: Thing) -> Pair:
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
        place = f" {_place(thing)}" if thing.side or thing.level else " in the picture"
        there = ["Yes, there {be} {a}{place}.", "Yes, there {be} {a}.", "Yes."]
        if thing.sole and thing.colour and not thing.colour_in_label and thing.key not in ("person", *nouns.CLOTHES):
            colour = " and ".join(thing.colour)
            there.append(f"Yes, there is {nouns.article(colour)} {colour} {thing.noun.one}.")
        return self.ask(phrases.PRESENT, there, a=a, be="is", place=place)

    def ask_absent(self, label: str) -> Pair:
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
        if self.soles:
            other = self.choices.of(self.soles)
            answers.append(f"No, {none}, but there {self.are([other])} {self.a(other)}.")
        return question, self.choices.of(answers)

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
                and self.named(thing)
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
        near = [label for label in self.facts.absent if any(_alike_labels(label, thing.key) for thing in self.boxed)]
        return self.choices.of(near if near and self.choices.below(2) else self.facts.absent)

    # -- conversation --------------------------------------------------------------------------------------------------

    def conversation(self) -> list[Pair] | str:
        """Two to five questions with their answers, no two of them alike."""
        most = 2 + self.choices.below(4)
        talk = _Talk(most)
        texts = list(self.facts.order[:3])
        opening: list[_Idea] = []
        present = self.presence() if self.choices.below(5) < 3 else None
        if texts and self.choices.below(4):
            place = texts.pop(self.choices.below(len(texts)))
            keys = tuple(telling.keys_of(self.facts, place))
            scene = _Idea("scene", keys, partial(self.ask_scene, place))
            # "is there a dog" comes before what says that there is one
            opening = [present, scene] if present is not None and present.keys[0] in keys else [scene]
        if present is not None and present not in opening:
            opening.append(present)
        for idea in opening:
            talk.add(idea.write(), idea.keys, idea.topic)
        held: dict[str, list[_Idea]] = {}
        for idea in self.ideas():
            held.setdefault(idea.topic, []).append(idea)
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

    # -- detail --------------------------------------------------------------------------------------------------------

    def detail(self) -> list[Pair] | str:
        """One question, and all that is sure, in order: what happens, what there is, where it is."""
        facts = self.facts
        said: list[str] = []
        known: dict[str, str] = {}
        content: set[str] = set()
        postures: set[str] = set()
        touched: set[str] = set()
        for bare in (False, True):
            for place in facts.order:
                text = facts.texts[place]
                words = telling.content(text)
                new = words - content
                held = telling.posture(text)
                if len(said) == 3 or (said and (bare or len(new) < 3 or 2 * len(new) < len(words))):
                    continue
                if held is not None and held[0] in postures:
                    continue
                told = telling.tell(facts, place, self.choices, bare=bare, known=known)
                if told is not None:
                    said.append(told)
                    content |= words
                    known = {**telling.keys_of(facts, place), **known}
                    touched |= telling.touched(facts, place)
                    if held is not None:
                        postures.add(held[0])
            if said:
                break
        coloured = [thing for thing in facts.things.values() if thing.sole and thing.colour and thing.key in known]
        coloured = [thing for thing in coloured if self.has_colour(thing) and content.isdisjoint(thing.colour)][:2]
        if coloured:
            each = [f"the {self.one(thing)} {thing.noun.verb} {listed(thing.colour)}" for thing in coloured]
            said.append(f"{capital(', and '.join(each))}.")
        for thing in self.boxed:
            if (thing.count or 0) > 1 and thing.key in known and not any(mention.stated for mention in thing.mentions):
                said.append(f"There are {number(thing.count or 0)} {thing.noun.many}.")
                break
        others = [thing for thing in self.boxed if thing.key not in touched and (thing.sole or thing.count)][:6]
        if others:
            # "two red circles and two dogs": the dogs might be red
            others.sort(key=lambda thing: nouns.described(thing.key).head != thing.key.lower())
            items = listed([self.counted(thing) for thing in others])
            be = self.are(others)
            also = ("There {be} also {items}.", "The picture also shows {items}.", "Besides, there {be} {items}.")
            said.append(self.say(also if said else ("There {be} {items}.",), be=be, items=items))
        placed = self.choices.shuffled([thing for thing in self.soles[:6] if thing.side or thing.level])
        placed = list(
            {thing.side or thing.level: thing for thing in placed if thing.side or not placed[0].side}.values()
        )[:2]
        if len(placed) == 2:
            ends = [f"{self.the(thing)} {thing.noun.verb} {_place(thing, short=True)}" for thing in placed]
            ends[1] = ends[1].replace(" of the picture", "")
            said.append(f"{capital(self.choices.of((', and ', ', while ')).join(ends))}.")
        for thing in (placed or [thing for thing in self.soles if thing.central])[: len(placed) != 2]:
            said.append(f"{capital(self.the(thing))} {thing.noun.verb} {_place(thing)}.")
        related = [(a, b) for a, b in self.pairs() if self.relation(a, b) and not (a in placed and b in placed)]
        relations: set[str | None] = set()
        for a, b in self.choices.shuffled(related)[:4]:
            a, b = self.choices.shuffled((a, b))
            relation = self.relation(a, b)
            told = f"{capital(self.the(a))} {a.noun.verb} {relation} {self.the(b)}."
            if relation not in relations and len(relations) < 2 and not " ".join(said).endswith(f" {self.one(a)}."):
                said.append(told)
                relations.add(relation)
        if len(_WORD.findall(" ".join(said))) < _DETAIL_WORDS:
            return "its texts and boxes say too little for a long description"
        return [(self.choices.of(phrases.DETAIL), " ".join(said))]

    # -- complex -------------------------------------------------------------------------------------------------------

    def complex(self) -> list[Pair] | str:
        """One question that takes several facts, and the answer with its reasons."""
        ideas: dict[str, list[Callable[[], Pair]]] = {}

        def add(topic: str, write: Callable[[], Pair]) -> None:
            ideas.setdefault(topic, []).append(write)

        for a, b in self.counts():
            add("more", partial(self.why_more, a, b))
        counted = [thing for thing in self.boxed if thing.count is not None and thing.noun.counts]
        for place, a in enumerate(counted):
            for b in counted[place + 1 :]:
                if _alike(a, b) and max(a.count or 0, b.count or 0) > 1:
                    add("total", partial(self.why_total, a, b))
            halves = self.halves(a)
            if halves is not None:
                add("halves", partial(self.why_halves, a, *halves))
        person = self.facts.things.get("person")
        if person is not None and person.boxes and (person.count or 0) > 1:
            for thing in counted:
                if thing.key in _EACH:
                    add("each", partial(self.why_each, person, thing))
        for triple in self.triples():
            add("order", partial(self.why_order, triple))
            add("between", partial(self.why_between, triple))
        for thing in self.soles:
            if thing.side and thing.noun.live:
                for deed in telling.deeds(self.facts, thing):
                    add("who", partial(self.why_who, thing, deed))
        for a, b in self.pairs():
            if a.side and b.side and (a.noun.live or b.noun.live):
                add("sides", partial(self.why_sides, a, b))
            if _larger(a, b) and _alike(a, b) and a.noun.verb == "is" and _wider_and_taller(a, b):
                add("larger", partial(self.why_larger, a, b))
        setting = self.place()
        if setting is not None:
            found = self.sure(_USUAL.get(setting, ()))
            if found:
                add("room", partial(self.why_room, setting, found))
            add("setting", partial(self.why_setting, setting))
        for sport, labels in _SPORTS.items():
            if any(sport in text.low for text in self.facts.texts) and self.sure(labels):
                add("sport", partial(self.why_sport, sport, self.sure(labels)))
        if not ideas:
            for thing in self.boxed:
                if thing.noun.counts and (thing.count or 0) > 0:
                    add("only", partial(self.why_only, thing))
                if thing.sole and thing.side and thing.key in self.names:
                    add("edge", partial(self.why_edge, thing))
        if not ideas:
            return "no question could be answered by combining facts of its texts and boxes"
        return [self.choices.of(ideas[self.choices.of(sorted(ideas))])()]

    def sure(self, labels: Sequence[str]) -> list[Thing]:
        """Things with boxes whose number is sure."""
        found = [self.facts.things[key] for key in labels if key in self.facts.things]
        return [thing for thing in found if thing.boxes and (thing.sole or thing.count)]

    def triples(self) -> list[tuple[Thing, Thing, Thing]]:
        """Three ones, each plainly to the left of the next."""
        row = [(thing.box, thing) for thing in self.soles[:6] if thing.box is not None]
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
            be=self.are([a]),
            total=total,
            Total=capital(total),
        )

    def why_more(self, a: Thing, b: Thing) -> Pair:
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
            be=self.are([a]),
            difference=number(difference),
        )
        return question, f"Yes. {answer}" if question.startswith("Do ") else answer

    def why_each(self, person: Thing, thing: Thing) -> Pair:
        people, things = person.count or 0, thing.count or 0
        questions = (
            "Could each person in the picture have {a} of their own?",
            "Are there enough {many} for everyone in the picture?",
            "Is there {a} for every person?",
        )
        question = self.say(questions, a=thing.noun.a(), many=thing.noun.many)
        there = f"there {self.are([thing])} {self.exactly(thing)}"
        if things < people:
            lack = people - things
            rest = f"so {number(lack)} would go without"
            return question, f"No. There are {self.exactly(person)}, but {there}, {rest}."
        rest = "exactly one for each" if things == people else "more than one for each"
        return question, f"Yes. There are {self.exactly(person)}, and {there}: {rest}."

    def why_order(self, triple: tuple[Thing, Thing, Thing]) -> Pair:
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
        a, b, c = (self.the(thing, plain=True) for thing in triple)
        questions = (
            "Of {items}, which is in the middle, seen from left to right? Explain.",
            "Which of these is between the other two, going from left to right: {items}?",
        )
        words = self.words(triple[1])
        answer = f"{words['The']} {words['is']} between the other two, to the right of {a} and to the left of {c}."
        return self.say(questions, items=listed(self.choices.shuffled((a, b, c)))), answer

    def why_larger(self, a: Thing, b: Thing) -> Pair:
        one, two = self.choices.shuffled((self.the(a, plain=True), self.the(b, plain=True)))
        questions = (
            "Which takes up more of the picture, {one} or {two}, and why do you think so?",
            "Compare how large {one} and {two} appear. Which one is larger here?",
        )
        words = self.words(a)
        answer = f"{words['The']} takes up more of the picture: it appears both wider and taller than {self.the(b)}."
        return self.say(questions, one=one, two=two), answer

    def why_halves(self, thing: Thing, left: int, right: int) -> Pair:
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
        a = f"{nouns.article(room)} {room}"
        questions = (
            "What suggests that this is {a}?",
            "What kind of room is this, and what tells you so?",
            "Which room is shown here? Give your reasons.",
        )
        items = listed([self.counted(thing) for thing in found])
        answers = (
            f"This is {a}: there {self.are(found)} {items}, as one would expect there.",
            f"It is {a}, and it has what one finds in such a room: {items}.",
        )
        return self.ask(questions, answers, a=a)

    def why_setting(self, place: str) -> Pair:
        inside = place in nouns.ROOMS
        questions = (
            "Was this picture taken indoors or outdoors? How can you tell?",
            "Is this scene indoors or outdoors, and what makes you think so?",
            "Are we indoors or outdoors here? Give a reason.",
        )
        a = "the woods" if place == "woods" else f"{nouns.article(place)} {place}"
        found = [thing for thing in self.sure(_INSIDE if inside else _OUTSIDE) if thing.key != place][:2]
        where = "indoors" if inside else "outdoors"
        also = f", with {listed([self.counted(thing) for thing in found])}" if found else ""
        answers = (
            f"This is {where}: what we see is {a}{also}.",
            f"It must be {where}, since the picture shows {a}{also}.",
        )
        return self.ask(questions, answers)

    def why_sport(self, sport: str, found: Sequence[Thing]) -> Pair:
        questions = (
            "Which sport does the picture show, and what gives it away?",
            "What sport is this? How can you tell?",
        )
        items = listed([self.counted(thing) for thing in found])
        return self.ask(questions, (f"This is {sport}: there {self.are(found)} {items} in the picture.",))

    def why_only(self, thing: Thing) -> Pair:
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
        said = deed.said.rstrip(".")
        who = "Who" if thing.key == "person" else "What"
        questions = (
            f"{who} is {said}, and where in the picture?",
            f"{who} is {said}? Say where in the picture, too.",
        )
        the = f"the {self.one(thing)}"
        if the == "the person":
            the = f"the {deed.subject.form.word}"
        answers = (
            f"{capital(the)} is {said}, on the {thing.side} side of the picture.",
            f"It is {the}, on the {thing.side} side of the picture, that is {said}.",
        )
        return self.choices.of(questions), self.choices.of(answers[: 1 if "," in said else 2])

    def why_sides(self, a: Thing, b: Thing) -> Pair:
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
        words = self.words(thing)
        questions = ("Is {the} nearer to the left or to the right edge of the picture? Explain.",)
        if words["is"] == "are":
            questions = ("Are {the} nearer to the left or to the right edge of the picture? Explain.",)
        answer = "{The} {is} nearer to the {side} edge, because {it} {is} on the {side} side of the picture."
        return self.ask(questions, (answer,), side=thing.side, it=words["It"].lower(), **words)

    # -- grounding -----------------------------------------------------------------------------------------------------

    def grounding(self) -> list[Pair] | str:
        """One to four questions about regions."""
        if not self.boxed:
            return "it has no boxes"
        topics: dict[str, list[Callable[[], Pair]]] = {}

        def add(topic: str, write: Callable[[], Pair]) -> None:
            topics.setdefault(topic, []).append(write)

        for thing in self.boxed:
            if thing.sole and thing.key in self.names:
                add("locate", partial(self.locate, thing))
            if thing.count is not None and thing.count > 1:
                add("all", partial(self.point_out, thing))
                for side, place in self.outermost(thing):
                    add("outermost", partial(self.ask_outermost, thing, side, place))
            add("region", partial(self.region, thing))
        for group in self.groups:
            add("all", partial(self.point_out, group))
        for a, b in self.pairs():
            if self.relation(a, b):
                add("relation", partial(self.linked_relation, a, b))
        best = self.linked_scene()
        if best is not None:
            add("scene", partial(self.describe_linked, best))
        most = 1 + self.choices.below(4)
        pairs: list[Pair] = []
        order = self.choices.shuffled(sorted(topics))
        for topic in order[:most]:
            pair = self.choices.of(topics[topic])()
            if all(pair[0] != old[0] and pair[1] != old[1] for old in pairs):
                pairs.append(pair)
        return pairs

    def locate(self, thing: Thing) -> Pair:
        questions = (
            "Where {is} {the}? Please point it out." if thing.noun.verb == "is" else "Where are {the}?",
            "Point to {the}.",
            "Can you find {the} in the picture?",
            "Locate {the}.",
            "Show me {the}.",
        )
        link = _link(self.the(thing), thing.boxes)
        answers = ["Here: {link}.", "{Link} {is} here."]
        if thing.side or thing.level or thing.central:
            answers = ["{Link} {is} {place}.", "{Link} {is} {place}.", "Here: {link}."]
        words = self.words(thing)
        return self.ask(questions, answers, link=link, Link=capital(link), place=_place(thing), **words)

    def point_out(self, thing: Thing) -> Pair:
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
        questions = (
            "What is at {link} in this picture?",
            "What do you see in the region {link} of the picture?",
            "What is there at {link} in the picture?",
            "Name the thing at {link} in the picture.",
        )
        link = _link("", (self.choices.of(thing.boxes),))
        name = self.one(thing)
        if thing.sole and thing.colour and not thing.colour_in_label and thing.key != "person":
            name = f"{' and '.join(thing.colour)} {name}"
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
        a, b = self.choices.shuffled((a, b))
        first, second = _link(self.the(a), a.boxes), _link(self.the(b), b.boxes)
        questions = (
            "Where {is} {first} in relation to {second}?",
            "How {is} {first} placed relative to {second}?",
            "How are {one} and {two} placed relative to each other?",
        )
        answer = f"{capital(first)} {a.noun.verb} {self.relation(a, b)} {second}."
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
        questions = (
            "Describe the picture and mark what you mention.",
            "What does the picture show? Point out the things that you mention.",
            "Tell me what is going on, and point out the things you name.",
            "Say what the picture shows, with the things in it marked.",
        )
        return self.choices.of(questions), telling.tell(self.facts, place, self.choices, bare=True, link=True) or ""


@dataclass
class _Talk:
    """A conversation that grows."""

    most: int
    pairs: list[Pair] = field(default_factory=list)
    topics: list[str] = field(default_factory=list)
    spoken: set[str] = field(default_factory=set)
    """The things that answers were about."""
    counted: set[str] = field(default_factory=set)
    """Those of which answers gave the number."""
    asked: set[tuple[str, frozenset[str]]] = field(default_factory=set)

    def allows(self, idea: _Idea) -> bool:
        """Whether it asks for something new."""
        if self.topics.count(idea.topic) >= 2:
            return False
        topic = "paired" if idea.topic in _PAIRED else idea.topic
        if idea.topic in ("count", "more") and not self.counted.isdisjoint(idea.keys):
            return False
        return (topic, frozenset(idea.keys)) not in self.asked

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
        keys = frozenset(keys)
        self.spoken |= keys
        if topic in ("count", "more", "present"):
            self.counted |= keys
        self.asked.add(("paired" if topic in _PAIRED else topic, keys))


def _said(answer: str) -> set[str]:
    return set(answer.lower().replace(",", "").rstrip(".").split())


def _link(words: str, boxes: Sequence[int]) -> str:
    return str(MentionOfBoxes(words, tuple(boxes)))


def _larger(a: Thing, b: Thing) -> bool:
    return a.box is not None and b.box is not None and a.box.area >= evidence.LARGER * b.box.area


def _wider_and_taller(a: Thing, b: Thing) -> bool:
    if a.box is None or b.box is None:
        return False
    return a.box.width > 1.15 * b.box.width and a.box.height > 1.15 * b.box.height


def _alike(a: Thing, b: Thing) -> bool:
    """Whether one would compare the two."""
    return _alike_labels(a.key, b.key)


@lru_cache(maxsize=65536)
def _alike_labels(a: str, b: str) -> bool:
    if any(a in alike and b in alike for alike in nouns.CLASSES):
        return True
    return nouns.described(a).head != a.lower() and nouns.described(b).head != b.lower()


def _place(thing: Thing, *, short: bool = False) -> str:
    """``on the left side of the picture, towards the bottom``; one of the two where it is to be short."""
    side, level = thing.side, thing.level
    if short and side is not None:
        level = None
    if side is not None:
        return f"on the {side} side of the picture" + (f", towards the {level}" if level else "")
    return f"at the {level} of the picture" if level else "in the middle of the picture"


def groups(boxed: Sequence[Thing]) -> list[Thing]:
    """Things of several labels that differ in size or colour alone, taken together: the circles."""
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
        if len(alike) > 1 and all(thing.count is not None and thing.key.lower() != head for thing in alike)
    ]


def names(facts: Facts) -> dict[str, str]:
    """What the one of each label is called; without those that would share a name."""
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
        elif parts.head == thing.key.lower():
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
_OUTDOORS = frozenset(word.replace("/", " ") for word in nouns.OUTDOORS) - {"river", "lake", "ocean", "sky", "mountain"}
_PLACES = words_of("beach park forest woods garden farm meadow street") | {"parking lot"}
"""Answers to where one is; a hill is none."""
_NOT_INSIDE = words_of("outside outdoor outdoors patio street beach field park")
_NOT_OUTSIDE = words_of("inside indoor indoors room window restaurant")
