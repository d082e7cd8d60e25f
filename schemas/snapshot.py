"""The record of a published snapshot: one row of the dataset's ``snapshots`` table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

_NESTED = (
    "reasons",
    "funnel",
    "tables",
    "columns",
    "models",
    "software",
    "computed",
    "stage_seconds",
    "bytes",
    "spent",
)


@dataclass(frozen=True)
class SnapshotRecord:
    """What a refresh published. Readers open datasets through this record, so they never see half a refresh."""

    id: int
    """Number of the snapshot, from 1."""
    refresh: int
    """Number of the last refresh that admitted pairs."""
    created_at: str
    """UTC, ISO 8601."""
    recipe: str
    config: str
    """The config as YAML."""
    admitted: int
    """All pairs of the dataset: kept + dropped + deferred."""
    kept: int
    dropped: int
    deferred: int
    reasons: dict[str, int]
    """Pairs by reason; the values add up to dropped + deferred."""
    funnel: list[dict[str, Any]]
    """One entry a step of the recipe, in order: step, kind, entered, reasons (count by reason), left. A step that chose
    among texts also has texts: of the pairs that entered it, by source, how many were kept (``kept``) or not (by
    reason)."""
    tables: dict[str, int]
    """Version of each Delta table."""
    columns: dict[str, str]
    """Which table holds a column."""
    models: dict[str, str]
    """Revision of each model, by stage."""
    software: dict[str, str]
    """Versions of the libraries that made it."""
    seconds: float
    """Duration of the run that published it."""
    kind: str = "refresh"
    """What published it: refresh, rollback or forget."""
    note: str | None = None
    """One line on it, such as which snapshot was rolled back to."""
    computed: dict[str, int] = field(default_factory=dict)
    """Rows that each stage computed for it."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """Time in each stage's kernels, summed over workers."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Size of the data files of each table."""
    spent: dict[str, float] = field(default_factory=dict)
    """What `seconds` went into; the values add up to it."""

    def to_row(self) -> dict[str, Any]:
        """The record as a row of `SNAPSHOTS`; nested values are JSON."""
        return {k: json.dumps(v, sort_keys=True) if isinstance(v, (dict, list)) else v for k, v in asdict(self).items()}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> SnapshotRecord:
        """The inverse of `to_row`."""
        known = {k: v for k, v in row.items() if v is not None}  # records older than a field lack it
        return cls(**{k: json.loads(v) if k in _NESTED else v for k, v in known.items()})


SNAPSHOTS = pa.schema(
    [
        pa.field("id", pa.int32(), nullable=False),
        pa.field("refresh", pa.int32(), nullable=False),
        pa.field("created_at", pa.string(), nullable=False),
        pa.field("recipe", pa.string(), nullable=False),
        pa.field("config", pa.string(), nullable=False),
        pa.field("admitted", pa.int64(), nullable=False),
        pa.field("kept", pa.int64(), nullable=False),
        pa.field("dropped", pa.int64(), nullable=False),
        pa.field("deferred", pa.int64(), nullable=False),
        pa.field("reasons", pa.string(), nullable=False),
        pa.field("funnel", pa.string(), nullable=False),
        pa.field("tables", pa.string(), nullable=False),
        pa.field("columns", pa.string(), nullable=False),
        pa.field("models", pa.string(), nullable=False),
        pa.field("software", pa.string(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("kind", pa.string()),
        pa.field("note", pa.string()),
        pa.field("computed", pa.string()),
        pa.field("stage_seconds", pa.string()),
        pa.field("bytes", pa.string()),
        pa.field("spent", pa.string()),
    ]
)
"""The snapshots table: the columns of `SnapshotRecord`, nested values as JSON."""
