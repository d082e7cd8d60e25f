"""The folder of an export: whole files only, and a manifest that is written last."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec

from pairmill.errors import ConfigError, StoreError

MANIFEST = "manifest.json"
"""Says what the export is and lists its files; a folder without it is no finished export."""
_BEGUN = ".export.json"
"""Says what an unfinished export is going to be."""


@dataclass(frozen=True)
class Written:
    """A file that was written: its name, its size in bytes and its sha256 (hex)."""

    name: str
    bytes: int
    sha256: str


class Sink(io.RawIOBase):
    """A file being written that counts and hashes what goes into it."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self._file = file
        self._digest = hashlib.sha256()
        self._size = 0

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any) -> int:
        """Append bytes."""
        self._file.write(data)
        self._digest.update(data)
        size = memoryview(data).nbytes
        self._size += size
        return size

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def written(self, name: str) -> Written:
        """What has been written."""
        return Written(name, self._size, self._digest.hexdigest())


class Folder:
    """A local folder or any URL that fsspec knows."""

    def __init__(self, url: str) -> None:
        self.fs, root = fsspec.core.url_to_fs(url)
        protocol = self.fs.protocol
        self._local = "file" in ([protocol] if isinstance(protocol, str) else protocol)
        self._root = os.path.abspath(root) if self._local else root.rstrip("/")
        self.url = self._root if self._local else url.rstrip("/")

    def begin(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """Claim the folder for an export, or find one that was begun before.

        Returns the manifest when the same export is there already, whole.

        Raises:
            ConfigError: the folder holds something else.
        """
        names = self._names()
        for name in (MANIFEST, _BEGUN):
            if name in names:
                found = self.read_json(name)
                if not isinstance(found, dict) or found.get("export") != identity:
                    raise ConfigError(
                        f"{self.url} holds another export ({_difference(found, identity)}); give an empty folder"
                    )
                return found if name == MANIFEST else None
        if names - {name for name in names if name.endswith(".tmp")}:
            raise ConfigError(f"{self.url} is not empty and holds no export; give a new folder")
        self.fs.makedirs(self._root, exist_ok=True)
        self.write_json(_BEGUN, {"export": identity})
        return None

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the manifest: from now on the export is whole."""
        self.write_json(MANIFEST, manifest)
        self.fs.rm_file(self._path(_BEGUN))
        for name in self._names():
            if name.endswith(".tmp"):
                self.fs.rm_file(self._path(name))

    def read_json(self, name: str) -> Any:
        """A JSON file, or None when it is missing or damaged."""
        try:
            return json.loads(self.fs.cat_file(self._path(name)))
        except (FileNotFoundError, ValueError):
            return None

    def holds(self, written: Written) -> bool:
        """Whether the file is there with these very bytes."""
        path = self._path(written.name)
        if not self.fs.exists(path) or self.fs.size(path) != written.bytes:
            return False
        digest = hashlib.sha256()
        with self.fs.open(path, "rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
        return digest.hexdigest() == written.sha256

    def write_json(self, name: str, value: Any) -> Written:
        """Write a JSON file with sorted keys."""
        with self.create(name) as sink:
            sink.write((json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())
        return sink.written(name)

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[Sink]:
        """A new file, which appears under its name when it is whole.

        Raises:
            StoreError: it cannot be written.
        """
        path = self._path(name)
        # Object stores show a file when it is closed; on a disk it takes a temporary name and a rename.
        temporary = f"{path}.tmp" if self._local else path
        try:
            with self.fs.open(temporary, "wb") as file:
                sink = Sink(file)
                yield sink
                if self._local:
                    file.flush()
                    os.fsync(file.fileno())
            if self._local:
                os.replace(temporary, path)
        except OSError as error:
            raise StoreError(
                f"cannot write {path}: {error}; make room or mend access, then run the same export again: it goes on"
            ) from error

    def _path(self, name: str) -> str:
        return posixpath.join(self._root, name)

    def _names(self) -> set[str]:
        if not self.fs.exists(self._root):
            return set()
        if not self.fs.isdir(self._root):
            raise ConfigError(f"{self.url} is a file; give a folder")
        return {posixpath.basename(path.rstrip("/")) for path in self.fs.ls(self._root, detail=False)}


def _difference(found: Any, identity: dict[str, Any]) -> str:
    there = found.get("export") if isinstance(found, dict) else None
    if not isinstance(there, dict):
        return "its manifest is damaged"
    keys = [key for key in identity if there.get(key) != identity[key]]
    return ", ".join(f"{key} {there.get(key)!r} instead of {identity[key]!r}" for key in keys)
