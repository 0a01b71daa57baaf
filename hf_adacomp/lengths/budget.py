"""The budget of a table, the bits that all its codes may take, and the code lengths that keep it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..codes.bits import index_bits, packed_bytes

BISECTIONS = 60
"""Halvings of the interval of prices: down to the resolution of float64."""


def code_budget(num_tokens: int, dim: int, ladder: Sequence[int], codebook_bytes: int, target_ratio: float) -> int:
    """Bits available for the codes of all tokens: the size that `target_ratio` allows, less all else that is stored.

    Args:
        num_tokens: V.
        dim: Width d; the dense table takes 4 V d bytes.
        ladder: The n code lengths in bits, increasing.
        codebook_bytes: Stored bytes of all code-books.
        target_ratio: Dense bytes over stored bytes.

    Raises:
        ValueError: If not even the shortest codes fit; the message gives the largest ratio that does.
    """
    dense = 4 * num_tokens * dim
    stored = int(dense / target_ratio)
    # One byte a group for its padding.
    fixed = codebook_bytes + packed_bytes(num_tokens * index_bits(len(ladder))) + len(ladder)
    least = packed_bytes(num_tokens * ladder[0])
    if stored < fixed + least:
        raise ValueError(
            f"target_ratio={target_ratio:g} cannot be met for a table of {num_tokens} x {dim}: of the {stored} bytes "
            f"that it leaves, code-books and lengths take {fixed} and the shortest codes {least}. The largest ratio "
            f"that fits is {int(100 * dense / (fixed + least)) / 100:g}; or choose fewer or shorter code_lengths than "
            f"{tuple(ladder)}"
        )
    return 8 * (stored - fixed)


def assign_lengths(scores: Tensor, ladder: Tensor, budget: int) -> tuple[Tensor, float]:
    """The assignment of code lengths with the best total score among those that keep the budget.

    Each token takes `argmax_k scores_{w,k} - price * L_k` at the least price at which the codes fit. Where tokens tie
    at that price, the ones that gain most a bit are given the longer code, in order, as long as they fit.

    Args:
        scores: (V, n).
        ladder: (n,) code lengths in bits, increasing.
        budget: Bits available for all codes; at least V times the shortest length.

    Returns:
        The index of each token's length, (V,) int64, and the price.
    """
    scores = scores.detach().to(torch.float64)
    if not torch.isfinite(scores).all():
        raise ValueError("selection scores hold NaN or Inf: the training loss diverged; lower the learning rate")
    if len(scores) * int(ladder[0]) > budget:
        raise ValueError(f"{len(scores)} codes of at least {int(ladder[0])} bits do not fit into {budget} bits")
    bits = ladder.to(scores.dtype)

    def choose(price: float, tokens: Tensor | slice = slice(None)) -> Tensor:
        return (scores[tokens] - price * bits).argmax(dim=1)

    def used(choice: Tensor) -> int:
        return int(ladder[choice].sum())

    longer = choose(0.0)
    if used(longer) <= budget:
        return longer, 0.0
    low, high = 0.0, max(1e-30, float((scores.amax(1) - scores.amin(1)).max()))
    while used(assignment := choose(high)) > budget:
        high *= 2
    # Bisection over the price. A token never takes a longer code at a higher price, so that only those whose choices at
    # the two ends differ are looked at again.
    open_tokens = (longer != assignment).nonzero().squeeze(1)
    spare = budget - used(assignment)
    for _ in range(BISECTIONS):
        if not len(open_tokens):
            break
        middle = (low + high) / 2
        choice = choose(middle, open_tokens)
        cost = used(choice) - used(assignment[open_tokens])
        if cost > spare:
            low = middle
            longer[open_tokens] = choice
        else:
            high = middle
            assignment[open_tokens] = choice
            spare -= cost
        open_tokens = open_tokens[longer[open_tokens] != assignment[open_tokens]]
    extra = (ladder[longer] - ladder[assignment])[open_tokens]
    gain = (scores.gather(1, longer[:, None]) - scores.gather(1, assignment[:, None])).squeeze(1)[open_tokens]
    order = torch.argsort(gain / extra, descending=True, stable=True)
    upgraded = open_tokens[order[extra[order].cumsum(0) <= spare]]
    assignment[upgraded] = longer[upgraded]
    return assignment, high
