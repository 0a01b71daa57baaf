"""The compressed token tables and output heads of a model."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .. import torch_compat
from ..nn.dense import TABLES
from ..nn.embedding import AdaptiveCompressedEmbedding
from ..nn.head import CompressedHead
from ..nn.sharing import SharedEmbedding
from .parts import input_embeddings, model_parts, named_modules, transformers_models


def compressed_model(model: Any) -> PreTrainedModel:
    """The one transformers model with compressed tables that `model` is or holds."""
    found = compressed_models(model)
    if len(found) > 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} compressed transformers models: call this with one of them"
        )
    return found[0]


def compressed_models(model: Any) -> list[PreTrainedModel]:
    """The transformers models with compressed tables that `model` is or holds; ValueError if there are none."""
    tables = require_compressed(model)
    found = [inner for inner in transformers_models(model) if compressed_embeddings(inner)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has compressed tables, {[*tables]}, but no transformers model, which this takes. "
            "embedding.to_embedding() gives the dense module of a table"
        )
    return found


def compressed_embeddings(model: Any) -> dict[str, AdaptiveCompressedEmbedding]:
    """The compressed tables of a model by module name; one shared under several names is listed once."""
    modules = named_modules(model)
    return {name: module for name, module in modules.items() if isinstance(module, AdaptiveCompressedEmbedding)}


def require_compressed(model: Any) -> dict[str, AdaptiveCompressedEmbedding]:
    """As `compressed_embeddings`, with a ValueError if there is none."""
    found = compressed_embeddings(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no compressed embedding: call compress(model, config) first")
    return found


def token_tables(model: PreTrainedModel) -> dict[str, AdaptiveCompressedEmbedding]:
    """Of the compressed tables, those that `get_input_embeddings` returns for the model and its parts."""
    inputs = [input_embeddings(part) for _, part in model_parts(model)]
    return {name: table for name, table in compressed_embeddings(model).items() if any(table is one for one in inputs)}


def compressed_heads(model: Any) -> dict[str, CompressedHead]:
    """The compressed output heads of a model by module name."""
    return {name: module for name, module in named_modules(model).items() if isinstance(module, CompressedHead)}


def num_tokens(model: PreTrainedModel) -> int:
    """Rows V of the token table of a model, compressed or not; of a part's, where the model has none of its own."""
    found = [input_embeddings(part) for _, part in model_parts(model)]
    tables = (*TABLES, AdaptiveCompressedEmbedding, SharedEmbedding)
    known = [table for table in (*found, *compressed_embeddings(model).values()) if isinstance(table, tables)]
    if not known:
        raise ValueError(f"{type(model).__name__} has no token embeddings: nothing tells how many tokens it knows")
    return int(known[0].num_embeddings)


def untied_heads(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Output heads that were tied to a table which has been compressed, and now keep weights of their own."""
    tables = [table for table in compressed_embeddings(model).values() if table.head_untied]
    shapes = {(table.num_embeddings, table.embedding_dim) for table in tables}
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or tuple(head.weight.shape) not in shapes:
        return {}
    return {name: head for name, module in model.named_modules() if module is head}


def keep_from_broadcasts(model: Any) -> None:
    """Have DDP leave the buffers of a model's tables alone: they are constants, and as large as the table."""
    if isinstance(model, nn.Module):
        tables = compressed_embeddings(model).items()
        torch_compat.spare_broadcasts(
            model, [f"{name}.{buffer}" for name, table in tables for buffer, _ in table.named_buffers()]
        )
