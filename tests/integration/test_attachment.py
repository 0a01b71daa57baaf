"""Parts that were compressed by themselves, and tables that users put in: the whole saves them."""

import pytest
from conftest import LENGTHS, VOCABULARY, close, tiny_bert_config
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    Trainer,
    TrainingArguments,
)

from hf_adacomp import AdaCompCallback, AdaCompConfig, AdaptiveCompressedEmbedding, compress, decompress, pack

pytestmark = pytest.mark.usefixtures("quick_fit")


class Whole(PreTrainedModel):
    """A user's model around one of transformers, with a config of its own."""

    config_class, part_class = BertConfig, BertModel

    def __init__(self, config):
        super().__init__(config)
        self.encoder = self.part_class(config)
        self.post_init()

    def forward(self, input_ids):
        return self.encoder(input_ids).last_hidden_state


@pytest.mark.parametrize("way", ["pack part", "pack whole", "callback", "loaded part"])
def test_a_whole_saves_the_table_of_a_compressed_part(bert, config, counts, ids, tmp_path, way):
    compress(bert.bert, config, counts)
    if way == "pack part":
        pack(bert.bert)
    elif way == "loaded part":
        pack(bert.bert).save_pretrained(tmp_path / "part")
        bert = BertForSequenceClassification(tiny_bert_config())
        bert.bert = BertModel.from_pretrained(tmp_path / "part")
    if way in ("pack whole", "loaded part"):
        pack(bert)
    if way == "callback":
        rows = [{"input_ids": row, "labels": i % 2} for i, row in enumerate(ids)]
        arguments = TrainingArguments(str(tmp_path), max_steps=4, report_to=[], use_cpu=True, save_strategy="no")
        Trainer(bert, arguments, train_dataset=rows, callbacks=[AdaCompCallback()]).train()
    bert.eval().save_pretrained(tmp_path / "whole")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert close(loaded(ids).logits, bert(ids).logits)
    if way != "pack part":
        assert type(decompress(bert).get_input_embeddings()) is nn.Embedding
        assert bert.bert.config.to_dict().get("quantization_config") is None


def test_a_whole_with_a_config_of_its_own_saves_parts(bert, config, counts, ids, tmp_path):
    whole = Whole(tiny_bert_config()).eval()
    whole.encoder = pack(compress(bert.bert, config, counts))
    pack(whole).save_pretrained(tmp_path)
    assert close(Whole.from_pretrained(tmp_path)(ids), whole(ids))


class WholeOfT5(Whole):
    """Around a part that has its table in two places."""

    config_class, part_class = T5Config, T5EncoderModel


def test_a_whole_saves_a_part_whose_table_is_shared(config, counts, ids, tmp_path):
    settings = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
    whole = WholeOfT5(settings).eval()
    compress(whole.encoder, config, counts)
    pack(whole).save_pretrained(tmp_path)
    assert close(WholeOfT5.from_pretrained(tmp_path)(ids), whole(ids))


def test_a_whole_that_was_never_packed_does_not_load_at_random(bert, config, counts, tmp_path):
    whole = Whole(tiny_bert_config())
    whole.encoder = pack(compress(bert.bert, config, counts))
    whole.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatched"):
        Whole.from_pretrained(tmp_path)


def test_two_parts_of_a_whole_that_was_never_packed_are_told_of(config, counts, tmp_path):
    parts = {"enc": BertModel(tiny_bert_config()), "dec": BertLMHeadModel(tiny_bert_config(is_decoder=True))}
    for name, part in parts.items():
        pack(compress(part, config, counts)).save_pretrained(tmp_path / name)
    whole = EncoderDecoderModel.from_encoder_decoder_pretrained(tmp_path / "enc", tmp_path / "dec")
    whole.save_pretrained(tmp_path / "whole")
    # Older releases of transformers do not look for quantized parts in a config, and find weights of another shape.
    with pytest.raises((ValueError, RuntimeError), match=r"holds 2 compressed .* hf_adacomp.pack\(whole\)|mismatched"):
        EncoderDecoderModel.from_pretrained(tmp_path / "whole")


@pytest.mark.parametrize("whole", [True, False])
def test_a_table_that_users_put_in_is_saved_by_pack_and_else_not_lost(whole, bert, config, counts, ids, tmp_path):
    """A model that knows nothing of it would load at random, after a report."""
    table = AdaptiveCompressedEmbedding.from_embedding(bert.get_input_embeddings(), config, counts)
    bert.set_input_embeddings(table)
    pack(bert) if whole else table.pack()
    bert.eval().save_pretrained(tmp_path)
    if whole:
        assert close(type(bert).from_pretrained(tmp_path)(ids).logits, bert(ids).logits)
    else:
        with pytest.raises(RuntimeError):
            type(bert).from_pretrained(tmp_path)


def test_parts_of_different_settings_are_told_of(counts, config):
    whole = EncoderDecoderModel(
        encoder=BertModel(tiny_bert_config()),
        decoder=BertLMHeadModel(tiny_bert_config(is_decoder=True, add_cross_attention=True)),
    )
    compress(whole.encoder, config, counts)
    compress(whole.decoder, AdaCompConfig(LENGTHS, target_ratio=16), counts)
    with pytest.raises(ValueError, match=r"parts of the EncoderDecoderModel are compressed with different settings"):
        pack(whole)
    assert whole.encoder.get_input_embeddings().phase != "packed"


def test_a_whole_that_ties_the_table_of_a_part_is_told_of(config, counts):
    whole = BertLMHeadModel(tiny_bert_config(is_decoder=True))
    compress(whole.bert, config, counts)
    with pytest.raises(ValueError, match=r"ties 'cls.* to 'bert.embeddings.word_.*', .* compress the whole"):
        pack(whole)
