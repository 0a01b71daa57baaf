"""The README's example runs as written."""

import re
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY
from transformers import BertForSequenceClassification

from hf_adacomp.cli import _parser

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.usefixtures("quick_fit")
def test_example_runs(bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bert.save_pretrained("my-finetuned-model")
    rows = [{"input_ids": torch.randint(0, VOCABULARY, (9,)), "labels": i % 2} for i in range(32)]
    example = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    # The tiny table cannot be 80 times smaller.
    example = example.replace("target_ratio=80", "code_lengths=(4, 8, 20), target_ratio=32")
    names = {"train_dataset": rows}
    exec(compile(example, str(README), "exec"), names)
    assert isinstance(names["model"], BertForSequenceClassification)
    assert names["model"].get_input_embeddings().phase == "packed"


def test_commands_are_understood():
    commands = re.findall(r"^hf-adacomp ([^#\n]*)", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert {command.split()[0] for command in commands} == {"compress", "inspect", "plot", "decompress"}
    for command in commands:
        assert callable(_parser().parse_args(command.split()).run)


def test_pictures_are_there():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README.read_text(encoding="utf-8"))
    assert pictures
    for picture in pictures:
        assert (README.parent / picture).read_bytes().startswith(b"\x89PNG")


def test_scripts_are_there():
    for script in set(re.findall(r"examples/[\w/]+\.py", README.read_text(encoding="utf-8"))):
        assert (README.parent / script).is_file()
