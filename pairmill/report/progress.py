"""Telling a person how a long run goes."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from pairmill.report.text import visible, without_secrets

if TYPE_CHECKING:
    from rich.progress import Progress

LOG_EVERY_S = 10.0
"""A plain log says how it goes at most so often, in seconds ..."""
LOG_EVERY_SHARE = 0.1
"""... or each time that this share of the rows is done, but then not before a second has passed."""


class Reporter(Protocol):
    """What a run tells while it works. One segment at a time."""

    def note(self, message: str) -> None:
        """One line about what happens."""

    def start(self, title: str, rows: int, unit: str = "rows") -> None:
        """A segment begins that has `rows` rows to do, or as many of another `unit`, such as files."""

    def advance(self, rows: int, dropped: Mapping[str, int]) -> None:
        """`rows` more rows are done and committed; of them these were dropped or deferred, by reason."""

    def finish(self) -> None:
        """The segment ended."""


class Silent:
    """A reporter that says nothing."""

    def note(self, message: str) -> None:
        """Say nothing."""

    def start(self, title: str, rows: int, unit: str = "rows") -> None:
        """Say nothing."""

    def advance(self, rows: int, dropped: Mapping[str, int]) -> None:
        """Say nothing."""

    def finish(self) -> None:
        """Say nothing."""


class LogReporter:
    """Plain lines, for logs and pipes."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._title: str | None = None

    def note(self, message: str) -> None:
        """Write one line."""
        self._stream.write(_line(message) + "\n")
        self._stream.flush()

    def start(self, title: str, rows: int, unit: str = "rows") -> None:
        """Say what begins."""
        self._title, self._rows, self._unit, self._done = title, rows, unit, 0
        self._dropped: Counter[str] = Counter()
        self._begin = self._told = self._clock()
        self._told_done = 0
        self.note(f"{title}: {rows:,} {unit} to do")

    def advance(self, rows: int, dropped: Mapping[str, int]) -> None:
        """Count, and say how it goes when it is time to."""
        self._done += rows
        self._dropped.update(dropped)
        now = self._clock()
        share_done = self._done - self._told_done >= LOG_EVERY_SHARE * self._rows
        if now - self._told < (1 if share_done else LOG_EVERY_S):
            return
        self._told, self._told_done = now, self._done
        rate = self._done / max(now - self._begin, 1e-9)
        left = (self._rows - self._done) / rate if rate else 0.0
        share = self._done / self._rows if self._rows else 1.0
        self.note(
            f"{self._title}: {self._done:,} of {self._rows:,} ({share:.0%}), {rate:,.1f} {self._unit}/s, "
            f"{_duration(left)} left{_drops(self._dropped)}"
        )

    def finish(self) -> None:
        """Sum up."""
        if self._title is None:
            return
        seconds = self._clock() - self._begin
        self.note(f"{self._title}: {self._done:,} {self._unit} in {_duration(seconds)}{_drops(self._dropped)}")
        self._title = None


class LiveReporter:
    """One line a segment that moves: for terminals. rich honours NO_COLOR."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._console = Console(file=stream, highlight=False, emoji=False, markup=False)
        self._progress: Progress | None = None
        self._dropped: Counter[str] = Counter()
        self._unit = "rows"

    def note(self, message: str) -> None:
        """Write one line above the moving one."""
        self._console.print(_line(message))

    def start(self, title: str, rows: int, unit: str = "rows") -> None:
        """Show the segment's line."""
        self.finish()
        self._dropped, self._unit = Counter(), unit
        self._progress = _progress(self._console)
        self._progress.add_task(title, total=rows, drops="", rate="", left="")
        self._progress.start()

    def advance(self, rows: int, dropped: Mapping[str, int]) -> None:
        """Move the line on."""
        if self._progress is None:
            return
        self._dropped.update(dropped)
        task = self._progress.tasks[0]
        done = task.completed + rows
        rate = done / task.elapsed if task.elapsed else 0.0
        left = f"{_duration((task.total - done) / rate)} left" if rate and task.total and done < task.total else ""
        drops = _drops(self._dropped).removeprefix(", ")
        self._progress.update(
            task.id, advance=rows, drops=drops, rate=f"{rate:,.1f} {self._unit}/s" if rate else "", left=left
        )

    def finish(self) -> None:
        """Leave the line as it is."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


@contextmanager
def reporter_for(stream: TextIO, environment: Mapping[str, str] = os.environ) -> Iterator[LiveReporter | LogReporter]:
    """A reporter that suits the stream: a moving line on a terminal that can do it, plain lines elsewhere.

    Leaving the context ends a segment that was cut off.
    """
    moving = stream.isatty() and environment.get("TERM", "") not in ("", "dumb")
    reporter = LiveReporter(stream) if moving else LogReporter(stream)
    try:
        yield reporter
    finally:
        reporter.finish()


def _progress(console: Any) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=12),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[rate]}", markup=False, table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[left]}", markup=False, table_column=Column(no_wrap=True)),
        # the one that gives way on a narrow terminal: the funnel says it all in the end
        TextColumn("{task.fields[drops]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
        console=console,
        expand=True,
        refresh_per_second=4,
        redirect_stdout=False,
        redirect_stderr=False,
    )


def _line(message: str) -> str:
    """A message as one line, safe to show."""
    return visible(without_secrets(message))


def _drops(dropped: Mapping[str, int]) -> str:
    """The drops by reason, most frequent first, as the end of a line."""
    ordered = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    return f", out: {', '.join(f'{reason} {count:,}' for reason, count in ordered)}" if ordered else ""


def _duration(seconds: float) -> str:
    """A duration for people: 8.3 s, 4 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
