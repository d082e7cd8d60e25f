"""Which exports of a dataset were written, so that a takedown reaches them.

An export is entered before its first byte is written. Entering takes no lock: exports may be written while a refresh
runs, and nothing but exports and takedowns writes to this table.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pairmill.errors import StoreError
from pairmill.report.text import without_secrets
from pairmill.storage import AccessDenied
from schemas.exports import EXPORTS, EXPORTS_TABLE, ExportEvent

if TYPE_CHECKING:
    from pairmill.store import Dataset

TRIES = 5
"""Two processes that enter something at the same moment: one of them has to do it again."""


@dataclass(frozen=True)
class KnownExport:
    """The last that was entered of an export."""

    out: str
    """An absolute path, or a URL without credentials."""
    format: str
    where: str | None
    pairs_per_shard: int
    snapshot: int
    event: ExportEvent
    at: str
    """UTC, ISO 8601."""
    pairs: int


def register(
    dataset: Dataset,
    out: str,
    event: ExportEvent,
    *,
    format: str,  # noqa: A002 - the column's name
    where: str | None,
    pairs_per_shard: int,
    snapshot: int,
    pairs: int,
) -> KnownExport:
    """Enter what happened to an export.

    Raises:
        StoreError: the dataset cannot be written.
    """
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds")
    known = KnownExport(without_secrets(out), format, where, pairs_per_shard, snapshot, event, now, pairs)
    row = {**vars(known), "event": event.value}
    for last in (*[False] * (TRIES - 1), True):
        try:
            dataset.records(EXPORTS_TABLE, EXPORTS).append([row])
        except (StoreError, OSError) as error:
            if last or isinstance(error, AccessDenied):
                raise StoreError(f"the export {known.out} cannot be entered in {dataset.url}: {error}") from error
        else:
            break
    return known


def known_exports(dataset: Dataset) -> list[KnownExport]:
    """All exports that were ever entered, in the state of their last event, by folder.

    Raises:
        StoreError: the table cannot be read.
    """
    latest: dict[str, KnownExport] = {}
    for row in sorted(dataset.records(EXPORTS_TABLE, EXPORTS).rows(), key=lambda row: row["at"]):
        latest[row["out"]] = KnownExport(**{**row, "event": ExportEvent(row["event"])})
    return [latest[out] for out in sorted(latest)]
