"""Logging as the command sets it up."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from pairmill.report.logs import configure_logging


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logging(stream, logging.INFO)
    yield stream
    root.handlers, root.level = before
    logging.captureWarnings(False)


def test_records_lose_secrets_and_escapes(log: io.StringIO):
    logging.getLogger("pairmill.x").info("fetch %s", "https://u:pw@host/a?sig=canary\x1b[1m")
    line = log.getvalue()
    assert "canary" not in line
    assert "pw" not in line
    assert line.rstrip().endswith(r"INFO pairmill.x: fetch https://host/a?...")


def test_tracebacks_lose_secrets(log: io.StringIO):
    try:
        raise ValueError("https://u:canary@host/")
    except ValueError:
        logging.getLogger("pairmill").exception("failed")
    assert "canary" not in log.getvalue()
    assert "ValueError: https://host/" in log.getvalue()


def test_libraries_speak_only_when_they_warn(log: io.StringIO):
    logging.getLogger("somelibrary").info("chatter")
    logging.getLogger("somelibrary").warning("trouble")
    assert log.getvalue().count("\n") == 1
    assert "trouble" in log.getvalue()
