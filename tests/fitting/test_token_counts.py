import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hf_adacomp.fitting.token_counts import expected_counts, token_weights
from hf_adacomp.integration.training_data import BATCH_SIZE, count_tokens

ROWS = [[1, 2, 3], [2, 2, 4], [5]] * 50


class Rows(Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return ROWS[index]


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from ROWS


def collate(rows, mask=True):
    width = max(map(len, rows))
    batch = {"input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows])}
    if mask:
        batch["attention_mask"] = (batch["input_ids"] != 0).long()
    return batch


@pytest.mark.parametrize("loader", [{"batch_size": 7}, {"batch_size": 7, "shuffle": True, "drop_last": True}])
def test_counts_every_row_once_and_no_padding(loader):
    counts = count_tokens(DataLoader(Rows(), collate_fn=collate, **loader), 8)
    assert counts.tolist() == [0, 50, 150, 50, 50, 50, 0, 0]


def test_without_a_mask_every_id_counts():
    counts = count_tokens(DataLoader(Rows(), collate_fn=lambda rows: collate(rows, mask=False)), 6)
    assert counts[0] == 100


def test_leaves_random_numbers_alone():
    def noisy(rows):
        torch.rand(3)
        return collate(rows)

    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    count_tokens(DataLoader(Rows(), collate_fn=noisy, shuffle=True), 6)
    assert torch.rand(1) == expected


def test_endless_data_is_read_as_far_as_training_will():
    counts = count_tokens(DataLoader(Endless(), collate_fn=collate, batch_size=4), 6, max_rows=2 * BATCH_SIZE)
    assert counts.sum() == sum(len(ROWS[i % len(ROWS)]) for i in range(2 * BATCH_SIZE))


def test_batches_without_ids_are_refused():
    with pytest.raises(ValueError, match=r"no 'input_ids' but \['pixels'\].*token_counts"):
        count_tokens(DataLoader(Rows(), collate_fn=lambda rows: {"pixels": torch.zeros(1)}), 6)


def test_expected_counts_of_unseen_tokens_follow_their_neighbours():
    torch.manual_seed(0)
    source = torch.randn(2000, 16)
    common = source[:, 0] > 0.5
    counts = torch.poisson(torch.where(common, 3.0, 0.05)).long()
    expected = expected_counts(counts, source)
    unseen = counts == 0
    assert expected[unseen].mean() == pytest.approx(0.5, rel=1e-3)
    assert expected[unseen & common].mean() > 3 * expected[unseen & ~common].mean()
    assert (expected >= counts).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (50, 1)])
def test_expected_counts_of_odd_tables(shape):
    assert torch.equal(expected_counts(torch.zeros(shape[0]), torch.randn(shape)), torch.full(shape[:1], 0.5))
    assert torch.isfinite(expected_counts(torch.ones(shape[0]), torch.zeros(shape))).all()


def test_weights_are_roots():
    assert token_weights(torch.tensor([0.5, 4.0])).tolist() == pytest.approx([0.5**0.5, 2])
