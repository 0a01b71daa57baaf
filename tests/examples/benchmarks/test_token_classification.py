"""The tagger: its reader, its labels, and the whole script on a toy model and a toy task."""

import gzip
import random

import pytest
from conftest import command_line

CONLLU = """# text = Don't stop
1-2\tDon't\t_\t_\t_\t_\t_\t_\t_\t_
1\tDo\tdo\tAUX\t_\t_\t_\t_\t_\t_
2\tn't\tnot\tPART\t_\t_\t_\t_\t_\t_
2.1\tever\tever\tADV\t_\t_\t_\t_\t_\t_
3\tstop\tstop\tVERB\t_\t_\t_\t_\t_\t_

1\tGo\tgo\tVERB\t_\t_\t_\t_\t_\t_"""


@pytest.mark.parametrize("zipped", [False, True])
def test_reader_takes_words_and_nothing_else(example, tmp_path, zipped):
    file = tmp_path / ("some.conllu.gz" if zipped else "some.conllu")
    file.write_bytes(gzip.compress(CONLLU.encode()) if zipped else CONLLU.encode())
    assert example("token_classification").read_conllu(str(file)).to_list() == [
        {"words": ["Do", "n't", "stop"], "tags": ["AUX", "PART", "VERB"]},
        {"words": ["Go"], "tags": ["VERB"]},
    ]


def write_conllu(file, sentences, seed):
    """Words of the lower half of the vocabulary are nouns, the others verbs."""
    draw, lines = random.Random(seed), []
    for _ in range(sentences):
        for position, index in enumerate(draw.choices(range(200), k=draw.randint(2, 8)), start=1):
            lines.append(f"{position}\tword{index}\t_\t{'NOUN' if index < 100 else 'VERB'}\t_\n")
        lines.append("\n")
    file.write_text("".join(lines), encoding="utf-8")
    return str(file)


def test_only_the_first_token_of_a_word_has_a_label(example, minilm, tmp_path):
    module = example("token_classification")
    file = tmp_path / "train.conllu"
    file.write_text("1\tembeddings\t_\tNOUN\n2\tmatter\t_\tVERB\n\n" * 20, encoding="utf-8")
    args = module.TaggingArguments(train_file=str(file), test_file=str(file), model_name_or_path=str(minilm))
    row = module.token_classification(args, 0).splits["test"][0]
    labels = [label for label in row["labels"] if label != -100]
    assert labels == [0, 1]
    assert len(row["input_ids"]) > 4  # [CLS], more than one token of the first word, the second, [SEP]
    assert row["labels"][0] == row["labels"][-1] == -100


def test_dense_then_compressed(example, toy_model, tmp_path):
    given = {
        "train_file": write_conllu(tmp_path / "train.conllu", 200, 0),
        "test_file": write_conllu(tmp_path / "test.conllu", 50, 1),
        "model_name_or_path": toy_model,
        "target_ratio": 8,
        "num_train_epochs": 3,
        "compression_epochs": 2,
        "learning_rate": 5e-3,
        "compression_learning_rate": 1e-3,
        "output_dir": tmp_path / "out",
        "report_to": "none",
    }
    words = command_line(given)
    figures = example("token_classification").main([*words, "--code_lengths", "4", "16", "--use_cpu"])
    assert figures["labels"] == ["NOUN", "VERB"]
    assert figures["dense"]["test_accuracy"] > 0.9
    assert figures["compressed"]["test_accuracy"] > 0.9
    assert figures["size"]["ratio"] >= 8
