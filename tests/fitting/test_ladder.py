import pytest
import torch

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding
from hf_adacomp.fitting.ladder import choose_ladder
from hf_adacomp.fitting.token_counts import typical_counts

ZIPF = 4000 // torch.arange(1, 4001)


def table(num_tokens=4000, dim=64) -> torch.Tensor:
    """Rows with a decaying spectrum, as trained tables have."""
    return torch.randn(num_tokens, dim) / torch.arange(1, dim + 1) ** 0.5


def choose(source, counts, ratio, **settings) -> tuple[int, ...]:
    return choose_ladder(source, counts, AdaCompConfig(target_ratio=ratio, **settings))


def test_shorter_codes_for_smaller_files():
    source, counts = table(), ZIPF
    longest = [max(choose(source, counts, ratio)) for ratio in (4, 10, 30, 60)]
    assert longest == sorted(longest, reverse=True)
    assert longest[0] > longest[-1]


def test_shorter_codes_where_code_books_cost_more():
    source, counts = table(), ZIPF
    assert sum(choose(source, counts, 30, codebook_dtype="float32")) < sum(choose(source, counts, 30))


@pytest.mark.parametrize("ratio", [4, 16, 40])
def test_promise_holds_for_fitted_code_books(ratio):
    """The chosen ladder loses no more than the fixed ones on the real, fitted code-books."""
    source, counts = table(), ZIPF

    def distortion(code_lengths):
        config = AdaCompConfig(code_lengths, target_ratio=ratio)
        embedding = torch.nn.Embedding.from_pretrained(source)
        compressed = AdaptiveCompressedEmbedding.from_embedding(embedding, config, counts)
        weights = (counts + 0.5).sqrt()
        return float((weights * (compressed.to_embedding().weight - source).square().sum(1)).sum())

    chosen = distortion("auto")
    others = [lengths for lengths in [(4, 8), (8, 32), (16, 64, 128), (64,)] if fits(source, lengths, ratio)]
    assert others
    assert all(chosen < 1.03 * distortion(lengths) for lengths in others)


def fits(source, lengths, ratio) -> bool:
    try:
        AdaptiveCompressedEmbedding(*source.shape, AdaCompConfig(lengths, target_ratio=ratio), device="meta")
    except ValueError:
        return False
    return True


def test_unknown_counts_are_taken_as_zipf():
    source = table()
    assert choose(source, torch.zeros(4000), 30) == choose(source, typical_counts(4000), 30)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (300, 1), (5, 700)])
def test_tables_of_odd_shapes(shape):
    lengths = choose(torch.randn(shape), torch.zeros(shape[0]), 0.01)
    assert list(lengths) == sorted(set(lengths))


def test_impossible_ratio_is_refused_with_the_largest_that_fits():
    with pytest.raises(ValueError, match=r"target_ratio=2000 cannot be met.* The largest ratio that fits is \d"):
        choose(table(), ZIPF, 2000)


def test_embedding_carries_the_chosen_lengths_and_the_config_stays_auto():
    config = AdaCompConfig(target_ratio=16)
    embedding = AdaptiveCompressedEmbedding.from_embedding(torch.nn.Embedding.from_pretrained(table()), config, ZIPF)
    assert config.code_lengths == "auto"
    assert embedding.config.code_lengths == embedding.config.ladder
    assert set(embedding.code_lengths().tolist()) <= set(embedding.config.ladder)
    with pytest.raises(ValueError, match="auto"):
        _ = config.ladder
