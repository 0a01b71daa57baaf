import json

import pytest
import torch
from safetensors.torch import save_file

from hf_adacomp.integration.checkpoint import (
    Stored,
    check_stored,
    check_tables,
    stored_tensors,
    unfinished_checkpoints,
)


def test_headers_tell_shapes_and_dtypes(tmp_path):
    for file, tensors in (
        ("a.safetensors", {"x": torch.zeros(2, 3)}),
        ("b.safetensors", {"y": torch.zeros(4, dtype=torch.uint8)}),
    ):
        save_file(tensors, tmp_path / file)
    found = stored_tensors(sorted(tmp_path.iterdir()))
    assert found == {"x": Stored((2, 3), "F32"), "y": Stored((4,), "U8")}


def test_other_formats_are_refused(tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="read from safetensors files only, because others may run code"):
        stored_tensors([tmp_path / "pytorch_model.bin"])


def test_files_that_are_cut_off_are_named(tmp_path):
    save_file({"x": torch.zeros(100)}, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"cut.safetensors is no whole safetensors file .*copy or download it again"):
        stored_tensors([tmp_path / "cut.safetensors"])


def test_tables_that_the_config_does_not_name_are_found():
    stored = {
        "encoder.table.packed.codes": Stored((3,), "U8"),
        "decoder.table.training_state.source": Stored((3, 2), "F32"),
    }
    check_tables(["encoder.table", "decoder.table"], stored)
    with pytest.raises(ValueError, match=r"holds 2 compressed tables, .* describes \['encoder.table'\]"):
        check_tables(["encoder.table"], stored)


EXPECTED = {"codes": torch.zeros(5, dtype=torch.uint8, device="meta"), "bias": torch.zeros(3, device="meta")}


@pytest.mark.parametrize("prefix", ["table", "model.table", "renamed"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_promised_tensors_are_found_under_any_prefix(prefix, dtype):
    stored = {f"{prefix}.codes": Stored((5,), "U8"), f"{prefix}.bias": Stored((3,), dtype)}
    check_stored("table", EXPECTED, stored)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (None, "lacks the tensor table.codes"),
        (
            Stored((4,), "U8"),
            r"table.codes must be U8 of shape \(5,\) .* holds U8 of shape \(4,\)",
        ),
        (Stored((5,), "F32"), "must be U8"),
    ],
)
def test_broken_promises_are_quoted(codes, message):
    stored = {"table.bias": Stored((3,), "F32")} | ({"table.codes": codes} if codes else {})
    with pytest.raises(ValueError, match=message):
        check_stored("table", EXPECTED, stored)


def test_unfinished_checkpoints_are_named_with_their_fault(tmp_path):
    for step in (1, 2, 3, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"x": torch.zeros(9)}, folder / "model.safetensors")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"global_')
    weights = tmp_path / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    found = unfinished_checkpoints(tmp_path)
    assert list(found) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert "missing" in found["checkpoint-2"]
    assert "cut off" in found["checkpoint-3"]
    assert "no whole safetensors file" in found["checkpoint-4"]
    assert unfinished_checkpoints(tmp_path / "nowhere") == {}
