"""From the journal into the table; and answers that come by file."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import pyarrow as pa

from pairmill.answers.journal import Limits
from pairmill.answers.ledger import ANSWERS, ANSWERS_TABLE, Answer, Bound, line_of, sums
from pairmill.answers.place import Disk, Place, Share, Spending, place_of, stored_answers, told_of, writer_of
from pairmill.store import DataFile, Dataset, content_digest, read_files
from pairmill.tombstones import Tombstones
from schemas.config import Budget

COMPACT_AT = 8
"""Files of a shard that are put together into one."""

_CLAIMED = "claimed"


def fold(dataset: Dataset, *, alone: bool = False) -> int:
    """Move the lines of sessions that are over into the answers table. Only for the holder of the dataset's lock; can
    be killed at any point and done again.

    Args:
        dataset: Whose journal.
        alone: Nobody is asking anything: sessions of other machines of which nothing is known are over, too.

    Returns:
        How many rows came into the table.

    Raises:
        StoreError: something cannot be read or written.
    """
    place = place_of(dataset)
    files = place.files()
    spending = place.load()
    if spending is None:
        if not files:
            return 0
        spending = place.change(lambda made: made)
    shares = spending.sessions
    names = {file.session for file in files} | {name for name, share in shares.items() if share.state != _CLAIMED}
    over = {name for name in names if _is_over(place, name, shares.get(name), alone)}
    if not over:
        return 0
    mine = [file for file in files if file.session in over]
    table = dataset.table(ANSWERS_TABLE, ANSWERS)
    barred = Tombstones.load(dataset).uids
    stored: dict[int, list[DataFile]] = defaultdict(list)
    for file in table.files() if mine else ():
        stored[file.shard].append(file)
    spent = dict.fromkeys(over, (0, 0.0))
    new: list[DataFile] = []
    gone: list[DataFile] = []
    count = 0
    for shard in sorted({file.shard for file in mine}):
        rows: dict[str, Answer] = {}
        for (_, session), told in told_of(place, [file for file in mine if file.shard == shard]).items():
            answers = told.settled()
            tokens, cost = sums(answers)
            spent[session] = spent[session][0] + tokens, spent[session][1] + cost
            rows.update({answer.request: answer for answer in answers if answer.uid not in barred})
        for request in read_files(dataset, stored[shard], ANSWERS, ["request"]).column("request").to_pylist():
            rows.pop(request, None)  # committed by a fold that was killed then
        if not rows:
            continue
        count += len(rows)
        more = pa.Table.from_pylist([vars(rows[request]) for request in sorted(rows)], schema=ANSWERS)
        if len(stored[shard]) >= COMPACT_AT:
            before = read_files(dataset, stored[shard], ANSWERS, ANSWERS.names)
            more = pa.concat_tables([pa.table(before.columns, schema=ANSWERS), more])
            gone += stored[shard]
        with table.writer(shard, f"answers-{content_digest(more)}") as writer:
            writer.write(more)
            new.append(writer.close())
    if new:
        table.commit(new, remove=gone)
    if over & set(shares):
        place.change(lambda now: _settle(now, spent))
    place.remove(mine)
    if isinstance(place, Disk):
        for session in over:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(place.mark(session))
    return count


def _is_over(place: Place, session: str, share: Share | None, alone: bool) -> bool:
    if isinstance(place, Disk):
        return place.alive(session, share) is False
    if share is not None and share.state == "closed":
        return True
    alive = place.alive(session, share)
    return alone if alive is None else not alive


def _settle(spending: Spending, spent: Mapping[str, tuple[int, float]]) -> None:
    """Sessions come off the list, and what they spent into the sum, at once: so it is counted once."""
    for session, (tokens, cost) in spent.items():
        if spending.sessions.pop(session, None) is not None:
            spending.tokens += tokens
            spending.cost += cost


# -- looking ----------------------------------------------------------------------------------------------------------


def lookup(dataset: Dataset, shard: int, digests: Collection[str]) -> dict[str, Answer]:
    """Answers of a shard that were paid for before, usable or not, by the digest of their request.

    Raises:
        StoreError: what is stored cannot be read.
    """
    stored = stored_answers(place_of(dataset), shard)
    return {digest: stored[digest] for digest in digests if digest in stored}


def spent(dataset: Dataset) -> tuple[int, float]:
    """Tokens and money that were spent, and that sessions under way and claims may spend.

    Raises:
        StoreError: it cannot be read.
    """
    place = place_of(dataset)
    left = Limits(0.0, 0.0).left(place.load() or place.made(), place, "")
    return int(-left.tokens), -left.cost


# -- answers that come by file ----------------------------------------------------------------------------------------


def claim(dataset: Dataset, name: str, bound: Bound, budget: Budget) -> None:
    """Set a part of the budget aside for requests that are sent in a file, until `add` or `unclaim`. Claiming again
    under the same name sets the part anew.

    Args:
        dataset: Whose budget.
        name: The name of the batch: letters and digits.
        bound: What all of its requests may take together.
        budget: Of the dataset.

    Raises:
        BudgetSpent: there is not so much left.
    """
    place, limits = place_of(dataset), Limits.of(budget)

    def change(spending: Spending) -> bool:
        fits = limits.left(spending, place, f"claim{name}").allow(bound.tokens, bound.cost)
        if fits:
            spending.sessions[f"claim{name}"] = Share(bound.tokens, bound.cost, _CLAIMED)
        return fits

    if not place.change(change):
        raise limits.refusal(bound)


def claims(dataset: Dataset) -> list[str]:
    """The names under which parts of the budget are claimed."""
    spending = place_of(dataset).load()
    sessions = spending.sessions.items() if spending else ()
    return sorted(name.removeprefix("claim") for name, share in sessions if share.state == "claimed")


def unclaim(dataset: Dataset, name: str) -> None:
    """Give a claimed part of the budget back: nothing was asked, or nothing came of it."""
    place_of(dataset).change(lambda spending: spending.sessions.pop(f"claim{name}", None))


def add(dataset: Dataset, answers: Mapping[int, Sequence[Answer]], name: str | None = None) -> None:
    """Put answers into the journal that came by file, by shard, each with a `request` that is the same when they are
    read again; what was claimed under `name` is spent by that.

    Raises:
        StoreError: they cannot be written.
    """
    place = place_of(dataset)
    session = secrets.token_hex(8)
    tokens, cost = sums(answer for some in answers.values() for answer in some)

    def change(spending: Spending) -> None:
        spending.sessions.pop(f"claim{name}", None)
        spending.sessions[session] = Share(tokens, cost, "closed")

    lines = writer_of(place, session)
    try:
        for shard, some in sorted(answers.items()):
            if some:
                lines.write(shard, b"".join(line_of("answered", vars(answer)) for answer in some))
        lines.sync()
        place.change(change)
    finally:
        lines.close()
