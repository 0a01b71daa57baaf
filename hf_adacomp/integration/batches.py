"""Texts without labels as the batches that a model takes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .compressed_tables import num_tokens
from .parts import input_embeddings, transformers_models
from .sentence import default_prompt, is_sentence_model, tokenizer_of

BATCH_SIZE, BATCH_SIZE_OF_LOGITS, MAX_LENGTH = 16, 4, 256
"""Texts in a batch, those of a model that makes logits of a whole vocabulary at each token, and tokens of a text."""

Text = str | Sequence[str]
"""One text, or a pair."""


class TextBatches:
    """Batches of texts, those of about one length together.

    Args:
        texts: Texts, or pairs of texts.
        tokenizer: Of the model.
        batch_size: Texts in a batch.
        max_length: Longer texts are cut to so many tokens.
        num_tokens: V; where the tokenizer has its padding beyond that, or none, token 0 stands for it.
        prompt: What every single text begins with; pairs have none.
    """

    def __init__(
        self,
        texts: Sequence[Text],
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_length: int,
        num_tokens: int,
        prompt: str = "",
    ) -> None:
        # A pair that JSON or a data set holds is a list, which a tokenizer takes for a batch.
        self.texts = sorted(
            ((prompt + text) if isinstance(text, str) else tuple(text) for text in texts), key=lambda t: len("".join(t))
        )
        self.tokenizer, self.batch_size, self.num_tokens = tokenizer, batch_size, num_tokens
        self.max_length = min(max_length, tokenizer.model_max_length)
        padding = tokenizer.pad_token_id
        self.padding = {"input_ids": padding if padding is not None and padding < num_tokens else 0}

    def __len__(self) -> int:
        return math.ceil(len(self.texts) / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.texts), self.batch_size):
            batch = self.texts[start : start + self.batch_size]
            yield self._padded(self.tokenizer(batch, truncation=True, max_length=self.max_length))

    def _padded(self, encoded: Mapping[str, list[list[int]]]) -> dict[str, Tensor]:
        # By hand: a tokenizer of a language model often has no padding token, and none is needed where it is masked.
        check_ids("the texts hold", encoded["input_ids"], self.num_tokens)
        rows = {
            name: [torch.tensor(row, dtype=torch.int64, device="cpu") for row in values]
            for name, values in encoded.items()
        }
        rows.setdefault("attention_mask", [torch.ones_like(row) for row in rows["input_ids"]])
        return {
            name: pad_sequence(values, batch_first=True, padding_value=self.padding.get(name, 0))
            for name, values in rows.items()
        }


def batches_of(
    model: Any,
    texts_or_batches: Iterable[Text] | Iterable[Mapping[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase | None,
    batch_size: int | None,
    max_length: int,
) -> tuple[Iterable[Mapping[str, Any]], PreTrainedTokenizerBase | None]:
    """Batches of texts and their tokenizer, or the batches that are given and None.

    Raises:
        ValueError: If there is nothing, texts without a tokenizer, or something else than texts and batches.
    """
    if isinstance(texts_or_batches, (str, Mapping)):
        kind = "string" if isinstance(texts_or_batches, str) else "mapping"
        raise ValueError(f"one {kind} is given: calibrate takes a list of texts, or a list or loader of batches")
    if tokenizer is None and is_sentence_model(model):
        tokenizer = tokenizer_of(model)
    if hasattr(texts_or_batches, "columns") or not hasattr(texts_or_batches, "__iter__"):
        raise ValueError(
            "calibrate takes a list of texts, such as one column of a table, or a list or loader of batches; got a "
            f"{type(texts_or_batches).__name__}"
        )
    given: Iterable[Any] = texts_or_batches
    try:
        len(given)  # type: ignore[arg-type]  # that is the question: a loader knows its length, a generator does not
    except TypeError:
        given = list(given)
    first = next(iter(given), None)
    if first is None:
        raise ValueError("no texts and no batches are given: there is nothing to calibrate on")
    if isinstance(first, Mapping):
        columns = [name for name, value in first.items() if isinstance(value, str)]
        if columns and not any(isinstance(value, Tensor) for value in first.values()):
            raise ValueError(
                f"rows of a data set are given, with texts in {columns}: calibrate takes batches of named tensors, or "
                f"the texts of one column, such as dataset[{columns[0]!r}]"
            )
        return given, None
    if not _is_text(first):
        raise ValueError(f"calibrate takes texts, pairs of texts or batches of named tensors; got {first!r}")
    if tokenizer is None:
        raise ValueError(f"texts for a {type(model).__name__} need its tokenizer: calibrate(model, texts, tokenizer)")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            "the tokenizer must be one of transformers, such as AutoTokenizer.from_pretrained(...); got a "
            f"{type(tokenizer).__name__}"
        )
    texts = [*given]
    if bad := [text for text in texts if not _is_text(text)]:
        raise ValueError(f"{len(bad)} of {len(texts)} entries are not texts, the first {bad[0]!r}: drop them")
    if not any("".join(text).strip() for text in texts):
        raise ValueError(f"all {len(texts)} texts are empty: there is nothing to calibrate on")
    return text_batches(model, texts, tokenizer, batch_size, max_length), tokenizer


def check_ids(who: str, rows: Iterable[Sequence[int]], num_tokens: int) -> None:
    """Raise ValueError, which says `who` holds it, for a token id beyond a table of `num_tokens` rows."""
    largest = max((max(row, default=0) for row in rows), default=0)
    if largest >= num_tokens:
        raise ValueError(
            f"{who} token id {largest}, but the table has {num_tokens} rows: the tokenizer is of another model"
        )


def text_batches(
    model: Any,
    texts: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int | None = None,
    max_length: int = MAX_LENGTH,
) -> TextBatches:
    """Batches of texts as a model takes them: a sentence model puts its default prompt first."""
    inner = transformers_models(model)[0]
    if input_embeddings(inner) is None:
        raise ValueError(
            f"{type(inner).__name__} reads more than texts: calibrate it on batches, or the part that reads texts, "
            "calibrate(model.text_model, texts, tokenizer) or the like, and then pack(model)"
        )
    if inner.main_input_name != "input_ids" and "input_ids" not in inspect.signature(inner.forward).parameters:
        raise ValueError(
            f"{type(inner).__name__} reads {inner.main_input_name}, no texts: calibrate it on batches as its training "
            "has them; on the command line, give texts to --counts-from"
        )
    if batch_size is None:
        batch_size = BATCH_SIZE if inner.get_output_embeddings() is None else BATCH_SIZE_OF_LOGITS
    longest = getattr(model, "max_seq_length", None) if is_sentence_model(model) else None
    max_length = min(max_length, longest or max_length, _positions(inner) or max_length)
    return TextBatches(texts, tokenizer, batch_size, max_length, num_tokens(inner), default_prompt(model))


def _positions(model: PreTrainedModel) -> int | None:
    """How many positions a model has, if it has a limit, less those that RoBERTa and its kin leave out."""
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None or positions < 1:
        return None
    tables = [one for one in model.modules() if type(one) is nn.Embedding and one.num_embeddings == positions]
    left_out = [table.padding_idx + 1 for table in tables if table.padding_idx is not None]
    return positions - max([0, *left_out])


def _is_text(value: Any) -> bool:
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    return isinstance(value, str) or (pair and all(isinstance(part, str) for part in value))
