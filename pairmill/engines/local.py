"""The local engine: in this process, or in a few processes of this machine. For debugging, tests and single
machines."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import pyarrow as pa

from pairmill.engines import in_cells
from pairmill.errors import EngineError
from pairmill.execute import Job, Unit, Worker
from pairmill.isolate import die_with_parent, run_unit
from pairmill.stage import WORKERS_ENV, CellWork
from schemas.config import Engine as EngineConfig

WORKER_RETRIES = 3
"""How many processes may die in a row, with no unit finished in between."""


@contextlib.contextmanager
def local_engine(config: EngineConfig) -> Iterator[LocalEngine]:
    """The local engine; nothing to start."""
    yield LocalEngine(config.workers or 1)


class LocalEngine:
    """Runs units one after the other, or in `workers` processes."""

    name = "local"

    def __init__(self, workers: int = 1) -> None:
        self._workers = workers
        self.slots = workers

    def run(self, job: Job, units: Iterable[Unit]) -> Iterator[Unit]:
        """See `pairmill.engines.Engine.run`."""
        if self._workers == 1:
            workers = _open(job)
            for unit in units:
                for worker in workers[1:]:  # the first is about to open its own
                    worker.warm(unit.wanted)
                yield _run_all(workers, unit)
        else:
            yield from self._run_processes(job, units)

    def scatter(self, work: CellWork, rows: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """In this process; FAISS has threads of its own."""
        return in_cells(work, rows)

    def _run_processes(self, job: Job, units: Iterable[Unit]) -> Iterator[Unit]:
        """A pool of processes. When one dies the pool is made anew, and its unfinished units run again, isolated where
        they were under way (`pairmill.isolate`)."""
        source = iter(units)
        waiting: deque[Unit] = deque()
        deaths = 0
        while True:
            unfinished: dict[Future[Unit], Unit] = {}
            pool = ProcessPoolExecutor(
                self._workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_initialize,
                initargs=(job, self._workers),
            )
            try:
                while True:
                    while len(unfinished) < 2 * self._workers:  # bounded: the units of a large dataset are many
                        if not waiting and (unit := next(source, None)) is not None:
                            waiting.append(unit)
                        if not waiting:
                            break
                        future = pool.submit(_run_in_process, waiting[0])
                        unfinished[future] = waiting.popleft()
                    if not unfinished:
                        return
                    for unit in _finished(unfinished):
                        deaths = 0
                        yield unit
            except BrokenProcessPool as error:
                waiting.extend(unfinished.values())
                deaths += 1
                if deaths > WORKER_RETRIES:
                    raise EngineError(
                        "worker processes die again and again (out of memory, or killed); what was committed is kept: "
                        "run the command again, with fewer engine.workers if memory was short"
                    ) from error
            finally:
                pool.shutdown(cancel_futures=True)


def _finished(unfinished: dict[Future[Unit], Unit]) -> Iterator[Unit]:
    """The units that are done by now; waits for at least one."""
    for future in wait(unfinished, return_when=FIRST_COMPLETED).done:
        unit = future.result()
        del unfinished[future]
        yield unit


def _open(job: Job) -> list[Worker]:
    return [Worker(job, group) for group in range(len(job.groups))]


def _run_all(workers: list[Worker], unit: Unit) -> Unit:
    for worker in workers:
        unit = run_unit(worker, unit)
    return unit


_process_workers: list[Worker] = []
"""In a worker process: its workers, which keep opened kernels from unit to unit."""


def _initialize(job: Job, workers: int) -> None:
    import signal

    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the driver, which stops the pool in order
    os.environ[WORKERS_ENV] = str(workers)
    _process_workers[:] = _open(job)


def _run_in_process(unit: Unit) -> Unit:
    for worker in _process_workers[1:]:
        worker.warm(unit.wanted)
    return _run_all(_process_workers, unit)
