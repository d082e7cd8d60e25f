"""The store: Delta Lake tables of Parquet files, partitioned by shard, and the snapshots published over them.

Workers write Parquet files; only the driver commits them. A file is visible when a Delta commit names it, never before.
Layout: ``<dataset>/<table>/shard=<n>/<name>-<checksum>.parquet`` beside the table's ``_delta_log``.
"""

from pairmill.store.dataset import (
    HISTORY_TABLE,
    LEDGER_TABLE,
    PAIRS_TABLE,
    REWRITES,
    REWRITES_TABLE,
    SNAPSHOTS_TABLE,
    Dataset,
    Snapshot,
    column_digests,
)
from pairmill.store.files import (
    ROW_GROUP,
    DataFile,
    ShardWriter,
    checksum_of,
    content_digest,
    existing_file,
    parquet_options,
    read_files,
    stream_files,
    sync_folder,
    without_rows,
    write_if_new,
)
from pairmill.store.tables import Records, Table, commit_records, is_whole, open_delta, set_torn_aside

__all__ = [
    "HISTORY_TABLE",
    "LEDGER_TABLE",
    "PAIRS_TABLE",
    "REWRITES",
    "REWRITES_TABLE",
    "ROW_GROUP",
    "SNAPSHOTS_TABLE",
    "DataFile",
    "Dataset",
    "Records",
    "ShardWriter",
    "Snapshot",
    "Table",
    "checksum_of",
    "column_digests",
    "commit_records",
    "content_digest",
    "existing_file",
    "is_whole",
    "open_delta",
    "parquet_options",
    "read_files",
    "set_torn_aside",
    "stream_files",
    "sync_folder",
    "without_rows",
    "write_if_new",
]
