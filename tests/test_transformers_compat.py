"""What we rely on of transformers and accelerate without a promise of its makers: a test a function."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from architectures import TIED
from torch import nn
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_adacomp import transformers_compat


def test_register_quant_method():
    class Config(QuantizationConfigMixin):
        pass

    class Quantizer(HfQuantizer):
        pass

    class Older(HfQuantizer):
        pass

    for quantizer in (Older, Quantizer):  # the last import of a package counts
        transformers_compat.register_quant_method("test-method", Config, quantizer)
    assert AUTO_QUANTIZATION_CONFIG_MAPPING.pop("test-method") is Config
    assert AUTO_QUANTIZER_MAPPING.pop("test-method") is Quantizer


def test_quantizer_of_and_set_quantizer(bert):
    assert transformers_compat.quantizer_of(bert) is None
    transformers_compat.set_quantizer(bert, "one")
    assert transformers_compat.quantizer_of(bert) == bert.hf_quantizer == "one"


def test_is_loaded(bert, tmp_path):
    """transformers marks what a file held."""
    del bert.classifier.bias
    bert.classifier.register_parameter("bias", None)
    bert.save_pretrained(tmp_path)
    assert not transformers_compat.is_loaded(torch.zeros(1))
    assert transformers_compat.is_loaded(BertForSequenceClassification.from_pretrained(tmp_path).classifier.weight)


def test_expect_in_files(bert, tmp_path):
    state = {**bert.state_dict(), "ours.weight": torch.zeros(1), "theirs.weight": torch.ones(1)}
    bert.save_pretrained(tmp_path, state_dict=state)

    class Expecting(BertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            transformers_compat.expect_in_files(self, ["ours.weight"])

    _, report = Expecting.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["unexpected_keys"]) == {"theirs.weight"}


def test_tied_weights():
    assert transformers_compat.tied_weights(TIED["gpt2"]()) == {"lm_head.weight": "transformer.wte.weight"}


def test_forget_ties_and_remember_ties():
    model = TIED["bert"]()
    before = transformers_compat.tied_weights(model)
    words = {"bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"}
    transformers_compat.forget_ties(model, "", words)
    kept = transformers_compat.tied_weights(model)
    assert kept == {a: b for a, b in before.items() if not {a, b} & words}
    assert kept  # the trained bias is tied as before
    transformers_compat.remember_ties(model, untied=False)
    assert transformers_compat.tied_weights(model) == before
    transformers_compat.forget_ties(model, "", words)
    transformers_compat.remember_ties(model, untied=True)
    assert transformers_compat.tied_weights(model) == {}


def test_embed_scale():
    assert transformers_compat.embed_scale(nn.Embedding(3, 4)) is None
    scaled = TIED["gemma3"]().get_input_embeddings()
    assert float(transformers_compat.embed_scale(scaled)) == pytest.approx(32**0.5)


def test_loaded_from(bert, tmp_path):
    assert transformers_compat.loaded_from(bert) == ""
    bert.save_pretrained(tmp_path)
    assert transformers_compat.loaded_from(BertForSequenceClassification.from_pretrained(tmp_path)) == str(tmp_path)


def test_upload_files(bert, monkeypatch):
    monkeypatch.setattr(type(bert), transformers_compat.UPLOAD_FILES, lambda model, *args, **kwargs: (args, kwargs))
    assert transformers_compat.upload_files(bert, "folder", "user/name", token="t") == (
        ("folder", "user/name"),
        {"token": "t"},
    )
    monkeypatch.undo()
    assert callable(getattr(bert, transformers_compat.UPLOAD_FILES))


def test_file_of(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert transformers_compat.file_of(str(tmp_path), "config.json") == str(tmp_path / "config.json")
    assert transformers_compat.file_of(str(tmp_path), "tokenizer.json") is None
    assert transformers_compat.file_of("nobody/nothing-at-all", "config.json") is None


def test_checkpoint_prefix(bert, tmp_path):
    rows = [{"input_ids": torch.tensor([3, 4]), "labels": 0}]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, save_steps=1, report_to="none", use_cpu=True)
    Trainer(bert, arguments, train_dataset=rows).train()
    assert (tmp_path / f"{transformers_compat.checkpoint_prefix()}-1").is_dir()


def test_add_to_log(bert, tmp_path):
    class Add(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            transformers_compat.add_to_log(state, logs, {"ours": 7})

    rows = [{"input_ids": torch.tensor([3, 4]), "labels": 0}]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, logging_steps=1, report_to="none", use_cpu=True)
    trainer = Trainer(bert, arguments, train_dataset=rows, callbacks=[Add()])
    trainer.train()
    assert all(entry["ours"] == 7 for entry in trainer.state.log_history)


def test_distributed_kind():
    AcceleratorState(cpu=True)
    assert transformers_compat.distributed_kind() == "NO"


def test_accumulates():
    accelerator, model, found = Accelerator(cpu=True, gradient_accumulation_steps=2), torch.nn.Linear(1, 1), []
    for _ in range(4):
        with accelerator.accumulate(model):
            found.append(transformers_compat.accumulates())
    assert found == [True, False, True, False]
    assert not transformers_compat.accumulates()
