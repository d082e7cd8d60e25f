"""Who may write to a dataset in an object store, and who is reading it: leases.

A lease is a small object under ``<dataset>/_locks/``, made by a conditional write, so of many processes one gets it.
Its holder renews it every few seconds; each renewal changes its etag. A process that sees the same etag for longer than
the lease's time to live, by its own clock, takes the lease over: clocks of machines are never compared. A holder on the
same machine that is known to be dead is followed at once. A holder asks `Lease.check` before each commit; if its lease
was taken over meanwhile, it must not commit.

A released lease stays as an object that says so, because conditional writes are everywhere and conditional deletes are
not. Local disks need none of this: there the kernel frees the lock of a process that died.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pairmill import storage
from pairmill.errors import DatasetLocked, StoreError

TTL_S = 60.0
"""How long a lease holds without being renewed."""

RENEW_S = 5.0
"""How often it is renewed."""

_FOLDER = "_locks"
_READERS = "readers"
_WRITE = "write"
_REMOVE = "remove"
_POLL_S = 0.5

_held: set[str] = set()
"""Owners of the leases that this process holds."""


@dataclass(frozen=True)
class Holder:
    """What a lease says of the process that holds it."""

    owner: str = ""
    """Random: one acquisition of one lease."""
    host: str = "an unknown machine"
    pid: int = 0
    machine: str = ""
    """Equal for processes that see each other's pids; empty where that cannot be told."""
    started: str = ""
    """When the process started, by the clock of its kernel: a pid is used again."""
    counter: int = 0
    ttl_s: float = TTL_S
    free: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {''.join(c for c in self.host if c.isprintable())[:100]}"

    def to_bytes(self) -> bytes:
        """As stored: JSON."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Holder:
        """From a stored lease; what cannot be read is a holder that nobody knows."""
        try:
            given = json.loads(data)
            return cls(
                owner=str(given["owner"]),
                host=str(given["host"]),
                pid=int(given["pid"]),
                machine=str(given["machine"]),
                started=str(given["started"]),
                counter=int(given["counter"]),
                ttl_s=float(given["ttl_s"]),
                free=given["free"] is True,
            )
        except (ValueError, TypeError, KeyError):
            return cls()

    @property
    def alive(self) -> bool | None:
        """Whether the process lives, as far as this machine knows: None for a process of another machine."""
        if not self.machine or self.machine != _machine():
            return None
        if self.pid == os.getpid():
            return self.owner in _held
        return _lives(self.pid, self.started)


class Lease:
    """A lease that this process holds; `exclusive`, `shared` and `alone` make it."""

    def __init__(self, fs: Any, path: str, holder: Holder, etag: str, renew_s: float) -> None:
        self.path = path
        self.holder = holder
        self._fs = fs
        self._etag = etag
        self._renew_s = renew_s
        self._lost: str | None = None
        self._process = os.getpid()
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease {path}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Renew the lease now; ask it before each commit.

        Raises:
            DatasetLocked: another process took the lease over.
            StoreError: the store does not answer, so nobody knows who holds it.
        """
        if os.getpid() != self._process:
            raise StoreError(f"the lease {self.path} belongs to {self.holder}; its child processes must not commit")
        self._renew()
        if self._lost is not None:
            raise DatasetLocked(
                f"{self.path} was taken over by {self._lost}, because this process ({self.holder}) did not renew it "
                f"for {self.holder.ttl_s:.0f} s; nothing was committed since. Run again: it goes on where it stopped"
            )

    def release(self) -> None:
        """Give the lease back. If the store does not answer, others take it over when its time is up."""
        if os.getpid() != self._process:
            return
        self._stop.set()
        self._thread.join()
        with self._mutex, contextlib.suppress(StoreError):
            if self._lost is None:
                self._give_back()

    def _give_back(self) -> None:
        storage.put_if_match(self._fs, self.path, replace(self.holder, free=True).to_bytes(), self._etag)

    def _beat(self) -> None:
        while not self._stop.wait(self._renew_s) and self._lost is None:
            with contextlib.suppress(StoreError):  # `check` will say so, if the store is still away then
                self._renew()

    def _renew(self) -> None:
        with self._mutex:
            if self._lost is not None:
                return
            self.holder = replace(self.holder, counter=self.holder.counter + 1)
            etag = storage.put_if_match(self._fs, self.path, self.holder.to_bytes(), self._etag)
            if etag is None:  # refused: is it another's, or did an earlier renewal land whose answer was lost?
                stored = storage.read(self._fs, self.path)
                other = Holder.from_bytes(stored.data) if stored else None
                if stored is None or other is None or other.owner != self.holder.owner or other.free:
                    self._lost = str(other) if other else "a process that deleted it"
                    return
                etag = stored.etag
            self._etag = etag


class _ReaderLease(Lease):
    def check(self) -> None:
        if os.getpid() == self._process:
            self._renew()
        if self._lost is not None:
            raise StoreError(
                f"{self.path} is gone: this process did not renew it for {self.holder.ttl_s:.0f} s, and files that it "
                "reads may have been removed since; run again"
            )

    def _give_back(self) -> None:
        with storage.explained(f"cannot remove {self.path}"):
            self._fs.rm_file(self.path)


class _Watch:
    """What this process sees of others' leases over time, by its own clock."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, float]] = {}
        self._renewed: set[str] = set()

    def is_over(self, path: str, stored: storage.Stored) -> bool:
        """Whether a lease may be taken: it was given back, or its holder is dead."""
        holder = Holder.from_bytes(stored.data)
        if holder.free or holder.alive is False:
            return True
        etag, since = self._seen.get(path, ("", 0.0))
        if etag != stored.etag:
            if etag:
                self._renewed.add(path)
            self._seen[path] = stored.etag, _clock()
            return False
        return _clock() - since > holder.ttl_s

    def lives(self, path: str, stored: storage.Stored) -> bool:
        """Whether the holder was seen alive: there is no point in waiting for the lease to run out."""
        return path in self._renewed or Holder.from_bytes(stored.data).alive is True


@contextlib.contextmanager
def exclusive(
    fs: Any, root: str, *, name: str = _WRITE, wait_s: float = 0.0, ttl_s: float = TTL_S, renew_s: float = RENEW_S
) -> Iterator[Lease]:
    """Hold a lease that one process can have: the right to write to the dataset at `root`.

    Args:
        fs: file system of the object store, from `storage.open_fs`.
        root: path of the dataset in it.
        name: which right.
        wait_s: how long to wait for a holder that lives, seconds. Of a holder on another machine that died, the lease
            is taken over when it has not been renewed for its time to live, whatever `wait_s` is.
        ttl_s: how long the lease holds without being renewed.
        renew_s: how often it is renewed.

    Raises:
        DatasetLocked: another process holds it; the message names it.
        StoreError: the store cannot be reached, or does not keep to conditional writes.
    """
    with this_process(ttl_s) as mine:
        lease = _acquire(fs, f"{root}/{_FOLDER}/{name}.json", root, mine, wait_s, renew_s)
        try:
            yield lease
        finally:
            lease.release()


def _acquire(fs: Any, path: str, root: str, mine: Holder, wait_s: float, renew_s: float) -> Lease:
    watch, until = _Watch(), _clock() + wait_s
    while True:
        stored = storage.read(fs, path)
        if stored is None:
            etag = storage.put_if_absent(fs, path, mine.to_bytes())
        elif Holder.from_bytes(stored.data).owner == mine.owner:  # an earlier try landed whose answer was lost
            etag = stored.etag
        elif watch.is_over(path, stored):
            etag = storage.put_if_match(fs, path, mine.to_bytes(), stored.etag)
        else:
            if _clock() >= until and watch.lives(path, stored):
                raise DatasetLocked(
                    f"{root} is being written by {Holder.from_bytes(stored.data)}; wait until it ends "
                    "(--wait SECONDS), or stop it, then run again"
                )
            time.sleep(min(_POLL_S, mine.ttl_s / 10))
            continue
        if etag is not None:
            _require_conditions(fs, path, mine.to_bytes())
            return Lease(fs, path, mine, etag, renew_s)


def _require_conditions(fs: Any, path: str, data: bytes) -> None:
    """Some stores take conditional writes and pay no heed to the condition; there nothing can be kept safe."""
    if storage.put_if_absent(fs, path, data) is None and storage.put_if_match(fs, path, data, '"0"') is None:
        return
    raise StoreError(
        f"the store of {path} does not keep to the conditions of writes (If-None-Match, If-Match), so two runs at once "
        "could spoil the dataset; use a store that does (AWS S3, MinIO, Ceph and R2 do in their current versions)"
    )


@contextlib.contextmanager
def shared(fs: Any, root: str, *, ttl_s: float = TTL_S, renew_s: float = RENEW_S) -> Iterator[Lease | None]:
    """Read a dataset for long: no process that is `alone` removes files until this ends. Waits for one that is.

    Yields None when the credentials allow reading only: then others cannot be told, and a removal does not wait.

    Raises:
        StoreError: the store cannot be reached.
    """
    gate = f"{root}/{_FOLDER}/{_REMOVE}.json"
    watch = _Watch()
    with this_process(ttl_s) as mine:
        while (
            True
        ):  # first say so, then look at the gate: one who removes closes the gate first, then looks for readers
            lease = _register(fs, f"{root}/{_FOLDER}/{_READERS}/{mine.owner}.json", mine, renew_s)
            closed = storage.read(fs, gate) if lease else None
            if lease is None or closed is None or watch.is_over(gate, closed):
                break
            lease.release()
            time.sleep(min(_POLL_S, ttl_s / 10))
        try:
            yield lease
        finally:
            if lease is not None:
                lease.release()


def _register(fs: Any, path: str, mine: Holder, renew_s: float) -> Lease | None:
    try:
        etag = storage.put_if_absent(fs, path, mine.to_bytes())
    except storage.AccessDenied:
        return None
    if etag is None:  # no other process knows the name: an earlier try landed whose answer was lost
        stored = storage.read(fs, path)
        etag = stored.etag if stored else ""
    return _ReaderLease(fs, path, mine, etag, renew_s)


@contextlib.contextmanager
def alone(
    fs: Any, root: str, *, wait_s: float = 0.0, ttl_s: float = TTL_S, renew_s: float = RENEW_S
) -> Iterator[Lease]:
    """Remove files while no `shared` lease is held: new readers wait, and old ones are waited for.

    Args:
        fs: file system of the object store, from `storage.open_fs`.
        root: path of the dataset in it.
        wait_s: how long to wait for readers that live, seconds.
        ttl_s: how long the lease holds without being renewed.
        renew_s: how often it is renewed.

    Raises:
        DatasetLocked: a reader did not end in time; the message names it.
        StoreError: the store cannot be reached.
    """
    with exclusive(fs, root, name=_REMOVE, wait_s=wait_s, ttl_s=ttl_s, renew_s=renew_s) as lease:
        wait_for_readers(fs, root, wait_s)
        yield lease


def wait_for_readers(fs: Any, root: str, wait_s: float = 0.0) -> None:
    """Wait until nobody holds a `shared` lease; those of dead processes are removed.

    Raises:
        DatasetLocked: a reader did not end in time; the message names it.
        StoreError: the store cannot be reached.
    """
    folder = f"{root}/{_FOLDER}/{_READERS}"
    watch, until = _Watch(), _clock() + wait_s
    while True:
        reading = None
        for path in _objects(fs, folder):
            stored = storage.read(fs, path)
            if stored is None:
                continue
            if watch.is_over(path, stored):
                with storage.explained(f"cannot remove {path}"), contextlib.suppress(FileNotFoundError):
                    fs.rm_file(path)
            elif _clock() >= until and watch.lives(path, stored):
                raise DatasetLocked(
                    f"{root} is being read by {Holder.from_bytes(stored.data)}; wait until it ends "
                    "(--wait SECONDS), or stop it, then run again"
                )
            else:
                reading = path
        if reading is None:
            return
        time.sleep(_POLL_S)


def _objects(fs: Any, folder: str) -> list[str]:
    with storage.explained(f"cannot list {folder}"):
        try:
            return [str(path) for path in fs.ls(folder, detail=False, refresh=True) if str(path).endswith(".json")]
        except FileNotFoundError:
            return []


# -- this process --


@contextlib.contextmanager
def this_process(ttl_s: float) -> Iterator[Holder]:
    """This process as the holder of one lease, alive until this ends."""
    pid = os.getpid()
    mine = Holder(uuid.uuid4().hex, socket.gethostname(), pid, _machine(), _started(pid) or "", ttl_s=ttl_s)
    _held.add(mine.owner)
    try:
        yield mine
    finally:
        _held.discard(mine.owner)


@functools.cache
def _machine() -> str:
    """A name for all processes whose pids this one can see: one boot, one pid namespace. Empty where unknown (macOS):
    host names alone are shared by containers that do not see each other's processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    return hashlib.sha256(f"{boot} {space}".encode()).hexdigest()[:16]


def _lives(pid: int, started: str) -> bool | None:
    """Whether a process that started then still runs; None where that cannot be told."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    found = _started(pid)
    return None if found is None else found == started


def _started(pid: int) -> str | None:
    """When a process started, in ticks since the boot (empty for one that ended and was not waited for yet); None where
    that cannot be told."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *rest = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]


def _clock() -> float:
    """Seconds that run on while the machine sleeps, where there is such a clock."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()
