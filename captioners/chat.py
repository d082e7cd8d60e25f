"""Chat completions that are paid for once: with a journal, a cache and a budget (`pairmill.answers`)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import time
from dataclasses import dataclass, replace
from typing import Any

from captioners.completions import (
    CHARS_A_TOKEN,
    ChatClient,
    ChatRequest,
    Completion,
    Endpoint,
    Failed,
    Pace,
    Probe,
    Reasons,
    Rejected,
    api_key,
    chat_text,
    check_base_url,
    gather_all,
    one_line,
)
from pairmill.answers import (
    ANSWERED,
    CUT_OFF,
    EMPTY,
    LOST,
    MALFORMED,
    REFUSED,
    Answer,
    Bound,
    BudgetSpent,
    Journal,
    Ticket,
)
from pairmill.errors import ConfigError, StageFailed
from pairmill.stage import WORKERS_ENV
from schemas.config import Budget, InstructWriter, Price
from schemas.reasons import DEFERRED, Reason

__all__ = [
    "ChatAnswer",
    "ChatRequest",
    "NoAnswer",
    "PaidChat",
    "chat_text",
    "gather_all",
    "model_identity",
    "one_line",
    "told",
]

SECTION = "instruct.writer"

WRITER_REASONS = Reasons(
    Reason.WRITER_RATE_LIMITED,
    Reason.WRITER_SERVER_ERROR,
    Reason.WRITER_TIMEOUT,
    Reason.WRITER_CONNECTION,
    Reason.WRITER_REFUSED,
    Reason.WRITER_MALFORMED,
    Reason.WRITER_CUT_OFF,
    Reason.WRITER_EMPTY,
)


@dataclass(frozen=True)
class ChatAnswer:
    """What a model answered."""

    text: str | None
    """Clean lines of text (`chat_text`)."""
    finish: str | None
    refusal: str | None
    prompt_tokens: int
    completion_tokens: int
    cost: float
    """In the currency of ``instruct.price``."""
    cached: bool
    """It was paid for before."""


class NoAnswer(Exception):
    """A request without an answer that can be used. With a reason of `schemas.reasons.DEFERRED` a later run may get
    one; else the same request has the same outcome for ever, and was paid for."""

    def __init__(
        self, reason: Reason, detail: str, prompt_tokens: int = 0, completion_tokens: int = 0, cost: float = 0.0
    ) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = completion_tokens
        self.cost = cost


def model_identity(writer: InstructWriter) -> str:
    """What a digest knows of a model: its name and revision there; not where it is."""
    return writer.name or "" if writer.revision is None else f"{writer.name}@{writer.revision}"


class PaidChat:
    """Chat completions that are paid for once, within a budget: one of a worker, entered (``async with``) for each
    batch of requests.

    What it is made from can be pickled; nothing is opened before it is entered, and the API key is read from the
    environment then (a `ConfigError` where it is missing or cannot be sent safely). Every request that may be charged
    is written down before it is sent, and its answer before it is returned (`pairmill.answers`). Limits a minute are
    those of the whole run: each of its processes (``PAIRMILL_WORKERS``) keeps to its part.
    """

    def __init__(self, dataset: str, endpoint: Endpoint, price: Price, budget: Budget) -> None:
        self.dataset = dataset
        self.endpoint = endpoint
        self.price = price
        self.budget = budget
        self._live: _Live | None = None

    @classmethod
    def of(cls, dataset: str, writer: InstructWriter, price: Price, budget: Budget) -> PaidChat:
        """As a config says.

        Raises:
            ConfigError: no or a wrong base_url, no name, or a budget of money without a price.
        """
        if writer.base_url is None:
            raise ConfigError(f"{SECTION}.base_url is not set; give the endpoint, such as http://127.0.0.1:8000/v1")
        if writer.name is None:
            raise ConfigError(f"{SECTION}.name is not set; an endpoint knows its models by name")
        if budget.money is not None and not (price.prompt or price.completion):
            raise ConfigError(
                "instruct.budget.money is set, but nothing has a price; say in instruct.price what tokens cost, or "
                "limit instruct.budget.tokens"
            )
        endpoint = Endpoint(
            SECTION,
            check_base_url(writer.base_url, SECTION),
            writer.name,
            writer.api_key_env,
            writer.concurrency,
            writer.timeout_s,
            writer.retries,
            writer.max_retry_wait_s,
            writer.requests_per_minute,
            writer.tokens_per_minute,
            model_identity(writer),
        )
        return cls(dataset, endpoint, price, budget)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_live": None}

    def check_key(self) -> str | None:
        """The API key of this process's environment; None for a private server without one.

        Raises:
            ConfigError: there is none although the host is on the public internet, or it cannot be sent safely.
        """
        return api_key(self.endpoint.base_url, self.endpoint.api_key_env, SECTION)

    def bound(self, request: ChatRequest) -> Bound:
        """What a request may take at most. A token of a byte-level tokenizer has one byte at least, so there are no
        more of them than bytes, and those of the chat template."""
        prompt = _TEMPLATE_TOKENS
        for message in request.messages:
            content = message.get("content")
            text = content if isinstance(content, str) else json.dumps(content)
            prompt += _MESSAGE_TOKENS + len(text.encode("utf-8", "surrogatepass"))
        return Bound(prompt, request.max_tokens, self.cost(prompt, request.max_tokens))

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What tokens cost, in the currency of the price."""
        return (prompt_tokens * self.price.prompt + completion_tokens * self.price.completion) / 1e6

    async def __aenter__(self) -> PaidChat:
        live = self._live or _Live(self)
        endpoint = self.endpoint
        journal = Journal(self.dataset, self.budget, 2 * endpoint.timeout_s + endpoint.max_retry_wait_s)
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(live.client)
            live.journal = await stack.enter_async_context(journal)
            live.begin()
            live.ending = stack.pop_all()
        self._live = live
        return self

    async def __aexit__(self, *exc: Any) -> None:
        assert self._live is not None
        await self._live.ending.__aexit__(*exc)

    async def ask(self, uid: str, shard: int, purpose: str, request: ChatRequest) -> ChatAnswer:
        """The answer to a request: the one that was paid for before, or a new one.

        Args:
            uid: The pair that it is about.
            shard: The pair's shard.
            purpose: What it is for, in the usage ledger: the kind of instruction.
            request: What to ask.

        Raises:
            NoAnswer: there is none, or none that can be used.
            ConfigError: the key, the name or the config is wrong.
            StageFailed: the account is empty.
            StoreError: the journal cannot be written.
        """
        live = self._live
        assert live is not None, "enter it first"
        digest = self.endpoint.digest(request)
        while True:
            if (known := await live.journal.find(shard, digest)) is not None:
                return told(known, cached=True)
            asking = live.asking.get((shard, digest))
            if asking is None:
                break
            await asyncio.wait([asking])  # another asks the same: its answer is in the journal then
            if not asking.cancelled() and (failure := asking.result()) is not None:
                raise NoAnswer(failure.reason, failure.detail)
        asking = live.asking[shard, digest] = asyncio.get_running_loop().create_future()
        try:
            answer = await live.pay(uid, shard, purpose, digest, request)
        except Failed as failure:
            if failure.reason in DEFERRED or (known := await live.journal.find(shard, digest)) is None:
                asking.set_result(failure)
                raise NoAnswer(failure.reason, failure.detail) from None
            answer = known
        finally:
            if not asking.done():
                asking.set_result(None)
            del live.asking[shard, digest]
        return told(answer, cached=False)

    def answer(
        self, ticket: Ticket, request: ChatRequest, found: Completion | Failed, seconds: float | None = None
    ) -> Answer:
        """What is written down of an answer, usable or not. Where the endpoint does not say how many tokens it took, or
        less than can be true, the upper bound counts."""
        failure = found if isinstance(found, Failed) else None
        read = found.completion if isinstance(found, Failed) else found
        text = read.text if read else ""
        prompt, completion = ticket.bound.prompt_tokens, ticket.bound.completion_tokens
        estimated = True
        if failure is not None and not failure.charged:
            prompt, completion, estimated = 0, 0, False
        elif read is not None and read.prompt_tokens is not None and read.completion_tokens is not None:
            asked = sum(len(m["content"]) for m in request.messages if isinstance(m.get("content"), str))
            least = (math.ceil(asked / CHARS_A_TOKEN), math.ceil(len(text) / CHARS_A_TOKEN))
            if read.prompt_tokens >= least[0] and read.completion_tokens >= least[1]:
                prompt, completion, estimated = read.prompt_tokens, read.completion_tokens, False
        return Answer(
            uid=ticket.uid,
            request=ticket.request,
            digest=ticket.digest,
            purpose=ticket.purpose,
            model=ticket.model,
            at=ticket.at,
            outcome=ANSWERED if failure is None else _OUTCOMES.get(failure.reason, LOST),
            text=text or None,
            finish=read.finish if read else None,
            detail=failure.detail if failure else None,
            prompt_tokens=prompt,
            completion_tokens=completion,
            estimated=estimated,
            cost=self.cost(prompt, completion),
            seconds=None if seconds is None else round(seconds, 3),
        )


def told(answer: Answer, *, cached: bool) -> ChatAnswer:
    """A stored answer as one who asks gets it.

    Raises:
        NoAnswer: it cannot be used.
    """
    if answer.outcome != ANSWERED:
        reason = _REASONS_OF.get(answer.outcome, Reason.WRITER_CONNECTION)
        raise NoAnswer(reason, answer.detail or "", answer.prompt_tokens, answer.completion_tokens, answer.cost)
    return ChatAnswer(
        answer.text, answer.finish, None, answer.prompt_tokens, answer.completion_tokens, answer.cost, cached
    )


_OUTCOMES = {
    WRITER_REASONS.refused: REFUSED,
    WRITER_REASONS.malformed: MALFORMED,
    WRITER_REASONS.cut_off: CUT_OFF,
    WRITER_REASONS.empty: EMPTY,
}
_REASONS_OF = {outcome: reason for reason, outcome in _OUTCOMES.items()}
_TEMPLATE_TOKENS = 64
"""What a chat template may add of itself: Qwen's system message, Llama's date."""
_MESSAGE_TOKENS = 16
"""And to each message: role and delimiters."""

_PROBE = Probe(
    lambda: ChatRequest(({"role": "user", "content": "Say OK."},), 16, 0.0, 1.0, 0),
    "a plain question",
    " and instruct.writer",
)


class _Live:
    """What a `PaidChat` has that cannot be pickled."""

    journal: Journal
    asking: dict[tuple[int, str], asyncio.Future[Failed | None]]
    """Requests under way; what failed, when they are done."""
    ending: contextlib.AsyncExitStack

    def __init__(self, chat: PaidChat) -> None:
        workers = int(os.environ.get(WORKERS_ENV, "1"))
        endpoint = replace(chat.endpoint, concurrency=math.ceil(chat.endpoint.concurrency / workers))
        self._chat = chat
        self.client = ChatClient(endpoint, chat.check_key(), WRITER_REASONS, _PROBE, tidy=chat_text)
        self._requests = Pace(endpoint.requests_per_minute and endpoint.requests_per_minute / workers)
        self._stopped: ConfigError | StageFailed | None = None
        """What concerns every request, so that no further one is sent."""
        self._tokens = Pace(endpoint.tokens_per_minute and endpoint.tokens_per_minute / workers)

    def begin(self) -> None:
        """With a batch of requests."""
        self.asking = {}
        self._stopped = None

    async def pay(self, uid: str, shard: int, purpose: str, digest: str, request: ChatRequest) -> Answer:
        """A new answer that can be used.

        Raises:
            Failed: there is none.
        """
        paid: list[Answer] = []

        async def send(asked: ChatRequest) -> Completion:
            if asked is request:
                return await self._send(uid, shard, purpose, digest, asked, paid)
            return await self._send(uid, shard, "probe", self._chat.endpoint.digest(asked), asked, [])

        try:
            await self.client.ask(lambda _: request, digest, anew=False, send=send)
        except (ConfigError, StageFailed) as error:
            self._stopped = error
            raise
        return paid[-1]

    async def _send(
        self, uid: str, shard: int, purpose: str, digest: str, request: ChatRequest, paid: list[Answer]
    ) -> Completion:
        """One request, with all that is due before and after."""
        if self._stopped is not None:
            raise type(self._stopped)(str(self._stopped))
        bound = self._chat.bound(request)
        took, paced = 0, False

        async def pace() -> None:
            nonlocal paced
            paced = True
            await self._requests.wait()
            await self._tokens.wait(bound.tokens)

        try:
            try:
                model = self._chat.endpoint.identity or self._chat.endpoint.model
                ticket = await self.journal.ask(shard, uid, digest, purpose, model, bound, pace)
            except BudgetSpent as spent:
                raise Failed(Reason.WRITER_BUDGET, str(spent), wait_s=float("inf")) from None
            begin = time.monotonic()
            try:
                read = await self.client.send(request, digest)
            except Failed as failure:
                if failure.charged or (failure.reason is Reason.WRITER_REFUSED and not isinstance(failure, Rejected)):
                    answer = self._chat.answer(ticket, request, failure, time.monotonic() - begin)
                    took = answer.tokens
                    await self.journal.answered(ticket, answer)
                else:
                    await self.journal.free(ticket)
                raise
            except (ConfigError, StageFailed):
                await self.journal.free(ticket)
                raise
            except BaseException:
                self.journal.abandon(ticket)
                raise
            answer = self._chat.answer(ticket, request, read, time.monotonic() - begin)
            took = answer.tokens
            await self.journal.answered(ticket, answer)
            paid.append(answer)
            return read
        finally:
            if paced:
                self._tokens.give_back(bound.tokens - took)
