"""The bit format: tensors in, tensors out.

A file holds of a packed table, V tokens of width d with codes of L bits at most, under the name of its module:

    packed.length_indices, packed.codes    below
    codebook.weight    code vectors C: floats (L, d), int8 (L, d), or nibbles, uint8 (L, ceil(d / 2))
    codebook.scale     of integers, (L, 1), in the dtype of the model
    codebook.bias      c, (d,)
    weight, codebook.divided    empty: a guard against loading as a dense table, and a mark of `format_version` 4

    vector of a token = scale_of_layout * (sum_i s_i C_i + c),    s_i = 1/2 if bit i of its code is set, else -1/2

with `C_i = rate * weight_i` in floats and `rate * scale_i * weight_i` in integers of b bits, where L is the longest
length on offer, used or not: `rate = 2^round(log2(2 / L) / 2)`, in integers over `2^(b - 1)`. The table's layout is in
`quantization_config.tables`; by its `zero_padding`, the vector of `padding_idx` is zero.

For V tokens and a ladder of code lengths `L_0 < ... < L_{n-1}`, two uint8 tensors hold the codes. Bits fill bytes from
the least significant one; unused bits of a last byte are zero.

    length_indices   index k of each token's code length, ceil(log2 n) bits a token (none if n = 1), token order

                     byte 0                          byte 1
                     | k0 k0 | k1 k1 | k2 k2 | k3 k3 | k4 k4 | ...        (n = 3 or 4: two bits a token)

    codes            the codes grouped by length, shortest first; token order inside a group; no gap between the codes
                     of a group; each group starts at a byte

                     | group of L_0                     | group of L_1             | ...
                     | token 3   | token 7   | ... | 0  | token 0     | ... | 0    |
                       L_0 bits    L_0 bits     padding   L_1 bits      padding

    nibbles          code vectors stored as int4: entry e as e + 8; the first half of a vector in the low halves of its
                     bytes, the second half in the high ones

A token's code is found without stored offsets: its group follows from its length, and its place in the group is the
number of earlier tokens of that length, `block_ranks` for its block of tokens plus a count inside the block.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import torch_compat

BLOCK = 32
"""Tokens that share one row of prefix counts; a multiple of 8, so that their length indices fill whole bytes."""

NO_BYTE = 256
"""Stands for the bytes behind the end of a code."""


def centred_bytes(device: torch.device | str | None = None) -> Tensor:
    """The bits of every byte, -1/2 or 1/2, and zeros where there is none, float32 (257, 8).

    Looking them up is four times as fast as shifting bits out.
    """
    octets = torch.arange(NO_BYTE, device=device, dtype=torch.int32)
    bits = shifted(octets[:, None], torch.arange(8, device=device, dtype=torch.int32), 1)
    return F.pad(bits.to(torch.float32) - 0.5, (0, 0, 0, 1))


def shifted(values: Tensor, places: Tensor | int, mask: int) -> Tensor:
    """`(values >> places) & mask` of int32 tensors, which exporters of graphs know; they know no shifts of bytes."""
    return torch.bitwise_right_shift(values, places) & mask


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes of a tensor. It finds damage, not forgery: whoever changes a file can change this, too."""
    return zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)


def packed_bytes(bits: int) -> int:
    """Bytes that hold `bits` bits."""
    return (bits + 7) // 8


def index_bits(num_lengths: int) -> int:
    """Bits that tell one of `num_lengths` code lengths: `ceil(log2 n)`."""
    return (num_lengths - 1).bit_length()


def group_bytes(tokens_per_length: Sequence[int], ladder: Sequence[int]) -> list[int]:
    """Bytes of each group of `codes`."""
    return [packed_bytes(tokens * length) for tokens, length in zip(tokens_per_length, ladder, strict=True)]


def pack_bits(rows: Tensor) -> Tensor:
    """Pack bits (N, L) back to back: 0/1 of any dtype -> uint8 (ceil(N L / 8),).

    A group may be packed in blocks of rows, all but the last with N a multiple of 8.
    """
    flat = rows.reshape(-1).to(torch.uint8)
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
    place = torch.arange(8, device=flat.device, dtype=torch.uint8)
    return (flat << place).sum(dim=1, dtype=torch.uint8)


def centred_bits(packed: Tensor, starts: Tensor, lengths: Tensor, longest: int, octets: Tensor | None) -> Tensor:
    """Codes as centred bits: -1/2 or 1/2, and 0 where a code has ended; float32 (N, bits of the longest).

    Args:
        packed: Codes as `pack_bits` leaves them, uint8 (B,).
        starts: Where each code begins, (N,), in bytes if `octets` are given, else in bits, as lengths are.
        lengths: Of each code, (N,).
        longest: At least the longest of them.
        octets: `centred_bytes()`, made once by the caller, for codes that are whole bytes.
    """
    place = torch.arange(longest, device=packed.device)
    position, ended = starts[:, None] + place, place >= lengths[:, None]
    if octets is not None:
        found = packed[position.clamp_max(len(packed) - 1)].to(torch.int32)
        return F.embedding(found.masked_fill(ended, NO_BYTE), octets).view(-1, 8 * longest)
    found = packed[(position // 8).clamp_max(len(packed) - 1)].to(torch.int32)
    bits = shifted(found, (position % 8).to(torch.int32), 1).to(torch.float32) - 0.5
    return bits.masked_fill(ended, 0)


def whole_bytes(packed: Tensor, length: int) -> Tensor:
    """Codes of a multiple of 8 bits as rows of bytes: uint8 (B,) -> uint8 (codes, length / 8)."""
    return packed[: len(packed) // (length // 8) * (length // 8)].view(-1, length // 8)


def pack_nibbles(integers: Tensor) -> Tensor:
    """Pack integers in -7..7, two a byte: int8 (L, d) -> uint8 (L, ceil(d / 2))."""
    nibbles = F.pad((integers + 8).to(torch.uint8), (0, integers.shape[1] % 2))
    low, high = nibbles.chunk(2, dim=1)
    return low | (high << 4)


def unpack_nibbles(packed: Tensor, dim: int, dtype: torch.dtype = torch.int8) -> Tensor:
    """Undo `pack_nibbles`: uint8 (L, ceil(d / 2)) -> (L, d) of `dtype`."""
    # The shift of bytes is twice as fast.
    high = shifted(packed.to(torch.int32), 4, 15).to(torch.uint8) if torch_compat.is_traced() else packed >> 4
    halves = torch.cat([packed & 15, high], dim=1)
    return halves.to(dtype).sub_(8)[:, :dim]


def pack_assignment(assignment: Tensor, num_lengths: int) -> Tensor:
    """Pack length indices, (V,) in 0..n-1 -> uint8 (ceil(V ceil(log2 n) / 8),)."""
    place = torch.arange(index_bits(num_lengths), device=assignment.device)
    return pack_bits((assignment.to(torch.int64)[:, None] >> place) & 1)


def unpack_indices(rows: Tensor, num_lengths: int) -> Tensor:
    """Length indices from rows of bytes that they fill: uint8 (N, B) -> uint8 (N, 8 B / ceil(log2 n))."""
    width = index_bits(num_lengths)
    step = width if 8 % width == 0 else 1
    place = torch.arange(0, 8, step, device=rows.device, dtype=torch.int32)
    pieces = shifted(rows.to(torch.int32)[:, :, None], place, 2**step - 1).flatten(1)
    if step < width:
        place = torch.arange(width, device=rows.device, dtype=torch.int32)
        pieces = torch.bitwise_left_shift(pieces.unflatten(1, (-1, width)), place).sum(dim=2, dtype=torch.int32)
    return pieces.to(torch.uint8)


def unpack_assignment(length_indices: Tensor, num_tokens: int, num_lengths: int) -> Tensor:
    """Length index of every token: uint8 (B,) -> uint8 (V,)."""
    if index_bits(num_lengths) == 0:
        return torch.zeros(num_tokens, dtype=torch.uint8, device=length_indices.device)
    rows = F.pad(length_indices, (0, -len(length_indices) % index_bits(num_lengths)))[None]
    return unpack_indices(rows, num_lengths).view(-1)[:num_tokens]


def block_ranks(assignment: Tensor, num_lengths: int) -> Tensor:
    """Tokens of each length before each block of `BLOCK` tokens, (V,) -> int32 (ceil(V / BLOCK), n)."""
    blocks = (len(assignment) + BLOCK - 1) // BLOCK
    block = torch.arange(len(assignment), device=assignment.device) // BLOCK
    counts = torch.zeros(blocks * num_lengths, dtype=torch.int32, device=assignment.device)
    counts.index_add_(0, block * num_lengths + assignment.to(torch.int64), torch.ones_like(block, dtype=torch.int32))
    counts = counts.view(blocks, num_lengths)
    return (counts.cumsum(0) - counts).to(torch.int32)


def locate(length_indices: Tensor, ranks: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Length index and place inside its group of each of `tokens`: int64 (N,) -> uint8 (N,), int64 (N,)."""
    num_lengths = int(ranks.shape[1])  # where a graph is traced, shapes are tensors
    if index_bits(num_lengths) == 0:
        return torch.zeros_like(tokens, dtype=torch.uint8), tokens
    block, inside = tokens // BLOCK, (tokens % BLOCK)[:, None]
    size = BLOCK * index_bits(num_lengths) // 8
    place = block[:, None] * size + torch.arange(size, device=length_indices.device)
    # Whatever fills up the last block comes after all tokens.
    neighbours = unpack_indices(length_indices[place.clamp_max(len(length_indices) - 1)], num_lengths)
    own = neighbours.gather(1, inside)
    earlier = (neighbours == own) & (torch.arange(BLOCK, device=tokens.device) < inside)
    own = own.squeeze(1)
    return own, ranks[block, own.to(torch.int64)] + earlier.sum(dim=1)


def check_padding(packed: Tensor, bits: int, name: str) -> None:
    """Raise ValueError if a bit beyond the first `bits` of `packed` is set."""
    if bits % 8 and int(packed[bits // 8]) >> (bits % 8):
        raise ValueError(f"{name}: padding bits after the last of {bits} bits are set; the file is damaged")
