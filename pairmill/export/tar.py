"""Tar files as the WebDataset export writes them; reading is strict, so that nothing damaged is passed over."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pairmill.export.folder import Sink
from pairmill.export.selection import ENDINGS

_BLOCK = tarfile.BLOCKSIZE


class Damaged(Exception):
    """A file that is not what its name says; the message says where."""


def add(tar: Sink, name: str, data: bytes | pa.Buffer) -> None:
    """Write a member."""
    size = memoryview(data).nbytes
    tar.write(header(name, size))
    tar.write(data)
    tar.write(b"\0" * (-size % _BLOCK))


def add_sample(tar: Sink, row: dict[str, Any], image: bytes | pa.Buffer) -> None:
    """Write the members of a sample, given its metadata as JSON values: the image, its first text, and the metadata."""
    key = row["key"]
    add(tar, f"{key}.{ENDINGS[row['format']]}", image)
    add(tar, f"{key}.txt", (row["caption"] or "").encode())
    add(tar, f"{key}.json", json.dumps(row, sort_keys=True, ensure_ascii=False).encode())


def end(tar: Sink) -> None:
    """Write what ends a tar."""
    tar.write(b"\0" * (2 * _BLOCK))
    tar.write(b"\0" * (-tar.tell() % tarfile.RECORDSIZE))


def header(name: str, size: int) -> bytes:
    """A member's header in POSIX ustar format, as `tarfile` writes it, which takes seven times as long: longer than
    writing a small image. It says nothing of this machine: mode 644, owner 0, time 0."""
    owner, time = b"0000000\0" * 2, b"00000000000\0"
    before = name.encode("ascii").ljust(100, b"\0") + b"0000644\0" + owner + b"%011o\0" % size + time
    after = b"0" + b"\0" * 100 + b"ustar\0" + b"00" + b"\0" * 247
    checksum = sum(before) + sum(after) + 8 * ord(" ")  # its own field counts as spaces
    return before + b"%06o\0 " % checksum + after


@dataclass(frozen=True)
class Sample:
    """Members of equal key, one after the other."""

    key: str
    uid: str
    start: int
    """Where its first header begins, in bytes."""
    end: int


def samples(file: Any) -> Iterator[Sample]:
    """The samples of an export's tar, read without their images.

    Raises:
        Damaged: it is no such tar, or not whole.
    """
    key: str | None = None
    uid: str | None = None
    start = end = 0
    for member in _members(file):
        stem, _, ending = member.name.partition(".")
        if stem != key:
            if key is not None:
                yield _sample(key, uid, start, end)
            key, uid, start = stem, None, member.start
        if ending == "json":
            file.seek(member.start + _BLOCK)
            uid = _uid(file.read(member.size))
        end = member.end
    if key is not None:
        yield _sample(key, uid, start, end)


@dataclass(frozen=True)
class _Member:
    name: str
    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + _BLOCK + self.size + -self.size % _BLOCK


def _members(file: Any) -> Iterator[_Member]:
    place = 0
    while True:
        file.seek(place)
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise Damaged(f"it breaks off at byte {place + len(block)}")
        if not any(block):
            break
        try:
            told = int(block[148:156].strip(b"\0 "), 8)
            size = int(block[124:136].strip(b"\0 "), 8)
            name = block[:100].rstrip(b"\0").decode("ascii")
        except ValueError:
            told = -1
        if told != sum(block) - sum(block[148:156]) + 8 * ord(" "):
            raise Damaged(f"there is no member at byte {place}")
        member = _Member(name, place, size)
        yield member
        place = member.end
    while block:
        if any(block):
            raise Damaged(f"there is something behind its end at byte {place}")
        block = file.read(2**16)


def _sample(key: str, uid: str | None, start: int, end: int) -> Sample:
    if uid is None:
        raise Damaged(f"the sample {key!r} has no JSON with a uid")
    return Sample(key, uid, start, end)


def _uid(data: bytes) -> str | None:
    try:
        found = json.loads(data).get("uid")
    except (ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, str) else None
