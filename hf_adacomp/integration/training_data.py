"""The Trainer's data, read once more before training: how often each token stands in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

BATCH_SIZE = 64


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
