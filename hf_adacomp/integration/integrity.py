"""What must hold of a compressed model when it is saved, and of one that was loaded."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import transformers_compat
from ..codes.bits import checksum as checksum_of
from ..nn.embedding import AdaptiveCompressedEmbedding
from ..nn.head import CompressedHead
from .compressed_tables import token_tables

ADAPTERS_COPY = "modules_to_save"
"""Where PEFT keeps a module that an adapter trains as a whole."""


def refuse_replaced(
    model: PreTrainedModel,
    embeddings: Mapping[str, AdaptiveCompressedEmbedding],
    heads: Mapping[str, CompressedHead],
) -> None:
    """Raise ValueError unless tables are there, and heads that read them and are as wide."""
    if not embeddings:
        raise ValueError(
            f"the compressed table of {type(model).__name__} was replaced, by a "
            f"{type(model.get_input_embeddings()).__name__}: to have a plain model, decompress(model) first, then put "
            "other embeddings in"
        )
    if copies := [name for name in embeddings if ADAPTERS_COPY in name.split(".")]:
        raise ValueError(
            f"{copies[0]} is an adapter's copy of the table, and would be saved under that name: save the adapter by "
            "itself, or merge_and_unload() it and save the model that this returns"
        )
    for name, head in heads.items():
        if not any(head.embedding is table for table in embeddings.values()):
            raise ValueError(
                f"the output head {name!r} reads another table than the model's, which was replaced or copied: "
                "decompress(model) before tables are exchanged"
            )
        if head.bias is not None:
            _refuse_width(name, len(head.bias), head.embedding.num_embeddings)
    output, sizes = model.get_output_embeddings(), {table.num_embeddings for table in token_tables(model).values()}
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    if isinstance(output, nn.Linear) and vocabulary in sizes and output.out_features not in sizes:
        _refuse_width("get_output_embeddings()", output.out_features, int(vocabulary))


def _refuse_width(name: str, width: int, tokens: int) -> None:
    if width != tokens:
        raise ValueError(
            f"the output head {name!r} gives logits of {width} tokens, but the table has {tokens}: use "
            "model.resize_token_embeddings, add_tokens or keep_tokens, which change both"
        )


def refuse_quantized_in_memory(model: PreTrainedModel) -> None:
    """Raise ValueError for weights that safetensors does not know."""
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not Tensor:
            raise ValueError(
                f"{name!r} is a {type(parameter.data).__name__}, which safetensors cannot hold: save the model before "
                "other weights are quantized in memory, and quantize them again after from_pretrained"
            )


def refuse_missing(name: str, embedding: nn.Module) -> None:
    """Raise ValueError unless a table, or a static model, was loaded whole."""
    if any(tensor.is_meta for _, tensor in _stored(embedding)):
        raise ValueError(
            f"the device_map offloads the compressed table {name!r}, which is not supported: it is small, so keep it "
            "on a device and offload other modules"
        )
    # transformers marks what it loaded, and fills what the file lacked with uninitialised memory.
    for key, tensor in _stored(embedding):
        if not transformers_compat.is_loaded(tensor):
            raise ValueError(f"the file lacks the tensor {name}.{key} of the compressed table: it is damaged")


def _stored(embedding: nn.Module) -> list[tuple[str, Tensor]]:
    names = embedding.state_dict().keys()
    tensors = chain(embedding.named_parameters(), embedding.named_buffers())
    return [(name, tensor) for name, tensor in tensors if name in names]


def check_values(name: str, embedding: AdaptiveCompressedEmbedding) -> None:
    """Raise ValueError for values that a table never has."""
    for key, tensor in _stored(embedding):
        # The extremes tell, NaN included, without a mask as large as the table.
        if tensor.is_floating_point() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(
                f"{name}.{key} holds NaN or Inf: the training has diverged, or the file it is from is damaged"
            )
    if embedding.packed is not None:
        embedding.packed.validate(f"{name}.packed")
    if embedding.training_state is not None:
        embedding.training_state.validate(f"{name}.training_state")


def compare_checksums(name: str, embedding: AdaptiveCompressedEmbedding, saved: dict[str, int]) -> None:
    """Raise ValueError unless tensors have the checksums with which they were saved."""
    found = embedding.checksums()
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
    embedding.seal()


def refuse_changed(name: str, embedding: AdaptiveCompressedEmbedding, stored: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless what packing fixed is still the same, in a table and in the state to be stored."""
    packed = embedding.packed
    if packed is None:
        return
    if packed.num_tokens != embedding.num_embeddings:
        raise ValueError(
            f"num_embeddings of {name} was set to {embedding.num_embeddings}, but it has {packed.num_tokens} tokens: "
            "model.resize_token_embeddings, add_tokens and keep_tokens change its codes, too"
        )
    for tensor, checksum in (embedding.checksums() if embedding.sealed is None else embedding.sealed).items():
        full = f"{name}.{tensor}"
        if full not in stored or checksum != checksum_of(stored[full]):
            raise ValueError(
                f"{full} is {'other than what was packed' if full in stored else 'missing in what is to be saved'}: "
                "codes are integers and cannot be averaged. Average parameters alone, as AveragedModel(model, "
                "use_buffers=False) does, and give a state_dict with the model's own codes"
            )


def refuse_training(embeddings: Mapping[str, AdaptiveCompressedEmbedding]) -> None:
    """Raise ValueError for tables that are not packed yet."""
    for name, embedding in embeddings.items():
        if embedding.phase != "packed":
            raise ValueError(f"decompress gives back packed tables, and {name!r} is still in training: pack(model)")


def refuse_unfinished(name: str, embedding: AdaptiveCompressedEmbedding) -> None:
    """Raise ValueError for a table in training that cannot be resumed."""
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
