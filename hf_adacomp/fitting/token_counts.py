"""Token counts: checked, smoothed, and what a token weighs by its count."""

from __future__ import annotations

import torch
from torch import Tensor

OCCURRENCES = 4
"""Of the most frequent token, by guess: so many times V over its rank."""

MOST_OCCURRENCES = 2.0**63
"""Of a token, in int64."""

FITTED_TOKENS = 1 << 15
LARGEST_COUNT = 20.0
LARGEST_LOG_RATE = 6.0
RIDGE = 1e-3
"""Of the regression of counts: tokens it is fitted to, bounds that keep a few frequent ones from ruling it, penalty."""


def checked_counts(token_counts: Tensor, num_embeddings: int) -> Tensor:
    """The counts as int64, (V,); ValueError for another shape, negative or non-finite ones, and what is no tensor."""
    try:
        counts = torch.as_tensor(token_counts)
    except (TypeError, ValueError, RuntimeError) as error:
        given = type(token_counts).__name__
        raise ValueError(f"token_counts must be a tensor ({num_embeddings},); got a {given}: {error}") from error
    if counts.is_complex() or counts.is_meta or counts.layout != torch.strided:
        raise ValueError(
            f"token_counts must be a dense tensor of whole numbers; got {counts.dtype}, {counts.layout} on "
            f"{counts.device}"
        )
    counts = counts if counts.is_floating_point() else counts.to(torch.int64)
    if counts.shape != (num_embeddings,):
        raise ValueError(f"token_counts must have shape ({num_embeddings},); got {tuple(counts.shape)}")
    if counts.is_floating_point() and not torch.isfinite(counts).all():
        raise ValueError("token_counts must be finite; got NaN or Inf")
    if counts.is_floating_point() and (counts != counts.round()).any():
        bad = int((counts != counts.round()).nonzero()[0])
        raise ValueError(
            f"token_counts must be whole numbers of occurrences; got {counts[bad].item():g} for token {bad}. "
            "Frequencies, multiplied by the number of tokens they are of and rounded, are counts"
        )
    if counts.is_floating_point() and (counts >= MOST_OCCURRENCES).any():
        raise ValueError(f"token_counts must be below 2^63; got {counts.max().item():g}")
    if (counts < 0).any():
        bad = int((counts < 0).nonzero()[0])
        raise ValueError(f"token_counts must not be negative; got {counts[bad].item()} for token {bad}")
    return counts.to(torch.int64)


def expected_counts(counts: Tensor, source: Tensor) -> Tensor:
    """Counts smoothed by what is known of tokens that do not occur, (V,) float32; 1/2 for all if nothing was counted.

    Adds to each count half an occurrence, shared out among the tokens in proportion to two log-linear Poisson
    regressions of the counts: on the source vectors (V, d) and the place in the vocabulary, and on the place alone. A
    word that the training data happens to miss will come, a stray symbol will not; and since tokenizers list frequent
    tokens first, the frequent ones of a language that the data does not show are better off than its rare ones.
    """
    smoothing = torch.full_like(counts, 0.5, dtype=torch.float32)
    if not counts.any():
        return smoothing
    vectors = source.detach().to(torch.float32)
    place = torch.arange(1, len(source) + 1, device=source.device, dtype=torch.float32).log()[:, None]
    unseen = counts == 0
    for rates in (_rates(counts, vectors, place), _rates(counts, place)):
        smoothing += 0.25 * (rates / (rates[unseen] if unseen.any() else rates).mean() - 1)
    return counts.to(torch.float32) + smoothing


def _rates(counts: Tensor, *features: Tensor) -> Tensor:
    """How often tokens occur, (V,), by a log-linear regression of counts (V,) on features (V, f), up to a factor."""
    sample = slice(None, None, -(-len(counts) // FITTED_TOKENS))
    x = torch.cat([feature[sample] for feature in features], dim=1)
    mean, unit = x.mean(0), x.std(0, correction=0).clamp_min(1e-12)
    x = (x - mean) / unit
    target = counts[sample].to(torch.float32).clamp_max(LARGEST_COUNT)
    base = target.mean().clamp_min(1e-9).log()
    slope = torch.zeros(x.shape[1], device=x.device, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([slope], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():  # the caller may be in no_grad, as `pack` is
            log_rate = (base + x @ slope).clamp_max(LARGEST_LOG_RATE)
            value = (log_rate.exp() - target * log_rate).mean() + RIDGE * slope.square().sum()
            value.backward()
        return value

    optimizer.step(loss)
    direction = slope.detach() / unit
    parts = direction.split([feature.shape[1] for feature in features])
    log_rates = -(mean @ direction).expand(len(counts))
    for feature, part in zip(features, parts, strict=True):
        log_rates = log_rates + feature @ part
    return log_rates.clamp_max(LARGEST_LOG_RATE).exp()


def draw_tokens(weights: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Token ids drawn in proportion to their weights (V,), with replacement: int64 (draws,) where the weights are.

    `torch.multinomial` takes 2^24 tokens at most.
    """
    sums = weights.to("cpu", torch.float64).cumsum(0)
    points = torch.rand(draws, dtype=torch.float64, generator=generator, device="cpu") * sums[-1]
    return torch.searchsorted(sums, points, right=True).clamp_max(len(sums) - 1).to(weights.device)


def token_weights(counts: Tensor) -> Tensor:
    """Weight of each token in a fit, (V,): the root of its expected count.

    The root lies between the table (every type alike) and running text (Zipf: a few types are everything).
    """
    return counts.sqrt()


def fit_weights(weights: Tensor) -> Tensor:
    """What tokens count for in least squares and for the ladder, from `token_weights`, (V,): closer to running text.

    The geometric mean of a token's weight and its expected count. Lengths themselves follow `token_weights`.
    """
    return weights**1.5


def typical_counts(num_tokens: int) -> Tensor:
    """Counts where none are known, (V,) int64: Zipf's law for a third of the tokens, the others do not occur.

    So are training texts of the usual tasks: of MiniLM's 30,522 tokens a fifth (SNLI) to a half (UD-EWT) occur, 2 to
    8 times V in all.
    """
    counts = OCCURRENCES * num_tokens // torch.arange(1, num_tokens + 1, device="cpu")
    counts[max(1, num_tokens // 3) :] = 0
    return counts
