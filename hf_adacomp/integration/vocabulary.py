"""New tokens for a packed model, and fewer."""

from __future__ import annotations

from collections.abc import Iterable, KeysView, Mapping, Sequence, Set
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .. import transformers_compat
from ..nn.embedding import AdaptiveCompressedEmbedding
from ..nn.head import CompressedHead
from ..nn.reading import WeightFromCodes
from ..nn.sharing import SharedEmbedding
from ..nn.static import StaticModel
from .new_codes import codes_for
from .tables import (
    compressed_embeddings,
    compressed_heads,
    compressed_model,
    input_embeddings,
    model_parts,
    require_compressed,
    token_tables,
)
from .token_ids import follow_tokens, refuse_dropped

Model = TypeVar("Model", bound=Any)

LOGITS_BIAS = "final_logits_bias"
"""Of shape (1, V), of Bart and its kin."""

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
        static.store_gains(torch.cat([static.gain(torch.arange(before)), lengths]))
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
        _resize(inner, tables, kept.to(device, torch.int64), codes)
    _resize_to(inner, len(kept))
    return model


def _resizable(model: Any) -> tuple[PreTrainedModel, list[AdaptiveCompressedEmbedding]]:
    """The transformers model, or its outermost part, that knows the packed tables as its input embeddings."""
    if not compressed_embeddings(model):
        raise ValueError(
            f"{type(model).__name__} is not compressed: model.resize_token_embeddings(n) changes a dense vocabulary"
        )
    inner = compressed_model(model)
    tables = _packed_tables(inner)
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
    return torch.arange(max(int(kept), 0)) if kept.dim() == 0 and kept.dtype == torch.int64 else kept


def _positions_start_at(model: PreTrainedModel, padding: int) -> bool:
    """Whether a module that makes positions knows the padding token's id, as RoBERTa's, whose positions follow it."""
    others = (module for module in model.modules() if not isinstance(module, (PreTrainedModel, WeightFromCodes)))
    return any(getattr(module, "padding_idx", None) == padding for module in others)


def resized_embeddings(
    model: PreTrainedModel,
    old_embeddings: nn.Module,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> nn.Module:
    """What `resize_token_embeddings` asks for resized embeddings; new vectors are near the mean in any case."""
    if isinstance(old_embeddings, SharedEmbedding):
        raise ValueError(
            f"{type(model).__name__} shares its token table with another part of its model: resize the whole model"
        )
    if not isinstance(old_embeddings, AdaptiveCompressedEmbedding):
        return transformers_compat.resized_embeddings(
            model, old_embeddings, new_num_tokens, pad_to_multiple_of, mean_resizing
        )
    before = old_embeddings.num_embeddings
    total = before if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of is not None:
        total = -(-total // pad_to_multiple_of) * pad_to_multiple_of
    if total < 1:
        raise ValueError(f"a vocabulary has at least one token; got {total}")
    if total != before:
        tables = _packed_tables(model)
        further = not any(old_embeddings is table for table in tables)  # a second table by token, as Gemma3n's
        if further:
            tables = [old_embeddings]
        codes = [codes_for(embedding, max(0, total - before), None) for embedding in tables]
        kept = torch.arange(min(before, total), device=codes[0].device)
        if further:
            old_embeddings.resize(kept, codes[0])
        else:
            _resize(model, tables, kept, codes)
    return old_embeddings


def _packed_tables(model: PreTrainedModel) -> list[AdaptiveCompressedEmbedding]:
    """The packed tables of token vectors, all of one vocabulary."""
    found = token_tables(model)
    if not found:
        raise ValueError(
            f"no table of token vectors is compressed in the {type(model).__name__}, only "
            f"{[*require_compressed(model)]}: model.resize_token_embeddings(n) changes a dense one"
        )
    for name, embedding in found.items():
        if embedding.phase != "packed":
            raise ValueError(
                f"the vocabulary of {name!r} cannot change while its codes are trained: change it before compress, or "
                "pack(model) first"
            )
    sizes = {name: embedding.num_embeddings for name, embedding in found.items()}
    if len({*sizes.values()}) > 1:
        raise ValueError(
            f"{type(model).__name__} has compressed tables of several vocabularies, {sizes}: they are fixed"
        )
    return [*found.values()]


def _resize(
    model: PreTrainedModel, tables: list[AdaptiveCompressedEmbedding], kept: Tensor, new_codes: list[Tensor]
) -> None:
    before, total = tables[0].num_embeddings, len(kept) + len(new_codes[0])
    places = dict.fromkeys(range(before)) | {token: place for place, token in enumerate(kept.tolist())}
    refuse_dropped(model, places)
    for embedding, codes in zip(tables, new_codes, strict=True):
        embedding.resize(kept, codes)
    heads: list[CompressedHead | nn.Linear] = [
        head for head in compressed_heads(model).values() if head.embedding in tables
    ]
    output = model.get_output_embeddings()
    if isinstance(output, nn.Linear):  # with weights of its own
        heads.append(output)
    for head in heads:
        if isinstance(head, nn.Linear):
            head.out_features = total
        for parameter in [*head.parameters()]:
            _replace(model, parameter, kept, total)
    if output in heads:
        model.set_output_embeddings(output)  # models have further places for its bias
    if isinstance(model, StaticModel) and model.config.gains:
        model.store_gains(_resized(model.gain(torch.arange(before)), kept, total))
    logits_bias: Tensor | None = getattr(model, LOGITS_BIAS, None)
    if logits_bias is not None:
        model.register_buffer(LOGITS_BIAS, _resized(logits_bias.T, kept, total).T)
    for _, part in model_parts(model):
        if getattr(part, "vocab_size", None) == before:  # which some losses and routers read
            part.vocab_size = total
    text_config = model.config.get_text_config()
    text_config.vocab_size = total
    if hasattr(text_config, "decoder_vocab_size"):
        text_config.decoder_vocab_size = total
    follow_tokens(model, places)


def _replace(model: nn.Module, old: nn.Parameter, kept: Tensor, total: int) -> None:
    new = nn.Parameter(_resized(old, kept, total), old.requires_grad)
    for module in model.modules():
        for name, value in [*module.named_parameters(recurse=False)]:
            if value is old:
                setattr(module, name, new)


@torch.no_grad()
def _resized(rows: Tensor, kept: Tensor, total: int) -> Tensor:
    """Rows of kept tokens, and the mean for those that have none: new ones, and where a head knows fewer tokens."""
    resized = rows.mean(dim=0, keepdim=True).repeat(total, *[1] * (rows.dim() - 1))
    kept = kept.to(rows.device)
    known = (kept < len(rows)).nonzero().squeeze(1)
    resized[known] = rows[kept[known]]
    return resized
