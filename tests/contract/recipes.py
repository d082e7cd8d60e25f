"""Recipes with another number of rows a kernel call, and one that holds every model there is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from captioners.blip import Captions
from captioners.boxes.detect import Detections
from captioners.endpoint import EndpointCaptions
from captioners.instruct.offline import OfflineWriter
from captioners.instruct.stage import Instructions
from filters.heads import EmbeddingHead
from filters.itm import ItmScore
from pairmill.plan import Recipe
from pairmill.stage import Batch, Kernel, Resources, Stage, Step
from pipelines import capfilt
from pipelines import clip_filter as main_road
from schemas.config import CaptionerChoice, ItmChoice, ModelChoice, RunConfig


@dataclass(frozen=True)
class Beside(Stage):
    """What another stage measures, under names of its own: so a recipe may hold several stages of a kind."""

    prefix: str
    stage: Stage

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.prefix}_{self.stage.name}"

    @property
    def reads(self) -> tuple[str, ...]:
        return self.stage.reads

    @property
    def writes(self) -> tuple[pa.Field, ...]:
        return tuple(f.with_name(f"{self.prefix}_{f.name}") for f in self.stage.writes)

    @property
    def resources(self) -> Resources:  # type: ignore[override]
        return self.stage.resources

    def parameters(self) -> dict[str, Any]:
        return {"prefix": self.prefix, "kind": type(self.stage).__qualname__, **self.stage.parameters()}

    def open(self) -> Kernel:
        kernel, mine = self.stage.open(), {f.name for f in self.stage.writes}

        def measure(batch: Batch) -> pa.Table:
            output = kernel(batch)
            return output.rename_columns([f"{self.prefix}_{n}" if n in mine else n for n in output.column_names])

        return measure


def clip_filter(config: RunConfig) -> Recipe:
    """`pipelines.clip_filter` with ``options.rows`` rows a kernel call in every stage."""
    return resized(main_road.recipe(config), config.options["rows"])


def everything(config: RunConfig) -> Recipe:
    """`pipelines.capfilt` with ``options.rows`` rows a kernel call; beside its models those of ``options``: captioners,
    an endpoint's captioner, matching models and detectors; and conversations of the offline writer, too."""
    options, models = config.options, config.models

    def having(**changes: Any) -> RunConfig:
        return config.model_copy(update={"models": models.model_copy(update=changes)})

    beside: dict[type[Stage], list[Stage]] = {
        kind: [] for kind in (Captions, ItmScore, EmbeddingHead, Detections, Instructions)
    }
    for name, path in options["captioners"].items():
        beside[Captions].append(Beside(name, Captions.of(having(captioner=CaptionerChoice(path=path)))))
    endpoint = CaptionerChoice(name="some/model", base_url=options["captions_url"])
    # behind all models, so that they stay in one group
    beside[EmbeddingHead].append(Beside("endpoint", EndpointCaptions.of(having(captioner=endpoint))))
    for name, path in options["matchers"].items():
        beside[ItmScore].append(Beside(name, ItmScore.of(having(itm=ItmChoice(path=path)).models, captions=True)))
    for name, path in options["detectors"].items():
        beside[Detections].append(Beside(name, Detections.of(having(detector=ModelChoice(path=path)), captions=True)))
    recipe = capfilt.recipe(config)
    paid = next(step for step in recipe.steps if isinstance(step, Instructions))
    offline = OfflineWriter.of(config)
    beside[Instructions].append(
        Beside("offline", dataclasses.replace(paid, writer=offline, resources=offline.resources))
    )
    steps = [part for step in recipe.steps for part in (step, *beside.get(type(step), ()))]  # type: ignore[call-overload]
    return resized(Recipe("everything", tuple(steps)), options["rows"])


def resized(recipe: Recipe, rows: int) -> Recipe:
    """The recipe with so many rows a kernel call in every stage."""
    return Recipe(recipe.name, tuple(_resized(step, rows) for step in recipe.steps))


def _resized(step: Step, rows: int) -> Step:
    if isinstance(step, Beside):
        return dataclasses.replace(step, stage=_resized(step.stage, rows))  # type: ignore[arg-type]
    if not isinstance(step, Stage):
        return step
    return dataclasses.replace(step, resources=dataclasses.replace(step.resources, rows=rows))  # type: ignore[type-var]
