"""Saying that Ray itself is gone. It ends a driver whose raylet died, or whose head does not answer for a minute, with
exit code 1 and without a word."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import wait

CHECK_S = 1.0
"""Between two looks at the head; a raylet that dies is heard of at once."""
PATIENCE_S = 5.0
"""How long the head may be silent before it is told."""

log = logging.getLogger(__name__)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Tell when the raylet of this machine or the head of the cluster is gone, as long as this lasts."""
    import ray

    context = ray.get_runtime_context()
    (raylet,) = (node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    with watching(raylet, context.gcs_address):
        yield


@contextlib.contextmanager
def watching(raylet: str, head: str) -> Iterator[None]:
    """As `watched`, of a raylet by the path of its socket and a head by its address."""
    over = threading.Event()
    with _connected(raylet) as line:
        thread = threading.Thread(target=_watch, args=(line, head, over), name="pairmill-ray-head", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            with contextlib.suppress(OSError):  # its other end is gone already
                line.shutdown(socket.SHUT_RDWR)
            thread.join()


def _watch(line: socket.socket, head: str, over: threading.Event) -> None:
    heard, told = time.monotonic(), False
    while not over.is_set():
        readable = wait([line], CHECK_S)  # not select, which takes no descriptor above 1023
        if over.is_set():
            return
        if readable:
            log.error(
                "Ray's raylet on this machine is gone (killed, or memory was short), and Ray ends this run with it. "
                "What was committed is kept: run the command again"
            )
            return
        if answers(head):
            if told:
                log.warning("the head of the Ray cluster (%s) answers again", head)
            heard, told = time.monotonic(), False
        elif not told and time.monotonic() - heard >= PATIENCE_S:
            told = True
            log.error(
                "the head of the Ray cluster (%s) does not answer; where it stays away, Ray ends this run a minute "
                "after its last answer. What was committed is kept: run the command again when it is back",
                head,
            )


def _connected(path: str) -> socket.socket:
    line = socket.socket(socket.AF_UNIX)
    try:
        line.connect(path)
    except OSError:
        line.close()
        raise
    return line


def answers(address: str) -> bool:
    """Whether something takes connections at ``HOST:PORT``."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CHECK_S).close()
    except OSError:
        return False
    return True
