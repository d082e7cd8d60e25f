"""Where the journal lies: files of lines, and the spending, on disks and in object stores."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import posixpath
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from pairmill import leases, storage
from pairmill.answers.ledger import ANSWERS, ANSWERS_TABLE, LOST, Answer, Told
from pairmill.errors import PairmillError, StoreError
from pairmill.store import Dataset, read_files, sync_folder
from pairmill.store.files import list_folder

JOURNAL = "_journal"
"""Folder of what is not in the table yet, in the dataset."""

_LINES = "answers"
OPEN = "open"
"""Folder of the marks of sessions under way."""
_SPENDING = "spending.json"
_AT_ONCE = 500
"""Objects that are read or removed by one call."""
_WRITERS = 8
"""Objects that a session writes at a time."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class File:
    """A file of the journal."""

    path: str
    shard: int
    session: str


# -- the spending -----------------------------------------------------------------------------------------------------


@dataclass
class Share:
    """What a session that is not in the table yet may spend; `tokens` is None where it is not limited, then its lines
    say what it spent."""

    tokens: int | None
    cost: float
    state: str
    """open: some of it may come back; idle: none will, unless it asks for more; closed: it is over, and this is what it
    spent."""
    holder: dict[str, Any] = field(default_factory=dict)


@dataclass
class Spending:
    """What was spent, and who may spend more."""

    tokens: int = 0
    """Of all that is in the table, or was."""
    cost: float = 0.0
    sessions: dict[str, Share] = field(default_factory=dict)

    @classmethod
    def from_bytes(cls, data: bytes, path: str) -> Spending:
        """As stored.

        Raises:
            StoreError: it is damaged.
        """
        try:
            given = json.loads(data)
            sessions = {name: Share(**share) for name, share in given["sessions"].items()}
            return cls(int(given["tokens"]), float(given["cost"]), sessions)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StoreError(
                f"{path}, which says what was spent, is damaged: {error}; delete it while no run is under way: it is "
                "made again from the answers that are stored"
            ) from error

    def to_bytes(self) -> bytes:
        """As it is stored: JSON."""
        return json.dumps(asdict(self), sort_keys=True).encode()


class Place(ABC):
    """Where the journal of a dataset lies."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.folder = dataset.path(JOURNAL)
        self.lines = dataset.path(JOURNAL, _LINES)
        self.spending = dataset.path(JOURNAL, _SPENDING)

    def files(self) -> list[File]:
        """All files of lines."""
        found = []
        for path in list_folder(self.dataset, self.lines):
            stem, ending = posixpath.splitext(posixpath.basename(path))
            shard, _, rest = stem.partition("-")
            if ending == ".jsonl" and shard.isdigit():
                found.append(File(path, int(shard), rest.partition("-")[0]))
        return sorted(found, key=lambda file: (file.shard, file.path))

    def read(self, files: Sequence[File]) -> Iterator[tuple[File, bytes]]:
        """The bytes of files; those that are gone are left out."""
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                yield file, self.dataset.fs.cat_file(file.path)

    def remove(self, files: Sequence[File]) -> None:
        """Remove files that may be gone already."""
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                self.dataset.fs.rm_file(file.path)

    def load(self) -> Spending | None:
        """The spending as it is; None when there is none."""
        try:
            return Spending.from_bytes(self.dataset.fs.cat_file(self.spending), self.spending)
        except FileNotFoundError:
            return None

    @abstractmethod
    def change(self, change: Callable[[Spending], Result]) -> Result:
        """Change the spending, alone; `change` may be called again."""

    @abstractmethod
    def alive(self, session: str, share: Share | None) -> bool | None:
        """Whether the process of a session lives; None where that cannot be told."""

    def made(self) -> Spending:
        """The spending where there is no file of it: from what is stored. Lines that are in the table too count twice
        until they are folded."""
        found = Spending()
        files = self.dataset.table(ANSWERS_TABLE, ANSWERS).files()
        if files:
            rows = read_files(self.dataset, files, ANSWERS, ["prompt_tokens", "completion_tokens", "cost"])
            prompt, completion, cost = (rows.column(i).to_pylist() for i in range(3))
            found.tokens, found.cost = sum(prompt) + sum(completion), sum(cost)
        found.sessions = {file.session: Share(None, 0.0, "open") for file in self.files()}
        return found


class Disk(Place):
    """A folder of this machine: locks of the kernel."""

    def change(self, change: Callable[[Spending], Result]) -> Result:  # noqa: D102 (see Place)
        import fcntl

        os.makedirs(self.folder, exist_ok=True)
        with open(posixpath.join(self.folder, ".lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            stored = self.load()
            spending = stored or self.made()
            before = spending.to_bytes() if stored else b""
            result = change(spending)
            if (after := spending.to_bytes()) != before:
                temporary = f"{self.spending}.{os.getpid()}.{threading.get_ident()}.tmp"
                try:
                    with open(temporary, "wb") as file:
                        file.write(after)
                        file.flush()
                        os.fsync(file.fileno())
                    os.replace(temporary, self.spending)
                except OSError as error:
                    with contextlib.suppress(OSError):
                        os.unlink(temporary)
                    raise _cannot_write(self.spending, error) from error
            return result

    def mark(self, session: str) -> str:
        """The file that a session holds locked for as long as it lasts: the kernel frees it when a process dies."""
        return posixpath.join(self.folder, OPEN, session)

    def alive(self, session: str, share: Share | None) -> bool | None:  # noqa: ARG002, D102 (see Place)
        import fcntl

        try:
            with open(self.mark(session), "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False


class Store(Place):
    """An object store: conditional writes, and many objects a call."""

    def read(self, files: Sequence[File]) -> Iterator[tuple[File, bytes]]:  # noqa: D102 (see Place)
        for start in range(0, len(files), _AT_ONCE):
            some = {file.path: file for file in files[start : start + _AT_ONCE]}
            with storage.explained(f"cannot read {self.lines}"):
                found = self.dataset.fs.cat(list(some), on_error="return")
                for data in found.values():
                    if isinstance(data, BaseException) and not isinstance(data, FileNotFoundError):
                        raise data
            yield from ((some[path], data) for path, data in found.items() if isinstance(data, bytes))

    def remove(self, files: Sequence[File]) -> None:  # noqa: D102 (see Place)
        for start in range(0, len(files), _AT_ONCE):
            with storage.explained(f"cannot remove from {self.lines}"), contextlib.suppress(FileNotFoundError):
                self.dataset.fs.rm([file.path for file in files[start : start + _AT_ONCE]])

    def change(self, change: Callable[[Spending], Result]) -> Result:  # noqa: D102 (see Place)
        fs, path = self.dataset.fs, self.spending
        if not storage.is_s3(fs):  # other stores have no conditional writes here, as for leases: one worker at a time
            spending = self.load() or self.made()
            result = change(spending)
            fs.pipe_file(path, spending.to_bytes())
            return result
        while True:
            stored = storage.read(fs, path)
            spending = Spending.from_bytes(stored.data, path) if stored else self.made()
            before = spending.to_bytes()
            result = change(spending)
            after = spending.to_bytes()
            if stored is None:
                done = storage.put_if_absent(fs, path, after)
            elif after == before:
                return result
            else:
                done = storage.put_if_match(fs, path, after, stored.etag)
            if done is not None:
                return result
            # refused: another was first, or the answer to our own write was lost. Changes set what is to be, and do
            # nothing where that is so already: they can be made again
            time.sleep(secrets.randbelow(50) / 1000)

    def alive(self, session: str, share: Share | None) -> bool | None:  # noqa: ARG002, D102 (see Place)
        return leases.Holder(**share.holder).alive if share is not None and share.holder else None


def place_of(dataset: Dataset) -> Place:
    """Where the journal of a dataset lies."""
    return Disk(dataset) if dataset.local else Store(dataset)


def _cannot_write(path: str, error: OSError) -> StoreError:
    return StoreError(f"cannot write {path}: {error}; make room or mend access, then run again: it goes on")


# -- writing lines ----------------------------------------------------------------------------------------------------


class DiskLines:
    """Appends to one file a shard."""

    def __init__(self, place: Disk, session: str) -> None:
        import fcntl

        self._place = place
        self._session = session
        self._open: dict[int, tuple[int, int]] = {}
        """By shard: descriptor, and size."""
        mark = place.mark(session)
        try:
            os.makedirs(posixpath.dirname(mark), exist_ok=True)
            os.makedirs(place.lines, exist_ok=True)
            self._mark = os.open(mark, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._mark, fcntl.LOCK_EX)
        except OSError as error:
            raise _cannot_write(mark, error) from error

    async def append(self, shard: int, line: bytes) -> None:
        """One write; what is not written whole is taken back."""
        self.write(shard, line)

    def write(self, shard: int, line: bytes) -> None:
        """As `append`."""
        path = posixpath.join(self._place.lines, f"{shard}-{self._session}.jsonl")
        size = 0
        try:
            if shard not in self._open:
                flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
                self._open[shard] = os.open(path, flags, 0o666), 0
            descriptor, size = self._open[shard]
            if os.write(descriptor, line) != len(line):
                raise OSError(f"not all of {len(line)} bytes were written")
            self._open[shard] = descriptor, size + len(line)
        except OSError as error:
            if shard in self._open:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._open[shard][0], size)
            raise _cannot_write(path, error) from error

    async def drain(self) -> None:
        """Return when nothing is being written any more."""

    def sync(self) -> None:
        """Make all lines last through a loss of power."""
        for descriptor, _ in list(self._open.values()):
            with contextlib.suppress(OSError):
                os.fsync(descriptor)
        if self._open:
            sync_folder(self._place.lines)

    def close(self) -> None:
        """The session is over."""
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._place.mark(self._session))
        os.close(self._mark)


class StoreLines:
    """Writes small objects: what comes while others are being written goes together."""

    def __init__(self, place: Store, session: str) -> None:
        self._place = place
        self._session = session
        self._number = 0
        self._waiting: list[tuple[int, bytes, asyncio.Future[None]]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def append(self, shard: int, line: bytes) -> None:
        """Return when the line is stored."""
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((shard, line, stored))
        if len(self._tasks) < _WRITERS:
            task = asyncio.ensure_future(self._write_all())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await stored

    async def _write_all(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            shards: dict[int, list[tuple[bytes, asyncio.Future[None]]]] = defaultdict(list)
            for shard, line, stored in batch:
                shards[shard].append((line, stored))
            for shard, lines in shards.items():
                try:
                    await asyncio.to_thread(self.write, shard, b"".join(line for line, _ in lines))
                except BaseException as error:
                    for _, stored in lines:
                        if not stored.done():
                            stored.set_exception(error if isinstance(error, PairmillError) else StoreError(str(error)))
                    if not isinstance(error, (PairmillError, OSError)):
                        raise
                for _, stored in lines:
                    if not stored.done():
                        stored.set_result(None)

    def write(self, shard: int, data: bytes) -> None:
        """One object."""
        self._number += 1
        path = posixpath.join(self._place.lines, f"{shard}-{self._session}-{self._number}.jsonl")
        if storage.is_s3(self._place.dataset.fs):
            storage.put_if_absent(self._place.dataset.fs, path, data)  # nobody else has the name
        else:
            self._place.dataset.fs.pipe_file(path, data)

    async def drain(self) -> None:
        """Return when nothing is being written any more: of requests that were given up, too."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    def sync(self) -> None:
        """Objects that were written last."""

    def close(self) -> None:
        """Nothing is open."""


def writer_of(place: Place, session: str) -> DiskLines | StoreLines:
    """What writes the lines of a session."""
    if isinstance(place, Disk):
        return DiskLines(place, session)
    assert isinstance(place, Store)
    return StoreLines(place, session)


# -- what is stored ---------------------------------------------------------------------------------------------------


def told_of(place: Place, files: Iterable[File]) -> dict[tuple[int, str], Told]:
    """What lines say, by shard and session."""
    found: dict[tuple[int, str], Told] = defaultdict(Told)
    for file, data in place.read(list(files)):
        found[file.shard, file.session].read(data)
    return found


def stored_answers(place: Place, shard: int) -> dict[str, Answer]:
    """Answers of a shard by digest, lost ones left out: of the journal first, since what leaves it is in the table.

    Raises:
        StoreError: what is stored cannot be read.
    """
    told = told_of(place, [file for file in place.files() if file.shard == shard])
    found = {
        answer.digest: answer for one in told.values() for answer in one.answers.values() if answer.outcome != LOST
    }
    dataset = place.dataset
    files = [file for file in dataset.table(ANSWERS_TABLE, ANSWERS).files() if file.shard == shard]
    for row in read_files(dataset, files, ANSWERS, ANSWERS.names).to_pylist():
        if row["outcome"] != LOST:
            found.setdefault(row["digest"], Answer(**row))
    return found
