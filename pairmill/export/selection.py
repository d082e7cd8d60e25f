"""What an export takes from a snapshot: which pairs, in which file, with which metadata.

Files follow the dataset: consecutive shards go into one file until it would hold more than `pairs_per_shard` *admitted*
pairs. So which file a pair belongs to depends neither on thresholds nor on shards that come later. Where an export is
there already its boundaries hold, and shards that are new to it go into files of their own behind them.
"""
# ruff: noqa: S608 - SQL is put together from numbers and from the condition that the caller asks for

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pairmill.errors import ConfigError, StoreError
from pairmill.query import connect, filtered, select
from pairmill.store import PAIRS_TABLE, DataFile, Snapshot, read_files
from schemas import fields

if TYPE_CHECKING:
    import duckdb

    from schemas.config import InstructKind

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

_DIGESTED = 1000
"""Rows that are digested at a time; another number gives other digests."""

_TOLD_ELSEWHERE = ("text", "status", "reason", "detail", "duplicate_of")
"""Columns of the view ``pairs`` that say nothing of a kept pair, or what its texts say."""

_UNSTEADY = ("cluster", "http_status", "final_url", "etag", "last_modified", "attempts", "retry_at")
"""Columns that change though the pair itself does not: when a duplicate of it comes, when its image is looked at again,
and while it is deferred. They are not exported (`steady`), or such events would change old files for nothing."""


@dataclass(frozen=True)
class Group:
    """The dataset shards that go into one file of an export."""

    number: int
    first: int
    last: int
    admitted: int
    digits: int = 4
    """Digits of the position in its keys."""


def group_shards(files: Sequence[DataFile], pairs_per_shard: int, pinned: Sequence[Group] = ()) -> list[Group]:
    """Consecutive shards, filled up to `pairs_per_shard` admitted pairs; a larger shard is a group of its own.

    Groups that are `pinned` keep their number, shards and digits, however few pairs are left in them; those at the end
    without any shard are left out. Shards outside of them make groups behind them.
    """
    admitted: dict[int, int] = defaultdict(int)
    for file in files:
        admitted[file.shard] += file.rows
    shards = sorted(admitted)
    groups: list[Group] = []
    free = set(shards)
    for group in pinned:
        inside = shards[bisect_left(shards, group.first) : bisect_left(shards, group.last + 1)]
        free.difference_update(inside)
        groups.append(replace(group, admitted=sum(admitted[shard] for shard in inside)))
    while groups and not groups[-1].admitted:
        groups.pop()
    starts = sorted(group.first for group in groups)
    added: list[Group] = []
    for shard in sorted(free):
        last = added[-1] if added else None
        # A group is a range of shards: it must not reach over one that is pinned.
        apart = last is not None and bisect_left(starts, last.last) != bisect_left(starts, shard)
        if last is None or apart or last.admitted + admitted[shard] > pairs_per_shard:
            added.append(Group(len(groups) + len(added), shard, shard, admitted[shard]))
        else:
            added[-1] = replace(last, last=shard, admitted=last.admitted + admitted[shard])
    widest = max([pairs_per_shard, *(group.admitted for group in added)])
    digits = max([4, len(str(widest - 1)), *(group.digits for group in groups)])
    return groups + [replace(group, digits=digits) for group in added]


class Selection:
    """The kept pairs of a snapshot that satisfy a condition. A context manager: it holds a DuckDB connection.

    Args:
        snapshot: Of which dataset.
        where: The condition; null: all.
        pairs_per_shard: Admitted pairs a group at most.
        kinds: Select only pairs with conversations of these kinds, and give these.
        columns: Columns of the store to add to the metadata.

    Raises:
        ConfigError: the condition is no SQL expression over the view ``pairs``, or the snapshot has no images, or no
            conversations though some are asked for.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        where: str | None,
        pairs_per_shard: int,
        *,
        kinds: Sequence[InstructKind] = (),
        columns: Sequence[str] = (),
    ) -> None:
        if pairs_per_shard < 1:
            raise ConfigError(f"pairs_per_shard must be 1 or more, not {pairs_per_shard}")
        self.snapshot = snapshot
        images = snapshot.columns.get(fields.IMAGE.name)
        if images is None:
            raise ConfigError(f"the recipe {snapshot.record.recipe!r} stores no images, so there is nothing to export")
        if kinds and fields.INSTRUCTIONS.name not in snapshot.columns:
            raise ConfigError(
                f"the recipe {snapshot.record.recipe!r} writes no conversations, so there are none to export; name "
                "their kinds in the config, such as `instruct: {kinds: {conversation: 1.0}}`, and run a refresh"
            )
        self._images: str = images
        self._kinds = tuple(kinds)
        self._columns = tuple(columns)
        self._pairs_per_shard = pairs_per_shard
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
        pairs = "FROM pairs WHERE status = 'kept'"
        if self._kinds:
            pairs += f" AND uid IN (SELECT uid FROM instructions WHERE {self._wanted})"
        selected = filtered(self._connection, pairs, where or "true")
        self._connection.register("selected_pairs", selected)
        return selected.num_rows

    @property
    def _wanted(self) -> str:
        """Which rows of the view ``instructions`` are conversations that are asked for."""
        return f"kind IN ({', '.join(map(repr, self._kinds))}) AND reason IS NULL AND len(messages) > 0"

    @property
    def groups(self) -> list[Group]:
        """The groups of a new export."""
        return self.groups_behind(())

    def groups_behind(self, pinned: Sequence[Group]) -> list[Group]:
        """The groups of an export of which these are there already (`group_shards`)."""
        return group_shards(self.snapshot.files(PAIRS_TABLE), self._pairs_per_shard, pinned)

    def key(self, group: Group, index: int) -> str:
        """img2dataset's key of a sample: five digits of the file, four or more of the position in it."""
        return f"{group.number:05d}{index:0{group.digits}d}"

    def metadata(self, group: Group) -> pa.Table:
        """The selected pairs of a group with all that is known of them, by shard and uid: one row a sample, ``key``
        first, and ``shard``. ``caption`` is the text of rank 0, ``texts`` the kept texts by rank. Where kinds of
        conversations were asked for, ``conversations`` are those of a pair, in their order: kind, messages, and boxes
        in pixels of the stored image."""
        here = f"shard BETWEEN {group.first} AND {group.last}"
        added, joins = self._added(here)
        table = select(
            self._connection,
            f"""SELECT p.* EXCLUDE ({", ".join(_TOLD_ELSEWHERE)}), 'success' AS status,
                NULL::VARCHAR AS error_message, t.texts, b.boxes{added}
                FROM (FROM pairs WHERE {here}) p
                SEMI JOIN (FROM selected_pairs WHERE {here}) s ON p.uid = s.uid
                LEFT JOIN (SELECT uid, list({{text: text, source: source, clip_score: clip_score,
                  itm_score: itm_score}} ORDER BY rank) AS texts
                  FROM texts WHERE {here} AND kept GROUP BY uid) t ON t.uid = p.uid
                LEFT JOIN (SELECT uid, list({{label: label, x1: x1, y1: y1, x2: x2, y2: y2, score: score,
                  source: source}} ORDER BY label, x1, y1, x2, y2) AS boxes FROM boxes WHERE {here} GROUP BY uid) b
                  ON b.uid = p.uid
                {joins}
                ORDER BY p.shard, p.uid""",
        )
        keys = pa.array([self.key(group, index) for index in range(table.num_rows)], pa.string())
        first = [name for name in _FIRST if name in table.column_names]
        rest = sorted(set(table.column_names) - set(first))
        return table.select([*first, *rest]).add_column(0, pa.field("key", pa.string()), keys)

    def _added(self, here: str) -> tuple[str, str]:
        """What else is selected, and the joins for it."""
        added, joins = "", ""
        if self._kinds:
            order = f"list_position([{', '.join(map(repr, self._kinds))}], kind)"
            added += ", c.conversations"
            joins += f"""LEFT JOIN (SELECT uid, list({{kind: kind, messages: messages, boxes: coalesce(boxes, [])}}
                ORDER BY {order}) AS conversations FROM instructions WHERE {here} AND {self._wanted} GROUP BY uid) c
                ON c.uid = p.uid """
        for place, column in enumerate(self._columns):
            table = self.snapshot.columns.get(column)
            added += f', s{place}."{column}"' if table else f', NULL AS "{column}"'
            if table:
                joins += f"""LEFT JOIN (SELECT uid, any_value("{column}") AS "{column}" FROM store."{table}"
                    WHERE {here} GROUP BY uid) s{place} ON s{place}.uid = p.uid """
        return added, joins

    def content(self, metadata: pa.Table) -> str:
        """A digest of what a file holds: its metadata, in order, and which images. It reads no image: a stored one is
        known by its table (how it was made), the sha256 of what was fetched, and its format."""
        columns = [[field.name, str(field.type)] for field in metadata.schema]
        digest = hashlib.sha256(json.dumps([self._images, metadata.num_rows, columns]).encode())
        for start in range(0, metadata.num_rows, _DIGESTED):  # so that each column is one array, however long its texts
            for column in metadata.slice(start, _DIGESTED).columns:
                _digest_values(digest, pa.concat_arrays(column.chunks))
        return digest.hexdigest()

    def images(self, metadata: pa.Table) -> Iterator[tuple[pa.Table, list[pa.Buffer]]]:
        """The rows of `metadata` with their stored image files, not copied, one dataset shard at a time.

        Raises:
            StoreError: a pair that is kept has no image.
        """
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


def without_images(metadata: pa.Table) -> Iterator[tuple[pa.Table, list[None]]]:
    """As `Selection.images`, and no image is read."""
    for start in range(0, metadata.num_rows, _DIGESTED):
        rows = metadata.slice(start, _DIGESTED)
        yield rows, [None] * rows.num_rows


def _digest_values(digest: hashlib._Hash, values: pa.Array) -> None:
    """Feed the values of an array, however it is laid out: which are null, how long, and their bytes."""
    kind = values.type
    digest.update(np.packbits(values.is_null().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_struct(kind):
        for child in values.flatten():  # with the nulls of the structs
            _digest_values(digest, child)
    elif pa.types.is_list(kind):
        digest.update(pc.fill_null(pc.list_value_length(values), 0).to_numpy())
        _digest_values(digest, values.flatten())
    elif pa.types.is_string(kind):
        known = pc.fill_null(values, "")
        _, places, data = known.buffers()
        offsets = np.frombuffer(places, np.int32, len(known) + 1, known.offset * 4)
        digest.update(offsets - offsets[0])
        if data is not None:
            digest.update(memoryview(data)[offsets[0] : offsets[-1]])
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        digest.update(pc.fill_null(values, 0).to_numpy())
    elif pa.types.is_boolean(kind):
        digest.update(np.packbits(pc.fill_null(values, False).to_numpy(zero_copy_only=False)).tobytes())
    else:  # of a stage of one's own
        digest.update(repr(values.to_pylist()).encode())


def steady(metadata: pa.Table) -> pa.Table:
    """The columns that are exported: all but those that change though the pair itself does not."""
    return metadata.select([name for name in metadata.column_names if name not in _UNSTEADY])


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
