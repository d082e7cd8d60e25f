"""The main recipe with another number of rows a kernel call."""

from __future__ import annotations

import dataclasses

from pairmill.plan import Recipe
from pairmill.stage import Stage, Step
from pipelines import clip_filter as main_road
from schemas.config import RunConfig


def clip_filter(config: RunConfig) -> Recipe:
    """`pipelines.clip_filter` with ``options.rows`` rows a kernel call in every stage."""
    rows = config.options["rows"]

    def resized(step: Step) -> Step:
        if not isinstance(step, Stage):
            return step
        return dataclasses.replace(step, resources=dataclasses.replace(step.resources, rows=rows))

    recipe = main_road.recipe(config)
    return Recipe(recipe.name, tuple(resized(step) for step in recipe.steps))
