"""The outbox of pipelines on a disk and in an object store."""

from __future__ import annotations

import contextlib
import pickle
import threading
from pathlib import Path

import pytest

from pairmill.engines.beam.outbox import FOLDER, Outbox, clear
from pairmill.errors import StoreError
from pairmill.store import Dataset


@pytest.fixture(params=["disk", "s3"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "disk" else f"s3://{request.getfixturevalue('bucket')}/data"


def test_there_and_back(dataset: str):
    driver = Outbox.make(dataset)
    places = driver.put_parts("units", [b"one", b"two", b"three"])
    worker: Outbox = pickle.loads(pickle.dumps(driver))
    assert [worker.read_part(place) for place in places] == [b"one", b"two", b"three"]
    assert worker.is_open() and list(driver.take()) == []
    for data in (b"first", b"first"):  # a bundle that is done twice
        worker.put("7.json", data)
    worker.put("8.json", b"second")
    assert list(driver.take()) == [("7.json", b"first"), ("8.json", b"second")]
    assert list(driver.take()) == []
    driver.shut()
    assert not worker.is_open()
    driver.remove()
    store = Dataset(dataset)
    assert store.fs.find(store.path(FOLDER)) == []
    with pytest.raises(StoreError, match=r"cannot read .*/units"):
        worker.read_part(places[0])


def test_what_workers_still_write_into_goes(tmp_path: Path):
    """Those of a pipeline whose driver was killed."""
    for number in range(30):
        boxes = [Outbox.make(str(tmp_path / str(number))) for _ in range(2)]
        writing = [threading.Event() for _ in boxes]

        def write(box: Outbox, begun: threading.Event) -> None:
            with contextlib.suppress(StoreError):
                for i in range(10_000):
                    box.put(f"{i % 20}.json", b"a result that nobody takes")
                    begun.set()

        threads = [threading.Thread(target=write, args=pair) for pair in zip(boxes, writing, strict=True)]
        for thread, begun in zip(threads, writing, strict=True):
            thread.start()
            begun.wait()
        clear(str(tmp_path / str(number)))
        for thread in threads:
            thread.join()
        assert not (tmp_path / str(number) / FOLDER).exists()


def test_the_next_run_shuts_what_a_killed_one_left_open(dataset: str):
    left = Outbox.make(dataset)
    left.put("7.json", b"a result that nobody takes")
    clear(dataset)
    assert not left.is_open()
    clear(dataset)  # where there is nothing
