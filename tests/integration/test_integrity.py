"""What is saved can be read again; what cannot is refused as what it is."""

import copy

import accelerate
import pytest
import torch
from architectures import TIED, UNTIED
from conftest import VOCABULARY, close
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TorchAoConfig

from hf_adacomp import AdaCompConfig, compress, decompress, pack

pytestmark = pytest.mark.usefixtures("quick_fit")
SETTINGS = AdaCompConfig((4, 8, 32), target_ratio=3, codebook_dtype="int8")


@pytest.fixture
def llama(counts) -> LlamaForCausalLM:
    return pack(compress(TIED["llama-tied"](), SETTINGS, counts)).eval()


def test_a_table_that_was_replaced_is_not_saved(packed_bert, tmp_path):
    packed_bert.set_input_embeddings(torch.nn.Embedding(VOCABULARY, 32))
    with pytest.raises(ValueError, match=r"was replaced, by a Embedding: .*decompress\(model\) first"):
        packed_bert.save_pretrained(tmp_path)


def test_a_head_of_another_table_is_not_saved(counts, tmp_path):
    model = pack(compress(TIED["gpt2"](), SETTINGS, counts))
    model.lm_head = pack(compress(TIED["gpt2"](), SETTINGS, counts)).lm_head
    with pytest.raises(ValueError, match="the output head 'lm_head' reads another table"):
        model.save_pretrained(tmp_path)


def test_a_head_of_another_width_is_not_saved(counts, tmp_path):
    model = pack(compress(UNTIED["llama"](), SETTINGS, counts))
    model.lm_head.out_features = 600
    with pytest.raises(ValueError, match=r"logits of 600 tokens.*resize_token_embeddings"):
        model.save_pretrained(tmp_path)


def test_a_compressed_head_is_as_wide_as_its_table(counts, tmp_path):
    model = pack(compress(TIED["bert"](), SETTINGS, counts))
    head = model.get_output_embeddings()
    head.out_features = VOCABULARY  # as ties set it
    with pytest.raises(ValueError, match=r"as many outputs as its table, .*; got 600"):
        head.out_features = 600
    head.bias = torch.nn.Parameter(torch.zeros(600))
    with pytest.raises(ValueError, match=r"logits of 600 tokens.*resize_token_embeddings"):
        model.save_pretrained(tmp_path)


def averaged(model):
    """A state as libraries average it: each entry in its own dtype."""
    return {name: (0.9 * value + 0.1 * value).to(value.dtype) for name, value in model.state_dict().items()}


def test_codes_that_an_average_changed_are_not_saved(llama, tmp_path):
    for name, value in averaged(llama).items():
        target = llama.state_dict()[name]
        target.copy_(value)
    with pytest.raises(ValueError, match=r"is other than what was packed.* use_buffers=False"):
        llama.save_pretrained(tmp_path)


def test_codes_that_are_no_whole_numbers_are_not_loaded(llama):
    state = {name: 0.5 * value for name, value in llama.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"is torch.float32: codes are integers"):
        llama.load_state_dict(state)


def test_a_state_that_is_given_is_saved(llama, ids, tmp_path):
    with torch.no_grad():
        before = llama(ids).logits
        given = {name: value.clone() for name, value in llama.state_dict().items()}
        llama.get_input_embeddings().codebook.scale.mul_(2)
    llama.save_pretrained(tmp_path, state_dict=given)
    assert close(type(llama).from_pretrained(tmp_path)(ids).logits, before)
    with pytest.raises(ValueError, match=r"packed.codes is missing in what is to be saved"):
        llama.save_pretrained(tmp_path, state_dict={k: v for k, v in given.items() if not k.endswith("packed.codes")})
    with pytest.raises(ValueError, match=r"is other than what was packed"):
        llama.save_pretrained(tmp_path, state_dict=averaged(llama))


def test_a_size_that_was_set_by_hand_is_told_of(llama, tmp_path):
    llama.get_input_embeddings().num_embeddings = 600
    with pytest.raises(ValueError, match=r"num_embeddings of model.embed_tokens was set to 600"):
        llama.save_pretrained(tmp_path)


def test_an_offloaded_table_is_refused_as_such(llama, ids, tmp_path):
    llama.save_pretrained(tmp_path / "packed")
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    options = {"offload_folder": tmp_path / "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", device_map={**places, "model.layers": "disk"}, **options
    )
    assert torch.allclose(loaded(ids).logits, llama(ids).logits, atol=1e-5)
    places = {**places, "model.embed_tokens": "disk", "model.layers": "cpu"}
    with pytest.raises(ValueError, match=r"offloads the compressed table 'model\.embed_tokens'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map=places, **options)
    accelerate.cpu_offload(llama, torch.device("cpu"))
    with pytest.raises(ValueError, match="offloading"):
        llama(ids)


def test_another_quantizer_stays_in_charge(ids, counts, tmp_path):
    TIED["llama-tied"]().save_pretrained(tmp_path)
    quantization = TorchAoConfig(Int8WeightOnlyConfig())
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    before = copy.deepcopy(model.config.quantization_config)
    with pytest.raises(ValueError, match="quantized already, by torchao"):
        compress(model, AdaCompConfig((4, 8, 32), target_ratio=3), counts)
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    assert model.config.quantization_config.quant_method == before.quant_method


def test_linear_layers_may_be_quantized_in_memory_but_not_saved(llama, ids, tmp_path):
    before = llama(ids).logits
    quantize_(llama, Int8WeightOnlyConfig())
    assert (llama(ids).logits - before).abs().max() < 0.1
    with pytest.raises(ValueError, match=r"Int8Tensor.*save the model before"):
        llama.save_pretrained(tmp_path)


def test_a_plain_model_again_may_be_compressed_again(llama, counts):
    model = decompress(llama)
    assert pack(compress(model, AdaCompConfig((4, 8, 32), target_ratio=3), counts)) is model
