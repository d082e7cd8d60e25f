"""Logging, set up by the command and nowhere else."""

from __future__ import annotations

import logging
from typing import TextIO

from pairmill.report.text import visible, without_secrets


class _SafeFormatter(logging.Formatter):
    """One line a record (tracebacks keep theirs), without secrets and without control characters."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        return visible(without_secrets(super().formatMessage(record)))

    def formatException(self, ei: object) -> str:  # noqa: N802 (logging's name)
        return without_secrets(super().formatException(ei))  # type: ignore[arg-type]


def configure_logging(stream: TextIO, level: int = logging.WARNING) -> None:
    """Log to `stream`: our own records from `level` on, those of libraries when they are warnings."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_SafeFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name in ("pairmill", "filters", "captioners", "pipelines"):
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)
