"""The size of a compressed table, and the code lengths that meet it, as pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import packing


def code_bits(num_tokens: int, dim: int, code_lengths: Sequence[int], codebook_bytes: int, target_ratio: float) -> int:
    """Bits available for the codes of all tokens: the size that `target_ratio` allows, less all else that is stored.

    Args:
        num_tokens: V.
        dim: Width d; the dense table takes 4 V d bytes.
        code_lengths: The n lengths in bits, increasing.
        codebook_bytes: Stored bytes of all code-books.
        target_ratio: Dense bytes over stored bytes.

    Raises:
        ValueError: If not even the shortest codes fit; the message gives the largest ratio that does.
    """
    dense = 4 * num_tokens * dim
    stored = int(dense / target_ratio)
    # One byte a group for its padding.
    fixed = (
        codebook_bytes + packing.packed_bytes(num_tokens * packing.index_bits(len(code_lengths))) + len(code_lengths)
    )
    least = packing.packed_bytes(num_tokens * code_lengths[0])
    if stored < fixed + least:
        raise ValueError(
            f"target_ratio={target_ratio:g} cannot be met for a table of {num_tokens} x {dim}: of the {stored} bytes "
            f"that it leaves, code-books and lengths take {fixed} and the shortest codes {least}. The largest ratio "
            f"that fits is {int(100 * dense / (fixed + least)) / 100:g}; or choose fewer or shorter code_lengths than "
            f"{tuple(code_lengths)}"
        )
    return 8 * (stored - fixed)


def assign_lengths(scores: Tensor, lengths: Tensor, code_bits: int) -> tuple[Tensor, float]:
    """The assignment of code lengths with the best total score among those that fit `code_bits`.

    Each token takes `argmax_k scores_{w,k} - price * L_k` at the least price at which the codes fit. Where tokens tie
    at that price, the ones that gain most a bit are given the longer code, in order, as long as they fit.

    Args:
        scores: (V, n).
        lengths: (n,) bits, increasing.
        code_bits: Bits available for all codes; at least V times the shortest length.

    Returns:
        The index of each token's length, (V,) int64, and the price.
    """
    scores = scores.detach().to(torch.float64)
    bits = lengths.to(scores.dtype)

    def choose(price: float) -> Tensor:
        return (scores - price * bits).argmax(dim=1)

    def used(assignment: Tensor) -> int:
        return int(lengths[assignment].sum())

    if not torch.isfinite(scores).all():
        raise ValueError("selection scores hold NaN or Inf: the training loss diverged; lower the learning rate")
    if len(scores) * int(lengths[0]) > code_bits:
        raise ValueError(f"{len(scores)} codes of at least {int(lengths[0])} bits do not fit into {code_bits} bits")
    longer = choose(0.0)
    if used(longer) <= code_bits:
        return longer, 0.0
    low, high = 0.0, max(1e-30, float((scores.amax(1) - scores.amin(1)).max()))
    while used(choose(high)) > code_bits:  # gaps in bits may be below one
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if used(choose(middle)) > code_bits else (low, middle)
    longer, assignment = choose(low), choose(high)
    ties = (longer != assignment).nonzero().squeeze(1)
    extra = (lengths[longer] - lengths[assignment])[ties]
    gain = scores[ties, longer[ties]] - scores[ties, assignment[ties]]
    order = torch.argsort(gain / extra, descending=True, stable=True)
    fits = extra[order].cumsum(0) <= code_bits - used(assignment)
    upgraded = ties[order[fits]]
    assignment[upgraded] = longer[upgraded]
    return assignment, high
