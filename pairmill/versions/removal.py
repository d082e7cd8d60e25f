"""Removing a table whole, in a way that a kill cannot leave a table without its files."""

from __future__ import annotations

from collections.abc import Sequence

from pairmill.store import Dataset
from pairmill.versions.intention import Intention

REMOVALS = "_vacuum.json"
"""Names the tables that are being removed. A folder goes file by file, and a table whose log is there and whose files
are not would be an error to the next run that uses it: so the next one that writes first finishes the removal."""


def remove_tables(dataset: Dataset, names: Sequence[str]) -> None:
    """Remove tables with their logs."""
    if not names:
        return
    Intention(dataset, REMOVALS).declare({"tables": list(names)})
    finish_removals(dataset)


def finish_removals(dataset: Dataset) -> list[str]:
    """Finish what `remove_tables` began. Returns the tables."""
    intention = Intention(dataset, REMOVALS)
    begun = intention.declared()
    if begun is None:
        return []
    for name in begun["tables"]:
        if dataset.fs.exists(dataset.path(name)):
            dataset.fs.rm(dataset.path(name), recursive=True)
    intention.done()
    return list(begun["tables"])
