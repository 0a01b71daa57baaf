"""Token counts: of the training data, and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

BATCH_SIZE = 64

FITTED_TOKENS = 1 << 15
LARGEST_COUNT = 20.0
LARGEST_LOG_RATE = 6.0
RIDGE = 1e-3
"""Of the regression of counts: tokens it is fitted to, bounds that keep a few frequent ones from ruling it, penalty."""


def count_tokens(
    loader: DataLoader[Any],
    num_embeddings: int,
    input_names: Sequence[str] = ("input_ids",),
    max_rows: int | None = None,
) -> Tensor:
    """Occurrences of each token id in the dataset of a data loader, (V,) int64.

    Reads the dataset itself, in order, through the loader's collator: no row is dropped or sharded, every process
    counts the same, and the order in which training will draw is left alone. Padding (`attention_mask` 0) does not
    count.

    Args:
        loader: The training data loader.
        num_embeddings: V.
        input_names: The batch's keys for token ids; negative ids, as labels have them for padding, do not count.
        max_rows: Read at most so many rows of an iterable dataset, which may have no end.
    """
    dataset = loader.dataset
    endless = isinstance(dataset, IterableDataset)
    rows = max_rows if endless else len(dataset)  # type: ignore[arg-type]  # map-style datasets have a length
    limit = None if rows is None else -(-rows // BATCH_SIZE)
    batches = DataLoader(dataset, batch_size=BATCH_SIZE, collate_fn=loader.collate_fn)
    counts = torch.zeros(num_embeddings, dtype=torch.int64)
    with torch.random.fork_rng(devices=[]):  # a collator may draw random numbers
        for batch in tqdm(islice(batches, limit), desc="Counting tokens", total=limit):
            for name in input_names:
                found = columns(batch, name)
                if not found:
                    raise ValueError(
                        f"cannot count the training data: its batches have no {name!r} but {sorted(batch)}; pass "
                        "token_counts to compress(model, config, token_counts=...)"
                    )
                for column in found:
                    ids, mask = batch[column + name], batch.get(f"{column}attention_mask")
                    shown = mask is not None and mask.shape == ids.shape and name != "labels"
                    ids = ids[mask.bool()] if shown else ids.flatten()
                    counts += torch.bincount(ids[ids >= 0].to("cpu", torch.int64), minlength=num_embeddings)
    return counts


def input_name(model: nn.Module) -> str:
    """The batch's key for what `model` reads first: the token ids, unless the model says otherwise."""
    return getattr(model, "main_input_name", "input_ids")


def columns(batch: Mapping[str, Any], name: str) -> list[str]:
    """Prefixes under which a batch holds the key `name`: one, empty, or those of the columns of sentence-transformers.

    Its batches hold `anchor_input_ids`, `positive_input_ids` and the like.
    """
    return [""] if name in batch else [key.removesuffix(name) for key in batch if key.endswith(f"_{name}")]


def checked_counts(token_counts: Tensor, num_embeddings: int) -> Tensor:
    """The counts as int64, (V,); ValueError for another shape, negative or non-finite ones."""
    counts = torch.as_tensor(token_counts)
    if counts.shape != (num_embeddings,):
        raise ValueError(f"token_counts must have shape ({num_embeddings},); got {tuple(counts.shape)}")
    if counts.is_floating_point() and not torch.isfinite(counts).all():
        raise ValueError("token_counts must be finite; got NaN or Inf")
    if (counts < 0).any():
        bad = int((counts < 0).nonzero()[0])
        raise ValueError(f"token_counts must not be negative; got {counts[bad].item()} for token {bad}")
    return counts.to(torch.int64)


def expected_counts(counts: Tensor, source: Tensor) -> Tensor:
    """Counts smoothed by what tokens with similar vectors have, (V,) float32; 1/2 for all if nothing was counted.

    Adds to each count half an occurrence, shared out among the tokens in proportion to a log-linear Poisson regression
    of the counts on the source vectors (V, d): a word that the training data happens to miss will come, a stray symbol
    will not.
    """
    smoothing = torch.full_like(counts, 0.5, dtype=torch.float32)
    if not counts.any():
        return smoothing
    sample = slice(None, None, -(-len(source) // FITTED_TOKENS))
    x = source[sample].detach().to(torch.float32)
    mean, unit = x.mean(0), x.std(0, correction=0).clamp_min(1e-12)
    x = (x - mean) / unit
    target = counts[sample].to(torch.float32).clamp_max(LARGEST_COUNT)
    base = target.mean().clamp_min(1e-9).log()
    slope = torch.zeros(x.shape[1], device=x.device, requires_grad=True)
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
    rate = (source.detach().to(torch.float32) @ direction - mean @ direction).clamp_max(LARGEST_LOG_RATE).exp()
    unseen = rate[counts == 0]
    return counts.to(torch.float32) + smoothing * rate / (unseen if len(unseen) else rate).mean()


def token_weights(counts: Tensor) -> Tensor:
    """Weight of each token in a fit, (V,): the root of its expected count.

    The root lies between the table (every type alike) and running text (Zipf: a few types are everything).
    """
    return counts.sqrt()


def zipf_counts(num_tokens: int) -> Tensor:
    """Counts by Zipf's law where none are known: the token of rank r occurs V / r times, (V,) int64."""
    return num_tokens // torch.arange(1, num_tokens + 1)
