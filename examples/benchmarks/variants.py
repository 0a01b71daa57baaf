"""What the generating examples share: a model with a tied table, and smaller forms of it after the same training.

figures = compare_variants(dense, args, training_args, new_trainer, score)

Every variant starts from one dense model and trains equally long: the dense model itself, and models whose table is
compressed, with `head="compress"` (one set of codes for both ends) and `head="dense"` (the head keeps weights of its
own). Integer tables are rounded from the dense model after its training. Figures are those of the saved and reloaded
files.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from comparison import write_figures
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments, set_seed

from hf_adacomp import AdaCompCallback, AdaCompConfig, compress, size_report
from hf_adacomp.codes.rounding import quantize_rows

HEADS = ("compress", "dense")


@dataclass
class VariantArguments:
    target_ratio: float = field(default=16.0, metadata={"help": "Bytes of the dense table / bytes of ours."})
    further_epochs: float = field(default=1.0, metadata={"help": "Epochs of every variant after the dense training."})
    further_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of those."})
    heads: list[str] = field(default_factory=lambda: [*HEADS], metadata={"help": "Which output heads to try."})
    quick: bool = field(default=False, metadata={"help": "A small part of the data: to see that it works."})
    dense_model: str | None = field(
        default=None, metadata={"help": "The folder `start` of an earlier run: its dense model is not trained again."}
    )
    json_out: str | None = field(default=None, metadata={"help": "Write every figure to this file."})


def dense_start(
    args: VariantArguments,
    training_args: TrainingArguments,
    new_trainer: Callable[..., Trainer],
    new_model: Callable[[], PreTrainedModel],
) -> PreTrainedModel:
    """The dense model that every variant starts from, trained and kept in the output's folder `start`."""
    set_seed(training_args.seed)
    model = new_model()
    if args.dense_model is not None:
        return type(model).from_pretrained(args.dense_model)
    model = train(new_trainer(model=model, args=training_args))
    model.save_pretrained(Path(training_args.output_dir) / "start")
    return model


def train(trainer: Trainer) -> PreTrainedModel:
    """Train from the seed of the trainer's arguments on; returns its model."""
    set_seed(trainer.args.seed)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model


def round_table(model: PreTrainedModel, bits: int, group: int | None = None) -> int:
    """Round the tied table to integers in place, with a float16 scale a row or a group; returns its bytes."""
    weight = model.get_input_embeddings().weight
    integers, scale = quantize_rows(weight.detach().view(-1, group or weight.shape[1]), bits)
    with torch.no_grad():
        weight.copy_((integers * scale.half().float()).view_as(weight))
    return weight.numel() * bits // 8 + 2 * len(integers)


def compare_variants(
    dense: PreTrainedModel,
    args: VariantArguments,
    training_args: TrainingArguments,
    new_trainer: Callable[..., Trainer],
    score: Callable[[PreTrainedModel], dict[str, float]],
) -> dict[str, dict[str, float]]:
    """Table bytes, ratio, seconds and the values of `score`, by variant; printed, too."""
    dense_bytes = dense.get_input_embeddings().weight.nbytes
    further_args = copy.copy(training_args)
    further_args.num_train_epochs, further_args.learning_rate = args.further_epochs, args.further_learning_rate
    rows: dict[str, dict[str, float]] = {}

    def record(name: str, model: PreTrainedModel, table_bytes: int, seconds: float = 0.0) -> None:
        row = {"table_bytes": table_bytes, "ratio": dense_bytes / table_bytes, "seconds": seconds}
        rows[name] = {**row, **score(model)}

    for head in (None, *args.heads):
        model, start = copy.deepcopy(dense), time.perf_counter()
        if head is not None:
            compress(model, AdaCompConfig(target_ratio=args.target_ratio, head=head, seed=training_args.seed))
        trainer = new_trainer(model=model, args=further_args, callbacks=[AdaCompCallback()] if head else [])
        train(trainer)
        seconds = time.perf_counter() - start
        folder = Path(training_args.output_dir) / (f"compressed-head-{head}" if head else "dense")
        trainer.save_model(folder)
        reloaded = type(dense).from_pretrained(folder)
        if head is not None:
            report = size_report(reloaded)
            print(f"\nhead={head!r}\n{report}")
            record(f"head={head}", reloaded, report.total_bytes, seconds)
            continue
        record("dense", reloaded, dense_bytes, seconds)
        for bits in (8, 4):
            rounded = copy.deepcopy(reloaded)
            table_bytes = round_table(rounded, bits)
            record(f"int{bits}", rounded, table_bytes)

    names = [name for name in rows["dense"] if name not in ("table_bytes", "ratio", "seconds")]
    print(f"\n{'':<16}{'table bytes':>14}{'ratio':>8}{'seconds':>9}" + "".join(f"{name:>24}" for name in names))
    for variant, row in rows.items():
        print(
            f"{variant:<16}{row['table_bytes']:>14,}{row['ratio']:>8.1f}{row['seconds']:>9.0f}"
            + "".join(f"{row[name]:>24.2f}" for name in names)
        )
    return rows


def finish(variants: dict[str, dict[str, float]], started: float, file: str | None) -> dict:
    """All figures of a script, with the seconds since `started`; as JSON too, if a file is named."""
    figures = {"models": variants, "seconds": time.perf_counter() - started}
    print(f"\n{figures['seconds']:.0f} seconds in all")
    write_figures(figures, file)
    return figures
