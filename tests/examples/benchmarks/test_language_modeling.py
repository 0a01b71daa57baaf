import json
import math
import random

import pytest
from conftest import WORDS, command_line

pytestmark = pytest.mark.usefixtures("quick_fit")


def write_text(file, lines, seed):
    """Word follows word by one rule, so that there is something to learn."""
    draw = random.Random(seed)
    starts = [draw.randrange(len(WORDS)) for _ in range(lines)]
    file.write_text("".join(" ".join(WORDS[(s + i) % len(WORDS)] for i in range(12)) + "\n" for s in starts))
    return str(file)


@pytest.fixture
def options(tmp_path):
    files = {"train": 300, "validation": 20, "test": 20}
    given = {
        f"{split}_file": write_text(tmp_path / f"{split}.txt", lines, seed)
        for seed, (split, lines) in enumerate(files.items())
    }
    return {
        **given,
        "vocabulary_size": 512,
        "block_length": 32,
        "width": 64,
        "layers": 1,
        "target_ratio": 8,
        "num_train_epochs": 6,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": str(tmp_path / "out"),
        "json_out": str(tmp_path / "figures.json"),
    }


def test_every_table_is_trained_reloaded_and_measured(example, options, tmp_path, capsys):
    arguments = command_line(options)
    figures = example("language_modeling").main(arguments)
    models = figures["models"]
    assert [*models] == ["dense", "int8", "int4", "head=compress", "head=dense"]
    assert all(
        1 < row["test_perplexity"] < 512 and math.isfinite(row["validation_perplexity"]) for row in models.values()
    )
    assert models["dense"]["ratio"] == 1
    assert 3.5 < models["int8"]["ratio"] < 4
    assert 7 < models["int4"]["ratio"] < 8
    assert models["head=compress"]["ratio"] >= 8
    assert models["head=dense"]["ratio"] < 1  # its head is as large as the table was
    assert models["dense"]["test_perplexity"] < 100  # it has learned the rule
    assert json.loads((tmp_path / "figures.json").read_text()) == json.loads(json.dumps(figures))
    assert "head=compress" in capsys.readouterr().out


def test_stored_dense_model_gives_the_same_figures(example, options, tmp_path):
    module, changes = example("language_modeling"), {"num_train_epochs": 1, "heads": "compress"}
    trained = module.main(command_line({**options, **changes}))["models"]
    stored = module.main(command_line({**options, **changes, "dense_model": str(tmp_path / "out" / "start")}))["models"]
    assert [row["test_perplexity"] for row in stored.values()] == [row["test_perplexity"] for row in trained.values()]


def test_quick_takes_a_tenth(example, options):
    module = example("language_modeling")
    args = {name: options[name] for name in ("train_file", "validation_file", "test_file", "vocabulary_size")}
    whole = module.blocks(module.LanguageArguments(**args, block_length=32))
    tenth = module.blocks(module.LanguageArguments(**args, block_length=32, quick=True))
    assert len(tenth["train"]) == len(whole["train"]) // 10
    assert all(len(row) == 32 for row in whole["train"]["input_ids"])
