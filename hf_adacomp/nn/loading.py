"""What a compressed table, and what borrows it, makes of a state dict that is about to be loaded."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from ..codes.packed import PackedCodes
from ..config import AUTO

logger = logging.getLogger(__name__)

GUARD, EMPTY = "weight", torch.zeros(0, device="cpu")
"""Name of the dense weight. State dicts hold an empty tensor under it: a dense model refuses it, also unstrictly."""

UNITS = "codebook.divided"
"""Name of an empty tensor beside a packed table: what its code-book learns is divided by the rate, as it was not before
`format_version` 4. Where the guard is missing, too, somebody has left out what is empty."""


def put_guard(module: Any, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Put the guard into a state dict, but for what transformers loads by: it wants a place for each tensor."""
    if not module.loading:
        state_dict[prefix + GUARD] = EMPTY.clone()


def tell_units(table: Any, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Say in a state dict which units its code-book is in; tables of before, unpickled, keep theirs."""
    if table.packed is not None and not table.loading and table.codebook.rate == table.codebook.packed_rate:
        state_dict[prefix + UNITS] = EMPTY.clone()


def pass_over_guard(_: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Leave out the guard of a place that has no weight of its own."""
    state_dict.pop(prefix + GUARD, None)


def check_form(table: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Make room for the codes of a packed table; refuse a dense one, and one in training where it is packed.

    A table in training refuses a packed one unless it was made anew: its source would be lost.
    """
    name, errors = prefix.rstrip("."), rest[-1]
    divided = state_dict.pop(prefix + UNITS, None) is not None or prefix + GUARD not in state_dict
    if state_dict.pop(f"{prefix}{GUARD}", EMPTY).numel():
        errors.append(
            f"{name}: the checkpoint holds a dense table, which the compressed one would leave out: load it into the "
            "dense model, then compress that"
        )
    stored = {form for form in ("packed", "training_state") for key in state_dict if key.startswith(f"{prefix}{form}.")}
    learning = table.training_state is not None
    fixed = {f"{prefix}{key}" for key, buffer in table.named_buffers() if not buffer.is_floating_point()}
    cast = sorted(key for key in fixed & {*state_dict} if state_dict[key].is_floating_point())
    if stored and ("packed" in stored) == learning and not (learning and table.anew):
        forms = ("packed", "training") if learning else ("training", "packed")
        errors.append(
            f"{name}: the checkpoint holds the {forms[0]} form of the compressed table, the model is in its {forms[1]} "
            "form: load the checkpoint with from_pretrained instead. In a module of your own, put a new "
            "AdaptiveCompressedEmbedding(num_embeddings, embedding_dim, config) in its place first"
        )
    elif cast:
        errors.append(f"{cast[0]} is {state_dict[cast[0]].dtype}: codes are integers and cannot be averaged or cast")
    elif "packed" in stored:
        _make_room(table, state_dict, prefix, errors)
        learned = f"{prefix}codebook.{table.codebook.learned}"
        if not divided and not table.loading and learned in state_dict:
            state_dict[learned] = state_dict[learned] / table.codebook.rate
    elif learning and stored:
        _check_ladder(table, state_dict, prefix, errors)


def seal_again(table: Any, _: Any) -> None:
    """After a state dict was loaded."""
    if table.packed is not None and table.device.type != "meta":
        table.seal()


def _make_room(table: Any, state_dict: dict[str, Any], prefix: str, errors: list[str]) -> None:
    indices, codes = (state_dict.get(f"{prefix}packed.{name}", EMPTY) for name in ("length_indices", "codes"))
    try:
        packed = PackedCodes.room_for(indices, codes, table.num_embeddings, table.config.ladder)
    except ValueError as error:
        errors.append(
            f"{prefix.rstrip('.')}: {error}: make the table with the settings of the one that was saved, whose "
            "`embedding.config` has its code lengths: AdaCompConfig(**config.to_dict())"
        )
        return
    packed = packed.to(table.device)
    if table.packed is None:
        table.become_packed(packed)
    elif packed.tokens_per_length != table.packed.tokens_per_length:
        table.packed = packed


def _check_ladder(table: Any, state_dict: dict[str, Any], prefix: str, errors: list[str]) -> None:
    """Refuse a training with other code lengths, unless they are chosen by counts: then take over those of the file."""
    state, name = table.training_state, prefix.rstrip(".")
    ladder = state_dict.setdefault(f"{prefix}training_state.ladder", state.ladder)  # of before it was stored: the same
    lengths = tuple(ladder.tolist())
    if lengths == table.config.ladder:
        return
    if table.settings.code_lengths == AUTO:  # chosen by counts that this script does not give
        table.offer(table.config.with_ladder(lengths))
        logger.warning(
            "%s takes the code lengths that its training began with, %s, with new parameters: make the optimizer "
            "after this, or compress with AdaCompConfig(code_lengths=%s) first",
            name or "the table",
            *[lengths] * 2,
        )
    else:
        errors.append(
            f"{name}: the training began with code_lengths={lengths}, and is resumed with {table.config.ladder}: "
            f"compress with AdaCompConfig(code_lengths={lengths}), or start anew"
        )
