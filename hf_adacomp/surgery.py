"""Find the token tables of a model, with all places that share them, and put compressed ones there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .config import AdaCompConfig
from .embedding import AdaptiveCompressedEmbedding
from .places import CompressedHead, SharedEmbedding
from .source import checked_source, dense_embedding

TIES = ("_tied_weights_keys", "all_tied_weights_keys")
DENSE_TIES = "_dense_ties"
"""Where transformers keeps which parameters are tied, and where we keep what it said before compression."""


@dataclass
class TokenTable:
    """A token table and the modules of a model that share its weights.

    Args:
        name: Module name of its owner, the embedding that `get_input_embeddings` returns.
        owner: That module.
        shared: Further embeddings with the same weights, by module name.
        heads: Output heads with the same weights, by module name.
    """

    name: str
    owner: nn.Embedding
    shared: dict[str, nn.Embedding]
    heads: dict[str, nn.Linear]

    @property
    def weights(self) -> set[str]:
        """Names of the parameter in all places."""
        return {f"{name}.weight" for name in (self.name, *self.shared, *self.heads)}


def compressed_embeddings(model: nn.Module) -> dict[str, AdaptiveCompressedEmbedding]:
    """The compressed tables of a model by module name; one shared under several names is listed once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptiveCompressedEmbedding)}


def require_compressed(model: nn.Module) -> dict[str, AdaptiveCompressedEmbedding]:
    """As `compressed_embeddings`, with a ValueError if there is none."""
    found = compressed_embeddings(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no compressed embedding: call compress(model, config) first")
    return found


def compressed_heads(model: nn.Module) -> dict[str, CompressedHead]:
    """The compressed output heads of a model by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedHead)}


def config_ties(model: PreTrainedModel) -> bool:
    """Whether the model's config asks for an output head that is tied to the table."""
    return bool(getattr(model.config, "tie_word_embeddings", False))


def untied_heads(model: nn.Module) -> dict[str, nn.Linear]:
    """Output heads that were tied to a table which has been compressed, and now keep weights of their own."""
    if not isinstance(model, PreTrainedModel) or not config_ties(model):
        return {}
    shapes = {(table.num_embeddings, table.embedding_dim) for table in compressed_embeddings(model).values()}
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or tuple(head.weight.shape) not in shapes:
        return {}
    return {name: head for name, module in model.named_modules() if module is head}


def install(
    model: PreTrainedModel,
    config: AdaCompConfig,
    token_counts: Tensor | Mapping[str, Tensor] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> None:
    """Replace the token tables of `model` by compressed ones; nothing changes if it raises."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"compress takes a transformers PreTrainedModel; got {type(model).__name__}. For another module, put "
            "AdaptiveCompressedEmbedding.from_embedding(module.embedding, config) in the place of its nn.Embedding"
        )
    if compressed_embeddings(model):
        raise ValueError(f"{type(model).__name__} is compressed already; decompress(model) undoes it")
    tables = token_tables(model, include, exclude)
    names = [table.name for table in tables]
    counts = token_counts if isinstance(token_counts, Mapping) else dict.fromkeys(names, token_counts)
    if unknown := set(counts) - set(names):
        raise ValueError(f"token_counts names {sorted(unknown)}, but the tables to compress are {names}")
    compressed = [
        AdaptiveCompressedEmbedding.from_embedding(table.owner, config, counts.get(table.name)) for table in tables
    ]
    for table, embedding in zip(tables, compressed, strict=True):
        put(model, table, embedding, config.head)


def put(model: PreTrainedModel, table: TokenTable, embedding: AdaptiveCompressedEmbedding, head: str) -> None:
    """Put `embedding` in all places of `table`, and tell transformers that they are not tied by their weights."""
    for prefix, part in _parts(model):
        part.__dict__.setdefault(DENSE_TIES, {name: part.__dict__[name] for name in TIES if name in part.__dict__})
        own = part.get_expanded_tied_weights_keys()
        for attribute, ties in zip(TIES, (own, part.all_tied_weights_keys), strict=True):
            kept = {a: b for a, b in ties.items() if not {prefix + a, prefix + b} & table.weights}
            if len(kept) < len(ties):
                setattr(part, attribute, kept)
    for shared in table.shared.values():
        replace_module(model, shared, SharedEmbedding(embedding))
    for linear in table.heads.values():
        if head == "compress":
            replace_module(model, linear, CompressedHead(embedding, linear.bias))
        else:
            linear.weight = nn.Parameter(linear.weight.detach().clone())
    replace_module(model, table.owner, embedding)


def take_out(model: PreTrainedModel) -> None:
    """Put dense modules back in all places of the compressed tables of `model`, and the ties between them.

    Where a head kept weights of its own, nothing is tied any more: configs know all ties or none.
    """
    untied = untied_heads(model)
    for embedding in compressed_embeddings(model).values():
        dense = embedding.to_embedding()
        for module in list(model.modules()):
            if isinstance(module, SharedEmbedding) and module.embedding is embedding:
                weight = dense.weight.detach().clone() if untied else dense.weight
                again = dense_embedding(weight, dense.padding_idx, embedding.scale, embedding.dense_class)
                replace_module(model, module, again.train(module.training))
            if isinstance(module, CompressedHead) and module.embedding is embedding:
                linear = nn.Linear(1, 1, bias=False)
                linear.out_features, linear.in_features = dense.weight.shape
                linear.weight = dense.weight
                linear.register_parameter("bias", module.bias)
                replace_module(model, module, linear.train(module.training))
        replace_module(model, embedding, dense)
    if untied:
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False
        for head in untied.values():  # its bias may be tied to another name of the same parameter, too
            if head.bias is not None:
                head.bias = nn.Parameter(head.bias.detach().clone(), head.bias.requires_grad)
    for _, part in _parts(model):
        dense_ties = part.__dict__.pop(DENSE_TIES)
        for name in TIES:
            part.__dict__.pop(name, None)
        part.__dict__.update(dense_ties)
        if untied:
            part.all_tied_weights_keys = {}


def token_tables(
    model: PreTrainedModel, include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> list[TokenTable]:
    """The token tables of a model, each once, however many modules share it.

    Those are what `get_input_embeddings` returns for the model and its parts, unless `include` (patterns as in
    `fnmatch`, for module names) asks for others. ValueError if there are none, or they are not understood.
    """
    names: dict[nn.Module, str] = {module: name for name, module in reversed([*model.named_modules()])}
    if include is None:
        found = [_input_embeddings(part) for _, part in _parts(model)]
        owners = [m for i, m in enumerate(found) if m is not None and (i == 0 or isinstance(m, nn.Embedding))]
    else:
        owners = [m for m, name in names.items() if isinstance(m, nn.Embedding) and _matches(name, include)]
        owners.sort(key=lambda owner: owner is not _input_embeddings(model))
    tables: list[TokenTable] = []
    for owner in owners:
        if owner not in names or _matches(names[owner], exclude):
            continue
        if any(f"{names[owner]}.weight" in table.weights for table in tables):
            continue
        tables.append(token_table(model, names[owner], owner))
    if not tables:
        asked = "" if include is None and not exclude else f" for include={include} and exclude={exclude}"
        raise ValueError(
            f"{type(model).__name__} has no token embeddings to compress (get_input_embeddings found none){asked}"
        )
    return tables


def token_table(model: PreTrainedModel, name: str, owner: nn.Module) -> TokenTable:
    """The table of the module `name` of `model`; ValueError if it, or what shares it, is not understood."""
    checked_source(owner)
    owner = cast(nn.Embedding, owner)
    table = TokenTable(name, owner, {}, {})
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
        if isinstance(module, nn.Embedding) and _same_but_for_place(module, owner):
            table.shared[other] = module
        elif type(module) is nn.Linear and module.weight.shape == owner.weight.shape:
            table.heads[other] = module
        else:
            raise ValueError(
                f"{type(model).__name__} ties its token embeddings {name!r} to {other!r}, a {type(module).__name__}: "
                "only embeddings with the same scale and nn.Linear output heads are understood"
            )
    if loose := declared - table.weights:
        raise ValueError(
            f"{type(model).__name__} declares {min(loose)!r} tied to '{name}.weight', but they are different tensors: "
            "call model.tie_weights(), or set config.tie_word_embeddings=False, before compress"
        )
    return table


def matching_table(model: PreTrainedModel, name: str) -> TokenTable:
    """The token table stored as `name`, whether it was saved with or without its task head.

    `bert.embeddings.word_embeddings` of a classifier is `embeddings.word_embeddings` of the bare model.
    """
    for candidate, module in model.named_modules(remove_duplicate=False):
        same = candidate == name or candidate.endswith("." + name) or name.endswith("." + candidate)
        if candidate and same and isinstance(module, nn.Embedding):
            return token_table(model, candidate, module)
    raise ValueError(
        f"the file's quantization_config names a compressed table {name!r}, but {type(model).__name__} has no "
        "nn.Embedding of that name: load it with the model class it was saved from"
    )


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `model` holds `old`."""
    places = [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is old]
    for parent, name in places:
        setattr(parent, name, new)


def _parts(model: PreTrainedModel) -> list[tuple[str, PreTrainedModel]]:
    """The model itself and the models inside of it, with the prefix of their parameters' names."""
    return [
        (f"{name}." if name else "", module)
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
    ]


def _tied_to(model: PreTrainedModel, weight: str) -> set[str]:
    """Names of all parameters that the model declares to be the same as `weight`."""
    found = {weight}
    for a, b in [*model.all_tied_weights_keys.items()] * 2:  # twice: both may be tied to a third
        if found & {a, b}:
            found |= {a, b}
    return found


def _input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    try:
        module: nn.Module | None = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return module


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _same_but_for_place(a: nn.Embedding, b: nn.Embedding) -> bool:
    scales = [getattr(module, "embed_scale", 1.0) for module in (a, b)]
    same = all(isinstance(scale, torch.Tensor) and scale.is_meta for scale in scales) or scales[0] == scales[1]
    return type(a) is type(b) and bool(same) and a.padding_idx == b.padding_idx
