import pytest
from architectures import TIED, UNTIED

from hf_adacomp import AdaCompConfig, compress
from hf_adacomp.integration.compressed_tables import (
    compressed_embeddings,
    compressed_heads,
    require_compressed,
    untied_heads,
)
from hf_adacomp.nn.sharing import SharedEmbedding

pytestmark = pytest.mark.usefixtures("quick_fit")


def settings(**changes) -> AdaCompConfig:
    return AdaCompConfig(**{"code_lengths": (4, 8, 32), "target_ratio": 3, "codebook_dtype": "int8", **changes})


def test_compressed_tables_and_heads_are_found_by_name(counts):
    model = compress(TIED["bart"](), settings(), counts)
    (table,) = require_compressed(model).values()
    (head,) = compressed_heads(model).values()
    assert head is model.get_output_embeddings()
    assert head.embedding is table
    assert compressed_embeddings(model) == require_compressed(model)
    assert all(m.embedding is table for m in model.modules() if isinstance(m, SharedEmbedding))


def test_a_model_without_compressed_tables_is_refused_by_its_class(bert):
    assert compressed_embeddings(bert) == compressed_heads(bert) == {}
    with pytest.raises(ValueError, match="BertForSequenceClassification has no compressed embedding: call compress"):
        require_compressed(bert)


def test_untied_heads_are_those_that_kept_their_own_weights(counts):
    model = compress(TIED["gpt2"](), settings(head="dense"), counts)
    assert untied_heads(model) == {"lm_head": model.lm_head}
    assert untied_heads(compress(TIED["gpt2"](), settings(), counts)) == {}
    assert untied_heads(compress(UNTIED["llama"](), settings(), counts)) == {}
    assert untied_heads(TIED["gpt2"]()) == {}
