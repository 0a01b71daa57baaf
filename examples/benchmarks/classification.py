"""Fine-tune a text classifier, compress its embedding table on the same task, reload it and compare the two.

python examples/benchmarks/classification.py                        # offline: MiniLM, docstrings of libraries
python examples/benchmarks/classification.py --train_file train.tsv --test_file test.tsv --column_names label text
python examples/benchmarks/classification.py --train_file snli.tsv --column_names premise hypothesis label \
    --text_column_names premise hypothesis
python examples/benchmarks/classification.py --model_name_or_path bert-base-uncased --dataset_name ag_news --one_run
"""

from dataclasses import dataclass, field

from comparison import CompressionArguments, ShortTrainingArguments, Task, compare, parse
from labelled_texts import DataTrainingArguments, load_splits, tokenize
from pretrained_encoder import bundled_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, PreTrainedModel


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Path or Hub name. Default: MiniLM of the extra `demo`, offline."}
    )
    max_seq_length: int = field(default=64, metadata={"help": "Truncate longer texts to so many tokens."})


def text_classification(model_args: ModelArguments, data_args: DataTrainingArguments, seed: int) -> Task:
    """The task of these files, with a sequence classifier on top of the named encoder."""
    name = model_args.model_name_or_path or bundled_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    splits, labels = tokenize(load_splits(data_args, seed), tokenizer, data_args, model_args.max_seq_length)

    def new_model() -> PreTrainedModel:
        return AutoModelForSequenceClassification.from_pretrained(
            name, id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)}
        )

    collator = DataCollatorWithPadding(tokenizer)
    return Task(splits, labels, tokenizer, new_model, collator, data_name=data_args.data_name)


def main(arguments: list[str] | None = None) -> dict:
    groups = (ModelArguments, DataTrainingArguments, CompressionArguments, ShortTrainingArguments)
    model_args, data_args, compression_args, training_args = parse(groups, arguments)
    compression_args.config(training_args.seed)  # before the work: a wrong setting is told at once
    task = text_classification(model_args, data_args, training_args.seed)
    return compare(task, compression_args, training_args)[1]


if __name__ == "__main__":
    main()
