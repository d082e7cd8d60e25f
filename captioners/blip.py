"""Captions by BLIP, BLIP-2 and InstructBLIP (transformers)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from captioners.decoding import Decoder
from captioners.sampling import SeededChoice, uniform
from filters.image_rules import missing_image, with_image
from pairmill.blip import CPU_CAPTIONS, Checkpoint, cross_attention_cache, load_captioner
from pairmill.blip_text import SeenImages
from pairmill.errors import ConfigError
from pairmill.models import ModelRef, model_resources
from pairmill.passes import BatchSize, Passes, finite, rows_a_pass, side_by_side
from pairmill.stage import Batch, Kernel, Resources, Stage
from pairmill.weights import tiny_captioner_dir
from schemas import fields
from schemas.config import RunConfig
from schemas.reasons import Reason

if TYPE_CHECKING:
    import torch
    from PIL import Image


IMAGES = 32
"""Images whose features are in memory at a time, at least."""


@dataclass(frozen=True)
class Captions(Stage):
    """Captions of each image, by the checkpoint's family: BLIP, BLIP-2 or InstructBLIP.

    The image is encoded once for all its captions (BLIP-2: the Q-Former, too, and T5's encoder). Nucleus sampling
    (Holtzman et al. 2020, as CapFilt uses it: BLIP, section 4.3) draws each token by a hash of seed, uid, sample and
    step (`captioners.sampling`), so a caption depends on its image, its uid and the parameters only: every forward
    pass has a fixed number of rows and, on a CPU, one thread (`pairmill.passes`). No top-k is applied,
    whatever the checkpoint's generation config says.

    A row without image is dropped. A caption without any text is null with reason `Reason.CAPTION_EMPTY`; captions
    that repeat each other stay.
    """

    name = "captions"
    reads = (fields.IMAGE.name,)
    writes = (fields.CAPTIONS,)

    model: ModelRef
    count: int = 1
    """Captions an image. Sample k is the same for every count, but for the last bits of what it is drawn from."""
    method: Literal["nucleus", "beam", "greedy"] = "nucleus"
    top_p: float = 0.9
    temperature: float = 1.0
    beams: int = 3
    repetition_penalty: float = 1.1
    max_length: int = 20
    """Tokens. BLIP and decoder-only language models: those of the prompt and the start token included, image tokens
    not. T5: those of the answer and the start token; its prompt goes to its encoder."""
    min_length: int = 5
    prompt: str | None = "a picture of "
    """What a caption goes on from; it is no part of the caption. InstructBLIP: the instruction."""
    seed: int = 0
    precision: str = "fp32"
    device: str = field(default="auto", metadata={"identity": False})
    batch: BatchSize = field(default="auto", metadata={"identity": False})
    """Rows a forward pass (`pairmill.passes.rows_a_pass`)."""

    resources: Resources = field(default=Resources(rows=256, actor=True), metadata={"identity": False})

    def __post_init__(self) -> None:
        if self.method == "beam" and self.beams < self.count:
            raise ConfigError(
                f"caption.beams is {self.beams}, but {self.count} captions are wanted; raise it to {self.count}"
            )
        if self.method == "greedy" and self.count > 1:
            raise ConfigError(
                "caption.method greedy writes one caption an image; set caption.count to 1, or use nucleus"
            )
        if self.min_length > self.max_length:
            raise ConfigError(
                f"caption.min_length ({self.min_length}) is above caption.max_length ({self.max_length}); lower it"
            )

    @classmethod
    def of(cls, config: RunConfig) -> Captions:
        """The stage that a config asks for."""
        models, caption = config.models, config.caption
        names = ("count", "method", "top_p", "temperature", "beams", "repetition_penalty", "max_length", "min_length")
        return cls(
            ModelRef.of(models.captioner, tiny_captioner_dir),
            **{name: getattr(caption, name) for name in names},
            prompt=caption.prompt,
            seed=config.seed,
            precision=models.precision,
            device=models.device,
            batch=models.batch,
            resources=model_resources(models),
        )

    def parameters(self) -> dict[str, Any]:
        """Those that the method uses."""
        unused = {
            "nucleus": {"beams"},
            "beam": {"top_p", "temperature", "seed"},
            "greedy": {"top_p", "temperature", "seed", "beams"},
        }[self.method]
        return {name: value for name, value in super().parameters().items() if name not in unused}

    def open(self) -> Kernel:
        """Load the model.

        Raises:
            ConfigError: the checkpoint does not fit, or the prompt leaves no room for a caption.
        """
        writer = writer_of(load_captioner(self.model, self.device, self.precision), self)

        def kernel(batch: Batch) -> pa.Table:
            rows, positions = with_image(batch)
            texts = writer.captions(rows.images(), rows.pylist(fields.UID.name))
            column: list[Any] = [None] * len(batch)
            for position, row in zip(positions, texts, strict=True):
                column[position] = [_entry(text, writer.blip.family) for text in row]
            captions = pa.array(column, fields.CAPTIONS.type)
            return pa.table({fields.CAPTIONS.name: captions} | missing_image(len(batch), positions))

        return kernel


def _entry(text: str, source: str) -> dict[str, str | None]:
    """One caption as `schemas.fields.CAPTIONS` has it."""
    if text:
        return {"text": text, "source": source, "reason": None, "detail": None}
    detail = "the model ended without a word"
    return {"text": None, "source": source, "reason": Reason.CAPTION_EMPTY.value, "detail": detail}


def writer_of(blip: Checkpoint, stage: Captions) -> Writer:
    """What writes with a checkpoint."""
    if blip.family == "blip":
        return BlipWriter(blip, stage)
    encoder = blip.model.language_model.config.is_encoder_decoder
    return T5Writer(blip, stage) if encoder else DecoderWriter(blip, stage)


class Writer(ABC):
    """Writes captions with one checkpoint: `encode` makes an image's features, `generate` goes on from them."""

    def __init__(self, blip: Checkpoint, stage: Captions) -> None:
        self.blip = blip
        self._stage = stage
        self._sequences = stage.beams if stage.method == "beam" else 1
        self._image_passes, self._text_passes = Passes(blip.device), Passes(blip.device)

    @cached_property
    def image_rows(self) -> int:
        """Images of a forward pass."""
        return self._fitting(self._stage.batch, self.blip.cpu_images, lambda rows: self.encode(self.blip.blank(rows)))

    @cached_property
    def tasks(self) -> int:
        """Tasks that are written side by side."""
        batch, width = self._stage.batch, self.samples * self._sequences

        def run(tasks: int) -> object:
            return self.write(list(self.encode(self.blip.blank(1))), [""], [(0, 0)] * tasks)

        limit = batch if batch == "auto" else max(1, batch // width)
        return self._fitting(limit, max(1, CPU_CAPTIONS // width), run)

    def _fitting(self, batch: BatchSize, on_cpu: int, run: Callable[[int], object]) -> int:
        return rows_a_pass(batch, self.blip.device, on_cpu, run, self._stage.resources.gpus or 1.0)

    def captions(self, images: Sequence[Image.Image], uids: Sequence[str]) -> list[list[str]]:
        """``count`` captions of each image, in the order in which they were drawn (beam: best first). Each image is
        taken from the sequence in the thread that needs it."""
        found: list[list[str]] = []
        at_once = max(IMAGES, max(self.image_rows, self.tasks) * side_by_side(self.blip.device))
        for start in range(0, len(images), at_once):
            some = range(start, min(start + at_once, len(images)))
            found += self._some(images, some, uids[start : some.stop])
        return found

    def _some(self, images: Sequence[Image.Image], wanted: range, uids: Sequence[str]) -> list[list[str]]:
        def prepare(number: int) -> torch.Tensor:
            return self.blip.pixels.prepare(images[number])

        def encode(pixels: torch.Tensor) -> torch.Tensor:
            return self.encode(self.blip.normalised(pixels))

        def write(tasks: list[tuple[int, int]]) -> list[list[str]]:
            tokens = self.write(states, uids, tasks).tolist()
            return chunks([self.text(row) for row in tokens], len(tokens) // len(tasks))

        parts = self._image_passes.run(wanted, self.image_rows, encode, prepare, keep=True)
        states = [state for part in parts for state in finite(part)]
        samples = range(0, self._stage.count if self._stage.method == "nucleus" else 1, self.samples)
        tasks = [(image, sample) for image in range(len(wanted)) for sample in samples]
        written = self._text_passes.run(tasks, self.tasks, write)
        texts = iter([some for part in written for some in part])
        return [[text for _ in samples for text in next(texts)][: self._stage.count] for _ in wanted]

    def write(
        self, states: Sequence[torch.Tensor], uids: Sequence[str], tasks: Sequence[tuple[int, int]]
    ) -> torch.Tensor:
        """Token ids of shape (texts, length), as many texts for each of the tasks: an image and its first sample."""
        return self.generate(states, [image for image, _ in tasks], self._options(uids, tasks))

    def _options(self, uids: Sequence[str], tasks: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Keywords of `generate` that say how tokens are chosen."""
        stage = self._stage
        options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": stage.repetition_penalty}
        if stage.method == "beam":
            return options | {"num_beams": stage.beams, "num_return_sequences": stage.count}
        choice = self.choice(uids, tasks)
        return options if choice is None else options | {"logits_processor": [choice]}

    def choice(self, uids: Sequence[str], tasks: Sequence[tuple[int, int]]) -> SeededChoice | None:
        """What draws the tokens of all samples of the tasks; None where the most probable ones are taken."""
        stage = self._stage
        if stage.method != "nucleus":
            return None
        import torch

        rows = [(uids[image], first + n) for image, first in tasks for n in range(self.samples)]
        draws = [[uniform(stage.seed, uid, n, step) for step in range(stage.max_length)] for uid, n in rows]
        drawn = torch.tensor(draws, dtype=torch.float64, device=self.blip.device)
        return SeededChoice(drawn, self.start, stage.top_p, stage.temperature)

    @property
    def samples(self) -> int:
        """Captions that one task writes side by side."""
        return 1

    @property
    @abstractmethod
    def start(self) -> int:
        """Length of what `generate` begins with: the prompt and, where there are some, image tokens."""

    @abstractmethod
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features of shape (images, tokens, width), all that `generate` needs of an image."""

    @abstractmethod
    def generate(self, states: Sequence[torch.Tensor], rows: Sequence[int], options: dict[str, Any]) -> torch.Tensor:
        """Token ids of shape (rows x returned sequences, length), for rows that go on from ``states[row]``."""

    @abstractmethod
    def text(self, tokens: list[int]) -> str:
        """The caption that a row of token ids says, without prompt and special tokens."""

    def _room(self, prompt: int) -> int:
        """Tokens left for a caption after a prompt of so many."""
        if prompt >= self._stage.max_length:
            raise ConfigError(
                f"caption.prompt is {prompt} tokens long and caption.max_length {self._stage.max_length}, those of the "
                "prompt included; shorten the prompt or raise caption.max_length"
            )
        return self._stage.max_length - prompt

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.blip.tokenizer.decode(list(tokens), skip_special_tokens=True))


class BlipWriter(Writer):
    """BLIP: a text decoder that attends to the image's features.

    Beam search is transformers'. The other methods have a loop of their own, which writes what `generate` would: all
    samples of an image go on from one reading of the prompt and share what is kept of the image.
    """

    def __init__(self, blip: Checkpoint, stage: Captions) -> None:
        super().__init__(blip, stage)
        import torch

        text = blip.model.config.text_config
        words = blip.tokenizer(stage.prompt, add_special_tokens=False)["input_ids"] if stage.prompt else []
        self._prompt = torch.tensor([text.bos_token_id, *words], device=blip.device)
        self._said = self._decode(words)
        self._room(self.start)
        if stage.max_length > text.max_position_embeddings:
            raise ConfigError(
                f"caption.max_length is {stage.max_length}, but models.captioner reads {text.max_position_embeddings} "
                "tokens at most; lower it"
            )

    @property
    def samples(self) -> int:
        """All samples of an image; if they are too many for a pass, the same part of them in each of several."""
        if self._stage.method != "nucleus":
            return 1
        count, batch = self._stage.count, self._stage.batch
        most = CPU_CAPTIONS if batch == "auto" else min(batch, CPU_CAPTIONS)
        return -(-count // -(-count // most))

    def write(
        self, states: Sequence[torch.Tensor], uids: Sequence[str], tasks: Sequence[tuple[int, int]]
    ) -> torch.Tensor:
        """As `Writer.write`."""
        if self._stage.method == "beam":
            return super().write(states, uids, tasks)
        text, stage, tower = self.blip.model.config.text_config, self._stage, self.blip.text
        assert tower is not None
        decoder = Decoder(
            tower,
            self.blip.model.text_decoder.cls,
            end=text.sep_token_id,
            padding=text.pad_token_id,
            max_length=stage.max_length,
            min_length=stage.min_length,
            repetition_penalty=stage.repetition_penalty,
        )
        images = SeenImages([states[image] for image, _ in tasks])
        return decoder.write(self._prompt, images, self.samples, self.choice(uids, tasks))

    @property
    def start(self) -> int:
        """Start token and prompt."""
        return len(self._prompt)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """The vision model's last hidden states."""
        return self.blip.model.vision_model(pixel_values=pixels).last_hidden_state

    def generate(self, states: Sequence[torch.Tensor], rows: Sequence[int], options: dict[str, Any]) -> torch.Tensor:
        """By the text decoder's own `generate`, with the image's keys and values computed beforehand."""
        decoder, text = self.blip.model.text_decoder, self.blip.model.config.text_config
        beams = [image for image in rows for _ in range(self._sequences)]
        return decoder.generate(
            input_ids=self._prompt.expand(len(rows), -1),
            encoder_hidden_states=states[0].expand(len(rows), -1, -1),  # says that there are some: see the cache
            past_key_values=cross_attention_cache(decoder.bert.encoder.layer, states, beams),
            eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
            max_length=self._stage.max_length,
            min_length=self._stage.min_length,
            **options,
        )

    def text(self, tokens: list[int]) -> str:
        """As BLIP's own code does, the prompt is cut off the decoded text, not off the tokens."""
        return self._decode(tokens[1:]).removeprefix(self._said).strip()


class QformerWriter(Writer):
    """What BLIP-2 and InstructBLIP share: a Q-Former turns the image into a few tokens of a language model."""

    def __init__(self, blip: Checkpoint, stage: Captions) -> None:
        super().__init__(blip, stage)
        import torch

        prompt = (stage.prompt or "").strip()  # a space at the end would be a token of its own
        words = blip.tokenizer(prompt)["input_ids"] or [blip.model.config.text_config.bos_token_id]
        self._prompt = torch.tensor(words, device=blip.device)
        self._instruction = None
        if blip.qformer_tokenizer is not None:
            encoded = blip.qformer_tokenizer(prompt, return_tensors="pt").to(blip.device)
            self._instruction = encoded["input_ids"]

    def projected(self, pixels: torch.Tensor) -> torch.Tensor:
        """Image tokens of the language model, (images, queries, width). InstructBLIP's Q-Former reads the prompt."""
        if self._instruction is None:
            return self.blip.model.get_image_features(pixels, return_dict=True).pooler_output
        instruction = self._instruction.expand(len(pixels), -1)
        return self.blip.model.get_image_features(pixels, instruction, return_dict=True).pooler_output

    def embedded(self, image: torch.Tensor) -> torch.Tensor:
        """Image tokens with the prompt's embeddings behind them."""
        import torch

        words = self.blip.model.get_input_embeddings()(self._prompt).expand(len(image), -1, -1)
        return torch.cat([image.to(words.dtype), words], dim=1)

    def text(self, tokens: list[int]) -> str:
        """The tokens after the prompt."""
        return self._decode(tokens[self.start :]).strip()


class DecoderWriter(QformerWriter):
    """A language model without encoder (OPT, Vicuna): it goes on from image tokens and prompt."""

    def __init__(self, blip: Checkpoint, stage: Captions) -> None:
        super().__init__(blip, stage)
        self._new = self._room(len(self._prompt))

    @property
    def start(self) -> int:
        """Image tokens and prompt."""
        return int(self.blip.model.config.num_query_tokens) + len(self._prompt)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embeddings of image tokens and prompt."""
        return self.embedded(self.projected(pixels))

    def generate(self, states: Sequence[torch.Tensor], rows: Sequence[int], options: dict[str, Any]) -> torch.Tensor:
        """By the language model's own `generate`. Token ids are passed beside the embeddings because the repetition
        penalty counts the prompt, as it does in transformers' own."""
        import torch

        embeddings = torch.stack([states[image] for image in rows])
        config = self.blip.model.config
        filler = config.text_config.pad_token_id if config.image_token_id is None else config.image_token_id
        image_tokens = self._prompt.new_full((config.num_query_tokens,), filler)
        ids = torch.cat([image_tokens, self._prompt]).expand(len(rows), -1)
        return self.blip.model.language_model.generate(
            input_ids=ids,
            inputs_embeds=embeddings,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self._new,
            min_new_tokens=max(0, self._stage.min_length - len(self._prompt)),
            **options,
        )


class T5Writer(QformerWriter):
    """A language model with encoder (T5): image tokens and prompt are encoded, the answer is the caption."""

    @property
    def start(self) -> int:
        """The decoder's start token."""
        return 1

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """The last hidden states of the language model's encoder."""
        embeddings = self.embedded(self.projected(pixels))
        return self.blip.model.language_model.get_encoder()(inputs_embeds=embeddings).last_hidden_state

    def generate(self, states: Sequence[torch.Tensor], rows: Sequence[int], options: dict[str, Any]) -> torch.Tensor:
        """By the language model's own `generate`."""
        import torch
        from transformers.modeling_outputs import BaseModelOutput

        encoded = torch.stack([states[image] for image in rows])
        return self.blip.model.language_model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
            attention_mask=torch.ones(encoded.shape[:2], dtype=torch.long, device=encoded.device),
            max_length=self._stage.max_length,
            min_length=self._stage.min_length,
            **options,
        )


def chunks(items: Sequence[Any], size: int) -> list[Any]:
    """Consecutive slices of `size` items, the last perhaps shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
