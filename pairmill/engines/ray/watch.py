"""Waiting for machines, but never for ever: Ray itself waits in silence for a node that no longer exists."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pairmill.engines.ray.pools import MissingResourcesError, Need, Node, Pool, Sizing, alive_nodes
from pairmill.errors import EngineError

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

CHECK_S = 2.0
"""Between two looks at the nodes."""
SETTLE_S = 10.0
"""How long other pools must be the right ones before a stream is given up for them: nodes come and go in groups."""
REMIND_S = 60.0
"""Between two log lines about what is missing."""

log = logging.getLogger(__name__)


class ResizeError(Exception):
    """The workers of a stream no longer fit the cluster as it is; the units that are left go into a new one."""


class Patience:
    """How long a run has waited for nodes, and what was said of it."""

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._since: float | None = None
        self._said = 0.0

    def found(self) -> None:
        """All groups have room."""
        if self._since is not None:
            log.warning("the Ray cluster has room for all stages again, after %.0f s", time.monotonic() - self._since)
            self.close()
        self._since = None

    def lacking(self, missing: MissingResourcesError) -> None:
        """A group has none: say so, and ask the autoscaler.

        Raises:
            EngineError: it has been so for longer than ``engine.wait_s``.
        """
        now = time.monotonic()
        if self._since is None:
            self._since = now
            _ask_autoscaler(missing.needs)
        elif now - self._said < REMIND_S and now - self._since < self._wait_s:
            return
        waited = now - self._since
        if waited >= self._wait_s:
            self.close()
            raise EngineError(
                f"{missing}; waited {waited:.0f} s (engine.wait_s). What was committed is kept: run the command again "
                "when they are there"
            )
        log.warning("%s; waiting up to %.0f s more (engine.wait_s)", missing, self._wait_s - waited)
        self._said = now

    def close(self) -> None:
        """The run ends: nothing more is asked of the autoscaler, which otherwise would keep nodes for it."""
        if self._since is not None:
            _ask_autoscaler(())


def _ask_autoscaler(needs: Sequence[Need]) -> None:
    """Ask for room for one worker of each group; nothing happens where no autoscaler runs. No needs: ask no more."""
    import ray
    from ray.autoscaler.sdk import request_resources

    if ray.is_initialized():
        request_resources(
            bundles=[need.amounts for need in needs], bundle_label_selectors=[dict(need.labels) for need in needs]
        )


def wait_for_pools(sizing: Sizing, patience: Patience) -> tuple[list[Pool], list[Node]]:
    """The pools that fit the cluster, and its nodes; waits for nodes where none has room.

    Raises:
        EngineError: they did not come.
    """
    while True:
        nodes = alive_nodes()
        try:
            pools = sizing.pools(nodes)
        except MissingResourcesError as missing:
            patience.lacking(missing)
            time.sleep(min(1.0, CHECK_S))
        else:
            patience.found()
            return pools, nodes


class Watch:
    """Looks at the nodes while a stream runs; Ray Data calls it at each step of its scheduling (several a second)."""

    def __init__(
        self,
        sizing: Sizing,
        pools: Sequence[Pool],
        patience: Patience,
        nodes: Callable[[], list[Node]] = alive_nodes,
    ) -> None:
        self._sizing = sizing
        self._pools = list(pools)
        self._patience = patience
        self._nodes = nodes
        self._looked = time.monotonic()
        self._other_since: float | None = None

    def step(self, executor: StreamingExecutor) -> None:
        """Now and then, compare what workers need with what there is.

        Raises:
            EngineError: a group has had no room for longer than ``engine.wait_s``.
            ResizeError: the workers have to be of another size.
        """
        now = time.monotonic()
        if now - self._looked < CHECK_S:
            return
        self._looked = now
        try:
            pools = self._sizing.pools(self._nodes())
        except MissingResourcesError as missing:
            self._patience.lacking(missing)
            return
        self._patience.found()
        if not self._misfit(pools):
            self._other_since = None
            _bound(executor, self._bounds(pools))
            return
        self._other_since = self._other_since or now
        if now - self._other_since >= SETTLE_S:
            raise ResizeError

    def _bounds(self, pools: Sequence[Pool]) -> list[Pool]:
        """The pools as they may become. Workers that share limits (`Resources.workers`) stay as many as each of them
        was told when it began."""
        groups = self._sizing.job.groups
        return [
            new if group.resources.workers is None else old
            for new, old, group in zip(pools, self._pools, groups, strict=True)
        ]

    def _misfit(self, pools: Sequence[Pool]) -> bool:
        """Whether workers of another size fit now, or fewer than are kept: Ray Data holds what those would occupy back
        from all other groups."""
        return any(new.need != old.need or new.least < old.least for new, old in zip(pools, self._pools, strict=True))


def _bound(executor: StreamingExecutor, pools: Sequence[Pool]) -> None:
    """Let the actor pools of a running stream grow to what fits now, without opening their models anew."""
    from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

    operators = [op for op in executor._topology or () if isinstance(op, ActorPoolMapOperator)]
    for operator, pool in zip(operators, (pool for pool in pools if pool.least), strict=True):
        (actors,) = operator.get_autoscaling_actor_pools()
        most = float("inf") if pool.most is None else max(pool.most, actors.min_size())
        if actors.max_size() != most:
            actors._config = replace(actors._config, max_size=most)
