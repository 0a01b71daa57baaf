"""Tensors that are read from a compressed table: a write into them would be lost, and raises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import torch_compat

LOST = (
    "is decoded from codes, so that a change would be lost, and cannot be tied to another (losses that tie have a "
    "switch for it). A copy of your own: weight.detach().clone(). New tokens: hf_adacomp.add_tokens(model, n, "
    "vectors=...). To change others: decompress(pack(model)), change the dense table, compress it again"
)


class ReadOnly(Tensor):
    """What refuses to be written to; to all other operators it is `plain()`, and its views are read-only, too."""

    __torch_function__ = torch_compat.NO_TORCH_FUNCTION
    lies_on: torch.device  # of one without memory
    _is_hf_initialized = True  # transformers' initialisation passes over it

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it without its class and function
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch_compat.DEVICE:
            return args[0].lies_on
        if any(map(_holds, torch_compat.written(func, args, kwargs))):
            raise ValueError(f"{func.overloadpacket} would write into the weight of a compressed table: it {LOST}")
        first = args[0] if args else None
        if isinstance(first, ReadOnly):
            return first.answer(func, args[1:], kwargs)
        return on_plain(func, args, kwargs)

    def plain(self) -> Tensor:
        """The values as a plain tensor."""
        raise NotImplementedError

    def answer(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What an operator returns whose first argument this is."""
        return on_plain(func, (self, *args), kwargs)

    def share_memory_(self) -> Tensor:
        """Refused: processes would share what is decoded, not the table."""
        raise ValueError(f"the weight of a compressed table cannot be shared: it {LOST}")

    def numpy(self, *, force: bool = False) -> np.ndarray[Any, Any]:
        """As of any tensor."""
        return self.clone().numpy(force=force)

    def tolist(self) -> list[Any]:
        """As of any tensor."""
        return self.clone().tolist()

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().clone().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # torch declares no name for its options
        return f"{type(self).__name__}({tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"


class ReadOnlyCopy(ReadOnly):
    """One with memory, which other tensors may be made to share: `other.data = ...` asks no operator.

    Args:
        values: What it holds, and shares the memory of.
    """

    _held: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> ReadOnlyCopy:
        copy = values.as_subclass(cls)
        copy._held = values
        return copy

    def plain(self) -> Tensor:
        """The values as a plain tensor."""
        return self._held

    def answer(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What an operator returns whose first argument this is; views are read-only."""
        found = on_plain(func, (self, *args), kwargs)
        if not torch_compat.is_view(func):
            return found
        return ReadOnlyCopy(found) if isinstance(found, Tensor) else [ReadOnlyCopy(view) for view in found]


def on_plain(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An operator's result for the plain values of what is read-only among its arguments."""
    return func(*map(_plain, args), **{name: _plain(value) for name, value in kwargs.items()})


def _holds(value: Any) -> bool:
    return isinstance(value, ReadOnly) or (isinstance(value, (list, tuple)) and any(map(_holds, value)))


def _plain(value: Any) -> Any:
    if isinstance(value, ReadOnly):
        return value.plain()
    return type(value)(map(_plain, value)) if isinstance(value, (list, tuple)) and _holds(value) else value
