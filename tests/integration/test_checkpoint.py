import json
import re

import pytest
import torch
from safetensors.torch import save_file

from hf_adacomp.integration.checkpoint import (
    TRAINER_STATE,
    Stored,
    check_stored,
    check_tables,
    stored_tensors,
    unfinished_checkpoints,
)


def test_tensors_of_all_files_are_known_by_shape_and_dtype(tmp_path):
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.uint8)}, tmp_path / "1.safetensors")
    save_file({"c": torch.zeros(0, dtype=torch.bfloat16)}, tmp_path / "2.safetensors")
    assert stored_tensors(sorted(tmp_path.iterdir())) == {
        "a": Stored((2, 3), "F32"),
        "b": Stored((4,), "U8"),
        "c": Stored((0,), "BF16"),
    }


def test_files_that_may_run_code_are_refused_unread(tmp_path):
    with pytest.raises(ValueError, match=r"from safetensors files only, .* got .*model.bin"):
        stored_tensors([tmp_path / "model.bin"])


@pytest.mark.parametrize("kept", [0, 7, 30, -1])
def test_a_file_that_is_not_whole_is_named(tmp_path, kept):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 3)}, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} is a damaged safetensors file"):
        stored_tensors([file])


def test_tables_that_the_config_forgets_are_found():
    stored = {name: Stored((1,), "U8") for name in ("x.packed.codes", "y.training_state.source", "y.codes", "packed")}
    check_tables(["x", "y"], stored)
    check_tables(["renamed.x", "y"], stored)
    with pytest.raises(ValueError, match=r"holds 2 compressed tables, \['x', 'y'\], .* describes \['x'\]"):
        check_tables(["x"], stored)


EXPECTED = {
    "packed.codes": torch.empty(9, dtype=torch.uint8, device="meta"),
    "scale": torch.empty(3, 1, device="meta"),
}
STORED = {"bert.table.packed.codes": Stored((9,), "U8"), "bert.table.scale": Stored((3, 1), "F32")}


@pytest.mark.parametrize("name", ["bert.table", "table", "classifier.bert.table"])
def test_tables_are_found_with_and_without_a_task_head(name):
    check_stored(name, EXPECTED, STORED)


def test_a_renamed_table_is_found_by_its_tensors():
    check_stored("model.embed_tokens", EXPECTED, STORED)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_floats_may_be_of_any_width(dtype):
    check_stored("bert.table", EXPECTED, {**STORED, "bert.table.scale": Stored((3, 1), dtype)})


@pytest.mark.parametrize("key", EXPECTED)
def test_a_missing_tensor_is_named(key):
    stored = {name: found for name, found in STORED.items() if not name.endswith(key)}
    with pytest.raises(ValueError, match=f"lacks the tensor bert.table.{key}"):
        check_stored("bert.table", EXPECTED, stored)


@pytest.mark.parametrize(
    ("key", "found", "wanted"),
    [
        ("packed.codes", Stored((8,), "U8"), r"U8 of shape \(9,\)"),
        ("packed.codes", Stored((9,), "I8"), r"U8 of shape \(9,\)"),
        ("scale", Stored((3,), "F32"), r"F16 or BF16 or F32 or F64 of shape \(3, 1\)"),
        ("scale", Stored((3, 1), "I32"), r"F16 or BF16 or F32 or F64 of shape \(3, 1\)"),
    ],
)
def test_another_shape_or_dtype_is_named(key, found, wanted):
    with pytest.raises(ValueError, match=rf"bert.table.{key} must be {wanted} .* holds {found.dtype} of shape"):
        check_stored("bert.table", EXPECTED, {**STORED, f"bert.table.{key}": found})


@pytest.mark.parametrize("name", ["bert.table", "table", "classifier.bert.table"])
def test_a_right_tensor_of_another_table_does_not_do(name):
    stored = {**STORED, "bert.table.packed.codes": Stored((8,), "U8"), "other.packed.codes": Stored((9,), "U8")}
    with pytest.raises(ValueError, match=r"bert.table.packed.codes must be .* \(8,\)"):
        check_stored(name, EXPECTED, stored)


def test_unfinished_checkpoints_are_told_from_whole_ones(tmp_path):
    for step in (1, 2, 3, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
        (folder / TRAINER_STATE).write_text(json.dumps({"global_step": step}))
    for other in ("runs", "checkpoint-best"):
        (tmp_path / other).mkdir()
    (tmp_path / "checkpoint-5").touch()
    (tmp_path / "checkpoint-5.zip").touch()
    assert unfinished_checkpoints(tmp_path) == {}
    (tmp_path / "checkpoint-1" / TRAINER_STATE).unlink()
    (tmp_path / "checkpoint-2" / TRAINER_STATE).write_text('{"global')
    (tmp_path / "checkpoint-3" / "model.safetensors").write_bytes(b"\0" * 4)
    found = unfinished_checkpoints(tmp_path)
    assert [*found] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    reasons = (f"{TRAINER_STATE} is missing", f"{TRAINER_STATE} is cut off", "a damaged safetensors file")
    assert all(reason in fault for reason, fault in zip(reasons, found.values(), strict=True))
    assert unfinished_checkpoints(tmp_path / "nowhere") == {}
