import pytest
import torch

from hf_adacomp.codes.codebook import BinaryCodebook
from hf_adacomp.fitting.spectrum import squared_norms
from hf_adacomp.fitting.warm_start import fit_codebook
from hf_adacomp.lengths.budget import assign_lengths

EYE = torch.eye(24)


def table(tokens=600, dim=24) -> torch.Tensor:
    """Rows with a decaying spectrum and a mean, like a trained table."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(tokens, dim, generator=generator) * torch.arange(1, dim + 1) ** -0.7
    return 0.05 * rows @ torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0] + 0.02


def fit(x, weights, lengths, metric=EYE, budget=None, seed=0, **options) -> tuple[BinaryCodebook, torch.Tensor]:
    book = BinaryCodebook(lengths[-1], x.shape[1], **{"tied": True, "storage": "float32", **options})
    budget = len(x) * lengths[-1] if budget is None else budget
    return book, fit_codebook(book, lengths, x, weights, metric, budget, seed, show_progress=False)


def explained(book: BinaryCodebook, x: torch.Tensor, weights: torch.Tensor, length: int | None = None) -> float:
    error = (weights[:, None] * (x - book.reconstruct(x, EYE, length)) ** 2).sum()
    mean = (weights @ x) / weights.sum()
    return 1 - float(error / (weights[:, None] * (x - mean) ** 2).sum())


@pytest.mark.parametrize("tied", [False, True])
def test_more_bits_explain_more(tied):
    x, weights = table(), torch.ones(600)
    book, _ = fit(x, weights, (4, 16, 48), tied=tied, storage="int8", budget=600 * 20)
    found = [explained(book, x, weights, length) for length in (4, 16, 48)]
    assert found == sorted(found)
    assert found[0] > 0.2
    assert found[1] > 0.5
    assert found[2] > 0.75


def test_errors_are_measured_near_a_tokens_length_and_told_for_all():
    x, weights = table(), torch.rand(600, generator=torch.Generator().manual_seed(1)) ** 4 + 0.01
    ladder = (2, 4, 6, 8, 12, 16, 24, 32)
    book, cost = fit(x, weights, ladder, budget=600 * 10)
    exact = torch.stack([squared_norms(x - book.reconstruct(x, EYE, length), EYE) for length in ladder], dim=1)
    exact *= weights[:, None]
    lengths, _ = assign_lengths(-cost, torch.tensor(ladder), 600 * 10)
    rows = torch.arange(600)
    measured = torch.isclose(cost[rows, lengths], exact[rows, lengths], rtol=1e-3, atol=1e-9)
    assert measured.float().mean() > 0.95  # the rest went further than was foreseen
    assert (cost - exact).abs().sum() < 0.2 * exact.sum()
    assert (cost.sum(0).diff() < 0).all()


def test_one_book_loses_little_against_books_of_their_own():
    """Each length by the first vectors of one book, against a book that was fitted to that length alone."""
    x, weights = table(), torch.ones(600)
    book, _ = fit(x, weights, (8, 16, 32), budget=600 * 18)
    for length in (8, 16, 32):
        own, _ = fit(x, weights, (length,))
        assert explained(book, x, weights, length) > explained(own, x, weights) - 0.1


def test_blocks_do_not_matter(monkeypatch):
    x, weights, found = table(), torch.rand(600) + 0.5, []
    for bits in (1 << 22, 1 << 9):
        monkeypatch.setattr("hf_adacomp.codes.codebook.BITS_PER_BLOCK", bits)
        book, _ = fit(x, weights, (24,))
        found.append(explained(book, x, weights))
    assert found[1] == pytest.approx(found[0], abs=5e-3)


def test_large_tables_are_fitted_to_a_sample(monkeypatch):
    x, weights = table(), torch.rand(600) + 0.5
    whole = explained(fit(x, weights, (8, 24), budget=600 * 16)[0], x, weights)
    monkeypatch.setattr("hf_adacomp.fitting.warm_start.FIT_ROWS", 300)
    assert explained(fit(x, weights, (8, 24), budget=600 * 16)[0], x, weights) == pytest.approx(whole, abs=0.1)


def test_weights_decide_where_the_error_falls():
    x = table()
    weights = torch.where(torch.arange(600) < 60, 50.0, 1.0)
    books = [fit(x, each, (16,))[0] for each in (weights, torch.ones(600))]
    errors = [(x - book.reconstruct(x, EYE)).square().sum(1)[:60].sum() for book in books]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("tied", [False, True])
def test_fits_are_best_in_their_own_metric(tied):
    x = torch.randn(200, 4)
    metrics = [torch.eye(4), torch.tensor([50.0, 1.0, 1.0, 0.1]).diag()]
    errors = []
    for metric in metrics:
        fitted, _ = fit(x, torch.ones(200), (6,), metric, tied=tied)
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
        book = BinaryCodebook(30, 24, tied=True, storage="int8")
        expected_next = torch.get_rng_state()
        costs.append(fit_codebook(book, (2, 8, 30), x, weights, EYE, 600 * 12, seed=3, show_progress=False))
    assert torch.equal(*costs)
    assert torch.equal(torch.get_rng_state(), expected_next)
    expected = weights * (x - book.reconstruct(x, EYE, 8)).square().sum(1)
    assert torch.allclose(costs[0][:, 1], expected)


@pytest.mark.usefixtures("quick_fit")
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (40, 1), (3, 50)])
def test_tables_of_odd_shapes(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    _, cost = fit(x, torch.ones(shape[0]), (2, 70), torch.eye(shape[1]), 80 * shape[0], storage="int8")
    assert torch.isfinite(cost).all()


@pytest.mark.usefixtures("quick_fit")
def test_constant_table():
    x = torch.full((50, 4), 0.3)
    book, _ = fit(x, torch.ones(50), (2, 8), torch.eye(4), 500, tied=False, storage="int8")
    assert torch.allclose(book.reconstruct(x[:2], torch.eye(4)), x[:2], atol=1e-3)
