"""The logs of Delta tables: is each commit record whole, and how one that is not is written anew.

A record is a few lines of JSON: which files a version adds and removes. What a damaged line said can be found again:
the files are there, their names carry checksums, and a row stands in one file of a table only.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pairmill.errors import StoreError
from pairmill.integrity.findings import Kind
from pairmill.store import (
    LEDGER_TABLE,
    PAIRS_TABLE,
    SNAPSHOTS_TABLE,
    DataFile,
    Dataset,
    checksum_of,
    commit_records,
    is_whole,
    open_delta,
)
from pairmill.store.tables import list_files

LOG = "_delta_log"
LAST_CHECKPOINT = "_last_checkpoint"
TORN = ".torn"
"""Added to the name of what is set aside."""
COUNT = "pairmill.actions"
"""In a record: how many files it adds and removes (`pairmill.store.tables`)."""

ADMIT = "admit"
PUBLISH = "publish"
"""Guards in records, that the same refresh is not admitted, and the same snapshot not published, twice."""
REMOVALS = "removals"
"""Counts the records that took files out (`pairmill.store.tables`)."""

_SHARD = re.compile(r"(?:^|/)shard=(\d+)/")
_PATH = re.compile(r'"path":"((?:[^"\\]|\\.)*)"')
_CHECKPOINT = re.compile(r"(\d{20})\.checkpoint(?:\.\d{10}\.\d{10})?\.parquet\Z")
_REFRESH = re.compile(r"(?:^|/)pairs-r(\d+)-")


class LogProblem(Exception):
    """A log, or a version of it, cannot be read."""


@dataclass(frozen=True)
class Flaw:
    """What is wrong with a log."""

    kind: Kind
    version: int
    """Of the record or checkpoint; -1 for the log as a whole."""
    path: str
    """Below the dataset's folder."""
    detail: str


@dataclass
class Log:
    """What the log of one table says."""

    table: str
    versions: dict[int, str]
    """Path of the record of each version that is there."""
    checkpoints: dict[int, list[str]]
    """Paths of the checkpoint of a version."""
    flaws: list[Flaw] = field(default_factory=list)
    added: dict[str, int] = field(default_factory=dict)
    """The version that added a file last, of all that any record names."""
    guards: dict[int, int] = field(default_factory=dict)
    """Of the log of the snapshots: the number that each version says it publishes."""
    refreshes: dict[int, int] = field(default_factory=dict)
    """Which refresh admitted a shard, where the log of the pairs says so."""

    @property
    def last(self) -> int:
        """The last version of which there is anything; -1 without any."""
        return max((*self.versions, *self.checkpoints), default=-1)

    @property
    def first(self) -> int:
        """The version from which the log must be whole."""
        return 0 if 0 in self.versions or not self.checkpoints else min(self.checkpoints)


def shard_in(path: str) -> int:
    """The shard that a file's path says; -1 when it says none."""
    found = _SHARD.search(path)
    return int(found[1]) if found else -1


def refresh_in(path: str) -> int | None:
    """The refresh that the name of a pairs file says."""
    found = _REFRESH.search(path)
    return int(found[1]) if found else None


def read_log(dataset: Dataset, table: str, named: Iterable[int] = ()) -> Log:
    """Read a table's log and say what is wrong with it.

    `named`: versions that snapshots name, so they must be there.
    """
    folder = dataset.path(table, LOG)
    names = {posixpath.basename(p): p for p in _list(dataset, folder)}
    log = Log(table, dict(commit_records(dataset, table)), {})
    for name, path in names.items():
        if found := _CHECKPOINT.match(name):
            log.checkpoints.setdefault(int(found[1]), []).append(path)
    live: dict[str, int] = {}
    known_from_start = 0 in log.versions
    for version in range(log.first, max((log.last, *named), default=-1) + 1):
        record = log.versions.get(version)
        if record is None:
            if version not in log.checkpoints or version > log.first:
                what = "the commit record is not there" if version <= log.last else "the log ends before it"
                log.flaws.append(Flaw(Kind.LOG_GAP, version, _record(table, version), what))
            known_from_start = False
            continue
        whole = is_whole(dataset, record)
        if not whole:
            what = "the commit record is not whole"
            log.flaws.append(Flaw(Kind.TORN_COMMIT, version, _record(table, version), what))
            known_from_start = False
        wrong = _take_in(log, live, version, lenient(dataset, record), strict=whole and known_from_start)
        if whole and wrong:
            log.flaws.append(Flaw(Kind.MISMATCH, version, _record(table, version), wrong))
        if known_from_start and version in log.checkpoints:
            log.flaws += _checkpoint_flaws(dataset, log, version, set(live))
    if not known_from_start:
        for version in log.checkpoints:
            log.flaws += _checkpoint_flaws(dataset, log, version, None)
    if LAST_CHECKPOINT in names and (wrong := _bad_pointer(dataset, names[LAST_CHECKPOINT], log)):
        path = posixpath.join(table, LOG, LAST_CHECKPOINT)
        log.flaws.append(Flaw(Kind.UNREADABLE, max(log.checkpoints, default=-1), path, wrong))
    return log


def _record(table: str, version: int) -> str:
    return posixpath.join(table, LOG, f"{version:020d}.json")


def _list(dataset: Dataset, folder: str) -> list[str]:
    try:
        return [str(path) for path in dataset.fs.ls(folder, detail=False, refresh=True)]
    except FileNotFoundError:
        return []


def _take_in(log: Log, live: dict[str, int], version: int, lines: list[Line], *, strict: bool) -> str:
    """Take what a record says into account; says what cannot be so."""
    wrong = ""
    added = []
    for line in lines:
        if line.kind == "add" and line.path:
            log.added[line.path] = version
            live[line.path] = version
            added.append(line.path)
        elif line.kind == "remove" and line.path and live.pop(line.path, None) is None and strict:
            wrong = f"it removes {line.path}, which was not there"
    for path in added:
        if (refresh := refresh_in(path)) is not None:
            log.refreshes[shard_in(path)] = refresh
    for line in lines:
        number = line.action.get("version")
        if line.kind != "txn" or not isinstance(number, int):
            continue
        if line.action.get("appId") == PUBLISH:
            log.guards[version] = number
        if line.action.get("appId") == ADMIT:
            said = {refresh for path in added if (refresh := refresh_in(path)) is not None}
            if said and said != {number}:
                wrong = f"it says refresh {number}; its files say {sorted(said)}"
            for path in added:
                log.refreshes.setdefault(shard_in(path), number)
    return wrong


def _bad_pointer(dataset: Dataset, path: str, log: Log) -> str:
    try:
        version = int(json.loads(dataset.fs.cat_file(path))["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return "the pointer to the last checkpoint cannot be read"
    return "" if version in log.checkpoints else f"it points to a checkpoint {version}, which is not there"


def _checkpoint_flaws(dataset: Dataset, log: Log, version: int, live: set[str] | None) -> Iterator[Flaw]:
    """What is wrong with a checkpoint; `live`: the files of its version by the records, where all are there."""
    for path in log.checkpoints[version]:
        relative = posixpath.join(log.table, LOG, posixpath.basename(path))
        try:
            with dataset.fs.open(path, "rb") as file:
                rows = pq.read_table(file)
        except (OSError, pa.ArrowException) as error:
            yield Flaw(Kind.UNREADABLE, version, relative, f"the checkpoint cannot be read: {first_line(error)}")
            continue
        if live is not None and len(log.checkpoints[version]) == 1:
            paths = {a["path"] for a in rows.column("add").to_pylist() if a} if "add" in rows.column_names else set()
            if paths != live:
                yield Flaw(Kind.MISMATCH, version, relative, "the checkpoint names other files than the records")


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


@dataclass(frozen=True)
class Version:
    """What the log says of one version of a table."""

    files: list[DataFile]
    columns: frozenset[str]


def open_version(dataset: Dataset, table: str, version: int | None = None) -> Version:
    """A version of a table, the latest one by default.

    Raises:
        LogProblem: the log cannot be read, whatever the way in which it is damaged.
    """
    try:
        delta = open_delta(dataset, table, version)
        if delta is None:
            return Version([], frozenset())
        files = list_files(dataset, table, delta)
        columns = frozenset(field.name for field in delta.schema().fields)
    except (StoreError, OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise LogProblem(first_line(error)) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("deltalake", "arro3", "_internal"):
            raise
        raise LogProblem(first_line(error)) from error
    if any(f.rows is None or f.size is None for f in files):
        raise LogProblem("it does not say how many rows and bytes a file has")
    return Version(files, columns)


def files_at(dataset: Dataset, table: str, version: int | None = None) -> list[DataFile]:
    """The files of a version of a table; raises as `open_version`."""
    return open_version(dataset, table, version).files


# -- records, line by line --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One line of a record, as far as it can be read."""

    kind: str
    """add, remove, txn, metaData, protocol, commitInfo; empty when it cannot be told."""
    action: dict[str, Any]
    """Empty when the line is no JSON."""
    path: str
    """Of the file that it adds or removes; empty when it does not, or cannot be told."""


_KINDS = ("add", "remove", "txn", "metaData", "protocol", "commitInfo")


def lenient(dataset: Dataset, path: str) -> list[Line]:
    """The lines of a record, also of one that is damaged."""
    try:
        raw = dataset.fs.cat_file(path)
    except OSError:
        return []
    return [_line(text) for text in raw.decode("utf-8", "replace").splitlines() if text.strip()]


def _line(text: str) -> Line:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, dict) and len(value) == 1:
        kind, action = next(iter(value.items()))
        if kind in _KINDS and isinstance(action, dict):
            path = action.get("path")
            return Line(kind, action, path if isinstance(path, str) else "")
    found = _PATH.search(text)
    path = found[1] if found else ""
    kind = ""
    if path or '"partitionValues"' in text:
        kind = "remove" if '"deletionTimestamp"' in text or text.startswith('{"remove"') else "add"
    return Line(kind, {}, path)


def one_off(path: str, candidates: Iterable[str]) -> str | None:
    """The only candidate that differs from a path in one character, if there is one."""
    near = [c for c in candidates if len(c) == len(path) and sum(a != b for a, b in zip(c, path, strict=True)) == 1]
    return near[0] if len(near) == 1 else None


# -- mending ----------------------------------------------------------------------------------------------------------


class Mender:
    """Writes damaged records of one table anew."""

    def __init__(self, dataset: Dataset, log: Log) -> None:
        self._dataset = dataset
        self._log = log
        self._table = log.table
        self._facts: dict[str, DataFile | None] = {}
        root = dataset.path(self._table)
        self._physical = [
            path[len(root) :].lstrip("/")
            for path in map(str, dataset.fs.find(root))
            if path.endswith(".parquet") and f"/{LOG}/" not in path
        ]

    def record(self, version: int) -> str:
        """Write the record of a version anew. Says what was done.

        Raises:
            LogProblem: what it said cannot be found out.
        """
        path = self._log.versions.get(version) or self._dataset.path(_record(self._table, version))
        lines = lenient(self._dataset, path)
        before = {f.relative for f in files_at(self._dataset, self._table, version - 1)} if version else set()
        others = self._named_by_others(version)
        free = {p for p in self._physical if p not in others}
        adds: dict[str, dict[str, Any]] = {}
        removes: list[str] = []
        kept: list[dict[str, Any]] = []
        unclear = not lines
        said = None
        for line in lines:
            if line.kind == "add":
                found = line.path if line.path in self._physical else one_off(line.path, free)
                unclear |= found is None and not line.action
                if found or line.action:
                    adds[found or line.path] = line.action
            elif line.kind == "remove":
                found = line.path if line.path in before else one_off(line.path, before)
                unclear |= found is None
                removes += [found] if found else []
            elif line.kind == "commitInfo":
                said = line.action.get(COUNT)
            elif line.kind and line.action:
                kept.append({line.kind: line.action})
            else:
                unclear = True
        short = unclear or not str(said or "").isdigit() or int(str(said)) > len(adds) + len(removes)
        if short and version > 0:  # the first record says that there is a table, and names no file
            removes += self._fill(adds, removes, before, free)
        if version == 0 or any("metaData" in k or "protocol" in k for k in kept):
            kept = [k for k in kept if "metaData" not in k and "protocol" not in k]
            kept = [*self._template(adds), *kept]
        self._write(path, version, adds, removes, kept)
        return f"{self._table}: the commit record {version} was written anew: {len(adds)} files added"

    def _named_by_others(self, version: int) -> set[str]:
        named = set()
        for other, path in self._log.versions.items():
            if other != version:
                named |= {line.path for line in lenient(self._dataset, path) if line.kind == "add"}
        return named

    def _fact(self, path: str) -> DataFile | None:
        """Size and rows of a file that is whole; None for any other."""
        if path not in self._facts:
            self._facts[path] = fact(self._dataset, self._table, path)
        return self._facts[path]

    def _remains(self, path: str) -> DataFile | None:
        """What can be said of a damaged file: its size, and its rows where its footer can be read."""
        full = self._dataset.path(self._table, path)
        try:
            size = int(self._dataset.fs.size(full))
        except OSError:
            return None
        try:
            with self._dataset.fs.open(full, "rb") as file:
                rows = pq.read_metadata(file).num_rows
        except (OSError, pa.ArrowException):
            rows = 0
        return DataFile(full, path, shard_in(path), rows, size)

    def _fill(self, adds: dict[str, dict[str, Any]], removes: list[str], before: set[str], free: set[str]) -> list[str]:
        """Add the files that no record names. Returns the files that they stand in the place of: those with equal rows.
        A pair is in one shard for ever, so of pairs only files with new rows are added. (A file gets its name when it
        is whole, so one that is damaged was whole once.)"""
        gone: list[str] = []
        staying = {p for p in before - set(removes) if self._fact(p) is not None}
        pairs = self._table == PAIRS_TABLE
        known = {key for path in (*staying, *adds) for key in self._keys(path)} if pairs else set()
        for path in sorted(free - set(adds)):
            if self._fact(path) is None:
                here = [p for p in (*before, *adds) if shard_in(p) == shard_in(path)]
                if not (pairs and here):
                    adds[path] = {}
                    gone += [p for p in here if p in before] if self._table == LEDGER_TABLE else []
                continue
            rows = self._keys(path)
            if pairs and rows & known:
                continue
            known |= rows if pairs else set()
            adds[path] = {}
            gone += [p for p in staying if shard_in(p) == shard_in(path) and rows & self._keys(p)]
        return sorted(set(gone))

    def _keys(self, path: str) -> set[str]:
        """What tells the rows of a file apart."""
        if self._fact(path) is None:
            return set()
        with self._dataset.fs.open(self._dataset.path(self._table, path), "rb") as file:
            parquet = pq.ParquetFile(file)
            if "uid" in parquet.schema_arrow.names and shard_in(path) >= 0:
                return set(parquet.read(["uid"]).column("uid").to_pylist())
            return {json.dumps(row, sort_keys=True, default=str) for row in parquet.read().to_pylist()}

    def _template(self, adds: Mapping[str, object]) -> list[dict[str, Any]]:
        """Protocol and metadata of a new table with the columns of these files, or of any file of the table."""
        from deltalake import DeltaTable

        schemas = []
        for path in dict.fromkeys((*adds, *self._physical)):
            if self._fact(path) is not None:
                with self._dataset.fs.open(self._dataset.path(self._table, path), "rb") as file:
                    schemas.append(pq.read_schema(file).remove_metadata())
        if not schemas:
            raise LogProblem("no file of the table is left that says which columns it has")
        widest = max(schemas, key=len)
        partitioned = any(shard_in(path) >= 0 for path in self._physical)
        schema = widest.append(pa.field("shard", pa.int32(), nullable=False)) if partitioned else widest
        with tempfile.TemporaryDirectory(prefix="pairmill-") as folder:
            DeltaTable.create(
                folder,
                schema=schema,
                partition_by=["shard"] if partitioned else None,
                configuration={
                    "delta.enableExpiredLogCleanup": "false",
                    "delta.logRetentionDuration": "interval 36500 days",
                    "delta.deletedFileRetentionDuration": "interval 36500 days",
                },
            )
            with open(os.path.join(folder, LOG, f"{0:020d}.json"), encoding="utf-8") as file:
                lines = [json.loads(line) for line in file if line.strip()]
        found = [line for line in lines if "protocol" in line or "metaData" in line]
        for line in found:
            if "metaData" in line:
                line["metaData"]["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{self._dataset.url}/{self._table}"))
        return found

    def _write(
        self,
        path: str,
        version: int,
        adds: Mapping[str, dict[str, Any]],
        removes: list[str],
        kept: list[dict[str, Any]],
    ) -> None:
        times = [a["modificationTime"] for a in adds.values() if isinstance(a.get("modificationTime"), int)]
        moment = max(times, default=0)
        info: dict[str, Any] = {"timestamp": moment, "operation": "WRITE", "operationParameters": {}}
        lines: list[dict[str, Any]] = [{"commitInfo": {**info, COUNT: str(len(adds) + len(removes))}}, *_sane(kept)]
        for relative, action in adds.items():
            lines.append({"add": self._add(relative, action, moment)})
        for relative in dict.fromkeys(removes):
            partition = {"shard": str(shard_in(relative))} if shard_in(relative) >= 0 else {}
            lines.append(
                {
                    "remove": {
                        "path": relative,
                        "deletionTimestamp": moment,
                        "dataChange": True,
                        "extendedFileMetadata": True,
                        "partitionValues": partition,
                    }
                }
            )
        for app, number in self._guards(version, adds, removes, kept).items():
            lines = [line for line in lines if line.get("txn", {}).get("appId") != app]
            lines.append({"txn": {"appId": app, "version": number}})
        text = "\n".join(json.dumps(line, separators=(",", ":")) for line in lines)
        replace_file(self._dataset, path, text.encode(), keep=True)
        self._log.versions[version] = path

    def _guards(
        self, version: int, adds: Iterable[str], removes: Sequence[str], kept: Iterable[dict[str, Any]]
    ) -> dict[str, int]:
        """What the guards say, where that follows from the files."""
        refreshes = {r for r in map(refresh_in, adds) if r is not None}
        found = {ADMIT: max(refreshes)} if refreshes else {}
        if removes and not any(line.get("txn", {}).get("appId") == REMOVALS for line in kept):
            before = open_delta(self._dataset, self._table, version - 1)
            found[REMOVALS] = 1 + int((before.transaction_version(REMOVALS) if before else 0) or 0)
        if self._table == SNAPSHOTS_TABLE:
            ids = []
            for path in adds:
                if self._fact(path) is not None:
                    with self._dataset.fs.open(self._dataset.path(self._table, path), "rb") as file:
                        ids += pq.read_table(file, columns=["id"]).column("id").to_pylist()
            if ids:
                found[PUBLISH] = max(ids)
        return found

    def _add(self, relative: str, action: Mapping[str, Any], moment: int) -> dict[str, Any]:
        known = self._fact(relative) or (None if "size" in action else self._remains(relative))
        stats = {"numRecords": known.rows} if known else _stats(action)
        shard = shard_in(relative)
        time = action.get("modificationTime")
        return {
            "path": relative,
            "partitionValues": {"shard": str(shard)} if shard >= 0 else {},
            "size": known.size if known else action.get("size", 0),
            "modificationTime": time if isinstance(time, int) else moment,
            "dataChange": True,
            "stats": json.dumps(stats),
        }


def _stats(action: Mapping[str, Any]) -> dict[str, int]:
    try:
        return {"numRecords": int(json.loads(action["stats"])["numRecords"])}
    except (KeyError, TypeError, ValueError):
        return {"numRecords": 0}


def _sane(kept: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for line in kept:
        guard = line.get("txn")
        if guard is None:
            yield line
        elif isinstance(guard.get("appId"), str) and isinstance(guard.get("version"), int):
            yield {"txn": {"appId": guard["appId"], "version": guard["version"]}}


def fact(dataset: Dataset, table: str, relative: str) -> DataFile | None:
    """Size and rows of a file whose bytes are those that its name says; None for any other."""
    path = dataset.path(table, relative)
    file = DataFile(path, relative, shard_in(relative), 0, 0)
    try:
        if not file.checksum or checksum_of(dataset, path) != file.checksum:
            return None
        with dataset.fs.open(path, "rb") as opened:
            rows = pq.read_metadata(opened).num_rows
        return DataFile(path, relative, file.shard, rows, int(dataset.fs.size(path)))
    except (OSError, pa.ArrowException):
        return None


def replace_file(dataset: Dataset, path: str, data: bytes, *, keep: bool) -> None:
    """Put bytes in the place of a file, all at once; with `keep` the old ones stay under another name."""
    if not dataset.local:
        if keep and dataset.fs.exists(path):
            dataset.fs.cp_file(path, f"{path}{TORN}")
        dataset.fs.pipe_file(path, data)
        return
    if keep and os.path.exists(path):
        with open(path, "rb") as old, open(f"{path}{TORN}", "wb") as aside:
            aside.write(old.read())
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def set_aside(dataset: Dataset, path: str) -> None:
    """Take a file of a log out of the way."""
    if dataset.fs.exists(path):
        dataset.fs.mv(path, f"{path}{TORN}")
