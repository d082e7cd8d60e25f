"""A hostile web server on loopback addresses: raw sockets, so that it can break every rule of HTTP."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping

ADDRESSES = ("127.0.0.1", "127.0.0.2", "127.0.0.3")

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


def whole(
    body: bytes, headers: Mapping[str, str] | None = None, status: str = "200 OK", length: str | None = None
) -> bytes:
    """An answer as bytes; `length` forges the Content-Length."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join(lines).encode("utf-8") + b"\r\n\r\n" + body


class HostileServer:
    """Serves `answers` by path (without the query) on all `ADDRESSES`, at one port. Counts requests in `hits`."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes | Answer] = {}
        self.hits: dict[str, int] = defaultdict(int)
        self.seen: list[tuple[float, str]] = []
        self.requests: dict[str, str] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()
        self.port = 0

    def __enter__(self) -> HostileServer:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def url(self, path: str, address: str = ADDRESSES[0]) -> str:
        return f"http://{address}:{self.port}{path}"

    def add(self, path: str, answer: bytes | Answer) -> str:
        """Serve `answer` at `path`; its URL."""
        self.answers[path] = answer
        return self.url(path)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        sockets = []
        for address in ADDRESSES:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, self.port))
            self.port = listener.getsockname()[1]
            sockets.append(listener)
        servers = [await asyncio.start_server(self._handle, sock=listener, backlog=512) for listener in sockets]
        self._ready.set()
        await self._stop.wait()
        for server in servers:
            server.close()
        handlers = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in handlers:
            task.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            start = await reader.readexactly(1)
            if start == b"\x16":  # a TLS handshake
                writer.write(whole(b"no TLS here", status="400 Bad Request"))
                return
            request = start + await reader.readuntil(b"\r\n\r\n")
            target = request.split(b" ", 2)[1].decode("latin-1")
            path = target.split("?")[0]
            self.hits[path] += 1
            self.seen.append((time.monotonic(), path))
            self.requests[path] = request.decode("latin-1")
            answer = self.answers.get(path, whole(b"", status="404 Not Found"))
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


def trickle(data: bytes, every_s: float, first: int = 0) -> Answer:
    """Send `first` bytes at once and the rest byte by byte."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(data[:first])
        for at in range(first, len(data)):
            writer.write(data[at : at + 1])
            await writer.drain()
            await asyncio.sleep(every_s)

    return answer


def silent(seconds: float) -> Answer:
    """Say nothing for a while, then hang up."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds)

    return answer


def endless(head: bytes, chunk: bytes) -> Answer:
    """Never stop sending."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(chunk)
            await writer.drain()

    return answer


def in_turn(*answers: bytes) -> Answer:
    """Another answer at each request; the last one for ever."""
    left = list(answers)

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(left.pop(0) if len(left) > 1 else left[0])
        await writer.drain()

    return answer
