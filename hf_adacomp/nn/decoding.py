"""How vectors come from codes: a compressed table as one forward pass sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codes.bits import pack_bits
from ..codes.codebook import BinaryCodebook, Encoder, StoredBook
from ..codes.packed import PackedCodes
from .training_state import TrainingState

T = TypeVar("T")


class OnDemand(Sequence[T]):
    """Things that cost to make, each made when it is first asked for: most batches meet few of many code lengths.

    Args:
        make: The i-th thing.
        size: How many there are.
    """

    def __init__(self, make: Callable[[int], T], size: int) -> None:
        self._make, self._made = make, cast(list[T | None], [None] * size)

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, i: Any) -> Any:
        if self._made[i] is None:
            self._made[i] = self._make(i)
        return self._made[i]


class LearnedCodes:
    """The codes that encoders decide at this moment, to be asked as `PackedCodes` are.

    Args:
        state: Of the training; it has the source vectors and each token's length index.
        codebooks: One a code length, increasing.
        stored: The same, as they are stored.
    """

    def __init__(self, state: TrainingState, codebooks: Sequence[BinaryCodebook], stored: Sequence[StoredBook]) -> None:
        self.state = state
        self.blocks = [book.block for book in codebooks]
        self.encoders: Sequence[Encoder] = OnDemand(
            lambda k: codebooks[k].encoder(stored[k], state.metric), len(codebooks)
        )

    def assignment(self) -> Tensor:
        """Length index of every token, uint8 (V,)."""
        return self.state.assignment

    def order(self) -> Tensor:
        """All tokens by code length, and by id where it is the same, int64 (V,)."""
        return self.assignment().argsort(stable=True)

    @property
    def tokens_per_length(self) -> list[int]:
        """How many tokens have each code length."""
        tokens: list[int] = self.assignment().bincount(minlength=len(self.encoders)).tolist()
        return tokens

    def locate(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Length index, uint8 (N,), and place for `bits`, which is the token itself, int64 (N,)."""
        return self.assignment()[tokens], tokens

    def bits(self, k: int, tokens: Tensor) -> Tensor:
        """Bits of tokens in codes of the k-th length, int64 (N,) -> 0/1 (N, L_k), with straight-through gradients."""
        return self.encoders[k].encode(self.state.source[tokens])

    def group(self, k: int) -> Tensor:
        """The codes of the k-th length in the format of `hf_adacomp.codes.bits`, uint8 (bytes,)."""
        members = (self.assignment() == k).nonzero().squeeze(1)
        return torch.cat([pack_bits(self.bits(k, tokens)) for tokens in members.split(self.blocks[k])])


@dataclass
class Decoder:
    """From tokens to vectors, for one forward pass: code-books are rounded or unpacked once for all it decodes.

    Args:
        books: The code-books as they are stored, one a code length, increasing.
        codes: Where bits come from.
        num_tokens: V.
        zero_token: The token whose vector is zero, such as padding; or None.
        scale: Factor that `look_up` applies.
        shares: While lengths are learned: shares of the code lengths in each token's vector, (N,) -> (N, n).
    """

    books: Sequence[StoredBook]
    codes: PackedCodes | LearnedCodes
    num_tokens: int
    zero_token: int | None
    scale: float
    shares: Callable[[Tensor], Tensor] | None = None

    def look_up(self, ids: Tensor) -> Tensor:
        """Scaled vectors of ids, int64 of any shape -> (..., d); each distinct token is decoded once."""
        if ids.device.type == "cpu" and ids.numel() and not 0 <= ids.min() <= ids.max() < self.num_tokens:
            raise IndexError(
                f"token id out of range: ids run from {int(ids.min())} to {int(ids.max())}, the table has "
                f"{self.num_tokens} rows"
            )
        tokens, place = distinct(ids, self.num_tokens)
        if self.shares is None:  # what is gathered next needs no order of its own
            order, vectors = self._by_length(tokens)
            tokens, place = tokens[order], inverse(order)[place]
        else:
            vectors = self._mixture(self.shares(tokens), tokens)
        return F.embedding(place, self._scaled(self._zeroed(tokens, vectors)))

    def vectors(self, tokens: Tensor) -> Tensor:
        """Vectors of distinct tokens, (N,) -> (N, d)."""
        if self.shares is None:
            order, vectors = self._by_length(tokens)
            vectors = vectors.index_select(0, inverse(order))
        else:
            vectors = self._mixture(self.shares(tokens), tokens)
        return self._zeroed(tokens, vectors)

    def _mixture(self, shares: Tensor, tokens: Tensor) -> Tensor:
        decoded = torch.stack([book.decode(self.codes.bits(k, tokens)) for k, book in enumerate(self.books)], dim=1)
        return (shares[:, :, None] * decoded).sum(dim=1).to(decoded.dtype)

    def _by_length(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The order of tokens by code length, (N,) int64, and their vectors in that order, (N, d)."""
        lengths, places = self.codes.locate(tokens)
        order = lengths.argsort(stable=True)
        sizes = lengths.bincount(minlength=len(self.books)).tolist()
        groups = [(k, own) for k, own in enumerate(places[order].split(sizes)) if len(own)]
        if torch.is_grad_enabled() or not groups:
            decoded = [self.books[k].decode(self.codes.bits(k, own)) for k, own in groups or [(0, places)]]
            return order, torch.cat(decoded)
        bias = self.books[groups[0][0]].bias
        vectors, start = bias.new_empty(len(tokens), len(bias)), 0
        for k, own in groups:  # in place, as a table of many rows is as slow to copy as to decode
            self.books[k].decode(self.codes.bits(k, own), out=vectors[start : start + len(own)])
            start += len(own)
        return order, vectors

    def _zeroed(self, tokens: Tensor, vectors: Tensor) -> Tensor:
        return vectors if self.zero_token is None else vectors.masked_fill(tokens.eq(self.zero_token)[:, None], 0)

    def _scaled(self, vectors: Tensor) -> Tensor:
        return vectors if self.scale == 1 else vectors * self.scale


@dataclass
class SourceVectors:
    """The source table itself, to be asked as `Decoder` is while its use is observed.

    Args:
        state: Of the training; it has the source vectors and takes note of the gradients.
        scale: Factor that `look_up` applies.
    """

    state: TrainingState
    scale: float

    def look_up(self, ids: Tensor) -> Tensor:
        """Scaled vectors of ids, int64 of any shape -> (..., d)."""
        vectors = F.embedding(ids, self.state.source)
        if torch.is_grad_enabled():
            self.state.observation.watch_look_up(ids, vectors.requires_grad_(), self.state.config.measured)
        return vectors if self.scale == 1 else vectors * self.scale

    def score(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states by a tied head, (..., d) -> (..., V)."""
        logits = F.linear(hidden, self.state.source.to(hidden.dtype))
        if logits.requires_grad and self.state.config.measured:
            self.state.observation.watch_scores(hidden, logits)
        return logits


class StaticDecoder(Decoder):
    """For compiled and exported graphs, whose shapes must not depend on values: every id is looked up in all groups.

    Packed tables only.
    """

    def look_up(self, ids: Tensor) -> Tensor:
        """Scaled vectors of ids, int64 of any shape -> (..., d)."""
        return self._scaled(self.vectors(ids.flatten())).view(*ids.shape, -1)

    def vectors(self, tokens: Tensor) -> Tensor:
        """Vectors of tokens, (N,) -> (N, d)."""
        lengths, places = self.codes.locate(tokens)
        bias = self.books[0].bias
        shape = (tokens.shape[0], bias.shape[0])  # len(tokens) would be fixed in an exported graph
        vectors = torch.zeros(shape, dtype=bias.dtype, device=bias.device)
        for k, book in enumerate(self.books):
            if self.codes.tokens_per_length[k]:
                own = lengths == k
                vectors = book.decode(self.codes.bits(k, places.where(own, 0))).where(own[:, None], vectors)
        return self._zeroed(tokens, vectors)


class TakePart(torch.autograd.Function):
    """The vectors, in which parameters take part with zero gradients that have none otherwise.

    `DistributedDataParallel` wants to see the same parameters in each backward pass, whatever phase or tokens are due.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return vectors.view_as(vectors)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient[0], *(torch.zeros_like(parameter) for parameter in ctx.parameters)


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
