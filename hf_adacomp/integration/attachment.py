"""Models that save and train as if `from_pretrained` had compressed them: our quantizer attached to them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from .. import transformers_compat
from ..config import QUANT_METHOD
from ..nn.reading import WeightFromCodes
from .compressed_tables import compressed_embeddings, keep_from_broadcasts
from .layout import SEALED_SETTINGS
from .methods import give_methods
from .parts import model_parts, transformers_models
from .quantizer import AdaCompHfQuantizer


def refuse_quantized(model: PreTrainedModel) -> None:
    """Raise ValueError if another quantizer is in charge of `model`: a config has room for one."""
    quantizer = transformers_compat.quantizer_of(model)
    other = getattr(quantizer, "quantization_config", None) or getattr(model.config, "quantization_config", None)
    if quantizer is None and other is None:
        return
    method = getattr(other, "quant_method", None) or (other or {}).get("quant_method", type(quantizer).__name__)
    if method == QUANT_METHOD:  # ours, or a dense model that was made from a compressed one's config
        return
    raise ValueError(
        f"{type(model).__name__} is quantized already, by {getattr(method, 'value', method)}, and transformers stores "
        "one quantization_config per model: compress the unquantized model and save it; then quantize linear layers in "
        "memory after from_pretrained, for example torchao.quantize_(model, Int8WeightOnlyConfig())"
    )


def attach(model: PreTrainedModel, quantizer: AdaCompHfQuantizer) -> None:
    """Make `save_pretrained` and `Trainer` treat `model` as one that `from_pretrained` had compressed."""
    model.config.quantization_config = quantizer.quantization_config
    transformers_compat.set_quantizer(model, quantizer)
    give_methods(model)
    keep_from_broadcasts(model)


def attach_whole(model: Any) -> None:
    """Have whole models save tables of parts that were compressed by themselves, or that users put in their places.

    Stock code asks the whole alone.

    Raises:
        ValueError: For parts of different settings, since a config has room for one; for a table that the whole ties.
    """
    for whole in transformers_models(model):
        if transformers_compat.quantizer_of(whole) is not None:
            continue
        tables = compressed_embeddings(whole)
        quantizers = [transformers_compat.quantizer_of(part) for _, part in model_parts(whole)]
        ours = [quantizer for quantizer in quantizers if isinstance(quantizer, AdaCompHfQuantizer)]
        ours = ours or [AdaCompHfQuantizer(table.settings, pre_quantized=False) for table in tables.values()]
        if not ours:
            continue
        weights = {f"{name}.weight" for name, place in whole.named_modules() if isinstance(place, WeightFromCodes)}
        for pair in transformers_compat.tied_weights(whole).items():
            if len(weights.intersection(pair)) == 1:
                raise ValueError(
                    f"{type(whole).__name__} ties {pair[0]!r} to {pair[1]!r}, of which one was compressed with a part "
                    "of the model: compress the whole"
                )
        seals = [{name: getattr(one.quantization_config, name) for name in SEALED_SETTINGS} for one in ours]
        if any(seal != seals[0] for seal in seals):
            raise ValueError(
                f"parts of the {type(whole).__name__} are compressed with different settings, {seals}, and its config "
                "has room for one: compress the whole model, or its parts alike"
            )
        transformers_compat.forget_ties(whole, "", weights)
        attach(whole, ours[0])
