"""The token tables of a model: dense ones with all places that share them, and compressed ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import chain
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import torch_compat, transformers_compat
from ..nn.bag import Bag
from ..nn.dense import TABLES, checked_table
from ..nn.embedding import AdaptiveCompressedEmbedding
from ..nn.head import CompressedHead
from ..nn.sharing import SharedEmbedding


@dataclass
class DenseTable:
    """A dense token table and the modules of a model that share its weights.

    Args:
        name: Module name of its owner, the embedding that `get_input_embeddings` returns.
        owner: That module.
        shared: Further embeddings with the same weights, by module name.
        heads: Output heads with the same weights, by module name.
    """

    name: str
    owner: nn.Embedding | nn.EmbeddingBag
    shared: dict[str, nn.Embedding | nn.EmbeddingBag]
    heads: dict[str, nn.Linear]

    @property
    def weights(self) -> set[str]:
        """Names of the parameter in all places."""
        return {f"{name}.weight" for name in (self.name, *self.shared, *self.heads)}


def named_modules(model: Any) -> dict[str, nn.Module]:
    """The modules of a model by name, each once; also of an object that holds models, such as SetFit's."""
    parts = {"": model} if isinstance(model, nn.Module) else vars(model)
    found = [part.named_modules(prefix=name) for name, part in parts.items() if isinstance(part, nn.Module)]
    return dict(chain.from_iterable(found))


def transformers_models(model: Any) -> list[PreTrainedModel]:
    """A transformers model itself, or those that an object holds, such as a sentence-transformers model; outermost."""
    found = [module for module in named_modules(model).values() if isinstance(module, PreTrainedModel)]
    return [one for one in found if not any(one in [*outer.modules()] for outer in found if outer is not one)]


def num_tokens(model: PreTrainedModel) -> int:
    """Rows V of the token table of a model, compressed or not; of a part's, where the model has none of its own."""
    found = [input_embeddings(part) for _, part in model_parts(model)]
    tables = (*TABLES, AdaptiveCompressedEmbedding, SharedEmbedding)
    known = [table for table in (*found, *compressed_embeddings(model).values()) if isinstance(table, tables)]
    if not known:
        raise ValueError(f"{type(model).__name__} has no token embeddings: nothing tells how many tokens it knows")
    return int(known[0].num_embeddings)


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


def keep_from_broadcasts(model: Any) -> None:
    """Have DDP leave the buffers of a model's tables alone: they are constants, and as large as the table."""
    if isinstance(model, nn.Module):
        tables = compressed_embeddings(model).items()
        torch_compat.spare_broadcasts(
            model, [f"{name}.{buffer}" for name, table in tables for buffer, _ in table.named_buffers()]
        )


def holder(model: PreTrainedModel, module: nn.Module) -> PreTrainedModel:
    """The innermost model that holds a module of `model`, whose config speaks of it."""
    return [part for _, part in model_parts(model) if any(module is one for one in part.modules())][-1]


def config_ties(model: PreTrainedModel, head: nn.Module) -> bool:
    """Whether the config asks for this output head to be tied."""
    return bool(getattr(holder(model, head).config, "tie_word_embeddings", False))


def say_tied(model: PreTrainedModel, head: nn.Module, tied: bool) -> None:
    """Have the config ask for this output head to be tied, or not."""
    config = holder(model, head).config
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = tied


def untied_heads(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Output heads that were tied to a table which has been compressed, and now keep weights of their own."""
    tables = [table for table in compressed_embeddings(model).values() if table.head_untied]
    shapes = {(table.num_embeddings, table.embedding_dim) for table in tables}
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or tuple(head.weight.shape) not in shapes:
        return {}
    return {name: head for name, module in model.named_modules() if module is head}


def dense_tables(
    model: PreTrainedModel, include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> list[DenseTable]:
    """The token tables of a model, each once, however many modules share it.

    Those are what `get_input_embeddings` returns for the model and its parts, unless `include` (patterns as in
    `fnmatch`, for module names) asks for others. ValueError if there are none, or they are not understood.
    """
    names: dict[nn.Module, str] = {module: name for name, module in reversed([*model.named_modules()])}
    if include is None:
        found = [input_embeddings(part) for _, part in model_parts(model)]
        owners = [m for i, m in enumerate(found) if m is not None and (i == 0 or isinstance(m, TABLES))]
    else:
        owners = [m for m, name in names.items() if isinstance(m, TABLES) and _matches(name, include)]
        owners.sort(key=lambda owner: owner is not input_embeddings(model))
    tables: list[DenseTable] = []
    for owner in owners:
        if owner not in names or _matches(names[owner], exclude):
            continue
        if any(f"{names[owner]}.weight" in table.weights for table in tables):
            continue
        tables.append(dense_table(model, names[owner], owner))
    if not tables:
        asked = f" that include={include} and exclude={exclude} name" if include is not None or exclude else ""
        embeddings = [name for module, name in names.items() if isinstance(module, TABLES)]
        raise ValueError(
            f"{type(model).__name__} has no token embeddings to compress{asked}. Its embeddings are {embeddings}: name "
            "some by include"
        )
    return tables


def dense_table(model: PreTrainedModel, name: str, owner: nn.Module) -> DenseTable:
    """The table of the module `name` of `model`; ValueError if it, or what shares it, is not understood."""
    checked_table(owner)
    owner = cast(nn.Embedding | nn.EmbeddingBag, owner)
    table = DenseTable(name, owner, {}, {})
    head = model.get_output_embeddings()
    if head is not None and not isinstance(head, (nn.Linear, CompressedHead)):
        raise ValueError(
            f"{type(model).__name__} has an output head that is not understood, a {type(head).__name__}; only "
            "nn.Linear heads are"
        )
    declared = _tied_to(model, f"{name}.weight")
    for other, module in model.named_modules():
        # Before transformers has loaded a model, ties are declared but not made yet.
        tied = any(p is owner.weight for p in module.parameters(recurse=False)) or (
            owner.weight.is_meta and f"{other}.weight" in declared
        )
        if module is owner or not tied:
            continue
        if isinstance(module, TABLES) and _same_but_for_place(module, owner):
            table.shared[other] = module
        elif type(module) is nn.Linear and module.weight.shape == owner.weight.shape:
            table.heads[other] = module
        else:
            raise ValueError(
                f"{type(model).__name__} ties its token embeddings {name!r} to {other!r}, a {type(module).__name__}: "
                "only embeddings with the same scale and nn.Linear output heads are understood"
            )
    loose = declared - table.weights
    if loose and getattr(model.config, "tie_word_embeddings", True):
        raise ValueError(
            f"{type(model).__name__} declares {min(loose)!r} tied to '{name}.weight', but they are different tensors: "
            "call model.tie_weights(), or set config.tie_word_embeddings=False, before compress"
        )
    return table


def same_table(a: str, b: str) -> bool:
    """Whether two module names can be one table's, in a model with and without its task head.

    `bert.embeddings.word_embeddings` of a classifier is `embeddings.word_embeddings` of the bare model.
    """
    return a == b or a.endswith(f".{b}") or b.endswith(f".{a}")


def matching_table(model: PreTrainedModel, name: str) -> DenseTable:
    """The token table stored as `name`, whether it was saved with or without its task head."""
    for candidate, module in model.named_modules(remove_duplicate=False):
        if candidate and same_table(candidate, name) and isinstance(module, TABLES):
            return dense_table(model, candidate, module)
    raise ValueError(
        f"the file's quantization_config names a compressed table {name!r}, but {type(model).__name__} has no "
        "nn.Embedding of that name: load it with the model class it was saved from"
    )


def model_parts(model: PreTrainedModel) -> list[tuple[str, PreTrainedModel]]:
    """The model itself and the models inside of it, with the prefix of their parameters' names."""
    return [
        (f"{name}." if name else "", module)
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
    ]


def _tied_to(model: PreTrainedModel, weight: str) -> set[str]:
    """Names of all parameters that the model declares to be the same as `weight`."""
    found = {weight}
    for a, b in [*transformers_compat.tied_weights(model).items()] * 2:  # twice: both may be tied to a third
        if found & {a, b}:
            found |= {a, b}
    return found


def input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """What `get_input_embeddings` returns; None for models that have none, such as those of images."""
    try:
        module: nn.Module | None = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return module


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns))


def _same_but_for_place(a: nn.Embedding | nn.EmbeddingBag, b: nn.Embedding | nn.EmbeddingBag) -> bool:
    scales = [transformers_compat.embed_scale(module) for module in (a, b)]
    same = all(isinstance(scale, torch.Tensor) and scale.is_meta for scale in scales) or scales[0] == scales[1]
    return type(a) is type(b) and bool(same) and a.padding_idx == b.padding_idx and Bag.of(a) == Bag.of(b)
