"""What a compressed table, and what borrows it, makes of a state dict that is about to be loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..codes.packed import PackedCodes

GUARD, EMPTY = "weight", torch.zeros(0)
"""Name of the dense weight. State dicts hold an empty tensor under it, lest others take them for a dense model's."""


def pass_over_guard(_: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Leave out the guard of a place that has no weight of its own."""
    state_dict.pop(prefix + GUARD, None)


def check_form(table: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Refuse a dense table, a packed one for a table in training, and the other way round; one made anew is packed."""
    name, errors = prefix.rstrip("."), rest[-1]
    if state_dict.pop(prefix + GUARD, EMPTY).numel():
        errors.append(
            f"{name}: the checkpoint holds a dense table, which the compressed one would leave out: load it into the "
            "dense model, then compress that"
        )
    is_packed, was_packed = table.training_state is None, f"{prefix}packed.codes" in state_dict
    if is_packed == was_packed or not any(key.startswith(prefix) for key in state_dict):
        return
    if was_packed and table.anew:
        _make_room(table, state_dict, prefix, errors)
        return
    forms = ("packed", "training") if was_packed else ("training", "packed")
    errors.append(
        f"{name}: the checkpoint holds the {forms[0]} form of the compressed table, the model is in its {forms[1]} "
        "form: load the checkpoint with from_pretrained instead. In a module of your own, put a new "
        "AdaptiveCompressedEmbedding(num_embeddings, embedding_dim, config) in its place first"
    )


def _make_room(table: Any, state_dict: dict[str, Any], prefix: str, errors: list[str]) -> None:
    try:
        indices, codes = (state_dict.get(f"{prefix}packed.{name}", EMPTY) for name in ("length_indices", "codes"))
        packed = PackedCodes.room_for(indices, codes, table.num_embeddings, table.config.ladder)
    except ValueError as error:
        errors.append(
            f"{prefix.rstrip('.')}: {error}: make the table with the settings of the one that was saved, whose "
            "`embedding.config` has its code lengths: AdaCompConfig(**config.to_dict())"
        )
    else:
        table.become_packed(packed.to(table.device))
