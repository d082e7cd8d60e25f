"""Where a local source holds an image's bytes: the JSON in the column ``locator``, and how to load it.

Three kinds: ``{"file": path}``, ``{"tar": path, "offset": n, "size": n}`` and
``{"parquet": path, "row": n, "column": c}``. Paths are absolute or fsspec URLs.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from typing import IO, Any

from schemas.reasons import Reason


class LocatorError(Exception):
    """The bytes are not there. Carries the row's reason and detail; it never reaches a user as an exception."""

    def __init__(self, detail: str, reason: Reason = Reason.IMAGE_MISSING) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def file_locator(path: str) -> str:
    """The locator of a file that is one image."""
    return json.dumps({"file": path})


def tar_locator(path: str, offset: int, size: int) -> str:
    """The locator of a tar member: where its data begins, and its size, in bytes (of the decompressed file)."""
    return json.dumps({"tar": path, "offset": offset, "size": size})


def parquet_locator(path: str, row: int, column: str) -> str:
    """The locator of a value in a parquet file: its row, from 0, and column."""
    return json.dumps({"parquet": path, "row": row, "column": column})


def load(locator: str, max_bytes: int | None = None) -> bytes:
    """The bytes of one locator. For many use `Loader`, which keeps files open.

    Raises:
        LocatorError: there is no such file, or it is shorter than the locator says.
    """
    with Loader(max_bytes) as loader:
        return loader.load(locator)


class Loader:
    """Loads many locators; keeps the last tar and parquet file, and the last row group, at hand. For one thread."""

    def __init__(self, max_bytes: int | None = None) -> None:
        self._max_bytes = max_bytes
        self._path: str | None = None
        self._handle: IO[bytes] | None = None
        self._parquet: _RowGroups | None = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what is open."""
        if self._handle is not None:
            self._handle.close()
        self._path = self._handle = self._parquet = None

    def load(self, locator: str) -> bytes:
        """The bytes of one locator.

        Raises:
            LocatorError: there is no such file, it is shorter than the locator says, or the image is over `max_bytes`.
        """
        try:
            where = json.loads(locator)
            if "file" in where:
                return self._whole(where["file"])
            if "tar" in where:
                return self._range(where["tar"], int(where["offset"]), int(where["size"]))
            return self._value(where["parquet"], int(where["row"]), str(where["column"]))
        except FileNotFoundError as error:
            raise LocatorError(f"no such file: {error.filename or error}") from error
        except (OSError, EOFError, zlib.error, KeyError, ValueError, TypeError) as error:
            raise LocatorError(f"{type(error).__name__}: {error}"[:300]) from error

    def _check(self, size: int | None) -> None:
        if self._max_bytes is not None and size is not None and size > self._max_bytes:
            raise LocatorError(f"{size} bytes, more than {self._max_bytes}", Reason.HTTP_TOO_LARGE)

    def _whole(self, path: str) -> bytes:
        import fsspec

        with fsspec.open(path, "rb") as handle:
            data = handle.read() if self._max_bytes is None else handle.read(self._max_bytes + 1)
        self._check(len(data))
        return data

    def _open(self, path: str) -> IO[bytes]:
        if self._path == path and self._handle is not None:
            return self._handle
        import fsspec

        self.close()
        handle: Any = fsspec.open(path, "rb").open()
        opened: Any = gzip.GzipFile(fileobj=handle) if path.lower().endswith((".gz", ".tgz")) else handle
        self._handle, self._path = opened, path
        return opened

    def _range(self, path: str, offset: int, size: int) -> bytes:
        self._check(size)
        handle = self._open(path)
        handle.seek(offset)
        data = handle.read(size)
        if len(data) != size:
            raise LocatorError(f"{path} ends before byte {offset + size}")
        return data

    def _value(self, path: str, row: int, column: str) -> bytes:
        if self._path != path or self._parquet is None:
            self._parquet = _RowGroups(self._open(path))
        value = self._parquet.value(row, column)
        if value is None:
            raise LocatorError(f"{path} has no image in row {row}")
        self._check(len(value))
        return value


class _RowGroups:
    """Values of a parquet file; the last row group read is kept."""

    def __init__(self, handle: IO[bytes]) -> None:
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(handle)
        counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        self._at: tuple[int, str] | None = None
        self._values: Any = None

    def value(self, row: int, column: str) -> bytes | None:
        """One binary value.

        Raises:
            LocatorError: the file has no such row or column.
        """
        import bisect

        group = bisect.bisect_right(self._starts, row) - 1
        if not 0 <= row < self._starts[-1] or column not in self._file.schema_arrow.names:
            raise LocatorError(f"the parquet file has no row {row} with column {column!r}")
        if self._at != (group, column):
            self._values = self._file.read_row_group(group, columns=[column]).column(0)
            self._at = (group, column)
        return self._values[row - self._starts[group]].as_py()


def order(locators: Sequence[str]) -> list[int]:
    """Positions of locators in an order that reads each file once, forwards."""

    def key(index: int) -> tuple[str, int]:
        try:
            where = json.loads(locators[index])
            path = where.get("tar") or where.get("parquet") or where.get("file") or ""
            return str(path), int(where.get("offset") or where.get("row") or 0)
        except (ValueError, TypeError, AttributeError):
            return "", 0

    return sorted(range(len(locators)), key=key)
