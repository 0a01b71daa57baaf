from itertools import pairwise

import pytest
import torch

from hf_adacomp.codes.descent import BinaryStep, decide_bits, nearest_bits


def ramp(z):
    """What the straight-through gradient is defined as the gradient of."""
    return (z / 2).clamp(-0.5, 0.5)


def test_step_is_hard_and_its_gradient_is_that_of_the_ramp(device):
    z = torch.linspace(-2, 2, 41, device=device) + 0.013
    z.requires_grad_()
    weight = torch.randn_like(z)
    decided = (z > 0).float() - 0.5
    bits = BinaryStep.apply(z, decided)
    assert torch.equal(bits, decided)
    (hard,) = torch.autograd.grad((bits * weight).sum(), z)
    (soft,) = torch.autograd.grad((ramp(z) * weight).sum(), z)
    assert torch.equal(hard, soft)


def test_step_passes_on_second_thoughts():
    """Bits that the descent decided against their pre-activation are handed on as they are."""
    z, decided = torch.tensor([-0.5, 0.5]), torch.tensor([0.5, -0.5])
    assert torch.equal(BinaryStep.apply(z, decided), decided)


def test_bits_are_those_of_the_nearest_sum_of_orthogonal_vectors():
    vectors = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0] * torch.linspace(1, 3, 12)[:, None]
    bits = torch.randint(0, 2, (50, 12)).double() - 0.5
    x = bits @ vectors + 0.1 * torch.randn(50, 12, dtype=torch.float64)
    assert torch.equal(nearest_bits(x, vectors, torch.zeros(12, dtype=torch.float64)), bits)


@pytest.mark.parametrize("alike", [0.0, 0.5, 5.0])
def test_more_sweeps_never_lose(alike, monkeypatch):
    """Also for vectors that all have a direction in common, where deciding many bits at once overshoots."""
    vectors, x, bias = torch.randn(64, 16) + alike * torch.randn(16), 4 * torch.randn(100, 16), torch.randn(16)
    errors = []
    for sweeps in range(1, 7):
        monkeypatch.setattr("hf_adacomp.codes.descent.SWEEPS", sweeps)
        decoded = nearest_bits(x, vectors, bias) @ vectors + bias
        errors.append((x - decoded).square().sum(1))
    assert all((after <= before + 1e-2).all() for before, after in pairwise(errors))
    assert errors[-1].sum() < errors[0].sum()


def problem(length=24, dim=8):
    """Drives and overlap of 40 vectors and a code-book, and the squared error that bits leave."""
    vectors, bias = torch.randn(length, dim, dtype=torch.float64), torch.randn(dim, dtype=torch.float64)
    x = 3 * torch.randn(40, dim, dtype=torch.float64)
    overlap = vectors @ vectors.T
    drive = (x - bias) @ vectors.T
    return drive, overlap.fill_diagonal_(0), lambda bits: (x - bias - bits @ vectors).square().sum(1)


@pytest.mark.parametrize("length", [1, 7, 24])
def test_at_the_end_of_the_descent_no_single_bit_lowers_the_error(length, monkeypatch):
    monkeypatch.setattr("hf_adacomp.codes.descent.SWEEPS", 100)
    drive, overlap, error = problem(length)
    bits, _ = decide_bits(drive, overlap)
    for i in range(length):
        flipped = bits.clone()
        flipped[:, i] *= -1
        assert (error(flipped) >= error(bits) - 1e-9).all()


def test_bits_at_the_end_of_the_descent_stay(monkeypatch):
    monkeypatch.setattr("hf_adacomp.codes.descent.SWEEPS", 100)
    drive, overlap, _ = problem()
    bits, margins = decide_bits(drive, overlap)
    monkeypatch.setattr("hf_adacomp.codes.descent.SWEEPS", 1)
    again, margins_again = decide_bits(drive, overlap, bits)
    assert torch.equal(again, bits)
    assert torch.allclose(margins_again, margins)
    assert torch.equal(bits, (margins > 0).double() - 0.5)


def test_margins_are_what_a_bit_saves():
    """A margin is half of what the squared error gains if its bit is set rather than not."""
    drive, overlap, error = problem(length=8)  # blocks of one bit: no bit changes along with another
    bits, margins = decide_bits(drive, overlap)
    last = bits.clone(), bits.clone()
    last[0][:, -1], last[1][:, -1] = -0.5, 0.5
    assert torch.allclose(margins[:, -1], (error(last[0]) - error(last[1])) / 2)


def test_the_start_is_left_as_it_was():
    drive, overlap, _ = problem()
    start = torch.rand_like(drive) - 0.5
    kept = start.clone()
    decide_bits(drive, overlap, start)
    assert torch.equal(start, kept)


def test_a_perfect_start_stays():
    vectors, bias = torch.randn(24, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    start = torch.randint(0, 2, (30, 24)).double() - 0.5
    x = start @ vectors + bias
    assert torch.equal(nearest_bits(x, vectors, bias, start=start), start)


def test_bits_do_not_depend_on_the_device(device):
    vectors, bias = torch.randn(24, 8), torch.randn(8)
    x = (torch.randint(0, 2, (30, 24)).float() - 0.5) @ vectors + bias + 0.1 * torch.randn(30, 8)
    found = nearest_bits(x.to(device), vectors.to(device), bias.to(device))
    assert found.device.type == device.type
    assert (found.cpu() != nearest_bits(x, vectors, bias)).float().mean() < 1e-3  # ties may tip
