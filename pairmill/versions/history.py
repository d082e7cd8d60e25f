"""What the records of snapshots say of their history, without reading any data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import yaml

from pairmill.store import Dataset
from schemas.snapshot import SnapshotRecord

_STAGE_TABLE = re.compile(r"(.+)-[0-9a-f]{8}")


def stage_of(table: str) -> str | None:
    """The name of the stage whose table it is; None for the tables that every dataset has."""
    found = _STAGE_TABLE.fullmatch(table)
    return found[1] if found else None


def table_bytes(dataset: Dataset, tables: Mapping[str, int]) -> dict[str, int]:
    """Size of the data files of each table at a version, bytes, after takedowns and repairs."""
    rewrites = dataset.rewrites()
    empty = pa.schema([])
    return {
        name: sum(f.size for f in dataset.replaced(name, dataset.table(name, empty).files(version), rewrites))
        for name, version in tables.items()
    }


def what_changed(before: SnapshotRecord | None, record: SnapshotRecord) -> str:
    """One line: what a snapshot has that the one before it had not, from the records alone."""
    if before is None:
        return record.note or "the first one"
    parts = [record.note] if record.note else []
    for name in ("admitted", "kept", "deferred"):
        if (more := getattr(record, name) - getattr(before, name)) != 0:
            parts.append(f"{more:+,} {name}")
    old, new = stage_tables(before), stage_tables(record)
    parts += [f"{stage} anew" if stage in old else f"{stage} added" for stage in new if old.get(stage) != new[stage]]
    parts += [f"{stage} left out" for stage in old if stage not in new]
    parts += [f"{key} = {value}" for key, _, value in config_changes(before, record)]
    return ", ".join(parts) or "details of verdicts"


def stage_tables(record: SnapshotRecord) -> dict[str, str]:
    """The table of each stage of a snapshot's recipe."""
    named = {(stage_of(table), table) for table in (*record.columns.values(), *record.tables)}
    return {stage: table for stage, table in sorted(named, key=str) if stage is not None}


def config_changes(a: SnapshotRecord, b: SnapshotRecord) -> list[tuple[str, Any, Any]]:
    """Keys of the config that differ, with both values; null where a side has no such key."""
    old, new = config_of(a), config_of(b)
    keys = [*old, *(key for key in new if key not in old)]
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def config_of(record: SnapshotRecord) -> dict[str, Any]:
    """A record's config with one entry a value: ``{"keep.clip_score": ">= 0.28"}``. Lists count places from 0."""
    try:
        loaded = yaml.safe_load(record.config)
    except yaml.YAMLError:
        return {"config": record.config}
    return dict(_leaves(loaded, ""))


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    if not items:
        yield place or "config", value
        return
    for key, inner in items:
        yield from _leaves(inner, f"{place}.{key}" if place else str(key))
