"""Conversations from a model by the Batch-file API: requests go in files, answers come within a day, at half the price
where they are sold.

A run leaves the requests that have no answer yet (`BatchWriter`), and their conversations wait (``writer.pending``).
`submit`, after it, sends them; `collect`, before the next one, puts the answers that have come where `BatchWriter` and
`captioners.instruct.endpoint.EndpointWriter` find them (`pairmill.answers`), so either goes on with what the other has
paid for. A conversation whose answer does not pass asks again by the next batch.

Without ``instruct.writer.base_url`` nothing is sent: files of requests lie in ``<dataset>/_batches/outgoing/``, and any
``*.jsonl`` of results in ``<dataset>/_batches/incoming/`` is collected; so a batch runner on another machine will do.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import secrets
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from captioners.chat import SECTION, WRITER_REASONS, NoAnswer, PaidChat, model_identity, told
from captioners.completions import ChatClient, Endpoint, Failed, Probe, Rejected, api_key, chat_text, check_base_url
from captioners.instruct import batch_api
from captioners.instruct.batch_api import BatchApi, Unanswered, Unknown
from captioners.instruct.batch_files import (
    CREATING,
    ENDPOINT,
    HANDED,
    MADE,
    SENT,
    UPLOADED,
    UPLOADING,
    Asked,
    Batch,
    BatchFiles,
    Pending,
    State,
    Waiting,
)
from captioners.instruct.endpoint import Attempt, Questions
from pairmill import answers
from pairmill.answers import Answer, Bound, BudgetSpent, Ticket, utc_now
from pairmill.errors import ConfigError, PairmillError, StageFailed
from pairmill.instructions import Instruction, Task
from pairmill.report.progress import Reporter
from pairmill.sources.download import in_own_loop
from pairmill.stage import Resources
from pairmill.store import Dataset
from schemas import config
from schemas.reasons import Reason

MAX_FILE_BYTES = 190 * 2**20
"""Of a file of requests; OpenAI takes 200 MB."""


# -- in the run -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchWriter:
    """Leaves requests for `submit`, and makes conversations of the answers that `collect` brought. Its identity is that
    of the endpoint's writer: where and how a model is asked does not matter."""

    judges: ClassVar[bool] = True

    questions: Questions
    dataset: str = field(compare=False)
    model: str = field(compare=False)
    """The model's name at the endpoint."""
    retries: int = field(default=4, compare=False)
    resources: Resources = field(default=Resources(cpus=0.5, rows=256), compare=False)

    @classmethod
    def of(cls, run: config.RunConfig) -> BatchWriter:
        """The writer that ``instruct.writer`` describes.

        Raises:
            ConfigError: no name, or a base_url that is wrong.
        """
        chat_of(run)
        writer = run.instruct.writer
        return cls(Questions.of(run), run.dataset, writer.name or "", writer.retries)

    def identity(self) -> Mapping[str, Any]:
        """What determines its answers."""
        return self.questions.identity()

    def digest(self) -> str:
        """sha256 (hex) of the identity."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def open(self) -> Callable[[Sequence[Task]], list[Instruction]]:
        """Nothing is opened: nothing is sent here."""
        writer = self.digest()

        def write(tasks: Sequence[Task]) -> list[Instruction]:
            dataset = Dataset(self.dataset)
            files = BatchFiles(dataset)
            attempts = [self.questions.attempt(task) for task in tasks]
            waiting = self._answer(dataset, attempts)
            if waiting:
                self._leave(files, writer, waiting)
            return [attempt.done for attempt in attempts if attempt.done is not None]

        return write

    def _answer(self, dataset: Dataset, attempts: Sequence[Attempt]) -> list[Attempt]:
        """Give attempts the answers that are stored. Returns those that wait for one."""
        waiting: list[Attempt] = []
        going = [attempt for attempt in attempts if attempt.done is None]
        while going:
            asked: dict[int, dict[str, list[Attempt]]] = defaultdict(lambda: defaultdict(list))
            for attempt in going:
                asked[attempt.task.shard][attempt.request.digest(self.questions.model)].append(attempt)
            going = []
            for shard, by_digest in asked.items():
                stored = answers.lookup(dataset, shard, by_digest)
                for digest, some in by_digest.items():
                    for attempt in some:
                        if digest not in stored:
                            waiting.append(attempt)
                            continue
                        give(attempt, stored[digest])
                        going += [attempt] if attempt.done is None else []
        return waiting

    def _leave(self, files: BatchFiles, writer: str, waiting: Sequence[Attempt]) -> None:
        failures = files.state().failures
        now, left = datetime.datetime.now(datetime.timezone.utc).isoformat(), {}
        for attempt in waiting:
            request, task = attempt.request, attempt.task
            digest = request.digest(self.questions.model)
            body = {
                "model": self.model,
                "messages": list(request.messages),
                "temperature": request.temperature,
                "top_p": request.top_p,
                "seed": request.seed,
                "max_tokens": request.max_tokens,
            }
            left[digest] = Pending(task.context.uid, task.shard, task.kind, digest, writer, now, body)
            count, why = failures.get(digest, (0, ""))
            if count > self.retries:
                detail = f"no answer in {count} batches: {why}"
                attempt.unanswered(NoAnswer(Reason.WRITER_SERVER_ERROR, detail))
            else:
                detail = f"request {digest[:16]} waits for a batch"
                attempt.unanswered(NoAnswer(Reason.WRITER_PENDING, detail))
        files.leave(left.values())


def give(attempt: Attempt, answer: Answer) -> None:
    """Go on with a stored answer."""
    try:
        said = told(answer, cached=True)
    except NoAnswer as failure:
        attempt.unanswered(failure)
    else:
        attempt.answered(said.text or "", said.prompt_tokens, said.completion_tokens, said.cost)


def chat_of(run: config.RunConfig) -> PaidChat:
    """What digests, bounds and prices are told by; it asks nothing.

    Raises:
        ConfigError: no name, or a base_url that is wrong.
    """
    asked, writer = run.instruct, run.instruct.writer
    if writer.name is None:
        raise ConfigError(f"{SECTION}.name is not set; an endpoint knows its models by name")
    url = "" if writer.base_url is None else check_base_url(writer.base_url, SECTION)
    endpoint = Endpoint(
        SECTION,
        url,
        writer.name,
        writer.api_key_env,
        writer.concurrency,
        writer.timeout_s,
        writer.retries,
        writer.max_retry_wait_s,
        identity=model_identity(writer),
    )
    return PaidChat(run.dataset, endpoint, asked.price, asked.budget)


def tidy(files: BatchFiles) -> None:
    """Remove what processes left that died, and give back what is claimed for batches that are no more."""
    files.tidy()
    for name in set(answers.claims(files.dataset)) - {batch.name for batch in files.batches()}:
        answers.unclaim(files.dataset, name)


# -- after the run ----------------------------------------------------------------------------------------------------


def submit(run: config.RunConfig, dataset: Dataset, reporter: Reporter) -> int:
    """Send what waits, in batches of at most ``batch_requests``, as far as the budget reaches. For the holder of the
    dataset's lock. A call that was killed is gone on with by the next one; nothing is sent twice.

    Returns:
        How many requests were sent (or written to files).

    Raises:
        ConfigError: the key, the place or the name is wrong.
        StageFailed: the account is empty, or nobody can say whether a batch was created.
        StoreError: a file cannot be read or written.
    """
    return _Submission(run, dataset, reporter).run()


class _Submission:
    def __init__(self, run: config.RunConfig, dataset: Dataset, reporter: Reporter) -> None:
        self._run, self._dataset, self._reporter = run, dataset, reporter
        self._writer = BatchWriter.of(run)
        self._chat = chat_of(run)
        self._files = BatchFiles(dataset)
        tidy(self._files)
        self._state = self._files.state()
        self._pending: dict[str, Waiting] = {}

    def run(self) -> int:
        batches = self._files.batches()
        ready = self._ready({digest for batch in batches for digest in batch.requests})
        sent = sum(self._go_on(batch) for batch in batches if batch.state not in (SENT, HANDED))
        while ready:
            group = self._group(ready)
            if not group:
                self._reporter.note(
                    f"instruct.budget leaves no room for {len(ready)} more requests; raise it and run again"
                )
                break
            batch = self._files.save(Batch(secrets.token_hex(8), MADE, utc_now(), group))
            if not (now := self._go_on(batch)):
                break
            sent += now
            ready = ready[len(group) :]
        return sent

    def _ready(self, flying: Collection[str]) -> list[Waiting]:
        """What is to be sent; what waits for nothing any more is removed."""
        every, writer = self._files.pending(), self._writer.digest()
        by_shard: dict[int, list[str]] = defaultdict(list)
        for digest, request in every.items():
            by_shard[request.shard].append(digest)
        stored: set[str] = set()
        for shard, digests in by_shard.items():
            stored |= answers.lookup(self._dataset, shard, digests).keys()
        last: dict[tuple[str, str], Waiting] = {}
        for request in every.values():
            key = (request.uid, request.purpose)
            if request.writer == writer and request.digest not in stored:
                last[key] = max(last.get(key, request), request, key=lambda r: (r.at, r.digest))
        wanted = {request.digest for request in last.values()}
        self._files.keep((wanted | set(flying)) - stored)
        self._pending = self._files.pending()
        ready = [self._pending[digest] for digest in wanted - set(flying)]
        given_up = [r for r in ready if self._state.failures.get(r.digest, (0, ""))[0] > self._writer.retries]
        if given_up:
            self._reporter.note(
                f"{len(given_up)} requests got no answer in {self._writer.retries + 1} batches and are not sent again "
                f"({self._state.failures[given_up[0].digest][1]}); raise instruct.writer.retries to send them"
            )
        left = set(map(id, given_up))
        return sorted((r for r in ready if id(r) not in left), key=lambda r: (r.shard, r.uid, r.purpose, r.digest))

    def _group(self, ready: Sequence[Waiting]) -> dict[str, Asked]:
        """The first requests that fit into one file and into what is left of the budget, by digest."""
        limits, spent = self._run.instruct.budget, answers.spent(self._dataset)
        tokens = float("inf") if limits.tokens is None else limits.tokens - spent[0]
        money = float("inf") if limits.money is None else limits.money - spent[1]
        group: dict[str, Asked] = {}
        size = 0
        for waiting in ready[: self._run.instruct.writer.batch_requests]:
            request = self._files.load(waiting)
            bound = self._chat.bound(request.request)
            line = request.line(self._state.length_key)
            tokens, money, size = tokens - bound.tokens, money - bound.cost, size + len(line)
            if tokens < 0 or money < 0 or (size > MAX_FILE_BYTES and group):
                break
            group[waiting.digest] = Asked(
                waiting.uid, waiting.shard, bound.prompt_tokens, bound.completion_tokens, bound.cost
            )
        return group

    def _lines(self, batch: Batch) -> Iterator[bytes]:
        waiting = (self._pending[digest] for digest in batch.requests if digest in self._pending)
        return (self._files.load(one).line(self._state.length_key) for one in waiting)

    def _go_on(self, batch: Batch) -> int:
        """Bring a batch as far as it can be brought; how many requests that sent."""
        if batch.state in (MADE, UPLOADING) and not any(self._lines(batch)):  # all of it was answered or forgotten
            answers.unclaim(self._dataset, batch.name)
            self._files.drop(batch)
            return 0
        if batch.state == MADE:
            try:
                answers.claim(self._dataset, batch.name, batch.bound, self._run.instruct.budget)
            except BudgetSpent as spent:
                self._files.drop(batch)
                self._reporter.note(str(spent))
                return 0
        if self._chat.endpoint.base_url:
            return in_own_loop(lambda: self._send(batch))
        if batch.state != MADE:
            self._reporter.note(
                f"the batch {batch.name} is at an endpoint; set instruct.writer.base_url to go on with it"
            )
            return 0
        path = self._files.hand_out(batch, self._lines(batch))
        self._files.save(batch, state=HANDED)
        self._reporter.note(f"{len(batch.requests)} requests to be answered lie in {path}")
        return len(batch.requests)

    async def _send(self, batch: Batch) -> int:
        try:
            async with _api(self._run, self._chat) as api:
                batch = await self._uploaded(api, batch)
                batch_id = None
                if batch.state == CREATING:
                    batch_id = await self._found(api, batch)
                batch = self._files.save(batch, state=CREATING) if batch.state != CREATING else batch
                assert batch.file_id is not None
                if batch_id is None:
                    batch_id = await api.create(batch.file_id, ENDPOINT, batch.name)
                self._files.save(batch, state=SENT, batch_id=batch_id)
        except Unanswered as failure:
            self._reporter.note(
                f"the batch {batch.name} is not sent yet: {failure.args[0]}; the next run goes on with it"
            )
            return 0
        except Unknown as failure:
            raise ConfigError(
                f"{SECTION}: the endpoint {self._chat.endpoint.base_url} answers {failure}; check that it has the "
                f"Batch API, and {SECTION}.base_url (up to and with /v1)"
            ) from None
        self._reporter.note(f"{len(batch.requests)} requests were sent as the batch {batch_id}")
        return len(batch.requests)

    async def _uploaded(self, api: BatchApi, batch: Batch) -> Batch:
        """With the file of the batch at the endpoint."""
        if batch.state not in (MADE, UPLOADING):
            return batch
        file_id = await api.find_file(batch.file_name) if batch.state == UPLOADING else None
        if file_id is None:
            batch = self._files.save(batch, state=UPLOADING)
            with tempfile.TemporaryFile() as file:
                file.writelines(self._lines(batch))
                file.seek(0)
                file_id = await api.upload(batch.file_name, file)
        return self._files.save(batch, state=UPLOADED, file_id=file_id)

    async def _found(self, api: BatchApi, batch: Batch) -> str | None:
        """The batch, if an earlier call created it and could not write that down."""
        try:
            return await api.find_batch(batch.file_id or "", batch.name)
        except Unknown:
            raise StageFailed(
                f"the endpoint {self._chat.endpoint.base_url} does not list its batches, so it cannot be told whether "
                f"one of the file {batch.file_id} was created before the last run ended; look there, cancel it if "
                f"there is one, and remove {self._files.path('sent', batch.name)}.json: its requests are sent again"
            ) from None


def _api(run: config.RunConfig, chat: PaidChat) -> BatchApi:
    url, writer = chat.endpoint.base_url, run.instruct.writer
    return BatchApi(url, api_key(url, writer.api_key_env, SECTION), writer)


# -- before the next run ----------------------------------------------------------------------------------------------


def collect(run: config.RunConfig, dataset: Dataset, reporter: Reporter) -> int:
    """Store the answers that have come. For the holder of the dataset's lock. Requests of batches that failed, expired
    or were cancelled wait again. A call that was killed is done again by the next one; no answer is counted twice.

    Returns:
        How many answers were stored.

    Raises:
        ConfigError: the key or the place is wrong.
        StageFailed: the account is empty.
        StoreError: a file cannot be read or written.
    """
    return _Collection(run, dataset, reporter).run()


@dataclass
class _Results:
    """What a batch brought."""

    answers: dict[str, Answer] = field(default_factory=dict)
    """By digest."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why there is none, by digest."""
    rejected: list[str] = field(default_factory=list)
    """Digests of requests that the endpoint takes for wrong."""
    bad: int = 0
    """Lines that cannot be read."""
    foreign: int = 0
    """Lines of which nobody asked."""


class _Collection:
    def __init__(self, run: config.RunConfig, dataset: Dataset, reporter: Reporter) -> None:
        self._run, self._dataset, self._reporter = run, dataset, reporter
        self._chat = chat_of(run)
        self._files = BatchFiles(dataset)
        tidy(self._files)
        self._state: State = self._files.state()
        self._pending = self._files.pending()

    @cached_property
    def _client(self) -> ChatClient:
        """Reads answers, and asks nothing."""
        url = self._chat.endpoint.base_url
        key = api_key(url, self._run.instruct.writer.api_key_env, SECTION) if url else None
        return ChatClient(self._chat.endpoint, key, WRITER_REASONS, Probe(_no_probe, "", ""), tidy=chat_text)

    def run(self) -> int:
        count = self._brought()
        flying = [batch for batch in self._files.batches() if batch.state == SENT]
        if flying and not self._chat.endpoint.base_url:
            self._reporter.note(
                f"{len(flying)} batches are at an endpoint; set instruct.writer.base_url to collect their answers"
            )
        elif flying:
            count += in_own_loop(lambda: self._polled(flying))
        return count

    # -- from the endpoint --

    async def _polled(self, flying: Sequence[Batch]) -> int:
        count = 0
        async with _api(self._run, self._chat) as api:
            for batch in flying:
                try:
                    remote = await api.batch(batch.batch_id or "")
                    if remote.status in batch_api.LIVE:
                        self._reporter.note(
                            f"the batch {remote.id} of {len(batch.requests)} requests is {remote.status}"
                        )
                        continue
                    results = _Results()
                    for file_id in (remote.output_file_id, remote.error_file_id):
                        if file_id is not None:
                            async for line in api.lines(file_id):
                                self._read(line, results, batch.requests, batch.name)
                except Unanswered as failure:
                    self._reporter.note(f"the batch {batch.batch_id} is not collected yet: {failure.args[0]}")
                    continue
                except Unknown as failure:
                    self._reporter.note(
                        f"the endpoint does not know the batch {batch.batch_id} or its files ({failure}); is it that "
                        "of another account or base_url? If it is lost, remove "
                        f"{self._files.path('sent', batch.name)}.json: its requests are sent again"
                    )
                    continue
                why = f"the batch {remote.id} is {remote.status}" + (f": {remote.errors}" if remote.errors else "")
                count += self._settle(batch, results, why, tell=remote.status != "completed")
        return count

    def _settle(self, batch: Batch, results: _Results, why: str, *, tell: bool) -> int:
        """A batch is over: store its answers, and have the other requests wait again."""
        self._doubt(results)
        new = self._store(results, batch.name)
        for digest in batch.requests.keys() - results.answers.keys():
            self._count(digest, results.failures.get(digest, why))
        unanswered = len(batch.requests) - len(results.answers)
        self._remember(results)
        self._files.drop(batch)
        self._forget(results)
        if tell or unanswered or results.bad:
            self._reporter.note(
                f"{why}: {len(results.answers)} answers, {unanswered} requests wait again{_unread(results)}"
                + (f"; {next(iter(results.failures.values()))}" if results.failures else "")
            )
        return new

    # -- from files that a person brought --

    def _brought(self) -> int:
        count = 0
        for path in self._files.incoming():
            batches = self._files.batches()
            home = {digest: batch for batch in batches for digest in batch.requests}
            known = {digest: home[digest].requests[digest] if digest in home else None for digest in self._pending}
            results, rest = _Results(), []
            for line in self._files.lines(path):
                if not self._read(line, results, known, "brought"):
                    rest.append(line if line.endswith(b"\n") else line + b"\n")
            self._doubt(results)
            count += self._store(results, None)
            for digest, why in results.failures.items():
                self._count(digest, why)
            for batch in batches:
                self._shrink(batch, results)
            self._remember(results)
            self._files.consumed(path, b"".join(rest))
            self._forget(results)  # last: lines of what nobody waits for are set aside
            self._reporter.note(
                f"{path}: {len(results.answers)} answers, {len(results.failures)} requests wait again{_unread(results)}"
            )
        return count

    def _shrink(self, batch: Batch, results: _Results) -> None:
        """Take what came from a batch that a person carries."""
        over = batch.requests.keys() & (results.answers.keys() | results.failures.keys())
        if not over or batch.state != HANDED:
            return
        left = {digest: asked for digest, asked in batch.requests.items() if digest not in over}
        if not left:
            answers.unclaim(self._dataset, batch.name)
            self._files.drop(batch)
            return
        smaller = self._files.save(batch, requests=left)
        waiting = (self._pending[digest] for digest in left if digest in self._pending)
        lines = (self._files.load(one).line(self._state.length_key) for one in waiting)
        self._files.hand_out(smaller, lines)
        try:
            answers.claim(self._dataset, batch.name, smaller.bound, self._run.instruct.budget)
        except BudgetSpent:  # answers took more than they may: the part stays as large as it was
            self._reporter.note(f"answers of the batch {batch.name} took more tokens than their upper bounds")

    # -- both --

    def _read(self, line: bytes, results: _Results, known: Mapping[str, Asked | None], name: str) -> bool:
        """Take in a line of results. False: it is of no use to anybody."""
        if not line.strip():
            return True
        try:
            record = json.loads(line)
            digest = record["custom_id"]
            response, error = record.get("response"), record.get("error")
            status = response.get("status_code", 200) if isinstance(response, dict) else None
            body = response.get("body") if isinstance(response, dict) else None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            results.bad += 1
            return False
        if not isinstance(digest, str) or digest not in known or digest not in self._pending:
            results.foreign += 1
            return False
        if digest in results.answers:
            return True
        asked, pending = known[digest], self._files.load(self._pending[digest])
        try:
            if error is not None or not isinstance(status, int):
                raise _Silent(self._words(error))
            found: Any = self._completion(pending, status, body)
        except _Silent as silent:
            results.failures[digest] = str(silent)
            return True
        except PairmillError as wrong:  # it concerns every request, or says so
            results.failures[digest] = str(wrong)
            return True
        if isinstance(found, Rejected):
            results.rejected.append(digest)
        bound = self._chat.bound(pending.request)
        if asked is not None:  # as it was claimed
            bound = Bound(asked.prompt_tokens, asked.completion_tokens, asked.cost)
        ticket = Ticket(
            pending.shard,
            pending.uid,
            f"{name}-{digest[:32]}",
            digest,
            pending.purpose,
            self._chat.endpoint.identity or self._chat.endpoint.model,
            utc_now(),
            bound,
        )
        answer = self._chat.answer(ticket, pending.request, found)
        if answer.outcome == answers.LOST:
            results.failures[digest] = answer.detail or "no answer"
        else:
            results.failures.pop(digest, None)
            results.answers[digest] = answer
        return True

    def _completion(self, pending: Pending, status: int, body: Any) -> Any:
        """A completion, or the `Failed` of one that cannot be used."""
        try:
            return self._client.read(pending.request, status, {}, json.dumps(body).encode())
        except Failed as failure:
            if "max_completion_tokens" in failure.detail:
                self._state.length_key = "max_completion_tokens"  # OpenAI's newer name for the same
            return failure

    def _words(self, error: Any) -> str:
        message = error.get("message") or error.get("code") if isinstance(error, dict) else error
        return self._client.clean(str(message or "no answer"))

    def _doubt(self, results: _Results) -> None:
        """Where nothing but rejections came, it is the config that is wrong and no request: nothing is stored of them,
        so that they are sent again when it is mended."""
        if results.rejected and len(results.rejected) == len(results.answers):
            for digest in results.rejected:
                results.failures[digest] = results.answers.pop(digest).detail or "rejected"

    def _store(self, results: _Results, name: str | None) -> int:
        """Put answers into the journal that are not there; how many."""
        by_shard: dict[int, list[Answer]] = defaultdict(list)
        for digest, answer in results.answers.items():
            by_shard[self._pending[digest].shard].append(answer)
        for shard, some in by_shard.items():
            there = answers.lookup(self._dataset, shard, [answer.digest for answer in some])
            by_shard[shard] = [answer for answer in some if answer.digest not in there]
        count = sum(map(len, by_shard.values()))
        if count:
            answers.add(self._dataset, by_shard, name)
        elif name is not None:
            answers.unclaim(self._dataset, name)
        return count

    def _count(self, digest: str, why: str) -> None:
        count, _ = self._state.failures.get(digest, (0, ""))
        self._state.failures[digest] = (count + 1, why[:200])

    def _remember(self, results: _Results) -> None:
        for digest in results.answers:
            self._state.failures.pop(digest, None)
        self._files.remember(self._state)

    def _forget(self, results: _Results) -> None:
        """Answered requests wait no more."""
        for digest in results.answers:
            self._pending.pop(digest, None)
        self._files.keep(self._pending)
        self._pending = self._files.pending()


class _Silent(Exception):
    """The endpoint says that a request of a batch got no answer."""


def _no_probe() -> Any:
    raise AssertionError("nothing is sent")


def _unread(results: _Results) -> str:
    said = f"; {results.bad} lines are not JSON of the protocol" if results.bad else ""
    return said + (f"; {results.foreign} lines are of requests that nobody waits for" if results.foreign else "")


# -- takedowns --------------------------------------------------------------------------------------------------------


def forget(dataset: Dataset, uids: Iterable[str]) -> int:
    """Remove requests of these pairs, and results of them that lie here; how many requests. For the holder of the
    dataset's lock. Answers that come later are not taken. What an endpoint was sent is there until it deletes it.

    Raises:
        StoreError: a file cannot be read or written.
    """
    return BatchFiles(dataset).forget(frozenset(uids))
