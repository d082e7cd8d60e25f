"""Looking at folders of exports, and changing datasets behind them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pairmill.export import export_parquet, export_webdataset
from pairmill.export.folder import Folder
from pairmill.export.manifest import MANIFEST, PREVIOUS, read_manifest
from pairmill.store import Snapshot, read_files
from tests.export.dataset import Built, Pair

ROOT = Path(__file__).resolve().parents[2]
WRITE = {"webdataset": export_webdataset, "parquet": export_parquet}


def data(folder: Path) -> dict[str, bytes]:
    """All files but the manifest, which tells of the export's past too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != MANIFEST}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written again, even with the same bytes."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def from_scratch(snapshot: Snapshot, like: Path, out: Path, pairs_per_shard: int = 10) -> Path:
    """Export a snapshot into a new folder, with the boundaries that another export has."""
    known = read_manifest(Folder(str(like)))
    assert known is not None
    unknown = known.without_content(range(len(known.files)))
    out.mkdir()
    (out / PREVIOUS).write_text(json.dumps(unknown.to_json()))
    WRITE[known.export["format"]](snapshot, str(out), pairs_per_shard=pairs_per_shard)
    return out


def assert_true(folder: Path) -> None:
    """What the manifest says is so, and nothing else is there."""
    known = manifest(folder)
    parts = [part for file in known["files"] for part in (file, *file["side"])] + known["side"]
    for part in parts:
        found = (folder / part["name"]).read_bytes()
        assert (part["bytes"], part["sha256"]) == (len(found), hashlib.sha256(found).hexdigest()), part["name"]
    assert {part["name"] for part in parts} | {MANIFEST} == {path.name for path in folder.iterdir()}
    assert known["pairs"] == sum(file["samples"] for file in known["files"])


def forget(built: Built, uids: set[str]) -> Snapshot:
    """Take pairs out of every table of a dataset and publish that."""
    record = built.snapshot.record
    tables = {}
    for name in record.tables:
        files = built.snapshot.files(name)
        if not files:
            continue
        schema = pq.read_schema(files[0].path)
        table = built.dataset.table(name, schema)
        new = []
        for file in files:
            rows = read_files(built.dataset, [file], schema, schema.names)
            kept = rows.filter(pc.invert(pc.is_in(rows["uid"], value_set=pa.array(sorted(uids)))))
            if kept.num_rows:
                with table.writer(file.shard, f"after{record.id}") as writer:
                    writer.write(kept)
                    new.append(writer.close())
        tables[name] = table.commit(new, replace=[file.shard for file in files])
    built.dataset.publish(replace(record, id=record.id + 1, tables={**record.tables, **tables}))
    return built.snapshot


def changed(pair: Pair, **what: Any) -> Pair:
    return Pair(**{**vars(pair), **what})


def killed_everywhere(tmp_path: Path, folder: Path, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Do a job on copies of a folder, killed at one step after the other, and then again to its end (see `killed`)."""
    (tmp_path / "copies").mkdir()
    job = {**job, "folder": str(folder), "copies": str(tmp_path / "copies")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.export.killed", json.dumps(job)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    ends = json.loads(done.stdout.splitlines()[-1])
    return [{**end, "out": Path(end["out"])} for end in ends]
