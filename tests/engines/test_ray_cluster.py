"""A Ray cluster of machines that differ, that come and that go: several raylets, with logical GPUs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pairmill.engines.ray import session
from pairmill.engines.ray import watch as watching
from pairmill.errors import EngineError
from pairmill.query import query
from pairmill.report.progress import Silent
from pairmill.run import refresh
from pairmill.store import Dataset
from schemas.config import RunConfig
from tests.engines.cluster_steps import lines
from tests.steps import config, write_urls

GPU_NODE: dict[str, Any] = {"num_cpus": 2, "num_gpus": 1, "labels": {"pool": "gpu"}}


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    """A cluster of one CPU node."""
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_worker_niceness", "0")  # Ray's 15 starves workers on a machine that does other things, too
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "labels": {"pool": "cpu"},
            "resources": {"fetcher": 2},
            "node_ip_address": "127.0.0.2",
            "include_dashboard": False,
        },
    )
    yield cluster
    cluster.shutdown()
    patch.undo()


@pytest.fixture
def cluster(head: Any) -> Iterator[Any]:
    """The head, to which a test adds machines; they go with it."""
    yield head
    for node in list(head.worker_nodes):
        head.remove_node(node)


class After(Silent):
    """Does something when so many shards are done, and watches how many GPUs are booked."""

    def __init__(self, shards: int, act: Callable[[], None]) -> None:
        self._shards, self._act = shards, act
        self.booked: list[float] = []

    def advance(self, rows: int, dropped: Mapping[str, int]) -> None:
        import ray

        self.booked.append(ray.cluster_resources().get("GPU", 0.0) - ray.available_resources().get("GPU", 0.0))
        if len(self.booked) == self._shards:
            self._act()


def run_on(cluster: Any, root: Path, texts: list[str], pauses: dict[str, float], **engine: Any) -> RunConfig:
    engine = {"kind": "ray", "address": cluster.address, "stages": {"chars": {"gpus": 0.5}}, **engine}
    options = {"log": str(root / "log"), "pauses": pauses}
    table = write_urls(root / "urls.parquet", texts)
    return config(
        root, table, recipe="tests.engines.cluster_steps:recipe", shard_size=5, engine=engine, options=options
    )


def measured(run: RunConfig) -> list[tuple[int, float, int]]:
    rows = query(Dataset(run.dataset).snapshot(), "SELECT text, words, contrast, chars FROM pairs").to_pylist()
    assert all(
        (r["words"], r["contrast"], r["chars"]) == (len(r["text"].split()),) * 2 + (len(r["text"]),) for r in rows
    )
    return [(r["words"], r["contrast"], r["chars"]) for r in rows]


def test_stages_run_where_the_config_says_and_pools_grow_onto_new_nodes(cluster: Any, tmp_path: Path):
    first = cluster.add_node(**GPU_NODE, node_ip_address="127.0.0.3")
    new: list[Any] = []
    stages = {
        "contrast": {"labels": {"pool": "cpu"}, "resources": {"fetcher": 1}},
        "chars": {"cpus": 0.5, "gpus": 0.5, "max_workers": 3},
    }
    texts = [f"text number {i}" for i in range(250)]
    pauses = {"chars": 3.0}  # until the new node has its worker
    grow = After(4, lambda: new.append(cluster.add_node(**GPU_NODE, node_ip_address="127.0.0.4")))
    run = run_on(cluster, tmp_path, texts, pauses, stages=stages, runtime_env={"env_vars": {"PLACED": "yes"}})
    run.options["nodes"] = 2
    refresh(run, grow)
    assert len(measured(run)) == 250

    gpu_nodes = {first.node_id, new[0].node_id}
    chars = lines(tmp_path / "log", "chars")
    assert {line["node"] for line in chars} == gpu_nodes, "models ran on GPU nodes alone, on the new one too"
    assert all(line["held"]["GPU"] == 0.5 and len(line["gpus"]) == 1 for line in chars)
    words = lines(tmp_path / "log", "words")
    assert {line["environment"] for line in [*words, *chars]} == {"yes"}
    assert not any("GPU" in line["held"] or line["gpus"] or line["visible"] for line in words), (
        "tasks take and see no GPU"
    )
    contrast = lines(tmp_path / "log", "contrast")
    assert {line["node"] for line in contrast} == {cluster.head_node.node_id}, "and none of a GPU node where it is said"
    assert all(line["held"]["fetcher"] == 1 for line in contrast)
    assert max(grow.booked) == 1.5, "the pool grew to three workers"


def test_a_run_without_the_gpus_that_it_needs_waits_and_goes_on_when_they_are_there(
    cluster: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run = run_on(cluster, tmp_path, [f"text {i}" for i in range(40)], {"chars": 0.3}, wait_s=120)

    class Comes(logging.Handler):
        """Adds the node when the run has said that it waits."""

        def emit(self, record: logging.LogRecord) -> None:
            if "waiting up to" in record.getMessage() and not cluster.worker_nodes:
                cluster.add_node(**GPU_NODE, node_ip_address="127.0.0.5")

    watch, handler = logging.getLogger("pairmill.engines.ray.watch"), Comes()
    watch.addHandler(handler)
    try:
        refresh(run, Silent())
    finally:
        watch.removeHandler(handler)
    assert len(measured(run)) == 40
    assert "a worker of chars needs 1 CPU + 0.5 GPU, and no node of the Ray cluster has that" in caplog.text
    assert "has room for all stages again" in caplog.text


def test_a_run_that_loses_its_gpus_stops_in_time_and_is_resumed(cluster: Any, tmp_path: Path):
    node = cluster.add_node(**GPU_NODE, node_ip_address="127.0.0.6")
    texts = [f"text {i}" for i in range(100)]
    run = run_on(cluster, tmp_path, texts, {"chars": 0.4}, wait_s=4)
    lost = After(3, lambda: cluster.remove_node(node))
    with pytest.raises(
        EngineError, match=r"worker of chars needs 1 CPU \+ 0\.5 GPU.*waited \d+ s.*run the command again"
    ):
        refresh(run, lost)
    cluster.add_node(**GPU_NODE, node_ip_address="127.0.0.7")
    refresh(run, Silent())
    assert len(measured(run)) == 100
    assert len(lines(tmp_path / "log", "words")) < 2 * 20, "what was committed was not done again"


def test_a_cluster_that_gets_smaller_goes_on_with_smaller_workers(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(watching, "SETTLE_S", 1.0)
    node = cluster.add_node(num_cpus=2, node_ip_address="127.0.0.8")
    stages = {"words": {"cpus": 2}, "contrast": {"cpus": 2}, "chars": {"cpus": 1}}
    run = run_on(cluster, tmp_path, [f"text {i}" for i in range(60)], {"words": 0.3}, stages=stages)
    refresh(run, After(3, lambda: cluster.remove_node(node)))
    assert len(measured(run)) == 60
    assert "the Ray cluster is of another size" in caplog.text
    held = {line["held"]["CPU"] for line in lines(tmp_path / "log", "words") if "held" in line}
    assert held == {2.0, 1.0}


def test_a_worker_without_the_code_is_found_before_anything_runs(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(session, "PACKAGES", ("pairmill", "not_on_the_workers"))
    run = run_on(cluster, tmp_path, ["a text"], {}, stages={})
    with pytest.raises(EngineError, match=r"node 127\.0\.0\.2 .* lack the code .*not_on_the_workers.*working-dir"):
        refresh(run, Silent())


def test_a_defect_of_the_code_stops_the_run_at_once_as_itself(cluster: Any, tmp_path: Path):
    run = run_on(cluster, tmp_path, ["a typo", *(f"text {i}" for i in range(20))], {}, stages={})
    with pytest.raises(NameError, match="'wrods' is not defined"):
        refresh(run, Silent())
    assert len(lines(tmp_path / "log", "words")) <= 5, "each shard was tried once at most"
