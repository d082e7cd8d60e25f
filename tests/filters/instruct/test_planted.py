"""Precision and recall of the checks on planted faults and good answers."""

from __future__ import annotations

import pytest

from filters.instruct import CHECKS
from tests.filters.instruct.planted import Planted, planted, score


@pytest.fixture(scope="module")
def answers() -> list[Planted]:
    return planted()


def test_there_are_enough_of_every_check(answers: list[Planted]):
    faults = [answer.fault for answer in answers if answer.fault]
    assert len(faults) >= 200
    assert sum(answer.fault is None for answer in answers) >= 200
    for rule in CHECKS:
        assert faults.count(rule.name) >= 15, rule.name
    assert set(faults) == {rule.name for rule in CHECKS}


@pytest.mark.parametrize("half", ["tune", "held"])
def test_precision_and_recall(answers: list[Planted], half: str):
    scored = score([answer for answer in answers if answer.half == half])
    print(f"\n{half}\n{scored.table()}")
    assert scored.recall >= 0.95, "\n".join(scored.mistakes)
    assert scored.precision >= 0.95, "\n".join(scored.mistakes)


def test_every_check_finds_what_was_planted_for_it(answers: list[Planted]):
    scored = score(answers)
    print(f"\n{scored.table()}")
    for name, counts in scored.by_check.items():
        assert counts["found"] / counts["planted"] >= 0.95, (name, scored.mistakes)
        assert counts["found"] / (counts["found"] + counts["alarms"]) >= 0.95, (name, scored.mistakes)


def test_captions_told_as_answers_pass(answers: list[Planted]):
    """Every caption is true of its own image, and most are of no other one."""
    from pairmill.instructions import Turn

    contexts = list({answer.context.uid: answer.context for answer in answers}.values())
    real = [context for context in contexts if context.uid.isdigit()]

    def told(text: str) -> tuple[Turn, Turn]:
        caption = text.strip().rstrip(".,;: ")
        told = f"This is what one sees here. {caption[:1].upper()}{caption[1:]}. Nothing else stands out."
        return Turn("user", "Describe the picture in detail."), Turn("assistant", told)

    own = foreign = passed_own = passed_foreign = 0
    for at, context in enumerate(real):
        other = real[(at + len(real) // 2) % len(real)]
        for text in context.texts:
            own += 1
            passed_own += not Planted(context, "detail", told(text), (), None, "").findings()
            foreign += 1
            passed_foreign += not Planted(other, "detail", told(text), (), None, "").findings()
    print(f"\ncaptions of the image itself: {passed_own} of {own} pass; of another one: {passed_foreign} of {foreign}")
    assert passed_own / own >= 0.99
    assert passed_foreign / foreign <= 0.05
