import re
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adacomp.lengths.budget import assign_lengths, code_budget


def test_code_budget_counts_everything_stored():
    # 1000 x 16 floats = 64,000 bytes; a tenth is 6,400; 900 of code-books, 250 of lengths, 3 of padding.
    assert code_budget(1000, 16, (4, 8, 16), codebook_bytes=900, target_ratio=10) == 8 * (6400 - 900 - 250 - 3)


def test_impossible_ratio_names_the_largest_that_fits():
    with pytest.raises(ValueError, match=r"target_ratio=60 .*largest ratio that fits is ([\d.]+)") as error:
        code_budget(1000, 16, (4, 8, 16), codebook_bytes=900, target_ratio=60)
    largest = float(re.search(r"that fits is ([\d.]+)", str(error.value))[1])
    assert code_budget(1000, 16, (4, 8, 16), 900, largest) >= 4000
    with pytest.raises(ValueError, match="cannot be met"):
        code_budget(1000, 16, (4, 8, 16), 900, largest + 0.05)


@st.composite
def selections(draw):
    lengths = sorted(draw(st.sets(st.integers(1, 40), min_size=1, max_size=4)))
    tokens = draw(st.integers(1, 30))
    score = st.floats(-5, 5) | st.sampled_from([0.0, 1.0])
    scores = draw(
        st.lists(st.lists(score, min_size=len(lengths), max_size=len(lengths)), min_size=tokens, max_size=tokens)
    )
    bits = draw(st.integers(tokens * lengths[0], tokens * lengths[-1] + 10))
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(lengths), bits


guesses = st.floats(0, 10) | st.sampled_from([1e-40, 1e6])
"""Prices that somebody takes for near."""


@given(selections(), guesses)
def test_assignment_fits_and_wastes_less_than_one_step_up(selection, guess):
    scores, lengths, bits = selection
    assignment, price = assign_lengths(scores, lengths, bits, guess)
    used = int(lengths[assignment].sum())
    assert used <= bits
    assert price >= 0
    if price == 0:
        assert torch.equal(assignment, scores.argmax(1))


@given(selections(), guesses)
@settings(max_examples=50)
def test_assignment_is_the_best_among_all_that_take_no_more_bits(selection, guess):
    scores, lengths, bits = selection
    scores = scores[:5]
    bits = min(bits, int(lengths[-1]) * len(scores))
    if len(scores) * int(lengths[0]) > bits:
        return
    assignment, _ = assign_lengths(scores, lengths, bits, guess)
    used = int(lengths[assignment].sum())
    best = max(
        float(scores[range(len(scores)), list(choice)].sum())
        for choice in product(range(len(lengths)), repeat=len(scores))
        if int(lengths[list(choice)].sum()) <= used
    )
    assert float(scores[range(len(scores)), assignment].sum()) >= best - 1e-6


def test_identical_tokens_share_the_bits_in_order():
    scores = torch.tensor([[0.0, 1.0]]).repeat(10, 1)
    assignment, _ = assign_lengths(scores, torch.tensor([1, 8]), 10 + 3 * 7)
    assert assignment.tolist() == [1, 1, 1] + [0] * 7


def test_refuses_scores_that_are_not_numbers():
    with pytest.raises(ValueError, match="NaN or Inf"):
        assign_lengths(torch.tensor([[0.0, float("nan")]]), torch.tensor([1, 8]), 100)


def test_refuses_too_few_bits():
    with pytest.raises(ValueError, match="2 codes of at least 4 bits do not fit into 7 bits"):
        assign_lengths(torch.zeros(2, 2), torch.tensor([4, 8]), 7)
