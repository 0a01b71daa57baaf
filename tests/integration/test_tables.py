import pytest
from architectures import TIED, UNTIED
from conftest import VOCABULARY
from torch import nn

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding, compress
from hf_adacomp.integration.tables import (
    compressed_embeddings,
    compressed_heads,
    dense_tables,
    matching_table,
    named_modules,
    require_compressed,
    untied_heads,
)

CONFIG = AdaCompConfig((4, 8, 32), target_ratio=3, codebook_dtype="int8")


@pytest.mark.parametrize(
    ("name", "shared", "heads"),
    [
        ("gpt2", set(), {"lm_head"}),
        ("bert", set(), {"cls.predictions.decoder"}),
        ("bart", {"model.encoder.embed_tokens", "model.decoder.embed_tokens"}, {"lm_head"}),
    ],
)
def test_all_places_of_a_table_are_found(name, shared, heads):
    (table,) = dense_tables(TIED[name]())
    assert set(table.shared) == shared
    assert set(table.heads) == heads
    assert table.weights == {f"{place}.weight" for place in (table.name, *shared, *heads)}


def test_tables_of_encoder_and_decoder_apart():
    model = TIED["marian-split"]()
    tables = dense_tables(model)
    assert [table.owner.num_embeddings for table in tables] == [VOCABULARY, 100]
    (only,) = dense_tables(model, exclude=["*decoder*"])
    assert only.owner.num_embeddings == VOCABULARY


@pytest.mark.parametrize("include", ["*position_embeddings", ["*position_embeddings"]])
def test_patterns_choose_other_tables(bert, include):
    (table,) = dense_tables(bert, include=include)
    assert table.owner is bert.bert.embeddings.position_embeddings
    with pytest.raises(ValueError, match=r"found none\) for include=\['nothing'\]"):
        dense_tables(bert, include=["nothing"])


def test_heads_of_an_unknown_kind_are_named():
    model = TIED["gpt2"]()
    model.set_output_embeddings(nn.Identity())
    with pytest.raises(ValueError, match="output head that is not understood, a Identity"):
        dense_tables(model)


def test_declared_ties_must_be_made():
    model = TIED["gpt2"]()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match=r"declares 'lm_head.weight' tied .*call model.tie_weights\(\)"):
        dense_tables(model)


@pytest.mark.parametrize("stored", ["bert.embeddings.word_embeddings", "embeddings.word_embeddings"])
def test_names_match_with_or_without_the_task_head(bert, stored):
    assert matching_table(bert, stored).owner is bert.get_input_embeddings()
    assert matching_table(bert.bert, stored).owner is bert.get_input_embeddings()
    with pytest.raises(ValueError, match=r"has no nn\.Embedding of that name"):
        matching_table(bert, "decoder.word_embeddings")


def test_compressed_parts_are_found():
    model = compress(TIED["bart"](), CONFIG)
    assert list(compressed_embeddings(model)) == ["model.shared"]
    assert list(compressed_heads(model)) == ["lm_head"]
    assert untied_heads(model) == {}


def test_heads_with_weights_of_their_own_are_found():
    model = compress(TIED["gpt2"](), AdaCompConfig((4, 8, 32), target_ratio=3, codebook_dtype="int8", head="dense"))
    assert list(untied_heads(model)) == ["lm_head"]
    assert untied_heads(compress(UNTIED["llama"](), CONFIG)) == {}


def test_objects_that_hold_models_are_looked_into():
    class Holder:
        """As SetFit's model: no module itself."""

        def __init__(self):
            self.body, self.head, self.name = compress(TIED["gpt2"](), CONFIG), nn.Linear(2, 2), "holder"

    holder = Holder()
    assert {"body.transformer.wte", "head"} <= set(named_modules(holder))
    assert isinstance(require_compressed(holder)["body.transformer.wte"], AdaptiveCompressedEmbedding)


def test_no_compressed_table_is_an_error(bert):
    with pytest.raises(ValueError, match=r"BertForSequenceClassification has no compressed embedding: call compress"):
        require_compressed(bert)
