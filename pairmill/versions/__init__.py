"""Snapshots over time: what changed between two, going back to one, and which may go."""

from pairmill.versions.diff import By, DiffReport, diff
from pairmill.versions.history import table_bytes, what_changed
from pairmill.versions.rollback import RollbackReport, finish, rollback
from pairmill.versions.vacuum import VacuumReport, vacuum

__all__ = [
    "By",
    "DiffReport",
    "RollbackReport",
    "VacuumReport",
    "diff",
    "finish",
    "rollback",
    "table_bytes",
    "vacuum",
    "what_changed",
]
