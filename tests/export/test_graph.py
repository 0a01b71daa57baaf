import pytest
import torch
from conftest import VOCABULARY, tiny_bert_config, word_tokenizer
from sentence_transformers import MultiVectorEncoder, SparseEncoder
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_adacomp.export.graph import Graph

GPT2 = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)


@pytest.mark.parametrize(
    ("model", "outputs"),
    [
        (lambda: BertModel(tiny_bert_config()), ("last_hidden_state",)),
        (lambda: BertForSequenceClassification(tiny_bert_config()), ("logits",)),
        (lambda: BertForMaskedLM(tiny_bert_config()), ("logits",)),
        (lambda: GPT2LMHeadModel(GPT2), ("logits",)),
    ],
)
def test_outputs_are_those_of_the_model(model, outputs, ids):
    model = model().eval()
    graph, mask = Graph(model), torch.ones_like(ids)
    assert graph.outputs == outputs
    assert graph.num_tokens == VOCABULARY
    with torch.no_grad():
        (found,) = graph(ids, mask)
        assert torch.allclose(found, model(ids, attention_mask=mask)[outputs[0]], atol=1e-5)


def test_the_model_is_left_as_it_is(bert):
    attention = bert.config._attn_implementation
    Graph(bert.train())
    assert bert.training
    assert bert.config._attn_implementation == attention


def test_texts_of_several_vectors_have_those_of_their_tokens(tmp_path):
    BertModel(tiny_bert_config()).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    assert Graph(MultiVectorEncoder(str(tmp_path), device="cpu")).outputs == ("token_embeddings",)


def test_a_pooling_that_fixes_the_length_is_refused(tmp_path):
    BertForMaskedLM(tiny_bert_config()).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"SparseEncoder fixes the length.* export_onnx\(model\[0\].auto_model"):
        Graph(SparseEncoder(str(tmp_path), device="cpu"))


def test_several_graphs_are_refused():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    with pytest.raises(ValueError, match="and is not exported"):
        Graph(T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes)))
