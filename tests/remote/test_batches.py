"""Batches of requests that lie in an object store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from captioners.instruct.batch import BatchWriter, collect, forget, submit
from pairmill import answers
from pairmill.report.progress import Silent
from pairmill.store import Dataset
from tests.captioners.instruct.test_batch import good, result, settings, tasks
from tests.hostile.batch_server import BatchServer
from tests.remote.conftest import S3


@pytest.fixture
def url(bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-a-test")
    return f"s3://{bucket}/data"


def test_there_and_back(url: str):
    asked = tasks(4)
    with BatchServer() as server:
        config = settings(Path("unused"), server.base_url).model_copy(update={"dataset": url})
        dataset, write = Dataset(url), BatchWriter.of(config).open()
        assert {one.reason for one in write(asked)} == {"writer.pending"}
        assert submit(config, dataset, Silent()) == 4 and submit(config, dataset, Silent()) == 0
        server.finish(good)
        assert collect(config, dataset, Silent()) == 4
    assert all(one.turns for one in write(asked)) and answers.spent(dataset)[0] == 4 * 600
    assert dataset.fs.find(dataset.path("_batches")) == []


def test_files_are_carried_and_forgotten(url: str, s3: S3):
    asked = tasks(8)
    config = settings(Path("unused"), None).model_copy(update={"dataset": url})
    dataset = Dataset(url)
    BatchWriter.of(config).open()(asked)
    assert submit(config, dataset, Silent()) == 8
    (path,) = dataset.fs.ls(dataset.path("_batches", "outgoing"))
    requests = [json.loads(line) for line in dataset.fs.cat_file(path).splitlines()]
    gone = asked[0].context.uid
    assert forget(dataset, [gone]) == 4
    stored = b"".join(dataset.fs.cat_file(file) for file in dataset.fs.find(dataset.path("_batches")))
    assert gone.encode() not in stored and asked[-1].context.uid.encode() in stored
    lines = "".join(json.dumps(result(request)) + "\n" for request in requests)
    dataset.fs.pipe_file(dataset.path("_batches", "incoming", "all.jsonl"), lines.encode())
    assert collect(config, dataset, Silent()) == 4
    assert all(one.turns for one in BatchWriter.of(config).open()(asked[4:]))
