"""BLIP's and ALBEF's annotations, read as their data sets read them."""

import io
import json
import random
from pathlib import Path

import pytest
from PIL import Image

from pairmill.export import export, holds_pairs, remove_pairs, verify_export
from tests.export.dataset import Built, Pair, build

PAIRS = [
    Pair(n, shard=n // 4, text=f"picture {n}" if n != 6 else None, more_texts=("ein Bild",) * (n % 3)) for n in range(9)
] + [Pair(20, 2, "IMG_1.jpg", captions=(("a red circle", None), ("a circle", None)), choice=("text.boilerplate", 1, 0))]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    return build(str(tmp_path_factory.mktemp("dataset") / "data"), PAIRS)


@pytest.fixture(scope="module")
def out(built, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "out"
    assert export(built.snapshot, str(out), "blip", pairs_per_shard=8).samples == 10
    return out


def texts_of(pair: Pair) -> list[str]:
    if pair.choice:
        return ["a circle", "a red circle"]
    return [text["text"] for text in pair.texts()]


def test_train_has_a_record_a_text(built, out):
    """What ``coco_karpathy_train`` and ``re_train_dataset`` take of it: image below a root, caption, image_id."""
    records = json.loads((out / "train.json").read_text())
    assert [(r["image_id"], r["caption"]) for r in records] == [
        (pair.uid, text) for pair in built.kept() for text in texts_of(pair)
    ]
    kept = {pair.uid: pair for pair in built.kept()}
    for record in records:
        assert (out / record["image"]).read_bytes() == kept[record["image_id"]].image
        assert Image.open(io.BytesIO((out / record["image"]).read_bytes())).size == (32, 24)


def test_eval_has_a_record_an_image_with_its_texts_by_rank(built, out):
    """What ``re_eval_dataset``, ``coco_karpathy_retrieval_eval`` and ``pretrain_dataset`` take of it."""
    records = json.loads((out / "eval.json").read_text())
    told = [pair for pair in built.kept() if texts_of(pair)]
    assert len(told) == 9, "an image without a text has no record"
    assert [(r["image_id"], r["caption"]) for r in records] == [(pair.uid, texts_of(pair)) for pair in told]
    assert all(isinstance(random.Random(0).choice(r["caption"]), str) for r in records)


def test_captions_are_scored_by_the_numbers_that_blip_takes_from_file_names(out):
    """Of ``coco_karpathy_caption_eval``: what is behind the last ``_`` of the name, without ``.jpg``."""
    records = json.loads((out / "eval.json").read_text())
    numbers = [int(r["image"].split("/")[-1].strip(".jpg").split("_")[-1]) for r in records]
    truth = json.loads((out / "eval_gt.json").read_text())
    assert [image["id"] for image in truth["images"]] == numbers and len(set(numbers)) == len(numbers)
    told = {n: [a["caption"] for a in truth["annotations"] if a["image_id"] == n] for n in numbers}
    assert told == {n: r["caption"] for n, r in zip(numbers, records, strict=True)}
    assert len({a["id"] for a in truth["annotations"]}) == len(truth["annotations"])


def test_without_texts_and_after_a_takedown(tmp_path, built):
    export(built.snapshot, str(tmp_path / "none"), "blip", where="false")
    assert json.loads((tmp_path / "none" / "train.json").read_text()) == []
    assert json.loads((tmp_path / "none" / "eval_gt.json").read_text()) == {"images": [], "annotations": []}
    out = tmp_path / "out"
    export(built.snapshot, str(out), "blip")
    victim = built.kept()[0]
    assert remove_pairs(str(out), {victim.uid}).complete
    assert verify_export(str(out)).ok and not holds_pairs(str(out), {victim.uid}).files
    for name in ("train.json", "eval.json"):
        assert victim.uid not in {r["image_id"] for r in json.loads((out / name).read_text())}
