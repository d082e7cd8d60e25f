"""Taking pairs out of exports: gone from every byte, the rest as it was, the manifest true."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from pairmill.export import Reach, holds_pairs, known_exports, remove_from_exports, remove_pairs, verify_export
from pairmill.export.folder import Folder
from pairmill.store import REWRITES, REWRITES_TABLE
from schemas.exports import ExportEvent
from tests.export.dataset import Built, Pair, build
from tests.export.folders import (
    WRITE,
    assert_true,
    data,
    forget,
    from_scratch,
    killed_everywhere,
    manifest,
    stamps,
)

FORMATS = pytest.mark.parametrize("kind", ["webdataset", "parquet"])
PAIRS = [Pair(n, n // 5, f"picture {n}", boxes=(("thing", 2, 4, 20, 30),) * (n % 2)) for n in range(23)]
FIRST = sorted((p for p in PAIRS if p.shard < 2), key=lambda p: (p.shard, p.uid))
GONE = [FIRST[0], FIRST[4], FIRST[5], FIRST[9], PAIRS[22]]
"""The first and last sample of the first file, two that stand together, and one of the third file."""
UIDS = [p.uid for p in GONE]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    return build(str(tmp_path_factory.mktemp("dataset") / "data"), PAIRS)


def export(built: Built, out: Path, kind: str = "webdataset"):
    return WRITE[kind](built.snapshot, str(out), pairs_per_shard=10)


def assert_gone(out: Path, pairs: list[Pair]) -> None:
    """No byte of them is there: not in the files as they are, and not in any decoded column."""
    for path in out.rglob("*"):
        found = path.read_bytes()
        for pair in pairs:
            for trace in (pair.uid.encode(), pair.url.encode(), pair.image):
                assert trace not in found, (path.name, pair.number)
        if path.suffix == ".parquet":
            decoded = repr(pq.read_table(path).to_pylist())
            assert not any(pair.uid in decoded or pair.url in decoded or repr(pair.image) in decoded for pair in pairs)


def keys(out: Path) -> dict[str, str]:
    """The key of each pair, in the order of the files."""
    found = {}
    for path in sorted(out.glob("*.parquet")):
        found.update({row["uid"]: row["key"] for row in pq.read_table(path).to_pylist()})
    return found


@FORMATS
def test_they_are_gone_and_the_rest_is_as_it_was(built, tmp_path, kind):
    out = tmp_path / "out"
    export(built, out, kind)
    before, old, were = keys(out), stamps(out), manifest(out)
    assert holds_pairs(str(out), UIDS).files.keys() == set(UIDS)
    removal = remove_pairs(str(out), UIDS, dataset=built.dataset.url)
    assert (removal.reach, removal.samples, removal.complete) == (Reach.EXPORT, 5, True)
    assert removal.uids == tuple(sorted(UIDS))
    assert [name[:5] for name in removal.rewritten] == ["00000", "00002"]
    assert_gone(out, GONE)
    assert keys(out) == {uid: key for uid, key in before.items() if uid not in UIDS}
    assert all(stamps(out)[name] == old[name] for name in old if name.startswith("00001"))
    assert verify_export(str(out)).ok
    assert_true(out)
    known = manifest(out)
    assert known["pairs"] == 18 and [file["taken_down"] for file in known["files"]] == [4, 0, 1]
    assert [file["content"] is None for file in known["files"]] == [True, False, True]
    assert known["files"][1] == were["files"][1]
    assert holds_pairs(str(out), UIDS).files == {}
    if kind == "webdataset":
        assert_tars_are_whole(out, before)


def assert_tars_are_whole(out: Path, before: dict[str, str]) -> None:
    rest = {p.uid: p for p in PAIRS if p not in GONE}
    seen = set()
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            found = {member.name: tar.extractfile(member).read() for member in tar}
        assert path.stat().st_size % tarfile.RECORDSIZE == 0
        for name, member in found.items():
            key, ending = name.split(".")
            if ending == "json":
                row = json.loads(member)
                pair = rest[row["uid"]]
                assert key == before[pair.uid]
                assert (found[f"{key}.jpg"], found[f"{key}.txt"].decode()) == (pair.image, pair.text)
                seen.add(pair.uid)
    assert seen == set(rest)
    sizes = json.loads((out / "sizes.json").read_text())
    assert sizes == {"00000.tar": 6, "00001.tar": 10, "00002.tar": 2}
    for n in range(3):
        record = json.loads((out / f"0000{n}_stats.json").read_text())
        assert record["count"] == record["successes"] == sizes[f"0000{n}.tar"]


@FORMATS
def test_once_more_there_is_nothing_to_do(built, tmp_path, kind):
    out = tmp_path / "out"
    export(built, out, kind)
    remove_pairs(str(out), UIDS)
    before = stamps(out)
    again = remove_pairs(str(out), UIDS)
    assert (again.reach, again.samples, again.rewritten, again.deleted) == (Reach.EXPORT, 0, (), ())
    assert "holds none" in again.note
    assert stamps(out) == before


def test_all_pairs_of_a_file(built, tmp_path):
    out = tmp_path / "out"
    export(built, out)
    last = [p for p in PAIRS if p.shard == 4]
    remove_pairs(str(out), [p.uid for p in last])
    assert_gone(out, last)
    assert verify_export(str(out)).ok
    with tarfile.open(out / "00002.tar") as tar:
        assert tar.getmembers() == []


@FORMATS
def test_a_dry_run_tells_the_same_and_changes_nothing(built, tmp_path, kind):
    out = tmp_path / "out"
    export(built, out, kind)
    (out / "00001.tar.tmp").write_bytes(b"torn")
    before = stamps(out)
    told = remove_pairs(str(out), UIDS, dry_run=True)
    assert stamps(out) == before
    assert remove_pairs(str(out), UIDS) == told
    assert told.samples == 5 and told.deleted == ("00001.tar.tmp",)


@FORMATS
def test_an_update_after_it_does_not_bring_them_back(tmp_path, kind):
    built, out = build(str(tmp_path / "data"), PAIRS), tmp_path / "out"
    export(built, out, kind)
    remove_pairs(str(out), UIDS)
    between = stamps(out)
    after = forget(built, set(UIDS))
    report = WRITE[kind](after, str(out), pairs_per_shard=10)
    assert (report.written, report.samples, report.unchanged) == (2, 18, 1)
    assert_gone(out, GONE)
    assert all(stamps(out)[name] == between[name] for name in between if name.startswith("00001"))
    assert [file["taken_down"] for file in manifest(out)["files"]] == [0, 0, 0]
    assert_true(out)
    assert data(from_scratch(after, out, tmp_path / "new")) == data(out)


def test_the_same_snapshot_again_does_not_bring_them_back(built, tmp_path):
    out = tmp_path / "out"
    export(built, out)
    remove_pairs(str(out), UIDS)
    report = export(built, out)
    assert report.written == 0 and report.samples == 18
    assert_gone(out, GONE)


@FORMATS
def test_killed_at_any_step_it_can_be_done_again(built, tmp_path, kind):
    out, whole = tmp_path / "out", tmp_path / "whole"
    export(built, out, kind)
    shutil.copytree(out, whole)
    remove_pairs(str(whole), UIDS)
    ends = killed_everywhere(tmp_path, out, {"what": "takedown", "uids": UIDS})
    assert len(ends) > 12
    for end in ends:
        assert end["again"] == 0
        assert data(end["out"]) == data(whole) and manifest(end["out"]) == manifest(whole)
        assert_gone(end["out"], GONE)
        assert verify_export(str(end["out"])).ok


@pytest.mark.parametrize("step", [3, 8, 13])
def test_killed_and_then_an_update_comes_first(tmp_path, step, monkeypatch):
    built, out = build(str(tmp_path / "data"), PAIRS), tmp_path / "out"
    export(built, out)
    count = 0

    def dying(plain):
        def wrapped(*arguments):
            nonlocal count
            count += 1
            if count == step:
                raise KeyboardInterrupt
            return plain(*arguments)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying(os.replace))
        patch.setattr(os, "remove", dying(os.remove))
        with pytest.raises(KeyboardInterrupt):
            remove_pairs(str(out), UIDS)
    assert not verify_export(str(out)).ok
    after = forget(built, set(UIDS))
    WRITE["webdataset"](after, str(out), pairs_per_shard=10)
    assert_gone(out, GONE)
    assert_true(out)
    assert data(from_scratch(after, out, tmp_path / "new")) == data(out)


@FORMATS
@pytest.mark.parametrize("update", [False, True])
def test_an_unfinished_export(tmp_path, kind, update, monkeypatch):
    """Killed after all its files were written, with a torn one beside them."""
    built, out = build(str(tmp_path / "data"), PAIRS), tmp_path / "out"
    if update:
        export(built, out, kind)
        build(built.dataset.url, [*PAIRS, *(Pair(n, n // 5 + 1) for n in range(23, 30))])
    plain = Folder.create

    def failing(self, name):
        if name == "manifest.json":
            raise KeyboardInterrupt
        return plain(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "create", failing)
        with pytest.raises(KeyboardInterrupt):
            export(built, out, kind)
    torn = f"00003.{'tar' if kind == 'webdataset' else 'parquet'}.tmp"
    (out / torn).write_bytes(b"x" * 100 + GONE[0].image)
    held = holds_pairs(str(out), UIDS)
    assert set(held.files) == set(UIDS) and torn in held.unread
    removal = remove_pairs(str(out), UIDS)
    assert (removal.reach, removal.rewritten, removal.complete) == (Reach.EXPORT, (), True)
    assert torn in removal.deleted and {name[:5] for name in removal.deleted} == {"00000", "00002", "00003"}
    assert_gone(out, GONE)
    assert holds_pairs(str(out), UIDS).files == {}
    assert "manifest.json" not in stamps(out)
    after = forget(built, set(UIDS))
    kept = {name: stamp for name, stamp in stamps(out).items() if name.startswith("00001")}
    WRITE[kind](after, str(out), pairs_per_shard=10)
    assert kept == {name: stamps(out)[name] for name in kept}
    assert_gone(out, GONE)
    assert_true(out)
    assert manifest(out)["previous"] == (1 if update else None)


def test_files_that_are_not_the_exports_are_told_of_and_left(built, tmp_path):
    out = tmp_path / "out"
    export(built, out)
    shutil.copy(out / "00000.tar", out / "mine.tar")
    shutil.copy(out / "00000.parquet", out / "mine.parquet")
    shutil.copy(out / "00000.tar", out / "00009.tar")
    removal = remove_pairs(str(out), UIDS)
    assert removal.left == ("mine.parquet", "mine.tar") and not removal.complete
    assert removal.deleted == ("00009.tar",)
    assert holds_pairs(str(out), UIDS).files[UIDS[0]] == ("mine.parquet", "mine.tar")
    assert "mine.tar" in removal.note


def test_a_damaged_file_is_told_of_and_one_beside_which_a_pair_is_known_goes(built, tmp_path):
    out = tmp_path / "out"
    export(built, out)
    whole = (out / "00001.tar").read_bytes()
    (out / "00001.tar").write_bytes(whole[:5000])
    other = next(p for p in PAIRS if p.shard in (2, 3))
    removal = remove_pairs(str(out), UIDS)
    assert removal.left == ("00001.tar",) and not removal.complete and removal.samples == 5
    assert holds_pairs(str(out), [other.uid]).unread == ("00001.tar",)
    removal = remove_pairs(str(out), [other.uid])
    assert removal.deleted == ("00001.tar",) and removal.complete
    assert_gone(out, [*GONE, other])
    assert [(p.file, p.wrong.value) for p in verify_export(str(out)).problems] == [("00001.tar", "missing")]


def test_without_a_manifest_its_files_are_still_known(built, tmp_path):
    out = tmp_path / "out"
    export(built, out)
    (out / "manifest.json").unlink()
    removal = remove_pairs(str(out), UIDS)
    assert removal.reach is Reach.EXPORT and {name[:5] for name in removal.deleted} == {"00000", "00002"}
    assert_gone(out, GONE)


def test_what_cannot_be_reached_is_told(built, tmp_path):
    uids = UIDS
    assert remove_pairs(str(tmp_path / "nowhere"), uids).reach is Reach.GONE
    assert holds_pairs(str(tmp_path / "nowhere"), uids).reach is Reach.GONE
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    assert remove_pairs(str(tmp_path / "notes"), uids).reach is Reach.NO_EXPORT
    assert holds_pairs(str(tmp_path / "notes"), uids).reach is Reach.NO_EXPORT
    for url in ("nosuch://bucket/x", "http://127.0.0.1:9/x"):
        assert remove_pairs(url, uids).reach is Reach.UNREACHABLE
        assert holds_pairs(url, uids).reach is Reach.UNREACHABLE
    out = tmp_path / "out"
    export(built, out)
    removal = remove_pairs(str(out), uids, dataset="/somewhere/else")
    assert removal.reach is Reach.OTHER_DATASET and built.dataset.url in removal.note and not removal.complete
    with Folder(str(out)).hold():
        removal = remove_pairs(str(out), uids)
        assert removal.reach is Reach.BUSY and not removal.complete
    assert holds_pairs(str(out), uids).files.keys() == set(uids)


def test_on_any_file_system(built, tmp_path):
    memory, url = fsspec.filesystem("memory"), "memory://exports/takedown"
    WRITE["webdataset"](built.snapshot, url, pairs_per_shard=10)
    export(built, tmp_path / "out")
    assert remove_pairs(url, UIDS).samples == remove_pairs(str(tmp_path / "out"), UIDS).samples == 5
    found = {path.rpartition("/")[2]: memory.cat_file(path) for path in memory.ls("/exports/takedown", detail=False)}
    assert found == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_snapshot_opened_before_a_takedown_does_not_bring_them_back(tmp_path):
    built = build(str(tmp_path / "data"), PAIRS)
    opened = built.snapshot
    for name in opened.record.tables:
        for file in opened.files(name):  # remembered from now on
            schema = pq.read_schema(file.path)
            rows = pq.read_table(file.path, schema=schema)
            kept = rows.filter([uid not in UIDS for uid in rows["uid"].to_pylist()])
            with built.dataset.table(name, schema).writer(file.shard, "taken-down") as writer:
                writer.write(kept)
                new = writer.close()
            row = {"table": name, "old": file.relative, "new": new.relative, "rows": new.rows, "size": new.size}
            built.dataset.records(REWRITES_TABLE, REWRITES).append([row])
    report = WRITE["webdataset"](opened, str(tmp_path / "out"), pairs_per_shard=10)
    assert report.samples == 18
    assert_gone(tmp_path / "out", GONE)


# -- the list of exports ----------------------------------------------------------------------------------------------


def test_every_export_is_known_and_reached(tmp_path):
    built = build(str(tmp_path / "data"), PAIRS)
    export(built, tmp_path / "a")
    export(built, tmp_path / "b", "parquet")
    export(built, tmp_path / "c")
    shutil.rmtree(tmp_path / "c")
    removals = {Path(r.out).name: r for r in remove_from_exports(built.dataset, UIDS)}
    assert {name: (r.reach, r.samples) for name, r in removals.items()} == {
        "a": (Reach.EXPORT, 5),
        "b": (Reach.EXPORT, 5),
        "c": (Reach.GONE, 0),
    }
    assert_gone(tmp_path / "a", GONE)
    assert_gone(tmp_path / "b", GONE)
    known = {Path(k.out).name: (k.event, k.pairs) for k in known_exports(built.dataset)}
    assert known == {
        "a": (ExportEvent.TAKEN_DOWN, 18),
        "b": (ExportEvent.TAKEN_DOWN, 18),
        "c": (ExportEvent.FINISHED, 23),
    }
    assert all(not r.samples for r in remove_from_exports(built.dataset, UIDS, dry_run=True))
