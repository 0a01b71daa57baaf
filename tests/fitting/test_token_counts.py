import pytest
import torch

from hf_adacomp.fitting.token_counts import checked_counts, draw_tokens, expected_counts, token_weights


def test_expected_counts_of_unseen_tokens_follow_their_neighbours():
    torch.manual_seed(0)
    source = torch.randn(2000, 16)
    common = source[:, 0] > 0.5
    counts = torch.poisson(torch.where(common, 3.0, 0.05)).long()
    expected = expected_counts(counts, source)
    unseen = counts == 0
    assert expected[unseen].mean() == pytest.approx(0.5, rel=1e-3)
    assert expected[unseen & common].mean() > 2 * expected[unseen & ~common].mean()
    assert (expected >= counts).all()


def test_expected_counts_of_unseen_tokens_follow_the_order_of_the_vocabulary():
    """Also of tokens whose vectors lie where no token was seen, as those of a language that the data does not show."""
    torch.manual_seed(0)
    source = torch.randn(2000, 16)
    shown = source[:, 0] > 0
    counts = torch.poisson(torch.where(shown, 300.0 / torch.arange(1, 2001), 0.0)).long()
    expected = expected_counts(counts, source)
    early, late = (~shown).nonzero().squeeze(1).tensor_split(2)
    assert expected[early].mean() > 2 * expected[late].mean()


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (50, 1)])
def test_expected_counts_of_odd_tables(shape):
    assert torch.equal(expected_counts(torch.zeros(shape[0]), torch.randn(shape)), torch.full(shape[:1], 0.5))
    assert torch.isfinite(expected_counts(torch.ones(shape[0]), torch.zeros(shape))).all()


def test_weights_are_roots():
    assert token_weights(torch.tensor([0.5, 4.0])).tolist() == pytest.approx([0.5**0.5, 2])


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float64])
def test_whole_numbers_of_any_dtype_are_counts(dtype):
    assert torch.equal(checked_counts(torch.tensor([0, 3, 7], dtype=dtype), 3), torch.tensor([0, 3, 7]))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.tensor([0.25, 0.75, 0.0]), r"whole numbers of occurrences; got 0.25 for token 0.*Frequencies"),
        (torch.tensor([1.0, float("nan"), 2.0]), "finite"),
        (torch.tensor([1, -2, 3]), "negative; got -2 for token 1"),
        (torch.ones(4), r"shape \(3,\); got \(4,\)"),
    ],
)
def test_what_cannot_be_counts_is_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        checked_counts(counts, 3)


def test_draws_follow_the_weights_and_the_generator():
    weights = torch.tensor([1.0, 0.0, 3.0, 0.0])
    drawn = draw_tokens(weights, 4000, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, draw_tokens(weights, 4000, torch.Generator().manual_seed(0)))
    assert drawn.bincount(minlength=4)[[1, 3]].tolist() == [0, 0]
    assert float((drawn == 2).float().mean()) == pytest.approx(0.75, abs=0.03)


def test_draws_from_more_tokens_than_multinomial_takes():
    drawn = draw_tokens(torch.ones(1).expand((1 << 24) + 9), 1000, torch.Generator().manual_seed(0))
    assert 0 <= drawn.min() <= drawn.max() < (1 << 24) + 9
