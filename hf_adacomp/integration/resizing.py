"""How a vocabulary changes its size: tables, heads, and all that knows how many tokens there are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import transformers_compat
from ..nn.embedding import AdaptiveCompressedEmbedding
from ..nn.head import CompressedHead
from ..nn.sharing import SharedEmbedding
from ..nn.static import StaticModel
from .compressed_tables import compressed_heads, require_compressed, token_tables
from .new_codes import codes_for
from .parts import holder, model_parts
from .token_ids import follow_tokens, refuse_dropped

LOGITS_BIAS = "final_logits_bias"
"""Of shape (1, V), of Bart and its kin."""


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
        tables = packed_tables(model)
        further = not any(old_embeddings is table for table in tables)  # a second table by token, as Gemma3n's
        if further:
            tables = [old_embeddings]
        codes = [codes_for(embedding, max(0, total - before), None) for embedding in tables]
        kept = torch.arange(min(before, total), device=codes[0].device)
        if further:
            old_embeddings.resize(kept, codes[0])
        else:
            resize(model, tables, kept, codes)
    return old_embeddings


def packed_tables(model: PreTrainedModel) -> list[AdaptiveCompressedEmbedding]:
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
            f"{type(model).__name__} has compressed tables of several vocabularies, {sizes}: change those of the "
            "part that is meant, such as add_tokens(model.language_model, n)"
        )
    return [*found.values()]


def resize(
    model: PreTrainedModel, tables: list[AdaptiveCompressedEmbedding], kept: Tensor, new_codes: list[Tensor]
) -> None:
    """Keep tokens of packed tables, int64 (K,), in that order, and append some with centred bits (N, L) a table.

    All that goes by tokens follows: heads, their biases, gains of a static model, sizes and ids in configs.

    Raises:
        ValueError: For a dropped token that the model needs; nothing has changed then.
    """
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
        model.store_gains(_resized(model.gain(torch.arange(before, device="cpu")), kept, total))
    logits_bias: Tensor | None = getattr(model, LOGITS_BIAS, None)
    if logits_bias is not None:
        model.register_buffer(LOGITS_BIAS, _resized(logits_bias.T, kept, total).T)
    _tell_sizes(model, tables, before, total)
    follow_tokens(model, places)


def _tell_sizes(model: PreTrainedModel, tables: list[AdaptiveCompressedEmbedding], before: int, total: int) -> None:
    for _, part in model_parts(model):
        if getattr(part, "vocab_size", None) == before:  # which some losses and routers read
            part.vocab_size = total
    for embedding in tables:  # parts with tables of their own have configs of their own
        config = holder(model, embedding).config.get_text_config()
        if getattr(config, "vocab_size", None) == before:
            config.vocab_size = total
    text_config = model.config.get_text_config()
    text_config.vocab_size = total
    if hasattr(text_config, "decoder_vocab_size"):
        text_config.decoder_vocab_size = total


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
