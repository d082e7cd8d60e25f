"""The recipe and the plan."""

from __future__ import annotations

from dataclasses import dataclass

from pairmill.stage import Step


@dataclass(frozen=True)
class Recipe:
    """The steps a pair goes through, in order: stages, verdicts, global stages and global verdicts."""

    name: str
    steps: tuple[Step, ...]
