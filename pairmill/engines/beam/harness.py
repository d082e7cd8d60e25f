"""What Beam 2.77 lacks on the driver's machine, for as long as an engine or a pipeline runs; and silence.

With ``--direct_running_mode=multi_processing`` it waits for ever for a worker process that died, and it opens its gRPC
ports, which anybody may talk to, on all interfaces of the machine. Job servers it can start in the main thread only.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

log = logging.getLogger(__name__)


def told(record: logging.LogRecord) -> bool:
    """A filter for the root logger: that parts of Google's cloud are not installed is no news."""
    return not str(record.msg).startswith("apitools not found")


def dask_setup(worker: Any) -> None:  # noqa: ARG001 (Dask calls it in each worker that has this module preloaded)
    """Be as silent as the driver. Ctrl-C reaches the driver, which stops the workers in order."""
    logging.getLogger().addFilter(told)
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL + 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def silent(*names: str) -> Iterator[None]:
    """These loggers say nothing."""
    levels = [(logger, logger.level) for logger in map(logging.getLogger, names)]
    for logger, _ in levels:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)


@contextlib.contextmanager
def job_servers() -> Iterator[None]:
    """The job servers that Flink's, Spark's and Prism's runners start: one for all pipelines, which ends here.

    Beam's own set a handler of Ctrl-C, which fails in any thread but the main one, and would end the server before the
    driver can cancel its pipeline by it; Flink's runner starts another one for each pipeline.
    """
    from apache_beam.runners.portability import job_server, prism_runner, spark_runner
    from apache_beam.utils.shared import Shared

    names = ("FlinkJarJobServer", "SparkJarJobServer", "PrismJobServer")  # which tell all that their process prints
    loggers = [] if log.isEnabledFor(logging.DEBUG) else [logging.getLogger(name) for name in names]
    with contextlib.ExitStack() as running:

        class Server(job_server.StopOnExitJobServer):
            """As Beam's own, without the handler."""

            _started: bool

            def start(self) -> Any:
                with self._lock:
                    if not self._started:
                        self._endpoint = self._job_server.start()
                        self._started = True
                        running.callback(self.stop)
                return self._endpoint

        servers: dict[type, Server] = {}
        before = job_server.StopOnExitJobServer
        job_server.StopOnExitJobServer = lambda server: servers.setdefault(type(server), Server(server))
        for logger in loggers:
            logger.disabled = True  # Prism's sets its level itself
        try:
            yield
        finally:
            job_server.StopOnExitJobServer = before
            spark_runner.JOB_SERVER_CACHE.clear()
            prism_runner.PrismRunner.shared_handle = Shared()
            running.close()
            for logger in loggers:
                logger.disabled = False


@contextlib.contextmanager
def mended() -> Iterator[threading.Event]:
    """The death of a worker process ends the pipeline with an error, and sets the event; ports are on loopback."""
    lost = threading.Event()
    with _watched_workers(lost), _ports_on_loopback():
        yield lost


@contextlib.contextmanager
def _watched_workers(lost: threading.Event) -> Iterator[None]:
    from apache_beam.portability import python_urns
    from apache_beam.runners.portability.fn_api_runner import worker_handlers
    from apache_beam.runners.portability.local_job_service import SubprocessSdkWorker

    class Watched(worker_handlers.SubprocessSdkWorkerHandler):
        """As Beam's own, but that a death is told: as Beam itself does it for its Docker workers."""

        def start_worker(self) -> None:
            command = self._worker_command_line
            if not log.isEnabledFor(logging.DEBUG):  # they would tell of every channel; errors come by another way
                command += b" 2>/dev/null"
            self.worker = SubprocessSdkWorker(command, self.control_address, self.provision_info, self.worker_id)
            self.worker_thread = threading.Thread(name="run_worker", target=self._serve, daemon=True)
            self.worker_thread.start()

        def _serve(self) -> None:
            try:
                self.worker.run()
            except RuntimeError as error:  # it has the exit code
                lost.set()
                self.control_conn.abort(error)
                with contextlib.suppress(Exception):  # it raises what its reader met, which is the same death
                    self.data_conn.close()

    handlers = worker_handlers.WorkerHandler
    before = handlers._registered_environments[python_urns.SUBPROCESS_SDK]
    handlers.register_environment(python_urns.SUBPROCESS_SDK, bytes)(Watched)
    try:
        yield
    finally:
        handlers._registered_environments[python_urns.SUBPROCESS_SDK] = before


@contextlib.contextmanager
def _ports_on_loopback() -> Iterator[None]:
    from apache_beam.runners.portability import local_job_service
    from apache_beam.runners.portability.fn_api_runner import worker_handlers
    from apache_beam.runners.worker import worker_pool_main

    modules = (worker_handlers, local_job_service, worker_pool_main)
    grpc = worker_handlers.grpc
    for module in modules:
        module.grpc = _Loopback(grpc)
    try:
        yield
    finally:
        for module in modules:
            module.grpc = grpc


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


@contextlib.contextmanager
def silent_threads() -> Iterator[None]:
    """A worker or a job server that is lost or stopped is told once, by us, and not by every thread of Beam's that was
    speaking with it."""
    before = threading.excepthook

    def hook(met: threading.ExceptHookArgs) -> None:
        if met.exc_type.__module__.partition(".")[0] != "grpc":
            before(met)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
