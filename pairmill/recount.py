"""The counts of a snapshot as its files are now: takedowns take pairs out of old snapshots too."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pairmill.execute import counted
from pairmill.query import connect
from pairmill.stage import KEPT
from pairmill.store import LEDGER_TABLE, PAIRS_TABLE, Snapshot, read_files
from schemas import fields
from schemas.reasons import Status, status_of
from schemas.snapshot import SnapshotRecord


def recounted(snapshot: Snapshot) -> SnapshotRecord:
    """A snapshot's record with counts and funnel as its files are now: fewer, when pairs were taken down since.

    A takedown leaves no trace of the step at which a pair went out, so of several steps that give the same reason the
    last ones are made smaller.
    """
    record = snapshot.record
    ledger = read_files(snapshot.dataset, snapshot.files(LEDGER_TABLE), fields.LEDGER, ["reason"])
    reasons = counted(ledger.column("reason"))
    if (ledger.num_rows, reasons) == (record.admitted, record.reasons):
        return record
    by_status = {status: sum(n for r, n in reasons.items() if status_of(r) is status) for status in Status}
    return dataclasses.replace(
        record,
        admitted=ledger.num_rows,
        kept=ledger.num_rows - sum(reasons.values()),
        dropped=by_status[Status.DROPPED],
        deferred=by_status[Status.DEFERRED],
        reasons=reasons,
        funnel=_funnel(snapshot, ledger.num_rows, reasons),
    )


def _funnel(snapshot: Snapshot, admitted: int, reasons: Mapping[str, int]) -> list[dict[str, object]]:
    funnel = [{**entry, "reasons": dict(entry["reasons"])} for entry in snapshot.record.funnel]
    for reason in {*reasons, *(r for entry in funnel for r in entry["reasons"])}:
        wanted = reasons.get(reason, 0)
        holders = [entry for entry in funnel if reason in entry["reasons"]] or funnel[:1]
        for entry in holders:
            entry["reasons"][reason] = min(wanted, entry["reasons"].get(reason, wanted))
            wanted -= entry["reasons"][reason]
        if holders:
            holders[-1]["reasons"][reason] += wanted
    left = admitted
    for entry in funnel:
        entry["reasons"] = {r: n for r, n in sorted(entry["reasons"].items()) if n}
        entry["entered"] = left
        left -= sum(entry["reasons"].values())
        entry["left"] = left
    chose = [entry for entry in funnel if "texts" in entry]
    for entry in chose[:-1]:
        del entry["texts"]
    if chose:
        chose[-1]["texts"] = _texts(snapshot)
    return funnel


def _texts(snapshot: Snapshot) -> dict[str, dict[str, int]]:
    """What became of the texts of the pairs among whose texts a recipe chose, by source and outcome."""
    table = snapshot.columns.get(fields.CAPTIONS.name)
    there = table is not None and bool(snapshot.files(table))
    join = f'LEFT JOIN store."{table}" c USING (uid, shard)' if there else ""
    written = "coalesce([t.source FOR t IN c.captions], [])" if there else "[]"
    with connect(snapshot) as connection:
        rows = connection.sql(
            f"""SELECT source, coalesce(reason, '{KEPT}') AS outcome, count(*) FROM (
                  SELECT unnest(list_concat([t.source FOR t IN p.texts], {written})) AS source,
                    unnest(l.text_reasons) AS reason
                  FROM store.{LEDGER_TABLE} l JOIN store.{PAIRS_TABLE} p USING (uid, shard) {join}
                  WHERE l.text_ranks IS NOT NULL) GROUP BY ALL ORDER BY ALL"""  # noqa: S608 (a table's name)
        ).fetchall()
    found: dict[str, dict[str, int]] = {}
    for source, outcome, count in rows:
        found.setdefault(source, {})[outcome] = count
    return found
