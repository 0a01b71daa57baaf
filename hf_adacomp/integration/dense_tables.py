"""The dense token tables of a model, with all places that share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import transformers_compat
from ..nn.bag import Bag
from ..nn.dense import TABLES, checked_table
from ..nn.head import CompressedHead
from .parts import input_embeddings, model_parts


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


def _tied_to(model: PreTrainedModel, weight: str) -> set[str]:
    """Names of all parameters that the model declares to be the same as `weight`."""
    found = {weight}
    for a, b in [*transformers_compat.tied_weights(model).items()] * 2:  # twice: both may be tied to a third
        if found & {a, b}:
            found |= {a, b}
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns))


def _same_but_for_place(a: nn.Embedding | nn.EmbeddingBag, b: nn.Embedding | nn.EmbeddingBag) -> bool:
    scales = [transformers_compat.embed_scale(module) for module in (a, b)]
    same = all(isinstance(scale, torch.Tensor) and scale.is_meta for scale in scales) or scales[0] == scales[1]
    return type(a) is type(b) and bool(same) and a.padding_idx == b.padding_idx and Bag.of(a) == Bag.of(b)
