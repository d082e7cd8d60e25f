"""Which source files were read to their end, so that the same files need not be read again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from typing import Any

from pairmill.store import Dataset
from schemas.config import Source

SEEN = "_sources.json"
"""A note beside the tables. It holds for one version of the pairs table, so whatever takes pairs out makes it void; it
may be deleted at any time, and only time is lost."""


class SeenFiles:
    """The source files whose rows are all in one version of the pairs table, or were refused."""

    def __init__(self, dataset: Dataset, pairs: int) -> None:
        self._dataset = dataset
        self._path = dataset.path(SEEN)
        self._known: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(dataset.fs.cat_file(self._path))
            if found["pairs"] == pairs:
                self._known = dict(found["files"])

    @staticmethod
    def _key(file: Source) -> str:
        return hashlib.sha256(file.model_dump_json().encode()).hexdigest()

    def rows(self, file: Source, identity: str | None) -> int | None:
        """How many rows a file had, if it is as it was; else None."""
        entry = self._known.get(self._key(file))
        return int(entry["rows"]) if entry and identity is not None and entry["identity"] == identity else None

    def add(self, file: Source, identity: str | None, rows: int) -> None:
        """A file was read to its end. `identity` is from before that: a file that changed meanwhile is read again."""
        if identity is not None:
            self._known[self._key(file)] = {"identity": identity, "rows": rows}

    def save(self, pairs: int) -> None:
        """Write the note: all rows of these files are in this version of the pairs table."""
        text = json.dumps({"pairs": pairs, "files": self._known}, sort_keys=True).encode()
        with contextlib.suppress(OSError):  # it only saves time
            if self._dataset.local:
                temporary = f"{self._path}.{os.getpid()}.tmp"
                with open(temporary, "wb") as file:
                    file.write(text)
                os.replace(temporary, self._path)
            else:
                self._dataset.fs.pipe_file(self._path, text)
