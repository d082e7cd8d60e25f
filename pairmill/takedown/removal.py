"""Carrying a takedown out. It can be killed at any point; the next `forget` or run goes on.

In this order:

1. The request is recorded as tombstones: hashes only. That needs no lock, so a run that is under way sees them before
   it publishes.
2. Under the dataset's lock the journal of paid answers goes into its table, and all files are searched, those of old
   versions and those that no version names too. What is found is written down as a sum (the table ``takedowns``), then
   all pairs that go become tombstones: from here on who goes does not depend on what is left of them.
3. Requests about them leave the batches of instruction data that wait or are under way. Each file that holds something
   of them, and that the latest version or a snapshot reads, gets a copy without it.
4. The table ``rewrites`` says which copy stands for which file, so old snapshots read the copies.
5. Each table's latest version gets the copies in a commit.
6. A snapshot is published, unless the last one had none of the pairs.
7. When nobody reads the old files any more they are deleted, with all others that hold something of the pairs and with
   those that were never finished.
8. Exports are mended, or listed as having left.
9. The report is written down, and a record says that the request is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import posixpath
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pairmill.answers import fold
from pairmill.engines.beam.outbox import clear
from pairmill.errors import ConfigError, DatasetLocked, StoreError
from pairmill.export.registry import KnownExport, known_exports
from pairmill.export.takedown import Reach, Removal, remove_from_exports
from pairmill.recount import recounted
from pairmill.report.progress import Reporter
from pairmill.seen import SeenFiles
from pairmill.storage import AccessDenied
from pairmill.store import (
    LEDGER_TABLE,
    PAIRS_TABLE,
    REWRITES,
    REWRITES_TABLE,
    DataFile,
    Dataset,
    ShardWriter,
    Snapshot,
    content_digest,
    read_files,
    set_torn_aside,
)
from pairmill.store.files import sync_folder
from pairmill.takedown.search import Columns, Findings, Inventory, Place, open_requests, schema_of, search, without
from pairmill.takedown.selectors import Selectors
from pairmill.tombstones import FOUND, TOMBSTONES, TOMBSTONES_TABLE, now
from schemas import fields
from schemas.reasons import Status

TAKEDOWNS_TABLE = "takedowns"

TAKEDOWNS = pa.schema(
    [
        pa.field("requests", pa.list_(pa.string()), nullable=False),
        pa.field("at", pa.string(), nullable=False),
        pa.field("state", pa.string(), nullable=False),
        pa.field("report", pa.string(), nullable=False),
    ]
)
"""The takedowns table. ``state``: ``found`` before something is removed, ``done`` when all is gone; ``report``: a
`TakedownReport` as JSON. It has counts, and names no pair."""

TRIES = 8
"""Two processes that append to a table at the same moment: one of them has to do it again."""

_WRITERS = 4
"""Files that are copied at once: mostly waiting for the disk."""


@dataclass(frozen=True)
class TableTakedown:
    """What a takedown does to a table, in all its versions."""

    rows: int
    """Rows of the pairs."""
    names: int
    """Rows of other pairs that named one; they stay, without the name."""
    files: int
    """Files that hold something of the pairs; they are deleted."""
    bytes: int
    """Size of these files."""
    copies: int
    """Files of them that the latest version or a snapshot reads, so that a copy without the pairs takes their place."""


@dataclass(frozen=True)
class ExportTakedown:
    """What a takedown does to an export."""

    out: str
    format: str
    snapshot: int
    at: str
    """When it was last written, as far as the dataset knows; UTC, ISO 8601."""
    reach: str
    """A value of `pairmill.export.takedown.Reach`."""
    held: int | None
    """Pairs of the takedown that the snapshot and the condition of the export select; null when that is unknown."""
    removed: int = 0
    """Samples that were removed from it or, looking ahead, that are in it."""
    rewritten: int = 0
    """Files that were written anew."""
    deleted: int = 0
    """Unfinished and damaged files that were deleted."""
    left: tuple[str, ...] = ()
    """Files that may hold such a pair still."""
    note: str = ""

    @property
    def has_left(self) -> bool:
        """Whether it is out of reach, so that whoever has it must be told."""
        return self.reach not in (Reach.EXPORT.value, Reach.BUSY.value)


@dataclass(frozen=True)
class TakedownReport:
    """What a takedown removes or removed."""

    requests: tuple[str, ...]
    at: str
    """When it was carried out; UTC, ISO 8601."""
    done: bool
    pairs: int
    """Pairs that were there, in any version."""
    by: dict[str, int]
    """The same by what named them first: url, domain, sha256, near, uid; earlier for what an earlier request named."""
    kept: int
    """Pairs of them that the last snapshot kept."""
    images: int
    """Pairs of them with a stored image."""
    tables: dict[str, TableTakedown]
    exports: tuple[ExportTakedown, ...]
    leftovers: int = 0
    """Files that were never finished, or that nothing needs and nobody can read; they are deleted too."""
    snapshot: int | None = None
    """The snapshot that was published after it; null when the last one had none of the pairs."""
    waits_for: tuple[str, ...] = ()
    """Why it is not done."""
    seconds: float = 0.0

    def to_json(self) -> str:
        """As JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TakedownReport:
        """The inverse of `to_json`."""
        value = json.loads(text)
        exports = [ExportTakedown(**{**export, "left": tuple(export["left"])}) for export in value["exports"]]
        tables = {name: TableTakedown(**table) for name, table in value["tables"].items()}
        lists = {name: tuple(value[name]) for name in ("requests", "waits_for")}
        return cls(**{**value, **lists, "exports": tuple(exports), "tables": tables})


# -- asking -----------------------------------------------------------------------------------------------------------


def preview(dataset: Dataset, selectors: Selectors, reporter: Reporter) -> TakedownReport:
    """What `forget` would remove, without removing it. Requests that are not done yet count too.

    Raises:
        ConfigError: there is no dataset.
        StoreError: a file is damaged.
    """
    _require(dataset)
    with dataset.reading():
        inventory = Inventory(dataset)
        findings = search(inventory, selectors.tombstones("preview"), reporter)
        account = _account(dataset, inventory, findings, ())
        if not findings.tombstones.uids:
            return account
        removals = remove_from_exports(dataset, findings.tombstones.uids, dry_run=True)
        return replace(account, exports=_with_removals(account.exports, removals))


def record(dataset: Dataset, selectors: Selectors) -> str:
    """Write a request down as tombstones: from now on nothing that it names gets in. Needs no lock.

    Returns:
        The name of the request.

    Raises:
        ConfigError: there is no dataset.
        StoreError: it cannot be written.
    """
    _require(dataset)
    moment = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    request = f"{moment}-{secrets.token_hex(4)}"
    _append_tombstones(dataset, selectors.tombstones(request))
    return request


def forget(dataset: Dataset, selectors: Selectors, reporter: Reporter, wait_s: float = 60.0) -> TakedownReport:
    """Remove for good what the selectors name, and keep it out.

    Args:
        dataset: Where from.
        selectors: What.
        reporter: Told how it goes.
        wait_s: How long to wait for a run that holds the lock, and for exports that read, seconds.

    Returns:
        What was removed; not `done` when an export was reading all that time: then the pairs are in no snapshot any
        more, and the old files go with the next `forget` or run.

    Raises:
        ConfigError: there is no dataset.
        DatasetLocked: a run held the lock all that time. The request is recorded; the run heeds it.
        StoreError: a file is damaged, or something cannot be written.
    """
    request = record(dataset, selectors)
    try:
        report = resume(dataset, reporter, wait_s)
    except DatasetLocked as error:
        raise DatasetLocked(
            f"the request {request} is recorded, but {error}. The run under way leaves these pairs out when it "
            "publishes, and nothing that the request names is admitted; what is stored of them is removed by the "
            "next `pairmill run` or `pairmill forget`"
        ) from error
    if report is None:  # between recording and locking, another process carried it out
        return _stored(dataset, request)
    return report


def resume(dataset: Dataset, reporter: Reporter, wait_s: float = 60.0) -> TakedownReport | None:
    """`finish` under the dataset's lock: goes on with what was recorded and not done.

    Raises:
        ConfigError: there is no dataset.
        DatasetLocked: a run held the lock all that time.
        StoreError: a file is damaged, or something cannot be written.
    """
    _require(dataset)
    with dataset.lock(wait_s):
        for name in dataset.tables() if dataset.local else ():  # object stores show whole objects only
            set_torn_aside(dataset, name)
        return finish(dataset, reporter, wait_s)


def finish(dataset: Dataset, reporter: Reporter, wait_s: float = 0.0) -> TakedownReport | None:
    """Carry out all requests that are recorded and not done. Only for the holder of the dataset's lock.

    Args:
        dataset: Whose requests.
        reporter: Told how it goes.
        wait_s: How long to wait for exports that read old files, seconds; if they do not end in time, the old files
            stay until the next call.

    Returns:
        What was removed, or None when there was nothing to do.

    Raises:
        StoreError: a file is damaged, or something cannot be written.
    """
    requests = open_requests(dataset.records(TOMBSTONES_TABLE, TOMBSTONES).rows())
    return _Takedown(dataset, tuple(requests), reporter, wait_s).carry_out() if requests else None


def _require(dataset: Dataset) -> None:
    if not dataset.exists():
        raise ConfigError(f"{dataset.url} is no pairmill dataset, so there is nothing to forget in it")


def _append_tombstones(dataset: Dataset, rows: Sequence[dict[str, Any]]) -> None:
    """Add records to the tombstones, which other processes may do at the same moment."""
    for last in (*[False] * (TRIES - 1), True):
        try:
            dataset.records(TOMBSTONES_TABLE, TOMBSTONES).append(rows)
        except (StoreError, OSError) as error:
            if last or isinstance(error, AccessDenied):
                raise
            time.sleep(secrets.randbelow(200) / 1000)
        else:
            return


def _stored(dataset: Dataset, request: str) -> TakedownReport:
    """The report of a request that is done."""
    rows = dataset.records(TAKEDOWNS_TABLE, TAKEDOWNS).rows()
    found = [row for row in rows if request in row["requests"] and row["state"] == "done"]
    return TakedownReport.from_json(max(found, key=lambda row: row["at"])["report"])


# -- doing ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Replaced:
    table: str
    old: DataFile
    new: DataFile | None


class _Takedown:
    """All open requests, carried out together."""

    def __init__(self, dataset: Dataset, requests: tuple[str, ...], reporter: Reporter, wait_s: float) -> None:
        self.dataset = dataset
        self.requests = requests
        self.reporter = reporter
        self.wait_s = wait_s
        self.begin = time.monotonic()
        self.locks: dict[int, threading.Lock] = {}

    def carry_out(self) -> TakedownReport:
        """Do all of it, in the order that the module says."""
        fold(self.dataset, alone=True)  # whoever asked for answers is done, or dead: the lock is held
        inventory = Inventory(self.dataset)
        findings = search(inventory, (), self.reporter)
        account = _account(self.dataset, inventory, findings, self.requests)
        if account.pairs or account.tables:
            self.write_down("found", account)
        self.follow(findings)
        self.leave_batches(findings)
        replaced = self.copy(inventory, findings)
        self.stand_in(replaced)
        self.commit(inventory, replaced)
        snapshot = self.publish()
        account = replace(self.first_account(account), snapshot=snapshot)
        try:
            with self.dataset.alone(self.wait_s):
                self.delete(inventory, findings)
                report = self.mend_exports(account, findings)
        except DatasetLocked as error:
            report = replace(account, waits_for=(str(error),))
        report = replace(report, at=now(), seconds=round(time.monotonic() - self.begin, 3))
        if report.waits_for:
            self.reporter.note(f"taken down: {report.pairs} pairs, in part: {'; '.join(report.waits_for)}")
            return report
        report = replace(report, done=True)
        self.write_down("done", report)
        at = now()
        _append_tombstones(
            self.dataset, [{"kind": "", "hash": "", "request": r, "at": at, "done": True} for r in self.requests]
        )
        self.reporter.note(f"taken down: {report.pairs} pairs")
        return report

    def write_down(self, state: str, report: TakedownReport) -> None:
        """Add a report to the takedowns table."""
        row = {"requests": list(self.requests), "at": now(), "state": state, "report": report.to_json()}
        self.dataset.records(TAKEDOWNS_TABLE, TAKEDOWNS).append([row])

    def first_account(self, account: TakedownReport) -> TakedownReport:
        """What was there before the first attempt removed something of it."""
        rows = self.dataset.records(TAKEDOWNS_TABLE, TAKEDOWNS).rows()
        mine = [row for row in rows if row["state"] == "found" and {*row["requests"]} & {*self.requests}]
        earlier = [TakedownReport.from_json(row["report"]) for row in sorted(mine, key=lambda row: row["at"])]
        return replace(max([*earlier, account], key=lambda report: report.pairs), requests=self.requests)

    def follow(self, findings: Findings) -> None:
        """Make tombstones of what was found."""
        at, marks = now(), []
        for request in self.requests:
            found = [(f"{FOUND}uid", uid) for uid in sorted(findings.pairs_of.get(request, ()))]
            found += [(f"{FOUND}{kind}", digest) for kind, digest in sorted(findings.images.get(request, ()))]
            marks += [{"kind": k, "hash": h, "request": request, "at": at, "done": False} for k, h in found]
        if marks:
            _append_tombstones(self.dataset, marks)

    def leave_batches(self, findings: Findings) -> None:
        """Take requests about the pairs, and results of them, out of the batches of instruction data."""
        from captioners.instruct.batch import forget

        forget(self.dataset, findings.tombstones.uids)

    def copy(self, inventory: Inventory, findings: Findings) -> list[_Replaced]:
        """Write a copy of each file that is needed, without the pairs."""
        uids = pa.array(sorted(findings.tombstones.uids), pa.string())
        todo = [
            (table, place)
            for table, places in sorted(findings.places.items())
            for place in places
            if place.file.relative in inventory.needed(table)
        ]
        # two versions of a ledger may have the same rest, and so the same file
        self.locks = {place.file.shard: threading.Lock() for _, place in todo}
        replaced = []
        self.reporter.start("rewriting files", len(todo), "files")
        with ThreadPoolExecutor(_WRITERS) as pool:
            for done in pool.map(lambda item: self._copied(item[0], item[1], uids), todo):
                replaced.append(done)
                self.reporter.advance(1, {})
        self.reporter.finish()
        return replaced

    def _copied(self, table: str, place: Place, uids: pa.Array) -> _Replaced:
        dataset, file = self.dataset, place.file
        schema = schema_of(dataset, file.path)
        columns = Columns.of(schema)
        name = f"rest-{hashlib.sha256(file.relative.encode()).hexdigest()[:16]}"
        try:
            with dataset.fs.open(file.path, "rb") as opened:
                parquet = pq.ParquetFile(opened)
                if parquet.metadata.num_rows == place.rows:
                    return _Replaced(table, file, None)
                if columns.stores_images:
                    parts: Iterator[pa.Table] = map(parquet.read_row_group, range(parquet.num_row_groups))
                else:  # at once, so that the bytes are those of a file that never had the pairs
                    parts = iter([parquet.read()])
                left: Iterator[pa.Table] = (without(_plain(rows, schema), columns, uids) for rows in parts)
                if table == LEDGER_TABLE:  # under the name that a run gives to the same rows
                    rows = next(left).combine_chunks()
                    left, name = iter([rows]), f"ledger-{content_digest(rows)}"
                with self.locks[file.shard], ShardWriter(dataset, table, schema, file.shard, name) as writer:
                    for rows in left:
                        writer.write(rows)
                    return _Replaced(table, file, writer.close())
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"cannot read {file.path}: {error}; `pairmill verify {dataset.url}` says more") from error

    def stand_in(self, replaced: Sequence[_Replaced]) -> None:
        """From now on old snapshots read the copies."""
        rows = [
            {
                "table": r.table,
                "old": r.old.relative,
                "new": r.new.relative if r.new else None,
                "rows": r.new.rows if r.new else 0,
                "size": r.new.size if r.new else 0,
            }
            for r in replaced
        ]
        if rows:
            self.dataset.records(REWRITES_TABLE, REWRITES).append(rows)

    def commit(self, inventory: Inventory, replaced: Sequence[_Replaced]) -> None:
        """Put the copies into the latest version of each table."""
        for table in sorted({r.table for r in replaced}):
            latest = {file.relative for file in inventory.files(table)}
            mine = [r for r in replaced if r.table == table and r.old.relative in latest]
            if mine:
                schema = inventory.columns[table].schema
                new = [r.new for r in mine if r.new is not None]
                stored = self.dataset.table(table, schema)
                before = stored.version() if table == PAIRS_TABLE else -1
                after = stored.commit(new, remove=[r.old for r in mine])
                if table == PAIRS_TABLE:  # what is not here now is barred, so files that were read need not be again
                    SeenFiles(self.dataset, before).save(after)

    def publish(self) -> int | None:
        """Publish what is left, unless the last snapshot is that already. Returns its number."""
        records = self.dataset.snapshots()
        if not records:
            return None
        last = records[-1]
        view = Snapshot(self.dataset, last)
        if sum(file.rows for file in view.files(LEDGER_TABLE)) == last.admitted:
            mine = [r for r in records if r.kind == "forget" and any(name in (r.note or "") for name in self.requests)]
            return mine[-1].id if mine else None
        counts = recounted(view)
        gone = last.admitted - counts.admitted
        left = replace(
            counts,
            id=last.id + 1,
            created_at=now(),
            tables={name: self._version(view, name) for name in last.tables},
            seconds=round(time.monotonic() - self.begin, 3),
            kind="forget",
            note=f"{gone} pairs taken down by {', '.join(self.requests)}",
            computed={},
            stage_seconds={},
            bytes={name: sum(file.size for file in view.files(name)) for name in last.bytes},
        )
        self.dataset.publish(left)
        self.reporter.note(f"published snapshot {left.id} without {gone} pairs that were taken down")
        return left.id

    def _version(self, view: Snapshot, table: str) -> int:
        """The latest version of a table, when it holds just what the snapshot has now; else the snapshot's own, which
        readers see through the rewrites: work of a run that has published nothing yet is no part of it."""
        opened = self.dataset.table(table, pa.schema([]))
        same = [f.relative for f in view.files(table)] == [f.relative for f in opened.files()]
        return opened.version() if same else view.record.tables[table]

    def delete(self, inventory: Inventory, findings: Findings) -> None:
        """Delete every file that holds something of the pairs, and all that is of no use to anybody: vectors, too, that
        a run on Beam left which was killed."""
        paths = [place.file.path for places in findings.places.values() for place in places]
        paths += [file.path for files in inventory.broken.values() for file in files]
        paths += inventory.unfinished
        for path in paths:
            try:
                self.dataset.fs.rm_file(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StoreError(f"cannot delete {path}: {error}; mend access, then run again: it goes on") from error
        if self.dataset.local:
            for folder in sorted({posixpath.dirname(path) for path in paths}):
                sync_folder(folder)
                with contextlib.suppress(OSError):
                    os.rmdir(folder)  # only when it is empty
        clear(self.dataset.url)

    def mend_exports(self, account: TakedownReport, findings: Findings) -> TakedownReport:
        """Take the pairs out of all exports that can be reached."""
        if not findings.tombstones.uids:
            return account
        known = known_exports(self.dataset)
        listed = {export.out for export in account.exports}
        exports = [*account.exports, *(_export(k, None) for k in known if k.out not in listed)]
        removals = remove_from_exports(self.dataset, findings.tombstones.uids) if known else []
        busy = tuple(f"{r.note}" for r in removals if r.reach is Reach.BUSY)
        return replace(account, exports=_with_removals(exports, removals), waits_for=busy)


def _plain(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    return rows.combine_chunks().cast(schema)


def _account(dataset: Dataset, inventory: Inventory, findings: Findings, requests: tuple[str, ...]) -> TakedownReport:
    """The sum of what a search found."""
    tables = {}
    for table, places in sorted(findings.places.items()):
        needed = inventory.needed(table)
        tables[table] = TableTakedown(
            rows=sum(place.rows for place in places),
            names=sum(place.names for place in places),
            files=len(places),
            bytes=sum(place.file.size for place in places),
            copies=sum(place.file.relative in needed for place in places),
        )
    uids = pa.array(sorted(findings.present), pa.string())
    return TakedownReport(
        requests=requests,
        at=now(),
        done=False,
        pairs=len(findings.present),
        by=dict(sorted(findings.pairs.items())),
        kept=_kept(dataset, findings, uids),
        images=findings.stored_images,
        tables=tables,
        exports=tuple(_export(known, held) for known, held in _held(dataset, uids)) if len(uids) else (),
        leftovers=sum(map(len, inventory.broken.values())) + len(inventory.unfinished),
    )


def _kept(dataset: Dataset, findings: Findings, uids: pa.Array) -> int:
    """How many of these pairs the last snapshot keeps."""
    records = dataset.snapshots() if len(uids) else []
    if not records:
        return 0
    concerned = {place.file.relative for place in findings.places.get(LEDGER_TABLE, ())}
    files = [f for f in Snapshot(dataset, records[-1]).files(LEDGER_TABLE) if f.relative in concerned]
    rows = read_files(dataset, files, fields.LEDGER, ["uid", "status"])
    mine = rows.filter(pc.is_in(rows.column("uid"), value_set=uids))
    return int(pc.sum(pc.equal(mine.column("status"), Status.KEPT.value)).as_py() or 0)


def _held(dataset: Dataset, uids: pa.Array) -> Iterable[tuple[KnownExport, int | None]]:
    """How many of these pairs each known export was given, by the snapshot and the condition it was written from."""
    known = known_exports(dataset)
    counted: dict[tuple[int, str | None], int | None] = {}
    for export in known:
        key = (export.snapshot, export.where)
        if key not in counted:
            counted[key] = _selected(dataset, *key, uids)
        yield export, counted[key]


def _selected(dataset: Dataset, snapshot: int, where: str | None, uids: pa.Array) -> int | None:
    import duckdb

    from pairmill.query import connect

    try:
        with connect(dataset.snapshot(snapshot)) as connection:
            kept = connection.sql("FROM pairs WHERE status = 'kept'").set_alias("pairs")
            selected = kept.filter(where or "true").project("uid").to_arrow_table()
    except (ConfigError, StoreError, duckdb.Error):  # the snapshot is gone, or the condition is of another recipe
        return None
    return int(pc.sum(pc.is_in(selected.column("uid"), value_set=uids)).as_py() or 0)


def _export(known: KnownExport, held: int | None) -> ExportTakedown:
    return ExportTakedown(known.out, known.format, known.snapshot, known.at, Reach.UNREACHABLE.value, held)


def _with_removals(exports: Iterable[ExportTakedown], removals: Sequence[Removal]) -> tuple[ExportTakedown, ...]:
    """What was found at each export's address."""
    found = {removal.out: removal for removal in removals}
    whole = []
    for export in exports:
        removal = found.get(export.out)
        if removal is not None:
            export = replace(
                export,
                reach=removal.reach.value,
                removed=removal.samples,
                rewritten=len(removal.rewritten),
                deleted=len(removal.deleted),
                left=removal.left,
                note=removal.note,
            )
        whole.append(export)
    return tuple(whole)
