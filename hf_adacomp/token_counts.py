"""Token counts: of the training data, and checked."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

BATCH_SIZE = 64


def count_tokens(
    loader: DataLoader[Any], num_embeddings: int, input_name: str = "input_ids", max_rows: int | None = None
) -> Tensor:
    """Occurrences of each token id in the dataset of a data loader, (V,) int64.

    Reads the dataset itself, in order, through the loader's collator: no row is dropped or sharded, every process
    counts the same, and the order in which training will draw is left alone. Padding (`attention_mask` 0) does not
    count.

    Args:
        loader: The training data loader.
        num_embeddings: V.
        input_name: The batch's key for token ids.
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
            if input_name not in batch:
                raise ValueError(
                    f"cannot count the training data: its batches have no {input_name!r} but {sorted(batch)}; pass "
                    "token_counts to compress(model, config, token_counts=...)"
                )
            ids = batch[input_name]
            mask = batch.get("attention_mask")
            ids = ids[mask.bool()] if mask is not None and mask.shape == ids.shape else ids.flatten()
            counts += torch.bincount(ids.to("cpu", torch.int64), minlength=num_embeddings)
    return counts


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
