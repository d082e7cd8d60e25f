"""Adds columns of stages to a built dataset: boxes, masks, conversations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa

from schemas import fields
from tests.export.dataset import Built, _write


def add(built: Built, name: str, columns: tuple[pa.Field, ...], rows: dict[str, dict[str, Any]]) -> Built:
    """Write a table with values of some pairs, by uid, and publish a snapshot that has it."""
    schema = pa.schema([fields.UID, fields.REASON, fields.DETAIL, *columns])
    _write(built, name, schema, [{"uid": uid, **row} for uid, row in rows.items()])
    record = built.dataset.snapshots()[-1]
    known = {**record.columns, **dict.fromkeys([column.name for column in columns], name)}
    built.dataset.publish(
        replace(record, id=record.id + 1, columns=known, tables={**record.tables, name: built.tables[name]})
    )
    return built


def box(label: str, *corners: float, score: float | None = None, source: str = "human") -> dict[str, Any]:
    return dict(zip(("label", "x1", "y1", "x2", "y2"), (label, *corners), strict=True), score=score, source=source)


def conversation(kind: str, *said: str, boxes: tuple[dict[str, Any], ...] = (), **what: Any) -> dict[str, Any]:
    """A value of `schemas.fields.INSTRUCTION`: turns by turns, the user first."""
    roles = ("user", "assistant")
    row = dict.fromkeys(field.name for field in fields.INSTRUCTION)
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]
    return {**row, "kind": kind, "messages": messages, "boxes": list(boxes), "writer": "offline", "answers": 0, **what}
