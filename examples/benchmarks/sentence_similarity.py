"""Smaller tables of sentence encoders without labels: how well cosines still rank rated pairs, language by language.

    python examples/benchmarks/sentence_similarity.py --name e5-small --model_name_or_path multilingual-e5-small \\
        --prompt "query: " --data_dir stsb_multi --languages de en fr ja ru zh
    python examples/benchmarks/sentence_similarity.py --name word2vec --vectors_file word2vec.npz --data_dir stsb_multi

Nothing here sees a rating but the measure itself. `count` knows how often tokens occur in the training sentences, and
so does `fixed`, with one code length for all; `calibrated` knows also what embeddings react to; `distilled` trains on
those sentences to give the dense model's vectors. Peers are fitted to the table by the same counts and not trained.
Files are those of STS-B by language, `stsb-LANGUAGE-SPLIT.csv.gz`: two sentences and a rating from 0 to 5, no header.
`--leave_out` keeps languages from training sentences but not from the test. Every result goes to `cells.jsonl` at once;
run it again to go on.
"""

import copy
import csv
import gzip
import sys
import time
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from cells import Cells, Key, method_version, open_cells
from comparison import parse
from methods import OWN_SIZE, install, our_config, stored_bytes
from peers import Peer
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding, Transformer
from static_vectors import read_vectors, word_tokenizer
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import set_seed

from hf_adacomp import AdaCompConfig, calibrate, compress, pack
from hf_adacomp.integration.parts import transformers_models
from hf_adacomp.integration.sentence import default_prompt, put_static_model, static_model, tokenizer_of

sys.path.append(str(Path(__file__).resolve().parents[1]))  # examples/ is no package
from distill import distill  # found through the line above

OURS = ("fixed", "count", "calibrated", "distilled")
METHODS = ("dense", "int8", "int4", "svd", "pq", "trim", *OURS)


@dataclass
class SimilarityArguments:
    data_dir: str = field(metadata={"help": "Folder of stsb-LANGUAGE-SPLIT.csv.gz."})
    name: str = field(metadata={"help": "What cells call the model."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "An encoder, pooled by the mean, or a folder of sentence-transformers."}
    )
    vectors_file: str | None = field(default=None, metadata={"help": "Or word vectors: npz of `words` and `vectors`."})
    prompt: str = field(default="", metadata={"help": "What the encoder wants before every text."})
    languages: list[str] = field(default_factory=lambda: ["en"], metadata={"help": "Of the test."})
    leave_out: list[str] = field(default_factory=list, metadata={"help": "Not of the training sentences."})
    methods: list[str] = field(default_factory=lambda: [*METHODS], metadata={"help": "Rows."})
    ratios: list[float] = field(default_factory=lambda: [20.0, 40.0, 80.0, 160.0], metadata={"help": "Sizes."})
    split: str = field(default="test", metadata={"help": "Of the measure; `dev` to choose settings by."})
    train_rows: int = field(default=1500, metadata={"help": "Pairs of sentences of each language."})
    test_rows: int | None = field(default=None, metadata={"help": "For a quick look."})
    epochs: float = field(default=1.0, metadata={"help": "Of distillation."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Of distillation."})
    output_dir: str = field(default="outputs/sentence_similarity", metadata={"help": "Folder of cells.jsonl."})


def read_rows(args: SimilarityArguments, language: str, split: str) -> list[list[str]]:
    """Rows of two sentences and a rating."""
    file = Path(args.data_dir) / f"stsb-{language}-{split}.csv.gz"
    with gzip.open(file, "rt", encoding="utf-8", newline="") as lines:
        return [*csv.reader(lines)]


def training_texts(args: SimilarityArguments) -> list[str]:
    """Sentences of the languages that are not left out."""
    shown = [language for language in args.languages if language not in args.leave_out]
    rows = [row for language in shown for row in read_rows(args, language, "train")[: args.train_rows]]
    return [text for row in rows for text in row[:2]]


def load_model(args: SimilarityArguments) -> SentenceTransformer:
    """The dense sentence encoder; by default pooled by the mean, with vectors of unit length."""
    if args.vectors_file is not None:
        words, vectors = read_vectors(args.vectors_file)
        tokenizer = word_tokenizer(words).backend_tokenizer
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # sentences with punctuation at their words
        special = torch.zeros(tokenizer.get_vocab_size() - len(words), vectors.shape[1])
        modules = [StaticEmbedding(tokenizer, torch.cat([special, vectors])), Normalize()]
        return SentenceTransformer(modules=modules, device="cpu")
    if Path(args.model_name_or_path, "modules.json").exists():
        return SentenceTransformer(args.model_name_or_path, device="cpu")
    transformer = Transformer(args.model_name_or_path)
    pooling = Pooling(transformers_models(transformer)[0].config.hidden_size, "mean")
    prompts = {"prompts": {"query": args.prompt}, "default_prompt_name": "query"} if args.prompt else {}
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu", **prompts)


def vectors(model: SentenceTransformer, args: SimilarityArguments) -> dict[str, Tensor]:
    """Vectors of the first and the second sentences of the measured pairs, (2, N, d), by language."""
    found = {}
    for language in args.languages:
        rows = read_rows(args, language, args.split)[: args.test_rows]
        sides = ([row[side] for row in rows] for side in (0, 1))
        found[language] = torch.stack([model.encode(side, convert_to_tensor=True).cpu() for side in sides])
    return found


def scores(
    found: dict[str, Tensor], dense: dict[str, Tensor], args: SimilarityArguments
) -> dict[str, dict[str, float]]:
    """By language: Spearman correlation x 100 of cosines and ratings, and the mean cosine to the dense vectors."""
    similarity, cosine = {}, {}
    for language, pairs in found.items():
        ratings = [float(row[2]) for row in read_rows(args, language, args.split)[: args.test_rows]]
        similarity[language] = 100 * float(spearmanr(F.cosine_similarity(*pairs), ratings).statistic)
        cosine[language] = float(F.cosine_similarity(pairs, dense[language], dim=-1).mean())
    return {"similarity": similarity, "cosine": cosine}


def token_table(model: SentenceTransformer) -> nn.Embedding:
    """The dense table, also of a static model."""
    inner = static_model(model) or transformers_models(model)[0]
    return inner.get_input_embeddings()


def count(model: SentenceTransformer, texts: list[str]) -> Tensor:
    """Occurrences of each token in the texts, (V,)."""
    counts = torch.zeros(token_table(model).num_embeddings, dtype=torch.int64)
    prompt = default_prompt(model)
    for ids in tokenizer_of(model)([prompt + text for text in texts])["input_ids"]:
        counts += torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=len(counts))
    return counts


def bits_by_script(model: SentenceTransformer) -> dict[str, tuple[int, float]]:
    """Number of tokens and mean code length by the script of their first letter."""
    lengths = transformers_models(model)[0].get_input_embeddings().code_lengths().tolist()
    found = defaultdict(list)
    for token, index in tokenizer_of(model).get_vocab().items():
        letters = [letter for letter in token if letter.isalpha()]
        script = unicodedata.name(letters[0], "other").split()[0] if letters else "no letter"
        if index < len(lengths):
            found[script].append(lengths[index])
    return {script: (len(bits), sum(bits) / len(bits)) for script, bits in found.items()}


def cell(
    dense: SentenceTransformer,
    wanted: dict[str, Tensor],
    texts: list[str],
    counts: Tensor,
    args: SimilarityArguments,
    key: Key,
) -> dict:
    """One row: make the model, measure it; `wanted` are the dense vectors, texts and counts those of the training."""
    method, ratio = key.method, key.ratio
    model = copy.deepcopy(dense)
    started = time.perf_counter()
    figures: dict = {}
    if method in OURS:
        set_seed(0)
        fractions = {"select_fraction": 0.0} if method == "distilled" else {}
        config = AdaCompConfig(target_ratio=ratio, **fractions)
        if method == "fixed":
            static = static_model(model)  # which has gains beside its codes
            left = None if static is None else static.ratio_beside_gains(ratio)
            config = our_config("fixed", token_table(model), left or ratio, seed=0)
            config.target_ratio = ratio
        counted = method in ("fixed", "count")
        compress(model, config, counts if counted else None)
        if not counted:
            calibrate(model, texts)
        if method == "distilled":
            settings = SentenceTransformerTrainingArguments(
                str(Path(args.output_dir) / "scratch"),
                num_train_epochs=args.epochs,
                learning_rate=args.learning_rate,
                per_device_train_batch_size=32,
                save_strategy="no",
                report_to="none",
                use_cpu=not torch.cuda.is_available(),
            )
            distill(model, texts, dense.encode(texts, convert_to_tensor=True).cpu(), settings)
        pack(model)
        figures = {"version": method_version(), "bits_by_script": bits_by_script(model)}
    else:
        static = static_model(model)
        if static is not None:
            put_static_model(model, static)
        inner = transformers_models(model)[0]
        install(method, inner, ratio or 1.0, counts, seed=0)
        if isinstance(peer := inner.get_input_embeddings(), Peer):
            peer.finish()
    model.eval()
    figures["seconds"] = time.perf_counter() - started
    figures["table_bytes"] = stored_bytes(transformers_models(model)[0])
    return {**figures, **scores(vectors(model, args), wanted, args)}


def table(cells: Cells, name: str) -> str:
    """Markdown: similarity by language, mean, and mean drop under dense."""
    keys = [key for key in cells if key.task == name]
    languages = [*cells[keys[0]]["similarity"]]
    dense = cells[Key(name, "dense", None, 0)]["similarity"]
    lines = [f"| ratio | method | table MB | {' | '.join(languages)} | mean drop | cosine to dense | seconds |"]
    lines.append("|---" * (6 + len(languages)) + "|")
    for key in sorted(keys, key=lambda key: (key.ratio or 0, METHODS.index(key.method))):
        found = cells[key]
        values = [found["similarity"][language] for language in languages]
        drop = sum(dense.values()) / len(dense) - sum(values) / len(values)
        agreement = sum(found["cosine"].values()) / len(languages)
        ratio = "" if key.ratio is None else f"{key.ratio:g}"
        size = f"{found['table_bytes'] / 1e6:.2f}"
        shown = " | ".join(f"{value:.2f}" for value in values)
        figures = f"{drop:.2f} | {agreement:.4f} | {found['seconds']:.0f}"
        lines.append(f"| {ratio} | {key.method} | {size} | {shown} | {figures} |")
    return "\n".join(lines)


def script_table(cells: Cells, name: str, most: int = 12) -> str:
    """Markdown: mean code length by script of the tokens, for the scripts with most of them."""
    keys = [key for key in cells if key.task == name and "bits_by_script" in cells[key]]
    if not keys:
        return ""
    found = {f"{key.method} {key.ratio:g}x": cells[key]["bits_by_script"] for key in keys}
    scripts = sorted((tokens, script) for script, (tokens, _) in next(iter(found.values())).items())[: -most - 1 : -1]
    lines = [f"| script | tokens | {' | '.join(found)} |", "|---" * (2 + len(found)) + "|"]
    for tokens, script in scripts:
        lines.append(f"| {script} | {tokens} | {' | '.join(f'{bits[script][1]:.0f}' for bits in found.values())} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> Cells:
    (args,) = parse((SimilarityArguments,), arguments)
    cells, missing = open_cells(args.output_dir, args.name, args.methods, args.ratios, METHODS, [*OWN_SIZE])
    if missing:
        dense = load_model(args)
        wanted, texts = vectors(dense, args), training_texts(args)
        counts = count(dense, texts)
    for key in tqdm(missing, desc="Cells"):
        cells.add(key, cell(dense, wanted, texts, counts, args, key))
    print(f"{table(cells, args.name)}\n\n{script_table(cells, args.name)}")
    return cells


if __name__ == "__main__":
    main()
