"""Rows of a query as a table, as JSON and as CSV."""

from __future__ import annotations

import base64
import csv
import io
import json

import pyarrow as pa

from pairmill.report.rows import print_csv, print_json_rows, print_rows

ROWS = pa.table(
    {
        "n": pa.array([1234567, None], pa.int64()),
        "score": pa.array([0.123456, float("nan")], pa.float64()),
        "text": ['a, "quoted"\nline \x1b[2J' + "x" * 100, "ümlaut"],
        "image": pa.array([b"\xff\xd8", None], pa.binary()),
        "texts": [[{"text": "a", "score": float("inf")}], []],
    }
)


def test_the_table_is_one_line_a_row_and_safe():
    stream = io.StringIO()
    print_rows(ROWS, stream)
    header, first, second = stream.getvalue().splitlines()
    assert header.split() == ["n", "score", "text", "image", "texts"]
    assert first.split()[:2] == ["1,234,567", "0.1235"]
    assert "\x1b" not in first
    assert r"\x1b[2J" in first
    assert "x" * 100 not in first
    assert "…" in first
    assert "<2 bytes>" in first
    assert second.split() == ["nan", "ümlaut", "[]"]


def test_json_has_values_whole_and_is_strict():
    stream = io.StringIO()
    print_json_rows(ROWS, stream)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    first, second = json.loads(stream.getvalue(), parse_constant=refuse)
    assert first["n"] == 1234567
    assert first["text"] == ROWS["text"][0].as_py()
    assert base64.b64decode(first["image"]) == b"\xff\xd8"
    assert first["texts"] == [{"text": "a", "score": None}]
    assert second == {"n": None, "score": None, "text": "ümlaut", "image": None, "texts": []}
    assert "\x1b" not in stream.getvalue()


def test_json_of_no_rows_is_an_empty_array():
    stream = io.StringIO()
    print_json_rows(ROWS.slice(0, 0), stream)
    assert json.loads(stream.getvalue()) == []


def test_csv_reads_back():
    stream = io.StringIO()
    print_csv(ROWS, stream)
    stream.seek(0)
    first, second = csv.DictReader(stream)
    assert first["text"] == ROWS["text"][0].as_py()
    assert json.loads(first["texts"]) == [{"text": "a", "score": None}]
    assert second == {"n": "", "score": "", "text": "ümlaut", "image": "", "texts": "[]"}


def test_columns_of_one_name_are_printed_both():
    stream = io.StringIO()
    print_csv(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), stream)
    assert stream.getvalue() == "a,a\n1,2\n"


def test_json_keeps_columns_of_one_name():
    rows = pa.Table.from_arrays([pa.array([n]) for n in range(5)], ["reason", "reason", "text", "reason_1", "reason"])
    stream = io.StringIO()
    print_json_rows(rows, stream)
    assert json.loads(stream.getvalue()) == [{"reason": 0, "reason_2": 1, "text": 2, "reason_1": 3, "reason_3": 4}]
