import json

import pytest
from conftest import LENGTHS, VOCABULARY

from hf_adacomp import AdaCompConfig, compress, pack
from hf_adacomp.integration.layout import check_layout, empty_table, sealed, table_layout, tensor_checksums

pytestmark = pytest.mark.usefixtures("quick_fit")


@pytest.fixture(params=["training", "packed"])
def table(bert, config, counts, request):
    compress(bert, config, counts)
    if request.param == "packed":
        pack(bert)
    return bert.get_input_embeddings()


def test_layout_rebuilds_the_shapes_from_json(table):
    layout = json.loads(json.dumps(table_layout(table, tied_head=False)))
    check_layout("t", layout, table.config)
    empty = empty_table(layout, table.config)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in table.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.state_dict().items()} == shapes
    assert (empty.padding_idx, empty.zero_padding, empty.scale) == (0, True, 1.0)


def test_checksums_are_of_what_packing_fixed(table):
    found = tensor_checksums(table)
    if table.packed is None:
        assert found == {}
    else:
        books = {f"codebooks.{k}.weight" for k in range(3)}
        assert set(found) == {"packed.codes", "packed.length_indices", *books}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_embeddings", 0, "whole number from 1"),
        ("embedding_dim", "32", "whole number"),
        ("padding_idx", VOCABULARY, f"from 0 to {VOCABULARY - 1}"),
        ("zero_padding", 1, "true or false"),
        ("scale", float("nan"), "a finite number"),
        ("code_lengths", [8, 4], "increasing numbers"),
        ("code_lengths", [], "increasing numbers"),
        ("tokens_per_length", [1, 2, 3], f"3 numbers that sum to {VOCABULARY}"),
        ("tensor_checksums", [], "checksums by name"),
        ("tied_head", None, "true or false"),
    ],
)
def test_fields_that_cannot_be_are_quoted(packed_bert, config, field, value, message):
    layout = table_layout(packed_bert.get_input_embeddings(), tied_head=False)
    with pytest.raises(ValueError, match=f"^t: {field} of the table's layout.* must be .*{message}"):
        check_layout("t", sealed({**layout, field: value}, config), config)


def test_missing_fields_are_named(packed_bert, config):
    layout = table_layout(packed_bert.get_input_embeddings(), tied_head=False)
    for field in layout:
        with pytest.raises(ValueError, match=f"lacks the field '{field}'"):
            check_layout("t", {name: value for name, value in layout.items() if name != field}, config)


@pytest.mark.parametrize("change", [{"padding_idx": 3}, {"scale": 2.0}])
def test_the_seal_finds_changes(packed_bert, config, change):
    layout = table_layout(packed_bert.get_input_embeddings(), tied_head=False)
    with pytest.raises(ValueError, match="checksum of the table's layout"):
        check_layout("t", {**layout, **change}, config)
    other = AdaCompConfig(LENGTHS, target_ratio=31)
    with pytest.raises(ValueError, match=r"target_ratio=31\.0"):
        check_layout("t", layout, other)


def test_whole_numbers_of_other_json_writers_are_the_same_scale(packed_bert, config):
    layout = table_layout(packed_bert.get_input_embeddings(), tied_head=False)
    check_layout("t", {**layout, "scale": 1}, config)
