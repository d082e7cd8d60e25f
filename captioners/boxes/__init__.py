"""Where boxes come from: the source, an open-vocabulary detector, and masks of them by SAM."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pairmill.stage import Step
    from schemas.config import RunConfig


def box_steps(config: RunConfig, captions: bool) -> tuple[Step, ...]:
    """The stages that write boxes, in order: ``regions``.

    Args:
        config: of the run.
        captions: whether the recipe writes captions, whose nouns a detector then looks for, too.
    """
    from captioners.boxes.regions import Regions

    del captions
    return (Regions.of(config),)
