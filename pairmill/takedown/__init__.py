"""Takedown: removes pairs for good from every table, version and export, and keeps them out.

`pairmill.takedown.removal` says in which order that is done, so that it can be killed anywhere and goes on.
"""

from pairmill.takedown.absence import Absence, Trace, check_absence
from pairmill.takedown.removal import (
    TAKEDOWNS,
    TAKEDOWNS_TABLE,
    ExportTakedown,
    TableTakedown,
    TakedownReport,
    finish,
    forget,
    preview,
    record,
    resume,
)
from pairmill.takedown.selectors import Selectors, read_list

__all__ = [
    "TAKEDOWNS",
    "TAKEDOWNS_TABLE",
    "Absence",
    "ExportTakedown",
    "Selectors",
    "TableTakedown",
    "TakedownReport",
    "Trace",
    "check_absence",
    "finish",
    "forget",
    "preview",
    "read_list",
    "record",
    "resume",
]
