"""What was taken down for good: hashes only, so that the list itself says nothing of what it forbids."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from pairmill.store import Dataset

TOMBSTONES_TABLE = "tombstones"

Kind = Literal["url", "domain", "uid", "sha256", "pixels"]
"""What a tombstone forbids: an URL, a domain with all below it, a pair, an image by the sha256 of its bytes as fetched
or of its pixels."""

TOMBSTONES = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),
        pa.field("hash", pa.string(), nullable=False),
        pa.field("request", pa.string(), nullable=False),
        pa.field("at", pa.string(), nullable=False),
        pa.field("done", pa.bool_(), nullable=False),
    ]
)
"""The tombstones table. ``hash``: sha256 (hex) of the URL or of the domain in lower case; a uid, and the hash of an
image, are hashes already. ``request``: which `pairmill forget` it belongs to. ``at``: UTC, ISO 8601. ``done``: a record
of the same request with ``done`` true and no hash follows when all it names is physically gone."""


def hashed(value: str) -> str:
    """sha256 of a text, hex."""
    return hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()


def domains_of(url: str) -> list[str]:
    """The host of a URL and the domains above it, in lower case without a final dot: ``a.b.example``, ``b.example``,
    ``example``. Empty for what has no host."""
    from urllib.parse import urlsplit

    try:
        host = (urlsplit(url.strip()).hostname or "").rstrip(".").lower()
    except ValueError:
        return []
    with contextlib.suppress(UnicodeError):
        host = host.encode("idna").decode() if not host.isascii() else host
    parts = host.split(".") if host else []
    return [".".join(parts[i:]) for i in range(len(parts))]


@dataclass(frozen=True)
class Tombstones:
    """All tombstones of a dataset, by kind."""

    version: int = -1
    """Version of their table; -1 when there is none."""
    urls: frozenset[str] = frozenset()
    domains: frozenset[str] = frozenset()
    uids: frozenset[str] = frozenset()
    sha256: frozenset[str] = frozenset()
    pixels: frozenset[str] = frozenset()
    open_requests: tuple[str, ...] = field(default=())
    """Requests that are not carried out yet: their rows may still be in some file."""

    def __bool__(self) -> bool:
        return bool(self.urls or self.domains or self.uids or self.sha256 or self.pixels)

    @classmethod
    def load(cls, dataset: Dataset) -> Tombstones:
        """The tombstones that a dataset has now."""
        records = dataset.records(TOMBSTONES_TABLE, TOMBSTONES)
        version = records.version()
        return cls() if version < 0 else cls.of(records.rows(), version)

    @classmethod
    def of(cls, rows: Iterable[dict[str, Any]], version: int = -1) -> Tombstones:
        """Tombstones from records."""
        by_kind: dict[str, set[str]] = {}
        requests: dict[str, bool] = {}
        for row in rows:
            requests[row["request"]] = requests.get(row["request"], False) or row["done"]
            if not row["done"]:
                by_kind.setdefault(row["kind"], set()).add(row["hash"])
        url, domain, uid, sha256, pixels = (
            frozenset(by_kind.get(kind, ())) for kind in ("url", "domain", "uid", "sha256", "pixels")
        )
        waiting = tuple(sorted(name for name, done in requests.items() if not done))
        return cls(version, url, domain, uid, sha256, pixels, waiting)

    def bars(self, uid: str, *urls: str | None) -> bool:
        """Whether a pair may not be here: by its uid, or by one of its URLs."""
        if uid in self.uids:
            return True
        for url in urls:
            if url and self.urls and hashed(url) in self.urls:
                return True
            if url and self.domains and any(hashed(domain) in self.domains for domain in domains_of(url)):
                return True
        return False

    def bars_pairs(self, uids: pa.ChunkedArray, urls: Sequence[pa.ChunkedArray]) -> pa.Array:
        """`bars` for many pairs; booleans. Each URL is looked at once."""
        barred = pc.is_in(uids, value_set=pa.array(sorted(self.uids), pa.string()))
        barred = barred.combine_chunks() if isinstance(barred, pa.ChunkedArray) else barred
        if self.urls or self.domains:
            for column in urls:
                distinct = pc.unique(column).drop_null()
                guilty = [url for url in distinct.to_pylist() if self.bars("", url)]
                found = pc.is_in(column, value_set=pa.array(guilty, pa.string()))
                barred = pc.or_(barred, found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found)
        return barred

    def bars_images(self, sha256: pa.ChunkedArray, pixels: pa.ChunkedArray) -> pa.Array:
        """Whether images may not be here, by the hash of their bytes or of their pixels; booleans."""
        found = [
            pc.is_in(column, value_set=pa.array(sorted(hashes), pa.string()))
            for column, hashes in ((sha256, self.sha256), (pixels, self.pixels))
        ]
        whole = [c.combine_chunks() if isinstance(c, pa.ChunkedArray) else c for c in found]
        return pc.or_(*whole)


def now() -> str:
    """The time, UTC, ISO 8601."""
    import datetime

    return datetime.datetime.fromtimestamp(time.time(), datetime.timezone.utc).isoformat(timespec="seconds")
