import pytest
import torch

from hf_adacomp.fitting.token_counts import expected_counts, token_weights


def test_expected_counts_of_unseen_tokens_follow_their_neighbours():
    torch.manual_seed(0)
    source = torch.randn(2000, 16)
    common = source[:, 0] > 0.5
    counts = torch.poisson(torch.where(common, 3.0, 0.05)).long()
    expected = expected_counts(counts, source)
    unseen = counts == 0
    assert expected[unseen].mean() == pytest.approx(0.5, rel=1e-3)
    assert expected[unseen & common].mean() > 3 * expected[unseen & ~common].mean()
    assert (expected >= counts).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (50, 1)])
def test_expected_counts_of_odd_tables(shape):
    assert torch.equal(expected_counts(torch.zeros(shape[0]), torch.randn(shape)), torch.full(shape[:1], 0.5))
    assert torch.isfinite(expected_counts(torch.ones(shape[0]), torch.zeros(shape))).all()


def test_weights_are_roots():
    assert token_weights(torch.tensor([0.5, 4.0])).tolist() == pytest.approx([0.5**0.5, 2])
