"""The benchmark's methods by name: each puts a smaller table of about a given ratio into a model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import yaml
from peers import Compositional, HashedBits, LowRank, Peer, ProductQuantized, Trimmed, UniformRows
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup
from transformers import PreTrainedModel

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding, compress, size_report
from hf_adacomp.fitting.token_counts import expected_counts, token_weights
from hf_adacomp.lengths.budget import TargetRatioError

SLACK = 1.03
"""A peer may take 3 % more bytes than asked for: its sizes come in steps."""

LEAST_SAMPLE = 1 << 15
"""At least so many rows are drawn for quantizers of vectors to be fitted to."""

OURS = ("learned", "count", "fixed")
PEERS = ("uniform", "pq", "opq", "lsh", "itq", "svd", "compositional", "trim")
OWN_SIZE = {"dense": 1.0, "int8": 4.0, "int4": 8.0}
"""Methods whose size is what it is, and about which: they run once, not once a ratio."""

NOT_LEARNED = "learned:select_fraction=0"
"""The default but for selection: lengths follow from counts and the metric."""

TITLES = {
    "learned": "default",
    NOT_LEARNED: "lengths not learned",
    "count": "lengths by count",
    "fixed": "one length",
    "pq": "product quantization",
    "opq": "OPQ",
    "itq": "ITQ",
    "lsh": "LSH",
    "svd": "SVD",
    "trim": "frequent tokens alone, int8",
}
"""What tables call these methods."""

METHODS = (*OWN_SIZE, *PEERS, *OURS)


def base(method: str) -> str:
    """`learned` of `learned:tied=false`: our methods may carry settings of `AdaCompConfig`."""
    return method.partition(":")[0]


class OutOfReachError(ValueError):
    """The method has no form of this size."""


def install(method: str, model: PreTrainedModel, ratio: float, token_counts: Tensor, seed: int) -> None:
    """Put the table of `method` into `model`; raises OutOfReachError if it has none of this size."""
    torch.manual_seed(seed)
    embedding = model.get_input_embeddings()
    if method in ("int8", "int4"):
        granularity = PerAxis(0) if method == "int8" else PerGroup(embedding.embedding_dim // 12)
        config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, method), granularity=granularity)
        quantize_(model, config, filter_fn=lambda module, _: module is embedding)
    elif base(method) in OURS:
        compress(model, our_config(method, embedding, ratio, seed), token_counts)
    elif method in PEERS:
        model.set_input_embeddings(peer(method, embedding, ratio, token_counts))
    elif method != "dense":
        raise ValueError(f"unknown method {method!r}: choose among {', '.join(METHODS)}")


def our_config(method: str, embedding: nn.Embedding, ratio: float, seed: int) -> AdaCompConfig:
    """The defaults, save what the comparison is about."""
    settings = {"target_ratio": ratio, "seed": seed}
    if method == "count":
        return AdaCompConfig(**settings, select_fraction=0.0, significance=False)
    if method != "fixed":
        changes = [change.split("=") for change in method.partition(":")[2].split(";") if change]
        return AdaCompConfig(**settings, **{name: yaml.safe_load(value) for name, value in changes})
    for length in range(2 * embedding.embedding_dim, 3, -4):  # the longest single length that fits
        config = AdaCompConfig((length,), **settings, select_fraction=0.0, significance=False)
        try:
            AdaptiveCompressedEmbedding(*embedding.weight.shape, config, device="meta")
        except TargetRatioError:
            continue
        return config
    raise OutOfReachError(f"no single length reaches {ratio:g}")


def peer(method: str, embedding: nn.Embedding, ratio: float, token_counts: Tensor) -> Peer:
    """The form of the method with the most bits a token that fits `ratio`, fitted to the table."""
    table = embedding.weight.detach().clone()
    weights = token_weights(expected_counts(token_counts, table))
    budget = 4 * table.numel() / ratio * SLACK
    if method == "uniform":
        fitting = [bits for bits in (4, 3, 2, 1) if table.numel() * bits / 8 + 2 * len(table) <= budget]
        if not fitting:
            raise OutOfReachError(f"one bit an entry and a scale a row exceed {ratio:g}")
        return UniformRows(table, fitting[0])
    if method == "trim":
        kept = int(budget / (table.shape[1] + 2)) - 1  # one more is shared by all others
        if kept < 1:
            raise OutOfReachError(f"not one row of its own fits {ratio:g}")
        return Trimmed(table, token_counts, min(kept, len(table) - 1))
    if method == "svd":
        rank = int(budget / (2 * sum(table.shape)))
        if rank == 0:
            raise OutOfReachError(f"a single dimension exceeds {ratio:g}")
        return LowRank(table, weights, min(rank, table.shape[1]))
    # As many rows again as there are tokens, drawn by weight: what is frequent shall be met well.
    sample = table[torch.multinomial(weights, max(len(table), LEAST_SAMPLE), replacement=True)]
    if method in ("lsh", "itq"):
        bits = int((8 * budget - 16 * table.shape[1]) / (len(table) + 16 * table.shape[1]))
        if bits < 1:
            raise OutOfReachError(f"not one bit fits {ratio:g}")
        return HashedBits(table, weights, sample, min(bits, table.shape[1]), learned=method == "itq")
    forms = sorted(_product_forms(table, method, budget))
    if not forms:
        raise OutOfReachError(f"no code-books fit {ratio:g}")
    _, bits, books = forms[-1]
    if method == "compositional":
        return Compositional(table, weights, books, bits)
    return ProductQuantized(table, sample, books, bits, rotate=method == "opq")


def _product_forms(table: Tensor, method: str, budget: float) -> Iterator[tuple[int, int, int]]:
    """(bits a token, bits a code, number of books) of the forms that fit."""
    tokens, dim = table.shape
    whole = method == "compositional"  # code vectors of full width
    for bits in (4, 5, 6, 7, 8):
        for books in range(1, dim + 1):
            size = tokens * books * bits / 8 + 2 * 2**bits * dim * (books if whole else 1)
            size += 2 * dim * dim if method == "opq" else 0
            if size <= budget and (whole or dim % books == 0):
                yield books * bits, bits, books


def stored_bytes(model: PreTrainedModel) -> int:
    """What the token table of `model` takes in a file."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, Peer):
        return embedding.stored_bytes()
    if isinstance(embedding, AdaptiveCompressedEmbedding):
        return size_report(model).total_bytes
    weight = embedding.weight
    if hasattr(weight, "qdata"):  # torchao keeps int4 in int8 in memory; it is counted as it would be exported
        entry = 0.5 if weight.target_dtype == torch.int4 else 1
        return int(weight.qdata.numel() * entry) + weight.scale.numel() * 2 + weight.zero_point.nbytes
    return weight.nbytes
