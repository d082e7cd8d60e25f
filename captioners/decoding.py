"""Captions of BLIP's text decoder, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pairmill.passes import finite

if TYPE_CHECKING:
    import torch

    from captioners.sampling import SeededChoice
    from pairmill.blip_text import SeenImages, TextTower


@dataclass(frozen=True)
class Decoder:
    """Writes what `generate` of transformers would, with the same processing of scores in the same order: repetition
    penalty (Keskar et al. 2019, section 4.1), least length, then the choice."""

    tower: TextTower
    head: Any
    """Makes scores of hidden states."""
    end: int
    """The token that ends a text."""
    padding: int
    """What follows it."""
    max_length: int
    """Tokens, those of the prompt included; the same for `min_length`."""
    min_length: int
    repetition_penalty: float

    def write(
        self, prompt: torch.Tensor, images: SeenImages, samples: int, choice: SeededChoice | None
    ) -> torch.Tensor:
        """Token ids of shape (images x samples, at most `max_length`), the samples of an image one after the other.

        The prompt is read once an image. The loop ends when all texts have.

        Args:
            prompt: its token ids, of shape (tokens,).
            images: what the texts describe.
            samples: texts an image.
            choice: what draws tokens; None: the most probable one is taken.

        Raises:
            FloatingPointError: see `pairmill.passes.finite`.
        """
        import torch

        start, rows = len(prompt), images.groups * samples
        tokens = prompt.new_full((rows, self.max_length), self.padding)
        tokens[:, :start] = prompt
        ended = torch.zeros(rows, dtype=torch.bool, device=prompt.device)
        past = self.tower.past(images.groups, self.max_length)
        read = self.tower.read(prompt.expand(images.groups, -1), images, past=past)
        scores = finite(self.head(read[:, -1])).repeat_interleave(samples, 0)
        past = past.repeated(samples)
        for length in range(start, self.max_length):
            processed = self._processed(scores.float(), tokens[:, :length])
            chosen = processed.argmax(dim=-1) if choice is None else choice.chosen(processed, length)
            tokens[:, length] = chosen.masked_fill_(ended, self.padding)
            ended |= chosen == self.end
            if length + 1 == self.max_length or bool(ended.all()):
                return tokens[:, : length + 1]
            read = self.tower.read(tokens[:, length : length + 1], images, past=past, start=length)
            scores = self.head(read[:, -1])
        return tokens

    def _processed(self, scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Scores after penalty and least length."""
        import torch

        if self.repetition_penalty != 1:
            seen = scores.gather(1, tokens)
            seen = torch.where(seen < 0, seen * self.repetition_penalty, seen / self.repetition_penalty)
            scores = scores.scatter(1, tokens, seen)
        if tokens.shape[1] < self.min_length:
            scores[:, self.end] = float("-inf")
        return scores
