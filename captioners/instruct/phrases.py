"""How facts are put into words: templates, and the choice among them.

Every question and every answer has several wordings. Which one is taken follows from the seed, the image and the kind
alone (`Choices`), so a conversation is the same in every run. Statements are kept to patterns that can be read back:
"X is to the left of Y", "There are three X", "The X is red".
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from captioners.instruct.nouns import NUMBER_WORDS

T = TypeVar("T")


class Choices:
    """A sequence of choices that follows from its key alone, on every machine and Python."""

    def __init__(self, *key: object) -> None:
        digest = hashlib.blake2b("\n".join(map(str, key)).encode("utf-8", "replace"), digest_size=8).digest()
        self._state = int.from_bytes(digest, "big")

    def below(self, number: int) -> int:
        """One of 0 to `number` - 1."""
        # Knuth's MMIX generator (The Art of Computer Programming 2, 3.3.4); its upper bits are the good ones.
        self._state = (self._state * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF
        return (self._state >> 33) % number

    def of(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """All of them, in some order."""
        left = list(options)
        for last in range(len(left) - 1, 0, -1):
            other = self.below(last + 1)
            left[last], left[other] = left[other], left[last]
        return left


def number(count: int) -> str:
    """``three``, ``15``."""
    return NUMBER_WORDS.get(count, str(count))


def listed(items: Sequence[str]) -> str:
    """``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def capital(words: str) -> str:
    """With its first letter upper case, behind the bracket of a mention, too."""
    start = 1 if words.startswith("[") else 0
    return words[:start] + words[start : start + 1].upper() + words[start + 1 :]


SCENE = (
    "What does this picture show?",
    "What is going on in this picture?",
    "What can be seen in the picture?",
    "What do you see here?",
    "What is this a picture of?",
    "Can you tell me what is in the picture?",
    "What is in this image?",
    "Say in one sentence what the picture shows.",
)
COUNT = (
    "How many {many} are there in the picture?",
    "How many {many} can be seen?",
    "How many {many} do you see?",
    "Can you count the {many}?",
    "What is the number of {many} in this picture?",
)
COUNTED = (
    "There are {number} {many}.",
    "There are {number} {many} in the picture.",
    "{Number} {many} can be seen.",
    "I count {number} {many}.",
    "{Number}.",
)
COUNTED_ONE = ("There is one {one}.", "There is just one {one}.", "One {one} can be seen.", "Only one.")
COLOUR = (
    "What color is {the}?",
    "What is the color of {the}?",
    "Which color does {the} have?",
    "What color does {the} have?",
)
COLOURED = ("{The} is {colour}.", "It is {colour}.", "{Colour}.", "The color of {the} is {colour}.")
COLOURS_ = ("What color are {the}?", "What is the color of {the}?")
COLOURED_MANY = ("{The} are {colour}.", "They are {colour}.", "{Colour}.")
MATERIAL = ("What is {the} made of?", "What material is {the} made of?")
MADE = ("{The} is made of {material}.", "It is made of {material}.", "Of {material}.")
DOING = (
    "What is {the} doing?",
    "What is {the} up to?",
    "Can you tell me what {the} is doing?",
    "What do you see {the} doing?",
)
WHERE = ("Where is {the}?", "Where can {the} be found?", "Where exactly is {the}?")
SIDE = (
    "In which part of the picture is {the}?",
    "Where in the picture is {the}?",
    "Whereabouts in the frame is {the}?",
    "On which side of the picture would you look for {the}?",
)
LEFT_OF = (
    "Where is {the} in relation to {other}?",
    "How is {the} placed relative to {other}?",
    "On which side of {other} is {the}?",
)
ABOVE = (
    "Where is {the} in relation to {other}?",
    "How is {the} placed relative to {other}?",
)
LEFTMOST = ("Which is further left, {the} or {other}?", "Which of the two is on the left, {the} or {other}?")
RIGHTMOST = ("Which is further right, {the} or {other}?", "Which of the two is on the right, {the} or {other}?")
HIGHER = ("Which is higher up in the picture, {the} or {other}?",)
LARGER = (
    "Which takes up more of the picture, {the} or {other}?",
    "Which looks larger in this picture, {the} or {other}?",
    "What is larger in the picture, {the} or {other}?",
)
MORE = (
    "Are there more {many} or more {others}?",
    "Which are there more of, {many} or {others}?",
    "What is more numerous here, {many} or {others}?",
)
PRESENT = (
    "Is there {a} in the picture?",
    "Can you see {a}?",
    "Is there {a} here?",
    "Does the picture show {a}?",
    "Do you see {a} in this image?",
    "Is {a} visible?",
)
PRESENT_MANY = ("Are there any {many} in the picture?", "Can you see any {many}?", "Does the picture show any {many}?")
DETAIL = (
    "Please describe this picture in detail.",
    "Describe what you see as fully as you can.",
    "Give a detailed account of the picture.",
    "What does this picture show? Please be thorough.",
    "Walk me through this image.",
    "Describe the scene and where things are in it.",
    "Can you describe the image in detail?",
    "Tell me everything that you can make out in this picture.",
    "Write a full account of what this image shows.",
    "What is in this picture, and where? Go into detail.",
)
