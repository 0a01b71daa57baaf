"""Models of sentence-transformers: what a `SentenceTransformer` holds, and what it saves.

Its `StaticEmbedding` becomes a `StaticModel` with mean pooling, which gives the same vectors up to the rounding of
their lengths, and is saved and loaded by stock classes.
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..nn.static import StaticConfig, StaticModel
from .compressed_tables import compressed_embeddings
from .methods import arguments_of, bind, describe
from .parts import transformers_models

logger = logging.getLogger(__name__)

MODULES = ("sentence_transformers.sentence_transformer.modules", "sentence_transformers.models")
"""Where releases of sentence-transformers have the classes of modules, the newest first."""

STATIC = "StaticEmbedding"

PAD = "<|pad|>"
"""Fills up the shorter texts of a batch; no vector of it is used."""


def is_sentence_model(model: Any) -> bool:
    """Whether `model` is of a class of sentence-transformers, which this package does not import by itself."""
    return isinstance(model, nn.Sequential) and any(
        base.__module__.startswith("sentence_transformers.") for base in type(model).__mro__
    )


def static_model(model: Any) -> StaticModel | None:
    """The table of a sentence model that begins with a `StaticEmbedding`, shared, as a transformers model."""
    if not is_sentence_model(model) or type(model[0]).__name__ != STATIC:
        return None
    weight = model[0].embedding.weight
    with torch.device("meta"):
        static = StaticModel(StaticConfig(*weight.shape))
    static.embed_tokens.weight = weight
    static.train(model.training)
    return static


def warn_of_static_embeddings(model: Any) -> None:
    """Warn of `StaticEmbedding`s within the modules of a sentence model, such as a `Router`'s: they stay dense."""
    if is_sentence_model(model):
        for name, module in model.named_modules():
            if type(module).__name__ == STATIC and name != "0":
                logger.warning("the StaticEmbedding %r stays dense: compress it in a model of its own", name)


def tokenizer_of(model: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a sentence model; for a `StaticEmbedding`'s bare one, one that adds no special tokens."""
    if not isinstance(model.tokenizer, Tokenizer):
        tokenizer: PreTrainedTokenizerBase = model.tokenizer
        return tokenizer
    copied = Tokenizer.from_str(model.tokenizer.to_str())
    copied.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    copied.no_truncation()
    return PreTrainedTokenizerFast(tokenizer_object=copied, pad_token=PAD)


def default_prompt(model: Any) -> str:
    """What a sentence model puts before every text unless it is told otherwise; empty for other models."""
    name = getattr(model, "default_prompt_name", None)
    prompt: str = (getattr(model, "prompts", None) or {}).get(name, "") if name is not None else ""
    return prompt


def put_static_model(model: Any, static: StaticModel) -> None:
    """Put `static` and mean pooling where the `StaticEmbedding` of `model` stands."""
    modules = _classes()
    with TemporaryDirectory() as folder:  # the class makes no module of what is in memory
        StaticModel(StaticConfig()).save_pretrained(folder)
        tokenizer_of(model).save_pretrained(folder)
        transformer = modules.Transformer(folder)
    _set_model(transformer, static)
    pooling = modules.Pooling(static.config.hidden_size, "mean")
    _set_modules(model, [transformer, pooling, *[*model][1:]])
    model.train(model.training)


def put_static_embedding(model: Any) -> None:
    """Undo `put_static_model`; `StaticModel`s are this package's, and a plain model does without it."""
    if not is_sentence_model(model):
        return
    inner = transformers_models(model)
    if not inner or not isinstance(inner[0], StaticModel):
        return
    with torch.no_grad():
        tokens = torch.arange(inner[0].config.vocab_size, device=inner[0].device)
        weight = inner[0](tokens[None]).last_hidden_state[0]
    static = _classes().StaticEmbedding(model.tokenizer.backend_tokenizer, embedding_weights=weight)
    _set_modules(model, [static.train(model.training), *[*model][2:]])


def save(model: Any, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """`SentenceTransformer.save`; a packed model's own card gets our part."""
    known = [table for one in transformers_models(model) for table in compressed_embeddings(one).values()]
    for name, table in compressed_embeddings(model).items():
        if not any(table is one for one in known):
            raise ValueError(
                f"{name} is a compressed table outside of a transformers model, which sentence-transformers would save "
                "so that it cannot be loaded: put embedding.to_embedding() in its place"
            )
    type(model).save(model, path, *args, **kwargs)
    if arguments_of(model, "save", path, *args, **kwargs).get("create_model_card", True):
        describe(model, path)


def give_save(model: Any) -> None:
    """Put our `save` before that of the class of a sentence model."""
    if is_sentence_model(model):
        bind(model, {"save": save})


def take_save(model: Any) -> None:
    """Undo `give_save`."""
    model.__dict__.pop("save", None)


def _classes() -> Any:
    for name in MODULES[:-1]:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    return import_module(MODULES[-1])


def _set_model(transformer: nn.Module, model: PreTrainedModel) -> None:
    for name, child in [*transformer.named_children()]:
        if isinstance(child, PreTrainedModel):
            setattr(transformer, name, model)


def _set_modules(model: Any, modules: list[nn.Module]) -> None:
    """Exchange the modules of a sequence; options by the place of a module follow it from the end."""
    moved = len(modules) - len(model)
    model.module_kwargs = {str(int(name) + moved): options for name, options in (model.module_kwargs or {}).items()}
    for name, _ in [*model.named_children()]:
        delattr(model, name)
    for i, module in enumerate(modules):
        model.add_module(str(i), module)
