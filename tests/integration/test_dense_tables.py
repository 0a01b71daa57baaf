import pytest
import torch
from architectures import TIED, UNTIED
from conftest import VOCABULARY, tiny_bert_config
from torch import nn
from transformers import BertModel, ViTConfig, ViTModel

from hf_adacomp.integration.dense_tables import dense_table, dense_tables, matching_table


@pytest.mark.parametrize(
    ("name", "owner", "shared", "heads"),
    [
        ("bert", "bert.embeddings.word_embeddings", set(), {"cls.predictions.decoder"}),
        ("gpt2", "transformer.wte", set(), {"lm_head"}),
        ("llama", "model.embed_tokens", set(), set()),
        ("t5", "shared", {"encoder.embed_tokens", "decoder.embed_tokens"}, {"lm_head"}),
    ],
)
def test_a_table_is_found_once_with_all_that_share_it(name, owner, shared, heads):
    (table,) = dense_tables({**TIED, **UNTIED}[name]())
    assert (table.name, {*table.heads}) == (owner, heads)
    assert {*table.shared} <= shared  # some releases register one module under several names
    assert table.weights == {f"{part}.weight" for part in (owner, *table.shared, *heads)}


@pytest.mark.parametrize("name", [*TIED, *UNTIED])
def test_all_places_of_a_table_have_one_weight(name):
    model = {**TIED, **UNTIED}[name]()
    for table in dense_tables(model):
        assert table.owner is model.get_submodule(table.name)
        for place, module in {**table.shared, **table.heads}.items():
            assert module is model.get_submodule(place)
            assert module.weight is table.owner.weight


def test_separate_tables_are_both_found_or_as_asked():
    model = TIED["marian-split"]()

    def names(**asked):
        return [table.name for table in dense_tables(model, **asked)]

    encoder, decoder = "model.encoder.embed_tokens", "model.decoder.embed_tokens"
    assert names() == [encoder, decoder]
    assert names(exclude=["*decoder*"]) == [encoder]
    assert names(include=["*.decoder.embed_tokens"]) == [decoder]
    assert names(include=["*embed_tokens"], exclude=["*.encoder.*"]) == [decoder]


def test_other_embeddings_may_be_asked_for(bert):
    (table,) = dense_tables(bert, include=["*position_embeddings"])
    assert table.name == "bert.embeddings.position_embeddings"


def test_patterns_that_match_nothing_are_refused(bert):
    for asked in ({"include": ["nothing"]}, {"exclude": ["*"]}):
        with pytest.raises(ValueError, match=r"no token embeddings .*(include=\['nothing'\]|exclude=\['\*'\])"):
            dense_tables(bert, **asked)


def test_a_model_without_token_embeddings_is_refused():
    model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    with pytest.raises(ValueError, match="cannot compress ViTPatchEmbeddings"):
        dense_tables(model)


def test_a_subclass_with_its_own_forward_is_refused(bert):
    class Scaled(nn.Embedding):
        def forward(self, input):
            return 2 * super().forward(input)

    bert.set_input_embeddings(Scaled(VOCABULARY, 32))
    with pytest.raises(ValueError, match="cannot compress Scaled"):
        dense_tables(bert)


def test_head_of_another_kind_or_with_its_own_weights_is_refused():
    model = TIED["gpt2"]()
    model.lm_head = nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match="not understood, a Bilinear"):
        dense_tables(model)
    model = TIED["gpt2"]()
    model.lm_head = nn.Linear(32, VOCABULARY, bias=False)
    with pytest.raises(ValueError, match=r"declares 'lm_head.weight' tied .* different tensors"):
        dense_tables(model)


def test_ties_by_way_of_a_third_are_followed():
    model = TIED["gpt2"]()
    ties = {"a.weight": "b.weight", "b.weight": "transformer.wte.weight", "lm_head.weight": "transformer.wte.weight"}
    model.all_tied_weights_keys = ties
    with pytest.raises(ValueError, match=r"declares 'a.weight' tied to 'transformer.wte.weight'"):
        dense_tables(model)


def test_sharing_that_is_not_understood_is_refused():
    model = TIED["gpt2"]()
    model.other = nn.Conv1d(1, 1, 1)
    model.other.weight = model.transformer.wte.weight
    with pytest.raises(ValueError, match=r"ties its token embeddings 'transformer.wte' to 'other', a Conv1d"):
        dense_tables(model)
    model.other = nn.Embedding(VOCABULARY, 32, padding_idx=3)
    model.other.weight = model.transformer.wte.weight
    with pytest.raises(ValueError, match=r"to 'other', a Embedding: only embeddings with the same scale"):
        dense_tables(model)


def test_ties_that_are_declared_but_not_made_yet_are_found():
    """As it is while transformers loads a model."""
    with torch.device("meta"):
        model = TIED["gpt2"]()
    model.lm_head.weight = nn.Parameter(torch.empty(VOCABULARY, 32, device="meta"))
    assert [*dense_table(model, "transformer.wte", model.transformer.wte).heads] == ["lm_head"]


@pytest.mark.parametrize("stored", ["bert.embeddings.word_embeddings", "embeddings.word_embeddings"])
def test_a_stored_table_is_found_with_and_without_a_task_head(bert, stored):
    assert matching_table(bert, stored).owner is bert.get_input_embeddings()
    bare = BertModel(tiny_bert_config())
    assert matching_table(bare, stored).owner is bare.get_input_embeddings()


@pytest.mark.parametrize("stored", ["word", "bert.encoder", "xembeddings.word_embeddings"])
def test_a_stored_table_that_the_model_lacks_is_named(bert, stored):
    with pytest.raises(ValueError, match=rf"names a compressed table '{stored}', but BertForSequenceClassification"):
        matching_table(bert, stored)
