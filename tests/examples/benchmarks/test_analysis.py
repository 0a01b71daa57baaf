"""Word similarity and significance: their statistics, and both scripts on toy data."""

import numpy as np
import pytest
import torch
from conftest import WORDS, tiny_bert_config
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification


def test_information_about_the_label(example):
    module = example("information")
    rows = {"input_ids": [[1, 2], [1, 3, 3], [1, 2], [1, 3]], "labels": [0, 1, 0, 1]}
    task = example("comparison").Task({"train": rows}, ["a", "b"], None, None, None)
    information = module.label_information(task, 5)
    assert information == pytest.approx([0, 0, np.log(2), np.log(2), 0])


def test_correlation_at_equal_count_sees_through_counts(example):
    correlate = example("information").correlation_at_equal_count
    draw = np.random.default_rng(0)
    counts = draw.zipf(1.5, 3000).clip(max=10**5).astype(float) + 5
    information = draw.random(3000) * counts  # rises with the count, as lengths do
    by_count = np.digitize(counts, [6, 10, 50]) * 10
    assert abs(correlate(by_count, information, counts)["correlation"]) < 0.08
    by_both = by_count + 10 * (information / counts > 0.7)
    found = correlate(by_both, information, counts)
    assert found["correlation"] > 0.2
    assert found["p"] < 1e-6


@pytest.mark.parametrize("model", ["encoder", "word vectors"])
def test_significance_script(example, toy_arguments, vectors_file, tmp_path, model):
    given = {"vectors_file": vectors_file, "target_ratio": 4} if model == "word vectors" else {}
    figures = example("significance").main(toy_arguments(**given))
    found = figures["correlation_with_label_information"]
    damages = ["damage_without_vector", "damage_of_shortest_code", "damage_of_euclidean_code"]
    assert [*found] == ["code_length", "sureness", *damages]
    assert found["code_length"]["tokens"] > 100
    assert all(-1 <= correlation["correlation"] <= 1 for correlation in found.values())
    assert (tmp_path / "out" / "significance.png").stat().st_size > 10_000


def test_similarity_script(example, tmp_path, capsys):
    vectors = torch.randn(len(WORDS), 32)
    np.savez(tmp_path / "vectors.npz", words=np.array(WORDS), vectors=vectors.half().numpy())
    normal = torch.nn.functional.normalize(vectors)
    lines = [f"{WORDS[i]} {WORDS[i + 1]} {10 * float(normal[i] @ normal[i + 1])}" for i in range(0, 200, 2)]
    (tmp_path / "set.txt").write_text("\n".join([*lines, "word0 unheard-of 5.0"]) + "\n", encoding="utf-8")
    figures = example("word_similarity").main(
        ["--wordsim_dir", str(tmp_path), "--vectors_file", str(tmp_path / "vectors.npz"), "--ratios", "4"]
    )
    assert figures["set"]["pairs"] == 100
    assert figures["set"]["dense"] > 0.99
    assert 0.5 < figures["set"]["4x"] < figures["set"]["dense"]
    assert "dense" in capsys.readouterr().out


def test_damage_is_that_of_the_replaced_token_alone(example):
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_bert_config(initializer_range=0.5))
    source = model.get_input_embeddings().weight.detach()
    changed = source.clone()
    changed[7] *= -1
    rows = [{"input_ids": torch.tensor([1, 5, 6, 7, 8])} | {"attention_mask": torch.ones(5)} for _ in range(40)]
    measured = example("damage").sureness_and_damage(
        model, DataLoader(rows, batch_size=4), {"same": source, "changed": changed}, torch.tensor([1])
    )
    assert np.array_equal(np.isfinite(measured["changed"]).nonzero()[0], [5, 6, 7, 8])
    assert np.nanmax(np.abs(measured["same"])) < 1e-6
    assert measured["changed"][7] > 1e-3
    assert np.abs(measured["changed"][[5, 6, 8]]).max() < 1e-6
    assert 0.5 <= measured["sureness"][5] <= 1
    assert np.isnan(measured["sureness"][1])
