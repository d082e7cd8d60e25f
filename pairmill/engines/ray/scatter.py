"""Work in cells on Ray: one task a cell, and only so many of them under way that the object store has room."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from pairmill.engines import cells_of
from pairmill.engines.ray.pools import ALMOST, MissingResourcesError, Need, Node, alive_nodes
from pairmill.engines.ray.watch import CHECK_S, Patience
from pairmill.errors import EngineError
from pairmill.stage import CellWork, Resources

RETRIES = 3
"""How often a cell is tried again whose worker or node died."""
STORE = 0.3
"""Part of the smallest node's object store that the rows of cells under way may fill."""
TASKS_A_SLOT = 2
"""Cells under way for each that can be worked on: a worker that is done finds the next one there."""


def scatter(work: CellWork, rows: Iterable[pa.Table], patience: Patience) -> Iterator[pa.Table]:
    """See `pairmill.engines.Engine.scatter`. What is not a whole cell waits in the driver's memory
    (`pairmill.engines.cells_of`).

    Raises:
        EngineError: a cell's worker died `RETRIES` times, or no node had room for one longer than `patience`.
    """
    import ray

    def do(work: CellWork, cell: pa.Table) -> pa.Table:  # nested, so that it travels by value: a worker imports less
        return work(cell)

    room = _Room(work, patience)
    task = ray.remote(do).options(max_retries=RETRIES, **room.options)
    under_way: dict[Any, tuple[Any, int]] = {}
    # When it ends early, what is under way (two tasks a slot) is left to end by itself: in Ray 2.60 a task that is
    # cancelled just as it answers takes the whole driver down (seen: "Tried to complete task that was not pending").
    for cell in cells_of(rows):
        while not room.holds([size for _, size in under_way.values()], cell.nbytes):
            yield from _finished(under_way, room)
        # The rows are held until the answer is there: what a lost node answered is then computed anew.
        held = ray.put(cell)
        under_way[task.remote(work, held)] = held, cell.nbytes
        del held, cell
    while under_way:
        yield from _finished(under_way, room)


def _finished(under_way: dict[Any, tuple[Any, int]], room: _Room) -> Iterator[pa.Table]:
    """One answer more, if there is one within `CHECK_S`."""
    import ray

    for answer in ray.wait(list(under_way), timeout=CHECK_S)[0]:
        try:
            table = ray.get(answer)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, Exception) and not isinstance(cause, ray.exceptions.RayError):
                raise cause from error
            raise EngineError(
                f"the worker of a cell died {RETRIES + 1} times ({type(error).__name__}; out of memory, or killed); "
                "what was committed is kept: run the command again, with more memory a CPU if that was short"
            ) from error
        del under_way[answer]
        yield table
    room.look()


class _Room:
    """How much may be under way at a time on the cluster as it is."""

    def __init__(self, work: CellWork, patience: Patience) -> None:
        self._patience = patience
        nodes = alive_nodes()
        wants: Resources = getattr(work, "resources", Resources())
        has_gpus = any(node.resources.get("GPU") for node in nodes)
        cpus = min(wants.cpus, max((node.resources.get("CPU", 0.0) for node in nodes), default=0.0) or wants.cpus)
        self._need = Need(cpus, wants.gpus or float(wants.gpu_if_any and has_gpus))
        self._measure(nodes)

    @property
    def options(self) -> dict[str, float]:
        """Of Ray's tasks."""
        return {"num_cpus": self._need.cpus, "num_gpus": self._need.gpus}

    def holds(self, under_way: Sequence[int], size: int) -> bool:
        """Whether there is room for one more cell beside others, by their bytes; always for one alone."""
        return not under_way or (len(under_way) < self._tasks and sum(under_way) + size <= self._bytes)

    def look(self) -> None:
        """Now and then, see what the cluster has become.

        Raises:
            EngineError: no node has had room for a cell for longer than the patience.
        """
        if time.monotonic() - self._looked >= CHECK_S:
            self._measure(alive_nodes())

    def _measure(self, nodes: Sequence[Node]) -> None:
        self._looked = time.monotonic()
        slots = sum(_slots(node, self._need) for node in nodes)
        if slots:
            self._patience.found()
        else:
            self._patience.lacking(
                MissingResourcesError(
                    f"work in cells needs {self._need} on a node, and none of the Ray cluster has that; add such nodes",
                    [self._need],
                )
            )
        self._tasks = max(1, TASKS_A_SLOT * slots)
        stores = [node.resources["object_store_memory"] for node in nodes if "object_store_memory" in node.resources]
        self._bytes = STORE * min(stores, default=0.0)


def _slots(node: Node, need: Need) -> int:
    """Cells that a node can work on at a time."""
    return int(min(node.resources.get(name, 0.0) / amount for name, amount in need.amounts.items()) + ALMOST)
