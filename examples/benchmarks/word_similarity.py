"""How well compressed tables keep the similarity of words: Spearman correlation with human judgements.

python examples/benchmarks/word_similarity.py --wordsim_dir wordsim                              # MiniLM's token table
python examples/benchmarks/word_similarity.py --wordsim_dir wordsim --vectors_file word2vec.npz  # static word vectors

A word's vector is the mean of its tokens' rows. Nothing is trained: the table is compressed as it stands, with the
token counts of `--text_file` if one is given.
"""

import gzip
from dataclasses import dataclass, field
from pathlib import Path

import torch
from comparison import parse, write_figures
from pretrained_encoder import bundled_model
from scipy.stats import spearmanr
from static_vectors import SPECIAL, read_vectors, word_tokenizer
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding


@dataclass
class SimilarityArguments:
    wordsim_dir: str = field(metadata={"help": "Folder of .txt files with lines `word word score`."})
    vectors_file: str | None = field(default=None, metadata={"help": "npz with `words` and `vectors`."})
    text_file: str | None = field(
        default=None, metadata={"help": "Text, .gz too, whose token counts say which tokens are common."}
    )
    ratios: list[float] = field(default_factory=lambda: [16.0, 30.0, 40.0, 80.0], metadata={"help": "Sizes."})
    seed: int = field(default=0, metadata={"help": "Seed of the fit."})
    json_out: str | None = field(default=None, metadata={"help": "Write every figure to this file."})


def load_table(vectors_file: str | None) -> tuple[PreTrainedTokenizerBase, nn.Embedding]:
    """The tokenizer and the table of word vectors from a file, or of MiniLM."""
    if vectors_file is None:
        name = bundled_model()
        return AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).get_input_embeddings()
    words, vectors = read_vectors(vectors_file)
    tokenizer = word_tokenizer(words)
    return tokenizer, nn.Embedding.from_pretrained(torch.cat([torch.zeros(len(SPECIAL), vectors.shape[1]), vectors]))


def count_text(file: str | None, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> Tensor:
    """Occurrences of each token in the text, (V,); zeros without a text."""
    ids: list[int] = []
    if file is not None:
        with gzip.open(file, "rt", encoding="utf-8") if file.endswith(".gz") else open(file, encoding="utf-8") as text:
            for line in text:
                ids += tokenizer(line, add_special_tokens=False)["input_ids"]
    return torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=num_tokens)


def read_pairs(file: Path, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int], float]]:
    """Token ids of both words and the score of every pair whose words the tokenizer knows."""
    pairs = []
    for line in file.read_text(encoding="utf-8").splitlines():
        first, second, score = line.lower().split()
        ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in (first, second)]
        if all(word and tokenizer.unk_token_id not in word for word in ids):
            pairs.append((*ids, float(score)))
    return pairs


def correlation(pairs: list[tuple[list[int], list[int], float]], embedding: nn.Module) -> float:
    """Spearman correlation of cosine similarity and score."""

    def vectors(side: int) -> Tensor:
        return torch.stack([embedding(torch.tensor(pair[side])).mean(dim=0) for pair in pairs])

    with torch.no_grad():
        similarity = torch.cosine_similarity(vectors(0), vectors(1))
    return float(spearmanr(similarity.numpy(), [pair[2] for pair in pairs]).statistic)


def main(arguments: list[str] | None = None) -> dict:
    (args,) = parse((SimilarityArguments,), arguments)
    tokenizer, dense = load_table(args.vectors_file)
    counts = count_text(args.text_file, tokenizer, dense.num_embeddings)
    tables: dict[str, nn.Module] = {"dense": dense}
    for ratio in args.ratios:
        config = AdaCompConfig(target_ratio=ratio, seed=args.seed)
        compressed = AdaptiveCompressedEmbedding.from_embedding(dense, config, counts)
        compressed.pack()
        tables[f"{ratio:g}x"] = compressed.to_embedding()
    print(f"{'set':<22}{'pairs':>7}" + "".join(f"{name:>10}" for name in tables))
    figures = {}
    for file in sorted(Path(args.wordsim_dir).glob("*.txt")):
        pairs = read_pairs(file, tokenizer)
        found = {name: correlation(pairs, table) for name, table in tables.items()}
        figures[file.stem] = {"pairs": len(pairs), **found}
        print(f"{file.stem:<22}{len(pairs):>7}" + "".join(f"{value:>10.3f}" for value in found.values()))
    write_figures(figures, args.json_out)
    return figures


if __name__ == "__main__":
    main()
