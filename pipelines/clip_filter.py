"""The main road: text rules, download, image rules, CLIP score, and only then duplicates."""

from __future__ import annotations

from captioners.instruct import instruct_steps
from filters.clip_score import ClipScore
from filters.heads import EmbeddingHead
from filters.image_rules import ImageStats
from filters.text_rules import TextStats
from filters.threshold import blank_verdicts, clip_verdicts, score_verdicts, size_verdicts, text_verdicts
from pairmill.dedup import steps as dedup_steps
from pairmill.plan import Recipe
from pairmill.sources import download_stage
from schemas.config import RunConfig


def recipe(config: RunConfig) -> Recipe:
    """Look at the alt text before anything is fetched, and drop what says nothing. Download what is left; drop images
    that are too small, too thin or blank. Score how well image and text fit, and keep the pairs that fit. Then drop
    duplicates: after the CLIP score, so that of several copies of an image one with a fitting text stays. Last, have
    the conversations written that ``instruct.kinds`` asks for."""
    return Recipe(
        "clip_filter",
        (
            TextStats(),
            *text_verdicts(config.keep),
            download_stage(config.download),
            *size_verdicts(config.keep),
            ImageStats(),
            *blank_verdicts(config.keep),
            ClipScore.of(config.models),
            *clip_verdicts(config.keep),
            *EmbeddingHead.all_of(config.models),
            *score_verdicts(config.keep),
            *dedup_steps(config.dedup),
            *instruct_steps(config, captions=False),
        ),
    )
