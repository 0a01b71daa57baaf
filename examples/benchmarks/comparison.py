"""What every example script does: train the dense model, compress it, train on, reload the file, compare.

figures = compare(task, model_args, compression_args, training_args)
"""

import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import evaluate
import numpy as np
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import EvalResult
from transformers import (
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_adacomp import (
    AdaCompCallback,
    AdaCompConfig,
    compress,
    push_model_card,
    save_model_card,
    size_report,
    token_table,
)


@dataclass(frozen=True)
class Task:
    """A task as a `Trainer` needs it: tokenized splits with `labels` (-100 where none counts) and a model to train.

    `kind` and `data_name` are what the Hub calls the task and what a model card calls the data.
    """

    splits: DatasetDict
    labels: list[str]
    tokenizer: PreTrainedTokenizerBase
    new_model: Callable[[], PreTrainedModel]
    collator: Callable
    kind: str = "text-classification"
    data_name: str = "texts of the training files"

    def token_counts(self, num_embeddings: int) -> torch.Tensor:
        """Occurrences of each token in the training split, (V,)."""
        ids = torch.cat([torch.tensor(row) for row in self.splits["train"]["input_ids"]])
        return torch.bincount(ids, minlength=num_embeddings)


@dataclass
class CompressionArguments:
    code_lengths: list[int] | None = field(
        default=None, metadata={"help": "The numbers of bits a token may take. Default: chosen for the size."}
    )
    target_ratio: float = field(default=80.0, metadata={"help": "Bytes of the dense table / bytes of ours."})
    select_fraction: float | None = field(
        default=None, metadata={"help": "Share of training that chooses lengths. Default: AdaCompConfig's."}
    )
    codebook_dtype: str | None = field(default=None, metadata={"help": "Storage of code-books, e.g. float16."})
    compression_epochs: float = field(default=2.0, metadata={"help": "Epochs after the dense training."})
    compression_learning_rate: float = field(
        default=5e-5, metadata={"help": "Code vectors are small: rates far above this wreck a good start."}
    )
    one_run: bool = field(
        default=False, metadata={"help": "Compress the pretrained model, train that for --num_train_epochs."}
    )
    skip_dense: bool = field(default=False, metadata={"help": "With --one_run: no dense model to compare."})
    json_out: str | None = field(default=None, metadata={"help": "Write every figure to this file."})

    def __post_init__(self) -> None:
        if self.skip_dense and not self.one_run:
            raise ValueError("--skip_dense needs --one_run: without it the dense model is what is compressed.")

    def config(self, seed: int) -> AdaCompConfig:
        names = ("code_lengths", "select_fraction", "codebook_dtype")
        chosen = {name: value for name in names if (value := getattr(self, name)) is not None}
        return AdaCompConfig(target_ratio=self.target_ratio, seed=seed, **chosen)


@dataclass
class ShortTrainingArguments(TrainingArguments):
    """The Trainer's own options, with defaults for a short run."""

    output_dir: str | None = field(default="compressed_model", metadata={"help": "Where models go."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Epochs of the dense model, or of one run."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Texts in a training step."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Texts in an evaluation step."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "Texts of like length in a batch: little padding."}
    )
    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps."})
    save_strategy: str = field(default="no", metadata={"help": "When to write checkpoints."})


def parse(groups: tuple[type, ...], arguments: list[str] | None) -> tuple:
    """The groups of arguments, from the command line or from one JSON file."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = HfArgumentParser(groups)
    if len(arguments) == 1 and arguments[0].endswith(".json"):
        return parser.parse_json_file(arguments[0])
    return parser.parse_args_into_dataclasses(arguments)


def write_figures(figures: dict, file: str | None) -> None:
    """Write all figures of a script as JSON, if a file is named."""
    if file is not None:
        Path(file).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def scoring() -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` of a Trainer: accuracy and log-loss over all labels that count."""
    # A path, as evaluate.load("accuracy") would fetch its code from the Hub.
    metric = evaluate.load(str(Path(__file__).with_name("accuracy_and_log_loss.py")), keep_in_memory=True)

    def compute_metrics(output: EvalPrediction) -> dict[str, float]:
        log_probabilities, labels = log_probabilities_of(output)
        counting = labels != -100
        return metric.compute(predictions=np.exp(log_probabilities[counting]), references=labels[counting])

    return compute_metrics


def log_probabilities_of(output: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities (..., classes) and labels (...) of a Trainer's predictions."""
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    return torch.from_numpy(logits).float().log_softmax(dim=-1).numpy(), output.label_ids


def train_and_score(
    trainer: Trainer, new_trainer: Callable[..., Trainer], test: Dataset
) -> tuple[PreTrainedModel, dict[str, float]]:
    """Train, save, load with the stock loader and measure that: the figures are those of the file."""
    started = time.perf_counter()
    trainer.train()
    figures = {"epochs": float(trainer.state.epoch), "seconds": time.perf_counter() - started}
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    figures["file_bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    reloaded = type(trainer.model).from_pretrained(folder)
    scorer = new_trainer(model=reloaded, args=trainer.args)
    for split, texts in (("validation", scorer.eval_dataset), ("test", test)):
        metrics = scorer.evaluate(texts, metric_key_prefix=split)
        figures |= {f"{split}_{name}": metrics[f"{split}_{name}"] for name in ("accuracy", "log_loss")}
    return reloaded, figures


def extreme_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, counts: torch.Tensor, least_count: int = 5
) -> dict[str, list[dict]]:
    """The ten longest- and the ten shortest-coded tokens of those seen `least_count` times in training.

    Of equal lengths, rare tokens come first among the longest and common ones among the shortest: those whose
    length is not what their count alone would give.
    """
    rows = [
        {"token": row.token, "bits": row.bits, "count": int(counts[row.id])}
        for row in token_table(model, tokenizer)
        if counts[row.id] >= least_count and row.id not in tokenizer.all_special_ids
    ]
    return {
        "longest_codes": sorted(rows, key=lambda row: (-row["bits"], row["count"]))[:10],
        "shortest_codes": sorted(rows, key=lambda row: (row["bits"], -row["count"]))[:10],
    }


def print_report(figures: dict) -> None:
    stages = [stage for stage in ("dense", "compressed") if stage in figures]
    print(f"\n{'':<22}" + "".join(f"{stage:>14}" for stage in stages))
    for name, value in figures["compressed"].items():
        form = ">14,d" if isinstance(value, int) else ">14.4f"
        print(f"{name:<22}" + "".join(format(figures[stage][name], form) for stage in stages))
    for which in ("longest", "shortest"):
        print(f"\nFrequent tokens, {which} codes\n{'token':<20}{'bits':>6}{'count':>8}")
        for row in figures[f"{which}_codes"]:
            print(f"{row['token']:<20}{row['bits']:>6}{row['count']:>8}")


def write_card(trainer: Trainer, model: PreTrainedModel, task: Task, figures: dict) -> None:
    """Add test accuracies to the card of the saved model, and of the pushed one."""
    scores = [
        [
            EvalResult(
                task_type=task.kind,
                dataset_type=task.data_name,
                dataset_name=task.data_name,
                dataset_split="test",
                metric_type="accuracy",
                metric_value=round(figures[stage]["test_accuracy"], 4),
            )
        ]
        for stage in ("compressed", "dense")
        if stage in figures
    ]
    results, dense_results = scores[0], scores[1] if len(scores) > 1 else []
    save_model_card(model, trainer.args.output_dir, results=results, dense_results=dense_results)
    if trainer.args.push_to_hub:
        push_model_card(
            model,
            trainer.hub_model_id,
            results=results,
            dense_results=dense_results,
            token=trainer.args.hub_token,
            revision=trainer.args.hub_revision,
        )


def compare(
    task: Task, compression_args: CompressionArguments, dense_args: TrainingArguments
) -> tuple[PreTrainedModel, dict]:
    """Train and measure; returns the packed model and (printed and written to `json_out` too) every figure."""
    config = compression_args.config(dense_args.seed)
    started = time.perf_counter()
    figures: dict = {"labels": task.labels, "texts": {split: len(part) for split, part in task.splits.items()}}
    print(figures)

    def pretrained() -> PreTrainedModel:
        set_seed(dense_args.seed)  # the new classifier layer starts alike in every run
        return task.new_model()

    new_trainer = partial(
        Trainer,
        train_dataset=task.splits["train"],
        eval_dataset=task.splits["validation"],
        data_collator=task.collator,
        processing_class=task.tokenizer,
        compute_metrics=scoring(),
    )
    compressed_args = copy.copy(dense_args)
    compressed_args.learning_rate = compression_args.compression_learning_rate
    dense_args.push_to_hub = False
    if not compression_args.one_run:
        compressed_args.num_train_epochs = compression_args.compression_epochs
    dense_args.output_dir, compressed_args.output_dir = (
        str(Path(dense_args.output_dir) / stage) for stage in ("dense", "compressed")
    )

    model = pretrained()
    if not compression_args.skip_dense:
        print("\nTraining the dense model")
        trainer = new_trainer(model=model, args=dense_args)
        _, figures["dense"] = train_and_score(trainer, new_trainer, task.splits["test"])
        if compression_args.one_run:
            model = pretrained()

    print("\nTraining the compressed model")
    counts = task.token_counts(model.get_input_embeddings().num_embeddings)
    fitting = time.perf_counter()
    model = compress(model, config, token_counts=counts)
    fitting = time.perf_counter() - fitting
    trainer = new_trainer(model=model, args=compressed_args, callbacks=[AdaCompCallback()])
    model, figures["compressed"] = train_and_score(trainer, new_trainer, task.splits["test"])
    figures["compressed"]["seconds"] += fitting
    if not compression_args.one_run:
        figures["compressed"]["epochs"] += figures["dense"]["epochs"]  # it has seen the task for longer

    write_card(trainer, model, task, figures)
    size = size_report(model)
    parts = "dense_bytes codes_bytes lengths_bytes codebook_bytes total_bytes ratio bits_per_token"
    figures["size"] = {part: getattr(size, part) for part in parts.split()}
    figures |= extreme_tokens(model, task.tokenizer, counts)
    figures["seconds"] = time.perf_counter() - started
    print_report(figures)
    print(f"\n{size}\n\n{figures['seconds']:.0f} seconds in all")
    write_figures(figures, compression_args.json_out)
    return model, figures
