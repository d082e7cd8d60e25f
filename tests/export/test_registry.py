"""The dataset knows which exports left it."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from pairmill.errors import StoreError
from pairmill.export import export_webdataset, known_exports, register
from pairmill.export.folder import Folder
from pairmill.store import Dataset
from schemas.exports import EXPORTS, EXPORTS_TABLE, ExportEvent
from tests.export.dataset import Pair, build

PAIRS = [Pair(n, n // 5) for n in range(12)]


class Notes:
    """A reporter that remembers what was noted."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def start(self, title, rows) -> None: ...

    def advance(self, rows, dropped) -> None: ...

    def finish(self) -> None: ...


def events(dataset: Dataset) -> list[tuple[str, int, str, int]]:
    rows = sorted(dataset.records(EXPORTS_TABLE, EXPORTS).rows(), key=lambda row: row["at"])
    return [(Path(row["out"]).name, row["snapshot"], row["event"], row["pairs"]) for row in rows]


def test_an_export_is_known_before_its_first_byte(tmp_path, monkeypatch):
    built = build(str(tmp_path / "data"), PAIRS)

    def failing(self, name):
        raise KeyboardInterrupt

    monkeypatch.setattr(Folder, "create", failing)
    with pytest.raises(KeyboardInterrupt):
        export_webdataset(built.snapshot, str(tmp_path / "out"), where="width > 1")
    known = known_exports(built.dataset)
    assert [(k.out, k.event) for k in known] == [(str(tmp_path / "out"), ExportEvent.BEGUN)]
    assert (known[0].where, known[0].pairs_per_shard, known[0].format) == ("width > 1", 10_000, "webdataset")
    assert (known[0].pairs, known[0].snapshot) == (12, 1)


def test_what_happens_to_it_is_entered(tmp_path, monkeypatch):
    built = build(str(tmp_path / "data"), PAIRS)
    assert known_exports(built.dataset) == []
    monkeypatch.chdir(tmp_path)
    assert export_webdataset(built.snapshot, "out").registered
    assert export_webdataset(built.snapshot, "out").registered  # there is nothing to do, and nothing to enter
    assert events(built.dataset) == [("out", 1, "begun", 12), ("out", 1, "finished", 12)]
    assert known_exports(built.dataset)[0].out == str(tmp_path / "out")
    build(str(tmp_path / "data"), [*PAIRS, Pair(12, 3)])
    export_webdataset(built.snapshot, "out")
    assert events(built.dataset)[2:] == [("out", 2, "begun", 13), ("out", 2, "finished", 13)]


def test_an_export_that_was_not_known_becomes_known(tmp_path):
    built = build(str(tmp_path / "data"), PAIRS)
    export_webdataset(built.snapshot, str(tmp_path / "out"))
    built.dataset.records(EXPORTS_TABLE, EXPORTS).replace([])
    export_webdataset(built.snapshot, str(tmp_path / "out"))
    assert events(built.dataset) == [("out", 1, "finished", 12)]


def test_secrets_stay_out_of_the_list(tmp_path):
    built = build(str(tmp_path / "data"), PAIRS)
    out = "s3://key:canary@bucket/a/b?token=canary"
    known = register(
        built.dataset, out, ExportEvent.BEGUN, format="parquet", where=None, pairs_per_shard=5, snapshot=1, pairs=3
    )
    assert known_exports(built.dataset) == [known]
    assert "canary" not in known.out and known.out.startswith("s3://bucket/a/b")
    assert not any(b"canary" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_dataset_that_cannot_be_written_exports_with_a_warning(tmp_path, monkeypatch):
    built = build(str(tmp_path / "data"), PAIRS)
    monkeypatch.setattr("pairmill.export.registry.TRIES", 1)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr("pairmill.store.tables.Records.append", refuse)
    notes = Notes()
    report = export_webdataset(built.snapshot, str(tmp_path / "out"), progress=notes)
    assert report.samples == 12 and not report.registered
    assert len(notes.notes) == 1 and "takedowns will not reach this export" in notes.notes[0]
    with pytest.raises(StoreError, match="cannot be entered"):
        register(
            built.dataset, "x", ExportEvent.BEGUN, format="parquet", where=None, pairs_per_shard=5, snapshot=1, pairs=3
        )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_dataset_on_a_read_only_mount(tmp_path):
    import subprocess

    built = build(str(tmp_path / "data"), PAIRS)
    (tmp_path / "mount").mkdir()
    mount = ["mount", "--bind", "-o", "ro", str(tmp_path / "data"), str(tmp_path / "mount")]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        if os.access(tmp_path / "mount", os.W_OK):
            pytest.skip("bind mounts are not read-only here")
        notes = Notes()
        dataset = Dataset(str(tmp_path / "mount"))
        report = export_webdataset(dataset.snapshot(), str(tmp_path / "out"), progress=notes)
        assert report.samples == 12 and not report.registered and len(notes.notes) == 1
        assert known_exports(built.dataset) == []
    finally:
        subprocess.run(["umount", str(tmp_path / "mount")], check=True)


def _enter(url: str, number: int) -> None:
    for event in (ExportEvent.BEGUN, ExportEvent.FINISHED):
        register(
            Dataset(url), f"/out/{number}", event, format="parquet", where=None, pairs_per_shard=5, snapshot=1, pairs=3
        )


def test_many_at_once(tmp_path):
    built = build(str(tmp_path / "data"), PAIRS)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_enter, args=(built.dataset.url, number)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert [(k.out, k.event) for k in known_exports(built.dataset)] == [
        (f"/out/{n}", ExportEvent.FINISHED) for n in range(4)
    ]


def test_takedowns_wait_until_an_export_has_read(tmp_path, monkeypatch):
    from pairmill.errors import DatasetLocked

    built = build(str(tmp_path / "data"), PAIRS)
    plain = Folder.create
    refused = []

    def looking(self, name):
        with pytest.raises(DatasetLocked, match="export"), built.dataset.alone():
            pass
        refused.append(name)
        return plain(self, name)

    monkeypatch.setattr(Folder, "create", looking)
    export_webdataset(built.snapshot, str(tmp_path / "out"))
    assert "00000.tar" in refused and "manifest.json" in refused
    with built.dataset.alone():
        pass
