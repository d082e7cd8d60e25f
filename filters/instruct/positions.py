"""Statements of left, right, above and below, against the centres of boxes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from filters.instruct.evidence import Evidence, Labelled, negated
from filters.instruct.vocabulary import Noun, vocabulary
from filters.instruct.words import words_of

MARGIN = 0.02
"""Share of the image's width or height by which centres must contradict a statement."""
MIDDLE = 0.3
"""Share of the width or height from the frame's centre within which a thing is in the middle."""

_SIDE = r"(?:left|right)"
_FAR = r"(?:(?:far|extreme|immediate|very|lower|upper|direct) )*"
_THINGS = re.compile(
    rf"\b(?:to|on|at|off to|toward|towards) the {_FAR}(?P<side>{_SIDE})(?: hand)?(?: side)? of(?! the (?:image|picture"
    rf"|photo|"
    r"photograph|scene|frame|view|shot|viewer|camera)\b)"
    rf"|(?<!the )(?<!to )(?<!hand )\b(?P<bare>{_SIDE}) of(?! the (?:image|picture|photo|photograph|scene|frame|view"
    rf"|shot)\b)"
    r"|\b(?P<over>over)\b|\b(?P<up>above|higher than|higher up than)\b|\b(?P<down>below|beneath|underneath|under"
    r"|lower than"
    r"|lower down than)\b"
)
_BETWEEN = re.compile(r"\b(?:in )?between\b")
_FRAME = re.compile(
    r"\b(?:in|on|at|to|near|toward|towards|from|along|inside|within|occupying|fills?|occup(?:y|ies)) (?:the|its) "
    r"(?P<where>(?:(?:far|extreme|very|upper|lower|top|bottom|left|right|hand|middle|center|centre|central"
    r"|most) ?){1,5})"
    r"(?P<part>side|half|corner|edge|part|portion|third|area|section|quarter|quadrant|end)?"
    r"(?P<of> ?of the (?:image|picture|photo|photograph|scene|frame|view|shot)\b)?"
)
_NOT_FRAME = re.compile(
    r" ?(?:of\b|<\d+>|lane|lens|turn|column|page|panel|row|shelf|rack|sleeve|pocket|drawer|ear|handed|aged|one\b|ones\b"
    r"|"
    r"field|floor|level|name|speed|deck|bunk|,? and (?:left|right)|or (?:left|right))"
)
_PLACE = re.compile(r"<(\d+)>")
_CLAUSES = (
    "; ",
    ": ",
    " while ",
    " whereas ",
    " where ",
    ", and ",
    ", but ",
    ", with ",
    ", as ",
    ", so ",
    ", although ",
)
_PICTURE = words_of("image picture photo photograph images pictures photos photographs")
_SCENES = words_of("room street field beach park forest court yard kitchen bathroom")
_PRONOUN = re.compile(r"\b(?:it|they|he|she|one)\b")
_ATTACHED = words_of("with in on of at near holding wearing under behind over by beside riding carrying onto from like")


@dataclass(frozen=True)
class Relation:
    """Subjects, any of which may be meant, stand so to the object."""

    subjects: tuple[Noun, ...]
    where: str
    """``left``, ``right``, ``above``, ``below``, of the object or of the frame's middle; or ``middle``, ``between``."""
    objects: tuple[Noun, ...]
    """Empty: the frame."""
    words: str
    denied: bool = False
    definite: bool = True
    """Whether it may be one of several: ``the dog on the left`` is the leftmost, wherever that is."""
    around: tuple[tuple[str, ...], ...] = ()
    """The words before each subject and each object."""


def marked(tokens: Sequence[str], nouns: Sequence[Noun]) -> tuple[str, list[Noun]]:
    """The sentence with each noun put as ``<its position>``, its determiner and adjectives before it."""
    out: list[str] = []
    at = 0
    for position, noun in enumerate(nouns):
        out.extend(tokens[at : noun.start])
        out.append(f"<{position}>")
        at = noun.end
    out.extend(tokens[at:])
    return " ".join(out), list(nouns)


def relations(tokens: Sequence[str], nouns: Sequence[Noun], spoken_of: Sequence[Noun] = ()) -> Iterator[Relation]:
    """The relations that a sentence states; `spoken_of` are the nouns that ``it`` may mean."""
    if not any(word in tokens for word in _WORDS):
        return
    text, nouns = marked(tokens, [noun for noun in nouns if noun.words not in _PICTURE])
    absent = negated(tokens)
    shift = _positions(tokens, nouns)
    matches: list[tuple[int, int, str, tuple[Noun, ...], str]] = []
    for match in _THINGS.finditer(text):
        where = match["side"] or match["bare"] or ("below" if match["down"] else "above")
        target = _object(text, match.end(), nouns)
        if target and (not match["over"] or "shape" in _kinds(target[0])):
            matches.append((match.start(), target[1], where, (target[0],), match[0]))
    for match in _BETWEEN.finditer(text):
        first = _object(text, match.end(), nouns)
        if first is None:
            continue
        link = re.match(r" and\b", text[first[1] :])
        second = _object(text, first[1] + link.end(), nouns) if link else None
        if second:
            matches.append((match.start(), second[1], "between", (first[0], second[0]), "between"))
    taken = [(start, end) for start, end, *_ in matches]
    for match in _FRAME.finditer(text):
        if any(start <= match.start() < end for start, end in taken):
            continue
        if not match["of"] and _NOT_FRAME.match(text[match.end() :].rstrip() or " "):
            continue
        words = match["where"].split()
        if "hand" in words and not match["part"]:
            continue
        for where, names in _FRAME_WORDS.items():
            if not names.isdisjoint(words):
                if where == "middle" and len(set(words) & _SIDES):
                    continue
                matches.append((match.start(), match.end(), where, (), match[0].strip()))
    matches.sort(key=lambda found: (found[0], found[1]))
    lower, previous = 0, (0, 0)
    last: tuple[list[Noun], int, tuple[Noun, ...]] | None = None
    for start, end, where, objects, words in matches:
        if (start, end) != previous:
            lower = previous[1] if previous[1] <= start else 0
            previous = (start, end)
        before = text[lower:start]
        for stop in _CLAUSES:
            _, found, tail = before.rpartition(stop)
            if found and (_PLACE.search(tail) or _PRONOUN.search(tail)):
                before = tail
        subjects = [nouns[int(place[1])] for place in _PLACE.finditer(before)]
        if not subjects and _PRONOUN.search(before):
            subjects = [nouns[int(place[1])] for place in _PLACE.finditer(text[:start])] or list(spoken_of)
        if not subjects and last and re.fullmatch(r"[ ,]*(?:and )?", text[last[1] : start]):
            apart = text[last[1] : start].strip()  # "left of the cars at the far right": perhaps the cars
            subjects = last[0] if apart else [*last[0], *last[2]]
        if not subjects:
            rest = min((later[0] for later in matches if later[0] > start), default=len(text))
            after = [nouns[int(place[1])] for place in _PLACE.finditer(text[end:rest] if rest > end else text[end:])]
            subjects = after[:1]
        if subjects:
            last = (subjects, end, objects)
            denied = shift(start) in absent
            named = f"{subjects[-1].words} {words} {' and '.join(noun.words for noun in objects)}".strip()
            definite = "of the" not in words and {"a", "an"}.isdisjoint(subjects[-1].before)
            around = tuple(noun.before[-3:] for noun in (*subjects, *objects))
            yield Relation(tuple(subjects), where, objects, named, denied, definite, around)


_FRAME_WORDS = {
    "left": frozenset({"left"}),
    "right": frozenset({"right"}),
    "above": frozenset({"top", "upper"}),
    "below": frozenset({"bottom", "lower"}),
    "middle": frozenset({"middle", "center", "centre", "central"}),
}
_SIDES = words_of("left right top upper bottom lower")
_WORDS = words_of(
    "left right over above below beneath underneath under between top upper bottom lower higher middle center centre"
)


def _positions(tokens: Sequence[str], nouns: Sequence[Noun]) -> Callable[[int], int]:
    starts: list[tuple[int, int]] = []
    at, offset = 0, 0
    by_start = {noun.start: (index, noun) for index, noun in enumerate(nouns)}
    while at < len(tokens):
        starts.append((offset, at))
        if at in by_start:
            index, noun = by_start[at]
            offset += len(f"<{index}>") + 1
            at = noun.end
        else:
            offset += len(tokens[at]) + 1
            at += 1

    def token_at(position: int) -> int:
        return max((token for start, token in starts if start <= position), default=0)

    return token_at


def _object(text: str, at: int, nouns: Sequence[Noun]) -> tuple[Noun, int] | None:
    match = re.match(r"((?: (?!<)[^\s<]+){0,4}) <(\d+)>", text[at:])
    if not match:
        return None
    words = match[1].split()
    if any(word in _STOPS for word in words):
        return None
    return nouns[int(match[2])], at + match.end()


_STOPS = words_of("is are was were sits stands in on at with while who that which ; : , and or there by near")


def position_faults(
    sentences: Sequence[list[str]], evidence: Evidence, width: int, height: int, asked: Sequence[Noun] = ()
) -> Iterator[str]:
    """Relations of an answer that box centres contradict and no text states, in words."""
    spoken_of = list(asked)
    for tokens in sentences:
        nouns = evidence.nouns(tokens)
        for relation in relations(tokens, nouns, spoken_of):
            fault = position_fault(relation, evidence, tokens, width, height)
            if fault:
                yield fault
        if nouns:
            spoken_of = [nouns[0]]


def position_fault(
    relation: Relation, evidence: Evidence, tokens: Sequence[str], width: int, height: int
) -> str | None:
    """What is wrong with a relation; null where it holds for some of the things named, or nothing is known."""
    holds = relation_holds(relation, evidence, tokens, width, height)
    if holds is None or holds is not relation.denied:
        return None
    if any(_same(relation, other, evidence.adjectives) for other in text_relations(evidence)):
        return None
    return f"{relation.words}: the boxes say otherwise"


def relation_holds(
    relation: Relation, evidence: Evidence, tokens: Sequence[str], width: int, height: int
) -> bool | None:
    """Whether some of the subjects stand so to some of the objects; null where one of them has no box."""
    scene = relation.where in ("left", "right") and len(relation.objects) == 1 and is_scene(relation.objects[0])
    if scene and not _things(relation.objects[0], evidence):
        relation = replace(relation, objects=())
    subjects = [things for noun in relation.subjects if (things := _things(noun, evidence))]
    objects = [_things(noun, evidence) for noun in relation.objects]
    unboxed = [noun for noun in relation.subjects if not _things(noun, evidence)]
    if not subjects or not all(objects) or any(not _is_attached(noun) for noun in unboxed):
        return None
    if "both" in tokens and len(objects) == 1 and relation.where != "between":
        alone = [[[other]] for other in objects[0]]
        return any(
            all(_stands(thing, relation.where, one, width, height) for one in alone)
            for things in subjects
            for thing in things
        )
    plural = relation.subjects[-1].name.plural
    for things in subjects:
        for thing in things:
            if _stands(thing, relation.where, objects, width, height):
                return True
            others = [other for other in things if other is not thing]
            relative = not objects and relation.where != "middle" and not plural and others and relation.definite
            if relative and _stands(thing, relation.where, [others], width, height):
                return True
    return False


def _kinds(noun: Noun) -> frozenset[str]:
    kinds = vocabulary().kinds
    return frozenset(kind for concept in noun.name.concepts for kind in kinds.get(concept, ()))


def is_scene(noun: Noun) -> bool:
    """Whether a noun is a place that fills the picture: its left is the picture's."""
    return not _SCENES.isdisjoint(_kinds(noun))


def _is_attached(noun: Noun) -> bool:
    """``collar`` in ``the dog with the red collar``: what is said next is said of the dog."""
    return not _ATTACHED.isdisjoint(noun.before)


def _stands(thing: Labelled, where: str, objects: Sequence[Sequence[Labelled]], width: int, height: int) -> bool:
    x, y = thing.box.centre
    x, y = x / width, y / height
    if where == "middle":
        return abs(x - 0.5) <= MIDDLE and abs(y - 0.5) <= MIDDLE
    if where == "between":
        return any(
            _inside(x, a.box.centre[0] / width, b.box.centre[0] / width)
            or _inside(y, a.box.centre[1] / height, b.box.centre[1] / height)
            for a in objects[0]
            for b in objects[1]
            if a is not b and thing is not a and thing is not b
        )
    places = (
        [(0.5, 0.5)]
        if not objects
        else [(other.box.centre[0] / width, other.box.centre[1] / height) for other in objects[0] if other is not thing]
    )
    for across, down in places:
        if {
            "left": x < across + MARGIN,
            "right": x > across - MARGIN,
            "above": y < down + MARGIN,
            "below": y > down - MARGIN,
        }[where]:
            return True
    return False


def _inside(value: float, one: float, other: float) -> bool:
    return min(one, other) - MARGIN <= value <= max(one, other) + MARGIN


def _things(noun: Noun, evidence: Evidence) -> list[Labelled]:
    adjectives = evidence.adjectives & frozenset(noun.before[-3:])
    found = [
        thing
        for thing in evidence.labelled
        if thing.is_a(noun.name.concepts) and (not thing.adjectives or adjectives <= thing.adjectives)
    ]
    if not found:
        found = [thing for thing in evidence.labelled if thing.may_be(noun.name.concepts)]
    return found


def text_relations(evidence: Evidence) -> list[Relation]:
    """The relations that the texts state."""
    if "relations" not in evidence.known:
        evidence.known["relations"] = [
            relation for tokens, nouns in evidence.texts for relation in relations(tokens, nouns)
        ]
    return evidence.known["relations"]


def _same(one: Relation, other: Relation, adjectives: frozenset[str]) -> bool:
    if one.where != other.where or one.denied != other.denied or len(one.objects) != len(other.objects):
        return False
    return any(
        _akin(a, b) and adjectives.intersection(mine) == adjectives.intersection(its)
        for a, mine in zip(one.subjects, one.around, strict=False)
        for b, its in zip(other.subjects, other.around, strict=False)
    ) and all(
        _akin(a, b) and adjectives.intersection(mine) == adjectives.intersection(its)
        for a, mine, b, its in zip(
            one.objects,
            one.around[len(one.subjects) :],
            other.objects,
            other.around[len(other.subjects) :],
            strict=True,
        )
    )


def _akin(one: Noun, other: Noun) -> bool:
    kinds = vocabulary().kinds
    return any(
        a == b or a in kinds.get(b, ()) or b in kinds.get(a, ()) for a in one.name.concepts for b in other.name.concepts
    )
