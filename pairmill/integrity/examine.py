"""Is a dataset whole? Every file that a version names, every log, every record."""

from __future__ import annotations

import os
import posixpath
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pairmill.engines.beam.outbox import FOLDER as OUTBOXES
from pairmill.errors import ConfigError, StoreError
from pairmill.integrity.findings import Finding, Integrity, Kind
from pairmill.integrity.logs import (
    LOG,
    TORN,
    Flaw,
    Log,
    LogProblem,
    Version,
    files_at,
    first_line,
    one_off,
    open_version,
    read_log,
    shard_in,
)
from pairmill.isolate import MARKS
from pairmill.report.progress import Reporter
from pairmill.store import (
    LEDGER_TABLE,
    PAIRS_TABLE,
    REWRITES,
    REWRITES_TABLE,
    SNAPSHOTS_TABLE,
    DataFile,
    Dataset,
    checksum_of,
    read_files,
)
from schemas.snapshot import SNAPSHOTS, SnapshotRecord

THREADS = min(8, 2 * (os.cpu_count() or 1))
"""Files that are read at a time; hashing lets go of the interpreter."""
WINDOW = 4 * THREADS
"""Files that wait at most, so that memory stays bounded."""

LOST = -1
"""Version of a finding of which no record is at fault: what it says cannot be found out."""

_STAGE = re.compile(r".+-[0-9a-f]{8}\Z")


def examine(dataset: Dataset, reporter: Reporter, *, quick: bool = False) -> Integrity:
    """Look at every file that the latest version of a table, or a published snapshot, needs.

    With `quick` only presence and size of data files are looked at, and the logs. Nothing is changed.

    Raises:
        ConfigError: there is no dataset.
    """
    with dataset.reading():
        return Examination(dataset, reporter, quick=quick).run()


def is_stage_table(name: str) -> bool:
    """Whether a table holds what a stage measured, so that it can be computed again."""
    return _STAGE.match(name) is not None


def holds_records(name: str) -> bool:
    """Whether a table holds records that nothing can compute again."""
    return name not in (PAIRS_TABLE, LEDGER_TABLE) and not is_stage_table(name)


@dataclass(frozen=True)
class _Seen:
    """What is wrong with one data file."""

    kind: Kind
    detail: str
    size: int = 0
    schema: bool = False
    """The log's schema is what is wrong."""


def _wrong_size(file: DataFile, size: int) -> _Seen | None:
    if size < file.size:
        return _Seen(Kind.TRUNCATED, f"{size} bytes of {file.size}", size)
    if size > file.size:
        return _Seen(Kind.FLIPPED, f"{size} bytes, and not {file.size}", size)
    return None


@dataclass
class Need:
    """A data file and who needs it."""

    file: DataFile
    current: bool = False
    snapshots: set[int] = field(default_factory=set)


class Examination:
    """One examination; `whole`: paths of files that need not be hashed again."""

    def __init__(
        self, dataset: Dataset, reporter: Reporter, *, quick: bool = False, whole: frozenset[str] = frozenset()
    ) -> None:
        self._dataset = dataset
        self._reporter = reporter
        self._quick = quick
        self._known = whole
        self._findings: list[Finding] = []
        self._whole: set[str] = set()
        self._columns: dict[str, frozenset[str]] = {}
        """Of each table, by its log."""
        self.logs: dict[str, Log] = {}
        self.needs: dict[str, dict[str, Need]] = {}
        """By table and path below it."""
        self.records: list[SnapshotRecord] = []
        """Snapshots whose records can be read."""

    def run(self) -> Integrity:
        """Look at everything."""
        begin = time.monotonic()
        dataset = self._dataset
        dataset.fs.invalidate_cache()
        names = dataset.tables()
        if not names:
            raise ConfigError(f"{dataset.url} is no pairmill dataset; `pairmill run CONFIG.yaml` makes one")
        rows = readable_rows(dataset, SNAPSHOTS_TABLE, SNAPSHOTS)
        self.records = sorted((SnapshotRecord.from_row(row) for row in rows), key=lambda r: r.id)
        rewrites = read_rewrites(dataset)
        named = {table for record in self.records for table in record.tables}
        tables = sorted({*names, *named})
        for table in tables:
            self._look_at_log(table, rewrites)
        self._look_for_lost_pairs()
        self._count_rows(rewrites)
        self._look_at_files()
        self._look_for_rest()
        files = [need.file for needs in self.needs.values() for need in needs.values()]
        self._findings.sort(key=lambda f: (not f.damage, f.table, f.shard is None, f.shard or 0, f.path))
        return Integrity(
            findings=tuple(self._findings),
            tables=len(tables),
            snapshots=tuple(r.id for r in self.records),
            files=len(files),
            bytes=sum(f.size for f in files),
            unnamed=sum(not f.checksum for f in files),
            quick=self._quick,
            seconds=round(time.monotonic() - begin, 3),
            whole=frozenset(self._whole),
        )

    # -- logs --

    def _look_at_log(self, table: str, rewrites: Mapping[tuple[str, str], tuple[str | None, int, int]]) -> None:
        wanted: dict[int | None, list[int]] = {None: []}
        for record in self.records:
            if table in record.tables:
                wanted.setdefault(record.tables[table], []).append(record.id)
        log = read_log(self._dataset, table, [version for version in wanted if version is not None])
        self.logs[table] = log
        needs = self.needs.setdefault(table, {})
        opened: dict[int | None, Version] = {}
        for version, snapshots in wanted.items():
            try:
                same = opened.get(None) if version == log.last and not log.flaws else None
                opened[version] = same or open_version(self._dataset, table, version)
                files = opened[version].files
            except LogProblem as problem:
                flaw = self._first_unreadable(log, version, str(problem))
                if not any(f.version <= flaw.version for f in log.flaws):
                    log.flaws.append(flaw)
                continue
            if version is not None:
                files = self._dataset.replaced(table, files, rewrites)
            for file in files:
                need = needs.setdefault(file.relative, Need(file))
                need.current |= version is None
                need.snapshots.update(snapshots)
        if None in opened:
            self._columns[table] = opened[None].columns
        newest = max((record.id for record in self.records), default=0)
        for version, number in sorted(log.guards.items())[-1:] if table == SNAPSHOTS_TABLE else ():
            if number > newest and not log.flaws and self._all_readable(needs):
                path = posixpath.join(table, LOG, posixpath.basename(log.versions[version]))
                detail = f"it says that snapshot {number} is published; the newest record is {newest}"
                log.flaws.append(Flaw(Kind.MISMATCH, version, path, detail))
        for flaw in log.flaws:
            needed = sorted(i for v, ids in wanted.items() if v is not None and v >= flaw.version for i in ids)
            current = flaw.kind is Kind.LOG_GAP or flaw.version <= log.last
            self._findings.append(
                Finding(
                    flaw.kind,
                    table,
                    None,
                    flaw.path,
                    current,
                    tuple(needed),
                    flaw.detail,
                    self._size(flaw.path),
                    flaw.version,
                )
            )

    def _all_readable(self, needs: Mapping[str, Need]) -> bool:
        """Whether no record of a snapshot is lost or damaged."""
        return sum(need.file.rows for need in needs.values() if need.current) == len(self.records)

    def _first_unreadable(self, log: Log, version: int | None, problem: str) -> Flaw:
        """The record from which on the log cannot be read."""
        for candidate in sorted(log.versions):
            try:
                files_at(self._dataset, log.table, candidate)
            except LogProblem as error:
                path = posixpath.join(log.table, LOG, posixpath.basename(log.versions[candidate]))
                return Flaw(Kind.UNREADABLE, candidate, path, f"the log cannot be read from here on: {error}")
        last = log.last if version is None else version
        return Flaw(Kind.UNREADABLE, last, posixpath.join(log.table, LOG), f"the log cannot be read: {problem}")

    def _size(self, path: str) -> int:
        full = self._dataset.path(path)
        return int(self._dataset.fs.size(full) or 0) if self._dataset.fs.isfile(full) else 0

    def readable(self, table: str) -> bool:
        """Whether the latest version of a table can be opened."""
        return table in self._columns

    def _look_for_lost_pairs(self) -> None:
        """Shards of which the ledger has rows and the pairs have none: not even their log knows the file any more."""
        ledger = self.needs.get(LEDGER_TABLE, {}).values()
        pairs = self.needs.get(PAIRS_TABLE, {})
        if not (self.readable(PAIRS_TABLE) and self.readable(LEDGER_TABLE)):
            return
        here = {need.file.shard for need in pairs.values() if need.current}
        for need in ledger:
            shard = need.file.shard
            if need.current and shard not in here:
                relative = f"shard={shard}/pairs.parquet"
                lost = DataFile(self._dataset.path(PAIRS_TABLE, relative), relative, shard, 0, 0)
                pairs.setdefault(relative, Need(lost, True)).snapshots.update(need.snapshots)

    def _count_rows(self, rewrites: Mapping[tuple[str, str], tuple[str | None, int, int]]) -> None:
        """Snapshots say how many pairs they have. A takedown takes rows out of them, so after one nothing is said."""
        for record in self.records:
            for table in (PAIRS_TABLE, LEDGER_TABLE):
                files = [need.file for need in self.needs[table].values() if record.id in need.snapshots]
                rows, version = sum(file.rows for file in files), record.tables.get(table)
                if not files or version is None or any(name == table for name, _ in rewrites):
                    continue
                if rows < record.admitted:
                    path = posixpath.join(table, LOG, f"{version:020d}.json")
                    detail = f"snapshot {record.id} has {record.admitted} pairs; this version has {rows} rows"
                    self._findings.append(
                        Finding(Kind.MISMATCH, table, None, path, False, (record.id,), detail, version=LOST)
                    )

    # -- data files --

    def _look_at_files(self) -> None:
        every = [(table, need) for table, needs in sorted(self.needs.items()) for need in needs.values()]
        self._reporter.start("verify", len(every), "files")
        looks = in_threads(lambda item: self._look(item[0], item[1].file, self._columns.get(item[0])), every)
        for (table, need), seen in looks:
            if seen is None:
                if not self._quick and need.file.checksum:
                    self._whole.add(need.file.path)
            else:
                self._findings.append(
                    Finding(
                        seen.kind,
                        table,
                        shard_or_none(need.file.relative),
                        posixpath.join(table, need.file.relative),
                        need.current,
                        tuple(sorted(need.snapshots)),
                        seen.detail,
                        seen.size,
                        self._at_fault(table, need.file, seen),
                    )
                )
            self._reporter.advance(1, {} if seen is None else {seen.kind.value: 1})
        self._reporter.finish()

    def _at_fault(self, table: str, file: DataFile, seen: _Seen) -> int | None:
        """The record that says what is not so."""
        if seen.kind is not Kind.MISMATCH:
            return None
        return 0 if seen.schema else self.logs[table].added.get(file.relative)

    def _look(self, table: str, file: DataFile, columns: frozenset[str] | None) -> _Seen | None:
        """What is wrong with a file."""
        try:
            size = int(self._dataset.fs.size(file.path))
        except FileNotFoundError:
            return self._missing(table, file)
        except OSError as error:
            return _Seen(Kind.UNREADABLE, f"it cannot be read: {first_line(error)}")
        if self._quick:
            return _wrong_size(file, size)
        try:
            if not file.checksum:
                return _wrong_size(file, size) or self._unreadable(file, size)
            if file.path not in self._known and checksum_of(self._dataset, file.path) != file.checksum:
                flipped = _Seen(Kind.FLIPPED, "its bytes do not have the checksum in its name", size)
                return _wrong_size(file, size) or flipped
            return self._mismatch(file, size, columns)
        except FileNotFoundError:
            return _Seen(Kind.MISSING, "the file is not there")
        except (OSError, pa.ArrowException) as error:
            return _Seen(Kind.UNREADABLE, f"it cannot be read: {first_line(error)}", size)

    def _mismatch(self, file: DataFile, size: int, columns: frozenset[str] | None) -> _Seen | None:
        """What the log says wrongly of a file whose bytes are whole."""
        if size != file.size:
            return _Seen(Kind.MISMATCH, f"the log says {file.size} bytes; the file is whole and has {size}", size)
        if file.shard != shard_in(file.relative):
            return _Seen(Kind.MISMATCH, f"the log says shard {file.shard}", size)
        with self._dataset.fs.open(file.path, "rb") as opened:
            footer = pq.read_metadata(opened)
        if footer.num_rows != file.rows:
            return _Seen(Kind.MISMATCH, f"the log says {file.rows} rows; the file has {footer.num_rows}", size)
        unknown = sorted(set(footer.schema.to_arrow_schema().names) - columns) if columns is not None else []
        return _Seen(Kind.MISMATCH, f"the log does not know its columns {unknown}", size, True) if unknown else None

    def _unreadable(self, file: DataFile, size: int) -> _Seen | None:
        """A file without a checksum in its name: does all of it read, and is it as long as the log says?"""
        rows = 0
        with self._dataset.fs.open(file.path, "rb") as opened:
            parquet = pq.ParquetFile(opened, page_checksum_verification=True)
            for group in range(parquet.num_row_groups):
                rows += parquet.read_row_group(group).num_rows
        return None if rows == file.rows else _Seen(Kind.UNREADABLE, f"{rows} rows of {file.rows}", size)

    def _missing(self, table: str, file: DataFile) -> _Seen:
        """A file that is not there. If one is whose name differs in one character, then the log is wrong."""
        root = self._dataset.path(table)
        try:
            paths = self._dataset.fs.ls(posixpath.dirname(file.path), detail=False)
        except OSError:
            paths = []
        near = one_off(file.relative, [str(path)[len(root) :].lstrip("/") for path in paths])
        if near is None:
            return _Seen(Kind.MISSING, "the file is not there")
        return _Seen(Kind.MISMATCH, f"the log misnames {near}")

    # -- what nobody needs --

    def _look_for_rest(self) -> None:
        for path, size in walk(self._dataset):
            table, _, relative = path.partition("/")
            if table == MARKS:
                shard = relative.split("-")[0]
                owner = int(shard) if shard.isdigit() else None
                detail = "a worker died on this shard, or is at work on it"
                self._findings.append(Finding(Kind.LEFTOVER, "", owner, path, False, (), detail, size))
            elif table == OUTBOXES:
                detail = "of a run on Beam that was killed, or is under way"
                self._findings.append(Finding(Kind.LEFTOVER, "", None, path, False, (), detail, size))
            elif path.endswith((".tmp", TORN)):
                detail = "an unfinished file" if path.endswith(".tmp") else "a record that was set aside"
                table = table if table in self.logs else ""
                self._findings.append(Finding(Kind.LEFTOVER, table, shard_or_none(path), path, False, (), detail, size))
            elif table in self.logs and path.endswith(".parquet") and not relative.startswith(LOG):
                if relative in self.needs[table] or relative in self.logs[table].added:
                    continue
                detail = "no version names it"
                self._findings.append(Finding(Kind.ORPHAN, table, shard_or_none(path), path, False, (), detail, size))


def shard_or_none(path: str) -> int | None:
    """The shard that a path says."""
    shard = shard_in(path)
    return shard if shard >= 0 else None


def walk(dataset: Dataset) -> Iterator[tuple[str, int]]:
    """Path below the dataset and size of every file that is there."""
    if dataset.local:
        for folder, _, names in os.walk(dataset.root):
            for name in names:
                full = os.path.join(folder, name)
                try:
                    size = os.path.getsize(full)
                except OSError:  # gone meanwhile
                    continue
                yield os.path.relpath(full, dataset.root).replace(os.sep, "/"), size
        return
    for path, entry in dataset.fs.find(dataset.root, detail=True).items():
        yield str(path)[len(dataset.root) :].lstrip("/"), int(entry.get("size") or 0)


def in_threads(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Each item with what `work` returns for it, in order, a few at a time."""
    waiting: deque[tuple[Any, Future[Any]]] = deque()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="pairmill-verify") as pool:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) >= WINDOW:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()


def readable_rows(dataset: Dataset, table: str, schema: pa.Schema) -> list[dict[str, Any]]:
    """The records of a table whose files can be read; damaged ones are left out."""
    try:
        files = files_at(dataset, table)
    except LogProblem:
        return []
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            if not file.checksum or checksum_of(dataset, file.path) == file.checksum:
                rows += read_files(dataset, [file], schema, schema.names).to_pylist()
        except (OSError, StoreError):
            continue
    return rows


def read_rewrites(dataset: Dataset) -> dict[tuple[str, str], tuple[str | None, int, int]]:
    """As `Dataset.rewrites`; records that cannot be read are left out."""
    try:
        return dataset.rewrites()
    except StoreError:
        rows = readable_rows(dataset, REWRITES_TABLE, REWRITES)
        return {(r["table"], r["old"]): (r["new"], r["rows"], r["size"]) for r in rows}
