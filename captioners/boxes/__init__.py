"""Where boxes come from: the source, an open-vocabulary detector, and masks of them by SAM."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pairmill.stage import Stage, Step
    from schemas.config import RunConfig


def box_steps(config: RunConfig, captions: bool) -> tuple[Step, ...]:
    """The stages that write boxes, in order: ``regions``, those of the source; ``detections`` where ``models.detector``
    names one; ``masks`` of both where ``models.segmenter`` names one. They stand behind the download, the verdicts that
    drop images and, if there is one, the captioner.

    Args:
        config: of the run.
        captions: whether the recipe writes captions, whose nouns a detector then looks for, too.

    Raises:
        ConfigError: a model is asked for in a way that no checkpoint is.
    """
    from captioners.boxes.regions import Regions

    models: list[Stage] = []
    if config.models.detector is not None:
        from captioners.boxes.detect import Detections

        models.append(Detections.of(config, captions))
    if config.models.segmenter is not None:
        from captioners.boxes.masks import Masks

        models.append(Masks.of(config))
    regions = Regions.of(config)
    # One worker for all that stand together: a group of its own would part the models before it from those behind it,
    # and each group of models wants a GPU.
    return (replace(regions, resources=models[0].resources) if models else regions, *models)
