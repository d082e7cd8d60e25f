"""Detection by tiny real OWLv2 and Grounding DINO checkpoints, against transformers' own processors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captioners.boxes import box_steps, detectors
from captioners.boxes.checkpoints import load_detector
from captioners.boxes.detect import MAX_LABELS, Detections, chosen, suppressed
from captioners.boxes.detectors import MAX_ASPECT, QUERY, Detector, GroundingDinoDetector, Prompt, detector_of, label_of
from pairmill.boxes import Box
from pairmill.errors import ConfigError
from pairmill.models import ModelRef
from pairmill.stage import Batch, ErrorBudget, apply
from schemas import fields
from schemas.config import Boxes, RunConfig
from tests.blip_models import library, write_blip
from tests.captioners.boxes.conftest import folder, stored

KINDS = ["owlv2", "grounding_dino"]
LABELS = [
    ["dog", "hot dog", "traffic light"],
    ["cat"],
    ["person", "tree"],
    ["kite", "bird", "cup"],
    ["horse", "xylophone"],
    ["red ball", "table", "man"],
]


def detector(ref: ModelRef, threshold: float, text_threshold: float = 0.0, batch: int = 4) -> Detector:
    return detector_of(load_detector(ref, "cpu"), threshold, text_threshold, batch)


def straight(kind: str, ref: ModelRef, image: Image.Image, labels: list[str], threshold: float) -> list[tuple]:
    """(label, box, score) by transformers' own model, processor and post-processing, as its examples do it; of
    Grounding DINO the label is the box's best token, which a text threshold just below its score gives."""
    import torch

    transformers = library()
    files = folder(ref)
    images = transformers.AutoImageProcessor.from_pretrained(files, backend="pil")
    tokenizer = transformers.AutoTokenizer.from_pretrained(files)
    name = "Owlv2" if kind == "owlv2" else "GroundingDino"
    model = getattr(transformers, f"{name}ForObjectDetection").from_pretrained(files).eval()
    processor = getattr(transformers, f"{name}Processor")(images, tokenizer)
    how = {"threshold": threshold, "target_sizes": [(image.height, image.width)]}
    prompts = [QUERY.format(label) for label in labels] if kind == "owlv2" else labels
    with torch.inference_mode():
        output = model(**processor(text=[prompts], images=[image], return_tensors="pt"))
    if kind == "owlv2":
        (found,) = processor.post_process_grounded_object_detection(output, text_labels=[labels], **how)
        words = found["text_labels"]
    else:
        (found,) = processor.post_process_grounded_object_detection(output, **how)
        words = [
            processor.post_process_grounded_object_detection(output, text_threshold=float(score) - 1e-6, **how)[0][
                "text_labels"
            ][n]
            for n, score in enumerate(found["scores"])
        ]
    return list(zip(words, found["boxes"].tolist(), found["scores"].tolist(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_are_those_of_transformers_own_post_processing(checkpoints, images, kind):
    ref = checkpoints[kind]
    wide = [n for n, image in enumerate(images) if max(image.size) <= MAX_ASPECT * min(image.size)]
    least = 0.4 if kind == "owlv2" else 0.6
    found = detector(ref, least).detect([images[n] for n in wide], [LABELS[n] for n in wide])
    named = 0
    for n, ours in zip(wide, found, strict=True):
        theirs = straight(kind, ref, images[n], LABELS[n], least)
        assert len(ours) == len(theirs) > 0
        for box, (label, corners, score) in zip(ours, theirs, strict=True):
            assert box.xyxy == pytest.approx(corners, abs=1e-3) and box.score == pytest.approx(score, abs=1e-5)
            assert box.source == kind
            if kind == "owlv2":
                assert box.label == label
                named += 1
            elif label in LABELS[n] or any(label in asked.split() for asked in LABELS[n]):  # and not "[SEP]" or "##x"
                assert label in box.label.split()
                named += 1
    assert named > 10


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_image_gets_does_not_depend_on_its_neighbours(checkpoints, images, kind, monkeypatch):
    one = detector(checkpoints[kind], 0.5, batch=4)
    together = one.detect(images, LABELS)
    assert sum(map(len, together)) > 50
    assert one.detect(images[::-1], LABELS[::-1]) == together[::-1]
    assert [one.detect([image], [row])[0] for image, row in zip(images, LABELS, strict=True)] == together
    assert detector(checkpoints[kind], 0.5, batch=4).detect(images[3:], LABELS[3:]) == together[3:]
    monkeypatch.setattr(detectors, "MAX_QUERIES", 2)
    assert one.detect(images, LABELS) == together
    with_more = detector(checkpoints[kind], 0.5, batch=4)
    assert with_more.detect(images[:2], [LABELS[0], LABELS[5]])[0] == together[0]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_looked_for_where_there_are_no_labels(checkpoints, images, kind):
    found = detector(checkpoints[kind], 0.0).detect(images[:3], [[], ["dog"], []])
    assert found[0] == found[2] == [] and found[1]
    assert detector(checkpoints[kind], 0.0).detect([], []) == []


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(checkpoints, images, kind):
    loaded = load_detector(checkpoints[kind], "cpu", "bf16")
    found = detector_of(loaded, 0.0, 0.0, 4).detect(images[:1], LABELS[:1])
    exact = detector(checkpoints[kind], 0.0).detect(images[:1], LABELS[:1])
    assert len(found[0]) == len(exact[0])
    scores = [sorted(box.score for box in boxes[0]) for boxes in (found, exact)]
    assert scores[0] == pytest.approx(scores[1], abs=0.1)


# -- Grounding DINO's texts -------------------------------------------------------------------------------------------


def grounding_dino(checkpoints: dict[str, ModelRef]) -> GroundingDinoDetector:
    found = detector(checkpoints["grounding_dino"], 0.5)
    assert isinstance(found, GroundingDinoDetector)
    return found


def test_labels_that_do_not_fit_into_one_text_are_asked_for_in_further_ones(checkpoints):
    one = grounding_dino(checkpoints)
    labels = ["Hot Dog", "St. Bernard?", "  red \n ball", "...", "xylophone", *(["traffic light", "tree", "cat"] * 3)]
    prompts = one.prompts(labels)
    assert len(prompts) > 1 and [label for p in prompts for label in p.labels] == [x for x in labels if x != "..."]
    tokenizer = one._checkpoint.tokenizer

    def pieces(ids: Any) -> list[str]:
        return tokenizer.convert_ids_to_tokens(list(ids))

    texts = []
    for prompt in prompts:
        ids = prompt.ids[0].tolist()
        assert len(ids) <= 24 and (ids[0], ids[-1]) == (101, 102)
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
        for label, words in zip(prompt.labels, prompt.words, strict=True):
            said = ["".join(p.removeprefix("##") for p in pieces(ids[n] for n in word)) for word in words]
            assert said == label.lower().replace(".", "").replace("?", "").split()
    assert texts[0].startswith("hot dog . ")
    assert one.prompts(["...", " "]) == []


def test_a_label_longer_than_the_text_is_no_boxes_label(checkpoints, images):
    one = grounding_dino(checkpoints)
    label = " ".join(["xylophone"] * 30)
    (prompt,) = one.prompts([label])
    assert prompt.ids.shape[1] == 24 and prompt.words[0][-1] == []
    assert detector(checkpoints["grounding_dino"], 0.1, 0.01).detect(images[:1], [[label]]) == [[]]


def test_each_word_of_a_label_must_score():
    prompt = Prompt(None, [[[1], [2]], [[4]], [[6, 7], [8]]], ["hot dog", "dog", "traffic light"])
    assert (
        label_of(prompt, [0.9, 0.1, 0.8, 0.9, 0.7, 0.9, 0.0, 0.0, 0.0], 0.25) == "dog"
    )  # "dog" of "hot dog" does not do
    assert label_of(prompt, [0.9, 0.3, 0.8, 0.9, 0.7, 0.9, 0.0, 0.0, 0.0], 0.25) == "hot dog"
    assert label_of(prompt, [0.9, 0.1, 0.8, 0.9, 0.2, 0.9, 0.1, 0.3, 0.3], 0.25) == "traffic light"
    assert label_of(prompt, [0.9, 0.1, 0.8, 0.9, 0.2, 0.9, 0.3, 0.3, 0.2], 0.25) is None


# -- which detections are kept ----------------------------------------------------------------------------------------

CORNERS = st.tuples(*[st.integers(-20, 120)] * 4, st.sampled_from("ab"), st.sampled_from([0.1, 0.3, 0.5, 0.9]))


@given(st.lists(CORNERS, max_size=12), st.sampled_from([0.3, 0.7, 1.0]), st.integers(1, 12))
def test_kept_detections_lie_in_the_image_and_do_not_overlap(rows, overlap, most):
    boxes = [Box(label, *corners, score=score) for *corners, label, score in rows]
    kept = chosen(boxes, 100, 80, Boxes(overlap=overlap, most=most, min_side=4))
    assert len(kept) <= most
    assert [b.score for b in kept] == sorted((b.score for b in kept), reverse=True)
    good = [b.clipped(100, 80) for b in boxes if b.refusal(100, 80, 4) is None]
    for n, box in enumerate(kept):
        assert box in good and box.refusal(100, 80, 4) is None and box.clipped(100, 80) == box
        assert all(box.iou(other) < overlap for other in kept[:n] if other.label == box.label)
    if len(kept) < most:  # each that is not kept is one with a kept one that is as good
        for box in good:
            assert box in kept or any(
                box.label == k.label and box.iou(k) >= overlap - 1e-9 and k.score >= box.score for k in kept
            )
    assert chosen(boxes[::-1], 100, 80, Boxes(overlap=overlap, most=most, min_side=4)) == kept


def test_suppression_of_many_boxes_is_quick():
    boxes = [Box("a", n % 60, n // 60, n % 60 + 50, n // 60 + 50) for n in range(3600)]
    assert suppressed(boxes, 0.7, 50) == suppressed(boxes, 0.7, 3600)[:50]
    assert suppressed([], 0.7, 50) == []


# -- the stage --------------------------------------------------------------------------------------------------------


def batch(stage: Detections, images: list[Image.Image | None], texts: list[Any], **more: list[Any]) -> Batch:
    count = len(images)
    known = {f.name: f.type for f in vars(fields).values() if isinstance(f, pa.Field)}
    columns = {
        "image": [stored(image) for image in images],
        "texts": [[{"text": t, "source": "web"} for t in row] if row is not None else None for row in texts],
        "regions": [None] * count,
        "crowded": [None] * count,
        "captions": [None] * count,
        **more,
    }
    arrays = {name: pa.array(columns[name], known[name]) for name in stage.reads}
    return Batch(pa.table({"uid": [f"u{n}" for n in range(count)], **arrays}))


TEXTS = [["A dog and a cat."], ["two hot dogs", None], None, [], ["a tree"], ["a person on a table", "a man"]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_stage_finds_what_the_texts_name_whatever_the_batch(checkpoints, images, kind):
    stage = Detections(checkpoints[kind], Boxes(threshold=0.5, text_threshold=0.1, min_side=0.2), device="cpu", batch=4)
    kernel = stage.open()
    rows = batch(stage, [*images[:5], None], TEXTS)
    found = apply(stage, kernel, rows, ErrorBudget(0, 0)).to_pylist()
    assert found[2]["detections"] == found[3]["detections"] == [] and found[5]["detections"] is None
    assert all(row["reason"] is None for row in found)
    labels = [{box["label"] for box in row["detections"] or ()} for row in found]
    assert labels[0] <= {"dog", "cat"} and labels[1] <= {"hot dog"} and labels[0] and labels[4] == {"tree"}
    for row, image in zip(found, images, strict=False):
        for box in row["detections"] or ():
            assert 0 <= box["x1"] < box["x2"] <= image.width and 0 <= box["y1"] < box["y2"] <= image.height
            assert box["score"] >= 0.5 and box["source"] == kind
    again = [apply(stage, kernel, rows.slice(n, 1), ErrorBudget(0, 0)).to_pylist()[0] for n in range(6)]
    assert again == found


def test_what_is_looked_for(checkpoints):
    stage = Detections(checkpoints["owlv2"], Boxes(labels=("traffic light", " Dog ", "")), captions=True)
    row = {
        "texts": [{"text": "Two men with kites near the street"}, {"text": None}],
        "captions": [{"text": "a puppy and a dog"}, {"text": None}],
        "regions": None,
        "crowded": None,
    }
    assert stage.labels(row) == ["traffic light", "Dog", "man", "kite", "puppy"]
    drawn = row | {"regions": [{"label": "person"}, {"label": "Traffic Light"}], "crowded": ["dog"]}
    assert stage.labels(drawn) == ["kite"]
    many = row | {"texts": [{"text": " and ".join(f"a blor{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(90))}]}
    assert len(stage.labels(many)) == MAX_LABELS
    assert stage.reads[-1] == "captions" and "captions" not in Detections(checkpoints["owlv2"], Boxes()).reads


def test_identity(checkpoints, tmp_path):
    stage = Detections(checkpoints["owlv2"], Boxes())
    assert stage.fingerprint() == Detections(checkpoints["owlv2"], Boxes(), device="cpu", batch=3).fingerprint()
    other = {
        Detections(checkpoints["owlv2"], Boxes(threshold=0.2)).fingerprint(),
        Detections(checkpoints["owlv2"], Boxes(labels=("dog",))).fingerprint(),
        Detections(checkpoints["grounding_dino"], Boxes()).fingerprint(),
        stage.fingerprint(),
    }
    assert len(other) == 4
    assert str(tmp_path.parent) not in json.dumps(stage.parameters())


def config(**models: Any) -> RunConfig:
    return RunConfig.model_validate({"dataset": "d", "source": {"kind": "url_table", "path": "x"}, "models": models})


def test_steps_of_a_config(checkpoints):
    owl, sam = ({"path": str(folder(checkpoints[kind]))} for kind in ("owlv2", "sam"))
    assert [s.name for s in box_steps(config(), captions=True)] == ["regions"]
    steps = box_steps(config(detector=owl, segmenter=sam, device="cpu", batch=7), captions=False)
    assert [s.name for s in steps] == ["regions", "detections", "masks"]
    assert isinstance(steps[1], Detections) and not steps[1].captions and steps[1].batch == 7
    assert len({s.resources for s in steps}) == 1  # one group, so one GPU
    assert [s.name for s in box_steps(config(segmenter=sam), captions=False)] == ["regions", "masks"]
    assert (
        "detections" in steps[2].reads and "detections" not in box_steps(config(segmenter=sam), captions=False)[1].reads
    )
    for key in ("detector", "segmenter"):
        with pytest.raises(ConfigError, match=rf"models\.{key}.*path"):
            box_steps(config(**{key: "tiny"}), captions=False)


# -- checkpoints that do not fit --------------------------------------------------------------------------------------


def copied(ref: ModelRef, to: Path) -> Path:
    shutil.copytree(folder(ref), to)
    return to


def weights(path: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def refused(ref: ModelRef) -> str:
    with pytest.raises(ConfigError, match=r"models\.detector") as error:
        load_detector(ref, "cpu")
    return str(error.value)


def test_what_is_no_detector_says_so(checkpoints, tmp_path):
    assert "does not exist" in refused(ModelRef(path=str(tmp_path / "nowhere")))
    assert "names no revision" in refused(ModelRef("google/owlv2-base-patch16-ensemble"))
    assert "which moves" in refused(ModelRef("google/owlv2-base-patch16-ensemble", revision="main"))
    said = refused(checkpoints["sam"])
    assert "SamModel" in said and "needs an open-vocabulary detector" in said
    assert "a captioner" in refused(ModelRef(path=str(write_blip(tmp_path / "blip", "captioner"))))
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(ModelRef(path=str(tmp_path / "empty")))


@pytest.mark.parametrize("kind", KINDS)
def test_incomplete_checkpoints_say_what_is_missing(checkpoints, tmp_path, kind):
    head = "class_head.dense0.weight" if kind == "owlv2" else "model.text_projection.weight"
    path = copied(checkpoints[kind], tmp_path / "part")
    weights(path, lambda tensors: tensors.pop(head))
    assert f"1 missing (such as {head})" in refused(ModelRef(path=str(path)))
    path = copied(checkpoints[kind], tmp_path / "torn")
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:5000])
    assert "damaged or cut off" in refused(ModelRef(path=str(path)))
    for name, told in (("tokenizer.json", "tokenizer"), ("preprocessor_config.json", "cannot be loaded")):
        path = copied(checkpoints[kind], tmp_path / name)
        (path / name).unlink()
        assert told in refused(ModelRef(path=str(path)))
    path = copied(checkpoints[kind], tmp_path / "pickle")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    assert "no .safetensors file" in refused(ModelRef(path=str(path)))


def test_constants_that_published_checkpoints_store_are_no_fault(checkpoints, tmp_path):
    import torch

    path = copied(checkpoints["grounding_dino"], tmp_path / "published")
    name = "model.backbone.conv_encoder.model.encoder.layers.0.blocks.0.attention.self.relative_position_index"
    weights(path, lambda tensors: tensors.update({name: torch.zeros(16, 16, dtype=torch.long)}))
    assert load_detector(ModelRef(path=str(path)), "cpu").kind == "grounding-dino"
    path = copied(checkpoints["owlv2"], tmp_path / "older")
    name = "owlv2.text_model.embeddings.position_ids"
    weights(path, lambda tensors: tensors.update({name: torch.arange(16)[None]}))
    assert load_detector(ModelRef(path=str(path)), "cpu").kind == "owlv2"
