"""Ranks end with the same table whatever way a training is shared out, or are told why not."""

from pathlib import Path

import pytest
import torch
from conftest import torchrun
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("ways.py")


@pytest.mark.parametrize("way", ["streams", "checkpointing", "static_graph", "other_start", "sharded"])
def test_ranks_agree(tmp_path, way):
    done = torchrun(2, SCRIPT, tmp_path, way)
    assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_ranks_that_train_apart_are_told(tmp_path):
    done = torchrun(2, SCRIPT, tmp_path, "apart")
    assert done.returncode != 0
    assert "ranks 0 and 1 have trained different tables" in done.stderr
