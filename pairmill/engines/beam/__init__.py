"""The Beam engine: the same segments and cells as Apache Beam pipelines, on whatever runner the options name.

The driver plans, commits and publishes as with every engine. A pipeline is one segment of map stages, or one piece of
work in cells; what it makes comes back through an `Outbox` while it runs.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pairmill.engines import import_path
from pairmill.engines.beam.harness import job_servers, mended, silent, silent_threads, told
from pairmill.engines.beam.outbox import ERROR, Outbox, clear, raise_error
from pairmill.errors import ConfigError, EngineError, StoreError
from pairmill.execute import Job, Unit
from pairmill.stage import CellWork
from pairmill.store import Dataset
from schemas.config import Engine as EngineConfig

if TYPE_CHECKING:
    from apache_beam import Pipeline

    from pairmill.engines.beam.options import Runner

WORKER_RETRIES = 3
"""How many pipelines in a row may lose a worker process on this machine, with no result in between."""

STOP_S = 5.0
"""How long a pipeline that nobody waits for any longer has to end, before the driver goes on without it."""

CANCEL_S = 20.0
"""How long a runner has to take the order to cancel it."""

_LOOK_S = 0.1
_LOOK_REMOTE_S = 1.0
"""How often the driver looks for results, on a disk and in an object store."""

log = logging.getLogger(__name__)


@contextlib.contextmanager
def beam_engine(config: EngineConfig, dataset: str | None) -> Iterator[BeamEngine]:
    """The engine with the runner that ``engine.pipeline_options`` name.

    Raises:
        ConfigError: a wrong option.
        EngineError: Beam, or what the runner needs, is not installed.
    """
    if dataset is None:
        raise ConfigError("engine.kind beam needs the URL of a dataset, through which driver and workers speak")
    store = Dataset(dataset)
    clear(store.url)
    with (
        _quiet(),
        import_path(),
        _options().chosen_runner(config.pipeline_options, config.workers, store.local) as runner,
        silent_threads(),
        job_servers(),
    ):
        try:
            yield BeamEngine(runner, store.url)
        finally:
            with contextlib.suppress(StoreError):  # then the next run clears up
                clear(store.url)


def check_options(flags: Sequence[str]) -> None:
    """Find out what is wrong with pipeline options before anything else is done.

    Raises:
        ConfigError: a wrong option.
        EngineError: Beam, or what the runner needs, is not installed.
    """
    with _quiet():
        _options().checked(flags)


def _options() -> Any:
    """The module that imports Beam."""
    try:
        from pairmill.engines.beam import options
    except ImportError as error:
        raise EngineError(
            "engine.kind is beam, but Apache Beam is not installed; pip install apache-beam, or run with "
            "--set engine.kind=local"
        ) from error
    return options


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What Beam would log reaches us as an exception."""
    root = logging.getLogger()
    root.addFilter(told)
    try:
        with silent("apache_beam"):
            yield
    finally:
        root.removeFilter(told)


class BeamEngine:
    """Runs pipelines, one after the other."""

    def __init__(self, runner: Runner, dataset: str) -> None:
        self.name = f"beam ({runner.name})"
        self.slots = runner.slots
        self.result: Any = None
        """Beam's `PipelineResult` of the latest pipeline that ended, with its metrics."""
        self._runner = runner
        self._dataset = dataset
        self._look_s = _LOOK_S if Dataset(dataset).local else _LOOK_REMOTE_S

    def run(self, job: Job, units: Iterable[Unit]) -> Iterator[Unit]:
        """See `pairmill.engines.Engine.run`. Where a worker process of this machine died, the units that are left go
        into a new pipeline."""
        from pairmill.engines.beam.transforms import dismiss, unit_result, units_pipeline

        wanted = {unit_result(unit): unit for unit in units}
        with self._outbox() as outbox:
            try:

                def pipeline(left: Collection[str]) -> Pipeline:
                    todo = [unit for name, unit in wanted.items() if name in left]
                    return units_pipeline(self._runner, job, todo, outbox)

                for data in self._results(outbox, wanted, pipeline):
                    yield Unit.loads(data.decode())
            finally:
                dismiss(outbox)

    def scatter(self, work: CellWork, rows: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """See `pairmill.engines.Engine.scatter`. The rows lie in the outbox; what is grouped by cell is where they
        lie."""
        from pairmill.engines.beam.transforms import cell_result, cells_pipeline, read_answer, write_rows

        with self._outbox() as outbox:
            places = write_rows(outbox, rows)
            cells = {cell_result(cell): cell for cell in places}

            def pipeline(left: Collection[str]) -> Pipeline:
                todo = {cell: places[cell] for name, cell in cells.items() if name in left}
                return cells_pipeline(self._runner, work, todo, outbox)

            yield from map(read_answer, self._results(outbox, cells, pipeline))

    @contextlib.contextmanager
    def _outbox(self) -> Iterator[Outbox]:
        outbox = Outbox.make(self._dataset)
        try:
            yield outbox
        finally:
            with contextlib.suppress(StoreError):  # then the next run clears up
                outbox.remove()

    def _results(
        self, outbox: Outbox, wanted: Iterable[str], make: Callable[[Collection[str]], Pipeline]
    ) -> Iterator[bytes]:
        """What pipelines write, each result once. `make` builds one that makes the results that are left.

        Raises:
            EngineError: the runner gave up, or workers die again and again.
            Exception: what a worker met in the place of a result, see `pairmill.engines.beam.outbox.raise_error`.
        """
        left = set(wanted)
        deaths = 0
        while left:
            try:
                for name, data in self._once(outbox, make(frozenset(left))):
                    if (failed := name.removesuffix(ERROR)) != name and failed in left:
                        raise_error(data)
                    if name in left:
                        left.remove(name)
                        deaths = 0
                        yield data
            except _WorkerLost as error:
                deaths += 1
                if deaths > WORKER_RETRIES:
                    raise EngineError(
                        "Beam's worker processes die again and again (out of memory, or killed; --debug shows what "
                        "they say); what was committed is kept: run the command again, with fewer workers if memory "
                        "was short"
                    ) from error
                log.warning("a worker process of Beam died; %d results are to come yet", len(left))
            else:
                if left:
                    raise EngineError(
                        f"{self.name} ended, but {len(left)} results are missing (of {min(left)}, for one): do all "
                        "workers reach the dataset by the same URL? What was committed is kept"
                    )

    def _once(self, outbox: Outbox, pipeline: Pipeline) -> Iterator[tuple[str, bytes]]:
        """Run one pipeline, and yield what it writes while it runs."""
        with mended() as lost:
            run = _Run(pipeline)
            try:
                while True:
                    over = run.over  # asked before, so that what was written up to the end is seen
                    yield from outbox.take()
                    if over:
                        break
                    run.wait(self._look_s)
            finally:
                if not run.over:
                    outbox.shut()
                    run.stop()
                run.close(outbox)
            self.result = run.result
            if run.error is not None and lost.is_set():
                raise _WorkerLost from run.error
            run.check(self.name)


class _WorkerLost(Exception):
    """A worker process of this machine died; what it worked on is marked (`pairmill.isolate`)."""


class _Run:
    """A pipeline that runs in a thread of its own: some runners return at its end only."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._pipeline = pipeline
        self._state = ""
        self._ended = threading.Event()  # Python 3.11 takes a thread for dead whose join was interrupted by Ctrl-C
        threading.Thread(target=self._run, name="pairmill-beam", daemon=True).start()

    def _run(self) -> None:
        try:
            self.result = self._pipeline.run()
            self._state = str(self.result.wait_until_finish())
        except BaseException as error:  # noqa: BLE001 (told by `check`)
            self.error = error
        finally:
            self._ended.set()

    @property
    def over(self) -> bool:
        """Whether it has ended, well or not."""
        return self._ended.is_set()

    def wait(self, seconds: float) -> None:
        """Wait for its end, for a while."""
        self._ended.wait(seconds)

    def stop(self) -> None:
        """Cancel it, where the runner can; its workers see by the outbox that they are to stop."""
        if self.result is not None:
            asked = threading.Event()

            def cancel() -> None:  # beside, since a cluster that does not answer is waited for without end
                with contextlib.suppress(Exception):
                    self.result.cancel()
                asked.set()

            threading.Thread(target=cancel, name="pairmill-beam-cancel", daemon=True).start()
            asked.wait(CANCEL_S)
        self.wait(STOP_S)

    def close(self, outbox: Outbox) -> None:
        """Close the connection that Dask's result holds. Its workers may live on, but not what the pipeline loaded."""
        from pairmill.engines.beam.transforms import dismiss

        client = getattr(self.result, "client", None)
        if client is not None:
            if self.over:
                with contextlib.suppress(Exception):  # else when the next pipeline comes to them
                    client.run(dismiss, outbox, on_error="ignore")
            client.close()

    def check(self, name: str) -> None:
        """Raise `EngineError` unless it ended well."""
        if self.error is None and self._state == "DONE":
            return
        what = f"the pipeline is {self._state}" if self.error is None else _said(self.error)
        raise EngineError(
            f"{name} stopped the run: {what}; what was committed is kept: run the command again"
        ) from self.error


def _said(error: BaseException) -> str:
    """What a runner says that gave up, on one line."""
    import grpc  # type: ignore[import-untyped]

    if isinstance(error, grpc.FutureTimeoutError):
        return "the job server does not answer; is it up, and its address right?"
    if isinstance(error, grpc.RpcError) and isinstance(error, grpc.Call):  # as text it has many lines, and no end
        return f"{error.code().name}: {' '.join(str(error.details()).split())}"
    said = [line for line in str(error).splitlines() if line.strip()][-1:]
    if not isinstance(error, RuntimeError) or not said:  # which repeats what a worker told, with its type
        said.insert(0, type(error).__name__)
    return ": ".join(said)
