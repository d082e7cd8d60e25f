"""The shortest recipe with boxes: download, then all of `box_steps`."""

from __future__ import annotations

from captioners.boxes import box_steps
from pairmill.plan import Recipe
from pairmill.sources import download_stage
from schemas.config import RunConfig


def recipe(config: RunConfig) -> Recipe:
    return Recipe("boxes", (download_stage(config.download), *box_steps(config, captions=False)))
