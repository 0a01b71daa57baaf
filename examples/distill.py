"""Make a sentence encoder's token table many times smaller without labels: calibrate it, then train it on plain texts
to give the vectors that the dense model gave.

    python examples/distill.py                                   # offline: MiniLM on the docstrings of libraries
    python examples/distill.py --model_name_or_path intfloat/multilingual-e5-small --texts texts.txt \\
        --pairs_file sts.csv --target_ratio 40

Texts are lines, or the column `text` or `sentence` of a csv, tsv or jsonl file. `--pairs_file` is a csv file without
header of two texts and how alike they are, by which the dense and the compressed model are compared.
"""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from scipy.stats import spearmanr
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from text_classification import bundled_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import HfArgumentParser

from hf_adacomp import AdaCompCallback, AdaCompConfig, calibrate, compress, size_report
from hf_adacomp.text_files import read_texts

HELD_OUT = 200
"""Texts at most, and one in ten, that are not trained on."""


@dataclass
class DistillArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or Hub name. Default: MiniLM."})
    texts: str | None = field(default=None, metadata={"help": "Plain texts. Default: docstrings of libraries."})
    column: str | None = field(default=None, metadata={"help": "Of the texts in a csv, tsv or jsonl file."})
    pairs_file: str | None = field(default=None, metadata={"help": "Rated pairs of texts, csv without header."})
    target_ratio: float = field(default=40.0, metadata={"help": "Bytes of the dense table / bytes of ours."})
    json_out: str | None = field(default=None, metadata={"help": "Write every figure to this file."})


@dataclass
class DistillTrainingArguments(SentenceTransformerTrainingArguments):
    """The trainer's own options, with defaults for a short run."""

    output_dir: str | None = field(default="distilled_model", metadata={"help": "Where the model goes."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs over the texts."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Texts in a training step."})
    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps."})
    save_strategy: str = field(default="no", metadata={"help": "When to write checkpoints."})
    report_to: str = field(default="none", metadata={"help": "Where to log."})


class CosineDistance(nn.Module):
    """One minus the cosine of a text's vector and the one that it should have, which is its label."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(self.model(features[0])["sentence_embedding"], labels).mean()


def load_texts(args: DistillArguments) -> list[str]:
    if args.texts is not None:
        return read_texts(Path(args.texts), args.column)
    from docstring_corpus import build_corpus  # noqa: PLC0415  # this script works without it, too

    return [text for split in build_corpus().values() for text in split["text"]]


def similarity(model: SentenceTransformer, pairs_file: str) -> float:
    """Spearman correlation x 100 of cosines and ratings."""
    with open(pairs_file, encoding="utf-8", newline="") as lines:
        *sides, ratings = zip(*csv.reader(lines), strict=True)
    first, second = (model.encode([*side], convert_to_tensor=True) for side in sides)
    cosines = F.cosine_similarity(first, second).cpu()
    return 100 * float(spearmanr(cosines, [float(rating) for rating in ratings]).statistic)


def distill(
    model: SentenceTransformer, texts: list[str], vectors: Tensor, args: SentenceTransformerTrainingArguments
) -> None:
    """Train a compressed model to give texts these vectors, (N, d); it is packed at the end."""
    prompt = model.prompts.get(model.default_prompt_name, "")
    rows = Dataset.from_dict({"text": [prompt + text for text in texts], "label": vectors.tolist()})
    trainer = SentenceTransformerTrainer(
        model, args, train_dataset=rows, loss=CosineDistance(model), callbacks=[AdaCompCallback()]
    )
    trainer.train()
    model.eval()


def main(arguments: list[str] | None = None) -> dict:
    parser = HfArgumentParser((DistillArguments, DistillTrainingArguments))
    args, training_args = parser.parse_args_into_dataclasses(arguments)
    model = SentenceTransformer(args.model_name_or_path or bundled_model())
    texts = Dataset.from_dict({"text": load_texts(args)})
    parts = texts.train_test_split(test_size=min(HELD_OUT, -(-len(texts) // 10)), seed=training_args.seed)
    train, held_out = ([*part["text"]] for part in parts.values())

    def vectors(texts: list[str]) -> Tensor:
        return model.encode(texts, convert_to_tensor=True).cpu()

    wanted, wanted_held_out = vectors(train), vectors(held_out)
    figures: dict = {"texts": len(train), "held_out": len(held_out)}

    def measure(stage: str) -> None:
        found = F.cosine_similarity(vectors(held_out), wanted_held_out)
        figures[stage] = {"cosine": float(found.mean())}
        if args.pairs_file is not None:
            figures[stage]["similarity"] = similarity(model, args.pairs_file)
        print(stage, figures[stage])

    measure("dense")
    # Lengths stay as calibration chose them: all steps train the codes.
    config = AdaCompConfig(target_ratio=args.target_ratio, select_fraction=0.0)
    calibrate(compress(model, config), train)
    model.eval()
    measure("calibrated")
    distill(model, train, wanted, training_args)
    measure("distilled")
    model.save_pretrained(training_args.output_dir)
    print(size_report(model))
    figures["file_bytes"] = sum(file.stat().st_size for file in Path(training_args.output_dir).rglob("*.safetensors"))
    if args.json_out is not None:
        Path(args.json_out).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    main()
