"""Running a plan over stored columns: what is left to do, who is live, and the work of one worker on one shard.

`replay` walks the steps of a plan over what the store already holds. The driver uses it to find the work and to
publish; nothing is computed but verdicts. `run_group` is what a worker does on every engine: it walks the same steps
over one shard, computes the rows that a stage's table lacks, writes them to a file and returns its description for the
commit.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pairmill.errors import ContractError
from pairmill.plan import OUTCOMES, PAIR_COLUMNS, Group, Plan, PlannedStep, read_outcomes
from pairmill.stage import (
    Batch,
    ErrorBudget,
    GlobalStage,
    GlobalVerdict,
    Judgement,
    Kernel,
    PixelCache,
    Stage,
    TextOutcomes,
    Verdict,
    apply,
    output_schema,
    quarantined,
)
from pairmill.store import PAIRS_TABLE, DataFile, Dataset, ShardWriter, existing_file, read_files
from pairmill.tombstones import Tombstones
from schemas import fields
from schemas.reasons import Reason


def table_schema(plan: Plan, table: str) -> pa.Schema:
    """The schema of a table's files."""
    if table == PAIRS_TABLE:
        return fields.PAIRS
    for planned in plan.steps:
        if planned.table == table and isinstance(planned.step, (Stage, GlobalStage)):
            return output_schema(planned.step)
    raise ContractError(f"the plan has no table {table!r}")


def table_files(dataset: Dataset, plan: Plan) -> dict[str, list[DataFile]]:
    """The visible files of all tables of a plan."""
    return {name: dataset.table(name, table_schema(plan, name)).files() for name in (PAIRS_TABLE, *plan.tables)}


class _Part:
    """The rows of one stage's table, stored and new, and where each row of the base is among them."""

    def __init__(
        self, dataset: Dataset, schema: pa.Schema, files: Sequence[DataFile], base_uid: pa.ChunkedArray
    ) -> None:
        self._dataset = dataset
        self._schema = schema
        self._files = list(files)
        self._new: list[pa.Table] = []
        self._stored: dict[str, pa.ChunkedArray] = {}
        self.load(("uid", "reason", "detail"))
        uid = self._stored["uid"]
        found = pc.index_in(base_uid, value_set=uid).fill_null(-1) if len(uid) else None
        self.position = found.to_numpy() if found is not None else np.full(len(base_uid), -1, np.int64)
        self.position = self.position.astype(np.int64, copy=True)
        self._rows = len(uid)

    def load(self, names: Iterable[str]) -> None:
        """Read these columns, those that are not there yet, in one go: opening files costs more than reading them."""
        missing = [name for name in dict.fromkeys(names) if name not in self._stored]
        if missing:
            rows = read_files(self._dataset, self._files, self._schema, missing)
            self._stored |= {name: rows.column(name) for name in missing}

    def append(self, rows: np.ndarray, table: pa.Table) -> None:
        """Add computed rows, which belong to these rows of the base."""
        self._new.append(table)
        self.position[rows] = self._rows + np.arange(table.num_rows)
        self._rows += table.num_rows

    def take(self, name: str, rows: np.ndarray) -> pa.ChunkedArray:
        """A column for some rows of the base; null where the table has none."""
        self.load((name,))
        stored = self._stored[name]
        chunks = [*stored.chunks, *(chunk for table in self._new for chunk in table.column(name).chunks)]
        return take(pa.chunked_array(chunks, type=stored.type), self.position[rows])


def take(column: pa.ChunkedArray, index: np.ndarray) -> pa.ChunkedArray:
    """The values at `index`, null where it is negative.

    Images are taken from their chunks: Arrow's own take puts all chunks together first, which copies the images of the
    whole shard and fails where they have more than 2 GiB.
    """
    if not pa.types.is_binary(column.type) or column.num_chunks < 2:
        return column.take(pa.array(index, mask=index < 0))
    starts = np.cumsum([0, *map(len, column.chunks)])
    chunk = np.where(index < 0, -1, np.searchsorted(starts, index, side="right") - 1)
    runs = np.flatnonzero(np.diff(chunk, prepend=-2, append=-2))
    parts = [
        pa.nulls(end - start, column.type)
        if chunk[start] < 0
        else column.chunk(chunk[start]).take(pa.array(index[start:end] - starts[chunk[start]]))
        for start, end in itertools.pairwise(runs.tolist())
    ]
    return pa.chunked_array(parts, type=column.type)


class Frame:
    """The pairs of some shards with the columns of all tables beside them, aligned by uid and loaded when asked for."""

    def __init__(self, dataset: Dataset, plan: Plan, files: Mapping[str, Sequence[DataFile]]) -> None:
        self._dataset = dataset
        self._plan = plan
        self._files = {table: list(found) for table, found in files.items()}
        self._parts: dict[str, _Part] = {}
        self._outcomes: dict[str, pa.ChunkedArray] = {}
        self._pairs: dict[str, pa.ChunkedArray] = {}
        self._load_pairs(("uid", "reason", "detail", "refresh", "shard"))
        self.uid = self._pairs["uid"]

    def __len__(self) -> int:
        return len(self.uid)

    def files(self, table: str) -> Sequence[DataFile]:
        """The files of a table that it sees."""
        return self._files.get(table, ())

    def removals(self, table: str) -> int:
        """How often files were taken out of a table."""
        return self._dataset.table(table, table_schema(self._plan, table)).removals()

    def _load_pairs(self, names: Iterable[str]) -> None:
        missing = [name for name in dict.fromkeys(names) if name not in self._pairs]
        if missing:
            rows = read_files(self._dataset, self._files.get(PAIRS_TABLE, []), fields.PAIRS, missing)
            self._pairs |= {name: rows.column(name) for name in missing}

    def pairs_column(self, name: str) -> pa.ChunkedArray:
        """A column of the pairs table, whole."""
        self._load_pairs((name,))
        return self._pairs[name]

    def part(self, table: str) -> _Part:
        """The rows of a stage's table."""
        if table not in self._parts:
            schema = table_schema(self._plan, table)
            self._parts[table] = _Part(self._dataset, schema, self._files.get(table, []), self.uid)
        return self._parts[table]

    def adopt(self, table: str, file: DataFile) -> None:
        """Take a finished file into account; only before its table was looked at."""
        self._files.setdefault(table, []).append(file)
        self._parts.pop(table, None)

    def present(self, table: str) -> np.ndarray:
        """Which rows the table has: booleans, one a row of the base."""
        return self.part(table).position >= 0

    def tell(self, outcomes: Mapping[str, pa.ChunkedArray]) -> None:
        """What verdicts made of texts: columns with one value a row of the base, which stages may then read."""
        self._outcomes.update(outcomes)

    def column(self, name: str, rows: np.ndarray) -> pa.ChunkedArray:
        """Any column of the plan, for some rows.

        Raises:
            ContractError: an outcome of verdicts that was not told.
        """
        if name in PAIR_COLUMNS:
            return self.pairs_column(name).take(pa.array(rows))
        if name in OUTCOMES:
            if name not in self._outcomes:
                raise ContractError(f"{name!r} is read, but no verdict has told it")
            return self._outcomes[name].take(pa.array(rows))
        return self.part(self._plan.columns[name]).take(name, rows)

    def table(self, names: Sequence[str], rows: np.ndarray) -> pa.Table:
        """Some columns, and ``uid`` first, for some rows."""
        wanted = list(dict.fromkeys(("uid", *names)))
        self._load_pairs(name for name in wanted if name in PAIR_COLUMNS)
        by_table: dict[str, list[str]] = {}
        for name in wanted:
            if name not in PAIR_COLUMNS and name not in OUTCOMES:
                by_table.setdefault(self._plan.columns[name], []).append(name)
        for table, columns in by_table.items():
            self.part(table).load(columns)
        return pa.table({name: self.column(name, rows) for name in wanted})


class Scattered:
    """Values of some rows of a frame: Arrow chunks, and where each row is among them; the last value given counts."""

    def __init__(self, rows: int, kind: pa.DataType) -> None:
        self._position = np.full(rows, -1, np.int64)
        self._chunks: list[pa.Array] = []
        self._rows = 0
        self._kind = kind

    def add(self, rows: np.ndarray, values: pa.Array) -> None:
        """The values of these rows of the frame; they replace what was there."""
        self._position[rows] = self._rows + np.arange(len(rows))
        self._rows += len(rows)
        self._chunks.append(values)

    def column(self) -> pa.ChunkedArray:
        """One value a row of the frame; null where none was given."""
        index = pa.array(self._position, mask=self._position < 0)
        return pa.chunked_array(self._chunks, self._kind).take(index)


class TextLedger:
    """What verdicts said of the texts of a frame's pairs."""

    _PARTS = ((fields.TEXT_RANKS, "ranks"), (fields.TEXT_REASONS, "reasons"), (fields.TEXT_DETAILS, "details"))

    def __init__(self, rows: int) -> None:
        self._columns = {part: Scattered(rows, f.type) for f, part in self._PARTS}

    def add(self, rows: np.ndarray, outcomes: TextOutcomes) -> None:
        """What was said of these rows of the frame; it replaces what was said before."""
        for part, column in self._columns.items():
            column.add(rows, getattr(outcomes, part))

    def columns(self) -> dict[str, pa.ChunkedArray]:
        """The ledger's columns of texts, null for rows of which nothing was said."""
        return {f.name: self._columns[part].column() for f, part in self._PARTS}


@dataclass
class State:
    """What is known of each row of a frame after some steps: arrays of its length."""

    live: np.ndarray
    """bool: not dropped by the steps so far."""
    pending: np.ndarray
    """bool: live, but a stage still lacks its row, so later steps cannot say anything of it."""
    reason: Scattered
    detail: Scattered
    duplicate_of: Scattered
    texts: TextLedger
    """What became of the texts of each pair."""
    todo: dict[int, np.ndarray] = field(default_factory=dict)
    """Rows that the stage with this index in the plan has to compute."""
    funnel: list[dict[str, Any]] = field(default_factory=list)
    """One entry a step: step, kind, entered, reasons, left; and texts where the step chose among texts."""

    @classmethod
    def start(cls, frame: Frame) -> State:
        """Before the first step: malformed source rows are dropped already."""
        n = len(frame)
        reason, detail = (frame.pairs_column(name) for name in ("reason", "detail"))
        live = pc.is_null(reason).to_numpy()
        said = (Scattered(n, pa.string()), Scattered(n, pa.string()), Scattered(n, pa.string()))
        state = cls(live.copy(), np.zeros(n, bool), *said, texts=TextLedger(n))
        malformed = np.flatnonzero(~live)
        if len(malformed):
            state.reason.add(malformed, _flat(reason.take(pa.array(malformed))))
            state.detail.add(malformed, _flat(detail.take(pa.array(malformed))))
        state._record("source", "source", n, counted(reason))
        return state

    def rows(self) -> np.ndarray:
        """Rows that are live and whose state is known."""
        return np.flatnonzero(self.live & ~self.pending)

    def drop(self, planned: PlannedStep, entered: int, rows: np.ndarray, verdict: Judgement) -> None:
        """Take the rows out that have a reason."""
        counts = self._drop(rows, verdict)
        self._record(planned.name, planned.kind, entered, counts)
        if verdict.texts is not None:
            self.texts.add(rows, verdict.texts)
            self.funnel[-1]["texts"] = {k: dict(sorted(v.items())) for k, v in sorted(verdict.texts.counts.items())}

    def _drop(self, rows: np.ndarray, verdict: Judgement) -> Mapping[str, int]:
        guilty = np.flatnonzero(pc.is_valid(verdict.reason).to_numpy(zero_copy_only=False))
        if not len(guilty):
            return {}
        at, picked = rows[guilty], pa.array(guilty)
        self.live[at] = False
        names = verdict.reason.take(picked)
        self.reason.add(at, names)
        for target, column in ((self.detail, verdict.detail), (self.duplicate_of, verdict.duplicate_of)):
            if column is not None:
                target.add(at, column.take(picked))
        return counted(names)

    def _record(self, name: str, kind: str, entered: int, counts: Mapping[str, int]) -> None:
        left = entered - sum(counts.values())
        self.funnel.append(
            {"step": name, "kind": kind, "entered": entered, "reasons": dict(sorted(counts.items())), "left": left}
        )


def counted(values: pa.Array | pa.ChunkedArray) -> dict[str, int]:
    """How often each value occurs, nulls aside; by value."""
    pairs = pc.value_counts(values).to_pylist()
    return dict(sorted((pair["values"], pair["counts"]) for pair in pairs if pair["values"] is not None))


def measured_failures(frame: Frame, table: str, rows: np.ndarray) -> Judgement:
    """The reasons a stage itself gave to rows it could not measure."""
    part = frame.part(table)
    return Judgement(_flat(part.take("reason", rows)), _flat(part.take("detail", rows)))


def judge(planned: PlannedStep, frame: Frame, rows: np.ndarray) -> Judgement:
    """What a verdict says of some rows. Global verdicts see them sorted by uid; the answer is in the order of `rows`.

    Raises:
        ContractError: the verdict returned another number of rows.
    """
    step = planned.step
    if isinstance(step, GlobalVerdict):
        order = sorted_by_uid(frame, rows)
        answer = step.judge(frame.table(("shard", "refresh", *step.reads), rows[order]))
        back = pa.array(np.argsort(order, kind="stable"))
    elif isinstance(step, Verdict):
        answer = step.judge(frame.table(step.reads, rows))
        back = None
    else:
        raise ContractError(f"{planned.name!r} is no verdict")
    if len(answer.reason) != len(rows):
        raise ContractError(f"verdict {planned.name!r} judged {len(answer.reason)} rows of {len(rows)}")

    def in_order(column: pa.Array | pa.ChunkedArray) -> pa.Array:
        return _flat(column) if back is None else _flat(column).take(back)

    texts = answer.texts
    if texts is not None:
        ranks, reasons, details = (in_order(column) for column in (texts.ranks, texts.reasons, texts.details))
        texts = TextOutcomes(ranks, reasons, details, texts.counts)
    return Judgement(
        in_order(answer.reason),
        None if answer.detail is None else in_order(answer.detail),
        None if answer.duplicate_of is None else in_order(answer.duplicate_of),
        texts,
    )


def sorted_by_uid(frame: Frame, rows: np.ndarray) -> np.ndarray:
    """Positions in `rows` that sort them by uid: the order global steps see, independent of shards."""
    return pc.sort_indices(frame.uid.take(pa.array(rows))).to_numpy()


def _flat(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def replay(plan: Plan, frame: Frame, until: int | None = None) -> State:
    """Walk the first `until` steps over what the tables hold.

    Rows that a stage lacks become pending and are listed in `State.todo`. A global verdict cannot be judged while a row
    is pending: the walk ends there.
    """
    state = State.start(frame)
    for planned in plan.steps[:until]:
        rows = state.rows()
        if planned.table is not None:
            lacking = rows[~frame.present(planned.table)[rows]]
            if len(lacking):
                state.todo[planned.index] = lacking
                state.pending[lacking] = True
                rows = state.rows()
            state.drop(planned, len(rows), rows, measured_failures(frame, planned.table, rows))
        else:
            if planned.kind == "global verdict" and state.pending.any():
                break
            state.drop(planned, len(rows), rows, judge(planned, frame, rows))
    return state


# -- the work of one worker on one shard ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What all workers of a segment know."""

    dataset: str
    plan: Plan
    segment: int
    max_error_fraction: float
    min_error_rows: int

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of the segment."""
        return self.plan.segments[self.segment].groups


@dataclass
class Unit:
    """One shard on its way through a segment: references only, never pixels. JSON travels between workers."""

    shard: int
    live: str
    """Who is live: bits over the rows of the shard's pairs file, packed, hex."""
    files: dict[str, list[dict[str, Any]]]
    """The files of the shard, by table: `DataFile` as dictionaries."""
    removals: dict[str, int] = field(default_factory=dict)
    """How often files were taken out of each table (`Table.removals`)."""
    wanted: list[int] = field(default_factory=list)
    """Stages, by their index in the plan, that may have rows to compute in this shard."""
    outcomes: dict[str, list[Any]] = field(default_factory=dict)
    """What verdicts before the segment made of texts, one value a row of the shard's pairs file, by column; only those
    that its stages read."""
    outputs: list[dict[str, Any]] = field(default_factory=list)
    """Files to commit: `DataFile` with ``table``."""
    computed: dict[str, int] = field(default_factory=dict)
    """Rows computed, by stage."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows dropped, by reason."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time in kernels, by stage."""
    loading: float = 0.0
    """Time that workers waited for kernels to open, seconds."""
    storing: float = 0.0
    """Time in reading and writing the store."""
    busy: float = 0.0
    """Time that workers had the unit, all of the above included."""
    errors: dict[str, list[Any]] = field(default_factory=dict)
    """By stage: rows seen, rows quarantined, first traceback."""
    failure: list[str] | None = None
    """Class name and message of the error that stopped this unit."""

    def dumps(self) -> str:
        """The unit as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> Unit:
        """The inverse of `dumps`."""
        return cls(**json.loads(text))


def pack(live: np.ndarray) -> str:
    """Booleans as hex."""
    return np.packbits(live).tobytes().hex()


_OUTCOME_TYPES = {f.name: f.type for f in (fields.TEXT_RANKS,)}


def unpack(text: str, rows: int) -> np.ndarray:
    """The inverse of `pack`."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=rows).astype(bool)


@dataclass
class Care:
    """How to run a shard again that killed its worker: with a journal of kernel calls, and smaller calls."""

    journal: str
    """Path of a file that names the stage and the uids of the kernel call under way."""
    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    """By stage and uid: rows a call at most."""
    crashed: dict[str, list[str]] = field(default_factory=dict)
    """By stage: uids that killed a worker on their own; they are quarantined without another try."""

    def note(self, stage: str, uids: list[str]) -> None:
        """Say what is about to run."""
        with open(self.journal, "w", encoding="utf-8") as file:
            json.dump([stage, uids], file)

    def parts(self, stage: str, uids: list[str]) -> Iterator[tuple[slice, bool]]:
        """Cut a call into parts: rows, and whether they are to be quarantined."""
        crashed = set(self.crashed.get(stage, ()))
        limits = self.rows.get(stage, {})
        start = 0
        while start < len(uids):
            if uids[start] in crashed:
                yield slice(start, start + 1), True
                start += 1
                continue
            end, limit = start + 1, limits.get(uids[start], len(uids))
            while end < len(uids) and end - start < limit and uids[end] not in crashed:
                limit = min(limit, limits.get(uids[end], len(uids)))
                if end - start >= limit:
                    break
                end += 1
            yield slice(start, end), False
            start = end


WARMING = "pairmill-warm"
"""How the names of threads begin that load models ahead."""

_opening = threading.Lock()
"""transformers loads under settings of the whole process: of two models that load at a time, one lost tied weights."""


def _open(stage: Stage) -> Kernel:
    with _opening:
        return stage.open()


class Worker:
    """Holds the opened kernels of a group; lives as long as the process or actor it is in."""

    def __init__(self, job: Job, group: int, care: Care | None = None) -> None:
        self.job = job
        self.group = group
        self._group = job.groups[group]
        self._care = care
        self._dataset = Dataset(job.dataset)
        self._kernels: dict[int, Kernel] = {}
        self._warming: dict[int, Future[Kernel]] = {}
        self._pixels = PixelCache()
        self._tombstones: Tombstones | None = None

    def _taken_down(self, output: pa.Table) -> pa.Table:
        """What a stage measured, without the images that were taken down for good."""
        if fields.SHA256.name not in output.column_names:
            return output
        if self._tombstones is None:
            self._tombstones = Tombstones.load(self._dataset)
        return self._tombstones.without_images(output)

    def warm(self, wanted: Sequence[int]) -> None:
        """Begin to open the stages, by their index in the plan, in a thread: models load while others still fetch. What
        goes wrong is told when the stage is used."""
        cold = [s for s in self._group.steps if s.index in wanted and s.index not in {*self._kernels, *self._warming}]
        if cold:
            pool = ThreadPoolExecutor(1, thread_name_prefix=WARMING)
            self._warming |= {s.index: pool.submit(_open, s.step) for s in cold if isinstance(s.step, Stage)}
            pool.shutdown(wait=False)

    def release(self) -> None:
        """Let go of all kernels and of the memory that they hold, on a GPU too; they are opened again when they are
        used."""
        for opening in self._warming.values():
            if not opening.cancel():
                futures.wait([opening])
        self._warming.clear()
        self._kernels.clear()
        self._pixels.clear()
        gc.collect()  # modules of torch hold each other in circles
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()

    def _kernel(self, planned: PlannedStep) -> Kernel:
        if planned.index not in self._kernels:
            assert isinstance(planned.step, Stage)
            warming = self._warming.pop(planned.index, None)
            self._kernels[planned.index] = warming.result() if warming else _open(planned.step)
        return self._kernels[planned.index]

    def run(self, unit: Unit) -> Unit:
        """Run the group over a shard: compute what is lacking, write it, and return the unit with its new files."""
        begin = time.perf_counter()
        plan = self.job.plan
        files = {table: [DataFile(**f) for f in found] for table, found in unit.files.items()}
        frame = Frame(self._dataset, plan, files)
        frame.tell(
            {name: pa.chunked_array([pa.array(values, _OUTCOME_TYPES[name])]) for name, values in unit.outcomes.items()}
        )
        live = unpack(unit.live, len(frame))
        outputs = list(unit.outputs)
        names = {}
        for planned in self._group.steps:
            if planned.table is not None:
                adopted, names[planned.index] = self._adopt(planned, unit, files)
                for file in adopted:
                    frame.adopt(planned.table, file)
                    outputs.append({"table": planned.table, **asdict(file)})
        walk = _Walk(self.job, self._group, frame, live, self._kernel, self._pixels, self._care, self._taken_down)
        walk.storing = time.perf_counter() - begin
        with contextlib.ExitStack() as stack:
            writers: dict[int, ShardWriter] = {}

            def write(planned: PlannedStep, rows: pa.Table) -> None:
                if planned.index not in writers:
                    assert planned.table is not None
                    schema = table_schema(plan, planned.table)
                    writer = self._dataset.table(planned.table, schema).writer(unit.shard, names[planned.index])
                    writers[planned.index] = stack.enter_context(writer)
                writers[planned.index].write(rows)

            walk.run(write)
            closing = time.perf_counter()
            for planned in self._group.steps:
                if planned.index in writers:
                    outputs.append({"table": planned.table, **asdict(writers[planned.index].close())})
            walk.storing += time.perf_counter() - closing
        merged = {table: [asdict(f) for f in found] for table, found in files.items()}
        for output in outputs[len(unit.outputs) :]:
            new = {k: v for k, v in output.items() if k != "table"}
            merged.setdefault(output["table"], []).append(new)
        return replace(
            unit,
            live=pack(walk.live),
            files=merged,
            outputs=outputs,
            computed={**unit.computed, **walk.computed},
            dropped=dict(Counter(unit.dropped) + walk.dropped),
            seconds={**unit.seconds, **walk.seconds},
            loading=unit.loading + walk.loading,
            storing=unit.storing + walk.storing,
            busy=unit.busy + time.perf_counter() - begin,
            errors={**unit.errors, **walk.errors},
        )

    def _adopt(self, planned: PlannedStep, unit: Unit, files: dict[str, list[DataFile]]) -> tuple[list[DataFile], str]:
        """Files that an interrupted run finished for this very work but did not commit, and a name for the next one.

        A name says what the work is: which pairs, who of them is live, what verdicts made of their texts where the
        stage reads that, what the table holds already, and how often something was taken out of it. So the same work
        has the same name in every run, and other work never finds the file.
        """
        table = planned.table
        assert table is not None
        adopted: list[DataFile] = []
        known = [f.relative for f in files.get(table, [])]
        pairs = sorted(f.relative for f in files.get(PAIRS_TABLE, []))
        work: list[Any] = [pairs, unit.live, unit.removals.get(table, 0)]
        work += [unit.outcomes[name] for name in read_outcomes(planned.step)]
        while True:
            name = "part-" + hashlib.sha256(json.dumps([*work, sorted(known)]).encode()).hexdigest()[:16]
            found = existing_file(self._dataset, table, unit.shard, name)
            if found is None:
                return adopted, name
            adopted.append(found)
            known.append(found.relative)


class _Walk:
    """The steps of a group over the live rows of one shard."""

    def __init__(
        self,
        job: Job,
        group: Group,
        frame: Frame,
        live: np.ndarray,
        kernel: Callable[[PlannedStep], Kernel],
        pixels: PixelCache,
        care: Care | None,
        taken_down: Callable[[pa.Table], pa.Table],
    ) -> None:
        self._taken_down = taken_down
        self._job = job
        self._group = group
        self._frame = frame
        self._kernel = kernel
        self._pixels = pixels
        self._care = care
        self.live = live
        self.computed: dict[str, int] = {}
        self.dropped: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self.loading = 0.0
        self.storing = 0.0
        self.errors: dict[str, list[Any]] = {}
        self._budgets: dict[str, ErrorBudget] = {}

    def run(self, write: Callable[[PlannedStep, pa.Table], None]) -> None:
        """Chunk by chunk through all steps, so that decoded images are shared and memory is bounded."""
        rows = np.flatnonzero(self.live)
        shard_rows = len(rows)
        for start in range(0, shard_rows, self._group.resources.rows):
            alive = rows[start : start + self._group.resources.rows]
            for planned in self._group.steps:
                if planned.table is not None:
                    self._measure(planned, alive, shard_rows, write)
                    verdict = measured_failures(self._frame, planned.table, alive)
                else:
                    verdict = judge(planned, self._frame, alive)
                keep = pc.is_null(verdict.reason).to_numpy(zero_copy_only=False)
                self.dropped.update(counted(verdict.reason))
                self.live[alive[~keep]] = False
                alive = alive[keep]
            self._pixels.clear()
        for name, budget in self._budgets.items():
            self.errors[name] = [self.computed[name], budget.errors, budget.first_traceback]

    def _measure(
        self, planned: PlannedStep, alive: np.ndarray, shard_rows: int, write: Callable[[PlannedStep, pa.Table], None]
    ) -> None:
        assert planned.table is not None and isinstance(planned.step, Stage)
        stage = planned.step
        lacking = alive[~self._frame.present(planned.table)[alive]]
        if not len(lacking):
            return
        budget = self._budgets.setdefault(
            stage.name, ErrorBudget(self._job.max_error_fraction, self._job.min_error_rows, shard_rows)
        )
        begin = time.perf_counter()
        kernel = self._kernel(planned)
        opened = time.perf_counter()
        batch = Batch(self._frame.table(stage.reads, lacking), self._pixels)
        read = time.perf_counter()
        output = self._taken_down(self._apply(stage, kernel, batch, budget))
        computed = time.perf_counter()
        self.computed[stage.name] = self.computed.get(stage.name, 0) + len(lacking)
        self._frame.part(planned.table).append(lacking, output)
        write(planned, output)
        self.loading += opened - begin
        self.seconds[stage.name] = self.seconds.get(stage.name, 0.0) + computed - read
        self.storing += read - opened + time.perf_counter() - computed

    def _apply(self, stage: Stage, kernel: Kernel, batch: Batch, budget: ErrorBudget) -> pa.Table:
        if self._care is None:
            return apply(stage, kernel, batch, budget)
        outputs = []
        uids = batch.pylist("uid")
        for rows, crashed in self._care.parts(stage.name, uids):
            part = batch.slice(rows.start, rows.stop - rows.start)
            if crashed:
                budget.spend(stage.name, RuntimeError(f"the process died on {uids[rows.start]}"))
                outputs.append(quarantined(stage, part, Reason.ERROR_CRASH, f"{stage.name}: its process died"))
            else:
                self._care.note(stage.name, uids[rows])
                outputs.append(apply(stage, kernel, part, budget))
        return pa.concat_tables(outputs)


def outdated(plan: Plan, frame: Frame, planned: PlannedStep, *, retry: bool) -> np.ndarray:
    """The rows that a stage's table has and that are to be measured anew (`Stage.outdated`): positions in the frame.
    Rows before which another stage still has work to do are left out: nothing is known of them yet."""
    step, table = planned.step, planned.table
    if table is None or not isinstance(step, Stage) or not step.revises or not frame.files(table):
        return np.empty(0, np.int64)
    state = replay(plan, frame, planned.index)
    rows = state.rows()
    rows = rows[frame.present(table)[rows]]
    frame.tell(state.texts.columns())
    mask = step.outdated(frame.table(step.revises, rows), retry=retry)
    return rows[pc.fill_null(mask, False).to_numpy(zero_copy_only=False)]


def units_to_do(plan: Plan, segment: int, frame: Frame) -> Iterator[Unit]:
    """One unit for each shard that has rows to compute in a segment of map stages."""
    steps = plan.segments[segment].steps
    first = steps[0].index
    todo = np.zeros(len(frame), bool)
    for index, rows in replay(plan, frame, steps[-1].index + 1).todo.items():
        if index >= first:
            todo[rows] = True
    if not todo.any():
        return iter(())
    before = replay(plan, frame, first)
    wanted = (PAIRS_TABLE, *plan.tables[: sum(s.table is not None for s in plan.steps[: steps[-1].index + 1])])
    lacking = {s.index: todo & ~frame.present(s.table) for s in steps if s.table is not None}
    read = {name for s in steps for name in read_outcomes(s.step)}
    outcomes = {name: column for name, column in before.texts.columns().items() if name in read}
    return units_of(frame, wanted, before.live, todo, lacking, outcomes)


def units_of(
    frame: Frame,
    tables: Sequence[str],
    live: np.ndarray,
    todo: np.ndarray,
    lacking: Mapping[int, np.ndarray],
    outcomes: Mapping[str, pa.ChunkedArray] | None = None,
) -> Iterator[Unit]:
    """One unit for each shard with a row in `todo`, with the files of `tables` and who of its rows is live. `lacking`:
    rows that a stage, by its index, may have to compute. `outcomes`: what verdicts made of texts, for all rows."""
    shards = frame.pairs_column("shard").to_numpy()
    by_shard: dict[int, dict[str, list[dict[str, Any]]]] = {}
    removals = {table: frame.removals(table) for table in tables}
    for table in sorted(tables):
        for file in frame.files(table):
            by_shard.setdefault(file.shard, {}).setdefault(table, []).append(asdict(file))
    for shard in np.unique(shards[todo]).tolist():
        low, high = np.searchsorted(shards, [shard, shard + 1])  # pairs files are listed by shard
        wanted = [index for index, rows in lacking.items() if rows[low:high].any()]
        told = {name: column.slice(low, high - low).to_pylist() for name, column in (outcomes or {}).items()}
        yield Unit(shard, pack(live[low:high]), by_shard[shard], removals, wanted, told)
