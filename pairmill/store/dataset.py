"""A dataset: its tables, its published snapshots, and the right to write to it."""

from __future__ import annotations

import contextlib
import os
import posixpath
import socket
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import IO, TYPE_CHECKING

import pyarrow as pa

from pairmill import leases, storage
from pairmill.errors import ConfigError, DatasetLocked, StoreError
from pairmill.store.files import DataFile
from pairmill.store.tables import LOG, Records, Table
from schemas.snapshot import SNAPSHOTS, SnapshotRecord

if TYPE_CHECKING:
    from deltalake import DeltaTable

PAIRS_TABLE = "pairs"
LEDGER_TABLE = "ledger"
SNAPSHOTS_TABLE = "snapshots"
HISTORY_TABLE = "image_history"
REWRITES_TABLE = "rewrites"

REWRITES = pa.schema(
    [
        pa.field("table", pa.string(), nullable=False),
        pa.field("old", pa.string(), nullable=False),
        pa.field("new", pa.string()),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
    ]
)
"""Files that were replaced for good, by a takedown or a repair: old snapshots read the new one in the place of the old
one (none at all where `new` is null). Paths are below the table's folder."""

_LOCK = ".lock"
_READERS = ".readers"
_POLL_S = 0.2


class Dataset:
    """A dataset folder: a local path or any URL that fsspec and delta-rs both know."""

    def __init__(self, url: str) -> None:
        self.fs, self.root = storage.open_fs(url)
        self.local = storage.is_local(self.fs)
        self.url = self.root if self.local else url.rstrip("/")
        self._lease: leases.Lease | None = None
        self.held: dict[str, tuple[float, DeltaTable | None]] | None = None
        """Tables as they are in an object store and when they were opened, while this process holds the right to
        write."""

    def __repr__(self) -> str:
        return f"Dataset({self.url!r})"

    @property
    def delta_options(self) -> dict[str, str] | None:
        """What delta-rs must be told to open its tables; asked anew for each, since credentials may expire."""
        return storage.delta_options(self.url) or None

    def path(self, *parts: str) -> str:
        """A path below the dataset, as `fs` takes it."""
        return posixpath.join(self.root, *parts)

    def address(self, *parts: str) -> str:
        """A path below the dataset, as delta-rs takes it."""
        return posixpath.join(self.url, *parts)

    def table(self, name: str, schema: pa.Schema) -> Table:
        """A partitioned table; `schema` is that of its files, without ``shard``."""
        return Table(self, name, schema)

    def records(self, name: str, schema: pa.Schema) -> Records:
        """A small table of records, not partitioned."""
        return Records(self, name, schema)

    def tables(self) -> list[str]:
        """Names of all Delta tables that are there, of records too."""
        found = self.fs.glob(self.path("*", LOG))
        return sorted(posixpath.basename(posixpath.dirname(str(path).rstrip("/"))) for path in found)

    def exists(self) -> bool:
        """Whether something was published or admitted here."""
        return bool(self.fs.exists(self.path(PAIRS_TABLE, LOG)))

    # -- snapshots --

    def snapshots(self) -> list[SnapshotRecord]:
        """All published snapshots, oldest first."""
        rows = self.records(SNAPSHOTS_TABLE, SNAPSHOTS).rows()
        return sorted((SnapshotRecord.from_row(row) for row in rows), key=lambda record: record.id)

    def snapshot(self, snapshot_id: int | None = None) -> Snapshot:
        """A published snapshot; the latest one without an id.

        Raises:
            ConfigError: there is no dataset, no snapshot, or none with this number.
        """
        records = self.snapshots()
        if not records:
            what = "holds no published snapshot yet" if self.exists() else "is no pairmill dataset"
            raise ConfigError(f"{self.url} {what}; `pairmill run CONFIG.yaml` makes one")
        if snapshot_id is None:
            return Snapshot(self, records[-1])
        for record in records:
            if record.id == snapshot_id:
                return Snapshot(self, record)
        raise ConfigError(f"{self.url} has no snapshot {snapshot_id}; it has {', '.join(str(r.id) for r in records)}")

    def publish(self, record: SnapshotRecord) -> None:
        """Append a snapshot record; the moment of its commit is the moment of publishing."""
        self.records(SNAPSHOTS_TABLE, SNAPSHOTS).append([record.to_row()], ("publish", record.id))

    def rewrites(self) -> dict[tuple[str, str], tuple[str | None, int, int]]:
        """What stands in the place of a file that was replaced for good, by table and old file: its name (None: nothing
        is left of it), rows and size. A file that was replaced again leads to the last one."""
        rows = self.records(REWRITES_TABLE, REWRITES).rows()
        found = {(r["table"], r["old"]): (r["new"], r["rows"], r["size"]) for r in rows if r["old"] != r["new"]}
        for key, (new, *_) in list(found.items()):
            seen = {key[1]}
            while new is not None and (key[0], new) in found and new not in seen:
                seen.add(new)
                found[key] = found[key[0], new]
                new = found[key][0]
        return found

    def replaced(
        self, table: str, files: list[DataFile], rewrites: Mapping[tuple[str, str], tuple[str | None, int, int]]
    ) -> list[DataFile]:
        """The files that stand for these now, after takedowns and repairs (`rewrites`)."""
        if not rewrites:
            return files
        found = {}
        for file in files:
            new, rows, size = rewrites.get((table, file.relative), (file.relative, file.rows, file.size))
            if new is not None:
                found[new] = DataFile(self.path(table, new), new, file.shard, rows, size)
        return sorted(found.values(), key=lambda f: (f.shard, f.relative))

    # -- the right to write --

    @contextlib.contextmanager
    def lock(self, wait_s: float = 0.0) -> Iterator[None]:
        """Hold the right to write. The kernel frees the lock of a process that died.

        Args:
            wait_s: how long to wait for another process that holds it, seconds.

        Raises:
            ConfigError: a file is in its place.
            DatasetLocked: another process holds it; the message names it.
            StoreError: the folder cannot be made or written to.
        """
        if not self.local:
            with self._leased(wait_s):
                yield
            return
        with self._opened(_LOCK, "a+") as file:
            if not _locked(file, exclusive=True, wait_s=wait_s):
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise DatasetLocked(
                    f"{self.url} is being written by {holder}; wait until it ends (--wait SECONDS), or stop it, "
                    "then run again"
                )
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)

    @contextlib.contextmanager
    def _leased(self, wait_s: float) -> Iterator[None]:
        if not storage.is_s3(self.fs):  # other stores have no leases here: Delta's own conflict check decides
            yield
            return
        with leases.exclusive(self.fs, self.root, wait_s=wait_s) as self._lease:
            self.held = {}
            try:
                yield
            finally:
                self._lease = self.held = None

    def check_lock(self) -> None:
        """Asked before each commit: is the right to write still ours? (The kernel takes no lock from a living process.)

        Raises:
            DatasetLocked: another process took it over, since this one did not answer for long.
        """
        if self._lease is not None:
            self._lease.check()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Read a snapshot for long: until this ends, no takedown and no vacuum removes files."""
        if not self.local:
            with leases.shared(self.fs, self.root) if storage.is_s3(self.fs) else contextlib.nullcontext():
                yield
            return
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(
                PermissionError, OSError
            ):  # a dataset that cannot be written loses no files either
                file = stack.enter_context(open(self.path(_READERS), "a", encoding="utf-8"))
                _locked(file, exclusive=False, wait_s=float("inf"))
            yield

    @contextlib.contextmanager
    def alone(self, wait_s: float = 0.0) -> Iterator[None]:
        """Keep long readers out while files are removed.

        Raises:
            DatasetLocked: an export is reading, and did not end in time.
            StoreError: the folder cannot be written to.
        """
        if not self.local:
            with (
                leases.alone(self.fs, self.root, wait_s=wait_s) if storage.is_s3(self.fs) else contextlib.nullcontext()
            ):
                yield
            return
        with self._opened(_READERS, "a") as file:
            if not _locked(file, exclusive=True, wait_s=wait_s):
                raise DatasetLocked(
                    f"{self.url} is being read by an export; wait until it ends (--wait SECONDS), or stop it, "
                    "then run again"
                )
            yield

    def _opened(self, name: str, mode: str) -> IO[str]:
        """A file of the local folder, to be locked; the folder is made where there is none."""
        try:
            os.makedirs(self.root, exist_ok=True)
            return open(self.path(name), mode, encoding="utf-8")
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigError(f"{self.url} cannot be a dataset: a file is in its way; name another folder") from error
        except OSError as error:
            raise StoreError(
                f"cannot write to {self.url}: {error}; make room or mend access, or name another folder"
            ) from error


def _locked(file: IO[str], *, exclusive: bool, wait_s: float) -> bool:
    """Lock an open file, or say that another process held it for all that time."""
    import fcntl

    until = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(_POLL_S)
        else:
            return True


class Snapshot:
    """A published state of a dataset: the only way readers see it."""

    def __init__(self, dataset: Dataset, record: SnapshotRecord) -> None:
        self.dataset = dataset
        self.record = record

    def __repr__(self) -> str:
        return f"Snapshot({self.dataset.url!r}, {self.record.id})"

    @cached_property
    def _files(self) -> Mapping[str, list[DataFile]]:
        rewrites = self.dataset.rewrites()
        return {
            name: self.dataset.replaced(name, self.dataset.table(name, pa.schema([])).files(version), rewrites)
            for name, version in self.record.tables.items()
        }

    @property
    def columns(self) -> dict[str, str]:
        """Which table holds a column."""
        return self.record.columns

    def files(self, table: str) -> list[DataFile]:
        """The data files of a table in this snapshot, by shard and name."""
        return self._files.get(table, [])


def column_digests(table: pa.Table) -> dict[str, str]:
    """sha256 (hex) of each column's content with the rows sorted by uid.

    Equal content gives equal digests, whatever the files, row groups, batch sizes or workers that made it.
    """
    import hashlib

    ordered = table.sort_by("uid")
    digests = {}
    for name in sorted(ordered.column_names):
        digest = hashlib.sha256(str(ordered.schema.field(name).type).encode())
        for value in ordered.column(name).to_pylist():
            digest.update(repr(value).encode())
            digest.update(b"\0")
        digests[name] = digest.hexdigest()
    return digests
