import json

import pytest
import torch
from conftest import LENGTHS, VOCABULARY
from torch import nn

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding
from hf_adacomp.integration.layout import (
    MOST_BITS,
    MOST_TOKENS,
    SEALED_SETTINGS,
    check_layout,
    empty_table,
    sealed,
    table_layout,
)

pytestmark = pytest.mark.usefixtures("quick_fit")


def make(counts, *, packed=True, dtype=None, **changes) -> AdaptiveCompressedEmbedding:
    config = AdaCompConfig(**{"code_lengths": LENGTHS, "target_ratio": 12, **changes})
    source = nn.Embedding(VOCABULARY, 32, padding_idx=0, dtype=dtype)
    table = AdaptiveCompressedEmbedding.from_embedding(source, config, counts)
    if packed:
        table.pack()
    return table


@pytest.fixture
def table(counts) -> AdaptiveCompressedEmbedding:
    return make(counts)


def shapes(table: nn.Module) -> dict[str, tuple]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in table.state_dict().items()}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("changes", [{}, {"codebook_dtype": "int8"}, {"codebook_dtype": "float32"}, {"tied": False}])
def test_empty_table_has_the_tensors_of_the_one_described(changes, packed, counts):
    table = make(counts, packed=packed, **changes)
    layout = json.loads(json.dumps(table_layout(table, tied_head=False)))
    check_layout("t", layout, table.config)
    empty = empty_table(layout, table.config)
    assert shapes(empty) == shapes(table)
    assert {tensor.device.type for tensor in [*empty.parameters(), *empty.buffers()]} == {"meta"}
    assert (empty.config.ladder, empty.packed is None) == (table.config.ladder, not packed)


def test_empty_table_keeps_dtype_scale_and_padding(counts):
    table = make(counts, dtype=torch.bfloat16)
    table.scale = 5.5
    empty = empty_table(table_layout(table, tied_head=False), table.config, torch.bfloat16)
    assert shapes(empty) == shapes(table)
    assert (empty.scale, empty.padding_idx, empty.zero_padding) == (5.5, 0, True)


def test_lengths_of_an_automatic_ladder_are_the_tables_own(counts):
    table, config = make(counts, code_lengths="auto"), AdaCompConfig(target_ratio=12)
    layout = table_layout(table, tied_head=False)
    assert layout["code_lengths"] == [*table.config.ladder]
    assert empty_table(layout, config).config.ladder == table.config.ladder


def test_layout_says_whether_a_head_reads_the_table(table):
    assert [table_layout(table, tied_head=tied)["tied_head"] for tied in (True, False)] == [True, False]


def test_checksums_are_of_all_that_packing_fixed(table, counts):
    integers = {"codebook.weight"}
    assert table.checksums().keys() == {"packed.codes", "packed.length_indices"} | integers
    assert make(counts, codebook_dtype="float32").checksums().keys() == {"packed.codes", "packed.length_indices"}
    assert make(counts, packed=False).checksums() == {}


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("num_embeddings", 0, f"from 1 to {MOST_TOKENS}"),
        ("num_embeddings", True, "a whole number"),
        ("num_embeddings", "512", "a whole number"),
        ("embedding_dim", MOST_BITS + 1, f"from 1 to {MOST_BITS}"),
        ("padding_idx", VOCABULARY, "from 0 to 511"),
        ("padding_idx", None, "false where padding_idx is null"),
        ("zero_padding", 1, "true or false"),
        ("tied_head", None, "true or false"),
        ("scale", float("nan"), "a finite number"),
        ("scale", float("inf"), "a finite number"),
        ("scale", True, "a finite number"),
        ("code_lengths", [], "1 to 256 increasing numbers"),
        ("code_lengths", [8, 4, 20], "1 to 256 increasing numbers"),
        ("code_lengths", [4, 4, 20], "1 to 256 increasing numbers"),
        ("code_lengths", [0, 8, 20], "a list of whole numbers from 1"),
        ("code_lengths", "4", "a list of whole numbers"),
        ("tokens_per_length", [1, 2, 3], "3 numbers that sum to 512"),
        ("tokens_per_length", [VOCABULARY], "3 numbers that sum to 512"),
        ("tensor_checksums", [1], "checksums by name"),
        ("tensor_checksums", {"packed.codes": -1}, "from 0 to 4294967295"),
    ],
)
def test_what_no_table_has_is_named_even_under_a_seal(table, field, value, wanted):
    layout = {**table_layout(table, tied_head=False), field: value}
    del layout["checksum"]
    with pytest.raises(ValueError, match=rf"^t.*{'packed.codes' if isinstance(value, dict) else ''}.*{wanted}"):
        check_layout("t", sealed(layout, table.config), table.config)


def test_every_field_is_needed_and_sealed(table):
    layout = table_layout(table, tied_head=False)
    for field in layout:
        with pytest.raises(ValueError, match=f"t: .* lacks the field '{field}'"):
            check_layout("t", {name: value for name, value in layout.items() if name != field}, table.config)
    for field, value in (("embedding_dim", 31), ("tied_head", True), ("scale", 2.0), ("tensor_checksums", {})):
        with pytest.raises(ValueError, match="changed or damaged after it was saved"):
            check_layout("t", {**layout, field: value}, table.config)


@pytest.mark.parametrize(
    "changes",
    [
        {"codebook_dtype": "int8"},
        {"head": "dense"},
        {"tied": False},
        {"target_ratio": 11},
        {"selection_reach": 1},
    ],
)
def test_settings_that_vectors_depend_on_are_sealed(table, changes):
    assert changes.keys() < {*SEALED_SETTINGS}
    layout = table_layout(table, tied_head=False)
    other = AdaCompConfig(**{"code_lengths": LENGTHS, "target_ratio": 12, **changes})
    with pytest.raises(ValueError, match=f"with .*{next(iter(changes))}=.* it should be"):
        check_layout("t", layout, other)


def test_settings_of_training_are_not_sealed(table):
    other = AdaCompConfig(LENGTHS, target_ratio=12, seed=5, select_fraction=0.1, reconstruction_weight=0)
    check_layout("t", table_layout(table, tied_head=False), other)


def test_a_scale_written_as_a_whole_number_is_the_same(table):
    layout = table_layout(table, tied_head=False)
    assert layout["scale"] == 1.0
    check_layout("t", {**layout, "scale": 1}, table.config)


def test_long_values_are_cut_in_messages(table):
    layout = {**table_layout(table, tied_head=False), "code_lengths": ["x"] * 1000}
    with pytest.raises(ValueError, match=r"code_lengths.*got .{200}\.\.\.$"):
        check_layout("t", layout, table.config)
