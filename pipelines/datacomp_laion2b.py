"""DataComp's rendering of how LAION-2B was filtered."""

from __future__ import annotations

from filters.text_rules import TextStats
from filters.threshold import clip_verdict
from pairmill.plan import Recipe
from pairmill.sources import download_stage
from pipelines._datacomp import B32, ENGLISH, clip_score
from schemas.config import RunConfig


def recipe(config: RunConfig) -> Recipe:
    """Keep English texts, and of those the pairs whose similarity for OpenAI's CLIP ViT-B/32 is at least 0.28. (The
    paper asks cld3 for the language; see docs/decisions/language.md for what is asked here, and why.)"""
    return Recipe(
        "datacomp_laion2b",
        (TextStats(), ENGLISH, download_stage(config.download), clip_score(config, B32), clip_verdict(">= 0.28")),
    )
