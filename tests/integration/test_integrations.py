"""The libraries around transformers, the real ones: PyTorch's compilers, accelerate, PEFT, sentence-transformers."""

import copy

import pytest
import torch
from architectures import TIED
from conftest import VOCABULARY, close, tiny_bert_config
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from transformers import BertModel

from hf_adacomp import AdaCompCallback, AdaCompConfig, compress, pack

pytestmark = pytest.mark.usefixtures("quick_fit")


def packed(name, counts):
    config = AdaCompConfig(code_lengths=(4, 8, 32), target_ratio=3, codebook_dtype="int8")
    return pack(compress(TIED[name]().eval(), config, counts)).eval()


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_compiles_as_one_graph(name, counts, ids):
    model = packed(name, counts)
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=ids).logits
        assert torch.allclose(found, model(ids).logits, atol=1e-5)


def test_encoder_exports(config, counts, ids):
    model = pack(compress(BertModel(tiny_bert_config()).eval(), config, counts)).eval()
    axes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens", max=32)}
    program = torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes={"input_ids": axes})
    for texts in (ids, ids[:2, :5]):
        with torch.no_grad():
            found = program.module()(input_ids=texts).last_hidden_state
            assert torch.allclose(found, model(texts).last_hidden_state, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma3"])
def test_half_precision(name, dtype, counts, ids):
    model = packed(name, counts)
    half = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        found = half(ids).logits
        assert found.dtype == dtype
        assert torch.allclose(found.float(), model(ids).logits, atol=0.05)


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "auto"}])
def test_device_map(options, counts, ids, tmp_path):
    model = packed("gpt2", counts)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, **options)
    with torch.no_grad():
        assert close(loaded(ids.to(loaded.device)).logits.cpu(), model(ids).logits)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_gradient_checkpointing(name, counts, ids):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = packed(name, counts)
        model.config.use_cache = False
        if checkpointing:
            # The name of older releases of transformers is deprecated in newer ones.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model(ids, labels=ids).loss.backward()
        gradients.append(model.get_input_embeddings().books[2].scale.grad)
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.filterwarnings("default::FutureWarning")  # PEFT asks for deprecated names of transformers
def test_lora_on_a_packed_model(counts, ids, tmp_path):
    packed("gpt2", counts).save_pretrained(tmp_path / "packed")
    load = type(TIED["gpt2"]()).from_pretrained
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(load(tmp_path / "packed"), settings).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(tmp_path / "packed"), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        assert close(loaded(input_ids=ids).logits, expected)
        assert not torch.allclose(load(tmp_path / "packed")(ids).logits, expected, atol=1e-2)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 2 * VOCABULARY * 32


@pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")  # not ours
def test_sentence_transformer_trains_saves_and_loads(minilm, tmp_path):
    model = SentenceTransformer(minilm, device="cpu")
    encoder = model[0].auto_model
    compress(encoder, AdaCompConfig(target_ratio=40))
    texts = [f"A man is {verb} a {noun}." for verb in ("eating", "riding") for noun in ("horse", "pizza", "piano")]
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=3, report_to="none", save_strategy="no"
        ),
        train_dataset=Dataset.from_dict({"anchor": texts, "positive": texts[::-1]}),
        loss=losses.MultipleNegativesRankingLoss(model),
        callbacks=[AdaCompCallback()],
    )
    trainer.train()
    assert encoder.get_input_embeddings().phase == "packed"
    model.save_pretrained(str(tmp_path / "packed"))
    loaded = SentenceTransformer(str(tmp_path / "packed"), device="cpu")
    assert (loaded.encode(texts) == model.encode(texts)).all()
