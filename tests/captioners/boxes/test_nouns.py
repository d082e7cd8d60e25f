"""What a detector is asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioners.boxes.nouns import named, nouns, singular


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A man riding a wave on top of a surfboard.", ["man", "wave", "surfboard"]),
        ("Two dogs and three cats on the grass", ["dog", "cat"]),
        ("a group of people holding umbrellas", ["person", "umbrella"]),
        ("a bowl of fruit next to a glass of wine", ["bowl", "fruit", "glass", "wine"]),
        ("A picture of the front of a stop sign", ["stop sign"]),
        ("an orange bus parked on a street", ["bus"]),
        ("an orange and two apples", ["orange", "apple"]),
        ("a laptop, keyboard, mouse and a hot dog", ["laptop", "keyboard", "mouse", "hot dog"]),
        ("The children watch the knives, the buses and the glasses", ["child", "knife", "bus"]),
        ("a Honda motorcycle", ["motorcycle"]),
        ("a big xylophone near a red blorple", ["xylophone", "blorple"]),
        ("two women walk past a restaurant together", ["woman"]),
        ("beautiful sunset view", []),
        ("", []),
    ],
)
def test_nouns_of_a_caption(text, found):
    assert [noun for noun in nouns([text]) if noun not in ("glasses", "sunglasses")] == found


def test_each_once_in_the_order_of_its_first_mention():
    assert nouns(["a cat", "two dogs and a cat", "A DOG"]) == ("cat", "dog")


@pytest.mark.parametrize("word", ["bus", "glass", "grass", "tennis", "dress", "cactus", "dog", "sheep", "hot dog"])
def test_a_singular_stays(word):
    assert singular(word) == word


@pytest.mark.parametrize(
    ("many", "one"),
    [
        *[("buses", "bus"), ("dishes", "dish"), ("boxes", "box"), ("horses", "horse"), ("ponies", "pony")],
        *[("policemen", "policeman"), ("teddy bears", "teddy bear"), ("vases", "vase"), ("blorples", "blorple")],
        *[("tomatoes", "tomato"), ("wolves", "wolf"), ("traffic lights", "traffic light"), ("ties", "tie")],
    ],
)
def test_singulars(many, one):
    assert singular(many) == one


def test_named():
    wanted = ["puppy", "man", "kite", "blorple", "car"]
    assert named(wanted, ["dog", "person"]) == {"puppy", "man"}
    assert named(wanted, ["Blorple", "traffic light"]) == {"blorple"}
    assert named(wanted, []) == set()


@given(st.text(max_size=200))
def test_any_text_has_nouns_that_are_words(text):
    found = nouns([text])
    assert len(set(found)) == len(found) and all(noun and noun == noun.strip() for noun in found)
    assert nouns([text, text]) == found
