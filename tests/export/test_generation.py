"""Steps of generation in ONNX Runtime: what `generate` says, with padding on the left and keys and values handed on."""

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import VOCABULARY
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from hf_adacomp import AdaCompConfig, compress, export_onnx, pack
from hf_adacomp.export.generation import GenerationStep, graph_of

pytestmark = pytest.mark.usefixtures("quick_fit")

SIZES = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
WIDE = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "head_dim": 8}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=32, n_head=2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **WIDE, num_key_value_heads=2)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES,
            **WIDE,
            num_key_value_heads=1,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
}


@pytest.fixture(params=MODELS)
def model(request):
    settings = AdaCompConfig(code_lengths=(4, 8, 28), target_ratio=6)
    return pack(compress(MODELS[request.param]().eval(), settings, 1000 // torch.arange(1, VOCABULARY + 1)))


@torch.no_grad()
def test_steps_generate_what_the_model_generates(model, tmp_path):
    running = onnxruntime.InferenceSession(
        str(export_onnx(model, tmp_path / "step.onnx")), providers=["CPUExecutionProvider"]
    )
    inputs, outputs = ([place.name for place in places()] for places in (running.get_inputs, running.get_outputs))
    assert outputs == ["logits", *(f"present.{n}.{kind}" for n in range(2) for kind in ("key", "value"))]
    assert inputs[3:] == [name.replace("present", "past_key_values") for name in outputs[1:]]
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    settings = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False, "output_logits": True}
    wanted = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings)
    past = [np.zeros((2, shape[1], 0, shape[3]), dtype=np.float32) for shape in GenerationStep(model).shapes]
    positions, new = (mask.cumsum(1) - 1).clamp(min=0), ids
    for step in range(6):
        tokens = {"input_ids": new, "attention_mask": mask, "position_ids": positions}
        given = {name: tensor.numpy() for name, tensor in tokens.items()} | dict(zip(inputs[3:], past, strict=True))
        logits, *past = running.run(None, given)
        assert np.abs(logits[:, -1] - wanted.logits[step].numpy()).max() < 1e-4
        new = wanted.sequences[:, 7 + step : 8 + step]
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        positions = positions[:, -1:] + 1
    assert past[0].shape[2] == 7 + 5


def test_quantized_steps_run(tmp_path):
    settings = AdaCompConfig(code_lengths=(4, 8, 28), target_ratio=6)
    model = pack(compress(MODELS["llama"]().eval(), settings, 1000 // torch.arange(1, VOCABULARY + 1)))
    file = export_onnx(model, tmp_path / "step.onnx", quantize="int8")
    running = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    ids = torch.randint(3, VOCABULARY, (1, 7), generator=torch.Generator().manual_seed(0))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(7)[None]}
    past = [np.zeros((1, shape[1], 0, shape[3]), dtype=np.float32) for shape in GenerationStep(model).shapes]
    names = [place.name for place in running.get_inputs()]
    given = {name: tensor.numpy() for name, tensor in tokens.items()} | dict(zip(names[3:], past, strict=True))
    with torch.no_grad():
        expected = model(ids).logits[:, -1].flatten()
    found = torch.as_tensor(running.run(None, given)[0])[:, -1].flatten()
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.95


def test_a_step_is_of_models_that_generate(bert):
    assert not isinstance(graph_of(bert), GenerationStep)
    with pytest.raises(ValueError, match=r"MambaForCausalLM keeps a \w+ of the tokens before, not keys and values"):
        graph_of(MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1)))
