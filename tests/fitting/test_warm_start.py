import pytest
import torch

from hf_adacomp.codes.codebook import BinaryCodebook
from hf_adacomp.fitting.spectrum import squared_norms
from hf_adacomp.fitting.warm_start import fit_codebook, fit_codebooks

EYE = torch.eye(24)


def table(tokens=600, dim=24) -> torch.Tensor:
    """Rows with a decaying spectrum and a mean, like a trained table."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(tokens, dim, generator=generator) * torch.arange(1, dim + 1) ** -0.7
    return 0.05 * rows @ torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0] + 0.02


def explained(book: BinaryCodebook, x: torch.Tensor, weights: torch.Tensor) -> float:
    error = (weights[:, None] * (x - book.reconstruct(x, EYE)) ** 2).sum()
    mean = (weights @ x) / weights.sum()
    return 1 - float(error / (weights[:, None] * (x - mean) ** 2).sum())


@pytest.mark.parametrize("tied", [False, True])
def test_more_bits_explain_more(tied):
    x, weights = table(), torch.ones(600)
    found = []
    for length in (4, 16, 48):
        book = BinaryCodebook(length, 24, tied=tied, storage="int8")
        fit_codebook(book, x, weights, EYE, torch.Generator().manual_seed(0))
        found.append(explained(book, x, weights))
    assert found == sorted(found)
    assert found[0] > 0.2
    assert found[1] > 0.5
    assert found[2] > 0.75


def test_blocks_do_not_matter(monkeypatch):
    x, weights, found = table(), torch.rand(600) + 0.5, []
    for bits in (1 << 22, 1 << 9):
        monkeypatch.setattr("hf_adacomp.codes.codebook.BITS_PER_BLOCK", bits)
        book = BinaryCodebook(24, 24, tied=True, storage="float32")
        fit_codebook(book, x, weights, EYE, torch.Generator().manual_seed(0))
        found.append(explained(book, x, weights))
    assert found[1] == pytest.approx(found[0], abs=5e-3)


def test_weights_decide_where_the_error_falls():
    x = table()
    weights = torch.where(torch.arange(600) < 60, 50.0, 1.0)
    books = [BinaryCodebook(16, 24, tied=True, storage="float32") for _ in range(2)]
    fit_codebook(books[0], x, weights, EYE, torch.Generator().manual_seed(0))
    fit_codebook(books[1], x, torch.ones(600), EYE, torch.Generator().manual_seed(0))
    errors = [(x - book.reconstruct(x, EYE)).square().sum(1)[:60].sum() for book in books]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("tied", [False, True])
def test_fits_are_best_in_their_own_metric(tied):
    x = torch.randn(200, 4)
    metrics = [torch.eye(4), torch.tensor([50.0, 1.0, 1.0, 0.1]).diag()]
    errors = []
    for metric in metrics:
        fitted = BinaryCodebook(6, 4, tied=tied, storage="float32")
        fit_codebook(fitted, x, torch.ones(200), metric, torch.Generator().manual_seed(0))
        errors.append([float(squared_norms(x - fitted.reconstruct(x, metric), m).sum()) for m in metrics])
    assert errors[0][0] < errors[1][0]
    assert errors[1][1] < errors[0][1]


@pytest.mark.usefixtures("quick_fit")
def test_cost_is_the_weighted_distortion_and_repeats():
    x, weights = table(), torch.arange(600).sqrt()
    random_state = torch.get_rng_state()
    costs = []
    for _ in range(2):
        torch.set_rng_state(random_state)
        books = [BinaryCodebook(n, 24, tied=True, storage="int8") for n in (2, 8, 30)]
        expected_next = torch.get_rng_state()
        costs.append(fit_codebooks(books, x, weights, EYE, 600 * 12, seed=3, show_progress=False))
    assert torch.equal(*costs)
    assert torch.equal(torch.get_rng_state(), expected_next)
    expected = weights * (x - books[1].reconstruct(x, EYE)).square().sum(1)
    assert torch.allclose(costs[0][:, 1], expected)


@pytest.mark.usefixtures("quick_fit")
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (40, 1), (3, 50)])
def test_tables_of_odd_shapes(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    books = [BinaryCodebook(n, shape[1], tied=True, storage="int8") for n in (2, 70)]
    cost = fit_codebooks(books, x, torch.ones(shape[0]), torch.eye(shape[1]), 80 * shape[0], 0, show_progress=False)
    assert torch.isfinite(cost).all()


@pytest.mark.usefixtures("quick_fit")
def test_constant_table():
    books = [BinaryCodebook(n, 4, tied=False, storage="int8") for n in (2, 8)]
    fit_codebooks(books, torch.full((50, 4), 0.3), torch.ones(50), torch.eye(4), 500, 0, show_progress=False)
    assert torch.allclose(
        books[1].reconstruct(torch.full((2, 4), 0.3), torch.eye(4)), torch.full((2, 4), 0.3), atol=1e-3
    )
