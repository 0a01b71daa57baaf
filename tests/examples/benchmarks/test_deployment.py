"""An encoder on a device: all forms of a tiny one, going on where it stopped."""

import csv
import gzip
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXAMPLES, WORDS, command_line, tiny_bert_config, word_tokenizer
from transformers import BertModel

pytestmark = pytest.mark.usefixtures("quick_fit")


@pytest.fixture
def encoder(tmp_path) -> Path:
    """Folder of a tiny model whose table is most of it."""
    BertModel(tiny_bert_config(num_hidden_layers=1, vocab_size=4096)).save_pretrained(tmp_path / "bert")
    word_tokenizer().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def words(encoder, tmp_path) -> list[str]:
    """A command line for the tiny model and random pairs."""
    draw = random.Random(0)
    for split, rows in (("train", 40), ("test", 40)):
        with gzip.open(tmp_path / f"stsb-en-{split}.csv.gz", "wt", encoding="utf-8", newline="") as lines:
            for i in range(rows):
                first, second = (" ".join(draw.choices(WORDS, k=4 + i % 12)) for _ in range(2))
                csv.writer(lines).writerow([first, second, i % 6])
    folders = {"data_dir": tmp_path, "output_dir": tmp_path / "cells", "models_dir": tmp_path / "models"}
    return command_line({"name": "toy", "model_name_or_path": encoder, "ratio": 6, "repeats": 2, **folders})


def test_every_form_is_measured_once(example, words, capsys, monkeypatch, tmp_path):
    module = example("deployment")
    monkeypatch.setattr(module, "PROCESSES", 1)
    cells = module.main(words)
    found = {key.method: cells[key] for key in cells}
    assert [*found] == [*module.FORMS, "times"]
    table = 4 * 4096 * 32
    for ours, theirs in (("calibrated:float", "dense"), ("calibrated:int8", "dense:int8")):
        assert found[ours]["bytes"] < found[theirs]["bytes"]
    assert found["dense"]["bytes"] - found["dense:int8"]["bytes"] > table / 2  # whose table is of integers, too
    for form in module.FORMS:
        cell = found[form]
        assert math.isfinite(cell["similarity"]["en"])
        assert cell["cosine"]["en"] > (0.99 if form.startswith("dense") else 0.5)
        assert cell["bytes"] < cell["peak_onnxruntime"] < 500e6  # this process has more
        assert ("peak_node" in cell) == (module.why_without_node() is None)
        assert ("version" in cell) == (form not in module.DENSE)
    assert all(value > 0 for value in found["times"]["milliseconds"].values())
    assert found["times"]["tokens"] == 16
    printed = capsys.readouterr().out
    assert "| ours, int4 layers |" in printed
    monkeypatch.setattr(module, "write_forms", lambda *_: pytest.fail("a finished cell was run again"))
    monkeypatch.setattr(module, "why_without_node", lambda: "node is not installed")
    module.main(words)
    again = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("|")] == again.splitlines()[
        : len(module.FORMS) + 2
    ]
    assert "Peak memory in node was not measured: node is not installed." in again


def test_files_embed_what_the_model_embeds(example, encoder, tmp_path):
    module = example("deployment")
    args = module.SimilarityArguments("", "toy", model_name_or_path=str(encoder), prompt="word1 ")
    dense = module.load_model(args)
    file = module.write_forms(dense, ["dense"], tmp_path)["dense"]
    written = module.OnnxEncoder(file, module.tokenizer_of(dense), args.prompt)
    texts = [" ".join(WORDS[: 1 + i % 7]) for i in range(40)]
    assert (written.encode(texts) - dense.encode(texts, convert_to_tensor=True).cpu()).abs().max() < 1e-5


def test_a_process_does_not_count_the_memory_of_its_parent():
    script = EXAMPLES / "benchmarks" / "one_query.py"
    ask = f"import runpy; print(runpy.run_path({str(script)!r})['peak_memory']())"
    large = bytearray(b"x") * 600_000_000
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert 1e7 < int(done.stdout) < len(large) / 2
