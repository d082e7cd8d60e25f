"""Asking again for images that are stored: what changed on the web becomes a new image, with its history.

The asking is a stage of its own (`Revisit`), so it runs on any engine and goes on where it was killed. Then, for the
pairs whose image changed: what was measured of the old image is taken out of every table, a line of history is written,
and the new image takes the place of the old one. The rest is work to do like any other. Old snapshots keep the old
image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pairmill.errors import ConfigError
from pairmill.execute import Frame, Unit, table_schema, units_of
from pairmill.plan import Plan, PlannedStep, Recipe, compile_plan
from pairmill.query import where as rows_where
from pairmill.sources.download import REVISIT_READS, ImageDownload
from pairmill.stage import Batch, Kernel, Resources, Stage
from pairmill.store import (
    HISTORY_TABLE,
    LEDGER_TABLE,
    PAIRS_TABLE,
    DataFile,
    Dataset,
    read_files,
    without_rows,
    write_if_new,
)
from pairmill.tombstones import Tombstones
from pairmill.versions.removal import remove_tables
from schemas import fields
from schemas.config import RunConfig
from schemas.reasons import Reason, Visit

_NEW = "new_"
_VISIT = pa.field("visit", pa.string())
_WHY = (pa.field("visit_reason", pa.string()), pa.field("visit_detail", pa.string()))


@dataclass(frozen=True)
class Revisit(Stage):
    """Asks for images again. Its columns are those of a download with ``new_`` before them, and what came of it."""

    download: ImageDownload = field(metadata={"identity": False})
    after: int
    """The snapshot whose images are asked for again: another visit is another stage."""
    name = "revisit"

    @property
    def resources(self) -> Resources:  # type: ignore[override]
        """Those of the download."""
        return self.download.resources

    @property
    def reads(self) -> tuple[str, ...]:
        """What is known of the image."""
        return REVISIT_READS

    @property
    def writes(self) -> tuple[pa.Field, ...]:
        """The image as it is now."""
        return (_VISIT, *_WHY, *(f.with_name(_NEW + f.name) for f in fields.IMAGES))

    def open(self) -> Kernel:
        """The download's own revisiting kernel."""
        ask = self.download.open_revisit()

        def kernel(batch: Batch) -> pa.Table:
            seen = ask(batch)
            columns = {_NEW + f.name: seen.column(f.name) for f in fields.IMAGES}
            why = {"visit_reason": seen.column("reason"), "visit_detail": seen.column("detail")}
            return pa.table({"visit": seen.column("visit"), **why, **columns})

        return kernel


@dataclass(frozen=True)
class OpenVisit:
    """A visit under way."""

    dataset: Dataset
    whole: Plan
    """The plan of the run."""
    plan: Plan
    """The stored images, and the visit."""
    images: PlannedStep
    visit: PlannedStep
    wanted: pa.Array | None
    """uids to ask for; null: all."""

    def units(self, frame: Frame) -> list[Unit]:
        """One unit for each shard that has images to ask for."""
        assert self.images.table is not None and self.visit.table is not None
        here = frame.present(self.images.table)
        rows = np.flatnonzero(here)
        stored = pc.is_null(frame.part(self.images.table).take("reason", rows)).to_numpy()
        live = np.zeros(len(frame), bool)
        live[rows[stored]] = True
        if self.wanted is not None:
            live &= pc.is_in(frame.uid, value_set=self.wanted).to_numpy()
        todo = live & ~frame.present(self.visit.table)
        return list(units_of(frame, (PAIRS_TABLE, *self.plan.tables), live, todo, {self.visit.index: todo}))

    def apply(self) -> Iterator[str]:
        """Put the changed images in the place of the old ones; says what came of the visit."""
        assert self.images.table is not None and self.visit.table is not None
        schema = table_schema(self.plan, self.visit.table)
        files = self.dataset.table(self.visit.table, schema).files()
        rows = read_files(self.dataset, files, schema, ["uid", "visit", "visit_reason", "new_sha256", "shard"])
        yield self._told(rows)
        changed = self._changed(rows)
        if changed.num_rows:
            uids = changed.column("uid").combine_chunks()
            self._forget_measures(uids)
            for shard in sorted(set(changed.column("shard").to_pylist())):
                self._replace(shard, uids, [f for f in files if f.shard == shard], schema)
        remove_tables(self.dataset, [self.visit.table])

    def _told(self, rows: pa.Table) -> str:
        visits = Counter(rows.column("visit").to_pylist())
        counts = ", ".join(f"{visits[visit.value]} {visit.value}" for visit in Visit)
        failed = Counter(r for r in rows.column("visit_reason").to_pylist() if r)
        why = "; ".join(f"{count} {reason}" for reason, count in sorted(failed.items()))
        return f"revisited {rows.num_rows} images: {counts}" + (f" ({why})" if why else "")

    def _changed(self, rows: pa.Table) -> pa.Table:
        """The rows whose stored image must go: other bytes are there now, or their owner opted out since."""
        assert self.images.table is not None
        schema = table_schema(self.plan, self.images.table)
        files = self.dataset.table(self.images.table, schema).files()
        stored = read_files(self.dataset, files, schema, ["uid", "sha256"])
        position = pc.index_in(rows.column("uid"), value_set=stored.column("uid"))
        old = stored.column("sha256").take(position)
        other = pc.and_(
            pc.fill_null(pc.equal(rows.column("visit"), Visit.CHANGED.value), False),
            pc.fill_null(pc.not_equal(rows.column("new_sha256"), old), True),
        )
        out = pc.and_(
            pc.fill_null(pc.equal(rows.column("visit_reason"), Reason.HTTP_OPT_OUT.value), False), pc.is_valid(old)
        )
        return rows.filter(pc.or_(other, out))

    def _forget_measures(self, uids: pa.Array) -> None:
        """Take what was measured of the old images out of every table, those of other models and recipes too."""
        unaffected = {t for t in self.whole.tables if t not in _dependents(self.whole, self.images)}
        spared = {PAIRS_TABLE, LEDGER_TABLE, HISTORY_TABLE, self.images.table, self.visit.table, *unaffected}
        for name in self.dataset.tables():
            if name in spared:
                continue
            table = self.dataset.table(name, fields.PAIRS)
            files = table.files()
            if not files or files[0].shard < 0:
                continue
            with self.dataset.fs.open(files[0].path, "rb") as opened:
                schema = pq.read_schema(opened)
            table = self.dataset.table(name, schema)

            def drop(rows: pa.Table) -> pa.Array:
                return pc.or_(pc.is_in(rows.column("uid"), value_set=uids), _names_one_of(rows, uids))

            old: list[DataFile] = []
            new: list[DataFile] = []
            for file in files:
                rest, gone = without_rows(self.dataset, name, file, schema, drop)
                if gone:
                    old.append(file)
                    new += [rest] if rest is not None else []
            if old:
                table.commit(new, remove=old)

    def _replace(self, shard: int, uids: pa.Array, visits: list[DataFile], schema: pa.Schema) -> None:
        """In one shard: a line of history for each changed image, then the new images in the place of the old ones."""
        assert self.images.table is not None
        name, images = self.images.table, table_schema(self.plan, self.images.table)
        table = self.dataset.table(name, images)
        files = [f for f in table.files() if f.shard == shard]
        slim = [f.name for f in HISTORY if f.name in images.names and f.name != "reason"]
        before = read_files(self.dataset, files, images, slim)
        before = before.filter(pc.is_in(before.column("uid"), value_set=uids)).sort_by("uid")
        seen = read_files(self.dataset, visits, schema, schema.names)
        seen = seen.filter(pc.is_in(seen.column("uid"), value_set=uids)).sort_by("uid")
        self._remember(shard, before, seen)
        columns = {f.name: seen.column(_NEW + f.name) for f in fields.IMAGES}
        reason, detail = seen.column("visit_reason"), seen.column("visit_detail")
        fresh = pa.table({"uid": seen.column("uid"), "reason": reason, "detail": detail, **columns}).select(
            images.names
        )
        fresh = Tombstones.load(self.dataset).without_images(fresh.cast(images))
        old: list[DataFile] = []
        new: list[DataFile] = []
        for file in files:
            rest, gone = without_rows(
                self.dataset, name, file, images, lambda rows: pc.is_in(rows.column("uid"), value_set=uids)
            )
            if gone:
                old.append(file)
                new += [rest] if rest is not None else []
        written = write_if_new(self.dataset, name, images, shard, f"visit-{self.after_snapshot}", fresh, ())
        table.commit([*new, written] if written else new, remove=old)

    def _remember(self, shard: int, before: pa.Table, seen: pa.Table) -> None:
        count = before.num_rows
        columns = {
            **{name: before.column(name) for name in before.column_names},
            "after_snapshot": pa.array([self.after_snapshot] * count, pa.int32()),
            "new_sha256": seen.column("new_sha256"),
            "reason": seen.column("visit_reason"),
        }
        rows = pa.table({f.name: columns[f.name] for f in HISTORY}, schema=HISTORY)
        table = self.dataset.table(HISTORY_TABLE, HISTORY)
        present = {(f.shard, f.checksum) for f in table.files()}
        file = write_if_new(self.dataset, HISTORY_TABLE, HISTORY, shard, "history", rows, present)
        if file is not None:
            table.commit([file])

    @property
    def after_snapshot(self) -> int:
        """The snapshot whose images are asked for again."""
        assert isinstance(self.visit.step, Revisit)
        return self.visit.step.after


HISTORY = pa.schema(
    [
        fields.UID,
        pa.field("after_snapshot", pa.int32(), nullable=False),
        fields.SHA256,
        fields.PIXEL_SHA256,
        fields.WIDTH,
        fields.HEIGHT,
        fields.ORIGINAL_WIDTH,
        fields.ORIGINAL_HEIGHT,
        fields.ORIGINAL_BYTES,
        fields.ETAG,
        fields.LAST_MODIFIED,
        pa.field("new_sha256", pa.string()),
        fields.REASON,
    ]
)
"""The table of images that were replaced: what the old one was, the last snapshot that has it, the sha256 of the new
one, or the reason for which there is none."""


def open_visit(dataset: Dataset, plan: Plan, config: RunConfig, where: str) -> OpenVisit | None:
    """A visit of the images of the last snapshot; None when there is none.

    Args:
        dataset: Whose images.
        plan: The plan of the run.
        config: Of the run; its download section says how images are fetched.
        where: An SQL condition over the view ``pairs``.

    Raises:
        ConfigError: the condition is wrong, the recipe stores no images, or its downloader cannot ask again.
    """
    records = dataset.snapshots()
    table = plan.columns.get(fields.IMAGE.name)
    images = next((s for s in plan.steps if s.table is not None and s.table == table), None)
    if images is None:
        raise ConfigError(f"the recipe {plan.recipe!r} stores no images, so there is nothing to revisit")
    if not isinstance(images.step, ImageDownload):
        raise ConfigError(f"{images.name!r} fetches nothing, so there is nothing to revisit")
    if not records or images.table not in records[-1].tables:
        return None
    if config.download.with_ != "pairmill":
        images.step.open_revisit()  # says why not
    wanted = None if where.strip().lower() == "true" else rows_where(dataset.snapshot(), where).column("uid")
    visit = compile_plan(Recipe("revisit", (images.step, Revisit(images.step, records[-1].id))))
    if visit.steps[0].table != images.table:
        raise ConfigError("the images depend on columns that a revisit does not know; revisiting is not possible")
    return OpenVisit(
        dataset, plan, visit, visit.steps[0], visit.steps[1], None if wanted is None else wanted.combine_chunks()
    )


def _dependents(plan: Plan, source: PlannedStep) -> set[str]:
    """The tables whose stages read, directly or through others, what a stage writes."""
    found = {source.table}
    for planned in plan.steps:
        if planned.table is not None and any(plan.columns.get(c) in found for c in planned.step.reads):
            found.add(planned.table)
    return {t for t in found if t is not None and t != source.table}


def _names_one_of(rows: pa.Table, uids: pa.Array) -> pa.Array:
    """Which rows name one of these pairs as a neighbour."""
    marks = np.zeros(rows.num_rows, bool)
    if fields.NEIGHBOURS.name in rows.column_names:
        lists = rows.column(fields.NEIGHBOURS.name).combine_chunks()
        named = pc.is_in(pc.struct_field(pc.list_flatten(lists), "uid"), value_set=uids).to_numpy(zero_copy_only=False)
        marks[pc.list_parent_indices(lists).to_numpy()[named]] = True
    return pa.array(marks)
