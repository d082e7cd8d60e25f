"""Steps for tests of Beam: those of `tests.steps`, and a global stage whose work falls into cells."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pairmill.errors import EngineError
from pairmill.plan import Recipe
from pairmill.stage import Batch, GlobalStage, Kernel, Scatter
from schemas import fields
from schemas.config import RunConfig
from tests import steps
from tests.engines.failing_steps import OnDevice

PART = 17
"""Rows a table that is scattered: each cell lies in several."""


@dataclass(frozen=True)
class RankInCells(GlobalStage):
    """Writes `contrast`: how many live rows with as many words have fewer chars."""

    name = "rank_in_cells"
    reads = ("words", "chars")
    writes = (fields.CONTRAST,)

    def measure(self, live: pa.Table, todo: pa.BooleanArray, scatter: Scatter) -> pa.Table:
        rows = pa.table(
            {"cell": live["words"].cast(pa.int64()), "row": pa.array(range(len(live))), "chars": live["chars"]}
        )
        answers = pa.concat_tables(scatter(rank, _parts(rows))).sort_by("row")
        assert answers["row"].to_pylist() == list(range(len(live))), "each row once"
        return answers.select(["contrast"]).filter(todo)


def _parts(rows: pa.Table) -> Iterator[pa.Table]:
    for start in range(0, len(rows), PART):
        yield rows.slice(start, PART)


def rank(rows: pa.Table) -> pa.Table:
    """The work of a cell."""
    assert len(pc.unique(rows["cell"])) == 1
    chars = rows["chars"].to_pylist()
    ranks = [float(sum(c < mine for c in chars)) for mine in chars]
    return pa.table({"row": rows["row"], "contrast": pa.array(ranks, pa.float32())})


@dataclass(frozen=True)
class Alone(steps.CountChars):
    """As `CountChars`, slowly; writes down that it was opened, and fails when two threads call it at once."""

    log: str = field(default="", compare=False, metadata={"identity": False})

    def open(self) -> Kernel:
        with open(self.log, "a", encoding="utf-8") as file:
            file.write("opened\n")
        count, turn = super().open(), threading.Lock()

        def alone(batch: Batch) -> pa.Table:
            if not turn.acquire(blocking=False):
                raise EngineError("two threads at once")
            time.sleep(0.15)
            output = count(batch)
            turn.release()
            return output

        return alone


@dataclass(frozen=True)
class OpenedOnDevice(OnDevice):
    """As `OnDevice`; writes down that it was opened."""

    openings: str = field(default="", compare=False, metadata={"identity": False})

    def open(self) -> Kernel:
        with open(self.openings, "a", encoding="utf-8") as file:
            file.write("opened\n")
        return super().open()


LOADED = threading.Event()


@dataclass(frozen=True)
class Loads(steps.CountWords):
    """Loads until `LOADED`."""

    def open(self) -> Kernel:
        LOADED.wait()
        return super().open()


def recipe(config: RunConfig) -> Recipe:
    """words, at least N, chars, no repeated text, rank in cells."""
    return Recipe("beam_steps", (*steps.recipe(config).steps[:-1], RankInCells()))
