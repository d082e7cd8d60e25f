"""Going back, comparing and cleaning up a dataset in an object store."""

from __future__ import annotations

from dataclasses import replace

from pairmill.report.progress import Silent
from pairmill.store import Dataset, Table
from pairmill.versions import diff, finish, rollback, table_bytes, vacuum
from schemas import fields
from schemas.config import Retention
from tests.history import CLIP, IMAGES, OTHER_CLIP, Pair, State, publish, read


def test_snapshots_in_an_object_store(bucket: str, monkeypatch):
    dataset = Dataset(f"s3://{bucket}/data")
    pairs = tuple(Pair(i, i // 2, reason="clip.below_threshold" if i % 2 else None) for i in range(4))
    publish(dataset, State(pairs))
    publish(dataset, State((replace(pairs[0], sha256="b"), *pairs[1:], Pair(9, 2)), clip=OTHER_CLIP))
    wanted = [read(dataset.snapshot(n)) for n in (1, 2)]
    report = diff(dataset.snapshot(1), dataset.snapshot(2), listed=5)
    assert (report.pairs_in, report.image.changed, report.kept_b) == (1, 1, 3)
    assert [(row["change"], row["url"]) for row in report.listed] == [("in", Pair(9).url), ("image", Pair(0).url)]

    commits, commit = [], Table.commit

    def fails(self, *arguments, **named):
        commits.append(self.name)
        if len(commits) == 4:
            raise KeyboardInterrupt
        return commit(self, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Table, "commit", fails)
        try:
            rollback(dataset, 1)
        except KeyboardInterrupt:
            commits.append("interrupted")
    assert commits[-1] == "interrupted"
    assert read(dataset.snapshot()) == wanted[1]
    record = finish(dataset, Silent())
    assert record is not None and (record.id, record.note) == (3, "as snapshot 1")
    assert [read(dataset.snapshot(n)) for n in (1, 2, 3)] == [*wanted, wanted[0]]
    assert record.bytes == table_bytes(dataset, record.tables)
    assert {f.shard for f in dataset.table(OTHER_CLIP, fields.PAIRS).files()} == {1}

    would = vacuum(dataset, Retention(snapshots=1), dry_run=True)
    did = vacuum(dataset, Retention(snapshots=1))
    assert replace(would, dry_run=False) == did
    assert did.expired == [1, 2] and did.files > 0
    assert read(dataset.snapshot()) == wanted[0]
    there = {path[len(dataset.root) + 1 :] for path in dataset.fs.find(dataset.root)}
    assert not [path for path in there if path.startswith((OTHER_CLIP, "_vacuum", "_rollback"))]
    for table in (CLIP, IMAGES):
        files = {f"{table}/{f.relative}" for f in dataset.snapshot().files(table)}
        assert {path for path in there if path.startswith(f"{table}/shard=")} == files
