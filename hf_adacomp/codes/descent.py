"""Which bits a code has: coordinate descent towards a vector, and the gradient that training sees of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SWEEPS = 4
BLOCKS = 8
WIDEST = 48
"""How often each bit is decided, and in how many blocks, of so many bits at most: a block sees what others decided."""


class BinaryStep(torch.autograd.Function):
    """Centred bits, decided from pre-activations z, with the gradient of `clamp(z / 2, -1/2, 1/2)` (straight-through).

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


def decide_bits(drive: Tensor, overlap: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Coordinate descent on `|x - c - C^T s|^2` over the centred bits s, -1/2 or 1/2, in blocks.

    A bit is set if what its vector explains on its own, its drive, exceeds what the other bits explain of that already:

        s_i <- H(drive_i - sum_j overlap_ij s_j) - 1/2        drive = C (x - c),  overlap = C C^T, diagonal 0

    Args:
        drive: (..., L).
        overlap: (L, L), symmetric, zero on the diagonal.
        start: Bits to start from, (..., L) in [-1/2, 1/2]; undecided ones, 0, if none are given.

    Bits of a block are decided together, which can overshoot where code vectors are alike: then only the one that gains
    most changes, so that no error grows once all bits are decided.

    Returns:
        The centred bits, and for each bit drive less sum when it was last decided, both (..., L).
    """
    bits = torch.zeros_like(drive) if start is None else start.clone()
    margins = torch.empty_like(drive)
    width = min(-(-drive.shape[-1] // BLOCKS), WIDEST)
    for sweep in range(SWEEPS):
        for first in range(0, drive.shape[-1], width):
            block = slice(first, first + width)
            known = slice(None) if sweep or start is not None else slice(first)  # the others are 0
            before, margin = bits[..., block], drive[..., block] - bits[..., known] @ overlap[known, block]
            decided = (margin > 0).to(bits.dtype) - 0.5
            if sweep:
                change = decided - before
                gain = change * margin
                lost = change * (change @ overlap[block, block]) / 2
                overshoots = (gain - lost).sum(-1, keepdim=True) < 0
                decided = torch.where(overshoots & (gain < gain.amax(-1, keepdim=True)), before, decided)
            bits[..., block], margins[..., block] = decided, margin
    return bits, margins


def nearest_bits(x: Tensor, vectors: Tensor, bias: Tensor, *, start: Tensor | None = None) -> Tensor:
    """Centred bits of codes near x, (N, d) -> (N, L), by code vectors (L, d) and a bias (d,)."""
    overlap = vectors @ vectors.T
    return decide_bits((x - bias) @ vectors.T, overlap.fill_diagonal_(0), start)[0]
