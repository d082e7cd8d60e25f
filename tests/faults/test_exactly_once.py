"""Two attempts of one unit at the same time, as when a machine that was given up for dead works on while its unit runs
again elsewhere: each row is there once, and every file is whole."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pyarrow as pa

from pairmill.admission import admit
from pairmill.execute import Frame, Job, Unit, Worker, table_files, table_schema, units_to_do
from pairmill.plan import Recipe, compile_plan
from pairmill.report.progress import Silent
from pairmill.run import load_recipe, refresh
from pairmill.stage import Batch, Kernel
from pairmill.store import DataFile, Dataset, read_files
from pairmill.store.files import checksum_in, checksum_of
from schemas import fields
from schemas.config import RunConfig
from tests.faults.test_workers import outcome
from tests.steps import CountWords, config, texts, write_urls

ROWS = 60
SLOW = {"pause_s": 0.2, "rows": 10}


@dataclass(frozen=True)
class WhoWasIt(CountWords):
    """Gives other results in every attempt, as a download does whose server answers one attempt and fails the next."""

    def open(self) -> Kernel:
        count = super().open()

        def name_me(batch: Batch) -> pa.Table:
            count(batch)
            return pa.table({"words": pa.array([os.getpid()] * len(batch), pa.int32())})

        return name_me


def recipe_that_differs(config: RunConfig) -> Recipe:
    """A stage alone, whose rows say which process computed them."""
    return Recipe("differs", (WhoWasIt(config.options["pause_s"]),))


def attempt(job: Job, unit: str, both: Barrier, done: Queue[str]) -> None:
    """All groups, one after the other. Without `pairmill.isolate.run_unit`, which would have the later one find the
    mark of the earlier and begin seconds after it."""
    attempted = Unit.loads(unit)
    workers = [Worker(job, group) for group in range(len(job.groups))]
    both.wait(60)
    for worker in workers:
        attempted = worker.run(attempted)
    done.put(attempted.dumps())


def attempts(run: RunConfig) -> tuple[Dataset, Job, list[Unit]]:
    """The only unit of the first segment as two processes finished it, at the same time, none of it committed."""
    dataset, plan = Dataset(run.dataset), compile_plan(load_recipe(run))
    with dataset.lock(0):
        admit(run, dataset, Silent())
    frame = Frame(dataset, plan, table_files(dataset, plan))
    (unit,) = units_to_do(plan, 0, frame)
    job = Job(dataset.url, plan, 0, 0.0, 0)
    spawn = multiprocessing.get_context("spawn")
    both, done = spawn.Barrier(2), spawn.Queue()
    processes = [spawn.Process(target=attempt, args=(job, unit.dumps(), both, done)) for _ in range(2)]
    for process in processes:
        process.start()
    units = [Unit.loads(done.get(timeout=60)) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [u.failure for u in units] == [None, None]
    return dataset, job, units


def commit(dataset: Dataset, job: Job, units: Sequence[Unit]) -> None:
    """As the driver does it."""
    for unit in units:
        for output in unit.outputs:
            file = DataFile(**{k: v for k, v in output.items() if k != "table"})
            dataset.table(output["table"], table_schema(job.plan, output["table"])).commit([file])


def written(dataset: Dataset) -> list[Path]:
    """The files of stages. All of them are whole, and nothing unfinished lies about."""
    root = Path(dataset.url)
    assert not list(root.rglob("*.tmp"))
    files = [p for p in root.glob("*/shard=*/*.parquet") if not p.is_relative_to(root / "pairs")]
    for path in files:
        assert checksum_of(dataset, str(path)) == checksum_in(path.name)
    return files


def test_two_attempts_at_once_write_one_file_twice_and_their_rows_are_there_once(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", [t for t in texts(ROWS) if t])
    calm = config(tmp_path / "calm", table, options=SLOW)
    refresh(calm, Silent())
    run = config(tmp_path / "twice", table, options=SLOW)
    dataset, job, units = attempts(run)
    assert units[0].outputs == units[1].outputs, "equal work has equal names"
    assert len(written(dataset)) == len(units[0].outputs) == 2
    commit(dataset, job, units)  # both of them, as if the zombie's answer came, too
    report = refresh(run, Silent())
    assert set(report.computed) == {"rank"}, "nothing of what the two did is left to do"
    assert outcome(run) == outcome(calm)


def test_of_two_attempts_that_saw_different_things_one_counts(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", [t for t in texts(ROWS) if t])
    run = config(tmp_path, table, options=SLOW, recipe=f"{__name__}:recipe_that_differs")
    dataset, job, units = attempts(run)
    assert len(written(dataset)) == 2, "two files that say different things"
    commit(dataset, job, [units[1]])
    report = refresh(run, Silent())
    assert report.snapshot is not None and report.computed == {}
    snapshot = dataset.snapshot()
    (name,) = job.plan.tables
    schema = table_schema(job.plan, name)
    rows = read_files(dataset, snapshot.files(name), schema, ["uid", fields.WORDS.name])
    assert rows.num_rows == len(set(rows["uid"].to_pylist())) == report.snapshot.admitted
    assert len(set(rows[fields.WORDS.name].to_pylist())) == 1, "of one attempt, whole"
    assert [f.relative for f in snapshot.files(name)] == [o["relative"] for o in units[1].outputs]
