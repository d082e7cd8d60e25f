"""JSON Lines as exports write them: one record a line, each beginning with the uid of its pair.

Reading is strict, so that nothing damaged is passed over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pairmill.export.folder import Sink
from pairmill.export.tar import Damaged

_START = re.compile(rb'\{"uid": "([0-9a-f]{64})", ')


def write(sink: Sink, uid: str, record: Mapping[str, Any]) -> None:
    """Write the record of a pair: at least one value, none of them called ``uid``."""
    if "uid" in record or not record:
        raise ValueError("a record has a value, and none that is called uid")
    sink.write(json.dumps({"uid": uid, **record}, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def lines(file: Any) -> Iterator[tuple[str, bytes]]:
    """The uid and the bytes of each line.

    Raises:
        Damaged: one is not what `write` writes.
    """
    return ((uid, line) for uid, line, _ in _read(file))


def records(file: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """As `lines`, parsed: the uid and the record, without the uid."""
    return ((uid, {name: value[name] for name in value if name != "uid"}) for uid, _, value in _read(file))


def uids(file: Any) -> Iterator[str]:
    """The uid of each line, of which no more is read: several times faster than `lines`.

    Raises:
        Damaged: a line does not begin as `write` begins it.
    """
    for number, line in enumerate(file, 1):
        found = _START.match(line)
        if not found:
            raise Damaged(f"line {number} is no record of a pair")
        yield found[1].decode("ascii")


def without_uid(line: bytes) -> bytes:
    """A line's record as it stands there, without the uid and without what ends the line."""
    found = _START.match(line)
    assert found
    return b"{" + line[found.end() : -1]


def _read(file: Any) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        found = _START.match(line)
        value = _parsed(line) if found and line.endswith(b"}\n") else None
        if not found or not isinstance(value, dict):
            raise Damaged(f"line {number} is no whole record of a pair")
        yield found[1].decode("ascii"), line, value


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
