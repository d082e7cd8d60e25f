"""What all tests share: hypothesis draws the same examples each time, and a loaded machine is no failure."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")

os.environ.setdefault("RAY_worker_niceness", "0")
"""Ray's workers give way to all else by default, and would starve beside the tests of the other process."""


LOADS_THE_MACHINE = ("contract", "deploy", "engines", "faults")
"""Folders whose tests start clusters, kill processes and have deadlines: never two of them at once."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` runs files side by side, each file in one process, where its fixtures are made once."""
    for item in items:
        file = item.path.relative_to(Path(__file__).parent)
        item.add_marker(pytest.mark.xdist_group("machine" if file.parts[0] in LOADS_THE_MACHINE else str(file)))


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_reaches_children() -> None:
    """A job that a shell started in the background ignores Ctrl-C, and so do its children; some tests send it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_debugging_left_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's --debug speaks through the environment, so that workers hear it; other tests must not."""
    monkeypatch.setenv("PAIRMILL_DEBUG", "")
    monkeypatch.delenv("PAIRMILL_DEBUG")
