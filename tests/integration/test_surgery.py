import pytest
import torch
from architectures import TIED
from conftest import VOCABULARY, close
from torch import nn

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding
from hf_adacomp.integration.surgery import install, put, replace_module, take_out
from hf_adacomp.integration.tables import compressed_embeddings, dense_tables
from hf_adacomp.nn.head import CompressedHead, SharedEmbedding

pytestmark = pytest.mark.usefixtures("quick_fit")
CONFIG = AdaCompConfig((4, 8, 32), target_ratio=3, codebook_dtype="int8")


def test_every_place_is_taken(counts):
    model = TIED["bart"]()
    install(model, CONFIG, counts)
    assert isinstance(model.model.shared, AdaptiveCompressedEmbedding)
    assert isinstance(model.model.encoder.embed_tokens, SharedEmbedding)
    assert isinstance(model.model.decoder.embed_tokens, SharedEmbedding)
    assert isinstance(model.lm_head, CompressedHead)
    assert not any(module.training for module in model.eval().modules())
    assert model.lm_head.embedding is model.model.decoder.embed_tokens.embedding is model.model.shared


def test_dense_heads_keep_a_copy(counts):
    model = TIED["gpt2"]()
    weight = model.lm_head.weight.detach().clone()
    (table,) = dense_tables(model)
    put(model, table, AdaptiveCompressedEmbedding.from_embedding(table.owner, CONFIG, counts), "dense")
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(model.lm_head.weight, weight)


@pytest.mark.parametrize("name", ["gpt2", "bart", "gemma3"])
def test_taken_out_it_is_tied_again(name, counts):
    model = TIED[name]().eval()
    before = dict(model.all_tied_weights_keys)
    install(model, CONFIG, counts)
    for table in compressed_embeddings(model).values():
        table.pack()
    ids = torch.arange(4, 13)[None]
    with torch.no_grad():
        expected = model(ids).logits
        take_out(model)
        assert close(model(ids).logits, expected, 1e-5)
    assert compressed_embeddings(model) == {}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert dict(model.all_tied_weights_keys) == before


def test_counts_by_name_must_name_tables(counts):
    with pytest.raises(ValueError, match=r"token_counts names \['nobody'\], but the tables to compress are"):
        install(TIED["marian-split"](), CONFIG, {"nobody": counts})
    model = TIED["marian-split"]()
    install(model, CONFIG, {"model.encoder.embed_tokens": counts})
    warm = {table.num_embeddings: not table.cold for table in compressed_embeddings(model).values()}
    assert warm == {VOCABULARY: True, 100: False}


def test_a_module_is_replaced_under_all_its_names():
    model, new = nn.Module(), nn.Identity()
    model.first = model.second = nn.Linear(2, 2)
    model.inner = nn.Sequential(model.first, nn.ReLU())
    replace_module(model, model.first, new)
    assert model.first is model.second is model.inner[0] is new
