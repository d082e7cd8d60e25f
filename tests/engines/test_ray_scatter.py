"""Work in cells on a Ray cluster of two machines: the same answers, bounded memory, and no hang when one is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pairmill.dedup.semantic import SemanticNeighbours
from pairmill.engines import Engine, in_cells
from pairmill.engines.ray import RayEngine, ray_engine, scatter, watch
from pairmill.engines.ray.pools import Need
from pairmill.engines.ray.scatter import STORE
from pairmill.errors import ContractError, EngineError
from pairmill.stage import CELL, Resources, whole_cells
from schemas.config import Engine as EngineConfig
from tests.dedup.synthetic import clusters, live

STORE_BYTES = 80 * 2**20


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two machines of one CPU."""
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
    head = {**node, "node_ip_address": "127.0.0.2", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.lost = cluster.add_node(**node, node_ip_address="127.0.0.3")
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def engine(cluster: Any) -> Iterator[Engine]:
    with ray_engine(EngineConfig(kind="ray", address=cluster.address)) as engine:
        yield engine


@dataclass(frozen=True)
class Total:
    """The sum of a cell; some cells do something else first, once or always."""

    marks: Path
    act: Callable[[], None] = int
    on: tuple[int, ...] = ()
    times: int = 1

    def __call__(self, cell: pa.Table) -> pa.Table:
        (number,) = cell[CELL].unique().to_pylist()
        for time_ in range(self.times if number in self.on else 0):
            mark = self.marks / f"{number}-{time_}"
            if not mark.exists():
                mark.touch()
                self.act()
        return pa.table({CELL: [number], "total": [pc.sum(cell["value"]).as_py()]})


@dataclass(frozen=True)
class OnGpu:
    """Asks for what no machine has."""

    resources: Resources = field(default=Resources(gpus=1))

    def __call__(self, cell: pa.Table) -> pa.Table:
        return cell


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse() -> None:
    raise ContractError("a cell of another kind")


def fail() -> None:
    raise ZeroDivisionError("a defect")


def rest() -> None:
    time.sleep(0.5)


def values(cells: np.ndarray) -> pa.Table:
    return pa.table({CELL: pa.array(cells, pa.int64()), "value": pa.array(np.arange(len(cells)))})


def totals(answers: Iterator[pa.Table]) -> list[tuple[int, int]]:
    return sorted((a[CELL][0].as_py(), a["total"][0].as_py()) for a in answers)


MIXED = [values(np.arange(500) % 7), whole_cells(values(np.full(30, 9))), values(np.arange(300) % 8)]
"""Rows of a cell in several tables, and one cell as a whole."""


def test_neighbours_are_the_same_on_ray(engine: Engine):
    vectors = clusters([1, 2, 3, 30, 5] * 610, noise=0.25, seed=1)[:25_000]
    stage, table = SemanticNeighbours(cells=40), live(vectors, chunks=4)
    todo = pa.array(np.random.default_rng(0).random(len(vectors)) < 0.7)
    here, there = (stage.measure(table, todo, scatter)["neighbours"] for scatter in (in_cells, engine.scatter))
    assert there.combine_chunks().equals(here.combine_chunks())
    assert len(here.combine_chunks().flatten()) > 100_000


def test_a_worker_that_dies_costs_nothing(engine: Engine, tmp_path: Path):
    work = Total(tmp_path, die, on=(5, 9))
    expected = totals(in_cells(Total(tmp_path), MIXED))
    assert totals(engine.scatter(work, iter(MIXED))) == expected
    assert len(list(tmp_path.iterdir())) == 2


def test_errors_of_the_work_arrive_as_they_are(engine: Engine, tmp_path: Path):
    with pytest.raises(ContractError, match="a cell of another kind"):
        list(engine.scatter(Total(tmp_path, refuse, on=(3,)), MIXED))
    with pytest.raises(ZeroDivisionError, match="a defect"):
        list(engine.scatter(Total(tmp_path, fail, on=(4,)), MIXED))


def test_a_cell_that_always_kills_its_worker_stops_the_run(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scatter, "RETRIES", 1)
    with pytest.raises(EngineError, match=r"worker of a cell died 2 times .* run the command again"):
        list(engine.scatter(Total(tmp_path, die, on=(9,), times=9), MIXED))


def test_the_object_store_has_room(engine: Engine, tmp_path: Path):
    made, most, done = 0, 0, 0
    size = 5_000_000

    def tables() -> Iterator[pa.Table]:
        nonlocal made, most
        for number in range(30):
            made += 1
            most = max(most, made - done)
            yield whole_cells(values(np.full(size // 16, number)))

    for _ in engine.scatter(Total(tmp_path, rest, on=(0, 1)), tables()):
        done += 1
    assert done == 30
    assert most - 1 <= STORE * STORE_BYTES / size


def test_who_stops_listening_leaves_nothing_running(engine: Engine, tmp_path: Path):
    answers = engine.scatter(Total(tmp_path, rest, on=tuple(range(100))), [values(np.arange(1000) % 100)])
    next(answers)
    answers.close()
    assert totals(engine.scatter(Total(tmp_path), [values(np.zeros(3))])) == [(0, 3)]
    assert len(list(tmp_path.iterdir())) < 10


def test_what_no_machine_has_is_an_error(engine: Engine):
    assert engine.name.startswith("ray")
    impatient = RayEngine(EngineConfig(kind="ray", wait_s=0), "ray")
    with pytest.raises(EngineError, match=r"needs 1 CPU \+ 1 GPU .* add such nodes"):
        list(impatient.scatter(OnGpu(), MIXED))


def test_an_autoscaler_is_asked_for_nothing_more_when_the_work_is_given_up(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    asked: list[list[Need]] = []
    monkeypatch.setattr(watch, "_ask_autoscaler", lambda needs: asked.append(list(needs)))

    def rows() -> Iterator[pa.Table]:
        yield whole_cells(values(np.zeros(3)))
        raise KeyboardInterrupt

    assert engine.name.startswith("ray")
    patient = RayEngine(EngineConfig(kind="ray", wait_s=600), "ray")
    with pytest.raises(KeyboardInterrupt):
        list(patient.scatter(OnGpu(), rows()))
    assert asked == [[Need(1.0, 1.0)], []]


def test_a_machine_that_is_lost_costs_nothing(cluster: Any, engine: Engine, tmp_path: Path):
    rows = values(np.arange(4000) % 20)
    answers = engine.scatter(Total(tmp_path, rest, on=tuple(range(20))), [rows])
    first = [next(answers) for _ in range(3)]
    cluster.remove_node(cluster.lost, allow_graceful=False)
    assert totals(iter([*first, *answers])) == totals(in_cells(Total(tmp_path), [rows]))
