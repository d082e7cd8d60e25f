"""An OpenAI-compatible endpoint on a loopback address that answers as a test tells it to, or breaks in every way."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from tests.hostile.loopback import LoopbackServer

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Asked:
    """One request as it came in."""

    at: float
    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]

    @property
    def image(self) -> bytes:
        """The bytes of the picture in it."""
        (part,) = [p for p in self.body["messages"][-1]["content"] if p["type"] == "image_url"]
        kind, data = part["image_url"]["url"].split(";base64,")
        assert kind == "data:image/jpeg"
        return base64.b64decode(data)


class EndpointServer(LoopbackServer):
    """Answers each POST with what `choose` says of it. Keeps all requests, and how many were open at a time."""

    method = "POST"
    cancels = True

    def __init__(self, choose: Callable[[Asked], Answer]) -> None:
        super().__init__()
        self.choose = choose
        self.requests: list[Asked] = []
        self.peak = 0
        self._open = 0

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self._open += 1
        self.peak = max(self.peak, self._open)
        try:
            asked = Asked(time.monotonic(), request.path, dict(request.headers), await request.json())
            self.requests.append(asked)
            return await self.choose(asked)(request)
        finally:
            self._open -= 1


def completion(text: Any, finish: str | None = "stop", **message: Any) -> dict[str, Any]:
    """The body of a good answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion", "choices": [choice], "usage": {"completion_tokens": 7}}


def says(body: Any, status: int = 200, **headers: str) -> Answer:
    """Answer with this body: JSON, or bytes as they are."""

    async def answer(_: web.Request) -> web.StreamResponse:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(status=status, body=data, headers={"Content-Type": "application/json", **named})

    return answer


def good(text: str, after_s: float = 0.0) -> Answer:
    """A caption, perhaps after a while."""

    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(after_s)
        return await says(completion(text))(request)

    return answer


def error(status: int, message: str = "no", code: str | None = None, **headers: str) -> Answer:
    """An error as OpenAI words it."""
    return says({"error": {"message": message, "type": "error", "code": code}}, status, **headers)


def silent() -> Answer:
    """Never answer."""

    async def answer(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(3600)
        raise AssertionError

    return answer


def trickle(data: bytes, every_s: float) -> Answer:
    """Good headers at once, the body byte by byte."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        for at in range(len(data)):
            await response.write(data[at : at + 1])
            await asyncio.sleep(every_s)
        return response

    return answer


def endless(chunk: bytes) -> Answer:
    """Never stop sending."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        while True:
            await response.write(chunk)

    return answer


def reset(part: bytes = b"") -> Answer:
    """Break the connection off, perhaps amid an answer."""

    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        if part:
            request.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + part)
            await asyncio.sleep(0.02)
        request.transport.abort()
        return web.Response()

    return answer


def raw(data: bytes) -> Answer:
    """Bytes that need not be HTTP, then the end."""

    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(data)
        request.transport.close()
        return web.Response()

    return answer


class InTurn:
    """Another answer at each request for the same picture, the last one for ever; other pictures get a good one."""

    def __init__(self, answers: Mapping[bytes, list[Answer]]) -> None:
        self._answers = answers
        self.count: dict[bytes, int] = defaultdict(int)

    def __call__(self, asked: Asked) -> Answer:
        answers = self._answers.get(asked.image, [good("A plain picture.")])
        self.count[asked.image] += 1
        return answers[min(self.count[asked.image], len(answers)) - 1]


class Meter:
    """An endpoint that bills. Each request that it begins to answer is billed, by a count of its own, whether or not
    the answer arrives; answers that were sent to their end are counted. Both by the request's Idempotency-Key.

    Args:
        fault: What a request gets in place of a good answer, by its key and how often it came before.
        delay_s: How long an answer takes.
        usage: What is said of the usage, given what is so.
        remembers: Answers that were billed are given again for nothing, as the key asks for.
        hold: No answer is given before so many requests waited for one at the same time.
    """

    def __init__(
        self,
        fault: Callable[[str, int], Answer | None] = lambda _key, _times: None,
        *,
        delay_s: Callable[[str], float] = lambda _: 0.0,
        usage: Callable[[dict[str, int]], Any] = lambda usage: usage,
        remembers: bool = False,
        hold: int = 0,
    ) -> None:
        self._fault = fault
        self._delay_s = delay_s
        self._usage = usage
        self._remembers = remembers
        self._hold = hold
        self._waiting = 0
        self._lock = threading.Lock()
        self.came: Counter[str] = Counter()
        self.billed: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()
        self.tokens = 0

    def __call__(self, asked: Asked) -> Answer:
        key = asked.headers["Idempotency-Key"]
        with self._lock:
            times = self.came[key]
            self.came[key] += 1
        return self._fault(key, times) or self.good(asked)

    def good(self, asked: Asked, text: str | None = None, finish: str = "stop") -> Answer:
        """A billed answer: `text`, or what the last message says, told again."""
        key = asked.headers["Idempotency-Key"]
        words = str(asked.body["messages"][-1]["content"]).split() if text is None else text.split()
        said = words[: asked.body["max_tokens"]]
        usage = {
            "prompt_tokens": sum(7 + len(m["content"].encode()) // 3 for m in asked.body["messages"]),
            "completion_tokens": len(said),
        }

        async def answer(request: web.Request) -> web.StreamResponse:
            with self._lock:
                if not (self._remembers and self.billed[key]):
                    self.billed[key] += 1
                    self.tokens += sum(usage.values())
            self._waiting += 1
            while self._waiting < self._hold:  # noqa: ASYNC110 (events belong to one loop)
                await asyncio.sleep(0.01)
            self._hold = 0
            self._waiting -= 1
            await asyncio.sleep(self._delay_s(key))
            body = {**completion(" ".join(said), finish), "usage": self._usage(usage)}
            data = json.dumps(body).encode()
            response = web.StreamResponse(
                headers={"Content-Type": "application/json", "Content-Length": str(len(data))}
            )
            await response.prepare(request)
            await response.write(data)
            await response.write_eof()
            with self._lock:
                self.delivered[key] += 1
            return response

        return answer
