"""A raylet or a head that is gone is told; Ray ends the driver in silence."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pairmill.engines.ray import head


class Heard(logging.Handler):
    """Sets an event for each of the phrases that is logged."""

    def __init__(self, *phrases: str) -> None:
        super().__init__()
        self.events = {phrase: threading.Event() for phrase in phrases}

    def emit(self, record: logging.LogRecord) -> None:
        for phrase, event in self.events.items():
            if phrase in record.getMessage():
                event.set()

    def waits_for(self, phrase: str) -> bool:
        return self.events[phrase].wait(60)


@pytest.fixture
def heard() -> Iterator[Heard]:
    handler = Heard("raylet on this machine is gone", "does not answer", "answers again")
    head.log.addHandler(handler)
    yield handler
    head.log.removeHandler(handler)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHECK_S", 0.02)
    monkeypatch.setattr(head, "PATIENCE_S", 0.1)


def test_a_head_that_is_silent_and_comes_back_and_a_raylet_that_dies(tmp_path: Path, heard: Heard):
    raylet, gcs = socket.socket(socket.AF_UNIX), socket.create_server(("127.0.0.2", 0))
    raylet.bind(str(tmp_path / "raylet"))
    raylet.listen()
    host, port = gcs.getsockname()
    with head.watching(str(tmp_path / "raylet"), f"{host}:{port}"):
        gcs.close()
        assert heard.waits_for("does not answer")
        with socket.create_server((host, port)):
            assert heard.waits_for("answers again")
        raylet.close()
        assert heard.waits_for("raylet on this machine is gone")


def test_a_driver_with_many_open_files_hears_of_it_too(tmp_path: Path, heard: Heard):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1100):
            stack.callback(os.close, os.dup(0))
        raylet, gcs = socket.socket(socket.AF_UNIX), socket.create_server(("127.0.0.2", 0))
        stack.callback(gcs.close)
        raylet.bind(str(tmp_path / "raylet"))
        raylet.listen()
        host, port = gcs.getsockname()
        with head.watching(str(tmp_path / "raylet"), f"{host}:{port}"):
            raylet.close()
            assert heard.waits_for("raylet on this machine is gone")


def test_a_calm_end_is_no_loss(tmp_path: Path, heard: Heard):
    before = threading.active_count()
    with socket.socket(socket.AF_UNIX) as raylet, socket.create_server(("127.0.0.2", 0)) as gcs:
        raylet.bind(str(tmp_path / "raylet"))
        raylet.listen()
        with head.watching(str(tmp_path / "raylet"), "{}:{}".format(*gcs.getsockname())):
            assert threading.active_count() == before + 1
        assert threading.active_count() == before
    assert not any(event.is_set() for event in heard.events.values())
