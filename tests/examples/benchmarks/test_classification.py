"""The comparing script of text classifiers on a toy model and a toy task, and its reader of labelled texts."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def arguments(toy_arguments, tmp_path: Path) -> list[str]:
    return toy_arguments(
        per_device_train_batch_size=16,
        num_train_epochs=3,
        learning_rate=5e-3,
        compression_learning_rate=1e-3,
        json_out=tmp_path / "figures.json",
    )


def test_dense_then_compressed(example, arguments, tmp_path, capsys):
    figures = example("classification").main(arguments)
    assert figures == json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert figures["labels"] == ["HIGH", "LOW"]
    assert figures["texts"] == {"train": 360, "validation": 40, "test": 100}
    assert figures["dense"]["test_accuracy"] > 0.9
    assert figures["compressed"]["test_accuracy"] > 0.9
    assert figures["size"]["ratio"] >= 8
    assert figures["compressed"]["file_bytes"] < figures["dense"]["file_bytes"]
    assert len(figures["longest_codes"]) == len(figures["shortest_codes"]) == 10
    assert figures["longest_codes"][0]["bits"] >= figures["shortest_codes"][0]["bits"]
    printed = capsys.readouterr().out
    assert "test_accuracy" in printed
    assert "shortest codes" in printed


def test_one_run_without_dense(example, arguments):
    figures = example("classification").main([*arguments, "--one_run", "--skip_dense"])
    assert "dense" not in figures
    assert figures["size"]["ratio"] >= 8


def test_help_prints(example, capsys):
    with pytest.raises(SystemExit, match="0"):
        example("classification").main(["--help"])
    assert "--compression_learning_rate" in capsys.readouterr().out


def test_skip_dense_alone_is_refused(example, arguments):
    with pytest.raises(ValueError, match="--skip_dense needs --one_run"):
        example("classification").main([*arguments, "--skip_dense"])


def test_labels_unknown_to_the_training_data_are_named(example, arguments, tmp_path):
    (tmp_path / "test.tsv").write_text("OTHER:fine\tword1 word2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="OTHER"):
        example("classification").main(arguments)


def test_missing_default_model_tells_what_to_install(example, monkeypatch):
    pretrained_encoder = example("pretrained_encoder")

    def missing(package):
        raise ModuleNotFoundError(package)

    monkeypatch.setattr(pretrained_encoder.importlib.resources, "files", missing)
    with pytest.raises(SystemExit, match=r"hf-adacomp\[demo\]"):
        pretrained_encoder.bundled_model()


@pytest.mark.parametrize("extension", ["csv", "json", "jsonl"])
def test_files_with_named_columns(example, tmp_path, extension):
    rows = [{"label": i % 2, "sentence": "null" if i == 0 else f"text, {i}"} for i in range(20)]
    file = tmp_path / f"train.{extension}"
    if extension == "csv":
        lines = ["label,sentence", *(f'{row["label"]},"{row["sentence"]}"' for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    labelled_texts = example("labelled_texts")
    splits = labelled_texts.load_splits(labelled_texts.DataTrainingArguments(train_file=str(file)), seed=0)
    held_out = [row for part in splits.values() for row in part]
    assert sorted(held_out, key=str) == sorted(rows, key=str)
    assert splits["test"].num_rows == splits["validation"].num_rows == 2
