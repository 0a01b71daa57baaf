"""How code vectors are rounded to be stored, and what they take then."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import FLOAT_DTYPES, INTEGER_BITS
from .bits import packed_bytes

CLIP = {4: 2.45}
"""Largest entry kept, in root mean squares of its row: at 4 bits the least error for normal entries (Max 1960)."""


def quantize_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round each row to integers of `bits` bits with a scale of its own: `weight ~ integer * scale`.

    (L, d) -> int8 (L, d) in `-(2^(bits-1) - 1) ..`, scale (L, 1).
    """
    most = 2 ** (bits - 1) - 1
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))  # squares of small float16 vanish
    peak = exact.abs().amax(dim=1, keepdim=True)
    if bits in CLIP:
        peak = peak.minimum(CLIP[bits] * exact.square().mean(dim=1, keepdim=True).sqrt())
    scale = (peak / most).to(weight.dtype)
    scale = scale.masked_fill(scale == 0, torch.finfo(weight.dtype).tiny)
    return (exact / scale).round().clamp(-most, most).to(torch.int8), scale


def round_vectors(vectors: Tensor, storage: str) -> Tensor:
    """Code vectors (L, d) as storing them as `storage` rounds them, in their own dtype."""
    if storage not in INTEGER_BITS:
        return vectors.to(FLOAT_DTYPES[storage]).to(vectors.dtype)
    integers, scale = quantize_rows(vectors, INTEGER_BITS[storage])
    return integers.to(scale.dtype) * scale


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """Exactly `rounded`, with the gradient of `value`; both of one shape."""
    return rounded.detach() + (value - value.detach())


def packed_rate(length: int, storage: str) -> float:
    """What a packed code-book multiplies by what it learns, for optimizers' steps: see `BinaryCodebook`."""
    return float(2.0 ** (round(math.log2(2 / length) / 2) - INTEGER_BITS.get(storage, 1) + 1))


def codebook_bytes(length: int, dim: int, storage: str, dtype: torch.dtype) -> int:
    """Bytes of a packed code-book: code vectors, bias and, for integers, scales in the `dtype` of the model."""
    if storage in INTEGER_BITS:
        return length * packed_bytes(dim * INTEGER_BITS[storage]) + (length + dim) * dtype.itemsize
    return (length + 1) * dim * FLOAT_DTYPES[storage].itemsize
