"""Engines run the map segments of a plan and nothing else: units go in, finished units come out, in any order.

An engine moves shard references, never pixels. Workers read from the store, write their own files and return the
description; the driver commits. An error in a unit travels back in `Unit.failure`, so that every engine reports it
alike.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import pyarrow as pa

from pairmill.execute import Job, Unit
from pairmill.stage import CELL, CellWork, has_whole_cells
from schemas.config import Engine as EngineConfig


class Engine(Protocol):
    """Runs a segment. Used as a context manager by `open_engine`."""

    name: str

    slots: int
    """Workers that can be busy at a time, all groups together: what `pairmill.run.Spent` divides by. Known once `run`
    has begun."""

    def run(self, job: Job, units: Iterable[Unit]) -> Iterator[Unit]:
        """Bring every unit through all groups of the job's segment; yields each as it finishes."""

    def scatter(self, work: CellWork, rows: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """See `pairmill.stage.Scatter`. Work that fails raises here; a worker that dies is tried again.

        Raises:
            EngineError: workers die again and again.
        """


def in_cells(work: CellWork, rows: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """`Engine.scatter` in this process, one cell after the other."""
    return map(work, cells_of(rows))


def cells_of(rows: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The rows as one table a cell. Tables that say that they have whole cells (`pairmill.stage.whole_cells`) are taken
    as they are needed; the rows of others are held in memory."""
    held = []
    for table in rows:
        if has_whole_cells(table):
            yield from _by_cell(table)
        else:
            held.append(table)
    if held:
        yield from _by_cell(pa.concat_tables(held))


def _by_cell(table: pa.Table) -> Iterator[pa.Table]:
    cells = table.column(CELL).to_numpy()
    if np.any(cells[1:] < cells[:-1]):
        order = np.argsort(cells, kind="stable")
        table, cells = table.take(order), cells[order]
    _, starts = np.unique(cells, return_index=True)
    for start, end in itertools.pairwise([*starts, table.num_rows]):
        yield table.slice(start, end - start)


def open_engine(config: EngineConfig, dataset: str | None = None) -> AbstractContextManager[Engine]:
    """The engine that the config names, started; leaving the context stops what it started. `dataset`: its URL, which
    Beam needs.

    Raises:
        EngineError: it is not installed, or the cluster is too small for the plan.
    """
    if config.kind == "local":
        from pairmill.engines.local import local_engine

        return local_engine(config)
    if config.kind == "beam":
        from pairmill.engines.beam import beam_engine

        return beam_engine(config, dataset)
    from pairmill.engines.ray import ray_engine

    return ray_engine(config)


def check_engine(config: EngineConfig) -> None:
    """Find out what is wrong with the config of an engine before anything is read.

    Raises:
        ConfigError: a pipeline option that Beam does not know.
        EngineError: Beam, or what its runner needs, is not installed.
    """
    if config.kind == "beam":
        from pairmill.engines.beam import check_options

        check_options(config.pipeline_options)


@contextlib.contextmanager
def import_path() -> Iterator[None]:
    """Worker processes that are started on this machine meanwhile import what the driver can import."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(p) for p in sys.path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
