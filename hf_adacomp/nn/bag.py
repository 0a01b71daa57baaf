"""Tables whose vectors are added up, averaged or maximised at once for each text: `nn.EmbeddingBag`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Bag(NamedTuple):
    """How an `nn.EmbeddingBag` makes one vector of many.

    Args:
        mode: `"sum"`, `"mean"` or `"max"`.
        include_last_offset: Whether offsets end with the number of ids.
    """

    mode: str
    include_last_offset: bool

    @classmethod
    def of(cls, embedding: nn.Module) -> Bag | None:
        """That of a dense module; None for an `nn.Embedding`."""
        if not isinstance(embedding, nn.EmbeddingBag):
            return None
        return cls(embedding.mode, embedding.include_last_offset)

    def dense(self, dim: int) -> nn.EmbeddingBag:
        """A dense module of this kind with one row of width `dim`."""
        return nn.EmbeddingBag(1, dim, mode=self.mode, include_last_offset=self.include_last_offset)

    def reduce(
        self, ids: Tensor, vectors: Tensor, offsets: Tensor | None, weights: Tensor | None, padding: int | None
    ) -> Tensor:
        """One vector for each bag, (bags, d), as `nn.EmbeddingBag.forward`.

        Args:
            ids: (bags, n), or (n,) with `offsets`.
            vectors: Of all ids, flattened, (N, d).
            offsets: Where each bag begins in `ids`, (bags,).
            weights: Of the shape of `ids`, for sums alone.
            padding: The token that no bag counts.
        """
        places = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        if padding is not None:  # one more row, which stands for padding wherever it is
            places = places.masked_fill(ids == padding, ids.numel())
            vectors = torch.cat([vectors, vectors.new_zeros(1, vectors.shape[1])])
        return F.embedding_bag(
            places,
            vectors,
            offsets,
            mode=self.mode,
            per_sample_weights=weights,
            include_last_offset=self.include_last_offset,
            padding_idx=None if padding is None else ids.numel(),
        )
