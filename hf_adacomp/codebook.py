"""One binary code-book: encode by a straight-through step, decode by a sum of code vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import packing
from .config import FLOAT_DTYPES, INTEGER_BITS

BITS_PER_BLOCK = 1 << 22
"""Table rows are processed in blocks of about this many bits (as float32: 16 MB) to bound memory."""


class BinaryStep(torch.autograd.Function):
    """The bits, decided from the pre-activations z, with the gradient of `clamp((z + 1) / 2, 0, 1)` (straight-through).

    Bengio, Leonard, Courville 2013 (arXiv 1308.3432), with the saturation of Hubara et al. 2016: a bit whose
    pre-activation is far from its threshold gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, bits: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return bits.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        z: Tensor = ctx.saved_tensors[0]
        return 0.5 * grad[0] * (z.abs() < 1).to(z.dtype), None


SWEEPS = 4
BLOCKS = 8
WIDEST = 48
"""How often each bit is decided, and in how many blocks, of so many bits at most: a block sees what others decided."""


def decide_bits(drive: Tensor, overlap: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinate descent on `|x - c - C^T b|^2` over the bits b, in blocks.

    A bit pays if what it explains on its own, its drive, exceeds what the other bits explain of that already:

        b_i <- H(drive_i - sum_j overlap_ij b_j)        drive = C (x - c) - |C_i|^2 / 2,  overlap = C C^T, diagonal 0

    Args:
        drive: (..., L).
        overlap: (L, L), symmetric, zero on the diagonal.
        start: Bits to start from, (..., L) in [0, 1]; an undecided bit counts half.

    Bits of a block are decided together, which can overshoot where code vectors are alike: then only the one that gains
    most changes, so that no error grows once all bits are decided.

    Returns:
        The bits, and for each bit drive less sum when it was last decided, both (..., L).
    """
    bits, margins = start.clone(), torch.empty_like(drive)
    width = min(-(-drive.shape[-1] // BLOCKS), WIDEST)
    for sweep in range(SWEEPS):
        for first in range(0, drive.shape[-1], width):
            block = slice(first, first + width)
            before, margin = bits[..., block], drive[..., block] - bits @ overlap[:, block]
            decided = (margin > 0).to(bits.dtype)
            if sweep:
                change = decided - before
                gain = change * margin
                lost = change * (change @ overlap[block, block]) / 2
                overshoots = (gain - lost).sum(-1, keepdim=True) < 0
                decided = torch.where(overshoots & (gain < gain.amax(-1, keepdim=True)), before, decided)
            bits[..., block], margins[..., block] = decided, margin
    return bits, margins


def nearest_bits(
    x: Tensor, vectors: Tensor, bias: Tensor, *, metric: Tensor | None = None, start: Tensor | None = None
) -> Tensor:
    """Bits of codes near the vectors x, (N, d) -> (N, L), by code vectors (L, d), a bias (d,) and a metric (d, d)."""
    readers = vectors if metric is None else vectors @ metric
    overlap = readers @ vectors.T
    drive = (x - bias) @ readers.T - overlap.diagonal() / 2
    start = torch.full_like(drive, 0.5) if start is None else start
    return decide_bits(drive, overlap.fill_diagonal_(0), start)[0]


CLIP = {4: 2.45}
"""Largest entry kept, in root mean squares of its row: at 4 bits the least error for normal entries (Max 1960)."""


def quantize_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round each row to integers of `bits` bits with a scale of its own: `weight ~ integer * scale`.

    (L, d) -> int8 (L, d) in `-(2^(bits-1) - 1) ..`, scale (L, 1).
    """
    most = 2 ** (bits - 1) - 1
    peak = weight.abs().amax(dim=1, keepdim=True)
    if bits in CLIP:
        peak = peak.minimum(CLIP[bits] * weight.square().mean(dim=1, keepdim=True).sqrt())
    scale = (peak / most).clamp_min(torch.finfo(weight.dtype).tiny)
    return (weight / scale).round().clamp(-most, most).to(torch.int8), scale


def codebook_bytes(length: int, dim: int, storage: str, dtype: torch.dtype) -> int:
    """Bytes of a packed code-book: code vectors, bias and, for integers, scales in the `dtype` of the model."""
    if storage in INTEGER_BITS:
        return length * packing.packed_bytes(dim * INTEGER_BITS[storage]) + (length + dim) * dtype.itemsize
    return (length + 1) * dim * FLOAT_DTYPES[storage].itemsize


class BinaryCodebook(nn.Module):
    """A code-book of `length` code vectors of width `dim`, with the encoder that chooses among them.

        encode   b = H(F x + f - S b)      b in {0, 1}^L, S = s C M C^T off the diagonal: `decide_bits`
        decode   xhat = C^T b + c          the sum of the active code vectors (rows of C) and the bias c

    With `tied`, `F = s C M` and `f = encoder_bias - s (C M c + diag(C M C^T) / 2)`: encoding descends the squared error
    in the metric M, up to the learned bias, and follows the code vectors, which are constants to it. (Gradients that
    reach them through the encoder, too, make them alike, and the descent over alike vectors is poor.) Both ways see
    code vectors as they will be stored (rounded to `storage`), with gradients passed straight through the rounding and
    through the step H.

    A vector is the sum of about L/2 code vectors. If an optimizer moved each by its learning rate, vectors would move
    by many times that: training therefore holds `C = rate * weight` with `rate = sqrt(2 / L)`.

    Args:
        length: Number of code vectors, i.e. bits of a code.
        dim: Width d of the vectors.
        tied: Whether the encoder shares the code vectors.
        storage: How code vectors are stored, as `AdaCompConfig.codebook_dtype`.
    """

    def __init__(
        self,
        length: int,
        dim: int,
        *,
        tied: bool,
        storage: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.length, self.dim, self.tied, self.storage = length, dim, tied, storage
        self.integer_bits = INTEGER_BITS.get(storage)
        self.packed = False
        self.rate = min(1.0, (2 / length) ** 0.5)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.randn(length, dim, **options) / length**0.5 / self.rate)
        self.bias = nn.Parameter(torch.zeros(dim, **options))
        self.encoder_bias = nn.Parameter(torch.zeros(length, **options))
        self.encoder_scale = nn.Parameter(torch.ones(1, **options), requires_grad=False)
        if not tied:
            self.encoder_weight = nn.Parameter(torch.randn(length, dim, **options) / dim**0.5)

    def encode(self, x: Tensor, metric: Tensor) -> Tensor:
        """Bits of the vectors x, (..., d) -> (..., L) in {0, 1} of x's dtype, near them in a metric (d, d).

        Computed in float32 at least.
        """
        with torch.autocast(x.device.type, enabled=False):
            return self._encode(x, metric)

    def _encode(self, x: Tensor, metric: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.no_grad():
            vectors = self.code_vectors().to(dtype)
            readers = self.encoder_scale.to(dtype) * vectors @ metric.to(dtype)
            overlap = readers @ vectors.T
            threshold = readers @ self.stored_bias().to(dtype) + overlap.diagonal() / 2
            overlap.fill_diagonal_(0)
        if self.tied:
            drive = F.linear(x.to(dtype), readers) - threshold + self.encoder_bias.to(dtype)
        else:
            drive = F.linear(x.to(dtype), self.encoder_weight.to(dtype), self.encoder_bias.to(dtype))
        with torch.no_grad():
            bits, margins = decide_bits(drive, overlap, torch.full_like(drive, 0.5))
            explained = drive - margins
        decided: Tensor = BinaryStep.apply(drive - explained, bits)  # type: ignore[no-untyped-call]
        return decided.to(x.dtype)

    def decode(self, bits: Tensor, out: Tensor | None = None) -> Tensor:
        """Vectors of the bits, (N, L) -> (N, d), also into `out`. Under autocast, too, as they would be without it."""
        with torch.autocast(bits.device.type, enabled=False):
            return torch.addmm(self.stored_bias(), bits, self.code_vectors(), out=out)

    def reconstruct(self, x: Tensor, metric: Tensor) -> Tensor:
        """`decode(encode(x, metric))` without gradients, in blocks of bounded memory."""
        with torch.no_grad():
            return torch.cat([self.decode(self.encode(rows, metric)) for rows in x.split(self.block)])

    @property
    def block(self) -> int:
        """Rows to process at once; a multiple of 8, so that blocks of packed codes end at a byte."""
        return 8 * max(1, BITS_PER_BLOCK // (8 * max(self.length, self.dim)))

    def code_vectors(self) -> Tensor:
        """The (L, d) code vectors as stored; gradients reach `weight` (`scale` once packed as integers)."""
        if self.packed and self.integer_bits:
            dtype = self.scale.dtype
            whole = self.integer_bits == 8
            integers = self.weight.to(dtype) if whole else packing.unpack_nibbles(self.weight, self.dim, dtype)
            return integers.mul_(self.scale)  # in place: one float copy of the book, not two
        vectors: Tensor = self.rate * self.weight
        return vectors + (self.round(vectors.detach()) - vectors).detach()

    @torch.no_grad()
    def set_vectors(self, vectors: Tensor) -> None:
        """Take over code vectors, (L, d)."""
        self.weight.copy_(vectors / self.rate)

    def round(self, vectors: Tensor) -> Tensor:
        """Code vectors (L, d) as storing rounds them."""
        if self.integer_bits is None:
            return vectors.to(FLOAT_DTYPES[self.storage]).to(vectors.dtype)
        integers, scale = quantize_rows(vectors, self.integer_bits)
        return integers.to(scale.dtype) * scale

    def stored_bias(self) -> Tensor:
        """The (d,) bias as stored. With integer code vectors it keeps the dtype of the model."""
        return self.bias if self.integer_bits else _rounded(self.bias, FLOAT_DTYPES[self.storage])

    def orthogonality(self) -> Tensor:
        """`|C C^T / s - I|^2 / L`, s the mean squared norm of the code vectors: 0 when they are orthonormal."""
        gram = self.weight @ self.weight.T
        gram = gram / gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
        return (gram - torch.eye(self.length, dtype=gram.dtype, device=gram.device)).square().sum() / self.length

    def pack(self) -> None:
        """Drop the encoder; with integer storage replace the float code vectors by integers with trainable scales."""
        del self.encoder_bias, self.encoder_scale
        if not self.tied:
            del self.encoder_weight
        self.weight.data, self.rate = self.rate * self.weight.data, 1.0
        if self.integer_bits:
            integers, scale = quantize_rows(self.weight.detach(), self.integer_bits)
            del self.weight
            self.register_buffer("weight", integers if self.integer_bits == 8 else packing.pack_nibbles(integers))
            self.scale = nn.Parameter(scale)
        self.packed = True

    def restore_constants(self) -> None:
        """Mark the constants as such again after transformers loaded them as trainable parameters."""
        if not self.packed:
            self.encoder_scale.requires_grad_(False)

    def stored_bytes(self) -> int:
        """Bytes of the packed code-book in a file."""
        return codebook_bytes(self.length, self.dim, self.storage, self.bias.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # The parameters keep the model's dtype to train on; a file holds the values that decoding sees. A skeleton on
        # the meta device is not saved but asked for the dtypes to load into.
        if self.packed and self.integer_bits is None and not self.bias.is_meta:
            for name in ("weight", "bias"):
                destination[prefix + name] = destination[prefix + name].to(FLOAT_DTYPES[self.storage])

    def extra_repr(self) -> str:
        return f"{self.length}, {self.dim}, tied={self.tied}, storage={self.storage!r}"


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` rounded to `dtype` and back, gradient passed straight through."""
    if value.dtype == dtype:
        return value
    return value + (value.detach().to(dtype).to(value.dtype) - value.detach())
