from itertools import pairwise

import pytest
import torch

from hf_adacomp.codes.descent import BinaryStep, decide_bits, nearest_bits
from hf_adacomp.fitting.spectrum import squared_norms


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


def test_far_from_its_threshold_a_bit_gets_no_gradient():
    z = torch.tensor([-1.5, -0.5, 0.5, 1.5], requires_grad=True)
    BinaryStep.apply(z, (z > 0).float()).sum().backward()
    assert z.grad.tolist() == [0, 0.5, 0.5, 0]


def test_margins_are_what_the_bits_were_decided_by(device):
    vectors, x = torch.randn(8, 16, device=device), torch.randn(50, 16, device=device)
    overlap = vectors @ vectors.T
    drive = x @ vectors.T - overlap.diagonal() / 2
    bits, margins = decide_bits(drive, overlap.fill_diagonal_(0), torch.full_like(drive, 0.5))
    assert bits.device == margins.device == x.device
    # With one bit a block, the last one was decided when all others were.
    assert torch.equal(bits[:, -1], (margins[:, -1] > 0).float())
    assert torch.allclose(margins[:, -1], (drive - bits @ overlap)[:, -1], atol=1e-5)


def test_hardly_any_single_flip_is_left_that_would_come_nearer():
    vectors, x = torch.randn(24, 32), 3 * torch.randn(200, 32)
    bits = nearest_bits(x, vectors, torch.zeros(32))
    error = (x - bits @ vectors).square().sum(1)
    flipped = torch.stack([(x - (bits - flip).abs() @ vectors).square().sum(1) for flip in torch.eye(24)])
    assert float((flipped.amin(0) < error - 1e-3).float().mean()) < 0.25
