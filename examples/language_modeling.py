"""A small GPT-2 whose output head is tied to its token table: perplexity of the dense model and of smaller tables.

    python examples/language_modeling.py --train_file wap.train.txt.gz --validation_file wap.valid.txt.gz \
        --test_file wap.test.txt.gz

Trains a tokenizer and a dense model on plain text (one paragraph or line a row, gzip or not). From that model on, each
variant trains equally long: dense, and compressed with `head="compress"` (one set of codes for both ends) and
`head="dense"` (the head keeps weights of its own). Integer tables are rounded from the dense model after its training.
Figures are those of the saved and reloaded files.
"""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from comparison import ShortTrainingArguments, parse
from datasets import Dataset, load_dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_adacomp import AdaCompCallback, AdaCompConfig, compress, size_report
from hf_adacomp.codebook import quantize_rows

SPLITS = ("train", "validation", "test")
END_OF_TEXT = "<|endoftext|>"


@dataclass
class LanguageArguments:
    train_file: str = field(metadata={"help": "Plain text to train on."})
    validation_file: str = field(metadata={"help": "Plain text to choose settings by."})
    test_file: str = field(metadata={"help": "Plain text to report."})
    vocabulary_size: int = field(default=8192, metadata={"help": "Entries of the tokenizer that is trained."})
    block_length: int = field(default=128, metadata={"help": "Tokens in a row of training and evaluation."})
    width: int = field(default=256, metadata={"help": "Width of embeddings and hidden states."})
    layers: int = field(default=4, metadata={"help": "Transformer layers."})
    target_ratio: float = field(default=16.0, metadata={"help": "Bytes of the dense table / bytes of ours."})
    further_epochs: float = field(default=1.0, metadata={"help": "Epochs of every variant after the dense training."})
    further_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of those."})
    quick: bool = field(default=False, metadata={"help": "A tenth of the training text: to see that it works."})
    json_out: str | None = field(default=None, metadata={"help": "Write every figure to this file."})

    def files(self) -> dict[str, str]:
        return {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}


@dataclass
class LanguageTrainingArguments(ShortTrainingArguments):
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the dense training."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Epochs of the dense training."})
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


def round_table(model: PreTrainedModel, bits: int) -> int:
    """Round the tied table to integers with a float16 scale a row, in place; returns its bytes."""
    weight = model.get_input_embeddings().weight
    integers, scale = quantize_rows(weight.detach(), bits)
    with torch.no_grad():
        weight.copy_(integers * scale.half().float())
    return weight.numel() * bits // 8 + 2 * len(weight)


def perplexities(trainer: Trainer, data: dict[str, Dataset]) -> dict[str, float]:
    return {
        split: math.exp(trainer.evaluate(data[split], metric_key_prefix=split)[f"{split}_loss"])
        for split in ("validation", "test")
    }


def main(arguments: list[str] | None = None) -> dict:
    args, training_args = parse((LanguageArguments, LanguageTrainingArguments), arguments)
    started = time.perf_counter()
    data = blocks(args)
    new_trainer: Callable[..., Trainer] = partial(
        Trainer, train_dataset=data["train"], data_collator=default_data_collator
    )
    print({split: f"{len(part) * args.block_length:,} tokens" for split, part in data.items()})

    def train(model: PreTrainedModel, stage_args: TrainingArguments, **options: list) -> Trainer:
        set_seed(stage_args.seed)
        trainer = new_trainer(model=model, args=stage_args, **options)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer

    set_seed(training_args.seed)
    dense = train(new_model(args), training_args).model
    dense_bytes = dense.get_input_embeddings().weight.nbytes
    further_args = copy.copy(training_args)
    further_args.num_train_epochs, further_args.learning_rate = args.further_epochs, args.further_learning_rate

    figures: dict = {"dense_bytes": dense_bytes, "models": {}}

    def record(name: str, trainer: Trainer, table_bytes: int, seconds: float) -> None:
        figures["models"][name] = {
            "table_bytes": table_bytes,
            "ratio": dense_bytes / table_bytes,
            "seconds": seconds,
            **perplexities(trainer, data),
        }

    for head in (None, "compress", "dense"):
        model, start = copy.deepcopy(dense), time.perf_counter()
        if head is not None:
            config = AdaCompConfig(target_ratio=args.target_ratio, head=head, seed=training_args.seed)
            model = compress(model, config)
        trainer = train(model, further_args, callbacks=[AdaCompCallback()] if head else [])
        seconds = time.perf_counter() - start
        folder = Path(training_args.output_dir) / (f"compressed-head-{head}" if head else "dense")
        trainer.save_model(folder)
        reloaded = GPT2LMHeadModel.from_pretrained(folder)
        scorer = new_trainer(model=reloaded, args=further_args)
        if head is not None:
            report = size_report(reloaded)
            print(f"\nhead={head!r}\n{report}")
            record(f"head={head}", scorer, report.total_bytes, seconds)
            continue
        record("dense", scorer, dense_bytes, seconds)
        for bits in (8, 4):
            rounded = copy.deepcopy(reloaded)
            table_bytes = round_table(rounded, bits)
            record(f"int{bits}", new_trainer(model=rounded, args=further_args), table_bytes, 0.0)

    figures["seconds"] = time.perf_counter() - started
    print(f"\n{'':<16}{'table bytes':>14}{'ratio':>8}{'validation':>12}{'test':>10}{'over dense':>12}")
    best = figures["models"]["dense"]["test"]
    for name, row in figures["models"].items():
        print(
            f"{name:<16}{row['table_bytes']:>14,}{row['ratio']:>8.1f}{row['validation']:>12.2f}{row['test']:>10.2f}"
            f"{100 * (row['test'] / best - 1):>11.1f}%"
        )
    print(f"\nperplexity a token of {args.vocabulary_size} entries; {figures['seconds']:.0f} seconds in all")
    if args.json_out is not None:
        Path(args.json_out).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    main()
