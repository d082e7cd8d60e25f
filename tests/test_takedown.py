"""Takedown: what is asked for is gone from every byte of dataset and exports, and stays out."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairmill.admission import pair_uid
from pairmill.errors import ConfigError, DatasetLocked, StoreError
from pairmill.export import export_parquet, export_webdataset
from pairmill.export.folder import Folder
from pairmill.plan import Recipe
from pairmill.procedural.web import Kind, ProceduralWeb
from pairmill.query import query
from pairmill.report.funnel import check_funnel
from pairmill.report.progress import Silent
from pairmill.run import load_config, parse_config, refresh
from pairmill.sources import download_stage
from pairmill.store import Dataset, column_digests, read_files
from pairmill.takedown import (
    TAKEDOWNS,
    TAKEDOWNS_TABLE,
    Absence,
    Selectors,
    TakedownReport,
    check_absence,
    forget,
    preview,
    read_list,
    record,
    resume,
)
from pairmill.takedown.removal import _append_tombstones
from pairmill.tombstones import TOMBSTONES_TABLE, Tombstones, address_of, domains_of, hashed
from schemas import fields
from schemas.config import RunConfig
from schemas.snapshot import SnapshotRecord
from tests.export.dataset import CLIP_TABLE, IMAGES_TABLE, Built, Pair, build
from tests.needles import find_needles
from tests.steps import config, texts, write_urls
from tests.test_cli import Command, command  # noqa: F401 (a fixture)

COUNT = 300
URLS = [f"http://host{i % 7}.example/{i}.jpg" for i in range(COUNT)]
TEXTS = texts(COUNT)
TEXTS[109] = TEXTS[209] = TEXTS[9]
UIDS = [pair_uid(url, text) for url, text in zip(URLS, TEXTS, strict=True)]
SENIOR = min((9, 109, 209), key=lambda i: UIDS[i])
"""The pair that two others duplicate."""


@pytest.fixture(scope="module")
def two_snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of texts with two snapshots under different thresholds, and what a killed run leaves behind."""
    root = tmp_path_factory.mktemp("texts")
    table = write_urls(root / "urls.parquet", TEXTS)
    refresh(config(root, table), Silent())
    refresh(config(root, table, options={"words": 5, "scale": 2}), Silent())
    return root


@pytest.fixture
def root(two_snapshots: Path, tmp_path: Path) -> Path:
    """A copy of it to work on."""
    shutil.copytree(two_snapshots, tmp_path / "work")
    return tmp_path / "work"


def dataset(root: Path) -> Dataset:
    return Dataset(str(root / "dataset"))


def run_config(root: Path) -> RunConfig:
    return config(root, root / "urls.parquet", options={"words": 5, "scale": 2})


def needles(*numbers: int) -> list[str]:
    return [value for i in numbers for value in (URLS[i], UIDS[i])]


def left_of(root: Path, wanted: list[str]) -> list[str]:
    """Where needles are; uids and hashes of images are in the tombstones on purpose."""
    found = find_needles([root / "dataset"], wanted)
    return [line for line in found if f"/{TOMBSTONES_TABLE}/" not in line or "http" in line]


def uids_of(root: Path, snapshot: int | None = None) -> set[str]:
    return set(query(dataset(root).snapshot(snapshot), "SELECT uid FROM pairs").column("uid").to_pylist())


def ledger_digests(root: Path) -> dict[str, str]:
    snapshot = dataset(root).snapshot()
    rows = read_files(snapshot.dataset, snapshot.files("ledger"), fields.LEDGER, [*fields.LEDGER.names, "shard"])
    return column_digests(rows)


# -- what goes --------------------------------------------------------------------------------------------------------


def test_an_url_goes_from_every_file_and_old_snapshots_read_on(root: Path):
    assert left_of(root, needles(42)), "the search finds what is there"
    before = dataset(root).snapshot().record
    report = forget(dataset(root), Selectors.of(urls=[URLS[42]]), Silent())
    assert report.done and report.pairs == 1 and report.by == {"url": 1}
    assert left_of(root, needles(42)) == []
    record = dataset(root).snapshot().record
    assert (record.id, record.kind, report.snapshot) == (3, "forget", 3)
    assert record.admitted == before.admitted - 1
    check_funnel(record)
    for snapshot in (1, 2, 3):
        assert uids_of(root, snapshot) == set(UIDS) - {UIDS[42]}
        query(dataset(root).snapshot(snapshot), "SELECT count(words), count(chars), max(clip_score) FROM pairs")


def test_a_domain_is_a_host_and_all_below_it_in_every_spelling(tmp_path: Path):
    gone = [
        "http://bad.example/a.jpg", "HTTPS://Sub.BAD.example/b.jpg", "http://bad.example./c.jpg",
        "http://user@bad.example:8080/d.jpg", "  http://a.b.bad.example/e.jpg",
        "http://Bücher.example/f.jpg", "http://xn--bcher-kva.example/g.jpg", "http://www.b%C3%BCcher.example/h.jpg",
    ]  # fmt: skip
    stay = ["http://notbad.example/a.jpg", "http://bad.example.org/a.jpg", "http://example/bad.example/a.jpg",
            "http://x.example/?u=http://bad.example/"]  # fmt: skip
    path = tmp_path / "urls.parquet"
    pq.write_table(
        pa.table({"url": gone + stay, "text": [f"one two three {i}" for i in range(len(gone + stay))]}), path
    )
    refresh(config(tmp_path, path), Silent())
    report = forget(dataset(tmp_path), Selectors.of(domains=["BAD.example.", "BÜCHER.example"]), Silent())
    assert report.by == {"domain": len(gone)}
    assert sorted(query(dataset(tmp_path).snapshot(), "SELECT url FROM pairs").column("url").to_pylist()) == sorted(
        stay
    )
    assert left_of(tmp_path, gone) == []


def test_an_url_goes_in_every_spelling_that_leads_to_the_same_address(tmp_path: Path):
    same = ["http://h.example/ä b.jpg", "HTTP://H.example:80/%C3%A4%20b.jpg#top", "http://h.example./ä b.jpg"]
    other = ["https://h.example/ä b.jpg", "http://h.example/A.jpg", "http://h.example/ä b.jpg?x"]
    path = tmp_path / "urls.parquet"
    pq.write_table(pa.table({"url": same + other, "text": [f"one two three {i}" for i in range(6)]}), path)
    refresh(config(tmp_path, path), Silent())
    assert forget(dataset(tmp_path), Selectors.of(urls=[same[1]]), Silent()).pairs == 3
    assert sorted(query(dataset(tmp_path).snapshot(), "SELECT url FROM pairs").column("url").to_pylist()) == sorted(
        other
    )


def test_all_selectors_together_and_counts_by_what_named_a_pair_first(root: Path):
    hosts = [i for i, url in enumerate(URLS) if "host3." in url]
    selectors = Selectors.of(
        urls=[URLS[3], URLS[5], "http://nowhere.example/"], domains=["host3.example"], uids=[UIDS[8]]
    )
    report = forget(dataset(root), selectors, Silent())
    gone = {*hosts, 5, 8}
    assert report.pairs == len(gone) and report.by == {"url": 2, "domain": len(hosts) - 1, "uid": 1}
    assert left_of(root, needles(*gone)) == []
    assert uids_of(root) == set(UIDS) - {UIDS[i] for i in gone}
    check_funnel(dataset(root).snapshot().record)


def test_leftovers_of_killed_runs_go_too(root: Path):
    """Files of no version that hold such a row, half-written ones, and orphans that nobody can read; others stay."""
    shard = root / "dataset" / "pairs" / "shard=0"
    committed = next(shard.glob("*.parquet"))
    orphan, half, torn = shard / f"orphan-{'0' * 32}.parquet", shard / "x.99.tmp", shard / f"torn-{'0' * 32}.parquet"
    far = root / "dataset" / "pairs" / "shard=77" / f"orphan-{'1' * 32}.parquet"
    other = root / "dataset" / "pairs" / "shard=2" / f"orphan-{'2' * 32}.parquet"
    far.parent.mkdir()
    shutil.copy(committed, orphan)
    shutil.copy(committed, far)
    shutil.copy(next(other.parent.glob("*.parquet")), other)
    half.write_bytes(committed.read_bytes()[:1000])
    torn.write_bytes(committed.read_bytes()[:1000])
    report = forget(dataset(root), Selectors.of(uids=[UIDS[42]]), Silent())
    assert report.leftovers == 2
    assert not any(path.exists() for path in (orphan, half, torn, far, far.parent)) and other.exists()
    assert left_of(root, needles(42)) == []


def test_a_damaged_file_that_is_needed_stops_it_and_nothing_is_lost(root: Path):
    path = next((root / "dataset" / "ledger" / "shard=1").glob("*.parquet"))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(StoreError, match="verify"):
        forget(dataset(root), Selectors.of(uids=[UIDS[42]]), Silent())
    path.write_bytes(data)
    report = resume(dataset(root), Silent())
    assert report is not None and report.done and left_of(root, needles(42)) == []


def test_names_of_a_pair_in_the_rows_of_others_go(tmp_path: Path):
    built = build(str(tmp_path / "dataset"), [Pair(i, shard=i // 3) for i in range(6)])
    one, two, *others = [p.uid for p in built.pairs]
    schema = pa.schema([fields.UID, fields.REASON, fields.DETAIL, fields.NEIGHBOURS])
    lists = [
        [{"uid": two, "similarity": 0.9}, {"uid": one, "similarity": 0.8}],
        None,
        [],
        [{"uid": one, "similarity": 0.7}],
    ]
    rows = [{"uid": uid, "neighbours": found} for uid, found in zip(others, lists, strict=True)]
    table = built.dataset.table("neighbours-00000009", schema)
    with table.writer(1, "x") as writer:
        writer.write(pa.Table.from_pylist(rows, schema=schema))
        version = table.commit([writer.close()])
    ledger = built.dataset.table("ledger", fields.LEDGER)
    for shard in (0, 1):
        mine = read_files(
            built.dataset, [f for f in ledger.files() if f.shard == shard], fields.LEDGER, fields.LEDGER.names
        )
        told = [{**row, "duplicate_of": one, "cluster": one} if row["uid"] != one else row for row in mine.to_pylist()]
        with ledger.writer(shard, "y") as writer:
            writer.write(pa.Table.from_pylist(told, schema=fields.LEDGER))
            ledger.commit([writer.close()], replace=[shard])
    tables = {**built.tables, "ledger": ledger.version(), table.name: version}
    columns = {**built.snapshot.columns, "neighbours": table.name}
    row = {**built.snapshot.record.to_row(), "id": 2, "tables": json.dumps(tables), "columns": json.dumps(columns)}
    built.dataset.publish(SnapshotRecord.from_row(row))

    report = forget(built.dataset, Selectors.of(uids=[one]), Silent())
    assert report.tables["neighbours-00000009"].names == 2 and report.tables["ledger"].names >= 5
    assert left_of(tmp_path, [one]) == []
    left = read_files(built.dataset, table.files(), schema, ["uid", "neighbours"]).to_pylist()
    assert [row["neighbours"] and [n["uid"] for n in row["neighbours"]] for row in left] == [[two], None, [], []]
    told = query(built.snapshot, "SELECT DISTINCT duplicate_of, cluster FROM pairs").to_pylist()
    assert told == [{"duplicate_of": None, "cluster": None}]


# -- images, near duplicates, exports ---------------------------------------------------------------------------------


def with_images(tmp_path: Path) -> Built:
    """40 pairs in 4 shards with images; pair 11 has the image of pair 10."""
    pairs = [Pair(i, shard=i // 10, reason="clip.below_threshold" if i % 5 == 4 else None) for i in range(40)]
    return build(str(tmp_path / "dataset"), pairs)


def sha(pair: Pair) -> str:
    return hashlib.sha256(pair.image or b"").hexdigest()


def test_an_image_goes_by_its_hash_with_its_bytes_and_embedding_from_dataset_and_exports(tmp_path: Path):
    built = with_images(tmp_path)
    pair = built.pairs[12]
    for name, write in (("tars", export_webdataset), ("table", export_parquet)):
        write(built.snapshot, str(tmp_path / name), pairs_per_shard=20)
    assert pair.image is not None
    wanted = [pair.url, pair.uid, pair.image]
    assert len(find_needles([tmp_path], wanted)) > 6
    report = forget(built.dataset, Selectors.of(sha256=[sha(pair)]), Silent())
    assert (report.pairs, report.images, report.by) == (1, 1, {"sha256": 1})
    assert report.tables[IMAGES_TABLE].rows == report.tables[CLIP_TABLE].rows == 1
    assert [line for line in find_needles([tmp_path], wanted) if f"/{TOMBSTONES_TABLE}/" not in line] == []
    assert [(e.held, e.removed, e.rewritten, e.has_left) for e in report.exports] == [(1, 1, 1, False)] * 2
    images = query(built.snapshot, "SELECT uid, image FROM images").to_pylist()
    assert {row["uid"]: row["image"] for row in images} == {p.uid: p.image for p in built.pairs if p != pair}


def test_exports_that_have_left_are_listed_with_how_many_pairs_they_held(tmp_path: Path):
    built = with_images(tmp_path)
    export_webdataset(built.snapshot, str(tmp_path / "all"))
    export_webdataset(built.snapshot, str(tmp_path / "some"), where="url LIKE '%/1_.jpg'")
    export_webdataset(built.snapshot, str(tmp_path / "here"))
    shutil.rmtree(tmp_path / "all")
    (tmp_path / "some").rename(tmp_path / "moved")
    report = forget(built.dataset, Selectors.of(uids=[built.pairs[i].uid for i in (2, 12, 13, 14)]), Silent())
    told = {Path(e.out).name: (e.reach, e.held, e.removed, e.has_left) for e in report.exports}
    assert told == {"all": ("gone", 3, 0, True), "some": ("gone", 2, 0, True), "here": ("export", 3, 3, False)}
    row = max(built.dataset.records(TAKEDOWNS_TABLE, TAKEDOWNS).rows(), key=lambda r: (r["state"] == "done", r["at"]))
    assert row["state"] == "done" and TakedownReport.from_json(row["report"]) == report
    assert "http:" not in row["report"] and built.pairs[2].uid not in row["report"]


def near_dataset(tmp_path: Path) -> Built:
    """Pairs whose embeddings are known: 1 is near to 0 (cosine 0.96), 2 is not (0.9), 3 is near to 1 alone; and 35 has
    the image of 1, whatever its embedding says."""
    built = build(str(tmp_path / "dataset"), [Pair(i, shard=i // 10) for i in range(40)], clip=False)
    angles = {0: 0.0, 1: np.arccos(0.96), 2: -np.arccos(0.9), 3: 2 * np.arccos(0.96)}
    schema = pa.schema([fields.UID, fields.REASON, fields.DETAIL, fields.CLIP_IMAGE])
    clip = built.dataset.table(CLIP_TABLE, schema)
    for shard in range(4):
        with clip.writer(shard, "known") as writer:
            mine = [pair for pair in built.pairs if pair.shard == shard]
            turned = [angles.get(pair.number, 3.0) for pair in mine]
            rows = [{"uid": p.uid, "clip_image": [np.cos(a), np.sin(a)]} for p, a in zip(mine, turned, strict=True)]
            writer.write(pa.Table.from_pylist(rows, schema=schema))
            clip.commit([writer.close()])
    schema = pa.schema([fields.UID, fields.REASON, fields.DETAIL, *fields.IMAGES])
    images = built.dataset.table(IMAGES_TABLE, schema)
    rows = read_files(built.dataset, [f for f in images.files() if f.shard == 3], schema, schema.names).to_pylist()
    rows[5] |= {"sha256": sha(built.pairs[1])}
    with images.writer(3, "known") as writer:
        writer.write(pa.Table.from_pylist(rows, schema=schema))
        images.commit([writer.close()], replace=[3])
    tables = {**built.tables, CLIP_TABLE: clip.version(), IMAGES_TABLE: images.version()}
    columns = {**built.snapshot.columns, "clip_image": CLIP_TABLE}
    row = {**built.snapshot.record.to_row(), "id": 2, "tables": json.dumps(tables), "columns": json.dumps(columns)}
    built.dataset.publish(SnapshotRecord.from_row(row))
    return built


def test_near_duplicates_go_when_asked_for_and_no_further(tmp_path: Path):
    built = near_dataset(tmp_path)
    selectors = Selectors.of(uids=[built.pairs[0].uid], near=0.95)
    ahead = preview(built.dataset, selectors, Silent())
    report = forget(built.dataset, selectors, Silent())
    assert ahead.by == report.by == {"uid": 1, "near": 2}
    left = set(query(built.snapshot, "SELECT uid FROM pairs").column("uid").to_pylist())
    assert {i for i, p in enumerate(built.pairs) if p.uid not in left} == {0, 1, 35}
    assert {sha(built.pairs[0]), sha(built.pairs[1])} <= Tombstones.load(built.dataset).sha256
    assert sha(built.pairs[2]) not in Tombstones.load(built.dataset).sha256


def test_near_duplicates_do_not_spread_when_it_is_killed_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    built = near_dataset(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("pairmill.takedown.removal._Takedown.copy", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forget(built.dataset, Selectors.of(uids=[built.pairs[0].uid], near=0.95), Silent())
    report = resume(built.dataset, Silent())
    assert report is not None and report.pairs == 3
    left = set(query(built.snapshot, "SELECT uid FROM pairs").column("uid").to_pylist())
    assert {i for i, p in enumerate(built.pairs) if p.uid not in left} == {0, 1, 35}


# -- staying out ------------------------------------------------------------------------------------------------------


def test_what_is_taken_down_does_not_come_back_from_the_source(root: Path):
    forget(dataset(root), Selectors.of(urls=[URLS[42]], domains=["host3.example"]), Silent())
    source = root / "urls.parquet"
    more = pa.table({"url": [URLS[42], "http://new.host3.example/1.jpg", "http://fine.example/1.jpg"],
                     "text": ["an entirely different text of words"] * 3})  # fmt: skip
    pq.write_table(pa.concat_tables([pq.read_table(source), more]), source)
    report = refresh(run_config(root), Silent())
    assert report.admitted_new == 1
    assert left_of(root, [URLS[42], "host3.example"]) == []
    assert check_absence(dataset(root), Selectors(), Silent()).absent


def test_the_next_run_has_nothing_to_do_but_for_duplicates_of_what_went(root: Path):
    kept = "SELECT uid FROM pairs WHERE status = 'kept'"
    copies = {UIDS[i] for i in (9, 109, 209)}
    assert {*query(dataset(root).snapshot(), kept)["uid"].to_pylist()} & copies == {UIDS[SENIOR]}
    forget(dataset(root), Selectors.of(uids=[UIDS[48]]), Silent())
    again = refresh(run_config(root), Silent())
    assert not again.published and again.computed == {}, "the rewritten files are those of a dataset without the pair"
    forget(dataset(root), Selectors.of(uids=[UIDS[SENIOR]]), Silent())
    assert (
        query(dataset(root).snapshot(), "SELECT count(*) AS n FROM pairs WHERE duplicate_of IS NOT NULL")["n"][
            0
        ].as_py()
        == 0
    )
    report = refresh(run_config(root), Silent())
    assert report.published and report.snapshot is not None
    check_funnel(report.snapshot)
    assert len({*query(dataset(root).snapshot(), kept)["uid"].to_pylist()} & copies) == 1


def test_taking_down_a_whole_refresh_does_not_stop_the_next_one(root: Path):
    source = root / "urls.parquet"
    old = pq.read_table(source)
    one = pa.table({"url": ["http://late.example/1.jpg"], "text": ["a late pair of several words"]})
    pq.write_table(pa.concat_tables([old, one]), source)
    refresh(run_config(root), Silent())
    forget(dataset(root), Selectors.of(domains=["late.example"]), Silent())
    two = pa.table({"url": ["http://later.example/2.jpg"], "text": ["a later pair of several words"]})
    pq.write_table(pa.concat_tables([old, two]), source)
    assert refresh(run_config(root), Silent()).admitted_new == 1
    assert pair_uid("http://later.example/2.jpg", "a later pair of several words") in uids_of(root)


# -- killed, and at the same time as others ---------------------------------------------------------------------------

SCRIPT = """
import json, os, signal, sys
from fsspec.implementations.local import LocalFileSystem
from pairmill.report.progress import Silent
from pairmill.store import Dataset, Table
from pairmill.takedown import Selectors, forget, removal

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def at(real, when):
    calls = []
    def wrapped(*arguments, **options):
        calls.append(1)
        if when == "before" or (when == "second" and len(calls) == 2):
            die()
        result = real(*arguments, **options)
        if when == "after":
            die()
        return result
    return wrapped

OWNERS = {"table_commit": Table, "dataset_publish": Dataset, "fs_rm_file": LocalFileSystem}

for folder, point in json.loads(sys.argv[1]):  # forked: importing takes longer than all the rest
    child = os.fork()
    if child == 0:
        step, when = point.split(":")
        owner = OWNERS.get(step, removal._Takedown)
        name = step.partition("_")[2] if step in OWNERS else step
        setattr(owner, name, at(getattr(owner, name), when))
        forget(Dataset(folder), Selectors.of(urls=[sys.argv[2]], domains=["host3.example"]), Silent())
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, status)
"""

KILLS = [
    "write_down:before", "write_down:after", "follow:after", "copy:after", "stand_in:after", "table_commit:second",
    "commit:after", "dataset_publish:before", "dataset_publish:after", "fs_rm_file:second", "delete:after",
    "mend_exports:after", "write_down:second",
]  # fmt: skip


def state(root: Path) -> object:
    """What a dataset says, in every snapshot."""
    found = dataset(root)
    records = [(r.id, r.kind, r.admitted, r.kept, r.reasons, r.funnel) for r in found.snapshots()]
    tables = []
    for number, *_ in records:
        snapshot = found.snapshot(number)
        for name, schema in (("pairs", fields.PAIRS), ("ledger", fields.LEDGER)):
            tables.append(read_files(found, snapshot.files(name), schema, schema.names).sort_by("uid").to_pylist())
        for name in snapshot.record.tables:
            uids = read_files(found, snapshot.files(name), pa.schema([fields.UID]), ["uid"])
            tables.append(sorted(uids.column("uid").to_pylist()))
    return records, tables


def test_sigkill_at_every_step_then_the_same(root: Path, tmp_path: Path):
    calm = tmp_path / "calm"
    shutil.copytree(root, calm)
    selectors = Selectors.of(urls=[URLS[42]], domains=["host3.example"])
    expected_report = forget(dataset(calm), selectors, Silent())
    expected = state(calm)
    gone = [i for i, url in enumerate(URLS) if "host3." in url or i == 42]
    folders = {point: tmp_path / point.replace(":", "-") for point in KILLS}
    for work in folders.values():
        shutil.copytree(root, work)
    points = json.dumps([(str(work / "dataset"), point) for point, work in folders.items()])
    subprocess.run([sys.executable, "-c", SCRIPT, points, URLS[42]], check=True, timeout=200)
    for point, work in folders.items():
        report = resume(dataset(work), Silent())
        if report is None:
            pytest.fail(f"{point}: nothing was left to do")
        assert report.done and (report.pairs, report.by, report.snapshot) == (
            expected_report.pairs, expected_report.by, 3), point  # fmt: skip
        assert state(work) == expected, point
        assert left_of(work, needles(*gone)) == [], point
        assert resume(dataset(work), Silent()) is None


def test_a_run_goes_on_with_what_was_recorded_only(root: Path):
    record(dataset(root), Selectors.of(urls=[URLS[42]]))
    assert Tombstones.load(dataset(root)).open_requests
    refresh(run_config(root), Silent())
    assert left_of(root, needles(42)) == [] and not Tombstones.load(dataset(root)).open_requests


RUN = """
import sys, time
from pathlib import Path
from pairmill import run
from pairmill.report.progress import Silent

class Slow(Silent):
    def note(self, message):
        if "rows read" in message:
            Path(sys.argv[2]).touch()
            while not Path(sys.argv[3]).exists():
                time.sleep(0.02)

run.refresh(run.load_config(sys.argv[1]), Slow())
"""


def test_a_duplicate_of_what_is_taken_down_during_a_run_is_measured_in_that_run(tmp_path: Path):
    during_a_run(tmp_path, Selectors.of(uids=[UIDS[SENIOR]]), [SENIOR])


def test_a_takedown_during_a_run_in_another_process(tmp_path: Path):
    gone = [i for i, url in enumerate(URLS) if "host3." in url or i == 42]
    during_a_run(tmp_path, Selectors.of(urls=[URLS[42]], domains=["host3.example"]), gone)


def during_a_run(root: Path, asked: Selectors, gone: list[int]) -> None:
    """A run has admitted the pairs already when they are taken down; it publishes without them, and they never come
    back."""
    import yaml

    write_urls(root / "urls.parquet", TEXTS)
    data = config(root, root / "urls.parquet").model_dump(mode="json", by_alias=True)
    (root / "config.yaml").write_text(yaml.safe_dump(data))
    admitted, go = root / "admitted", root / "go"
    arguments = [sys.executable, "-c", RUN, str(root / "config.yaml"), str(admitted), str(go)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE)
    while not admitted.exists() and process.poll() is None:
        time.sleep(0.02)
    with pytest.raises(DatasetLocked, match="is recorded"):
        forget(dataset(root), asked, Silent(), wait_s=0)
    go.touch()
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error.decode()
    assert left_of(root, needles(*gone)) == []
    assert uids_of(root) == set(UIDS) - {UIDS[i] for i in gone}
    refresh(load_config(str(root / "config.yaml")), Silent())
    assert uids_of(root) == set(UIDS) - {UIDS[i] for i in gone}
    assert check_absence(dataset(root), Selectors(), Silent()).absent


def test_two_takedowns_at_once(root: Path):
    script = (
        "import sys; from pairmill.takedown import *; from pairmill.store import Dataset\n"
        "from pairmill.report.progress import Silent\n"
        "print(forget(Dataset(sys.argv[1]), Selectors.of(urls=[sys.argv[2]]), Silent()).done)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(root / "dataset"), URLS[i]], stdout=subprocess.PIPE)
        for i in (40, 41, 42)
    ]
    for process in running:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and out == b"True\n"
    assert left_of(root, needles(40, 41, 42)) == []
    assert uids_of(root) == set(UIDS) - {UIDS[i] for i in (40, 41, 42)}
    assert not Tombstones.load(dataset(root)).open_requests


def test_appending_tombstones_from_many_threads_loses_none(root: Path):
    opened = dataset(root)
    _append_tombstones(opened, Selectors.of(uids=["f" * 64]).tombstones("first"))
    errors: list[BaseException] = []

    def ask(number: int) -> None:
        try:
            for i in range(20):
                rows = Selectors.of(uids=[hashlib.sha256(f"{number} {i}".encode()).hexdigest()]).tombstones(
                    f"{number}-{i}"
                )
                _append_tombstones(dataset(root), rows)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(Tombstones.load(opened).uids) == 81


def test_old_files_wait_for_an_export_that_reads_them(root: Path):
    opened = dataset(root)
    with opened.reading():
        report = forget(dataset(root), Selectors.of(urls=[URLS[42]]), Silent(), wait_s=0.3)
        assert not report.done and "being read" in report.waits_for[0]
        assert UIDS[42] not in uids_of(root) | uids_of(root, 1), "no snapshot shows it any more"
        assert left_of(root, needles(42))
    again = resume(opened, Silent())
    assert again is not None and again.done and again.pairs == 1 and again.snapshot == report.snapshot
    assert left_of(root, needles(42)) == []


def test_an_export_that_is_being_written_is_cleaned_later(tmp_path: Path):
    built = with_images(tmp_path)
    export_webdataset(built.snapshot, str(tmp_path / "tars"))
    with Folder(str(tmp_path / "tars")).hold():
        report = forget(built.dataset, Selectors.of(uids=[built.pairs[12].uid]), Silent())
    assert not report.done and str(tmp_path / "tars") in report.waits_for[0]
    assert find_needles([tmp_path / "tars"], [built.pairs[12].uid])
    again = resume(built.dataset, Silent())
    assert again is not None and again.done and [e.removed for e in again.exports] == [1]
    assert find_needles([tmp_path / "tars"], [built.pairs[12].uid]) == []


# -- adding up --------------------------------------------------------------------------------------------------------


@settings(max_examples=6)
@given(data=st.data())
def test_counts_add_up_whatever_is_taken_down(
    two_snapshots: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    work = tmp_path_factory.mktemp("law")
    shutil.copytree(two_snapshots / "dataset", work / "dataset")
    numbers = st.lists(st.integers(0, COUNT - 1), max_size=12)
    by_url, by_uid = data.draw(numbers), data.draw(numbers)
    hosts = data.draw(st.lists(st.integers(0, 9), max_size=2))
    selectors = Selectors.of(
        urls=[URLS[i] for i in by_url], uids=[UIDS[i] for i in by_uid], domains=[f"host{n}.example" for n in hosts]
    )
    gone = {*by_url, *by_uid, *(i for i in range(COUNT) if i % 7 in hosts)}
    before = dataset(work).snapshot()
    rows = query(before, "SELECT uid, status, reason FROM pairs").to_pylist()
    if not selectors:
        return
    report = forget(dataset(work), selectors, Silent())
    assert report.pairs == sum(report.by.values()) == len(gone)
    lost = [row for row in rows if row["uid"] in {UIDS[i] for i in gone}]
    assert report.kept == sum(row["status"] == "kept" for row in lost)
    left = [row for row in rows if row["uid"] not in {UIDS[i] for i in gone}]
    after = dataset(work).snapshot().record
    check_funnel(after)
    assert after.admitted == len(left) == before.record.admitted - len(gone)
    assert after.reasons == {k: v for k, v in Counter(row["reason"] for row in left).items() if k}
    assert after.kept == sum(row["status"] == "kept" for row in left)
    assert {s: uids_of(work, s) for s in (1, 2)} == {s: {row["uid"] for row in left} for s in (1, 2)}
    again = forget(dataset(work), selectors, Silent())
    assert (again.pairs, again.tables, again.snapshot) == (0, {}, None), "it is idempotent"


# -- from the web ------------------------------------------------------------------------------------------------------


def recipe(config: RunConfig) -> Recipe:
    """Images, and nothing else."""
    return Recipe("images", (download_stage(config.download),))


def test_an_image_that_was_taken_down_is_refused_under_every_url(tmp_path: Path):
    """It is known by its bytes: another URL that serves them keeps a row with the reason, and no bytes."""
    with ProceduralWeb(60, seed=3, hang_s=0.1, proportions={Kind.COPY_EXACT: 0.2}) as web:
        web.write(tmp_path)
        rows = pq.read_table(tmp_path / "urls.parquet").to_pylist()
        truth = pq.read_table(tmp_path / "truth.parquet").to_pylist()
        copy, original = next(
            (row["url"], row["duplicate_of_url"]) for row in truth if row["duplicate_of_url"] not in (None, row["url"])
        )
        first = tmp_path / "first.parquet"
        pq.write_table(pa.Table.from_pylist([row for row in rows if row["url"] != copy]), first)
        data = {
            "recipe": "tests.test_takedown:recipe", "engine": {"kind": "local"}, "shard_size": 20,
            "dataset": str(tmp_path / "dataset"), "source": {"kind": "url_table", "path": str(first)},
            "download": {"allow_private_addresses": True, "timeout_s": 2, "retries": 0, "per_host": 32},
        }  # fmt: skip
        run = parse_config(data)
        refresh(run, Silent())
        stored = f"SELECT i.sha256, i.image FROM images i JOIN pairs p USING (uid) WHERE p.url = '{original}'"
        image = query(dataset(tmp_path).snapshot(), stored).to_pylist()[0]
        export_webdataset(dataset(tmp_path).snapshot(), str(tmp_path / "tars"))
        report = forget(dataset(tmp_path), Selectors.of(sha256=[image["sha256"]]), Silent())
        assert report.by == {"sha256": report.pairs} and report.pairs >= 1
        assert find_needles([tmp_path / "dataset", tmp_path / "tars"], [original, image["image"]]) == []
        pq.write_table(pa.Table.from_pylist(rows), first)
        again = refresh(run, Silent())
    assert again.admitted_new == sum(row["url"] == copy for row in rows)
    told = query(dataset(tmp_path).snapshot(), f"SELECT DISTINCT reason FROM pairs WHERE url = '{copy}'")
    assert told["reason"].to_pylist() == ["takedown.image"]
    assert find_needles([tmp_path / "dataset", tmp_path / "tars"], [original, image["image"]]) == []
    assert check_absence(dataset(tmp_path), Selectors(), Silent()).absent


def test_the_funnel_and_its_texts_are_those_of_a_dataset_that_never_had_the_pairs(tmp_path: Path):
    """Of pairs that no other pair duplicates; a captioner's texts are counted by source."""
    with_all, without = tmp_path / "with", tmp_path / "without"
    with_all.mkdir()
    without.mkdir()
    said = [f"so {text}" for text in TEXTS]
    path = write_urls(with_all / "urls.parquet", said)
    gone = [i for i in range(5, COUNT, 13) if i not in (9, 109, 209)]
    rows = pq.read_table(path)
    pq.write_table(rows.take([i for i in range(COUNT) if i not in gone]), without / "urls.parquet")
    for root in (with_all, without):
        refresh(config(root, root / "urls.parquet", recipe="tests.mixing_steps:recipe"), Silent())
    forget(dataset(with_all), Selectors.of(uids=[pair_uid(URLS[i], said[i]) for i in gone]), Silent())
    after, expected = dataset(with_all).snapshot().record, dataset(without).snapshot().record
    assert any(entry.get("texts") for entry in expected.funnel)
    assert after.funnel == expected.funnel and after.reasons == expected.reasons
    check_funnel(after)


# -- proof ------------------------------------------------------------------------------------------------------------


def traces(absence: Absence) -> set[tuple[str, str]]:
    return {(trace.file.split("/")[0], trace.what) for trace in absence.traces}


def test_the_check_finds_what_is_left_wherever_it_is(tmp_path: Path):
    built = with_images(tmp_path)
    out = tmp_path / "tars"
    export_webdataset(built.snapshot, str(out))
    pair = built.pairs[12]
    asked = Selectors.of(urls=[pair.url], uids=[pair.uid], sha256=[sha(pair)])
    before = check_absence(built.dataset, asked, Silent())
    assert not before.absent
    assert {("pairs", "url"), ("pairs", "uid"), ("ledger", "uid"), (IMAGES_TABLE, "sha256")} <= traces(before)
    assert {t.where for t in before.traces if "/tars/" in t.file} >= {
        "000000012.json",
        "000000012.jpg",
    } or before.found > 8
    forget(built.dataset, asked, Silent())
    for selectors in (asked, Selectors(), Selectors.of(domains=["nobody.example"])):
        after = check_absence(built.dataset, selectors, Silent())
        assert after.absent and after.found == 0 and after.files > 10 and after.rows > 100 and after.bytes > 10_000
        assert after.exports == (str(out),)
    folder = Path(built.dataset.root)
    plant = {
        folder / "pairs" / "_delta_log" / "note.json": json.dumps({"path": pair.url}).encode(),
        folder / "pairs" / "_delta_log" / "uid.json": json.dumps({"path": pair.uid}).encode(),
        folder / "_work" / f"0-{pair.uid}": b"",
        out / "readme.txt": f"see {pair.url}.".encode(),
    }
    for path, data in plant.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        for selectors in (asked, Selectors()):
            found = check_absence(built.dataset, selectors, Silent())
            assert found.found >= 1 and not found.absent and found.traces[0].file.endswith(path.name), path
        path.unlink()
    orphan = folder / "extra" / "shard=9" / "x.parquet"
    orphan.parent.mkdir(parents=True)
    for columns in (
        {"note": [pair.url]}, {"deep": [[{"uid": "0", "final_url": pair.url}]]}, {"image": [pair.image]},
        {"named": [[pair.uid]]}, {"map": pa.array([[("k", pair.uid)]], pa.map_(pa.string(), pa.string()))},
    ):  # fmt: skip
        pq.write_table(pa.table(columns), orphan)
        assert not check_absence(built.dataset, Selectors(), Silent()).absent, columns
    orphan.write_bytes(b"PAR1 and then nothing")
    assert check_absence(built.dataset, Selectors(), Silent()).unread == ("extra/shard=9/x.parquet",)
    orphan.unlink()
    host = check_absence(built.dataset, Selectors.of(domains=["images.example"]), Silent())
    assert host.found and {what for _, what in traces(host)} == {"domain"}
    shutil.rmtree(out)
    assert check_absence(built.dataset, Selectors(), Silent()).out_of_reach == (str(out),)


# -- lists ------------------------------------------------------------------------------------------------------------


def test_a_list_may_say_what_each_line_is_or_leave_it_to_be_seen():
    text = f"""\ufeff# a comment, and an empty line

https://a.example/x.jpg?b=1,2#top
url,https://b.example/y.jpg
url,"https://c.example/a,b"
Bad.Example.
domain,*.Bücher.example
domain, localhost
{"A" * 64}
uid,{"b" * 64}
sha256,{"c" * 64}\r
https://a.example/x.jpg?b=1,2#top
"""
    found = read_list(text.encode().splitlines(keepends=True), "list")
    assert found.urls == ("https://a.example/x.jpg?b=1,2#top", "https://b.example/y.jpg", "https://c.example/a,b")
    assert found.domains == ("bad.example", "xn--bcher-kva.example", "localhost")
    assert found.uids == ("a" * 64, "b" * 64) and found.sha256 == ("a" * 64, "c" * 64)


@pytest.mark.parametrize(
    "line",
    [
        b"com", b"nonsense here", b"uid,123", b"sha256," + b"g" * 64, b"domain,http://a.example/", b"domain,a.com:8",
        b"domain,", b"url,", b"\xff\xfe", b"http://a.example/\x00", b"x" * 70_000, b"a..b.example", b"-x.example",
        b"domain,a b.example", b"..", b"a.example/path", b"user@a.example", b"uid,", b"domain," + b"a.example" * 40,
    ],
)  # fmt: skip
def test_a_wrong_line_is_named_and_nothing_is_done(line: bytes, root: Path, command: Command):  # noqa: F811
    with pytest.raises(ConfigError, match=r"list\.txt, line 3: .*nothing was done"):
        read_list([b"good.example\n", b"# comment\n", line + b"\n", b"other.example\n"], "list.txt")
    if line == b"com":
        path = root / "list.txt"
        path.write_bytes(b"host3.example\n\ncom\n")
        before = sorted(str(p) for p in (root / "dataset").rglob("*"))
        result = command("forget", str(root / "dataset"), "--file", str(path), "--yes")
        assert result.code == 2 and "line 3: 'com'" in result.err and result.out == ""
        assert sorted(str(p) for p in (root / "dataset").rglob("*")) == before


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_shows_asks_and_reports(root: Path, command: Command, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    folder = str(root / "dataset")
    before = {str(p): p.read_bytes() for p in (root / "dataset").rglob("*") if p.is_file()}
    result = command("forget", folder, "--url", URLS[42], "--domain", "host3.example", "--dry-run", "--json")
    ahead = json.loads(result.out)
    assert result.code == 0 and ahead["pairs"] == 44 and ahead["asked"] == {"url": 1, "domain": 1} and not ahead["done"]
    refused = command("forget", folder, "--url", URLS[42])
    assert refused.code == 2 and "--yes" in refused.err
    assert command("forget", folder).code == command("forget", folder, "--uid", "12", "--yes").code == 2
    assert command("forget", str(root / "nothing"), "--url", "u", "--yes").code == 2
    now = {str(p): p.read_bytes() for p in (root / "dataset").rglob("*") if p.is_file() and p.name != ".readers"}
    assert now == {k: v for k, v in before.items() if not k.endswith(".readers")}
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: True)
    done = command("forget", folder, "--url", URLS[42], "--domain", "host3.example")
    assert done.code == 0 and "took down 44 pairs (domain 43, url 1)" in done.out
    assert "would take down 44 pairs" in done.err
    checked = command("forget", folder, "--check", "--url", URLS[42])
    assert checked.code == 0 and "nothing of it is left" in checked.out
    left = command("forget", folder, "--check", "--url", URLS[43], "--json")
    assert left.code == 1 and json.loads(left.out)["found"] > 0 and URLS[43] not in left.out


def test_a_list_from_stdin(root: Path):
    lines = f"{URLS[42]}\nuid,{UIDS[41]}\n".encode()
    arguments = [sys.executable, "-m", "pairmill", "forget", str(root / "dataset"), "--file", "-", "--yes", "--json"]
    done = subprocess.run(arguments, input=lines, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["by"] == {"uid": 1, "url": 1}
    assert left_of(root, needles(41, 42)) == []


# -- tombstones -------------------------------------------------------------------------------------------------------

ODD = [
    "http://a.example", "http://a.example/", "HTTP://A.EXAMPLE/", "http://a.example:80/", "http://a.example:8080/x",
    "http://a.example/x?", "http://a.example/x?q", "http://a.example/x#f", " http://a.example/x", "http://a.example./x",
    "http://u:p@a.example/x", "https://a.example:443/x", "http://b.a.example/x", "http://[::1]/x", "http://[bad/x",
    "http://ä.example/x", "http://xn--4ca.example/x", "http://a.example/ä", "http://a.example/%C3%A4", "wds:tar/key",
    "file:///a.example/x", "//a.example/x", "", "a.example", "http://", "http:///x", "http://a.example:bad/x",
    "http://a_b.example/x", "http://a.example\\x", "http://a.example/x y", "ftp://a.example/x", "http://..a.example/x",
    "data:image/png;base64,xx", "http://a.example?x", "http://a.example#x", "http://example/a.example", "http://\u3002a/x",
]  # fmt: skip


@settings(max_examples=150)
@given(
    st.lists(st.sampled_from(ODD), max_size=3),
    st.lists(st.sampled_from(["a.example", "example", "xn--4ca.example", "::1"]), max_size=2),
    st.lists(st.one_of(st.sampled_from(ODD), st.text(st.sampled_from("htp:/.@#?%a e-Ä"), max_size=20)), max_size=20),
)
def test_many_urls_at_once_are_barred_as_each_of_them(urls: list[str], domains: list[str], asked: list[str]):
    stones = Tombstones(urls=frozenset(map(hashed, urls)), domains=frozenset(map(hashed, domains)))
    column = pa.chunked_array([pa.array([*asked, None], pa.string())])
    expected = [stones.bars("", url) for url in asked] + [False]
    assert stones.bars_pairs(pa.chunked_array([pa.nulls(len(expected), pa.string())]), [column]).to_pylist() == expected


@given(st.sampled_from(ODD))
def test_an_address_is_its_own_address(url: str):
    plain = address_of(url)
    assert plain is None or address_of(plain) == plain
    assert all(domain == domain.lower() and not domain.endswith(".") for domain in domains_of(url))
