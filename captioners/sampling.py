"""Sampling that depends on what is sampled for, and on nothing else: no global random state, no neighbours in a batch.

A token is chosen by one number between 0 and 1, made by hashing the seed, the pair's uid, the sample's number and the
step. So the same pair has the same captions in a rerun, in another batch or order, on another worker or engine.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def uniform(seed: int, uid: str, sample: int, step: int) -> float:
    """A number in [0, 1), a multiple of 2^-32: the first four bytes of a BLAKE2b hash of the arguments."""
    digest = hashlib.blake2b(f"{seed}\n{uid}\n{sample}\n{step}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") / 2**32


def choose(scores: torch.Tensor, draws: torch.Tensor, top_p: float = 1.0) -> torch.Tensor:
    """The token of each row whose part of the cumulative distribution, in the order of token ids, holds the draw.

    Only tokens of the nucleus count: the most probable ones, until their sum reaches `top_p` (Holtzman et al. 2020,
    section 3.1). Ids rather than falling probabilities are the order, since two tokens of nearly equal probability
    would change places with the rounding of another machine.

    Args:
        scores: (rows, tokens) logits; -inf for what must not be chosen. Summed in float64.
        draws: (rows,) float64 in [0, 1), as of `uniform`.
        top_p: probability of the nucleus; 1 and more: all tokens.

    Returns:
        (rows,) int64.
    """
    import torch

    draws = draws.to(scores.device)
    if top_p >= 1:
        return _drawn(scores.double().softmax(dim=-1), draws)
    chosen = torch.empty(len(scores), dtype=torch.long, device=scores.device)
    left = torch.arange(len(scores), device=scores.device)
    for count in (*(n for n in NEAREST if n < scores.shape[1]), scores.shape[1]):
        inside, ids, enough = _nucleus(scores[left], count, top_p)
        ids, order = ids.sort(dim=-1)
        places = _drawn(inside.gather(1, order), draws[left])
        chosen[left] = ids.gather(1, places[:, None])[:, 0]
        left = left[~enough]
        if not len(left):
            break
    return chosen


NEAREST = (256, 2048)
"""Numbers of tokens among which a nucleus is looked for first. A trained captioner's seldom has more than the first,
which for 16 rows takes 2.4 ms; sorting their whole vocabulary takes 33, half as long as a step of the decoder."""


def _nucleus(scores: torch.Tensor, count: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `count` best tokens of each row: probabilities (0 outside the nucleus), ids, and whether the row's nucleus is
    among them."""
    best, ids = scores.topk(count, dim=-1)
    probabilities = (best.double() - scores.logsumexp(dim=-1, keepdim=True).double()).exp()
    reached = probabilities.cumsum(dim=-1)
    inside = reached - probabilities < top_p
    inside[:, 0] = True
    return probabilities * inside, ids, (reached[:, -1] >= top_p) | (count == scores.shape[1])


def _drawn(probabilities: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Of each row the place whose part of the cumulative sum holds the draw."""
    import torch

    cumulative = probabilities.cumsum(dim=-1)
    return torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)[:, 0]


class SeededChoice:
    """A logits processor that leaves one token, drawn from the nucleus of the scores it is given; `generate` then goes
    on greedily. It stands last.

    Args:
        draws: (rows, steps) float64 in [0, 1).
        start: length of the sequence at the first step: that of the prompt.
        top_p: see `choose`.
        temperature: scores are divided by it.
    """

    def __init__(self, draws: torch.Tensor, start: int, top_p: float = 1.0, temperature: float = 1.0) -> None:
        self._draws = draws
        self._start = start
        self._top_p = top_p
        self._temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores of shape (rows, tokens), -inf for all tokens but the chosen one."""
        chosen = self.chosen(scores, input_ids.shape[1])
        return scores.new_full(scores.shape, float("-inf")).scatter_(1, chosen[:, None], 0.0)

    def chosen(self, scores: torch.Tensor, length: int) -> torch.Tensor:
        """The next token of each row, of sequences that are so long."""
        return choose(scores / self._temperature, self._draws[:, length - self._start], self._top_p)
