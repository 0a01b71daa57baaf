"""Labelled texts for the examples: from files, from the Hub, or the docstring corpus when nothing is named.

raw = load_splits(DataTrainingArguments(train_file="train.tsv", column_names=["label", "text"]), seed=42)
splits, label_names = tokenize(raw, tokenizer, data_args)
python examples/benchmarks/classification.py --train_file train.tsv --test_file test.tsv --column_names label text
"""

import csv
import sys
from dataclasses import dataclass, field
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

sys.path.append(str(Path(__file__).resolve().parents[1]))  # examples/ is no package
from docstring_corpus import build_corpus  # found through the line above


@dataclass
class DataTrainingArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "Data set of the Hub, for `datasets`."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    test_split_name: str = field(
        default="test",
        metadata={"help": "Split to report on. For GLUE, whose test labels are secret: validation."},
    )
    train_file: str | None = field(default=None, metadata={"help": "csv, tsv, json or jsonl file, .gz too."})
    validation_file: str | None = field(default=None, metadata={"help": "Default: a tenth of the training texts."})
    test_file: str | None = field(default=None, metadata={"help": "Default: a tenth of the training texts."})
    column_names: list[str] | None = field(
        default=None, metadata={"help": "Columns of csv and tsv files without a header, e.g. `label text`."}
    )
    text_column_names: list[str] | None = field(
        default=None,
        metadata={"help": "One column, or two for pairs of texts. Default: `text` or `sentence`."},
    )
    label_column_name: str = field(default="label", metadata={"help": "Column of the labels, numbers or names."})
    label_prefix_separator: str | None = field(
        default=None, metadata={"help": 'Keep a label up to this separator: ":" makes LOC of LOC:city.'}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training texts."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "... validation texts."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "... test texts."})

    @property
    def data_name(self) -> str:
        """What a model card calls the data."""
        if self.train_file is not None:
            return Path(self.train_file).name.split(".")[0]
        return self.dataset_name or "docstrings of libraries"


def load_splits(args: DataTrainingArguments, seed: int) -> DatasetDict:
    """Train, validation and test texts; what is not given is held out from the training texts."""
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    files = {split: file for split, file in files.items() if file is not None}
    if args.dataset_name is not None:
        found = load_dataset(args.dataset_name, args.dataset_config_name)
        wanted = {"train": "train", "validation": "validation", "test": args.test_split_name}
        if args.test_split_name == "validation":
            del wanted["validation"]
        raw = DatasetDict({split: found[name] for split, name in wanted.items() if name in found})
    elif "train" in files:
        raw = DatasetDict({split: load_file(file, args.column_names) for split, file in files.items()})
    elif files:
        raise ValueError("--validation_file and --test_file need a --train_file.")
    else:
        raw = build_corpus()
    for split in ("test", "validation"):
        if split not in raw:
            parts = raw["train"].train_test_split(test_size=0.1, seed=seed)
            raw["train"], raw[split] = parts["train"], parts["test"]
    limits = {
        "train": args.max_train_samples,
        "validation": args.max_eval_samples,
        "test": args.max_predict_samples,
    }
    for split, limit in limits.items():
        if limit is not None and limit < len(raw[split]):
            raw[split] = raw[split].shuffle(seed=seed).select(range(limit))  # files are often sorted by label
    return raw


def load_file(file: str, column_names: list[str] | None) -> Dataset:
    extension = Path(file.removesuffix(".gz")).suffix
    if extension in (".json", ".jsonl"):
        return load_dataset("json", data_files=file, split="train")
    if extension not in (".csv", ".tsv"):
        raise ValueError(f"{file} should end in .csv, .tsv, .json or .jsonl, or one of them and .gz.")
    options: dict = {"keep_default_na": False}  # "null" is a word
    if column_names is not None:
        options.update(names=column_names, header=None)
    if extension == ".tsv":
        options.update(sep="\t", quoting=csv.QUOTE_NONE)  # quotation marks belong to the text
    return load_dataset("csv", data_files=file, split="train", **options)


def text_columns_of(raw: DatasetDict, args: DataTrainingArguments) -> list[str]:
    """The columns that hold the texts; none if they are neither named nor known by their names."""
    columns = raw["train"].column_names
    return args.text_column_names or [name for name in ("text", "sentence") if name in columns][:1]


def tokenize(
    raw: DatasetDict, tokenizer: PreTrainedTokenizerBase, args: DataTrainingArguments, max_length: int
) -> tuple[DatasetDict, list[str]]:
    """Token ids and label ids of every split, and the names of the labels."""
    columns, label_column = raw["train"].column_names, args.label_column_name
    text_columns = text_columns_of(raw, args)
    if not text_columns or not {*text_columns, label_column} <= set(columns):
        raise ValueError(
            f"The training data has the columns {columns}: name those of texts and labels by "
            "--text_column_names and --label_column_name, or all of a headerless file by --column_names."
        )

    def name_of(label: int | str) -> str:
        return str(label).split(args.label_prefix_separator)[0] if args.label_prefix_separator else str(label)

    feature = raw["train"].features[label_column]
    if isinstance(feature, ClassLabel):
        names, ids = feature.names, {str(index): index for index in range(feature.num_classes)}
    else:
        names = list(dict.fromkeys(name_of(label) for label in sorted(raw["train"].unique(label_column))))
        ids = {name: index for index, name in enumerate(names)}

    def encode(batch: dict[str, list]) -> dict[str, list]:
        labels = [name_of(label) for label in batch[label_column]]
        if unknown := set(labels) - set(ids):
            raise ValueError(f"Labels {sorted(unknown)} are not among those of the training data: {sorted(ids)}.")
        texts = (batch[column] for column in text_columns)
        encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        return {**encoded, "labels": [ids[label] for label in labels]}

    return raw.map(encode, batched=True, remove_columns=columns, desc="Tokenizing"), names
