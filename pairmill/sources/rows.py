"""Rows on their way into the pairs table: one schema for all sources, and text that is always valid."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from schemas import fields
from schemas.reasons import Reason

SCHEMA = pa.schema(
    [
        fields.URL,
        fields.TEXT,
        fields.TEXTS,
        fields.BOXES,
        fields.LOCATOR,
        fields.EXTRA,
        fields.REASON,
        fields.DETAIL,
    ]
)
"""What every source yields."""

ROWS = 10_000
"""Rows a table."""
MAX_TEXT = 32_768
"""Characters of a text that are kept; far beyond any caption, and it bounds what one row can weigh."""
MAX_URL = 8_192
"""Characters of a URL; servers and browsers refuse longer ones. Longer (``data:`` URLs mostly) is a malformed row."""
MAX_BYTES = 1_024
"""Bytes of a binary value in `extra` that are kept; longer ones are left out."""
MAX_DEPTH = 64
"""Lists and objects within one another in a value of `extra`; deeper ones are null."""
EXCERPT = 200
"""Characters of a malformed row that are kept."""


@dataclass(slots=True)
class Row:
    """One row of a source."""

    url: str | None
    texts: list[tuple[str, str]]
    """Text and its source (web or human), the first is the pair's text."""
    boxes: list[dict[str, Any]] | None = None
    locator: str | None = None
    extra: str | None = None
    reason: str | None = None
    detail: str | None = None


def web_row(
    url: object,
    text: object,
    extra: str | None = None,
    locator: str | None = None,
    boxes: list[dict[str, Any]] | None = None,
) -> Row:
    """A row of a URL and one alt text, as a table or shard says them."""
    clean_url = clean(url, MAX_URL + 1).strip()
    alt = clean(text)
    texts = [(alt, "web")] if alt else []
    if not clean_url:
        return Row(None, texts, boxes, locator, extra, Reason.EMPTY_URL.value, "the URL is empty")
    if len(clean_url) > MAX_URL:
        whole = str(url).encode("utf-8", "replace")
        return malformed(whole, f"a URL of {len(str(url))} characters; at most {MAX_URL} are allowed")
    return Row(clean_url, texts, boxes, locator, extra)


def malformed(raw: bytes, detail: str) -> Row:
    """The row for raw bytes that are no row: their excerpt and digest are its text, so that it has a uid of its own."""
    excerpt = clean(raw[: 4 * EXCERPT].decode("utf-8", "replace"))[:EXCERPT]
    text = f"{excerpt} [{hashlib.sha256(raw).hexdigest()[:12]}]"
    return Row(None, [(text, "web")], reason=Reason.MALFORMED_ROW.value, detail=detail)


def clean(value: object, limit: int = MAX_TEXT) -> str:
    """A value as valid UTF-8 text: null is empty, no NUL, lone surrogates replaced, at most `limit` characters."""
    if value is None or value != value:  # NaN, which is what tables made with pandas hold for null
        return ""
    text = value if isinstance(value, str) else _words(value)
    if len(text) > limit:
        text = text[:limit]
    if "\x00" in text:
        text = text.replace("\x00", "")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            # surrogates that form a pair become their character, lone ones the replacement character
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _words(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, (list, dict)):
        return json.dumps(jsonable(value), ensure_ascii=False)
    return str(value)


def extra_json(values: dict[str, Any]) -> str | None:
    """Other columns of a source as a JSON object; null when there are none."""
    if not values:
        return None
    kept = {clean(k, 256): jsonable(v) for k, v in values.items()}
    return json.dumps(kept, ensure_ascii=False, separators=(",", ":"))


def jsonable(value: Any, depth: int = MAX_DEPTH) -> Any:
    """A value as JSON can say it: times in ISO 8601, short bytes in base64 (long ones, such as images, as
    null), NaN and infinity as null, texts cleaned, at most `depth` lists and objects within one another."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode() if len(value) <= MAX_BYTES else None
    if isinstance(value, (dict, list, tuple)):
        if not depth:
            return None
        if isinstance(value, dict):
            return {clean(str(k), 256): jsonable(v, depth - 1) for k, v in value.items()}
        return [jsonable(v, depth - 1) for v in value]
    return clean(str(value))


def to_table(rows: list[Row]) -> pa.Table:
    """Rows as a table of `SCHEMA`."""
    texts = [[{"text": text, "source": source} for text, source in row.texts] for row in rows]
    columns = [
        pa.array([row.url for row in rows], fields.URL.type),
        pa.array([row.texts[0][0] if row.texts else None for row in rows], fields.TEXT.type),
        pa.array(texts, fields.TEXTS.type),
        pa.array([row.boxes or [] for row in rows], fields.BOXES.type),
        pa.array([row.locator for row in rows], fields.LOCATOR.type),
        pa.array([row.extra for row in rows], fields.EXTRA.type),
        pa.array([row.reason for row in rows], fields.REASON.type),
        pa.array([row.detail for row in rows], fields.DETAIL.type),
    ]
    return pa.table(columns, schema=SCHEMA)


def tables(rows: Iterable[Row], size: int = ROWS) -> Iterator[pa.Table]:
    """Rows in tables of `size` rows; no table for no rows."""
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) >= size:
            yield to_table(batch)
            batch = []
    if batch:
        yield to_table(batch)
