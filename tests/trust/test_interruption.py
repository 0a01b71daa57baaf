"""Trainings killed with SIGKILL and resumed end as if they had never been interrupted."""

import json
import logging
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import LENGTHS, child_environment, tiny_bert_config
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

from hf_adacomp import AdaCompCallback, AdaCompConfig, compress
from hf_adacomp.integration.checkpoint import unfinished_checkpoints

Tensors = dict[str, torch.Tensor]
SCRIPT = Path(__file__).with_name("train.py")
STEPS, SAVE_STEPS, FREEZE = 24, 3, 12


def start(folder: Path, checkpoint: Path | None = None) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), str(folder), *([str(checkpoint)] if checkpoint else [])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=child_environment())


def finish(process: subprocess.Popen, folder: Path) -> Tensors:
    """Waits for the end of a training; all tensors of the packed model."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return load_file(folder / "packed" / "model.safetensors")


def kill(folder: Path, moment: str, delay: float) -> None:
    """Trains until it prints `moment`, waits so many seconds and kills."""
    process = start(folder)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == moment:
            break
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, "it was through before"


def last_whole_checkpoint(folder: Path) -> Path | None:
    whole = {path.name: path for path in folder.glob("checkpoint-*")}
    for name in unfinished_checkpoints(folder):
        del whole[name]
    return max(whole.values(), key=lambda path: int(path.name.split("-")[1]), default=None)


def kill_and_resume(folder: Path, moment: str, delay: float, expected: Callable[[], Tensors]) -> tuple[str, str]:
    """Returns the checkpoint that was resumed from and those that were half-written."""
    kill(folder, moment, delay)
    checkpoint, halves = last_whole_checkpoint(folder), unfinished_checkpoints(folder)
    found = finish(start(folder, checkpoint), folder)
    expected = expected()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    return checkpoint.name if checkpoint else "the start", ", ".join(halves)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Callable[[], Tensors]:
    """Waits for the tensors of a training that runs beside the first one that is killed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = start(folder)
    return cache(lambda: finish(process, folder))


def test_killed_and_resumed_training_equals_the_uninterrupted_one(tmp_path, uninterrupted):
    """While the first checkpoint after the freeze is being written."""
    kill_and_resume(tmp_path, f"saving {FREEZE + SAVE_STEPS}", 0.005, uninterrupted)


@pytest.mark.long
def test_killed_at_twenty_moments(tmp_path, uninterrupted):
    draw = random.Random(0)
    saves = range(SAVE_STEPS, STEPS, SAVE_STEPS)
    moments = [(f"saving {step}", draw.uniform(0, 0.04)) for step in draw.choices(saves, k=12)]
    moments += [(f"step {step}", draw.uniform(0, 0.02)) for step in draw.sample(range(STEPS - 2), 7)]
    moments += [("ready", draw.uniform(0, 0.2))]
    halves = 0
    for number, (moment, delay) in enumerate(moments):
        resumed, half = kill_and_resume(tmp_path / str(number), moment, delay, uninterrupted)
        print(f"killed {1000 * delay:.0f} ms after {moment!r}: resumed from {resumed}; half-written: {half or 'none'}")
        halves += bool(half)
    assert halves, "no kill hit a save"


def new_trainer(folder: Path, steps: int) -> Trainer:
    from trainings import Texts

    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_bert_config(num_hidden_layers=1))
    return Trainer(
        compress(model, AdaCompConfig(LENGTHS, target_ratio=32)),
        TrainingArguments(str(folder), max_steps=steps, save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True),
        train_dataset=Texts(),
        callbacks=[AdaCompCallback()],
    )


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda folder: cut(folder / "trainer_state.json"), "trainer_state.json is cut off"),
        (lambda folder: cut(folder / "model.safetensors"), "model.safetensors is a damaged safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors is a damaged"),
        (lambda folder: [file.unlink() for file in folder.iterdir()], "trainer_state.json is missing"),
    ],
)
def test_half_written_checkpoint_is_named_with_the_way_out(tmp_path, caplog, quick_fit, harm, reason):
    new_trainer(tmp_path, 4).train()
    with caplog.at_level(logging.WARNING, "hf_adacomp"):
        new_trainer(tmp_path, 6)
        assert "half-written" not in caplog.text
        harm(tmp_path / "checkpoint-4")
        trainer = new_trainer(tmp_path, 6)
    assert f"checkpoint-4 in {tmp_path} is half-written" in caplog.text
    assert reason in caplog.text
    assert "checkpoint-2" not in caplog.text
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 6
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["global_step"] == 6
    assert unfinished_checkpoints(tmp_path) == {}


def test_half_written_checkpoint_is_never_resumed_silently(tmp_path, quick_fit):
    new_trainer(tmp_path, 4).train()
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-4.trainer_state.json"):
        new_trainer(tmp_path, 6).train(resume_from_checkpoint=True)
