"""Duplicates that are equal: the same bytes, or the same decoded pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from pairmill.dedup.seniority import Rows, seniority
from pairmill.stage import GlobalVerdict, Judgement
from schemas import fields
from schemas.reasons import Reason


@dataclass(frozen=True)
class ExactDuplicates(GlobalVerdict):
    """Drops all but the most senior pair of each group with the same bytes or the same decoded pixels.

    A dropped pair whose bytes equal those of the pair that stays gets ``duplicate.bytes``, else ``duplicate.pixels``.
    Pairs without hashes stay.
    """

    name: ClassVar[str] = "exact"
    quality: str | None = fields.CLIP_SCORE.name
    """The column that decides seniority within a refresh; null: the uid alone. The images of a group are equal, so this
    should tell their texts apart."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The two hashes, and the quality."""
        return (fields.SHA256.name, fields.PIXEL_SHA256.name, *([self.quality] if self.quality else []))

    def judge(self, live: pa.Table) -> Judgement:
        """Judge all live rows."""
        rank = seniority(live, self.quality)
        content = _codes(live.column(fields.SHA256.name))
        first = _most_senior(content, rank)
        # Equal bytes are equal pixels, so a group of equal bytes speaks with the pixels of its most senior row.
        pixels = _codes(live.column(fields.PIXEL_SHA256.name))
        centre = _most_senior(pixels[first], rank[first])
        centre = first[centre[first]]
        return _judgement(live, content, centre)


def _codes(column: pa.ChunkedArray) -> Rows:
    """Equal values as equal numbers; each null as a number of its own."""
    encoded = column.dictionary_encode()  # one dictionary for all chunks
    parts = [chunk.indices.fill_null(-1).to_numpy().astype(np.int64) for chunk in encoded.chunks]
    codes = np.concatenate([np.empty(0, dtype=np.int64), *parts])
    missing = np.flatnonzero(codes < 0)
    codes[missing] = len(column) + missing
    return codes


def _most_senior(group: Rows, rank: Rows) -> Rows:
    """For each row, the row of its group with the lowest rank."""
    if not len(group):
        return group
    order = np.lexsort((rank, group))
    starts = np.flatnonzero(np.r_[True, np.diff(group[order]) != 0])
    sizes = np.diff(np.r_[starts, len(order)])
    first = np.empty_like(order)
    first[order] = np.repeat(order[starts], sizes)
    return first


def _judgement(live: pa.Table, content: Rows, centre: Rows) -> Judgement:
    rows = np.arange(live.num_rows)
    dropped = centre != rows
    uids = live.column("uid")
    reason = np.where(content == content[centre], Reason.DUPLICATE_BYTES.value, Reason.DUPLICATE_PIXELS.value)
    return Judgement(
        reason=pa.array(reason, pa.string(), mask=~dropped),
        duplicate_of=uids.take(pa.array(centre, mask=~dropped)).combine_chunks(),
    )
