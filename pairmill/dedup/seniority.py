"""Who stays when pairs duplicate each other: the more senior one.

Seniority is a total order: an earlier refresh, then a higher quality, then the smaller uid. Refresh comes first, so
rows that a later refresh admits never displace rows that stayed before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Rows = npt.NDArray[np.int64]
"""Row numbers or ranks, shape (n,)."""


def seniority(live: pa.Table, quality: str | None) -> Rows:
    """The rank of each row, 0 for the most senior one.

    Args:
        live: Rows with ``uid``, ``refresh`` and the quality column, sorted by uid.
        quality: A numeric column where more is better; null and NaN are worst. ``None``: refresh and uid only.
    """
    keys: list[npt.NDArray[Any]] = [live.column("refresh").to_numpy()]
    if quality is not None:
        score = pc.cast(live.column(quality), pa.float64()).to_numpy()  # null becomes NaN
        keys.insert(0, -np.where(np.isnan(score), -np.inf, score))
    rank = np.empty(live.num_rows, dtype=np.int64)
    rank[np.lexsort(keys)] = np.arange(live.num_rows)  # a stable sort: equal rows stay in the order of their uids
    return rank
