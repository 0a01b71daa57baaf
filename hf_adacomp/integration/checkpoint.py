"""What checkpoint files hold, looked at before anything is loaded from them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import transformers_compat
from ..config import FORMAT_VERSION, PLAIN_VERSION
from ..nn.loading import GUARD, UNITS
from .dense_tables import same_table

DTYPES = {torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64"}
FLOATS = ("F16", "BF16", "F32", "F64")
"""Names of dtypes in safetensors. Float weights may be cast on the way in."""

TRAINER_STATE = "trainer_state.json"
"""What the Trainer writes last into a checkpoint."""

MARKS = ("packed.codes", "training_state.source")
"""A tensor that only compressed tables have, of each form."""


class Stored(NamedTuple):
    """Shape and dtype, as safetensors calls it, of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: str


def stored_tensors(files: Iterable[str | os.PathLike[str]]) -> dict[str, Stored]:
    """The tensors of safetensors files by name, from their headers alone.

    Raises:
        ValueError: For a file of another format, or one that is not whole.
    """
    tensors = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(
                f"compressed tables are read from safetensors files only, because others may run code; got {file}: "
                "save the model again with model.save_pretrained"
            )
        try:
            with safe_open(file, "pt") as content:
                for name in content.keys():  # noqa: SIM118  # not a dictionary
                    part = content.get_slice(name)
                    tensors[name] = Stored(tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{file} is a damaged safetensors file ({error}): copy or download it again") from error
    return tensors


def check_tables(names: Iterable[str], stored: Mapping[str, Stored]) -> None:
    """Raise ValueError if a file holds compressed tables that the config does not name."""
    names = [*names]
    found = sorted(key.removesuffix(f".{mark}") for key in stored for mark in MARKS if key.endswith(f".{mark}"))
    if len(found) > len(names):
        raise ValueError(
            f"the file holds {len(found)} compressed tables, {found}, but the quantization_config describes {names}. A "
            "model that was built of compressed ones must be packed as a whole, hf_adacomp.pack(whole), and saved again"
        )


def check_stored(name: str, expected: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> None:
    """Raise ValueError unless a file holds a table's tensors with the dtypes and shapes that its layout promises.

    Args:
        name: Of the table. transformers renames parts of some models; then the end of a tensor's name must do.
        expected: Its state on the meta device.
        stored: The tensors of the file.
    """
    for key, tensor in expected.items():
        alike = {full: found for full, found in stored.items() if full.endswith(f".{key}")}
        named = {full: found for full, found in alike.items() if same_table(full.removesuffix(f".{key}"), name)}
        holders = named or alike
        if not holders:
            _refuse_dense(name, stored)
            raise ValueError(
                f"the file lacks the tensor {name}.{key} of the compressed table: it is damaged, or was written by a "
                "program that does not know such tables, as those that merge models: decompress(model) first"
            )
        dtypes = FLOATS if tensor.is_floating_point() else (DTYPES[tensor.dtype],)
        if not any(found.shape == tuple(tensor.shape) and found.dtype in dtypes for found in holders.values()):
            full, found = next(iter(holders.items()))
            raise ValueError(
                f"{full} must be {' or '.join(dtypes)} of shape {tuple(tensor.shape)} by the config; the file holds "
                f"{found.dtype} of shape {found.shape}"
            )


def is_undivided(packed: Sequence[str], empty: Sequence[str], version: int) -> bool:
    """Whether the code-books of a file are in the units of `PLAIN_VERSION`.

    Args:
        packed: Names of its packed tables.
        empty: Names of its empty tensors. Some programs leave them all out; then the version must do.
        version: `format_version` of the config that it is loaded with.

    Raises:
        ValueError: If only the tensor is missing that tells the units of this version.
    """
    told = any(name.endswith(f".{UNITS}") for name in empty)
    if empty and packed and not told and version != PLAIN_VERSION:
        raise ValueError(
            f"the file lacks the empty tensor {packed[0]}.{UNITS}, which files of format_version={FORMAT_VERSION} "
            f"have: it is damaged, or of format_version={PLAIN_VERSION} and loaded with the config of another "
            "model. Leave out config=..., or copy or download it again"
        )
    return version == PLAIN_VERSION and not told


def _refuse_dense(name: str, stored: Mapping[str, Stored]) -> None:
    """Raise ValueError if a file holds a dense table where the config promises a compressed one."""
    for full, found in stored.items():
        if same_table(full.removesuffix(f".{GUARD}"), name) and 0 not in found.shape:
            raise ValueError(
                f"the file holds a dense table, {full} of shape {found.shape}, under the quantization_config of a "
                "compressed one: a plain model was made of a compressed model's config. Take quantization_config out "
                "of config.json; next time, del config.quantization_config before the model is made"
            )


def unfinished_checkpoints(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Checkpoints in `folder` that the Trainer was killed in the middle of writing, and what is wrong with each."""
    prefix = f"{transformers_compat.checkpoint_prefix()}-"
    paths = [path for path in sorted(Path(folder).glob(f"{prefix}*")) if path.name.removeprefix(prefix).isdigit()]
    found = {path.name: _fault(path) for path in paths if path.is_dir()}
    return {name: fault for name, fault in found.items() if fault}


def _fault(checkpoint: Path) -> str | None:
    try:
        stored_tensors(checkpoint.glob("*.safetensors"))
        json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{TRAINER_STATE} is missing, which is written last"
    except json.JSONDecodeError as error:
        return f"{TRAINER_STATE} is cut off: {error}"
    except ValueError as error:
        return str(error)
    return None
