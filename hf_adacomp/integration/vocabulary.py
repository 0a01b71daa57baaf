"""New tokens for a packed model, and fewer."""

from __future__ import annotations

from collections.abc import Iterable, KeysView, Mapping, Sequence, Set
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from .. import transformers_compat
from ..nn.embedding import AdaptiveCompressedEmbedding
from ..nn.reading import WeightFromCodes
from ..nn.static import StaticModel
from .compressed_tables import compressed_embeddings, compressed_model, token_tables
from .new_codes import codes_for
from .parts import input_embeddings, model_parts
from .resizing import LOGITS_BIAS, packed_tables, resize

Model = TypeVar("Model", bound=Any)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def add_tokens(model: Model, num_tokens: int, vectors: Tensor | None = None) -> Model:
    """Append `num_tokens` tokens to the packed table of `model`, in place, and to its output head; returns `model`.

    Each gets a code of the longest length: the nearest to its vector, or one close to the mean vector, different as far
    as the length allows. Like all packed tokens they learn in further training what code-book scales and biases can
    express. A head with weights of its own gets the mean of its rows.

    >>> import torch
    >>> from hf_adacomp import AdaCompConfig, add_tokens, compress, pack
    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2))
    >>> model = pack(compress(model, AdaCompConfig(target_ratio=20), 1000 // torch.arange(1, 1001)))
    >>> add_tokens(model, 5).get_input_embeddings().num_embeddings
    1005

    Args:
        model: With a packed token table, or several of one vocabulary.
        num_tokens: How many tokens N.
        vectors: Their vectors as the embedding returns them, or a static model, (N, d), such as the means of the pieces
            of new words; a tensor, an array or lists.

    Raises:
        ValueError: For a negative number, vectors of another shape, a model with several vocabularies, or one that
            is not packed yet: call `model.resize_token_embeddings` before `compress`, or `pack` first.
    """
    if isinstance(num_tokens, bool) or not hasattr(num_tokens, "__index__") or num_tokens < 0:
        raise ValueError(
            f"num_tokens must be a whole number, not negative; got {num_tokens!r}. To drop tokens, keep_tokens takes "
            "the number that stays"
        )
    inner, tables = _resizable(model)
    if vectors is not None and len(tables) > 1:
        raise ValueError(f"{type(model).__name__} has {len(tables)} token tables: add_tokens without vectors")
    before = tables[0].num_embeddings
    if vectors is None:
        _resize_to(inner, before + num_tokens)
        return model
    vectors = torch.as_tensor(vectors)
    static = inner if isinstance(inner, StaticModel) and inner.config.gains else None
    targets = vectors if static is None else F.normalize(vectors.float(), dim=-1)  # in half, a zero makes NaN
    codes = codes_for(tables[0], num_tokens, targets)
    _resize_to(inner, before + num_tokens)
    tables[0].resize(torch.arange(before, device=codes.device), codes)
    if static is not None:
        lengths = vectors.float().norm(dim=-1).to(inner.device)
        static.store_gains(torch.cat([static.gain(torch.arange(before, device="cpu")), lengths]))
    return model


def keep_tokens(model: Model, tokens: int | Sequence[int] | Tensor) -> Model:
    """Drop tokens of the packed table of `model`, in place, and of its output head; returns `model`.

    Token ids in its config and generation config (`pad_token_id` and the like) follow their tokens; the tokenizer is
    yours to trim.

    >>> import torch
    >>> from hf_adacomp import AdaCompConfig, compress, keep_tokens, pack
    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2))
    >>> model = pack(compress(model, AdaCompConfig(target_ratio=20), 1000 // torch.arange(1, 1001)))
    >>> keep_tokens(model, [0, 7, 5]).get_input_embeddings().num_embeddings
    3

    Args:
        model: With a packed token table, or several of one vocabulary.
        tokens: How many of the first tokens to keep, or the ids of those to keep, in their new order.

    Raises:
        ValueError: For ids that are not there or twice, and where a token is not among them that the model needs:
            for padding, or one whose id its modules or configs cannot do without.
    """
    inner, tables = _resizable(model)
    total, device = tables[0].num_embeddings, tables[0].device
    kept = _listed(tokens)
    if kept.dim() != 1 or kept.dtype != torch.int64 or not 0 < len(kept) <= total:
        raise ValueError(
            f"cannot keep {tokens} of {total} tokens: give their number or their ids. For more, add_tokens(model, n)"
        )
    if not 0 <= int(kept.min()) <= int(kept.max()) < total or len(kept.unique()) < len(kept):
        raise ValueError(f"tokens to keep must be different ids from 0 to {total - 1}; got {kept.tolist()[:20]}")
    prefix = torch.equal(kept, torch.arange(len(kept), dtype=kept.dtype, device=kept.device))
    if not prefix and transformers_compat.resizes_more(inner) and not hasattr(inner, LOGITS_BIAS):
        raise ValueError(
            f"{type(inner).__name__} has further weights by token, of which only the last can be dropped: "
            "keep_tokens(model, n)"
        )
    for embedding in tables:
        padding = embedding.padding_idx
        if padding is not None and not (kept == padding).any():
            raise ValueError(f"cannot drop the padding token {padding}: keep it, too")
        if padding is None or (padding < len(kept) and int(kept[padding]) == padding):
            continue
        if _positions_start_at(inner, padding):
            raise ValueError(
                f"{type(inner).__name__} counts positions from its padding token {padding}, which cannot get another "
                f"id: give it the place {padding} among the tokens to keep"
            )
    if not prefix:
        codes = [codes_for(embedding, 0, None) for embedding in tables]
        resize(inner, tables, kept.to(device, torch.int64), codes)
    _resize_to(inner, len(kept))
    return model


def _resizable(model: Any) -> tuple[PreTrainedModel, list[AdaptiveCompressedEmbedding]]:
    """The transformers model, or its outermost part, that knows the packed tables as its input embeddings."""
    if not compressed_embeddings(model):
        raise ValueError(
            f"{type(model).__name__} is not compressed: model.resize_token_embeddings(n) changes a dense vocabulary"
        )
    inner = compressed_model(model)
    tables = packed_tables(inner)
    knowing = (part for _, part in model_parts(inner) if input_embeddings(part) is not None)
    return next((part for part in knowing if {*tables} <= {*token_tables(part).values()}), inner), tables


def _resize_to(model: PreTrainedModel, total: int) -> None:
    try:
        model.resize_token_embeddings(total)
    except NotImplementedError as error:
        raise ValueError(
            f"{type(model).__name__} does not know how to resize its tables: change the part that has one, such as "
            f"keep_tokens(model.decoder, ids). It says: {error}"
        ) from error


def _listed(tokens: Any) -> Tensor:
    """The ids of the first so many tokens, or ids as they are given, in any form that holds whole numbers."""
    if isinstance(tokens, Set):  # keys of a dict have an order
        tokens = [*tokens] if isinstance(tokens, KeysView) else sorted(tokens)
    elif isinstance(tokens, Iterable) and not isinstance(tokens, (Mapping, str)) and not hasattr(tokens, "__len__"):
        tokens = [*tokens]
    try:
        kept = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"tokens to keep are their number or their ids; got {tokens!r}: {error}") from error
    if kept.dtype not in (torch.bool, *FLOATS) and not kept.is_complex():
        kept = kept.to(torch.int64)
    return torch.arange(max(int(kept), 0), device="cpu") if kept.dim() == 0 and kept.dtype == torch.int64 else kept


def _positions_start_at(model: PreTrainedModel, padding: int) -> bool:
    """Whether a module that makes positions knows the padding token's id, as RoBERTa's, whose positions follow it."""
    others = (module for module in model.modules() if not isinstance(module, (PreTrainedModel, WeightFromCodes)))
    return any(getattr(module, "padding_idx", None) == padding for module in others)
