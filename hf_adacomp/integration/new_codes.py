"""Codes for tokens that join a packed table, whose code-book is fixed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codes.codebook import BinaryCodebook
from ..codes.descent import nearest_bits
from ..nn.embedding import AdaptiveCompressedEmbedding

STARTS = 32
"""Descents from which a given vector takes the nearest code: one alone may end no nearer than the mean vector."""


def codes_for(embedding: AdaptiveCompressedEmbedding, num_tokens: int, vectors: Tensor | None) -> Tensor:
    """Centred bits (N, L) of new tokens with these vectors, as the embedding returns them, or near the mean."""
    book = embedding.codebook
    if num_tokens == 0:
        return book.bias.new_empty(0, book.length, dtype=torch.float32)
    seed = embedding.config.seed * 1_000_003 + embedding.num_embeddings  # tokens of the next call differ, too
    if vectors is None:  # one start, for codes that differ
        return nearest_codes(book, _mean_vector(embedding).expand(num_tokens, -1), seed)
    if vectors.shape != (num_tokens, embedding.embedding_dim) or not vectors.isfinite().all():
        raise ValueError(
            f"vectors must be finite numbers of shape ({num_tokens}, {embedding.embedding_dim}); got shape "
            f"{tuple(vectors.shape)}"
        )
    vectors = vectors.detach().to(book.bias.device, torch.float32) / embedding.scale
    return nearest_codes(book, vectors, seed, STARTS)


@torch.no_grad()
def _mean_vector(embedding: AdaptiveCompressedEmbedding) -> Tensor:
    """The mean of all vectors, before the embedding's scale, float32 (1, d)."""
    decoder = embedding.hard_decoder()
    total = torch.stack([decoder.vectors(block).float().sum(dim=0) for block in decoder.blocks()]).sum(dim=0)
    return total[None] / embedding.num_embeddings


@torch.no_grad()
def nearest_codes(book: BinaryCodebook, targets: Tensor, seed: int, starts: int = 1) -> Tensor:
    """Codes whose vectors are close to targets, (N, d), the nearest of random starts: centred bits (N, L)."""
    generator = torch.Generator("cpu").manual_seed(seed)
    stored = book.stored()
    vectors, bias = stored.vectors.float(), stored.bias.float()
    targets = targets.to(vectors)
    nearest, least = vectors.new_empty(len(targets), book.length), vectors.new_full((len(targets),), torch.inf)
    for _ in range(starts):
        start = torch.randint(0, 2, nearest.shape, generator=generator, device="cpu").to(vectors) - 0.5
        codes = nearest_bits(targets, vectors, bias, start=start)
        error = (torch.addmm(bias, codes, vectors) - targets).square().sum(dim=1)
        nearer = error <= least  # also where errors overflow
        nearest[nearer] = codes[nearer]
        least = torch.minimum(least, error)
    return nearest
