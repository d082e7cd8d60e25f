"""What Beam 2.77's runner on this machine lacks, for as long as a pipeline runs.

With ``--direct_running_mode=multi_processing`` it waits for ever for a worker process that died, and it opens its gRPC
ports, which anybody may talk to, on all interfaces of the machine.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

log = logging.getLogger(__name__)


@contextlib.contextmanager
def mended() -> Iterator[threading.Event]:
    """The death of a worker process ends the pipeline with an error, and sets the event; ports are on loopback."""
    from apache_beam.portability import python_urns
    from apache_beam.runners.portability import local_job_service
    from apache_beam.runners.portability.fn_api_runner import worker_handlers

    lost = threading.Event()

    class Watched(worker_handlers.SubprocessSdkWorkerHandler):
        """As Beam itself watches its Docker workers."""

        def start_worker(self) -> None:
            self._stopping = False
            if not log.isEnabledFor(logging.DEBUG):  # they would tell of every channel; errors come by another way
                self._worker_command_line += b" 2>/dev/null"
            super().start_worker()
            threading.Thread(target=self._watch, daemon=True, name="pairmill-watch").start()

        def _watch(self) -> None:
            self.worker_thread.join()
            if not self._stopping:
                lost.set()
                self.control_conn.abort(RuntimeError("a worker process died"))
                self.data_conn.close()

        def close(self) -> None:
            self._stopping = True
            super().close()

    handlers = worker_handlers.WorkerHandler
    before = handlers._registered_environments[python_urns.SUBPROCESS_SDK]
    handlers.register_environment(python_urns.SUBPROCESS_SDK, bytes)(Watched)
    modules = (worker_handlers, local_job_service)
    grpc = worker_handlers.grpc
    for module in modules:
        module.grpc = _Loopback(grpc)
    try:
        yield lost
    finally:
        for module in modules:
            module.grpc = grpc
        handlers._registered_environments[python_urns.SUBPROCESS_SDK] = before


class _Loopback:
    """The module grpc, or a server that it made, but for the address of ports."""

    def __init__(self, of: Any) -> None:
        self._of = of

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)

    def server(self, *args: Any, **kwargs: Any) -> Any:
        return _Loopback(self._of.server(*args, **kwargs))

    def add_insecure_port(self, address: str) -> int:
        return int(self._of.add_insecure_port(address.replace("[::]", "127.0.0.1")))
