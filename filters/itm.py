"""Whether image and text match: the probability of BLIP's and BLIP-2's image-text matching head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from captioners.text import prepare_text
from filters.clip_score import scatter
from filters.image_rules import missing_image, with_image
from pairmill.blip import CPU_TEXTS, Checkpoint, load_matcher
from pairmill.blip_text import SeenImages
from pairmill.errors import ConfigError
from pairmill.models import ModelRef, model_resources
from pairmill.passes import BatchSize, Passes, finite, rows_a_pass, side_by_side
from pairmill.stage import Batch, Kernel, Resources, Stage
from pairmill.weights import tiny_itm_dir
from schemas import fields
from schemas.config import Models

if TYPE_CHECKING:
    import torch
    from PIL import Image

MAX_TOKENS = 35
"""Tokens of a text that are read, [CLS] and [SEP] included: BLIP's, in training and in retrieval."""

LENGTHS = (12, 16, 24)
"""Tokens of a text pass, where its texts need no more; else `max_tokens`."""

IMAGES = 32
"""Images whose features are in memory at a time, at least."""


@dataclass(frozen=True)
class ItmScore(Stage):
    """The probability, 0 to 1, that the image matches each of its texts and, with `captions`, each of its captions.

    ``softmax(logits)[1]`` of the matching head (BLIP, section 3.2 and the filter of CapFilt, section 3.3): no cosine is
    added. BLIP-2 averages the logits over its queries first (BLIP-2, section 3.2). The image is encoded once for all
    its texts.

    A row without image is dropped; a null text has a null score; a null or empty list of texts has null scores.
    Results do not depend on the number of rows a kernel call has or on threads, to the last bit (`pairmill.passes`).
    """

    name = "itm"

    model: ModelRef
    captions: bool = False
    """Score `schemas.fields.CAPTIONS`, too."""
    enc_token: bool | None = None
    """What a text begins with for BLIP: [ENC], as in its training and its retrieval code (true), or [CLS], as in
    transformers' processor and BLIP's demo (false). None: [ENC] where the model has one, which the checkpoints of
    Salesforce do, although their tokenizers do not name it. BLIP-2 has none."""
    prepare: bool = True
    """Texts are read as `captioners.text.prepare_text` leaves them; false: as they are."""
    max_tokens: int = MAX_TOKENS
    """Longer texts are cut off."""
    precision: str = "fp32"
    device: str = field(default="auto", metadata={"identity": False})
    batch: BatchSize = field(default="auto", metadata={"identity": False})
    """Rows a forward pass (`pairmill.passes.rows_a_pass`)."""

    resources: Resources = field(default=Resources(rows=256, actor=True), metadata={"identity": False})

    @property
    def reads(self) -> tuple[str, ...]:
        """Images and texts, and captions where they are scored."""
        names = (fields.IMAGE.name, fields.TEXTS.name)
        return (*names, fields.CAPTIONS.name) if self.captions else names

    @property
    def writes(self) -> tuple[pa.Field, ...]:
        """Probabilities of the texts, of the first text, and of the captions where they are scored."""
        scores = (fields.ITM_SCORES, fields.ITM_SCORE)
        return (*scores, fields.CAPTION_ITM_SCORES) if self.captions else scores

    @classmethod
    def of(cls, models: Models, captions: bool = False) -> ItmScore:
        """The stage that a config asks for."""
        return cls(
            ModelRef.of(models.itm, tiny_itm_dir),
            captions,
            models.itm.enc_token,
            precision=models.precision,
            device=models.device,
            batch=models.batch,
            resources=model_resources(models),
        )

    def open(self) -> Kernel:
        """Load the model.

        Raises:
            ConfigError: the checkpoint does not fit, or has no [ENC] though one is asked for.
        """
        matcher = matcher_of(load_matcher(self.model, self.device, self.precision), self)

        def kernel(batch: Batch) -> pa.Table:
            rows, positions = with_image(batch)
            texts = [[t["text"] for t in row or ()] for row in rows.pylist(fields.TEXTS.name)]
            written: list[list[str | None]] = [[] for _ in texts]
            if self.captions:
                written = [[c["text"] for c in row or ()] for row in rows.pylist(fields.CAPTIONS.name)]
            both = [[*left, *right] for left, right in zip(texts, written, strict=True)]
            scores = matcher.scores(rows.images(), both)
            of_texts = [row[: len(left)] or None for row, left in zip(scores, texts, strict=True)]
            of_captions = [row[len(left) :] or None for row, left in zip(scores, texts, strict=True)]
            values: list[list[Any]] = [of_texts, [row[0] if row else None for row in of_texts], of_captions]
            measured = {
                f.name: scatter(column, positions, len(batch), f)
                for f, column in zip(self.writes, values[: len(self.writes)], strict=True)
            }
            return pa.table(measured | missing_image(len(batch), positions))

        return kernel


def matcher_of(blip: Checkpoint, stage: ItmScore) -> Matcher:
    """What scores with a checkpoint."""
    return BlipMatcher(blip, stage) if blip.family == "blip" else Blip2Matcher(blip, stage)


class Matcher(ABC):
    """Scores texts with one checkpoint: `encode` makes an image's features, `match` reads texts against them."""

    def __init__(self, blip: Checkpoint, stage: ItmScore) -> None:
        self.blip = blip
        self._stage = stage
        self._image_passes, self._text_passes = Passes(blip.device), Passes(blip.device)
        longest = min(stage.max_tokens, self._positions)
        self._lengths = [*(length for length in LENGTHS if length < longest), longest]

    @cached_property
    def image_rows(self) -> int:
        """Images of a forward pass."""
        return self._fitting(self.blip.cpu_images, lambda rows: self.encode(self.blip.blank(rows)))

    @cached_property
    def text_rows(self) -> int:
        """Texts of a forward pass."""
        import torch

        def run(rows: int) -> object:
            ids = torch.full((rows, self._lengths[-1]), self.blip.tokenizer.pad_token_id, device=self.blip.device)
            return self.match(list(self.encode(self.blip.blank(1))) * rows, ids, torch.ones_like(ids, dtype=torch.bool))

        return self._fitting(CPU_TEXTS, run)

    def _fitting(self, on_cpu: int, run: Callable[[int], object]) -> int:
        return rows_a_pass(self._stage.batch, self.blip.device, on_cpu, run, self._stage.resources.gpus or 1.0)

    def scores(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str | None]]) -> list[list[float | None]]:
        """The probability of each of an image's texts; None for a null text. Each image is taken from the sequence in
        the thread that needs it."""
        found: list[list[float | None]] = []
        at_once = max(IMAGES, max(self.image_rows, CPU_TEXTS) * side_by_side(self.blip.device))
        for start in range(0, len(images), at_once):
            some = range(start, min(start + at_once, len(images)))
            found += self._some(images, [(image, texts[image]) for image in some])
        return found

    def _some(
        self, images: Sequence[Image.Image], rows: Sequence[tuple[int, Sequence[str | None]]]
    ) -> list[list[float | None]]:
        def prepare(image: int) -> torch.Tensor:
            return self.blip.pixels.prepare(images[image])

        def encode(pixels: torch.Tensor) -> torch.Tensor:
            return self.encode(self.blip.normalised(pixels))

        flat = [(image, text) for image, row in rows for text in row if text is not None]
        wanted = list(dict.fromkeys(image for image, _ in flat))
        parts = self._image_passes.run(wanted, self.image_rows, encode, prepare, keep=True)
        states = dict(zip(wanted, (state for part in parts for state in part), strict=True))
        scores = iter(self._matched(states, flat))
        return [[None if text is None else next(scores) for text in row] for _, row in rows]

    def _matched(self, states: Mapping[int, torch.Tensor], flat: Sequence[tuple[int, str]]) -> list[float]:
        """Probabilities of texts with their images. Texts run in passes of texts that need as many tokens, at most:
        which pass is theirs depends on their own length alone."""
        import torch

        def match(chunk: list[int]) -> torch.Tensor:
            tokens = [ids[place] for place in chunk]
            padding = self.blip.tokenizer.pad_token_id
            padded = torch.tensor([row + [padding] * (length - len(row)) for row in tokens])
            mask = torch.tensor([[n < len(row) for n in range(length)] for row in tokens])
            of_images = [states[flat[place][0]] for place in chunk]
            logits = self.match(of_images, padded.to(self.blip.device), mask.to(self.blip.device))
            return logits.float().softmax(dim=-1)[:, 1]

        ids = self.tokenized([text for _, text in flat]) if flat else []
        scores = [0.0] * len(flat)
        lengths = [next(length for length in self._lengths if len(row) <= length) for row in ids]
        for length in sorted(set(lengths)):
            places = [place for place, found in enumerate(lengths) if found == length]
            parts = self._text_passes.run(places, self.text_rows, match)
            for place, score in zip(places, finite(torch.cat(parts)).tolist(), strict=True):
                scores[place] = score
        return scores

    def tokenized(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, `max_tokens` at most."""
        read = [prepare_text(text) for text in texts] if self._stage.prepare else texts
        encoded = self.blip.tokenizer(read, truncation=True, max_length=self._lengths[-1])
        return [list(row) for row in encoded["input_ids"]]

    @property
    @abstractmethod
    def _positions(self) -> int:
        """Tokens that the model can read at most."""

    @abstractmethod
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features of shape (images, tokens, width), all that `match` needs of an image."""

    @abstractmethod
    def match(self, states: Sequence[torch.Tensor], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits of shape (rows, 2), no match and match, of texts with their images' features, one for each text.

        Args:
            states: features.
            ids: token ids of shape (rows, tokens).
            mask: true where they are a text's and no padding.
        """


class BlipMatcher(Matcher):
    """BLIP: a text encoder that attends to the image's features; the first token's state goes into the head."""

    def __init__(self, blip: Checkpoint, stage: ItmScore) -> None:
        super().__init__(blip, stage)
        self._first = enc_token(blip, stage.enc_token)

    @property
    def _positions(self) -> int:
        return int(self.blip.model.config.text_config.max_position_embeddings)

    def tokenized(self, texts: list[str]) -> list[list[int]]:
        """As `Matcher.tokenized`, the first token replaced by [ENC] where that is asked for."""
        ids = super().tokenized(texts)
        return ids if self._first is None else [[self._first, *row[1:]] for row in ids]

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """The vision model's last hidden states."""
        return self.blip.model.vision_model(pixel_values=pixels).last_hidden_state

    def match(self, states: Sequence[torch.Tensor], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The head over the first token's state."""
        assert self.blip.text is not None
        read = self.blip.text.read(ids, SeenImages(states), mask=mask)
        return self.blip.model.itm_head(read[:, 0])


def enc_token(blip: Checkpoint, wanted: bool | None) -> int | None:
    """The id that a text begins with instead of [CLS], or None for [CLS] itself.

    BLIP's own code adds [DEC] and [ENC] to BERT's tokens. The published tokenizers are BERT's without them, but the
    embeddings have both rows, [DEC]'s being the start token that config.json names.
    """
    text, tokenizer = blip.model.config.text_config, blip.tokenizer
    known = tokenizer.get_vocab().get("[ENC]")
    if known is None and text.bos_token_id == len(tokenizer) and text.vocab_size == len(tokenizer) + 2:
        known = text.bos_token_id + 1
    if wanted and known is None:
        raise ConfigError("models.itm.enc_token is true, but the checkpoint has no [ENC] token; leave the key out")
    return None if wanted is False else known


class Blip2Matcher(Matcher):
    """BLIP-2: queries and text go through the Q-Former together; the head's logits are averaged over the queries."""

    def __init__(self, blip: Checkpoint, stage: ItmScore) -> None:
        super().__init__(blip, stage)
        if stage.enc_token:
            raise ConfigError("models.itm.enc_token is true, but BLIP-2 has no [ENC] token; leave the key out")

    @property
    def _positions(self) -> int:
        return int(self.blip.model.config.qformer_config.max_position_embeddings)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """The vision model's last hidden states."""
        return self.blip.model.vision_model(pixel_values=pixels).last_hidden_state

    def match(self, states: Sequence[torch.Tensor], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The head over the queries' states, averaged."""
        import torch

        model = self.blip.model
        queries = model.query_tokens.expand(len(ids), -1, -1)
        count = queries.shape[1]
        output = model.qformer(
            query_embeds=model.embeddings(input_ids=ids, query_embeds=queries),
            query_length=count,
            attention_mask=torch.cat([mask.new_ones(len(ids), count), mask], dim=1).long(),
            encoder_hidden_states=torch.stack(list(states)),
        ).last_hidden_state
        return model.itm_head(output[:, :count].to(model.itm_head.weight.dtype)).mean(dim=1)
