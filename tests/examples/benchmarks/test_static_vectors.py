"""Word vectors and an LSTM: reading, dropping unknown words, saving, loading, the whole script."""

import numpy as np
import pytest
import torch
from conftest import WORDS, command_line
from datasets import Dataset, DatasetDict


def test_words_that_differ_in_case_are_one(example, vectors_file):
    words, vectors = example("static_vectors").read_vectors(vectors_file)
    assert words == WORDS
    assert torch.equal(vectors[0], torch.from_numpy(np.load(vectors_file)["vectors"][0].astype(np.float32)))


def test_the_vocabulary_is_the_words_of_the_texts(example, vectors_file):
    words, vectors = example("static_vectors").vectors_for(["word3 WORD1 other", "word3"], vectors_file)
    assert words == ["word1", "word3"]
    every = example("static_vectors").read_vectors(vectors_file)[1]
    assert torch.equal(vectors, every[[1, 3]])


@pytest.mark.parametrize(("columns", "found"), [(("label", "sentence"), ["sentence"]), (("label", "premise"), [])])
def test_texts_are_in_columns_of_known_names(example, columns, found):
    texts = example("labelled_texts")
    raw = DatasetDict(train=Dataset.from_dict({column: ["a"] for column in columns}))
    assert texts.text_columns_of(raw, texts.DataTrainingArguments()) == found
    assert texts.text_columns_of(raw, texts.DataTrainingArguments(text_column_names=["premise"])) == ["premise"]


def test_unknown_words_are_dropped_unless_there_are_no_others(example):
    drop = example("static_vectors").drop_unknown
    assert drop({"input_ids": [1, 5, 1, 6]}, unknown=1) == {"input_ids": [5, 6], "attention_mask": [1, 1]}
    assert drop({"input_ids": [1, 1]}, unknown=1) == {"input_ids": [1], "attention_mask": [1]}


def test_padding_does_not_change_the_classifier(example):
    module = example("word_vector_models")
    torch.manual_seed(0)
    model = module.WordVectorClassifier(module.WordVectorConfig(vocab_size=50, vector_size=8, hidden_size=6)).eval()
    ids, mask = torch.randint(1, 50, (3, 5)), torch.ones(3, 5, dtype=torch.int64)
    padded = [torch.nn.functional.pad(tensor, (0, 4)) for tensor in (ids, mask)]
    assert torch.allclose(model(ids, mask).logits, model(*padded).logits, atol=1e-6)


def test_next_words_are_labels_where_they_have_a_vector(example, vectors_file, tmp_path):
    module = example("static_vectors")
    (tmp_path / "train.txt").write_text("Word1 word2, word3\n\n" * 40, encoding="utf-8")
    task = module.static_language(module.VectorArguments(vectors_file), {"train": str(tmp_path / "train.txt")})
    assert task.labels == [*module.SPECIAL, "word1", "word2", "word3"]
    row = task.splits["train"][0]
    assert row["input_ids"][:5] == [3, 4, 1, 5, 3]
    assert row["labels"][:5] == [4, -100, 5, 3, 4]
    assert {len(row["labels"]) for row in task.splits["train"]} == {module.BLOCK}
    model = task.new_model()
    out = model(**task.collator([dict(row) for row in task.splits["train"]]))
    assert out.logits.shape[-1] == model.get_input_embeddings().num_embeddings
    assert not model.lstm.bidirectional


def test_dense_then_compressed(example, vectors_file, write_tsv, tmp_path):
    given = {
        "vectors_file": vectors_file,
        "train_file": write_tsv(tmp_path / "train.tsv", 400, seed=0),
        "test_file": write_tsv(tmp_path / "test.tsv", 100, seed=1),
        "label_prefix_separator": ":",
        "target_ratio": 8,
        "num_train_epochs": 5,
        "compression_epochs": 3,
        "learning_rate": 1e-2,
        "compression_learning_rate": 3e-3,
        "output_dir": tmp_path / "out",
        "report_to": "none",
    }
    words = command_line(given)
    figures = example("static_vectors").main(
        [*words, "--column_names", "label", "text", "--code_lengths", "4", "16", "--use_cpu"]
    )
    assert figures["dense"]["test_accuracy"] > 0.9
    assert figures["compressed"]["test_accuracy"] > 0.85
    assert figures["size"]["ratio"] >= 8
