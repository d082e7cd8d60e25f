"""Starting Ray or joining a cluster, and seeing that its workers have the code."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from pairmill.engines import import_path
from pairmill.engines.ray import head
from pairmill.errors import EngineError
from schemas.config import Engine as EngineConfig

LOCAL_ADDRESS = "127.0.0.2"
"""Keeps a cluster of our own on loopback; Ray rewrites 127.0.0.1 to the host's address, but not this one."""

PACKAGES = ("pairmill", "schemas", "filters", "captioners", "pipelines")
"""What a worker must be able to import."""

REACH_S = 5.0
"""How long nothing may answer at the address of a cluster."""
TRIES_ENV = "RAY_gcs_server_port_wait_time_s"
"""How often Ray tries to speak to a head, half a minute each time; 20 times where this is not said."""

PROBE_S = 300.0
"""How long a cluster may take to start a worker with its runtime environment, on a node that is there."""


@contextlib.contextmanager
def open_session(config: EngineConfig) -> Iterator[tuple[str, bool]]:
    """Join the cluster that the config or RAY_ADDRESS names, or one that runs here; else start one on this machine.
    Gives its name, and whether it is our own, which nobody adds machines to.

    Raises:
        EngineError: Ray is not installed, the cluster cannot be reached, or its workers lack the code.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read by ray.init; pairmill never calls home
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what its core would log reaches us as an exception
    # A task that Ray kills since memory is short is tried again without end otherwise, whatever its max_retries say.
    os.environ.setdefault("RAY_task_oom_retries", "3")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise EngineError(
            "engine.kind is ray, but Ray is not installed; pip install 'ray[data]' or run with --set engine.kind=local"
        ) from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it would log reaches us as an exception
    if ray.is_initialized():
        with head.watched():
            yield "ray (joined)", False
        return
    with _sigterm_as_it_was():
        name, own = _start(config)
    try:
        with head.watched():
            if not own:
                _probe()
            yield name, own
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _sigterm_as_it_was() -> Iterator[None]:
    """Ray's way to end at SIGTERM is an exit code of its own; the command's is that of Ctrl-C."""
    before = signal.getsignal(signal.SIGTERM)
    ours = callable(before) and threading.current_thread() is threading.main_thread()
    try:
        yield
    except SystemExit:  # Ray's way, as it starts
        if ours:
            raise KeyboardInterrupt from None
        raise
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)


def _start(config: EngineConfig) -> tuple[str, bool]:
    import ray

    address = config.address
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.runtime_env:
        common["runtime_env"] = dict(config.runtime_env)
    wanted = os.environ.get("RAY_ADDRESS") if address in (None, "auto") else address
    if wanted and "://" in wanted:
        raise EngineError(
            f"{wanted} is no address that a run can join: submit the run to the cluster (ray job submit --address "
            "http://HEAD:8265 --working-dir . -- python -m pairmill run CONFIG.yaml), or start it on a machine of the "
            "cluster with engine.address: HEAD:6379"
        )
    try:
        if wanted and wanted != "local":
            _join(wanted, common)
            return f"ray cluster at {wanted}", False
        if address == "auto" and not wanted:
            with contextlib.suppress(ConnectionError):
                _join("auto", common)
                return "ray cluster that runs here", False
        with import_path(), _without_greeting():
            ray.init(address="local", include_dashboard=False, _node_ip_address=LOCAL_ADDRESS, **common)
    except ValueError as error:
        raise EngineError(
            f"Ray refuses the settings ({error}); check engine.address, RAY_ADDRESS and engine.runtime_env. In a job "
            "that `ray job submit` started, say each part of the runtime environment either there or in the config"
        ) from error
    except (ConnectionError, RuntimeError, OSError) as error:
        raise EngineError(
            f"cannot start or reach Ray ({wanted or 'local'}): {error}; check engine.address and RAY_ADDRESS, or run "
            "with --set engine.kind=local"
        ) from error
    return f"ray, started here with {int(ray.cluster_resources().get('CPU', 0))} CPUs", True


def _join(address: str, common: Mapping[str, Any]) -> None:
    """Join a cluster, or see soon that there is none: Ray itself would try for ten minutes, deaf to Ctrl-C.

    Raises:
        ConnectionError: nothing answers there, as when a cluster was killed and left its address behind.
        ValueError: it is no address.
        RuntimeError: what answers is no head of Ray.
    """
    import ray
    from ray._private.services import get_ray_address_from_environment

    found = get_ray_address_from_environment("auto", None) if address == "auto" else address
    if not found.rpartition(":")[2].isdigit():
        raise ValueError(f"{found} is not HOST:PORT")
    until = time.monotonic() + REACH_S
    while not head.answers(found):
        if time.monotonic() >= until:
            raise ConnectionError(f"nothing answers at {found}")
        time.sleep(0.2)
    once = os.environ.get(TRIES_ENV)
    os.environ.setdefault(TRIES_ENV, "1")
    try:
        ray.init(address=found, **common)
    finally:
        if once is None:
            del os.environ[TRIES_ENV]


def _probe() -> None:
    """Import the packages once on each node of a cluster that others started.

    Raises:
        EngineError: a node cannot.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def imports(packages: tuple[str, ...]) -> str | None:  # nested, so that it travels by value
        import importlib

        try:
            for package in packages:
                importlib.import_module(package)
        except ImportError as error:
            return str(error)
        return None

    probe = ray.remote(num_cpus=0, max_retries=0)(imports)
    asked = {
        probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)).remote(PACKAGES): n
        for n in ray.nodes()
        if n["Alive"]
    }
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=PROBE_S)
    for answer in [*done, *late]:
        address = asked[answer]["NodeManagerAddress"]
        try:
            lacking = ray.get(answer, timeout=0)
        except ray.exceptions.RuntimeEnvSetupError as error:
            raise EngineError(f"node {address} cannot set engine.runtime_env up: {error}") from error
        except ray.exceptions.GetTimeoutError as error:
            raise EngineError(
                f"node {address} of the Ray cluster started no worker in {PROBE_S:.0f} s; look at its state (ray "
                "status, ray logs) and at the runtime environment"
            ) from error
        except ray.exceptions.RayError:  # the node was lost meanwhile: no matter, others do its work
            continue
        if lacking is not None:
            raise EngineError(
                f"workers on node {address} of the Ray cluster lack the code ({lacking}). Submit the run with it (ray "
                "job submit --working-dir . -- python -m pairmill run ...), say engine.runtime_env: {working_dir: .}, "
                "or install pairmill and its requirements on every node"
            )


@contextlib.contextmanager
def _without_greeting() -> Iterator[None]:
    """Ray's core writes a line about its log level straight to file descriptor 2 while it starts; errors are raised."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(nowhere)
        os.close(saved)
