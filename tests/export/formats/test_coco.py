"""COCO's files, read by pycocotools, by our own source and by the captioner's training."""

import contextlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from captioners.boxes.rle import decode, encode
from captioners.text import prepare_text
from pairmill.export import Options, export, holds_pairs, remove_pairs, verify_export
from pairmill.export.formats import coco
from pairmill.export.formats.coco import COCO_CATEGORIES, category_ids, image_id, image_ids
from pairmill.sources.image_folder import read_image_folder
from pairmill.train.samples import CocoData, open_samples
from schemas import config, fields
from tests.export.dataset import Built, Pair, build, uid
from tests.export.folders import forget
from tests.export.formats.columns import add, box

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
COLUMNS = (fields.REGIONS, fields.DETECTIONS, fields.CROWDED, fields.MASKS)
PAIRS = [
    Pair(
        n,
        shard=n // 4,
        text=f"picture {n}, schön" if n != 6 else None,
        more_texts=("ein Bild",) * (n % 2),
        format=("jpeg", "png", "webp")[n % 3],
        reason="clip.below_threshold" if n == 3 else None,
    )
    for n in range(10)
]
MASK = np.zeros((24, 32), np.uint8)
MASK[4:9, 6:20] = 1
HOUSE = box("dog", 1.5, 2.25, 20.125, 23.0)
FOUND = box("sled", 6, 4, 20, 9, score=0.75, source="owlv2")


def boxes_of(pair: Pair) -> dict[str, list]:
    counts = encode(MASK.astype(bool))
    return {
        "regions": [HOUSE] * (pair.number % 3 > 0),
        "detections": [FOUND] if pair.number % 3 == 2 else None,
        "crowded": ["sheep"] if pair.number == 1 else None,
        "masks": [{"box": 1, "counts": counts, "area": 70, "score": 0.9}] if pair.number % 3 == 2 else None,
    }


def built_at(path: Path, pairs: list[Pair]) -> Built:
    built = build(str(path), pairs)
    return add(built, "boxes-00000009", COLUMNS, {p.uid: boxes_of(p) for p in pairs})


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    return built_at(tmp_path_factory.mktemp("dataset") / "data", PAIRS)


@pytest.fixture(scope="module")
def out(built, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "out"
    report = export(built.snapshot, str(out), "coco", pairs_per_shard=8)
    assert report.samples == 9 and verify_export(str(out)).ok
    return out


def opened(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def test_pycocotools_reads_captions_and_finds_the_images(built, out):
    captions = opened(out / "captions.json")
    kept = {image_id(p.uid): p for p in built.kept()}
    assert set(captions.getImgIds()) == set(kept)
    for key, pair in kept.items():
        (image,) = captions.loadImgs(key)
        assert (out / image["file_name"]).read_bytes() == pair.image
        assert (image["width"], image["height"], image["uid"], image["coco_url"]) == (*pair.size, pair.uid, pair.url)
        said = captions.loadAnns(captions.getAnnIds(imgIds=key))
        assert [a["caption"] for a in said] == [t["text"] for t in pair.texts()]
    keys = [a["id"] for a in captions.dataset["annotations"]]
    assert keys == list(range(1, len(keys) + 1))


def test_pycocotools_reads_boxes_masks_and_crowds(built, out):
    instances = opened(out / "instances.json")
    assert instances.loadCats(instances.getCatIds()) == [
        {"id": n, "name": name, "supercategory": name} for n, name in enumerate(("dog", "sheep", "sled"), 1)
    ]
    for pair in built.kept():
        found = instances.loadAnns(instances.getAnnIds(imgIds=image_id(pair.uid)))
        names = [instances.cats[a["category_id"]]["name"] for a in found]
        assert names == ["dog", "sled"][: pair.number % 3] + ["sheep"] * (pair.number == 1)
        for annotation in found:
            if annotation["iscrowd"]:
                assert annotation["bbox"] == [0, 0, 32, 24]
                assert instances.annToMask(annotation).all()
            elif "segmentation" in annotation:
                assert (instances.annToMask(annotation) == MASK).all()
                assert (annotation["area"], annotation["score"], annotation["source"]) == (70, 0.75, "owlv2")
                assert annotation["bbox"] == [6, 4, 14, 5]
            else:
                assert annotation["bbox"] == [1.5, 2.25, 18.625, 20.75]
                assert annotation["area"] == pytest.approx(18.625 * 20.75, abs=1e-3) and "score" not in annotation


def test_a_detection_of_a_label_that_is_not_all_boxed_counts_as_no_error(out):
    """COCO's own evaluation over the whole set: all that is there is found, and a sheep besides."""
    instances = opened(out / "instances.json")
    boxes = [a for a in instances.dataset["annotations"] if not a["iscrowd"]]
    crowd = next(a for a in instances.dataset["annotations"] if a["iscrowd"])
    sheep = {"image_id": crowd["image_id"], "category_id": crowd["category_id"], "bbox": [3, 3, 9, 9]}
    found = [{n: a[n] for n in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in boxes]
    with contextlib.redirect_stdout(io.StringIO()):
        scored = COCOeval(instances, instances.loadRes([*found, {**sheep, "score": 0.95}]), "bbox")
        scored.params.useCats = 0
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    assert scored.stats[0] == pytest.approx(1.0)


def test_our_own_source_reads_it_back(built, out):
    source = config.ImageFolder(
        path=str(out), captions=str(out / "captions.json"), instances=str(out / "instances.json")
    )
    rows = [row for table in read_image_folder(source) for row in table.to_pylist()]
    names = {i["file_name"]: i["uid"] for i in json.loads((out / "captions.json").read_text())["images"]}
    kept = {p.uid: p for p in built.kept()}
    assert len(rows) == len(kept) == 9
    for row in rows:
        extra = json.loads(row["extra"])
        pair = kept[names[extra["file_name"]]]
        assert [t["text"] for t in row["texts"] or ()] == [t["text"] for t in pair.texts()]
        expected = boxes_of(pair)
        corners = [[b[n] for n in ("label", "x1", "y1", "x2", "y2")] for b in row["boxes"] or ()]
        stored = [*expected["regions"], *(expected["detections"] or ())]
        assert corners == [[b[n] for n in ("label", "x1", "y1", "x2", "y2")] for b in stored]
        assert extra.get("crowded") == expected["crowded"]
        assert not corners or extra["annotated_size"] == [32, 24]


def test_the_captioners_training_reads_it(built, out):
    samples = open_samples(CocoData(images=out, captions=out / "captions.json"), 16)
    told = [[prepare_text(t["text"]) for t in p.texts()] for p in built.kept() if p.texts()]
    assert len(samples) == 8, "an image without a text is nothing to train on"
    assert sorted(map(list, samples.texts)) == sorted(told)


def test_boxes_of_the_source_go_out_where_no_stage_placed_them(tmp_path):
    built = build(str(tmp_path / "data"), [Pair(0, 0, boxes=(("cat", 2, 4, 20, 30), ("cat", -8, 0, 10, 10)))])
    export(built.snapshot, str(tmp_path / "out"), "coco")
    instances = json.loads((tmp_path / "out" / "instances.json").read_text())
    assert [a["bbox"] for a in instances["annotations"]] == [[0, 0, 5, 5], [1, 2, 9, 13]]
    assert {a["category_id"] for a in instances["annotations"]} == {17}, "COCO's own number"


def test_image_ids_stay_over_updates(tmp_path):
    small = built_at(tmp_path / "data", PAIRS[:8])
    out = tmp_path / "out"
    export(small.snapshot, str(out), "coco", pairs_per_shard=4)
    before = {i["uid"]: i["id"] for i in json.loads((out / "captions.json").read_text())["images"]}
    gone = {PAIRS[0].uid}
    forget(small, gone)
    grown = built_at(tmp_path / "data", [p for p in PAIRS if p.uid not in gone])
    report = export(grown.snapshot, str(out), "coco", pairs_per_shard=4)
    after = {i["uid"]: i["id"] for i in json.loads((out / "captions.json").read_text())["images"]}
    assert set(after) == {p.uid for p in PAIRS if p.reason is None} - gone
    assert all(after[uid] == before[uid] for uid in before.keys() - gone) and len(set(after.values())) == len(after)
    assert report.previous is not None and verify_export(str(out)).ok


def test_a_takedown_reaches_annotations_and_images(tmp_path):
    built = built_at(tmp_path / "data", PAIRS)
    out = tmp_path / "out"
    export(built.snapshot, str(out), "coco", pairs_per_shard=8)
    victim = built.kept()[1]
    name = next(
        i["file_name"] for i in json.loads((out / "captions.json").read_text())["images"] if i["uid"] == victim.uid
    )
    removal = remove_pairs(str(out), {victim.uid})
    assert removal.complete and removal.samples == 1 and not (out / name).exists()
    assert verify_export(str(out)).ok and not holds_pairs(str(out), {victim.uid}).files
    for path in out.rglob("*"):
        if path.is_file():
            found = path.read_bytes()
            assert victim.uid.encode() not in found and victim.image not in found
            assert (victim.text or "?").encode() not in found or path.suffix == ".parquet"
    captions = opened(out / "captions.json")
    assert len(captions.getImgIds()) == 8 and image_id(victim.uid) not in captions.getImgIds()
    assert image_id(victim.uid) not in opened(out / "instances.json").getImgIds()
    again = tmp_path / "again"
    export(forget(built, {victim.uid}), str(again), "coco", pairs_per_shard=8)
    export(built.snapshot, str(out), "coco", pairs_per_shard=8)
    files = [[p.relative_to(root) for p in sorted(root.rglob("*")) if p.is_file()] for root in (out, again)]
    assert files[0] == files[1] and verify_export(str(out)).ok
    assert all((out / p).read_bytes() == (again / p).read_bytes() for p in files[0] if p.name != "manifest.json")


@given(
    mask=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32)).map(
        lambda drawn: np.random.default_rng(drawn[2]).random(drawn[:2]) < drawn[2] % 11 / 10
    )
)
def test_masks_are_stored_as_pycocotools_writes_them(mask):
    theirs = rle.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
    assert encode(mask) == theirs
    assert (decode(theirs, *mask.shape) == mask).all()


UIDS = st.sets(st.integers(0, 10**6).map(lambda n: uid(str(n), "")), max_size=60).map(sorted)


@given(uids=UIDS, seed=st.randoms())
def test_no_two_images_of_an_export_share_a_number(uids, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco, "_BITS", 7)  # of 128 numbers, so that many meet
        shuffled = seed.sample(uids, len(uids))
        number = image_ids(uids, lambda: uids)
        other = image_ids(shuffled, lambda: shuffled)
        numbers = [number(u) for u in uids]
        assert len(set(numbers)) == len(uids)
        assert numbers == [other(u) for u in uids], "whatever the order"
        first = {image_id(u): u for u in reversed(uids)}
        assert all(number(u) == key for key, u in first.items()), "the least uid keeps its own"


def test_image_ids_fit_into_a_float64():
    assert image_id("f" * 64) == 2**53 - 1 and float(2**53 - 1) == 2**53 - 1


def test_categories():
    assert len(COCO_CATEGORIES) == 80
    assert [COCO_CATEGORIES[n] for n in ("person", "stop sign", "backpack", "wine glass", "toothbrush")] == [
        1,
        13,
        27,
        46,
        90,
    ]
    assert category_ids(["zebra", "person", "zebra"]) == {"person": 1, "zebra": 24}
    assert category_ids(["zebra", "sled"]) == {"sled": 1, "zebra": 2}


def test_categories_are_cocos_own():
    path = Path(__file__).parents[4] / "shared" / "data" / "coco-mini" / "instances.json"
    if not path.exists():
        pytest.skip("no COCO annotations here")
    known = {c["name"]: c["id"] for c in json.loads(path.read_text())["categories"]}
    assert known.items() <= COCO_CATEGORIES.items()


def test_images_in_shards_are_called_by_their_names_in_there(tmp_path, built):
    export(built.snapshot, str(tmp_path / "out"), "coco", pairs_per_shard=8, options=Options(images="shards"))
    named = {i["file_name"] for i in json.loads((tmp_path / "out" / "captions.json").read_text())["images"]}
    found = set()
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as tar:
            found |= {name for name in tar.getnames() if not name.endswith((".txt", ".json"))}
    assert named == found and len(named) == 9
