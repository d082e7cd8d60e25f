"""Admission: from the rows of the sources to pairs with a uid, in shards that never change again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from pairmill.report.progress import Reporter
from pairmill.sources import read
from pairmill.store import PAIRS_TABLE, DataFile, Dataset, read_files
from schemas import fields
from schemas.config import RunConfig, Source

BUFFERED_SHARDS = 100
"""New pairs are gathered up to so many shards, so that pairs with the same URL come into the same shard."""


@dataclass
class Admission:
    """What a refresh admitted. rows read = new + known + repeated."""

    new: int = 0
    known: int = 0
    """Rows whose pair an earlier refresh admitted."""
    repeated: int = 0
    """Rows that say again what an earlier row of this refresh said."""
    malformed: int = 0
    """Among the new ones: rows that could not be read as a pair; they keep a row with the reason."""
    files: list[DataFile] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows read."""
        return self.new + self.known + self.repeated


def pair_uid(url: str | None, text: str | None) -> str:
    """The content identity of a pair: sha256 of url, newline and text, hex."""
    return hashlib.sha256(f"{url or ''}\n{text or ''}".encode()).hexdigest()


def admit(config: RunConfig, dataset: Dataset, reporter: Reporter, *, dry_run: bool = False) -> Admission:
    """Read the sources and commit their new pairs, all at once, as new shards.

    With `dry_run` nothing is written: the result says what would be admitted.

    Raises:
        SourceError: a source cannot be read at all.
    """
    table = dataset.table(PAIRS_TABLE, fields.PAIRS)
    stored = read_files(dataset, table.files(), fields.PAIRS, ["uid", "refresh", "shard"])
    known = {bytes.fromhex(uid) for uid in stored.column("uid").to_pylist()}
    refresh = max(stored.column("refresh").to_pylist(), default=0) + 1
    shard = max(stored.column("shard").to_pylist(), default=-1) + 1
    admission = Admission()
    for rows in _shards(_new_rows(config.source, known, refresh, admission, reporter), config.shard_size):
        if not dry_run:
            name = "pairs-" + hashlib.sha256("".join(rows.column("uid").to_pylist()).encode()).hexdigest()[:16]
            with table.writer(shard, name) as writer:
                writer.write(rows)
                admission.files.append(writer.close())
        shard += 1
    if admission.files:
        table.commit(admission.files, transaction=("admit", refresh))
    return admission


def _new_rows(
    sources: Iterable[Source], known: set[bytes], refresh: int, admission: Admission, reporter: Reporter
) -> Iterator[pa.Table]:
    """Rows of all sources that are in no shard yet, as tables of `schemas.fields.PAIRS`."""
    seen: set[bytes] = set()
    for position, source in enumerate(sources):
        label = f"{source.kind}:{position}"
        reporter.note(f"reading {source.path}")
        for rows in read(source):
            uids, keep = [], []
            for url, text, reason in zip(*(rows.column(c).to_pylist() for c in ("url", "text", "reason")), strict=True):
                uid = pair_uid(url, text)
                key = bytes.fromhex(uid)
                new = key not in known and key not in seen
                if new:
                    seen.add(key)
                    uids.append(uid)
                    admission.new += 1
                    admission.malformed += reason is not None
                elif key in seen:
                    admission.repeated += 1
                else:
                    admission.known += 1
                keep.append(new)
            fresh = rows.filter(pa.array(keep, pa.bool_()))
            columns = {
                "uid": pa.array(uids, pa.string()),
                "source": pa.array([label] * len(uids), pa.string()),
                "refresh": pa.array([refresh] * len(uids), pa.int32()),
                **{name: fresh.column(name) for name in fresh.column_names},
            }
            yield pa.table({f.name: columns[f.name] for f in fields.PAIRS}, schema=fields.PAIRS)


def _shards(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """Cut rows into shards of `size`; within a buffer, pairs with the same URL stand together at its first place."""
    buffer: list[pa.Table] = []
    buffered = 0
    for table in tables:
        buffer.append(table)
        buffered += table.num_rows
        if buffered >= BUFFERED_SHARDS * size:
            rows = _grouped(pa.concat_tables(buffer))
            whole = rows.num_rows // size * size
            yield from (rows.slice(start, size) for start in range(0, whole, size))
            buffer = [rows.slice(whole)]
            buffered = rows.num_rows - whole
    if buffered:
        rows = _grouped(pa.concat_tables(buffer))
        yield from (rows.slice(start, size) for start in range(0, rows.num_rows, size))


def _grouped(rows: pa.Table) -> pa.Table:
    first: dict[str | None, int] = {}
    places = [first.setdefault(url, len(first)) for url in rows.column("url").to_pylist()]
    order = sorted(range(len(places)), key=places.__getitem__)
    return rows.take(pa.array(order, pa.int64())).combine_chunks()
