"""The folder of an export: whole files only, one writer at a time."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import posixpath
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pairmill import storage
from pairmill.errors import ConfigError, DatasetLocked, StoreError

TEMPORARY = ".tmp"
"""Ending of a file that is being written."""


_AHEAD = 2**23
"""Bytes that are read ahead from a remote file: its header alone would be a request for each member of a tar."""
_SYNCS = 16
"""Files that are waited for at once: a disk's journal takes them together."""
_ADVICE = "make room or mend access, then run the same again: it goes on"


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
    """A local folder or any URL that fsspec knows.

    Raises:
        ConfigError: the URL holds credentials, or a package for it is missing.
    """

    def __init__(self, url: str) -> None:
        self.fs, self._root = storage.open_fs(url)
        self._local = storage.is_local(self.fs)
        self.url = self._root if self._local else url.rstrip("/")

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Make the folder where there is none, and hold the right to write in it. The kernel frees the lock of a
        process that died; object stores have no locks.

        Raises:
            ConfigError: it is a file.
            DatasetLocked: another process is writing in it.
            StoreError: it cannot be made.
        """
        with _explained(f"cannot write to {self.url}"):
            if self.fs.exists(self._root) and not self.fs.isdir(self._root):
                raise ConfigError(f"{self.url} is a file; give a folder")
            if not storage.is_s3(self.fs):  # which has no folders; and s3fs would make a bucket that is missing
                self.fs.makedirs(self._root, exist_ok=True)
            handle = os.open(self._root, os.O_RDONLY) if self._local else None
        try:
            if handle is not None:
                _lock(handle, self.url)
            yield
        finally:
            if handle is not None:
                os.close(handle)

    def sizes(self, inside: str = "") -> dict[str, int]:
        """Name and size in bytes of each thing in the folder, or in one `inside` of it; none where there is no folder.
        Folders count as empty."""
        root = self._path(inside) if inside else self._root
        with _explained(f"cannot read {self.url}"):
            self.fs.invalidate_cache(root)
            if not self.fs.isdir(root):
                return {}
            found = self.fs.ls(root, detail=True)
        sizes = {
            entry["name"].rstrip("/"): 0 if entry.get("type") == "directory" else entry.get("size") or 0
            for entry in found
        }
        sizes.pop(root.rstrip("/"), None)  # object stores list the mark of an empty folder in it
        return {posixpath.basename(path): sizes[path] for path in sorted(sizes)}

    def exists(self) -> bool:
        """Whether the folder is there."""
        return bool(self.fs.isdir(self._root))

    def is_folder(self, name: str) -> bool:
        """Whether it is a folder inside."""
        return bool(self.fs.isdir(self._path(name)))

    def read(self, name: str) -> bytes | None:
        """A small file, or None when it is missing."""
        try:
            data: bytes = self.fs.cat_file(self._path(name))
        except (FileNotFoundError, IsADirectoryError):
            return None
        return data

    def read_json(self, name: str) -> Any:
        """A JSON file, or None when it is missing or damaged."""
        data = self.read(name)
        try:
            return None if data is None else json.loads(data)
        except (ValueError, RecursionError):
            return None

    def open(self, name: str) -> Any:
        """A file for reading."""
        ahead = {} if self._local else {"cache_type": "readahead", "block_size": _AHEAD}
        return self.fs.open(self._path(name), "rb", **ahead)

    def look(self, name: str) -> Written:
        """Size and sha256 of a file that is there, which is read for it.

        Raises:
            FileNotFoundError: it is not there.
        """
        digest, size = hashlib.sha256(), 0
        with self.open(name) as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
                size += len(chunk)
        return Written(name, size, digest.hexdigest())

    def write_json(self, name: str, value: Any) -> Written:
        """Write a JSON file with sorted keys; one that holds these very bytes already is left alone."""
        data = (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
        if self.read(name) == data:
            return Written(name, len(data), hashlib.sha256(data).hexdigest())
        with self.create(name) as sink:
            sink.write(data)
        return sink.written(name)

    def make(self, name: str) -> None:
        """Make a folder inside, if it is not there.

        Raises:
            StoreError: it cannot be done.
        """
        with _explained(f"cannot write to {self._path(name)}"):
            if not storage.is_s3(self.fs):  # which has no folders
                self.fs.makedirs(self._path(name), exist_ok=True)

    @contextlib.contextmanager
    def create(self, name: str, *, settled: bool = True) -> Iterator[Sink]:
        """A new file, which appears under its name when it is whole.

        Args:
            name: Its name; the folder of one inside is there.
            settled: Wait until it is on the disk; for many small files, `settle_files` waits for all at once.

        Raises:
            StoreError: it cannot be written.
        """
        path = self._path(name)
        # Object stores show a file when it is closed; on a disk it takes a temporary name and a rename.
        temporary = f"{path}{TEMPORARY}" if self._local else path
        with _explained(f"cannot write {path}"):
            with self.fs.open(temporary, "wb") as file:
                sink = Sink(file)
                yield sink
                if self._local and settled:
                    file.flush()
                    os.fsync(file.fileno())
            if self._local:
                os.replace(temporary, path)

    def rename(self, name: str, new: str) -> None:
        """Give a file another name; whatever had that name is gone.

        Raises:
            StoreError: it cannot be done.
        """
        with _explained(f"cannot rename {self._path(name)}"):
            if self._local:
                os.replace(self._path(name), self._path(new))
            else:
                self.fs.mv(self._path(name), self._path(new))

    def remove(self, name: str) -> None:
        """Take a file away, if it is there.

        Raises:
            StoreError: it cannot be done.
        """
        with _explained(f"cannot remove {self._path(name)}"), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._path(name))

    def remove_folder(self, name: str) -> None:
        """Take an empty folder away; one that is not empty stays."""
        with contextlib.suppress(OSError):  # which is how file systems say that it is not empty
            if not storage.is_s3(self.fs):  # which has no folders
                self.fs.rmdir(self._path(name))

    def settle_files(self, names: Iterable[str]) -> None:
        """Wait until what was written into files is on the disk.

        Raises:
            StoreError: it cannot be written.
        """
        if self._local:
            with _explained(f"cannot write to {self.url}"), ThreadPoolExecutor(_SYNCS) as pool:
                list(pool.map(_sync, map(self._path, names)))

    def settle(self, inside: str = "") -> None:
        """Wait until the names of the files in the folder, or in one `inside` of it, are on the disk, so that a power
        cut cannot undo what was renamed or removed before it and keep what came after."""
        if self._local:
            handle = os.open(self._path(inside) if inside else self._root, os.O_RDONLY)
            try:
                with contextlib.suppress(OSError):  # not every file system can
                    os.fsync(handle)
            finally:
                os.close(handle)

    def _path(self, name: str) -> str:
        return posixpath.join(self._root, name)


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what file systems raise into a StoreError."""
    with storage.explained(what):
        try:
            yield
        except OSError as error:
            raise StoreError(f"{what}: {storage.redact(str(error))}; {_ADVICE}") from error


def _lock(handle: int, url: str) -> None:
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DatasetLocked(
            f"the export {url} is being written by another process; wait until it ends, then run again"
        ) from error
    except OSError:
        pass  # a network file system without locks
