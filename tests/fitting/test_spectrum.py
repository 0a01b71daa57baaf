import pytest
import torch

from hf_adacomp.fitting.spectrum import (
    binary_code_distortion,
    gaussian_distortion,
    mean_and_covariance,
    principal_axes,
    squared_norms,
)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(500, 6) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1]) + 2


def test_weights_count_as_repetitions(x):
    times = torch.randint(0, 4, (500,))
    mean, covariance = mean_and_covariance(x, times.float())
    repeated = x.repeat_interleave(times, dim=0).double()
    assert (mean.dtype, covariance.dtype) == (torch.float64, torch.float64)
    assert torch.allclose(mean, repeated.mean(0), atol=1e-5)
    assert torch.allclose(covariance, repeated.T.cov(correction=0), atol=1e-4)


def test_blocks_do_not_matter(x, monkeypatch):
    weights = torch.rand(500) + 0.1
    whole = mean_and_covariance(x, weights)
    monkeypatch.setattr("hf_adacomp.fitting.spectrum.BLOCK", 7)
    for a, b in zip(whole, mean_and_covariance(x, weights), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_axes_are_orthonormal_and_their_variances_decrease(x):
    weights = torch.rand(500) + 0.1
    mean, axes, variances = principal_axes(x, weights)
    _, covariance = mean_and_covariance(x, weights)
    assert torch.allclose(axes.T @ axes, torch.eye(6), atol=1e-5)
    assert (variances.diff() <= 0).all()
    assert torch.allclose(axes @ variances.diag() @ axes.T, covariance.float(), atol=1e-3)
    assert torch.allclose(mean, (weights / weights.sum()) @ x, atol=1e-5)


def test_axes_follow_dtype_and_device_of_the_rows(device):
    x = torch.randn(40, 3, device=device)
    for tensor in principal_axes(x, torch.ones(40, device=device)):
        assert (tensor.dtype, tensor.device.type) == (torch.float32, device.type)


def test_a_constant_table_has_no_variance():
    mean, axes, variances = principal_axes(torch.full((50, 4), 3.0), torch.ones(50))
    assert torch.allclose(mean, torch.full((4,), 3.0))
    assert (variances >= 0).all()
    assert variances.max() < 1e-3  # of 36 without the mean
    assert axes.isfinite().all()


def test_squared_norms_are_those_of_the_metric():
    root, x = torch.randn(4, 4), torch.randn(9, 4)
    assert torch.allclose(squared_norms(x, root @ root.T), (x @ root).square().sum(1), rtol=1e-4)
    assert torch.allclose(squared_norms(x, torch.eye(4)), x.square().sum(1))


def test_each_bit_quarters_the_distortion_of_one_gaussian():
    variance = torch.tensor([8.0])
    assert [gaussian_distortion(variance, bits).item() for bits in (0, 1, 2)] == pytest.approx([8.0, 2.0, 0.5])


def test_bits_go_to_the_large_variances_first():
    """Half log2(16 / 4) is one bit: up to it the small variance gets nothing, from there on they share."""
    variances = torch.tensor([16.0, 4.0])
    assert gaussian_distortion(variances, 1).item() == pytest.approx(4 + 4)
    assert gaussian_distortion(variances, 3).item() == pytest.approx(1 + 1, rel=1e-4)


def test_more_bits_never_lose_and_no_bits_lose_everything():
    variances = torch.rand(20).sort(descending=True).values
    found = [gaussian_distortion(variances, bits).item() for bits in range(0, 60, 5)]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(variances.sum().item())
    assert 0 < found[-1] < 0.1 * found[0]


@pytest.mark.parametrize("variances", [torch.zeros(3), torch.tensor([1.0, 0.0, 0.0])])
def test_axes_without_variance_need_no_bits(variances):
    assert gaussian_distortion(variances, 1).item() == pytest.approx(variances.sum().item() / 4)


def test_a_binary_code_does_as_a_gaussian_one_of_three_quarters_of_its_bits():
    variances = torch.rand(20).sort(descending=True).values
    assert torch.equal(binary_code_distortion(variances, 16), gaussian_distortion(variances, 12))
