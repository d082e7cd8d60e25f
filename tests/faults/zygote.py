"""Runs refreshes that are killed: a process that has imported everything and forks a child for each of them.

A child counts the steps that others can see on disk (a finished file gets its name, a commit record is written) and
kills itself with SIGKILL before or after the step it is told, or is killed by the clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Outcome:
    """How a child ended."""

    code: int
    """Exit code; negative: the signal that killed it."""
    steps: int
    """Steps that were counted; 0 when it was killed."""
    seconds: float
    error: str


class Zygote:
    """The process that forks; use it in a ``with`` statement."""

    def __enter__(self) -> Zygote:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=HERE,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def run(self, *children: dict[str, Any]) -> list[Outcome]:
        """Run children at once, each after its ``delay``, and wait for all.

        A child is ``config`` (a file), ``overrides``, ``verb`` (refresh, or another of `VERBS`) with ``arguments``, and
        when to die: ``before`` or ``after`` a step (counted from 0), or ``clock`` (seconds).
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(children) + "\n")
        self._process.stdin.flush()
        return [Outcome(**found) for found in json.loads(self._process.stdout.readline())]


def _refresh(config: str, overrides: list[str], **arguments: Any) -> None:
    from pairmill.report.progress import Silent
    from pairmill.run import load_config, refresh

    refresh(load_config(config, overrides), Silent(), **arguments)


def _forget(config: str, overrides: list[str], **arguments: Any) -> None:
    from pairmill.report.progress import Silent
    from pairmill.run import load_config
    from pairmill.store import Dataset
    from pairmill.takedown import Selectors, forget

    dataset = Dataset(load_config(config, overrides).dataset)
    forget(dataset, Selectors(**{k: tuple(v) for k, v in arguments.items()}), Silent(), wait_s=60)


def _answers(name: str) -> Callable[..., None]:
    def work(config: str, overrides: list[str], **arguments: Any) -> None:
        from tests.answers import asking

        getattr(asking, name)(config, overrides, **arguments)

    return work


VERBS: dict[str, Callable[..., None]] = {
    "refresh": _refresh,
    "forget": _forget,
    "ask": _answers("ask_some"),
    "fold": _answers("fold_all"),
}


class _Steps:
    """Counts steps, and dies at one of them."""

    def __init__(self, before: int | None, after: int | None) -> None:
        self.count = 0
        self._before, self._after = before, after

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        number = self.count
        self.count += 1
        if number == self._before:
            os.kill(os.getpid(), signal.SIGKILL)
        yield
        if number == self._after:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, owner: Any, name: str) -> None:
        """Count the calls of a function."""
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.step():
                return function(*args, **kwargs)

        setattr(owner, name, watched)


def _child(job: dict[str, Any], out: int) -> None:
    from deltalake import DeltaTable

    time.sleep(job.get("delay", 0.0))
    steps = _Steps(job.get("before"), job.get("after"))
    steps.watch(os, "replace")
    steps.watch(DeltaTable, "create_write_transaction")
    steps.watch(DeltaTable, "create")
    for owner, name in ((os, "unlink"), (os, "remove")) if job.get("removals") else ():
        steps.watch(owner, name)
    if job.get("writes"):
        steps.watch(os, "write")
    begin = time.monotonic()
    error, code = "", 0
    try:
        VERBS[job.get("verb", "refresh")](job["config"], job.get("overrides", []), **job.get("arguments", {}))
    except Exception as failure:  # noqa: BLE001 (told to the test)
        error, code = f"{type(failure).__name__}: {failure}", 1
    result = {"code": code, "steps": steps.count, "seconds": time.monotonic() - begin, "error": error}
    os.write(out, json.dumps(result).encode())
    os._exit(code)


def _start(job: dict[str, Any]) -> tuple[int, int]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(2, 1)  # what it prints must not get among the answers
        try:
            _child(job, writer)
        finally:
            os._exit(99)
    os.close(writer)
    if (clock := job.get("clock")) is not None:
        threading.Timer(clock, lambda: os.kill(child, signal.SIGKILL)).start()
    return child, reader


def _finish(child: int, reader: int) -> dict[str, Any]:
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    found = json.loads(text) if text else {"steps": 0, "seconds": 0.0, "error": ""}
    return {**found, "code": code}


def main() -> None:
    """Answer lines of jobs until there are none."""
    import pairmill.run
    import pairmill.sources.url_table  # noqa: F401 (imported once, before the forks)
    import tests.answers.asking
    import tests.steps  # noqa: F401

    for line in sys.stdin:
        children = [_start(job) for job in json.loads(line)]
        print(json.dumps([_finish(*child) for child in children]), flush=True)


if __name__ == "__main__":
    main()
