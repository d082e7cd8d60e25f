"""The folder through which driver and workers of a pipeline hand each other what is too large, or comes too early, for
the pipeline: units and rows in, finished units and answers out.

A pipeline gives its results at its end, and some runners never give any to the driver. So the last step writes each
result as a file whose name says what it is about, and the driver takes it while the pipeline runs: commits and progress
stream on every runner, and a bundle that a runner does twice writes the same file.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import json
import os
import posixpath
import traceback
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.pool import RemoteTraceback  # type: ignore[attr-defined]
from typing import NoReturn

from pairmill import errors, storage
from pairmill.store import Dataset

FOLDER = "_beam"
"""Folder of the outboxes, in the dataset. It is there while a pipeline runs, or when a run was killed."""

Place = tuple[str, int, int]
"""Where something lies in an outbox: the file, its first byte, and the one after its last."""

ERROR = ".error"
"""Behind the name of a result: what was met in its place, see `raise_error`."""

_OPEN = "open"
_OUT = "out"
_TEMPORARY = ".tmp"


@dataclass(frozen=True)
class Outbox:
    """The folder of one pipeline. Picklable: workers open it by the dataset's URL."""

    dataset: str
    pipeline: str

    @classmethod
    def make(cls, dataset: str) -> Outbox:
        """A new one, open."""
        outbox = cls(dataset, uuid.uuid4().hex[:12])
        if outbox._store.local:
            os.makedirs(outbox._path(_OUT), exist_ok=True)
        outbox._write(outbox._path(_OPEN), b"")
        return outbox

    @property
    def _store(self) -> Dataset:
        return _opened(self.dataset)

    def _path(self, *parts: str) -> str:
        return self._store.path(FOLDER, self.pipeline, *parts)

    # -- what goes in --

    def put_parts(self, name: str, parts: Iterable[bytes]) -> list[Place]:
        """Write one file of many parts, none of them empty, as they come; returns where each lies."""
        places, start = [], 0
        path = self._path(name)
        with storage.explained(f"cannot write {path}"), self._store.fs.open(path, "wb") as file:
            for part in parts:
                file.write(part)
                places.append((name, start, start + len(part)))
                start += len(part)
        return places

    def read_part(self, place: Place) -> bytes:
        """One part of a file of `put_parts`."""
        name, start, end = place
        path = self._path(name)
        with storage.explained(f"cannot read {path}"):
            return bytes(self._store.fs.cat_file(path, start=start, end=end))

    # -- what comes out --

    def is_open(self) -> bool:
        """Whether the driver still waits. Workers ask before each piece of work, so that the pipeline of a driver that
        was interrupted or killed comes to an end even where nobody can cancel it."""
        return bool(self._store.fs.exists(self._path(_OPEN)))

    def put(self, name: str, data: bytes) -> None:
        """Write a result; once more is the same."""
        self._write(self._path(_OUT, name), data)

    def put_error(self, name: str, error: Exception) -> None:
        """Write what was met in the place of a result. A runner that was told would try again and again, and tell the
        driver in words of its own, or not at all."""
        kind = next((k for k in type(error).__mro__ if getattr(errors, k.__name__, None) is k), type(error))
        told = [kind.__module__, kind.__qualname__, str(error), "".join(traceback.format_exception(error))]
        self._write(self._path(_OUT, name + ERROR), json.dumps(told).encode())

    def take(self) -> Iterator[tuple[str, bytes]]:
        """The results that are there, each removed when it was read; and, with `ERROR` behind the names, what was met
        in the place of results."""
        fs, folder = self._store.fs, self._path(_OUT)
        with storage.explained(f"cannot read {folder}"):
            try:
                names = sorted(posixpath.basename(str(path)) for path in fs.ls(folder, detail=False))
            except FileNotFoundError:  # object stores have no empty folders
                return
            for name in names:
                if not name.endswith(_TEMPORARY):
                    path = self._path(_OUT, name)
                    data = bytes(fs.cat_file(path))
                    fs.rm_file(path)
                    yield name, data

    def shut(self) -> None:
        """Tell the workers that nobody waits any longer."""
        path = self._path(_OPEN)
        with storage.explained(f"cannot remove {path}"), contextlib.suppress(FileNotFoundError):
            self._store.fs.rm_file(path)

    def remove(self) -> None:
        """Remove everything."""
        _remove(self._store, self._path())

    def _write(self, path: str, data: bytes) -> None:
        with storage.explained(f"cannot write {path}"):
            if not self._store.local:  # an object is there whole, or not at all
                self._store.fs.pipe_file(path, data)
                return
            temporary = f"{path}.{uuid.uuid4().hex[:8]}{_TEMPORARY}"
            with open(temporary, "wb") as file:
                file.write(data)
            os.replace(temporary, path)


def raise_error(data: bytes) -> NoReturn:
    """Raise what `Outbox.put_error` wrote: an error of pairmill's or of Python's own as it was, any other as a
    RuntimeError with its name; its cause has the traceback."""
    module, name, message, trace = json.loads(data)
    if module == errors.__name__:
        raise getattr(errors, name)(message)
    error: Exception = RuntimeError(f"{name}: {message}")
    if module == builtins.__name__:
        with contextlib.suppress(TypeError):  # one that is made of more than a message
            error = getattr(builtins, name)(message)
    raise error from RemoteTraceback(f"\n{trace}")


def clear(dataset: str) -> None:
    """Remove what pipelines of runs that were killed left in a dataset, though their workers may still write there."""
    store = _opened(dataset)
    folder = store.path(FOLDER)
    with storage.explained(f"cannot remove {folder}"), contextlib.suppress(FileNotFoundError):
        for path in store.fs.ls(folder, detail=False):
            _remove(store, str(path).rstrip("/"))
        store.fs.rm(folder, recursive=True)


def _remove(store: Dataset, path: str) -> None:
    with storage.explained(f"cannot remove {path}"), contextlib.suppress(FileNotFoundError):
        if store.local:  # under another name nobody puts anything into it while it goes
            path, was = f"{path}.gone", path
            os.rename(was, path)
        else:
            with contextlib.suppress(FileNotFoundError):
                store.fs.rm_file(posixpath.join(path, _OPEN))  # first of all
        store.fs.rm(path, recursive=True)


@functools.lru_cache(maxsize=8)
def _opened(url: str) -> Dataset:
    return Dataset(url)
