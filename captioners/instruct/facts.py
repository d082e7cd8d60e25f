"""What can be said of an image for sure, from its kept texts and boxes alone.

`read` finds the facts and, with them, what makes them so. What licenses what:

- **A count** of a label is its number of boxes. It is given only where the label is not crowded, boxes of a detector
  are borne out by a text, and no text says otherwise: none states another number for the label or for a word that means
  the same, none speaks of several where there is one box, and, where there are several boxes and texts name the
  thing, one of them does so in the plural. Without boxes of it a number that a text states is a count, if every text
  that gives one gives that one, and without an adjective ("two green shapes" are not all shapes).
- **The one** of a label: its count is 1; or it was not looked for, has no box, and every text that names it does so
  in the singular.
- **A colour or a material** is that of a text's adjectives right before the noun of the one of its label; no text gives
  it another one. Of what has no box, "a red bus" in one text alone says it of some bus only. In a label ("large red
  circle") size and colour are part of the label.
- **Left, right, above, below** hold between things that are each the one of their label, when the centres of their
  boxes differ by `MARGIN` of the image's side and the boxes share at most `SHARED` of the smaller one's extent on that
  axis. **Place in the picture**: see `Thing.side`, `Thing.level` and `Thing.central`.
- **Larger in the picture**: twice the box area. **More**: both are counts.
- **Yes**: there is a box, or two texts (or the only one) name it. **No**: the label was looked for in every image
  (`Context.labels`), has no box, is not crowded, and no text has a word for it or near it.
- **What a text says** is taken from the first sentence of texts that `sentence` could clean and that agree with the
  counts. A text is left out that gives a thing a colour which another text denies (two thirds of those that give one
  outvote the others), that says "behind" where another says "in front of", or that names a looked-for label which has
  no box, unless another text does so too and no like thing has a box (a "chair" that is a couch). Texts left out, or
  that could not be cleaned, say nothing, but may still contradict.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise

from captioners.instruct import nouns
from captioners.instruct.nouns import Described, Form, Noun, words_of
from pairmill.boxes import Box
from pairmill.instructions import Context

MARGIN = 0.12
"""Of the image's width (height): the least distance between two centres for a relation."""
SHARED = 0.25
"""Of the smaller extent: how much two boxes may overlap on the axis of a relation."""
LARGER = 2.0
"""Ratio of two areas from which one is larger in the picture."""
MOST = 8
"""More boxes than this are seldom all that there are."""
FEW = 4
"""The same for what no text speaks of in the plural."""

TOKEN = re.compile(r"[A-Za-z]+(?:['\u2019-][A-Za-z]+)*|\d+(?:[.,:/]\d+)*|[^\sA-Za-z\d]")
"""A word, a number, or a sign."""


@dataclass(frozen=True, slots=True)
class Mention:
    """A noun phrase of a text."""

    text: int
    start: int
    """Of its first token: the determiner, or the first adjective."""
    noun: int
    """Of its noun's first token."""
    end: int
    """Past the noun."""
    form: Form
    number: int | None
    """As stated: 1 for "a", "one"."""
    several: bool
    """Plural, or after a word for more than one."""
    head: bool
    """The phrase is about it: it is no part of a compound."""
    adjectives: tuple[str, ...]
    """In lower case already: those of a name ("Navy ship") are left out."""
    digits: bool
    """The number is in digits."""

    @property
    def stated(self) -> int | None:
        """A number of two or more."""
        return self.number if self.number is not None and self.number > 1 else None


@dataclass(frozen=True)
class Text:
    """A text, word by word."""

    tokens: tuple[str, ...]
    low: tuple[str, ...]
    words: frozenset[str]
    """All of its words and pairs of words, those after the first sentence, too."""
    mentions: tuple[Mention, ...]
    said: str | None
    """As a sentence; null where it cannot be made one safely."""
    spans: tuple[tuple[int, int], ...] | None
    """Where each token is in `said`; null where the two differ by more than case and their ends."""


@dataclass
class Thing:
    """All that has one label, or that the texts call by one noun."""

    key: str
    """The label; of a thing without boxes, the noun."""
    noun: Noun
    boxes: tuple[int, ...]
    """Positions in the context's boxes, from left to right."""
    count: int | None = None
    """How many there are, where that is sure."""
    sole: bool = False
    """There is just one, so "the dog" names it."""
    size: str | None = None
    """In the label."""
    colour: tuple[str, ...] = ()
    material: str | None = None
    colour_in_label: bool = False
    mentions: list[Mention] = field(default_factory=list)
    told: list[Mention] = field(default_factory=list)
    """Those in texts that can be said (`Text.said`); only they say anything, the others may but contradict."""
    several: bool = False
    """Texts speak of it in the plural."""
    box: Box | None = None
    """Of the one."""
    width: int = 0
    height: int = 0

    @property
    def side(self) -> str | None:
        """``left`` or ``right`` of the picture: the centre lies in the outer 36% of its width, and the box does not
        reach over 55% of it."""
        if self.box is None:
            return None
        if self.box.centre[0] < 0.36 * self.width and self.box.x2 < 0.55 * self.width:
            return "left"
        return "right" if self.box.centre[0] > 0.64 * self.width and self.box.x1 > 0.45 * self.width else None

    @property
    def level(self) -> str | None:
        """``top`` or ``bottom`` of the picture, by the same shares of its height as `side`."""
        if self.box is None:
            return None
        if self.box.centre[1] < 0.36 * self.height and self.box.y2 < 0.55 * self.height:
            return "top"
        return "bottom" if self.box.centre[1] > 0.64 * self.height and self.box.y1 > 0.45 * self.height else None

    @property
    def central(self) -> bool:
        """In the middle of the picture: the centre lies in the middle fifth of its width and the middle third of its
        height, and the box covers no more than 70% of either."""
        if self.box is None:
            return False
        x, y = self.box.centre[0] / self.width, self.box.centre[1] / self.height
        small = self.box.width < 0.7 * self.width and self.box.height < 0.7 * self.height
        return small and 0.4 < x < 0.6 and 0.33 < y < 0.67


@dataclass
class Facts:
    """All that a conversation may be made of."""

    context: Context
    texts: tuple[Text, ...]
    order: tuple[int, ...]
    """Texts that may be quoted, those first that share most with the others."""
    things: dict[str, Thing]
    """By label or noun; those with boxes first, the largest first."""
    absent: tuple[str, ...]
    """Labels of which there is none."""

    def boxed(self) -> list[Thing]:
        """Things with boxes."""
        return [thing for thing in self.things.values() if thing.boxes]


def left_of(a: Box, b: Box, width: float) -> bool:
    """Whether `a` is plainly to the left of `b`."""
    return _before(a.x1, a.x2, b.x1, b.x2, width)


def above(a: Box, b: Box, height: float) -> bool:
    """Whether `a` is plainly above `b`."""
    return _before(a.y1, a.y2, b.y1, b.y2, height)


def _before(a1: float, a2: float, b1: float, b2: float, side: float) -> bool:
    if b1 + b2 - a1 - a2 < 2 * MARGIN * side:
        return False
    return min(a2, b2) - max(a1, b1) <= SHARED * min(a2 - a1, b2 - b1)


def in_column(a: Box, b: Box) -> bool:
    """Whether one is straight over the other: the boxes share half of the narrower one's width."""
    return min(a.x2, b.x2) - max(a.x1, b.x1) >= 0.5 * min(a.width, b.width)


def read(context: Context) -> Facts:
    """The facts of an image."""
    things: dict[str, Thing] = {}
    kinds = nouns.lexicon()
    keys: dict[str, str] = {}
    for place, box in enumerate(context.boxes):
        key = keys.get(box.label)
        if key is None:
            key = keys[box.label] = " ".join(box.label.split())
        thing = things.get(key)
        if thing is None:
            things[key] = thing = _thing(key, context)
        thing.boxes += (place,)
    labels = _label_forms(things)
    texts = tuple(_parse(index, text, labels) for index, text in enumerate(context.texts))
    for text in texts:
        for mention in text.mentions:
            if not mention.head:
                continue
            for key in _named(mention, things, labels):
                things[key].mentions.append(mention)
    looked_for = frozenset(context.labels)
    known = {kinds.keys.get(key.lower(), key) for key in things}
    loose: dict[str, list[Mention]] = {}
    for text in texts:
        for mention in text.mentions:
            key = mention.form.key
            if mention.head and mention.form.same and key not in known and key not in things:
                loose.setdefault(key, []).append(mention)
    for key, mentions in loose.items():
        if key in looked_for or key in context.crowded:
            continue
        thing = _thing(key, context)
        thing.mentions = mentions
        words = {mention.form.word for mention in mentions}
        if len(words) == 1 and words.isdisjoint(("cattle", "people", "aircraft")):
            word = words.pop()  # without a box of it a phone need be no cell phone
            thing.noun = replace(thing.noun, one=word, many=nouns.plural(word))
        things[key] = thing
    for thing in things.values():
        thing.told = [mention for mention in thing.mentions if texts[mention.text].said is not None]
        _judge(thing, context, things)
    ordered = dict(sorted(things.items(), key=lambda item: (not item[1].boxes, -_area(item[1], context.boxes))))
    return Facts(context, texts, _quotable(context, texts, ordered), ordered, _absent(context, texts, ordered))


def _area(thing: Thing, boxes: Sequence[Box]) -> float:
    return max((boxes[place].area for place in thing.boxes), default=0.0)


def _thing(key: str, context: Context) -> Thing:
    parts: Described = nouns.described(key)
    if parts.head == key.lower():
        return Thing(key, nouns.noun(key), (), width=context.width, height=context.height)
    colour = (parts.colour,) if parts.colour else ()
    return Thing(
        key,
        nouns.noun(key),
        (),
        size=parts.size,
        colour=colour,
        colour_in_label=bool(colour),
        width=context.width,
        height=context.height,
    )


def _label_forms(things: dict[str, Thing]) -> dict[str, tuple[Form, ...]]:
    """The forms of labels that the lexicon lacks, and of the heads of those that are described, by first word."""
    found: dict[str, list[Form]] = {}
    kinds = nouns.lexicon()
    for key in things:
        low = key.lower()
        if low in kinds.keys:
            continue
        parts = nouns.described(key)
        for word in dict.fromkeys((low, parts.head)):
            for form, many in ((word, False), (nouns.plural(word), True)):
                words = tuple(form.split(" "))
                found.setdefault(words[0], []).append(Form(words, word, key, many, True))
    return {first: tuple(sorted(forms, key=lambda form: -len(form.words))) for first, forms in found.items()}


def _named(mention: Mention, things: dict[str, Thing], labels: dict[str, tuple[Form, ...]]) -> list[str]:
    """The labels that a mention may mean."""
    form = mention.form
    if form.key in things:
        return [form.key]
    kinds = nouns.lexicon()
    return [key for key in things if kinds.keys.get(key.lower()) == form.key] if not labels or form.same else []


_ARTICLE = re.compile(r"\b([Aa])(?= (?!one\b|once\b|eu|uni|use)[aeio])")
"""``a ocean``"""
_NEXT = re.compile(r"(?<=[a-z]{2}[.!]) +(?=[A-Z])")
"""Between sentences: of a text only the first is read, since what follows is often no description."""


def _parse(index: int, text: str, labels: dict[str, tuple[Form, ...]]) -> Text:
    text = _ARTICLE.sub(r"\1n", text)
    whole = [token.lower() for token in TOKEN.findall(text)]
    text = _NEXT.split(text, maxsplit=1)[0]
    tokens = tuple(TOKEN.findall(text))
    low = tuple(token.lower() for token in tokens)
    words = frozenset((*whole, *(f"{a} {b}" for a, b in pairwise(whole))))
    forms = nouns.lexicon().forms
    mentions: list[Mention] = []
    at, total = 0, len(low)
    last = 0
    while at < total:
        word = low[at]
        form = None
        for found in (*labels.get(word, ()), *forms.get(word, ())):
            if low[at : at + len(found.words)] == found.words:
                form = found
                break
        if form is None:
            at += 1
            continue
        end = at + len(form.words)
        mention = _mention(index, tokens, low, last, at, end, form)
        mentions.append(mention)
        at = end
        if mention.head:
            last = end
    grammatical = not any(_one_for_many(low, mention) for mention in mentions)
    said = sentence(text, tokens, low) if grammatical else None
    return Text(tokens, low, words, tuple(mentions), said, None if said is None else _spans(said, low))


def _spans(said: str, low: tuple[str, ...]) -> tuple[tuple[int, int], ...] | None:
    found = [(match[0].lower(), match.span()) for match in TOKEN.finditer(said)]
    length = len(low)
    while length and not low[length - 1][0].isalnum():
        length -= 1
    if tuple(word for word, _ in found[:length]) != low[:length]:
        return None
    return tuple(span for _, span in found)


def _one_for_many(low: Sequence[str], mention: Mention) -> bool:
    """``two giraffe``, ``a group of horse``."""
    if mention.form.many or not mention.head or nouns.plural(mention.form.word) == mention.form.word:
        return False
    first = low[mention.start]
    of_group = mention.start > 1 and low[mention.start - 1] == "of" and low[mention.start - 2] in nouns.GROUPS
    return mention.stated is not None or first in ("several", "many", "few") or of_group


_COMPOUNDS = words_of("serving cutting dining living parking shopping drinking baking mixing washing")
_NO_VERBS = words_of("string family clothing ceiling morning evening wedding king series glasses")


def _mention(
    index: int, tokens: tuple[str, ...], low: tuple[str, ...], first: int, at: int, end: int, form: Form
) -> Mention:
    after = low[end] if end < len(low) else "."
    head = (
        (not after[0].isalnum() and after != "'")
        or after in nouns.CLOSED
        or after in nouns.VERBS
        or after in nouns.PARTICIPLES
        or (after.endswith(("ing", "ly", "s")) and after not in nouns.lexicon().keys and after not in _NO_VERBS)
    ) and after != "-"
    start = at
    number: int | None = None
    digits = False
    several = form.many
    adjectives: list[str] = []
    while start > first:
        word = low[start - 1]
        if word in ("a", "an", "another"):
            start -= 1
            number = 1
            if start > first and low[start - 1] == "such":
                start -= 1
            break
        if word in ("the", "this", "that", "his", "her", "its", "their", "these", "those"):
            start -= 1
            break
        if word in nouns.NUMBERS or word.isdigit():
            start -= 1
            number = nouns.NUMBERS.get(word) or int(word[:6])
            digits = word.isdigit()
            if start > first and low[start - 1] in ("the", "these", "those", "all"):
                start -= 1
            break
        if word in nouns.VAGUE:
            start -= 1
            several = several or word not in ("more", "most", "different", "various") or form.many
            break
        if word == "of":
            several = several or (start >= 2 and low[start - 2] in nouns.GROUPS) or low[start - 2] == "lots"
            break
        if word == "and":
            if (
                adjectives
                and adjectives[-1] in nouns.COLOURS
                and start - 2 >= first
                and low[start - 2] in nouns.COLOURS
            ):
                start -= 1
                adjectives.append("and")
                continue
            break
        if word in nouns.CLOSED or not word[0].isalpha() or len(adjectives) > 4:
            break
        if word in nouns.PARTICIPLES or (word in nouns.VERBS and word not in ("open", "closed")):
            break
        start -= 1
        if start == 0 or tokens[start] == word:
            adjectives.append(word)
    if after in _COMPOUNDS and end + 1 < len(low) and low[end + 1] in nouns.lexicon().keys:
        head = False  # a wooden pan serving tray
    head = head and (start == 0 or low[start - 1] not in ("no", "without"))
    return Mention(index, start, at, end, form, number, several, head, tuple(reversed(adjectives)), digits)


def _judge(thing: Thing, context: Context, things: dict[str, Thing]) -> None:
    """Fills in what is sure of a thing."""
    boxes = context.boxes
    thing.boxes = tuple(sorted(thing.boxes, key=lambda place: boxes[place].x1 + boxes[place].x2))
    by_text: dict[int, list[Mention]] = {}
    for mention in thing.mentions:
        by_text.setdefault(mention.text, []).append(mention)
    stated = {mention.stated for mention in thing.mentions if mention.stated}
    thing.several = any(mention.several for mention in thing.mentions) or bool(stated)
    # "A man and a woman", "a man ... another man": as many as there are phrases in one text
    named = max((_persons(found) for found in by_text.values()), default=0)
    kinds = nouns.lexicon()
    key = kinds.keys.get(thing.key.lower(), thing.key)
    rivals = [
        other for other in things.values() if other is not thing and kinds.keys.get(other.key.lower(), other.key) == key
    ]
    count = len(thing.boxes)
    if count:
        detected = any(boxes[place].score is not None for place in thing.boxes)
        sure = (
            thing.key not in context.crowded
            and key not in context.crowded
            and thing.noun.counts
            and count <= (MOST if thing.several else FEW)
            and not rivals
            and not any(
                other.boxes and other is not thing and nouns.includes(key, other.key) for other in things.values()
            )
            and not (detected and _doubled([boxes[place] for place in thing.boxes]))
        )
        if nouns.described(thing.key).head != thing.key.lower():
            pass  # "two red circles" in a text is about several labels: the label itself is exact
        elif count == 1:
            sure = sure and not thing.several and named <= 1
        else:
            sure = sure and stated <= {count} and named <= count
            sure = sure and (not thing.mentions or thing.several or named == count)
        if detected:
            told = named == count and not any(mention.several and not mention.stated for mention in thing.mentions)
            sure = sure and bool(thing.mentions) and (count == 1 or count in stated or told)
        if sure:
            thing.count = count
        thing.sole = count == 1 and (sure or (not thing.noun.counts and not rivals and not thing.several))
        thing.sole = thing.sole and thing.key not in context.crowded
        if thing.sole:
            thing.box = boxes[thing.boxes[0]]
    else:
        numbers = {mention.number for mention in thing.mentions if mention.number is not None}
        plain = any(mention.stated and not mention.adjectives and not mention.digits for mention in thing.told)
        if len(stated) == 1 and numbers == stated and plain:
            thing.count = next(iter(stated))
        thing.sole = bool(thing.told) and not thing.several and named == 1 and thing.key not in nouns.OUTDOORS
    if not thing.colour and any(_colours(mention) for mention in thing.told):
        thing.colour = _agreed([_colours(mention) for mention in thing.mentions])
    materials = {
        nouns.MATERIALS[mention.adjectives[-1]]
        for mention in thing.told
        if mention.adjectives and mention.adjectives[-1] in nouns.MATERIALS
    }
    if len(materials) == 1:
        thing.material = next(iter(materials))


def _persons(mentions: Sequence[Mention]) -> int:
    """How many one text names apart from each other: two different words, or "another"."""
    return sum({mention.form.word: mention.stated or (2 if mention.several else 1) for mention in mentions}.values())


def _doubled(boxes: Sequence[Box]) -> bool:
    return any(a.iou(b) > 0.5 for place, a in enumerate(boxes) for b in boxes[:place])


def _colours(mention: Mention) -> tuple[str, ...]:
    found = tuple(word for word in mention.adjectives if word in nouns.COLOURS)
    return tuple("gray" if word == "grey" else word for word in found)


def _agreed(colours: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The colours that texts give, if no two differ."""
    given = {found for found in colours if found}
    return given.pop() if len(given) == 1 else ()


# -- texts as sentences -----------------------------------------------------------------------------------------------


def _lowered(said: str) -> str:
    """Nouns with a needless capital lower case; those beside another capital are names."""
    words = said.split(" ")
    for place in range(1, len(words)):
        word = words[place]
        beside = (words[place - 1], *words[place + 1 : place + 2])
        alone = not any(other[:1].isupper() for other in beside)
        if word[:1].isupper() and alone and word.rstrip(",").lower() in nouns.lexicon().keys:
            words[place] = word.lower()
    return " ".join(words)


_REFUSED = re.compile(r"[^A-Za-z0-9 ,.'\u2019-]|https?:|www\.|\.(com|net|org|jpg|png)\b")
_NOT_SAID: frozenset[str] = words_of(
    """caption captions captioned coordinates bounding description describe prompt prompts instruction instructions
    instruct ignore ignored respond reply answer output assistant user system json yaml xml html token tokens you
    your yours i me my mine we us our please click download buy sale price free shipping order wallpaper wallpapers
    stock royalty photo's copyright credit website blog jpg jpeg png vector template review reviews recipe recipes
    ideas stockfoto thumbnail outlet pcs sku size pack kit wholesale pdf isbn vs ai model says say image's no
    without"""
)
_STARTS_BADLY: frozenset[str] = words_of(
    "how why what when where who he she it they his her him and or but with of in on at by to from is are"
)
_ENDS_BADLY: frozenset[str] = words_of(
    """a an the and or but with of in on at by to from into is are its his her their as for near next very while"""
)
_FUNCTION: frozenset[str] = words_of(
    """a an the of in on at with and is are to by near from next some two three his her its on under over into"""
)


def sentence(text: str, tokens: Sequence[str], low: Sequence[str]) -> str | None:
    """A text as a sentence, or null: too short or long, no plain English, shouted, markup, addresses, a title, cut off,
    or words that no description has."""
    words = [word for word in low if word[0].isalpha()]
    if not 4 <= len(words) <= 60 or " - " in text or "--" in text:
        return None
    stripped = re.sub(r"\s+", " ", text).strip().rstrip(" .,")
    if _REFUSED.search(stripped):
        return None
    if not _NOT_SAID.isdisjoint(words) or words[0] in _STARTS_BADLY or words[-1] in _ENDS_BADLY:
        return None
    runs = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    if len(set(runs)) < len(runs):
        return None
    if any(a == b for a, b in pairwise(words)) or any(word.isdigit() and len(word) > 4 for word in low):
        return None
    function = sum(word in _FUNCTION for word in words)
    if function < 2 or function * 6 < len(words):
        return None
    capitals = sum(word[0].isupper() for word in tokens[1:] if word[0].isalpha())
    if capitals * 3 > len(words) or sum(map(str.isupper, stripped)) * 4 > len(stripped):
        return None
    stripped = re.sub(r" +([,.])", r"\1", stripped)
    stripped = re.sub(r"([,.])(?=[A-Za-z])", r"\1 ", stripped)
    stripped = re.sub(r"([.,]){2,}", r"\1", stripped)
    stripped = _lowered(stripped)
    parts = [part.strip() for part in re.split(r"\. +", stripped)]
    return ". ".join(part[0].upper() + part[1:] for part in parts if part) + "."


def _quotable(context: Context, texts: Sequence[Text], things: dict[str, Thing]) -> tuple[int, ...]:
    numbers = {thing.key: {mention.stated for mention in thing.mentions if mention.stated} for thing in things.values()}
    looked_for = frozenset(context.labels)
    unboxed: Counter[str] = Counter()
    for text in texts:
        unboxed.update(
            {
                mention.form.key
                for mention in text.mentions
                if mention.head and mention.form.key in looked_for and mention.form.key not in things
            }
        )
    doubted = {
        key
        for key, times in unboxed.items()
        if times == 1 or any(key in alike and not alike.isdisjoint(things) for alike in nouns.CLASSES)
    }
    fronts = [_fronts(text) for text in texts]
    sides = {side for found in fronts for side in found}
    disputed = {(side, key) for side, key in sides if (_BEHIND[side], key) in sides}
    contested = [mention for thing in things.values() if not thing.several for mention in _contested(thing)]
    genders = [(not nouns.MALE.isdisjoint(text.low), not nouns.FEMALE.isdisjoint(text.low)) for text in texts]
    males, females = genders.count((True, False)), genders.count((False, True))
    both = genders.count((True, True))
    content = [
        {word.rstrip("s") for word in text.low if word[0].isalpha() and word not in nouns.CLOSED} for text in texts
    ]
    scored: list[tuple[float, int]] = []
    for place, text in enumerate(texts):
        if text.said is None:
            continue
        if any(
            mention.head and mention.form.key in doubted and mention.form.key not in things for mention in text.mentions
        ):
            continue
        if any(mention.text == place for mention in contested):
            continue
        if not fronts[place].isdisjoint(disputed):
            continue
        if males and females and not both:
            male = genders[place] == (True, False)
            female = genders[place] == (False, True)
            if (male and males <= females) or (female and females <= males):
                continue
        if any(
            mention.text == place and mention.head and _miscounts(mention, thing, numbers[thing.key], context)
            for thing in things.values()
            if numbers[thing.key]
            for mention in thing.mentions
        ):
            continue
        if context.boxes and _overstates(text, place, context, things):
            continue
        others = [content[other] for other in range(len(texts)) if other != place]
        shared = sum(len(content[place] & other) for other in others) / max(1, len(others) * len(content[place]))
        scored.append((-shared, place))
    return tuple(place for _, place in sorted(scored))


_ANYTHING = words_of("shapes objects figures things items")


def _overstates(text: Text, place: int, context: Context, things: dict[str, Thing]) -> bool:
    """Whether a text counts all things otherwise than the boxes do ("two objects: ..."), or says "a red cross and
    a red cross" where there is one."""
    for number, noun in pairwise(text.low):
        if noun in _ANYTHING and nouns.NUMBERS.get(number, len(context.boxes)) != len(context.boxes):
            return True
    for thing in things.values():
        if thing.boxes and thing.key not in context.crowded and thing.noun.counts:
            ones = Counter(
                text.low[mention.start : mention.end]
                for mention in thing.mentions
                if mention.text == place and mention.number == 1 and text.low[mention.start] in ("a", "an")
            )
            if max(ones.values(), default=0) > len(thing.boxes):
                return True
    return False


def _miscounts(mention: Mention, thing: Thing, stated: set[int], context: Context) -> bool:
    """Whether a stated number is at odds with the boxes, or, where there are none, with other texts. "Two men" may be
    two of four people."""
    if mention.stated is None:
        return False
    if not thing.boxes or thing.key in context.crowded or not thing.noun.counts:
        return len(stated) > 1
    if thing.key == "person" and mention.form.word not in ("person", "people"):
        return mention.stated > len(thing.boxes)
    return mention.stated != len(thing.boxes)


def _contested(thing: Thing) -> list[Mention]:
    """The mentions that give a colour which others do not; where most by far agree, the few that do not."""
    given = [(mention, found) for mention in thing.mentions if (found := _colours(mention))]
    times = Counter(found for _, found in given)
    if len(times) < 2:
        return []
    (first, most), *_ = times.most_common(1)
    agreed = first if most >= 2 and most >= 2 * (len(given) - most) else None
    return [mention for mention, found in given if found != agreed]


_BEHIND = {"behind": "front", "front": "behind"}


def _fronts(text: Text) -> set[tuple[str, str]]:
    """What the text has something in front of, or behind."""
    found = set()
    for mention in text.mentions:
        before = text.low[max(0, mention.start - 2) : mention.start]
        if before[-1:] == ("behind",) or before == ("front", "of"):
            found.add(("behind" if before[-1] == "behind" else "front", mention.form.key))
    return found


def _absent(context: Context, texts: Sequence[Text], things: dict[str, Thing]) -> tuple[str, ...]:
    if not context.labels:
        return ()
    kinds = nouns.lexicon()
    words = {word for text in texts for word in text.words}
    named = {key.lower() for key in (*things, *context.crowded)}
    there = {kinds.keys.get(key, key) for key in named} | {nouns.described(key).head for key in named}
    for word in words:
        there |= kinds.near.get(word, _NOTHING)
    return tuple(
        label
        for label, key, heads in _looked_for(context.labels)
        if key not in there
        and label not in things
        and label not in context.crowded
        and nouns.described(label).head not in named  # what is called a circle may be a red one
        and heads.isdisjoint(words)
    )


_NOTHING: frozenset[str] = frozenset()


@lru_cache(maxsize=64)
def _looked_for(labels: tuple[str, ...]) -> tuple[tuple[str, str, frozenset[str]], ...]:
    """Each label, its key, and the words of its noun, where it is none of COCO's."""
    kinds = nouns.lexicon()
    found = []
    for label in labels:
        key = kinds.keys.get(label.lower(), label)
        head = nouns.described(label).head
        known = key in nouns.COCO
        found.append((label, key, _NOTHING if known else frozenset((head, nouns.plural(head), *head.split()))))
    return tuple(found)
