import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adacomp.codes.bits import pack_assignment, pack_bits
from hf_adacomp.codes.packed import PackedCodes


@st.composite
def tables(draw):
    """Code lengths, the length index of each token and the bits of each token's code."""
    unit = draw(st.sampled_from([1, 8]))  # whole bytes are read otherwise
    lengths = sorted(unit * length for length in draw(st.sets(st.integers(1, 70 // unit), min_size=1, max_size=8)))
    num_tokens = draw(st.sampled_from([1, 2, 127, 128, 129, 300]) | st.integers(1, 400))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    share = torch.rand(len(lengths), generator=generator) ** 4 + 1e-9  # some lengths go to (almost) no token
    assignment = torch.multinomial(share, num_tokens, replacement=True, generator=generator)
    bits = [torch.randint(0, 2, (lengths[k],), generator=generator, dtype=torch.uint8) for k in assignment]
    return lengths, assignment, bits


def packed(lengths, assignment, bits) -> PackedCodes:
    groups = [[token for token in range(len(bits)) if assignment[token] == k] for k in range(len(lengths))]
    blocks = [
        pack_bits(torch.stack([bits[token] for token in group[i : i + 16]]))
        for group in groups
        for i in range(0, len(group), 16)
    ]
    return PackedCodes.of(assignment, lengths, torch.cat(blocks))


@given(tables())
@settings(deadline=None)
def test_every_code_comes_back(table):
    lengths, assignment, bits = table
    module = packed(lengths, assignment, bits)
    tokens = torch.randperm(len(bits))
    found, places = module.locate(tokens)
    module.validate("table")
    assert torch.equal(found.long(), assignment[tokens])
    assert torch.equal(module.assignment().long(), assignment)
    codes = module.centred(found, places, lengths[-1])
    for token, code in zip(tokens.tolist(), codes, strict=True):
        own = bits[token]
        assert torch.equal(code[: len(own)], own - 0.5)
        assert not code[len(own) :].any()


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


LENGTHS = (3, 5, 9)
ASSIGNMENT = torch.tensor([0, 1, 2, 1, 0])


def small(device="cpu") -> PackedCodes:
    generator = torch.Generator().manual_seed(0)
    bits = [torch.randint(0, 2, (LENGTHS[k],), generator=generator).to(device) for k in ASSIGNMENT]
    return packed(LENGTHS, ASSIGNMENT.to(device), bits)


def codes(module: PackedCodes) -> list[list[float]]:
    """The bits of each token's code."""
    tokens = torch.arange(module.num_tokens, device=module.codes.device)
    lengths, places = module.locate(tokens)
    found = module.centred(lengths, places, LENGTHS[-1]) + 0.5
    return [row[: LENGTHS[k]].tolist() for k, row in zip(lengths.tolist(), found, strict=True)]


def test_codes_are_the_same_on_every_device(device):
    module = small(device)
    assert {buffer.device.type for buffer in module.buffers()} == {device.type}
    module.validate("t")
    assert codes(module) == codes(small())


def test_codes_that_move_are_still_found(device):
    assert codes(small().to(device)) == codes(small())


@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4], [0, 1, 2], [0], [4, 1, 2, 0]])
def test_resized_codes_keep_tokens_in_order_and_append_the_longest_codes(kept, device):
    module, new = small(device), torch.full((2, 9), 0.5, device=device)
    resized = module.resized(torch.tensor(kept, device=device), new)
    resized.validate("t")
    assert resized.assignment().tolist() == [*ASSIGNMENT[kept].tolist(), 2, 2]
    assert codes(resized) == [codes(module)[token] for token in kept] + [[1.0] * 9] * 2


def test_resized_codes_do_not_depend_on_the_blocks_they_are_made_in(monkeypatch):
    assignment = torch.arange(90) % 3
    module = packed(LENGTHS, assignment, [torch.arange(LENGTHS[k]) % 2 for k in assignment])
    kept, new = torch.arange(89, -1, -1), torch.full((3, 9), 0.5)
    whole = module.resized(kept, new)
    monkeypatch.setattr("hf_adacomp.codes.packed.BITS_PER_BLOCK", 1)
    assert torch.equal(module.resized(kept, new).codes, whole.codes)


def test_copies_are_without_what_is_kept():
    module = small()
    fresh = len(pickle.dumps(module))
    module.order(), module.locate(torch.tensor([0]))
    assert len(pickle.dumps(module)) == fresh


def test_what_is_kept_is_let_go_by_a_move_and_not_by_a_check():
    module = small()
    module.order(), module.locate(torch.tensor([0]))
    kept = module.kept_bytes
    module.validate("table")
    assert module.kept_bytes == kept > 0
    assert module.to("cpu").kept_bytes == 0


def test_what_is_kept_on_another_device_is_made_anew():
    """As where tensors are moved one by one, and the module does not learn of it."""
    module = small()
    order, located = module.order(), module.locate(torch.tensor([0]))
    module._order, module._located = module._order.to("meta"), tuple(kept.to("meta") for kept in module._located)
    assert torch.equal(module.order(), order)
    assert all(torch.equal(*pair) for pair in zip(module.locate(torch.tensor([0])), located, strict=True))


def test_codes_that_were_indexed_in_inference_mode_take_part_in_gradients():
    module = small()
    with torch.inference_mode():
        module.index()
    assert not any(buffer.is_inference() for buffer in module.buffers())


def test_groups_lie_behind_each_other():
    module = small()
    assert [len(module.group(k)) for k in range(3)] == [1, 2, 2]
    assert torch.equal(torch.cat([module.group(k) for k in range(3)]), module.codes)


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
        PackedCodes(5, LENGTHS, tokens_per_length)


def test_loading_other_codes_forgets_the_old_places():
    module, other = small(), small()
    module.locate(torch.arange(5))
    other.length_indices.copy_(pack_assignment(torch.tensor([1, 0, 0, 2, 1]), 3))
    module.load_state_dict(other.state_dict())
    assert module.locate(torch.arange(5))[0].tolist() == [1, 0, 0, 2, 1]
    assert module.places().tolist() == [2, 0, 1, 4, 3]
    assert module.locate(torch.arange(5))[1].tolist() == [8, 0, 3, 24, 13]


def test_a_file_holds_lengths_and_codes_and_no_ranks():
    assert [*small().state_dict()] == ["length_indices", "codes"]


def test_order_is_that_of_the_codes_and_follows_them(device):
    module = small().to(device)
    assert module.order().tolist() == [0, 4, 1, 3, 2]
    assert module.places()[module.order()].tolist() == [0, 1, 2, 3, 4]
    module.length_indices.copy_(pack_assignment(torch.tensor([1, 0, 0, 2, 1], device=device), 3))
    module.index()
    assert module.order().tolist() == [1, 2, 0, 4, 3]
    assert module.order().device == module.codes.device
