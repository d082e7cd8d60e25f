"""The Parquet files of a store: their names carry the checksum of their bytes.

A file is called ``<what>-<checksum>.parquet``: `what` says whose work it is, the checksum is the first 32 hex digits of
the sha256 of its bytes. So every file says by itself whether it is whole, equal content has an equal name, and nothing
has to be committed beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import posixpath
import tempfile
import uuid
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pairmill import storage
from pairmill.errors import StoreError
from schemas import fields

if TYPE_CHECKING:
    from pairmill.store.dataset import Dataset

ROW_GROUP = 500
"""Rows a row group (measured best of six layouts for images, RECIPES: 82 us to write and 25 us to read one)."""
CHECKSUM_DIGITS = 32
"""Hex digits of the sha256 in a file's name: 128 bits."""
ENDING = ".parquet"

_FORMAT = pads.ParquetFileFormat(
    default_fragment_scan_options=pads.ParquetFragmentScanOptions(page_checksum_verification=True)
)
_PARTITIONING = pads.partitioning(pa.schema([fields.SHARD]), flavor="hive")


@dataclass(frozen=True)
class DataFile:
    """A Parquet file of one table and one shard."""

    path: str
    """Path or URL that `fsspec` opens."""
    relative: str
    """Path below the table's folder, as in the Delta log."""
    shard: int
    """-1 in tables that are not partitioned."""
    rows: int
    size: int

    @property
    def checksum(self) -> str:
        """The checksum in its name; empty for a file that has none."""
        return checksum_in(self.relative)


def checksum_in(name: str) -> str:
    """The checksum that a file's name says its bytes have; empty when it says none."""
    last = posixpath.basename(name).removesuffix(ENDING).rpartition("-")[2]
    whole = len(last) == CHECKSUM_DIGITS and all(c in "0123456789abcdef" for c in last)
    return last if whole else ""


def checksum_of(dataset: Dataset, path: str) -> str:
    """The checksum of the bytes that are there.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with dataset.fs.open(path, "rb") as file:
        while chunk := file.read(2**23):
            digest.update(chunk)
    return digest.hexdigest()[:CHECKSUM_DIGITS]


class _Hashing(io.RawIOBase):
    """A file being written that counts and hashes what goes into it."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self.file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.file.write(data)
        self.digest.update(data)
        size = memoryview(data).nbytes
        self.size += size
        return size

    def tell(self) -> int:
        return self.size


class ShardWriter:
    """Writes one Parquet file under a temporary name and moves it into place when it is whole.

    A context manager: leaving it by an exception removes the temporary file.
    """

    def __init__(self, dataset: Dataset, table: str, schema: pa.Schema, shard: int, name: str) -> None:
        self._dataset = dataset
        self._schema = schema
        self._folder = f"shard={shard}/" if shard >= 0 else ""
        self._table = table
        self._name = name
        self._shard = shard
        self._rows = 0
        self._buffer: list[pa.Table] = []
        self._buffered = 0
        try:
            if dataset.local:
                folder = dataset.path(table, self._folder)
                os.makedirs(folder, exist_ok=True)
                own = uuid.uuid4().hex[:12]  # two machines that share a disk have equal process ids
                self._temporary = os.path.join(folder, f"{name}.{own}.tmp")
                file: Any = open(self._temporary, "wb")  # noqa: SIM115 (closed by close() or abort())
            else:
                file = tempfile.NamedTemporaryFile(prefix="pairmill-", suffix=".tmp", delete=False)  # noqa: SIM115
                self._temporary = file.name
        except OSError as error:
            raise self._failed(error) from error
        self._sink = _Hashing(file)
        self._parquet = pq.ParquetWriter(self._sink, schema, **parquet_options(schema))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abort()

    def write(self, rows: pa.Table) -> None:
        """Add rows; they reach the file in row groups of `ROW_GROUP`."""
        self._buffer.append(rows)
        self._buffered += rows.num_rows
        if self._buffered >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._buffered:
            try:
                self._parquet.write_table(pa.concat_tables(self._buffer), row_group_size=ROW_GROUP)
            except OSError as error:
                self.abort()
                raise self._failed(error) from error
            self._rows += self._buffered
            self._buffer, self._buffered = [], 0

    def close(self) -> DataFile:
        """Finish the file and move it into place.

        Raises:
            StoreError: there is no room, or no access.
        """
        self._flush()
        dataset, file = self._dataset, self._sink.file
        try:
            self._parquet.close()
            file.flush()
            if dataset.local:
                os.fsync(file.fileno())
            file.close()
            checksum = self._sink.digest.hexdigest()[:CHECKSUM_DIGITS]
            relative = f"{self._folder}{self._name}-{checksum}{ENDING}"
            path = dataset.path(self._table, relative)
            if dataset.local:
                os.replace(self._temporary, path)
                sync_folder(os.path.dirname(path))
            else:
                dataset.fs.put_file(self._temporary, path)
                os.unlink(self._temporary)
        except OSError as error:
            self.abort()
            raise self._failed(error) from error
        return DataFile(path, relative, self._shard, self._rows, self._sink.size)

    def _failed(self, error: OSError) -> StoreError:
        where = self._dataset.path(self._table, self._folder)
        return StoreError(f"cannot write to {where}: {error}; make room or mend access, then run again: it goes on")

    def abort(self) -> None:
        """Throw the unfinished file away."""
        with contextlib.suppress(OSError, pa.ArrowInvalid):
            self._parquet.close()
        with contextlib.suppress(OSError):
            self._sink.file.close()
        Path(self._temporary).unlink(missing_ok=True)


def write_if_new(
    dataset: Dataset,
    table: str,
    schema: pa.Schema,
    shard: int,
    what: str,
    rows: pa.Table,
    present: Container[tuple[int, str]],
) -> DataFile | None:
    """Write a file unless one with the same bytes is `present` (shard and checksum); None then."""
    sink = _Hashing(io.BytesIO())
    with pq.ParquetWriter(sink, schema, **parquet_options(schema)) as parquet:
        parquet.write_table(rows, row_group_size=ROW_GROUP)
    if (shard, sink.digest.hexdigest()[:CHECKSUM_DIGITS]) in present:
        return None
    with ShardWriter(dataset, table, schema, shard, what) as writer:
        writer.write(rows)
        return writer.close()


def content_digest(rows: pa.Table) -> str:
    """16 hex digits that name rows by their values and types, in their order, however they lie in memory: those that
    were read from a file have the digest of those that were written. Quicker than writing them as Parquet."""
    digest = hashlib.sha256(b"%d" % rows.num_rows)
    for column in rows.columns:
        _digest_values(digest, column.combine_chunks())
    return digest.hexdigest()[:16]


def _digest_values(digest: hashlib._Hash, values: pa.Array) -> None:
    """Feed the values of an array: which are null, how long, and their bytes; nothing of what lies under nulls."""
    kind = values.type
    if values.null_count:
        digest.update(np.packbits(values.is_null().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_struct(kind):
        digest.update(b"struct")
        for child in values.flatten():  # with the nulls of the structs
            _digest_values(digest, child)
    elif pa.types.is_list(kind):
        digest.update(b"list")
        digest.update(pc.fill_null(pc.list_value_length(values), 0).to_numpy())
        _digest_values(digest, values.flatten())
    elif pa.types.is_string(kind):
        digest.update(b"string")
        known = pc.fill_null(values, "") if values.null_count else values
        _, places, data = known.buffers()
        if len(known):
            offsets = np.frombuffer(places, np.int32, len(known) + 1, known.offset * 4)
            digest.update((offsets - offsets[0]).tobytes())
            if data is not None:
                digest.update(memoryview(data)[offsets[0] : offsets[-1]])
    elif pa.types.is_boolean(kind):
        digest.update(b"bool")
        digest.update(np.packbits(pc.fill_null(values, False).to_numpy(zero_copy_only=False)).tobytes())
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        digest.update(str(kind).encode())
        digest.update((pc.fill_null(values, 0) if values.null_count else values).to_numpy().tobytes())
    else:  # of a stage of one's own
        digest.update(repr((str(kind), values.to_pylist())).encode())


def sync_folder(folder: str) -> None:
    """Make new names in a local folder last through a loss of power."""
    with contextlib.suppress(OSError):  # some file systems have no such thing
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """How a table's files are written: image bytes plain (they are compressed already), the rest zstd. Each page has a
    checksum, which our readers check: without it, nine of ten flipped bits were read as other values
    (benchmarks/page_checksums.py says what it costs)."""
    bulky = [f.name for f in schema if _holds_bytes(f.type)]
    if bulky:
        slim = [f.name for f in schema if f.name not in bulky and not pa.types.is_nested(f.type)]
        plain = {"compression": "none", "use_dictionary": False, "write_statistics": slim}
        return {**plain, "write_page_checksum": True}
    return {"compression": "zstd", "compression_level": 1, "write_page_checksum": True}


def _holds_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or (pa.types.is_struct(kind) and any(_holds_bytes(f.type) for f in kind))


def existing_file(dataset: Dataset, table: str, shard: int, name: str) -> DataFile | None:
    """The file that a worker finished under this name before a run was killed, if it is there and whole; it was never
    committed."""
    folder = dataset.path(table, f"shard={shard}")
    for path in sorted(list_folder(dataset, folder)):
        last = posixpath.basename(path)
        if not last.startswith(f"{name}-") or not checksum_in(last):
            continue
        with contextlib.suppress(OSError, pa.ArrowInvalid):
            if checksum_of(dataset, path) == checksum_in(last):
                with dataset.fs.open(path, "rb") as file:
                    rows = pq.read_metadata(file).num_rows
                return DataFile(path, f"shard={shard}/{last}", shard, rows, dataset.fs.size(path))
    return None


def list_folder(dataset: Dataset, folder: str) -> list[str]:
    """The paths in a folder; none when there is no such folder."""
    if dataset.local:
        with contextlib.suppress(FileNotFoundError):
            return [os.path.join(folder, name) for name in os.listdir(folder)]
        return []
    try:
        return [str(path) for path in dataset.fs.ls(folder, detail=False, refresh=True)]
    except FileNotFoundError:
        return []


def read_files(dataset: Dataset, files: Sequence[DataFile], schema: pa.Schema, columns: Sequence[str]) -> pa.Table:
    """Columns of some files (``shard`` included if asked for), in the order of the files.

    Raises:
        StoreError: a file is missing or damaged; the message names what to do.
    """
    with _reading(dataset):
        return _scanner(dataset, files, schema, columns).to_table()


@contextlib.contextmanager
def stream_files(
    dataset: Dataset, files: Sequence[DataFile], schema: pa.Schema, columns: Sequence[str]
) -> Iterator[pa.RecordBatchReader]:
    """As `read_files`, a batch at a time, so that memory stays small.

    Raises:
        StoreError: a file is missing or damaged.
    """
    with _reading(dataset):
        yield _scanner(dataset, files, schema, columns).to_reader()


def _scanner(dataset: Dataset, files: Sequence[DataFile], schema: pa.Schema, columns: Sequence[str]) -> pads.Scanner:
    wanted = schema.append(fields.SHARD) if "shard" not in schema.names else schema
    if not files:
        return pads.dataset(wanted.empty_table()).scanner(columns=list(columns))
    source = pads.dataset(
        [f.path for f in files],
        schema=wanted,
        format=_FORMAT,
        filesystem=None if dataset.local else pafs.PyFileSystem(_Known(dataset, files)),
        partitioning=_PARTITIONING,
    )
    return source.scanner(columns=list(columns))


class _Known(pafs.FSSpecHandler):
    """A file system that knows the sizes of some files, so that an object store is not asked for them."""

    def __init__(self, dataset: Dataset, files: Sequence[DataFile]) -> None:
        super().__init__(dataset.fs)
        self._sizes = {file.path: file.size for file in files}

    def open_input_file(self, path: str) -> pa.PythonFile:
        """One of the files."""
        return pa.PythonFile(storage.open_known(self.fs, path, self._sizes[path]), mode="r")


@contextlib.contextmanager
def _reading(dataset: Dataset) -> Iterator[None]:
    with storage.explained(f"cannot read the dataset {dataset.url}"):
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise StoreError(
                f"cannot read the dataset {dataset.url}: {error}; a file is damaged or missing: "
                f"`pairmill verify {dataset.url} --repair` says which one, and mends what can be mended"
            ) from error


def without_rows(
    dataset: Dataset, table: str, file: DataFile, schema: pa.Schema, drop: Callable[[pa.Table], pa.Array]
) -> tuple[DataFile | None, int]:
    """Write a copy of a file without the rows that `drop` marks (booleans, given the columns that are not bulky).

    Returns the new file (None when no row is left) and how many rows were left out. When none is, the old file itself.

    Raises:
        StoreError: the file is damaged or missing, or the copy cannot be written.
    """
    narrow = [f.name for f in schema if not pa.types.is_binary(f.type)]
    marks = drop(read_files(dataset, [file], schema, narrow))
    marks = marks.combine_chunks() if isinstance(marks, pa.ChunkedArray) else marks
    gone = marks.true_count
    if not gone:
        return file, 0
    if gone == file.rows:
        return None, gone
    name = "rest-" + hashlib.sha256(f"{file.relative}{marks.to_pylist()}".encode()).hexdigest()[:16]
    with ShardWriter(dataset, table, schema, file.shard, name) as writer:
        start = 0
        for rows in _row_groups(dataset, file, schema):
            writer.write(rows.filter(pc.invert(marks.slice(start, rows.num_rows))))
            start += rows.num_rows
        return writer.close(), gone


def _row_groups(dataset: Dataset, file: DataFile, schema: pa.Schema) -> Iterator[pa.Table]:
    try:
        with dataset.fs.open(file.path, "rb") as opened:
            parquet = pq.ParquetFile(opened, page_checksum_verification=True)
            for group in range(parquet.num_row_groups):
                rows = parquet.read_row_group(group)
                columns = [
                    rows.column(f.name) if f.name in rows.column_names else pa.nulls(rows.num_rows, f.type)
                    for f in schema
                ]
                yield pa.table(columns, schema=schema)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(
            f"cannot read {file.path}: {error}; `pairmill verify {dataset.url} --repair` mends what can be mended"
        ) from error
