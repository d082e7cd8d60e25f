"""Beam: on each runner that runs here the results of the local engine; what kills a worker costs a row, and what kills
the driver costs nothing; its metrics."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pairmill.dedup.semantic import SemanticNeighbours
from pairmill.engines import in_cells, open_engine
from pairmill.engines.beam import BeamEngine, _Run
from pairmill.engines.beam.outbox import FOLDER, Outbox, clear
from pairmill.engines.beam.transforms import RunGroup, dismiss
from pairmill.errors import EngineError, StoreError
from pairmill.execute import Frame, Job, Unit, table_files, units_to_do
from pairmill.integrity import examine
from pairmill.integrity.findings import Kind
from pairmill.isolate import MARKS
from pairmill.plan import Recipe, compile_plan
from pairmill.query import query
from pairmill.report.progress import Silent
from pairmill.run import load_recipe, refresh
from pairmill.stage import WORKERS_ENV
from pairmill.store import Dataset
from pairmill.takedown import Selectors, forget
from pairmill.versions import vacuum
from schemas.config import Engine, RunConfig
from tests.contract.test_equality import table_digests
from tests.dedup.synthetic import clusters, live
from tests.engines.beam_steps import LOADED, Alone, Loads, OpenedOnDevice, rank
from tests.engines.failing_steps import Device
from tests.steps import AtLeast, CountWords, config, texts, write_urls

ROOT = Path(__file__).resolve().parent.parent.parent
IN_MEMORY = ("--runner=FnApiRunner",)
LOOPBACK = ("--environment_type=LOOPBACK",)
PROCESSES = ("--runner=FnApiRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=2")
RECIPE = "tests.engines.beam_steps:recipe"


def beam(*options: str) -> dict[str, object]:
    return {"kind": "beam", "pipeline_options": options, "workers": 2}


# -- equality, and workers that die --


def deadly(root: Path, table: Path, recipe: str, *options: str) -> dict[str, dict[str, str]]:
    """The tables of a run over three shards, in one of which a row kills its worker."""
    run = config(root, table, engine=beam(*options), recipe=recipe, options={"words": 0}, shard_size=7)
    record = refresh(run, Silent()).snapshot
    assert record is not None and record.reasons["error.crash"] == 1
    assert record.admitted == 20 == record.kept + sum(record.reasons.values())
    assert not list((root / "dataset" / MARKS).iterdir())
    return {name: digests for name, digests in table_digests(run).items() if not name.startswith("rank")}


@pytest.mark.timeout(600)
def test_a_row_that_kills_its_worker_is_quarantined_on_beams_own_processes_and_on_dask(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", [*texts(10), "abort the worker", *texts(9)])
    processes = deadly(tmp_path / "processes", table, "tests.steps:recipe", *PROCESSES)
    assert deadly(tmp_path / "dask", table, RECIPE, "--runner=DaskRunner") == processes
    assert not list(tmp_path.glob(f"*/dataset/{FOLDER}")), "the outboxes go"


def test_the_job_api_of_flink_spark_and_prism_gives_the_tables_of_the_local_engine(tmp_path: Path):
    """By the job server that Beam has in Python, with cells and metrics."""
    table = write_urls(tmp_path / "urls.parquet", texts(100))
    found = []
    for engine in ({"kind": "local"}, beam("--runner=PortableRunner", "--job_endpoint=embed", *LOOPBACK)):
        run = config(tmp_path / str(engine["kind"]), table, engine=engine, recipe=RECIPE, shard_size=20)
        refresh(run, Silent())
        found.append(table_digests(run))
    assert found[0] == found[1]


def test_bundles_that_are_done_three_times_are_one_result(tmp_path: Path):
    """A runner may do them again whenever it likes, though their results are known."""
    table = write_urls(tmp_path / "urls.parquet", texts(40))
    found = []
    for engine in ({"kind": "local"}, beam(*IN_MEMORY, "--direct_runner_bundle_repeat=2")):
        run = config(tmp_path / str(engine["kind"]), table, engine=engine, recipe=RECIPE, shard_size=20)
        refresh(run, Silent())
        found.append(table_digests(run))
    assert found[0] == found[1]


def stand_in(folder: Path) -> Path:
    """A program that takes the place of Prism, and of Java with the jars of Flink's and Spark's job servers: Beam's job
    server in Python, on the port that the runner tells it. It writes down its process id."""
    program = folder / "job_server"
    server = f"{sys.executable} -m apache_beam.runners.portability.local_job_service_main"
    program.write_text(
        f"#!/bin/sh\necho $$ >> {folder}/started\n"
        'while [ "$1" != --job_port ] && [ "$1" != --job-port ]; do shift; done\n'
        f'exec {server} --job_port "$2"\n'
    )
    program.chmod(0o755)
    (folder / "any.jar").touch()
    return program


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Beam leaves its server's pipe open
@pytest.mark.parametrize("runner", ["FlinkRunner", "SparkRunner", "PrismRunner"])
def test_runners_that_start_a_job_server_start_one_and_end_it(tmp_path: Path, runner: str):
    """With Beam's job server in Python in the place of theirs."""
    program = stand_in(tmp_path)
    java = (f"--job_server_java_launcher={program}",)
    options = {
        "FlinkRunner": (f"--flink_job_server_jar={tmp_path}/any.jar", "--flink_master=nowhere:8081", *java),
        "SparkRunner": (f"--spark_job_server_jar={tmp_path}/any.jar", "--spark_master_url=spark://nowhere:7077", *java),
        "PrismRunner": (f"--prism_location={program}",),
    }[runner]
    run = config(tmp_path, tmp_path / "none", engine=beam(f"--runner={runner}", *options, *LOOPBACK))
    with open_engine(run.engine, run.dataset) as engine:
        for _ in range(2 if runner == "FlinkRunner" else 1):  # which would start another one for each pipeline
            found = pa.concat_tables(engine.scatter(rank, tables(20))).sort_by("row")
            assert found.equals(pa.concat_tables(in_cells(rank, tables(20))).sort_by("row"))
    (started,) = (tmp_path / "started").read_text().split()
    assert not Path(f"/proc/{started}").exists()


def test_what_the_code_of_a_stage_raises_is_raised_as_on_the_local_engine(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", texts(15))
    recipe = "tests.engines.failing_steps:recipe_that_fails"

    def failing_run(**options: str) -> RunConfig:
        return config(tmp_path, table, engine=beam(*IN_MEMORY), recipe=recipe, options=options)

    with pytest.raises(NameError, match=r"^name 'wrods' is not defined$") as raised:
        refresh(failing_run(opening="mistype"), Silent())
    assert "failing_steps.py" in str(raised.value.__cause__), "where it was"
    with pytest.raises(RuntimeError, match=r"^OddError: the hub says 451$"):
        refresh(failing_run(opening="be_odd"), Silent())
    with pytest.raises(StoreError, match=r"^the bucket is closed$"):
        refresh(failing_run(opening="refuse"), Silent())
    assert not (tmp_path / "dataset" / FOLDER).exists()


# -- a driver that is interrupted, one that is killed --


def started(folder: Path, *options: str) -> subprocess.Popen[str]:
    """A run of the command that has finished some shards and works on another."""
    options = options or ("--runner=DirectRunner",)
    command = [sys.executable, "beam_runner.py", str(folder / "config.json"), *options, "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*command, "--set", "options.pause_s=0.5"], cwd=ROOT, text=True, **pipes)
    before = files(folder)
    until = time.monotonic() + 100
    while files(folder) <= before and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    return process


def files(folder: Path) -> int:
    return len(list((folder / "dataset").glob("words-*/shard=*/*.parquet")))


def test_a_driver_that_was_interrupted_and_one_that_was_killed_are_gone_on_with(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", texts(100))
    calm = config(tmp_path / "calm", table, recipe=RECIPE, shard_size=20)
    refresh(calm, Silent())
    run = config(tmp_path, table, recipe=RECIPE, shard_size=20)
    (tmp_path / "config.json").write_text(run.model_dump_json(by_alias=True))

    with started(tmp_path) as process:
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=100)[1]
        assert process.returncode == 130, said
        assert said.splitlines()[-1] == "interrupted; run the same command again to go on"
    assert 0 < files(tmp_path) < 5
    assert not (tmp_path / "dataset" / FOLDER).exists()

    with started(tmp_path) as process:
        process.kill()
        process.communicate(timeout=100)
    assert files(tmp_path) < 5
    assert list((tmp_path / "dataset" / FOLDER).iterdir()), "what the killed run left"

    report = refresh(
        run.model_copy(update={"engine": config(tmp_path, table, engine=beam(*IN_MEMORY)).engine}), Silent()
    )
    assert report.computed["words"] < 100, "what was finished is not done again"
    assert table_digests(run) == table_digests(calm)
    assert not (tmp_path / "dataset" / FOLDER).exists()


def test_sigterm_ends_a_run_and_the_job_server_that_it_started_in_silence(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", texts(100))
    run = config(tmp_path, table, recipe=RECIPE, shard_size=20)
    (tmp_path / "config.json").write_text(run.model_dump_json(by_alias=True))
    program = stand_in(tmp_path)
    server = (f"--flink_job_server_jar={tmp_path}/any.jar", f"--job_server_java_launcher={program}")
    with started(tmp_path, "--runner=FlinkRunner", "--flink_master=nowhere:8081", *server, *LOOPBACK) as process:
        process.terminate()
        said = process.communicate(timeout=100)[1]
    assert process.returncode == 130 and "Traceback" not in said, said
    assert said.splitlines()[-1] == "interrupted; run the same command again to go on"
    (pid,) = (tmp_path / "started").read_text().split()
    assert not Path(f"/proc/{pid}").exists()
    assert not (tmp_path / "dataset" / FOLDER).exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Beam leaves its server's pipe open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # its workers here have lost it
def test_a_job_server_that_dies_or_is_not_there_is_told(tmp_path: Path):
    server = (f"--prism_location={stand_in(tmp_path)}",)
    run = config(tmp_path, tmp_path / "none", engine=beam("--runner=PrismRunner", *server, *LOOPBACK))
    with open_engine(run.engine, run.dataset) as engine:
        work = KillsFirst(str(tmp_path / "started"))
        with pytest.raises(
            EngineError, match=r"PrismRunner\) stopped the run: UNAVAILABLE: .*; what was committed is kept"
        ):
            list(engine.scatter(work, tables(20)))
    absent = ("--runner=PortableRunner", "--job_endpoint=127.0.0.1:1", "--job_server_timeout=1", *LOOPBACK)
    with (
        open_engine(Engine(kind="beam", pipeline_options=absent), run.dataset) as engine,
        pytest.raises(EngineError, match=r"the job server does not answer; is it up, and its address right\?"),
    ):
        list(engine.scatter(rank, tables(20)))


@dataclass(frozen=True)
class KillsFirst:
    """Work in cells that kills a process, whose id is in a file, before it begins."""

    file: str

    def __call__(self, rows: pa.Table) -> pa.Table:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(Path(self.file).read_text()), signal.SIGKILL)
        return rank(rows)


class Deaf:
    """A pipeline, and its result, on a cluster that does not answer any more."""

    def __init__(self) -> None:
        self.asked, self.forever = threading.Event(), threading.Event()

    def run(self) -> Deaf:
        return self

    def wait_until_finish(self) -> str:
        self.asked.set()
        self.forever.wait()
        return "DONE"

    def cancel(self) -> None:
        self.forever.wait()


@pytest.mark.timeout(60)
def test_a_cluster_that_does_not_answer_does_not_keep_ctrl_c_waiting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pairmill.engines.beam.CANCEL_S", 0.01)
    monkeypatch.setattr("pairmill.engines.beam.STOP_S", 0.01)
    deaf = Deaf()
    run = _Run(deaf)  # type: ignore[arg-type]
    deaf.asked.wait()
    run.stop()
    assert not run.over
    deaf.forever.set()
    run.wait(60)
    assert run.over


@pytest.fixture
def left_behind(tmp_path: Path) -> Dataset:
    """A dataset with what a killed run would leave in it."""
    table = write_urls(tmp_path / "urls.parquet", texts(30))
    run = config(tmp_path, table)
    refresh(run, Silent())
    Outbox.make(run.dataset).put_parts("rows", [b"vectors"])
    return Dataset(run.dataset)


def test_verify_tells_what_a_killed_run_left_and_vacuum_removes_it_when_it_is_old(left_behind: Dataset):
    leftovers = [f.path for f in examine(left_behind, Silent()).findings if f.kind is Kind.LEFTOVER]
    assert [Path(path).name for path in leftovers] == ["open", "rows"]
    assert vacuum(left_behind, dry_run=True).files == 0
    assert vacuum(left_behind, grace_hours=0).files == 2
    assert left_behind.fs.find(left_behind.path(FOLDER)) == []


def test_a_takedown_removes_what_a_killed_run_left(left_behind: Dataset):
    uid = query(left_behind.snapshot(), "SELECT uid FROM pairs LIMIT 1").to_pylist()[0]["uid"]
    assert forget(left_behind, Selectors(uids=(uid,)), Silent()).pairs == 1
    assert not left_behind.fs.exists(left_behind.path(FOLDER))


# -- the engine itself --


@pytest.fixture
def admitted(tmp_path: Path) -> tuple[RunConfig, Job, list[Unit]]:
    """Work to do: five shards, with poison in one row of the third."""
    lines = [t if i != 50 else "poison in this text" for i, t in enumerate(texts(100))]
    table = write_urls(tmp_path / "urls.parquet", lines)
    run = config(tmp_path, table, engine=beam(*IN_MEMORY), shard_size=20)
    dataset = Dataset(run.dataset)
    plan = compile_plan(load_recipe(run))
    from pairmill.admission import admit

    with dataset.lock():
        admit(run, dataset, Silent())
    units = list(units_to_do(plan, 0, Frame(dataset, plan, table_files(dataset, plan))))
    return run, Job(dataset.url, plan, 0, 0.02, 20), units


def test_metrics_say_what_the_units_say(admitted: tuple[RunConfig, Job, list[Unit]]):
    run, job, units = admitted
    with open_engine(run.engine, run.dataset) as engine:
        assert isinstance(engine, BeamEngine) and engine.slots == 1
        done = list(engine.run(job, units))
        metrics = engine.result.metrics().query()
    assert sorted(u.shard for u in done) == sorted(u.shard for u in units)
    counters: dict[str, int] = {}
    for counter in metrics["counters"]:
        counters[counter.key.metric.name] = counters.get(counter.key.metric.name, 0) + counter.committed
    few = sum(u.dropped["text.too_few_words"] for u in done)
    assert counters == {
        "rows/words": 100,
        "rows/chars": 100 - few - 1,
        "dropped/text.too_few_words": few,
        "dropped/error.kernel": 1,
        "errors/words": 1,
        "errors/chars": 0,
    }
    times = {d.key.metric.name: d.committed for d in metrics["distributions"]}
    assert set(times) == {"milliseconds/words", "milliseconds/chars"}
    assert times["milliseconds/words"].count == 5


def test_threads_share_a_model_and_results_come_while_the_pipeline_runs(
    admitted: tuple[RunConfig, Job, list[Unit]], tmp_path: Path
):
    run, _, _ = admitted
    dataset = Dataset(run.dataset)
    plan = compile_plan(Recipe("alone", (CountWords(), AtLeast(1), Alone(log=str(tmp_path / "log")))))
    units = list(units_to_do(plan, 0, Frame(dataset, plan, table_files(dataset, plan))))
    threads = (*IN_MEMORY, "--direct_running_mode=multi_threading", "--direct_num_workers=3")
    with open_engine(Engine(kind="beam", pipeline_options=threads), run.dataset) as engine:
        stream = engine.run(Job(dataset.url, plan, 0, 0.02, 20), units)
        first = next(stream)
        assert engine.result is None, "the pipeline has not ended"
        done = [first, *stream]
    assert len(done) == len(units) == 5 and [unit.failure for unit in done] == [None] * 5
    assert (tmp_path / "log").read_text() == "opened\n"
    assert WORKERS_ENV not in os.environ


def test_workers_of_a_pipeline_that_nobody_waits_for_do_nothing_more(
    admitted: tuple[RunConfig, Job, list[Unit]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _, job, units = admitted
    outbox = Outbox.make(job.dataset)
    monkeypatch.setenv(WORKERS_ENV, "1")
    group = RunGroup(job, 0, units[0].wanted, outbox, 3)
    group.setup()
    assert os.environ[WORKERS_ENV] == "3", "limits that are the run's are shared by three processes"
    (text,) = group.process(units[0].dumps())
    assert Unit.loads(text).computed == {"words": 20} and files(tmp_path) == 1
    clear(job.dataset)  # as the next run does, after this one's driver was killed
    assert list(group.process(units[1].dumps())) == [] and files(tmp_path) == 1


def test_a_worker_process_that_lives_on_begins_each_pipeline_anew(
    admitted: tuple[RunConfig, Job, list[Unit]], tmp_path: Path
):
    """As those of a Dask cluster do: of the run before they know tombstones and answers that are true no longer."""
    run, _, _ = admitted
    dataset = Dataset(run.dataset)
    stage = OpenedOnDevice(device=str(tmp_path / "device"), openings=str(tmp_path / "log"))
    plan = compile_plan(Recipe("device", (stage,)))
    job = Job(dataset.url, plan, 0, 0.02, 20)
    units = list(units_to_do(plan, 0, Frame(dataset, plan, table_files(dataset, plan))))
    for unit in units[:2]:
        outbox = Outbox.make(job.dataset)
        for _ in range(2):  # a bundle that is done twice
            assert list(RunGroup(job, 0, unit.wanted, outbox, 1).process(unit.dumps())) == []
        ((name, _),) = outbox.take()
        assert name == f"{unit.shard}.json", "no error: the pipeline before has left the device"
        outbox.remove()
    assert (tmp_path / "log").read_text() == "opened\n" * 2
    dismiss(outbox)
    assert (tmp_path / "device").exists() and Device(str(tmp_path / "device")), "nothing is held when the run has ended"


def test_an_interrupted_driver_does_not_wait_for_what_is_being_loaded(admitted: tuple[RunConfig, Job, list[Unit]]):
    run, _, _ = admitted
    job = Job(Dataset(run.dataset).url, compile_plan(Recipe("loads", (Loads(),))), 0, 0.02, 20)
    outbox = Outbox.make(job.dataset)
    RunGroup(job, 0, [0], outbox, 1).setup()
    end = threading.Thread(target=dismiss, args=(outbox,))
    end.start()
    end.join(20)
    waiting = end.is_alive()
    LOADED.set()
    end.join()
    assert not waiting


def test_neighbours_are_those_of_the_local_engine_bit_for_bit(tmp_path: Path):
    rows = live(clusters([1, 2, 5] * 60, 0.05), chunks=3)
    todo = pa.array([True] * len(rows))
    stage = SemanticNeighbours(cells=6, probe=2)
    with open_engine(Engine(kind="beam"), str(tmp_path)) as engine:
        found = stage.measure(rows, todo, engine.scatter)
        assert engine.result is not None, "the work was Beam's"
    assert found.equals(stage.measure(rows, todo, in_cells))
    assert pc.sum(pc.list_value_length(found["neighbours"])).as_py() > 1000


def tables(rows: int) -> Iterator[pa.Table]:
    for start in range(0, rows, 13):
        found = range(start, min(start + 13, rows))
        yield pa.table({"cell": [i % 7 for i in found], "row": list(found), "chars": [i * i % 31 for i in found]})


def failing(rows: pa.Table) -> pa.Table:
    if rows["cell"][0].as_py() == 3:
        raise ValueError("the third cell cannot be done")
    return rows


def test_work_in_cells_answers_as_in_this_process_and_what_fails_in_it_is_told(tmp_path: Path):
    run = config(tmp_path, tmp_path / "none", engine=beam(*IN_MEMORY))
    with open_engine(run.engine, run.dataset) as engine:
        found = pa.concat_tables(engine.scatter(rank, tables(100))).sort_by("row")
        assert found.equals(pa.concat_tables(in_cells(rank, tables(100))).sort_by("row"))
        with pytest.raises(ValueError, match=r"^the third cell cannot be done$") as raised:
            list(engine.scatter(failing, tables(100)))
        assert ", in failing" in str(raised.value.__cause__), "where it was"
        assert list(engine.scatter(rank, iter(()))) == []
    assert not (tmp_path / "dataset" / FOLDER).exists()
