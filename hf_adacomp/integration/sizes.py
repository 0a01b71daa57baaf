"""What the compressed tables of a model weigh."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..codes.bits import group_bytes, index_bits, packed_bytes
from ..nn.static import StaticModel
from .compressed_tables import require_compressed, untied_heads
from .parts import transformers_models


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
    tables = [*require_compressed(model).values()]
    inner = transformers_models(model)
    tokens, codes_bytes, lengths_bytes = Counter[int](), 0, 0
    for table in tables:
        lengths = table.code_lengths(settled)
        own = {length: int((lengths == length).sum()) for length in table.config.ladder}
        codes_bytes += sum(group_bytes([*own.values()], [*own]))
        lengths_bytes += packed_bytes(table.num_embeddings * index_bits(len(own)))
        tokens.update(own)
    return SizeReport(
        num_tokens=sum(table.num_embeddings for table in tables),
        dense_bytes=sum(4 * table.num_embeddings * table.embedding_dim for table in tables),
        codes_bytes=codes_bytes,
        lengths_bytes=lengths_bytes,
        codebook_bytes=sum(table.codebook.stored_bytes() for table in tables),
        tokens_per_length=dict(sorted(tokens.items())),
        head_bytes=sum(head.weight.nbytes for one in inner for head in untied_heads(one).values()),
        gains_bytes=sum(one.gain_bytes for one in inner if isinstance(one, StaticModel)),
    )
