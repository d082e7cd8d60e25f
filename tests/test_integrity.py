"""Damage of every kind, to every file of a small dataset: found, and mended, so that the ledger is as before."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pairmill.cli import app
from pairmill.errors import ConfigError, SourceError, StoreError
from pairmill.integrity import Integrity, Kind, Repair, examine, repair
from pairmill.integrity.logs import fact, files_at, read_log
from pairmill.integrity.repair import dependents
from pairmill.plan import Recipe, compile_plan
from pairmill.procedural.web import Kind as RowKind
from pairmill.procedural.web import ProceduralWeb
from pairmill.query import query
from pairmill.report.progress import Silent
from pairmill.run import load_recipe, parse_config, refresh
from pairmill.sources import download_stage
from pairmill.stage import Batch, Kernel, Resources, Stage
from pairmill.store import REWRITES, REWRITES_TABLE, Dataset, checksum_of, column_digests, read_files
from pairmill.tombstones import TOMBSTONES, TOMBSTONES_TABLE
from schemas import fields
from schemas.config import RunConfig
from tests.steps import AtLeast, CountChars, CountWords, SameText, write_urls
from tests.steps import config as steps_config

Harm = Callable[[Path], None]
PAIRS = 40
SHARD = 15


@dataclass(frozen=True)
class Weigh(Stage):
    """Writes `contrast`: how many bytes an image has. It depends on the image."""

    resources: Resources = field(default=Resources(rows=64), compare=False, metadata={"identity": False})
    name = "weigh"
    reads = ("image",)
    writes = (fields.CONTRAST,)

    def open(self) -> Kernel:
        def weigh(batch: Batch) -> pa.Table:
            return pa.table({"contrast": pa.array([len(i or b"") for i in batch.pylist("image")], pa.float32())})

        return weigh


def recipe(config: RunConfig) -> Recipe:
    """words, at least 2, images, their weight, chars, no repeated text."""
    steps = (CountWords(), AtLeast(2), download_stage(config.download), Weigh(), CountChars(), SameText())
    return Recipe("whole", steps)


@pytest.fixture(scope="module")
def web() -> Iterator[ProceduralWeb]:
    with ProceduralWeb(PAIRS, seed=3, proportions={RowKind.NOT_FOUND: 0.1, RowKind.TOO_SHORT: 0.1}) as web:
        yield web


@pytest.fixture(scope="module")
def calm(web: ProceduralWeb, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset of two snapshots: the second one admitted ten pairs more."""
    folder = tmp_path_factory.mktemp("calm")
    web.write(folder)
    rows = pq.read_table(folder / "urls.parquet")
    for count in (PAIRS - 10, PAIRS):
        pq.write_table(rows.slice(0, count), folder / "urls.parquet")
        assert refresh(run_config(folder), Silent()).published
    return folder


def run_config(folder: Path, **changes: object) -> RunConfig:
    return parse_config(
        {
            "dataset": str(folder / "dataset"),
            "recipe": "tests.test_integrity:recipe",
            "source": {"kind": "url_table", "path": str(folder / "urls.parquet")},
            "engine": {"kind": "local"},
            "shard_size": SHARD,
            "download": {"allow_private_addresses": True, "timeout_s": 5, "retries": 0},
            **changes,
        }
    )


@pytest.fixture
def folder(calm: Path, tmp_path: Path) -> Path:
    """A copy of the calm dataset to harm."""
    shutil.copytree(calm, tmp_path / "copy")
    return tmp_path / "copy"


def dataset_of(folder: Path) -> Dataset:
    return Dataset(str(folder / "dataset"))


def mend(folder: Path, accept_loss: bool = False, **overrides: str) -> Repair:
    given = [f"source.0.path={folder / 'urls.parquet'}", *(f"{k}={v}" for k, v in overrides.items())]
    return repair(dataset_of(folder), Silent(), accept_loss=accept_loss, overrides=given)


def look(folder: Path, quick: bool = False) -> Integrity:
    return examine(dataset_of(folder), Silent(), quick=quick)


def ledger(folder: Path, snapshot: int | None = None) -> dict[str, str]:
    opened = dataset_of(folder).snapshot(snapshot)
    rows = read_files(opened.dataset, opened.files("ledger"), fields.LEDGER, ["uid", "status", "reason", "shard"])
    return column_digests(rows)


def every_file(folder: Path) -> list[Path]:
    """Data files and commit records, below the dataset."""
    root = folder / "dataset"
    found = [p for p in root.rglob("*") if p.suffix in (".parquet", ".json") and p.parent != root]
    return sorted(p.relative_to(root) for p in found)


def one_of_each(folder: Path, chance: random.Random) -> list[Path]:
    """A data file and a commit record of each table."""
    groups: dict[tuple[str, str], list[Path]] = {}
    for path in every_file(folder):
        groups.setdefault((path.parts[0], path.suffix), []).append(path)
    return [chance.choice(paths) for paths in groups.values()]


def data_files(folder: Path, table: str) -> list[Path]:
    return sorted(next((folder / "dataset").glob(table)).rglob("*.parquet"))


def flip(chance: random.Random) -> Harm:
    def harm(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)

    return harm


def truncate(chance: random.Random) -> Harm:
    def harm(path: Path) -> None:
        os.truncate(path, chance.randrange(path.stat().st_size))

    return harm


def remove(_: random.Random) -> Harm:
    return Path.unlink


# -- everything, in turn ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [flip, truncate, remove])
def test_damage_to_any_file_is_found_and_mended(
    how: Callable[[random.Random], Harm], calm: Path, tmp_path: Path
) -> None:
    chance = random.Random(7)
    expected = {n: ledger(calm, n) for n in (1, 2)}
    for relative in every_file(calm) if how is flip else one_of_each(calm, chance):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(calm, folder)
        before = (folder / "dataset" / relative).read_bytes()
        how(chance)(folder / "dataset" / relative)
        found = look(folder)
        table, is_record = relative.parts[0], relative.suffix == ".json"
        last_of_snapshots = table == "snapshots" and relative.name.endswith("2.json")
        if not is_record:
            assert [f.path for f in found.damage] == [str(relative)], relative
        elif how is not flip and not (last_of_snapshots and how is remove):  # some bytes of a record mean nothing
            assert str(relative) in [f.path for f in found.damage], relative
        lost = table == "snapshots" and not is_record
        done = mend(folder, accept_loss=lost)
        assert not done.after.damaged, (relative, done.after.damage)
        if lost:
            assert [loss.accepted for loss in done.lost] == [True]
            assert ledger(folder) == expected[2]
            continue
        assert done.lost == []
        if not is_record:
            assert (folder / "dataset" / relative).read_bytes() == before, "old snapshots read the same bytes again"
        if last_of_snapshots and len(dataset_of(folder).snapshots()) == 1:
            assert how is remove, "a record that is not there at all may never have been written"
            refresh(run_config(folder), Silent())
        assert {n: ledger(folder, n) for n in (1, 2)} == expected, relative


def test_a_whole_dataset_is_whole_and_nothing_is_done(folder: Path) -> None:
    before = {p: p.read_bytes() for p in every_file(folder) and (folder / "dataset").rglob("*.*") if p.is_file()}
    found = look(folder)
    assert not found.damaged and found.findings == () and found.snapshots == (1, 2)
    assert found.files == len([p for p in every_file(folder) if p.suffix == ".parquet"])
    done = mend(folder)
    assert (done.done, done.lost, done.run) == ([], [], None)
    assert {p: p.read_bytes() for p in before} == before


def test_quick_sees_sizes_but_no_flips(folder: Path) -> None:
    first, second, third = data_files(folder, "pairs")
    flip(random.Random(1))(first)
    os.truncate(second, 10)
    third.unlink()
    kinds = {f.path: f.kind for f in look(folder, quick=True).findings}
    assert sorted(kinds.values()) == [Kind.MISSING, Kind.TRUNCATED]
    assert Kind.FLIPPED in {f.kind for f in look(folder).findings}


def test_findings_say_who_needs_the_file(folder: Path) -> None:
    root = folder / "dataset"
    old = next(iter(dataset_of(folder).snapshot(1).files("pairs")))
    new = next(f for f in dataset_of(folder).snapshot(2).files("pairs") if f.shard == 2)
    for file in (old, new):
        flip(random.Random(0))(Path(file.path))
    found = {f.path: (f.kind, f.table, f.shard, f.current, f.snapshots) for f in look(folder).findings}
    assert found[str(Path(old.path).relative_to(root))] == (Kind.FLIPPED, "pairs", 0, True, (1, 2))
    assert found[str(Path(new.path).relative_to(root))] == (Kind.FLIPPED, "pairs", 2, True, (2,))


def test_strays_are_counted_and_are_no_damage(folder: Path) -> None:
    root = folder / "dataset"
    (root / "pairs" / "shard=0" / "pairs-1-abc.123.tmp").write_bytes(b"x" * 5)
    (root / "_work").mkdir(exist_ok=True)
    (root / "_work" / "1-0-0").touch()
    stray = data_files(folder, "words-*")[0]
    shutil.copy(stray, stray.with_name(f"part-{'0' * 32}.parquet"))
    found = look(folder)
    assert not found.damaged
    assert found.counts == {"leftover": 2, "orphan": 1} and found.total(Kind.ORPHAN) == stray.stat().st_size


# -- what a run does on a damaged dataset -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["missing", "truncated", "footer", "page"])
@pytest.mark.parametrize("table", ["pairs", "words-*", "images-*", "ledger"])
def test_a_run_on_a_damaged_file_ends_with_advice_and_leaves_the_snapshot(folder: Path, table: str, how: str) -> None:
    path = data_files(folder, table)[0]
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        os.truncate(path, len(data) // 2)
    else:
        data[-6 if how == "footer" else 200] ^= 16  # the footer's length; a page at the beginning
        path.write_bytes(data)
    rows = pq.read_table(folder / "urls.parquet")
    more = pa.table({"url": ["http://127.0.0.1:9/x.jpg"], "text": ["a text that is new"]})
    pq.write_table(pa.concat_tables([rows.select(["url", "text"]), more]), folder / "urls.parquet")
    if table == "ledger":  # a run does not need old ledgers; readers do
        with pytest.raises(StoreError, match=r"pairmill verify .*--repair"):
            ledger(folder)
        return
    with pytest.raises(StoreError, match=r"pairmill verify .*--repair"):
        refresh(run_config(folder), Silent())
    assert [record.id for record in dataset_of(folder).snapshots()] == [1, 2]


def test_flips_in_pages_are_never_read_as_values(folder: Path) -> None:
    dataset = dataset_of(folder)
    chance = random.Random(5)
    for table in ("pairs", "images-*", "weigh-*"):
        path = data_files(folder, table)[0]
        whole = path.read_bytes()
        name = path.relative_to(folder / "dataset").parts[0]
        file = next(f for f in files_at(dataset, name) if f.path == str(path))
        schema = pq.read_schema(path).remove_metadata()
        good = read_files(dataset, [file], schema, schema.names)
        footer = int.from_bytes(whole[-8:-4], "little") + 8
        caught = 0
        for _ in range(60):
            data = bytearray(whole)
            data[chance.randrange(4, len(data) - footer)] ^= 1 << chance.randrange(8)
            path.write_bytes(data)
            try:
                same = read_files(dataset, [file], schema, schema.names).equals(good)
            except StoreError:
                caught += 1
            else:
                assert same, "a flipped byte was read as another value"
        assert caught > 40
        path.write_bytes(whole)


# -- stages: images ---------------------------------------------------------------------------------------------------


def test_images_are_fetched_again_and_only_those_of_the_damaged_file(folder: Path, web: ProceduralWeb) -> None:
    flip(random.Random(2))(data_files(folder, "images-*")[0])
    web.requests.clear()
    done = mend(folder)
    assert not done.after.damaged and done.run is not None
    images = query(dataset_of(folder).snapshot(), "SELECT url, shard FROM pairs WHERE status = 'kept'").to_pylist()
    fetched = {row["url"] for row in images if row["shard"] == 0}
    assert fetched and fetched <= set(web.requests)
    assert not {row["url"] for row in images if row["shard"] != 0} & set(web.requests)
    assert done.run.computed["images"] >= done.run.computed["weigh"] == len(fetched), "it depends on the images"
    assert "words" not in done.run.computed and "chars" not in done.run.computed


def test_images_that_are_other_ones_now_are_measured_anew_and_old_snapshots_say_so(calm: Path, tmp_path: Path) -> None:
    with ProceduralWeb(PAIRS, seed=9, proportions={}) as web:
        web.write(tmp_path)
        refresh(run_config(tmp_path), Silent())
        first = dataset_of(tmp_path).snapshot(1)
        rows = query(first, "SELECT url, uid, contrast FROM pairs WHERE shard = 0 AND status = 'kept'").to_pylist()
        web.change([rows[0]["url"]])
        data_files(tmp_path, "images-*")[0].unlink()
        done = mend(tmp_path)
    new = query(dataset_of(tmp_path).snapshot(2), "SELECT uid, contrast FROM pairs").to_pylist()
    weight = {row["uid"]: row["contrast"] for row in new}
    assert weight[rows[0]["uid"]] != rows[0]["contrast"], "its weight is that of the new image"
    assert all(weight[row["uid"]] == row["contrast"] for row in rows[1:])
    (left,) = done.after.damage
    assert (left.kind, left.current, left.snapshots) == (Kind.MISSING, False, (1,))
    accepted = mend(tmp_path, accept_loss=True)
    assert not accepted.after.damaged
    assert query(dataset_of(tmp_path).snapshot(1), "SELECT count(image) FROM images").to_pylist() == [
        {"count(image)": PAIRS}
    ]


def test_images_that_are_gone_are_marked_and_not_lost(tmp_path: Path) -> None:
    with ProceduralWeb(PAIRS, seed=9, proportions={}) as web:
        web.write(tmp_path)
        refresh(run_config(tmp_path), Silent())
    os.truncate(data_files(tmp_path, "images-*")[0], 100)  # and the web is gone
    done = mend(tmp_path)
    assert done.run is not None and done.run.snapshot is not None
    reasons = query(
        dataset_of(tmp_path).snapshot(), "SELECT DISTINCT reason FROM pairs WHERE shard = 0 AND status <> 'kept'"
    ).to_pylist()
    assert reasons == [{"reason": "http.connection"}]
    assert done.run.snapshot.admitted == PAIRS == done.run.snapshot.kept + sum(done.run.snapshot.reasons.values())
    assert all(not f.current for f in done.after.damage), "the latest versions are whole"


def test_what_depends_on_images_and_on_captions_is_known(tmp_path: Path) -> None:
    plan = compile_plan(load_recipe(run_config(tmp_path, recipe="capfilt")))
    of = {name.rpartition("-")[0]: name for name in plan.tables}
    after_images = {name.rpartition("-")[0] for name in dependents(plan, plan.columns["image"])}
    after_captions = {name.rpartition("-")[0] for name in dependents(plan, plan.columns["captions"])}
    assert plan.columns["captions"].rpartition("-")[0] in after_images
    assert after_captions < after_images < set(of)
    assert plan.columns["caption_clip_scores"].rpartition("-")[0] in after_captions


# -- pairs ------------------------------------------------------------------------------------------------------------


def test_pairs_come_back_byte_for_byte_also_where_a_url_stands_across_two_shards(tmp_path: Path) -> None:
    urls = [f"http://host.example/{i // 4}.jpg" for i in range(40)]
    order = random.Random(1).sample(range(40), 40)
    table = pa.table({"url": [urls[i] for i in order], "text": [f"three words {i}" for i in order]})
    pq.write_table(table, tmp_path / "urls.parquet")
    config = steps_config(tmp_path, tmp_path / "urls.parquet", shard_size=7)
    refresh(config, Silent())
    files = data_files(tmp_path, "pairs")
    whole = {p: p.read_bytes() for p in files}
    for path in files:
        flip(random.Random(4))(path)
    done = repair(dataset_of(tmp_path), Silent())
    assert not done.after.damaged and len(files) > 4
    assert {p: p.read_bytes() for p in files} == whole


def test_pairs_of_a_changed_source_come_back_in_another_file_and_are_known(folder: Path) -> None:
    rows = pq.read_table(folder / "urls.parquet")
    pq.write_table(rows.take(list(reversed(range(PAIRS)))), folder / "urls.parquet")
    expected = ledger(folder)
    data_files(folder, "pairs")[0].unlink()
    done = mend(folder)
    assert done.lost == [] and ledger(folder) == expected
    (left,) = done.after.damage
    assert (left.current, left.snapshots) == (False, (1, 2))
    assert refresh(run_config(folder), Silent()).admitted_new == 0
    refreshes = query(dataset_of(folder).snapshot(), "SELECT DISTINCT shard, refresh FROM pairs ORDER BY 1").to_pylist()
    assert [row["refresh"] for row in refreshes] == [1, 1, 2], "which refresh admitted them is kept"
    assert not mend(folder, accept_loss=True).after.damaged
    assert ledger(folder, 1), "old snapshots can be read again"


def test_pairs_that_the_sources_hold_no_more_are_named_and_given_up_only_when_asked(folder: Path) -> None:
    dataset = dataset_of(folder)
    known = query(dataset.snapshot(), "SELECT uid, url, text, shard FROM pairs").to_pylist()
    rows = pq.read_table(folder / "urls.parquet")
    gone = {row["uid"] for row in known if row["shard"] == 0} & {
        row["uid"] for row in known if row["url"] == rows.column("url")[0].as_py()
    }
    pq.write_table(rows.slice(1), folder / "urls.parquet")
    flip(random.Random(3))(data_files(folder, "pairs")[0])
    before = {p: p.read_bytes() for p in (folder / "dataset").rglob("*.parquet")}
    first = mend(folder)
    (loss,) = first.lost
    assert set(loss.uids) == gone and not loss.accepted and first.after.damaged and first.run is None
    assert {p: p.read_bytes() for p in before} == before, "nothing was given up"
    second = mend(folder, accept_loss=True)
    assert second.lost[0].accepted and second.run is not None and second.run.snapshot is not None
    assert second.run.snapshot.admitted == PAIRS - len(gone)
    for table in ("pairs", "texts", "images"):
        uids = {r["uid"] for r in query(dataset.snapshot(), f"SELECT uid FROM {table}").to_pylist()}
        assert not uids & gone, table


def test_a_source_that_is_away_stops_the_repair_before_anything_is_taken_out(folder: Path) -> None:
    (folder / "urls.parquet").unlink()
    flip(random.Random(3))(data_files(folder, "pairs")[0])
    flip(random.Random(3))(data_files(folder, "words-*")[0])
    versions = {t: dataset_of(folder).table(t, fields.PAIRS).version() for t in dataset_of(folder).tables()}
    with pytest.raises(SourceError, match=r"--set source\.0\.path"):
        mend(folder)
    assert versions == {t: dataset_of(folder).table(t, fields.PAIRS).version() for t in versions}


def test_a_recipe_that_is_away_is_said_and_nothing_is_taken_out(folder: Path) -> None:
    flip(random.Random(3))(data_files(folder, "words-*")[0])
    before = look(folder).findings
    with pytest.raises(ConfigError, match=r"the config of snapshot 2 cannot be used.*no such|there is no"):
        mend(folder, recipe="tests.no_such_recipe:recipe")
    with pytest.raises(ConfigError, match="another one now"):
        repair(dataset_of(folder), Silent(), overrides=["download.max_pixels=1MP", "download.resize.size=64"])
    assert look(folder).findings == before


# -- records ----------------------------------------------------------------------------------------------------------


def test_lost_records_are_kept_until_the_loss_is_accepted(folder: Path) -> None:
    expected = ledger(folder)
    first, second = dataset_of(folder).snapshot(), data_files(folder, "snapshots")
    flip(random.Random(1))(second[-1])
    done = mend(folder)
    assert [loss.accepted for loss in done.lost] == [False] and "snapshots (2)" in done.lost[0].detail
    assert done.after.damaged
    done = mend(folder, accept_loss=True)
    assert not done.after.damaged
    assert [r.id for r in dataset_of(folder).snapshots()] == [1, 2], "the state of the lost one is published again"
    assert ledger(folder) == expected and dataset_of(folder).snapshot().record.tables == first.record.tables


def test_lost_tombstones_are_said_loudly(folder: Path) -> None:
    dataset = dataset_of(folder)
    row = {"kind": "uid", "hash": "0" * 64, "request": "r", "at": "2026-01-01T00:00:00+00:00", "done": False}
    dataset.records(TOMBSTONES_TABLE, TOMBSTONES).append([row])
    os.truncate(data_files(folder, TOMBSTONES_TABLE)[0], 100)
    done = mend(folder)
    assert "may come back" in done.lost[0].detail and done.after.damaged
    with pytest.raises(StoreError):
        refresh(run_config(folder), Silent())


def test_a_torn_record_of_a_tombstone_is_made_whole_and_not_set_aside(folder: Path) -> None:
    dataset = dataset_of(folder)
    records = dataset.records(TOMBSTONES_TABLE, TOMBSTONES)
    for uid in ("1" * 64, "2" * 64):
        row = {"kind": "uid", "hash": uid, "request": uid[:4], "at": "2026-01-01T00:00:00+00:00", "done": True}
        records.append([row])
    last = sorted((folder / "dataset" / TOMBSTONES_TABLE / "_delta_log").glob("*.json"))[-1]
    last.write_bytes(b"")
    assert not mend(folder).after.damaged
    assert {row["hash"] for row in records.rows()} == {"1" * 64, "2" * 64}


# -- logs -------------------------------------------------------------------------------------------------------------


def test_a_torn_commit_that_no_snapshot_needs_is_set_aside(folder: Path) -> None:
    table = next((folder / "dataset").glob("words-*"))
    expected = ledger(folder)
    for name, data in (("3", b""), ("4", b'{"commitInfo":{"timesta')):
        (table / "_delta_log" / f"{int(name):020d}.json").write_bytes(data)
    found = look(folder)
    assert [(f.kind, f.snapshots) for f in found.damage] == [(Kind.TORN_COMMIT, ()), (Kind.TORN_COMMIT, ())]
    done = mend(folder)
    assert not done.after.damaged and done.after.counts == {"leftover": 2}
    assert ledger(folder) == expected


@pytest.mark.parametrize("table", ["pairs", "ledger", "words-*"])
def test_a_run_takes_no_record_for_torn_that_a_snapshot_needs(folder: Path, table: str) -> None:
    """Its number would come to stand for another version, which the snapshot would then read."""
    log = next((folder / "dataset").glob(table)) / "_delta_log" / f"{2:020d}.json"
    os.truncate(log, log.stat().st_size // 2)
    with pytest.raises(StoreError, match=r"pairmill verify .*--repair"):
        refresh(run_config(folder), Silent())
    assert not mend(folder).after.damaged and not refresh(run_config(folder), Silent()).published


def test_a_run_sets_a_torn_record_aside_that_nobody_needs(folder: Path) -> None:
    table = next((folder / "dataset").glob("words-*"))
    (table / "_delta_log" / f"{3:020d}.json").write_bytes(b'{"commitInfo":{"timesta')
    assert not refresh(run_config(folder), Silent()).published
    assert look(folder).counts == {"leftover": 1}


def test_single_flips_in_logs_are_harmless_or_found_and_mended(calm: Path, tmp_path: Path) -> None:
    """Many flips: what the tables say afterwards is what they said before."""
    chance = random.Random(11)
    logs = [p for p in every_file(calm) if p.suffix == ".json" and p.parts[0] in ("pairs", "ledger", "snapshots")]
    shutil.copytree(calm, tmp_path / "copy")
    dataset = dataset_of(tmp_path / "copy")
    said = {(table, v): files_at(dataset, table, v) for table in ("pairs", "ledger", "snapshots") for v in (1, 2)}
    mended = 0
    for relative in (chance.choice(logs) for _ in range(40)):
        path = tmp_path / "copy" / "dataset" / relative
        whole = path.read_bytes()
        flip(chance)(path)
        if look(tmp_path / "copy").damaged:
            done = repair(dataset, Silent(), overrides=[f"source.0.path={tmp_path / 'copy' / 'urls.parquet'}"])
            assert not done.after.damaged, (relative, done.after.damage)
            mended += 1
        assert {key: files_at(dataset, *key) for key in said} == said, (relative, path.read_bytes())
        path.write_bytes(whole)
    assert mended > 10


def test_checkpoints_are_looked_at_and_made_needless(folder: Path) -> None:
    from deltalake import DeltaTable

    expected = ledger(folder)
    DeltaTable(str(folder / "dataset" / "ledger")).create_checkpoint()
    assert not look(folder).damaged
    (checkpoint,) = (folder / "dataset" / "ledger" / "_delta_log").glob("*.checkpoint.parquet")
    os.truncate(checkpoint, 100)
    assert [f.kind for f in look(folder).damage] == [Kind.UNREADABLE]
    assert not mend(folder).after.damaged and not checkpoint.exists()
    assert ledger(folder) == expected and ledger(folder, 1)


def test_several_records_lost_in_a_row_are_not_guessed(folder: Path) -> None:
    expected = ledger(folder)
    table = next((folder / "dataset").glob("weigh-*"))
    shutil.rmtree(table / "_delta_log")
    assert {f.kind for f in look(folder).damage} == {Kind.LOG_GAP}
    done = mend(folder)
    assert not done.lost[0].accepted and done.after.damaged
    done = mend(folder, accept_loss=True)
    assert done.run is not None and ledger(folder) == expected


def test_damage_in_several_places_at_once(calm: Path, tmp_path: Path) -> None:
    """A record that is gone hides what it said: of files that are damaged, too, and of versions that are needed."""
    expected = {n: ledger(calm, n) for n in (1, 2)}
    chance = random.Random(20)
    candidates = [p for p in every_file(calm) if p.parts[0] != "snapshots"]
    for _ in range(12):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(calm, folder)
        chosen = {path: chance.choice((flip, truncate, remove)) for path in chance.sample(candidates, 3)}
        for path, how in chosen.items():
            how(chance)(folder / "dataset" / path)
        done = mend(folder)
        told = {str(path): how.__name__ for path, how in chosen.items()}, done.lost, done.after.damage
        assert not done.lost and not done.after.damaged, told
        assert {n: ledger(folder, n) for n in (1, 2)} == expected, told


def test_pairs_whose_record_is_gone_with_them_are_missed_and_rebuilt(folder: Path) -> None:
    expected = ledger(folder)
    first = data_files(folder, "pairs")[0]
    log = first.parent.parent / "_delta_log" / f"{1:020d}.json"
    log.unlink()
    first.unlink()
    done = mend(folder)
    assert ledger(folder) == expected, "the ledger knew them"
    assert [(f.kind, f.current, f.snapshots) for f in done.after.damage] == [
        (Kind.MISMATCH, False, (1,)),
        (Kind.MISMATCH, False, (2,)),
    ], "old versions hold fewer pairs than their snapshots say"


def test_a_dataset_without_a_snapshot_is_mended_with_a_config(folder: Path) -> None:
    expected = ledger(folder)
    shutil.rmtree(folder / "dataset" / "snapshots")
    data_files(folder, "words-*")[0].unlink()
    with pytest.raises(StoreError, match="--repair"):
        refresh(run_config(folder), Silent())
    assert mend(folder).run is None
    path = folder / "config.yaml"
    path.write_text(json.dumps(run_config(folder).model_dump(mode="json", by_alias=True)))
    done = repair(dataset_of(folder), Silent(), config=str(path))
    assert not done.after.damaged and ledger(folder) == expected


# -- killed in the middle ---------------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys
from pairmill.integrity import repair
from pairmill.report.progress import Silent
from pairmill.store import Dataset

class Killer(Silent):
    left = int(sys.argv[3])
    def note(self, message):
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

repair(Dataset(sys.argv[1]), Killer(), overrides=[f"source.0.path={sys.argv[2]}"])
"""


def test_a_repair_that_is_killed_goes_on(folder: Path) -> None:
    expected = {n: ledger(folder, n) for n in (1, 2)}
    for table in ("pairs", "words-*", "images-*", "weigh-*", "ledger"):
        flip(random.Random(6))(data_files(folder, table)[1])
    log = sorted((folder / "dataset" / "ledger" / "_delta_log").glob("*.json"))[-1]
    os.truncate(log, 500)
    killed = 0
    for steps in range(0, 16, 2):
        command = [sys.executable, "-c", SCRIPT, str(folder / "dataset"), str(folder / "urls.parquet"), str(steps // 2)]
        killed += subprocess.run(command, check=False, cwd=Path.cwd()).returncode == -signal.SIGKILL
    assert killed > 3
    if look(folder).damaged:
        mend(folder)
    refresh(run_config(folder), Silent())
    assert not look(folder).damaged
    assert {n: ledger(folder, n) for n in (1, 2)} == expected == {1: expected[1], 2: ledger(folder)}


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_finds_mends_and_says_what_next(folder: Path) -> None:
    path, command = str(folder / "dataset"), CliRunner()
    whole = command.invoke(app, ["verify", path])
    assert whole.exit_code == 0 and "All is whole" in whole.stdout
    flip(random.Random(0))(data_files(folder, "words-*")[0])
    damaged = command.invoke(app, ["verify", path])
    assert damaged.exit_code == 1 and "flipped" in damaged.stdout and "--repair" in damaged.stdout
    as_json = json.loads(command.invoke(app, ["verify", path, "--json"]).stdout)
    assert as_json["damaged"] and as_json["counts"] == {"flipped": 1}
    assert command.invoke(app, ["verify", path, "--quick"]).exit_code == 0
    source = f"source.0.path={folder / 'urls.parquet'}"
    mended = command.invoke(app, ["verify", path, "--repair", "--set", source, "--json"])
    assert mended.exit_code == 0
    assert json.loads(mended.stdout)["computed"]["words"] > 0
    assert command.invoke(app, ["verify", path]).exit_code == 0


def test_the_command_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    for arguments in ([str(tmp_path)], [str(tmp_path), "--repair"]):
        with pytest.raises(ConfigError, match="no pairmill dataset"):
            CliRunner().invoke(app, ["verify", *arguments], catch_exceptions=False)


def test_files_without_a_checksum_in_their_name_are_counted(tmp_path: Path) -> None:
    table = write_urls(tmp_path / "urls.parquet", [f"three words {i}" for i in range(20)])
    refresh(steps_config(tmp_path, table), Silent())
    root = tmp_path / "dataset" / "pairs"
    (file,) = root.rglob("*.parquet")
    plain = file.with_name("pairs-old.parquet")
    log = root / "_delta_log" / f"{1:020d}.json"
    log.write_text(log.read_text().replace(file.name, plain.name))
    file.rename(plain)
    found = look(tmp_path)
    assert found.unnamed == 1 and not found.damaged
    data = bytearray(plain.read_bytes())
    data[100] ^= 1
    plain.write_bytes(data)
    assert [f.kind for f in look(tmp_path).damage] == [Kind.UNREADABLE], "its pages have checksums"


def test_rewrites_lead_to_the_file_that_stands_there_now(folder: Path) -> None:
    dataset = dataset_of(folder)
    old = dataset.snapshot(1).files("pairs")[0]
    Path(old.path).rename(Path(old.path).with_name("moved"))
    assert [f.kind for f in look(folder).damage] == [Kind.MISSING]
    row = {"table": "pairs", "old": old.relative, "new": None, "rows": 0, "size": 0}
    dataset.records(REWRITES_TABLE, REWRITES).append([row])
    (left,) = look(folder).damage
    assert left.current and left.snapshots == (), "old snapshots do not ask for it any more"


def test_facts_and_logs_of_a_whole_table(folder: Path) -> None:
    dataset = dataset_of(folder)
    log = read_log(dataset, "pairs")
    assert log.flaws == [] and sorted(log.versions) == [0, 1, 2] and log.refreshes == {0: 1, 1: 1, 2: 2}
    for file in files_at(dataset, "pairs"):
        assert fact(dataset, "pairs", file.relative) == file and checksum_of(dataset, file.path) == file.checksum
