"""The codes of a table in training, as its encoders decide them at each moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..codes.bits import byte_bits, pack_bits
from ..codes.codebook import BinaryCodebook, Encoder, StoredBook
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

    @property
    def byte_bits(self) -> Tensor:
        """As of `PackedCodes`."""
        return byte_bits(self.state.assignment.device)

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
