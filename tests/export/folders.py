"""Looking at folders of exports, and changing datasets behind them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pairmill.export import FORMATS, Options, export
from pairmill.export.folder import Folder
from pairmill.export.manifest import MANIFEST, PREVIOUS, read_manifest
from pairmill.store import Snapshot, read_files
from tests.export.dataset import Built, Pair

ROOT = Path(__file__).resolve().parents[2]
WRITE = {name: partial(export, format=name) for name in FORMATS}


def data(folder: Path) -> dict[str, bytes]:
    """All files but the manifest, which tells of the export's past too."""
    return {name: (folder / name).read_bytes() for name in sorted(files(folder)) if name != MANIFEST}


def files(folder: Path) -> set[str]:
    """Paths of all files, in folders inside, too."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written again, even with the same bytes."""
    found = {name: (folder / name).stat() for name in files(folder)}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def from_scratch(snapshot: Snapshot, like: Path, out: Path, pairs_per_shard: int = 10) -> Path:
    """Export a snapshot into a new folder, with the boundaries that another export has."""
    known = read_manifest(Folder(str(like)))
    assert known is not None
    unknown = known.without_content(range(len(known.files)))
    out.mkdir()
    (out / PREVIOUS).write_text(json.dumps(unknown.to_json()))
    options = Options(**known.export.get("options", {}))
    export(snapshot, str(out), known.export["format"], pairs_per_shard=pairs_per_shard, options=options)
    return out


def assert_true(folder: Path) -> None:
    """What the manifest says is so, and nothing else is there."""
    known = manifest(folder)
    parts = [part for file in known["files"] for part in (file, *file["side"])] + known["side"]
    for part in parts:
        found = (folder / part["name"]).read_bytes()
        assert (part["bytes"], part["sha256"]) == (len(found), hashlib.sha256(found).hexdigest()), part["name"]
    listed = {part["name"] for part in parts} | {MANIFEST}
    for name in [name for name in listed if name.endswith("_images.jsonl")]:
        for line in (folder / name).read_text().splitlines():
            image = json.loads(line)
            path = f"images/{name[:5]}/{image['name']}"
            found = (folder / path).read_bytes()
            assert (image["bytes"], image["sha256"]) == (len(found), hashlib.sha256(found).hexdigest()), path
            listed.add(path)
    assert listed == files(folder)
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
