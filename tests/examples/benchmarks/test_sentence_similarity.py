"""Similarity of sentences without labels: an encoder and word vectors, all rows, going on where it stopped."""

import csv
import gzip
import random

import pytest
from conftest import WORDS, command_line

pytestmark = pytest.mark.usefixtures("quick_fit")


@pytest.fixture
def data(tmp_path):
    draw = random.Random(0)
    for language in ("aa", "bb"):
        for split, rows in (("train", 40), ("test", 12)):
            with gzip.open(tmp_path / f"stsb-{language}-{split}.csv.gz", "wt", encoding="utf-8", newline="") as lines:
                for i in range(rows):
                    first, second = (" ".join(draw.choices(WORDS, k=4)) for _ in range(2))
                    csv.writer(lines).writerow([first, second, i % 6])
    return tmp_path


@pytest.mark.parametrize("kind", ["encoder", "word vectors"])
def test_every_row_in_every_language(example, toy_model, vectors_file, data, kind, capsys, monkeypatch):
    module = example("sentence_similarity")
    source = {"model_name_or_path": toy_model} if kind == "encoder" else {"vectors_file": vectors_file}
    words = command_line({"name": "toy", "data_dir": data, "output_dir": data / "out", **source})
    words += ["--languages", "aa", "bb", "--leave_out", "bb", "--ratios", "6", "--learning_rate", "1e-3"]
    cells = module.main(words)
    assert {key.method for key in cells} == set(module.METHODS)
    for key in cells:
        found = cells[key]
        assert [*found["similarity"]] == ["aa", "bb"]
        assert 0.4 < found["cosine"]["aa"] <= 1.0001
        if key.ratio is not None:
            assert found["table_bytes"] < cells[module.Key("toy", "dense", None, 0)]["table_bytes"] / 5
    assert cells[module.Key("toy", "dense", None, 0)]["cosine"]["bb"] == pytest.approx(1, abs=1e-5)
    assert cells[module.Key("toy", "calibrated", 6.0, 0)]["bits_by_script"]["LATIN"][0] >= 200
    printed = capsys.readouterr().out
    assert "| 6 | calibrated |" in printed
    assert "| LATIN | 20" in printed
    monkeypatch.setattr(module, "cell", lambda *_: pytest.fail("a finished cell was run again"))
    module.main(words)
    assert printed.splitlines()[-1] in capsys.readouterr().out
