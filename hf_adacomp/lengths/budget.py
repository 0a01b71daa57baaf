"""The budget of a table, the bits that all its codes may take, and the code lengths that keep it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import torch_compat
from ..codes.bits import index_bits, packed_bytes

BISECTIONS = 60
"""Halvings of the interval of prices: down to the resolution of float64."""

NEAR = 0.02
"""How far from a guess the price is looked for first, as a share of it: a step of training moves it by less."""


class TargetRatioError(ValueError):
    """A table cannot be made as small as was asked for.

    Args:
        message: What was asked for.
        fitting: Stored bytes of the smallest table that can be made.
    """

    def __init__(self, message: str, fitting: int) -> None:
        super().__init__(message, fitting)
        self.message, self.fitting = message, fitting

    def __str__(self) -> str:
        return self.message


def code_budget(num_tokens: int, dim: int, ladder: Sequence[int], codebook_bytes: int, target_ratio: float) -> int:
    """Bits available for the codes of all tokens: the size that `target_ratio` allows, less all else that is stored.

    Args:
        num_tokens: V.
        dim: Width d; the dense table takes 4 V d bytes.
        ladder: The n code lengths in bits, increasing.
        codebook_bytes: Stored bytes of the code-book.
        target_ratio: Dense bytes over stored bytes.

    Raises:
        TargetRatioError: If not even the shortest codes fit; the message gives the largest ratio that does.
    """
    dense = 4 * num_tokens * dim
    stored = int(dense / target_ratio)
    # One byte a group for its padding.
    fixed = codebook_bytes + packed_bytes(num_tokens * index_bits(len(ladder))) + len(ladder)
    least = packed_bytes(num_tokens * ladder[0])
    if stored < fixed + least:
        raise TargetRatioError(
            f"target_ratio={target_ratio:g} cannot be met for a table of {num_tokens} x {dim}: of the {stored} bytes "
            f"that it leaves, code-book and lengths take {fixed} and the shortest codes {least}. The largest ratio "
            f"that fits is {int(100 * dense / (fixed + least)) / 100:g}; or choose fewer or shorter code_lengths than "
            f"{tuple(ladder)}",
            fixed + least,
        )
    return 8 * (stored - fixed)


def assign_lengths(scores: Tensor, ladder: Tensor, budget: int, guess: float = 0.0) -> tuple[Tensor, float]:
    """The assignment of code lengths with the best total score among those that keep the budget.

    Each token takes `argmax_k scores_{w,k} - price * L_k` at the least price at which the codes fit. Where tokens tie
    at that price, the ones that gain most a bit are given the longer code, in order, as long as they fit.

    Args:
        scores: (V, n).
        ladder: (n,) code lengths in bits, increasing.
        budget: Bits available for all codes; at least V times the shortest length.
        guess: A price near the one to be found, which is then found faster; 0 if none is known.

    Returns:
        The index of each token's length, (V,) int64, and the price.
    """
    if not torch.isfinite(scores).all():
        raise ValueError("selection scores hold NaN or Inf: the training loss diverged; lower the learning rate")
    if len(scores) * int(ladder[0]) > budget:
        raise ValueError(f"{len(scores)} codes of at least {int(ladder[0])} bits do not fit into {budget} bits")
    columns = torch_compat.as_float64(scores.detach()).T.contiguous()
    device, ladder, lengths = scores.device, ladder.to(columns.device), ladder.tolist()

    def choose(price: float, columns: Tensor = columns) -> Tensor:
        best, choice = columns[0] - price * lengths[0], torch.zeros_like(columns[0], dtype=torch.int64)
        for k, length in enumerate(lengths[1:], 1):  # argmax over so few is slower
            value = columns[k] - price * length
            choice.masked_fill_(value > best, k)
            best = torch.maximum(best, value)
        return choice

    def used(choice: Tensor) -> int:
        return int(ladder[choice].sum())

    # An interval of prices: codes are too long at `low` (choices `longer`), and fit at `high` (`assignment`).
    low, high = guess * (1 - NEAR), guess * (1 + NEAR) or max(1e-30, float((columns.amax(0) - columns.amin(0)).max()))
    while used(longer := choose(low)) <= budget:
        if low == 0:
            return longer.to(device), 0.0
        low, high = (low / 2 if low > 1e-30 else 0.0), low
    while used(assignment := choose(high)) > budget:
        low, high, longer = high, 2 * high, assignment
    # Bisection, on the CPU: each step asks for a sum. A token never takes a longer code at a higher price, so that only
    # those whose choices at the two ends differ are looked at again.
    differing = (longer != assignment).nonzero().squeeze(1)
    spare = budget - used(assignment)
    columns, longer, shorter = columns[:, differing].cpu(), longer[differing].cpu(), assignment[differing].cpu()
    ladder, open_tokens = ladder.cpu(), torch.arange(len(differing), device="cpu")
    for _ in range(BISECTIONS):
        if not len(open_tokens):
            break
        middle = (low + high) / 2
        choice = choose(middle, columns[:, open_tokens])
        cost = used(choice) - used(shorter[open_tokens])
        if cost > spare:
            low = middle
            longer[open_tokens] = choice
        else:
            high = middle
            shorter[open_tokens] = choice
            spare -= cost
        open_tokens = open_tokens[longer[open_tokens] != shorter[open_tokens]]
    ends = longer[open_tokens], shorter[open_tokens]
    extra = ladder[ends[0]] - ladder[ends[1]]
    gain = columns[ends[0], open_tokens] - columns[ends[1], open_tokens]
    order = torch.argsort(gain / extra, descending=True, stable=True)
    upgraded = order[extra[order].cumsum(0) <= spare]
    shorter[open_tokens[upgraded]] = ends[0][upgraded]
    assignment[differing] = shorter.to(assignment.device)
    return assignment.to(device), high
