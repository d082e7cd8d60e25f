"""An OpenAI-compatible endpoint on a loopback address that answers as a test tells it to, or breaks in every way."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

ADDRESS = "127.0.0.1"

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


class EndpointServer:
    """Answers each POST with what `choose` says of it. Keeps all requests, and how many were open at a time."""

    def __init__(self, choose: Callable[[Asked], Answer]) -> None:
        self.choose = choose
        self.requests: list[Asked] = []
        self.peak = 0
        self._open = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()
        self.port = 0

    def __enter__(self) -> EndpointServer:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    @property
    def base_url(self) -> str:
        return f"http://{ADDRESS}:{self.port}/v1"

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, ADDRESS, 0)
        await site.start()
        self.port = runner.addresses[0][1]
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

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
