"""The stage contract: what a stage is, what a verdict is, and `apply`, the only caller of kernels on every engine.

A **stage** measures: it reads columns and writes columns. A **verdict** judges: it turns columns into reasons. Both are
frozen dataclasses, so they are picklable, comparable and fingerprinted by what they say. Weights, sessions and other
live things exist only in the kernel, the closure that `Stage.open` returns once in each worker.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, overload

import pyarrow as pa

from pairmill.errors import ContractError, PairmillError, StageFailed
from schemas import fields
from schemas.reasons import Reason

if TYPE_CHECKING:
    from PIL import Image

    from schemas.config import Placement

RUN_ERRORS = (NameError, AttributeError, ImportError, NotImplementedError, PairmillError)
"""Defects of the code, and what pairmill raises on purpose (`ConfigError` above all: a key that an endpoint refuses, a
head of another width). They are no row's fault: `apply` lets them through."""


WORKERS_ENV = "PAIRMILL_WORKERS"
"""Environment variable: how many processes of this run work side by side, where limits have to be shared."""


@dataclass(frozen=True)
class Resources:
    """What one worker of a stage occupies. Never part of a stage's identity: results do not depend on it."""

    cpus: float = 1.0
    gpus: float = 0.0
    """A fraction shares a GPU among workers."""
    rows: int = 256
    """Rows a kernel call. Stages with equal resources run in one worker and share decoded images."""
    actor: bool = False
    """Opening is costly (weights): keep the kernel in a long-lived worker."""
    workers: int | None = None
    """Of an actor: so many on a cluster, and no more. A stage that waits for an endpoint keeps few of them busy with
    many requests, and each takes its part (`WORKERS_ENV`) of limits that are the whole run's."""
    gpu_if_any: bool = False
    """One GPU a worker where the cluster has GPUs, none where it has none; only where `gpus` is 0."""
    memory: int | None = None
    """Bytes of main memory that a cluster books for a worker."""
    custom: tuple[tuple[str, float], ...] = ()
    """A cluster's custom resources: name and amount."""
    labels: tuple[tuple[str, str], ...] = ()
    """Labels of the nodes that a worker may run on: name and value."""
    min_workers: int | None = None
    """Of an actor: so many are kept, at least."""
    max_workers: int | None = None
    """Of an actor: so many at most; null: as many as fit."""

    def placed(self, placement: Placement) -> Resources:
        """These resources with what a config says of them."""
        said: dict[str, Any] = {
            name: value
            for name in ("cpus", "gpus", "memory", "min_workers", "max_workers")
            if (value := getattr(placement, name)) is not None
        }
        if "gpus" in said:
            said["gpu_if_any"] = False
        if placement.resources:
            said["custom"] = tuple(sorted(placement.resources.items()))
        if placement.labels:
            said["labels"] = tuple(sorted(placement.labels.items()))
        return dataclasses.replace(self, **said)


class PixelCache:
    """Decoded images of the rows at hand, shared by the stages and threads of one worker; bounded by bytes, oldest out
    first."""

    def __init__(self, max_bytes: int = 512 * 2**20) -> None:
        self._images: dict[str, Image.Image] = {}
        self._bytes = 0
        self._max_bytes = max_bytes
        self._lock = threading.Lock()

    def decode(self, uid: str, data: Callable[[], bytes]) -> Image.Image:
        """The upright RGB image of `data`, decoded at most once while it stays in the cache."""
        with self._lock:
            image = self._images.get(uid)
        if image is None:
            from PIL import Image

            with Image.open(io.BytesIO(data())) as opened:
                image = opened.convert("RGB")  # stored images are upright and opaque already
            self._keep(uid, image)
        return image

    def _keep(self, uid: str, image: Image.Image) -> None:
        with self._lock:
            if uid in self._images:  # another thread was faster
                return
            self._images[uid] = image
            self._bytes += _decoded_bytes(image)
            while self._bytes > self._max_bytes and len(self._images) > 1:
                self._bytes -= _decoded_bytes(self._images.pop(next(iter(self._images))))

    def clear(self) -> None:
        """Forget all images."""
        with self._lock:
            self._images.clear()
            self._bytes = 0


def _decoded_bytes(image: Image.Image) -> int:
    """What Pillow takes for an RGB image: four bytes a pixel."""
    return image.width * image.height * 4


class Images(Sequence["Image.Image"]):
    """The decoded upright RGB images of some rows. Each is decoded when it is asked for, by whichever thread asks, so
    that decoding runs beside what is done with those before it; a slice is as lazy.

    Raises:
        PIL.UnidentifiedImageError, OSError: on access to an image that cannot be decoded.
    """

    def __init__(self, table: pa.Table, pixels: PixelCache) -> None:
        self._table = table
        self._pixels = pixels

    def __len__(self) -> int:
        return self._table.num_rows

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Images: ...
    def __getitem__(self, index: int | slice) -> Image.Image | Images:
        if isinstance(index, slice):
            rows = range(len(self))[index]
            if rows.step == 1:
                return Images(self._table.slice(rows.start, len(rows)), self._pixels)
            return Images(self._table.take(pa.array(rows, pa.int64())), self._pixels)
        row = range(len(self))[index]
        image = self._table.column("image")[row]
        return self._pixels.decode(self._table.column("uid")[row].as_py(), image.as_py)


@dataclass(frozen=True)
class Batch:
    """Rows handed to a kernel: the columns a stage reads and ``uid``. Kernels must not change them."""

    table: pa.Table
    pixels: PixelCache = field(default_factory=PixelCache, compare=False)

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str) -> pa.ChunkedArray:
        """One column, as declared in ``reads``."""
        return self.table.column(name)

    def pylist(self, name: str) -> list[Any]:
        """One column as Python values."""
        return self.table.column(name).to_pylist()

    def images(self) -> Images:
        """The decoded upright RGB images; needs ``image`` in ``reads``."""
        return Images(self.table, self.pixels)

    def slice(self, start: int, length: int) -> Batch:
        """Some consecutive rows."""
        return Batch(self.table.slice(start, length), self.pixels)


Kernel = Callable[[Batch], pa.Table]
"""Maps a batch to a table with as many rows, in the same order: the stage's ``writes``, and optionally ``reason`` and
``detail`` for rows that could not be measured (such rows are dropped or deferred, and their other columns may be
null)."""


class Step:
    """What stages and verdicts share: they are frozen dataclasses with an identity."""

    name: ClassVar[str]
    """Short, unique in a recipe; also the first part of the name of the stage's table."""
    version: ClassVar[int] = 1
    """Raised when the code gives other results for the same parameters."""
    outcomes: ClassVar[tuple[str, ...]] = ()
    """Of a verdict that chooses among texts: columns of the ledger that stages after it may read. What a stage makes of
    an outcome is no part of its identity; it says by `Stage.outdated` which of its rows another outcome concerns."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the columns it needs."""
        raise NotImplementedError(f"{type(self).__qualname__} must declare reads")

    def parameters(self) -> dict[str, Any]:
        """The fields that determine results, as JSON values. Fields with ``metadata={"identity": False}`` are left out
        (hardware, batch sizes, paths); a value with an ``identity()`` method (a model reference) speaks for itself."""
        return {
            f.name: _plain(getattr(self, f.name))
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if f.metadata.get("identity", True)
        }

    def fingerprint(self, upstream: Sequence[str] = ()) -> str:
        """sha256 (hex) of the step's identity and of the fingerprints of the columns it reads."""
        kind = type(self)
        identity = [f"{kind.__module__}.{kind.__qualname__}", kind.version, self.parameters(), sorted(upstream)]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class Stage(Step, ABC):
    """A map stage: measures each row on its own. Results must not depend on batch size, order, worker or engine."""

    resources: Resources

    @property
    @abstractmethod
    def writes(self) -> tuple[pa.Field, ...]:
        """The columns it produces; no other stage of the recipe may write them."""

    @abstractmethod
    def open(self) -> Kernel:
        """Load what the stage needs and return the kernel. Called once in each worker."""

    def estimate(self, rows: int) -> str:  # noqa: ARG002 (most stages cost nothing but time)
        """What this many rows may cost besides time, in words for `pairmill plan`; empty where nothing."""
        return ""

    @property
    def revises(self) -> tuple[str, ...]:
        """Columns that `outdated` looks at, its own or outcomes of verdicts before it; none where a row that was
        measured once is measured for good."""
        return ()

    def outdated(self, rows: pa.Table, *, retry: bool) -> pa.Array:
        """Which stored rows are to be measured anew, given ``uid`` and `revises`: booleans.

        Args:
            rows: Live rows that the stage's table has.
            retry: Whether rows count that a run may try again; false from the second time on that a run asks.
        """
        raise NotImplementedError(f"{type(self).__qualname__} revises {self.revises}, so it must say what is outdated")


CELL = "cell"
"""The column by which `Scatter` groups rows: int64, not null."""

CellWork = Callable[[pa.Table], pa.Table]
"""What is done with all rows of one cell, in whatever order they come; picklable, and the same for equal rows. Its
answer may be empty, but always has the same schema. It may say by an attribute `resources` what it occupies
(`Resources`: CPUs and GPUs); else it is one CPU."""

Scatter = Callable[[CellWork, Iterable[pa.Table]], Iterator[pa.Table]]
"""Groups the rows of some tables of one schema by their column `CELL`, hands each group to the work as one table, and
yields the answers in any order (`pairmill.engines.Engine.scatter`). The tables are asked for as there is room for
them."""

_WHOLE = {b"pairmill.cells": b"whole"}


def whole_cells(table: pa.Table) -> pa.Table:
    """A table for `Scatter` that has all the rows of its cells, and says so: it goes on to the work at once, where the
    rows of other tables wait until the last one has come, since any may hold more of the same cell."""
    return table.replace_schema_metadata({**(table.schema.metadata or {}), **_WHOLE})


def has_whole_cells(table: pa.Table) -> bool:
    """Whether `whole_cells` has been said of a table."""
    return _WHOLE.items() <= (table.schema.metadata or {}).items()


class GlobalStage(Step, ABC):
    """A stage that must see all live rows at once, but only narrow columns of them, never pixels."""

    @property
    @abstractmethod
    def writes(self) -> tuple[pa.Field, ...]:
        """The columns it produces, one row for each measured pair."""

    @abstractmethod
    def measure(self, live: pa.Table, todo: pa.BooleanArray, scatter: Scatter) -> pa.Table:
        """Measure the rows marked in `todo` against all rows of `live` (``uid``, ``shard``, ``refresh`` and ``reads``,
        sorted by uid). Returns ``writes`` for the marked rows, in their order. Work that falls into cells goes through
        `scatter`, which may send it to other machines and starts them first: small work is better done here."""


@dataclass(frozen=True)
class TextOutcomes:
    """What became of the texts of some pairs: for each pair, lists over its texts, those that came with it first, then
    those that a captioner wrote. Of each text, either rank or reason is null."""

    ranks: pa.Array
    """As `schemas.fields.TEXT_RANKS`."""
    reasons: pa.Array
    """As `schemas.fields.TEXT_REASONS`."""
    details: pa.Array
    """As `schemas.fields.TEXT_DETAILS`."""
    counts: Mapping[str, Mapping[str, int]]
    """How many texts of each source were kept (``kept``) or not (by reason)."""


KEPT = "kept"
"""The key of kept texts in `TextOutcomes.counts`; the other keys are reasons."""


@dataclass(frozen=True)
class Judgement:
    """What a verdict says of some rows: a reason for each row, or null for a row that stays."""

    reason: pa.Array
    detail: pa.Array | None = None
    duplicate_of: pa.Array | None = None
    """uid of the pair that a dropped pair duplicates; groups follow from it (`pairmill.dedup.groups`)."""
    texts: TextOutcomes | None = None
    """Of a verdict that chooses among the texts of a pair. The last such verdict of a recipe decides."""


class Verdict(Step, ABC):
    """A rule over the columns of one row. Cheap; evaluated whenever it is needed and never stored as a measure."""

    @abstractmethod
    def judge(self, rows: pa.Table) -> Judgement:
        """Judge rows, given ``uid`` and ``reads``."""


class GlobalVerdict(Step, ABC):
    """A rule over narrow columns of all live rows: quantile thresholds, duplicates."""

    @abstractmethod
    def judge(self, live: pa.Table) -> Judgement:
        """Judge all live rows, given ``uid``, ``shard``, ``refresh`` and ``reads``, sorted by uid."""


def _plain(value: Any) -> Any:
    """A parameter as a JSON value."""
    identity = getattr(value, "identity", None)
    if callable(identity):
        return identity()
    if isinstance(value, pa.Field):
        return [value.name, str(value.type)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(v) for v in value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise ContractError(
        f"a stage parameter of type {type(value).__name__} has no identity; give it an identity() method"
    )


@dataclass
class ErrorBudget:
    """How many rows a stage may quarantine among `rows` before it stops: at least `min_rows`, or `max_fraction`."""

    max_fraction: float = 0.02
    min_rows: int = 20
    rows: int = 0
    errors: int = 0
    first_traceback: str | None = None

    def spend(self, stage: str, error: BaseException) -> None:
        """Count one quarantined row. Raises `StageFailed` when the budget is used up."""
        self.errors += 1
        if self.first_traceback is None:
            self.first_traceback = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self.check(stage)

    def check(self, stage: str) -> None:
        """Raise `StageFailed` when the budget is used up."""
        if self.errors > max(self.min_rows, self.max_fraction * self.rows):
            raise StageFailed(
                f"stage {stage!r}: {self.errors} of {self.rows} rows failed, more than the error budget allows "
                f"(errors.min_rows={self.min_rows}, errors.max_fraction={self.max_fraction}). Mend the cause or raise "
                "the budget in the config; nothing that was finished is lost. The first failure was:\n"
                f"{self.first_traceback}"
            )


def output_schema(stage: Stage | GlobalStage) -> pa.Schema:
    """The schema of a stage's files: uid, reason, detail and what it writes (``shard`` is in the path)."""
    return pa.schema([fields.UID, fields.REASON, fields.DETAIL, *stage.writes])


def apply(stage: Stage, kernel: Kernel, batch: Batch, budget: ErrorBudget) -> pa.Table:
    """Run a kernel over live rows and return a table of `output_schema`, one row for each row of the batch, in order.

    When the kernel fails the batch is halved until the guilty rows are alone; those get reason ``error.<kind>`` and the
    rest goes on. Out of memory on a device halves the batch too. What is no row's fault (`RUN_ERRORS`, a wrong
    output schema or row count) always raises.

    Raises:
        ContractError: the kernel returned other columns, types or another number of rows than it declared.
        StageFailed: the error budget is used up.
        PairmillError: the kernel raised it.
    """
    if len(batch) == 0:
        return output_schema(stage).empty_table()
    try:
        output = kernel(batch)
    except RUN_ERRORS:
        raise
    except Exception as error:  # noqa: BLE001 (whatever a row provokes must not cost the other rows)
        if len(batch) == 1:
            budget.spend(stage.name, error)
            return _quarantine(stage, batch, error)
    else:
        return _checked(stage, batch, output)
    half = len(batch) // 2
    parts = [
        apply(stage, kernel, part, budget) for part in (batch.slice(0, half), batch.slice(half, len(batch) - half))
    ]
    return pa.concat_tables(parts)


def _quarantine(stage: Stage, batch: Batch, error: Exception) -> pa.Table:
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch.cuda's
    reason = Reason.ERROR_MEMORY if out_of_memory else Reason.ERROR_KERNEL
    return quarantined(stage, batch, reason, f"{stage.name}: {type(error).__name__}: {error}")


def quarantined(stage: Stage, batch: Batch, reason: Reason, detail: str) -> pa.Table:
    """Rows of `output_schema` that say why a stage has no measure for these rows."""
    rows = len(batch)
    schema = output_schema(stage)
    columns = {name: pa.nulls(rows, schema.field(name).type) for name in schema.names}
    columns |= {
        "uid": batch.column("uid"),
        "reason": pa.array([reason.value] * rows),
        "detail": pa.array([detail[:500]] * rows),
    }
    return pa.table(columns, schema=schema)


def _checked(stage: Stage, batch: Batch, output: pa.Table) -> pa.Table:
    """The kernel's output as a table of `output_schema`, or `ContractError`."""
    where = f"stage {stage.name!r} ({type(stage).__qualname__})"
    if output.num_rows != len(batch):
        raise ContractError(f"{where} returned {output.num_rows} rows for {len(batch)}")
    declared = {f.name for f in stage.writes}
    allowed = declared | {"reason", "detail"}
    found = set(output.column_names)
    if missing := declared - found:
        raise ContractError(f"{where} did not return the column {sorted(missing)[0]!r} that it declares")
    if surplus := found - allowed:
        raise ContractError(f"{where} returned the column {sorted(surplus)[0]!r} that it does not declare")
    schema = output_schema(stage)
    columns: dict[str, pa.ChunkedArray | pa.Array] = {"uid": batch.column("uid")}
    for f in schema:
        if f.name == "uid":
            continue
        if f.name not in found:
            columns[f.name] = pa.nulls(output.num_rows, f.type)
            continue
        column = output.column(f.name)
        if column.type != f.type and column.type != pa.null():
            raise ContractError(f"{where} returned {f.name!r} as {column.type}, but it declares {f.type}")
        columns[f.name] = column.cast(f.type)
    return pa.table(columns, schema=schema)
