"""The record of an export: one row of the dataset's ``exports`` table for each thing that happened to it."""

from __future__ import annotations

from enum import Enum

import pyarrow as pa

EXPORTS_TABLE = "exports"


class ExportEvent(str, Enum):  # enum.StrEnum needs Python 3.11
    """What happened to an export."""

    BEGUN = "begun"
    """It is about to be written or brought to another snapshot; its folder may hold pairs from now on."""
    FINISHED = "finished"
    """It is whole."""
    TAKEN_DOWN = "taken_down"
    """Pairs were removed from it."""

    __str__ = str.__str__


EXPORTS = pa.schema(
    [
        pa.field("out", pa.string(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("where", pa.string()),
        pa.field("pairs_per_shard", pa.int64(), nullable=False),
        pa.field("snapshot", pa.int64(), nullable=False),
        pa.field("event", pa.string(), nullable=False),
        pa.field("at", pa.string(), nullable=False),
        pa.field("pairs", pa.int64(), nullable=False),
    ]
)
"""The exports table. ``out`` is an absolute path or a URL without credentials; ``at`` is UTC, ISO 8601; ``pairs`` is
what the export holds or, when it begins, is going to hold."""
