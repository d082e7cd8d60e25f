"""Instruction data from a curated source: captions and boxes that people made, such as COCO's."""

from __future__ import annotations

from captioners.instruct import instruct_steps
from filters.image_rules import ImageStats
from filters.threshold import blank_verdicts, size_verdicts
from pairmill.dedup.exact import ExactDuplicates
from pairmill.instructions import KINDS
from pairmill.plan import Recipe
from pairmill.sources import download_stage
from schemas.config import RunConfig


def recipe(config: RunConfig) -> Recipe:
    """Read the images, drop those that are too small, too thin or blank, and exact duplicates; have conversations
    written of the others from all their texts and boxes. No text is judged: they are taken to be curated. Where
    ``instruct.kinds`` is empty, all kinds are written of every image."""
    if not config.instruct.kinds:
        kinds = dict.fromkeys(KINDS, 1.0)
        config = config.model_copy(update={"instruct": config.instruct.model_copy(update={"kinds": kinds})})
    return Recipe(
        "instruct",
        (
            download_stage(config.download),
            *size_verdicts(config.keep),
            ImageStats(),
            *blank_verdicts(config.keep),
            *([ExactDuplicates(quality=None)] if config.dedup.exact else []),
            *instruct_steps(config, captions=False),
        ),
    )
