"""Packed tables as graphs hold them: the same codes and code vectors, found and unpacked by few operators."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..codes.bits import BLOCK
from ..codes.codebook import BinaryCodebook
from ..codes.packed import PackedCodes
from ..nn.table import CodedTable

MOST_LENGTHS = 256 // BLOCK
"""Code lengths of which a byte tells one, beside a place in a block of tokens."""


class NibbleBook(NamedTuple):
    """Code vectors C = scale * [low, high], int4 in floats, (L, ceil(d / 2)) each, scale (L, 1); and bias (d,).

    A runtime unpacks constants when it loads a file, and holds on to what it needs for that: the fewer steps the less.
    Bits are scaled in place of code vectors.
    """

    low: Tensor
    high: Tensor
    scale: Tensor
    bias: Tensor

    @property
    def vectors(self) -> Tensor:
        """C, (L, d)."""
        return self.scale * torch.cat([self.low, self.high], dim=1)[:, : len(self.bias)]

    def decode(self, bits: Tensor) -> Tensor:
        """As `StoredBook.decode`."""
        weights = bits.to(self.scale.dtype) * self.scale[: bits.shape[1], 0]
        halves = [weights @ half[: bits.shape[1]] for half in (self.low, self.high)]
        return torch.cat(halves, dim=1)[:, : len(self.bias)] + self.bias


class NibbleCodebook(nn.Module):
    """A packed code-book of int4: a float for each half of a byte is looked up."""

    weight: Tensor
    scale: Tensor
    bias: Tensor
    halves: Tensor

    def __init__(self, book: BinaryCodebook) -> None:
        super().__init__()
        for name, tensor in {"weight": book.weight, "scale": book.scales, "bias": book.bias}.items():
            self.register_buffer(name, tensor.detach())
        byte = torch.arange(256, device=self.weight.device)
        self.register_buffer("halves", (torch.stack([byte % 16, byte // 16])[..., None] - 8).to(self.scale.dtype))

    def stored(self) -> NibbleBook:
        """As `BinaryCodebook.stored`."""
        places = self.weight.to(torch.int32)
        low, high = (F.embedding(places, half).squeeze(-1) for half in self.halves)
        return NibbleBook(low, high, self.scale, self.bias)


class GraphCodes(PackedCodes):
    """Codes of which a byte a token tells the length and how many tokens of that length its block has before it."""

    where: Tensor

    def __init__(self, packed: PackedCodes) -> None:
        device = packed.codes.device
        super().__init__(packed.num_tokens, packed.ladder, packed.tokens_per_length, device=device)
        self.load_state_dict(packed.state_dict())
        tokens = torch.arange(self.num_tokens, device=device)
        lengths, places = super()._locate(tokens)
        inside = places - self.ranks[tokens // BLOCK, lengths.to(torch.int64)]
        self.register_buffer("where", (BLOCK * lengths.to(torch.int64) + inside).to(torch.uint8), persistent=False)

    def _locate(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        found = self.where.index_select(0, tokens).to(torch.int64)
        lengths = _blocks(found)
        rank = self.ranks.flatten().index_select(0, _blocks(tokens) * len(self.ladder) + lengths)
        return lengths, rank.to(torch.int64) + found - BLOCK * lengths

    def _starts(self, lengths: Tensor, inside: Tensor) -> Tensor:
        sizes, starts = (group.index_select(0, lengths.to(torch.int64)) for group in self.groups)
        begin: Tensor = starts + inside * sizes
        return begin


def _blocks(tokens: Tensor) -> Tensor:
    """`tokens // BLOCK`, for which exporters need seven operators; exact as floats below 2 ** 24."""
    return (tokens.to(torch.float32) / BLOCK).to(torch.int64)


def for_graph(table: CodedTable) -> None:
    """Put the forms of this module into a packed table, where they hold what it has."""
    packed = table.require_packed()
    if table.codebook.integer_bits == 4:
        table.codebook = NibbleCodebook(table.codebook)  # type: ignore[assignment]  # of which `stored` is asked
    if 1 < len(packed.ladder) <= MOST_LENGTHS and packed.num_tokens < 1 << 24:
        table.packed = GraphCodes(packed)
