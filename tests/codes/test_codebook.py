from itertools import pairwise

import pytest
import torch
from torch.autograd import gradcheck

from hf_adacomp.codes.codebook import BinaryCodebook
from hf_adacomp.codes.descent import BinaryStep, nearest_bits
from hf_adacomp.codes.rounding import quantize_rows
from hf_adacomp.config import CODEBOOK_DTYPES, FLOAT_DTYPES
from hf_adacomp.fitting.spectrum import squared_norms

METRIC = torch.diag(torch.tensor([4.0, 1.0, 1.0, 0.5], dtype=torch.float64))


def book(length=6, dim=4, *, tied=False) -> BinaryCodebook:
    return BinaryCodebook(length, dim, tied=tied, storage="float64", dtype=torch.float64)


def encode(module: BinaryCodebook, x: torch.Tensor) -> torch.Tensor:
    return module.encoder(module.stored(), METRIC.to(x)).encode(x)


def decode(module: BinaryCodebook, bits: torch.Tensor) -> torch.Tensor:
    return module.stored().decode(bits)


@pytest.fixture(autouse=True)
def exact_storage(monkeypatch):
    """A dtype of storage that rounds nothing, so that gradients can be checked by differences."""
    monkeypatch.setitem(FLOAT_DTYPES, "float64", torch.float64)


def ramp(z, bits=None):
    """What the straight-through gradient is defined as the gradient of."""
    return ((z + 1) / 2).clamp(0, 1)


def test_step_is_hard_and_its_gradient_is_that_of_the_ramp():
    z = torch.linspace(-2, 2, 41, dtype=torch.float64) + 0.013
    z.requires_grad_()
    weight = torch.randn_like(z)
    decided = (z > 0).double()
    bits = BinaryStep.apply(z, decided)
    assert torch.equal(bits, decided)
    (hard,) = torch.autograd.grad((bits * weight).sum(), z)
    (soft,) = torch.autograd.grad((ramp(z) * weight).sum(), z)
    assert torch.equal(hard, soft)
    assert gradcheck(ramp, (z,))


@pytest.mark.parametrize("tied", [False, True])
def test_encoder_gradient_is_that_of_the_relaxed_network(tied, monkeypatch):
    module = book(tied=tied)
    x = 0.3 * torch.randn(5, 4, dtype=torch.float64)
    target = torch.randn(5, 6, dtype=torch.float64)
    parameters = [p for p in module.parameters() if p.requires_grad]

    def gradients():
        loss = (encode(module, x) * target).sum()
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    hard = gradients()
    monkeypatch.setattr(BinaryStep, "apply", ramp)
    for a, b in zip(hard, gradients(), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b)


def test_code_vectors_follow_decoding_alone():
    module = book(tied=True)
    encode(module, torch.randn(5, 4, dtype=torch.float64)).sum().backward()
    assert module.weight.grad is None
    assert module.encoder_bias.grad is not None


def test_bits_are_those_of_the_nearest_sum_of_orthogonal_vectors():
    vectors = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0] * torch.linspace(1, 3, 12)[:, None]
    bits = torch.randint(0, 2, (50, 12)).double()
    x = bits @ vectors + 0.1 * torch.randn(50, 12, dtype=torch.float64)
    assert torch.equal(nearest_bits(x, vectors, torch.zeros(12, dtype=torch.float64)), bits)


@pytest.mark.parametrize("euclidean", [True, False])
@pytest.mark.parametrize("alike", [0.0, 0.5, 5.0])
def test_more_sweeps_never_lose(alike, euclidean, monkeypatch):
    """Also for vectors that all have a direction in common, where deciding many bits at once overshoots."""
    vectors, x, bias = torch.randn(64, 16) + alike * torch.randn(16), 4 * torch.randn(100, 16), torch.randn(16)
    metric = torch.eye(16) if euclidean else torch.randn(16, 16).cov() + torch.eye(16)
    errors = []
    for sweeps in range(1, 7):
        monkeypatch.setattr("hf_adacomp.codes.descent.SWEEPS", sweeps)
        decoded = nearest_bits(x, vectors, bias, metric=metric) @ vectors + bias
        errors.append(squared_norms(x - decoded, metric))
    assert all((after <= before + 1e-2).all() for before, after in pairwise(errors))
    assert errors[-1].sum() < errors[0].sum()


def test_decode_is_the_sum_of_active_code_vectors_and_the_bias():
    module = book()
    bits = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    decoded = decode(module, bits)
    vectors = module.stored().vectors
    assert torch.allclose(decoded[0], vectors[0] + vectors[2] + vectors[5] + module.bias)
    assert torch.equal(decoded[1], module.bias)
    bits.requires_grad_()
    assert gradcheck(lambda *_: decode(module, bits), (bits, module.weight, module.bias))


@pytest.mark.parametrize("storage", CODEBOOK_DTYPES)
def test_training_sees_the_stored_vectors_and_packing_keeps_them(storage):
    module = BinaryCodebook(6, 4, tied=True, storage=storage)
    bits = torch.randint(0, 2, (9, 6)).float()
    before = decode(module, bits)
    before.sum().backward()
    expected = module.rate * bits.sum(0)[:, None].expand(6, 4)
    assert torch.allclose(module.weight.grad, expected)  # straight through the rounding
    module.pack()
    assert torch.equal(decode(module, bits), before)
    saved = module.state_dict()
    assert sum(tensor.nbytes for tensor in saved.values()) == module.stored_bytes()
    other = BinaryCodebook(6, 4, tied=True, storage=storage)
    other.pack()
    other.load_state_dict(saved)
    assert torch.equal(decode(other, bits), before)


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


def test_orthogonality_is_zero_for_orthonormal_vectors_of_any_scale():
    module = book(length=3, dim=4)
    with torch.no_grad():
        module.weight.copy_(7 * torch.linalg.qr(torch.randn(4, 3, dtype=torch.float64))[0].T)
        assert module.orthogonality() == pytest.approx(0, abs=1e-12)
        module.weight[0] = module.weight[1]
        assert module.orthogonality() == pytest.approx(2 / 3)
    assert gradcheck(lambda _: module.orthogonality(), (module.weight,))


def test_reconstruct_in_blocks_is_encode_and_decode(monkeypatch):
    monkeypatch.setattr("hf_adacomp.codes.codebook.BITS_PER_BLOCK", 64)
    module = book()
    x = torch.randn(100, 4, dtype=torch.float64)
    assert module.block == 8
    assert torch.allclose(module.reconstruct(x, METRIC), decode(module, encode(module, x)))


@pytest.mark.parametrize("length", [1, 8, 512])
def test_a_step_of_the_optimizer_moves_vectors_by_about_sqrt_half_length_steps(length):
    """Not by L/2: all code vectors of a code move the same way if its gradient says so."""
    module = BinaryCodebook(length, 4, tied=True, storage="float32")
    bits = torch.ones(1, length)
    before = decode(module, bits).detach()
    decode(module, bits).sum().backward()
    torch.optim.Adam([module.weight], lr=1e-3).step()
    moved = (before - decode(module, bits)).abs()
    assert torch.allclose(moved, torch.full_like(moved, 1e-3 * length * module.rate), rtol=1e-2)
    assert module.rate == pytest.approx(min(1, (2 / length) ** 0.5))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_float16_rows_are_rounded_as_well_as_float32_ones(bits, size):
    weight = (size * torch.randn(40, 64)).half()
    errors = [
        float(((integers * scale.float() - weight.float()) ** 2).mean())
        for integers, scale in (quantize_rows(weight, bits), quantize_rows(weight.float(), bits))
    ]
    assert errors[0] < 1.02 * errors[1]
