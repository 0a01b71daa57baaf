"""The verbs: compress a model, pack it, decompress it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from ..config import AdaCompConfig
from .quantizer import AdaCompHfQuantizer, attach, detach, refuse_quantized
from .surgery import install, take_out
from .tables import compressed_embeddings, keep_from_broadcasts, require_compressed

Model = TypeVar("Model", bound=PreTrainedModel)


def compress(
    model: Model,
    config: AdaCompConfig,
    token_counts: Tensor | Mapping[str, Tensor] | None = None,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> Model:
    """Replace the token embeddings of `model` by an `AdaptiveCompressedEmbedding`, in place.

    A table that encoder, decoder and output head share is compressed once for all of them; what becomes of a tied
    head is `config.head`.

    >>> import torch
    >>> from hf_adacomp import AdaCompConfig, compress, pack
    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2))
    >>> counts = 1000 // torch.arange(1, 1001)
    >>> model = compress(model, AdaCompConfig(target_ratio=20), counts)
    >>> model.get_input_embeddings().phase
    'observe'

    Args:
        model: Any `PreTrainedModel` whose token table is an `nn.Embedding` or one of transformers' scaled embeddings.
        config: The settings.
        token_counts: Occurrences of each token in the training data, (V,), or such counts by module name of the
            table. If given, the warm start runs now; if not, `AdaCompCallback` counts the training data.
        include: Module names of embeddings to compress, as patterns of `fnmatch`, instead of those that
            `get_input_embeddings` returns for the model and its parts.
        exclude: Module names, as patterns, to leave as they are.

    Returns:
        `model`.

    Raises:
        ValueError: If the model cannot be compressed; it is then as it was.
    """
    quantizer = AdaCompHfQuantizer(config, pre_quantized=False)
    if isinstance(model, PreTrainedModel) and not compressed_embeddings(model):
        refuse_quantized(model)
    install(model, quantizer.quantization_config, token_counts, include, exclude)
    attach(model, quantizer)
    return model


def pack(model: Model) -> Model:
    """Store the bits of every token and drop what only training needs, in place; returns `model`.

    Lengths that are still being learned are frozen as they are; without any training, that is the warm start.

    >>> import torch
    >>> from hf_adacomp import AdaCompConfig, compress, pack
    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2))
    >>> model = compress(model, AdaCompConfig(target_ratio=20), 1000 // torch.arange(1, 1001))
    >>> pack(model).get_input_embeddings().phase
    'packed'
    """
    for embedding in require_compressed(model).values():
        embedding.pack()
    keep_from_broadcasts(model)
    return model


def decompress(model: Model) -> Model:
    """Put dense embeddings with the decoded vectors back, in place; returns `model`, which needs us no more.

    Places that shared the table are tied again. If the head kept weights of its own (`head="dense"`), it keeps them;
    nothing is tied then, and `config.tie_word_embeddings` is False.

    >>> import torch
    >>> from hf_adacomp import AdaCompConfig, compress, decompress, pack
    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2))
    >>> pack(compress(model, AdaCompConfig(target_ratio=20), 1000 // torch.arange(1, 1001)))  # doctest: +ELLIPSIS
    BertModel(...)
    >>> decompress(model).get_input_embeddings()
    Embedding(1000, 64, padding_idx=0)
    """
    found = require_compressed(model)
    unpacked = [name for name, embedding in found.items() if embedding.phase != "packed"]
    if unpacked:
        raise ValueError(f"decompress gives back packed tables, and {unpacked[0]!r} is still in training: pack(model)")
    take_out(model)
    detach(model)
    return model
