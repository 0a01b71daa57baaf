import json
import random

import pytest
from conftest import WORDS, command_line

pytestmark = pytest.mark.usefixtures("quick_fit")


def write_pairs(folder, split, lines, seed):
    """Word follows word by one rule, and every word is translated by writing it backwards."""
    draw = random.Random(seed)
    starts = [draw.randrange(12) for _ in range(lines)]
    sentences = [[WORDS[(start + i) % 12] for i in range(6)] for start in starts]
    sides = {"source": sentences, "target": [[word[::-1] for word in words] for words in sentences]}
    for side, words in sides.items():
        (folder / f"{split}.{side}").write_text("".join(" ".join(line) + "\n" for line in words))
    return {f"{split}_{side}_file": str(folder / f"{split}.{side}") for side in sides}


@pytest.fixture
def options(tmp_path):
    files = {"train": 384, "validation": 8, "test": 8}
    given = {}
    for seed, (split, lines) in enumerate(files.items()):
        given |= write_pairs(tmp_path, split, lines, seed)
    return {
        **given,
        "vocabulary_size": 400,
        "width": 64,
        "layers": 1,
        "target_ratio": 8,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 32,
        "num_train_epochs": 15,
        "heads": "compress",
        "generation_num_beams": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": str(tmp_path / "out"),
        "json_out": str(tmp_path / "figures.json"),
    }


def test_every_table_is_trained_reloaded_and_scored(example, options, tmp_path):
    figures = example("translation").main(command_line(options))
    models = figures["models"]
    assert [*models] == ["dense", "int8", "int4", "head=compress"]
    assert all(0 <= row["test_bleu"] <= 100 for row in models.values())
    assert models["dense"]["test_bleu"] > 1  # it writes words of the other language
    assert models["head=compress"]["ratio"] >= 8
    assert json.loads((tmp_path / "figures.json").read_text()) == json.loads(json.dumps(figures))


def test_files_of_different_lengths_are_refused(example, options):
    with open(options["test_target_file"], "a", encoding="utf-8") as file:
        file.write("one more\n")
    with pytest.raises(ValueError, match=r"test.source has 8 lines and .*test.target has 9"):
        example("translation").main(command_line(options))
