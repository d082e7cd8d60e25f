"""Surviving native crashes: a decoder or a library that takes its process down costs one row, not the run.

A worker marks a shard before it works on it and takes the mark away afterwards. Whoever finds a mark knows that the
last attempt died, and works in a child process: the child keeps a journal of its kernel calls, and each time it dies
the call it died in is cut smaller, until a single row is left, which is quarantined as ``error.crash``. Marks outlive
the run, so a dataset whose driver itself was killed by a crash gets past it at the next run.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import tempfile
import threading
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from typing import Any

from pairmill import errors, storage
from pairmill.execute import Care, Job, Unit, Worker
from pairmill.store import Dataset

MARKS = "_work"
"""Folder of the marks, in the dataset."""

SHRINK = 8
"""A call in which a child died is cut into so many parts."""

MAX_SILENT_DEATHS = 3
"""Deaths outside of any kernel call (loading a model, writing a file) after which the cause is not a row."""


def run_unit(worker: Worker, unit: Unit) -> Unit:
    """Run a unit in a worker; an error that pairmill raised on purpose becomes the unit's `failure`. Others are raised,
    as errors that travel between processes."""
    if unit.failure is not None:
        return unit
    mark = _Mark(worker, unit)
    try:
        with mark:
            if not mark.found:
                return worker.run(unit)
            worker.release()  # or a device would have to hold its models twice
            return _isolated(worker.job, worker.group, unit)
    except errors.PairmillError as error:
        return replace(unit, failure=_failure(error))
    except Exception as error:
        if not _travels(error):
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        raise


def _failure(error: errors.PairmillError) -> list[str]:
    """Class name, of the nearest class that `pairmill.errors` has, and message."""
    kind = next(kind for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
    return [kind.__name__, str(error)]


def _travels(error: Exception) -> bool:
    """Whether another process gets the error as it is. Many a library's does not: whoever waits for it would take its
    sender for dead."""
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)  # noqa: S301 (what was just made of it)
    except Exception:  # noqa: BLE001 (whatever its class does)
        return False


def raise_failure(unit: Unit) -> None:
    """Raise again, in the driver, what stopped a unit in its worker."""
    if unit.failure is not None:
        kind, message = unit.failure
        raise getattr(errors, kind)(message)


class _Mark:
    """A file that stands while a shard is worked on; it stays behind only when the process dies."""

    def __init__(self, worker: Worker, unit: Unit) -> None:
        dataset = Dataset(worker.job.dataset)
        self._fs = dataset.fs
        self._path = dataset.path(MARKS, f"{unit.shard}-{worker.job.segment}-{worker.group}")
        self.found = bool(self._fs.exists(self._path))

    def __enter__(self) -> None:
        if not storage.is_s3(self._fs):  # which has no folders; and s3fs would make a bucket that is missing
            self._fs.makedirs(os.path.dirname(self._path), exist_ok=True)
        self._fs.pipe_file(self._path, b"")

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path)


def _isolated(job: Job, group: int, unit: Unit) -> Unit:
    """Run a unit in child processes until one comes through.

    Raises:
        EngineError: children die outside of kernel calls, so no row is to blame.
    """
    silent = 0
    with tempfile.TemporaryDirectory(prefix="pairmill-") as folder:
        care = Care(os.path.join(folder, "journal"))
        while True:
            result = _in_child(job, group, unit, care)
            if result is not None:
                return result
            if not _learn(care):
                silent += 1
                if silent >= MAX_SILENT_DEATHS:
                    raise errors.EngineError(
                        f"the process that works on shard {unit.shard} ({job.groups[group].title}) dies while it loads "
                        "or writes, not on a row: often memory is short (fewer engine.workers, smaller models.batch)"
                    )


def _learn(care: Care) -> bool:
    """Take from the journal in which call the child died: cut that call smaller, or give its only row up."""
    try:
        with open(care.journal, encoding="utf-8") as file:
            stage, uids = json.load(file)
        os.remove(care.journal)
    except (OSError, ValueError):
        return False
    if len(uids) == 1:
        care.crashed.setdefault(stage, []).extend(uids)
    else:
        care.rows.setdefault(stage, {}).update(dict.fromkeys(uids, max(1, len(uids) // SHRINK)))
    return True


def _in_child(job: Job, group: int, unit: Unit, care: Care) -> Unit | None:
    """The unit as a child process finished it, or None when the child died. What the child raised is raised here."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(job, group, unit.dumps(), care, sender))
    child.start()
    sender.close()  # so that the pipe ends when the child does
    try:
        answer = receiver.recv()
    except EOFError:
        return None
    except BaseException:  # Ctrl-C
        child.kill()
        raise
    finally:
        child.join()
        receiver.close()
    if isinstance(answer, Exception):
        raise answer
    return Unit.loads(answer)


def die_with_parent() -> None:
    """In a process that multiprocessing started: end when its parent does, were it by SIGKILL. Otherwise it would wait
    for work for ever, with its models in memory."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="pairmill-parent", daemon=True).start()


def _child(job: Job, group: int, text: str, care: Care, sender: Connection) -> None:
    die_with_parent()
    unit = Unit.loads(text)
    answer: Any
    try:
        answer = Worker(job, group, care).run(unit).dumps()
    except errors.PairmillError as error:
        answer = replace(unit, failure=_failure(error)).dumps()
    except Exception as error:  # noqa: BLE001 (a defect of the code is no death: it is raised where the unit came from)
        told = error if _travels(error) else RuntimeError(f"{type(error).__name__}: {error}")
        answer = ExceptionWithTraceback(told, error.__traceback__)
    sender.send(answer)
    sender.close()
