"""The client that pays, against faults 8 and 9 of the hostile web: what is retried, what is paid, what is kept."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from captioners import chat, completions
from captioners.chat import ChatAnswer, ChatRequest, NoAnswer, PaidChat, chat_text
from captioners.completions import Pace
from pairmill.answers import JOURNAL, lookup, spent
from pairmill.errors import ConfigError, StageFailed
from pairmill.stage import WORKERS_ENV
from pairmill.store import Dataset
from schemas.config import Budget, InstructWriter, Price
from schemas.reasons import DEFERRED, Reason, retry_after_s
from tests.answers.asking import PRICE, ask, chat_of, folded, request
from tests.hostile.endpoint_server import (
    Answer,
    EndpointServer,
    Meter,
    completion,
    endless,
    error,
    raw,
    reset,
    says,
    silent,
    trickle,
)

KEY = "sk-canary-5f1c0ffee-never-to-be-seen"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "BACKOFF_S", 0.005)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")


def one(folder: Path, answer: Answer, **knobs: Any) -> tuple[NoAnswer, EndpointServer, PaidChat]:
    """The failure of one question to which the server always gives this answer."""
    with EndpointServer(lambda _: answer) as server:
        paid = chat_of(str(folder), server.base_url, **knobs)
        (outcome,) = ask(paid, [1])
        assert isinstance(outcome, NoAnswer), outcome
    return outcome, server, paid


# -- fault 8: no answer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reason", "charged"),
    [
        (error(429), Reason.WRITER_RATE_LIMITED, False),
        (error(500), Reason.WRITER_SERVER_ERROR, False),
        (error(503, Retry_After="0"), Reason.WRITER_SERVER_ERROR, False),
        (error(408), Reason.WRITER_TIMEOUT, False),
        (reset(), Reason.WRITER_CONNECTION, True),
        (reset(b'{"choices": ['), Reason.WRITER_CONNECTION, True),
        (raw(b"SSH-2.0-OpenSSH_9.6\r\n"), Reason.WRITER_CONNECTION, True),
    ],
)
def test_no_answer_is_tried_again_and_costs_only_what_may_be_charged(
    tmp_path: Path, answer: Answer, reason: Reason, charged: bool
):
    failure, server, paid = one(tmp_path, answer)
    assert failure.reason is reason and failure.reason in DEFERRED and failure.detail
    assert len(server.requests) == 3 and len({asked.body["seed"] for asked in server.requests}) == 1
    assert spent(Dataset(str(tmp_path)))[0] == 3 * charged * paid.bound(request(1)).tokens
    with EndpointServer(Meter()) as server:  # a later run gets it
        (outcome,) = ask(chat_of(str(tmp_path), server.base_url), [1])
        assert isinstance(outcome, ChatAnswer) and not outcome.cached


def test_429_waits_as_long_as_it_is_asked_to_or_not_at_all(tmp_path: Path):
    with EndpointServer(Meter(lambda _, times: error(429, Retry_After="1") if times == 0 else None)) as server:
        (outcome,) = ask(chat_of(str(tmp_path), server.base_url), [1])
        assert isinstance(outcome, ChatAnswer)
        assert server.requests[1].at - server.requests[0].at >= 0.99
    failure, server, _ = one(tmp_path / "other", error(429, "slow down", Retry_After="3600"))
    assert (failure.reason, len(server.requests)) == (Reason.WRITER_RATE_LIMITED, 1)
    assert retry_after_s(failure.detail) == 3600


@pytest.mark.parametrize("answer", [silent(), trickle(json.dumps(completion("A square.")).encode(), 0.05)])
def test_one_deadline_covers_the_whole_answer_and_what_is_lost_counts(tmp_path: Path, answer: Answer):
    begin = time.monotonic()
    failure, server, paid = one(tmp_path, answer, timeout_s=0.3, retries=1)
    assert failure.reason is Reason.WRITER_TIMEOUT and len(server.requests) == 2 and time.monotonic() - begin < 10
    assert spent(Dataset(str(tmp_path)))[0] == 2 * paid.bound(request(1)).tokens


def test_no_server_at_all_costs_nothing(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        outcomes = ask(chat_of(str(tmp_path), url, retries=1), [1, 2])
    assert [o.reason for o in outcomes if isinstance(o, NoAnswer)] == [Reason.WRITER_CONNECTION] * 2
    assert spent(Dataset(str(tmp_path))) == (0, 0.0)


def test_a_dead_endpoint_is_left_alone_after_a_while(tmp_path: Path):
    with EndpointServer(lambda _: error(503)) as server:
        outcomes = ask(chat_of(str(tmp_path), server.base_url, concurrency=2, retries=1), range(60))
    assert {o.reason for o in outcomes if isinstance(o, NoAnswer)} == {Reason.WRITER_SERVER_ERROR}
    assert len(outcomes) == 60 and 16 <= len(server.requests) <= 40


# -- fault 9: an answer that cannot be used is paid for once ----------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reason", "tokens"),
    [
        (says({**completion("A square in", "length"), "usage": {"prompt_tokens": 30, "completion_tokens": 50}}),
         Reason.WRITER_CUT_OFF, 80),
        (says({**completion("  \n\u200b "), "usage": {"prompt_tokens": 30, "completion_tokens": 2}}),
         Reason.WRITER_EMPTY, 32),
        (says({**completion(None, refusal="I will not."), "usage": {"prompt_tokens": 30, "completion_tokens": 9}}),
         Reason.WRITER_REFUSED, 39),
        (says({**completion(None, "tool_calls"), "usage": {"prompt_tokens": 30, "completion_tokens": 4}}),
         Reason.WRITER_MALFORMED, 34),
        (says({"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 4}}), Reason.WRITER_MALFORMED, 34),
        (says(b"not JSON"), Reason.WRITER_MALFORMED, None),
        (says(b""), Reason.WRITER_MALFORMED, None),
        (says(b"[" * 100_000), Reason.WRITER_MALFORMED, None),
        (endless(b" " * 65536), Reason.WRITER_MALFORMED, None),
        (says(completion("A square."), Content_Encoding="gzip"), Reason.WRITER_MALFORMED, None),
        (error(400, "flagged", "content_filter"), Reason.WRITER_REFUSED, 0),
    ],
)  # fmt: skip
def test_an_unusable_answer_is_paid_and_found_again(tmp_path: Path, answer: Answer, reason: Reason, tokens: int | None):
    failure, server, paid = one(tmp_path, answer)
    assert failure.reason is reason and len(server.requests) == 1
    bound = paid.bound(request(1)).tokens
    expected = bound if tokens is None else tokens
    assert failure.prompt_tokens + failure.completion_tokens == expected
    assert spent(Dataset(str(tmp_path))) == (expected, pytest.approx(failure.cost))
    folded(str(tmp_path))
    with EndpointServer(Meter()) as server:
        (again,) = ask(chat_of(str(tmp_path), server.base_url), [1])
        assert isinstance(again, NoAnswer) and server.requests == []
    assert (again.reason, again.detail, again.cost) == (failure.reason, failure.detail, failure.cost)


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        "many",
        {"prompt_tokens": -5, "completion_tokens": -5},
        {"prompt_tokens": 10**18, "completion_tokens": 1},
        {"prompt_tokens": True, "completion_tokens": True},
        {"prompt_tokens": 1.5, "completion_tokens": 2},
        {"prompt_tokens": 0, "completion_tokens": 0},
    ],
)
def test_no_usage_or_one_that_cannot_be_so_counts_the_upper_bound(tmp_path: Path, usage: Any):
    meter = Meter(usage=lambda _: usage)
    with EndpointServer(meter) as server:
        paid = chat_of(str(tmp_path), server.base_url)
        (outcome,) = ask(paid, [1])
    bound = paid.bound(request(1))
    assert isinstance(outcome, ChatAnswer)
    assert (outcome.prompt_tokens, outcome.completion_tokens) == (bound.prompt_tokens, bound.completion_tokens)
    (stored,) = lookup(Dataset(str(tmp_path)), 1, [request(1).digest("some/model")]).values()
    assert stored.estimated and meter.tokens <= spent(Dataset(str(tmp_path)))[0] == bound.tokens


def test_an_endpoint_that_says_too_little_cannot_exceed_the_budget(tmp_path: Path):
    meter = Meter(usage=lambda _: {"prompt_tokens": 0, "completion_tokens": 0})
    with EndpointServer(meter) as server:
        ask(chat_of(str(tmp_path), server.base_url, tokens=2000), range(100))
    assert 0 < meter.tokens <= 2000


def test_what_an_endpoint_bills_above_the_bound_counts(tmp_path: Path):
    with EndpointServer(Meter(usage=lambda _: {"prompt_tokens": 5000, "completion_tokens": 7})) as server:
        outcomes = ask(chat_of(str(tmp_path), server.base_url, tokens=600, concurrency=1), range(5))
    assert len(server.requests) == 1 and spent(Dataset(str(tmp_path)))[0] == 5007
    assert [o.reason for o in outcomes if isinstance(o, NoAnswer)] == [Reason.WRITER_BUDGET] * 4


# -- what concerns every request --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "kind", "says_so"),
    [
        (error(401, "bad key"), ConfigError, "instruct.writer.*HTTP 401: bad key.*OPENAI_API_KEY"),
        (error(404, "no such model"), ConfigError, r"instruct\.writer\.base_url.*'some/model'"),
        (error(400, "unknown field top_p"), ConfigError, "also to a plain question"),
        (error(402, "pay"), StageFailed, "add credit"),
        (error(429, "pay", "insufficient_quota"), StageFailed, "add credit"),
    ],
)
def test_what_concerns_every_request_stops_the_run(tmp_path: Path, answer: Answer, kind: type[Exception], says_so: str):
    with EndpointServer(lambda _: answer) as server:
        with pytest.raises(kind, match=says_so) as caught:
            ask(chat_of(str(tmp_path), server.base_url, concurrency=2), range(20))
        assert len(server.requests) <= 6
    assert KEY not in str(caught.value)
    bound = chat_of(str(tmp_path), server.base_url).bound(request(1)).tokens
    assert spent(Dataset(str(tmp_path)))[0] <= bound, "of the other request that was under way nothing is known"


def test_a_request_that_is_rejected_for_itself_costs_one_probe(tmp_path: Path):
    meter = Meter()
    digest = request(1).digest("some/model")
    with EndpointServer(
        lambda asked: error(400, "too long") if asked.headers["Idempotency-Key"] == digest else meter(asked)
    ) as server:
        (outcome,) = ask(chat_of(str(tmp_path), server.base_url), [1])
        assert isinstance(outcome, NoAnswer) and outcome.reason is Reason.WRITER_REFUSED and len(server.requests) == 2
    assert sum(meter.billed.values()) == 1 and spent(Dataset(str(tmp_path)))[0] == meter.tokens


def test_the_key_and_the_address_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for base_url, says_so in (
        ("http://user:secret@127.0.0.1/v1", "environment variable"),
        ("file:///etc/passwd", "http and https"),
        (None, r"instruct\.writer\.base_url is not set"),
    ):
        with pytest.raises(ConfigError, match=says_so):
            PaidChat.of(str(tmp_path), InstructWriter(kind="endpoint", name="m", base_url=base_url), PRICE, Budget())
    with pytest.raises(ConfigError, match="name is not set"):
        PaidChat.of(str(tmp_path), InstructWriter(base_url="http://127.0.0.1/v1"), PRICE, Budget())
    free = InstructWriter(name="m", base_url="http://127.0.0.1/v1")
    with pytest.raises(ConfigError, match=r"instruct\.price"):
        PaidChat.of(str(tmp_path), free, Price(), Budget(money=1))
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match=r"instruct\.writer: the environment variable OPENAI_API_KEY is not set"):
        ask(chat_of(str(tmp_path), "https://8.8.8.8/v1"), [1])


# -- what is sent -----------------------------------------------------------------------------------------------------


def test_the_request_and_what_can_be_pickled(tmp_path: Path):
    with EndpointServer(Meter()) as server:
        paid = chat_of(str(tmp_path), server.base_url)
        ask(paid, [3])
        ask(pickle.loads(pickle.dumps(paid)), [4])
        assert KEY.encode() not in pickle.dumps(paid)
    first, second = server.requests
    assert first.headers["Idempotency-Key"] == request(3).digest("some/model") != second.headers["Idempotency-Key"]
    assert first.headers["Authorization"] == second.headers["Authorization"] == f"Bearer {KEY}"
    assert first.body == {
        "model": "some/model",
        "messages": list(request(3).messages),
        "temperature": 0.7,
        "top_p": 0.95,
        "seed": 3,
        "max_tokens": 50,
    }


def test_a_digest_tells_all_that_an_answer_depends_on():
    messages = ({"role": "user", "content": "a"},)
    base: dict[str, Any] = {"messages": messages, "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 1}
    changes: list[dict[str, Any]] = [{}, {"max_tokens": 6}, {"temperature": 0.6}, {"top_p": 0.8}, {"seed": 2}]
    changes += [{"messages": ({"role": "user", "content": "b"},)}, {"messages": ({"role": "system", "content": "a"},)}]
    digests = {ChatRequest(**{**base, **change}).digest(model) for change in changes for model in ("m", "m@2")}
    assert len(digests) == 14
    swapped = ({"content": "a", "role": "user"},)
    assert ChatRequest(**{**base, "messages": swapped}).digest("m") == ChatRequest(**base).digest("m")


def test_the_key_is_in_no_byte_of_the_dataset(tmp_path: Path):
    hidden = f"{KEY[:9]}\u202e{KEY[9:]}"
    answers = [
        says(completion(f"A square, {KEY}.")),
        says(completion(f"A square, {hidden}.", "length")),
        says(completion(None, refusal=f"no {KEY}")),
        says(completion("A square.", f"stop {KEY}")),
        error(400, hidden, "content_filter"),
        error(500, KEY),
        reset(KEY.encode()),
    ]
    with EndpointServer(lambda asked: answers[asked.body["seed"]]) as server:
        outcomes = ask(chat_of(str(tmp_path), server.base_url, retries=0), range(len(answers)))
    assert [type(o) for o in outcomes].count(NoAnswer) == len(answers) - 1
    assert not any(KEY in f"{o} {vars(o)}" for o in outcomes)
    before = b"".join(path.read_bytes() for path in (tmp_path / JOURNAL).rglob("*") if path.is_file())
    folded(str(tmp_path))
    for data in (before, *(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())):
        assert KEY.encode() not in data and hidden.encode() not in data and KEY[:20].encode() not in data


# -- pace -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "least"), [("1", 0.45), ("2", 0.9)])
def test_requests_a_minute_are_those_of_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str, least: float
):
    monkeypatch.setitem(os.environ, WORKERS_ENV, workers)
    with EndpointServer(Meter()) as server:
        ask(chat_of(str(tmp_path), server.base_url, requests_per_minute=1200), range(10))
    at = sorted(asked.at for asked in server.requests)
    assert len(at) == 10 and 0.7 * least <= at[-1] - at[0]


def test_tokens_a_minute_follow_what_was_used(tmp_path: Path):
    with EndpointServer(Meter()) as server:
        paid = chat_of(str(tmp_path), server.base_url, tokens_per_minute=60_000, concurrency=1)
        begin = time.monotonic()
        ask(paid, range(20))
        took = time.monotonic() - begin
    used, bound = spent(Dataset(str(tmp_path)))[0], 20 * paid.bound(request(1)).tokens
    assert used / 1000 - 0.1 < took and bound / 1000 > 3 * used / 1000


def test_a_pace_lets_nothing_pass_early_and_saves_nothing_up():
    async def passing() -> list[float]:
        pace, begin = Pace(6000), time.monotonic()
        at = []
        for _ in range(10):
            await pace.wait()
            at.append(time.monotonic() - begin)
        await asyncio.sleep(0.2)
        begin = time.monotonic()
        for _ in range(10):
            await pace.wait()
        return [*at, time.monotonic() - begin]

    *at, after = asyncio.run(passing())
    assert all(moment >= 0.01 * number - 0.002 for number, moment in enumerate(at)) and after >= 0.088


# -- the text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw_text", "expected"),
    [
        ("Question:\r\n===\r\n  What?\t\n\n", "Question:\n===\n  What?"),
        ("<think>\nhmm\n</think>\n\nA square.", "A square."),
        ("A\u202e red\u2066 \x00squ\x07are\ufeff.\ud800", "A red square."),
        ("\u200d\n\u200d", ""),
        ("\u7ea2\u8272\u3000\u65b9\u5757", "\u7ea2\u8272\u3000\u65b9\u5757"),
    ],
)
def test_texts_keep_their_lines_and_nothing_that_hides(raw_text: str, expected: str):
    assert chat_text(raw_text) == expected


def test_every_reason_is_one_of_the_writer():
    assert {reason.value.partition(".")[0] for reason in vars(chat.WRITER_REASONS).values()} == {"writer"}
