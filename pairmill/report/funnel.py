"""The funnel of a snapshot: how many pairs entered each step, what was dropped and why, and what was left."""

from __future__ import annotations

from collections import Counter
from typing import Any, TextIO

from pairmill.errors import ContractError
from pairmill.report.table import print_table
from pairmill.stage import KEPT
from schemas.reasons import Status, status_of
from schemas.snapshot import SnapshotRecord


def funnel_json(record: SnapshotRecord) -> dict[str, Any]:
    """The funnel and its sums as JSON values.

    Raises:
        ContractError: the counts do not add up; then they are not to be trusted, so they are not shown.
    """
    check_funnel(record)
    return {
        "admitted": record.admitted,
        "kept": record.kept,
        "dropped": record.dropped,
        "deferred": record.deferred,
        "reasons": record.reasons,
        "funnel": record.funnel,
    }


def print_funnel(record: SnapshotRecord, stream: TextIO) -> None:
    """Print one line a step and one a reason, and the sum; then, where texts were chosen, how many of each source.

    Raises:
        ContractError: the counts do not add up.
    """
    check_funnel(record)
    rows: list[tuple[object, ...]] = []
    for entry in record.funnel:
        reasons = sorted(entry["reasons"].items(), key=lambda item: (-item[1], item[0]))
        out = sum(entry["reasons"].values())
        if len(reasons) == 1:
            rows.append((entry["step"], entry["entered"], out, _shown(reasons[0][0]), entry["left"]))
            continue
        rows.append((entry["step"], entry["entered"], out or None, None, entry["left"]))
        rows.extend((None, None, count, _shown(reason), None) for reason, count in reasons)
    print_table(("step", "entered", "out", "reason", "left"), rows, stream, right=("entered", "out", "left"))
    share = f" ({record.kept / record.admitted:.1%})" if record.admitted else ""
    stream.write(
        f"\n{record.admitted:,} admitted = {record.kept:,} kept{share} + {record.dropped:,} dropped"
        f" + {record.deferred:,} deferred\n"
    )
    for entry in record.funnel:
        if entry.get("texts"):
            _print_texts(entry, stream)


def _print_texts(entry: dict[str, Any], stream: TextIO) -> None:
    """What a step that chose among texts did with those of the pairs that entered it: by source, kept or why not."""
    rows: list[tuple[object, ...]] = []
    for source, counts in sorted(entry["texts"].items(), key=lambda item: (item[0] != "web", item[0])):
        reasons = sorted(((c, r) for r, c in counts.items() if r != KEPT), key=lambda item: (-item[0], item[1]))
        (out, reason), *more = reasons or [(None, None)]
        rows.append((source, sum(counts.values()), counts.get(KEPT, 0), out, reason))
        rows.extend((None, None, None, *one) for one in more)
    stream.write(f"\ntexts of the {entry['entered']:,} pairs that entered {entry['step']}:\n")
    print_table(("source", "texts", "kept", "out", "reason"), rows, stream, right=("texts", "kept", "out"))


def check_funnel(record: SnapshotRecord) -> None:
    """Raise `ContractError` unless every count adds up: admitted = kept + each reason, step by step and in all."""
    found = Counter[str]()
    left = record.admitted
    for entry in record.funnel:
        reasons = entry["reasons"]
        if entry["entered"] != left or entry["entered"] != entry["left"] + sum(reasons.values()):
            raise ContractError(
                f"snapshot {record.id}: the funnel does not add up at step {entry['step']!r}: {left} left the step "
                f"before, {entry['entered']} entered, {sum(reasons.values())} went out, {entry['left']} were left. "
                "This is a defect"
            )
        kept_texts = sum(counts.get(KEPT, 0) for counts in entry.get("texts", {}).values())
        if "texts" in entry and kept_texts < entry["left"]:
            raise ContractError(
                f"snapshot {record.id}: step {entry['step']!r} left {entry['left']} pairs, but only {kept_texts} texts "
                "to go with them. This is a defect"
            )
        found.update(reasons)
        left = entry["left"]
    by_status = Counter[Status]()
    for reason, count in record.reasons.items():
        by_status[status_of(reason)] += count
    same = (left, by_status[Status.DROPPED], by_status[Status.DEFERRED]) == (
        record.kept,
        record.dropped,
        record.deferred,
    )
    if not same or +found != Counter(record.reasons):
        raise ContractError(
            f"snapshot {record.id}: the counts do not add up: {record.admitted} admitted, {record.kept} kept, "
            f"{record.dropped} dropped, {record.deferred} deferred, by reason {record.reasons}, and by the funnel "
            f"{dict(found)} with {left} left. This is a defect"
        )


def _shown(reason: str) -> str:
    return f"{reason} (deferred)" if status_of(reason) is Status.DEFERRED else reason
