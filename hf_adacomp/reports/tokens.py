"""Which token got which code length."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..integration.tables import require_compressed


class TokenRow(NamedTuple):
    """A token, its id, its count in the training data (None once packed) and its code length in bits."""

    token: str
    id: int
    count: int | None  # type: ignore[assignment]  # rows are counted by len(), not tuple.count
    bits: int


def token_table(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
    """One row a token of the (first) compressed table, in id order."""
    embedding = next(iter(require_compressed(model).values()))
    bits = embedding.code_lengths().tolist()
    counts = [None] * len(bits) if embedding.phase == "packed" else embedding.token_counts().tolist()
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(bits))))
    return [
        TokenRow(token, i, count, length)
        for i, (token, count, length) in enumerate(zip(tokens, counts, bits, strict=True))
    ]
