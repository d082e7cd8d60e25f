"""Labels that describe ("large red circle"), and texts about all things: what the offline writer makes of them."""

from __future__ import annotations

import pytest

from captioners.instruct.offline.facts import read
from captioners.instruct.offline.naming import Picture
from pairmill.boxes import Box
from pairmill.instructions import Context


def context(
    *texts: str, labels: tuple[str, ...], crowded: tuple[str, ...] = (), asked: tuple[str, ...] = ()
) -> Context:
    """Boxes side by side."""
    boxes = tuple(Box(label, 10 + 60 * n, 40, 50 + 60 * n, 80) for n, label in enumerate(labels))
    return Context("a", texts, boxes, 60 * len(labels) + 20, 120, frozenset(crowded), asked)


@pytest.mark.parametrize(
    ("there", "crowded", "asked", "absent"),
    [
        (("black circle",), (), ("circle", "star"), ("star",)),  # a black circle is a circle
        (("circle",), (), ("black circle", "black star"), ("black star",)),  # and it may be a black one
        (("black circle",), (), ("red circle",), ("red circle",)),
        (("star",), ("large black circle",), ("circle", "ring"), ("ring",)),
    ],
)
def test_what_a_label_describes_is_not_denied(there, crowded, asked, absent):
    assert read(context("a picture", labels=there, crowded=crowded, asked=asked)).absent == absent


def test_the_star_is_not_the_one_where_another_may_have_lost_its_box():
    facts = read(context("a star and a ring", labels=("small red star", "ring")))
    assert Picture(facts).names["small red star"] == "star"
    facts = read(context("a star and a ring", labels=("small red star", "ring"), crowded=("large blue star",)))
    assert Picture(facts).names["small red star"] == "red star"


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("there are two objects in the picture", True),
        ("there are three objects in the picture", False),
        ("three shapes and a wall on a white background", False),
        ("a red cross and a blue star on a table", True),
        ("a red cross and a red cross on a table", False),
    ],
)
def test_texts_that_boxes_contradict_are_not_quoted(text, quoted):
    assert read(context(text, labels=("red cross", "blue star"))).order == ((0,) if quoted else ())
    assert read(context(text, labels=())).order == (0,)  # without boxes, nothing contradicts it
