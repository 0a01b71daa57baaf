"""Which tokens got long codes, and why: code lengths of a text classifier against counts and what the task needs.

python examples/benchmarks/significance.py --train_file train.tsv --test_file test.tsv \
    --column_names label text --target_ratio 80

or, with `--vectors_file word2vec.npz`, on word vectors.

Trains dense, compresses and trains on as `classification.py` or `static_vectors.py` does, then writes
`significance.png` and `significance.json`: a histogram of lengths, lengths against counts with the tokens' information
about the label as colour, the tokens whose length their count does not explain, and rank correlations with that
information at equal count: of the code lengths, of how sure the dense model is of the texts a token stands in, and of
the damage to its outputs where one token of a text has no vector of its own (the mean stands there) or the shortest
code, by code-books fitted in the task's metric and by Euclidean ones.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from classification import ModelArguments, text_classification
from comparison import CompressionArguments, ShortTrainingArguments, compare, parse
from damage import shortest_codes, sureness_and_damage
from information import correlation_at_equal_count, label_information, ordinary_tokens
from labelled_texts import DataTrainingArguments
from static_vectors import VectorArguments, static_vectors
from torch.utils.data import DataLoader

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend without windows


@dataclass
class WordVectors:
    vectors_file: str | None = field(
        default=None, metadata={"help": "An LSTM on these word vectors in place of a pretrained model: npz."}
    )


def plot(lengths: np.ndarray, counts: np.ndarray, information: np.ndarray, file: Path) -> None:
    """Histogram of all lengths; length against count of the tokens that were seen."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(1, 1.8))
    sizes, tokens = np.unique(lengths, return_counts=True)
    left.bar([str(size) for size in sizes], tokens, color="#0072B2")
    left.bar_label(left.containers[0], fmt="{:,.0f}")
    left.set(xlabel="code length (bits)", ylabel="tokens")
    seen = counts > 0
    order = np.argsort(information[seen])  # the most telling on top
    jitter = np.random.default_rng(0).uniform(0.85, 1.18, seen.sum())
    points = right.scatter(
        counts[seen][order],
        (lengths[seen] * jitter)[order],
        c=np.log10(information[seen][order].clip(1e-6)),
        cmap="viridis",
        s=7,
    )
    figure.colorbar(points, label="log10 of information about the label (nats)")
    right.set(
        xscale="log", yscale="log", xlabel="count in the training data", ylabel="code length (bits, spread a little)"
    )
    right.set_yticks(sizes, sizes)
    right.minorticks_off()
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict:
    groups = (WordVectors, ModelArguments, DataTrainingArguments, CompressionArguments, ShortTrainingArguments)
    vectors, model_args, data_args, compression_args, training_args = parse(groups, arguments)
    folder = Path(training_args.output_dir)
    if vectors.vectors_file is None:
        task = text_classification(model_args, data_args, training_args.seed)
    else:
        vector_args = VectorArguments(vectors.vectors_file, model_args.max_seq_length)
        task = static_vectors(vector_args, data_args, training_args.seed)
    model, figures = compare(task, compression_args, training_args)
    lengths = model.get_input_embeddings().code_lengths()
    counts = task.token_counts(len(lengths))
    seen = counts.numpy()
    information = label_information(task, len(lengths))

    dense = task.new_model() if compression_args.one_run else type(model).from_pretrained(folder / "dense")
    texts = task.splits["train"]
    by_length = np.argsort([len(ids) for ids in texts["input_ids"]])  # little padding
    batches = DataLoader(
        texts.select(by_length), batch_size=training_args.per_device_train_batch_size, collate_fn=task.collator
    )
    source = dense.get_input_embeddings().weight.detach()
    config = model.get_input_embeddings().config
    in_metric, euclidean = shortest_codes(copy.deepcopy(dense), config, batches, counts)
    tables = {
        "damage_without_vector": (counts / counts.sum() @ source).expand_as(source),
        "damage_of_shortest_code": in_metric,
        "damage_of_euclidean_code": euclidean,
    }
    special = torch.tensor(task.tokenizer.all_special_ids)
    measures = {"code_length": lengths.numpy()} | sureness_and_damage(dense, batches, tables, special)
    ordinary = ordinary_tokens(task, seen)
    figures["correlation_with_label_information"] = {}
    print("\nRank correlation with information about the label at equal count")
    for name, values in measures.items():
        known = ordinary & ~np.isnan(values)
        found = correlation_at_equal_count(values[known], information[known], seen[known])
        figures["correlation_with_label_information"][name] = found
        print(f"{name:<26}{found['correlation']:>8.3f}  p = {found['p']:.1e}, {found['tokens']} tokens")
    plot(lengths.numpy(), seen, information, folder / "significance.png")
    (folder / "significance.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    main()
