"""Captions from a vision-language model behind an OpenAI-compatible endpoint (vLLM, SGLang, Ollama, hosted ones).

What the endpoint says is untrusted, and that it answers at all is not to be relied on. An answer that is not there
(429, 5xx, time-out, connection) defers the pair, a later ``pairmill run --retry-deferred`` asks again; an answer that
is no caption (refused, malformed, cut off, empty) leaves that caption null, with the reason beside it; an answer that
concerns every request (wrong key, wrong model name) stops the run.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import re
import socket
import ssl
import time
import unicodedata
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from filters.image_rules import missing_image, with_image
from pairmill.errors import ConfigError, StageFailed
from pairmill.models import ModelRef
from pairmill.sources import addresses
from pairmill.sources.addresses import AddressRefused
from pairmill.sources.download import in_own_loop
from pairmill.sources.fetch import retry_after
from pairmill.stage import Batch, Kernel, Resources, Stage
from schemas import config, fields
from schemas.reasons import DEFERRED, Reason, with_retry_after

if TYPE_CHECKING:
    import aiohttp
    from PIL import Image

SOURCE = "vlm"
PROMPTS = Path(__file__).parent / "prompts"

_BACKOFF_S = 0.5
_GIVE_UP = 16
"""Attempts in a row without an answer (429, 5xx, time-outs, broken connections) after which the rows of a call that
were not yet tried are deferred untried, and after time-outs no row is tried again: a dead endpoint would else cost each
of a million rows all its retries."""
_MAX_BODY = 2**20
_CHARS_A_TOKEN = 16
"""An answer may have so many characters for each token asked for; a longer one came from a server that ignores
``max_tokens``. Tokens of English have 4 to 5 characters, the longest in common vocabularies rarely more than 16."""
_MAX_DETAIL = 300
_MIN_SECRET = 8
"""Shorter keys ("EMPTY", "none") are placeholders for servers that ask for none, and words that a caption may hold."""
_JPEG_QUALITY = 90

Result = TypeVar("Result")


@dataclass(frozen=True)
class Prompt:
    """What the model is told. Its digest is what a fingerprint sees of it."""

    system: str
    user: str

    @classmethod
    def of(cls, text: str | None) -> Prompt:
        """The system message of ``prompts/describe_system.md`` with `text` as the user's; null, an empty one or BLIP's
        (the config's default) means ``prompts/describe_user.md``."""
        default = config.Caption.model_fields["prompt"].default
        wanted = "" if text is None or text == default else text.strip()
        user = wanted or _read("describe_user.md")
        return cls(_read("describe_system.md"), user)

    def identity(self) -> dict[str, str]:
        """sha256 (hex) over both texts."""
        return {"sha256": hashlib.sha256(json.dumps([self.system, self.user]).encode()).hexdigest()}


def _read(name: str) -> str:
    return (PROMPTS / name).read_text(encoding="utf-8").strip()


@dataclass(frozen=True)
class EndpointCaptions(Stage):
    """`count` captions an image, each from a request of its own to ``{base_url}/chat/completions``.

    Identity: the model's name and revision (the revision is not sent; raise it when the endpoint serves other weights
    under the old name), the prompt's digest, the sampling and the size of the image. Not the base_url, which is where
    the model is and not what it is; so moving to another server of the same model computes nothing anew.

    A request's ``seed`` follows from `seed`, the pair's uid, the caption's number and how often an unusable answer was
    asked for anew, so a rerun asks the same questions. Whether the same question gets the same answer is up to the
    endpoint.

    `concurrency` is a worker's. The API key is read from the environment of the worker when it opens the stage, and is
    held nowhere but in the kernel.
    """

    name = "captions"
    reads = (fields.IMAGE.name,)
    writes = (fields.CAPTIONS,)

    model: ModelRef
    prompt: Prompt
    base_url: str = field(metadata={"identity": False})
    count: int = 1
    temperature: float = 1.0
    top_p: float = 0.9
    max_tokens: int = 300
    image_side: int = 768
    seed: int = 0
    api_key_env: str = field(default="OPENAI_API_KEY", metadata={"identity": False})
    concurrency: int = field(default=8, metadata={"identity": False})
    timeout_s: float = field(default=60.0, metadata={"identity": False})
    retries: int = field(default=4, metadata={"identity": False})
    max_retry_wait_s: float = field(default=30.0, metadata={"identity": False})
    resources: Resources = field(default=Resources(cpus=0.25, rows=64, actor=True), metadata={"identity": False})

    @classmethod
    def of(cls, run: config.RunConfig) -> EndpointCaptions:
        """The stage that a config asks for: `models.captioner`, `caption` and `seed`. Of `caption`, the lengths and the
        repetition penalty are BLIP's and have no counterpart here; ``method: greedy`` is temperature 0.

        Raises:
            ConfigError: no or a wrong base_url, a captioner without a name, or beam search, which no endpoint offers.
        """
        choice, caption = run.models.captioner, run.caption
        if choice.base_url is None:
            raise ConfigError(
                "models.captioner.base_url is not set; give the endpoint, such as http://127.0.0.1:8000/v1"
            )
        if choice.name is None:
            raise ConfigError("models.captioner: an endpoint knows its models by name; give name instead of path")
        if caption.method == "beam":
            raise ConfigError("caption.method is beam, which endpoints do not offer; say nucleus or greedy")
        return cls(
            ModelRef(name=choice.name, revision=choice.revision),
            Prompt.of(caption.prompt),
            check_base_url(choice.base_url),
            count=caption.count,
            temperature=caption.temperature if caption.method == "nucleus" else 0.0,
            top_p=caption.top_p if caption.method == "nucleus" else 1.0,
            seed=run.seed,
            api_key_env=choice.api_key_env,
            **caption.endpoint.model_dump(),
        )

    def open(self) -> Kernel:
        """Read the API key from the environment.

        Raises:
            ConfigError: there is none although the host is on the public internet, or it cannot be sent safely.
        """
        client = _Client(self, _api_key(self.base_url, self.api_key_env))

        def kernel(batch: Batch) -> pa.Table:
            rows, positions = with_image(batch)
            asked = [  # images first: a broken one must not cost the requests of the others
                _Asked(uid, _data_url(data, rows, uid, self.image_side))
                for uid, data in zip(rows.pylist("uid"), rows.pylist("image"), strict=True)
            ]
            captions: list[list[dict[str, str | None]] | None] = [None] * len(batch)
            failed = {name: column.to_pylist() for name, column in missing_image(len(batch), positions).items()}
            answers = in_own_loop(lambda: client.caption(asked)) if asked else []
            for position, answer in zip(positions, answers, strict=True):
                if isinstance(answer, _Failed):
                    failed["reason"][position], failed["detail"][position] = answer.reason.value, answer.detail
                else:
                    captions[position] = [_to_row(caption) for caption in answer]
            columns = {name: pa.array(values, pa.string()) for name, values in failed.items()}
            return pa.table({fields.CAPTIONS.name: pa.array(captions, fields.CAPTIONS.type), **columns})

        return kernel


def request_seed(seed: int, uid: str, number: int, anew: int = 0) -> int:
    """The seed of a request: 31 bits, since some servers take no more; `anew` counts unusable answers before it."""
    digest = hashlib.sha256(f"{seed}\n{uid}\n{number}\n{anew}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


# -- where and with which key -----------------------------------------------------------------------------------------


def check_base_url(base_url: str) -> str:
    """A usable base URL, without the slash at its end.

    Raises:
        ConfigError: another scheme than http and https, or a place in it where secrets would end up in logs.
    """
    key = "models.captioner.base_url"
    try:
        address = addresses.parse(base_url, allow_private=True)
    except AddressRefused as refused:
        hint = "; the key belongs into an environment variable" if refused.reason == Reason.URL_USERINFO else ""
        raise ConfigError(f"{key}: {refused.detail}{hint}; write it like https://host/v1") from None
    if "?" in base_url or "#" in base_url:
        raise ConfigError(f"{key} has a query or fragment; it ends with the path, such as https://host/v1")
    return address.url.rstrip("/")


def _api_key(base_url: str, variable: str) -> str | None:
    """The key, or None for a private server that may need none."""
    key = os.environ.get(variable, "").strip()
    private = _is_private(addresses.parse(base_url, allow_private=True).host)
    if not key:
        if private:
            return None
        raise ConfigError(
            f"models.captioner: the environment variable {variable} is not set, and {base_url} is on the public "
            "internet; put the endpoint's key there (on a cluster, where its workers see it), or name another variable "
            "as models.captioner.api_key_env"
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"the environment variable {variable} holds characters that no API key has; set it again")
    if base_url.startswith("http:") and not private:
        raise ConfigError(
            f"models.captioner.base_url: {base_url} sends the key of {variable} in clear over the internet; use https"
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


# -- what is sent -----------------------------------------------------------------------------------------------------


def _data_url(data: bytes, rows: Batch, uid: str, side: int) -> str:
    """The image as a ``data:`` URL: the stored file where it is a JPEG that fits, else a smaller one of it."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as opened:  # reads the header only
        fits = opened.format == "JPEG" and opened.mode in ("RGB", "L") and max(opened.size) <= side
    if not fits:
        image = rows.pixels.decode(uid, data)
        scale = min(1.0, side / max(image.size))
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        data = _jpeg(image if size == image.size else image.resize(size, Image.Resampling.LANCZOS))
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def _probe_url() -> str:
    """A picture that no endpoint has a reason to refuse."""
    from PIL import Image

    return "data:image/jpeg;base64," + base64.b64encode(_jpeg(Image.new("RGB", (64, 64), (90, 140, 200)))).decode(
        "ascii"
    )


# -- asking -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """A row to caption."""

    uid: str
    image: str
    """``data:`` URL."""


@dataclass(frozen=True)
class _Caption:
    """One caption, or why there is none."""

    text: str | None
    reason: Reason | None = None
    detail: str | None = None


def _to_row(caption: _Caption) -> dict[str, str | None]:
    reason = caption.reason.value if caption.reason else None
    return {"text": caption.text, "source": SOURCE, "reason": reason, "detail": caption.detail}


class _Failed(Exception):
    """One attempt gave no caption: for a reason of `DEFERRED` there was no answer, else an unusable one."""

    def __init__(self, reason: Reason, detail: str, *, tries: int | None = None, wait_s: float | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail[:_MAX_DETAIL]
        self.tries = tries
        """How often an answer like this may be asked for anew; None: as the budget of retries allows."""
        self.wait_s = wait_s
        """How long the endpoint asked to wait."""


class _Rejected(_Failed):
    """The endpoint takes this request for wrong: for its image, or for what all requests have in common."""

    def __init__(self, detail: str) -> None:
        super().__init__(Reason.CAPTION_REFUSED, detail, tries=0)


class _Client:
    """What a worker keeps from call to call; one session a call."""

    def __init__(self, stage: EndpointCaptions, key: str | None) -> None:
        self._stage = stage
        self._key = key
        self._tls = ssl.create_default_context()
        self._length_key = "max_tokens"
        self._understood = False
        """Some request was answered with a completion: the endpoint, the model's name and the parameters are right."""

    async def caption(self, rows: Sequence[_Asked]) -> list[list[_Caption] | _Failed]:
        """For each row its captions, or why the row is deferred."""
        import aiohttp

        self._slots = asyncio.Semaphore(self._stage.concurrency)
        self._probing = asyncio.Lock()
        self._open_from = 0.0
        """The endpoint asked to be left alone until then (monotonic clock)."""
        self._unanswered = 0
        self._silence = Reason.CAPTION_CONNECTION
        """The reason of the last unanswered request."""
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "pairmill"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connector = aiohttp.TCPConnector(limit=0, ssl=self._tls)
        async with aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            headers=headers,
        ) as self._session:
            return await _all([self._row(row) for row in rows])

    async def _row(self, row: _Asked) -> list[_Caption] | _Failed:
        """All captions of a row, or none: when one cannot be had now, the others are not asked for either."""
        try:
            return await _all([self._sample(row, number) for number in range(self._stage.count)])
        except _Failed as failure:
            return failure

    async def _sample(self, row: _Asked, number: int) -> _Caption:
        """One caption.

        Raises:
            _Failed: with a reason of `DEFERRED`.
        """
        stage = self._stage
        anew = 0
        unusable: dict[Reason, int] = {}
        for attempt in range(stage.retries + 1):
            try:
                text = await self._in_turn(row.image, request_seed(stage.seed, row.uid, number, anew), attempt == 0)
                return _Caption(text)
            except _Failed as failure:
                last = attempt == stage.retries
                pause = failure.wait_s if failure.wait_s is not None else self._backoff(row.uid, attempt)
                if failure.reason in DEFERRED:
                    if last or pause > stage.max_retry_wait_s:
                        raise
                    if failure.reason is Reason.CAPTION_RATE_LIMITED or failure.wait_s is not None:
                        self._open_from = max(self._open_from, time.monotonic() + pause)
                else:
                    tries = unusable[failure.reason] = unusable.get(failure.reason, 0) + 1
                    if last or (failure.tries is not None and tries > failure.tries):
                        return _Caption(None, failure.reason, failure.detail)
                    anew += 1
            await asyncio.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _backoff(self, uid: str, attempt: int) -> float:
        """0.5 s, doubled each time, plus up to as much again, drawn from the uid so that rows do not come in step."""
        spread = hashlib.sha256(f"{uid}\n{attempt}".encode()).digest()[0] / 255
        return min(_BACKOFF_S * 2**attempt * (1 + spread), self._stage.max_retry_wait_s)

    async def _in_turn(self, image: str, seed: int, first: bool) -> str:
        """One attempt, when there is a slot and the endpoint has not asked to be left alone."""
        while True:
            async with self._slots:
                if (wait := self._open_from - time.monotonic()) <= 0:
                    if first or self._silence is Reason.CAPTION_TIMEOUT:
                        self._check_alive()
                    try:
                        return await self._attempt(image, seed)
                    except _Rejected as rejected:
                        await self._check_understood(rejected)
                        raise
            await asyncio.sleep(wait)

    def _check_alive(self) -> None:
        if self._unanswered >= max(_GIVE_UP, 2 * self._stage.concurrency):
            detail = f"the endpoint left {self._unanswered} requests in a row unanswered; this one was not tried"
            raise _Failed(self._silence, detail, wait_s=float("inf"))

    async def _attempt(self, image: str, seed: int) -> str:
        """One request within its deadline: the caption."""
        try:
            payload = self._payload(image, seed)
            status, headers, body = await asyncio.wait_for(self._post(payload), self._stage.timeout_s)
            if status != 200:
                raise self._refusal(status, headers, _json(body), payload)
            text = self._caption_of(headers, body)
        except asyncio.TimeoutError:
            self._unanswered += 1
            self._silence = Reason.CAPTION_TIMEOUT
            detail = f"no whole answer within {self._stage.timeout_s:g} s"
            raise _Failed(Reason.CAPTION_TIMEOUT, detail) from None
        except _Failed as failure:
            if failure.reason in DEFERRED:
                self._unanswered += 1
                self._silence = failure.reason
            else:
                self._unanswered = 0
            raise
        self._unanswered = 0
        return text

    async def _post(self, payload: dict[str, Any]) -> tuple[int, Any, bytes]:
        """Status, headers and body of the answer."""
        import aiohttp

        url = f"{self._stage.base_url}/chat/completions"
        try:
            async with self._session.post(url, json=payload, allow_redirects=False) as response:
                return response.status, response.headers, await _body(response)
        except aiohttp.ClientConnectorCertificateError as error:
            raise ConfigError(
                f"models.captioner: the TLS certificate of {self._stage.base_url} is not trusted "
                f"({self._clean(str(error))}); correct the host's name, or make its authority known (SSL_CERT_FILE)"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Failed(Reason.CAPTION_CONNECTION, self._clean(f"{type(error).__name__}: {error}")) from None
        except (ValueError, AttributeError, AssertionError) as error:
            # aiohttp on answers that no parser expects
            raise _Failed(
                Reason.CAPTION_CONNECTION, self._clean(f"not HTTP: {type(error).__name__}: {error}")
            ) from None

    def _payload(self, image: str, seed: int) -> dict[str, Any]:
        stage = self._stage
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": stage.prompt.user}]
        return {
            "model": stage.model.name,
            "messages": [
                {"role": "system", "content": stage.prompt.system},
                {"role": "user", "content": content},
            ],
            "temperature": stage.temperature,
            "top_p": stage.top_p,
            "seed": seed,
            self._length_key: stage.max_tokens,
        }

    # -- reading the answer --

    def _caption_of(self, headers: Any, body: bytes) -> str:
        """The caption in an answer of status 200.

        Raises:
            _Failed: there is none.
        """
        if headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
            raise _Failed(Reason.CAPTION_MALFORMED, "the answer is compressed, which was not asked for")
        answer = _json(body)
        if not isinstance(answer, dict):
            raise _Failed(Reason.CAPTION_MALFORMED, f"the answer, {len(body)} bytes, is no JSON object")
        choices = answer.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or not isinstance(message, dict):
            raise _Failed(Reason.CAPTION_MALFORMED, "the answer has no choices[0].message")
        self._understood = True
        return self._checked(answer, choice, message)

    def _checked(self, answer: dict[str, Any], choice: dict[str, Any], message: dict[str, Any]) -> str:
        finish = choice.get("finish_reason")
        if finish == "content_filter":
            raise _Failed(Reason.CAPTION_REFUSED, "finish_reason is content_filter", tries=0)
        if isinstance(message.get("refusal"), str) and message["refusal"].strip():
            raise _Failed(Reason.CAPTION_REFUSED, self._clean(message["refusal"]), tries=0)
        if finish == "length" or (finish is None and _used(answer) >= self._stage.max_tokens):
            raise _Failed(Reason.CAPTION_CUT_OFF, f"longer than max_tokens ({self._stage.max_tokens})", tries=1)
        if finish in ("tool_calls", "function_call"):
            raise _Failed(Reason.CAPTION_MALFORMED, f"finish_reason is {finish}")
        content = message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
            content = " ".join(part for part in parts if isinstance(part, str))
        if content is None:
            content = ""
        if not isinstance(content, str):
            raise _Failed(Reason.CAPTION_MALFORMED, f"message.content is a {type(content).__name__}")
        text = caption_text(content)
        if not text:
            raise _Failed(Reason.CAPTION_EMPTY, "the answer holds no text", tries=1)
        if self._key and len(self._key) >= _MIN_SECRET and self._key in text:
            raise _Failed(Reason.CAPTION_MALFORMED, "the answer repeats the API key", tries=0)
        if (reason := refusal_or_residue(text)) is not None:
            tries = 0 if reason is Reason.CAPTION_REFUSED else None
            raise _Failed(reason, self._clean(text), tries=tries)
        if len(text) > (most := _CHARS_A_TOKEN * self._stage.max_tokens):
            raise _Failed(Reason.CAPTION_MALFORMED, f"{len(text)} characters; at most {most} are taken")
        return text

    def _refusal(self, status: int, headers: Any, answer: Any, payload: dict[str, Any]) -> Exception:
        """What an answer with another status than 200 means."""
        error = _error_of(answer)
        said = self._clean(str(error.get("message") or ""))
        detail = f"HTTP {status}: {said}" if said else f"HTTP {status}"
        where = f"models.captioner: the endpoint {self._stage.base_url} answers {detail}"
        codes = _codes(error)
        if status in (400, 403, 422, 451) and (codes & _POLICY_CODES or _POLICY_WORDS.search(said)):
            return _Failed(Reason.CAPTION_REFUSED, detail, tries=0)
        if status == 402 or (status == 429 and "insufficient_quota" in codes):
            return StageFailed(f"{where}; add credit or raise the quota, then run again: what is finished is kept")
        if status in (401, 403):
            state = "holds the key it does not take" if self._key else "is not set"
            return ConfigError(
                f"{where}; the environment variable {self._stage.api_key_env} {state}, set it and run again"
            )
        if status in (404, 405) or 300 <= status < 400:
            if location := headers.get("Location"):
                where += f" and points to {self._clean(addresses.without_secrets(location))}, which is not followed"
            return ConfigError(
                f"{where}; check models.captioner.base_url (up to and with /v1) and the name {self._stage.model.name!r}"
            )
        if status == 400 and "max_tokens" in payload and "max_completion_tokens" in said:
            self._length_key = "max_completion_tokens"  # OpenAI's newer name for the same
            return _Failed(Reason.CAPTION_SERVER_ERROR, detail, wait_s=0.0)
        after = headers.get("Retry-After")
        wait = retry_after(after) if after else None
        if wait is not None:
            detail = with_retry_after(detail, wait)
        if status == 429:
            return _Failed(Reason.CAPTION_RATE_LIMITED, detail, wait_s=wait)
        if status == 408:
            return _Failed(Reason.CAPTION_TIMEOUT, detail, wait_s=wait)
        if status >= 500 or status in (409, 425):
            return _Failed(Reason.CAPTION_SERVER_ERROR, detail, wait_s=wait)
        if 400 <= status < 500:
            return _Rejected(detail)
        return _Failed(Reason.CAPTION_MALFORMED, f"{detail} is no answer to this request")

    async def _check_understood(self, rejected: _Rejected) -> None:
        """Find out whether a rejected request was wrong because of its image: a plain picture is sent, once, in the
        slot of that request.

        Raises:
            ConfigError: that is rejected too, so the config is wrong.
        """
        async with self._probing:
            if self._understood:
                return
            try:
                await self._attempt(_probe_url(), 0)
            except _Rejected as again:
                raise ConfigError(
                    f"models.captioner: the endpoint {self._stage.base_url} answers {again.detail}, also to a plain "
                    f"picture; check the name {self._stage.model.name!r}, that the model takes images, and caption"
                ) from None
            except _Failed as failure:
                if failure.reason in DEFERRED:  # nothing is known of the request then
                    before = rejected.detail[: max(0, _MAX_DETAIL - len(failure.detail) - len("; then "))]
                    raise _Failed(failure.reason, f"{before}; then {failure.detail}", wait_s=float("inf")) from None

    def _clean(self, text: str) -> str:
        """Words of the endpoint for a message or a detail: one line, short, without the key."""
        line = caption_text(text)  # first, since characters that are dropped could hide the key
        if self._key and len(self._key) >= _MIN_SECRET:
            line = line.replace(self._key, "[key]")
        return line[:250]


async def _all(work: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Results in order; the first failure cancels the rest."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """The body, capped while it streams in."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > _MAX_BODY:
            response.close()
            if response.status != 200:
                break
            raise _Failed(Reason.CAPTION_MALFORMED, f"the answer has more than {_MAX_BODY} bytes")
    return bytes(body)


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


def _used(answer: dict[str, Any]) -> int:
    """Tokens that the answer says it has; 0 where it does not say."""
    usage = answer.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return tokens if isinstance(tokens, int) else 0


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


# -- the text ---------------------------------------------------------------------------------------------------------

_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_RESIDUE = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<\uff5c[^<>]{1,40}\uff5c>|</?s>|<</?SYS>>|\[/?INST\]|<(?:start|end)_of_turn>|</?think>"
    r"|<(?:image|pad|unk|bos|eos)>|\A(?:assistant|user|system|human|gpt)\s*:",
    re.IGNORECASE,
)
"""Tokens of chat templates and role names: a model that went on writing the conversation."""
_REFUSAL = re.compile(
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|\A(?:unfortunately,? |apologies,? (?:but )?)?(?:i['\u2019]?m|i am) (?:\w+ )?(?:sorry|unable|not able)\b"
    r"|\A(?:i apologi[sz]e|my apologies|sorry,? (?:but )?(?:i|there|this|that)\b)"
    r"|\A(?:unfortunately,? )?i (?:can ?not|can['\u2019]?t|won['\u2019]?t|will not|do not|don['\u2019]?t) (?:\w+ )?"
    r"(?:provide|assist|help|describe|identify|see|view|comply|fulfill?|process|analy[sz]e|access|determine|have)\b"
    r"|\bno image (?:was|is|has been) (?:provided|attached|uploaded)\b"
    r"|\bplease (?:upload|provide|attach) (?:an|the) image\b",
    re.IGNORECASE,
)
_KEPT_FORMATS = frozenset("\u200c\u200d")
"""Joiners, which Persian and emoji need; other format characters (bidi controls, tags) can hide text."""


def caption_text(raw: str) -> str:
    """An answer as one line of text: thoughts of a reasoning model, control, format and bidi characters, surrogates and
    unassigned code points are dropped, runs of white space become a space."""
    text = _THOUGHTS.sub("", raw)
    kept = (_character(c) for c in text) if not text.isascii() or not text.isprintable() else text
    line = " ".join("".join(kept).split())
    return line if line.strip("\u200c\u200d ") else ""


def _character(character: str) -> str:
    kind = unicodedata.category(character)
    if kind == "Cc":
        return " " if character.isspace() else ""
    return "" if kind[0] == "C" and character not in _KEPT_FORMATS else character


def refusal_or_residue(text: str) -> Reason | None:
    """Why a model's text is no caption: it declines, or holds tokens of a chat template. None for a caption."""
    if _RESIDUE.search(text):
        return Reason.CAPTION_MALFORMED
    return Reason.CAPTION_REFUSED if _REFUSAL.search(text) else None
