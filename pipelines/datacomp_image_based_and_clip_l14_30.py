"""DataComp's best baseline: image-based and CLIP L/14 30% together."""

from __future__ import annotations

from filters.threshold import Intersection, clip_verdict
from pairmill.plan import Recipe
from pairmill.sources import download_stage
from pairmill.stage import GlobalVerdict
from pipelines._datacomp import L14, clip_score, near_reference
from schemas.config import RunConfig


def recipe(config: RunConfig) -> Recipe:
    """Keep the pairs that both filters keep, each applied to the whole pool: images in clusters nearest to reference
    images (see `image_based` for the options), and the 30% whose image and text are most similar for CLIP ViT-L/14."""
    top = clip_verdict("top 30%")
    assert isinstance(top, GlobalVerdict)
    both = Intersection("image_based_and_clip", (near_reference(config), top))
    return Recipe(
        "datacomp_image_based_and_clip_l14_30",
        (download_stage(config.download), clip_score(config, L14), both),
    )
