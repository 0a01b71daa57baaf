"""Perplexity, speed and memory of a causal model with smaller tables, on a toy one."""

import random

import pytest
from conftest import WORDS, command_line, word_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

pytestmark = pytest.mark.usefixtures("quick_fit")


def test_rows(example, tmp_path, capsys, monkeypatch):
    module = example("causal_perplexity")
    tokenizer = word_tokenizer()
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": 2, "eos_token_id": 3}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    draw = random.Random(0)
    lines = "\n".join(" ".join(draw.choices(WORDS, k=9)) for _ in range(100))
    (tmp_path / "text.txt").write_text(lines, encoding="utf-8")
    given = {"name": "toy", "model_name_or_path": tmp_path / "gpt2", "output_dir": tmp_path / "out"}
    given |= {"calibration_file": tmp_path / "text.txt", "test_file": tmp_path / "text.txt", "steps": 4}
    methods = [method for method in module.METHODS if method != "count"]  # which is a part of `calibrated`
    words = [*command_line(given), "--positions", "128", "--row_length", "16", "--ratios", "8", "--methods", *methods]
    cells = module.main(words)
    assert [key.method for key in cells] == methods
    found = {key.method: cells[key] for key in cells}
    assert all(100 < figures["perplexity"] < 400 for figures in found.values())
    assert found["int8"]["table_bytes"] > found["int4"]["table_bytes"] > found["calibrated"]["table_bytes"]
    assert found["calibrated"]["file_bytes"] < found["dense"]["file_bytes"]
    assert found["trained"]["tokens_a_second"] > 0
    printed = capsys.readouterr().out
    assert "\n| 8 | calibrated |" in printed
    monkeypatch.setattr(module, "cell", lambda *_: pytest.fail("a finished cell was run again"))
    module.main(words)
