"""Groups of duplicates over all verdicts of a recipe: a byte copy of a pair that itself looks like a third pair."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pairmill.dedup.seniority import Rows


@dataclass(frozen=True)
class Groups:
    """Who duplicates whom in the end: uids, or null."""

    duplicate_of: pa.Array
    cluster: pa.Array


def settle(uid: pa.ChunkedArray | pa.Array, duplicate_of: pa.ChunkedArray | pa.Array) -> Groups:
    """Follow chains to their end, so that each duplicate names the pair that stays, and all of a group share its uid.

    Each verdict points at pairs that stay as far as it knows; a later one may find that those duplicate others.

    Args:
        uid: All pairs.
        duplicate_of: What the verdict that dropped a pair said, null for others. No chain is a circle, since each
            verdict points from junior to senior pairs.
    """
    rows = len(uid)
    known = pc.cast(uid, pa.large_string())
    known = known.combine_chunks() if isinstance(known, pa.ChunkedArray) else known
    found = pc.index_in(pc.cast(duplicate_of, pa.large_string()), value_set=known)
    named = np.asarray(pc.fill_null(found, -1)).astype(np.int64)
    end = np.where(named < 0, np.arange(rows), named)
    while not np.array_equal(further := end[end], end):
        end = further
    dropped = end != np.arange(rows)
    grouped = dropped.copy()
    grouped[end[dropped]] = True
    return Groups(*(_taken(uid, end, chosen) for chosen in (dropped, grouped)))


def _taken(uid: pa.ChunkedArray | pa.Array, rows: Rows, chosen: npt.NDArray[np.bool_]) -> pa.Array:
    taken = uid.take(pa.array(rows, mask=~chosen))
    return taken.combine_chunks() if isinstance(taken, pa.ChunkedArray) else taken
