"""A session of asking: what is asked is written down before, and fits the budget."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pairmill import leases
from pairmill.answers.ledger import LOST, Answer, Bound, line_of, sums, utc_now
from pairmill.answers.place import Disk, Place, Share, Spending, place_of, stored_answers, told_of, writer_of
from pairmill.errors import PairmillError, StoreError
from pairmill.store import Dataset
from schemas.config import Budget

_TRANCHE = 256
"""How many requests like the present one a session's share grows by, so that not each of them changes the spending."""
_PARTS = 4
"""It grows by no more than this part of what is left, so that others get some, too."""
_POLL_S = 0.05
_POLL_STORE_S = 1.0
_SLACK = 1e-9
"""Of sums of money."""


class BudgetSpent(PairmillError):
    """A request does not fit into what is left of the budget."""


@dataclass(frozen=True)
class Ticket:
    """A request that was written down and is about to be sent."""

    shard: int
    uid: str
    request: str
    digest: str
    purpose: str
    model: str
    at: str
    bound: Bound


@dataclass(frozen=True)
class Limits:
    """A budget, as numbers."""

    tokens: float
    cost: float

    @classmethod
    def of(cls, budget: Budget) -> Limits:
        """No limit is infinite."""
        infinite = float("inf")
        return cls(
            infinite if budget.tokens is None else budget.tokens, infinite if budget.money is None else budget.money
        )

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return self != Limits(float("inf"), float("inf"))

    def allow(self, tokens: float, cost: float) -> bool:
        """Whether so much is within it."""
        return tokens <= self.tokens and cost <= self.cost + _SLACK

    def left(self, spending: Spending, place: Place, without: str) -> Limits:
        """What others leave of it."""
        tokens, cost = float(spending.tokens), spending.cost
        for name, share in spending.sessions.items():
            if name == without:
                continue
            if share.tokens is None:  # it had no limit, so its lines say what it spent
                files = [file for file in place.files() if file.session == name]
                more, money = sums(answer for told in told_of(place, files).values() for answer in told.settled())
            else:
                more, money = share.tokens, share.cost
            tokens, cost = tokens + more, cost + money
        return Limits(self.tokens - tokens, self.cost - cost)

    def refusal(self, bound: Bound) -> BudgetSpent:
        """The error where a request does not fit."""
        limits = [f"{self.tokens:.0f} tokens"] if self.tokens != float("inf") else []
        limits += [f"{self.cost:g} of money"] if self.cost != float("inf") else []
        return BudgetSpent(
            f"instruct.budget ({' and '.join(limits)}) leaves no room for up to {bound.tokens} tokens that may cost "
            f"{bound.cost:.4g}; raise it and run again: what is answered is kept"
        )


class Journal:
    """What one process asks and is answered for a while: a session, entered in an event loop (``async with``).

    Args:
        dataset: Path or URL.
        budget: Of the dataset, all runs together.
        patience_s: How long a session of another machine that shows no sign of life is waited for, when only what it
            holds of the budget could still make room.
    """

    def __init__(self, dataset: str, budget: Budget, patience_s: float = 300.0) -> None:
        self._dataset = dataset
        self._limits = Limits.of(budget)
        self._patience_s = patience_s

    async def __aenter__(self) -> Journal:
        self._session = secrets.token_hex(8)
        self._number = 0
        self._known: dict[int, dict[str, Answer]] = {}
        self._loading: dict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()
        self._spent_tokens, self._spent_cost = 0, 0.0
        self._reserved_tokens, self._reserved_cost = 0, 0.0
        self._in_flight = 0
        self._granted = Limits(0.0, 0.0)
        self._too_much: Bound | None = None
        """A request that did not fit, nothing having been freed since."""
        self._place = place_of(Dataset(self._dataset))
        self._ending = contextlib.ExitStack()
        try:
            self._holder: dict[str, Any] = {}
            if not isinstance(self._place, Disk):
                self._holder = asdict(self._ending.enter_context(leases.this_process(leases.TTL_S)))
            self._lines = writer_of(self._place, self._session)
            self._ending.callback(self._lines.close)
            await self._share(0 if self._limits.any else None, 0.0, "open")
        except BaseException:
            self._ending.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        with self._ending:
            await self._lines.drain()
            await asyncio.to_thread(self._lines.sync)
            used = self._used()
            await self._share(used[0], used[1], "closed")

    async def _share(self, tokens: int | None, cost: float, state: str) -> None:
        share = Share(tokens, cost, state, self._holder)

        def change(spending: Spending) -> None:
            spending.sessions[self._session] = share

        await asyncio.to_thread(self._place.change, change)

    async def find(self, shard: int, digest: str) -> Answer | None:
        """The answer to a request that was paid for before.

        Raises:
            StoreError: what is stored cannot be read.
        """
        if shard not in self._known:
            async with self._loading[shard]:
                if shard not in self._known:
                    self._known[shard] = await asyncio.to_thread(stored_answers, self._place, shard)
        return self._known[shard].get(digest)

    async def ask(
        self,
        shard: int,
        uid: str,
        digest: str,
        purpose: str,
        model: str,
        bound: Bound,
        pace: Callable[[], Awaitable[None]] | None = None,
    ) -> Ticket:
        """Make room for a request in the budget, and write down that it is asked: then it may be sent. Waits while what
        is in flight, here or elsewhere, may leave room for it, and then for `pace`.

        Raises:
            BudgetSpent: it does not fit, and nothing will change that.
            StoreError: it cannot be written down.
        """
        if self._limits.any:
            async with self._turn:  # one after the other, so that a large request gets its turn
                await self._make_room(bound)
                self._reserve(bound)
        else:
            self._reserve(bound)
        try:
            if pace is not None:
                await pace()
        except BaseException:
            self._release(bound, 0, 0.0)
            raise
        self._number += 1
        ticket = Ticket(shard, uid, f"{self._session}-{self._number}", digest, purpose, model, utc_now(), bound)
        asked = {name: getattr(ticket, name) for name in ("uid", "request", "digest", "purpose", "model", "at")}
        try:
            await self._lines.append(shard, line_of("asked", {**asked, **vars(bound)}))
        except StoreError:  # nothing was asked
            self._release(bound, 0, 0.0)
            raise
        except BaseException:  # it may be written, or not
            self.abandon(ticket)
            raise
        return ticket

    async def answered(self, ticket: Ticket, answer: Answer) -> None:
        """Write an answer down.

        Raises:
            StoreError: it cannot be written down: it counts as lost.
        """
        if answer.outcome != LOST:
            self._known.setdefault(ticket.shard, {})[answer.digest] = answer
        try:
            await self._lines.append(ticket.shard, line_of("answered", vars(answer)))
        except BaseException:
            self.abandon(ticket)
            raise
        self._release(ticket.bound, answer.tokens, answer.cost)

    async def free(self, ticket: Ticket) -> None:
        """The endpoint did not take the request, so it costs nothing.

        Raises:
            StoreError: that cannot be written down: it counts as lost.
        """
        try:
            await self._lines.append(ticket.shard, line_of("freed", {"request": ticket.request}))
        except BaseException:
            self.abandon(ticket)
            raise
        self._release(ticket.bound, 0, 0.0)

    def abandon(self, ticket: Ticket) -> None:
        """Nobody waits for the answer any more: it counts in full."""
        self._release(ticket.bound, ticket.bound.tokens, ticket.bound.cost)

    # -- the budget --

    def _used(self) -> tuple[int, float]:
        return self._spent_tokens + self._reserved_tokens, self._spent_cost + self._reserved_cost

    def _reserve(self, bound: Bound) -> None:
        self._reserved_tokens += bound.tokens
        self._reserved_cost += bound.cost
        self._in_flight += 1

    def _release(self, bound: Bound, tokens: int, cost: float) -> None:
        self._in_flight -= 1
        self._reserved_tokens -= bound.tokens
        self._reserved_cost = max(0.0, self._reserved_cost - bound.cost)
        self._spent_tokens += tokens
        self._spent_cost += cost
        if tokens < bound.tokens or cost < bound.cost:
            self._too_much = None
        self._freed.set()

    def _fits(self, bound: Bound) -> bool:
        tokens, cost = self._used()
        return self._granted.allow(tokens + bound.tokens, cost + bound.cost)

    async def _make_room(self, bound: Bound) -> None:
        """Return when the share of this session covers a request."""
        known = self._too_much
        if known is not None and bound.tokens >= known.tokens and bound.cost >= known.cost - _SLACK:
            raise self._limits.refusal(bound)
        since: dict[str, tuple[str, float]] = {}
        while not self._fits(bound):
            self._freed.clear()
            # Here, and not in the thread: while that works, others only give back, so this is enough
            used, busy = self._used(), self._in_flight > 0
            taken = functools.partial(self._enlarge, bound=bound, used=used, busy=busy)
            self._granted, others = await asyncio.to_thread(self._place.change, taken)
            if self._fits(bound):
                return
            if self._in_flight:
                await self._freed.wait()
            elif busy:
                continue
            elif self._others_may_free(others, since):
                await asyncio.sleep(_POLL_S if isinstance(self._place, Disk) else _POLL_STORE_S)
            else:
                self._too_much = bound
                raise self._limits.refusal(bound)

    def _enlarge(
        self, spending: Spending, *, bound: Bound, used: tuple[int, float], busy: bool
    ) -> tuple[Limits, dict[str, Share]]:
        """Take a tranche, or, where there is too little left, give back what is not in use. Returns what this session
        may spend, and the shares of the others."""
        left = self._limits.left(spending, self._place, self._session)
        if left.allow(used[0] + bound.tokens, used[1] + bound.cost):
            tokens = used[0] + max(bound.tokens, min(_TRANCHE * bound.tokens, (left.tokens - used[0]) / _PARTS))
            cost = used[1] + max(bound.cost, min(_TRANCHE * bound.cost, (left.cost - used[1]) / _PARTS))
            granted, state = Limits(int(tokens), cost), "open"
        else:
            granted, state = Limits(*used), "open" if busy else "idle"
        spending.sessions[self._session] = Share(int(granted.tokens), granted.cost, state, self._holder)
        return granted, {name: share for name, share in spending.sessions.items() if name != self._session}

    def _others_may_free(self, others: Mapping[str, Share], since: dict[str, tuple[str, float]]) -> bool:
        """Whether a session that lives holds more than it has spent. `since`: when each was last seen to change."""
        found = False
        for name, share in others.items():
            if share.state != "open":
                continue
            alive = self._place.alive(name, share)
            if alive is None:
                now = time.monotonic()
                if name not in since or since[name][0] != repr(share):
                    since[name] = repr(share), now
                alive = now - since[name][1] < self._patience_s
            found = found or alive
        return found
