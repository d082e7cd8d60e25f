"""Exports with image files and a whole file beside their parts, killed on the way."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pairmill.export import Options, export, remove_pairs, verify_export
from pairmill.export.folder import Folder
from tests.export.dataset import Built, Pair, build, instructed
from tests.export.folders import assert_true, changed, data, killed_everywhere, manifest

BEFORE = [instructed(Pair(n, n // 2, f"picture {n:04d}.")) for n in range(3)]
OPTIONS = Options(kinds=("conversation", "grounding"))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """Snapshot 2: the pair of the second group dropped, a third group."""
    url = str(tmp_path_factory.mktemp("dataset") / "data")
    build(url, BEFORE)
    return build(
        url, [*BEFORE[:2], changed(BEFORE[2], reason="text.language"), instructed(Pair(3, 2, "picture 0003."))]
    )


def write(built: Built, snapshot: int, out: Path):
    return export(built.dataset.snapshot(snapshot), str(out), "llava", pairs_per_shard=2, options=OPTIONS)


def job(built: Built, **what: object) -> dict[str, object]:
    return {"format": "llava", "dataset": built.dataset.url, "pairs_per_shard": 2, "options": OPTIONS.stated(), **what}


@pytest.mark.parametrize(("first", "stride"), [(True, 13), (False, 11)])
def test_an_export_goes_on(built, tmp_path, first, stride):
    start, whole, target = tmp_path / "start", tmp_path / "whole", 1 if first else 2
    start.mkdir()
    if not first:
        write(built, 1, start)
    shutil.copytree(start, whole)
    write(built, target, whole)
    ends = killed_everywhere(tmp_path, start, job(built, what="export", snapshot=target, stride=stride))
    assert len(ends) > 3
    for end in ends:
        assert end["again"] == 0
        assert data(end["out"]) == data(whole) and manifest(end["out"]) == manifest(whole)
        assert_true(end["out"])
    there = ["manifest.json" in end["between"] for end in ends]
    begun = there.index(False)
    assert there[begun:] == sorted(there[begun:]) and there[-1]


def test_a_takedown_can_be_done_again(built, tmp_path):
    out, whole, gone = tmp_path / "out", tmp_path / "whole", BEFORE[0]
    write(built, 1, out)
    shutil.copytree(out, whole)
    assert remove_pairs(str(whole), [gone.uid]).samples == 1
    ends = killed_everywhere(tmp_path, out, {"what": "takedown", "uids": [gone.uid]})
    assert len(ends) > 12
    for end in ends:
        assert end["again"] == 0
        assert data(end["out"]) == data(whole) and manifest(end["out"]) == manifest(whole)
        assert verify_export(str(end["out"])).ok


def test_images_under_new_keys_are_taken_down_wherever_they_were_written(tmp_path, monkeypatch):
    """An update that moves images to other keys, killed before each file: the list of before is never believed."""
    url, start = str(tmp_path / "data"), tmp_path / "start"
    pairs = [instructed(Pair(n, 0, f"picture {n:04d}.")) for n in range(3)]
    first = min(pairs, key=lambda pair: pair.uid)
    dropped = [changed(p, reason="text.language") if p is first else p for p in pairs]
    export(build(url, dropped).snapshot, str(start), "llava", options=OPTIONS)
    snapshot = build(url, pairs).snapshot
    count, step, plain = 0, 0, Folder.create

    def dying(self, name, **more):
        nonlocal count
        count += 1
        if count == step:
            raise KeyboardInterrupt
        return plain(self, name, **more)

    seen = 0
    for step in range(2, 8):
        out, count = tmp_path / f"out{step}", 0
        shutil.copytree(start, out)
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "create", dying)
            with pytest.raises(KeyboardInterrupt):
                export(snapshot, str(out), "llava", options=OPTIONS)
        seen += any(first.image == path.read_bytes() for path in out.rglob("*.jpg"))
        for pair in pairs:
            copy = tmp_path / f"{out.name}-{pair.number}"
            shutil.copytree(out, copy)
            assert remove_pairs(str(copy), [pair.uid]).complete
            for path in (p for p in copy.rglob("*") if p.is_file()):
                assert pair.image not in path.read_bytes() and pair.uid.encode() not in path.read_bytes(), path
    assert seen > 2
