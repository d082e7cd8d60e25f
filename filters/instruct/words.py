"""Text as the checks read it: sentences of lower-case tokens, numbers, and the little words around them."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\d+(?:[.,:/]\d+)*(?:st|nd|rd|th)?|[^\W\d_]+|n't|'s\b|[,;:()\u2014]")
_SENTENCE = re.compile(r"(?<=[.!?])[\"'\u201d\u2019)\]]*\s+|\n+")
_QUOTED = re.compile(
    r"\"[^\"\n]{0,200}\"|\u201c[^\u201d\n]{0,200}\u201d|(?<![\w'])'[^'\n]{1,60}(?:'\w[^'\n]{0,60})*'(?!\w)"
)


def words_of(listed: str) -> frozenset[str]:
    """The words of a list that spaces part."""
    return frozenset(listed.split())


_BLANKS = re.compile(r"[^\S\n]{2,}")
_LINES = re.compile(r"\n\s*\n")

QUOTE = "quoted"
"""The token that stands for what an answer quotes: words that can be read in a picture are no claims."""

NUMBERS = {
    word: value
    for value, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
            "twenty",
        ]
    )
}

DETERMINERS = words_of(
    "a an the this that these those his her its their our my your some any each every both all another one no "
    "several many few multiple various numerous 's"
)
PREPOSITIONS = words_of(
    "of in on at to from with without by near beside besides behind under underneath beneath above over below "
    "between among amid amidst against along across around into onto inside outside through toward towards "
    "beyond atop next like as for about up down off out upon within past during before after than via"
)
CONJUNCTIONS = words_of("and or nor but while whereas as because so if when where which who whom whose that")
VERBS = words_of(
    "is are was were be been being am do does did has have had can could may might must shall should will would "
    "sit sits stand stands lie lies lay lays hold holds wear wears look looks seem seems appear appears show "
    "shows see seen rest rests hang hangs face faces eat eats walk walks ride rides play plays watch watches "
    "make makes give gives take takes surround surrounds fill fills occupy occupies contain contains there here "
    "not also just only"
)
PRONOUNS = words_of("it they he she them him we you i what something anything nothing everyone")
FUNCTION = DETERMINERS | PREPOSITIONS | CONJUNCTIONS | VERBS | PRONOUNS | frozenset(",;:()\u2014") | {QUOTE, "n't"}
"""Tokens that end a noun phrase on its left."""


def tamed(text: str, most: int) -> str:
    """At most so many characters, with no run of blanks longer than one and of line ends longer than two: patterns are
    quick on what is left."""
    return _LINES.sub("\n\n", _BLANKS.sub(" ", text[:most]))


def unquoted(text: str) -> str:
    """The text with what it quotes put as one token."""
    if '"' not in text and "\u201c" not in text and "'" not in text:
        return text
    return _QUOTED.sub(f" {QUOTE} ", text)


def tokens(sentence: str) -> list[str]:
    """Words, numbers, commas and the like, in lower case; ``isn't`` is ``is``, ``n't``; hyphens part words."""
    plain = sentence.lower().replace("\u2019", "'")
    if "n't" in plain:
        plain = plain.replace("can't", "can n't").replace("won't", "will n't").replace("n't", " n't")
    return _TOKEN.findall(plain)


def sentences(text: str) -> list[list[str]]:
    """The tokens of each sentence, quotations put as one token."""
    found = (tokens(part) for part in _SENTENCE.split(unquoted(text)))
    return [sentence for sentence in found if sentence]


def number(token: str) -> int | None:
    """What a word or an integer of at most three digits says."""
    if token.isascii() and token.isdigit() and len(token) <= 3:
        return int(token)
    return NUMBERS.get(token)
