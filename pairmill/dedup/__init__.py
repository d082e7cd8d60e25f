"""Dropping duplicates: what to measure, and who stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pairmill.errors import ConfigError

if TYPE_CHECKING:
    from pairmill.stage import Step
    from schemas.config import Dedup


def steps(config: Dedup) -> tuple[Step, ...]:
    """The steps that drop duplicates: exact ones, then those that look alike. They need ``sha256``, ``pixel_sha256``,
    ``clip_image`` and ``clip_score``; with `max_colour_distance` also ``colour_layout``.

    Raises:
        ConfigError: `semantic` is below `floor`, so that its neighbours would not be stored.
    """
    from pairmill.dedup.exact import ExactDuplicates
    from pairmill.dedup.semantic import SemanticDuplicates, SemanticNeighbours

    exact: tuple[Step, ...] = (ExactDuplicates(),) if config.exact else ()
    if config.semantic is None:
        return exact
    if config.semantic < config.floor:
        raise ConfigError(
            f"dedup.semantic is {config.semantic}, but only neighbours above dedup.floor = {config.floor} are stored; "
            "lower dedup.floor to at most dedup.semantic"
        )
    neighbours = SemanticNeighbours(config.floor, config.neighbours, config.cells, config.probe)
    return (*exact, neighbours, SemanticDuplicates(config.semantic, config.max_colour_distance))
