"""What an export takes from a snapshot: which pairs, in which file, with which metadata.

Files follow the dataset: consecutive shards go into one file until it would hold more than `pairs_per_shard` *admitted*
pairs. So which file a pair belongs to depends neither on thresholds nor on shards that come later.
"""
# ruff: noqa: S608 - SQL is put together from numbers and from the condition that the caller asks for

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pairmill.errors import ConfigError, StoreError
from pairmill.query import connect, select
from pairmill.store import PAIRS_TABLE, DataFile, Snapshot, read_files
from schemas import fields

if TYPE_CHECKING:
    import duckdb

ENDINGS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
"""The ending of an image member by the format of the stored file."""

_FIRST = (
    "uid",
    "url",
    "caption",
    "status",
    "error_message",
    "width",
    "height",
    "original_width",
    "original_height",
    "sha256",
    "clip_score",
    "itm_score",
    "texts",
    "boxes",
)
"""Metadata columns in their order, after ``key``; the rest of the view ``pairs`` follows by name."""


@dataclass(frozen=True)
class Group:
    """The dataset shards that go into one file of an export."""

    number: int
    first: int
    last: int
    admitted: int


def group_shards(files: Sequence[DataFile], pairs_per_shard: int) -> list[Group]:
    """Consecutive shards, filled up to `pairs_per_shard` admitted pairs; a larger shard is a group of its own."""
    admitted: dict[int, int] = defaultdict(int)
    for file in files:
        admitted[file.shard] += file.rows
    groups: list[Group] = []
    for shard in sorted(admitted):
        last = groups[-1] if groups else None
        if last is None or last.admitted + admitted[shard] > pairs_per_shard:
            groups.append(Group(len(groups), shard, shard, admitted[shard]))
        else:
            groups[-1] = Group(last.number, last.first, shard, last.admitted + admitted[shard])
    return groups


class Selection:
    """The kept pairs of a snapshot that satisfy a condition. A context manager: it holds a DuckDB connection.

    Raises:
        ConfigError: the condition is no SQL expression over the view ``pairs``, or the snapshot has no images.
    """

    def __init__(self, snapshot: Snapshot, where: str | None, pairs_per_shard: int) -> None:
        if pairs_per_shard < 1:
            raise ConfigError(f"pairs_per_shard must be 1 or more, not {pairs_per_shard}")
        self.snapshot = snapshot
        self._images = snapshot.columns.get(fields.IMAGE.name)
        if self._images is None:
            raise ConfigError(f"the recipe {snapshot.record.recipe!r} stores no images, so there is nothing to export")
        self.groups = group_shards(snapshot.files(PAIRS_TABLE), pairs_per_shard)
        widest = max([pairs_per_shard, *(group.admitted for group in self.groups)])
        self._index_digits = max(4, len(str(widest - 1)))
        self._connection: duckdb.DuckDBPyConnection = connect(snapshot)
        try:
            self.pairs = self._select(where)
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Selection:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def _select(self, where: str | None) -> int:
        """Remember who is selected; the number of pairs."""
        import duckdb

        try:
            kept = self._connection.sql("FROM pairs WHERE status = 'kept'").set_alias("pairs")
            # `filter` takes an expression and nothing else: no other statement, no UNION, no other table.
            selected = kept.filter(where or "true").project("uid, shard").to_arrow_table()
        except duckdb.Error as error:
            raise ConfigError(
                f"where = {where!r} is no SQL condition over the view pairs: {error}\n"
                '`pairmill sql DATASET "DESCRIBE pairs"` shows its columns'
            ) from error
        self._connection.register("selected_pairs", selected)
        return selected.num_rows

    def key(self, group: Group, index: int) -> str:
        """img2dataset's key of a sample: five digits of the file, four or more of the position in it."""
        return f"{group.number:05d}{index:0{self._index_digits}d}"

    def metadata(self, group: Group) -> pa.Table:
        """The selected pairs of a group with all that is known of them, by shard and uid: one row a sample, ``key``
        first, and ``shard``. ``caption`` is the text of rank 0, ``texts`` the kept texts by rank."""
        here = f"shard BETWEEN {group.first} AND {group.last}"
        table = select(
            self._connection,
            f"""SELECT p.* EXCLUDE (text, status, reason, detail, duplicate_of), 'success' AS status,
                NULL::VARCHAR AS error_message, t.texts, b.boxes
                FROM (FROM pairs WHERE {here}) p
                SEMI JOIN (FROM selected_pairs WHERE {here}) s ON p.uid = s.uid
                LEFT JOIN (SELECT uid, list({{text: text, source: source, clip_score: clip_score,
                  itm_score: itm_score}} ORDER BY rank) AS texts
                  FROM texts WHERE {here} AND kept GROUP BY uid) t ON t.uid = p.uid
                LEFT JOIN (SELECT uid, list({{label: label, x1: x1, y1: y1, x2: x2, y2: y2, score: score,
                  source: source}} ORDER BY label, x1, y1, x2, y2) AS boxes FROM boxes WHERE {here} GROUP BY uid) b
                  ON b.uid = p.uid
                ORDER BY p.shard, p.uid""",
        )
        keys = pa.array([self.key(group, index) for index in range(table.num_rows)], pa.string())
        first = [name for name in _FIRST if name in table.column_names]
        rest = sorted(set(table.column_names) - set(first))
        return table.select([*first, *rest]).add_column(0, pa.field("key", pa.string()), keys)

    def images(self, metadata: pa.Table) -> Iterator[tuple[pa.Table, list[pa.Buffer]]]:
        """The rows of `metadata` with their stored image files, not copied, one dataset shard at a time.

        Raises:
            StoreError: a pair that is kept has no image.
        """
        assert self._images is not None
        files: dict[int, list[DataFile]] = defaultdict(list)
        for file in self.snapshot.files(self._images):
            files[file.shard].append(file)
        schema = pa.schema([fields.UID, fields.IMAGE])
        start = 0
        for shard, samples in Counter(metadata.column("shard").to_pylist()).items():  # in order, as the rows
            rows = metadata.slice(start, samples)
            start += samples
            stored = read_files(self.snapshot.dataset, files[shard], schema, ["uid", "image"])
            position = {uid: i for i, uid in enumerate(stored.column("uid").to_pylist())}
            column = stored.column("image")
            images = []
            for uid in rows["uid"].to_pylist():
                image = column[position[uid]].as_buffer() if uid in position else None
                if image is None:
                    raise StoreError(
                        f"the pair {uid} is kept but has no stored image; "
                        "run the refresh again, then export the new snapshot"
                    )
                images.append(image)
            yield rows, images


def as_json(rows: pa.Table) -> list[dict[str, Any]]:
    """Metadata rows as JSON values: single-precision numbers in their seven significant digits, NaN as null, the
    source's own columns (``extra``) beside ours. Where names meet, ours win."""
    columns = {name: [_plain(v, column.type) for v in column.to_pylist()] for name, column in _columns(rows)}
    extras = columns.pop("extra", [None] * rows.num_rows)
    plain = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [{**_object(extra), **row} for extra, row in zip(extras, plain, strict=True)]


def _columns(rows: pa.Table) -> Iterator[tuple[str, pa.ChunkedArray]]:
    return zip(rows.column_names, rows.columns, strict=True)


def _object(extra: str | None) -> dict[str, Any]:
    value = json.loads(extra) if extra else {}
    return value if isinstance(value, dict) else {}


def _plain(value: Any, kind: pa.DataType) -> Any:
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            return None
        return float(f"{value:.7g}") if pa.types.is_float32(kind) else value
    if isinstance(value, list):
        return [_plain(v, kind.value_type) for v in value]
    if isinstance(value, dict):
        return {f.name: _plain(value[f.name], f.type) for f in kind}
    return value
