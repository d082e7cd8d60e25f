"""What is kept of a request: a row of the usage ledger, and the lines of the journal."""

from __future__ import annotations

import datetime
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from schemas import fields

ANSWERS_TABLE = "answers"

ANSWERS = pa.schema(
    [
        fields.UID,
        pa.field("request", pa.string(), nullable=False),
        pa.field("digest", pa.string(), nullable=False),
        pa.field("purpose", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("at", pa.string(), nullable=False),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("finish", pa.string()),
        fields.DETAIL,
        pa.field("prompt_tokens", pa.int64(), nullable=False),
        pa.field("completion_tokens", pa.int64(), nullable=False),
        pa.field("estimated", pa.bool_(), nullable=False),
        pa.field("cost", pa.float64(), nullable=False),
        pa.field("seconds", pa.float32()),
    ]
)
"""The answers table, see `Answer`."""

ANSWERED, REFUSED, MALFORMED, CUT_OFF, EMPTY = "answered", "refused", "malformed", "cut_off", "empty"
LOST = "lost"
"""Outcomes. A lost answer was asked for and never came, whole: another time it may."""


@dataclass(frozen=True)
class Answer:
    """A row of the usage ledger: one request that was charged, or may have been."""

    uid: str
    request: str
    """Names the request: unique."""
    digest: str
    """sha256 (hex) over what was asked of which model."""
    purpose: str
    """What for: a kind of instruction."""
    model: str
    at: str
    """When it was asked; UTC, ISO 8601."""
    outcome: str
    """answered, refused, malformed, cut_off, empty or lost."""
    text: str | None
    finish: str | None
    """The endpoint's ``finish_reason``."""
    detail: str | None
    """What is wrong with an answer that cannot be used."""
    prompt_tokens: int
    completion_tokens: int
    estimated: bool
    """The endpoint did not say (or nothing that can be so) how many tokens it took; these are upper bounds."""
    cost: float
    """In the currency of the config's price."""
    seconds: float | None
    """From sending to the end of the answer."""

    @property
    def tokens(self) -> int:
        """Of prompt and answer."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Bound:
    """What a request may take at most."""

    prompt_tokens: int
    completion_tokens: int
    cost: float

    @property
    def tokens(self) -> int:
        """Of prompt and answer."""
        return self.prompt_tokens + self.completion_tokens


def usage_sql(answers: str) -> str:
    """SQL of the usage ledger over the answers table, which the query calls `answers`."""
    names = 'uid, purpose, model, "at" AS asked_at, outcome, prompt_tokens, completion_tokens, estimated, cost, seconds'
    return f"SELECT {names} FROM {answers}"  # noqa: S608 (a name of ours)


def utc_now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


# -- lines ------------------------------------------------------------------------------------------------------------


def line_of(event: str, values: Mapping[str, Any]) -> bytes:
    """An event as a line of JSON whose last field is the CRC-32 of what is before it."""
    body = json.dumps({"event": event, **values}, separators=(",", ":")).encode()[:-1]
    return b'%s,"crc32":"%08x"}\n' % (body, zlib.crc32(body))


def events(data: bytes) -> Iterator[dict[str, Any]]:
    """The events of whole lines; torn and damaged ones are left out."""
    for line in data.split(b"\n"):
        body, _, check = line.rpartition(b',"crc32":"')
        if body and check == b'%08x"}' % zlib.crc32(body):
            yield json.loads(body + b"}")


class Told:
    """What the lines of one session say of one shard."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        """By request."""
        self._asked: dict[str, dict[str, Any]] = {}
        self._freed: set[str] = set()

    def read(self, data: bytes) -> None:
        """Take in a file; the lines of a request may lie in several, in any order."""
        for event in events(data):
            kind, request = event.pop("event"), event["request"]
            if kind == "asked":
                self._asked[request] = event
            elif kind == "answered":
                self.answers[request] = Answer(**event)
            else:
                self._freed.add(request)

    def settled(self) -> list[Answer]:
        """All of it as rows, when nothing more comes: what got no answer is lost, and counts in full."""
        over = self._freed | self.answers.keys()
        missing = (event for request, event in self._asked.items() if request not in over)
        return [*self.answers.values(), *map(_lost, missing)]


def _lost(asked: Mapping[str, Any]) -> Answer:
    return Answer(
        outcome=LOST,
        text=None,
        finish=None,
        detail="the process that asked ended before an answer came",
        estimated=True,
        seconds=None,
        **asked,
    )


def sums(answers: Iterable[Answer]) -> tuple[int, float]:
    """Tokens and cost."""
    every = list(answers)
    return sum(answer.tokens for answer in every), sum(answer.cost for answer in every)
