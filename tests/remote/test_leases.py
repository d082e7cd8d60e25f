"""Leases: one holder, a dead one followed, a lost one noticed, readers waited for."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from pairmill import leases, storage
from pairmill.errors import DatasetLocked, StoreError
from pairmill.leases import Holder
from tests.remote.conftest import ROOT, S3

QUICK = {"ttl_s": 1.0, "renew_s": 0.2}

HOLDING = """
import sys, time
from pairmill import leases, storage
fs, root = storage.open_fs(sys.argv[1])
with getattr(leases, sys.argv[2])(fs, root, ttl_s=float(sys.argv[3]), renew_s=float(sys.argv[3]) / 5) as lease:
    print("held", flush=True)
    sys.stdin.readline()
    lease.check()
print("released", flush=True)
"""


@pytest.fixture
def at(bucket: str) -> tuple[Any, str]:
    """A file system, and a dataset in it."""
    return storage.open_fs(f"s3://{bucket}/data")


@contextlib.contextmanager
def other(root: str, kind: str = "exclusive", ttl_s: float = 1.0) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a lease until it is told to go on."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, f"s3://{root}", kind, str(ttl_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with process:
        assert process.stdout.readline() == "held\n", process.communicate()
        try:
            yield process
        finally:
            process.kill()


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on this process takes all others for processes of another machine."""
    monkeypatch.setattr(leases, "_machine", lambda: "another machine")


def stored(at: tuple[Any, str], name: str = "write") -> Holder:
    fs, root = at
    found = storage.read(fs, f"{root}/_locks/{name}.json")
    assert found is not None
    return Holder.from_bytes(found.data)


def put(at: tuple[Any, str], holder: Holder, name: str = "write") -> None:
    fs, root = at
    fs.pipe_file(f"{root}/_locks/{name}.json", holder.to_bytes())


def test_one_holder_at_a_time(at):
    with leases.exclusive(*at) as lease:
        assert not stored(at).free
        said = rf"{at[1]} is being written by process \d+ on "
        with pytest.raises(DatasetLocked, match=said), leases.exclusive(*at):
            pass
        lease.check()
    assert stored(at).free
    with leases.exclusive(*at), leases.exclusive(*at, name="other"):
        pass


def test_a_lease_is_renewed_while_it_is_held(at):
    with leases.exclusive(*at, **QUICK):
        before = stored(at).counter
        time.sleep(1.5)
        assert stored(at).counter >= before + 3
        with pytest.raises(DatasetLocked), leases.exclusive(*at):
            pass


def test_waiting_for_a_live_holder(at):
    with other(at[1]) as process:
        threading.Timer(1.0, lambda: (process.stdin.write("go\n"), process.stdin.flush())).start()
        with leases.exclusive(*at, wait_s=30):
            assert process.wait(timeout=10) == 0


def test_the_refusal_names_a_live_holder_of_another_machine_as_soon_as_it_renews(at, monkeypatch):
    with other(at[1], ttl_s=10.0) as process:
        elsewhere(monkeypatch)
        start = time.monotonic()
        with pytest.raises(DatasetLocked, match=f"process {process.pid} "), leases.exclusive(*at):
            pass
        assert time.monotonic() - start < 8


def test_a_dead_holder_of_this_machine_is_followed_at_once(at):
    with other(at[1], ttl_s=600.0) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with leases.exclusive(*at) as lease:
            lease.check()


def test_a_killed_holder_nobody_has_waited_for_is_dead_too(at):
    with other(at[1], ttl_s=600.0) as process:
        process.send_signal(signal.SIGKILL)
        time.sleep(0.5)  # a zombie: its parent, this test, has not asked for its end
        with leases.exclusive(*at):
            pass


def test_a_pid_that_is_used_again_is_not_its_holder(at):
    mine = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with mine:
        started = leases._started(mine.pid)
        assert started
        holder = Holder("x", "host", mine.pid, leases._machine(), started, ttl_s=600.0)
        put(at, holder)
        with pytest.raises(DatasetLocked), leases.exclusive(*at):
            pass
        put(at, replace(holder, started="1"))
        with leases.exclusive(*at):
            pass
        mine.kill()


def test_a_holder_of_another_machine_that_is_silent_is_followed_after_its_time(at):
    put(at, Holder("x", "far", 1, "another machine", "1", ttl_s=1.5))
    start = time.monotonic()
    with leases.exclusive(*at, wait_s=0.0):
        assert 1.5 < time.monotonic() - start < 10


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"null", b'{"owner": "x", "ttl_s": "long"}', b"\xff"])
def test_a_lease_that_cannot_be_read_is_that_of_an_unknown_process(data):
    holder = Holder.from_bytes(data)
    assert str(holder) == "process 0 on an unknown machine"
    assert (holder.alive, holder.free, holder.ttl_s) == (None, False, leases.TTL_S)


def test_a_lost_lease_is_noticed_before_the_commit(at):
    fs, root = at
    with other(root, ttl_s=1.0) as process:
        process.send_signal(signal.SIGSTOP)
        put(at, replace(stored(at), machine="another machine", ttl_s=1.0))
        with leases.exclusive(fs, root) as lease:
            process.send_signal(signal.SIGCONT)
            out, err = process.communicate("go\n", timeout=30)
            assert process.returncode == 1 and out == ""
            assert "DatasetLocked" in err and "was taken over by process" in err and "Run again" in err
            lease.check()
        assert stored(at).free


def test_a_lease_that_was_deleted_is_lost(at):
    fs, root = at
    with leases.exclusive(fs, root) as lease:
        fs.rm_file(f"{root}/_locks/write.json")
        with pytest.raises(DatasetLocked, match="a process that deleted it"):
            lease.check()


def test_an_answer_that_was_lost_loses_no_lease(s3: S3, at):
    s3.fault("lost")
    with leases.exclusive(*at) as lease:
        s3.fault("lost")
        lease.check()
        lease.check()
        assert stored(at).owner == lease.holder.owner
    assert stored(at).free


def test_while_the_store_is_away_nothing_is_committed_and_the_lease_comes_back_with_it(s3: S3, at):
    with leases.exclusive(*at, **QUICK) as lease:
        s3.fault("down")
        with pytest.raises(StoreError, match="cannot write"):
            lease.check()
        s3.fault(None)
        lease.check()


def test_a_store_that_pays_no_heed_to_conditions_is_refused(s3: S3, at):
    s3.fault("deaf")
    with pytest.raises(StoreError, match="does not keep to the conditions of writes"), leases.exclusive(*at):
        pass


def test_a_child_process_must_not_commit_and_does_not_release(at, monkeypatch):
    with leases.exclusive(*at) as lease:
        monkeypatch.setattr(lease, "_process", -1)
        with pytest.raises(StoreError, match="child processes must not commit"):
            lease.check()
        lease.release()
        assert not stored(at).free
        monkeypatch.undo()


def test_eight_processes_take_turns(at):
    code = """
import sys
from pairmill import leases, storage
fs, root = storage.open_fs(sys.argv[1])
with leases.exclusive(fs, root, wait_s=100) as lease:
    count = int(fs.cat_file(f"{root}/count")) if fs.exists(f"{root}/count") else 0
    lease.check()
    fs.pipe_file(f"{root}/count", str(count + 1).encode())
"""
    fs, root = at
    racers = [subprocess.Popen([sys.executable, "-c", code, f"s3://{root}"], cwd=ROOT) for _ in range(8)]
    assert [racer.wait(timeout=120) for racer in racers] == [0] * 8
    assert fs.cat_file(f"{root}/count") == b"8"


# -- readers --


def readers(at: tuple[Any, str]) -> list[str]:
    return leases._objects(at[0], f"{at[1]}/_locks/readers")


def test_removal_waits_for_readers_and_readers_for_a_removal(at):
    with leases.shared(*at) as one, leases.shared(*at) as two:
        assert one is not None and two is not None and len(readers(at)) == 2
        with pytest.raises(DatasetLocked, match="is being read by process"), leases.alone(*at):
            pass
        one.check()
    assert readers(at) == []
    order = []

    def read() -> None:
        with leases.shared(*at):
            order.append("read")

    with leases.alone(*at):
        thread = threading.Thread(target=read)
        thread.start()
        time.sleep(1.0)
        order.append("removed")
    thread.join(timeout=30)
    assert order == ["removed", "read"]
    assert readers(at) == []


def test_removal_waits_until_the_reader_ends(at):
    with other(at[1], "shared") as process:
        threading.Timer(1.0, lambda: (process.stdin.write("go\n"), process.stdin.flush())).start()
        with leases.alone(*at, wait_s=30):
            assert process.wait(timeout=10) == 0


def test_a_dead_reader_is_forgotten(at):
    with other(at[1], "shared", ttl_s=600.0) as process:
        process.kill()
        process.wait()
        assert len(readers(at)) == 1
        with leases.alone(*at):
            assert readers(at) == []


def test_a_silent_reader_of_another_machine_is_forgotten_after_its_time_and_notices(at, monkeypatch):
    with leases.shared(*at, ttl_s=1.0, renew_s=600.0) as lease:
        elsewhere(monkeypatch)
        with leases.alone(*at):
            pass
        with pytest.raises(StoreError, match="run again"):
            lease.check()


def test_who_may_only_read_reads_without_a_lease(s3: S3, at):
    s3.fault("readonly")
    with leases.shared(*at) as lease:
        assert lease is None
