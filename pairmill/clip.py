"""A CLIP-like model in memory: unit vectors of images and of texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pairmill.passes import BatchSize, Passes, finite, rows_a_pass

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from pairmill.clip_pixels import ClipPixels

Vectors = npt.NDArray[np.float32]

LENGTHS = (8, 16, 24, 32, 48)
"""Tokens of a text pass, where a text needs no more; else the model's full context."""

CPU_VALUES = 256 * 768
"""Tokens x width of a pass on a CPU, about. Products of 256 tokens are as fast there as any (238 GFLOP/s in fp32, and
232 of 1,600 tokens), and small passes share the work out better and are padded less."""

KNOWN_WORDS = 100_000
"""Words whose tokens open_clip's own tokenizer remembers; it would keep every word of a web for good."""

CHARACTERS_A_TOKEN = 48
"""Of a text, for each token of the context: more than a token can stand for (CLIP's longest has 32), so what is cut off
was not read anyway. Splitting one word of 32,768 letters takes that tokenizer 15 seconds."""

CPU_ROWS = 32
"""Rows of a pass on a CPU, at most; a quarter of it where a tower has no tokens to count (convolutions)."""


@dataclass(frozen=True)
class LoadedClip:
    """A CLIP-like model in evaluation mode, with what prepares its inputs.

    Embeddings do not depend, to the last bit, on how many items a call has, on their order or on the number of threads
    (`pairmill.passes`).
    """

    model: Any
    preprocess: Callable[[Image.Image], torch.Tensor]
    """The library's own; float32 of shape (3, height, width)."""
    tokenizer: Callable[[list[str]], torch.Tensor]
    device: str
    input_dtype: Any
    """torch.dtype of the pixels that the model takes."""
    batch: BatchSize = "auto"
    """Rows of a forward pass; on a CPU an upper bound."""
    share: float = 1.0
    """Of the GPU's memory, this worker's part."""

    def embed_images(self, images: Sequence[Image.Image]) -> Vectors:
        """Unit-length embeddings of RGB images, float32 of shape (images, dimensions). Each image is taken from the
        sequence in the thread that needs it."""
        pixels = self._pixels
        prepare = self.preprocess if pixels is None else pixels.prepare
        return _unit(self._image_passes.run(images, self.image_rows, self._encode_images, prepare))

    def embed_texts(self, texts: Sequence[str]) -> Vectors:
        """Unit-length embeddings of texts, float32 of shape (texts, dimensions).

        Texts run in passes of texts that need as many tokens, at most: which pass is theirs depends on their own length
        alone.
        """
        if not texts:
            return _unit([])
        ids = self.tokenizer(list(texts))
        lengths = self._lengths(ids)
        vectors: Vectors | None = None
        for length in sorted(set(lengths.tolist())):
            of_length = np.flatnonzero(lengths == length)
            rows = self.text_rows * (ids.shape[1] // length)
            prepare = ids[:, :length].__getitem__
            found = _unit(self._text_passes.run(of_length.tolist(), rows, self._encode_texts, prepare))
            if vectors is None:
                vectors = np.empty((len(texts), found.shape[1]), dtype=np.float32)
            vectors[of_length] = found
        assert vectors is not None
        return vectors

    @cached_property
    def image_rows(self) -> int:
        """Images of a forward pass."""
        tokens, width = _image_work(self.model.visual)
        on_cpu = _cpu_rows(tokens, width)
        return rows_a_pass(self.batch, self.device, on_cpu, lambda n: self._encode_images(self._blank(n)), self.share)

    @cached_property
    def text_rows(self) -> int:
        """Texts of a forward pass with the model's full context; of shorter texts it has proportionally more."""
        ids = self.tokenizer(["a photo"])

        def run(rows: int) -> torch.Tensor:
            return self._encode_texts(ids.expand(rows, -1).to(self.device))

        on_cpu = _cpu_rows(ids.shape[1], _text_width(self.model))
        return rows_a_pass(self.batch, self.device, on_cpu, run, self.share)

    @cached_property
    def _image_passes(self) -> Passes:
        return Passes(self.device)

    @cached_property
    def _text_passes(self) -> Passes:
        return Passes(self.device)

    @cached_property
    def _pixels(self) -> ClipPixels | None:
        from pairmill.clip_pixels import recognised

        return recognised(self.preprocess)

    @cached_property
    def _short_texts(self) -> ShortTexts | None:
        return ShortTexts.of(self.model)

    def _blank(self, rows: int) -> torch.Tensor:
        """The inputs of a pass over so many black images."""
        import torch
        from PIL import Image

        prepare = self.preprocess if self._pixels is None else self._pixels.prepare
        one = prepare(Image.new("RGB", (64, 64)))
        return torch.stack([one] * rows).to(self.device)

    def _encode_images(self, inputs: torch.Tensor) -> torch.Tensor:
        pixels = inputs if self._pixels is None else self._pixels.normalise(inputs)
        vectors: torch.Tensor = self.model.encode_image(pixels.to(self.input_dtype)).float()
        return vectors

    def _encode_texts(self, ids: torch.Tensor) -> torch.Tensor:
        encode = self.model.encode_text if self._short_texts is None else self._short_texts.encode
        vectors: torch.Tensor = encode(ids).float()
        return vectors

    def _lengths(self, ids: torch.Tensor) -> npt.NDArray[np.int64]:
        """Tokens of the pass that each text belongs to."""
        context = ids.shape[1]
        if self._short_texts is None:
            return np.full(len(ids), context)
        needed = self._short_texts.last(ids).numpy() + 1
        steps = np.array([*(length for length in LENGTHS if length < context), context])
        return steps[np.searchsorted(steps, needed)]


@dataclass(frozen=True)
class ShortTexts:
    """A text tower that needs no more of a text than its own tokens: attention is causal and the vector is that of the
    end-of-text token, so what follows cannot matter."""

    tower: Any
    pool: str
    """argmax: the end of text has the highest id; eos: it has the id `eos`."""
    eos: int | None

    @classmethod
    def of(cls, model: Any) -> ShortTexts | None:
        """The text tower of an open_clip model, or None where it may see what follows a text: SigLIP and CLIPA attend
        both ways or pool the last token, CoCa appends a token of its own, towers of transformers may do anything."""
        import open_clip
        import torch
        from open_clip.transformer import TextTransformer, Transformer

        if type(model) is open_clip.CLIP:
            tower, pool, eos = model, model.text_pool_type, model.text_eos_id
        elif type(model) is open_clip.CustomTextCLIP and type(model.text) is TextTransformer:
            tower, pool, eos = model.text, model.text.pool_type, model.text.eos_id
            if tower.cls_emb is not None or tower.use_pad_mask or tower.output_tokens:
                return None
        else:
            return None
        mask = tower.attn_mask
        if pool not in ("argmax", "eos") or mask is None or type(tower.transformer) is not Transformer:
            return None
        causal = torch.full_like(mask, float("-inf")).triu(1)
        return cls(tower, pool, eos if pool == "eos" else None) if torch.equal(mask, causal) else None

    def last(self, ids: torch.Tensor) -> torch.Tensor:
        """Where the token is whose vector stands for the text."""
        return (ids if self.eos is None else (ids == self.eos).int()).argmax(dim=-1)

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors of shape (texts, dimensions), as `encode_text` of the model makes of ids with the full context."""
        import torch

        tower, length = self.tower, ids.shape[1]
        dtype = tower.transformer.get_cast_dtype()
        x = tower.token_embedding(ids).to(dtype) + tower.positional_embedding[:length].to(dtype)
        x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
        x = tower.ln_final(x)[torch.arange(len(ids), device=ids.device), self.last(ids)]
        projection = tower.text_projection
        if projection is None:
            return x
        return projection(x) if callable(projection) else x @ projection


class _Words(dict[str, str]):
    """What is known of words. No more are learnt once there are `KNOWN_WORDS`: the first ones are the common ones."""

    def __setitem__(self, word: str, tokens: str) -> None:
        if len(self) < KNOWN_WORDS:
            super().__setitem__(word, tokens)


def bounded(tokenizer: Any) -> Any:
    """A tokenizer of open_clip that neither remembers all words it has seen nor reads far behind its context; others
    are as they were."""
    import open_clip

    if type(tokenizer) is open_clip.SimpleTokenizer:
        clean, most = tokenizer.clean_fn, tokenizer.context_length * CHARACTERS_A_TOKEN
        tokenizer.clean_fn = lambda text: clean(text)[:most]
        tokenizer.cache = _Words(tokenizer.cache)
    return tokenizer


def _image_work(tower: Any) -> tuple[int | None, int]:
    """Tokens of an image and their width, of a vision transformer; (None, 0) of any other tower."""
    if hasattr(tower, "grid_size") and hasattr(tower, "transformer"):
        return math.prod(tower.grid_size) + 1, tower.transformer.width
    trunk: Any = getattr(tower, "trunk", None)
    if hasattr(trunk, "patch_embed") and hasattr(trunk.patch_embed, "num_patches") and hasattr(trunk, "blocks"):
        return trunk.patch_embed.num_patches, trunk.embed_dim
    return None, 0


def _text_width(model: Any) -> int:
    """Width of a text's tokens; that of ViT-B's text tower where the model does not tell."""
    tower = getattr(model, "text", model)
    return int(getattr(getattr(tower, "transformer", None), "width", 512))


def _cpu_rows(tokens: int | None, width: int) -> int:
    """Rows of a pass on a CPU."""
    return CPU_ROWS // 4 if tokens is None else max(1, min(CPU_ROWS, CPU_VALUES // (tokens * width)))


def _unit(parts: Sequence[torch.Tensor]) -> Vectors:
    """Rows divided by their length, in float64 so that the rounding is the same on every machine.

    Raises:
        FloatingPointError: see `pairmill.passes.finite`.
    """
    if not parts:
        return np.empty((0, 0), dtype=np.float32)
    wide = np.concatenate([finite(part).numpy() for part in parts]).astype(np.float64)
    lengths = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    unit: Vectors = (wide / np.maximum(lengths, 1e-12)[:, None]).astype(np.float32)
    return unit
