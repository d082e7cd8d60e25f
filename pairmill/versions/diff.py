"""What is in one snapshot and not in another.

A file's name carries its checksum, so a shard whose files are the same in both snapshots is the same: only the others
are read, of them only the columns that are compared, and they are joined by uid in DuckDB on disk. A diff costs what
changed, in time, and little memory.
"""
# ruff: noqa: S608 - SQL is put together from names of the store, quoted by `_name`

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pairmill.errors import ConfigError, StoreError
from pairmill.store import LEDGER_TABLE, PAIRS_TABLE, DataFile, Snapshot, open_delta, read_files, stream_files
from pairmill.versions.history import config_changes, stage_tables
from schemas import fields
from schemas.reasons import Status

if TYPE_CHECKING:
    import duckdb

MEMORY = "1GB"
"""What DuckDB may use before it goes on on disk."""


class By(str, Enum):
    """How the pairs that changed are counted."""

    REASON = "reason"
    SOURCE = "source"
    SHARD = "shard"


@dataclass(frozen=True)
class GroupChange:
    """Pairs that came, went or changed sides, of one reason, source or shard."""

    key: str | None
    """By reason: why B does not keep the pairs that came or are no longer kept, and why A did not keep those that went
    or are newly kept; null for pairs that are kept there. Of a pair that went, source and shard are A's."""
    pairs_in: int
    """In B and not in A."""
    pairs_out: int
    """In A and not in B."""
    newly_kept: int
    """In both; kept in B and not in A."""
    no_longer_kept: int
    """In both; kept in A and not in B."""


@dataclass(frozen=True)
class ReasonChange:
    """Pairs in both whose reason is another one; null where they are kept."""

    a: str | None
    b: str | None
    pairs: int


@dataclass(frozen=True)
class ValueChange:
    """What became of one measured value of the pairs that are in both."""

    column: str
    changed: int
    """Both have a value, and they differ."""
    gained: int
    """Only B has one."""
    lost: int
    """Only A has one."""
    mean_change: float | None = None
    """B - A, mean over the changed ones; null for what is no number."""


@dataclass(frozen=True)
class StageChange:
    """A stage whose version (model, parameters, inputs), and so its table, is another one; null where it is missing."""

    stage: str
    a: str | None
    b: str | None


@dataclass(frozen=True)
class KeyChange:
    """A key of the config, a model or a software version that differs; null where a side lacks it."""

    key: str
    a: Any
    b: Any


@dataclass(frozen=True)
class DiffReport:
    """How snapshot B differs from snapshot A, as both read now: what was taken down since is in neither.

    ``kept_b = kept_a + kept_in - kept_out + newly_kept - no_longer_kept``, and ``pairs_b = pairs_a + pairs_in -
    pairs_out``.
    """

    a: int
    b: int
    pairs_a: int
    pairs_b: int
    kept_a: int
    kept_b: int
    pairs_in: int
    pairs_out: int
    kept_in: int
    """Those of `pairs_in` that B keeps."""
    kept_out: int
    """Those of `pairs_out` that A kept."""
    newly_kept: int
    no_longer_kept: int
    by: By
    groups: list[GroupChange]
    reasons: list[ReasonChange]
    """Most frequent first."""
    image: ValueChange
    """By the sha256 of the bytes as fetched."""
    caption: ValueChange
    """The text of rank 0, of pairs kept in both."""
    scores: list[ValueChange]
    """Every measured number (clip_score, itm_score, those of heads ...) with a difference."""
    stages: list[StageChange]
    computed: dict[str, int]
    """Rows that each stage computed in the snapshots after the earlier one, up to the later one."""
    config: list[KeyChange]
    models: list[KeyChange]
    software: list[KeyChange]
    shards_read: int
    """Shards of which something differs; the others were not read."""
    listed: list[dict[str, Any]] = field(default_factory=list)
    """Pairs that changed, where asked for: change, uid, url, shard, reason_a, reason_b."""


def diff(a: Snapshot, b: Snapshot, *, by: By = By.REASON, listed: int = 0) -> DiffReport:
    """Compare two snapshots of a dataset.

    Args:
        a: The earlier one, as a rule.
        b: The later one.
        by: How `DiffReport.groups` counts.
        listed: How many pairs of each kind of change to list.

    Raises:
        ConfigError: they are snapshots of two datasets.
        StoreError: a file is missing or damaged.
    """
    if a.dataset.url != b.dataset.url:
        raise ConfigError(f"{a!r} and {b!r} are of two datasets; a diff is between snapshots of one")
    import duckdb

    with a.dataset.reading(), tempfile.TemporaryDirectory(prefix="pairmill-diff-") as folder:
        options = {
            "memory_limit": MEMORY,
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "preserve_insertion_order": "false",
        }
        connection = duckdb.connect(str(Path(folder) / "diff.duckdb"), config=options)
        try:
            return _Diff(a, b, connection).report(by, listed)
        except duckdb.Error as error:
            raise StoreError(
                f"cannot compare {a!r} with {b!r}: {error}; is a file damaged or missing? "
                f"`pairmill verify {a.dataset.url}` says it"
            ) from error
        finally:
            connection.close()


class _Diff:
    """Two snapshots and a connection. The table ``d`` gets one row for each pair of a shard that differs: uid, shard_a,
    shard_b (null where the pair is not there), reason_a, reason_b (null where it is kept), rank_a, rank_b."""

    def __init__(self, a: Snapshot, b: Snapshot, connection: duckdb.DuckDBPyConnection) -> None:
        self._sides = {"a": a, "b": b}
        self._connection = connection
        self._read: set[int] = set()

    def report(self, by: By, listed: int) -> DiffReport:
        a, b = self._sides["a"], self._sides["b"]
        self._join_ledgers()
        image = self._images()
        caption = self._captions()
        scores = self._scores()
        counts = self._row(
            """SELECT count(*) FILTER (shard_a IS NULL), count(*) FILTER (shard_b IS NULL),
               count(*) FILTER (shard_a IS NULL AND reason_b IS NULL),
               count(*) FILTER (shard_b IS NULL AND reason_a IS NULL),
               count(*) FILTER (newly), count(*) FILTER (lost) FROM d"""
        )
        pairs_in, pairs_out, kept_in, kept_out, newly, lost = counts
        return DiffReport(
            a=a.record.id,
            b=b.record.id,
            pairs_a=_rows(a.files(LEDGER_TABLE)),
            pairs_b=_rows(b.files(LEDGER_TABLE)),
            kept_a=_kept(a),
            kept_b=_kept(b),
            pairs_in=pairs_in,
            pairs_out=pairs_out,
            kept_in=kept_in,
            kept_out=kept_out,
            newly_kept=newly,
            no_longer_kept=lost,
            by=by,
            groups=[GroupChange(*row) for row in self._groups(by)],
            reasons=[
                ReasonChange(*row)
                for row in self._rows(
                    """SELECT reason_a, reason_b, count(*) AS pairs FROM d WHERE both_there
                       AND reason_a IS DISTINCT FROM reason_b GROUP BY 1, 2 ORDER BY pairs DESC, 1, 2"""
                )
            ],
            image=image,
            caption=caption,
            scores=scores,
            stages=_stage_changes(a, b),
            computed=_computed(a, b),
            config=[KeyChange(*change) for change in config_changes(a.record, b.record)],
            models=_key_changes(a.record.models, b.record.models),
            software=_key_changes(a.record.software, b.record.software),
            shards_read=len(self._read),
            listed=self._listed(listed) if listed else [],
        )

    # -- which pairs, and their reasons --

    def _join_ledgers(self) -> None:
        shards = self._differing([(LEDGER_TABLE, LEDGER_TABLE), (PAIRS_TABLE, PAIRS_TABLE)])
        for side in self._sides:
            ranks = "text_ranks"
            self._load(
                side,
                LEDGER_TABLE,
                shards,
                [fields.UID, fields.REASON, fields.TEXT_RANKS],
                # where no recipe chose, the first text is the caption; 0: no text is kept
                f"uid, shard, reason, if({ranks} IS NULL, 1, coalesce(list_position({ranks}, 0), 0)) AS place",
                f"ledger_{side}",
            )
        self._connection.execute(
            """CREATE TABLE d AS
               SELECT *, shard_a IS NOT NULL AND shard_b IS NOT NULL AS both_there,
                 both_there AND reason_a IS NOT NULL AND reason_b IS NULL AS newly,
                 both_there AND reason_a IS NULL AND reason_b IS NOT NULL AS lost
               FROM (SELECT coalesce(a.uid, b.uid) AS uid, a.shard AS shard_a, b.shard AS shard_b,
                       a.reason AS reason_a, b.reason AS reason_b, a.place AS place_a, b.place AS place_b
                     FROM ledger_a a FULL JOIN ledger_b b ON a.uid = b.uid)"""
        )
        self._connection.execute("DROP TABLE ledger_a; DROP TABLE ledger_b")

    def _groups(self, by: By) -> list[tuple[Any, ...]]:
        key = {
            By.REASON: "if(shard_b IS NULL OR newly, reason_a, reason_b)",
            By.SOURCE: "s.source",
            By.SHARD: "coalesce(shard_b, shard_a)::VARCHAR",
        }[by]
        source = ""
        if by is By.SOURCE:
            changed = "FROM d WHERE NOT both_there OR newly OR lost"
            for side in self._sides:
                shards = [s for (s,) in self._rows(f"SELECT DISTINCT shard_{side} {changed}") if s is not None]
                self._load(side, PAIRS_TABLE, shards, [fields.UID, fields.SOURCE], "uid, source", f"source_{side}")
            source = """LEFT JOIN (SELECT coalesce(b.uid, a.uid) AS uid, coalesce(b.source, a.source) AS source
                        FROM source_a a FULL JOIN source_b b ON a.uid = b.uid) s ON s.uid = d.uid"""
        order = (
            "try_cast(key AS INTEGER), key" if by is By.SHARD else "pairs_in + pairs_out + newly_kept + lost_ DESC, key"
        )
        return self._rows(
            f"""SELECT key, pairs_in, pairs_out, newly_kept, lost_ FROM (
                  SELECT {key} AS key, count(*) FILTER (shard_a IS NULL) AS pairs_in,
                    count(*) FILTER (shard_b IS NULL) AS pairs_out, count(*) FILTER (newly) AS newly_kept,
                    count(*) FILTER (lost) AS lost_
                  FROM d {source} WHERE NOT both_there OR newly OR lost GROUP BY key) ORDER BY {order}"""
        )

    # -- what was measured of pairs that are in both --

    def _images(self) -> ValueChange:
        found = self._values([fields.SHA256.name], "image")
        return ValueChange("image", *found[0][1:4])

    def _scores(self) -> list[ValueChange]:
        by_tables: dict[tuple[str | None, str | None], list[str]] = defaultdict(list)
        columns = {side: snapshot.columns for side, snapshot in self._sides.items()}
        for name in sorted({*columns["a"], *columns["b"]}):
            tables = columns["a"].get(name), columns["b"].get(name)
            if PAIRS_TABLE not in tables and self._is_number(name, tables):
                by_tables[tables].append(name)
        changes = [
            ValueChange(*row)
            for number, names in enumerate(by_tables.values())
            for row in self._values(names, f"scores{number}", numbers=True)
        ]
        return sorted((c for c in changes if c.changed or c.gained or c.lost), key=lambda c: c.column)

    def _is_number(self, column: str, tables: Collection[str | None]) -> bool:
        for snapshot, table in zip(self._sides.values(), tables, strict=True):
            kind = _kinds(snapshot, table).get(column)
            if kind is not None:
                return bool(pa.types.is_floating(kind))
        return False

    def _values(self, columns: Sequence[str], name: str, *, numbers: bool = False) -> list[tuple[Any, ...]]:
        """Compare columns of one table; name, changed, gained, lost and mean change of each. Makes the table `name`:
        uid, shard and the columns of both sides."""
        tables = tuple(s.columns.get(columns[0]) for s in self._sides.values())
        shards = self._differing([tables])
        for (side, snapshot), table in zip(self._sides.items(), tables, strict=True):
            kinds = _kinds(snapshot, table)
            read = [pa.field(c, kinds.get(c, pa.float32() if numbers else pa.string())) for c in columns]
            self._load(side, table, shards, [fields.UID, *read], f"uid, shard, {_names(columns)}", f"{name}_{side}")
        selected = ", ".join(f"{s}.{_name(c)} AS {_name(f'{c} {s}')}" for c in columns for s in self._sides)
        self._connection.execute(
            f"""CREATE TABLE {name} AS SELECT * FROM (
                  SELECT coalesce(a.uid, b.uid) AS uid, coalesce(b.shard, a.shard) AS shard, {selected}
                  FROM {name}_a a FULL JOIN {name}_b b ON a.uid = b.uid)
                WHERE uid NOT IN (SELECT uid FROM d WHERE NOT both_there)"""
        )
        self._connection.execute(f"DROP TABLE {name}_a; DROP TABLE {name}_b")
        found = []
        for column in columns:
            a, b = (_name(f"{column} {side}") for side in self._sides)
            change = f"avg({b}::DOUBLE - {a}) FILTER ({a} <> {b} AND isfinite({a}) AND isfinite({b}))"
            found.append(
                self._row(
                    f"""SELECT '{column.replace("'", "''")}', count(*) FILTER ({a} <> {b}),
                        count(*) FILTER ({a} IS NULL AND {b} IS NOT NULL),
                        count(*) FILTER ({a} IS NOT NULL AND {b} IS NULL),
                        {change if numbers else "NULL"} FROM {name}"""
                )
            )
        return found

    def _captions(self) -> ValueChange:
        """The text of rank 0 of pairs kept in both. Texts are read only where another place may have rank 0, or where
        the texts themselves may be others."""
        tables = tuple(s.columns.get(fields.CAPTIONS.name) for s in self._sides.values())
        other = self._differing([tables, (PAIRS_TABLE, PAIRS_TABLE)])
        moved = self._rows(
            """SELECT DISTINCT shard_a, shard_b FROM d
               WHERE both_there AND reason_a IS NULL AND reason_b IS NULL AND place_a <> place_b"""
        )
        shards = {s for pair in moved for s in pair} | other
        for side, table in zip(self._sides, tables, strict=True):
            self._load(
                side, PAIRS_TABLE, shards, [fields.UID, fields.TEXTS], "uid, [t.text FOR t IN texts] AS given", "given"
            )
            self._load(
                side,
                table,
                shards,
                [fields.UID, fields.CAPTIONS],
                "uid, [c.text FOR c IN captions] AS written",
                "written",
            )
            ledger = [fields.UID, fields.REASON, fields.TEXT_RANKS]
            self._load(side, LEDGER_TABLE, shards, ledger, "uid, shard, reason, text_ranks", "chosen")
            self._connection.execute(
                f"""CREATE TABLE caption_{side} AS SELECT c.uid, c.shard, md5(if(c.text_ranks IS NULL, given,
                      list_concat(coalesce(given, []), coalesce(written, [])))[
                        if(c.text_ranks IS NULL, 1, nullif(list_position(c.text_ranks, 0), 0))]) AS caption
                    FROM chosen c LEFT JOIN given g ON g.uid = c.uid LEFT JOIN written w ON w.uid = c.uid
                    WHERE c.reason IS NULL"""
            )
            self._connection.execute("DROP TABLE given; DROP TABLE written; DROP TABLE chosen")
        self._connection.execute(
            """CREATE TABLE caption AS SELECT uid, b.shard, a.caption AS "caption a", b.caption AS "caption b"
               FROM caption_a a JOIN caption_b b USING (uid)"""
        )
        a, b = '"caption a"', '"caption b"'
        counts = self._row(
            f"""SELECT count(*) FILTER ({a} <> {b}), count(*) FILTER ({a} IS NULL AND {b} IS NOT NULL),
                count(*) FILTER ({a} IS NOT NULL AND {b} IS NULL) FROM caption"""
        )
        return ValueChange("caption", *counts)

    # -- some of them --

    def _listed(self, number: int) -> list[dict[str, Any]]:
        kinds = [
            ("in", "d", "shard_a IS NULL"),
            ("out", "d", "shard_b IS NULL"),
            ("newly kept", "d", "newly"),
            ("no longer kept", "d", "lost"),
            ("other reason", "d", "both_there AND reason_a <> reason_b"),
            ("image", "image", '"sha256 a" <> "sha256 b"'),
            ("caption", "caption", '"caption a" <> "caption b"'),
        ]
        shard = {"d": "coalesce(shard_b, shard_a)"}
        parts = " UNION ALL ".join(
            f"""(SELECT {place} AS place, '{change}' AS change, uid, {shard.get(table, "shard")} AS shard
                 FROM {table} WHERE {condition} ORDER BY uid LIMIT {number})"""
            for place, (change, table, condition) in enumerate(kinds)
        )
        self._connection.execute(f"CREATE TABLE listed AS {parts}")
        here = "SELECT DISTINCT shard FROM listed WHERE change"
        gone, there = ([s for (s,) in self._rows(f"{here} {sign} 'out'")] for sign in ("=", "<>"))
        self._load("a", PAIRS_TABLE, gone, [fields.UID, fields.URL], "uid, url, shard", "url_a")
        self._load("b", PAIRS_TABLE, there, [fields.UID, fields.URL], "uid, url, shard", "url_b")
        # a pair that is not in d has the same line in both ledgers
        shards = [s for (s,) in self._rows(f"{here} IN ('image', 'caption')")]
        self._load("b", LEDGER_TABLE, shards, [fields.UID, fields.REASON], "uid, reason", "why")
        names = ("change", "uid", "url", "shard", "reason_a", "reason_b")
        rows = self._rows(
            """SELECT change, l.uid, url, l.shard,
                 if(d.uid IS NULL, reason, reason_a), if(d.uid IS NULL, reason, reason_b)
               FROM listed l LEFT JOIN d ON d.uid = l.uid LEFT JOIN why ON why.uid = l.uid
               LEFT JOIN (FROM url_a UNION FROM url_b) u ON u.uid = l.uid AND u.shard = l.shard
               ORDER BY l.place, l.uid"""
        )
        return [dict(zip(names, row, strict=True)) for row in rows]

    # -- reading --

    def _differing(self, tables: Sequence[tuple[str | None, ...]]) -> set[int]:
        """Shards of which at least one of these tables, given by side, has other files."""
        found: set[int] = set()
        for pair in tables:
            by_shard = []
            for snapshot, table in zip(self._sides.values(), pair, strict=True):
                names: dict[int, set[tuple[str, str]]] = defaultdict(set)
                for file in snapshot.files(table) if table else ():
                    names[file.shard].add((str(table), file.relative))
                by_shard.append(names)
            a, b = by_shard
            found |= {shard for shard in {*a, *b} if a.get(shard) != b.get(shard)}
        self._read |= found
        return found

    def _load(
        self, side: str, table: str | None, shards: Collection[int], columns: Sequence[pa.Field], select: str, name: str
    ) -> None:
        """Make a table of some columns of some shards of one side; it is empty where the snapshot has no such table."""
        snapshot = self._sides[side]
        wanted = set(shards)
        files = [f for f in snapshot.files(table) if f.shard in wanted] if table else []
        schema = pa.schema(columns)
        with stream_files(snapshot.dataset, files, schema, [*schema.names, "shard"]) as rows:
            self._connection.register("stored_rows", rows)
            self._connection.execute(f"CREATE TABLE {name} AS SELECT {select} FROM stored_rows")
            self._connection.unregister("stored_rows")

    def _rows(self, sql: str) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = self._connection.execute(sql).fetchall()
        return rows

    def _row(self, sql: str) -> tuple[Any, ...]:
        return self._rows(sql)[0]


def _kinds(snapshot: Snapshot, table: str | None) -> dict[str, pa.DataType]:
    """The types of a table's columns."""
    version = snapshot.record.tables.get(table) if table else None
    if table is None or version is None:
        return {}
    delta = open_delta(snapshot.dataset, table, version)
    return {} if delta is None else {f.name: f.type for f in pa.schema(delta.schema().to_arrow())}


def _rows(files: Sequence[DataFile]) -> int:
    return sum(f.rows for f in files)


def _kept(snapshot: Snapshot) -> int:
    """How many pairs a snapshot keeps now: as its record says, unless some were taken down since."""
    files = snapshot.files(LEDGER_TABLE)
    if _rows(files) == snapshot.record.admitted:
        return snapshot.record.kept
    counts = Counter(read_files(snapshot.dataset, files, fields.LEDGER, ["status"]).column("status").to_pylist())
    return counts[Status.KEPT.value]


def _stage_changes(a: Snapshot, b: Snapshot) -> list[StageChange]:
    old, new = stage_tables(a.record), stage_tables(b.record)
    stages = sorted({*old, *new})
    return [StageChange(s, old.get(s), new.get(s)) for s in stages if old.get(s) != new.get(s)]


def _computed(a: Snapshot, b: Snapshot) -> dict[str, int]:
    first, last = sorted((a.record.id, b.record.id))
    counts = Counter[str]()
    for record in a.dataset.snapshots():
        if first < record.id <= last:
            counts.update(record.computed)
    return dict(sorted(counts.items()))


def _key_changes(a: dict[str, str], b: dict[str, str]) -> list[KeyChange]:
    return [KeyChange(key, a.get(key), b.get(key)) for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


def _name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _names(names: Sequence[str]) -> str:
    return ", ".join(_name(name) for name in names)
