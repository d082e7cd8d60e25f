"""Admission: from the rows of the sources to pairs with a uid, in shards that never change again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pairmill.report.progress import Reporter
from pairmill.seen import SeenFiles
from pairmill.sources import read, source_files
from pairmill.store import PAIRS_TABLE, DataFile, Dataset, read_files
from pairmill.tombstones import Tombstones
from schemas import fields
from schemas.config import RunConfig, Source

BUFFERED_SHARDS = 100
"""New pairs are gathered up to so many shards, so that pairs with the same URL come into the same shard."""


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

    A file that is as it was when it was read last is not read again. With `dry_run` nothing is written: the result says
    what would be admitted.

    Raises:
        SourceError: a source cannot be read at all.
    """
    table = dataset.table(PAIRS_TABLE, fields.PAIRS)
    admission = Admission()
    seen = SeenFiles(dataset, table.version())
    unread = _unread(config.source, seen, admission, reporter)
    if not unread:
        return admission
    stored = read_files(dataset, table.files(), fields.PAIRS, ["uid", "refresh", "shard"])
    known = set(map(bytes.fromhex, stored.column("uid").to_pylist()))
    refresh = (pc.max(stored.column("refresh")).as_py() or 0) + 1
    shard = _next_shard(stored.column("shard"))
    new = _new_rows(unread, known, refresh, admission, Tombstones.load(dataset), seen, reporter)
    for rows in _shards(new, config.shard_size):
        if not dry_run:
            with table.writer(shard, pairs_file(refresh, rows)) as writer:
                writer.write(rows)
                admission.files.append(writer.close())
        shard += 1
    if admission.files:
        table.commit(admission.files)
    if not dry_run:
        seen.save(table.version())
    return admission


def _unread(sources: Sequence[Source], seen: SeenFiles, admission: Admission, reporter: Reporter) -> list[_File]:
    """The files that are new or not as they were; the rows of the others count as known."""
    unread = []
    for position, source in enumerate(sources):
        files = source_files(source)
        unchanged = 0
        for file, identity in files:
            rows = seen.rows(file, identity)
            if rows is None:
                unread.append(_File(f"{source.kind}:{position}", file, identity))
            else:
                unchanged += 1
                admission.known += rows
        if unchanged:
            reporter.note(f"{source.path}: {unchanged} of {len(files)} files are as they were")
    return unread


def _next_shard(shards: pa.ChunkedArray) -> int:
    last = pc.max(shards).as_py()
    return 0 if last is None else last + 1


@dataclass(frozen=True)
class _File:
    """A file of a source, to be read."""

    label: str
    """The source's kind and position."""
    source: Source
    """As a source of its own."""
    identity: str | None


def _new_rows(
    files: Iterable[_File],
    known: set[bytes],
    refresh: int,
    admission: Admission,
    tombstones: Tombstones,
    seen_files: SeenFiles,
    reporter: Reporter,
) -> Iterator[pa.Table]:
    """Rows of all files that are in no shard yet, as tables of `schemas.fields.PAIRS`."""
    seen: set[bytes] = set()
    for file in files:
        reporter.note(f"reading {file.source.path}")
        before = admission.rows
        for rows in read(file.source):
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
                "source": pa.array([file.label] * len(uids), pa.string()),
                "refresh": pa.array([refresh] * len(uids), pa.int32()),
                **{name: fresh.column(name) for name in fresh.column_names},
            }
            yield pa.table({f.name: columns[f.name] for f in fields.PAIRS}, schema=fields.PAIRS)
        seen_files.add(file.source, file.identity, admission.rows - before)


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
