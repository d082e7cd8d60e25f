import gc
import hashlib
import io
import json
import re
import tarfile
import warnings
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pairmill.errors import ConfigError, StoreError
from pairmill.export import export_parquet, export_webdataset
from pairmill.export.folder import Folder
from pairmill.export.selection import group_shards
from pairmill.export.tar import header
from pairmill.store import DataFile
from tests.export.dataset import IMAGES_TABLE, Built, Pair, build
from tests.readers import open_clip_loader

FORMATS = ("jpeg", "png", "webp")
PAIRS = [
    Pair(
        n,
        shard=n // 5,
        text=f"picture number {n}, schön",
        more_texts=("ein Bild",) * (n % 2),
        boxes=(("thing", 2, 4, 20, 30),) * (n % 3),
        extra={"licence": "cc0", "uid": "not ours"} if n % 4 == 0 else None,
        format=FORMATS[n % 3],
        score=0.2 + n / 100,
        reason="clip.below_threshold" if n % 7 == 3 else None,
    )
    for n in range(23)
] + [Pair(99, 4, "gone", format=None, reason="http.not_found")]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    return build(str(tmp_path_factory.mktemp("dataset") / "data"), PAIRS)


@pytest.fixture(scope="module")
def exported(built, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "out"
    report = export_webdataset(built.snapshot, str(out), pairs_per_shard=10)
    assert (report.samples, report.written, report.files) == (20, 3, ("00000.tar", "00001.tar", "00002.tar"))
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """Members by key and ending."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, ending = member.name.split(".")
                found.setdefault(key, {})[ending] = tar.extractfile(member).read()
    return found


def test_every_kept_pair_is_there_once_in_order_with_its_bytes(built, exported):
    found = samples(exported)
    kept = built.kept()
    assert [json.loads(s["json"])["uid"] for s in found.values()] == [p.uid for p in kept]
    for (key, members), pair in zip(found.items(), kept, strict=True):
        assert re.fullmatch(r"[0-9a-z_-]{1,64}", key)
        assert int(key[:5]) == pair.shard // 2
        assert members["txt"].decode() == pair.text
        assert members[{"jpeg": "jpg"}.get(pair.format, pair.format)] == pair.image


def test_the_json_says_what_is_known_of_the_pair(built, exported):
    found = {row["uid"]: row for row in (json.loads(s["json"]) for s in samples(exported).values())}
    pair = PAIRS[8]
    row = found[pair.uid]
    assert (row["url"], row["caption"], row["status"], row["error_message"]) == (pair.url, pair.text, "success", None)
    assert (row["width"], row["height"], row["original_width"], row["original_height"]) == (32, 24, 64, 48)
    assert row["sha256"] == hashlib.sha256(pair.image).hexdigest()
    assert row["clip_score"] == 0.28
    assert row["texts"] == [{"text": pair.text, "source": "web", "clip_score": 0.28, "itm_score": None}]
    box = {"label": "thing", "x1": 1, "y1": 2, "x2": 10, "y2": 15, "score": 1, "source": "human"}
    assert row["boxes"] == [box, box]
    assert row["licence"] == "cc0" and "extra" not in row
    human = {"text": "ein Bild", "source": "human", "clip_score": 0.1, "itm_score": None}
    assert found[PAIRS[1].uid]["texts"][1] == human
    assert found[PAIRS[1].uid]["boxes"][0]["x2"] == 10 and found[PAIRS[0].uid]["boxes"] is None


def test_a_pair_goes_out_with_the_texts_that_were_chosen_for_it(tmp_path):
    pairs = [
        Pair(0, 0, "IMG_1.jpg", captions=(("a red circle", None),), choice=("text.boilerplate", 0)),
        Pair(
            1, 0, "a blue square", captions=(("a square", None), ("the square", None)), choice=(1, "text.repeated", 0)
        ),
        Pair(2, 0, "a green cube", captions=((None, "caption.empty"),), choice=(0, "caption.empty")),
        Pair(3, 0, "x", captions=(("y", None),), choice=("a", "b"), reason="text.none_kept"),
    ]
    built = build(str(tmp_path / "data"), pairs)
    export_webdataset(built.snapshot, str(tmp_path / "out"))
    found = {
        row["url"]: (s["txt"].decode(), row)
        for s in samples(tmp_path / "out").values()
        if (row := json.loads(s["json"]))
    }
    assert set(found) == {p.url for p in pairs[:3]}
    text, row = found[pairs[0].url]
    assert text == row["caption"] == "a red circle" and row["itm_score"] == 0.25
    assert row["texts"] == [{"text": "a red circle", "source": "blip", "clip_score": 0.5, "itm_score": 0.75}]
    text, row = found[pairs[1].url]
    assert text == row["caption"] == "the square"
    assert [(t["text"], t["source"], t["itm_score"]) for t in row["texts"]] == [
        ("the square", "blip", 0.75),
        ("a blue square", "web", 0.25),
    ]
    assert found[pairs[2].url][0] == "a green cube" and len(found[pairs[2].url][1]["texts"]) == 1
    export_parquet(built.snapshot, str(tmp_path / "parquet"))
    table = pq.read_table(tmp_path / "parquet" / "00000.parquet")
    assert sorted(table["caption"].to_pylist()) == ["a green cube", "a red circle", "the square"]


def test_parquet_and_statistics_stand_beside_each_tar(exported):
    members = [json.loads(s["json"]) for s in samples(exported).values()]
    table = [row for path in sorted(exported.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    for name in ("key", "uid", "caption", "url", "width", "sha256"):
        assert [row[name] for row in table] == [row[name] for row in members]
    counts = [json.loads((exported / f"0000{n}_stats.json").read_text()) for n in range(3)]
    assert sum(c["successes"] for c in counts) == sum(c["count"] for c in counts) == 20
    assert all(c["status_dict"] == {"success": c["count"]} and c["failed_to_download"] == 0 for c in counts)
    assert json.loads((exported / "sizes.json").read_text()) == {
        f"0000{n}.tar": c["count"] for n, c in enumerate(counts)
    }


def test_the_manifest_holds(built, exported):
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["snapshot"] == 1 and manifest["export"]["dataset"] == built.dataset.url
    assert manifest["export"]["where"] is None
    listed = {"manifest.json"}
    for file in manifest["files"]:
        assert file["since"] == 1
        for part in (file, *file["side"]):
            data = (exported / part["name"]).read_bytes()
            assert (part["bytes"], part["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
            listed.add(part["name"])
    assert {*listed, "sizes.json"} == {path.name for path in exported.iterdir()}
    assert [part["name"] for part in manifest["side"]] == ["sizes.json"]
    assert [file["shards"] for file in manifest["files"]] == [[0, 1], [2, 3], [4, 4]]
    assert (manifest["previous"], manifest["new"]) == (None, [file["name"] for file in manifest["files"]])
    assert (manifest["changed"], manifest["removed"], manifest["unchanged"]) == ([], [], 0)
    assert sum(file["samples"] for file in manifest["files"]) == manifest["pairs"] == 20


@pytest.fixture
def leaky():
    """webdataset and open_clip leave the files open that they read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


def test_webdataset_reads_it(built, exported, leaky):
    import webdataset as wds

    dataset = wds.WebDataset([str(p) for p in sorted(exported.glob("*.tar"))], shardshuffle=False)
    loaded = list(dataset.decode("pilrgb").rename(image="jpg;png;webp").to_tuple("image", "txt", "json"))
    assert len(loaded) == 20
    for (image, text, row), pair in zip(loaded, built.kept(), strict=True):
        assert (text, row["uid"]) == (pair.text, pair.uid)
        stored = np.asarray(Image.open(io.BytesIO(pair.image)).convert("RGB"))
        assert np.array_equal(np.asarray(image), stored)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("train", [False, True])
def test_open_clip_reads_it(built, exported, train, leaky, monkeypatch):
    captions = {pair.text: pair for pair in built.kept()}
    codes = {text: number for number, text in enumerate(captions)}
    shards = f"{exported}/{{00000..00002}}.tar"
    loader = open_clip_loader(monkeypatch, shards, 20, codes.__getitem__, train=train)
    seen = []
    for images, texts in loader:
        for image, code in zip(images, texts[:, 0], strict=True):
            pair = list(captions.values())[int(code)]
            assert np.array_equal(image.numpy(), np.asarray(Image.open(io.BytesIO(pair.image)).convert("RGB")))
            seen.append(pair.uid)
    assert sorted(seen) == sorted(p.uid for p in built.kept())


def test_the_same_snapshot_gives_the_same_bytes(built, exported, tmp_path):
    export_webdataset(built.snapshot, str(tmp_path / "again"), pairs_per_shard=10)
    assert content(tmp_path / "again") == content(exported)


def test_a_second_time_there_is_nothing_to_do(built, exported):
    before = {path.name: path.stat().st_mtime_ns for path in exported.iterdir()}
    report = export_webdataset(built.snapshot, str(exported), pairs_per_shard=10)
    assert (report.written, report.samples) == (0, 20) and "already" in report.note
    assert {path.name: path.stat().st_mtime_ns for path in exported.iterdir()} == before


@pytest.mark.parametrize("after", range(1, 9))
def test_an_interrupted_export_has_no_manifest_and_goes_on(built, exported, tmp_path, monkeypatch, after):
    out = tmp_path / "out"
    plain = Folder.create
    count = 0

    def failing(self, name):
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return plain(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "create", failing)
        with pytest.raises(KeyboardInterrupt):
            export_webdataset(built.snapshot, str(out), pairs_per_shard=10)
    assert not (out / "manifest.json").exists()
    report = export_webdataset(built.snapshot, str(out), pairs_per_shard=10)
    assert report.written == 3 - (after - 1) // 3
    assert content(out) == content(exported)


def test_a_file_torn_while_it_was_written_is_never_taken_for_whole(built, exported, tmp_path, monkeypatch):
    out = tmp_path / "out"
    images = "pairmill.export.selection.Selection.images"
    with monkeypatch.context() as patch:
        patch.setattr(images, lambda self, rows: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(StoreError, match="goes on"):
            export_webdataset(built.snapshot, str(out), pairs_per_shard=10)
    assert not list(out.glob("*.tar"))
    export_webdataset(built.snapshot, str(out), pairs_per_shard=10)
    assert content(out) == content(exported)


def test_a_damaged_file_of_an_unfinished_export_is_written_again(built, exported, tmp_path):
    out = tmp_path / "out"
    export_webdataset(built.snapshot, str(out), pairs_per_shard=10)
    identity = json.loads((out / "manifest.json").read_text())["export"]
    (out / "manifest.json").unlink()
    (out / ".export.json").write_text(json.dumps({"export": identity}))
    data = bytearray((out / "00001.tar").read_bytes())
    data[700] ^= 1
    (out / "00001.tar").write_bytes(data)
    assert export_webdataset(built.snapshot, str(out), pairs_per_shard=10).written == 1
    assert content(out) == content(exported)


def test_what_is_not_ours_is_left_alone(built, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="new folder"):
        export_webdataset(built.snapshot, str(tmp_path))
    assert content(tmp_path) == {"notes.txt": b"mine"}
    with pytest.raises(ConfigError, match="is a file"):
        export_webdataset(built.snapshot, str(tmp_path / "notes.txt"))


@pytest.mark.parametrize("other", [{"where": "width > 0"}, {"pairs_per_shard": 5}])
def test_another_export_is_left_alone(built, exported, other):
    before = content(exported)
    with pytest.raises(ConfigError, match=next(iter(other))):
        export_webdataset(built.snapshot, str(exported), **{"pairs_per_shard": 10, **other})
    assert content(exported) == before


def test_where_chooses_among_the_kept(built, tmp_path):
    where = "clip_score > (SELECT avg(clip_score) FROM pairs) AND uid NOT IN (SELECT uid FROM boxes) -- a comment"
    report = export_webdataset(built.snapshot, str(tmp_path / "a"), where=where)
    mean = np.mean([p.score for p in PAIRS if p.format])
    expected = {p.uid for p in built.kept() if p.score > mean and not p.boxes}
    assert {json.loads(s["json"])["uid"] for s in samples(tmp_path / "a").values()} == expected
    assert report.samples == len(expected) > 0
    everything = export_webdataset(built.snapshot, str(tmp_path / "b"), where="status = 'dropped' OR true")
    assert everything.samples == 20


@pytest.mark.parametrize(
    "where", ["nothing > 1", "1; DROP VIEW pairs", "true) UNION ALL SELECT uid, shard FROM pairs WHERE (true", "count("]
)
def test_a_wrong_condition_is_refused_before_anything_is_written(built, tmp_path, where):
    with pytest.raises(ConfigError, match="where ="):
        export_webdataset(built.snapshot, str(tmp_path / "out"), where=where)
    assert not (tmp_path / "out").exists()


def test_a_changed_threshold_and_new_shards_move_no_sample_to_another_file(tmp_path):
    def shards_of(built: Built, out: Path) -> dict[str, str]:
        export_webdataset(built.snapshot, str(out), pairs_per_shard=10)
        return {json.loads(s["json"])["uid"]: key[:5] for key, s in samples(out).items()}

    before = shards_of(build(str(tmp_path / "data"), PAIRS[:15]), tmp_path / "first")
    dropped = [Pair(**{**p.__dict__, "reason": "text.language"}) if p.number in (0, 6, 7) else p for p in PAIRS]
    after = shards_of(build(str(tmp_path / "data"), dropped), tmp_path / "second")
    assert {uid: after[uid] for uid in before if uid in after} == {uid: n for uid, n in before.items() if uid in after}
    assert len(after) == 17


def test_a_file_without_kept_pairs_is_an_empty_tar(built, tmp_path, leaky):
    import webdataset as wds

    report = export_webdataset(built.snapshot, str(tmp_path / "out"), where="shard = 4", pairs_per_shard=5)
    assert len(report.files) == 5 and report.samples == len([p for p in built.kept() if p.shard == 4])
    urls = [str(tmp_path / "out" / name) for name in report.files]
    assert len(list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))) == report.samples


def test_to_any_file_system(built, exported):
    memory = fsspec.filesystem("memory")
    report = export_webdataset(built.snapshot, "memory://exports/one", pairs_per_shard=10)
    assert report.samples == 20
    for name, data in content(exported).items():
        assert memory.cat_file(f"/exports/one/{name}") == data
    assert export_webdataset(built.snapshot, "memory://exports/one", pairs_per_shard=10).written == 0


@given(st.from_regex(r"[0-9a-z_-]{1,64}\.(jpg|json)", fullmatch=True), st.integers(0, 2**33 - 1))
def test_headers_are_those_of_tarfile(name, size):
    expected = tarfile.TarInfo(name)
    expected.size = size
    assert header(name, size) == expected.tobuf(tarfile.USTAR_FORMAT)


def test_parquet(built, exported, tmp_path):
    report = export_parquet(built.snapshot, str(tmp_path / "out"), pairs_per_shard=10)
    assert report.files == ("00000.parquet", "00001.parquet", "00002.parquet")
    rows = [row for name in report.files for row in pq.read_table(tmp_path / "out" / name).to_pylist()]
    assert [(r["uid"], r["image"], r["caption"]) for r in rows] == [(p.uid, p.image, p.text) for p in built.kept()]
    assert [r["key"] for r in rows] == list(samples(exported))
    assert len(rows[0]["texts"]) >= 1 and any(r["boxes"] for r in rows)
    export_parquet(built.snapshot, str(tmp_path / "again"), pairs_per_shard=10)
    assert content(tmp_path / "again") == content(tmp_path / "out")


def test_a_kept_pair_without_an_image_stops_the_export(tmp_path):
    built = build(str(tmp_path / "data"), [Pair(0, 0), Pair(1, 0, format=None)])
    with pytest.raises(StoreError, match="no stored image"):
        export_webdataset(built.snapshot, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_recipe_without_images_has_nothing_to_export(tmp_path):
    built = build(str(tmp_path / "data"), [Pair(0, 0)])
    snapshot = built.snapshot
    snapshot.record.columns.pop("image")
    with pytest.raises(ConfigError, match="no images"):
        export_webdataset(snapshot, str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="pairs_per_shard"):
        export_webdataset(built.snapshot, str(tmp_path / "out"), pairs_per_shard=0)


def test_missing_files_of_the_store_are_told(tmp_path):
    built = build(str(tmp_path / "data"), [Pair(0, 0)])
    Path(built.snapshot.files(IMAGES_TABLE)[0].path).unlink()
    with pytest.raises(StoreError, match="pairmill verify"):
        export_webdataset(built.snapshot, str(tmp_path / "out"))


@given(st.lists(st.integers(1, 30), max_size=30), st.integers(1, 60), st.lists(st.integers(1, 30), max_size=5))
def test_groups_fill_up_in_order_and_stay_when_shards_are_added(sizes, most, more):
    def files(rows: list[int]) -> list[DataFile]:
        return [DataFile("", "", shard, count, 0) for shard, count in enumerate(rows)]

    groups = group_shards(files(sizes), most)
    assert [n for g in groups for n in range(g.first, g.last + 1)] == list(range(len(sizes)))
    for group in groups:
        inside = sizes[group.first : group.last + 1]
        assert group.admitted == sum(inside) and (sum(inside) <= most or len(inside) == 1)
    assert group_shards(files(sizes + more), most)[: max(0, len(groups) - 1)] == groups[:-1]
