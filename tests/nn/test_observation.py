import copy

import pytest
import torch
from conftest import VOCABULARY, tiny_bert_config
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertForSequenceClassification

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding, compress
from hf_adacomp.nn.head import CompressedHead
from hf_adacomp.nn.observation import MEASURED_ROWS, Observation

DIM = 32
CONFIG = AdaCompConfig((4, 8, 20), target_ratio=32, observe_fraction=0.05)
pytestmark = pytest.mark.usefixtures("quick_fit")


@pytest.fixture
def table() -> AdaptiveCompressedEmbedding:
    """Not fitted yet: to observe needs no code-books."""
    return AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(VOCABULARY, DIM), CONFIG).train()


def observed(table, loss) -> Observation:
    loss.backward()
    table.step(0.0)
    assert table.cold
    return table.training_state.observation


def test_computes_with_the_source_vectors(table, ids):
    source = table.training_state.source
    hidden = torch.randn(2, DIM)
    assert torch.equal(table(ids), source[ids])
    assert torch.equal(CompressedHead(table)(hidden), hidden @ source.T)


def test_what_was_counted_in_the_middle_of_a_step_moves_along(table, ids):
    table(ids).sum().backward()
    observation = table.training_state.observation
    table.to("cpu")
    assert observation._counts.sum() == ids.numel()
    assert observation.to("meta")._counts is None


def test_a_head_of_float64_is_measured(ids):
    table = AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(VOCABULARY, DIM).double(), CONFIG).train()
    hidden = table(ids)
    assert observed(table, CompressedHead(table)(hidden).square().sum()).measured_metric() is not None


def test_copies_that_last_for_a_step_are_refused(table, ids):
    replica = table._replicate_for_data_parallel()
    with pytest.raises(ValueError, match=r"nn.DataParallel .* torchrun"):
        replica(ids)
    replica.training = False
    assert replica(ids).shape == (*ids.shape, DIM)


def test_what_the_loss_reads_is_what_the_metric_is_long_in(table, ids):
    metric = observed(table, table(ids)[..., 0].sum()).measured_metric()
    expected = torch.eye(DIM) / 2
    expected[0, 0] += DIM / 2
    assert metric.dtype == torch.float32
    assert torch.allclose(metric, expected, atol=1e-3)


def test_one_id_and_one_hidden_state_are_measured(table):
    hidden = torch.randn(DIM, requires_grad=True)
    observation = observed(table, table(torch.tensor(3)).sum() + CompressedHead(table)(hidden).square().sum())
    assert observation.token_counts.tolist() == [int(token == 3) for token in range(VOCABULARY)]
    assert hidden.grad.shape == (DIM,)


def test_directions_count_by_the_size_of_gradients_not_its_square(table, ids):
    loss = (table(ids)[..., :2] * torch.tensor([1.0, 9.0]) * torch.randn(*ids.shape, 2)).sum()
    reaction = observed(table, loss).measured_metric().diagonal() - 0.5
    assert float(reaction[1] / reaction[0]) == pytest.approx(9, rel=0.5)
    assert float(reaction[2:].abs().max()) == pytest.approx(0, abs=1e-3)


def test_heads_read_in_the_direction_of_the_hidden_states(table):
    hidden = torch.zeros(3, 5, DIM)
    hidden[..., 1] = 1
    metric = observed(table, CompressedHead(table)(hidden.requires_grad_()).square().sum()).measured_metric()
    assert float(metric[1, 1]) == pytest.approx((DIM + 1) / 2, rel=1e-3)


def test_tokens_count_where_the_gradient_reaches_them(table):
    ids = torch.tensor([[5, 6, 6], [7, 7, 0]])
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0]])
    counts = observed(table, (table(ids).sum(-1) * mask).sum()).token_counts
    assert counts[[0, 5, 6, 7]].tolist() == [0, 1, 2, 2]
    assert counts.sum() == 5
    assert torch.equal(table.token_counts(), counts)


def test_padding_of_a_model_neither_counts_nor_is_measured():
    found = []
    for ids, mask in (([5, 6, 7], [1, 1, 1]), ([5, 6, 7, 9], [1, 1, 1, 0])):
        torch.manual_seed(0)
        settings = tiny_bert_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = compress(BertForSequenceClassification(settings), CONFIG).train()
        batch = {"input_ids": torch.tensor([ids] * 4), "attention_mask": torch.tensor([mask] * 4)}
        loss = model(**batch, labels=torch.tensor([0, 1, 0, 0])).loss
        found.append(observed(model.get_input_embeddings(), loss))
    assert torch.equal(found[0].token_counts, found[1].token_counts)
    assert torch.allclose(found[0].measured_metric(), found[1].measured_metric(), atol=1e-4)


def test_micro_batches_add_up_and_other_forward_passes_do_not(table):
    for _ in range(3):
        table(torch.tensor([[4, 5]])).sum().backward()
        with torch.no_grad():
            table(torch.tensor([[6]]))
        table(torch.tensor([[7]]))  # without a way back
    assert table.training_state.token_counts.sum() == 0  # until the step
    table.step(0.0)
    assert table.token_counts().nonzero().squeeze(1).tolist() == [4, 5]
    assert table.token_counts().sum() == 6


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_count_once(table, reentrant):
    ids = torch.tensor([[4, 5, 5]])
    start = torch.zeros((), requires_grad=True)
    loss = checkpoint(lambda zero: table(ids).sum() + zero, start, use_reentrant=reentrant)
    assert observed(table, loss).token_counts[[4, 5]].tolist() == [1, 2]


def test_counts_that_were_given_stay(counts, ids):
    table = AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(VOCABULARY, DIM), CONFIG, counts).train()
    assert table.phase == "observe"
    table(ids).square().sum().backward()
    table.step(0.0)
    table(ids).square().sum().backward()
    table.step(0.1)
    assert table.phase == "select"
    assert torch.equal(table.token_counts(), counts)
    assert not torch.equal(table.training_state.metric, torch.eye(DIM))


def test_an_evaluation_does_not_end_it(counts, ids):
    table = AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(VOCABULARY, DIM), CONFIG, counts).train()
    table(ids).square().sum().backward()
    table.step(0.0)
    table.eval()(ids)
    assert table.phase == "observe"
    assert not torch.equal(table.training_state.metric, torch.eye(DIM))  # it sees what was measured by now


@pytest.mark.parametrize(
    ("settings", "given", "phase"),
    [
        ({}, False, "observe"),
        ({}, True, "observe"),
        ({"significance": False}, True, "select"),
        ({"significance": False}, False, "observe"),
        ({"observe_fraction": 0}, True, "select"),
        ({"observe_fraction": 0}, False, "observe"),
    ],
)
def test_observes_only_what_is_not_known(counts, settings, given, phase):
    config = AdaCompConfig((4, 8, 20), target_ratio=32, **{"observe_fraction": 0.05, **settings})
    source = nn.Embedding(VOCABULARY, DIM)
    table = AdaptiveCompressedEmbedding.from_embedding(source, config, counts if given else None).train()
    assert table.phase == phase
    table(torch.arange(9)).square().sum().backward()
    table.step(0.05)
    assert table.phase == "select"
    measured = "significance" not in settings and "observe_fraction" not in settings
    assert torch.equal(table.training_state.metric, torch.eye(DIM)) == (not measured)


def test_frozen_table_is_observed_without_gradients_of_its_own(table, ids):
    table.requires_grad_(False)
    assert observed(table, table(ids).square().sum()).token_counts.sum() == ids.numel()
    assert all(parameter.grad is None for parameter in table.parameters())


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_broken_gradients_are_left_out_and_told_of(table, ids, factor, caplog):
    found = observed(table, (factor * table(ids)).sum())
    assert "the gradients of the loss are NaN or Inf" in caplog.text
    assert not found.broken
    assert not found.token_counts.any()
    assert found.measured_metric() is None


def test_broken_gradients_at_a_head_are_told_of(table, caplog):
    head = CompressedHead(table)
    (head(torch.randn(4, DIM, requires_grad=True)).sum() * float("nan")).backward()
    table.step(0.1)
    assert "NaN or Inf" in caplog.text
    assert not table.training_state.observation.moments.any()


def test_gradients_whose_squares_exceed_float32_are_measured(table, ids):
    metric = observed(table, 1e30 * table(ids)[..., 0].sum()).measured_metric()
    assert float(metric[0, 0]) == pytest.approx((DIM + 1) / 2, rel=1e-3)


def test_many_rows_are_measured_by_a_sample_of_the_same_weight(table):
    ids = torch.randint(0, VOCABULARY, (5 * MEASURED_ROWS,))
    found = observed(table, table(ids)[:, 0].sum())
    assert float(found.moments[0, 0]) == pytest.approx(len(ids))
    assert found.token_counts.sum() == len(ids)


def test_table_without_a_gradient_is_told_of_and_fitted(table, ids, caplog):
    with torch.no_grad():
        table(ids)
    table.step(0.5)
    assert table.phase == "encode"
    assert "token_counts" in caplog.text
    assert "significance=False" in caplog.text


def test_state_survives_casts_and_loading(table, ids):
    found = observed(table, (table(ids) ** 3).sum())
    other = AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(VOCABULARY, DIM), CONFIG)
    other.load_state_dict(table.state_dict())
    cast = other.to(torch.bfloat16).training_state.observation
    assert torch.equal(cast.moments, found.moments)
    assert torch.equal(cast.measured_metric(), found.measured_metric())


def test_each_table_has_a_metric_of_its_own(ids):
    tables = [AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(VOCABULARY, DIM), CONFIG) for _ in range(2)]
    (tables[0](ids)[..., 0] + tables[1](ids)[..., 3]).sum().backward()
    for table, direction in zip(tables, (0, 3), strict=True):
        table.step(0.0)
        assert table.training_state.observation.measured_metric().diagonal().argmax() == direction


def test_errors_are_least_where_the_metric_is_long(config, counts):
    source = nn.Embedding(VOCABULARY, DIM)
    errors = []
    for weight in (1.0, 30.0):
        metric = torch.eye(DIM)
        metric[0, 0] = weight
        table = AdaptiveCompressedEmbedding.from_embedding(source, config)
        table.warm_start(counts, metric, show_progress=False)
        errors.append((table.to_embedding().weight - source.weight).square().mean(0))
    assert errors[1][0] < 0.5 * errors[0][0]
    assert errors[1][1:].mean() > errors[0][1:].mean()


LOPSIDED = torch.eye(DIM)
LOPSIDED[0, 1] = 0.5


@pytest.mark.parametrize("bad", [torch.ones(3), -torch.eye(DIM), torch.full((DIM, DIM), torch.nan), LOPSIDED])
def test_bad_metric_is_refused(table, bad):
    with pytest.raises(ValueError, match="metric must be a symmetric, positive definite matrix of shape"):
        table.warm_start(metric=bad)
    assert table.cold


@pytest.mark.parametrize("bad", [{"significance": 1}, {"observe_fraction": 1.5}, {"observe_fraction": "all"}])
def test_settings_are_validated(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name} must be"):
        AdaCompConfig(**bad)


@pytest.mark.parametrize("where", [0, -1])
def test_positions_are_measured_as_often_as_they_are(table, where):
    """A classifier's gradients come from one position of each text: each so-manieth of all would be all or none."""
    ids = torch.randint(VOCABULARY, (4 * MEASURED_ROWS // 64, 64))
    moments = observed(table, (table(ids)[:, where] * torch.randn(len(ids), DIM)).sum()).moments
    assert float(moments.trace()) == pytest.approx(len(ids) * DIM, rel=0.5)


def test_other_places_are_measured_in_each_step_and_the_same_in_a_resumed_run(table):
    rows, found = torch.randn(4 * MEASURED_ROWS, DIM), []
    resumed = copy.deepcopy(table)
    for step in range(2):
        if step:
            resumed.load_state_dict(table.state_dict())
        for one in (table, resumed):
            before = one.training_state.observation.moments.clone()
            one.training_state.observation.note_table(rows)
            one.training_state.recount()
            found.append(one.training_state.observation.moments - before)
    assert torch.equal(found[2], found[3])
    assert not torch.allclose(found[0], found[2], rtol=1e-3)
