"""Loading and saving through transformers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from .. import compat
from ..config import QUANT_METHOD, AdaCompConfig
from ..nn.embedding import AdaptiveCompressedEmbedding
from ..nn.head import CompressedHead
from .checkpoint import check_stored, check_tables, stored_tensors
from .layout import check_layout, empty_table, guards, table_layout, tensor_checksums
from .methods import give_methods, take_methods
from .surgery import install, put
from .tables import compressed_embeddings, compressed_heads, config_ties, keep_from_broadcasts, matching_table


class AdaCompHfQuantizer(HfQuantizer):
    """Rebuilds the layout of a saved model before its weights are loaded, or compresses a dense one after.

    Compressed models carry an instance as `model.hf_quantizer`, which lets `Trainer` train and `save_pretrained` save
    them.
    """

    quantization_config: AdaCompConfig

    def __init__(self, quantization_config: AdaCompConfig, **kwargs: Any) -> None:
        # A copy: the layouts of this model's tables are noted in it.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self._checksums: dict[nn.Module, dict[str, int]] = {}  # of tables whose weights are being loaded

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        if not self.quantization_config.tables:
            raise ValueError(
                "the quantization_config of the model has no `tables`, so that the shapes of its compressed table are "
                "unknown; save the model again with model.save_pretrained"
            )
        files = kwargs.get("checkpoint_files")
        stored = None if files is None else stored_tensors(files)
        if stored is not None:
            check_tables(self.quantization_config.tables, stored)
        for stored_name, layout in self.quantization_config.tables.items():
            check_layout(stored_name, layout, self.quantization_config)
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
            if stored is not None:  # transformers would make room for whatever the config claims
                check_stored(stored_name, new.state_dict(), stored)
            new.dense_class = type(table.owner)
            put(model, table, new, self.quantization_config.head)
            new.loading = True
            self._checksums[new] = layout["tensor_checksums"]
        compat.expect_in_files(model, guards(model))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            install(model, self.quantization_config)
            give_methods(model)
            keep_from_broadcasts(model)
            return model
        for name, embedding in compressed_embeddings(model).items():
            _refuse_missing(name, embedding)
            _check_values(name, embedding)
            _compare_checksums(name, embedding, self._checksums.pop(embedding))
            embedding.loading = False
            embedding.train(embedding.training)
        give_methods(model)
        keep_from_broadcasts(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Called by `save_pretrained` before it writes: refuse half-trained tables, note layouts, add guards."""
        embeddings = compressed_embeddings(model)
        heads = compressed_heads(model)
        _refuse_replaced(model, embeddings, heads)
        if heads and not config_ties(model):
            raise ValueError(
                f"config.tie_word_embeddings is False, but the output head {next(iter(heads))!r} is tied to the "
                "compressed table: set it to True, or compress with AdaCompConfig(head='dense')"
            )
        for name, embedding in embeddings.items():
            _refuse_unfinished(name, embedding)
            _check_values(name, embedding)
        tied = [head.embedding for head in heads.values()]
        self.quantization_config.tables = {
            name: table_layout(embedding, tied_head=any(embedding is owner for owner in tied))
            for name, embedding in embeddings.items()
        }
        return {**model.state_dict(), **guards(model)}, {}

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


def _refuse_replaced(
    model: PreTrainedModel,
    embeddings: Mapping[str, AdaptiveCompressedEmbedding],
    heads: Mapping[str, CompressedHead],
) -> None:
    """What is saved must be what is read again: tables, and the heads that read them."""
    if not embeddings:
        raise ValueError(
            f"the compressed table of {type(model).__name__} was replaced, by a "
            f"{type(model.get_input_embeddings()).__name__}: to have a plain model, decompress(model) first, then put "
            "other embeddings in"
        )
    for name, head in heads.items():
        if not any(head.embedding is table for table in embeddings.values()):
            raise ValueError(
                f"the output head {name!r} reads another table than the model's, which was replaced or copied: "
                "decompress(model) before tables are exchanged"
            )


def _refuse_missing(name: str, embedding: AdaptiveCompressedEmbedding) -> None:
    # transformers marks what it loaded, and fills what the file lacked with uninitialised memory.
    for key, tensor in _stored(embedding):
        if not compat.is_loaded(tensor):
            raise ValueError(f"the file lacks the tensor {name}.{key} of the compressed table: it is damaged")


def _stored(embedding: AdaptiveCompressedEmbedding) -> list[tuple[str, Tensor]]:
    names = embedding.state_dict().keys()
    tensors = chain(embedding.named_parameters(), embedding.named_buffers())
    return [(name, tensor) for name, tensor in tensors if name in names]


def _check_values(name: str, embedding: AdaptiveCompressedEmbedding) -> None:
    for key, tensor in _stored(embedding):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(
                f"{name}.{key} holds NaN or Inf: the training has diverged, or the file it is from is damaged"
            )
    if embedding.packed is not None:
        embedding.packed.validate(f"{name}.packed")
    if embedding.training_state is not None:
        embedding.training_state.validate(f"{name}.training_state")


def _compare_checksums(name: str, embedding: AdaptiveCompressedEmbedding, saved: dict[str, int]) -> None:
    found = tensor_checksums(embedding)
    if found.keys() != saved.keys():
        raise ValueError(
            f"{name}: tensor_checksums of the table's layout in quantization_config must name {sorted(found)}; it "
            f"names {sorted(saved)}"
        )
    for tensor, checksum in found.items():
        if checksum != saved[tensor]:
            raise ValueError(
                f"{name}.{tensor} has the checksum {checksum}, but {saved[tensor]} when it was saved: the file is "
                "damaged; copy or download it again"
            )


def _refuse_unfinished(name: str, embedding: AdaptiveCompressedEmbedding) -> None:
    if embedding.training_state is not None and not embedding.training_state.driven:
        raise ValueError(
            f"{name} is compressed but its training schedule never ran: pass callbacks=[AdaCompCallback()] to the "
            "Trainer (or call embedding.step(fraction) in your loop), or call hf_adacomp.pack(model) to save it "
            "without training"
        )
    if embedding.training_state is not None and embedding.abandoned:
        raise ValueError(
            f"{name}: training ended before the code lengths were frozen (at select_fraction="
            f"{embedding.config.select_fraction:g} of the steps): resume the training, or call hf_adacomp.pack(model) "
            "to freeze the lengths as they are"
        )


def attach(model: PreTrainedModel, quantizer: AdaCompHfQuantizer) -> None:
    """Make `save_pretrained` and `Trainer` treat `model` as one that `from_pretrained` had compressed."""
    model.config.quantization_config = quantizer.quantization_config
    compat.set_quantizer(model, quantizer)
    give_methods(model)
    keep_from_broadcasts(model)


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`: the model saves as a plain one."""
    compat.quantizer_of(model).remove_quantization_config(model)
    take_methods(model)


def register() -> None:
    """Make `quant_method: "adacomp"` known to transformers; once."""
    compat.register_quant_method(QUANT_METHOD, AdaCompConfig, AdaCompHfQuantizer)
