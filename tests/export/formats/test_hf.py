"""What Hugging Face's datasets and webdataset read of texts, boxes and conversations."""

import gc
import io
import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pairmill.boxes import Box
from pairmill.errors import ConfigError
from pairmill.export import Options, export, holds_pairs, remove_pairs, verify_export
from pairmill.export.formats.hf import feature_of
from pairmill.export.formats.rendered import CONVERSATIONS
from pairmill.instructions import KINDS, Instruction, Turn
from schemas import fields
from tests.export.dataset import Built, Pair, build
from tests.export.folders import data, forget

THING = Box("thing", 1.25, 2.5, 16, 23.25, 0.5, "human")
OTHER = Box("thing", 16, 0, 32, 24, None, "human")


def with_conversations(pair: Pair) -> Pair:
    talk = (Turn("user", "What?"), Turn("assistant", f"It is [the thing](box:0) of {pair.number}, schön."))
    more = (Turn("user", "And where?"), Turn("assistant", "To the left."))
    asked = (Turn("user", "What is at [](box:1)?"), Turn("assistant", "[Two things](box:0,1)."))
    written = (
        Instruction("conversation", (*talk, *more), (THING,), "offline"),
        Instruction("detail", writer="offline", reason="check.length", detail="too short"),
        Instruction("grounding", asked, (THING, OTHER), "offline"),
    )
    return replace(pair, instructions=written)


PAIRS = [
    with_conversations(Pair(n, shard=n // 4, text=f"picture {n}, schön", more_texts=("ein Bild",) * (n % 2)))
    if n % 3
    else Pair(n, shard=n // 4, boxes=(("thing", 2, 4, 20, 30),), format="png", extra={"licence": "cc0"})
    for n in range(10)
]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    return build(str(tmp_path_factory.mktemp("dataset") / "data"), PAIRS)


@pytest.fixture(scope="module")
def out(built, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "out"
    report = export(built.snapshot, str(out), "hf", pairs_per_shard=4)
    assert (report.samples, report.whole) == (10, ("README.md",)) and len(report.files) == 3
    return out


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """``datasets.load_dataset`` of a folder, without the network and with a cache of its own."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
        patch.setitem(os.environ, "HF_HOME", str(cache))
        import datasets

        datasets.disable_progress_bars()
        yield lambda *args, **kwargs: datasets.load_dataset(*args, **kwargs, split="train", cache_dir=str(cache))


def test_datasets_loads_the_folder_with_images_decoded(built, out, load):
    import datasets

    rows = load(str(out))
    assert rows.features["image"] == datasets.Image()
    assert rows.features["texts"] == datasets.List(
        {
            "text": datasets.Value("string"),
            "source": datasets.Value("string"),
            "clip_score": datasets.Value("float32"),
            "itm_score": datasets.Value("float32"),
        }
    )
    assert rows.column_names[:4] == ["uid", "image", "caption", "texts"]
    assert not {"key", "status", "conversations"} & set(rows.column_names)
    assert rows["uid"] == [pair.uid for pair in built.kept()]
    for row, pair in zip(rows, built.kept(), strict=True):
        stored = np.asarray(Image.open(io.BytesIO(pair.image)).convert("RGB"))
        assert (np.asarray(row["image"].convert("RGB")) == stored).all()
        assert [t["text"] for t in row["texts"]] == [t["text"] for t in pair.texts()] and row["caption"] == pair.text
        corners = [[b[n] for n in ("label", "x1", "y1", "x2", "y2")] for b in row["boxes"] or ()]
        assert corners == [["thing", 1, 2, 10, 15]] * len(pair.boxes)
        assert json.loads(row["extra"] or "{}") == (pair.extra or {})
    raw = rows.cast_column("image", datasets.Image(decode=False))[0]["image"]
    assert (raw["bytes"], raw["path"]) == (built.kept()[0].image, "000000000" + Path(raw["path"]).suffix)


def test_datasets_streams_the_files_too(built, out, load):
    rows = load("parquet", data_files=str(out / "*.parquet"), streaming=True)
    assert [row["uid"] for row in rows] == [pair.uid for pair in built.kept()]


def test_conversations_come_as_lists_of_messages(built, tmp_path, load):
    export(built.snapshot, str(tmp_path / "out"), "hf", options=Options(kinds=KINDS, boxes="llava"))
    rows = load(str(tmp_path / "out"))
    told = [pair for pair in built.kept() if pair.instructions]
    assert rows["uid"] == [pair.uid for pair in told], "pairs without a conversation are left out"
    for row, pair in zip(rows, told, strict=True):
        talk, places = row["conversations"]
        n = pair.number
        assert (talk["id"], talk["kind"]) == (f"{pair.uid}-conversation", "conversation")
        assert [m["role"] for m in talk["messages"]] == ["user", "assistant"] * 2
        assert talk["messages"][1]["content"] == f"It is the thing [0.04, 0.20, 0.50, 0.85] of {n}, schön."
        assert places["messages"][0]["content"] == "What is at [0.50, 0.12, 1.00, 0.88]?"
        assert talk["frame"] == {"width": 32, "height": 32, "left": 0, "top": 4}
        box = {"label": "thing", "x1": 1.25, "y1": 2.5, "x2": 16, "y2": 23.25, "score": 0.5, "source": "human"}
        assert talk["boxes"] == [box]


def test_without_boxes_in_the_text_there_is_no_grounding(built, tmp_path):
    export(built.snapshot, str(tmp_path / "out"), "hf", options=Options(kinds=("conversation", "detail")))
    said = pq.read_table(tmp_path / "out" / "00000.parquet")["conversations"].to_pylist()
    assert {len(conversations) for conversations in said} == {1}
    assert said[0][0]["messages"][1]["content"].startswith("It is the thing of ") and said[0][0]["frame"] is None
    for options, told in (
        (Options(boxes="llava"), "hold none unless kinds names some"),
        (Options(kinds=("grounding",)), "which writes no boxes"),
        (Options(images="files"), "no such option"),
    ):
        with pytest.raises(ConfigError, match=told):
            export(built.snapshot, str(tmp_path / "other"), "hf", options=options)


def test_a_takedown_keeps_types_and_the_next_update_is_as_from_scratch(tmp_path, load):
    built = build(str(tmp_path / "data"), PAIRS)
    out, again = tmp_path / "out", tmp_path / "again"
    export(built.snapshot, str(out), "hf", pairs_per_shard=4)
    victim = built.kept()[1]
    removal = remove_pairs(str(out), {victim.uid})
    assert removal.complete and removal.samples == 1
    assert verify_export(str(out)).ok and not holds_pairs(str(out), {victim.uid}).files
    assert all(victim.image not in path.read_bytes() for path in out.iterdir())
    rows = load(str(out))
    assert rows["uid"] == [pair.uid for pair in built.kept() if pair != victim]
    assert isinstance(rows[0]["image"], Image.Image)
    snapshot = forget(built, {victim.uid})
    export(snapshot, str(out), "hf", pairs_per_shard=4)
    export(snapshot, str(again), "hf", pairs_per_shard=4)
    assert data(out) == data(again)


def test_image_bytes_are_stored_as_they_are(out):
    column = pq.ParquetFile(out / "00000.parquet").metadata.row_group(0)
    paths = {column.column(n).path_in_schema: column.column(n) for n in range(column.num_columns)}
    assert paths["image.bytes"].compression == "UNCOMPRESSED" and not paths["image.bytes"].has_dictionary_page


@pytest.mark.parametrize(
    ("kind", "feature"),
    [
        (pa.string(), {"dtype": "string", "_type": "Value"}),
        (pa.float64(), {"dtype": "float64", "_type": "Value"}),
        (pa.list_(pa.list_(pa.int32())), [[{"dtype": "int32", "_type": "Value"}]]),
        (pa.struct([("a", pa.bool_())]), {"a": {"dtype": "bool", "_type": "Value"}}),
        (pa.list_(pa.struct([("a", pa.date32())])), None),
    ],
)
def test_types_have_the_names_that_datasets_gives_them(kind, feature, load):
    import datasets

    assert feature_of(kind) == feature
    if feature is not None:
        assert datasets.Features.from_dict({"x": feature}).arrow_schema.field("x").type == kind


def test_every_column_of_ours_has_a_feature(out, load):
    import datasets

    schema = pq.read_schema(out / "00000.parquet")
    stated = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert stated.keys() == set(schema.names)
    assert datasets.Features.from_dict(stated).arrow_schema.equals(schema, check_metadata=False)
    assert all(feature_of(f.type) for f in (CONVERSATIONS, fields.REGIONS, fields.INSTRUCTIONS))


@pytest.fixture
def leaky():
    """webdataset leaves the closing of its last file to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


def test_webdataset_reads_conversations(built, tmp_path, leaky):
    import webdataset as wds

    plain, told = tmp_path / "plain", tmp_path / "told"
    export(built.snapshot, str(plain), "webdataset")
    export(built.snapshot, str(told), "webdataset", options=Options(kinds=KINDS, boxes="qwen_vl"))
    assert json.loads((plain / "manifest.json").read_text())["export"].keys() == {
        "dataset",
        "format",
        "where",
        "pairs_per_shard",
        "layout",
    }
    assert b"conversations" not in (plain / "00000.tar").read_bytes()
    samples = list(wds.WebDataset(str(told / "00000.tar"), shardshuffle=False).decode("pil"))
    pairs = [pair for pair in built.kept() if pair.instructions]
    assert [s["json"]["uid"] for s in samples] == [pair.uid for pair in pairs]
    for sample, pair in zip(samples, pairs, strict=True):
        talk, places = sample["json"]["conversations"]
        assert talk["messages"][1]["content"] == (
            f"It is <ref>the thing</ref><box>(39,104),(500,969)</box> of {pair.number}, schön."
        )
        assert places["kind"] == "grounding" and places["boxes"][1]["x2"] == 32 and places["frame"] is None
        assert sample["jpg"].size == pair.size
    stored = pq.read_table(told / "00000.parquet")
    assert stored.schema.field("conversations").type == CONVERSATIONS.type
    assert stored["conversations"].to_pylist() == [s["json"]["conversations"] for s in samples]


def test_a_dataset_without_instructions_exports_as_before_and_refuses_kinds(tmp_path):
    built = build(str(tmp_path / "data"), [Pair(0, 0)])
    for name in ("webdataset", "hf"):
        assert export(built.snapshot, str(tmp_path / name), name).samples == 1
        with pytest.raises(ConfigError, match="writes no conversations"):
            export(built.snapshot, str(tmp_path / "other"), name, options=Options(kinds=KINDS, boxes="llava"))
