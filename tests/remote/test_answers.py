"""The journal of paid answers in an object store: small objects, conditional writes, nothing paid twice."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from captioners import completions
from captioners.chat import ChatAnswer, NoAnswer
from pairmill import storage
from pairmill.answers import ANSWERS, ANSWERS_TABLE, LOST, folding, lookup, place, spent
from pairmill.store import Dataset, read_files
from schemas.reasons import Reason
from tests.answers.asking import ask, chat_of, folded, request
from tests.hostile.endpoint_server import EndpointServer, Meter
from tests.remote.conftest import ROOT, S3

ASKING = """
import sys
from tests.answers.asking import ask_some
ask_some(sys.argv[1], [], numbers=list(range(40)), batch=20, base_url=sys.argv[2], tokens=20_000)
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "BACKOFF_S", 0.005)


@pytest.fixture
def url(bucket: str) -> str:
    return f"s3://{bucket}/data"


def digest(number: int) -> str:
    return request(number).digest("some/model")


def rows(url: str) -> list[dict[str, Any]]:
    opened = Dataset(url)
    return read_files(opened, opened.table(ANSWERS_TABLE, ANSWERS).files(), ANSWERS, ANSWERS.names).to_pylist()


def answered(outcomes: list[ChatAnswer | NoAnswer]) -> int:
    return sum(isinstance(outcome, ChatAnswer) for outcome in outcomes)


def lines(url: str) -> list[str]:
    fs, root = storage.open_fs(url)
    return [path for path in fs.find(root) if path.endswith(".jsonl")]


def test_an_answer_is_paid_for_once(s3: S3, url: str):
    meter = Meter()
    with EndpointServer(meter) as server:
        assert answered(ask(chat_of(url, server.base_url, tokens=10_000), range(30))) == 30
        assert 2 < len(lines(url)) < 60, "some at a time go into one object"
        assert answered(ask(chat_of(url, server.base_url, tokens=10_000), range(30))) == 30
        s3.fault("lost")  # the answer to a conditional write is lost
        assert folded(url) == 30 and folded(url) == 0 and lines(url) == []
        s3.fault("lost")
        assert answered(ask(chat_of(url, server.base_url, tokens=10_000), range(32))) == 32
    assert set(meter.billed.values()) == {1} and len(meter.billed) == 32
    assert spent(Dataset(url))[0] == meter.tokens and len(rows(url)) == 30


def test_two_sessions_at_once_stay_within_one_budget(url: str, s3: S3):
    meter = Meter(delay_s=lambda _: 0.01)
    outcomes: dict[int, list[ChatAnswer | NoAnswer]] = {}

    def work(first: int) -> None:
        chat = chat_of(url, server.base_url, tokens=2000, concurrency=4)
        outcomes[first] = ask(chat, range(first, first + 60))

    with EndpointServer(meter) as server:
        threads = [threading.Thread(target=work, args=(first,)) for first in (0, 60)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert 2000 - 300 < meter.tokens <= 2000 and spent(Dataset(url))[0] == meter.tokens
    refused = [o.reason for some in outcomes.values() for o in some if isinstance(o, NoAnswer)]
    assert set(refused) == {Reason.WRITER_BUDGET} and len(refused) + len(meter.billed) == 120


def test_kill_9_and_resumption(url: str, s3: S3):
    meter = Meter(delay_s=lambda key: int(key[:2], 16) / 1280, remembers=True)
    with EndpointServer(meter) as server:
        process = subprocess.Popen([sys.executable, "-c", ASKING, url, server.base_url], cwd=ROOT)
        until = time.monotonic() + 60
        while sum(meter.delivered.values()) < 10 and time.monotonic() < until:
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert 10 <= len(meter.billed) < 40
        assert spent(Dataset(url))[0] >= meter.tokens
        folded(url)
        assert lines(url) == []
        assert answered(ask(chat_of(url, server.base_url, tokens=20_000), range(40))) == 40
    assert set(meter.billed.values()) == {1} and len(meter.billed) == 40
    folded(url)
    assert sum(row["outcome"] == "answered" for row in rows(url)) == 40
    assert sum(row["outcome"] == LOST for row in rows(url)) <= 20
    assert spent(Dataset(url))[0] == sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows(url))


def test_a_fold_that_breaks_off_at_each_step_is_done_again(url: str, s3: S3, monkeypatch: pytest.MonkeyPatch):
    meter = Meter()
    with EndpointServer(meter) as server:
        for number, (owner, name) in enumerate(
            [(place.Store, "change"), (storage.open_fs(url)[0], "rm"), (folding, "_settle")]
        ):
            ask(chat_of(url, server.base_url), range(number * 6, number * 6 + 6))
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, _break)
                with pytest.raises(_Broken):
                    folded(url)
            assert set(lookup(Dataset(url), 0, [digest(n) for n in range(18)])) == {
                digest(n) for n in range(0, number * 6 + 6, 2)
            }
            assert spent(Dataset(url))[0] == meter.tokens
            folded(url)
            assert len(rows(url)) == number * 6 + 6 and spent(Dataset(url))[0] == meter.tokens and lines(url) == []


class _Broken(BaseException):
    pass


def _break(*_: object, **__: object) -> None:
    raise _Broken
