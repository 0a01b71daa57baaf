import pytest
import torch

from hf_adacomp.codes.codebook import BinaryCodebook
from hf_adacomp.codes.rounding import codebook_bytes, quantize_rows, round_vectors, straight_through
from hf_adacomp.config import CODEBOOK_DTYPES


def test_int8_rows_are_within_half_a_step():
    weight = torch.randn(7, 33) * torch.logspace(-6, 3, 7)[:, None]
    weight[3] = 0
    integers, scale = quantize_rows(weight, 8)
    assert integers.dtype == torch.int8
    assert ((integers * scale - weight).abs() <= scale / 2 * 1.001).all()


def test_int4_rows_lose_little_of_normal_entries():
    weight = torch.randn(50, 384)
    integers, scale = quantize_rows(weight, 4)
    assert integers.dtype == torch.int8
    assert integers.abs().max() == 7
    # 0.0115 is the least mean squared error of 16 uniform levels (Max 1960); we have 15.
    assert (integers * scale - weight).square().mean() < 0.015


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_float16_rows_are_rounded_as_well_as_float32_ones(bits, size):
    weight = (size * torch.randn(40, 64)).half()
    errors = [
        float(((integers * scale.float() - weight.float()) ** 2).mean())
        for integers, scale in (quantize_rows(weight, bits), quantize_rows(weight.float(), bits))
    ]
    assert errors[0] < 1.02 * errors[1]


@pytest.mark.parametrize("storage", CODEBOOK_DTYPES)
def test_rounding_twice_changes_nothing(storage, device):
    vectors = torch.randn(9, 12, device=device)
    once = round_vectors(vectors, storage)
    assert once.dtype == vectors.dtype
    assert once.device == vectors.device
    if storage != "int4":  # whose clipping is by the row's own size
        assert torch.allclose(round_vectors(once, storage), once, rtol=1e-6)
    assert (once - vectors).square().mean() < 0.02


def test_straight_through_is_exactly_the_rounded_value_with_the_gradient_of_the_other():
    value = torch.randn(50, requires_grad=True)
    rounded = round_vectors(value.detach()[None], "int4")[0]
    passed = straight_through(value, rounded)
    assert torch.equal(passed, rounded)
    weight = torch.randn(50)
    (passed * weight).sum().backward()
    assert torch.equal(value.grad, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [7, 8])
@pytest.mark.parametrize("storage", CODEBOOK_DTYPES)
def test_bytes_are_those_of_the_stored_tensors(storage, dim, dtype):
    book = BinaryCodebook(5, dim, tied=True, storage=storage, dtype=dtype)
    book.pack()
    stored = sum(tensor.nbytes for tensor in book.state_dict().values())
    assert codebook_bytes(5, dim, storage, dtype) == stored
