"""Open-vocabulary detection: boxes of what a list of labels names, by OWLv2 and by Grounding DINO.

What an image gets does not depend, to the last bit, on which other images or labels are measured with it: images are
encoded in passes of one fixed size or alone, and each image meets its own labels only (see `pairmill.passes`
for why the size of a pass matters).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from captioners.boxes.checkpoints import BoxCheckpoint
from pairmill.blip import CPU_TOKENS
from pairmill.boxes import Box
from pairmill.errors import ConfigError
from pairmill.passes import in_passes, padded

if TYPE_CHECKING:
    import torch
    from PIL import Image

QUERY = "a photo of a {}"
"""What OWLv2 is asked for a label: CLIP's plainest prompt, as in the examples of transformers."""
MAX_ASPECT = 8
"""Longer over shorter side of what Grounding DINO is shown: thinner images are padded. Of a very thin one (50 to 1, at
1333 pixels) it would have fewer patches than queries, and fail."""
MAX_QUERIES = 20_000
"""Vectors of queries that are remembered, before all of them are forgotten."""
TEXT_ROWS = 8
"""Queries of each forward pass of OWLv2's text model."""


class Detector(ABC):
    """Finds boxes with one checkpoint."""

    source: str
    """The column ``source`` of its boxes."""

    def __init__(self, checkpoint: BoxCheckpoint, threshold: float) -> None:
        self._checkpoint = checkpoint
        self._threshold = threshold

    @abstractmethod
    def detect(self, images: Sequence[Image.Image], labels: Sequence[Sequence[str]]) -> list[list[Box]]:
        """The boxes of each image's labels whose score is at least the threshold, in pixels of the image, in the
        order of the model's outputs. They may overlap and leave the image. An image without labels is not looked at."""

    def _boxes(self, rows: Sequence[Sequence[float]], scores: Sequence[float], labels: Sequence[str]) -> list[Box]:
        return [
            Box(label, x1, y1, x2, y2, score, self.source)
            for (x1, y1, x2, y2), score, label in zip(rows, scores, labels, strict=True)
        ]


def detector_of(checkpoint: BoxCheckpoint, threshold: float, text_threshold: float, batch: int) -> Detector:
    """What detects with a checkpoint.

    Args:
        checkpoint: the model.
        threshold: least score of a box.
        text_threshold: Grounding DINO: least score of each word of a label for a box.
        batch: images a forward pass of OWLv2; on a CPU an upper bound.
    """
    if checkpoint.kind == "owlv2":
        return Owlv2Detector(checkpoint, threshold, batch)
    return GroundingDinoDetector(checkpoint, threshold, text_threshold)


class Owlv2Detector(Detector):
    """OWLv2: one box a patch of the image, each with the label whose query fits it best. The image is padded to a
    square at its right and bottom, so boxes are fractions of its longer side and can lie in the padding."""

    source = "owlv2"

    def __init__(self, checkpoint: BoxCheckpoint, threshold: float, batch: int) -> None:
        super().__init__(checkpoint, threshold)
        vision = checkpoint.model.config.vision_config
        tokens = (vision.image_size // vision.patch_size) ** 2
        self._rows = batch if checkpoint.device != "cpu" else max(1, min(batch, CPU_TOKENS // tokens))
        self._queries: dict[str, torch.Tensor] = {}

    def detect(self, images: Sequence[Image.Image], labels: Sequence[Sequence[str]]) -> list[list[Box]]:
        """As `Detector.detect`."""
        self._embed([label for row in labels for label in row])
        wanted = [n for n, row in enumerate(labels) if row]
        chunks = [wanted[start : start + self._rows] for start in range(0, len(wanted), self._rows)]

        def look(chunk: list[int]) -> list[list[Box]]:
            import torch

            model = self._checkpoint.model
            prepared = self._checkpoint.inputs([images[n] for n in chunk])
            pixels = padded(torch.cat([one["pixel_values"] for one in prepared]), self._rows)
            grid, _ = model.image_embedder(pixel_values=pixels)
            patches = grid.flatten(1, 2)
            boxes = model.box_predictor(patches, grid).float()
            return [self._best(patches[n], boxes[n], labels[row], images[row]) for n, row in enumerate(chunk)]

        found: list[list[Box]] = [[] for _ in images]
        for chunk, rows in zip(chunks, in_passes(look, chunks, self._checkpoint.device), strict=True):
            for row, boxes in zip(chunk, rows, strict=True):
                found[row] = boxes
        return found

    def _embed(self, labels: Sequence[str]) -> None:
        """Fill `_queries`: unit vectors of the labels' queries."""
        if len(self._queries) > MAX_QUERIES:
            self._queries.clear()
        new = [label for label in dict.fromkeys(labels) if label not in self._queries]
        starts = [new[start : start + TEXT_ROWS] for start in range(0, len(new), TEXT_ROWS)]
        checkpoint = self._checkpoint
        length = checkpoint.model.config.text_config.max_position_embeddings

        def encode(chunk: list[str]) -> torch.Tensor:
            texts = [QUERY.format(label) for label in chunk]
            asked = checkpoint.tokenizer(
                texts + texts[:1] * (TEXT_ROWS - len(texts)),
                padding="max_length",
                truncation=True,
                max_length=length,
                return_tensors="pt",
            ).to(checkpoint.device)
            ids, mask = asked["input_ids"], asked["attention_mask"]
            vectors = checkpoint.model.owlv2.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
            return (vectors / vectors.norm(dim=-1, keepdim=True))[: len(chunk)]

        for chunk, vectors in zip(starts, in_passes(encode, starts, checkpoint.device), strict=True):
            self._queries |= dict(zip(chunk, vectors, strict=True))

    def _best(self, patches: torch.Tensor, boxes: torch.Tensor, labels: Sequence[str], image: Image.Image) -> list[Box]:
        """The boxes of one image: patches of shape (patches, width), boxes (patches, 4) as centre and size."""
        import torch

        queries = torch.stack([self._queries[label] for label in labels])
        logits, _ = self._checkpoint.model.class_predictor(patches[None], queries[None])
        scores, best = logits[0].float().sigmoid().max(dim=-1)
        kept = (scores >= self._threshold).nonzero()[:, 0]
        corners = _corners(boxes[kept]) * max(image.size)
        return self._boxes(corners.tolist(), scores[kept].tolist(), [labels[n] for n in best[kept].tolist()])


@dataclass(frozen=True)
class Prompt:
    """Some labels as Grounding DINO reads them."""

    ids: Any
    """Token ids, of shape (1, tokens)."""
    words: list[list[list[int]]]
    """Of each label, of each of its words: the positions of its tokens."""
    labels: list[str]
    """The labels as asked for."""


class GroundingDinoDetector(Detector):
    """Grounding DINO: the labels of an image are one text, in lower case, each ended by a dot, and image and text are
    encoded together; so each image is measured alone.

    A box has a score for each token of the text; its own is the best of them. Its label is the one with the best token
    among those each of whose words scores `text_threshold` at least: so "hot dog" is not the label of a dog, where
    transformers' post-processing strings together whatever tokens pass. A box without such a label is left out. Labels
    that do not fit into one text are asked for in further ones.
    """

    source = "grounding_dino"

    def __init__(self, checkpoint: BoxCheckpoint, threshold: float, text_threshold: float) -> None:
        super().__init__(checkpoint, threshold)
        self._text_threshold = text_threshold
        self._longest = checkpoint.model.config.max_text_len
        if not checkpoint.tokenizer.is_fast:
            raise ConfigError("models.detector: its tokenizer does not tell where words are; add its tokenizer.json")

    def detect(self, images: Sequence[Image.Image], labels: Sequence[Sequence[str]]) -> list[list[Box]]:
        """As `Detector.detect`."""

        def look(row: int) -> list[Box]:
            prompts = self.prompts(labels[row])
            if not prompts:
                return []
            image = _not_too_thin(images[row])
            (inputs,) = self._checkpoint.inputs([image])
            return [box for prompt in prompts for box in self._found(prompt, inputs, image)]

        return in_passes(look, range(len(images)), self._checkpoint.device)

    def prompts(self, labels: Sequence[str]) -> list[Prompt]:
        """The texts that ask for labels, in order."""
        read = [(label, " ".join(re.sub(r"[.?\s]+", " ", label).split()).lower()) for label in labels]
        found: list[Prompt] = []
        some: list[tuple[str, str]] = []
        for pair in (pair for pair in read if pair[1]):
            if some and len(self._tokens([*some, pair])["input_ids"]) > self._longest:
                found.append(self._prompt(some))
                some = []
            some.append(pair)
        return [*found, self._prompt(some)] if some else found

    def _tokens(self, pairs: Sequence[tuple[str, str]]) -> Any:
        text = "".join(f"{text}. " for _, text in pairs).strip()
        return self._checkpoint.tokenizer(text, return_offsets_mapping=True)

    def _prompt(self, pairs: Sequence[tuple[str, str]]) -> Prompt:
        import torch

        tokens = self._tokens(pairs)
        ids = tokens["input_ids"][: self._longest]
        words, at = [], 0
        for _, text in pairs:
            spans = [(at + word.start(), at + word.end()) for word in re.finditer(r"\S+", text)]
            offsets = tokens["offset_mapping"][: len(ids)]
            words.append([[n for n, (a, b) in enumerate(offsets) if start <= a < b <= end] for start, end in spans])
            at += len(text) + 2
        place = self._checkpoint.device
        return Prompt(torch.tensor([ids], device=place), words, [label for label, _ in pairs])

    def _found(self, prompt: Prompt, inputs: dict[str, Any], image: Image.Image) -> list[Box]:
        """The boxes of one text."""
        import torch

        output = self._checkpoint.model(
            **inputs,
            input_ids=prompt.ids,
            attention_mask=torch.ones_like(prompt.ids),
            token_type_ids=torch.zeros_like(prompt.ids),
        )
        tokens = output.logits[0].float().sigmoid()
        scores = tokens.max(dim=-1).values
        kept = (scores >= self._threshold).nonzero()[:, 0]
        size = torch.tensor([*image.size, *image.size], device=tokens.device)
        corners = (_corners(output.pred_boxes[0].float()[kept]) * size).tolist()
        rows, labels = [], []
        for row, of_tokens in enumerate(tokens[kept].tolist()):
            label = label_of(prompt, of_tokens, self._text_threshold)
            if label is not None:
                rows.append(row)
                labels.append(label)
        return self._boxes([corners[row] for row in rows], [float(scores[kept[row]]) for row in rows], labels)


def label_of(prompt: Prompt, scores: Sequence[float], text_threshold: float) -> str | None:
    """The label of a box with these scores of the text's tokens: see `GroundingDinoDetector`."""
    best, found = -1.0, None
    for label, words in zip(prompt.labels, prompt.words, strict=True):
        of_words = [max((scores[n] for n in word), default=0.0) for word in words]
        if all(score >= text_threshold for score in of_words) and max(of_words) > best:
            best, found = max(of_words), label
    return found


def _not_too_thin(image: Image.Image) -> Image.Image:
    """The image, padded with black at its right or bottom up to `MAX_ASPECT`."""
    from PIL import Image

    least = -(-max(image.size) // MAX_ASPECT)
    if min(image.size) >= least:
        return image
    padded_image = Image.new("RGB", (max(image.width, least), max(image.height, least)))
    padded_image.paste(image)
    return padded_image


def _corners(boxes: torch.Tensor) -> torch.Tensor:
    """(x, y, width, height) around the centre as (x1, y1, x2, y2)."""
    import torch

    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)
