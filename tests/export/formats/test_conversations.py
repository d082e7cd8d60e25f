"""Conversations as their trainers read them.

LLaVA's and Qwen-VL's training code, LLaMA-Factory, ms-swift, MiniGPT-4 and LAVIS cannot be installed beside this
package (they pin other versions of transformers), so what they ask of their data is checked here: keys, speakers in
turn, how many images, where their files are, how coordinates are to be understood. What is said of them was read in
LLaVA's ``train.py`` (``LazySupervisedDataset``, ``preprocess_multimodal``, ``preprocess_v1``), Qwen-VL's
``finetune.py`` (``preprocess``), LLaMA-Factory's ``converter.py`` and ``parser.py``, MiniGPT-4's ``cc_sbu_dataset.py``
and ``base_dataset.py``, and LAVIS' ``coco_vqa_datasets.py``.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pairmill.boxes import Box
from pairmill.errors import StoreError
from pairmill.export import Options, export
from pairmill.instructions import Instruction, Turn
from tests.export.dataset import Built, Pair, build, instructed

RED, BLUE = (255, 0, 0), (0, 0, 255)
WIDE, TALL, SQUARE = (90, 40), (40, 90), (64, 64)


class Painted(Pair):
    """A pair whose image is blue but for a red box."""

    @property
    def box(self) -> Box:
        width, height = self.size
        return Box("red box", width * 0.3, height * 0.2, width * 0.8, height * 0.7, None, "human")

    @property
    def image(self) -> bytes:
        image, box = Image.new("RGB", self.size, BLUE), self.box
        image.paste(RED, tuple(map(round, box.xyxy)))
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()


def painted(number: int, size: tuple[int, int]) -> Painted:
    pair = Painted(number, 0, format="png", size=size)
    turns = (Turn("user", "Where is it? <image> <img>x</img>"), Turn("assistant", "It is [the box](box:0)."))
    return Painted(**{**vars(pair), "instructions": (Instruction("grounding", turns, (pair.box,), "offline"),)})


PAIRS = [
    *(instructed(Pair(n, n // 5, format=("jpeg", "png", "webp")[n % 3], size=(32, 24))) for n in range(7)),
    *(painted(n, size) for n, size in enumerate((WIDE, TALL, SQUARE), 7)),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    return build(str(tmp_path_factory.mktemp("dataset") / "data"), PAIRS)


@pytest.fixture(scope="module")
def exported(built, tmp_path_factory):
    """The folder of an export, written once."""
    done: dict[tuple[str, Options], Path] = {}

    def write(name: str, **options: Any) -> Path:
        chosen = Options(**options)
        if (name, chosen) not in done:
            out = tmp_path_factory.mktemp(name)
            export(built.snapshot, str(out), name, pairs_per_shard=10, options=chosen)
            done[name, chosen] = out
        return done[name, chosen]

    return write


def told() -> dict[str, int]:
    """How many turns each conversation has, by id."""
    usable = [(p, i) for p in PAIRS for i in p.instructions or () if i.reason is None]
    return {f"{pair.uid}-{i.kind}": len(i.turns) for pair, i in usable}


def records(out: Path, name: str) -> list[dict[str, Any]]:
    found = json.loads((out / name).read_text())
    assert isinstance(found, list)
    return found


def assert_in_turn(turns: list[dict[str, str]], user: str, assistant: str) -> None:
    """Both speak in turn, the user first and the assistant last, and nobody says nothing."""
    assert len(turns) >= 2 and len(turns) % 2 == 0
    for number, turn in enumerate(turns):
        assert set(turn) == {"from", "value"} and turn["from"] == (user, assistant)[number % 2]
        assert turn["value"].strip() == turn["value"] != ""


def opened(*path: Any) -> Image.Image:
    """An image as trainers open it."""
    with Image.open(os.path.join(*path)) as image:
        return image.convert("RGB")


def is_red(image: Image.Image, box: tuple[float, ...], slack: float) -> bool:
    """Whether a box holds the red and nothing else, give or take some pixels on each side."""
    red = np.asarray(image.convert("RGB"))[..., 0].astype(float)
    rows, columns = np.nonzero(red > 128)
    there = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return all(abs(a - b) <= slack for a, b in zip(box, there, strict=True))


def padded(image: Image.Image) -> Image.Image:
    """As LLaVA and Shikra see an image: in the middle of a square."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), (0, 0, 0))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


# -- LLaVA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boxes", [None, "shikra", "kosmos2", "qwen2_vl"])
def test_llava(exported, boxes):
    out = exported("llava", boxes=boxes)
    found = records(out, "llava.json")
    assert {r["id"]: len(r["conversations"]) for r in found} == told()
    for record in found:
        assert set(record) - {"frame"} == {"id", "image", "conversations"}
        assert opened(out, record["image"])
        turns = record["conversations"]
        assert_in_turn(turns, "human", "gpt")
        said = [turn["value"] for turn in turns]
        # preprocess_multimodal moves the image to the start of the turn that has it: there it is already.
        assert "".join(said).count("<image>") == 1 and said[0] == "<image>\n" + said[0].replace("<image>", "").strip()
        # preprocess_v1 and its like take a conversation apart at these.
        assert not re.search(r"</s>|USER:|ASSISTANT:|\[/?INST\]|###|<\|im_", " ".join(said))


@pytest.mark.parametrize(("boxes", "decimals"), [("llava", 2), ("shikra", 3)])
def test_boxes_in_llavas_padded_square_are_where_the_image_is_red(exported, boxes, decimals):
    out = exported("llava", boxes=boxes)
    seen = []
    for record in records(out, "llava.json"):
        image = opened(out, record["image"])
        if image.size not in (WIDE, TALL, SQUARE):
            continue
        (numbers,) = re.findall(r"\[([^\]]*)\]", record["conversations"][1]["value"])
        assert re.fullmatch(rf"[01]\.\d{{{decimals}}}(, ?[01]\.\d{{{decimals}}}){{3}}", numbers)
        square = padded(image)
        box = tuple(float(n) * square.width for n in numbers.split(","))
        assert is_red(square, box, 0.51 * square.width / 10**decimals + 0.5)
        if image.width != image.height:
            frame, side = record["frame"], max(image.size)
            assert (frame["width"], frame["height"]) == (side, side)
            there = image.crop((-frame["left"], -frame["top"], side - frame["left"], side - frame["top"]))
            assert is_red(there, box, 0.51 * side / 10**decimals + 0.5)
        else:
            assert "frame" not in record
        seen.append(image.size)
    assert sorted(seen) == sorted((WIDE, TALL, SQUARE))


def test_only_the_kinds_that_are_asked_for_and_only_pairs_with_one(exported):
    out = exported("llava", kinds=("detail", "conversation"))
    ids = [r["id"] for r in records(out, "llava.json")]
    assert set(ids) == {i for i in told() if i.endswith(("-detail", "-conversation"))}
    assert [i.rpartition("-")[2] for i in ids[:2]] in (["conversation", "detail"], ["conversation", "conversation"])
    assert len(list((out / "images").rglob("*.*"))) == 7  # not those that have a grounding alone


def test_llava_with_images_in_tars(exported):
    out = exported("llava", images="shards")
    members = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            members |= {m.name: (json.load(tar.extractfile(m)) if m.name.endswith("json") else m.size) for m in tar}
    found = records(out, "llava.json")
    assert {r["image"] for r in found} <= members.keys()
    for record in found:
        beside = members[record["image"].partition(".")[0] + ".json"]
        assert record["id"].startswith(beside["uid"]) and "conversations" not in beside
    assert json.loads((out / "sizes.json").read_text()) == {"00000.tar": 10}
    assert records(exported("llava", images="none"), "llava.json") == found


# -- LLaMA-Factory and ms-swift ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
def test_sharegpt(exported, tmp_path):
    import datasets

    out = exported("sharegpt", boxes="qwen2_vl")
    info = json.loads((out / "dataset_info.json").read_text())["pairmill"]
    assert info["formatting"] == "sharegpt"
    loaded = datasets.load_dataset(
        "json", data_files=str(out / info["file_name"]), split="train", cache_dir=str(tmp_path)
    )
    columns, tags = info["columns"], info["tags"]
    seen = {}
    for row in loaded:
        messages, images = row[columns["messages"]], row[columns["images"]]
        assert_in_turn(messages, tags["user_tag"], tags["assistant_tag"])
        said = [message[tags["content_tag"]] for message in messages]
        assert [message[tags["role_tag"]] for message in messages][:2] == ["human", "gpt"]
        assert "".join(said).count("<image>") == len(images) == 1 and said[0].startswith("<image>\n")
        assert all(opened(out, image).size for image in images)
        if row["id"].endswith("grounding"):
            assert re.search(r"<\|box_start\|>\(\d+,\d+\),\(\d+,\d+\)<\|box_end\|>", " ".join(said))
        seen[row["id"]] = len(messages)
    assert seen == told()
    text = (exported("sharegpt") / "sharegpt.json").read_text()
    assert "grounding" not in text and "box_start" not in text and "the thing" in text


# -- Qwen-VL ----------------------------------------------------------------------------------------------------------


def test_qwen_vl(exported, monkeypatch):
    out = exported("qwen-vl")
    monkeypatch.chdir(out)
    found = records(out, "qwen_vl.json")
    assert {r["id"]: len(r["conversations"]) for r in found} == told()
    red = 0
    for record in found:
        turns = record["conversations"]
        assert_in_turn(turns, "user", "assistant")
        said = [turn["value"] for turn in turns]
        start = re.match(r"Picture 1: <img>([^<>]+)</img>\n(?!\s)", said[0])
        image = opened(start[1])
        assert "".join(said).count("<img>") == 1 and "<image>" not in "".join(said)
        assert not re.search(r"<\|im_|<\|endoftext", "".join(said))
        marks = re.findall(r"</?(?:ref|box|img)>", "".join(said))
        assert [m.strip("</>") for m in marks[::2]] == [m.strip("</>") for m in marks[1::2]]
        boxes = [tuple(map(int, b)) for b in re.findall(r"<box>\((\d+),(\d+)\),\((\d+),(\d+)\)</box>", "".join(said))]
        assert "".join(said).count("<box>") == len(boxes)
        assert all(0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000 for x1, y1, x2, y2 in boxes)
        if image.size in (WIDE, TALL, SQUARE):
            red += 1
            assert said[1].startswith("It is <ref>the box</ref><box>(")
            box = tuple(tick * side / 1000 for tick, side in zip(boxes[0], image.size * 2, strict=True))
            assert is_red(image, box, 0.6)
    assert red == 3


# -- MiniGPT-4 and InstructBLIP ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", ["files", "shards"])
def test_minigpt4(exported, images):
    out = exported("minigpt4", images=images)
    found = json.loads((out / "filter_cap.json").read_text())
    assert set(found) == {"annotations"}
    told_of = {pair.mark: pair for pair in PAIRS}
    for annotation in found["annotations"]:
        assert set(annotation) == {"image_id", "caption"}
        pair = told_of[re.search(r"mark-\d{4}", annotation["caption"])[0]]
        if images == "files":
            image = opened(out, "images", f"{annotation['image_id']}.jpg")
            assert np.array_equal(image, Image.open(io.BytesIO(pair.image)).convert("RGB"))
        else:
            with tarfile.open(out / "00000.tar") as tar:
                assert f"{annotation['image_id']}.txt" in tar.getnames()
    assert len(found["annotations"]) == 4  # of odd pairs there is no detail


def test_instructblip(exported):
    out = exported("instructblip")
    found = records(out, "instructblip.json")
    assert len({r["question_id"] for r in found}) == len(found)
    without = [number for name, number in told().items() if not name.endswith("grounding")]
    assert len(found) == sum(without) // 2
    for record in found:
        assert set(record) == {"question_id", "image", "question", "answer", "dataset", "dialog"}
        assert opened(out, record["image"])
        assert record["question"] and "<image>" not in record["question"]
        assert len(record["answer"]) == 1 and record["answer"][0] and record["dataset"] == "vqa"
    later = [r for r in found if r["question"] == "And where?"]
    assert len(later) == 7 and all(r["dialog"].startswith("q: What is this? a: It is the thing") for r in later)
    assert {r["dialog"] for r in found if r["question"] != "And where?"} == {""}


def test_a_conversation_that_mentions_a_box_it_does_not_have_is_told_of(tmp_path):
    turns = (Turn("user", "Where?"), Turn("assistant", "[There](box:3)."))
    pair = Pair(0, 0, instructions=(Instruction("grounding", turns, (), "offline"),))
    built = build(str(tmp_path / "data"), [pair])
    with pytest.raises(StoreError, match=f"the grounding of the pair {pair.uid} cannot be written"):
        export(built.snapshot, str(tmp_path / "out"), "llava")
    assert not (tmp_path / "out" / "manifest.json").exists()
