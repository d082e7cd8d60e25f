"""Files of a source: paths, globs, folders and fsspec URLs."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pairmill import storage
from pairmill.errors import SourceError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: its name as a user would write it, absolute, so that any worker finds it."""

    name: str

    @property
    def ending(self) -> str:
        """The ending without ``.gz``, lower case, such as ``.csv``."""
        name = self.name.lower().removesuffix(".gz")
        return Path(name.split("?")[0]).suffix

    @property
    def compressed(self) -> bool:
        """Whether the file is gzip-compressed, by its name."""
        return self.name.lower().split("?")[0].endswith(".gz")


def find(path: str, endings: Sequence[str], what: str) -> list[SourceFile]:
    """The files that `path` means, in the order of their names: a file, a glob, or a folder (all files below it with
    one of `endings`).

    Raises:
        SourceError: there is no such file.
    """
    fs, inside = _filesystem(path, what)
    try:
        if _is_web(path):
            names = [path]
        elif any(c in inside for c in "*?[") and not fs.exists(inside):
            names = [_full_name(fs, name) for name in fs.glob(inside) if not fs.isdir(name)]
        elif fs.isdir(inside):
            names = [_full_name(fs, name) for name in fs.find(inside) if name.lower().endswith(tuple(endings))]
        else:
            names = [_full_name(fs, inside)] if fs.exists(inside) else []
    except (OSError, ValueError) as error:
        raise SourceError(f"{what} {path!r} cannot be listed: {error}") from error
    if not names:
        hint = f"; a folder must hold files ending in {', '.join(endings)}" if endings else ""
        raise SourceError(f"{what}: no file matches {path!r}. Check source.path in the config{hint}.")
    return [SourceFile(name) for name in sorted(names)]


def identities(path: str, endings: Sequence[str], what: str) -> list[tuple[str, str | None]]:
    """The files that `path` means, as `find` has them, and a hash of the name, size and times of each; None where
    nothing tells whether a file is as it was.

    Raises:
        SourceError: there is no such file.
    """
    fs, _ = _filesystem(path, what)
    local = "file" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)
    return [(file.name, _identity(fs, local, file.name)) for file in find(path, endings, what)]


def _identity(fs: Any, local: bool, name: str) -> str | None:
    if local:
        state = os.stat(name)
        told = [name, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
    elif _is_web(name):
        return None
    else:
        info = fs.info(name)
        mark = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("updated")
        if mark is None:
            return None
        told = [name, info.get("size"), str(mark)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


@contextmanager
def open_bytes(file: SourceFile) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed when its name ends in ``.gz``.

    Raises:
        SourceError: the file cannot be opened, or is damaged.
    """
    try:
        with storage.open_url(file.name) as raw:
            if file.compressed:
                with gzip.open(raw, "rb") as plain:
                    yield plain
            else:
                yield raw
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{file.name!r} cannot be read: {error}. Fetch the file again or leave it out.") from error


def column_missing(file: SourceFile, column: str, there: Iterable[str], key: str) -> SourceError:
    """The error for a column that a file lacks; it suggests the near one. `key` is the config's key."""
    names = list(there)
    near = _near(column, names)
    hint = f"Did you mean {near!r}? " if near else ""
    shown = ", ".join(repr(n) for n in names[:40]) or "none"
    return SourceError(
        f"{file.name!r} has no column {column!r}. {hint}Its columns: {shown}. Set source.{key} in the config."
    )


_ALIASES = (
    ("url", "image_url", "img_url", "link", "src"),
    ("text", "caption", "alt", "alt_text", "title", "top_caption"),
)


def _near(column: str, names: list[str]) -> str | None:
    by_lower = {name.lower(): name for name in names}
    candidates = [column.lower(), *(a for group in _ALIASES if column.lower() in group for a in group)]
    for candidate in candidates:
        if candidate in by_lower:
            return by_lower[candidate]
    close = difflib.get_close_matches(column.lower(), list(by_lower), n=1, cutoff=0.5)
    return by_lower[close[0]] if close else None


def _is_web(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def _filesystem(path: str, what: str) -> tuple[AbstractFileSystem, str]:
    import fsspec

    try:
        fs, inside = storage.open_fs(path) if path.startswith(("s3://", "s3a://")) else fsspec.core.url_to_fs(path)
    except (ImportError, ValueError, OSError) as error:  # some file systems connect at once
        raise SourceError(f"{what} {path!r}: {error}") from error
    return fs, inside


def _full_name(fs: Any, name: str) -> str:
    from fsspec.implementations.local import LocalFileSystem

    return str(Path(name).absolute()) if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(name)


def full_name(path: str) -> str:
    """A path as `SourceFile.name` has it: absolute, or with its protocol."""
    fs, inside = _filesystem(path, "source")
    return _full_name(fs, inside)


def is_folder(path: str) -> bool:
    """Whether the path is a folder that is there."""
    fs, inside = _filesystem(path, "source")
    return bool(fs.isdir(inside))


def read_if_there(path: str) -> bytes | None:
    """The whole file, or None when there is no such file."""
    fs, inside = _filesystem(path, "source")
    try:
        return fs.cat_file(inside)
    except FileNotFoundError:
        return None
