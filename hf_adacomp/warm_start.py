"""The warm start: code-books and selection costs fitted to the source table, weighted by token counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from .budget import assign_lengths
from .codebook import BinaryCodebook
from .rate_distortion import binary_code_distortion, principal_axes
from .token_counts import expected_counts, token_weights

FIT_STEPS = 1200
FIT_BATCH = 512
FIT_LEARNING_RATE = 0.01
ROUNDS = 1


def warm_start(
    codebooks: Sequence[BinaryCodebook],
    source: Tensor,
    counts: Tensor,
    code_bits: int,
    seed: int,
    show_progress: bool = True,
) -> Tensor:
    """Fit the code-books in place and return the weighted distortion of each token under each of them.

    Lengths and code-books need each other: a book is fitted to the tokens assigned to it, and tokens are assigned
    by what the books lose on them. The first assignment takes what the table's spectrum predicts in place of the
    books; then the two alternate.

    Args:
        codebooks: One a code length, increasing.
        source: The table, (V, d).
        counts: Occurrences of each token in the training data, (V,).
        code_bits: Bits available for all codes together.
        seed: Seed of the random rotation and of the sampled batches.
        show_progress: Whether to draw a progress bar.

    Returns:
        `weight_w |x_w - xhat_{w,k}|^2`, (V, n) float32.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    x = source.detach().to(torch.float32)
    weights = token_weights(expected_counts(counts.to(x.device), x))
    lengths = torch.tensor([book.length for book in codebooks], device=x.device)
    mean, _, variances = principal_axes(x, weights)
    bound = torch.stack([binary_code_distortion(variances, book.length) for book in codebooks])
    cost = (weights * (x - mean).square().sum(1))[:, None] * (bound / variances.sum().clamp_min(1e-30))
    with tqdm(total=ROUNDS * len(codebooks), desc="Fitting code-books", disable=not show_progress) as progress:
        for _ in range(ROUNDS):
            assignment, _ = assign_lengths(-cost, lengths, code_bits)
            for k, book in enumerate(codebooks):
                members = (assignment == k).nonzero().squeeze(1)
                if len(members) < 2 * book.length:  # too few to carry the book alone: let the whole table help
                    members = torch.arange(len(x), device=x.device)
                fit_codebook(book, x[members], weights[members], generator)
                reconstruction = book.reconstruct(source).to(torch.float32)
                cost[:, k] = weights * (x - reconstruction).square().sum(1)
                progress.update()
    return cost


def fit_codebook(book: BinaryCodebook, x: Tensor, weights: Tensor, generator: torch.Generator) -> None:
    """Fit one code-book to the vectors x (N, d) under `weights` (N,): rotated principal axes, least squares, Adam.

    The projections on randomly rotated principal axes carry equal variance, so that their signs are good first
    bits (Gong and Lazebnik 2011); code vectors and bias follow in closed form; a few hundred weighted
    reconstruction steps then train encoder and decoder together.
    """
    mean, axes, variances = principal_axes(x, weights)
    unit = variances.mean().sqrt().clamp_min(1e-12)  # fit in units of the table's own scale
    x = (x - mean) / unit
    rank = min(book.length, x.shape[1])
    rotation = torch.linalg.qr(torch.randn(book.length, rank, generator=generator))[0].to(x.device)
    projection = rotation @ axes[:, :rank].T
    projection = projection / (x @ projection.T).std(0, correction=0).clamp_min(1e-6)[:, None]
    vectors, bias = _least_squares((x @ projection.T > 0).to(x.dtype), x, weights)

    with torch.random.fork_rng(devices=[]):  # initial values are overwritten: training shall not notice them
        fitted = BinaryCodebook(
            book.length, book.dim, tied=book.tied, storage=book.storage, device=x.device, dtype=torch.float32
        )
    with torch.no_grad():
        fitted.weight.copy_(vectors)
        fitted.bias.copy_(bias)
        if book.tied:
            # A bit pays when |x - c - C_i|^2 < |x - c|^2 on its own, i.e. C_i (x - c) > |C_i|^2 / 2.
            deviation = (x @ vectors.T).std().clamp_min(1e-6)
            fitted.encoder_scale.copy_(1 / deviation)
            fitted.encoder_bias.copy_(-(vectors @ bias + vectors.square().sum(1) / 2) / deviation)
        else:
            fitted.encoder_weight.copy_(projection)
    trainable = [p for p in fitted.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=FIT_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=FIT_STEPS)
    for _ in range(FIT_STEPS):
        batch = x[torch.multinomial(weights.cpu(), FIT_BATCH, replacement=True, generator=generator).to(x.device)]
        with torch.enable_grad():  # the caller may be in no_grad, as `pack` is
            loss = F.mse_loss(fitted.decode(fitted.encode(batch)), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        vectors, bias = _least_squares(fitted.encode(x), x, weights) if not book.tied else (fitted.weight, fitted.bias)
        # Back to the table's units: x_table = unit * x + mean.
        book.weight.copy_(vectors * unit)
        book.bias.copy_(bias * unit + mean)
        if book.tied:
            book.encoder_scale.copy_(fitted.encoder_scale / unit**2)
            book.encoder_bias.copy_(fitted.encoder_bias - fitted.encoder_scale * (vectors @ mean) / unit)
        else:
            book.encoder_weight.copy_(fitted.encoder_weight / unit)
            book.encoder_bias.copy_(fitted.encoder_bias - fitted.encoder_weight @ mean / unit)


def _least_squares(bits: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Code vectors (L, d) and bias (d,) that minimise the weighted error of `bits @ C + c`, slightly ridged."""
    design = torch.cat([bits, torch.ones_like(bits[:, :1])], dim=1)
    weighted = design * weights[:, None]
    gram = weighted.T @ design
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    solution = torch.linalg.solve(gram + ridge, weighted.T @ x)
    return solution[:-1], solution[-1]
