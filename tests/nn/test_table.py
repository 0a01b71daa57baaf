import copy

import pytest
import torch
from conftest import LENGTHS, VOCABULARY
from torch import nn

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding

pytestmark = pytest.mark.usefixtures("quick_fit")
DIM = 32


@pytest.fixture
def table(config, counts, device) -> AdaptiveCompressedEmbedding:
    source = nn.Embedding(VOCABULARY, DIM, padding_idx=0, device=device)
    return AdaptiveCompressedEmbedding.from_embedding(source, config, counts.to(device))


def test_budget_is_what_the_size_leaves_for_codes(table, config):
    assert table.budget() // 8 + table.codebook.stored_bytes() < 4 * VOCABULARY * DIM / config.target_ratio
    table.pack()
    stored = sum(tensor.nbytes for tensor in table.state_dict().values())
    assert 4 * VOCABULARY * DIM / stored >= config.target_ratio


def test_lengths_of_now_and_of_the_last_step(table):
    table.step(0.1)
    settled = table.code_lengths(settled=True)
    assert torch.equal(table.code_lengths(), settled)
    with torch.no_grad():
        table.training_state.selector.offset[:, 0] += torch.rand_like(table.training_state.selector.offset[:, 0])
    assert torch.equal(table.code_lengths(settled=True), settled)
    assert not torch.equal(table.code_lengths(), settled)


def test_fits_again_when_more_was_observed(config, device):
    table = AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(VOCABULARY, DIM, device=device), config)
    ids = torch.arange(9, device=device)
    table.train()(ids).sum().backward()
    table.training_state.recount()
    table.eval()(ids)  # asks for a fit
    assert not table.cold
    table.train()(ids + 1).square().sum().backward()
    table.training_state.recount()
    assert table.cold
    assert table.phase == "observe"
    table.end_observation()
    assert not table.cold
    assert table.phase == "select"


def test_forms_do_not_load_into_each_other(table):
    packed = copy.deepcopy(table)
    packed.pack()
    for module, state, form in ((table, packed, "packed"), (packed, table, "training")):
        with pytest.raises(RuntimeError, match=f"the checkpoint holds the {form} form"):
            module.load_state_dict(state.state_dict(), strict=False)


def new_module(config, device) -> nn.Module:
    return nn.Sequential(AdaptiveCompressedEmbedding(VOCABULARY, DIM, config, padding_idx=0), nn.Linear(DIM, 2)).to(
        device
    )


@pytest.mark.parametrize("lengths", ["auto", LENGTHS])
def test_a_new_table_takes_a_packed_state(config, counts, device, lengths):
    config.code_lengths = lengths
    module = new_module(config, device)
    source = nn.Embedding(VOCABULARY, DIM, padding_idx=0, device=device)
    module[0] = AdaptiveCompressedEmbedding.from_embedding(source, config, counts.to(device))
    module[0].pack()
    again = new_module(AdaCompConfig(**module[0].config.to_dict()), device)
    assert again.load_state_dict(module.state_dict()) == ([], [])
    assert again[0].phase == "packed"
    ids = torch.arange(VOCABULARY, device=device)
    assert torch.equal(again[0](ids), module[0](ids))


@pytest.mark.parametrize("changed", [{"code_lengths": (4, 8)}, {"code_lengths": (4, 8, 16, 32)}])
def test_a_new_table_of_other_lengths_is_told_of(table, config, device, changed):
    table.pack()
    new = AdaptiveCompressedEmbedding(VOCABULARY, DIM, AdaCompConfig(**{**config.to_dict(), **changed}), device=device)
    with pytest.raises(RuntimeError, match=r"not of .* tokens with code lengths .* settings of the one that was saved"):
        new.load_state_dict(table.state_dict())
    assert new.phase == "observe"


@pytest.mark.parametrize("form", ["training", "packed"])
def test_dense_checkpoints_are_refused(table, form):
    if form == "packed":
        table.pack()
    with pytest.raises(RuntimeError, match=r"the checkpoint holds a dense table.* then compress that"):
        table.load_state_dict({"weight": torch.zeros(VOCABULARY, DIM)}, strict=False)


def test_packed_tables_grow_by_codes_of_the_longest_length(table, device):
    table.pack()
    before = table.eval()(torch.arange(VOCABULARY, device=device))
    table.resize(torch.arange(VOCABULARY - 2, device=device), torch.ones(5, LENGTHS[-1], device=device))
    assert table.num_embeddings == VOCABULARY + 3
    after = table(torch.arange(VOCABULARY + 3, device=device))
    assert torch.allclose(after[: VOCABULARY - 2], before[:-2], atol=1e-6)
    assert (table.code_lengths()[-5:] == LENGTHS[-1]).all()
    assert table.codes(VOCABULARY + 2) == tuple(range(LENGTHS[-1]))


def test_what_is_not_there_is_asked_for_by_name(table):
    with pytest.raises(ValueError, match=r"not packed yet: call pack\(\) first"):
        table.require_packed()
    table.pack()
    for verb in ("token_counts", "end_observation", "freeze_lengths"):
        with pytest.raises(ValueError, match=f"{verb} is not possible on a packed embedding"):
            getattr(table, verb)()
    assert table.coder is table.training_state is None


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_fit_is_the_same_wherever_it_is_asked_for(config, context):
    found = []
    for surrounded in (False, True):
        torch.manual_seed(0)
        table = AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(VOCABULARY, DIM), config)
        table.train()(torch.arange(9)).square().sum().backward()
        table.training_state.recount()
        with context() if surrounded else torch.no_grad():
            table.eval()(torch.arange(9))
        found.append(table.state_dict())
        table.train()(torch.arange(9)).sum().backward()  # goes on learning
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
