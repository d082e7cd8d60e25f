"""Where the wall time of a run went: the parts add up to it, and are those that they are called."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pairmill import run as running
from pairmill.engines import open_engine
from pairmill.execute import Unit
from pairmill.report.progress import Silent
from pairmill.run import refresh
from pairmill.spent import PARTS, STAGES, Spent, engine_share, in_words
from tests.steps import config, texts, write_urls

PAUSE_S = 0.02


def unit(**seconds: float) -> Unit:
    """One that a worker had for `busy` seconds."""
    kernels = {"a": seconds.pop("a", 0.0), "b": seconds.pop("b", 0.0)}
    return Unit(0, "", {}, seconds=kernels, **seconds)


def test_two_busy_workers_count_as_one_wall():
    spent = Spent()
    segment = spent.segment()
    begin = time.monotonic()
    time.sleep(0.1)
    for _ in range(2):
        segment.add(unit(a=0.03, b=0.01, loading=0.02, storing=0.01, busy=0.08))
    segment.finish(slots=2)
    wall = time.monotonic() - begin
    parts = spent.parts(1.0)
    assert [parts[p] for p in (STAGES, "loading", "store", "verdicts")] == [0.04, 0.02, 0.01, 0.01]
    assert parts["waiting"] == pytest.approx(wall - 0.08, abs=0.02)
    assert sum(parts.values()) == pytest.approx(1.0, abs=0.01) and list(parts) == [p for p in PARTS if p in parts]


def test_what_nothing_claims_is_the_drivers():
    spent = Spent()
    spent.add(STAGES, 3.0)
    with spent.on("publishing"):
        time.sleep(0.03)
    parts = spent.parts(4.0)
    assert 0.03 <= parts["publishing"] < 0.5
    assert parts["driver"] == pytest.approx(1.0 - parts["publishing"], abs=0.002)
    assert engine_share(parts) == pytest.approx(0.25)
    assert in_words(parts).startswith("75% in stages, ")
    assert engine_share({}) == 1.0 and in_words({}) == "0% in stages"


def test_a_unit_that_was_busier_than_the_wall_leaves_nothing_negative():
    spent = Spent()
    segment = spent.segment()
    segment.add(unit(a=5.0, busy=4.0))
    segment.finish(slots=0)  # an engine that never knew
    parts = spent.parts(5.0)
    assert sum(parts.values()) == pytest.approx(5.0, abs=0.01) and all(value > 0 for value in parts.values())


def test_a_cluster_that_grew_beyond_its_slots_adds_up():
    spent = Spent()
    segment = spent.segment()
    begin = time.monotonic()
    time.sleep(0.1)
    for _ in range(8):  # side by side
        segment.add(unit(a=0.06, storing=0.02, busy=0.08))
    segment.finish(slots=2)
    wall = time.monotonic() - begin
    parts = spent.parts(wall)
    assert sum(parts.values()) == pytest.approx(wall, abs=0.01)
    assert parts[STAGES] == pytest.approx(3 * parts["store"], abs=0.01)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_parts_of_a_run_add_up_to_its_time(tmp_path: Path, workers: int):
    """Kernels that sleep for a known time, and a global stage."""
    table = write_urls(tmp_path / "urls.parquet", texts(300))
    run = config(tmp_path, table, engine={"kind": "local", "workers": workers}, options={"pause_s": PAUSE_S})
    report = refresh(run, Silent())
    assert report.snapshot is not None
    for spent, seconds in ((report.spent, report.seconds), (report.snapshot.spent, report.snapshot.seconds)):
        assert spent.keys() <= PARTS.keys() and all(value > 0 for value in spent.values())
        assert sum(spent.values()) == pytest.approx(seconds, abs=0.02)
    slept = 2 * 3 * PAUSE_S  # two calls a shard
    assert report.stage_seconds["words"] >= slept
    kernels = report.stage_seconds["words"] + report.stage_seconds["chars"]
    assert report.spent[STAGES] == pytest.approx(kernels / workers + report.stage_seconds["rank"], abs=0.01)
    for spent in (report.spent, report.snapshot.spent):
        assert {"store", "admission", "commits", "publishing"} <= spent.keys()
    assert 0 < engine_share(report.spent) < 1
    again = refresh(run, Silent())
    assert STAGES not in again.spent and engine_share(again.spent) == 1.0
    assert sum(again.spent.values()) == pytest.approx(again.seconds, abs=0.02)


def test_starting_an_engine_for_a_global_stage_is_no_time_of_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    table = write_urls(tmp_path / "urls.parquet", texts(60))
    refresh(config(tmp_path, table), Silent())

    @contextlib.contextmanager
    def slow_engine(*arguments: Any) -> Iterator[Any]:
        time.sleep(0.2)
        with open_engine(*arguments) as engine:
            yield engine

    monkeypatch.setattr(running, "open_engine", slow_engine)
    report = refresh(config(tmp_path, table, recipe="tests.engines.beam_steps:recipe"), Silent())
    assert set(report.computed) == {"rank_in_cells"}
    assert report.spent["start"] >= 0.2
    assert report.stage_seconds["rank_in_cells"] == pytest.approx(report.spent[STAGES], abs=0.002)
