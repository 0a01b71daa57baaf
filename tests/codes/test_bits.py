import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adacomp.codes import bits


def test_bits_fill_bytes_from_the_least_significant():
    assert bits.pack_bits(torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 1]])).tolist() == [1, 131]
    assert bits.pack_bits(torch.tensor([[0, 1, 1]])).tolist() == [6]
    assert bits.pack_assignment(torch.tensor([3, 0, 2, 1, 1]), 4).tolist() == [0b01_10_00_11, 0b01]


def unpacked(data, rows, length):
    octets = bits.centred_bytes(data.device) if length % 8 == 0 else None
    size = length // 8 if length % 8 == 0 else length
    starts = size * torch.arange(rows, device=data.device)
    found = bits.centred_bits(data, starts, torch.full_like(starts, size), size, octets)
    assert found.dtype == torch.float32
    return (found + 0.5).to(torch.uint8)


@given(st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None)
def test_rows_round_trip_and_a_flipped_bit_shows(rows, length):
    codes = torch.randint(0, 2, (rows, length), dtype=torch.uint8)
    data = bits.pack_bits(codes)
    assert torch.equal(unpacked(data, rows, length), codes)
    row, column = rows // 2, length // 2
    position = row * length + column
    data[position // 8] ^= 1 << (position % 8)
    codes[row, column] ^= 1
    assert torch.equal(unpacked(data, rows, length), codes)


def test_codes_that_have_ended_are_zero_also_beyond_the_last_byte():
    data = torch.tensor([0b1010_1100, 0xFF], dtype=torch.uint8)
    starts, lengths = torch.tensor([0, 8, 0]), torch.tensor([16, 8, 0])
    for octets, unit in ((bits.centred_bytes(), 8), (None, 1)):
        found = bits.centred_bits(data, starts // unit, lengths // unit, 24 // unit, octets)
        assert found[0].tolist() == [-0.5, -0.5, 0.5, 0.5, -0.5, 0.5, -0.5, 0.5, *[0.5] * 8, *[0] * 8]
        assert found[1].tolist() == [0.5] * 8 + [0] * 16
        assert not found[2].any()


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**31))
@settings(deadline=None)
def test_nibbles_come_back(rows, dim, seed):
    integers = torch.randint(-7, 8, (rows, dim), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = bits.pack_nibbles(integers)
    assert packed.shape == (rows, (dim + 1) // 2)
    assert packed.dtype == torch.uint8
    assert torch.equal(bits.unpack_nibbles(packed, dim), integers)


def test_nibbles_have_the_documented_layout():
    assert bits.pack_nibbles(torch.tensor([[-7, 7, 0]], dtype=torch.int8)).tolist() == [[0x81, 0x0F]]


def test_everything_stays_on_its_device(device):
    assignment, rows = torch.arange(70, device=device) % 3, torch.arange(9, device=device)
    for num_lengths in (3, 5):
        indices = bits.pack_assignment(assignment, num_lengths)
        ranks = bits.block_ranks(assignment, num_lengths)
        places = bits.locate(indices, ranks, rows)
        found = [indices, ranks, *places, bits.unpack_assignment(indices, 70, num_lengths)]
        assert {tensor.device for tensor in found} == {assignment.device}
        assert torch.equal(bits.unpack_assignment(indices, 70, num_lengths).long(), assignment)
    for length in (5, 16):
        codes = torch.arange(9 * length, device=device).view(9, length) % 2
        found = unpacked(bits.pack_bits(codes), 9, length)
        assert torch.equal(found.long(), codes)
        assert found.device == codes.device
    nibbles = torch.arange(12, device=device, dtype=torch.uint8).view(3, 4)
    assert bits.unpack_nibbles(nibbles, 7).device == nibbles.device


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_checksum_changes_with_any_byte(dtype):
    tensor = torch.arange(12).to(dtype).view(3, 4)
    expected = bits.checksum(tensor)
    assert bits.checksum(tensor.T.contiguous().T) == expected  # whatever the strides are
    tensor[1, 2] += 1
    assert bits.checksum(tensor) != expected


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_bits_of_any_dtype_are_packed_alike(dtype):
    codes = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=dtype)
    assert bits.pack_bits(codes).tolist() == [0b110_101]
    assert bits.pack_bits(codes).dtype == torch.uint8


def test_dtypes_are_the_documented_ones():
    tokens = torch.arange(40)
    for num_lengths in (1, 3, 6):
        assignment = (tokens % num_lengths).to(torch.uint8)
        lengths, ranks = bits.pack_assignment(assignment, num_lengths), bits.block_ranks(assignment, num_lengths)
        own, places = bits.locate(lengths, ranks, tokens)
        assert (lengths.dtype, ranks.dtype, own.dtype, places.dtype) == (
            torch.uint8,
            torch.int32,
            torch.uint8,
            torch.int64,
        )
        assert ranks.shape == (2, num_lengths)
        assert bits.unpack_assignment(lengths, 40, num_lengths).dtype == torch.uint8
    nibbles = torch.zeros(2, 3, dtype=torch.uint8)
    assert bits.unpack_nibbles(nibbles, 6).dtype == torch.int8
    assert bits.unpack_nibbles(nibbles, 6, torch.bfloat16).dtype == torch.bfloat16
    assert bits.block_ranks(torch.zeros(64, dtype=torch.uint8), 2).shape == (2, 2)  # no row beyond the last block


def test_a_share_for_every_length_is_needed():
    with pytest.raises(ValueError, match="zip"):
        bits.group_bytes([1, 2], [3, 4, 5])


def test_any_bit_beyond_the_last_is_found():
    for used in (1, 7, 9, 16):
        data = torch.zeros(2, dtype=torch.uint8)
        bits.check_padding(data, used, "t")
        for beyond in range(used, 8 * -(-used // 8)):
            damaged = data.clone()
            damaged[beyond // 8] = 1 << beyond % 8
            with pytest.raises(ValueError, match=f"^t: padding bits after the last of {used} bits are set"):
                bits.check_padding(damaged, used, "t")
        if used % 8:
            data[used // 8] = (1 << used % 8) - 1  # all that are allowed
            bits.check_padding(data, used, "t")
