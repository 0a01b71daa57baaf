"""`weight`: no cost for what a tensor says of itself, decoded where values are used, never written."""

import copy
import io
import pickle

import pytest
import torch
from conftest import VOCABULARY, close
from torch import nn
from torch.nn import functional as F
from transformers import initialization

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding
from hf_adacomp.nn.head import CompressedHead
from hf_adacomp.nn.reading import LastWeight
from hf_adacomp.nn.sharing import SharedEmbedding
from hf_adacomp.nn.table import CodedTable

pytestmark = pytest.mark.usefixtures("quick_fit")
PHASES = {"observe": None, "select": 0.3, "encode": 0.9, "packed": None}


def table_in(phase, config, counts, device="cpu", **options) -> AdaptiveCompressedEmbedding:
    dense = nn.Embedding(VOCABULARY, 32, device=device, **options)
    table = AdaptiveCompressedEmbedding.from_embedding(dense, config, None if phase == "observe" else counts)
    if phase == "packed":
        table.pack()
    elif PHASES[phase] is not None:
        table.step(PHASES[phase], show_progress=False)
    assert table.phase == phase
    return table


@pytest.fixture(params=PHASES)
def table(request, config, counts, device) -> AdaptiveCompressedEmbedding:
    return table_in(request.param, config, counts, device)


@pytest.fixture
def packed(config, counts) -> AdaptiveCompressedEmbedding:
    return table_in("packed", config, counts)


@pytest.fixture
def decodings(monkeypatch) -> list[CodedTable]:
    """The tables that were decoded whole, in order."""
    found = []
    original = CodedTable.decoder
    monkeypatch.setattr(CodedTable, "decoder", lambda table: found.append(table) or original(table))
    return found


def test_what_a_tensor_says_of_itself_decodes_nothing(table, decodings):
    weight, bias = table.weight, table.codebook.bias
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.device, weight.shape) == (bias.dtype, bias.device, (VOCABULARY, 32))
    assert (weight.size(0), weight.dim(), weight.numel(), len(weight)) == (VOCABULARY, 2, VOCABULARY * 32, VOCABULARY)
    assert weight.is_contiguous()
    assert weight.is_floating_point()
    assert torch.ones(2, dtype=torch.float64).to(weight).dtype == weight.dtype
    assert torch.zeros_like(weight).shape == weight.new_zeros(VOCABULARY, 32).shape
    assert weight.requires_grad
    assert f"({VOCABULARY}, 32)" in repr(weight)
    assert weight.detach().dtype == bias.dtype
    assert decodings == []


def test_dtype_follows_the_table(packed):
    assert packed.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert packed.weight.sum().dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
def test_values_are_those_that_are_due_now(table, training):
    table.train(training)
    every = table.weight_values()
    ids = torch.tensor([[3, 1], [3, 500]], device=every.device)
    with torch.no_grad():
        for found, expected in (
            (table.weight, every),
            (table.weight.data.T, every.T),
            (table.weight[7], every[7]),
            (table.weight[-1], every[-1]),
            (table.weight[2:6], every[2:6]),
            (table.weight[[4, 2]], every[[4, 2]]),
            (table.weight[ids], every[ids]),
            (table.weight[:, :5], every[:, :5]),
            (table.weight.unbind()[9], every[9]),
            (table.weight.index_select(0, ids[0]), every[ids[0]]),
            (F.embedding(ids, table.weight), every[ids]),
            (F.linear(every[:2], table.weight), F.linear(every[:2], every)),
            (torch.cat([table.weight, every]), torch.cat([every, every])),
        ):
            assert torch.allclose(found + 0, expected, atol=1e-5)
        assert torch.allclose(table(ids), table.weight[ids] * table.scale, atol=1e-5)
    assert table.weight.detach().cpu().numpy().tolist() == every.tolist() == table.weight.data.tolist()
    with pytest.raises(IndexError):
        table.weight[VOCABULARY]


@pytest.mark.parametrize("phase", ["select", "encode", "packed"])
def test_gradients_are_those_of_the_decoded_vectors(phase, config, counts):
    table = table_in(phase, config, counts)
    hidden = torch.randn(5, 32)
    found = []
    for weight in (table.weight, table.decoder().vectors(torch.arange(VOCABULARY))):
        table.zero_grad()
        F.linear(hidden, weight).logsumexp(-1).sum().backward()
        found.append({name: parameter.grad for name, parameter in table.named_parameters()})
    assert any(gradient is not None and gradient.any() for gradient in found[0].values())
    for gradient, expected in zip(*(gradients.values() for gradients in found), strict=True):
        assert (gradient is None) == (expected is None)
        assert gradient is None or torch.allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_one_weight_serves_many_backward_passes_and_steps(packed):
    weight = packed.weight  # as a loss holds it that is made once
    optimizer = torch.optim.SGD(packed.parameters(), lr=0.1)
    sums = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = weight.square().mean()
        loss.backward()
        optimizer.step()
        sums.append(loss.item())
    assert sums[0] > sums[1] > sums[2]


def test_gradients_at_the_weight_are_observed(counts):
    table = table_in("observe", AdaCompConfig(code_lengths=(4, 8, 20), observe_fraction=0.25), counts)
    F.linear(torch.randn(4, 32), table.weight).square().sum().backward()
    table.step(0.1)
    assert table.training_state.observation.moments.any()
    assert table.reached


def test_initialisation_of_models_looks_at_data_before_there_are_codes(packed, decodings):
    packed.loading = True
    initialization.zeros_(packed.weight.data[0])
    assert decodings == []


def test_freezing_the_weight_freezes_the_table(table):
    table.weight.requires_grad = False
    assert not any(parameter.requires_grad for parameter in table.parameters())
    assert not table.weight.requires_grad
    table.weight.requires_grad_(True)
    assert all(parameter.requires_grad for parameter in table.parameters())


def test_head_and_further_embeddings_show_the_same_weight(packed):
    assert packed.weight is CompressedHead(packed).weight is SharedEmbedding(packed).weight


def test_it_is_no_parameter_and_never_saved(table):
    table.weight.sum()
    assert "weight" not in dict(table.named_parameters())
    assert table.state_dict()["weight"].numel() == 0


def test_copies_are_plain_tensors(table):
    every = table.weight_values()
    for plain in (copy.deepcopy(table.weight), pickle.loads(pickle.dumps(table.weight)), table.weight.clone()):  # ours
        assert type(plain) is torch.Tensor
        assert torch.equal(plain, every)
    file = io.BytesIO()
    torch.save({"weight": table.weight.detach()}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["weight"], every)


def test_a_copied_table_reads_its_own(packed):
    packed.weight.sum()
    other = copy.deepcopy(packed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other.weight.any()
    assert packed.weight.any()


def test_read_often_decoded_once_and_let_go(packed, decodings):
    packed.eval()
    ids = torch.tensor([1, 2])
    with torch.no_grad():
        for _ in range(5):
            packed.weight.sum()
        assert len(decodings) == 1
        for _ in range(3):  # a model whose head multiplies by `weight` in each pass
            packed(ids)
            packed.weight.sum()
        assert len(decodings) == 1 + 3
        assert packed.last_weight._kept is not None
        packed(ids)
        packed(ids)
        assert packed.last_weight._kept is None


def test_values_are_decoded_anew_when_something_changed(packed):
    before = packed.weight.detach().clone()
    with torch.no_grad():
        packed.codebook.bias += 1
    assert not torch.equal(packed.weight, before)
    packed.resize(torch.arange(100), torch.zeros(0, packed.config.ladder[-1]))
    assert packed.weight.shape == packed.weight.clone().shape == (100, 32)


@torch.no_grad()
def test_values_are_decoded_anew_where_averages_are_put_in_place_of_data(packed, ids):
    """As classes for moving averages do, uncounted by autograd."""
    packed.eval()
    before, vectors = packed.weight.clone(), packed(ids)
    packed.codebook.scale.data.copy_(2 * packed.codebook.scale)
    packed.codebook.bias.data.mul_(2)
    assert close(packed.weight.clone(), 2 * before)
    assert close(packed(ids), 2 * vectors)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("phase", ["encode", "packed"])
def test_values_are_decoded_anew_after_a_step(phase, fused, config, counts):
    table = table_in(phase, config, counts).train()
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.1, fused=fused)
    before = table.weight.clone()
    table.weight.square().sum().backward()  # and nothing is looked up
    optimizer.step()
    assert not torch.equal(table.weight, before)


def test_in_inference_mode_first_and_with_gradients_next(packed):
    with torch.inference_mode():
        packed.weight.sum()
    F.linear(torch.randn(2, 32, requires_grad=True), packed.weight).sum().backward()
    assert packed.codebook.bias.grad.any()


def test_compiled_code_may_read_it(packed):
    packed.eval()
    read = torch.compile(lambda hidden: F.linear(hidden, packed.weight), backend="eager", fullgraph=True)
    hidden = torch.randn(2, 32)
    with torch.no_grad():
        assert torch.allclose(read(hidden), F.linear(hidden, packed.weight), atol=1e-5)


def test_last_weight_is_one_object_while_somebody_holds_it(packed):
    weight = packed.weight
    assert packed.weight is weight
    with torch.no_grad():
        assert packed.weight is weight
        assert packed.weight.requires_grad
    assert isinstance(copy.deepcopy(packed.last_weight), LastWeight)


def test_padding_has_no_gradient_as_upstream(config, counts):
    for phase in ("encode", "packed"):
        table = table_in(phase, config, counts, padding_idx=3)
        table.padding_idx, table.zero_padding = 3, False  # a row that is not zero
        table.zero_grad()
        table(torch.tensor([3, 3])).sum().backward()
        assert not any(parameter.grad is not None and parameter.grad.any() for parameter in table.parameters())
        table(torch.tensor([3, 4])).sum().backward()
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in table.parameters())


def test_a_detached_weight_has_gradients_of_its_own(packed):
    for learns in (True, False):
        packed.requires_grad_(learns)
        weight = packed.weight.detach().requires_grad_(not learns)
        copied = nn.Embedding.from_pretrained(packed.weight, freeze=learns)
        assert {parameter.requires_grad for parameter in packed.parameters()} == {learns}
        assert (weight.requires_grad, copied.weight.requires_grad) == (not learns, not learns)
    ids = torch.tensor([3, 5, 3])
    nn.functional.embedding(ids, weight).sum().backward()
    assert weight.grad[[3, 4, 5]].sum(1).tolist() == [64, 0, 32]
    assert all(parameter.grad is None for parameter in packed.parameters())
    packed.weight.requires_grad_(True)
    assert all(parameter.requires_grad for parameter in packed.parameters())


@pytest.mark.parametrize("sparse", [False, True])
def test_sparse_gradients_reach_the_table(packed, sparse):
    nn.functional.embedding(torch.tensor([3, 3, 5]), packed.weight, sparse=sparse).sum().backward()
    assert torch.equal(packed.codebook.bias.grad, torch.full((32,), 3.0))


@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_of_one_call_are_those_of_its_gradients(packed, frozen):
    """As meta-learning has it: a step within a call of the module, and the gradient at its parameters after it."""
    packed.requires_grad_(not frozen)
    held = packed.weight  # which others may have read before
    x = torch.randn(5, 32, requires_grad=True)
    fast = {name: 2 * value.detach() for name, value in packed.named_parameters()}
    for value in fast.values():
        value.requires_grad_()

    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = packed

        def forward(self, x):
            return (x @ self.table.weight.T).square().mean()

    loss = torch.func.functional_call(Scores(), {f"table.{name}": value for name, value in fast.items()}, (x,))
    found = torch.autograd.grad(loss, [x, *fast.values()])
    other = copy.deepcopy(packed).requires_grad_(True)
    with torch.no_grad():
        for name, value in other.named_parameters():
            value.copy_(fast[name])
    expected = torch.autograd.grad((x @ other.weight.T).square().mean(), [x, *other.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, expected, strict=True))
    assert packed.weight is held
