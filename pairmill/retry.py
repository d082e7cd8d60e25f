"""Deferred pairs and when they are tried again.

The ledger keeps, of each deferred pair, how often it was tried and from when on it may be tried again. A refresh takes
those whose time has come out of the tables of the stages that deferred them: so they are work to do like any other row.
The count goes up before they are taken out, so a run that is killed again and again does not press a server.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pairmill.execute import table_schema
from pairmill.plan import Plan
from pairmill.store import LEDGER_TABLE, DataFile, Dataset, read_files, without_rows
from schemas import fields
from schemas.config import Retry
from schemas.reasons import DEFERRED_VALUES, Status, retry_after_s

LONGEST_RETRY_AFTER_S = 30 * 86_400.0
"""No server can put a pair off for longer."""

_COLUMNS = ("uid", "status", "attempts", "retry_at")


@dataclass(frozen=True)
class Attempt:
    """What is known of a deferred pair."""

    attempts: int
    retry_at: str | None

    def again(self, retry: Retry, uid: str, now: datetime.datetime) -> Attempt:
        """After one more attempt."""
        return Attempt(self.attempts + 1, retry_at(retry, self.attempts + 1, uid, now))


def retry_at(retry: Retry, attempts: int, uid: str, now: datetime.datetime, wait_s: float | None = None) -> str | None:
    """From when on a pair may be tried again: `first_s`, doubled with each attempt, up to `longest_s`, plus up to a
    tenth drawn from its uid, so that not all come back at once; never before a server's Retry-After (`wait_s`, up to
    `LONGEST_RETRY_AFTER_S`). Null after the last attempt."""
    if attempts >= retry.attempts:
        return None
    wait = min(retry.longest_s, retry.first_s * 2 ** min(attempts - 1, 60))
    wait *= 1 + hashlib.sha256(uid.encode()).digest()[0] / 2550
    return stamp(now + datetime.timedelta(seconds=max(wait, min(wait_s or 0.0, LONGEST_RETRY_AFTER_S))))


def stamp(time: datetime.datetime) -> str:
    """A time as the ledger has it: UTC, ISO 8601, whole seconds, so that texts compare as times do."""
    return time.astimezone(datetime.timezone.utc).isoformat(timespec="seconds")


def utc_now() -> datetime.datetime:
    """The time, UTC."""
    return datetime.datetime.now(datetime.timezone.utc)


def known_attempts(dataset: Dataset) -> dict[str, Attempt]:
    """The deferred pairs of the last ledger, by uid."""
    files = dataset.table(LEDGER_TABLE, fields.LEDGER).files()
    rows = read_files(dataset, files, fields.LEDGER, _COLUMNS)
    rows = rows.filter(pc.equal(rows.column("status"), Status.DEFERRED.value))
    return {
        # a ledger older than these columns: tried once, and may be tried again
        row["uid"]: Attempt(row["attempts"] or 1, row["retry_at"] if row["attempts"] else "")
        for row in rows.to_pylist()
    }


def due(known: Mapping[str, Attempt], retry: Retry, now: datetime.datetime, *, everything: bool) -> set[str]:
    """The pairs to try again now.

    A time that lies further ahead than any wait could reach was written by a clock that went wrong: it counts as come.
    """
    if everything:
        return set(known)
    present, beyond = stamp(now), stamp(now + datetime.timedelta(days=366, seconds=1.2 * retry.longest_s))
    return {
        uid
        for uid, attempt in known.items()
        if attempt.retry_at is not None and not present < attempt.retry_at < beyond
    }


def take_out(dataset: Dataset, plan: Plan, uids: set[str], known: Mapping[str, Attempt], retry: Retry) -> None:
    """Count one more attempt of these pairs, and take their deferred rows out of the stages' tables."""
    if not uids:
        return
    names = pa.array(sorted(uids), pa.string())
    _count(dataset, uids, names, known, retry)
    deferred = pa.array(sorted(DEFERRED_VALUES))

    def drop(rows: pa.Table) -> pa.Array:
        return pc.and_(
            pc.is_in(rows.column("uid"), value_set=names), pc.is_in(rows.column("reason"), value_set=deferred)
        )

    for name in plan.tables:
        schema = table_schema(plan, name)
        table = dataset.table(name, schema)
        files = table.files()
        touched = _shards_with(dataset, files, schema, deferred)
        old: list[DataFile] = []
        new: list[DataFile] = []
        for file in files:
            if file.shard in touched:
                rest, gone = without_rows(dataset, name, file, schema, drop)
                if gone:
                    old.append(file)
                    new += [rest] if rest is not None else []
        if old:
            table.commit(new, remove=old)


def take_out_rows(dataset: Dataset, name: str, schema: pa.Schema, uids: pa.Array, shards: AbstractSet[int]) -> None:
    """Take the rows of these pairs out of a table, so that they are work to do; they lie in these shards."""
    table = dataset.table(name, schema)
    old: list[DataFile] = []
    new: list[DataFile] = []
    for file in table.files():
        if file.shard in shards:
            rest, gone = without_rows(
                dataset, name, file, schema, lambda rows: pc.is_in(rows.column("uid"), value_set=uids)
            )
            if gone:
                old.append(file)
                new += [rest] if rest is not None else []
    if old:
        table.commit(new, remove=old)


def _shards_with(dataset: Dataset, files: list[DataFile], schema: pa.Schema, deferred: pa.Array) -> set[int]:
    rows = read_files(dataset, files, schema, ["reason", "shard"])
    hit = pc.is_in(rows.column("reason"), value_set=deferred)
    return set(pc.unique(rows.column("shard").filter(hit)).to_pylist())


def _count(dataset: Dataset, uids: set[str], names: pa.Array, known: Mapping[str, Attempt], retry: Retry) -> None:
    """Write into the ledger's table that these pairs are tried once more. Readers see it with the next snapshot."""
    now = utc_now()
    table = dataset.table(LEDGER_TABLE, fields.LEDGER)
    files = table.files()
    where = read_files(dataset, files, fields.LEDGER, ["uid", "shard"])
    touched = set(pc.unique(where.column("shard").filter(pc.is_in(where.column("uid"), value_set=names))).to_pylist())
    new = []
    for file in files:
        if file.shard not in touched:
            continue
        rows = read_files(dataset, [file], fields.LEDGER, fields.LEDGER.names).to_pylist()
        for row in rows:
            if row["uid"] in uids:
                attempt = known[row["uid"]].again(retry, row["uid"], now)
                row["attempts"], row["retry_at"] = attempt.attempts, attempt.retry_at
        with table.writer(file.shard, "ledger") as writer:
            writer.write(pa.Table.from_pylist(rows, schema=fields.LEDGER))
            new.append(writer.close())
    table.commit(new, replace=sorted(touched))


def attempt_columns(
    uid: pa.ChunkedArray,
    status: pa.ChunkedArray,
    detail: pa.ChunkedArray,
    known: Mapping[str, Attempt],
    tried: set[str],
    retry: Retry,
) -> dict[str, pa.Array]:
    """The ledger's columns ``attempts`` and ``retry_at``.

    Args:
        uid: Of all pairs.
        status: Of all pairs.
        detail: Of all pairs; may carry a server's Retry-After.
        known: What the ledger said before.
        tried: The pairs that this run tried again; new ones need not be among them.
        retry: The config's.
    """
    rows = pc.indices_nonzero(pc.equal(status, Status.DEFERRED.value))
    now = utc_now()
    attempts: list[int] = []
    times: list[str | None] = []
    for name, text in zip(uid.take(rows).to_pylist(), detail.take(rows).to_pylist(), strict=True):
        attempt = known.get(name)
        wait = retry_after_s(text)
        if attempt is None:
            attempt = Attempt(1, retry_at(retry, 1, name, now, wait))
        elif attempt.retry_at == "":
            attempt = Attempt(attempt.attempts, retry_at(retry, attempt.attempts, name, now, wait))
        elif name in tried and wait is not None and attempt.retry_at is not None:
            asked = stamp(now + datetime.timedelta(seconds=min(wait, LONGEST_RETRY_AFTER_S)))
            attempt = Attempt(attempt.attempts, max(attempt.retry_at, asked))
        attempts.append(attempt.attempts)
        times.append(attempt.retry_at)
    return {
        "attempts": _spread(rows, pa.array(attempts, pa.int32()), len(uid)),
        "retry_at": _spread(rows, pa.array(times, pa.string()), len(uid)),
    }


def _spread(rows: pa.Array, values: pa.Array, length: int) -> pa.Array:
    """Values at some rows of a column that is null elsewhere."""
    position = np.full(length, -1, np.int64)
    position[rows.to_numpy()] = np.arange(len(values))
    return values.take(pa.array(position, mask=position < 0))
