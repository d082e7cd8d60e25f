"""How many workers each group gets on a Ray cluster, and whether its nodes can hold them at all."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pairmill.errors import EngineError
from pairmill.execute import Job
from pairmill.plan import Group

SCALES = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
"""Parts of the CPUs that stages ask for, tried in this order: a small machine runs all groups, each with less."""
SHARES = (1.0, 1 / 2, 1 / 4, 1 / 8)
"""Shares of a GPU for groups that take one where there is one: a single GPU has room for several models."""

ALMOST = 1e-6
"""Ray counts resources in steps of 0.0001."""


@dataclass(frozen=True)
class Node:
    """What a machine of the cluster offers."""

    name: str
    resources: Mapping[str, float]
    """CPU, GPU, memory (bytes) and custom ones."""
    labels: Mapping[str, str]

    def __str__(self) -> str:
        shown = [f"{name} {self.resources[name]:g}" for name in ("CPU", "GPU") if self.resources.get(name)]
        shown += [
            f"{name} {amount:g}"
            for name, amount in sorted(self.resources.items())
            if name not in ("CPU", "GPU", "memory", "object_store_memory") and not name.startswith("node:")
        ]
        shown += [f"{key}={value}" for key, value in sorted(self.labels.items()) if not key.startswith("ray.io/")]
        return f"{self.name}: {', '.join(shown) or 'nothing'}"


def alive_nodes() -> list[Node]:
    """The machines that the cluster has now."""
    import ray

    return [Node(n["NodeManagerAddress"], n["Resources"], n.get("Labels") or {}) for n in ray.nodes() if n["Alive"]]


@dataclass(frozen=True)
class Need:
    """What one worker occupies, and where it may be."""

    cpus: float
    gpus: float = 0.0
    memory: int | None = None
    custom: tuple[tuple[str, float], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def restricted(self) -> bool:
        """Whether it wants more than CPUs, so that not every node will do."""
        return bool(self.gpus or self.memory or self.custom or self.labels)

    @property
    def amounts(self) -> dict[str, float]:
        """By resource, those above 0."""
        named = {"CPU": self.cpus, "GPU": self.gpus, "memory": float(self.memory or 0), **dict(self.custom)}
        return {name: amount for name, amount in named.items() if amount}

    def may_run_on(self, node: Node) -> bool:
        """Whether the node has the labels."""
        return all(_matches(node.labels.get(key), wanted) for key, wanted in self.labels)

    def __str__(self) -> str:
        shown = [f"{amount:g} {name}" for name, amount in self.amounts.items()]
        return " + ".join([*shown, *(f"label {key}={value}" for key, value in self.labels)]) or "nothing"


def _matches(value: str | None, wanted: str) -> bool:
    """Whether a node's label is as a selector of Ray asks: ``a``, ``!a``, ``in(a, b)`` or ``!in(a, b)``."""
    positive = wanted.removeprefix("!")
    listed = re.fullmatch(r"(?:in)?\((.*)\)", positive)
    names = [name.strip() for name in listed[1].split(",")] if listed else [positive]
    return (value in names) is not wanted.startswith("!")


@dataclass(frozen=True)
class Pool:
    """How a group runs on the cluster."""

    need: Need
    least: int = 0
    """Actors that are kept; 0: the group runs as tasks."""
    most: int | None = None
    """Actors at most; null: Ray Data shares the CPUs of the cluster, as it is at each moment, among the groups."""

    def for_units(self, units: int) -> Pool:
        """The pool of a stream of so many units: no more actors are kept."""
        return replace(self, least=min(self.least, units))


class MissingResourcesError(EngineError):
    """The cluster has no room for a worker of some group, however few the workers are. It may get some."""

    def __init__(self, message: str, needs: Sequence[Need]) -> None:
        super().__init__(message)
        self.needs = tuple(needs)
        """Of all groups: what an autoscaler is asked for."""


@dataclass(frozen=True)
class Sizing:
    """What does not change while a job runs: its groups, and what the config says of workers."""

    job: Job
    workers: int | None = None
    """Workers a group at most (``engine.workers``)."""
    gpus: bool = False
    """Whether the cluster had GPUs when the job began: groups that take one where there is one then keep to it."""
    grows: bool = False
    """Whether an autoscaler adds nodes, so that pools are not bounded by those that are there."""

    def needs(self, scale: float = 1.0, share: float = 1.0) -> list[Need]:
        """What a worker of each group occupies: a part of its CPUs, and a share of a GPU where it takes one if any."""
        needs = []
        for group in self.job.groups:
            wants = group.resources
            gpus = share if wants.gpu_if_any and not wants.gpus and self.gpus else wants.gpus
            needs.append(Need(wants.cpus * scale, gpus, wants.memory, wants.custom, wants.labels))
        return needs

    def pools(self, nodes: Sequence[Node]) -> list[Pool]:
        """How each group runs, so that all groups can run at the same time.

        Actors hold what they occupy for the whole segment: were they to take all, tasks would wait for ever. So room
        for a task is set aside first, and where even one worker a group does not fit, all take fewer CPUs. Groups that
        want to keep more workers than one get them in turn, as long as there is room.

        Raises:
            MissingResourcesError: a group has no room, even so.
        """
        groups = self.job.groups
        for scale, share in itertools.product(SCALES, SHARES):
            needs = self.needs(scale, share)
            free = [_Free(node) for node in nodes]
            if self._place(needs, free) is None:
                kept = self._kept(needs, free)
                return [
                    self._pool(groups[i], need, kept[i], self._fits(i, needs, nodes)) for i, need in enumerate(needs)
                ]
        raise self._missing(nodes)

    def _wanted(self, group: Group) -> int:
        """Workers that a group wants to keep: none, for groups of tasks."""
        wants = group.resources
        if not wants.actor:
            return 0
        return min([wants.workers or wants.min_workers or 1, *self._said(group)])

    def _said(self, group: Group) -> list[int]:
        """What config and placement say of the most workers."""
        return [n for n in (self.workers, group.resources.max_workers) if n is not None]

    def _kept(self, needs: Sequence[Need], free: Sequence[_Free]) -> list[int]:
        """Workers of each group that are kept, given what is free beside one of each: those that are wanted, one more
        of each group at a time, as long as a task of each other group has room beside them."""
        wanted = [self._wanted(group) for group in self.job.groups]
        kept = [min(1, n) for n in wanted]
        growing = [i for i, n in enumerate(wanted) if n > kept[i]]
        while growing:
            for i in list(growing):
                left = [place.copy() for place in free]
                if _take(needs[i], left) and self._without_room(needs, left) is None:
                    free = left
                    kept[i] += 1
                if kept[i] == wanted[i] or free is not left:
                    growing.remove(i)
        return kept

    def _place(self, needs: Sequence[Need], free: Sequence[_Free]) -> int | None:
        """Take one worker of each actor group from what is free, and see that a task of each other group then fits.
        Returns the first group that does not."""
        actors = [i for i, group in enumerate(self.job.groups) if group.resources.actor]
        for i in sorted(actors, key=lambda i: (-needs[i].gpus, not needs[i].restricted, -needs[i].cpus)):
            if not _take(needs[i], free):
                return i
        return self._without_room(needs, free)

    def _without_room(self, needs: Sequence[Need], free: Sequence[_Free]) -> int | None:
        """The first group of tasks of which none fits into what is free."""
        tasks = [i for i, group in enumerate(self.job.groups) if not group.resources.actor]
        return next((i for i in tasks if not any(place.room(needs[i]) for place in free)), None)

    def _fits(self, index: int, needs: Sequence[Need], nodes: Sequence[Node]) -> int:
        """Workers of a group that fit when each other group has one: none, for groups of tasks."""
        if not self.job.groups[index].resources.actor:
            return 0
        free = [_Free(node) for node in nodes]
        others = [i for i in range(len(needs)) if i != index]
        for i in sorted(others, key=lambda i: (-needs[i].gpus, not needs[i].restricted)):
            _take(needs[i], free)
        return max(1, sum(place.room(needs[index]) for place in free))

    def _pool(self, group: Group, need: Need, kept: int, fits: int) -> Pool:
        if not kept:
            return Pool(need)
        if group.resources.workers is not None:
            return Pool(need, kept, kept)
        said = self._said(group)
        bounds = said if self.grows or not need.restricted else [*said, max(kept, fits)]
        return Pool(need, kept, min(bounds, default=None))

    def _missing(self, nodes: Sequence[Node]) -> MissingResourcesError:
        """What to say when the groups do not fit: which one is the first that has no room, and what there is."""
        needs = self.needs(SCALES[-1], SHARES[-1])
        whole = self.needs()
        alone = [i for i, need in enumerate(needs) if not any(_Free(node).room(need) for node in nodes)]
        index = alone[0] if alone else self._place(needs, [_Free(node) for node in nodes])
        assert index is not None
        name = self.job.groups[index].title
        room = "no node of the Ray cluster has that" if alone else "the Ray cluster has no room beside the other stages"
        return MissingResourcesError(
            f"a worker of {name} needs {whole[index]}, and {room} ({_listed(nodes)}). Add such nodes, or say in the "
            f"config what it needs: engine.stages.{name.split('+')[0]}"
            + (" (models run on CPUs with models.device: cpu)" if whole[index].gpus else ""),
            whole,
        )


def slots(pools: Sequence[Pool], nodes: Sequence[Node]) -> int:
    """Workers that can be busy at a time: actors at most, each group's share of the CPUs where they have no bound, and
    the tasks that fit in what CPUs are left."""
    spare = sum(node.resources.get("CPU", 0.0) for node in nodes)
    largest = max((pool.need.cpus for pool in pools if not pool.least), default=0.0)
    bounded = [pool for pool in pools if pool.most is not None]
    free = [pool for pool in pools if pool.least and pool.most is None]
    count = sum(pool.most or 0 for pool in bounded)
    spare -= sum((pool.most or 0) * pool.need.cpus for pool in bounded)
    share = (spare - largest) / max(1, len(free))
    actors = [max(pool.least, int(share / pool.need.cpus + ALMOST)) if pool.need.cpus else pool.least for pool in free]
    spare -= sum(n * pool.need.cpus for n, pool in zip(actors, free, strict=True))
    tasks = max(1, int(spare / largest + ALMOST)) if largest else 0
    return max(1, count + sum(actors) + tasks)


def _listed(nodes: Sequence[Node], most: int = 6) -> str:
    """The nodes, each kind once."""
    kinds: dict[str, int] = {}
    for node in nodes:
        shape = str(replace(node, name="a node"))
        kinds[shape] = kinds.get(shape, 0) + 1
    shown = [f"{count} x {shape}" if count > 1 else shape for shape, count in list(kinds.items())[:most]]
    return "; ".join(shown) + ("; ..." if len(kinds) > most else "") or "it has no nodes"


class _Free:
    """What is not yet taken of a node. GPUs are taken one by one: a fraction never spans two of them."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._left = {name: amount for name, amount in node.resources.items() if name != "GPU"}
        self._gpus = [1.0] * int(node.resources.get("GPU", 0.0))

    def copy(self) -> _Free:
        """Another, of which one may take without taking of this one."""
        other = copy.copy(self)
        other._left, other._gpus = dict(self._left), list(self._gpus)
        return other

    def room(self, need: Need) -> int:
        """Workers that fit; one, of those that occupy nothing."""
        if not need.may_run_on(self.node):
            return 0
        rooms = [
            int(self._left.get(name, 0.0) / amount + ALMOST) for name, amount in need.amounts.items() if name != "GPU"
        ]
        if need.gpus:
            rooms.append(self._gpu_room(need.gpus))
        return min(rooms, default=1)

    def _gpu_room(self, gpus: float) -> int:
        if gpus >= 1:
            return int(sum(left >= 1 - ALMOST for left in self._gpus) / gpus + ALMOST)
        return sum(int(left / gpus + ALMOST) for left in self._gpus)

    def take(self, need: Need) -> None:
        """One worker more."""
        for name, amount in need.amounts.items():
            if name != "GPU":
                self._left[name] -= amount
        wanted = need.gpus
        for i, left in enumerate(self._gpus):
            part = min(wanted, 1.0)
            if part > 0 and left >= part - ALMOST:
                self._gpus[i] -= part
                wanted -= part


def _take(need: Need, free: Iterable[_Free]) -> bool:
    """Place one worker, off the GPU nodes where it wants no GPU and there is another place, as Ray does."""
    places = [place for place in free if place.room(need)]
    if places:
        min(places, key=lambda place: not need.gpus and place.node.resources.get("GPU", 0.0)).take(need)
    return bool(places)
