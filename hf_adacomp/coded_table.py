"""How vectors come from codes: what `AdaptiveCompressedEmbedding` computes, whatever its phase."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from . import packing
from .budget import code_bits
from .codebook import BinaryCodebook
from .coder import TokenCoder
from .config import AdaCompConfig
from .packed_codes import PackedCodes


class CodedTable(nn.Module):
    """A table of V vectors of width d: code-books, and for each token a code length and the bits of a code.

    The bits come from the encoders of a `coder` until they are stored in `packed`; there is always exactly one of the
    two.
    """

    num_embeddings: int
    embedding_dim: int
    config: AdaCompConfig
    codebooks: nn.ModuleList
    coder: TokenCoder | None
    packed: PackedCodes | None

    def books(self) -> Iterator[BinaryCodebook]:
        """The code-books, shortest first."""
        return (self.book(k) for k in range(len(self.codebooks)))

    def book(self, k: int) -> BinaryCodebook:
        """The code-book of the k-th code length."""
        return cast(BinaryCodebook, self.codebooks[k])

    def code_bits(self) -> int:
        """Bits available for the codes of all tokens under `config.target_ratio`."""
        codebook_bytes = sum(book.stored_bytes() for book in self.books())
        settings = self.config
        return code_bits(
            self.num_embeddings, self.embedding_dim, settings.lengths, codebook_bytes, settings.target_ratio
        )

    @property
    def mixes(self) -> bool:
        """Whether vectors are mixtures over code lengths: while lengths are learned, in training mode."""
        return self.training and self.coder is not None and self.coder.phase == "select"

    def vectors(self, tokens: Tensor) -> Tensor:
        """Vectors of distinct tokens as they are due now, (N,) -> (N, d): mixtures, or decoded from hard bits."""
        if torch.compiler.is_compiling():  # shapes must not depend on values
            return self._decode_all_lengths(tokens)
        return self.mixture(tokens) if self.mixes else self.decode(tokens)

    def mixture(self, tokens: Tensor) -> Tensor:
        """Gumbel-softmax mixture over all code lengths of distinct tokens, (N,) -> (N, d)."""
        coder = self.require_coder("a mixture of lengths")
        decoded = torch.stack([book.decode(self.bits(k, tokens)) for k, book in enumerate(self.books())], dim=1)
        mixture: Tensor = (coder.shares(tokens)[:, :, None] * decoded).sum(dim=1)
        return mixture

    def decode(self, tokens: Tensor) -> Tensor:
        """Vectors of tokens from their hard lengths and bits, (N,) -> (N, d)."""
        order, vectors = self.decode_by_length(tokens)
        return vectors.index_select(0, inverse(order))

    def decode_by_length(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The order of tokens by code length, (N,) int64, and their vectors in that order, (N, d)."""
        lengths, places = self.locate(tokens)
        order = lengths.argsort(stable=True)
        sizes = lengths.bincount(minlength=len(self.codebooks)).tolist()
        groups = [(self.book(k), self.bits(k, own)) for k, own in enumerate(places[order].split(sizes)) if len(own)]
        bias = self.book(0).bias
        vectors = bias.new_empty(len(tokens), self.embedding_dim)
        if torch.is_grad_enabled():
            return order, torch.cat([vectors[:0], *(book.decode(bits) for book, bits in groups)])
        start = 0
        for book, bits in groups:  # in place, as a table of many rows is as slow to copy as to decode
            book.decode(bits, out=vectors[start : start + len(bits)])
            start += len(bits)
        return order, vectors

    def _decode_all_lengths(self, tokens: Tensor) -> Tensor:
        """As `decode`, with shapes that do not depend on values: every token is looked up in every packed group."""
        packed = self.require_packed()
        lengths, places = packed.locate(tokens)
        bias = self.book(0).bias
        shape = (tokens.shape[0], self.embedding_dim)  # len(tokens) would be fixed in an exported graph
        vectors = torch.zeros(shape, dtype=bias.dtype, device=bias.device)
        for k, book in enumerate(self.books()):
            if packed.tokens_per_length[k]:
                own = lengths == k
                vectors = book.decode(self.bits(k, places.where(own, 0))).where(own[:, None], vectors)
        return vectors

    def locate(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Length index, uint8 (N,), and place (see `bits`), int64 (N,), of each of `tokens`."""
        if self.coder is not None:
            return self.coder.assignment[tokens], tokens
        return self.require_packed().locate(tokens)

    def bits(self, k: int, places: Tensor) -> Tensor:
        """Bits of codes of the k-th length, (N,) -> 0/1 (N, L_k).

        Places are token ids until packed, then places inside of group k.
        """
        book = self.book(k)
        if self.coder is not None:
            return book.encode(self.coder.source[places], self.coder.metric)
        return self.require_packed().bits(k, places).to(book.bias.dtype)

    def assignment(self) -> Tensor:
        """Length index of every token, uint8 (V,)."""
        return self.require_packed().assignment() if self.coder is None else self.coder.assignment

    def tokens_per_length(self) -> Sequence[int]:
        """How many tokens have each code length."""
        if self.coder is None:  # known, so that shapes do not depend on values
            return self.require_packed().tokens_per_length
        tokens: list[int] = self.assignment().bincount(minlength=len(self.codebooks)).tolist()
        return tokens

    def group(self, k: int) -> Tensor:
        """The codes of the k-th length in the format of `hf_adacomp.packing`, uint8 (bytes,)."""
        if self.coder is None:
            return self.require_packed().group(k)
        members = (self.assignment() == k).nonzero().squeeze(1)
        blocks = [packing.pack_bits(self.bits(k, places)) for places in members.split(self.book(k).block)]
        return torch.cat(blocks)

    def require_packed(self) -> PackedCodes:
        """The packed codes; ValueError before there are any."""
        if self.packed is None:
            raise ValueError("the embedding is not packed yet: call pack() first")
        return self.packed

    def require_coder(self, verb: str) -> TokenCoder:
        """What training needs; ValueError once packed."""
        if self.coder is None:
            raise ValueError(f"{verb} is not possible on a packed embedding: lengths and bits are fixed")
        return self.coder


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order`, (N,) int64."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def distinct(ids: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The distinct tokens among `ids`, (N,), ascending, and the place of each id among them, of the shape of `ids`."""
    if ids.numel() < num_tokens // 64:
        tokens, place = torch.unique(ids, return_inverse=True)
        return tokens, place
    seen = torch.zeros(num_tokens, dtype=torch.int32, device=ids.device)  # faster than sorting many ids
    seen[ids.flatten()] = 1
    tokens = seen.nonzero().squeeze(1)
    seen[tokens] = torch.arange(len(tokens), dtype=torch.int32, device=ids.device)
    return tokens, seen[ids]
