"""What stands in the other places of a shared table: the embeddings of a decoder, the tied output head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .embedding import AdaptiveCompressedEmbedding

BITS_PER_BLOCK = 1 << 22
"""Bits of the codes that the head unpacks at once (as float32: 16 MB)."""

KEPT_BITS = 1 << 26
"""Bits that a training step keeps for the way back (twice, as float32: 0.5 GB); beyond, blocks are computed anew."""


class _Place(nn.Module):
    """A module that reads a compressed embedding which another place of the model owns.

    The reference is not registered: the table is saved, moved and counted once, under its owner's name.
    """

    def __init__(self, embedding: AdaptiveCompressedEmbedding) -> None:
        super().__init__()
        self._owner = (embedding,)

    @property
    def embedding(self) -> AdaptiveCompressedEmbedding:
        """The compressed table."""
        return self._owner[0]


class SharedEmbedding(_Place):
    """A further place of the token embeddings, such as those of a decoder."""

    def forward(self, input: Tensor) -> Tensor:
        """As `AdaptiveCompressedEmbedding.forward`."""
        vectors: Tensor = self.embedding(input)
        return vectors

    @property
    def num_embeddings(self) -> int:
        """V."""
        return self.embedding.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """d."""
        return self.embedding.embedding_dim

    @property
    def padding_idx(self) -> int | None:
        """As in `nn.Embedding`."""
        return self.embedding.padding_idx


class CompressedHead(_Place):
    """An output head that is tied to a compressed table: logits from the same codes and code-books.

        logit_w = h . xhat_w = sum over the set bits i of w of (C_k h)_i + c_k . h        for w of code length k

    For a few positions `C_k h` is computed once for each and summed over bits; from d positions on it is cheaper to
    decode the vectors of a block of tokens for all of them. The dense table is never made: codes are unpacked in
    blocks of `BITS_PER_BLOCK` bits, 16 MB as float32, which together with one reordered copy of the logits is all the
    memory that the head takes. Training keeps up to `KEPT_BITS` bits for the way back.

    While lengths are learned a token's vector is the Gumbel-softmax mixture of all lengths, as in the embedding.

    Args:
        embedding: The compressed table, (V, d).
        bias: Of the head that this one replaces, (V,), or None.
    """

    def __init__(self, embedding: AdaptiveCompressedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__(embedding)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.bias = bias

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, (..., d) -> (..., V)."""
        table = self.embedding
        table.ensure_warm()
        if table.mixes or hidden.shape[:-1].numel() >= self.in_features:
            tokens = torch.arange(table.num_embeddings, device=hidden.device)
            blocks = tokens.split(max(1, BITS_PER_BLOCK // sum(table.config.lengths)))
            logits = torch.cat([self._run(self._by_vectors, block, hidden) for block in blocks], dim=-1)
        else:
            groups, column = table.groups()
            parts = [
                self._run(partial(self._by_bits, k), places, scores)
                for k, members in enumerate(groups)
                if len(members)
                for scores in (self._scores(k, hidden),)
                for places in members.split(max(1, BITS_PER_BLOCK // table.config.lengths[k]))
            ]
            logits = torch.cat(parts, dim=-1).index_select(-1, column)
        if table.zero_padding:
            logits[..., table.padding_idx] = 0
        return logits if self.bias is None else logits + self.bias

    def _run(self, function: Callable[..., Tensor], *args: Tensor) -> Tensor:
        bits = self.out_features * sum(self.embedding.config.lengths)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or bits <= KEPT_BITS:
            return function(*args)
        logits: Tensor = checkpoint(function, *args, use_reentrant=False)
        return logits

    def _by_vectors(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding.vectors(tokens).to(hidden.dtype))

    def _scores(self, k: int, hidden: Tensor) -> Tensor:
        """Products with the code vectors of the k-th code-book and, last, with its bias, (..., L_k + 1)."""
        book = self.embedding.book(k)
        return F.linear(hidden, torch.cat([book.code_vectors(), book.stored_bias()[None]]))

    def _by_bits(self, k: int, places: Tensor, scores: Tensor) -> Tensor:
        bits = self.embedding.bits(k, places).to(scores.dtype)
        return F.linear(scores[..., :-1], bits) + scores[..., -1:]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
