"""Going back to an earlier snapshot, by a new snapshot that says the same.

Tables are seen through snapshots only, so readers see the old state until the new record is published. A run, however,
goes on from the latest version of each table. So what is going to be done is written down first (`ROLLBACK`), and
`finish`, which every writer calls when it has the lock, does the rest of it.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from pairmill.answers import ANSWERS_TABLE
from pairmill.errors import StoreError
from pairmill.recount import recounted
from pairmill.report.progress import Reporter, Silent
from pairmill.seen import SEEN
from pairmill.store import (
    HISTORY_TABLE,
    LEDGER_TABLE,
    PAIRS_TABLE,
    DataFile,
    Dataset,
    Snapshot,
    open_delta,
    set_torn_aside,
)
from pairmill.tombstones import Tombstones
from pairmill.versions.history import table_bytes
from pairmill.versions.intention import Intention
from pairmill.versions.removal import finish_removals
from schemas import fields
from schemas.snapshot import SnapshotRecord

ROLLBACK = "_rollback.json"
"""Names the snapshot that is being rolled back to, and the number of the one to be published."""

KIND = "rollback"

_ALWAYS = (HISTORY_TABLE, LEDGER_TABLE)

_NEVER = (ANSWERS_TABLE,)
"""What was paid for stays: the same questions get the same answers again."""


@dataclass(frozen=True)
class TableChange:
    """What going back does to a table."""

    table: str
    files_in: int
    rows_in: int
    files_out: int
    rows_out: int
    named: bool
    """Whether the snapshot has the table. One that it has not (a newer model's) loses the rows of those shards that are
    not now as they were then; readers do not see it."""


@dataclass(frozen=True)
class RollbackReport:
    """What a rollback did, or would do."""

    to: int
    snapshot: SnapshotRecord | None
    """The snapshot that was published. None for a dry run, and where the dataset is as in that snapshot already."""
    changes: list[TableChange]
    admitted: int
    kept: int
    """Counts of the snapshot as it reads now: without what was taken down since."""
    dry_run: bool
    seconds: float


def rollback(
    dataset: Dataset, snapshot_id: int, *, dry_run: bool = False, wait_s: float = 0.0, reporter: Reporter | None = None
) -> RollbackReport:
    """Bring every table back to what it was in a snapshot, and publish that as a new snapshot.

    Nothing that was taken down comes back. The snapshots in between stay readable. Killed at any point, the same call
    finishes it, and so does the next run.

    Raises:
        ConfigError: there is no such snapshot.
        DatasetLocked: another process is writing.
        StoreError: files of the snapshot are missing, or a takedown is not carried out yet.
    """
    begin = time.monotonic()
    dataset.snapshot(snapshot_id)  # before the lock, which would make the folder of a dataset that does not exist
    reporter = reporter or Silent()
    with dataset.lock(wait_s):
        stale = False
        if not dry_run:
            finish_removals(dataset)
            try:
                finished = _finish(dataset, begin)
            except StoreError as error:
                if pending(dataset) == snapshot_id:
                    raise
                reporter.note(f"an earlier rollback cannot be finished and is given up: {error}")
                finished, stale = None, True
            if finished is not None:
                reporter.note(f"finished a rollback that was interrupted: {finished.note}")
                if finished.note == _note(snapshot_id):
                    return RollbackReport(
                        snapshot_id, finished, [], finished.admitted, finished.kept, False, time.monotonic() - begin
                    )
            _set_torn_aside(dataset)
        target = dataset.snapshot(snapshot_id)
        moves = _moves(dataset, target, stale)
        _check_takedowns(dataset)
        _check_files(dataset, target, moves)
        record, published = recounted(target), None
        if not dry_run and (_any(moves) or _differs(dataset, record)):
            newest = dataset.snapshots()[-1].id
            Intention(dataset, ROLLBACK).declare({"snapshot": snapshot_id, "publish": newest + 1, "stale": stale})
            published = _carry_out(dataset, target, moves, newest + 1, begin)
        changes = [move.change for move in moves if move.new or move.gone]
        return RollbackReport(
            snapshot_id, published, changes, record.admitted, record.kept, dry_run, time.monotonic() - begin
        )


def finish(dataset: Dataset, reporter: Reporter) -> SnapshotRecord | None:
    """Finish what was begun and interrupted: a rollback, and the removal of tables by a vacuum.

    For the holder of the dataset's lock, before it looks at any table. Returns the snapshot that it published.

    Raises:
        StoreError: it cannot be finished; the message says why and what to do.
    """
    removed = finish_removals(dataset)
    if removed:
        reporter.note(f"finished a vacuum that was interrupted: {', '.join(removed)} removed")
    record = _finish(dataset, time.monotonic())
    if record is not None:
        reporter.note(f"finished a rollback that was interrupted: snapshot {record.id}, {record.note}")
    return record


def pending(dataset: Dataset) -> int | None:
    """The snapshot that an interrupted rollback goes to; None when there is none."""
    begun = Intention(dataset, ROLLBACK).declared()
    return None if begun is None else int(begun["snapshot"])


def _finish(dataset: Dataset, begin: float) -> SnapshotRecord | None:
    intention = Intention(dataset, ROLLBACK)
    begun = intention.declared()
    if begun is None:
        return None
    records = dataset.snapshots()
    for record in records:
        if record.id >= begun["publish"] and record.kind == KIND and record.note == _note(begun["snapshot"]):
            intention.done()  # it was killed just after publishing
            return record
    try:
        if all(record.id != begun["snapshot"] for record in records):
            raise StoreError(f"snapshot {begun['snapshot']} is no longer there")
        _set_torn_aside(dataset)
        target = dataset.snapshot(begun["snapshot"])
        moves = _moves(dataset, target, begun["stale"])
        _check_files(dataset, target, moves)
        return _carry_out(dataset, target, moves, records[-1].id + 1, begin)
    except StoreError as error:
        raise StoreError(
            f"a rollback to snapshot {begun['snapshot']} was begun and cannot be finished: {error}; "
            f"mend that, or roll back to another snapshot: `pairmill rollback {dataset.url} N`"
        ) from error


# -- what is to be done -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Move:
    """Files to come back to a table and to go from it; `target` is what it holds then."""

    table: str
    named: bool
    target: list[DataFile]
    new: list[DataFile]
    gone: list[DataFile]

    @property
    def change(self) -> TableChange:
        rows_in, rows_out = (sum(f.rows for f in files) for files in (self.new, self.gone))
        return TableChange(self.table, len(self.new), rows_in, len(self.gone), rows_out, self.named)


def _any(moves: Sequence[_Move]) -> bool:
    return any(move.new or move.gone for move in moves)


def _moves(dataset: Dataset, target: Snapshot, stale: bool) -> list[_Move]:
    """What to do to each table, in the order in which it must be done.

    Tables that the snapshot does not have come first: which of their rows still hold is told by comparing the others,
    as they are now, with what they were. The pairs come last, for the same reason. With `stale` none of them hold: an
    earlier rollback was given up half way.
    """
    wanted = {PAIRS_TABLE, *_ALWAYS, *target.record.tables, *target.columns.values()}
    there = _partitioned(dataset)
    named = [
        _named(dataset, table, target) for table in sorted(wanted & set(there), key=lambda t: (t == PAIRS_TABLE, t))
    ]
    then, now = _by_shard((m.table, m.target) for m in named), _by_shard((m.table, _latest(m)) for m in named)
    same = set() if stale else {shard for shard, files in then.items() if now.get(shard) == files}
    others = []
    for table in there:
        if table not in wanted:
            files = dataset.table(table, fields.PAIRS).files()
            gone = [f for f in files if f.shard not in same]
            others.append(_Move(table, False, [f for f in files if f.shard in same], [], gone))
    return others + named


def _named(dataset: Dataset, table: str, target: Snapshot) -> _Move:
    then, now = target.files(table), dataset.table(table, fields.PAIRS).files()
    names_then, names_now = {f.relative for f in then}, {f.relative for f in now}
    new = [f for f in then if f.relative not in names_now]
    return _Move(table, True, then, new, [f for f in now if f.relative not in names_then])


def _latest(move: _Move) -> list[DataFile]:
    """What the table holds now."""
    new = {f.relative for f in move.new}
    return [f for f in move.target if f.relative not in new] + move.gone


def _by_shard(tables: Iterable[tuple[str, list[DataFile]]]) -> Mapping[int, set[tuple[str, str]]]:
    found: dict[int, set[tuple[str, str]]] = defaultdict(set)
    for table, files in tables:
        if table not in _ALWAYS:  # verdicts change without any measurement
            for file in files:
                found[file.shard].add((table, file.relative))
    return found


def _partitioned(dataset: Dataset) -> list[str]:
    """The tables that are partitioned by shard, all but those of records, and that a rollback may touch."""
    found = []
    for name in dataset.tables():
        if name in _NEVER:
            continue
        delta = open_delta(dataset, name)
        if delta is not None and delta.metadata().partition_columns:
            found.append(name)
    return found


def _set_torn_aside(dataset: Dataset) -> None:
    for name in dataset.tables():
        set_torn_aside(dataset, name)


def _check_takedowns(dataset: Dataset) -> None:
    waiting = Tombstones.load(dataset).open_requests
    if waiting:
        raise StoreError(
            f"the takedown {waiting[0]} in {dataset.url} was interrupted, so what it names may still be in old files; "
            "give the same `pairmill forget` again, or run the config, then roll back"
        )


def _check_files(dataset: Dataset, target: Snapshot, moves: Sequence[_Move]) -> None:
    """Nothing is begun unless all that is needed is there.

    Raises:
        StoreError: a file is missing, or has another size than it was written with.
    """
    tables = {move.table for move in moves}
    lost = [dataset.path(table) for table in sorted(target.record.tables) if table not in tables]
    for move in moves:
        if not move.named or not move.target:
            continue
        found = {str(info["name"]): info["size"] for info in _find(dataset, move.table)}
        lost += [f.path for f in move.target if found.get(f.path) != f.size]
    if lost:
        raise StoreError(
            f"snapshot {target.record.id} of {dataset.url} cannot be gone back to: {len(lost)} of its files are "
            f"missing or damaged, {lost[0]} among them; `pairmill verify {dataset.url}` says more. A vacuum leaves the "
            "files of all snapshots that `pairmill snapshots` lists, so something else removed them"
        )


def _find(dataset: Dataset, table: str) -> list[dict[str, object]]:
    try:
        return list(dataset.fs.find(dataset.path(table), detail=True).values())
    except FileNotFoundError:
        return []


def _differs(dataset: Dataset, record: SnapshotRecord) -> bool:
    """Whether the newest snapshot is another one than `record`, though its files may be the same."""
    newest = dataset.snapshots()[-1]
    same = (newest.columns, newest.config, newest.admitted, newest.kept, newest.reasons)
    return same != (record.columns, record.config, record.admitted, record.kept, record.reasons)


# -- doing it ---------------------------------------------------------------------------------------------------------


def _note(snapshot_id: int) -> str:
    return f"as snapshot {snapshot_id}"


def _carry_out(dataset: Dataset, target: Snapshot, moves: Sequence[_Move], number: int, begin: float) -> SnapshotRecord:
    record = recounted(target)
    seen = dataset.path(SEEN)
    if dataset.fs.exists(seen):
        dataset.fs.rm(seen)
    for move in moves:
        _commit(dataset, move)
    tables = {m.table: dataset.table(m.table, fields.PAIRS).version() for m in moves if m.named}
    published = dataclasses.replace(
        record,
        id=number,
        created_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        tables=tables,
        seconds=round(time.monotonic() - begin, 3),
        kind=KIND,
        note=_note(target.record.id),
        computed={},
        stage_seconds={},
        bytes=table_bytes(dataset, tables),
    )
    dataset.publish(published)
    Intention(dataset, ROLLBACK).done()
    return published


def _commit(dataset: Dataset, move: _Move) -> None:
    """One commit."""
    if not move.new and not move.gone:
        return
    delta = open_delta(dataset, move.table)
    assert delta is not None
    schema = pa.schema([f for f in pa.schema(delta.schema().to_arrow()) if f.name != fields.SHARD.name])
    dataset.table(move.table, schema).commit(move.new, remove=move.gone)


# -- counts -----------------------------------------------------------------------------------------------------------
