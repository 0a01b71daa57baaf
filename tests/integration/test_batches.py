import pytest
import torch
from conftest import WORDS, tiny_bert_config, word_tokenizer
from transformers import BertForMaskedLM, BertModel

from hf_adacomp.integration.batches import text_batches

TEXTS = [" ".join(WORDS[:n]) for n in (5, 1, 9, 2)]


@pytest.fixture
def model():
    return BertModel(tiny_bert_config())


def test_texts_of_like_length_are_batched(model):
    batches = text_batches(model, TEXTS, word_tokenizer(), batch_size=2)
    assert len(batches) == 2
    assert [batch["attention_mask"].sum(1).tolist() for batch in batches] == [[3, 4], [7, 11]]
    for batch in batches:
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()


def test_logits_of_a_vocabulary_make_batches_small(model):
    assert len(text_batches(model, TEXTS * 4, word_tokenizer())) == 1
    assert len(text_batches(BertForMaskedLM(model.config), TEXTS * 4, word_tokenizer())) == 4


def test_long_texts_are_cut(model):
    (batch,) = text_batches(model, TEXTS, word_tokenizer(), max_length=4)
    assert batch["input_ids"].shape == (4, 4)


def test_pairs_are_pairs_whatever_holds_them(model):
    (batch,) = text_batches(model, [["word1", "word2 word3"], ("word1", "word2")], word_tokenizer())
    words = [word_tokenizer().convert_ids_to_tokens(row) for row in batch["input_ids"]]
    assert words == [
        ["[CLS]", "word1", "[SEP]", "word2", "[SEP]", "[PAD]"],
        ["[CLS]", "word1", "[SEP]", "word2", "word3", "[SEP]"],
    ]


def test_no_padding_token_is_needed(model):
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    (batch,) = text_batches(model, TEXTS, tokenizer)
    assert torch.equal(batch["input_ids"], next(iter(text_batches(model, TEXTS, word_tokenizer())))["input_ids"])


def test_padding_beyond_the_table_is_token_0(model):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([f"new{i}" for i in range(1000)])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id > model.config.vocab_size
    (batch,) = text_batches(model, TEXTS, tokenizer)
    assert batch["input_ids"].max() < model.config.vocab_size
