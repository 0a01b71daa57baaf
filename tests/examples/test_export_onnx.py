"""Packed encoders in ONNX: what runtime and PyTorch compute, and what the file holds."""

import json

import onnx
import pytest
import torch
from conftest import tiny_bert_config
from onnx import TensorProto
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, BertModel

from hf_adacomp import AdaCompConfig, compress, pack

pytestmark = pytest.mark.usefixtures("quick_fit")


@pytest.fixture
def bert():
    """One layer: what is exported layer by layer takes its time."""
    return BertForSequenceClassification(tiny_bert_config(num_hidden_layers=1)).eval()


def initializers(file):
    return {tensor.name: tensor for tensor in onnx.load(file).graph.initializer}


@pytest.mark.parametrize(
    ("lengths", "codebook_dtype"),
    [((4, 8, 20), "int4"), ((16, 32), "int8"), ((24,), "float16"), ((3, 5, 7, 9, 11), "int4")],
)
def test_any_layout_agrees(example, bert, counts, lengths, codebook_dtype, tmp_path, monkeypatch):
    config = AdaCompConfig(code_lengths=lengths, target_ratio=5, codebook_dtype=codebook_dtype)
    pack(compress(bert, config, counts)).save_pretrained(tmp_path / "packed")
    options = ["--model_name_or_path", str(tmp_path / "packed"), "--onnx_file", str(tmp_path / "model.onnx")]
    monkeypatch.setattr(example("export_onnx"), "SHAPES", ((1, 1), (1, 7), (3, 11)))
    assert example("export_onnx").main(options)["largest_difference"] < 1e-4


def test_real_encoder_stays_small(example, minilm, tmp_path, monkeypatch):
    monkeypatch.setattr(example("export_onnx"), "SHAPES", ((1, 16), (3, 9)))
    model = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=2, num_hidden_layers=2)
    model.save_pretrained(tmp_path / "dense")
    pack(compress(model, AdaCompConfig(target_ratio=80))).save_pretrained(tmp_path / "packed")
    given = {
        "model_name_or_path": tmp_path / "packed",
        "dense_model_name_or_path": tmp_path / "dense",
        "onnx_file": tmp_path / "model.onnx",
        "json_out": tmp_path / "figures.json",
        "repeats": 1,
    }
    figures = example("export_onnx").main([str(word) for name, value in given.items() for word in (f"--{name}", value)])
    assert figures == json.loads((tmp_path / "figures.json").read_text())
    assert figures["largest_difference"] < 1e-4
    assert figures["onnx_bytes"] < 1.01 * figures["safetensors_bytes"]
    assert figures["onnx_bytes"] < 0.3 * figures["dense_onnx_bytes"]
    stored = initializers(tmp_path / "model.onnx")
    codes = model.get_input_embeddings().packed.codes
    octets = [tensor.raw_data for tensor in stored.values() if tensor.data_type == TensorProto.UINT8]
    assert codes.numpy().tobytes() in octets
    assert all(list(tensor.dims) != [30522, 384] for tensor in stored.values())


def test_a_wrong_file_is_told(example, packed_bert, tmp_path, monkeypatch):
    packed_bert.save_pretrained(tmp_path)
    module = example("export_onnx")
    monkeypatch.setattr(module, "SHAPES", ((1, 7),))
    export = module.export_onnx

    def export_another(model, file):
        export(model, file)
        with torch.no_grad():
            model.classifier.bias += 1

    monkeypatch.setattr(module, "export_onnx", export_another)
    options = ["--model_name_or_path", str(tmp_path), "--onnx_file", str(tmp_path / "model.onnx")]
    with pytest.raises(ValueError, match="differs from PyTorch by 1"):
        module.main(options)


def test_bare_encoder(example, config, counts, tmp_path, monkeypatch):
    pack(compress(BertModel(tiny_bert_config(num_hidden_layers=1)), config, counts)).save_pretrained(tmp_path)
    module = example("export_onnx")
    monkeypatch.setattr(module, "SHAPES", ((2, 9),))
    module.main(["--model_name_or_path", str(tmp_path), "--onnx_file", str(tmp_path / "model.onnx")])
    (output,) = onnx.load(tmp_path / "model.onnx").graph.output
    assert [axis.dim_value for axis in output.type.tensor_type.shape.dim] == [0, 0, 32]
