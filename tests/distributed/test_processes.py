"""Training in two processes with stock PyTorch and Trainer (gloo, on the CPU)."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import torchrun
from safetensors.torch import load_file
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification, TrainingArguments

from hf_adacomp import AdaCompCallback, compress, pack
from hf_adacomp.integration.compressed_tables import compressed_embeddings

SCRIPT = Path(__file__).with_name("train.py")
ROWS = 8
"""Rows of all processes together in a step."""


def tensors(folder: Path, processes: int, checkpoint: str | None = None) -> list[dict[str, torch.Tensor]]:
    """What each process of a training ends with."""
    done = torchrun(processes, SCRIPT, folder, ROWS // processes, *([checkpoint] if checkpoint else []))
    assert done.returncode == 0, done.stderr
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(processes)]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, tensors(folder, 2)


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def test_processes_agree(two):
    _, (first, second) = two
    assert differing(first, second) == []


def test_result_is_that_of_one_process_with_the_rows_of_both(two, tmp_path):
    _, (first, _) = two
    (alone,) = tensors(tmp_path, 1)
    for name, tensor in first.items():
        assert torch.allclose(tensor.double(), alone[name].double(), atol=1e-9), name


def test_a_resumed_run_equals_the_uninterrupted_one(two, tmp_path):
    folder, uninterrupted = two
    shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4")
    resumed = tensors(tmp_path, 2, str(tmp_path / "checkpoint-4"))
    assert [differing(a, b) for a, b in zip(uninterrupted, resumed, strict=True)] == [[], []]


class Wrapper(torch.nn.Module):
    """A larger model around the one that was compressed, as sentence-transformers and SetFit have it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize("form", ["training", "packed", "loaded", "wrapped"])
def test_no_buffer_of_the_table_is_broadcast(bert, config, counts, tmp_path, form):
    """DDP broadcasts buffers on every forward pass: these are constants, and as large as the table."""
    model = compress(bert, config, counts)
    if form in ("packed", "loaded"):
        pack(model)
    if form == "loaded":
        model.save_pretrained(tmp_path)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    if form == "wrapped":
        model = Wrapper(model)
        AdaCompCallback().on_init_end(TrainingArguments(str(tmp_path)), None, None, model=model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        broadcast = DistributedDataParallel(model).modules_buffers
    finally:
        dist.destroy_process_group()
    (table,) = compressed_embeddings(model).values()
    own = {id(buffer) for buffer in table.buffers()}
    assert len(own) > 1
    assert not own & {id(buffer) for buffer in broadcast}
    assert broadcast
