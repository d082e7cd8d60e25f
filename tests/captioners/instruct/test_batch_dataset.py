"""Batches in the life of a dataset: a takedown reaches them."""

from __future__ import annotations

from pathlib import Path

from captioners.instruct.batch import BatchWriter, collect, submit
from pairmill.admission import pair_uid
from pairmill.instructions import Context, Task
from pairmill.integrity import examine
from pairmill.report.progress import Silent
from pairmill.run import refresh
from pairmill.store import Dataset
from pairmill.takedown import Selectors, check_absence, forget
from pairmill.versions import vacuum
from tests.captioners.instruct.test_batch import good, settings
from tests.hostile.batch_server import BatchServer
from tests.needles import find_needles
from tests.steps import config, texts, write_urls

TEXTS = texts(8)
UIDS = [pair_uid(f"http://host{i % 7}.example/{i}.jpg", text) for i, text in enumerate(TEXTS)]


def test_nothing_of_a_forgotten_pair_is_left_in_batches(tmp_path: Path):
    run = config(tmp_path, write_urls(tmp_path / "urls.parquet", TEXTS))
    refresh(run, Silent())
    dataset = Dataset(run.dataset)
    contexts = [
        Context(uid, (f"secret word{n}z", text), (), 1, 1)
        for n, (uid, text) in enumerate(zip(UIDS, TEXTS, strict=True))
    ]
    tasks = [Task(context, "detail", n % 2) for n, context in enumerate(contexts)]
    with BatchServer() as server:
        asked = settings(Path("unused"), server.base_url, batch_requests=4).model_copy(update={"dataset": run.dataset})
        write = BatchWriter.of(asked).open()
        write(tasks[:6])
        assert submit(asked, dataset, Silent()) == 6
        write(tasks)  # two more wait, and none of the six is known to have an answer
        gone = [UIDS[1], UIDS[7]]
        words = ["secret word1z", "secret word7z"]
        assert any("_batches" in found for found in find_needles([Path(run.dataset)], [*gone, *words]))
        assert forget(dataset, Selectors.of(uids=gone), Silent()).done
        places = [p for p in Path(run.dataset).iterdir() if p.name not in ("tombstones", "takedowns")]
        assert find_needles(places, [*gone, *words]) == []
        assert check_absence(dataset, Selectors.of(uids=gone), Silent()).absent
        vacuum(dataset, grace_hours=0)
        assert submit(asked, dataset, Silent()) == 1  # of the two, the one that stays
        server.finish(good)
        assert collect(asked, dataset, Silent()) == 6
    assert find_needles(places, [*gone, *words]) == [] and not examine(dataset, Silent()).damage
