import copy
import pickle

import numpy as np
import pytest
import torch
from architectures import TIED, UNTIED
from conftest import LENGTHS, VOCABULARY, close, same_state, tiny_bert_config
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
    MllamaForCausalLM,
    MllamaTextConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
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
from hf_adacomp.integration.vocabulary import _resized

pytestmark = pytest.mark.usefixtures("quick_fit")
SETTINGS = AdaCompConfig((4, 8, 32), target_ratio=3, codebook_dtype="int8")


def packed(name, counts, **changes):
    config = AdaCompConfig(**{"code_lengths": (4, 8, 32), "target_ratio": 3, "codebook_dtype": "int8", **changes})
    return pack(compress(TIED[name]().eval(), config, counts)).eval()


def logits(model, ids):
    with torch.no_grad():
        return model(ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})).logits


@pytest.mark.parametrize("head", ["compress", "dense"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma3", "t5", "bart", "marian"])
def test_new_tokens_are_there_and_old_ones_stay(name, head, counts, tmp_path):
    model = packed(name, counts, head=head)
    ids = torch.randint(4, VOCABULARY, (2, 5))
    before = logits(model, ids)
    assert add_tokens(model, 3) is model
    assert model.config.get_text_config().vocab_size == VOCABULARY + 3
    after = logits(model, ids)
    assert after.shape[-1] == VOCABULARY + 3
    assert torch.allclose(after[..., :VOCABULARY], before, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert close(logits(loaded, ids), after)
    assert same_state(loaded, model)
    assert logits(loaded, torch.tensor([[VOCABULARY + 2]])).isfinite().all()
    embedding = loaded.get_input_embeddings()
    assert (getattr(embedding, "embedding", embedding).code_lengths()[-3:] == 32).all()
    keep_tokens(loaded, VOCABULARY)
    assert torch.allclose(logits(loaded, ids), before, atol=1e-6)


def test_new_tokens_are_near_the_mean_and_differ(counts):
    model = add_tokens(packed("gpt2", counts, code_lengths=(4, 8, 64), target_ratio=2), 8)
    table = model.get_input_embeddings().to_embedding().weight
    mean = table[:VOCABULARY].mean(dim=0)
    distance = (table - mean).norm(dim=1)
    assert distance[VOCABULARY:].mean() < 0.5 * distance[:VOCABULARY].mean()
    assert len(table[VOCABULARY:].unique(dim=0)) == 8


def test_tokens_of_two_calls_differ(counts):
    model = add_tokens(add_tokens(packed("bert", counts), 1), 1)
    one, other = model.get_input_embeddings()(torch.tensor([VOCABULARY, VOCABULARY + 1]))
    assert not torch.equal(one, other)


def test_new_tokens_train_on(counts):
    model = add_tokens(packed("gpt2", counts), 2).train()
    before = model.get_input_embeddings()(torch.tensor([VOCABULARY])).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.full((2, 4), VOCABULARY)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(model.get_input_embeddings()(torch.tensor([VOCABULARY])), before)


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


def test_bad_numbers_are_refused(bert, config, counts):
    model = packed("gpt2", counts)
    with pytest.raises(ValueError, match="not negative; got -1"):
        add_tokens(model, -1)
    with pytest.raises(ValueError, match="cannot keep 0 of 512"):
        keep_tokens(model, 0)
    with pytest.raises(ValueError, match="cannot keep 513 of 512"):
        keep_tokens(model, VOCABULARY + 1)
    with pytest.raises(ValueError, match="while its codes are trained"):
        add_tokens(compress(bert, config, counts), 1)
    both = pack(compress(TIED["marian-split"](), AdaCompConfig(LENGTHS, target_ratio=2)))
    with pytest.raises(ValueError, match="tables of several vocabularies"):
        add_tokens(both, 1)


def test_padding_token_cannot_be_dropped(counts):
    model = packed("bert", counts)
    model.get_input_embeddings().padding_idx = 5
    with pytest.raises(ValueError, match="cannot drop the padding token 5"):
        keep_tokens(model, 5)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "bert"])
def test_listed_tokens_are_kept_in_their_order(name, counts, tmp_path):
    model = packed(name, counts)
    kept = torch.tensor([0, 1, 2, 3, *range(300, 99, -1)])
    places = torch.arange(len(kept))
    before = logits(model, kept[None, :20])
    vectors = model.get_input_embeddings()(kept)
    assert keep_tokens(model, kept) is model
    assert torch.equal(model.get_input_embeddings()(places), vectors)
    after = logits(model, places[None, :20])
    assert torch.allclose(after, before[..., kept], atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert same_state(loaded, model)
    assert loaded.config.get_text_config().vocab_size == len(kept)


def test_ids_in_configs_follow_their_tokens(counts):
    model = packed("llama-tied", counts)
    model.config.eos_token_id, model.config.bos_token_id = 9, 7
    model.generation_config.eos_token_id = [9, 7, 500]
    keep_tokens(model, [5, 0, 9, 8])
    assert (model.config.pad_token_id, model.config.eos_token_id, model.config.bos_token_id) == (1, 2, None)
    assert model.generation_config.eos_token_id == [2]
    assert model.get_input_embeddings().padding_idx == 1


def test_ids_that_generate_heeds_follow_their_tokens(counts):
    model = packed("marian", counts)
    settings = model.generation_config
    settings.bad_words_ids, settings.force_words_ids = [[511], [7, 9], [7, 300]], [[[9], [300]], [[7]]]
    settings.suppress_tokens, settings.begin_suppress_tokens = [5, 300], [300]
    settings.sequence_bias = {(9, 7): 1.5, (300,): 2.0}
    keep_tokens(model, [*range(8), 9, 511])
    assert (settings.bad_words_ids, settings.force_words_ids) == ([[9], [7, 8]], [[[7]]])
    assert (settings.suppress_tokens, settings.begin_suppress_tokens) == ([5], None)
    assert settings.sequence_bias == [[[8, 7], 1.5]]
    settings.force_words_ids = None
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=3)


def test_a_padding_token_that_positions_start_at_keeps_its_id(counts):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = RobertaModel(RobertaConfig(vocab_size=VOCABULARY, pad_token_id=1, **sizes)).eval()
    pack(compress(model, AdaCompConfig((4, 8, 32), target_ratio=3), counts))
    with pytest.raises(ValueError, match=r"counts positions from its padding token 1.*give it the place 1"):
        keep_tokens(model, [1, 0, 5])
    before = model(torch.tensor([[5, 7]])).last_hidden_state
    keep_tokens(model, [7, 1, 5])
    assert close(model(torch.tensor([[2, 0]])).last_hidden_state, before)


def test_positions_of_sines_start_at_the_padding_token_too(counts):
    model = packed("m2m100", counts)
    with pytest.raises(ValueError, match=r"counts positions from its padding token 0"):
        keep_tokens(model, [1, 0, *range(2, 12)])


def test_a_head_of_fewer_tokens_keeps_them_in_their_places():
    rows = torch.arange(3.0)[:, None]
    assert _resized(rows, torch.tensor([2, 5, 0]), 4).flatten().tolist() == [2, 1, 0, 1]


def test_ids_that_a_model_must_have_cannot_be_dropped(counts):
    """And nothing has changed then."""
    model = packed("llama-tied", counts)
    model.image_token_index = model.config.image_token_index = 9
    with pytest.raises(ValueError, match=r"cannot drop token 9, the image_token_index of LlamaForCausalLM: keep it"):
        keep_tokens(model, [0, 8])
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == VOCABULARY
    keep_tokens(model, [0, 9])
    assert model.image_token_index == model.config.image_token_index == 1


def test_configs_that_must_have_a_token_are_asked_first(counts):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = MllamaTextConfig(vocab_size=VOCABULARY, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, **sizes)
    tables = torch.cat([counts, counts[:8]])  # eight more rows, for images
    model = pack(compress(MllamaForCausalLM(config).eval(), SETTINGS, tables))
    with pytest.raises(ValueError, match=r"that MllamaTextConfig must have: keep it, too.*bos_token_id"):
        keep_tokens(model, [0, 5, 6])
    assert (model.get_input_embeddings().num_embeddings, model.config.vocab_size) == (VOCABULARY + 8, VOCABULARY)


@pytest.mark.parametrize("form", [set, dict.fromkeys, iter, np.array, lambda ids: np.array(ids, dtype=np.uint16)])
def test_ids_are_kept_in_any_form(packed_bert, form):
    tokens = form([0, 3, 7])
    assert keep_tokens(packed_bert, tokens.keys() if isinstance(tokens, dict) else tokens).config.vocab_size == 3


def test_numbers_and_vectors_of_numpy(counts):
    model = keep_tokens(packed("gpt2", counts), np.int64(100))
    vectors = model.get_input_embeddings()(torch.tensor([5, 6])).detach()
    add_tokens(model, 2, vectors=vectors.numpy())
    assert add_tokens(model, 2, vectors=vectors.tolist()).config.vocab_size == 104


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([True, False], "cannot keep"),
        ([], "cannot keep"),
        ([0, 5, 5], "different ids from 0 to 511"),
        ([0, 512], "different ids from 0 to 511"),
        ([0, -1], "different ids"),
        (torch.tensor([0.0, 1.0]), "cannot keep"),
        ([1, 2], "cannot drop the padding token 0"),
        (513, "cannot keep 513 of 512 tokens"),
        (-1, "cannot keep -1 of 512 tokens"),
        (None, "their number or their ids; got None"),
        (["a", "b"], r"their number or their ids; got \['a', 'b'\]"),
        ({0: 5, 3: 7}, "their number or their ids; got {0: 5"),
    ],
)
def test_tokens_that_cannot_be_kept_are_quoted(packed_bert, tokens, message):
    with pytest.raises(ValueError, match=message):
        keep_tokens(packed_bert, tokens)


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_new_tokens_start_at_given_vectors(name, counts):
    model = packed(name, counts, code_lengths=(4, 8, 64), target_ratio=2)
    table = model.get_input_embeddings()
    pieces = table(torch.tensor([[5, 6], [7, 8], [20, 30]])).mean(1)
    mean = table(torch.arange(VOCABULARY)).mean(0)
    add_tokens(model, 3, vectors=pieces)
    new = table(torch.arange(VOCABULARY, VOCABULARY + 3))
    assert ((new - pieces).norm(dim=1) < 0.7 * (mean - pieces).norm(dim=1)).all()


def test_vectors_of_another_shape_are_quoted(packed_bert):
    with pytest.raises(ValueError, match=r"of shape \(2, 32\); got shape \(3, 32\)"):
        add_tokens(packed_bert, 2, vectors=torch.zeros(3, 32))
    with pytest.raises(ValueError, match="finite"):
        add_tokens(packed_bert, 2, vectors=torch.full((2, 32), torch.nan))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt-neox"])
def test_heads_of_their_own_are_resized_along(name, counts, tmp_path):
    config = SETTINGS
    model = pack(compress(UNTIED[name]().eval(), config, counts)).eval()
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


def text_and_images() -> CLIPModel:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=VOCABULARY, eos_token_id=2, **sizes)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32)).eval()


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


@pytest.mark.parametrize("number", [2.0, "3", None, True])
def test_numbers_of_tokens_of_another_kind_are_quoted(packed_bert, number):
    with pytest.raises(ValueError, match=f"whole number, not negative; got {number!r}"):
        add_tokens(packed_bert, number)
