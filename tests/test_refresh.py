"""Refreshes over time: what comes again, what is tried again, what is asked for again, and what the plan says of it."""

from __future__ import annotations

import datetime
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pairmill import retry
from pairmill.errors import ConfigError
from pairmill.export import export_webdataset
from pairmill.export.verify import verify_export
from pairmill.procedural.web import Kind, ProceduralWeb
from pairmill.query import query
from pairmill.report.progress import Silent
from pairmill.run import load_config, plan, refresh
from pairmill.seen import SEEN
from pairmill.store import Dataset
from schemas.config import Retry
from tests.filters.random_clip import write_random_clip
from tests.steps import config, texts, write_urls
from tests.test_resume import main_config


class Lines(Silent):
    """Remembers what was noted."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


def test_a_source_that_did_not_change_is_not_read_again(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", texts(50))
    run = config(tmp_path, table)
    refresh(run, Silent())
    lines = Lines()
    report = refresh(run, lines)
    assert any("files are as they were" in line for line in lines.lines)
    assert (report.known, report.admitted_new, report.published) == (50, 0, False)
    rows = pq.read_table(table)
    pq.write_table(pa.concat_tables([rows, pa.table({"url": ["http://new.example/1"], "text": ["a b c d"]})]), table)
    report = refresh(run, Silent())
    assert (report.known, report.admitted_new) == (50, 1)
    Dataset(run.dataset).fs.rm(Dataset(run.dataset).path(SEEN))
    assert refresh(run, Silent()).known == 51, "the note only saves time"


def test_of_a_list_in_several_files_only_those_that_changed_are_read(tmp_path: Path):
    (tmp_path / "lists").mkdir()
    for name, start in (("a", 0), ("b", 20)):
        rows = {
            "url": [f"http://a.example/{i}" for i in range(start, start + 20)],
            "text": texts(40)[start : start + 20],
        }
        pq.write_table(pa.table(rows), tmp_path / "lists" / f"{name}.parquet")
    run = config(tmp_path, tmp_path / "lists" / "*.parquet")
    first = refresh(run, Silent())
    pq.write_table(pa.table({"url": ["http://a.example/x"], "text": ["a b c d"]}), tmp_path / "lists" / "a.parquet")
    lines = Lines()
    report = refresh(run, lines)
    assert (report.admitted_new, report.known) == (1, 20) and first.admitted_new == 40
    assert [line.rpartition("/")[2] for line in lines.lines if line.startswith("reading")] == ["a.parquet"]


def test_reordered_and_replaced_lists_admit_only_what_is_new(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", texts(60))
    run = config(tmp_path, table)
    first = refresh(run, Silent())
    rows = pq.read_table(table)
    pq.write_table(rows.take(pa.array(list(range(59, -1, -1)))), table)
    again = refresh(run, Silent())
    assert (again.admitted_new, again.known, again.published, again.computed) == (0, first.admitted_new, False, {})
    pq.write_table(pa.table({"url": ["http://other.example/x"], "text": ["one two three four five"]}), table)
    replaced = refresh(run, Silent())
    assert replaced.admitted_new == 1 and replaced.computed == {"words": 1, "chars": 1, "rank": 1}
    assert replaced.snapshot is not None and replaced.snapshot.admitted == first.admitted_new + 1, "nothing vanishes"


def test_the_plan_says_what_each_stage_will_do_and_why(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", texts(100))
    run = config(tmp_path, table)
    before = {step["step"]: step for step in plan(run, Silent()).steps}
    assert (before["words"]["rows_todo"], before["words"]["rows_at_most"]) == (0, 100)
    assert "up to 100 new rows" in before["words"]["note"]
    refresh(run, Silent())
    report = plan(run, Silent())
    assert all(step["note"] in ("up to date", "judged anew from stored columns") for step in report.steps)

    looser = {s["step"]: s for s in plan(config(tmp_path, table, options={"words": 1}), Silent()).steps}
    done = refresh(config(tmp_path, table, options={"words": 1}), Silent()).computed
    assert looser["chars"]["why"] == {"newly live": done["chars"]}
    assert looser["words"]["why"] == {}
    assert looser["rank"]["rows_at_most"] >= done["rank"]

    other = {s["step"]: s for s in plan(config(tmp_path, table, options={"words": 1, "scale": 2}), Silent()).steps}
    assert list(other["chars"]["why"]) == ["parameters changed"]
    done = refresh(config(tmp_path, table, options={"words": 1, "scale": 2}), Silent()).computed
    assert other["chars"]["rows_todo"] == done["chars"] and "words" not in done


def test_a_snapshot_records_what_it_cost(tmp_path: Path):
    run = config(tmp_path, write_urls(tmp_path / "urls.parquet", texts(50)))
    record = refresh(run, Silent()).snapshot
    assert record is not None and record.kind == "refresh"
    assert record.computed["words"] == 50 and set(record.stage_seconds) == {"words", "chars", "rank"}
    assert set(record.bytes) == set(record.tables) and all(size > 0 for size in record.bytes.values())
    assert Dataset(run.dataset).snapshots() == [record]


def test_waits_double_up_to_the_longest_and_end_after_the_last_attempt():
    knobs = Retry(first_s=100, longest_s=1000, attempts=7)
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
    waits = []
    for attempt in range(1, 7):
        at = retry.retry_at(knobs, attempt, "a" * 64, now)
        assert at is not None
        waits.append((datetime.datetime.fromisoformat(at) - now).total_seconds())
    assert [round(w / waits[0], 1) for w in waits[:4]] == [1.0, 2.0, 4.0, 8.0]
    assert 100 <= waits[0] <= 110 and waits[4] == waits[5] and 1000 <= waits[5] <= 1100
    assert retry.retry_at(knobs, 7, "a" * 64, now) is None
    asked = retry.retry_at(knobs, 1, "a" * 64, now, 5000.0)
    assert asked == retry.stamp(now + datetime.timedelta(seconds=5000)), "a server's Retry-After is honoured"
    mad = retry.retry_at(knobs, 1, "a" * 64, now, 1e8)
    assert mad == retry.stamp(now + datetime.timedelta(days=30)), "but not for years"
    assert retry.due({"it": retry.Attempt(1, mad)}, knobs, now, everything=False) == set()


def test_a_clock_that_went_wrong_keeps_no_pair_waiting_for_ever():
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
    known = {
        "past": retry.Attempt(1, "2025-12-31T00:00:00+00:00"),
        "soon": retry.Attempt(1, "2026-01-02T00:00:00+00:00"),
        "mad": retry.Attempt(1, "2199-01-01T00:00:00+00:00"),
        "spent": retry.Attempt(10, None),
    }
    assert retry.due(known, Retry(), now, everything=False) == {"past", "mad"}
    assert retry.due(known, Retry(), now, everything=True) == set(known)


def test_deferred_pairs_come_again_by_themselves_when_their_time_has_come(tmp_path: Path):
    with ProceduralWeb(120, seed=11, hang_s=3) as web:
        web.write(tmp_path)
        path = str(main_config(tmp_path, retry={"first_s": 0, "attempts": 3}))
        run = load_config(path)
        first = refresh(run, Silent()).snapshot
        assert first is not None and first.deferred > 0
        asked = "SELECT attempts, count(*) AS n FROM pairs WHERE status = 'deferred' GROUP BY 1"
        assert query(Dataset(run.dataset).snapshot(), asked).to_pylist() == [{"attempts": 1, "n": first.deferred}]
        steps = {step["step"]: step for step in plan(run, Silent()).steps}
        assert steps["images"]["why"] == {"retry": first.deferred}
        second = refresh(run, Silent())
        assert second.computed["images"] == first.deferred
        assert query(Dataset(run.dataset).snapshot(), asked).to_pylist() == [{"attempts": 2, "n": first.deferred}]
        assert refresh(run, Silent()).computed["images"] == first.deferred
        report = refresh(run, Silent())
        assert "images" not in report.computed, "three attempts were allowed"
        last = query(
            Dataset(run.dataset).snapshot(), "SELECT DISTINCT attempts, retry_at FROM pairs WHERE attempts > 0"
        )
        assert last.to_pylist() == [{"attempts": 3, "retry_at": None}]


def test_a_changed_image_becomes_a_new_one_with_history_and_only_it_is_measured_again(tmp_path: Path):
    with ProceduralWeb(120, seed=5, hang_s=3) as web:
        web.write(tmp_path)
        run = load_config(str(main_config(tmp_path, keep={"clip_score": None}, dedup={"semantic": 0.9})))
        refresh(run, Silent())
        with pytest.raises(ConfigError, match="no SQL condition"):
            refresh(run, Silent(), revisit="nonsense >")
        dataset = Dataset(run.dataset)
        old = {r["uid"]: r for r in query(dataset.snapshot(), "SELECT uid, sha256, clip_score FROM pairs").to_pylist()}
        stored = [u for u, r in old.items() if r["sha256"]]
        kept = [r.url for r in web.rows if r.kind is Kind.TRUE][:3]
        chosen = query(dataset.snapshot(), "SELECT uid, url FROM pairs WHERE sha256 IS NOT NULL").to_pylist()
        changed = {p["uid"] for p in chosen if p["url"] in kept}
        web.change([url for url in kept if any(p["url"] == url for p in chosen)])
        web.requests.clear()
        lines = Lines()
        report = refresh(run, lines, revisit="true")
        assert report.published and report.computed["revisit"] == len(stored)
        assert "images" not in report.computed and report.computed["clip"] <= len(changed)
        told = next(line for line in lines.lines if line.startswith("revisited"))
        assert f"{len(changed)} changed" in told
        assert sum(web.not_modified.values()) > 0, "what did not change costs no body"
        new = {r["uid"]: r for r in query(dataset.snapshot(), "SELECT uid, sha256, clip_score FROM pairs").to_pylist()}
        assert {u for u in old if old[u]["sha256"] != new[u]["sha256"]} == changed
        assert {u for u in old if old[u]["clip_score"] != new[u]["clip_score"]} <= changed
        history = query(
            dataset.snapshot(), "SELECT uid, sha256, new_sha256, after_snapshot FROM image_history"
        ).to_pylist()
        assert {h["uid"]: (h["sha256"], h["new_sha256"]) for h in history} == {
            u: (old[u]["sha256"], new[u]["sha256"]) for u in changed
        }
        before = query(dataset.snapshot(1), "SELECT uid, sha256 FROM images").to_pylist()
        assert {r["uid"]: r["sha256"] for r in before} == {u: old[u]["sha256"] for u in stored}, "old snapshots stand"
        quiet = refresh(run, Silent(), revisit="true")
        assert not quiet.published and quiet.computed == {"revisit": len(stored)}


def test_a_revisit_asks_only_for_what_it_was_told(tmp_path: Path):
    with ProceduralWeb(60, seed=5, hang_s=3) as web:
        web.write(tmp_path)
        run = load_config(str(main_config(tmp_path)))
        refresh(run, Silent())
        one = query(Dataset(run.dataset).snapshot(), "SELECT uid, url FROM pairs WHERE sha256 IS NOT NULL LIMIT 1")
        web.requests.clear()
        report = refresh(run, Silent(), revisit=f"uid = '{one['uid'][0].as_py()}'")
        assert report.computed == {"revisit": 1}
        assert {url for url in web.requests if not url.endswith("robots.txt")} == {one["url"][0].as_py()}


def spoil_images(dataset: Dataset) -> int:
    """Overwrite the stored bytes of every image in place, and nothing else of the files; how many bytes that was."""
    spoilt = 0
    table = dataset.snapshot().columns["image"]
    for file in dataset.snapshot().files(table):
        metadata = pq.read_metadata(file.path)
        column = metadata.schema.names.index("image")
        with open(file.path, "r+b") as opened:
            for group in range(metadata.num_row_groups):
                chunk = metadata.row_group(group).column(column)
                opened.seek(chunk.data_page_offset)
                opened.write(b"\xff" * chunk.total_compressed_size)
                spoilt += chunk.total_compressed_size
    return spoilt


def test_a_refresh_and_another_threshold_read_no_old_image_bytes(tmp_path: Path):
    with ProceduralWeb(150, seed=7, hang_s=3) as web:
        web.write(tmp_path)
        rows = pq.read_table(tmp_path / "urls.parquet")
        results = {}
        for name in ("calm", "spoilt"):
            pq.write_table(rows.slice(0, 120), tmp_path / "urls.parquet")
            knobs = {"dataset": str(tmp_path / name), "keep": {"clip_score": "top 70%"}, "dedup": {"semantic": 0.9}}
            path = str(main_config(tmp_path, **knobs))
            refresh(load_config(path), Silent())
            dataset = Dataset(str(tmp_path / name))
            if name == "spoilt":
                assert spoil_images(dataset) > 100_000
            pq.write_table(rows, tmp_path / "urls.parquet")
            grown = refresh(load_config(path), Silent())
            looser = refresh(load_config(path, ["keep.clip_score=top 90%"]), Silent())
            assert set(looser.computed) <= {"neighbours"}, "a threshold runs no model and no download"
            asked = "SELECT uid, status, reason, clip_score, duplicate_of FROM pairs ORDER BY uid"
            results[name] = (grown.computed, looser.computed, query(dataset.snapshot(), asked).to_pylist())
    assert results["spoilt"] == results["calm"]


def test_the_plan_names_a_changed_model_and_what_reads_its_columns(tmp_path: Path):
    with ProceduralWeb(40, seed=7, hang_s=3) as web:
        web.write(tmp_path)
        path = str(main_config(tmp_path, keep={"clip_score": None}))
        first = refresh(load_config(path), Silent())
        other = write_random_clip(tmp_path / "other")
        changed = load_config(path, [f"models.clip={{path: '{other}'}}"])
        steps = {step["step"]: step for step in plan(changed, Silent()).steps}
        assert steps["clip"]["why"] == {"model changed": first.computed["clip"]}
        assert steps["images"]["why"] == {} and steps["images"]["note"] == "up to date"
        assert steps["neighbours"]["rows_at_most"] >= first.computed["neighbours"]
        requests = dict(web.requests)
        assert refresh(changed, Silent()).computed["clip"] == first.computed["clip"]
        assert dict(web.requests) == requests, "another model downloads nothing"


def test_a_run_and_an_export_at_once(tmp_path: Path):
    with ProceduralWeb(150, seed=7, hang_s=3) as web:
        web.write(tmp_path)
        rows = pq.read_table(tmp_path / "urls.parquet")
        pq.write_table(rows.slice(0, 100), tmp_path / "urls.parquet")
        run = load_config(str(main_config(tmp_path, keep={"clip_score": None})))
        refresh(run, Silent())
        pq.write_table(rows, tmp_path / "urls.parquet")
        dataset = Dataset(run.dataset)
        with ThreadPoolExecutor() as pool:
            running = pool.submit(refresh, run, Silent())
            reports = []
            while not running.done() or len(reports) < 3:
                out = str(tmp_path / f"export-{len(reports)}")
                reports.append(export_webdataset(dataset.snapshot(1), out, pairs_per_shard=30))
                assert verify_export(out).ok
            assert running.result().published
        assert {report.samples for report in reports} == {dataset.snapshot(1).record.kept}
        first, *others = ((tmp_path / f"export-{i}" / "00000.tar").read_bytes() for i in range(len(reports)))
        assert all(other == first for other in others)
        after = export_webdataset(dataset.snapshot(), str(tmp_path / "export-0"), pairs_per_shard=30)
        assert after.previous == 1 and after.new and verify_export(str(tmp_path / "export-0")).ok
