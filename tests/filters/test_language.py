from __future__ import annotations

import pyarrow as pa
import pytest

from filters.language import LanguageDetector, main_script
from filters.threshold import InLanguage
from tests.filters.languages import ENGLISH, OTHERS


@pytest.fixture(scope="module")
def detector() -> LanguageDetector:
    return LanguageDetector()


def test_captions_of_many_languages_are_recognised(detector: LanguageDetector) -> None:
    wrong = [(code, t) for code, texts in OTHERS.items() for t in texts if detector.detect(t).language != code]
    total = sum(map(len, OTHERS.values()))
    assert len(wrong) <= 0.1 * total, wrong


def test_short_english_titles_are_not_thrown_away(detector: LanguageDetector) -> None:
    guesses = [detector.detect(text) for text in ENGLISH]
    table = pa.table({"language": [g.language for g in guesses], "language_score": [g.score for g in guesses]})
    dropped = InLanguage(("en",)).judge(table)
    names = [t for t, reason in zip(ENGLISH, dropped.reason.to_pylist(), strict=True) if reason]
    assert len(names) <= 1, names


def test_the_label_of_a_foreign_agency_does_not_count(detector: LanguageDetector) -> None:
    assert main_script("Golden Gate Bridge at sunset — ストック写真") == "Golden Gate Bridge at sunset"
    assert detector.detect("Ruined castle on a hill above the river — 图库照片").language == "en"


def test_a_text_of_two_scripts_is_looked_at_whole() -> None:
    text = "Зимние ботинки Adidas чёрные"
    assert main_script(text) == "Зимние ботинки        чёрные".replace("        ", " ")
    assert main_script("Winter boots чёрные ботинки") == "Winter boots чёрные ботинки"


@pytest.mark.parametrize("text", ["", "123 456", "!!! ...", "№ 12"])
def test_a_text_without_letters_has_no_language(detector: LanguageDetector, text: str) -> None:
    guess = detector.detect(text)
    assert guess.language is None
    assert guess.score is None


def test_scores_are_probabilities(detector: LanguageDetector) -> None:
    for text in (*ENGLISH, *(t for texts in OTHERS.values() for t in texts)):
        guess = detector.detect(text)
        assert guess.score is not None
        assert 0 < guess.score <= 1
