"""Put compressed tables into a model, in all places of the dense ones, and take them out again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import torch_compat, transformers_compat
from ..config import AdaCompConfig
from ..nn.embedding import AdaptiveCompressedEmbedding
from ..nn.head import CompressedHead
from ..nn.sharing import Place, SharedEmbedding
from .compressed_tables import compressed_embeddings, untied_heads
from .dense_tables import DenseTable, dense_tables
from .parts import model_parts, named_modules, say_tied, transformers_models

Planned = list[tuple[DenseTable, AdaptiveCompressedEmbedding]]
"""The tables of a model, and what is to come in their places."""


def plan(
    model: PreTrainedModel,
    config: AdaCompConfig,
    token_counts: Tensor | Mapping[str, Tensor] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> Planned:
    """Compressed tables for the places of the token tables of `model`, which stays as it is.

    Raises:
        ValueError: If it cannot be compressed.
    """
    if compressed_embeddings(model):
        raise ValueError(f"{type(model).__name__} is compressed already: load the dense model anew, and compress that")
    tables = dense_tables(model, include, exclude)
    names = [table.name for table in tables]
    counts = token_counts if isinstance(token_counts, Mapping) else dict.fromkeys(names, token_counts)
    if unknown := set(counts) - set(names):
        raise ValueError(
            f"token_counts names {sorted(map(str, unknown))[:5]}, but the tables to compress are {names}. Counts of a "
            "table are a tensor (V,), in the order of token ids"
        )
    return [
        (table, AdaptiveCompressedEmbedding.from_embedding(table.owner, config, counts.get(table.name)))
        for table in tables
    ]


def install(model: PreTrainedModel, planned: Planned, head: str) -> None:
    """Replace the token tables of `model` as it was planned."""
    for table, embedding in planned:
        put(model, table, embedding, head)


def refuse_ties_outside(whole: Any, model: PreTrainedModel, planned: Planned) -> None:
    """Raise ValueError if something in `whole` shares a table of `model`, but is no part of it."""
    inside = set(model.modules())
    others = [other for other in transformers_models(whole) if other is not model]
    for table, _ in planned:
        places = [
            repr(name)
            for name, module in named_modules(whole).items()
            if module not in inside and _holds(module.parameters(recurse=False), table.owner.weight)
        ]
        places += [f"the {type(other).__name__}" for other in others if _holds(other.parameters(), table.owner.weight)]
        if places:
            raise ValueError(
                f"{table.name!r}, the token table of the {type(model).__name__}, is also the weight of {places[0]}, "
                "which is no part of that model and would keep a dense copy: untie it first, or make the whole a "
                "PreTrainedModel whose get_input_embeddings and get_output_embeddings return the two places"
            )


def _holds(parameters: Iterable[Tensor], weight: Tensor) -> bool:
    return any(parameter is weight for parameter in parameters)


def put(model: PreTrainedModel, table: DenseTable, embedding: AdaptiveCompressedEmbedding, head: str) -> None:
    """Put `embedding` in all places of `table`, and tell transformers that they are not tied by their weights."""
    for prefix, part in model_parts(model):
        transformers_compat.forget_ties(part, prefix, table.weights)
    embedding.requires_grad_(table.owner.weight.requires_grad)
    replace_module(model, table.owner, embedding)
    place = Place(model, table.name)
    for shared in table.shared.values():
        replace_module(model, shared, SharedEmbedding(place).train(shared.training))
    for linear in table.heads.values():
        if head == "compress":
            replace_module(model, linear, CompressedHead(place, linear.bias).train(linear.training))
        else:
            linear.weight, embedding.head_untied = _copy(linear.weight), True


def take_out(model: PreTrainedModel) -> None:
    """Put dense modules back in all places of the compressed tables of `model`, and the ties between them.

    Where a head kept weights of its own, nothing is tied any more: configs know all ties or none.
    """
    untied = untied_heads(model)
    for embedding in compressed_embeddings(model).values():
        dense = embedding.to_embedding()
        dense.weight.requires_grad_(embedding.weight.requires_grad)
        for module in list(model.modules()):
            if isinstance(module, SharedEmbedding) and module.embedding is embedding:
                weight = _copy(dense.weight) if untied else dense.weight
                replace_module(model, module, embedding.dense_with(weight).train(module.training))
            if isinstance(module, CompressedHead) and module.embedding is embedding:
                linear = nn.Linear(1, 1, bias=False)
                linear.out_features, linear.in_features = dense.weight.shape
                linear.weight = dense.weight
                linear.register_parameter("bias", module.bias)
                replace_module(model, module, linear.train(module.training))
        replace_module(model, embedding, dense)
    if untied:
        for head in untied.values():
            say_tied(model, head, False)
            # Its bias may be tied to another name of the same parameter, too.
            if head.bias is not None:
                head.bias = _copy(head.bias)
    for _, part in model_parts(model):
        transformers_compat.remember_ties(part, untied=bool(untied))


def _copy(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `model` holds `old`, with the hooks of users and libraries on it."""
    torch_compat.hand_over_hooks(old, new)
    places = [
        (parent, name) for parent in model.modules() for name, child in torch_compat.children(parent) if child is old
    ]
    for parent, name in places:
        setattr(parent, name, new)
