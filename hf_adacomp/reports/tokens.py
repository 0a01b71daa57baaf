"""Which token got which code length."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..integration.compressed_tables import require_compressed


class TokenRow(NamedTuple):
    """A token, its id, its count in the training data (None once packed) and its code length in bits.

    The tokenizer may have no token of an id: many models pad their tables to a round size.
    """

    token: str | None
    id: int
    count: int | None  # type: ignore[assignment]  # rows are counted by len(), not tuple.count
    bits: int


def token_table(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
    """One row a token of the (first) compressed table, in id order.

    >>> import torch
    >>> from hf_adacomp import AdaCompConfig, compress, token_table
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    >>> words = models.WordLevel({f"word{i}": i for i in range(1000)}, unk_token="word0")
    >>> model = BertModel(BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2))
    >>> model = compress(model, AdaCompConfig((8, 64), target_ratio=20), 1000 // torch.arange(1, 1001))
    >>> token_table(model, PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)))[1]
    TokenRow(token='word1', id=1, count=500, bits=64)

    Raises:
        ValueError: For a model without a compressed table, and for what is no tokenizer of transformers.
    """
    embedding = next(iter(require_compressed(model).values()))
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise ValueError(
            "token_table takes the model's tokenizer, such as AutoTokenizer.from_pretrained(...) or the one of a "
            f"SentenceTransformer or a processor, its .tokenizer; got {type(tokenizer).__name__}"
        )
    bits = embedding.code_lengths().tolist()
    counts = [None] * len(bits) if embedding.phase == "packed" else embedding.token_counts().tolist()
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(bits))))
    return [
        TokenRow(token, i, count, length)
        for i, (token, count, length) in enumerate(zip(tokens, counts, bits, strict=True))
    ]
