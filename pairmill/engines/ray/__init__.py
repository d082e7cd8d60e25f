"""The Ray Data engine: CPU groups as tasks, model groups as actor pools, streaming from group to group.

What travels through Ray is the JSON of a `Unit`, a few kilobytes a shard.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

from pairmill.engines.ray import scatter as cells
from pairmill.engines.ray.pools import Need, Pool, Sizing, alive_nodes, slots
from pairmill.engines.ray.session import open_session
from pairmill.engines.ray.watch import Patience, ResizeError, Watch, wait_for_pools
from pairmill.engines.ray.weights import Sender, Shipment
from pairmill.errors import EngineError, PairmillError, StoreError
from pairmill.execute import Job, Unit, Worker
from pairmill.isolate import run_unit
from pairmill.stage import WORKERS_ENV, CellWork
from schemas.config import Engine as EngineConfig

if TYPE_CHECKING:
    import numpy as np
    from ray.data import Dataset
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

WORKER_RETRIES = 3
"""How often a unit is tried again whose worker died. Files are named by their work, so a retry writes nothing twice."""

STREAM_RETRIES = 3
"""How often in a row a stream may break with no unit finished in between."""
STREAM_PAUSE_S = 5.0
"""Before the next one, and longer each time: Ray takes a while to see that a machine is gone."""

IDLE_S = 24 * 3600.0
"""Ray's own guard stops a stream in which nothing moves for so long. A shard may take hours; `Watch` sees to nodes."""

UNITS_A_SLOT = 250
FEWEST_UNITS, MOST_UNITS = 1000, 20_000
"""A stream takes so many units: enough for each worker that its beginning and end (models load, the last units are
waited for) cost little, and few enough for the driver, where a unit costs 14 kB and 1.1 ms before the first one runs
(measured with 2,000 units of 4 kB)."""

log = logging.getLogger(__name__)


@contextlib.contextmanager
def ray_engine(config: EngineConfig) -> Iterator[RayEngine]:
    """An engine on a Ray cluster, see `pairmill.engines.ray.session.open_session`.

    Raises:
        EngineError: Ray is not installed, or the cluster cannot be reached or lacks the code.
    """
    with open_session(config) as (name, own):
        yield RayEngine(config, name, own)


class RayEngine:
    """Streams units through Ray Data."""

    def __init__(self, config: EngineConfig, name: str, own: bool = False) -> None:
        self._config = config
        self._wait_s = 0.0 if own else config.wait_s
        self.name = name
        self.slots = 1
        self._weights = None if own else Sender()

    def run(self, job: Job, units: Iterable[Unit]) -> Iterator[Unit]:
        """See `pairmill.engines.Engine.run`. Units go through one or several streams, one after the other. When a
        stream breaks, since a machine was lost with more than Ray itself tries again, or since the workers no longer
        fit the cluster, the units that are left go into a new one.

        Raises:
            EngineError: the cluster has no room for a group, or workers die again and again.
        """
        has_gpus = any(node.resources.get("GPU") for node in alive_nodes())
        sizing = Sizing(job, self._config.workers, has_gpus, _grows())
        with contextlib.closing(Patience(self._wait_s)) as patience:
            yield from self._streams(sizing, iter(units), patience)

    def _streams(self, sizing: Sizing, source: Iterator[Unit], patience: Patience) -> Iterator[Unit]:
        """One stream after the other, until there are no more units."""
        import ray

        left: dict[int, str] = {}
        breaks = 0
        while True:
            pools, nodes = wait_for_pools(sizing, patience)
            self.slots = slots(pools, nodes)
            room = min(max(UNITS_A_SLOT * self.slots, FEWEST_UNITS), MOST_UNITS) - len(left)
            left |= {unit.shard: unit.dumps() for unit in itertools.islice(source, max(0, room))}
            if not left:
                return
            pools = [pool.for_units(len(left)) for pool in pools]
            try:
                for unit in self._stream(sizing.job, list(left.values()), pools, Watch(sizing, pools, patience)):
                    if left.pop(unit.shard, None) is not None:
                        breaks = 0
                        yield unit
            except ResizeError:
                log.warning("the Ray cluster is of another size; %d shards are left and go on", len(left))
            except ray.exceptions.RayError as error:
                _raise_own(error)
                breaks += 1
                if breaks > STREAM_RETRIES:
                    raise EngineError(
                        f"Ray stopped the run: {type(error).__name__}: {_first_line(error)}; what was committed is "
                        "kept: run the command again"
                    ) from error
                log.warning("Ray lost workers (%s); %d shards are left and go on", type(error).__name__, len(left))
                time.sleep(STREAM_PAUSE_S * breaks)

    def scatter(self, work: CellWork, rows: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """See `pairmill.engines.Engine.scatter`."""
        with contextlib.closing(Patience(self._wait_s)) as patience:
            yield from cells.scatter(work, rows, patience)

    def _stream(self, job: Job, texts: Sequence[str], pools: Sequence[Pool], watch: Watch) -> Iterator[Unit]:
        """Units, as JSON, through one stream of Ray Data."""
        import ray
        from ray.data import DataContext

        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = False
        context.raise_original_map_exception = True
        context.execution_no_progress_timeout_s = IDLE_S
        context.custom_execution_callback_classes = [_Steps]
        wanted = sorted({stage for text in texts for stage in Unit.loads(text).wanted})
        with warnings.catch_warnings():
            # Bounded retries can be said in no other way in Ray 2.60; its default is to retry without end.
            warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
            sent = self._weights.packed(job, wanted) if self._weights else Shipment(job, {})
            stream = ray.data.from_items([{"unit": text} for text in texts], override_num_blocks=len(texts))
            for index, pool in enumerate(pools):
                stream = _add_group(stream, sent, index, pool, wanted)
        _Steps.next = watch
        for batch in stream.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
            for text in batch["unit"]:
                yield Unit.loads(str(text))


class _Steps:
    """What Ray Data calls while it runs a stream. It makes one for each stream, without arguments, so that the watch of
    the next stream stands in the class. An exception that it raises ends the stream and arrives where the units do."""

    next: ClassVar[Watch | None] = None

    def before_execution_starts(self, executor: StreamingExecutor) -> None:  # noqa: ARG002 (Ray Data's interface)
        """Take the watch, so that no other stream finds it."""
        self._watch, _Steps.next = _Steps.next, None

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """Look at the nodes."""
        if self._watch is not None:
            self._watch.step(executor)

    def after_execution_succeeds(self, executor: StreamingExecutor) -> None:
        """Nothing."""

    def after_execution_fails(self, executor: StreamingExecutor, error: Exception) -> None:
        """Nothing."""


def _grows() -> bool:
    """Whether an autoscaler may add nodes to the cluster."""
    from ray.data._internal.cluster_autoscaler.util import is_autoscaling_enabled

    return bool(is_autoscaling_enabled())


def _raise_own(error: Exception) -> None:
    """Raise what the code of a stage raised; return where a worker or a machine was lost."""
    import ray

    if isinstance(error, ray.exceptions.RayTaskError) and not isinstance(error.cause, ray.exceptions.RayError):
        raise error.cause from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")


def _add_group(stream: Dataset, sent: Shipment, index: int, pool: Pool, wanted: Sequence[int]) -> Dataset:
    """One more group on the stream: an actor pool for groups with models, tasks for the others."""
    from ray.data import ActorPoolStrategy

    common: dict[str, Any] = {"batch_size": 1, "batch_format": "numpy", **_remote(pool.need)}
    if pool.least:
        fixed = sent.job.groups[index].resources.workers is not None  # they share limits, so each has to know how many
        return stream.map_batches(
            _GroupActor,
            fn_constructor_args=(sent, index, wanted, pool.most if fixed else None),
            compute=ActorPoolStrategy(min_size=pool.least, max_size=pool.most),
            max_restarts=-1,  # each loss of a machine is one; a unit is still tried again only so often
            max_task_retries=WORKER_RETRIES,
            **common,
        )
    return stream.map_batches(_run_task, fn_kwargs={"sent": sent, "group": index}, max_retries=WORKER_RETRIES, **common)


def _remote(need: Need) -> dict[str, Any]:
    """What a worker occupies, in Ray's words."""
    said: dict[str, Any] = {"num_cpus": need.cpus}
    if need.gpus:
        said["num_gpus"] = need.gpus
    if need.memory:
        said["memory"] = need.memory
    if need.custom:
        said["resources"] = dict(need.custom)
    if need.labels:
        said["label_selector"] = dict(need.labels)
    return said


class _GroupActor:
    """A long-lived worker of one group: keeps its kernels (weights) between units."""

    def __init__(self, sent: Shipment, group: int, wanted: Sequence[int], workers: int | None) -> None:
        if workers is not None:
            os.environ[WORKERS_ENV] = str(workers)
        _see_what_is_booked()
        self._error: PairmillError | None = None
        try:
            self._worker = _worker(sent, group)
        except (
            PairmillError
        ) as error:  # told with the first unit: Ray takes an actor that cannot be made for a lost one
            self._error = error
        else:
            self._worker.warm(wanted)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._error is not None:
            raise self._error
        return _run_batch(self._worker, batch)


_task_workers: dict[tuple[str, int, int], tuple[Job, Worker]] = {}
"""In a process that Ray keeps for tasks: workers of the latest job, so that kernels are opened once."""


def _run_task(batch: dict[str, np.ndarray], sent: Shipment, group: int) -> dict[str, np.ndarray]:
    _see_what_is_booked()
    key = (sent.job.dataset, sent.job.segment, group)
    job, worker = _task_workers.get(key, (None, None))
    if worker is None or job != sent.job:
        worker = _worker(sent, group)
        _task_workers[key] = (sent.job, worker)
    return _run_batch(worker, batch)


def _worker(sent: Shipment, group: int) -> Worker:
    """A worker whose models lie on this node.

    Raises:
        StoreError: they cannot be kept there; the message names the node.
    """
    import ray

    try:
        return Worker(sent.unpacked(group), group)
    except StoreError as error:
        raise StoreError(f"node {ray.util.get_node_ip_address()}: {error}") from error


def _see_what_is_booked() -> None:
    """Hide the GPUs of the machine from a worker that has booked none: a model of ``device: auto`` would take one that
    other workers have. Ray itself hides them only from workers that have some."""
    import ray

    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _run_batch(worker: Worker, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import numpy as np

    return {"unit": np.array([run_unit(worker, Unit.loads(str(text))).dumps() for text in batch["unit"]], dtype=object)}
