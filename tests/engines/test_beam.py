"""Beam: on each runner that runs here the results of the local engine, and a worker that dies costs a row."""

from __future__ import annotations

from pathlib import Path

import pytest

from pairmill.engines.beam.outbox import FOLDER
from pairmill.isolate import MARKS
from pairmill.report.progress import Silent
from pairmill.run import refresh
from tests.contract.test_equality import table_digests
from tests.steps import config, texts, write_urls

PROCESSES = ("--runner=FnApiRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=2")
DASK = ("--runner=DaskRunner",)


def beam(*options: str) -> dict[str, object]:
    return {"kind": "beam", "pipeline_options": options, "workers": 2}


@pytest.mark.parametrize("options", [PROCESSES, DASK], ids=["processes", "dask"])
def test_a_row_that_kills_its_worker_is_quarantined_and_all_others_are_as_ever(
    tmp_path: Path, options: tuple[str, ...]
):
    """Three shards of which one kills; the local engine is told the answer, since there it would kill the test."""
    table = write_urls(tmp_path / "urls.parquet", [*texts(30), "abort the worker", *texts(25)])
    run = config(tmp_path, table, engine=beam(*options), options={"words": 0}, shard_size=20)
    record = refresh(run, Silent()).snapshot
    assert record is not None and record.reasons["error.crash"] == 1
    assert record.admitted == 56 == record.kept + sum(record.reasons.values())
    assert not (tmp_path / "dataset" / FOLDER).exists()
    assert not list((tmp_path / "dataset" / MARKS).iterdir())
