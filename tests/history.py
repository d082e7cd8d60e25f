"""Small datasets with a history, written with the store's own writers, and what a snapshot of them reads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc

from pairmill.store import (
    LEDGER_TABLE,
    PAIRS_TABLE,
    REWRITES,
    REWRITES_TABLE,
    Dataset,
    Snapshot,
    column_digests,
    open_delta,
    read_files,
    without_rows,
)
from schemas import fields
from schemas.reasons import Status, status_of
from schemas.snapshot import SnapshotRecord

IMAGES = "images-00000001"
CLIP = "clip-00000002"
CAPTIONS = "captions-00000003"
OTHER_CLIP = "clip-0000000b"

COMMON = (fields.UID, fields.REASON, fields.DETAIL)
SCHEMAS = {
    PAIRS_TABLE: fields.PAIRS,
    LEDGER_TABLE: fields.LEDGER,
    IMAGES: pa.schema([*COMMON, fields.SHA256]),
    CLIP: pa.schema([*COMMON, fields.CLIP_SCORE]),
    OTHER_CLIP: pa.schema([*COMMON, fields.CLIP_SCORE]),
    CAPTIONS: pa.schema([*COMMON, fields.CAPTIONS]),
}


@dataclass(frozen=True)
class Pair:
    """What a state says of a pair."""

    number: int
    shard: int = 0
    reason: str | None = None
    source: str = "url_table:0"
    sha256: str | None = "a"
    score: float | None = 0.5
    written: tuple[str, ...] = ()
    ranks: tuple[int | None, ...] | None = None

    @property
    def url(self) -> str:
        return f"http://images.example/{self.number}.jpg"

    @property
    def text(self) -> str:
        return f"text {self.number}"

    @property
    def uid(self) -> str:
        return hashlib.sha256(f"{self.url}\n{self.text}".encode()).hexdigest()

    @property
    def caption(self) -> str | None:
        """The text of rank 0."""
        if self.ranks is None:
            return self.text
        return (self.text, *self.written)[self.ranks.index(0)] if 0 in self.ranks else None


@dataclass(frozen=True)
class State:
    """All pairs at a time, and which table holds the scores."""

    pairs: tuple[Pair, ...]
    clip: str = CLIP
    refresh: int = 1
    config: Mapping[str, object] = field(default_factory=dict)


def publish(dataset: Dataset, state: State) -> SnapshotRecord:
    """Bring every table to a state, and publish it. Files with equal content are not written again."""
    rows: dict[str, list[tuple[int, dict[str, object]]]] = {
        name: [] for name in (PAIRS_TABLE, LEDGER_TABLE, IMAGES, CAPTIONS, state.clip)
    }
    for p in state.pairs:
        texts = [{"text": p.text, "source": "web"}]
        pair = {"uid": p.uid, "url": p.url, "text": p.text, "texts": texts, "source": p.source}
        rows[PAIRS_TABLE].append((p.shard, {**pair, "refresh": state.refresh}))
        ranks = None if p.ranks is None else list(p.ranks)
        outcomes = ranks and [None if rank is not None else "text.not_chosen" for rank in ranks]
        ledger = {"uid": p.uid, "reason": p.reason, "status": status_of(p.reason).value}
        rows[LEDGER_TABLE].append((p.shard, {**ledger, "text_ranks": ranks, "text_reasons": outcomes}))
        if p.sha256 is not None:
            rows[IMAGES].append((p.shard, {"uid": p.uid, "sha256": p.sha256}))
        if p.score is not None:
            rows[state.clip].append((p.shard, {"uid": p.uid, "clip_score": p.score}))
        captions = [{"text": t, "source": "blip"} for t in p.written]
        rows[CAPTIONS].append((p.shard, {"uid": p.uid, "captions": captions}))
    tables = {}
    for name, found in rows.items():
        table = dataset.table(name, SCHEMAS[name])
        files = []
        for shard in sorted({shard for shard, _ in found}):
            with table.writer(shard, "part") as writer:
                mine = sorted((row for at, row in found if at == shard), key=lambda row: str(row["uid"]))
                writer.write(pa.Table.from_pylist(mine, schema=SCHEMAS[name]))
                files.append(writer.close())
        table.commit(files, replace={f.shard for f in table.files()})
        if table.version() >= 0:
            tables[name] = table.version()
    columns = {f.name: PAIRS_TABLE for f in fields.PAIRS if f.name not in ("reason", "detail")}
    columns |= {"sha256": IMAGES, "clip_score": state.clip, "captions": CAPTIONS}
    return _record(dataset, state, tables, columns)


def _record(dataset: Dataset, state: State, tables: dict[str, int], columns: dict[str, str]) -> SnapshotRecord:
    import yaml

    reasons: dict[str, int] = {}
    for p in state.pairs:
        if p.reason is not None:
            reasons[p.reason] = reasons.get(p.reason, 0) + 1
    by_status = {status: sum(status_of(p.reason) is status for p in state.pairs) for status in Status}
    kept = by_status[Status.KEPT]
    funnel = [{"step": "all", "kind": "verdict", "entered": len(state.pairs), "reasons": reasons, "left": kept}]
    earlier = dataset.snapshots()
    record = SnapshotRecord(
        id=earlier[-1].id + 1 if earlier else 1,
        refresh=state.refresh,
        created_at="2026-01-01T00:00:00+00:00",
        recipe="test",
        config=yaml.safe_dump({"dataset": "x", **state.config}),
        admitted=len(state.pairs),
        kept=kept,
        dropped=by_status[Status.DROPPED],
        deferred=by_status[Status.DEFERRED],
        reasons=reasons,
        funnel=funnel,
        tables=tables,
        columns=columns,
        models={"clip.model": state.clip},
        software={},
        seconds=1.0,
        computed={"clip": len(state.pairs)},
    )
    dataset.publish(record)
    return record


def read(snapshot: Snapshot) -> dict[str, dict[str, str]]:
    """Digests of every column of every table of a snapshot."""
    digests = {}
    for table in snapshot.record.tables:
        delta = open_delta(snapshot.dataset, table, snapshot.record.tables[table])
        assert delta is not None
        schema = pa.schema([f for f in pa.schema(delta.schema().to_arrow()) if f.name != "shard"])
        files = snapshot.files(table)
        rows = read_files(snapshot.dataset, files, schema, [*schema.names, "shard"])
        if rows.num_rows:
            digests[table] = column_digests(rows)
    return digests


def take_down(dataset: Dataset, uids: Sequence[str]) -> None:
    """What a takedown does to the files: those with the rows are replaced, in the latest version and in all others, and
    removed."""
    wanted = pa.array(list(uids), pa.string())
    rewrites = []
    for name in dataset.tables():
        delta = open_delta(dataset, name)
        if delta is None or not delta.metadata().partition_columns:
            continue
        schema = pa.schema([f for f in pa.schema(delta.schema().to_arrow()) if f.name != "shard"])
        table = dataset.table(name, schema)
        ever = {f.relative: f for version in range(table.version() + 1) for f in table.files(version)}
        latest = {f.relative for f in table.files()}
        old, new = [], []
        for file in ever.values():
            if not dataset.fs.exists(file.path):
                continue
            rest, gone = without_rows(dataset, name, file, schema, lambda rows: pc.is_in(rows["uid"], value_set=wanted))
            if not gone:
                continue
            left = (rest.relative, rest.rows, rest.size) if rest else (None, 0, 0)
            rewrites.append(
                dict(zip(("table", "old", "new", "rows", "size"), (name, file.relative, *left), strict=True))
            )
            if file.relative in latest:
                old.append(file)
                new += [rest] if rest else []
            dataset.fs.rm(file.path)
        if old:
            table.commit(new, remove=old)
    dataset.records(REWRITES_TABLE, REWRITES).append(rewrites)


def changed(state: State, **changes: object) -> State:
    """The state with every pair changed in the same way."""
    return replace(state, pairs=tuple(replace(p, **changes) for p in state.pairs))  # type: ignore[arg-type]
