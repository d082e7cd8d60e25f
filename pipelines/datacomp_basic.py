"""DataComp's "basic" filter."""

from __future__ import annotations

from filters.text_rules import TextStats
from filters.threshold import Aspect, ShortSide, Threshold
from pairmill.plan import Recipe
from pairmill.sources import download_stage
from pipelines._datacomp import ENGLISH
from schemas import fields
from schemas.config import RunConfig
from schemas.reasons import Reason


def recipe(config: RunConfig) -> Recipe:
    """Keep English texts of more than two words and more than five characters, then images whose shorter side has at
    least 200 pixels and whose longer side is at most three times as long. The paper asks fasttext's lid.176 for the
    language; here a second model has a say, see docs/decisions/language.md."""
    return Recipe(
        "datacomp_basic",
        (
            TextStats(),
            Threshold("min_words", fields.WORDS.name, ">", 2, Reason.TEXT_TOO_FEW_WORDS),
            Threshold("min_chars", fields.CHARS.name, ">", 5, Reason.TEXT_TOO_FEW_CHARS),
            ENGLISH,
            download_stage(config.download),
            ShortSide(200),
            Aspect(3.0),
        ),
    )
