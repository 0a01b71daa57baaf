import pytest
import torch
from conftest import VOCABULARY
from torch import nn

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding
from hf_adacomp.nn.regularization import (
    SAMPLED_TOKENS,
    add_gradients,
    finite_gradients,
    regularizer,
    relative_error,
    sample_tokens,
)


def test_sampled_tokens_are_a_function_of_counts_seed_and_progress(counts):
    first = sample_tokens(counts, 3, 100)
    assert first.shape == (SAMPLED_TOKENS,)
    assert torch.equal(first, sample_tokens(counts, 3, 100))
    assert not torch.equal(first, sample_tokens(counts, 3, 101))
    assert not torch.equal(first, sample_tokens(counts, 4, 100))
    assert (first < 64).sum() > (first >= VOCABULARY - 64).sum()


def test_relative_error_is_measured_in_the_metric():
    decoded, source = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    assert relative_error(decoded, source, torch.eye(2)) == 4
    assert relative_error(decoded, source, torch.diag(torch.tensor([1.0, 3.0]))) == 12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_large_half_precision_rows_do_not_overflow(dtype):
    source = torch.full((8, 64), 300.0, dtype=dtype)
    found = relative_error(source * 1.5, source, torch.eye(64))
    assert float(found) == pytest.approx(0.25, rel=1e-2)


def test_relative_error_of_a_table_of_zeros_is_finite():
    assert relative_error(torch.ones(2, 4), torch.zeros(2, 4), torch.eye(4)).isfinite()


@pytest.mark.usefixtures("quick_fit")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_of_both_terms(counts, dtype):
    losses = []
    for orthogonality, reconstruction in ((1, 0), (0, 1), (2, 3)):
        config = AdaCompConfig(
            (4, 8, 20),
            target_ratio=16,
            orthogonality_weight=orthogonality,
            reconstruction_weight=reconstruction,
        )
        torch.manual_seed(0)
        source = nn.Embedding(VOCABULARY, 32, dtype=dtype)
        table = AdaptiveCompressedEmbedding.from_embedding(source, config, counts)
        loss = regularizer(config, table.codebook, table.training_state, table.hard_decoder().vectors)
        assert loss.dtype == torch.float32
        losses.append(float(loss))
    assert losses[2] == pytest.approx(2 * losses[0] + 3 * losses[1], rel=1e-2)


def test_gradients_are_added_to_those_of_the_task():
    learned, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    learned.grad = torch.tensor([1.0, 0.0])
    add_gradients((learned * 3).sum(), [learned, frozen])
    assert learned.grad.tolist() == [4, 3]
    assert frozen.grad is None
    add_gradients((frozen * 3).sum(), [frozen])  # nothing to learn


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_broken_gradient_is_found(bad):
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    assert finite_gradients(parameters)
    for parameter in parameters[:2]:
        parameter.grad = torch.ones(3)
    assert finite_gradients(parameters)
    parameters[1].grad[2] = bad
    assert not finite_gradients(parameters)
