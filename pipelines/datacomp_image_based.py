"""DataComp's image-based filter."""

from __future__ import annotations

from pairmill.plan import Recipe
from pairmill.sources import download_stage
from pipelines._datacomp import L14, clip_score, near_reference
from schemas.config import RunConfig


def recipe(config: RunConfig) -> Recipe:
    """Embed all images with OpenAI's CLIP ViT-L/14, cluster them, and keep the clusters that are nearest to some
    reference image. `options.concept_images` is the path of the reference embeddings, .npy or .parquet (the paper takes
    ImageNet's training images); `options.cells` is the number of clusters (the paper's is 100,000)."""
    return Recipe(
        "datacomp_image_based",
        (download_stage(config.download), clip_score(config, L14), near_reference(config)),
    )
