"""Ranks end with the same table whatever way a training is shared out, or are told why not."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import child_environment
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("ways.py")


def run(folder: Path, way: str) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command = [sys.executable, *launcher, str(SCRIPT), str(folder), way]
    environment = {**child_environment(), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)


@pytest.mark.parametrize("way", ["streams", "checkpointing", "static_graph", "other_start", "sharded"])
def test_ranks_agree(tmp_path, way):
    done = run(tmp_path, way)
    assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_ranks_that_train_apart_are_told(tmp_path):
    done = run(tmp_path, "apart")
    assert done.returncode != 0
    assert "ranks 0 and 1 have trained different tables" in done.stderr
