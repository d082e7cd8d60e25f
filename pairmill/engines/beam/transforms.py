"""The DoFns: units through the groups of a segment, and rows through work in cells.

It imports Apache Beam at its top, so that workers find the DoFns by their names; it is itself imported inside
functions.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import apache_beam as beam
import pyarrow as pa
from apache_beam.metrics import Metrics

from pairmill.engines import cells_of
from pairmill.engines.beam.options import Runner
from pairmill.engines.beam.outbox import Outbox, Place
from pairmill.execute import Job, Unit, Worker
from pairmill.isolate import run_unit
from pairmill.stage import CELL, WORKERS_ENV, CellWork, Resources

METRICS = "pairmill"
"""Namespace of the counters ``rows/STAGE``, ``errors/STAGE`` and ``dropped/REASON`` and of the distributions
``milliseconds/STAGE``: the time in a stage's kernel, one value a unit."""

INDEX_ROWS = 1000
"""Lines of the index of cells that are read at a time."""

Number = TypeVar("Number", int, float)


# -- map segments -----------------------------------------------------------------------------------------------------


def unit_result(unit: Unit) -> str:
    """The name of a unit's result in the outbox."""
    return f"{unit.shard}.json"


class ReadUnit(beam.DoFn):
    """From where a unit lies to the unit, as JSON."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    def process(self, place: Place) -> Iterator[str]:
        """Read one unit."""
        if self._outbox.is_open():
            yield self._outbox.read_part(place).decode()


class RunGroup(beam.DoFn):
    """Runs one group of a job over units. What the last group finishes, and what failed, goes into the outbox."""

    def __init__(self, job: Job, group: int, wanted: Sequence[int], outbox: Outbox, processes: int) -> None:
        self._job = job
        self._group = group
        self._wanted = tuple(wanted)
        self._outbox = outbox
        self._processes = processes
        self._last = group == len(job.groups) - 1

    def setup(self) -> None:
        """Begin to load what the group needs, unless another DoFn of this process has done so."""
        _prepare(self._processes)
        if self._outbox.is_open():
            self._crew()

    def process(self, text: str) -> Iterator[str]:
        """Run the group over one unit."""
        if not self._outbox.is_open():
            return
        unit = Unit.loads(text)
        try:
            with self._crew().worker() as worker:
                done = run_unit(worker, unit)
        except Exception as error:  # noqa: BLE001 (the driver raises it)
            self._outbox.put_error(unit_result(unit), error)
            return
        _count(unit, done)
        if self._last or done.failure is not None:
            self._outbox.put(unit_result(done), done.dumps().encode())
        else:
            yield done.dumps()

    def _crew(self) -> _Crew:
        return _crew(self._outbox, self._job, self._group, self._wanted)


class _Crew:
    """The workers of a group in this process. A group with models has one, which all threads take in turn: weights are
    loaded once a process. Other groups get a worker a thread."""

    def __init__(self, job: Job, group: int, wanted: Sequence[int]) -> None:
        self._job = job
        self._group = group
        self._wanted = wanted
        self._turn = threading.Lock() if job.groups[group].resources.actor else contextlib.nullcontext()
        self._idle = [self._new()]

    def _new(self) -> Worker:
        worker = Worker(self._job, self._group)
        worker.warm(self._wanted)
        return worker

    @contextlib.contextmanager
    def worker(self) -> Iterator[Worker]:
        """A worker that nobody else uses meanwhile."""
        with self._turn:
            try:
                worker = self._idle.pop()
            except IndexError:
                worker = self._new()
            try:
                yield worker
            finally:
                self._idle.append(worker)


_crews: dict[Outbox, dict[int, _Crew]] = {}
"""In a worker process: by pipeline and group, the crews. They outlive the DoFns, which runners make and throw away as
they like, and end with the pipeline: what they have read of the dataset would not be true of the next."""
_hiring = threading.Lock()


def _crew(outbox: Outbox, job: Job, group: int, wanted: Sequence[int]) -> _Crew:
    with _hiring:
        if outbox not in _crews:
            for other in [other for other in _crews if not _waited_for(other)]:
                _dismiss(other)
        crews = _crews.setdefault(outbox, {})
        if group not in crews:
            crews[group] = _Crew(job, group, wanted)
        return crews[group]


def _waited_for(outbox: Outbox) -> bool:
    with contextlib.suppress(Exception):  # another run's dataset, and no affair of this one
        return outbox.is_open()
    return False


def dismiss(outbox: Outbox) -> None:
    """Let go of what a pipeline has loaded in this process."""
    with _hiring:
        _dismiss(outbox)


def _dismiss(outbox: Outbox) -> None:
    """What is still being loaded is not waited for, as `Worker.release` does: Ctrl-C would wait for it."""
    if _crews.pop(outbox, None):
        gc.collect()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()


def _prepare(processes: int) -> None:
    """Get a worker process ready."""
    if processes > 1:
        os.environ[WORKERS_ENV] = str(processes)
    process: Any = multiprocessing.current_process()
    if process.daemon:  # as Dask's are, and then they may have no children, which `pairmill.isolate` needs
        process._config["daemon"] = False


def _count(before: Unit, after: Unit) -> None:
    """What a group did to a unit, as metrics."""
    for stage, rows in _more(before.computed, after.computed):
        Metrics.counter(METRICS, f"rows/{stage}").inc(rows)
    for reason, rows in _more(before.dropped, after.dropped):
        Metrics.counter(METRICS, f"dropped/{reason}").inc(rows)
    for stage, seconds in _more(before.seconds, after.seconds):
        Metrics.distribution(METRICS, f"milliseconds/{stage}").update(round(1000 * seconds))
    for stage, (_, errors, _) in after.errors.items():
        if stage not in before.errors:
            Metrics.counter(METRICS, f"errors/{stage}").inc(errors)


def _more(before: Mapping[str, Number], after: Mapping[str, Number]) -> Iterator[tuple[str, Number]]:
    for name, value in after.items():
        if value != before.get(name, 0):
            yield name, value - before.get(name, 0)


# -- cells ------------------------------------------------------------------------------------------------------------


def write_rows(outbox: Outbox, tables: Iterable[pa.Table]) -> dict[int, list[Place]]:
    """Write tables, one after the other, the rows of each cell together; returns where the rows of each cell lie."""
    cells: list[int] = []

    def parts() -> Iterator[bytes]:
        for table in tables:
            for rows in cells_of([table]):
                cells.append(rows.column(CELL)[0].as_py())
                yield _table_bytes(rows)

    where: dict[int, list[Place]] = {}
    for place, cell in zip(outbox.put_parts("rows", parts()), cells, strict=True):
        where.setdefault(cell, []).append(place)
    return where


def cell_result(cell: int) -> str:
    """The name of a cell's answer in the outbox."""
    return f"{cell}.arrow"


class ReadIndex(beam.DoFn):
    """From where a part of the index lies to cells, each with where rows of it lie."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    def process(self, part: Place) -> Iterator[tuple[int, Place]]:
        """Read a part of the index."""
        if self._outbox.is_open():
            index = json.loads(self._outbox.read_part(part))
            yield from ((cell, (file, start, end)) for cell, (file, start, end) in index)


class WorkOnCell(beam.DoFn):
    """Does the work of one cell; the answer goes into the outbox."""

    def __init__(self, work: CellWork, outbox: Outbox, processes: int) -> None:
        self._work = work
        self._outbox = outbox
        self._processes = processes

    def setup(self) -> None:
        """Get the process ready."""
        _prepare(self._processes)

    def process(self, grouped: tuple[int, Iterable[Place]]) -> None:
        """Work on one cell."""
        cell, places = grouped
        if self._outbox.is_open():
            try:
                parts = [_read_table(self._outbox.read_part(place)) for place in sorted(places)]
                answer = _table_bytes(self._work(pa.concat_tables(parts)))
            except Exception as error:  # noqa: BLE001 (the driver raises it)
                self._outbox.put_error(cell_result(cell), error)
            else:
                self._outbox.put(cell_result(cell), answer)


def read_answer(data: bytes) -> pa.Table:
    """An answer of `WorkOnCell`, as it lies in the outbox."""
    return _read_table(data)


def _table_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _read_table(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


# -- pipelines --------------------------------------------------------------------------------------------------------


def units_pipeline(runner: Runner, job: Job, units: Sequence[Unit], outbox: Outbox) -> beam.Pipeline:
    """All groups of a job's segment over some units. What moves from group to group is the JSON of a unit."""
    wanted = sorted({stage for unit in units for stage in unit.wanted})
    places = outbox.put_parts(f"units-{len(units)}", (unit.dumps().encode() for unit in units))
    pipeline = beam.Pipeline(options=runner.options)
    stream = pipeline | "units" >> beam.Create(places) | "read" >> beam.ParDo(ReadUnit(outbox)).with_output_types(str)
    for index, group in enumerate(job.groups):
        if index:
            stream |= f"spread {index}" >> beam.Reshuffle()
        step = beam.ParDo(RunGroup(job, index, wanted, outbox, runner.processes)).with_output_types(str)
        stream |= f"{index} {group.title}" >> step.with_resource_hints(**hints(group.resources, runner.accelerator))
    return pipeline


def cells_pipeline(runner: Runner, work: CellWork, rows: Mapping[int, list[Place]], outbox: Outbox) -> beam.Pipeline:
    """Work in cells: a GroupByKey of where the rows of each cell lie, as `write_rows` says it."""
    index = [(cell, place) for cell, places in rows.items() for place in places]
    size = min(INDEX_ROWS, -(-len(index) // (4 * runner.slots)))  # Dask makes as many groups of cells as it has parts
    parts = (json.dumps(index[start : start + size]).encode() for start in range(0, len(index), size))
    places = outbox.put_parts(f"index-{len(rows)}", parts)
    pipeline = beam.Pipeline(options=runner.options)
    work_on = beam.ParDo(WorkOnCell(work, outbox, runner.processes))
    resources = getattr(work, "resources", Resources())
    _ = (
        pipeline
        | "index" >> beam.Create(places)
        | "cells" >> beam.ParDo(ReadIndex(outbox)).with_output_types(tuple[int, Place])
        | "by cell" >> beam.GroupByKey()
        | "work" >> work_on.with_resource_hints(**hints(resources, runner.accelerator))
    )
    return pipeline


def hints(resources: Resources, accelerator: str | None) -> dict[str, str]:
    """What a runner that heeds resource hints (Dataflow) is told about a group's workers."""
    said = {}
    if resources.memory:
        said["min_ram"] = f"{resources.memory}B"
    if accelerator and (resources.gpus or resources.gpu_if_any):
        said["accelerator"] = accelerator
    return said
