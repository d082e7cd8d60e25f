"""Write texts, and choose among the texts of a pair."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pairmill.stage import Stage
    from schemas.config import RunConfig


def caption_stage(config: RunConfig) -> Stage:
    """The captioner that ``models.captioner`` names: an OpenAI-compatible endpoint where it has a ``base_url``, else a
    BLIP-like model on this machine. Either reads ``image`` and writes ``captions``.

    Raises:
        ConfigError: the choice does not fit the section ``caption``.
    """
    if config.models.captioner.base_url is not None:
        from captioners.endpoint import EndpointCaptions

        return EndpointCaptions.of(config)
    from captioners.blip import Captions

    return Captions.of(config)
