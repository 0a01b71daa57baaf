import copy
import re

import pytest
import torch
from conftest import LENGTHS, VOCABULARY, close, tiny_bert_config
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoConfig,
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


@pytest.mark.parametrize("config", [{"target_ratio": 3}, AdaCompConfig, 40, None])
def test_settings_must_be_a_config(bert, config):
    with pytest.raises(ValueError, match=r"config must be an AdaCompConfig, such as .*; got "):
        compress(bert, config)


def test_settings_that_were_changed_are_checked_and_save(bert, counts, ids, tmp_path):
    config = AdaCompConfig(LENGTHS)
    config.update(target_ratio=32, codebook_dtype="int3")
    with pytest.raises(ValueError, match=r"codebook_dtype must be .* got 'int3'"):
        compress(bert, config, counts)
    config.codebook_dtype = "int8"
    pack(compress(bert, config, counts)).save_pretrained(tmp_path)
    assert close(type(bert).from_pretrained(tmp_path)(ids).logits, bert(ids).logits)


def test_a_dense_model_of_a_compressed_config_can_be_compressed(packed_bert, counts, tmp_path):
    packed_bert.save_pretrained(tmp_path)
    student = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tmp_path))
    pack(compress(student, AdaCompConfig(LENGTHS, target_ratio=32), counts)).save_pretrained(tmp_path / "student")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").get_input_embeddings().packed


def test_a_dense_model_of_a_compressed_config_is_named_when_it_is_loaded(packed_bert, tmp_path):
    packed_bert.save_pretrained(tmp_path)
    AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tmp_path)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a dense table, bert\..*weight of .* Take quantization_config out"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_dequantize_decompresses(packed_bert, ids, tmp_path):
    logits = packed_bert(ids).logits
    assert packed_bert.dequantize() is packed_bert
    assert type(packed_bert.get_input_embeddings()) is nn.Embedding
    assert close(packed_bert(ids).logits, logits)
    packed_bert.save_pretrained(tmp_path)
    assert close(type(packed_bert).from_pretrained(tmp_path)(ids).logits, logits)


def test_dequantize_takes_a_dtype(packed_bert):
    assert packed_bert.dequantize(dtype=torch.float16).get_input_embeddings().weight.dtype == torch.float16


def test_dequantize_wants_packed_tables(bert, config):
    with pytest.raises(ValueError, match=r"still in training: pack\(model\)"):
        compress(bert, config).dequantize()


def test_counts_of_a_counter_are_told_of(bert, config):
    with pytest.raises(ValueError, match=r"token_counts names \['1', '2'\], but the tables .* are a tensor \(V,\)"):
        compress(bert, config, {1: 5, 2: 3})


@pytest.mark.parametrize("strict", [True, False])
def test_a_dense_model_refuses_the_state_of_a_compressed_one(bert, config, counts, strict):
    compress(bert, config, counts)
    for state in (bert.state_dict(), pack(bert).state_dict()):
        with pytest.raises(RuntimeError, match=r"size mismatch for bert.embeddings.word_embeddings.weight"):
            BertForSequenceClassification(tiny_bert_config()).load_state_dict(state, strict=strict)
    copied = copy.deepcopy(bert)
    assert copied.load_state_dict(bert.state_dict()) == ([], [])
    assert not nn.ModuleDict({"whole": bert}).state_dict()["whole.bert.embeddings.word_embeddings.weight"].numel()


class Pair(nn.Module):
    """Two models that a user trains together."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second


def test_models_stay_as_they_were_where_a_later_one_is_refused(config, counts):
    pair = Pair(BertModel(tiny_bert_config()), BertModel(tiny_bert_config(vocab_size=8)))
    before, weight = state(pair), pair.first.get_input_embeddings().weight
    with pytest.raises(ValueError, match="of 8 x 32"):
        compress(pair, config)
    assert pair.first.get_input_embeddings().weight is weight
    assert unchanged(pair, before)


def test_a_tie_outside_of_the_transformers_model_is_named(config, counts):
    pair = Pair(BertModel(tiny_bert_config()), nn.Linear(32, VOCABULARY, bias=False))
    pair.second.weight = pair.first.get_input_embeddings().weight
    with pytest.raises(ValueError, match=r"'embeddings.word_embeddings', .* of the BertModel, is also .* of 'second'"):
        compress(pair, config, counts)
    assert pair.second.weight is pair.first.get_input_embeddings().weight


@pytest.mark.parametrize("what", ["weight", "module"])
def test_a_table_of_two_models_is_named(config, counts, what):
    pair = Pair(BertModel(tiny_bert_config()), BertForSequenceClassification(tiny_bert_config()))
    if what == "weight":
        pair.second.get_input_embeddings().weight = pair.first.get_input_embeddings().weight
    else:
        pair.second.set_input_embeddings(pair.first.get_input_embeddings())
    with pytest.raises(ValueError, match="of the BertModel, is also the weight of"):
        compress(pair, config, counts)


def test_a_whole_that_is_named_after_its_part_is_compressed_once(bert, config, counts):
    pair = pack(compress(Pair(bert.bert, bert), config, counts))
    assert pair.first.get_input_embeddings() is pair.second.get_input_embeddings()
    assert pair.first.get_input_embeddings().phase == "packed"


@pytest.mark.parametrize("ratio", [32, 16])
def test_models_of_one_config_are_saved_each_with_its_own_layout(config, counts, ids, tmp_path, ratio):
    shared = tiny_bert_config()
    first, second = BertModel(shared).eval(), BertModel(shared).eval()
    compress(first, config, counts)
    compress(second, AdaCompConfig(LENGTHS, target_ratio=ratio), counts.flip(0))
    for name, model in (("first", pack(first)), ("second", pack(second)), ("again", first)):
        model.save_pretrained(tmp_path / name)
        loaded = BertModel.from_pretrained(tmp_path / name)
        assert close(loaded(ids).last_hidden_state, model(ids).last_hidden_state)


def test_names_may_be_those_of_the_whole_object(config, counts):
    pair = Pair(BertModel(tiny_bert_config()), BertModel(tiny_bert_config()))
    place = "embeddings.word_embeddings"
    given = {f"first.{place}": counts, f"second.{place}": counts.flip(0)}
    compress(pair, config, given, include=[f"first.{place}", f"second.{place}"])
    for model, expected in ((pair.first, counts), (pair.second, counts.flip(0))):
        assert torch.equal(model.get_input_embeddings().token_counts(), expected)


def test_untied_by_the_config_is_untied(config, counts):
    model = BertLMHeadModel(tiny_bert_config(is_decoder=True))
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    with pytest.raises(ValueError, match=r"or set config.tie_word_embeddings=False, before compress"):
        compress(model, config, counts)
    model.config.tie_word_embeddings = False
    pack(compress(model, config, counts))
    assert type(model.get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize("ratio", [40, 100])
def test_the_largest_ratio_of_a_static_model_fits(ratio):
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(512)}, unk_token="w0"))
    settings = AdaCompConfig((64, 128), target_ratio=ratio)
    with pytest.raises(ValueError, match=rf"target_ratio={ratio} cannot be met: lengths of vectors") as caught:
        compress(SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=256)]), settings)
    settings.target_ratio = float(re.search(r"largest ratio that fits is ([\d.]+)", str(caught.value))[1])
    compress(SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=256)]), settings)
