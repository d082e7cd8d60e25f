"""Admission: from the rows of the sources to pairs with a uid, in shards that never change again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pairmill.report.progress import Reporter
from pairmill.sources import read, source_identity
from pairmill.store import PAIRS_TABLE, DataFile, Dataset, read_files
from pairmill.tombstones import Tombstones
from schemas import fields
from schemas.config import RunConfig, Source

BUFFERED_SHARDS = 100
"""New pairs are gathered up to so many shards, so that pairs with the same URL come into the same shard."""


SEEN = "_sources.json"
"""A note beside the tables: which source files were read to their end, so that the same files need not be read again.
It holds for one version of the pairs table, so whatever takes pairs out makes it void; it may be deleted at any
time."""


@dataclass
class Admission:
    """What a refresh admitted. rows read = new + known + repeated + taken_down."""

    new: int = 0
    known: int = 0
    """Rows whose pair an earlier refresh admitted."""
    repeated: int = 0
    """Rows that say again what an earlier row of this refresh said."""
    taken_down: int = 0
    """Rows that a takedown forbids."""
    malformed: int = 0
    """Among the new ones: rows that could not be read as a pair; they keep a row with the reason."""
    files: list[DataFile] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows read."""
        return self.new + self.known + self.repeated + self.taken_down


def pair_uid(url: str | None, text: str | None) -> str:
    """The content identity of a pair: sha256 of url, newline and text, hex."""
    return hashlib.sha256(f"{url or ''}\n{text or ''}".encode()).hexdigest()


def pairs_file(refresh: int, rows: pa.Table) -> str:
    """The name, but for its checksum, of the file with the pairs of a shard: it says which refresh admitted them."""
    uids = "".join(rows.column("uid").to_pylist())
    return f"pairs-r{refresh}-{hashlib.sha256(uids.encode()).hexdigest()[:16]}"


def admit(config: RunConfig, dataset: Dataset, reporter: Reporter, *, dry_run: bool = False) -> Admission:
    """Read the sources and commit their new pairs, all at once, as new shards.

    A source whose files are as they were when they were read last is not read again. With `dry_run` nothing is
    written: the result says what would be admitted.

    Raises:
        SourceError: a source cannot be read at all.
    """
    table = dataset.table(PAIRS_TABLE, fields.PAIRS)
    admission = Admission()
    tombstones = Tombstones.load(dataset)
    seen = _SeenSources(dataset, table.version(), tombstones.version)
    unread = []
    for position, source in enumerate(config.source):
        rows = seen.rows(source)
        if rows is None:
            unread.append((position, source))
        else:
            admission.known += rows
            reporter.note(f"{source.path} is as it was when it was read: {rows} rows")
    if not unread:
        return admission
    stored = read_files(dataset, table.files(), fields.PAIRS, ["uid", "refresh", "shard"])
    known = set(map(bytes.fromhex, stored.column("uid").to_pylist()))
    refresh = (pc.max(stored.column("refresh")).as_py() or 0) + 1
    shard = _next_shard(stored.column("shard"))
    counts: list[tuple[Source, int]] = []
    for rows in _shards(_new_rows(unread, known, refresh, admission, tombstones, counts, reporter), config.shard_size):
        if not dry_run:
            with table.writer(shard, pairs_file(refresh, rows)) as writer:
                writer.write(rows)
                admission.files.append(writer.close())
        shard += 1
    if admission.files:
        table.commit(admission.files, transaction=("admit", refresh))
    if not dry_run:
        seen.remember(counts, table.version())
    return admission


def _next_shard(shards: pa.ChunkedArray) -> int:
    last = pc.max(shards).as_py()
    return 0 if last is None else last + 1


class _SeenSources:
    """Which sources were read, told by the names, sizes and times of their files."""

    def __init__(self, dataset: Dataset, pairs: int, tombstones: int) -> None:
        self._dataset = dataset
        self._path = dataset.path(SEEN)
        self._tombstones = tombstones
        self._known: dict[str, dict[str, Any]] = {}
        self._identities: dict[str, str | None] = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(dataset.fs.cat_file(self._path))
            if (found.get("pairs"), found.get("tombstones")) == (pairs, tombstones):
                self._known = found["sources"]

    def _identity(self, source: Source) -> str | None:
        """Before the source is read: a file that changes while it is read is read again next time."""
        key = self._key(source)
        if key not in self._identities:
            self._identities[key] = source_identity(source)
        return self._identities[key]

    @staticmethod
    def _key(source: Source) -> str:
        return hashlib.sha256(source.model_dump_json().encode()).hexdigest()

    def rows(self, source: Source) -> int | None:
        """How many rows it had, if it is as it was; else None."""
        entry = self._known.get(self._key(source))
        identity = self._identity(source)
        return entry["rows"] if entry and identity is not None and entry["identity"] == identity else None

    def remember(self, counts: Sequence[tuple[Source, int]], pairs: int) -> None:
        """All rows of these sources are in this version of the pairs table."""
        entries = dict(self._known)
        for source, rows in counts:
            if (identity := self._identity(source)) is not None:
                entries[self._key(source)] = {"identity": identity, "rows": rows}
        text = json.dumps({"pairs": pairs, "tombstones": self._tombstones, "sources": entries}, sort_keys=True).encode()
        if self._dataset.local:
            temporary = f"{self._path}.{os.getpid()}.tmp"
            with contextlib.suppress(OSError):  # it only saves time
                with open(temporary, "wb") as file:
                    file.write(text)
                os.replace(temporary, self._path)
        else:
            with contextlib.suppress(OSError):
                self._dataset.fs.pipe_file(self._path, text)


def _new_rows(
    sources: Iterable[tuple[int, Source]],
    known: set[bytes],
    refresh: int,
    admission: Admission,
    tombstones: Tombstones,
    counts: list[tuple[Source, int]],
    reporter: Reporter,
) -> Iterator[pa.Table]:
    """Rows of all sources that are in no shard yet, as tables of `schemas.fields.PAIRS`."""
    seen: set[bytes] = set()
    for position, source in sources:
        label = f"{source.kind}:{position}"
        reporter.note(f"reading {source.path}")
        before = admission.rows
        for rows in read(source):
            uids, keep = [], []
            for url, text, reason in zip(*(rows.column(c).to_pylist() for c in ("url", "text", "reason")), strict=True):
                digest = hashlib.sha256(f"{url or ''}\n{text or ''}".encode())
                key = digest.digest()
                new = False
                if key in seen:
                    admission.repeated += 1
                elif key in known:
                    admission.known += 1
                elif tombstones and tombstones.bars(digest.hexdigest(), url):
                    admission.taken_down += 1
                else:
                    new = True
                    seen.add(key)
                    uids.append(digest.hexdigest())
                    admission.new += 1
                    admission.malformed += reason is not None
                keep.append(new)
            if not uids:
                continue
            fresh = rows.filter(pa.array(keep, pa.bool_()))
            columns = {
                "uid": pa.array(uids, pa.string()),
                "source": pa.array([label] * len(uids), pa.string()),
                "refresh": pa.array([refresh] * len(uids), pa.int32()),
                **{name: fresh.column(name) for name in fresh.column_names},
            }
            yield pa.table({f.name: columns[f.name] for f in fields.PAIRS}, schema=fields.PAIRS)
        counts.append((source, admission.rows - before))


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
