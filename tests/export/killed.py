"""Kills a program at each of its steps in a folder, in one process that forks: `python -m tests.export.killed JOB`.

The job (JSON) names what to run, ``export`` or ``takedown``. In the copy number n of the folder the program is killed
before the n-th time that it creates, renames or removes a file there, and then run to its end. So it goes on until a
program was not killed, because it has fewer steps. With ``stride`` only each stride-th step is tried.
"""

from __future__ import annotations

import builtins
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pairmill.export import Options, export, remove_pairs
from pairmill.store import Dataset


def work(job: dict[str, Any], out: str) -> None:
    if job["what"] == "takedown":
        remove_pairs(out, job["uids"])
        return
    snapshot = Dataset(job["dataset"]).snapshot(job["snapshot"])
    options = Options(**job.get("options", {}))
    export(snapshot, out, job["format"], pairs_per_shard=job["pairs_per_shard"], options=options)


def kill_at(step: int, out: str) -> None:
    """SIGKILL before the step-th change in the folder, with a torn file where that is the creation of one."""
    count = 0

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, *more: Any, **options: Any) -> Any:
            nonlocal count
            if isinstance(path, (str, Path)) and str(path).startswith(out):
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(path, *more, **options)

        return wrapped

    def opening(path: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        nonlocal count
        if "w" in mode and str(path).startswith(out):
            count += 1
            if count == step:
                plain_open(path, mode).write(b"torn")
                os.kill(os.getpid(), signal.SIGKILL)
        return plain_open(path, mode, *more, **options)

    plain_open = builtins.open
    builtins.open = opening
    os.replace, os.remove, os.unlink = counting(os.replace), counting(os.remove), counting(os.unlink)


def forked(run: Callable[[], None]) -> int:
    """What waitpid says of a child that runs this."""
    child = os.fork()
    if child == 0:
        run()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def main(job: dict[str, Any]) -> None:
    ends: list[dict[str, Any]] = []
    while not ends or ends[-1]["killed"]:
        step = len(ends) * job.get("stride", 1) + 1
        out = f"{job['copies']}/{step:03d}"
        shutil.copytree(job["folder"], out)

        def die(step: int = step, out: str = out) -> None:
            kill_at(step, out)
            work(job, out)

        killed = os.WIFSIGNALED(forked(die))
        between = sorted(str(path.relative_to(out)) for path in Path(out).rglob("*"))
        again = forked(lambda out=out: work(job, out))
        ends.append({"out": out, "killed": killed, "between": between, "again": again})
    print(json.dumps(ends))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
