"""Engines run the map segments of a plan and nothing else: units go in, finished units come out, in any order.

An engine moves shard references, never pixels. Workers read from the store, write their own files and return the
description; the driver commits. An error in a unit travels back in `Unit.failure`, so that every engine reports it
alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from pairmill.execute import Job, Unit
from schemas.config import Engine as EngineConfig


class Engine(Protocol):
    """Runs a segment. Used as a context manager by `open_engine`."""

    name: str

    def run(self, job: Job, units: Iterable[Unit]) -> Iterator[Unit]:
        """Bring every unit through all groups of the job's segment; yields each as it finishes."""


def open_engine(config: EngineConfig) -> AbstractContextManager[Engine]:
    """The engine that the config names, started; leaving the context stops what it started.

    Raises:
        EngineError: it is not installed, or the cluster is too small for the plan.
    """
    if config.kind == "local":
        from pairmill.engines.local import local_engine

        return local_engine(config)
    from pairmill.engines.ray_data import ray_engine

    return ray_engine(config)
