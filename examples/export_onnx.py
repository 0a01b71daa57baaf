"""Export a packed encoder to ONNX: codes stay bytes in the file, and the graph decodes what it looks up.

python examples/export_onnx.py --model_name_or_path compressed_model/compressed --onnx_file model.onnx
python examples/export_onnx.py --model_name_or_path compressed_model/compressed --onnx_file model.onnx \
    --dense_model_name_or_path compressed_model/dense

Checks the file against PyTorch at several shapes, and its size against the safetensors file; with a dense model it
measures both in ONNX Runtime, in turn. Needs the extra `onnx`.
"""

import copy
import json
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import onnxruntime
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, HfArgumentParser, PreTrainedModel

import hf_adacomp  # noqa: F401  # makes packed models loadable

SHAPES = ((1, 7), (1, 16), (5, 33), (32, 64))
INPUTS = ("input_ids", "attention_mask")
TOLERANCE = 1e-4


@dataclass
class ExportArguments:
    model_name_or_path: str = field(metadata={"help": "Folder of a packed encoder, with or without a task head."})
    onnx_file: str = field(metadata={"help": "File to write."})
    dense_model_name_or_path: str | None = field(default=None, metadata={"help": "Dense model to be timed against."})
    repeats: int = field(default=15, metadata={"help": "Interleaved repeats of each timing."})
    threads: int = field(default=1, metadata={"help": "Threads of ONNX Runtime."})
    json_out: str | None = field(default=None, metadata={"help": "Write every figure to this file."})


class Encoder(nn.Module):
    """The first output of a model, as a function of ids and mask: what a graph has for input and output."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]


def load(name: str) -> Encoder:
    """The model with the head that it was saved with."""
    architecture = (AutoConfig.from_pretrained(name).architectures or ["AutoModel"])[0]
    return Encoder(getattr(transformers, architecture).from_pretrained(name, attn_implementation="eager")).eval()


def random_inputs(model: Encoder, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Ids and a mask that hides the end of the first text."""
    vocabulary = model.model.config.get_text_config().vocab_size
    mask = torch.ones(shape, dtype=torch.int64)
    mask[0, shape[1] // 2 + 1 :] = 0
    return {"input_ids": torch.randint(vocabulary, shape), "attention_mask": mask}


def export(model: Encoder, file: Path) -> None:
    """Write `model` for any number of texts of any length."""
    axes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The axis name|# The axis name", UserWarning)  # ids and mask share theirs
        warnings.filterwarnings("ignore", "`isinstance\\(treespec", FutureWarning)  # of PyTorch about itself
        program = torch.onnx.export(
            model,
            kwargs=random_inputs(model, (2, 16)),
            input_names=INPUTS,
            output_names=("output",),
            dynamic_shapes=dict.fromkeys(INPUTS, axes),
            dynamo=True,
            verbose=False,
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in the source each comes from: much of a small file
    program.save(file)


def session(file: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def run(running: onnxruntime.InferenceSession, inputs: dict[str, Tensor]) -> Tensor:
    return torch.from_numpy(running.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


@torch.no_grad()
def largest_difference(model: Encoder, running: onnxruntime.InferenceSession) -> float:
    """Between ONNX Runtime and PyTorch, over `SHAPES`."""
    return max(
        float((run(running, inputs) - model(**inputs)).abs().max())
        for inputs in (random_inputs(model, shape) for shape in SHAPES)
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
    model = load(args.model_name_or_path)
    export(copy.deepcopy(model), file)
    ours = session(file, args.threads)
    stored = sum(part.stat().st_size for part in Path(args.model_name_or_path).glob("*.safetensors"))
    figures = {
        "onnx_bytes": file.stat().st_size,
        "safetensors_bytes": stored,
        "largest_difference": largest_difference(model, ours),
    }
    if args.dense_model_name_or_path is not None:
        dense_file = file.with_name(f"{file.stem}.dense.onnx")
        export(load(args.dense_model_name_or_path), dense_file)
        figures["dense_onnx_bytes"] = dense_file.stat().st_size
        dense = session(dense_file, args.threads)
        for shape in SHAPES:
            inputs = random_inputs(model, shape)
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
