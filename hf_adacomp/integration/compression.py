"""The verbs: compress a model, pack it, decompress it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from .. import transformers_compat
from ..config import AdaCompConfig, checked_config
from ..lengths.budget import TargetRatioError
from ..nn.static import StaticModel
from .attachment import attach, attach_whole, refuse_quantized
from .compressed_tables import compressed_models, keep_from_broadcasts, require_compressed
from .integrity import refuse_training
from .parts import named_modules, transformers_models
from .quantizer import AdaCompHfQuantizer, detach
from .sentence import (
    give_save,
    is_sentence_model,
    put_static_embedding,
    put_static_model,
    static_model,
    take_save,
    warn_of_static_embeddings,
)
from .surgery import Planned, install, plan, refuse_ties_outside

Model = TypeVar("Model", bound=Any)


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
        model: Any `PreTrainedModel` whose token table is an `nn.Embedding` or one of transformers' scaled embeddings,
            or what holds such models, as those of sentence-transformers. A `StaticEmbedding` becomes a transformers
            model with mean pooling, whose table holds directions; lengths of vectors are stored apart, a byte each.
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
    checked_config(config)
    static = static_model(model)
    inner = [static] if static is not None else transformers_models(model)
    warn_of_static_embeddings(model)
    if not inner and is_sentence_model(model):
        raise ValueError(
            f"this {type(model).__name__} has neither a transformers model nor begins with a StaticEmbedding. Word "
            "vectors can be one: SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=vectors)])"
        )
    if not inner:
        raise ValueError(
            f"compress takes a transformers PreTrainedModel, or an object that holds one; got {type(model).__name__}. "
            "For another module, put AdaptiveCompressedEmbedding.from_embedding(module.embedding, config) in the place "
            "of its nn.Embedding"
        )
    further = token_counts, include, exclude
    planned: list[tuple[PreTrainedModel, AdaCompHfQuantizer, Planned]]
    if static is not None:
        planned = [(static, *_plan_static(static, config, *further))]
    else:
        planned = [(one, *_plan(one, config, *_named_within(model, one, *further))) for one in inner]
        for one, _, tables in planned:
            refuse_ties_outside(model, one, tables)
    for one, quantizer, tables in planned:  # all of them can be compressed
        install(one, tables, config.head)
        attach(one, quantizer)
    if static is not None:
        put_static_model(model, static)
    give_save(model)
    return model


def _named_within(
    whole: Any,
    model: PreTrainedModel,
    token_counts: Tensor | Mapping[str, Tensor] | None,
    include: Sequence[str] | None,
    exclude: Sequence[str],
) -> tuple[Tensor | Mapping[str, Tensor] | None, Sequence[str] | None, Sequence[str]]:
    """Names of modules as `model` has them, where a user may have written those of the whole object."""
    names = {module: name for name, module in named_modules(whole).items()}
    prefix = f"{names[model]}." if names[model] else ""
    others = tuple(f"{names[other]}." for other in transformers_models(whole) if other is not model)
    if isinstance(token_counts, Mapping):
        token_counts = {
            str(name).removeprefix(prefix): counts
            for name, counts in token_counts.items()
            if not str(name).startswith(others)
        }
    patterns = [[some] if isinstance(some, str) else some or [] for some in (include, exclude)]
    own = [[pattern.removeprefix(prefix) for pattern in some] for some in patterns]
    return token_counts, None if include is None else own[0], own[1]


def _plan_static(static: StaticModel, config: AdaCompConfig, *further: Any) -> tuple[AdaCompHfQuantizer, Planned]:
    """Plan to compress a table of directions, with gains beside it where there is room for them."""
    ratio = static.ratio_beside_gains(config.target_ratio)
    if ratio is None:
        return _plan(static, config, *further)
    of_directions = copy.copy(config)
    of_directions.target_ratio = ratio
    static.separate_gains()
    try:
        return _plan(static, of_directions, *further)
    except TargetRatioError as error:
        fitting, dense = error.fitting + static.gain_bytes, 4 * static.embed_tokens.weight.numel()
        raise TargetRatioError(
            f"target_ratio={config.target_ratio:g} cannot be met: lengths of vectors take {static.gain_bytes} bytes of "
            f"{int(dense / config.target_ratio)}, and code-book, code lengths and the shortest codes {error.fitting}. "
            f"The largest ratio that fits is {int(100 * dense / fitting) / 100:g}; or choose fewer or shorter "
            "code_lengths",
            fitting,
        ) from error


def _plan(model: PreTrainedModel, config: AdaCompConfig, *further: Any) -> tuple[AdaCompHfQuantizer, Planned]:
    quantizer = AdaCompHfQuantizer(config, pre_quantized=False)
    refuse_quantized(model)
    return quantizer, plan(model, quantizer.quantization_config, *further)


def pack(model: Model) -> Model:
    """Store the bits of every token and drop what only training needs, in place; returns `model`.

    Lengths that are still being learned are frozen as they are; without any training, that is the warm start. A model
    that was built around a packed one takes over its table by `pack`, too, without which it cannot be saved.

    >>> import torch
    >>> from hf_adacomp import AdaCompConfig, compress, pack
    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2))
    >>> model = compress(model, AdaCompConfig(target_ratio=20), 1000 // torch.arange(1, 1001))
    >>> pack(model).get_input_embeddings().phase
    'packed'

    Raises:
        ValueError: If nothing is compressed, and for parts that a whole cannot save together; nothing is packed then.
    """
    tables = require_compressed(model)
    attach_whole(model)
    for embedding in tables.values():
        embedding.pack()
    for one in transformers_models(model):
        if isinstance(quantizer := transformers_compat.quantizer_of(one), AdaCompHfQuantizer):
            quantizer.note_tables(one)  # now: a whole that shares the config of this part saves that alone
    keep_from_broadcasts(model)
    give_save(model)
    return model


def decompress(model: Model) -> Model:
    """Put dense embeddings with the decoded vectors back, in place; returns `model`, which no longer needs hf_adacomp.

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

    Raises:
        ValueError: For a model without a compressed table, and for tables that are not packed.
    """
    refuse_training(require_compressed(model))
    attach_whole(model)
    for one in compressed_models(model):
        detach(one)
    put_static_embedding(model)
    take_save(model)
    return model
