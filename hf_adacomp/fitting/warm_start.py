"""The warm start: code-books and selection costs fitted to the source table, weighted by token counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..codes.codebook import BinaryCodebook
from ..codes.descent import nearest_bits
from ..codes.rounding import round_vectors
from ..lengths.budget import assign_lengths
from .spectrum import BLOCK, binary_code_distortion, mean_and_covariance, principal_axes, squared_norms
from .token_counts import draw_tokens

FIT_ROWS = 1 << 15
FIT_ROUNDS = 16
STAGE = 64
"""Rows that a code-book is fitted to at most, rounds of encoding and least squares, and bits that start out at once."""


@torch.no_grad()
def fit_codebooks(
    codebooks: Sequence[BinaryCodebook],
    source: Tensor,
    weights: Tensor,
    metric: Tensor,
    budget: int,
    seed: int,
    show_progress: bool = True,
) -> Tensor:
    """Fit the code-books in place and return the weighted distortion of each token under each of them.

    Lengths and code-books need each other: a book is fitted to the tokens assigned to it, and tokens are assigned
    by what the books lose on them. The assignment that the books are fitted to takes what the table's spectrum
    predicts of them.

    Args:
        codebooks: One a code length, increasing.
        source: The table, (V, d).
        weights: What each token weighs, (V,) float32: `hf_adacomp.fitting.token_counts`.
        metric: What errors are measured in, M (d, d), positive definite.
        budget: Bits available for all codes together.
        seed: Seed of the random rotation and of the sampled batches.
        show_progress: Whether to draw a progress bar.

    Returns:
        `weight_w (x_w - xhat_{w,k})^T M (x_w - xhat_{w,k})`, (V, n) float32.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    x = source.detach().to(torch.float32)
    ladder = torch.tensor([book.length for book in codebooks], device=x.device)
    metric = metric.detach().to(torch.float32)
    mean, covariance = mean_and_covariance(x, weights)
    root = _root(metric)
    seen: Tensor = torch.linalg.eigvalsh(root.T @ covariance @ root).flip(0).clamp_min(0)  # variances in the metric
    bound = torch.stack([binary_code_distortion(seen, book.length) for book in codebooks])
    energies = torch.cat([squared_norms(rows - mean.to(x), metric) for rows in x.split(BLOCK)])
    cost = (weights * energies)[:, None] * (bound / seen.sum().clamp_min(1e-30)).to(x)
    assignment, _ = assign_lengths(-cost, ladder, budget)
    for k, book in enumerate(tqdm(codebooks, desc="Fitting code-books", disable=not show_progress)):
        members = (assignment == k).nonzero().squeeze(1)
        if len(members) < 2 * book.length:  # too few to carry the book alone: let the whole table help
            members = torch.arange(len(x), device=x.device)
        drawn = len(members) > FIT_ROWS
        if drawn:
            members = members[draw_tokens(weights[members], FIT_ROWS, generator)]
        own = torch.ones_like(weights[members]) if drawn else weights[members]
        fit_codebook(book, x[members], own, metric, generator)
        stored = book.stored()
        encoder = book.encoder(stored, metric)
        for rows, out in zip(source.split(book.block), cost[:, k].split(book.block), strict=True):
            decoded = stored.decode(encoder.encode(rows))
            out.copy_(squared_norms(rows.float() - decoded.float(), metric))
        cost[:, k] *= weights
    return cost


@torch.no_grad()
def fit_codebook(book: BinaryCodebook, x: Tensor, weights: Tensor, metric: Tensor, generator: torch.Generator) -> None:
    """Fit one code-book to the vectors x (N, d) under `weights` (N,): encoding and least squares in turn.

    Given bits, the code vectors and the bias follow in closed form, whatever the metric (d, d); given those, the
    encoder descends over the bits.
    """
    blocks, parts = x.split(book.block), weights.split(book.block)
    vectors, bias = _least_squares(_first_bits(x, weights, metric, book, generator).split(book.block), blocks, parts)
    for _ in range(FIT_ROUNDS):
        bits = (nearest_bits(rows, vectors, bias, metric=metric) for rows in blocks)
        vectors, bias = _least_squares(bits, blocks, parts)
    rounded = round_vectors(vectors, book.storage)
    left = torch.zeros_like(bias)
    for rows, part in zip(blocks, parts, strict=True):
        left += part @ (rows - nearest_bits(rows, rounded, bias, metric=metric) @ rounded)
    # Drives of about unit size: gradients pass the step where a bit is near its threshold.
    readers = vectors @ metric
    _, covariance = mean_and_covariance(x, weights)
    scale = 1 / squared_norms(readers, covariance.to(x)).mean().clamp_min(1e-24).sqrt()
    book.set_vectors(vectors)
    book.bias.copy_(left / weights.sum())
    book.encoder_scale.copy_(scale)
    book.encoder_bias.zero_()
    if not book.tied:
        book.encoder_weight.copy_(scale * readers)
        book.encoder_bias.copy_(-scale * (readers @ book.bias.to(readers) + (readers * vectors).sum(1) / 2))


def _first_bits(x: Tensor, weights: Tensor, metric: Tensor, book: BinaryCodebook, generator: torch.Generator) -> Tensor:
    """Bits to start from, bool (N, L): in stages, signs of what is left, along its randomly rotated principal axes.

    Rotated axes carry equal variance, so that all bits of a stage tell alike (Gong and Lazebnik 2011); later stages
    refine the directions that earlier ones left the largest errors in.
    """
    left = x @ _root(metric).to(x)  # where the metric is the Euclidean one
    bits = torch.empty(len(x), book.length, dtype=torch.bool, device=x.device)
    for stage in bits.split(STAGE, dim=1):
        mean, axes, _ = principal_axes(left, weights)
        rank = min(stage.shape[1], x.shape[1])
        rotation = torch.linalg.qr(torch.randn(stage.shape[1], rank, generator=generator))[0].to(x.device)
        directions = axes[:, :rank] @ rotation.T
        torch.gt(left @ directions, mean @ directions, out=stage)
        vectors, bias = _least_squares(*(rows.split(book.block) for rows in (stage, left, weights)))
        left.sub_(bias).addmm_(stage.to(x.dtype), vectors, alpha=-1)
    return bits


def _least_squares(bits: Iterable[Tensor], x: Iterable[Tensor], weights: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Code vectors (L, d) and bias (d,) that minimise the weighted error of `bits @ C + c`, slightly ridged.

    Bits, vectors x and weights come in blocks of the same rows.
    """
    gram, moments = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for chosen, rows, part in zip(bits, x, weights, strict=True):
        design = F.pad(chosen.to(rows.dtype), (0, 1), value=1)
        weighted = (design * part[:, None]).T
        gram = gram + (weighted @ design).to(gram)
        moments = moments + (weighted @ rows).to(moments)
    ridge = (1e-3 * gram.diagonal().mean()).repeat(len(gram))
    ridge[-1] = 0  # of the bias
    solution = torch.linalg.solve(gram + ridge.diag(), moments).to(rows)
    return solution[:-1], solution[-1]


def _root(metric: Tensor) -> Tensor:
    """R with `R R^T = M`, float64 on the CPU."""
    root: Tensor = torch.linalg.cholesky(metric.to("cpu", torch.float64))
    return root
