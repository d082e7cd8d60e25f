"""Writing snapshots in the formats that trainers read, checking what was written, and taking pairs out of it."""

from pairmill.export.parquet import export_parquet
from pairmill.export.registry import KnownExport, known_exports, register
from pairmill.export.run import ExportReport
from pairmill.export.takedown import Held, Reach, Removal, holds_pairs, remove_from_exports, remove_pairs
from pairmill.export.verify import Problem, VerifyReport, Wrong, verify_export
from pairmill.export.webdataset import export_webdataset

__all__ = [
    "ExportReport",
    "Held",
    "KnownExport",
    "Problem",
    "Reach",
    "Removal",
    "VerifyReport",
    "Wrong",
    "export_parquet",
    "export_webdataset",
    "holds_pairs",
    "known_exports",
    "register",
    "remove_from_exports",
    "remove_pairs",
    "verify_export",
]
