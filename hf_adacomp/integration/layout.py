"""The layout of a stored table: what a config says of its tensors, written, checked and built again.

`quantization_config["tables"]` holds one for each table, by module name. It is checked before any tensor is made.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..codes.packed import PackedCodes
from ..config import LARGEST, MOST_BITS, AdaCompConfig
from ..nn.embedding import AdaptiveCompressedEmbedding
from ..nn.loading import GUARD
from ..nn.reading import WeightFromCodes

SEALED_SETTINGS = ("format_version", "codebook_dtype", "head", "tied", "target_ratio", "selection_reach")
"""Settings that a layout's checksum covers: those that vectors and logits depend on, and `target_ratio` and
`selection_reach`, which files have always sealed. All others matter to training alone."""

MOST_TOKENS = 2**31 - 1
"""Bound of V: places of tokens are int32."""


def table_layout(embedding: AdaptiveCompressedEmbedding, tied_head: bool) -> dict[str, Any]:
    """What `empty_table` needs to rebuild the shapes, JSON-ready; sealed by a checksum of itself and the settings.

    Args:
        embedding: A compressed table.
        tied_head: Whether an output head computes logits from its codes.
    """
    packed = embedding.packed
    layout = {
        "num_embeddings": embedding.num_embeddings,
        "embedding_dim": embedding.embedding_dim,
        "padding_idx": embedding.padding_idx,
        "code_lengths": list(embedding.config.ladder),
        "zero_padding": embedding.zero_padding,
        "scale": embedding.scale,
        "tokens_per_length": None if packed is None else list(packed.tokens_per_length),
        "tensor_checksums": embedding.checksums(),
        "tied_head": tied_head,
    }
    return sealed(layout, embedding.config.with_ladder(embedding.config.ladder))  # of this format


def empty_table(
    layout: Mapping[str, Any], config: AdaCompConfig, dtype: torch.dtype | None = None
) -> AdaptiveCompressedEmbedding:
    """A table on the meta device with the tensors that `layout` describes, ready to be loaded into."""
    ladder = layout["code_lengths"]
    shape = layout["num_embeddings"], layout["embedding_dim"]
    source = torch.empty(*shape, device="meta", dtype=dtype)
    table = AdaptiveCompressedEmbedding(*shape, config.with_ladder(ladder), layout["padding_idx"], _source=source)
    table.zero_padding, table.scale = layout["zero_padding"], layout["scale"]
    if layout["tokens_per_length"] is not None:
        table.become_packed(PackedCodes(shape[0], ladder, layout["tokens_per_length"], device="meta"))
    return table


def guards(model: nn.Module) -> dict[str, Tensor]:
    """Empty tensors under the names of the dense weights, in all places of a model's compressed tables.

    Where transformers loads a file without this package, it would make the tables up at random after a warning; a
    tensor of another shape is an error to it, which names the place.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, WeightFromCodes)]
    return empty_tensors(f"{name}.{GUARD}" for name in names)


def empty_tensors(names: Iterable[str]) -> dict[str, Tensor]:
    """Empty tensors by name, each with memory of its own: transformers takes tensors without any for shared weights."""
    return {name: torch.zeros(1, device="cpu")[:0] for name in names}


def sealed(layout: Mapping[str, Any], config: AdaCompConfig) -> dict[str, Any]:
    """`layout` with a checksum of itself and of `SEALED_SETTINGS`."""
    return {**layout, "checksum": _checksum(layout, config)}


def check_layout(name: str, layout: Mapping[str, Any], config: AdaCompConfig) -> None:
    """Raise ValueError unless `layout` can be the sealed layout of a table.

    Args:
        name: Of the table, for messages.
        layout: As `table_layout` gives it.
        config: The settings it was sealed with.
    """
    tokens = _integer(name, layout, "num_embeddings", 1, MOST_TOKENS)
    _integer(name, layout, "embedding_dim", 1, MOST_BITS)
    if _field(name, layout, "padding_idx") is not None:
        _integer(name, layout, "padding_idx", 0, tokens - 1)
    for field in ("zero_padding", "tied_head"):
        if not isinstance(_field(name, layout, field), bool):
            raise _wrong(name, layout, field, "true or false")
    if layout["zero_padding"] and layout["padding_idx"] is None:
        raise _wrong(name, layout, "zero_padding", "false where padding_idx is null")
    scale = _field(name, layout, "scale")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) <= LARGEST:
        raise _wrong(name, layout, "scale", "a finite number")
    lengths = _integers(name, layout, "code_lengths", 1, MOST_BITS)
    if not 1 <= len(lengths) <= 256 or lengths != sorted(set(lengths)):
        raise _wrong(name, layout, "code_lengths", "1 to 256 increasing numbers")
    if _field(name, layout, "tokens_per_length") is not None:
        shares = _integers(name, layout, "tokens_per_length", 0, tokens)
        if len(shares) != len(lengths) or sum(shares) != tokens:
            raise _wrong(name, layout, "tokens_per_length", f"{len(lengths)} numbers that sum to {tokens}")
    checksums = _field(name, layout, "tensor_checksums")
    if not isinstance(checksums, Mapping):
        raise _wrong(name, layout, "tensor_checksums", "checksums by name of the tensor")
    for tensor in checksums:
        _integer(f"{name}, tensor_checksums", checksums, tensor, 0, 2**32 - 1)
    expected = _checksum({field: layout[field] for field in layout if field != "checksum"}, config)
    if _integer(name, layout, "checksum", 0, 2**32 - 1) != expected:
        raise ValueError(
            f"{name}: the checksum of the table's layout in quantization_config is {layout['checksum']}, but with "
            f"{', '.join(f'{key}={value!r}' for key, value in _settings(config).items())} it should be {expected}: the "
            "config was changed or damaged after it was saved; copy or download it again"
        )


def _checksum(layout: Mapping[str, Any], config: AdaCompConfig) -> int:
    values = {**_settings(config), **layout, "scale": float(layout["scale"])}  # other writers of JSON make 1 of 1.0
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _settings(config: AdaCompConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SEALED_SETTINGS}


def _field(name: str, layout: Mapping[str, Any], field: str) -> Any:
    if field not in layout:
        raise ValueError(f"{name}: the table's layout in quantization_config lacks the field {field!r}")
    return layout[field]


def _integer(name: str, layout: Mapping[str, Any], field: str, least: int, most: int) -> int:
    value = _field(name, layout, field)
    if not _is_integer(value, least, most):
        raise _wrong(name, layout, field, f"a whole number from {least} to {most}")
    return int(value)


def _integers(name: str, layout: Mapping[str, Any], field: str, least: int, most: int) -> list[int]:
    values = _field(name, layout, field)
    if not isinstance(values, (list, tuple)) or not all(_is_integer(value, least, most) for value in values):
        raise _wrong(name, layout, field, f"a list of whole numbers from {least} to {most}")
    return [*values]


def _is_integer(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _wrong(name: str, layout: Mapping[str, Any], field: str, wanted: str) -> ValueError:
    value = repr(layout[field])
    shown = value if len(value) <= 200 else f"{value[:200]}..."
    return ValueError(f"{name}: {field} of the table's layout in quantization_config must be {wanted}; got {shown}")
