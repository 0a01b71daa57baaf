"""A small language model and its tied table: every form of it, and a start from a stored dense model."""

import io
import json
import math
import random
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from conftest import WORDS, command_line


def write_text(file, lines, seed):
    """Word follows word by one rule, so that there is something to learn."""
    draw = random.Random(seed)
    starts = [draw.randrange(len(WORDS)) for _ in range(lines)]
    file.write_text("".join(" ".join(WORDS[(s + i) % len(WORDS)] for i in range(12)) + "\n" for s in starts))
    return str(file)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("language")
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


@pytest.fixture(scope="module")
def run(example, options):
    """Figures of one run of the script, and what it printed."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        figures = example("language_modeling").main(command_line(options))
    return figures, printed.getvalue()


def test_every_table_is_trained_reloaded_and_measured(run, options):
    figures, printed = run
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
    assert json.loads(Path(options["json_out"]).read_text()) == json.loads(json.dumps(figures))
    assert "head=compress" in printed


def test_stored_dense_model_gives_the_same_figures(example, run, options, tmp_path):
    trained = run[0]["models"]
    changes = {"dense_model": Path(options["output_dir"]) / "start", "heads": "compress", "output_dir": tmp_path}
    changes["json_out"] = tmp_path / "figures.json"
    stored = example("language_modeling").main(command_line(options | changes))["models"]
    assert [*stored] == ["dense", "int8", "int4", "head=compress"]
    for name, row in stored.items():  # not to the bit: where weights lie in memory decides how kernels sum
        assert row["test_perplexity"] == pytest.approx(trained[name]["test_perplexity"], rel=1e-3)


def test_quick_takes_a_tenth(example, options):
    module = example("language_modeling")
    args = {name: options[name] for name in ("train_file", "validation_file", "test_file", "vocabulary_size")}
    whole = module.blocks(module.LanguageArguments(**args, block_length=32))
    tenth = module.blocks(module.LanguageArguments(**args, block_length=32, quick=True))
    assert len(tenth["train"]) == len(whole["train"]) // 10
    assert all(len(row) == 32 for row in whole["train"]["input_ids"])
