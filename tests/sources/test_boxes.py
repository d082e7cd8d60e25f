"""Boxes of URL tables and of JSON members: untrusted, and nothing of them is lost."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioners.boxes.regions import Regions
from pairmill.errors import SourceError
from pairmill.sources import read
from pairmill.sources.boxes import LEFT_OUT_KEY, MAX_BOXES, are_boxes, take_boxes
from pairmill.stage import Batch, ErrorBudget, apply
from schemas import config, fields
from tests.sources.tables import rows
from tests.sources.test_shards import IMAGES, sample, tar_of

DOG = {"label": "dog", "x1": 1, "y1": 2.5, "x2": 30, "y2": 40}
CAT = {"label": "cat", "x1": 5, "y1": 5, "x2": 20, "y2": 20, "score": 0.5, "source": "owlv2"}
STORED = [DOG | {"score": None, "source": "human"}, CAT]


def write(path: Path, values: list[Any], column: str = "objects") -> Path:
    """A table with one row a value, a JSON text where the format is text."""
    records = [{"url": f"http://x/{n}", "text": "t", column: value} for n, value in enumerate(values)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(r) for r in records))
    else:
        text = io.StringIO()
        writer = csv.writer(text, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(records[0])
        writer.writerows([r["url"], r["text"], json.dumps(r[column])] for r in records)
        path.write_text(text.getvalue())
    return path


def table(path: Path) -> list[dict[str, Any]]:
    return rows(config.UrlTable(path=str(path), boxes="objects"))


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "jsonl"])
def test_every_format(tmp_path: Path, kind: str) -> None:
    found = table(write(tmp_path / f"x.{kind}", [[DOG, CAT], [], None, [DOG]]))
    assert [row["boxes"] for row in found] == [STORED, [], [], STORED[:1]]
    assert [row["extra"] for row in found] == [None] * 4
    assert [row["url"] for row in found] == [f"http://x/{n}" for n in range(4)]


def test_json_texts_in_parquet_and_in_json_lines(tmp_path: Path) -> None:
    for kind in ("parquet", "jsonl"):
        (found,) = table(write(tmp_path / f"x.{kind}", [json.dumps([DOG, CAT])]))
        assert found["boxes"] == STORED


def test_another_column_stays_among_the_others(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [[DOG]])
    (row,) = rows(config.UrlTable(path=str(path)))
    assert row["boxes"] == [] and json.loads(row["extra"]) == {"objects": [DOG]}
    with pytest.raises(SourceError, match=r"no column 'object'\. Did you mean 'objects'\?.*source\.boxes"):
        list(read(config.UrlTable(path=str(path), boxes="object")))


NONE = dict.fromkeys(("label", "x1", "y1", "x2", "y2", "score"))


@pytest.mark.parametrize(
    ("entry", "differs"),
    [
        ({**DOG, "x1": "1"}, {"x1": None}),
        ({**DOG, "x1": True}, {"x1": None}),
        ({**DOG, "x2": None}, {"x2": None}),
        ({**DOG, "x2": 1e308}, {"x2": math.inf}),
        ({**DOG, "x2": -(10**400)}, {"x2": -math.inf}),
        ({**DOG, "label": 7}, {"label": None}),
        ({**DOG, "label": {"deep": [1, [2]]}}, {"label": None}),
        ({**DOG, "label": "a\x00\ud800b"}, {"label": "a\ufffdb"}),
        ({**DOG, "score": "high", "source": 3}, {}),
        ({**DOG, "score": 0.5}, {"score": 0.5, "source": "detector"}),
        ({**DOG, "segmentation": [[1, 2]]}, {}),
        ({}, NONE),
        ([1, 2, 3, 4], NONE),
        (None, NONE),
    ],
)
def test_what_a_box_lacks_is_null_and_no_other_box_suffers(tmp_path: Path, entry: Any, differs: dict) -> None:
    (row,) = table(write(tmp_path / "x.jsonl", [[CAT, entry, CAT]]))
    assert row["boxes"] == [CAT, {**STORED[0], **differs}, CAT] and row["reason"] is None


@pytest.mark.parametrize(
    "value", ["no JSON", "[{", 7, {"label": "dog"}, '"dog"', "[" * 100_000, "9" * 10_000, float("inf")]
)
def test_a_value_that_is_no_list_is_recorded_and_the_pair_is_admitted(tmp_path: Path, value: Any) -> None:
    (row,) = table(write(tmp_path / "x.jsonl", [value]))
    assert row["url"] == "http://x/0" and row["reason"] is None
    assert row["boxes"] == [{**NONE, "source": "human"}]
    said = value if isinstance(value, str) else json.dumps(value)
    assert json.loads(row["extra"]) == {"objects": said[:200].replace("Infinity", "inf")}


def test_too_many_boxes_are_counted(tmp_path: Path) -> None:
    (row,) = table(write(tmp_path / "x.jsonl", [[DOG] * 10_000]))
    assert len(row["boxes"]) == MAX_BOXES and json.loads(row["extra"]) == {LEFT_OUT_KEY: 10_000 - MAX_BOXES}


def test_labels_that_are_not_utf8_cost_their_row_its_boxes_only(tmp_path: Path) -> None:
    labels = pa.StringArray.from_buffers(2, *pa.array([b"caf\xe9", b"dog"]).buffers()[1:])
    corners = [pa.array([value, value]) for value in (1.0, 2.0, 30.0, 40.0)]
    structs = pa.StructArray.from_arrays([labels, *corners], ["label", "x1", "y1", "x2", "y2"])
    boxes = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), structs)
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"url": ["http://x/0", "http://x/1"], "text": ["a", "b"], "objects": boxes}), path)
    bad, good = table(path)
    assert bad["boxes"] == [{**NONE, "source": "human"}] and "not UTF-8" in bad["extra"]
    assert [b["label"] for b in good["boxes"]] == ["dog"] and good["extra"] is None


def test_junk_nested_deeper_than_python_recurses_is_cut_off(tmp_path: Path) -> None:
    deep = json.loads("[" * 900 + "]" * 900)
    for value in ([deep], {"a": deep}):
        (row,) = rows(config.UrlTable(path=str(write(tmp_path / "x.jsonl", [value]))))
        assert len(row["extra"]) < 200


JUNK = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["label", "x1", "y1", "x2", "y2", "score", "source"]), inner, max_size=7)
    ),
    max_leaves=20,
)


@given(JUNK)
def test_any_value_becomes_boxes_of_which_none_is_lost(value: Any) -> None:
    """Through to the stage: each entry is kept or rejected, and what is kept lies in the image."""
    others = {"objects": value}
    boxes = take_boxes(others, "objects")
    entries = (
        value
        if isinstance(value, list)
        else []
        if value is None or value != value or value in ("", "null")
        else [value]
    )
    if not isinstance(value, str):
        assert len(boxes) == len(entries)
    columns = {"boxes": [boxes], "transform": [[0.5, 0.5, 0.0, 0.0]], "extra": [None]}
    columns |= {name: [side] for name in ("width", "original_width") for side in [60]}
    columns |= {name: [side] for name in ("height", "original_height") for side in [40]}
    known = {f.name: f.type for f in (*fields.PAIRS, *fields.IMAGES)}
    arrays = {name: pa.array(column, known[name]) for name, column in columns.items()}
    stage = Regions()
    (found,) = apply(stage, stage.open(), Batch(pa.table({"uid": ["u"], **arrays})), ErrorBudget(0, 0)).to_pylist()
    assert len(found["regions"]) + len(found["rejected_boxes"]) == len(boxes)
    for box in found["regions"]:
        assert 0 <= box["x1"] < box["x2"] <= 60 and 0 <= box["y1"] < box["y2"] <= 40 and box["label"]


def test_boxes_of_json_members_and_of_our_own_exports(tmp_path: Path) -> None:
    members = sample("0", IMAGES[0], "t", boxes=[DOG, CAT])
    members += sample("1", IMAGES[1], "t", boxes=[[1, 2, 3, 4]])  # in a form of its own: left where it is
    members += sample("2", IMAGES[2], "t", boxes=[])
    found = rows(config.WebDataset(path=str(tar_of(tmp_path / "x.tar", members))))
    assert [row["boxes"] for row in found] == [STORED, [], []]
    assert [json.loads(row["extra"] or "{}") for row in found] == [{}, {"boxes": [[1, 2, 3, 4]]}, {"boxes": []}]
    table = pa.table({"url": ["http://x/1"], "caption": ["t"], "jpg": [IMAGES[0]], "boxes": [STORED]})
    pq.write_table(table, tmp_path / "x.parquet")
    (row,) = rows(config.Img2DatasetParquet(path=str(tmp_path / "x.parquet")))
    assert row["boxes"] == STORED and row["extra"] is None
    assert not are_boxes([{"label": "dog"}])
