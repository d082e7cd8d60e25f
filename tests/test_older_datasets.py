"""Datasets that an earlier version wrote: columns that came later are added to the log, and nothing is damaged."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from pairmill.integrity import examine
from pairmill.report.progress import Silent
from pairmill.store import Dataset, read_files
from schemas import fields

SCHEMA = pa.schema([fields.UID, fields.STATUS, fields.REASON])


def test_a_column_that_came_later_is_null_in_older_files_and_known_to_the_log(tmp_path: Path):
    dataset = Dataset(str(tmp_path / "dataset"))
    with dataset.lock():
        for shard, schema in enumerate((SCHEMA, SCHEMA.append(fields.ATTEMPTS))):
            table = dataset.table("ledger", schema)
            row = {"uid": f"{shard:064x}", "status": "deferred", "reason": "http.timeout", "attempts": 3}
            with table.writer(shard, "ledger") as writer:
                writer.write(pa.Table.from_pylist([row], schema=schema))
                table.commit([writer.close()])
    table = dataset.table("ledger", SCHEMA.append(fields.ATTEMPTS))
    rows = read_files(dataset, table.files(), table.schema, ["attempts"])
    assert rows["attempts"].to_pylist() == [None, 3]
    found = examine(dataset, Silent())
    assert not [f for f in found.findings if f.table == "ledger"], found.findings
