"""Telling a person how a long run goes."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Reporter(Protocol):
    """What a run tells while it works. One segment at a time."""

    def note(self, message: str) -> None:
        """One line about what happens."""

    def start(self, title: str, rows: int) -> None:
        """A segment begins that has `rows` rows to do."""

    def advance(self, rows: int, dropped: Mapping[str, int]) -> None:
        """`rows` more rows are done and committed; of them these were dropped or deferred, by reason."""

    def finish(self) -> None:
        """The segment ended."""


class Silent:
    """A reporter that says nothing."""

    def note(self, message: str) -> None:
        """Say nothing."""

    def start(self, title: str, rows: int) -> None:
        """Say nothing."""

    def advance(self, rows: int, dropped: Mapping[str, int]) -> None:
        """Say nothing."""

    def finish(self) -> None:
        """Say nothing."""
