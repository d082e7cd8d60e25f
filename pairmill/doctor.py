"""`pairmill doctor`: what of this machine could make a run fail, found before it does.

What needs a heavy library runs in child processes side by side, so that a broken one (a missing shared library, a
crash at import) is a finding and not the end of the doctor.
"""

from __future__ import annotations

import concurrent.futures
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from schemas.config import Download

PROBE_TIMEOUT_S = 120
"""Ray's first start takes 3 to 4 s on two idle cores (RECIPES, section 8); a loaded laptop is much slower."""

SOCKETS_BESIDE_DOWNLOADS = 256
"""File descriptors beside the downloads: Parquet files, Ray's sockets and pipes, shared libraries."""

SHARED_MEMORY_FOR_RAY = 512 * 2**20
"""Bytes of /dev/shm below which Ray puts its object store on disk, which is slow."""

TEMP_SPACE = 2 * 2**30
"""Bytes below which Ray's session files and spilled objects may fill the temporary folder."""


BF16_PAYS = 1.3
"""Products so many times as fast in bf16 are worth the digits: they are most of a model's time, not all."""


class Level(str, Enum):
    """How serious a finding is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    level: Level
    message: str
    fix: str | None = None
    """What to do, when the level is not ok."""


def examine() -> list[Finding]:
    """Run all checks."""
    slow: tuple[Callable[[], Finding], ...] = (check_model, check_processor, check_faiss, check_ray)
    with concurrent.futures.ThreadPoolExecutor(len(slow)) as pool:
        started = [pool.submit(check) for check in slow]
        findings = [check_python(), *check_packages(), check_temp(), check_shared_memory(), check_descriptors()]
        return findings + [future.result() for future in started]


# -- quick checks -----------------------------------------------------------------------------------------------------


def check_python(version: tuple[int, int] | None = None) -> Finding:
    """Whether this Python is one that the pinned packages exist for."""
    major, minor = version or sys.version_info[:2]
    shown = f"{major}.{minor}"
    if (3, 10) <= (major, minor) <= (3, 12):
        return Finding("python", Level.OK, shown)
    return Finding("python", Level.FAIL, shown, "make an environment with Python 3.10, 3.11 or 3.12 and install there")


def check_packages(requirements: list[str] | None = None) -> list[Finding]:
    """Whether every package that pairmill declares is there, in a version it can use."""
    from packaging.requirements import Requirement

    if requirements is None:
        try:
            requirements = importlib.metadata.requires("pairmill") or []
        except importlib.metadata.PackageNotFoundError:
            fix = "pip install -r requirements.txt && pip install --no-deps -e ."
            return [Finding("packages", Level.WARN, "pairmill itself is not installed, so its needs are unknown", fix)]
    wanted = [Requirement(text) for text in requirements]
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = [finding for r in wanted if (finding := _check_package(r)) is not None]
    return wrong or [Finding("packages", Level.OK, f"all {len(wanted)} there, in versions that fit")]


def _check_package(requirement: Any) -> Finding | None:
    name = requirement.name
    fix = f'pip install "{name}{requirement.specifier}", or all tested versions: pip install -r requirements.txt'
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name == "faiss-cpu" and any(_installed(other) for other in ("faiss-gpu-cu12", "faiss-gpu")):
            return None  # the same import name, built for CUDA
        return Finding(f"package {name}", Level.FAIL, "not installed", fix)
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return Finding(f"package {name}", Level.FAIL, f"{version}, needs {requirement.specifier}", fix)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def check_temp(folder: str | None = None) -> Finding:
    """Whether the temporary folder can be written to and has room."""
    folder = folder or tempfile.gettempdir()
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"pairmill")
            file.flush()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("temporary folder", Level.FAIL, f"{folder}: {error}", "set TMPDIR to a folder you can write to")
    message = f"{folder}, {_size(free)} free"
    if free < TEMP_SPACE:
        return Finding("temporary folder", Level.WARN, message, "make room, or set TMPDIR to a larger disk")
    return Finding("temporary folder", Level.OK, message)


def check_shared_memory(folder: str = "/dev/shm") -> Finding:  # noqa: S108 (its size is read, nothing is written)
    """Whether Ray's object store has memory to live in."""
    name = "shared memory"
    try:
        total = shutil.disk_usage(folder).total
    except OSError:
        return Finding(name, Level.OK, f"no {folder} on this system; Ray uses files")
    message = f"{_size(total)} at {folder}"
    if total < SHARED_MEMORY_FOR_RAY:
        fix = "in a container: --shm-size=2g; or run with --set engine.kind=local"
        return Finding(name, Level.WARN, message, fix)
    return Finding(name, Level.OK, message)


def check_descriptors(limit: int | None = None, concurrency: int | None = None) -> Finding:
    """Whether this process may open as many sockets as downloads run at once."""
    import resource

    concurrency = concurrency or Download().concurrency
    soft = limit if limit is not None else resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    name = "open files"
    if soft == resource.RLIM_INFINITY or soft >= concurrency + SOCKETS_BESIDE_DOWNLOADS:
        shown = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,} allowed"
        return Finding(name, Level.OK, f"{shown}, enough for download.concurrency {concurrency:,}")
    level = Level.WARN if soft > concurrency else Level.FAIL
    fix = f"ulimit -n {2 * (concurrency + SOCKETS_BESIDE_DOWNLOADS)}, or a smaller download.concurrency"
    return Finding(name, level, f"{soft:,} allowed, few for download.concurrency {concurrency:,}", fix)


# -- checks in child processes ----------------------------------------------------------------------------------------

_MODEL = """
import json
from pairmill.blip import load_captioner, load_matcher
from pairmill.models import ModelRef, load_clip
from pairmill.weights import tiny_captioner_dir, tiny_clip_dir, tiny_itm_dir
import torch
found = {"torch": torch.__version__, "cuda_build": torch.version.cuda}
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
found["gpus"] = [torch.cuda.get_device_name(i) for i in range(count)]
folders = {load_clip: tiny_clip_dir(), load_captioner: tiny_captioner_dir(), load_matcher: tiny_itm_dir()}
for load, folder in folders.items():
    load(ModelRef(path=str(folder)), device="cpu")
import torchvision
found["torchvision"] = torchvision.__version__
found["declared"] = bool(__import__("pairmill._torchvision")._torchvision._declared)
print("FOUND " + json.dumps(found))
"""

_PROCESSOR = """
import json
import torch
from pairmill.onednn import gain_of_bf16
print("FOUND " + json.dumps({"kind": torch.backends.cpu.get_cpu_capability(), "gain": gain_of_bf16()}))
"""

_FAISS = """
import json
import faiss
print("FOUND " + json.dumps({"version": faiss.__version__, "gpus": getattr(faiss, "get_num_gpus", lambda: 0)()}))
"""

_RAY = """
import json
from pairmill.engines import open_engine
from schemas.config import Engine
with open_engine(Engine(kind="ray", address="local")):
    import ray
    print("FOUND " + json.dumps({"version": ray.__version__, "resources": ray.cluster_resources()}))
"""


def check_model() -> Finding:
    """Whether torch, torchvision, open_clip and transformers work together: the shipped models are loaded."""
    found = _probe(_MODEL)
    name = "shipped models"
    if isinstance(found, str):
        fix = "pip install -r requirements.txt; torch and torchvision must be builds that fit"
        return Finding(name, Level.FAIL, found, fix)
    beside = " (its operators do not fit this torch; not needed)" if found["declared"] else ""
    gpus = ", ".join(found["gpus"]) or "no GPU"
    message = (
        f"CLIP, captioner and filter load; torch {found['torch']}, torchvision {found['torchvision']}{beside}; {gpus}"
    )
    if not found["gpus"] and found["cuda_build"] is None and _has_nvidia_driver():
        fix = "this machine has an NVIDIA driver: install a CUDA build of torch to use the GPU"
        return Finding(name, Level.WARN, message, fix)
    return Finding(name, Level.OK, message)


def check_processor() -> Finding:
    """Whether models on this CPU gain from bf16."""
    found = _probe(_PROCESSOR)
    if isinstance(found, str):
        return Finding("processor", Level.FAIL, found, "pip install -r requirements.txt")
    message = f"{found['kind']}; products in bf16 take {1 / found['gain']:.0%} of the time of fp32"
    if found["gain"] >= BF16_PAYS:
        return Finding("processor", Level.OK, f"{message}: models.precision bf16 pays where models run on the CPU")
    return Finding("processor", Level.OK, f"{message}: keep models.precision at fp32 where models run on the CPU")


def check_faiss() -> Finding:
    """Whether FAISS imports, and whether it can use the GPU that is there."""
    found = _probe(_FAISS)
    if isinstance(found, str):
        return Finding("faiss", Level.FAIL, found, "pip install -r requirements.txt")
    message = f"{found['version']}, {found['gpus']} GPUs" if found["gpus"] else f"{found['version']}, on the CPU"
    if not found["gpus"] and _has_nvidia_driver():
        fix = 'for deduplication on the GPU: pip uninstall faiss-cpu, then pip install "pairmill[gpu]"'
        return Finding("faiss", Level.WARN, message, fix)
    return Finding("faiss", Level.OK, message)


def check_ray() -> Finding:
    """Whether Ray starts on this machine."""
    found = _probe(_RAY, {"RAY_ADDRESS": ""})
    if isinstance(found, str):
        return Finding("ray", Level.WARN, found, "run with --set engine.kind=local, or see Ray's logs in /tmp/ray")
    resources: Mapping[str, float] = found["resources"]
    shown = f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
    return Finding("ray", Level.OK, f"{found['version']} starts here with {shown}")


def _probe(code: str, environment: Mapping[str, str] | None = None) -> dict[str, Any] | str:
    """What a child process found, or, when it failed, why: the last line it wrote."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **(environment or {})},
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {PROBE_TIMEOUT_S} s"
    for line in done.stdout.splitlines():
        if line.startswith("FOUND "):
            answer: dict[str, Any] = json.loads(line.removeprefix("FOUND "))
            return answer
    said = (done.stderr or done.stdout).strip().splitlines()
    return said[-1] if said else f"the process ended with code {done.returncode}"


def _has_nvidia_driver() -> bool:
    return shutil.which("nvidia-smi") is not None


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB"
