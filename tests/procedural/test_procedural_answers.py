"""The oracle of answers: sentences whose truth is plain, and its eye for answers that were made false."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import pytest

from captioners.instruct.offline import OfflineWriter
from pairmill.boxes import Box
from pairmill.instructions import KINDS, Context, Instruction, Task, Turn
from pairmill.procedural.answers import judge
from pairmill.procedural.captions import describe
from pairmill.procedural.scene import COLOURS, SHAPES, SIZES, Background, Scene, SceneObject, sample_scene

GREY = Background((90, 90, 90), (90, 90, 90), "flat", 0.0, "plain", 0.0, 0.2, 0.0, 0.0)


def shape(colour: str, kind: str, size: str, x: float, y: float) -> SceneObject:
    return SceneObject(colour, kind, size, x, y, 120.0 if size == "large" else 64.0, 0.0, COLOURS[colour])


#   large red circle        small blue star
#        small red ring  (below the circle, in the lower left)
SCENE = Scene(
    400,
    320,
    GREY,
    (
        shape("red", "circle", "large", 90, 90),
        shape("blue", "star", "small", 330, 80),
        shape("red", "ring", "small", 120, 260),
    ),
)
PAIR = Scene(
    400,
    320,
    GREY,
    (
        shape("red", "circle", "large", 90, 90),
        shape("blue", "circle", "small", 330, 80),
        shape("white", "ring", "small", 200, 260),
    ),
)
ROW = Scene(
    400,
    320,
    GREY,
    (
        shape("red", "circle", "small", 60, 90),
        shape("blue", "circle", "small", 130, 180),
        shape("white", "circle", "large", 300, 160),
    ),
)
BOXES = [Box("x", *box) for box in SCENE.boxes()]  # 0 circle, 1 star, 2 ring
ELSEWHERE = Box("x", 250, 200, 330, 300)


def verdict(question: str, answer: str, scene: Scene = SCENE, boxes: list[Box] | None = None) -> bool | None:
    own = [Box("x", *box) for box in scene.boxes()]
    turns = [Turn("user", question), Turn("assistant", answer)]
    (judgement,) = judge(turns, own if boxes is None else boxes, scene)
    assert judgement.truth is True or judgement.why
    return judgement.truth


def read_table() -> Iterator[tuple[str, Scene, list[str], list[str]]]:
    """The questions of answers.txt, each with its scene and its true and false answers."""
    lines = (Path(__file__).parent / "answers.txt").read_text(encoding="utf-8").splitlines()
    scene = SCENE
    for place, line in enumerate(lines):
        if line.startswith("#"):
            scene = {"scene": SCENE, "pair": PAIR, "row": ROW}[line[2:].split(":")[0]]
        elif line.startswith("?"):
            answers = list(takewhile(bool, lines[place + 1 :]))
            yield line[2:], scene, *([a[2:] for a in answers if a[0] == sign] for sign in "+-")


@pytest.mark.parametrize(("question", "scene", "true", "false"), list(read_table()))
def test_plain_sentences(question: str, scene: Scene, true: list[str], false: list[str]):
    assert true or false
    assert {answer: verdict(question, answer, scene) for answer in true} == dict.fromkeys(true, True)
    assert {answer: verdict(question, answer, scene) for answer in false} == dict.fromkeys(false, False)


def test_what_it_cannot_read_it_says_so_of():
    for question, answer in (
        ("What does this picture show?", "A moment of great beauty."),
        ("How many circles are there?", "A few."),
        ("Where is the circle?", "Next door."),
        ("Point to the ring.", "[The thing over there](box:2)."),
        ("Why is the circle red?", "Yes."),
        ("What color is the circle?", "The circle is red. It wants to be blue."),
    ):
        assert verdict(question, answer) is None, answer
    assert verdict("What color is the circle?", "The circle is blue. It wants to be red.") is False


def test_a_box_has_to_be_that_of_the_object():
    question, answer = "Point to the ring.", "Here: [the ring](box:0)."
    ring = BOXES[2]
    assert verdict(question, answer, boxes=[ring]) is True
    assert verdict(question, answer, boxes=[replace(ring, x2=ring.x2 + 0.1 * ring.width)]) is True
    assert verdict(question, answer, boxes=[replace(ring, x2=ring.x2 + ring.width)]) is False
    assert verdict(question, answer, boxes=[ELSEWHERE]) is False
    assert verdict("What is at [](box:0)?", "It is a ring.", boxes=[ELSEWHERE]) is False
    assert verdict("What is at [](box:3)?", "It is a ring.") is False  # there is no such box
    # boxes of an image that was stored at half its size
    half = [ring.moved((0.5, 0.5, 0, 0))]
    turns = [Turn("user", question), Turn("assistant", answer)]
    assert judge(turns, half, SCENE, 200, 160)[0].truth is True
    assert judge(turns, half, SCENE)[0].truth is False


def test_turns_have_to_alternate():
    with pytest.raises(ValueError, match="do not alternate"):
        judge([Turn("user", "What is this?")], [], SCENE)
    with pytest.raises(ValueError, match="do not alternate"):
        judge([Turn("assistant", "A circle."), Turn("user", "What is this?")], [], SCENE)


# -- the offline writer's answers, as they are and made false ---------------------------------------------------------


def contexts(count: int) -> Iterator[tuple[Scene, Context]]:
    """Scenes, every third one with several objects of a shape, and what a writer is told of them: all true."""
    for place in range(count):
        rng = random.Random(f"answers:{place}")
        kinds = None
        if place % 3 == 0:
            alike, other = rng.choice(SHAPES), rng.choice(SHAPES)
            colours = rng.sample(sorted(COLOURS), rng.choice((2, 3, 3)))
            kinds = [(c, alike if n < 2 else other, rng.choice(sorted(SIZES))) for n, c in enumerate(colours)]
        scene = sample_scene(rng, kinds=kinds)
        words = ("shape",) if kinds else rng.choice((("size", "colour", "shape"), ("colour", "shape"), ("shape",)))
        boxes = [
            Box(" ".join(getattr(thing, word) for word in words), *box)
            for thing, box in zip(scene.objects, scene.boxes(), strict=True)
        ]
        texts = tuple(dict.fromkeys(describe(scene, rng) for _ in range(rng.randint(1, 3))))
        labels = SHAPES if words == ("shape",) else ()
        yield scene, Context(str(place), texts, tuple(boxes), scene.width, scene.height, frozenset(), labels)


@pytest.fixture(scope="module")
def written() -> list[tuple[Scene, Instruction]]:
    write = OfflineWriter().open()
    return [
        (scene, instruction)
        for scene, context in contexts(200)
        for instruction in write([Task(context, kind) for kind in KINDS])
        if not instruction.reason
    ]


def test_the_offline_writers_answers_are_understood_and_true(written):
    found: Counter[bool | None] = Counter()
    wrong = []
    for scene, instruction in written:
        for place, judgement in enumerate(judge(instruction.turns, instruction.boxes, scene)):
            found[judgement.truth] += 1
            if judgement.truth is not True:
                wrong.append((*(turn.content for turn in instruction.turns[2 * place : 2 * place + 2]), judgement))
    assert found.total() > 400
    assert found[True] >= 0.99 * found.total(), wrong


FLIPPED = {
    "left": "right", "right": "left", "above": "below", "below": "above", "top": "bottom", "bottom": "top",
    "leftmost": "rightmost", "rightmost": "leftmost",
}  # fmt: skip
NUMBERS = ("one", "two", "three", "four", "five", "six")


def made_false(answer: str, scene: Scene) -> Iterator[tuple[str, str]]:
    """(kind, answer) with one word changed so that it is false, whatever else is true of the scene: a colour or shape
    that no object has, another number, the other side, the other size of the only object of its shape, no for yes."""
    colours = [colour for colour in COLOURS if colour not in {thing.colour for thing in scene.objects}]
    shapes = [kind for kind in SHAPES if kind not in {thing.shape for thing in scene.objects}]
    words = list(re.finditer(r"[A-Za-z]+", re.sub(r"\(box:[0-9,]+\)", lambda m: "#" * len(m[0]), answer)))
    for place, found in enumerate(words):
        word = found[0].lower()
        after = words[place + 1][0].lower() if place + 1 < len(words) else ""
        new = kind = None
        if word in COLOURS and colours:
            kind, new = "colour", colours[place % len(colours)]
        elif word in SHAPES and shapes:
            kind, new = "shape", shapes[place % len(shapes)]
        elif word in NUMBERS and word != "one":
            kind, new = "number", NUMBERS[NUMBERS.index(word) - 1 if place % 2 else NUMBERS.index(word) + 1]
        elif (
            word in FLIPPED
            and not (word == "left" and after == "to")
            and not (word == "right" and "from left to" in answer)
        ):
            kind, new = "side", FLIPPED[word]
        elif word in SIZES and sum(thing.shape in answer[found.end() :].split()[:2] for thing in scene.objects) == 1:
            kind, new = "size", "small" if word == "large" else "large"
        elif word in ("yes", "no") and place == 0:
            kind, new = "polarity", "no" if word == "yes" else "yes"
        if kind and new and new != word:
            new = new.capitalize() if found[0][0].isupper() else new
            yield kind, answer[: found.start()] + new + answer[found.end() :]


def test_answers_that_were_made_false_are_found(written):
    found: Counter[tuple[str, bool | None]] = Counter()
    missed = []
    for scene, instruction in written:
        pairs = list(zip(instruction.turns[::2], instruction.turns[1::2], strict=True))
        truths = [judgement.truth for judgement in judge(instruction.turns, instruction.boxes, scene)]
        for (question, answer), truth in zip(pairs, truths, strict=True):
            if truth is not True:
                continue
            changed = [(kind, text, instruction.boxes) for kind, text in made_false(answer.content, scene)]
            for box in sorted({int(n) for m in re.findall(r"box:([0-9,]+)", answer.content) for n in m.split(",")}):
                own = instruction.boxes[box]
                moved = replace(
                    own,
                    x1=scene.width - own.x2,
                    x2=scene.width - own.x1,
                    y1=scene.height - own.y2,
                    y2=scene.height - own.y1,
                )
                others = [Box("x", *place) for place in scene.boxes() if own.iou(Box("x", *place)) < 0.3]
                for other in (moved, *others):
                    if own.iou(other) < 0.3:
                        boxes = tuple(other if n == box else b for n, b in enumerate(instruction.boxes))
                        changed.append(("box", answer.content, boxes))
            for kind, text, boxes in changed:
                (judgement,) = judge([question, replace(answer, content=text)], boxes, scene)
                found[kind, judgement.truth] += 1
                if judgement.truth is not False:
                    missed.append((kind, question.content, text, judgement.truth))
    kinds = {kind for kind, _ in found}
    assert kinds == {"colour", "shape", "number", "side", "size", "polarity", "box"}
    for kind in sorted(kinds):
        total = found[kind, False] + found[kind, True] + found[kind, None]
        assert found[kind, False] >= 0.99 * total and total >= 20, (kind, found, missed[:9])
