"""Workers and machines that die: the run ends, and its result is that of a calm one. Wrong clocks change nothing."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from pairmill import run as running
from pairmill.query import query
from pairmill.report.progress import Silent
from pairmill.run import refresh
from pairmill.store import Dataset
from schemas.config import RunConfig
from tests.steps import config, texts, write_urls

OUTCOME = "SELECT uid, status, reason, duplicate_of, words, chars, contrast FROM pairs ORDER BY uid"


def outcome(run: RunConfig) -> list[dict[str, object]]:
    return query(Dataset(run.dataset).snapshot(), OUTCOME).to_pylist()


def descendants(pid: int) -> Iterator[int]:
    """Processes that this one started, and those that they started."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield int(child)
            try:
                yield from descendants(int(child))
            except OSError:
                continue


def is_worker(pid: int, names: tuple[str, ...]) -> bool:
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return False
    return any(word.startswith(name) for word in line.split(" ") for name in names)


class Murderer(threading.Thread):
    """Kills worker processes of this one with SIGKILL, at random times, until it has killed so many."""

    def __init__(self, names: tuple[str, ...], kills: int, seed: int) -> None:
        super().__init__(daemon=True)
        self._names, self._kills, self._chance = names, kills, random.Random(seed)
        self.killed: list[int] = []
        self.over = threading.Event()

    def run(self) -> None:
        while len(self.killed) < self._kills and not self.over.wait(self._chance.uniform(0.05, 0.6)):
            found = [pid for pid in descendants(os.getpid()) if is_worker(pid, self._names)]
            if found:
                victim = self._chance.choice(sorted(found))
                try:
                    os.kill(victim, signal.SIGKILL)
                except OSError:
                    continue
                self.killed.append(victim)


ENGINES: list[tuple[dict[str, object], tuple[str, ...]]] = [
    ({"kind": "local", "workers": 2}, ("--multiprocessing-fork",)),
    ({"kind": "ray", "address": "local"}, ("ray::Map", "ray::_Map")),
]


@pytest.mark.parametrize(("engine", "names"), ENGINES, ids=["local", "ray"])
def test_workers_that_are_killed_cost_time_and_nothing_else(
    tmp_path: Path, engine: Mapping[str, object], names: tuple[str, ...]
):
    table = write_urls(tmp_path / "urls.parquet", texts(300))
    calm = config(tmp_path / "calm", table, shard_size=15)
    refresh(calm, Silent())
    run = config(tmp_path / "struck", table, shard_size=15, engine=engine, options={"pause_s": 0.15})
    murderer = Murderer(names, kills=3, seed=0)
    try:
        refresh(run, Begins(murderer))
    finally:
        murderer.over.set()
        murderer.join()
    assert murderer.killed, "at least one worker was killed"
    assert outcome(run) == outcome(calm)


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


class Loser(Silent):
    """Takes a machine out of the cluster when some shards are done."""

    def __init__(self, lose: threading.Event) -> None:
        self._lose = lose
        self._shards = 0

    def advance(self, rows: int, dropped: Mapping[str, int]) -> None:
        self._shards += 1
        if self._shards == 3:
            self._lose.set()


def test_a_ray_cluster_that_loses_a_machine_completes(tmp_path: Path):
    from ray.cluster_utils import Cluster

    table = write_urls(tmp_path / "urls.parquet", texts(300))
    calm = config(tmp_path / "calm", table, shard_size=25)
    refresh(calm, Silent())
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "node_ip_address": "127.0.0.2", "include_dashboard": False},
    )
    lose = threading.Event()
    lost: list[float] = []
    try:
        node = cluster.add_node(num_cpus=2, node_ip_address="127.0.0.3")

        def strike() -> None:
            lose.wait(120)
            cluster.remove_node(node, allow_graceful=False)
            lost.append(time.monotonic())

        thread = threading.Thread(target=strike, daemon=True)
        thread.start()
        engine = {"kind": "ray", "address": cluster.address}
        run = config(tmp_path / "struck", table, shard_size=25, engine=engine, options={"pause_s": 0.1})
        refresh(run, Loser(lose))
        ended = time.monotonic()
        lose.set()
        thread.join()
        assert lost[0] < ended, "the machine was lost while the run was under way"
    finally:
        cluster.shutdown()
    assert outcome(run) == outcome(calm)


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
