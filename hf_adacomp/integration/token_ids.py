"""Token ids that configs and modules of a model hold, which follow their tokens when a vocabulary changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

ID_SETTINGS = ("bad_words_ids", "force_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias")
"""Settings of `generate` that hold token ids, besides those whose names end with `_token_id`."""


def follow_tokens(model: PreTrainedModel, places: Mapping[int, int | None]) -> None:
    """Give token ids in configs and modules the places of their tokens; None is the place of a dropped one."""
    configs = (model.config, model.config.get_text_config(), getattr(model, "generation_config", None))
    for config in {id(config): config for config in configs if config is not None}.values():
        _renumber(config, places)
    for module in model.modules():  # ESM holds the id of its mask
        for name, value in [*vars(module).items()]:
            if name.endswith("_token_id") and isinstance(value, int) and places.get(value) is not None:
                setattr(module, name, places[value])


def _renumber(config: Any, places: Mapping[int, int | None]) -> None:
    """Give token ids in a config the places of their tokens, None for dropped ones; ids that never were stay."""
    for name, value in [*vars(config).items()]:
        if value is None or not (name.endswith("_token_id") or name in ID_SETTINGS):
            continue
        if isinstance(value, int):
            setattr(config, name, places.get(value, value))
        elif name == "sequence_bias":
            pairs = [(ids, bias) for ids, bias in (value.items() if isinstance(value, dict) else value)]
            moved = [(_places(ids, places), bias) for ids, bias in pairs]
            setattr(config, name, [[list(ids), bias] for ids, bias in moved if ids] or None)
        elif isinstance(value, (list, tuple)):
            found = _places(value, places)
            setattr(config, name, found if found or name.endswith("_token_id") else None)


def _places(ids: Any, places: Mapping[int, int | None]) -> list[Any]:
    """Ids, or words of ids, by their places; dropped ids and words with dropped ids are left out."""
    if any(isinstance(one, (list, tuple)) for one in ids):
        words = [_places(one, places) if isinstance(one, (list, tuple)) else one for one in ids]
        return [word for word, one in zip(words, ids, strict=True) if len(word) == len(one)]
    return [place for one in ids if (place := places.get(one, one)) is not None]
