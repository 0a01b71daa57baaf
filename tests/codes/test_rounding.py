import pytest
import torch

from hf_adacomp.codes.codebook import BinaryCodebook
from hf_adacomp.codes.rounding import CLIP, codebook_bytes, quantize_rows, round_vectors, straight_through
from hf_adacomp.config import CODEBOOK_DTYPES, FLOAT_DTYPES


def rows() -> torch.Tensor:
    """Rows of many sizes, one of them zero."""
    weight = torch.randn(7, 33) * torch.logspace(-6, 3, 7)[:, None]
    weight[3] = 0
    return weight


def test_int8_rows_are_within_half_a_step(device):
    weight = rows().to(device)
    integers, scale = quantize_rows(weight, 8)
    assert integers.dtype == torch.int8
    assert ((integers * scale - weight).abs() <= scale / 2 * 1.001).all()


def test_int4_rows_are_within_half_a_step_of_the_clipped_entries(device):
    weight = rows().to(device)
    integers, scale = quantize_rows(weight, 4)
    most = CLIP[4] * weight.square().mean(dim=1, keepdim=True).sqrt()
    clipped = weight.minimum(most).maximum(-most)
    assert (clipped != weight).any()
    assert integers.dtype == torch.int8
    assert integers.abs().max() == 7
    assert ((integers * scale - clipped).abs() <= scale / 2 * 1.001).all()


def test_int4_rows_lose_little_of_normal_entries():
    weight = torch.randn(50, 384)
    integers, scale = quantize_rows(weight, 4)
    # 0.0115 is the least mean squared error of 16 uniform levels (Max 1960); we have 15.
    assert (integers * scale - weight).square().mean() < 0.015


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_of_zeros_stays_zero(bits):
    integers, scale = quantize_rows(torch.zeros(1, 5), bits)
    assert not integers.any()
    assert (scale > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", CODEBOOK_DTYPES)
def test_vectors_are_rounded_to_what_is_stored_in_their_own_dtype(storage, dtype):
    vectors = torch.randn(6, 10).to(dtype)
    rounded = round_vectors(vectors, storage)
    assert rounded.dtype == dtype
    if storage in FLOAT_DTYPES:
        assert torch.equal(rounded, vectors.to(FLOAT_DTYPES[storage]).to(dtype))
    else:
        integers, scale = quantize_rows(vectors, int(storage.removeprefix("int")))
        assert torch.equal(rounded, integers.to(dtype) * scale)


def test_float32_loses_nothing():
    vectors = torch.randn(6, 10)
    assert torch.equal(round_vectors(vectors, "float32"), vectors)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_straight_through_is_exactly_the_rounded_value_with_the_exact_gradient(size, device):
    value = (size * torch.randn(50, device=device)).requires_grad_()
    rounded = (value / 3).round().detach() * 3 + 0.1
    passed, weight = straight_through(value, rounded), torch.randn(50, device=device)
    assert torch.equal(passed, rounded)
    (passed * weight).sum().backward()
    assert torch.equal(value.grad, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "dim"), [(6, 4), (5, 7), (1, 1)])
@pytest.mark.parametrize("storage", CODEBOOK_DTYPES)
def test_codebook_bytes_are_those_of_the_stored_tensors(storage, length, dim, dtype):
    book = BinaryCodebook(length, dim, tied=True, storage=storage, dtype=dtype)
    book.pack()
    assert codebook_bytes(length, dim, storage, dtype) == sum(tensor.nbytes for tensor in book.state_dict().values())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_float16_rows_are_rounded_as_well_as_float32_ones(bits, size):
    weight = (size * torch.randn(40, 64)).half()
    errors = [
        float(((integers * scale.float() - weight.float()) ** 2).mean())
        for integers, scale in (quantize_rows(weight, bits), quantize_rows(weight.float(), bits))
    ]
    assert errors[0] < 1.02 * errors[1]
