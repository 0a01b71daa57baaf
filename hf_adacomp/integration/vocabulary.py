"""New tokens for a packed model, and fewer."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..codes.codebook import BinaryCodebook
from ..codes.descent import nearest_bits
from ..nn.embedding import AdaptiveCompressedEmbedding
from .tables import compressed_heads, require_compressed, untied_heads

Model = TypeVar("Model", bound=PreTrainedModel)


def add_tokens(model: Model, num_tokens: int) -> Model:
    """Append `num_tokens` tokens to the packed table of `model`, in place, and to its output head; returns `model`.

    Each gets a code of the longest length whose vector is close to the mean vector, no two alike. Like all packed
    tokens they learn in further training what code-book scales and biases can express.

    >>> import torch
    >>> from hf_adacomp import AdaCompConfig, add_tokens, compress, pack
    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2))
    >>> model = pack(compress(model, AdaCompConfig(target_ratio=20), 1000 // torch.arange(1, 1001)))
    >>> add_tokens(model, 5).get_input_embeddings().num_embeddings
    1005

    Raises:
        ValueError: For a negative number, for a model with several tables, or for one that is not packed yet: call
            `model.resize_token_embeddings` before `compress`, or `pack` first.
    """
    if num_tokens < 0:
        raise ValueError(f"num_tokens must not be negative; got {num_tokens}. To drop tokens, keep_tokens(model, n)")
    embedding = _only_packed_table(model)
    _resize(model, embedding, embedding.num_embeddings, _mean_codes(embedding, num_tokens))
    return model


def keep_tokens(model: Model, num_tokens: int) -> Model:
    """Drop all but the first `num_tokens` tokens of the packed table of `model`, in place; returns `model`."""
    embedding = _only_packed_table(model)
    if not 0 < num_tokens <= embedding.num_embeddings:
        raise ValueError(
            f"cannot keep {num_tokens} of {embedding.num_embeddings} tokens. For more, add_tokens(model, n)"
        )
    if embedding.padding_idx is not None and num_tokens <= embedding.padding_idx:
        raise ValueError(f"cannot drop the padding token {embedding.padding_idx}: keep more than {num_tokens} tokens")
    book = embedding.books[-1]
    _resize(model, embedding, num_tokens, torch.zeros(0, book.length, dtype=torch.uint8, device=book.bias.device))
    return model


def resize_token_embeddings(
    model: PreTrainedModel,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> nn.Module:
    """`PreTrainedModel.resize_token_embeddings` for a compressed model; new vectors are near the mean in any case."""
    embedding = _only_packed_table(model)
    wanted = embedding.num_embeddings if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of is not None:
        wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
    if wanted > embedding.num_embeddings:
        add_tokens(model, wanted - embedding.num_embeddings)
    else:
        keep_tokens(model, wanted)
    return embedding


def _only_packed_table(model: PreTrainedModel) -> AdaptiveCompressedEmbedding:
    found = require_compressed(model)
    if len(found) > 1:
        raise ValueError(f"{type(model).__name__} has several compressed tables, {[*found]}: its vocabulary is fixed")
    name, embedding = next(iter(found.items()))
    if embedding.phase != "packed":
        raise ValueError(
            f"the vocabulary of {name!r} cannot change while its codes are trained: change it before compress, or "
            "pack(model) first"
        )
    return embedding


@torch.no_grad()
def _resize(model: PreTrainedModel, embedding: AdaptiveCompressedEmbedding, kept: int, new_codes: Tensor) -> None:
    total = kept + len(new_codes)
    for compressed in compressed_heads(model).values():
        compressed.out_features = total
        if compressed.bias is not None:
            _replace(model, compressed.bias, kept, total)
    for untied in untied_heads(model).values():
        untied.out_features = total
        _replace(model, cast(nn.Parameter, untied.weight), kept, total)
        if untied.bias is not None:
            _replace(model, untied.bias, kept, total)
    logits_bias: Tensor | None = getattr(model, "final_logits_bias", None)  # (1, V), of Bart and its kin
    if logits_bias is not None:
        model.register_buffer("final_logits_bias", _resized(logits_bias.T, kept, total).T)
    embedding.resize(kept, new_codes)
    text_config = model.config.get_text_config()
    text_config.vocab_size = total
    if hasattr(text_config, "decoder_vocab_size"):
        text_config.decoder_vocab_size = total


def _replace(model: nn.Module, old: nn.Parameter, kept: int, total: int) -> None:
    new = nn.Parameter(_resized(old, kept, total), old.requires_grad)
    for module in model.modules():
        for name, value in [*module.named_parameters(recurse=False)]:
            if value is old:
                setattr(module, name, new)


def _resized(rows: Tensor, kept: int, total: int) -> Tensor:
    mean = rows.mean(dim=0, keepdim=True)
    return torch.cat([rows[:kept], mean.expand(total - kept, *rows.shape[1:])])


@torch.no_grad()
def _mean_codes(embedding: AdaptiveCompressedEmbedding, num_tokens: int) -> Tensor:
    """Codes of the longest length near the mean vector, uint8 (num_tokens, L)."""
    book = embedding.books[-1]
    blocks = torch.arange(embedding.num_embeddings, device=book.bias.device).split(book.block)
    decoder = embedding.hard_decoder()
    mean = torch.stack([decoder.vectors(block).float().sum(dim=0) for block in blocks]).sum(dim=0)
    return nearest_codes(book, mean / embedding.num_embeddings, num_tokens, embedding.config.seed)


def nearest_codes(book: BinaryCodebook, target: Tensor, num_codes: int, seed: int) -> Tensor:
    """Codes whose vectors are close to `target` (d,), each from a random start, (N, L) uint8."""
    generator = torch.Generator().manual_seed(seed)
    stored = book.stored()
    vectors, bias = stored.vectors.float(), stored.bias.float()
    start = torch.randint(0, 2, (num_codes, book.length), generator=generator).to(vectors)
    return nearest_bits(target.expand(num_codes, -1), vectors, bias, start=start).to(torch.uint8)
