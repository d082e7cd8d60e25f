"""`ray job submit` to a head node with a dashboard and a token: refused without it; a job that was stopped goes on."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from pairmill.engines import open_engine
from pairmill.errors import EngineError
from pairmill.query import query
from pairmill.store import Dataset
from schemas.config import Engine
from tests.steps import write_urls

HOST = "127.0.0.2"

RECIPE = '''
"""A recipe of one's own, beside the config: the working directory brings it to every node."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pairmill.plan import Recipe
from pairmill.stage import Resources, Stage
from schemas import fields


@dataclass(frozen=True)
class Letters(Stage):
    name = "letters"
    reads = ("text",)
    writes = (fields.CHARS,)
    resources = Resources()

    def open(self):
        meeting = Path(os.environ["MEETING"])  # the runtime environment says it

        def count(batch):
            texts = batch.pylist("text")
            while any("slow" in text for text in texts) and not (meeting / "go").exists():
                time.sleep(0.05)
            with open(meeting / "measured", "a") as log:
                log.writelines(f"{text}\\n" for text in texts)
            return pa.table({"chars": pa.array(map(len, texts), pa.int32())})

        return count


def recipe(config):
    return Recipe("mine", (Letters(),))
'''


@dataclass(frozen=True)
class Head:
    """A running head node."""

    url: str
    token: str

    def environment(self) -> dict[str, str]:
        named = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return {**named, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_USAGE_STATS_ENABLED": "0"}

    def ask(self, path: str, token: str | None = None) -> int:
        """The status of an answer; 0: there is none."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as refusal:
            return refusal.code
        except OSError:
            return 0

    def is_over(self, job: str) -> bool:
        request = urllib.request.Request(
            f"{self.url}/api/jobs/{job}", headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["status"] in ("FAILED", "STOPPED", "SUCCEEDED")

    def job(self, verb: str, *args: str) -> subprocess.CompletedProcess[str]:
        """`ray job VERB --address URL ARGS`."""
        return subprocess.run(
            [str(Path(sys.executable).parent / "ray"), "job", verb, "--address", self.url, *args],
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    dashboard, gcs, client = free_ports(3)
    running = Head(f"http://{HOST}:{dashboard}", secrets.token_hex(32))
    with tempfile.TemporaryDirectory(prefix="pm-") as folder:
        process = subprocess.Popen(
            [
                *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
                *(
                    "--node-ip-address",
                    HOST,
                    "--port",
                    str(gcs),
                    "--num-cpus",
                    "3",
                    "--ray-client-server-port",
                    str(client),
                ),
                *("--dashboard-host", HOST, "--dashboard-port", str(dashboard), "--dashboard-agent-listen-port", "0"),
                *("--temp-dir", folder, "--object-store-memory", str(100 * 2**20)),
            ],
            env={
                **running.environment(),
                "RAY_TMPDIR": folder,  # `address: auto` of other processes must not find this cluster
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            until(lambda: process.poll() is not None or running.ask("/api/version", running.token) == 200)
            assert process.poll() is None, "ray start failed"
            yield running
        finally:
            processes = [process, *psutil.Process(process.pid).children(recursive=True)]
            process.send_signal(signal.SIGTERM)  # `ray start --block` ends its children, its agents after half a minute
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(3)
            for one in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait(60)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]


def until(holds: Callable[[], bool], seconds: float = 280) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("address", ["ray://127.0.0.2:10001", "http://127.0.0.2:8265"])
def test_addresses_of_clients_and_of_jobs_are_told_apart(address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    engine = Engine(kind="ray")
    with (
        pytest.raises(EngineError, match=f"{address} is no address that a run can join: submit the run"),
        open_engine(engine),
    ):
        pass


def test_who_has_no_token_is_refused(head: Head):
    assert head.ask("/api/jobs/") == 401
    assert head.ask("/api/jobs/", secrets.token_hex(32)) == 403
    assert head.ask("/api/jobs/", head.token) == 200


@pytest.mark.timeout(900)
def test_a_job_that_was_stopped_goes_on_where_it_was(head: Head, tmp_path: Path):
    texts = [f"{'slow' if i >= 8 else 'quick'} text {i}" for i in range(12)]
    dataset, work = tmp_path / "dataset", tmp_path / "work"
    work.mkdir()
    (work / "mine.py").write_text(RECIPE)
    config = {
        "dataset": str(dataset),
        "recipe": "mine:recipe",
        "source": {"kind": "url_table", "path": str(write_urls(tmp_path / "urls.parquet", texts))},
        "shard_size": 4,
        "engine": {"kind": "ray"},
    }
    (work / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "env.yaml").write_text(yaml.safe_dump({"env_vars": {"MEETING": str(tmp_path)}}))
    submit = ("--working-dir", str(work), "--runtime-env", str(tmp_path / "env.yaml"))
    run = ("--", "python", "-m", "pairmill", "run", "config.yaml")

    sent = head.job("submit", *submit, "--no-wait", "--submission-id", "first", *run)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    until(lambda: len(list(dataset.glob("letters-*/shard=*/*.parquet"))) == 2 or head.is_over("first"))
    assert not head.is_over("first"), head.job("logs", "first").stdout
    head.job("stop", "first")
    assert "was stopped" in head.job("status", "first").stdout
    assert Dataset(str(dataset)).snapshots() == []

    (tmp_path / "go").touch()
    done = head.job("submit", *submit, *run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "letters: 4 rows to do" in done.stdout
    measured = Counter((tmp_path / "measured").read_text().splitlines())
    assert measured == Counter(texts)
    kept = query(Dataset(str(dataset)).snapshot(), "SELECT text, chars FROM pairs ORDER BY text").to_pylist()
    assert kept == [{"text": text, "chars": len(text)} for text in sorted(texts)]
