"""The bit format: tensors in, tensors out.

For V tokens and code lengths `L_0 < ... < L_{n-1}`, two uint8 tensors hold the codes. Bits fill bytes from the least
significant one; unused bits of a last byte are zero.

    lengths   index k of each token's code length, ceil(log2 n) bits a token, token order

              byte 0                    byte 1
              | k0 k0 | k1 k1 | k2 k2 | k3 k3 | k4 k4 | ...          (n = 3 or 4: two bits a token)

    codes     the codes grouped by length, shortest first; token order inside a group; no gap between the codes of a
              group; each group starts at a byte

              | group of L_0                     | group of L_1             | ...
              | token 3   | token 7   | ... | 0  | token 0     | ... | 0    |
                L_0 bits    L_0 bits     padding   L_1 bits      padding

    nibbles   code vectors stored as int4: two entries a byte, the first in the low half; entry e as e + 8

A token's code is found without stored offsets: its group follows from its length, and its place in the group is the
number of earlier tokens of that length, `block_ranks` for its block of tokens plus a count inside the block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 128
"""Tokens that share one row of prefix counts."""


def packed_bytes(bits: int) -> int:
    """Bytes that hold `bits` bits."""
    return (bits + 7) // 8


def index_bits(num_lengths: int) -> int:
    """Bits that tell one of `num_lengths` code lengths: `ceil(log2 n)`."""
    return (num_lengths - 1).bit_length()


def group_bytes(tokens_per_length: Sequence[int], code_lengths: Sequence[int]) -> list[int]:
    """Bytes of each group of `codes`."""
    return [packed_bytes(tokens * length) for tokens, length in zip(tokens_per_length, code_lengths, strict=True)]


def pack_bits(rows: Tensor) -> Tensor:
    """Pack bits (N, L) back to back: 0/1 of any dtype -> uint8 (ceil(N L / 8),).

    A group may be packed in blocks of rows, all but the last with N a multiple of 8.
    """
    flat = rows.reshape(-1).to(torch.uint8)
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
    place = torch.arange(8, device=flat.device, dtype=torch.uint8)
    return (flat << place).sum(dim=1, dtype=torch.uint8)


def unpack_rows(packed: Tensor, rows: Tensor, length: int) -> Tensor:
    """Rows of a matrix packed by `pack_bits`: uint8 (B,), int64 (N,) -> uint8 0/1 (N, length)."""
    place = torch.arange(8, device=packed.device, dtype=torch.uint8)
    if length % 8 == 0:  # codes are whole bytes
        octets = packed[: len(packed) // (length // 8) * (length // 8)].view(-1, length // 8)[rows]
        return ((octets[:, :, None] >> place) & 1).view(len(rows), length)
    position = rows[:, None] * length + torch.arange(length, device=packed.device)
    return (packed[position >> 3] >> (position & 7).to(torch.uint8)) & 1


def pack_nibbles(integers: Tensor) -> Tensor:
    """Pack integers in -7..7, two a byte: int8 (L, d) -> uint8 (L, ceil(d / 2))."""
    nibbles = (integers + 8).to(torch.uint8)
    if nibbles.shape[1] % 2:
        nibbles = torch.cat([nibbles, torch.zeros_like(nibbles[:, :1])], dim=1)
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, dim: int) -> Tensor:
    """Undo `pack_nibbles`: uint8 (L, ceil(d / 2)) -> int8 (L, d)."""
    pairs = torch.stack([packed & 15, packed >> 4], dim=2)
    return pairs.view(len(packed), -1)[:, :dim].to(torch.int8) - 8


def pack_lengths(assignment: Tensor, num_lengths: int) -> Tensor:
    """Pack length indices, (V,) in 0..n-1 -> uint8 (ceil(V ceil(log2 n) / 8),)."""
    place = torch.arange(index_bits(num_lengths), device=assignment.device)
    return pack_bits((assignment.to(torch.int64)[:, None] >> place) & 1)


def unpack_lengths(lengths: Tensor, tokens: Tensor, num_lengths: int) -> Tensor:
    """Length indices of `tokens`, int64 of any shape -> uint8 of that shape (meaningless beyond the last token)."""
    width = index_bits(num_lengths)
    if width == 0:
        return torch.zeros_like(tokens, dtype=torch.uint8)
    place = torch.arange(width, device=lengths.device, dtype=torch.uint8)
    position = tokens[..., None] * width + place
    bit = (lengths[(position >> 3).clamp_max(len(lengths) - 1)] >> (position & 7).to(torch.uint8)) & 1
    return (bit << place).sum(dim=-1, dtype=torch.uint8)


def block_ranks(assignment: Tensor, num_lengths: int) -> Tensor:
    """Tokens of each length before each block of `BLOCK` tokens, (V,) -> int32 (ceil(V / BLOCK), n)."""
    blocks = (len(assignment) + BLOCK - 1) // BLOCK
    block = torch.arange(len(assignment), device=assignment.device) // BLOCK
    counts = torch.zeros(blocks * num_lengths, dtype=torch.int32, device=assignment.device)
    counts.index_add_(0, block * num_lengths + assignment.to(torch.int64), torch.ones_like(block, dtype=torch.int32))
    counts = counts.view(blocks, num_lengths)
    return (counts.cumsum(0) - counts).to(torch.int32)


def locate(lengths: Tensor, ranks: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Length index and place inside its group of each of `tokens`: int64 (N,) -> uint8 (N,), int64 (N,)."""
    num_lengths = ranks.shape[1]
    block = tokens // BLOCK
    inside = torch.arange(BLOCK, device=tokens.device)
    neighbours = unpack_lengths(lengths, block[:, None] * BLOCK + inside, num_lengths)
    own = unpack_lengths(lengths, tokens, num_lengths)
    earlier = (neighbours == own[:, None]) & (inside < (tokens % BLOCK)[:, None])
    return own, ranks[block, own.to(torch.int64)].to(torch.int64) + earlier.sum(dim=1)


def check_padding(packed: Tensor, bits: int, name: str) -> None:
    """Raise ValueError if a bit beyond the first `bits` of `packed` is set."""
    if bits % 8 and int(packed[bits // 8]) >> (bits % 8):
        raise ValueError(f"{name}: padding bits after the last of {bits} bits are set; the file is damaged")
