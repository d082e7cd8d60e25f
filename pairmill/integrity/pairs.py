"""Rebuilding files of the pairs table, which no stage can compute again: their rows come from the sources."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pairmill.admission import pair_uid, pairs_file
from pairmill.errors import StoreError
from pairmill.integrity.examine import Examination, holds_records
from pairmill.integrity.logs import refresh_in
from pairmill.report.progress import Reporter
from pairmill.sources import read
from pairmill.store import PAIRS_TABLE, DataFile, Dataset, checksum_of, read_files
from pairmill.tombstones import Tombstones
from schemas import fields
from schemas.config import RunConfig

_DIGEST = re.compile(r"(?:^|/)pairs-(?:r\d+-)?([0-9a-f]{16})-")


SPARE = 50_000
"""Rows of the sources in no shard that are looked through for pairs that no table names."""

_POSITION = pa.field("position", pa.int64())
"""Where a row stands in the sources."""


@dataclass
class DamagedShard:
    """A file of pairs that is damaged, and what is known of it."""

    file: DataFile
    uids: frozenset[str]
    """The pairs that it held, as the other tables of the shard say."""
    refresh: int
    sure: bool
    """Whether its name or the log says which refresh admitted it; else a neighbour's is taken."""
    published: bool
    """Whether a snapshot names it."""
    rows: list[pa.Table] = field(default_factory=list)
    """What the sources still hold of it."""
    barred: set[str] = field(default_factory=set)
    """Pairs that a takedown forbids: they do not come back."""

    @property
    def shard(self) -> int:
        """Its shard."""
        return self.file.shard

    @property
    def found(self) -> set[str]:
        """The pairs that the sources still hold."""
        return {uid for table in self.rows for uid in table.column("uid").to_pylist()}

    @property
    def lost(self) -> list[str]:
        """The pairs that the sources hold no more."""
        return sorted(self.uids - self.found - self.barred)

    @property
    def unknown(self) -> int:
        """How many pairs it held that no other table names."""
        return max(0, self.file.rows - len(self.uids))

    @property
    def digest(self) -> str | None:
        """The digest of its uids, in order, that its name says."""
        said = _DIGEST.search(self.file.relative)
        return said[1] if said else None


def damaged_shards(dataset: Dataset, examination: Examination, files: Sequence[DataFile]) -> list[DamagedShard]:
    """What is known of damaged files of pairs, by shard."""
    wanted = {f.shard for f in files}
    uids: dict[int, set[str]] = {shard: set() for shard in wanted}
    tombstones = Tombstones.load(dataset)
    for table, needs in examination.needs.items():
        if table != PAIRS_TABLE and not holds_records(table):
            for need in needs.values():
                if need.file.shard in wanted:  # old versions too: a pair is in one shard for ever
                    uids[need.file.shard].update(_uids(dataset, need.file))
    admitted = examination.logs[PAIRS_TABLE].refreshes
    found = []
    for file in sorted(files, key=lambda f: f.shard):
        said = refresh_in(file.relative) or admitted.get(file.shard)
        near = said or _neighbour(dataset, examination, file.shard)
        known = frozenset(uid for uid in uids[file.shard] if uid not in tombstones.uids)
        published = bool(examination.needs[PAIRS_TABLE][file.relative].snapshots)
        found.append(DamagedShard(file, known, near, said is not None, published))
    return found


def _uids(dataset: Dataset, file: DataFile) -> list[str]:
    """The uids of a file, none when it is damaged."""
    try:
        if file.checksum and checksum_of(dataset, file.path) != file.checksum:
            return []
        return read_files(dataset, [file], pa.schema([fields.UID]), ["uid"]).column("uid").to_pylist()
    except (OSError, StoreError):
        return []


def _neighbour(dataset: Dataset, examination: Examination, shard: int) -> int:
    """The refresh of the nearest shard below that can be read, or above."""
    files = [need.file for need in examination.needs[PAIRS_TABLE].values() if need.current]
    for file in sorted(files, key=lambda f: (f.shard > shard, abs(f.shard - shard))):
        said = refresh_in(file.relative)
        if said is not None:
            return said
        if file.shard != shard and _uids(dataset, file):
            return int(read_files(dataset, [file], fields.PAIRS, ["refresh"]).column("refresh")[0].as_py())
    return 1


def look_up(
    config: RunConfig, dataset: Dataset, examination: Examination, shards: Sequence[DamagedShard], reporter: Reporter
) -> None:
    """Read the sources once and take from them the rows that damaged files held.

    Raises:
        SourceError: a source cannot be read.
    """
    owner = {uid: shard for shard in shards for uid in shard.uids}
    spare: list[pa.Table] = []
    elsewhere = _elsewhere(dataset, examination, shards) if any(shard.unknown for shard in shards) else None
    tombstones = Tombstones.load(dataset)
    seen: set[str] = set()
    start = 0
    for number, source in enumerate(config.source):
        reporter.note(f"reading {source.path} for the pairs of {len(shards)} damaged files")
        for rows in read(source):
            picked: dict[int, list[int]] = {}
            uids = []
            for index, (url, text) in enumerate(
                zip(rows.column("url").to_pylist(), rows.column("text").to_pylist(), strict=True)
            ):
                uid = pair_uid(url, text)
                uids.append(uid)
                shard = owner.get(uid)
                if uid in seen or (shard is None and (elsewhere is None or bytes.fromhex(uid) in elsewhere)):
                    continue
                seen.add(uid)
                if not tombstones.bars(uid, url):
                    picked.setdefault(-1 if shard is None else shard.shard, []).append(index)
                elif shard is not None:
                    shard.barred.add(uid)
            for shard in shards:
                if shard.shard in picked:
                    label = f"{source.kind}:{number}"
                    shard.rows.append(_pairs(rows, uids, picked[shard.shard], label, shard.refresh, start))
            if -1 in picked and sum(map(len, spare)) < SPARE:
                spare.append(_pairs(rows, uids, picked[-1], f"{source.kind}:{number}", 0, start))
            start += rows.num_rows
    _complete(dataset, examination, shards, spare)


def _elsewhere(dataset: Dataset, examination: Examination, shards: Sequence[DamagedShard]) -> set[bytes]:
    """The pairs of all other shards."""
    damaged = {shard.file.relative for shard in shards}
    needs = examination.needs[PAIRS_TABLE].values()
    files = [need.file for need in needs if need.current and need.file.relative not in damaged]
    return {bytes.fromhex(uid) for file in files for uid in _uids(dataset, file)}


def _pairs(
    rows: pa.Table, uids: Sequence[str], picked: Sequence[int], label: str, refresh: int, start: int
) -> pa.Table:
    """Some rows of a source as rows of the pairs table, and where they stand in the sources."""
    chosen = rows.take(pa.array(picked, pa.int64()))
    columns = {
        "uid": pa.array([uids[i] for i in picked], pa.string()),
        "source": pa.array([label] * len(picked), pa.string()),
        "refresh": pa.array([refresh] * len(picked), pa.int32()),
        **{name: chosen.column(name) for name in chosen.column_names},
        _POSITION.name: pa.array([start + i for i in picked], pa.int64()),
    }
    schema = fields.PAIRS.append(_POSITION)
    return pa.table({f.name: columns[f.name] for f in schema}, schema=schema)


def _complete(
    dataset: Dataset, examination: Examination, shards: Sequence[DamagedShard], spare: Sequence[pa.Table]
) -> None:
    """Find the pairs that no table names: rows of the sources, next to those that are known, whose uids have the digest
    that the file's name says."""
    left = pa.concat_tables(spare) if spare else None
    for shard in shards:
        if not shard.unknown or shard.digest is None or left is None:
            continue
        pool = pa.concat_tables([*shard.rows, left]).sort_by(_POSITION.name)
        place = fields.PAIRS.get_field_index("refresh")
        refresh = pa.array([shard.refresh] * len(pool), pa.int32())
        pool = pool.set_column(place, fields.PAIRS.field(place), refresh)
        for order in _orders(pool, last_url(dataset, examination, shard.shard - 1)):
            window = _window(pool.column("uid").to_pylist(), order, shard)
            if window is not None:
                shard.rows = [pool.take(pa.array(window, pa.int64()))]
                shard.uids = frozenset(shard.found)
                rest = pc.invert(pc.is_in(left.column("uid"), value_set=pa.array(sorted(shard.uids))))
                left = left.filter(rest)
                break


def _window(uids: Sequence[str], order: Sequence[int], shard: DamagedShard) -> Sequence[int] | None:
    """The places, in this order, of consecutive rows that have the digest of the shard and hold its known pairs."""
    size = shard.file.rows
    known = [at for at, index in enumerate(order) if uids[index] in shard.uids]
    first = max(0, known[-1] - size + 1) if known else 0
    last = min(known[0] if known else len(order), len(order) - size)
    for start in range(first, last + 1):
        chosen = order[start : start + size]
        if _digest([uids[index] for index in chosen]) == shard.digest:
            return chosen
    return None


def _digest(uids: Sequence[str]) -> str:
    return hashlib.sha256("".join(uids).encode()).hexdigest()[:16]


def write(dataset: Dataset, shard: DamagedShard, before: str | None) -> DataFile:
    """Write what was found of a shard as a file of the pairs table; `before`: the last URL of the shard before it.

    The rows stand in the order of the lost file where that can be told: its name is a digest of its uids.
    """
    found = pa.concat_tables(shard.rows).drop_columns(_POSITION.name)
    orders = [found.take(pa.array(order, pa.int64())).combine_chunks() for order in _orders(found, before)]
    rows, name = orders[0], pairs_file(shard.refresh, orders[0])
    for candidate in orders:
        if _digest(candidate.column("uid").to_pylist()) == shard.digest:
            rows, name = candidate, shard.file.relative.rpartition("/")[2].rpartition("-")[0]
            break
    table = dataset.table(PAIRS_TABLE, fields.PAIRS)
    with table.writer(shard.shard, name) as writer:
        writer.write(rows)
        return writer.close()


def _orders(rows: pa.Table, before: str | None) -> Iterator[list[int]]:
    """The orders that an admission may have given the rows: pairs of one URL stand together at its first place, and
    those whose URL the shard before ends with come first; or that of the sources."""
    urls = rows.column("url").to_pylist()
    starts: list[dict[str | None, int]] = [{}] if before is None else [{before: -1}, {}]
    for start in starts:
        first = dict(start)
        places = [first.setdefault(url, index) for index, url in enumerate(urls)]
        yield sorted(range(len(places)), key=places.__getitem__)
    yield list(range(rows.num_rows))


def last_url(dataset: Dataset, examination: Examination, shard: int) -> str | None:
    """The URL of the last pair of a shard, if its file can be read."""
    for need in examination.needs[PAIRS_TABLE].values():
        if need.current and need.file.shard == shard and _uids(dataset, need.file):
            urls = read_files(dataset, [need.file], fields.PAIRS, ["url"]).column("url").to_pylist()
            return urls[-1] if urls else None
    return None
