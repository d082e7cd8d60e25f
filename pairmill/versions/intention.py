"""What was begun and must be finished: a small file beside the tables, written before the first step of a change that
takes several, and removed after the last one. Whoever has the dataset's lock next finds it and finishes the change."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from pairmill.errors import StoreError
from pairmill.store import Dataset, sync_folder


@dataclass(frozen=True)
class Intention:
    """A change of several steps, by the name of its file."""

    dataset: Dataset
    name: str

    @property
    def _path(self) -> str:
        return self.dataset.path(self.name)

    def declare(self, value: dict[str, Any]) -> None:
        """Say what is going to be done; it lasts from here on.

        Raises:
            StoreError: it cannot be written.
        """
        data = json.dumps(value, sort_keys=True).encode()
        try:
            if not self.dataset.local:
                self.dataset.fs.pipe_file(self._path, data)  # object stores show a whole object or none
                return
            temporary = f"{self._path}.{os.getpid()}.tmp"
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
            sync_folder(self.dataset.root)
        except OSError as error:
            raise StoreError(f"cannot write {self._path}: {error}; make room or mend access, then run again") from error

    def declared(self) -> dict[str, Any] | None:
        """What is to be finished; None when nothing is."""
        if not self.dataset.fs.exists(self._path):
            return None
        try:
            value: dict[str, Any] = json.loads(self.dataset.fs.cat_file(self._path))
        except (OSError, ValueError) as error:
            raise StoreError(
                f"cannot read {self._path}: {error}; it names a change of the dataset that was begun: mend access, or, "
                "if its content is damaged, remove it and give the same `pairmill rollback` or `pairmill vacuum` again"
            ) from error
        return value

    def done(self) -> None:
        """Forget it: all is done."""
        if self.dataset.fs.exists(self._path):
            self.dataset.fs.rm(self._path)
            if self.dataset.local:
                sync_folder(self.dataset.root)
