"""Weights on this machine: what identifies a model's files, and a cache that all processes of the machine share.

The cache holds a model under the sha256 of its content, so whoever asks for the same content finds it, wherever it came
from: a folder of another machine, or an object store. One process brings a model, under a lock, while others wait; a
model appears there whole or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pairmill import storage
from pairmill.errors import ConfigError, StoreError

CACHE_ENV = "PAIRMILL_CACHE"
"""Environment variable: the cache's folder, in the place of ``~/.cache/pairmill``."""

IDENTIFYING_SUFFIXES = (".safetensors", ".model")
IDENTIFYING_NAMES = frozenset(
    {
        "open_clip_config.json",
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "model.safetensors.index.json",
    }
)
"""Files that determine what a model computes. Others (a README, training logs) are no part of its identity."""

QFORMER_TOKENIZER = "qformer_tokenizer"
"""The folder within a folder where InstructBLIP keeps its second tokenizer; part of the identity, too."""


# -- identity ---------------------------------------------------------------------------------------------------------


def folder_sha256(path: str) -> str:
    """sha256 (hex) over names and bytes of the files that determine a model: config, weights, tokenizer.

    A file is read again only when its time of change or its size has changed.

    Raises:
        ConfigError: no such folder, or no weights in it.
    """
    digest = hashlib.sha256()
    for name in identifying_files(path):
        digest.update(f"{name}\n{file_sha256(str(Path(path) / name))}\n".encode())
    return digest.hexdigest()


def identifying_files(path: str) -> tuple[str, ...]:
    """Names of the files of a folder that determine a model, sorted.

    Raises:
        ConfigError: no such folder, or no weights in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"model folder {path} does not exist; correct the path, or name a model and a pretrained tag")
    names = sorted(
        str(f.relative_to(folder))
        for place in (folder, folder / QFORMER_TOKENIZER)
        if place.is_dir()
        for f in place.iterdir()
        if identifies(f.name)
    )
    return _with_weights(names, path)


def identifies(name: str) -> bool:
    """Whether a file of this name determines what a model computes."""
    return name.endswith(IDENTIFYING_SUFFIXES) or name in IDENTIFYING_NAMES


def _with_weights(names: list[str], path: str) -> tuple[str, ...]:
    if not any(name.endswith(".safetensors") for name in names):
        raise ConfigError(
            f"model folder {path} holds no .safetensors file; save the model's weights there in that format"
        )
    return tuple(names)


def file_sha256(path: str) -> str:
    """sha256 (hex) of a file's bytes; it is read again only when its time of change or its size has changed."""
    stat = os.stat(path)
    return _file_sha256(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1024)
def _file_sha256(path: str, mtime_ns: int, size: int) -> str:  # noqa: ARG001 - parts of the cache's key
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Content:
    """A model's files: those of a folder that identify it, or one file."""

    sha256: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    is_folder: bool

    @classmethod
    def of(cls, path: str) -> Content:
        """What lies at a path.

        Raises:
            ConfigError: nothing, or a folder without weights.
        """
        place = Path(path)
        if place.is_file():
            return cls(file_sha256(path), (place.name,), (place.stat().st_size,), False)
        names = identifying_files(path)
        return cls(folder_sha256(path), names, tuple((place / name).stat().st_size for name in names), True)

    def within(self, folder: Path) -> Path:
        """Where it lies when `folder` holds its files: the folder itself, or the one file in it."""
        return folder if self.is_folder else folder / self.names[0]


# -- the cache --------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where this machine keeps models that came from elsewhere, each in a folder named by its sha256."""
    return Path(os.environ.get(CACHE_ENV) or "~/.cache/pairmill").expanduser() / "models"


def kept(content: Content, fill: Callable[[Path], None]) -> Path:
    """The cache's copy of this content. Where the cache lacks it, one process of this machine has `fill` write its
    files into an empty folder, while others that ask wait for it.

    Raises:
        StoreError: the cache cannot be written, or what `fill` wrote is other content.
    """
    place = cache_folder() / content.sha256
    if not place.is_dir():
        with _alone(content.sha256):
            if not place.is_dir():
                with _arriving(content.sha256) as part:
                    fill(part)
                    found = Content.of(str(content.within(part))).sha256
                    if found != content.sha256:
                        raise StoreError(
                            f"a model arrived with sha256 {found}, not {content.sha256}; its files were changed while "
                            "they were read: run again"
                        )
                    _settle(part, place)
    return content.within(place)


def holds(path: str, content: Content) -> bool:
    """Whether this content lies at a path of this machine. Its bytes are read once a machine, not once a process."""
    place = Path(path)
    files = [place / name for name in content.names] if content.is_folder else [place]
    try:
        stats = [file.stat() for file in files]
    except OSError:
        return False
    if tuple(stat.st_size for stat in stats) != content.sizes:
        return False
    key = _key(os.path.abspath(path), [(s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats])
    try:
        found = _recall(key)
        if found is None:
            with _alone(key):
                found = _recall(key) or _remember(key, Content.of(path).sha256)
    except StoreError:  # without a cache that can be written each process reads for itself
        found = Content.of(path).sha256
    return found == content.sha256


@contextlib.contextmanager
def _usable() -> Iterator[Path]:
    """The cache's folder, made if need be; errors of the disk say what to do."""
    home = cache_folder()
    try:
        home.mkdir(parents=True, exist_ok=True)
        yield home
    except OSError as error:
        raise StoreError(
            f"cannot keep models in {home}: {error}; make room, or set {CACHE_ENV} to a folder that can be written"
        ) from error


@contextlib.contextmanager
def _alone(key: str) -> Iterator[None]:
    """One process of this machine at a time does what `key` names; the kernel lets go when a process dies."""
    with _usable() as home, open(home / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _arriving(key: str) -> Iterator[Path]:
    """An empty folder beside the cache's models, for the process that holds the lock. What one that died left goes."""
    with _usable() as home:
        part = home / f"{key}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _settle(part: Path, place: Path) -> None:
    """Give a filled folder its name, once its bytes are on the disk."""
    for folder, _, names in os.walk(part, topdown=False):
        for name in names:
            _sync(os.path.join(folder, name))
        _sync(folder)
    try:
        os.rename(part, place)
    except OSError:
        if not place.is_dir():  # else the same content came another way meanwhile
            raise
    _sync(str(place.parent))


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _key(*what: Any) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _recall(key: str) -> str | None:
    """The sha256 that was found for `key` before."""
    with contextlib.suppress(OSError):
        return (cache_folder() / f"{key}.known").read_text() or None
    return None


def _remember(key: str, sha256: str) -> str:
    with _usable() as home:
        part = home / f"{key}.known.part"
        part.write_text(sha256)
        os.replace(part, home / f"{key}.known")
    return sha256


# -- remote folders ---------------------------------------------------------------------------------------------------


def local_path(path: str) -> str:
    """The path on this machine that a config's path of a model means: itself, or, of a URL that fsspec knows
    (``s3://bucket/folder``, a folder or one file), a copy in the cache. It is fetched once a machine, and again when
    the remote files have changed.

    Raises:
        ConfigError: there is nothing at the URL, or no weights.
        StoreError: the store cannot be reached or refuses, or the cache cannot be written.
    """
    if "://" not in path:
        return path
    fs, root = storage.open_fs(path)
    is_folder, remote = _remote_files(fs, root, path)
    key = _key(path, remote)

    def known() -> Path | None:
        sha256 = _recall(key)
        place = cache_folder() / str(sha256)
        return place if sha256 and place.is_dir() else None

    place = known()
    if place is None:
        with _alone(key):
            place = known() or _fetch(fs, root, path, key, is_folder, [name for name, _ in remote])
    return str(place if is_folder else place / remote[0][0])


def _remote_files(fs: Any, root: str, url: str) -> tuple[bool, list[tuple[str, str]]]:
    """Whether a folder is at `root`, and its identifying files (or the one file), each with what tells its state."""
    with storage.explained(f"cannot read {url}"):
        try:
            if not fs.isdir(root):
                return False, [(root.rpartition("/")[2], _state(fs.info(root)))]
            entries = list(fs.ls(root, detail=True))
            if any(e["name"].rstrip("/") == f"{root}/{QFORMER_TOKENIZER}" for e in entries):
                entries += fs.ls(f"{root}/{QFORMER_TOKENIZER}", detail=True)
        except FileNotFoundError as error:
            raise ConfigError(f"there is no model at {url}; correct the path") from error
    found = {
        e["name"].removeprefix(root).lstrip("/"): _state(e)
        for e in entries
        if e["type"] == "file" and identifies(e["name"].rpartition("/")[2])
    }
    return True, [(name, found[name]) for name in _with_weights(sorted(found), url)]


def _state(entry: dict[str, Any]) -> str:
    """All that a store says of a file (size, etag, times) but how often it was looked at."""
    return str(sorted((k, str(v)) for k, v in entry.items() if k != "atime"))


def _fetch(fs: Any, root: str, url: str, key: str, is_folder: bool, names: list[str]) -> Path:
    with _arriving(key) as part:
        for name in names:
            target = part / name
            target.parent.mkdir(exist_ok=True)
            with storage.explained(f"cannot fetch {url}"):
                fs.get_file(f"{root}/{name}" if is_folder else root, str(target))
        sha256 = Content.of(str(part if is_folder else part / names[0])).sha256
        place = cache_folder() / sha256
        _settle(part, place)
        _remember(key, sha256)
        return place
