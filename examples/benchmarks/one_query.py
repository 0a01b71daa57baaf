"""Peak memory in bytes of a process that loads an ONNX file and answers one query: nothing else is imported here.

python examples/benchmarks/one_query.py model.onnx 101 7592 102  # token ids of the query

Linux counts it by program in `VmHWM`; what `getrusage` calls the maximum may be that of the process before `exec`.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime


def session(file: str | Path) -> onnxruntime.InferenceSession:
    """That of one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def embed(running: onnxruntime.InferenceSession, ids: list[list[int]], mask: list[list[int]]) -> np.ndarray:
    """Vectors of texts, (B, d)."""
    inputs = {"input_ids": np.array(ids, dtype=np.int64), "attention_mask": np.array(mask, dtype=np.int64)}
    return running.run(["sentence_embedding"], inputs)[0]


def peak_memory() -> int:
    """Bytes that this process had at most in memory."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    token_ids = [*map(int, sys.argv[2:])]
    embed(session(sys.argv[1]), [token_ids], [[1] * len(token_ids)])
    print(peak_memory())
