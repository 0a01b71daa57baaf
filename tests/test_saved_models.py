import pytest
from conftest import tiny_bert_config, word_tokenizer
from transformers import BertConfig, BertForTokenClassification, BertModel

from hf_adacomp.saved_models import load_model, load_tokenizer, save_model


def test_the_head_and_the_tokenizer_that_lie_there(tmp_path):
    BertForTokenClassification(tiny_bert_config(num_labels=3)).save_pretrained(tmp_path / "a")
    word_tokenizer().save_pretrained(tmp_path / "a")
    model = load_model(str(tmp_path / "a"))
    assert isinstance(model, BertForTokenClassification)
    assert model.num_labels == 3
    save_model(model, str(tmp_path / "a"), tmp_path / "b")
    assert load_tokenizer(str(tmp_path / "b"), model)("word5")["input_ids"] == [2, 9, 3]


def test_what_is_missing_is_named(tmp_path):
    BertModel(tiny_bert_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path), load_model(str(tmp_path)))
    BertConfig(architectures=["BartoModel"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="architecture 'BartoModel', which this transformers does not have"):
        load_model(str(tmp_path))
