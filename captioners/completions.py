"""Chat completions of an OpenAI-compatible endpoint (vLLM, SGLang, Ollama, hosted ones): asking and reading.

What the endpoint says is untrusted, and that it answers at all is not to be relied on: an answer that is not there
(429, 5xx, time-out, connection) is asked for again with growing pauses; one that cannot be used (refused, malformed,
cut off, empty) is a `Failed` of its own; one that concerns every request (wrong key, wrong model name) stops the run.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import socket
import ssl
import time
import unicodedata
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pairmill.errors import ConfigError, StageFailed
from pairmill.sources import addresses
from pairmill.sources.addresses import AddressRefused
from pairmill.sources.fetch import retry_after
from schemas.reasons import DEFERRED, Reason, with_retry_after

if TYPE_CHECKING:
    import aiohttp

BACKOFF_S = 0.5
_GIVE_UP = 16
"""Attempts in a row without an answer (429, 5xx, time-outs, broken connections) after which requests that were not yet
tried fail untried, and after time-outs none is tried again: a dead endpoint would else cost each of a million rows all
its retries."""
_MAX_BODY = 2**20
CHARS_A_TOKEN = 16
"""An answer may have so many characters for each token asked for; a longer one came from a server that ignores
``max_tokens``. Tokens of English have 4 to 5 characters, the longest in common vocabularies rarely more than 16."""
_MAX_DETAIL = 300
_MIN_SECRET = 8
"""Shorter keys ("EMPTY", "none") are placeholders for servers that ask for none, and words that a text may hold."""

Result = TypeVar("Result")


# -- what is asked and answered ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatRequest:
    """A question to a model."""

    messages: tuple[Mapping[str, Any], ...]
    """As the protocol has them: ``role`` and ``content``."""
    max_tokens: int
    temperature: float
    top_p: float
    seed: int

    def digest(self, model: str) -> str:
        """sha256 (hex) over all that an answer depends on; `model` is the model's identity (`model_identity`)."""
        asked = [model, list(self.messages), self.max_tokens, self.temperature, self.top_p, self.seed]
        return hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


@dataclass(frozen=True)
class Reasons:
    """What failures are called."""

    rate_limited: Reason
    server_error: Reason
    timeout: Reason
    connection: Reason
    refused: Reason
    malformed: Reason
    cut_off: Reason
    empty: Reason


@dataclass(frozen=True)
class Completion:
    """An answer as it was read."""

    text: str
    finish: str | None
    refusal: str | None
    prompt_tokens: int | None
    """As the endpoint says; None where it does not say, or nothing that can be so."""
    completion_tokens: int | None


class Failed(Exception):
    """One attempt gave nothing to use: for a reason of `DEFERRED` there was no answer, else an unusable one."""

    def __init__(
        self,
        reason: Reason,
        detail: str,
        *,
        tries: int | None = None,
        wait_s: float | None = None,
        completion: Completion | None = None,
        charged: bool = False,
    ) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail[:_MAX_DETAIL]
        self.tries = tries
        """How often an answer like this may be asked for anew; None: as the budget of retries allows."""
        self.wait_s = wait_s
        """How long the endpoint asked to wait."""
        self.completion = completion
        """What could be read of an unusable answer."""
        self.charged = charged
        """The endpoint may want to be paid for it: it took the request, and did not say that it failed."""


class Rejected(Failed):
    """The endpoint takes this request for wrong: for what is in it, or for what all requests have in common."""


# -- where and with which key -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Endpoint:
    """Where a model is, and how much is asked of it at a time."""

    section: str
    """Where the config speaks of it, for messages: ``models.captioner``."""
    base_url: str
    model: str
    """Its name there."""
    api_key_env: str
    concurrency: int
    timeout_s: float
    retries: int
    max_retry_wait_s: float
    requests_per_minute: float | None = None
    """Of the whole run."""
    tokens_per_minute: float | None = None
    identity: str = ""
    """What a digest knows of the model; its name, where it is empty."""

    def digest(self, request: ChatRequest) -> str:
        """The digest of a request to this model."""
        return request.digest(self.identity or self.model)


def check_base_url(base_url: str, section: str = "models.captioner") -> str:
    """A usable base URL, without the slash at its end.

    Raises:
        ConfigError: another scheme than http and https, or a place in it where secrets would end up in logs.
    """
    key = f"{section}.base_url"
    try:
        address = addresses.parse(base_url, allow_private=True)
    except AddressRefused as refused:
        hint = "; the key belongs into an environment variable" if refused.reason == Reason.URL_USERINFO else ""
        raise ConfigError(f"{key}: {refused.detail}{hint}; write it like https://host/v1") from None
    if "?" in base_url or "#" in base_url:
        raise ConfigError(f"{key} has a query or fragment; it ends with the path, such as https://host/v1")
    return address.url.rstrip("/")


def api_key(base_url: str, variable: str, section: str = "models.captioner") -> str | None:
    """The key that an environment variable holds, or None for a private server that may need none.

    Raises:
        ConfigError: there is none although the host is on the public internet, or it cannot be sent safely.
    """
    key = os.environ.get(variable, "").strip()
    private = _is_private(addresses.parse(base_url, allow_private=True).host)
    if not key:
        if private:
            return None
        raise ConfigError(
            f"{section}: the environment variable {variable} is not set, and {base_url} is on the public "
            "internet; put the endpoint's key there (on a cluster, where its workers see it), or name another variable "
            f"as {section}.api_key_env"
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"the environment variable {variable} holds characters that no API key has; set it again")
    if base_url.startswith("http:") and not private:
        raise ConfigError(
            f"{section}.base_url: {base_url} sends the key of {variable} in clear over the internet; use https"
        )
    return key


def _is_private(host: str) -> bool:
    """Whether all addresses of a host are off the public internet. A name that does not resolve leads nowhere, so it
    counts as private: requests will say what is wrong."""
    if (ip := addresses.literal(host)) is not None:
        return not addresses.is_public(ip)
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return True
    ips = [addresses.literal(address.partition("%")[0]) for address in found]
    return all(ip is not None and not addresses.is_public(ip) for ip in ips)


# -- asking -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """A request that no endpoint has a reason to reject, to find out whose fault a rejection is."""

    request: Callable[[], ChatRequest]
    what: str
    """What it is, for a message: "a plain picture"."""
    check: str
    """What to look at when it is rejected too."""


class Pace:
    """Lets so many units a minute pass, evenly: in no minute more than that, and one request."""

    def __init__(self, per_minute: float | None) -> None:
        self._unit_s = 60 / per_minute if per_minute else 0.0
        self._next = 0.0

    async def wait(self, units: float = 1.0) -> None:
        """Until these units may pass."""
        if self._unit_s:
            at = max(self._next, time.monotonic())
            self._next = at + units * self._unit_s
            if (pause := at - time.monotonic()) > 0:
                await asyncio.sleep(pause)

    def give_back(self, units: float) -> None:
        """So many of them were not needed."""
        self._next -= units * self._unit_s


class ChatClient:
    """Asks an endpoint. What it learns of it (the newer name of ``max_tokens``) it keeps; connections live while it is
    entered (``async with``), in one event loop.

    Args:
        endpoint: Where.
        key: The API key, held nowhere else.
        reasons: What failures are called.
        probe: What is sent after a first rejection.
        tidy: What becomes of an answer's text before it is judged.
        fault: Why a tidy text is of no use, or None.
        backoff_s: The first pause between attempts.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        key: str | None,
        reasons: Reasons,
        probe: Probe,
        *,
        tidy: Callable[[str], str],
        fault: Callable[[str], Reason | None] = lambda _: None,
        backoff_s: float | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.reasons = reasons
        self._key = key
        self._probe = probe
        self._tidy = tidy
        self._fault = fault
        self._backoff_s = BACKOFF_S if backoff_s is None else backoff_s
        self._tls = ssl.create_default_context()
        self._length_key = "max_tokens"
        self._understood = False
        """Some request was answered with a completion: the endpoint, the model's name and the parameters are right."""

    async def __aenter__(self) -> ChatClient:
        import aiohttp

        self._slots = asyncio.Semaphore(self.endpoint.concurrency)
        self._probing = asyncio.Lock()
        self._open_from = 0.0
        """The endpoint asked to be left alone until then (monotonic clock)."""
        self._unanswered = 0
        self._silence = self.reasons.connection
        """The reason of the last unanswered request."""
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "pairmill"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        trace = aiohttp.TraceConfig()
        trace.on_request_headers_sent.append(_mark_sent)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=self._tls),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            headers=headers,
            trace_configs=[trace],
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(
        self,
        request: Callable[[int], ChatRequest],
        spread: str,
        *,
        anew: bool,
        send: Callable[[ChatRequest], Awaitable[Completion]] | None = None,
    ) -> Completion:
        """A completion that can be used.

        Args:
            request: The request to send when so many unusable answers came before.
            spread: Pauses are drawn from it, so that requests do not come in step.
            anew: Whether to ask anew after an unusable answer.
            send: Sends one request; `send` by default.

        Raises:
            Failed: there is none.
            ConfigError: the key, the name or the config is wrong.
            StageFailed: the account is empty.
        """
        endpoint, count = self.endpoint, 0
        unusable: dict[Reason, int] = {}
        for attempt in range(endpoint.retries + 1):
            try:
                return await self._in_turn(request(count), attempt == 0, send or self.send)
            except Failed as failure:
                last = attempt == endpoint.retries
                pause = failure.wait_s if failure.wait_s is not None else self._backoff(spread, attempt)
                if failure.reason in DEFERRED:
                    if last or pause > endpoint.max_retry_wait_s:
                        raise
                    if failure.reason is self.reasons.rate_limited or failure.wait_s is not None:
                        self._open_from = max(self._open_from, time.monotonic() + pause)
                else:
                    tries = unusable[failure.reason] = unusable.get(failure.reason, 0) + 1
                    if not anew or last or (failure.tries is not None and tries > failure.tries):
                        raise
                    count += 1
            await asyncio.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _backoff(self, spread: str, attempt: int) -> float:
        """0.5 s, doubled each time, plus up to as much again."""
        drawn = hashlib.sha256(f"{spread}\n{attempt}".encode()).digest()[0] / 255
        return min(self._backoff_s * 2**attempt * (1 + drawn), self.endpoint.max_retry_wait_s)

    async def _in_turn(
        self, request: ChatRequest, first: bool, send: Callable[[ChatRequest], Awaitable[Completion]]
    ) -> Completion:
        """One attempt, when there is a slot and the endpoint has not asked to be left alone."""
        while True:
            async with self._slots:
                if (wait := self._open_from - time.monotonic()) <= 0:
                    if first or self._silence is self.reasons.timeout:
                        self._check_alive()
                    try:
                        return await send(request)
                    except Rejected as rejected:
                        await self._check_understood(rejected, send)
                        raise
            await asyncio.sleep(wait)

    def _check_alive(self) -> None:
        if self._unanswered >= max(_GIVE_UP, 2 * self.endpoint.concurrency):
            detail = f"the endpoint left {self._unanswered} requests in a row unanswered; this one was not tried"
            raise Failed(self._silence, detail, wait_s=float("inf"))

    async def send(self, request: ChatRequest, digest: str | None = None) -> Completion:
        """One request within its deadline; `digest` is its digest, where that is known.

        Raises:
            Failed: it has no answer that can be used.
            ConfigError: the key, the name or the config is wrong.
            StageFailed: the account is empty.
        """
        sent = _Sent()
        try:
            payload = self._payload(request)
            status, headers, body = await asyncio.wait_for(
                self._post(payload, digest or self.endpoint.digest(request), sent), self.endpoint.timeout_s
            )
            completion = self.read(request, status, headers, body, payload)
        except asyncio.TimeoutError:
            self._unanswered += 1
            self._silence = self.reasons.timeout
            detail = f"no whole answer within {self.endpoint.timeout_s:g} s"
            raise Failed(self.reasons.timeout, detail, charged=sent.yes) from None
        except Failed as failure:
            if failure.reason in DEFERRED:
                self._unanswered += 1
                self._silence = failure.reason
            else:
                self._unanswered = 0
            raise
        self._unanswered = 0
        return completion

    async def _post(self, payload: dict[str, Any], digest: str, sent: _Sent) -> tuple[int, Any, bytes]:
        """Status, headers and body of the answer."""
        import aiohttp

        endpoint = self.endpoint
        url = f"{endpoint.base_url}/chat/completions"
        try:
            async with self._session.post(
                url,
                json=payload,
                headers={"Idempotency-Key": digest},
                allow_redirects=False,
                trace_request_ctx=sent,
            ) as response:
                return response.status, response.headers, await self._body(response)
        except aiohttp.ClientConnectorCertificateError as error:
            raise ConfigError(
                f"{endpoint.section}: the TLS certificate of {endpoint.base_url} is not trusted "
                f"({self.clean(str(error))}); correct the host's name, or make its authority known (SSL_CERT_FILE)"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            said = self.clean(f"{type(error).__name__}: {error}")
            raise Failed(self.reasons.connection, said, charged=sent.yes) from None
        except (ValueError, AttributeError, AssertionError) as error:
            # aiohttp on answers that no parser expects
            said = self.clean(f"not HTTP: {type(error).__name__}: {error}")
            raise Failed(self.reasons.connection, said, charged=sent.yes) from None

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        """The body, capped while it streams in."""
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > _MAX_BODY:
                response.close()
                if response.status != 200:
                    break
                detail = f"the answer has more than {_MAX_BODY} bytes"
                raise Failed(self.reasons.malformed, detail, charged=True)
        return bytes(body)

    def _payload(self, request: ChatRequest) -> dict[str, Any]:
        return {
            "model": self.endpoint.model,
            "messages": list(request.messages),
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            self._length_key: request.max_tokens,
        }

    # -- reading the answer --

    def read(
        self, request: ChatRequest, status: int, headers: Any, body: bytes, payload: dict[str, Any] | None = None
    ) -> Completion:
        """What an answer says, however it came; `payload` is what was sent, where it may be another by now.

        Raises:
            Failed, ConfigError, StageFailed: as `send`.
        """
        if status != 200:
            raise self._refusal(status, headers, _json(body), payload or self._payload(request))
        return self._read(headers, body, request.max_tokens)

    def _read(self, headers: Any, body: bytes, max_tokens: int) -> Completion:
        """The completion in an answer of status 200.

        Raises:
            Failed: there is none that can be used.
        """
        malformed = self.reasons.malformed
        if headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
            raise Failed(malformed, "the answer is compressed, which was not asked for", charged=True)
        answer = _json(body)
        if not isinstance(answer, dict):
            raise Failed(malformed, f"the answer, {len(body)} bytes, is no JSON object", charged=True)
        choices = answer.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or not isinstance(message, dict):
            unread = Completion("", None, None, _tokens(answer, "prompt"), _tokens(answer, "completion"))
            raise Failed(malformed, "the answer has no choices[0].message", completion=unread, charged=True)
        self._understood = True
        return self._checked(answer, choice, message, max_tokens)

    def _checked(
        self, answer: dict[str, Any], choice: dict[str, Any], message: dict[str, Any], max_tokens: int
    ) -> Completion:
        reasons = self.reasons
        finish = choice.get("finish_reason")
        refusal = message.get("refusal")
        refusal = self.clean(refusal) if isinstance(refusal, str) and refusal.strip() else None
        content = message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
            content = " ".join(part for part in parts if isinstance(part, str))
        if content is None:
            content = ""
        text = self._tidy(content) if isinstance(content, str) else ""
        leaks = self._holds_key(text)
        read = Completion(
            "" if leaks else text,
            self.clean(finish)[:40] if isinstance(finish, str) else None,
            refusal,
            _tokens(answer, "prompt"),
            _tokens(answer, "completion"),
        )

        def failed(reason: Reason, detail: str, tries: int | None = None) -> Failed:
            return Failed(reason, detail, tries=tries, completion=read, charged=True)

        if finish == "content_filter":
            raise failed(reasons.refused, "finish_reason is content_filter", 0)
        if refusal is not None:
            raise failed(reasons.refused, refusal, 0)
        if finish == "length" or (finish is None and (read.completion_tokens or 0) >= max_tokens):
            raise failed(reasons.cut_off, f"longer than max_tokens ({max_tokens})", 1)
        if finish in ("tool_calls", "function_call"):
            raise failed(reasons.malformed, f"finish_reason is {finish}")
        if not isinstance(content, str):
            raise failed(reasons.malformed, f"message.content is a {type(content).__name__}")
        if not text:
            raise failed(reasons.empty, "the answer holds no text", 1)
        if leaks:
            raise failed(reasons.malformed, "the answer repeats the API key", 0)
        if (reason := self._fault(text)) is not None:
            raise failed(reason, self.clean(text), 0 if reason is reasons.refused else None)
        if len(text) > (most := CHARS_A_TOKEN * max_tokens):
            raise failed(reasons.malformed, f"{len(text)} characters; at most {most} are taken")
        return read

    def _refusal(self, status: int, headers: Any, answer: Any, payload: dict[str, Any]) -> Exception:
        """What an answer with another status than 200 means."""
        endpoint, reasons = self.endpoint, self.reasons
        error = _error_of(answer)
        said = self.clean(str(error.get("message") or ""))
        detail = f"HTTP {status}: {said}" if said else f"HTTP {status}"
        where = f"{endpoint.section}: the endpoint {endpoint.base_url} answers {detail}"
        codes = _codes(error)
        if status in (400, 403, 422, 451) and (codes & _POLICY_CODES or _POLICY_WORDS.search(said)):
            return Failed(reasons.refused, detail, tries=0)
        if status == 402 or (status == 429 and "insufficient_quota" in codes):
            return StageFailed(f"{where}; add credit or raise the quota, then run again: what is finished is kept")
        if status in (401, 403):
            state = "holds the key it does not take" if self._key else "is not set"
            return ConfigError(
                f"{where}; the environment variable {endpoint.api_key_env} {state}, set it and run again"
            )
        if status in (404, 405) or 300 <= status < 400:
            if location := headers.get("Location"):
                where += f" and points to {self.clean(addresses.without_secrets(location))}, which is not followed"
            return ConfigError(
                f"{where}; check {endpoint.section}.base_url (up to and with /v1) and the name {endpoint.model!r}"
            )
        if status == 400 and "max_tokens" in payload and "max_completion_tokens" in said:
            self._length_key = "max_completion_tokens"  # OpenAI's newer name for the same
            return Failed(reasons.server_error, detail, wait_s=0.0)
        after = headers.get("Retry-After")
        wait = retry_after(after) if after else None
        if wait is not None:
            detail = with_retry_after(detail, wait)
        if status == 429:
            return Failed(reasons.rate_limited, detail, wait_s=wait)
        if status == 408:
            return Failed(reasons.timeout, detail, wait_s=wait)
        if status >= 500 or status in (409, 425):
            return Failed(reasons.server_error, detail, wait_s=wait)
        if 400 <= status < 500:
            return Rejected(reasons.refused, detail, tries=0)
        return Failed(reasons.malformed, f"{detail} is no answer to this request", charged=True)

    async def _check_understood(self, rejected: Rejected, send: Callable[[ChatRequest], Awaitable[Completion]]) -> None:
        """Find out whether a rejected request was wrong because of what is in it: a plain one is sent, once, in the
        slot of that request.

        Raises:
            ConfigError: that is rejected too, so the config is wrong.
        """
        async with self._probing:
            if self._understood:
                return
            try:
                await send(self._probe.request())
            except Rejected as again:
                endpoint = self.endpoint
                raise ConfigError(
                    f"{endpoint.section}: the endpoint {endpoint.base_url} answers {again.detail}, also to "
                    f"{self._probe.what}; check the name {endpoint.model!r}{self._probe.check}"
                ) from None
            except Failed as failure:
                if failure.reason in DEFERRED:  # nothing is known of the request then
                    before = rejected.detail[: max(0, _MAX_DETAIL - len(failure.detail) - len("; then "))]
                    raise Failed(failure.reason, f"{before}; then {failure.detail}", wait_s=float("inf")) from None

    def _holds_key(self, text: str) -> bool:
        return bool(self._key) and len(self._key or "") >= _MIN_SECRET and str(self._key) in text

    def clean(self, text: str) -> str:
        """Words of the endpoint for a message or a detail: one line, short, without the key."""
        line = one_line(text)  # first, since characters that are dropped could hide the key
        if self._key and len(self._key) >= _MIN_SECRET:
            line = line.replace(self._key, "[key]")
        return line[:250]


class _Sent:
    """Whether a request has left."""

    yes = False


async def _mark_sent(_: object, context: Any, __: object) -> None:
    context.trace_request_ctx.yes = True


async def gather_all(work: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Results in order; the first failure cancels the rest."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _json(body: bytes) -> Any:
    """The JSON value of a body, or None."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _error_of(answer: Any) -> dict[str, Any]:
    """The error object of an answer: OpenAI's ``error``, FastAPI's ``detail``, or the answer itself (vLLM of old)."""
    if not isinstance(answer, dict):
        return {}
    error = answer.get("error", answer)
    if isinstance(error, str):
        return {"message": error}
    if not isinstance(error, dict):
        return {}
    return error if "message" in error or "detail" not in error else {**error, "message": error["detail"]}


def _codes(error: dict[str, Any]) -> set[str]:
    inner = error.get("innererror")
    values = [error.get("code"), error.get("type"), inner.get("code") if isinstance(inner, dict) else None]
    return {value for value in values if isinstance(value, str)}


def _tokens(answer: dict[str, Any], which: str) -> int | None:
    """Tokens of the prompt or the completion, as the answer says; None where it says nothing that can be so."""
    usage = answer.get("usage")
    tokens = usage.get(f"{which}_tokens") if isinstance(usage, dict) else None
    return tokens if type(tokens) is int and 0 <= tokens < 2**31 else None


_POLICY_CODES = frozenset(
    {
        "content_filter",  # Azure
        "content_policy_violation",  # OpenAI
        "moderation_blocked",
        "ResponsibleAIPolicyViolation",
        "data_inspection_failed",  # DashScope
    }
)
_POLICY_WORDS = re.compile(r"content (management |safety )?policy|safety system|content_filter", re.IGNORECASE)


# -- texts ------------------------------------------------------------------------------------------------------------

_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_KEPT_FORMATS = frozenset("\u200c\u200d")
"""Joiners, which Persian and emoji need; other format characters (bidi controls, tags) can hide text."""


def one_line(raw: str) -> str:
    """An answer as one line of text: thoughts of a reasoning model, control, format and bidi characters, surrogates and
    unassigned code points are dropped, runs of white space become a space."""
    line = " ".join(_printable(_THOUGHTS.sub("", raw)).split())
    return line if line.strip("\u200c\u200d ") else ""


def chat_text(raw: str) -> str:
    """An answer as lines of text: as `one_line`, but line breaks and spaces stay."""
    lines = [_printable(line).rstrip() for line in _THOUGHTS.sub("", raw).splitlines()]
    text = "\n".join(lines).strip()
    return text if text.strip("\u200c\u200d \n") else ""


def _printable(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return "".join(_character(c) for c in text)


def _character(character: str) -> str:
    kind = unicodedata.category(character)
    if kind == "Cc":
        return " " if character.isspace() else ""
    return "" if kind[0] == "C" and character not in _KEPT_FORMATS else character
