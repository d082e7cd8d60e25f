"""Exports with image files and a whole file beside their parts, killed on the way."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pairmill.export import Options, export, remove_pairs, verify_export
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


@pytest.mark.parametrize(("first", "stride"), [(True, 10), (False, 7)])
def test_an_export_goes_on(built, tmp_path, first, stride):
    start, whole, target = tmp_path / "start", tmp_path / "whole", 1 if first else 2
    start.mkdir()
    if not first:
        write(built, 1, start)
    shutil.copytree(start, whole)
    write(built, target, whole)
    ends = killed_everywhere(tmp_path, start, job(built, what="export", snapshot=target, stride=stride))
    assert len(ends) > 4
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


@pytest.mark.parametrize("step", [4, 8, 12])
def test_an_export_killed_while_it_wrote_images_is_taken_down(built, tmp_path, step, monkeypatch):
    out = tmp_path / "out"
    write(built, 1, out)
    count, plain = 0, os.replace

    def dying(*arguments):
        nonlocal count
        count += 1
        if count == step:
            raise KeyboardInterrupt
        return plain(*arguments)

    (out / "manifest.json").rename(out / ".previous.json")
    for path in out.glob("*_stats.json"):
        path.unlink()  # so that all groups are written again
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            write(built, 1, out)
    for pair in BEFORE:  # whoever's image it is that was written last
        assert remove_pairs(str(out), [pair.uid]).complete
        for path in (p for p in out.rglob("*") if p.is_file()):
            assert pair.image not in path.read_bytes() and pair.uid.encode() not in path.read_bytes()
    assert not (out / "images").exists()
    write(built, 1, out)
    assert_true(out)
