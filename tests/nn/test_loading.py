"""What a table takes from a state dict, and what it refuses."""

import copy
import logging

import pytest
import torch
from conftest import LENGTHS, VOCABULARY
from torch import nn

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding
from hf_adacomp.config import CODEBOOK_DTYPES
from hf_adacomp.nn.loading import UNITS

pytestmark = pytest.mark.usefixtures("quick_fit")
DIM = 32


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


def test_a_packed_table_takes_other_codes_of_its_lengths(table, config, counts, device):
    other = AdaptiveCompressedEmbedding.from_embedding(
        nn.Embedding(VOCABULARY, DIM, padding_idx=0, device=device), config, torch.ones_like(counts).to(device)
    )
    for packed in (table, other):
        packed.pack()
    assert table.packed.tokens_per_length != other.packed.tokens_per_length
    assert table.load_state_dict(other.state_dict()) == ([], [])
    ids = torch.arange(VOCABULARY, device=device)
    assert torch.equal(table(ids), other(ids))


@pytest.mark.parametrize("form", ["training", "packed"])
def test_parameters_alone_are_taken(table, form):
    if form == "packed":
        table.pack()
    learned = {name: parameter.detach() + 1 for name, parameter in table.named_parameters()}
    _, unexpected = table.load_state_dict(learned, strict=False)
    assert unexpected == []
    assert all(torch.equal(parameter, learned[name]) for name, parameter in table.named_parameters())


def test_a_training_with_other_code_lengths_is_told_of(table, config, counts, device):
    source = nn.Embedding(VOCABULARY, DIM, padding_idx=0, device=device)
    others = AdaCompConfig(**{**config.to_dict(), "code_lengths": (LENGTHS[0], LENGTHS[1] + 1, LENGTHS[2])})
    other = AdaptiveCompressedEmbedding.from_embedding(source, others, counts.to(device))
    with pytest.raises(RuntimeError, match=r"began with code_lengths=\(.*\), and is resumed with \(.*start anew"):
        other.load_state_dict(table.state_dict(), strict=False)


def test_a_training_without_the_counts_it_began_with_takes_its_lengths(config, counts, device, caplog):
    config.code_lengths = "auto"
    source = nn.Embedding(VOCABULARY, DIM, device=device)
    begun = AdaptiveCompressedEmbedding.from_embedding(source, config, (counts**4).to(device))
    begun.step(0.9, show_progress=False)
    resumed = AdaptiveCompressedEmbedding.from_embedding(source, config)
    assert resumed.config.ladder != begun.config.ladder
    with caplog.at_level(logging.WARNING, "hf_adacomp"):
        resumed.load_state_dict(begun.state_dict())
    assert "make the optimizer after this" in caplog.text
    for table in (begun, resumed):
        table.pack()
    assert torch.equal(resumed.weight_values(), begun.weight_values())


@pytest.mark.parametrize("storage", CODEBOOK_DTYPES)
def test_a_packed_state_of_the_format_before_is_divided(storage, counts):
    config = AdaCompConfig(LENGTHS, target_ratio=2, codebook_dtype=storage)
    table = AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(VOCABULARY, DIM), config, counts)
    table.pack()
    before = {name: tensor.clone() for name, tensor in table.state_dict().items()}
    assert before.pop(UNITS).numel() == 0
    before[f"codebook.{table.codebook.learned}"] *= table.codebook.rate
    for other in (AdaptiveCompressedEmbedding(VOCABULARY, DIM, table.config), copy.deepcopy(table)):
        other.load_state_dict(before)
        assert torch.equal(other.weight_values(), table.weight_values())


def test_a_training_state_of_the_format_before_is_taken(table):
    before = table.state_dict()
    del before["training_state.ladder"]
    table.load_state_dict(before)


def test_a_packed_table_of_before_keeps_its_units(table):
    """As it comes out of a pickled model."""
    table.pack()
    expected = table.weight_values().clone()
    with torch.no_grad():
        table.codebook.divide_by_rate()
        getattr(table.codebook, table.codebook.learned).mul_(table.codebook.rate**2)
    table.codebook.rate = 1.0
    assert UNITS not in table.state_dict()
    again = AdaptiveCompressedEmbedding(VOCABULARY, DIM, table.config, table.padding_idx)
    again.load_state_dict(table.state_dict())
    assert torch.equal(again.to(expected.device).weight_values(), expected)
