"""JSON Lines of an export: what is written is read, and nothing damaged is passed over."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairmill.export import jsonl
from pairmill.export.folder import Sink
from pairmill.export.format import write_list
from pairmill.export.tar import Damaged

UIDS = st.integers(0, 2**256 - 1).map(lambda n: f"{n:064x}")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=8),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=4), inside, max_size=3),
    max_leaves=6,
)
RECORDS = st.dictionaries(st.text(min_size=1, max_size=6).filter(lambda n: n != "uid"), VALUES, min_size=1, max_size=3)
LINES = st.lists(st.tuples(UIDS, RECORDS), max_size=4)


def written(lines) -> bytes:
    file = io.BytesIO()
    sink = Sink(file)
    for uid, record in lines:
        jsonl.write(sink, uid, record)
    return file.getvalue()


@given(LINES)
def test_what_is_written_is_read(lines):
    data = written(lines)
    assert list(jsonl.records(io.BytesIO(data))) == lines
    assert [uid for uid, _ in jsonl.lines(io.BytesIO(data))] == [uid for uid, _ in lines]
    file = io.BytesIO()
    write_list(Sink(file), (jsonl.without_uid(line) for _, line in jsonl.lines(io.BytesIO(data))))
    assert json.loads(file.getvalue()) == [record for _, record in lines]


@given(LINES.filter(bool), st.data())
def test_what_breaks_off_or_has_more_in_it_is_damaged(lines, draw):
    data = written(lines)
    place = draw.draw(st.integers(1, len(data) - 1))
    whole = {0, *(n + 1 for n, byte in enumerate(data) if byte == ord("\n"))}
    if place not in whole:
        with pytest.raises(Damaged):
            list(jsonl.lines(io.BytesIO(data[:place])))
    for more in (b"\n", b"{}\n", b'{"uid": "0", "x": 1}\n', b"\0" * 70):
        with pytest.raises(Damaged, match=f"line {len(lines) + 1}"):
            list(jsonl.lines(io.BytesIO(data + more)))


@pytest.mark.parametrize("record", [{}, {"uid": "x", "a": 1}])
def test_what_cannot_be_read_is_not_written(record):
    with pytest.raises(ValueError, match="uid"):
        jsonl.write(Sink(io.BytesIO()), "0" * 64, record)
