"""What ``<dataset>/_batches/`` holds: requests that wait, batches under way, and files that a person carries.

===========================  =======================================================================================
``pending/``                 requests without an answer, a line each, as workers left them; a request stays until it
                             has an answer that is stored, or is not wanted any more
``sent/<name>.json``         a batch: which requests it holds and how far it came. It is written before anything is
                             done, and after each step, so a run that was killed goes on where it was
``state.json``               how often a request got no answer, and what was learnt of the endpoint
``outgoing/``, ``incoming/`` without ``instruct.writer.base_url``: files of requests to be taken away, files of results
                             that were brought
===========================  =======================================================================================

Workers only add files to ``pending/``, each whole and never changed. Everything else is for the holder of the dataset's
lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from captioners.completions import ChatRequest
from pairmill import storage
from pairmill.answers import Bound
from pairmill.errors import StoreError
from pairmill.store import Dataset, sync_folder
from pairmill.store.files import list_folder

FOLDER = "_batches"
ENDPOINT = "/v1/chat/completions"

MADE, UPLOADING, UPLOADED, CREATING, SENT, HANDED = "made", "uploading", "uploaded", "creating", "sent", "handed"
"""How far a batch came: nothing is done yet; its file is being uploaded; is there; the batch is being created; is under
way; or, without an endpoint, lies in ``outgoing/``."""


@dataclass(frozen=True)
class Pending:
    """A request that waits for an answer, as a worker leaves it."""

    uid: str
    shard: int
    purpose: str
    """The kind of instruction."""
    digest: str
    """Names the request: its ``custom_id``."""
    writer: str
    """Digest of the identity of the writer that asks it."""
    at: str
    """When it was left; UTC, ISO 8601."""
    body: Mapping[str, Any]
    """Of the request, as the protocol has it."""

    def line(self, length_key: str = "max_tokens") -> bytes:
        """The request as a line of a batch file."""
        body = {length_key if name == "max_tokens" else name: value for name, value in self.body.items()}
        request = {"custom_id": self.digest, "method": "POST", "url": ENDPOINT, "body": body}
        return json.dumps(request, ensure_ascii=True).encode() + b"\n"

    @property
    def request(self) -> ChatRequest:
        """What is asked."""
        body = self.body
        return ChatRequest(
            tuple(body["messages"]), body["max_tokens"], body["temperature"], body["top_p"], body["seed"]
        )

    def to_line(self) -> bytes:
        """As it is stored; `_HEAD` reads its beginning."""
        record = {"uid": self.uid, "shard": self.shard, "purpose": self.purpose, "writer": self.writer, "at": self.at}
        return json.dumps({**record, "request": json.loads(self.line())}, ensure_ascii=True).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Pending:
        """From `to_line`."""
        record = json.loads(line)
        request = record.pop("request")
        return cls(digest=request["custom_id"], body=request["body"], **record)


@dataclass(frozen=True, slots=True)
class Waiting:
    """Where a request lies that waits for an answer. There may be millions, so what is asked is read when it is needed
    (`BatchFiles.load`)."""

    uid: str
    shard: int
    purpose: str
    digest: str
    writer: str
    at: str
    path: str
    """The file."""
    start: int
    """Where in it the request's line begins."""
    size: int
    """Of the line, bytes."""


@dataclass(frozen=True)
class Asked:
    """A request of a batch."""

    uid: str
    shard: int
    prompt_tokens: int
    """At most, as of the other two."""
    completion_tokens: int
    cost: float


@dataclass(frozen=True)
class Batch:
    """A batch of requests and how far it came."""

    name: str
    state: str
    at: str
    requests: Mapping[str, Asked]
    """By digest."""
    file_id: str | None = None
    batch_id: str | None = None

    @property
    def bound(self) -> Bound:
        """What all of it may take at most."""
        asked = self.requests.values()
        return Bound(
            sum(a.prompt_tokens for a in asked), sum(a.completion_tokens for a in asked), sum(a.cost for a in asked)
        )

    @property
    def file_name(self) -> str:
        """Of the file of its requests."""
        return f"requests-{self.name}.jsonl"


@dataclass
class State:
    """What is remembered beside the batches."""

    length_key: str = "max_tokens"
    """What the endpoint calls the most tokens of an answer."""
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Of requests that got no answer: in how many batches, and why the last time; by digest."""


class BatchFiles:
    """The folder of a dataset.

    Raises (all of its methods):
        StoreError: a file cannot be read or written.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._read_files: dict[str, bytes] = {}

    def path(self, *parts: str) -> str:
        """A path below the folder, as the dataset's file system takes it."""
        return self.dataset.path(FOLDER, *parts)

    def tidy(self) -> None:
        """Remove what processes left that died while they wrote. No worker may be at work."""
        for folder in ("", "pending", "sent", "outgoing", "incoming"):
            for path in self._files(folder, ".tmp"):
                self._remove(path)

    # -- requests that wait --

    def leave(self, requests: Iterable[Pending]) -> None:
        """Put requests down, in one file a shard."""
        by_shard: dict[int, list[bytes]] = {}
        for request in requests:
            by_shard.setdefault(request.shard, []).append(request.to_line())
        for shard, lines in by_shard.items():
            data = b"".join(lines)
            self._write(self.path("pending", f"{shard}-{hashlib.sha256(data).hexdigest()[:16]}.jsonl"), data)

    def pending(self) -> dict[str, Waiting]:
        """All requests that wait, by digest; of one that was left more than once, the last."""
        found: dict[str, Waiting] = {}
        for path in self._files("pending"):
            start = 0
            for line in self._bytes(path).splitlines(keepends=True):
                head = _HEAD.match(line)
                if head is not None:  # else a line that was torn: it is left again
                    uid, shard, purpose, writer, at, digest = (part.decode() for part in head.groups())
                    one = Waiting(uid, int(shard), purpose, digest, writer, at, path, start, len(line))
                    if digest not in found or at >= found[digest].at:
                        found[digest] = one
                start += len(line)
        return found

    def load(self, waiting: Waiting) -> Pending:
        """What is asked. Files are read as a whole, so ask in the order of shards."""
        if waiting.path not in self._read_files:
            if len(self._read_files) >= _FILES:
                self._read_files.pop(next(iter(self._read_files)))
            self._read_files[waiting.path] = self._bytes(waiting.path)
        data = self._read_files[waiting.path]
        pending = Pending.from_line(data[waiting.start : waiting.start + waiting.size])
        if pending.digest != waiting.digest:
            raise StoreError(f"{waiting.path} was changed while it was read; run again when no other process writes")
        return pending

    def keep(self, digests: Collection[str]) -> None:
        """Remove all other requests that wait; positions that `pending` told are not valid any more."""
        seen: set[str] = set()

        def wanted(line: bytes) -> bool:
            head = _HEAD.match(line)
            if head is None:
                return False
            digest = head[6].decode()
            first = digest in digests and digest not in seen
            seen.add(digest)
            return first

        for path in reversed(self._files("pending")):
            self._filter(path, wanted)
        self._read_files.clear()

    # -- batches --

    def batches(self) -> list[Batch]:
        """Those under way, oldest first."""
        found = []
        for path in self._files("sent", ".json"):
            try:
                given = json.loads(self._bytes(path))
                asked = {digest: Asked(**request) for digest, request in given.pop("requests").items()}
                found.append(Batch(requests=asked, **given))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise StoreError(
                    f"{path}, which says what was sent to the endpoint, is damaged: {error}; look there for a batch "
                    f"named {posixpath.basename(path).removesuffix('.json')}, cancel it, then remove the file: its "
                    "requests are sent again"
                ) from error
        return sorted(found, key=lambda batch: (batch.at, batch.name))

    def save(self, batch: Batch, **changes: Any) -> Batch:
        """Write a batch down as it is after these changes."""
        batch = replace(batch, **changes)
        self._write(self.path("sent", f"{batch.name}.json"), json.dumps(asdict(batch)).encode())
        return batch

    def drop(self, batch: Batch) -> None:
        """The batch is over."""
        self._remove(self.path("outgoing", batch.file_name))
        self._remove(self.path("sent", f"{batch.name}.json"))

    def hand_out(self, batch: Batch, lines: Iterable[bytes]) -> str:
        """Write the file of a batch for a person to take away; returns where it is."""
        path = self.path("outgoing", batch.file_name)
        self._write(path, b"".join(lines))
        return path

    # -- results --

    def incoming(self) -> list[str]:
        """Files of results that were brought."""
        return self._files("incoming")

    def lines(self, path: str) -> Iterator[bytes]:
        """The lines of such a file, without empty ones."""
        return self._lines(path)

    def consumed(self, path: str, rest: bytes) -> None:
        """Remove a file of results; what of it could not be used stays beside it, as ``<name>.rejected``."""
        if rest:
            beside = f"{path}.rejected"
            before = self._bytes(beside) if self.dataset.fs.exists(beside) else b""
            self._write(beside, before + rest.removeprefix(before))
        self._remove(path)

    # -- what is remembered --

    def state(self) -> State:
        """What is remembered; nothing, where nothing can be read."""
        try:
            given = json.loads(self.dataset.fs.cat_file(self.path("state.json")))
            failures = {digest: (int(count), str(detail)) for digest, (count, detail) in given["failures"].items()}
            return State(str(given["length_key"]), failures)
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return State()

    def remember(self, state: State) -> None:
        """Write it down."""
        if state == State():
            self._remove(self.path("state.json"))
        elif state != self.state():
            self._write(self.path("state.json"), json.dumps(asdict(state), sort_keys=True).encode())

    # -- takedowns --

    def forget(self, uids: Collection[str]) -> int:
        """Remove all that is about these pairs, wherever it lies here. Returns how many requests that were."""
        self.tidy()
        gone = {digest for digest, request in self.pending().items() if request.uid in uids}
        for batch in self.batches():
            of_batch = {digest for digest, asked in batch.requests.items() if asked.uid in uids}
            if of_batch:
                gone |= of_batch
                self.save(batch, requests={d: a for d, a in batch.requests.items() if d not in of_batch})
        self.keep(self.pending().keys() - gone)
        for folder, ending in (("outgoing", ".jsonl"), ("incoming", ".jsonl"), ("incoming", ".rejected")):
            for path in self._files(folder, ending):
                self._filter(path, lambda line: not any(found.decode() in gone for found in _DIGEST.findall(line)))
        state = self.state()
        state.failures = {digest: told for digest, told in state.failures.items() if digest not in gone}
        self.remember(state)
        return len(gone)

    # -- files --

    def _files(self, folder: str, ending: str = ".jsonl") -> list[str]:
        with storage.explained(f"cannot list {self.path(folder)}"):
            return sorted(p for p in list_folder(self.dataset, self.path(folder)) if p.endswith(ending))

    def _bytes(self, path: str) -> bytes:
        with storage.explained(f"cannot read {path}"):
            data: bytes = self.dataset.fs.cat_file(path)
            return data

    def _lines(self, path: str) -> Iterator[bytes]:
        """The lines of a file, with their ends, without empty ones. One that is longer than `MAX_LINE` falls apart into
        pieces that are not JSON."""
        with storage.explained(f"cannot read {path}"), storage.open_known(*self._known(path)) as file:
            rest = b""
            while chunk := file.read(MAX_LINE):
                *whole, rest = (rest + chunk).splitlines(keepends=True)
                if rest.endswith(b"\n") or len(rest) > MAX_LINE:
                    whole, rest = [*whole, rest], b""
                yield from (line for line in whole if line.strip())
            if rest.strip():
                yield rest

    def _known(self, path: str) -> tuple[Any, str, int]:
        return self.dataset.fs, path, self.dataset.fs.size(path)

    def _filter(self, path: str, wanted: Callable[[bytes], bool]) -> None:
        """Leave only some lines of a file; remove it when none is left."""
        lines = list(self._lines(path))
        kept = [line for line in lines if wanted(line)]
        if not kept:
            self._remove(path)
        elif len(kept) < len(lines):
            self._write(path, b"".join(kept))

    def _write(self, path: str, data: bytes) -> None:
        """A file that is there whole or not at all, also after a loss of power."""
        with storage.explained(f"cannot write {path}"):
            if not self.dataset.local:
                self.dataset.fs.pipe_file(path, data)
                return
            folder = posixpath.dirname(path)
            os.makedirs(folder, exist_ok=True)
            temporary = f"{path}.{os.getpid()}.tmp"
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
            sync_folder(folder)

    def _remove(self, path: str) -> None:
        with storage.explained(f"cannot remove {path}"), contextlib.suppress(FileNotFoundError):
            self.dataset.fs.rm_file(path)


_HEAD = re.compile(
    rb'\{"uid": "([^"\\]*)", "shard": (\d+), "purpose": "(\w+)", "writer": "(\w+)", "at": "([^"\\]+)", '
    rb'"request": \{"custom_id": "([0-9a-f]{64})"'
)
"""The beginning of a stored request. Texts of strangers come only after it."""
_DIGEST = re.compile(rb"\b[0-9a-f]{64}\b")
_FILES = 8
"""Files that `BatchFiles.load` keeps in memory; workers leave some megabytes in each."""

MAX_LINE = 2**22
"""Bytes of a line of results at most."""
