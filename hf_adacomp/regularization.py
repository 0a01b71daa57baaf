"""Regularisers of the code-books, added to gradients once an optimizer step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .codebook import BinaryCodebook
from .rate_distortion import squared_norms
from .token_counts import token_weights

SAMPLED_TOKENS = 1024
"""Tokens whose reconstruction is measured in one step."""


def sample_tokens(counts: Tensor, seed: int, progress: int) -> Tensor:
    """Token ids drawn by the weights of the warm start, int64 (SAMPLED_TOKENS,).

    A function of its arguments alone, so that ranks agree and a resumed run repeats itself.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + progress)
    return torch.multinomial(token_weights(counts + 0.5).cpu(), SAMPLED_TOKENS, replacement=True, generator=generator)


def orthogonality(codebooks: Iterable[BinaryCodebook]) -> Tensor:
    """Mean of `|C_k C_k^T / scale - I|^2 / L_k` over the code-books."""
    return torch.stack([book.orthogonality() for book in codebooks]).mean()


def relative_error(decoded: Tensor, source: Tensor, metric: Tensor) -> Tensor:
    """Squared error in a metric (d, d) over squared norm, both summed over the tokens (N, d)."""
    error = squared_norms(decoded - source, metric).sum()
    return error / source.square().sum().clamp_min(torch.finfo(source.dtype).tiny)


def finite_gradients(parameters: Iterable[torch.nn.Parameter]) -> bool:
    """Whether no gradient holds NaN or Inf, by one sum for each: a mask would be as large as the table."""
    sums = [parameter.grad.sum(dtype=torch.float32) for parameter in parameters if parameter.grad is not None]
    return not sums or bool(torch.stack(sums).isfinite().all())


def add_gradients(loss: Tensor, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add the gradients of `loss` to those that the task left.

    Outside of the task's loss they are right under gradient accumulation, mixed precision, label smoothing and a
    custom loss function alike.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        return
    for parameter, gradient in zip(trainable, torch.autograd.grad(loss, trainable, allow_unused=True), strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
