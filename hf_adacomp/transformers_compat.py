"""Every private or unstable part of transformers and accelerate that this package touches, under a name.

Each function says why it is needed, and has a test of its own that breaks with an upstream change. The rest of the
package reads no attribute with a leading underscore that is not its own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.hub import cached_file

TIES = ("_tied_weights_keys", "all_tied_weights_keys")
DENSE_TIES = "_dense_ties"
"""Where transformers keeps which parameters are tied, and where we keep what it said before compression."""


# Quantizers


def register_quant_method(name: str, config_class: type, quantizer_class: type) -> None:
    """Make a `quant_method` known, also to a package that is imported anew: the decorators that do it raise then."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(name, None)
    AUTO_QUANTIZER_MAPPING.pop(name, None)
    register_quantization_config(name)(config_class)
    register_quantizer(name)(quantizer_class)


def quantizer_of(model: nn.Module) -> Any:
    """The quantizer that `from_pretrained` left on a model, or None: `Trainer` and `save_pretrained` ask it."""
    return model.__dict__.get("hf_quantizer")


def set_quantizer(model: PreTrainedModel, quantizer: Any) -> None:
    """Leave a quantizer on a model as `from_pretrained` does; no public method does."""
    setattr(model, "hf_quantizer", quantizer)  # noqa: B010  # transformers declares no such attribute


def is_loaded(tensor: Tensor) -> bool:
    """Whether `from_pretrained` found this tensor in a file: what it did not find holds whatever memory held."""
    return bool(getattr(tensor, "_is_hf_initialized", False))


def expect_in_files(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Have `from_pretrained` pass over tensors of a file that the model has no place for, without a report."""
    expected = [rf"(^|\.){re.escape(name)}$" for name in names]
    known = model._keys_to_ignore_on_load_unexpected
    # Older releases add lists to it.
    patterns = known.union(expected) if isinstance(known, set) else [*(known or ()), *expected]
    model._keys_to_ignore_on_load_unexpected = patterns


# Ties


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Which parameter is tied to which, by name, for the model and its parts: transformers computes it once."""
    ties: dict[str, str] = model.all_tied_weights_keys
    return ties


def forget_ties(part: PreTrainedModel, prefix: str, weights: set[str]) -> None:
    """Drop the ties between these weights (names that begin with `prefix`), which are modules of ours from now on.

    `tie_word_embeddings=False` would drop the tie of a trained bias along with them.
    """
    part.__dict__.setdefault(DENSE_TIES, {name: part.__dict__[name] for name in TIES if name in part.__dict__})
    own = part.get_expanded_tied_weights_keys()
    for attribute, ties in zip(TIES, (own, part.all_tied_weights_keys), strict=True):
        kept = {a: b for a, b in ties.items() if not {prefix + a, prefix + b} & weights}
        if len(kept) < len(ties):
            setattr(part, attribute, kept)


def remember_ties(part: PreTrainedModel, untied: bool) -> None:
    """Undo `forget_ties`, if that was called; no parameter is tied any more where `untied`."""
    if DENSE_TIES not in part.__dict__:
        return
    dense_ties = part.__dict__.pop(DENSE_TIES)
    for name in TIES:
        part.__dict__.pop(name, None)
    part.__dict__.update(dense_ties)
    if untied:
        part.all_tied_weights_keys = {}


# The rest of transformers


def embed_scale(embedding: nn.Module) -> Any:
    """The factor of transformers' scaled embeddings, which have no common class; None for others."""
    # The buffer `embed_scale` of Gemma takes the dtype of the model; its `scalar_embed_scale` is exact.
    return getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))


def rounds_scale(embedding: nn.Module) -> bool:
    """Whether a scaled embedding rounds its factor to the dtype of its table, as Gemma's do, which hold a tensor."""
    return isinstance(getattr(embedding, "embed_scale", None), Tensor)


def loaded_from(model: PreTrainedModel) -> str:
    """The folder or Hub name that a model was loaded from; empty if it was not. There is no public record of it."""
    return str(model.config._name_or_path or "")


def upload_files(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """The last step of `push_to_hub`, by when all files lie in a folder: our card has to join them there."""
    return type(model)._upload_modified_files(model, *args, **kwargs)


UPLOAD_FILES = "_upload_modified_files"
"""Name of the method behind `upload_files`."""


def resized_embeddings(model: PreTrainedModel, *args: Any) -> nn.Module:
    """What makes embeddings of another size, which classes use for all of their tables by token."""
    embeddings: nn.Module = type(model)._get_resized_embeddings(model, *args)
    return embeddings


RESIZED_EMBEDDINGS = "_get_resized_embeddings"
"""Name of the method behind `resized_embeddings`."""


def resizes_more(model: PreTrainedModel) -> bool:
    """Whether a model's class resizes further weights along with its table and output head."""
    names = ("resize_token_embeddings", "_resize_token_embeddings")
    return any(getattr(type(model), name) is not getattr(PreTrainedModel, name) for name in names)


def file_of(model: str, file: str) -> str | None:
    """Where a file of a folder or a Hub repository lies; None if it has none. The public way raises many errors."""
    found: str | None = cached_file(model, file, _raise_exceptions_for_missing_entries=False)
    return found


def checkpoint_prefix() -> str:
    """How names of the Trainer's checkpoints begin. It brings PEFT along, which loading a model does not need."""
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR  # noqa: PLC0415

    return str(PREFIX_CHECKPOINT_DIR)


def add_to_log(state: Any, logs: dict[str, Any], values: dict[str, Any]) -> None:
    """Add values to what the Trainer logs: it has appended a copy to the history before it asks callbacks."""
    logs.update(values)
    state.log_history[-1].update(values)


# accelerate


def distributed_kind() -> str:
    """How accelerate shares out a training: `"NO"`, `"MULTI_GPU"`, `"FSDP"`, `"DEEPSPEED"` and the like."""
    from accelerate.state import AcceleratorState  # type: ignore[import-untyped]  # noqa: PLC0415  # ships no types

    return str(AcceleratorState().distributed_type.value)


def accumulates() -> bool:
    """Whether accelerate is accumulating gradients now, while its optimizers take no steps."""
    if "accelerate.state" not in sys.modules:
        return False
    from accelerate.state import GradientState  # noqa: PLC0415  # loading a model does not need it

    return not GradientState().sync_gradients
