"""The codes of a table in training, as its encoder decides them at each moment."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codes.bits import centred_bytes, pack_bits
from ..codes.codebook import BinaryCodebook, Encoder, StoredBook
from .training_state import TrainingState


class LearnedCodes:
    """The codes that the encoder decides at this moment, to be asked as `PackedCodes` are.

    Args:
        state: Of the training; it has the source vectors and each token's length index.
        codebook: Whose encoder decides.
        stored: The same, as it is stored.
    """

    def __init__(self, state: TrainingState, codebook: BinaryCodebook, stored: StoredBook) -> None:
        self.state, self.codebook, self.stored = state, codebook, stored
        self.ladder = state.config.ladder

    @cached_property
    def encoder(self) -> Encoder:
        """Made when it is first asked for."""
        return self.codebook.encoder(self.stored, self.state.metric)

    @property
    def octets(self) -> Tensor:
        """As of `PackedCodes`."""
        return centred_bytes(self.state.assignment.device)

    def assignment(self) -> Tensor:
        """Length index of every token, uint8 (V,)."""
        return self.state.assignment

    def order(self) -> Tensor:
        """All tokens by code length, and by id where it is the same, int64 (V,)."""
        return self.assignment().argsort(stable=True)

    @property
    def tokens_per_length(self) -> list[int]:
        """How many tokens have each code length."""
        tokens: list[int] = self.assignment().bincount(minlength=len(self.ladder)).tolist()
        return tokens

    def locate(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Length index, uint8 (N,), and place for `centred`, which is the token itself, int64 (N,)."""
        return self.assignment()[tokens], tokens

    def centred(self, lengths: Tensor, tokens: Tensor, longest: int) -> Tensor:
        """Centred bits of tokens in codes of these lengths, (N,), (N,) -> (N, longest); gradients straight through."""
        ladder = torch.tensor(self.ladder, device=lengths.device)
        return self.encoder.encode_each(self.state.source[tokens], ladder[lengths.to(torch.int64)], longest)

    def mixed(self, shares: Tensor, tokens: Tensor) -> Tensor:
        """Centred bits of tokens by the shares of all lengths in each, (N, n), (N,) -> (N, L)."""
        source, encoder = self.state.source[tokens], self.encoder
        drive = encoder.drive(source)
        bits = torch.zeros_like(drive)
        for length, share in zip(self.ladder, shares.unbind(1), strict=True):
            own = share[:, None] * encoder.decide(drive[:, :length])
            bits = bits + F.pad(own, (0, drive.shape[1] - length))
        return bits.to(source.dtype)

    def group(self, k: int) -> Tensor:
        """The codes of the k-th length in the format of `hf_adacomp.codes.bits`, uint8 (bytes,)."""
        blocks = (self.assignment() == k).nonzero().squeeze(1).split(self.codebook.block)
        bits = (self.encoder.encode(self.state.source[tokens], self.ladder[k]) for tokens in blocks)
        return torch.cat([pack_bits(rows > 0) for rows in bits])
