"""SQL over a snapshot, by DuckDB: the views that the command and the exports see.

Views are lazy. A query opens the Parquet files of the columns it names and reads those columns alone; image bytes are
read only when ``images.image`` is asked for. The connection can read the snapshot's files and nothing else: files come
through a file system that knows no other path and cannot write (`_SnapshotFiles`), and DuckDB's own access to disk,
network and extensions is switched off and locked.
"""
# ruff: noqa: S608 - SQL is put together from names and paths of the store, quoted by `_name` and `_text`

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa

from pairmill import storage
from pairmill.answers import ANSWERS, ANSWERS_TABLE, usage_sql
from pairmill.errors import ConfigError, StoreError
from pairmill.store import HISTORY_TABLE, LEDGER_TABLE, PAIRS_TABLE, SNAPSHOTS_TABLE
from schemas import fields
from schemas.snapshot import SNAPSHOTS

if TYPE_CHECKING:
    import duckdb

    from pairmill.store import DataFile, Dataset, Snapshot

VIEWS = ("pairs", "texts", "images", "image_history", "boxes", "rejected_boxes", "instructions", "usage", "snapshots")
"""What a query can name."""

_PROTOCOL = "snapshot"
_LEDGER = ("status", "reason", "detail", "duplicate_of", "cluster")
_RETRIES = ("attempts", "retry_at")
"""Columns of the ledger that older datasets lack."""
_NAMED = ("width", "height", "sha256", "clip_score", "itm_score")
"""Columns that ``pairs`` always has, null where the recipe does not measure them."""
_BOX = tuple(f.name for f in fields.BOX)
_INSTRUCTION = tuple(f.name for f in fields.INSTRUCTION if f.name != "kind")


def query(snapshot: Snapshot, sql: str) -> pa.Table:
    """The answer to one SELECT (also DESCRIBE, SHOW TABLES and SUMMARIZE).

    Raises:
        ConfigError: the SQL is wrong, or is no single SELECT; carries DuckDB's message and the views there are.
        StoreError: a file of the snapshot is missing or damaged, or memory does not hold what the query needs.
    """
    with connect(snapshot) as connection:
        return select(connection, sql)


def select(connection: duckdb.DuckDBPyConnection, sql: str) -> pa.Table:
    """As `query`, on a connection that is open already."""
    import duckdb

    try:
        statements = connection.extract_statements(sql)
        if [s.type for s in statements] != [duckdb.StatementType.SELECT]:
            raise ConfigError("a query must be one SELECT statement; to get data out, use `pairmill export`")
        return interruptible(connection, lambda: connection.sql(sql).to_arrow_table())
    except duckdb.OutOfMemoryException as error:
        raise _too_much(error) from error
    except duckdb.Error as error:
        if _is_about_a_file(error):
            raise _damage(error) from error
        raise ConfigError(f"{error}\nThere are the views {', '.join(VIEWS)}; `DESCRIBE pairs` shows columns") from error


def interruptible(connection: duckdb.DuckDBPyConnection, ask: Callable[[], pa.Table]) -> pa.Table:
    """What `ask` gets from the connection. Ctrl-C and SIGTERM end it: DuckDB itself does not look for signals before
    it is done, so it works in a thread of its own."""
    asked: futures.Future[pa.Table] = futures.Future()

    def work() -> None:
        try:
            asked.set_result(ask())
        except BaseException as error:  # noqa: BLE001 (raised where the result is asked for)
            asked.set_exception(error)

    thread = threading.Thread(target=work, name="sql", daemon=True)
    try:
        thread.start()
        return asked.result()
    except KeyboardInterrupt:
        while True:  # more than once: a query that has not quite begun would not notice
            connection.interrupt()
            futures.wait([asked], timeout=0.1)
            if asked.done() or not thread.is_alive():
                raise


def instruction_counts(snapshot: Snapshot) -> dict[str, dict[str, int]]:
    """Of the conversations of kept pairs, by kind: how many there are (``written``), and how many there are not, by
    reason. Empty where the recipe writes none. Reads no conversation.

    Raises:
        StoreError: a file of the snapshot is missing or damaged.
    """
    table = snapshot.columns.get(fields.INSTRUCTION_OUTCOMES.name)
    if table is None:
        return {}
    with connect(snapshot) as connection:
        rows = select(
            connection,
            f"""SELECT o.kind AS kind, coalesce(o.reason, 'written') AS reason, count(*) AS count
                FROM (SELECT unnest({fields.INSTRUCTION_OUTCOMES.name}) AS o FROM store.{_name(table)} i
                      JOIN store.{LEDGER_TABLE} l ON l.uid = i.uid AND l.shard = i.shard WHERE l.status = 'kept')
                GROUP BY ALL ORDER BY ALL""",
        ).to_pylist()
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        found.setdefault(row["kind"], {})[row["reason"]] = row["count"]
    return found


def where(snapshot: Snapshot, condition: str) -> pa.Table:
    """``uid`` and ``shard`` of the pairs that satisfy a condition over the view ``pairs``.

    Raises:
        ConfigError: it is no SQL condition.
    """
    with connect(snapshot) as connection:
        return filtered(connection, "FROM pairs", condition)


def filtered(connection: duckdb.DuckDBPyConnection, pairs: str, condition: str) -> pa.Table:
    """As `where`, of the rows of `pairs`, on a connection that is open already."""
    import duckdb

    try:
        # `filter` takes an expression and nothing else: no other statement, no UNION, no other table.
        chosen = connection.sql(pairs).set_alias("pairs").filter(condition).project("uid, shard")
        return interruptible(connection, chosen.to_arrow_table)
    except duckdb.OutOfMemoryException as error:
        raise _too_much(error) from error
    except duckdb.Error as error:
        raise ConfigError(
            f"where = {condition!r} is no SQL condition over the view pairs: {error}\n"
            '`pairmill sql DATASET "DESCRIBE pairs"` shows its columns'
        ) from error


def connect(snapshot: Snapshot) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection in memory with `VIEWS` over a snapshot; close it, or use it in a ``with`` statement.

    ``pairs``
        one row a pair; ``text`` is the alt text, ``caption`` the text of rank 0; besides the columns that docs name,
        each scalar column that the recipe measured
    ``texts``
        one row a text: those that came with the pair, then those that a captioner wrote; ``ordinal`` counts from 0, the
        web text. ``rank`` counts kept texts from 0; a text that is not kept has a reason: its own, or else the pair's.
        Where no mixing recipe chose, all texts of a kept pair are kept, in their order
    ``images``
        one row a stored image
    ``image_history``
        one row a stored image that a revisit replaced: what it was, the last snapshot that has it, and by what
    ``boxes``
        one row a box, in pixels of the stored image, clipped to it: those that came with the pair, then those that a
        detector found; ``ordinal`` counts from 0 in this order. ``mask`` is COCO's compressed run-length encoding
        (``counts``) where the recipe makes masks. Boxes that cannot be kept are left out
    ``rejected_boxes``
        one row a box that came with a pair and is not kept, with its reason; empty where the recipe does not judge them
    ``instructions``
        one row a conversation that was asked for of a kept pair; a reason says why there is none
    ``usage``
        one row a request to an endpoint that was, or may have been, charged; of the dataset as it is now
    ``snapshots``
        one row a published snapshot

    Raises:
        StoreError: a file of the snapshot is missing or damaged.
    """
    import duckdb

    options = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
    connection = duckdb.connect(":memory:", config=options)
    try:
        connection.register_filesystem(_SnapshotFiles(snapshot))
        connection.execute("SET parquet_metadata_cache = true")  # files of a snapshot never change
        _Views(connection, snapshot).create()
        connection.execute(f"SET allowed_directories = ['{_PROTOCOL}://']")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
    except BaseException as error:
        connection.close()
        if isinstance(error, duckdb.Error):
            raise _damage(error, snapshot.dataset.url) from error
        raise
    return connection


def _damage(error: duckdb.Error, dataset: str = "DATASET") -> StoreError:
    lines = [line for line in str(error).splitlines() if line.strip(" ^")]
    said = next((line for line in lines if "Error: " in line), lines[0] if lines else "")
    return StoreError(
        f"{said.strip()}; a file is damaged or missing: `pairmill verify {dataset} --repair` says which one, and mends "
        "what can be mended"
    )


def _too_much(error: duckdb.Error) -> StoreError:
    return StoreError(
        f"{str(error).splitlines()[0]}; ask for fewer rows or columns at once, or where there is more memory"
    )


def _is_about_a_file(error: duckdb.Error) -> bool:
    """Whether an error comes from reading and not from the query."""
    import duckdb

    of_the_query = (
        duckdb.ParserException,
        duckdb.BinderException,
        duckdb.CatalogException,
        duckdb.ConversionException,
        duckdb.OutOfRangeException,
        duckdb.InvalidInputException,
        duckdb.NotImplementedException,
        duckdb.PermissionException,
    )
    return f"{_PROTOCOL}://" in str(error) or not isinstance(error, of_the_query)


class _Views:
    """Creates the views. The stored tables are views of their own in the schema ``store``."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, snapshot: Snapshot) -> None:
        self._connection = connection
        self._snapshot = snapshot
        self._columns: dict[str, dict[str, str]] = {}
        """SQL type of each column, by table."""

    def create(self) -> None:
        """Create all of them."""
        self._connection.execute("CREATE SCHEMA store")
        names = {PAIRS_TABLE, LEDGER_TABLE, *self._snapshot.columns.values(), *self._snapshot.record.tables}
        for table in sorted(names - {SNAPSHOTS_TABLE}):
            self._table(table)
        self._pairs()
        self._texts()
        self._images()
        self._history()
        self._boxes()
        self._rejected_boxes()
        self._instructions()
        self._usage()
        self._snapshots()

    def _table(self, name: str) -> None:
        files = self._snapshot.files(name)
        if files:
            paths = ", ".join(_text(_address(self._snapshot.dataset, file)) for file in files)
            source = f"read_parquet([{paths}], hive_partitioning = true, hive_types = {{'shard': INTEGER}})"
            self._connection.execute(f"CREATE VIEW store.{_name(name)} AS SELECT * FROM {source}")
        else:
            empty = _schema(name, self._snapshot.columns).empty_table()
            self._connection.register("empty_table", empty)
            self._connection.execute(f"CREATE TABLE store.{_name(name)} AS SELECT * FROM empty_table")
            self._connection.unregister("empty_table")
        described = self._connection.execute(f"DESCRIBE store.{_name(name)}").fetchall()
        self._columns[name] = {row[0]: row[1] for row in described}

    def _pairs(self) -> None:
        known = {column: table for column, table in self._snapshot.columns.items() if column in self._columns[table]}
        measured = sorted(
            column
            for column, table in known.items()
            if table != PAIRS_TABLE and column not in _NAMED and _is_scalar(self._columns[table][column])
        )
        joined: dict[str, list[str]] = {LEDGER_TABLE: list(_LEDGER)}
        caption = f"{self._caption(joined)} AS caption"
        selected = ["p.uid", "p.url", "p.text", caption, "p.shard", "p.refresh"]
        selected += [_of(LEDGER_TABLE, column) for column in _LEDGER]
        for column in _RETRIES:
            there = self._columns[LEDGER_TABLE].get(column)
            if there:
                joined[LEDGER_TABLE].append(column)
            selected.append(_of(LEDGER_TABLE, column) if there else f"NULL AS {column}")
        for column in (*_NAMED, "source", "extra", *measured):
            if column in ("source", "extra"):
                selected.append(f"p.{column}")
            elif column in known:
                joined.setdefault(known[column], []).append(column)
                selected.append(_of(known[column], column))
            else:
                selected.append(f"NULL::{_sql_type(column)} AS {_name(column)}")
        joins = " ".join(_join(table, columns) for table, columns in joined.items())
        self._view("pairs", f"SELECT {', '.join(selected)} FROM store.{PAIRS_TABLE} p {joins}")

    def _caption(self, joined: dict[str, list[str]]) -> str:
        """The text of rank 0: the alt text where no recipe chose among texts, null where no text is kept. Adds the
        columns it needs to `joined`."""
        if self._table_of(fields.TEXT_RANKS, LEDGER_TABLE) is None:
            return "p.text"
        ranks = f"{_alias(LEDGER_TABLE)}.text_ranks"
        joined[LEDGER_TABLE].append("text_ranks")
        place, given = f"nullif(list_position({ranks}, 0), 0)", "coalesce(len(p.texts), 0)"
        written = "NULL"
        if table := self._table_of(fields.CAPTIONS):
            joined.setdefault(table, []).append("captions")
            written = f"{_alias(table)}.captions[{place} - {given}].text"
        return f"""CASE WHEN {ranks} IS NULL THEN p.text WHEN {place} IS NULL THEN NULL
            WHEN {place} <= {given} THEN p.texts[{place}].text ELSE {written} END"""

    def _texts(self) -> None:
        of, kept = _alias(LEDGER_TABLE), "status = 'kept'"
        stored = [f"{of}.{column}" for column in ("status", "reason AS pair_reason", "detail AS pair_detail")]
        joined = ["status", "reason", "detail"]
        rank, why = "ordinal", ("own_reason", "own_detail")
        if self._table_of(fields.TEXT_RANKS, LEDGER_TABLE):
            # A recipe that chose said it of every text; without one, a text has the reason that its captioner gave.
            chosen = [f.name for f in (fields.TEXT_RANKS, fields.TEXT_REASONS, fields.TEXT_DETAILS)]
            joined += chosen
            stored += [f"{of}.text_ranks IS NOT NULL AS mixed", f"{of}.text_ranks[ordinal + 1] AS text_rank"]
            stored += [f"{of}.{name}[ordinal + 1] AS {name[:-1]}" for name in chosen[1:]]
            rank = "if(mixed, text_rank, ordinal)"
            why = ("if(mixed, text_reason, own_reason)", "if(mixed, text_detail, own_detail)")
        own_reason, own_detail = why
        self._view(
            "texts",
            f"""SELECT uid, ordinal, text, source, clip_score, itm_score, {kept} AND {own_reason} IS NULL AS kept,
                CASE WHEN {kept} AND {own_reason} IS NULL THEN {rank} END AS rank,
                coalesce({own_reason}, pair_reason) AS reason,
                CASE WHEN {own_reason} IS NULL THEN pair_detail ELSE {own_detail} END AS detail, shard
                FROM (SELECT p.*, {", ".join(stored)} FROM ({self._given()} {self._written()}) p
                      {_join(LEDGER_TABLE, joined)})""",
        )

    def _given(self) -> str:
        """The texts that came with pairs."""
        clip, itm = self._table_of(fields.CLIP_SCORES), self._table_of(fields.ITM_SCORES)
        return f"""SELECT p.uid, p.shard, ordinal, texts[ordinal + 1].text AS text, texts[ordinal + 1].source AS source,
            {_element(clip, "clip_scores")} AS clip_score, {_element(itm, "itm_scores")} AS itm_score,
            NULL::VARCHAR AS own_reason, NULL::VARCHAR AS own_detail
            FROM (SELECT uid, shard, texts, unnest(range(len(texts)))::INTEGER AS ordinal FROM store.{PAIRS_TABLE}) p
            {_joins((clip, "clip_scores"), (itm, "itm_scores"))}"""

    def _written(self) -> str:
        """The texts that a captioner wrote, to be added to those."""
        table = self._table_of(fields.CAPTIONS)
        if table is None:
            return ""
        clip, itm = self._table_of(fields.CAPTION_CLIP_SCORES), self._table_of(fields.CAPTION_ITM_SCORES)
        scores = [
            f"{_element(t, column)} AS {name}"
            for t, column, name in (
                (clip, "caption_clip_scores", "clip_score"),
                (itm, "caption_itm_scores", "itm_score"),
            )
        ]
        return f"""UNION ALL
            SELECT p.uid, p.shard, (given + ordinal)::INTEGER AS ordinal, captions[ordinal + 1].text AS text,
            captions[ordinal + 1].source AS source, {", ".join(scores)},
            captions[ordinal + 1].reason AS own_reason, captions[ordinal + 1].detail AS own_detail
            FROM (SELECT c.uid, c.shard, captions, unnest(range(len(captions))) AS ordinal, given
                  FROM store.{_name(table)} c
                  JOIN (SELECT uid, shard, coalesce(len(texts), 0) AS given FROM store.{PAIRS_TABLE}) g
                  ON g.uid = c.uid AND g.shard = c.shard) p
            {_joins((clip, "caption_clip_scores"), (itm, "caption_itm_scores"))}"""

    def _images(self) -> None:
        table = self._table_of(fields.IMAGE)
        names = [field.name for field in fields.IMAGES]
        first = ["image", "width", "height", "sha256", "format"]
        columns = ["uid", *first, *(name for name in names if name not in first), "shard"]
        if table is None:
            nulls = ", ".join(f"NULL::{_sql_type(c)} AS {_name(c)}" for c in columns)
            self._view("images", f"SELECT {nulls} WHERE false")
            return
        there = self._columns[table]
        shown = ", ".join(_name(c) if c in there else f"NULL::{_sql_type(c)} AS {_name(c)}" for c in columns)
        # Rows without a reason have an image; asking the image column itself would read it.
        self._view("images", f"SELECT {shown} FROM store.{_name(table)} WHERE reason IS NULL")

    def _history(self) -> None:
        """What stored images were before they changed."""
        if HISTORY_TABLE in self._columns:
            self._view(HISTORY_TABLE, f"SELECT * FROM store.{HISTORY_TABLE}")
        else:
            self._view(HISTORY_TABLE, "SELECT uid, NULL::INTEGER AS after_snapshot, sha256 FROM images WHERE false")

    def _boxes(self) -> None:
        regions = self._table_of(fields.REGIONS)
        if regions is None:
            self._boxes_of_pairs()
            return
        detections, masks = self._table_of(fields.DETECTIONS), self._table_of(fields.MASKS)
        found = [f"coalesce(p.regions, [])::{_as_sql(fields.REGIONS.type)}"]
        if detections:
            found.append(f"coalesce({_alias(detections)}.detections, [])::{_as_sql(fields.DETECTIONS.type)}")
        mask = f"{_alias(masks)}.masks" if masks else f"NULL::{_as_sql(fields.MASKS.type)}"
        joins = _joins((detections, fields.DETECTIONS.name), (masks, fields.MASKS.name))
        shown = ", ".join(f"b.{name} AS {name}" for name in _BOX)
        self._view(
            "boxes",
            f"""SELECT uid, {shown}, ordinal, m.counts AS mask, m.area AS mask_area, m.score AS mask_score, shard
                FROM (SELECT uid, shard, ordinal, boxes[ordinal + 1] AS b, masks[ordinal + 1] AS m
                      FROM (SELECT uid, shard, boxes, masks, unnest(range(len(boxes)))::INTEGER AS ordinal
                            FROM (SELECT p.uid, p.shard, {" || ".join(found)} AS boxes, {mask} AS masks
                                  FROM store.{_name(regions)} p {joins})))""",
        )

    def _boxes_of_pairs(self) -> None:
        """Of a recipe without the stage ``regions``: the boxes that came with the pairs."""
        corners = ", ".join(
            f"greatest(0, least(i.{side}, b.{name} * i.transform[{n}] + i.transform[{n + 2}]))::FLOAT AS {name}"
            for name, side, n in (("x1", "width", 1), ("y1", "height", 2), ("x2", "width", 1), ("y2", "height", 2))
        )
        self._view(
            "boxes",
            f"""SELECT * FROM (
                  SELECT uid, b.label AS label, {corners}, b.score AS score, b.source AS source, ordinal,
                    NULL::VARCHAR AS mask, NULL::BIGINT AS mask_area, NULL::FLOAT AS mask_score, shard
                  FROM (SELECT uid, shard, ordinal, boxes[ordinal + 1] AS b
                        FROM (SELECT uid, shard, boxes, unnest(range(len(boxes)))::INTEGER AS ordinal
                              FROM store.{PAIRS_TABLE})) p
                  JOIN (SELECT uid, shard, width, height, transform FROM images) i USING (uid, shard)
                ) WHERE x2 > x1 AND y2 > y1""",
        )

    def _rejected_boxes(self) -> None:
        table = self._table_of(fields.REJECTED_BOXES)
        empty = f"NULL::{_as_sql(fields.REJECTED_BOXES.type)} AS rejected_boxes"
        rows = f"store.{_name(table)}" if table else f"(SELECT uid, shard, {empty} FROM store.{PAIRS_TABLE})"
        shown = ", ".join(f"r.box.{name} AS {name}" for name in _BOX)
        self._view(
            "rejected_boxes",
            f"""SELECT uid, {shown}, r.reason AS reason, r.detail AS detail, shard
                FROM (SELECT uid, shard, unnest(rejected_boxes) AS r FROM {rows})""",
        )

    def _instructions(self) -> None:
        table = self._table_of(fields.INSTRUCTIONS)
        if table is None:
            shown = ", ".join(f"NULL::{_as_sql(fields.INSTRUCTION.field(n).type)} AS {n}" for n in _INSTRUCTION)
            self._view(
                "instructions",
                f"SELECT uid, NULL::VARCHAR AS id, NULL::VARCHAR AS kind, {shown}, shard "
                f"FROM store.{PAIRS_TABLE} WHERE false",
            )
            return
        shown = ", ".join(f"c.{n} AS {n}" for n in _INSTRUCTION)
        self._view(
            "instructions",
            f"""SELECT uid, uid || '-' || c.kind AS id, c.kind AS kind, {shown}, shard
                FROM (SELECT i.uid, i.shard, unnest(i.instructions) AS c FROM store.{_name(table)} i
                      JOIN store.{LEDGER_TABLE} l ON l.uid = i.uid AND l.shard = i.shard WHERE l.status = 'kept')""",
        )

    def _usage(self) -> None:
        """What endpoints were asked. What was paid stays paid, so this is no part of a snapshot."""
        files = _usage_files(self._snapshot.dataset)
        if files:
            paths = ", ".join(_text(_address(self._snapshot.dataset, file)) for file in files)
            self._view("usage", f"{usage_sql(f'read_parquet([{paths}])')} ORDER BY asked_at, uid, purpose")
            return
        self._connection.register("empty_table", ANSWERS.empty_table())
        self._connection.execute(f"CREATE TABLE usage AS {usage_sql('empty_table')}")
        self._connection.unregister("empty_table")

    def _snapshots(self) -> None:
        rows = [record.to_row() for record in self._snapshot.dataset.snapshots()]
        self._connection.register("records", pa.Table.from_pylist(rows, schema=SNAPSHOTS))
        self._connection.execute("CREATE TABLE snapshots AS SELECT * FROM records ORDER BY id")
        self._connection.unregister("records")

    def _table_of(self, field: pa.Field, table: str | None = None) -> str | None:
        """The table that holds a column, if it does: a dataset may be older than the column."""
        table = table or self._snapshot.columns.get(field.name)
        return table if table is not None and field.name in self._columns[table] else None

    def _view(self, name: str, select: str) -> None:
        self._connection.execute(f"CREATE VIEW {name} AS {select}")


def _join(table: str, columns: Sequence[str]) -> str:
    """A left join with a stored table. Grouping tells DuckDB that there is one row a pair, so that it leaves the join
    out when a query names none of its columns."""
    values = ", ".join(f"any_value({_name(c)}) AS {_name(c)}" for c in columns)
    grouped = f"SELECT uid, shard, {values} FROM store.{_name(table)} GROUP BY uid, shard"
    alias = _alias(table)
    return f"LEFT JOIN ({grouped}) {alias} ON {alias}.uid = p.uid AND {alias}.shard = p.shard"


def _joins(*columns: tuple[str | None, str]) -> str:
    """Left joins with the tables of these columns that are there."""
    by_table: dict[str, list[str]] = {}
    for table, column in columns:
        if table is not None:
            by_table.setdefault(table, []).append(column)
    return " ".join(_join(table, names) for table, names in by_table.items())


def _element(table: str | None, scores: str) -> str:
    """The score of a text from a list of scores."""
    return "NULL::FLOAT" if table is None else f"{_alias(table)}.{scores}[ordinal + 1]"


def _alias(table: str) -> str:
    return _name(f"of {table}")


def _of(table: str, column: str) -> str:
    return f"{_alias(table)}.{_name(column)} AS {_name(column)}"


def _name(name: str) -> str:
    """A quoted identifier."""
    return '"' + name.replace('"', '""') + '"'


def _text(value: str) -> str:
    """A quoted string."""
    return "'" + value.replace("'", "''") + "'"


_SQL_TYPES = {
    pa.string(): "VARCHAR",
    pa.binary(): "BLOB",
    pa.bool_(): "BOOLEAN",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
}


def _known_fields() -> dict[str, pa.Field]:
    return {value.name: value for value in vars(fields).values() if isinstance(value, pa.Field)}


def _sql_type(column: str) -> str:
    return _as_sql(_known_fields()[column].type)


def _as_sql(kind: pa.DataType) -> str:
    """An Arrow type as DuckDB writes it."""
    if pa.types.is_list(kind):
        return f"{_as_sql(kind.value_type)}[]"
    if pa.types.is_struct(kind):
        return f"STRUCT({', '.join(f'{_name(f.name)} {_as_sql(f.type)}' for f in kind)})"
    return _SQL_TYPES[kind]


def _is_scalar(sql_type: str) -> bool:
    return not sql_type.endswith("]") and not sql_type.startswith(("STRUCT", "MAP", "UNION", "BLOB"))


def _schema(table: str, columns: dict[str, str]) -> pa.Schema:
    """The schema of a table without files. Columns of one's own stages are unknown then, and left out."""
    if table in (PAIRS_TABLE, LEDGER_TABLE):
        return (fields.PAIRS if table == PAIRS_TABLE else fields.LEDGER).append(fields.SHARD)
    known = _known_fields()
    own = [known[column] for column, owner in columns.items() if owner == table and column in known]
    return pa.schema([fields.UID, fields.REASON, fields.DETAIL, *own, fields.SHARD])


def _usage_files(dataset: Dataset) -> list[DataFile]:
    return dataset.table(ANSWERS_TABLE, ANSWERS).files()


def _address(dataset: Dataset, file: DataFile) -> str:
    """The name of a file inside the connection: its path below the dataset."""
    return f"{_PROTOCOL}://{file.path[len(dataset.root) :].lstrip('/')}"


class _SharedFile:
    """An open file whose position is each thread's own.

    DuckDB's threads share a handle, and its positional read is two calls, a seek and a read: with one position for all,
    a thread would now and then read from where another one has just sought.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._own = threading.local()

    def tell(self) -> int:
        """Where this thread reads next."""
        return getattr(self._own, "position", 0)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move this thread's position."""
        if whence == 2:
            with self._lock:
                offset = self._file.seek(offset, 2)
        elif whence == 1:
            offset += self.tell()
        self._own.position = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        """Read from this thread's position."""
        with self._lock:
            self._file.seek(self.tell())
            data: bytes = self._file.read(size)
        self._own.position = self.tell() + len(data)
        return data

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _SnapshotFiles(fsspec.AbstractFileSystem):
    """The files of a snapshot under names of their own, for reading only."""

    protocol = _PROTOCOL
    cachable = False

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__()
        self._fs = snapshot.dataset.fs
        self._files = {
            self._strip_protocol(_address(snapshot.dataset, file)): file
            for table in snapshot.record.tables
            if table != SNAPSHOTS_TABLE
            for file in snapshot.files(table)
        }
        self._files |= {
            self._strip_protocol(_address(snapshot.dataset, file)): file for file in _usage_files(snapshot.dataset)
        }

    def _file(self, path: str) -> DataFile:
        try:
            return self._files[self._strip_protocol(path)]
        except KeyError:
            raise FileNotFoundError(path) from None

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if mode != "rb":
            raise PermissionError(f"a snapshot is read-only: {path}")
        file = self._file(path)
        return _SharedFile(storage.open_known(self._fs, file.path, file.size))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Size and type of a file."""
        return {"name": path, "size": self._file(path).size, "type": "file"}

    def exists(self, path: str, **_: Any) -> bool:
        """Whether it is a file of the snapshot."""
        return self._strip_protocol(path) in self._files

    def glob(self, path: str, **_: Any) -> Iterable[str]:
        """The file itself: names are exact."""
        return [path] if self.exists(path) else []

    def modified(self, path: str) -> datetime.datetime:  # noqa: ARG002 - fsspec's signature
        """When it was written: files of a snapshot never change, so any constant will do."""
        return datetime.datetime.fromtimestamp(0, datetime.timezone.utc)
