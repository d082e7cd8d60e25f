"""Snapshots over time: diff against a brute-force reference, going back, retention, and kill -9 at every step."""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairmill.errors import ConfigError, DatasetLocked, StoreError
from pairmill.integrity import examine
from pairmill.query import query
from pairmill.recount import recounted
from pairmill.report.funnel import check_funnel
from pairmill.report.progress import Silent
from pairmill.run import refresh
from pairmill.store import LEDGER_TABLE, PAIRS_TABLE, Dataset, open_delta
from pairmill.takedown import Selectors, forget
from pairmill.tombstones import TOMBSTONES, TOMBSTONES_TABLE
from pairmill.versions import By, diff, finish, rollback, table_bytes, vacuum, what_changed
from pairmill.versions.vacuum import EXPIRED, LEFTOVER, ORPHAN, UNUSED, policy_of, retained
from schemas import fields
from schemas.config import Retention
from schemas.snapshot import SnapshotRecord
from tests.history import CAPTIONS, CLIP, IMAGES, OTHER_CLIP, Pair, State, changed, publish, read, take_down
from tests.steps import config, texts, write_urls
from tests.test_cli import Command, command  # noqa: F401 (a fixture)


def tree(root: Path) -> dict[str, bytes]:
    """All files but those that only locks touch."""
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.name not in (".lock", ".readers")
    }


def data_files(dataset: Dataset) -> set[str]:
    root = Path(dataset.root)
    return {str(p.relative_to(root)) for p in root.rglob("*.parquet")}


# -- going back -------------------------------------------------------------------------------------------------------


def grown(tmp_path: Path) -> Dataset:
    """Snapshot 1: 200 pairs; 2: 300 pairs and another threshold."""
    table = write_urls(tmp_path / "urls.parquet", texts(200))
    refresh(config(tmp_path, table), Silent())
    write_urls(table, texts(300))
    refresh(config(tmp_path, table, options={"words": 5}), Silent())
    return Dataset(str(tmp_path / "dataset"))


def test_going_back_publishes_the_old_content_and_the_next_run_goes_on_from_it(tmp_path: Path):
    dataset = grown(tmp_path)
    before = [read(dataset.snapshot(n)) for n in (1, 2)]
    report = rollback(dataset, 1)
    record = report.snapshot
    assert record is not None and dataset.snapshot().record == record
    assert (record.id, record.kind, record.note) == (3, "rollback", "as snapshot 1")
    first = dataset.snapshot(1).record
    for name in ("admitted", "kept", "reasons", "funnel", "columns", "config", "refresh", "models"):
        assert getattr(record, name) == getattr(first, name), name
    assert [read(dataset.snapshot(n)) for n in (1, 2, 3)] == [*before, before[0]]
    assert record.bytes == table_bytes(dataset, record.tables) == table_bytes(dataset, first.tables)
    assert query(dataset.snapshot(), "SELECT count(*) AS n FROM pairs").to_pylist() == [{"n": 200}]
    table = write_urls(tmp_path / "urls.parquet", texts(200))
    assert not refresh(config(tmp_path, table), Silent()).published, "all is as the config says"
    write_urls(table, texts(300))
    again = refresh(config(tmp_path, table, options={"words": 5}), Silent())
    assert again.admitted_new == 100 and again.snapshot is not None
    second = read(dataset.snapshot(2))
    assert again.snapshot.id == 4 and read(dataset.snapshot(4))[LEDGER_TABLE] == second[LEDGER_TABLE]
    assert again.snapshot.kept == dataset.snapshot(2).record.kept


def test_going_forward_again_is_a_rollback_too(tmp_path: Path):
    dataset = grown(tmp_path)
    second = read(dataset.snapshot(2))
    rollback(dataset, 1)
    assert rollback(dataset, 2).snapshot is not None
    assert read(dataset.snapshot()) == second
    table = write_urls(tmp_path / "urls.parquet", texts(400))
    assert refresh(config(tmp_path, table), Silent()).admitted_new == 100


def test_a_dry_run_says_the_same_and_changes_nothing(tmp_path: Path):
    dataset = grown(tmp_path)
    before = tree(Path(dataset.root))
    would = rollback(dataset, 1, dry_run=True)
    assert tree(Path(dataset.root)) == before
    assert would.snapshot is None and would.dry_run
    did = rollback(dataset, 1)
    assert (would.changes, would.admitted, would.kept) == (did.changes, did.admitted, did.kept)
    rows = {c.table: (c.rows_in, c.rows_out) for c in did.changes}
    assert rows["pairs"] == (0, 100) and rows["ledger"] == (200, 300)


def test_going_back_to_what_is_there_publishes_nothing(tmp_path: Path):
    dataset = grown(tmp_path)
    assert rollback(dataset, 2).snapshot is None
    assert rollback(dataset, 1).snapshot is not None
    assert rollback(dataset, 1).snapshot is None
    assert [r.id for r in dataset.snapshots()] == [1, 2, 3]


def test_unpublished_work_goes_with_a_rollback_to_the_newest(tmp_path: Path):
    dataset = grown(tmp_path)
    table = dataset.table(PAIRS_TABLE, fields.PAIRS)
    table.commit([], remove=table.files()[:1])
    report = rollback(dataset, 2)
    assert report.snapshot is not None and report.snapshot.note == "as snapshot 2"
    assert read(dataset.snapshot()) == read(dataset.snapshot(2))


def test_a_newer_models_table_keeps_the_rows_that_still_hold(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", texts(200))
    refresh(config(tmp_path, table), Silent())
    write_urls(table, texts(300))
    newer = config(tmp_path, table, options={"scale": 2})
    refresh(newer, Silent())
    dataset = Dataset(str(tmp_path / "dataset"))
    tables = dataset.snapshot(2).record.columns["chars"], dataset.snapshot(1).record.columns["chars"]
    assert tables[0] != tables[1]
    report = rollback(dataset, 1)
    assert {f.shard for f in dataset.table(tables[0], fields.PAIRS).files()} == {0, 1}
    change = next(c for c in report.changes if c.table == tables[0])
    assert not change.named and change.files_in == 0
    assert tables[0] not in dataset.snapshot().record.tables
    write_urls(table, texts(200))
    again = refresh(replace_source(newer, table), Silent())
    assert "chars" not in again.computed, "what the newer model measured of these pairs still holds"


def replace_source(run, table: Path):
    return run.model_copy(update={"source": (run.source[0].model_copy(update={"path": str(table)}),)})


def test_a_newer_models_table_loses_rows_whose_inputs_were_others(tmp_path: Path):
    """An image that changed since: what the newer model measured of it says nothing of the old one."""
    dataset = Dataset(str(tmp_path / "dataset"))
    pairs = (Pair(0, 0), Pair(1, 1))
    publish(dataset, State(pairs))
    publish(dataset, State((replace(pairs[0], sha256="b"), pairs[1]), clip=OTHER_CLIP))
    rollback(dataset, 1)
    assert {f.shard for f in dataset.table(OTHER_CLIP, fields.PAIRS).files()} == {1}


def test_what_was_taken_down_does_not_come_back_and_the_counts_say_so(tmp_path: Path):
    dataset = Dataset(str(tmp_path / "dataset"))
    pairs = tuple(
        Pair(i, i // 4, reason="clip.below_threshold" if i % 3 == 1 else None, written=("b", "c"), ranks=(0, None, 1))
        for i in range(8)
    )
    publish(dataset, State(pairs))
    publish(dataset, changed(State(pairs), reason=None, score=0.9))
    gone = [pairs[0].uid, pairs[1].uid, pairs[7].uid]
    take_down(dataset, gone)
    record = rollback(dataset, 1).snapshot
    assert record is not None
    assert (record.admitted, record.kept, record.reasons) == (5, 4, {"clip.below_threshold": 1})
    check_funnel(record)
    found = query(dataset.snapshot(), "SELECT uid FROM pairs").column("uid").to_pylist()
    assert sorted(found) == sorted(p.uid for p in pairs if p.uid not in gone)
    for table in (PAIRS_TABLE, LEDGER_TABLE, IMAGES, CLIP, CAPTIONS):
        rows = sum(f.rows for f in dataset.table(table, fields.PAIRS).files())
        assert rows == 5, table


def test_after_a_real_takedown_the_old_snapshot_comes_back_without_the_pair_and_it_stays_out(tmp_path: Path):
    dataset = grown(tmp_path)
    gone = (
        query(dataset.snapshot(1), "SELECT uid FROM pairs WHERE status = 'kept' ORDER BY uid").column("uid")[0].as_py()
    )
    assert forget(dataset, Selectors.of(uids=[gone]), Silent()).snapshot == 3
    first = dataset.snapshot(1).record
    record = rollback(dataset, 1).snapshot
    assert record is not None and (record.id, record.admitted, record.kept) == (4, 199, first.kept - 1)
    check_funnel(record)
    table = write_urls(tmp_path / "urls.parquet", texts(200))
    assert refresh(config(tmp_path, table), Silent()).computed == {}
    assert read(dataset.snapshot()) == read(dataset.snapshot(4))
    for snapshot in dataset.snapshots():
        found = query(dataset.snapshot(snapshot.id), f"SELECT uid FROM pairs WHERE uid = '{gone}'")
        assert found.num_rows == 0, snapshot.id
    vacuum(dataset, Retention(snapshots=1), grace_hours=0)
    assert refresh(config(tmp_path, table), Silent()).computed == {}
    assert not examine(dataset, Silent()).damaged


def test_the_funnel_of_texts_is_counted_again(tmp_path: Path):
    dataset = Dataset(str(tmp_path / "dataset"))
    pairs = tuple(Pair(i, 0, written=("b", "c"), ranks=(0, None, 1) if i else (None, 0, None)) for i in range(4))
    publish(dataset, State(pairs))
    take_down(dataset, [pairs[1].uid])
    snapshot = dataset.snapshot()
    chose = {"web": {"kept": 3, "text.not_chosen": 1}, "blip": {"kept": 4, "text.not_chosen": 4}}
    snapshot.record.funnel[0]["texts"] = chose
    assert recounted(snapshot).funnel[0]["texts"] == {
        "web": {"kept": 2, "text.not_chosen": 1},
        "blip": {"kept": 3, "text.not_chosen": 3},
    }
    assert snapshot.record.funnel[0]["texts"] == chose, "the record itself stays as it is"


def test_a_reason_of_several_steps_still_adds_up_after_a_takedown(tmp_path: Path):
    dataset = Dataset(str(tmp_path / "dataset"))
    pairs = tuple(Pair(i, 0, reason="score.below_threshold") for i in range(5))
    publish(dataset, State(pairs))
    take_down(dataset, [p.uid for p in pairs[:3]])
    snapshot = dataset.snapshot()
    snapshot.record.funnel[:] = [
        {"step": step, "kind": "verdict", "entered": e, "reasons": {"score.below_threshold": n}, "left": e - n}
        for step, e, n in (("a", 5, 1), ("b", 4, 4))
    ]
    record = recounted(snapshot)
    check_funnel(record)
    assert [entry["reasons"] for entry in record.funnel] == [{"score.below_threshold": 1}] * 2


def test_an_unfinished_takedown_comes_first(tmp_path: Path):
    dataset = grown(tmp_path)
    row = {"kind": "uid", "hash": "0" * 64, "request": "r1", "at": "2026-01-01T00:00:00+00:00", "done": False}
    dataset.records(TOMBSTONES_TABLE, TOMBSTONES).append([row])
    with pytest.raises(StoreError, match=r"takedown r1 .* was interrupted"):
        rollback(dataset, 1)


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_file_that_is_not_there_is_found_before_anything_is_changed(tmp_path: Path, damage: str):
    dataset = grown(tmp_path)
    latest = {f.relative for f in dataset.table(LEDGER_TABLE, fields.LEDGER).files()}
    path = Path(next(f.path for f in dataset.snapshot(1).files(LEDGER_TABLE) if f.relative not in latest))
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    before = tree(Path(dataset.root))
    with pytest.raises(StoreError, match=f"1 of its files are missing or damaged, {path}"):
        rollback(dataset, 1)
    assert tree(Path(dataset.root)) == before


def test_a_table_that_is_not_there_is_found_too(tmp_path: Path):
    dataset = two_models(tmp_path / "dataset")
    shutil.rmtree(tmp_path / "dataset" / CLIP)
    with pytest.raises(StoreError, match=rf"1 of its files are missing or damaged, .*{CLIP} among them"):
        rollback(dataset, 1)


def test_no_dataset_and_no_snapshot_are_config_errors_and_make_no_folder(tmp_path: Path):
    with pytest.raises(ConfigError, match="is no pairmill dataset"):
        rollback(Dataset(str(tmp_path / "nowhere")), 1)
    with pytest.raises(ConfigError, match="is no pairmill dataset"):
        vacuum(Dataset(str(tmp_path / "nowhere")))
    assert not (tmp_path / "nowhere").exists()
    dataset = grown(tmp_path)
    with pytest.raises(ConfigError, match="has no snapshot 7; it has 1, 2"):
        rollback(dataset, 7)


def test_one_writer_at_a_time_and_no_vacuum_while_an_export_reads(tmp_path: Path):
    dataset = grown(tmp_path)
    with dataset.lock():
        for act in (lambda: rollback(Dataset(dataset.url), 1), lambda: vacuum(Dataset(dataset.url))):
            with pytest.raises(DatasetLocked):
                act()
    with dataset.reading():
        with pytest.raises(DatasetLocked, match="is being read"):
            vacuum(Dataset(dataset.url))
        vacuum(Dataset(dataset.url), dry_run=True)


def test_an_undone_transaction_counts_as_not_committed(tmp_path: Path):
    dataset = Dataset(str(tmp_path / "dataset"))
    table = dataset.table("words-00000001", pa.schema([fields.UID]))
    with table.writer(0, "part") as writer:
        writer.write(pa.table({"uid": ["a"]}, schema=table.schema))
        file = writer.close()
    table.commit([file], transaction=("admit", 2))
    table.commit([], remove=[file], transaction=("admit", 1), undo=True)
    assert table.files() == []
    table.commit([file], transaction=("admit", 2))
    assert table.files() == [file]


# -- kill -9 while going back -----------------------------------------------------------------------------------------

KILLER = """
import os, signal, sys
from pairmill.store import Dataset, Records, Table
from pairmill.versions import rollback, vacuum
from pairmill.versions.intention import Intention
from schemas.config import Retention

def step(function):
    '''Kill this process before the call with the number `point`.'''
    def call(*arguments, **named):
        global point
        point -= 1
        if point < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return call

def patch(dataset):
    Intention.declare = step(Intention.declare)
    Intention.done = step(Intention.done)
    Table.commit = step(Table.commit)
    Dataset.publish = step(Dataset.publish)
    Records.replace = step(Records.replace)
    files = type(dataset.fs)
    remove = files.rm
    remove_one = step(remove)
    def one_by_one(self, path, recursive=False, maxdepth=None):
        paths = path if isinstance(path, list) else sorted(self.find(path)) if recursive else [path]
        for each in paths:
            remove_one(self, each)
        if recursive:
            remove(self, path, recursive=True)
    files.rm = one_by_one

verb, first, *urls = sys.argv[1:]
for point, url in enumerate(urls, int(first)):
    child = os.fork()  # nothing has started a thread yet
    if child == 0:
        dataset = Dataset(url)
        patch(dataset)
        rollback(dataset, 1) if verb == "rollback" else vacuum(dataset, Retention(snapshots=1), grace_hours=0)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, flush=True)
"""


def killed(verb: str, first: int, *datasets: Dataset) -> list[bool]:
    """Run a verb in processes that die before their step number `first`, `first` + 1 ...; whether they died. False:
    there are not so many steps."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER, verb, str(first), *(d.url for d in datasets)],
        capture_output=True,
        text=True,
        check=True,
    )
    codes = [int(line) for line in done.stdout.split()]
    assert set(codes) <= {0, -signal.SIGKILL}, done.stderr
    return [code != 0 for code in codes]


def copies(dataset: Dataset, count: int) -> list[Dataset]:
    """Copies of a dataset beside it."""
    return [Dataset(shutil.copytree(dataset.root, f"{dataset.root}-{i}")) for i in range(count)]


def two_models(root: Path) -> Dataset:
    """1: two shards; 2: another shard, another image in shard 0, another model."""
    dataset = Dataset(str(root))
    pairs = tuple(Pair(i, i // 2, reason="clip.below_threshold" if i % 2 else None) for i in range(4))
    publish(dataset, State(pairs))
    more = (replace(pairs[0], sha256="b"), *pairs[1:], Pair(9, 2))
    publish(dataset, State(more, clip=OTHER_CLIP))
    return dataset


def test_sigkill_at_every_step_of_a_rollback_leaves_the_old_state_or_one_that_is_finished(tmp_path: Path):
    calm = two_models(tmp_path / "calm")
    datasets = copies(calm, 10)
    rollback(calm, 1)
    wanted = [read(calm.snapshot(n)) for n in (1, 2, 3)]
    newer = {f.relative for f in calm.table(OTHER_CLIP, fields.PAIRS).files()}
    died = killed("rollback", 0, *datasets)
    assert died == [True] * 9 + [False], "declared, the newer table, four others, published, done, gone"
    for point, dataset in enumerate(datasets):
        published = len(dataset.snapshots()) == 3
        assert published == (point >= 7)
        assert read(dataset.snapshot()) == wanted[2 if published else 1], "readers see one or the other"
        record = finish(dataset, Silent())
        if point == 0:
            assert record is None, "it had not begun"
            rollback(dataset, 1)
        elif died[point]:
            assert record is not None and record.note == "as snapshot 1"
        assert [read(dataset.snapshot(n)) for n in (1, 2, 3)] == wanted
        assert len(dataset.snapshots()) == 3
        assert {f.relative for f in dataset.table(OTHER_CLIP, fields.PAIRS).files()} == newer
        latest = {t: dataset.table(t, fields.PAIRS).version() for t in dataset.snapshot().record.tables}
        assert dataset.snapshot().record.tables == latest
        assert finish(dataset, Silent()) is None
        assert not [p for p in Path(dataset.root).iterdir() if p.name.startswith("_")]


def test_the_same_command_finishes_a_rollback(tmp_path: Path):
    dataset = two_models(tmp_path / "dataset")
    first = read(dataset.snapshot(1))
    assert killed("rollback", 4, dataset) == [True]
    report = rollback(dataset, 1)
    assert report.snapshot is not None and report.snapshot.id == 3
    assert read(dataset.snapshot()) == first
    assert finish(dataset, Silent()) is None


def test_the_next_run_finishes_a_rollback_before_it_admits_anything(tmp_path: Path):
    dataset = grown(tmp_path)
    first = read(dataset.snapshot(1))
    assert killed("rollback", 3, dataset) == [True]
    table = write_urls(tmp_path / "urls.parquet", texts(200))
    report = refresh(config(tmp_path, table), Silent())
    assert not report.published and report.snapshot is not None
    assert (report.snapshot.id, report.snapshot.kind, report.computed) == (3, "rollback", {})
    assert read(dataset.snapshot()) == first


def test_another_rollback_finishes_the_first_one_before(tmp_path: Path):
    dataset = two_models(tmp_path / "dataset")
    wanted = [read(dataset.snapshot(n)) for n in (1, 2)]
    assert killed("rollback", 4, dataset) == [True]
    assert rollback(dataset, 2).snapshot is not None
    assert [read(s) for s in (dataset.snapshot(3), dataset.snapshot(4))] == wanted


def test_a_rollback_that_cannot_be_finished_gives_way_to_another_one(tmp_path: Path):
    dataset = two_models(tmp_path / "dataset")
    second = read(dataset.snapshot(2))
    assert killed("rollback", 4, dataset) == [True]
    now = {f.path for t in (CLIP, PAIRS_TABLE, IMAGES) for f in dataset.snapshot(2).files(t)}
    path = next(f.path for t in (IMAGES, PAIRS_TABLE) for f in dataset.snapshot(1).files(t) if f.path not in now)
    os.remove(path)
    with pytest.raises(StoreError, match=r"rollback to snapshot 1 was begun and cannot be finished.*or roll back to"):
        finish(dataset, Silent())
    with pytest.raises(StoreError, match="was begun and cannot be finished"):
        rollback(dataset, 1)
    assert rollback(dataset, 2).snapshot is not None
    assert read(dataset.snapshot()) == second
    assert finish(dataset, Silent()) is None


# -- vacuum -----------------------------------------------------------------------------------------------------------


def test_expired_snapshots_go_with_their_files_and_the_rest_reads_as_before(tmp_path: Path):
    dataset = two_models(tmp_path / "dataset")
    second = read(dataset.snapshot(2))
    report = vacuum(dataset, Retention(snapshots=1))
    assert (report.expired, report.retained) == ([1], [2])
    assert [r.id for r in dataset.snapshots()] == [2]
    assert read(dataset.snapshot()) == second
    whys = {(r.table, r.why) for r in report.removed}
    assert whys == {(CLIP, UNUSED), (IMAGES, EXPIRED)}
    assert not (tmp_path / "dataset" / CLIP).exists()
    assert report.files == sum(r.files for r in report.removed)
    with pytest.raises(ConfigError, match="has no snapshot 1"):
        dataset.snapshot(1)


def test_without_a_policy_every_snapshot_stays(tmp_path: Path):
    dataset = two_models(tmp_path / "dataset")
    before = tree(tmp_path / "dataset")
    report = vacuum(dataset, grace_hours=0)
    assert (report.expired, report.files) == ([], 0)
    assert tree(tmp_path / "dataset") == before


def test_the_policy_is_that_of_the_last_config_unless_given(tmp_path: Path):
    dataset = Dataset(str(tmp_path / "dataset"))
    for score in (0.1, 0.2, 0.3):
        publish(dataset, State((Pair(0, score=score),), config={"retention": {"snapshots": 2, "days": None}}))
    assert vacuum(dataset, dry_run=True).expired == [1]
    assert vacuum(dataset, Retention(snapshots=1), dry_run=True).expired == [1, 2]
    assert policy_of(dataset.snapshot().record) == Retention(snapshots=2)
    broken = replace(dataset.snapshot().record, config="retention: {snapshots: many}")
    with pytest.raises(ConfigError, match=r"retention.snapshots: input should be .*give --keep or --days"):
        policy_of(broken)


@pytest.mark.parametrize(
    ("policy", "stay"),
    [
        (Retention(), [1, 2, 3, 4]),
        (Retention(snapshots=2), [3, 4]),
        (Retention(days=10), [2, 4]),
        (Retention(days=1), [4]),
        (Retention(snapshots=2, days=10), [2, 3, 4]),
        (Retention(snapshots=9), [1, 2, 3, 4]),
    ],
)
def test_a_snapshot_stays_by_number_or_by_age_and_the_newest_always(policy: Retention, stay: list[int]):
    now = datetime.datetime(2026, 3, 1, tzinfo=datetime.timezone.utc)
    days = {1: 40, 2: 5, 3: 30, 4: 20 if policy.days == 1 else 2}  # numbers, not clocks, say which is newest
    records = [bare(n, (now - datetime.timedelta(days=age)).isoformat()) for n, age in days.items()]
    assert [r.id for r in retained(records, policy, now)] == stay


def bare(number: int, created_at: str = "2026-01-01T00:00:00Z") -> SnapshotRecord:
    return SnapshotRecord(number, 1, created_at, "r", "a: 1", 0, 0, 0, 0, {}, [], {}, {}, {}, {}, 0.0)


def test_young_files_that_nobody_names_stay_for_the_next_run(tmp_path: Path):
    dataset = two_models(tmp_path / "dataset")
    root = tmp_path / "dataset"
    (root / "_work").mkdir()
    (root / "siglip-0000000c" / "shard=0").mkdir(parents=True)
    orphans = [
        root / CLIP / "shard=0" / "part-1.parquet",
        root / "siglip-0000000c" / "shard=0" / "part-2.parquet",
        root / IMAGES / "shard=1" / "part.77.tmp",
        root / "_work" / "0-0-0",
        root / "_sources.json.9.tmp",
        root / IMAGES / "_delta_log" / "00000000000000000009.json.torn",
    ]
    others = [root / "notes.txt", root / IMAGES / "README", root / "_work.md"]
    for path in (*orphans, *others):
        path.write_bytes(b"xyz")
    waiting = vacuum(dataset)
    assert (waiting.files, waiting.waiting_files, waiting.waiting_bytes) == (0, 6, 18)
    old = time.time() - 25 * 3600
    for path in (*orphans, *others):
        os.utime(path, (old, old))
    report = vacuum(dataset)
    assert {(r.table, r.why, r.files) for r in report.removed} == {
        (CLIP, ORPHAN, 1),
        ("siglip-0000000c", ORPHAN, 1),
        (IMAGES, LEFTOVER, 2),
        ("_work", LEFTOVER, 1),
        ("", LEFTOVER, 1),
    }
    assert not any(path.exists() for path in orphans)
    assert all(path.exists() for path in others)


def test_what_an_interrupted_run_committed_stays_while_it_is_young(tmp_path: Path):
    """A new model's table that no snapshot names yet."""
    dataset = two_models(tmp_path / "dataset")
    table = dataset.table("siglip-0000000c", pa.schema([fields.UID]))
    with table.writer(0, "part") as writer:
        writer.write(pa.table({"uid": ["a"]}, schema=table.schema))
        table.commit([writer.close()])
    report = vacuum(dataset, Retention(snapshots=1))
    assert report.waiting_files > 0 and table.files()
    assert [(r.table, r.why) for r in vacuum(dataset, grace_hours=0).removed if r.why == UNUSED] == [
        ("siglip-0000000c", UNUSED)
    ]
    assert open_delta(dataset, "siglip-0000000c") is None


def test_a_rollback_that_waits_to_be_finished_is_finished_first_and_its_snapshot_protected(tmp_path: Path):
    dataset = two_models(tmp_path / "dataset")
    first = read(dataset.snapshot(1))
    assert killed("rollback", 5, dataset) == [True]
    assert vacuum(dataset, Retention(snapshots=1), grace_hours=0, dry_run=True).retained == [1, 2]
    vacuum(dataset, Retention(snapshots=1), grace_hours=0)
    assert [r.note for r in dataset.snapshots()] == ["as snapshot 1"]
    assert read(dataset.snapshot()) == first


def test_rewrites_that_nobody_needs_are_forgotten(tmp_path: Path):
    dataset = Dataset(str(tmp_path / "dataset"))
    pairs = tuple(Pair(i) for i in range(4))
    publish(dataset, State(pairs))
    publish(dataset, changed(State(pairs), score=0.9))
    take_down(dataset, [pairs[0].uid])
    two = read(dataset.snapshot(2))
    assert len(dataset.rewrites()) == 6
    vacuum(dataset, Retention(snapshots=1), grace_hours=0)
    assert {table for table, _ in dataset.rewrites()} == {PAIRS_TABLE, LEDGER_TABLE, IMAGES, CAPTIONS, CLIP}
    assert len(dataset.rewrites()) == 5, "that of the first snapshot's scores is gone"
    assert read(dataset.snapshot()) == two


pair_changes = st.builds(
    Pair,
    number=st.integers(0, 5),
    shard=st.integers(0, 2),
    reason=st.sampled_from([None, "clip.below_threshold", "http.timeout"]),
    source=st.sampled_from(["url_table:0", "url_table:1"]),
    sha256=st.sampled_from([None, "a", "b"]),
    score=st.sampled_from([None, 0.25, 0.5, 0.75]),
    written=st.sampled_from([(), ("b",), ("b", "c"), ("d",)]),
    ranks=st.sampled_from([None, (0,), (None, 0), (1, 0, None), (None,)]),
)


def whole(pairs: list[Pair]) -> tuple[Pair, ...]:
    """One of each number; ranks only for texts that there are."""
    unique = {p.number: p for p in pairs}.values()
    return tuple(p if p.ranks is None or len(p.ranks) == 1 + len(p.written) else replace(p, ranks=None) for p in unique)


states = st.builds(
    State,
    pairs=st.lists(pair_changes, min_size=1, max_size=6).map(whole),
    clip=st.sampled_from([CLIP, OTHER_CLIP]),
)
events = st.one_of(states, st.integers(0, 5).map(lambda n: ("forget", n)), st.integers(1, 4).map(lambda n: ("back", n)))


@settings(max_examples=20)
@given(history=st.lists(events, min_size=1, max_size=5), keep=st.integers(1, 3), orphan=st.booleans())
def test_after_a_vacuum_every_retained_snapshot_reads_the_same(tmp_path_factory, history, keep: int, orphan: bool):
    root = tmp_path_factory.mktemp("vacuum")
    dataset = Dataset(str(root))
    for event in history:
        records = dataset.snapshots()
        if isinstance(event, State):
            publish(dataset, replace(event, refresh=len(records) + 1))
        elif records and event[0] == "forget":
            take_down(dataset, [Pair(event[1]).uid])
        elif records and event[1] in [r.id for r in records]:
            rollback(dataset, event[1])
    if not dataset.snapshots():
        publish(dataset, State((Pair(0),)))
    if orphan:
        (root / IMAGES / "shard=0").mkdir(exist_ok=True)
        (root / IMAGES / "shard=0" / "part-9.parquet").write_bytes(b"xyz")
    newest = dataset.snapshots()[-keep:]
    before = {r.id: read(dataset.snapshot(r.id)) for r in newest}
    latest = {t: dataset.table(t, fields.PAIRS).files() for t in newest[-1].tables}
    would = vacuum(dataset, Retention(snapshots=keep), grace_hours=0, dry_run=True)
    files = data_files(dataset)
    did = vacuum(dataset, Retention(snapshots=keep), grace_hours=0)
    assert replace(would, dry_run=False) == did
    assert {r.id: read(dataset.snapshot(r.id)) for r in dataset.snapshots()} == before
    assert {t: dataset.table(t, fields.PAIRS).files() for t in latest} == latest
    assert did.bytes == sum(r.bytes for r in did.removed) and len(files - data_files(dataset)) <= did.files
    needed = {f.path for r in dataset.snapshots() for t in r.tables for f in dataset.snapshot(r.id).files(t)}
    needed |= {f.path for t in latest for f in latest[t]}
    assert {str(root / f) for f in data_files(dataset) if "/shard=" in f} == needed
    again = vacuum(dataset, Retention(snapshots=keep), grace_hours=0)
    assert {r.table for r in again.removed} <= {"snapshots", "rewrites"}, "only records that were replaced are left"
    assert {r.id: read(dataset.snapshot(r.id)) for r in dataset.snapshots()} == before


def test_sigkill_at_every_step_of_a_vacuum_leaves_only_what_the_next_one_removes(tmp_path: Path):
    calm = two_models(tmp_path / "calm")
    take_down(calm, [Pair(2).uid])
    second = read(calm.snapshot(2))
    datasets = copies(calm, 24)
    vacuum(calm, Retention(snapshots=1), grace_hours=0)
    died = killed("vacuum", 0, *datasets)
    assert died.count(True) >= 9 and not died[-1], "records, declared, the table and its log, done, files, rewrites"
    for point, dataset in enumerate(datasets[: died.index(False) + 1]):
        assert read(dataset.snapshot(2)) == second
        if len(dataset.snapshots()) == 2:
            assert read(dataset.snapshot(1)), "its record is there, so its files are"
        finish(dataset, Silent())
        for table in dataset.tables():  # what a run would open
            paths = [f.path for f in dataset.table(table, fields.PAIRS).files()]
            assert all(os.path.exists(p) for p in paths), (point, table)
        vacuum(dataset, Retention(snapshots=1), grace_hours=0)
        assert read(dataset.snapshot(2)) == second
        assert [r.id for r in dataset.snapshots()] == [2]
        stored = {f for f in data_files(dataset) if "shard=" in f}
        assert stored == {f for f in data_files(calm) if "shard=" in f}
        assert dataset.rewrites() == calm.rewrites()
        assert not [p for p in Path(dataset.root).iterdir() if p.name.startswith("_")]


# -- diff -------------------------------------------------------------------------------------------------------------


def brute(a: State, b: State) -> dict[str, object]:
    """What a diff must say, pair by pair."""
    old, new = ({p.uid: p for p in s.pairs} for s in (a, b))
    both = [(old[u], new[u]) for u in old.keys() & new.keys()]
    came, went = [new[u] for u in new.keys() - old.keys()], [old[u] for u in old.keys() - new.keys()]

    def values(pairs: list[tuple[object, object]]) -> tuple[int, int, int]:
        return (
            sum(x is not None and y is not None and x != y for x, y in pairs),
            sum(x is None and y is not None for x, y in pairs),
            sum(x is not None and y is None for x, y in pairs),
        )

    scores = [(x.score, y.score) for x, y in both]
    moved = [y - x for x, y in scores if x is not None and y is not None and x != y]
    kept = [(x, y) for x, y in both if x.reason is None and y.reason is None]
    return {
        "pairs": (len(old), len(new), len(came), len(went)),
        "kept": (sum(p.reason is None for p in came), sum(p.reason is None for p in went)),
        "newly": Counter(x.reason for x, y in both if x.reason is not None and y.reason is None),
        "lost": Counter(y.reason for x, y in both if x.reason is None and y.reason is not None),
        "came": Counter(p.reason for p in came),
        "went": Counter(p.reason for p in went),
        "by source": Counter(p.source for p in (*came, *went)),
        "by shard": Counter(str(p.shard) for p in (*came, *went)),
        "reasons": Counter((x.reason, y.reason) for x, y in both if x.reason != y.reason),
        "image": values([(x.sha256, y.sha256) for x, y in both]),
        "caption": values([(x.caption, y.caption) for x, y in kept]),
        "score": values(scores),
        "mean": sum(moved) / len(moved) if moved else None,
    }


@settings(max_examples=30)
@given(a=states, b=states, by=st.sampled_from(By))
def test_a_diff_says_what_a_comparison_pair_by_pair_says(tmp_path_factory, a: State, b: State, by: By):
    dataset = Dataset(str(tmp_path_factory.mktemp("diff")))
    publish(dataset, a)
    publish(dataset, b)
    first, second = dataset.snapshot(1), dataset.snapshot(2)
    wanted = brute(a, b)
    report = diff(first, second, by=by, listed=100)
    assert (report.pairs_a, report.pairs_b, report.pairs_in, report.pairs_out) == wanted["pairs"]
    assert (report.kept_in, report.kept_out) == wanted["kept"]
    assert report.kept_b == (
        report.kept_a + report.kept_in - report.kept_out + report.newly_kept - report.no_longer_kept
    )
    columns = {"newly": "newly_kept", "lost": "no_longer_kept", "came": "pairs_in", "went": "pairs_out"}
    if by is By.REASON:
        for what, column in columns.items():
            assert +Counter({g.key: getattr(g, column) for g in report.groups}) == wanted[what], what
    else:
        assert +Counter({g.key: g.pairs_in + g.pairs_out for g in report.groups}) == wanted[f"by {by.value}"]
    assert {(r.a, r.b): r.pairs for r in report.reasons} == wanted["reasons"]
    for value in ("image", "caption"):
        found = getattr(report, value)
        assert (found.changed, found.gained, found.lost) == wanted[value], value
    score = next((s for s in report.scores if s.column == "clip_score"), None)
    assert ((score.changed, score.gained, score.lost) if score else (0, 0, 0)) == wanted["score"]
    assert (score.mean_change if score else None) == wanted["mean"]
    assert [s.stage for s in report.stages] == ([] if a.clip == b.clip else ["clip"])
    check_listed(report.listed, a, b)


def check_listed(listed: list[dict[str, object]], a: State, b: State) -> None:
    old, new = ({p.uid: p for p in s.pairs} for s in (a, b))
    tests = {
        "in": lambda x, y: x is None,
        "out": lambda x, y: y is None,
        "newly kept": lambda x, y: x and y and x.reason and not y.reason,
        "no longer kept": lambda x, y: x and y and y.reason and not x.reason,
        "other reason": lambda x, y: x and y and x.reason and y.reason and x.reason != y.reason,
        "image": lambda x, y: x and y and x.sha256 and y.sha256 and x.sha256 != y.sha256,
        "caption": lambda x, y: (
            x and y and not x.reason and not y.reason and x.caption and y.caption and x.caption != y.caption
        ),
    }
    for change, test in tests.items():
        found = [row["uid"] for row in listed if row["change"] == change]
        assert found == sorted(u for u in old | new if test(old.get(u), new.get(u))), change
    for row in listed:
        x, y = old.get(row["uid"]), new.get(row["uid"])
        one = y or x
        assert one is not None and (row["url"], row["shard"]) == (one.url, one.shard)
        assert (row["reason_a"], row["reason_b"]) == (x and x.reason, y and y.reason)


def test_a_diff_reads_only_shards_that_differ(tmp_path: Path):
    dataset = Dataset(str(tmp_path / "dataset"))
    pairs = tuple(Pair(i, i // 2) for i in range(6))
    publish(dataset, State(pairs))
    publish(dataset, State((*pairs[:5], replace(pairs[5], reason="http.timeout"))))
    for file in dataset.snapshot(1).files(LEDGER_TABLE):
        if file.shard != 2:
            os.truncate(file.path, 0)  # reading it would fail
    report = diff(dataset.snapshot(1), dataset.snapshot(2))
    assert (report.shards_read, report.no_longer_kept, report.pairs_b) == (1, 1, 6)
    same = diff(dataset.snapshot(2), dataset.snapshot(2))
    assert (same.shards_read, same.groups, same.config) == (0, [], [])


def test_a_diff_names_config_keys_models_and_what_was_computed(tmp_path: Path):
    dataset = Dataset(str(tmp_path / "dataset"))
    publish(dataset, State((Pair(0),), config={"keep": {"clip_score": ">= 0.2", "min_side": 9}, "seed": 1}))
    publish(dataset, State((Pair(0),), clip=OTHER_CLIP, config={"keep": {"clip_score": ">= 0.3", "min_side": 9}}))
    report = diff(dataset.snapshot(1), dataset.snapshot(2))
    assert [(c.key, c.a, c.b) for c in report.config] == [("keep.clip_score", ">= 0.2", ">= 0.3"), ("seed", 1, None)]
    assert [(c.key, c.a, c.b) for c in report.models] == [("clip.model", CLIP, OTHER_CLIP)]
    assert [(s.stage, s.a, s.b) for s in report.stages] == [("clip", CLIP, OTHER_CLIP)]
    assert report.computed == {"clip": 1}
    assert what_changed(dataset.snapshot(1).record, dataset.snapshot(2).record) == (
        "clip anew, keep.clip_score = >= 0.3, seed = None"
    )


def test_a_diff_after_a_takedown_counts_what_is_there(tmp_path: Path):
    dataset = Dataset(str(tmp_path / "dataset"))
    pairs = tuple(Pair(i) for i in range(4))
    publish(dataset, State(pairs))
    publish(dataset, State((*pairs[:3], replace(pairs[3], reason="http.timeout"))))
    take_down(dataset, [pairs[0].uid])
    report = diff(dataset.snapshot(1), dataset.snapshot(2))
    assert (report.pairs_a, report.pairs_b, report.kept_a, report.kept_b) == (3, 3, 3, 2)
    assert (report.pairs_in, report.pairs_out, report.no_longer_kept) == (0, 0, 1)


def test_a_damaged_file_is_named_by_a_diff(tmp_path: Path):
    dataset = two_models(tmp_path / "dataset")
    file = next(f for f in dataset.snapshot(2).files(LEDGER_TABLE) if f.shard == 2)
    os.truncate(file.path, 9)
    with pytest.raises(StoreError, match="pairmill verify"):
        diff(dataset.snapshot(1), dataset.snapshot(2))


def test_snapshots_of_two_datasets_are_not_compared(tmp_path: Path):
    one, other = two_models(tmp_path / "one"), two_models(tmp_path / "other")
    with pytest.raises(ConfigError, match="two datasets"):
        diff(one.snapshot(), other.snapshot())


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_verbs_print_for_people_and_for_programs(tmp_path: Path, command: Command):  # noqa: F811
    url = str(two_models(tmp_path / "dataset").root)
    shown = command("diff", url, "1", "2")
    assert shown.code == 0
    assert [line.split() for line in shown.out.splitlines()[2:9]] == [
        ["pairs", "kept"],
        ["snapshot", "1", "4", "2"],
        ["in", "1", "1"],
        ["out", "0", "0"],
        ["newly", "kept", "0"],
        ["no", "longer", "kept", "0"],
        ["snapshot", "2", "5", "3"],
    ]
    assert "image" in shown.out and OTHER_CLIP in shown.out
    as_json = json.loads(command("diff", url, "1", "2", "--format", "json", "--by", "source", "--list", "5").out)
    assert (as_json["pairs_in"], as_json["groups"][0]["key"]) == (1, "url_table:0")
    assert [row["change"] for row in as_json["listed"]] == ["in", "image"]
    counts = list(csv.DictReader(io.StringIO(command("diff", url, "1", "2", "--format", "csv").out)))
    assert next(row for row in counts if row["what"] == "pairs_in")["pairs"] == "1"
    rows = list(csv.DictReader(io.StringIO(command("diff", url, "1", "2", "--format", "csv", "--list", "9").out)))
    assert [row["url"] for row in rows] == [Pair(9).url, Pair(0).url]
    assert "Nothing differs." in command("diff", url, "2", "2").out

    would = command("rollback", url, "1", "--dry-run")
    assert "would be as in snapshot 1: 2 of 4 pairs kept. Nothing was changed." in would.out
    did = json.loads(command("rollback", url, "1", "--json").out)
    assert (did["snapshot"]["id"], did["snapshot"]["note"]) == (3, "as snapshot 1")
    assert "is as in snapshot 1 already" in command("rollback", url, "1").out
    listed = command("snapshots", url).out.splitlines()
    assert [line.split()[0] for line in listed] == ["id", "1", "2", "3"]
    assert "rollback" in listed[3] and "as snapshot 1" in listed[3]
    status = command("status", url).out
    assert "snapshot 3 (rollback, as snapshot 1)" in status and "together" in status and "clip.model" in status
    assert json.loads(command("status", url, "--json").out) == did["snapshot"]

    would = command("vacuum", url, "--keep", "1", "--dry-run")
    assert "would be removed; snapshots that would be removed: 1, 2" in would.out
    cleaned = json.loads(command("vacuum", url, "--keep", "1", "--grace", "0", "--json").out)
    assert cleaned["expired"] == [1, 2] and cleaned["files"] > 0
    assert command("vacuum", url, "--keep", "0").code == 2
    assert command("rollback", url, "1").code == 2
    assert command("diff", url, "1", "3").code == 2


@pytest.mark.parametrize("verb", ["diff", "rollback", "vacuum"])
def test_each_verb_has_examples(command: Command, verb: str):  # noqa: F811
    assert f"\n    pairmill {verb} " in command(verb, "--help").out.partition("Examples:")[2]


def test_going_back_and_forth_over_several_refreshes_leaves_a_whole_log(tmp_path: Path):
    table = tmp_path / "urls.parquet"
    for count in (20, 40, 60):
        write_urls(table, texts(count))
        refresh(config(tmp_path, table), Silent())
    dataset = Dataset(str(tmp_path / "dataset"))
    for number in (1, 3, 2):
        rollback(dataset, number)
        assert examine(dataset, Silent()).findings == ()
    report = refresh(config(tmp_path, table), Silent())
    assert report.admitted_new == 20 and examine(dataset, Silent()).findings == ()
