"""How much each token matters for the task, before any length is learned.

    weight_w = sqrt(occurrences_w * sensitivity_w)

Occurrences are smoothed and sensitivities (how strongly the model's outputs react to a change of the token's vector)
are predicted from the vectors themselves: tokens that the training data never shows, or shows once, are judged by what
holds for tokens with similar vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from tqdm.auto import tqdm

from .embedding import AdaptiveCompressedEmbedding

MEASURED_ROWS = 2048
BATCH_SIZE = 32
"""Rows of the training data that sensitivities are measured on, and rows at once."""

RIDGE = 0.0075
"""Weight of the regression's penalty, a share of that of all tokens."""


def token_significance(
    model: nn.Module,
    embedding: AdaptiveCompressedEmbedding,
    loader: DataLoader[Any],
    show_progress: bool = True,
) -> Tensor:
    """Relative significance of one occurrence of each token, (V,) float32, 1 for an average token of the data.

    The root of the expected squared gradient, at the token's source vector, of the model's outputs (a random
    projection of its logits, or its loss if it has none). A log-linear ridge regression predicts it from the vector.

    Args:
        model: The model that is about to be trained.
        embedding: Its compressed table, not packed.
        loader: The training data loader; rows spread evenly over its dataset are read.
        show_progress: Whether to draw a progress bar.

    Raises:
        ValueError: If the model returns neither logits nor a loss.
    """
    sums, occurrences = _squared_gradients(model, embedding, loader, show_progress)
    source = embedding.source_table().to(torch.float32)
    seen = ((sums > 0) & (occurrences > 0)).nonzero().squeeze(1)
    if len(seen) < 2:
        return torch.ones_like(sums)
    x = source[seen]
    x_mean, x_unit = x.mean(0), x.std(correction=0).clamp_min(1e-12)
    x = (x - x_mean) / x_unit
    weights = occurrences[seen] / (occurrences[seen] + 2)  # one sample of a gradient says little
    target = (sums[seen] / occurrences[seen]).log()
    center = (weights @ target) / weights.sum()
    gram = (x * weights[:, None]).T @ x + RIDGE * weights.sum() * torch.eye(x.shape[1], device=x.device)
    slope = torch.linalg.solve(gram, (x * weights[:, None]).T @ (target - center))
    predicted: Tensor = (source @ slope - x_mean @ slope) / x_unit
    return (0.5 * predicted.clamp(-6, 6)).exp()


def _squared_gradients(
    model: nn.Module,
    embedding: AdaptiveCompressedEmbedding,
    loader: DataLoader[Any],
    show_progress: bool,
) -> tuple[Tensor, Tensor]:
    """Sum of squared gradients at all occurrences of each token, and number of occurrences, both (V,) float32."""
    source = embedding.source_table()
    sums = torch.zeros(len(source), device=source.device)
    occurrences = torch.zeros_like(sums)
    vectors: list[tuple[Tensor, Tensor]] = []

    def use_source(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> Tensor:
        exact = source[args[0]].requires_grad_()
        vectors.append((args[0], exact))
        return exact

    was_training = model.training
    model.eval()
    handle = embedding.register_forward_hook(use_source)
    try:
        with torch.random.fork_rng(), torch.enable_grad():  # training shall draw the same numbers without us
            torch.manual_seed(embedding.config.seed)
            for row in tqdm(_rows(loader), desc="Measuring significance", disable=not show_progress):
                batch = {k: v.to(source.device) if isinstance(v, Tensor) else v for k, v in row.items()}
                output = _random_output(model(**batch))
                gradients = torch.autograd.grad(output, [exact for _, exact in vectors], allow_unused=True)
                for (ids, _), gradient in zip(vectors, gradients, strict=True):
                    if gradient is None:
                        continue
                    mask = batch.get("attention_mask")
                    shown = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask
                    shown = shown.bool()
                    squares = gradient.detach().to(torch.float32).square().sum(-1)
                    sums.index_add_(0, ids[shown], squares[shown])
                    occurrences.index_add_(0, ids[shown], torch.ones_like(squares[shown]))
                vectors.clear()
    finally:
        handle.remove()
        model.train(was_training)
    return sums, occurrences


def _rows(loader: DataLoader[Any]) -> Iterator[dict[str, Any]]:
    """Batches of rows that lie evenly spread over the dataset, or of the first rows of an iterable one."""
    dataset = loader.dataset
    if not isinstance(dataset, IterableDataset):
        total = len(dataset)  # type: ignore[arg-type]  # map-style datasets have a length
        step = max(1, total // MEASURED_ROWS)
        dataset = Subset(dataset, range(0, total, step)[:MEASURED_ROWS])
    batches = DataLoader(dataset, batch_size=BATCH_SIZE, collate_fn=loader.collate_fn)
    return islice(iter(batches), -(-MEASURED_ROWS // BATCH_SIZE))


def _random_output(output: Any) -> Tensor:
    """A scalar whose gradient shows how the outputs react: logits projected on random directions, or the loss."""
    logits = [value for name, value in output.items() if "logits" in name and isinstance(value, Tensor)]
    if logits:
        return torch.stack([(value.float() * torch.randn_like(value.float())).sum() for value in logits]).sum()
    if output.get("loss") is None:
        raise ValueError(
            f"cannot measure which tokens matter: {type(output).__name__} has neither logits nor a loss; set "
            "AdaCompConfig(significance=False) to start from token counts alone"
        )
    loss: Tensor = output["loss"].float()
    return loss
