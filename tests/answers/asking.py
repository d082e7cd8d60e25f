"""Asking a metered endpoint, in this process or in one that is killed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from captioners.chat import ChatAnswer, ChatRequest, NoAnswer, PaidChat, gather_all
from pairmill.answers import fold
from pairmill.store import Dataset
from schemas.config import Budget, InstructWriter, Price

PRICE = Price(prompt=2.0, completion=8.0)


def chat_of(
    dataset: str, base_url: str, tokens: int | None = None, money: float | None = None, **knobs: Any
) -> PaidChat:
    """Who asks; short pauses, two further attempts."""
    settings = {"retries": 2, "max_retry_wait_s": 2, "timeout_s": 10, "max_tokens": 50, **knobs}
    writer = InstructWriter(kind="endpoint", name="some/model", base_url=base_url, **settings)
    return PaidChat.of(dataset, writer, PRICE, Budget(tokens=tokens, money=money))


def request(number: int) -> ChatRequest:
    """A question of its own."""
    messages = (
        {"role": "system", "content": "Say it again."},
        {"role": "user", "content": f"Picture number {number}."},
    )
    return ChatRequest(messages, 50, 0.7, 0.95, number)


def uid_of(number: int) -> str:
    """The pair that question is about."""
    return f"{number:064x}"


def ask(chat: PaidChat, numbers: Sequence[int], shards: int = 2) -> list[ChatAnswer | NoAnswer]:
    """The outcomes of questions asked at once."""

    async def one(number: int) -> ChatAnswer | NoAnswer:
        try:
            return await chat.ask(uid_of(number), number % shards, "detail", request(number))
        except NoAnswer as failure:
            return failure

    async def all_of_them() -> list[ChatAnswer | NoAnswer]:
        async with chat:
            return await gather_all([one(number) for number in numbers])

    return asyncio.run(all_of_them())


def folded(dataset: str) -> int:
    """`fold` by who may."""
    opened = Dataset(dataset)
    with opened.lock():
        return fold(opened, alone=True)


def ask_some(dataset: str, _: list[str], *, numbers: list[int], batch: int, base_url: str, **knobs: Any) -> None:
    """As a worker does: one batch after the other. (A verb of `tests.faults.zygote`.)"""
    chat = chat_of(dataset, base_url, **knobs)
    for start in range(0, len(numbers), batch):
        ask(chat, numbers[start : start + batch])


def fold_all(dataset: str, _: list[str]) -> None:
    """`folded`, as a verb of `tests.faults.zygote`."""
    folded(dataset)
