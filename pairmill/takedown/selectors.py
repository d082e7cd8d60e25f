"""What a takedown asks for: URLs, domains, pairs and images, from arguments and from lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pairmill.errors import ConfigError
from pairmill.report.text import shorten, visible
from pairmill.tombstones import NEAR, address_of, domains_of, hashed, now

KINDS = ("url", "domain", "uid", "sha256")
"""The first word of a line ``kind,value``."""

LONGEST = 65_536
"""Bytes of a line in a list, at most; nothing that can be taken down is longer."""

_HASH = re.compile(r"[0-9a-fA-F]{64}")
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.\-]*:")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Selectors:
    """What is to go. Make it with `of` or `read_list`, which check it."""

    urls: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    """In their ASCII form, lower case, without a dot at the end."""
    uids: tuple[str, ...] = ()
    sha256: tuple[str, ...] = ()
    """Hashes of images: of the bytes as fetched, or of the pixels."""
    near: float | None = None
    """Also pairs whose image embedding has at least this cosine with one that goes, or the very same image."""

    def __bool__(self) -> bool:
        return bool(self.urls or self.domains or self.uids or self.sha256)

    @classmethod
    def of(
        cls,
        *,
        urls: Iterable[str] = (),
        domains: Iterable[str] = (),
        uids: Iterable[str] = (),
        sha256: Iterable[str] = (),
        near: float | None = None,
    ) -> Selectors:
        """Selectors from values as people give them.

        Raises:
            ConfigError: a value is not what it should be; the message says which one.
        """
        if near is not None and not 0 < near <= 1:
            raise ConfigError(f"--near is a cosine above 0 and up to 1, such as 0.95; it is {near}")
        return cls(
            _distinct(_url(value) for value in urls),
            _distinct(_domain(value) for value in domains),
            _distinct(_hash(value, "uid") for value in uids),
            _distinct(_hash(value, "sha256") for value in sha256),
            near,
        )

    def __add__(self, other: Selectors) -> Selectors:
        return Selectors(
            _distinct((*self.urls, *other.urls)),
            _distinct((*self.domains, *other.domains)),
            _distinct((*self.uids, *other.uids)),
            _distinct((*self.sha256, *other.sha256)),
            self.near if other.near is None else other.near,
        )

    @property
    def asked(self) -> dict[str, int]:
        """How many there are of each kind."""
        counts = zip(KINDS, (self.urls, self.domains, self.uids, self.sha256), strict=True)
        return {kind: len(values) for kind, values in counts if values}

    def tombstones(self, request: str) -> list[dict[str, Any]]:
        """The records of the tombstones table that forbid these: hashes only."""
        urls = (spelling for url in self.urls for spelling in (url, address_of(url)) if spelling)
        marks = [("url", hashed(url)) for url in urls]
        marks += [("domain", hashed(domain)) for domain in self.domains]
        marks += [("uid", uid) for uid in self.uids]
        marks += [(kind, digest) for digest in self.sha256 for kind in ("sha256", "pixels")]
        marks += [(NEAR, repr(self.near))] if self.near is not None else []
        at = now()
        return [
            {"kind": kind, "hash": mark, "request": request, "at": at, "done": False}
            for kind, mark in dict.fromkeys(marks)
        ]


def read_list(lines: Iterable[bytes], name: str) -> Selectors:
    """Selectors from a list: one a line, ``kind,value`` or the value alone. Empty lines and lines that begin with ``#``
    say nothing. 64 hex digits alone are a uid or the hash of an image; both are tried.

    Raises:
        ConfigError: a line is not what it should be; the message says which one.
    """
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for number, raw in enumerate(lines, 1):
        try:
            line = _line(raw, first=number == 1)
            if not line or line.startswith("#") or (number == 1 and line.replace(" ", "") == "kind,value"):
                continue
            for kind, value in _item(line):
                found[kind].append(value)
        except ConfigError as error:
            raise ConfigError(f"{visible(name)}, line {number}: {error}; nothing was done") from error
    urls, domains, uids, sha256 = (_distinct(found[kind]) for kind in KINDS)
    return Selectors(urls, domains, uids, sha256)


def _line(raw: bytes, *, first: bool) -> str:
    if len(raw) > LONGEST:
        raise ConfigError(f"the line is longer than {LONGEST} bytes")
    try:
        return raw.decode("utf-8-sig" if first else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise ConfigError("the line is not UTF-8") from error


def _item(line: str) -> Sequence[tuple[str, str]]:
    """Kinds and values of a line."""
    kind, comma, value = line.partition(",")
    kind = kind.strip().lower()
    if comma and kind in KINDS:
        value = value.strip()
        if len(value) > 1 and value[0] == value[-1] == '"':  # as spreadsheets write values with a comma
            value = value[1:-1].replace('""', '"')
        check = {"url": _url, "domain": _domain}.get(kind)
        return [(kind, check(value) if check else _hash(value, kind))]
    if _HASH.fullmatch(line):
        return [("uid", line.lower()), ("sha256", line.lower())]
    if _SCHEME.match(line) and "/" in line:
        return [("url", _url(line))]
    if "." in line.strip("."):
        return [("domain", _domain(line))]
    raise ConfigError(
        f"{_shown(line)} is no URL with a scheme, no domain with a dot and no hash of 64 hex digits; "
        f"say what it is: {', '.join(f'{k},...' for k in KINDS)}"
    )


def _url(value: str) -> str:
    text = value.strip()
    if not text or _CONTROL.search(text):
        raise ConfigError(f"{_shown(value)} is no URL; it is empty or holds control characters")
    return text


def _domain(value: str) -> str:
    text = value.strip().removeprefix("*.").rstrip(".")
    plain = not _CONTROL.search(text) and not any(c in text for c in "/:?#@[] \\%")
    names = domains_of(f"//{text}") if plain and text else []
    name = names[0] if names else ""
    if not name or len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise ConfigError(f"{_shown(value)} is no domain; one is written such as example.com, without scheme and port")
    return name


def _hash(value: str, kind: str) -> str:
    text = value.strip()
    if not _HASH.fullmatch(text):
        raise ConfigError(f"{_shown(value)} is no {kind}; one has 64 hex digits")
    return text.lower()


def _shown(value: str) -> str:
    return repr(shorten(visible(value), 100))


def _distinct(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))
