"""The funnel: visible counts that add up, or an error."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairmill.errors import ContractError
from pairmill.report.funnel import check_funnel, funnel_json, print_funnel
from schemas.reasons import Reason, Status, status_of
from schemas.snapshot import SnapshotRecord


def record(admitted: int, drops: list[dict[str, int]]) -> SnapshotRecord:
    """A record whose steps drop these."""
    funnel, left, reasons = [], admitted, dict[str, int]()
    for number, dropped in enumerate(drops):
        out = sum(dropped.values())
        entry = {"step": f"step{number}", "kind": "verdict", "entered": left, "reasons": dropped, "left": left - out}
        funnel.append(entry)
        left -= out
        for reason, count in dropped.items():
            reasons[reason] = reasons.get(reason, 0) + count
    deferred = sum(n for r, n in reasons.items() if status_of(r) is Status.DEFERRED)
    return SnapshotRecord(
        id=3,
        refresh=1,
        created_at="2030-01-01T00:00:00+00:00",
        recipe="r",
        config="",
        admitted=admitted,
        kept=left,
        dropped=admitted - left - deferred,
        deferred=deferred,
        reasons=reasons,
        funnel=funnel,
        tables={},
        columns={},
        models={},
        software={},
        seconds=1.0,
    )


def shown(snapshot: SnapshotRecord) -> list[str]:
    stream = io.StringIO()
    print_funnel(snapshot, stream)
    return stream.getvalue().splitlines()


def test_one_line_a_step_one_a_reason_and_the_sum():
    lines = shown(
        record(
            2000, [{}, {"url.scheme": 10}, {"http.not_found": 90, "http.timeout": 100}, {"clip.below_threshold": 600}]
        )
    )
    assert [line.split() for line in lines[:-2]] == [
        ["step", "entered", "out", "reason", "left"],
        ["step0", "2,000", "2,000"],
        ["step1", "2,000", "10", "url.scheme", "1,990"],
        ["step2", "1,990", "190", "1,800"],
        ["100", "http.timeout", "(deferred)"],
        ["90", "http.not_found"],
        ["step3", "1,800", "600", "clip.below_threshold", "1,200"],
    ]
    assert lines[-1] == "2,000 admitted = 1,200 kept (60.0%) + 700 dropped + 100 deferred"


TEXTS = {"blip": {"kept": 7}, "web": {"kept": 1500, "itm.below_threshold": 40, "text.repeated": 90}}


def mixed(texts: dict[str, dict[str, int]]) -> SnapshotRecord:
    good = record(2000, [{}, {"text.none_kept": 600}])
    return dataclasses.replace(good, funnel=[good.funnel[0], {**good.funnel[1], "texts": texts}])


def test_texts_are_counted_by_source():
    lines = shown(mixed(TEXTS))
    assert lines[-5] == "texts of the 2,000 pairs that entered step1:"
    assert [line.split() for line in lines[-4:]] == [
        ["source", "texts", "kept", "out", "reason"],
        ["web", "1,630", "1,500", "90", "text.repeated"],
        ["40", "itm.below_threshold"],
        ["blip", "7", "7"],
    ]


def test_a_kept_pair_without_a_kept_text_is_a_defect():
    with pytest.raises(ContractError, match="1400 pairs, but only 1399 texts"):
        check_funnel(mixed({"web": {"kept": 1399}}))


def test_an_empty_snapshot_can_be_shown():
    assert shown(record(0, [{}]))[-1] == "0 admitted = 0 kept + 0 dropped + 0 deferred"


REASONS = st.dictionaries(st.sampled_from([r.value for r in Reason]), st.integers(1, 50), max_size=4)


@given(st.lists(REASONS, max_size=5), st.integers(0, 1000))
def test_what_is_printed_adds_up(drops: list[dict[str, int]], kept: int):
    snapshot = record(kept + sum(sum(d.values()) for d in drops), drops)
    sums = funnel_json(snapshot)
    assert sums["admitted"] == sums["kept"] + sum(sums["reasons"].values())
    admitted, kept_shown, dropped, deferred = (
        int(part.split()[0].replace(",", "")) for part in shown(snapshot)[-1].replace(" = ", " + ").split(" + ")
    )
    assert admitted == kept_shown + dropped + deferred


@pytest.mark.parametrize(
    "change",
    [{"kept": 5}, {"dropped": 0}, {"deferred": 4}, {"admitted": 11}, {"reasons": {"url.scheme": 2}}, {"reasons": {}}],
)
def test_counts_that_do_not_add_up_are_never_shown(change: dict[str, Any]):
    good = record(10, [{"url.scheme": 3}, {"http.timeout": 1}])
    check_funnel(good)
    with pytest.raises(ContractError, match="add up"):
        print_funnel(dataclasses.replace(good, **change), io.StringIO())


def test_a_step_that_loses_rows_is_named():
    good = record(10, [{"url.scheme": 3}, {"http.timeout": 1}])
    funnel = [good.funnel[0], {**good.funnel[1], "left": 5}]
    with pytest.raises(ContractError, match="at step 'step1'"):
        check_funnel(dataclasses.replace(good, funnel=funnel))
