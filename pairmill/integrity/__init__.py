"""Is a dataset whole? `examine` finds damaged files and logs; `repair` rebuilds what can be rebuilt."""

from pairmill.integrity.examine import examine
from pairmill.integrity.findings import HARMLESS, Finding, Integrity, Kind
from pairmill.integrity.repair import Loss, Repair, repair

__all__ = ["HARMLESS", "Finding", "Integrity", "Kind", "Loss", "Repair", "examine", "repair"]
