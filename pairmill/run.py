"""A refresh: admit new pairs, bring every stage up to date, publish a snapshot. And the plan that says it before."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import importlib.metadata
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from captioners.instruct.stage import Instructions
from pairmill import answers, config_file, retry, revisits, storage, takedown, versions
from pairmill.admission import Admission, admit
from pairmill.dedup.groups import settle
from pairmill.engines import check_engine, open_engine
from pairmill.errors import ConfigError, ContractError, PairmillError, PlanError
from pairmill.execute import (
    Frame,
    Job,
    State,
    Unit,
    counted,
    outdated,
    replay,
    sorted_by_uid,
    table_files,
    table_schema,
    units_to_do,
)
from pairmill.isolate import raise_failure
from pairmill.models import ModelRef
from pairmill.plan import Plan, PlannedStep, Recipe, compile_plan, model_identities, placed
from pairmill.planning import PlanReport, make_plan
from pairmill.report.progress import Reporter
from pairmill.spent import Spent
from pairmill.stage import CellWork, ErrorBudget, GlobalStage
from pairmill.store import (
    HISTORY_TABLE,
    LEDGER_TABLE,
    PAIRS_TABLE,
    DataFile,
    Dataset,
    content_digest,
    set_torn_aside,
)
from pairmill.weights import tiny_clip_dir
from schemas import fields
from schemas.config import RunConfig
from schemas.reasons import DEFERRED_VALUES, Status
from schemas.snapshot import SnapshotRecord

COMMIT_EVERY_S = 2.0
"""Finished shards are committed together after so many seconds, and after longer as the run gets longer
(`_commit_due`): a commit costs about 10 ms a table, and a record in its log for ever. A kill loses nothing by that: the
next run adopts finished files that were not committed."""
_COMMIT_AT_MOST_S = 60.0

SOFTWARE = (
    "pairmill",
    "torch",
    "open_clip_torch",
    "faiss-cpu",
    "faiss-gpu",
    "pyarrow",
    "deltalake",
    "ray",
    "apache-beam",
    "transformers",
    "numpy",
    "pillow",
)


@dataclass(frozen=True)
class RunReport:
    """What a refresh did."""

    snapshot: SnapshotRecord | None
    """The snapshot that stands after it; None while there are no pairs at all."""
    published: bool
    """Whether that snapshot is new. False: there was nothing to do."""
    admitted_new: int
    known: int
    repeated: int
    taken_down: int
    """Rows of the sources that tombstones refuse."""
    computed: dict[str, int]
    """Rows computed by each stage in this run."""
    stage_seconds: dict[str, float]
    """Time in kernels, summed over workers."""
    seconds: float
    spent: dict[str, float]
    """What that time went into, in seconds that add up to it (`pairmill.spent.Spent`)."""


# -- config and recipe ------------------------------------------------------------------------------------------------


def load_config(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config from YAML and apply ``key.sub=value`` overrides; see `pairmill.config_file.read_config`."""
    return config_file.read_config(RunConfig, path, overrides)


def parse_config(data: dict[str, Any], where: str = "config") -> RunConfig:
    """Validate a config given as a dictionary; see `pairmill.config_file.parse_config`."""
    return config_file.parse_config(RunConfig, data, where)


def load_recipe(config: RunConfig) -> Recipe:
    """The recipe that the config names: a file in pipelines/, or ``module:function``.

    Raises:
        ConfigError: there is no such recipe, or ``engine.stages`` places a stage that it does not have.
        PlanError: the function did not return a `Recipe`, or one that is not in pipelines/ failed.
    """
    module, _, function = config.recipe.partition(":")
    target = module if function or "." in module else f"pipelines.{module}"
    try:
        build = getattr(importlib.import_module(target), function or "recipe")
    except ModuleNotFoundError as error:
        if error.name is None or not (target == error.name or target.startswith(f"{error.name}.")):
            raise
        raise ConfigError(f"recipe: there is no {config.recipe!r}; there are: {', '.join(recipe_names())}") from error
    except AttributeError as error:
        raise ConfigError(f"recipe: the module {target!r} has no function {function or 'recipe'!r}") from error
    try:
        recipe = build(config)
    except PairmillError:
        raise
    except Exception as error:
        if target == f"pipelines.{module}":
            raise
        told = f"{type(error).__name__}: {error}"
        raise PlanError(f"recipe: {config.recipe!r} failed: {told}; `pairmill --debug ...` shows where") from error
    if not isinstance(recipe, Recipe):
        raise PlanError(
            f"recipe {config.recipe!r} returned {type(recipe).__name__}; it must return pairmill.plan.Recipe"
        )
    return placed(recipe, config.engine.stages)


def recipe_names() -> list[str]:
    """The recipes of pipelines/."""
    import pkgutil

    import pipelines

    found = pkgutil.walk_packages(pipelines.__path__)
    return sorted(m.name for m in found if not m.ispkg and not m.name.startswith("_"))


def shipped_models_used(config: RunConfig) -> list[str]:
    """The stages of the config's recipe whose model is one of those that the package ships.

    Raises:
        ConfigError: there is no such recipe, or a model is missing.
    """
    steps = compile_plan(load_recipe(config)).steps
    models = {planned.name: getattr(planned.step, "model", None) for planned in steps}
    shipped = tiny_clip_dir().parent
    return [
        name
        for name, model in models.items()
        if isinstance(model, ModelRef) and model.path is not None and Path(model.path).parent == shipped
    ]


# -- plan -------------------------------------------------------------------------------------------------------------


def plan(config: RunConfig, reporter: Reporter, *, retry_deferred: bool = False) -> PlanReport:
    """What `refresh` would do, without doing it."""
    return make_plan(config, compile_plan(load_recipe(config)), reporter, retry_deferred=retry_deferred)


# -- refresh ----------------------------------------------------------------------------------------------------------


def refresh(
    config: RunConfig,
    reporter: Reporter,
    *,
    retry_deferred: bool = False,
    revisit: str | None = None,
    admit: bool = True,
    wait_s: float = 0.0,
) -> RunReport:
    """Admit new pairs, bring every stage up to date and publish a snapshot.

    Whatever was finished before an interruption is kept: run it again and it goes on.

    Args:
        config: What to run.
        reporter: Told how it goes.
        retry_deferred: Try all rows again whose last attempt failed in a way that may pass (time-outs, 5xx, DNS), not
            only those whose time has come.
        revisit: Ask for known images again; an SQL condition over the view ``pairs`` says which (``true``: all).
        admit: Read the sources. Without it only known pairs are brought up to date.
        wait_s: How long to wait for another process that writes to the dataset, seconds.

    Raises:
        PairmillError: see `pairmill.errors`; the last snapshot is intact.
    """
    compiled = compile_plan(load_recipe(config))
    check_engine(config.engine)
    dataset = Dataset(config.dataset)
    with dataset.lock(wait_s):
        return _Refresh(config, compiled, dataset, reporter).run(retry_deferred, revisit, admit)


@dataclass
class _Refresh:
    config: RunConfig
    plan: Plan
    dataset: Dataset
    reporter: Reporter
    computed: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    budgets: dict[str, ErrorBudget] = field(default_factory=dict)
    retried: set[str] = field(default_factory=set)
    """Deferred pairs that this run tries again."""
    revised: set[str] = field(default_factory=set)
    """Stages whose outdated rows this run has taken out once: what it tries again, it tries once."""
    spent: Spent = field(default_factory=Spent)
    _seen: tuple[Mapping[str, list[DataFile]], Frame] | None = None

    def run(self, retry_deferred: bool, revisit: str | None, read_sources: bool) -> RunReport:
        begin = time.monotonic()
        self._mend()
        with self.spent.on("admission"):
            admission = admit(self.config, self.dataset, self.reporter) if read_sources else Admission()
        self._tell(admission)
        self._retry(retry_deferred)
        if len(self._frame()) == 0:
            self.reporter.note("the sources hold no rows: there is nothing to do")
            return self._report(None, False, admission, begin)
        batches = self._batches()
        with _LazyEngine(self.config) as engine:
            if revisit is not None:
                self._revisit(engine, revisit)
            state = self._up_to_date(engine)
        if state.pending.any():
            raise ContractError(f"{int(state.pending.sum())} rows are still pending after all steps ran")
        with self.spent.on("publishing"):
            snapshot, published = self._publish(self._frame(), state, begin)
        if takedown.finish(self.dataset, self.reporter):  # and what came in at the very last moment goes again
            snapshot, published = self.dataset.snapshots()[-1], True
        if batches is not None:
            batches.done()
            batches.submit()
        return self._report(snapshot, published, admission, begin)

    def _batches(self) -> Batches | None:
        """Collects what batches brought; where they brought nothing, nothing is tried again."""
        writer = self.config.instruct.writer
        stage = next((s.name for s in self.plan.steps if isinstance(s.step, Instructions)), None)
        if stage is None or writer.kind != "batch":
            return None
        batches = Batches(self.config, self.dataset, self.reporter)
        if not batches.collect():
            self.revised.add(stage)
        return batches

    def _up_to_date(self, engine: _LazyEngine) -> State:
        """Run what is lacking, and take out what was taken down meanwhile, until there is neither: a pair that
        duplicated one that went may come alive."""
        while True:
            frame = self._frame()
            state = replay(self.plan, frame)
            if state.pending.any() or any(len(self._outdated(planned)) for planned in self.plan.steps):
                self._segments(engine)
            takedown.finish(self.dataset, self.reporter)
            if self._frame() is frame:
                return state

    def _mend(self) -> None:
        """Finish what a process that died left half done."""
        for name in self.dataset.tables() if self.dataset.local else ():  # object stores show whole objects only
            for record in set_torn_aside(self.dataset, name):
                self.reporter.note(f"{name}: the commit record {record} was not written to its end; set aside")
        versions.finish(self.dataset, self.reporter)
        answers.fold(self.dataset, alone=True)
        takedown.finish(self.dataset, self.reporter)

    def _retry(self, everything: bool) -> None:
        known = retry.known_attempts(self.dataset)
        self.retried = retry.due(known, self.config.retry, retry.utc_now(), everything=everything)
        if self.retried:
            self.reporter.note(f"{len(self.retried)} deferred pairs are tried again")
            retry.take_out(self.dataset, self.plan, self.retried, known, self.config.retry)

    def _revisit(self, engine: _LazyEngine, where: str) -> None:
        """Ask for known images again; those that changed, and all that depends on them, become work to do."""
        visit = revisits.open_visit(self.dataset, self.plan, self.config, where)
        if visit is None:
            self.reporter.note("there is no image to revisit yet")
            return
        frame = Frame(self.dataset, visit.plan, table_files(self.dataset, visit.plan))
        units = visit.units(frame)
        if units:
            self._run_units(engine, visit.plan, 0, units, frame)
        for line in visit.apply():
            self.reporter.note(line)

    def _report(
        self, snapshot: SnapshotRecord | None, published: bool, admission: Admission, begin: float
    ) -> RunReport:
        return RunReport(
            snapshot,
            published,
            admission.new,
            admission.known,
            admission.repeated,
            admission.taken_down,
            dict(self.computed),
            {k: round(v, 3) for k, v in self.seconds.items()},
            seconds := round(time.monotonic() - begin, 3),
            self.spent.parts(seconds),
        )

    def _tell(self, admission: Admission) -> None:
        counts = (
            (admission.known, "known"),
            (admission.repeated, "repeated"),
            (admission.taken_down, "taken down before"),
        )
        more = "".join(f", {rows} {what}" for rows, what in counts if rows)
        self.reporter.note(f"{admission.rows} rows read: {admission.new} new pairs{more}")

    def _frame(self) -> Frame:
        """The pairs with all columns, as the tables are now; the one of before when no table has changed."""
        files = table_files(self.dataset, self.plan)
        if self._seen is None or self._seen[0] != files:
            self._seen = (files, Frame(self.dataset, self.plan, files))
        return self._seen[1]

    # -- segments --

    def _segments(self, engine: _LazyEngine) -> None:
        """Run what is lacking, segment by segment. The engine is started when there is work for it, and once."""
        for number, segment in enumerate(self.plan.segments):
            for planned in segment.steps:
                self._revise(planned)
            frame = self._frame()
            if segment.global_step is not None:
                self._measure_globally(engine, segment.global_step, frame)
                continue
            units = list(units_to_do(self.plan, number, frame))
            if units:
                self._run_units(engine, self.plan, number, units, frame)

    def _outdated(self, planned: PlannedStep) -> np.ndarray:
        if not getattr(planned.step, "revises", ()):  # asked of every step: most need no look at the tables
            return np.empty(0, np.int64)
        return outdated(self.plan, self._frame(), planned, retry=planned.name not in self.revised)

    def _revise(self, planned: PlannedStep) -> None:
        """Take out of a stage's table what is outdated, so that it is work to do."""
        rows = self._outdated(planned)
        self.revised.add(planned.name)
        if not len(rows):
            return
        assert planned.table is not None
        frame = self._frame()
        shards = set(frame.pairs_column("shard").take(pa.array(rows)).to_pylist())
        uids = frame.uid.take(pa.array(rows)).combine_chunks()
        self.reporter.note(f"{planned.name}: {len(rows)} rows are outdated and done anew")
        retry.take_out_rows(self.dataset, planned.table, table_schema(self.plan, planned.table), uids, shards)

    def _run_units(self, engine: _LazyEngine, plan: Plan, number: int, units: list[Unit], frame: Frame) -> None:
        errors = self.config.errors
        job = Job(self.dataset.url, plan, number, errors.max_fraction, errors.min_rows)
        shards = frame.pairs_column("shard").to_numpy()
        rows_of = dict(zip(*(a.tolist() for a in np.unique(shards, return_counts=True)), strict=True))
        with self.spent.on("start"):
            started = engine.get(self.reporter)
        self.reporter.start(plan.segments[number].title, sum(rows_of[u.shard] for u in units))
        done: list[Unit] = []
        began = committed = time.monotonic()
        segment = self.spent.segment()
        try:
            for unit in started.run(job, units):
                raise_failure(unit)
                done.append(unit)
                self._account(unit)
                segment.add(unit)
                self.reporter.advance(rows_of[unit.shard], unit.dropped)
                if _commit_due(time.monotonic(), committed, began):
                    self._commit(plan, done)
                    committed = time.monotonic()
        finally:  # also on Ctrl-C and on a failure elsewhere: what is finished is kept
            segment.finish(started.slots)
            with self.spent.on("commits"):
                self._commit(plan, done)
                answers.fold(self.dataset)
            self.reporter.finish()

    def _commit(self, plan: Plan, units: list[Unit]) -> None:
        """Make the files of finished units visible, table by table in the order of the plan, and empty the list."""
        by_table: dict[str, list[DataFile]] = {}
        for output in itertools.chain.from_iterable(u.outputs for u in units):
            file = {k: v for k, v in output.items() if k != "table"}
            by_table.setdefault(output["table"], []).append(DataFile(**file))
        for table in plan.tables:
            if table in by_table:
                self.dataset.table(table, table_schema(plan, table)).commit(by_table[table])
        units.clear()

    def _account(self, unit: Unit) -> None:
        self.computed.update(unit.computed)
        for stage, seconds in unit.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        for stage, (rows, errors, first) in unit.errors.items():
            limits = self.config.errors
            budget = self.budgets.setdefault(stage, ErrorBudget(limits.max_fraction, limits.min_rows))
            budget.rows += rows
            budget.errors += errors
            budget.first_traceback = budget.first_traceback or first
            budget.check(stage)

    def _measure_globally(self, engine: _LazyEngine, planned: PlannedStep, frame: Frame) -> None:
        step = planned.step
        if not isinstance(step, GlobalStage):
            return
        assert planned.table is not None
        state = replay(self.plan, frame, planned.index)
        rows = state.rows()
        rows = rows[sorted_by_uid(frame, rows)]
        todo = ~frame.present(planned.table)[rows]
        if not todo.any():
            return
        self.reporter.start(planned.name, int(todo.sum()))
        begin = time.monotonic()
        live = frame.table(("shard", "refresh", *step.reads), rows)

        def scatter(work: CellWork, parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
            nonlocal begin
            asked = time.monotonic()
            with self.spent.on("start"):
                started = engine.get(self.reporter)
            begin += time.monotonic() - asked
            yield from started.scatter(work, parts)

        output = step.measure(live, pa.array(todo), scatter)
        schema = table_schema(self.plan, planned.table)
        if output.num_rows != int(todo.sum()):
            raise ContractError(f"global stage {step.name!r} returned {output.num_rows} rows for {int(todo.sum())}")
        chosen = live.filter(pa.array(todo))
        columns = {f.name: pa.nulls(output.num_rows, f.type) for f in schema}
        columns |= {"uid": chosen.column("uid"), **{n: output.column(n) for n in output.column_names}}
        result = pa.table({f.name: columns[f.name] for f in schema}).cast(schema)
        self._write_by_shard(planned.table, schema, result, chosen.column("shard").to_numpy(), "part")
        self.computed[step.name] += output.num_rows
        seconds = time.monotonic() - begin
        self.seconds[step.name] = self.seconds.get(step.name, 0.0) + seconds
        self.spent.add("stages", seconds)
        self.reporter.advance(output.num_rows, {})
        self.reporter.finish()

    def _write_by_shard(
        self, name: str, schema: pa.Schema, rows: pa.Table, shards: np.ndarray, what: str, *, replace: bool = False
    ) -> None:
        """One file for each shard, named by its content, committed together; with `replace`, in the place of those
        that the shard has. Shards that hold the same already are left alone."""
        table = self.dataset.table(name, schema)
        present = {f.relative.rpartition("-")[0] for f in table.files()}  # without the checksum
        files, touched = [], []
        order = pc.sort_indices(
            pa.table({"shard": shards, "uid": rows.column("uid")}),
            sort_keys=[("shard", "ascending"), ("uid", "ascending")],
        )
        rows, shards = rows.take(order), shards[order.to_numpy()]
        numbers, starts = np.unique(shards, return_index=True)
        for shard, start, end in zip(numbers.tolist(), starts, [*starts[1:], len(shards)], strict=True):
            part = rows.slice(start, end - start)
            file = f"{what}-{content_digest(part)}"
            if f"shard={shard}/{file}" not in present:
                with table.writer(shard, file) as writer:
                    writer.write(part)
                    files.append(writer.close())
                touched.append(shard)
        if files:
            table.commit(files, replace=touched if replace else ())

    # -- publish --

    def _publish(self, frame: Frame, state: State, begin: float) -> tuple[SnapshotRecord, bool]:
        """Write the ledger and the snapshot record, unless the last snapshot says the same already."""
        reason = state.reason.column()
        status, detail = statuses(reason), state.detail.column()
        groups = settle(frame.uid, state.duplicate_of.column())
        ledger = pa.table(
            {
                "uid": frame.uid,
                "status": status,
                "reason": reason,
                "detail": detail,
                "duplicate_of": groups.duplicate_of,
                "cluster": groups.cluster,
                **state.texts.columns(),
                **retry.attempt_columns(
                    frame.uid,
                    status,
                    detail,
                    retry.known_attempts(self.dataset),
                    self.retried,
                    self.config.retry,
                ),
            },
            schema=fields.LEDGER,
        )
        shards = frame.pairs_column("shard").to_numpy()
        self._write_by_shard(LEDGER_TABLE, fields.LEDGER, ledger, shards, "ledger", replace=True)
        names = (PAIRS_TABLE, LEDGER_TABLE, *self.plan.tables, HISTORY_TABLE)
        tables = {n: v for n in names if (v := self.dataset.table(n, fields.PAIRS).version()) >= 0}
        earlier = self.dataset.snapshots()
        if earlier and (earlier[-1].tables, earlier[-1].columns) == (tables, self.plan.columns):
            self.reporter.note(f"nothing new: snapshot {earlier[-1].id} is up to date")
            return earlier[-1], False
        counts = Counter(counted(status))
        record = SnapshotRecord(
            id=earlier[-1].id + 1 if earlier else 1,
            refresh=pc.max(frame.pairs_column("refresh")).as_py(),
            created_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            recipe=self.plan.recipe,
            config=yaml.safe_dump(self.config.model_dump(mode="json", by_alias=True), sort_keys=False),
            admitted=len(frame),
            kept=counts[Status.KEPT.value],
            dropped=counts[Status.DROPPED.value],
            deferred=counts[Status.DEFERRED.value],
            reasons=counted(reason),
            funnel=state.funnel,
            tables=tables,
            columns=self.plan.columns,
            models=model_identities(self.plan),
            software=_software(),
            seconds=(seconds := round(time.monotonic() - begin, 3)),
            spent=self.spent.parts(seconds),
            computed=dict(self.computed),
            stage_seconds={k: round(v, 3) for k, v in self.seconds.items()},
            bytes=versions.table_bytes(self.dataset, tables),
        )
        self.dataset.publish(record)
        self.reporter.note(f"published snapshot {record.id}: {record.kept} of {record.admitted} pairs kept")
        return record, True


@dataclass(frozen=True)
class Batches:
    """The Batch-file API around a run: answers are collected before it, requests submitted after it."""

    config: RunConfig
    dataset: Dataset
    reporter: Reporter

    @property
    def _news(self) -> str:
        """A file that is there while answers may have come of which the stage has not heard."""
        return self.dataset.path("_batches", "news")

    def collect(self) -> bool:
        """Store the answers that have come. Whether there are any that the stage has not heard of."""
        from captioners.instruct import batch

        fs = self.dataset.fs
        heard = not fs.exists(self._news)
        with storage.explained(f"cannot write {self._news}"):
            fs.makedirs(self.dataset.path("_batches"), exist_ok=True)
            fs.pipe_file(self._news, b"")
        count = batch.collect(self.config, self.dataset, self.reporter)
        if count:
            self.reporter.note(f"{count} answers came by batches")
        elif heard:
            self.done()
        return bool(count) or not heard

    def done(self) -> None:
        """The stage has heard of what came."""
        with storage.explained(f"cannot remove {self._news}"), contextlib.suppress(FileNotFoundError):
            self.dataset.fs.rm_file(self._news)

    def submit(self) -> None:
        """Send what waits."""
        from captioners.instruct import batch

        count = batch.submit(self.config, self.dataset, self.reporter)
        if count:
            self.reporter.note(f"{count} requests wait for their batches; run again to collect the answers")


def _commit_due(now: float, last: float, began: float) -> bool:
    """Whether it is time to commit: after `COMMIT_EVERY_S`, and after 1% of the time that the segment has run for."""
    return now - last > min(COMMIT_EVERY_S + 0.01 * (now - began), max(COMMIT_EVERY_S, _COMMIT_AT_MOST_S))


class _LazyEngine:
    """Starts the engine at its first use: a run with nothing to do starts none."""

    def __init__(self, config: RunConfig) -> None:
        self._context = open_engine(config.engine, config.dataset)
        self._engine: Any = None

    def __enter__(self) -> _LazyEngine:
        return self

    def get(self, reporter: Reporter) -> Any:
        """The engine, started."""
        if self._engine is None:
            self._engine = self._context.__enter__()
            reporter.note(f"engine: {self._engine.name}")
        return self._engine

    def __exit__(self, *error: Any) -> None:
        if self._engine is not None:
            self._context.__exit__(*error)


def statuses(reason: pa.ChunkedArray) -> pa.ChunkedArray:
    """The status that follows from each reason, as `schemas.reasons.status_of` has it."""
    deferred = pc.is_in(reason, value_set=pa.array(sorted(DEFERRED_VALUES)))
    out = pc.if_else(deferred, Status.DEFERRED.value, Status.DROPPED.value)
    return pc.if_else(pc.is_null(reason), Status.KEPT.value, out)


def _software() -> dict[str, str]:
    found = {}
    for name in SOFTWARE:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
