import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import TIED, UNTIED
from conftest import LENGTHS, VOCABULARY, LargestTensor, close, same_state, tiny_bert_config
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForSequenceClassification,
    DistilBertConfig,
    ElectraConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding, compress, pack, size_report
from hf_adacomp.config import CODEBOOK_DTYPES, FLOAT_DTYPES, FORMAT_VERSION
from hf_adacomp.integration.dense_tables import dense_tables
from hf_adacomp.nn.loading import UNITS

pytestmark = pytest.mark.usefixtures("quick_fit")

small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": VOCABULARY}
ARCHITECTURES = {
    "bert": tiny_bert_config(),
    "distilbert": DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_layers=1, n_heads=2, hidden_dim=48),
    "roberta": RobertaConfig(hidden_size=32, **small),
    "electra": ElectraConfig(embedding_size=32, hidden_size=16, **small),
    "xlm-roberta": XLMRobertaConfig(hidden_size=32, **small),
}
TASKS = [AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering]


def outputs(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    return [value for value in model(ids).to_tuple() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_stock_loader_gives_back_every_bit(architecture, task, config, counts, ids, tmp_path):
    model = pack(compress(task.from_config(ARCHITECTURES[architecture]), config, counts)).eval()
    expected = outputs(model, ids)
    model.save_pretrained(tmp_path)
    loaded = task.from_pretrained(tmp_path)
    assert all(close(a, b) for a, b in zip(outputs(loaded, ids), expected, strict=True))
    assert same_state(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    first, again = (ours(folder) for folder in (tmp_path, tmp_path / "again"))
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) and again[name].dtype == first[name].dtype for name in first)


def test_loads_with_the_config_of_a_loaded_model(packed_bert, tmp_path):
    packed_bert.save_pretrained(tmp_path)
    first = BertForSequenceClassification.from_pretrained(tmp_path)
    for known in (packed_bert, first):
        second = BertForSequenceClassification.from_pretrained(tmp_path, config=known.config)
        assert same_state(second, first)
    assert second.config.quantization_config == first.config.quantization_config


def ours(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the compressed table in a saved model, by name under the embedding's prefix."""
    tensors = load_file(folder / "model.safetensors")
    return {name.split("word_embeddings.")[1]: tensors[name] for name in tensors if "word_embeddings." in name}


@pytest.mark.parametrize("packed", [True, False])
def test_chosen_code_lengths_are_in_the_file(bert, counts, ids, tmp_path, packed):
    """`code_lengths="auto"` stays in the config; each table's own lengths come back with it."""
    model = compress(bert, AdaCompConfig(target_ratio=20), counts).eval()
    lengths = model.get_input_embeddings().config.ladder
    if packed:
        pack(model)
    else:
        model.get_input_embeddings().step(0.2)
        model.eval()
    expected = outputs(model, ids)
    model.save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.quantization_config.code_lengths == "auto"
    assert loaded.get_input_embeddings().config.ladder == lengths
    assert all(close(a, b) for a, b in zip(outputs(loaded, ids), expected, strict=True))
    assert same_state(loaded, model)


@pytest.mark.parametrize("codebook_dtype", CODEBOOK_DTYPES)
def test_every_codebook_dtype_survives_the_file(codebook_dtype, bert, counts, ids, tmp_path):
    pack(compress(bert, AdaCompConfig(LENGTHS, target_ratio=12, codebook_dtype=codebook_dtype), counts))
    expected = bert(ids).logits
    bert.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")["bert.embeddings.word_embeddings.codebook.weight"]
    assert stored.dtype == {"int4": torch.uint8, "int8": torch.int8, **FLOAT_DTYPES}[codebook_dtype]
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    assert close(loaded(ids).logits, expected)


def test_file_holds_the_documented_tensors_and_the_reported_bytes(packed_bert, tmp_path):
    packed_bert.save_pretrained(tmp_path)
    tensors, table = load_file(tmp_path / "model.safetensors"), ours(tmp_path)
    books = {f"codebook.{part}" for part in ("weight", "scale", "bias")}
    assert table.keys() == {"packed.length_indices", "packed.codes", "weight", UNITS} | books
    assert table["weight"].numel() == 0
    assert sum(tensor.nbytes for tensor in table.values()) == size_report(packed_bert).total_bytes
    header = 8 + int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert (tmp_path / "model.safetensors").stat().st_size == header + total
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "adacomp"
    assert stored["format_version"] == FORMAT_VERSION
    assert sum(stored["tables"]["bert.embeddings.word_embeddings"]["tokens_per_length"]) == VOCABULARY


def test_loads_without_a_task_head_and_with_another(packed_bert, ids, tmp_path):
    expected = packed_bert.bert(ids).last_hidden_state
    packed_bert.save_pretrained(tmp_path)
    assert close(AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state, expected)
    other = AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert close(other.bert(ids).last_hidden_state, expected)
    AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "bare")
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bare")
    assert close(back.bert(ids).last_hidden_state, expected)


def test_loading_and_running_never_makes_a_dense_table(packed_bert, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the mode sees its own thread only
    packed_bert.save_pretrained(tmp_path)
    with LargestTensor() as seen:
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        model(torch.tensor([[1, 2, 3]]))
    assert 0 < seen.most < VOCABULARY * 32 / 2
    with LargestTensor() as seen:
        AutoModelForSequenceClassification.from_config(tiny_bert_config())
    assert seen.most >= VOCABULARY * 32  # what it would have seen


def test_compresses_while_loading(bert, config, ids, tmp_path):
    bert.save_pretrained(tmp_path / "dense")
    settings = config.to_dict()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense", quantization_config=config)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, AdaptiveCompressedEmbedding)
    assert torch.equal(embedding.training_state.source, bert.get_input_embeddings().weight)
    pack(model).save_pretrained(tmp_path / "packed")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    assert close(loaded(ids).logits, model(ids).logits)
    assert config.to_dict() == settings


@pytest.mark.parametrize("fraction", [0.2, 0.7])
def test_training_form_comes_back_whole(bert, config, counts, ids, tmp_path, fraction):
    embedding = compress(bert, config, counts).get_input_embeddings()
    embedding.step(fraction)
    bert.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    twin = loaded.get_input_embeddings()
    assert twin.phase == embedding.phase
    assert twin.temperature == embedding.temperature
    saved = bert.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    trainable = {name for name, p in bert.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trainable
    assert close(pack(loaded)(ids).logits, pack(bert).eval()(ids).logits)
    assert same_state(loaded, bert)


def test_saving_before_the_schedule_ever_ran_is_refused(bert, config, counts, tmp_path):
    compress(bert, config, counts)
    with pytest.raises(ValueError, match=r"AdaCompCallback\(\).*hf_adacomp.pack"):
        bert.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_loader_leaves_codes_alone(packed_bert, ids, tmp_path, dtype):
    expected = packed_bert(ids).logits
    packed_bert.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
    assert model.get_input_embeddings().packed.codes.dtype == torch.uint8
    assert model.get_input_embeddings()(ids).dtype == dtype
    assert torch.allclose(model(ids).logits.float(), expected, atol=0.02)


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


PREFIX = "bert.embeddings.word_embeddings."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(PREFIX + "packed.codes"), "lacks the tensor .*packed.codes"),
        (lambda t: t.pop(PREFIX + "codebook.scale"), "lacks the tensor .*codebook.scale"),
        (lambda t: t[PREFIX + "codebook.scale"].fill_(float("nan")), "codebook.scale holds NaN or Inf"),
        (lambda t: t[PREFIX + "packed.length_indices"].zero_(), "packed.length_indices gives"),
    ],
)
def test_damaged_file_is_refused(packed_bert, tmp_path, change, message):
    packed_bert.save_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_truncated_codes_are_refused(packed_bert, tmp_path):
    packed_bert.save_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.update({PREFIX + "packed.codes": t[PREFIX + "packed.codes"][:-1].clone()}))
    with pytest.raises((ValueError, RuntimeError), match=r"packed\.codes|mismatch"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_config_without_tables_is_refused(packed_bert, tmp_path):
    packed_bert.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["tables"] = {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no `tables`"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_config_that_contradicts_the_model_is_refused(packed_bert, tmp_path):
    packed_bert.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vocab_size"] = VOCABULARY + 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"513 x 32.*512 x 32"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


WITHOUT_THE_PLUGIN = """
import sys, transformers
getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("name", "class_name", "place"),
    [
        ("bert", "BertForMaskedLM", "word_embeddings.weight"),
        ("bert", "BertModel", "word_embeddings.weight"),
        ("gpt2", "GPT2LMHeadModel", "wte.weight"),
        ("llama", "LlamaForCausalLM", "embed_tokens.weight"),
    ],
)
@pytest.mark.parametrize("form", ["training", "packed"])
def test_without_importing_the_plugin_nothing_is_made_up(name, class_name, place, form, counts, tmp_path):
    """Where transformers would fill a table with random vectors, the guard of another shape is an error to it."""
    config = AdaCompConfig((4, 8, 32), target_ratio=3, codebook_dtype="int8")
    model = compress({**TIED, **UNTIED}[name](), config, counts)
    model.get_input_embeddings().step(0.1)
    (pack(model) if form == "packed" else model).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PLUGIN, str(tmp_path), class_name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert place in done.stderr
    assert "mismatch" in done.stderr.lower()


def test_with_the_plugin_guards_are_not_reported(packed_bert, tmp_path):
    packed_bert.save_pretrained(tmp_path)
    _, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    given = {"config": packed_bert.config, "state_dict": packed_bert.state_dict(), "output_loading_info": True}
    _, report = BertForSequenceClassification.from_pretrained(None, **given)
    assert not report["unexpected_keys"]


@pytest.mark.parametrize("name", ["bert", "gpt2", "bart"])
def test_every_place_of_a_table_is_guarded_for_no_bytes(name, counts, tmp_path):
    model = TIED[name]()
    (table,) = dense_tables(model)
    config = AdaCompConfig((4, 8, 32), target_ratio=3, codebook_dtype="int8")
    pack(compress(model, config, counts)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {place: tuple(tensors[place].shape) for place in table.weights} == dict.fromkeys(table.weights, (0,))
    strict = type(model)(model.config.__class__(**{**model.config.to_dict(), "quantization_config": None}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        strict.load_state_dict(tensors, strict=True)
    assert model.load_state_dict(tensors, strict=False).unexpected_keys == []


def test_files_without_guards_still_load(packed_bert, ids, tmp_path):
    packed_bert.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if tensor.numel()}
    save_file(tensors, file, {"format": "pt"})
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert close(loaded(ids).logits, packed_bert.eval()(ids).logits)


def test_import_brings_nothing_that_only_training_needs():
    code = "import sys, hf_adacomp; sys.exit('transformers.trainer_utils' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("form", ["training", "packed"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tables_that_hold_no_numbers_are_not_saved(bert, config, counts, tmp_path, form, value):
    table = compress(bert, config, counts).get_input_embeddings()
    table.step(0.1)
    if form == "packed":
        pack(bert)
    with torch.no_grad():
        table.codebook.bias[0] = value
    with pytest.raises(ValueError, match=r"codebook.bias holds NaN or Inf: the training has diverged"):
        bert.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_training_state_stays_float32_whatever_dtype_is_loaded(bert, config, counts, tmp_path):
    table = compress(bert, config, counts).get_input_embeddings()
    table.step(0.1)
    with torch.no_grad():
        table.training_state.selector.offset.fill_(1 + 2**-20)
    bert.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16).get_input_embeddings()
    assert loaded.training_state.source.dtype == torch.bfloat16
    for part in ("selector", "observation"):
        assert same_state(getattr(loaded.training_state, part), getattr(table.training_state, part))
