"""The Batch-file API of OpenAI's protocol: files of requests up, files of results down.

``POST /files`` and ``POST /batches`` have effects, so they are sent once: when no answer comes, nobody knows whether
they had. Who sends them again looks first (`BatchApi.find_file`, `BatchApi.find_batch`). Reading is tried again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote

from captioners.completions import BACKOFF_S, one_line
from pairmill.errors import ConfigError, StageFailed
from pairmill.sources.fetch import retry_after
from schemas.config import InstructWriter

if TYPE_CHECKING:
    import aiohttp

WINDOW = "24h"
MARK = "pairmill"
"""The key of a batch's metadata that holds our name of it."""
LIVE = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
OVER = frozenset({"completed", "failed", "expired", "cancelled"})

MAX_LINE = 2**22
_MAX_BODY = 2**22
_MAX_PAGES = 200
_TRANSFER_S = 3600.0
"""Total deadline of a file's upload or download; ``timeout_s`` holds for each silence in it."""


class Unanswered(Exception):
    """The endpoint gave no answer, or says that it cannot now; another time it may."""


class Unknown(Exception):
    """The endpoint knows nothing of this name."""


@dataclass(frozen=True)
class RemoteBatch:
    """A batch as the endpoint tells it."""

    id: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    errors: str
    """Why the batch as a whole failed; empty where it did not."""


class BatchApi:
    """An endpoint's files and batches; entered (``async with``) in one event loop."""

    def __init__(self, base_url: str, key: str | None, writer: InstructWriter) -> None:
        self._base_url = base_url
        self._key = key
        self._writer = writer

    async def __aenter__(self) -> BatchApi:
        import aiohttp

        headers = {"Accept-Encoding": "identity", "User-Agent": "pairmill"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._session = aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            headers=headers,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    # -- what has effects --

    async def upload(self, name: str, file: IO[bytes]) -> str:
        """Upload a file of requests; its id."""
        import aiohttp

        form = aiohttp.FormData()
        form.add_field("purpose", "batch")
        form.add_field("file", file, filename=name, content_type="application/jsonl")
        return _id(await self._call("POST", "files", transfer=True, data=form))

    async def create(self, file_id: str, endpoint: str, name: str) -> str:
        """Create the batch of an uploaded file; its id."""
        asked = {
            "input_file_id": file_id,
            "endpoint": endpoint,
            "completion_window": WINDOW,
            "metadata": {MARK: name},
        }
        return _id(await self._call("POST", "batches", json=asked))

    # -- what only reads --

    async def find_file(self, name: str) -> str | None:
        """The id of an uploaded file of this name; None where there is none, or where files are not listed."""
        try:
            async for entry in self._pages("files", purpose="batch"):
                if entry.get("filename") == name:
                    return _id(entry)
        except Unknown:
            return None
        return None

    async def find_batch(self, file_id: str, name: str) -> str | None:
        """The id of a batch of this file; None where there is none.

        Raises:
            Unknown: batches are not listed.
        """
        async for entry in self._pages("batches"):
            marks = entry.get("metadata")
            marked = isinstance(marks, dict) and marks.get(MARK) == name
            if marked or entry.get("input_file_id") == file_id:
                return _id(entry)
        return None

    async def batch(self, batch_id: str) -> RemoteBatch:
        """How a batch stands.

        Raises:
            Unknown: there is no such batch.
        """
        told = await self._again("GET", f"batches/{quote(batch_id, safe='')}")
        status = told.get("status")
        if not isinstance(status, str) or status not in LIVE | OVER:
            raise Unanswered(f"a batch with the status {self._said(status)!r}, which is not of the protocol")
        errors = told.get("errors")
        data = errors.get("data") if isinstance(errors, dict) else None
        words = [e.get("message") for e in data if isinstance(e, dict)] if isinstance(data, list) else []
        return RemoteBatch(
            batch_id,
            status,
            _name(told.get("output_file_id")),
            _name(told.get("error_file_id")),
            self._said("; ".join(str(word) for word in words[:3] if word)),
        )

    async def lines(self, file_id: str) -> AsyncIterator[bytes]:
        """The lines of a file of results; one that is longer than `MAX_LINE` comes as its beginning.

        Raises:
            Unknown: there is no such file.
        """
        path = f"files/{quote(file_id, safe='')}/content"
        rest, skipping = b"", False
        try:
            async with self._open("GET", path, transfer=True) as response:
                if response.status != 200:
                    self._refuse(response.status, response.headers, await _body(response))
                async for chunk in response.content.iter_chunked(2**16):
                    *whole, rest = (rest + chunk).split(b"\n")
                    for line in whole:
                        if not skipping:
                            yield line
                        skipping = False
                    if len(rest) > MAX_LINE:
                        if not skipping:
                            yield rest[:MAX_LINE]
                        rest, skipping = b"", True
        except _silences() as error:
            raise Unanswered(self._said(f"{type(error).__name__}: {error}")) from None
        if rest and not skipping:
            yield rest

    async def _pages(self, path: str, **parameters: str) -> AsyncIterator[dict[str, Any]]:
        after: str | None = None
        for _ in range(_MAX_PAGES):
            more = {"after": after} if after else {}
            told = await self._again("GET", path, params={"limit": "100", **parameters, **more})
            entries = told.get("data")
            entries = [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []
            for entry in entries:
                yield entry
            last = _name(entries[-1].get("id")) if entries else None
            if not told.get("has_more") or last is None or last == after:
                return
            after = last

    # -- requests --

    async def _again(self, method: str, path: str, **how: Any) -> dict[str, Any]:
        """A request without effects, tried again after a pause when there is no answer."""
        pause = BACKOFF_S
        for _ in range(self._writer.retries):
            try:
                return await self._call(method, path, **how)
            except Unanswered as failure:
                asked = failure.args[1] if len(failure.args) > 1 else None
                wait = pause if asked is None else asked
                if wait > self._writer.max_retry_wait_s:
                    raise
            await asyncio.sleep(wait)
            pause *= 2
        return await self._call(method, path, **how)

    async def _call(self, method: str, path: str, *, transfer: bool = False, **how: Any) -> dict[str, Any]:
        """One request; the JSON object of its answer.

        Raises:
            Unanswered: there is none; the second argument is how long the endpoint asks to wait, or None.
            Unknown: 404.
            ConfigError: the key or the place is wrong.
            StageFailed: the account is empty.
        """
        try:
            async with self._open(method, path, transfer=transfer, **how) as response:
                body = await _body(response)
                if response.status not in (200, 201):
                    self._refuse(response.status, response.headers, body)
        except _silences() as error:
            raise Unanswered(self._said(f"{type(error).__name__}: {error}"), None) from None
        try:
            told = json.loads(body)
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            raise Unanswered(f"an answer to {method} /{path.partition('/')[0]} that is no JSON object", None)
        return told

    def _open(self, method: str, path: str, *, transfer: bool, **how: Any) -> Any:
        import aiohttp

        deadline = self._writer.timeout_s
        timeout = aiohttp.ClientTimeout(total=_TRANSFER_S if transfer else deadline, sock_read=deadline)
        return self._session.request(method, f"{self._base_url}/{path}", allow_redirects=False, timeout=timeout, **how)

    def _refuse(self, status: int, headers: Any, body: bytes) -> None:
        """Raise what an answer with this status means."""
        try:
            error = json.loads(body).get("error")
            said = error.get("message") if isinstance(error, dict) else error
        except (ValueError, RecursionError, AttributeError):
            said = None
        detail = f"HTTP {status}" + (f": {self._said(said)}" if isinstance(said, str) and said else "")
        where = f"instruct.writer: the endpoint {self._base_url} answers {detail}"
        if status == 404:
            raise Unknown(detail)
        if status in (401, 403):
            state = "holds the key it does not take" if self._key else "is not set"
            raise ConfigError(
                f"{where}; the environment variable {self._writer.api_key_env} {state}, set it and run again"
            )
        if status == 402:
            raise StageFailed(f"{where}; add credit or raise the quota, then run again: what is finished is kept")
        if status in (408, 409, 425, 429) or status >= 500:
            after = headers.get("Retry-After")
            raise Unanswered(detail, retry_after(after) if after else None)
        raise ConfigError(
            f"{where}; check that it has the Batch API, instruct.writer.base_url (up to and with /v1) and the name "
            f"{self._writer.name!r}"
        )

    def _said(self, words: object) -> str:
        """Words of the endpoint for a message: one line, short, without the key."""
        line = one_line(str(words))
        if self._key:
            line = line.replace(self._key, "[key]")
        return line[:250]


def _silences() -> tuple[type[Exception], ...]:
    import aiohttp

    return (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError, AttributeError, AssertionError)


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """The body, capped while it streams in."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > _MAX_BODY:
            response.close()
            break
    return bytes(body)


def _name(value: object) -> str | None:
    return value if isinstance(value, str) and value and len(value) <= 256 else None


def _id(told: dict[str, Any]) -> str:
    if (found := _name(told.get("id"))) is None:
        raise Unanswered("an answer without an id", None)
    return found
