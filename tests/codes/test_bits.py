import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adacomp.codes import bits as packing
from hf_adacomp.codes.packed import PackedCodes


@st.composite
def tables(draw):
    """Code lengths, the length index of each token and the bits of each token's code."""
    lengths = sorted(draw(st.sets(st.integers(1, 70), min_size=1, max_size=9)))
    num_tokens = draw(st.sampled_from([1, 2, 127, 128, 129, 300]) | st.integers(1, 400))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    share = torch.rand(len(lengths), generator=generator) ** 4 + 1e-9  # some lengths go to (almost) no token
    assignment = torch.multinomial(share, num_tokens, replacement=True, generator=generator)
    bits = [torch.randint(0, 2, (lengths[k],), generator=generator, dtype=torch.uint8) for k in assignment]
    return lengths, assignment, bits


def packed(lengths, assignment, bits) -> PackedCodes:
    groups = [[token for token in range(len(bits)) if assignment[token] == k] for k in range(len(lengths))]
    module = PackedCodes(len(bits), lengths, [len(group) for group in groups])
    module.length_indices.copy_(packing.pack_assignment(assignment, len(lengths)))
    blocks = [
        packing.pack_bits(torch.stack([bits[token] for token in group[i : i + 16]]))
        for group in groups
        for i in range(0, len(group), 16)
    ]
    module.codes.copy_(torch.cat(blocks))
    module.index()
    return module


@given(tables())
@settings(deadline=None)
def test_every_code_comes_back(table):
    lengths, assignment, bits = table
    module = packed(lengths, assignment, bits)
    module.validate("table")
    tokens = torch.randperm(len(bits))
    found, places = module.locate(tokens)
    assert torch.equal(found.long(), assignment[tokens])
    assert torch.equal(module.assignment().long(), assignment)
    for k in range(len(lengths)):
        rows = (found == k).nonzero().squeeze(1)
        for token, code in zip(tokens[rows].tolist(), module.bits(k, places[rows]), strict=True):
            assert torch.equal(code, bits[token])


@given(tables())
@settings(deadline=None)
def test_every_bit_is_counted(table):
    lengths, assignment, bits = table
    module = packed(lengths, assignment, bits)
    groups = [int((assignment == k).sum()) * length for k, length in enumerate(lengths)]
    assert module.codes.nbytes == sum(-(-group // 8) for group in groups)
    index_bits = 0
    while 2**index_bits < len(lengths):
        index_bits += 1
    assert module.length_indices.nbytes == -(-len(bits) * index_bits // 8)


def test_bits_fill_bytes_from_the_least_significant():
    assert packing.pack_bits(torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 1]])).tolist() == [1, 131]
    assert packing.pack_bits(torch.tensor([[0, 1, 1]])).tolist() == [6]
    assert packing.pack_assignment(torch.tensor([3, 0, 2, 1, 1]), 4).tolist() == [0b01_10_00_11, 0b01]


@given(st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None)
def test_rows_round_trip_and_a_flipped_bit_shows(rows, length):
    bits = torch.randint(0, 2, (rows, length), dtype=torch.uint8)
    data = packing.pack_bits(bits)
    assert torch.equal(packing.unpack_rows(data, torch.arange(rows), length), bits)
    row, column = rows // 2, length // 2
    position = row * length + column
    data[position // 8] ^= 1 << (position % 8)
    bits[row, column] ^= 1
    assert torch.equal(packing.unpack_rows(data, torch.arange(rows), length), bits)


def small() -> PackedCodes:
    generator = torch.Generator().manual_seed(0)
    assignment = torch.tensor([0, 1, 2, 1, 0])
    lengths = [3, 5, 9]
    return packed(lengths, assignment, [torch.randint(0, 2, (lengths[k],), generator=generator) for k in assignment])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda m: m.length_indices.__setitem__(0, 0b11_00_01_00),
            "t.length_indices gives",
        ),
        (lambda m: m.length_indices.__setitem__(1, 0b100), "padding bits after the last of 10 bits are set"),
        (lambda m: m.codes.__setitem__(0, 0b1100_0000), "t.codes, group 0: padding bits"),
        (lambda m: setattr(m, "codes", m.codes[:-1]), r"t.codes must be uint8 of shape \(5,\).*\(4,\)"),
        (lambda m: setattr(m, "codes", m.codes.float()), r"t.codes must be uint8"),
        (
            lambda m: setattr(m, "length_indices", torch.zeros(9, dtype=torch.uint8)),
            r"t.length_indices must be uint8 of shape \(2,\)",
        ),
    ],
)
def test_damage_is_named(damage, message):
    module = small()
    module.validate("t")
    damage(module)
    with pytest.raises(ValueError, match=message):
        module.validate("t")


@pytest.mark.parametrize("tokens_per_length", [(1, 1), (1, 1, 1), (2, 2, 2)])
def test_layout_must_share_out_all_tokens(tokens_per_length):
    with pytest.raises(ValueError, match="does not share out 5 tokens over 3 code lengths"):
        PackedCodes(5, (3, 5, 9), tokens_per_length)


def test_loading_other_codes_forgets_the_old_places():
    module, other = small(), small()
    module.locate(torch.arange(5))
    other.length_indices.copy_(packing.pack_assignment(torch.tensor([1, 0, 0, 2, 1]), 3))
    module.load_state_dict(other.state_dict())
    assert module.locate(torch.arange(5))[0].tolist() == [1, 0, 0, 2, 1]
    assert module.locate(torch.arange(5))[1].tolist() == [0, 0, 1, 0, 1]


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**31))
@settings(deadline=None)
def test_nibbles_come_back(rows, dim, seed):
    integers = torch.randint(-7, 8, (rows, dim), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = packing.pack_nibbles(integers)
    assert packed.shape == (rows, (dim + 1) // 2)
    assert packed.dtype == torch.uint8
    assert torch.equal(packing.unpack_nibbles(packed, dim), integers)


def test_nibbles_have_the_documented_layout():
    assert packing.pack_nibbles(torch.tensor([[-7, 7, 0]], dtype=torch.int8)).tolist() == [[0x81, 0x0F]]


def test_everything_stays_on_its_device():
    """Meta tensors refuse to meet tensors of another device, so that one machine stands for all."""
    assignment, rows = (
        torch.zeros(70, dtype=torch.uint8, device="meta"),
        torch.zeros(9, dtype=torch.int64, device="meta"),
    )
    for num_lengths in (1, 3, 5):
        lengths = packing.pack_assignment(assignment, num_lengths)
        ranks = packing.block_ranks(assignment, num_lengths)
        places = packing.locate(lengths, ranks, rows)
        found = [lengths, ranks, *places, packing.unpack_assignment(lengths, 70, num_lengths)]
        assert {tensor.device.type for tensor in found} == {"meta"}
    for length in (5, 16):
        codes = packing.pack_bits(torch.zeros(9, length, device="meta"))
        assert packing.unpack_rows(codes, rows, length).is_meta
    assert packing.unpack_nibbles(torch.zeros(3, 4, dtype=torch.uint8, device="meta"), 7).is_meta


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_bits_of_any_dtype_are_packed_alike(dtype):
    bits = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=dtype)
    assert packing.pack_bits(bits).tolist() == [0b110_101]
    assert packing.pack_bits(bits).dtype == torch.uint8


def test_dtypes_are_the_documented_ones():
    tokens = torch.arange(40)
    for num_lengths, length in ((1, 8), (3, 5), (6, 16)):
        assignment = (tokens % num_lengths).to(torch.uint8)
        lengths, ranks = packing.pack_assignment(assignment, num_lengths), packing.block_ranks(assignment, num_lengths)
        own, places = packing.locate(lengths, ranks, tokens)
        assert (lengths.dtype, ranks.dtype, own.dtype, places.dtype) == (
            torch.uint8,
            torch.int32,
            torch.uint8,
            torch.int64,
        )
        assert ranks.shape == (2, num_lengths)
        assert packing.unpack_assignment(lengths, 40, num_lengths).dtype == torch.uint8
        codes = packing.pack_bits(torch.ones(40, length))
        assert packing.unpack_rows(codes, tokens, length).dtype == torch.float32
    nibbles = torch.zeros(2, 3, dtype=torch.uint8)
    assert packing.unpack_nibbles(nibbles, 6).dtype == torch.int8
    assert packing.unpack_nibbles(nibbles, 6, torch.bfloat16).dtype == torch.bfloat16
    assert packing.block_ranks(torch.zeros(64, dtype=torch.uint8), 2).shape == (2, 2)  # no row beyond the last block


def test_a_share_for_every_length_is_needed():
    with pytest.raises(ValueError, match="zip"):
        packing.group_bytes([1, 2], [3, 4, 5])


def test_any_bit_beyond_the_last_is_found():
    for bits in (1, 7, 9, 16):
        data = torch.zeros(2, dtype=torch.uint8)
        packing.check_padding(data, bits, "t")
        for beyond in range(bits, 8 * -(-bits // 8)):
            damaged = data.clone()
            damaged[beyond // 8] = 1 << beyond % 8
            with pytest.raises(ValueError, match=f"^t: padding bits after the last of {bits} bits are set"):
                packing.check_padding(damaged, bits, "t")
        if bits % 8:
            data[bits // 8] = (1 << bits % 8) - 1  # all that are allowed
            packing.check_padding(data, bits, "t")
