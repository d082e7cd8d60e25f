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


def choose(scores: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The token of each row whose part of the cumulative distribution, in the order of token ids, holds the draw.

    Ids rather than falling probabilities are the order, since two tokens of nearly equal probability would change
    places with the rounding of another machine.

    Args:
        scores: (rows, tokens) logits; -inf for what must not be chosen. Summed in float64.
        draws: (rows,) float64 in [0, 1), as of `uniform`.

    Returns:
        (rows,) int64.
    """
    import torch

    cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
    wanted = draws.to(cumulative.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0]


class SeededChoice:
    """A logits processor that leaves one token, drawn from the scores it is given; `generate` then goes on greedily.

    It stands last, after temperature and nucleus.

    Args:
        draws: (rows, steps) float64 in [0, 1).
        start: length of the sequence at the first step: that of the prompt.
    """

    def __init__(self, draws: torch.Tensor, start: int) -> None:
        self._draws = draws
        self._start = start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores of shape (rows, tokens), -inf for all tokens but the chosen one."""
        chosen = choose(scores, self._draws[:, input_ids.shape[1] - self._start])
        return scores.new_full(scores.shape, float("-inf")).scatter_(1, chosen[:, None], 0.0)
