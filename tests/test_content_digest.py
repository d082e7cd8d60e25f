"""The digest of rows: of their values, whatever way they came into memory."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from pairmill.store import content_digest

SCHEMA = pa.schema(
    [
        pa.field("uid", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("ranks", pa.list_(pa.int32())),
        pa.field("said", pa.list_(pa.string())),
        pa.field("near", pa.list_(pa.struct([pa.field("uid", pa.string()), pa.field("similarity", pa.float32())]))),
        pa.field("attempts", pa.int32()),
        pa.field("animated", pa.bool_()),
        pa.field("score", pa.float32()),
        pa.field("image", pa.binary()),
    ]
)
WORDS = st.sampled_from(["", "a", "ab", "b", "é"])
SCORES = st.none() | st.sampled_from([0.0, 0.5, 1.0])
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "uid": WORDS,
            "reason": st.none() | WORDS,
            "ranks": st.none() | st.lists(st.none() | st.integers(0, 3), max_size=3),
            "said": st.none() | st.lists(st.none() | WORDS, max_size=3),
            "near": st.none()
            | st.lists(st.fixed_dictionaries({"uid": st.none() | WORDS, "similarity": SCORES}), max_size=2),
            "attempts": st.none() | st.integers(0, 3),
            "animated": st.none() | st.booleans(),
            "score": SCORES,
            "image": st.none() | st.sampled_from([b"", b"x"]),
        }
    ),
    max_size=6,
)


def table(rows: list[dict[str, object]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMA)


@given(ROWS, ROWS, st.integers(0, 6))
def test_it_is_that_of_the_values_however_they_lie_in_memory(rows, others, cut):
    whole = table(rows)
    digest = content_digest(whole)
    file = io.BytesIO()
    pq.write_table(whole, file, row_group_size=2)
    assert content_digest(pq.read_table(file)) == digest
    assert content_digest(pa.concat_tables([whole.slice(0, cut), whole.slice(cut)])) == digest
    assert content_digest(table([*others, *rows, *others]).slice(len(others), len(rows))) == digest
    picked = pa.array(range(len(others), len(others) + len(rows)), pa.int64())
    assert content_digest(table([*others, *rows]).take(picked)) == digest
    assert (content_digest(table(others)) == digest) == (others == rows)
