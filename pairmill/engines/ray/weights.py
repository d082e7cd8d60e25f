"""Weights on a Ray cluster: what lies on the driver's machine comes to each node once, through the object store.

A stage names its models by paths of the driver's machine, which other nodes may lack. The driver puts the files of each
model into the object store once, in chunks; a worker whose machine does not hold the same content at the same path
writes them into its machine's cache (`pairmill.weights_cache`), or finds that another worker did, and opens its stages
with that path. Paths are no part of an identity, so nothing is computed anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pairmill.execute import Job
from pairmill.plan import Group, PlannedStep
from pairmill.weights_cache import Content, holds, kept, local_path

if TYPE_CHECKING:
    from ray import ObjectRef

CHUNK = 64 * 2**20
"""Bytes of an object. No process holds more than one at a time; where the object store is full, Ray spills to disk."""

Part = TypeVar("Part")


@dataclass(frozen=True)
class Parcel:
    """One model on its way: what it is, and the chunks of each of its files."""

    content: Content
    chunks: tuple[tuple[ObjectRef, ...], ...]

    @classmethod
    def of(cls, path: str) -> Parcel:
        """Put what lies at a path into the object store."""
        content = Content.of(path)
        place = Path(path)
        files = [place / name for name in content.names] if content.is_folder else [place]
        return cls(content, tuple(tuple(_put(file)) for file in files))

    def path_here(self, path: str) -> str:
        """Where this machine has the model: at the driver's path, when the same content is there, or in its cache.

        Raises:
            StoreError: the cache cannot be written.
        """
        return path if holds(path, self.content) else str(kept(self.content, self._write))

    def _write(self, folder: Path) -> None:
        import ray

        for name, chunks in zip(self.content.names, self.chunks, strict=True):
            target = folder / name
            target.parent.mkdir(exist_ok=True)
            with open(target, "wb") as file:
                for chunk in chunks:
                    file.write(ray.get(chunk))


def _put(path: Path) -> Iterator[ObjectRef]:
    import numpy as np
    import ray

    with open(path, "rb") as file:
        while len(block := np.fromfile(file, np.uint8, CHUNK)):
            yield ray.put(block)


@dataclass(frozen=True)
class Shipment:
    """A job with the models that its stages open."""

    job: Job
    parcels: Mapping[str, Parcel]
    """By path on the driver's machine."""

    def unpacked(self, group: int) -> Job:
        """The job as a worker of a group opens it: paths of models are paths of its own machine."""
        needed = set(_paths(self.job.groups[group].steps))
        here = {path: parcel.path_here(path) for path, parcel in self.parcels.items() if path in needed}
        return _relocated(self.job, group, here)


@dataclass
class Sender:
    """What a driver has sent so far: each model goes into the object store once a run."""

    _sent: dict[str, Parcel] = field(default_factory=dict)

    def packed(self, job: Job, wanted: Collection[int]) -> Shipment:
        """The job with the models of the stages, by their index in the plan, that have rows to compute."""
        steps = [step for group in job.groups for step in group.steps if step.index in wanted]
        paths = dict.fromkeys(_paths(steps))
        for path in paths:
            if path not in self._sent:
                self._sent[path] = Parcel.of(local_path(path))
        return Shipment(job, {path: self._sent[path] for path in paths})


def _paths(steps: Collection[PlannedStep]) -> Iterator[str]:
    """All paths of models that these steps name."""
    for planned in steps:
        yield from _paths_of(planned.step)


def _paths_of(value: Any) -> Iterator[str]:
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            inner = getattr(value, f.name)
            if _is_path(f) and inner is not None:
                yield inner
            else:
                yield from _paths_of(inner)


def _is_path(f: dataclasses.Field[Any]) -> bool:
    return f.name == "path" and f.metadata.get("identity") is False


def _relocated(job: Job, group: int, places: Mapping[str, str]) -> Job:
    """The job with other paths in the stages of one group."""
    if not places:
        return job
    segment = job.plan.segments[job.segment]
    groups = list(segment.groups)
    groups[group] = _moved_group(groups[group], places)
    segments = list(job.plan.segments)
    segments[job.segment] = replace(segment, groups=tuple(groups))
    return replace(job, plan=replace(job.plan, segments=tuple(segments)))


def _moved_group(group: Group, places: Mapping[str, str]) -> Group:
    return replace(group, steps=tuple(replace(planned, step=_moved(planned.step, places)) for planned in group.steps))


def _moved(value: Part, places: Mapping[str, str]) -> Part:
    """A dataclass with its paths, and those of dataclasses in it, exchanged."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changes = {}
    for f in dataclasses.fields(value):
        inner = getattr(value, f.name)
        moved = places.get(inner, inner) if _is_path(f) else _moved(inner, places)
        if moved is not inner:
            changes[f.name] = moved
    return replace(value, **changes) if changes else value
