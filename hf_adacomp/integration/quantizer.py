"""Loading and saving through transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from .. import transformers_compat
from ..config import FORMAT_VERSION, PLAIN_VERSION, QUANT_METHOD, AdaCompConfig
from ..nn.loading import EMPTY, UNITS
from ..nn.reading import WeightFromCodes
from ..nn.static import StaticModel
from .checkpoint import check_stored, check_tables, is_undivided, stored_tensors
from .compressed_tables import compressed_embeddings, compressed_heads, keep_from_broadcasts, untied_heads
from .dense_tables import matching_table
from .integrity import (
    check_values,
    compare_checksums,
    refuse_changed,
    refuse_missing,
    refuse_quantized_in_memory,
    refuse_replaced,
    refuse_training,
    refuse_unfinished,
)
from .layout import check_layout, empty_table, empty_tensors, guards, table_layout
from .methods import GIVEN_STATE, give_methods, take_methods
from .parts import config_ties, model_parts, say_tied
from .surgery import install, plan, put, take_out


class AdaCompHfQuantizer(HfQuantizer):
    """Rebuilds the layout of a saved model before its weights are loaded, or compresses a dense one after.

    Compressed models carry an instance as `model.hf_quantizer`, which lets `Trainer` train and `save_pretrained` save
    them.
    """

    quantization_config: AdaCompConfig

    def __init__(self, quantization_config: AdaCompConfig, **kwargs: Any) -> None:
        # A copy, in which the layouts of this model's tables are noted; its settings are checked again.
        super().__init__(AdaCompConfig(**quantization_config.to_dict()), **kwargs)
        if not self.pre_quantized:
            self.quantization_config.format_version = FORMAT_VERSION
        self._undivided = False  # whether the file being loaded is of the format before
        self._checksums: dict[nn.Module, dict[str, int]] = {}  # of tables whose weights are being loaded

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        if not self.quantization_config.tables:
            raise ValueError(
                "the quantization_config of the model has no `tables`, so that the shapes of its compressed table are "
                "unknown. If a part of a larger model was compressed, call hf_adacomp.pack(whole) before the whole is "
                "saved. If a plain model was made of a compressed model's config, take quantization_config out of "
                "config.json; next time, del config.quantization_config before the model is made"
            )
        files = kwargs.get("checkpoint_files")
        stored = None if files is None else stored_tensors(files)
        if stored is not None:
            check_tables(self.quantization_config.tables, stored)
        empty = [name for name, found in (stored or {}).items() if found.shape == EMPTY.shape]
        packed = [name for name, layout in self.quantization_config.tables.items() if layout.get("tokens_per_length")]
        self._undivided = is_undivided(packed, empty, self.quantization_config.format_version)
        for stored_name, layout in self.quantization_config.tables.items():
            check_layout(stored_name, layout, self.quantization_config)
            if layout["tokens_per_length"] is None and self.quantization_config.format_version == PLAIN_VERSION:
                raise ValueError(
                    f"{stored_name} is in training, begun by an hf_adacomp that wrote format_version={PLAIN_VERSION}: "
                    "end the training with that, or compress the dense model again"
                )
            table = matching_table(model, stored_name)
            shape = (layout["num_embeddings"], layout["embedding_dim"])
            if tuple(table.owner.weight.shape) != shape:
                raise ValueError(
                    f"{table.name}: the config describes a model with a table of {table.owner.num_embeddings} x "
                    f"{table.owner.embedding_dim}, its quantization_config a compressed one of {shape[0]} x {shape[1]}"
                )
            head = model.get_output_embeddings()
            if layout["tied_head"] and not table.heads and isinstance(head, nn.Linear) and head.weight.shape == shape:
                raise ValueError(
                    f"{table.name}: the output head was saved tied to the compressed table, but {type(model).__name__} "
                    "does not tie it: set tie_word_embeddings to true in the model's config"
                )
            new = empty_table(layout, self.quantization_config, table.owner.weight.dtype)
            new.loading = True
            if stored is not None:  # transformers would make room for whatever the config claims
                check_stored(stored_name, new.state_dict(), stored)
            new.stand_in_for(table.owner, new.scale)
            put(model, table, new, self.quantization_config.head)
            self._checksums[new] = layout["tensor_checksums"]
        _set_loading(model, True)
        # Those of the file, too: it may be that of a model with a head, or without.
        units = [f"{name}.{UNITS}" for name in compressed_embeddings(model)]
        transformers_compat.expect_in_files(model, [*guards(model), *units, *empty])

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.pre_quantized:
            self._check_loaded(model)
        else:
            settings = self.quantization_config
            install(model, plan(model, settings), settings.head)
        give_methods(model)
        keep_from_broadcasts(model)
        return model

    def _check_loaded(self, model: PreTrainedModel) -> None:
        _set_loading(model, False)
        for name, embedding in compressed_embeddings(model).items():
            refuse_missing(name, embedding)
            check_values(name, embedding)
            compare_checksums(name, embedding, self._checksums.pop(embedding))
            if embedding.packed is not None:
                embedding.packed.index()  # transformers fills what a file does not hold with uninitialised memory
                if self._undivided:
                    embedding.codebook.divide_by_rate()
            embedding.train(embedding.training)
        if self.quantization_config.format_version != FORMAT_VERSION:
            self.quantization_config.format_version = FORMAT_VERSION
            self.note_tables(model)
        if isinstance(model, StaticModel):  # whose gains stand beside the table
            refuse_missing(model.base_model_prefix, model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Called by `save_pretrained` before it writes: refuse half-trained tables, note layouts."""
        embeddings = compressed_embeddings(model)
        heads = compressed_heads(model)
        refuse_replaced(model, embeddings, heads)
        refuse_quantized_in_memory(model)
        for name, head in heads.items():
            if not config_ties(model, head):
                raise ValueError(
                    f"config.tie_word_embeddings is False, but the output head {name!r} is tied to the compressed "
                    "table: set it to True, or compress with AdaCompConfig(head='dense')"
                )
        for linear in untied_heads(model).values():  # which the layout unties; PEFT says that the config does
            say_tied(model, linear, True)
        given = GIVEN_STATE.get()
        state: Mapping[str, Tensor] = model.state_dict() if given is None else given
        for name, embedding in embeddings.items():
            refuse_unfinished(name, embedding)
            check_values(name, embedding)
            refuse_changed(name, embedding, state)
        self.note_tables(model)
        units = empty_tensors(name for name in state if name.endswith(f".{UNITS}"))
        return {**state, **units, **guards(model)}, {}

    def note_tables(self, model: PreTrainedModel) -> None:
        """Note the layouts of the tables as they are now in the config that is saved."""
        model.config.quantization_config = self.quantization_config  # models may share a config, and take turns
        tied = [head.embedding for head in compressed_heads(model).values()]
        self.quantization_config.tables = {
            name: table_layout(embedding, tied_head=any(embedding is owner for owner in tied))
            for name, embedding in compressed_embeddings(model).items()
        }

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Called by `model.dequantize()`: dense modules in all places of tables, in a model of this dtype."""
        refuse_training(compressed_embeddings(model))
        detach(model)
        return model if dtype is None else model.to(dtype)  # type: ignore[arg-type]  # wrapped by transformers

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _set_loading(model: PreTrainedModel, loading: bool) -> None:
    for module in model.modules():
        if isinstance(module, WeightFromCodes):
            module.loading = loading


def detach(model: PreTrainedModel) -> None:
    """Put dense modules back and undo `attach`, also of parts: the model saves as a plain one."""
    take_out(model)
    for _, part in model_parts(model):
        quantizer = transformers_compat.quantizer_of(part)
        if isinstance(quantizer, AdaCompHfQuantizer):
            quantizer.remove_quantization_config(part)  # type: ignore[no-untyped-call]  # transformers'
            take_methods(part)


def register() -> None:
    """Make `quant_method: "adacomp"` known to transformers; once."""
    transformers_compat.register_quant_method(QUANT_METHOD, AdaCompConfig, AdaCompHfQuantizer)
