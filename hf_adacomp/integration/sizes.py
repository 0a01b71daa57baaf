"""What the compressed tables of a model weigh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..codes.bits import group_bytes, index_bits, packed_bytes
from ..nn.static import StaticModel
from .tables import require_compressed, transformers_models, untied_heads


@dataclass(frozen=True)
class SizeReport:
    """Stored bytes of the compressed tables of a model, by part; `print` shows a table.

    `dense_bytes` is the float32 table that they replace. All other figures are what a file holds. `head_bytes` is what
    output heads take that shared the table before and now keep weights of their own (`head="dense"`), `gains_bytes`
    what the lengths of a static model's vectors take.
    """

    num_tokens: int
    dense_bytes: int
    codes_bytes: int
    lengths_bytes: int
    codebook_bytes: int
    tokens_per_length: dict[int, int]
    head_bytes: int = 0
    gains_bytes: int = 0

    @property
    def stored(self) -> dict[str, int]:
        """Bytes of everything that is stored, by what it is."""
        parts = {"codes": self.codes_bytes, "code lengths": self.lengths_bytes, "code-books": self.codebook_bytes}
        further = {"untied output head": self.head_bytes, "lengths of vectors": self.gains_bytes}
        return parts | {name: size for name, size in further.items() if size}

    @property
    def total_bytes(self) -> int:
        """Codes, lengths, code-books, untied heads and gains."""
        return sum(self.stored.values())

    @property
    def ratio(self) -> float:
        """Dense bytes over all stored bytes."""
        return self.dense_bytes / self.total_bytes

    @property
    def bits_per_token(self) -> float:
        """Mean code length in bits."""
        return sum(length * tokens for length, tokens in self.tokens_per_length.items()) / self.num_tokens

    def __str__(self) -> str:
        rows = {"dense float32 table": self.dense_bytes, **self.stored, "total": self.total_bytes}
        lines = [f"{name:<22}{size:>14,} bytes" for name, size in rows.items()]
        lines.append(f"{'ratio':<22}{self.ratio:>14.1f}")
        lines.append(f"{'bits a token':<22}{self.bits_per_token:>14.1f}")
        lines += [
            f"  {length:>5} bits{tokens:>24,} tokens ({100 * tokens / self.num_tokens:.1f} %)"
            for length, tokens in self.tokens_per_length.items()
        ]
        return "\n".join(lines)


def size_report(model: Any, settled: bool = False) -> SizeReport:
    """Stored size of the compressed tables of `model`, as if packed now.

    >>> import torch
    >>> from hf_adacomp import AdaCompConfig, compress, size_report
    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2))
    >>> model = compress(model, AdaCompConfig(target_ratio=20), 1000 // torch.arange(1, 1001))
    >>> size_report(model).ratio >= 20
    True

    Args:
        model: With compressed tables.
        settled: Take the lengths of the last training step or evaluation, and do not solve for those of this moment.
    """
    parts = []
    for embedding in require_compressed(model).values():
        lengths = embedding.code_lengths(settled)
        tokens = {length: int((lengths == length).sum()) for length in embedding.config.ladder}
        parts.append(
            SizeReport(
                num_tokens=embedding.num_embeddings,
                dense_bytes=embedding.num_embeddings * embedding.embedding_dim * 4,
                codes_bytes=sum(group_bytes(list(tokens.values()), list(tokens))),
                lengths_bytes=packed_bytes(embedding.num_embeddings * index_bits(len(tokens))),
                codebook_bytes=embedding.codebook.stored_bytes(),
                tokens_per_length=tokens,
            )
        )
    lengths_found = sorted({length for part in parts for length in part.tokens_per_length})
    return SizeReport(
        num_tokens=sum(part.num_tokens for part in parts),
        dense_bytes=sum(part.dense_bytes for part in parts),
        codes_bytes=sum(part.codes_bytes for part in parts),
        lengths_bytes=sum(part.lengths_bytes for part in parts),
        codebook_bytes=sum(part.codebook_bytes for part in parts),
        tokens_per_length={
            length: sum(part.tokens_per_length.get(length, 0) for part in parts) for length in lengths_found
        },
        head_bytes=sum(
            head.weight.nbytes for inner in transformers_models(model) for head in untied_heads(inner).values()
        ),
        gains_bytes=sum(inner.gain_bytes for inner in transformers_models(model) if isinstance(inner, StaticModel)),
    )
