"""Proof that what was taken down is gone: every file of a dataset and of its exports is read.

Parquet files are decoded, whatever version names them or none, and tars are unpacked; all else is read as bytes.
An image file is known by the hash of its bytes, too.
Compared are uids, the hashes of URLs, of their domains and of images: those in columns, and those of the stored bytes.
Where the values themselves are given, their bytes are looked for too, in every file and in every decoded text.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pairmill.errors import ConfigError
from pairmill.export.registry import known_exports
from pairmill.report.progress import Reporter
from pairmill.report.text import without_secrets
from pairmill.store import Dataset
from pairmill.takedown.search import booleans
from pairmill.takedown.selectors import Selectors
from pairmill.tombstones import TOMBSTONES_TABLE, Tombstones, address_of
from schemas import fields

LITERALS = 64
"""Values whose bytes are looked for one by one, at most; of longer lists only whole URLs and hashes are found."""

TRACES = 1000
"""Traces that are listed; all are counted."""

CHUNK = 2**22
"""Bytes that are in memory of a file that is read as bytes, besides a short piece of the chunk before."""

SLIM_ROWS = 100_000
"""Rows of a file without images that are decoded together."""

_HEX = re.compile(rb"(?=([0-9a-f]{64}))")
_URL = re.compile(rb"[a-zA-Z][a-zA-Z0-9+.\-]*://[^\s\"'<>\\]+")
_LONGEST = 16_384
"""Bytes of a value that may lie across two chunks."""
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".avif")


@dataclass(frozen=True)
class Trace:
    """A place where something of what was taken down is left."""

    file: str
    where: str
    """Column, member of a tar, or byte."""
    what: str
    """uid, url, domain, sha256: what was found; the value itself is not shown."""
    uid: str | None = None
    """The pair whose row it is."""


@dataclass(frozen=True)
class Absence:
    """What a check read and found."""

    checked: dict[str, int]
    """How many tombstones, or given values, of each kind were looked for."""
    files: int
    rows: int
    """Rows of Parquet files that were decoded."""
    bytes: int
    exports: tuple[str, ...]
    """Exports that were read."""
    out_of_reach: tuple[str, ...]
    """Exports that could not be read: they are gone, or not reachable from here."""
    found: int
    """How many traces there are."""
    traces: tuple[Trace, ...]
    """The first of them."""
    unread: tuple[str, ...]
    """Files that cannot be decoded, so nobody knows what they hold."""

    @property
    def absent(self) -> bool:
        """Whether nothing is left in all that could be reached."""
        return not self.found and not self.unread


@dataclass
class _Result:
    rows: int = 0
    bytes: int = 0
    traces: list[Trace] = field(default_factory=list)
    unread: bool = False


def check_absence(dataset: Dataset, selectors: Selectors, reporter: Reporter) -> Absence:
    """Look for what was taken down, in every file of a dataset and of the exports it knows.

    Args:
        dataset: Where to look.
        selectors: What to look for; all tombstones when there are none.
        reporter: Told how it goes.

    Raises:
        ConfigError: there is no dataset, or nothing to look for.
    """
    if not dataset.exists():
        raise ConfigError(f"{dataset.url} is no pairmill dataset, so there is nothing to check")
    stones = Tombstones.of(selectors.tombstones("check")) if selectors else Tombstones.load(dataset)
    if not stones:
        raise ConfigError(f"nothing was ever taken down from {dataset.url}; say what to look for, such as --url U")
    with dataset.reading():
        fs, root = dataset.fs, dataset.root
        files = [(fs, path, path[len(root) :].lstrip("/")) for path in _find(fs, root)]
        reached: list[str] = []
        out_of_reach: list[str] = []
        for known in known_exports(dataset):
            found = _files_of(known.out)
            (out_of_reach if found is None else reached).append(known.out)
            files += found or []
        reporter.start("checking files", len(files), "files")
        total, unread = _Result(), []
        needles = _Needles(stones, selectors)
        with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
            for (_, _, name), result in zip(files, pool.map(lambda f: _check(needles, *f), files), strict=True):
                total.rows += result.rows
                total.bytes += result.bytes
                total.traces += result.traces
                unread += [name] if result.unread else []
                reporter.advance(1, {})
        reporter.finish()
    counts = {"url": stones.urls, "domain": stones.domains, "uid": stones.uids, "sha256": stones.sha256 | stones.pixels}
    return Absence(
        selectors.asked if selectors else {kind: len(values) for kind, values in counts.items() if values},
        len(files),
        total.rows,
        total.bytes,
        tuple(reached),
        tuple(out_of_reach),
        len(total.traces),
        tuple(total.traces[:TRACES]),
        tuple(unread),
    )


def _find(fs: Any, root: str) -> list[str]:
    return sorted(str(path) for path in fs.find(root))


def _files_of(out: str) -> list[tuple[Any, str, str]] | None:
    """The files of an export; None when it cannot be reached."""
    try:
        fs, root = fsspec.core.url_to_fs(out)
        if not fs.isdir(root):
            return None
        start, shown = len(root.rstrip("/")) + 1, without_secrets(out)
        return [(fs, path, f"{shown}/{path[start:]}") for path in _find(fs, root)]
    except Exception:  # noqa: BLE001 (whatever a file system of fsspec raises: it is listed as out of reach)
        return None


class _Needles:
    """What is looked for."""

    def __init__(self, stones: Tombstones, selectors: Selectors) -> None:
        self.stones = stones
        self.hashes = stones.uids | stones.sha256 | stones.pixels
        self.hash_array = pa.array(sorted(self.hashes), pa.string())
        urls = [spelling for url in selectors.urls for spelling in (url, address_of(url)) if spelling]
        known = [("url", url.encode("utf-8", "surrogatepass")) for url in dict.fromkeys(urls)]
        secret = [("uid", uid.encode()) for uid in selectors.uids] + [("sha256", h.encode()) for h in selectors.sha256]
        few = len(known) + len(secret) + len(selectors.domains) <= LITERALS
        self.literals = known if few else []
        self.hash_literals = secret if few else []
        self.hosts = [(domain, _host_pattern(domain)) for domain in selectors.domains] if few else []

    def of_url(self, url: str) -> str | None:
        """url or domain, where the URL is barred."""
        if not self.stones.bars("", url):
            return None
        return "url" if Tombstones(urls=self.stones.urls).bars("", url) else "domain"

    def in_bytes(self, data: bytes, *, listed: bool) -> Iterator[tuple[int, str]]:
        """Literal values: place and kind. `listed`: the data is of the tombstones, which hold hashes on purpose."""
        for kind, literal in self.literals if listed else (*self.literals, *self.hash_literals):
            place = data.find(literal)
            while place >= 0:
                yield place, kind
                place = data.find(literal, place + 1)
        small = data.lower() if self.hosts else b""
        for domain, pattern in self.hosts:
            if domain.encode() in small:
                yield from ((match.start(), "domain") for match in pattern.finditer(data))

    def in_tokens(self, data: bytes) -> Iterator[tuple[int, str]]:
        """What looks like a hash or like a URL: place and kind."""
        if self.hashes:
            for match in _HEX.finditer(data):
                token = match[1].decode("ascii")
                if token in self.hashes:
                    yield match.start(), "uid" if token in self.stones.uids else "sha256"
        if self.stones.urls or self.stones.domains:
            for match in _URL.finditer(data):
                url = match[0].decode("utf-8", "replace")
                kind = self.of_url(url) or self.of_url(url.rstrip(".,;:)]}"))
                if kind:
                    yield match.start(), kind


def _host_pattern(domain: str) -> re.Pattern[bytes]:
    """A domain, or one below it, as the host of a URL."""
    name = re.escape(domain).encode()
    return re.compile(rb"(?i)//(?:[^/?#\s\"'<>@]*@)?(?:[a-z0-9_-]+\.)*" + name + rb"(?![a-z0-9_-])(?!\.[a-z0-9])")


def _check(needles: _Needles, fs: Any, path: str, name: str) -> _Result:
    """Read one file."""
    result = _Result()
    listed = name.startswith(f"{TOMBSTONES_TABLE}/")
    ending = posixpath.splitext(path)[1]
    try:
        if not listed:
            result.traces += [Trace(name, "its name", kind) for _, kind in needles.in_tokens(name.encode())]
        in_parts = ending in (".parquet", ".tar")
        _bytes(needles, fs, path, name, result, listed=listed, tokens=not in_parts and not listed)
        if ending == ".parquet" and not listed:
            _parquet(needles, fs, path, name, result)
        elif ending == ".tar":
            _tar(needles, fs, path, name, result)
        elif ending == ".tmp" and "/shard=" in f"/{name}":
            result.unread = True  # half a Parquet file
    except FileNotFoundError:
        return _Result()  # a run has just finished or removed it
    except (OSError, pa.ArrowException, tarfile.TarError):
        result.unread = True
    return result


def _bytes(needles: _Needles, fs: Any, path: str, name: str, result: _Result, *, listed: bool, tokens: bool) -> None:
    looks = bool(needles.literals or needles.hash_literals or needles.hosts) or tokens
    digest = hashlib.sha256() if name.lower().endswith(_PICTURES) and needles.stones.sha256 else None
    if not looks:
        result.bytes += int(fs.size(path))
        return
    seen: set[tuple[int, str]] = set()
    with fs.open(path, "rb") as file:
        start, rest = 0, b""
        while chunk := file.read(CHUNK):
            data = rest + chunk
            if digest:
                digest.update(chunk)
            seen.update((start + place, kind) for place, kind in needles.in_bytes(data, listed=listed))
            if tokens:
                seen.update((start + place, kind) for place, kind in needles.in_tokens(data))
            result.bytes += len(chunk)
            rest = data[-_LONGEST:]
            start += len(data) - len(rest)
    result.traces += [Trace(name, f"byte {place}", kind) for place, kind in sorted(seen)]
    if digest and digest.hexdigest() in needles.stones.sha256:
        result.traces.append(Trace(name, "the image", "sha256"))


def _tar(needles: _Needles, fs: Any, path: str, name: str, result: _Result) -> None:
    with fs.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            opened = tar.extractfile(member)
            if opened is None:
                continue
            data = opened.read()
            if member.name.lower().endswith(_PICTURES):
                if hashlib.sha256(data).hexdigest() in needles.stones.sha256:
                    result.traces.append(Trace(name, member.name, "sha256"))
            else:
                result.traces += [Trace(name, member.name, kind) for _, kind in needles.in_tokens(data)]


def _parquet(needles: _Needles, fs: Any, path: str, name: str, result: _Result) -> None:
    with fs.open(path, "rb") as file:
        parquet = pq.ParquetFile(file)
        schema = parquet.schema_arrow
        bulky = any(pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type) for f in schema)
        if not bulky and parquet.metadata.num_rows <= SLIM_ROWS:
            parts = iter([parquet.read()])
        else:
            parts = (parquet.read_row_group(group) for group in range(parquet.num_row_groups))
        for rows in parts:
            result.rows += rows.num_rows
            for column in schema.names:
                for row, kind in sorted(set(_column(needles, rows.column(column).combine_chunks(), column))):
                    uid = rows.column(fields.UID.name)[row].as_py() if fields.UID.name in schema.names else None
                    result.traces.append(Trace(name, f"column {column}", kind, uid))


def _column(needles: _Needles, values: pa.Array, name: str) -> Iterator[tuple[int, str]]:
    """Row and kind of what is found in a column, however nested."""
    kind = values.type
    if pa.types.is_struct(kind):
        for i, child in enumerate(values.flatten()):
            yield from _column(needles, child, kind.field(i).name)
    elif pa.types.is_map(kind):
        entries = pa.StructArray.from_arrays([values.keys, values.items], ["key", "value"])
        yield from _column(needles, pa.ListArray.from_arrays(values.offsets, entries), name)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        parents = pc.list_parent_indices(values)
        for row, found in _column(needles, pc.list_flatten(values), name):
            yield parents[row].as_py(), found
    elif pa.types.is_dictionary(kind):
        yield from _column(needles, values.dictionary_decode(), name)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        yield from _strings(needles, values, name)
    elif (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)) and needles.stones.sha256:
        for row in range(len(values)):
            data = values[row].as_buffer()
            if data is not None and hashlib.sha256(data).hexdigest() in needles.stones.sha256:
                yield row, "sha256"


def _strings(needles: _Needles, values: pa.Array, name: str) -> Iterator[tuple[int, str]]:
    stones = needles.stones
    if needles.hashes:
        for row in pc.indices_nonzero(booleans(pc.is_in(values, value_set=needles.hash_array))).to_pylist():
            yield row, "uid" if values[row].as_py() in stones.uids else "sha256"
    if stones.urls or stones.domains:
        is_url = name == fields.URL.name or name.endswith("_url")
        picked = pc.is_valid(values) if is_url else pc.fill_null(pc.match_substring(values, "://"), False)
        if pc.any(picked).as_py():
            distinct = pc.unique(values.filter(picked))
            guilty = distinct.filter(stones.bars_urls(distinct))
            if len(guilty):
                for row in pc.indices_nonzero(booleans(pc.is_in(values, value_set=guilty))).to_pylist():
                    yield row, needles.of_url(values[row].as_py()) or "url"
    for kind, literal in (*needles.literals, *needles.hash_literals):
        found = pc.match_substring(values.cast(pa.binary()), literal)
        for row in pc.indices_nonzero(booleans(found)).to_pylist():
            yield row, kind
    for domain, pattern in needles.hosts:
        maybe = pc.match_substring(values, domain, ignore_case=True)
        for row in pc.indices_nonzero(booleans(maybe)).to_pylist():
            if pattern.search(values[row].as_py().encode("utf-8", "surrogatepass")):
                yield row, "domain"
