"""The offline writer: questions and answers that follow from an image's texts and boxes, composed without a model.

Facts come first (`captioners.instruct.facts`, whose docstring says which evidence licenses which claim), words second
(`captioners.instruct.phrases`). An answer says nothing that is no fact, so it is as true as the texts and boxes are.
What cannot be said for sure is left out; where too little is left for a conversation of a kind, there is none, with
the reason ``writer.nothing_to_say``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from captioners.instruct import facts as evidence
from captioners.instruct import nouns, phrases
from captioners.instruct.facts import Facts, Mention, Text, Thing, above, in_column, left_of
from captioners.instruct.nouns import words_of
from captioners.instruct.phrases import Choices, capital, listed, number
from pairmill.boxes import Box
from pairmill.instructions import Context, Instruction, Task, Turn, render
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
            last: Context | None = None
            known: Facts | None = None
            written = []
            for task in tasks:
                if known is None or task.context is not last:
                    last, known = task.context, evidence.read(task.context)
                written.append(compose(known, task.kind, seed))
            return written

        return write


def compose(facts: Facts, kind: InstructKind, seed: int = 0) -> Instruction:
    """One conversation of a kind, or why there is none."""
    composer = _Composer(facts, Choices(seed, facts.context.uid, kind))
    pairs = {
        "conversation": composer.conversation,
        "detail": composer.detail,
        "complex": composer.complex,
        "grounding": composer.grounding,
    }[kind]()
    if isinstance(pairs, str):
        return Instruction(kind, writer=OFFLINE, reason=Reason.WRITER_NOTHING_TO_SAY.value, detail=pairs)
    turns = [turn for asked, answered in pairs for turn in (Turn("user", asked), Turn("assistant", answered))]
    turns, boxes = _renumbered(turns, facts.context.boxes)
    return Instruction(kind, tuple(turns), boxes, OFFLINE)


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


@dataclass(frozen=True)
class _Idea:
    """A question that could be asked."""

    topic: str
    keys: tuple[str, ...]
    """Of the things that it is about."""
    write: Callable[[], tuple[str, str]]
    """The question and its answer."""


_WORD = re.compile(r"[a-z]+")
_FINITE = words_of("is are was were has have can do does appears seems gets") | (
    nouns.VERBS
    - words_of(
        """covered filled topped surrounded decorated stacked lined mounted placed located made dressed perched gathered
    attached displayed arranged posed left set open closed parked seen"""
    )
)
_WITH = words_of(
    """with of in on at near by under behind next inside outside above below between beside from covered filled topped
    surrounded decorated stacked lined mounted placed located made dressed full"""
)
_PLURAL_GROUPS = words_of("group couple number bunch herd flock crowd lot family team handful pair")
_EACH = frozenset(
    {"surfboard", "skateboard", "umbrella", "bicycle", "frisbee", "snowboard", "tennis racket", "baseball glove",
     "kite", "horse", "motorcycle", "chair", "backpack", "wine glass", "cup", "fork", "knife", "spoon", "banana",
     "sandwich", "donut", "cell phone", "laptop", "bowl", "remote", "tie", "suitcase", "pizza", "cake", "dog"}
)  # fmt: skip
_USUAL = {
    "kitchen": ("oven", "microwave", "refrigerator", "sink", "toaster"),
    "bathroom": ("toilet", "sink", "toothbrush", "hair drier"),
    "bedroom": ("bed",),
    "living room": ("couch", "tv"),
    "office": ("laptop", "keyboard", "mouse", "chair"),
}
"""Rooms, and what one finds in them."""


class _Composer:
    """Composes from the facts of one image."""

    def __init__(self, facts: Facts, choices: Choices) -> None:
        self.facts = facts
        self.choices = choices
        self.context = facts.context
        self.boxed = facts.boxed()
        self.names = _names(facts)
        self.soles = [thing for thing in self.boxed if thing.sole and thing.key in self.names]

    # -- words for things ----------------------------------------------------------------------------------------------

    def one(self, thing: Thing) -> str:
        return self.names.get(thing.key, thing.noun.one)

    def the(self, thing: Thing, *, colour: bool = True) -> str:
        name = self.one(thing)
        if colour and thing.colour and not thing.colour_in_label and self.choices.below(4) == 0:
            return f"the {' and '.join(thing.colour)} {name}"
        return f"the {name}"

    def a(self, thing: Thing) -> str:
        name = self.one(thing)
        return thing.noun.a() if name == thing.noun.one else f"{nouns.article(name)} {name}"

    def link(self, words: str, *boxes: int) -> str:
        return f"[{words}](box:{','.join(map(str, boxes))})"

    def counted(self, thing: Thing) -> str:
        """``three dogs``, ``a dog``."""
        if thing.count is not None and thing.count > 1:
            return f"{number(thing.count)} {thing.noun.many}"
        return self.a(thing)

    # -- texts ---------------------------------------------------------------------------------------------------------

    def told(self, text: Text, *, bare: bool, known: frozenset[str] = frozenset(), link: bool = False) -> str | None:
        """A text as a statement, or null where it makes none and `bare` is false.

        Args:
            bare: whether a phrase without a verb will do.
            known: things that were mentioned before: "a dog" is "the dog" then.
            link: whether phrases become mentions of boxes.
        """
        if text.said is None:
            return None
        spans = _spans(text)
        if spans is None:
            return text.said if bare and not known and not link else None
        said = text.said
        edits: list[tuple[int, int, str]] = []
        first = text.mentions[0] if text.mentions else None
        prefix = ""
        finite = any(word in _FINITE for word in text.low) or _maybe_verb(text)
        group = text.low[1] if len(text.low) > 2 and text.low[2] == "of" and text.low[1] in nouns.GROUPS else None
        starts = first is not None and first.head and (first.start == 0 or (group is not None and first.start == 3))
        after = text.low[first.end] if first is not None and first.end < len(text.low) else ""
        several = group in _PLURAL_GROUPS if group else first is not None and first.several
        simple = ". " not in said
        statement = text.low[0] in ("there", "this", "here") or finite
        if starts and first is not None and simple and not finite:
            determined = first.number is not None or group is not None or text.low[0] in ("the", "some", "several")
            if after in nouns.PARTICIPLES and (determined or several):
                edits.append((spans[first.end][0], spans[first.end][0], "are " if several else "is "))
                statement = True
            elif (after in _WITH or after == "") and (determined or several):
                shows = self.choices.of(("The picture shows ", "This picture shows ", "This image shows "))
                edits.append((0, 1, shows + said[0].lower()))
                statement = True
        if not statement and not bare:
            return None
        if known:
            for mention in text.mentions:
                key = self.key(mention)
                if key is None or key not in known or not mention.head:
                    if mention is first and known and key is None and mention.form.key in known:
                        key = mention.form.key
                    else:
                        continue
                if text.low[mention.start] not in ("a", "an"):
                    if mention.number is not None or mention.several:
                        return None
                    continue
                thing = self.facts.things.get(key)
                if thing is None or not (thing.sole or key in nouns.ROOMS or key in nouns.OUTDOORS):
                    return None
                start, end = spans[mention.start]
                if any(edit[0] == start for edit in edits):
                    return None
                edits.append((start, end, "The" if start == 0 else "the"))
        if link:
            for mention in text.mentions:
                boxes = self.linked(mention)
                if boxes:
                    start, end = spans[mention.start][0], spans[mention.end - 1][1]
                    if any(start <= edit[0] < end for edit in edits):
                        start = max(edit[1] for edit in edits if start <= edit[0] < end)
                        while start < end and said[start] == " ":
                            start += 1
                    edits.append((start, start, "["))
                    edits.append((end, end, f"](box:{','.join(map(str, boxes))})"))
        for left, right, words in sorted(edits, key=lambda edit: (edit[0], edit[1]), reverse=True):
            said = said[:left] + words + said[right:]
        return prefix + said

    def key(self, mention: Mention) -> str | None:
        """The thing that a mention is about."""
        key = mention.form.key
        if key in self.facts.things:
            return key
        for thing in self.boxed:
            if any(found is mention for found in thing.mentions):
                return thing.key
        return None

    def linked(self, mention: Mention) -> tuple[int, ...]:
        """The boxes of a mention: those of the one, or all where the phrase names as many."""
        key = self.key(mention)
        thing = self.facts.things[key] if key is not None else None
        if thing is None or not thing.boxes or not mention.head:
            return ()
        if thing.sole and not mention.several:
            return thing.boxes
        if thing.count is not None and thing.count > 1 and mention.stated == thing.count:
            return thing.boxes
        return ()

    # -- questions -----------------------------------------------------------------------------------------------------

    def scene(self) -> tuple[str, str] | None:
        order = self.facts.order
        if not order:
            return None
        text = self.facts.texts[order[self.choices.below(min(3, len(order)))]]
        told = self.told(text, bare=True)
        return (self.choices.of(phrases.SCENE), told) if told else None

    def ideas(self) -> Iterator[_Idea]:
        for thing in self.facts.things.values():
            key = (thing.key,)
            if thing.count is not None and thing.count > 1:
                yield _Idea("count", key, partial(self.ask_count, thing))
            if thing.sole:
                if thing.colour and not (thing.key == "person" or thing.colour_in_label) and self.wearer(thing):
                    yield _Idea("colour", key, partial(self.ask_colour, thing))
                if thing.material:
                    yield _Idea("material", key, partial(self.ask_material, thing))
                doing = self.doing(thing)
                if doing is not None:
                    yield _Idea(
                        "doing",
                        key,
                        partial(self.ask_doing, thing, doing),
                    )
                if thing.side or thing.level:
                    yield _Idea("side", key, partial(self.ask_side, thing))
        for a, b in self.pairs():
            keys = (a.key, b.key)
            if self.relation(a, b):
                yield _Idea("relation", keys, partial(self.ask_relation, a, b))
                yield _Idea("choice", keys, partial(self.ask_which, a, b))
                yield _Idea("verify", keys, partial(self.ask_whether, a, b))
            if a.box is not None and b.box is not None and a.box.area >= evidence.LARGER * b.box.area:
                yield _Idea("larger", keys, partial(self.ask_larger, a, b))
        counted = [thing for thing in self.boxed if thing.count is not None and thing.noun.counts]
        for a in counted:
            for b in counted:
                if (a.count or 0) > (b.count or 0) and (a.count or 0) > 1:
                    yield _Idea("more", (a.key, b.key), partial(self.ask_more, a, b))

    def pairs(self) -> list[tuple[Thing, Thing]]:
        """Of the ones with boxes, the larger first; at most 40."""
        few = self.soles[:9]
        return [(a, b) for place, a in enumerate(few) for b in few[place + 1 :]]

    def wearer(self, thing: Thing) -> bool:
        """Whether "the shirt" can be only one: clothes of the one person."""
        if thing.key not in nouns.CLOTHES:
            return True
        person = self.facts.things.get("person")
        return person is not None and person.sole

    def doing(self, thing: Thing) -> tuple[Text, Mention] | None:
        """The best text that says what a thing does, or where it is; null where texts differ in its posture."""
        postures = set()
        best = None
        for place in self.facts.order:
            text = self.facts.texts[place]
            first = text.mentions[0] if text.mentions else None
            if first is None or first.start != 0 or not any(first is found for found in thing.mentions):
                continue
            at = first.end
            if at < len(text.low) and text.low[at] in nouns.POSTURES:
                postures.add(nouns.POSTURES[text.low[at]])
            if at < len(text.low) and text.low[at] == "is":
                at += 1
                if at < len(text.low) and text.low[at] in nouns.POSTURES:
                    postures.add(nouns.POSTURES[text.low[at]])
            if at + 2 >= len(text.low) or text.low[at] not in nouns.PARTICIPLES or first.several:
                continue
            if text.said is None or ". " in text.said or _spans(text) is None:
                continue
            if any(word in _FINITE for word in text.low[at + 1 :]) or text.low[0] not in ("a", "an", "the", "one"):
                continue
            if not thing.noun.live and text.low[at + 1] not in nouns.PLACES:
                continue
            best = best or (text, first)
        return best if len(postures) < 2 else None

    def ask_count(self, thing: Thing) -> tuple[str, str]:
        count = thing.count or 0
        words = {"many": thing.noun.many, "number": number(count), "Number": capital(number(count))}
        return (
            self.choices.of(phrases.COUNT).format(**words),
            self.choices.of(phrases.COUNTED).format(**words),
        )

    def ask_colour(self, thing: Thing) -> tuple[str, str]:
        the = self.the(thing, colour=False)
        colour = listed(thing.colour)
        questions, answers = (
            (phrases.COLOURS_, phrases.COLOURED_MANY)
            if thing.noun.verb == "are"
            else (phrases.COLOUR, phrases.COLOURED)
        )
        words = {"the": the, "The": capital(the), "colour": colour, "Colour": capital(colour)}
        return self.choices.of(questions).format(**words), self.choices.of(answers).format(**words)

    def ask_material(self, thing: Thing) -> tuple[str, str]:
        the = self.the(thing, colour=False)
        words = {"the": the, "The": capital(the), "material": thing.material}
        return self.choices.of(phrases.MATERIAL).format(**words), self.choices.of(phrases.MADE).format(**words)

    def ask_doing(self, thing: Thing, doing: tuple[Text, Mention]) -> tuple[str, str]:
        text, first = doing
        said = text.said or ""
        spans = _spans(text) or []
        subject = said[: spans[first.end - 1][1]]
        at = first.end + (text.low[first.end] == "is")
        rest = said[spans[at][0] :]
        the = f"the {' '.join(text.low[first.noun : first.end])}"
        question = self.choices.of(phrases.DOING if thing.noun.live else phrases.WHERE).format(the=the)
        if subject.lower().startswith(("a ", "an ", "one ")):
            subject = "The " + subject.split(" ", 1)[1]
        answer = f"It is {rest}" if thing.key != "person" and self.choices.below(2) else f"{subject} is {rest}"
        return question, answer

    def ask_side(self, thing: Thing) -> tuple[str, str]:
        the = self.the(thing)
        verb = thing.noun.verb
        place = _place(thing)
        question = self.choices.of(phrases.SIDE if thing.side in ("left", "right") else phrases.SIDE[:3])
        answer = self.choices.of(
            (f"{capital(the)} {verb} {place}.", f"{'It is' if verb == 'is' else 'They are'} {place}.")
        )
        return _agree(question.format(the=self.the(thing)), verb), answer if thing.noun.live is False else (
            f"{capital(the)} {verb} {place}."
        )

    def relation(self, a: Thing, b: Thing) -> str | None:
        """How the first is placed: ``to the left of``, ``to the right of``, ``above``, ``below``."""
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

    def ask_relation(self, a: Thing, b: Thing) -> tuple[str, str]:
        if self.choices.below(2):
            a, b = b, a
        relation = self.relation(a, b) or ""
        the, other = self.the(a), self.the(b)
        question = self.choices.of(phrases.LEFT_OF if "the" in relation else phrases.ABOVE).format(the=the, other=other)
        if relation in ("above", "below"):
            answer = f"{capital(the)} {a.noun.verb} {relation} {other} in the picture."
        else:
            answer = f"{capital(the)} {a.noun.verb} {relation} {other}."
        return _agree(question, a.noun.verb), answer

    def ask_which(self, a: Thing, b: Thing) -> tuple[str, str]:
        relation = self.relation(a, b) or ""
        first, last = (a, b) if relation in ("to the left of", "above") else (b, a)
        up = relation in ("above", "below")
        pair = (first, last) if self.choices.below(2) else (last, first)
        the, other = self.the(pair[0]), self.the(pair[1])
        if up:
            return phrases.HIGHER[0].format(the=the, other=other), f"{capital(self.the(first))}."
        left = self.choices.below(2)
        question = self.choices.of(phrases.LEFTMOST if left else phrases.RIGHTMOST).format(the=the, other=other)
        which = first if left else last
        return question, self.choices.of(
            (
                f"{capital(self.the(which))}.",
                f"{capital(self.the(which))} {which.noun.verb} further {'left' if left else 'right'}.",
            )
        )

    def ask_whether(self, a: Thing, b: Thing) -> tuple[str, str]:
        if self.choices.below(2):
            a, b = b, a
        relation = self.relation(a, b) or ""
        the, other, verb = self.the(a), self.the(b), a.noun.verb
        true = f"{capital(the)} {verb} {relation} {other}"
        if self.choices.below(2):
            question = f"{capital(verb)} {the} {relation} {other}?"
            return question, self.choices.of(
                (
                    f"Yes, {the} {verb} {relation} {other}.",
                    "Yes." if verb == "are" else "Yes, it is." if not a.noun.live else "Yes.",
                )
            )
        question = f"{capital(verb)} {the} {_OPPOSITE[relation]} {other}?"
        del true
        return question, f"No, {the} {verb} {relation} {other}."

    def ask_larger(self, a: Thing, b: Thing) -> tuple[str, str]:
        pair = (a, b) if self.choices.below(2) else (b, a)
        the, other = self.the(pair[0]), self.the(pair[1])
        question = self.choices.of(phrases.LARGER).format(the=the, other=other)
        answer = self.choices.of(
            (
                f"{capital(self.the(a))} takes up more of the picture than {self.the(b)}.",
                f"{capital(self.the(a))}.",
                f"{capital(self.the(a))} is larger in the picture.",
            )
        )
        return question, answer if a.noun.verb == "is" else f"{capital(self.the(a))}."

    def ask_more(self, a: Thing, b: Thing) -> tuple[str, str]:
        pair = (a, b) if self.choices.below(2) else (b, a)
        question = self.choices.of(phrases.MORE).format(many=pair[0].noun.many, others=pair[1].noun.many)
        answer = self.choices.of(
            (
                f"There are more {a.noun.many}: {number(a.count or 0)}, against {self.just(b)}.",
                f"There are more {a.noun.many} than {b.noun.many}.",
                f"{capital(a.noun.many)}: there are {number(a.count or 0)} {a.noun.many} and {self.just(b)}.",
            )
        )
        return question, answer

    def just(self, thing: Thing) -> str:
        """``one dog``, ``two dogs``."""
        count = thing.count or 0
        return f"{number(count)} {thing.noun.one if count == 1 else thing.noun.many}"

    def ask_present(self, thing: Thing) -> tuple[str, str]:
        if thing.count is not None and thing.count > 1:
            question = self.choices.of(phrases.PRESENT_MANY).format(many=thing.noun.many)
            answer = self.choices.of(
                (
                    f"Yes, there are {number(thing.count)} {thing.noun.many}.",
                    f"Yes, {number(thing.count)}.",
                    f"Yes, there are {thing.noun.many} in the picture.",
                )
            )
            return question, answer
        a = self.a(thing)
        verb = thing.noun.verb if not a.startswith("a pair") else "is"
        place = f" {_place(thing)}" if thing.side or thing.level else " in the picture"
        question = self.choices.of(phrases.PRESENT).format(a=a)
        if a.startswith("some "):
            question = question.replace("Is there some", "Are there any").replace("Is some", "Are any")
        return question, self.choices.of((f"Yes, there {verb} {a}{place}.", f"Yes, there {verb} {a}.", "Yes."))

    def ask_absent(self, label: str) -> tuple[str, str]:
        noun = nouns.noun(label)
        others = [thing for thing in self.boxed if thing.count == 1 or thing.count is None]
        also = [thing for thing in others if thing.sole]
        if noun.verb == "are" or noun.one in nouns.MASS or self.choices.below(3) == 0:
            question = self.choices.of(phrases.PRESENT_MANY).format(many=noun.many)
            plain = f"No, there are no {noun.many} in the picture."
            if noun.one in nouns.MASS:
                question = f"Is there any {noun.one} in the picture?"
                plain = f"No, there is no {noun.one} in the picture."
        else:
            question = self.choices.of(phrases.PRESENT).format(a=noun.a())
            plain = f"No, there is no {noun.one} in the picture."
        answers = [plain, "No.", plain.replace(" in the picture", "")]
        if also:
            answers.append(
                f"{plain[:-1].replace(' in the picture', '')}, but there is {self.a(self.choices.of(also))}."
            )
        return question, self.choices.of(answers)

    # -- kinds ---------------------------------------------------------------------------------------------------------

    def conversation(self) -> list[tuple[str, str]] | str:
        """Two to five questions with their answers, no two of them alike."""
        most = 2 + self.choices.below(4)
        pairs: list[tuple[str, str]] = []
        spoken: set[str] = set()
        seen: list[set[str]] = []

        def take(pair: tuple[str, str] | None, keys: Sequence[str]) -> bool:
            if pair is None:
                return False
            words = set(_WORD.findall(pair[1].lower()))
            if any(len(words & old) > 0.55 * len(words | old) for old in seen) or not words:
                return False
            if any(pair[0] == old[0] or pair[1] == old[1] for old in pairs):
                return False
            pairs.append(pair)
            seen.append(words)
            spoken.update(keys)
            return True

        scene_first = self.choices.below(3) > 0
        if scene_first:
            order = self.facts.order
            pair = self.scene()
            if pair is not None and order:
                said = next((t for t in self.facts.texts if t.said is not None and t.said[5:] in pair[1]), None)
                keys = {k for m in said.mentions if (k := self.key(m))} if said else set()
                take(pair, sorted(keys))
        if self.choices.below(5) < 3:
            present = self.presence(spoken)
            if present is not None:
                take(present.write(), present.keys)
        topics: dict[str, int] = {}
        ideas = self.choices.shuffled(list(self.ideas()))
        ideas.sort(key=lambda idea: idea.topic in ("relation", "choice", "verify", "larger", "more", "side"))
        held: dict[str, list[_Idea]] = {}
        for idea in ideas:
            held.setdefault(idea.topic, []).append(idea)
        queue = self.choices.shuffled(sorted(held))
        while queue and len(pairs) < most:
            topic = queue.pop(0)
            idea = held[topic].pop()
            if topics.get(topic, 0) < 2 and take(idea.write(), idea.keys):
                topics[topic] = topics.get(topic, 0) + 1
                if topic in ("relation", "choice", "verify", "larger", "more"):
                    pair_keys = set(idea.keys)
                    for other in ("relation", "choice", "verify"):
                        held[other] = [left for left in held.get(other, ()) if set(left.keys) != pair_keys]
            if held.get(topic) and topics.get(topic, 0) < 2:
                queue.append(topic)
            queue = [topic for topic in queue if held.get(topic)]
        if len(pairs) < most and not scene_first:
            take(self.scene(), ())
        if len(pairs) < 2:
            for place in self.facts.order:
                told = self.told(self.facts.texts[place], bare=True)
                if told is not None:
                    take((self.choices.of(phrases.SCENE), told), ())
        if len(pairs) < 2:
            for thing in self.choices.shuffled(list(self.facts.things.values())):
                if len(pairs) < 2 and (thing.boxes or self.named(thing)):
                    take(self.ask_present(thing), (thing.key,))
        return pairs if len(pairs) >= 2 else "no two questions could be answered from its texts and boxes"

    def named(self, thing: Thing) -> bool:
        """Whether texts name a thing without boxes surely enough: two of them, or the only one."""
        return len({mention.text for mention in thing.mentions}) >= min(2, len(self.facts.texts))

    def presence(self, spoken: set[str]) -> _Idea | None:
        """Whether something is there: as often something that is not, where that can be known."""
        if self.context.labels:
            if self.choices.below(2) and self.facts.absent:
                label = self.choices.of(self.facts.absent)
                return _Idea("absent", (label,), partial(self.ask_absent, label))
        elif self.choices.below(2):
            return None
        there = [
            thing
            for thing in self.facts.things.values()
            if thing.key not in spoken and ((thing.boxes and (thing.sole or thing.count)) or self.named(thing))
        ]
        if not there:
            return None
        thing = self.choices.of(there)
        return _Idea("present", (thing.key,), partial(self.ask_present, thing))

    def detail(self) -> list[tuple[str, str]] | str:
        """One question, and all that is sure, in order: what happens, what there is, where it is."""
        said: list[str] = []
        known: set[str] = set()
        content: set[str] = set()
        quoted = 0
        for place in self.facts.order:
            text = self.facts.texts[place]
            words = {word for word in text.low if word not in nouns.CLOSED and word[0].isalpha()}
            if content and len(words - content) < 3:
                continue
            told = self.told(text, bare=not said, known=frozenset(known))
            if told is None:
                continue
            said.append(told)
            content |= words
            known.update(mention.form.key for mention in text.mentions)
            known.update(key for mention in text.mentions if (key := self.key(mention)))
            quoted += 1
            if quoted == 3:
                break
        for thing in self.facts.things.values():
            if (thing.count or 0) > 1 and thing.key in known and not any(mention.stated for mention in thing.mentions):
                said.append(f"There are {number(thing.count or 0)} {thing.noun.many}.")
                break
        more = [thing for thing in self.boxed if thing.key not in known and (thing.sole or thing.count)][:6]
        if more:
            verb = "are" if (more[0].count or 1) > 1 or (more[0].noun.verb == "are" and False) else "is"
            items = listed([self.counted(thing) for thing in more])
            start = (
                self.choices.of((f"There {verb} also ", "The picture also shows ", "One can also see "))
                if said
                else (f"There {verb} ")
            )
            said.append(f"{start}{items}.")
            known.update(thing.key for thing in more)
        told_places = 0
        for thing in self.choices.shuffled(self.soles[:6]):
            if told_places < 2 and (thing.side or thing.level):
                said.append(f"{capital(self.the(thing))} {thing.noun.verb} {_place(thing)}.")
                told_places += 1
        related = [pair for pair in self.pairs() if self.relation(*pair)]
        for a, b in self.choices.shuffled(related)[:2]:
            relation = self.relation(a, b)
            said.append(f"{capital(self.the(a))} {a.noun.verb} {relation} {self.the(b)}.")
        if sum(len(part.split()) for part in said) < 15:
            return "its texts and boxes say too little for a long description"
        return [(self.choices.of(phrases.DETAIL), " ".join(said))]

    def complex(self) -> list[tuple[str, str]] | str:
        """One question that takes several facts, and the answer with its reasons."""
        ideas: dict[str, list[Callable[[], tuple[str, str]]]] = {}

        def add(topic: str, write: Callable[[], tuple[str, str]]) -> None:
            ideas.setdefault(topic, []).append(write)

        counted = [thing for thing in self.boxed if thing.count is not None and thing.noun.counts]
        for place, a in enumerate(counted):
            for b in counted[place + 1 :]:
                if max(a.count or 0, b.count or 0) > 1:
                    add("total", partial(self.why_total, a, b))
                    if a.count != b.count:
                        add("more", partial(self.why_more, a, b))
        person = self.facts.things.get("person")
        if person is not None and person.boxes and person.count is not None and person.count > 1:
            for thing in counted:
                if thing.key in _EACH:
                    add("each", partial(self.why_each, person, thing))
        for triple in self.triples():
            add("order", partial(self.why_order, triple))
            add("between", partial(self.why_between, triple))
        for a, b in self.pairs():
            if a.box is None or b.box is None or a.noun.verb != "is":
                continue
            if (
                a.box.area >= evidence.LARGER * b.box.area
                and a.box.width > 1.1 * b.box.width
                and a.box.height > 1.1 * b.box.height
            ):
                add("larger", partial(self.why_larger, a, b))
        for thing in counted:
            halves = self.halves(thing)
            if halves is not None:
                add("halves", partial(self.why_halves, thing, halves))
        room = self.room()
        if room is not None:
            found = [self.facts.things[key] for key in _USUAL.get(room, ()) if key in self.facts.things]
            found = [thing for thing in found if thing.boxes and (thing.sole or thing.count)]
            if found:
                add("room", partial(self.why_room, room, found))
        setting = self.setting()
        if setting is not None:
            add("setting", partial(self.why_setting, *setting))
        if not ideas:
            return "no question could be answered by combining facts of its texts and boxes"
        return [self.choices.of(ideas[self.choices.of(sorted(ideas))])()]

    def triples(self) -> list[tuple[Thing, Thing, Thing]]:
        """Three ones, each plainly to the left of the next."""
        row = sorted(
            (thing for thing in self.soles[:6] if thing.box is not None),
            key=lambda thing: thing.box.centre[0],  # type: ignore[union-attr]
        )
        width = self.context.width
        return [
            (a, b, c)
            for i, a in enumerate(row)
            for j, b in enumerate(row[i + 1 :], i + 1)
            if a.box is not None and b.box is not None and left_of(a.box, b.box, width)
            for c in row[j + 1 :]
            if c.box is not None and left_of(b.box, c.box, width)
        ]

    def halves(self, thing: Thing) -> tuple[int, int] | None:
        """How many are plainly in the left and right half; null where any is near the middle, or as many on both."""
        if thing.count is None or thing.count < 3:
            return None
        left = right = 0
        for place in thing.boxes:
            x = self.context.boxes[place].centre[0] / self.context.width
            if x < 0.45:
                left += 1
            elif x > 0.55:
                right += 1
            else:
                return None
        return (left, right) if left != right else None

    def room(self) -> str | None:
        """The room that texts agree on."""
        if any(not nouns.UNREAL.isdisjoint(text.low) for text in self.facts.texts):
            return None
        found = [key for key in nouns.ROOMS if key in self.facts.things and self.named(self.facts.things[key])]
        return found[0] if len(found) == 1 else None

    def setting(self) -> tuple[str, str] | None:
        """``indoors`` or ``outdoors``, and the place that shows it."""
        if any(not nouns.UNREAL.isdisjoint(text.low) for text in self.facts.texts):
            return None
        words = {word for text in self.facts.texts for word in text.low}
        things = self.facts.things
        inside = [key for key in sorted(nouns.ROOMS) if key in things and self.named(things[key])]
        outside = [key for key in things if key in _OUTDOORS and self.named(things[key]) and not things[key].several]
        if inside and not outside and words.isdisjoint({"outside", "outdoor", "outdoors", "patio"} | nouns.OUTDOORS):
            return "indoors", inside[0]
        if (
            outside
            and not (nouns.ROOMS & set(things))
            and words.isdisjoint({"inside", "indoor", "indoors", "room", "window", "restaurant"})
        ):
            return "outdoors", outside[0]
        return None

    def why_total(self, a: Thing, b: Thing) -> tuple[str, str]:
        total = (a.count or 0) + (b.count or 0)
        question = self.choices.of(
            (
                f"How many {a.noun.many} and {b.noun.many} are there altogether?",
                f"If you count the {a.noun.many} and the {b.noun.many} together, how many are there?",
                f"What do the {a.noun.many} and the {b.noun.many} add up to?",
            )
        )
        answer = self.choices.of(
            (
                f"There are {self.just(a)} and {self.just(b)}, which makes {number(total)} altogether.",
                f"{capital(number(total))} in all: {self.just(a)} and {self.just(b)}.",
            )
        )
        return question, answer

    def why_more(self, a: Thing, b: Thing) -> tuple[str, str]:
        if (a.count or 0) < (b.count or 0):
            a, b = b, a
        difference = (a.count or 0) - (b.count or 0)
        question = self.choices.of(
            (
                f"Are there more {a.noun.many} or more {b.noun.many}, and by how many?",
                f"Which are there more of, {b.noun.many} or {a.noun.many}? Explain how you know.",
                f"By how many do the {a.noun.many} outnumber the {b.noun.many}?",
            )
        )
        answer = self.choices.of(
            (
                f"There are {number(difference)} more {a.noun.many}: {self.just(a)} and {self.just(b)}.",
                f"With {self.just(a)} and {self.just(b)}, the {a.noun.many} are ahead by {number(difference)}.",
            )
        )
        return question, answer

    def why_each(self, person: Thing, thing: Thing) -> tuple[str, str]:
        people, things = person.count or 0, thing.count or 0
        question = self.choices.of(
            (
                f"Could each person in the picture have {nouns.article(thing.noun.one)} {thing.noun.one} of their own?",
                f"Are there enough {thing.noun.many} for everyone in the picture?",
                f"Is there {nouns.article(thing.noun.one)} {thing.noun.one} for every person?",
            )
        )
        there = f"there {'is' if things == 1 else 'are'} {self.just(thing)}"
        if things >= people:
            rest = "so there is one for each" if things == people else "so there would even be some left over"
            if things - people == 1:
                rest = "so one would even be left over"
            return question, f"Yes. There are {self.just(person)}, and {there}, {rest}."
        return (
            question,
            f"No. There are {self.just(person)}, but {there}, so {number(people - things)} would go without.",
        )

    def why_order(self, triple: tuple[Thing, Thing, Thing]) -> tuple[str, str]:
        a, b, c = (self.the(thing, colour=False) for thing in triple)
        shuffled = self.choices.shuffled([a, b, c])
        question = self.choices.of(
            (
                f"In which order do {listed(shuffled)} follow each other from left to right?",
                f"Put {listed(shuffled)} in order from left to right.",
                f"Going from left to right, in what order would you come across {listed(shuffled)}?",
            )
        )
        return question, (
            f"First {a}, then {b}, and last {c}: {a} {triple[0].noun.verb} to the left of {b}, "
            f"and {c} {triple[2].noun.verb} to the right of {b}."
        )

    def why_between(self, triple: tuple[Thing, Thing, Thing]) -> tuple[str, str]:
        a, b, c = (self.the(thing, colour=False) for thing in triple)
        shuffled = self.choices.shuffled([a, b, c])
        question = self.choices.of(
            (
                f"Of {listed(shuffled)}, which is in the middle, seen from left to right? Explain.",
                f"Which of these is between the other two, going from left to right: {listed(shuffled)}?",
            )
        )
        verb = triple[1].noun.verb
        return (
            question,
            f"{capital(b)}: {'it is' if verb == 'is' else 'they are'} to the right of {a} and to the left of {c}.",
        )

    def why_larger(self, a: Thing, b: Thing) -> tuple[str, str]:
        pair = self.choices.shuffled([self.the(a, colour=False), self.the(b, colour=False)])
        question = self.choices.of(
            (
                f"Which takes up more of the picture, {pair[0]} or {pair[1]}, and why do you think so?",
                f"Compare how large {pair[0]} and {pair[1]} appear. Which one is larger here?",
            )
        )
        a_, b_ = self.the(a, colour=False), self.the(b, colour=False)
        return question, (f"{capital(a_)} takes up more of the picture: it appears both wider and taller than {b_}.")

    def why_halves(self, thing: Thing, halves: tuple[int, int]) -> tuple[str, str]:
        left, right = halves
        many = thing.noun.many
        question = self.choices.of(
            (
                f"Are most of the {many} in the left or in the right half of the picture?",
                f"On which side of the picture are there more {many}, and how do you know?",
            )
        )
        side, other = ("left", "right") if left > right else ("right", "left")
        more, fewer = max(left, right), min(left, right)
        if fewer == 0:
            return (
                question,
                f"In the {side} half: all {number(more)} {many} are there, and none is in the {other} half.",
            )
        return question, (
            f"In the {side} half: of the {number(more + fewer)} {many}, {number(more)} are there and "
            f"{number(fewer)} {'is' if fewer == 1 else 'are'} in the {other} half."
        )

    def why_room(self, room: str, found: Sequence[Thing]) -> tuple[str, str]:
        question = self.choices.of(
            (
                f"What suggests that this is {nouns.article(room)} {room}?",
                "What kind of room is this, and what tells you so?",
                "Which room is shown here? Give your reasons.",
            )
        )
        items = listed([self.counted(thing) for thing in found])
        verb = "are" if (found[0].count or 1) > 1 else "is"
        return question, f"This is {nouns.article(room)} {room}: there {verb} {items}, as one would expect there."

    def why_setting(self, setting: str, key: str) -> tuple[str, str]:
        question = self.choices.of(
            (
                "Was this picture taken indoors or outdoors? How can you tell?",
                "Is this scene inside or outside, and what makes you think so?",
                "Are we indoors or outdoors here? Give a reason.",
            )
        )
        place = f"{nouns.article(key)} {key}" if key not in ("sky", "woods") else f"the {key}"
        return question, self.choices.of(
            (
                f"It was taken {setting}, since the picture shows {place}.",
                f"{capital(setting)}: what we see is {place}, which is found {setting}.",
            )
        )

    def grounding(self) -> list[tuple[str, str]] | str:
        """One to four questions about regions."""
        if not self.boxed:
            return "it has no boxes"
        topics: dict[str, list[Callable[[], tuple[str, str]]]] = {}

        def add(topic: str, write: Callable[[], tuple[str, str]]) -> None:
            topics.setdefault(topic, []).append(write)

        for thing in self.boxed:
            if thing.sole and thing.key in self.names:
                add("locate", partial(self.locate, thing))
            if thing.count is not None and thing.count > 1:
                add("all", partial(self.point_out, thing))
            add("region", partial(self.region, thing))
            last = self.outermost(thing)
            if last is not None:
                add("outermost", partial(self.ask_outermost, thing, *last))
        for a, b in self.pairs():
            if self.relation(a, b):
                add("relation", partial(self.linked_relation, a, b))
        described = self.linked_scene()
        if described is not None:
            add("scene", lambda: described)
        most = 1 + self.choices.below(4)
        pairs: list[tuple[str, str]] = []
        order = self.choices.shuffled(sorted(topics))
        for topic in order[:most]:
            pair = self.choices.of(topics[topic])()
            if all(pair[0] != old[0] and pair[1] != old[1] for old in pairs):
                pairs.append(pair)
        return pairs

    def locate(self, thing: Thing) -> tuple[str, str]:
        the = self.the(thing)
        verb = thing.noun.verb
        question = self.choices.of(
            (
                f"Where {verb} {the}? Please point {'it' if verb == 'is' else 'them'} out.",
                f"Point to {the}.",
                f"Can you find {the} in the picture?",
                f"Locate {the}.",
                f"Show me {the}.",
            )
        )
        linked = self.link(self.the(thing), *thing.boxes)
        answers = [f"Here: {linked}.", f"{capital(linked)} {verb} here."]
        if thing.side or thing.level:
            answers = [f"{capital(linked)} {verb} {_place(thing)}.", answers[0]]
        return question, self.choices.of(answers)

    def point_out(self, thing: Thing) -> tuple[str, str]:
        many, count = thing.noun.many, thing.count or 0
        question = self.choices.of(
            (
                f"Point out all {many}.",
                f"Show me every {thing.noun.one} in the picture.",
                f"Where are the {many}?",
                f"Find all of the {many}.",
                f"Mark each {thing.noun.one}.",
            )
        )
        answer = self.choices.of(
            (
                f"There are {self.link(f'{number(count)} {many}', *thing.boxes)}.",
                f"{capital(self.link(f'{number(count)} {many}', *thing.boxes))} can be seen.",
                f"There are {number(count)} {many}: {listed([self.link('', place) for place in thing.boxes])}.",
            )
        )
        return question, answer

    def region(self, thing: Thing) -> tuple[str, str]:
        place = self.choices.of(thing.boxes)
        region = self.link("", place)
        question = self.choices.of(
            (
                f"What is at {region}?",
                f"What do you see in the region {region}?",
                f"What is in this part of the picture: {region}?",
                f"Name what is in {region}.",
            )
        )
        name = self.one(thing)
        if thing.sole and thing.colour and not thing.colour_in_label and thing.key != "person":
            name = f"{' and '.join(thing.colour)} {name}"
        if thing.noun.verb == "are":
            return question, f"{capital(thing.noun.a())}."
        if thing.noun.one in nouns.MASS:
            return question, f"It is {name}."
        return question, self.choices.of(
            (f"It is {nouns.article(name)} {name}.", f"{capital(nouns.article(name))} {name}.")
        )

    def outermost(self, thing: Thing) -> tuple[str, int] | None:
        """The one of several that is plainly furthest left or right."""
        if thing.count is None or not 2 <= thing.count <= 6:
            return None
        boxes, width = self.context.boxes, self.context.width
        sides = []
        if left_of(boxes[thing.boxes[0]], boxes[thing.boxes[1]], width):
            sides.append(("left", thing.boxes[0]))
        if left_of(boxes[thing.boxes[-2]], boxes[thing.boxes[-1]], width):
            sides.append(("right", thing.boxes[-1]))
        return self.choices.of(sides) if sides else None

    def ask_outermost(self, thing: Thing, side: str, place: int) -> tuple[str, str]:
        question = self.choices.of(
            (
                f"Which of the {number(thing.count or 0)} {thing.noun.many} is furthest to the {side}?",
                f"Point to the {thing.noun.one} that is furthest to the {side}.",
                f"Where is the {side}most {thing.noun.one}?",
            )
        )
        return question, self.choices.of(
            (
                f"{self.link(f'The {side}most {thing.noun.one}', place)} is here.",
                f"It is {self.link('this one', place)}.",
            )
        )

    def linked_relation(self, a: Thing, b: Thing) -> tuple[str, str]:
        if self.choices.below(2):
            a, b = b, a
        relation = self.relation(a, b)
        first, second = self.link(self.the(a), *a.boxes), self.link(self.the(b), *b.boxes)
        verb = a.noun.verb
        question = self.choices.of(
            (
                f"Where {verb} {first} in relation to {second}?",
                f"How {verb} {self.link('', *a.boxes)} placed relative to {self.link('', *b.boxes)}?",
            )
        )
        return question, f"{capital(first)} {verb} {relation} {second}."

    def linked_scene(self) -> tuple[str, str] | None:
        """A text with its phrases linked to boxes, the one with most of them."""
        best, most = None, 0
        for place in self.facts.order:
            text = self.facts.texts[place]
            told = self.told(text, bare=True, link=True)
            if told is not None and told.count("](box:") > most:
                best, most = told, told.count("](box:")
        if best is None:
            return None
        question = self.choices.of(
            (
                "Describe the picture and mark what you mention.",
                "What does the picture show? Point out the things that you mention.",
                "Describe the scene, and say where things are.",
                "Give a description in which the things are marked.",
            )
        )
        return question, best


_OPPOSITE = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}
_OUTDOORS = frozenset(word.replace("/", " ") for word in nouns.OUTDOORS) - {"river", "lake", "ocean", "sky", "mountain"}


def _agree(question: str, verb: str) -> str:
    """The question about what has no singular."""
    return question.replace(" is the ", " are the ", 1) if verb == "are" else question


def _place(thing: Thing) -> str:
    """``on the left side of the picture, at the bottom``."""
    side, level = thing.side, thing.level
    if side in ("left", "right"):
        return f"on the {side} side of the picture" + (f", towards the {level}" if level else "")
    if level:
        return f"at the {level} of the picture" + (", in the middle" if side else "")
    return "in the middle of the picture, from left to right"


def _names(facts: Facts) -> dict[str, str]:
    """What the one of each label is called; without those that would share a name."""
    names: dict[str, str] = {}
    heads: dict[str, int] = {}
    for thing in facts.boxed():
        head = nouns.described(thing.key).head
        heads[head] = heads.get(head, 0) + len(thing.boxes)
    for thing in facts.things.values():
        if not thing.sole:
            continue
        name = thing.noun.one
        parts = nouns.described(thing.key)
        if thing.key == "person":
            name = _person(thing)
        elif parts.head != thing.key.lower() and heads.get(parts.head) == 1:
            name = parts.head
        elif parts.size and parts.colour:
            alike = [
                other
                for other in facts.boxed()
                if nouns.described(other.key).head == parts.head and nouns.described(other.key).colour == parts.colour
            ]
            if len(alike) == 1 and len(alike[0].boxes) == 1:
                name = f"{parts.colour} {parts.head}"
        names[thing.key] = name
    shared = {name for name in names.values() if list(names.values()).count(name) > 1}
    return {key: name for key, name in names.items() if name not in shared}


def _person(thing: Thing) -> str:
    """``woman`` where the texts agree that it is one."""
    words = [mention.form.word for mention in thing.mentions if mention.head and not mention.several]
    named = set(words)
    if not named:
        return "person"
    for word in ("man", "woman", "boy", "girl"):
        if word in named and named <= _COMPATIBLE[word]:
            return word
    if named == {"child"} or named == {"kid"} or named == {"baby"}:
        return named.pop()
    return "person"


_NEUTRAL = words_of(
    """person player skier surfer snowboarder skateboarder skate boarder rider pitcher batter passenger worker friend
    catcher pedestrian adult"""
) | {"skate boarder"}
_COMPATIBLE = {
    "man": _NEUTRAL | {"man", "guy", "gentleman", "male"},
    "woman": _NEUTRAL | {"woman", "lady", "female"},
    "boy": _NEUTRAL | {"boy", "child", "kid", "male"},
    "girl": _NEUTRAL | {"girl", "child", "kid", "female"},
}


def _spans(text: Text) -> list[tuple[int, int]] | None:
    """Where each token of the text is in `Text.said`; null where that differs from the text by more than its end."""
    if text.said is None:
        return None
    found = [(match[0].lower(), match.span()) for match in evidence._TOKEN.finditer(text.said)]
    length = max((place + 1 for place, word in enumerate(text.low) if word[0].isalnum()), default=0)
    if tuple(word for word, _ in found[:length]) != text.low[:length]:
        return None
    return [span for _, span in found]


def _maybe_verb(text: Text) -> bool:
    """Whether some word may be a verb that is not listed: it ends in s, is no known plural, and an object follows."""
    within = {place for mention in text.mentions for place in range(mention.noun, mention.end)}
    for place, word in enumerate(text.low[:-1]):
        if place in within or not word.endswith("s") or word.endswith(("ss", "us", "ous", "'s")) or len(word) < 4:
            continue
        after = text.low[place + 1]
        if word not in nouns.CLOSED and after in _OBJECT:
            return True
    return False


_OBJECT = words_of("a an the his her its their up down off over out through")
