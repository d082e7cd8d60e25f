"""The store: Delta Lake tables of Parquet files, partitioned by shard, and the snapshots published over them.

Workers write Parquet files; only the driver commits them. A file is visible when a Delta commit names it, never before.
Layout: ``<dataset>/<table>/shard=<n>/<name>.parquet`` beside the table's ``_delta_log``.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pairmill.errors import ConfigError, DatasetLocked, StoreError
from schemas import fields
from schemas.snapshot import SNAPSHOTS, SnapshotRecord

if TYPE_CHECKING:
    from deltalake import DeltaTable

PAIRS_TABLE = "pairs"
LEDGER_TABLE = "ledger"
SNAPSHOTS_TABLE = "snapshots"
ROW_GROUP = 500
"""Rows a row group (measured best of six layouts for images, RECIPES: 82 us to write and 25 us to read one)."""

_PARTITIONING = pads.partitioning(pa.schema([fields.SHARD]), flavor="hive")


@dataclass(frozen=True)
class DataFile:
    """A Parquet file of one table and one shard."""

    path: str
    """Path or URL that `fsspec` opens."""
    relative: str
    """Path below the table's folder, as in the Delta log."""
    shard: int
    rows: int
    size: int


class Dataset:
    """A dataset folder: a local path or any URL that fsspec and delta-rs both know."""

    def __init__(self, url: str) -> None:
        self.fs, root = fsspec.core.url_to_fs(url)
        self.local = "file" in ([self.fs.protocol] if isinstance(self.fs.protocol, str) else self.fs.protocol)
        self.root = os.path.abspath(root) if self.local else root.rstrip("/")
        self.url = self.root if self.local else url.rstrip("/")

    def __repr__(self) -> str:
        return f"Dataset({self.url!r})"

    def path(self, *parts: str) -> str:
        """A path below the dataset, as `fs` takes it."""
        return posixpath.join(self.root, *parts)

    def table(self, name: str, schema: pa.Schema) -> Table:
        """A partitioned table; `schema` is that of its files, without ``shard``."""
        return Table(self, name, schema)

    def exists(self) -> bool:
        """Whether something was published or admitted here."""
        return bool(self.fs.exists(self.path(PAIRS_TABLE, "_delta_log")))

    def snapshots(self) -> list[SnapshotRecord]:
        """All published snapshots, oldest first."""
        delta = open_delta(self, SNAPSHOTS_TABLE)
        if delta is None:
            return []
        rows = delta.to_pyarrow_table().to_pylist()
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
        from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake

        uri = self.path(SNAPSHOTS_TABLE) if self.local else f"{self.url}/{SNAPSHOTS_TABLE}"
        delta = DeltaTable.create(uri, schema=SNAPSHOTS, mode="ignore")
        delta.update_incremental()
        last = delta.transaction_version("publish")
        if last is not None and last >= record.id:
            return
        write_deltalake(
            delta,
            pa.Table.from_pylist([record.to_row()], schema=SNAPSHOTS),
            mode="append",
            commit_properties=CommitProperties(app_transactions=[Transaction("publish", record.id)]),
        )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the right to write. The kernel frees the lock of a process that died.

        Raises:
            DatasetLocked: another process holds it; the message names it.
        """
        if not self.local:  # object stores have no locks: there Delta's own conflict check decides
            yield
            return
        import fcntl

        os.makedirs(self.root, exist_ok=True)
        path = os.path.join(self.root, ".lock")
        with open(path, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise DatasetLocked(
                    f"{self.url} is being written by {holder}; wait until it ends, or stop it, then run again"
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()}")
            file.flush()
            yield
            file.truncate(0)


def open_delta(dataset: Dataset, name: str) -> DeltaTable | None:
    """The Delta table, or None when it does not exist."""
    from deltalake import DeltaTable

    uri = dataset.path(name) if dataset.local else f"{dataset.url}/{name}"
    if not dataset.fs.exists(dataset.path(name, "_delta_log")):
        return None
    return DeltaTable(uri) if DeltaTable.is_deltatable(uri) else None


class Table:
    """A Delta table partitioned by shard, whose files workers write and the driver commits."""

    def __init__(self, dataset: Dataset, name: str, schema: pa.Schema) -> None:
        self.dataset = dataset
        self.name = name
        self.schema = schema

    @property
    def delta_schema(self) -> pa.Schema:
        """The schema in the Delta log: that of the files and ``shard``."""
        return self.schema.append(fields.SHARD)

    def version(self) -> int:
        """The version of the last commit; -1 before the first one."""
        delta = open_delta(self.dataset, self.name)
        return -1 if delta is None else delta.version()

    def files(self, version: int | None = None) -> list[DataFile]:
        """The files of a version (the latest by default), by shard and name."""
        delta = open_delta(self.dataset, self.name)
        return [] if delta is None else list_files(self.dataset, self.name, delta, version)

    def commit(
        self,
        new: Sequence[DataFile],
        *,
        replace: Sequence[int] = (),
        transaction: tuple[str, int] | None = None,
    ) -> int:
        """Make files visible, all at once; with `replace`, the old files of those shards vanish in the same commit.

        Idempotent: files that are visible already are not added again, and a `transaction` (application, version) that
        was committed before does nothing.

        Returns the version of the table.
        """
        from deltalake import CommitProperties, DeltaTable, Transaction
        from deltalake.transaction import AddAction, RemoveAction

        uri = self.dataset.path(self.name) if self.dataset.local else f"{self.dataset.url}/{self.name}"
        delta = DeltaTable.create(uri, schema=self.delta_schema, partition_by=["shard"], mode="ignore")
        delta.update_incremental()
        if transaction is not None:
            done = delta.transaction_version(transaction[0])
            if done is not None and done >= transaction[1]:
                return delta.version()
        present = {f.relative for f in list_files(self.dataset, self.name, delta)}
        adds: list[AddAction | RemoveAction] = [
            AddAction(
                path=f.relative,
                size=f.size,
                partition_values={"shard": str(f.shard)},
                modification_time=int(time.time() * 1000),
                data_change=True,
                stats=json.dumps({"numRecords": f.rows}),
            )
            for f in new
            if f.relative not in present
        ]
        if not adds and not replace:
            return delta.version()
        properties = CommitProperties(
            app_transactions=[Transaction(*transaction)] if transaction else None,
        )
        filters: Any = [("shard", "in", [str(s) for s in sorted(set(replace))])] if replace else None
        delta.create_write_transaction(
            adds,
            "overwrite" if replace else "append",
            self.delta_schema,
            ["shard"],
            partition_filters=filters,
            commit_properties=properties,
        )
        delta.update_incremental()
        return delta.version()

    def writer(self, shard: int, name: str) -> ShardWriter:
        """A writer for one file of a shard."""
        return ShardWriter(self.dataset, self.name, self.schema, shard, name)


def list_files(dataset: Dataset, table: str, delta: DeltaTable, version: int | None = None) -> list[DataFile]:
    """The data files of a Delta table at a version, by shard and name."""
    if version is not None and version != delta.version():
        delta.load_as_version(version)
    actions = pa.table(delta.get_add_actions(flatten=True))
    if actions.num_rows == 0:
        return []
    columns = [actions.column(c).to_pylist() for c in ("path", "partition.shard", "num_records", "size_bytes")]
    found = [
        DataFile(dataset.path(table, path), path, int(shard), rows, size)
        for path, shard, rows, size in zip(*columns, strict=True)
    ]
    return sorted(found, key=lambda f: (f.shard, f.relative))


class ShardWriter:
    """Writes one Parquet file under a temporary name and moves it into place when it is whole.

    A context manager: leaving it by an exception removes the temporary file.
    """

    def __init__(self, dataset: Dataset, table: str, schema: pa.Schema, shard: int, name: str) -> None:
        self._dataset = dataset
        self._schema = schema
        self.relative = f"shard={shard}/{name}.parquet"
        self.path = dataset.path(table, self.relative)
        self._shard = shard
        self._rows = 0
        self._buffer: list[pa.Table] = []
        self._buffered = 0
        if dataset.local:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            self._temporary = f"{self.path}.{os.getpid()}.tmp"
            self._file: Any = open(self._temporary, "wb")  # noqa: SIM115 (closed by close() or abort())
        else:
            self._file = dataset.fs.open(self.path, "wb")
        self._parquet = pq.ParquetWriter(self._file, schema, **parquet_options(schema))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abort()

    def write(self, rows: pa.Table) -> None:
        """Add rows; they reach the file in row groups of `ROW_GROUP`."""
        self._buffer.append(rows)
        self._buffered += rows.num_rows
        if self._buffered >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._buffered:
            self._parquet.write_table(pa.concat_tables(self._buffer), row_group_size=ROW_GROUP)
            self._rows += self._buffered
            self._buffer, self._buffered = [], 0

    def close(self) -> DataFile:
        """Finish the file and move it into place."""
        try:
            self._flush()
            self._parquet.close()
            if self._dataset.local:
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            if self._dataset.local:
                os.replace(self._temporary, self.path)
        except OSError as error:
            self.abort()
            raise StoreError(f"cannot write {self.path}: {error}; make room or mend access, then run again") from error
        size = self._dataset.fs.size(self.path)
        return DataFile(self.path, self.relative, self._shard, self._rows, size)

    def abort(self) -> None:
        """Throw the unfinished file away."""
        with contextlib.suppress(OSError, pa.ArrowInvalid):
            self._parquet.close()
        if self._dataset.local:
            self._file.close()
            Path(self._temporary).unlink(missing_ok=True)
        elif hasattr(self._file, "discard"):
            self._file.discard()


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """How a table's files are written: image bytes plain (they are compressed already), the rest zstd."""
    bulky = [f.name for f in schema if pa.types.is_binary(f.type)]
    if bulky:
        slim = [f.name for f in schema if f.name not in bulky and not pa.types.is_nested(f.type)]
        return {"compression": "none", "use_dictionary": False, "write_statistics": slim}
    return {"compression": "zstd", "compression_level": 1}


def existing_file(dataset: Dataset, table: str, shard: int, name: str) -> DataFile | None:
    """The file a worker finished before a run was killed, if it is there and whole; it was never committed."""
    relative = f"shard={shard}/{name}.parquet"
    path = dataset.path(table, relative)
    if not dataset.fs.exists(path):
        return None
    try:
        with dataset.fs.open(path, "rb") as file:
            rows = pq.read_metadata(file).num_rows
    except (OSError, pa.ArrowInvalid):
        return None
    return DataFile(path, relative, shard, rows, dataset.fs.size(path))


def read_files(dataset: Dataset, files: Sequence[DataFile], schema: pa.Schema, columns: Sequence[str]) -> pa.Table:
    """Columns of some files (``shard`` included if asked for), in the order of the files.

    Raises:
        StoreError: a file is missing or damaged; the message names what to do.
    """
    wanted = schema.append(fields.SHARD) if "shard" not in schema.names else schema
    if not files:
        return pa.schema([wanted.field(c) for c in columns]).empty_table()
    source = pads.dataset(
        [f.path for f in files],
        schema=wanted,
        format="parquet",
        filesystem=None if dataset.local else pafs.PyFileSystem(pafs.FSSpecHandler(dataset.fs)),
        partitioning=_PARTITIONING,
    )
    try:
        return source.to_table(columns=list(columns))
    except (OSError, pa.ArrowInvalid) as error:
        raise StoreError(f"cannot read the dataset {dataset.url}: {error}; a file is damaged or missing") from error


class Snapshot:
    """A published state of a dataset: the only way readers see it."""

    def __init__(self, dataset: Dataset, record: SnapshotRecord) -> None:
        self.dataset = dataset
        self.record = record

    def __repr__(self) -> str:
        return f"Snapshot({self.dataset.url!r}, {self.record.id})"

    @cached_property
    def _files(self) -> Mapping[str, list[DataFile]]:
        found = {}
        for table, version in self.record.tables.items():
            delta = open_delta(self.dataset, table)
            found[table] = [] if delta is None else list_files(self.dataset, table, delta, version)
        return found

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
