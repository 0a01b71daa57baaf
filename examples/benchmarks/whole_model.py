"""The whole model small: a packed token table with torchao's integer weights in all linear layers.

python examples/benchmarks/whole_model.py --model_name_or_path compressed_model/compressed \
    --dense_model_name_or_path compressed_model/dense --train_file train.tsv --test_file test.tsv \
    --column_names label text

Writes each form of a text classifier to one safetensors file, loads that again and measures what was loaded: bytes of
the file and test accuracy. `torchao` alone rounds the dense table and the linear layers; with `table` the table is the
packed one. torchao keeps int4 in whole bytes, in memory and in the file.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from comparison import ShortTrainingArguments, parse, scoring, write_figures
from labelled_texts import DataTrainingArguments, load_splits, tokenize
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict
from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
)

from hf_adacomp import AdaptiveCompressedEmbedding

GROUP = 32
"""Weights that share a scale in int4."""

LOGIT_TOLERANCE = 1e-6
"""Of the largest logit."""


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Folder of a packed text classifier."})
    dense_model_name_or_path: str = field(metadata={"help": "Folder of the dense one."})
    max_seq_length: int = field(default=64, metadata={"help": "Truncate longer texts to so many tokens."})
    json_out: str | None = field(default=None, metadata={"help": "Write every figure to this file."})


def round_weights(model: PreTrainedModel, bits: int | None) -> None:
    """Round linear layers, and a dense token table, to integers of so many bits; None leaves them."""
    if bits is None:
        return
    granularity = PerAxis(0) if bits == 8 else PerGroup(GROUP)
    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity)
    table = model.get_input_embeddings()

    def chosen(module: nn.Module, _: str) -> bool:
        return isinstance(module, nn.Linear) or (module is table and not isinstance(table, AdaptiveCompressedEmbedding))

    quantize_(model, config, filter_fn=chosen)


def save(model: PreTrainedModel, file: Path) -> None:
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    save_file(tensors, file, metadata=metadata)


def load(folder: str, file: Path) -> PreTrainedModel:
    """The model of `folder` with all of its weights from `file`."""
    with safe_open(file, "pt") as opened:
        tensors, left = unflatten_tensor_state_dict(load_file(file), opened.metadata())
    if left:
        raise ValueError(f"{file} holds tensors that torchao does not know: {sorted(left)}")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


@torch.no_grad()
def is_same(loaded: PreTrainedModel, saved: PreTrainedModel) -> bool:
    """Whether both hold the same bits and compute the same logits, up to the order in which kernels sum them.

    That order depends on where weights lie in memory, which a mapped file decides.
    """
    held, expected = (flatten_tensor_state_dict(model.state_dict())[0] for model in (loaded, saved))
    if held.keys() != expected.keys():
        return False
    if not all(same_bits(held[name], tensor) for name, tensor in expected.items()):
        return False
    ids = torch.arange(16)[None]
    logits = saved(ids).logits
    return bool((loaded(ids).logits - logits).abs().max() <= LOGIT_TOLERANCE * logits.abs().max())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def measure(folder: str, bits: int | None, file: Path, accuracy: Callable[[PreTrainedModel], float]) -> dict:
    """Bytes and accuracy of one form, as saved and loaded again."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    round_weights(model, bits)
    save(model, file)
    loaded = load(folder, file)
    if not is_same(loaded, model):
        raise ValueError(f"{file} does not give back the model that was saved")
    return {"file_bytes": file.stat().st_size, "test_accuracy": accuracy(loaded)}


def main(arguments: list[str] | None = None) -> dict:
    model_args, data_args, training_args = parse(
        (ModelArguments, DataTrainingArguments, ShortTrainingArguments), arguments
    )
    tokenizer = AutoTokenizer.from_pretrained(model_args.dense_model_name_or_path)
    splits, _ = tokenize(load_splits(data_args, training_args.seed), tokenizer, data_args, model_args.max_seq_length)
    compute_metrics, collator = scoring(), DataCollatorWithPadding(tokenizer)
    folder = Path(training_args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)

    def accuracy(model: PreTrainedModel) -> float:
        trainer = Trainer(model, training_args, data_collator=collator, compute_metrics=compute_metrics)
        trainer.remove_callback(PrinterCallback)
        return trainer.evaluate(splits["test"])["eval_accuracy"]

    figures = {}
    for name, source in (("dense", model_args.dense_model_name_or_path), ("table", model_args.model_name_or_path)):
        for bits in (None, 8, 4):
            form = name if bits is None else f"torchao int{bits}" + (" + table" if name == "table" else "")
            figures[form] = measure(source, bits, folder / f"{form.replace(' ', '_')}.safetensors", accuracy)
    print(f"\n{'form':<24}{'file bytes':>14}{'ratio':>8}{'test accuracy':>16}")
    for form, row in figures.items():
        ratio = figures["dense"]["file_bytes"] / row["file_bytes"]
        print(f"{form:<24}{row['file_bytes']:>14,}{ratio:>8.1f}{100 * row['test_accuracy']:>15.1f}%")
    write_figures(figures, model_args.json_out)
    return figures


if __name__ == "__main__":
    main()
