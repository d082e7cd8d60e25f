from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from captioners.sampling import SeededChoice, choose, uniform


def test_draws_are_uniform_and_independent() -> None:
    drawn = np.array([[uniform(0, f"{uid:064x}", 0, step) for step in range(2)] for uid in range(20_000)])
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn[:, 0], bins=100, range=(0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 149  # chi-square, 99 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.03


@given(st.integers(0, 2**32), st.text(max_size=5), st.integers(0, 9), st.integers(0, 99))
def test_each_argument_counts(seed: int, uid: str, sample: int, step: int) -> None:
    here = uniform(seed, uid, sample, step)
    assert here == uniform(seed, uid, sample, step)
    others = [(seed + 1, uid, sample, step), (seed, uid + "x", sample, step)]
    others += [(seed, uid, sample + 1, step), (seed, uid, sample, step + 1)]
    assert here not in [uniform(*other) for other in others]


@pytest.mark.parametrize("top_p", [0.9, 0.5, 1.0])
def test_tokens_follow_the_nucleus_of_the_softmax(top_p: float) -> None:
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(3)) * 1.5
    rows = 40_000
    draws = torch.tensor([[uniform(7, str(uid), 0, 0)] for uid in range(rows)], dtype=torch.float64)
    left = SeededChoice(draws, 1, top_p)(torch.zeros(rows, 1, dtype=torch.long), logits.expand(rows, -1))
    assert ((left > float("-inf")).sum(dim=1) == 1).all()
    counts = np.bincount(left.argmax(dim=1).numpy(), minlength=30)
    # by hand: the most probable tokens, until their sum reaches top_p, renormalised
    probabilities = logits.double().softmax(-1)[0].numpy()
    order = np.argsort(-probabilities)
    kept = order[: int(np.searchsorted(probabilities[order].cumsum(), top_p - 1e-9)) + 1]
    expected = np.zeros(30)
    expected[kept] = probabilities[kept] / probabilities[kept].sum() * rows
    assert counts[expected == 0].sum() == 0
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = len(kept) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


@given(
    hnp.arrays(np.float32, (4, 6), elements=st.sampled_from([float("-inf"), -30.0, -1.0, 0.0, 0.5, 40.0])),
    hnp.arrays(np.float64, 4, elements=st.integers(0, 2**32 - 1).map(lambda n: n / 2**32)),
)
def test_a_chosen_token_is_possible_and_rows_do_not_meet(scores: np.ndarray, draws: np.ndarray) -> None:
    scores[:, 2] = np.maximum(scores[:, 2], -1.0)  # something is possible in each row
    chosen = choose(torch.from_numpy(scores), torch.from_numpy(draws))
    for row in range(4):
        assert scores[row, chosen[row]] > float("-inf")
        assert chosen[row] == choose(torch.from_numpy(scores[row : row + 1]), torch.from_numpy(draws[row : row + 1]))


def test_the_choice_is_the_inverse_of_the_cumulative_distribution() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    for draw, token in ((0.0, 0), (0.09, 0), (0.11, 1), (0.29, 1), (0.31, 2), (0.61, 3), (1 - 2**-32, 3)):
        assert choose(scores, torch.tensor([draw], dtype=torch.float64)).tolist() == [token]


@pytest.mark.parametrize(("spread", "top_p"), [(8.0, 0.9), (3.0, 0.9), (0.2, 0.9), (3.0, 0.3), (1.0, 1.0)])
def test_a_nucleus_of_any_size_is_the_one_of_transformers(spread: float, top_p: float) -> None:
    """Of 5,000 tokens it has a few, some hundreds and nearly all."""
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 5000, generator=generator) * spread
    scores[:, 17] = float("-inf")
    draws = torch.rand(40, 1, generator=generator, dtype=torch.float64)
    warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(0.8)(None, scores))
    expected = choose(warped, draws[:, 0])
    found = SeededChoice(draws, 1, top_p, 0.8).chosen(scores, 1)
    assert torch.equal(found, expected)
    assert len(set(found.tolist())) > 20
    assert torch.equal(found, torch.cat([choose(scores[n : n + 1] / 0.8, draws[n], top_p) for n in range(40)]))
