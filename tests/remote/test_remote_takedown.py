"""Takedown in an object store: what goes is gone from every object, while others write and read too."""

from __future__ import annotations

from pathlib import Path

import pytest

from pairmill import storage
from pairmill.admission import pair_uid
from pairmill.errors import DatasetLocked
from pairmill.report.progress import Silent
from pairmill.run import refresh
from pairmill.store import Dataset
from pairmill.takedown import Selectors, check_absence, forget, resume
from pairmill.tombstones import Tombstones
from tests.needles import find_needles
from tests.remote.conftest import S3
from tests.steps import config, texts, write_urls
from tests.test_cli import Command, command  # noqa: F401 (a fixture)

TEXTS = texts(120)
URL = "http://host0.example/42.jpg"


def fetched(url: str, folder: Path) -> Path:
    """All objects below a URL as files."""
    fs, root = storage.open_fs(url)
    for path, data in fs.cat(fs.find(root)).items():
        place = folder / path[len(root) + 1 :]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    return folder


def test_a_takedown_in_an_object_store(s3: S3, bucket: str, tmp_path: Path, command: Command):  # noqa: F811
    run = config(
        tmp_path, write_urls(tmp_path / "urls.parquet", TEXTS), dataset=f"s3://{bucket}/dataset", shard_size=60
    )
    refresh(run, Silent())
    refresh(run.model_copy(update={"options": {"words": 5}}), Silent())
    opened = Dataset(run.dataset)
    assert find_needles([fetched(run.dataset, tmp_path / "before")], [URL])
    asked = Selectors.of(urls=[URL])
    with opened.lock(), pytest.raises(DatasetLocked, match="is recorded"):
        forget(Dataset(run.dataset), asked, Silent(), wait_s=0)
    assert Tombstones.load(opened).open_requests
    report = resume(Dataset(run.dataset), Silent())
    assert report is not None and report.done and (report.pairs, report.snapshot) == (1, 3)
    assert find_needles([fetched(run.dataset, tmp_path / "after")], [URL]) == []
    uid = pair_uid(URL, TEXTS[42])
    for snapshot in ("1", "2", "3"):
        counted = command(
            "sql", run.dataset, "--snapshot", snapshot, "--format", "csv", "SELECT count(*) AS n FROM pairs"
        )
        assert (counted.code, counted.out) == (0, "n\n119\n"), counted.err
    assert check_absence(opened, asked, Silent()).absent
    assert command("forget", run.dataset, "--uid", uid, "--check").code == 0
    assert command("forget", run.dataset, "--url", URL.replace("42", "49"), "--yes", "--json").code == 0
    again = refresh(run, Silent())
    assert again.snapshot is not None and again.snapshot.admitted == 118
