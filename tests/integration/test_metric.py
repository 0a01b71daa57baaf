import pytest
import torch
from conftest import VOCABULARY, tiny_bert_config
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification
from transformers.modeling_outputs import BaseModelOutput

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding, compress
from hf_adacomp.integration.metric import task_metrics
from hf_adacomp.nn.head import CompressedHead

DIM = 32


class OneDirection(nn.Module):
    """Logits that depend on the first coordinate of the vectors alone."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def forward(self, input_ids, attention_mask=None, labels=None):
        return {"logits": self.embedding(input_ids)[..., :1].sum(1)}


def loader(rows=64, length=8) -> DataLoader:
    ids = torch.randint(0, VOCABULARY, (rows, length))
    return DataLoader([{"input_ids": row} for row in ids], batch_size=4)


def measured(model, embedding, data) -> torch.Tensor:
    metric = task_metrics(model, [embedding], data, show_progress=False)[embedding]
    assert metric.shape == (DIM, DIM)
    assert metric.dtype == torch.float32
    assert float(metric.trace()) == pytest.approx(DIM)
    return metric


@pytest.fixture
def embedding(config):
    """Not warm yet: measuring needs no code-books."""
    return compress(BertForSequenceClassification(tiny_bert_config()), config).get_input_embeddings()


def test_what_is_read_is_what_the_metric_is_long_in(embedding):
    expected = torch.eye(DIM) / 2
    expected[0, 0] += DIM / 2
    assert torch.allclose(measured(OneDirection(embedding), embedding, loader()), expected, atol=1e-3)
    assert embedding.cold


def test_directions_count_by_the_size_of_gradients_not_its_square(embedding):
    class TwoDirections(OneDirection):
        def forward(self, input_ids):
            return {"logits": self.embedding(input_ids)[..., :2].sum(1) * torch.tensor([1.0, 9.0])}

    reaction = measured(TwoDirections(embedding), embedding, loader(rows=512)).diagonal() - 0.5
    assert float(reaction[1] / reaction[0]) == pytest.approx(9, rel=0.2)
    assert float(reaction[2:].abs().max()) == pytest.approx(0, abs=1e-3)


def test_heads_read_in_the_direction_of_the_hidden_states(embedding):
    class Scorer(OneDirection):
        """A head over hidden states along the second coordinate that no vector moves."""

        def __init__(self, embedding):
            super().__init__(embedding)
            self.head = CompressedHead(embedding)

        def forward(self, input_ids):
            hidden = torch.zeros(*input_ids.shape, DIM)
            hidden[..., 1] = 1
            logits = self.head(hidden)
            assert torch.equal(logits[0, 0], embedding.training_state.source[:, 1])
            return {"logits": logits + 0 * self.embedding(input_ids).sum()}

    metric = measured(Scorer(embedding), embedding, loader())
    assert metric.diagonal().argmax() == 1
    assert float(metric[1, 1]) == pytest.approx((DIM + 1) / 2, rel=1e-3)


def test_outputs_that_react_to_nothing_leave_all_directions_alike(embedding):
    class Constant(OneDirection):
        def forward(self, input_ids):
            return {"logits": 0 * self.embedding(input_ids)}

    assert torch.equal(measured(Constant(embedding), embedding, loader()), torch.eye(DIM))


def test_gradients_whose_squares_exceed_float32_are_measured(embedding):
    class Steep(OneDirection):
        def forward(self, input_ids):
            return {"logits": 1e30 * self.embedding(input_ids)[..., :1].sum(1)}

    metric = measured(Steep(embedding), embedding, loader())
    assert float(metric[0, 0]) == pytest.approx((DIM + 1) / 2, rel=1e-3)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_broken_gradients_are_refused(embedding, factor):
    class Broken(OneDirection):
        def forward(self, input_ids):
            return {"logits": factor * self.embedding(input_ids)}

    with pytest.raises(ValueError, match=r"NaN or Inf. Set AdaCompConfig\(significance=False\)"):
        measured(Broken(embedding), embedding, loader())


def test_each_table_has_a_metric_of_its_own(config):
    tables = [
        AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(VOCABULARY, DIM), config).requires_grad_(False)
        for _ in range(2)
    ]

    class Both(nn.Module):
        def forward(self, input_ids):
            return {"logits": tables[0](input_ids)[..., 0] + tables[1](input_ids)[..., 3]}

    metrics = task_metrics(Both(), tables, loader(), show_progress=False)
    assert [int(metrics[table].diagonal().argmax()) for table in tables] == [0, 3]


@pytest.mark.usefixtures("quick_fit")
def test_measuring_leaves_model_and_random_numbers_alone(bert, config, counts, ids):
    model = compress(bert, config, counts).train()
    embedding, data = model.get_input_embeddings(), loader()
    before = torch.get_rng_state()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    vectors = embedding.eval()(ids)
    measured(model.train(), embedding, data)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(embedding.eval()(ids), vectors)


def test_padding_does_not_count(bert, config):
    embedding = compress(bert, config).get_input_embeddings()
    shown = [{"input_ids": torch.tensor([5, 6, 7]), "attention_mask": torch.tensor([1, 1, 1])}] * 8
    padded = [{"input_ids": torch.tensor([5, 6, 7, 0]), "attention_mask": torch.tensor([1, 1, 1, 0])}] * 8
    metrics = [measured(bert, embedding, DataLoader(rows, batch_size=4)) for rows in (shown, padded)]
    assert torch.allclose(*metrics, atol=1e-4)


def test_model_without_logits_and_loss_is_refused(embedding):
    class Silent(OneDirection):
        def forward(self, input_ids):
            return BaseModelOutput(last_hidden_state=self.embedding(input_ids))

    with pytest.raises(ValueError, match=r"neither logits nor a loss but .*Set AdaCompConfig\(significance=False\)"):
        measured(Silent(embedding), embedding, loader())


def test_columns_for_the_trainer_alone_are_left_out(embedding):
    rows = [{"input_ids": torch.tensor([3, 4]), "weight_of_row": torch.tensor(2.0)}] * 4
    measured(OneDirection(embedding), embedding, DataLoader(rows, batch_size=4))


@pytest.mark.parametrize("answer", ["a tuple", "other inputs"])
def test_model_that_cannot_be_asked_is_refused(embedding, answer):
    class Odd(nn.Module):
        def forward(self, features=None):
            return (embedding(torch.tensor([3])),)

    rows = [{"features" if answer == "a tuple" else "input_ids": torch.tensor([3, 4])}] * 4
    with pytest.raises(ValueError, match=r"cannot measure which tokens matter.*significance=False"):
        measured(Odd(), embedding, DataLoader(rows, batch_size=4))
    assert embedding(torch.tensor([3])).shape == (1, DIM)  # computes what it is for again


def test_errors_are_least_where_the_metric_is_long(config, counts):
    table = nn.Embedding(VOCABULARY, DIM)
    errors = []
    for weight in (1.0, 30.0):
        metric = torch.eye(DIM)
        metric[0, 0] = weight
        embedding = AdaptiveCompressedEmbedding.from_embedding(table, config)
        embedding.warm_start(counts, metric, show_progress=False)
        errors.append((embedding.to_embedding().weight - table.weight).square().mean(0))
    assert errors[1][0] < 0.5 * errors[0][0]
    assert errors[1][1:].mean() > errors[0][1:].mean()


@pytest.mark.parametrize("bad", [torch.ones(3), -torch.eye(DIM), torch.full((DIM, DIM), torch.nan)])
def test_bad_metric_is_refused(embedding, bad):
    with pytest.raises(ValueError, match="metric must be a positive definite matrix of shape"):
        embedding.warm_start(metric=bad)
    assert embedding.cold


def test_switch_is_validated():
    with pytest.raises(ValueError, match="significance must be True or False; got 1"):
        AdaCompConfig(significance=1)
