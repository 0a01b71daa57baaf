"""Find the token table of a model and put another module in its place."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from .coder import checked_source
from .config import AdaCompConfig
from .embedding import AdaptiveCompressedEmbedding


def compressed_embeddings(model: nn.Module) -> dict[str, AdaptiveCompressedEmbedding]:
    """The compressed tables of a model by module name; one shared under several names is listed once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptiveCompressedEmbedding)}


def require_compressed(model: nn.Module) -> dict[str, AdaptiveCompressedEmbedding]:
    """As `compressed_embeddings`, with a ValueError if there is none."""
    found = compressed_embeddings(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no compressed embedding: call compress(model, config) first")
    return found


def install(model: PreTrainedModel, config: AdaCompConfig, token_counts: Tensor | None = None) -> None:
    """Replace the token table of `model` by an `AdaptiveCompressedEmbedding`; nothing changes if it raises."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"compress takes a transformers PreTrainedModel; got {type(model).__name__}. For another module, put "
            "AdaptiveCompressedEmbedding.from_embedding(module.embedding, config) in the place of its nn.Embedding"
        )
    if compressed_embeddings(model):
        raise ValueError(f"{type(model).__name__} is compressed already; decompress(model) undoes it")
    name, table = token_table_of(model)
    refuse_tied(model, name, table)
    replace_module(model, table, AdaptiveCompressedEmbedding.from_embedding(table, config, token_counts))


def token_table_of(model: PreTrainedModel) -> tuple[str, nn.Embedding]:
    """Module name and module of the token embeddings; ValueError if there are none or they are not understood."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        table = None
    names = [name for name, module in model.named_modules() if module is table]
    if table is None or not names:
        raise ValueError(
            f"{type(model).__name__} has no token embeddings to compress (get_input_embeddings found none)"
        )
    checked_source(table)
    return names[0], cast(nn.Embedding, table)


def refuse_tied(model: PreTrainedModel, name: str, table: nn.Embedding) -> None:
    """Raise ValueError if the weights of `table` also serve another module, such as an output head."""
    sharing = [
        other
        for other, module in model.named_modules()
        if module is not table and any(p is table.weight for p in module.parameters(recurse=False))
    ]
    weight = f"{name}.weight"
    tied = [target for target, source in model.all_tied_weights_keys.items() if weight in (source, target)]
    if sharing or tied:
        raise ValueError(
            f"{type(model).__name__} ties its token embeddings {name!r} to {(sharing or tied)[0]!r}; tied tables are "
            "not supported yet. Compress a model without a tied head, such as one for sequence classification"
        )


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `model` holds `old`."""
    places = [(parent, name) for parent in model.modules() for name, child in parent.named_children() if child is old]
    for parent, name in places:
        setattr(parent, name, new)


def matching_table(model: nn.Module, name: str) -> tuple[str, nn.Embedding]:
    """The token table stored as `name`, whether it was saved with or without its task head.

    `bert.embeddings.word_embeddings` of a classifier is `embeddings.word_embeddings` of the bare model.
    """
    for candidate, module in model.named_modules():
        same = candidate == name or candidate.endswith("." + name) or name.endswith("." + candidate)
        if candidate and same and isinstance(module, nn.Embedding):
            return candidate, module
    raise ValueError(
        f"the file's quantization_config names a compressed table {name!r}, but {type(model).__name__} has no "
        "nn.Embedding of that name: load it with the model class it was saved from"
    )
