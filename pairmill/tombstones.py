"""What was taken down for good: hashes only, so that the list itself says nothing of what it forbids."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote, unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pairmill.store import Dataset
from schemas import fields
from schemas.reasons import Reason

TOMBSTONES_TABLE = "tombstones"

Kind = Literal["url", "domain", "uid", "sha256", "pixels"]
"""What a tombstone forbids: an URL, a domain with all below it, a pair, an image by the sha256 of its bytes as fetched
or of its pixels."""

NEAR = "near"
"""The kind of a record that forbids nothing: its request also asks for pairs whose image is near, and ``hash`` is the
least cosine."""

FOUND = "found:"
"""Before the kind of a tombstone that nobody asked for: a pair, or an image, that a request was found to name."""

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
    ``example``. An international host comes in its ASCII form, in both where IDNA 2003 and 2008 differ. Empty for what
    has no host."""
    try:
        host = urlsplit(url.strip()).hostname or ""
    except ValueError:
        return []
    found: dict[str, None] = {}
    for name in _ascii_hosts(unquote(host)):
        parts = name.rstrip(".").split(".")
        found.update(dict.fromkeys(".".join(parts[i:]) for i in range(len(parts))))
    found.pop("", None)
    return list(found)


def _ascii_hosts(host: str) -> list[str]:
    host = host.lower()
    if host.isascii():
        return [host]
    import idna

    found = []
    with contextlib.suppress(idna.IDNAError, UnicodeError):
        found.append(idna.encode(host, uts46=True).decode("ascii").lower())
    with contextlib.suppress(UnicodeError):
        found.append(host.encode("idna").decode("ascii").lower())
    return found or [host]


def address_of(url: str) -> str | None:
    """The address behind a URL, in one spelling for all that lead to it: scheme and host in lower case, without user,
    default port and fragment, what is not ASCII quoted. None for what has no scheme or no host."""
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not host or not parts.scheme:
        return None
    host = _ascii_hosts(unquote(host))[0].rstrip(".")
    place = f"[{host}]" if ":" in host else host
    if port is not None and port != _PORTS.get(parts.scheme):
        place += f":{port}"
    path = quote(parts.path, safe=_SAFE, errors="replace") or "/"
    query = f"?{quote(parts.query, safe=_SAFE, errors='replace')}" if parts.query else ""
    return f"{parts.scheme}://{place}{path}{query}"


_PORTS = {"http": 80, "https": 443}
_SAFE = "%/:=&?~+!$,;'@()*[]|"
"""Left as they are in paths and queries, as when an image is fetched."""

_PLAIN_HOST = r"^(?:https?)://(?P<host>[a-z0-9._-]+)(?::[0-9]+)?(?:[/?#]|$)"
"""URLs whose host can be read off as it is; all others are looked at one by one."""
_QUOTED = r"A-Za-z0-9%/:=&~+!$,;'@()*\[\]|._\-"
_PLAIN_ADDRESS = rf"^https?://[a-z0-9_-]+(?:\.[a-z0-9_-]+)*/[{_QUOTED}]*(?:\?[{_QUOTED}?]+)?$"
"""URLs that `address_of` leaves as they are."""


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
                by_kind.setdefault(row["kind"].removeprefix(FOUND), set()).add(row["hash"])
        url, domain, uid, sha256, pixels = (
            frozenset(by_kind.get(kind, ())) for kind in ("url", "domain", "uid", "sha256", "pixels")
        )
        waiting = tuple(sorted(name for name, done in requests.items() if not done))
        return cls(version, url, domain, uid, sha256, pixels, waiting)

    def bars(self, uid: str, *urls: str | None) -> bool:
        """Whether a pair may not be here: by its uid, or by one of its URLs."""
        return uid in self.uids or any(url and self._bars_url(url) for url in urls)

    def _bars_url(self, url: str) -> bool:
        if not url:
            return False
        if self.urls and (hashed(url) in self.urls or ((plain := address_of(url)) and hashed(plain) in self.urls)):
            return True
        return bool(self.domains) and any(hashed(domain) in self.domains for domain in domains_of(url))

    def bars_pairs(self, uids: pa.ChunkedArray, urls: Sequence[pa.ChunkedArray]) -> pa.Array:
        """`bars` for many pairs; booleans. Each URL is looked at once."""
        barred = _flat(pc.is_in(uids, value_set=pa.array(sorted(self.uids), pa.string())))
        if self.urls or self.domains:
            for column in urls:
                distinct = pc.unique(column).drop_null()
                found = pc.is_in(column, value_set=distinct.filter(self.bars_urls(distinct)))
                barred = pc.or_(barred, _flat(found))
        return barred

    def bars_urls(self, urls: pa.Array) -> pa.Array:
        """`bars` for distinct URLs; what can be told of many at once is."""
        barred = np.zeros(len(urls), bool)
        if self.urls:
            plain = pc.match_substring_regex(urls, _PLAIN_ADDRESS).to_numpy(zero_copy_only=False)
            for i, url in enumerate(urls.to_pylist()):
                barred[i] = hashed(url) in self.urls if plain[i] else self._bars_url(url)
        if self.domains:
            hosts = pc.struct_field(pc.extract_regex(urls, _PLAIN_HOST), "host")
            names = pc.unique(hosts).drop_null()
            guilty = [name for name in names.to_pylist() if self._bars_url(f"//{name}")]
            barred |= pc.is_in(hosts, value_set=pa.array(guilty, pa.string())).to_numpy(zero_copy_only=False)
            odd = np.flatnonzero(hosts.is_null().to_numpy(zero_copy_only=False))
            barred[odd] |= np.fromiter(map(self._bars_url, urls.take(pa.array(odd)).to_pylist()), bool, len(odd))
        return pa.array(barred)

    def bars_images(self, sha256: pa.ChunkedArray, pixels: pa.ChunkedArray) -> pa.Array:
        """Whether images may not be here, by the hash of their bytes or of their pixels; booleans."""
        found = [
            pc.is_in(column, value_set=pa.array(sorted(hashes), pa.string()))
            for column, hashes in ((sha256, self.sha256), (pixels, self.pixels))
        ]
        return pc.or_(*(_flat(column) for column in found))

    def without_images(self, rows: pa.Table) -> pa.Table:
        """Rows of an images table, those of images that may not be here with their reason and nothing else."""
        if not self or not {fields.SHA256.name, fields.PIXEL_SHA256.name} <= set(rows.column_names):
            return rows
        barred = self.bars_images(rows.column("sha256"), rows.column("pixel_sha256"))
        if fields.FINAL_URL.name in rows.column_names:
            barred = pc.or_(barred, self.bars_pairs(rows.column("uid"), [rows.column(fields.FINAL_URL.name)]))
        if not barred.true_count:
            return rows
        columns = {f.name: pc.if_else(barred, pa.scalar(None, f.type), _flat(rows.column(f.name))) for f in rows.schema}
        columns["uid"] = rows.column("uid")
        columns["reason"] = pc.if_else(barred, Reason.TAKEDOWN_IMAGE.value, _flat(rows.column("reason")))
        return pa.table(columns, schema=rows.schema)


def _flat(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def now() -> str:
    """The time, UTC, ISO 8601."""
    import datetime

    return datetime.datetime.fromtimestamp(time.time(), datetime.timezone.utc).isoformat(timespec="seconds")
