"""Distillation without labels: on a toy encoder, with texts and rated pairs from files, saved and loaded again."""

import csv
import random

import pytest
from conftest import WORDS, command_line
from sentence_transformers import SentenceTransformer

pytestmark = pytest.mark.usefixtures("quick_fit")


def test_calibrated_and_distilled_models_are_measured_and_saved(example, toy_model, tmp_path, capsys):
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=5)) for _ in range(300)]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    with (tmp_path / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([texts[i], texts[i + 1], i % 6] for i in range(40))
    given = {
        "model_name_or_path": toy_model,
        "texts": tmp_path / "texts.txt",
        "pairs_file": tmp_path / "pairs.csv",
        "target_ratio": 12,
        "num_train_epochs": 10,
        "learning_rate": 1e-3,
        "output_dir": tmp_path / "out",
        "json_out": tmp_path / "figures.json",
    }
    figures = example("distill").main([*command_line(given), "--use_cpu", "--disable_tqdm", "true"])
    assert (figures["texts"], figures["held_out"]) == (270, 30)
    assert figures["dense"]["cosine"] > 0.999
    assert all(0.98 < figures[stage]["cosine"] < 0.9999 for stage in ("calibrated", "distilled"))
    assert figures["calibrated"] != figures["distilled"]
    again = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert again[0].auto_model.get_input_embeddings().phase == "packed"
    assert "ratio" in capsys.readouterr().out
    assert (tmp_path / "figures.json").exists()
