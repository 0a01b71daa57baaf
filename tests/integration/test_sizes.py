import pytest
import torch
from conftest import VOCABULARY
from torch import nn

from hf_adacomp import AdaptiveCompressedEmbedding, compress, pack, size_report

pytestmark = pytest.mark.usefixtures("quick_fit")


def test_report_before_packing_is_the_report_after(bert, config, counts):
    compress(bert, config, counts)
    before = size_report(bert)
    after = size_report(pack(bert))
    assert before == after
    assert after.dense_bytes == 4 * VOCABULARY * 32
    assert after.total_bytes == after.codes_bytes + after.lengths_bytes + after.codebook_bytes
    assert after.ratio >= config.target_ratio
    assert after.bits_per_token == sum(length * n for length, n in after.tokens_per_length.items()) / VOCABULARY


def test_settled_lengths_are_those_of_the_last_step(bert, config, counts):
    table = compress(bert, config, counts).get_input_embeddings()
    before = size_report(bert)
    with torch.no_grad():
        table.training_state.selector.offset[:, 0] += torch.rand(VOCABULARY)
    assert size_report(bert, settled=True) == before != size_report(bert)


def test_prints_a_table(packed_bert):
    text = str(size_report(packed_bert))
    for part in ("dense float32 table           65,536 bytes", "code-books", "ratio", "bits a token", "   28 bits"):
        assert part in text


def test_adds_up_two_tables(config, counts):
    tables = [
        AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(VOCABULARY, 32), config, counts) for _ in range(2)
    ]
    both, one = size_report(nn.ModuleList(tables)), size_report(tables[0])
    assert both.dense_bytes == 2 * one.dense_bytes
    assert both.codebook_bytes == 2 * one.codebook_bytes
    assert both.num_tokens == sum(both.tokens_per_length.values()) == 2 * VOCABULARY


def test_needs_a_compressed_model(bert):
    with pytest.raises(ValueError, match="call compress"):
        size_report(bert)
