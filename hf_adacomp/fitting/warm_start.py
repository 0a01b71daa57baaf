"""The warm start: the code-book and selection costs fitted to the source table, weighted by token counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import trange

from ..codes.codebook import BinaryCodebook, Encoder
from ..codes.rounding import round_vectors
from ..lengths.budget import assign_lengths
from .spectrum import BLOCK, binary_code_distortion, mean_and_covariance, principal_axes, squared_norms
from .token_counts import draw_tokens, fit_weights

FIT_ROWS = 1 << 15
LONGEST_ROUNDS, FIT_ROUNDS = 6, 16
"""Rows that the code-book is fitted to at most, and rounds of encoding and least squares: for the longest codes, for
all."""

MEASURE_EVERY = 4
MEASURED_ROWS = 1 << 12
MEASURED_LENGTHS = 2
"""Rounds after which lengths are weighed up again, rows by which that is done, and steps on the ladder, to both sides
of a token's length, that errors are measured for in the end."""

SORTED_ROWS = 1 << 10
STAGE = 64
"""Rows of about one length that are encoded at once, and bits that start out at once."""


@torch.no_grad()
def fit_codebook(
    book: BinaryCodebook,
    ladder: Sequence[int],
    source: Tensor,
    weights: Tensor,
    metric: Tensor,
    budget: int,
    seed: int,
    show_progress: bool = True,
) -> Tensor:
    """Fit the code-book in place and return the weighted distortion of each token under each code length.

    First all its vectors are fitted to the tokens that will have the longest codes, and sorted by what they explain;
    then, to all tokens in codes of their own lengths. Lengths and code vectors need each other: meanwhile, lengths are
    those that keep the budget if a length loses the same share of each vector, as measured so far.

    Args:
        book: The code-book.
        ladder: The n code lengths, increasing; the last is that of the code-book.
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
    lengths = torch.tensor(ladder, device=source.device)
    metric = metric.detach().to(torch.float32)
    source = source.detach()
    energies, share = _spectrum(source, weights, metric, ladder)
    assignment = _assigned(weights * energies, share, lengths, budget)

    longest = (assignment == len(ladder) - 1).nonzero().squeeze(1)
    if len(longest) < 2 * book.length:  # too few to carry it alone
        longest = torch.arange(len(source), device=source.device)
    tokens, own = _drawn(longest, weights, generator)
    encoder, vectors, bias = _fitted_to_longest(book, source[tokens].float(), own, metric, generator, show_progress)

    tokens, own = _drawn(torch.arange(len(source), device=source.device), weights, generator)
    x = source[tokens].float()
    for step in trange(FIT_ROUNDS, desc="Fitting all code lengths", disable=not show_progress):
        if step % MEASURE_EVERY == 0:
            share = _lost(encoder, vectors, bias, x[:: -(-len(x) // MEASURED_ROWS)], metric, ladder)
            assignment = _assigned(weights * energies, share, lengths, budget)
            order = assignment[tokens].argsort(stable=True)  # rows of a block have codes of about one length
            tokens, own = tokens[order], own[order]
            x = source[tokens].float()
            chosen = lengths[assignment[tokens]]
            blocks, parts, sizes = (rows.split(SORTED_ROWS) for rows in (x, own, chosen))
        bits = (encoder.encode_each(rows, size, int(size[-1])) for rows, size in zip(blocks, sizes, strict=True))
        vectors, bias = _least_squares(bits, blocks, parts, (book.length, book.dim))
        encoder = Encoder.tied(vectors @ metric, vectors, bias)
    _take_over(book, vectors, bias, x, own, chosen, metric)
    return _distortions(book, ladder, source, metric, assignment, energies[:, None] * share) * weights[:, None]


def _spectrum(source: Tensor, weights: Tensor, metric: Tensor, ladder: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Squared norm of each vector about the mean, (V,), and the share of it that each length should lose, (n,)."""
    mean, covariance = mean_and_covariance(source.float(), weights)
    root = _root(metric)
    seen: Tensor = torch.linalg.eigvalsh(root.T @ covariance @ root).flip(0).clamp_min(0)  # variances in the metric
    bound = torch.stack([binary_code_distortion(seen, length) for length in ladder])
    energies = torch.cat([squared_norms(rows.float() - mean.to(metric), metric) for rows in source.split(BLOCK)])
    return energies, (bound / seen.sum().clamp_min(1e-30)).to(metric)


def _assigned(weighted: Tensor, share: Tensor, lengths: Tensor, budget: int) -> Tensor:
    """Length indices that keep the budget, (V,), if lengths lose these shares of all weighted energies."""
    return assign_lengths(-weighted[:, None] * share, lengths, budget)[0]


def _drawn(tokens: Tensor, weights: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Those of the tokens, (N,), that a fit looks at, and what they weigh in it."""
    weights = fit_weights(weights[tokens])
    if len(tokens) <= FIT_ROWS:
        return tokens, weights
    drawn = tokens[draw_tokens(weights, FIT_ROWS, generator)]
    return drawn, torch.ones_like(drawn, dtype=weights.dtype)


def _fitted_to_longest(
    book: BinaryCodebook, x: Tensor, weights: Tensor, metric: Tensor, generator: torch.Generator, show_progress: bool
) -> tuple[Encoder, Tensor, Tensor]:
    """Code vectors and bias fitted to x (N, d) in codes of full length; the vectors that explain most come first."""
    blocks, parts = x.split(book.block), weights.split(book.block)
    first = _first_bits(x, weights, metric, book, generator).split(book.block)
    centred = (rows.to(x.dtype).sub_(0.5) for rows in first)
    vectors, bias = _least_squares(centred, blocks, parts, (book.length, book.dim))
    for _ in trange(LONGEST_ROUNDS, desc="Fitting the longest codes", disable=not show_progress):
        encoder = Encoder.tied(vectors @ metric, vectors, bias)
        vectors, bias = _least_squares(
            (encoder.encode(rows) for rows in blocks), blocks, parts, (book.length, book.dim)
        )
    encoder = Encoder.tied(vectors @ metric, vectors, bias)
    share = weights / weights.sum()
    means = sum((part @ encoder.encode(rows) for rows, part in zip(blocks, share.split(book.block), strict=True)))
    explained = (0.25 - means.square()) * squared_norms(vectors, metric)
    vectors = vectors[explained.argsort(descending=True)]
    return Encoder.tied(vectors @ metric, vectors, bias), vectors, bias


def _lost(encoder: Encoder, vectors: Tensor, bias: Tensor, x: Tensor, metric: Tensor, ladder: Sequence[int]) -> Tensor:
    """The share of the squared norms of x (N, d) about the mean that codes of each length lose, (n,)."""
    energy = squared_norms(x - x.mean(dim=0), metric).sum().clamp_min(1e-30)
    return (
        torch.stack(
            [squared_norms(x - bias - encoder.encode(x, length) @ vectors[:length], metric).sum() for length in ladder]
        )
        / energy
    )


def _take_over(
    book: BinaryCodebook, vectors: Tensor, bias: Tensor, x: Tensor, weights: Tensor, lengths: Tensor, metric: Tensor
) -> None:
    """Set the code-book to vectors and a bias that makes up for their rounding; the encoder follows."""
    rounded = round_vectors(vectors, book.storage)
    encoder = Encoder.tied(rounded @ metric, rounded, bias)
    left = torch.zeros_like(bias)
    for rows, part, own in zip(*(each.split(book.block) for each in (x, weights, lengths)), strict=True):
        left += part @ (rows - encoder.encode_each(rows, own, book.length) @ rounded)
    # Drives of about unit size: gradients pass the step where a bit is near its threshold.
    readers = vectors @ metric
    _, covariance = mean_and_covariance(x, weights)
    scale = 1 / squared_norms(readers, covariance.to(x)).mean().clamp_min(1e-24).sqrt()
    book.take_over(vectors, left / weights.sum())
    book.encoder_scale.copy_(scale)
    book.encoder_bias.zero_()
    if not book.tied:
        book.encoder_weight.copy_(scale * readers)
        book.encoder_bias.copy_(-scale * (readers @ book.bias.to(readers)))


def _distortions(
    book: BinaryCodebook, ladder: Sequence[int], source: Tensor, metric: Tensor, assignment: Tensor, expected: Tensor
) -> Tensor:
    """Squared error in the metric of each vector in codes of each length, (V, n) float32, as they will be decoded.

    Measured for lengths near the one that a token has in `assignment`, (V,). Further away, where few tokens ever come
    and long codes take long to find, it is what was expected, (V, n), times the factor of the nearest measured one.
    """
    stored = book.stored()
    encoder = book.encoder(stored, metric)
    found = expected.clone()
    for k, length in enumerate(ladder):
        for tokens in ((assignment - k).abs() <= MEASURED_LENGTHS).nonzero().squeeze(1).split(book.block):
            rows = source[tokens]
            error = rows.float() - stored.decode(encoder.encode(rows, length)).float()
            found[tokens, k] = squared_norms(error, metric)
    all_lengths = torch.arange(len(ladder), device=source.device)
    low, high = assignment[:, None] - MEASURED_LENGTHS, assignment[:, None] + MEASURED_LENGTHS
    nearest = all_lengths.maximum(low).minimum(high)
    factor = (found / expected.clamp_min(1e-30)).gather(1, nearest)
    return torch.where(nearest == all_lengths, found, expected * factor)


def _first_bits(x: Tensor, weights: Tensor, metric: Tensor, book: BinaryCodebook, generator: torch.Generator) -> Tensor:
    """Bits to start from, bool (N, L): in stages, signs of what is left, along its randomly rotated principal axes.

    Rotated axes carry equal variance, so that all bits of a stage tell alike (Gong and Lazebnik 2011); later stages
    refine the directions that earlier ones left the largest errors in.
    """
    left = x @ _root(metric).to(x)  # where the metric is the Euclidean one
    bits = torch.empty(len(x), book.length, device=x.device, dtype=torch.bool)
    for stage in bits.split(STAGE, dim=1):
        mean, axes, _ = principal_axes(left, weights)
        rank = min(stage.shape[1], x.shape[1])
        noise = torch.randn(stage.shape[1], rank, generator=generator, dtype=torch.float32, device="cpu")
        directions = axes[:, :rank] @ torch.linalg.qr(noise)[0].to(x.device).T
        stage.copy_(left @ directions > mean @ directions)
        centred = stage.to(x.dtype).sub_(0.5)
        signs, rows, parts = (each.split(book.block) for each in (centred, left, weights))
        vectors, bias = _least_squares(signs, rows, parts, (stage.shape[1], book.dim))
        left.sub_(bias).addmm_(centred, vectors, alpha=-1)
    return bits


def _least_squares(
    bits: Iterable[Tensor], x: Iterable[Tensor], weights: Iterable[Tensor], shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Code vectors of a shape (L, d) and bias (d,) that minimise the weighted error of `bits @ C + c`, slightly ridged.

    Centred bits, vectors x and weights come in blocks of the same rows; codes of a block may all be shorter than L.
    """
    length, dim = shape
    gram, moments = (torch.zeros(length + 1, w, dtype=torch.float64, device="cpu") for w in (length + 1, dim))
    for chosen, rows, part in zip(bits, x, weights, strict=True):
        design = F.pad(chosen, (1, 0), value=1)  # the first column is the bias's
        weighted = (design * part[:, None]).T
        used = len(weighted)
        gram[:used, :used] += (weighted @ design).to(gram)
        moments[:used] += (weighted @ rows).to(moments)
    ridge = (1e-3 * gram.diagonal().mean()).repeat(len(gram))
    ridge[0] = 0
    solution = torch.linalg.solve(gram + ridge.diag(), moments).to(rows)
    return solution[1:], solution[0]


def _root(metric: Tensor) -> Tensor:
    """R with `R R^T = M`, float64 on the CPU."""
    root: Tensor = torch.linalg.cholesky(metric.to("cpu", torch.float64))
    return root
