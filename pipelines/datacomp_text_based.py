"""DataComp's text-based filter."""

from __future__ import annotations

from pairmill.plan import Recipe
from pairmill.sources import download_stage
from pipelines._datacomp import text_steps
from schemas.config import RunConfig


def recipe(config: RunConfig) -> Recipe:
    """Keep English texts that name a concept of a list, then download their images. `options.concept_words` is the path
    of the list: one word or phrase a line (the paper takes the ImageNet-21k classes)."""
    return Recipe("datacomp_text_based", (*text_steps(config), download_stage(config.download)))
