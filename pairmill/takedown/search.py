"""Where forgotten pairs are: every file that is there is looked at, whichever version names it, or none.

Only narrow columns are read, of many files at a time: uid, URLs, hashes, and what names other pairs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pairmill.errors import StoreError
from pairmill.report.progress import Reporter
from pairmill.store import DataFile, Dataset, read_files
from pairmill.tombstones import FOUND, NEAR, TOMBSTONES, TOMBSTONES_TABLE, Tombstones
from schemas import fields

FILES_AT_ONCE = 256
"""Files whose narrow columns are in memory together."""

EMBEDDINGS_AT_ONCE = 16
"""Files whose embeddings are in memory together."""

SLACK = 1e-6
"""Cosines are computed in single precision: equal images must not miss 1."""

NAMED_BY = (fields.DUPLICATE_OF.name, fields.CLUSTER.name)
"""Columns that name another pair by its uid."""

ENDING = ".parquet"


@dataclass(frozen=True)
class Columns:
    """Which columns of a table say who a pair is, or name others."""

    schema: pa.Schema
    urls: tuple[str, ...]
    hashes: tuple[str, ...]
    named: tuple[str, ...]
    """Strings that are uids of other pairs."""
    lists: tuple[str, ...]
    """Lists of structs with the uid of another pair."""
    embeds: bool
    stores_images: bool

    @classmethod
    def of(cls, schema: pa.Schema) -> Columns:
        """Those of a schema."""
        texts = [f.name for f in schema if pa.types.is_string(f.type)]
        lists = [
            f.name
            for f in schema
            if pa.types.is_list(f.type)
            and pa.types.is_struct(f.type.value_type)
            and f.type.value_type.get_field_index("uid") >= 0
        ]
        return cls(
            schema,
            tuple(name for name in texts if name == "url" or name.endswith("_url")),
            tuple(name for name in texts if name.endswith("sha256")),
            tuple(name for name in texts if name in NAMED_BY),
            tuple(lists),
            fields.CLIP_IMAGE.name in schema.names,
            any(pa.types.is_binary(f.type) for f in schema),
        )


@dataclass(frozen=True)
class Place:
    """A file that holds something of forgotten pairs."""

    file: DataFile
    rows: int
    """Rows of such pairs."""
    names: int
    """Rows of other pairs that name one."""


class Inventory:
    """All data files that are there, by table."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.tables: dict[str, list[DataFile]] = defaultdict(list)
        self.unfinished: list[str] = []
        """Paths of files that were never finished; their writers are dead when the dataset's lock is held."""
        self.broken: dict[str, set[DataFile]] = defaultdict(set)
        """Files that cannot be read and that nothing needs, by table."""
        self._versions: dict[tuple[str, int | None], list[DataFile]] = {}
        self._needed: dict[str, set[str]] = {}
        for path, info in sorted(dataset.fs.find(dataset.root, detail=True).items()):
            relative = str(path)[len(dataset.root) :].lstrip("/")
            table, _, rest = relative.partition("/")
            shard = rest.partition("/")[0].removeprefix("shard=")
            if not rest.startswith("shard=") or not shard.isdigit():
                continue
            if path.endswith(ENDING):
                self.tables[table].append(DataFile(str(path), rest, int(shard), -1, info["size"]))
            elif path.endswith(".tmp"):
                self.unfinished.append(str(path))

    @cached_property
    def columns(self) -> dict[str, Columns]:
        """The columns of each table whose rows belong to pairs."""
        found = {}
        for table, files in self.tables.items():
            schemas = [schema for file in (files[0], files[-1]) if (schema := self._schema(file)) is not None]
            if not schemas:
                schemas = [schema for file in files if (schema := self._schema(file)) is not None][:1]
            if not schemas:  # nothing in the table can be read
                self._pass_over(table, files)
            if schemas and all("uid" in schema.names for schema in schemas):
                found[table] = Columns.of(pa.unify_schemas(schemas))
        return found

    def _schema(self, file: DataFile) -> pa.Schema | None:
        try:
            return schema_of(self.dataset, file.path)
        except StoreError:
            return None

    def files(self, table: str, version: int | None = None) -> list[DataFile]:
        """The files of a version of a table, the latest by default."""
        key = (table, version)
        if key not in self._versions:
            self._versions[key] = self.dataset.table(table, pa.schema([])).files(version)
        return self._versions[key]

    @cached_property
    def _named(self) -> Mapping[str, set[int]]:
        """The versions of each table that snapshots name."""
        versions: dict[str, set[int]] = defaultdict(set)
        for record in self.dataset.snapshots():
            for table, version in record.tables.items():
                versions[table].add(version)
        return versions

    def needed(self, table: str) -> set[str]:
        """The files of a table that the latest version or a snapshot reads."""
        if table not in self._needed:
            rewrites = self.dataset.rewrites()
            found = {file.relative for file in self.files(table)}
            for version in self._named.get(table, ()):
                found |= {f.relative for f in self.dataset.replaced(table, self.files(table, version), rewrites)}
            self._needed[table] = found
        return self._needed[table]

    def _pass_over(self, table: str, files: Sequence[DataFile]) -> None:
        for file in files:
            if file.relative in self.needed(table):
                raise StoreError(
                    f"{file.path} is damaged, so nobody can tell what it holds; `pairmill verify "
                    f"{self.dataset.url} --repair` mends it, then run this again"
                )
            self.broken[table].add(file)

    def scan(
        self, table: str, columns: Sequence[str], at_once: int = FILES_AT_ONCE
    ) -> Iterator[tuple[list[DataFile], pa.Table]]:
        """Some columns of all files of a table, many files at a time, with ``file``: which of them a row is from.

        A file that cannot be read and that nothing needs is passed over (`broken`).

        Raises:
            StoreError: a file that is needed is damaged.
        """
        files = self.tables[table]
        for start in range(0, len(files), at_once):
            block = files[start : start + at_once]
            try:
                rows = self.read(table, block, columns)
            except StoreError:
                pass
            else:
                yield block, rows
                continue
            for file in block:
                try:
                    rows = self.read(table, [file], columns)
                except StoreError:
                    self._pass_over(table, [file])
                    rows = self.read(table, [], columns)
                yield [file], rows

    def read(self, table: str, files: list[DataFile], columns: Sequence[str]) -> pa.Table:
        """Some columns of some files of a table, with ``file``: which of them a row is from.

        Raises:
            StoreError: one is damaged.
        """
        schema = self.columns[table].schema
        if not files:
            empty = pa.schema([*(schema.field(name) for name in columns), pa.field("file", pa.int32())])
            return empty.empty_table()
        rows = read_files(self.dataset, files, schema, [*columns, "__fragment_index"])
        return rows.rename_columns([*columns, "file"])


def schema_of(dataset: Dataset, path: str) -> pa.Schema:
    """The schema of a Parquet file, as it was given to its writer.

    Raises:
        StoreError: it is damaged.
    """
    try:
        with dataset.fs.open(path, "rb") as opened:
            return pa.schema([f.with_type(_as_written(f.type)) for f in pq.read_schema(opened)])
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"cannot read {path}: {error}; `pairmill verify {dataset.url}` says more") from error


def _as_written(kind: pa.DataType) -> pa.DataType:
    """Lists that were read have elements of another name than those that were written, and a copy would tell."""
    if pa.types.is_list(kind):
        return pa.list_(_as_written(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([f.with_type(_as_written(f.type)) for f in kind])
    return kind


@dataclass
class Findings:
    """What a takedown concerns."""

    tombstones: Tombstones
    """All that are there, and those that follow from them."""
    pairs_of: dict[str, set[str]] = field(default_factory=dict)
    """Pairs that are not among the tombstones yet, by the request that names them."""
    images: dict[str, set[tuple[str, str]]] = field(default_factory=dict)
    """Kind and hash of images that are not among the tombstones yet, by request."""
    present: set[str] = field(default_factory=set)
    """Pairs that go and that are there in some file."""
    pairs: Counter[str] = field(default_factory=Counter)
    """How many these are, by what names them first: url, domain, sha256, near, uid; earlier for what an earlier request
    or an interrupted attempt named."""
    places: dict[str, list[Place]] = field(default_factory=dict)
    """The files concerned, by table."""
    stored_images: int = 0
    """Pairs of them that have a stored image."""


def open_requests(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The records of each request that is not carried out yet, oldest first."""
    done = {row["request"] for row in rows if row["done"]}
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["at"], row["request"])):
        if row["request"] not in done:
            found[row["request"]].append(row)
    return dict(found)


def search(inventory: Inventory, more: Sequence[dict[str, Any]], reporter: Reporter) -> Findings:
    """Find all that the tombstones of a dataset forbid.

    Args:
        inventory: The dataset's files.
        more: Tombstones that are not recorded yet, for a look ahead.
        reporter: Told how it goes.

    Raises:
        StoreError: a file that is needed is damaged.
    """
    rows = [*inventory.dataset.records(TOMBSTONES_TABLE, TOMBSTONES).rows(), *more]
    return _Search(inventory, rows, reporter).run()


class _Search:
    def __init__(self, inventory: Inventory, rows: list[dict[str, Any]], reporter: Reporter) -> None:
        self.inventory = inventory
        self.reporter = reporter
        self.all = Tombstones.of(rows)
        asked = open_requests(rows)
        self.asked = {
            name: Tombstones.of(row for row in found if not row["kind"].startswith(FOUND))
            for name, found in asked.items()
        }
        """By request, what it asks for: not what was found by it."""
        self.near = {
            name: min(float(row["hash"]) for row in found if row["kind"] == NEAR)
            for name, found in asked.items()
            if any(row["kind"] == NEAR for row in found)
        }
        self.why: dict[str, str] = {}
        """By uid of a pair that goes: what names it."""
        self.of: dict[str, set[str]] = {name: set() for name in self.asked}
        """By request: uids of pairs that go."""
        self.back: set[str] = set()
        """Pairs that only earlier requests name, or what was found by them."""
        self.with_image: set[str] = set()
        self.findings = Findings(self.all)

    def run(self) -> Findings:
        """Find everything."""
        columns = self.inventory.columns
        matched = [t for t, c in columns.items() if self._asks(c)]
        embedded = self._tables_with(lambda c: c.embeds) if self.near else []
        hashed = self._tables_with(lambda c: bool(c.hashes)) if self.near else []
        passes = [*matched, *[*embedded, *embedded, *hashed, *hashed] * len(self.near), *columns]
        self.reporter.start("searching files", sum(len(self.inventory.tables[t]) for t in passes), "files")
        for table in matched:
            self._match(table)
        for request, cosine in self.near.items():
            self._spread(request, cosine, embedded, hashed)
        self._follow()
        for table in columns:
            self._locate(table)
        self._count()
        self.reporter.finish()
        return self.findings

    def _asks(self, columns: Columns) -> bool:
        by_url = bool(columns.urls and (self.all.urls or self.all.domains))
        return by_url or bool(columns.hashes and (self.all.sha256 or self.all.pixels))

    def _tables_with(self, what: Callable[[Columns], bool]) -> list[str]:
        return [table for table, columns in self.inventory.columns.items() if what(columns)]

    def _scan(self, table: str, columns: Sequence[str], at_once: int = FILES_AT_ONCE) -> Iterator[pa.Table]:
        for block, rows in self.inventory.scan(table, columns, at_once):
            yield rows
            self.reporter.advance(len(block), {})

    # -- who --

    def _match(self, table: str) -> None:
        """Pairs that URLs, domains and hashes of images name."""
        columns = self.inventory.columns[table]
        urls = columns.urls if self.all.urls or self.all.domains else ()
        hashes = columns.hashes if self.all.sha256 or self.all.pixels else ()
        barred = pa.array(sorted(self.all.sha256 | self.all.pixels), pa.string())

        def marks(rows: pa.Table) -> np.ndarray:
            found = np.zeros(rows.num_rows, bool)
            if urls:
                nobody = pa.chunked_array([pa.nulls(rows.num_rows, pa.string())])
                found |= booleans(self.all.bars_pairs(nobody, [rows.column(name) for name in urls]))
            for name in hashes:
                found |= booleans(pc.is_in(rows.column(name), value_set=barred))
            return found

        for block, rows in self.inventory.scan(table, [*urls, *hashes]):
            numbers = np.unique(rows.column("file").to_numpy()[marks(rows)]).tolist()
            if numbers:  # uids take longer to read than all the rest, and few files are concerned
                rows = self.inventory.read(table, [block[i] for i in numbers], ["uid", *urls, *hashes])
                for row in rows.filter(pa.array(marks(rows))).to_pylist():
                    self._attribute(row["uid"], [row[name] for name in urls], {row[name] for name in hashes})
            self.reporter.advance(len(block), {})

    def _attribute(self, uid: str, urls: list[str | None], hashes: set[str | None]) -> None:
        for name, asked in self.asked.items():
            why = _why(asked, urls, hashes)
            if why is not None:
                self._add(name, uid, why)
        if uid not in self.why:
            self.back.add(uid)

    def _add(self, request: str, uid: str, why: str) -> None:
        self.of[request].add(uid)
        self.why.setdefault(uid, why)

    def _spread(self, request: str, cosine: float, embedded: list[str], hashed: list[str]) -> None:
        """Pairs whose image is near to that of one that is asked for, and those with the very same image."""
        seeds = self.of[request] | self.asked[request].uids
        mine = pa.array(sorted(seeds), pa.string())
        found: set[str] = set()
        for table in embedded:  # what different models say cannot be compared
            of_seeds = [
                _matrix(rows.filter(pc.is_in(rows.column("uid"), value_set=mine)))[1]
                for rows in self._scan(table, ["uid", fields.CLIP_IMAGE.name], EMBEDDINGS_AT_ONCE)
            ]
            of_seeds = [matrix for matrix in of_seeds if len(matrix)]
            if not of_seeds:
                self.reporter.advance(len(self.inventory.tables[table]), {})
                continue
            vectors = np.unique(np.concatenate(of_seeds), axis=0)
            for rows in self._scan(table, ["uid", fields.CLIP_IMAGE.name], EMBEDDINGS_AT_ONCE):
                rows, matrix = _matrix(rows)
                close = np.zeros(len(matrix), bool)
                for start in range(0, len(vectors) if len(matrix) else 0, 256):
                    close |= (matrix @ vectors[start : start + 256].T >= cosine - SLACK).any(axis=1)
                found.update(rows.column("uid").filter(pa.array(close)).to_pylist())
        hashes = self._hashes(seeds | found, hashed)
        barred = pa.array(sorted(digest for _, digest in hashes), pa.string())
        for table in hashed:
            names = self.inventory.columns[table].hashes
            for rows in self._scan(table, ["uid", *names]):
                for name in names:
                    same = pc.is_in(rows.column(name), value_set=barred)
                    found.update(rows.column("uid").filter(same).to_pylist())
        known = {("sha256", digest) for digest in self.all.sha256} | {("pixels", digest) for digest in self.all.pixels}
        self.findings.images[request] = hashes - known
        for uid in found - self.asked[request].uids:
            self._add(request, uid, "near")

    def _hashes(self, uids: set[str], tables: list[str]) -> set[tuple[str, str]]:
        """Kinds and hashes of the images that these pairs have, or had."""
        wanted = pa.array(sorted(uids), pa.string())
        found: set[tuple[str, str]] = set()
        for table in tables:
            names = self.inventory.columns[table].hashes
            for rows in self._scan(table, ["uid", *names]):
                mine = rows.filter(pc.is_in(rows.column("uid"), value_set=wanted))
                for name in names:
                    kind = "pixels" if name.endswith(fields.PIXEL_SHA256.name) else "sha256"
                    found.update((kind, digest) for digest in mine.column(name).to_pylist() if digest)
        return found

    def _follow(self) -> None:
        """What was found becomes tombstones too."""
        found = self.back.union(*self.of.values())
        images = set[tuple[str, str]]().union(*self.findings.images.values())
        self.findings.pairs_of = {name: uids - self.all.uids for name, uids in self.of.items()}
        if self.back - self.all.uids and self.asked:
            first = next(iter(self.asked))
            self.findings.pairs_of[first] = self.findings.pairs_of[first] | (self.back - self.all.uids)
        self.findings.tombstones = replace(
            self.all,
            uids=self.all.uids | found,
            sha256=self.all.sha256 | {digest for kind, digest in images if kind == "sha256"},
            pixels=self.all.pixels | {digest for kind, digest in images if kind == "pixels"},
        )

    # -- where --

    def _locate(self, table: str) -> None:
        """The files of a table that hold rows of pairs that go, or rows that name one."""
        columns = self.inventory.columns[table]
        uids = pa.array(sorted(self.findings.tombstones.uids), pa.string())
        stores = columns.stores_images and fields.REASON.name in columns.schema.names
        wanted = ["uid", *columns.named, *columns.lists, *([fields.REASON.name] if stores else [])]
        places: list[Place] = []
        for block, rows in self.inventory.scan(table, wanted):
            gone = booleans(pc.is_in(rows.column("uid"), value_set=uids))
            naming = names_one_of(rows, columns, uids) & ~gone
            mine = rows.filter(pa.array(gone))
            self.findings.present.update(mine.column("uid").to_pylist())
            if stores:
                self.with_image.update(mine.filter(pc.is_null(mine.column(fields.REASON.name)))["uid"].to_pylist())
            numbers = rows.column("file").to_numpy()
            of_pairs = np.bincount(numbers[gone], minlength=len(block))
            of_names = np.bincount(numbers[naming], minlength=len(block))
            for i in np.flatnonzero(of_pairs + of_names).tolist():
                places.append(Place(block[i], int(of_pairs[i]), int(of_names[i])))
            self.reporter.advance(len(block), {})
        if places:
            self.findings.places[table] = places

    def _count(self) -> None:
        asked = frozenset[str]().union(*(asked.uids for asked in self.asked.values()))
        for uid in self.findings.present:
            self.findings.pairs[self.why.get(uid, "uid" if uid in asked else "earlier")] += 1
        self.findings.stored_images = len(self.with_image)


def _why(asked: Tombstones, urls: list[str | None], hashes: set[str | None]) -> str | None:
    """Which kind of selector names a pair first."""
    if Tombstones(urls=asked.urls).bars("", *urls):
        return "url"
    if Tombstones(domains=asked.domains).bars("", *urls):
        return "domain"
    return "sha256" if hashes & (asked.sha256 | asked.pixels) else None


def names_one_of(rows: pa.Table, columns: Columns, uids: pa.Array) -> np.ndarray:
    """Which rows name one of these pairs; booleans."""
    marks = np.zeros(rows.num_rows, bool)
    for name in columns.named:
        marks |= booleans(pc.is_in(rows.column(name), value_set=uids))
    for name in columns.lists:
        lists = _flat(rows.column(name))
        named = booleans(pc.is_in(pc.struct_field(pc.list_flatten(lists), "uid"), value_set=uids))
        marks[pc.list_parent_indices(lists).to_numpy()[named]] = True
    return marks


def without(rows: pa.Table, columns: Columns, uids: pa.Array) -> pa.Table:
    """Rows without those of these pairs, and without their names in the others: null, or out of the list."""
    rows = rows.filter(pc.invert(pc.is_in(rows.column("uid"), value_set=uids)))
    for name in (*columns.named, *columns.lists):
        if name not in rows.column_names:
            continue
        column = _flat(rows.column(name))
        if name in columns.named:
            named = pc.is_in(column, value_set=uids)
            column = pc.if_else(named, pa.scalar(None, column.type), column)
        else:
            column = _without_elements(column, uids)
        rows = rows.set_column(rows.column_names.index(name), rows.schema.field(name), column)
    return rows


def _without_elements(lists: pa.ListArray, uids: pa.Array) -> pa.ListArray:
    elements = pc.list_flatten(lists)
    keep = ~booleans(pc.is_in(pc.struct_field(elements, "uid"), value_set=uids))
    parents = pc.list_parent_indices(lists).to_numpy()
    lengths = np.bincount(parents[keep], minlength=len(lists))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    mask = lists.is_null()
    return pa.ListArray.from_arrays(pa.array(offsets), elements.filter(pa.array(keep)), type=lists.type, mask=mask)


def _matrix(rows: pa.Table) -> tuple[pa.Table, np.ndarray]:
    """The rows that have an embedding, and their embeddings at unit length."""
    rows = rows.filter(pc.is_valid(rows.column(fields.CLIP_IMAGE.name)))
    if not rows.num_rows:
        return rows, np.zeros((0, 0), np.float32)
    flat = pc.list_flatten(_flat(rows.column(fields.CLIP_IMAGE.name)))
    matrix = flat.to_numpy(zero_copy_only=False).reshape(rows.num_rows, -1).astype(np.float32, copy=False)
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    return rows, np.divide(matrix, norms, out=np.zeros_like(matrix), where=norms > 0)


def booleans(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A column of booleans as an array; null is false."""
    return pc.fill_null(_flat(column), False).to_numpy(zero_copy_only=False)


def _flat(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
