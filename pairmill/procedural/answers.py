"""An oracle for instruction data: whether an answer is true of a scene, from the English of the turns alone.

It shares no code with any writer. A sentence is read in three steps: noun phrases are found and put aside ("the large
red circle", "two stars", "[the ring](box:2)", "it"), what is left is matched with the patterns of a small grammar
("N0 is to the left of N1 and above N2"), and the claims that come out are tried on the scene's objects.

- A question says what its answer is about: fragments ("Two.", "Red.", "The star.") are completed by it, "it" is what
  the question is about, and an answer about something else is false.
- "The circle" is true of a scene with exactly one circle, and "a circle" of one with a circle at least. A number means
  exactly so many. A mention's boxes must each be the box of an object that its phrase fits, no two the same.
- Left, right, above and below are `Scene.holds`: box centres, 10% of the image apart. Larger, nearest and places in
  the picture go by the boxes, too.
- A sentence of the grammar of `pairmill.procedural.captions` means what it means there, where a question asks for a
  description.

What it cannot read it says so of: that is no truth either way, and a score should count it as not true.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product

from pairmill.boxes import Box
from pairmill.instructions import USER, Turn, plain
from pairmill.procedural.captions import is_true
from pairmill.procedural.scene import COLOURS, RELATIONS, SHAPES, Scene

MATCH = 0.7
"""Intersection over union from which a box is that of an object."""


@dataclass(frozen=True)
class Judgement:
    """What the oracle says of one answer."""

    truth: bool | None
    """None: not understood."""
    why: str = ""
    """The sentence at fault, where it is not true."""


class _NotUnderstood(Exception):
    """Raised inside this module; its text is what was not understood."""


# -- noun phrases -----------------------------------------------------------------------------------------------------

_SIZE = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large"}
_SHAPE = {**{s: (s, False) for s in SHAPES}, **{"crosses" if s == "cross" else f"{s}s": (s, True) for s in SHAPES}}
_GENERIC = {"object", "shape", "thing", "figure", "item"}
_NUMBER = {"no": 0, "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
_ARTICLES = ("a", "an", "another", "some", "any")
_DEFINITE = ("the", "this", "that", "these", "those", "both")
_PRONOUNS = ("it", "they", "them")
_SUPERLATIVES = {
    "largest": "larger", "biggest": "larger", "smallest": "smaller", "leftmost": "left of", "rightmost": "right of",
    "topmost": "above", "uppermost": "above", "highest": "above", "lowest": "below", "bottommost": "below",
}  # fmt: skip


@dataclass(frozen=True)
class _Phrase:
    """A noun phrase; None where it says nothing."""

    colour: str | None = None
    size: str | None = None
    shape: str | None = None
    superlative: str | None = None
    """The relation in which it stands to all others that fit."""
    plural: bool = False
    definite: bool = False
    number: int | None = None
    """None for an article as well."""
    every: bool = False
    """All that fit, however many."""
    boxes: tuple[int, ...] | None = None
    named: bool = True
    """False for a mention without words."""
    pronoun: bool = False
    same_as: int | None = None
    """Of a pronoun: the phrase that it stands for, once that is known."""

    def says_no_more_than(self, other: _Phrase) -> bool:
        """Whether all it says of an object, the other says too."""
        mine = self.colour, self.size, self.shape, self.superlative
        return all(
            said in (None, known)
            for said, known in zip(mine, (other.colour, other.size, other.shape, other.superlative), strict=True)
        )


_TOKEN = re.compile(r"\[[^\[\]]*\]\(box:[0-9,]+\)|[a-z]+(?:['\u2019-][a-z]+)*|\d+|[,:;]")
_MENTION = re.compile(r"\[([^\[\]]*)\]\(box:([0-9,]+)\)")


def _phrase_at(words: Sequence[str], at: int) -> tuple[_Phrase, int] | None:
    """The noun phrase that begins at a word, and where it ends; no pronouns.

    Raises:
        _NotUnderstood: the words of a mention are no noun phrase.
    """
    place = at

    def word(ahead: int = 0) -> str:
        return words[place + ahead] if place + ahead < len(words) else ""

    phrase = _Phrase()
    article = demonstrative = False
    if word() in ("all", "every", "each"):
        phrase, place = replace(phrase, every=True), place + 1
        place += word() == "of"
    if word() in ("just", "only", "exactly") and word(1) in _NUMBER:
        place += 1
    if word() in _ARTICLES:
        article, place = True, place + 1
        phrase = replace(phrase, every=words[at] == "any")
    elif word() in _DEFINITE:
        demonstrative = word() not in ("the", "both")
        phrase, place = replace(phrase, definite=True), place + 1
    if word() in _NUMBER or word().isdigit():
        number = _NUMBER[word()] if word() in _NUMBER else int(word()[:6])
        phrase, place = replace(phrase, number=number), place + 1
    said: dict[str, str] = {}
    while True:
        skipped = 1 if said and word() in (",", "and") and _adjective(word(1)) else 0
        name = _adjective(word(skipped))
        if name is None or name in said:
            break
        said[name] = _SIZE.get(word(skipped), _SUPERLATIVES.get(word(skipped), word(skipped)))
        place += skipped + 1
    phrase = replace(phrase, **said)  # type: ignore[arg-type]
    noun = word()
    mention = _MENTION.fullmatch(noun)
    if mention:
        return _mentioned(phrase, said, mention), place + 1
    if noun in _SHAPE:
        shape, plural = _SHAPE[noun]
        return replace(phrase, shape=shape, plural=plural), place + 1
    if (noun in _GENERIC and place > at) or (noun.endswith("s") and noun[:-1] in _GENERIC):
        return replace(phrase, plural=noun not in _GENERIC), place + 1
    if ((said and (article or phrase.definite)) or demonstrative) and noun in ("one", "ones"):
        return replace(phrase, plural=noun == "ones"), place + 1
    return (replace(phrase, number=None), place) if demonstrative and phrase.number == 1 else None


def _mentioned(before: _Phrase, said: Mapping[str, str], mention: re.Match[str]) -> _Phrase:
    """A mention, together with the words of its phrase that stand before its bracket."""
    boxes = tuple(map(int, mention[2].split(",")))
    inner = _TOKEN.findall(mention[1])
    if not inner:
        return replace(before, boxes=boxes, named=bool(said), definite=True, plural=len(boxes) > 1)
    found = _phrase_at(inner, 0)
    if found is None or found[1] != len(inner):
        raise _NotUnderstood(mention[0])
    phrase = found[0]
    for name, value in said.items():
        if getattr(phrase, name) not in (None, value):
            raise _NotUnderstood(mention[0])
    return replace(
        phrase,
        **said,  # type: ignore[arg-type]
        boxes=boxes,
        definite=before.definite or phrase.definite,
        number=before.number if phrase.number is None else phrase.number,
    )


def _adjective(word: str) -> str | None:
    if word in COLOURS:
        return "colour"
    if word in _SIZE:
        return "size"
    return "superlative" if word in _SUPERLATIVES else None


def _sentences(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part.strip()]


# -- the world --------------------------------------------------------------------------------------------------------

_Option = tuple[int, ...]
"""Objects that a phrase may mean, all of them together."""


class _World:
    """A scene's objects with their boxes in the pixels of the stored image, and the conversation's boxes."""

    def __init__(self, scene: Scene, boxes: Sequence[Box], width: int, height: int) -> None:
        self.scene, self.width, self.height = scene, width, height
        self.objects = scene.objects
        self.places = [Box("", *box) for box in scene.boxes(width, height)]
        self.meant = [self._meant(box) for box in boxes]

    def _meant(self, box: Box) -> int | None:
        """The object whose box this is."""
        ious = [box.iou(place) for place in self.places]
        best = max(range(len(ious)), key=ious.__getitem__)
        return best if ious[best] >= MATCH else None

    def fitting(self, phrase: _Phrase) -> list[int]:
        """The objects that have what the phrase says."""
        found = [
            n
            for n, thing in enumerate(self.objects)
            if phrase.colour in (None, thing.colour)
            and phrase.size in (None, thing.size)
            and phrase.shape in (None, thing.shape)
        ]
        if phrase.superlative is not None:
            relation = phrase.superlative
            found = [n for n in found if all(self.related(n, relation, other) for other in found if other != n)]
        return found

    def related(self, a: int, relation: str, b: int) -> bool:
        """Whether one object stands in a relation to another."""
        if relation == "larger":
            return self.places[a].area > 1.05 * self.places[b].area
        if relation == "smaller":
            return self.related(b, "larger", a)
        if relation == "wider and taller":
            return self.places[a].width > self.places[b].width and self.places[a].height > self.places[b].height
        return self.scene.holds(a, relation, b)

    def distance(self, a: int, b: int) -> float:
        (ax, ay), (bx, by) = self.places[a].centre, self.places[b].centre
        return float(((ax - bx) ** 2 + (ay - by) ** 2) ** 0.5)

    def at(self, n: int, words: Iterable[str]) -> bool:
        """Whether an object is at a place of the picture: its box's centre."""
        x, y = self.places[n].centre
        x, y = x / self.width, y / self.height
        said = set(words)
        holds = {
            "left": x < 0.45,
            "right": x > 0.55,
            "top": y < 0.45,
            "bottom": y > 0.55,
            "middle": (abs(x - 0.5) < 0.17 or not said.isdisjoint({"left", "right"}))
            and (abs(y - 0.5) < 0.25 or not said.isdisjoint({"top", "bottom", "across"})),
            "across": True,
        }
        return all(holds[word] for word in said)


# -- claims -----------------------------------------------------------------------------------------------------------

_PICTURE = r"(?:the|this) (?:picture|image|photo|scene|frame)"
_LIST = r"N\d+(?:(?: , and| ,| and) N\d+)*"
_COLOUR = "|".join(COLOURS)
_NUMERAL = "|".join(_NUMBER) + r"|\d+"
_RELATION = tuple(
    (re.compile(pattern), relation)
    for pattern, relation in (
        (r"(?:(?:to|on|at) )?(?:the )?(?:far )?left(?:-hand)?(?: side)? of", "left of"),
        (r"(?:(?:to|on|at) )?(?:the )?(?:far )?right(?:-hand)?(?: side)? of", "right of"),
        (r"(?:further|farther)(?: to the)? left than", "left of"),
        (r"(?:further|farther)(?: to the)? right than", "right of"),
        (rf"(?:above|over|higher(?: up)?(?: in {_PICTURE})? than)", "above"),
        (rf"(?:below|under|beneath|underneath|lower(?: down)?(?: in {_PICTURE})? than)", "below"),
        (rf"(?:larger|bigger)(?: in {_PICTURE})? than", "larger"),
        (rf"smaller(?: in {_PICTURE})? than", "smaller"),
        (r"(?:both )?wider and taller than", "wider and taller"),
    )
)
_COMPARATIVE = tuple(
    (re.compile(pattern), relation)
    for pattern, relation in (
        (r"(?:further|farther)(?: to the)? left|(?:on|to) the left", "left of"),
        (r"(?:further|farther)(?: to the)? right|(?:on|to) the right", "right of"),
        (rf"(?:higher(?: up)?|further up)(?: in {_PICTURE})?", "above"),
        (rf"(?:lower(?: down)?|further down)(?: in {_PICTURE})?", "below"),
        (rf"(?:the )?(?:larger|bigger)(?: one)?(?: in {_PICTURE})?", "larger"),
        (rf"(?:the )?smaller(?: one)?(?: in {_PICTURE})?", "smaller"),
        (rf"(?:takes|take) up more(?: of {_PICTURE}| space| room)?", "larger"),
        (rf"(?:takes|take) up less(?: of {_PICTURE}| space| room)?", "smaller"),
    )
)
_PLACE_WORDS = {
    "left": "left", "right": "right", "left-hand": "left", "right-hand": "right", "top": "top", "upper": "top",
    "bottom": "bottom", "lower": "bottom", "middle": "middle", "centre": "middle", "center": "middle",
}  # fmt: skip
_ONE_PLACE = (
    r"(?:(?:on|at|in|to|near|towards|toward) )?(?:the )?"
    rf"(?:(?:{'|'.join(sorted(_PLACE_WORDS, key=len, reverse=True))}) ?)+"
    rf"(?:(?:side|part|half|third|corner|edge|area) ?)?(?:of {_PICTURE})?"
)
_PLACE = re.compile(rf"{_ONE_PLACE}(?: ?,? {_ONE_PLACE})*(?P<across> ?,? from left to right)?(?! ?of N)")
_ATTRIBUTE = rf"(?:{_COLOUR}|{'|'.join(_SIZE)})"
_ATTRIBUTES = re.compile(rf"{_ATTRIBUTE}(?:(?: ,)?(?: and)? {_ATTRIBUTE})*(?![a-z])")
_CLAUSES = re.compile(r" : | , (?:since|because|while|whereas) | , (?:but|and) (?=there |N\d+ (?:is|are) )")
_JOINED = re.compile(r"(?: , and| , but| ,| and| but)(?: also)?(?: is| are)? ")


def _phrases_in(text: str | None) -> list[int]:
    return [int(found) for found in re.findall(r"N(\d+)", text or "")]


def _numeral(word: str) -> int:
    return _NUMBER[word] if word in _NUMBER else int(word[:6])


@dataclass
class _Claims:
    """What a sentence claims: phrases that must mean something, and conditions on what they mean, all of which some
    choice of objects must fulfil."""

    phrases: list[int] = field(default_factory=list)
    """In the order of the sentence; the first is its subject."""
    conditions: list[tuple[tuple[int, ...], Callable[..., bool]]] = field(default_factory=list)

    def add(self, places: tuple[int, ...], condition: Callable[..., bool]) -> None:
        """A condition; it is called with an `_Option` for each of the phrases."""
        self.phrases.extend(place for place in places if place not in self.phrases)
        self.conditions.append((places, condition))


@dataclass(frozen=True)
class _Frame:
    """What a question asks for."""

    kind: str
    about: tuple[int, ...] = ()
    """Phrases: first what the answer is about, then what it is compared with."""
    relation: str = ""
    claims: _Claims | None = None
    """Of a question of yes or no: what it asks the truth of."""


_OPEN = _Frame("open")


class _Reader:
    """Reads one question, then the answer to it."""

    def __init__(self, world: _World) -> None:
        self.world = world
        self.phrases: list[_Phrase] = []
        self.it: int | None = None
        """What "it" stands for."""
        self.frame = _OPEN

    # -- noun phrases --------------------------------------------------------------------------------------------------

    def skeleton(self, sentence: str) -> str:
        """A sentence in lower case, words and commas between single blanks, with N3 for phrase 3 of this turn."""
        words = _TOKEN.findall(sentence.lower())
        out: list[str] = []
        at = 0
        while at < len(words):
            found = _phrase_at(words, at)
            if found is None and words[at] in _PRONOUNS:
                found = _Phrase(pronoun=True, plural=words[at] != "it"), at + 1
            if found is None:
                out.append(words[at])
                at += 1
            else:
                self.phrases.append(found[0])
                out.append(f"N{len(self.phrases) - 1}")
                at = found[1]
        return " ".join(out)

    def bind(self, text: str) -> None:
        """From here on, pronouns of this text stand for `it`."""
        for place in _phrases_in(text):
            phrase = self.phrases[place]
            if phrase.pronoun and phrase.same_as is None:
                if self.it is None:
                    raise _NotUnderstood(f"what a pronoun stands for in {text}")
                self.phrases[place] = replace(phrase, same_as=self.it)

    def meant(self, place: int) -> _Phrase:
        """A phrase, or what a pronoun stands for."""
        return self.phrases[self.root(place)]

    def root(self, place: int) -> int:
        """The phrase that a pronoun stands for, or the phrase itself."""
        while (earlier := self.phrases[place].same_as) is not None:
            place = earlier
        return place

    def options(self, place: int) -> list[_Option]:
        """What a phrase may mean, as the world is; nothing where it means nothing."""
        place = self.root(place)
        phrase = self.phrases[place]
        fitting = self.world.fitting(phrase)
        if phrase.boxes is not None:
            return self._boxed(phrase, set(fitting))
        if phrase.every:
            return [tuple(fitting)] if fitting else []
        if phrase.number is not None:
            return [tuple(fitting)] if len(fitting) == phrase.number else []
        if phrase.plural:
            return [tuple(fitting)] if len(fitting) > 1 else []
        if not phrase.definite and phrase.superlative is None:
            return [(n,) for n in fitting]
        if len(fitting) == 1:
            return [tuple(fitting)]
        before = [n for n in range(place) if phrase.says_no_more_than(self.phrases[n]) and self._single(n)]
        return self.options(before[-1]) if before else []

    def _single(self, place: int) -> bool:
        phrase = self.phrases[place]
        return phrase.named and not (phrase.plural or phrase.every or phrase.pronoun)

    def _boxed(self, phrase: _Phrase, fitting: set[int]) -> list[_Option]:
        found = [self.world.meant[box] if box < len(self.world.meant) else None for box in phrase.boxes or ()]
        chosen = tuple(n for n in found if n is not None)
        if len(set(chosen)) < len(found):
            return []
        if phrase.named and not (
            set(chosen) <= fitting
            and phrase.plural == (len(chosen) > 1)
            and phrase.number in (None, len(chosen))
            and (phrase.number is None or phrase.definite or len(fitting) == phrase.number)
        ):
            return []
        return [chosen]

    def same(self, a: int, b: int) -> bool:
        """Whether two phrases mean the same objects, whatever they are."""
        if self.root(a) == self.root(b):
            return True
        options = self.options(a)
        return len(options) == 1 and [sorted(o) for o in options] == [sorted(o) for o in self.options(b)]

    def alike(self, a: int, b: int) -> bool:
        """Whether two phrases say the same of objects: "two circles", "circles"."""
        one, other = self.meant(a), self.meant(b)
        return one.says_no_more_than(other) and other.says_no_more_than(one)

    def count(self, place: int) -> int:
        """How many objects are as a phrase says."""
        return len(self.world.fitting(self.meant(place)))

    # -- truth ---------------------------------------------------------------------------------------------------------

    def holds(self, claims: _Claims) -> bool:
        """Whether some choice of objects fulfils all conditions. Phrases with "a" mean different objects."""
        places = sorted({self.root(place) for place in claims.phrases})
        choices = [self.options(place) for place in places]
        loose = [n for n, place in enumerate(places) if self._loose(self.phrases[place])]
        for chosen in product(*choices):
            if len({chosen[n] for n in loose}) < len(loose):
                continue
            meant = dict(zip(places, chosen, strict=True))
            if all(test(*(meant[self.root(place)] for place in about)) for about, test in claims.conditions):
                return True
        return False

    @staticmethod
    def _loose(phrase: _Phrase) -> bool:
        return phrase.boxes is None and not (phrase.definite or phrase.plural or phrase.every) and phrase.number is None

    def relate(self, claims: _Claims, a: int, relation: str, b: int) -> None:
        """Claims that one phrase's objects stand in a relation to another's."""
        claims.add((a, b), lambda xs, ys: all(x != y and self.world.related(x, relation, y) for x in xs for y in ys))

    def compare(self, claims: _Claims, subject: int, relation: str) -> None:
        """Claims a relation to the other one of the two that the question asks about."""
        if self.frame.kind != "choice":
            raise _NotUnderstood(f"{relation} than what")
        mine = [place for place in self.frame.about if self.same(place, subject)]
        others = [place for place in self.frame.about if place not in mine]
        if len(mine) == len(others) == 1 and self.frame.relation == relation:
            self.relate(claims, subject, relation, others[0])
        else:  # it names neither of the two, or answers another question
            claims.conditions.append(((), lambda: False))

    def identify(self, claims: _Claims, subject: int, other: int) -> None:
        """Claims that two phrases mean the same objects, or, with "a" and numbers, what the subject's objects are."""
        phrase = self.meant(other)
        if phrase.boxes is None and not phrase.definite and phrase.superlative is None and not phrase.every:
            fitting = set(self.world.fitting(phrase))
            claims.add(
                (subject,),
                lambda xs: (
                    set(xs) <= fitting and len(xs) == (phrase.number or len(xs)) and phrase.plural == (len(xs) > 1)
                ),
            )
        else:
            claims.add((subject, other), lambda xs, ys: set(xs) == set(ys))

    def attribute(self, claims: _Claims, subject: int, words: str) -> None:
        """Claims colours and sizes."""
        things = self.world.objects
        for word in re.findall(_ATTRIBUTE, words):
            value = _SIZE.get(word, word)
            claims.add((subject,), lambda xs, v=value: all(v in (things[x].colour, things[x].size) for x in xs))

    # -- sentences with a verb -----------------------------------------------------------------------------------------

    def statement(self, text: str) -> _Claims:
        """What a sentence with a subject and a verb claims.

        Raises:
            _NotUnderstood: it has no pattern of this module.
        """
        text = _bare(text)
        for pattern, rule in _STATEMENTS:
            found = pattern.fullmatch(text)
            if found:
                claims = _Claims()
                rule(self, claims, found)
                return claims
        raise _NotUnderstood(text)

    def exist(self, claims: _Claims, found: re.Match[str]) -> None:
        """There is ..., perhaps somewhere."""
        listed = _phrases_in(found["list"])
        claims.phrases.extend(listed)
        said = found.groupdict()
        for subject in listed:
            for rest in (said.get("rest"), said.get("front")):
                if rest:
                    self.predicates(claims, subject, rest)

    def be(self, claims: _Claims, found: re.Match[str]) -> None:
        """Something is ..."""
        listed = _phrases_in(found["list"])
        claims.phrases.extend(listed)
        for subject in listed:
            if found["rest"]:
                self.predicates(claims, subject, found["rest"])

    def colour_of(self, claims: _Claims, found: re.Match[str]) -> None:
        """The color of ... is ..."""
        subject = int(found["n"])
        claims.phrases.append(subject)
        self.attribute(claims, subject, found["colour"])

    def takes_more(self, claims: _Claims, found: re.Match[str]) -> None:
        """... takes up more of the picture than ..."""
        claims.phrases.append(int(found["n"]))
        relation = "larger" if found["how"] == "more" else "smaller"
        if found["than"]:
            self.relate(claims, int(found["n"]), relation, int(found["than"]))
        else:
            self.compare(claims, int(found["n"]), relation)

    def outnumber(self, claims: _Claims, found: re.Match[str]) -> None:
        """There are more (fewer) ... than ..."""
        first, second = self.count(int(found["a"])), self.count(int(found["b"]))
        true = first > second if found["how"] == "more" else first < second
        claims.conditions.append(((), lambda: true))

    def ordered(self, claims: _Claims, found: re.Match[str]) -> None:
        """From left to right: ..."""
        listed = _phrases_in(found["list"])
        claims.phrases.extend(listed)
        relation = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}[found["start"]]
        for a, b in pairwise(listed):
            self.relate(claims, a, relation, b)

    def predicates(self, claims: _Claims, subject: int, text: str) -> None:
        """What follows a subject and its verb: relations, places, colours ..., one after the other."""
        while text:
            text = self.predicate(claims, subject, text)
            joined = _JOINED.match(text)
            if text and not joined:
                raise _NotUnderstood(text)
            text = text[joined.end() :] if joined else ""

    def predicate(self, claims: _Claims, subject: int, text: str) -> str:
        """One predicate; what is left of the text."""
        for pattern, relation in _RELATION:
            if found := re.match(rf"(?:{pattern.pattern}) ({_LIST})", text):
                for other in _phrases_in(found[1]):
                    self.relate(claims, subject, relation, other)
                return text[found.end() :]
        if found := re.match(
            r"(?:the )?(?:closest|nearest|nearer|closer)(?: one)? to N(\d+)(?: than (?:to )?N(\d+))?", text
        ):
            self.nearest(claims, subject, int(found[1]), int(found[2]) if found[2] else None)
            return text[found.end() :]
        if (found := re.match(rf"between the other ({_NUMERAL})", text)) and self.frame.kind == "middle":
            if _numeral(found[1]) != len(self.frame.about) - 1:
                claims.conditions.append(((), lambda: False))
            self.between_others(claims, subject)
            return text[found.end() :]
        if found := re.match(r"between N(\d+) and N(\d+)", text):
            claims.add((subject, int(found[1]), int(found[2])), self.between)
            return text[found.end() :]
        if found := re.match(r"here|visible|there", text):
            return text[found.end() :]
        for pattern, relation in _COMPARATIVE:
            if self.frame.kind == "choice" and pattern.fullmatch(text):
                self.compare(claims, subject, relation)
                return ""
        if found := _ATTRIBUTES.match(text):
            self.attribute(claims, subject, found[0])
            return text[found.end() :]
        if found := _PLACE.match(text):
            words = {_PLACE_WORDS[word] for word in found[0].split() if word in _PLACE_WORDS}
            if found["across"]:
                words = {"middle", "across"}
            claims.add((subject,), lambda xs: all(self.world.at(x, words) for x in xs))
            return text[found.end() :].rstrip()
        if found := re.match(r"N(\d+)", text):
            self.identify(claims, subject, int(found[1]))
            return text[found.end() :]
        raise _NotUnderstood(text)

    def nearest(self, claims: _Claims, subject: int, to: int, than: int | None) -> None:
        """Claims that nothing (or not one other thing) is nearer to something."""

        def near(xs: _Option, ys: _Option, zs: _Option = ()) -> bool:
            if len(xs) != 1 or len(ys) != 1 or xs == ys:
                return False
            rivals = set(zs or range(len(self.world.objects))) - {xs[0], ys[0]}
            return all(self.world.distance(xs[0], ys[0]) < self.world.distance(n, ys[0]) for n in rivals)

        claims.add((subject, to) if than is None else (subject, to, than), near)

    def between(self, xs: _Option, ys: _Option, zs: _Option) -> bool:
        """Whether one object stands between two others, on some axis."""
        return len(xs) == len(ys) == len(zs) == 1 and any(
            self.world.related(ys[0], relation, xs[0]) and self.world.related(xs[0], relation, zs[0])
            for relation in RELATIONS
        )

    def on_one_side(self, xs: _Option, ys: _Option) -> bool:
        """Whether all these objects are on the left, or all on the right of the picture."""
        return any(all(self.world.at(n, {side}) for n in (*xs, *ys)) for side in ("left", "right"))

    # -- questions -----------------------------------------------------------------------------------------------------

    def ask(self, question: str) -> None:
        """Finds what a question asks for."""
        text = _bare(re.sub(r" ?\?", "", self.skeleton(question)))
        text = re.sub(
            r"^(?:(?:please|(?:can|could|would) you(?= tell| point| find| show| say)|tell me|say) )+", "", text
        )
        self.frame = self._frame(text)
        if self.frame.about:
            self.it = self.frame.about[0]
        elif self.phrases:
            self.it = 0

    def _frame(self, text: str) -> _Frame:
        for pattern, kind in _QUESTIONS:
            if found := pattern.search(text):
                return self._specified(kind, text, found)
        if _DESCRIBE.search(text):
            return _OPEN
        asked = self._yes_no(text)
        if asked is None:
            raise _NotUnderstood(text)
        return asked

    def _specified(self, kind: str, text: str, found: re.Match[str]) -> _Frame:
        about = tuple(place for group in found.groups() for place in _phrases_in(group))
        if kind == "side of":  # "on which side of X is Y"
            return _Frame("where", about[::-1])
        if kind == "choice":
            for pattern, relation in _COMPARATIVE:
                if pattern.search(text) or (relation == "larger" and "compare how large" in text):
                    return _Frame(kind, about, relation)
            raise _NotUnderstood(text)
        if kind == "what":
            for pattern, relation in _RELATION:
                if re.search(rf"(?:{pattern.pattern}) N\d+$", text):
                    return _Frame(kind, about, relation)
            if self.meant(about[0]).boxes is None:
                raise _NotUnderstood(text)
            return _Frame("identity", about)
        if kind == "sides":
            claims = _Claims()
            claims.add((about[0], about[1]), self.on_one_side)
            return _Frame("yes or no", about, claims=claims)
        if kind == "difference" and text.startswith("do "):
            more = self.count(about[0]) > self.count(about[1])
            return _Frame(kind, about, claims=_Claims([], [((), lambda: more)]))
        if kind == "outermost":
            way = re.search(r"(?:furthest|farthest) to the (left|right)", text)
            return _Frame(kind, about, f"{way[1]} of" if way else "")
        return _Frame(kind, about)

    def _yes_no(self, text: str) -> _Frame | None:
        if found := re.fullmatch(r"(is|are) there (.*)", text):
            return self._asked(f"there {found[1]} {found[2]}")
        if found := re.fullmatch(rf"(?:can|do) you (?:see|find|make out) ({_LIST})", text):
            return self._asked(f"there is {found[1]}")
        if found := re.fullmatch(rf"does {_PICTURE} (?:show|have|contain) ({_LIST})", text):
            return self._asked(f"there is {found[1]}")
        if found := re.fullmatch(rf"(is|are) ({_LIST}) (.+)", text):
            return self._asked(f"{found[2]} {found[1]} {found[3]}")
        return None

    def _asked(self, statement: str) -> _Frame | None:
        try:
            claims = self.statement(statement)
        except _NotUnderstood:
            return None
        return _Frame("yes or no", tuple(claims.phrases[:1]), claims=claims)

    # -- answers -------------------------------------------------------------------------------------------------------

    def answer(self, sentence: str) -> bool:
        """Whether a sentence of the answer is true.

        Raises:
            _NotUnderstood: it has no pattern of this module.
        """
        frame = self.frame
        if frame.kind == "open":
            told = self._caption(sentence)
            if told is not None:
                return told
        text = self.skeleton(sentence)
        said = re.match(r"(yes|no)(?: ,| :)?(?: |$)", text)
        if text.startswith("N") and frame.kind == "yes or no" and self.phrases and sentence.lower().startswith("no,"):
            raise _NotUnderstood(text)
        if said:
            if frame.claims is None:
                raise _NotUnderstood(f"{said[1]}, to a question that asks for something else")
            if self.holds(frame.claims) != (said[1] == "yes"):
                return False
            text = text[said.end() :]
            if not text:
                return True
        for rule in (self._whole, self._clauses):
            true = rule(text)
            if true is not None:
                return true
        raise _NotUnderstood(text)

    def _caption(self, sentence: str) -> bool | None:
        """A sentence of the grammar of captions, as it is judged there; where it is true, its mentions must be, too."""
        told = is_true(plain(sentence), self.world.scene)
        if not told:
            return told
        self.skeleton(sentence)
        return all(self.options(n) for n, phrase in enumerate(self.phrases) if phrase.boxes is not None)

    def _whole(self, text: str) -> bool | None:
        """Sentences that are read as one piece, by what the question asks for."""
        kind, about = self.frame.kind, self.frame.about
        for wanted, pattern, rule in _WHOLE:
            if kind in wanted.split("|") and (found := pattern.fullmatch(text)):
                self.bind(text)
                return rule(self, about, found)
        return None

    def _clauses(self, text: str) -> bool | None:
        """Clauses with a verb each; the first one must be about what the question asks for."""
        true = True
        for n, clause in enumerate(_CLAUSES.split(text)):
            fragment = self._whole(clause) if n or clause != text else None
            if fragment is None:
                self.bind(clause)
                claims = self.statement(clause)
                fragment = self.holds(claims) and (n > 0 or self._to_the_point(claims))
                if claims.phrases:
                    self.it = claims.phrases[0]
            true = true and fragment
        return true

    def _is_one(self, place: int, of: int) -> bool:
        """Whether what a phrase means is one of what another one says: "a purple star", asked for a small star."""
        fitting = set(self.world.fitting(self.meant(of)))
        options = self.options(place)
        return bool(options) and all(option and set(option) <= fitting for option in options)

    def _to_the_point(self, claims: _Claims) -> bool:
        """Whether a statement is about what the question asks for."""
        kind, about = self.frame.kind, self.frame.about
        said = claims.phrases
        if kind == "count":
            return any(self.alike(place, about[0]) and self.meant(place).number is not None for place in said)
        if kind in ("colour", "where", "identity"):
            return bool(said) and all(any(self.same(place, wanted) for place in said) for wanted in about)
        if kind == "yes or no":
            return any(
                self.alike(place, about[0]) or self.same(place, about[0]) or self._is_one(place, about[0])
                for place in said
            )
        if kind == "choice":
            return bool(said) and any(self.same(said[0], wanted) for wanted in about)
        if kind == "find":
            return any(self.meant(place).boxes and self.same(place, about[0]) for place in said)
        return True

    # what a fragment or a special sentence says, by the kind of question

    def _number(self, about: tuple[int, ...], found: re.Match[str]) -> bool:
        return self.count(about[0]) == _numeral(found[1])

    def _coloured(self, about: tuple[int, ...], found: re.Match[str]) -> bool:
        claims = _Claims()
        self.attribute(claims, about[0], found[1])
        return self.holds(claims)

    def _placed(self, about: tuple[int, ...], found: re.Match[str]) -> bool:
        claims = _Claims()
        self.predicates(claims, about[0], found[1])
        return self.holds(claims)

    def _chosen(self, _: tuple[int, ...], found: re.Match[str]) -> bool:
        claims = _Claims()
        self.compare(claims, int(found[1]), self.frame.relation)
        return self.holds(claims)

    def _named(self, about: tuple[int, ...], found: re.Match[str]) -> bool:
        claims = _Claims()
        self.identify(claims, about[0], int(found[1]))
        return self.holds(claims)

    def _located(self, about: tuple[int, ...], found: re.Match[str]) -> bool:
        """The boxes of the answer are those of what was asked for, all of them."""
        regions = _phrases_in(found["list"])
        options = [self.options(place) for place in regions]
        if not all(options) or any(self.meant(place).boxes is None for place in regions):
            return False
        meant = sorted(n for option in options for n in option[0])
        return [meant] == [sorted(option) for option in self.options(about[0])] and (
            found.groupdict().get("n") is None or self.holds(_Claims([int(found["n"])]))
        )

    def _what(self, about: tuple[int, ...], found: re.Match[str]) -> bool:
        claims = _Claims()
        self.relate(claims, int(found[1]), self.frame.relation, about[0])
        return self.holds(claims)

    def _outermost(self, about: tuple[int, ...], found: re.Match[str]) -> bool:
        """The one that is furthest left (right) of all that are as the question says."""
        one = int(found[1])
        options = self.options(one)
        relation = self.frame.relation or self.meant(about[0]).superlative
        group = self.world.fitting(replace(self.meant(about[0]), superlative=None))
        return (
            len(options) == 1
            and len(options[0]) == 1
            and options[0][0] in group
            and bool(relation)
            and all(self.world.related(options[0][0], str(relation), n) for n in group if n != options[0][0])
        )

    def _more(self, about: tuple[int, ...], found: re.Match[str]) -> bool:
        """One kind is more numerous than the other, perhaps with both numbers."""
        mine = [place for place in about if self.alike(place, int(found["more"]))]
        others = [place for place in about if place not in mine]
        if len(mine) != 1 or len(others) != 1 or self.count(mine[0]) <= self.count(others[0]):
            return False
        said = found.groupdict()
        numbered = [
            (int(said[name]), to) for name, to in (("so_many", mine[0]), ("against", others[0])) if said.get(name)
        ]
        return all(
            self.alike(place, to) and (self.meant(place).number is None or self.holds(_Claims([place])))
            for place, to in numbered
        )

    def _difference(self, about: tuple[int, ...], found: re.Match[str]) -> bool:
        """Two numbers, perhaps with their difference, perhaps with which is the greater one."""
        said = [int(found["a"]), int(found["b"])]
        more, number = (found.groupdict().get(name) for name in ("more", "number"))
        return (
            all(any(self.alike(place, wanted) for place in said) for wanted in about)
            and self.holds(_Claims(said))
            and (number is None or abs(self.count(said[0]) - self.count(said[1])) == _numeral(number))
            and (more is None or self._most(int(more), said))
        )

    def _most(self, more: int, of: Sequence[int]) -> bool:
        """Whether one of these is the one, and more numerous than the others."""
        others = [place for place in of if not self.alike(more, place)]
        return len(others) == len(of) - 1 and all(self.count(more) > self.count(place) for place in others)

    def _only(self, about: tuple[int, ...], found: re.Match[str]) -> bool:
        places = int(found[1]), int(found[2])
        return all(self.alike(place, about[0]) for place in places) and self.count(about[0]) == 1

    def _several(self, about: tuple[int, ...], found: re.Match[str]) -> bool:
        one, counted = int(found[1]), int(found[2])
        return (
            self.alike(one, about[0])
            and self.alike(counted, one)
            and self.count(one) > 1
            and self.holds(_Claims([counted]))
        )

    def _edge(self, about: tuple[int, ...], found: re.Match[str]) -> bool:
        options = self.options(about[0])
        return self.same(int(found[1]), about[0]) and all(self.world.at(n, {found[2]}) for n in options[0])

    def _total(self, about: tuple[int, ...], found: re.Match[str]) -> bool:
        said = [int(found["a"]), int(found["b"])]
        return (
            all(any(self.alike(place, wanted) for place in said) for wanted in about[:2])
            and self.holds(_Claims(said))
            and sum(self.count(place) for place in said) == _numeral(found["number"])
        )

    def _sequence(self, about: tuple[int, ...], found: re.Match[str]) -> bool:
        claims = _Claims()
        said = [int(found[1]), int(found[2]), int(found[3])]
        for a, b in pairwise(said):
            self.relate(claims, a, "left of", b)
        return self.holds(claims) and all(any(self.same(place, wanted) for place in said) for wanted in about)

    def _middle(self, _: tuple[int, ...], found: re.Match[str]) -> bool:
        self.it = int(found[1])
        claims = _Claims()
        self.between_others(claims, self.it)
        return self.holds(claims)

    def between_others(self, claims: _Claims, one: int) -> None:
        """Claims that one of the three that the question names is between the others, from left to right."""
        others = [place for place in self.frame.about if not self.same(place, one)]
        if len(others) == len(self.frame.about) - 1 == 2:
            claims.add((one, *others), self.between_across)
        else:
            claims.conditions.append(((), lambda: False))

    def between_across(self, xs: _Option, ys: _Option, zs: _Option) -> bool:
        """Whether one object stands between two others, from left to right."""
        return len(xs) == len(ys) == len(zs) == 1 and any(
            self.world.related(ys[0], relation, xs[0]) and self.world.related(xs[0], relation, zs[0])
            for relation in ("left of", "right of")
        )

    def _halves(self, about: tuple[int, ...], found: re.Match[str]) -> bool:
        """Where most of several are, with the numbers of both halves."""
        there = self.world.fitting(self.meant(about[0]))
        left = sum(self.world.places[n].centre[0] < self.world.width / 2 for n in there)
        more, fewer = (left, len(there) - left) if found["side"] == "left" else (len(there) - left, left)
        said = found.groupdict()
        return (
            found["side"] != found.groupdict().get("other")
            and self.alike(int(found["n"]), about[0])
            and self.count(int(found["n"])) == (self.meant(int(found["n"])).number or len(there))
            and more == (_numeral(said["more"]) if said.get("more") else len(there))
            and fewer == (_numeral(said["fewer"]) if said.get("fewer") else 0)
            and more > fewer
        )


def _bare(skeleton: str) -> str:
    """Without words that claim nothing."""
    text = re.sub(r"^(?:(?:well|so|also|in addition|besides|overall)(?: ,)? )+(?!is|are)", "", skeleton)
    text = re.sub(rf"^in {_PICTURE} ,? ?", "", text)
    text = re.sub(r"^there (is|are) also ", r"there \1 ", text)
    text = re.sub(rf"(?<! from)(?: ,)?(?:(?: anywhere)? in {_PICTURE}| as well| too)$", "", text)
    return text.strip(" ,:;")


_VERB = r"(?:is|are|lies|lie|sits|sit|stands|stand|looks|look|appears|appear)(?: both| all| also)?"
_FRONT = r"(?P<front>(?:to|on|at|in|near|above|below|under|beneath|over|left|right|between|next)\b[^:]*?)"
_ALL = rf"(?P<list>{_LIST})"
_REST = r"(?: (?:that (?:is|are) )?(?P<rest>[^,:].*))?"
_FROM = r"from (?P<start>left|right|top|bottom) to (?:left|right|top|bottom)(?: ,| :)?"
_SHOWN = rf"(?:there (?:is|are)|{_PICTURE} shows|(?:you|we) (?:can )?see|they are)"
_SHARE = rf"(?: of {_PICTURE}| space| room)?"
_STATEMENTS: tuple[tuple[re.Pattern[str], Callable[[_Reader, _Claims, re.Match[str]], None]], ...] = tuple(
    (re.compile(pattern), rule)
    for pattern, rule in (
        (r"there are (?P<how>more|fewer) N(?P<a>\d+) than N(?P<b>\d+)", _Reader.outnumber),
        (rf"{_FROM}(?: {_SHOWN})?(?: :| ,)? {_ALL}", _Reader.ordered),
        (rf"(?:there|here) (?:is|are) {_ALL}{_REST}", _Reader.exist),
        (rf"(?:we|you|i|one) (?:can )?(?:also )?(?:see|count|find) {_ALL}{_REST}", _Reader.exist),
        (rf"{_PICTURE} (?:also )?(?:shows|has|contains) {_ALL}{_REST}", _Reader.exist),
        (rf"{_ALL} can be seen", _Reader.exist),
        (rf"the colou?r of N(?P<n>\d+) (?:is|are) (?P<colour>{_ATTRIBUTES.pattern})", _Reader.colour_of),
        (rf"N(?P<n>\d+) takes? up (?P<how>more|less){_SHARE}(?: than N(?P<than>\d+)(?: does)?)?", _Reader.takes_more),
        (rf"{_FRONT}(?: ,)? (?:{_SHOWN}|is|are) {_ALL}", _Reader.exist),
        (rf"{_ALL} {_VERB}(?: (?P<rest>.+))?", _Reader.be),
    )
)
"""Sentences with a verb, and what reads them."""

_DESCRIBE = re.compile(
    r"^(?:describe|walk me|sum up|everything|(?:give|write) an? |i would like an? (?:long |detailed )?description"
    rf"|what (?:does {_PICTURE} show|is (?:going on|happening)|can be seen|do you see here|{_PICTURE} shows)"
    rf"|what is$|what is in {_PICTURE}|what is {_PICTURE} about|what is this an? (?:picture|image|photo) of"
    r"|in (?:one|a) sentence what|what else can you say|is there anything else"
    r"|can you (?:add anything|put that another way|describe|what is))"
)
"""Questions that any true description answers."""

_N = r"(N\d+)"
_QUESTIONS = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (rf"how many {_N} and {_N} (?:are there altogether|does {_PICTURE} show in all)", "total"),
        (rf"if you count {_N} and {_N} together", "total"),
        (rf"do {_N} outnumber {_N}", "difference"),
        (rf"more {_N} or more {_N} , and by how many", "difference"),
        (rf"which are there more of , {_N} or {_N} explain", "difference"),
        (rf"more {_N} or more {_N}|there more of , {_N} or {_N}|more numerous\b.* {_N} or {_N}", "more"),
        (rf"(?:how many|count|number of) {_N}$", "count"),
        (rf"how many {_N} (?:are|is|can|do)", "count"),
        (rf"\bcolou?r\b.* {_N}", "colour"),
        (rf"(?:in which order do|put) ({_LIST}) (?:follow|in order)", "order"),
        (rf"in what order .* ({_LIST})$", "order"),
        (rf"of ({_LIST}) , which is in the middle", "middle"),
        (rf"between the other two .*: ({_LIST})$", "middle"),
        (rf"(?:are most of|are there more) {_N} (?:in the left|, and how)|(?:side|half) .* more {_N}", "halves"),
        (rf"is there (?:more than )?{_N} .*(?:explain|or are there more|how do you know)", "only"),
        (rf"(?:is|are) {_N} nearer to the left or to the right edge", "edge"),
        (rf"(?:are {_N} and {_N} on the same side|do {_N} and {_N} share a side) of {_PICTURE}", "sides"),
        (rf"{_N} (?:that )?is (?:furthest|farthest) to the (?:left|right)$", "outermost"),
        (rf"(?:which|what) .*{_N} or {_N}", "choice"),
        (rf"compare how large {_N} and {_N} appear", "choice"),
        (rf"{_N} (?:in relation|placed relative|relative|compared) to {_N}", "where"),
        (rf"how (?:is|are) {_N} and {_N} placed relative to each other", "where"),
        (rf"on which side of {_N} (?:is|are) {_N}", "side of"),
        (rf"(?:which part|whereabouts|which side|where in|where on|where would you look)\b.* {_N}", "where"),
        (
            rf"^(?:where (?:is|are)|locate|point (?:out|to|at)|show me|find|mark|can you find) {_N}(?: please .*)?$",
            "find",
        ),
        (rf"^(?:name )?what\b.* {_N}(?: (?:of|in) {_PICTURE}| here)?$", "what"),
        (rf"^name N\d+ (?:at|in) {_N}(?: (?:of|in) {_PICTURE}| here)?$", "what"),
    )
)
"""What a question asks for, with the phrases that it asks about."""

_HERE = r"(?:here(?: (?:is|are))? : |(?:it|they) (?:is|are) )?"
_HALF = r"in the (?P<side>left|right) half"
_OTHER = r"in the (?P<other>left|right|other) half"
_SHARES = rf"(?P<more>{_NUMERAL}) are there ,? ?and (?:just )?(?P<fewer>{_NUMERAL}) (?:is|are) {_OTHER}"
_TWO = r"N(?P<a>\d+) and N(?P<b>\d+)"
_SO_MANY = rf"(?P<number>{_NUMERAL})"
_WHOLE: tuple[tuple[str, re.Pattern[str], Callable[[_Reader, tuple[int, ...], re.Match[str]], bool]], ...] = tuple(
    (kinds, re.compile(pattern), rule)
    for kinds, pattern, rule in (
        ("count|yes or no", rf"(?:only |just |exactly )?({_NUMERAL})(?: of N\d+)?", _Reader._number),
        ("colour", rf"({_ATTRIBUTES.pattern})", _Reader._coloured),
        ("where", r"((?:to|on|at|in|above|below|near|left|right|under)\b.*)", _Reader._placed),
        ("choice", r"N(\d+)", _Reader._chosen),
        ("identity", r"(?:(?:this|that|there) is |N\d+ is )?N(\d+)", _Reader._named),
        ("find", rf"{_HERE}{_ALL}(?: (?:is|are) here| can be seen)?", _Reader._located),
        ("find", rf"there are {_ALL}", _Reader._located),
        ("find", rf"there are N(?P<n>\d+) : {_ALL}", _Reader._located),
        ("what", r"(?:(?:that|there) is |N\d+ is )?N(\d+)", _Reader._what),
        ("outermost", r"(?:(?:it|N\d+) is )?N(\d+)(?: is here)?", _Reader._outermost),
        ("more", r"there are more N(?P<more>\d+) , N(?P<so_many>\d+) against N(?P<against>\d+)", _Reader._more),
        ("more", r"there are more N(?P<more>\d+) than N(?P<against>\d+)", _Reader._more),
        ("more|difference", r"(?:there are more |more )?N(?P<more>\d+)", _Reader._more),
        (
            "difference",
            rf"(?:there are more N(?P<more>\d+) : )?i count {_TWO} , a difference of {_SO_MANY}",
            _Reader._difference,
        ),
        (
            "difference",
            r"N(?P<more>\d+) outnumber N\d+ , since there are N(?P<a>\d+) but (?:only )?N(?P<b>\d+)",
            _Reader._difference,
        ),
        ("difference", rf"there (?:is|are) {_TWO} , so there are more N(?P<more>\d+)", _Reader._difference),
        ("total", rf"there (?:is|are) {_TWO} , which makes {_SO_MANY} altogether", _Reader._total),
        ("total", rf"{_SO_MANY} in all(?: :| , since there (?:is|are)) {_TWO}", _Reader._total),
        ("total", rf"i count {_TWO} , so together there are {_SO_MANY}", _Reader._total),
        ("only", r"there is N(\d+) : no other N(\d+) can be seen", _Reader._only),
        ("only", r"there is more than N(\d+) , since i count N(\d+)(?: in the picture)?", _Reader._several),
        ("edge", r"N(\d+) (?:is|are) nearer to the (left|right) edge", _Reader._edge),
        ("order", r"the order is N(\d+) , N(\d+) , N(\d+)", _Reader._sequence),
        ("order", r"first N(\d+) , then N(\d+) , and last N(\d+)", _Reader._sequence),
        ("middle", r"N(\d+)", _Reader._middle),
        ("halves", rf"{_HALF} : N(?P<n>\d+) are there(?: , and none is {_OTHER})?", _Reader._halves),
        ("halves", rf"{_HALF} : of N(?P<n>\d+) , {_SHARES}", _Reader._halves),
    )
)
"""Answers without a verb of their own, and special ones, by the kind of question."""


# -- the oracle -------------------------------------------------------------------------------------------------------


def judge(
    turns: Sequence[Turn], boxes: Sequence[Box], scene: Scene, width: int | None = None, height: int | None = None
) -> list[Judgement]:
    """Judges each answer of a conversation.

    Args:
        turns: user and assistant in turn, as stored (`pairmill.instructions`).
        boxes: the conversation's boxes, in pixels of the stored image.
        scene: what the image shows.
        width, height: of the stored image (native by default; it must show the whole scene).

    Returns:
        One judgement for each question with its answer.

    Raises:
        ValueError: the turns do not alternate.
    """
    if len(turns) % 2 or any((turn.role == USER) != (n % 2 == 0) for n, turn in enumerate(turns)):
        raise ValueError("turns of user and assistant do not alternate")
    world = _World(scene, boxes, width or scene.width, height or scene.height)
    return [_judge_one(world, q.content, a.content) for q, a in zip(turns[::2], turns[1::2], strict=True)]


def _judge_one(world: _World, question: str, answer: str) -> Judgement:
    reader = _Reader(world)
    try:
        reader.ask(question)
    except _NotUnderstood as error:
        return Judgement(None, f"question: {error}")
    meant = [n for n, phrase in enumerate(reader.phrases) if phrase.boxes is not None]
    if not all(reader.options(n) for n in meant):
        return Judgement(False, question)
    unread = None
    for sentence in _sentences(answer) or [""]:
        try:
            if not reader.answer(sentence):
                return Judgement(False, sentence)
        except _NotUnderstood as error:
            unread = unread or f"{sentence} ({error})"
    return Judgement(True) if unread is None else Judgement(None, unread)
