"""A text word by word: what it mentions and how many of it, and the sentence that can be made of it.

Nothing is decided here of the image: `read` says what is written. Only the first sentence is read for mentions. A text
that cannot be made a plain English sentence (`sentence`), or that is ungrammatical ("two giraffe"), has none
(`Text.said`): nothing that it says is repeated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from captioners.instruct.offline import nouns
from captioners.instruct.offline.nouns import Form
from filters.instruct.words import words_of

_TOKEN = re.compile(r"[A-Za-z]+(?:['\u2019-][A-Za-z]+)*|\d+(?:[.,:/]\d+)*|[^\sA-Za-z\d]")
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

    @property
    def colours(self) -> tuple[str, ...]:
        """Its colours; grey is gray."""
        found = tuple(word for word in self.adjectives if word in nouns.COLOURS)
        return tuple("gray" if word == "grey" else word for word in found)


@dataclass(frozen=True)
class Text:
    """A text, word by word."""

    tokens: tuple[str, ...]
    low: tuple[str, ...]
    words: frozenset[str]
    content: frozenset[str]
    """The words of its first sentence but for the little ones, without the s of plurals."""
    """All of its words and pairs of words, those after the first sentence, too."""
    mentions: tuple[Mention, ...]
    said: str | None
    """As a sentence; null where it cannot be made one safely."""
    spans: tuple[tuple[int, int], ...] | None
    """Where each token is in `said`; null where the two differ by more than case and their ends."""


_ARTICLE = re.compile(r"\b([Aa])(?= (?!one\b|once\b|eu|uni|use)[aeio])")
"""``a ocean``"""
_NEXT = re.compile(r"(?<=[a-z]{2}[.!]) +(?=[A-Z])")
"""Between sentences: of a text only the first is read, since what follows is often no description."""


def read(index: int, text: str, labels: Mapping[str, tuple[Form, ...]]) -> Text:
    """A text, read.

    Args:
        index: its position among the image's texts.
        text: the text.
        labels: forms of the image's own labels, by first word; they go before those of the lexicon.
    """
    text = _ARTICLE.sub(r"\1n", text)
    whole = [token.lower() for token in _TOKEN.findall(text)]
    text = _NEXT.split(text, maxsplit=1)[0]
    tokens = tuple(_TOKEN.findall(text))
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
    content = frozenset(word.rstrip("s") for word in low if word[0].isalpha() and word not in nouns.CLOSED)
    spans = None if said is None else _spans(said, low)
    return Text(tokens, low, words, content, tuple(mentions), said, spans)


def _spans(said: str, low: tuple[str, ...]) -> tuple[tuple[int, int], ...] | None:
    found = [(match[0].lower(), match.span()) for match in _TOKEN.finditer(said)]
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
