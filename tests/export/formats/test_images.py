"""Images in files of their own: found when lost or damaged, mended, never left behind, and never anybody else's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import fsspec
import pytest

from pairmill.export import FORMATS, Options, Reach, VerifyReport, export, holds_pairs, remove_pairs, verify_export
from pairmill.export.format import json_list
from pairmill.export.formats.annotations import annotation_format
from pairmill.export.manifest import WHOLE_FILES
from tests.export.dataset import Built, Pair, build, instructed
from tests.export.folders import assert_true, data, files, manifest, stamps

ENDINGS = ("jpeg", "png", "webp")
PAIRS = [instructed(Pair(n, n // 3, f"picture {n:04d}.", format=ENDINGS[n % 3])) for n in range(6)]
OPTIONS = Options(kinds=("complex",))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    return build(str(tmp_path_factory.mktemp("dataset") / "data"), PAIRS)


def write(built: Built, out: object):
    return export(built.snapshot, str(out), "llava", pairs_per_shard=3, options=OPTIONS)


@pytest.fixture
def out(built, tmp_path) -> Path:
    write(built, tmp_path / "out")
    return tmp_path / "out"


def problems(report: VerifyReport) -> list[tuple[str, str]]:
    return [(problem.file, problem.wrong.value) for problem in report.problems]


def image_of(out: Path, pair: Pair) -> Path:
    return next(path for path in (out / "images").rglob("*.*") if path.read_bytes() == pair.image)


def test_they_are_named_by_their_keys_alone(out):
    names = {name for name in files(out) if name.startswith("images/")}
    assert len(names) == 6
    for name in names:
        assert re.fullmatch(r"images/(\d{5})/\1\d{4}\.(jpg|png|webp)", name)
    report = verify_export(str(out))
    assert report.ok and report.files == len(files(out)) - 1
    assert report.bytes == sum((out / n).stat().st_size for n in files(out) if n != "manifest.json")
    assert "images/" not in (out / "manifest.json").read_text()  # however many there are


def test_every_file_is_looked_at(out):
    for name in sorted(files(out) - {"manifest.json"}):
        path = out / name
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert problems(verify_export(str(out))) == [(name, "sha256")]
        path.write_bytes(before + b"\0")
        assert problems(verify_export(str(out))) == [(name, "size")]
        path.unlink()
        assert problems(verify_export(str(out))) == [(name, "missing")]
        path.write_bytes(before)
    assert verify_export(str(out)).ok


def test_surplus_files(out):
    (out / "images" / "00001" / "000010007.jpg").write_bytes(b"x")
    (out / "images" / "00001" / "000010000.jpg.tmp").write_bytes(b"x")
    (out / "images" / "00001" / "notes.txt").write_text("mine")
    (out / "images" / "00009").mkdir()
    (out / "images" / "00009" / "000090000.png").write_bytes(b"x")
    (out / "images" / "more").mkdir()
    (out / "images" / "mine.jpg").write_bytes(b"x")
    assert sorted(problems(verify_export(str(out)))) == [
        (f"images/{name}", "surplus")
        for name in (
            "00001/000010000.jpg.tmp",
            "00001/000010007.jpg",
            "00001/notes.txt",
            "00009/000090000.png",
            "mine.jpg",
            "more",
        )
    ]


def test_a_lost_image_is_written_again_and_others_are_not(built, out):
    before, known, old = data(out), manifest(out), stamps(out)
    path = image_of(out, PAIRS[4])
    for harm in (path.unlink, lambda: path.write_bytes(b"short")):
        harm()
        assert write(built, out).written == 1
        assert data(out) == before and manifest(out) == known
    assert all(stamps(out)[n] == old[n] for n in old if n.startswith(("00000", "images/00000")))
    path.write_bytes(path.read_bytes()[:-1] + b"?")  # only --verify notices
    assert write(built, out).written == 0 and not verify_export(str(out)).ok


def test_an_image_damaged_in_an_unfinished_export_is_written_again(built, out):
    before, export_of = data(out), manifest(out)["export"]
    (out / "manifest.json").unlink()
    (out / ".export.json").write_text(json.dumps({"export": export_of}))
    path = image_of(out, PAIRS[4])
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert write(built, out).written == 1
    assert data(out) == before


def test_a_changed_group_leaves_no_image_of_before(tmp_path):
    url, out = str(tmp_path / "data"), tmp_path / "out"
    write(build(url, PAIRS), out)
    gone = image_of(out, PAIRS[1])
    dropped = [Pair(**{**vars(p), "reason": "text.language"}) if p.number == 1 else p for p in PAIRS]
    write(build(url, dropped), out)
    assert PAIRS[1].image not in data(out).values() and gone.parent.is_dir()
    assert_true(out)
    # All of a group: its folder goes with it.
    write(build(url, [Pair(**{**vars(p), "reason": "text.language"}) if p.shard else p for p in PAIRS]), out)
    assert [path.name for path in (out / "images" / "00001").iterdir()] == []
    assert_true(out)


def test_a_list_that_is_lost_or_lies_is_not_believed(built, out):
    listed = out / "00001_images.jsonl"
    before, uid = listed.read_bytes(), PAIRS[4].uid
    lines = before.decode().splitlines(keepends=True)
    for wrong in (
        "",
        lines[0][:40],
        lines[0].replace("000010000", "../00000/000000000"),
        lines[0].replace('"bytes"', '"size"'),
        "[" * 100_000 + "\n",
    ):
        listed.write_text(wrong)
        assert problems(verify_export(str(out)))[0] in [
            ("00001_images.jsonl", "size"),
            ("00001_images.jsonl", "sha256"),
        ]
        removal = remove_pairs(str(out), [PAIRS[0].uid], dry_run=True)
        assert not removal.complete and "images/00001" in removal.left  # whose images these are nobody knows
    # A pair of that group is known by its other files: its images go, all of them, and verify says which are missing.
    removal = remove_pairs(str(out), [uid])
    assert removal.complete and PAIRS[4].image not in data(out).values()
    assert not (out / "images" / "00001").exists() and image_of(out, PAIRS[0])
    assert [name for name, _ in problems(verify_export(str(out)))] == ["00001_images.jsonl"]
    write(built, out)
    assert verify_export(str(out)).ok


def test_what_is_not_ours_among_images_is_left_alone_and_told_of(out):
    uid, mine = PAIRS[4].uid, out / "images" / "00001" / "notes.txt"
    mine.write_text(f"see {uid}")
    (out / "images" / "mine").mkdir()
    removal = remove_pairs(str(out), [uid])
    assert removal.left == ("images/00001/notes.txt", "images/mine") and not removal.complete
    assert mine.exists() and PAIRS[4].image not in data(out).values()
    assert holds_pairs(str(out), [uid]).files == {uid: ("images/00001/notes.txt",)}


def test_a_damaged_part_takes_the_whole_file_with_it_in_a_takedown(built, out):
    part = out / "00001.jsonl"
    part.write_bytes(part.read_bytes()[:-5])
    removal = remove_pairs(str(out), [PAIRS[0].uid])
    assert removal.samples == 1 and removal.left == ("00001.jsonl",)
    assert PAIRS[0].uid.encode() not in b"".join(data(out).values())
    assert {name for name, _ in problems(verify_export(str(out)))} == {"00001.jsonl", "llava.json"}
    write(built, out)  # from a dataset that still has the pair
    assert verify_export(str(out)).ok


def test_a_pair_left_in_the_whole_file_alone_is_removed(out):
    text = (out / "llava.json").read_text()
    uid = "a" * 64
    (out / "llava.json").write_text(text.replace(PAIRS[0].uid, uid))
    removal = remove_pairs(str(out), [uid])
    assert removal.complete and removal.uids == (uid,)
    assert (out / "llava.json").read_text() == text and verify_export(str(out)).ok


def test_on_any_file_system(built, out):
    memory, url = fsspec.filesystem("memory"), "memory://exports/images"
    write(built, url)
    root = "/exports/images/"

    def there() -> dict[str, bytes]:
        found = memory.find(root)
        return {path[len(root) :]: memory.cat_file(path) for path in found if not path.endswith("manifest.json")}

    assert there() == data(out) and verify_export(url).ok
    assert remove_pairs(url, [PAIRS[4].uid]).samples == remove_pairs(str(out), [PAIRS[4].uid]).samples == 1
    assert there() == data(out) and verify_export(url).ok


def test_columns_of_the_source_name_no_file(tmp_path):
    extra = {"key": "../../evil", "format": "sh", "uid": "0", "conversations": [], "image": "evil", "width": 1}
    built, out = build(str(tmp_path / "data"), [instructed(Pair(0, 0, extra=extra))]), tmp_path / "out"
    for images in ("files", "shards"):
        export(built.snapshot, str(out / images), "llava", options=Options(images=images))
        (record, *_) = json.loads((out / images / "llava.json").read_text())
        assert record["image"].endswith("000000000.jpg") and len(record["conversations"]) == 4
    assert {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*")} == {"data", "out"}
    assert sorted(n for n in files(out / "files") if "images/" in n) == ["images/00000/000000000.jpg"]


def test_a_folder_images_in_an_export_without_any_is_somebody_elses(built, tmp_path):
    out = tmp_path / "out"
    export(built.snapshot, str(out), "webdataset", pairs_per_shard=3)
    mine = out / "images" / "00001" / "000010000.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"x")
    assert problems(verify_export(str(out)))[0] == ("images", "surplus")
    removal = remove_pairs(str(out), [PAIRS[4].uid])
    assert removal.samples == 1 and removal.left == ("images",)
    export(built.snapshot, str(out), "webdataset", pairs_per_shard=3)
    assert mine.read_bytes() == b"x"


def test_images_in_a_folder_that_is_no_export_are_somebody_elses(tmp_path):
    mine = tmp_path / "pictures" / "images" / "00000" / "000000000.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"x")
    removal = remove_pairs(str(tmp_path / "pictures"), [PAIRS[0].uid])
    assert (removal.reach, removal.deleted, removal.left) == (Reach.NO_EXPORT, (), ("images/00000",))
    assert mine.read_bytes() == b"x"


def test_pairs_without_any_record_are_counted_as_they_go(tmp_path, monkeypatch):
    def annotate(row, image, options):
        return [{"image": image}] if row["caption"] != "nothing to say" else []

    odd = annotation_format("odd", "nobody", annotate, (json_list("odd.json"),), Options("files"))
    monkeypatch.setitem(FORMATS, "odd", odd)
    monkeypatch.setattr("pairmill.export.manifest.WHOLE_FILES", WHOLE_FILES | {"odd.json"})
    pairs = [Pair(n, 0, "nothing to say" if n == 1 else f"text {n}") for n in range(4)]
    built, out = build(str(tmp_path / "data"), pairs), tmp_path / "out"
    export(built.snapshot, str(out), "odd")
    assert manifest(out)["pairs"] == 4 and len(json.loads((out / "odd.json").read_text())) == 3
    for gone, left in ((pairs[2], 3), (pairs[1], 2)):
        told = remove_pairs(str(out), [gone.uid], dry_run=True)
        assert remove_pairs(str(out), [gone.uid]) == told and told.samples == 1
        assert manifest(out)["pairs"] == left and gone.image not in data(out).values()
        assert_true(out)
        assert verify_export(str(out)).ok
