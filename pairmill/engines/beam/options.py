"""Beam's pipeline options: checked, and what follows from them. Imported inside functions, since it imports Beam."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from apache_beam.options import pipeline_options as beam
from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator
from apache_beam.runners.runner import create_runner

from pairmill.engines.beam import harness
from pairmill.errors import ConfigError, EngineError

RUNNERS = {
    name.lower(): f"apache_beam.runners.{path}.{name}"
    for name, path in {
        "DirectRunner": "direct.direct_runner",
        "FnApiRunner": "portability.fn_api_runner",
        "DaskRunner": "dask.dask_runner",
        "PrismRunner": "portability.prism_runner",
        "FlinkRunner": "portability.flink_runner",
        "SparkRunner": "portability.spark_runner",
        "PortableRunner": "portability.portable_runner",
        "DataflowRunner": "dataflow.dataflow_runner",
    }.items()
}
"""Runners by their names in lower case; others are named by module and class."""

_LOCAL = ("DirectRunner", "FnApiRunner")

_SECRETS = ("s3_access_key_id", "s3_secret_access_key", "s3_session_token", "azure_connection_string")
"""Options that hold credentials. All options are in the config, so every reader of a snapshot sees them."""


class PairmillOptions(beam.PipelineOptions):
    """What pairmill itself asks of those who choose a runner."""

    @classmethod
    def _add_argparse_args(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--gpu_accelerator",
            help="the accelerator hint of stages that want a GPU, and of no others, for runners that heed it: "
            "type:nvidia-l4;count:1;install-nvidia-driver",
        )


@dataclass(frozen=True)
class Runner:
    """A runner, its options, and how many workers it has."""

    name: str
    options: beam.PipelineOptions
    slots: int
    """Workers that can be busy at a time, as far as the options say it; else 1."""
    processes: int
    """Processes that these are in."""

    @property
    def accelerator(self) -> str | None:
        """See `PairmillOptions`."""
        return self.options.view_as(PairmillOptions).gpu_accelerator


def checked(flags: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the runner, and the options that bring it about.

    Raises:
        ConfigError: an option that Beam does not know, or a wrong value.
        EngineError: what the runner needs is not installed.
    """
    name, path = _named(flags)
    given = parse(flags)
    for secret in _SECRETS:
        if getattr(given, secret):
            raise ConfigError(
                f"--{secret}: pipeline options become part of each snapshot, which others may read; credentials come "
                "from the environment"
            )
    if given.direct_num_workers < 0:
        raise ConfigError(f"--direct_num_workers={given.direct_num_workers}: give 1 or more, or 0 for all CPUs")
    flags = [*flags, f"--runner={path}"]
    if name in ("DirectRunner", "SwitchingDirectRunner") and not given.prism_location:
        # Beam 2.77 would look for Prism first, and fetch it from the web. Of our pipelines none has a trigger.
        flags += ["--allow_unsafe_triggers"]
    with _explained(name):
        runner = create_runner(path)
    problems = PipelineOptionsValidator(beam.PipelineOptions(flags), runner).validate()
    if problems:
        raise ConfigError("pipeline options: " + "; ".join(str(problem) for problem in problems))
    if name == "DataflowRunner":
        with _explained(name):
            importlib.import_module("apache_beam.runners.dataflow.internal.apiclient")
    return name, flags


@contextlib.contextmanager
def _explained(runner: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, AttributeError) as error:
        extra = {"DataflowRunner": "gcp", "DaskRunner": "dask"}.get(runner)
        advice = f"pip install 'apache-beam[{extra}]'" if extra else "is it spelled right, and installed?"
        raise EngineError(f"the runner {runner} cannot be loaded: {error}; {advice}") from error


@contextlib.contextmanager
def chosen_runner(flags: Sequence[str], workers: int | None, dataset_is_local: bool) -> Iterator[Runner]:
    """The runner that command-line options name, with what has to run beside it.

    Args:
        flags: Options as on a command line; DirectRunner where they name no runner.
        workers: Processes of a Dask cluster that is started here; all CPUs when None.
        dataset_is_local: Whether the dataset lies on a disk of this machine.

    Raises:
        ConfigError: an option that Beam does not know, a wrong value, or a runner that cannot reach the dataset.
        EngineError: what the runner needs is not installed.
    """
    name, flags = checked(flags)
    if name == "DataflowRunner" and dataset_is_local:
        raise ConfigError("dataset: Dataflow's workers cannot reach a disk of this machine; give gs://... or s3://...")
    with contextlib.ExitStack() as stack:
        if name == "DaskRunner":
            stack.enter_context(harness.silent("distributed", "distributed.client"))
            flags += stack.enter_context(_dask(flags, workers))
        options = beam.PipelineOptions(flags)
        slots, processes = _size(name, options)
        yield Runner(name, options, slots, processes)


def parse(flags: Sequence[str]) -> argparse.Namespace:
    """All options as Beam's classes of options have them.

    Raises:
        ConfigError: an unknown option, or a wrong value.
    """
    if any("dask" in flag.lower() for flag in flags):
        _know_dask()
    parser = _Parser(allow_abbrev=False, add_help=False)
    for options in {str(c): c for c in beam.PipelineOptions.__subclasses__()}.values():
        options._add_argparse_args(parser)
    found, unknown = parser.parse_known_args(flags)
    if unknown:
        names = [option for action in parser._actions for option in action.option_strings]
        told = []
        for flag in unknown:
            near = difflib.get_close_matches(flag.partition("=")[0], names, n=1)
            told.append(f"{flag}{f' (did you mean {near[0]}?)' if near else ''}")
        raise ConfigError(f"Beam knows no pipeline option {', '.join(told)}; write options as --name=value")
    return found


def _know_dask() -> None:
    """Dask's options are known once its runner was imported."""
    with _explained("DaskRunner"):
        from apache_beam.runners.dask import dask_runner  # noqa: F401


class _Parser(beam._BeamArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"pipeline options: {message}")


def _named(flags: Sequence[str]) -> tuple[str, str]:
    """The runner's name and its class."""
    given = parse(flags).runner or "DirectRunner"
    path = RUNNERS.get(given.lower()) or RUNNERS.get(f"{given.lower()}runner") or given
    if "." not in path:
        names = ", ".join(path.rpartition(".")[2] for path in RUNNERS.values())
        raise ConfigError(f"--runner={given} is none of {names}, nor a class by its module")
    return path.rpartition(".")[2], path


def _size(name: str, options: beam.PipelineOptions) -> tuple[int, int]:
    """How many workers, in how many processes."""
    every = options.get_all_options()
    if name in _LOCAL:
        workers = every["direct_num_workers"] or os.cpu_count() or 1
        return workers, workers if every["direct_running_mode"] == "multi_processing" else 1
    if name == "DaskRunner":
        threads = _dask_threads(every)
        return sum(threads.values()) or 1, len(threads) or 1
    workers = {
        "FlinkRunner": every["parallelism"],
        "DataflowRunner": every["max_num_workers"] or every["num_workers"],
    }.get(name)
    return max(1, workers or 1), max(1, workers or 1)


def _dask_threads(every: dict[str, Any]) -> dict[str, int]:
    """Threads of each process of a Dask cluster."""
    from dask.distributed import Client

    patience = {"timeout": every["timeout"]} if every["timeout"] else {}
    try:
        with Client(every["address"], scheduler_file=every["scheduler_file"], **patience) as client:
            return dict(client.nthreads())
    except (OSError, ValueError) as error:
        place = every["address"] or every["scheduler_file"]
        raise EngineError(
            f"the Dask scheduler {place} cannot be reached: {error}; is it up, and the address right?"
        ) from error


@contextlib.contextmanager
def _dask(flags: Sequence[str], workers: int | None) -> Iterator[list[str]]:
    """Options for Dask: units one by one, and a cluster on loopback where none is named."""
    from dask.distributed import LocalCluster

    given = parse(flags)
    more = [] if given.npartitions or given.partition_size else ["--dask_partition_size=1"]
    if given.address or given.scheduler_file:
        yield more
        return
    here: dict[str, Any] = {
        "n_workers": workers or os.cpu_count() or 1,
        "threads_per_worker": 1,
        "host": "127.0.0.1",
        "dashboard_address": "127.0.0.1:0",  # there is a server in any case, which warns where its usual port is taken
        "scheduler_kwargs": {"dashboard": False},
        "silence_logs": logging.CRITICAL,
        "preload": [harness.__name__],
    }
    with LocalCluster(**here) as cluster:
        yield [*more, f"--dask_client_address={cluster.scheduler_address}"]
