"""The model card of a compressed model: made from a template, or put into a card that is there already."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented there
from transformers import PreTrainedModel
from yaml import YAMLError  # type: ignore[import-untyped]  # ships no types

from .. import transformers_compat
from ..integration.compressed_tables import compressed_models, require_compressed
from ..integration.methods import TAGS
from ..integration.sentence import is_sentence_model
from ..integration.sizes import size_report
from .plots import can_plot, plot_histogram

logger = logging.getLogger(__name__)

PICTURE = "code_lengths.png"
TEMPLATE = files(__package__) / "model_card.md"
TITLE = re.compile(r"\A\s*(?:<!--.*?-->\s*)*# [^\n]*\n", re.DOTALL)


def model_card(
    model: Any,
    card: ModelCard | None = None,
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    results: Sequence[EvalResult] = (),
    dense_results: Sequence[EvalResult] = (),
    picture: str | None = None,
) -> ModelCard:
    """A card that tells how to load `model`, what its table weighs, and what it lost.

    Args:
        model: A compressed model, of transformers or sentence-transformers.
        card: A card to put this into. Its text and metadata stay, save what an earlier call wrote. Default: a new one.
        repo_id: Where the model will be loaded from.
        base_model: Hub name of the dense model. Default: what the model was compressed from, if that has such a name.
        results: Scores of the compressed model, for the metadata and a table.
        dense_results: Scores of the dense model on the same data, which go into the table beside them.
        picture: File name, beside the card, of `plots.plot_histogram(model)`.

    Returns:
        The new card, or `card`, changed in place.
    """
    size, tables, inner = size_report(model), require_compressed(model), compressed_models(model)[0]
    title = (repo_id or transformers_compat.loaded_from(inner) or type(model).__name__).rstrip("/").split("/")[-1]
    written = ModelCard.from_template(
        ModelCardData(),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=title,
        model_class=type(model).__name__,
        library=_import_from(model),
        load=type(model).__name__ if is_sentence_model(model) else f"{type(model).__name__}.from_pretrained",
        location=repo_id or "path/to/this/folder",
        size=size,
        picture=picture,
        settings="\n".join(f"{table.config!r}  # {name}" for name, table in tables.items()),
        results=_rows(results, dense_results),
        dense_results=dense_results,
    )
    if card is None:
        card = written
    else:
        card.text = _put_block(card.text, written.text, "table")
        if results:
            card.text = _put_block(card.text, written.text, "accuracy")
    library = "sentence-transformers" if is_sentence_model(model) else "transformers"
    _describe(card.data, library, base_model or _base_model(inner), results, title)
    return card


def save_model_card(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    results: Sequence[EvalResult] = (),
    dense_results: Sequence[EvalResult] = (),
) -> ModelCard:
    """Write `README.md` in `folder`, or put our part into the one that is there; and its picture.

    `save_pretrained` and `push_to_hub` of a packed model do this by themselves; call it to add what they do not know.
    `repo_id`, `base_model`, `results` and `dense_results` are those of `model_card`. The picture is left out where
    matplotlib is missing or cannot draw.

    Raises:
        ValueError: For a `README.md` that is no model card.
    """
    file = Path(folder) / "README.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    card = model_card(
        model,
        _load(file) if file.exists() else None,
        repo_id=repo_id,
        base_model=base_model,
        results=results,
        dense_results=dense_results,
        picture=_draw(model, Path(folder)),
    )
    card.save(file)
    return card


def _import_from(model: Any) -> str:
    """The module that the class of a model is imported from: its library, or the user's own."""
    name = type(model).__module__
    library = name.split(".")[0]
    return library if getattr(sys.modules.get(library), type(model).__name__, None) is type(model) else name


def _load(file: Path) -> ModelCard:
    try:
        card: ModelCard = ModelCard.load(file)
    except (OSError, ValueError, YAMLError) as error:
        raise ValueError(f"{file} cannot be read as a model card: mend it or delete it. {error}") from error
    return card


def _draw(model: Any, folder: Path) -> str | None:
    """Name of the picture in `folder`; None where there is none, since a picture must not cost a saved model."""
    if not can_plot():
        return None
    try:
        plot_histogram(model).savefig(folder / PICTURE)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        logger.warning("the model card has no picture, because it could not be drawn: %r", error)
        return None
    return PICTURE


def _put_block(text: str, written: str, name: str) -> str:
    """`text` with our block of that name from `written`: in its own place, or after the title or the other block."""
    block = _block(name).search(written)
    if block is None:
        raise ValueError(f"{TEMPLATE.name} has lost its block {name!r}: reinstall hf_adacomp")
    if found := _block(name).search(text):
        return text[: found.start()] + block[0] + text[found.end() :]
    after = (_block("table").search(text) if name != "table" else None) or TITLE.search(text)
    start = after.end() if after else 0
    return f"{text[:start]}\n{block[0]}\n{text[start:]}"


def _block(name: str) -> re.Pattern[str]:
    return re.compile(rf"<!-- hf_adacomp {name}:.*?<!-- end of hf_adacomp {name} -->\n?", re.DOTALL)


def _rows(results: Sequence[EvalResult], dense_results: Sequence[EvalResult]) -> list[list[str]]:
    rows = []
    for result in results:
        row = [result.dataset_name, result.metric_name or result.metric_type]
        if dense_results:
            same = [str(d.metric_value) for d in dense_results if _is_same(d, result)]
            row.append(same[0] if same else "")
        rows.append([*row, str(result.metric_value)])
    return rows


def _is_same(a: EvalResult, b: EvalResult) -> bool:
    return a.unique_identifier == b.unique_identifier and a.metric_type == b.metric_type


def _describe(data: Any, library: str, base_model: str | None, results: Sequence[EvalResult], title: str) -> None:
    """Add to the metadata what is not there yet; scores replace older ones of the same data and metric."""
    data.library_name = data.library_name or library
    tags = [data.tags] if isinstance(data.tags, str) else list(data.tags or ())
    data.tags = [*tags, *(tag for tag in TAGS if tag not in tags)]
    if base_model is not None and not data.base_model:
        data.base_model, data.base_model_relation = base_model, "quantized"
    if results:
        kept = [old for old in data.eval_results or () if not any(_is_same(old, new) for new in results)]
        data.eval_results = [*kept, *results]
        data.model_name = data.model_name or title


def _base_model(model: PreTrainedModel) -> str | None:
    """Hub name of the dense model that `model` was compressed from; None if it has none or is not known."""
    name, quantizer = transformers_compat.loaded_from(model), transformers_compat.quantizer_of(model)
    if not name or Path(name).exists() or getattr(quantizer, "pre_quantized", True):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
