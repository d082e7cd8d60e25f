"""Boxes in each dialect: rendered, read back, and read by the trainers' own code where it is installed."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pairmill._torchvision import ensure_torchvision
from pairmill.boxes import Box
from pairmill.export.dialects import DIALECTS, Frame, Kosmos2, Llava, Located, Shikra
from pairmill.instructions import Mention, parts

UNITS = {"llava": 100, "shikra": 1000, "qwen_vl": 1000, "qwen2_vl": 1000, "minigpt_v2": 100, "kosmos2": 32}
"""Of a side of the frame."""

SIDES = st.one_of(st.integers(1, 5000), st.sampled_from([1, 2, 3, 100, 223, 224, 4999, 5000]))


@st.composite
def scenes(draw):
    """A width, a height and a box in it: anything from a hair to the whole image."""
    width, height = draw(SIDES), draw(SIDES)

    def stretch(side):
        ends = st.one_of(st.floats(0, side, width=32), st.integers(0, side).map(float))
        a, b = sorted((draw(ends), draw(ends)))
        if b - a < 1e-3:
            a, b = (a, a + 1e-3) if a + 1e-3 <= side else (side - 1e-3, float(side))
        return a, b

    (x1, x2), (y1, y2) = stretch(width), stretch(height)
    return width, height, Box("thing", x1, y1, x2, y2)


def grid(name, width, height):
    """Pixels a unit, across and down."""
    padded = name in ("llava", "shikra")
    side = max(width, height)
    return ((side if padded else width) / UNITS[name], (side if padded else height) / UNITS[name])


def boxes_of(pieces):
    return [corners for piece in pieces if isinstance(piece, Located) for corners in piece.boxes]


@pytest.mark.parametrize("name", UNITS)
@given(scene=scenes())
@example(scene=(5000, 1, Box("thing", 2499.9, 0.0, 2500.1, 1.0)))
@example(scene=(1, 5000, Box("thing", 0.0, 0.0, 1.0, 0.01)))
@example(scene=(640, 480, Box("thing", 0.0, 0.0, 640.0, 480.0)))
@example(scene=(640, 480, Box("thing", 639.5, 479.5, 640.0, 480.0)))
def test_what_is_rendered_is_read_back_within_the_formats_own_rounding(name, scene):
    width, height, box = scene
    dialect = DIALECTS[name]
    text = dialect.render("see [it](box:0).", [box], width, height)
    ((x1, y1, x2, y2),) = boxes_of(dialect.parse(text, width, height))
    across, down = grid(name, width, height)
    # Half a unit, or less than one where both ends meet in a unit (Kosmos-2: in a row or a column of patches).
    meets = name == "kosmos2" or min(box.width / across, box.height / down) <= 1
    most = 1 if meets else 0.5
    slack = 1e-6 * max(width, height)
    assert max(abs(x1 - box.x1), abs(x2 - box.x2)) <= most * across + slack
    assert max(abs(y1 - box.y1), abs(y2 - box.y2)) <= most * down + slack
    assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
    assert Box("", x1, y1, x2, y2).iou(box) > 0, "what is read overlaps what was meant"


@given(scene=scenes())
def test_a_long_box_of_kosmos2_is_off_by_half_a_patch_at_most(scene):
    width, height, box = scene
    if box.width <= width / 16 or box.height <= height / 16:
        return  # it may lie in one row or column
    ((x1, y1, x2, y2),) = boxes_of(Kosmos2().parse(Kosmos2().render("[](box:0)", [box], width, height), width, height))
    assert max(abs(x1 - box.x1), abs(x2 - box.x2)) <= width / 64 + 1e-6 * width
    assert max(abs(y1 - box.y1), abs(y2 - box.y2)) <= height / 64 + 1e-6 * height


WORDS = st.text(st.sampled_from("ab dé<>/|()0.12,;{}&'\"\n"), max_size=12)
TOKENS = st.sampled_from(
    [
        "<image>",
        "<box>",
        "</ref>",
        "<|im_end|>",
        "<|box_start|>",
        "<p>",
        "<delim>",
        "<phrase>",
        "</object>",
        "<12>",
        "[0.10, 0.20, 0.30, 0.40]",
        "[0.100,0.200,0.300,0.400]",
        "(1,2),(3,4)",
        "{<1><2><3><4>}",
        "a < b > c",
        "<<box>>",
    ]
)
TEXTS = st.lists(st.one_of(WORDS, TOKENS), max_size=4).map("".join)
PHRASES = TEXTS.map(lambda text: re.sub(r"[\[\]]", "", text).strip())
CONTENTS = st.lists(st.one_of(TEXTS, st.builds(Mention, PHRASES, st.sampled_from([(0,), (1, 0)]))), max_size=5)
BOXES = [Box("dog", 10, 20, 300, 200), Box("cat", 0, 0, 640, 480)]


@pytest.mark.parametrize("name", UNITS)
@given(content=CONTENTS)
def test_no_text_is_taken_for_a_box_and_no_box_is_lost(name, content):
    dialect = DIALECTS[name]
    stored = " ".join(map(str, content))
    mentions = [part for part in parts(stored) if isinstance(part, Mention)]
    pieces = dialect.parse(dialect.render(stored, BOXES, 640, 480), 640, 480)
    found = [piece for piece in pieces if isinstance(piece, Located)]
    assert len(boxes_of(pieces)) == sum(len(mention.boxes) for mention in mentions)
    if name != "llava":
        assert len(found) == len(mentions)
    if dialect.marks_phrases:
        assert [piece.phrase for piece in found] == [dialect.text(mention.phrase) for mention in mentions]
        texts = [dialect.text(part) for part in parts(stored) if isinstance(part, str)]
        assert "".join(piece for piece in pieces if isinstance(piece, str)) == "".join(texts)


@pytest.mark.parametrize("name", DIALECTS)
@given(content=CONTENTS)
def test_a_text_never_holds_a_tag_of_its_own(name, content):
    dialect = DIALECTS[name]
    rendered = dialect.render("".join(map(str, content)), BOXES, 640, 480)
    rest = "".join(piece for piece in dialect.parse(rendered, 640, 480) if isinstance(piece, str))
    assert not re.search(r"</?(image|box|ref|p|delim|phrase|object|im_end|\|im_end\||\|box_start\|)>", rest)


def test_the_renderings_are_as_published():
    boxes = [Box("dog", 64, 96, 320, 240), Box("cat", 0, 0, 640, 480)]
    content = "Here is [the dog](box:0), [both](box:0,1)."
    rendered = {name: dialect.render(content, boxes, 640, 480) for name, dialect in DIALECTS.items()}
    # 640 x 480 lies 80 pixels down in a square of 640.
    assert rendered == {
        "llava": "Here is the dog [0.10, 0.28, 0.50, 0.50], both [0.10, 0.28, 0.50, 0.50], [0.00, 0.12, 1.00, 0.88].",
        "shikra": "Here is the dog[0.100,0.275,0.500,0.500], both[0.100,0.275,0.500,0.500;0.000,0.125,1.000,0.875].",
        "qwen_vl": "Here is <ref>the dog</ref><box>(100,200),(500,500)</box>, "
        "<ref>both</ref><box>(100,200),(500,500)</box><box>(0,0),(1000,1000)</box>.",
        "qwen2_vl": "Here is <|object_ref_start|>the dog<|object_ref_end|><|box_start|>(100,200),(500,500)<|box_end|>, "
        "<|object_ref_start|>both<|object_ref_end|><|box_start|>(100,200),(500,500)<|box_end|>"
        "<|box_start|>(0,0),(1000,1000)<|box_end|>.",
        "minigpt_v2": "Here is <p>the dog</p> {<10><20><50><50>}, "
        "<p>both</p> {<10><20><50><50>}<delim>{<0><0><100><100>}.",
        "kosmos2": "Here is<phrase> the dog</phrase><object><patch_index_0195><patch_index_0495></object>,"
        "<phrase> both</phrase><object><patch_index_0195><patch_index_0495></delimiter_of_multi_objects/>"
        "<patch_index_0000><patch_index_1023></object>.",
        "plain": "Here is the dog, both.",
    }
    assert Llava().frame(640, 480) == Shikra().frame(640, 480) == Frame(640, 640, 0, 80)
    assert Llava().frame(3, 6) == Frame(6, 6, 1, 0) and Llava().frame(5, 5) is None
    assert all(DIALECTS[name].frame(640, 480) is None for name in ("qwen_vl", "qwen2_vl", "minigpt_v2", "kosmos2"))


def test_a_region_without_a_phrase_is_its_box_alone():
    rendered = {name: dialect.render("[](box:0)", BOXES, 640, 480) for name, dialect in DIALECTS.items()}
    assert rendered["qwen_vl"] == "<box>(16,42),(469,417)</box>"
    assert rendered["llava"] == "[0.02, 0.16, 0.47, 0.44]"
    assert rendered["kosmos2"].startswith("<object>") and rendered["minigpt_v2"].startswith("{<2>")
    assert rendered["plain"] == ""


@pytest.mark.parametrize("name", UNITS)
def test_what_cannot_be_shown_is_refused(name):
    dialect = DIALECTS[name]
    with pytest.raises(ValueError, match="means box 2, but the conversation has 2"):
        dialect.render("[it](box:2)", BOXES, 640, 480)
    for x1, x2 in ((700, 800), (-5, 0), (10, 10), (20, 10), (float("nan"), 10)):
        with pytest.raises(ValueError, match="nothing of the box"):
            dialect.render("[it](box:0)", [Box("it", x1, 10, x2, 20)], 640, 480)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen_vl", "<ref>a</ref><box>(1,2),(3,4000)</box>"),
        ("qwen_vl", "<ref>a</ref><box>(5,2),(3,4)</box>"),
        ("qwen2_vl", "<|box_start|>(5,2),(5,4)<|box_end|>"),
        ("minigpt_v2", "<p>a</p> {<1><2><3><101>}"),
        ("kosmos2", "<phrase>a</phrase><object><patch_index_0040><patch_index_0003></object>"),
        ("kosmos2", "<phrase>a</phrase><object><patch_index_0040><patch_index_1024></object>"),
        ("llava", "[1.10, 0.00, 1.20, 0.10]"),
        ("llava", "[0.00, 0.00, 1.00, 0.10]"),
        ("shikra", "[0.300,0.000,0.200,0.100]"),
    ],
)
def test_boxes_out_of_order_or_outside_the_image_are_text(name, text):
    assert DIALECTS[name].parse(text, 1000, 500) == [text]  # in a square, the image begins a quarter down


@given(scene=scenes(), second=scenes(), phrase=PHRASES.filter(lambda phrase: len(phrase.split()) > 0))
def test_kosmos2_is_read_by_the_models_own_processor(scene, second, phrase):
    ensure_torchvision()
    from transformers.models.kosmos2.processing_kosmos2 import (
        clean_text_and_extract_entities_with_bboxes,
        coordinate_to_patch_index,
    )

    width, height, box = scene
    other = Box("b", *(v * s for v, s in zip(second[2].xyxy, (width / second[0], height / second[1]) * 2, strict=True)))
    text = Kosmos2().render(f"<grounding> a < b, [{phrase}](box:0,1) > [](box:1)", [box, other], width, height)
    clean, entities = clean_text_and_extract_entities_with_bboxes(text)
    (said, (start, end), found), (_, _, alone) = entities
    assert said == Kosmos2().text(phrase) == clean[start:end]
    ours = [piece.boxes for piece in Kosmos2().parse(text, width, height) if isinstance(piece, Located)]
    theirs = [tuple((x1 * width, y1 * height, x2 * width, y2 * height) for x1, y1, x2, y2 in b) for b in (found, alone)]
    assert [tuple(pytest.approx(four) for four in boxes) for boxes in theirs] == ours
    numbers = [int(number) for number in re.findall(r"patch_index_(\d+)", text)]
    fractions = [v / s for v, s in zip(box.xyxy, (width, height) * 2, strict=True)]
    assert tuple(numbers[:2]) == coordinate_to_patch_index(tuple(fractions), 32)


def test_numbers_that_are_no_coordinates_stay_as_they_are():
    text = "Reference [1] says 3 < 4 and x > 2; 50 % of {a, b}."
    assert {name: dialect.text(text) for name, dialect in DIALECTS.items() if name != "kosmos2"} == dict.fromkeys(
        (*UNITS.keys() - {"kosmos2"}, "plain"), text
    )


def test_shikras_own_pattern_finds_its_boxes():
    """The pattern of its ``PlainBoxFormatter``, by which it scores answers."""
    one = r"\d(?:\.\d*)?(?:,\d(?:\.\d*)?){3}"
    text = Shikra().render("It says [0.1,0.2,0.3,0.4]; [both](box:0,1)", BOXES, 640, 480)
    assert re.findall(rf"\[{one}(?:;{one})*\]", text) == ["[0.016,0.156,0.469,0.438;0.000,0.125,1.000,0.875]"]
