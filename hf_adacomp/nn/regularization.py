"""Regularisers of the code-book, added to gradients once an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..codes.codebook import BinaryCodebook
from ..config import AdaCompConfig
from ..fitting.spectrum import squared_norms
from ..fitting.token_counts import draw_tokens, token_weights
from .training_state import TrainingState

SAMPLED_TOKENS = 1024
"""Tokens whose reconstruction is measured in one step."""


def regularizer(
    config: AdaCompConfig, codebook: BinaryCodebook, state: TrainingState, decode: Callable[[Tensor], Tensor]
) -> Tensor:
    """The weighted sum of orthogonality and reconstruction error, a float32 scalar; `decode` is (N,) -> (N, d)."""
    source = state.source
    loss = torch.zeros((), device=source.device, dtype=torch.float32)
    if config.orthogonality_weight:
        loss = loss + config.orthogonality_weight * codebook.orthogonality()
    if config.reconstruction_weight:
        tokens = sample_tokens(state.token_counts, config.seed, int(state.progress)).to(source.device)
        loss = loss + config.reconstruction_weight * relative_error(decode(tokens), source[tokens], state.metric)
    return loss


def sample_tokens(counts: Tensor, seed: int, progress: int) -> Tensor:
    """Token ids drawn by the weights of the warm start, int64 (SAMPLED_TOKENS,).

    A function of its arguments alone, so that ranks agree and a resumed run repeats itself.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + progress)
    return draw_tokens(token_weights(counts + 0.5), SAMPLED_TOKENS, generator)


def relative_error(decoded: Tensor, source: Tensor, metric: Tensor) -> Tensor:
    """Squared error in a metric (d, d) over squared norm, both summed over the tokens (N, d)."""
    decoded, source = decoded.to(metric.dtype), source.to(metric.dtype)  # squares of float16 overflow
    error = squared_norms(decoded - source, metric).sum()
    return error / source.square().sum().clamp_min(torch.finfo(source.dtype).eps)


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
    if not trainable or not loss.requires_grad:
        return
    for parameter, gradient in zip(trainable, torch.autograd.grad(loss, trainable, allow_unused=True), strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
