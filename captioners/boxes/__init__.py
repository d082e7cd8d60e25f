"""Where boxes come from: the source, an open-vocabulary detector, and masks of them by SAM."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pairmill.stage import Step
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

    steps: list[Step] = [Regions.of(config)]
    if config.models.detector is not None:
        from captioners.boxes.detect import Detections

        steps.append(Detections.of(config, captions))
    if config.models.segmenter is not None:
        from captioners.boxes.masks import Masks

        steps.append(Masks.of(config))
    return tuple(steps)
