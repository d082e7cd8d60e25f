"""The Ray Data engine: CPU groups as tasks, model groups as actor pools, streaming from group to group.

What travels through Ray is the JSON of a `Unit`, a few kilobytes a shard.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pairmill.engines import in_cells
from pairmill.engines.ray_weights import Sender, Shipment
from pairmill.errors import EngineError
from pairmill.execute import Job, Unit, Worker
from pairmill.isolate import run_unit
from pairmill.stage import WORKERS_ENV, CellWork
from schemas.config import Engine as EngineConfig

if TYPE_CHECKING:
    import numpy as np
    from ray.data import Dataset

LOCAL_ADDRESS = "127.0.0.2"
"""Keeps a cluster of our own on loopback; Ray rewrites 127.0.0.1 to the host's address, but not this one."""

STARTED_HERE = "ray, started here"
"""How the name of an engine begins whose cluster is this machine alone."""

WORKER_RETRIES = 3
"""How often a unit is tried again whose worker died. Files are named by their work, so a retry writes nothing twice."""

STREAM_RETRIES = 3
"""How often in a row a stream may break with no unit finished in between."""
STREAM_PAUSE_S = 5.0
"""Before the next one, and longer each time: Ray takes a while to see that a machine is gone."""

log = logging.getLogger(__name__)


@contextlib.contextmanager
def ray_engine(config: EngineConfig) -> Iterator[RayEngine]:
    """Join the cluster that the config or RAY_ADDRESS names, or one that runs here; else start one on this machine.

    Raises:
        EngineError: Ray is not installed, or the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read by ray.init; pairmill never calls home
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what its core would log reaches us as an exception
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise EngineError(
            "engine.kind is ray, but Ray is not installed; pip install 'ray[data]' or run with --set engine.kind=local"
        ) from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it would log reaches us as an exception
    if ray.is_initialized():
        yield RayEngine(config, "ray (joined)")
        return
    name = _start(config.address)
    try:
        yield RayEngine(config, name, alone=name.startswith(STARTED_HERE))
    finally:
        ray.shutdown()


def _start(address: str | None) -> str:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    wanted = os.environ.get("RAY_ADDRESS") if address in (None, "auto") else address
    try:
        if wanted and wanted != "local":
            ray.init(address=wanted, **quiet)
            return f"ray cluster at {wanted}"
        if address == "auto" and not wanted:
            with contextlib.suppress(ConnectionError):
                ray.init(address="auto", **quiet)
                return "ray cluster that runs here"
        with _import_path(), _without_greeting():
            ray.init(address="local", include_dashboard=False, _node_ip_address=LOCAL_ADDRESS, **quiet)
    except (ConnectionError, RuntimeError, OSError) as error:
        raise EngineError(
            f"cannot start or reach Ray ({wanted or 'local'}): {error}; check engine.address and RAY_ADDRESS, or run "
            "with --set engine.kind=local"
        ) from error
    return f"{STARTED_HERE} with {int(ray.cluster_resources().get('CPU', 0))} CPUs"


@contextlib.contextmanager
def _import_path() -> Iterator[None]:
    """Workers of a cluster started here inherit this environment, so they import what the driver can import."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(p) for p in sys.path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@contextlib.contextmanager
def _without_greeting() -> Iterator[None]:
    """Ray's core writes a line about its log level straight to file descriptor 2 while it starts; errors are raised."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(nowhere)
        os.close(saved)


@dataclass(frozen=True)
class Pool:
    """How a group runs on a cluster."""

    cpus: float
    gpus: float
    workers: int
    """Actors at most; 0: tasks."""


def size_pools(job: Job, cluster: Mapping[str, float], wanted_workers: int | None) -> list[Pool]:
    """How many workers each group gets, so that all groups can run at the same time.

    Actors hold their CPUs for the whole segment: were they to take all of them, tasks would wait for ever. So the
    largest task is set aside first, and CPUs are scaled down where even one worker a group does not fit.

    Raises:
        EngineError: the cluster has no GPU, or fewer than the groups need together.
    """
    groups = job.groups
    actors = [g for g in groups if g.resources.actor]
    task_cpus = max((g.resources.cpus for g in groups if not g.resources.actor), default=0.0)
    cpus, gpus = cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
    gpus_needed = sum(g.resources.gpus for g in actors)
    if gpus_needed > gpus:
        raise EngineError(
            f"the recipe needs {gpus_needed:g} GPUs at a time, the Ray cluster has {gpus:g}; add GPU nodes, or run the "
            "models on CPUs with --set models.device=cpu"
        )
    minimum = sum(g.resources.cpus for g in actors) + task_cpus
    if cpus <= 0:
        raise EngineError("the Ray cluster offers no CPUs; add nodes, or run with --set engine.kind=local")
    scale = min(1.0, cpus / minimum) if minimum else 1.0
    spare_cpus, spare_gpus = cpus - task_cpus * scale, gpus
    pools = []
    for group in groups:
        need = group.resources.cpus * scale
        if not group.resources.actor:
            pools.append(Pool(need, group.resources.gpus, 0))
            continue
        fits = [spare_cpus / len(actors) / need if need else float("inf")]
        if group.resources.gpus:
            fits.append(spare_gpus / len(actors) / group.resources.gpus)
        workers = max(1, int(min(fits) + 1e-9))
        most = min(wanted_workers or workers, group.resources.workers or workers)
        pools.append(Pool(need, group.resources.gpus, min(workers, most)))
    return pools


class RayEngine:
    """Streams units through Ray Data."""

    def __init__(self, config: EngineConfig, name: str, *, alone: bool = False) -> None:
        self._config = config
        self.name = name
        self.slots = 1
        self._weights = None if alone else Sender()

    def run(self, job: Job, units: Iterable[Unit]) -> Iterator[Unit]:
        """See `pairmill.engines.Engine.run`. When the stream breaks, since a machine was lost with more than Ray itself
        tries again, the units that are left go into a new one."""
        import ray

        left = {unit.shard: unit for unit in units}
        breaks = 0
        while left:
            try:
                for unit in self._stream(job, list(left.values())):
                    if left.pop(unit.shard, None) is not None:
                        breaks = 0
                        yield unit
            except (ray.exceptions.RayError, ray.exceptions.RaySystemError) as error:
                breaks += 1
                if breaks > STREAM_RETRIES:
                    raise EngineError(
                        f"Ray stopped the run: {type(error).__name__}: {str(error).strip().splitlines()[-1]}; what was "
                        "committed is kept: run the command again"
                    ) from error
                log.warning("Ray lost workers (%s); %d shards are left and go on", type(error).__name__, len(left))
                time.sleep(STREAM_PAUSE_S * breaks)

    def scatter(self, work: CellWork, rows: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """See `pairmill.engines.Engine.scatter`."""
        return in_cells(work, rows)

    def _stream(self, job: Job, units: Iterable[Unit]) -> Iterator[Unit]:
        import ray
        from ray.data import DataContext

        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = False
        units = list(units)
        wanted = sorted({stage for unit in units for stage in unit.wanted})
        items = [{"unit": unit.dumps()} for unit in units]
        stream = ray.data.from_items(items, override_num_blocks=len(items))
        pools = size_pools(job, ray.cluster_resources(), self._config.workers)
        with warnings.catch_warnings():
            # Bounded retries can be said in no other way in Ray 2.60; its default is to retry without end.
            warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
            sent = self._weights.packed(job, wanted) if self._weights else Shipment(job, {})
            for index, pool in enumerate(pools):
                stream = _add_group(stream, sent, index, pool, wanted)
        for batch in stream.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
            for text in batch["unit"]:
                yield Unit.loads(str(text))


def _add_group(stream: Dataset, sent: Shipment, index: int, pool: Pool, wanted: Sequence[int]) -> Dataset:
    """One more group on the stream: an actor pool for groups with models, tasks for the others."""
    from ray.data import ActorPoolStrategy

    common: dict[str, Any] = {"batch_size": 1, "num_cpus": pool.cpus, "batch_format": "numpy"}
    if pool.gpus:
        common["num_gpus"] = pool.gpus
    if pool.workers:
        fixed = sent.job.groups[index].resources.workers is not None  # they share limits, so each has to know how many
        return stream.map_batches(
            _GroupActor,
            fn_constructor_args=(sent, index, wanted, pool.workers if fixed else None),
            compute=ActorPoolStrategy(min_size=pool.workers if fixed else 1, max_size=pool.workers),
            max_restarts=WORKER_RETRIES,
            max_task_retries=WORKER_RETRIES,
            **common,
        )
    return stream.map_batches(_run_task, fn_kwargs={"sent": sent, "group": index}, max_retries=WORKER_RETRIES, **common)


class _GroupActor:
    """A long-lived worker of one group: keeps its kernels (weights) between units."""

    def __init__(self, sent: Shipment, group: int, wanted: Sequence[int], workers: int | None) -> None:
        if workers is not None:
            os.environ[WORKERS_ENV] = str(workers)
        self._worker = Worker(sent.unpacked(group), group)
        self._worker.warm(wanted)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return _run_batch(self._worker, batch)


_task_workers: dict[tuple[str, int, int], tuple[Job, Worker]] = {}
"""In a process that Ray keeps for tasks: workers of the latest job, so that kernels are opened once."""


def _run_task(batch: dict[str, np.ndarray], sent: Shipment, group: int) -> dict[str, np.ndarray]:
    key = (sent.job.dataset, sent.job.segment, group)
    job, worker = _task_workers.get(key, (None, None))
    if worker is None or job != sent.job:
        worker = Worker(sent.unpacked(group), group)
        _task_workers[key] = (sent.job, worker)
    return _run_batch(worker, batch)


def _run_batch(worker: Worker, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import numpy as np

    return {"unit": np.array([run_unit(worker, Unit.loads(str(text))).dumps() for text in batch["unit"]], dtype=object)}
