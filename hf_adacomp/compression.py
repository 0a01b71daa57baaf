"""The verbs: compress a model, pack it, decompress it."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from .config import AdaCompConfig
from .quantizer import AdaCompHfQuantizer, attach, detach
from .surgery import install, replace_module, require_compressed

Model = TypeVar("Model", bound=PreTrainedModel)


def compress(model: Model, config: AdaCompConfig, token_counts: Tensor | None = None) -> Model:
    """Replace the token embeddings of `model` by an `AdaptiveCompressedEmbedding`, in place.

    Args:
        model: Any `PreTrainedModel` whose token table is an `nn.Embedding` that no output head shares.
        config: The settings.
        token_counts: Occurrences of each token in the training data, (V,). If given, the warm start runs now;
            if not, `AdaCompCallback` counts the training data when training begins.

    Returns:
        `model`.

    Raises:
        ValueError: If the model cannot be compressed; it is then as it was.
    """
    quantizer = AdaCompHfQuantizer(config, pre_quantized=False)
    install(model, quantizer.quantization_config, token_counts)
    attach(model, quantizer)
    return model


def pack(model: Model) -> Model:
    """Store the bits of every token and drop what only training needs, in place; returns `model`.

    Lengths that are still being learned are frozen as they are; without any training, that is the warm start.
    """
    for embedding in require_compressed(model).values():
        embedding.pack()
    return model


def decompress(model: Model) -> Model:
    """Put a plain `nn.Embedding` with the decoded vectors back, in place; returns `model`, which needs us no more."""
    found = require_compressed(model)
    unpacked = [name for name, embedding in found.items() if embedding.phase != "packed"]
    if unpacked:
        raise ValueError(f"decompress gives back packed tables, and {unpacked[0]!r} is still in training: pack(model)")
    for embedding in found.values():
        replace_module(model, embedding, embedding.to_embedding())
    detach(model)
    return model
