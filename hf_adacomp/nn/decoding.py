"""How vectors come from codes: a compressed table as one forward pass sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import torch_compat
from ..codes.codebook import BITS_PER_BLOCK, StoredBook
from ..codes.packed import PackedCodes
from .learned_codes import LearnedCodes
from .training_state import TrainingState

OUT_OF_RANGE = "token id out of range"
FEW = 128
"""Tokens whose codes are read at once, as if all were as long as the longest; more are read by their lengths."""


@dataclass
class Decoder:
    """From tokens to vectors, for one forward pass: the code-book is rounded or unpacked once for all it decodes.

    Args:
        book: The code-book as it is stored.
        codes: Where bits come from.
        num_tokens: V.
        padding: The padding token, whose look-ups have no gradient; or None.
        zero_token: The token whose vector is zero, which is the padding token; or None.
        shares: While lengths are learned: shares of the code lengths in each token's vector, (N,) -> (N, n).
    """

    book: StoredBook
    codes: PackedCodes | LearnedCodes
    num_tokens: int
    padding: int | None
    zero_token: int | None
    shares: Callable[[Tensor], Tensor] | None = None

    def look_up(self, ids: Tensor) -> Tensor:
        """Vectors of ids, int64 of any shape -> (..., d); each distinct token of many is decoded once."""
        if ids.device.type != "cpu":  # asking for values would wait for the device
            torch_compat.check_on_device(((ids >= 0) & (ids < self.num_tokens)).all(), OUT_OF_RANGE)
        elif ids.numel() and not 0 <= ids.min() <= ids.max() < self.num_tokens:
            raise IndexError(
                f"{OUT_OF_RANGE}: ids run from {int(ids.min())} to {int(ids.max())}, the table has "
                f"{self.num_tokens} rows"
            )
        if self._unasked(ids):
            tokens = ids.flatten()
            return self._held(tokens, self.vectors(tokens)).view(*ids.shape, len(self.book.bias))
        tokens, place = distinct(ids, self.num_tokens)
        return F.embedding(place, self._held(tokens, self.vectors(tokens)))

    @torch.no_grad()
    def table(self) -> Tensor:
        """All vectors, (V, d), without gradients."""
        bias = self.book.bias
        table = bias.new_empty(self.num_tokens, len(bias))
        for block in self.blocks():  # in place: one copy of the table, not two
            table[block] = self.vectors(block)
        return table

    def gradients(
        self, parameters: Sequence[Tensor], at_vectors: Callable[[Tensor, Tensor], Tensor]
    ) -> list[Tensor | None]:
        """Gradients of parameters for a backward pass, to which nothing was kept; None for what takes no part.

        Args:
            parameters: Of the table.
            at_vectors: From a block of tokens (N,) and their vectors (N, d), the gradient at these (N, d).
        """
        totals: list[Tensor | None] = [None] * len(parameters)
        learning = [i for i, parameter in enumerate(parameters) if parameter.requires_grad]
        for block in self.blocks():
            with torch.enable_grad():
                vectors = self.vectors(block)
            gradient = at_vectors(block, vectors)
            if not learning:
                continue
            found = torch.autograd.grad(
                vectors,
                [parameters[i] for i in learning],
                gradient,
                retain_graph=True,  # the code-book is made once for all blocks
                create_graph=torch.is_grad_enabled(),  # so it is where what is found shall have gradients itself
                allow_unused=True,
            )
            for i, part in zip(learning, found, strict=True):
                total = totals[i]
                totals[i] = total if part is None else part if total is None else total + part
        return totals

    def blocks(self) -> tuple[Tensor, ...]:
        """All tokens, in blocks whose vectors and codes bound the memory."""
        bias = self.book.bias
        tokens = torch.arange(self.num_tokens, device=bias.device)
        blocks: tuple[Tensor, ...] = tokens.split(max(1, BITS_PER_BLOCK // max(len(bias), len(self.book.vectors))))
        return blocks

    def vectors(self, tokens: Tensor) -> Tensor:
        """Vectors of tokens, (N,) -> (N, d)."""
        if self.shares is not None:
            vectors = self.book.decode(cast(LearnedCodes, self.codes).mixed(self.shares(tokens), tokens))
        else:
            vectors = self._by_length(tokens)
        return self._zeroed(tokens, vectors)

    def _by_length(self, tokens: Tensor) -> Tensor:
        lengths, places = self.codes.locate(tokens)
        if len(tokens) <= FEW or torch.is_grad_enabled():
            longest = -1 if self._unasked(tokens) else int(lengths.max()) if len(tokens) else 0
            return self.book.decode(self.codes.centred(lengths, places, self.codes.ladder[longest]))
        vectors = self.book.bias.new_empty(len(tokens), len(self.book.bias))
        groups = lengths.argsort(stable=True).split(lengths.bincount(minlength=len(self.codes.ladder)).tolist())
        for length, own in zip(self.codes.ladder, groups, strict=True):
            if len(own):
                vectors[own] = self.book.decode(self.codes.centred(lengths[own], places[own], length))
        return vectors

    def _unasked(self, tokens: Tensor) -> bool:
        """Whether to decode a few tokens without a look at their values, which would wait for the device."""
        return tokens.device.type != "cpu" and tokens.numel() <= FEW

    def _held(self, tokens: Tensor, vectors: Tensor) -> Tensor:
        if self.padding is None or not (vectors.requires_grad or torch_compat.is_traced()):
            return vectors
        return torch.where(tokens.eq(self.padding)[:, None], vectors.detach(), vectors)

    def _zeroed(self, tokens: Tensor, vectors: Tensor) -> Tensor:
        return vectors if self.zero_token is None else vectors.masked_fill(tokens.eq(self.zero_token)[:, None], 0)


@dataclass
class SourceVectors:
    """The source table itself, to be asked as `Decoder` is while its use is observed.

    Args:
        state: Of the training; it has the source vectors and takes note of the gradients.
    """

    state: TrainingState

    def look_up(self, ids: Tensor) -> Tensor:
        """Vectors of ids, int64 of any shape -> (..., d)."""
        vectors = F.embedding(ids, self.state.source)
        if torch.is_grad_enabled():
            self.state.observation.watch_look_up(ids, vectors.requires_grad_(), self.state.observation.measuring)
        return vectors

    def table(self) -> Tensor:
        """All vectors, (V, d): the source itself."""
        return self.state.source

    def score(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states by a tied head, (..., d) -> (..., V)."""
        logits = F.linear(hidden, self.state.source.to(hidden.dtype))
        if logits.requires_grad and self.state.observation.measuring:
            self.state.observation.watch_scores(hidden, logits)
        return logits


class StaticDecoder(Decoder):
    """For compiled and exported graphs, whose shapes must not depend on values. Packed tables only."""

    def look_up(self, ids: Tensor) -> Tensor:
        """Vectors of ids, int64 of any shape -> (..., d)."""
        torch_compat.check_on_device(((ids >= 0) & (ids < self.num_tokens)).all(), OUT_OF_RANGE)
        tokens = ids.flatten()
        return self._held(tokens, self.vectors(tokens)).view(*ids.shape, len(self.book.bias))

    def table(self) -> Tensor:
        """All vectors, (V, d)."""
        return self.vectors(torch.arange(self.num_tokens, device=self.book.bias.device))

    def _by_length(self, tokens: Tensor) -> Tensor:
        return self.book.decode(self.codes.centred(*self.codes.locate(tokens), self.codes.ladder[-1]))


class TakePart(torch.autograd.Function):
    """The vectors, in which parameters take part with zero gradients that have none otherwise.

    `DistributedDataParallel` wants to see the same parameters in each backward pass, whatever phase or tokens are due.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return vectors.clone()  # models may change in place what an embedding returns; a view they could not

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient[0], *(torch.zeros_like(parameter) for parameter in ctx.parameters)


def with_all(vectors: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """The vectors, in which all parameters take part that learn, while gradients are wanted."""
    if not torch.is_grad_enabled():
        return vectors
    result: Tensor = TakePart.apply(vectors, *(p for p in parameters if p.requires_grad))  # type: ignore[no-untyped-call]
    return result


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
