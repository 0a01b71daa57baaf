"""Loading and saving through transformers."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from .config import QUANT_METHOD, AdaCompConfig
from .embedding import AdaptiveCompressedEmbedding
from .surgery import compressed_embeddings, install, matching_table, replace_module


class AdaCompHfQuantizer(HfQuantizer):
    """Rebuilds the layout of a saved model before its weights are loaded, or compresses a dense one after.

    Compressed models carry an instance as `model.hf_quantizer`, which lets `Trainer` train and `save_pretrained` save
    them.
    """

    quantization_config: AdaCompConfig

    def __init__(self, quantization_config: AdaCompConfig, **kwargs: Any) -> None:
        # A copy: the layouts of this model's tables are noted in it.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        if not self.quantization_config.tables:
            raise ValueError(
                "the quantization_config of the model has no `tables`, so that the shapes of its compressed table are "
                "unknown; save the model again with model.save_pretrained"
            )
        for stored_name, layout in self.quantization_config.tables.items():
            name, table = matching_table(model, stored_name)
            shape = (layout["num_embeddings"], layout["embedding_dim"])
            if (table.num_embeddings, table.embedding_dim) != shape:
                raise ValueError(
                    f"{name}: the config describes a model with a table of {table.num_embeddings} x "
                    f"{table.embedding_dim}, its quantization_config a compressed one of {shape[0]} x {shape[1]}"
                )
            new = AdaptiveCompressedEmbedding.from_layout(layout, self.quantization_config, table.weight.dtype)
            replace_module(model, table, new)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            install(model, self.quantization_config)
            return model
        for name, embedding in compressed_embeddings(model).items():
            _refuse_damaged(name, embedding)
            embedding.restore_constants()
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Called by `save_pretrained` before it writes anything: refuse half-trained tables, note the layouts."""
        embeddings = compressed_embeddings(model)
        for name, embedding in embeddings.items():
            _refuse_unfinished(name, embedding)
        self.quantization_config.tables = {name: embedding.layout() for name, embedding in embeddings.items()}
        return None, {}

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


def _refuse_damaged(name: str, embedding: AdaptiveCompressedEmbedding) -> None:
    # transformers marks what it loaded, and fills what the file lacked with uninitialised memory.
    for key, tensor in chain(embedding.named_parameters(), embedding.named_buffers()):
        if not getattr(tensor, "_is_hf_initialized", False):
            raise ValueError(f"the file lacks the tensor {name}.{key} of the compressed table: it is damaged")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{name}.{key} holds NaN or Inf: the file is damaged")
    if embedding.packed is not None:
        embedding.packed.validate(f"{name}.packed")


def _refuse_unfinished(name: str, embedding: AdaptiveCompressedEmbedding) -> None:
    if embedding.coder is not None and not embedding.coder.driven:
        raise ValueError(
            f"{name} is compressed but its training schedule never ran: pass callbacks=[AdaCompCallback()] to the "
            "Trainer (or call embedding.step(fraction) in your loop), or call hf_adacomp.pack(model) to save it "
            "without training"
        )
    if embedding.coder is not None and embedding.abandoned:
        raise ValueError(
            f"{name}: training ended before the code lengths were frozen (at select_fraction="
            f"{embedding.config.select_fraction:g} of the steps): resume the training, or call hf_adacomp.pack(model) "
            "to freeze the lengths as they are"
        )


def attach(model: PreTrainedModel, quantizer: AdaCompHfQuantizer) -> None:
    """Make `save_pretrained` and `Trainer` treat `model` as one that `from_pretrained` had compressed."""
    model.config.quantization_config = quantizer.quantization_config
    setattr(model, "hf_quantizer", quantizer)  # noqa: B010  # transformers declares no such attribute


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`: the model saves as a plain one."""
    quantizer: Any = model.__dict__["hf_quantizer"]
    quantizer.remove_quantization_config(model)


def register() -> None:
    """Make `quant_method: "adacomp"` known to transformers; once."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(AdaCompConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(AdaCompHfQuantizer)
