"""Methods of its own that a compressed model has: resizing, saving with a card, finding its table."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import transformers_compat
from ..nn.reading import WeightFromCodes
from ..nn.sharing import SharedEmbedding
from .compressed_tables import compressed_embeddings
from .parts import input_embeddings, model_parts
from .resizing import resized_embeddings

logger = logging.getLogger(__name__)

TAGS = ("adacomp", "compression")
"""Of compressed models on the Hub."""

SENTENCE_FILE = "config_sentence_transformers.json"
"""Where it lies, a card is that of the model of sentence-transformers which is being saved."""

PLACE_OF_BERT = "embeddings.word_embeddings"

GIVEN_STATE: ContextVar[Mapping[str, Tensor] | None] = ContextVar("given_state", default=None)
"""What the save that is going on, of this thread, stores in place of the model's own state."""

_write_card: Callable[..., object] | None = None


def set_card_writer(write: Callable[..., object]) -> None:
    """What is to be called as `write(model, folder, repo_id=...)` for each folder that a packed model is saved to."""
    global _write_card  # noqa: PLW0603  # set once, by the package: reports stand above this module
    _write_card = write


def arguments_of(model: Any, method: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What a method of the class of `model` is given by a call, by the names of its parameters."""
    return inspect.signature(getattr(type(model), method)).bind(model, *args, **kwargs).arguments


def save_pretrained(model: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """`PreTrainedModel.save_pretrained`; a packed model's folder gets a model card, too."""
    given = arguments_of(model, "save_pretrained", save_directory, *args, **kwargs)
    outer = GIVEN_STATE.set(given.get("state_dict"))  # which stock code passes over
    try:
        type(model).save_pretrained(model, save_directory, *args, **kwargs)
    finally:
        GIVEN_STATE.reset(outer)
    if given.get("is_main_process", True) and not (Path(save_directory) / SENTENCE_FILE).exists():
        describe(model, save_directory)


def refuse_to_save(part: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """`save_pretrained` of a part that reads a compressed table of the whole: its folder would lack that."""
    raise ValueError(
        f"this {type(part).__name__} reads the compressed table of the model that it is part of: save that, and load "
        "the part from its folder, as T5EncoderModel.from_pretrained does"
    )


def set_input_embeddings(model: PreTrainedModel, value: nn.Module) -> None:
    """`PreTrainedModel.set_input_embeddings`, unless `value` is there already, as after a resize.

    Models put it in all places that share the table, where readers of ours stand.
    """
    if not any(value is table for table in compressed_embeddings(model).values()):
        type(model).set_input_embeddings(model, value)


def get_submodule(model: PreTrainedModel, target: str) -> nn.Module:
    """`nn.Module.get_submodule`, which also knows where PEFT looks for token embeddings first.

    What it looks for next is a parameter with as many rows as tokens, which a compressed model does not have.
    """
    try:
        return type(model).get_submodule(model, target)
    except AttributeError:
        if target != PLACE_OF_BERT:
            raise
        embeddings: nn.Module = model.get_input_embeddings()
        return embeddings


def upload_files(
    model: PreTrainedModel, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any
) -> Any:
    """The last step of `push_to_hub`, by when the card of the Hub lies in `working_dir`: our part goes into it."""
    describe(model, working_dir, repo_id=repo_id)
    return transformers_compat.upload_files(model, working_dir, repo_id, *args, **kwargs)


def bind(model: Any, methods: Mapping[str, Callable[..., Any]]) -> None:
    """Put methods before those of the model's class."""
    # A partial object is copied and pickled along with the model that it holds.
    model.__dict__.update({name: partial(function, model) for name, function in methods.items()})


def give_methods(model: PreTrainedModel) -> None:
    """Put our methods before those of the model's class, and of its parts, which are resized, too; tag the model."""
    for _, part in model_parts(model):
        if part is not model and isinstance(input_embeddings(part), WeightFromCodes):
            bind(part, {name: METHODS[name] for name in METHODS_OF_PARTS})
            if isinstance(input_embeddings(part), SharedEmbedding):
                bind(part, {"save_pretrained": refuse_to_save})
    bind(model, METHODS)
    model.add_model_tags([*TAGS])


def take_methods(model: PreTrainedModel) -> None:
    """Undo `give_methods`."""
    for _, part in model_parts(model):
        for name in METHODS:
            part.__dict__.pop(name, None)
    model.model_tags = [tag for tag in model.model_tags or () if tag not in TAGS]


METHODS: dict[str, Callable[..., Any]] = {
    transformers_compat.RESIZED_EMBEDDINGS: resized_embeddings,
    "set_input_embeddings": set_input_embeddings,
    "get_submodule": get_submodule,
    "save_pretrained": save_pretrained,
    "half": nn.Module.half,  # which transformers refuses to quantized models, and `to(torch.float16)` not
    "float": nn.Module.float,
    transformers_compat.UPLOAD_FILES: upload_files,
}

METHODS_OF_PARTS = (transformers_compat.RESIZED_EMBEDDINGS, "set_input_embeddings")


def describe(model: Any, folder: str | os.PathLike[str], **where: str) -> None:
    """Put our part into the card in `folder`, if the model is packed."""
    if _write_card is not None and all(table.phase == "packed" for table in compressed_embeddings(model).values()):
        try:
            _write_card(model, folder, **where)
        except ValueError as error:  # of a card that lies there: the model is saved all the same
            logger.warning("the model is saved, but its card is not written: %s", error)
