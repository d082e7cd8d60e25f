"""Answers are paid for once and within the budget, whatever breaks: a real server that bills, processes that are
killed."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import pairmill.answers.folding
from captioners import completions
from captioners.chat import ChatAnswer, NoAnswer, PaidChat
from pairmill.answers import (
    ANSWERS,
    ANSWERS_TABLE,
    JOURNAL,
    LOST,
    Answer,
    Bound,
    BudgetSpent,
    add,
    claim,
    lookup,
    spent,
    unclaim,
    usage_sql,
)
from pairmill.errors import StoreError
from pairmill.store import Dataset, read_files
from pairmill.versions.vacuum import _TEMPORARY
from schemas.config import Budget
from schemas.reasons import Reason
from tests.answers.asking import PRICE, ask, chat_of, folded, request, uid_of
from tests.faults.zygote import Zygote
from tests.hostile.endpoint_server import Answer as Reply
from tests.hostile.endpoint_server import EndpointServer, Meter, error, reset, says
from tests.needles import find_needles

KILLED = -signal.SIGKILL


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "BACKOFF_S", 0.005)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as running:
        yield running


def table_rows(dataset: str) -> list[dict[str, Any]]:
    opened = Dataset(dataset)
    files = opened.table(ANSWERS_TABLE, ANSWERS).files()
    return read_files(opened, files, ANSWERS, [*ANSWERS.names, "shard"]).to_pylist()


def digest(number: int) -> str:
    return request(number).digest("some/model")


def texts(outcomes: list[ChatAnswer | NoAnswer]) -> list[str | None]:
    assert all(isinstance(outcome, ChatAnswer) for outcome in outcomes), outcomes
    return [outcome.text for outcome in outcomes if isinstance(outcome, ChatAnswer)]


def said(numbers: range | list[int]) -> list[str]:
    return [f"Picture number {number}." for number in numbers]


def journal_files(dataset: str) -> list[Path]:
    return sorted((Path(dataset) / JOURNAL / "answers").glob("*.jsonl"))


# -- once -------------------------------------------------------------------------------------------------------------


def test_an_answer_is_paid_for_once_by_every_later_session_before_and_after_a_fold(tmp_path: Path):
    meter, url = Meter(), str(tmp_path)
    with EndpointServer(meter) as server:
        first = ask(chat_of(url, server.base_url), range(40))
        again = ask(chat_of(url, server.base_url), range(40))
        assert folded(url) == 40 and folded(url) == 0
        last = ask(chat_of(url, server.base_url), range(41))
    assert texts(first) == texts(again) == said(range(40)) and texts(last) == said(range(41))
    assert [a.cached for a in (*first, *again, *last) if isinstance(a, ChatAnswer)] == [False] * 40 + [True] * 80 + [
        False
    ]
    assert set(meter.billed.values()) == {1} and len(meter.billed) == 41
    assert set(meter.billed) == {digest(n) for n in range(41)}
    assert spent(Dataset(url))[0] == meter.tokens
    rows = table_rows(url)
    assert {row["uid"] for row in rows} == {uid_of(n) for n in range(40)}
    assert all(row["shard"] == int(row["uid"], 16) % 2 for row in rows)
    assert {(row["purpose"], row["model"], row["outcome"], row["estimated"]) for row in rows} == {
        ("detail", "some/model", "answered", False)
    }
    cost = sum(row["prompt_tokens"] * PRICE.prompt + row["completion_tokens"] * PRICE.completion for row in rows) / 1e6
    assert cost == pytest.approx(sum(row["cost"] for row in rows)) and cost > 0


def test_the_same_question_at_the_same_time_is_sent_once(tmp_path: Path):
    meter = Meter(delay_s=lambda _: 0.05)
    with EndpointServer(meter) as server:
        outcomes = ask(chat_of(str(tmp_path), server.base_url), [7] * 30 + [9] * 30, shards=1)
    assert texts(outcomes) == said([7] * 30 + [9] * 30) and len(server.requests) == 2
    assert sum(not a.cached for a in outcomes if isinstance(a, ChatAnswer)) == 2


def test_a_model_of_another_revision_is_another_model(tmp_path: Path):
    with EndpointServer(Meter()) as server:
        ask(chat_of(str(tmp_path), server.base_url), [1])
        ask(chat_of(str(tmp_path), server.base_url, revision="2"), [1])
    assert len(server.requests) == 2 and server.requests[0].body == server.requests[1].body


def test_200_at_a_time_through_every_fault_and_none_is_lost_or_paid_twice(tmp_path: Path):
    """A third of the questions meet faults before they are answered; a second run asks for those that gave up."""
    drawn = random.Random(5)
    faults: list[Reply] = [error(429), error(429, Retry_After="0"), error(500), error(503), says(b"no", 502)]
    unlucky = {digest(n): [drawn.choice(faults) for _ in range(drawn.randint(1, 4))] for n in range(0, 400, 3)}

    def fault(key: str, times: int) -> Reply | None:
        planned = unlucky.get(key, [])
        return planned[times] if times < len(planned) else None

    meter = Meter(fault, delay_s=lambda key: int(key[:2], 16) / 2560, hold=200)
    url = str(tmp_path)
    with EndpointServer(meter) as server:
        first = ask(chat_of(url, server.base_url), range(400))
        assert server.peak == 200
        folded(url)
        second = ask(chat_of(url, server.base_url), range(400))
    given_up = [o.reason for o in first if isinstance(o, NoAnswer)]
    assert given_up and set(given_up) <= {Reason.WRITER_RATE_LIMITED, Reason.WRITER_SERVER_ERROR}
    assert texts(second) == said(range(400))
    assert set(meter.billed.values()) == set(meter.delivered.values()) == {1} and len(meter.billed) == 400
    assert spent(Dataset(url))[0] == meter.tokens


def test_an_answer_that_breaks_off_is_asked_for_again_and_counts_in_full_each_time(tmp_path: Path):
    """The endpoint may bill what it began; what arrives is kept, what is lost counts at its upper bound."""
    url = str(tmp_path)
    meter = Meter(lambda _, times: reset(b'{"choices": [') if times == 0 else None)
    with EndpointServer(meter) as server:
        chat = chat_of(url, server.base_url)
        assert texts(ask(chat, [1])) == said([1])
    folded(url)
    rows = sorted(table_rows(url), key=lambda row: row["outcome"])
    assert [row["outcome"] for row in rows] == ["answered", LOST]
    assert rows[1]["estimated"] and rows[1]["text"] is None
    bound = chat.bound(request(1))
    assert (rows[1]["prompt_tokens"], rows[1]["completion_tokens"]) == (bound.prompt_tokens, 50)
    assert spent(Dataset(url))[0] == meter.tokens + bound.tokens


# -- the budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [{"tokens": 6000}, {"money": 0.02}])
def test_a_budget_is_used_up_and_never_exceeded_and_a_larger_one_goes_on(tmp_path: Path, limit: dict[str, Any]):
    meter, url = Meter(delay_s=lambda _: 0.02), str(tmp_path)
    with EndpointServer(meter) as server:
        chat = chat_of(url, server.base_url, **limit)
        first = ask(chat, range(400))
        billed = meter.tokens
        bound, money = chat.bound(request(1)), spent(Dataset(url))[1]
        if "tokens" in limit:
            assert billed <= 6000
        if "money" in limit:
            assert money <= 0.02
        assert billed > 6000 - bound.tokens or money > 0.02 - bound.cost, "it is used up"
        refused = [outcome for outcome in first if isinstance(outcome, NoAnswer)]
        assert refused and {outcome.reason for outcome in refused} == {Reason.WRITER_BUDGET}
        assert "raise it and run again" in refused[0].detail
        begin = time.monotonic()
        assert ask(chat_of(url, server.base_url, **limit), range(400, 500))  # nothing is sent, nothing waits
        assert meter.tokens == billed and time.monotonic() - begin < 5
        folded(url)
        assert texts(ask(chat_of(url, server.base_url, tokens=10**6), range(400))) == said(range(400))
    assert set(meter.billed.values()) == {1} and spent(Dataset(url))[0] == meter.tokens


def test_a_request_that_can_never_fit_is_not_sent(tmp_path: Path):
    with EndpointServer(Meter()) as server:
        bound = chat_of(str(tmp_path), server.base_url).bound(request(1)).tokens
        chat = chat_of(str(tmp_path), server.base_url, tokens=bound)
        outcomes = ask(chat, [1, 2, 3])
        (lucky,) = [number for number, outcome in enumerate(outcomes, 1) if isinstance(outcome, ChatAnswer)]
        again = ask(chat, [1, 2, 3])
        assert [isinstance(outcome, ChatAnswer) for outcome in again] == [number == lucky for number in (1, 2, 3)]
        assert len(server.requests) == 1


def test_two_processes_at_once_share_one_budget_and_use_it_up(zygote: Zygote, tmp_path: Path):
    meter, url = Meter(delay_s=lambda _: 0.01), str(tmp_path)
    with EndpointServer(meter) as server:
        jobs = [
            {
                "config": url,
                "verb": "ask",
                "arguments": {
                    "numbers": numbers,
                    "batch": 200,
                    "base_url": server.base_url,
                    "tokens": 12_000,
                    "concurrency": 15,
                },
            }
            for numbers in (list(range(400)), list(range(400, 800)))
        ]
        assert [outcome.code for outcome in zygote.run(*jobs)] == [0, 0]
    assert 12_000 - 300 < meter.tokens <= 12_000
    keys = [{digest(n) for n in numbers} & set(meter.billed) for numbers in (range(400), range(400, 800))]
    assert all(len(mine) > 50 for mine in keys) and set(meter.billed.values()) == {1}
    assert spent(Dataset(url))[0] == meter.tokens


def test_what_was_spent_stays_spent_after_a_takedown_and_when_the_note_of_it_is_lost(tmp_path: Path):
    meter, url = Meter(), str(tmp_path)
    with EndpointServer(meter) as server:
        ask(chat_of(url, server.base_url), range(20))
        folded(url)
        before = spent(Dataset(url))
        dataset = Dataset(url)
        table = dataset.table(ANSWERS_TABLE, ANSWERS)
        table.commit([], remove=[file for file in table.files() if file.shard == 0])
        assert spent(Dataset(url)) == before
        ask(chat_of(url, server.base_url), range(20, 30))
        (Path(url) / JOURNAL / "spending.json").unlink()
        remade = spent(Dataset(url))[0]
        assert remade == sum(r["prompt_tokens"] + r["completion_tokens"] for r in table_rows(url)) + sum(
            answer.tokens for n in range(20, 30) for answer in lookup(dataset, n % 2, [digest(n)]).values()
        )
        folded(url)
        assert spent(Dataset(url))[0] == remade
    (Path(url) / JOURNAL / "spending.json").write_text("{")
    with pytest.raises(StoreError, match=r"spending\.json.*damaged.*delete it"):
        spent(Dataset(url))


# -- kills ------------------------------------------------------------------------------------------------------------


def run_killed(zygote: Zygote, url: str, base_url: str, **when: Any) -> int:
    """Ask, killed at some point; the exit code."""
    arguments = {"numbers": list(range(60)), "batch": 30, "base_url": base_url, "tokens": 40_000}
    return zygote.run({"config": url, "verb": "ask", "arguments": arguments, "writes": True, **when})[0].code


@pytest.mark.parametrize("remembers", [True, False])
def test_kill_9_of_the_asking_process_and_resumption(zygote: Zygote, tmp_path: Path, remembers: bool):
    """At steps of its journal and at random times: an endpoint that honours the key bills everything once; one that
    does not bills again at most what was in flight, and the budget counts that in full."""
    drawn = random.Random(11 + remembers)
    points: list[dict[str, Any]] = [{"before": step} for step in drawn.sample(range(4, 120), 2)]
    points += [{"after": drawn.randrange(4, 120)}]
    points += [{"clock": 0.05 + drawn.random() * 0.25} for _ in range(1)]
    for number, point in enumerate(points):
        url = str(tmp_path / str(number))
        meter = Meter(delay_s=lambda key: int(key[:2], 16) / 5120, remembers=remembers)
        with EndpointServer(meter) as server:
            code = run_killed(zygote, url, server.base_url, **point)
            assert code == KILLED or "clock" in point
            if number % 2:
                folded(url)
            told = spent(Dataset(url))[0]
            assert told >= meter.tokens, "what was begun counts"
            outcomes = ask(chat_of(url, server.base_url, tokens=40_000), range(60))
        assert texts(outcomes) == said(range(60)), point
        assert len(meter.billed) == 60 and meter.tokens <= spent(Dataset(url))[0] <= 40_000
        twice = sum(count > 1 for count in meter.billed.values())
        assert twice == 0 if remembers else twice <= 30
        folded(url)
        rows = table_rows(url)
        assert len(rows) == len({row["request"] for row in rows})
        assert sum(row["outcome"] == "answered" for row in rows) == 60
        assert spent(Dataset(url))[0] == sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)
        assert not journal_files(url)


def test_killed_again_and_again_within_a_small_budget(zygote: Zygote, tmp_path: Path):
    meter, url = Meter(delay_s=lambda _: 0.01), str(tmp_path)
    with EndpointServer(meter) as server:
        for number in range(5):
            job = {"numbers": list(range(number * 50, 300)), "batch": 40, "base_url": server.base_url, "tokens": 9000}
            zygote.run({"config": url, "verb": "ask", "arguments": job, "clock": 0.08 + 0.03 * number})
            if number == 2:
                folded(url)
        ask(chat_of(url, server.base_url, tokens=9000), range(300))
    assert meter.tokens <= 9000 and spent(Dataset(url))[0] <= 9000


def test_a_fold_killed_at_each_step_loses_and_doubles_nothing(zygote: Zygote, tmp_path: Path):
    source = tmp_path / "source"
    meter = Meter()
    with EndpointServer(meter) as server:
        ask(chat_of(str(source), server.base_url, tokens=10**6), range(20))
        folded(str(source))
        ask(chat_of(str(source), server.base_url, tokens=10**6), range(20, 50))
        run_killed(zygote, str(source), server.base_url, before=30)
    expected = spent(Dataset(str(source)))[0]

    def fold_in(folder: Path, **when: int) -> Any:
        return zygote.run({"config": str(folder), "verb": "fold", "removals": True, **when})[0]

    shutil.copytree(source, tmp_path / "calm")
    calm = fold_in(tmp_path / "calm")
    assert calm.code == 0 and calm.steps >= 8, calm

    def content(folder: Path) -> list[dict[str, Any]]:
        return sorted(table_rows(str(folder)), key=lambda row: row["request"])

    whole = content(tmp_path / "calm")
    settled = spent(Dataset(str(tmp_path / "calm")))[0]
    assert settled <= expected and not journal_files(str(tmp_path / "calm"))
    assert settled == sum(row["prompt_tokens"] + row["completion_tokens"] for row in whole)
    for step in range(calm.steps):
        folder = tmp_path / str(step)
        shutil.copytree(source, folder)
        assert fold_in(folder, before=step).code == KILLED
        assert spent(Dataset(str(folder)))[0] in (expected, settled)
        assert set(lookup(Dataset(str(folder)), 0, [digest(n) for n in range(50)])) == {
            digest(n) for n in range(0, 50, 2)
        }
        folded(str(folder))
        assert content(folder) == whole and spent(Dataset(str(folder)))[0] == settled, step
        assert not journal_files(str(folder))


def test_a_session_that_lives_is_left_alone(tmp_path: Path):
    import asyncio

    meter, url = Meter(), str(tmp_path)

    async def live(chat: PaidChat) -> None:
        async with chat:
            await chat.ask(uid_of(0), 0, "detail", request(0))
            assert await asyncio.to_thread(folded, url) == 0
            assert len(journal_files(url)) == 1
            await chat.ask(uid_of(1), 0, "detail", request(1))

    with EndpointServer(meter) as server:
        asyncio.run(live(chat_of(url, server.base_url)))
    assert folded(url) == 2 and not journal_files(url)


# -- lines ------------------------------------------------------------------------------------------------------------


def test_torn_and_damaged_lines_are_left_out_and_nothing_else_is(tmp_path: Path):
    meter, url = Meter(), str(tmp_path / "whole")
    with EndpointServer(meter) as server:
        ask(chat_of(url, server.base_url), range(10), shards=1)
        (path,) = journal_files(url)
        data = path.read_bytes()
        lines = data.splitlines(keepends=True)
        assert len(lines) == 20 and all(json.loads(line)["crc32"] for line in lines)
        drawn = random.Random(2)
        for cut in [len(data) - 1, len(data) - 2, *drawn.sample(range(1, len(data)), 12)]:
            path.write_bytes(data[:cut])
            events = [json.loads(line) for line in data[:cut].splitlines() if line + b"\n" in lines]
            whole = {event["digest"] for event in events if event["event"] == "answered"}
            # a line that only lacks its end is whole
            found = set(lookup(Dataset(url), 0, [digest(n) for n in range(10)]))
            assert whole <= found and len(found - whole) <= (cut == len(data) - 1)
        flipped = bytearray(data)
        at = data.index(b"Picture number 3.")
        flipped[at] ^= 1
        path.write_bytes(flipped)
        assert set(lookup(Dataset(url), 0, [digest(n) for n in range(10)])) == {digest(n) for n in range(10) if n != 3}
        before = meter.tokens
        folded(url)
        assert sum(row["outcome"] == LOST for row in table_rows(url)) == 1
        assert texts(ask(chat_of(url, server.base_url), range(10), shards=1)) == said(range(10))
        assert meter.tokens > before and meter.billed[digest(3)] == 2 and sum(meter.billed.values()) == 11


def test_no_room_on_the_disk_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import os

    meter, url = Meter(), str(tmp_path)
    write = os.write

    def short(descriptor: int, data: bytes) -> int:
        return write(descriptor, data[: len(data) // 2])

    with EndpointServer(meter) as server:
        assert texts(ask(chat_of(url, server.base_url), [0])) == said([0])
        monkeypatch.setattr(os, "write", short)
        with pytest.raises(StoreError, match="make room"):
            ask(chat_of(url, server.base_url), [1])
        monkeypatch.undo()
        assert len(server.requests) == 1
        assert texts(ask(chat_of(url, server.base_url), [0, 1])) == said([0, 1])
    assert len(server.requests) == 2 and spent(Dataset(url))[0] == meter.tokens


# -- the table --------------------------------------------------------------------------------------------------------


def test_many_folds_are_put_together_in_one_file_a_shard(tmp_path: Path):
    meter, url = Meter(), str(tmp_path)
    with EndpointServer(meter) as server:
        for number in range(10):
            ask(chat_of(url, server.base_url), [number], shards=1)
            folded(url)
        assert texts(ask(chat_of(url, server.base_url), range(10), shards=1)) == said(range(10))
    dataset = Dataset(url)
    assert len(dataset.table(ANSWERS_TABLE, ANSWERS).files()) < pairmill.answers.folding.COMPACT_AT
    assert len(table_rows(url)) == 10 and set(meter.billed.values()) == {1}


def test_a_fold_brings_nothing_of_a_forgotten_pair(tmp_path: Path):
    from pairmill.tombstones import TOMBSTONES, TOMBSTONES_TABLE

    meter, url = Meter(), str(tmp_path)
    with EndpointServer(meter) as server:
        ask(chat_of(url, server.base_url), range(6))
    at = {"at": "2026-01-01T00:00:00+00:00", "request": "r", "done": False}
    Dataset(url).records(TOMBSTONES_TABLE, TOMBSTONES).append([{"kind": "uid", "hash": uid_of(3), **at}])
    assert folded(url) == 5
    needles = find_needles([tmp_path / ANSWERS_TABLE, tmp_path / JOURNAL], [uid_of(3), "Picture number 3."])
    assert needles == [] and find_needles([tmp_path / ANSWERS_TABLE], [uid_of(2)])
    assert spent(Dataset(url))[0] == meter.tokens


def test_the_usage_ledger(tmp_path: Path):
    import duckdb

    with EndpointServer(Meter()) as server:
        ask(chat_of(str(tmp_path), server.base_url), range(4))
    folded(str(tmp_path))
    answers = pa.Table.from_pylist(table_rows(str(tmp_path)))
    assert answers.num_rows == 4
    usage = duckdb.sql(usage_sql("answers"))
    wanted = {"uid", "purpose", "model", "asked_at", "outcome", "prompt_tokens", "completion_tokens", "cost"}
    assert wanted <= set(usage.columns)
    sums = duckdb.sql(f"SELECT count(*), min(cost) > 0 FROM ({usage_sql('answers')})")
    assert sums.fetchall() == [(4, True)]


def test_vacuum_knows_what_it_may_remove_of_the_journal(tmp_path: Path):
    with EndpointServer(Meter()) as server:
        ask(chat_of(str(tmp_path), server.base_url), range(4))
    names = [str(p.relative_to(tmp_path / JOURNAL)) for p in (tmp_path / JOURNAL).rglob("*") if p.is_file()]
    assert names and not any(_TEMPORARY.fullmatch(name) or name.startswith("open/") for name in names)


# -- by file ----------------------------------------------------------------------------------------------------------


def filed(number: int, tokens: int = 100) -> Answer:
    return Answer(
        uid_of(number), f"batch-{digest(number)[:16]}", digest(number), "detail", "some/model",
        "2026-01-01T00:00:00+00:00", "answered", f"By file {number}.", "stop", None, tokens, 0, False, 0.0, None,
    )  # fmt: skip


def test_answers_that_come_by_file(tmp_path: Path):
    dataset, budget = Dataset(str(tmp_path)), Budget(tokens=1000)
    claim(dataset, "b1", Bound(500, 300, 0.0), budget)
    claim(dataset, "b1", Bound(500, 200, 0.0), budget)  # again, after a kill
    with pytest.raises(BudgetSpent):
        claim(dataset, "b2", Bound(200, 101, 0.0), budget)
    assert spent(dataset)[0] == 700
    for _ in range(2):  # a kill after it was written: the results are read again
        add(dataset, {0: [filed(0), filed(2)], 1: [filed(1)]}, "b1")
    assert set(lookup(dataset, 0, [digest(0), digest(1), digest(2)])) == {digest(0), digest(2)}
    with EndpointServer(Meter()) as server:
        outcomes = ask(chat_of(str(tmp_path), server.base_url, tokens=1000), range(4))
    assert texts(outcomes[:3]) == ["By file 0.", "By file 1.", "By file 2."] and len(server.requests) == 1
    assert folded(str(tmp_path)) == 4 and len(table_rows(str(tmp_path))) == 4
    claim(dataset, "b3", Bound(50, 50, 0.0), budget)
    before = spent(dataset)[0]
    unclaim(dataset, "b3")
    assert spent(dataset)[0] == before - 100
