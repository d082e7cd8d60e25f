"""Where the wall time of a run went: into stages, and into what the pipeline costs around them."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping

from pairmill.execute import Unit

STAGES = "stages"
PARTS = {
    STAGES: "in stages",
    "loading": "loading models",
    "store": "reading and writing the store",
    "verdicts": "verdicts and bookkeeping of workers",
    "waiting": "workers waiting for work",
    "start": "starting the engine",
    "admission": "admission",
    "commits": "commits",
    "publishing": "publishing",
    "driver": "planning and the rest of the driver",
}
"""The parts of a run's wall time, and what they are called."""


class Spent:
    """Adds up a run's time by part.

    In a segment of map stages several workers are busy side by side. Of their time each part counts divided by the
    engine's slots (workers that can be busy at a time): the wall time it would take with all slots full. What is left
    of the segment's wall time is waiting: for the first unit, for the last one, for a group slower than the others.
    """

    def __init__(self) -> None:
        self._parts: defaultdict[str, float] = defaultdict(float)
        self._under_way: dict[str, float] = {}

    def add(self, part: str, seconds: float) -> None:
        """So many seconds of wall time."""
        self._parts[part] += seconds

    @contextlib.contextmanager
    def on(self, part: str) -> Iterator[None]:
        """What is done in this context goes into a part."""
        self._under_way[part] = time.monotonic()
        try:
            yield
        finally:
            self.add(part, time.monotonic() - self._under_way.pop(part))

    def segment(self) -> SegmentSpent:
        """A segment of map stages begins."""
        return SegmentSpent(self)

    def parts(self, seconds: float) -> dict[str, float]:
        """By part, in the order of `PARTS`, with those that are under way until now; with what nothing else claims as
        the driver's, they add up to `seconds`."""
        now = time.monotonic()
        said = {part: round(self._parts[part] + now - self._under_way.get(part, now), 3) for part in PARTS}
        said["driver"] = round(max(0.0, seconds - sum(said.values())), 3)
        return {part: value for part, value in said.items() if value}


class SegmentSpent:
    """The time of one segment."""

    def __init__(self, whole: Spent) -> None:
        self._whole = whole
        self._begin = time.monotonic()
        self._workers: defaultdict[str, float] = defaultdict(float)

    def add(self, unit: Unit) -> None:
        """A unit came back."""
        kernels = sum(unit.seconds.values())
        spent = {STAGES: kernels, "loading": unit.loading, "store": unit.storing}
        for part, seconds in spent.items():
            self._workers[part] += seconds
        self._workers["verdicts"] += max(0.0, unit.busy - sum(spent.values()))

    def finish(self, slots: int) -> None:
        """The segment is over; `slots` workers could be busy at a time, or more where these were busy for longer."""
        wall = time.monotonic() - self._begin
        most = max(1.0, slots, sum(self._workers.values()) / max(wall, 1e-9))
        busy = {part: seconds / most for part, seconds in self._workers.items()}
        for part, seconds in busy.items():
            self._whole.add(part, seconds)
        self._whole.add("waiting", max(0.0, wall - sum(busy.values())))


def engine_share(spent: Mapping[str, float]) -> float:
    """The share of a run's wall time, 0 to 1, that is not in stages."""
    return 1 - spent.get(STAGES, 0.0) / (sum(spent.values()) or 1.0)


def in_words(spent: Mapping[str, float]) -> str:
    """One line: the share of stages, then what else took at least one percent."""
    whole = sum(spent.values()) or 1.0
    shares = {part: spent.get(part, 0.0) / whole for part in PARTS}
    others = sorted((part for part in PARTS if part != STAGES), key=lambda part: -shares[part])
    told = [f"{shares[STAGES]:.0%} {PARTS[STAGES]}"]
    told += [f"{shares[part]:.0%} {PARTS[part]}" for part in others if shares[part] >= 0.01]
    return ", ".join(told)
