"""A refresh end to end over texts: counts add up, only what is new is computed, a killed run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from pairmill.errors import ConfigError, DatasetLocked, StageFailed
from pairmill.execute import TextLedger
from pairmill.query import query
from pairmill.report.funnel import check_funnel
from pairmill.report.progress import Silent
from pairmill.run import load_config, parse_config, plan, refresh
from pairmill.store import Dataset, Snapshot, column_digests, read_files
from schemas import fields
from tests.steps import config, texts, write_urls


def ledger(snapshot: Snapshot) -> pa.Table:
    return read_files(snapshot.dataset, snapshot.files("ledger"), fields.LEDGER, [*fields.LEDGER.names, "shard"])


def digests(root: Path) -> dict[str, str]:
    return column_digests(ledger(Dataset(str(root / "dataset")).snapshot()))


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_counts_add_up_and_every_pair_has_one_row(tmp_path: Path):
    run = config(tmp_path, write_urls(tmp_path / "urls.parquet", texts(450)))
    report = refresh(run, Silent())
    record = report.snapshot
    assert record is not None and report.published
    assert record.admitted == 450 == record.kept + sum(record.reasons.values())
    assert record.dropped == sum(record.reasons.values()) and record.deferred == 0
    # by hand: texts of 0, 1 and 2 words go (3 of 10); each text of 9 words... repeats none, as it is shorter by nature
    expected = Counter("text.too_few_words" for t in texts(450) if len(t.split()) < 3)
    long = [t for t in texts(450) if len(t.split()) >= 3]
    expected["duplicate.bytes"] = len(long) - len(set(long))
    assert record.reasons == {k: v for k, v in expected.items() if v}
    rows = ledger(Snapshot(Dataset(run.dataset), record))
    assert rows.num_rows == 450 and len(set(rows["uid"].to_pylist())) == 450
    for step, following in zip(record.funnel, record.funnel[1:], strict=False):
        assert step["left"] == step["entered"] - sum(step["reasons"].values()) == following["entered"]


def test_nothing_new_does_nothing_and_says_so(tmp_path: Path):
    run = config(tmp_path, write_urls(tmp_path / "urls.parquet", texts(200)))
    first = refresh(run, Silent())
    notes = Notes()
    second = refresh(run, notes)
    assert not second.published and second.computed == {} and second.snapshot == first.snapshot
    assert any("nothing new" in note for note in notes.notes)


def test_a_changed_threshold_computes_only_newly_live_rows(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", texts(300))
    refresh(config(tmp_path, table), Silent())
    relaxed = refresh(config(tmp_path, table, options={"words": 2}), Silent())
    assert "words" not in relaxed.computed
    assert relaxed.computed["chars"] == sum(len(t.split()) == 2 for t in texts(300))
    tightened = refresh(config(tmp_path, table, options={"words": 3}), Silent())
    assert tightened.computed == {}
    assert tightened.snapshot is not None and tightened.snapshot.id == 3


def test_a_changed_stage_recomputes_itself_and_what_reads_it(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", texts(200))
    first = refresh(config(tmp_path, table), Silent())
    second = refresh(config(tmp_path, table, options={"scale": 2}), Silent())
    assert set(second.computed) == {"chars", "rank"}
    assert second.computed["chars"] == first.computed["chars"]


def test_a_grown_and_reordered_list_admits_only_what_is_new(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", texts(200))
    first = refresh(config(tmp_path, table), Silent())
    import pyarrow.parquet as pq

    rows = pq.read_table(table)
    more = pa.table({"url": ["http://new.example/1"] * 2, "text": ["one two three four", "five six seven"]})
    pq.write_table(pa.concat_tables([more, rows.slice(100), rows.slice(0, 100), rows.slice(0, 5)]), table)
    second = refresh(config(tmp_path, table), Silent())
    assert (second.admitted_new, second.known, second.repeated) == (2, 205, 0)
    assert second.computed["words"] == 2
    before = ledger(Snapshot(Dataset(str(tmp_path / "dataset")), first.snapshot)).sort_by("uid")
    after = ledger(Snapshot(Dataset(str(tmp_path / "dataset")), second.snapshot))
    uids = set(before["uid"].to_pylist())
    kept_rows = after.filter(pa.array([u in uids for u in after["uid"].to_pylist()])).sort_by("uid")
    assert kept_rows.equals(before), "old pairs keep their shard and verdict"


def test_old_snapshots_stay_readable(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", texts(200))
    first = refresh(config(tmp_path, table), Silent()).snapshot
    assert first is not None
    old = ledger(Dataset(str(tmp_path / "dataset")).snapshot(1))
    refresh(config(tmp_path, table, options={"words": 6}), Silent())
    assert ledger(Dataset(str(tmp_path / "dataset")).snapshot(1)).equals(old)
    assert ledger(Dataset(str(tmp_path / "dataset")).snapshot(2)).num_rows == 200
    with pytest.raises(ConfigError, match="has no snapshot 9; it has 1, 2"):
        Dataset(str(tmp_path / "dataset")).snapshot(9)


def test_a_poisoned_row_is_quarantined_and_counted(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", [*texts(150), "a poison pill of words"])
    record = refresh(config(tmp_path, table), Silent()).snapshot
    assert record is not None and record.reasons["error.kernel"] == 1
    assert record.admitted == 151 == record.kept + sum(record.reasons.values())


def test_too_many_failures_stop_the_run_but_keep_what_was_done(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", [*texts(100), *(f"poison {i} is in here" for i in range(60))])
    with pytest.raises(StageFailed, match="ValueError: a poisoned text"):
        refresh(config(tmp_path, table), Silent())
    log = tmp_path / "log"
    allowed = config(tmp_path, table, errors={"min_rows": 100}, options={"log": str(log)})
    record = refresh(allowed, Silent()).snapshot
    assert record is not None and record.reasons["error.kernel"] == 60
    assert len(set(log.read_text().split())) == 60, "the first shard was committed before the run stopped"


def test_no_rows_and_no_live_rows_are_no_errors(tmp_path: Path):
    empty = refresh(config(tmp_path, write_urls(tmp_path / "none.parquet", [])), Silent())
    assert empty.snapshot is None and not empty.published
    none_live = refresh(config(tmp_path, write_urls(tmp_path / "short.parquet", ["a", "b c"])), Silent())
    assert none_live.snapshot is not None and none_live.snapshot.kept == 0


def test_plan_says_what_would_run_and_changes_nothing(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", texts(200))
    before = plan(config(tmp_path, table), Silent())
    assert before.new_rows == 200 and not (tmp_path / "dataset").exists()
    refresh(config(tmp_path, table), Silent())
    after = {s["step"]: s for s in plan(config(tmp_path, table), Silent()).steps}
    assert after["words"]["rows_done"] == 200 and after["words"]["note"] == "up to date"
    relaxed = {s["step"]: s for s in plan(config(tmp_path, table, options={"words": 2}), Silent()).steps}
    assert relaxed["words"]["rows_todo"] == 0 and relaxed["chars"]["rows_todo"] == 20


def spoken(count: int) -> list[str]:
    """Texts that are not empty."""
    return [t for t in texts(2 * count) if t][:count]


MIXES = (
    {"recipe": "capfilt"},
    {"recipe": "capfilt", "keep.itm": ">= 0.7"},
    {"recipe": "capfilt", "clip": ">= 0.5", "top": 1},
    {"recipe": "blip2"},
    {"recipe": "laion_coco"},
    {"recipe": "nguyen23"},
    {"recipe": "nguyen23", "clip": ">= 0.5"},
    {"recipe": "recap"},
    {"recipe": "web_only"},
    {"recipe": "synthetic_only"},
)


def test_another_mixing_recipe_runs_no_stage_and_publishes_another_choice(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", spoken(300))
    first = refresh(config(tmp_path, table, recipe="tests.mixing_steps:recipe"), Silent())
    assert set(first.computed) == {"words", "chars", "describe", "score"}
    choices = set()
    for number, given in enumerate(MIXES, 1):
        mix = {key: value for key, value in given.items() if key != "keep.itm"}
        changes = {"mix": mix, "keep": {"itm": given.get("keep.itm", ">= 0.5")}}
        report = refresh(config(tmp_path, table, recipe="tests.mixing_steps:recipe", **changes), Silent())
        record = report.snapshot
        assert (
            record is not None and record.id == number and (number == 1 or (report.published and not report.computed))
        )
        check_funnel(record)
        rows = ledger(Dataset(str(tmp_path / "dataset")).snapshot())
        choices.add(str(rows["text_ranks"].to_pylist()))
        # every pair that came to the mix has a rank or a reason for each of its four texts, and they are counted
        counted = Counter[str]()
        for row in rows.to_pylist():
            if row["text_ranks"] is None:
                assert row["reason"].startswith("text.")  # no text has gone past the mix
                continue
            for rank, reason in zip(row["text_ranks"], row["text_reasons"], strict=True):
                assert (rank is None) != (reason is None)
                counted[reason or "kept"] += 1
            ranks = sorted(r for r in row["text_ranks"] if r is not None)
            assert ranks == list(range(len(ranks)))
            assert (row["reason"] == "text.none_kept") == (not ranks) and (ranks or row["detail"])
        (entry,) = [e for e in record.funnel if e["step"] == "mix"]
        assert sum(counted.values()) == 4 * entry["entered"] == 4 * 300
        assert counted == sum(map(Counter, entry["texts"].values()), Counter())
    assert len(choices) == len(MIXES)


def test_the_first_mixing_recipe_comes_back_as_it_was(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", spoken(120))
    for mix in ({}, {"recipe": "blip2"}, {}):
        refresh(config(tmp_path, table, recipe="tests.mixing_steps:recipe", mix=mix), Silent())
    one, other = (ledger(Dataset(str(tmp_path / "dataset")).snapshot(n)) for n in (1, 3))
    assert column_digests(one) == column_digests(other)


def test_rules_over_texts_judge_the_alt_text_where_texts_are_mixed(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", spoken(100))
    refresh(config(tmp_path, table, recipe="tests.mixing_steps:recipe", keep={"itm": None}), Silent())
    snapshot = Dataset(str(tmp_path / "dataset")).snapshot()
    found = query(snapshot, "SELECT text, kept, reason FROM texts WHERE source = 'web'").to_pylist()
    short = [row for row in found if 0 < len(row["text"].split()) < 3]
    assert short and all(row["reason"] == "text.too_few_words" for row in short)
    kept = query(snapshot, "SELECT text, caption FROM pairs WHERE status = 'kept'").to_pylist()
    few = [row for row in kept if len(row["text"].split()) < 3]
    assert few and all(row["caption"] != row["text"] for row in few)
    assert any(row["caption"] == row["text"] for row in kept)


def test_a_dataset_from_before_there_was_mixing_is_refreshed(tmp_path: Path, monkeypatch):
    table = write_urls(tmp_path / "urls.parquet", spoken(100))
    columns = [f for f in fields.LEDGER if not f.name.startswith("text_")]
    plain = TextLedger.columns
    with monkeypatch.context() as old:
        old.setattr(fields, "LEDGER", pa.schema(columns))
        old.setattr(TextLedger, "columns", lambda self: {})
        refresh(config(tmp_path, table), Silent())
    assert TextLedger.columns is plain
    opened = Dataset(str(tmp_path / "dataset"))
    before = query(opened.snapshot(), "FROM texts ORDER BY ALL")
    assert before.num_rows == 100
    report = refresh(config(tmp_path, table, recipe="tests.mixing_steps:recipe"), Silent())
    assert set(report.computed) == {"describe", "score", "chars"}
    assert query(opened.snapshot(), "SELECT count(*) AS n FROM texts WHERE source = 'blip'").to_pylist() == [{"n": 300}]
    assert query(opened.snapshot(1), "FROM texts ORDER BY ALL").equals(before)


def test_a_second_writer_is_refused_with_the_name_of_the_first(tmp_path: Path):
    run = config(tmp_path, write_urls(tmp_path / "urls.parquet", texts(10)))
    with Dataset(run.dataset).lock(), pytest.raises(DatasetLocked, match=f"process {os.getpid()}"):
        refresh(run, Silent())
    assert refresh(run, Silent()).published, "the lock is free again"


def test_sigkill_at_any_point_then_the_same_snapshot_and_nothing_committed_is_computed_twice(tmp_path: Path):
    """Five kills at different moments of one run, then a run to the end: equal to an undisturbed run."""
    table = write_urls(tmp_path / "urls.parquet", texts(2000))
    (tmp_path / "calm").mkdir()
    refresh(config(tmp_path / "calm", table), Silent())
    log = tmp_path / "log"
    script = (
        "import sys, time; sys.path.insert(0, '.')\n"
        "from pathlib import Path; from tests.steps import config; from pairmill import run, execute\n"
        "from pairmill.report.progress import Silent\n"
        "run.COMMIT_EVERY_S = 0.0\n"
        "class Slow(Silent):\n"
        "    def advance(self, rows, dropped): print('shard', flush=True); time.sleep(0.05)\n"
        f"run.refresh(config(Path({str(tmp_path)!r}), Path({str(table)!r}), options={{'log': {str(log)!r}}}), Slow())\n"
    )
    for kill_after in (1, 2, 3, 4, 5):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(kill_after):
            if not process.stdout.readline():
                break
        time.sleep(0.01 * kill_after)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    refresh(config(tmp_path, table, options={"log": str(log)}), Silent())
    assert digests(tmp_path) == digests(tmp_path / "calm")
    counted = Counter(log.read_text().split())
    assert len(counted) == 2000
    # a kill loses at most the shard in work: nothing else is computed twice
    assert sum(counted.values()) <= 2000 + 5 * 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset: [", "is not valid YAML"),
        ("just a word", "must hold keys and values"),
        ("dataset: d\nsource: {path: p}\nkepe: {}", "kepe: unknown key; did you mean 'keep'"),
        ("dataset: d\nsource: {path: p, kind: url_tabel}", "url_tabel"),
        ("source: {kind: url_table, path: p}", "dataset: missing"),
        ("dataset: d\nsource: {kind: url_table, path: p}\nshard_size: many", "shard_size: .*given: 'many'"),
        ("dataset: d\nsource: {kind: url_table, path: p}\ndownload: {max_bytes: 3 elephants}", "is not a size"),
        ("dataset: d\nsource: {kind: url_table, path: p}\nkeep: {clip_score: hight}", "keep.clip_score"),
    ],
)
def test_wrong_configs_name_the_key(tmp_path: Path, text: str, message: str):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_config(str(path))


def test_overrides_are_yaml_and_reach_nested_keys(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("dataset: d\nsource: {kind: url_table, path: p}\n")
    run = load_config(str(path), ["keep.min_side=100", "download.max_bytes=1MiB", "keep.language=null"])
    assert (run.keep.min_side, run.download.max_bytes, run.keep.language) == (100, 2**20, None)
    with pytest.raises(ConfigError, match="write it as key=value"):
        load_config(str(path), ["keep.min_side"])
    with pytest.raises(ConfigError, match="is not a section"):
        load_config(str(path), ["dataset.x=1"])


def test_an_unknown_recipe_lists_those_there_are(tmp_path: Path):
    run = parse_config(
        {"dataset": str(tmp_path), "recipe": "clip_fliter", "source": {"kind": "url_table", "path": "p"}}
    )
    with pytest.raises(ConfigError, match=r"there is no 'clip_fliter'; there are: .*clip_filter"):
        refresh(run, Silent())
