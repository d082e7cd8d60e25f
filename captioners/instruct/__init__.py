"""Instruction data: conversations about images, written from texts and boxes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pairmill.stage import Step
    from schemas.config import RunConfig


def instruct_steps(config: RunConfig, *, captions: bool) -> tuple[Step, ...]:
    """The boxes and the conversations that a config asks for: none without ``instruct.kinds``.

    Args:
        config: Its sections boxes and instruct, and models.detector and models.segmenter.
        captions: Whether the recipe writes captions and chooses among texts.

    Raises:
        ConfigError: the sections do not fit together.
    """
    if not config.instruct.kinds:
        return ()
    from captioners.boxes import box_steps
    from captioners.instruct.stage import Instructions

    return (*box_steps(config, captions=captions), Instructions.of(config, captions=captions))
