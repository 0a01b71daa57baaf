"""Fine-tune a tagger, compress its embedding table on the same task, reload it and compare the two.

python examples/benchmarks/token_classification.py --train_file train.conllu.gz --validation_file dev.conllu.gz \\
    --test_file test.conllu.gz
"""

import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from comparison import CompressionArguments, ShortTrainingArguments, Task, compare, parse
from datasets import Dataset, DatasetDict
from pretrained_encoder import bundled_model
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

UPOS_COLUMN = 3


@dataclass
class TaggingArguments:
    train_file: str = field(metadata={"help": "Sentences in CoNLL-U, .gz too: universaldependencies.org/format."})
    test_file: str = field(metadata={"help": "Test sentences."})
    validation_file: str | None = field(default=None, metadata={"help": "Default: a tenth of the training data."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training sentences."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Path or Hub name. Default: MiniLM of the extra `demo`, offline."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Truncate longer sentences to so many tokens."})


def read_conllu(file: str) -> Dataset:
    """Words and universal part-of-speech tags of every sentence."""

    def sentences() -> Iterator[dict[str, list[str]]]:
        words, tags = [], []
        with gzip.open(file, "rt", encoding="utf-8") if file.endswith(".gz") else open(file, encoding="utf-8") as lines:
            for line in lines:
                columns = line.rstrip("\n").split("\t")
                if columns[0].isdecimal():  # neither a comment nor a multiword token nor an empty node
                    words.append(columns[1])
                    tags.append(columns[UPOS_COLUMN])
                elif not columns[0] and words:
                    yield {"words": words, "tags": tags}
                    words, tags = [], []
        if words:
            yield {"words": words, "tags": tags}

    return Dataset.from_list(list(sentences()))


def token_classification(
    args: TaggingArguments,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model_for: Callable[[list[str]], PreTrainedModel] | None = None,
) -> Task:
    """The tagging task of these files; the first token of a word carries its label.

    For the pretrained model that the arguments name, or for another: its tokenizer, and what makes it for labels.
    """
    name = args.model_name_or_path or bundled_model()
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(name)
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    raw = DatasetDict({split: read_conllu(file) for split, file in files.items() if file is not None})
    if "validation" not in raw:
        parts = raw["train"].train_test_split(test_size=0.1, seed=seed)
        raw["train"], raw["validation"] = parts["train"], parts["test"]
    if args.max_train_samples is not None and args.max_train_samples < len(raw["train"]):
        raw["train"] = raw["train"].shuffle(seed=seed).select(range(args.max_train_samples))
    labels = sorted({tag for tags in raw["train"]["tags"] for tag in tags})

    def encode(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(batch["words"], is_split_into_words=True, truncation=True, max_length=args.max_seq_length)
        rows = []
        for row, tags in enumerate(batch["tags"]):
            words = encoded.word_ids(row)
            rows.append(
                [
                    labels.index(tags[word]) if word is not None and word != before else -100
                    for before, word in zip([None, *words], words, strict=False)
                ]
            )
        return {**encoded, "labels": rows}

    def new_model() -> PreTrainedModel:
        if model_for is not None:
            return model_for(labels)
        return AutoModelForTokenClassification.from_pretrained(
            name, id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)}
        )

    splits = raw.map(encode, batched=True, remove_columns=["words", "tags"], desc="Tokenizing")
    collator = DataCollatorForTokenClassification(tokenizer)
    return Task(splits, labels, tokenizer, new_model, collator, kind="token-classification")


def main(arguments: list[str] | None = None) -> dict:
    tagging_args, compression_args, training_args = parse(
        (TaggingArguments, CompressionArguments, ShortTrainingArguments), arguments
    )
    compression_args.config(training_args.seed)  # before the work: a wrong setting is told at once
    return compare(token_classification(tagging_args, training_args.seed), compression_args, training_args)[1]


if __name__ == "__main__":
    main()
