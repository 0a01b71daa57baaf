"""Export a packed model to ONNX with `hf_adacomp.export_onnx`, check it against PyTorch, time it against a dense one.

python examples/export_onnx.py --model_name_or_path compressed_model/compressed --onnx_file model.onnx
python examples/export_onnx.py --model_name_or_path compressed_model/compressed --onnx_file model.onnx \
    --dense_model_name_or_path compressed_model/dense

Compares the file with PyTorch at several shapes, and its size with the safetensors file; with a dense model it
measures both in ONNX Runtime, in turn. Needs the extra `onnx`.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import onnxruntime
import torch
from torch import Tensor
from transformers import HfArgumentParser

from hf_adacomp import export_onnx
from hf_adacomp.export.generation import GenerationStep, graph_of
from hf_adacomp.export.graph import Graph
from hf_adacomp.export.onnx_file import write_graph
from hf_adacomp.saved_models import load_model

SHAPES = ((1, 7), (1, 16), (5, 33), (32, 64))
TOLERANCE = 1e-4


@dataclass
class ExportArguments:
    model_name_or_path: str = field(metadata={"help": "Folder of a packed encoder, with or without a task head."})
    onnx_file: str = field(metadata={"help": "File to write."})
    dense_model_name_or_path: str | None = field(default=None, metadata={"help": "Dense model to be timed against."})
    repeats: int = field(default=15, metadata={"help": "Interleaved repeats of each timing."})
    threads: int = field(default=1, metadata={"help": "Threads of ONNX Runtime."})
    json_out: str | None = field(default=None, metadata={"help": "Write every figure to this file."})


def random_inputs(graph: Graph, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Ids and a mask that hides the end of the first text."""
    mask = torch.ones(shape, dtype=torch.int64)
    mask[0, shape[1] // 2 + 1 :] = 0
    return {"input_ids": torch.randint(graph.num_tokens, shape), "attention_mask": mask}


def session(file: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def run(running: onnxruntime.InferenceSession, inputs: dict[str, Tensor]) -> Tensor:
    return torch.from_numpy(running.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


@torch.no_grad()
def largest_difference(graph: Graph, running: onnxruntime.InferenceSession) -> float:
    """Between ONNX Runtime and PyTorch, over `SHAPES`."""
    return max(
        float((run(running, inputs) - graph(**inputs)[0]).abs().max())
        for inputs in (random_inputs(graph, shape) for shape in SHAPES)
    )


def time_ratio(ours: onnxruntime.InferenceSession, dense: onnxruntime.InferenceSession, inputs: dict, n: int) -> float:
    """Median over interleaved repeats of our time over the dense model's."""
    ratios = []
    for _ in range(n + 1):
        seconds = []
        for running in (ours, dense):
            started = time.perf_counter()
            run(running, inputs)
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[0] / seconds[1])
    return median(ratios[1:])  # the first one warms up


def main(arguments: list[str] | None = None) -> dict:
    (args,) = HfArgumentParser(ExportArguments).parse_args_into_dataclasses(arguments)
    torch.manual_seed(0)
    file = Path(args.onnx_file)
    model = load_model(args.model_name_or_path)
    export_onnx(model, file)
    graph = graph_of(model)
    if isinstance(graph, GenerationStep):
        raise ValueError(f"{args.model_name_or_path} generates: this script measures models of whole texts")
    ours = session(file, args.threads)
    stored = sum(part.stat().st_size for part in Path(args.model_name_or_path).glob("*.safetensors"))
    figures = {
        "onnx_bytes": file.stat().st_size,
        "safetensors_bytes": stored,
        "largest_difference": largest_difference(graph, ours),
    }
    if args.dense_model_name_or_path is not None:
        dense_file = file.with_name(f"{file.stem}.dense.onnx")
        write_graph(Graph(load_model(args.dense_model_name_or_path)), dense_file)
        figures["dense_onnx_bytes"] = dense_file.stat().st_size
        dense = session(dense_file, args.threads)
        for shape in SHAPES:
            inputs = random_inputs(graph, shape)
            figures[f"time over dense, {shape[0]} x {shape[1]}"] = time_ratio(ours, dense, inputs, args.repeats)
    for name, value in figures.items():
        print(f"{name:<28}{value:>14,d}" if isinstance(value, int) else f"{name:<28}{value:>14.3g}")
    if args.json_out is not None:
        Path(args.json_out).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if figures["largest_difference"] > TOLERANCE:
        raise ValueError(f"{file} differs from PyTorch by {figures['largest_difference']:.2g}: do not use it")
    return figures


if __name__ == "__main__":
    main()
