"""Answers that were paid for: their journal, their cache, and the budget.

**The journal.** Before a request is sent, a line says that it was asked and what it may cost at most; when an answer
came, usable or not, a line holds it. A line outlives the process that wrote it (not a loss of power: files are
synced when a session ends). So an answer is found again by the digest of its request, by any later process, and is
asked for once. Lines lie in ``<dataset>/_journal/answers/<shard>-<session>.jsonl``, one write an event, each with its
checksum; on object stores, where nothing can be appended to, in small objects ``<shard>-<session>-<number>.jsonl``.

**The table.** `fold` moves the lines of sessions that are over into the Delta table ``answers``, one row a request that
was or may have been charged. It is a table like those of stages (partitioned by shard, with uid), so takedowns, verify
and vacuum reach it, and it is the usage ledger.

**The budget.** ``_journal/spending.json`` says what was spent by what is in the table, and of each session that is not
there yet what it may spend. A session enlarges its share by tranches, each a change under a lock (a conditional write
on object stores), and never asks what its share does not cover; so the sum is never above the budget, whoever is
killed. What a killed session asked and got no answer to counts in full, since the endpoint may charge it. Takedowns
take rows out of the table, and nothing off the spending.

Who writes the table and ends sessions of others (`fold`) holds the dataset's lock.
"""

from pairmill.answers.folding import add, claim, claims, fold, lookup, spent, unclaim
from pairmill.answers.journal import BudgetSpent, Journal, Ticket
from pairmill.answers.ledger import (
    ANSWERED,
    ANSWERS,
    ANSWERS_TABLE,
    CUT_OFF,
    EMPTY,
    LOST,
    MALFORMED,
    REFUSED,
    Answer,
    Bound,
    usage_sql,
    utc_now,
)
from pairmill.answers.place import JOURNAL

__all__ = [
    "ANSWERED",
    "ANSWERS",
    "ANSWERS_TABLE",
    "CUT_OFF",
    "EMPTY",
    "JOURNAL",
    "LOST",
    "MALFORMED",
    "REFUSED",
    "Answer",
    "Bound",
    "BudgetSpent",
    "Journal",
    "Ticket",
    "add",
    "claim",
    "claims",
    "fold",
    "lookup",
    "spent",
    "unclaim",
    "usage_sql",
    "utc_now",
]
