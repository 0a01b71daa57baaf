import pytest
import torch

from hf_adacomp.fitting.spectrum import (
    BLOCK,
    binary_code_distortion,
    gaussian_distortion,
    mean_and_covariance,
    principal_axes,
    squared_norms,
)


def test_mean_and_covariance_are_weighted_and_float64():
    x, weights = torch.randn(BLOCK + 100, 5) + 3, torch.rand(BLOCK + 100)
    mean, covariance = mean_and_covariance(x, weights)
    assert mean.dtype == covariance.dtype == torch.float64
    expected = torch.cov(x.double().T, correction=0, aweights=weights.double())
    assert torch.allclose(mean, (weights.double() @ x.double()) / weights.double().sum(), atol=1e-5)
    assert torch.allclose(covariance, expected, atol=1e-4)


def test_principal_axes_are_orthonormal_and_decrease():
    x = torch.randn(500, 6) * torch.tensor([1.0, 5, 2, 4, 3, 0.1])
    mean, axes, variances = principal_axes(x, torch.ones(500))
    assert torch.allclose(axes.T @ axes, torch.eye(6), atol=1e-5)
    assert torch.equal(variances, variances.sort(descending=True).values)
    assert axes[:, 0].abs().argmax() == 1
    spread = ((x - mean) @ axes).square().mean(0)
    assert torch.allclose(spread, variances, rtol=1e-3)


def test_a_table_of_few_directions_has_no_other_variance():
    x = torch.randn(300, 2) @ torch.randn(2, 8)
    *_, variances = principal_axes(x, torch.ones(300))
    assert (variances[2:] < 1e-5 * variances[0]).all()
    assert (variances >= 0).all()


def test_squared_norms_in_a_metric(device):
    x = torch.tensor([[1.0, 2.0], [0.0, 3.0]], device=device)
    metric = torch.tensor([[2.0, 1.0], [1.0, 1.0]], device=device)
    assert squared_norms(x, metric).tolist() == [2 + 4 + 4, 9]


def test_a_gaussian_without_bits_keeps_its_variance_and_loses_it_with_many():
    variances = torch.tensor([4.0, 2.0, 1.0])
    assert float(gaussian_distortion(variances, 0)) == pytest.approx(7, rel=1e-6)
    assert float(gaussian_distortion(variances, 60)) < 1e-4
    errors = [float(gaussian_distortion(variances, bits)) for bits in range(12)]
    assert errors == sorted(errors, reverse=True)


def test_one_bit_quarters_the_largest_variance():
    assert float(gaussian_distortion(torch.tensor([4.0, 0.5]), 1)) == pytest.approx(1.5, rel=1e-6)


def test_binary_codes_do_as_fewer_bits_would():
    variances = torch.linspace(3, 0.1, 20)
    assert (
        gaussian_distortion(variances, 32) < binary_code_distortion(variances, 32) < gaussian_distortion(variances, 16)
    )
