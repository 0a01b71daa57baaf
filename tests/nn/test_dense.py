import re

import pytest
import torch
from architectures import TIED
from conftest import LENGTHS, VOCABULARY
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding
from hf_adacomp.nn.dense import checked_scale, checked_table, dense_embedding


def scaled(factor=3.0):
    return BartScaledWordEmbedding(8, 4, 0, embed_scale=factor)


def test_scale_is_the_factor_of_forward():
    assert checked_scale(nn.Embedding(8, 4)) == 1
    assert checked_scale(scaled()) == 3


def test_scale_that_is_only_a_name_is_refused():
    class Odd(BartScaledWordEmbedding):
        def forward(self, input):
            return super().forward(input) + 1

    with pytest.raises(ValueError, match="cannot compress Odd"):
        checked_scale(Odd(8, 4, 0, embed_scale=3.0))


@pytest.mark.parametrize("options", [{"sparse": True}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_options_that_would_be_lost_are_refused(options):
    with pytest.raises(ValueError, match=r"sparse=.* max_norm=.*switch these options off"):
        checked_table(nn.Embedding(8, 4, **options))


@pytest.mark.parametrize("source", [nn.Embedding(8, 4, padding_idx=2), scaled()])
def test_dense_embedding_computes_the_same(source):
    again = dense_embedding(source.weight, source.padding_idx, checked_scale(source), type(source), None)
    ids = torch.arange(8)
    assert again.weight is source.weight
    assert type(again) is type(source)
    assert (again.num_embeddings, again.padding_idx) == (8, source.padding_idx)
    assert torch.equal(again(ids), source(ids))


@pytest.mark.parametrize(("name", "rounds"), [("gemma3", True), ("bart", False)])
def test_half_precision_scales_as_the_dense_model_does(name, rounds):
    """Gemma rounds its factor to the dtype of the table; Bart does not."""
    model = TIED[name]().bfloat16().train()
    dense = model.get_input_embeddings()
    table = AdaptiveCompressedEmbedding.from_embedding(dense, AdaCompConfig(LENGTHS, target_ratio=3))
    ids = torch.arange(VOCABULARY)
    assert table.rounds_scale == rounds
    assert torch.equal(table.train()(ids), dense(ids))


@pytest.mark.parametrize("largest", [1e-9, 1e7, 1e30])
def test_tables_of_extreme_entries_are_quoted(largest):
    table = nn.Embedding.from_pretrained(torch.linspace(-1, 1, 64).view(8, 8) * largest)
    with pytest.raises(ValueError, match=re.escape(f"largest entry of the source table is {largest:g}")):
        checked_table(table)
