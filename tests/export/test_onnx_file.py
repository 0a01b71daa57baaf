"""ONNX files of packed models: what ONNX Runtime computes, what the file holds, what is refused."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import LENGTHS, VOCABULARY, tiny_bert_config, word_tokenizer
from onnx import TensorProto
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertForMaskedLM, BertForSequenceClassification, BertModel

from hf_adacomp import AdaCompConfig, compress, export_onnx, pack
from hf_adacomp.cli import main
from hf_adacomp.export import onnx_file

pytestmark = pytest.mark.usefixtures("quick_fit")
TEXTS = ["word1 word2 word3", "word7"]
WEB = {"MatMulNBits", "DynamicQuantizeLinear", "MatMulInteger"}
"""Operators of quantized layers, which onnxruntime-web has besides those of `onnx`."""


def settings(**changes) -> AdaCompConfig:
    return AdaCompConfig(**{"code_lengths": LENGTHS, "target_ratio": 8, **changes})


@pytest.fixture
def encoder(tmp_path) -> SentenceTransformer:
    config = tiny_bert_config(num_hidden_layers=1, hidden_size=64, intermediate_size=64, vocab_size=204)
    BertModel(config).save_pretrained(tmp_path / "bert")
    word_tokenizer().save_pretrained(tmp_path / "bert")
    model = SentenceTransformer(
        modules=[Transformer(str(tmp_path / "bert")), Pooling(64, "mean"), Normalize()], device="cpu"
    )
    return pack(compress(model, settings(target_ratio=4), 1000 // torch.arange(1, 205)))


def run(file, tokens) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    given = {place.name: np.asarray(tokens[place.name], dtype=np.int64) for place in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, given), strict=True))


def padded(model) -> dict:
    return model.tokenizer(TEXTS, padding=True)


@pytest.mark.parametrize(("quantize", "name", "tolerance"), [(None, "model", 1e-5), ("int8", "model_quantized", 0.05)])
def test_sentence_models_keep_their_pooling(encoder, tmp_path, quantize, name, tolerance):
    file = export_onnx(encoder, tmp_path / "out", quantize=quantize)
    assert file == tmp_path / "out" / "onnx" / f"{name}.onnx"
    found = run(file, padded(encoder))
    assert [*found] == ["token_embeddings", "sentence_embedding"]
    assert np.abs(found["sentence_embedding"] - encoder.encode(TEXTS)).max() < tolerance
    assert found["token_embeddings"].shape == (2, 5, 64)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("word1")["input_ids"] == [2, 5, 3]
    assert [path.name for path in (tmp_path / "out" / "onnx").iterdir()] == [file.name]
    standard = {schema.name for schema in onnx.defs.get_all_schemas()}
    assert {node.op_type for node in onnx.load(file).graph.node} <= standard | WEB


def test_quantized_files_have_integer_layers_and_codes(encoder, tmp_path):
    codes = encoder[0].auto_model.get_input_embeddings().packed.codes.numpy().tobytes()
    sizes = {}
    for quantize in (None, "int8", "int4"):
        file = export_onnx(encoder, tmp_path / f"{quantize}.onnx", quantize=quantize)
        stored = onnx.load(file).graph.initializer
        assert codes in [tensor.raw_data for tensor in stored if tensor.data_type == TensorProto.UINT8]
        floats = [list(t.dims) for t in stored if t.data_type == TensorProto.FLOAT and list(t.dims) == [64, 64]]
        assert bool(floats) == (quantize is None)
        sizes[quantize] = file.stat().st_size
        assert np.abs(run(file, padded(encoder))["sentence_embedding"] - encoder.encode(TEXTS)).max() < 0.2
    assert sizes["int4"] < sizes["int8"] < sizes[None]


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantizers_take_dense_tables_and_leave_the_packed_one(encoder, tmp_path, quantize):
    plain, found = (onnx.load(export_onnx(encoder, tmp_path / "m.onnx", quantize=kind)) for kind in (None, quantize))
    stored = [{tensor.name: tensor.raw_data for tensor in model.graph.initializer} for model in (plain, found)]
    changed = {name for name, data in stored[0].items() if stored[1].get(name) != data}
    of_layers = {node.input[1] for node in plain.graph.node if "MatMul" in node.name and node.input[1] in stored[0]}
    assert changed - of_layers == {f"inner.embeddings.{name}_embeddings.weight" for name in ("position", "token_type")}
    assert "inner.embeddings.word_embeddings.packed.where" in stored[1]
    assert len(stored[1]["inner.embeddings.position_embeddings.weight_quantized"]) == 32 * 64
    assert not any("word_embeddings" in name for name in stored[1].keys() - stored[0].keys())


def test_cross_encoders_read_pairs(tmp_path):
    config = tiny_bert_config(num_hidden_layers=1, num_labels=1, vocab_size=204, type_vocab_size=2)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    word_tokenizer().save_pretrained(tmp_path / "bert")
    model = CrossEncoder(str(tmp_path / "bert"), device="cpu")
    model.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    pack(compress(model, settings(target_ratio=3), 1000 // torch.arange(1, 205)))
    pairs = [("word1 word2", "word7"), ("word3", "word4")]
    tokens = model.tokenizer(*map(list, zip(*pairs, strict=True)), padding=True)
    assert np.any(tokens["token_type_ids"])
    found = run(export_onnx(model, tmp_path / "cross.onnx"), tokens)["scores"]
    assert np.abs(found.ravel() - model.predict(pairs, activation_fn=torch.nn.Identity())).max() < 1e-5


def test_static_embeddings(tmp_path):
    vocabulary = {"[UNK]": 0, **{f"word{i}": i + 1 for i in range(200)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, torch.randn(201, 32))], device="cpu")
    pack(compress(model, settings(), 100 // torch.arange(1, 202)))
    for quantize in (None, "int8", "int4"):  # there is nothing to quantize
        found = run(export_onnx(model, tmp_path / "m.onnx", quantize=quantize), padded(model))
        assert np.allclose(found["sentence_embedding"], model.encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize("kind", [BertForSequenceClassification, BertForMaskedLM])
def test_transformers_models_with_heads(kind, counts, ids, tmp_path):
    model = pack(compress(kind(tiny_bert_config(num_hidden_layers=1)).eval(), settings(), counts))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = run(export_onnx(model, tmp_path / "model.onnx"), tokens)
    with torch.no_grad():
        assert np.allclose(found["logits"], model(**tokens).logits, atol=1e-4)


def test_the_command_writes_files_and_folders(encoder, tmp_path, capsys):
    encoder.save_pretrained(str(tmp_path / "packed"))
    assert main(["export", str(tmp_path / "packed"), str(tmp_path / "a.onnx")]) == 0
    assert main(["export", str(tmp_path / "packed"), str(tmp_path / "b"), "--quantize", "int8"]) == 0
    told = capsys.readouterr().out
    assert f"{(tmp_path / 'a.onnx').stat().st_size:,} bytes" in told
    assert (tmp_path / "b" / "onnx" / "model_quantized.onnx").is_file()
    assert (tmp_path / "b" / "tokenizer.json").is_file()
    assert (tmp_path / "b" / "config.json").is_file()


def test_what_cannot_be_exported_is_told_and_nothing_is_written(bert, packed_bert, tmp_path, monkeypatch):
    target = tmp_path / "out"
    with pytest.raises(ValueError, match="no compressed embedding"):
        export_onnx(BertModel(tiny_bert_config()), target)
    with pytest.raises(ValueError, match=r"in training form \('observe'\): export what pack\(model\) returns"):
        export_onnx(compress(BertModel(tiny_bert_config()), settings()), target)
    with pytest.raises(ValueError, match="must be None, 'int8' or 'int4'; got 'int2'"):
        export_onnx(packed_bert, target, quantize="int2")
    with pytest.raises(ValueError, match="needs a tokenizer"):
        export_onnx(packed_bert, target)

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(onnx_file, "import_module", missing)
    with pytest.raises(ValueError, match=r"needs onnx: pip install onnx onnxscript onnxruntime"):
        export_onnx(packed_bert, target)
    assert not target.exists()
    monkeypatch.undo()

    def broken(*_, **__):
        raise RuntimeError("the exporter fails")

    monkeypatch.setattr(torch.onnx, "export", broken)
    with pytest.raises(RuntimeError, match="the exporter fails"):
        export_onnx(packed_bert, tmp_path / "there" / "model.onnx")
    assert not [*(tmp_path / "there").iterdir()]
    assert bert.config.vocab_size == VOCABULARY
