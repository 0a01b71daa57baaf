"""Token ids that configs and modules of a model hold, which follow their tokens when a vocabulary changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

ID_ENDINGS = ("_token_id", "_token_index")
"""Of names of settings that hold the id of a token, or several."""

ID_SETTINGS = ("bad_words_ids", "force_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias")
"""Settings of `generate` that hold token ids, besides those that `ID_ENDINGS` tell."""


def follow_tokens(model: PreTrainedModel, places: Mapping[int, int | None]) -> None:
    """Give token ids in configs and modules the places of their tokens; None is the place of a dropped one."""
    for config in _configs(model):
        _renumber(config, places)
    for module, name, token in _ids_of_modules(model):
        setattr(module, name, places.get(token, token))


def refuse_dropped(model: PreTrainedModel, places: Mapping[int, int | None]) -> None:
    """Raise ValueError if a token would be dropped whose id a config or a module cannot do without."""
    for config in _configs(model):
        try:
            _renumber(copy.deepcopy(config), places)
        except StrictDataclassError as error:
            raise ValueError(
                f"a token cannot be dropped that {type(config).__name__} must have: keep it, too. It says: {error}"
            ) from error
    for module, name, token in _ids_of_modules(model):
        if places.get(token, token) is None:
            raise ValueError(f"cannot drop token {token}, the {name} of {type(module).__name__}: keep it, too")


def _configs(model: PreTrainedModel) -> list[Any]:
    configs = (model.config, model.config.get_text_config(), getattr(model, "generation_config", None))
    return [*{id(config): config for config in configs if config is not None}.values()]


def _ids_of_modules(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str, int]]:
    """Module, name and value of token ids that modules hold, as ESM holds that of its mask."""
    for module in model.modules():
        for name, value in [*vars(module).items()]:
            if name.endswith(ID_ENDINGS) and isinstance(value, int):
                yield module, name, value


def _renumber(config: Any, places: Mapping[int, int | None]) -> None:
    """Give token ids in a config the places of their tokens, None for dropped ones; ids that never were stay."""
    for name, value in [*vars(config).items()]:
        if value is None or not (name.endswith(ID_ENDINGS) or name in ID_SETTINGS):
            continue
        if isinstance(value, int):
            setattr(config, name, places.get(value, value))
        elif name == "sequence_bias":
            pairs = [(ids, bias) for ids, bias in (value.items() if isinstance(value, dict) else value)]
            moved = [(_places(ids, places), bias) for ids, bias in pairs]
            setattr(config, name, [[list(ids), bias] for ids, bias in moved if ids] or None)
        elif isinstance(value, (list, tuple)):
            found = _places(value, places)
            setattr(config, name, found if found or name.endswith(ID_ENDINGS) else None)


def _places(ids: Any, places: Mapping[int, int | None]) -> list[Any]:
    """Ids, or words of ids, by their places; dropped ids and words with dropped ids are left out."""
    if any(isinstance(one, (list, tuple)) for one in ids):
        words = [_places(one, places) if isinstance(one, (list, tuple)) else one for one in ids]
        return [word for word, one in zip(words, ids, strict=True) if len(word) == len(one)]
    return [place for one in ids if (place := places.get(one, one)) is not None]
