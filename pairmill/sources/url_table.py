"""Tables of URLs and alt texts: parquet, csv, tsv, json and jsonl, plain or gzip-compressed, local or remote."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa

from pairmill.errors import SourceError
from pairmill.sources import files
from pairmill.sources.boxes import take_boxes
from pairmill.sources.files import SourceFile
from pairmill.sources.rows import ROWS, Row, extra_json, malformed, tables, web_row
from schemas import config

ENDINGS = tuple(f".{kind}{gz}" for kind in ("parquet", "csv", "tsv", "json", "jsonl", "ndjson") for gz in ("", ".gz"))
_FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_BLOCK = 1 << 20
_MAX_RECORD = 1 << 26  # characters over which a quoted CSV field may extend before its quote counts as never closed


@dataclass(frozen=True)
class _Columns:
    url: str
    text: str | None
    boxes: str | None = None

    def row(self, url: object, text: object, others: dict[str, Any]) -> Row:
        """A row of URL, text and all other columns, boxes among them."""
        boxes = None if self.boxes is None else take_boxes(others, self.boxes)
        return web_row(url, text, extra_json(others), boxes=boxes)


def read_url_table(source: config.UrlTable) -> Iterator[pa.Table]:
    """The rows of a `schemas.config.UrlTable`."""
    found = files.find(source.path, ENDINGS, "url_table")
    return _read_files(source, found)


def _read_files(source: config.UrlTable, found: list[SourceFile]) -> Iterator[pa.Table]:
    columns = _Columns(source.url, source.text, source.boxes)
    for file in found:
        yield from tables(_file_rows(file, _format_of(source, file), columns))


def _format_of(source: config.UrlTable, file: SourceFile) -> str:
    if source.format != "auto":
        return source.format
    if file.ending not in _FORMATS:
        raise SourceError(
            f"{file.name!r}: the ending {file.ending!r} does not say what format it is. "
            "Set source.format to parquet, csv, tsv, json or jsonl."
        )
    return _FORMATS[file.ending]


def _file_rows(file: SourceFile, kind: str, columns: _Columns) -> Iterator[Row]:
    if kind == "parquet":
        return _parquet_rows(file, columns)
    if kind in ("csv", "tsv"):
        return _csv_rows(file, columns, "," if kind == "csv" else "\t")
    return _json_rows(file, columns, lines=kind == "jsonl")


# -- parquet ----------------------------------------------------------------------------------------------------------


def _parquet_rows(file: SourceFile, columns: _Columns) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with files.open_bytes(file) as handle:
        try:
            parquet = pq.ParquetFile(handle)
            names = parquet.schema_arrow.names
            _require(file, columns, names)
            for batch in parquet.iter_batches(batch_size=ROWS):
                yield from _arrow_rows(batch, columns)
        except pa.ArrowException as error:
            raise SourceError(f"{file.name!r} is not a readable parquet file: {error}") from error


def _require(file: SourceFile, columns: _Columns, names: list[str]) -> None:
    if columns.url not in names:
        raise files.column_missing(file, columns.url, names, "url")
    if columns.text is not None and columns.text not in names:
        raise files.column_missing(file, columns.text, names, "text")
    if columns.boxes is not None and columns.boxes not in names:
        raise files.column_missing(file, columns.boxes, names, "boxes")


def _arrow_rows(batch: pa.RecordBatch, columns: _Columns) -> Iterator[Row]:
    urls = _text_values(batch.column(columns.url))
    texts = [None] * len(urls) if columns.text is None else _text_values(batch.column(columns.text))
    others = [
        n for n in batch.schema.names if n not in (columns.url, columns.text) and not n.startswith("__index_level_")
    ]
    extras: Iterable[tuple[Any, ...]] = itertools.repeat((), len(urls))
    if others:
        extras = zip(*(_text_values(batch.column(name)) for name in others), strict=True)
    for url, text, extra in zip(urls, texts, extras, strict=True):
        if isinstance(url, bytes) or isinstance(text, bytes):
            yield malformed(_raw(url) + b"\n" + _raw(text), "not UTF-8")
        else:
            yield columns.row(url, text, dict(zip(others, extra, strict=True)))


def _raw(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value or "").encode("utf-8", "replace")


def _text_values(column: pa.Array) -> list[Any]:
    """A column as Python values; strings that are not UTF-8 (Arrow does not check on reading) come as bytes."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        try:
            return column.to_pylist()
        except UnicodeDecodeError:
            return [_decoded(v) for v in column.cast(pa.large_binary()).to_pylist()]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [_decoded(v) for v in column.to_pylist()]
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # in a list or a struct
        return [_nested(column.slice(row, 1)) for row in range(len(column))]


def _nested(row: pa.Array) -> Any:
    """A list or struct; a text where a string in it is not UTF-8."""
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError:
        return f"a {row.type} that is not UTF-8"


def _decoded(value: bytes | None) -> str | bytes | None:
    if value is None:
        return None
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value


# -- csv and tsv ------------------------------------------------------------------------------------------------------
# Neither csv.reader nor pyarrow.csv survives the web: one unclosed quote swallows the rest of the file, one byte that
# is not UTF-8 loses it all. So: blocks of whole lines go through csv.reader at C speed while every line is one good
# record; a block that is not so simple is read record by record, and a record that fails costs only its first line.


class _Lines:
    """Lines of a file, with a way back: a record that fails hands its later lines back."""

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle = handle
        self._pending: list[str] = []  # in reverse
        self._rest = b""
        self._first = True
        self._cr = False  # lines end with CR alone, as old spreadsheets write them

    def block(self) -> list[str]:
        """The lines handed back, or the next whole lines of the file (about 1 MiB); empty at the end."""
        if self._pending:
            lines = self._pending[::-1]
            self._pending = []
            return lines
        data = self._rest
        self._rest = b""
        while True:
            more = self._handle.read(_BLOCK)
            if self._first and more:
                self._first = False
                more = more.removeprefix(b"\xef\xbb\xbf")
                self._cr = b"\n" not in more and b"\r" in more
            if self._cr:
                more = more.replace(b"\r", b"\n")
            if not more:
                break
            cut = more.rfind(b"\n")
            if cut >= 0:
                data += more[: cut + 1]
                self._rest = more[cut + 1 :]
                break
            data += more
        lines = data.decode("utf-8", "surrogateescape").split("\n")
        if lines and lines[-1] == "":
            lines.pop()
        return [line[:-1] if line.endswith("\r") else line for line in lines]

    def next(self) -> str | None:
        """One line, or None at the end."""
        if not self._pending:
            self._pending = self.block()[::-1]
        return self._pending.pop() if self._pending else None

    def back(self, lines: list[str]) -> None:
        """Hand lines back, to be read again."""
        self._pending.extend(reversed(lines))


def _csv_rows(file: SourceFile, columns: _Columns, delimiter: str) -> Iterator[Row]:
    with files.open_bytes(file) as handle:
        lines = _Lines(handle)
        header = _header(lines, delimiter)
        if header is None:
            return  # an empty file has no rows, and no columns to miss
        _require(file, columns, header)
        reader = _CsvRecords(lines, header, columns, delimiter)
        while block := lines.block():
            if (records := reader.simple(block)) is not None:
                yield from map(reader.row, records)
                continue
            lines.back(block)
            yield from reader.careful(len(block))


def _header(lines: _Lines, delimiter: str) -> list[str] | None:
    while (line := lines.next()) is not None:
        if line.strip():
            fields = split_record(line, delimiter)
            return fields if isinstance(fields, list) else line.split(delimiter)
    return None


class _CsvRecords:
    def __init__(self, lines: _Lines, header: list[str], columns: _Columns, delimiter: str) -> None:
        self._lines = lines
        self._header = header
        self._delimiter = delimiter
        self._width = len(header)
        self._url = header.index(columns.url)
        self._text = header.index(columns.text) if columns.text is not None else None
        self._others = [i for i, name in enumerate(header) if i not in (self._url, self._text)]
        self._columns = columns

    def row(self, record: list[str]) -> Row:
        text = record[self._text] if self._text is not None else None
        return self._columns.row(record[self._url], text, {self._header[i]: record[i] for i in self._others})

    def simple(self, block: list[str]) -> list[list[str]] | None:
        """The records of a block in which every line is one good record, else None."""
        filled = [line for line in block if line]
        try:
            records = list(csv.reader(filled, delimiter=self._delimiter, strict=True))
            "".join(filled).encode("utf-8")
        except (csv.Error, UnicodeEncodeError):
            return None
        if len(records) != len(filled) or any(len(r) != self._width for r in records):
            return None
        return records

    def careful(self, lines: int) -> Iterator[Row]:
        """The rows of the next records, until at least `lines` lines are used up."""
        used = 0
        while used < lines and (line := self._lines.next()) is not None:
            used += 1
            if not line.strip():
                continue
            fields = split_record(line, self._delimiter)
            if fields is None:
                fields, more = self._continued(line)
                used += more
            if isinstance(fields, str) and self._delimiter == "\t" and len(plain := line.split("\t")) == self._width:
                fields = plain  # TSV is often written without quoting: a caption may begin with a quote
            if isinstance(fields, str):
                yield malformed(_bytes(line), fields)
            elif len(fields) != self._width:
                yield malformed(_bytes(line), f"{len(fields)} fields where the header has {self._width}")
            elif _not_utf8(fields):
                yield malformed(_bytes(line), "not UTF-8")
            else:
                yield self.row(fields)

    def _continued(self, first: str) -> tuple[list[str] | str, int]:
        """A record whose quoted field goes on over lines: its fields and how many further lines it took, or why it is
        malformed and 0 (then those lines are handed back)."""
        taken: list[str] = []
        size = len(first)
        why = "a quote that is never closed"
        while size < _MAX_RECORD and (line := self._lines.next()) is not None:
            taken.append(line)
            size += len(line)
            if self._is_record(line):
                break  # a whole record with a URL of its own: the quote before it was left open by mistake
            if not _CLOSING_QUOTE.search(line):
                continue
            fields = split_record("\n".join([first, *taken]), self._delimiter)
            if fields is None:
                continue
            if isinstance(fields, list) and len(fields) == self._width and "\n" not in fields[self._url]:
                return fields, len(taken)
            break
        self._lines.back(taken)
        return why, 0

    def _is_record(self, line: str) -> bool:
        fields = split_record(line, self._delimiter)
        return (
            isinstance(fields, list)
            and len(fields) == self._width
            and fields[self._url].lstrip()[:8].lower().startswith(("http://", "https://"))
        )


_CLOSING_QUOTE = re.compile(r'(?<!")"(?:"")*(?!")')


def split_record(line: str, delimiter: str) -> list[str] | str | None:
    """The fields of one CSV record (RFC 4180), None when a quoted field is still open at its end, or, as a string, why
    the record is malformed."""
    fields: list[str] = []
    at = 0
    while True:
        if line.startswith('"', at):
            end = _closing(line, at + 1)
            if end < 0:
                return None
            fields.append(line[at + 1 : end].replace('""', '"'))
            at = end + 1
            if at == len(line):
                return fields
            if line[at] != delimiter:
                return "characters after a closing quote"
        else:
            end = line.find(delimiter, at)
            if end < 0:
                fields.append(line[at:])
                return fields
            fields.append(line[at:end])
            at = end
        at += 1


def _closing(line: str, at: int) -> int:
    """Where the quoted field that began before `at` closes, or -1."""
    while (end := line.find('"', at)) >= 0:
        if not line.startswith('"', end + 1):
            return end
        at = end + 2
    return -1


def _bytes(line: str) -> bytes:
    return line.encode("utf-8", "surrogateescape")


def _not_utf8(fields: list[str]) -> bool:
    try:
        "".join(fields).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


# -- json and jsonl ---------------------------------------------------------------------------------------------------


def _json_rows(file: SourceFile, columns: _Columns, lines: bool) -> Iterator[Row]:
    with files.open_bytes(file) as handle:
        if lines:
            records: Iterator[dict[str, Any] | Row] = _jsonl_records(handle)
        else:
            records = _json_records(file, handle)
        yield from _checked_records(file, columns, records)


def _checked_records(file: SourceFile, columns: _Columns, records: Iterator[dict[str, Any] | Row]) -> Iterator[Row]:
    """Rows of records. A column that none of the first `ROWS` records has is missing; else it may be absent in some."""
    held: list[dict[str, Any] | Row] = []
    for record in records:
        held.append(record)
        if len(held) == ROWS:
            break
    objects = [r for r in held if isinstance(r, dict)]
    if objects:
        _require(file, columns, list(dict.fromkeys(name for r in objects for name in r)))
    for record in itertools.chain(held, records):
        yield record if isinstance(record, Row) else _json_row(record, columns)


def _json_row(record: dict[str, Any], columns: _Columns) -> Row:
    url = record.get(columns.url)
    text = record.get(columns.text) if columns.text is not None else None
    return columns.row(url, text, {k: v for k, v in record.items() if k not in (columns.url, columns.text)})


def _jsonl_records(handle: IO[bytes]) -> Iterator[dict[str, Any] | Row]:
    first = True
    for line in handle:
        if first:
            line, first = line.removeprefix(b"\xef\xbb\xbf"), False
        stripped = line.strip()
        if stripped:
            yield _json_record(stripped)


def _json_record(line: bytes) -> dict[str, Any] | Row:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return malformed(line, "not UTF-8")
    except (ValueError, RecursionError) as error:
        return malformed(line, f"not JSON: {str(error)[:200]}")
    if not isinstance(record, dict):
        return malformed(line, f"a JSON {type(record).__name__} where an object was expected")
    return record


def _json_records(file: SourceFile, handle: IO[bytes]) -> Iterator[dict[str, Any] | Row]:
    """The records of a JSON file: an array of objects, an object of columns, or in truth JSON lines."""
    data = handle.read().removeprefix(b"\xef\xbb\xbf").strip()
    if not data:
        return
    head = data.split(b"\n", 1)[0]
    if data[:1] == b"{" and head != data and isinstance(_json_record(head.strip()), dict):
        for line in data.split(b"\n"):
            if stripped := line.strip():
                yield _json_record(stripped)
        return
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{file.name!r} is not JSON: {error}. Repair it, or write it as JSON lines (.jsonl)."
        ) from error
    for record in _records_of(file, content):
        raw = json.dumps(record).encode()
        yield record if isinstance(record, dict) else malformed(raw, f"a JSON {type(record).__name__}, not an object")


def _records_of(file: SourceFile, content: Any) -> list[Any]:
    if isinstance(content, list):
        return content
    if isinstance(content, dict) and content and all(isinstance(v, (list, dict)) for v in content.values()):
        columns = {k: v if isinstance(v, list) else list(v.values()) for k, v in content.items()}
        if len({len(v) for v in columns.values()}) == 1:  # pandas' to_json(): a column is an object of index and value
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if isinstance(content, dict):
        return [content]
    raise SourceError(f"{file.name!r} holds a JSON {type(content).__name__}; an array of objects was expected.")
