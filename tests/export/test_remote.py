"""Exports in an object store: written, updated, verified and taken down there."""

from __future__ import annotations

from pathlib import Path

import pytest

from pairmill import storage
from pairmill.errors import ConfigError
from pairmill.export import Reach, holds_pairs, known_exports, remove_from_exports, verify_export
from tests.export.dataset import Pair, build, instructed
from tests.export.folders import WRITE, files
from tests.remote.conftest import bucket, s3, s3_server  # noqa: F401 - fixtures

PAIRS = [instructed(Pair(n, n // 5, f"picture {n}")) for n in range(12)]


def contents(url: str) -> dict[str, bytes]:
    fs, root = storage.open_fs(url)
    return {path[len(root.rstrip("/")) + 1 :]: fs.cat_file(path) for path in fs.find(root)}


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "llava"])
def test_an_export_in_an_object_store(s3, bucket, tmp_path, kind):  # noqa: F811
    url, here = f"s3://{bucket}/exports/one", tmp_path / "here"
    built = build(str(tmp_path / "data"), PAIRS)
    WRITE[kind](built.snapshot, url, pairs_per_shard=5)
    WRITE[kind](built.snapshot, str(here), pairs_per_shard=5)
    build(str(tmp_path / "data"), [*PAIRS, instructed(Pair(12, 3))])
    asked = len(s3.requests())
    report = WRITE[kind](built.snapshot, url, pairs_per_shard=5)
    assert (report.written, report.unchanged) == (1, 3)
    assert not any("PUT" in line and "00000" in line for line in s3.requests()[asked:])
    WRITE[kind](built.snapshot, str(here), pairs_per_shard=5)
    assert contents(url) == {name: (here / name).read_bytes() for name in files(here)}
    assert verify_export(url).ok
    assert {k.out for k in known_exports(built.dataset)} == {url, str(here)}

    gone = [PAIRS[0], PAIRS[7]]
    asked = len(s3.requests())
    removals = remove_from_exports(built.dataset, [p.uid for p in gone])
    assert [(r.reach, r.samples, r.complete) for r in removals] == [(Reach.EXPORT, 2, True)] * 2
    assert len(s3.requests()) - asked < (200 if kind == "llava" else 150)  # not one for each member or image
    assert verify_export(url).ok
    assert contents(url) == {name: (here / name).read_bytes() for name in files(here)}
    assert holds_pairs(url, [p.uid for p in gone]).files == {}
    for data in contents(url).values():
        assert not any(trace in data for p in gone for trace in (p.uid.encode(), p.url.encode(), p.image))


def test_a_store_that_cannot_be_reached(s3, bucket, tmp_path):  # noqa: F811
    built = build(str(tmp_path / "data"), PAIRS)
    url = f"s3://{bucket}/exports/one"
    WRITE["parquet"](built.snapshot, url)
    s3.fault("readonly")
    (removal,) = remove_from_exports(built.dataset, [PAIRS[0].uid])
    assert removal.reach is Reach.UNREACHABLE and not removal.complete
    s3.fault(None)
    assert verify_export(url).ok
    with pytest.raises(ConfigError, match="credentials"):
        WRITE["parquet"](built.snapshot, f"s3://key:secret@{bucket}/exports/two")
    assert not Path("s3:").exists()
