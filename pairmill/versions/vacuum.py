"""Which snapshots stay, and removing the files that nobody needs any more.

Needed is what a retained snapshot reads and what the latest version of a table in use names. The records of expired
snapshots go first and the files after them: killed in between, only files are left that nobody names, and the next
vacuum removes those.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import yaml
from pydantic import ValidationError

from pairmill.answers import JOURNAL
from pairmill.answers.place import OPEN
from pairmill.engines.beam.outbox import FOLDER as OUTBOXES
from pairmill.errors import ConfigError
from pairmill.isolate import MARKS
from pairmill.report.progress import Reporter, Silent
from pairmill.store import (
    LEDGER_TABLE,
    PAIRS_TABLE,
    REWRITES,
    REWRITES_TABLE,
    SNAPSHOTS_TABLE,
    DataFile,
    Dataset,
    open_delta,
)
from pairmill.store.tables import TORN
from pairmill.tombstones import Tombstones
from pairmill.versions.history import stage_of
from pairmill.versions.removal import remove_tables
from pairmill.versions.rollback import finish, pending
from schemas.config import Retention
from schemas.snapshot import SNAPSHOTS, SnapshotRecord

GRACE_HOURS = 24.0
"""Files that nobody names are left alone while they are younger: an interrupted run finished them, and the next run
takes them up instead of computing their rows again."""

EXPIRED = "expired snapshot"
ORPHAN = "orphan"
LEFTOVER = "leftover"
UNUSED = "unused table"

_AT_ONCE = 1000
"""Files removed by one call: what object stores take."""

_DATA = re.compile(r"(shard=\d+/)?[^/]+\.parquet")
_TEMPORARY = re.compile(rf".+(\.tmp|{re.escape(TORN)})")


@dataclass(frozen=True)
class Removal:
    """Files that go, or would go."""

    table: str
    """Or the name of another folder of the dataset; empty for what lies beside the tables."""
    why: str
    """expired snapshot; orphan: no snapshot and no table names it; leftover: of a process that died; unused table."""
    files: int
    bytes: int


@dataclass(frozen=True)
class VacuumReport:
    """What a vacuum removed, or would remove."""

    expired: list[int]
    """Snapshots that are gone."""
    retained: list[int]
    removed: list[Removal]
    files: int
    bytes: int
    waiting_files: int
    """Files that nobody names, but which are too young to go."""
    waiting_bytes: int
    dry_run: bool


def vacuum(
    dataset: Dataset,
    retention: Retention | None = None,
    *,
    grace_hours: float = GRACE_HOURS,
    dry_run: bool = False,
    wait_s: float = 0.0,
    reporter: Reporter | None = None,
) -> VacuumReport:
    """Remove expired snapshots and all files that nobody needs any more.

    Args:
        dataset: Whose files.
        retention: Which snapshots stay; as the config of the last snapshot says without it.
        grace_hours: Age from which on files go that an interrupted run may have left for the next one.
        dry_run: Remove nothing; the report says what would go.
        wait_s: How long to wait for writers and for exports, seconds.
        reporter: Is told what is finished first.

    Raises:
        ConfigError: there is no dataset, or no published snapshot.
        DatasetLocked: another process writes to the dataset, or an export reads it.
        StoreError: a log is damaged, or an interrupted rollback cannot be finished.
    """
    dataset.snapshot()  # before the lock, which would make the folder of a dataset that does not exist
    with contextlib.ExitStack() as stack:
        stack.enter_context(dataset.lock(wait_s))
        if not dry_run:
            stack.enter_context(dataset.alone(wait_s))
            finish(dataset, reporter or Silent())
        records = dataset.snapshots()
        policy = retention or policy_of(records[-1])
        now = datetime.datetime.now(datetime.timezone.utc)
        kept = retained(records, policy, now)
        if (target := pending(dataset)) is not None:  # of a dry run: a rollback that is to be finished needs it
            staying = {record.id for record in kept} | {target}
            kept = [record for record in records if record.id in staying]
        survey = _Survey(dataset, records, kept, now.timestamp() - grace_hours * 3600)
        if not dry_run:
            _carry_out(dataset, records, kept, survey)
        return survey.report(records, kept, dry_run)


def policy_of(record: SnapshotRecord) -> Retention:
    """The retention section of a snapshot's config; that of an older one, which has none, retains all.

    Raises:
        ConfigError: the section is wrong.
    """
    loaded = yaml.safe_load(record.config)
    section = loaded.get("retention") if isinstance(loaded, dict) else None
    try:
        return Retention.model_validate(section or {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(("retention", *(str(part) for part in first["loc"])))
        raise ConfigError(
            f"the config of snapshot {record.id}: {where}: {first['msg'].lower()}; give --keep or --days"
        ) from error


def retained(records: Sequence[SnapshotRecord], policy: Retention, now: datetime.datetime) -> list[SnapshotRecord]:
    """The snapshots that stay: among the newest, or young enough; always the newest one. Newest is by number."""
    if policy.snapshots is None and policy.days is None:
        return list(records)
    ordered = sorted(records, key=lambda record: record.id)
    newest = {record.id for record in ordered[-(policy.snapshots or 1) :]}
    return [r for r in ordered if r.id in newest or (policy.days is not None and _age(r, now) < policy.days)]


def _age(record: SnapshotRecord, now: datetime.datetime) -> float:
    """In days; 0 where the record's time cannot be read."""
    try:
        made = datetime.datetime.fromisoformat(record.created_at.replace("Z", "+00:00"))
    except ValueError:
        return 0.0
    made = made if made.tzinfo else made.replace(tzinfo=datetime.timezone.utc)
    return (now - made).total_seconds() / 86400


# -- what is there, and who needs it ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """A file that is there."""

    path: str
    table: str
    why: str
    size: int


class _Survey:
    """All files of a dataset that may go, by reason."""

    def __init__(
        self, dataset: Dataset, records: Sequence[SnapshotRecord], kept: Sequence[SnapshotRecord], before: float
    ) -> None:
        self._dataset = dataset
        self._before = before
        self._rewrites = dataset.rewrites()
        self._versions: dict[tuple[str, int | None], list[DataFile]] = {}
        self.going: list[_Found] = []
        """Files to be removed one by one."""
        self.unused: list[str] = []
        """Tables to be removed whole."""
        self._whole: list[Removal] = []
        self._waiting = [0, 0]
        self._kept = list(kept)
        staying = {record.id for record in kept}
        self._expired = [record for record in records if record.id not in staying]
        self._last = max(records, key=lambda record: record.id)
        tables = dataset.tables()
        for table in tables:
            self._table(table)
        for folder in self._folders():
            if folder not in tables:
                self._folder(folder)
        self._beside()

    # -- needs --

    def _files(self, table: str, version: int | None) -> list[DataFile]:
        if (table, version) not in self._versions:
            empty = pa.schema([])
            self._versions[table, version] = self._dataset.table(table, empty).files(version)
        return self._versions[table, version]

    def _named(self, table: str, records: Iterable[SnapshotRecord], *, now: bool = True) -> set[str]:
        """The files of a table in some snapshots: as they were committed, or (`now`) what stands for them now."""
        names: set[str] = set()
        for version in {record.tables[table] for record in records if table in record.tables}:
            files = self._files(table, version)
            names |= {f.relative for f in (self._dataset.replaced(table, files, self._rewrites) if now else files)}
        return names

    def _latest(self, table: str) -> set[str]:
        files = self._files(table, None)
        return {f.relative for f in (*files, *self._dataset.replaced(table, files, self._rewrites))}

    def _in_use(self, table: str) -> bool:
        """Whether a retained snapshot or the last config has the table. Tables that no stage made always are."""
        if stage_of(table) is None or table in self._last.columns.values():
            return True
        if any(table in record.tables for record in self._kept):
            return True
        delta = open_delta(self._dataset, table)
        return delta is not None and not delta.metadata().partition_columns

    def rewrites(self) -> list[dict[str, Any]] | None:
        """The rewrites that are still of use: of files that a retained snapshot or a table in use names. None when all
        of them are."""
        rows = self._dataset.records(REWRITES_TABLE, REWRITES).rows()
        if not rows or Tombstones.load(self._dataset).open_requests:
            return None
        tables = {table for table, _ in self._rewrites} - set(self.unused)
        named = {(t, name) for t in tables for name in self._named(t, self._kept, now=False) | self._latest(t)}
        useful = {key: value for key, value in self._rewrites.items() if key in named}
        if len(useful) == len(rows):
            return None
        return [
            {"table": table, "old": old, "new": new, "rows": count, "size": size}
            for (table, old), (new, count, size) in sorted(useful.items())
        ]

    # -- what is there --

    def _table(self, table: str) -> None:
        found = self._find(table)
        if not self._in_use(table):
            self._unused(table, found)
            return
        needed = self._latest(table) | self._named(table, self._kept)
        expired = self._named(table, self._expired)
        for relative, info in found.items():
            if relative in needed:
                continue
            if relative in expired:
                self._goes(table, EXPIRED, info)
            elif _DATA.fullmatch(relative):
                self._goes_if_old(table, ORPHAN, info)
            elif _TEMPORARY.fullmatch(relative):
                self._goes_if_old(table, LEFTOVER, info)

    def _unused(self, table: str, found: Mapping[str, dict[str, Any]]) -> None:
        """A table that only expired snapshots have goes at once. One with more in it than they know may be that of a
        run that did not come to publish: it goes when it is old."""
        files, size = len(found), sum(int(info["size"]) for info in found.values())
        latest = {f.relative for f in self._files(table, None)}
        known = any(table in record.tables for record in self._expired) and latest <= (
            self._named(table, self._expired, now=False) | self._named(table, self._expired)
        )
        if known or all(_modified(info) <= self._before for info in found.values()):
            self.unused.append(table)
            self._whole.append(Removal(table, UNUSED, files, size))
        else:
            self._waits(files, size)

    def _folder(self, folder: str) -> None:
        """What a run wrote that was killed before its first commit, or a removal before its last step."""
        if folder in (MARKS, OUTBOXES):
            for info in self._find(folder).values():
                self._goes_if_old(folder, LEFTOVER, info)
        elif folder == JOURNAL:  # its lines are what was paid for: `pairmill.answers.fold` removes them
            for relative, info in self._find(folder).items():
                if _TEMPORARY.fullmatch(relative) or relative.startswith(OPEN):
                    self._goes_if_old(folder, LEFTOVER, info)
        elif folder in (PAIRS_TABLE, LEDGER_TABLE) or stage_of(folder) is not None:
            for relative, info in self._find(folder).items():
                if _DATA.fullmatch(relative) or _TEMPORARY.fullmatch(relative):
                    self._goes_if_old(folder, ORPHAN if _DATA.fullmatch(relative) else LEFTOVER, info)

    def _beside(self) -> None:
        for info in self._dataset.fs.ls(self._dataset.path(), detail=True):
            if info["type"] == "file" and _TEMPORARY.fullmatch(str(info["name"])):
                self._goes_if_old("", LEFTOVER, info)

    def _folders(self) -> list[str]:
        listed = self._dataset.fs.ls(self._dataset.path(), detail=True)
        return sorted(str(i["name"]).rstrip("/").rpartition("/")[2] for i in listed if i["type"] == "directory")

    def _find(self, folder: str) -> dict[str, dict[str, Any]]:
        """All files below a folder of the dataset, by their path in it."""
        root = self._dataset.path(folder)
        try:
            found = self._dataset.fs.find(root, detail=True)
        except FileNotFoundError:
            return {}
        return {str(path)[len(root) :].lstrip("/"): info for path, info in sorted(found.items())}

    def _goes(self, table: str, why: str, info: Mapping[str, Any]) -> None:
        self.going.append(_Found(str(info["name"]), table, why, int(info["size"])))

    def _goes_if_old(self, table: str, why: str, info: Mapping[str, Any]) -> None:
        if _modified(info) <= self._before:
            self._goes(table, why, info)
        else:
            self._waits(1, int(info["size"]))

    def _waits(self, files: int, size: int) -> None:
        self._waiting[0] += files
        self._waiting[1] += size

    def report(self, records: Sequence[SnapshotRecord], kept: Sequence[SnapshotRecord], dry_run: bool) -> VacuumReport:
        """What goes, by table and reason."""
        sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        for found in self.going:
            sums[found.table, found.why][0] += 1
            sums[found.table, found.why][1] += found.size
        parts = [Removal(table, why, files, size) for (table, why), (files, size) in sums.items()]
        removed = sorted([*parts, *self._whole], key=lambda r: (r.table, r.why))
        staying = [record.id for record in kept]
        return VacuumReport(
            expired=[record.id for record in records if record.id not in staying],
            retained=staying,
            removed=removed,
            files=sum(r.files for r in removed),
            bytes=sum(r.bytes for r in removed),
            waiting_files=self._waiting[0],
            waiting_bytes=self._waiting[1],
            dry_run=dry_run,
        )


def _modified(info: Mapping[str, Any]) -> float:
    """When a file was written, seconds since 1970; now, where the file system does not say it."""
    for name in ("mtime", "LastModified", "last_modified", "updated"):
        value = info.get(name)
        if isinstance(value, datetime.datetime):
            return value.timestamp()
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return datetime.datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return time.time()


# -- removing ---------------------------------------------------------------------------------------------------------


def _carry_out(
    dataset: Dataset, records: Sequence[SnapshotRecord], kept: Sequence[SnapshotRecord], survey: _Survey
) -> None:
    if len(kept) < len(records):
        dataset.records(SNAPSHOTS_TABLE, SNAPSHOTS).replace([record.to_row() for record in kept])
    remove_tables(dataset, survey.unused)
    paths = [found.path for found in survey.going]
    for start in range(0, len(paths), _AT_ONCE):
        dataset.fs.rm(paths[start : start + _AT_ONCE])
    useful = survey.rewrites()
    if useful is not None:
        dataset.records(REWRITES_TABLE, REWRITES).replace(useful)
