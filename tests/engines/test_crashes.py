"""A native crash costs one row: the worker dies, the shard runs again in a child process, the guilty row is
quarantined."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pairmill.errors import EngineError, StoreError
from pairmill.execute import Care
from pairmill.isolate import MARKS
from pairmill.report.progress import Silent
from pairmill.run import refresh
from pairmill.store import Dataset, read_files
from schemas import fields
from tests.engines.failing_steps import OddError
from tests.steps import config, texts, write_urls

ENGINES = [{"kind": "local", "workers": 2}, {"kind": "ray", "address": "local"}]


def crashing_texts() -> list[str]:
    return [*texts(150), "abort the worker right here", *(f"and {t}" for t in texts(40)), "abort once more"]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: str(e["kind"]))
def test_rows_that_kill_their_worker_are_quarantined_and_the_run_ends(tmp_path: Path, engine: dict[str, object]):
    table = write_urls(tmp_path / "urls.parquet", crashing_texts())
    record = refresh(config(tmp_path, table, engine=engine, options={"words": 0}), Silent()).snapshot
    assert record is not None and record.reasons["error.crash"] == 2
    assert record.admitted == 192 == record.kept + sum(record.reasons.values())
    dataset = Dataset(record.config and str(tmp_path / "dataset"))
    ledger = read_files(dataset, dataset.snapshot().files("ledger"), fields.LEDGER, ["uid", "reason", "detail"])
    crashed = [r for r in ledger.to_pylist() if r["reason"] == "error.crash"]
    assert {r["detail"] for r in crashed} == {"words: its process died"}
    assert not list((tmp_path / "dataset" / MARKS).iterdir()), "no mark is left behind"


def test_a_crash_that_takes_the_driver_along_is_survived_by_the_next_run(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", crashing_texts())
    script = (
        "from pathlib import Path; from tests.steps import config; from pairmill.report.progress import Silent\n"
        "from pairmill.run import refresh\n"
        f"refresh(config(Path({str(tmp_path)!r}), Path({str(table)!r})), Silent())\n"
    )
    first = subprocess.run([sys.executable, "-c", script], check=False)
    assert first.returncode == 139
    assert list((tmp_path / "dataset" / MARKS).iterdir()), "the mark of the shard that was under way"
    record = refresh(config(tmp_path, table), Silent()).snapshot
    assert record is not None and record.reasons["error.crash"] == 2


def test_a_process_that_dies_while_loading_is_no_fault_of_a_row(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", texts(50))
    run = config(tmp_path, table, recipe="tests.steps:recipe_that_dies_at_open", engine=ENGINES[0])
    with pytest.raises(EngineError, match="dies while it loads or writes, not on a row"):
        refresh(run, Silent())


FAILS = "tests.engines.failing_steps:recipe_that_fails"


def mark(root: Path, shard: int) -> None:
    """As a worker leaves it that dies of this shard."""
    (root / "dataset" / MARKS).mkdir(parents=True)
    (root / "dataset" / MARKS / f"{shard}-0-0").touch()


@pytest.mark.parametrize("when", ["opening", "calling"])
def test_a_defect_of_the_code_is_no_crash_of_a_row(tmp_path: Path, when: str):
    table = write_urls(tmp_path / "urls.parquet", texts(15))
    run = config(tmp_path, table, recipe=FAILS, options={when: "mistype"})
    mark(tmp_path, 0)
    with pytest.raises(NameError, match="'wrods' is not defined") as raised:
        refresh(run, Silent())
    assert "failing_steps.py" in str(raised.value.__cause__), "where it was"
    record = refresh(config(tmp_path, table, recipe=FAILS), Silent()).snapshot
    assert record is not None and record.kept == record.admitted == 15


def test_a_worker_makes_room_for_the_child_that_runs_its_shard_again(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", texts(30))
    recipe = "tests.engines.failing_steps:recipe_on_a_device"
    run = config(tmp_path, table, recipe=recipe, shard_size=10, options={"device": str(tmp_path / "device")})
    mark(tmp_path, 1)
    record = refresh(run, Silent()).snapshot
    assert record is not None and record.kept == record.admitted == 30
    assert not list((tmp_path / "dataset" / MARKS).iterdir())


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_of_stores_and_libraries_arrive_as_what_they_say(tmp_path: Path, workers: int):
    table = write_urls(tmp_path / "urls.parquet", texts(15))
    engine = {"kind": "local", "workers": workers}
    with pytest.raises(StoreError, match="the bucket is closed"):
        refresh(config(tmp_path, table, recipe=FAILS, engine=engine, options={"opening": "refuse"}), Silent())
    # As itself where it travels: Dask, once imported, teaches pickle to take any exception along
    with pytest.raises((RuntimeError, OddError), match="the hub says 451"):
        refresh(config(tmp_path, table, recipe=FAILS, engine=engine, options={"opening": "be_odd"}), Silent())


def test_careful_parts_cover_all_rows_in_order():
    uids = [f"{i}" for i in range(20)]
    care = Care("", rows={"words": dict.fromkeys(uids[5:15], 3)}, crashed={"words": ["7", "19"]})
    parts = list(care.parts("words", uids))
    assert [i for rows, _ in parts for i in range(rows.start, rows.stop)] == list(range(20))
    assert [rows.start for rows, crashed in parts if crashed] == [7, 19]
    assert all(rows.stop - rows.start <= 3 for rows, _ in parts if 5 <= rows.start < 15)
