"""The README's example runs as written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, WORDS, child_environment
from sentence_transformers import SentenceTransformer
from transformers import BertForSequenceClassification

from hf_adacomp.cli import _parser

README = Path(__file__).parents[1] / "README.md"


def example() -> str:
    """The first one, save that the tiny table cannot be 80 times smaller."""
    text = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    return text.replace("target_ratio=80", "code_lengths=(4, 8, 28), target_ratio=32")


@pytest.mark.usefixtures("quick_fit")
def test_example_runs(bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bert.save_pretrained("my-finetuned-model")
    rows = [{"input_ids": torch.randint(0, VOCABULARY, (9,)), "labels": i % 2} for i in range(32)]
    names = {"train_dataset": rows}
    exec(compile(example(), str(README), "exec"), names)
    assert isinstance(names["model"], BertForSequenceClassification)
    assert names["model"].get_input_embeddings().phase == "packed"


@pytest.mark.usefixtures("quick_fit")
def test_example_without_labels_runs(toy_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    block = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "calibrate" in block)
    names = {"texts": [f"{word} {WORDS[0]}" for word in WORDS]}
    exec(compile(block.replace("my-encoder", str(toy_model)).replace("=40", "=8"), str(README), "exec"), names)
    assert SentenceTransformer("out/encoder")[0].auto_model.get_input_embeddings().phase == "packed"


def test_line_for_several_processes_starts_two(bert, tmp_path):
    bert.save_pretrained(tmp_path / "my-finetuned-model")
    (line,) = re.findall(r"`(torchrun [^`]*train\.py)`", README.read_text(encoding="utf-8"))
    lines, _, _ = example().partition("trainer.save_model")  # which the first rank does alone
    lines = lines.replace('report_to="none"', 'report_to="none", use_cpu=True')
    (tmp_path / "train.py").write_text(
        "import torch\n"
        "torch.manual_seed(0)\n"
        f"train_dataset = [{{'input_ids': torch.randint(0, {VOCABULARY}, (9,)), 'labels': i % 2}} for i in range(64)]\n"
        f"{lines}\n"
        "open(f'rank{trainer.args.process_index}', 'w').write(model.get_input_embeddings().phase)\n"
    )
    environment = {**child_environment(), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    done = subprocess.run(
        line.split(), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["packed", "packed"]


def test_commands_are_understood():
    commands = re.findall(r"^hf-adacomp ([^#\n]*)", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert {command.split()[0] for command in commands} == {"compress", "inspect", "plot", "export", "decompress"}
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
