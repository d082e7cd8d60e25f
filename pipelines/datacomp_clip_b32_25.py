"""DataComp's CLIP filter, B/32, threshold 0.25."""

from __future__ import annotations

from pairmill.plan import Recipe
from pipelines._datacomp import B32, clip_recipe
from schemas.config import RunConfig


def recipe(config: RunConfig) -> Recipe:
    """Keep pairs whose similarity for OpenAI's CLIP ViT-B/32 is at least 0.25."""
    return clip_recipe("datacomp_clip_b32_25", config, B32, ">= 0.25")
