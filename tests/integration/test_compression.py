import copy

import pytest
import torch
from conftest import LENGTHS, VOCABULARY
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    ViTConfig,
    ViTModel,
)

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding, compress, decompress, pack

pytestmark = pytest.mark.usefixtures("quick_fit")


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_compress_works_in_place_and_leaves_the_users_config_alone(bert, config, counts):
    settings = config.to_dict()
    assert compress(bert, config, counts) is bert
    assert isinstance(bert.get_input_embeddings(), AdaptiveCompressedEmbedding)
    pack(bert)
    assert config.to_dict() == settings


def test_counts_may_wait_for_the_callback(bert, config):
    compress(bert, config)
    assert not bert.get_input_embeddings().training_state.warm


@pytest.mark.parametrize("token_counts", [torch.ones(7), -torch.ones(VOCABULARY)])
def test_failure_leaves_the_model_as_it_was(bert, config, token_counts):
    before = state(bert)
    with pytest.raises(ValueError, match="token_counts must"):
        compress(bert, config, token_counts)
    assert type(bert.get_input_embeddings()) is nn.Embedding
    assert unchanged(bert, before)
    assert not hasattr(bert.config, "quantization_config")


def test_impossible_ratio_leaves_the_model_as_it_was(bert):
    before = state(bert)
    with pytest.raises(ValueError, match="largest ratio that fits"):
        compress(bert, AdaCompConfig(LENGTHS, target_ratio=1000))
    assert unchanged(bert, before)


def test_refuses_a_second_time(bert, config):
    compress(bert, config)
    with pytest.raises(ValueError, match="compressed already"):
        compress(bert, config)


def test_refuses_a_model_without_token_embeddings(config):
    model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    with pytest.raises(ValueError, match="cannot compress ViTPatchEmbeddings"):
        compress(model, config)


def test_refuses_a_plain_module_and_points_to_from_embedding(config):
    with pytest.raises(ValueError, match=r"got Sequential.*from_embedding"):
        compress(nn.Sequential(nn.Embedding(3, 3)), config)


def test_refuses_a_subclass_with_its_own_forward(bert, config):
    class Scaled(nn.Embedding):
        def forward(self, input):
            return 2 * super().forward(input)

    bert.set_input_embeddings(Scaled(VOCABULARY, 32))
    with pytest.raises(ValueError, match="cannot compress Scaled"):
        compress(bert, config)


def test_refuses_nan_in_the_table(bert, config):
    with torch.no_grad():
        bert.get_input_embeddings().weight[5, 3] = float("nan")
    with pytest.raises(ValueError, match="row of token 5"):
        compress(bert, config)


@pytest.mark.parametrize("verb", [pack, decompress])
def test_verbs_need_a_compressed_model(bert, verb):
    with pytest.raises(ValueError, match="call compress"):
        verb(bert)


def test_decompress_needs_a_packed_model(bert, config, counts):
    compress(bert, config, counts)
    with pytest.raises(ValueError, match=r"still in training: pack\(model\)"):
        decompress(bert)


def test_decompressed_model_is_plain_and_loads_without_us(packed_bert, ids, tmp_path):
    expected = packed_bert(ids).logits
    plain = decompress(packed_bert)
    assert type(plain.get_input_embeddings()) is nn.Embedding
    assert torch.allclose(plain(ids).logits, expected, atol=1e-6)
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert isinstance(AutoModelForSequenceClassification.from_pretrained(tmp_path), BertForSequenceClassification)


def test_a_compressed_model_can_be_copied(bert, config, counts, ids):
    compress(bert, config, counts)
    twin = copy.deepcopy(bert)
    pack(bert)
    assert twin.get_input_embeddings().phase == "select"
    assert torch.equal(pack(twin)(ids).logits, bert(ids).logits)


@pytest.mark.parametrize("head", ["compress", "dense"])
def test_ties_are_asked_of_the_part_that_holds_the_head(head, tmp_path):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = BertLMHeadModel(BertConfig(is_decoder=True, add_cross_attention=True, intermediate_size=48, **sizes))
    model = EncoderDecoderModel(encoder=BertModel(BertConfig(intermediate_size=48, **sizes)), decoder=decoder).eval()
    ids = torch.randint(4, 100, (2, 7))
    pack(compress(model, AdaCompConfig((4, 8, 32), target_ratio=3, codebook_dtype="int8", head=head)))
    expected = model(input_ids=ids, decoder_input_ids=ids).logits
    for form in ("packed", "plain"):
        if form == "plain":
            decompress(model)
        model.save_pretrained(tmp_path / form)
        loaded = EncoderDecoderModel.from_pretrained(tmp_path / form).eval()
        assert torch.allclose(loaded(input_ids=ids, decoder_input_ids=ids).logits, expected, atol=1e-4)
