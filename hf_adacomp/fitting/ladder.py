"""The ladder: the code lengths on offer. `code_lengths="auto"` asks for those that fit a table and its size best."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from ..codes.rounding import codebook_bytes
from ..config import AUTO, AdaCompConfig
from ..lengths.budget import TargetRatioError, assign_lengths, code_budget
from .spectrum import binary_code_distortion, principal_axes
from .token_counts import checked_counts, fit_weights, token_weights, typical_counts

SHORTEST = (4, 8, 16, 32, 64)
LONGEST = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
SIZES = (1, 8)
"""Candidates: one length, or up to eight in about equal ratios, whole bytes above 8 bits."""

SPECTRUM_ROWS = 1 << 15
SAMPLED_TOKENS = 1 << 12
"""Rows that the spectrum is taken from, and tokens that stand for all in a trial assignment."""


def with_ladder_for(source: Tensor, config: AdaCompConfig, token_counts: Tensor | None = None) -> AdaCompConfig:
    """`config` with the ladder for a table (V, d) and its counts (V,), unless it has one; ValueError without values."""
    if config.code_lengths != AUTO:
        return config
    if source.is_meta:
        raise ValueError(
            'code_lengths="auto" follow from the values of the table, which the meta device does not hold: give '
            "code_lengths, or compress the model once its weights are loaded"
        )
    nothing = torch.zeros(len(source), dtype=torch.int64, device="cpu")
    counts = nothing if token_counts is None else checked_counts(token_counts, len(source))
    return config.with_ladder(choose_ladder(source, counts, config))


def choose_ladder(source: Tensor, token_counts: Tensor, config: AdaCompConfig) -> tuple[int, ...]:
    """The ladder of code lengths with about the least expected distortion at `config.target_ratio`.

    Long codes need a large code-book, which small tables cannot pay for: each candidate is charged its code-book and
    length indices, the rest is shared out among the tokens as the warm start will do it, and the distortion of each
    code follows from the spectrum of the table. Nothing is fitted; a second for a table of any size.

    Args:
        source: The table, (V, d).
        token_counts: Occurrences of each token, (V,); all zero if unknown: `typical_counts` then.
        config: The settings; its `code_lengths` are ignored.

    Raises:
        TargetRatioError: If no ladder fits the size; the message gives the largest ratio that does.
    """
    num_tokens, dim = source.shape
    counts = token_counts if token_counts.any() else typical_counts(num_tokens)
    weights = fit_weights(token_weights(counts.to(source.device, torch.float32) + 0.5))
    rows = slice(None, None, -(-num_tokens // SPECTRUM_ROWS))
    mean, _, variances = principal_axes(source[rows].detach().to(torch.float32), weights[rows])
    variances = variances.cpu()
    ladders = _ladders(dim)
    energies = torch.cat([(block.float() - mean).square().sum(1) for block in source.detach().split(SPECTRUM_ROWS)])
    costs = (weights * energies).sort().values.cpu()
    places = torch.linspace(0, num_tokens - 1, min(num_tokens, SAMPLED_TOKENS), dtype=torch.float32, device="cpu")
    costs = costs[places.long().clamp_max(num_tokens - 1)]  # float32 rounds the last of many millions up
    share = {
        length: binary_code_distortion(variances, length) / variances.sum().clamp_min(1e-30)
        for length in {length for ladder in ladders for length in ladder}
    }

    def expected_distortion(ladder: tuple[int, ...]) -> float:
        book = codebook_bytes(ladder[-1], dim, config.codebook_dtype, source.dtype)
        budget = code_budget(num_tokens, dim, ladder, book, config.target_ratio)
        cost = costs[:, None] * torch.stack([share[length] for length in ladder])
        assignment, _ = assign_lengths(-cost, torch.tensor(ladder, device="cpu"), budget * len(costs) // num_tokens)
        return float(cost.gather(1, assignment[:, None]).sum())

    distortions = {}
    for ladder in ladders:
        try:
            distortions[ladder] = expected_distortion(ladder)
        except TargetRatioError as error:
            refusal = error
    if not distortions:
        raise refusal
    return min(distortions, key=lambda ladder: distortions[ladder])


def _ladders(dim: int) -> list[tuple[int, ...]]:
    """Candidate ladders, the cheapest code-book last."""
    longest = [length for length in LONGEST if length <= 4 * dim] or [min(LONGEST)]
    ladders = {_ladder(first, last, size) for first, last, size in product(SHORTEST, longest, SIZES)}
    return sorted(ladders, key=lambda ladder: (ladder[-1], ladder), reverse=True)


def _ladder(shortest: int, longest: int, size: int) -> tuple[int, ...]:
    """Up to `size` lengths between two ends in equal ratios, rounded to 4 bits, above 8 to whole bytes."""
    if size == 1 or longest <= shortest:
        return (longest,)
    ideal = (shortest * (longest / shortest) ** (i / (size - 1)) for i in range(size))
    return tuple(sorted({8 * round(x / 8) if x >= 8 else 4 * round(x / 4) for x in ideal}))
