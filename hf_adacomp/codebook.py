"""One binary code-book: encode by a straight-through step, decode by a sum of code vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BITS_PER_BLOCK = 1 << 25
"""Table rows are processed in blocks of about this many bits (as float32: 128 MB) to bound memory."""


class BinaryStep(torch.autograd.Function):
    """`H(z) = 1 if z > 0 else 0`, with the gradient of `clamp((z + 1) / 2, 0, 1)` (straight-through).

    Bengio, Leonard, Courville 2013 (arXiv 1308.3432), with the saturation of Hubara et al. 2016: a bit whose
    pre-activation is far from its threshold gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        z: Tensor = ctx.saved_tensors[0]
        return 0.5 * grad[0] * (z.abs() < 1).to(z.dtype)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to int8 with a scale of its own: `weight ~ int8 * scale`, (L, d) -> int8 (L, d), (L, 1)."""
    scale = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp_min(torch.finfo(weight.dtype).tiny)
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale


class BinaryCodebook(nn.Module):
    """A code-book of `length` code vectors of width `dim`, with the encoder that chooses among them.

        encode   b = H(F x + f)        b in {0, 1}^L
        decode   xhat = C^T b + c      the sum of the active code vectors (rows of C) and the bias c

    With `tied`, `F = encoder_scale * C`. Decoding always sees code vectors as they will be stored (rounded to
    `storage_dtype`), with gradients passed straight through the rounding.

    Args:
        length: Number of code vectors, i.e. bits of a code.
        dim: Width d of the vectors.
        tied: Whether the encoder shares the code vectors.
        storage_dtype: `torch.int8` or a float dtype.
    """

    def __init__(
        self,
        length: int,
        dim: int,
        *,
        tied: bool,
        storage_dtype: torch.dtype,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.length, self.dim, self.tied, self.storage_dtype = length, dim, tied, storage_dtype
        self.packed = False
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.randn(length, dim, **options) / length**0.5)
        self.bias = nn.Parameter(torch.zeros(dim, **options))
        self.encoder_bias = nn.Parameter(torch.zeros(length, **options))
        if tied:
            self.encoder_scale = nn.Parameter(torch.ones(1, **options), requires_grad=False)
        else:
            self.encoder_weight = nn.Parameter(torch.randn(length, dim, **options) / dim**0.5)

    def encode(self, x: Tensor) -> Tensor:
        """Bits of the vectors x, (..., d) -> (..., L) in {0, 1} of x's dtype."""
        projection = self.encoder_scale * self.weight if self.tied else self.encoder_weight
        bits: Tensor = BinaryStep.apply(F.linear(x, projection, self.encoder_bias))  # type: ignore[no-untyped-call]
        return bits

    def decode(self, bits: Tensor) -> Tensor:
        """Vectors of the bits, (..., L) -> (..., d)."""
        return F.linear(bits, self.code_vectors().T) + self.stored_bias()

    def reconstruct(self, x: Tensor) -> Tensor:
        """`decode(encode(x))` without gradients, in blocks of bounded memory."""
        with torch.no_grad():
            return torch.cat([self.decode(self.encode(rows)) for rows in x.split(self.block)])

    @property
    def block(self) -> int:
        """Rows to process at once; a multiple of 8, so that blocks of packed codes end at a byte."""
        return 8 * max(1, BITS_PER_BLOCK // (8 * max(self.length, self.dim)))

    def code_vectors(self) -> Tensor:
        """The (L, d) code vectors as stored; gradients reach `weight` (or `scale` once packed as int8)."""
        if self.packed and self.storage_dtype == torch.int8:
            return self.weight.to(self.scale.dtype) * self.scale
        if self.storage_dtype == torch.int8:
            integers, scale = quantize_rows(self.weight.detach())
            return self.weight + (integers.to(scale.dtype) * scale - self.weight).detach()
        return _rounded(self.weight, self.storage_dtype)

    def stored_bias(self) -> Tensor:
        """The (d,) bias as stored. With int8 code vectors it keeps the dtype of the model."""
        return self.bias if self.storage_dtype == torch.int8 else _rounded(self.bias, self.storage_dtype)

    def orthogonality(self) -> Tensor:
        """`|C C^T / s - I|^2 / L`, s the mean squared norm of the code vectors: 0 when they are orthonormal."""
        gram = self.weight @ self.weight.T
        gram = gram / gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
        return (gram - torch.eye(self.length, dtype=gram.dtype, device=gram.device)).square().sum() / self.length

    def pack(self) -> None:
        """Drop the encoder; with int8 storage replace the float code vectors by int8 ones with trainable scales."""
        del self.encoder_bias
        if self.tied:
            del self.encoder_scale
        else:
            del self.encoder_weight
        if self.storage_dtype == torch.int8:
            integers, scale = quantize_rows(self.weight.detach())
            del self.weight
            self.register_buffer("weight", integers)
            self.scale = nn.Parameter(scale)
        self.packed = True

    def restore_constants(self) -> None:
        """Mark the constants as such again after transformers loaded them as trainable parameters."""
        if self.tied and not self.packed:
            self.encoder_scale.requires_grad_(False)

    def stored_bytes(self) -> int:
        """Bytes of the packed code-book in a file: code vectors, bias and, for int8, scales."""
        if self.storage_dtype == torch.int8:
            return self.length * self.dim + (self.length + self.dim) * self.bias.dtype.itemsize
        return (self.length + 1) * self.dim * self.storage_dtype.itemsize

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # The parameters keep the model's dtype to train on; a file holds the values that decoding sees. A skeleton on
        # the meta device is not saved but asked for the dtypes to load into.
        if self.packed and self.storage_dtype.is_floating_point and not self.bias.is_meta:
            for name in ("weight", "bias"):
                destination[prefix + name] = destination[prefix + name].to(self.storage_dtype)

    def extra_repr(self) -> str:
        return f"{self.length}, {self.dim}, tied={self.tied}, storage_dtype={self.storage_dtype}"


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` rounded to `dtype` and back, gradient passed straight through."""
    if value.dtype == dtype:
        return value
    return value + (value.detach().to(dtype).to(value.dtype) - value.detach())
