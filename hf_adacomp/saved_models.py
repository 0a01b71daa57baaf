"""Models in folders and on the Hub, loaded by what lies there: for the command line, which is given a name alone."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from . import transformers_compat
from .integration.methods import SENTENCE_FILE
from .integration.sentence import is_sentence_model, tokenizer_of

TOKENIZER_FILE = "tokenizer_config.json"

MODULES_FILE = "modules.json"
"""Of sentence-transformers."""


def load_model(name: str) -> Any:
    """The model with the head, or the modules of sentence-transformers, that it was saved with."""
    if transformers_compat.file_of(name, MODULES_FILE) is not None:
        try:
            library = import_module("sentence_transformers")
        except ModuleNotFoundError as error:
            raise ValueError(f"{name} is a sentence-transformers model: pip install sentence-transformers") from error
        settings = transformers_compat.file_of(name, SENTENCE_FILE)
        kind = None if settings is None else json.loads(Path(settings).read_text(encoding="utf-8")).get("model_type")
        return getattr(library, kind or "SentenceTransformer")(name, device="cpu")
    config = AutoConfig.from_pretrained(name)
    architecture = (config.architectures or [None])[0]
    model_class = getattr(transformers, str(architecture), None)
    if model_class is None:
        raise ValueError(
            f"{name}: its config names the architecture {architecture!r}, which this transformers does not have"
        )
    model: PreTrainedModel = model_class.from_pretrained(name)
    return model


def load_tokenizer(name: str, model: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that was loaded by `name`; ValueError if there is none."""
    if is_sentence_model(model):
        return tokenizer_of(model)
    if not transformers_compat.file_of(name, TOKENIZER_FILE):
        raise ValueError(f"{name} has no tokenizer ({TOKENIZER_FILE}): save it there with save_pretrained")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    return tokenizer


def save_model(model: Any, name: str, out: Path) -> None:
    """Save a model that was loaded by `name`, with the tokenizer that lies there."""
    model.save_pretrained(str(out))
    if not is_sentence_model(model) and transformers_compat.file_of(name, TOKENIZER_FILE):
        load_tokenizer(name, model).save_pretrained(out)
