"""What a refresh would do, and why: rows by stage, before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pairmill.admission import Admission, admit
from pairmill.execute import Frame, State, outdated, replay, table_files
from pairmill.plan import Plan, PlannedStep, model_identities
from pairmill.report.progress import Reporter
from pairmill.retry import due, known_attempts, utc_now
from pairmill.stage import Stage
from pairmill.store import Dataset
from schemas.config import RunConfig
from schemas.reasons import DEFERRED_VALUES
from schemas.snapshot import SnapshotRecord

NEW = "new"
"""Pairs that no snapshot has yet."""
RETRY = "retry"
"""Deferred pairs whose time has come."""
ANEW = "to be done anew"
"""Pairs that have a row, which is outdated: other texts are kept now, or an answer is to be asked for again."""
NEWLY_LIVE = "newly live"
"""Pairs that an earlier step dropped, and drops no longer."""


@dataclass(frozen=True)
class PlanReport:
    """What a refresh would do."""

    steps: list[dict[str, Any]]
    """One entry a step: step, kind, table; of stages also rows_done, rows_todo (known to be lacking), rows_at_most
    (with those that steps before may yet drop or let through) and why (rows by reason); note; cost, in words, where a
    stage costs more than time."""
    new_rows: int
    known: int
    repeated: int
    taken_down: int
    """Rows of the sources that tombstones refuse."""
    total: int
    retried: int
    """Deferred pairs whose time has come."""


def make_plan(config: RunConfig, plan: Plan, reporter: Reporter, *, retry_deferred: bool = False) -> PlanReport:
    """What a refresh would do, without doing it. Nothing is written, and no lock is needed."""
    dataset = Dataset(config.dataset)
    admission = admit(config, dataset, reporter, dry_run=True)
    frame = Frame(dataset, plan, table_files(dataset, plan))
    records = dataset.snapshots()
    last = records[-1] if records else None
    retried = due(known_attempts(dataset), config.retry, utc_now(), everything=retry_deferred)
    again = _hide(frame, plan, retried)
    anew = _hide_outdated(frame, plan)
    state = replay(plan, frame)
    refresh = frame.pairs_column("refresh").to_numpy()
    new = refresh > (last.refresh if last else 0)
    steps = [_entry(planned, plan, frame, state, new, again, anew, last, admission) for planned in plan.steps]
    return PlanReport(
        steps,
        admission.new,
        admission.known,
        admission.repeated,
        admission.taken_down,
        len(frame) + admission.new,
        len(retried),
    )


def _hide(frame: Frame, plan: Plan, uids: set[str]) -> np.ndarray:
    """Let the frame look as if the deferred rows of these pairs had been taken out; which pairs these are."""
    again = np.zeros(len(frame), bool)
    if not uids:
        return again
    named = pc.is_in(frame.uid, value_set=pa.array(sorted(uids), pa.string())).to_numpy()
    deferred = pa.array(sorted(DEFERRED_VALUES))
    for table in plan.tables:
        part = frame.part(table)
        rows = np.flatnonzero(named & (part.position >= 0))
        reason = part.take("reason", rows)
        hit = rows[pc.is_in(reason, value_set=deferred).to_numpy()]
        part.position[hit] = -1
        again[hit] = True
    return again


def _hide_outdated(frame: Frame, plan: Plan) -> dict[int, np.ndarray]:
    """Let the frame look as if outdated rows had been taken out; which rows these are, by stage."""
    found = {}
    for planned in plan.steps:
        rows = outdated(plan, frame, planned, retry=True)
        if len(rows):
            assert planned.table is not None
            frame.part(planned.table).position[rows] = -1
            found[planned.index] = rows
    return found


def _entry(
    planned: PlannedStep,
    plan: Plan,
    frame: Frame,
    state: State,
    new: np.ndarray,
    again: np.ndarray,
    anew: Mapping[int, np.ndarray],
    last: SnapshotRecord | None,
    admission: Admission,
) -> dict[str, Any]:
    entry: dict[str, Any] = {"step": planned.name, "kind": planned.kind, "table": planned.table}
    if planned.table is None:
        return {
            **entry,
            "rows_done": None,
            "rows_todo": None,
            "rows_at_most": None,
            "why": {},
            "note": "judged anew from stored columns",
            "cost": "",
        }
    present = frame.present(planned.table)
    todo = state.todo.get(planned.index, np.empty(0, np.int64))
    waiting = np.setdiff1d(np.flatnonzero(state.pending & ~present), todo)
    # rows that wait for an earlier step reach this one unless something drops them
    earlier = set().union(*(rows.tolist() for index, rows in state.todo.items() if index < planned.index))
    may_come = np.array(sorted(set(waiting.tolist()) & earlier), np.int64)
    why = _why(planned, plan, todo, present, new, again, anew, last)
    at_most = len(todo) + len(may_come) + admission.new
    return {
        **entry,
        "rows_done": int(present.sum()),
        "rows_todo": len(todo),
        "rows_at_most": at_most,
        "why": why,
        "note": _note(why, len(may_come), admission.new),
        "cost": planned.step.estimate(at_most) if isinstance(planned.step, Stage) else "",
    }


def _why(
    planned: PlannedStep,
    plan: Plan,
    todo: np.ndarray,
    present: np.ndarray,
    new: np.ndarray,
    again: np.ndarray,
    anew: Mapping[int, np.ndarray],
    last: SnapshotRecord | None,
) -> dict[str, int]:
    outdated = np.isin(todo, anew.get(planned.index, ()))
    counts = {
        RETRY: int((again[todo] & ~outdated).sum()),
        ANEW: int(outdated.sum()),
        NEW: int((new[todo] & ~again[todo] & ~outdated).sum()),
    }
    rest = len(todo) - sum(counts.values())
    there = present.any() or outdated.any()
    counts[NEWLY_LIVE if there else _changed(planned, plan, last)] = rest
    return {reason: rows for reason, rows in counts.items() if rows}


def _changed(planned: PlannedStep, plan: Plan, last: SnapshotRecord | None) -> str:
    """Why a stage's table is empty."""
    if last is None:
        return NEW
    names = {table.rsplit("-", 1)[0]: table for table in last.tables}
    if planned.name not in names:
        return "new stage"
    if names[planned.name] == planned.table:
        return NEWLY_LIVE
    models = {k: v for k, v in model_identities(plan).items() if k.startswith(f"{planned.name}.")}
    before = {k: v for k, v in last.models.items() if k.startswith(f"{planned.name}.")}
    if models != before:
        return "model changed"
    changed = {t.rsplit("-", 1)[0] for t in plan.tables if t not in last.tables}
    upstream = {plan.columns[c].rsplit("-", 1)[0] for c in planned.step.reads if c in plan.columns}
    if behind := sorted(changed & upstream - {planned.name}):
        return f"{', '.join(behind)} changed"
    return "parameters changed"


def _note(why: Mapping[str, int], waiting: int, new: int) -> str:
    parts = [f"{rows:,} {reason}" for reason, rows in why.items()]
    if waiting:
        parts.append(f"up to {waiting:,} after the steps before")
    if new:
        parts.append(f"up to {new:,} new rows")
    return "; ".join(parts) or "up to date"
