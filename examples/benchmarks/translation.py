"""A small Marian model that translates: BLEU with its one dense table, and with smaller ones.

    python examples/benchmarks/translation.py --train_source_file train.en.gz --train_target_file train.de.gz \
        --validation_source_file val.en.gz --validation_target_file val.de.gz \
        --test_source_file test_2016_flickr.en.gz --test_target_file test_2016_flickr.de.gz

Trains a tokenizer for both languages and a dense model, whose encoder, decoder and output head share one table, on
line-aligned plain text (gzip or not), then compares what `variants.py` makes of it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from comparison import ShortTrainingArguments, parse
from datasets import Dataset, load_dataset
from sacrebleu import corpus_bleu
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    EvalPrediction,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from variants import VariantArguments, compare_variants, dense_start, finish

SPLITS = ("train", "validation", "test")
PAD, END = "<pad>", "</s>"
MAX_LENGTH = 128


@dataclass
class TranslationFiles:
    train_source_file: str = field(metadata={"help": "Plain text to train on, one sentence a line."})
    train_target_file: str = field(metadata={"help": "Its translation, line by line."})
    validation_source_file: str = field(metadata={"help": "Plain text to choose settings by."})
    validation_target_file: str = field(metadata={"help": "Its translation."})
    test_source_file: str = field(metadata={"help": "Plain text to report."})
    test_target_file: str = field(metadata={"help": "Its translation."})
    vocabulary_size: int = field(default=8192, metadata={"help": "Entries of the tokenizer that is trained."})
    width: int = field(default=256, metadata={"help": "Width of embeddings and hidden states."})
    layers: int = field(default=3, metadata={"help": "Layers of the encoder, and of the decoder."})

    def sentences(self, split: str) -> Dataset:
        """Rows of a source and a target sentence."""
        files = {side: getattr(self, f"{split}_{side}_file") for side in ("source", "target")}
        texts = {side: load_dataset("text", data_files=file, split="train")["text"] for side, file in files.items()}
        if len(texts["source"]) != len(texts["target"]):
            raise ValueError(
                f"{files['source']} has {len(texts['source'])} lines and {files['target']} has "
                f"{len(texts['target'])}: they must be translations line by line."
            )
        return Dataset.from_dict({side: [*lines] for side, lines in texts.items()})


@dataclass
class TranslationArguments(VariantArguments, TranslationFiles):
    """Files and sizes come first: they have no defaults."""

    target_ratio: float = field(default=20.0, metadata={"help": "Bytes of the dense table / bytes of ours."})
    further_epochs: float = field(default=2.0, metadata={"help": "Epochs of every variant after the dense training."})


@dataclass
class TranslationTrainingArguments(ShortTrainingArguments, Seq2SeqTrainingArguments):
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the dense training."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or share of steps, that it rises over."})
    num_train_epochs: float = field(default=6.0, metadata={"help": "Epochs of the dense training."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Sentences in a training step."})
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "Share of the loss for all other tokens."})
    predict_with_generate: bool = field(default=True, metadata={"help": "Scores are those of translations."})
    generation_num_beams: int | None = field(default=4, metadata={"help": "Beams of the search."})


def train_tokenizer(texts: Dataset, vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE for both languages that ends every sentence with `END`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((line for side in ("source", "target") for line in texts[side]), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)


def new_model(args: TranslationArguments, tokenizer: PreTrainedTokenizerFast) -> MarianMTModel:
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", args.layers), ("attention_heads", args.width // 64), ("ffn_dim", 2 * args.width))
    }
    return MarianMTModel(
        MarianConfig(
            vocab_size=len(tokenizer),
            d_model=args.width,
            max_position_embeddings=MAX_LENGTH,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            forced_eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
            scale_embedding=True,
            **sides,
        )
    )


def bleu(tokenizer: PreTrainedTokenizerFast) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` of a Trainer: sacrebleu's BLEU of detokenized text."""

    def texts(ids: np.ndarray) -> list[str]:
        return tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)

    def compute_metrics(output: EvalPrediction) -> dict[str, float]:
        return {"bleu": corpus_bleu(texts(output.predictions), [texts(output.label_ids)]).score}

    return compute_metrics


def main(arguments: list[str] | None = None) -> dict:
    args, training_args = parse((TranslationArguments, TranslationTrainingArguments), arguments)
    training_args.generation_max_length = MAX_LENGTH
    started = time.perf_counter()
    raw = {split: args.sentences(split) for split in SPLITS}
    if args.quick:
        raw = {split: part.select(range(len(part) // 20)) for split, part in raw.items()}
    tokenizer = train_tokenizer(raw["train"], args.vocabulary_size)
    data = {
        split: part.map(
            lambda row: tokenizer(row["source"], text_target=row["target"], truncation=True, max_length=MAX_LENGTH),
            batched=True,
            remove_columns=["source", "target"],
        )
        for split, part in raw.items()
    }
    print({split: f"{len(part):,} sentences" for split, part in data.items()})

    def new_trainer(model: PreTrainedModel, **options: object) -> Seq2SeqTrainer:
        collator = DataCollatorForSeq2Seq(tokenizer, model)
        return Seq2SeqTrainer(model, train_dataset=data["train"], data_collator=collator, **options)

    def scores(model: PreTrainedModel) -> dict[str, float]:
        scorer = new_trainer(model, args=training_args, compute_metrics=bleu(tokenizer))
        return {
            f"{split}_bleu": scorer.evaluate(data[split], metric_key_prefix=split)[f"{split}_bleu"]
            for split in ("validation", "test")
        }

    dense = dense_start(args, training_args, new_trainer, partial(new_model, args, tokenizer))
    variants = compare_variants(dense, args, training_args, new_trainer, scores)
    return finish(variants, started, args.json_out)


if __name__ == "__main__":
    main()
