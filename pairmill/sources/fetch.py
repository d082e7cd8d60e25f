"""Fetch one URL from the open web: deadlines, caps, redirects and addresses checked, opt-outs honoured."""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import ipaddress
import re
import socket
import ssl
import time
import zlib
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from pairmill import imaging
from pairmill.sources import addresses
from pairmill.sources.addresses import Address, AddressRefused
from schemas.reasons import DEFERRED, Reason, with_retry_after

if TYPE_CHECKING:
    import aiohttp

_BACKOFF_S = 0.5
_MAX_WAIT_S = 10.0
"""The longest wait before another attempt within one run; a server that asks for more is tried by a later refresh."""
_LARGE = 2 * 2**20
_LARGE_BUDGET = 512 * 2**20
"""Bodies above `_LARGE` bytes may hold this many bytes together, so that 256 connections cannot fill the memory."""
_KEEP_ALIVE_S = 3.0
_DNS_THREADS = 32
_GIVE_UP = 16
"""Attempts in a row that a host may leave unanswered before the rest of its URLs in the batch are deferred untried: a
thousand URLs of a dead host would else hold a shard for an hour."""
_HEAD = 1024
_MAX_HEADER = 500
"""Characters kept of an ETag or Last-Modified."""
_MAX_ASKED_WAIT_S = 10**8

Result = TypeVar("Result")


@dataclass(frozen=True)
class Policy:
    """How to fetch; the meaning of each is in `schemas.config.Download`."""

    concurrency: int
    per_host: int
    timeout_s: float
    retries: int
    max_bytes: int
    max_redirects: int
    robots: bool
    allow_private_addresses: bool
    user_agent: str


@dataclass(frozen=True)
class Fetched:
    """What became of a URL. `data` are the image's bytes; None when there is a reason, or when the server says that
    nothing changed since its validators were seen."""

    data: bytes | None = None
    reason: Reason | None = None
    detail: str | None = None
    status: int | None = None
    final_url: str | None = None
    etag: str | None = None
    last_modified: str | None = None
    not_modified: bool = False
    """HTTP 304, as an answer to `Validators`. `etag` and `last_modified` are then those that were sent, which the
    server has just confirmed; one that was not sent is what the server says now."""


@dataclass(frozen=True)
class Validators:
    """What an earlier answer said of itself, so that a server can say that it still holds (RFC 9110, section 13).

    They came from the web: what could be anything but one entity tag, or a date, is not sent.
    """

    etag: str | None = None
    last_modified: str | None = None
    final_url: str | None = None
    """Where redirects ended then (`Fetched.final_url`); None: at the URL itself. They are sent there and nowhere else,
    for they say nothing of any other address."""

    def headers(self) -> dict[str, str]:
        """If-None-Match and If-Modified-Since, as far as there is something to send."""
        found = {}
        if self.etag is not None and len(self.etag) < _MAX_HEADER and _ETAG.fullmatch(self.etag):
            found["If-None-Match"] = self.etag
        if self.last_modified is not None and _DATE.fullmatch(self.last_modified):
            found["If-Modified-Since"] = self.last_modified
        return found


_ETAG = re.compile(r'(?:W/)?"[ !#-~]*"|[!#-)+\-.-~]+')
"""An entity tag of visible ASCII, or one without its quotes, as many servers send them; never ``*`` nor a list, which
would match what was never seen."""
_DATE = re.compile(r"[A-Za-z0-9 ,:+-]{1,64}")
"""Not parsed: servers ignore what is no date, and some compare the words."""


class _Failed(Exception):
    """One attempt failed."""

    def __init__(
        self,
        reason: Reason,
        detail: str,
        status: int | None = None,
        *,
        may_pass: bool | None = None,
        wait_s: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.outcome = Fetched(reason=reason, detail=detail[:300], status=status)
        self.may_pass = reason in DEFERRED if may_pass is None else may_pass
        self.wait_s = wait_s


class Fetcher:
    """Fetches many URLs in one event loop. Use it with ``async with``."""

    def __init__(self, policy: Policy, ssl_context: ssl.SSLContext) -> None:
        self._policy = policy
        self._ssl = ssl_context
        self._slots = asyncio.Semaphore(policy.concurrency)
        self._large = asyncio.Semaphore(max(2, _LARGE_BUDGET // policy.max_bytes))
        self._hosts: dict[str, asyncio.Semaphore] = {}
        self._unanswered: dict[str, int] = {}
        self._names: _Names
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Fetcher:
        import aiohttp

        self._names = _Names(self._policy.allow_private_addresses)
        connector = aiohttp.TCPConnector(
            limit=0,  # the semaphores limit; waiting for the connector would count against the deadline
            ssl=self._ssl,
            resolver=_resolver(self._names),
            use_dns_cache=False,
            keepalive_timeout=_KEEP_ALIVE_S,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            headers={"User-Agent": self._policy.user_agent, "Accept": "image/*", "Accept-Encoding": "identity"},
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()
        self._names.close()

    async def fetch(
        self, url: str, use: Callable[[Fetched], Awaitable[Result]], validators: Validators | None = None
    ) -> Result:
        """Fetch a URL and hand the outcome to `use`. While `use` runs on a body the URL's slot stays taken, so no more
        bodies are in memory than there are slots, however slow the decoding. With `validators`, a server may answer
        that nothing changed."""
        try:
            address = addresses.parse(url, self._policy.allow_private_addresses)
        except AddressRefused as refused:
            return await use(Fetched(reason=refused.reason, detail=refused.detail))
        validators = validators or Validators()
        for attempt in range(self._policy.retries + 1):
            async with AsyncExitStack() as hold:
                try:
                    return await use(await self._attempt(address, validators, hold))
                except _Failed as failure:
                    outcome = failure.outcome
                    wait = failure.wait_s if failure.wait_s is not None else _backoff(address.url, attempt)
                    last = not failure.may_pass or wait > _MAX_WAIT_S or attempt == self._policy.retries
                if last:
                    return await use(outcome)
            await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns")

    async def _attempt(self, start: Address, validators: Validators, hold: AsyncExitStack) -> Fetched:
        """Follow redirects to the image. The deadline covers all hops, but not the waiting for a turn."""
        left = self._policy.timeout_s
        conditions, conditional_at = validators.headers(), validators.final_url or start.url
        seen: list[str] = []
        address = start
        while True:
            seen.append(address.url)
            # the host's turn first: URLs that wait for a slow host must not hold slots that others could use
            async with self._host(address.host), AsyncExitStack() as turn:
                self._check_alive(address.host)
                await turn.enter_async_context(self._slots)
                began = time.monotonic()
                try:
                    step = await self._step(address, conditions if address.url == conditional_at else {}, turn, left)
                except AddressRefused as refused:
                    reason = refused.reason if len(seen) == 1 else Reason.URL_REDIRECT_REFUSED
                    raise _Failed(reason, refused.detail) from refused
                left -= time.monotonic() - began
                if isinstance(step, Fetched):
                    hold.push_async_exit(turn.pop_all())
                    return replace(step, final_url=address.url if len(seen) > 1 else None)
            if step.url in seen or len(seen) > self._policy.max_redirects:
                detail = f"{len(seen)} redirects, the last to {addresses.without_secrets(step.url)}"
                raise _Failed(Reason.HTTP_REDIRECT_LOOP, detail)
            address = step

    async def _step(
        self, address: Address, conditions: dict[str, str], turn: AsyncExitStack, left: float
    ) -> Fetched | Address:
        """One request within the time that is left; keeps count of what the host leaves unanswered."""
        try:
            step = await asyncio.wait_for(self._get(address, conditions, turn), left)
        except asyncio.TimeoutError:
            self._unanswered[address.host] = self._unanswered.get(address.host, 0) + 1
            raise _Failed(Reason.HTTP_TIMEOUT, f"no whole answer within {self._policy.timeout_s:g} s") from None
        except _Failed as failure:
            silent = failure.outcome.reason in (Reason.HTTP_CONNECTION, Reason.HTTP_TIMEOUT)
            self._unanswered[address.host] = self._unanswered.get(address.host, 0) + 1 if silent else 0
            raise
        self._unanswered[address.host] = 0
        return step

    def _check_alive(self, host: str) -> None:
        if (count := self._unanswered.get(host, 0)) >= max(_GIVE_UP, 2 * self._policy.per_host):
            detail = f"{host} left {count} requests in a row unanswered; its other URLs were not tried"
            raise _Failed(Reason.HTTP_TIMEOUT, detail, may_pass=False)

    def _host(self, host: str) -> asyncio.Semaphore:
        if host not in self._hosts:
            self._hosts[host] = asyncio.Semaphore(self._policy.per_host)
        return self._hosts[host]

    async def _get(self, address: Address, conditions: dict[str, str], turn: AsyncExitStack) -> Fetched | Address:
        """One request: the image, the address of a redirect, or that nothing changed."""
        import aiohttp
        from yarl import URL

        try:
            await self._names.resolve(address.host)
            url = URL(address.url, encoded=True)
            async with self._session.get(url, headers=conditions, allow_redirects=False) as response:
                return await self._read(address, conditions, response, turn)
        except aiohttp.ClientPayloadError as error:
            # a false length or broken chunks; may be a broken connection too, so it is tried again, but never deferred
            raise _Failed(Reason.HTTP_PROTOCOL, f"the body ended wrongly: {_words(error)}", may_pass=True) from error
        except (aiohttp.ClientSSLError, ssl.SSLError) as error:
            raise _Failed(Reason.HTTP_TLS, _words(error)) from error
        except (aiohttp.ClientResponseError, aiohttp.InvalidURL) as error:
            raise _Failed(Reason.HTTP_PROTOCOL, f"not HTTP: {_words(error)}") from error
        except socket.gaierror as error:
            again = error.errno == socket.EAI_AGAIN
            raise _Failed(Reason.HTTP_DNS, f"{address.host}: {_words(error)}", may_pass=again) from error
        except (aiohttp.ClientError, OSError) as error:
            raise _Failed(Reason.HTTP_CONNECTION, _words(error)) from error
        except (ValueError, AttributeError, AssertionError) as error:
            # aiohttp on answers that no parser expects
            raise _Failed(Reason.HTTP_PROTOCOL, f"{type(error).__name__}: {_words(error)}") from error

    async def _read(
        self, address: Address, conditions: dict[str, str], response: aiohttp.ClientResponse, turn: AsyncExitStack
    ) -> Fetched | Address:
        status = response.status
        if self._policy.robots and (said := opted_out(response.headers, self._policy.user_agent)):
            raise _Failed(Reason.HTTP_OPT_OUT, said, status)
        if status in (301, 302, 303, 307, 308):
            if not (location := response.headers.get("Location")):
                raise _Failed(Reason.HTTP_PROTOCOL, f"HTTP {status} without a Location", status)
            try:
                return addresses.redirect(address, location, self._policy.allow_private_addresses)
            except AddressRefused as refused:
                raise _Failed(refused.reason, refused.detail, status) from refused
        etag, modified = (_header(response.headers.get(name)) for name in ("ETag", "Last-Modified"))
        if status == 304 and conditions:
            etag = conditions.get("If-None-Match", etag)
            modified = conditions.get("If-Modified-Since", modified)
            return Fetched(status=status, etag=etag, last_modified=modified, not_modified=True)
        if not 200 <= status < 300:
            raise _status_failure(status, response)
        try:
            data = await self._body(response, turn)
        except _Failed as failure:
            raise _Failed(
                failure.outcome.reason or Reason.HTTP_PROTOCOL, str(failure), status, may_pass=False
            ) from None
        return Fetched(data, status=status, etag=etag, last_modified=modified)

    async def _body(self, response: aiohttp.ClientResponse, turn: AsyncExitStack) -> bytes:
        """The image's bytes: capped while they stream in, whatever Content-Length says."""
        cap = self._policy.max_bytes
        declared = response.headers.get("Content-Length", "")
        if declared.isdigit() and int(declared) > cap:
            raise _Failed(
                Reason.HTTP_TOO_LARGE, f"Content-Length says {int(declared)} bytes; at most {cap} are allowed"
            )
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        kind = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
        body = bytearray()
        large = looked = False
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > cap:
                raise _Failed(Reason.HTTP_TOO_LARGE, f"more than {cap} bytes")
            if not looked and len(body) >= _HEAD:
                looked = True
                if encoding == "identity":
                    _check_image(bytes(body[:_HEAD]), kind)  # no need to read on through a long web page
            if not large and len(body) > _LARGE:
                large = True
                await turn.enter_async_context(self._large)
        data = bytes(body)
        if encoding != "identity" and imaging.sniff(data[:32]) is None:
            data = decompress(data, encoding, cap)
        if not data:
            raise _Failed(Reason.HTTP_EMPTY, f"HTTP {response.status} with no bytes")
        _check_image(data[:_HEAD], kind)
        return data


def _backoff(url: str, attempt: int) -> float:
    """0.5 s, doubled each time, plus up to as much again, drawn from the URL so that hosts are not hit in step."""
    spread = hashlib.sha256(url.encode()).digest()[0] / 255
    return _BACKOFF_S * 2**attempt * (1 + spread)


def _words(error: BaseException) -> str:
    return addresses.without_controls(str(error) or type(error).__name__)[:200]


def _header(value: str | None) -> str | None:
    return value.encode("utf-8", "replace").decode()[:_MAX_HEADER] if value else None


def _status_failure(status: int, response: Any) -> _Failed:
    phrase = addresses.without_controls((response.reason or "").encode("ascii", "replace").decode())[:80]
    detail = f"HTTP {status} {phrase}".strip()
    if status in (404, 410):
        return _Failed(Reason.HTTP_NOT_FOUND, detail, status)
    if status in (429, 503):
        reason = Reason.HTTP_TOO_MANY_REQUESTS if status == 429 else Reason.HTTP_SERVER_ERROR
        after = response.headers.get("Retry-After")
        wait = retry_after(after) if after else None
        return _Failed(reason, detail if wait is None else with_retry_after(detail, wait), status, wait_s=wait)
    if status == 408:
        return _Failed(Reason.HTTP_TIMEOUT, detail, status)
    if 400 <= status < 500:
        return _Failed(Reason.HTTP_CLIENT_ERROR, detail, status)
    if status >= 500:
        return _Failed(Reason.HTTP_SERVER_ERROR, detail, status)
    return _Failed(Reason.HTTP_PROTOCOL, f"{detail} is no answer to this request", status)


def retry_after(value: str) -> float | None:
    """Seconds to wait, at most 10^8, from a Retry-After header: a number or an HTTP date; None when it is neither."""
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(min(int(text[:10]), _MAX_ASKED_WAIT_S))
    try:
        wait = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        return min(max(0.0, wait), float(_MAX_ASKED_WAIT_S))
    except (ValueError, TypeError, OverflowError):
        return None


_NO_AI = frozenset({"noai", "noimageai", "noindex", "none", "noimageindex"})


def opted_out(headers: Any, user_agent: str) -> str | None:
    """How the headers forbid the use of the image, or None: ``X-Robots-Tag`` with noai, noimageai, noindex,
    noimageindex or none, for all agents or for this one, or ``tdm-reservation: 1``."""
    if headers.get("tdm-reservation", "").strip() == "1":
        return "tdm-reservation: 1"
    ours = {"*", "pairmill", re.split(r"[/ ]", user_agent.strip(), maxsplit=1)[0].lower()}
    for value in headers.getall("X-Robots-Tag", []):
        agent = "*"
        for part in value.lower().replace(";", ",").split(","):
            name, colon, rest = part.partition(":")
            if colon and name.strip() not in _WITH_VALUES:
                agent, part = name.strip(), rest  # "somebot: noai, noindex": the name holds for what follows
            if part.strip() in _NO_AI and agent in ours:
                return f"X-Robots-Tag: {part.strip()}"
    return None


_WITH_VALUES = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})


def decompress(data: bytes, encoding: str, cap: int) -> bytes:
    """A body without its content encoding, at most `cap` bytes."""
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise _Failed(Reason.HTTP_PROTOCOL, f"the content encoding {encoding[:30]!r} was not asked for")
    windows = (47,) if encoding != "deflate" else (15, -15)  # "deflate" is zlib by the standard, raw by habit
    for window in windows:
        stream = zlib.decompressobj(window)
        try:
            plain = stream.decompress(data, cap + 1)
        except zlib.error:
            continue
        if len(plain) > cap:
            raise _Failed(Reason.HTTP_TOO_LARGE, f"more than {cap} bytes when decompressed")
        return plain
    raise _Failed(Reason.HTTP_PROTOCOL, f"the body is not {encoding}, as its Content-Encoding says")


def not_an_image(head: bytes, content_type: str) -> Fetched | None:
    """The refusal when the first bytes are not those of an allowed format. The Content-Type only names it."""
    if imaging.sniff(head[:32]) is not None:
        return None
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in text:
        return Fetched(reason=Reason.IMAGE_FORMAT, detail="SVG is not allowed")
    if content_type.startswith("image/") and not text.startswith((b"<", b"{")):
        return Fetched(reason=Reason.IMAGE_FORMAT, detail=f"{content_type[:60]}, begins with {head[:8].hex()}")
    return Fetched(reason=Reason.HTTP_NOT_AN_IMAGE, detail=f"not an image; Content-Type: {content_type[:60] or 'none'}")


def _check_image(head: bytes, content_type: str) -> None:
    if (refused := not_an_image(head, content_type)) is not None:
        raise _Failed(refused.reason or Reason.HTTP_NOT_AN_IMAGE, refused.detail or "")


# -- names ------------------------------------------------------------------------------------------------------------


class _Names:
    """Resolves each host once and checks all its addresses; connections go to what was checked (no DNS rebinding)."""

    def __init__(self, allow_private: bool) -> None:
        self._allow_private = allow_private
        self._known: dict[str, asyncio.Task[list[str]]] = {}
        self._threads = ThreadPoolExecutor(_DNS_THREADS, thread_name_prefix="pairmill-dns")

    def close(self) -> None:
        """Let lookups that still run end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def resolve(self, host: str) -> list[str]:
        """The host's IP addresses.

        Raises:
            AddressRefused: one of them is not on the public internet.
            socket.gaierror: there is no such host.
        """
        task = self._known.get(host)
        if task is None or (task.done() and not task.cancelled() and isinstance(task.exception(), socket.gaierror)):
            task = self._known[host] = asyncio.ensure_future(self._look_up(host))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # its waiters may be gone by then
        # shielded: the deadline of one URL must not end the lookup that others wait for
        return await asyncio.shield(task)

    async def _look_up(self, host: str) -> list[str]:
        loop = asyncio.get_running_loop()
        kind = socket.SOCK_STREAM
        found = await loop.run_in_executor(self._threads, lambda: socket.getaddrinfo(host, None, type=kind))
        ips = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not self._allow_private:
            for ip in ips:
                if not addresses.is_public(ipaddress.ip_address(ip)):
                    detail = f"{host} resolves to {ip}, which is not on the public internet"
                    raise AddressRefused(Reason.URL_PRIVATE_ADDRESS, detail)
        return ips


def _resolver(names: _Names) -> Any:
    from aiohttp.abc import AbstractResolver, ResolveResult

    class CheckedResolver(AbstractResolver):
        """Gives aiohttp the addresses that were checked."""

        async def resolve(self, host: str, port: int = 0, family: Any = None) -> list[ResolveResult]:  # noqa: ARG002
            return [
                ResolveResult(
                    hostname=host,
                    host=ip,
                    port=port,
                    family=socket.AF_INET6 if ":" in ip else socket.AF_INET,
                    proto=0,
                    flags=socket.AI_NUMERICHOST,
                )
                for ip in await names.resolve(host)
            ]

        async def close(self) -> None:
            """Nothing is open."""

    return CheckedResolver()
