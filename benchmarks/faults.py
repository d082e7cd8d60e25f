"""Machines, workers and drivers that die by SIGKILL at random times: does the dataset come out like that of a calm run?

    python -m benchmarks.faults [--runs 10] [--only node worker driver] [--engine ray local beam] [--web 2]

The command runs in a process of its own. What is killed, with nothing told before and nothing cleaned up after:

- node: of a Ray cluster of three raylets, one with all its processes. In every other run a new machine joins some
  seconds later, as where spot machines are used; else the run ends on what is left.
- worker: two to four worker processes, one after the other.
- driver: the command itself, once or twice; each time it is started again at once, while what it left behind may
  still be at work. Told is how long the processes that it had started outlive it.

A kill comes when a random share of the files is written that the run will write, and up to two seconds later, so that
random moments are spread over the whole run, admission and publishing included, however busy the machine is.

The oracle is a calm run of the local engine: every column of every table has the same content hash. A run that takes
longer than `--timeout` is a hang: its stacks are printed, and it counts as failed. The first `--web` runs of each kind
take the recipe clip_filter with the shipped CLIP model over a procedural web, the others the quick steps of
tests/steps.py: tasks, an actor pool, verdicts and a global stage, too.

Prints a line a run; writes benchmarks/results/faults-<date>.json, where runs of the same kind, engine and seed replace
those of before. Ends with 1 when one of them was not equal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from pairmill.procedural.web import PROPORTIONS, Kind, ProceduralWeb
from tests.faults.datasets import content
from tests.steps import texts, write_urls

HERE = Path(__file__).resolve().parent
KINDS = {"node": ("ray",), "worker": ("ray", "local"), "driver": ("ray", "local", "beam")}
"""What is killed, and on which engines."""
ENGINES: dict[str, dict[str, Any]] = {
    "ray": {"kind": "ray", "address": "local"},
    "local": {"kind": "local", "workers": 2},
    "beam": {"kind": "beam"},
}
BEAM = ("--runner=FnApiRunner", "--direct_num_workers=2", "--direct_running_mode=multi_processing")
"""Beam's local runner with worker processes of its own."""
WORKERS = {"ray": "ray::", "local": "--multiprocessing-fork"}
"""How the command lines of worker processes begin, or what is in them."""
IDLE = "ray::IDLE"
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
TRIES = 4
"""How often a run is started anew that had ended before its random moment came."""
SHARDS = 16
OUTLIVE_S = 150.0
"""How long processes of a dead driver may be there."""


@dataclass
class Kill:
    """One SIGKILL."""

    after_s: float
    """Since the command was started."""
    what: str
    files: int
    """Data files that the dataset had by then."""


@dataclass
class Trial:
    """One run that was disturbed, and how it ended."""

    kind: str
    engine: str
    seed: int
    recipe: str
    revision: str
    """Of pairmill."""
    kills: list[Kill] = field(default_factory=list)
    joined_s: float | None = None
    """When another machine joined."""
    outlived_s: list[float | None] = field(default_factory=list)
    """Of each killed driver: how long its processes outlived it; null: longer than was waited."""
    seconds: float = 0.0
    """All attempts together."""
    outcome: str = ""
    """equal; or different, failed, hang."""
    detail: str = ""


@dataclass(frozen=True)
class Road:
    """A recipe over given rows."""

    recipe: str
    settings: dict[str, Any]
    expected: dict[str, dict[str, str]] = field(default_factory=dict)
    """Content hashes of a calm run."""
    files: list[int] = field(default_factory=list)
    """How many data files it writes."""

    def config(self, folder: Path, engine: dict[str, Any]) -> Path:
        """A config file for a dataset in the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yaml"
        data = {"dataset": str(folder / "dataset"), "recipe": self.recipe, "engine": engine, **self.settings}
        path.write_text(yaml.safe_dump(data))
        return path


class Command:
    """The command in a process of its own, what it says in a file."""

    def __init__(self, config: Path) -> None:
        engine = yaml.safe_load(config.read_text())["engine"]["kind"]
        verb = ["beam_runner.py", str(config), *BEAM] if engine == "beam" else ["-m", "pairmill", "run", str(config)]
        self.dataset = config.parent / "dataset"
        self._said = config.parent / "said.txt"
        with self._said.open("ab") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", *verb],
                stdout=said,
                stderr=said,
                cwd=HERE.parent,
                env={**os.environ, "RAY_health_check_failure_threshold": "30"},  # its own Ray is busy here, not lost
                start_new_session=True,
            )
        self.begin = time.monotonic()

    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self.begin

    def kill(self, what: str) -> Kill:
        """The record of a kill that is about to be done."""
        return Kill(round(self.seconds(), 2), what, count_files(self.dataset))

    def works_on(self, files: float, seconds: float) -> bool:
        """Wait until the dataset has so many files, and some seconds longer. Whether it is still running then."""
        while self.process.poll() is None and count_files(self.dataset) < files:
            time.sleep(0.05)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll() is None

    def lasting(self) -> list[psutil.Process]:
        """The processes that it has started, but for two agents of Ray: these end by themselves a minute after their
        raylet, when they have given up to tell its end to a GCS that is gone, too."""
        return [p for p in self.children() if _name(p) not in AGENTS]

    def children(self) -> list[psutil.Process]:
        """All processes that it has started, and those that they have."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def end(self, timeout_s: float) -> str:
        """Wait for its end. What went wrong: empty, or hang or failed with the last words."""
        try:
            code = self.process.wait(max(1.0, timeout_s - self.seconds()))
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # prints the stacks of all threads
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            for process in (*self.children(), self.process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            return f"hang: {self._last_words(4000)}"
        return f"failed: exit code {code}: {self._last_words(1500)}" if code else ""

    def _last_words(self, characters: int) -> str:
        return self._said.read_text(errors="replace")[-characters:]


def count_files(dataset: Path) -> int:
    """Data files, committed or not."""
    return sum(1 for _ in dataset.glob("*/shard=*/*.parquet"))


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return (process.cmdline() or [""])[0]
    return ""


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; one that only waits for its exit code to be read does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def strike(processes: list[psutil.Process]) -> None:
    """SIGKILL to all of them, as fast as can be."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def workers(command: Command, engine: str) -> list[psutil.Process]:
    """Worker processes of the run that have work. Ray's agents are none: a raylet ends with them, so that killing one
    is losing the machine, and here it is the driver's."""
    found = []
    for process in command.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            line = " ".join(process.cmdline())
            if WORKERS[engine] in line and not line.startswith((IDLE, *AGENTS)):
                found.append(process)
    return found


# -- the three kinds --------------------------------------------------------------------------------------------------


def kill_workers(road: Road, trial: Trial, folder: Path, timeout_s: float, chance: random.Random) -> str:
    """Two to four workers, one after the other."""
    command = Command(road.config(folder, ENGINES[trial.engine]))
    for share in sorted(chance.uniform(0.3, 0.9) for _ in range(chance.randint(2, 4))):
        found: list[psutil.Process] = []
        alive = command.works_on(share * road.files[0], chance.uniform(0, 2))
        while alive and not (found := workers(command, trial.engine)):
            alive = command.works_on(0, 0.1)
        if alive:
            victim = chance.choice(sorted(found, key=lambda p: p.pid))
            with contextlib.suppress(psutil.NoSuchProcess):
                name = victim.cmdline()[0] if trial.engine == "ray" else "worker process"
                trial.kills.append(command.kill(name))
                strike([victim])
    return command.end(timeout_s)


def kill_drivers(road: Road, trial: Trial, folder: Path, timeout_s: float, chance: random.Random) -> str:
    """The command itself, once or twice; the last attempt is left in peace."""
    config = road.config(folder, ENGINES[trial.engine])
    watchers = []
    for _ in range(chance.randint(1, 2)):
        command = Command(config)
        if not command.works_on(chance.uniform(0, 1) * road.files[0], chance.uniform(0, 2)):
            break
        left = command.lasting()
        trial.kills.append(command.kill("driver"))
        command.process.kill()
        command.process.wait()
        watchers.append(_watch(left, trial.outlived_s))
    problem = Command(config).end(timeout_s)
    for watcher in watchers:
        watcher.join()
    outlived = None in trial.outlived_s
    return problem or ("failed: processes of the killed driver are left" if outlived else "")


def _watch(processes: list[psutil.Process], told: list[float | None]) -> threading.Thread:
    """Say how long processes are there yet."""

    def watch() -> None:
        begin = time.monotonic()
        while (alive := [p for p in processes if is_alive(p)]) and time.monotonic() - begin < OUTLIVE_S:
            time.sleep(0.05)
        told.append(None if alive else round(time.monotonic() - begin, 2))
        strike(alive)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


class Machines:
    """A Ray cluster of three raylets on loopback addresses; what dies is replaced before the next run."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pm-", ignore_cleanup_errors=True)  # a short path: sockets
        os.environ.update(
            RAY_TMPDIR=self._folder.name,  # so that no other Ray here takes this cluster for the one that runs
            RAY_USAGE_STATS_ENABLED="0",
            RAY_BACKEND_LOG_LEVEL="fatal",
            PYTHONPATH=str(HERE.parent),
        )
        from ray.cluster_utils import Cluster

        self._next = 3
        head = {"num_cpus": 1, "node_ip_address": "127.0.0.2", "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._workers: list[Any] = []
        self.complete()

    @property
    def address(self) -> str:
        """For engine.address."""
        return str(self._cluster.address)

    def complete(self) -> None:
        """Two machines beside the head."""
        while len(self._workers) < 2:
            self.join()

    def join(self) -> None:
        """One more machine."""
        address = f"127.0.0.{self._next}"
        self._next += 1
        self._workers.append(self._cluster.add_node(num_cpus=1, node_ip_address=address))

    def lose(self, which: int) -> str:
        """SIGKILL to a machine's raylet and to all that runs below it. Its address."""
        node = self._workers.pop(which)
        raylets = [info.process for infos in node.all_processes.values() for info in infos]
        doomed = [psutil.Process(r.pid) for r in raylets if r.poll() is None]
        strike([*doomed, *(child for raylet in doomed for child in raylet.children(recursive=True))])
        for raylet in raylets:
            raylet.wait()
        self._cluster.worker_nodes.discard(node)
        return str(node.node_ip_address)

    def close(self) -> None:
        """Stop it."""
        self._cluster.shutdown()
        self._folder.cleanup()


def kill_node(
    road: Road, trial: Trial, folder: Path, timeout_s: float, chance: random.Random, machines: Machines
) -> str:
    """One machine of three; sometimes another joins later."""
    machines.complete()
    command = Command(road.config(folder, {"kind": "ray", "address": machines.address}))
    if command.works_on(chance.uniform(0.2, 0.95) * road.files[0], chance.uniform(0, 2)):
        kill = command.kill("")
        trial.kills.append(replace(kill, what=machines.lose(chance.randrange(2))))
        if trial.seed % 2 and command.works_on(0, chance.uniform(1.0, 6.0)):
            machines.join()
            trial.joined_s = round(command.seconds(), 2)
    return command.end(timeout_s)


# -- the whole --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def roads(folder: Path, rows: int) -> Iterator[dict[str, Road]]:
    """The quick steps and the main recipe."""
    shares: dict[Kind, float] = {
        kind: share for kind, share in PROPORTIONS.items() if kind not in (Kind.TIMEOUT, Kind.TRICKLE)
    }
    with ProceduralWeb(rows, seed=5, proportions=shares) as web:
        web.write(folder / "web")
        steps = {
            "source": {"kind": "url_table", "path": str(write_urls(folder / "urls.parquet", texts(rows)))},
            "options": {"pause_s": 0.25},
            "shard_size": max(1, rows // SHARDS),
        }
        pages = {
            "source": {"kind": "url_table", "path": str(folder / "web" / "urls.parquet")},
            "download": {"allow_private_addresses": True, "timeout_s": 60, "retries": 0, "per_host": 32},
            "keep": {"clip_score": ">= 0.2", "min_side": 32},
            "shard_size": max(1, rows // SHARDS),
        }
        yield {"steps": Road("tests.steps:recipe", steps), "web": Road("clip_filter", pages)}


class Soak:
    """All runs of one call."""

    def __init__(self, folder: Path, roads: dict[str, Road], timeout_s: float) -> None:
        self._folder, self._roads, self._timeout_s = folder, roads, timeout_s
        self._machines: Machines | None = None

    def run(self, kind: str, engine: str, seed: int, name: str) -> Trial:
        """One disturbed run."""
        road = self._roads[name]
        trial = Trial(kind, engine, seed, road.recipe, revision())
        if kind == "node" and self._machines is None:
            self._machines = Machines()
        self._prepare(road)
        chance = random.Random(f"{kind}:{engine}:{seed}")
        begin = time.monotonic()
        for attempt in range(TRIES):
            folder = self._folder / f"{kind}-{engine}-{seed}-{attempt}"
            if kind == "node":
                assert self._machines is not None
                problem = kill_node(road, trial, folder, self._timeout_s, chance, self._machines)
            else:
                strike_at = {"worker": kill_workers, "driver": kill_drivers}[kind]
                problem = strike_at(road, trial, folder, self._timeout_s, chance)
            if problem or trial.kills:
                break
        trial.seconds = round(time.monotonic() - begin, 1)
        trial.outcome, _, trial.detail = (problem or self._compared(road, folder)).partition(": ")
        if kind == "node" and trial.outcome == "hang":
            self.close()
        return trial

    def close(self) -> None:
        """Stop the cluster."""
        if self._machines is not None:
            self._machines.close()
            self._machines = None

    def _prepare(self, road: Road) -> None:
        """The oracle, once a recipe."""
        if not road.expected:
            config = road.config(self._folder / f"oracle-{road.recipe}", {"kind": "local"})
            if problem := Command(config).end(600):
                raise SystemExit(f"the oracle did not end well: {problem}")
            road.expected.update(content(config))
            road.files.append(count_files(config.parent / "dataset"))

    def _compared(self, road: Road, folder: Path) -> str:
        found = content(folder / "config.yaml")
        differ = [
            f"{table}.{column}"
            for table, columns in road.expected.items()
            for column, digest in columns.items()
            if found.get(table, {}).get(column) != digest
        ]
        return f"different: {', '.join(differ)}" if differ or found.keys() != road.expected.keys() else "equal"


def revision() -> str:
    """The commit of this checkout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()


def line(trial: Trial) -> str:
    """A trial for the eye."""
    kills = ", ".join(f"{k.after_s:g} s ({k.what}, {k.files} files)" for k in trial.kills) or "none: it was too quick"
    joined = f"; another joined at {trial.joined_s:g} s" if trial.joined_s else ""
    left = f"; its processes outlived it by {trial.outlived_s} s" if trial.outlived_s else ""
    return (
        f"{trial.kind:7}{trial.engine:6}{trial.seed:3}  {trial.recipe:19}{trial.seconds:7.1f} s"
        f"  {trial.outcome.upper() if trial.outcome != 'equal' else 'equal'}  killed at {kills}{joined}{left}"
        + (f"\n{trial.detail}" if trial.detail else "")
    )


def save(out: Path, trial: Trial) -> None:
    """Put a trial among the others, in the place of the one of before."""
    key = ("kind", "engine", "seed")
    data = json.loads(out.read_text()) if out.exists() else {"cpus": os.cpu_count(), "trials": []}
    new = asdict(trial)
    trials = [t for t in data["trials"] if any(t[k] != new[k] for k in key)]
    data["trials"] = sorted([*trials, new], key=lambda t: [t[k] for k in key])
    data["equal"] = {
        f"{kind} {engine}": f"{sum(t['outcome'] == 'equal' for t in found)} of {len(found)}"
        for kind in KINDS
        for engine in KINDS[kind]
        if (found := [t for t in data["trials"] if (t["kind"], t["engine"]) == (kind, engine) and t["kills"]])
    }
    out.write_text(json.dumps(data, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="seeds of each kind and engine")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--web", type=int, default=2, help="seeds below it take clip_filter over a procedural web")
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--timeout", type=float, default=400, help="seconds after which a run counts as hanging")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"faults-{time.strftime('%Y-%m-%d')}.json")
    arguments = parser.parse_args()
    # Ray's 15 would starve its workers on a machine that does other things, too.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (that is its name)
    bad = 0
    with tempfile.TemporaryDirectory() as temporary, roads(Path(temporary), arguments.rows) as found:
        soak = Soak(Path(temporary), found, arguments.timeout)
        try:
            for kind in arguments.only:
                for engine in (e for e in KINDS[kind] if e in arguments.engine):
                    for seed in range(arguments.first, arguments.first + arguments.runs):
                        trial = soak.run(kind, engine, seed, "web" if seed < arguments.web else "steps")
                        bad += trial.outcome != "equal"
                        print(line(trial), flush=True)
                        save(arguments.out, trial)
        finally:
            soak.close()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
