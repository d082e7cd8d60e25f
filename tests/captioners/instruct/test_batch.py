"""Conversations by the Batch-file API: from a server of files and batches, by files alone, killed at each step."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from captioners import completions
from captioners.instruct import batch
from captioners.instruct.batch import BatchWriter, collect, forget, submit
from captioners.instruct.batch_api import BatchApi
from captioners.instruct.batch_files import BatchFiles
from captioners.instruct.endpoint import EndpointWriter
from filters.instruct import check
from pairmill import answers
from pairmill.errors import ConfigError, StageFailed
from pairmill.instructions import KINDS, Instruction, Task
from pairmill.run import parse_config
from pairmill.store import Dataset
from schemas.config import RunConfig
from tests.hostile.batch_server import BatchServer, Line
from tests.hostile.endpoint_server import Asked
from tests.hostile.writer_server import CONTEXT, answer, kind_of, used

KEY = "sk-canary-ba7c4-never-to-be-seen"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "BACKOFF_S", 0.01)
    monkeypatch.setattr("captioners.instruct.batch_api.BACKOFF_S", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with BatchServer() as running:
        yield running


class Notes:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)

    def start(self, title: str, rows: int, unit: str = "rows") -> None: ...
    def advance(self, rows: int, dropped: Any) -> None: ...
    def finish(self) -> None: ...


def settings(folder: Path, base_url: str | None, **knobs: Any) -> RunConfig:
    instruct = {name: knobs.pop(name) for name in ("price", "budget") if name in knobs}
    kind = knobs.pop("kind", "batch")
    writer = {"kind": kind, "name": "some/model", "base_url": base_url, "timeout_s": 5, "retries": 1, **knobs}
    return parse_config(
        {
            "dataset": str(folder / "dataset"),
            "source": {"kind": "url_table", "path": "unused"},
            "instruct": {"kinds": dict.fromkeys(KINDS, 1.0), "writer": writer, **instruct},
        }
    )


def tasks(count: int = 4) -> list[Task]:
    """Tasks over pictures that the good writer knows, of all kinds, in two shards."""
    contexts = [dataclasses.replace(CONTEXT, uid=f"{n:064x}") for n in range((count + 3) // 4)]
    return [Task(context, kind, n % 2) for n, context in enumerate(contexts) for kind in KINDS][:count]


class Work:
    """A dataset whose conversations a batch writer writes; each method is what a run does."""

    def __init__(self, folder: Path, base_url: str | None, count: int = 4, **knobs: Any) -> None:
        self.config = settings(folder, base_url, **knobs)
        self.dataset = Dataset(self.config.dataset)
        self.folder = folder / "dataset" / "_batches"
        self.tasks = tasks(count)
        self.notes: list[str] = []

    def write(self) -> list[Instruction]:
        return BatchWriter.of(self.config).open()(self.tasks)

    def submit(self) -> int:
        return self._told(submit)

    def collect(self) -> int:
        return self._told(collect)

    def _told(self, do: Callable[..., int]) -> int:
        notes = Notes()
        try:
            return do(self.config, self.dataset, notes)
        finally:
            self.notes = notes.said

    def reasons(self) -> list[str | None]:
        return [one.reason for one in self.write()]

    def written(self) -> list[Instruction]:
        """All of them, which must be good."""
        found = self.write()
        for one, task in zip(found, self.tasks, strict=True):
            assert one.reason is None, one
            assert check(one.turns, one.boxes, one.kind, task.context) == []
        return found

    def left(self) -> list[str]:
        """Files that are in the folder."""
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())


def good(request: Line) -> dict[str, Any]:
    """The good writer's answer to a line of a batch."""
    return used(answer(kind_of(Asked(0, "", {}, request["body"]))))


def bad(request: Line) -> dict[str, Any]:
    return used("What a picture!")


# -- there and back ---------------------------------------------------------------------------------------------------


def test_there_and_back(tmp_path: Path, server: BatchServer):
    work = Work(tmp_path, server.base_url, 8, price={"prompt": 1, "completion": 2})
    assert work.reasons() == ["writer.pending"] * 8
    assert work.submit() == 8 and "8 requests" in work.notes[0]
    (remote,) = server.batches.values()
    lines = server.requests(remote)
    assert len({line["custom_id"] for line in lines}) == 8
    for line in lines:
        assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
        assert (line["body"]["model"], line["body"]["max_tokens"]) == ("some/model", 1000)
        assert line["body"]["messages"][0]["role"] == "system"
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
    # nothing has come: nothing changes, nothing is sent twice
    assert work.collect() == 0 and "is validating" in work.notes[0]
    assert work.reasons() == ["writer.pending"] * 8 and work.submit() == 0 and len(server.batches) == 1
    server.finish(good)
    assert work.collect() == 8
    written = work.written()
    assert {(w.answers, w.prompt_tokens, w.completion_tokens) for w in written} == {(1, 500, 100)}
    assert sum(w.cost or 0 for w in written) == pytest.approx(8 * 700 / 1e6)
    tokens, cost = answers.spent(work.dataset)
    assert (tokens, cost) == (8 * 600, pytest.approx(8 * 700 / 1e6))
    assert work.left() == [] and work.collect() == 0 and work.submit() == 0 and len(server.batches) == 1
    assert answers.fold(work.dataset) == 8 and work.written() == written


def test_an_endpoint_goes_on_with_what_a_batch_paid_for(tmp_path: Path, server: BatchServer):
    work = Work(tmp_path, server.base_url)
    work.write()
    work.submit()
    server.finish(good)
    work.collect()
    asked = len(server.asked)
    other = EndpointWriter.of(settings(tmp_path, server.base_url, kind="endpoint"))
    assert other.identity() == BatchWriter.of(work.config).identity()
    assert other.open()(work.tasks) == work.written() and len(server.asked) == asked


def test_an_answer_that_does_not_pass_is_asked_for_again(tmp_path: Path, server: BatchServer):
    work = Work(tmp_path, server.base_url, 2)
    work.write()
    work.submit()
    server.finish(bad)
    assert work.collect() == 2
    first = {line["custom_id"] for line in server.requests(server.batches["batch-0"])}
    assert work.reasons() == ["writer.pending", "check.length"] or work.reasons() == ["writer.pending"] * 2
    assert work.submit() == 2
    second = {line["custom_id"] for line in server.requests(server.batches["batch-1"])}
    assert not first & second
    server.finish(good)
    assert work.collect() == 2
    written = work.written()
    assert [w.answers for w in written] == [2, 2] and all(w.findings and w.prompt_tokens == 1000 for w in written)


def test_answers_that_never_pass_are_recorded(tmp_path: Path, server: BatchServer):
    work = Work(tmp_path, server.base_url, 1, answers=2)
    for _ in range(2):
        assert work.reasons() == ["writer.pending"] and work.submit() == 1
        server.finish(bad)
        assert work.collect() == 1
    (one,) = work.write()
    assert one.reason == "writer.malformed" and one.answers == 2 and len(one.findings) == 2 and not one.turns
    assert work.submit() == 0


def test_files_hold_no_more_than_asked(tmp_path: Path, server: BatchServer, monkeypatch: pytest.MonkeyPatch):
    work = Work(tmp_path, server.base_url, 8, batch_requests=3)
    work.write()
    assert work.submit() == 8
    assert sorted(len(server.requests(remote)) for remote in server.batches.values()) == [2, 3, 3]
    server.finish(good)
    assert work.collect() == 8 and work.written()
    monkeypatch.setattr(batch, "MAX_FILE_BYTES", 15_000)
    other = Work(tmp_path / "other", server.base_url, 4)
    other.write()
    assert other.submit() == 4 and len(server.batches) > 4
    assert all(len(data) <= 15_000 for name, data in server.files.values() if name.startswith("requests"))


def test_requests_of_another_config_are_not_sent(tmp_path: Path, server: BatchServer):
    Work(tmp_path, server.base_url, temperature=0.1).write()
    work = Work(tmp_path, server.base_url)
    work.write()
    assert work.submit() == 4
    assert {line["body"]["temperature"] for line in server.requests(server.batches["batch-0"])} == {0.7}
    # and of a pair whose texts are others now, only those that ask about these
    changed = Work(tmp_path, server.base_url)
    changed.tasks = [
        dataclasses.replace(t, context=dataclasses.replace(t.context, texts=("A dog.",))) for t in work.tasks
    ]
    changed.write()
    more = Work(tmp_path, server.base_url)
    more.tasks = [dataclasses.replace(t, context=dataclasses.replace(t.context, texts=("A cat.",))) for t in work.tasks]
    more.write()
    assert more.submit() == 4
    sent = "".join(str(line) for line in server.requests(server.batches["batch-1"]))
    assert "A cat." in sent and "A dog." not in sent


# -- what goes wrong there --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_a_batch_that_ended_early_keeps_what_it_brought(tmp_path: Path, server: BatchServer, status: str):
    work = Work(tmp_path, server.base_url)
    work.write()
    work.submit()
    first = server.requests(server.batches["batch-0"])[0]["custom_id"]
    server.finish(lambda line: good(line) if line["custom_id"] == first else None, status)
    assert work.collect() == 1 and status in work.notes[0] and "3 requests wait again" in work.notes[0]
    assert sorted(filter(None, work.reasons())) == ["writer.pending"] * 3
    assert work.submit() == 3
    server.finish(good)
    assert work.collect() == 3 and work.written()
    assert answers.spent(work.dataset)[0] == 4 * 600


def test_a_batch_that_failed_is_told_and_sent_again_so_often(tmp_path: Path, server: BatchServer):
    work = Work(tmp_path, server.base_url, 1, retries=1)
    for number in range(2):
        work.write()
        assert work.submit() == 1 and len(server.batches) == number + 1
        server.fail("the model some/model does not do batches")
        assert work.collect() == 0 and "does not do batches" in work.notes[0]
    (one,) = work.write()
    assert one.reason == "writer.server_error" and "no answer in 2 batches" in (one.detail or "")
    assert "does not do batches" in (one.detail or "") and work.submit() == 0 and "retries" in work.notes[0]
    assert answers.spent(work.dataset) == (0, 0)
    patient = Work(tmp_path, server.base_url, 1, retries=5)
    assert patient.reasons() == ["writer.pending"] and patient.submit() == 1


def test_lines_of_the_error_file(tmp_path: Path, server: BatchServer):
    work = Work(tmp_path, server.base_url, 8)
    work.write()
    work.submit()
    by_kind = {
        "conversation": {"response": {"status_code": 429, "body": {"error": {"message": "slow"}}}, "error": None},
        "detail": {
            "response": {"status_code": 400, "body": {"error": {"message": "no", "code": "content_filter"}}},
            "error": None,
        },
        "complex": {"response": None, "error": {"code": "batch_expired", "message": "This request expired."}},
    }

    def problem(line: Line) -> dict[str, Any] | None:
        return by_kind.get(kind_of(Asked(0, "", {}, line["body"])))

    server.finish(good, errors=problem)
    assert work.collect() == 4  # two conversations of grounding, and two refusals
    reasons = {(one.kind, one.reason) for one in work.write()}
    assert reasons == {
        ("conversation", "writer.pending"),
        ("detail", "writer.pending"),  # refused; another answer is asked for
        ("complex", "writer.pending"),
        ("grounding", None),
    }
    assert work.submit() == 6
    server.finish(good)
    assert work.collect() == 6
    refused = [one for one in work.written() if one.kind == "detail"]
    assert [(one.answers, one.findings[0].reason) for one in refused] == [(2, "writer.refused")] * 2


def test_where_every_request_is_rejected_the_config_is_wrong(tmp_path: Path, server: BatchServer):
    work = Work(tmp_path, server.base_url)
    work.write()
    work.submit()
    rejected = {"response": {"status_code": 400, "body": {"error": {"message": "no seed here"}}}, "error": None}
    server.finish(good, errors=lambda _: rejected)
    assert work.collect() == 0 and "no seed here" in work.notes[0]
    assert work.reasons() == ["writer.pending"] * 4 and work.submit() == 4


def test_the_newer_name_of_max_tokens_is_learnt(tmp_path: Path, server: BatchServer):
    work = Work(tmp_path, server.base_url, 2)
    work.write()
    work.submit()
    said = "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    rejected = {"response": {"status_code": 400, "body": {"error": {"message": said}}}, "error": None}
    server.finish(good, errors=lambda _: rejected)
    assert work.collect() == 0 and work.submit() == 2
    for line in server.requests(server.batches["batch-1"]):
        assert line["body"]["max_completion_tokens"] == 1000 and "max_tokens" not in line["body"]
    server.finish(good)
    assert work.collect() == 2 and work.written()


def test_lines_that_are_not_of_the_protocol_are_told(tmp_path: Path, server: BatchServer):
    work = Work(tmp_path, server.base_url)
    work.write()
    work.submit()
    tail = (
        b'not JSON\n[1]\n{"custom_id": 5}\n{"custom_id": "abc", "response": {}}\n\xff\xfe\n{"x": "' + b"y" * 5_000_000
    )
    server.finish(good, tail=tail)
    assert work.collect() == 4 and work.written()
    assert "lines are not JSON" in work.notes[0] and "nobody waits for" in work.notes[0]


def test_a_damaged_answer_is_recorded_and_asked_for_again(tmp_path: Path, server: BatchServer):
    work = Work(tmp_path, server.base_url)
    work.write()
    work.submit()
    server.finish(lambda line: {"choices": []})
    assert work.collect() == 4
    assert work.reasons() == ["writer.pending"] * 4 and work.submit() == 4
    server.finish(good)
    work.collect()
    assert {one.findings[0].reason for one in work.written()} == {"writer.malformed"}


# -- an endpoint that does not answer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches"])
@pytest.mark.parametrize("status", [503, -503])
def test_no_answer_to_what_has_effects(tmp_path: Path, server: BatchServer, path: str, status: int):
    """Whether the request had its effect or not: it has it once."""
    work = Work(tmp_path, server.base_url)
    work.write()
    server.fault = lambda method, asked: status if (method, asked) == ("POST", path) else None
    assert work.submit() == 0 and "not sent yet" in work.notes[0]
    server.fault = lambda method, asked: None
    assert work.submit() == 4
    assert len(server.batches) == 1 and len(server.files) == 1
    server.finish(good)
    assert work.collect() == 4 and work.written()


def test_a_batch_that_nobody_can_look_for(tmp_path: Path, server: BatchServer):
    work = Work(tmp_path, server.base_url)
    work.write()
    server.lists = False
    server.fault = lambda method, path: -503 if (method, path) == ("POST", "/v1/batches") else None
    assert work.submit() == 0
    server.fault = lambda method, path: None
    with pytest.raises(StageFailed, match="does not list its batches") as caught:
        work.submit()
    assert len(server.batches) == 1 and work.left()[-1] in str(caught.value)


def test_reading_is_tried_again_and_then_left(tmp_path: Path, server: BatchServer):
    work = Work(tmp_path, server.base_url)
    work.write()
    work.submit()
    server.finish(good)
    for path in ("/v1/batches/batch-0", "/v1/files/file-1/content"):
        server.fault = lambda method, asked, path=path: 500 if asked == path else None
        assert work.collect() == 0 and "not collected yet" in work.notes[0]
    failed = iter([500])
    server.fault = lambda method, asked: next(failed, None) if asked == "/v1/batches/batch-0" else None
    assert work.collect() == 4 and work.written()


@pytest.mark.parametrize(
    ("status", "error"), [(401, ConfigError), (402, StageFailed), (404, ConfigError), (400, ConfigError)]
)
def test_what_concerns_every_request_stops(tmp_path: Path, server: BatchServer, status: int, error: type[Exception]):
    work = Work(tmp_path, server.base_url)
    work.write()
    server.fault = lambda method, path: status
    with pytest.raises(error, match=f"HTTP {status}") as caught:
        work.submit()
    assert KEY not in str(caught.value)
    server.fault = lambda method, path: None
    assert work.submit() == 4 and len(server.batches) == 1


def test_a_batch_that_is_gone_is_told(tmp_path: Path, server: BatchServer):
    work = Work(tmp_path, server.base_url)
    work.write()
    work.submit()
    server.batches.clear()
    assert work.collect() == 0 and "does not know the batch batch-0" in work.notes[0]
    assert work.submit() == 0  # perhaps it is only another account
    (record,) = [name for name in work.left() if name.startswith("sent")]
    assert work.collect() == 0 and record in work.notes[0]
    (work.folder / record).unlink()
    reserved = answers.spent(work.dataset)
    assert work.submit() == 4 and answers.spent(work.dataset) == reserved  # not twice as much


# -- killed ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is no more."""


class Killer:
    """Counts the steps that have effects, and dies at one of them: before it (even numbers) or after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at, self.steps = -1, 0
        for place, name in (
            (BatchFiles, "_write"),
            (BatchFiles, "_remove"),
            (answers, "claim"),
            (answers, "unclaim"),
            (answers, "add"),
        ):
            monkeypatch.setattr(place, name, self._wrapped(getattr(place, name)))
        for name in ("upload", "create"):
            monkeypatch.setattr(BatchApi, name, self._awaited(getattr(BatchApi, name)))

    def _step(self) -> None:
        if self.steps == self.at:
            self.steps += 1
            raise Killed
        self.steps += 1

    def _wrapped(self, do: Callable[..., Any]) -> Callable[..., Any]:
        def step(*given: Any, **named: Any) -> Any:
            self._step()
            result = do(*given, **named)
            self._step()
            return result

        return step

    def _awaited(self, do: Callable[..., Any]) -> Callable[..., Any]:
        async def step(*given: Any, **named: Any) -> Any:
            self._step()
            result = await do(*given, **named)
            self._step()
            return result

        return step

    def dies(self, do: Callable[[], Any], at: int) -> bool:
        """Whether it was killed at this step; False: it had fewer."""
        self.at, self.steps = at, 0
        try:
            do()
        except Killed:
            return True
        finally:
            self.at = -1
        return False


@pytest.mark.parametrize("carried", [False, True], ids=["sent", "by file"])
def test_killed_at_each_step_nothing_is_sent_twice_and_nothing_lost(
    tmp_path: Path, server: BatchServer, monkeypatch: pytest.MonkeyPatch, carried: bool
):
    monkeypatch.setattr("os.fsync", lambda _: None)  # the power stays on
    killer = Killer(monkeypatch)
    steps = {"submit": 0, "collect": 0}
    for during in steps:
        for at in range(100):
            work = Work(tmp_path / f"{during}{at}", None if carried else server.base_url, 2, budget={"tokens": 400_000})
            work.write()
            before = len(server.batches)
            killed = during == "submit" and killer.dies(work.submit, at)
            if during == "collect" or killed:
                assert work.submit() in (0, 2)
            if carried:
                assert len(carry(work)) == 2, (during, at)
            else:
                assert len(server.batches) == before + 1 == len({b.input_file_id for b in server.batches.values()})
                assert len(server.requests(server.batches[f"batch-{before}"])) == 2, (during, at)
                server.finish(good)
            if during == "collect":
                killed = killer.dies(work.collect, at)
            if during == "submit" or killed:
                work.collect()
            assert work.written() and work.submit() == 0 and work.collect() == 0, (during, at)
            assert answers.spent(work.dataset)[0] == 2 * 600 and work.left() == [], (during, at)
            assert during == "submit" or answers.fold(work.dataset) == 2
            if not killed:
                steps[during] = at
                break
    assert steps["submit"] >= 8 and steps["collect"] >= 6, steps


def carry(work: Work) -> list[Line]:
    """What a person does without an endpoint: take the files away, have them answered, bring the results."""
    requests = []
    for path in sorted((work.folder / "outgoing").glob("*.jsonl")):
        requests += [json.loads(line) for line in path.read_bytes().splitlines()]
    (work.folder / "incoming").mkdir(exist_ok=True)
    results = [result(request) for request in requests]
    (work.folder / "incoming" / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in results))
    return requests


def result(request: Line) -> Line:
    return {"custom_id": request["custom_id"], "response": {"status_code": 200, "body": good(request)}, "error": None}


# -- the budget -------------------------------------------------------------------------------------------------------


def test_the_budget_is_kept_by_upper_bounds(tmp_path: Path, server: BatchServer):
    free = Work(tmp_path / "free", server.base_url, 8)
    free.write()
    free.submit()
    bound = answers.spent(free.dataset)[0]  # of all eight
    budget = bound // 2 + 500
    work = Work(tmp_path, server.base_url, 8, budget={"tokens": budget})
    work.write()
    sent = work.submit()
    assert 0 < sent < 8 and "instruct.budget" in work.notes[-1] and answers.spent(work.dataset)[0] <= budget
    assert work.submit() == 0 and answers.spent(work.dataset)[0] <= budget
    while sent < 8:
        server.finish(good)
        work.collect()
        assert answers.spent(work.dataset)[0] == 600 * sent
        work.write()
        more = work.submit()
        assert more and answers.spent(work.dataset)[0] <= budget
        sent += more
    server.finish(good)
    work.collect()
    assert work.written()
    broke = Work(tmp_path / "broke", server.base_url, 8, budget={"money": 1e-6}, price={"prompt": 1})
    broke.write()
    assert broke.submit() == 0 and "no room for 8" in broke.notes[0]


# -- by files alone ---------------------------------------------------------------------------------------------------


def test_without_an_endpoint_files_go_out_and_results_come_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    work = Work(tmp_path, None, 8, batch_requests=5)
    work.write()
    assert work.submit() == 8 and "outgoing" in work.notes[0]
    assert work.submit() == 0 and work.collect() == 0
    reserved = answers.spent(work.dataset)[0]
    requests = carry(work)
    assert len(requests) == 8 and len(list((work.folder / "outgoing").iterdir())) == 2
    incoming = work.folder / "incoming" / "results.jsonl"
    lines = [result(request) for request in requests]
    lines[0] = {"custom_id": requests[0]["custom_id"], "response": None, "error": {"message": "the machine fell over"}}
    partly = [json.dumps(line) for line in lines[:3]] + ["{torn", json.dumps({"custom_id": "who?", "response": {}})]
    incoming.write_text("\n".join(partly))
    assert work.collect() == 2
    assert "2 answers, 1 requests wait again" in work.notes[0] and "1 lines are not JSON" in work.notes[0]
    assert (work.folder / "incoming" / "results.jsonl.rejected").read_text().splitlines() == partly[3:]
    assert not incoming.exists() and 0 < answers.spent(work.dataset)[0] < reserved
    (work.folder / "incoming" / "results.jsonl.rejected").unlink()
    assert work.reasons().count(None) == 2 and work.submit() == 1  # the one that fell over goes out again
    carry(work)
    assert work.collect() == 6 and work.written()
    assert answers.spent(work.dataset)[0] == 8 * 600 and work.left() == []


def test_results_that_come_twice_count_once(tmp_path: Path):
    work = Work(tmp_path, None)
    work.write()
    work.submit()
    requests = carry(work)
    text = (work.folder / "incoming" / "results.jsonl").read_text()
    (work.folder / "incoming" / "again.jsonl").write_text(text + text)
    assert work.collect() == 4 and work.written()
    assert answers.spent(work.dataset)[0] == 4 * 600 and answers.fold(work.dataset) == 4 == len(requests)


# -- takedowns and keys -----------------------------------------------------------------------------------------------


def everything_in(folder: Path) -> bytes:
    return b"\n".join(str(p).encode() + p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file())


@pytest.mark.parametrize("carried", [False, True], ids=["sent", "by file"])
def test_what_is_forgotten_is_nowhere_and_its_answers_are_not_taken(tmp_path: Path, server: BatchServer, carried: bool):
    work = Work(tmp_path, None if carried else server.base_url, 8)
    gone, kept = {task.context.uid for task in work.tasks[:4]}, {task.context.uid for task in work.tasks[4:]}
    work.write()
    work.submit()
    requests = carry(work) if carried else server.requests(server.batches["batch-0"])
    work.write()
    (work.folder / "pending" / "0-dead.jsonl.1.tmp").write_text("".join(gone))  # of a process that was killed
    assert all(uid.encode() in everything_in(work.folder) for uid in gone | kept)
    assert forget(work.dataset, gone) == 4
    stored = everything_in(work.folder)
    assert all(uid.encode() not in stored for uid in gone) and all(uid.encode() in stored for uid in kept)
    of_gone = [r["custom_id"] for r in requests if r["custom_id"].encode() not in stored]
    assert len(of_gone) == 4
    if not carried:
        server.finish(good)
    assert work.collect() == 4
    work.tasks = work.tasks[4:]
    assert work.written() and answers.fold(work.dataset) == 4
    assert forget(work.dataset, gone) == 0


def test_the_key_appears_nowhere(tmp_path: Path, server: BatchServer):
    work = Work(tmp_path, server.base_url)
    said = [repr(BatchWriter.of(work.config))]
    work.write()
    work.submit()
    said += work.notes
    server.fail(f"you sent {KEY}")
    work.collect()
    said += work.notes
    work.submit()
    server.finish(lambda _: used(f"{KEY} is the key"), errors=lambda _: None)
    work.collect()
    said += [*work.notes, *map(repr, work.write())]
    assert "[key]" in "".join(said) and KEY not in "".join(said)
    assert KEY.encode() not in everything_in(tmp_path)
