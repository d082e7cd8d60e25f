"""Captions of scenes, an oracle that judges any caption of the grammar, and minimal false captions.

The grammar, after lower-casing and with `. ! ? : ;` read as commas and `" ( ) * # ~ ' ` dropped:

    caption    = [opening] item { ["," | "and" | "with"] item } [closing]
    opening    = "a picture of" | "an image with" | "there is" | "this drawing shows" | "we see" ...
    item       = ["there is" | "there are"] phrase { predicate }
    phrase     = [determiner] [number] { size | colour } noun        ("a large red circle", "two shapes", "it")
    noun       = a shape word | "shape" | "object" | "figure" | "thing", singular or plural
    predicate  = ["and"] [copula] relation phrase                    ("is to the left of the square", "above it")
               | ["and"] copula (size | colour) { ["and" | ","] (size | colour) }
    relation   = ["to" | "on" | "at"] ["the"] "left" ["side"] "of" | "right ..." | "above" | "over" | "below" ...
    closing    = "in the picture" | "in this image" ...

What a caption claims: each indefinite phrase names another object of the scene; a definite phrase ("the circle") that
fits exactly one phrase before it names that one again, and else another object; "two red shapes" says that exactly
two objects fit, and "one object" exactly one; a predicate after "and" is about the item's first phrase, one without
"and" about the nearest phrase. A caption is true when some choice of distinct objects makes all its claims hold. It
may leave objects out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import permutations

from pairmill.procedural.scene import COLOURS, RELATIONS, SHAPES, SIZES, Scene, SceneObject

CORRUPTIONS: tuple[str, ...] = ("colour", "size", "shape", "relation")
"""What `corrupt` can make false."""

_SIZE_WORDS: Mapping[str, str] = {
    "small": "small",
    "little": "small",
    "tiny": "small",
    "large": "large",
    "big": "large",
}
_PLURALS: Mapping[str, str] = {shape: "crosses" if shape == "cross" else shape + "s" for shape in SHAPES}
_SINGULARS: Mapping[str, str] = {plural: shape for shape, plural in _PLURALS.items()}
_GENERIC = ("shape", "object", "figure", "thing")
_GENERIC_PLURALS = tuple(noun + "s" for noun in _GENERIC)
_NUMBERS: Mapping[str, int] = {"two": 2, "three": 3, "four": 4, "five": 5}
_INDEFINITE = ("a", "an", "one", "some", "another")
_DEFINITE = ("the", "this", "that")
_RELATION_WORDS: Mapping[str, str] = {
    "left": "left of",
    "right": "right of",
    "above": "above",
    "over": "above",
    "below": "below",
    "under": "below",
    "beneath": "below",
    "underneath": "below",
}
_OPPOSITES: Mapping[str, str] = {
    "left": "right",
    "right": "left",
    "above": "below",
    "below": "above",
    "over": "under",
    "under": "over",
    "beneath": "over",
    "underneath": "over",
}
_PICTURES = ("picture", "photo", "photograph", "image", "drawing", "illustration", "view", "scene")
_SHOWS = ("shows", "contains", "has", "depicts")
_BE = ("is", "are", "sits", "lies", "stands", "located", "placed")
_EXTRA_WORDS: tuple[str, ...] = (
    "of",
    "with",
    "and",
    "in",
    "on",
    "at",
    "to",
    "side",
    "there",
    "here",
    "we",
    "see",
    "can",
    "you",
)
_EXTRA_WORDS += ("simple", "plain", "it", "which", "background")

VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        {
            *COLOURS, *SHAPES, *_SINGULARS, *_SIZE_WORDS, *_GENERIC, *_GENERIC_PLURALS, *_NUMBERS, *_INDEFINITE,
            *_DEFINITE, *_RELATION_WORDS, *_PICTURES, *_SHOWS, *_BE, *_EXTRA_WORDS,
        }
    )
)  # fmt: skip
"""Every word of the grammar, sorted: what a tokenizer should hold whole."""


@dataclass(frozen=True)
class Mention:
    """What a caption says of one object; None where it says nothing. With a `count`, what exactly that many fit."""

    colour: str | None = None
    size: str | None = None
    shape: str | None = None
    count: int | None = None

    def fits(self, thing: SceneObject) -> bool:
        """Whether the object is as described."""
        return (
            self.colour in (None, thing.colour)
            and self.size in (None, thing.size)
            and self.shape in (None, thing.shape)
        )


@dataclass(frozen=True)
class Claim:
    """What a caption claims: objects, relations between them (indices into `mentions`), and whether it contradicts
    itself ("the red circle is blue")."""

    mentions: tuple[Mention, ...]
    relations: tuple[tuple[int, str, int], ...]
    contradictory: bool = False


@dataclass(frozen=True)
class _Word:
    text: str
    start: int
    end: int


@dataclass
class _Draft:
    """A mention under construction, with the words that said each thing."""

    mention: Mention
    words: dict[str, list[_Word]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Parse:
    claim: Claim
    attribute_words: tuple[dict[str, list[_Word]], ...]
    relation_words: tuple[_Word, ...]


class _NotInGrammar(Exception):
    """Raised inside the parser; never leaves this module."""


_TOKEN = re.compile(r"[a-z]+|\d+|[,.!?:;]|[^\s\"()*#~'\u2019]")


class _Parser:
    def __init__(self, caption: str) -> None:
        words = [_Word("," if m[0] in ".!?:;" else m[0], m.start(), m.end()) for m in _TOKEN.finditer(caption.lower())]
        while words and words[-1].text == ",":
            words.pop()
        self.words = words
        self.at = 0
        self.drafts: list[_Draft] = []
        self.relations: list[tuple[int, str, int]] = []
        self.relation_words: list[_Word] = []
        self.contradictory = False

    def peek(self, ahead: int = 0) -> str:
        place = self.at + ahead
        return self.words[place].text if place < len(self.words) else ""

    def take(self, *options: str) -> bool:
        if self.peek() in options:
            self.at += 1
            return True
        return False

    def attempt(self, rule: Callable[[], bool]) -> bool:
        """Run a rule that may fail half-way; on failure the place is restored."""
        place = self.at
        if rule():
            return True
        self.at = place
        return False

    def parse(self) -> _Parse:
        for _ in range(2):
            self.attempt(self.opening)
            self.take(",")
        self.item()
        while self.at < len(self.words):
            place = self.at
            while self.take(",", "and", "with"):
                pass
            if self.at > place and self.at == len(self.words):
                raise _NotInGrammar
            if self.attempt(self.closing):
                continue
            self.item()
        claim = Claim(tuple(draft.mention for draft in self.drafts), tuple(self.relations), self.contradictory)
        return _Parse(claim, tuple(draft.words for draft in self.drafts), tuple(self.relation_words))

    def opening(self) -> bool:
        if self.take("there", "here"):
            return self.take("is", "are")
        if self.take("we", "you"):
            self.take("can")
            return self.take("see")
        if self.peek() in ("this", "that", "it") and self.peek(1) == "is":
            if self.peek(2) in _INDEFINITE and self.noun_ahead(3) in _PICTURES:
                self.at += 2
            elif self.peek(2) in _INDEFINITE:
                self.at += 2
                return True
            else:
                return False
        self.take(*_INDEFINITE, *_DEFINITE)
        self.take("simple", "plain")
        if not self.take(*_PICTURES):
            return False
        return self.take("of", "with", *_SHOWS)

    def noun_ahead(self, ahead: int) -> str:
        while self.peek(ahead) in ("simple", "plain"):
            ahead += 1
        return self.peek(ahead)

    def closing(self) -> bool:
        if self.take("in"):
            return self.take("the", "this") and self.take(*_PICTURES)
        if self.take("on"):
            return self.take("a", "the") and (self.take("simple", "plain") or True) and self.take("background")
        return False

    def item(self) -> None:
        if self.peek() in ("there", "here", "we", "you"):
            self.attempt(self.opening)
        subject = nearest = self.phrase()
        while True:
            place = self.at
            joined = self.take("and", ",") and (self.take("and") or True)
            about = subject if joined else nearest
            linked = self.take("which", "that")
            copula = self.take(*_BE)
            if copula:
                self.take("located", "placed")
            word = self.relation()
            if word is not None:
                self.relation_words.append(word)
                nearest = self.phrase()
                self.relations.append((about, _RELATION_WORDS[word.text], nearest))
            elif copula and self.attributes(about):
                pass
            elif linked or copula:
                raise _NotInGrammar
            else:
                self.at = place
                return

    def relation(self) -> _Word | None:
        place = self.at
        if self.take("to", "on", "at"):
            self.take("the")
        if self.peek() in ("left", "right"):
            word = self.words[self.at]
            self.at += 1
            self.take("side")
            if self.take("of"):
                return word
        elif self.at == place and self.peek() in _RELATION_WORDS:
            self.at += 1
            return self.words[place]
        self.at = place
        return None

    def attributes(self, about: int) -> bool:
        """The size and colour words after a copula, added to a mention."""
        draft = self.drafts[about]
        found = False
        while True:
            place = self.at
            if found:
                self.take("and", ",")
            word = self.peek()
            name, value = _attribute(word)
            if name is None:
                self.at = place
                return found
            if found and self.noun_follows():
                self.at = place
                return found
            if getattr(draft.mention, name) not in (None, value):
                self.contradictory = True
            else:
                draft.mention = _saying(draft.mention, name, value)
            draft.words.setdefault(name, []).append(self.words[self.at])
            self.at += 1
            found = True

    def noun_follows(self) -> bool:
        """Whether the attribute words from here on lead to a noun, so belong to another phrase."""
        ahead = 0
        while _attribute(self.peek(ahead))[0] is not None:
            ahead += 1
        return _noun(self.peek(ahead)) is not None

    def phrase(self) -> int:
        """One noun phrase; returns the index of the mention it makes or names again."""
        if self.take("it"):
            if len(self.drafts) == 0:
                raise _NotInGrammar
            return 0 if len(self.drafts) == 1 else self.last_subject()
        definite = self.take(*_DEFINITE)
        alone = self.peek() == "one"
        determined = definite or self.take(*_INDEFINITE)
        count = None
        if self.peek() in _NUMBERS:
            count = _NUMBERS[self.peek()]
            self.at += 1
        draft = _Draft(Mention(count=count))
        while True:
            place = self.at
            if any(draft.words):
                self.take(",", "and")
            name, word = _attribute(self.peek())
            if name is None or name in draft.words:
                self.at = place
                break
            draft.mention = _saying(draft.mention, name, word)
            draft.words[name] = [self.words[self.at]]
            self.at += 1
        noun = _noun(self.peek())
        if noun is None:
            raise _NotInGrammar
        shape, plural = noun
        if plural != (count is not None) or (count is not None and determined and not definite):
            raise _NotInGrammar
        if alone and shape is None:
            draft.mention = replace(draft.mention, count=1)
        if shape is not None:
            draft.mention = replace(draft.mention, shape=shape)
            draft.words["shape"] = [self.words[self.at]]
        self.at += 1
        if definite and count is None:
            known = [place for place, other in enumerate(self.drafts) if _compatible(other.mention, draft.mention)]
            if len(known) > 1:
                raise _NotInGrammar
            if known:
                for name, words in draft.words.items():
                    self.drafts[known[0]].words.setdefault(name, []).extend(words)
                return known[0]
        self.drafts.append(draft)
        return len(self.drafts) - 1

    def last_subject(self) -> int:
        """What "it" names: the phrase before the one being described last."""
        return len(self.drafts) - 2


def _saying(mention: Mention, name: str, word: str | None) -> Mention:
    return replace(mention, colour=word) if name == "colour" else replace(mention, size=word)


def _attribute(word: str) -> tuple[str | None, str | None]:
    if word in COLOURS:
        return "colour", word
    if word in _SIZE_WORDS:
        return "size", _SIZE_WORDS[word]
    return None, None


def _noun(word: str) -> tuple[str | None, bool] | None:
    """(shape or None for a generic noun, whether plural), or None when the word is no noun of the grammar."""
    if word in SHAPES:
        return word, False
    if word in _SINGULARS:
        return _SINGULARS[word], True
    if word in _GENERIC or word in _GENERIC_PLURALS:
        return None, word in _GENERIC_PLURALS
    return None


def _compatible(known: Mention, said: Mention) -> bool:
    """Whether a definite phrase can name a mention made before: it says nothing that the mention did not say."""
    return (
        known.count is None
        and (said.shape is None or said.shape == known.shape)
        and (said.colour is None or said.colour == known.colour)
        and (said.size is None or said.size == known.size)
    )


@lru_cache(maxsize=200_000)
def _parse(caption: str) -> _Parse | None:
    try:
        return _Parser(caption).parse()
    except _NotInGrammar:
        return None


def parse(caption: str) -> Claim | None:
    """What the caption claims, or None when it is not in the grammar of this module."""
    parsed = _parse(caption)
    return None if parsed is None else parsed.claim


def claim_holds(claim: Claim, scene: Scene) -> bool:
    """Whether some choice of distinct objects of the scene makes every part of the claim hold."""
    if claim.contradictory:
        return False
    single = [place for place, mention in enumerate(claim.mentions) if mention.count is None]
    for mention in claim.mentions:
        if mention.count is not None and sum(map(mention.fits, scene.objects)) != mention.count:
            return False
    if any(claim.mentions[a].count or claim.mentions[b].count for a, _, b in claim.relations):
        return False
    for choice in permutations(range(len(scene.objects)), len(single)):
        chosen = dict(zip(single, choice, strict=True))
        if all(claim.mentions[m].fits(scene.objects[o]) for m, o in chosen.items()) and all(
            scene.holds(chosen[a], relation, chosen[b]) for a, relation, b in claim.relations
        ):
            return True
    return False


def is_true(caption: str, scene: Scene) -> bool | None:
    """The oracle: whether the caption is true of the scene; None when the caption is not in the grammar.

    Any caption of the grammar can be judged, not only those that `describe` writes. A relation said of a plural
    ("two circles above a star") is judged false, since the grammar does not say which objects it means.
    """
    claim = parse(caption)
    return None if claim is None else claim_holds(claim, scene)


def corrupt(caption: str, scene: Scene, kind: str, rng: random.Random) -> str | None:
    """A caption that differs from a true one in one word's meaning and is false of the scene.

    The word is replaced wherever the caption says it of the same object, and "a" or "an" before it is kept right.

    Args:
        caption: a caption of the grammar.
        scene: what the result must be false of.
        kind: one of `CORRUPTIONS`.
        rng: chooses among the possible corruptions.

    Returns:
        The false caption, checked with the oracle; None when the caption says nothing of this kind, or no change
        of it is false, or the caption is not in the grammar.

    Raises:
        ValueError: the kind is not one of `CORRUPTIONS`.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {kind!r}: use one of {', '.join(CORRUPTIONS)}")
    parsed = _parse(caption)
    if parsed is None:
        return None
    changes = list(_changes(parsed, kind))
    rng.shuffle(changes)
    for words, new in changes:
        changed = _rewrite(caption, {word.start: (word, _inflect(word.text, new)) for word in words})
        if is_true(changed, scene) is False:
            return changed
    return None


def _changes(parsed: _Parse, kind: str) -> Iterator[tuple[list[_Word], str]]:
    if kind == "relation":
        for word in parsed.relation_words:
            yield [word], _OPPOSITES[word.text]
        return
    values = {"colour": tuple(COLOURS), "size": tuple(SIZES), "shape": SHAPES}[kind]
    for mention, words in zip(parsed.claim.mentions, parsed.attribute_words, strict=True):
        if kind in words:
            for value in values:
                if value != getattr(mention, kind):
                    yield words[kind], value


def _inflect(old: str, new: str) -> str:
    return _PLURALS[new] if old in _SINGULARS else new


def _rewrite(caption: str, edits: Mapping[int, tuple[_Word, str]]) -> str:
    for _, (word, new) in sorted(edits.items(), reverse=True):
        before, old, after = caption[: word.start], caption[word.start : word.end], caption[word.end :]
        new = new.capitalize() if old[0].isupper() else new
        article = re.search(r"\b([Aa])n?(\s+)$", before)
        if article:
            before = before[: article.start()] + _article(new, article[1]) + article[2]
        caption = before + new + after
    return caption


def _article(word: str, letter: str = "a") -> str:
    return letter + "n" if word[0].lower() in "aeiou" else letter


def _named(thing: SceneObject, attributes: tuple[str, ...], determiner: str = "a") -> str:
    words = [*(getattr(thing, name) for name in attributes), thing.shape]
    if determiner == "a":
        determiner = _article(words[0])
    return " ".join([determiner, *words] if determiner else words)


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _related(scene: Scene, subject: int, other: int, rng: random.Random) -> str:
    """A true relation in words; along the axis of the larger distance, one time in five along the other if true."""
    true = [relation for relation in RELATIONS if scene.holds(subject, relation, other)]
    ax1, ay1, ax2, ay2 = scene.boxes()[subject]
    bx1, by1, bx2, by2 = scene.boxes()[other]
    sideways = abs(ax1 + ax2 - bx1 - bx2) / scene.width >= abs(ay1 + ay2 - by1 - by2) / scene.height
    main = [relation for relation in true if relation.endswith(" of") == sideways]
    relation = (main if main and rng.random() < 0.8 else true)[0]
    if relation in ("left of", "right of"):
        return rng.choice(("{}", "to the {}", "to the {}", "on the {}")).format(relation)
    return rng.choice(("above", "above", "over") if relation == "above" else ("below", "below", "under", "beneath"))


def _pair(scene: Scene, rng: random.Random) -> tuple[int, int]:
    subject, other = rng.sample(range(len(scene.objects)), 2)
    return subject, other


def _detail(rng: random.Random) -> tuple[str, ...]:
    return rng.choice((("colour",), ("size", "colour"), ("size", "colour")))


def _short(scene: Scene, rng: random.Random) -> str:
    return _named(rng.choice(scene.objects), ("colour",))


def _sized(scene: Scene, rng: random.Random) -> str:
    detail = rng.choice((("size", "colour"), ("size", "colour"), ("size",)))
    return _named(rng.choice(scene.objects), detail)


def _picture(scene: Scene, rng: random.Random) -> str:
    opening = rng.choice(
        (
            "a picture of",
            "an image of",
            "a drawing of",
            "a photo of",
            "this picture shows",
            "we see",
            "a simple scene with",
        )
    )
    detail = _detail(rng)
    chosen = rng.sample(scene.objects, rng.randint(1, len(scene.objects)))
    return f"{opening} {_listed([_named(thing, detail) for thing in chosen])}"


def _list_all(scene: Scene, rng: random.Random) -> str:
    detail = _detail(rng)
    return _listed([_named(thing, detail) for thing in rng.sample(scene.objects, len(scene.objects))])


def _relation(scene: Scene, rng: random.Random) -> str:
    subject, other = _pair(scene, rng)
    detail = _detail(rng)
    first, second = (_named(scene.objects[place], detail) for place in (subject, other))
    return f"{first} {_related(scene, subject, other, rng)} {second}"


def _sentence(scene: Scene, rng: random.Random) -> str:
    subject, other = _pair(scene, rng)
    detail = _detail(rng)
    first, second = (_named(scene.objects[place], detail, "the") for place in (subject, other))
    return f"{first} is {_related(scene, subject, other, rng)} {second}"


def _predicate(scene: Scene, rng: random.Random) -> str:
    thing = rng.choice(scene.objects)
    others = [other for other in scene.objects if other is not thing and other.shape != thing.shape]
    claims = rng.choice((thing.colour, f"{thing.size} and {thing.colour}", f"{thing.colour} and {thing.size}"))
    first = f"the {thing.shape} is {claims}" if rng.random() < 0.5 else f"a {thing.shape} that is {claims}"
    if others and rng.random() < 0.6:
        other = rng.choice(others)
        return f"{first}, the {other.shape} is {other.colour}" if first.startswith("the") else (
            f"{first} and {_named(other, ('colour',))}"
        )  # fmt: skip
    return first


def _counted(scene: Scene, rng: random.Random) -> str:
    detail = _detail(rng)
    noun = rng.choice(_GENERIC[:3])
    number = {1: "one", 2: "two", 3: "three"}[len(scene.objects)]
    parts = [_named(thing, detail) for thing in rng.sample(scene.objects, len(scene.objects))]
    return f"{number} {noun}{'s' if len(parts) > 1 else ''}: {_listed(parts)}"


def _plural(scene: Scene, rng: random.Random) -> str:
    """A count of what several objects share; the list of all where they share nothing."""
    shared = []
    for name in ("colour", "shape", "size"):
        for value in dict.fromkeys(getattr(thing, name) for thing in scene.objects):
            number = sum(getattr(thing, name) == value for thing in scene.objects)
            if number > 1:
                shared.append((name, value, number))
    if not shared:
        return _list_all(scene, rng)
    name, value, number = rng.choice(shared)
    words = _PLURALS[value] if name == "shape" else f"{value} shapes"
    return f"there are {'two' if number == 2 else 'three'} {words}"


def _full(scene: Scene, rng: random.Random) -> str:
    subject, other = _pair(scene, rng)
    rest = [thing for place, thing in enumerate(scene.objects) if place not in (subject, other)]
    first, second = (_named(scene.objects[place], ("size", "colour")) for place in (subject, other))
    text = f"there is {first} {_related(scene, subject, other, rng)} {second}"
    if rest:
        text += f", and there is {_named(rest[0], ('size', 'colour'))}"
    return text


def _chain(scene: Scene, rng: random.Random) -> str:
    subject, other, third = rng.sample(range(len(scene.objects)), 3)
    first, second, last = (_named(scene.objects[place], ("colour",)) for place in (subject, other, third))
    return f"{first} {_related(scene, subject, other, rng)} {second} and {_related(scene, subject, third, rng)} {last}"


def _referring(scene: Scene, rng: random.Random) -> str:
    subject, other = _pair(scene, rng)
    a, b = scene.objects[subject], scene.objects[other]
    again = ("colour",) if a.shape == b.shape else ()
    start = _listed([_named(thing, ("size", "colour")) for thing in (a, b)])
    return f"{start}, {_named(a, again, 'the')} is {_related(scene, subject, other, rng)} {_named(b, again, 'the')}"


@dataclass(frozen=True)
class _Form:
    write: Callable[[Scene, random.Random], str]
    weight: float
    objects: int = 1


_FORMS: Mapping[str, _Form] = {
    "short": _Form(_short, 1.0),
    "sized": _Form(_sized, 1.2),
    "picture": _Form(_picture, 1.5),
    "list": _Form(_list_all, 1.5),
    "predicate": _Form(_predicate, 1.0),
    "counted": _Form(_counted, 1.0),
    "plural": _Form(_plural, 0.4, objects=2),
    "relation": _Form(_relation, 1.2, objects=2),
    "sentence": _Form(_sentence, 1.0, objects=2),
    "full": _Form(_full, 1.2, objects=2),
    "referring": _Form(_referring, 0.7, objects=2),
    "chain": _Form(_chain, 0.6, objects=3),
}

FORMS: tuple[str, ...] = tuple(_FORMS)
"""The names of the caption forms `describe` writes, from short to full."""


def describe(scene: Scene, rng: random.Random, form: str | None = None) -> str:
    """A true caption of the scene: lower case, at least three words, in the grammar of this module.

    Args:
        scene: what to describe.
        rng: the only source of chance.
        form: one of `FORMS`; by default a random one. A form that needs more objects than the scene has becomes
            `list` ("a small red ring").

    Raises:
        ValueError: the form is not one of `FORMS`.
    """
    if form is None:
        form = rng.choices(FORMS, weights=[entry.weight for entry in _FORMS.values()])[0]
    if form not in _FORMS:
        raise ValueError(f"unknown caption form {form!r}: use one of {', '.join(FORMS)}")
    if len(scene.objects) < _FORMS[form].objects:
        form = "list"
    return _FORMS[form].write(scene, rng)


def as_typed(caption: str, rng: random.Random) -> str:
    """A caption as people type it: sometimes with a capital, sometimes with a full stop; its truth is unchanged."""
    if rng.random() < 0.4:
        caption = caption[0].upper() + caption[1:]
    return caption + "." if rng.random() < 0.25 else caption
