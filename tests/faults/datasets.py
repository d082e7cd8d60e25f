"""What the tests of faults compare: the whole content of a dataset, and whether readers find its last snapshot
whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pairmill.execute import table_schema
from pairmill.plan import compile_plan
from pairmill.query import query
from pairmill.run import load_config, load_recipe
from pairmill.store import LEDGER_TABLE, Dataset, column_digests, read_files
from schemas import fields
from tests.steps import texts

VOLATILE = ("retry_at",)
"""Times differ from run to run."""


def write_config(folder: Path, **changes: Any) -> Path:
    """A config of the text recipe over ``urls.parquet`` in the folder."""
    data = {
        "dataset": str(folder / "dataset"),
        "recipe": "tests.steps:recipe",
        "source": {"kind": "url_table", "path": str(folder / "urls.parquet")},
        "engine": {"kind": "local"},
        "shard_size": 20,
        **changes,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def write_urls(folder: Path, count: int, start: int = 0) -> Path:
    """URLs with texts of 0 to 9 words, some of which are repeated."""
    path = folder / "urls.parquet"
    urls = [f"http://host{i % 7}.example/{i}.jpg" for i in range(start, start + count)]
    pq.write_table(pa.table({"url": urls, "text": texts(start + count)[start:]}), path)
    return path


def content(config: Path, overrides: tuple[str, ...] = ()) -> dict[str, dict[str, str]]:
    """Content hashes of the last snapshot by table and column."""
    run = load_config(str(config), overrides)
    plan = compile_plan(load_recipe(run))
    snapshot = Dataset(run.dataset).snapshot()
    found = {}
    for table in snapshot.record.tables:
        schema = fields.LEDGER if table == LEDGER_TABLE else table_schema(plan, table)
        rows = read_files(snapshot.dataset, snapshot.files(table), schema, [*schema.names, "shard"])
        found[table] = {k: v for k, v in column_digests(rows).items() if k not in VOLATILE}
    return found


def counts(dataset: Dataset) -> Mapping[str | None, int] | None:
    """Pairs by reason, as a reader of the last snapshot finds them; they must be what its record says."""
    records = dataset.snapshots()
    if not records:
        return None
    rows = query(dataset.snapshot(), "SELECT reason, count(*) AS n FROM pairs GROUP BY 1").to_pylist()
    found = {row["reason"]: row["n"] for row in rows}
    last = records[-1]
    assert sum(found.values()) == last.admitted
    assert found.get(None, 0) == last.kept
    assert {k: v for k, v in found.items() if k is not None} == last.reasons
    return found
