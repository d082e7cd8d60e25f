"""What a tiny CLIP is trained on: procedural scenes drawn once and kept as small pictures, with captions and truth.

Scenes come in twins that differ in one respect (the shape or the size of one object, or everything but the objects'
words), so that each batch holds the pictures that are hardest to tell apart. Each scene has several true captions
and, for each, corruptions that are false of it. Views (mirrored, cropped,
recoloured, noised) are made in batches from the kept pictures, and the truth of every view against every caption
comes from the oracle.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pairmill.procedural import junk
from pairmill.procedural.captions import CORRUPTIONS, VOCABULARY, as_typed, corrupt, describe
from pairmill.procedural.scene import SHAPES, Scene, render, sample_scene
from pairmill.procedural.truth import ClaimTable, SceneTable, claim_table, scene_table, truth_matrix
from pairmill.train.views import make_views

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]")
_LEFT, _RIGHT = "left", "right"
_JUNK_TEXTS = 2000


def write_tokenizer(folder: Path, context_length: int, *, joins_words: bool = False) -> None:
    """Write a WordPiece tokenizer (`tokenizer.json`, `tokenizer_config.json`) that transformers loads from the folder.

    It holds the words of the caption grammar whole, and every printable ASCII character alone and as a continuation,
    so that any ASCII text encodes without an unknown token. It lower-cases. `[CLS] text [SEP]`; `[DEC]` and `[ENC]`
    are there for a BLIP that reuses it.

    Args:
        folder: to write to.
        context_length: longest text in tokens.
        joins_words: token ids are to become text again, as a captioner needs it.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    continued = ["##" + letter for letter in letters if letter.isalnum()]
    words = [word for word in VOCABULARY if len(word) > 1]
    vocabulary = {token: place for place, token in enumerate([*_SPECIAL, *letters, *continued, *words])}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if joins_words:
        tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=context_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        additional_special_tokens=["[DEC]", "[ENC]"],
    ).save_pretrained(folder)


@dataclass(frozen=True)
class Batch:
    """One step's worth, with 2 x scenes views and their truth.

    Args:
        views: (2 x scenes, 3, side, side) float32 in [-1, 1]; row i and row i + scenes show the same scene.
        tokens: (texts, length) int64; row i < scenes is a true caption of view i, then come the corruptions
            of those captions, then junk.
        truth: (2 x scenes, texts) bool.
    """

    views: torch.Tensor
    tokens: torch.Tensor
    truth: torch.Tensor


class Corpus:
    """Scenes, pictures, captions and truth, all drawn from one seed at construction.

    Args:
        seed: the only source of chance.
        scenes: how many scenes, an even number; rows 2n and 2n + 1 are twins.
        captions: true captions for each scene.
        side: side of the kept pictures in pixels (more than the model's input, so that crops stay sharp).
        encode: turns texts into (texts, context) int64 token ids, padded with 0.
        progress: called with (scenes drawn, scenes in all).
    """

    def __init__(
        self,
        *,
        seed: int,
        scenes: int,
        captions: int,
        side: int,
        encode: Callable[[list[str]], torch.Tensor],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        rng = random.Random(f"corpus:{seed}")
        self.pictures = torch.empty((scenes, 3, side, side), dtype=torch.uint8)
        self.margins = np.empty((scenes, 4), dtype=np.float32)
        drawn: list[Scene] = []
        texts: list[str] = []
        self.true = np.empty((scenes, captions), dtype=np.int64)
        self.false = np.full((scenes, captions, len(CORRUPTIONS)), -1, dtype=np.int64)
        for row in range(scenes):
            scene = sample_scene(rng) if row % 2 == 0 else twin(drawn[-1], rng)
            drawn.append(scene)
            self.pictures[row] = small_picture(scene_image=render(scene, side, side), rng=rng)
            boxes = np.array(scene.boxes(1, 1))
            self.margins[row] = (*boxes[:, :2].min(axis=0), *(1 - boxes[:, 2:].max(axis=0)))
            for column in range(captions):
                caption = as_typed(describe(scene, rng), rng)
                self.true[row, column] = len(texts)
                texts.append(caption)
                for place, kind in enumerate(CORRUPTIONS):
                    changed = corrupt(caption, scene, kind, rng)
                    if changed is not None:
                        self.false[row, column, place] = len(texts)
                        texts.append(changed)
            if progress is not None and (row + 1) % 1000 == 0:
                progress(row + 1, scenes)
        self.junk = np.arange(len(texts), len(texts) + _JUNK_TEXTS)
        makers = (junk.foreign, junk.boilerplate, junk.too_short, junk.scrambled)
        texts += [rng.choice(makers)(rng) for _ in range(_JUNK_TEXTS)]
        self.scenes: SceneTable = scene_table(drawn)
        self.claims: ClaimTable = claim_table(texts)
        self.tokens = encode(texts).to(torch.int16)
        left, right = (int(encode([word])[0, 1]) for word in (_LEFT, _RIGHT))
        self._swap = torch.arange(int(self.tokens.max()) + 1)
        self._swap[left], self._swap[right] = right, left

    def batch(self, *, seed: int, step: int, scenes: int, junk_texts: int, side: int) -> Batch:
        """The batch of a step: a function of the arguments alone, so a resumed run sees the same ones."""
        rng = np.random.default_rng((seed, step))
        per_epoch = len(self.pictures) // scenes
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((seed, 1 << 40, epoch)).permutation(len(self.pictures) // 2)
        pairs = order[place * scenes // 2 : (place + 1) * scenes // 2]
        rows = np.concatenate([2 * pairs, 2 * pairs + 1])
        mirrored = rng.random((2, scenes)) < 0.5
        column = rng.integers(self.true.shape[1], size=scenes)
        true = self.true[rows, column]
        false = self._corruptions(rng, self.false[rows, column])
        texts = np.concatenate([true, false, rng.choice(self.junk, junk_texts)])
        flipped = np.concatenate([mirrored[0], mirrored[0], np.zeros(junk_texts, dtype=bool)])
        tokens = self.tokens[torch.from_numpy(texts)].long()
        tokens = torch.where(torch.from_numpy(flipped)[:, None], self._swap[tokens], tokens)
        tokens = tokens[:, : int((tokens != 0).sum(1).max())]
        claims = self.claims.take(texts).mirrored(flipped)
        both = np.concatenate([rows, rows])
        truth = truth_matrix(self.scenes.take(both, mirrored.reshape(-1)), claims)
        pictures, margins = self.pictures[torch.from_numpy(rows)], self.margins[rows]
        views = [
            make_views(rng, pictures, np.minimum(margins, 0.12), mirrored[0], side, strength=0.6),
            make_views(rng, pictures, np.minimum(margins, 0.12), mirrored[1], side, strength=1.0),
        ]
        return Batch(torch.cat(views), tokens, torch.from_numpy(truth))

    @staticmethod
    def _corruptions(rng: np.random.Generator, choices: NDArray[np.int64]) -> NDArray[np.int64]:
        """One corruption a caption, each kind it has with equal chance; (scenes,) text rows."""
        score = np.where(choices >= 0, rng.random(choices.shape), -1)
        return choices[np.arange(len(choices)), score.argmax(axis=1)]


def twin(scene: Scene, rng: random.Random) -> Scene:
    """A scene that differs in one respect: an object's shape, an object's size, or layout and background."""
    place = rng.randrange(len(scene.objects))
    thing = scene.objects[place]
    change = rng.choice(("shape", "size", "layout"))
    if change == "shape":
        used = {other.shape for other in scene.objects if other.colour == thing.colour}
        changed = replace(thing, shape=rng.choice([shape for shape in SHAPES if shape not in used]), tilt=0.0)
        return replace(scene, objects=(*scene.objects[:place], changed, *scene.objects[place + 1 :]))
    kinds = [(other.colour, other.shape, other.size) for other in scene.objects]
    if change == "size":
        kinds[place] = (thing.colour, thing.shape, "large" if thing.size == "small" else "small")
    return sample_scene(rng, kinds=kinds)


def small_picture(*, scene_image: Image.Image, rng: random.Random) -> torch.Tensor:
    """(3, side, side) uint8, after a JPEG round trip half of the time."""
    if rng.random() < 0.5:
        buffer = io.BytesIO()
        scene_image.save(buffer, "JPEG", quality=rng.randint(70, 95))
        scene_image = Image.open(buffer)
    return torch.from_numpy(np.asarray(scene_image.convert("RGB")).copy()).permute(2, 0, 1)
