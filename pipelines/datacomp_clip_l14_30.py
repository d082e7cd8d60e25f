"""DataComp's CLIP filter, L/14, 30%."""

from __future__ import annotations

from pairmill.plan import Recipe
from pipelines._datacomp import L14, clip_recipe
from schemas.config import RunConfig


def recipe(config: RunConfig) -> Recipe:
    """Keep the 30% of the pairs whose image and text are most similar for OpenAI's CLIP ViT-L/14."""
    return clip_recipe("datacomp_clip_l14_30", config, L14, "top 30%")
