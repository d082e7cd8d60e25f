"""Reading sources in tests."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pairmill.sources import read
from pairmill.sources.rows import SCHEMA
from schemas import config


def rows(source: config.Source) -> list[dict[str, Any]]:
    """All rows of a source; every table must have the agreed schema and hold valid text."""
    tables = list(read(source))
    for table in tables:
        assert table.schema == SCHEMA
        assert table.num_rows > 0
        table.validate(full=True)  # also that all text is UTF-8
    return pa.concat_tables(tables).to_pylist() if tables else []
