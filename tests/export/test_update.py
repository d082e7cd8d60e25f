"""Bringing an export to another snapshot: what did not change stays, the rest is as if written from scratch."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairmill.errors import ConfigError, DatasetLocked
from pairmill.export import export_webdataset
from pairmill.export.folder import Folder
from pairmill.export.selection import Group, Selection, group_shards, steady
from pairmill.store import DataFile
from schemas import fields
from tests.export.dataset import IMAGES_TABLE, Built, Pair, build
from tests.export.folders import (
    WRITE,
    assert_true,
    changed,
    data,
    forget,
    from_scratch,
    killed_everywhere,
    manifest,
    stamps,
)

FORMATS = pytest.mark.parametrize("kind", ["webdataset", "parquet"])
BEFORE = [Pair(n, n // 5, f"picture {n}", boxes=(("thing", 2, 4, 20, 30),) * (n % 2)) for n in range(23)]
AFTER = [changed(p, reason="text.language") if p.number == 12 else p for p in BEFORE] + [
    Pair(n, n // 5 + 1, f"picture {n}") for n in range(23, 36)
]
"""Snapshot 2: a pair of the second file dropped, shards 5, 6, 7 and 8 new."""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    url = str(tmp_path_factory.mktemp("dataset") / "data")
    build(url, BEFORE)
    return build(url, AFTER)


def export(built: Built, snapshot: int | None, out: Path, kind: str = "webdataset", pairs_per_shard: int = 10):
    return WRITE[kind](built.dataset.snapshot(snapshot), str(out), pairs_per_shard=pairs_per_shard)


def ending(kind: str) -> str:
    return {"webdataset": "tar", "parquet": "parquet"}[kind]


@FORMATS
def test_only_what_changed_is_written(built, tmp_path, kind):
    out, end = tmp_path / "out", ending(kind)
    export(built, 1, out, kind)
    before = stamps(out)
    report = export(built, 2, out, kind)
    after = stamps(out)
    untouched = {name for name, stamp in before.items() if after.get(name) == stamp}
    assert {name for name in before if name.startswith(("00000", "00002"))} <= untouched
    assert not any(name.startswith("00001") for name in untouched)
    assert (report.written, report.unchanged) == (3, 2)
    known = manifest(out)
    assert (known["snapshot"], known["previous"]) == (2, 1)
    assert known["new"] == list(report.new) == [f"00003.{end}", f"00004.{end}"]
    assert known["changed"] == list(report.changed) == [f"00001.{end}"]
    assert (known["removed"], known["unchanged"]) == ([], 2)
    assert [file["since"] for file in known["files"]] == [1, 2, 1, 2, 2]
    # The third file keeps its one small shard: what is new goes behind it.
    assert [file["shards"] for file in known["files"]] == [[0, 1], [2, 3], [4, 4], [5, 6], [7, 8]]
    assert_true(out)


@FORMATS
def test_an_update_is_what_is_written_from_scratch_with_the_same_boundaries(built, tmp_path, kind):
    export(built, 1, tmp_path / "out", kind)
    export(built, 2, tmp_path / "out", kind)
    assert data(from_scratch(built.dataset.snapshot(2), tmp_path / "out", tmp_path / "new")) == data(tmp_path / "out")


@FORMATS
def test_back_to_an_older_snapshot(built, tmp_path, kind):
    out, end = tmp_path / "out", ending(kind)
    export(built, 1, out, kind)
    first = data(out)
    export(built, 2, out, kind)
    before = stamps(out)
    report = export(built, 1, out, kind)
    assert data(out) == first
    assert (report.removed, report.changed, report.new) == ((f"00003.{end}", f"00004.{end}"), (f"00001.{end}",), ())
    assert all(stamps(out)[f"0000{n}.{end}"] == before[f"0000{n}.{end}"] for n in (0, 2))
    assert [file["since"] for file in manifest(out)["files"]] == [1, 1, 1]
    assert manifest(out)["previous"] == 2
    assert_true(out)


def test_a_snapshot_without_news_writes_no_file(built, tmp_path):
    out = tmp_path / "out"
    built = build(str(tmp_path / "data"), BEFORE)
    export(built, 1, out)
    before = {name: stamp for name, stamp in stamps(out).items() if name != "manifest.json"}
    build(str(tmp_path / "data"), BEFORE)
    report = export(built, 2, out)
    assert (report.written, report.unchanged, report.snapshot) == (0, 3, 2)
    assert {name: stamp for name, stamp in stamps(out).items() if name != "manifest.json"} == before
    assert (manifest(out)["snapshot"], manifest(out)["previous"], manifest(out)["new"]) == (2, 1, [])


def test_what_changes_beside_a_pair_changes_no_file(tmp_path):
    """A duplicate of it that comes, and another look at its image."""
    out = tmp_path / "out"
    built = build(str(tmp_path / "data"), BEFORE)
    export(built, 1, out)
    before = data(out)
    rewrite(built, "ledger", {"cluster": "f" * 64})
    rewrite(
        built, IMAGES_TABLE, {"etag": '"2"', "http_status": 304, "last_modified": "today", "final_url": "http://x/"}
    )
    report = export(built, None, out)
    assert report.snapshot == 3 and report.written == 0 and data(out) == before
    names = pq.read_schema(out / "00000.parquet").names
    assert not {"cluster", "etag", "http_status", "last_modified", "final_url"} & set(names)


@pytest.mark.parametrize(
    ("table", "what"),
    [
        (IMAGES_TABLE, {"sha256": "e" * 64}),
        (IMAGES_TABLE, {"width": 31}),
        ("clip-00000002", {"clip_score": 0.31}),
    ],
)
def test_what_changes_of_a_pair_changes_its_file(tmp_path, table, what):
    out = tmp_path / "out"
    built = build(str(tmp_path / "data"), BEFORE)
    export(built, 1, out)
    rewrite(built, table, what)
    report = export(built, None, out)
    assert report.written == 3 and report.changed == ("00000.tar", "00001.tar", "00002.tar")


def test_another_way_to_store_images_changes_their_files(built, tmp_path):
    snapshot = built.dataset.snapshot(1)
    with Selection(snapshot, None, 10) as selection:
        metadata = steady(selection.metadata(selection.groups[0]))
        before = selection.content(metadata)
        selection._images = "download-00000009"
        assert selection.content(metadata) != before


def rewrite(built: Built, name: str, values: dict) -> None:
    """Put other values into columns of a table, in all rows, and publish that."""
    record = built.snapshot.record
    schema = pq.read_schema(built.snapshot.files(name)[0].path)
    table = built.dataset.table(name, schema)
    new = []
    for file in built.snapshot.files(name):
        rows = pq.read_table(file.path, schema=schema)
        for column, value in values.items():
            place = rows.schema.get_field_index(column)
            rows = rows.set_column(
                place, rows.schema.field(place), pa.array([value] * len(rows), rows.schema.types[place])
            )
        with table.writer(file.shard, f"other{record.id}") as writer:
            writer.write(rows)
            new.append(writer.close())
    version = table.commit(new, replace=[file.shard for file in new])
    built.dataset.publish(replace(record, id=record.id + 1, tables={**record.tables, name: version}))


def test_boundaries_stay_when_pairs_are_gone(tmp_path):
    """Shards that became smaller would fit into fewer files; those that are there stay as they are all the same."""
    out = tmp_path / "out"
    built = build(str(tmp_path / "data"), BEFORE)
    export(built, 1, out)
    before = stamps(out)
    gone = {p.uid for p in BEFORE if p.shard in (2, 3) and p.number != 19}
    report = export(built, forget(built, gone).record.id, out)
    assert (report.changed, report.unchanged, report.samples) == (("00001.tar",), 2, 14)
    assert stamps(out)["00002.tar"] == before["00002.tar"]
    compact = WRITE["webdataset"](built.snapshot, str(tmp_path / "compact"), pairs_per_shard=10)
    assert len(compact.files) == 2
    assert data(from_scratch(built.snapshot, out, tmp_path / "new")) == data(out)
    # The last file goes when nothing is left of its shards, one in the middle becomes empty.
    gone = {p.uid for p in BEFORE if p.shard in (0, 1, 4)}
    report = export(built, forget(built, gone).record.id, out)
    assert (report.files, report.removed, report.samples) == (("00000.tar", "00001.tar"), ("00002.tar",), 1)
    assert_true(out)


SHARDS = st.dictionaries(st.integers(0, 40), st.integers(1, 30), max_size=20)


@given(st.lists(SHARDS, min_size=1, max_size=4), st.integers(1, 60))
def test_boundaries_hold_over_any_history(history, most):
    pinned: list[Group] = []
    for admitted in history:
        groups = group_shards([DataFile("", "", n, rows, 0) for n, rows in admitted.items()], most, pinned)
        assert [group.number for group in groups] == list(range(len(groups)))
        owners = {n: [g.number for g in groups if g.first <= n <= g.last] for n in admitted}
        assert all(len(owner) == 1 for owner in owners.values())  # each shard in one file
        used = [old.number for old in pinned if any(old.first <= n <= old.last for n in admitted)]
        staying = pinned[: max(used, default=-1) + 1]
        for old, new in zip(staying, groups, strict=False):
            assert (old.first, old.last, old.digits) == (new.first, new.last, new.digits)
        assert sum(group.admitted for group in groups) == sum(admitted.values())
        assert all(g.admitted <= most or g.first == g.last for g in groups[len(staying) :])
        pinned = groups


def test_digits_of_keys_stay():
    files = [DataFile("", "", n, 10, 0) for n in range(3)]
    small = group_shards(files, 10)
    assert {group.digits for group in small} == {4}
    big = group_shards([*files, DataFile("", "", 3, 20_000, 0)], 10, small)
    assert [group.digits for group in big] == [4, 4, 4, 5]
    assert [g.digits for g in group_shards([*files, DataFile("", "", 3, 20_000, 0)], 10)] == [5, 5, 5, 5]


VALUES = st.one_of(
    st.lists(st.none() | st.text(max_size=3)).map(lambda v: pa.array(v, pa.string())),
    st.lists(st.none() | st.integers(-9, 9)).map(lambda v: pa.array(v, pa.int32())),
    st.lists(st.none() | st.booleans()).map(lambda v: pa.array(v, pa.bool_())),
    st.lists(st.none() | st.lists(st.none() | st.text(max_size=2), max_size=2)).map(
        lambda v: pa.array(v, pa.list_(pa.string()))
    ),
    st.lists(st.none() | st.lists(st.fixed_dictionaries({"label": st.none() | st.text(max_size=2)}), max_size=2)).map(
        lambda v: pa.array([None if x is None else [{**b, "x1": 1.0} for b in x] for x in v], fields.BOXES.type)
    ),
    st.lists(st.none() | st.binary(max_size=2)).map(lambda v: pa.array(v, pa.binary())),
)


@given(VALUES, VALUES, st.integers(0, 5))
def test_the_digest_is_one_of_values_and_of_nothing_else(one, other, cut):
    def digest(column: pa.ChunkedArray) -> str:
        selection = Selection.__new__(Selection)
        selection._images = "images-1"
        return selection.content(pa.table({"x": column}))

    whole = digest(pa.chunked_array([one]))
    padded = pa.concat_arrays([one[:1], one]).slice(len(one[:1]))  # the same values behind an offset
    assert digest(pa.chunked_array([padded.slice(0, cut), padded.slice(cut)])) == whole
    if len(one):
        assert digest(pa.chunked_array([one.take(pa.array(range(len(one))))])) == whole
    if (one.type, one.to_pylist()) != (other.type, other.to_pylist()):
        assert digest(pa.chunked_array([other])) != whole


# -- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "first"), [("webdataset", True), ("webdataset", False), ("parquet", False)])
def test_killed_at_any_step_the_same_command_goes_on(built, tmp_path, kind, first):
    start, whole, target = tmp_path / "start", tmp_path / "whole", 1 if first else 2
    start.mkdir()
    if not first:
        export(built, 1, start, kind, 20)
    before = data(start)
    shutil.copytree(start, whole)
    report = export(built, target, whole, kind, 20)
    assert (report.written, report.unchanged) == (2, 0 if first else 1)
    job = {"what": "export", "format": kind, "dataset": built.dataset.url, "snapshot": target, "pairs_per_shard": 20}
    ends = killed_everywhere(tmp_path, start, job)
    assert len(ends) > 12
    for end in ends:
        assert end["again"] == 0
        assert data(end["out"]) == data(whole) and manifest(end["out"]) == manifest(whole)
        assert_true(end["out"])
    # A manifest is there before the first change and after the last one, and never in between.
    there = ["manifest.json" in end["between"] for end in ends]
    begun = there.index(False)
    assert begun <= 1 and there[begun:] == sorted(there[begun:])
    assert bool(before) is there[0]


@pytest.mark.parametrize("step", [3, 9, 17, 21])
def test_killed_on_the_way_to_one_snapshot_it_goes_to_another(built, tmp_path, step):
    start = tmp_path / "start"
    export(built, 1, start)
    first = data(start)
    job = {"what": "export", "format": "webdataset", "dataset": built.dataset.url, "snapshot": 2, "pairs_per_shard": 10}
    out = tmp_path / "out"
    shutil.copytree(start, out)
    killed_only(out, step, job)
    assert not (out / "manifest.json").exists()
    export(built, 1, out)
    assert data(out) == first
    assert_true(out)


def killed_only(out: Path, step: int, job: dict) -> None:
    code = (
        "import json, sys; from tests.export import killed; job = json.loads(sys.argv[1]); "
        "killed.kill_at(int(sys.argv[3]), sys.argv[2]); killed.work(job, sys.argv[2])"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(job), str(out), str(step)], check=False)
    assert done.returncode == -9


def test_a_file_written_for_another_snapshot_is_not_taken_for_the_old_one_of_the_same_size(tmp_path, monkeypatch):
    out = tmp_path / "out"
    built = build(str(tmp_path / "data"), BEFORE)
    export(built, 1, out)
    first = data(out)
    rewrite(built, "clip-00000002", {"clip_score": 0.4})
    plain = Folder.create

    def failing(self, name):
        if name == "00000.parquet":
            raise KeyboardInterrupt
        return plain(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "create", failing)
        with pytest.raises(KeyboardInterrupt):
            export(built, 2, out)
    torn = (out / "00000.tar").read_bytes()
    assert torn != first["00000.tar"] and len(torn) == len(first["00000.tar"])
    export(built, 1, out)
    assert data(out) == first
    assert_true(out)


def test_a_lost_or_short_file_is_written_again(built, tmp_path):
    out = tmp_path / "out"
    export(built, 1, out)
    before, known = data(out), manifest(out)
    (out / "00001.tar").unlink()
    (out / "00002.parquet").write_bytes(b"short")
    (out / "00000_stats.json").unlink()
    report = export(built, 1, out)
    assert report.written == 3
    assert data(out) == before and manifest(out) == known


def test_two_at_once(built, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(DatasetLocked, match="another process"):
            export(built, 1, out)
    finally:
        os.close(handle)
    export(built, 1, out)


def test_an_export_of_another_layout_or_with_a_damaged_manifest_is_left_alone(built, tmp_path):
    out = tmp_path / "out"
    export(built, 1, out)
    known = manifest(out)
    damaged = {**known, "pairs": 24}
    (out / "manifest.json").write_text(json.dumps(damaged))
    with pytest.raises(ConfigError, match=r"manifest\.json is damaged"):
        export(built, 2, out)
    (out / "manifest.json").write_text(json.dumps({**known, "export": {**known["export"], "layout": 2}}))
    with pytest.raises(ConfigError, match="layout 2 instead of 3"):
        export(built, 2, out)


def test_an_update_on_any_file_system(built, tmp_path):
    memory = fsspec.filesystem("memory")
    url = "memory://exports/update"
    export_webdataset(built.dataset.snapshot(1), url, pairs_per_shard=10)
    export_webdataset(built.dataset.snapshot(2), url, pairs_per_shard=10)
    export(built, 1, tmp_path / "out")
    export(built, 2, tmp_path / "out")
    found = {path.rpartition("/")[2]: memory.cat_file(path) for path in memory.ls("/exports/update", detail=False)}
    assert found == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
