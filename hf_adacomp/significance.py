"""How much each token matters for the task, measured before any length is learned.

What a short code loses of a token is mostly the token's own offset from the mean vector. How much the model's outputs
react to that depends on the directions that the task reads: with the outputs' gradients g at all token positions,

    M = sum g g^T        significance_w = (x_w - mean)^T M (x_w - mean) / |x_w - mean|^2

It needs no occurrence of the token itself, so that tokens which the training data never shows are judged too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from tqdm.auto import tqdm

from .embedding import AdaptiveCompressedEmbedding
from .surgery import compressed_heads
from .token_counts import columns, expected_counts, input_name, token_weights

MEASURED_ROWS = 2048
MEASURED_TOKENS = 1 << 16
BATCH_SIZE = 32
"""Rows of the training data that gradients are measured on, tokens after which that ends, and rows at once."""

MANY_CLASSES = 1024
"""Outputs of more classes are judged by the loss: random directions among them would say little at great cost."""

BLOCK = 1 << 15
LARGEST = 100.0
"""Tokens whose significance is computed at once, and the bound that no token's exceeds, nor its inverse."""

SWITCH = "Set AdaCompConfig(significance=False) to start from token counts alone"


def token_significance(
    model: nn.Module,
    embedding: AdaptiveCompressedEmbedding,
    loader: DataLoader[Any],
    show_progress: bool = True,
) -> Tensor:
    """Relative significance of one occurrence of each token, (V,) float32, 1 for an average token.

    Args:
        model: The model that is about to be trained.
        embedding: Its compressed table, not packed.
        loader: The training data loader; rows spread evenly over its dataset are read.
        show_progress: Whether to draw a progress bar.

    Raises:
        ValueError: If the model does not take the batches or returns neither logits nor a loss.
    """
    metric = _task_metric(model, embedding, loader, show_progress)
    source, counts = embedding.source_table(), embedding.token_counts()
    weights = token_weights(expected_counts(counts, source))
    mean = weights @ source.to(torch.float32) / weights.sum()
    significance = torch.empty_like(weights)
    for rows in torch.arange(len(source), device=source.device).split(BLOCK):
        offset = source[rows].to(torch.float32) - mean
        norm = offset.square().sum(1).clamp_min(torch.finfo(torch.float32).tiny)
        significance[rows] = ((offset @ metric) * offset).sum(1) / norm
    average = (weights @ significance) / weights.sum()
    if average <= 0:  # the outputs react to nothing
        return torch.ones_like(significance)
    return (significance / average).clamp(1 / LARGEST, LARGEST)


def _task_metric(
    model: nn.Module, embedding: AdaptiveCompressedEmbedding, loader: DataLoader[Any], show_progress: bool
) -> Tensor:
    """`sum g g^T` over all positions that are not padding, (d, d) float32, at the source vectors."""
    source = embedding.source_table()
    metric = torch.zeros(source.shape[1], source.shape[1], device=source.device)
    vectors: list[tuple[Tensor, Tensor]] = []
    measured = 0

    def add_states(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal metric
        states = args[0].detach().reshape(-1, args[0].shape[-1]).to(torch.float32)
        metric += states.T @ states

    def use_source(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> Tensor:
        exact = source[args[0]].requires_grad_()
        vectors.append((args[0], exact))
        return exact * embedding.scale

    was_training = model.training
    model.eval()
    handles: list[Any] = [embedding.register_forward_hook(use_source)]
    # The logit of a token moves with its vector in the direction of the hidden state.
    heads = [head for head in compressed_heads(model).values() if head.embedding is embedding]
    handles += [head.register_forward_pre_hook(add_states) for head in heads]
    try:
        with torch.random.fork_rng(), torch.enable_grad():  # training shall draw the same numbers without us
            torch.manual_seed(embedding.config.seed)
            name = input_name(model)
            for row in tqdm(_rows(loader, name), desc="Measuring significance", disable=not show_progress):
                batch = {k: v.to(source.device) if isinstance(v, Tensor) else v for k, v in row.items()}
                mask = batch.get("attention_mask")
                output = _random_output(_outputs(model, batch), batch)
                gradients = torch.autograd.grad(output, [exact for _, exact in vectors], allow_unused=True)
                for (ids, _), gradient in zip(vectors, gradients, strict=True):
                    if gradient is None:
                        continue
                    shown = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask
                    g = gradient.detach()[shown.bool()].to(torch.float32)
                    metric += g.T @ g
                    measured += len(g)
                vectors.clear()
                if measured >= MEASURED_TOKENS:
                    break
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return metric


def _rows(loader: DataLoader[Any], name: str) -> Iterator[dict[str, Any]]:
    """Batches of rows that lie evenly spread over the dataset, or of the first rows of an iterable one.

    Columns of sentence-transformers come as batches of their own.
    """
    dataset = loader.dataset
    if not isinstance(dataset, IterableDataset):
        total = len(dataset)  # type: ignore[arg-type]  # map-style datasets have a length
        step = max(1, total // MEASURED_ROWS)
        dataset = Subset(dataset, range(0, total, step)[:MEASURED_ROWS])
    size = min(BATCH_SIZE, loader.batch_size or BATCH_SIZE)
    batches = DataLoader(dataset, batch_size=size, collate_fn=loader.collate_fn)
    for batch in islice(iter(batches), -(-MEASURED_ROWS // size)):
        for column in columns(batch, name) or [""]:
            yield {key.removeprefix(column): value for key, value in batch.items() if key.startswith(column)}


def _outputs(model: nn.Module, batch: dict[str, Any]) -> Mapping[str, Any]:
    """What the model returns for what it takes of a batch, which may hold columns for the Trainer alone."""
    named = inspect.signature(model.forward).parameters.keys() & batch.keys()
    try:  # sentence-transformers' models take the batch as one dictionary
        output = model(**{name: batch[name] for name in named}) if named else model(batch)
    except (TypeError, KeyError) as error:
        raise ValueError(f"cannot measure which tokens matter: {error}. {SWITCH}") from error
    if not isinstance(output, Mapping):
        raise ValueError(f"cannot measure which tokens matter: the model returns a {type(output).__name__}. {SWITCH}")
    return output


def _random_output(output: Mapping[str, Any], batch: dict[str, Any]) -> Tensor:
    """A scalar whose gradient shows how the outputs react: logits projected on random directions, or the loss."""
    logits = [
        value.float()
        for name, value in output.items()
        if ("logits" in name or name == "sentence_embedding") and isinstance(value, Tensor)
    ]
    if output.get("loss") is not None and (not logits or max(value.shape[-1] for value in logits) > MANY_CLASSES):
        loss: Tensor = output["loss"].float()  # a mean over the labels
        return loss * (batch["labels"] >= 0).sum() if "labels" in batch else loss
    if not logits:
        raise ValueError(
            f"cannot measure which tokens matter: the model returns neither logits nor a loss but {[*output]}. {SWITCH}"
        )
    return torch.stack([(value * torch.randn_like(value)).sum() for value in logits]).sum()
