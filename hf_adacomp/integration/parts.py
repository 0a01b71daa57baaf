"""The transformers models in what a user hands over, and the models inside of them."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def named_modules(model: Any) -> dict[str, nn.Module]:
    """The modules of a model by name, each once; also of an object that holds models, such as SetFit's."""
    parts = {"": model} if isinstance(model, nn.Module) else vars(model)
    found = [part.named_modules(prefix=name) for name, part in parts.items() if isinstance(part, nn.Module)]
    return dict(chain.from_iterable(found))


def transformers_models(model: Any) -> list[PreTrainedModel]:
    """A transformers model itself, or those that an object holds, such as a sentence-transformers model; outermost."""
    found = [module for module in named_modules(model).values() if isinstance(module, PreTrainedModel)]
    return [one for one in found if not any(one in [*outer.modules()] for outer in found if outer is not one)]


def model_parts(model: PreTrainedModel) -> list[tuple[str, PreTrainedModel]]:
    """The model itself and the models inside of it, with the prefix of their parameters' names."""
    return [
        (f"{name}." if name else "", module)
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
    ]


def input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """What `get_input_embeddings` returns; None for models that have none, such as those of images."""
    try:
        module: nn.Module | None = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return module


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
