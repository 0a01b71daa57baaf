import copy
import pickle

import pytest
import torch
from architectures import TIED, UNTIED, logits, packed
from conftest import VOCABULARY, close, same_state, tiny_bert_config
from transformers import (
    BertLMHeadModel,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    EncoderDecoderModel,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    OPTConfig,
    PreTrainedModel,
)

from hf_adacomp import (
    AdaCompConfig,
    AdaptiveCompressedEmbedding,
    add_tokens,
    calibrate,
    compress,
    decompress,
    keep_tokens,
    pack,
)
from hf_adacomp.integration.resizing import _resized

pytestmark = pytest.mark.usefixtures("quick_fit")
SETTINGS = AdaCompConfig((4, 8, 32), target_ratio=3, codebook_dtype="int8")


def text_and_images() -> CLIPModel:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=VOCABULARY, eos_token_id=2, **sizes)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32)).eval()


def test_resize_token_embeddings_leads_here(counts, tmp_path):
    model = packed("gpt2", counts)
    model.save_pretrained(tmp_path)
    for each in (model, copy.deepcopy(model), type(model).from_pretrained(tmp_path), pickle.loads(pickle.dumps(model))):
        assert each.resize_token_embeddings(VOCABULARY + 1, pad_to_multiple_of=8) is each.get_input_embeddings()
        assert each.config.vocab_size == VOCABULARY + 8
        each.resize_token_embeddings(VOCABULARY - 1)
        assert logits(each, torch.tensor([[1]])).shape[-1] == VOCABULARY - 1
    assert model.resize_token_embeddings().num_embeddings == VOCABULARY - 1


def test_a_size_below_the_padding_token_leaves_none(bert, config, counts):
    pack(compress(bert, config, counts))
    table, padding = bert.get_input_embeddings(), VOCABULARY - 5
    table.padding_idx = padding
    bert.resize_token_embeddings(padding)
    assert (table.padding_idx, table.zero_padding) == (None, False)
    bert.resize_token_embeddings(padding + 8)
    assert bert(torch.tensor([[padding + 7]])).logits.isfinite().all()


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt-neox"])
def test_heads_of_their_own_are_resized_along(name, counts, tmp_path):
    model = pack(compress(UNTIED[name]().eval(), SETTINGS, counts)).eval()
    ids = torch.randint(4, 100, (2, 5))
    before = logits(model, ids)
    model.resize_token_embeddings(VOCABULARY + 3)
    after = logits(model, ids)
    assert after.shape[-1] == VOCABULARY + 3
    assert torch.allclose(after[..., :VOCABULARY], before, atol=1e-6)
    assert model.train()(ids, labels=ids).loss.isfinite()
    model.eval().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert close(logits(loaded, ids), after)
    model.resize_token_embeddings(100)
    assert torch.allclose(logits(model, ids), before[..., :100], atol=1e-6)


@pytest.mark.parametrize("name", ["gemma3", "llama-tied"])
def test_losses_know_the_new_size(name, counts):
    model = packed(name, counts)
    model.resize_token_embeddings(VOCABULARY + 3)
    assert model.vocab_size == model.config.vocab_size == VOCABULARY + 3
    ids = torch.randint(4, VOCABULARY + 3, (2, 5))
    assert model(ids, labels=ids).loss.isfinite()


PARTS = {
    "bert": lambda model: model.bert,
    "llama-tied": lambda model: model.model,
    "gpt2": lambda model: model.transformer,
}


@pytest.mark.parametrize("total", [VOCABULARY + 20, VOCABULARY - 20])
@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_parts_are_resized_with_the_heads_that_read_them(name, total, counts, tmp_path):
    model = packed(name, counts)
    ids = torch.randint(4, VOCABULARY - 20, (2, 5))
    before, smaller = logits(model, ids), min(total, VOCABULARY)
    PARTS[name](model).resize_token_embeddings(total)
    after = logits(model, ids)
    assert after.shape[-1] == total
    assert torch.allclose(after[..., :smaller], before[..., :smaller], atol=1e-6)
    model.save_pretrained(tmp_path)
    assert close(logits(type(model).from_pretrained(tmp_path).eval(), ids), after)


def test_a_part_whose_head_has_a_bias_is_not_resized_alone(counts, tmp_path):
    model = packed("bert", counts)
    model.bert.resize_token_embeddings(VOCABULARY + 20)
    with pytest.raises(ValueError, match=rf"gives logits of {VOCABULARY} tokens, but the table has {VOCABULARY + 20}"):
        model.save_pretrained(tmp_path)


def test_a_part_that_shares_its_table_is_not_resized_alone(counts):
    with pytest.raises(ValueError, match=r"T5Stack shares its token table .* resize the whole model"):
        packed("t5", counts).encoder.resize_token_embeddings(VOCABULARY + 20)


@torch.no_grad()
def test_models_without_input_embeddings_of_their_own(counts, tmp_path):
    inputs = {"input_ids": torch.randint(4, 100, (2, 5)), "pixel_values": torch.randn(2, 3, 8, 8)}
    model = text_and_images()
    if not isinstance(model.text_model, PreTrainedModel):
        pytest.skip("to this release of transformers, the text part of CLIP is no model with input embeddings")
    compress(model, SETTINGS)
    pack(calibrate(model, [{**inputs, "return_loss": True}] * 2, show_progress=False))
    before = model(**inputs).logits_per_text
    keep_tokens(add_tokens(model, 3), 100)
    assert model.config.text_config.vocab_size == model.text_model.get_input_embeddings().num_embeddings == 100
    model.save_pretrained(tmp_path)
    assert torch.allclose(CLIPModel.from_pretrained(tmp_path)(**inputs).logits_per_text, before, atol=1e-5)


def test_models_that_leave_resizing_to_their_parts_say_so(counts):
    encoder, decoder = (tiny_bert_config(is_decoder=decodes, add_cross_attention=decodes) for decodes in (False, True))
    model = EncoderDecoderModel(encoder=BertModel(encoder), decoder=BertLMHeadModel(decoder))
    pack(compress(model, SETTINGS, counts))
    with pytest.raises(ValueError, match=r"does not know how to resize .* keep_tokens\(model.decoder, ids\)"):
        keep_tokens(model, 100)
    assert keep_tokens(model.decoder, 100).get_input_embeddings().num_embeddings == 100


def test_a_second_table_by_token_is_resized_along(counts, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "head_dim": 16, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    layers = {
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["full_attention"] * 2,
    }
    both = {"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY}
    model = Gemma3nForCausalLM(Gemma3nTextConfig(**sizes, **more, **layers, **both)).eval()
    settings = AdaCompConfig((4, 8, 16), target_ratio=1.5, codebook_dtype="int8")
    pack(compress(model, settings, counts, include=["*embed_tokens*"]))
    keep_tokens(model, 100).save_pretrained(tmp_path)
    ids = torch.randint(4, 100, (2, 5))
    assert close(logits(Gemma3nForCausalLM.from_pretrained(tmp_path).eval(), ids), logits(model, ids))


@pytest.mark.parametrize("change", [lambda model: add_tokens(model, 2), lambda model: keep_tokens(model, 10)])
def test_other_tables_are_no_vocabulary(counts, change):
    model = pack(compress(TIED["bert"](), AdaCompConfig((4, 8), target_ratio=2), include=["*position*"]))
    with pytest.raises(ValueError, match=r"no table of token vectors is compressed .*position_embeddings"):
        change(model)
    with pytest.raises(ValueError, match=r"is not compressed: model.resize_token_embeddings"):
        change(TIED["bert"]())
    whole = torch.nn.Module()
    whole.table = AdaptiveCompressedEmbedding.from_embedding(torch.nn.Embedding(VOCABULARY, 32), SETTINGS, counts)
    whole.table.pack()
    for verb in (change, decompress):
        with pytest.raises(ValueError, match=r"has compressed tables, \['table'\], but no transformers model"):
            verb(whole)


def test_a_head_of_fewer_tokens_keeps_them_in_their_places():
    rows = torch.arange(3.0)[:, None]
    assert _resized(rows, torch.tensor([2, 5, 0]), 4).flatten().tolist() == [2, 1, 0, 1]


def test_the_size_that_it_has_is_no_change_in_training_either(bert, config, counts):
    table = compress(bert, config, counts).get_input_embeddings()
    assert bert.resize_token_embeddings() is bert.resize_token_embeddings(VOCABULARY) is table
    with pytest.raises(ValueError, match="cannot change while its codes are trained"):
        bert.resize_token_embeddings(VOCABULARY + 1)


def test_configs_of_parts_with_tables_of_their_own_follow(config, counts, tmp_path):
    small = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = InstructBlipConfig(
        vision_config={**small, "intermediate_size": 48, "image_size": 8, "patch_size": 4},
        qformer_config={**small, "intermediate_size": 48, "encoder_hidden_size": 32, "max_position_embeddings": 16},
        text_config=OPTConfig(**small, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=16).to_dict(),
        num_query_tokens=4,
        image_token_index=5,
    )
    model = pack(compress(InstructBlipForConditionalGeneration(settings), config, counts))
    model.resize_token_embeddings(VOCABULARY + 8)
    model.save_pretrained(tmp_path)
    loaded = InstructBlipForConditionalGeneration.from_pretrained(tmp_path)
    assert same_state(loaded, model)
    assert loaded.config.qformer_config.vocab_size == loaded.config.text_config.vocab_size == VOCABULARY + 8
