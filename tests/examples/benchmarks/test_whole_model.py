"""Packed tables beside torchao's integer weights: saved, loaded, measured."""

import json

import pytest
from conftest import command_line
from transformers import AutoModelForSequenceClassification

from hf_adacomp import AdaCompConfig, compress, pack

pytestmark = [
    pytest.mark.usefixtures("quick_fit"),
    pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning"),  # of torchao
]


@pytest.fixture
def arguments(toy_model, write_tsv, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(toy_model)
    packed = pack(compress(model, AdaCompConfig(code_lengths=(4, 16), target_ratio=20)))
    packed.save_pretrained(tmp_path / "packed")
    given = {
        "model_name_or_path": tmp_path / "packed",
        "dense_model_name_or_path": toy_model,
        "train_file": write_tsv(tmp_path / "train.tsv", 60, seed=0),
        "test_file": write_tsv(tmp_path / "test.tsv", 50, seed=1),
        "label_prefix_separator": ":",
        "output_dir": tmp_path / "out",
        "json_out": tmp_path / "figures.json",
        "report_to": "none",
    }
    return [*command_line(given), "--column_names", "label", "text", "--use_cpu"]


def test_every_form_is_measured_from_its_file(example, arguments, tmp_path, capsys):
    figures = example("whole_model").main(arguments)
    assert figures == json.loads((tmp_path / "figures.json").read_text())
    size = {form: row["file_bytes"] for form, row in figures.items()}
    assert size["torchao int8 + table"] < size["torchao int8"] < size["dense"]
    assert size["torchao int8 + table"] < size["table"] < size["dense"]
    assert all(0 <= row["test_accuracy"] <= 1 for row in figures.values())
    assert "torchao int4 + table" in capsys.readouterr().out


def test_a_file_that_gives_back_another_model_is_told(example, arguments, monkeypatch):
    module = example("whole_model")
    save = module.save

    def save_another(model, file):
        model.classifier.bias.data += 1
        save(model, file)
        model.classifier.bias.data -= 1

    monkeypatch.setattr(module, "save", save_another)
    with pytest.raises(ValueError, match="does not give back the model"):
        module.main(arguments)
