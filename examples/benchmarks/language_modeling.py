"""A small GPT-2 whose output head is tied to its token table: perplexity of the dense model and of smaller tables.

    python examples/benchmarks/language_modeling.py --train_file wap.train.txt.gz --validation_file wap.valid.txt.gz \
        --test_file wap.test.txt.gz

Trains a tokenizer and a dense model on plain text (one paragraph or line a row, gzip or not), then compares what
`variants.py` makes of it.
"""

import math
import time
from dataclasses import dataclass, field
from functools import partial

import torch
from comparison import ShortTrainingArguments, parse
from datasets import Dataset, load_dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Trainer,
    default_data_collator,
)
from variants import VariantArguments, compare_variants, dense_start, finish

SPLITS = ("train", "validation", "test")
END_OF_TEXT = "<|endoftext|>"


@dataclass
class LanguageFiles:
    train_file: str = field(metadata={"help": "Plain text to train on."})
    validation_file: str = field(metadata={"help": "Plain text to choose settings by."})
    test_file: str = field(metadata={"help": "Plain text to report."})
    vocabulary_size: int = field(default=8192, metadata={"help": "Entries of the tokenizer that is trained."})
    block_length: int = field(default=128, metadata={"help": "Tokens in a row of training and evaluation."})
    width: int = field(default=256, metadata={"help": "Width of embeddings and hidden states."})
    layers: int = field(default=4, metadata={"help": "Transformer layers."})

    def files(self) -> dict[str, str]:
        return {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}


@dataclass
class LanguageArguments(VariantArguments, LanguageFiles):
    """Files and sizes come first: they have no defaults."""

    further_epochs: float = field(default=0.5, metadata={"help": "Epochs of every variant after the dense training."})
    further_learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate of those."})


@dataclass
class LanguageTrainingArguments(ShortTrainingArguments):
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the dense training."})
    num_train_epochs: float = field(default=4.0, metadata={"help": "Epochs of the dense training."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows in a training step."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Rows in an evaluation step."})
    train_sampling_strategy: str = field(default="random", metadata={"help": "All rows are of one length."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Logits of a vocabulary are not kept."})


def blocks(args: LanguageArguments) -> dict[str, Dataset]:
    """The splits as rows of `block_length` tokens, from a tokenizer that is trained on the training text."""
    lines = load_dataset("text", data_files=args.files())
    tokenizer = ByteLevelBPETokenizer()
    train = lines["train"]["text"]
    tokenizer.train_from_iterator(train, args.vocabulary_size, special_tokens=[END_OF_TEXT], show_progress=False)

    def rows(split: str) -> Dataset:
        encoded = tokenizer.encode_batch([line + "\n" for line in lines[split]["text"]])
        ids = torch.tensor([index for line in encoded for index in line.ids])
        ids = ids[: len(ids) // args.block_length * args.block_length].view(-1, args.block_length).tolist()
        ids = ids[: len(ids) // 10] if args.quick else ids
        return Dataset.from_dict({"input_ids": ids, "labels": ids})

    return {split: rows(split) for split in SPLITS}


def new_model(args: LanguageArguments) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=args.vocabulary_size,
            n_positions=args.block_length,
            n_embd=args.width,
            n_layer=args.layers,
            n_head=args.width // 64,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def main(arguments: list[str] | None = None) -> dict:
    args, training_args = parse((LanguageArguments, LanguageTrainingArguments), arguments)
    started = time.perf_counter()
    data = blocks(args)
    print({split: f"{len(part) * args.block_length:,} tokens" for split, part in data.items()})
    new_trainer = partial(Trainer, train_dataset=data["train"], data_collator=default_data_collator)

    def perplexities(model: PreTrainedModel) -> dict[str, float]:
        scorer = new_trainer(model=model, args=training_args)
        losses = {split: scorer.evaluate(data[split], metric_key_prefix=split) for split in ("validation", "test")}
        return {f"{split}_perplexity": math.exp(loss[f"{split}_loss"]) for split, loss in losses.items()}

    dense = dense_start(args, training_args, new_trainer, partial(new_model, args))
    variants = compare_variants(dense, args, training_args, new_trainer, perplexities)
    return finish(variants, started, args.json_out)


if __name__ == "__main__":
    main()
