"""Measures of alt text: how long, how repetitive, is it boilerplate, in which language.

The rules were made by reading 10,000 alt texts of a public web crawl; docs/decisions/text_rules.md has the counts.
"""

from __future__ import annotations

import html
import re
import unicodedata
from dataclasses import dataclass, field

import pyarrow as pa

from filters.boilerplate import boilerplate
from filters.language import LanguageDetector
from pairmill.stage import Batch, Kernel, Resources, Stage
from schemas import fields

MEASURED_CHARS = 4000
"""Repetition, boilerplate and language look at no more of a text than this; captions are shorter by far."""

REPEAT_LENGTH = 6
"""Characters in a row that must come back to count as a repetition: most single words are shorter or as long."""

# Scripts written without spaces, and how many of their characters make about one word.
_UNSPACED = (
    (re.compile("[\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f]+"), 2),
    (re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]+"), 4),
)

_JOINT = re.compile(r"[-_+]+|%20")


def normalise(text: str) -> str:
    """As a reader sees it: HTML entities resolved, one space for any white space, none at the ends, no invisible
    format or control characters."""
    if "&" in text:
        text = html.unescape(text)
    if not text.isprintable():  # spaces other than the usual one are not printable either
        text = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cf", "Cc"))
    return " ".join(text.split())


def count_words(text: str) -> int:
    """Words between spaces that hold a letter or a digit. Of three or more joined by hyphens, underscores or plus signs
    (``blue-mosque-istanbul``) each counts; ``t-shirt`` is one. Scripts written without spaces count by length: two
    characters of Chinese or Japanese, or four of Thai, Lao, Burmese or Khmer, are one word."""
    words = 0
    for pattern, length in _UNSPACED:
        words += sum(-(-len(run) // length) for run in pattern.findall(text))
        text = pattern.sub(" ", text)
    for token in text.split():
        parts = sum(any(c.isalnum() for c in part) for part in _JOINT.split(token))
        words += parts if parts > 2 else min(parts, 1)
    return words


def repetition(text: str) -> float:
    """Share of the text that repeats itself, 0 to 1: the larger of two shares, both without regard to case.

    - Of the words: those that came before. ``hat red hat blue hat`` has 2 of 5.
    - Of the characters: those inside any `REPEAT_LENGTH` characters in a row that came before. It finds runs of one
      character, repeated phrases, and repetition in scripts without spaces.
    """
    text = text.lower()
    words = text.split()
    if not words:
        return 0.0
    by_words = 1 - len(set(words)) / len(words)
    seen: set[str] = set()
    covered, end = 0, 0
    for start in range(len(text) - REPEAT_LENGTH + 1):
        piece = text[start : start + REPEAT_LENGTH]
        if piece in seen:
            covered += start + REPEAT_LENGTH - max(start, end)
            end = start + REPEAT_LENGTH
        seen.add(piece)
    return max(by_words, covered / len(text))


@dataclass(frozen=True)
class TextStats(Stage):
    """Measures the alt text of each pair. A null text has 0 words and 0 characters, and nulls elsewhere.

    `words` and `chars` are those of the text after `normalise`; `language` is null for a text without letters.
    """

    name = "text_stats"
    resources: Resources = field(default=Resources(), metadata={"identity": False})
    reads = (fields.TEXT.name,)
    writes = (
        fields.WORDS,
        fields.CHARS,
        fields.REPETITION,
        fields.BOILERPLATE,
        fields.LANGUAGE,
        fields.LANGUAGE_SCORE,
    )

    def open(self) -> Kernel:
        """Load the language detector."""
        detector = LanguageDetector()

        def kernel(batch: Batch) -> pa.Table:
            rows = [_measure(text, detector) for text in batch.pylist(fields.TEXT.name)]
            return pa.Table.from_pylist(rows, schema=pa.schema(self.writes))

        return kernel


def _measure(text: str | None, detector: LanguageDetector) -> dict[str, object]:
    """One row of what `TextStats` writes."""
    if text is None:
        return {fields.WORDS.name: 0, fields.CHARS.name: 0}
    whole = normalise(text)
    start = whole[:MEASURED_CHARS]
    guess = detector.detect(start)
    return {
        fields.WORDS.name: count_words(whole),
        fields.CHARS.name: len(whole),
        fields.REPETITION.name: repetition(start),
        fields.BOILERPLATE.name: boilerplate(start),
        fields.LANGUAGE.name: guess.language,
        fields.LANGUAGE_SCORE.name: guess.score,
    }
