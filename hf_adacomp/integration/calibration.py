"""Calibration: what training would show of a table, from texts without labels."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import AUTO
from ..fitting.ladder import with_ladder_for
from ..nn.embedding import AdaptiveCompressedEmbedding
from .answers import reaction
from .batches import MAX_LENGTH, Text, batches_of
from .compressed_tables import num_tokens, require_compressed
from .parts import named_modules, transformers_models

Model = TypeVar("Model", bound=Any)

IDS = "input_ids"


def calibrate(
    model: Model,
    texts_or_batches: Iterable[Text] | Iterable[Mapping[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    batch_size: int | None = None,
    max_length: int = MAX_LENGTH,
    measured_batches: int = 64,
    show_progress: bool = True,
) -> Model:
    """Fit the codes of a compressed model to texts without labels, in place; then `pack` it, or train it.

    Counts how often each token occurs, and measures how the model's answers react to errors in each direction of a
    token's vector: its sentence embeddings, its logits, or else its last hidden states. If batches have labels, their
    loss is what must not change. The code-book and the code lengths are fitted to that. Nothing is trained.

    >>> import torch
    >>> from hf_adacomp import AdaCompConfig, calibrate, compress, pack
    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2))
    >>> model = compress(model, AdaCompConfig(target_ratio=20))
    >>> batches = [{"input_ids": torch.randint(1000, (8, 16))} for _ in range(4)]
    >>> pack(calibrate(model, batches, show_progress=False)).get_input_embeddings().phase
    'packed'

    Args:
        model: What `compress` returned, or `from_pretrained` with `quantization_config=AdaCompConfig(...)`.
        texts_or_batches: Texts or pairs of texts such as the model is for, some thousands; or batches, mappings of
            names to tensors as the model takes them.
        tokenizer: Of the texts. A sentence-transformers model has its own, and its default prompt is put first.
        batch_size: Texts in a batch. By default 16, or 4 if the model makes logits of a vocabulary, which are many.
        max_length: Longer texts are cut to so many tokens.
        measured_batches: Of more batches, each so-manieth runs through the model, so many at most and half as many at
            least; of the others tokens are counted. Of a model with several compressed tables, or that reads one text
            and writes another, all batches run.
        show_progress: Whether to draw progress bars.

    Returns:
        `model`.

    Raises:
        ValueError: For texts that are empty or hold no known token, batches that reach no table, token ids that the
            table does not have, tables that are fitted already, numbers below 1. Nothing is fitted then.
    """
    numbers = {"batch_size": batch_size, "max_length": max_length, "measured_batches": measured_batches}
    for name, value in numbers.items():
        if value is not None and not (hasattr(value, "__index__") and value >= 1):
            raise ValueError(f"{name} must be a positive whole number; got {value!r}")
    tables = require_compressed(model)
    for name, table in tables.items():
        if table.phase != "observe":
            raise ValueError(
                f"{name} is fitted already (phase {table.phase!r}), to token_counts or a training: pack(model). To "
                "calibrate, compress the dense model without token_counts"
            )
    seen = _Seen(transformers_models(model)[0], tables)
    batches, tokenizer = batches_of(model, texts_or_batches, tokenizer, batch_size, max_length)
    total = len(batches)  # type: ignore[arg-type]  # what has no length was made a list
    all_run = len(tables) > 1 or seen.inner.config.is_encoder_decoder
    every = 1 if all_run else math.ceil(total / measured_batches)
    states = [table.require_training("calibrate") for table in tables.values()]
    generator = torch.Generator("cpu").manual_seed(states[0].config.seed)
    before = [copy.deepcopy(state.observation.state_dict()) for state in states]
    for state in states:  # whatever a training would do
        state.observation.measuring = state.config.significance
    try:
        with source_in_use(model), torch.enable_grad():
            for i, batch in enumerate(tqdm(batches, total=total, desc="Calibrating", disable=not show_progress)):
                placed = seen.take_note(batch)
                if i % every:
                    seen.count(placed)
                else:
                    _measure(model, placed, generator)
        seen.check(tokenizer)
        for table in tables.values():
            _fit(table, show_progress)
    except BaseException:
        for table, known in zip(tables.values(), before, strict=True):
            state = table.require_training("calibrate")
            state.observation.discard()
            state.observation.measuring = state.config.measured
            if state.observing:  # others were fitted before this one was interrupted
                state.observation.load_state_dict(known)
                state.warm_started.zero_()
        raise
    return model


@contextmanager
def source_in_use(model: Any) -> Iterator[None]:
    """A model as in evaluation and frozen, save its tables, which use their source and observe the gradients at it."""
    modules = [*named_modules(model).values()]
    modes = {module: module.training for module in modules}
    learning = [p for module in modules for p in module.parameters(recurse=False) if p.requires_grad]
    try:
        for module in modules:
            module.training = isinstance(module, AdaptiveCompressedEmbedding)
        for parameter in learning:  # gradients are wanted at the vectors only
            parameter.requires_grad_(False)
        with torch.inference_mode(False):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter in learning:
            parameter.requires_grad_(True)


def _measure(model: Any, batch: Mapping[str, Any], generator: torch.Generator) -> None:
    """One way forth and back; the tables observe it."""
    inner = transformers_models(model)[0]
    if inner.config.is_encoder_decoder and not {"labels", "decoder_input_ids", "decoder_inputs_embeds"} & {*batch}:
        raise ValueError(
            f"{type(inner).__name__} reads one text and writes another: give batches with labels, as its training has "
            "them, in place of texts"
        )
    # In evaluation, models may change in place what gradients need: SPLADE's pooling does.
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        loss = reaction(model, batch, generator)
        if loss.requires_grad:
            loss.backward()


def _fit(table: AdaptiveCompressedEmbedding, show_progress: bool) -> None:
    """Fit a table to what was observed, with the user's settings."""
    state = table.require_training("calibrate")
    state.recount(alone=True)  # processes may calibrate each by itself, or only one of them
    if table.settings.code_lengths == AUTO and state.observation.counting:  # now there are counts to choose by
        table.offer(with_ladder_for(state.source, table.settings, state.token_counts))
    table.end_observation(show_progress)


class _Seen:
    """Which tokens batches hold, and whether they can be right.

    Args:
        inner: The transformers model that batches run through.
        tables: The compressed tables.
    """

    def __init__(self, inner: PreTrainedModel, tables: Mapping[str, AdaptiveCompressedEmbedding]) -> None:
        self.inner, self.tables, self.device = inner, tables, inner.device
        self.tokens = torch.zeros(num_tokens(inner), dtype=torch.bool, device=inner.device)
        for table in tables.values():
            table.reached = False

    def take_note(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch on the model's device; ValueError for ids that the table does not have."""
        if not isinstance(batch, Mapping):
            raise ValueError(f"all batches must be named tensors, as the first one is; got a {type(batch).__name__}")
        if (ids := batch.get(IDS)) is not None:
            whole = isinstance(ids, Tensor) and not (ids.is_floating_point() or ids.dtype == torch.bool)
            if not whole or ids.dim() < 2 or not ids.numel():
                given = f"{ids.dtype} of {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
                raise ValueError(
                    f"{IDS!r} of a batch must be a tensor of token ids (B, T); got {given}. A DataLoader makes batches "
                    "of rows of a data set, DataLoader(rows, batch_size, collate_fn=DataCollatorWithPadding(tokenizer))"
                )
            if not 0 <= int(ids.min()) <= int(ids.max()) < len(self.tokens):
                raise ValueError(
                    f"token ids run from {int(ids.min())} to {int(ids.max())}, but the table has {len(self.tokens)} "
                    "rows: the tokenizer is of another model"
                )
            self.tokens[self._unmasked(batch)] = True
        return {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def count(self, batch: Mapping[str, Any]) -> None:
        """Count the tokens of a batch that does not run through the model."""
        if IDS in batch:
            for table in self.tables.values():
                table.require_training("calibrate").observation.count(self._unmasked(batch))

    def check(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """ValueError for batches that reach no table, answers that are no numbers, texts of special tokens alone."""
        for name, table in self.tables.items():
            if table.require_training("calibrate").observation.broken:
                raise ValueError(
                    f"the gradients at {name} are NaN or Inf, as the model's outputs for these batches are"
                )
            if not table.reached:
                raise ValueError(
                    f"the batches never reach {name}: no forward pass has looked up a token in it. Give batches with "
                    f"token ids ({IDS!r}), and no inputs_embeds; where texts take one of several routes, calibrate "
                    "the transformers model of each route by itself"
                )
        if tokenizer is not None:
            found = set(self.tokens.nonzero().squeeze(1).tolist())
            if not found - {*tokenizer.all_special_ids}:
                named = tokenizer.convert_ids_to_tokens(sorted(found))
                raise ValueError(
                    f"the texts hold no known token, only {', '.join(named)}: they are not in a language or writing "
                    "that the tokenizer knows, or it is of another model"
                )

    def _unmasked(self, batch: Mapping[str, Any]) -> Tensor:
        ids: Tensor = batch[IDS].flatten()
        mask = batch.get("attention_mask")
        return ids if mask is None or mask.numel() != ids.numel() else ids[mask.flatten().bool()]
