from dataclasses import is_dataclass

import pytest
import torch
from architectures import packed
from conftest import VOCABULARY
from transformers import MllamaForCausalLM
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from hf_adacomp import AdaCompConfig, compress, keep_tokens, pack

pytestmark = pytest.mark.usefixtures("quick_fit")
SETTINGS = AdaCompConfig((4, 8, 32), target_ratio=3, codebook_dtype="int8")


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
    if not is_dataclass(config):
        pytest.skip("configs of older releases take any value")
    model = pack(compress(MllamaForCausalLM(config).eval(), SETTINGS, tables))
    with pytest.raises(ValueError, match=r"that MllamaTextConfig must have: keep it, too.*bos_token_id"):
        keep_tokens(model, [0, 5, 6])
    assert (model.get_input_embeddings().num_embeddings, model.config.vocab_size) == (VOCABULARY + 8, VOCABULARY)
