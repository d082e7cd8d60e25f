"""Workers and machines that die: the run ends, and its result is that of a calm one. A driver that dies takes its
workers along. Wrong clocks change nothing.

PAIRMILL_SOAK=10 does each kill ten times, at other moments; benchmarks/faults.py does it to the command, with models.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pairmill import run as running
from pairmill.query import query
from pairmill.report.progress import Silent
from pairmill.run import refresh
from pairmill.store import Dataset
from schemas.config import RunConfig
from tests.steps import config, texts, write_urls

HERE = Path(__file__).resolve().parent.parent.parent
OUTCOME = "SELECT uid, status, reason, duplicate_of, words, chars, contrast FROM pairs ORDER BY uid"


def outcome(run: RunConfig) -> list[dict[str, object]]:
    return query(Dataset(run.dataset).snapshot(), OUTCOME).to_pylist()


SEEDS = range(int(os.environ.get("PAIRMILL_SOAK", "1")))


def workers_below(pid: int, names: tuple[str, ...]) -> list[psutil.Process]:
    """Processes that this one, or one that it started, has started as workers."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(word.startswith(names) for line in process.cmdline() for word in line.split(" ")):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one whose exit code nobody has read yet does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Murderer(threading.Thread):
    """Kills worker processes of this one with SIGKILL, at random times, until it has killed so many."""

    def __init__(self, names: tuple[str, ...], kills: int, seed: int) -> None:
        super().__init__(daemon=True)
        self._names, self._kills, self._chance = names, kills, random.Random(seed)
        self.killed: list[int] = []
        self.over = threading.Event()

    def run(self) -> None:
        while len(self.killed) < self._kills and not self.over.wait(self._chance.uniform(0.05, 0.6)):
            if found := workers_below(os.getpid(), self._names):
                victim = self._chance.choice(found)
                victim.kill()
                self.killed.append(victim.pid)


ENGINES: list[tuple[dict[str, object], tuple[str, ...]]] = [
    ({"kind": "local", "workers": 2}, ("--multiprocessing-fork",)),
    ({"kind": "ray", "address": "local"}, ("ray::Map", "ray::_Map")),
]


both_engines = pytest.mark.parametrize(("engine", "names"), ENGINES, ids=["local", "ray"])


@both_engines
@pytest.mark.parametrize("seed", SEEDS)
def test_workers_that_are_killed_cost_time_and_nothing_else(
    tmp_path: Path, engine: Mapping[str, object], names: tuple[str, ...], seed: int
):
    table = write_urls(tmp_path / "urls.parquet", texts(300))
    calm = config(tmp_path / "calm", table, shard_size=15)
    refresh(calm, Silent())
    run = config(tmp_path / "struck", table, shard_size=15, engine=engine, options={"pause_s": 0.15})
    murderer = Murderer(names, kills=3, seed=seed)
    try:
        refresh(run, Begins(murderer))
    finally:
        murderer.over.set()
        murderer.join()
    assert murderer.killed, "at least one worker was killed"
    assert outcome(run) == outcome(calm)


@contextlib.contextmanager
def command(root: Path, engine: Mapping[str, object]) -> Iterator[subprocess.Popen[bytes]]:
    """The command, which has finished a shard and works on others; what it says goes into ``said.txt``."""
    table = write_urls(root / "urls.parquet", texts(300))
    run = config(root, table, shard_size=15, engine=engine, options={"pause_s": 0.5})
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json", by_alias=True)))
    with (root / "said.txt").open("wb") as said:
        driver = subprocess.Popen(
            [sys.executable, "-m", "pairmill", "run", str(path)], stdout=said, stderr=said, cwd=HERE
        )
    try:
        while not list((root / "dataset").glob("words-*/shard=*/*.parquet")):
            assert driver.poll() is None, (root / "said.txt").read_text()
            time.sleep(0.05)
        yield driver
    finally:
        driver.kill()
        driver.wait()


@both_engines
def test_a_driver_that_is_killed_leaves_no_processes(
    tmp_path: Path, engine: Mapping[str, object], names: tuple[str, ...]
):
    with command(tmp_path, engine) as driver:
        assert workers_below(driver.pid, names)
        agents = {*workers_below(driver.pid, ("ray::DashboardAgent", "ray::RuntimeEnvAgent"))}
        started = {*psutil.Process(driver.pid).children(recursive=True)} - agents  # Ray's, which end a minute later
        driver.kill()
    deadline = time.monotonic() + 30
    while (left := [process for process in started if is_alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


@both_engines
def test_sigterm_ends_a_driver_as_ctrl_c_does(tmp_path: Path, engine: Mapping[str, object], names: tuple[str, ...]):
    with command(tmp_path, engine) as driver:
        driver.terminate()
        assert driver.wait(60) == 130
    said = (tmp_path / "said.txt").read_text().splitlines()
    assert said[-1] == "interrupted; run the same command again to go on", said
    assert not any("SIGTERM" in line for line in said)


def test_ray_that_is_gone_is_told(tmp_path: Path):
    with command(tmp_path, {"kind": "ray", "address": "local"}) as driver:
        (raylet,) = (p for p in psutil.Process(driver.pid).children() if p.name() == "raylet")
        raylet.kill()
        assert driver.wait(60) == 1
    said = (tmp_path / "said.txt").read_text()
    assert "Ray's raylet on this machine is gone" in said and "run the command again" in said


@pytest.mark.parametrize("engine", [{"kind": "local"}, {"kind": "local", "workers": 2}], ids=["here", "processes"])
def test_a_row_that_asks_for_more_memory_than_there_is_is_quarantined(tmp_path: Path, engine: dict[str, object]):
    table = write_urls(tmp_path / "urls.parquet", [*texts(60), "a balloon that grows and grows", *texts(30)])
    record = refresh(config(tmp_path, table, engine=engine, options={"words": 0}), Silent()).snapshot
    assert record is not None and record.reasons["error.memory"] == 1


def test_a_row_whose_process_the_kernel_kills_is_quarantined(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", [*texts(60), "this one gets oomkilled at once", *texts(30)])
    engine = {"kind": "local", "workers": 2}
    record = refresh(config(tmp_path, table, engine=engine, options={"words": 0}), Silent()).snapshot
    assert record is not None and record.reasons["error.crash"] == 1


class Begins(Silent):
    """Says when the first shard is done: workers are up then."""

    def __init__(self, murderer: Murderer) -> None:
        self._murderer = murderer

    def advance(self, rows: int, dropped: Mapping[str, int]) -> None:
        if not self._murderer.is_alive() and not self._murderer.killed:
            self._murderer.start()


class Counts(Silent):
    """Says when so many shards are done."""

    def __init__(self, shards: int) -> None:
        self._shards = shards
        self.reached = threading.Event()

    def advance(self, rows: int, dropped: Mapping[str, int]) -> None:
        self._shards -= 1
        if self._shards == 0:
            self.reached.set()


def lose(cluster: Any, node: Any) -> None:
    """Kill a machine's processes all at once, as when its power goes: nothing is told to anyone, nothing cleaned up."""
    processes = [info.process for infos in node.all_processes.values() for info in infos]
    doomed = [psutil.Process(process.pid) for process in processes]
    for process in [*doomed, *(child for parent in doomed for child in parent.children(recursive=True))]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for process in processes:
        process.wait()
    cluster.worker_nodes.discard(node)


def test_a_ray_cluster_of_three_machines_that_loses_one_completes(tmp_path: Path):
    from ray.cluster_utils import Cluster

    table = write_urls(tmp_path / "urls.parquet", texts(300))
    calm = config(tmp_path / "calm", table, shard_size=25)
    refresh(calm, Silent())
    head = {"num_cpus": 1, "node_ip_address": "127.0.0.2", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = [cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{n}", wait=False) for n in (3, 4)]
        cluster.wait_for_nodes()
        for seed in SEEDS:
            chance = random.Random(seed)
            counts = Counts(chance.randrange(1, 10))
            lost: list[float] = []

            def strike(counts: Counts = counts, chance: random.Random = chance, lost: list[float] = lost) -> None:
                assert counts.reached.wait(300)
                lose(cluster, nodes.pop(chance.randrange(2)))
                lost.append(time.monotonic())

            thread = threading.Thread(target=strike, daemon=True)
            thread.start()
            engine = {"kind": "ray", "address": cluster.address}
            run = config(tmp_path / f"{seed}", table, shard_size=25, engine=engine, options={"pause_s": 0.2})
            refresh(run, counts)
            ended = time.monotonic()
            thread.join()
            assert lost[0] < ended, "the machine was lost while the run was under way"
            assert outcome(run) == outcome(calm), seed
            nodes.append(cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{5 + seed}"))
    finally:
        cluster.shutdown()


def test_snapshots_follow_their_numbers_when_the_clock_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    table = write_urls(tmp_path / "urls.parquet", texts(50))
    refresh(config(tmp_path, table), Silent())

    class Earlier(running.datetime.datetime):
        @classmethod
        def now(cls, tz: object = None) -> running.datetime.datetime:
            return cls(1999, 1, 1, tzinfo=running.datetime.timezone.utc)

    monkeypatch.setattr(running.datetime, "datetime", Earlier)
    monkeypatch.setattr(time, "time", lambda: 915148800.0)
    refresh(config(tmp_path, table, options={"words": 1}), Silent())
    dataset = Dataset(str(tmp_path / "dataset"))
    first, second = dataset.snapshots()
    assert second.created_at < first.created_at and second.id > first.id
    assert dataset.snapshot().record.id == second.id, "the latest is the one with the highest number"
    assert refresh(config(tmp_path, table, options={"words": 1}), Silent()).published is False
