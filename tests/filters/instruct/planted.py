"""Planted faults and good answers, as writers of instruction data write, over real and made-up contexts.

``contexts.jsonl``: captions (CC BY 4.0, the COCO Consortium) and boxes of images of COCO 2014 and 2017, some with an
injected caption, and a few made-up ones; boxes are ``[label, x1, y1, x2, y2]``. Sizes of 2014's images are nominal.
``planted.jsonl``: one answer a line: its context, kind, turns, boxes, the check that is to find fault with it (null for
a good answer), and its half: ``tune`` was looked at while the checks were written, ``held`` was written blind, after
them (docs/decisions/instruct_checks.md has the figures of the first, blind measurement).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from filters.instruct import check
from pairmill.boxes import Box
from pairmill.instructions import Context, Finding, Turn
from schemas.config import InstructKind

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Planted:
    """An answer and what is wrong with it."""

    context: Context
    kind: InstructKind
    turns: tuple[Turn, ...]
    boxes: tuple[Box, ...]
    fault: str | None
    half: str

    def findings(self) -> list[Finding]:
        return check(self.turns, self.boxes, self.kind, self.context)


def _box(row: list[object]) -> Box:
    label, *corners = row
    return Box(str(label), *(float(str(value)) for value in corners))


def contexts() -> dict[str, Context]:
    found = {}
    for line in (HERE / "contexts.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        found[row["uid"]] = Context(
            row["uid"],
            tuple(row["texts"]),
            tuple(map(_box, row["boxes"])),
            row["width"],
            row["height"],
            frozenset(row["crowded"]),
        )
    return found


def planted() -> list[Planted]:
    known = contexts()
    rows = [json.loads(line) for line in (HERE / "planted.jsonl").read_text("utf-8").splitlines()]
    return [
        Planted(
            known[row["context"]],
            row["kind"],
            tuple(Turn(role, content) for role, content in row["turns"]),
            tuple(map(_box, row["boxes"])),
            row["fault"],
            row["half"],
        )
        for row in rows
    ]


@dataclass
class Score:
    """Precision and recall of the checks on planted answers."""

    faults: int = 0
    found: int = 0
    goods: int = 0
    alarms: int = 0
    by_check: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Of each check: ``planted``, ``found`` by this very check, and ``alarms`` on good answers."""
    mistakes: list[str] = field(default_factory=list)

    @property
    def recall(self) -> float:
        return self.found / self.faults

    @property
    def precision(self) -> float:
        return self.found / (self.found + self.alarms)

    def table(self) -> str:
        lines = [f"{'check':10} planted  found  alarms"]
        for name, counts in sorted(self.by_check.items()):
            lines.append(f"{name:10} {counts['planted']:7} {counts['found']:6} {counts['alarms']:7}")
        lines.append(f"{'all':10} {self.faults:7} {self.found:6} {self.alarms:7} of {self.goods} good answers")
        lines.append(f"recall {self.recall:.3f}, precision {self.precision:.3f}")
        return "\n".join(lines)


def score(answers: list[Planted]) -> Score:
    total = Score()
    for answer in answers:
        findings = answer.findings()
        reasons = {finding.reason.removeprefix("check.") for finding in findings}
        if answer.fault:
            total.faults += 1
            total.found += bool(findings)
            total.by_check[answer.fault]["planted"] += 1
            total.by_check[answer.fault]["found"] += answer.fault in reasons
            if answer.fault not in reasons:
                total.mistakes.append(f"missed {answer.fault}: {answer.turns} {findings}")
        else:
            total.goods += 1
            total.alarms += bool(findings)
            for reason in reasons:
                total.by_check[reason]["alarms"] += 1
            if findings:
                total.mistakes.append(f"false alarm: {answer.turns} {findings}")
    return total
