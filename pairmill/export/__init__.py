"""Writing snapshots in the formats that trainers read."""

from pairmill.export.parquet import export_parquet
from pairmill.export.run import ExportReport
from pairmill.export.webdataset import export_webdataset

__all__ = ["ExportReport", "export_parquet", "export_webdataset"]
