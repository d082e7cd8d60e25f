"""A server on a loopback address, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from typing import ClassVar

from aiohttp import web
from typing_extensions import Self

ADDRESS = "127.0.0.1"


class LoopbackServer(ABC):
    """Answers while it is entered, on a port of its own."""

    method: ClassVar[str] = "*"
    """Which requests it takes."""
    cancels: ClassVar[bool] = False
    """Whether an answer under way ends when its client goes."""

    def __init__(self) -> None:
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()

    def __enter__(self) -> Self:
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
        app.router.add_route(self.method, "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=self.cancels)
        await runner.setup()
        site = web.TCPSite(runner, ADDRESS, 0)
        await site.start()
        self.port = runner.addresses[0][1]
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    @abstractmethod
    async def _handle(self, request: web.Request) -> web.StreamResponse:
        """The answer to a request."""
