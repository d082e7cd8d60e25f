"""Captions from a vision-language model behind an OpenAI-compatible endpoint (vLLM, SGLang, Ollama, hosted ones).

What the endpoint says is untrusted, and that it answers at all is not to be relied on. An answer that is not there
(429, 5xx, time-out, connection) defers the pair, a later ``pairmill run --retry-deferred`` asks again; an answer that
is no caption (refused, malformed, cut off, empty) leaves that caption null, with the reason beside it; an answer that
concerns every request (wrong key, wrong model name) stops the run.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from captioners.completions import (
    BACKOFF_S,
    ChatClient,
    ChatRequest,
    Endpoint,
    Failed,
    Probe,
    Reasons,
    api_key,
    check_base_url,
    gather_all,
    one_line,
)
from filters.image_rules import missing_image, with_image
from pairmill.errors import ConfigError
from pairmill.models import ModelRef
from pairmill.sources.download import in_own_loop
from pairmill.stage import Batch, Kernel, Resources, Stage
from schemas import config, fields
from schemas.reasons import DEFERRED, Reason

if TYPE_CHECKING:
    from PIL import Image

SOURCE = "vlm"
PROMPTS = Path(__file__).parent / "prompts"

_BACKOFF_S = BACKOFF_S
_JPEG_QUALITY = 90

_REASONS = Reasons(
    Reason.CAPTION_RATE_LIMITED,
    Reason.CAPTION_SERVER_ERROR,
    Reason.CAPTION_TIMEOUT,
    Reason.CAPTION_CONNECTION,
    Reason.CAPTION_REFUSED,
    Reason.CAPTION_MALFORMED,
    Reason.CAPTION_CUT_OFF,
    Reason.CAPTION_EMPTY,
)


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
        client = _Captioner(self, api_key(self.base_url, self.api_key_env))

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
                if isinstance(answer, Failed):
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


# -- what is sent -----------------------------------------------------------------------------------------------------


def _data_url(data: bytes, rows: Batch, uid: str, side: int) -> str:
    """The image as a ``data:`` URL: the stored file where it is a JPEG that fits, else a smaller one of it."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as opened:  # reads the header only
        fits = opened.format == "JPEG" and opened.mode in ("RGB", "L") and max(opened.size) <= side
    if not fits:
        image = rows.pixels.decode(uid, lambda: data)
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


class _Captioner:
    """What a worker keeps from call to call; one session a call."""

    def __init__(self, stage: EndpointCaptions, key: str | None) -> None:
        self._stage = stage
        endpoint = Endpoint(
            "models.captioner",
            stage.base_url,
            str(stage.model.name),
            stage.api_key_env,
            stage.concurrency,
            stage.timeout_s,
            stage.retries,
            stage.max_retry_wait_s,
        )
        probe = Probe(
            lambda: self._request(_probe_url(), 0), "a plain picture", ", that the model takes images, and caption"
        )
        self._client = ChatClient(
            endpoint, key, _REASONS, probe, tidy=caption_text, fault=refusal_or_residue, backoff_s=_BACKOFF_S
        )

    async def caption(self, rows: Sequence[_Asked]) -> list[list[_Caption] | Failed]:
        """For each row its captions, or why the row is deferred."""
        async with self._client:
            return await gather_all([self._row(row) for row in rows])

    async def _row(self, row: _Asked) -> list[_Caption] | Failed:
        """All captions of a row, or none: when one cannot be had now, the others are not asked for either."""
        try:
            return await gather_all([self._sample(row, number) for number in range(self._stage.count)])
        except Failed as failure:
            return failure

    async def _sample(self, row: _Asked, number: int) -> _Caption:
        """One caption.

        Raises:
            Failed: with a reason of `DEFERRED`.
        """

        def request(anew: int) -> ChatRequest:
            return self._request(row.image, request_seed(self._stage.seed, row.uid, number, anew))

        try:
            completion = await self._client.ask(request, row.uid, anew=True)
        except Failed as failure:
            if failure.reason in DEFERRED:
                raise
            return _Caption(None, failure.reason, failure.detail)
        return _Caption(completion.text)

    def _request(self, image: str, seed: int) -> ChatRequest:
        stage = self._stage
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": stage.prompt.user}]
        messages = ({"role": "system", "content": stage.prompt.system}, {"role": "user", "content": content})
        return ChatRequest(messages, stage.max_tokens, stage.temperature, stage.top_p, seed)


# -- the text ---------------------------------------------------------------------------------------------------------

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
caption_text = one_line


def refusal_or_residue(text: str) -> Reason | None:
    """Why a model's text is no caption: it declines, or holds tokens of a chat template. None for a caption."""
    if _RESIDUE.search(text):
        return Reason.CAPTION_MALFORMED
    return Reason.CAPTION_REFUSED if _REFUSAL.search(text) else None
