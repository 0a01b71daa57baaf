"""Ranks end with the same table whatever way a training is shared out, or are told why not."""

import re
from pathlib import Path

import pytest
import torch
from conftest import torchrun
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("ways.py")


WAYS = ["streams", "checkpointing", "accumulation", "static_graph", "other_start", "calibrated_by_one", "sharded"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes have written what each way gave them: in one start, which takes longer than the ways."""
    folder = tmp_path_factory.mktemp("ways")
    done = torchrun(2, SCRIPT, folder, *WAYS)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_ranks_agree(folder, way):
    first, second = (load_file(folder / f"{way}-{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("apart", "ranks 0 and 1 have trained different tables"),
        ("sharded_in_training", "parameters of a compressed table are sharded .*or shard the packed model"),
    ],
)
def test_what_cannot_work_is_told(tmp_path, way, reason):
    done = torchrun(2, SCRIPT, tmp_path, way)
    assert done.returncode != 0
    assert re.search(reason, done.stderr)
