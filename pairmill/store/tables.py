"""Delta tables: which files of a table are visible, and since which version.

Only the process that holds the dataset's lock commits. The log keeps every version (nothing of it expires), since
snapshots name versions.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pairmill import storage
from pairmill.errors import StoreError
from pairmill.store.files import DataFile, ShardWriter, list_folder, read_files, sync_folder
from schemas import fields

if TYPE_CHECKING:
    from deltalake import DeltaTable

    from pairmill.store.dataset import Dataset

LOG = "_delta_log"
TORN = ".torn"
"""What is added to the name of a commit record that was not written to its end."""

_CONFIGURATION = {
    "delta.enableExpiredLogCleanup": "false",
    "delta.logRetentionDuration": "interval 36500 days",
    "delta.deletedFileRetentionDuration": "interval 36500 days",
    "delta.checkpointInterval": "20",  # of 100, the default, opening a table took 144 requests after 70 commits, not 35
}
"""Snapshots name versions of tables, so the log keeps them; what may go, `pairmill vacuum` decides."""

_ACTIONS = "pairmill.actions"
"""Key in a commit's record: how many files it adds and removes, so that a record that ends early is seen."""

_REMOVALS = "removals"
"""The application whose transactions count the commits that took files out of a table."""

_COMPUTED = re.compile(r"ledger|.+-[0-9a-f]{8}")
"""Tables whose rows the next run computes again when they are lacking: the ledger, and those of stages."""

_HOLD_S = 300.0
"""How long an opened table is used again: the credentials it was opened with hold for ten minutes at least."""

COMPACT_AT = 64
"""Files of a record table that are put together into one."""


def open_delta(dataset: Dataset, name: str, version: int | None = None) -> DeltaTable | None:
    """The Delta table at a version (the latest whole one by default), or None when it does not exist.

    A commit record that was not written to its end was never a commit: it is passed over.

    Raises:
        StoreError: the log is damaged.
    """
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError, TableNotFoundError

    if dataset.local and not dataset.fs.exists(dataset.path(name, LOG)):
        return None
    options = dataset.delta_options
    try:
        return DeltaTable(dataset.address(name), version=version, storage_options=options)
    except TableNotFoundError:
        return None
    except (DeltaError, OSError, ValueError) as error:
        if not dataset.local:  # objects are written whole or not at all: it is the store that does not answer
            what = f"cannot open the table {name} in {dataset.url}"
            raise storage.store_error(what, error) or StoreError(f"{what}: {storage.redact(str(error))}") from None
        last = last_whole_version(dataset, name)
        if last is None:
            return None
        if version is None:
            with contextlib.suppress(DeltaError, OSError, ValueError):
                return DeltaTable(dataset.address(name), version=last, storage_options=options)
        said = str(error).splitlines()[0]
        raise StoreError(
            f"the log of the table {name} in {dataset.url} is damaged: {said}; "
            f"`pairmill verify {dataset.url} --repair` says more"
        ) from error


def commit_records(dataset: Dataset, name: str) -> list[tuple[int, str]]:
    """Version and path of each commit record of a table that is there, in order."""
    found = []
    for path in list_folder(dataset, dataset.path(name, LOG)):
        stem, ending = posixpath.splitext(posixpath.basename(path))
        if ending == ".json" and stem.isdigit():
            found.append((int(stem), path))
    return sorted(found)


def is_whole(dataset: Dataset, path: str) -> bool:
    """Whether a commit record was written to its end."""
    try:
        actions = [json.loads(line) for line in dataset.fs.cat_file(path).splitlines() if line.strip()]
    except (OSError, ValueError):
        return False
    files = sum("add" in action or "remove" in action for action in actions)
    said = [a["commitInfo"].get(_ACTIONS) for a in actions if "commitInfo" in a]
    return bool(said) and (said[0] is None or int(said[0]) == files)


def last_whole_version(dataset: Dataset, name: str) -> int | None:
    """The last version whose record is whole; None when there is none."""
    for version, path in reversed(commit_records(dataset, name)):
        if is_whole(dataset, path):
            return version
    return None


def set_torn_aside(dataset: Dataset, name: str) -> list[str]:
    """Rename commit records at the end of the log that are not whole, so that the next commit can take their place.

    Only for the holder of the lock. Returns their names. In object stores there are none: they show whole objects only.

    Raises:
        StoreError: a snapshot needs the version, or nothing can make again what the record said: then it is damage.
    """
    torn: list[str] = []
    if not dataset.local:
        return torn
    for version, path in reversed(commit_records(dataset, name)):
        if is_whole(dataset, path):
            break
        if version > 0 and (not _COMPUTED.fullmatch(name) or version <= _newest_needed(dataset, name)):
            raise StoreError(
                f"the log of the table {name} in {dataset.url} is damaged: the record of version {version} is not "
                f"whole; `pairmill verify {dataset.url} --repair` mends it"
            )
        dataset.fs.mv(path, f"{path}{TORN}")
        torn.append(posixpath.basename(path))
    return torn


def _newest_needed(dataset: Dataset, name: str) -> int:
    """The newest version of a table that a published snapshot names; -1 without any."""
    return max((record.tables.get(name, -1) for record in dataset.snapshots()), default=-1)


def list_files(dataset: Dataset, table: str, delta: DeltaTable) -> list[DataFile]:
    """The data files of a Delta table, by shard and name."""
    actions = pa.table(delta.get_add_actions(flatten=True))
    if actions.num_rows == 0:
        return []
    names = ["path", "num_records", "size_bytes"]
    paths, rows, sizes = (actions.column(c).to_pylist() for c in names)
    partitioned = "partition.shard" in actions.column_names
    shards = actions.column("partition.shard").to_pylist() if partitioned else [-1] * len(paths)
    found = [
        DataFile(dataset.path(table, path), path, int(shard), count, size)
        for path, shard, count, size in zip(paths, shards, rows, sizes, strict=True)
    ]
    return sorted(found, key=lambda f: (f.shard, f.relative))


class _Delta:
    """What both kinds of table share."""

    partitioned: bool

    def __init__(self, dataset: Dataset, name: str, schema: pa.Schema) -> None:
        self.dataset = dataset
        self.name = name
        self.schema = schema

    @property
    def delta_schema(self) -> pa.Schema:
        """The schema in the Delta log: that of the files, and ``shard`` where the table is partitioned."""
        return self.schema.append(fields.SHARD) if self.partitioned else self.schema

    def version(self) -> int:
        """The version of the last commit; -1 before the first one."""
        delta = self._latest()
        return -1 if delta is None else int(delta.version())

    def files(self, version: int | None = None) -> list[DataFile]:
        """The files of a version (the latest by default), by shard and name."""
        delta = self._latest() if version is None else open_delta(self.dataset, self.name, version)
        return [] if delta is None else list_files(self.dataset, self.name, delta)

    def removals(self) -> int:
        """How many commits took files out of it. A file that was taken out still lies there; work that comes again
        after a removal must not be mistaken for the work that was done before it."""
        delta = self._latest()
        return 0 if delta is None else int(delta.transaction_version(_REMOVALS) or 0)

    def _latest(self) -> DeltaTable | None:
        """The latest version. While this process holds the right to write it reads the log of an object store once in a
        while only: nobody else commits, but to tables of records."""
        held = self._held
        if held is None:
            return open_delta(self.dataset, self.name)
        opened, delta = held.get(self.name, (float("-inf"), None))
        if time.monotonic() - opened > _HOLD_S:
            delta = open_delta(self.dataset, self.name)
            held[self.name] = time.monotonic(), delta
        return delta

    @property
    def _held(self) -> dict[str, tuple[float, DeltaTable | None]] | None:
        return self.dataset.held if self.partitioned else None

    def _commit(
        self,
        new: Sequence[DataFile],
        remove: Sequence[DataFile],
        transaction: tuple[str, int] | None = None,
        *,
        undo: bool = False,
    ) -> int:
        from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
        from deltalake.exceptions import DeltaError
        from deltalake.transaction import AddAction, RemoveAction

        dataset = self.dataset
        dataset.check_lock()
        try:
            delta = self._latest()
            opened, _ = self._held.pop(self.name) if self._held else (0.0, None)  # it comes back when all went well
            if delta is not None and self._held is not None:
                delta.update_incremental()
            if delta is None:
                delta = DeltaTable.create(
                    dataset.address(self.name),
                    schema=self.delta_schema,
                    partition_by=["shard"] if self.partitioned else None,
                    mode="ignore",
                    configuration=_CONFIGURATION,
                    storage_options=dataset.delta_options,
                )
                delta.update_incremental()
            self._add_columns(delta)
            if transaction is not None and not undo:
                done = delta.transaction_version(transaction[0])
                if done is not None and done >= transaction[1]:
                    return int(delta.version())
            present = {f.relative for f in list_files(dataset, self.name, delta)}
            now = int(time.time() * 1000)
            actions: list[AddAction | RemoveAction] = [
                AddAction(
                    path=f.relative,
                    size=f.size,
                    partition_values=self._partition(f),
                    modification_time=now,
                    data_change=True,
                    stats=json.dumps({"numRecords": f.rows}),
                )
                for f in new
                if f.relative not in present
            ]
            staying = {f.relative for f in new}
            actions += [
                RemoveAction(f.relative, True, now, f.size, self._partition(f))
                for f in remove
                if f.relative in present and f.relative not in staying
            ]
            if not actions:
                return int(delta.version())
            transactions = [Transaction(*transaction)] if transaction else []
            if any(isinstance(action, RemoveAction) for action in actions):
                transactions.append(Transaction(_REMOVALS, (delta.transaction_version(_REMOVALS) or 0) + 1))
            delta.create_write_transaction(
                actions,
                "append",
                self.delta_schema,
                ["shard"] if self.partitioned else None,
                commit_properties=CommitProperties(
                    custom_metadata={_ACTIONS: str(len(actions))},
                    app_transactions=transactions or None,
                ),
                post_commithook_properties=PostCommitHookProperties(cleanup_expired_logs=False),
            )
            delta.update_incremental()
            if self._held is not None:
                self._held[self.name] = opened, delta
        except (DeltaError, OSError) as error:
            said = storage.redact(str(error).splitlines()[0])
            raise StoreError(
                f"cannot commit to the table {self.name} in {dataset.url}: {said}; make room or mend access, "
                "then run again: it goes on"
            ) from (error if dataset.local else None)
        version = int(delta.version())
        if dataset.local:
            self._sync(version)
        return version

    def _add_columns(self, delta: DeltaTable) -> None:
        """Tell the log of columns that came with a later version of pairmill: files from before lack them, as null."""
        from deltalake import Schema

        known = {field.name for field in delta.schema().fields}
        missing = [f for f in self.schema if f.name not in known and f.nullable]
        if missing and known:
            delta.alter.add_columns(Schema.from_arrow(pa.schema(missing)).fields)
            delta.update_incremental()

    def _partition(self, file: DataFile) -> dict[str, str | None]:
        return {"shard": str(file.shard)} if self.partitioned else {}

    def _sync(self, version: int) -> None:
        """Make the commit last through a loss of power."""
        folder = self.dataset.path(self.name, LOG)
        with contextlib.suppress(OSError), open(os.path.join(folder, f"{version:020d}.json"), "rb") as record:
            os.fsync(record.fileno())
        sync_folder(folder)


class Table(_Delta):
    """A Delta table partitioned by shard, whose files workers write and the driver commits."""

    partitioned = True

    def commit(
        self,
        new: Sequence[DataFile],
        *,
        replace: Sequence[int] = (),
        remove: Sequence[DataFile] = (),
        transaction: tuple[str, int] | None = None,
        undo: bool = False,
    ) -> int:
        """Make files visible, all at once; in the same commit vanish all other files of the shards in `replace`, and
        the files in `remove`.

        Idempotent: files that are visible already are not added again, and a `transaction` (application, version) that
        was committed before does nothing. With `undo` it is committed all the same, and higher versions of that
        application count as not committed.

        Returns the version of the table.

        Raises:
            StoreError: the commit cannot be written.
        """
        touched = set(replace)
        gone = [f for f in self.files() if f.shard in touched] if touched else []
        return self._commit(new, [*gone, *remove], transaction, undo=undo)

    def writer(self, shard: int, name: str) -> ShardWriter:
        """A writer for one file of a shard."""
        return ShardWriter(self.dataset, self.name, self.schema, shard, name)


class Records(_Delta):
    """A small Delta table of records that the driver appends: snapshots, takedowns, exports."""

    partitioned = False

    def rows(self) -> list[dict[str, Any]]:
        """All records, in no particular order.

        Raises:
            StoreError: a file is missing or damaged.
        """
        return self.table().to_pylist()

    def table(self) -> pa.Table:
        """All records as a table."""
        return self._read(self.files())

    def _read(self, files: Sequence[DataFile]) -> pa.Table:
        columns = read_files(self.dataset, files, self.schema, self.schema.names)
        return pa.table(columns.columns, schema=self.schema)

    def append(self, rows: Sequence[Mapping[str, Any]], transaction: tuple[str, int] | None = None) -> int:
        """Add records, all at once. Returns the version of the table.

        Raises:
            StoreError: they cannot be written.
        """
        return self._put(pa.Table.from_pylist(list(rows), schema=self.schema), transaction)

    def replace(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Put these records in the place of all there are, all at once. Returns the version of the table."""
        return self._put(pa.Table.from_pylist(list(rows), schema=self.schema), None, self.files())

    def remove(self, files: Sequence[DataFile], transaction: tuple[str, int] | None = None) -> int:
        """Take files out, all at once: damaged ones. With a `transaction`, higher versions of its application count as
        not committed. Returns the version of the table."""
        return self._commit([], files, transaction, undo=True)

    def _put(self, rows: pa.Table, transaction: tuple[str, int] | None, remove: Sequence[DataFile] = ()) -> int:
        present = [] if remove else self.files()
        if len(present) >= COMPACT_AT:
            rows, remove = pa.concat_tables([self._read(present), rows]), present
        if not rows.num_rows:
            return self._commit([], remove)
        with ShardWriter(self.dataset, self.name, self.schema, -1, f"records-{time.time_ns():x}") as writer:
            writer.write(rows)
            return self._commit([writer.close()], remove, transaction)
