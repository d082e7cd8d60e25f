"""The answer to a query, printed."""

from __future__ import annotations

import base64
import csv
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any, TextIO

import pyarrow as pa

from pairmill.report.table import print_table


def print_rows(rows: pa.Table, stream: TextIO) -> None:
    """As a table for people: long values are cut, what could act on a terminal is escaped."""
    numbers = {f.name for f in rows.schema if pa.types.is_integer(f.type) or pa.types.is_floating(f.type)}
    columns = [column.to_pylist() for column in rows.columns]
    print_table(rows.column_names, list(zip(*columns, strict=True)), stream, right=numbers)


def print_json_rows(rows: pa.Table, stream: TextIO) -> None:
    """As a JSON array of objects; bytes are base64, NaN and infinities null. Of columns with one name the second is
    called ``name_1`` and so on, as DuckDB does it, since an object would lose one of them."""
    names = _distinct(rows.column_names)
    columns = [column.to_pylist() for column in rows.columns]
    stream.write("[")
    for number, values in enumerate(zip(*columns, strict=True)):
        stream.write(",\n " if number else "\n ")
        row = {name: _plain(value) for name, value in zip(names, values, strict=True)}
        stream.write(json.dumps(row, default=str))
    stream.write("\n]\n")


def print_csv(rows: pa.Table, stream: TextIO) -> None:
    """As CSV with a header; null is empty, bytes are base64, nested values JSON."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(rows.column_names)
    for values in zip(*(column.to_pylist() for column in rows.columns), strict=True):
        writer.writerow([_flat(_plain(value)) for value in values])


def _distinct(names: Sequence[str]) -> list[str]:
    found: dict[str, None] = {}
    for name in names:
        numbered = (f"{name}_{n}" for n in itertools.count(1))
        found[name if name not in found else next(n for n in numbered if n not in found and n not in names)] = None
    return list(found)


def _plain(value: Any) -> Any:
    """A value as JSON knows it."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return value


def _flat(value: Any) -> Any:
    return json.dumps(value, default=str) if isinstance(value, (dict, list)) else value
