"""A refresh: admit new pairs, bring every stage up to date, publish a snapshot. And the plan that says it before."""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import importlib.metadata
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from pairmill import config_file
from pairmill.admission import Admission, admit
from pairmill.dedup.groups import settle
from pairmill.engines import open_engine
from pairmill.errors import ConfigError, ContractError, PlanError
from pairmill.execute import Frame, Job, State, Unit, counted, replay, sorted_by_uid, table_schema, units_to_do
from pairmill.isolate import raise_failure
from pairmill.plan import Plan, PlannedStep, Recipe, compile_plan
from pairmill.report.progress import Reporter
from pairmill.stage import ErrorBudget, GlobalStage
from pairmill.store import LEDGER_TABLE, PAIRS_TABLE, DataFile, Dataset, without_rows, write_if_new
from schemas import fields
from schemas.config import RunConfig, Section
from schemas.reasons import DEFERRED_VALUES, Status
from schemas.snapshot import SnapshotRecord

COMMIT_EVERY_S = 2.0
"""Finished shards are committed together after so many seconds: a commit costs about 10 ms a table."""

SOFTWARE = (
    "pairmill",
    "torch",
    "open_clip_torch",
    "faiss-cpu",
    "faiss-gpu",
    "pyarrow",
    "deltalake",
    "ray",
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
    computed: dict[str, int]
    """Rows computed by each stage in this run."""
    stage_seconds: dict[str, float]
    """Time in kernels, summed over workers."""
    seconds: float


@dataclass(frozen=True)
class PlanReport:
    """What a refresh would do."""

    steps: list[dict[str, Any]]
    """One entry a step: step, kind, table, rows_done, rows_todo, note."""
    new_rows: int
    known: int
    repeated: int
    total: int


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
        ConfigError: there is no such recipe.
        PlanError: the function did not return a `Recipe`.
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
    recipe = build(config)
    if not isinstance(recipe, Recipe):
        raise PlanError(
            f"recipe {config.recipe!r} returned {type(recipe).__name__}; it must return pairmill.plan.Recipe"
        )
    return recipe


def recipe_names() -> list[str]:
    """The recipes of pipelines/."""
    import pkgutil

    import pipelines

    found = pkgutil.walk_packages(pipelines.__path__)
    return sorted(m.name for m in found if not m.ispkg and not m.name.startswith("_"))


# -- plan -------------------------------------------------------------------------------------------------------------


def plan(config: RunConfig, reporter: Reporter) -> PlanReport:
    """What `refresh` would do, without doing it."""
    compiled = compile_plan(load_recipe(config))
    dataset = Dataset(config.dataset)
    admission = admit(config, dataset, reporter, dry_run=True)
    frame = Frame(dataset, compiled, _files(dataset, compiled))
    state = replay(compiled, frame)
    steps = []
    waits = bool(state.pending.any())
    for planned in compiled.steps:
        entry: dict[str, Any] = {"step": planned.name, "kind": planned.kind, "table": planned.table}
        if planned.table is not None:
            done = int(frame.present(planned.table).sum())
            lacking = len(state.todo.get(planned.index, ()))
            entry |= {"rows_done": done, "rows_todo": lacking, "note": _why(done, lacking, admission.new)}
        else:
            entry |= {"rows_done": None, "rows_todo": None, "note": "judged anew from stored columns"}
        steps.append(entry)
    if waits:
        for entry in steps:
            if entry["rows_todo"] == 0 and entry["note"] == "up to date":
                entry["note"] = "depends on the steps before"
    return PlanReport(steps, admission.new, admission.known, admission.repeated, len(frame) + admission.new)


def _why(done: int, lacking: int, new: int) -> str:
    parts = []
    if lacking:
        parts.append(
            f"{lacking} live rows lack it" if done else f"{lacking} live rows, nothing stored for this version"
        )
    if new:
        parts.append(f"up to {new} new rows")
    return "; ".join(parts) or "up to date"


# -- refresh ----------------------------------------------------------------------------------------------------------


def refresh(config: RunConfig, reporter: Reporter, *, retry_deferred: bool = False) -> RunReport:
    """Admit new pairs, bring every stage up to date and publish a snapshot.

    Whatever was finished before an interruption is kept: run it again and it goes on.

    Args:
        retry_deferred: try the rows again whose last attempt failed in a way that may pass (time-outs, 5xx, DNS).

    Raises:
        PairmillError: see `pairmill.errors`; the last snapshot is intact.
    """
    compiled = compile_plan(load_recipe(config))
    dataset = Dataset(config.dataset)
    with dataset.lock():
        return _Refresh(config, compiled, dataset, reporter).run(retry_deferred)


@dataclass
class _Refresh:
    config: RunConfig
    plan: Plan
    dataset: Dataset
    reporter: Reporter
    computed: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    budgets: dict[str, ErrorBudget] = field(default_factory=dict)

    def run(self, retry_deferred: bool) -> RunReport:
        begin = time.monotonic()
        admission = admit(self.config, self.dataset, self.reporter)
        self._tell(admission)
        if retry_deferred:
            self._forget_deferred()
        frame = Frame(self.dataset, self.plan, self._files())
        if len(frame) == 0:
            self.reporter.note("the sources hold no rows: there is nothing to do")
            return self._report(None, False, admission, begin)
        self._segments()
        frame = Frame(self.dataset, self.plan, self._files())
        state = replay(self.plan, frame)
        if state.pending.any():
            raise ContractError(f"{int(state.pending.sum())} rows are still pending after all steps ran")
        snapshot, published = self._publish(frame, state, begin)
        return self._report(snapshot, published, admission, begin)

    def _report(
        self, snapshot: SnapshotRecord | None, published: bool, admission: Admission, begin: float
    ) -> RunReport:
        return RunReport(
            snapshot,
            published,
            admission.new,
            admission.known,
            admission.repeated,
            dict(self.computed),
            {k: round(v, 3) for k, v in self.seconds.items()},
            round(time.monotonic() - begin, 3),
        )

    def _tell(self, admission: Admission) -> None:
        known = f", {admission.known} known" if admission.known else ""
        repeated = f", {admission.repeated} repeated" if admission.repeated else ""
        self.reporter.note(f"{admission.rows} rows read: {admission.new} new pairs{known}{repeated}")

    def _files(self) -> dict[str, list[DataFile]]:
        return _files(self.dataset, self.plan)

    # -- segments --

    def _segments(self) -> None:
        """Run what is lacking, segment by segment. The engine is started when there is work for it, and once."""
        with _LazyEngine(self.config) as engine:
            for number, segment in enumerate(self.plan.segments):
                files = self._files()
                frame = Frame(self.dataset, self.plan, files)
                if segment.global_step is not None:
                    self._measure_globally(segment.global_step, frame)
                    continue
                units = list(units_to_do(self.plan, number, frame, files))
                if units:
                    self._run_units(engine, number, units, frame)

    def _run_units(self, engine: _LazyEngine, number: int, units: list[Unit], frame: Frame) -> None:
        errors = self.config.errors
        job = Job(self.dataset.url, self.plan, number, errors.max_fraction, errors.min_rows)
        shards = frame.pairs_column("shard").to_numpy()
        rows_of = dict(zip(*(a.tolist() for a in np.unique(shards, return_counts=True)), strict=True))
        started = engine.get(self.reporter)
        self.reporter.start(self.plan.segments[number].title, sum(rows_of[u.shard] for u in units))
        done: list[Unit] = []
        committed = time.monotonic()
        try:
            for unit in started.run(job, units):
                raise_failure(unit)
                done.append(unit)
                self._account(unit)
                self.reporter.advance(rows_of[unit.shard], unit.dropped)
                if time.monotonic() - committed > COMMIT_EVERY_S:
                    self._commit(done)
                    committed = time.monotonic()
        finally:  # also on Ctrl-C and on a failure elsewhere: what is finished is kept
            self._commit(done)
            self.reporter.finish()

    def _commit(self, units: list[Unit]) -> None:
        """Make the files of finished units visible, table by table in the order of the plan, and empty the list."""
        by_table: dict[str, list[DataFile]] = {}
        for output in itertools.chain.from_iterable(u.outputs for u in units):
            file = {k: v for k, v in output.items() if k != "table"}
            by_table.setdefault(output["table"], []).append(DataFile(**file))
        for table in self.plan.tables:
            if table in by_table:
                self.dataset.table(table, table_schema(self.plan, table)).commit(by_table[table])
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

    def _measure_globally(self, planned: PlannedStep, frame: Frame) -> None:
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
        output = step.measure(live, pa.array(todo))
        schema = table_schema(self.plan, planned.table)
        if output.num_rows != int(todo.sum()):
            raise ContractError(f"global stage {step.name!r} returned {output.num_rows} rows for {int(todo.sum())}")
        chosen = live.filter(pa.array(todo))
        columns = {f.name: pa.nulls(output.num_rows, f.type) for f in schema}
        columns |= {"uid": chosen.column("uid"), **{n: output.column(n) for n in output.column_names}}
        result = pa.table({f.name: columns[f.name] for f in schema}).cast(schema)
        self._write_by_shard(planned.table, schema, result, chosen.column("shard").to_numpy(), "part")
        self.computed[step.name] += output.num_rows
        self.seconds[step.name] = time.monotonic() - begin
        self.reporter.advance(output.num_rows, {})
        self.reporter.finish()

    def _write_by_shard(
        self, name: str, schema: pa.Schema, rows: pa.Table, shards: np.ndarray, what: str, *, replace: bool = False
    ) -> None:
        """One file for each shard, named by its content, committed together; with `replace`, in the place of those
        that the shard has. Shards whose file is there already are left alone."""
        table = self.dataset.table(name, schema)
        present = {(f.shard, f.checksum) for f in table.files()}
        files, touched = [], []
        order = pc.sort_indices(
            pa.table({"shard": shards, "uid": rows.column("uid")}),
            sort_keys=[("shard", "ascending"), ("uid", "ascending")],
        )
        rows, shards = rows.take(order), shards[order.to_numpy()]
        numbers, starts = np.unique(shards, return_index=True)
        for shard, start, end in zip(numbers.tolist(), starts, [*starts[1:], len(shards)], strict=True):
            file = write_if_new(self.dataset, name, schema, shard, what, rows.slice(start, end - start), present)
            if file is not None:
                files.append(file)
                touched.append(shard)
        if files:
            table.commit(files, replace=touched if replace else ())

    def _forget_deferred(self) -> None:
        """Take the rows out of the stages' tables whose reason may pass, so that they are work to do again."""
        values = pa.array(sorted(DEFERRED_VALUES))
        for name in self.plan.tables:
            schema = table_schema(self.plan, name)
            table = self.dataset.table(name, schema)
            old, new = [], []
            for file in table.files():
                rest, gone = without_rows(
                    self.dataset, name, file, schema, lambda rows: pc.is_in(rows.column("reason"), value_set=values)
                )
                if gone:
                    old.append(file)
                    new += [rest] if rest is not None else []
            if old:
                table.commit(new, remove=old)

    # -- publish --

    def _publish(self, frame: Frame, state: State, begin: float) -> tuple[SnapshotRecord, bool]:
        """Write the ledger and the snapshot record, unless the last snapshot says the same already."""
        reason = state.reason.column()
        status = statuses(reason)
        groups = settle(frame.uid, state.duplicate_of.column())
        ledger = pa.table(
            {
                "uid": frame.uid,
                "status": status,
                "reason": reason,
                "detail": state.detail.column(),
                "duplicate_of": groups.duplicate_of,
                "cluster": groups.cluster,
                **state.texts.columns(),
            },
            schema=fields.LEDGER,
        )
        shards = frame.pairs_column("shard").to_numpy()
        self._write_by_shard(LEDGER_TABLE, fields.LEDGER, ledger, shards, "ledger", replace=True)
        names = (PAIRS_TABLE, LEDGER_TABLE, *self.plan.tables)
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
            models=_models(self.plan),
            software=_software(),
            seconds=round(time.monotonic() - begin, 3),
        )
        self.dataset.publish(record)
        self.reporter.note(f"published snapshot {record.id}: {record.kept} of {record.admitted} pairs kept")
        return record, True


class _LazyEngine:
    """Starts the engine at its first use: a run with nothing to do starts none."""

    def __init__(self, config: RunConfig) -> None:
        self._context = open_engine(config.engine)
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


def _files(dataset: Dataset, plan: Plan) -> dict[str, list[DataFile]]:
    """The visible files of all tables of a plan."""
    names: Iterable[str] = (PAIRS_TABLE, *plan.tables)
    return {name: dataset.table(name, table_schema(plan, name)).files() for name in names}


def statuses(reason: pa.ChunkedArray) -> pa.ChunkedArray:
    """The status that follows from each reason, as `schemas.reasons.status_of` has it."""
    deferred = pc.is_in(reason, value_set=pa.array(sorted(DEFERRED_VALUES)))
    out = pc.if_else(deferred, Status.DEFERRED.value, Status.DROPPED.value)
    return pc.if_else(pc.is_null(reason), Status.KEPT.value, out)


def _models(plan: Plan) -> dict[str, str]:
    """What identifies the model of each stage that has one."""
    found = {}
    for planned in plan.steps:
        for f in dataclasses.fields(planned.step):  # type: ignore[arg-type]
            value = getattr(planned.step, f.name)
            identity = getattr(value, "identity", None)
            if callable(identity) and not isinstance(value, Section):  # a part of the config is no model
                found[f"{planned.name}.{f.name}"] = str(identity())
    return found


def _software() -> dict[str, str]:
    found = {}
    for name in SOFTWARE:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
